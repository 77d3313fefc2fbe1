//! The disk (virtio 1.2, section 5.2): read, write, flush, and its name. Requests are done when the driver's
//! notification returns; errors of the host are errors of the request, never of the machine.

use super::mmio::Mmio;
use super::queue::{Chain, Queue, gather, scatter, slice};
use super::{Broken, Device, copy_config};
use crate::device::Unfit;
use crate::device::block::{BLOCK_BYTES, DiskError, DiskImage, SECTOR_BYTES};
use crate::memory::GuestMemory;

const FEATURE_SIZE_MAX: u64 = 1 << 1;
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const SEGMENT_BYTES_MAX: u32 = 1 << 20;
const SEGMENTS_MAX: u32 = 126;
const REQUEST_BYTES_MAX: u64 = SEGMENT_BYTES_MAX as u64 * SEGMENTS_MAX as u64;
const HEADER_BYTES: u64 = 16;
const NAME_BYTES: usize = 20;
const COPY_BYTES: usize = 256 << 10;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// The disk behind the transport.
#[derive(Debug)]
pub struct Block {
    image: DiskImage,
    name: [u8; NAME_BYTES],
}

/// Status for the driver, and how many bytes of data were written to its buffers.
type Done = (u8, u64);

impl Block {
    /// A disk; its name is what the guest sees as its serial number.
    pub fn new(image: DiskImage, name: &str) -> Self {
        let mut bytes = [0; NAME_BYTES];
        let count = name.len().min(NAME_BYTES);
        bytes[..count].copy_from_slice(&name.as_bytes()[..count]);
        Self { image, name: bytes }
    }

    /// The image.
    pub fn image(&self) -> &DiskImage {
        &self.image
    }

    /// The image.
    pub fn image_mut(&mut self) -> &mut DiskImage {
        &mut self.image
    }

    fn request(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<Done, Broken> {
        let mut header = [0; HEADER_BYTES as usize];
        if gather(memory, &chain.readable, &mut header)? < header.len() {
            return Err(Broken("a block request without a header"));
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let sector = u64::from_le_bytes(sector);
        let written = match kind {
            TYPE_IN => self.read(chain, memory, sector)?,
            TYPE_OUT => self.write(chain, memory, sector)?,
            TYPE_FLUSH => self.image.flush().map(|()| 0),
            TYPE_GET_ID => {
                let data = slice(&chain.writable, 0, chain.writable_bytes() - 1);
                Ok(scatter(memory, &data, &self.name)? as u64)
            }
            _ => return Ok((STATUS_UNSUPPORTED, 0)),
        };
        Ok(written.map_or((STATUS_IO_ERROR, 0), |bytes| (STATUS_OK, bytes)))
    }

    /// The byte range of a transfer, if it makes one.
    fn range(&self, sector: u64, bytes: u64) -> Result<u64, DiskError> {
        let start = sector.checked_mul(SECTOR_BYTES);
        let end = start.and_then(|start| start.checked_add(bytes));
        match (start, end) {
            (Some(start), Some(end))
                if end <= self.image.bytes() && bytes.is_multiple_of(SECTOR_BYTES) && bytes <= REQUEST_BYTES_MAX =>
            {
                Ok(start)
            }
            _ => Err(DiskError::Refused { offset: sector, bytes: bytes as usize, verb: "transferred" }),
        }
    }

    fn read(&mut self, chain: &Chain, memory: &GuestMemory, sector: u64) -> Result<Result<u64, DiskError>, Broken> {
        let bytes = chain.writable_bytes() - 1;
        let start = match self.range(sector, bytes) {
            Ok(start) => start,
            Err(refused) => return Ok(Err(refused)),
        };
        let mut buffer = vec![0; COPY_BYTES.min(bytes as usize)];
        let mut done = 0;
        while done < bytes {
            let count = (bytes - done).min(COPY_BYTES as u64);
            let piece = &mut buffer[..count as usize];
            if let Err(error) = self.image.read_at(start + done, piece) {
                return Ok(Err(error));
            }
            scatter(memory, &slice(&chain.writable, done, count), piece)?;
            done += count;
        }
        Ok(Ok(bytes))
    }

    fn write(&mut self, chain: &Chain, memory: &GuestMemory, sector: u64) -> Result<Result<u64, DiskError>, Broken> {
        let bytes = chain.readable_bytes() - HEADER_BYTES;
        let start = match self.range(sector, bytes) {
            Ok(start) => start,
            Err(refused) => return Ok(Err(refused)),
        };
        let mut buffer = vec![0; COPY_BYTES.min(bytes as usize)];
        let mut done = 0;
        while done < bytes {
            let count = (bytes - done).min(COPY_BYTES as u64);
            let piece = &mut buffer[..count as usize];
            gather(memory, &slice(&chain.readable, HEADER_BYTES + done, count), piece)?;
            if let Err(error) = self.image.write_at(start + done, piece) {
                return Ok(Err(error));
            }
            done += count;
        }
        Ok(Ok(0))
    }
}

impl Device for Block {
    const ID: u32 = 2;
    const QUEUES: usize = 1;
    const QUEUE_ENTRIES_MAX: u16 = 128;

    fn features(&self) -> u64 {
        let read_only = if self.image.read_only() { FEATURE_READ_ONLY } else { 0 };
        FEATURE_SIZE_MAX | FEATURE_SEG_MAX | FEATURE_BLK_SIZE | FEATURE_FLUSH | read_only
    }

    fn read_config(&self, offset: usize, into: &mut [u8]) {
        let block_bytes = if self.image.bytes().is_multiple_of(BLOCK_BYTES) { BLOCK_BYTES } else { SECTOR_BYTES };
        let mut config = [0; 24];
        config[..8].copy_from_slice(&(self.image.bytes() / SECTOR_BYTES).to_le_bytes());
        config[8..12].copy_from_slice(&SEGMENT_BYTES_MAX.to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config[20..].copy_from_slice(&(block_bytes as u32).to_le_bytes());
        copy_config(&config, offset, into);
    }

    fn notify(&mut self, _queue: usize, queues: &mut [Queue], memory: &GuestMemory) -> Result<bool, Broken> {
        let queue = &mut queues[0];
        let mut used = false;
        while let Some(chain) = queue.pop(memory)? {
            let room = chain.writable_bytes();
            if room == 0 {
                return Err(Broken("a block request without a status byte"));
            }
            let (status, written) = self.request(&chain, memory)?;
            scatter(memory, &slice(&chain.writable, room - 1, 1), &[status])?;
            queue.push(memory, &chain, written as u32 + 1)?;
            used = true;
        }
        Ok(used)
    }
}

mod saved {
    use proto::v1::VirtioBlkV1;

    use super::*;

    impl Mmio<Block> {
        /// The saved form. What the disk holds travels as blocks, not here.
        pub fn save(&self) -> VirtioBlkV1 {
            let Block { image: _, name: _ } = self.device();
            VirtioBlkV1 { transport: Some(self.save_transport()) }
        }

        /// Puts the disk into a saved state. On an error nothing has changed.
        ///
        /// # Errors
        /// A field that it could not hold.
        pub fn restore(&mut self, saved: &VirtioBlkV1, memory: &GuestMemory) -> Result<(), Unfit> {
            self.restore_transport(saved.transport.as_ref(), memory)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::driver::Driver;
    use super::super::mmio::tests::bring_up;
    use super::*;
    use crate::memory::sized_memfd;

    const HEADER: u64 = 0x30_0000;
    const DATA: u64 = 0x40_0000;
    const STATUS: u64 = 0x50_0000;

    struct Setup {
        memory: GuestMemory,
        disk: Mmio<Block>,
        driver: Driver,
    }

    fn setup(read_only: bool) -> Setup {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let image = DiskImage::from_fd(sized_memfd("test-disk", 1 << 20).unwrap(), read_only).unwrap();
        let mut disk = Mmio::new(Block::new(image, "godwit-0"));
        let driver = bring_up(&mut disk, &memory).remove(0);
        Setup { memory, disk, driver }
    }

    impl Setup {
        fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u8 {
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            self.memory.write(HEADER, &header).unwrap();
            self.memory.write(STATUS, &[0xee]).unwrap();
            let mut parts = vec![(HEADER, 16, 0)];
            parts.extend(data);
            parts.push((STATUS, 1, 2));
            self.driver.offer(&self.memory, &parts);
            self.disk.write(&self.memory, 0x050, 4, 0);
            let mut status = [0];
            self.memory.read(STATUS, &mut status).unwrap();
            status[0]
        }
    }

    #[test]
    fn what_is_written_is_read_and_stamped() {
        let mut s = setup(false);
        s.memory.write(DATA, &[0x5a; 1024]).unwrap();
        assert_eq!(s.request(TYPE_OUT, 8, &[(DATA, 512, 0), (DATA + 512, 512, 0)]), STATUS_OK);
        assert_eq!(s.request(TYPE_FLUSH, 0, &[]), STATUS_OK);
        assert_eq!(s.request(TYPE_IN, 9, &[(DATA + 4096, 1000, 2), (DATA + 8192, 24, 2)]), STATUS_OK);
        let mut bytes = [0; 1000];
        s.memory.read(DATA + 4096, &mut bytes).unwrap();
        assert_eq!((bytes[511], bytes[512]), (0x5a, 0));
        assert_eq!(s.driver.used(&s.memory).last(), Some(&(6, 1025)));
        let mut stamp = [0; 8];
        rustix::io::pread(s.disk.device().image().stamps_fd(), &mut stamp[..], 0).unwrap();
        assert_eq!(stamp, [0, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn the_configuration_and_the_name_are_told() {
        let mut s = setup(true);
        assert_eq!(s.disk.read(0x100, 8), 2048);
        assert_eq!((s.disk.read(0x108, 4), s.disk.read(0x10c, 4), s.disk.read(0x114, 4)), (1 << 20, 126, 4096));
        assert_eq!(s.disk.read(0x010, 4) & FEATURE_READ_ONLY, FEATURE_READ_ONLY);
        assert_eq!(s.request(TYPE_GET_ID, 0, &[(DATA, 20, 2)]), STATUS_OK);
        let mut name = [0; 10];
        s.memory.read(DATA, &mut name).unwrap();
        assert_eq!(&name, b"godwit-0\0\0");
    }

    #[test]
    fn what_cannot_be_done_is_an_error_of_the_request() {
        let mut s = setup(true);
        assert_eq!(s.request(TYPE_OUT, 0, &[(DATA, 512, 0)]), STATUS_IO_ERROR);
        assert_eq!(s.request(TYPE_IN, 2048, &[(DATA, 512, 2)]), STATUS_IO_ERROR);
        assert_eq!(s.request(TYPE_IN, u64::MAX, &[(DATA, 512, 2)]), STATUS_IO_ERROR);
        assert_eq!(s.request(TYPE_IN, 0, &[(DATA, 511, 2)]), STATUS_IO_ERROR);
        assert_eq!(s.request(99, 0, &[]), STATUS_UNSUPPORTED);
        assert!(s.disk.running());
    }

    #[test]
    fn a_request_without_header_or_status_breaks_the_disk() {
        for parts in [&[(DATA, 15, 0), (STATUS, 1, 2)][..], &[(DATA, 16, 0)], &[(STATUS, 1, 2)]] {
            let mut s = setup(false);
            s.driver.offer(&s.memory, parts);
            s.disk.write(&s.memory, 0x050, 4, 0);
            assert!(!s.disk.running(), "{parts:?}");
        }
    }

    proptest! {
        #[test]
        fn no_request_panics(kind in 0u32..10, sector: u64, near: bool, lengths in proptest::collection::vec((1u32..9000, any::<bool>()), 0..6)) {
            let mut s = setup(false);
            let sector = if near { sector % 2100 } else { sector };
            let parts: Vec<_> = lengths.into_iter().map(|(bytes, write)| (DATA, bytes, if write { 2 } else { 0 })).collect();
            s.request(kind, sector, &parts);
        }
    }
}

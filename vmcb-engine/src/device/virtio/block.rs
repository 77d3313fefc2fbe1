//! The disk (virtio 1.2, section 5.2): read, write, flush, and its name. Requests are done when the driver's
//! notification returns; errors of the host are errors of the request, never of the machine.
//!
//! That the host fails enters the machine from outside, and follows from nothing in it. So it is told which requests failed and how
//! far they had come ([`Block::take_failures`]), and in a replay the same ones are made to fail ([`Block::expect_failure`]).

use std::collections::VecDeque;

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
    outcomes: Outcomes,
}

/// A request that the host failed to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// Requests that came before it since they are counted: those that ask something of the host.
    pub request: u64,
    /// Bytes that were read or written all the same.
    pub done: u64,
}

/// How requests end that ask something of the host. No part of the disk's state: it is empty between two entries of a recording.
#[derive(Clone, Debug, Default)]
pub struct Outcomes {
    /// Requests since they are counted.
    requests: u64,
    /// What failed.
    failed: Vec<Failure>,
    /// What is to fail.
    expected: VecDeque<Failure>,
}

/// Status for the driver, and how many bytes of data were written to its buffers.
type Done = (u8, u64);

const FAILED: Done = (STATUS_IO_ERROR, 0);

impl Block {
    /// A disk; its name is what the guest sees as its serial number.
    pub fn new(image: DiskImage, name: &str) -> Self {
        let mut bytes = [0; NAME_BYTES];
        let count = name.len().min(NAME_BYTES);
        bytes[..count].copy_from_slice(&name.as_bytes()[..count]);
        Self { image, name: bytes, outcomes: Outcomes::default() }
    }

    /// The image.
    pub fn image(&self) -> &DiskImage {
        &self.image
    }

    /// The image.
    pub fn image_mut(&mut self) -> &mut DiskImage {
        &mut self.image
    }

    /// The machine is about to run: requests are counted from here on, unless some are waited for that are to fail.
    pub fn count_requests(&mut self) {
        self.outcomes.failed.clear();
        if self.outcomes.expected.is_empty() {
            self.outcomes.requests = 0;
        }
    }

    /// What the host failed to do since requests are counted, once.
    pub fn take_failures(&mut self) -> Vec<Failure> {
        std::mem::take(&mut self.outcomes.failed)
    }

    /// Requests are counted from here on, and this one is to fail.
    pub fn expect_failure(&mut self, failure: Failure) {
        self.outcomes.requests = 0;
        self.outcomes.expected.push_back(failure);
    }

    /// True if requests that are to fail have not come.
    pub fn expects_failures(&self) -> bool {
        !self.outcomes.expected.is_empty()
    }

    /// How requests end, to go back to.
    pub fn outcomes(&self) -> &Outcomes {
        &self.outcomes
    }

    /// The same again.
    pub fn set_outcomes(&mut self, outcomes: Outcomes) {
        self.outcomes = outcomes;
    }

    /// Does what a request asks of the host. `work` does up to so many bytes and says how many it did, also where it fails.
    fn ask_host(
        &mut self,
        mut work: impl FnMut(&mut DiskImage, u64, &mut u64) -> Result<(), Failed>,
    ) -> Result<bool, Broken> {
        let number = self.outcomes.requests;
        self.outcomes.requests += 1;
        let expected = self.outcomes.expected.pop_front_if(|failure| failure.request == number);
        let mut done = 0;
        match work(&mut self.image, expected.map_or(u64::MAX, |failure| failure.done), &mut done) {
            Ok(()) => Ok(expected.is_none()),
            Err(Failed::Broken(broken)) => Err(broken),
            Err(Failed::Host) => {
                self.outcomes.failed.push(Failure { request: number, done });
                Ok(false)
            }
        }
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
        match kind {
            TYPE_IN => self.read(chain, memory, sector),
            TYPE_OUT => self.write(chain, memory, sector),
            TYPE_FLUSH => {
                let flushed = self.ask_host(|image, _, _| Ok(image.flush()?))?;
                Ok(if flushed { (STATUS_OK, 0) } else { FAILED })
            }
            TYPE_GET_ID => {
                let data = slice(&chain.writable, 0, chain.writable_bytes() - 1);
                Ok((STATUS_OK, scatter(memory, &data, &self.name)? as u64))
            }
            _ => Ok((STATUS_UNSUPPORTED, 0)),
        }
    }

    /// Where a transfer begins, if it can be made.
    fn start(&self, sector: u64, bytes: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR_BYTES)?;
        let fits = start.checked_add(bytes)? <= self.image.bytes();
        (fits && bytes.is_multiple_of(SECTOR_BYTES) && bytes <= REQUEST_BYTES_MAX).then_some(start)
    }

    fn read(&mut self, chain: &Chain, memory: &GuestMemory, sector: u64) -> Result<Done, Broken> {
        let bytes = chain.writable_bytes() - 1;
        let Some(start) = self.start(sector, bytes) else { return Ok(FAILED) };
        let mut buffer = vec![0; COPY_BYTES.min(bytes as usize)];
        let read = self.ask_host(|image, most, done| {
            while *done < bytes.min(most) {
                let count = (bytes.min(most) - *done).min(COPY_BYTES as u64);
                let piece = &mut buffer[..count as usize];
                image.read_at(start + *done, piece)?;
                scatter(memory, &slice(&chain.writable, *done, count), piece)?;
                *done += count;
            }
            Ok(())
        })?;
        Ok(if read { (STATUS_OK, bytes) } else { FAILED })
    }

    fn write(&mut self, chain: &Chain, memory: &GuestMemory, sector: u64) -> Result<Done, Broken> {
        let bytes = chain.readable_bytes() - HEADER_BYTES;
        let start = self.start(sector, bytes).filter(|_| bytes == 0 || !self.image.read_only());
        let Some(start) = start else { return Ok(FAILED) };
        let mut buffer = vec![0; COPY_BYTES.min(bytes as usize)];
        let written = self.ask_host(|image, most, done| {
            while *done < bytes.min(most) {
                let count = (bytes.min(most) - *done).min(COPY_BYTES as u64);
                let piece = &mut buffer[..count as usize];
                gather(memory, &slice(&chain.readable, HEADER_BYTES + *done, count), piece)?;
                let mut written = 0;
                let outcome = image.write_counted(start + *done, piece, &mut written);
                *done += written as u64;
                outcome?;
            }
            Ok(())
        })?;
        Ok(if written { (STATUS_OK, 0) } else { FAILED })
    }
}

/// Why the host's part of a request ends early.
enum Failed {
    /// The host's doing.
    Host,
    /// The driver's.
    Broken(Broken),
}

impl From<DiskError> for Failed {
    fn from(_: DiskError) -> Self {
        Failed::Host
    }
}

impl From<Broken> for Failed {
    fn from(broken: Broken) -> Self {
        Failed::Broken(broken)
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
            let Block { image: _, name: _, outcomes: _ } = self.device();
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

    /// Kind, sector, and buffers: address, bytes, flags.
    type Request<'a> = (u32, u64, &'a [(u64, u32, u16)]);

    /// What the host failed to do fails again in the same way where it is expected to, and the guest cannot tell.
    #[test]
    fn what_the_host_fails_to_do_can_be_made_to_fail_again() {
        const CUT: u64 = 600 << 10;
        let read = [(DATA, 512 << 10, 2), (DATA + (512 << 10), 256 << 10, 2)];
        let requests: [Request<'_>; 5] = [
            (TYPE_IN, 0, &read[..1]),
            (TYPE_IN, 0, &read),
            (TYPE_IN, 4096, &read),
            (TYPE_FLUSH, 0, &[]),
            (TYPE_IN, CUT / 512, &[(DATA, 512, 2)]),
        ];
        let run = |failures: &[Failure], cut: bool| {
            let mut s = setup(false);
            s.disk.device_mut().image_mut().write_at(0, &[0x5a; 700 << 10]).unwrap();
            if cut {
                rustix::fs::ftruncate(s.disk.device().image().file_fd(), CUT).unwrap();
            }
            s.disk.device_mut().count_requests();
            failures.iter().for_each(|failure| s.disk.device_mut().expect_failure(*failure));
            let statuses = requests.map(|(kind, sector, data)| s.request(kind, sector, data));
            assert!(!s.disk.device().expects_failures());
            let mut seen = vec![0; 1 << 20];
            s.memory.read(DATA, &mut seen).unwrap();
            (statuses, seen, s.driver.used(&s.memory), s.disk.device_mut().take_failures())
        };
        let (statuses, seen, used, failures) = run(&[], true);
        assert_eq!(statuses, [STATUS_OK, STATUS_IO_ERROR, STATUS_IO_ERROR, STATUS_OK, STATUS_IO_ERROR]);
        // What makes no transfer asks nothing of the host.
        assert_eq!(failures, [Failure { request: 1, done: 512 << 10 }, Failure { request: 3, done: 0 }]);
        assert_eq!(run(&failures, false), (statuses, seen, used, vec![]));
        let all = run(&[], false).0;
        assert_eq!(all, [STATUS_OK, STATUS_OK, STATUS_IO_ERROR, STATUS_OK, STATUS_OK]);
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

//! Disk images: a raw file, and a memfd of stamps beside it: the epoch of the last write of every 4 KiB block, as for
//! pages of RAM (see [`crate::memory`]). This file refuses to know who reads the stamps, and virtio.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::memory::{Keeper, StampTable, sized_memfd};

/// Bytes of a sector, the unit in which virtio counts.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes that share a stamp.
pub const BLOCK_BYTES: u64 = 4096;

/// Why a disk cannot be had or reached.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host refused.
    #[error("disk: cannot {step}")]
    Host {
        /// What was being done.
        step: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A size that makes no disk.
    #[error("disk of {0} bytes: it must be a multiple of 512 and not empty")]
    Size(u64),
    /// Beyond the end, or a write to a read-only disk.
    #[error("disk: {bytes} bytes at {offset} cannot be {verb}")]
    Refused {
        /// Where it began.
        offset: u64,
        /// How long it was.
        bytes: usize,
        /// "read" or "written".
        verb: &'static str,
    },
}

fn host(step: &'static str) -> impl Fn(Errno) -> DiskError {
    move |source| DiskError::Host { step, source: source.into() }
}

/// A raw disk file with stamps.
#[derive(Debug)]
pub struct DiskImage {
    file: File,
    stamps: OwnedFd,
    keeper: Keeper,
    bytes: u64,
    read_only: bool,
    epoch: u32,
}

impl DiskImage {
    /// Opens a raw image; its stamps are new and say "never written".
    ///
    /// # Errors
    /// The file cannot be opened, or has a size that makes no disk.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let flags = if read_only { OFlags::RDONLY } else { OFlags::RDWR } | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map_err(host("open"))?;
        Self::from_fd(fd, read_only)
    }

    /// The same from an open descriptor.
    ///
    /// # Errors
    /// The file has a size that makes no disk, or there is no memory for stamps.
    pub fn from_fd(fd: OwnedFd, read_only: bool) -> Result<Self, DiskError> {
        // A block device has no size in its status; its end has.
        let bytes = rustix::fs::seek(&fd, rustix::fs::SeekFrom::End(0)).map_err(host("find the size"))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) || bytes > 1 << 50 {
            return Err(DiskError::Size(bytes));
        }
        let blocks = bytes.div_ceil(BLOCK_BYTES);
        let no_memory = |e| DiskError::Host { step: "make stamps", source: std::io::Error::other(e) };
        let stamps = sized_memfd("disk-stamps", StampTable::file_bytes(blocks)).map_err(no_memory)?;
        let file = File::from(fd);
        let data = file.try_clone().map_err(|source| DiskError::Host { step: "share", source })?;
        let keeper = Keeper::new(data.into(), blocks).map_err(no_memory)?;
        Ok(Self { file, stamps, keeper, bytes, read_only, epoch: 1 })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Blocks of [`BLOCK_BYTES`]; the last may be cut.
    pub fn blocks(&self) -> u64 {
        self.bytes.div_ceil(BLOCK_BYTES)
    }

    /// True if the guest may not write.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The image.
    pub fn file_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The memfd of stamps: one little-endian u32 a block.
    pub fn stamps_fd(&self) -> BorrowedFd<'_> {
        self.stamps.as_fd()
    }

    /// What blocks held at a frozen instant.
    pub fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// Epoch with which writes are stamped from now on.
    pub fn set_epoch(&mut self, epoch: u32) {
        self.epoch = epoch;
    }

    fn check(&self, offset: u64, bytes: usize, verb: &'static str) -> Result<(), DiskError> {
        let fits = offset.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes);
        if fits { Ok(()) } else { Err(DiskError::Refused { offset, bytes, verb }) }
    }

    /// Reads at a byte offset.
    ///
    /// # Errors
    /// Beyond the end, or the host's error.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.check(offset, into.len(), "read")?;
        let mut done = 0;
        while done < into.len() {
            match rustix::io::pread(&self.file, &mut into[done..], offset + done as u64) {
                // The file was cut under us.
                Ok(0) => return Err(host("read")(Errno::IO)),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(host("read")(e)),
            }
        }
        Ok(())
    }

    /// Writes at a byte offset, and stamps the blocks.
    ///
    /// # Errors
    /// Beyond the end, a read-only disk, or the host's error. Blocks of a failed write are stamped too.
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), DiskError> {
        self.write_counted(offset, from, &mut 0)
    }

    /// The same; `done` is how many bytes were written, also of a write that failed.
    ///
    /// # Errors
    /// As of [`DiskImage::write_at`].
    pub fn write_counted(&mut self, offset: u64, from: &[u8], done: &mut usize) -> Result<(), DiskError> {
        *done = 0;
        self.check(offset, from.len(), "written")?;
        if self.read_only {
            return Err(DiskError::Refused { offset, bytes: from.len(), verb: "written" });
        }
        self.keep(offset, from.len() as u64)?;
        let outcome = loop {
            if *done == from.len() {
                break Ok(());
            }
            match rustix::io::pwrite(&self.file, &from[*done..], offset + *done as u64) {
                Ok(0) => break Err(host("write")(Errno::IO)),
                Ok(n) => *done += n,
                Err(Errno::INTR) => {}
                Err(e) => break Err(host("write")(e)),
            }
        };
        self.stamp(offset, from.len() as u64)?;
        outcome
    }

    /// Blocks are about to be written: what they held at a frozen instant is kept.
    fn keep(&self, offset: u64, bytes: u64) -> Result<(), DiskError> {
        if bytes == 0 || !self.keeper.is_frozen() {
            return Ok(());
        }
        for block in offset / BLOCK_BYTES..=(offset + bytes - 1) / BLOCK_BYTES {
            let mut stamp = [0; 4];
            rustix::io::pread(&self.stamps, &mut stamp[..], block * 4).map_err(host("read a stamp"))?;
            self.keeper.keep(block, u32::from_le_bytes(stamp));
        }
        // Before the write: a reader that sees new bytes must see the new stamp too.
        self.stamp(offset, bytes)
    }

    fn stamp(&self, offset: u64, bytes: u64) -> Result<(), DiskError> {
        if bytes == 0 {
            return Ok(());
        }
        let first = offset / BLOCK_BYTES;
        let count = (offset + bytes - 1) / BLOCK_BYTES - first + 1;
        let words = self.epoch.to_le_bytes().repeat(count as usize);
        let mut done = 0;
        while done < words.len() {
            match rustix::io::pwrite(&self.stamps, &words[done..], first * 4 + done as u64) {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(host("stamp")(e)),
            }
        }
        Ok(())
    }

    /// Makes everything written so far survive the host's power.
    ///
    /// # Errors
    /// The host's error.
    pub fn flush(&self) -> Result<(), DiskError> {
        rustix::fs::fdatasync(&self.file).map_err(host("flush"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: u64) -> OwnedFd {
        sized_memfd("test-disk", bytes).unwrap()
    }

    fn stamps(disk: &DiskImage) -> Vec<u32> {
        let mut bytes = vec![0; disk.blocks() as usize * 4];
        rustix::io::pread(disk.stamps_fd(), &mut bytes[..], 0).unwrap();
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }

    #[test]
    fn writes_are_stamped_and_reads_are_not() {
        let mut disk = DiskImage::from_fd(image(5 * 4096 + 512), false).unwrap();
        disk.write_at(4095, &[1, 2]).unwrap();
        disk.set_epoch(7);
        disk.write_at(5 * 4096, &[3; 512]).unwrap();
        let mut bytes = [0; 2];
        disk.read_at(4095, &mut bytes).unwrap();
        disk.flush().unwrap();
        assert_eq!((bytes, stamps(&disk)), ([1, 2], vec![1, 1, 0, 0, 0, 7]));
    }

    #[test]
    fn beyond_the_end_and_read_only_are_refused() {
        let mut disk = DiskImage::from_fd(image(1024), true).unwrap();
        assert!(disk.read_at(1000, &mut [0; 25]).is_err());
        assert!(disk.read_at(u64::MAX, &mut [0; 2]).is_err());
        assert!(disk.write_at(0, &[1]).is_err());
        assert_eq!(stamps(&disk), [0]);
        assert!(matches!(DiskImage::from_fd(image(1000), true), Err(DiskError::Size(1000))));
        assert!(matches!(DiskImage::from_fd(image(0), true), Err(DiskError::Size(0))));
    }
}

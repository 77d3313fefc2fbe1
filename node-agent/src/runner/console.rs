//! `console.log`: everything the guest's serial console ever said, or the last [`KEPT_BYTES`] of it.
//!
//! Bytes are appended before they are shown to anybody, so what an absent agent missed is in the file. A guest may talk
//! for ever: what is older than the bound is punched out of the file (fallocate(2)), offsets stay valid.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};

use rustix::fs::{FallocateFlags, fallocate};

/// Bytes at the end of the log that are always there.
pub const KEPT_BYTES: u64 = 16 << 20;
const PUNCH_STEP_BYTES: u64 = 1 << 20;

/// The log, open for append.
#[derive(Debug)]
pub struct Log {
    file: File,
    end: u64,
    punched: u64,
}

impl Log {
    /// Takes over an open file; what it has is kept.
    ///
    /// # Errors
    /// Of lseek(2).
    pub fn new(mut file: File) -> std::io::Result<Log> {
        let end = file.seek(SeekFrom::End(0))?;
        Ok(Log { file, end, punched: 0 })
    }

    /// Appends; returns the offset at which the bytes begin.
    ///
    /// # Errors
    /// Of write(2): the file system is full or broken.
    pub fn append(&mut self, bytes: &[u8]) -> std::io::Result<u64> {
        let start = self.end;
        self.file.write_all(bytes)?;
        self.end += bytes.len() as u64;
        let old = self.end.saturating_sub(KEPT_BYTES) / PUNCH_STEP_BYTES * PUNCH_STEP_BYTES;
        if old > self.punched {
            // A file system without holes keeps the old bytes: harmless.
            let _unsupported = fallocate(
                &self.file,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                self.punched,
                old - self.punched,
            );
            self.punched = old;
        }
        Ok(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_appended_to_and_its_past_is_bounded() {
        let path = std::env::temp_dir().join(format!("godwit-console-{}", std::process::id()));
        let open = || std::fs::OpenOptions::new().create(true).append(true).open(&path).unwrap();
        let mut log = Log::new(open()).unwrap();
        assert_eq!(log.append(b"one").unwrap(), 0);
        let mut log = Log::new(open()).unwrap();
        assert_eq!(log.append(b"two").unwrap(), 3);
        let block = vec![b'x'; 1 << 20];
        for _ in 0..20 {
            log.append(&block).unwrap();
        }
        let file = open();
        assert_eq!(file.metadata().unwrap().len(), 6 + (20 << 20));
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(bytes[bytes.len() - KEPT_BYTES as usize..].iter().all(|b| *b == b'x'));
    }
}

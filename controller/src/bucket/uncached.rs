//! Writing a new file past the page cache (`open(2)`, O_DIRECT): a pack is read again by a disaster, not soon, and would
//! push out what the host still needs; copying it there costs more than the disk does.
//!
//! The disk takes whole blocks from memory that begins with one. What is shorter, lies elsewhere, or is written to a file
//! system that knows no such writes, goes by the cache. When it is done it is durable either way.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// What any disk takes as its block.
const BLOCK: usize = 4096;
/// Less is not worth a write of its own: bytes.
const LEAST: usize = 1 << 20;

/// How many bytes of a buffer's room lie before the first block, while the buffer does not move.
pub(crate) fn first_block(buffer: &[u8]) -> usize {
    buffer.as_ptr().align_offset(BLOCK).min(BLOCK)
}

/// Writes a file that must not be there yet.
///
/// # Errors
/// Those of the file system; part of the file may be there then.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    let done = if bytes.len() >= LEAST && bytes.as_ptr().align_offset(BLOCK) == 0 {
        write_past(&mut file, &bytes[..bytes.len() / BLOCK * BLOCK])?
    } else {
        0
    };
    file.write_all(&bytes[done..])?;
    file.sync_all()
}

/// How many of the blocks were written past the cache. The file is then an ordinary one again.
fn write_past(file: &mut File, blocks: &[u8]) -> io::Result<usize> {
    let flags = fcntl_getfl(&*file)?;
    if fcntl_setfl(&*file, flags | OFlags::DIRECT) == Err(Errno::INVAL) {
        return Ok(0);
    }
    let mut done = 0;
    // A part that ends inside a block is the cache's, as the rest is.
    while done < blocks.len() && done.is_multiple_of(BLOCK) {
        match file.write(&blocks[done..]) {
            Ok(0) => break,
            Ok(written) => done += written,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Its blocks are larger.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
            Err(error) => return Err(error),
        }
    }
    fcntl_setfl(&*file, flags)?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    /// The same bytes at a place where a block begins, plus `skew`.
    fn placed(bytes: &[u8], skew: usize) -> Bytes {
        let mut buffer = Vec::with_capacity(BLOCK + skew + bytes.len());
        let at = first_block(&buffer);
        buffer.resize(at + skew, 0);
        buffer.extend_from_slice(bytes);
        Bytes::from(buffer).slice(at + skew..)
    }

    #[test]
    fn files_are_the_same_whichever_way_they_were_written() {
        let folders = [std::env::temp_dir(), "/dev/shm".into()];
        for folder in folders.iter().filter(|folder| folder.is_dir()) {
            let file = folder.join(format!("godwit-uncached-{}", std::process::id()));
            for length in [0, 1, BLOCK, LEAST - 1, LEAST, LEAST + 1, 3 * LEAST + BLOCK, 3 * LEAST + 17] {
                let bytes = noise(length);
                for skew in [0, 1, 512] {
                    write_new(&file, &placed(&bytes, skew)).unwrap();
                    assert!(std::fs::read(&file).unwrap() == bytes, "{length} bytes, {skew} off, {}", folder.display());
                    let again = write_new(&file, &placed(&bytes, skew)).unwrap_err();
                    assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
                    std::fs::remove_file(&file).unwrap();
                }
            }
        }
    }
}

//! The payload of a bzImage: gzip, xz, lzma, zstd, lz4 in its legacy container, or a plain ELF. The kernel's build puts the
//! unpacked length behind it (gzip's own trailer holds it), and nothing is unpacked beyond that. bzip2 and lzo are named,
//! not unpacked: no distribution packs with them.
//!
//! ```text
//! lz4: 02 21 4c 18 | { length u32 | raw lz4 block of up to 8 MiB unpacked } ... | unpacked length u32
//! ```

use std::borrow::Cow;
use std::io::Read;

use super::{BootError, image, u32_at};

const LZ4_MAGIC: u32 = 0x184c_2102;
const BLOCK_BYTES_MAX: usize = 8 << 20;
/// Longest kernel that is unpacked.
const KERNEL_BYTES_MAX: usize = 1 << 30;
/// What an unpacker may take for its window and tables: the kernel's build packs with up to 128 MiB.
const WINDOW_LOG_MAX: u32 = 27;
const WORK_KIB_MAX: u32 = 256 << 10;

const CUT: BootError = BootError::Damaged("its payload is cut");
const LENGTH: BootError = BootError::Damaged("its payload does not unpack to the length it says");
const BROKEN: BootError = BootError::Damaged("its payload does not unpack");

/// Unpacks a payload.
///
/// # Errors
/// A compression that is not known here, or damage.
pub fn unpack(payload: &[u8]) -> Result<Cow<'_, [u8]>, BootError> {
    if payload.starts_with(b"\x7fELF") {
        return Ok(Cow::Borrowed(payload));
    }
    let method = image::compression_of(payload);
    let (packed, length) = payload.split_last_chunk().ok_or(CUT)?;
    let length = u32::from_le_bytes(*length) as usize;
    if length > KERNEL_BYTES_MAX {
        return Err(BootError::Damaged("its payload unpacks to more than 1 GiB"));
    }
    let kernel = match method {
        // The length is part of the format.
        "gzip" => read(flate2::bufread::GzDecoder::new(payload), length),
        "xz" => read(lzma_rust2::XzReader::new_mem_limit(packed, false, WORK_KIB_MAX), length),
        "lzma" => read(lzma_rust2::LzmaReader::new_mem_limit(packed, WORK_KIB_MAX, None).map_err(|_| BROKEN)?, length),
        "zstd" => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(packed).map_err(|_| BROKEN)?;
            decoder.window_log_max(WINDOW_LOG_MAX).map_err(|_| BROKEN)?;
            read(decoder.single_frame(), length)
        }
        "lz4" => lz4(packed, length),
        other => return Err(BootError::Compression(other)),
    };
    kernel.map(Cow::Owned)
}

/// Reads exactly `length` bytes, and the end behind them, where checksums are.
fn read(unpacker: impl Read, length: usize) -> Result<Vec<u8>, BootError> {
    let mut kernel = Vec::new();
    match unpacker.take(length as u64 + 1).read_to_end(&mut kernel) {
        Err(_) => Err(BROKEN),
        Ok(found) if found != length => Err(LENGTH),
        Ok(_) => Ok(kernel),
    }
}

fn lz4(payload: &[u8], length: usize) -> Result<Vec<u8>, BootError> {
    let mut kernel = Vec::new();
    let mut at = 0;
    while at < payload.len() {
        let bytes = u32_at(payload, at).ok_or(CUT)?;
        at += 4;
        if bytes == LZ4_MAGIC {
            continue;
        }
        let block = at.checked_add(bytes as usize).and_then(|end| payload.get(at..end)).ok_or(CUT)?;
        at += block.len();
        unpack_block(block, &mut kernel)?;
        if kernel.len() > length {
            return Err(LENGTH);
        }
    }
    if kernel.len() == length { Ok(kernel) } else { Err(LENGTH) }
}

fn unpack_block(block: &[u8], kernel: &mut Vec<u8>) -> Result<(), BootError> {
    let start = kernel.len();
    kernel.resize(start + BLOCK_BYTES_MAX, 0);
    let length = lz4_flex::block::decompress_into(block, &mut kernel[start..]);
    kernel.truncate(start + length.map_err(|_| BROKEN)?);
    Ok(())
}

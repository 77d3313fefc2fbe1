//! The payload of a bzImage: lz4 in its legacy container, or a plain ELF.
//!
//! ```text
//! 02 21 4c 18 | { length u32 | raw lz4 block of up to 8 MiB unpacked } ... | unpacked length u32 (put there by the kernel's build)
//! ```

use std::borrow::Cow;

use super::{BootError, image, u32_at};

const MAGIC: u32 = 0x184c_2102;
const BLOCK_BYTES_MAX: usize = 8 << 20;
/// Longest kernel that is unpacked.
const KERNEL_BYTES_MAX: usize = 1 << 30;

/// Unpacks a payload.
///
/// # Errors
/// A compression other than lz4, or damage.
pub fn unpack(payload: &[u8]) -> Result<Cow<'_, [u8]>, BootError> {
    if payload.starts_with(b"\x7fELF") {
        return Ok(Cow::Borrowed(payload));
    }
    if u32_at(payload, 0) != Some(MAGIC) {
        return Err(BootError::Compression(image::compression_of(payload)));
    }
    let mut kernel = Vec::new();
    let mut at = 4;
    while payload.len() - at > 4 {
        let length = u32_at(payload, at).ok_or(BootError::Damaged("its payload is cut"))?;
        at += 4;
        if length == MAGIC {
            continue;
        }
        let block = payload.get(at..at + length as usize).ok_or(BootError::Damaged("its payload is cut"))?;
        at += block.len();
        unpack_block(block, &mut kernel)?;
    }
    match u32_at(payload, at) {
        Some(length) if length as usize == kernel.len() => Ok(Cow::Owned(kernel)),
        _ => Err(BootError::Damaged("its payload does not unpack to the length it says")),
    }
}

fn unpack_block(block: &[u8], kernel: &mut Vec<u8>) -> Result<(), BootError> {
    let start = kernel.len();
    if start > KERNEL_BYTES_MAX {
        return Err(BootError::Damaged("its payload unpacks to more than 1 GiB"));
    }
    kernel.resize(start + BLOCK_BYTES_MAX, 0);
    let length = lz4_flex::block::decompress_into(block, &mut kernel[start..]);
    kernel.truncate(start + length.map_err(|_| BootError::Damaged("its payload does not unpack"))?);
    Ok(())
}

//! What a kernel file is. A file that is no kernel is called by its name, so that the operator sees what went wrong.

use super::{BootError, u16_at, u32_at, u64_at};

/// A kernel file.
#[derive(Debug)]
pub enum Image<'a> {
    /// Compressed Linux with a setup header.
    BzImage(SetupHeader<'a>),
    /// An ELF file.
    Elf,
}

/// What is needed from the setup header of a bzImage (Linux boot.rst, "The Real-Mode Kernel Header").
#[derive(Clone, Copy, Debug)]
pub struct SetupHeader<'a> {
    /// The header's own bytes, from offset 0x1f1 on, as the zero page holds them.
    pub bytes: &'a [u8],
    /// The compressed kernel.
    pub payload: &'a [u8],
    /// Longest command line.
    pub command_line_max: usize,
    /// Highest address an initrd may have.
    pub initrd_address_max: u64,
    /// Bytes from `pref_address` on that the kernel needs before it reads the memory map.
    pub init_bytes: u64,
    /// Where the kernel wants to be.
    pub preferred_address: u64,
}

const HEADER: usize = 0x1f1;
const HEADER_END: usize = 0x268;
const VERSION_MIN: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const XLF_ABOVE_4G: u16 = 2;

/// Finds out what the file is.
///
/// # Errors
/// It is no kernel, or a kernel that cannot be entered by the 64-bit protocol.
pub fn recognise(bytes: &[u8]) -> Result<Image<'_>, BootError> {
    if bytes.starts_with(b"\x7fELF") {
        return Ok(Image::Elf);
    }
    if bytes.get(0x202..0x206) == Some(b"HdrS") && u16_at(bytes, 0x1fe) == Some(0xaa55) {
        return setup_header(bytes).map(Image::BzImage);
    }
    Err(BootError::NotAKernel(name_of(bytes)))
}

fn setup_header(bytes: &[u8]) -> Result<SetupHeader<'_>, BootError> {
    let cut = || BootError::Damaged("the setup header is cut");
    let header = bytes.get(HEADER..HEADER_END).ok_or_else(cut)?;
    let half = |at| u16_at(bytes, at).ok_or_else(cut);
    let word = |at| u32_at(bytes, at).ok_or_else(cut);
    if half(0x206)? < VERSION_MIN {
        return Err(BootError::Unsupported("its boot protocol is older than 2.12"));
    }
    let flags = half(0x236)?;
    if flags & XLF_KERNEL_64 == 0 {
        return Err(BootError::Unsupported("it has no 64-bit entry"));
    }
    // The jump at 0x200 says how long the header is; older kernels have less, and something else follows.
    let header_bytes = 0x202 + usize::from(bytes[0x201]) - HEADER;
    let sectors = match bytes[HEADER] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + word(0x248)? as usize;
    let payload = start.checked_add(word(0x24c)? as usize).and_then(|end| bytes.get(start..end));
    let initrd_address_max = if flags & XLF_ABOVE_4G != 0 { u64::MAX } else { word(0x22c)?.into() };
    Ok(SetupHeader {
        bytes: &header[..header_bytes.min(header.len())],
        payload: payload.ok_or(BootError::Damaged("its payload lies beyond its end"))?,
        command_line_max: word(0x238)? as usize,
        initrd_address_max,
        init_bytes: word(0x260)?.into(),
        preferred_address: u64_at(bytes, 0x258).ok_or_else(cut)?,
    })
}

/// How compressed and other files begin.
const NAMES: [(&[u8], &str); 20] = [
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"\xfd7zXZ\0", "xz-compressed data"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (b"\x02\x21\x4c\x18", "lz4-compressed data"),
    (b"\x04\x22\x4d\x18", "lz4-compressed data"),
    (b"BZh", "bzip2-compressed data"),
    (b"\x89LZO", "lzop-compressed data"),
    (b"\x5d\0\0", "lzma-compressed data"),
    (b"070701", "a cpio archive: perhaps kernel and initrd are swapped"),
    (b"070702", "a cpio archive: perhaps kernel and initrd are swapped"),
    (b"!<arch>\ndebian", "a Debian package: the kernel is inside it, under boot/"),
    (b"!<arch>", "an ar archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"QFI\xfb", "a qcow2 disk image"),
    (b"MZ", "a DOS or EFI program that is no bzImage"),
    (b"#!", "a script"),
    (b"<", "HTML or XML: perhaps a failed download"),
    (b"{", "JSON"),
    (b"\xed\xab\xee\xdb", "an RPM package"),
    (b"GDWT", "a frame of this system, not a kernel"),
];

fn name_of(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "an empty file".to_owned();
    }
    if let Some((_, name)) = NAMES.iter().find(|(start, _)| bytes.starts_with(start)) {
        return (*name).to_owned();
    }
    if bytes.get(257..262) == Some(b"ustar") {
        return "a tar archive".to_owned();
    }
    if bytes.iter().all(|byte| *byte == 0) {
        return "nothing but zeros".to_owned();
    }
    if u16_at(bytes, 0x1fe) == Some(0xaa55) {
        return "a disk image with a boot sector".to_owned();
    }
    let start: Vec<String> = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("data that begins with {}", start.join(" "))
}

/// Name of a compression by how it begins, for payloads.
pub fn compression_of(payload: &[u8]) -> &'static str {
    const SUFFIX: &str = "-compressed data";
    let found = NAMES.iter().find(|(start, name)| payload.starts_with(start) && name.ends_with(SUFFIX));
    found.map_or("an unknown method", |(_, name)| name.trim_end_matches(SUFFIX))
}

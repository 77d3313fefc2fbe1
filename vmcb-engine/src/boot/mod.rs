//! What lies in RAM before the first instruction, and where the first vCPU begins.
//!
//! | file | what |
//! |---|---|
//! | `image` | what a file is: bzImage, ELF, or something else that is called by its name |
//! | `unpack` | the payload of a bzImage |
//! | `elf` | segments, entry, PVH note |
//! | `layout` | the map of low memory, and the memory map for the guest |
//! | `acpi` | tables that describe the devices |
//! | `linux` | zero page and 64-bit entry (Linux `Documentation/arch/x86/boot.rst`) |
//! | `pvh` | start info and 32-bit entry (Xen `docs/misc/pvh.markdown`) |
//!
//! There is no firmware: the kernel is unpacked on the host and entered where its own decompressor would have jumped to.
//! This room refuses to know engines and files; kernel and initrd are bytes, and they may be anything.

mod acpi;
mod elf;
mod image;
pub mod layout;
mod linux;
mod pvh;
mod unpack;

use crate::cpu::CpuState;
use crate::device::bus::Window;
use crate::memory::{GuestMemory, OutOfRange};

pub use acpi::RSDP;

/// Why a machine cannot be started from these files.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BootError {
    /// The file is something else.
    #[error("the kernel file is no bzImage and no x86-64 ELF; it looks like {0}")]
    NotAKernel(String),
    /// A bzImage whose payload this release cannot unpack.
    #[error(
        "the kernel is compressed with {0}; gzip, xz, lzma, zstd, lz4 and uncompressed ones can be unpacked: give the vmlinux"
    )]
    Compression(&'static str),
    /// It begins well and goes on badly.
    #[error("the kernel file is damaged: {0}")]
    Damaged(&'static str),
    /// It is an old or 32-bit bzImage.
    #[error("the kernel cannot be entered: {0}")]
    Unsupported(&'static str),
    /// There is too little RAM.
    #[error("kernel and initrd need {needed} bytes of memory, the guest has {memory}")]
    TooLarge {
        /// Bytes of RAM needed.
        needed: u64,
        /// Bytes of RAM there are.
        memory: u64,
    },
    /// A segment wants to lie where the tables are.
    #[error("a kernel segment of {bytes} bytes at {gpa:#x} does not lie in RAM above 1 MiB")]
    Segment {
        /// Where.
        gpa: u64,
        /// How long.
        bytes: u64,
    },
    /// The command line is too long.
    #[error("the command line has {bytes} bytes, the kernel takes {max}")]
    CommandLine {
        /// Its length.
        bytes: usize,
        /// Longest one.
        max: usize,
    },
    /// The command line holds a zero byte.
    #[error("the command line holds a zero byte")]
    CommandLineZero,
    /// An address of our own that is not RAM.
    #[error("boot tables do not fit")]
    Tables(#[from] OutOfRange),
}

/// What to start.
#[derive(Clone, Copy, Debug)]
pub struct Boot<'a> {
    /// bzImage, ELF, or ELF with a PVH note.
    pub kernel: &'a [u8],
    /// Initial RAM disk.
    pub initrd: Option<&'a [u8]>,
    /// Kernel command line.
    pub command_line: &'a str,
    /// The machine's seed; the kernel gets one derived from it.
    pub seed: &'a [u8],
    /// The machine's generation ID; empty: it has none.
    pub generation_id: &'a [u8],
    /// Instructions that retired before this boot: each boot of a machine gets a seed of its own.
    pub position: u64,
    /// How many vCPUs.
    pub vcpus: usize,
    /// Virtio devices, in order.
    pub windows: &'a [Window],
}

/// Writes everything into RAM and makes `first`, the reset state of the first vCPU, the state at the kernel's entry.
///
/// # Errors
/// The files make no bootable kernel, or do not fit.
pub fn load(memory: &GuestMemory, boot: &Boot<'_>, first: &mut CpuState) -> Result<(), BootError> {
    match image::recognise(boot.kernel)? {
        image::Image::BzImage(header) => {
            let payload = unpack::unpack(header.payload)?;
            let elf = elf::Elf::parse(&payload)?;
            linux::load(memory, boot, &elf, Some(&header), first)?;
        }
        image::Image::Elf => {
            let elf = elf::Elf::parse(boot.kernel)?;
            match elf.pvh_entry()? {
                Some(entry) => pvh::load(memory, boot, &elf, entry, first)?,
                None => linux::load(memory, boot, &elf, None, first)?,
            }
        }
    }
    acpi::write(memory, boot)?;
    memory.write(layout::GENERATION_ID, boot.generation_id)?;
    memory.write(layout::RESET_VECTOR, &layout::RESET_CODE)?;
    Ok(())
}

/// Little-endian numbers at offsets of untrusted bytes.
fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests;

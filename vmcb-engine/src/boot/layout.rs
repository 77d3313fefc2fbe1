//! The map of low memory, and the memory map that the guest is told.
//!
//! ```text
//! 0x0_0500  GDT                       0x2_0000  command line
//! 0x0_6000  PVH start info            0x3_0000  setup data: the kernel's seed
//! 0x0_7000  zero page                 0xe_0000  ACPI tables
//! 0x0_9000  page tables (6 pages)     0xf_fff0  code that resets the machine
//! 0xd_0000  VM generation ID         0x10_0000  kernel; the initrd lies at the end of low RAM
//! ```

use super::BootError;
use crate::memory::{GuestMemory, HOLE_END, HOLE_START, PAGE_BYTES};

/// GDT of the entry state.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` and what it points to.
pub const START_INFO: u64 = 0x6000;
/// Linux's `boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top-level page table.
pub const PAGE_TABLES: u64 = 0x9000;
/// Command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line, its zero byte included.
pub const COMMAND_LINE_BYTES: usize = 0x1_0000;
/// `setup_data` list.
pub const SETUP_DATA: u64 = 0x3_0000;
/// Where the guest reads its VM generation ID: 16 bytes in reserved memory.
pub const GENERATION_ID: u64 = 0xd_0000;
/// End of the first piece of RAM; from here to [`TABLES_END`] memory is reserved.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// End of what this room writes for itself.
pub const TABLES_END: u64 = 0x10_0000;

/// Where a PC's processor begins after a reset, as real mode reaches it (F000:FFF0). A kernel that knows no other way to
/// reset jumps here: Linux without EFI on hardware-reduced ACPI does.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// `mov al, 0xfe; out 0x64, al; again: hlt; jmp again`
pub const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// Kind of a range: usable RAM.
pub const RAM: u32 = 1;
/// Kind of a range: hands off.
pub const RESERVED: u32 = 2;

/// One row of the memory map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length.
    pub bytes: u64,
    /// [`RAM`] or [`RESERVED`].
    pub kind: u32,
}

/// End of RAM below the hole.
pub fn low_end(memory: &GuestMemory) -> u64 {
    memory.bytes().min(HOLE_START)
}

/// The memory map.
pub fn ranges(memory: &GuestMemory) -> Vec<Range> {
    let low = low_end(memory);
    let mut ranges = vec![
        Range { start: 0, bytes: LOW_RAM_END, kind: RAM },
        Range { start: LOW_RAM_END, bytes: TABLES_END - LOW_RAM_END, kind: RESERVED },
        Range { start: TABLES_END, bytes: low - TABLES_END, kind: RAM },
    ];
    if memory.bytes() > low {
        ranges.push(Range { start: HOLE_END, bytes: memory.bytes() - low, kind: RAM });
    }
    ranges
}

/// Writes the command line.
///
/// # Errors
/// It is longer than the kernel takes, or holds a zero byte.
pub fn write_command_line(memory: &GuestMemory, line: &str, max: usize) -> Result<(), BootError> {
    let max = max.min(COMMAND_LINE_BYTES - 1);
    if line.len() > max {
        return Err(BootError::CommandLine { bytes: line.len(), max });
    }
    if line.as_bytes().contains(&0) {
        return Err(BootError::CommandLineZero);
    }
    memory.write(COMMAND_LINE, line.as_bytes())?;
    memory.write(COMMAND_LINE + line.len() as u64, &[0])?;
    Ok(())
}

/// Places the initrd as high as it may lie in low RAM; returns its address.
///
/// # Errors
/// Kernel and initrd do not fit together.
pub fn place_initrd(memory: &GuestMemory, initrd: &[u8], kernel_end: u64, address_max: u64) -> Result<u64, BootError> {
    let bytes = initrd.len() as u64;
    let end = low_end(memory).min(address_max.saturating_add(1));
    let needed = kernel_end.next_multiple_of(PAGE_BYTES) + bytes.next_multiple_of(PAGE_BYTES);
    let start = end.checked_sub(bytes).map(|start| start & !(PAGE_BYTES - 1)).filter(|start| *start >= kernel_end);
    let start = start.ok_or(BootError::TooLarge { needed, memory: memory.bytes() })?;
    memory.write(start, initrd)?;
    Ok(start)
}

/// The kernel must end within low RAM.
///
/// # Errors
/// It does not; the error says how much memory it takes.
pub fn check_kernel_fits(memory: &GuestMemory, kernel_end: u64, initrd: Option<&[u8]>) -> Result<(), BootError> {
    let initrd_bytes = initrd.map_or(0, <[u8]>::len) as u64;
    let needed = kernel_end.saturating_add(initrd_bytes.next_multiple_of(PAGE_BYTES));
    if needed > low_end(memory) {
        return Err(BootError::TooLarge { needed, memory: memory.bytes() });
    }
    Ok(())
}

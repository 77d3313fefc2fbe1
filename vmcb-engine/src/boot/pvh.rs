//! Any ELF with a PVH note: 32-bit protected mode without paging, EBX points to `hvm_start_info`
//! (Xen `docs/misc/pvh.markdown` and `xen/include/public/arch-x86/hvm/start_info.h`).

use super::elf::Elf;
use super::layout::{
    COMMAND_LINE, COMMAND_LINE_BYTES, GDT, START_INFO, check_kernel_fits, place_initrd, ranges, write_command_line,
};
use super::{Boot, BootError, acpi};
use crate::cpu::{CpuState, gpr};
use crate::memory::GuestMemory;
use crate::vmcb::Segment;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const MODULES: u64 = START_INFO + 0x40;
const MEMORY_MAP: u64 = START_INFO + 0x80;

const CODE_32: u16 = 0xc9b;
const DATA: u16 = 0xc93;

/// Writes all of it.
///
/// # Errors
/// The kernel does not fit, or its command line is too long.
pub fn load(
    memory: &GuestMemory,
    boot: &Boot<'_>,
    elf: &Elf<'_>,
    entry: u64,
    first: &mut CpuState,
) -> Result<(), BootError> {
    let end = elf.end()?;
    check_kernel_fits(memory, end, boot.initrd)?;
    elf.place(memory)?;
    write_command_line(memory, boot.command_line, COMMAND_LINE_BYTES)?;
    let initrd = boot.initrd.map(|initrd| place_initrd(memory, initrd, end, u64::MAX)).transpose()?;
    write_start_info(memory, boot, initrd)?;
    enter(memory, entry, first)
}

fn write_start_info(memory: &GuestMemory, boot: &Boot<'_>, initrd: Option<u64>) -> Result<(), BootError> {
    let ranges = ranges(memory);
    if let (Some(address), Some(initrd)) = (initrd, boot.initrd) {
        memory.write(MODULES, &address.to_le_bytes())?;
        memory.write(MODULES + 8, &(initrd.len() as u64).to_le_bytes())?;
    }
    for (at, range) in (MEMORY_MAP..).step_by(24).zip(&ranges) {
        memory.write(at, &range.start.to_le_bytes())?;
        memory.write(at + 8, &range.bytes.to_le_bytes())?;
        memory.write(at + 16, &range.kind.to_le_bytes())?;
    }
    let mut info = Vec::with_capacity(56);
    for word in [MAGIC, VERSION, 0, u32::from(initrd.is_some())] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    for address in [if initrd.is_some() { MODULES } else { 0 }, COMMAND_LINE, acpi::RSDP, MEMORY_MAP] {
        info.extend_from_slice(&address.to_le_bytes());
    }
    info.extend_from_slice(&(ranges.len() as u32).to_le_bytes());
    info.extend_from_slice(&[0; 4]);
    memory.write(START_INFO, &info)?;
    Ok(())
}

fn enter(memory: &GuestMemory, entry: u64, first: &mut CpuState) -> Result<(), BootError> {
    let code = Segment::new(0x08, CODE_32, u32::MAX, 0);
    let data = Segment::new(0x10, DATA, u32::MAX, 0);
    for (n, descriptor) in [0, code.to_descriptor(), data.to_descriptor()].into_iter().enumerate() {
        memory.write(GDT + 8 * n as u64, &descriptor.to_le_bytes())?;
    }
    first.cs = code;
    (first.ds, first.es, first.ss, first.fs, first.gs) = (data, data, data, data, data);
    first.tr = Segment::new(0, 0x8b, 0x67, 0);
    first.gdtr = Segment::new(0, 0, 23, GDT);
    first.idtr = Segment::new(0, 0, 0, 0);
    // PE and ET only.
    (first.cr0, first.cr3, first.cr4, first.efer) = (0x11, 0, 0, 0);
    first.rflags = 2;
    first.rip = entry;
    first.gprs = [0; 16];
    first.gprs[gpr::RBX] = START_INFO;
    Ok(())
}

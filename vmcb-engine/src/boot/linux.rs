//! Linux by its 64-bit protocol: zero page, page tables, and the state of the first vCPU at `startup_64`
//! (Linux `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol", and `zero-page.rst`).

use super::elf::Elf;
use super::image::SetupHeader;
use super::layout::{
    COMMAND_LINE, COMMAND_LINE_BYTES, GDT, PAGE_TABLES, SETUP_DATA, ZERO_PAGE, check_kernel_fits, place_initrd, ranges,
    write_command_line,
};
use super::{Boot, BootError, acpi};
use crate::cpu::{CpuState, gpr};
use crate::memory::GuestMemory;
use crate::vmcb::Segment;

/// Offsets in the zero page.
mod offset {
    pub const ACPI_RSDP_ADDR: u64 = 0x070;
    pub const E820_ENTRIES: u64 = 0x1e8;
    pub const SETUP_HEADER: u64 = 0x1f1;
    pub const BOOT_FLAG: u64 = 0x1fe;
    pub const HEADER: u64 = 0x202;
    pub const TYPE_OF_LOADER: u64 = 0x210;
    pub const LOADFLAGS: u64 = 0x211;
    pub const RAMDISK_IMAGE: u64 = 0x218;
    pub const RAMDISK_SIZE: u64 = 0x21c;
    pub const CMD_LINE_PTR: u64 = 0x228;
    pub const KERNEL_ALIGNMENT: u64 = 0x230;
    pub const CMDLINE_SIZE: u64 = 0x238;
    pub const SETUP_DATA: u64 = 0x250;
    pub const E820_TABLE: u64 = 0x2d0;
}

const LOADER_UNKNOWN: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
const SETUP_RNG_SEED: u32 = 9;
const COMMAND_LINE_MAX: usize = 2047;

const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
/// Attributes in VMCB form: 64-bit code, and flat data.
const CODE_64: u16 = 0xa9b;
const DATA: u16 = 0xc93;

/// Writes all of it.
///
/// # Errors
/// The kernel does not fit, or its command line is too long.
pub fn load(
    memory: &GuestMemory,
    boot: &Boot<'_>,
    elf: &Elf<'_>,
    header: Option<&SetupHeader<'_>>,
    first: &mut CpuState,
) -> Result<(), BootError> {
    if !elf.wide() {
        return Err(BootError::Unsupported("it is a 32-bit ELF without a PVH note"));
    }
    let mut end = elf.end()?;
    if let Some(header) = header {
        end = end.max(header.preferred_address.saturating_add(header.init_bytes));
    }
    check_kernel_fits(memory, end, boot.initrd)?;
    elf.place(memory)?;
    let max = header.map_or(COMMAND_LINE_MAX, |header| header.command_line_max);
    write_command_line(memory, boot.command_line, max.min(COMMAND_LINE_BYTES))?;
    let address_max = header.map_or(u64::MAX, |header| header.initrd_address_max);
    let initrd = boot.initrd.map(|initrd| place_initrd(memory, initrd, end, address_max)).transpose()?;
    write_zero_page(memory, boot, header, initrd)?;
    write_page_tables(memory)?;
    enter(memory, elf.entry(), first)
}

fn write_zero_page(
    memory: &GuestMemory,
    boot: &Boot<'_>,
    header: Option<&SetupHeader<'_>>,
    initrd: Option<u64>,
) -> Result<(), BootError> {
    let put = |at: u64, bytes: &[u8]| memory.write(ZERO_PAGE + at, bytes);
    match header {
        Some(header) => put(offset::SETUP_HEADER, header.bytes)?,
        None => {
            put(offset::BOOT_FLAG, &0xaa55u16.to_le_bytes())?;
            put(offset::HEADER, b"HdrS")?;
            put(offset::KERNEL_ALIGNMENT, &0x20_0000u32.to_le_bytes())?;
            put(offset::CMDLINE_SIZE, &(COMMAND_LINE_MAX as u32).to_le_bytes())?;
        }
    }
    put(offset::TYPE_OF_LOADER, &[LOADER_UNKNOWN])?;
    put(offset::LOADFLAGS, &[LOADED_HIGH])?;
    put(offset::CMD_LINE_PTR, &(COMMAND_LINE as u32).to_le_bytes())?;
    if let (Some(address), Some(initrd)) = (initrd, boot.initrd) {
        // Low RAM ends below 4 GiB.
        put(offset::RAMDISK_IMAGE, &(address as u32).to_le_bytes())?;
        put(offset::RAMDISK_SIZE, &(initrd.len() as u32).to_le_bytes())?;
    }
    put(offset::ACPI_RSDP_ADDR, &acpi::RSDP.to_le_bytes())?;
    let ranges = ranges(memory);
    put(offset::E820_ENTRIES, &[ranges.len() as u8])?;
    for (at, range) in (0..).step_by(20).zip(ranges) {
        put(offset::E820_TABLE + at, &range.start.to_le_bytes())?;
        put(offset::E820_TABLE + at + 8, &range.bytes.to_le_bytes())?;
        put(offset::E820_TABLE + at + 16, &range.kind.to_le_bytes())?;
    }
    put(offset::SETUP_DATA, &SETUP_DATA.to_le_bytes())?;
    let seed = match boot.position {
        0 => blake3::derive_key("godwit SETUP_RNG_SEED 1", boot.seed),
        position => {
            blake3::derive_key("godwit SETUP_RNG_SEED 2", &[boot.seed, position.to_le_bytes().as_slice()].concat())
        }
    };
    let mut node = [0; 48];
    node[8..12].copy_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    node[12..16].copy_from_slice(&32u32.to_le_bytes());
    node[16..].copy_from_slice(&seed);
    memory.write(SETUP_DATA, &node)?;
    Ok(())
}

/// Identity map of the first 4 GiB by pages of 2 MiB (APM2 5.3): one table, one, four.
fn write_page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let pointers = PAGE_TABLES + 0x1000;
    let directories = PAGE_TABLES + 0x2000;
    memory.write(PAGE_TABLES, &(pointers | PRESENT_WRITABLE).to_le_bytes())?;
    for n in 0..4 {
        memory.write(pointers + 8 * n, &((directories + 0x1000 * n) | PRESENT_WRITABLE).to_le_bytes())?;
    }
    for n in 0..4 * 512 {
        memory.write(directories + 8 * n, &(n << 21 | LARGE | PRESENT_WRITABLE).to_le_bytes())?;
    }
    Ok(())
}

fn enter(memory: &GuestMemory, entry: u64, first: &mut CpuState) -> Result<(), BootError> {
    let code = Segment::new(BOOT_CS, CODE_64, u32::MAX, 0);
    let data = Segment::new(BOOT_DS, DATA, u32::MAX, 0);
    for (n, descriptor) in [0, 0, code.to_descriptor(), data.to_descriptor()].into_iter().enumerate() {
        memory.write(GDT + 8 * n as u64, &descriptor.to_le_bytes())?;
    }
    first.cs = code;
    (first.ds, first.es, first.ss, first.fs, first.gs) = (data, data, data, data, data);
    first.gdtr = Segment::new(0, 0, 31, GDT);
    first.idtr = Segment::new(0, 0, 0, 0);
    // PE, ET, PG; PAE; LME, LMA.
    (first.cr0, first.cr3, first.cr4) = (0x8000_0011, PAGE_TABLES, 0x20);
    first.efer = 0x500;
    first.rflags = 2;
    first.rip = entry;
    first.gprs = [0; 16];
    first.gprs[gpr::RSP] = ZERO_PAGE;
    first.gprs[gpr::RSI] = ZERO_PAGE;
    Ok(())
}

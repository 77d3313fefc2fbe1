//! A guest that shows every change of what guests can see, and recordings of it as files.
//!
//! | file | what |
//! |---|---|
//! | `mod` | its map, tables and image |
//! | `kernel` | how it starts, and all that runs at CPL 0: faults, interrupts, system calls, devices |
//! | `user` | what runs at CPL 3, turn after turn; every result is folded into R12 |
//! | `linux` | a real Linux instead |
//! | `file` | recordings as files |
//!
//! Each processor has stacks and data of its own; both use the shared words, and both change the same function. Whatever an
//! instruction gives ends in R12 before the next system call, and so in the digest of every later probe.
#![allow(dead_code, reason = "each test uses what it needs")]

pub mod file;
mod kernel;
pub mod linux;
mod user;

use proto::v1::MachineConfig;

use crate::replaying::{CODE, Guest, config, pvh};

/// 64-bit code of the kernel; the 32-bit entry lies before it.
const KERNEL: u64 = CODE as u64 + 0x400;
/// 16-bit code that the second processor begins with, and where the guest copies it.
const TRAMPOLINE: u64 = CODE as u64 + 0x300;
const STARTUP: u64 = 0x8000;
const GDT: u64 = CODE as u64 + 0x3000;
const POINTERS: u64 = GDT + 0x100;
const TSS: u64 = GDT + 0x200;
const IDT: u64 = CODE as u64 + 0x4000;
const PML4: u64 = CODE as u64 + 0x5000;
/// The table of pages that are mapped when they are touched.
const DEMANDED_TABLE: u64 = CODE as u64 + 0x9000;
/// Rings of the devices, 0x100 bytes each: see `kernel`.
const RINGS: u64 = CODE as u64 + 0xb000;
const BUFFERS: u64 = CODE as u64 + 0xc000;
/// The user's code as it is loaded; the guest copies it.
const USER_IMAGE: u64 = CODE as u64 + 0xd000;
/// Of each processor's kernel: its words below, its stack above.
const KERNEL_DATA: u64 = 0x18_0000;
const KERNEL_DATA_BYTES: u64 = 0x4000;
const PACKETS: u64 = 0x19_0000;
/// Counts faults by vector, then interrupts.
const COUNTS: u64 = 0x1a_0000;

const USER: u64 = 0x20_0000;
/// Words that both processors change.
const SHARED: u64 = 0x20_8000;
/// Of each processor's user, 64 KiB.
const USER_DATA: u64 = 0x21_0000;
/// 2 MiB that are mapped page by page; each processor uses 256 pages.
const DEMANDED: u64 = 0x40_0000;
/// 8 MiB of addresses of 2 MiB of RAM: more pages than the TLB holds.
const WANDERED: u64 = 0x60_0000;

const KERNEL_CS: u16 = 0x18;
const KERNEL_SS: u16 = 0x20;
const USER_SS: u16 = 0x33;
const USER_CS: u16 = 0x3b;

/// The guest with so many processors, one or two.
pub fn rich(vcpus: u32) -> Guest {
    let config = MachineConfig { vcpus, tsc_per_instruction: 3, ..config() };
    Guest { config, kernel: pvh::elf(CODE, &image(vcpus)), initrd: None }
}

fn image(vcpus: u32) -> Vec<u8> {
    let user = user::code();
    let mut image = vec![0; (USER_IMAGE - u64::from(CODE)) as usize + user.len()];
    let mut put = |at: u64, end: u64, bytes: &[u8]| {
        assert!(at + bytes.len() as u64 <= end, "{at:#x}: {:#x} bytes do not fit", bytes.len());
        image[(at - u64::from(CODE)) as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    let (code, gates) = kernel::code(vcpus, user.len());
    put(CODE.into(), TRAMPOLINE, &kernel::entry());
    put(TRAMPOLINE, KERNEL, &kernel::trampoline());
    put(KERNEL, GDT, &code);
    put(GDT, POINTERS, &words(&descriptors()));
    put(POINTERS, TSS, &pointers());
    for vcpu in 0..2 {
        // RSP0.
        let stack = KERNEL_DATA + (vcpu + 1) * KERNEL_DATA_BYTES;
        put(TSS + 0x80 * vcpu + 4, IDT, &stack.to_le_bytes());
    }
    for (vector, user, address) in gates {
        let kind = if user { 0xee00 } else { 0x8e00 };
        let low = address & 0xffff | u64::from(KERNEL_CS) << 16 | kind << 32 | (address >> 16 & 0xffff) << 48;
        put(IDT + 16 * u64::from(vector), PML4, &words(&[low, address >> 32]));
    }
    page_tables(&mut put);
    kernel::put_rings(&mut put);
    put(USER_IMAGE, u64::MAX, &user);
    image
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// As SYSCALL and SYSRET want them; a task segment for each processor.
fn descriptors() -> Vec<u64> {
    let task = |vcpu: u64| {
        let base = TSS + 0x80 * vcpu;
        [0x67 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24) << 56, base >> 32]
    };
    let flat = [
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    [&flat[..], &task(0), &task(1)].concat()
}

/// For LGDT and LIDT.
fn pointers() -> Vec<u8> {
    let mut bytes = vec![0; 0x20];
    bytes[..2].copy_from_slice(&0x5fu16.to_le_bytes());
    bytes[2..10].copy_from_slice(&GDT.to_le_bytes());
    bytes[16..18].copy_from_slice(&0xfffu16.to_le_bytes());
    bytes[18..26].copy_from_slice(&IDT.to_le_bytes());
    bytes
}

/// The kernel below 2 MiB, the user above, pages on demand, pages to wander over, and the devices' last GiB.
fn page_tables(put: &mut dyn FnMut(u64, u64, &[u8])) {
    let (pointers, low, high, wandered) = (PML4 + 0x1000, PML4 + 0x2000, PML4 + 0x3000, PML4 + 0x5000);
    assert_eq!(DEMANDED_TABLE, PML4 + 0x4000);
    let no_execute = 1 << 63;
    put(PML4, RINGS, &words(&[pointers | 7]));
    put(pointers, RINGS, &words(&[low | 7, 0, 0, high | 3]));
    let aliases = [wandered | 7 | no_execute; 4];
    put(low, RINGS, &words(&[&[0x83, USER | 0x87, DEMANDED_TABLE | 7], &aliases[..]].concat()));
    // 0xd000_0000, 0xfec0_0000 and 0xfee0_0000, not cached.
    for address in [0xd000_0000u64, 0xfec0_0000, 0xfee0_0000] {
        let entry = address | 0x9b | no_execute;
        put(high + (address >> 21 & 0x1ff) * 8, RINGS, &words(&[entry]));
    }
    let pages: Vec<u64> = (0..512).map(|page| (0x60_0000 + page * 0x1000) | 7).collect();
    put(wandered, RINGS, &words(&pages));
}

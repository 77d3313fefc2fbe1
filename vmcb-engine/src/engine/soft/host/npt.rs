//! What the host keeps in its arena for a guest: nested page tables of RAM, and the two permission maps.
//!
//! The nested tables are an identity of RAM only, in pages as large as fit: whatever is not RAM is a nested page fault, and
//! that is how the host sees devices.

use crate::engine::soft::svm::physical::Arena;
use crate::memory::{GuestMemory, HOLE_END, HOLE_START};
use crate::vmcb::{Iopm, MsrAccess, Msrpm};

const TABLE: u64 = 0b111;
const LARGE: u64 = 1 << 7;
const GIB: u64 = 1 << 30;
const TWO_MIB: u64 = 2 << 20;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// MSRs that the guest may touch without its host: what VMLOAD and VMSAVE move.
const PASSED_MSRS: [u32; 10] =
    [0x174, 0x175, 0x176, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0100, 0xc000_0101, 0xc000_0102];

/// Builds the nested tables for a guest's RAM; returns N_CR3.
pub fn nested_tables(arena: &mut Arena, memory: &GuestMemory) -> u64 {
    let root = arena.allocate(1);
    let low = memory.bytes().min(HOLE_START);
    map(arena, root, 0, low);
    map(arena, root, HOLE_END, memory.bytes() - low);
    root
}

fn map(arena: &mut Arena, root: u64, start: u64, bytes: u64) {
    let mut at = start;
    while at < start + bytes {
        let left = start + bytes - at;
        let pointers = table_under(arena, root + (at >> 39 & 0x1ff) * 8);
        let slot = pointers + (at >> 30 & 0x1ff) * 8;
        if at.is_multiple_of(GIB) && left >= GIB {
            put(arena, slot, at | LARGE | TABLE);
            at += GIB;
        } else {
            let directory = table_under(arena, slot);
            put(arena, directory + (at >> 21 & 0x1ff) * 8, at | LARGE | TABLE);
            at += TWO_MIB;
        }
    }
}

/// The table that an entry points at, made if it does not exist.
fn table_under(arena: &mut Arena, slot: u64) -> u64 {
    let entry = arena.read_u64(slot).expect("a slot of a table of the arena");
    if entry != 0 {
        return entry & ADDRESS;
    }
    let table = arena.allocate(1);
    put(arena, slot, table | TABLE);
    table
}

fn put(arena: &mut Arena, slot: u64, entry: u64) {
    arena.write_u64(slot, entry).expect("a slot of a table of the arena");
}

/// All ports are intercepted; returns IOPM_BASE_PA.
pub fn io_permissions(arena: &mut Arena) -> u64 {
    let map = Iopm::all();
    place(arena, map.as_bytes())
}

/// All MSRs but [`PASSED_MSRS`] are intercepted; returns MSRPM_BASE_PA.
pub fn msr_permissions(arena: &mut Arena) -> u64 {
    let mut map = Msrpm::all();
    for msr in PASSED_MSRS {
        map.clear(msr, MsrAccess::Read);
        map.clear(msr, MsrAccess::Write);
    }
    place(arena, map.as_bytes())
}

fn place(arena: &mut Arena, bytes: &[u8]) -> u64 {
    let at = arena.allocate(bytes.len() / 4096);
    arena.slice_mut(at, bytes.len()).expect("pages just allocated").copy_from_slice(bytes);
    at
}

//! Page walks: permissions, accessed and dirty bits, sizes, reserved bits, aliases of code, stamps.

use iced_x86::code_asm::*;

use super::*;
use crate::engine::soft::core::{RAX, Stop};
use crate::engine::soft::svm::bare::TABLES;

/// Linear address of the page under test; the last level is a 4 KiB table of its own.
const LINEAR: u64 = 0x4000_0000;
const PAGE: u64 = 0x30_0000;
const PD: u64 = 0x31_0000;
const PT: u64 = 0x31_1000;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
const NX: u64 = 1 << 63;

/// Maps LINEAR with these bits in the last entry; upper entries allow everything.
fn map(core: &mut Core, memory: &GuestMemory, bits: u64) {
    put(memory, TABLES + 0x1000 + 8, PD | 7);
    put(memory, PD, PT | 7);
    put(memory, PT, PAGE | bits);
    core.tlb.flush();
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Try {
    Load,
    Store,
    Fetch,
}

fn attempt(core: &mut Core, what: Try) -> Option<u32> {
    let result = match what {
        Try::Load => core.load::<u32>(LINEAR).map(|_| ()),
        Try::Store => core.store::<u32>(LINEAR, 1),
        Try::Fetch => core.translate_code(LINEAR).map(|_| ()),
    };
    match result {
        Ok(()) => None,
        Err(Stop::Fault) => {
            assert_eq!((core.fault.vector, core.fault.address), (14, LINEAR), "{what:?}");
            core.fault.code
        }
        Err(stop) => panic!("{stop:?}"),
    }
}

#[test]
fn permissions_are_those_of_the_manual() {
    let smep = cr4::SMEP;
    // (entry, user, CR4 added, WP, load, store, fetch): error code or none.
    type Row = (u64, bool, u64, bool, [Option<u32>; 3]);
    let rows: &[Row] = &[
        (0, false, 0, true, [Some(0), Some(2), Some(16)]),
        (0, true, 0, true, [Some(4), Some(6), Some(20)]),
        (PRESENT, false, 0, true, [None, Some(3), None]),
        (PRESENT, false, 0, false, [None, None, None]),
        (PRESENT, true, 0, true, [Some(5), Some(7), Some(21)]),
        (PRESENT | WRITABLE, false, 0, true, [None, None, None]),
        (PRESENT | USER, true, 0, false, [None, Some(7), None]),
        (PRESENT | USER | WRITABLE, true, 0, true, [None, None, None]),
        (PRESENT | USER | WRITABLE | NX, true, 0, true, [None, None, Some(21)]),
        (PRESENT | WRITABLE | NX, false, 0, true, [None, None, Some(17)]),
        (PRESENT | USER | WRITABLE, false, smep, true, [None, None, Some(17)]),
        (PRESENT | USER | WRITABLE, true, smep, true, [None, None, None]),
        (PRESENT | WRITABLE | 1 << 51, false, 0, true, [Some(9), Some(11), Some(25)]),
        (PRESENT | USER | WRITABLE, false, cr4::SMAP, true, [Some(1), Some(3), None]),
    ];
    for &(entry, user, added, wp, expected) in rows {
        let mut bare = Bare::new(|a| a.hlt().unwrap());
        bare.core.cr4 |= added;
        if !wp {
            bare.core.cr0 &= !cr0::WP;
        }
        if user {
            bare.core.to_user();
        }
        map(&mut bare.core, &bare.memory, entry);
        for (what, expected) in [Try::Load, Try::Store, Try::Fetch].into_iter().zip(expected) {
            let got = attempt(&mut bare.core, what);
            assert_eq!(got, expected, "entry {entry:#x} user {user} cr4 {added:#x} wp {wp} {what:?}");
        }
    }
}

#[test]
fn rflags_ac_excuses_supervisor_access_to_user_pages() {
    let mut bare = Bare::new(|a| a.hlt().unwrap());
    bare.core.cr4 |= cr4::SMAP;
    map(&mut bare.core, &bare.memory, PRESENT | USER | WRITABLE);
    bare.core.system_flags |= 1 << 18;
    assert_eq!(attempt(&mut bare.core, Try::Store), None);
    bare.core.system_flags &= !(1 << 18);
    assert_eq!(attempt(&mut bare.core, Try::Store), Some(3));
}

#[test]
fn accessed_and_dirty_are_set_by_the_access_that_needs_them() {
    let mut bare = Bare::new(|a| a.hlt().unwrap());
    let (core, memory) = (&mut bare.core, &bare.memory);
    map(core, memory, PRESENT | WRITABLE);
    assert_eq!(attempt(core, Try::Load), None);
    assert_eq!(get(memory, PT), PAGE | PRESENT | WRITABLE | ACCESSED);
    assert_eq!(get(memory, PD) & 0xfff, 7 | ACCESSED);
    core.probe_write(LINEAR, 4).unwrap();
    assert_eq!(get(memory, PT), PAGE | PRESENT | WRITABLE | ACCESSED | DIRTY);
    // A refused write sets nothing.
    map(core, memory, PRESENT);
    assert_eq!(attempt(core, Try::Store), Some(3));
    assert_eq!(get(memory, PT), PAGE | PRESENT);
}

#[test]
fn a_store_that_crosses_pages_writes_all_or_nothing() {
    let mut bare = Bare::new(|a| a.hlt().unwrap());
    let (core, memory) = (&mut bare.core, &bare.memory);
    map(core, memory, PRESENT | WRITABLE);
    put(memory, PAGE + 0xff8, 0x1111_1111_1111_1111);
    assert_eq!(core.store::<u64>(LINEAR + 0xffc, u64::MAX), Err(Stop::Fault));
    assert_eq!((core.fault.address, core.fault.code), (LINEAR + 0x1000, Some(2)));
    assert_eq!(get(memory, PAGE + 0xff8), 0x1111_1111_1111_1111);
    put(memory, PT + 8, (PAGE + 0x5000) | 3);
    core.store::<u64>(LINEAR + 0xffc, 0x8877_6655_4433_2211).unwrap();
    assert_eq!(get(memory, PAGE + 0xff8) >> 32, 0x4433_2211);
    assert_eq!(get(memory, PAGE + 0x5000) & 0xffff_ffff, 0x8877_6655);
    assert_eq!(core.load::<u64>(LINEAR + 0xffc), Ok(0x8877_6655_4433_2211));
}

#[test]
fn large_pages_and_their_reserved_bits() {
    let mut bare = Bare::new(|a| a.hlt().unwrap());
    let (core, memory) = (&mut bare.core, &bare.memory);
    put(memory, 0x30_1238, 0xfeed);
    // 1 GiB page of everything at LINEAR.
    put(memory, TABLES + 0x1000 + 8, 0x83);
    core.tlb.flush();
    assert_eq!(core.load::<u64>(LINEAR + 0x30_1238), Ok(0xfeed));
    put(memory, TABLES + 0x1000 + 8, 0x83 | 1 << 13);
    core.tlb.flush();
    assert_eq!(attempt(core, Try::Load), Some(9));
    // 2 MiB page.
    put(memory, TABLES + 0x1000 + 8, PD | 7);
    put(memory, PD, 0x20_0000 | 0x83);
    core.tlb.flush();
    assert_eq!(core.load::<u64>(LINEAR + 0x10_1238), Ok(0xfeed));
    put(memory, PD, 0x20_0000 | 0x83 | 1 << 14);
    core.tlb.flush();
    assert_eq!(attempt(core, Try::Load), Some(9));
}

#[test]
fn non_canonical_is_a_general_protection_fault() {
    let mut bare = Bare::new(|a| a.hlt().unwrap());
    assert_eq!(bare.core.load::<u8>(1 << 47), Err(Stop::Fault));
    assert_eq!((bare.core.fault.vector, bare.core.fault.code), (13, Some(0)));
}

#[test]
fn legacy_paging_with_and_without_pae() {
    let memory = ram();
    put(&memory, 0x30_0010, 0xabcd);
    let mut core = Core::new(Arc::clone(&memory));
    core.cr0 = cr0::PE | cr0::PG;
    core.segments[CS] = Segment::new(8, 0xc9b, 0xffff_ffff, 0);
    // Directory at 40000h: entry 1 a table at 41000h, entry 2 a 4 MiB page of address 0.
    memory.write(0x4_0004, &0x4_1003_u32.to_le_bytes()).unwrap();
    memory.write(0x4_1000, &0x30_0003_u32.to_le_bytes()).unwrap();
    memory.write(0x4_0008, &0x83_u32.to_le_bytes()).unwrap();
    (core.cr3, core.cr4) = (0x4_0000, cr4::PSE);
    core.refresh_mode();
    assert_eq!(core.load::<u32>(0x40_0010), Ok(0xabcd));
    assert_eq!(core.load::<u32>(0x80_0000 + 0x30_0010), Ok(0xabcd));
    core.store::<u32>(0x40_0010, 1).unwrap();
    assert_eq!(get(&memory, 0x4_1000) as u32, 0x30_0063);
    // PAE: pointers at 50000h, directory at 51000h, table at 52000h.
    put(&memory, 0x5_0000, 0x5_1001);
    put(&memory, 0x5_1000, 0x5_2003);
    put(&memory, 0x5_2000 + 8, 0x30_0003);
    (core.cr3, core.cr4) = (0x5_0000, cr4::PAE);
    core.tlb.flush();
    assert_eq!(core.load::<u32>(0x1010), Ok(1));
    assert_eq!(get(&memory, 0x5_0000), 0x5_1001, "no accessed bit in the pointer table");
}

#[test]
fn stale_translations_live_until_invlpg() {
    let mut bare = Bare::new(|a| {
        a.mov(rbx, LINEAR).unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.mov(rdi, PT).unwrap();
        a.mov(rsi, (PAGE + 0x1000) | 3).unwrap();
        a.mov(qword_ptr(rdi), rsi).unwrap();
        a.mov(rcx, qword_ptr(rbx)).unwrap();
        a.invlpg(byte_ptr(rbx)).unwrap();
        a.mov(rdx, qword_ptr(rbx)).unwrap();
        a.hlt().unwrap();
    });
    map(&mut bare.core, &bare.memory, PRESENT | WRITABLE);
    put(&bare.memory, PAGE, 1);
    put(&bare.memory, PAGE + 0x1000, 2);
    bare.halt();
    assert_eq!(bare.core.gprs[..3], [1, 1, 2]);
}

#[test]
fn code_changed_through_an_alias_runs_changed() {
    let mut bare = Bare::new(|a| {
        let mut again = a.create_label();
        a.mov(rbx, LINEAR + 0x800).unwrap();
        a.mov(ecx, 3).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(0x30_0800).unwrap();
        // ADD EAX, imm8: the immediate byte, through the other mapping.
        a.inc(byte_ptr(rbx + 2)).unwrap();
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    });
    map(&mut bare.core, &bare.memory, PRESENT | WRITABLE);
    bare.memory
        .write(
            PAGE + 0x800,
            &assemble(64, PAGE + 0x800, |a| {
                a.db(&[0x83, 0xc0, 5]).unwrap();
                a.ret().unwrap();
            }),
        )
        .unwrap();
    bare.core.gprs[RAX] = 0;
    bare.halt();
    assert_eq!(bare.core.gprs[RAX], 5 + 6 + 7);
}

#[test]
fn a_block_that_overwrites_itself_stops_at_the_change() {
    let mut bare = Bare::new(|a| {
        let mut patched = a.create_label();
        a.lea(rbx, ptr(patched)).unwrap();
        // 90 90: the increment below becomes two NOPs, before it runs.
        a.mov(word_ptr(rbx), 0x9090).unwrap();
        a.nop().unwrap();
        a.set_label(&mut patched).unwrap();
        a.db(&[0xff, 0xc0]).unwrap();
        a.hlt().unwrap();
    });
    bare.core.gprs[RAX] = 0;
    bare.halt();
    assert_eq!(bare.core.gprs[RAX], 0);
    assert_eq!(bare.core.retired(), 5);
}

#[test]
fn every_epoch_stamps_the_first_write_of_a_page_and_only_written_pages() {
    let program = |a: &mut CodeAssembler| {
        a.mov(dword_ptr(0x30_0000), 1).unwrap();
        a.mov(eax, dword_ptr(0x30_1000)).unwrap();
        a.jmp(CODE).unwrap();
    };
    let mut guest = Guest::new(program);
    guest.run(30);
    let stamps = guest.memory.stamps();
    assert_eq!((stamps.stamp(0x300), stamps.stamp(0x301)), (1, 0));
    let next = guest.memory.advance_epoch();
    guest.engine.rearm_stamps();
    guest.run(31);
    guest.run(36);
    assert_eq!((guest.memory.stamps().stamp(0x300), guest.memory.stamps().stamp(0x301)), (next, 0));
}

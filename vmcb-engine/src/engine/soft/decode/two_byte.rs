//! The 0F, 0F38 and 0F3A opcode maps (APM3 appendix A, tables ).
//!
//! What is not a general-purpose or system instruction is looked up in `sse` by its mandatory prefix.

use super::Insn;
use super::table::{Entry, Immediate as I, flag as f};
use crate::engine::soft::interp::pick::{self, Pick, last};
use crate::engine::soft::interp::{atomic, bit, branch, convert, far, mov, muldiv, shift, system};
use crate::engine::soft::op::form;
use crate::engine::soft::sse;

/// 0F.
pub static TWO_BYTE: [Entry; 256] = {
    let mut map = [Entry::UNDEFINED; 256];
    let mut opcode = 0;
    while opcode < 256 {
        map[opcode] = if opcode < 0x40 {
            system_part(opcode as u8)
        } else if opcode < 0xa0 {
            condition_part(opcode as u8)
        } else {
            integer_part(opcode as u8)
        };
        opcode += 1;
    }
    map
};

/// 0F 38.
pub static MAP_38: [Entry; 256] = {
    let mut map = [Entry::ROW; 256];
    map[0xf0] = Entry::new(f::MODRM | f::BYTE_RM, I::None, bit::pick_crc32);
    map[0xf1] = Entry::new(f::MODRM, I::None, bit::pick_crc32);
    map
};

/// 0F 3A.
pub static MAP_3A: [Entry; 256] = [Entry::ROW; 256];

const fn system_part(opcode: u8) -> Entry {
    match opcode {
        0x00 => Entry::new(f::MODRM, I::None, group_6),
        0x01 => Entry::new(f::MODRM, I::None, group_7),
        0x02 => Entry::new(f::MODRM, I::None, |_| last(system::lar)),
        0x03 => Entry::new(f::MODRM, I::None, |_| last(system::lsl)),
        0x05 => Entry::new(0, I::None, |_| last(system::syscall)),
        0x06 => Entry::new(0, I::None, |_| last(system::clts)),
        0x07 => Entry::new(0, I::None, |_| last(system::sysret)),
        0x08 => Entry::new(0, I::None, |_| last(system::invd)),
        0x09 => Entry::new(0, I::None, |_| last(system::wbinvd)),
        0x0d => Entry::new(f::MODRM, I::None, mov::pick_prefetch),
        0x18..=0x1f => Entry::new(f::MODRM, I::None, mov::pick_nop),
        0x20 | 0x22 => Entry::new(f::MODRM | f::REGISTERS, I::None, control_register),
        0x21 | 0x23 => Entry::new(f::MODRM | f::REGISTERS, I::None, debug_register),
        0x10..=0x17 | 0x28..=0x2f => Entry::ROW,
        0x30 => Entry::new(0, I::None, |_| last(system::wrmsr)),
        0x31 => Entry::new(0, I::None, |_| last(system::rdtsc)),
        0x32 => Entry::new(0, I::None, |_| last(system::rdmsr)),
        0x33 => Entry::new(0, I::None, |_| last(system::rdpmc)),
        0x34 => Entry::new(0, I::None, |_| last(system::sysenter)),
        0x35 => Entry::new(0, I::None, |_| last(system::sysexit)),
        // 0B: UD2.
        _ => Entry::UNDEFINED,
    }
}

const fn condition_part(opcode: u8) -> Entry {
    match opcode {
        0x40..=0x4f => Entry::new(f::MODRM, I::None, mov::pick_cmov),
        // EMMS has no ModRM byte.
        0x77 => Entry::new(0, I::None, emms),
        0x80..=0x8f => Entry::new(f::DEFAULT_64, I::Short, branch::pick_jcc),
        0x90..=0x9f => Entry::new(f::MODRM | f::BYTE, I::None, mov::pick_setcc),
        _ => Entry::ROW,
    }
}

const fn integer_part(opcode: u8) -> Entry {
    match opcode {
        0xa0 | 0xa8 => Entry::new(f::DEFAULT_64, I::None, |_| last(far::push_segment)),
        0xa1 | 0xa9 => Entry::new(f::DEFAULT_64, I::None, |_| last(far::pop_segment)),
        0xa2 => Entry::new(0, I::None, |_| last(system::cpuid)),
        0xa3 | 0xab | 0xb3 | 0xbb => Entry::new(f::MODRM, I::None, bit::pick_test),
        0xba => Entry::new(f::MODRM, I::Byte, bit::pick_test),
        0xa4 | 0xac => Entry::new(f::MODRM, I::Byte, shift::pick_double),
        0xa5 | 0xad => Entry::new(f::MODRM, I::None, shift::pick_double),
        0xae => Entry::new(f::MODRM, I::None, group_15),
        0xaf => Entry::new(f::MODRM, I::None, muldiv::pick_imul),
        0xb0 => Entry::new(f::MODRM | f::BYTE, I::None, atomic::pick_cmpxchg),
        0xb1 => Entry::new(f::MODRM, I::None, atomic::pick_cmpxchg),
        0xb2 | 0xb4 | 0xb5 => Entry::new(f::MODRM, I::None, load_far_pointer),
        0xb6 | 0xbe => Entry::new(f::MODRM | f::BYTE_RM, I::None, convert::pick_extend),
        0xb7 | 0xbf => Entry::new(f::MODRM, I::None, convert::pick_extend),
        0xb8 | 0xbc | 0xbd => Entry::new(f::MODRM, I::None, bit::pick_scan),
        0xc0 => Entry::new(f::MODRM | f::BYTE, I::None, atomic::pick_xadd),
        0xc1 => Entry::new(f::MODRM, I::None, atomic::pick_xadd),
        0xc3 => Entry::new(f::MODRM, I::None, mov::pick),
        0xc7 => Entry::new(f::MODRM, I::None, atomic::pick_group_9),
        0xc8..=0xcf => Entry::new(f::IN_OPCODE, I::None, mov::pick_bswap),
        0xc2 | 0xc4..=0xc6 | 0xd0..=0xfe => Entry::ROW,
        // B9: UD1, FF: UD0, A6, A7, AA.
        _ => Entry::UNDEFINED,
    }
}

fn emms(insn: &Insn) -> Option<Pick> {
    sse::lookup(insn.selector()).and_then(pick::row)
}

fn group_6(insn: &Insn) -> Option<Pick> {
    match insn.extension() {
        0 => last(system::sldt),
        1 => last(system::str_),
        2 => last(system::lldt),
        3 => last(system::ltr),
        4 => last(system::verr),
        5 => last(system::verw),
        _ => None,
    }
}

fn group_7(insn: &Insn) -> Option<Pick> {
    match (insn.is_memory(), insn.extension()) {
        (_, 4) => last(system::smsw),
        (_, 6) => last(system::lmsw),
        (true, 0) => last(system::sgdt),
        (true, 1) => last(system::sidt),
        (true, 2) => last(system::lgdt),
        (true, 3) => last(system::lidt),
        (true, 7) => last(system::invlpg),
        (true, _) => None,
        (false, _) => group_7_registers(insn.modrm, insn.mode.long),
    }
}

fn group_7_registers(modrm: u8, long: bool) -> Option<Pick> {
    match modrm {
        0xc8 => last(system::monitor),
        0xc9 => last(system::mwait),
        0xca => last(system::clac),
        0xcb => last(system::stac),
        0xd0 => last(system::xgetbv),
        0xd1 => last(system::xsetbv),
        0xd8 => last(system::vmrun),
        0xd9 => last(system::vmmcall),
        0xda => last(system::vmload),
        0xdb => last(system::vmsave),
        0xdc => last(system::stgi),
        0xdd => last(system::clgi),
        0xde => last(system::skinit),
        0xdf => last(system::invlpga),
        0xf8 if long => last(system::swapgs),
        0xf9 => last(system::rdtscp),
        0xfd => last(system::rdpru),
        _ => None,
    }
}

/// CR0, CR2, CR3, CR4, CR8. LOCK with CR0 means CR8, and is told to the meaning by the form.
fn control_register(insn: &Insn) -> Option<Pick> {
    let exists = match insn.op.has(form::LOCK) {
        true => insn.op.reg == 0,
        false => matches!(insn.op.reg, 0 | 2 | 3 | 4 | 8),
    };
    if !exists {
        return None;
    }
    if insn.opcode == 0x20 { last(system::mov_from_cr) } else { last(system::mov_to_cr) }
}

fn debug_register(insn: &Insn) -> Option<Pick> {
    if insn.op.reg >= 8 {
        return None;
    }
    if insn.opcode == 0x21 { last(system::mov_from_dr) } else { last(system::mov_to_dr) }
}

fn load_far_pointer(insn: &Insn) -> Option<Pick> {
    if insn.is_memory() { last(far::load_far_pointer) } else { None }
}

/// FXSAVE and its kin are of `sse`; the FS and GS base instructions need F3 and a register; the rest are fences.
fn group_15(insn: &Insn) -> Option<Pick> {
    if let Some(row) = sse::lookup(insn.selector()) {
        return pick::row(row);
    }
    if insn.op.has(form::REP) && !insn.is_memory() && insn.mode.long {
        return match insn.extension() {
            0 => last(system::rdfsbase),
            1 => last(system::rdgsbase),
            2 => last(system::wrfsbase),
            3 => last(system::wrgsbase),
            _ => None,
        };
    }
    mov::pick_fence(insn)
}

//! The one-byte opcode map (APM3 appendix A, tables ).

use super::Insn;
use super::table::{Entry, Immediate as I, flag as f};
use crate::engine::soft::interp::pick::{Pick, last};
use crate::engine::soft::interp::{
    alu, atomic, branch, convert, far, flag, io, legacy, mov, muldiv, shift, stack, string, system,
};

/// The map.
pub static ONE_BYTE: [Entry; 256] = {
    let mut map = [Entry::UNDEFINED; 256];
    let mut opcode = 0;
    while opcode < 256 {
        map[opcode] = if opcode < 0x40 {
            arithmetic(opcode as u8)
        } else if opcode < 0x80 {
            low(opcode as u8)
        } else if opcode < 0xc0 {
            middle(opcode as u8)
        } else {
            high(opcode as u8)
        };
        opcode += 1;
    }
    map
};

const BYTE_IF_EVEN: [u16; 2] = [f::BYTE, 0];

/// `BYTE` for even opcodes.
const fn byte(opcode: u8) -> u16 {
    BYTE_IF_EVEN[(opcode & 1) as usize]
}

const fn arithmetic(opcode: u8) -> Entry {
    match opcode & 7 {
        0..=3 => Entry::new(f::MODRM | byte(opcode), I::None, alu::pick),
        4 => Entry::new(f::BYTE, I::Byte, alu::pick),
        5 => Entry::new(0, I::Short, alu::pick),
        _ => match opcode {
            0x06 | 0x0e | 0x16 | 0x1e => Entry::new(f::NO_LONG | f::DEFAULT_64, I::None, push_segment),
            0x07 | 0x17 | 0x1f => Entry::new(f::NO_LONG | f::DEFAULT_64, I::None, pop_segment),
            0x27 | 0x2f | 0x37 | 0x3f => Entry::new(f::NO_LONG, I::None, legacy::pick),
            // Prefixes never come here; 0F neither.
            _ => Entry::UNDEFINED,
        },
    }
}

const fn low(opcode: u8) -> Entry {
    match opcode {
        0x40..=0x4f => Entry::new(f::NO_LONG | f::IN_OPCODE, I::None, alu::pick_inc_dec),
        0x50..=0x5f => Entry::new(f::DEFAULT_64 | f::IN_OPCODE, I::None, stack::pick),
        0x60 | 0x61 => Entry::new(f::NO_LONG, I::None, stack::pick_all),
        0x62 => Entry::new(f::NO_LONG | f::MODRM, I::None, legacy::pick),
        0x63 => Entry::new(f::MODRM, I::None, movsxd_or_arpl),
        0x68 => Entry::new(f::DEFAULT_64, I::Short, stack::pick),
        0x69 => Entry::new(f::MODRM, I::Short, muldiv::pick_imul),
        0x6a => Entry::new(f::DEFAULT_64, I::Byte, stack::pick),
        0x6b => Entry::new(f::MODRM, I::Byte, muldiv::pick_imul),
        0x6c | 0x6d => Entry::new(f::PORT | byte(opcode), I::None, |_| last(io::ins)),
        0x6e | 0x6f => Entry::new(f::PORT | byte(opcode), I::None, |_| last(io::outs)),
        0x70..=0x7f => Entry::new(f::DEFAULT_64, I::Byte, branch::pick_jcc),
        _ => Entry::UNDEFINED,
    }
}

const fn middle(opcode: u8) -> Entry {
    match opcode {
        0x80 => Entry::new(f::MODRM | f::BYTE, I::Byte, alu::pick_group_1),
        0x81 => Entry::new(f::MODRM, I::Short, alu::pick_group_1),
        0x82 => Entry::new(f::MODRM | f::BYTE | f::NO_LONG, I::Byte, alu::pick_group_1),
        0x83 => Entry::new(f::MODRM, I::Byte, alu::pick_group_1),
        0x84 | 0x85 => Entry::new(f::MODRM | byte(opcode), I::None, alu::pick_test),
        0x86 | 0x87 => Entry::new(f::MODRM | byte(opcode), I::None, atomic::pick_xchg),
        0x88..=0x8b => Entry::new(f::MODRM | byte(opcode), I::None, mov::pick),
        0x8c => Entry::new(f::MODRM, I::None, mov_from_segment),
        0x8d => Entry::new(f::MODRM, I::None, mov::pick_lea),
        0x8e => Entry::new(f::MODRM, I::None, mov_to_segment),
        0x8f => Entry::new(f::MODRM | f::DEFAULT_64, I::None, stack::pick_pop_rm),
        0x90..=0x97 => Entry::new(f::IN_OPCODE, I::None, atomic::pick_xchg_rax),
        0x98 | 0x99 => Entry::new(0, I::None, convert::pick_accumulator),
        0x9a => Entry::new(f::NO_LONG, I::Far, |_| last(far::far_call_immediate)),
        0x9b => Entry::new(0, I::None, flag::pick),
        0x9c | 0x9d => Entry::new(f::DEFAULT_64, I::None, stack::pick_flags),
        0x9e | 0x9f => Entry::new(0, I::None, flag::pick),
        0xa0..=0xa3 => Entry::new(byte(opcode), I::Moffs, mov::pick),
        0xa4..=0xa7 | 0xaa..=0xaf => Entry::new(byte(opcode), I::None, string::pick),
        0xa8 => Entry::new(f::BYTE, I::Byte, alu::pick_test),
        0xa9 => Entry::new(0, I::Short, alu::pick_test),
        0xb0..=0xb7 => Entry::new(f::BYTE | f::IN_OPCODE, I::Byte, mov::pick),
        0xb8..=0xbf => Entry::new(f::IN_OPCODE, I::Full, mov::pick),
        _ => Entry::UNDEFINED,
    }
}

const fn high(opcode: u8) -> Entry {
    match opcode {
        0xc0 | 0xc1 => Entry::new(f::MODRM | byte(opcode), I::Byte, shift::pick),
        0xc2 => Entry::new(f::DEFAULT_64, I::Word, branch::pick),
        0xc3 => Entry::new(f::DEFAULT_64, I::None, branch::pick),
        0xc4 | 0xc5 => Entry::new(f::NO_LONG | f::MODRM, I::None, load_far_pointer),
        0xc6 => Entry::new(f::MODRM | f::BYTE, I::Byte, mov::pick),
        0xc7 => Entry::new(f::MODRM, I::Short, mov::pick),
        0xc8 => Entry::new(f::DEFAULT_64, I::Enter, stack::pick_frame),
        0xc9 => Entry::new(f::DEFAULT_64, I::None, stack::pick_frame),
        0xca => Entry::new(0, I::Word, |_| last(far::far_return)),
        0xcb => Entry::new(0, I::None, |_| last(far::far_return)),
        0xcc => Entry::new(0, I::None, |_| last(far::int3)),
        0xcd => Entry::new(0, I::Byte, |_| last(far::int_n)),
        0xce => Entry::new(f::NO_LONG, I::None, |_| last(far::into)),
        0xcf => Entry::new(0, I::None, |_| last(far::iret)),
        0xd0..=0xd3 => Entry::new(f::MODRM | byte(opcode), I::None, shift::pick),
        0xd4 | 0xd5 => Entry::new(f::NO_LONG, I::Byte, legacy::pick),
        0xd6 => Entry::new(f::NO_LONG, I::None, legacy::pick),
        0xd7 => Entry::new(0, I::None, convert::pick_xlat),
        0xd8..=0xdf => Entry::ROW,
        0xe0..=0xe3 => Entry::new(f::DEFAULT_64, I::Byte, branch::pick_loop),
        0xe4..=0xe7 => Entry::new(f::PORT | byte(opcode), I::Byte, port),
        0xe8 | 0xe9 => Entry::new(f::DEFAULT_64, I::Short, branch::pick),
        0xea => Entry::new(f::NO_LONG, I::Far, |_| last(far::far_jump_immediate)),
        0xeb => Entry::new(f::DEFAULT_64, I::Byte, branch::pick),
        0xec..=0xef => Entry::new(f::PORT | byte(opcode), I::None, port),
        0xf1 => Entry::new(0, I::None, |_| last(far::int1)),
        0xf4 => Entry::new(0, I::None, |_| last(system::hlt)),
        0xf5 | 0xf8 | 0xf9 | 0xfc | 0xfd => Entry::new(0, I::None, flag::pick),
        0xf6 | 0xf7 => Entry::new(f::MODRM | byte(opcode), I::Test, alu::pick_group_3),
        0xfa => Entry::new(0, I::None, |_| last(system::cli)),
        0xfb => Entry::new(0, I::None, |_| last(system::sti)),
        0xfe => Entry::new(f::MODRM | f::BYTE, I::None, alu::pick_group_4),
        0xff => Entry::new(f::MODRM, I::None, branch::pick_group_5),
        _ => Entry::UNDEFINED,
    }
}

fn push_segment(_: &Insn) -> Option<Pick> {
    last(far::push_segment)
}

fn pop_segment(_: &Insn) -> Option<Pick> {
    last(far::pop_segment)
}

fn mov_from_segment(insn: &Insn) -> Option<Pick> {
    if insn.extension() < 6 { last(far::mov_from_segment) } else { None }
}

/// CS cannot be loaded so.
fn mov_to_segment(insn: &Insn) -> Option<Pick> {
    if insn.extension() < 6 && insn.extension() != 1 { last(far::mov_to_segment) } else { None }
}

fn load_far_pointer(insn: &Insn) -> Option<Pick> {
    if insn.is_memory() { last(far::load_far_pointer) } else { None }
}

fn movsxd_or_arpl(insn: &Insn) -> Option<Pick> {
    if insn.mode.long { convert::pick_movsxd(insn) } else { last(system::arpl) }
}

fn port(insn: &Insn) -> Option<Pick> {
    if insn.opcode & 2 == 0 { last(io::in_) } else { last(io::out_) }
}

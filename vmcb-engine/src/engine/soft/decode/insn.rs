//! One instruction: prefixes, opcode, ModRM and SIB, displacement, immediate, and the rules that hold for all of them.

use super::Insn;
use super::bytes::{Cursor, Trouble};
use super::one_byte::ONE_BYTE;
use super::table::{Entry, Immediate, flag};
use super::two_byte::{MAP_3A, MAP_38, TWO_BYTE};
use crate::engine::soft::core::{DS, Mode, RIP_BASE, SS, ZERO};
use crate::engine::soft::interp::pick::{self, Pick, Standing};
use crate::engine::soft::op::{NO_SEGMENT, Op, form};
use crate::engine::soft::{sse, x87};

/// Prefixes of one instruction.
#[derive(Clone, Copy, Default)]
struct Prefixes {
    segment: Option<u8>,
    operand: bool,
    address: bool,
    lock: bool,
    /// F2 or F3, the last of them; 0 for none.
    repeat: u8,
    /// The REX byte directly before the opcode; 0 for none.
    rex: u8,
}

/// Decodes the instruction under the cursor; `offset` bytes lie before it in its block. Returns it and how it stands in
/// the block. Undefined and overlong instructions are operations too: they raise.
pub fn decode(cursor: &mut Cursor<'_>, mode: Mode, offset: u16) -> Result<(Op, Standing), Trouble> {
    let mut insn = Insn::new(mode);
    let picked = match parse(cursor, &mut insn) {
        Ok(picked) => picked,
        Err(Trouble::Undefined) => raising(&mut insn, pick::undefined),
        Err(Trouble::TooLong) => raising(&mut insn, pick::too_long),
        Err(trouble) => return Err(trouble),
    };
    let mut op = insn.op;
    op.offset = offset;
    op.length = cursor.taken() as u8;
    if op.is_memory() && op.base == RIP_BASE {
        op.displacement += i64::from(offset) + i64::from(op.length);
    }
    op.code = u16::from(insn.map) << 8 | u16::from(insn.opcode);
    op.run.set(picked.run);
    if let Standing::Linked(_) = picked.place {
        op.displacement = (op.immediate as i64).wrapping_add(i64::from(offset) + i64::from(op.length));
    }
    Ok((op, picked.place))
}

fn raising(insn: &mut Insn, f: impl crate::engine::soft::op::Meaning) -> Pick {
    insn.op = Op::default();
    pick::last(f).expect("last always picks")
}

fn parse(cursor: &mut Cursor<'_>, insn: &mut Insn) -> Result<Pick, Trouble> {
    let (prefixes, first) = prefixes(cursor, insn.mode)?;
    let entry = opcode(cursor, insn, first)?;
    let long = insn.mode.long;
    if long && entry.flags & flag::NO_LONG != 0 {
        return Err(Trouble::Undefined);
    }
    insn.prefix = match prefixes.repeat {
        0 if prefixes.operand => 0x66,
        repeat => repeat,
    };
    apply_prefixes(insn, prefixes);
    if entry.flags & flag::MODRM != 0 {
        insn.modrm = cursor.byte()?;
    }
    insn.op.size = operand_size(insn, &entry, prefixes);
    let mut immediate = entry.immediate;
    let mut picked = None;
    let registers = insn.modrm >= 0xc0 || entry.flags & flag::REGISTERS != 0;
    if entry.flags & flag::MODRM != 0 && !registers {
        insn.op.form |= form::MEMORY;
    }
    if entry.flags & flag::ROW != 0 {
        let row = if insn.map == 0 { x87::lookup(insn.opcode, insn.modrm) } else { sse::lookup(insn.selector()) };
        let row = row.ok_or(Trouble::Undefined)?;
        if row.immediate {
            immediate = Immediate::Byte;
        }
        picked = pick::row(row);
    }
    operands(cursor, insn, &entry, prefixes)?;
    if immediate == Immediate::Moffs {
        moffs(cursor, insn, prefixes)?;
    } else {
        insn.op.immediate = read_immediate(cursor, insn, immediate)?;
    }
    let picked = picked.or_else(|| (entry.pick)(insn)).ok_or(Trouble::Undefined)?;
    if prefixes.lock && !lockable(insn) {
        return Err(Trouble::Undefined);
    }
    Ok(picked)
}

fn prefixes(cursor: &mut Cursor<'_>, mode: Mode) -> Result<(Prefixes, u8), Trouble> {
    let mut prefixes = Prefixes::default();
    loop {
        let byte = cursor.byte()?;
        let rex = std::mem::take(&mut prefixes.rex);
        match byte {
            // CS, SS, DS, ES overrides are ignored in 64-bit mode (APM3 1.2.4).
            0x26 | 0x2e | 0x36 | 0x3e if mode.long => {}
            0x26 | 0x2e | 0x36 | 0x3e => prefixes.segment = Some(byte >> 3 & 3),
            0x64 | 0x65 => prefixes.segment = Some(byte & 7),
            0x66 => prefixes.operand = true,
            0x67 => prefixes.address = true,
            0xf0 => prefixes.lock = true,
            0xf2 | 0xf3 => prefixes.repeat = byte,
            0x40..=0x4f if mode.long => prefixes.rex = byte,
            _ => {
                prefixes.rex = rex;
                return Ok((prefixes, byte));
            }
        }
    }
}

fn opcode(cursor: &mut Cursor<'_>, insn: &mut Insn, first: u8) -> Result<Entry, Trouble> {
    insn.opcode = first;
    if first != 0x0f {
        return Ok(ONE_BYTE[usize::from(first)]);
    }
    (insn.map, insn.opcode) = (1, cursor.byte()?);
    match insn.opcode {
        0x38 => {
            (insn.map, insn.opcode) = (2, cursor.byte()?);
            Ok(MAP_38[usize::from(insn.opcode)])
        }
        0x3a => {
            (insn.map, insn.opcode) = (3, cursor.byte()?);
            Ok(MAP_3A[usize::from(insn.opcode)])
        }
        second => Ok(TWO_BYTE[usize::from(second)]),
    }
}

fn apply_prefixes(insn: &mut Insn, prefixes: Prefixes) {
    let bit = |set: bool, bit: u16| if set { bit } else { 0 };
    let op = &mut insn.op;
    op.form |= bit(prefixes.repeat == 0xf3, form::REP)
        | bit(prefixes.repeat == 0xf2, form::REPNE)
        | bit(prefixes.lock, form::LOCK)
        | bit(prefixes.rex != 0, form::REX)
        | bit(prefixes.operand, form::OPERAND_SIZE)
        | bit(prefixes.rex & 8 != 0, form::WIDE);
    op.address_size = match (insn.mode.long, insn.mode.big != prefixes.address) {
        (true, _) => {
            if prefixes.address {
                4
            } else {
                8
            }
        }
        (false, true) => 4,
        (false, false) => 2,
    };
    // What string instructions, XLAT and moffs use.
    op.segment = match prefixes.segment {
        Some(segment) => segment,
        None if insn.mode.long => NO_SEGMENT,
        None => DS as u8,
    };
}

fn operand_size(insn: &Insn, entry: &Entry, prefixes: Prefixes) -> u8 {
    if entry.flags & flag::BYTE != 0 {
        return 1;
    }
    // Near CALL, near JMP and PUSH of group 5.
    let group_5 = insn.map == 0 && insn.opcode == 0xff && matches!(insn.extension(), 2 | 4 | 6);
    let size = if insn.mode.long {
        match (prefixes.rex & 8 != 0, prefixes.operand) {
            (true, _) => 8,
            (false, true) => 2,
            (false, false) => {
                if entry.flags & flag::DEFAULT_64 != 0 || group_5 {
                    8
                } else {
                    4
                }
            }
        }
    } else if insn.mode.big != prefixes.operand {
        4
    } else {
        2
    };
    if entry.flags & flag::PORT != 0 { size.min(4) } else { size }
}

fn byte_register(number: u8, rex: u8) -> u8 {
    if rex == 0 && (4..8).contains(&number) { (number - 4) | 32 } else { number }
}

fn operands(cursor: &mut Cursor<'_>, insn: &mut Insn, entry: &Entry, prefixes: Prefixes) -> Result<(), Trouble> {
    let rex = prefixes.rex;
    let bytes = entry.flags & flag::BYTE != 0;
    if entry.flags & flag::IN_OPCODE != 0 {
        let number = insn.opcode & 7 | (rex & 1) << 3;
        insn.op.rm = if bytes { byte_register(number, rex) } else { number };
        return Ok(());
    }
    if entry.flags & flag::MODRM == 0 {
        return Ok(());
    }
    let reg = (insn.modrm >> 3 & 7) | (rex & 4) << 1;
    insn.op.reg = if bytes { byte_register(reg, rex) } else { reg };
    if insn.is_memory() {
        return if insn.op.address_size == 2 {
            memory_16(cursor, insn, prefixes)
        } else {
            memory(cursor, insn, prefixes)
        };
    }
    let rm = insn.modrm & 7 | (rex & 1) << 3;
    insn.op.rm = if bytes || entry.flags & flag::BYTE_RM != 0 { byte_register(rm, rex) } else { rm };
    Ok(())
}

/// Notes the segment of a memory operand whose default is SS if `stack`.
fn segment(insn: &mut Insn, prefixes: Prefixes, stack: bool) {
    if insn.mode.long {
        if stack && prefixes.segment.is_none() {
            insn.op.form |= form::STACK;
        }
    } else if stack && prefixes.segment.is_none() {
        insn.op.segment = SS as u8;
    }
}

/// ModRM and SIB with 32- and 64-bit addresses (APM3 1.4).
fn memory(cursor: &mut Cursor<'_>, insn: &mut Insn, prefixes: Prefixes) -> Result<(), Trouble> {
    let (mode, rm) = (insn.modrm >> 6, insn.modrm & 7);
    let extend = |bit: u8| if prefixes.rex & bit != 0 { 8 } else { 0 };
    let mut wide = mode == 2;
    if rm == 4 {
        let sib = cursor.byte()?;
        let index = sib >> 3 & 7 | extend(2);
        if index != 4 {
            (insn.op.index, insn.op.scale) = (index, sib >> 6);
        }
        if sib & 7 == 5 && mode == 0 {
            wide = true;
        } else {
            insn.op.base = sib & 7 | extend(1);
        }
    } else if rm == 5 && mode == 0 {
        wide = true;
        if insn.mode.long {
            insn.op.base = RIP_BASE;
        }
    } else {
        insn.op.base = rm | extend(1);
    }
    insn.op.displacement = match (wide, mode) {
        (true, _) => cursor.signed(4)?,
        (false, 1) => cursor.signed(1)?,
        _ => 0,
    };
    let stack = matches!(insn.op.base, 4 | 5);
    segment(insn, prefixes, stack);
    Ok(())
}

/// ModRM with 16-bit addresses (APM3 table A-33).
fn memory_16(cursor: &mut Cursor<'_>, insn: &mut Insn, prefixes: Prefixes) -> Result<(), Trouble> {
    const FORMS: [(u8, u8); 8] = [(3, 6), (3, 7), (5, 6), (5, 7), (6, ZERO), (7, ZERO), (5, ZERO), (3, ZERO)];
    let (mode, rm) = (insn.modrm >> 6, insn.modrm & 7);
    (insn.op.base, insn.op.index) = FORMS[usize::from(rm)];
    insn.op.displacement = match mode {
        0 if rm == 6 => {
            insn.op.base = ZERO;
            cursor.signed(2)?
        }
        0 => 0,
        1 => cursor.signed(1)?,
        _ => cursor.signed(2)?,
    };
    let stack = insn.op.base == 5;
    segment(insn, prefixes, stack);
    Ok(())
}

fn moffs(cursor: &mut Cursor<'_>, insn: &mut Insn, prefixes: Prefixes) -> Result<(), Trouble> {
    insn.op.displacement = cursor.number(insn.op.address_size)? as i64;
    insn.op.form |= form::MEMORY;
    segment(insn, prefixes, false);
    Ok(())
}

fn read_immediate(cursor: &mut Cursor<'_>, insn: &Insn, kind: Immediate) -> Result<u64, Trouble> {
    let size = insn.op.size;
    Ok(match kind {
        Immediate::None | Immediate::Moffs => 0,
        Immediate::Byte => cursor.signed(1)? as u64,
        Immediate::Word => cursor.number(2)?,
        Immediate::Short => cursor.signed(size.min(4))? as u64,
        Immediate::Full => cursor.signed(size)? as u64,
        Immediate::Enter => cursor.number(3)?,
        Immediate::Far => {
            let offset = cursor.number(size.min(4))?;
            cursor.number(2)? << 32 | offset
        }
        Immediate::Test if insn.extension() < 2 => cursor.signed(size.min(4))? as u64,
        Immediate::Test => 0,
    })
}

/// LOCK is legal with a memory destination of these only (APM3 1.2.5); with MOV CR0 it means CR8.
fn lockable(insn: &Insn) -> bool {
    let group = insn.extension();
    match (insn.map, insn.opcode) {
        (1, 0x20 | 0x22) => true,
        _ if !insn.is_memory() => false,
        (0, 0x00..=0x37) => insn.opcode & 7 < 2,
        (0, 0x80..=0x83) => group != 7,
        (0, 0x86 | 0x87) => true,
        (0, 0xf6 | 0xf7) => matches!(group, 2 | 3),
        (0, 0xfe | 0xff) => group < 2,
        (1, 0xab | 0xb3 | 0xbb | 0xb0 | 0xb1 | 0xc0 | 0xc1) => true,
        (1, 0xba) => group > 4,
        (1, 0xc7) => group == 1,
        _ => false,
    }
}

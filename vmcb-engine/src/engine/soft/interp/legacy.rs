//! What 64-bit mode dropped: DAA, DAS, AAA, AAS, AAM, AAD, SALC, BOUND (APM3 chapter 3).

use super::operand::{Width, checked};
use super::pick::{Pick, by_wide, straight};
use crate::engine::soft::core::{Core, Flags, RAX, Step};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::op::Op;

/// Flags of AL, with CF and AF given.
fn al_flags(al: u8, cf: bool, af: bool) -> Flags {
    Flags::parts(al.signed(), cf, false, af)
}

fn decimal<const SUBTRACT: bool>(core: &mut Core, _: &Op) -> Step {
    let (old, old_cf, old_af) = (u8::get(core, 0), core.flags.cf(), core.flags.af());
    let (mut al, mut cf) = (old, old_cf);
    let af = old & 15 > 9 || old_af;
    let change = |al: u8, by: u8| if SUBTRACT { al.overflowing_sub(by) } else { al.overflowing_add(by) };
    if af {
        let (value, carry) = change(al, 6);
        (al, cf) = (value, old_cf || carry);
    }
    if old > 0x99 || old_cf {
        (al, _) = change(al, 0x60);
        cf = true;
    } else if !SUBTRACT {
        cf = false;
    }
    u8::set(core, 0, al);
    core.flags = al_flags(al, cf, af);
    Ok(())
}

fn ascii<const SUBTRACT: bool>(core: &mut Core, _: &Op) -> Step {
    let adjust = u8::get(core, 0) & 15 > 9 || core.flags.af();
    let mut ax = u16::get(core, 0);
    if adjust {
        ax = if SUBTRACT { ax.wrapping_sub(6).wrapping_sub(0x100) } else { ax.wrapping_add(0x106) };
    }
    ax &= 0xff0f;
    u16::set(core, 0, ax);
    core.flags = al_flags(ax as u8, adjust, adjust);
    Ok(())
}

fn aam(core: &mut Core, op: &Op) -> Step {
    let (al, base) = (u8::get(core, 0), op.immediate as u8);
    if base == 0 {
        return core.raise(0);
    }
    u16::set(core, 0, u16::from(al / base) << 8 | u16::from(al % base));
    core.flags = al_flags(al % base, false, false);
    Ok(())
}

fn aad(core: &mut Core, op: &Op) -> Step {
    let ax = u16::get(core, 0);
    let al = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(op.immediate as u8));
    u16::set(core, 0, al.into());
    core.flags = al_flags(al, false, false);
    Ok(())
}

fn salc(core: &mut Core, _: &Op) -> Step {
    let value = if core.flags.cf() { 0xff } else { 0 };
    u8::set(core, RAX as u8, value);
    Ok(())
}

fn bound<W: Width>(core: &mut Core, op: &Op) -> Step {
    let linear = checked(core, op, 2 * W::BYTES, false)?;
    let low = core.load::<W>(linear)?.signed() as i64;
    let high = core.load::<W>(linear.wrapping_add(W::BYTES) & 0xffff_ffff)?.signed() as i64;
    let index = W::get(core, op.reg).signed() as i64;
    if index < low || index > high { core.raise(5) } else { Ok(()) }
}

/// 27, 2F, 37, 3F, D4, D5, D6, 62.
pub fn pick(insn: &Insn) -> Option<Pick> {
    match insn.opcode {
        0x27 => straight(decimal::<false>),
        0x2f => straight(decimal::<true>),
        0x37 => straight(ascii::<false>),
        0x3f => straight(ascii::<true>),
        0xd4 => straight(aam),
        0xd5 => straight(aad),
        0xd6 => straight(salc),
        0x62 if insn.is_memory() => by_wide!(insn.op.size, W => straight(bound::<W>)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_al() {
        assert_eq!(al_flags(0x80, true, false).to_rflags(), 0x81);
        assert_eq!(al_flags(0, false, true).to_rflags(), 0x54);
    }
}

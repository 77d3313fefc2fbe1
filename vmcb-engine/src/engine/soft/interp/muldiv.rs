//! MUL, IMUL, DIV, IDIV (APM3 chapter 3).
//!
//! The flags that the manual leaves undefined are those of AMD family 19h: MUL and IMUL leave SF, ZF, AF, PF as they were
//! found on hardware; DIV and IDIV keep CF and OF, set AF and clear the rest.

use super::operand::{Place, Width};
use super::pick::{Pick, by_place, by_size, by_wide, straight};
use crate::engine::soft::core::{Core, Flags, RAX, RDX, Step};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::op::Op;

/// Vector of the divide error.
const DIVIDE_ERROR: u8 = 0;

/// CF and OF say whether the high half matters; the other four stay.
#[inline(always)]
fn product_flags(core: &mut Core, overflow: bool) {
    let kept = core.flags;
    core.flags = kept.with_cf_of(overflow, overflow);
}

/// Writes a double-width value: AX, or the D:A pair.
#[inline(always)]
fn set_pair<W: Width>(core: &mut Core, low: u64, high: u64) {
    if W::BYTES == 1 {
        u16::set(core, RAX as u8, (low & 0xff | high << 8) as u16);
    } else {
        W::set(core, RAX as u8, W::cut(low));
        W::set(core, RDX as u8, W::cut(high));
    }
}

#[inline(always)]
fn mul<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let right = P::load::<W>(core, op)?.wide();
    let product = u128::from(W::get(core, RAX as u8).wide()) * u128::from(right);
    let high = (product >> W::BITS) as u64;
    set_pair::<W>(core, product as u64, high);
    product_flags(core, high != 0);
    Ok(())
}

#[inline(always)]
fn imul<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let right = P::load::<W>(core, op)?.signed();
    let left = W::get(core, RAX as u8).signed();
    let product = i128::from(left as i64) * i128::from(right as i64);
    set_pair::<W>(core, product as u64, (product >> W::BITS) as u64);
    product_flags(core, product != i128::from(W::cut(product as u64).signed() as i64));
    Ok(())
}

#[inline(always)]
fn imul_into<W: Width>(core: &mut Core, register: u8, left: W, right: W) {
    let product = i128::from(left.signed() as i64) * i128::from(right.signed() as i64);
    let value = W::cut(product as u64);
    W::set(core, register, value);
    product_flags(core, product != i128::from(value.signed() as i64));
}

#[inline(always)]
fn imul_reg_rm<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let right = P::load::<W>(core, op)?;
    imul_into(core, op.reg, W::get(core, op.reg), right);
    Ok(())
}

#[inline(always)]
fn imul_reg_rm_imm<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let left = P::load::<W>(core, op)?;
    imul_into(core, op.reg, left, W::cut(op.immediate));
    Ok(())
}

/// The dividend: AX, or the D:A pair.
#[inline(always)]
fn dividend<W: Width>(core: &Core) -> u128 {
    if W::BYTES == 1 {
        return u128::from(core.gprs[RAX] & 0xffff);
    }
    let (low, high) = (W::get(core, RAX as u8).wide(), W::get(core, RDX as u8).wide());
    u128::from(high) << W::BITS | u128::from(low)
}

/// What a division leaves in the flags.
#[inline(always)]
fn quotient_flags(core: &mut Core) {
    let kept = core.flags;
    core.flags = Flags { result: 1, aux: 8 }.with_cf_of(kept.cf(), kept.of());
}

fn div<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let divisor = P::load::<W>(core, op)?.wide();
    let dividend = dividend::<W>(core);
    if divisor == 0 || (dividend >> W::BITS) as u64 >= divisor {
        return core.raise(DIVIDE_ERROR);
    }
    let (quotient, remainder) = match u64::try_from(dividend) {
        Ok(dividend) => (dividend / divisor, dividend % divisor),
        Err(_) => ((dividend / u128::from(divisor)) as u64, (dividend % u128::from(divisor)) as u64),
    };
    set_pair::<W>(core, quotient, remainder);
    quotient_flags(core);
    Ok(())
}

fn idiv<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let divisor = i128::from(P::load::<W>(core, op)?.signed() as i64);
    let unused = 128 - 2 * W::BITS;
    let dividend = ((dividend::<W>(core) << unused) as i128) >> unused;
    // -2^127 / -1 is not a number of 128 bits.
    let Some(quotient) = dividend.checked_div(divisor) else { return core.raise(DIVIDE_ERROR) };
    if quotient != i128::from(W::cut(quotient as u64).signed() as i64) {
        return core.raise(DIVIDE_ERROR);
    }
    set_pair::<W>(core, quotient as u64, (dividend % divisor) as u64);
    quotient_flags(core);
    Ok(())
}

/// F6, F7 /4-/7.
pub fn pick_group_3(insn: &Insn) -> Option<Pick> {
    let size = insn.op.size;
    match insn.extension() {
        4 => by_size!(size, W => by_place!(insn, P => straight(mul::<W, P>))),
        5 => by_size!(size, W => by_place!(insn, P => straight(imul::<W, P>))),
        6 => by_size!(size, W => by_place!(insn, P => straight(div::<W, P>))),
        _ => by_size!(size, W => by_place!(insn, P => straight(idiv::<W, P>))),
    }
}

/// 0F AF, 69, 6B.
pub fn pick_imul(insn: &Insn) -> Option<Pick> {
    match insn.opcode {
        0xaf => by_wide!(insn.op.size, W => by_place!(insn, P => straight(imul_reg_rm::<W, P>))),
        _ => by_wide!(insn.op.size, W => by_place!(insn, P => straight(imul_reg_rm_imm::<W, P>))),
    }
}

#[cfg(test)]
mod tests {
    use crate::engine::soft::core::Flags;

    #[test]
    fn product_flags_keep_the_other_four() {
        let kept = Flags::from_rflags(0xd4).with_cf_of(true, true);
        assert_eq!(kept.to_rflags(), 0x8d5);
        assert_eq!(kept.with_cf_of(false, false).to_rflags(), 0xd4);
    }
}

//! Descriptor tables: LGDT, LIDT, LLDT, LTR and their readers, and the instructions that look at a descriptor without
//! loading it (APM2 4.6, 4.12; APM3 chapter 4).

use super::system::set_register;
use crate::addr::is_canonical;
use crate::engine::soft::core::{Core, Flags, Step, rflags};
use crate::engine::soft::op::Op;
use crate::vmcb::registers::{cr0, cr4, efer};
use crate::vmcb::{Intercept, Segment};

/// Limit and base out of memory.
fn load_table(core: &mut Core, op: &Op) -> Step<Segment> {
    let linear = op.linear(core);
    let mut bytes = [0; 10];
    let length = if core.mode.long { 10 } else { 6 };
    core.read_linear(linear, &mut bytes[..length])?;
    let limit = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    let mut base = u64::from_le_bytes(bytes[2..].try_into().expect("eight bytes"));
    if !core.mode.long && op.size == 2 {
        base &= 0xff_ffff;
    }
    if !is_canonical(base, 48) {
        return core.general_protection();
    }
    Ok(Segment::new(0, 0, limit, base))
}

fn store_table(core: &mut Core, op: &Op, which: Intercept, table: fn(&Core) -> Segment) -> Step {
    if core.cr4 & cr4::UMIP != 0 {
        core.privileged()?;
    }
    core.intercept(which)?;
    let table = table(core);
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&(table.limit as u16).to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let length = if core.mode.long { 10 } else { 6 };
    core.write_linear(op.linear(core), &bytes[..length])
}

/// LGDT.
pub fn lgdt(core: &mut Core, op: &Op) -> Step {
    core.privileged()?;
    core.intercept(Intercept::GDTR_WRITE)?;
    core.gdtr = load_table(core, op)?;
    Ok(())
}

/// LIDT.
pub fn lidt(core: &mut Core, op: &Op) -> Step {
    core.privileged()?;
    core.intercept(Intercept::IDTR_WRITE)?;
    core.idtr = load_table(core, op)?;
    Ok(())
}

/// SGDT.
pub fn sgdt(core: &mut Core, op: &Op) -> Step {
    store_table(core, op, Intercept::GDTR_READ, |core| core.gdtr)
}

/// SIDT.
pub fn sidt(core: &mut Core, op: &Op) -> Step {
    store_table(core, op, Intercept::IDTR_READ, |core| core.idtr)
}

/// The selector operand: a register or 16 bits of memory.
fn selector_operand(core: &mut Core, op: &Op) -> Step<u16> {
    if op.is_memory() { core.load::<u16>(op.linear(core)) } else { Ok(core.gprs[usize::from(op.rm & 15)] as u16) }
}

/// LLDT and LTR, SLDT and STR exist in protected mode only, outside of virtual-8086 mode.
fn protected_only(core: &mut Core) -> Step {
    if core.cr0 & cr0::PE == 0 || core.system_flags & rflags::VM != 0 { core.undefined() } else { Ok(()) }
}

/// LLDT.
pub fn lldt(core: &mut Core, op: &Op) -> Step {
    protected_only(core)?;
    core.privileged()?;
    core.intercept(Intercept::LDTR_WRITE)?;
    let selector = selector_operand(core, op)?;
    if selector & !3 == 0 {
        core.ldtr = Segment::new(selector, 0, 0, 0);
        return Ok(());
    }
    let named = u32::from(selector & !3);
    let found = if selector & 4 == 0 { core.read_system_descriptor(selector)? } else { None };
    let Some((segment, _)) = found else { return core.raise_code(13, named) };
    if segment.is_code_or_data() || segment.kind() != 2 || !is_canonical(segment.base, 48) {
        return core.raise_code(13, named);
    }
    if !segment.present() {
        return core.raise_code(11, named);
    }
    core.ldtr = segment;
    Ok(())
}

/// LTR: the descriptor becomes busy.
pub fn ltr(core: &mut Core, op: &Op) -> Step {
    protected_only(core)?;
    core.privileged()?;
    core.intercept(Intercept::TR_WRITE)?;
    let selector = selector_operand(core, op)?;
    if selector & !3 == 0 {
        return core.general_protection();
    }
    let named = u32::from(selector & !3);
    let found = if selector & 4 == 0 { core.read_system_descriptor(selector)? } else { None };
    let Some((mut segment, low)) = found else { return core.raise_code(13, named) };
    let available = segment.kind() == 9 || (segment.kind() == 1 && core.efer & efer::LMA == 0);
    if segment.is_code_or_data() || !available || !is_canonical(segment.base, 48) {
        return core.raise_code(13, named);
    }
    if !segment.present() {
        return core.raise_code(11, named);
    }
    let at = core.descriptor_address(selector, 8).expect("the descriptor was read from there");
    core.as_supervisor(|core| core.store::<u64>(at, low | 2 << 40))?;
    segment.attrib |= 2;
    core.tr = segment;
    Ok(())
}

fn store_selector(core: &mut Core, op: &Op, which: Intercept, selector: fn(&Core) -> u16) -> Step {
    protected_only(core)?;
    if core.cr4 & cr4::UMIP != 0 {
        core.privileged()?;
    }
    core.intercept(which)?;
    let selector = selector(core);
    if op.is_memory() {
        return core.store::<u16>(op.linear(core), selector);
    }
    set_register(core, op.rm, op.size, selector.into());
    Ok(())
}

/// SLDT.
pub fn sldt(core: &mut Core, op: &Op) -> Step {
    store_selector(core, op, Intercept::LDTR_READ, |core| core.ldtr.selector)
}

/// STR.
pub fn str_(core: &mut Core, op: &Op) -> Step {
    store_selector(core, op, Intercept::TR_READ, |core| core.tr.selector)
}

fn set_zero(core: &mut Core, zero: bool) {
    let flags = core.flags.to_rflags() & !rflags::ZF | if zero { rflags::ZF } else { 0 };
    core.flags = Flags::from_rflags(flags);
}

/// The descriptor that a selector names, if software at this CPL may look at it.
fn visible(core: &mut Core, op: &Op) -> Step<Option<(Segment, u64)>> {
    protected_only(core)?;
    let selector = selector_operand(core, op)?;
    if selector & !3 == 0 {
        return Ok(None);
    }
    let Some(low) = core.read_descriptor(selector)? else { return Ok(None) };
    let segment = Segment::from_descriptor(selector, low);
    let conforming = segment.is_code() && segment.kind() & 4 != 0;
    let allowed = conforming || segment.dpl() >= core.cpl.max((selector & 3) as u8);
    Ok(allowed.then_some((segment, low)))
}

/// VERR.
pub fn verr(core: &mut Core, op: &Op) -> Step {
    let found = visible(core, op)?;
    let readable = |segment: &Segment| segment.is_code_or_data() && segment.kind() & 0xa != 8;
    set_zero(core, found.is_some_and(|(segment, _)| readable(&segment)));
    Ok(())
}

/// VERW.
pub fn verw(core: &mut Core, op: &Op) -> Step {
    let found = visible(core, op)?;
    let writable = |segment: &Segment| segment.is_code_or_data() && segment.kind() & 0xa == 2;
    set_zero(core, found.is_some_and(|(segment, _)| writable(&segment)));
    Ok(())
}

/// LAR: types that have access rights to show (APM3 table 4-1).
pub fn lar(core: &mut Core, op: &Op) -> Step {
    let long = core.efer & efer::LMA != 0;
    let legal = |segment: &Segment| {
        segment.is_code_or_data()
            || if long {
                matches!(segment.kind(), 2 | 9 | 11 | 12)
            } else {
                matches!(segment.kind(), 1..=5 | 9 | 11 | 12)
            }
    };
    let found = visible(core, op)?.filter(|(segment, _)| legal(segment));
    if let Some((_, low)) = found {
        let mask = if op.size == 2 { 0xff00 } else { 0x00ff_ff00 };
        set_register(core, op.reg, op.size, low >> 32 & mask);
    }
    set_zero(core, found.is_some());
    Ok(())
}

/// LSL: types that have a limit.
pub fn lsl(core: &mut Core, op: &Op) -> Step {
    let long = core.efer & efer::LMA != 0;
    let legal = |segment: &Segment| {
        segment.is_code_or_data()
            || if long { matches!(segment.kind(), 2 | 9 | 11) } else { matches!(segment.kind(), 1..=3 | 9 | 11) }
    };
    let found = visible(core, op)?.filter(|(segment, _)| legal(segment));
    if let Some((segment, _)) = found {
        set_register(core, op.reg, op.size, segment.limit.into());
    }
    set_zero(core, found.is_some());
    Ok(())
}

/// ARPL: the operand's RPL is raised to the register's.
pub fn arpl(core: &mut Core, op: &Op) -> Step {
    protected_only(core)?;
    let wanted = core.gprs[usize::from(op.reg & 15)] as u16 & 3;
    let raise = |old: u16| if old & 3 < wanted { (old & !3 | wanted, true) } else { (old, false) };
    let raised = if op.is_memory() {
        let linear = op.linear(core);
        core.modify::<u16, bool>(linear, |_, old| raise(old))?
    } else {
        let (value, raised) = raise(core.gprs[usize::from(op.rm & 15)] as u16);
        set_register(core, op.rm, 2, value.into());
        raised
    };
    set_zero(core, raised);
    Ok(())
}

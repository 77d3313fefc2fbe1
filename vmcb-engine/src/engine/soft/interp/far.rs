//! Loads of segment registers, far transfers, software interrupts and IRET (APM2 chapter 4, 8.7-8.9, 12; APM3).
//!
//! Far transfers reach code segments, and call gates of long mode. Legacy call gates, and whatever would switch tasks
//! (TSS and task gates, IRET with NT), are #GP with the selector, after the task switch intercept. Virtual-8086 mode
//! cannot be entered.

use super::descriptor::{Gate, accessed};
use crate::addr::is_canonical;
use crate::engine::soft::core::{CS, Core, DS, ES, FS, GS, RSP, SS, Step, rflags};
use crate::engine::soft::deliver::Software;
use crate::engine::soft::op::Op;
use crate::vmcb::registers::{cr0, efer};
use crate::vmcb::{Intercept, Segment};

use super::system::set_register;

impl Core {
    fn far_mask(&self) -> u64 {
        if self.mode.long {
            u64::MAX
        } else if self.segments[SS].big() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    fn far_linear(&self, pointer: u64) -> u64 {
        if self.mode.long {
            pointer
        } else {
            self.segments[SS].base.wrapping_add(pointer & self.far_mask()) & 0xffff_ffff
        }
    }

    /// The word `index` of so many bytes above the stack pointer; moves nothing.
    fn far_word(&mut self, index: u64, size: u8) -> Step<u64> {
        let linear = self.far_linear(self.gprs[RSP].wrapping_add(index * u64::from(size)));
        let loaded = match size {
            2 => self.load::<u16>(linear).map(u64::from),
            4 => self.load::<u32>(linear).map(u64::from),
            _ => self.load::<u64>(linear),
        };
        loaded.inspect_err(|_| self.blame_stack())
    }

    fn set_far_stack(&mut self, value: u64) {
        let mask = self.far_mask();
        self.gprs[RSP] = if mask == 0xffff { self.gprs[RSP] & !mask | value & mask } else { value & mask };
    }

    /// Pushes words, the last one to the lowest address, all or nothing.
    fn push_words(&mut self, words: &[u64], size: u8) -> Step {
        let mut bytes = [0; 16];
        let width = usize::from(size);
        for (at, word) in words.iter().rev().enumerate() {
            bytes[at * width..(at + 1) * width].copy_from_slice(&word.to_le_bytes()[..width]);
        }
        let length = words.len() * width;
        let pointer = self.gprs[RSP].wrapping_sub(length as u64);
        let linear = self.far_linear(pointer);
        self.write_linear(linear, &bytes[..length]).inspect_err(|_| self.blame_stack())?;
        self.set_far_stack(pointer);
        Ok(())
    }
}

/// Segment register of PUSH and POP: bits 5:3 of the opcode.
fn opcode_segment(op: &Op) -> usize {
    usize::from(op.code >> 3 & 7)
}

/// MOV sreg, r/m16. A load of SS shadows interrupts for one instruction.
pub fn mov_to_segment(core: &mut Core, op: &Op) -> Step {
    let register = usize::from(op.reg & 7);
    if register == CS || register > GS {
        return core.undefined();
    }
    let selector =
        if op.is_memory() { core.load::<u16>(op.linear(core))? } else { core.gprs[usize::from(op.rm & 15)] as u16 };
    core.load_segment(register, selector)?;
    core.interrupt_shadow |= register == SS;
    Ok(())
}

/// MOV r/m, sreg.
pub fn mov_from_segment(core: &mut Core, op: &Op) -> Step {
    let register = usize::from(op.reg & 7);
    if register > GS {
        return core.undefined();
    }
    let selector = core.segments[register].selector;
    if op.is_memory() {
        return core.store::<u16>(op.linear(core), selector);
    }
    set_register(core, op.rm, op.size, selector.into());
    Ok(())
}

/// POP sreg.
pub fn pop_segment(core: &mut Core, op: &Op) -> Step {
    let register = opcode_segment(op);
    let selector = core.far_word(0, op.size)? as u16;
    core.load_segment(register, selector)?;
    core.set_far_stack(core.gprs[RSP].wrapping_add(op.size.into()));
    core.interrupt_shadow |= register == SS;
    Ok(())
}

/// PUSH sreg.
pub fn push_segment(core: &mut Core, op: &Op) -> Step {
    let selector = core.segments[opcode_segment(op)].selector;
    core.push_words(&[selector.into()], op.size)
}

fn far_pointer(core: &mut Core, op: &Op) -> Step<(u16, u64)> {
    let linear = op.linear(core);
    let mut bytes = [0; 10];
    let size = usize::from(op.size);
    core.read_linear(linear, &mut bytes[..size + 2])?;
    let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
    bytes[size..].fill(0);
    Ok((selector, u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))))
}

/// LES, LDS, LSS, LFS, LGS.
pub fn load_far_pointer(core: &mut Core, op: &Op) -> Step {
    if !op.is_memory() {
        return core.undefined();
    }
    let register = match op.code & 0xff {
        0xc4 => ES,
        0xc5 => DS,
        0xb2 => SS,
        0xb4 => FS,
        _ => GS,
    };
    let (selector, offset) = far_pointer(core, op)?;
    core.load_segment(register, selector)?;
    set_register(core, op.reg, op.size, offset);
    Ok(())
}

/// Where a far transfer goes.
struct Target {
    code: Segment,
    offset: u64,
    /// CPL afterwards.
    cpl: u8,
    /// A call gate of long mode: eight-byte words, perhaps another stack.
    gate: bool,
}

/// A code segment that JMP or CALL may go to directly: same CPL (APM2 4.11.2).
fn direct_target(core: &mut Core, selector: u16, code: Segment, offset: u64) -> Step<Target> {
    let named = u32::from(selector & !3);
    let conforming = code.kind() & 4 != 0;
    let rpl = (selector & 3) as u8;
    let legal = if conforming { code.dpl() <= core.cpl } else { rpl <= core.cpl && code.dpl() == core.cpl };
    let both = core.efer & efer::LMA != 0 && code.long() && code.big();
    if !legal || both {
        return core.raise_code(13, named);
    }
    if !code.present() {
        return core.raise_code(11, named);
    }
    core.check_target(&code, offset)?;
    let cpl = core.cpl;
    Ok(Target { code: Segment { selector: selector & !3 | u16::from(cpl), ..code }, offset, cpl, gate: false })
}

/// A call gate of long mode (APM2 4.8.4).
fn gate_target(core: &mut Core, selector: u16, low: u64, is_call: bool) -> Step<Target> {
    let named = u32::from(selector & !3);
    let gate = Gate::from_descriptor(low);
    if gate.kind != 12 || core.efer & efer::LMA == 0 {
        core.intercept(Intercept::TASK_SWITCH).and_then(|()| core.raise_code(13, named))?;
    }
    if gate.dpl < core.cpl.max((selector & 3) as u8) {
        return core.raise_code(13, named);
    }
    if !gate.present {
        return core.raise_code(11, named);
    }
    let Some(at) = core.descriptor_address(selector, 16) else { return core.raise_code(13, named) };
    let high = core.as_supervisor(|core| core.load::<u64>(at.wrapping_add(8)))?;
    if high >> 40 & 0x1f != 0 {
        return core.raise_code(13, named);
    }
    let offset = gate.offset | high << 32;
    let named = u32::from(gate.selector & !3);
    if named == 0 {
        return core.general_protection();
    }
    let Some(code) = core.read_segment(gate.selector)? else { return core.raise_code(13, named) };
    if !code.is_code() || !code.long() || code.big() || code.dpl() > core.cpl {
        return core.raise_code(13, named);
    }
    let conforming = code.kind() & 4 != 0;
    if !is_call && !conforming && code.dpl() != core.cpl {
        return core.raise_code(13, named);
    }
    if !code.present() {
        return core.raise_code(11, named);
    }
    if !is_canonical(offset, 48) {
        return core.general_protection();
    }
    let cpl = if conforming { core.cpl } else { code.dpl() };
    Ok(Target { code: Segment { selector: gate.selector & !3 | u16::from(cpl), ..code }, offset, cpl, gate: true })
}

fn resolve(core: &mut Core, selector: u16, offset: u64, is_call: bool) -> Step<Target> {
    if core.cr0 & cr0::PE == 0 {
        let code = Segment { selector, base: u64::from(selector) << 4, ..core.segments[CS] };
        core.check_target(&code, offset)?;
        return Ok(Target { code, offset, cpl: core.cpl, gate: false });
    }
    if selector & !3 == 0 {
        return core.general_protection();
    }
    let Some(low) = core.read_descriptor(selector)? else {
        return core.raise_code(13, u32::from(selector & !3));
    };
    let segment = Segment::from_descriptor(selector, low);
    let target = if segment.is_code() {
        direct_target(core, selector, segment, offset)?
    } else if segment.is_code_or_data() {
        return core.raise_code(13, u32::from(selector & !3));
    } else {
        gate_target(core, selector, low, is_call)?
    };
    core.mark_accessed(target.code)?;
    Ok(Target { code: accessed(target.code), ..target })
}

fn jump(core: &mut Core, selector: u16, offset: u64) -> Step {
    let target = resolve(core, selector, offset, false)?;
    core.set_code_segment(target.code, target.cpl);
    core.rip = target.offset;
    Ok(())
}

fn call(core: &mut Core, op: &Op, selector: u16, offset: u64) -> Step {
    let target = resolve(core, selector, offset, true)?;
    let words = [u64::from(core.segments[CS].selector), core.next_rip(op)];
    if target.cpl < core.cpl {
        call_inward(core, &target, words)?;
    } else {
        core.push_words(&words, if target.gate { 8 } else { op.size })?;
    }
    core.set_code_segment(target.code, target.cpl);
    core.rip = target.offset;
    Ok(())
}

/// A call gate to an inner level: RSP out of the TSS, SS becomes null, four words are pushed (APM2 4.8.4, 12.2.5).
fn call_inward(core: &mut Core, target: &Target, words: [u64; 2]) -> Step {
    let offset = 4 + u64::from(target.cpl) * 8;
    if offset + 7 > u64::from(core.tr.limit) {
        let named = u32::from(core.tr.selector & !3);
        return core.raise_code(10, named);
    }
    let at = core.tr.base.wrapping_add(offset);
    let stack = core.as_supervisor(|core| core.load::<u64>(at))?;
    if !is_canonical(stack, 48) {
        return core.raise_code(12, 0);
    }
    let frame = [words[1], words[0], core.gprs[RSP], u64::from(core.segments[SS].selector)];
    let bytes: Vec<u8> = frame.iter().flat_map(|word| word.to_le_bytes()).collect();
    let bottom = stack.wrapping_sub(32);
    core.as_supervisor(|core| core.write_linear(bottom, &bytes)).inspect_err(|_| core.blame_stack())?;
    core.gprs[RSP] = bottom;
    core.segments[SS] = Segment::new(target.cpl.into(), 0, 0, 0);
    Ok(())
}

/// CALL ptr16:32.
pub fn far_call_immediate(core: &mut Core, op: &Op) -> Step {
    call(core, op, (op.immediate >> 32) as u16, op.immediate & 0xffff_ffff)
}

/// CALL m16:32 and its kin.
pub fn far_call_memory(core: &mut Core, op: &Op) -> Step {
    let (selector, offset) = far_pointer(core, op)?;
    call(core, op, selector, offset)
}

/// JMP ptr16:32.
pub fn far_jump_immediate(core: &mut Core, op: &Op) -> Step {
    jump(core, (op.immediate >> 32) as u16, op.immediate & 0xffff_ffff)
}

/// JMP m16:32 and its kin.
pub fn far_jump_memory(core: &mut Core, op: &Op) -> Step {
    let (selector, offset) = far_pointer(core, op)?;
    jump(core, selector, offset)
}

/// The code segment that RETF or IRET returns to (APM2 4.11.3).
fn return_code(core: &mut Core, selector: u16) -> Step<Segment> {
    let named = u32::from(selector & !3);
    if named == 0 {
        return core.general_protection();
    }
    let rpl = (selector & 3) as u8;
    let Some(code) = core.read_segment(selector)? else { return core.raise_code(13, named) };
    let conforming = code.kind() & 4 != 0;
    let level = if conforming { code.dpl() <= rpl } else { code.dpl() == rpl };
    let both = core.efer & efer::LMA != 0 && code.long() && code.big();
    if rpl < core.cpl || !code.is_code() || !level || both {
        return core.raise_code(13, named);
    }
    if !code.present() {
        return core.raise_code(11, named);
    }
    Ok(code)
}

/// The stack segment that goes with a return to `cpl`.
fn return_stack(core: &mut Core, selector: u16, cpl: u8, long: bool) -> Step<Segment> {
    let named = u32::from(selector & !3);
    if named == 0 {
        // Null is legal for 64-bit code below CPL 3.
        if long && cpl < 3 && (selector & 3) as u8 == cpl {
            return Ok(super::descriptor::null(selector));
        }
        return core.general_protection();
    }
    let Some(stack) = core.read_segment(selector)? else { return core.raise_code(13, named) };
    let writable = stack.is_code_or_data() && stack.kind() & 0xa == 2;
    if (selector & 3) as u8 != cpl || !writable || stack.dpl() != cpl {
        return core.raise_code(13, named);
    }
    if !stack.present() {
        return core.raise_code(12, named);
    }
    core.mark_accessed(stack)?;
    Ok(accessed(stack))
}

/// RETF, with and without an immediate.
pub fn far_return(core: &mut Core, op: &Op) -> Step {
    // C8+2: only the form with an immediate (CA) releases parameters.
    let release = if op.code & 0xff == 0xca { op.immediate & 0xffff } else { 0 };
    let rip = core.far_word(0, op.size)?;
    let selector = core.far_word(1, op.size)? as u16;
    let popped = 2 * u64::from(op.size) + release;
    if core.cr0 & cr0::PE == 0 {
        let code = Segment { selector, base: u64::from(selector) << 4, ..core.segments[CS] };
        core.check_target(&code, rip)?;
        core.set_far_stack(core.gprs[RSP].wrapping_add(popped));
        core.set_code_segment(code, core.cpl);
        core.rip = rip;
        return Ok(());
    }
    let code = return_code(core, selector)?;
    core.check_target(&code, rip)?;
    let cpl = (selector & 3) as u8;
    if cpl == core.cpl {
        core.mark_accessed(code)?;
        core.set_far_stack(core.gprs[RSP].wrapping_add(popped));
        core.set_code_segment(accessed(code), cpl);
        core.rip = rip;
        return Ok(());
    }
    let size = u64::from(op.size);
    let outer = core.far_linear(core.gprs[RSP].wrapping_add(popped));
    let mut bytes = [0; 16];
    core.read_linear(outer, &mut bytes[..2 * usize::from(op.size)])?;
    let word = |at: u64| {
        let mut word = [0; 8];
        word[..size as usize].copy_from_slice(&bytes[(at * size) as usize..((at + 1) * size) as usize]);
        u64::from_le_bytes(word)
    };
    let (pointer, stack) = (word(0), word(1) as u16);
    let long = core.efer & efer::LMA != 0 && code.long();
    let stack = return_stack(core, stack, cpl, long)?;
    core.mark_accessed(code)?;
    core.segments[SS] = stack;
    core.set_code_segment(accessed(code), cpl);
    core.set_far_stack(pointer.wrapping_add(release));
    core.drop_inner_segments();
    core.rip = rip;
    Ok(())
}

/// RFLAGS after an IRET that popped `value`, at the CPL of the IRET (APM3 IRET). RF is not kept: nothing on this processor
/// raises a breakpoint that it would suppress.
fn returned_flags(core: &Core, value: u64, size: u8) -> u64 {
    let mut mask = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        mask |= rflags::AC | rflags::ID;
    }
    if core.cpl == 0 {
        mask |= rflags::IOPL;
        if size > 2 {
            mask |= rflags::VIF | rflags::VIP;
        }
    }
    if core.cpl <= core.iopl() {
        mask |= rflags::IF;
    }
    (core.rflags() & !mask & !rflags::RF) | value & mask
}

/// IRET in real mode.
fn return_real(core: &mut Core, op: &Op) -> Step {
    let rip = core.far_word(0, op.size)?;
    let selector = core.far_word(1, op.size)? as u16;
    let flags = core.far_word(2, op.size)?;
    let code = Segment { selector, base: u64::from(selector) << 4, ..core.segments[CS] };
    core.check_target(&code, rip)?;
    let flags = returned_flags(core, flags, op.size);
    core.set_far_stack(core.gprs[RSP].wrapping_add(3 * u64::from(op.size)));
    core.set_rflags(flags);
    core.set_code_segment(code, core.cpl);
    core.rip = rip;
    Ok(())
}

/// IRET, IRETD, IRETQ.
pub fn iret(core: &mut Core, op: &Op) -> Step {
    core.intercept(Intercept::IRET)?;
    if core.cr0 & cr0::PE == 0 {
        core.events.nmi_masked = false;
        return return_real(core, op);
    }
    if core.system_flags & rflags::NT != 0 {
        if core.efer & efer::LMA == 0 {
            core.intercept(Intercept::TASK_SWITCH)?;
        }
        return core.general_protection();
    }
    let rip = core.far_word(0, op.size)?;
    let selector = core.far_word(1, op.size)? as u16;
    let flags = core.far_word(2, op.size)?;
    if core.efer & efer::LMA == 0 && core.cpl == 0 && op.size > 2 && flags & rflags::VM != 0 {
        return core.general_protection();
    }
    let code = return_code(core, selector)?;
    let cpl = (selector & 3) as u8;
    let long = core.efer & efer::LMA != 0 && code.long();
    let outward = cpl != core.cpl;
    let other_stack = outward || core.mode.long;
    core.check_target(&code, rip)?;
    let mut stack = core.segments[SS];
    let mut pointer = core.gprs[RSP].wrapping_add(3 * u64::from(op.size));
    if other_stack {
        pointer = core.far_word(3, op.size)?;
        let selector = core.far_word(4, op.size)? as u16;
        stack = return_stack(core, selector, cpl, long)?;
    }
    core.mark_accessed(code)?;
    let flags = returned_flags(core, flags, op.size);
    core.events.nmi_masked = false;
    core.segments[SS] = stack;
    core.set_rflags(flags);
    core.set_code_segment(accessed(code), cpl);
    if other_stack && core.mode.long {
        core.gprs[RSP] = pointer;
    } else {
        core.set_far_stack(pointer);
    }
    if outward {
        core.drop_inner_segments();
    }
    core.rip = rip;
    Ok(())
}

/// INT3.
pub fn int3(core: &mut Core, _: &Op) -> Step {
    core.raise_software(3, Software::Exception)
}

/// INT n.
pub fn int_n(core: &mut Core, op: &Op) -> Step {
    let vector = op.immediate as u8;
    core.intercept_info(Intercept::INTN, vector.into())?;
    core.raise_software(vector, Software::Interrupt)
}

/// INTO.
pub fn into(core: &mut Core, _: &Op) -> Step {
    if !core.flags.of() {
        return Ok(());
    }
    core.raise_software(4, Software::Exception)
}

/// INT1 (ICEBP).
pub fn int1(core: &mut Core, _: &Op) -> Step {
    core.intercept(Intercept::ICEBP)?;
    core.raise_software(1, Software::Icebp)
}

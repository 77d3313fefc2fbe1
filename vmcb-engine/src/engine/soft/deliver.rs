//! Interrupts and exceptions on their way into the guest (APM2 chapter 8): which may be taken now, intercepts of
//! exceptions, the descent to double and triple fault, and delivery through the IDT in long, protected and real mode.
//!
//! Order between two instructions (APM2 8.5): single-step trap, then the virtual interrupt. An exit or fault in the middle
//! of a delivery remembers the event for EXITINTINFO. Hardware breakpoints (DR0-3) do not fire on this processor.
//!
//! A delivery retires nothing. A guest whose handler faults on its first instruction for ever would never reach a stop
//! point, so after [`STORM`] deliveries in a row one instruction is charged to it.

use super::core::{CS, Core, RSP, SS, Step, Stop, rflags};
use super::interp::descriptor::{self, Gate};
use super::op::Flow;
use crate::addr::is_canonical;
use crate::vmcb::registers::{cr0, efer};
use crate::vmcb::{Event, EventType, ExitCode, Intercept, Segment};

/// Deliveries in a row without a retired instruction, after which one is charged.
pub const STORM: u32 = 4096;

/// What the processor remembers of events between and inside instructions.
#[derive(Clone, Copy, Default, Debug)]
pub struct Events {
    /// The running instruction began with RFLAGS.TF set: #DB follows it.
    trap: bool,
    /// The running instruction is in an interrupt shadow; one that leaves the guest takes the shadow along.
    shadow: bool,
    /// The fault on its way was asked for by an instruction (INTn, INT3, INTO, INT1): what kind it is.
    software: Option<Software>,
    /// NMIs wait for IRET.
    pub nmi_masked: bool,
    /// What VMRUN injects before the first instruction, and the RIP that it returns to.
    pub injection: Option<(Event, u64)>,
    deliveries: u32,
    delivered_at: u64,
}

/// Events that instructions raise by intent: they return to the next instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Software {
    /// INT n: DPL is checked, EXT is clear.
    Interrupt,
    /// INT3 and INTO: as above, but of exception type.
    Exception,
    /// INT1: an exception without DPL check.
    Icebp,
}

/// An event while it is delivered.
#[derive(Clone, Copy)]
struct Delivery {
    event: Event,
    /// RIP that is pushed.
    return_rip: u64,
    /// The gate's DPL is checked.
    software: bool,
    /// RFLAGS.RF in the pushed image.
    resume: bool,
    /// Counts as an instruction once it has arrived.
    retires: bool,
}

impl Events {
    /// The state was taken or set: a run from here begins to count deliveries anew.
    pub fn forget_deliveries(&mut self) {
        self.deliveries = 0;
    }

    /// A guest is entered: nothing of the one before holds.
    pub fn begin_guest(&mut self) {
        (self.trap, self.shadow, self.software) = (false, false, None);
    }
}

fn contributory(vector: u8) -> bool {
    matches!(vector, 0 | 10..=13)
}

impl Core {
    /// True if something must be done before the next instruction. Cheap: asked before every block.
    #[inline(always)]
    pub fn event_pending(&self) -> bool {
        self.events.trap
            || self.events.injection.is_some()
            || (self.control.vintr & 1 << 8 != 0 && self.interrupt_ready())
    }

    #[inline]
    fn interrupt_ready(&self) -> bool {
        self.control.guest
            && self.system_flags & rflags::IF != 0
            && !self.interrupt_shadow
            && self.control.virtual_interrupt()
            && !self.mmio.emulating()
    }

    /// Takes what [`Core::event_pending`] saw.
    pub fn take_event(&mut self) -> Flow {
        self.events.shadow = false;
        if let Some((event, return_rip)) = self.events.injection.take() {
            return self.inject(event, return_rip);
        }
        if std::mem::take(&mut self.events.trap) {
            self.debug[4] |= 1 << 14;
            return self.raise_event(Event::exception(1, None), self.rip, false);
        }
        if self.control.intercepts(Intercept::VINTR) {
            let _: Step = self.exit_with(ExitCode::VINTR, 0, 0);
            return Flow::Exit;
        }
        let vector = self.control.take_virtual_interrupt();
        self.deliver(Delivery {
            event: Event::interrupt(vector),
            return_rip: self.rip,
            software: false,
            resume: false,
            retires: false,
        })
    }

    /// True if the next instruction must run alone because something is looked at right after it. Begins that instruction:
    /// the interrupt shadow holds for it and not for the one after it.
    #[inline(always)]
    pub fn single_step(&mut self) -> bool {
        if !self.interrupt_shadow && self.system_flags & rflags::TF == 0 {
            self.events.shadow = false;
            return false;
        }
        self.events.shadow = std::mem::take(&mut self.interrupt_shadow);
        self.events.trap = self.system_flags & rflags::TF != 0;
        true
    }

    /// The instruction at RIP left the guest before it did anything: what it began with is put back.
    pub(crate) fn unbegin(&mut self) {
        self.interrupt_shadow |= self.events.shadow;
        self.events.trap = false;
    }

    /// Raises an interrupt or exception that the running instruction asks for; it is delivered as if the instruction had
    /// retired.
    #[cold]
    pub fn raise_software<T>(&mut self, vector: u8, kind: Software) -> Step<T> {
        self.events.software = Some(kind);
        self.raise(vector)
    }

    /// Delivers [`Core::fault`].
    pub fn deliver_fault(&mut self) -> Flow {
        let fault = self.fault;
        self.events.trap = false;
        let Some(kind) = self.events.software.take() else {
            return self.raise_event(Event::exception(fault.vector, fault.code), self.rip, true);
        };
        let next = self.exit.next_rip;
        let event = match kind {
            Software::Interrupt => Event::new(EventType::Software, fault.vector),
            Software::Exception | Software::Icebp => Event::exception(fault.vector, None),
        };
        if kind != Software::Interrupt && self.exception_exit(event) {
            return Flow::Exit;
        }
        let software = kind != Software::Icebp;
        self.deliver(Delivery { event, return_rip: next, software, resume: false, retires: true })
    }

    /// The fetch of the next instruction faulted or left the guest.
    pub fn fetch_stopped(&mut self, stop: Stop) -> Flow {
        match stop {
            Stop::Fault => Flow::Fault,
            _ => Flow::Exit,
        }
    }

    /// Delivers an event that VMRUN injects (APM2 15.20): exceptions are not intercepted.
    fn inject(&mut self, event: Event, return_rip: u64) -> Flow {
        let software = event.kind() == Some(EventType::Software)
            || (event.kind() == Some(EventType::Exception) && matches!(event.vector(), 3 | 4));
        if event.kind() == Some(EventType::Nmi) {
            self.events.nmi_masked = true;
        }
        let event = if event.kind() == Some(EventType::Nmi) { Event::nmi() } else { event };
        self.deliver(Delivery { event, return_rip, software, resume: false, retires: false })
    }

    fn raise_event(&mut self, event: Event, return_rip: u64, is_fault: bool) -> Flow {
        if self.exception_exit(event) {
            return Flow::Exit;
        }
        if event.vector() == 14 {
            self.cr2 = self.fault.address;
        }
        let resume = is_fault && !matches!(event.vector(), 1..=4 | 8 | 18);
        self.deliver(Delivery { event, return_rip, software: false, resume, retires: false })
    }

    /// Leaves the guest if the exception is intercepted: EXITINFO1 is the error code, EXITINFO2 CR2-to-be.
    fn exception_exit(&mut self, event: Event) -> bool {
        if !self.control.intercepts(Intercept::exception(event.vector())) {
            return false;
        }
        let info2 = if event.vector() == 14 { self.fault.address } else { 0 };
        let code = u64::from(event.error().unwrap_or(0));
        let _: Step = self.exit_with(ExitCode::exception(event.vector()), code, info2);
        true
    }

    fn charge_storm(&mut self) {
        let retired = self.retired();
        if self.events.delivered_at != retired {
            (self.events.delivered_at, self.events.deliveries) = (retired, 0);
        }
        self.events.deliveries += 1;
        if self.events.deliveries == STORM {
            self.events.deliveries = 0;
            self.budget -= 1;
        }
    }

    /// Delivers until an event arrives, the guest is left, or it shuts down (APM2 8.2.9, table 8-5).
    fn deliver(&mut self, mut delivery: Delivery) -> Flow {
        self.charge_storm();
        loop {
            let first = delivery.event;
            match self.through_idt(delivery) {
                Ok(()) => {
                    self.interrupt_shadow = false;
                    self.events.shadow = false;
                    self.budget -= i64::from(delivery.retires);
                    return Flow::Next;
                }
                Err(Stop::Exit) => {
                    self.exit.interrupted = first;
                    return Flow::Exit;
                }
                Err(_) => {}
            }
            let fault = self.fault;
            let second = Event::exception(fault.vector, fault.code);
            if self.exception_exit(second) {
                self.exit.interrupted = first;
                return Flow::Exit;
            }
            let of_exception = first.kind() == Some(EventType::Exception);
            let page_fault = of_exception && first.vector() == 14;
            let next = if of_exception && first.vector() == 8 {
                return self.shut_down(first);
            } else if (of_exception && contributory(first.vector()) && contributory(fault.vector))
                || (page_fault && (contributory(fault.vector) || fault.vector == 14))
            {
                let double = Event::exception(8, Some(0));
                if self.exception_exit(double) {
                    self.exit.interrupted = first;
                    return Flow::Exit;
                }
                double
            } else {
                second
            };
            if fault.vector == 14 {
                self.cr2 = fault.address;
            }
            let resume = !matches!(next.vector(), 1..=4 | 8 | 18);
            delivery = Delivery {
                event: next,
                return_rip: delivery.fault_rip(self.rip),
                software: false,
                resume,
                retires: false,
            };
        }
    }

    /// Triple fault: the processor shuts down; only its host can go on (APM2 15.14.3).
    fn shut_down(&mut self, first: Event) -> Flow {
        let _: Step = self.exit_with(ExitCode::SHUTDOWN, 0, 0);
        self.exit.interrupted = if self.control.intercepts(Intercept::SHUTDOWN) { Event::NONE } else { first };
        Flow::Exit
    }

    fn through_idt(&mut self, delivery: Delivery) -> Step {
        if self.cr0 & cr0::PE == 0 {
            self.through_ivt(delivery)
        } else if self.efer & efer::LMA != 0 {
            self.through_long_idt(delivery)
        } else {
            self.through_legacy_idt(delivery)
        }
    }

    /// Raises a fault of the delivery itself, with the selector-style error code (APM2 8.4.1).
    fn delivery_fault<T>(&mut self, delivery: Delivery, vector: u8, selector: u32) -> Step<T> {
        self.raise_code(vector, selector | delivery.external())
    }

    fn check_gate(&mut self, delivery: Delivery, gate: Gate, kinds: &[u8]) -> Step {
        let index = u32::from(delivery.event.vector()) << 3 | 2;
        if gate.is_code_or_data || !kinds.contains(&gate.kind) || (delivery.software && self.cpl > gate.dpl) {
            return self.delivery_fault(delivery, 13, index);
        }
        if !gate.present {
            return self.delivery_fault(delivery, 11, index);
        }
        Ok(())
    }

    /// The handler's code segment (APM2 8.9.2), unchanged CPL in `Segment::dpl` of a conforming one.
    fn handler_code(&mut self, delivery: Delivery, selector: u16) -> Step<Segment> {
        let named = u32::from(selector & !3);
        if selector & !3 == 0 {
            return self.delivery_fault(delivery, 13, 0);
        }
        let Some(code) = self.read_segment(selector)? else {
            return self.delivery_fault(delivery, 13, named);
        };
        let long_mismatch = self.efer & efer::LMA != 0 && (!code.long() || code.big());
        if !code.is_code() || code.dpl() > self.cpl || long_mismatch {
            return self.delivery_fault(delivery, 13, named);
        }
        if !code.present() {
            return self.delivery_fault(delivery, 11, named);
        }
        self.mark_accessed(code)?;
        Ok(code)
    }

    fn through_long_idt(&mut self, delivery: Delivery) -> Step {
        let vector = u64::from(delivery.event.vector());
        let index = (vector as u32) << 3 | 2;
        if vector * 16 + 15 > u64::from(self.idtr.limit) {
            return self.delivery_fault(delivery, 13, index);
        }
        let at = self.idtr.base.wrapping_add(vector * 16);
        let (low, high) =
            self.as_supervisor(|core| Ok((core.load::<u64>(at)?, core.load::<u64>(at.wrapping_add(8))?)))?;
        let gate = Gate::from_descriptor(low);
        self.check_gate(delivery, gate, &[14, 15])?;
        let target = gate.offset & 0xffff_ffff | high << 32;
        let code = self.handler_code(delivery, gate.selector)?;
        let conforming = code.kind() & 4 != 0;
        let cpl = if conforming { self.cpl } else { code.dpl() };
        let ist = low >> 32 & 7;
        let stack = if ist != 0 {
            self.long_stack(0x1c + ist * 8)?
        } else if cpl < self.cpl {
            self.long_stack(4 + u64::from(cpl) * 8)?
        } else {
            self.gprs[RSP]
        };
        if !is_canonical(target, 48) {
            return self.delivery_fault(delivery, 13, 0);
        }
        let flags = self.pushed_flags(delivery);
        let selectors = (u64::from(self.segments[SS].selector), u64::from(self.segments[CS].selector));
        let words = [delivery.return_rip, selectors.1, flags, self.gprs[RSP], selectors.0];
        let frame = Frame::new(delivery.event.error(), &words, 8);
        let top = stack & !0xf;
        let bottom = top.wrapping_sub(frame.length as u64);
        let write = |core: &mut Core| core.write_linear(bottom, frame.bytes());
        let pushed = if cpl < 3 { self.as_supervisor(write) } else { write(self) };
        if let Err(stop) = pushed {
            if stop == Stop::Fault {
                self.blame_stack();
            }
            return Err(stop);
        }
        if cpl < self.cpl {
            self.segments[SS] = Segment::new(u16::from(cpl), 0, 0, 0);
        }
        self.gprs[RSP] = bottom;
        self.enter_handler(gate, code, cpl, target);
        Ok(())
    }

    /// A stack pointer out of the 64-bit TSS (APM2 12.2.5).
    fn long_stack(&mut self, offset: u64) -> Step<u64> {
        if offset + 7 > u64::from(self.tr.limit) {
            let selector = u32::from(self.tr.selector & !3);
            return self.raise_code(10, selector);
        }
        let at = self.tr.base.wrapping_add(offset);
        let stack = self.as_supervisor(|core| core.load::<u64>(at))?;
        if !is_canonical(stack, 48) {
            return self.raise_code(12, 0);
        }
        Ok(stack)
    }

    fn through_legacy_idt(&mut self, delivery: Delivery) -> Step {
        let vector = u64::from(delivery.event.vector());
        let index = (vector as u32) << 3 | 2;
        if vector * 8 + 7 > u64::from(self.idtr.limit) {
            return self.delivery_fault(delivery, 13, index);
        }
        let at = self.idtr.base.wrapping_add(vector * 8) & 0xffff_ffff;
        let low = self.as_supervisor(|core| core.load::<u64>(at))?;
        let gate = Gate::from_descriptor(low);
        // Task gates are refused like any other unknown type: this processor does not switch tasks by itself.
        self.check_gate(delivery, gate, &[6, 7, 14, 15])?;
        let wide = gate.kind & 8 != 0;
        let target = if wide { gate.offset & 0xffff_ffff } else { gate.offset & 0xffff };
        let code = self.handler_code(delivery, gate.selector)?;
        let conforming = code.kind() & 4 != 0;
        let cpl = if conforming { self.cpl } else { code.dpl() };
        if target > u64::from(code.limit) {
            return self.delivery_fault(delivery, 13, 0);
        }
        let old = (u64::from(self.segments[SS].selector), self.gprs[RSP]);
        let (stack, pointer) =
            if cpl < self.cpl { self.legacy_stack(cpl)? } else { (self.segments[SS], self.gprs[RSP]) };
        let code_selector = u64::from(self.segments[CS].selector);
        let words = [delivery.return_rip, code_selector, self.pushed_flags(delivery), old.1, old.0];
        let count = if cpl < self.cpl { 5 } else { 3 };
        let frame = Frame::new(delivery.event.error(), &words[..count], if wide { 4 } else { 2 });
        let mask = if stack.big() { 0xffff_ffff } else { 0xffff };
        let bottom = pointer.wrapping_sub(frame.length as u64) & mask;
        let linear = stack.base.wrapping_add(bottom) & 0xffff_ffff;
        let write = |core: &mut Core| core.write_linear(linear, frame.bytes());
        if cpl < 3 {
            self.as_supervisor(write)?
        } else {
            write(self)?
        }
        self.segments[SS] = stack;
        self.gprs[RSP] = self.gprs[RSP] & !mask | bottom;
        self.enter_handler(gate, code, cpl, target);
        Ok(())
    }

    /// SS:ESP of a privilege level out of the TSS (APM2 8.7.3, 12.2.2).
    fn legacy_stack(&mut self, cpl: u8) -> Step<(Segment, u64)> {
        let named = u32::from(self.tr.selector & !3);
        let (offset, width) =
            if self.tr.kind() & 8 != 0 { (4 + u32::from(cpl) * 8, 4) } else { (2 + u32::from(cpl) * 4, 2) };
        if offset + width + 1 > self.tr.limit {
            return self.raise_code(10, named);
        }
        let at = self.tr.base.wrapping_add(offset.into());
        let (pointer, selector) = self.as_supervisor(|core| {
            Ok(if width == 4 {
                (u64::from(core.load::<u32>(at)?), core.load::<u16>(at.wrapping_add(4))?)
            } else {
                (u64::from(core.load::<u16>(at)?), core.load::<u16>(at.wrapping_add(2))?)
            })
        })?;
        let named = u32::from(selector & !3);
        let found = if selector & !3 == 0 { None } else { self.read_segment(selector)? };
        let Some(stack) = found else { return self.raise_code(10, named) };
        let writable = stack.is_code_or_data() && stack.kind() & 0xa == 2;
        if !writable || stack.dpl() != cpl || selector & 3 != u16::from(cpl) {
            return self.raise_code(10, named);
        }
        if !stack.present() {
            return self.raise_code(12, named);
        }
        Ok((stack, pointer))
    }

    /// Real mode: four bytes a vector, three words pushed (APM2 8.6).
    fn through_ivt(&mut self, delivery: Delivery) -> Step {
        let vector = u64::from(delivery.event.vector());
        if vector * 4 + 3 > u64::from(self.idtr.limit) {
            return self.raise(13);
        }
        let entry = self.load::<u32>(self.idtr.base.wrapping_add(vector * 4) & 0xffff_ffff)?;
        let pushed = self.gprs[RSP].wrapping_sub(6) & 0xffff;
        let linear = self.segments[SS].base.wrapping_add(pushed) & 0xffff_ffff;
        let mut bytes = [0; 6];
        bytes[..2].copy_from_slice(&(delivery.return_rip as u16).to_le_bytes());
        bytes[2..4].copy_from_slice(&self.segments[CS].selector.to_le_bytes());
        bytes[4..].copy_from_slice(&(self.rflags() as u16).to_le_bytes());
        self.write_linear(linear, &bytes)?;
        self.gprs[RSP] = self.gprs[RSP] & !0xffff | pushed;
        self.system_flags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        let selector = (entry >> 16) as u16;
        let old = self.segments[CS];
        self.set_code_segment(Segment { selector, base: u64::from(selector) << 4, ..old }, self.cpl);
        self.rip = u64::from(entry & 0xffff);
        Ok(())
    }

    fn pushed_flags(&self, delivery: Delivery) -> u64 {
        self.rflags() & !rflags::RF | if delivery.resume { rflags::RF } else { 0 }
    }

    /// The last, infallible part: flags, CS, RIP.
    fn enter_handler(&mut self, gate: Gate, code: Segment, cpl: u8, target: u64) {
        let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if gate.kind & 1 == 0 {
            cleared |= rflags::IF;
        }
        self.system_flags &= !cleared;
        let selector = gate.selector & !3 | u16::from(cpl);
        self.set_code_segment(descriptor::accessed(Segment { selector, ..code }), cpl);
        self.rip = target;
    }
}

/// What a delivery pushes, lowest address first.
struct Frame {
    bytes: [u8; 48],
    length: usize,
}

impl Frame {
    fn new(error: Option<u32>, words: &[u64], width: usize) -> Self {
        let mut frame = Self { bytes: [0; 48], length: 0 };
        for word in error.map(u64::from).iter().chain(words) {
            frame.bytes[frame.length..frame.length + width].copy_from_slice(&word.to_le_bytes()[..width]);
            frame.length += width;
        }
        frame
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl Delivery {
    /// EXT: the event did not come from an instruction that asked for it.
    fn external(self) -> u32 {
        u32::from(!self.software)
    }

    /// Where a fault during this delivery returns to: the instruction, not the one after it.
    fn fault_rip(self, rip: u64) -> u64 {
        if self.software { rip } else { self.return_rip }
    }
}

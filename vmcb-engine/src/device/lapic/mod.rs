//! The local APIC: xAPIC page and x2APIC MSRs over one set of registers (APM2 chapter 16).
//!
//! Registers go by number: offset in the page divided by 16, which is also the MSR minus 0x800. Inter-processor
//! interrupts and end-of-interrupt messages leave as an [`Action`]; who receives them is the bus's business. Resets,
//! NMIs and start-ups for the processor are kept as requests until the engine takes them.

mod saved;
mod timer;
mod vectors;

use timer::{Mode, Timer};
use vectors::Vectors;

/// Version 0x14 with six LVT entries (0 to 5).
const VERSION: u32 = 0x0005_0014;
const BASE_DEFAULT: u64 = 0xfee0_0000;
const BASE_BSP: u64 = 1 << 8;
const BASE_X2: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_ADDRESS: u64 = 0x0000_ffff_ffff_f000;
const SVR_ENABLE: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
const ERROR_SEND_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;
const ERROR_REGISTER: u32 = 1 << 7;

/// Register numbers.
mod reg {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const APR: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const RRR: u32 = 0x0c;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT: u32 = 0x32;
    pub const LVT_LAST: u32 = 0x37;
    pub const TIMER_INITIAL: u32 = 0x38;
    pub const TIMER_CURRENT: u32 = 0x39;
    pub const TIMER_DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// Indices in the array of LVT entries.
const LVT_TIMER: usize = 0;
const LVT_ERROR: usize = 5;
/// Which bits of each LVT entry can be written.
pub const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];

/// Delivery modes (APM2 16.5).
pub mod delivery {
    /// To every target.
    pub const FIXED: u8 = 0;
    /// To the target of lowest priority.
    pub const LOWEST: u8 = 1;
    /// Non-maskable.
    pub const NMI: u8 = 4;
    /// Reset.
    pub const INIT: u8 = 5;
    /// Start-up.
    pub const STARTUP: u8 = 6;
}

/// An interrupt on its way to local APICs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message {
    /// Vector, or the page of a start-up.
    pub vector: u8,
    /// One of [`delivery`].
    pub delivery: u8,
    /// Who.
    pub target: Target,
    /// Level triggered: the IOAPIC waits for the end of interrupt.
    pub level: bool,
}

/// Who an interrupt is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// The APIC of this id, or all (0xff from xAPIC and IOAPIC, 0xffff_ffff from x2APIC).
    Physical(u32),
    /// By logical id.
    Logical(u32),
    /// The sender alone.
    Own,
    /// All, the sender too.
    All,
    /// All but the sender.
    Others,
}

/// What a register access asks the rest of the machine to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Nothing.
    None,
    /// A level-triggered interrupt of this vector has ended: tell the IOAPIC.
    EndOfInterrupt(u8),
    /// Send it.
    Send(Message),
}

/// What the processor is asked to do, apart from interrupts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// INIT.
    Init,
    /// Start at this page of the first MiB.
    Startup(u8),
    /// NMI.
    Nmi,
}

/// One local APIC.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lapic {
    id: u32,
    base: u64,
    tpr: u32,
    ldr: u32,
    dfr: u32,
    svr: u32,
    esr: u32,
    esr_pending: u32,
    icr: u64,
    lvt: [u32; 6],
    irr: Vectors,
    isr: Vectors,
    tmr: Vectors,
    timer: Timer,
    nmi_requested: bool,
    init_requested: bool,
    sipi_vector: Option<u8>,
    dormant: bool,
}

impl Lapic {
    /// The APIC of a vCPU after power-up (APM2 16.3.2). All but the first wait for INIT.
    pub fn new(vcpu: usize) -> Self {
        let first = if vcpu == 0 { BASE_BSP } else { 0 };
        Self {
            id: vcpu as u32,
            base: BASE_DEFAULT | BASE_ENABLE | first,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            timer: Timer::default(),
            nmi_requested: false,
            init_requested: false,
            sipi_vector: None,
            dormant: vcpu != 0,
        }
    }

    /// INIT resets all but the id and APIC_BASE.
    fn init(&mut self) {
        let fresh = Self::new(self.id as usize);
        let nmi_requested = self.nmi_requested;
        *self = Self { base: self.base, init_requested: true, nmi_requested, ..fresh };
    }

    fn x2(&self) -> bool {
        self.base & BASE_X2 != 0
    }

    fn enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    fn software_enabled(&self) -> bool {
        self.enabled() && self.svr & SVR_ENABLE != 0
    }

    /// Guest-physical page of the xAPIC registers, while they are there.
    #[inline]
    pub fn page(&self) -> Option<u64> {
        (self.enabled() && !self.x2()).then_some(self.base & BASE_ADDRESS)
    }

    /// APIC_BASE MSR.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// WRMSR of APIC_BASE; `None` is #GP(0): reserved bits, or a change of mode that the manual forbids (APM2 16.9).
    pub fn set_base(&mut self, value: u64) -> Option<()> {
        if value & !(BASE_ADDRESS | BASE_ENABLE | BASE_X2 | BASE_BSP) != 0 {
            return None;
        }
        let (enable, x2) = (value & BASE_ENABLE != 0, value & BASE_X2 != 0);
        if x2 && (!enable || !self.enabled()) || self.x2() && enable && !x2 {
            return None;
        }
        if !enable && self.enabled() {
            let fresh = Self::new(self.id as usize);
            let Lapic { nmi_requested, init_requested, sipi_vector, dormant, .. } = self.clone();
            *self = Self { nmi_requested, init_requested, sipi_vector, dormant, ..fresh };
        }
        self.base = value & !BASE_BSP | self.base & BASE_BSP;
        if x2 {
            self.ldr = (self.id >> 4) << 16 | 1 << (self.id & 15);
        }
        Some(())
    }

    /// CR8.
    pub fn cr8(&self) -> u8 {
        (self.tpr >> 4) as u8
    }

    /// MOV to CR8.
    pub fn set_cr8(&mut self, value: u8) {
        self.tpr = u32::from(value & 15) << 4;
    }

    fn ppr(&self) -> u32 {
        let in_service = u32::from(self.isr.highest().unwrap_or(0));
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xf0 }
    }

    /// The vector that may interrupt the processor now.
    #[inline]
    pub fn pending(&self) -> Option<u8> {
        let vector = self.irr.highest()?;
        (self.software_enabled() && u32::from(vector) >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// The processor took a vector.
    pub fn acknowledge(&mut self, vector: u8) {
        if self.irr.remove(vector) {
            self.isr.insert(vector);
        }
    }

    /// True if a vector waits to be taken or is in service.
    pub fn has(&self, vector: u8) -> bool {
        self.irr.contains(vector) || self.isr.contains(vector)
    }

    /// The next thing the processor must do; INIT before start-up before NMI.
    pub fn take_request(&mut self) -> Option<Request> {
        if std::mem::take(&mut self.init_requested) {
            return Some(Request::Init);
        }
        if let Some(vector) = self.sipi_vector.take() {
            self.dormant = false;
            return Some(Request::Startup(vector));
        }
        (!self.dormant && std::mem::take(&mut self.nmi_requested)).then_some(Request::Nmi)
    }

    /// True if [`Lapic::take_request`] would say something.
    pub fn has_request(&self) -> bool {
        self.init_requested || self.sipi_vector.is_some() || self.nmi_requested && !self.dormant
    }

    /// True if a message reaches this APIC; `sender` is the id of the sender, if it was a local APIC.
    pub fn is_target(&self, target: Target, sender: Option<u32>) -> bool {
        match target {
            Target::Own => sender == Some(self.id),
            Target::All => true,
            Target::Others => sender != Some(self.id),
            Target::Physical(id) => id == self.id || id == u32::MAX || id == 0xff,
            Target::Logical(id) if self.x2() => {
                id == u32::MAX || id >> 16 == self.ldr >> 16 && id & self.ldr & 0xffff != 0
            }
            Target::Logical(id) => {
                let own = self.ldr >> 24;
                if self.dfr >> 28 == 0xf {
                    id & own != 0
                } else {
                    id == 0xff || id >> 4 & 15 == own >> 4 && id & own & 15 != 0
                }
            }
        }
    }

    /// What lowest-priority delivery compares: lower is less busy.
    pub fn arbitration(&self) -> u32 {
        if self.software_enabled() { self.ppr() } else { u32::MAX }
    }

    /// Takes in a message that is for this APIC; false if it is not accepted.
    pub fn accept(&mut self, message: Message) -> bool {
        match message.delivery {
            delivery::FIXED | delivery::LOWEST => self.raise(message.vector, message.level),
            delivery::NMI => {
                self.nmi_requested = true;
                true
            }
            delivery::INIT => {
                self.init();
                self.dormant = true;
                true
            }
            delivery::STARTUP if self.dormant => {
                self.sipi_vector = Some(message.vector);
                true
            }
            _ => false,
        }
    }

    fn raise(&mut self, vector: u8, level: bool) -> bool {
        if !self.software_enabled() {
            return false;
        }
        if vector < 16 {
            self.error(ERROR_RECEIVE_VECTOR);
            return false;
        }
        self.irr.insert(vector);
        if level {
            self.tmr.insert(vector)
        } else {
            let _ = self.tmr.remove(vector);
        }
        true
    }

    fn error(&mut self, bit: u32) {
        let fresh = self.esr_pending & bit == 0;
        self.esr_pending |= bit;
        let entry = self.lvt[LVT_ERROR];
        // A vector that is itself illegal must not raise another error for ever.
        if fresh && entry & LVT_MASKED == 0 && entry & 0xff >= 16 {
            self.raise(entry as u8, false);
        }
    }

    /// Lets the timer fire.
    pub fn tick(&mut self, tsc: u64) {
        let entry = self.lvt[LVT_TIMER];
        if self.timer.expire(tsc, Mode::of(entry)) && entry & LVT_MASKED == 0 {
            self.raise(entry as u8, false);
        }
    }

    /// When [`Lapic::tick`] must be called next.
    #[inline]
    pub fn deadline(&self) -> Option<u64> {
        self.timer.deadline()
    }

    /// TSC_DEADLINE MSR.
    pub fn tsc_deadline(&self) -> u64 {
        if Mode::of(self.lvt[LVT_TIMER]) == Mode::Deadline { self.timer.deadline().unwrap_or(0) } else { 0 }
    }

    /// WRMSR of TSC_DEADLINE; ignored in the other modes.
    pub fn set_tsc_deadline(&mut self, tsc: u64, value: u64) {
        if Mode::of(self.lvt[LVT_TIMER]) == Mode::Deadline {
            self.timer.arm(value);
            self.tick(tsc);
        }
    }

    /// Reads the xAPIC page.
    pub fn read_page(&mut self, tsc: u64, offset: u16) -> u32 {
        let number = u32::from(offset >> 4);
        if offset & 15 != 0 {
            return 0;
        }
        match number {
            reg::ID => self.id << 24,
            reg::DFR => self.dfr,
            reg::ICR_HIGH => (self.icr >> 32) as u32,
            reg::EOI => 0,
            _ => self.read(tsc, number).unwrap_or_else(|| {
                self.error(ERROR_REGISTER);
                0
            }),
        }
    }

    /// Writes the xAPIC page.
    pub fn write_page(&mut self, tsc: u64, offset: u16, value: u32) -> Action {
        let number = u32::from(offset >> 4);
        if offset & 15 != 0 {
            return Action::None;
        }
        match number {
            reg::LDR => self.ldr = value & 0xff00_0000,
            reg::DFR => self.dfr = value | 0x0fff_ffff,
            reg::ICR_HIGH => self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
            reg::ICR => {
                let high = (self.icr >> 56) as u32;
                return self.send(value, high, self.icr & 0xffff_ffff_0000_0000);
            }
            // Only what can be read fails: writes of read-only registers are ignored.
            _ => return self.write(tsc, number, value).unwrap_or(Action::None),
        }
        Action::None
    }

    /// RDMSR of 0x800 plus the register's number; `None` is #GP(0).
    pub fn read_msr(&mut self, tsc: u64, number: u32) -> Option<u64> {
        match number {
            _ if !self.x2() => None,
            reg::ID => Some(self.id.into()),
            reg::ICR => Some(self.icr),
            reg::APR | reg::RRR => None,
            _ => self.read(tsc, number).map(u64::from),
        }
    }

    /// WRMSR of 0x800 plus the register's number; `None` is #GP(0).
    pub fn write_msr(&mut self, tsc: u64, number: u32, value: u64) -> Option<Action> {
        if !self.x2() {
            return None;
        }
        if number == reg::ICR {
            if value & 0xfff3_2000 != 0 {
                return None;
            }
            return Some(self.send(value as u32, (value >> 32) as u32, value & 0xffff_ffff_0000_0000));
        }
        let value = u32::try_from(value).ok()?;
        match number {
            reg::EOI | reg::ESR if value != 0 => None,
            reg::TPR if value > 0xff => None,
            reg::SELF_IPI if value > 0xff => None,
            reg::SELF_IPI => Some(self.send(value | 0x4_0000, 0, 0)),
            _ => self.write(tsc, number, value),
        }
    }

    /// Registers that are the same in both views; `None` if there is none to read.
    fn read(&self, tsc: u64, number: u32) -> Option<u32> {
        Some(match number {
            reg::VERSION => VERSION,
            reg::TPR => self.tpr,
            reg::APR | reg::RRR => 0,
            reg::PPR => self.ppr(),
            reg::LDR => self.ldr,
            reg::SVR => self.svr,
            reg::ISR..reg::TMR => self.isr.register((number - reg::ISR) as usize),
            reg::TMR..reg::IRR => self.tmr.register((number - reg::TMR) as usize),
            reg::IRR..reg::ESR => self.irr.register((number - reg::IRR) as usize),
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::LVT..=reg::LVT_LAST => self.lvt[(number - reg::LVT) as usize],
            reg::TIMER_INITIAL => self.timer.initial,
            reg::TIMER_CURRENT => self.timer.current(tsc),
            reg::TIMER_DIVIDE => self.timer.divide,
            _ => return None,
        })
    }

    /// Registers that are the same in both views; `None` if there is none to write.
    fn write(&mut self, tsc: u64, number: u32, value: u32) -> Option<Action> {
        match number {
            reg::TPR => self.tpr = value & 0xff,
            reg::EOI => return Some(self.end_of_interrupt()),
            reg::SVR => {
                self.svr = value & 0x1ff;
                if !self.software_enabled() {
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
            }
            reg::ESR => self.esr = std::mem::take(&mut self.esr_pending),
            reg::LVT..=reg::LVT_LAST => self.write_lvt((number - reg::LVT) as usize, value),
            reg::TIMER_INITIAL => {
                if Mode::of(self.lvt[LVT_TIMER]) != Mode::Deadline {
                    self.timer.set_initial(tsc, value);
                }
            }
            reg::TIMER_DIVIDE => self.timer.set_divide(tsc, value, Mode::of(self.lvt[LVT_TIMER])),
            _ => return None,
        }
        Some(Action::None)
    }

    fn write_lvt(&mut self, index: usize, value: u32) {
        let mut entry = value & LVT_WRITABLE[index];
        if !self.software_enabled() {
            entry |= LVT_MASKED;
        }
        if index == LVT_TIMER && (Mode::of(entry) == Mode::Deadline) != (Mode::of(self.lvt[index]) == Mode::Deadline) {
            self.timer.disarm();
        }
        self.lvt[index] = entry;
    }

    fn end_of_interrupt(&mut self) -> Action {
        let Some(vector) = self.isr.highest() else { return Action::None };
        self.isr.remove(vector);
        if self.tmr.remove(vector) { Action::EndOfInterrupt(vector) } else { Action::None }
    }

    /// A write of the low half of ICR; `destination` is already right-aligned.
    fn send(&mut self, low: u32, destination: u32, high: u64) -> Action {
        // Delivery status reads as idle: nothing is ever on its way between two instructions.
        self.icr = high | u64::from(low & 0x000c_cfff);
        let (vector, mode) = (low as u8, (low >> 8 & 7) as u8);
        let deassert = mode == delivery::INIT && low & 1 << 14 == 0 && low & 1 << 15 != 0;
        let known =
            matches!(mode, delivery::FIXED | delivery::LOWEST | delivery::NMI | delivery::INIT | delivery::STARTUP);
        if deassert || !known || !self.enabled() {
            return Action::None;
        }
        if mode <= delivery::LOWEST && vector < 16 {
            self.error(ERROR_SEND_VECTOR);
            return Action::None;
        }
        let target = match low >> 18 & 3 {
            0 if low & 1 << 11 != 0 => Target::Logical(destination),
            0 => Target::Physical(destination),
            1 => Target::Own,
            2 => Target::All,
            _ => Target::Others,
        };
        Action::Send(Message { vector, delivery: mode, target, level: false })
    }
}

#[cfg(test)]
mod tests;

//! Tests of the software processor and its host as a whole: hand-assembled programs, and what the world sees of them.
//!
//! [`Bare`] is a processor without a host, [`Guest`] a vCPU under the engine's host with a scripted platform.

mod control;
mod delivery;
mod exact;
mod host;
mod noting;
mod paging;
mod rungs;
mod several;
mod stops;
mod vm;

use std::collections::BTreeMap;
use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;

use super::core::{CS, Core, DS, ES, FS, GS, RSP, SS};
use super::run::Ended;
use super::{SoftConfig, SoftEngine, Tuning};
use crate::capability::{CpuModel, Topology};
use crate::cpu::CpuState;
use crate::engine::{Engine, Exit, LoadError, Platform, Request};
use crate::memory::GuestMemory;
use crate::vmcb::registers::{cr0, cr4, efer};
use crate::vmcb::{ExitCode, Segment};

/// Where programs lie.
pub const CODE: u64 = 0x10_0000;
/// Where interrupt handlers lie: 16 bytes each vector, see [`handlers`].
pub const HANDLERS: u64 = 0x11_0000;
/// Global descriptor table.
pub const GDT: u64 = 0x8000;
/// Interrupt descriptor table.
pub const IDT: u64 = 0x9000;
/// Task state segment.
pub const TSS: u64 = 0xa000;
/// Top of the stack of CPL 0.
pub const STACK: u64 = 0x20_0000;
/// Top of the stack that the TSS names for CPL 0.
pub const RSP0: u64 = 0x21_0000;
/// Top of interrupt stack 1.
pub const IST1: u64 = 0x22_0000;
/// Top of the user stack.
pub const USER_STACK: u64 = 0x23_0000;
/// Beyond RAM: devices.
pub const DEVICE: u64 = 0x2000_0000;

/// Selectors of [`tables`].
pub const KERNEL_CS: u16 = 0x10;
pub const KERNEL_SS: u16 = 0x18;
pub const USER_SS: u16 = 0x23;
pub const USER_CS: u16 = 0x2b;
pub const TSS_SELECTOR: u16 = 0x30;
pub const CS_32: u16 = 0x40;
pub const USER_CS_32: u16 = 0x4b;

pub fn ram() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::create(16 << 20).unwrap())
}

pub fn assemble(bits: u32, at: u64, f: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    f(&mut a);
    a.assemble(at).unwrap()
}

pub fn put(memory: &GuestMemory, at: u64, value: u64) {
    memory.write(at, &value.to_le_bytes()).unwrap();
}

pub fn get(memory: &GuestMemory, at: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.read(at, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Writes a GDT, an IDT whose handlers are [`HANDLERS`] + 16 * vector (all DPL 3, interrupt gates), and a TSS.
pub fn tables(memory: &GuestMemory) {
    let descriptors = [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x0000_8b00_0000_0067 | (TSS & 0xff_ffff) << 16,
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_fb00_0000_ffff,
    ];
    for (index, descriptor) in descriptors.into_iter().enumerate() {
        put(memory, GDT + index as u64 * 8, descriptor);
    }
    for vector in 0..256 {
        gate(memory, vector, 0xee, 0);
    }
    put(memory, TSS + 4, RSP0);
    put(memory, TSS + 0x24, IST1);
    memory.write(TSS + 0x66, &0x68_u16.to_le_bytes()).unwrap();
}

/// A 64-bit gate: attributes byte (P, DPL, type) and IST.
pub fn gate(memory: &GuestMemory, vector: u64, attributes: u64, ist: u64) {
    let target = HANDLERS + vector * 16;
    let low =
        target & 0xffff | u64::from(KERNEL_CS) << 16 | ist << 32 | attributes << 40 | (target >> 16 & 0xffff) << 48;
    put(memory, IDT + vector * 16, low);
    put(memory, IDT + vector * 16 + 8, target >> 32);
}

/// Fills the handlers of some vectors: HLT at each.
pub fn handlers(memory: &GuestMemory, vectors: impl IntoIterator<Item = u64>) {
    for vector in vectors {
        memory.write(HANDLERS + vector * 16, &[0xf4]).unwrap();
    }
}

fn table_registers() -> [Segment; 3] {
    [Segment::new(0, 0, 0x57, GDT), Segment::new(0, 0, 0xfff, IDT), Segment::new(TSS_SELECTOR, 0x8b, 0x67, TSS)]
}

/// A processor without a host, its program at [`CODE`].
pub struct Bare {
    pub core: Box<Core>,
    pub memory: Arc<GuestMemory>,
}

impl Bare {
    pub fn new(program: impl FnOnce(&mut CodeAssembler)) -> Self {
        let memory = ram();
        tables(&memory);
        let mut core = Core::bare(Arc::clone(&memory));
        memory.write(CODE, &assemble(64, CODE, program)).unwrap();
        [core.gdtr, core.idtr, core.tr] = table_registers();
        core.rip = CODE;
        core.gprs[RSP] = STACK;
        Self { core, memory }
    }

    /// The same at CPL 3.
    pub fn user(program: impl FnOnce(&mut CodeAssembler)) -> Self {
        let mut bare = Self::new(program);
        bare.core.to_user();
        bare.core.segments[CS].selector = USER_CS;
        bare.core.segments[SS].selector = USER_SS;
        bare.core.gprs[RSP] = USER_STACK;
        bare
    }

    /// Runs to an exit; fails after many instructions without one.
    pub fn run(&mut self) -> ExitCode {
        let stop_at = self.core.retired() + 100_000;
        assert_eq!(self.core.run_until(stop_at), Ended::Exit, "still running at {:#x}", self.core.rip);
        self.core.exit.code
    }

    /// Runs to HLT, and says at which address.
    pub fn halt(&mut self) -> u64 {
        assert_eq!(self.run(), ExitCode::HLT, "at {:#x}: {:?}", self.core.rip, self.core.exit);
        self.core.rip
    }

    /// Vector of the handler in which it halts.
    pub fn halted_vector(&mut self) -> u64 {
        (self.halt() - HANDLERS) / 16
    }
}

/// 64-bit mode at CPL 0 as the engine loads it, page tables and descriptor tables as [`Bare`] has them.
pub fn long_state(memory: &Arc<GuestMemory>, rip: u64) -> CpuState {
    tables(memory);
    let core = Core::bare(Arc::clone(memory));
    let mut state = CpuModel::SoftV1.power_up(&Topology { vcpu: 0, vcpus: 1, tsc_hz: 1_000_000_000 });
    state.rip = rip;
    state.gprs[RSP] = STACK;
    (state.cr0, state.cr3, state.cr4) = (core.cr0, core.cr3, core.cr4);
    state.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    (state.es, state.cs, state.ss) = (core.segments[ES], core.segments[CS], core.segments[SS]);
    (state.ds, state.fs, state.gs) = (core.segments[DS], core.segments[FS], core.segments[GS]);
    [state.gdtr, state.idtr, state.tr] = table_registers();
    assert_eq!(state.cr0 & cr0::PG, cr0::PG);
    assert_eq!(state.cr4 & cr4::PAE, cr4::PAE);
    state
}

/// A platform that does what a test says, and writes down what it was asked.
#[derive(Clone, Default)]
pub struct World {
    pub log: Vec<String>,
    /// What a device register reads as; writes change it.
    pub registers: BTreeMap<u64, u64>,
    /// (tsc, vector): interrupts that become pending at a deadline.
    pub alarms: Vec<(u64, u8)>,
    pub pending: Vec<u8>,
    pub tpr: u8,
    pub stopped: bool,
    /// What a write of `vcpu << 8 | vector` to the start register asks for: see `io_write`.
    pub requests: Vec<(usize, Request)>,
}

/// OUT of a page to this port sends INIT and start-up to the second vCPU; of 0, an NMI.
pub const START_PORT: u16 = 0x77;

impl World {
    fn next_alarm(&self) -> Option<(u64, u8)> {
        self.alarms.iter().copied().min()
    }
}

impl Platform for World {
    fn io_read(&mut self, tsc: u64, port: u16, size: u8) -> u32 {
        self.log.push(format!("{tsc}: in {port:#x} {size}"));
        self.registers.get(&port.into()).map_or(u32::MAX, |value| *value as u32)
    }
    fn io_write(&mut self, tsc: u64, port: u16, size: u8, value: u32) {
        self.log.push(format!("{tsc}: out {port:#x} {size} {value:#x}"));
        self.stopped |= port == 0xdead;
        match (port, value as u8) {
            (START_PORT, 0) => self.requests.push((1, Request::Nmi)),
            (START_PORT, page) => self.requests.extend([(1, Request::Init), (1, Request::Startup(page))]),
            _ => {}
        }
    }
    fn mmio_read(&mut self, tsc: u64, gpa: u64, size: u8) -> u64 {
        self.log.push(format!("{tsc}: load {gpa:#x} {size}"));
        self.registers.get(&gpa).copied().unwrap_or(0)
    }
    fn mmio_write(&mut self, tsc: u64, gpa: u64, size: u8, value: u64) {
        self.log.push(format!("{tsc}: store {gpa:#x} {size} {value:#x}"));
        self.registers.insert(gpa, value);
    }
    fn msr_read(&mut self, _: u64, _: usize, msr: u32) -> Option<u64> {
        self.log.push(format!("rdmsr {msr:#x}"));
        (msr == 0x1b).then_some(0xfee0_0900)
    }
    fn msr_write(&mut self, _: u64, _: usize, msr: u32, value: u64) -> Option<()> {
        self.log.push(format!("wrmsr {msr:#x} {value:#x}"));
        (msr == 0x6e0).then_some(())
    }
    fn tick(&mut self, tsc: u64) {
        let (due, later) = self.alarms.iter().copied().partition(|(at, _)| *at <= tsc);
        self.alarms = later;
        let due: Vec<(u64, u8)> = due;
        for (at, vector) in due {
            self.log.push(format!("{tsc}: alarm of {at}"));
            self.pending.push(vector);
        }
    }
    fn next_deadline(&self) -> Option<u64> {
        self.next_alarm().map(|(at, _)| at)
    }
    fn pending_interrupt(&mut self, vcpu: usize) -> Option<u8> {
        if vcpu != 0 {
            return None;
        }
        self.pending.iter().copied().filter(|vector| vector >> 4 > self.tpr).max()
    }
    fn acknowledge(&mut self, _: usize, vector: u8) {
        self.log.push(format!("acknowledge {vector:#x}"));
        let at = self.pending.iter().position(|other| *other == vector).expect("it was pending");
        self.pending.remove(at);
    }
    fn cr8(&self, _: usize) -> u8 {
        self.tpr
    }
    fn set_cr8(&mut self, _: usize, value: u8) {
        self.tpr = value;
    }
    fn take_request(&mut self, vcpu: usize) -> Option<Request> {
        let at = self.requests.iter().position(|(to, _)| *to == vcpu)?;
        Some(self.requests.remove(at).1)
    }
    fn stopped(&self) -> bool {
        self.stopped
    }
}

/// A vCPU under the engine's host.
pub struct Guest {
    pub engine: SoftEngine,
    pub world: World,
    pub memory: Arc<GuestMemory>,
}

impl Guest {
    pub fn new(program: impl FnOnce(&mut CodeAssembler)) -> Self {
        Self::with_vcpus(1, program)
    }

    /// The first of several vCPUs runs the program; the others wait for INIT.
    pub fn with_vcpus(vcpus: u32, program: impl FnOnce(&mut CodeAssembler)) -> Self {
        let memory = ram();
        let (tsc_hz, tuning) = (1_000_000_000, Tuning::default());
        let config = SoftConfig { vcpus, model: CpuModel::SoftV1, tsc_hz, tsc_per_instruction: 1, tuning };
        let mut engine = SoftEngine::new(Arc::clone(&memory), &config);
        let state = long_state(&memory, CODE);
        memory.write(CODE, &assemble(64, CODE, program)).unwrap();
        engine.load(0, &state).unwrap();
        Self { engine, world: World::default(), memory }
    }

    pub fn run(&mut self, until: u64) -> Exit {
        self.engine.run(&mut self.world, until)
    }

    pub fn state(&mut self) -> CpuState {
        self.engine.store(0).unwrap()
    }
}

//! A small guest with everything that a replay must get right: a periodic timer whose interrupt wakes it from HLT, a console
//! that it polls and echoes, stores that wander over many pages, TSC reads, and code that changes itself. And its recording,
//! made through the door, with random slices and random events. What is recorded and how it is replayed fits any guest.
#![allow(dead_code, reason = "each test uses what it needs")]

#[path = "../pvh/mod.rs"]
pub mod pvh;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use iced_x86::code_asm::{CodeAssembler, al, byte_ptr, dword_ptr, dx, eax, ebx, ecx, edi, esi, esp};
use proto::v1::{BootSource, DiskConfig, MachineConfig, NetConfig, Section};
use rustix::fs::{Mode, OFlags};
use vmcb_engine::device::block::DiskImage;
use vmcb_engine::device::net::{Link, NetLink};
use vmcb_engine::engine::soft::Tuning;
use vmcb_engine::engine::{Stops, WatchKind, Watchpoint};
use vmcb_engine::journal::{Chain, Position, RecordingId};
use vmcb_engine::machine::{Machine, Outcome, Parts, Probe};
use vmcb_engine::memory::{GuestMemory, sized_memfd};
use vmcb_engine::replay::{BootImages, Door, Player, Rate, SECTION, Tape, WhenFull};

pub const CODE: u32 = 0x10_0000;
/// Counts interrupts.
pub const TICKS: u32 = 0x20_0000;
/// Counts turns of the loop.
pub const TURNS: u32 = 0x20_0004;
/// What was typed, one byte a word.
pub const TYPED: u32 = 0x21_0000;
/// The TSC at each turn.
pub const STAMPS: u32 = 0x22_0000;
/// Pages that it writes all over.
pub const WANDERED: u32 = 0x30_0000;
/// A function whose operand the guest writes.
pub const PATCHED: u32 = CODE + 0xf00;
const TABLES: u32 = CODE + 0x1000;
const RAM_BYTES: u64 = 16 << 20;
const DISK_BYTES: u64 = 1 << 20;

/// Xorshift; the seed is printed by who makes it.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

/// The guest's code, entered as PVH says: 32 bits, flat, no paging.
fn code() -> Vec<u8> {
    let mut a = CodeAssembler::new(32).unwrap();
    let (mut again, mut quiet, mut handler, mut wander) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.mov(esp, 0x18_0000).unwrap();
    // LGDT and LIDT of the pseudo-descriptors behind the tables.
    a.db(&[0x0f, 0x01, 0x15]).unwrap();
    a.dd(&[TABLES + 0x800]).unwrap();
    a.db(&[0x0f, 0x01, 0x1d]).unwrap();
    a.dd(&[TABLES + 0x808]).unwrap();
    // LAPIC on, divide by one, periodic vector 0x40, every 40,000 ticks.
    for (register, value) in [(0xf0, 0x1ff), (0x3e0, 0xb), (0x320, 0x2_0040), (0x380, 40_000)] {
        a.mov(dword_ptr(0xfee0_0000u32 + register), value).unwrap();
    }
    a.mov(esi, 0x1234_5677).unwrap();
    a.set_label(&mut again).unwrap();
    a.inc(dword_ptr(TURNS)).unwrap();
    a.rdtsc().unwrap();
    a.mov(ecx, dword_ptr(TURNS)).unwrap();
    a.and(ecx, 0xfff).unwrap();
    a.mov(dword_ptr(ecx * 8 + STAMPS), eax).unwrap();
    // Console: echo one byte, note it.
    a.mov(dx, 0x3fd).unwrap();
    a.in_(al, dx).unwrap();
    a.test(al, 1).unwrap();
    a.je(quiet).unwrap();
    a.mov(dx, 0x3f8).unwrap();
    a.in_(al, dx).unwrap();
    a.out(dx, al).unwrap();
    a.mov(byte_ptr(ecx * 4 + TYPED), al).unwrap();
    a.set_label(&mut quiet).unwrap();
    // Three hundred stores to random words of a mebibyte.
    a.mov(edi, 300).unwrap();
    a.set_label(&mut wander).unwrap();
    a.imul_3(esi, esi, 1_103_515_245).unwrap();
    a.add(esi, 12_345).unwrap();
    a.mov(ebx, esi).unwrap();
    a.shr(ebx, 12).unwrap();
    a.and(ebx, 0xf_fffc).unwrap();
    a.add(dword_ptr(ebx + WANDERED), esi).unwrap();
    a.dec(edi).unwrap();
    a.jne(wander).unwrap();
    // The operand of an instruction changes with each turn.
    a.mov(eax, dword_ptr(TURNS)).unwrap();
    a.mov(dword_ptr(PATCHED + 1), eax).unwrap();
    a.call(u64::from(PATCHED)).unwrap();
    a.sti().unwrap();
    // Every fourth turn it rests.
    a.test(eax, 3).unwrap();
    a.jne(again).unwrap();
    a.hlt().unwrap();
    a.jmp(again).unwrap();
    a.set_label(&mut handler).unwrap();
    a.push(eax).unwrap();
    a.inc(dword_ptr(TICKS)).unwrap();
    a.mov(dword_ptr(0xfee0_00b0u32), 0).unwrap();
    a.pop(eax).unwrap();
    a.iretd().unwrap();
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let assembled = a.assemble_options(CODE.into(), options).unwrap();
    let handler_at = assembled.label_ip(&handler).unwrap() as u32;
    let mut code = assembled.inner.code_buffer;
    assert!(code.len() < (PATCHED - CODE) as usize);
    code.resize((PATCHED - CODE) as usize, 0x90);
    // MOV EDX, 77777777h; MOV [20_0010h], EDX; RET.
    code.extend([0xba, 0x77, 0x77, 0x77, 0x77, 0x89, 0x15, 0x10, 0x00, 0x20, 0x00, 0xc3]);
    code.resize((TABLES - CODE) as usize, 0x90);
    code.extend(tables(handler_at));
    code
}

/// GDT, IDT and their pseudo-descriptors.
fn tables(handler: u32) -> Vec<u8> {
    let mut tables = vec![0; 0x810];
    let mut put = |at: usize, word: u64| tables[at..at + 8].copy_from_slice(&word.to_le_bytes());
    // Selectors 8 and 16: code and data, which PVH's flat segments are equal to; the IDT lies at 0x100.
    put(8, 0x00cf_9b00_0000_ffff);
    put(16, 0x00cf_9300_0000_ffff);
    let gate = u64::from(handler & 0xffff) | 8 << 16 | 0x8e00 << 32 | u64::from(handler >> 16) << 48;
    put(0x100 + 0x40 * 8, gate);
    put(0x800, 0x17 | u64::from(TABLES) << 16);
    put(0x808, 0x7ff | u64::from(TABLES + 0x100) << 16);
    tables
}

pub fn kernel() -> Vec<u8> {
    pvh::elf(CODE, &code())
}

pub fn config() -> MachineConfig {
    MachineConfig {
        vcpus: 1,
        memory_bytes: RAM_BYTES,
        cpu_model: "soft-v1".into(),
        engine: "soft".into(),
        boot: Some(BootSource::default()),
        disks: vec![DiskConfig { size_bytes: DISK_BYTES, ..DiskConfig::default() }],
        nets: vec![NetConfig { tap: String::new(), mac: vec![2, 0, 0, 0, 0, 9] }],
        seed: vec![7; 32],
        epoch_ns: 1_700_000_000_000_000_000,
        tsc_hz: 1_000_000_000,
        tsc_per_instruction: 1,
        paced: false,
        generation_id: vec![3; 16],
    }
}

/// Who is recorded.
#[derive(Clone)]
pub struct Guest {
    pub config: MachineConfig,
    pub kernel: Vec<u8>,
    pub initrd: Option<Vec<u8>>,
}

/// The small guest of this file.
pub fn small() -> Guest {
    Guest { config: config(), kernel: kernel(), initrd: None }
}

/// Path of a disk that cannot be written by the host on which it is recorded.
pub const UNWRITABLE: &str = "unwritable";

fn image(disk: &DiskConfig, recorded: bool) -> DiskImage {
    let mut fd = sized_memfd("test-disk", disk.size_bytes).unwrap();
    if recorded && disk.path == UNWRITABLE {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        fd = rustix::fs::open(path, OFlags::RDONLY, Mode::empty()).unwrap();
    }
    DiskImage::from_fd(fd, disk.read_only).unwrap()
}

struct Unplugged;

impl Link for Unplugged {
    fn send(&mut self, _: &[u8]) {}
}

impl Guest {
    /// A machine without state; `plugged` as when it is recorded.
    pub fn machine(&self, plugged: bool, tuning: Tuning) -> Machine {
        let net = |_| -> Option<NetLink> { if plugged { Some(Box::new(Unplugged)) } else { None } };
        let parts = Parts {
            memory: GuestMemory::create(self.config.memory_bytes).unwrap(),
            disks: self.config.disks.iter().map(|disk| image(disk, plugged)).collect(),
            nets: self.config.nets.iter().map(net).collect(),
        };
        Machine::build_tuned(&self.config, parts, tuning).unwrap()
    }

    /// A machine in a state.
    pub fn at(&self, base: &Base, plugged: bool, tuning: Tuning) -> Machine {
        let mut machine = self.machine(plugged, tuning);
        put(&machine, base);
        machine.apply(&base.sections).unwrap();
        machine
    }
}

/// RAM and disks of a machine without state.
fn put(machine: &Machine, base: &Base) {
    for (page, bytes) in (0..).zip(base.ram.chunks(4096)).filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)) {
        machine.memory().write(machine.memory().gpa_of(page), bytes).unwrap();
    }
    for (disk, bytes) in machine.disks().zip(&base.disks) {
        rustix::io::pwrite(disk.file_fd(), bytes, 0).unwrap();
    }
}

/// A state to begin with.
#[derive(Clone)]
pub struct Base {
    pub position: Position,
    pub sections: Vec<Section>,
    pub ram: Vec<u8>,
    pub disks: Vec<Vec<u8>>,
}

/// All that a look can see, without being seen.
#[derive(Clone, PartialEq, Debug)]
pub struct Sight {
    pub probe: Probe,
    /// Of RAM and disks.
    pub bytes: [u8; 32],
}

pub fn sight(machine: &Machine) -> Sight {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = vec![0; 1 << 20];
    for gpa in (0..machine.memory().bytes()).step_by(bytes.len()) {
        machine.memory().read(gpa, &mut bytes).unwrap();
        hasher.update(&bytes);
    }
    for disk in machine.disks() {
        for at in (0..disk.bytes()).step_by(bytes.len()) {
            disk.read_at(at, &mut bytes).unwrap();
            hasher.update(&bytes);
        }
    }
    Sight { probe: machine.probe(), bytes: *hasher.finalize().as_bytes() }
}

/// Where the handler of the timer's interrupt begins.
pub fn handler(machine: &Machine) -> u64 {
    let mut gate = [0; 8];
    machine.memory().read(u64::from(TABLES) + 0x100 + 0x40 * 8, &mut gate).unwrap();
    let gate = u64::from_le_bytes(gate);
    gate & 0xffff | gate >> 32 & 0xffff_0000
}

/// Everything that a door has closed.
fn frames(door: &mut Door) -> Vec<Vec<u8>> {
    let mut frames: Vec<Vec<u8>> = Vec::new();
    loop {
        let more = door.take(frames.len() as u64);
        if more.is_empty() {
            return frames;
        }
        frames.extend(more);
    }
}

/// A recording of a guest under a debugger that stops it everywhere, also behind the delivery of interrupts, and writes
/// memory and registers there.
pub fn record_debugged(seed: u64, instructions: u64) -> Recorded {
    println!("seed {seed}");
    let mut random = Random(seed);
    let mut door = Door::new(small().machine(true, Tuning::default()));
    door.boot(&kernel(), None).unwrap();
    assert_eq!(door.run(1000), Outcome::Reached);
    let handler = handler(door.machine());
    let sections = door.capture().unwrap();
    let mut bases = vec![base(door.machine(), sections)];
    door.record(RecordingId([5; 16]), 1 << 30, WhenFull::End).unwrap();
    door.machine_mut().take_console_output();
    let watch = |address: u32, kind| Watchpoint { address: address.into(), bytes: 4, kind };
    let stops = Stops {
        breakpoints: vec![handler, PATCHED.into()],
        // The last one is where the delivery of an interrupt writes.
        watchpoints: vec![watch(TURNS, WatchKind::Write), watch(0x17_fff4, WatchKind::Write)],
    };
    let (mut console, mut behind) = (Vec::new(), 0);
    while door.position().retired < instructions {
        let stops = if random.below(3) > 0 { stops.clone() } else { Stops::default() };
        door.machine_mut().set_stops(&stops);
        let step = if random.below(4) == 0 { 1 } else { 1 + random.below(30_000) };
        match door.run((door.position().retired + step).min(instructions)) {
            Outcome::Idle { until_tsc } => door.skip_idle_until(until_tsc.unwrap()),
            Outcome::Stop { .. } => behind += u32::from(door.machine().stands_at(0) == Some(handler)),
            _ => {}
        }
        console.extend(door.machine_mut().take_console_output());
        let mut state = door.machine().peek_cpu(0).unwrap();
        match random.below(12) {
            0 => door.write_memory((WANDERED + random.below(0x1000) as u32).into(), &[9; 5000]).unwrap(),
            // Where the interrupt's frame lies, if one is being handled.
            1 => door.write_memory(0x17_ff00, &random.next().to_le_bytes()).unwrap(),
            2 => {
                state.gprs[6] = random.next() & 0xffff_ffff;
                state.fpu.set_xmm(3, random.next().into());
                door.write_cpu(0, &state).unwrap();
            }
            3 => drop(door.console_input(b"x")),
            4 => drop(door.net_hold(0, &[8; 60])),
            5 => drop(door.net_input(0, &[7; 60])),
            6 if random.below(3) == 0 => {
                let sections = door.capture().unwrap();
                bases.push(base(door.machine(), sections));
            }
            _ => {}
        }
    }
    let sights = vec![(door.position(), sight(door.machine()))];
    door.stop_recording("enough");
    assert!(behind > 10, "{behind} stops behind a delivery");
    Recorded { guest: small(), bases, frames: frames(&mut door), sights, console }
}

/// What a machine is that was captured like this.
pub fn base(machine: &Machine, sections: Vec<Section>) -> Base {
    let memory = machine.memory();
    // Pages of zeros take no memory here either.
    let mut ram = vec![0; memory.bytes() as usize];
    let mut page = [0; 4096];
    for (number, place) in (0..).zip(ram.chunks_mut(4096)) {
        memory.read(memory.gpa_of(number), &mut page).unwrap();
        if page != [0; 4096] {
            place.copy_from_slice(&page);
        }
    }
    let disk = |disk: &DiskImage| {
        let mut bytes = vec![0; disk.bytes() as usize];
        disk.read_at(0, &mut bytes).unwrap();
        bytes
    };
    let disks = machine.disks().map(disk).collect();
    let position = Position { retired: machine.retired(), skipped_tsc: machine.skipped_tsc() };
    Base { position, sections, ram, disks }
}

/// A recording.
pub struct Recorded {
    pub guest: Guest,
    /// Where it can begin: at the first block and at each cut.
    pub bases: Vec<Base>,
    pub frames: Vec<Vec<u8>>,
    /// What the machine was like when it was recorded.
    pub sights: Vec<(Position, Sight)>,
    pub console: Vec<u8>,
}

/// How a guest is recorded.
#[derive(Clone, Copy)]
pub struct Plan {
    pub seed: u64,
    /// It begins when the guest has said this, and no earlier than after so many instructions.
    pub after: &'static str,
    pub before: u64,
    /// Instructions that are recorded.
    pub instructions: u64,
    /// Longest run between two events.
    pub slice: u64,
    /// The guest is started again now and then.
    pub resets: bool,
    /// The guest goes to another machine half way.
    pub moves: bool,
    /// Instructions between two probes.
    pub probe_every: u64,
    /// What is typed; anything, if this is empty.
    pub typed: &'static [u8],
    /// Machines that are recorded.
    pub tuning: Tuning,
}

impl Plan {
    pub fn new(seed: u64, instructions: u64) -> Self {
        let (after, slice, probe_every) = ("", 30_000, vmcb_engine::replay::PROBE_EVERY);
        let (resets, moves, typed, tuning) = (false, false, &[][..], Tuning::default());
        Self { seed, after, before: 1000, instructions, slice, resets, moves, probe_every, typed, tuning }
    }
}

/// Records `instructions` of the small guest with random slices and events.
pub fn record(seed: u64, instructions: u64, resets: bool) -> Recorded {
    record_guest(small(), Plan { resets, ..Plan::new(seed, instructions) })
}

/// A recording that is being made.
struct Recording {
    plan: Plan,
    /// Instructions at its end.
    until: u64,
    random: Random,
    door: Door,
    recorded: Recorded,
    realtime_ns: u64,
}

/// Records a guest with random slices and events.
pub fn record_guest(guest: Guest, plan: Plan) -> Recorded {
    println!("seed {}", plan.seed);
    let mut door = Door::new(guest.machine(true, plan.tuning));
    door.set_probe_every(plan.probe_every);
    door.boot(&guest.kernel, guest.initrd.as_deref()).unwrap();
    let mut said = Vec::new();
    while door.position().retired < plan.before || !String::from_utf8_lossy(&said).contains(plan.after) {
        let piece = if plan.after.is_empty() { plan.before } else { 10_000_000 };
        if let Outcome::Idle { until_tsc } = door.run(door.position().retired + piece) {
            door.skip_idle_until(until_tsc.expect("a deadline"));
        }
        said.extend(door.machine_mut().take_console_output());
    }
    let sections = door.capture().unwrap();
    let bases = vec![base(door.machine(), sections)];
    door.record(RecordingId([5; 16]), 1 << 30, WhenFull::End).unwrap();
    let until = door.position().retired + plan.instructions;
    let recorded = Recorded { guest, bases, frames: Vec::new(), sights: Vec::new(), console: Vec::new() };
    let realtime_ns = 1_700_000_000_000_000_000;
    Recording { plan, until, random: Random(plan.seed), door, recorded, realtime_ns }.make()
}

impl Recording {
    fn make(mut self) -> Recorded {
        let mut moved = !self.plan.moves;
        while self.door.position().retired < self.until {
            self.go();
            self.happen();
            if !moved && self.until - self.door.position().retired < self.plan.instructions / 2 {
                self.move_away();
                moved = true;
            }
        }
        self.look();
        // Its digest is in the last block.
        self.door.capture().unwrap();
        self.door.stop_recording("enough");
        let frames = &mut self.recorded.frames;
        loop {
            let more = self.door.take(frames.len() as u64);
            if more.is_empty() {
                return self.recorded;
            }
            frames.extend(more);
        }
    }

    fn go(&mut self) {
        let Self { plan, until, random, door, recorded, .. } = self;
        let most = if random.below(3) == 0 { plan.slice / 600 } else { plan.slice };
        let slice = 1 + random.below(most);
        match door.run((door.position().retired + slice).min(*until)) {
            Outcome::Reached => {}
            Outcome::Idle { until_tsc } => {
                // Sometimes it is woken before its time.
                let deadline = until_tsc.expect("the guest waits for its timer");
                let (now, ticks) = (door.machine().tsc(), deadline - door.machine().tsc());
                let early = random.below(4) == 0;
                door.skip_idle_until(if early { now + random.below(ticks) } else { deadline });
            }
            other => panic!("{other:?} at {}", door.position()),
        }
        recorded.console.extend(door.machine_mut().take_console_output());
        self.realtime_ns += random.below(100_000);
        door.set_realtime(self.realtime_ns);
    }

    fn happen(&mut self) {
        let Self { plan, until, random, door, recorded, .. } = self;
        let done = 4 - (4 * (*until - door.position().retired)).div_ceil(plan.instructions);
        match random.below(24) {
            0..6 if !plan.typed.is_empty() => drop(door.console_input(plan.typed)),
            0..6 => drop(door.console_input(&random.next().to_le_bytes()[..1 + random.below(7) as usize])),
            6 | 7 => drop(door.net_input(0, &packet(random))),
            8 => door.set_link(0, random.below(2) == 0),
            9 => drop(door.net_hold(0, &packet(random))),
            10 => door.close_block(),
            // Now and then, and three times for sure.
            at if at == 11 && random.below(40) == 0 || recorded.bases.len() as u64 <= done => {
                let sections = door.capture().unwrap();
                recorded.bases.push(base(door.machine(), sections));
            }
            12 if plan.resets && random.below(12) == 0 => {
                let Guest { kernel, initrd, .. } = &recorded.guest;
                door.reset(kernel, initrd.as_deref()).unwrap();
            }
            13 | 14 if random.below(1 + recorded.sights.len() as u64 / 8) == 0 => self.look(),
            _ => {}
        }
    }

    fn look(&mut self) {
        self.recorded.sights.push((self.door.position(), sight(self.door.machine())));
    }

    /// The machine goes to another host, its recording with it.
    fn move_away(&mut self) {
        let packed = self.door.pack().unwrap();
        let sections = packed.iter().filter(|section| section.name != SECTION).cloned().collect();
        let here = base(self.door.machine(), sections);
        let target = self.recorded.guest.machine(true, self.plan.tuning);
        put(&target, &here);
        let mut door = Door::new(target);
        door.set_probe_every(self.plan.probe_every);
        door.apply(&packed).unwrap();
        self.recorded.bases.push(here);
        self.door = door;
    }
}

/// An Ethernet frame of any content.
fn packet(random: &mut Random) -> Vec<u8> {
    let bytes = 60 + random.below(100) as usize;
    std::iter::repeat_with(|| random.next() as u8).take(bytes).collect()
}

impl Recorded {
    /// The tape from a base on.
    pub fn tape(&self, from: Position) -> Arc<Tape> {
        let mut tape = Tape::new(Rate::of(&self.guest.config));
        let mut whole = Chain::new();
        let blocks: Vec<_> = self.frames.iter().map(|frame| whole.take(frame).unwrap()).collect();
        // The last of those that begin here.
        let first = blocks.iter().rposition(|block| block.cut.is_some() && block.start == from).unwrap();
        let mut chain = Chain::new();
        self.frames[first..].iter().for_each(|frame| tape.push(chain.take(frame).unwrap()).unwrap());
        Arc::new(tape)
    }

    /// A player that stands at a base.
    pub fn player(&self, base: &Base) -> Player {
        self.player_tuned(base, Tuning::default())
    }

    /// [`Recorded::player`] with another engine.
    pub fn player_tuned(&self, base: &Base, tuning: Tuning) -> Player {
        let Guest { kernel, initrd, .. } = self.guest.clone();
        let images = BootImages { kernel, initrd };
        Player::new(self.guest.at(base, false, tuning), self.tape(base.position), Some(images)).unwrap()
    }
}

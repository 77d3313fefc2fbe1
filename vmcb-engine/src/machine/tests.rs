//! Tests of the machine on a scripted engine: a processor with a handful of instructions, but with the clock,
//! interrupts, halts and stop points of a real one.

use proptest::prelude::*;
use proto::v1::{BootSource, DiskConfig, NetConfig, Section};

use super::*;
use crate::boot::layout::GENERATION_ID;
use crate::cpu::{CpuState, RunState};
use crate::device::bus::{IOAPIC_BASE, LAPIC_BASE, RESET_PORT, SLEEP_CONTROL_PORT, VIRTIO_BASE};
use crate::engine::{Clock, EngineRung, Platform, StoreError};
use crate::memory::sized_memfd;
use crate::vmcb::Vmcb;

const TSC_PER_INSTRUCTION: u32 = 3;

/// An instruction of the scripted processor; RIP is an index.
#[derive(Clone, Copy, Debug)]
enum Op {
    Nop,
    Out(u16, u8),
    In(u16),
    Store(u64, u32),
    Load(u64),
    Ram(u64, u8),
    Cr8(u8),
    Halt,
    Jump(u64),
}

/// Runs a script. RAX gathers what was read; RBX counts interrupts and gathers their vectors.
struct Scripted {
    memory: Arc<GuestMemory>,
    script: Vec<Op>,
    state: CpuState,
    clock: Clock,
    rearmed: u32,
    stops: Stops,
}

impl Scripted {
    fn step(&mut self, platform: &mut dyn Platform) {
        let tsc = self.clock.tsc();
        let op = self.script.get(self.state.rip as usize).copied().unwrap_or(Op::Halt);
        self.state.rip += 1;
        let gather = |word: &mut u64, value: u64| *word = word.wrapping_mul(31).wrapping_add(value);
        match op {
            Op::Nop => {}
            Op::Out(port, value) => platform.io_write(tsc, port, 1, value.into()),
            Op::In(port) => gather(&mut self.state.gprs[0], platform.io_read(tsc, port, 1).into()),
            Op::Store(gpa, value) => platform.mmio_write(tsc, gpa, 4, value.into()),
            Op::Load(gpa) => gather(&mut self.state.gprs[0], platform.mmio_read(tsc, gpa, 4)),
            Op::Ram(gpa, value) => self.memory.write(gpa, &[value]).unwrap(),
            Op::Cr8(value) => platform.set_cr8(0, value),
            Op::Halt => self.state.run_state = RunState::Halted,
            Op::Jump(to) => self.state.rip = to,
        }
        self.clock.retired += 1;
    }
}

impl Engine for Scripted {
    fn run(&mut self, platform: &mut dyn Platform, until_retired: u64) -> Exit {
        loop {
            if platform.stopped() {
                return Exit::Stopped;
            }
            if platform.next_deadline().is_some_and(|deadline| deadline <= self.clock.tsc()) {
                platform.tick(self.clock.tsc());
            }
            if let Some(vector) = platform.pending_interrupt(0) {
                platform.acknowledge(0, vector);
                platform.mmio_write(self.clock.tsc(), LAPIC_BASE + 0xb0, 4, 0);
                self.state.run_state = RunState::Runnable;
                self.state.gprs[3] = self.state.gprs[3].wrapping_mul(257).wrapping_add(vector.into());
            }
            if self.clock.retired >= until_retired {
                return Exit::Reached;
            }
            if self.state.run_state == RunState::Halted {
                return Exit::Halted;
            }
            self.step(platform);
        }
    }

    fn clock(&self) -> Clock {
        self.clock
    }

    fn set_clock(&mut self, clock: Clock) {
        self.clock = clock;
    }

    fn store(&mut self, _vcpu: usize) -> Result<CpuState, StoreError> {
        Ok(self.state.clone())
    }

    fn peek(&self, _vcpu: usize) -> Result<CpuState, StoreError> {
        Ok(self.state.clone())
    }

    fn load(&mut self, _vcpu: usize, state: &CpuState) -> Result<(), LoadError> {
        self.state = state.clone();
        Ok(())
    }

    fn rearm_stamps(&mut self) {
        self.rearmed += 1;
    }

    fn rung(&self) -> EngineRung {
        EngineRung::new((self.state.clone(), self.clock), 0)
    }

    fn climb(&mut self, rung: &EngineRung) -> Result<(), LoadError> {
        let (state, clock) = rung.get::<(CpuState, Clock)>().ok_or(LoadError::NoVcpu(0))?;
        (self.state, self.clock) = (state.clone(), *clock);
        Ok(())
    }

    fn set_stops(&mut self, stops: &Stops) {
        self.stops = stops.clone();
    }

    fn pass_breakpoints(&mut self) {
        self.stops = Stops::default();
    }

    fn vmcb(&self, _vcpu: usize) -> Result<Vmcb, StoreError> {
        let mut vmcb = Vmcb::default();
        self.state.to_vmcb(&mut vmcb);
        Ok(vmcb)
    }
}

fn config() -> MachineConfig {
    MachineConfig {
        vcpus: 1,
        memory_bytes: 32 << 20,
        cpu_model: "soft-v1".into(),
        engine: "soft".into(),
        boot: Some(BootSource { cmdline: "console=ttyS0".into(), ..BootSource::default() }),
        disks: vec![DiskConfig { size_bytes: 1 << 20, ..DiskConfig::default() }],
        nets: vec![NetConfig { tap: String::new(), mac: vec![2, 0, 0, 0, 0, 9] }],
        seed: vec![7; 32],
        epoch_ns: 1_700_000_000_000_000_000,
        tsc_hz: 1_000_000_000,
        tsc_per_instruction: TSC_PER_INSTRUCTION,
        paced: false,
        generation_id: vec![3; 16],
    }
}

fn parts() -> Parts {
    let disk = DiskImage::from_fd(sized_memfd("test-disk", 1 << 20).unwrap(), false).unwrap();
    Parts { memory: GuestMemory::create(32 << 20).unwrap(), disks: vec![disk], nets: vec![None] }
}

fn scripted(config: &MachineConfig, script: &[Op]) -> Machine {
    let script = script.to_vec();
    let clock = Clock { tsc_per_instruction: config.tsc_per_instruction, ..Clock::default() };
    let state = CpuState::reset();
    let engine = move |memory| {
        let (script, state) = (script.clone(), state.clone());
        let engine = Scripted { memory, script, state, clock, rearmed: 0, stops: Stops::default() };
        Ok(Box::new(engine) as Box<dyn Engine>)
    };
    Machine::assemble(config, parts(), engine).unwrap()
}

/// A machine at the start of a script.
fn machine(script: &[Op]) -> Machine {
    let mut machine = scripted(&config(), script);
    let state = CpuState { rip: 0, ..CpuState::reset() };
    machine.engine.load(0, &state).unwrap();
    machine.memory.write(GENERATION_ID, &config().generation_id).unwrap();
    machine.life = Life::Ready;
    machine
}

/// APIC on, vector 0x40 every 100 ticks, for ever.
fn ticking() -> Vec<Op> {
    vec![
        Op::Store(LAPIC_BASE + 0xf0, 0x1ff),
        Op::Store(LAPIC_BASE + 0x3e0, 0xb),
        Op::Store(LAPIC_BASE + 0x320, 0x2_0040),
        Op::Store(LAPIC_BASE + 0x380, 100),
        Op::Nop,
        Op::Load(LAPIC_BASE + 0x390),
        Op::Ram(0x5000, 1),
        Op::Out(0x70, 0),
        Op::In(0x71),
        Op::Out(0x3f8, b'.'),
        Op::Jump(4),
    ]
}

#[test]
fn a_machine_without_state_neither_runs_nor_captures() {
    let mut machine = scripted(&config(), &[]);
    assert!(matches!(machine.run(5), Outcome::Failed(_)));
    assert!(matches!(machine.capture(), Err(MachineError::Empty)));
}

#[test]
fn the_guest_stops_the_machine() {
    assert_eq!(machine(&[Op::Out(SLEEP_CONTROL_PORT, 0x34)]).run(100), Outcome::PowerOff);
    assert_eq!(machine(&[Op::Out(RESET_PORT, 1)]).run(100), Outcome::Reset);
    let mut off = machine(&[Op::Nop, Op::Out(SLEEP_CONTROL_PORT, 0x34)]);
    assert_eq!((off.run(1), off.retired()), (Outcome::Reached, 1));
    assert_eq!((off.run(100), off.retired()), (Outcome::PowerOff, 2));
    assert_eq!(off.run(200), Outcome::PowerOff);
}

#[test]
fn an_idle_guest_says_when_it_wakes() {
    let mut script = ticking();
    script.truncate(4);
    script.extend([Op::Halt, Op::Nop, Op::Halt]);
    let mut machine = machine(&script);
    // The timer was started by the fourth instruction, at 3 instructions of 3 ticks.
    assert_eq!(machine.run(100), Outcome::Idle { until_tsc: Some(109) });
    assert_eq!((machine.retired(), machine.tsc()), (5, 15));
    machine.skip_idle_until(10);
    assert_eq!(machine.tsc(), 15, "time never goes back");
    machine.skip_idle_until(50);
    assert_eq!(machine.run(100), Outcome::Idle { until_tsc: Some(109) });
    machine.skip_idle_until(109);
    assert_eq!(machine.run(100), Outcome::Idle { until_tsc: Some(209) });
    assert_eq!(machine.retired(), 7);
}

#[test]
fn a_guest_that_waits_for_input_is_idle_for_ever_until_it_comes() {
    let mut machine = machine(&[
        Op::Store(LAPIC_BASE + 0xf0, 0x1ff),
        Op::Store(0xfec0_0000, 0x18),
        Op::Store(0xfec0_0010, 0x24),
        Op::Out(0x3fc, 8),
        Op::Out(0x3f9, 1),
        Op::Halt,
        Op::In(0x3f8),
        Op::Halt,
    ]);
    assert_eq!(machine.run(100), Outcome::Idle { until_tsc: None });
    assert_eq!(machine.console_input(b"G"), 1);
    assert_eq!(machine.run(100), Outcome::Idle { until_tsc: None });
    assert_eq!(machine.engine.store(0).unwrap().gprs[0], u64::from(b'G'));
}

fn run_all(machine: &mut Machine, until: u64, slices: &[u64]) {
    let mut slices = slices.iter().cycle();
    while machine.retired() < until {
        let stop = (machine.retired() + slices.next().unwrap()).min(until);
        assert_eq!(machine.run(stop), Outcome::Reached);
    }
}

proptest! {
    #[test]
    fn what_is_captured_does_not_depend_on_slices(slices in proptest::collection::vec(1u64..90, 1..6), until in 1u64..700) {
        let mut whole = machine(&ticking());
        run_all(&mut whole, until, &[until]);
        let mut cut = machine(&ticking());
        run_all(&mut cut, until, &slices);
        prop_assert_eq!(whole.capture().unwrap(), cut.capture().unwrap());
        prop_assert_eq!(whole.digest().unwrap(), cut.digest().unwrap());
    }

    #[test]
    fn a_machine_that_climbs_back_has_the_same_future(at in 1u64..400, more in 1u64..400) {
        let mut first = machine(&ticking());
        run_all(&mut first, at, &[37]);
        first.console_input(b"typed");
        first.take_console_output();
        let mut ram = [0; 4096];
        first.memory().read(0x5000, &mut ram).unwrap();
        let rung = first.rung().unwrap();
        let before = first.capture().unwrap();
        run_all(&mut first, at + more, &[53]);
        let (output, after) = (first.take_console_output(), first.digest().unwrap());
        for _ in 0..2 {
            first.memory().write(0x5000, &ram).unwrap();
            first.climb(&rung).unwrap();
            prop_assert_eq!(first.capture().unwrap(), before.clone());
            run_all(&mut first, at + more, &[19]);
            prop_assert_eq!(first.take_console_output(), output.clone());
            prop_assert_eq!(first.digest().unwrap(), after.clone());
        }
    }

    #[test]
    fn a_captured_machine_goes_on_elsewhere_as_if_nothing_had_happened(at in 1u64..400, more in 1u64..400) {
        let mut source = machine(&ticking());
        run_all(&mut source, at, &[37]);
        let sections = source.capture().unwrap();
        let mut target = scripted(&config(), &ticking());
        target.apply(&sections).unwrap();
        copy_ram(&source, &target);
        prop_assert_eq!(target.capture().unwrap(), sections);
        prop_assert_eq!(target.digest().unwrap(), source.digest().unwrap());
        source.take_console_output();
        run_all(&mut source, at + more, &[53]);
        run_all(&mut target, at + more, &[19]);
        prop_assert_eq!(target.digest().unwrap(), source.digest().unwrap());
        prop_assert_eq!(target.take_console_output(), source.take_console_output());
    }
}

fn copy_ram(source: &Machine, target: &Machine) {
    let mut page = [0; 4096];
    for gpa in [0x5000, GENERATION_ID] {
        source.memory().read(gpa, &mut page).unwrap();
        target.memory().write(gpa, &page).unwrap();
    }
}

fn captured() -> Vec<Section> {
    let mut machine = machine(&ticking());
    run_all(&mut machine, 50, &[50]);
    machine.capture().unwrap()
}

#[test]
fn the_configuration_decides_which_sections_there_are() {
    let names: Vec<String> = captured().into_iter().map(|section| section.name).collect();
    let expected = [
        "clock",
        "cpu/0",
        "device/lapic0",
        "device/ioapic",
        "device/uart0",
        "device/rtc",
        "device/kvm-clock",
        "device/power",
        "device/virtio-blk0",
        "device/virtio-net0",
        "device/virtio-rng",
    ];
    assert_eq!(names, expected);
}

#[test]
fn sections_that_do_not_fit_change_nothing() {
    let good = captured();
    let mut machine = machine(&ticking());
    run_all(&mut machine, 20, &[20]);
    let before = machine.capture().unwrap();
    let mut refused = |sections: &[Section]| {
        let text = machine.apply(sections).unwrap_err().to_string();
        assert_eq!(machine.capture().unwrap(), before);
        text
    };
    for at in 0..good.len() {
        let mut missing = good.clone();
        let name = missing.remove(at).name;
        assert_eq!(refused(&missing), format!("section {name:?} is missing"));
        let mut twice = good.clone();
        twice.push(good[at].clone());
        assert_eq!(refused(&twice), format!("section {name:?} comes twice"));
        let mut newer = good.clone();
        newer[at].major = 2;
        assert!(refused(&newer).contains("is of version 2.0"));
        newer[at] = Section { minor: 2, ..good[at].clone() };
        assert!(refused(&newer).contains("is of version 1.2"));
    }
    let mut more = good.clone();
    more.push(Section { name: "device/virtio-blk1".into(), major: 1, ..Section::default() });
    assert_eq!(refused(&more), "unknown sections: device/virtio-blk1");
    let mut ignorable = good.clone();
    ignorable[3] = Section { minor: 2, ignorable: true, ..good[3].clone() };
    machine.apply(&ignorable).unwrap();
}

#[test]
fn a_half_applied_machine_never_runs() {
    let mut bad = captured();
    let at = bad.iter().position(|section| section.name == "device/virtio-rng").unwrap();
    bad[at].body = vec![0xff];
    let mut machine = machine(&ticking());
    assert!(matches!(machine.apply(&bad), Err(MachineError::Device(_))));
    assert!(matches!(machine.run(100), Outcome::Failed(_)));
    machine.apply(&captured()).unwrap();
    assert_eq!(machine.run(60), Outcome::Reached);
}

#[test]
fn hostile_clocks_and_processors_are_refused() {
    let good = captured();
    let mut machine = machine(&ticking());
    let mut clock = good.clone();
    let body = proto::v1::ClockV1 { retired: u64::MAX, skipped_tsc: 0 };
    clock[0].body = prost::Message::encode_to_vec(&body);
    assert!(matches!(machine.apply(&clock), Err(MachineError::Clock(_))));
    let mut cpu = good.clone();
    cpu[1].body = vec![1, 2, 3];
    assert!(matches!(machine.apply(&cpu), Err(MachineError::Cpu { vcpu: 0, .. })));
    cpu[1].body = CpuState { cr8: 3, ..CpuState::reset() }.to_bytes();
    assert!(matches!(machine.apply(&cpu), Err(MachineError::TaskPriority { cr8: 3, tpr: 0, .. })));
}

#[test]
fn task_priority_travels_with_the_processor_and_its_apic() {
    let mut source = machine(&[Op::Cr8(5), Op::Halt]);
    assert_eq!(source.run(1), Outcome::Reached);
    let sections = source.capture().unwrap();
    let mut target = scripted(&config(), &[]);
    target.apply(&sections).unwrap();
    assert_eq!((target.engine.store(0).unwrap().cr8, target.bus.cr8(0)), (5, 5));
}

#[test]
fn any_change_of_state_changes_the_digest() {
    let mut machine = machine(&ticking());
    run_all(&mut machine, 30, &[30]);
    let first = machine.digest().unwrap();
    assert_eq!(machine.digest().unwrap(), first);
    machine.memory().write(0x9000, &[1]).unwrap();
    let second = machine.digest().unwrap();
    assert_ne!((&second.ram, &second.machine), (&first.ram, &first.machine));
    assert_eq!((&second.state, &second.disks), (&first.state, &first.disks));
    rustix::io::pwrite(machine.disks().next().unwrap().file_fd(), &[1], 5000).unwrap();
    assert_ne!(machine.digest().unwrap().disks, second.disks);
    machine.console_input(b"x");
    assert_ne!(machine.digest().unwrap().state, second.state);
}

#[test]
fn an_epoch_is_one_for_ram_and_disks() {
    let mut machine = machine(&[]);
    let epoch = machine.advance_epoch().unwrap();
    assert_eq!((epoch, machine.memory().epoch()), (2, 2));
    machine.memory().write(0x7000, &[1]).unwrap();
    assert_eq!(machine.memory().stamps().stamp(7), 2);
}

#[test]
fn a_kernel_is_booted_and_every_window_answers() {
    let mut machine = scripted(&config(), &[Op::Load(VIRTIO_BASE + 8), Op::Load(VIRTIO_BASE + 0x2008)]);
    assert!(matches!(machine.boot(b"#!/bin/sh", None), Err(MachineError::Boot(BootError::NotAKernel(_)))));
    assert!(matches!(machine.run(1), Outcome::Failed(_)));
    machine.engine.load(0, &CpuState { rip: 0, ..CpuState::reset() }).unwrap();
    machine.life = Life::Ready;
    assert_eq!(machine.run(2), Outcome::Reached);
    assert_eq!(machine.engine.store(0).unwrap().gprs[0], 2 * 31 + 4);
    assert_eq!((machine.mac(0), machine.mac(1)), ([2, 0, 0, 0, 0, 9], [0; 6]));
    assert_eq!(machine.vmcbs().unwrap().len(), 1);
}

#[test]
fn configurations_that_make_no_machine_are_refused_by_field() {
    let refused = |change: &dyn Fn(&mut MachineConfig)| {
        let mut config = config();
        change(&mut config);
        match Machine::build(&config, parts()) {
            Err(MachineError::Config { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(&|c| c.vcpus = 0), "vcpus");
    assert_eq!(refused(&|c| c.vcpus = 33), "vcpus");
    assert_eq!(refused(&|c| c.memory_bytes = 16 << 20), "memory_bytes");
    assert_eq!(refused(&|c| c.cpu_model = "486".into()), "cpu_model");
    assert_eq!(refused(&|c| c.engine = "quantum".into()), "engine");
    assert_eq!(refused(&|c| c.seed = vec![1]), "seed");
    assert_eq!(refused(&|c| c.tsc_hz = 0), "tsc_hz");
    assert_eq!(refused(&|c| c.tsc_per_instruction = 0), "tsc_per_instruction");
    assert_eq!(refused(&|c| c.disks.clear()), "disks");
    assert_eq!(refused(&|c| c.disks[0].size_bytes = 512), "disks.size_bytes");
    assert_eq!(refused(&|c| c.disks[0].read_only = true), "disks.read_only");
    assert_eq!(refused(&|c| c.nets.clear()), "nets");
    assert_eq!(refused(&|c| c.nets[0].mac = vec![1, 0, 0, 0, 0, 0]), "nets.mac");
}

/// A 64-bit ELF that is entered at an index of the script.
fn kernel(entry: u64) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64 + 56, 0);
    (file[16], file[18], file[32], file[54], file[56]) = (2, 62, 64, 56, 1);
    file[24..32].copy_from_slice(&entry.to_le_bytes());
    file[64] = 1;
    for (at, word) in [(72, 120u64), (88, 0x10_0000), (96, 6), (104, 0x1000)] {
        file[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
    file.extend(b"kernel");
    file
}

#[test]
fn a_reset_machine_is_as_new_but_for_time_and_what_has_a_battery() {
    let script = [
        Op::Ram(0x30_0000, 7),
        Op::Out(0x3f9, 3),
        Op::Out(0x70, 0x40),
        Op::Out(0x71, 0x55),
        Op::Store(VIRTIO_BASE + 0x70, 1),
        Op::Cr8(5),
        Op::Out(0x64, 0xfe),
    ];
    let mut machine = scripted(&config(), &script);
    machine.boot(&kernel(0), Some(b"initrd")).unwrap();
    assert_eq!(machine.run(1000), Outcome::Reset);
    assert_eq!((machine.run(1000), machine.retired()), (Outcome::Reset, 7), "it waits for the reset");
    assert_eq!(machine.console_input(b"typed"), 5);
    let epoch = machine.advance_epoch().unwrap();
    machine.reset(&kernel(0), Some(b"initrd")).unwrap();
    let mut byte = [1];
    machine.memory().read(0x30_0000, &mut byte).unwrap();
    assert_eq!((byte, machine.memory().stamps().stamp(0x300), machine.retired()), ([0], epoch, 7));

    let mut fresh = scripted(&config(), &script);
    fresh.boot(&kernel(0), Some(b"initrd")).unwrap();
    fresh.console_input(b"typed");
    let changed: Vec<String> = {
        let (old, new) = (machine.capture().unwrap(), fresh.capture().unwrap());
        old.iter().zip(&new).filter(|(old, new)| old != new).map(|(old, _)| old.name.clone()).collect()
    };
    assert_eq!(changed, ["clock", "device/rtc"]);
    let seed = |machine: &Machine| {
        let mut seed = [0; 32];
        machine.memory().read(0x3_0010, &mut seed).unwrap();
        seed
    };
    assert_ne!(seed(&machine), seed(&fresh), "no two boots get the same randomness");
    assert_eq!((machine.run(1000), machine.retired()), (Outcome::Reset, 14));
    assert!(machine.reset(b"no kernel", None).is_err());
    assert!(matches!(machine.run(1000), Outcome::Failed(_)), "half a reset does not run");
}

#[test]
fn the_chipset_register_and_the_acpi_register_reset_too() {
    for op in [Op::Out(RESET_PORT, 1), Op::Out(0xcf9, 6), Op::Out(0xcf9, 0x0e)] {
        let mut machine = scripted(&config(), &[Op::Out(0xcf9, 2), Op::Out(0x64, 0xaa), op]);
        machine.boot(&kernel(0), None).unwrap();
        assert_eq!((machine.run(1000), machine.retired()), (Outcome::Reset, 3), "{op:?}");
    }
}

#[test]
fn a_machine_that_comes_back_learns_once_that_it_is_another_one() {
    // The guest listens on the event line: vector 0x50, edge.
    let line = 0x10 + 2 * crate::device::bus::EVENT_LINE;
    let listening = [
        Op::Store(LAPIC_BASE + 0xf0, 0x1ff),
        Op::Store(IOAPIC_BASE, line),
        Op::Store(IOAPIC_BASE + 0x10, 0x50),
        Op::Nop,
        Op::Jump(3),
    ];
    let seen = |machine: &Machine| {
        let mut bytes = [0; 16];
        machine.memory().read(GENERATION_ID, &mut bytes).unwrap();
        bytes
    };
    let mut first = machine(&listening);
    first.run(20);
    let sections = first.capture().unwrap();
    for (generation, expected) in [(vec![3; 16], [3; 16]), (vec![5; 16], [5; 16]), (vec![], [3; 16])] {
        let told = generation == [5; 16];
        let mut again = scripted(&MachineConfig { generation_id: generation, ..config() }, &listening);
        again.memory().write(GENERATION_ID, &[3; 16]).unwrap();
        again.apply(&sections).unwrap();
        assert!(again.capture().unwrap() == sections, "before it runs it is what was captured");
        assert_eq!(seen(&again), [3; 16]);
        for _ in 0..2 {
            again.run(again.retired() + 20);
            assert_eq!(seen(&again), expected);
        }
        // Each interrupt multiplies and adds its vector: one of them, or none.
        let interrupts = again.engine.store(0).unwrap().gprs[3];
        assert_eq!(interrupts, if told { 0x50 } else { 0 });
    }
    let odd = Machine::build(&MachineConfig { generation_id: vec![1; 7], ..config() }, parts());
    assert!(matches!(odd, Err(MachineError::Config { field: "generation_id", .. })));
}

#[test]
fn a_look_is_invisible_and_sees_what_a_capture_has() {
    let mut machine = machine(&ticking());
    run_all(&mut machine, 123, &[50]);
    let seen = machine.peek_cpu(0).unwrap();
    let probe = machine.probe();
    assert_eq!(machine.peek_cpu(1), None);
    let captured = machine.capture().unwrap();
    assert_eq!(captured[1].body, seen.to_bytes());
    assert_eq!(machine.probe(), probe);
    run_all(&mut machine, 124, &[1]);
    let next = machine.probe();
    assert_eq!(next.clock.retired, 124);
    assert_ne!(next.cpus, probe.cpus);
    machine.console_input(b"x");
    assert_ne!(machine.probe().devices, next.devices);
    assert_eq!(machine.probe().cpus, next.cpus);
}

#[test]
fn registers_are_poked_or_refused_whole() {
    let mut machine = machine(&ticking());
    run_all(&mut machine, 20, &[20]);
    let before = machine.peek_cpu(0).unwrap();
    let mut state = CpuState { cr8: 7, rip: 9, ..before.clone() };
    state.gprs[1] = 77;
    machine.poke_cpu(0, &state).unwrap();
    assert_eq!((machine.peek_cpu(0).unwrap(), machine.bus.cr8(0)), (state.clone(), 7));
    let priority = CpuState { cr8: 16, ..state.clone() };
    let mut other = state.clone();
    other.msrs.insert(0x1234_5678, 1);
    for (vcpu, bad) in [(0, priority), (0, other), (1, state.clone())] {
        assert!(matches!(machine.poke_cpu(vcpu, &bad), Err(MachineError::Load { .. })));
        assert_eq!(machine.peek_cpu(0).unwrap(), state);
    }
    assert!(matches!(scripted(&config(), &[]).poke_cpu(0, &state), Err(MachineError::Empty)));
}

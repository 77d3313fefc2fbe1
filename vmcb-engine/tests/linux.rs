//! A real Linux kernel on a whole machine: the one that `GODWIT_TEST_KERNEL` names (a bzImage or vmlinux), or the one that
//! `deploy/guest` has made. With `GODWIT_TEST_INITRD` its `/init` must switch the machine off; the machine is moved to
//! another in the middle.
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use proto::v1::{BootSource, DiskConfig, MachineConfig, NetConfig};
use vmcb_engine::device::block::DiskImage;
use vmcb_engine::device::net::{Link, NetLink};
use vmcb_engine::machine::{Machine, Outcome, Parts};
use vmcb_engine::memory::shared::SharedPages;
use vmcb_engine::memory::{GuestMemory, PAGE_BYTES, sized_memfd};

/// More than the kernel needs to look for its root file system.
const INSTRUCTIONS_MAX: u64 = 6_000_000_000;
const SLICE: u64 = 20_000_000;

fn config(vcpus: u32) -> MachineConfig {
    MachineConfig {
        vcpus,
        memory_bytes: 512 << 20,
        cpu_model: "soft-v1".into(),
        engine: "soft".into(),
        boot: Some(BootSource { cmdline: "console=ttyS0 panic=-1 reboot=t".into(), ..BootSource::default() }),
        disks: vec![DiskConfig { size_bytes: 1 << 20, ..DiskConfig::default() }],
        nets: vec![NetConfig { tap: String::new(), mac: vec![2, 0, 0, 0, 0, 9] }],
        seed: vec![7; 32],
        epoch_ns: 1_700_000_000_000_000_000,
        tsc_hz: 1_000_000_000,
        tsc_per_instruction: 1,
        paced: false,
        generation_id: vec![3; 16],
    }
}

fn named(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    if path.is_none() {
        eprintln!("SKIPPED: {variable} names no file");
    }
    path
}

/// The named file, or what `deploy/guest` has made.
fn named_or(variable: &str, file: &str) -> Option<PathBuf> {
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest").join(file);
    if std::env::var_os(variable).is_none() && made.exists() { Some(made) } else { named(variable) }
}

fn kernel() -> Option<Vec<u8>> {
    named_or("GODWIT_TEST_KERNEL", "vmlinuz").map(|path| std::fs::read(path).unwrap())
}

/// Packets on their way to the guest.
type Wire = Rc<RefCell<VecDeque<Vec<u8>>>>;

/// A host at the other end of the cable that answers ARP and ping, whoever is asked for.
struct Echo(Wire);

impl Link for Echo {
    fn send(&mut self, packet: &[u8]) {
        let mut answer = packet.to_vec();
        answer.copy_within(6..12, 0);
        answer[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        match packet.get(12..14) {
            Some([8, 6]) if packet.len() >= 42 && packet[21] == 1 => {
                answer[21] = 2;
                answer[22..28].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
                answer[28..32].copy_from_slice(&packet[38..42]);
                answer[32..42].copy_from_slice(&packet[22..32]);
            }
            Some([8, 0]) if packet.len() >= 42 && packet[23] == 1 && packet[34] == 8 => {
                answer[26..30].copy_from_slice(&packet[30..34]);
                answer[30..34].copy_from_slice(&packet[26..30]);
                // Type 8 becomes 0: the checksum grows by the difference.
                let sum = u32::from(u16::from_be_bytes([packet[36], packet[37]])) + 0x800;
                answer[34] = 0;
                answer[36..38].copy_from_slice(&((sum + (sum >> 16)) as u16).to_be_bytes());
            }
            _ => return,
        }
        self.0.borrow_mut().push_back(answer);
    }
}

fn build(vcpus: u32) -> (Machine, Wire) {
    let config = config(vcpus);
    let disk = DiskImage::from_fd(sized_memfd("test-disk", 1 << 20).unwrap(), false).unwrap();
    let memory = GuestMemory::create(config.memory_bytes).unwrap();
    let wire = Wire::default();
    let nets: Vec<Option<NetLink>> = vec![Some(Box::new(Echo(Rc::clone(&wire))))];
    (Machine::build(&config, Parts { memory, disks: vec![disk], nets }).unwrap(), wire)
}

/// Runs until `until` instructions or the end; types `typed` when the guest says that it is ready.
fn run((machine, wire): &mut (Machine, Wire), until: u64, console: &mut Vec<u8>) -> Outcome {
    loop {
        while let Some(packet) = wire.borrow_mut().pop_front() {
            machine.net_input(0, &packet);
        }
        let outcome = machine.run(until.min(machine.retired() + SLICE));
        let output = machine.take_console_output();
        eprint!("{}", String::from_utf8_lossy(&output));
        if output.windows(5).any(|word| word == b"READY") {
            assert_eq!(machine.console_input(b"typed\n"), 6);
        }
        console.extend(output);
        match outcome {
            Outcome::Reached if machine.retired() < until => {}
            Outcome::Idle { .. } if !wire.borrow().is_empty() => {}
            Outcome::Idle { until_tsc: Some(tsc) } => machine.skip_idle_until(tsc),
            other => {
                eprintln!("{other:?} after {} instructions, {} ticks", machine.retired(), machine.tsc());
                return other;
            }
        }
    }
}

#[test]
fn linux_boots_until_it_misses_its_root() {
    let Some(kernel) = kernel() else { return };
    let mut machine = build(1);
    machine.0.boot(&kernel, None).unwrap();
    let mut console = Vec::new();
    assert_eq!(run(&mut machine, INSTRUCTIONS_MAX, &mut console), Outcome::TripleFault);
    let text = String::from_utf8_lossy(&console);
    assert!(text.contains("Linux version") && text.contains("Unable to mount root fs"));
}

#[test]
fn linux_brings_up_a_second_processor() {
    let Some(kernel) = kernel() else { return };
    let mut machine = build(2);
    machine.0.boot(&kernel, None).unwrap();
    let mut console = Vec::new();
    assert_eq!(run(&mut machine, INSTRUCTIONS_MAX, &mut console), Outcome::TripleFault);
    let text = String::from_utf8_lossy(&console);
    assert!(text.contains("smp: Brought up 1 node, 2 CPUs") && text.contains("Unable to mount root fs"));
}

/// Runs to exactly `until` in pieces of `piece` instructions.
fn run_in_pieces(machine: &mut Machine, until: u64, piece: u64) {
    while machine.retired() < until {
        match machine.run(until.min(machine.retired() + piece)) {
            Outcome::Reached => {}
            Outcome::Idle { until_tsc: Some(tsc) } => machine.skip_idle_until(tsc),
            other => panic!("{other:?} after {} instructions", machine.retired()),
        }
    }
    machine.take_console_output();
}

#[test]
fn linux_does_not_see_where_its_runs_are_cut() {
    let Some(kernel) = kernel() else { return };
    let digests = [(1, SLICE), (1, 9973), (2, SLICE), (2, 9973)].map(|(vcpus, piece)| {
        let mut machine = build(vcpus).0;
        machine.boot(&kernel, None).unwrap();
        run_in_pieces(&mut machine, 400_000_000, piece);
        machine.digest().unwrap()
    });
    assert_eq!(digests[0], digests[1]);
    assert_eq!(digests[2], digests[3]);
}

#[test]
fn linux_is_moved_while_it_boots_and_notices_nothing() {
    let (Some(kernel), Some(initrd)) = (kernel(), named("GODWIT_TEST_INITRD")) else { return };
    let mut source = build(1);
    source.0.boot(&kernel, Some(&std::fs::read(initrd).unwrap())).unwrap();
    let mut console = Vec::new();
    assert_eq!(run(&mut source, 700_000_123, &mut console), Outcome::Reached);
    let mut target = build(1);
    copy_pages(&source.0, &target.0);
    target.0.apply(&source.0.capture().unwrap()).unwrap();
    assert_eq!(target.0.digest().unwrap(), source.0.digest().unwrap());
    let mut elsewhere = console.clone();
    assert_eq!(run(&mut source, INSTRUCTIONS_MAX, &mut console), Outcome::PowerOff);
    assert_eq!(run(&mut target, INSTRUCTIONS_MAX, &mut elsewhere), Outcome::PowerOff);
    assert!(console == elsewhere, "the console of the moved machine differs");
    assert_eq!(target.0.digest().unwrap(), source.0.digest().unwrap());
}

fn copy_pages(source: &Machine, target: &Machine) {
    let mut piece = vec![0; 1 << 20];
    for gpa in (0..source.memory().bytes()).step_by(piece.len()) {
        source.memory().read(gpa, &mut piece).unwrap();
        target.memory().write(gpa, &piece).unwrap();
    }
    let disks = source.disks().zip(target.disks());
    for (from, to) in disks {
        let mut bytes = vec![0; from.bytes() as usize];
        from.read_at(0, &mut bytes).unwrap();
        assert_eq!(rustix::io::pwrite(to.file_fd(), &bytes, 0).unwrap(), bytes.len());
    }
}

/// RAM and disk as another process reads them.
fn shared(machine: &Machine) -> [SharedPages; 2] {
    let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
    let (memory, disk) = (machine.memory(), machine.disks().next().unwrap());
    let ram = SharedPages::new(own(memory.ram_fd()), own(memory.stamps_fd()), memory.bytes()).unwrap();
    let blocks = SharedPages::new(own(disk.file_fd()), own(disk.stamps_fd()), disk.bytes()).unwrap();
    [ram.with_kept(own(memory.keeper().fd())).unwrap(), blocks.with_kept(own(disk.keeper().fd())).unwrap()]
}

fn bytes(pages: &SharedPages) -> Vec<u8> {
    let mut bytes = Vec::new();
    pages.append_pages(pages.whole(), &mut bytes).unwrap();
    bytes
}

#[test]
fn an_instant_of_a_booting_linux_is_read_while_it_goes_on() {
    let initrd = named_or("GODWIT_TEST_INITRD", "initramfs.cpio");
    let (Some(kernel), Some(initrd)) = (kernel(), initrd) else { return };
    let mut machine = build(2);
    machine.0.boot(&kernel, Some(&std::fs::read(initrd).unwrap())).unwrap();
    let (mut console, mut mark) = (Vec::new(), 0);
    let spaces = shared(&machine.0);
    let mut copies = spaces.each_ref().map(|pages| vec![0; (pages.pages() * PAGE_BYTES) as usize]);
    // While it unpacks itself, brings up its processors, and uses its devices.
    for at in [20_000_000, 400_000_000, 800_000_000, 1_200_000_000, 1_400_000_000] {
        let _reached_or_idle = run(&mut machine, at, &mut console);
        let before = spaces.each_ref().map(bytes);
        let epoch = machine.0.freeze(mark).unwrap();
        let mut kept_bytes = 0;
        for (pages, copy) in spaces.iter().zip(&mut copies) {
            let pieces = pages.since_frozen(mark, epoch - 1).unwrap().into_iter().flat_map(|run| run.pieces(64));
            for (number, piece) in pieces.enumerate() {
                if number % 8 == 0 {
                    let until = machine.0.retired() + 500_000;
                    let _reached_or_idle = run(&mut machine, until, &mut console);
                    kept_bytes = machine.0.kept_bytes().max(kept_bytes);
                }
                let mut bytes = Vec::new();
                pages.append_frozen(piece, epoch - 1, &mut bytes).unwrap();
                copy[(piece.first * PAGE_BYTES) as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
        }
        assert!(machine.0.thaw() && kept_bytes > 0);
        for (copy, before) in copies.iter().zip(&before) {
            let differ = copy.chunks(4096).zip(before.chunks(4096)).position(|(copy, before)| copy != before);
            assert_eq!(differ, None, "after {at} instructions");
        }
        mark = epoch;
    }
}

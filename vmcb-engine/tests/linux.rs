//! A real Linux kernel on a whole machine, where `GODWIT_TEST_KERNEL` names one (a bzImage or vmlinux).

use proto::v1::{BootSource, DiskConfig, MachineConfig, NetConfig};
use vmcb_engine::device::block::DiskImage;
use vmcb_engine::machine::{Machine, Outcome, Parts};
use vmcb_engine::memory::{GuestMemory, sized_memfd};

/// More than the kernel needs to look for its root file system.
const INSTRUCTIONS_MAX: u64 = 6_000_000_000;
const SLICE: u64 = 20_000_000;

fn config() -> MachineConfig {
    MachineConfig {
        vcpus: 1,
        memory_bytes: 512 << 20,
        cpu_model: "soft-v1".into(),
        engine: "soft".into(),
        boot: Some(BootSource {
            cmdline: "console=ttyS0 earlyprintk=ttyS0 panic=-1 reboot=t".into(),
            ..BootSource::default()
        }),
        disks: vec![DiskConfig { size_bytes: 1 << 20, ..DiskConfig::default() }],
        nets: vec![NetConfig { tap: String::new(), mac: vec![2, 0, 0, 0, 0, 9] }],
        seed: vec![7; 32],
        epoch_ns: 1_700_000_000_000_000_000,
        tsc_hz: 1_000_000_000,
        tsc_per_instruction: 1,
        paced: false,
    }
}

#[test]
fn linux_boots_until_it_misses_its_root() {
    let Some(path) = std::env::var_os("GODWIT_TEST_KERNEL") else {
        eprintln!("SKIPPED: GODWIT_TEST_KERNEL names no kernel");
        return;
    };
    let config = config();
    let disk = DiskImage::from_fd(sized_memfd("test-disk", 1 << 20).unwrap(), false).unwrap();
    let parts =
        Parts { memory: GuestMemory::create(config.memory_bytes).unwrap(), disks: vec![disk], nets: vec![None] };
    let mut machine = Machine::build(&config, parts).unwrap();
    machine.boot(&std::fs::read(path).unwrap(), None).unwrap();
    let mut console = Vec::new();
    let outcome = loop {
        let outcome = machine.run(machine.retired() + SLICE);
        let output = machine.take_console_output();
        eprint!("{}", String::from_utf8_lossy(&output));
        console.extend(output);
        match outcome {
            Outcome::Reached if machine.retired() < INSTRUCTIONS_MAX => {}
            Outcome::Idle { until_tsc: Some(tsc) } => machine.skip_idle_until(tsc),
            other => break other,
        }
    };
    eprintln!("{outcome:?} after {} instructions, {} TSC ticks", machine.retired(), machine.tsc());
    let text = String::from_utf8_lossy(&console);
    assert!(text.contains("Linux version"), "{outcome:?}");
    assert!(text.contains("Unable to mount root fs"), "{outcome:?}");
}

//! `bench engine`: instructions a second of the software engine, beside QEMU's TCG with instruction counting; on KVM, of loops at
//! CPL 3, beside QEMU with KVM.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::v1::MachineConfig;
use vmcb_engine::capability::CpuModel;
use vmcb_engine::machine::{Machine, Outcome, Parts};
use vmcb_engine::memory::GuestMemory;

use super::loops::Loop;
use super::qemu::{self, Counted};
use super::{GUEST_PATIENCE, Measurement, Report};
use crate::leftovers::Scratch;

const QEMU_PATIENCE_S: u32 = 60;
const ITERATIONS: u64 = 60_000_000;
const RUNS: usize = 3;
/// Iterations on KVM for one on the software engine.
const KVM_TIMES: u64 = 10;
const SLICE: u64 = 4_000_000;

/// A kernel and what goes with it.
struct Boot {
    kernel: Vec<u8>,
    kernel_path: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
    memory_bytes: u64,
    /// TSC rate of a guest on KVM; none: the software engine's.
    kvm_tsc_hz: Option<u64>,
}

impl Boot {
    /// A loop, whose file QEMU finds in the folder until the next one comes.
    fn of_loop(kernel: Vec<u8>, scratch: &Scratch, kvm_tsc_hz: Option<u64>) -> Result<Boot, String> {
        let kernel_path = scratch.path().join("loop.elf");
        std::fs::write(&kernel_path, &kernel).map_err(|e| e.to_string())?;
        Ok(Boot { kernel, kernel_path, initrd: None, cmdline: String::new(), memory_bytes: 64 << 20, kvm_tsc_hz })
    }
}

/// Runs all cases.
///
/// # Errors
/// A guest that does not do what it should, or files that cannot be written.
pub fn run(report: &Report, guest: &Path, cases: &[String]) -> Result<(), String> {
    let wanted = |case: &str| cases.is_empty() || cases.iter().any(|c| c == case);
    let scratch = Scratch::new("bench")?;
    eprintln!("beside: {}", qemu::version().as_deref().unwrap_or("nothing, there is no QEMU"));
    for (case, kind) in Loop::ALL.into_iter().filter(|(case, _)| wanted(case)) {
        let kernel = kind.elf(ITERATIONS).map_err(|e| e.to_string())?;
        loop_case(report, case, &Boot::of_loop(kernel, &scratch, None)?)?;
    }
    if wanted("linux-boot") {
        linux_boot(report, guest)?;
    }
    Ok(())
}

fn loop_case(report: &Report, case: &str, boot: &Boot) -> Result<(), String> {
    let (mut ours, mut tcg) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let timed = between_marks(boot, "start\n", "done\n")?;
        let instructions = timed.instructions as f64;
        ours.push(instructions / timed.elapsed.as_secs_f64());
        if let Some(elapsed) = qemu_between_marks(boot, "start", "done")? {
            tcg.push(instructions / elapsed.as_secs_f64());
        }
    }
    let measured = Measurement::of("engine", case, "instructions_per_second", "1/s", &ours);
    report.add(measured.map(|m| m.beside("qemu_tcg_icount", &tcg)));
    Ok(())
}

/// The loops at CPL 3 on KVM, where nobody counts instructions: as many as the software engine counts, times so many iterations
/// more.
///
/// # Errors
/// As [`run`].
pub fn run_on_kvm(report: &Report, cases: &[String]) -> Result<(), String> {
    let tsc_hz = match super::hardware::tsc_hz() {
        Ok(tsc_hz) => tsc_hz,
        Err(why) => {
            report.skip(&format!("engine --engine kvm: {why}"));
            return Ok(());
        }
    };
    let scratch = Scratch::new("bench")?;
    for (case, kind) in Loop::ALL.into_iter().filter(|(case, _)| cases.is_empty() || cases.iter().any(|c| c == case)) {
        let boot = |iterations: u64, kvm_tsc_hz| -> Result<Boot, String> {
            Boot::of_loop(kind.user_elf(iterations).map_err(|e| e.to_string())?, &scratch, kvm_tsc_hz)
        };
        let counted = between_marks(&boot(ITERATIONS, None)?, "start\n", "done\n")?.instructions as f64;
        let instructions = counted * KVM_TIMES as f64;
        let boot = boot(ITERATIONS * KVM_TIMES, Some(tsc_hz))?;
        let (mut ours, mut qemu) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            ours.push(instructions / between_marks(&boot, "start\n", "done\n")?.elapsed.as_secs_f64());
            qemu.extend(
                qemu_between_marks(&boot, "start", "done")?.map(|elapsed| instructions / elapsed.as_secs_f64()),
            );
        }
        let measured = Measurement::of("engine", &format!("kvm-{case}"), "instructions_per_second", "1/s", &ours);
        report.add(measured.map(|m| m.beside("qemu_kvm", &qemu)));
    }
    Ok(())
}

fn linux_boot(report: &Report, guest: &Path) -> Result<(), String> {
    let Ok(kernel) = std::fs::read(guest.join("vmlinuz")) else {
        report.skip(&format!("linux-boot: no kernel in {}; run deploy/guest", guest.display()));
        return Ok(());
    };
    let boot = Boot {
        kernel,
        kernel_path: guest.join("vmlinuz"),
        initrd: Some(guest.join("initramfs.cpio")),
        cmdline: "console=ttyS0 panic=-1 godwit.work=off".into(),
        memory_bytes: 512 << 20,
        kvm_tsc_hz: None,
    };
    let (mut rate, mut seconds, mut tcg) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let timed = between_marks(&boot, "", "godwit: up")?;
        rate.push(timed.instructions as f64 / timed.elapsed.as_secs_f64());
        seconds.push(timed.elapsed.as_secs_f64());
        tcg.extend(qemu_between_marks(&boot, "", "godwit: up")?.map(|elapsed| elapsed.as_secs_f64()));
    }
    report.add(Measurement::of("engine", "linux-boot", "instructions_per_second", "1/s", &rate));
    let measured = Measurement::of("engine", "linux-boot", "seconds_to_shell", "s", &seconds);
    report.add(measured.map(|m| m.beside("qemu_tcg_icount", &tcg)));
    Ok(())
}

/// Host time and instructions between two marks on the console. An empty first mark is the first instruction.
struct Timed {
    elapsed: Duration,
    instructions: u64,
}

fn between_marks(boot: &Boot, from: &str, to: &str) -> Result<Timed, String> {
    let (engine, model, tsc_hz) = match boot.kvm_tsc_hz {
        Some(tsc_hz) => ("kvm", CpuModel::X86V1, tsc_hz),
        None => ("soft", CpuModel::SoftV1, 1_000_000_000),
    };
    let config = MachineConfig {
        vcpus: 1,
        memory_bytes: boot.memory_bytes,
        cpu_model: model.name().into(),
        engine: engine.into(),
        boot: Some(proto::v1::BootSource { cmdline: boot.cmdline.clone(), ..Default::default() }),
        seed: vec![7; 32],
        epoch_ns: 1_700_000_000_000_000_000,
        tsc_hz,
        tsc_per_instruction: 4,
        ..Default::default()
    };
    let memory = GuestMemory::create(boot.memory_bytes).map_err(|e| e.to_string())?;
    let parts = Parts { memory, disks: Vec::new(), nets: Vec::new() };
    let mut machine = Machine::build(&config, parts).map_err(|e| e.to_string())?;
    let initrd = boot.initrd.as_ref().map(std::fs::read).transpose().map_err(|e| e.to_string())?;
    let begun = Instant::now();
    machine.boot(&boot.kernel, initrd.as_deref()).map_err(|e| e.to_string())?;
    let mut start = from.is_empty().then_some((begun, 0));
    let mut console = String::new();
    while begun.elapsed() < GUEST_PATIENCE {
        let outcome = machine.run(machine.retired() + SLICE);
        console += &String::from_utf8_lossy(&machine.take_console_output());
        let now = (Instant::now(), machine.retired());
        if start.is_none() && console.contains(from) {
            start = Some(now);
        }
        if let (Some((at, retired)), true) = (start, console.contains(to)) {
            return Ok(Timed { elapsed: now.0 - at, instructions: now.1 - retired });
        }
        match outcome {
            Outcome::Reached => {}
            Outcome::Idle { until_tsc: Some(tsc) } => machine.skip_idle_until(tsc),
            other => return Err(format!("the guest ended ({other:?}) before it printed {to:?}:\n{console}")),
        }
    }
    Err(format!("the guest did not print {to:?} in {GUEST_PATIENCE:?}:\n{console}"))
}

/// The same guest under QEMU, if there is one.
fn qemu_between_marks(boot: &Boot, from: &str, to: &str) -> Result<Option<Duration>, String> {
    let counted = Counted {
        kernel: &boot.kernel_path,
        initrd: boot.initrd.as_deref(),
        cmdline: &boot.cmdline,
        memory_bytes: boot.memory_bytes,
        icount: boot.kvm_tsc_hz.is_none().then_some("shift=0,sleep=off"),
        devices: &[],
        typed: "",
        patience_s: QEMU_PATIENCE_S,
    };
    counted.between_marks(from, to)
}

//! `bench migrate --engine kvm`: guests that dirty memory at CPL 3, on KVM, between two agents over loopback with TLS and hashing
//! on, beside QEMU's live migration of the same image, with TLS and without, in the same run.
//!
//! For how long the guest stood is also seen on its console: it beats, and somebody looks at the files that consoles go to.
//! Where there is no KVM, or no QEMU beside it, that is said aloud. This room refuses to judge.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proto::v1::{BootSource, MachineConfig};
use vmcb_engine::capability::CpuModel;
use vmcb_engine::engine::kvm;
use vmcb_engine::machine::{Machine, Outcome, Parts};
use vmcb_engine::memory::GuestMemory;

use super::migrate::{cpu_seconds, overhead_mib, phases, warm, watch};
use super::qemu::QEMU;
use super::qemu_pair::Pair;
use super::{GUEST_PATIENCE, Measurement, Report, has_program};
use crate::cluster::{Cluster, Ticks, wait};
use crate::guest::REGION;
use crate::guest::user::{Dirtier, Pace};

const GIB: u64 = 1 << 30;
/// RAM beside the region: what lies below it, and some air.
const AIR_BYTES: u64 = REGION + (16 << 20);
/// Downtime that both aim at: what `ctl migrate` aims at by itself.
const DOWNTIME_MS: u32 = 30;
const BEAT_MS: u64 = 4;
const BEATS_PER_TICK: u64 = 25;
const LOOK: Duration = Duration::from_micros(500);
/// Dirt that is folded, for one figure.
const FOLDED: Duration = Duration::from_millis(100);
const FOLDS: usize = 9;

/// Cases and how fast the guest dirties; a case of 4 GiB ends in `-4g`.
const CASES: [(&str, Pace); 5] = [
    ("idle", Pace::BytesPerS(0)),
    ("dirty-50", Pace::BytesPerS(50_000_000)),
    ("dirty-200", Pace::BytesPerS(200_000_000)),
    ("dirty-1000", Pace::BytesPerS(1_000_000_000)),
    ("dirty-max", Pace::Full),
];

/// TSC rate of guests on this host's KVM, if it can run ours.
///
/// # Errors
/// Why it cannot.
pub fn tsc_hz() -> Result<u64, String> {
    let host = kvm::capabilities().map_err(|error| error.to_string())?;
    let failing = CpuModel::X86V1.contract(host.facts.tsc_khz).failing_on(&host);
    if !failing.is_empty() {
        let lacks: Vec<String> = failing.iter().map(ToString::to_string).collect();
        return Err(format!("KVM of this host lacks {}", lacks.join(", ")));
    }
    Ok(host.facts.tsc_khz * 1000)
}

/// Values of one metric by who was measured.
#[derive(Default)]
struct Figures {
    throughput: Vec<f64>,
    total: Vec<f64>,
    downtime: Vec<f64>,
    seen: Vec<f64>,
    mib: Vec<f64>,
    cpu: Vec<f64>,
    throttle: Vec<f64>,
    converged: Vec<f64>,
}

impl Figures {
    fn note(&mut self, [total_ms, downtime_ms, seen_ms, bytes, cpu_s, throttle]: [f64; 6]) {
        self.throughput.push(bytes / 1e6 / (total_ms / 1e3));
        self.total.push(total_ms);
        self.downtime.push(downtime_ms);
        self.seen.push(seen_ms);
        self.mib.push(bytes / f64::from(1 << 20));
        self.cpu.push(cpu_s);
        self.throttle.push(throttle);
        self.converged.push(1.0);
    }

    /// Name, unit and values of each.
    fn metrics(&self) -> [(&'static str, &'static str, &[f64]); 8] {
        [
            ("throughput_mb_per_s", "MB/s", &self.throughput),
            ("total_ms", "ms", &self.total),
            ("downtime_ms", "ms", &self.downtime),
            ("downtime_seen_ms", "ms", &self.seen),
            ("sent_mib", "MiB", &self.mib),
            ("cpu_seconds", "s", &self.cpu),
            ("throttle_percent", "%", &self.throttle),
            ("converged", "", &self.converged),
        ]
    }
}

/// One case: its name, its guest, and the RAM that it gets.
struct Case {
    name: String,
    dirtier: Dirtier,
    memory_bytes: u64,
}

/// Runs all cases, or those that are named; those of 4 GiB only if they are named, or `memory_gib` says 4.
///
/// # Errors
/// QEMU or a guest does not do what it should. A cluster that does not work panics with its logs.
pub fn migrate(report: &Report, cases: &[String], memory_gib: u64, runs: usize) -> Result<(), String> {
    let tsc_hz = match tsc_hz() {
        Ok(tsc_hz) => tsc_hz,
        Err(why) => {
            report.skip(&format!("migrate --engine kvm: {why}"));
            return Ok(());
        }
    };
    let beside = has_program(QEMU);
    if !beside {
        report.skip("beside: there is no QEMU");
    }
    let names = CASES.iter().flat_map(|(name, pace)| [(name.to_string(), *pace, 1), (format!("{name}-4g"), *pace, 4)]);
    for (name, pace, gib) in names {
        let wanted = if cases.is_empty() { gib == memory_gib } else { cases.contains(&name) };
        if !wanted {
            continue;
        }
        let memory_bytes = gib * GIB;
        let region_bytes = memory_bytes - AIR_BYTES;
        let dirtier = Dirtier { region_bytes, pace, beat_ms: BEAT_MS, beats_per_tick: BEATS_PER_TICK, tsc_hz };
        one_case(report, &Case { name, dirtier, memory_bytes }, runs, beside)?;
    }
    Ok(())
}

fn one_case(report: &Report, case: &Case, runs: usize, beside: bool) -> Result<(), String> {
    let elf = case.dirtier.elf().map_err(|e| e.to_string())?;
    let (mut ours, mut peers) =
        (Figures::default(), [("qemu_tls", true, Figures::default()), ("qemu_plain", false, Figures::default())]);
    let (mut rest_mib, mut peak_mib, mut rounds) = (Vec::new(), Vec::new(), Vec::new());
    let cluster = Cluster::up(2);
    let kernel = cluster.dir().join("guest.elf");
    std::fs::write(&kernel, &elf).map_err(|e| e.to_string())?;
    for run in 0..runs {
        let vm = format!("vm{run}");
        let memory = case.memory_bytes.to_string();
        let path = kernel.to_string_lossy().into_owned();
        cluster.ok(["vm", "create", &vm, "--host", "hostA", "--kernel", &path, "--memory", &memory, "--engine", "kvm"]);
        until_filled(|| cluster.console(&vm))?;
        cluster.goes_on(&vm, 3);
        wait("the guest's runner", || cluster.runner("hostA", &vm));
        rest_mib.extend(overhead_mib(&cluster, "hostA", &vm, case.memory_bytes));
        warm(case.memory_bytes);
        let before = cpu_seconds(&cluster);
        let consoles =
            ["hostA", "hostB"].map(|host| cluster.dir().join(host).join("vms").join(&vm).join("console.log"));
        let ((result, peak), seen) = while_it_beats(consoles.into(), || {
            watch(&cluster, &vm, case.memory_bytes, || cluster.json(["migrate", &vm, "--to", "hostB"]))
        });
        let cpu_s = cpu_seconds(&cluster) - before;
        let number = |field: &str| result[field].as_f64().unwrap_or(f64::NAN);
        let told = result["rounds"].as_array().cloned().unwrap_or_default();
        let throttle = told.iter().filter_map(|round| round["throttle_percent"].as_f64()).fold(0.0, f64::max);
        ours.note([number("total_ms"), number("downtime_ms"), seen, number("bytes_sent"), cpu_s, throttle]);
        peak_mib.push(peak);
        rounds.push(told.len() as f64);
        eprintln!("{}: {}", case.name, phases(&result));
        cluster.goes_on(&vm, 3);
        cluster.ok(["vm", "stop", &vm]);
        cluster.ok(["vm", "rm", &vm]);
        for (_, tls, figures) in peers.iter_mut().filter(|_| beside) {
            peer(case, &kernel, *tls, figures)?;
        }
    }
    for (index, (metric, unit, values)) in ours.metrics().into_iter().enumerate() {
        let mut measured = Measurement::of("migrate", &case.name, metric, unit, values);
        for (name, _, figures) in &peers {
            measured = measured.map(|m| m.beside(name, figures.metrics()[index].2));
        }
        report.add(measured);
    }
    let of = |metric, unit, values: &[f64]| Measurement::of("migrate", &case.name, metric, unit, values);
    report.add(of("rounds", "", &rounds));
    report.add(of("resident_overhead_mib", "MiB", &rest_mib));
    report.add(of("resident_peak_mib", "MiB", &peak_mib));
    report.add(of("fold_ms", "ms", &folds(case)?));
    Ok(())
}

/// The same under QEMU.
fn peer(case: &Case, kernel: &std::path::Path, tls: bool, figures: &mut Figures) -> Result<(), String> {
    let mut pair = Pair::start(kernel, case.memory_bytes, tls)?;
    let [source, target] = pair.consoles();
    until_filled(|| std::fs::read_to_string(&source).unwrap_or_default())?;
    warm(case.memory_bytes);
    let (moved, seen) = while_it_beats(vec![source, target], || pair.migrate(DOWNTIME_MS));
    match moved? {
        Some(m) => {
            figures.note([m.total_ms, m.downtime_ms, seen, m.bytes, m.cpu_s, m.throttle_percent]);
        }
        None => {
            eprintln!("{}: QEMU (TLS: {tls}) did not converge in {:?}", case.name, super::qemu_pair::PATIENCE);
            figures.converged.push(0.0);
        }
    }
    Ok(())
}

fn until_filled(console: impl Fn() -> String) -> Result<(), String> {
    let begun = Instant::now();
    while Ticks::last(&console()).is_none_or(|ticks| ticks.tick < 3) {
        if begun.elapsed() > GUEST_PATIENCE {
            return Err(format!("the guest does not fill its memory:\n{}", console()));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Does something, and says for how long at most no console grew meanwhile, in milliseconds.
fn while_it_beats<T>(consoles: Vec<PathBuf>, work: impl FnOnce() -> T) -> (T, f64) {
    let over = AtomicBool::new(false);
    let bytes = || consoles.iter().filter_map(|path| std::fs::metadata(path).ok()).map(|file| file.len()).sum::<u64>();
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let (mut most, mut known, mut at) = (Duration::ZERO, bytes(), Instant::now());
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK);
                let now = bytes();
                if now != known {
                    (most, known, at) = (most.max(at.elapsed()), now, Instant::now());
                }
            }
            most.max(at.elapsed()).as_secs_f64() * 1e3
        });
        let done = work();
        // What comes first at the target counts.
        std::thread::sleep(Duration::from_millis(20 * BEAT_MS));
        over.store(true, Ordering::Relaxed);
        (done, watching.join().unwrap_or(f64::NAN))
    })
}

/// How long it takes to learn what the guest wrote within a tenth of a second, through the engine itself.
fn folds(case: &Case) -> Result<Vec<f64>, String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let config = MachineConfig {
        vcpus: 1,
        memory_bytes: case.memory_bytes,
        cpu_model: CpuModel::X86V1.name().into(),
        engine: "kvm".into(),
        boot: Some(BootSource::default()),
        seed: vec![7; 32],
        tsc_hz: case.dirtier.tsc_hz,
        tsc_per_instruction: 4,
        ..MachineConfig::default()
    };
    let memory = GuestMemory::create(case.memory_bytes).map_err(|e| text(&e))?;
    let mut machine = Machine::build(&config, Parts { memory, disks: vec![], nets: vec![] }).map_err(|e| text(&e))?;
    let elf = case.dirtier.elf().map_err(|e| e.to_string())?;
    machine.boot(&elf, None).map_err(|e| text(&e))?;
    let mut console = String::new();
    let mut run = |machine: &mut Machine, within: Duration| {
        let instructions = within.as_micros() as u64 * (case.dirtier.tsc_hz / 1_000_000) / 4;
        let until = machine.retired() + instructions;
        while machine.retired() < until {
            match machine.run(until) {
                Outcome::Reached => {}
                other => return Err(format!("the guest ended: {other:?}\n{console}")),
            }
            console += &String::from_utf8_lossy(&machine.take_console_output());
        }
        Ok(console.contains("tick 3 "))
    };
    let begun = Instant::now();
    while !run(&mut machine, FOLDED)? {
        if begun.elapsed() > GUEST_PATIENCE {
            return Err("the guest does not fill its memory".to_owned());
        }
    }
    machine.advance_epoch().map_err(|e| text(&e))?;
    let mut folds = Vec::new();
    for _ in 0..FOLDS {
        run(&mut machine, FOLDED)?;
        let begun = Instant::now();
        machine.advance_epoch().map_err(|e| text(&e))?;
        folds.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    Ok(folds)
}

//! `bench migrate`: a guest of 1 GiB full of incompressible pages between two agents over loopback, TLS and hashing on, at
//! several dirty rates, beside what this machine's parts can do at best: measured right before each migration.
//!
//! Right before each migration 1.5 times the guest's RAM is touched: this is the figure of a host whose free memory is its
//! own, not of a virtual one that must ask its own host for each page.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use vmcb_engine::memory::{Backing, GuestMemory};

use super::ceilings::Ceilings;
use super::{Measurement, Report};
use crate::cluster::{Cluster, wait};
use crate::guest::{Program, REGION};

const GIB: u64 = 1 << 30;
const REGION_BYTES: u64 = 992 << 20;
const RUNS: usize = 3;

/// Case and pages rewritten a second.
const CASES: [(&str, u64); 3] = [("idle", 0), ("dirty-50", 50 * 256), ("dirty-200", 200 * 256)];

/// What one migration took.
#[derive(Default)]
struct Runs {
    throughput: Vec<f64>,
    total: Vec<f64>,
    downtime: Vec<f64>,
    cpu: Vec<f64>,
    /// Percent of a bare tonic stream with TLS, and times its CPU seconds.
    share: Vec<f64>,
    cpu_times: Vec<f64>,
    release: Vec<f64>,
    rounds: Vec<f64>,
    throttle: Vec<f64>,
    rest_mib: Vec<f64>,
    peak_mib: Vec<f64>,
}

/// Runs all cases.
///
/// # Errors
/// A ceiling cannot be measured. A cluster that does not work panics with its logs.
pub fn run(report: &Report, cases: &[String]) -> Result<(), String> {
    for (case, pages_per_s) in CASES.into_iter().filter(|(case, _)| cases.is_empty() || cases.iter().any(|c| c == case))
    {
        migrate_case(report, case, pages_per_s)?;
    }
    Ok(())
}

fn migrate_case(report: &Report, case: &str, pages_per_s: u64) -> Result<(), String> {
    let program =
        Program { start: REGION, region_bytes: REGION_BYTES, pages_per_s, tick_ms: 100, tsc_hz: 1_000_000_000 };
    let mut ceilings = Ceilings::default();
    let cluster = Cluster::up(2);
    cluster.create_with("vm1", "hostA", program, &["--memory", "1G"]);
    wait_until_filled(&cluster);
    let mut runs = Runs::default();
    for run in 0..RUNS {
        let (source, target) = if run % 2 == 0 { ("hostA", "hostB") } else { ("hostB", "hostA") };
        cluster.goes_on("vm1", 5);
        wait("the guest's runner", || cluster.runner(source, "vm1"));
        runs.rest_mib.extend(overhead_mib(&cluster, source, "vm1", GIB));
        ceilings.measure()?;
        warm(REGION_BYTES + REGION_BYTES / 2);
        let before = cpu_seconds(&cluster);
        let (result, peak) = watch(&cluster, "vm1", GIB, || cluster.json(["migrate", "vm1", "--to", target]));
        runs.note(&result, cpu_seconds(&cluster) - before, &ceilings);
        runs.peak_mib.push(peak);
        eprintln!("{case}: {}\n{case}: {}", phases(&result), rounds(&result));
    }
    cluster.goes_on("vm1", 5);
    let of = |metric, unit, values: &[f64]| Measurement::of("migrate", case, metric, unit, values);
    report.add(of("throughput_mb_per_s", "MB/s", &runs.throughput).map(|m| ceilings.beside(m)));
    report.add(of("share_of_bare_tls", "%", &runs.share));
    report.add(of("total_ms", "ms", &runs.total));
    report.add(of("downtime_ms", "ms", &runs.downtime));
    report.add(of("release_ms", "ms", &runs.release));
    report.add(of("rounds", "", &runs.rounds));
    report.add(of("throttle_percent", "%", &runs.throttle));
    report.add(of("cpu_seconds_per_gib", "s", &runs.cpu));
    report.add(of("cpu_of_bare_tls", "x", &runs.cpu_times));
    report.add(of("resident_overhead_mib", "MiB", &runs.rest_mib));
    report.add(of("resident_peak_mib", "MiB", &runs.peak_mib));
    Ok(())
}

impl Runs {
    fn note(&mut self, result: &serde_json::Value, cpu_s: f64, ceilings: &Ceilings) {
        let number = |field: &str| result[field].as_f64().unwrap_or(f64::NAN);
        let none = Vec::new();
        let (rounds, phases) =
            (result["rounds"].as_array().unwrap_or(&none), result["phases"].as_array().unwrap_or(&none));
        let (bare, bare_cpu) = ceilings.last_tls();
        let rate = number("bytes_sent") / 1e6 / (number("total_ms") / 1e3);
        let cpu = cpu_s / (number("bytes_sent") / f64::from(1u32 << 30));
        let release = phases.iter().find(|phase| phase["phase"] == "release");
        self.throughput.push(rate);
        self.share.push(100.0 * rate / bare);
        self.total.push(number("total_ms"));
        self.downtime.push(number("downtime_ms"));
        self.cpu.push(cpu);
        self.cpu_times.push(cpu / bare_cpu);
        self.release.push(release.and_then(|phase| phase["ms"].as_f64()).unwrap_or(0.0));
        self.rounds.push(rounds.len() as f64);
        self.throttle.push(
            rounds.iter().filter_map(|round| round["throttle_percent"].as_f64()).fold(0.0, |most, now| now.max(most)),
        );
    }
}

/// Does something and looks meanwhile how much memory agent and runner hold beyond the guest's RAM, on the host where it
/// is most; in MiB.
pub(super) fn watch<T>(cluster: &Cluster, vm: &str, memory_bytes: u64, work: impl FnOnce() -> T) -> (T, f64) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut most = 0f64;
            while !over.load(Ordering::Relaxed) {
                let now =
                    ["hostA", "hostB"].into_iter().filter_map(|host| overhead_mib(cluster, host, vm, memory_bytes));
                most = now.fold(most, f64::max);
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            most
        });
        let done = work();
        over.store(true, Ordering::Relaxed);
        (done, watching.join().unwrap_or(f64::NAN))
    })
}

fn wait_until_filled(cluster: &Cluster) {
    let begun = std::time::Instant::now();
    while !cluster.console("vm1").contains("tick ") {
        assert!(begun.elapsed() < super::GUEST_PATIENCE, "the guest does not fill its memory\n{}", cluster.logs());
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

pub(super) fn phases(result: &serde_json::Value) -> String {
    let phases = result["phases"].as_array().cloned().unwrap_or_default();
    let one = |p: &serde_json::Value| {
        format!("{} {:.1} ms", p["phase"].as_str().unwrap_or("?"), p["ms"].as_f64().unwrap_or(0.0))
    };
    phases.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Memory that this machine gave back to its own host is slow to touch again: touch it before measuring, in pages of the
/// same size as those that guests get, or others are touched.
pub(super) fn warm(bytes: u64) {
    let memory = GuestMemory::create_on(Backing::Huge, bytes).expect("this machine has more memory than a guest");
    for page in 0..memory.pages() {
        memory.write(memory.gpa_of(page), &[1]).expect("each of its pages is RAM");
    }
}

/// CPU seconds of controller and agents so far. The runners run the guest and are not counted.
pub(super) fn cpu_seconds(cluster: &Cluster) -> f64 {
    let stat = |name: &str| fs::read_to_string(format!("/proc/{}/stat", cluster.daemon(name))).unwrap_or_default();
    ["controller", "hostA", "hostB"].into_iter().map(|name| cpu_seconds_of_stat(&stat(name))).sum()
}

/// User and system time of a process, in seconds, from its `/proc/PID/stat`.
pub fn cpu_seconds_of_stat(stat: &str) -> f64 {
    let ticks_per_s = rustix::param::clock_ticks_per_second() as f64;
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    [11, 12].iter().filter_map(|i| fields.get(*i)?.parse::<f64>().ok()).sum::<f64>() / ticks_per_s
}

/// What agent and runner (if there is one) hold beyond the guest's RAM: all resident memory that is not the shared memfd.
pub(super) fn overhead_mib(cluster: &Cluster, host: &str, vm: &str, memory_bytes: u64) -> Option<f64> {
    let private_kib = |pid: i32| -> Option<f64> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| -> Option<f64> {
            status.lines().find_map(|line| line.strip_prefix(name)?.trim().trim_end_matches(" kB").parse().ok())
        };
        Some(field("RssAnon:")? + field("RssFile:")?)
    };
    // Stamps are shared memory too: 4 bytes a page.
    let stamps_kib = memory_bytes as f64 / 4096.0 * 4.0 / 1024.0;
    let runner = cluster.runner(host, vm).and_then(private_kib).unwrap_or(0.0);
    Some((private_kib(cluster.daemon(host))? + runner + stamps_kib) / 1024.0)
}

/// What each round sent and how long it took, how fast the guest dirtied meanwhile, and how far it was held back.
fn rounds(result: &serde_json::Value) -> String {
    let rounds = result["rounds"].as_array().cloned().unwrap_or_default();
    let one = |round: &serde_json::Value| {
        let number = |field: &str| round[field].as_f64().unwrap_or(f64::NAN);
        let (sent, dirtied) = (number("bytes") / 1e6, number("dirty_rate") / 1e6);
        format!("{sent:.0} MB in {:.0} ms, dirty {dirtied:.0} MB/s, {} %", number("ms"), number("throttle_percent"))
    };
    rounds.iter().map(one).collect::<Vec<_>>().join("; ")
}

//! `bench migrate`: a guest of 1 GiB full of incompressible pages between two agents over loopback, TLS and hashing on, at
//! several dirty rates, beside what this machine's parts can do at best in the same run.

use std::fs;

use super::ceilings::Ceilings;
use super::{Measurement, Report};
use crate::cluster::{Cluster, wait};
use crate::guest::{Program, REGION};

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
}

/// Runs all cases.
///
/// # Errors
/// A ceiling cannot be measured. A cluster that does not work panics with its logs.
pub fn run(report: &Report, cases: &[String]) -> Result<(), String> {
    let ceilings = Ceilings::measure(RUNS)?;
    for (case, pages_per_s) in CASES.into_iter().filter(|(case, _)| cases.is_empty() || cases.iter().any(|c| c == case))
    {
        migrate_case(report, case, pages_per_s, &ceilings);
    }
    Ok(())
}

fn migrate_case(report: &Report, case: &str, pages_per_s: u64, ceilings: &Ceilings) {
    let program =
        Program { start: REGION, region_bytes: REGION_BYTES, pages_per_s, tick_ms: 100, tsc_hz: 1_000_000_000 };
    let cluster = Cluster::up(2);
    cluster.create_with("vm1", "hostA", program, &["--memory", "1G"]);
    wait_until_filled(&cluster);
    let mut runs = Runs::default();
    let mut overhead = Vec::new();
    for run in 0..RUNS {
        let (source, target) = if run % 2 == 0 { ("hostA", "hostB") } else { ("hostB", "hostA") };
        cluster.goes_on("vm1", 5);
        overhead.extend(resident_overhead_mib(&cluster, source));
        warm(REGION_BYTES + REGION_BYTES / 2);
        let before = cpu_seconds(&cluster);
        let result = cluster.json(["migrate", "vm1", "--to", target]);
        let number = |field: &str| result[field].as_f64().unwrap_or(f64::NAN);
        let sent = number("bytes_sent");
        runs.throughput.push(sent / 1e6 / (number("total_ms") / 1e3));
        runs.total.push(number("total_ms"));
        runs.downtime.push(number("downtime_ms"));
        runs.cpu.push((cpu_seconds(&cluster) - before) / (sent / f64::from(1u32 << 30)));
        eprintln!("{case}: {}", phases(&result));
    }
    cluster.goes_on("vm1", 5);
    let of = |metric, unit, values: &[f64]| Measurement::of("migrate", case, metric, unit, values);
    report.add(of("throughput_mb_per_s", "MB/s", &runs.throughput).map(|m| ceilings.beside(m)));
    report.add(of("total_ms", "ms", &runs.total));
    report.add(of("downtime_ms", "ms", &runs.downtime));
    report.add(of("cpu_seconds_per_gib", "s", &runs.cpu));
    report.add(of("resident_overhead_mib", "MiB", &overhead));
}

fn wait_until_filled(cluster: &Cluster) {
    let begun = std::time::Instant::now();
    while !cluster.console("vm1").contains("tick ") {
        assert!(begun.elapsed() < super::GUEST_PATIENCE, "the guest does not fill its memory\n{}", cluster.logs());
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

fn phases(result: &serde_json::Value) -> String {
    let phases = result["phases"].as_array().cloned().unwrap_or_default();
    let one = |p: &serde_json::Value| {
        format!("{} {:.1} ms", p["phase"].as_str().unwrap_or("?"), p["ms"].as_f64().unwrap_or(0.0))
    };
    phases.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Memory that this machine gave back to its own host is slow to touch again: touch it before measuring.
fn warm(bytes: u64) {
    let mut memory = vec![0u8; bytes as usize];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    std::hint::black_box(&memory);
}

/// CPU seconds of controller and agents so far. The runners run the guest and are not counted.
fn cpu_seconds(cluster: &Cluster) -> f64 {
    let ticks_per_s = rustix::param::clock_ticks_per_second() as f64;
    let of = |name: &str| -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", cluster.daemon(name))).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
        [11, 12].iter().filter_map(|i| fields.get(*i)?.parse::<f64>().ok()).sum::<f64>() / ticks_per_s
    };
    ["controller", "hostA", "hostB"].into_iter().map(of).sum()
}

/// What agent and runner hold beyond the guest's RAM: all resident memory that is not the shared memfd of RAM.
fn resident_overhead_mib(cluster: &Cluster, host: &str) -> Option<f64> {
    let runner = wait("the guest's runner", || cluster.runner(host, "vm1"));
    let private_kib = |pid: i32| -> Option<f64> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| -> Option<f64> {
            status.lines().find_map(|line| line.strip_prefix(name)?.trim().trim_end_matches(" kB").parse().ok())
        };
        Some(field("RssAnon:")? + field("RssFile:")?)
    };
    // Stamps are shared memory too: 4 bytes a page.
    let stamps_kib = (1u64 << 30) as f64 / 4096.0 * 4.0 / 1024.0;
    Some((private_kib(cluster.daemon(host))? + private_kib(runner)? + stamps_kib) / 1024.0)
}

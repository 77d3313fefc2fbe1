//! `bench checkpoint`: how long a guest stands still, what an increment costs, how fast a guest gets into a bucket and back,
//! and what the controller needs meanwhile; beside what this machine's parts can do and what restic makes of the same RAM.
//!
//! | file | cases |
//! |---|---|
//! | `stops` | `ram-512m`, `ram-1g`, `ram-2g`, `ram-4g` |
//! | `changes` | `incremental-1`, `incremental-5`, `incremental-20` |
//! | `roads` | `first-*`, `restore-*`, `lazy-*`, to a directory (`file`) and to SeaweedFS (`s3`) |
//! | `fleet` | `fleet-20` |
//! | `sweeps` | `sweep-4g` |
//!
//! `first-*` and `restore-*` say too what share they have of what the processors could do at best (`budget`).
//!
//! The guest is the in-tree one, full of pages that no compression makes smaller. Times are measured from outside: from
//! the command to its answer. `--quick` makes guests a sixteenth of the size, to see that all of it works.

mod budget;
mod changes;
mod fleet;
mod image;
mod parts;
mod restic;
mod roads;
mod stops;
mod sweeps;

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{GUEST_PATIENCE, Measurement, Report};
use crate::cluster::Cluster;
use crate::guest::{Program, REGION};

const SUITE: &str = "checkpoint";
/// Each figure is the median of so many.
const RUNS: usize = 3;
const GIB: u64 = 1 << 30;
/// Divides sizes when quick.
const QUICK: u64 = 16;
/// What the guest's RAM holds besides region and shadow table: everything below the region, and some air.
const AIR_BYTES: u64 = REGION + (8 << 20);
const PAGE: u64 = 4096;

/// Which cases, and how large.
pub(crate) struct Suite<'a> {
    report: &'a Report,
    cases: &'a [String],
    quick: bool,
}

/// Runs all cases, or those that are named.
///
/// # Errors
/// A file or a program that cannot be used, or a figure that cannot be had. A cluster that does not work panics with its
/// logs.
pub fn run(report: &Report, cases: &[String], quick: bool) -> Result<(), String> {
    let suite = Suite { report, cases, quick };
    if quick {
        eprintln!("quick: guests are a sixteenth of what the cases' names say; the figures mean nothing");
    }
    stops::run(&suite)?;
    changes::run(&suite)?;
    roads::run(&suite)?;
    fleet::run(&suite)?;
    sweeps::run(&suite)
}

impl Suite<'_> {
    fn wanted(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|c| c == case)
    }

    /// RAM of a guest that is so large when nothing is quick.
    fn ram(&self, bytes: u64) -> u64 {
        if self.quick { bytes / QUICK } else { bytes }
    }

    fn of(&self, case: &str, metric: &'static str, unit: &'static str, runs: &[f64]) -> Option<Measurement> {
        Measurement::of(SUITE, case, metric, unit, runs)
    }

    fn add(&self, case: &str, metric: &'static str, unit: &'static str, runs: &[f64]) {
        self.report.add(self.of(case, metric, unit, runs));
    }
}

/// The guest that fills so much RAM and rewrites so many pages a second.
fn guest(ram_bytes: u64, pages_per_s: u64) -> Program {
    let region = (ram_bytes - AIR_BYTES) / (PAGE + 8) * PAGE;
    Program { start: REGION, region_bytes: region, pages_per_s, tick_ms: 20, tsc_hz: 1_000_000_000 }
}

/// Starts it, and waits until its memory is full.
fn fill(cluster: &Cluster, vm: &str, host: &str, ram_bytes: u64, pages_per_s: u64) -> Program {
    let program = guest(ram_bytes, pages_per_s);
    cluster.create_with(vm, host, program, &["--memory", &ram_bytes.to_string()]);
    until(cluster, "the guest to fill its memory", || cluster.console(vm).contains("tick ").then_some(()));
    program
}

/// Waits as long as a large guest may need.
fn until<T>(cluster: &Cluster, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(begun.elapsed() < GUEST_PATIENCE, "waited {GUEST_PATIENCE:?} for {what}\n{}", cluster.logs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A checkpoint that was taken.
struct Taken {
    id: String,
    /// From the command to its answer.
    total_ms: f64,
    /// The guest stood still.
    stop_ms: f64,
    /// Bytes in the bucket that it alone needs.
    stored: f64,
    /// Bytes that its host sent for it.
    sent: f64,
}

fn take(cluster: &Cluster, host: &str, vm: &str) -> Result<Taken, String> {
    let before = sent_bytes(&cluster.metrics(host))?;
    let (answer, total_ms) = timed(|| cluster.json(["checkpoint", "create", vm]));
    let sent = sent_bytes(&cluster.metrics(host))? - before;
    let number = |field: &str| answer[field].as_f64().ok_or_else(|| format!("no {field} in {answer}"));
    let (stop_ms, stored) = (number("stop_us")? / 1000.0, number("own_bytes")?);
    let id = answer["id"].as_str().ok_or_else(|| format!("no id in {answer}"))?.to_owned();
    Ok(Taken { id, total_ms, stop_ms, stored, sent })
}

/// Removes all checkpoints of the VM: the next one is a first one again.
fn forget(cluster: &Cluster, vm: &str) {
    for checkpoint in cluster.json(["checkpoint", "ls", vm]).as_array().into_iter().flatten() {
        cluster.ok(["checkpoint", "rm", checkpoint["id"].as_str().unwrap_or_default()]);
    }
}

/// What the work gave, and how many milliseconds it took.
fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let begun = Instant::now();
    let done = work();
    (done, begun.elapsed().as_secs_f64() * 1000.0)
}

/// What the work gave, and the most that the controller had resident meanwhile, in MiB.
fn controllers_peak<T>(cluster: &Cluster, work: impl FnOnce() -> T) -> Result<(T, f64), String> {
    let controller = cluster.daemon("controller");
    // From now on the peak is that of this work.
    let forget_peak = format!("/proc/{controller}/clear_refs");
    std::fs::write(&forget_peak, "5").map_err(|e| format!("{forget_peak}: {e}"))?;
    let done = work();
    let status = format!("/proc/{controller}/status");
    let text = std::fs::read_to_string(&status).map_err(|e| format!("{status}: {e}"))?;
    let peak = peak_mib(&text).ok_or_else(|| format!("{status} has no VmHWM"))?;
    Ok((done, peak))
}

/// The most that a process ever had resident, from its `/proc/PID/status`.
fn peak_mib(status: &str) -> Option<f64> {
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"))?;
    Some(kib.trim().parse::<f64>().ok()? / 1024.0)
}

/// Bytes that an agent has sent for checkpoints, from its metrics.
fn sent_bytes(metrics: &str) -> Result<f64, String> {
    let line = metrics.lines().find_map(|line| line.strip_prefix("godwit_agent_sent_bytes_total{kind=\"checkpoint\"}"));
    line.and_then(|value| value.trim().parse().ok()).ok_or_else(|| "the agent does not count what it sends".to_owned())
}

/// Megabytes a second.
fn rate(bytes: u64, ms: f64) -> f64 {
    bytes as f64 / 1e3 / ms
}

/// A figure of `ctl`'s JSON; `None` where this release has none.
fn figure(answer: &Value, field: &str) -> Option<f64> {
    answer[field].as_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_fits_its_ram_and_fills_nearly_all_of_it() {
        for ram in [32 << 20, 64 << 20, 512 << 20, GIB, 2 * GIB, 4 * GIB] {
            let program = guest(ram, 6400);
            assert!(program.memory_bytes() <= ram, "{ram}: {}", program.memory_bytes());
            assert!(program.region_bytes + (28 << 20) + ram / 500 > ram, "{ram}: {}", program.region_bytes);
            program.elf().unwrap();
        }
    }

    #[test]
    fn what_an_agent_sent_for_checkpoints_is_found_among_its_metrics() {
        let page = "# HELP godwit_agent_sent_bytes_total bytes\n\
                    godwit_agent_sent_bytes_total{kind=\"migration\"} 5\n\
                    godwit_agent_sent_bytes_total{kind=\"checkpoint\"} 1234\n";
        assert_eq!(sent_bytes(page), Ok(1234.0));
        assert!(sent_bytes("godwit_agent_info 1\n").is_err());
    }

    #[test]
    fn the_peak_is_read_in_mib() {
        let status = "VmPeak:\t  900000 kB\nVmHWM:\t  262144 kB\nVmRSS:\t   1000 kB\n";
        assert_eq!(peak_mib(status), Some(256.0));
        assert_eq!(peak_mib("VmRSS:\t 1 kB\n"), None);
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(peak_mib(&own).unwrap() > 0.0);
    }

    #[test]
    fn rates_are_megabytes_a_second() {
        assert_eq!(rate(2_000_000, 1000.0), 2.0);
        assert_eq!(rate(GIB, 500.0).round(), 2147.0);
    }

    #[test]
    fn cases_are_chosen_by_name_and_quick_ones_are_small() {
        let report = Report::new(true);
        let named = ["ram-1g".to_owned()];
        let suite = Suite { report: &report, cases: &named, quick: true };
        assert!(suite.wanted("ram-1g") && !suite.wanted("ram-2g"));
        assert_eq!(suite.ram(GIB), 64 << 20);
        assert!(Suite { cases: &[], ..suite }.wanted("ram-2g"));
    }
}

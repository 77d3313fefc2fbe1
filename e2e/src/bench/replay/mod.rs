//! `bench replay`: what recording costs, how long its journal is, and how fast it is gone through again.
//!
//! | file | what |
//! |---|---|
//! | `back` | a recording gone through again: at full speed, backwards, and up to an instant |
//! | `lag` | how far the bucket is behind a recorded guest |
//! | `qemu` | what recording costs QEMU, with the same kernel and loads |
//!
//! Recording is compared pair by pair: the same guest with the same load, once without and once with a recorder, in turns.

mod back;
mod lag;
mod qemu;

use std::path::Path;
use std::time::{Duration, Instant};

use super::recorded::{Files, Guest, Load};
use super::{Measurement, Report};

const PAIRS: usize = 5;
const SUITE: &str = "replay";

/// Runs all cases.
///
/// # Errors
/// A guest that does not do what it should.
pub fn run(report: &Report, guest: &Path, cases: &[String]) -> Result<(), String> {
    let wanted = |case: &str| cases.is_empty() || cases.iter().any(|c| c == case);
    let Some(files) = Files::read(guest) else {
        report.skip(&format!("replay: no kernel in {}; run deploy/guest", guest.display()));
        return Ok(());
    };
    for (case, load) in Load::ALL.into_iter().filter(|(case, _)| wanted(case)) {
        recording(report, &files, case, load)?;
    }
    if wanted("idle") {
        idle(report, &files)?;
    }
    if wanted("back") || wanted("reverse-continue") {
        back::back(report, &files)?;
    }
    if wanted("arrive") {
        back::arrive(report, &files)?;
    }
    if wanted("lag") {
        lag::lag(report)?;
    }
    if wanted("qemu") {
        qemu::loads_recorded(report, guest)?;
    }
    Ok(())
}

/// One run of a load: seconds, and what was recorded.
struct Sample {
    seconds: f64,
    guest_seconds: f64,
    journal_bytes: f64,
}

fn sample(files: &Files, load: Load, record: bool) -> Result<Sample, String> {
    let mut guest = Guest::new(files)?;
    if load != Load::Boot {
        guest.work(Load::Boot)?;
        guest.idle(Duration::from_secs(3))?;
    }
    if record {
        guest.record()?;
    }
    let (begun, tsc) = (Instant::now(), guest.door.machine().tsc());
    guest.work(load)?;
    let seconds = begun.elapsed().as_secs_f64();
    let guest_seconds = (guest.door.machine().tsc() - tsc) as f64 / 1e9;
    let journal_bytes = if record { guest.journal_bytes() as f64 } else { 0.0 };
    Ok(Sample { seconds, guest_seconds, journal_bytes })
}

fn recording(report: &Report, files: &Files, case: &str, load: Load) -> Result<(), String> {
    let (mut with, mut without, mut slower, mut bytes, mut per_minute) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..PAIRS {
        let plain = sample(files, load, false)?;
        let recorded = sample(files, load, true)?;
        slower.push((recorded.seconds / plain.seconds - 1.0) * 100.0);
        bytes.push(recorded.journal_bytes);
        per_minute.push(recorded.journal_bytes / 1024.0 / (recorded.guest_seconds / 60.0));
        with.push(recorded.seconds);
        without.push(plain.seconds);
    }
    let measured = Measurement::of(SUITE, case, "seconds_recorded", "s", &with);
    report.add(measured.map(|m| m.beside("not_recorded", &without)));
    report.add(Measurement::of(SUITE, case, "slowdown", "%", &slower));
    report.add(Measurement::of(SUITE, case, "journal_bytes", "B", &bytes));
    report.add(Measurement::of(SUITE, case, "journal_per_guest_minute", "KiB", &per_minute));
    Ok(())
}

/// A guest at its shell for ten minutes of its time.
fn idle(report: &Report, files: &Files) -> Result<(), String> {
    let minutes = 10;
    let mut guest = Guest::new(files)?;
    guest.work(Load::Boot)?;
    guest.idle(Duration::from_secs(3))?;
    guest.record()?;
    guest.idle(Duration::from_secs(minutes * 60))?;
    let per_minute = guest.journal_bytes() as f64 / 1024.0 / minutes as f64;
    report.add(Measurement::of(SUITE, "idle", "journal_per_guest_minute", "KiB", &[per_minute]));
    Ok(())
}

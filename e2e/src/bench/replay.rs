//! `bench replay`: what recording costs, how long its journal is, and how fast it is gone through again.
//!
//! Recording is compared pair by pair: the same guest with the same load, once without and once with a recorder, in turns.
//! Beside the boot: QEMU with and without `-icount ...,rr=record`, the same kernel, where there is a QEMU.

use std::path::Path;
use std::time::{Duration, Instant};

use vmcb_engine::engine::{Stops, WatchKind, Watchpoint};
use vmcb_engine::journal::Chain;
use vmcb_engine::machine::Machine;
use vmcb_engine::replay::{Arrival, Goal, Pause, Player, Rate, Spacing, Tape, Timeline};

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
    if wanted("back") {
        back(report, &files)?;
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

/// A shell that works, for 10 s of its time, gone through again: at full speed, and backwards.
fn back(report: &Report, files: &Files) -> Result<(), String> {
    let mut guest = Guest::new(files)?;
    guest.work(Load::Boot)?;
    guest.idle(Duration::from_secs(3))?;
    guest.record()?;
    let (base, other) = (guest.copy()?, guest.copy()?);
    let begun = Instant::now();
    guest.type_in("while :; do for f in /bin/*; do [ -x $f ] && n=$((n+1)); done; cat /proc/stat > /tmp/s; done\n")?;
    guest.idle(Duration::from_secs(10))?;
    let recorded = begun.elapsed().as_secs_f64();
    let frames = guest.journal()[2..].to_vec();

    let mut player = player(other, &frames)?;
    let begun = Instant::now();
    let end = player.run_to(Goal::instruction(u64::MAX), &mut || false).map_err(|e| e.to_string())?;
    let replayed = begun.elapsed().as_secs_f64();
    if end != Pause::End {
        return Err(format!("the replay ended otherwise: {end:?}"));
    }
    drop(player);
    let speed = Measurement::of(SUITE, "back", "replay_seconds", "s", &[replayed]);
    report.add(speed.map(|m| m.beside("recorded_in", &[recorded])));
    timeline(report, self::player(base, &frames)?)
}

fn player(machine: Machine, frames: &[Vec<u8>]) -> Result<Player, String> {
    let mut chain = Chain::new();
    let mut tape = Tape::new(Rate::of(machine.config()));
    for frame in frames {
        let block = chain.take(frame).map_err(|e| e.to_string())?;
        tape.push(block).map_err(|e| e.to_string())?;
    }
    Player::new(machine, tape.into(), None).map_err(|e| e.to_string())
}

fn timeline(report: &Report, player: Player) -> Result<(), String> {
    let text = |e: vmcb_engine::replay::TimelineError| e.to_string();
    let end = player.tape().end();
    let mut timeline = Timeline::new(player, Spacing::default()).map_err(text)?;
    let begun = Instant::now();
    timeline.seek(end, &mut || false).map_err(text)?;
    let laid = begun.elapsed().as_secs_f64();
    report.add(Measurement::of(SUITE, "back", "rungs_laid_seconds", "s", &[laid]));
    let (rungs, bytes) = timeline.rungs();
    report.add(Measurement::of(SUITE, "back", "rungs", "1", &[rungs as f64]));
    report.add(Measurement::of(SUITE, "back", "rung_bytes", "B", &[bytes as f64]));
    let mut steps = Vec::new();
    for _ in 0..50 {
        let begun = Instant::now();
        timeline.reverse_step(0, &mut || false).map_err(text)?;
        steps.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    report.add(Measurement::of(SUITE, "back", "reverse_step", "ms", &steps));
    // Nothing is ever executed there: all of it is searched.
    let nowhere = Stops { breakpoints: vec![0xffff_ffff_8000_0ff1], watchpoints: Vec::new() };
    let begun = Instant::now();
    let arrival = timeline.reverse_continue(&nowhere, &mut || false).map_err(text)?;
    let all = begun.elapsed().as_secs_f64();
    if arrival != Arrival::Start {
        return Err(format!("a breakpoint on nothing was met: {arrival:?}"));
    }
    report.add(Measurement::of(SUITE, "back", "reverse_continue_all", "s", &[all]));
    timeline.seek(end, &mut || false).map_err(text)?;
    let stack = timeline.player().machine().peek_cpu(0).map_or(0, |cpu| cpu.gprs[4]);
    let watchpoints = vec![Watchpoint { address: stack, bytes: 8, kind: WatchKind::Write }];
    let begun = Instant::now();
    timeline.reverse_continue(&Stops { breakpoints: Vec::new(), watchpoints }, &mut || false).map_err(text)?;
    let hit = begun.elapsed().as_secs_f64() * 1e3;
    report.add(Measurement::of(SUITE, "back", "reverse_continue_to_write", "ms", &[hit]));
    Ok(())
}

//! A recording gone through again: at full speed, with rungs, step by step and search by search backwards, and by a machine
//! that goes through it before it runs, as a restore to an instant does.

use std::time::{Duration, Instant};

use vmcb_engine::engine::{Stops, WatchKind, Watchpoint, Why};
use vmcb_engine::journal::{Chain, Position};
use vmcb_engine::machine::Machine;
use vmcb_engine::replay::{Arrival, Door, Goal, Pause, Player, Rate, Spacing, Tape, Timeline};

use super::SUITE;
use crate::bench::recorded::{Files, Guest, Load};
use crate::bench::{Measurement, Report};

/// A shell that forks as long as it is let.
const WORK: &str = "while :; do for f in /bin/*; do [ -x $f ] && n=$((n+1)); done; cat /proc/stat > /tmp/s; done\n";
/// Guest time of the recording.
const SPAN: Duration = Duration::from_secs(10);
/// Seconds that a search through it may take.
const SEARCH_AIM_S: f64 = 5.0;
/// Host time between two checkpoints, and what a restore to an instant between them may take.
const INTERVAL: Duration = Duration::from_secs(60);
/// Searches of each kind.
const SEARCHES: usize = 3;
/// Instants at whose places are searched.
const SAMPLES: u64 = 60;
/// A place that is used more often than this in its first part of the recording is none that was used long ago.
const HITS_MAX: usize = 200;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A guest at its shell that is recorded and works.
fn working(files: &Files) -> Result<(Guest, [Machine; 2]), String> {
    let mut guest = Guest::new(files)?;
    guest.work(Load::Boot)?;
    guest.idle(Duration::from_secs(3))?;
    guest.record()?;
    let copies = [guest.copy()?, guest.copy()?];
    guest.type_in(WORK)?;
    Ok((guest, copies))
}

/// 10 s of a guest's time, gone through again: at full speed, and backwards.
pub fn back(report: &Report, files: &Files) -> Result<(), String> {
    let begun = Instant::now();
    let (mut guest, [base, other]) = working(files)?;
    guest.idle(SPAN)?;
    let recorded = begun.elapsed().as_secs_f64();
    // From the segment on that begins with the last copy.
    let frames = guest.journal()[2..].to_vec();

    let mut player = player(other, &frames)?;
    let begun = Instant::now();
    let end = player.run_to(Goal::instruction(u64::MAX), &mut || false).map_err(text)?;
    let replayed = begun.elapsed().as_secs_f64();
    if end != Pause::End {
        return Err(format!("the replay ended otherwise: {end:?}"));
    }
    drop(player);
    let speed = Measurement::of(SUITE, "back", "replay_seconds", "s", &[replayed]);
    report.add(speed.map(|m| m.beside("recorded_in", &[recorded])));
    let mut timeline = laid(report, self::player(base, &frames)?)?;
    steps(report, &mut timeline)?;
    searches(report, &mut timeline)
}

fn player(machine: Machine, frames: &[Vec<u8>]) -> Result<Player, String> {
    let mut chain = Chain::new();
    let mut tape = Tape::new(Rate::of(machine.config()));
    for frame in frames {
        let block = chain.take(frame).map_err(text)?;
        tape.push(block).map_err(text)?;
    }
    Player::new(machine, tape.into(), None).map_err(text)
}

/// A timeline at its end.
fn laid(report: &Report, player: Player) -> Result<Timeline, String> {
    let end = player.tape().end();
    let mut timeline = Timeline::new(player, Spacing::default()).map_err(text)?;
    let begun = Instant::now();
    timeline.seek(end, &mut || false).map_err(text)?;
    let laid = begun.elapsed().as_secs_f64();
    report.add(Measurement::of(SUITE, "back", "rungs_laid_seconds", "s", &[laid]));
    let (rungs, bytes) = timeline.rungs();
    report.add(Measurement::of(SUITE, "back", "rungs", "1", &[rungs as f64]));
    report.add(Measurement::of(SUITE, "back", "rung_bytes", "B", &[bytes as f64]));
    Ok(timeline)
}

fn steps(report: &Report, timeline: &mut Timeline) -> Result<(), String> {
    let mut step = |count| {
        let mut steps = Vec::new();
        for _ in 0..count {
            let begun = Instant::now();
            timeline.reverse_step(0, &mut || false).map_err(text)?;
            steps.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        Ok::<_, String>(steps)
    };
    let first = step(1)?;
    report.add(Measurement::of(SUITE, "back", "reverse_step_first", "ms", &first).map(|m| m.beside("aim", &[100.0])));
    let more = step(50)?;
    report.add(Measurement::of(SUITE, "back", "reverse_step", "ms", &more).map(|m| m.beside("aim", &[100.0])));
    Ok(())
}

/// Searches from the end backwards, each through all of the recording.
fn searches(report: &Report, timeline: &mut Timeline) -> Result<(), String> {
    let [breakpoints, watchpoints] = used_long_ago(timeline)?;
    let add = |metric, seconds: &[f64]| {
        let measured = Measurement::of(SUITE, "reverse-continue", metric, "s", seconds);
        report.add(measured.map(|m| m.beside("aim", &[SEARCH_AIM_S])));
    };
    for (metric, searched) in [("breakpoint_long_ago", breakpoints), ("watchpoint_long_ago", watchpoints)] {
        let found: Result<Vec<f64>, String> =
            searched.iter().take(SEARCHES).map(|stops| search(timeline, stops, true)).collect();
        let found = found?;
        if found.is_empty() {
            report.skip(&format!("{metric}: no place was used at the beginning only"));
        }
        add(metric, &found);
    }
    // Nothing is ever executed there.
    let nowhere = Stops { breakpoints: vec![0xffff_ffff_8000_0ff1], watchpoints: Vec::new() };
    add("breakpoint_on_nothing", &[search(timeline, &nowhere, false)?]);
    // Within an instruction that is executed all the time.
    let end = timeline.player().tape().end();
    timeline.seek(end, &mut || false).map_err(text)?;
    let within = timeline.player().machine().stands_at(0).unwrap_or(0) + 1;
    let within = Stops { breakpoints: vec![within], watchpoints: Vec::new() };
    add("breakpoint_in_a_busy_page", &[search(timeline, &within, false)?]);
    timeline.seek(end, &mut || false).map_err(text)?;
    let stack = timeline.player().machine().peek_cpu(0).map_or(0, |cpu| cpu.gprs[4]);
    add("write_a_moment_ago", &[search(timeline, &watching(stack), true)?]);
    // In the page that is loaded from most, something that is not.
    let beside = watching_loads(stack & !0xfff | stack.wrapping_add(0x800) & 0xfc0);
    add("load_in_a_busy_page", &[seconds_of(timeline, &beside)?.0]);
    Ok(())
}

fn watching_loads(address: u64) -> Stops {
    let watchpoints = vec![Watchpoint { address, bytes: 8, kind: WatchKind::Read }];
    Stops { breakpoints: Vec::new(), watchpoints }
}

fn watching(address: u64) -> Stops {
    let watchpoints = vec![Watchpoint { address, bytes: 8, kind: WatchKind::Write }];
    Stops { breakpoints: Vec::new(), watchpoints }
}

/// Seconds of one search from the end, and where it ended.
fn seconds_of(timeline: &mut Timeline, stops: &Stops) -> Result<(f64, Arrival), String> {
    let end = timeline.player().tape().end();
    timeline.seek(end, &mut || false).map_err(text)?;
    let begun = Instant::now();
    let arrival = timeline.reverse_continue(stops, &mut || false).map_err(text)?;
    Ok((begun.elapsed().as_secs_f64(), arrival))
}

/// Seconds of one search from the end, of which it is known whether there is anything to find.
fn search(timeline: &mut Timeline, stops: &Stops, met: bool) -> Result<f64, String> {
    let (seconds, arrival) = seconds_of(timeline, stops)?;
    match arrival {
        Arrival::Hit(_) if met => Ok(seconds),
        Arrival::Start if !met => Ok(seconds),
        other => Err(format!("{stops:?}: {other:?}")),
    }
}

/// Places that were executed, and others that were written, in the first tenth of the recording and never after it.
fn used_long_ago(timeline: &mut Timeline) -> Result<[Vec<Stops>; 2], String> {
    let (start, end) = (timeline.start(), timeline.player().tape().end());
    let tenth = (end.retired - start.retired) / 10;
    let at = |retired| Position { retired, skipped_tsc: 0 };
    let mut all = Stops::default();
    for sample in 0..SAMPLES {
        // The first tenth of the tenth: where the command was typed.
        timeline.seek(at(start.retired + sample * tenth / 10 / SAMPLES), &mut || false).map_err(text)?;
        let machine = timeline.player().machine();
        let Some(cpu) = machine.peek_cpu(0) else { continue };
        all.breakpoints.push(cpu.code_address());
        let pointers = cpu.gprs.iter().filter(|gpr| machine.translate(0, **gpr).is_some());
        all.watchpoints.extend(pointers.flat_map(|gpr| watching(*gpr & !7).watchpoints));
    }
    timeline.seek(start, &mut || false).map_err(text)?;
    let mut hits = met(timeline, &mut all.clone(), at(start.retired + tenth), HITS_MAX)?;
    all.breakpoints.retain(|it| (1..HITS_MAX).contains(&hits.iter().filter(|hit| is_of(hit, *it)).count()));
    hits.dedup();
    all.watchpoints.retain(|it| hits.iter().any(|hit| matches!(hit, Why::Watchpoint { watched, .. } if watched == it)));
    met(timeline, &mut all, end, 1)?;
    let breakpoints = all.breakpoints.iter().map(|it| Stops { breakpoints: vec![*it], watchpoints: Vec::new() });
    let watchpoints = all.watchpoints.iter().map(|it| Stops { breakpoints: Vec::new(), watchpoints: vec![*it] });
    Ok([breakpoints.collect(), watchpoints.collect()])
}

fn is_of(hit: &Why, breakpoint: u64) -> bool {
    matches!(hit, Why::Breakpoint { address } if *address == breakpoint)
}

/// What is met up to a position; a stop that was met so many times is taken out.
fn met(timeline: &mut Timeline, stops: &mut Stops, until: Position, most: usize) -> Result<Vec<Why>, String> {
    let mut hits: Vec<Why> = Vec::new();
    loop {
        match timeline.continue_until(stops, until, &mut || false).map_err(text)? {
            Arrival::Hit(hit) => {
                let same = |why: &&Why| match (why, &hit.why) {
                    (Why::Breakpoint { address: a }, Why::Breakpoint { address: b }) => a == b,
                    (Why::Watchpoint { watched: a, .. }, Why::Watchpoint { watched: b, .. }) => a == b,
                    _ => false,
                };
                hits.push(hit.why);
                if hits.iter().filter(same).count() >= most {
                    match hit.why {
                        Why::Breakpoint { address } => stops.breakpoints.retain(|it| *it != address),
                        Why::Watchpoint { watched, .. } => stops.watchpoints.retain(|it| *it != watched),
                    }
                }
            }
            _ => return Ok(hits),
        }
    }
}

/// A machine goes through a whole interval between two checkpoints before it runs: the longest that a restore to an instant
/// waits for a replay.
pub fn arrive(report: &Report, files: &Files) -> Result<(), String> {
    let (mut guest, [base, _]) = working(files)?;
    let begun = Instant::now();
    while begun.elapsed() < INTERVAL {
        guest.idle(Duration::from_millis(100))?;
    }
    let until = guest.door.position();
    let frames = guest.journal()[1..].to_vec();
    let mut door = Door::new(base);
    for frame in &frames {
        door.expect(frame).map_err(text)?;
    }
    let begun = Instant::now();
    door.arrive_at(until, None).map_err(text)?;
    while !door.arrive().map_err(text)? {}
    let seconds = begun.elapsed().as_secs_f64();
    if door.position() != until {
        return Err(format!("it arrived at {} instead of {until}", door.position()));
    }
    let measured = Measurement::of(SUITE, "arrive", "replay_seconds", "s", &[seconds]);
    report.add(measured.map(|m| m.beside("recorded_in", &[INTERVAL.as_secs_f64()]).beside("aim", &[60.0])));
    Ok(())
}

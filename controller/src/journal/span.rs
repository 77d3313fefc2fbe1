//! Which instants of a VM can be visited, and from which checkpoint. Pure.
//!
//! A recording can be visited from the first segment on that a checkpoint belongs to, up to where blocks are missing or the
//! newest block ends. Between the ends of two blocks time is taken to have passed evenly: as many ticks of the TSC, retired
//! or idle, in each nanosecond.

use jiff::Timestamp;
use proto::status::Code;
use proto::v1::Position;
use proto::v1::recorded_instant::At;

use super::chain::Block;
use super::segment::{Segment, Tape};
use crate::failure::Failure;

/// A recording, and the checkpoint that each of its segments begins with, if it is one.
pub struct Visited {
    /// Hex of its id.
    pub recording: String,
    /// What lies there.
    pub tape: Tape,
    /// Ids of checkpoints, by segment.
    pub bases: Vec<Option<String>>,
}

/// Where a replay begins and where it should end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visit {
    /// Index of the recording.
    pub recording: usize,
    /// Index of the segment to begin with.
    pub base: usize,
    /// Index of the segment in which the instant lies.
    pub target: usize,
    /// Index of the last segment that follows without a gap.
    pub last: usize,
    /// The checkpoint.
    pub checkpoint: String,
}

/// Whether a segment reaches an instant.
fn reaches(segment: &Segment, at: At) -> bool {
    match at {
        At::UnixNs(ns) => segment.end_ns >= ns,
        At::Instruction(count) => segment.end.retired >= count,
    }
}

/// Whether an instant is not before a segment.
fn begins_by(segment: &Segment, at: At) -> bool {
    match at {
        // People say moments to the millisecond, as they are told to them.
        At::UnixNs(ns) => segment.start_ns / 1_000_000 <= ns / 1_000_000,
        At::Instruction(count) => segment.start.retired <= count,
    }
}

/// Whether a block reaches an instant.
pub fn reached(block: &Block, at: At) -> bool {
    match at {
        At::UnixNs(ns) => block.message.realtime_ns >= ns,
        At::Instruction(count) => block.end().retired >= count,
    }
}

/// Segments of a tape that follow each other without a gap: first and last index.
fn runs(tape: &Tape) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (number, segment) in tape.segments.iter().enumerate() {
        match runs.last_mut() {
            Some((_, last)) if tape.segments[*last].next == segment.first => *last = number,
            _ => runs.push((number, number)),
        }
    }
    runs
}

/// Parts of a recording that can be visited: index of the segment to begin with, and of the last one.
fn visitable(visited: &Visited) -> impl Iterator<Item = (usize, usize)> {
    let based = |(from, to): (usize, usize)| Some(((from..=to).find(|at| visited.bases[*at].is_some())?, to));
    runs(&visited.tape).into_iter().filter_map(based)
}

/// Finds an instant; `recordings` are the newest first.
///
/// # Errors
/// [`Code::NotFound`] naming what can be visited.
pub fn find(vm: &str, recordings: &[Visited], at: At) -> Result<Visit, Failure> {
    for (recording, visited) in recordings.iter().enumerate() {
        let segments = &visited.tape.segments;
        for (from, last) in visitable(visited).collect::<Vec<_>>().into_iter().rev() {
            let based = |number: &usize| visited.bases[*number].is_some() && begins_by(&segments[*number], at);
            let Some(base) = (from..=last).rev().find(based) else { continue };
            let Some(target) = (base..=last).find(|number| reaches(&segments[*number], at)) else { continue };
            let checkpoint = visited.bases[base].clone().unwrap_or_default();
            return Ok(Visit { recording, base, target, last, checkpoint });
        }
    }
    let text = format!("{} of {vm} was not recorded: {}", words(at), told(recordings));
    Err(Failure::new(Code::NotFound, text).hint(format!("`ctl record ls {vm}` shows what can be visited")))
}

/// Where the replay of a checkpoint begins, whose instant is its end, too.
pub fn find_checkpoint(recordings: &[Visited], checkpoint: &str) -> Option<Visit> {
    recordings.iter().enumerate().find_map(|(recording, visited)| {
        let base = visited.bases.iter().position(|base| base.as_deref() == Some(checkpoint))?;
        let (_, last) = runs(&visited.tape).into_iter().find(|(from, to)| (*from..=*to).contains(&base))?;
        Some(Visit { recording, base, target: base, last, checkpoint: checkpoint.to_owned() })
    })
}

/// Which spans of time can be visited, for people.
pub fn told(recordings: &[Visited]) -> String {
    let span = |visited: &Visited| -> Vec<String> {
        let segment = |number: usize| &visited.tape.segments[number];
        let words = |(from, to): (usize, usize)| {
            let (first, last) = (segment(from), segment(to));
            let (from_ns, to_ns) = (moment(first.start_ns), moment(last.end_ns));
            format!("{from_ns} to {to_ns} (instructions {} to {})", first.start.retired, last.end.retired)
        };
        visitable(visited).map(words).collect()
    };
    let spans: Vec<String> = recordings.iter().rev().flat_map(span).collect();
    match spans.is_empty() {
        true => "nothing of it can be visited".into(),
        false => format!("what can be visited is {}", spans.join(", ")),
    }
}

fn words(at: At) -> String {
    match at {
        At::UnixNs(ns) => moment(ns),
        At::Instruction(count) => format!("instruction {count}"),
    }
}

/// A moment for people: RFC 3339, to the millisecond.
pub fn moment(unix_ns: u64) -> String {
    let stamp = Timestamp::from_nanosecond(unix_ns.into());
    stamp.map_or_else(|_| format!("{unix_ns} ns"), |stamp| format!("{stamp:.3}"))
}

/// The position at an instant inside of a block that began at `before_ns`.
pub fn position(block: &Block, before_ns: u64, at: At) -> Position {
    let (start, end) = (block.start(), block.end());
    // A machine that stood still went on later than the block before had ended.
    let before_ns = before_ns.max(block.message.start_realtime_ns);
    let (part, whole) = match at {
        At::UnixNs(ns) => (ns.saturating_sub(before_ns), block.message.realtime_ns.saturating_sub(before_ns)),
        At::Instruction(count) => (count.saturating_sub(start.retired), end.retired.saturating_sub(start.retired)),
    };
    let between = |from: u64, to: u64| {
        let way = u128::from(to.saturating_sub(from)) * u128::from(part.min(whole)) / u128::from(whole.max(1));
        // Never more than `to - from`.
        if whole == 0 { to } else { from + way as u64 }
    };
    Position { retired: between(start.retired, end.retired), skipped_tsc: between(start.skipped_tsc, end.skipped_tsc) }
}

#[cfg(test)]
mod tests {
    use super::super::chain::tests::{RECORDING, Recorder};
    use super::super::chain::{Head, check};
    use super::super::segment::pieces;
    use super::*;

    /// Three segments of three blocks, of one second each, of which the second has no checkpoint.
    fn visited(recording: &str, began_s: u64) -> Visited {
        let mut recorder = Recorder { now_ns: began_s * 1_000_000_000, ..Recorder::new(RECORDING) };
        let frames: Vec<_> = (0..9).map(|n| if n % 3 == 0 { recorder.cut(n) } else { recorder.block() }).collect();
        let blocks = check(RECORDING, Some(&Head::first()), frames).unwrap();
        let mut tape = Tape::default();
        pieces(&blocks).for_each(|piece| _ = tape.grow(piece, 10));
        tape.segments[0].start_ns = began_s * 1_000_000_000;
        Visited { recording: recording.into(), tape, bases: vec![Some("c0".into()), None, Some("c2".into())] }
    }

    fn seconds(s: u64) -> At {
        At::UnixNs(s * 1_000_000_000)
    }

    #[test]
    fn the_newest_checkpoint_before_an_instant_is_the_base() {
        let all = [visited("b", 2000), visited("a", 1000)];
        let place = |at| find("vm1", &all, at).map(|visit| (visit.recording, visit.base, visit.target, visit.last));
        assert_eq!(place(seconds(1000)), Ok((1, 0, 0, 2)));
        assert_eq!(place(seconds(1005)), Ok((1, 0, 1, 2)));
        assert_eq!(place(seconds(1006)), Ok((1, 2, 2, 2)));
        assert_eq!(place(seconds(2009)), Ok((0, 2, 2, 2)));
        // Both recordings count from the same instruction: the newer one is meant.
        assert_eq!(place(At::Instruction(4_500_000)), Ok((0, 0, 1, 2)));
        for outside in [seconds(999), seconds(1500), seconds(2010), At::Instruction(999), At::Instruction(9_001_001)] {
            let failure = place(outside).unwrap_err();
            assert_eq!(failure.code, Code::NotFound);
            assert!(failure.message.contains("1970-01-01T00:16:40.000Z to 1970-01-01T00:16:49.000Z"), "{failure}");
        }
        assert_eq!(find_checkpoint(&all[1..], "c2").map(|visit| (visit.base, visit.last)), Some((2, 2)));
        assert_eq!(find_checkpoint(&all, "c1"), None);
    }

    #[test]
    fn what_lies_before_a_gap_leads_nowhere_behind_it() {
        let mut holed = visited("a", 1000);
        holed.tape.segments.remove(1);
        holed.bases.remove(1);
        let place = |at| find("vm1", std::slice::from_ref(&holed), at).map(|visit| (visit.base, visit.last));
        assert_eq!(place(seconds(1002)), Ok((0, 0)));
        assert_eq!(place(seconds(1008)), Ok((1, 1)));
        assert_eq!(place(seconds(1004)).unwrap_err().code, Code::NotFound);
        let nothing = Visited { bases: vec![None; 3], ..visited("a", 1000) };
        let failure = find("vm1", &[nothing], seconds(1002)).unwrap_err();
        assert!(failure.message.contains("nothing of it can be visited"), "{failure}");
    }

    #[test]
    fn time_passes_evenly_inside_of_a_block() {
        let mut recorder = Recorder::new(RECORDING);
        let block = check(RECORDING, None, [recorder.cut(1)]).unwrap().remove(0);
        let (from, to) = (block.message.realtime_ns - 1_000_000_000, block.message.realtime_ns);
        let at = |ns| position(&block, from, At::UnixNs(ns));
        assert_eq!((at(from), at(to)), (block.start(), block.end()));
        assert_eq!(at(from + 250_000_000), Position { retired: 251_000, skipped_tsc: 125 });
        assert_eq!((at(0), at(u64::MAX)), (block.start(), block.end()));
        // A clock that stood still or went back.
        assert_eq!(position(&block, to + 5, At::UnixNs(to)), block.end());
        let there = position(&block, from, At::Instruction(501_000));
        assert_eq!(there, Position { retired: 501_000, skipped_tsc: 250 });
    }
}

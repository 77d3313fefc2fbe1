//! A recording as a replay needs it: what happened, in order, and what time it was for people. It refuses to know machines.

use proto::v1::MachineConfig;

use crate::journal::{Block, Cut, Event, Position};

/// Something that happened to the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Happening {
    /// It entered from outside.
    Event(Event),
    /// The machine was captured, and a segment began.
    Cut(Cut),
}

/// When something happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Before the instruction that is retired next here.
    pub position: Position,
    /// What.
    pub happening: Happening,
}

/// What the wall clock of the recording host said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Mark {
    tsc: u64,
    realtime_ns: u64,
}

/// Why blocks make no tape.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TapeError {
    /// A time that no machine reaches.
    #[error("block {sequence} ends at {end}: no machine runs for so long")]
    Time {
        /// Which block.
        sequence: u64,
        /// Where it says that it ends.
        end: Position,
    },
}

/// How guest time passes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// TSC ticks an instruction.
    pub tsc_per_instruction: u32,
    /// TSC ticks a second.
    pub tsc_hz: u64,
}

impl Rate {
    /// In a machine of this configuration.
    pub fn of(config: &MachineConfig) -> Self {
        Self { tsc_per_instruction: config.tsc_per_instruction, tsc_hz: config.tsc_hz }
    }

    /// TSC at a position; `None` if no machine gets there.
    pub fn tsc(&self, position: Position) -> Option<u64> {
        let busy = position.retired.checked_mul(self.tsc_per_instruction.into())?;
        busy.checked_add(position.skipped_tsc).filter(|tsc| *tsc < 1 << 62)
    }

    fn ns(&self, ticks: u64) -> u64 {
        let ns = u128::from(ticks) * 1_000_000_000 / u128::from(self.tsc_hz.max(1));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    fn ticks(&self, ns: u64) -> u64 {
        let ticks = u128::from(ns) * u128::from(self.tsc_hz) / 1_000_000_000;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }
}

/// All of a recording from one of its segments on.
#[derive(Clone, Debug)]
pub struct Tape {
    rate: Rate,
    start: Position,
    end: Position,
    entries: Vec<Entry>,
    marks: Vec<Mark>,
    ended: String,
}

impl Tape {
    /// Nothing yet; the first block says where it begins.
    pub fn new(rate: Rate) -> Self {
        let start = Position::default();
        Self { rate, start, end: start, entries: Vec::new(), marks: Vec::new(), ended: String::new() }
    }

    /// Appends a block, which a [`crate::journal::Chain`] has checked.
    ///
    /// # Errors
    /// It says that the machine ran for longer than any machine does; nothing has changed then.
    pub fn push(&mut self, block: Block) -> Result<(), TapeError> {
        let Block { sequence, start, end, start_realtime_ns, realtime_ns, cut, events, ended } = block;
        let tsc = self.rate.tsc(end).ok_or(TapeError::Time { sequence, end })?;
        let start_tsc = self.rate.tsc(start).unwrap_or(0);
        let begun = match (start_realtime_ns, self.marks.is_empty()) {
            (0, true) => Some(realtime_ns.saturating_sub(self.rate.ns(tsc.saturating_sub(start_tsc)))),
            (0, false) => None,
            (said, _) => Some(said),
        };
        if self.marks.is_empty() {
            self.start = start;
        }
        // A machine that stood still went on later than it had stopped.
        if let Some(begun) = begun {
            let realtime_ns = self.marks.last().map_or(begun, |before| before.realtime_ns.max(begun));
            self.marks.push(Mark { tsc: start_tsc, realtime_ns });
        }
        let realtime_ns = self.marks.last().map_or(realtime_ns, |before| before.realtime_ns.max(realtime_ns));
        self.marks.push(Mark { tsc, realtime_ns });
        self.end = end;
        self.ended = ended;
        self.entries.extend(cut.map(|cut| Entry { position: start, happening: Happening::Cut(cut) }));
        let events = events.into_iter();
        self.entries.extend(
            events.map(|stamped| Entry { position: stamped.position, happening: Happening::Event(stamped.event) }),
        );
        Ok(())
    }

    /// How guest time passes.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Where it begins.
    pub fn start(&self) -> Position {
        self.start
    }

    /// Everything until here is known.
    pub fn end(&self) -> Position {
        self.end
    }

    /// Why the recording ends; empty: it went on, or nobody could say.
    pub fn ended(&self) -> &str {
        &self.ended
    }

    /// What happened, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Unix nanoseconds of the recording host when the guest's TSC stood there, between the instants at which it was noted.
    pub fn realtime_ns(&self, tsc: u64) -> u64 {
        let after = self.marks.partition_point(|mark| mark.tsc <= tsc);
        match (after.checked_sub(1).map(|at| self.marks[at]), self.marks.get(after)) {
            (Some(before), Some(after)) => {
                let (span, time) = (after.tsc - before.tsc, after.realtime_ns - before.realtime_ns);
                let part = u128::from(tsc - before.tsc) * u128::from(time) / u128::from(span.max(1));
                before.realtime_ns + part as u64
            }
            (Some(last), None) => last.realtime_ns.saturating_add(self.rate.ns(tsc - last.tsc)),
            (None, Some(first)) => first.realtime_ns.saturating_sub(self.rate.ns(first.tsc - tsc)),
            (None, None) => 0,
        }
    }

    /// The guest's TSC when the recording host's clock said this; `None` outside of the recording.
    pub fn tsc_at(&self, realtime_ns: u64) -> Option<u64> {
        let (first, last) = (self.marks.first()?, self.marks.last()?);
        if realtime_ns < first.realtime_ns || realtime_ns > last.realtime_ns {
            return None;
        }
        let after = self.marks.partition_point(|mark| mark.realtime_ns <= realtime_ns);
        let before = self.marks[after - 1];
        let Some(after) = self.marks.get(after) else { return Some(before.tsc) };
        let (span, time) = (after.tsc - before.tsc, after.realtime_ns - before.realtime_ns);
        let part = u128::from(realtime_ns - before.realtime_ns) * u128::from(span) / u128::from(time.max(1));
        Some(before.tsc + part as u64)
    }

    /// Unix nanoseconds at its beginning and its end.
    pub fn span_ns(&self) -> (u64, u64) {
        let ns = |mark: Option<&Mark>| mark.map_or(0, |mark| mark.realtime_ns);
        (ns(self.marks.first()), ns(self.marks.last()))
    }

    /// TSC ticks of so many nanoseconds.
    pub fn ticks(&self, ns: u64) -> u64 {
        self.rate.ticks(ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { tsc_per_instruction: 2, tsc_hz: 1_000_000_000 };

    fn block(sequence: u64, start: u64, end: u64, realtime_ns: u64) -> Block {
        let at = |retired| Position { retired, skipped_tsc: 0 };
        let (start, end) = (at(start), at(end));
        let (cut, events, ended) = (None, vec![], String::new());
        Block { sequence, start, end, start_realtime_ns: 0, realtime_ns, cut, events, ended }
    }

    #[test]
    fn a_machine_that_stood_still_was_where_it_stopped() {
        let mut tape = Tape::new(RATE);
        tape.push(Block { start_realtime_ns: 9_500, ..block(0, 100, 600, 10_000) }).unwrap();
        tape.push(Block { start_realtime_ns: 50_000, ..block(1, 600, 700, 50_200) }).unwrap();
        assert_eq!(tape.span_ns(), (9_500, 50_200));
        for realtime_ns in [10_000, 10_001, 30_000, 50_000] {
            assert_eq!(tape.tsc_at(realtime_ns), Some(1200), "{realtime_ns}");
        }
        assert_eq!((tape.tsc_at(9_750), tape.tsc_at(50_100)), (Some(700), Some(1300)));
        assert_eq!((tape.realtime_ns(1200), tape.realtime_ns(1300)), (50_000, 50_100));
    }

    #[test]
    fn wall_clock_and_guest_time_lead_to_each_other() {
        let mut tape = Tape::new(RATE);
        tape.push(block(0, 100, 600, 10_000)).unwrap();
        // The host was slower than the guest's clock.
        tape.push(block(1, 600, 700, 20_000)).unwrap();
        assert_eq!(tape.span_ns(), (9_000, 20_000));
        for (tsc, realtime_ns) in [(200, 9_000), (700, 9_500), (1200, 10_000), (1300, 15_000), (1400, 20_000)] {
            assert_eq!(tape.realtime_ns(tsc), realtime_ns, "{tsc}");
            assert_eq!(tape.tsc_at(realtime_ns), Some(tsc), "{realtime_ns}");
        }
        assert_eq!((tape.tsc_at(8_999), tape.tsc_at(20_001)), (None, None));
    }

    #[test]
    fn times_that_no_machine_reaches_are_refused() {
        let mut tape = Tape::new(RATE);
        assert!(matches!(tape.push(block(0, 0, 1 << 62, 5)), Err(TapeError::Time { sequence: 0, .. })));
        assert!(matches!(tape.push(block(0, 0, u64::MAX, 5)), Err(TapeError::Time { .. })));
        tape.push(block(0, 0, 1 << 60, u64::MAX)).unwrap();
        tape.push(block(1, 1 << 60, (1 << 60) + 1, 3)).unwrap();
        assert_eq!(tape.span_ns().1, u64::MAX);
    }
}

//! Any instant of a recording, forwards and backwards.
//!
//! Forwards is replaying. Backwards is going to a rung of the ladder before the instant and replaying from there; on the
//! way rungs are laid: far apart while going forward, close together before a goal and where somebody goes backwards, because
//! who takes one step back takes another. The last stop before now is found from rung to rung backwards: each span is
//! replayed with stops on, and the last hit of the latest span that has one wins. Spans of which it is known that no stop can
//! have been met there are passed over, which leaves few.
//!
//! Both ends of the recording are ends. This file refuses to know debuggers and files.

use super::ladder::{Ladder, LadderError};
use super::play::{Goal, Hit, Pause, PlayError, Player};
use crate::engine::{Stops, WatchKind, Watchpoint, Why};
use crate::journal::Position;
use crate::machine::Machine;

/// Most instructions at once while a vCPU that is to step sleeps.
const STEP_SPAN_MAX: u64 = 1 << 20;

/// Instructions from rung to rung, and the memory that rungs may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spacing {
    /// While going forward.
    pub coarse: u64,
    /// Behind the present while going backwards.
    pub fine: u64,
    /// Bytes of all rungs.
    pub bytes_max: u64,
}

impl Default for Spacing {
    fn default() -> Self {
        Self { coarse: 10_000_000, fine: 1_000_000, bytes_max: 512 << 20 }
    }
}

/// How rungs are laid on the way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Laying {
    /// Far apart.
    Coarse,
    /// Close together.
    Fine,
    /// Far apart, and close together before the goal: who arrives there looks around.
    Approaching,
}

/// Why a timeline does not go where it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum TimelineError {
    /// The replay.
    #[error(transparent)]
    Play(#[from] PlayError),
    /// The rungs.
    #[error(transparent)]
    Ladder(#[from] LadderError),
}

/// Where a motion ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Arrival {
    /// Where it was to end.
    Reached,
    /// At a stop: before the instruction; after a watched access going forwards, before it going backwards.
    Hit(Hit),
    /// At the beginning of the recording.
    Start,
    /// At its end.
    End,
    /// The caller wanted it back.
    Interrupted,
}

/// A recording with a present.
#[derive(Debug)]
pub struct Timeline {
    player: Player,
    ladder: Ladder,
    spacing: Spacing,
}

impl Timeline {
    /// The present is where the player is, and that is the beginning of what can be visited.
    ///
    /// # Errors
    /// No memory for a second copy of RAM and disks.
    pub fn new(mut player: Player, spacing: Spacing) -> Result<Self, TimelineError> {
        let ladder = Ladder::new(&mut player, spacing.bytes_max)?;
        Ok(Self { player, ladder, spacing })
    }

    /// Where the present is.
    pub fn position(&self) -> Position {
        self.player.position()
    }

    /// Where what can be visited begins.
    pub fn start(&self) -> Position {
        self.ladder.position(0)
    }

    /// The present.
    pub fn player(&self) -> &Player {
        &self.player
    }

    /// The machine at the present. Whoever changes it has another history in sight, until the present is another one.
    pub fn machine_mut(&mut self) -> &mut Machine {
        self.player.machine_mut()
    }

    /// Goes to the beginning, also from a present that was changed there.
    ///
    /// # Errors
    /// RAM or a disk cannot be written.
    pub fn rewind(&mut self) -> Result<(), TimelineError> {
        Ok(self.ladder.climb(&mut self.player, 0)?)
    }

    /// Rungs and the bytes that they take.
    pub fn rungs(&self) -> (usize, u64) {
        (self.ladder.rungs(), self.ladder.bytes())
    }

    /// Goes to the first instant that is not before a position.
    ///
    /// # Errors
    /// The replay fails.
    pub fn seek(
        &mut self,
        position: Position,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Arrival, TimelineError> {
        self.player.machine_mut().set_stops(&Stops::default());
        self.go(position, interrupted)
    }

    /// Goes to the first instant at which the guest's TSC is not below this.
    ///
    /// # Errors
    /// The replay fails.
    pub fn seek_tsc(&mut self, tsc: u64, interrupted: &mut dyn FnMut() -> bool) -> Result<Arrival, TimelineError> {
        self.player.machine_mut().set_stops(&Stops::default());
        let rate = self.player.tape().rate();
        let rung = (0..self.ladder.rungs()).rev().find(|rung| {
            let there = rate.tsc(self.ladder.position(*rung));
            there.is_some_and(|there| there <= tsc)
        });
        let now = self.player.machine().tsc();
        match rung {
            None => {
                self.ladder.climb(&mut self.player, 0)?;
                return Ok(Arrival::Start);
            }
            Some(rung) if now > tsc || self.ladder.position(rung) > self.position() => {
                self.ladder.climb(&mut self.player, rung)?;
            }
            Some(_) => {}
        }
        self.forward(Goal::tsc(tsc), Laying::Approaching, interrupted)
    }

    fn go(&mut self, to: Position, interrupted: &mut dyn FnMut() -> bool) -> Result<Arrival, TimelineError> {
        let here = self.position();
        let Some(rung) = self.ladder.at_or_before(to) else {
            self.ladder.climb(&mut self.player, 0)?;
            return Ok(Arrival::Start);
        };
        let back = to < here;
        if back || self.ladder.position(rung) > here {
            self.ladder.climb(&mut self.player, rung)?;
        }
        let laying = if back { Laying::Fine } else { Laying::Approaching };
        self.forward(Goal::position(to), laying, interrupted)
    }

    /// Replays to a goal or a stop, laying rungs.
    fn forward(
        &mut self,
        goal: Goal,
        laying: Laying,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Arrival, TimelineError> {
        let Spacing { coarse, fine, .. } = self.spacing;
        // From here on they are laid close together. The end of a recording is a place where people go, too.
        let near = match laying {
            Laying::Coarse => u64::MAX,
            Laying::Fine => 0,
            Laying::Approaching => goal.retired().min(self.player.tape().end().retired).saturating_sub(coarse),
        };
        loop {
            let here = self.position();
            let below = self.ladder.at_or_before(here).unwrap_or(0);
            let behind = |distance| self.ladder.position(below).retired.saturating_add(distance);
            let next = if here.retired < near { behind(coarse).min(near) } else { behind(fine) };
            match self.player.run_to(goal.or_instruction(next), interrupted)? {
                Pause::Reached if goal.is_reached(self.player.machine()) => return Ok(Arrival::Reached),
                Pause::Reached => self.ladder.stand(&mut self.player)?,
                Pause::Hit(hit) => return Ok(Arrival::Hit(hit)),
                Pause::End => return Ok(Arrival::End),
                Pause::Interrupted => return Ok(Arrival::Interrupted),
            }
        }
    }

    /// Goes on to the next stop.
    ///
    /// # Errors
    /// The replay fails.
    pub fn continue_to(
        &mut self,
        stops: &Stops,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Arrival, TimelineError> {
        self.continue_until(stops, Position { retired: u64::MAX, skipped_tsc: 0 }, interrupted)
    }

    /// Goes on to the next stop, and no further than to the first instant that is not before a position.
    ///
    /// # Errors
    /// The replay fails.
    pub fn continue_until(
        &mut self,
        stops: &Stops,
        until: Position,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Arrival, TimelineError> {
        self.player.machine_mut().set_stops(stops);
        self.player.machine_mut().pass_breakpoints();
        let arrival = self.forward(Goal::position(until), Laying::Approaching, interrupted);
        self.player.machine_mut().set_stops(&Stops::default());
        arrival
    }

    /// Goes on until this vCPU has retired one instruction. Others may run before; stops of theirs, and of its own
    /// instruction, stop.
    ///
    /// # Errors
    /// The replay fails.
    pub fn step(
        &mut self,
        vcpu: usize,
        stops: &Stops,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Arrival, TimelineError> {
        self.player.machine_mut().pass_breakpoints();
        let mut span = 1;
        loop {
            let before = self.position().retired;
            self.player.machine_mut().set_stops(stops);
            let arrival = self.forward(Goal::instruction(before.saturating_add(span)), Laying::Coarse, interrupted);
            self.player.machine_mut().set_stops(&Stops::default());
            let arrival = arrival?;
            let after = self.position().retired;
            match self.has_run(vcpu, before) {
                true if after - before <= 1 => return Ok(arrival),
                true => return self.first_of(vcpu, before, after),
                false if arrival != Arrival::Reached => return Ok(arrival),
                false => span = (span * 2).min(STEP_SPAN_MAX),
            }
        }
    }

    fn has_run(&self, vcpu: usize, since: u64) -> bool {
        self.player.machine().last_ran(vcpu).is_some_and(|retired| retired > since)
    }

    /// Goes to where this vCPU has retired one instruction of a span.
    fn first_of(&mut self, vcpu: usize, before: u64, after: u64) -> Result<Arrival, TimelineError> {
        let (mut low, mut high) = (before, after);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            self.seek(Position { retired: before, skipped_tsc: 0 }.max(self.start()), &mut || false)?;
            self.seek(Position { retired: middle, skipped_tsc: 0 }, &mut || false)?;
            if self.has_run(vcpu, before) { high = middle } else { low = middle }
        }
        self.seek(Position { retired: high, skipped_tsc: 0 }, &mut || false)
    }

    /// Goes back to before the last instruction that this vCPU retired.
    ///
    /// # Errors
    /// The replay fails.
    pub fn reverse_step(
        &mut self,
        vcpu: usize,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Arrival, TimelineError> {
        let now = self.position();
        let before = |retired: u64| Position { retired: retired - 1, skipped_tsc: 0 };
        if self.player.machine().config().vcpus == 1 && now.retired > self.start().retired {
            return self.seek(before(now.retired).max(self.start()), interrupted);
        }
        let mut upper = now;
        while let Some(rung) = self.ladder.before(upper) {
            let lower = self.ladder.position(rung);
            self.ladder.climb(&mut self.player, rung)?;
            // Up to `upper` and no further: then it says when the vCPU ran last.
            match self.forward(Goal::position(upper), Laying::Fine, interrupted)? {
                Arrival::Interrupted => {
                    self.go(now, &mut || false)?;
                    return Ok(Arrival::Interrupted);
                }
                Arrival::Reached | Arrival::Hit(_) | Arrival::Start | Arrival::End => {}
            }
            let ran = self.player.machine().last_ran(vcpu).filter(|retired| *retired > lower.retired);
            if let Some(retired) = ran {
                return self.go(before(retired).max(self.start()), interrupted);
            }
            upper = lower;
        }
        self.go(self.start(), &mut || false)?;
        Ok(Arrival::Start)
    }

    /// Goes back to the last stop before now.
    ///
    /// # Errors
    /// The replay fails.
    pub fn reverse_continue(
        &mut self,
        stops: &Stops,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<Arrival, TimelineError> {
        let now = self.position();
        let mut upper = now;
        while let Some(rung) = self.ladder.before(upper) {
            let lower = self.ladder.position(rung);
            if !self.ladder.may_meet_after(rung, upper, stops) {
                upper = lower;
                continue;
            }
            self.ladder.climb(&mut self.player, rung)?;
            match self.last_hit(stops, upper, interrupted, &mut |_| ())? {
                Search::Found(Found { hit, retired, .. }) => {
                    self.before(stops, &hit, retired)?;
                    return Ok(Arrival::Hit(hit));
                }
                Search::Nothing => {}
                Search::Interrupted => {
                    // Nothing lies between: who goes on from there misses nothing.
                    self.seek(upper, &mut || false)?;
                    return Ok(Arrival::Interrupted);
                }
            }
            upper = lower;
        }
        self.seek(self.start(), &mut || false)?;
        Ok(Arrival::Start)
    }

    /// The last stop from here to `upper`, that position left out. `at_each` is called where the machine stands at each.
    fn last_hit<T>(
        &mut self,
        stops: &Stops,
        upper: Position,
        interrupted: &mut dyn FnMut() -> bool,
        at_each: &mut dyn FnMut(&Player) -> T,
    ) -> Result<Search<T>, TimelineError> {
        self.player.machine_mut().set_stops(stops);
        let mut last = None;
        let found = loop {
            match self.forward(Goal::position(upper), Laying::Coarse, interrupted) {
                Ok(Arrival::Hit(hit)) => {
                    let here = self.position();
                    let at = at_each(&self.player);
                    let behind = matches!(hit.why, Why::Breakpoint { .. }) && here >= upper;
                    if !behind {
                        last = Some(Found { hit, retired: here.retired, at });
                    }
                }
                Ok(Arrival::Interrupted) => break Ok(Search::Interrupted),
                Ok(Arrival::Reached | Arrival::End | Arrival::Start) => {
                    break Ok(last.map_or(Search::Nothing, Search::Found));
                }
                Err(error) => break Err(error),
            }
        };
        self.player.machine_mut().set_stops(&Stops::default());
        found
    }

    /// Goes to where nothing of a stop has happened yet: before the instruction, or before what used watched bytes.
    fn before(&mut self, stops: &Stops, hit: &Hit, retired: u64) -> Result<(), TimelineError> {
        let at = |retired| Position { retired, skipped_tsc: 0 };
        if matches!(hit.why, Why::Breakpoint { .. }) || retired <= self.start().retired {
            self.seek(at(retired).max(self.start()), &mut || false)?;
            return Ok(());
        }
        let before = at(retired - 1).max(self.start());
        self.seek(before, &mut || false)?;
        // An event's delivery uses memory too, and retires nothing: then it comes after that instruction.
        let watched = Stops { breakpoints: Vec::new(), watchpoints: stops.watchpoints.clone() };
        self.player.machine_mut().set_stops(&watched);
        let again = self.player.run_to(Goal::instruction(retired), &mut || false);
        self.player.machine_mut().set_stops(&Stops::default());
        if matches!(again?, Pause::Hit(_)) {
            self.seek(before, &mut || false)?;
        }
        Ok(())
    }

    /// Who wrote to RAM there last before now; the present is just before that then, and where it was if nobody did.
    ///
    /// # Errors
    /// The replay fails.
    pub fn last_write(
        &mut self,
        gpa: u64,
        bytes: usize,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<LastWrite, TimelineError> {
        let now = self.position();
        let watched = Watchpoint { address: gpa, bytes: bytes as u64, kind: WatchKind::PhysicalWrite };
        let stops = Stops { breakpoints: Vec::new(), watchpoints: vec![watched] };
        let contents = |player: &Player| read(player, gpa, bytes);
        let mut upper = now;
        let mut above = contents(&self.player);
        let memory = self.player.machine().memory();
        let last = gpa.saturating_add((bytes as u64).saturating_sub(1));
        let pages = memory.page_of(gpa).zip(memory.page_of(last)).map(|(first, last)| first..=last);
        while let Some(rung) = self.ladder.before(upper) {
            let lower = self.ladder.position(rung);
            if pages.as_ref().is_some_and(|pages| !self.ladder.wrote_after(rung, upper, pages.clone())) {
                upper = lower;
                continue;
            }
            let below = self.ladder.ram_at(rung, self.player.machine().memory(), gpa, bytes)?;
            // Devices write, too, and nobody watches them.
            if below == above && !self.ladder.may_meet_after(rung, upper, &stops) {
                upper = lower;
                continue;
            }
            self.ladder.climb(&mut self.player, rung)?;
            let from = match self.last_hit(&stops, upper, interrupted, &mut |player| contents(player))? {
                Search::Interrupted => {
                    self.seek(now, &mut || false)?;
                    return Ok(LastWrite::Interrupted);
                }
                Search::Found(Found { hit, retired, at: new }) => {
                    if new == above {
                        self.before(&stops, &hit, retired)?;
                        let old = contents(&self.player);
                        let Hit { vcpu, .. } = hit;
                        return Ok(LastWrite::By(Written { vcpu: Some(vcpu), old, new }));
                    }
                    Some(retired)
                }
                Search::Nothing => (below != above).then_some(lower.retired),
            };
            if let Some(from) = from {
                let old = self.changed_at(from, upper, &above, &contents)?;
                return Ok(LastWrite::By(Written { vcpu: None, old, new: above }));
            }
            (upper, above) = (lower, below);
        }
        self.seek(now, &mut || false)?;
        Ok(LastWrite::Nobody)
    }

    /// Goes to the last instruction known before which the contents were others; returns those.
    fn changed_at(
        &mut self,
        from: u64,
        upper: Position,
        above: &[u8],
        contents: &dyn Fn(&Player) -> Vec<u8>,
    ) -> Result<Vec<u8>, TimelineError> {
        let (mut low, mut high) = (from, upper.retired.saturating_add(1));
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            self.seek(Position { retired: middle, skipped_tsc: 0 }.min(upper), &mut || false)?;
            if contents(&self.player) == above { high = middle } else { low = middle }
        }
        self.seek(Position { retired: low, skipped_tsc: 0 }.max(self.start()), &mut || false)?;
        Ok(contents(&self.player))
    }
}

/// RAM at a guest-physical address; what is no RAM reads as nothing.
fn read(player: &Player, gpa: u64, bytes: usize) -> Vec<u8> {
    let mut into = vec![0; bytes];
    match player.machine().memory().read(gpa, &mut into) {
        Ok(()) => into,
        Err(_) => Vec::new(),
    }
}

/// Who wrote last.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LastWrite {
    /// Somebody did.
    By(Written),
    /// Nobody since the beginning.
    Nobody,
    /// The caller wanted it back.
    Interrupted,
}

/// A write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Written {
    /// By which vCPU's instruction; `None`: by a device, or an event from outside.
    pub vcpu: Option<usize>,
    /// What was there.
    pub old: Vec<u8>,
    /// What was there then.
    pub new: Vec<u8>,
}

struct Found<T> {
    hit: Hit,
    retired: u64,
    at: T,
}

enum Search<T> {
    Found(Found<T>),
    Nothing,
    Interrupted,
}

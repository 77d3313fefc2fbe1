//! The source of a transfer, as a pure machine: inputs and `now` in, effects out. Diagram in [`super`].
//!
//! Each state holds only what is valid in it, and a step consumes it. Whatever goes wrong before `HandedOver` ends in
//! `Failed`, with [`Effect::Resume`] if the guest was stopped. The mark at which the next attempt begins moves only when
//! the target has acknowledged a round, and it is given out only by a transfer that ended well: a failed attempt forgets
//! no page.
//!
//! It refuses to know lanes as connections, threads, clocks and the runner; [`super::link`] does what it says.

mod frozen;
#[cfg(test)]
mod tests;
mod words;

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use proto::status::Code;
use proto::v1::{MachineDigest, PhaseReport, RoundReport, Section, TransferPolicy};
use vmcb_engine::memory::PAGE_BYTES;
use vmcb_engine::transfer::rounds::{Decision, LOOK_US_MIN, RoundFacts, Rounds, StopReason};

use super::{Failure, PROTOCOL, differing_parts};

pub use frozen::Frozen;
pub use words::{Effect, Input, RoundTotals};

/// A guest that stands still goes on at the source when nothing has moved for so long. The controller cannot commit
/// before the hand-over, so nobody can have started it elsewhere.
pub const SILENCE_US_MAX: u64 = 10_000_000;
/// The same while the target hashes all that it has (`verify_full`) and has nothing to say meanwhile.
pub const SILENCE_VERIFY_US_MAX: u64 = 120_000_000;
/// Rounds that were shorter say little about how fast the guest dirties.
const TELLING_US_MIN: u64 = 5_000;

/// What is decided before the transfer begins.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How many lanes.
    pub lanes: u32,
    /// The operator's wishes.
    pub policy: TransferPolicy,
    /// The guest goes on at the source once its state is captured and its last pages are read.
    pub checkpoint: bool,
    /// A checkpoint of a runner that can keep an instant while its guest goes on.
    pub freeze: bool,
    /// Send pages stamped with this epoch or later; 0 sends all.
    pub mark: u32,
    /// The target tells first what its base holds.
    pub wants_leaves: bool,
}

/// The machine.
#[derive(Debug)]
pub enum Source {
    /// Lanes are being opened.
    Connecting(Connecting),
    /// Rounds while the guest runs.
    Precopy(Precopy),
    /// A checkpoint's instant is read while the guest runs.
    Frozen(Frozen),
    /// The guest is being stopped and captured.
    Stopping(Stopping),
    /// The last pages are under way.
    LastPages(LastPages),
    /// Sections and digest are under way; the target compares.
    Comparing(Comparing),
    /// Both digests agree. The controller decides.
    HandedOver(HandedOver),
    /// Over; the guest runs here as before.
    Failed(Failed),
}

/// A state and what is to be done.
#[derive(Debug)]
pub struct Step {
    /// The state after the step.
    pub state: Source,
    /// Effects in order.
    pub effects: Vec<Effect>,
}

/// State [`Source::Connecting`].
#[derive(Debug)]
pub struct Connecting {
    plan: Plan,
    replied: BTreeSet<u32>,
    told: bool,
    began_us: u64,
}

/// State [`Source::Precopy`].
#[derive(Debug)]
pub struct Precopy {
    plan: Plan,
    rounds: Rounds,
    round: u32,
    mark: u32,
    began_us: u64,
    dirty: Dirty,
    looks: Looks,
    step: PrecopyStep,
}

/// Looks at the guest while a round is being sent.
#[derive(Debug, Default)]
struct Looks {
    /// Bytes that were dirty again at an instant of this round, if the guest has been as free since as it is now.
    before: Option<(u64, u64)>,
    /// The answer to a look is on its way.
    waiting: bool,
}

#[derive(Debug)]
enum PrecopyStep {
    Advancing,
    Sending { epoch: u32, began_us: u64, flight: Flight },
    Measuring { epoch: u32, began_us: u64, took_us: u64, totals: RoundTotals },
}

/// How fast the guest dirties memory, as last measured: too short a look does not replace a longer one.
#[derive(Debug, Clone, Copy, Default)]
struct Dirty {
    bytes_per_s: u64,
    looked_us: u64,
}

impl Dirty {
    fn look(&mut self, bytes: u64, us: u64) {
        if us >= TELLING_US_MIN || us >= self.looked_us {
            let rate = u128::from(bytes) * 1_000_000 / u128::from(us.max(1));
            *self = Self { bytes_per_s: rate.min(u64::MAX.into()) as u64, looked_us: us };
        }
    }
}

/// How long nothing has moved while the guest stands still.
#[derive(Debug, Clone, Copy)]
struct Quiet {
    since_us: u64,
    bytes_sent: u64,
}

impl Quiet {
    fn from(now_us: u64) -> Self {
        Self { since_us: now_us, bytes_sent: 0 }
    }

    /// Looks at what has moved; fails if nothing has for too long.
    fn look(&mut self, bytes_sent: u64, now_us: u64, limit_us: u64, what: &str) -> Result<(), Failure> {
        if bytes_sent != self.bytes_sent {
            *self = Self { since_us: now_us, bytes_sent };
        }
        if now_us.saturating_sub(self.since_us) < limit_us {
            return Ok(());
        }
        let text = format_args!("the target has been silent for {} s {what}", limit_us / 1_000_000);
        Err(Failure::new(Code::Unreachable, text))
    }
}

/// A round on its way: what is known of it may come in either order.
#[derive(Debug, Default)]
struct Flight {
    sent: Option<RoundTotals>,
    acked: bool,
}

/// State [`Source::Stopping`].
#[derive(Debug)]
pub struct Stopping {
    plan: Plan,
    round: u32,
    mark: u32,
    reason: StopReason,
    stop_us: u64,
    dirty: Dirty,
    step: StoppingStep,
}

#[derive(Debug)]
enum StoppingStep {
    Pausing,
    Capturing { since_us: u64 },
    Advancing { sections: Vec<Section> },
}

/// State [`Source::LastPages`].
#[derive(Debug)]
pub struct LastPages {
    plan: Plan,
    round: u32,
    sections: Vec<Section>,
    mark: u32,
    pause: Pause,
    began_us: u64,
    dirty: Dirty,
    quiet: Quiet,
    flight: Flight,
}

/// State [`Source::Comparing`].
#[derive(Debug)]
pub struct Comparing {
    plan: Plan,
    mark: u32,
    pause: Pause,
    began_us: u64,
    quiet: Quiet,
    step: ComparingStep,
}

#[derive(Debug)]
enum ComparingStep {
    Digesting { sections: Vec<Section> },
    Waiting { digest: MachineDigest },
}

/// How long the guest has stood still.
#[derive(Debug, Clone, Copy)]
enum Pause {
    /// Since then.
    Since(u64),
    /// It runs again (checkpoint), after so many microseconds.
    Over(u64),
}

/// State [`Source::HandedOver`].
#[derive(Debug)]
pub struct HandedOver {
    /// The digest of both sides.
    pub source: MachineDigest,
    /// The target's own word.
    pub target: MachineDigest,
    /// Microseconds that the guest has stood still.
    pub stopped_us: u64,
    /// It still does: this is not a checkpoint.
    pub guest_stands: bool,
    /// All pages with an older stamp are at the target.
    pub mark: u32,
}

/// State [`Source::Failed`].
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub failure: Failure,
}

impl Source {
    /// Begins: Hello is being sent on every lane.
    pub fn new(plan: Plan, now_us: u64) -> Self {
        Self::Connecting(Connecting { plan, replied: BTreeSet::new(), told: false, began_us: now_us })
    }

    /// Takes one input in.
    pub fn step(self, input: Input, now_us: u64) -> Step {
        match (self, input) {
            (state, Input::Tick { bytes_sent }) => state.tick(bytes_sent, now_us),
            (Self::Precopy(state), Input::Looked { since, bytes }) => state.looked(since, bytes, now_us),
            (state, Input::Looked { .. }) => Step { state, effects: vec![] },
            (state, input) => state.hear(input, now_us),
        }
    }

    /// Time passes: a guest that stands still must not do so for ever.
    fn tick(mut self, bytes_sent: u64, now_us: u64) -> Step {
        let looked = match &mut self {
            Self::Precopy(state) => {
                let effects = state.look(now_us);
                return Step { state: self, effects };
            }
            Self::LastPages(LastPages { quiet, pause, plan, .. })
            | Self::Comparing(Comparing { quiet, pause, plan, .. })
                if pause.lasts() =>
            {
                let limit_us = if plan.policy.verify_full { SILENCE_VERIFY_US_MAX } else { SILENCE_US_MAX };
                quiet.look(bytes_sent, now_us, limit_us, "while the guest stood still: it goes on here")
            }
            Self::Frozen(state) => state.look(bytes_sent, now_us),
            // What stops and captures it is on this host and has deadlines of its own; after the hand-over only the
            // controller's word counts.
            Self::Connecting(_)
            | Self::Stopping(_)
            | Self::LastPages(_)
            | Self::Comparing(_)
            | Self::HandedOver(_)
            | Self::Failed(_) => Ok(()),
        };
        match looked {
            Ok(()) => Step { state: self, effects: vec![] },
            Err(failure) => self.hear(Input::Lost(failure), now_us),
        }
    }

    fn hear(self, input: Input, now_us: u64) -> Step {
        match self {
            Self::Connecting(state) => state.step(input, now_us),
            Self::Precopy(state) => state.step(input, now_us),
            Self::Frozen(state) => state.step(input, now_us),
            Self::Stopping(state) => state.step(input, now_us),
            Self::LastPages(state) => state.step(input, now_us),
            Self::Comparing(state) => state.step(input, now_us),
            state @ (Self::HandedOver(_) | Self::Failed(_)) => Step { state, effects: vec![] },
        }
    }

    /// It will not change any more.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::HandedOver(_) | Self::Failed(_))
    }

    /// The guest stands still because of this machine.
    pub fn holds_guest(&self) -> bool {
        match self {
            Self::Connecting(_) | Self::Precopy(_) | Self::Frozen(_) | Self::Failed(_) => false,
            Self::Stopping(_) => true,
            Self::LastPages(LastPages { pause, .. }) | Self::Comparing(Comparing { pause, .. }) => pause.lasts(),
            Self::HandedOver(state) => state.guest_stands,
        }
    }
}

/// Whether the guest must be let go when a transfer fails, and whether the target knows of it already.
fn fail(failure: Failure, holds_guest: bool, tell_target: bool) -> Step {
    let mut effects = Vec::new();
    if holds_guest {
        effects.push(Effect::Resume);
    }
    if tell_target {
        effects.push(Effect::AbortTarget(failure.clone()));
    }
    Step { state: Source::Failed(Failed { failure }), effects }
}

/// Ends for the inputs that end every state alike; gives back the others.
fn end(input: Input, holds_guest: bool) -> ControlFlow<Step, Input> {
    match input {
        Input::Aborted(failure) => ControlFlow::Break(fail(failure, holds_guest, false)),
        Input::Lost(failure) | Input::Cancel(failure) => ControlFlow::Break(fail(failure, holds_guest, true)),
        other => ControlFlow::Continue(other),
    }
}

fn phase(phase: &str, since_us: u64, now_us: u64) -> Effect {
    Effect::ReportPhase(PhaseReport { phase: phase.to_owned(), ms: ms(now_us.saturating_sub(since_us)) })
}

fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

impl Pause {
    fn lasts(self) -> bool {
        matches!(self, Self::Since(_))
    }

    fn us(self, now_us: u64) -> u64 {
        match self {
            Self::Since(since_us) => now_us.saturating_sub(since_us),
            Self::Over(us) => us,
        }
    }

    /// Lets the guest go, once.
    fn end(&mut self, now_us: u64, effects: &mut Vec<Effect>) {
        if self.lasts() {
            *self = Self::Over(self.us(now_us));
            effects.push(Effect::Resume);
        }
    }
}

impl Flight {
    fn sent(&mut self, totals: RoundTotals) -> Option<RoundTotals> {
        self.sent = Some(totals);
        self.landed()
    }

    fn acked(&mut self) -> Option<RoundTotals> {
        self.acked = true;
        self.landed()
    }

    fn landed(&self) -> Option<RoundTotals> {
        self.sent.filter(|_| self.acked)
    }
}

impl Connecting {
    fn step(mut self, input: Input, now_us: u64) -> Step {
        let input = match end(input, false) {
            ControlFlow::Continue(input) => input,
            ControlFlow::Break(step) => return step,
        };
        match input {
            Input::Replied { lane, protocol } if PROTOCOL.contains(&protocol) && lane < self.plan.lanes => {
                self.replied.insert(lane);
                self.begin(now_us)
            }
            Input::LeavesTold if self.plan.wants_leaves => {
                self.told = true;
                self.begin(now_us)
            }
            Input::Replied { protocol, .. } => {
                let words =
                    format_args!("the target speaks lane protocol {protocol}; this release speaks {PROTOCOL:?}");
                fail(Failure::new(Code::Protocol, words), false, true)
            }
            other @ (Input::LeavesTold
            | Input::Epoch(_)
            | Input::RoundSent(_)
            | Input::Acked { .. }
            | Input::Left { .. }
            | Input::Looked { .. }
            | Input::Stopped
            | Input::Captured(_)
            | Input::Frozen { .. }
            | Input::Digested(_)
            | Input::Ready(_)
            | Input::Aborted(_)
            | Input::Lost(_)
            | Input::Cancel(_)
            | Input::Tick { .. }) => fail(other.misplaced("connecting"), false, true),
        }
    }

    /// Goes on to the first round once every lane is open and the source knows what the target has.
    fn begin(self, now_us: u64) -> Step {
        if self.replied.len() < self.plan.lanes as usize || self.plan.wants_leaves != self.told {
            return Step { state: Source::Connecting(self), effects: vec![] };
        }
        let setup = phase("setup", self.began_us, now_us);
        if self.plan.freeze {
            let (state, freeze) = Frozen::begin(self.plan, now_us);
            return Step { state, effects: vec![setup, freeze] };
        }
        let effects = vec![setup, Effect::AdvanceEpoch];
        let state = Precopy {
            rounds: Rounds::new(&self.plan.policy),
            round: 1,
            mark: self.plan.mark,
            began_us: now_us,
            dirty: Dirty::default(),
            looks: Looks::default(),
            step: PrecopyStep::Advancing,
            plan: self.plan,
        };
        Step { state: Source::Precopy(state), effects }
    }
}

impl Precopy {
    fn step(self, input: Input, now_us: u64) -> Step {
        let held_back = self.rounds.throttle_percent() > 0;
        let mut step = self.take(input, now_us);
        if held_back && matches!(step.state, Source::Failed(_)) {
            step.effects.insert(0, Effect::Throttle { percent: 0 });
        }
        step
    }

    fn take(mut self, input: Input, now_us: u64) -> Step {
        let input = match end(input, false) {
            ControlFlow::Continue(input) => input,
            ControlFlow::Break(step) => return step,
        };
        match (input, std::mem::replace(&mut self.step, PrecopyStep::Advancing)) {
            (Input::Epoch(epoch), PrecopyStep::Advancing) => self.send(epoch, Vec::new(), now_us),
            (Input::RoundSent(totals), PrecopyStep::Sending { epoch, began_us, mut flight })
                if flight.sent.is_none() =>
            {
                let landed = flight.sent(totals);
                self.step = PrecopyStep::Sending { epoch, began_us, flight };
                self.after_flight(landed, now_us)
            }
            (Input::Acked { round }, PrecopyStep::Sending { epoch, began_us, mut flight })
                if round == self.round && !flight.acked =>
            {
                let landed = flight.acked();
                self.step = PrecopyStep::Sending { epoch, began_us, flight };
                self.after_flight(landed, now_us)
            }
            (Input::Left { bytes, epoch: next }, PrecopyStep::Measuring { epoch, began_us, took_us, totals }) => {
                self.mark = epoch;
                self.dirty.look(bytes, now_us.saturating_sub(began_us));
                self.decide(next, took_us, bytes, totals, now_us)
            }
            (other, PrecopyStep::Advancing | PrecopyStep::Sending { .. } | PrecopyStep::Measuring { .. }) => {
                fail(other.misplaced("sending rounds"), false, true)
            }
        }
    }

    /// Goes on when a round is sent and acknowledged.
    fn after_flight(mut self, landed: Option<RoundTotals>, now_us: u64) -> Step {
        let mut effects = Vec::new();
        self.step = match (self.step, landed) {
            (PrecopyStep::Sending { epoch, began_us, .. }, Some(totals)) => {
                effects.push(Effect::MeasureLeft { since: epoch });
                PrecopyStep::Measuring { epoch, began_us, took_us: now_us.saturating_sub(began_us), totals }
            }
            (step, _) => step,
        };
        Step { state: Source::Precopy(self), effects }
    }

    /// Begins a round with the epoch that has just begun: what is stamped with it is the next round's.
    fn send(mut self, epoch: u32, mut effects: Vec<Effect>, now_us: u64) -> Step {
        let (round, since) = (self.round, self.mark);
        effects.push(Effect::SendRound { round, since, until: Some(epoch), last: false, instant: None });
        self.looks = Looks { before: Some((0, now_us)), waiting: false };
        self.step = PrecopyStep::Sending { epoch, began_us: now_us, flight: Flight::default() };
        Step { state: Source::Precopy(self), effects }
    }

    /// Time to see how fast the guest dirties, while pages of the round are being sent. Looks are not free: none too soon.
    fn look(&mut self, now_us: u64) -> Vec<Effect> {
        let due = self.looks.before.is_none_or(|(_, at_us)| now_us.saturating_sub(at_us) >= LOOK_US_MIN);
        match &self.step {
            PrecopyStep::Sending { epoch, flight, .. } if flight.sent.is_none() && due && !self.looks.waiting => {
                self.looks.waiting = true;
                vec![Effect::Look { since: *epoch }]
            }
            PrecopyStep::Advancing | PrecopyStep::Sending { .. } | PrecopyStep::Measuring { .. } => vec![],
        }
    }

    /// What was seen. What comes late says nothing of this round.
    fn looked(mut self, since: u32, bytes: u64, now_us: u64) -> Step {
        let mut effects = Vec::new();
        if matches!(&self.step, PrecopyStep::Sending { epoch, .. } if *epoch == since) {
            self.looks.waiting = false;
            let more =
                self.looks.before.map(|(seen, at_us)| (bytes.saturating_sub(seen), now_us.saturating_sub(at_us)));
            self.looks.before = Some((bytes, now_us));
            if more.is_some_and(|(bytes, us)| self.rounds.look(bytes, us)) {
                effects.push(Effect::Throttle { percent: self.rounds.throttle_percent() });
                // The next look begins when that holds.
                self.looks.before = None;
            }
        }
        Step { state: Source::Precopy(self), effects }
    }

    fn decide(mut self, epoch: u32, took_us: u64, left_bytes: u64, totals: RoundTotals, now_us: u64) -> Step {
        let before = self.rounds.throttle_percent();
        let mut effects = vec![report(self.round, totals, took_us, self.dirty, before)];
        self.round += 1;
        let left_out_bytes = totals.left_out_pages * PAGE_BYTES;
        match self.rounds.decide(RoundFacts { sent_bytes: totals.bytes, left_out_bytes, took_us, left_bytes }) {
            Decision::Again => {
                let percent = self.rounds.throttle_percent();
                if percent != before {
                    effects.push(Effect::Throttle { percent });
                }
                self.send(epoch, effects, now_us)
            }
            Decision::Stop(reason) => {
                effects.extend([phase("precopy", self.began_us, now_us), Effect::Stop]);
                if before > 0 {
                    // It stands still now: whatever comes, it goes on freely, here or elsewhere.
                    effects.push(Effect::Throttle { percent: 0 });
                }
                let Self { plan, round, mark, dirty, .. } = self;
                let state = Stopping { plan, round, mark, reason, stop_us: now_us, dirty, step: StoppingStep::Pausing };
                Step { state: Source::Stopping(state), effects }
            }
        }
    }
}

fn report(round: u32, totals: RoundTotals, took_us: u64, dirty: Dirty, throttle_percent: u32) -> Effect {
    Effect::ReportRound(RoundReport {
        round,
        pages: totals.pages,
        zero_pages: totals.zero_pages,
        bytes: totals.bytes,
        ms: ms(took_us),
        dirty_rate: dirty.bytes_per_s,
        throttle_percent,
    })
}

impl Stopping {
    /// Why the guest is being stopped.
    pub fn reason(&self) -> StopReason {
        self.reason
    }

    fn step(mut self, input: Input, now_us: u64) -> Step {
        let input = match end(input, true) {
            ControlFlow::Continue(input) => input,
            ControlFlow::Break(step) => return step,
        };
        match (input, self.step) {
            (Input::Stopped, StoppingStep::Pausing) => {
                let effects = vec![phase("stop", self.stop_us, now_us), Effect::Capture];
                self.step = StoppingStep::Capturing { since_us: now_us };
                Step { state: Source::Stopping(self), effects }
            }
            // The sections come first: whatever capturing writes into RAM is then among the last pages.
            (Input::Captured(sections), StoppingStep::Capturing { since_us }) => {
                let effects = vec![phase("state", since_us, now_us), Effect::AdvanceEpoch];
                self.step = StoppingStep::Advancing { sections };
                Step { state: Source::Stopping(self), effects }
            }
            (Input::Epoch(epoch), StoppingStep::Advancing { sections }) => {
                let effects = vec![Effect::SendRound {
                    round: self.round,
                    since: self.mark,
                    until: None,
                    last: true,
                    instant: None,
                }];
                let state = LastPages {
                    plan: self.plan,
                    round: self.round,
                    sections,
                    mark: epoch,
                    pause: Pause::Since(self.stop_us),
                    began_us: now_us,
                    dirty: self.dirty,
                    quiet: Quiet::from(now_us),
                    flight: Flight::default(),
                };
                Step { state: Source::LastPages(state), effects }
            }
            (other, StoppingStep::Pausing | StoppingStep::Capturing { .. } | StoppingStep::Advancing { .. }) => {
                fail(other.misplaced("stopping the guest"), true, true)
            }
        }
    }
}

impl LastPages {
    fn step(mut self, input: Input, now_us: u64) -> Step {
        let holds_guest = self.pause.lasts();
        let input = match end(input, holds_guest) {
            ControlFlow::Continue(input) => input,
            ControlFlow::Break(step) => return step,
        };
        let mut effects = Vec::new();
        let landed = match input {
            Input::RoundSent(totals) if self.flight.sent.is_none() => {
                // All bytes have left the guest's memory. With a full comparison they are needed a little longer.
                if self.plan.checkpoint && !self.plan.policy.verify_full {
                    self.pause.end(now_us, &mut effects);
                }
                self.flight.sent(totals)
            }
            Input::Acked { round } if round == self.round && !self.flight.acked => self.flight.acked(),
            other @ (Input::Replied { .. }
            | Input::LeavesTold
            | Input::Epoch(_)
            | Input::RoundSent(_)
            | Input::Acked { .. }
            | Input::Left { .. }
            | Input::Looked { .. }
            | Input::Stopped
            | Input::Captured(_)
            | Input::Frozen { .. }
            | Input::Digested(_)
            | Input::Ready(_)
            | Input::Aborted(_)
            | Input::Lost(_)
            | Input::Cancel(_)
            | Input::Tick { .. }) => return fail(other.misplaced("sending the last pages"), holds_guest, true),
        };
        let Some(totals) = landed else {
            return Step { state: Source::LastPages(self), effects };
        };
        let verify_full = self.plan.policy.verify_full;
        effects.push(report(self.round, totals, now_us.saturating_sub(self.began_us), self.dirty, 0));
        effects.push(phase("last-pages", self.began_us, now_us));
        effects.push(Effect::Digest { sections: self.sections.clone(), verify_full });
        let Self { plan, sections, mark, pause, .. } = self;
        let step = ComparingStep::Digesting { sections };
        let quiet = Quiet::from(now_us);
        Step { state: Source::Comparing(Comparing { plan, mark, pause, began_us: now_us, quiet, step }), effects }
    }
}

impl Comparing {
    fn step(mut self, input: Input, now_us: u64) -> Step {
        let holds_guest = self.pause.lasts();
        let input = match end(input, holds_guest) {
            ControlFlow::Continue(input) => input,
            ControlFlow::Break(step) => return step,
        };
        match (input, self.step) {
            (Input::Digested(digest), ComparingStep::Digesting { sections }) => {
                let mut effects = Vec::new();
                if self.plan.checkpoint {
                    self.pause.end(now_us, &mut effects);
                }
                let verify_full = self.plan.policy.verify_full;
                let stopped_us = self.pause.us(now_us);
                effects.push(Effect::SendState { sections, digest: digest.clone(), verify_full, stopped_us });
                self.step = ComparingStep::Waiting { digest };
                Step { state: Source::Comparing(self), effects }
            }
            (Input::Ready(target), ComparingStep::Waiting { digest: source }) => {
                let parts = differing_parts(&source, &target);
                if !parts.is_empty() {
                    let words = format_args!("the target says that its {} differs from ours", parts.join(" and its "));
                    return fail(Failure::new(Code::Corrupt, words), holds_guest, true);
                }
                let effects = vec![phase("digest", self.began_us, now_us)];
                let stopped_us = self.pause.us(now_us);
                let state = HandedOver { source, target, stopped_us, guest_stands: holds_guest, mark: self.mark };
                Step { state: Source::HandedOver(state), effects }
            }
            (other, ComparingStep::Digesting { .. } | ComparingStep::Waiting { .. }) => {
                fail(other.misplaced("comparing digests"), holds_guest, true)
            }
        }
    }
}

//! The source of a checkpoint whose guest goes on: one instant is frozen, read while the guest runs, and thawed.
//!
//! ```text
//! Freezing   Freeze{since} ──> Frozen{epoch, sections, stopped_us}      the guest stood still that long
//! Reading    SendRound{instant} ──> RoundSent, RoundAck                 it runs; what it overwrites is kept for us
//!            Thaw ──> Comparing, as any transfer
//! ```
//! The instant is the end of the epoch before `epoch`. Whatever fails thaws it; a source that dies leaves it to lapse.
//! It refuses to know how pages are kept: that is `vmcb_engine::memory::frozen`.

use std::ops::ControlFlow;

use proto::v1::{PhaseReport, Section};

use super::{
    Comparing, ComparingStep, Dirty, Effect, Flight, Input, Pause, Plan, Quiet, RoundTotals, Source, Step, end, fail,
    ms, phase, report,
};
use crate::migration::Failure;

/// Nobody waits for the target but what is kept for it: it may take its time.
pub const SILENCE_US_MAX: u64 = 60_000_000;

/// State [`Source::Frozen`].
#[derive(Debug)]
pub struct Frozen {
    plan: Plan,
    began_us: u64,
    step: FrozenStep,
}

#[derive(Debug)]
enum FrozenStep {
    Freezing,
    Reading(Reading),
}

#[derive(Debug)]
struct Reading {
    sections: Vec<Section>,
    /// Where the next checkpoint begins.
    mark: u32,
    stopped_us: u64,
    quiet: Quiet,
    flight: Flight,
}

impl Frozen {
    /// Asks for the instant.
    pub(super) fn begin(plan: Plan, now_us: u64) -> (Source, Effect) {
        let effect = Effect::Freeze { since: plan.mark };
        (Source::Frozen(Self { plan, began_us: now_us, step: FrozenStep::Freezing }), effect)
    }

    /// Nothing has moved for too long, though there is something to move.
    pub(super) fn look(&mut self, bytes_sent: u64, now_us: u64) -> Result<(), Failure> {
        match &mut self.step {
            FrozenStep::Reading(reading) if reading.flight.sent.is_none() => {
                reading.quiet.look(bytes_sent, now_us, SILENCE_US_MAX, "with pages to take: the checkpoint is given up")
            }
            FrozenStep::Freezing | FrozenStep::Reading(_) => Ok(()),
        }
    }

    pub(super) fn step(self, input: Input, now_us: u64) -> Step {
        let thawed = matches!(&self.step, FrozenStep::Reading(reading) if reading.flight.sent.is_some());
        let mut step = self.take(input, now_us);
        if !thawed && matches!(step.state, Source::Failed(_)) {
            step.effects.insert(0, Effect::Thaw);
        }
        step
    }

    fn take(self, input: Input, now_us: u64) -> Step {
        let input = match end(input, false) {
            ControlFlow::Continue(input) => input,
            ControlFlow::Break(step) => return step,
        };
        let Self { plan, began_us, step } = self;
        match (input, step) {
            (Input::Frozen { epoch, sections, stopped_us }, FrozenStep::Freezing) => {
                let stop = PhaseReport { phase: "stop".to_owned(), ms: ms(stopped_us) };
                let instant = Some(epoch.saturating_sub(1));
                let round = Effect::SendRound { round: 1, since: plan.mark, until: None, last: true, instant };
                let quiet = Quiet::from(now_us);
                let reading = Reading { sections, mark: epoch, stopped_us, quiet, flight: Flight::default() };
                let state = Self { plan, began_us: now_us, step: FrozenStep::Reading(reading) };
                Step { state: Source::Frozen(state), effects: vec![Effect::ReportPhase(stop), round] }
            }
            (Input::RoundSent(totals), FrozenStep::Reading(mut reading)) if reading.flight.sent.is_none() => {
                let landed = reading.flight.sent(totals);
                let mut step = reading.after_flight(plan, began_us, landed, now_us);
                // Everything has been read.
                step.effects.insert(0, Effect::Thaw);
                step
            }
            (Input::Acked { round: 1 }, FrozenStep::Reading(mut reading)) if !reading.flight.acked => {
                let landed = reading.flight.acked();
                reading.after_flight(plan, began_us, landed, now_us)
            }
            (other, FrozenStep::Freezing | FrozenStep::Reading(_)) => {
                fail(other.misplaced("reading a frozen instant"), false, true)
            }
        }
    }
}

impl Reading {
    /// Goes on when everything is sent and acknowledged.
    fn after_flight(self, plan: Plan, began_us: u64, landed: Option<RoundTotals>, now_us: u64) -> Step {
        let Some(totals) = landed else {
            let state = Frozen { plan, began_us, step: FrozenStep::Reading(self) };
            return Step { state: Source::Frozen(state), effects: vec![] };
        };
        let Self { sections, mark, stopped_us, .. } = self;
        let effects = vec![
            report(1, totals, now_us.saturating_sub(began_us), Dirty::default(), 0),
            phase("pages", began_us, now_us),
            Effect::Digest { sections: sections.clone(), verify_full: false },
        ];
        let state = Comparing {
            plan,
            mark,
            pause: Pause::Over(stopped_us),
            began_us: now_us,
            quiet: Quiet::from(now_us),
            step: ComparingStep::Digesting { sections },
        };
        Step { state: Source::Comparing(state), effects }
    }
}

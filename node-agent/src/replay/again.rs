//! The same span of a recording executed twice: once as always, and once with the engine doing its work in another way
//! (every instruction decoded alone). No guest can tell, so two executions that differ show a fault of the engine or of
//! this host, and the first instruction after which they do is found: marks at wide steps, then at narrower ones where
//! they first differ, then at each instruction. Both are executed by one machine, so nothing is held twice.
//!
//! A position is compared as a whole: processors, devices, time, and whether the replay went on. What was recorded is not
//! known here.

use vmcb_engine::journal::Position;
use vmcb_engine::machine::{Machine, Probe};
use vmcb_engine::replay::{PlayError, Timeline, TimelineError};

use super::differences::{self, Field, State, told};
use super::instant::instant;
use super::symbols::Symbols;

/// How many times narrower each look is than the one before.
const NARROWER: u64 = 256;
/// Instructions between two marks at first.
const WIDE: u64 = NARROWER * NARROWER;
/// What values of the second execution are called.
const WITH: &str = "executed otherwise";

/// Where two executions differ first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Apart {
    /// After the instruction that they executed differently.
    pub position: Position,
    /// Lines for people; the last one is the verdict.
    pub lines: Vec<String>,
}

/// A look at an execution.
#[derive(PartialEq)]
struct Mark {
    probe: Probe,
    /// Why it did not get there.
    stuck: Option<String>,
}

/// One way to execute the span again and again.
struct Execution<'a> {
    timeline: &'a mut Timeline,
    /// Is done to the machine where the span begins.
    way: &'a mut dyn FnMut(&mut Machine),
}

impl Execution<'_> {
    fn begin(&mut self) -> Result<(), TimelineError> {
        self.timeline.rewind()?;
        (self.way)(self.timeline.machine_mut());
        Ok(())
    }

    /// Goes on to the first instant after so many instructions, or as far as it gets.
    fn go(&mut self, retired: u64) -> Result<Mark, TimelineError> {
        let stuck = match self.timeline.seek(Position { retired, skipped_tsc: 0 }, &mut || false) {
            Ok(_) => None,
            Err(TimelineError::Play(PlayError::Diverged(mismatch))) => Some(mismatch.to_string()),
            Err(other) => return Err(other),
        };
        Ok(Mark { probe: self.timeline.player().machine().probe(), stuck })
    }

    /// Marks after `low`, every `step` instructions, up to and with `high`.
    fn marks(&mut self, low: u64, high: u64, step: u64) -> Result<Vec<(u64, Mark)>, TimelineError> {
        self.begin()?;
        let steps = (low..high).step_by(step as usize).skip(1).chain([high]);
        steps.map(|retired| self.go(retired).map(|mark| (retired, mark))).collect()
    }
}

/// Executes from a timeline's beginning up to the first instant after so many instructions, in two ways: as the machine does
/// it after `as_always`, and after `otherwise`. `None`: both are the same.
///
/// # Errors
/// The recording cannot be replayed, other than by being diverged from.
pub fn twice(
    timeline: &mut Timeline,
    until: u64,
    as_always: &mut dyn FnMut(&mut Machine),
    otherwise: &mut dyn FnMut(&mut Machine),
    symbols: Option<&Symbols>,
) -> Result<Option<Apart>, TimelineError> {
    let (mut low, mut high, mut step) = (timeline.start().retired, until, WIDE);
    loop {
        let one = Execution { timeline: &mut *timeline, way: &mut *as_always }.marks(low, high, step)?;
        let other = Execution { timeline: &mut *timeline, way: &mut *otherwise }.marks(low, high, step)?;
        let Some(at) = one.iter().zip(&other).position(|(one, other)| one != other) else { return Ok(None) };
        low = at.checked_sub(1).map_or(low, |before| one[before].0);
        high = one[at].0;
        if step == 1 || high - low <= 1 {
            break;
        }
        step = (step / NARROWER).max(1);
    }
    named(timeline, high, [as_always, otherwise], symbols).map(Some)
}

/// Both ways to the first instant at which they differ, which is after `retired` instructions.
fn named(
    timeline: &mut Timeline,
    retired: u64,
    [as_always, otherwise]: [&mut dyn FnMut(&mut Machine); 2],
    symbols: Option<&Symbols>,
) -> Result<Apart, TimelineError> {
    let mut one = Execution { timeline: &mut *timeline, way: as_always };
    one.begin()?;
    // Who executes it is known only behind it.
    one.go(retired)?;
    let vcpu = one.timeline.player().machine().current_vcpu();
    one.begin()?;
    one.go(retired.saturating_sub(1))?;
    let executed = told(one.timeline.player().machine(), vcpu, symbols);
    let one_stuck = one.go(retired)?.stuck;
    let one = State::of(one.timeline.player().machine());
    let mut other = Execution { timeline: &mut *timeline, way: otherwise };
    other.begin()?;
    let other_stuck = other.go(retired)?.stuck;
    let fields: Vec<Field> = one.differences(&State::of(other.timeline.player().machine()));
    let mut lines = vec![
        "executed a second time in another way, it is another history: this engine, or this host, is at fault"
            .to_owned(),
        format!("the first difference is after {}", instant(timeline.player().tape(), one.position)),
        format!("executed: {executed}"),
    ];
    lines.extend(one_stuck.map(|why| format!("it does not go on: {why}")));
    lines.extend(other_stuck.map(|why| format!("{WITH} it does not go on: {why}")));
    lines.extend(differences::lines(&fields, WITH));
    lines.push(differences::verdict(one.position, &fields, WITH));
    Ok(Apart { position: one.position, lines })
}

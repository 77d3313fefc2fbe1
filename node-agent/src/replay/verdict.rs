//! Is the replay what was recorded? At full speed to the end, comparing every probe and every cut. Where it is not, the span
//! since the last equal one is looked at closer: executed twice in two ways it is the same history, or this engine is at
//! fault. It refuses to know why somebody asks.
//!
//! What can be said is bounded by what was recorded: between two probes there is nothing to compare with. If both executions
//! agree, the first instruction that went otherwise lies in the span, and a file that is known to be good shows it (`flip`).

use vmcb_engine::journal::Position;
use vmcb_engine::machine::Machine;
use vmcb_engine::replay::{Goal, Mismatch, PlayError, Player, Spacing, Timeline, TimelineError};

use super::again::{self, Apart};
use super::instant::instant;
use super::symbols::Symbols;

/// One instruction at a time.
const ALONE: usize = 1;

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Every probe and every cut is what was recorded.
    Same {
        /// How many.
        compared: u64,
    },
    /// One is not.
    Diverged {
        /// Where, and what.
        mismatch: Mismatch,
        /// Where the last equal one was.
        last_good: Position,
        /// The same, for people.
        last_good_instant: String,
        /// How many were equal.
        compared: u64,
    },
}

impl Verdict {
    /// Lines for people; the last one is the verdict.
    pub fn lines(&self) -> Vec<String> {
        match self {
            Verdict::Same { compared } => vec![format!("{compared} probes and cuts were compared"), "same".to_owned()],
            Verdict::Diverged { mismatch, last_good_instant, compared, .. } => vec![
                format!("{compared} probes and cuts were equal, the last one at {last_good_instant}"),
                format!("the first that is not is at {}", mismatch.position),
                line(mismatch),
            ],
        }
    }
}

/// The verdict's line of a divergence.
pub fn line(mismatch: &Mismatch) -> String {
    let Mismatch { position, field, ours, recorded } = mismatch;
    let (retired, skipped) = (position.retired, position.skipped_tsc);
    format!("diverged: at instruction {retired} (skipped {skipped}): {field} is {ours}, the recording says {recorded}")
}

/// Replays from where the player is to the end.
///
/// # Errors
/// The recording asks for something that no machine can do.
pub fn check(player: &mut Player) -> Result<Verdict, PlayError> {
    let end = player.run_to(Goal::instruction(u64::MAX), &mut || false);
    let (compared, last_good) = player.compared();
    match end {
        Ok(_) => Ok(Verdict::Same { compared }),
        Err(PlayError::Diverged(mismatch)) => {
            let last_good_instant = instant(player.tape(), last_good);
            Ok(Verdict::Diverged { mismatch, last_good, last_good_instant, compared })
        }
        Err(other) => Err(other),
    }
}

/// Looks closer at a span at whose end a check diverged, with a player that stands at the recording's beginning: lines for
/// people, the last one is a verdict.
///
/// # Errors
/// The recording asks for something that no machine can do.
pub fn closer(
    mut player: Player,
    last_good: Position,
    mismatch: &Mismatch,
    symbols: Option<&Symbols>,
) -> Result<Vec<String>, TimelineError> {
    match player.run_to(Goal::position(last_good), &mut || false) {
        Ok(_) => {}
        Err(PlayError::Diverged(earlier)) => {
            let why = "replayed a second time it diverges elsewhere: this engine, or this host, is at fault";
            return Ok(vec![why.to_owned(), line(&earlier)]);
        }
        Err(other) => return Err(other.into()),
    }
    // All of it is executed from its beginning: no rungs are needed in between.
    let spacing = Spacing { coarse: u64::MAX, fine: u64::MAX, ..Spacing::default() };
    let mut timeline = Timeline::new(player, spacing)?;
    let until = mismatch.position.retired;
    let as_always = &mut |machine: &mut Machine| machine.set_block_ops_max(usize::MAX);
    let otherwise = &mut |machine: &mut Machine| machine.set_block_ops_max(ALONE);
    match again::twice(&mut timeline, until, as_always, otherwise, symbols)? {
        Some(Apart { lines, .. }) => Ok(lines),
        None => Ok(agreed(last_good, mismatch)),
    }
}

fn agreed(last_good: Position, mismatch: &Mismatch) -> Vec<String> {
    vec![
        format!(
            "instructions {} to {} were executed twice, in two ways, and both are the same: the replay is exact here",
            last_good.retired, mismatch.position.retired
        ),
        "so it began with another state than was recorded, or another engine recorded it; with a file of the same recording \
         that is known to be good, --against names the first instruction that goes otherwise"
            .to_owned(),
        line(mismatch),
    ]
}

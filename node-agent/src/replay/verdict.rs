//! Is the replay what was recorded? At full speed to the end, comparing every probe and every cut. It refuses to know why
//! somebody asks.

use vmcb_engine::replay::{Goal, Mismatch, PlayError, Player};

use super::instant::instant;

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
        /// Where the last equal one was, for people.
        last_good: String,
        /// How many were equal.
        compared: u64,
    },
}

impl Verdict {
    /// Lines for people; the last one is the verdict.
    pub fn lines(&self) -> Vec<String> {
        match self {
            Verdict::Same { compared } => vec![format!("{compared} probes and cuts were compared"), "same".to_owned()],
            Verdict::Diverged { mismatch, last_good, compared } => vec![
                format!("{compared} probes and cuts were equal, the last one at {last_good}"),
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
    let (compared, last) = player.compared();
    match end {
        Ok(_) => Ok(Verdict::Same { compared }),
        Err(PlayError::Diverged(mismatch)) => {
            let last_good = instant(player.tape(), last);
            Ok(Verdict::Diverged { mismatch, last_good, compared })
        }
        Err(other) => Err(other),
    }
}

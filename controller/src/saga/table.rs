//! The one table of what may follow what in an operation. Pure: (shape, status, turn) in, status out.
//!
//! ```text
//!   Doing(0) -> Doing(1) -> ... -> Doing(commit) ==> Doing(commit+1) -> ... -> Done
//!      |           |                  |                  |      (a failure here is tried again,
//!      v           v                  v                  v       at the end given up: Left)
//!   Undoing(0) <- Undoing(1) <- ... Undoing(commit)     Left
//!      |
//!      v
//!   Undone
//! ```
//! Left of the double arrow any failure, cancel or crash leads to `Undone`; right of it nothing leads back. A step that
//! failed is undone too, because it may have happened although its answer was lost.

use serde::{Deserialize, Serialize};

/// The steps of a kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Names, in order; shown to people.
    pub steps: &'static [&'static str],
    /// Index of the step that is one ledger append: the point of no return.
    pub commit: usize,
}

/// Where an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// This step is about to be done, or being done.
    Doing(usize),
    /// This step is being undone.
    Undoing(usize),
    /// All steps are done.
    Done,
    /// Nothing of it remains.
    Undone,
    /// Committed, but this step could not be done in time: reconciliation goes on with it.
    Left(usize),
}

impl Status {
    /// Nothing more will happen.
    pub fn ended(self) -> bool {
        matches!(self, Status::Done | Status::Undone | Status::Left(_))
    }
}

/// What happened to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The step was done.
    Did(usize),
    /// The step failed.
    Failed(usize),
    /// The operator does not want it any more.
    Cancelled,
    /// The controller was started again and forgot what it held in memory.
    Interrupted,
    /// The step was undone, or left to the verdicts that the host will hear.
    Undid(usize),
    /// A step after the commit cannot be done now.
    GaveUp(usize),
}

/// A pair that must not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Illegal {
    /// The operation has passed its commit.
    #[error("the operation is committed and can only go forward")]
    Committed,
    /// The operation has ended.
    #[error("the operation has ended")]
    Ended,
    /// Anything else: our own mistake, or a damaged ledger.
    #[error("{turn:?} cannot follow {status:?}")]
    Order {
        /// Where the operation is.
        status: Status,
        /// What was said to have happened.
        turn: Turn,
    },
}

/// The status after a turn.
///
/// # Errors
/// [`Illegal`] for every pair that the diagram at the head of this file does not have.
pub fn next(shape: Shape, status: Status, turn: Turn) -> Result<Status, Illegal> {
    use {Status::*, Turn::*};
    let order = Illegal::Order { status, turn };
    match (status, turn) {
        (Doing(at), Did(step)) if at == step && step + 1 == shape.steps.len() => Ok(Done),
        (Doing(at), Did(step)) if at == step => Ok(Doing(step + 1)),
        (Doing(at), Failed(step)) if at == step && step <= shape.commit => Ok(Undoing(step)),
        (Doing(at), Failed(step)) if at == step => Ok(Doing(step)),
        (Doing(at), Cancelled | Interrupted) if at <= shape.commit => Ok(Undoing(at)),
        (Doing(at), Interrupted) => Ok(Doing(at)),
        (Doing(_), Cancelled) => Err(Illegal::Committed),
        (Doing(at), GaveUp(step)) if at == step && step > shape.commit => Ok(Left(step)),
        (Undoing(at), Undid(step)) if at == step => Ok(if step == 0 { Undone } else { Undoing(step - 1) }),
        (Undoing(at), Cancelled | Interrupted) => Ok(Undoing(at)),
        (Doing(_), Did(_) | Failed(_) | Undid(_) | GaveUp(_)) => Err(order),
        (Undoing(_), Did(_) | Failed(_) | Undid(_) | GaveUp(_)) => Err(order),
        (Done | Undone | Left(_), Did(_) | Failed(_) | Cancelled | Interrupted | Undid(_) | GaveUp(_)) => {
            Err(Illegal::Ended)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHAPE: Shape = Shape { steps: &["prepare", "send", "commit", "activate", "release"], commit: 2 };

    fn turns() -> impl Strategy<Value = Turn> {
        (0..6usize, 0..6usize).prop_map(|(kind, step)| match kind {
            0 => Turn::Did(step),
            1 => Turn::Failed(step),
            2 => Turn::Cancelled,
            3 => Turn::Interrupted,
            4 => Turn::Undid(step),
            _ => Turn::GaveUp(step),
        })
    }

    proptest! {
        #[test]
        fn nothing_committed_is_undone_and_nothing_undone_commits(turns in proptest::collection::vec(turns(), 0..60)) {
            let (mut status, mut committed, mut undoing) = (Status::Doing(0), false, false);
            for turn in turns {
                let Ok(after) = next(SHAPE, status, turn) else { continue };
                prop_assert!(!status.ended(), "an ended operation moved: {status:?} {turn:?}");
                committed |= turn == Turn::Did(SHAPE.commit);
                undoing |= matches!(after, Status::Undoing(_) | Status::Undone);
                prop_assert!(!(committed && undoing), "{status:?} {turn:?} {after:?}");
                if matches!(after, Status::Done | Status::Left(_)) {
                    prop_assert!(committed);
                }
                status = after;
            }
        }
    }

    #[test]
    fn every_step_is_undone_once_in_reverse_order() {
        for failing in 0..=SHAPE.commit {
            let mut status = (0..failing).fold(Status::Doing(0), |s, n| next(SHAPE, s, Turn::Did(n)).unwrap());
            status = next(SHAPE, status, Turn::Failed(failing)).unwrap();
            for step in (0..=failing).rev() {
                assert_eq!(status, Status::Undoing(step));
                status = next(SHAPE, status, Turn::Undid(step)).unwrap();
            }
            assert_eq!(status, Status::Undone);
        }
    }

    #[test]
    fn cancel_comes_too_late_after_the_commit() {
        assert_eq!(next(SHAPE, Status::Doing(3), Turn::Cancelled), Err(Illegal::Committed));
        assert_eq!(next(SHAPE, Status::Doing(2), Turn::Cancelled), Ok(Status::Undoing(2)));
    }
}

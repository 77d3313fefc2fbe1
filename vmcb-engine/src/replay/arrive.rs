//! A machine that came from a checkpoint goes through a recording before it runs: so it arrives at any instant, not only
//! where it was captured.
//!
//! ```text
//! apply, expect(block)..., arrive_at(position), arrive() until it says that it is there
//! ```
//! Nothing leaves the machine meanwhile: what it says and sends was said and sent before. The machine that arrives goes on
//! as one that was put into a captured state. Refuses to know where blocks come from.

use super::play::{BootImages, Goal, Pause, PlayError, Player};
use super::record::{Body, Door};
use super::tape::{Rate, Tape, TapeError};
use crate::journal::{Chain, ChainError, Position};

/// Instructions in one go.
const SLICE: u64 = 4_000_000;

/// Why a machine does not arrive.
#[derive(Debug, thiserror::Error)]
pub enum ArrivalError {
    /// A block does not continue what came before.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// What blocks say makes no recording.
    #[error(transparent)]
    Tape(#[from] TapeError),
    /// The machine is not what was recorded.
    #[error(transparent)]
    Play(#[from] PlayError),
    /// Nothing is there to go through, or the instant is not in it.
    #[error("the recording spans {start} to {end}: {wanted} is not in it")]
    Span {
        /// Where it begins.
        start: Position,
        /// Where it ends.
        end: Position,
        /// What is wanted.
        wanted: Position,
    },
    /// Another recording is gone through already.
    #[error("this machine goes through a recording already")]
    Busy,
}

impl Door {
    /// Takes a block of the recording that is gone through before the machine runs.
    ///
    /// # Errors
    /// It does not continue the block before, or the first one begins no segment; nothing has changed then.
    pub fn expect(&mut self, frame: &[u8]) -> Result<(), ArrivalError> {
        if matches!(self.body, Body::Player { .. }) {
            return Err(ArrivalError::Busy);
        }
        let rate = Rate::of(self.machine().config());
        let (chain, tape) = self.incoming.get_or_insert_with(|| (Chain::new(), Tape::new(rate)));
        let block = chain.take(frame)?;
        tape.push(block)?;
        Ok(())
    }

    /// Begins to go through what was expected, up to a position: [`Door::arrive`] does it.
    ///
    /// # Errors
    /// The position is not in it, or the machine is not where it begins.
    pub fn arrive_at(&mut self, until: Position, images: Option<BootImages>) -> Result<(), ArrivalError> {
        let here = self.position();
        let span = |start, end| ArrivalError::Span { start, end, wanted: until };
        let (_, tape) = self.incoming.take().ok_or(span(here, here))?;
        let (start, end) = (tape.start(), tape.end());
        if start != here || !(start <= until && until <= end) {
            return Err(span(start, end));
        }
        match std::mem::replace(&mut self.body, Body::Between) {
            Body::Machine(mut machine) => {
                machine.mute(true);
                let player = Box::new(Player::waiting(*machine, tape.into(), images));
                self.body = Body::Player { player, until };
                Ok(())
            }
            other @ (Body::Player { .. } | Body::Between) => {
                self.body = other;
                Err(ArrivalError::Busy)
            }
        }
    }

    /// Where the machine is on its way; `None` if it is on none.
    pub fn arriving(&self) -> Option<Position> {
        matches!(self.body, Body::Player { .. }).then(|| self.position())
    }

    /// Goes on through the recording for a few million instructions; true if the machine is there.
    ///
    /// # Errors
    /// It is not what was recorded. It cannot go on then.
    pub fn arrive(&mut self) -> Result<bool, ArrivalError> {
        let Body::Player { player, until } = &mut self.body else { return Ok(true) };
        let goal = Goal::position(*until).or_instruction(player.position().retired + SLICE);
        let pause = player.run_to(goal, &mut || false)?;
        if player.position() < *until && pause != Pause::End {
            return Ok(false);
        }
        if let Body::Player { player, .. } = std::mem::replace(&mut self.body, Body::Between) {
            let mut machine = player.into_machine();
            machine.mute(false);
            // What failed later when this was recorded is of another history.
            machine.forget_disk_failures();
            self.body = Body::Machine(Box::new(machine));
        }
        Ok(true)
    }
}

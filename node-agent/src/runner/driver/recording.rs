//! A recording in the machine thread: time for its blocks, and the guest that waits for room.
//!
//! The guest's door records; here is what it cannot know. A block is closed every two seconds, so that what is recorded is
//! known up to then; an idle guest's time is brought up to the present for it, which the guest cannot notice. It refuses to
//! know where blocks go.

use proto::status::Code;
use proto::v1::runner_reply::Reply;
use proto::v1::{RecordRequest, RunnerFailure, RunnerJournal, RunnerReplay, RunnerTakeJournal, VmState};

use super::{Closed, Driver, Guest, Outbox, Phase, Wait, failure};
use crate::clock::Clock;

/// How long a block stays open.
pub const BLOCK_NS: u64 = 2_000_000_000;
/// A guest that waits for its journal to be taken looks again after so long.
const WAIT_NS: u64 = 2_000_000;

impl<G: Guest, C: Clock, O: Outbox> Driver<G, C, O> {
    pub(super) fn record(&mut self, request: &RecordRequest) -> Result<(), RunnerFailure> {
        if !matches!(self.phase, Phase::Live) {
            return Err(failure(Code::Conflict, "this machine does not run"));
        }
        if self.running {
            self.wake();
        }
        self.guest.set_realtime(self.clock.realtime_ns());
        self.block_until_ns = self.clock.boottime_ns().saturating_add(BLOCK_NS);
        self.guest.record(request)
    }

    /// A guest that has come goes through a recording before it runs.
    pub(super) fn replay(&mut self, replay: &RunnerReplay) -> Result<(), RunnerFailure> {
        let fresh = self.sealed && !self.running && self.guest.arriving().is_none();
        if self.phase != Phase::Live || !fresh {
            return Err(failure(Code::Conflict, "only a guest that has just come can go through a recording"));
        }
        let corrupt = |text: String| failure(Code::Corrupt, &text);
        replay.blocks.iter().try_for_each(|frame| self.guest.expect_block(frame)).map_err(corrupt)?;
        let Some(until) = replay.until else { return Ok(()) };
        let images = self.images.as_mut().map(|images| images.load()).transpose().map_err(corrupt)?;
        self.guest.arrive_at(until, images).map_err(corrupt)
    }

    /// A few milliseconds of that. A guest that is not what was recorded has ended.
    pub(super) fn go_on_arriving(&mut self) -> Result<(), Closed> {
        match self.guest.arrive() {
            Ok(_) => {
                self.booted_tsc = self.guest.tsc();
                Ok(())
            }
            Err(text) => self.end(VmState::Crashed, &format!("the recording does not replay: {text}")),
        }
    }

    pub(super) fn take_journal(&mut self, take: &RunnerTakeJournal) -> Reply {
        if take.flush {
            self.block_until_ns = 0;
            self.keep_journal();
        }
        let blocks = self.guest.take_journal(take.from);
        Reply::Journal(RunnerJournal { info: self.guest.recording(), blocks })
    }

    /// Tells the door the time, and closes its block if that is due.
    pub(super) fn keep_journal(&mut self) {
        if !self.guest.is_recording() {
            return;
        }
        self.guest.set_realtime(self.clock.realtime_ns());
        let now = self.clock.boottime_ns();
        if now < self.block_until_ns {
            return;
        }
        if let (Some(until_tsc), Some(pace), true) = (self.idle, &self.pace, self.running) {
            let tsc = pace.woken(now, self.guest.tsc(), until_tsc);
            self.guest.skip_idle_until(tsc);
        }
        self.guest.close_block();
        self.block_until_ns = now.saturating_add(BLOCK_NS);
    }

    /// A guest that waits is looked at again when its block is to be closed.
    pub(super) fn until_block_closes(&self, wait: Wait) -> Wait {
        match wait {
            Wait::Until(instant) if self.guest.is_recording() => Wait::Until(instant.min(self.block_until_ns)),
            Wait::Input if self.guest.is_recording() => Wait::Until(self.block_until_ns),
            wait => wait,
        }
    }

    /// Until when the guest must wait for its journal to be taken; none if it need not.
    pub(super) fn waits_for_journal(&self) -> Option<u64> {
        self.guest.must_wait().then(|| self.clock.boottime_ns().saturating_add(WAIT_NS))
    }
}

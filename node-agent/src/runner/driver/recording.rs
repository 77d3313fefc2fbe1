//! A recording in the machine thread: time for its blocks, and the guest that waits for room.
//!
//! The guest's door records; here is what it cannot know. A block is closed every two seconds, so that what is recorded is
//! known up to then; an idle guest's time is brought up to the present for it, which the guest cannot notice. It refuses to
//! know where blocks go.

use proto::status::Code;
use proto::v1::runner_reply::Reply;
use proto::v1::{
    JournalFull, Position, RecordRequest, RecordingInfo, RunnerFailure, RunnerJournal, RunnerReplay, RunnerTakeJournal,
    VmState,
};
use vmcb_engine::journal::RecordingId;
use vmcb_engine::replay::{BootImages, Door, WhenFull};

use super::{Closed, Driver, Guest, Outbox, Phase, Wait, failure};
use crate::clock::Clock;
use crate::vm::actor::chain;

/// Most bytes of a journal that wait for the agent, where it does not say.
const KEPT_BYTES_MAX: usize = 64 << 20;
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
        self.block_until_ns = self.clock.boottime_ns().saturating_add(BLOCK_NS);
        let realtime_ns = self.clock.realtime_ns();
        let door = self.guest.door_mut().ok_or_else(no_door)?;
        door.set_realtime(realtime_ns);
        if request.recording.is_empty() {
            door.stop_recording("stopped");
            return Ok(());
        }
        let id = RecordingId::from_slice(&request.recording)
            .ok_or_else(|| failure(Code::BadInput, "a recording has a name of 16 bytes"))?;
        let when_full = match request.full() {
            JournalFull::Wait => WhenFull::Wait,
            JournalFull::End | JournalFull::Unspecified => WhenFull::End,
        };
        let kept_bytes_max = match request.kept_bytes_max {
            0 => KEPT_BYTES_MAX,
            bytes => bytes.try_into().unwrap_or(usize::MAX),
        };
        door.record(id, kept_bytes_max, when_full).map_err(|error| failure(Code::Conflict, &chain(&error)))
    }

    /// True if something is recorded.
    fn is_recording(&self) -> bool {
        self.guest.door().is_some_and(Door::is_recording)
    }

    /// How the recording stands; none if there never was one.
    pub(super) fn recorded(&self) -> Option<RecordingInfo> {
        self.guest.door()?.info()
    }

    /// Ends what is recorded, if anything is.
    pub(super) fn stop_recording(&mut self, why: &str) {
        if let Some(door) = self.guest.door_mut() {
            door.stop_recording(why);
        }
    }

    /// Where the guest is on its way through a recording; none: it is on none.
    pub(super) fn arriving(&self) -> Option<Position> {
        self.guest.door()?.arriving().map(Position::from)
    }

    /// A guest that has come goes through a recording before it runs.
    pub(super) fn replay(&mut self, replay: &RunnerReplay) -> Result<(), RunnerFailure> {
        let fresh = self.sealed && !self.running && self.arriving().is_none();
        if self.phase != Phase::Live || !fresh {
            return Err(failure(Code::Conflict, "only a guest that has just come can go through a recording"));
        }
        let corrupt = |text: String| failure(Code::Corrupt, &text);
        let door = self.guest.door_mut().ok_or_else(no_door)?;
        replay.blocks.iter().try_for_each(|frame| door.expect(frame)).map_err(|error| corrupt(chain(&error)))?;
        let Some(until) = replay.until else { return Ok(()) };
        let images = self.images.as_mut().map(|images| images.load()).transpose().map_err(corrupt)?;
        let images = images.map(|(kernel, initrd)| BootImages { kernel, initrd });
        door.arrive_at(until.into(), images).map_err(|error| corrupt(chain(&error)))
    }

    /// A few milliseconds of that. A guest that is not what was recorded has ended.
    pub(super) fn go_on_arriving(&mut self) -> Result<(), Closed> {
        let arrived = self.guest.door_mut().map_or(Ok(true), Door::arrive);
        if let Err(error) = arrived {
            return self.end(VmState::Crashed, &format!("the recording does not replay: {}", chain(&error)));
        }
        self.booted_tsc = self.guest.tsc();
        Ok(())
    }

    pub(super) fn take_journal(&mut self, take: &RunnerTakeJournal) -> Reply {
        let blocks = self.guest.door_mut().map_or_else(Vec::new, |door| door.take(take.from));
        Reply::Journal(RunnerJournal { info: self.recorded(), blocks })
    }

    /// Tells the door the time, and closes its block if that is due.
    pub(super) fn keep_journal(&mut self) {
        let realtime_ns = self.clock.realtime_ns();
        let Some(door) = self.guest.door_mut().filter(|door| door.is_recording()) else { return };
        door.set_realtime(realtime_ns);
        let now = self.clock.boottime_ns();
        if now < self.block_until_ns {
            return;
        }
        if let (Some(until_tsc), Some(pace), true) = (self.idle, &self.pace, self.running) {
            door.skip_idle_until(pace.woken(now, door.machine().tsc(), until_tsc));
        }
        door.close_block();
        self.block_until_ns = now.saturating_add(BLOCK_NS);
    }

    /// A guest that waits is looked at again when its block is to be closed.
    pub(super) fn until_block_closes(&self, wait: Wait) -> Wait {
        match wait {
            Wait::Until(instant) if self.is_recording() => Wait::Until(instant.min(self.block_until_ns)),
            Wait::Input if self.is_recording() => Wait::Until(self.block_until_ns),
            wait => wait,
        }
    }

    /// Until when the guest must wait for its journal to be taken; none if it need not.
    pub(super) fn waits_for_journal(&self) -> Option<u64> {
        self.must_wait().then(|| self.clock.boottime_ns().saturating_add(WAIT_NS))
    }

    /// True while the guest must not run, because blocks are not taken.
    pub(super) fn must_wait(&self) -> bool {
        self.guest.door().is_some_and(Door::must_wait)
    }
}

fn no_door() -> RunnerFailure {
    failure(Code::Incapable, "this guest cannot be recorded")
}

//! A checkpoint's instant in the machine thread: the stop that names it, and the guest that goes on beside it.
//!
//! The stop is one request between two slices: capture the sections, close the epoch. From then on the machine keeps what
//! the guest overwrites, until the agent thaws it. What is kept takes host memory, so there is an end to it: a guest that
//! overwrites faster than the agent reads rests until there is room, and if there is none for long the instant is given up
//! and the guest runs free. So it does when the agent falls silent. It refuses to know how pages are kept.

use std::ops::RangeInclusive;

use proto::status::Code;
use proto::v1::runner_reply::Reply;
use proto::v1::{RunnerFailure, RunnerFreeze, RunnerFrozen};

use super::{Driver, Guest, Outbox, Phase, failure};
use crate::clock::Clock;

/// Most host memory for what is kept: a quarter of RAM, within these bounds.
const KEPT_BYTES: RangeInclusive<u64> = 64 << 20..=4 << 30;
/// A guest that waits for room looks again after so long.
const WAIT_NS: u64 = 1_000_000;
/// It waits at most so long in one go.
const WAIT_NS_MAX: u64 = 5_000_000_000;

/// An instant that is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Frozen {
    /// It lapses then.
    until_ns: u64,
    /// Since when there has been no room.
    full_since_ns: Option<u64>,
}

impl<G: Guest, C: Clock, O: Outbox> Driver<G, C, O> {
    pub(super) fn freeze(&mut self, request: &RunnerFreeze) -> Result<Reply, RunnerFailure> {
        match &self.phase {
            Phase::Fresh => return Err(failure(Code::Conflict, "this machine has no state yet")),
            Phase::Ended(_, reason) => {
                return Err(failure(Code::Conflict, &format!("the guest has ended: {reason}")));
            }
            Phase::Live => {}
        }
        let began_ns = self.clock.boottime_ns();
        if self.running {
            // What it knows of time, and what was typed, is as of now.
            self.wake();
            self.feed_console();
        }
        let sections = self.guest.capture().map_err(|text| failure(Code::Internal, &text))?;
        let epoch = self.guest.freeze(request.mark).map_err(|text| failure(Code::Exhausted, &text))?;
        self.frozen = Some(Frozen { until_ns: self.valid_until_ns(request.valid_ms), full_since_ns: None });
        let stopped_us = self.clock.boottime_ns().saturating_sub(began_ns) / 1000;
        Ok(Reply::Frozen(RunnerFrozen { sections, epoch, stopped_us }))
    }

    pub(super) fn stay_frozen(&mut self, valid_ms: u32) -> Result<(), RunnerFailure> {
        let until_ns = self.valid_until_ns(valid_ms);
        self.frozen.as_mut().ok_or_else(lost)?.until_ns = until_ns;
        Ok(())
    }

    pub(super) fn thaw(&mut self) -> Result<(), RunnerFailure> {
        match (self.frozen.take(), self.guest.thaw()) {
            (None, _) => Err(lost()),
            (Some(_), false) => {
                Err(failure(Code::Exhausted, "the host had no memory to keep what the guest overwrote meanwhile"))
            }
            (Some(_), true) => Ok(()),
        }
    }

    /// Nobody wants the instant any more.
    pub(super) fn forget_frozen(&mut self) {
        if self.frozen.take().is_some() {
            self.guest.thaw();
        }
    }

    /// Until when the guest must wait before it goes on beside a frozen instant; none if it need not.
    pub(super) fn waits_for_room(&mut self) -> Option<u64> {
        let now = self.clock.boottime_ns();
        let frozen = self.frozen.as_mut()?;
        let room = (self.terms.config.memory_bytes / 4).clamp(*KEPT_BYTES.start(), *KEPT_BYTES.end());
        if self.guest.kept_bytes() <= room {
            frozen.full_since_ns = None;
        } else if now.saturating_sub(*frozen.full_since_ns.get_or_insert(now)) < WAIT_NS_MAX && now < frozen.until_ns {
            return Some(now.saturating_add(WAIT_NS).min(frozen.until_ns));
        } else {
            eprintln!("vm-runner: a checkpoint is given up: there is no room for what the guest overwrites");
            self.forget_frozen();
            return None;
        }
        if now >= frozen.until_ns {
            self.forget_frozen();
        }
        None
    }
}

fn lost() -> RunnerFailure {
    let text =
        "the instant was given up: the guest overwrote memory faster than it was read, or nobody asked for it in time";
    failure(Code::Exhausted, text)
}

//! The machine thread: the only owner of the guest.
//!
//! ```text
//! Fresh --boot/apply--> Live --power-off, engine failure, too many resets at once--> Ended
//!                       Live --reset, triple fault--> Live, booted again from the images that travel with the VM
//! Live runs while: no pause is asked for, and the lease holds (CLOCK_BOOTTIME)
//! ```
//! The guest runs in slices of about two milliseconds, or, where an input ends its run, for as long as there is none (a tenth of
//! a second at most, and not beyond the lease); between two slices the driver takes inputs, moves console
//! bytes and looks at the lease. Stopping is therefore always between two instructions. A guest that is held back for a
//! transfer rests after each slice in proportion to how long it took; that is the driver's doing and no state of the guest. The driver knows no socket and
//! no file: inputs and outputs are values, the clock is an argument.

pub mod debugging;
mod frozen;
mod recording;

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::PoisonError;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use proto::status::Code;
use proto::v1::runner_reply::Reply;
use proto::v1::runner_request::Request;
use proto::v1::{
    MachineConfig, RunnerAttached, RunnerEpoch, RunnerFailure, RunnerMapping, RunnerReply, RunnerRequest,
    RunnerSections, RunnerState, VmState, VmcbReply,
};
use vmcb_engine::transfer::rounds::THROTTLE_PERCENT_MAX;

use self::debugging::Debugger;
use self::frozen::Frozen;
use super::faults::Missing;
use super::guest::{Guest, Outcome};
use super::pace::{Idle, Pace, Start};
use super::serve::StandingAnswer;
use crate::clock::Clock;
use crate::vm::actor::chain;

/// A reset that comes within this much guest time of the last start is a quick one; so many in a row end the guest.
const QUICK_RESET_NS: u64 = 1_000_000_000;
const QUICK_RESETS_MAX: u32 = 5;
/// Why a guest stands still that a debugger holds.
pub const UNDER_DEBUGGER: &str = "under a debugger";
/// Why hardware is not recorded.
const SOFT_ONLY: &str =
    "recording, replaying and debugging need the software engine: this guest runs on engine \"kvm\"";
/// Slices aim at this long.
const SLICE_NS: u64 = 2_000_000;
const SLICE_INSTRUCTIONS: std::ops::RangeInclusive<u64> = 10_000..=5_000_000;
/// The longest slice of a guest that comes back when there is an input.
const LONG_SLICE_NS: u64 = 100_000_000;
/// Inputs taken between two slices.
const INPUTS_BETWEEN_SLICES: usize = 256;

/// What enters the machine thread.
#[derive(Debug)]
pub enum Input {
    /// A request of connection `connection`.
    Request {
        /// Number of the connection, repeated in the reply.
        connection: u64,
        /// The request.
        request: RunnerRequest,
    },
    /// An Ethernet frame from a tap.
    Packet {
        /// Card, in order of the configuration.
        card: usize,
        /// The frame.
        bytes: Vec<u8>,
    },
}

/// What leaves the machine thread.
#[derive(Debug)]
pub enum Output {
    /// Answer to a request of this connection.
    Reply {
        /// Connection that asked.
        connection: u64,
        /// The answer.
        reply: Box<RunnerReply>,
    },
    /// The console said this.
    Console(Vec<u8>),
    /// The state changed by itself.
    Changed(Box<RunnerState>),
    /// The next packet may come.
    PacketTaken,
}

/// Where outputs go. `Err` means that nobody is left to take them.
pub trait Outbox {
    /// Hands over one output; may wait for room.
    ///
    /// # Errors
    /// The other thread has ended.
    fn send(&mut self, output: Output) -> Result<(), Closed>;
}

/// The I/O thread has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the I/O thread has ended")]
pub struct Closed;

/// What boots the guest. Descriptors were opened before privileges were dropped.
pub trait BootImages {
    /// Reads kernel and initrd.
    ///
    /// # Errors
    /// Which file could not be read, and why.
    fn load(&mut self) -> Result<(Vec<u8>, Option<Vec<u8>>), String>;
    /// The kernel's path, for people.
    fn kernel_path(&self) -> String;
    /// Whether they are part of the VM, so that it can boot from them again wherever it is.
    fn travel(&self) -> bool;
}

/// Sends frames out of a network card, as announcements do.
pub trait Cable {
    /// Sends a frame; a full queue drops it.
    fn send(&mut self, frame: &[u8]);
}

/// Everything about the guest that does not change.
pub struct Terms {
    /// What the machine was built from.
    pub config: MachineConfig,
    /// Names of the descriptors that follow the reply to `attach`.
    pub descriptors: Vec<String>,
    /// State digest over sections (`MachineDigest.state`).
    pub state_digest: fn(&[proto::v1::Section]) -> [u8; 32],
    /// A cable per card that has a tap, with the card's MAC.
    pub cables: Vec<(Box<dyn Cable>, [u8; 6])>,
    /// Pages of RAM that the agent brings while the guest runs.
    pub missing: Option<Missing>,
    /// Where the answer to `attach` is kept up to date, for an agent that comes while this thread sleeps.
    pub standing_answer: Option<StandingAnswer>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Phase {
    Fresh,
    Live,
    Ended(VmState, String),
}

/// How long the thread may wait for inputs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// Not at all: there are instructions to run.
    No,
    /// Until this instant of `CLOCK_BOOTTIME`.
    Until(u64),
    /// Until an input comes.
    Input,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lease {
    /// None was given yet: nothing may run.
    Missing,
    Until(u64),
    Unlimited,
}

/// The machine thread's state.
pub struct Driver<G, C, O> {
    guest: G,
    clock: C,
    outbox: O,
    images: Option<Box<dyn BootImages>>,
    terms: Terms,
    phase: Phase,
    pause: Option<String>,
    lease: Lease,
    pace: Option<Pace>,
    idle: Option<Option<u64>>,
    slice: u64,
    console_pending: VecDeque<u8>,
    packets: VecDeque<(usize, Vec<u8>)>,
    /// What was captured, or applied, is the guest until it runs again: nothing may be added to it.
    sealed: bool,
    quick_resets: u32,
    booted_tsc: u64,
    throttle: Option<Throttle>,
    frozen: Option<Frozen>,
    debugger: Option<Debugger>,
    /// When the open block of a recording is closed.
    block_until_ns: u64,
    running: bool,
    stopped_ns: u64,
    started_ns: u64,
    first: First,
}

/// The first instruction after a state was applied: it is run by itself, so that its time is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum First {
    /// Nothing was applied.
    No,
    Awaited,
    /// `CLOCK_BOOTTIME` after it.
    Ran(u64),
}

/// How a guest is held back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Throttle {
    /// Of its time, at most [`THROTTLE_PERCENT_MAX`].
    percent: u64,
    /// It lapses then.
    until_ns: u64,
    /// No slice begins before.
    rest_until_ns: u64,
}

impl<G: Guest, C: Clock, O: Outbox> Driver<G, C, O> {
    /// A driver of a guest without state, paused, without a lease.
    pub fn new(guest: G, clock: C, outbox: O, terms: Terms, images: Option<Box<dyn BootImages>>) -> Self {
        let stopped_ns = clock.boottime_ns();
        let driver = Driver {
            guest,
            clock,
            outbox,
            images,
            terms,
            phase: Phase::Fresh,
            pause: None,
            lease: Lease::Missing,
            pace: None,
            idle: None,
            slice: *SLICE_INSTRUCTIONS.start(),
            console_pending: VecDeque::new(),
            packets: VecDeque::new(),
            sealed: false,
            quick_resets: 0,
            booted_tsc: 0,
            throttle: None,
            frozen: None,
            debugger: None,
            block_until_ns: 0,
            running: false,
            stopped_ns,
            started_ns: 0,
            first: First::No,
        };
        if let Some(answer) = &driver.terms.standing_answer {
            *answer.lock().unwrap_or_else(PoisonError::into_inner) = driver.attached();
        }
        driver
    }

    /// Runs until a shutdown is asked for, or until nobody listens any more.
    ///
    /// # Errors
    /// [`Closed`] when the other thread ended without having been told to.
    pub fn serve(&mut self, inputs: &Receiver<Input>) -> Result<(), Closed> {
        loop {
            let first = match self.step()? {
                Wait::No => match inputs.try_recv() {
                    Ok(input) => Some(input),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return Err(Closed),
                },
                Wait::Input => Some(inputs.recv().map_err(|_| Closed)?),
                Wait::Until(instant) => {
                    let wait = Duration::from_nanos(instant.saturating_sub(self.clock.boottime_ns()));
                    match inputs.recv_timeout(wait) {
                        Ok(input) => Some(input),
                        Err(RecvTimeoutError::Timeout) => None,
                        Err(RecvTimeoutError::Disconnected) => return Err(Closed),
                    }
                }
            };
            let Some(first) = first else { continue };
            for input in std::iter::once(first).chain(inputs.try_iter().take(INPUTS_BETWEEN_SLICES)) {
                if self.take(input)?.is_break() {
                    return Ok(());
                }
            }
        }
    }

    /// Runs at most one slice; says how long the thread may wait before the next.
    ///
    /// # Errors
    /// [`Closed`].
    pub fn step(&mut self) -> Result<Wait, Closed> {
        self.note_running(true)?;
        self.note_state();
        self.keep_journal();
        if self.arriving().is_some() {
            self.go_on_arriving()?;
            return Ok(Wait::No);
        }
        if !self.running {
            return Ok(Wait::Input);
        }
        let wait = self.slice()?;
        Ok(self.until_block_closes(wait))
    }

    fn slice(&mut self) -> Result<Wait, Closed> {
        self.feed_console();
        self.deliver_packets()?;
        let rests = self.resting().or_else(|| self.waits_for_room()).or_else(|| self.waits_for_journal());
        if let Some(instant) = rests {
            return Ok(Wait::Until(instant.min(self.lease_end_ns())));
        }
        if let Some(until_tsc) = self.idle {
            let wait = self.rest(until_tsc);
            if wait != Wait::No {
                return Ok(wait);
            }
        }
        let (before, retired) = (self.clock.boottime_ns(), self.guest.retired());
        let slice = match self.first {
            First::Awaited => 1,
            First::No | First::Ran(_) => {
                self.slice_in_time(before).unwrap_or_else(|| self.slice_under_debugger(self.slice))
            }
        };
        let outcome = self.guest.run(retired.saturating_add(slice));
        let after = self.clock.boottime_ns();
        if self.first == First::Awaited && self.guest.retired() > retired {
            self.first = First::Ran(after);
        }
        if let Some(throttle) = &mut self.throttle {
            // A slice that took longer waited for a processor: the guest need not make up for that.
            let ran_ns = after.saturating_sub(before).min(2 * SLICE_NS);
            let rest_ns = ran_ns * throttle.percent / (100 - throttle.percent);
            throttle.rest_until_ns = after.saturating_add(rest_ns);
        }
        self.flush_console()?;
        self.note_step();
        match outcome {
            Outcome::Reached if self.guest.runs_in_real_time() => {}
            Outcome::Reached => self.adapt_slice(after.saturating_sub(before)),
            Outcome::Idle { until_tsc } => {
                self.idle = Some(until_tsc);
                return Ok(self.rest(until_tsc));
            }
            Outcome::PowerOff => self.end(VmState::Stopped, "the guest switched itself off")?,
            Outcome::Reset => self.reset(VmState::Stopped, "the guest asked for a reset")?,
            Outcome::TripleFault => self.reset(VmState::Crashed, "triple fault")?,
            Outcome::Failed(text) => self.end(VmState::Crashed, &format!("the engine cannot go on: {text}"))?,
            Outcome::Stop { vcpu, why } => self.note_stop(vcpu, &why),
        }
        Ok(Wait::No)
    }

    /// Boots again. A VM whose images did not travel with it ends, in `state`; so does one that only resets.
    fn reset(&mut self, state: VmState, why: &str) -> Result<(), Closed> {
        let Some(images) = self.images.as_mut() else { return self.end(state, why) };
        let ran = self.guest.tsc().saturating_sub(self.booted_tsc);
        let quick_tsc = u128::from(self.terms.config.tsc_hz) * u128::from(QUICK_RESET_NS) / 1_000_000_000;
        self.quick_resets = if u128::from(ran) < quick_tsc { self.quick_resets + 1 } else { 0 };
        if self.quick_resets >= QUICK_RESETS_MAX {
            let text = format!("reset {QUICK_RESETS_MAX} times in a row within a second of its start; at last: {why}");
            return self.end(VmState::Crashed, &text);
        }
        // Its RAM begins as zeros: what has not come yet is not needed any more.
        let given_up = self.terms.missing.as_ref().map_or(Ok(()), Missing::give_up);
        if let Err(errno) = given_up {
            return self.end(VmState::Crashed, &format!("{why}, and it cannot start again: missing pages: {errno}"));
        }
        let booted = images.load().and_then(|(kernel, initrd)| self.guest.reset(&kernel, initrd.as_deref()));
        if let Err(text) = booted {
            return self.end(VmState::Crashed, &format!("{why}, and it cannot start again: {text}"));
        }
        eprintln!("vm-runner: started again: {why}");
        self.booted_tsc = self.guest.tsc();
        Ok(())
    }

    /// Until when a guest that is held back rests; none if it may go on.
    fn resting(&mut self) -> Option<u64> {
        let now = self.clock.boottime_ns();
        if self.throttle.is_some_and(|throttle| now >= throttle.until_ns) {
            self.throttle = None;
        }
        let throttle = self.throttle?;
        (now < throttle.rest_until_ns).then_some(throttle.rest_until_ns.min(throttle.until_ns))
    }

    /// How far a guest runs whose time goes on by itself, so that its slices need not be found: until it is wanted, if it comes
    /// back for that; none: it is a guest of the other kind.
    fn slice_in_time(&self, now_ns: u64) -> Option<u64> {
        if !self.guest.runs_in_real_time() {
            return None;
        }
        let wanted = self.throttle.is_some() || !self.console_pending.is_empty() || self.guest.bell().is_none();
        let longest = if wanted { SLICE_NS } else { LONG_SLICE_NS };
        let ns = self.lease_end_ns().saturating_sub(now_ns).min(longest);
        let ticks = u128::from(ns) * u128::from(self.terms.config.tsc_hz) / 1_000_000_000;
        u64::try_from(ticks / u128::from(self.terms.config.tsc_per_instruction.max(1))).ok()
    }

    fn adapt_slice(&mut self, took_ns: u64) {
        let (low, high) = (*SLICE_INSTRUCTIONS.start(), *SLICE_INSTRUCTIONS.end());
        self.slice = if took_ns > SLICE_NS { self.slice / 2 } else { self.slice + self.slice / 4 }.clamp(low, high);
    }

    /// An idle guest: lets its time jump, or says how long to wait.
    fn rest(&mut self, until_tsc: Option<u64>) -> Wait {
        let lease = self.lease_end_ns();
        let decision = match (&self.pace, until_tsc) {
            (Some(pace), until) => pace.idle(self.clock.boottime_ns(), until),
            (None, Some(until)) => Idle::Skip(until),
            (None, None) => Idle::Wait,
        };
        match decision {
            Idle::Skip(tsc) => {
                self.guest.skip_idle_until(tsc.max(self.guest.tsc()));
                self.idle = None;
                Wait::No
            }
            Idle::WaitUntil(instant) => Wait::Until(instant.min(lease)),
            Idle::Wait if lease == u64::MAX => Wait::Input,
            Idle::Wait => Wait::Until(lease),
        }
    }

    /// Brings the time of an idle guest up to now: something is about to happen to it.
    fn wake(&mut self) {
        if let Some(until_tsc) = self.idle.take()
            && let Some(pace) = &self.pace
        {
            let tsc = pace.woken(self.clock.boottime_ns(), self.guest.tsc(), until_tsc);
            self.guest.skip_idle_until(tsc);
        }
    }

    /// When the lease will have ended.
    fn lease_end_ns(&self) -> u64 {
        match self.lease {
            Lease::Until(instant) => instant.saturating_add(1),
            Lease::Unlimited | Lease::Missing => u64::MAX,
        }
    }

    fn lease_holds(&self) -> bool {
        match self.lease {
            Lease::Missing => false,
            Lease::Unlimited => true,
            Lease::Until(instant) => self.clock.boottime_ns() <= instant,
        }
    }

    /// Compares what the guest may do with what it does; stamps and, for changes of its own accord, reports the difference.
    fn note_running(&mut self, own_accord: bool) -> Result<(), Closed> {
        let here = self.phase == Phase::Live && self.arriving().is_none();
        let may_run = here && self.pause.is_none() && !self.is_halted() && self.lease_holds();
        if may_run == self.running {
            return Ok(());
        }
        let now = self.clock.boottime_ns();
        if may_run {
            self.sealed = false;
            self.started_ns = now;
            let start = Start {
                boottime_ns: now,
                realtime_ns: self.clock.realtime_ns(),
                tsc: self.guest.tsc(),
                epoch_ns: self.terms.config.epoch_ns,
            };
            self.pace = self.terms.config.paced.then(|| Pace::start(self.terms.config.tsc_hz, start));
            if self.guest.runs_in_real_time() {
                // An idle guest of the other kind catches up when it is next looked at; this one's time runs from here.
                let tsc = self.pace.as_ref().map_or(start.tsc, |pace| pace.tsc_at(now));
                self.guest.skip_idle_until(tsc.max(start.tsc));
            }
        } else {
            self.wake();
            // What is known of it is all there is for now.
            self.block_until_ns = 0;
            self.stopped_ns = now;
        }
        self.running = may_run;
        if own_accord {
            let state = self.state();
            self.outbox.send(Output::Changed(Box::new(state)))?;
        }
        Ok(())
    }

    fn end(&mut self, state: VmState, reason: &str) -> Result<(), Closed> {
        self.stop_recording(reason);
        self.phase = Phase::Ended(state, reason.to_owned());
        self.note_over();
        self.note_running(true)
    }

    fn feed_console(&mut self) {
        if self.console_pending.is_empty() {
            return;
        }
        self.wake();
        let taken = self.guest.console_input(self.console_pending.make_contiguous());
        self.console_pending.drain(..taken.min(self.console_pending.len()));
    }

    /// What has come for a guest that stands still becomes part of it, so that it travels.
    fn seal(&mut self) -> Result<(), Closed> {
        if std::mem::replace(&mut self.sealed, true) {
            return Ok(());
        }
        self.feed_console();
        for (card, bytes) in std::mem::take(&mut self.packets) {
            // What does not fit is lost, as on a real wire.
            let _held = self.guest.net_hold(card, &bytes);
            self.outbox.send(Output::PacketTaken)?;
        }
        Ok(())
    }

    fn deliver_packets(&mut self) -> Result<(), Closed> {
        while self.running
            && let Some((card, bytes)) = self.packets.pop_front()
        {
            self.wake();
            // A guest without a buffer for it loses it, as on a real wire.
            let _delivered = self.guest.net_input(card, &bytes);
            self.outbox.send(Output::PacketTaken)?;
        }
        Ok(())
    }

    fn flush_console(&mut self) -> Result<(), Closed> {
        let said = self.guest.take_console_output();
        if said.is_empty() { Ok(()) } else { self.outbox.send(Output::Console(said)) }
    }

    /// The state as it is reported.
    pub fn state(&self) -> RunnerState {
        let (state, reason) = match &self.phase {
            Phase::Ended(state, reason) => (*state, reason.clone()),
            Phase::Fresh => (VmState::Starting, String::new()),
            Phase::Live if self.is_halted() => (VmState::Paused, UNDER_DEBUGGER.to_owned()),
            Phase::Live => match (&self.pause, self.lease) {
                (Some(reason), _) => (VmState::Paused, reason.clone()),
                (None, Lease::Missing) => (VmState::Paused, "no lease yet".to_owned()),
                (None, _) if self.lease_holds() && self.moves_although_paused() => {
                    (VmState::Paused, UNDER_DEBUGGER.to_owned())
                }
                (None, _) if self.lease_holds() => (VmState::Running, String::new()),
                (None, _) => (VmState::Paused, "lease ended: this host has lost the controller".to_owned()),
            },
        };
        RunnerState {
            state: state.into(),
            reason,
            retired_instructions: self.guest.retired(),
            epoch: self.guest.epoch(),
            stopped_boottime_ns: self.stopped_ns,
            started_boottime_ns: self.started_ns,
            first_instruction_boottime_ns: match self.first {
                First::Ran(instant) => instant,
                First::No | First::Awaited => 0,
            },
            recording: self.recorded(),
            replaying: self.arriving(),
            debugged: self.debugged(),
        }
    }

    /// Takes one input. `Break` after a shutdown.
    ///
    /// # Errors
    /// [`Closed`].
    pub fn take(&mut self, input: Input) -> Result<ControlFlow<()>, Closed> {
        match input {
            Input::Packet { card, bytes } => {
                // A stopped machine does not change: its packets wait, and the I/O thread stops reading the tap.
                self.packets.push_back((card, bytes));
                self.deliver_packets()?;
                Ok(ControlFlow::Continue(()))
            }
            Input::Request { connection, request } => {
                let shutdown = matches!(request.request, Some(Request::Shutdown(_)));
                if matches!(request.request, Some(Request::Capture(_) | Request::Freeze(_)))
                    && self.phase == Phase::Live
                    && !self.running
                {
                    self.seal()?;
                }
                let id = request.id;
                let reply = match request.request {
                    Some(request) => self.answer(request).unwrap_or_else(Reply::Failure),
                    None => Reply::Failure(failure(Code::Protocol, "unknown request")),
                };
                self.note_running(false)?;
                // The state in a reply is the state after the request.
                let reply = match reply {
                    Reply::State(_) => Reply::State(self.state()),
                    other => other,
                };
                let reply = Box::new(RunnerReply { id, reply: Some(reply) });
                self.outbox.send(Output::Reply { connection, reply })?;
                Ok(if shutdown { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            }
        }
    }

    fn answer(&mut self, request: Request) -> Result<Reply, RunnerFailure> {
        match request {
            Request::Attach(_) => {
                // Whoever held it back is gone, or will say so again; nobody reads what was kept.
                self.throttle = None;
                self.forget_frozen();
                self.forget_debugger();
                return Ok(Reply::Attached(self.attached()));
            }
            Request::Boot(_) => self.boot()?,
            Request::Pause(pause) => {
                if self.pause.is_none() {
                    let reason = if pause.reason.is_empty() { "paused".to_owned() } else { pause.reason };
                    self.pause = Some(reason);
                }
            }
            Request::Resume(_) => self.resume(),
            Request::AdvanceEpoch(_) => {
                let epoch = self.guest.advance_epoch().map_err(|text| failure(Code::Internal, &text))?;
                return Ok(Reply::Epoch(RunnerEpoch { epoch }));
            }
            Request::Look(_) => self.guest.look_at_writes().map_err(|text| failure(Code::Internal, &text))?,
            Request::Capture(_) => return self.capture(),
            Request::Apply(apply) => {
                self.must_be_fresh()?;
                self.guest.apply(&apply.sections).map_err(|text| failure(Code::Corrupt, &text))?;
                self.phase = Phase::Live;
                self.first = First::Awaited;
                self.pause = Some("incoming".to_owned());
                self.sealed = true;
                self.booted_tsc = self.guest.tsc();
            }
            Request::Lease(lease) => {
                self.lease = match lease.until_boottime_ns {
                    0 => Lease::Unlimited,
                    instant => Lease::Until(instant),
                };
            }
            Request::Throttle(throttle) => {
                let until_ns = self.valid_until_ns(throttle.valid_ms);
                let rest_until_ns = self.throttle.map_or(0, |before| before.rest_until_ns);
                let percent = u64::from(throttle.percent.min(THROTTLE_PERCENT_MAX));
                self.throttle = (percent > 0).then_some(Throttle { percent, until_ns, rest_until_ns });
            }
            Request::Freeze(freeze) => return self.freeze(&freeze),
            Request::StayFrozen(stay) => self.stay_frozen(stay.valid_ms)?,
            Request::Thaw(_) => self.thaw()?,
            Request::Status(_) | Request::Shutdown(_) => {}
            Request::Console(input) => {
                if self.sealed {
                    return Err(failure(Code::Conflict, "the guest's state was captured and it has not run since"));
                }
                if self.console_pending.len() + input.data.len() > self.guest.console_room() {
                    return Err(failure(Code::Exhausted, "the guest does not read its console"));
                }
                self.console_pending.extend(input.data);
            }
            Request::Vmcbs(_) => {
                let vmcbs = self.guest.vmcbs().map_err(|text| failure(Code::Internal, &text))?;
                let vmcbs = vmcbs.iter().map(|page| page.to_vec()).collect();
                return Ok(Reply::Vmcbs(VmcbReply {
                    vmcbs,
                    retired_instructions: self.guest.retired(),
                    cpu_states: Vec::new(),
                }));
            }
            Request::Announce(_) => self.announce(),
            Request::Record(_) | Request::Replay(_) | Request::Debug(_) if self.guest.runs_in_real_time() => {
                return Err(failure(Code::Incapable, SOFT_ONLY));
            }
            Request::Record(request) => self.record(&request)?,
            Request::TakeJournal(take) => return Ok(self.take_journal(&take)),
            Request::Replay(replay) => self.replay(&replay)?,
            Request::Debug(debug) => return self.debug(debug),
        }
        Ok(Reply::State(self.state()))
    }

    /// Until when holds what is asked for so many milliseconds.
    fn valid_until_ns(&self, valid_ms: u32) -> u64 {
        self.clock.boottime_ns().saturating_add(u64::from(valid_ms) * 1_000_000)
    }

    fn attached(&self) -> RunnerAttached {
        RunnerAttached {
            config: Some(self.terms.config.clone()),
            state: Some(self.state()),
            descriptors: self.terms.descriptors.clone(),
            ram: self.terms.missing.as_ref().map(mappings).unwrap_or_default(),
        }
    }

    /// Before this thread may sleep on a missing page. Between two slices nothing of the answer changes but the state.
    fn note_state(&self) {
        if let Some(answer) = &self.terms.standing_answer {
            answer.lock().unwrap_or_else(PoisonError::into_inner).state = Some(self.state());
        }
    }

    fn must_be_fresh(&self) -> Result<(), RunnerFailure> {
        match self.phase {
            Phase::Fresh => Ok(()),
            Phase::Live | Phase::Ended(..) => Err(failure(Code::Conflict, "this machine already has a state")),
        }
    }

    fn boot(&mut self) -> Result<(), RunnerFailure> {
        self.must_be_fresh()?;
        let images = self.images.as_mut().ok_or_else(|| failure(Code::BadInput, "no kernel was given"))?;
        let (kernel, initrd) = images.load().map_err(|text| failure(Code::BadInput, &text))?;
        self.guest
            .boot(&kernel, initrd.as_deref())
            .map_err(|text| failure(Code::BadInput, &format!("{}: {text}", images.kernel_path())))?;
        if !images.travel() {
            self.images = None;
        }
        self.phase = Phase::Live;
        Ok(())
    }

    fn capture(&mut self) -> Result<Reply, RunnerFailure> {
        match self.phase {
            Phase::Fresh => return Err(failure(Code::Conflict, "this machine has no state yet")),
            Phase::Live if self.running => return Err(failure(Code::Conflict, "the guest runs: pause it first")),
            Phase::Live if self.arriving().is_some() => {
                return Err(failure(Code::Conflict, "the guest goes through a recording"));
            }
            Phase::Live | Phase::Ended(..) => {}
        }
        let packed = match self.guest.door_mut() {
            Some(door) => door.pack().map_err(|error| chain(&error)),
            None => self.guest.capture(),
        };
        let sections = packed.map_err(|text| failure(Code::Internal, &text))?;
        let state_digest = (self.terms.state_digest)(&sections).to_vec();
        Ok(Reply::Sections(RunnerSections { sections, state_digest }))
    }

    fn announce(&mut self) {
        for (cable, mac) in &mut self.terms.cables {
            for frame in super::announce::frames(*mac) {
                cable.send(&frame);
            }
        }
    }
}

fn mappings(missing: &Missing) -> Vec<RunnerMapping> {
    let message = |mapping: &vmcb_engine::memory::Mapping| RunnerMapping {
        address: mapping.address as u64,
        first_page: mapping.first_page,
        pages: mapping.pages,
    };
    missing.mappings.iter().map(message).collect()
}

fn failure(code: Code, message: &str) -> RunnerFailure {
    RunnerFailure { code: code as u32, message: message.to_owned() }
}

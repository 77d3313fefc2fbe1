//! A machine and what happened to it: every event enters exactly where it entered when it was recorded.
//!
//! At each position the events that belong there enter first; a machine *is* at a position when they have. Between them it
//! runs by itself. A machine that is idle lets its time jump to its next deadline, as it did when it was recorded, unless the
//! next event's position says less. Where the recording names digests (probes, cuts) they are compared.
//!
//! This file refuses to know where a recording comes from, who asks, and going backwards (`timeline`).

use std::sync::Arc;

use super::probe::{self, Differing};
use super::record::position;
use super::tape::{Entry, Happening, Tape};
use crate::cpu::CpuState;
use crate::device::virtio::block::Failure;
use crate::engine::Why;
use crate::journal::{Cut, Event, Position, Probe};
use crate::machine::{Machine, MachineError, Outcome};
use crate::snapshot::state_digest;

/// Instructions between two looks at console and caller.
const SLICE: u64 = 4_000_000;
/// Most console output that is remembered.
const CONSOLE_BYTES_MAX: usize = 16 << 20;

/// What the machine boots from when it is started again.
#[derive(Clone, Debug, Default)]
pub struct BootImages {
    /// The kernel.
    pub kernel: Vec<u8>,
    /// The initial file system.
    pub initrd: Option<Vec<u8>>,
}

/// The replayed machine is not what was recorded.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("at {position}: {field} is {ours}, the recording says {recorded}")]
pub struct Mismatch {
    /// Where it was noticed.
    pub position: Position,
    /// What differs.
    pub field: String,
    /// How it is here.
    pub ours: String,
    /// How it was.
    pub recorded: String,
}

/// Why a replay does not go on.
#[derive(Debug, thiserror::Error)]
pub enum PlayError {
    /// It is not what was recorded.
    #[error("diverged: {0}")]
    Diverged(#[from] Mismatch),
    /// An event that no machine of this configuration can have had.
    #[error("event at {position}: {why}")]
    Event {
        /// Where.
        position: Position,
        /// What is wrong.
        why: String,
    },
    /// The host of the replay failed to do what a disk was asked, and the recording's had done it.
    #[error("at {position}: this host cannot reach disk {disk} of the replayed machine")]
    Disk {
        /// Where it was noticed.
        position: Position,
        /// Which.
        disk: usize,
    },
    /// The machine cannot be started again, or captured.
    #[error("at {position}")]
    Machine {
        /// Where.
        position: Position,
        /// Why.
        #[source]
        source: MachineError,
    },
}

/// Where to run: to the first instant that is not before a position, or at which the guest's TSC is not below a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Goal {
    position: Position,
    tsc: u64,
}

impl Goal {
    const FAR: Position = Position { retired: u64::MAX, skipped_tsc: u64::MAX };

    /// The first instant that is not before this position.
    pub fn position(position: Position) -> Goal {
        Goal { position, tsc: u64::MAX }
    }

    /// The first instant after so many instructions.
    pub fn instruction(retired: u64) -> Goal {
        Goal::position(Position { retired, skipped_tsc: 0 })
    }

    /// The first instant at which the guest's TSC is not below this.
    pub fn tsc(tsc: u64) -> Goal {
        Goal { position: Goal::FAR, tsc }
    }

    /// Instructions after which it is reached for certain.
    pub(super) fn retired(&self) -> u64 {
        self.position.retired
    }

    /// This one, or after so many instructions, whichever comes first.
    pub fn or_instruction(self, retired: u64) -> Goal {
        Goal { position: self.position.min(Position { retired, skipped_tsc: 0 }), tsc: self.tsc }
    }

    /// Whether the machine is there.
    pub fn is_reached(&self, machine: &Machine) -> bool {
        position(machine) >= self.position || machine.tsc() >= self.tsc
    }
}

/// One of the stops that were set was met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hit {
    /// Who met it.
    pub vcpu: usize,
    /// Which.
    pub why: Why,
}

/// Why [`Player::run_to`] came back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pause {
    /// At a stop of the machine's.
    Hit(Hit),
    /// It is there.
    Reached,
    /// The end of the recording.
    End,
    /// The caller wanted it back.
    Interrupted,
}

/// What the guest said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Said {
    /// Not later than this.
    pub until: Position,
    /// What.
    pub bytes: Vec<u8>,
}

/// A machine that is being replayed.
#[derive(Debug)]
pub struct Player {
    machine: Machine,
    tape: Arc<Tape>,
    /// Index of the entry that happens next.
    next: usize,
    images: Option<BootImages>,
    console: Vec<Said>,
    console_bytes: usize,
    /// What the guest said until here is in `console`.
    heard: Position,
    /// Probes and cuts that were equal.
    compared: u64,
    last_compared: Position,
}

impl Player {
    /// A machine in the state in which the tape begins.
    ///
    /// # Errors
    /// It is not where the tape begins, or its state is not the one that the tape names.
    pub fn new(machine: Machine, tape: Arc<Tape>, images: Option<BootImages>) -> Result<Self, PlayError> {
        let start = tape.start();
        let mut player = Self::waiting(machine, tape, images);
        let here = player.position();
        if here != start {
            return Err(player.differs("the base's position", here, start).into());
        }
        player.enter_due()?;
        Ok(player)
    }

    /// [`Player::new`] that compares nothing yet: the first [`Player::run_to`] does.
    pub(super) fn waiting(mut machine: Machine, tape: Arc<Tape>, images: Option<BootImages>) -> Self {
        machine.take_console_output();
        let start = tape.start();
        Self {
            machine,
            tape,
            next: 0,
            images,
            console: Vec::new(),
            console_bytes: 0,
            heard: start,
            compared: 0,
            last_compared: start,
        }
    }

    /// Where the machine is.
    pub fn position(&self) -> Position {
        position(&self.machine)
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The machine; whoever changes it makes another history.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// Gives the machine back.
    pub fn into_machine(self) -> Machine {
        self.machine
    }

    /// The recording.
    pub fn tape(&self) -> &Arc<Tape> {
        &self.tape
    }

    /// How many probes and cuts were equal so far, and where the last one was.
    pub fn compared(&self) -> (u64, Position) {
        (self.compared, self.last_compared)
    }

    /// What the guest has said since the tape's beginning, as far as it was replayed.
    pub fn console(&self) -> &[Said] {
        &self.console
    }

    /// Index of the entry that happens next.
    pub(super) fn cursor(&self) -> usize {
        self.next
    }

    /// The machine was put to another position by the caller.
    pub(super) fn set_cursor(&mut self, next: usize) {
        self.next = next;
        // What a serial port had not handed over yet is said again.
        self.machine.take_console_output();
    }

    fn differs(&self, field: &str, ours: impl std::fmt::Display, recorded: impl std::fmt::Display) -> Mismatch {
        let (ours, recorded) = (ours.to_string(), recorded.to_string());
        Mismatch { position: self.position(), field: field.to_owned(), ours, recorded }
    }

    /// Runs until the goal or an earlier [`Pause`]; `interrupted` is asked every few million instructions.
    ///
    /// # Errors
    /// Any [`PlayError`]; the machine stays where it is.
    pub fn run_to(&mut self, goal: Goal, interrupted: &mut dyn FnMut() -> bool) -> Result<Pause, PlayError> {
        loop {
            if let Some(hit) = self.enter_due()? {
                return Ok(Pause::Hit(hit));
            }
            let here = self.position();
            if goal.is_reached(&self.machine) {
                return Ok(Pause::Reached);
            }
            if here >= self.tape.end() {
                return Ok(Pause::End);
            }
            if interrupted() {
                return Ok(Pause::Interrupted);
            }
            if let Some(hit) = self.go(here, goal)? {
                return Ok(Pause::Hit(hit));
            }
        }
    }

    /// What happens here enters; a stop that is met meanwhile is told first.
    fn enter_due(&mut self) -> Result<Option<Hit>, PlayError> {
        let tape = Arc::clone(&self.tape);
        let here = self.position();
        self.expect_no_failures(here)?;
        while let Some(Entry { position, happening }) = tape.entries().get(self.next) {
            if *position > here {
                break;
            }
            if *position < here {
                return Err(self.differs("the position of the next event", here, position).into());
            }
            match happening {
                Happening::Event(Event::Stood { vcpu, linear }) => {
                    if let Some(hit) = self.stand(*vcpu as usize, *linear)? {
                        return Ok(Some(hit));
                    }
                }
                Happening::Event(event) => self.enter(event)?,
                Happening::Cut(cut) => self.compare_cut(cut)?,
            }
            self.next += 1;
        }
        Ok(None)
    }

    /// What failed when this was recorded has failed before the next event.
    fn expect_no_failures(&self, here: Position) -> Result<(), Mismatch> {
        let at = |index: Option<usize>| index.and_then(|at| self.tape.entries().get(at)).map(|entry| entry.position);
        let first_here = at(Some(self.next)) == Some(here) && at(self.next.checked_sub(1)) != Some(here);
        match self.machine.expects_disk_failures().filter(|_| first_here) {
            Some(disk) => Err(self.differs(&format!("a request of disk {disk}"), "not made", "made, and it failed")),
            None => Ok(()),
        }
    }

    /// Goes to where a vCPU stood, behind events that are delivered at this position. A stop of the caller's that is met on
    /// the way comes back; then it is to be called again.
    fn stand(&mut self, vcpu: usize, linear: u64) -> Result<Option<Hit>, PlayError> {
        let (position, asked) = (self.position(), self.machine.stops().clone());
        loop {
            if self.machine.stands_at(vcpu) == Some(linear) {
                return Ok(None);
            }
            let mut stops = asked.clone();
            stops.breakpoints.push(linear);
            self.machine.set_stops(&stops);
            let outcome = self.machine.run(position.retired.saturating_add(1));
            self.machine.set_stops(&asked);
            match outcome {
                Outcome::Stop { vcpu, why } if self.machine.retired() == position.retired => {
                    let wanted = match why {
                        Why::Breakpoint { address } => asked.breakpoints.contains(&address),
                        Why::Watchpoint { .. } => true,
                    };
                    if wanted {
                        return Ok(Some(Hit { vcpu, why }));
                    }
                }
                _ => {
                    let ours = self.machine.stands_at(vcpu).map_or("nowhere".to_owned(), |at| format!("{at:#x}"));
                    let field = format!("where vCPU {vcpu} stood");
                    return Err(self.differs(&field, ours, format_args!("{linear:#x}")).into());
                }
            }
        }
    }

    fn enter(&mut self, event: &Event) -> Result<(), PlayError> {
        let position = self.position();
        let wrong = |why: String| PlayError::Event { position, why };
        let cards = self.machine.config().nets.len();
        let card_of = |card: u32| {
            let there = (card as usize) < cards;
            there.then_some(card as usize).ok_or_else(|| wrong(format!("there is no network card {card}")))
        };
        match event {
            Event::Console(bytes) => {
                let taken = self.machine.console_input(bytes);
                if taken != bytes.len() {
                    let mismatch = self.differs("the room for console input", taken, bytes.len());
                    return Err(mismatch.into());
                }
            }
            // Whether the guest had a buffer for it follows from its state.
            Event::Packet { card, bytes } => drop(self.machine.net_input(card_of(*card)?, bytes)),
            Event::Held { card, bytes } => drop(self.machine.net_hold(card_of(*card)?, bytes)),
            Event::Released => self.machine.release_packets(),
            Event::Link { card, up } => self.machine.set_link(card_of(*card)?, *up),
            Event::Reset => {
                let images = self.images.as_ref();
                let images =
                    images.ok_or_else(|| wrong("a reset, and no kernel travels with the machine".to_owned()))?;
                let reset = self.machine.reset(&images.kernel, images.initrd.as_deref());
                reset.map_err(|source| PlayError::Machine { position, source })?;
            }
            Event::Probe(probe) => self.compare_probe(probe)?,
            Event::Detail(detail) => self.named(probe::differs_from_detail(&self.machine, detail))?,
            Event::Memory { gpa, bytes } => {
                self.machine.memory().write(*gpa, bytes).map_err(|e| wrong(e.to_string()))?;
            }
            Event::Processor { vcpu, state } => {
                let state = CpuState::from_bytes(state).map_err(|e| wrong(e.to_string()))?;
                self.machine.poke_cpu(*vcpu as usize, &state).map_err(|e| wrong(e.to_string()))?;
            }
            Event::DiskFailed { disk, request, done } => {
                let failure = Failure { request: *request, done: *done };
                if !self.machine.expect_disk_failure(*disk as usize, failure) {
                    return Err(wrong(format!("there is no disk {disk}")));
                }
            }
            // Has been: see `enter_due`.
            Event::Stood { .. } => {}
        }
        Ok(())
    }

    fn compare_cut(&mut self, cut: &Cut) -> Result<(), PlayError> {
        let position = self.position();
        let sections = self.machine.capture().map_err(|source| PlayError::Machine { position, source })?;
        let (ours, recorded) = (state_digest(&sections), proto::ids::Digest(cut.state_digest));
        if ours != recorded {
            return Err(self.differs("the digest of the state", ours, recorded).into());
        }
        self.equal(position);
        Ok(())
    }

    fn compare_probe(&mut self, recorded: &Probe) -> Result<(), PlayError> {
        self.named(probe::differs_from_probe(&self.machine, recorded))?;
        self.equal(self.position());
        Ok(())
    }

    fn named(&self, differing: Option<Differing>) -> Result<(), Mismatch> {
        match differing {
            Some(Differing { field, ours, recorded }) => Err(self.differs(&field, ours, recorded)),
            None => Ok(()),
        }
    }

    fn equal(&mut self, position: Position) {
        self.compared += 1;
        self.last_compared = position;
    }

    /// Runs or lets time pass until something happens, but not beyond the goal.
    fn go(&mut self, here: Position, goal: Goal) -> Result<Option<Hit>, PlayError> {
        let next = self.tape.entries().get(self.next).map_or(self.tape.end(), |entry| entry.position);
        let ticks = goal.tsc.saturating_sub(self.machine.tsc());
        let at_tsc = here.retired.saturating_add(ticks.div_ceil(self.tape.rate().tsc_per_instruction.max(1).into()));
        let slice = here.retired.saturating_add(SLICE);
        let mut until = at_tsc.min(goal.position.retired).min(next.retired).min(slice);
        // What was heard before is not heard twice.
        if self.heard.retired > here.retired {
            until = until.min(self.heard.retired);
        }
        if until <= here.retired {
            return self.idle(here, goal, next, self.machine.next_deadline()).map(|()| None);
        }
        let outcome = self.machine.run(until);
        if let Some((disk, _)) = self.machine.take_disk_failures().first() {
            return Err(PlayError::Disk { position: self.position(), disk: *disk });
        }
        self.hear();
        let done = match outcome {
            Outcome::Reached => Ok(()),
            Outcome::Stop { vcpu, why } => return Ok(Some(Hit { vcpu, why })),
            Outcome::Idle { until_tsc } => self.idle(self.position(), goal, next, until_tsc),
            Outcome::PowerOff | Outcome::Reset | Outcome::TripleFault => {
                let here = self.position();
                let due = here.retired == next.retired;
                if due { self.idle(here, goal, next, None) } else { Err(self.lost(&outcome, next)) }
            }
            Outcome::Failed(why) => Err(PlayError::Event { position: self.position(), why }),
        };
        done.map(|()| None)
    }

    fn lost(&self, outcome: &Outcome, next: Position) -> PlayError {
        self.differs("the guest", format!("at its end ({outcome:?})"), format!("that it ran until {next}")).into()
    }

    /// Lets the time of an idle machine pass: to its next deadline, the goal, or what happens next.
    fn idle(&mut self, here: Position, goal: Goal, next: Position, deadline: Option<u64>) -> Result<(), PlayError> {
        let now = self.machine.tsc();
        let from_here = |position: Position| {
            let skip =
                (position.retired == here.retired).then(|| position.skipped_tsc.saturating_sub(here.skipped_tsc));
            skip.map(|ticks| now.saturating_add(ticks))
        };
        let wanted = from_here(goal.position);
        if wanted == Some(now) || from_here(next) == Some(now) {
            return Ok(());
        }
        let deadline = deadline.filter(|deadline| *deadline > now);
        // A goal by time is no reason to wait for it for ever.
        let certain = [wanted, from_here(next), deadline].into_iter().flatten().min();
        match certain.map(|tsc| tsc.min(goal.tsc)) {
            Some(tsc) => {
                self.machine.skip_idle_until(tsc);
                Ok(())
            }
            None => Err(self.differs("the guest", "idle for ever", format!("that it ran until {next}")).into()),
        }
    }

    fn hear(&mut self) {
        let (bytes, here) = (self.machine.take_console_output(), self.position());
        if here <= self.heard {
            return;
        }
        self.heard = here;
        if bytes.is_empty() {
            return;
        }
        self.console_bytes += bytes.len();
        self.console.push(Said { until: here, bytes });
        while self.console_bytes > CONSOLE_BYTES_MAX {
            self.console_bytes -= self.console.remove(0).bytes.len();
        }
    }
}

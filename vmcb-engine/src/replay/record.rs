//! The door of a machine: whatever enters it passes here, and is stamped with its position while it is recorded.
//!
//! ```text
//! Idle --record--> Recording --stop, no room--> Ended
//!                  Recording --capture--> Recording, in a new segment
//!                  Recording --pack, at another host: apply, run--> Recording, the same chain
//! ```
//! Blocks that are closed are kept until somebody has taken them and says so; there is an end to how many. Idle time needs no
//! record: a replay jumps over it as the machine itself does, and stops short where an event's position says so.
//!
//! Captures make the engine forget translations, which a guest may notice, so each is in the chain too: as the beginning of
//! a segment. The door refuses to know where blocks go and reads no clock.

use std::collections::VecDeque;

use prost::Message;
use proto::v1::{JournalFull, MachineConfig, RecorderV1, RecordingInfo, Section};

use super::play::Player;
use super::probe;
use super::tape::Tape;
use crate::cpu::CpuState;
use crate::device::virtio::block::Failure;
use crate::journal::{Chain, Closed, Closing, Cut, Event, Head, Position, RecordingId, Writer};
use crate::machine::{Machine, MachineError, Outcome};
use crate::memory::{OutOfRange, PAGE_BYTES};
use crate::snapshot::state_digest;

/// Instructions between two probes: about a second of a busy guest.
pub const PROBE_EVERY: u64 = 1 << 28;
/// Name of the section that carries a recording to another host. It is no part of the machine.
pub const SECTION: &str = "recorder";
const SECTION_VERSION: u32 = 1;
/// Most bytes of blocks that nobody has taken which travel along.
pub const PARCEL_BYTES_MAX: usize = 4 << 20;
/// Bytes of blocks that [`Door::take`] returns at once, unless one alone is longer.
const TAKE_BYTES: usize = 1 << 20;

/// About what the detail of a vCPU takes.
const DETAIL_BYTES: usize = 512;

/// What happens when blocks are not taken and there is no room for more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WhenFull {
    /// The machine must not run: [`Door::must_wait`].
    Wait,
    /// The recording ends.
    End,
}

/// Why a door does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// Another recording is being made.
    #[error("recording {0} is being made: stop it first")]
    Recording(RecordingId),
    /// What came along with a machine makes no recorder.
    #[error("section {SECTION:?}: {0}")]
    Parcel(&'static str),
    /// A debugger wrote where there is no RAM.
    #[error(transparent)]
    Range(#[from] OutOfRange),
    /// The machine's.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// A machine behind its door.
#[derive(Debug)]
pub struct Door {
    pub(super) body: Body,
    recorder: Option<Recorder>,
    /// The recording that came along with the machine: it goes on when the machine does.
    parcel: Option<(Section, Recorder)>,
    realtime_ns: u64,
    /// The machine came back at a stop: which vCPU stands where. That may be behind the delivery of an event, so whatever
    /// enters next says that it does.
    stood: Option<(usize, u64)>,
    probe_every: u64,
    /// A recording to be gone through before the machine runs.
    pub(super) incoming: Option<(Chain, Tape)>,
}

/// Who has the machine.
#[derive(Debug)]
pub(super) enum Body {
    /// The door.
    Machine(Box<Machine>),
    /// It goes through a recording first.
    Player {
        /// Which replays it.
        player: Box<Player>,
        /// How far.
        until: Position,
    },
    /// It is being handed over.
    Between,
}

/// A recording, and what of it nobody has taken yet.
#[derive(Clone, Debug)]
struct Recorder {
    writer: Writer,
    next_probe: u64,
    kept: VecDeque<Closed>,
    kept_bytes: usize,
    kept_bytes_max: usize,
    when_full: WhenFull,
    ended: Option<String>,
}

impl Recorder {
    fn new(writer: Writer, kept_bytes_max: usize, when_full: WhenFull) -> Self {
        let (kept, kept_bytes) = (VecDeque::new(), 0);
        Self { writer, next_probe: 0, kept, kept_bytes, kept_bytes_max, when_full, ended: None }
    }

    fn id(&self) -> RecordingId {
        self.writer.head().recording
    }

    fn keep(&mut self, closed: Closed) {
        self.kept_bytes += closed.frame.len();
        self.kept.push_back(closed);
    }

    fn add(&mut self, position: Position, realtime_ns: u64, event: &Event) {
        if self.writer.is_full(payload_bytes(event)) {
            self.close(position, realtime_ns, "");
        }
        self.writer.add(position, event);
    }

    fn close(&mut self, position: Position, realtime_ns: u64, ended: &str) {
        let closed = self.writer.close(Closing { position, realtime_ns, ended });
        self.keep(closed);
        if !ended.is_empty() {
            self.ended = Some(ended.to_owned());
        }
    }

    fn is_full(&self) -> bool {
        self.kept_bytes > self.kept_bytes_max
    }
}

fn payload_bytes(event: &Event) -> usize {
    match event {
        Event::Console(bytes)
        | Event::Packet { bytes, .. }
        | Event::Held { bytes, .. }
        | Event::Memory { bytes, .. }
        | Event::Processor { state: bytes, .. } => bytes.len(),
        Event::Detail(detail) => detail.cpus.len() * DETAIL_BYTES + detail.devices.len() * 4,
        Event::Link { .. } | Event::Released | Event::Reset | Event::Probe(_) => 0,
        Event::Stood { .. } | Event::DiskFailed { .. } => 0,
    }
}

impl Door {
    /// A door through which nothing is recorded.
    pub fn new(machine: Machine) -> Self {
        Self {
            body: Body::Machine(Box::new(machine)),
            recorder: None,
            parcel: None,
            realtime_ns: 0,
            stood: None,
            probe_every: PROBE_EVERY,
            incoming: None,
        }
    }

    /// The machine, to be looked at.
    pub fn machine(&self) -> &Machine {
        match &self.body {
            Body::Machine(machine) => machine,
            Body::Player { player, .. } => player.machine(),
            Body::Between => unreachable!("nobody looks while the machine is handed over"),
        }
    }

    /// The machine, for what neither enters it nor makes it forget: stamps, frozen instants, what it has said.
    pub fn machine_mut(&mut self) -> &mut Machine {
        match &mut self.body {
            Body::Machine(machine) => machine,
            Body::Player { player, .. } => player.machine_mut(),
            Body::Between => unreachable!("nobody looks while the machine is handed over"),
        }
    }

    /// Where the machine is.
    pub fn position(&self) -> Position {
        position(self.machine())
    }

    /// The recording that is being made, if one is.
    fn active(&mut self) -> Option<&mut Recorder> {
        self.recorder.as_mut().filter(|recorder| recorder.ended.is_none())
    }

    fn note(&mut self, event: &Event) {
        self.note_stood();
        let (position, realtime_ns) = (self.position(), self.realtime_ns);
        if let Some(recorder) = self.active() {
            recorder.add(position, realtime_ns, event);
        }
    }

    /// What enters now enters where the machine stands, not where a run to this position would leave it.
    fn note_stood(&mut self) {
        let (position, realtime_ns, stood) = (self.position(), self.realtime_ns, self.stood);
        if let (Some((vcpu, linear)), Some(recorder)) = (stood, self.active()) {
            recorder.add(position, realtime_ns, &Event::Stood { vcpu: vcpu as u32, linear });
            self.stood = None;
        }
    }

    /// Unix nanoseconds now: what blocks that are closed from here on say.
    pub fn set_realtime(&mut self, realtime_ns: u64) {
        self.realtime_ns = realtime_ns;
        let position = self.position();
        if let Some(recorder) = self.active() {
            recorder.writer.set_realtime(position, realtime_ns);
        }
    }

    /// Recordings that begin from here on have a probe every so many instructions, at least 1, instead of [`PROBE_EVERY`].
    /// For tests: each one looks at the whole machine.
    pub fn set_probe_every(&mut self, instructions: u64) {
        self.probe_every = instructions.max(1);
    }

    /// Begins a recording; or, if this one is being made, changes its terms.
    ///
    /// # Errors
    /// Another one is being made, or the machine has no state.
    pub fn record(&mut self, id: RecordingId, kept_bytes_max: usize, when_full: WhenFull) -> Result<(), DoorError> {
        self.unpack();
        if let Some(recorder) = self.active() {
            if recorder.id() != id {
                return Err(DoorError::Recording(recorder.id()));
            }
            (recorder.kept_bytes_max, recorder.when_full) = (kept_bytes_max, when_full);
            return Ok(());
        }
        let cut = cut(&self.machine_mut().capture()?, self.machine().config());
        let head = Head { recording: id, sequence: 0, previous: None };
        let writer = Writer::new(head, self.position(), cut);
        self.begin(Recorder::new(writer, kept_bytes_max, when_full));
        Ok(())
    }

    /// Ends the recording, if one is being made; its last blocks are still there to be taken.
    pub fn stop_recording(&mut self, why: &str) {
        self.unpack();
        let (position, realtime_ns) = (self.position(), self.realtime_ns);
        if let Some(recorder) = self.active() {
            recorder.close(position, realtime_ns, why);
        }
    }

    /// True if something is being recorded.
    pub fn is_recording(&self) -> bool {
        self.recorder.as_ref().is_some_and(|recorder| recorder.ended.is_none()) || self.parcel.is_some()
    }

    /// True if the machine must not run: blocks are not taken, and that is what was asked for.
    pub fn must_wait(&self) -> bool {
        self.recorder.as_ref().is_some_and(|recorder| {
            recorder.ended.is_none() && recorder.when_full == WhenFull::Wait && recorder.is_full()
        })
    }

    /// Closes the open block if it says anything that is not known yet.
    pub fn close_block(&mut self) {
        let (position, realtime_ns) = (self.position(), self.realtime_ns);
        let Some(recorder) = self.active() else { return };
        if recorder.writer.says_something(position) {
            recorder.close(position, realtime_ns, "");
        }
        if recorder.when_full == WhenFull::End && recorder.is_full() {
            let why = format!("{} bytes were not taken in time, and there was no room for more", recorder.kept_bytes);
            recorder.close(position, realtime_ns, &why);
        }
    }

    /// How the recording stands; `None` if there never was one.
    pub fn info(&self) -> Option<RecordingInfo> {
        let recorder = self.parcel.as_ref().map(|(_, recorder)| recorder).or(self.recorder.as_ref())?;
        let next_sequence = recorder.writer.head().sequence;
        Some(RecordingInfo {
            recording: recorder.id().0.to_vec(),
            next_sequence,
            first_kept: recorder.kept.front().map_or(next_sequence, |closed| closed.sequence),
            kept_bytes: recorder.kept_bytes as u64,
            position: Some(self.position().into()),
            ended: recorder.ended.clone().unwrap_or_default(),
        })
    }

    /// Blocks below `from` were taken and are kept no longer; returns those from there on, or as many as fit.
    pub fn take(&mut self, from: u64) -> Vec<Vec<u8>> {
        let Some(recorder) = &mut self.recorder else { return Vec::new() };
        while let Some(closed) = recorder.kept.pop_front_if(|closed| closed.sequence < from) {
            recorder.kept_bytes -= closed.frame.len();
        }
        let mut room = TAKE_BYTES;
        let fits = |closed: &&Closed| {
            let first = room == TAKE_BYTES;
            let left = room.checked_sub(closed.frame.len());
            room = left.unwrap_or(0);
            first || left.is_some()
        };
        recorder.kept.iter().take_while(fits).map(|closed| closed.frame.clone()).collect()
    }

    /// See [`Machine::boot`].
    ///
    /// # Errors
    /// The machine's.
    pub fn boot(&mut self, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(), MachineError> {
        self.machine_mut().boot(kernel, initrd)
    }

    /// See [`Machine::reset`].
    ///
    /// # Errors
    /// The machine's; a recording ends there.
    pub fn reset(&mut self, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(), MachineError> {
        self.stood = None;
        let reset = self.machine_mut().reset(kernel, initrd);
        match &reset {
            Ok(()) => self.note(&Event::Reset),
            Err(_) => self.stop_recording("the machine could not start again"),
        }
        reset
    }

    /// See [`Machine::run`].
    pub fn run(&mut self, until_retired: u64) -> Outcome {
        self.unpack();
        self.release();
        loop {
            let probe = self.active().map_or(u64::MAX, |recorder| recorder.next_probe);
            let begun = self.position();
            let before = begun.retired;
            let outcome = self.machine_mut().run(until_retired.min(probe));
            self.note_disk_failures(begun);
            if let Outcome::Stop { vcpu, .. } = outcome {
                self.stood = self.machine().stands_at(vcpu).map(|linear| (vcpu, linear));
            } else if self.machine().retired() != before {
                self.stood = None;
            }
            if outcome != Outcome::Reached || self.machine().retired() != probe {
                return outcome;
            }
            if self.active().is_some() {
                self.note(&Event::Detail(probe::detail(self.machine())));
                self.note(&Event::Probe(probe::probe(self.machine())));
            }
            let probe_every = self.probe_every;
            if let Some(recorder) = self.active() {
                recorder.next_probe += probe_every;
            }
            if probe == until_retired {
                return Outcome::Reached;
            }
        }
    }

    /// What the host failed to do in a run enters where the run began: a replay gets there between two instructions.
    fn note_disk_failures(&mut self, begun: Position) {
        let realtime_ns = self.realtime_ns;
        for (disk, Failure { request, done }) in self.machine_mut().take_disk_failures() {
            if let Some(recorder) = self.active() {
                recorder.add(begun, realtime_ns, &Event::DiskFailed { disk: disk as u32, request, done });
            }
        }
    }

    /// What was held for the cards enters the machine before anything else does.
    fn release(&mut self) {
        if self.machine().holds_packets() {
            self.machine_mut().release_packets();
            self.note(&Event::Released);
        }
    }

    /// See [`Machine::skip_idle_until`]. A replay does the same by itself.
    pub fn skip_idle_until(&mut self, tsc: u64) {
        self.unpack();
        self.machine_mut().skip_idle_until(tsc);
    }

    /// See [`Machine::console_input`].
    pub fn console_input(&mut self, bytes: &[u8]) -> usize {
        self.unpack();
        let taken = self.machine_mut().console_input(bytes);
        if taken > 0 {
            self.note(&Event::Console(bytes[..taken].to_vec()));
        }
        taken
    }

    /// See [`Machine::net_input`].
    pub fn net_input(&mut self, card: usize, packet: &[u8]) -> bool {
        self.unpack();
        self.release();
        let taken = self.machine_mut().net_input(card, packet);
        // Also what the guest had no buffer for: its card may have broken over it.
        if self.is_recording() {
            self.note(&Event::Packet { card: card as u32, bytes: packet.to_vec() });
        }
        taken
    }

    /// See [`Machine::net_hold`].
    pub fn net_hold(&mut self, card: usize, packet: &[u8]) -> bool {
        self.unpack();
        let held = self.machine_mut().net_hold(card, packet);
        if held && self.is_recording() {
            self.note(&Event::Held { card: card as u32, bytes: packet.to_vec() });
        }
        held
    }

    /// See [`Machine::set_link`].
    pub fn set_link(&mut self, card: usize, up: bool) {
        self.unpack();
        self.machine_mut().set_link(card, up);
        self.note(&Event::Link { card: card as u32, up });
    }

    /// A debugger writes to RAM.
    ///
    /// # Errors
    /// Not all of it is RAM; nothing has changed then.
    pub fn write_memory(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), DoorError> {
        self.unpack();
        let memory = self.machine().memory();
        let end = gpa.saturating_add(bytes.len() as u64);
        let pages = gpa / PAGE_BYTES..end.div_ceil(PAGE_BYTES);
        let outside = || OutOfRange { gpa, bytes: bytes.len() };
        for page in pages {
            memory.page_of(page.saturating_mul(PAGE_BYTES)).ok_or_else(outside)?;
        }
        memory.write(gpa, bytes)?;
        self.note(&Event::Memory { gpa, bytes: bytes.to_vec() });
        Ok(())
    }

    /// A debugger writes registers; see [`Machine::poke_cpu`].
    ///
    /// # Errors
    /// The machine's; nothing has changed then.
    pub fn write_cpu(&mut self, vcpu: usize, state: &CpuState) -> Result<(), DoorError> {
        self.unpack();
        self.machine_mut().poke_cpu(vcpu, state)?;
        self.note(&Event::Processor { vcpu: vcpu as u32, state: state.to_bytes() });
        Ok(())
    }

    /// See [`Machine::capture`]. A segment of the recording begins.
    ///
    /// # Errors
    /// The machine's.
    pub fn capture(&mut self) -> Result<Vec<Section>, MachineError> {
        self.note_stood();
        if self.parcel.is_none() && self.active().is_some() {
            // The cut itself is one digest.
            self.note(&Event::Detail(probe::detail(self.machine())));
        }
        let sections = self.machine_mut().capture()?;
        let cut = cut(&sections, self.machine().config());
        let (position, realtime_ns) = (self.position(), self.realtime_ns);
        // What came and has not run yet is still the segment with which it came.
        if self.parcel.is_none()
            && let Some(recorder) = self.active()
        {
            recorder.close(position, realtime_ns, "");
            recorder.writer.begin_segment(cut);
        }
        Ok(sections)
    }

    /// [`Door::capture`] of a machine that goes elsewhere: its recording goes along, with what nobody has taken of it.
    ///
    /// # Errors
    /// The machine's.
    pub fn pack(&mut self) -> Result<Vec<Section>, MachineError> {
        let mut sections = self.capture()?;
        if let Some((section, _)) = &self.parcel {
            sections.push(section.clone());
            return Ok(sections);
        }
        let Some(recorder) = self.active() else { return Ok(sections) };
        if recorder.kept_bytes > PARCEL_BYTES_MAX {
            self.stop_recording("the machine moved while more of the journal waited to be taken than can travel");
            return Ok(sections);
        }
        let head = recorder.writer.head();
        let body = RecorderV1 {
            recording: head.recording.0.to_vec(),
            sequence: head.sequence,
            previous: head.previous.map_or_else(Vec::new, Vec::from),
            full: match recorder.when_full {
                WhenFull::Wait => JournalFull::Wait.into(),
                WhenFull::End => JournalFull::End.into(),
            },
            kept_bytes_max: recorder.kept_bytes_max as u64,
            blocks: recorder.kept.iter().map(|closed| closed.frame.clone()).collect(),
        };
        let (name, body) = (SECTION.to_owned(), body.encode_to_vec());
        sections.push(Section { name, major: SECTION_VERSION, minor: 0, ignorable: false, body });
        Ok(sections)
    }

    /// See [`Machine::apply`]. A recording that came along goes on when the machine first runs.
    ///
    /// # Errors
    /// The machine's, or the recording makes no sense; then nothing has changed.
    pub fn apply(&mut self, sections: &[Section]) -> Result<(), DoorError> {
        let (ours, machines): (Vec<&Section>, Vec<&Section>) =
            sections.iter().partition(|section| section.name == SECTION);
        let machines: Vec<Section> = machines.into_iter().cloned().collect();
        let parcel = match ours[..] {
            [] => None,
            [section] => Some(section.clone()),
            _ => return Err(DoorError::Parcel("comes twice")),
        };
        let message = parcel.as_ref().map(decode).transpose()?;
        self.machine_mut().apply(&machines)?;
        self.stood = None;
        self.recorder = None;
        self.parcel = None;
        if let (Some(section), Some(message)) = (parcel, message) {
            let cut = cut(&machines, self.machine().config());
            let recorder = open(message, self.position(), cut)?;
            self.parcel = Some((section, recorder));
        }
        Ok(())
    }

    /// The machine goes on, and so does the recording that came along.
    fn unpack(&mut self) {
        if let Some((_, recorder)) = self.parcel.take() {
            self.begin(recorder);
        }
    }

    /// Probes lie at multiples of their distance.
    fn begin(&mut self, recorder: Recorder) {
        let next_probe = (self.position().retired / self.probe_every + 1) * self.probe_every;
        self.recorder = Some(Recorder { next_probe, ..recorder });
    }
}

/// Where a machine is.
pub(super) fn position(machine: &Machine) -> Position {
    Position { retired: machine.retired(), skipped_tsc: machine.skipped_tsc() }
}

/// The beginning of a segment, where a machine was captured.
pub(super) fn cut(sections: &[Section], config: &MachineConfig) -> Cut {
    Cut { state_digest: state_digest(sections).0, config_digest: config_digest(config) }
}

/// Digest of a configuration as far as the guest can see it: where its files lie on which host is left out, since that
/// changes when it moves.
pub fn config_digest(config: &MachineConfig) -> [u8; 32] {
    let mut seen = config.clone();
    if let Some(boot) = &mut seen.boot {
        boot.kernel_path.clear();
        boot.initrd_path.clear();
    }
    seen.disks.iter_mut().for_each(|disk| disk.path.clear());
    seen.nets.iter_mut().for_each(|net| net.tap.clear());
    *blake3::hash(&seen.encode_to_vec()).as_bytes()
}

fn decode(section: &Section) -> Result<RecorderV1, DoorError> {
    if section.major != SECTION_VERSION || section.minor != 0 && !section.ignorable {
        return Err(DoorError::Parcel("is of a version that this release does not know"));
    }
    RecorderV1::decode(&section.body[..]).map_err(|_| DoorError::Parcel("does not decode"))
}

/// The recorder that was packed, at the cut where it was.
fn open(message: RecorderV1, position: Position, cut: Cut) -> Result<Recorder, DoorError> {
    let full = message.full();
    let RecorderV1 { recording, sequence, previous, full: _, kept_bytes_max, blocks } = message;
    let recording = RecordingId::from_slice(&recording).ok_or(DoorError::Parcel("names no recording"))?;
    let previous: Option<[u8; 32]> = match previous.len() {
        0 if sequence == 0 => None,
        32 if sequence > 0 => previous.try_into().ok(),
        _ => return Err(DoorError::Parcel("names no block before")),
    };
    let when_full = match full {
        JournalFull::Wait => WhenFull::Wait,
        JournalFull::End => WhenFull::End,
        JournalFull::Unspecified => return Err(DoorError::Parcel("does not say what happens when it is full")),
    };
    let first =
        sequence.checked_sub(blocks.len() as u64).ok_or(DoorError::Parcel("has more blocks than there were"))?;
    let writer = Writer::new(Head { recording, sequence, previous }, position, cut);
    let mut recorder = Recorder::new(writer, kept_bytes_max.try_into().unwrap_or(usize::MAX), when_full);
    for (sequence, frame) in (first..).zip(blocks) {
        recorder.keep(Closed { sequence, frame });
    }
    Ok(recorder)
}

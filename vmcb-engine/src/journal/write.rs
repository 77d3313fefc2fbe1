//! Events become blocks, each naming the one before.
//!
//! A writer holds the block that is open. It is closed when it is long, when its owner says so, and where the machine is
//! captured: the next block then says that a segment begins. A writer can be carried to another host ([`Head`]) and goes
//! on there: the chain shows that it is the same history.

use prost::Message;
use proto::frame::{self, Kind};
use proto::v1::{JournalBlock, JournalCut};

use super::events::{self, Event};
use super::{BLOCK_BYTES, Position, RecordingId, SEMANTICS};

/// Bytes of an event besides its payload, at most.
const EVENT_BYTES: usize = 64;

/// Where a chain stands: what the next block continues.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// The recording.
    pub recording: RecordingId,
    /// Sequence of the next block.
    pub sequence: u64,
    /// Hash of the block before; `None` for the first one.
    pub previous: Option<[u8; 32]>,
}

/// The machine was captured here: a segment begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    /// `MachineDigest.state` of the capture.
    pub state_digest: [u8; 32],
    /// Digest of the configuration as far as the guest can see it.
    pub config_digest: [u8; 32],
}

/// A finished block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Closed {
    /// Its sequence.
    pub sequence: u64,
    /// The frame.
    pub frame: Vec<u8>,
}

/// How a block is closed.
#[derive(Clone, Copy, Debug)]
pub struct Closing<'a> {
    /// Everything until here is known.
    pub position: Position,
    /// Unix nanoseconds of the host, for people who ask by time.
    pub realtime_ns: u64,
    /// Why the recording ends here; empty: it goes on.
    pub ended: &'a str,
}

/// The open block of a chain.
#[derive(Clone, Debug)]
pub struct Writer {
    head: Head,
    start: Position,
    start_realtime_ns: u64,
    last: Position,
    cut: Option<Cut>,
    packed: Vec<u8>,
    events: u32,
}

impl Writer {
    /// Goes on at `head` with a machine that was captured at `position`.
    pub fn new(head: Head, position: Position, cut: Cut) -> Self {
        Self {
            head,
            start: position,
            start_realtime_ns: 0,
            last: position,
            cut: Some(cut),
            packed: Vec::new(),
            events: 0,
        }
    }

    /// What the open block continues.
    pub fn head(&self) -> Head {
        self.head
    }

    /// Unix nanoseconds of the host now, with the machine at `position`: if nothing is in the block yet, it begins now.
    pub fn set_realtime(&mut self, position: Position, realtime_ns: u64) {
        if self.events == 0 && position == self.start {
            self.start_realtime_ns = realtime_ns;
        }
    }

    /// Adds an event. Positions never go back.
    ///
    /// # Panics
    /// If this one does.
    pub fn add(&mut self, position: Position, event: &Event) {
        let after = position.retired.checked_sub(self.last.retired);
        let skipped = position.skipped_tsc.checked_sub(self.last.skipped_tsc);
        let (Some(retired), Some(skipped_tsc)) = (after, skipped) else {
            panic!("an event at {position} follows one at {}", self.last);
        };
        events::put(event, Position { retired, skipped_tsc }, &mut self.packed);
        self.last = position;
        self.events += 1;
    }

    /// True if the block should be closed before another payload of so many bytes is added.
    pub fn is_full(&self, payload_bytes: usize) -> bool {
        self.packed.len() + payload_bytes + EVENT_BYTES > BLOCK_BYTES && self.events > 0
    }

    /// True if closing the block would say anything that the one before did not.
    pub fn says_something(&self, position: Position) -> bool {
        self.events > 0 || self.cut.is_some() || position != self.start
    }

    /// Closes the block and opens the next.
    pub fn close(&mut self, closing: Closing<'_>) -> Closed {
        let Closing { position, realtime_ns, ended } = closing;
        let cut = self.cut.take().map(|cut| JournalCut {
            semantics: SEMANTICS,
            state_digest: cut.state_digest.to_vec(),
            config_digest: cut.config_digest.to_vec(),
        });
        let block = JournalBlock {
            recording: self.head.recording.0.to_vec(),
            sequence: self.head.sequence,
            previous: self.head.previous.map_or_else(Vec::new, Vec::from),
            start: Some(self.start.into()),
            end: Some(position.into()),
            realtime_ns,
            events: std::mem::take(&mut self.packed),
            event_count: std::mem::take(&mut self.events),
            cut,
            ended: ended.to_owned(),
            start_realtime_ns: self.start_realtime_ns,
        };
        let frame = frame::encode(Kind::Journal, &block.encode_to_vec());
        let sequence = self.head.sequence;
        (self.head.sequence, self.head.previous) = (sequence + 1, Some(super::read::hash_of(&frame)));
        (self.start, self.last, self.start_realtime_ns) = (position, position, realtime_ns);
        Closed { sequence, frame }
    }

    /// The machine was captured where the last block was closed: the open block, in which nothing is yet, begins a segment.
    ///
    /// # Panics
    /// If something is in it.
    pub fn begin_segment(&mut self, cut: Cut) {
        assert_eq!(self.events, 0, "a segment begins with its block");
        self.cut = Some(cut);
    }
}

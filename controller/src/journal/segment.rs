//! A segment of a recording: the blocks from one capture up to the next. And the tape: all segments that lie there. Pure.
//!
//! A segment is complete when the next one begins or the recording ends; then it gets an index in the bucket (message
//! `JournalSegment`), so that nobody need read it again to know what it is.

use proto::ids::RecordingId;
use proto::v1::{JournalCut, JournalPart, JournalSegment, Position};

use super::chain::{Block, Head};

/// Longest time that the first block of a recording is taken to have lasted: blocks are closed every 2 s.
const FIRST_BLOCK_NS: u64 = 2_000_000_000;

/// A segment.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Sequence of its first block.
    pub first: u64,
    /// Sequence of the block after its last.
    pub next: u64,
    /// Hash of its last block.
    pub last: [u8; 32],
    /// The capture that it begins with; `None`: what is left of a segment whose beginning is gone.
    pub cut: Option<JournalCut>,
    /// Where it begins.
    pub start: Position,
    /// Where it ends.
    pub end: Position,
    /// When, by its recorder's clock.
    pub start_ns: u64,
    /// When it ended.
    pub end_ns: u64,
    /// Why the recording ends with it; empty: it goes on.
    pub ended: String,
    /// Its objects, in order.
    pub parts: Vec<JournalPart>,
    /// The bucket has its index.
    pub indexed: bool,
}

impl Segment {
    fn begin(block: &Block, before_ns: Option<u64>) -> Segment {
        let (start, now) = (block.start(), block.message.realtime_ns);
        Segment {
            first: block.message.sequence,
            next: block.message.sequence,
            last: [0; 32],
            cut: block.message.cut.clone(),
            start,
            end: start,
            start_ns: match block.message.start_realtime_ns {
                0 => before_ns.unwrap_or_else(|| now.saturating_sub(FIRST_BLOCK_NS)),
                said => said,
            },
            end_ns: now,
            ended: String::new(),
            parts: Vec::new(),
            indexed: false,
        }
    }

    /// What the next block must continue.
    pub fn head(&self) -> Head {
        Head { next: self.next, previous: Some(self.last), end: Some(self.end), ended: !self.ended.is_empty() }
    }

    /// Bytes of it in the bucket.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// Whether it begins with the capture of this digest.
    pub fn begins_with(&self, state_digest: &[u8]) -> bool {
        self.cut.as_ref().is_some_and(|cut| cut.state_digest == state_digest)
    }

    /// Its index.
    pub fn to_message(&self, recording: RecordingId) -> JournalSegment {
        JournalSegment {
            recording: recording.0.to_vec(),
            first_sequence: self.first,
            next_sequence: self.next,
            last: self.last.to_vec(),
            cut: self.cut.clone(),
            start: Some(self.start),
            end: Some(self.end),
            start_ns: self.start_ns,
            end_ns: self.end_ns,
            ended: self.ended.clone(),
            parts: self.parts.clone(),
        }
    }

    /// From its index, which lies under this sequence; `None` if it makes no sense.
    pub fn from_message(message: JournalSegment, recording: RecordingId, first: u64) -> Option<Segment> {
        let JournalSegment {
            recording: of,
            first_sequence,
            next_sequence,
            last,
            cut,
            start,
            end,
            start_ns,
            end_ns,
            ended,
            parts,
        } = message;
        let in_order = parts.is_sorted_by(|a, b| a.first_sequence < b.first_sequence)
            && parts.first().is_some_and(|part| part.first_sequence == first)
            && parts.last().is_some_and(|part| part.first_sequence < next_sequence);
        let sound = of == recording.0 && first_sequence == first && in_order;
        sound.then_some(())?;
        let (last, start, end) = (last.try_into().ok()?, start?, end?);
        let next = next_sequence;
        Some(Segment { first, next, last, cut, start, end, start_ns, end_ns, ended, parts, indexed: true })
    }
}

/// What lies there of a recording.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tape {
    /// In order.
    pub segments: Vec<Segment>,
    /// What is missing or damaged, a sentence each.
    pub problems: Vec<String>,
    /// What the next block must continue is not known, because the newest object is damaged.
    pub torn: bool,
    /// Keys of objects that others have taken the place of.
    pub stale: Vec<String>,
}

impl Tape {
    /// What the next block must continue.
    pub fn head(&self) -> Head {
        self.segments.last().map_or_else(Head::first, Segment::head)
    }

    /// Adds blocks that continue it and lie in one object of this many bytes; `true` if a segment is complete by that. Only
    /// the first of them may begin a segment.
    pub fn grow(&mut self, blocks: &[Block], bytes: u64) -> bool {
        let Some(first) = blocks.first() else { return false };
        let sequence = first.message.sequence;
        let before_ns = self.segments.last().filter(|last| last.next == sequence).map(|last| last.end_ns);
        let begins = first.message.cut.is_some() || before_ns.is_none();
        let completes = begins && before_ns.is_some();
        if begins {
            self.segments.push(Segment::begin(first, before_ns));
        }
        let Some(segment) = self.segments.last_mut() else { return false };
        for block in blocks {
            segment.next = block.message.sequence + 1;
            segment.last = block.hash;
            segment.end = block.end();
            // A clock that was set back does not turn the recording round.
            segment.end_ns = segment.end_ns.max(block.message.realtime_ns);
            segment.ended.clone_from(&block.message.ended);
        }
        segment.parts.push(JournalPart { first_sequence: sequence, bytes });
        completes || !segment.ended.is_empty()
    }

    /// Indices of segments that are complete and have no index yet.
    pub fn unindexed(&self) -> impl Iterator<Item = usize> {
        let last = self.segments.len().saturating_sub(1);
        let complete = move |(number, segment): &(usize, &Segment)| {
            !segment.indexed && (*number < last || !segment.ended.is_empty())
        };
        self.segments.iter().enumerate().filter(complete).map(|(number, _)| number)
    }

    /// Index of the segment in which a block lies.
    pub fn segment_of(&self, sequence: u64) -> Option<usize> {
        self.segments.iter().position(|segment| (segment.first..segment.next).contains(&sequence))
    }
}

/// Blocks in pieces of which only the first may begin a segment.
pub fn pieces(blocks: &[Block]) -> impl Iterator<Item = &[Block]> {
    blocks.chunk_by(|_, later| later.message.cut.is_none())
}

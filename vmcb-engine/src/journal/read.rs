//! Blocks are checked and become events again.
//!
//! A [`Chain`] takes blocks in order and believes none: frame, numbers, the hash of the block before, positions that never go
//! back. What it has taken is what one recorder wrote, in that order, without a gap. Where it ends early is for others to
//! judge.

use proto::frame::{self, FrameError, HEADER_BYTES, Kind};
use proto::v1::JournalBlock;

use super::events::{Cursor, Event, EventError};
use super::write::{Cut, Head};
use super::{Position, RecordingId, SEMANTICS};

/// An event and when it happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stamped {
    /// Before the instruction that is retired next here.
    pub position: Position,
    /// What.
    pub event: Event,
}

/// A block that was checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Block {
    /// Its sequence.
    pub sequence: u64,
    /// Where the machine was when it began.
    pub start: Position,
    /// Everything until here is known.
    pub end: Position,
    /// Unix nanoseconds of the recording host when the machine went on from `start`; 0: not said.
    pub start_realtime_ns: u64,
    /// Unix nanoseconds of the recording host at `end`.
    pub realtime_ns: u64,
    /// The machine was captured at `start`.
    pub cut: Option<Cut>,
    /// What entered, in order.
    pub events: Vec<Stamped>,
    /// Why the recording ends at `end`; empty: it goes on.
    pub ended: String,
}

/// Why a block does not continue a chain.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChainError {
    /// It is not even a block.
    #[error("block {sequence}")]
    Frame {
        /// Which was expected.
        sequence: u64,
        /// What is wrong.
        #[source]
        source: FrameError,
    },
    /// Its numbers make no sense.
    #[error("block {sequence}: {field} makes no sense")]
    Field {
        /// Which.
        sequence: u64,
        /// Of `JournalBlock`.
        field: &'static str,
    },
    /// Its events do not unpack.
    #[error("block {sequence}")]
    Events {
        /// Which.
        sequence: u64,
        /// What is wrong.
        #[source]
        source: EventError,
    },
    /// It is of another recording.
    #[error("block {sequence} is of recording {found}, not {expected}")]
    Recording {
        /// Which.
        sequence: u64,
        /// Recording of the block.
        found: RecordingId,
        /// Recording of the chain.
        expected: RecordingId,
    },
    /// Blocks are missing, or in another order.
    #[error("block {found} follows block {expected}'s predecessor: blocks are missing or out of order")]
    Order {
        /// What came.
        found: u64,
        /// What was to come.
        expected: u64,
    },
    /// The block before is not the one that this one continues.
    #[error("block {sequence} continues another history: its predecessor's hash differs")]
    Previous {
        /// Which.
        sequence: u64,
    },
    /// It does not begin where the block before ended.
    #[error("block {sequence} begins at {found}, the block before ended at {expected}")]
    Gap {
        /// Which.
        sequence: u64,
        /// Where it begins.
        found: Position,
        /// Where it should.
        expected: Position,
    },
    /// Something follows the end of the recording.
    #[error("block {sequence} follows the end of its recording")]
    Ended {
        /// Which.
        sequence: u64,
    },
    /// A segment of another version of the engine.
    #[error(
        "recorded with version {found} of the engine's semantics; this release replays version {SEMANTICS} alone: replay it with the release that recorded it"
    )]
    Semantics {
        /// The segment's.
        found: u32,
    },
}

/// The hash in a frame's header.
pub(super) fn hash_of(frame: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(&frame[16..HEADER_BYTES]);
    hash
}

/// What the next block must continue.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Expected {
    head: Head,
    end: Position,
    ended: bool,
}

/// Checks blocks, one after the other. Any block that begins a segment may be the first.
#[derive(Clone, Debug, Default)]
pub struct Chain(Option<Expected>);

impl Chain {
    /// A chain of which nothing is known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the next block must continue; `None` before the first.
    pub fn head(&self) -> Option<Head> {
        self.0.as_ref().map(|expected| expected.head)
    }

    /// Takes the next block. On an error nothing has changed.
    ///
    /// # Errors
    /// It does not continue the chain, or this release cannot replay it.
    pub fn take(&mut self, frame: &[u8]) -> Result<Block, ChainError> {
        let sequence = self.head().map_or(0, |head| head.sequence);
        let message: JournalBlock =
            frame::decode_message(Kind::Journal, frame).map_err(|source| ChainError::Frame { sequence, source })?;
        let (block, recording, previous) = check(message)?;
        let sequence = block.sequence;
        match &self.0 {
            None if block.cut.is_none() => return Err(ChainError::Field { sequence, field: "cut" }),
            None => {}
            Some(Expected { head, end, ended }) => {
                if recording != head.recording {
                    return Err(ChainError::Recording { sequence, found: recording, expected: head.recording });
                }
                if sequence != head.sequence {
                    return Err(ChainError::Order { found: sequence, expected: head.sequence });
                }
                if previous != head.previous {
                    return Err(ChainError::Previous { sequence });
                }
                if block.start != *end {
                    return Err(ChainError::Gap { sequence, found: block.start, expected: *end });
                }
                if *ended {
                    return Err(ChainError::Ended { sequence });
                }
            }
        }
        let head = Head { recording, sequence: sequence.wrapping_add(1), previous: Some(hash_of(frame)) };
        self.0 = Some(Expected { head, end: block.end, ended: !block.ended.is_empty() });
        Ok(block)
    }
}

/// What can be said of a block by itself.
fn check(message: JournalBlock) -> Result<(Block, RecordingId, Option<[u8; 32]>), ChainError> {
    let JournalBlock {
        recording,
        sequence,
        previous,
        start,
        end,
        realtime_ns,
        events,
        event_count,
        cut,
        ended,
        start_realtime_ns,
    } = message;
    let field = |field| ChainError::Field { sequence, field };
    let recording = RecordingId::from_slice(&recording).ok_or(field("recording"))?;
    let previous: Option<[u8; 32]> = match previous.len() {
        0 if sequence == 0 => None,
        32 if sequence > 0 => previous.try_into().ok(),
        _ => return Err(field("previous")),
    };
    let start = Position::from(start.ok_or(field("start"))?);
    let end = Position::from(end.ok_or(field("end"))?);
    let cut = cut
        .map(|cut| {
            if cut.semantics != SEMANTICS {
                return Err(ChainError::Semantics { found: cut.semantics });
            }
            let state_digest = cut.state_digest.try_into().map_err(|_| field("cut.state_digest"))?;
            let config_digest = cut.config_digest.try_into().map_err(|_| field("cut.config_digest"))?;
            Ok(Cut { state_digest, config_digest })
        })
        .transpose()?;
    let events = unpack(sequence, start, event_count, &events)?;
    let last = events.last().map_or(start, |stamped| stamped.position);
    if !last.is_before_or_at(end) {
        return Err(field("end"));
    }
    let block = Block { sequence, start, end, start_realtime_ns, realtime_ns, cut, events, ended };
    Ok((block, recording, previous))
}

fn unpack(sequence: u64, start: Position, count: u32, packed: &[u8]) -> Result<Vec<Stamped>, ChainError> {
    let mut cursor = Cursor::new(packed);
    let mut events = Vec::new();
    let mut position = start;
    while !cursor.is_at_end() {
        let (event, after) = cursor.next().map_err(|source| ChainError::Events { sequence, source })?;
        let retired = position.retired.checked_add(after.retired);
        let skipped_tsc = position.skipped_tsc.checked_add(after.skipped_tsc);
        let (Some(retired), Some(skipped_tsc)) = (retired, skipped_tsc) else {
            return Err(ChainError::Field { sequence, field: "events" });
        };
        position = Position { retired, skipped_tsc };
        events.push(Stamped { position, event });
    }
    if events.len() != count as usize {
        return Err(ChainError::Field { sequence, field: "event_count" });
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::super::events::tests::any_event;
    use super::super::write::{Closing, Writer};
    use super::*;

    const CUT: Cut = Cut { state_digest: [1; 32], config_digest: [2; 32] };

    fn at(retired: u64, skipped_tsc: u64) -> Position {
        Position { retired, skipped_tsc }
    }

    fn closing(position: Position) -> Closing<'static> {
        Closing { position, realtime_ns: position.retired, ended: "" }
    }

    /// A chain of blocks with one event each, a segment at every third.
    fn chain(recording: u8, blocks: u64) -> Vec<Vec<u8>> {
        let head = Head { recording: RecordingId([recording; 16]), sequence: 0, previous: None };
        let mut writer = Writer::new(head, at(100, 0), CUT);
        (0..blocks)
            .map(|n| {
                if n > 0 && n.is_multiple_of(3) {
                    writer.begin_segment(CUT);
                }
                writer.add(at(105 + n * 10, n), &Event::Console(vec![n as u8]));
                writer.close(closing(at(110 + n * 10, n))).frame
            })
            .collect()
    }

    #[test]
    fn a_chain_is_read_as_it_was_written() {
        let mut chain_read = Chain::new();
        for (n, frame) in chain(7, 7).iter().enumerate() {
            let n = n as u64;
            let block = chain_read.take(frame).unwrap();
            assert_eq!((block.sequence, block.end, block.cut.is_some()), (n, at(110 + n * 10, n), n.is_multiple_of(3)));
            let event = Event::Console(vec![n as u8]);
            assert_eq!(block.events, [Stamped { position: at(105 + n * 10, n), event }]);
        }
        // Any segment may be the first that is read.
        let frames = chain(7, 7);
        let mut later = Chain::new();
        assert_eq!(later.take(&frames[3]).unwrap().sequence, 3);
        assert_eq!(later.take(&frames[4]).unwrap().sequence, 4);
    }

    #[test]
    fn what_does_not_continue_a_chain_is_named() {
        let (ours, theirs) = (chain(7, 6), chain(8, 6));
        let mut read = Chain::new();
        assert_eq!(read.take(&ours[1]), Err(ChainError::Field { sequence: 1, field: "cut" }));
        read.take(&ours[0]).unwrap();
        assert!(matches!(read.take(&theirs[1]), Err(ChainError::Recording { sequence: 1, .. })));
        assert_eq!(read.take(&ours[2]), Err(ChainError::Order { found: 2, expected: 1 }));
        assert_eq!(read.take(&ours[0]), Err(ChainError::Order { found: 0, expected: 1 }));
        let fork = {
            let head = Head { recording: RecordingId([7; 16]), sequence: 1, previous: Some([9; 32]) };
            Writer::new(head, at(110, 0), CUT).close(closing(at(120, 0))).frame
        };
        assert_eq!(read.take(&fork), Err(ChainError::Previous { sequence: 1 }));
        let previous = read.head().unwrap();
        let gap = Writer::new(previous, at(111, 0), CUT).close(closing(at(120, 0))).frame;
        assert!(matches!(read.take(&gap), Err(ChainError::Gap { sequence: 1, .. })));
        // None of it changed anything.
        read.take(&ours[1]).unwrap();
        let ended = {
            let mut writer = Writer::new(read.head().unwrap(), at(120, 1), CUT);
            writer.close(Closing { position: at(130, 1), realtime_ns: 0, ended: "stopped" })
        };
        assert_eq!(read.take(&ended.frame).unwrap().ended, "stopped");
        let after = Writer::new(read.head().unwrap(), at(130, 1), CUT).close(closing(at(140, 1))).frame;
        assert_eq!(read.take(&after), Err(ChainError::Ended { sequence: 3 }));
    }

    #[test]
    fn another_version_of_the_engine_is_refused() {
        let frame = &chain(7, 1)[0];
        let mut message: JournalBlock = frame::decode_message(Kind::Journal, frame).unwrap();
        message.cut.as_mut().unwrap().semantics = SEMANTICS + 1;
        let frame = frame::encode_message(Kind::Journal, &message);
        assert_eq!(Chain::new().take(&frame), Err(ChainError::Semantics { found: SEMANTICS + 1 }));
    }

    proptest! {
        #[test]
        fn events_come_back_with_their_positions(
            events in proptest::collection::vec((any_event(), 0..1u64 << 40, 0..1u64 << 40), 0..30)
        ) {
            let head = Head { recording: RecordingId([1; 16]), sequence: 0, previous: None };
            let mut writer = Writer::new(head, Position::default(), CUT);
            let mut position = Position::default();
            let mut expected = Vec::new();
            for (event, retired, skipped_tsc) in events {
                position = at(position.retired + retired, position.skipped_tsc + skipped_tsc);
                writer.add(position, &event);
                expected.push(Stamped { position, event });
            }
            let block = Chain::new().take(&writer.close(closing(position)).frame).unwrap();
            prop_assert_eq!(block.events, expected);
        }

        #[test]
        fn a_flipped_bit_is_always_noticed(bit in 0usize..2000, cut in 0usize..250) {
            let frames = chain(7, 2);
            let mut read = Chain::new();
            read.take(&frames[0]).unwrap();
            let mut changed = frames[1].clone();
            let bit = bit % (changed.len() * 8);
            changed[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(read.take(&changed).is_err());
            let cut = cut % frames[1].len();
            prop_assert!(read.take(&frames[1][..cut]).is_err());
            prop_assert!(read.take(&frames[1]).is_ok());
        }

        #[test]
        fn no_message_panics(
            sequence: u64, start: (u64, u64), end: (u64, u64), events in proptest::collection::vec(any::<u8>(), 0..100),
            count in 0u32..40, previous in 0usize..40, cut: bool
        ) {
            let cut = cut.then(|| proto::v1::JournalCut { semantics: SEMANTICS, state_digest: vec![0; 32], config_digest: vec![0; 32] });
            let message = JournalBlock {
                recording: vec![1; 16], sequence, previous: vec![0; previous], start: Some(at(start.0, start.1).into()),
                end: Some(at(end.0, end.1).into()), realtime_ns: 0, events, event_count: count, cut, ended: String::new(),
                start_realtime_ns: 0,
            };
            let _ = Chain::new().take(&frame::encode(Kind::Journal, &message.encode_to_vec()));
        }
    }
}

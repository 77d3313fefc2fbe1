//! Whether blocks continue a recording: each one names the hash of the one before, so that nothing can be cut out, reordered
//! or mixed in unseen. Pure.
//!
//! Checked are the frame, the numbers, the recording, the sequence, the hash, and that a block begins where the one before
//! ended. What is in the events only the engine knows; whoever replays them checks them again.

use bytes::Bytes;
use proto::frame::{self, FrameError, HEADER_BYTES, Kind};
use proto::ids::RecordingId;
use proto::v1::{JournalBlock, Position};

/// What the next block must continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its sequence.
    pub next: u64,
    /// The hash that it names; `None`: it is the first one.
    pub previous: Option<[u8; 32]>,
    /// Where it begins; `None`: anywhere.
    pub end: Option<Position>,
    /// The recording has ended: nothing may follow.
    pub ended: bool,
}

impl Head {
    /// Before the first block.
    pub fn first() -> Head {
        Head { next: 0, previous: None, end: None, ended: false }
    }

    /// After this block.
    pub fn after(block: &Block) -> Head {
        let JournalBlock { sequence, end, ended, .. } = &block.message;
        Head { next: sequence.saturating_add(1), previous: Some(block.hash), end: *end, ended: !ended.is_empty() }
    }
}

/// A block that was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// The frame as its recorder made it.
    pub frame: Bytes,
    /// The hash in its header.
    pub hash: [u8; 32],
    /// What it says.
    pub message: JournalBlock,
}

impl Block {
    /// Where it begins.
    pub fn start(&self) -> Position {
        self.message.start.unwrap_or_default()
    }

    /// Where it ends.
    pub fn end(&self) -> Position {
        self.message.end.unwrap_or_default()
    }
}

/// Why blocks do not continue a recording.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// It is not even a block.
    #[error("what follows block {after} is damaged: {error}")]
    Frame {
        /// Blocks before it.
        after: Before,
        /// What is wrong with it.
        error: FrameError,
    },
    /// Its numbers make no sense.
    #[error("block {sequence} makes no sense: {field}")]
    Field {
        /// Which.
        sequence: u64,
        /// What of it.
        field: &'static str,
    },
    /// It is of another recording.
    #[error("block {sequence} is of another recording")]
    Recording {
        /// Which.
        sequence: u64,
    },
    /// Blocks are missing, or in another order.
    #[error("a gap after block {after}: block {found} came")]
    Gap {
        /// The last one before it.
        after: Before,
        /// What came.
        found: u64,
    },
    /// The block before is not the one that this one continues.
    #[error("block {sequence} continues another history than block {after}")]
    Previous {
        /// Which.
        sequence: u64,
        /// The last one before it.
        after: Before,
    },
    /// A block that is known came again, with something else in it.
    #[error("block {sequence} came again as another one")]
    Fork {
        /// Which.
        sequence: u64,
    },
    /// It does not begin where the one before ended.
    #[error("block {sequence} begins at instruction {found}, the one before ended at {expected}")]
    Place {
        /// Which.
        sequence: u64,
        /// Where it begins.
        found: u64,
        /// Where it should.
        expected: u64,
    },
    /// Something follows the end of the recording.
    #[error("block {sequence} follows the end of the recording")]
    Ended {
        /// Which.
        sequence: u64,
    },
}

/// The block before, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Before(u64);

impl std::fmt::Display for Before {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.checked_sub(1) {
            Some(sequence) => write!(f, "{sequence}"),
            None => f.write_str("none"),
        }
    }
}

/// The blocks of these frames that continue `head`; those that are known already are passed over. Without a head the first one
/// may be any.
///
/// # Errors
/// [`Broken`]; none of the blocks may be used then.
pub fn check(
    recording: RecordingId,
    head: Option<&Head>,
    frames: impl IntoIterator<Item = Bytes>,
) -> Result<Vec<Block>, Broken> {
    let mut head = head.cloned();
    let mut blocks = Vec::new();
    // Of those that are passed over: in order, too.
    let mut passed: Option<u64> = None;
    for frame in frames {
        let after = Before(head.as_ref().map_or(0, |head| head.next));
        let block = read(recording, frame, after)?;
        let sequence = block.message.sequence;
        if let Some(known) = head.as_ref().filter(|known| sequence < known.next && blocks.is_empty()) {
            if passed.is_some_and(|passed| sequence != passed + 1) {
                return Err(Broken::Gap { after: Before(passed.unwrap_or(0) + 1), found: sequence });
            }
            if sequence + 1 == known.next && known.previous != Some(block.hash) {
                return Err(Broken::Fork { sequence });
            }
            passed = Some(sequence);
            continue;
        }
        if let Some(head) = &head {
            continues(head, &block)?;
        }
        head = Some(Head::after(&block));
        blocks.push(block);
    }
    Ok(blocks)
}

fn continues(head: &Head, block: &Block) -> Result<(), Broken> {
    let JournalBlock { sequence, previous, .. } = &block.message;
    let (sequence, after) = (*sequence, Before(head.next));
    if sequence != head.next {
        return Err(Broken::Gap { after, found: sequence });
    }
    if head.ended {
        return Err(Broken::Ended { sequence });
    }
    if head.previous.as_ref().map_or(&[][..], |hash| &hash[..]) != &previous[..] {
        return Err(Broken::Previous { sequence, after });
    }
    let start = block.start();
    match head.end {
        Some(end) if end != start => Err(Broken::Place { sequence, found: start.retired, expected: end.retired }),
        _ => Ok(()),
    }
}

/// A block, checked as far as it can be by itself.
fn read(recording: RecordingId, bytes: Bytes, after: Before) -> Result<Block, Broken> {
    let message: JournalBlock =
        frame::decode_message(Kind::Journal, &bytes).map_err(|error| Broken::Frame { after, error })?;
    let sequence = message.sequence;
    let field = |field| Broken::Field { sequence, field };
    if message.recording != recording.0 {
        return Err(Broken::Recording { sequence });
    }
    if message.previous.len() != if sequence == 0 { 0 } else { 32 } {
        return Err(field("previous"));
    }
    let (Some(start), Some(end)) = (message.start, message.end) else { return Err(field("positions")) };
    if end.retired < start.retired || end.skipped_tsc < start.skipped_tsc {
        return Err(field("it ends before it begins"));
    }
    if sequence == u64::MAX {
        return Err(field("sequence"));
    }
    if let Some(cut) = &message.cut
        && (cut.state_digest.len(), cut.config_digest.len()) != (32, 32)
    {
        return Err(field("cut"));
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(&bytes[16..HEADER_BYTES]);
    Ok(Block { frame: bytes, hash, message })
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use proto::v1::JournalCut;

    use super::*;

    pub(crate) const RECORDING: RecordingId = RecordingId([0xc5; 16]);

    /// A recorder: what it makes is a chain.
    #[derive(Clone)]
    pub(crate) struct Recorder {
        pub(crate) recording: RecordingId,
        pub(crate) head: Head,
        pub(crate) at: Position,
        pub(crate) now_ns: u64,
    }

    impl Recorder {
        pub(crate) fn new(recording: RecordingId) -> Recorder {
            let at = Position { retired: 1000, skipped_tsc: 0 };
            Recorder { recording, head: Head::first(), at, now_ns: 1_700_000_000_000_000_000 }
        }

        fn close(&mut self, cut: Option<JournalCut>, ended: &str) -> Bytes {
            let end = Position { retired: self.at.retired + 1_000_000, skipped_tsc: self.at.skipped_tsc + 500 };
            self.now_ns += 1_000_000_000;
            let message = JournalBlock {
                recording: self.recording.0.to_vec(),
                sequence: self.head.next,
                previous: self.head.previous.map(|hash| hash.to_vec()).unwrap_or_default(),
                start: Some(self.at),
                end: Some(end),
                realtime_ns: self.now_ns,
                events: vec![7; (self.head.next % 5) as usize * 11],
                event_count: 1,
                cut,
                ended: ended.into(),
                start_realtime_ns: 0,
            };
            let frame = Bytes::from(frame::encode_message(Kind::Journal, &message));
            let block = read(self.recording, frame.clone(), Before(0)).unwrap();
            (self.head, self.at) = (Head::after(&block), end);
            frame
        }

        pub(crate) fn block(&mut self) -> Bytes {
            self.close(None, "")
        }

        /// The first block of a segment, whose capture has a digest of this byte.
        pub(crate) fn cut(&mut self, digest: u8) -> Bytes {
            self.cut_of([digest; 32])
        }

        pub(crate) fn cut_of(&mut self, digest: [u8; 32]) -> Bytes {
            let cut = JournalCut { semantics: 1, state_digest: digest.to_vec(), config_digest: vec![1; 32] };
            self.close(Some(cut), "")
        }

        pub(crate) fn last(&mut self) -> Bytes {
            self.close(None, "stopped")
        }
    }

    pub(crate) fn chain(count: usize) -> Vec<Bytes> {
        let mut recorder = Recorder::new(RECORDING);
        (0..count).map(|number| if number == 0 { recorder.cut(1) } else { recorder.block() }).collect()
    }

    fn refused(head: &Head, frames: Vec<Bytes>) -> Broken {
        check(RECORDING, Some(head), frames).unwrap_err()
    }

    #[test]
    fn what_continues_is_taken_and_what_is_known_is_passed_over() {
        let frames = chain(6);
        let blocks = check(RECORDING, Some(&Head::first()), frames.clone()).unwrap();
        assert_eq!(blocks.iter().map(|block| block.message.sequence).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        let head = Head::after(&blocks[3]);
        assert_eq!(check(RECORDING, Some(&head), frames[1..].to_vec()).unwrap(), blocks[4..]);
        assert_eq!(check(RECORDING, Some(&head), frames[..3].to_vec()).unwrap(), []);
        assert_eq!(check(RECORDING, None, frames[2..].to_vec()).unwrap(), blocks[2..]);
    }

    #[test]
    fn each_way_to_be_wrong_is_named() {
        let frames = chain(6);
        let blocks = check(RECORDING, Some(&Head::first()), frames.clone()).unwrap();
        let head = Head::after(&blocks[2]);
        assert_eq!(refused(&head, frames[4..].to_vec()).to_string(), "a gap after block 2: block 4 came");
        assert_eq!(refused(&Head::first(), frames[1..].to_vec()).to_string(), "a gap after block none: block 1 came");
        let swapped = vec![frames[3].clone(), frames[5].clone(), frames[4].clone()];
        assert_eq!(refused(&head, swapped).to_string(), "a gap after block 3: block 5 came");
        let skipping = vec![frames[0].clone(), frames[2].clone(), frames[3].clone()];
        assert!(matches!(refused(&head, skipping), Broken::Gap { .. }));
        // Another history of the same recording: it forks before, at, or after what is known.
        let mut other = Recorder::new(RECORDING);
        let fork: Vec<Bytes> = (0..6).map(|number| if number == 0 { other.cut(9) } else { other.block() }).collect();
        assert_eq!(refused(&head, fork[2..].to_vec()), Broken::Fork { sequence: 2 });
        assert!(matches!(refused(&head, fork[3..].to_vec()), Broken::Previous { sequence: 3, .. }));
        let mut stranger = Recorder::new(RecordingId([1; 16]));
        assert_eq!(refused(&Head::first(), vec![stranger.cut(1)]), Broken::Recording { sequence: 0 });
        let moved = Head { end: Some(Position { retired: 5, skipped_tsc: 0 }), ..head.clone() };
        assert!(matches!(refused(&moved, frames[3..].to_vec()), Broken::Place { sequence: 3, expected: 5, .. }));
        let over = Head { ended: true, ..head };
        assert_eq!(refused(&over, frames[3..].to_vec()), Broken::Ended { sequence: 3 });
    }

    /// What a hostile host does to blocks on their way.
    #[derive(Clone, Debug)]
    enum Hostility {
        Cut(usize, usize),
        Flip(usize, usize),
        Swap(usize, usize),
        Drop(usize),
        Foreign(usize),
        Nothing,
    }

    fn hostility() -> impl Strategy<Value = Hostility> {
        prop_oneof![
            (0..12usize, 0..400usize).prop_map(|(at, keep)| Hostility::Cut(at, keep)),
            (0..12usize, 0..4000usize).prop_map(|(at, bit)| Hostility::Flip(at, bit)),
            (0..12usize, 0..12usize).prop_map(|(a, b)| Hostility::Swap(a, b)),
            (0..12usize).prop_map(Hostility::Drop),
            (0..12usize).prop_map(Hostility::Foreign),
            Just(Hostility::Nothing),
        ]
    }

    fn hurt(frames: &mut Vec<Bytes>, how: &Hostility) {
        match *how {
            Hostility::Cut(at, keep) => frames[at] = frames[at].slice(..keep.min(frames[at].len())),
            Hostility::Flip(at, bit) => {
                let mut bytes = frames[at].to_vec();
                let bit = bit % (bytes.len() * 8);
                bytes[bit / 8] ^= 1 << (bit % 8);
                frames[at] = bytes.into();
            }
            Hostility::Swap(a, b) => frames.swap(a, b),
            Hostility::Drop(at) => drop(frames.remove(at)),
            Hostility::Foreign(at) => {
                let mut stranger = Recorder::new(RecordingId([9; 16]));
                frames[at] = (0..=at).map(|_| stranger.block()).last().unwrap();
            }
            Hostility::Nothing => {}
        }
    }

    proptest! {
        /// Whatever is done to blocks, and however much is known already: what is taken is the chain as it was recorded, from
        /// where it was known on, without a gap; and what is not that is refused.
        #[test]
        fn nothing_hostile_is_taken(known in 0..12usize, from in 0..12usize, how in hostility()) {
            let frames = chain(12);
            let sound = check(RECORDING, Some(&Head::first()), frames.clone()).unwrap();
            let head = known.checked_sub(1).map_or(Head::first(), |last| Head::after(&sound[last]));
            let mut sent = frames.clone();
            hurt(&mut sent, &how);
            let sent: Vec<Bytes> = sent.into_iter().skip(from).collect();
            match check(RECORDING, Some(&head), sent.clone()) {
                Ok(taken) => {
                    prop_assert_eq!(&taken[..], &sound[known..known + taken.len()]);
                    let whole = sent[..] == frames[from..] && from <= known;
                    prop_assert!(!whole || known + taken.len() == 12, "blocks were passed over that are not known");
                }
                Err(broken) => {
                    let intact = from <= known && sent[..] == frames[from..];
                    prop_assert!(!intact, "{broken}");
                }
            }
        }

        #[test]
        fn any_bytes_are_refused_or_taken_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(check(RECORDING, None, [Bytes::from(bytes)]).is_err());
        }
    }
}

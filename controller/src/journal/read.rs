//! Reading recordings back: objects become frames, and frames a chain again.
//!
//! Blocks may lie in more than one object: a segment that was merged has taken the place of its parts, some of which may
//! still be there. What counts is the sequence: an object is read from the block on that is wanted next. Nothing is
//! believed; what is missing, cut or changed is named with its key.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use proto::frame::{self, HEADER_BYTES, Header, Kind};
use proto::ids::{RecordingId, VmId};
use proto::seal::Opener;
use proto::status::Code;
use proto::v1::JournalSegment;

use super::chain::{self, Block, Head};
use super::segment::{Segment, Tape, pieces};
use crate::abreast::abreast;
use crate::bucket::{BucketError, JournalObject, journal_key, journal_object, journal_prefix, segment_key};
use crate::failure::Failure;
use crate::ingest::read::{Reader, beside, damaged};

/// Indexes that are read at a time.
const READS_MAX: usize = 8;
/// How often an object that was listed may be gone when it is read: merging takes parts away.
const TRIES_MAX: u32 = 5;

/// One recording in the bucket.
#[derive(Clone)]
pub struct Shelf {
    /// What reads it.
    pub reader: Reader,
    /// Whose it is.
    pub vm: VmId,
    /// Which.
    pub recording: RecordingId,
}

impl Shelf {
    /// Where its blocks from this one on lie, if an object begins there.
    pub fn key(&self, first: u64) -> String {
        journal_key(&self.vm.to_string(), self.recording, first)
    }

    /// Where the index of the segment lies that begins there.
    pub fn index_key(&self, first: u64) -> String {
        segment_key(&self.vm.to_string(), self.recording, first)
    }

    /// Where all of it lies.
    pub fn prefix(&self) -> String {
        journal_prefix(&self.vm.to_string(), self.recording)
    }

    async fn opener(&self) -> Result<Opener, Failure> {
        self.reader.keys.opener(&self.reader.bucket, self.vm, &[]).await
    }

    /// Its objects with blocks (bytes by first sequence), and its indexes.
    ///
    /// # Errors
    /// The bucket's.
    pub async fn objects(&self) -> Result<(BTreeMap<u64, u64>, Vec<u64>), Failure> {
        let (mut blocks, mut indexes) = (BTreeMap::new(), Vec::new());
        for object in self.reader.bucket.list_objects(&self.prefix()).await? {
            match journal_object(&object.key) {
                Some(JournalObject::Blocks(first)) => drop(blocks.insert(first, object.bytes)),
                Some(JournalObject::Index(first)) => indexes.push(first),
                None => {}
            }
        }
        Ok((blocks, indexes))
    }

    /// An object as it is stored, and the frames in it; `None` if it is gone.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming it, or the bucket's.
    pub async fn object(&self, first: u64) -> Result<Option<(Bytes, Vec<Bytes>)>, Failure> {
        let key = self.key(first);
        let stored = match self.reader.bucket.get(&key).await {
            Err(BucketError::Missing(_)) => return Ok(None),
            read => read?,
        };
        let opener = self.opener().await?;
        let opened = beside(move || {
            let frames = open(&opener, &stored).map_err(|why| hurt(&key, why))?;
            Ok((stored, frames))
        });
        opened.await?.map(Some)
    }

    /// The frames in an object; `None` if it is gone.
    ///
    /// # Errors
    /// As [`Shelf::object`].
    pub async fn frames(&self, first: u64) -> Result<Option<Vec<Bytes>>, Failure> {
        Ok(self.object(first).await?.map(|(_, frames)| frames))
    }

    async fn index(&self, first: u64) -> Result<Option<Segment>, Failure> {
        let sealed = match self.reader.bucket.get(&self.index_key(first)).await {
            Err(BucketError::Missing(_)) => return Ok(None),
            read => read?,
        };
        let message = self.opener().await?.open(&sealed).ok();
        let message = message.and_then(|plain| frame::decode_message::<JournalSegment>(Kind::Control, &plain).ok());
        Ok(message.and_then(|message| Segment::from_message(message, self.recording, first)))
    }

    /// What lies there. Complete segments are known by their indexes; what has none is read.
    ///
    /// # Errors
    /// The bucket's, or that the VM's key is missing. What is damaged is a problem of the tape.
    pub async fn tape(&self) -> Result<Tape, Failure> {
        let (objects, indexes) = self.objects().await?;
        if objects.is_empty() {
            return Ok(Tape::default());
        }
        let read = abreast(READS_MAX, indexes, |first| {
            let shelf = self.clone();
            async move { shelf.index(first).await }
        });
        let mut indexed: BTreeMap<u64, Segment> = BTreeMap::new();
        let mut tape = Tape::default();
        for segment in read.await?.into_iter().flatten() {
            let there = |part: &proto::v1::JournalPart| objects.get(&part.first_sequence) == Some(&part.bytes);
            match segment.parts.iter().find(|part| !there(part)) {
                None => drop(indexed.insert(segment.first, segment)),
                Some(part) => {
                    let key = self.key(part.first_sequence);
                    tape.problems.push(format!("{key} is missing or not as long as it was written"));
                }
            }
        }
        for (first, bytes) in objects {
            if let Some(segment) = indexed.remove(&first) {
                self.note_gap(&mut tape, first);
                tape.torn = false;
                tape.segments.push(segment);
            } else if first < tape.head().next {
                let part_of = |segment: &Segment| segment.parts.iter().any(|part| part.first_sequence == first);
                if !tape.segments.iter().any(part_of) {
                    tape.stale.push(self.key(first));
                }
            } else if let Err(failure) = self.read_into(&mut tape, first, bytes).await {
                if !matches!(failure.code, Code::Corrupt) {
                    return Err(failure);
                }
                tape.problems.push(failure.message);
                tape.torn = true;
            }
        }
        Ok(tape)
    }

    fn note_gap(&self, tape: &mut Tape, first: u64) {
        if let Some(last) = tape.segments.last()
            && last.next != first
        {
            tape.problems.push(format!("blocks {} to {} are missing", last.next, first - 1));
        }
    }

    /// Reads an object whose blocks no index knows.
    async fn read_into(&self, tape: &mut Tape, first: u64, bytes: u64) -> Result<(), Failure> {
        let Some(frames) = self.frames(first).await? else {
            return Err(Failure::new(Code::Unreachable, format!("{} went while it was read", self.key(first))));
        };
        let known = tape.segments.last().map(Segment::head).filter(|head| head.next == first);
        if known.is_none() {
            self.note_gap(tape, first);
        }
        let blocks = chain::check(self.recording, known.as_ref(), frames);
        let blocks = blocks.map_err(|broken| hurt(&self.key(first), broken))?;
        if blocks.first().is_none_or(|block| block.message.sequence != first) {
            return Err(hurt(&self.key(first), "it holds other blocks than its name says"));
        }
        tape.torn = false;
        // An object never holds the beginning of a segment in its middle, unless somebody else wrote it.
        let mut rest = bytes;
        for piece in pieces(&blocks) {
            let last = piece.last().is_none_or(|block| Some(block) == blocks.last());
            let share = if last { rest } else { piece.iter().map(|block| block.frame.len() as u64).sum() };
            rest = rest.saturating_sub(share);
            tape.grow(piece, share);
        }
        Ok(())
    }

    /// The blocks from `first` up to, but not including, `end`.
    pub fn blocks(&self, first: u64, end: u64) -> Blocks {
        Blocks { shelf: self.clone(), objects: None, head: None, next: first, end, ready: VecDeque::new(), tries: 0 }
    }
}

/// The blocks of a recording, one after the other.
pub struct Blocks {
    shelf: Shelf,
    /// Where objects begin; `None`: to be listed, at first and when one of them is gone.
    objects: Option<BTreeMap<u64, u64>>,
    head: Option<Head>,
    next: u64,
    end: u64,
    ready: VecDeque<Block>,
    tries: u32,
}

impl Blocks {
    /// The next one; `None` after the last.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming what is damaged or missing, or the bucket's.
    pub async fn next(&mut self) -> Result<Option<Block>, Failure> {
        while self.ready.is_empty() && self.next < self.end {
            self.read().await?;
        }
        let block = if self.next < self.end { self.ready.pop_front() } else { None };
        self.next += u64::from(block.is_some());
        Ok(block)
    }

    async fn read(&mut self) -> Result<(), Failure> {
        let objects = match &mut self.objects {
            Some(objects) => objects,
            none => none.insert(self.shelf.objects().await?.0),
        };
        let gone =
            |next: u64| damaged(&format!("recording {}", self.shelf.recording), format!("block {next} is missing"));
        let Some((&first, _)) = objects.range(..=self.next).next_back() else { return Err(gone(self.next)) };
        let Some(frames) = self.shelf.frames(first).await? else {
            self.objects = None;
            self.tries += 1;
            return if self.tries > TRIES_MAX { Err(gone(self.next)) } else { Ok(()) };
        };
        let blocks = chain::check(self.shelf.recording, self.head.as_ref(), frames);
        let mut blocks = blocks.map_err(|broken| hurt(&self.shelf.key(first), broken))?;
        blocks.retain(|block| block.message.sequence >= self.next);
        if blocks.first().is_none_or(|block| block.message.sequence != self.next) {
            return Err(gone(self.next));
        }
        (self.tries, self.head) = (0, blocks.last().map(Head::after));
        self.ready.extend(blocks);
        Ok(())
    }
}

/// Takes an object apart into the frames inside.
fn open(opener: &Opener, stored: &Bytes) -> Result<Vec<Bytes>, String> {
    let (mut frames, mut at) = (Vec::new(), 0);
    while at < stored.len() {
        let wrong = |error: &dyn std::fmt::Display| format!("at byte {at}: {error}");
        let header = Header::parse(&stored[at..]).map_err(|error| wrong(&error))?;
        let end = at + HEADER_BYTES + header.body_bytes;
        let sealed = stored.get(at..end).ok_or_else(|| wrong(&"it is cut"))?;
        frames.push(opener.open(sealed).map_err(|error| wrong(&error))?.into());
        at = end;
    }
    Ok(frames)
}

fn hurt(key: &str, why: impl std::fmt::Display) -> Failure {
    let mut failure = damaged(&format!("journal {key}"), why);
    failure.hint = "a replay can go up to there; `ctl record ls` shows what can be visited".into();
    failure
}

//! Recordings in the bucket: blocks of a journal are taken from hosts, checked, sealed, put, merged, read, and removed.
//!
//! ```text
//!   agent --AppendJournal--> chain: does it continue? --seal--> one object an append, put if it is not there --> answer
//!                                                                     | the next segment begins
//!                                                                     v
//!                                      merge: the segment in one object, then its index, then its parts go
//! ```
//! A *segment* begins where the machine was captured (`JournalBlock.cut`); a checkpoint belongs to a recording if a segment
//! begins with its `digest.state`. What lies in the bucket is what is true: a controller that starts again reads it back.
//! Which recordings there are, and why they ended, the ledger knows; this room knows no host and decides nothing about VMs.

pub mod chain;
mod merge;
pub mod read;
pub mod segment;
pub mod span;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use proto::ids::{RecordingId, VmId};
use proto::seal::Sealer;
use proto::status::Code;

use self::chain::Block;
use self::read::Shelf;
use self::segment::{Tape, pieces};
use crate::bucket::PutNew;
use crate::failure::Failure;
use crate::ingest::owner::Claim;
use crate::ingest::read::{Reader, beside};

/// Most blocks of one append that are looked at; the answer says which is wanted next.
pub const BLOCKS_MAX: usize = 4096;
/// Largest message of an append, bytes.
pub const APPEND_BYTES_MAX: usize = 32 << 20;

/// What became of an append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Appended {
    /// Everything below `next` lies in the bucket.
    Below {
        /// Sequence of the block that is wanted next.
        next: u64,
        /// Why the recording ends with the last of them; empty: it goes on.
        ended: String,
    },
    /// The blocks do not continue the recording: why. Nothing of them was stored.
    Refused(String),
}

/// What became of an object.
enum Put {
    /// It lies there, with so many bytes.
    Stored(u64),
    /// Another one lies there that begins with the same blocks.
    Same,
    /// Another one lies there.
    Other,
}

/// One recording.
struct Entry {
    shelf: Shelf,
    /// `None`: it has to be read back.
    tape: tokio::sync::Mutex<Option<Tape>>,
    /// Held by whoever merges or removes.
    upkeep: tokio::sync::Mutex<()>,
    /// The generation whose claim was made, and the newest block's realtime_ns; 0: not known.
    claimed: AtomicU64,
    newest_ns: AtomicU64,
}

/// All recordings; clones are the same.
#[derive(Clone)]
pub struct Journals {
    reader: Reader,
    entries: Arc<Mutex<HashMap<RecordingId, Arc<Entry>>>>,
}

impl Journals {
    /// Over what reads and writes the bucket.
    pub fn new(reader: Reader) -> Journals {
        Journals { reader, entries: Arc::default() }
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, HashMap<RecordingId, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, vm: VmId, recording: RecordingId) -> Arc<Entry> {
        let new = || Entry {
            shelf: self.shelf(vm, recording),
            tape: tokio::sync::Mutex::default(),
            upkeep: tokio::sync::Mutex::default(),
            claimed: AtomicU64::new(0),
            newest_ns: AtomicU64::new(0),
        };
        self.entries().entry(recording).or_insert_with(|| Arc::new(new())).clone()
    }

    /// What reads a recording.
    pub fn shelf(&self, vm: VmId, recording: RecordingId) -> Shelf {
        Shelf { reader: self.reader.clone(), vm, recording }
    }

    /// When the newest block of a recording ended, Unix nanoseconds of its host, if that is known without asking the bucket.
    pub fn newest_ns(&self, recording: RecordingId) -> Option<u64> {
        let newest = self.entries().get(&recording).map(|entry| entry.newest_ns.load(Ordering::Relaxed));
        newest.filter(|newest| *newest > 0)
    }

    /// What lies there of a recording.
    ///
    /// # Errors
    /// As [`Shelf::tape`].
    pub async fn tape(&self, vm: VmId, recording: RecordingId) -> Result<Tape, Failure> {
        let entry = self.entry(vm, recording);
        let mut slot = entry.tape.lock().await;
        let tape = match slot.take() {
            Some(tape) => tape,
            None => entry.read_back().await?,
        };
        // What a controller before this one left half done.
        let untidy = !tape.stale.is_empty() || tape.unindexed().next().is_some();
        *slot = Some(tape.clone());
        drop(slot);
        if untidy {
            self.tidy(entry);
        }
        Ok(tape)
    }

    /// Appends blocks of a recording of the VM that `claim` is about. When this returns they are durable.
    ///
    /// # Errors
    /// The bucket's; then it is not known what was stored, and asking again finds out.
    pub async fn append(
        &self,
        vm: VmId,
        recording: RecordingId,
        claim: &Claim,
        frames: Vec<Bytes>,
    ) -> Result<Appended, Failure> {
        let entry = self.entry(vm, recording);
        let mut slot = entry.tape.lock().await;
        // An append that is given up in the middle leaves none behind: the next one reads back.
        let mut tape = match slot.take() {
            Some(tape) => tape,
            None => entry.read_back().await?,
        };
        let mut completed = false;
        let mut reread = false;
        'again: loop {
            if tape.torn {
                let why = tape.problems.last().cloned().unwrap_or_default();
                *slot = Some(tape);
                return Ok(Appended::Refused(format!("what lies in the bucket cannot be continued: {why}")));
            }
            let blocks = match chain::check(recording, Some(&tape.head()), frames.iter().cloned()) {
                Ok(blocks) => blocks,
                Err(broken) => {
                    *slot = Some(tape);
                    return Ok(Appended::Refused(broken.to_string()));
                }
            };
            if !blocks.is_empty() {
                entry.claim(claim).await?;
            }
            for piece in pieces(&blocks) {
                match entry.put(piece).await? {
                    Put::Stored(bytes) => completed |= tape.grow(piece, bytes),
                    // What an append wrote that could not answer: what it was is seen now.
                    Put::Same if !std::mem::replace(&mut reread, true) => {
                        tape = entry.read_back().await?;
                        continue 'again;
                    }
                    Put::Same | Put::Other => {
                        let key = entry.shelf.key(piece.first().map_or(0, |block| block.message.sequence));
                        return Ok(Appended::Refused(format!("{key} holds something else already")));
                    }
                }
            }
            break;
        }
        entry.note(&tape);
        let next = tape.head().next;
        let ended = tape.segments.last().map(|last| last.ended.clone()).unwrap_or_default();
        *slot = Some(tape);
        drop(slot);
        if completed {
            self.tidy(entry);
        }
        Ok(Appended::Below { next, ended })
    }

    /// Removes the segments before the first one that begins with one of these captures, or all of them if none does; the
    /// newest one stays while the recording `goes_on`. How many went.
    ///
    /// # Errors
    /// The bucket's; what is left can be removed by asking again.
    pub async fn prune(
        &self,
        vm: VmId,
        recording: RecordingId,
        kept: &[Vec<u8>],
        goes_on: bool,
    ) -> Result<usize, Failure> {
        let entry = self.entry(vm, recording);
        let _upkeep = entry.upkeep.lock().await;
        let segments = entry.current().await?.segments;
        let needed = segments.iter().position(|segment| kept.iter().any(|digest| segment.begins_with(digest)));
        let most = segments.len().saturating_sub(goes_on.into());
        let count = needed.unwrap_or(most).min(most);
        for _ in 0..count {
            entry.remove_first().await?;
        }
        Ok(count)
    }

    /// Removes all of a recording.
    ///
    /// # Errors
    /// The bucket's; what is left can be removed by asking again.
    pub async fn remove(&self, vm: VmId, recording: RecordingId) -> Result<(), Failure> {
        let entry = self.entry(vm, recording);
        let _upkeep = entry.upkeep.lock().await;
        // Whatever lies there, known or not; indexes first, then blocks from the oldest on.
        let mut keys = self.reader.bucket.list(&entry.shelf.prefix()).await?;
        keys.sort_by_key(|key| (!key.ends_with(".index"), key.clone()));
        *entry.tape.lock().await = None;
        for key in keys {
            self.reader.bucket.delete(&key).await?;
        }
        self.entries().remove(&recording);
        Ok(())
    }

    /// Merges what is complete, beside the caller.
    fn tidy(&self, entry: Arc<Entry>) {
        tokio::spawn(async move {
            if let Err(failure) = entry.tidy().await {
                tracing::warn!(recording = %entry.shelf.recording, %failure, "a segment is not merged yet");
            }
        });
    }

    /// Merges what is complete, now.
    ///
    /// # Errors
    /// The bucket's.
    #[cfg(test)]
    pub(crate) async fn tidy_now(&self, vm: VmId, recording: RecordingId) -> Result<(), Failure> {
        self.entry(vm, recording).tidy().await
    }
}

impl Entry {
    async fn read_back(&self) -> Result<Tape, Failure> {
        let tape = self.shelf.tape().await?;
        self.note(&tape);
        Ok(tape)
    }

    fn note(&self, tape: &Tape) {
        let newest = tape.segments.last().map_or(0, |segment| segment.end_ns);
        self.newest_ns.store(newest, Ordering::Relaxed);
    }

    /// The tape as it is, read back if it has to be.
    async fn current(&self) -> Result<Tape, Failure> {
        let mut slot = self.tape.lock().await;
        if slot.is_none() {
            *slot = Some(self.read_back().await?);
        }
        Ok(slot.clone().unwrap_or_default())
    }

    /// Says in the bucket whose this generation is, once.
    async fn claim(&self, claim: &Claim) -> Result<(), Failure> {
        if self.claimed.load(Ordering::Relaxed) != claim.generation.0 {
            claim.make(&self.shelf.reader.bucket).await?;
            self.claimed.store(claim.generation.0, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Puts blocks as one object, unless something lies there.
    async fn put(&self, piece: &[Block]) -> Result<Put, Failure> {
        let Shelf { reader, vm, .. } = &self.shelf;
        let first = piece.first().map_or(0, |block| block.message.sequence);
        let data_key = reader.keys.data_key(&reader.bucket, *vm).await?;
        let (vm, frames) = (*vm, piece.iter().map(|block| block.frame.clone()).collect::<Vec<_>>());
        let sealed = beside(move || {
            let sealer = Sealer::new(&data_key, vm, proto::seal::salt());
            frames.iter().flat_map(|frame| sealer.seal(frame)).collect::<Vec<u8>>()
        });
        let sealed = Bytes::from(sealed.await?);
        let bytes = sealed.len() as u64;
        if reader.bucket.put_new(&self.shelf.key(first), sealed).await? == PutNew::Created {
            return Ok(Put::Stored(bytes));
        }
        let there = match self.shelf.frames(first).await {
            Err(failure) if failure.code == Code::Corrupt => None,
            read => read?,
        };
        // It may hold fewer or more of them.
        let same = there.is_some_and(|there| there.iter().zip(piece).all(|(there, block)| *there == block.frame));
        Ok(if same { Put::Same } else { Put::Other })
    }

    /// Removes the oldest segment. The index goes first, then the objects from the oldest on: whatever is left when this is
    /// cut short is the rest of a chain.
    async fn remove_first(&self) -> Result<(), Failure> {
        let Some(segment) = self.current().await?.segments.into_iter().next() else { return Ok(()) };
        let bucket = &self.shelf.reader.bucket;
        bucket.delete(&self.shelf.index_key(segment.first)).await?;
        let (objects, _) = self.shelf.objects().await?;
        // Also what a merge has taken the place of and has not removed yet.
        for first in objects.range(segment.first..segment.next).map(|(first, _)| *first) {
            bucket.delete(&self.shelf.key(first)).await?;
        }
        if let Some(tape) = &mut *self.tape.lock().await {
            tape.segments.retain(|there| there.first != segment.first);
            // Nothing is missing that nobody wants.
            tape.problems.clear();
        }
        Ok(())
    }
}

/// What the next block of a recording must continue, for tests.
#[cfg(test)]
impl Journals {
    async fn head(&self, vm: VmId, recording: RecordingId) -> chain::Head {
        self.tape(vm, recording).await.unwrap().head()
    }
}

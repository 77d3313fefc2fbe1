//! Threads that put the pages of a round on the lanes: read, hash, queue.
//!
//! The round's runs are cut into pieces in a list; each lane has a thread that takes the next of them, up to
//! [`PIECE_PAGES`] pages together, when its queue has room, so a slow lane takes fewer. When the list is empty each thread
//! queues the `RoundEnd` of its lane.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::lane::{self, Buffers};
use proto::seal::Sealer;
use proto::status::Code;
use proto::v1::{BaseLeaves, RoundEnd};
use tokio::sync::mpsc;
use vmcb_engine::memory::PAGE_BYTES;
use vmcb_engine::memory::digest::{PageDigests, ZERO_LEAF};
use vmcb_engine::memory::shared::{PagesError, Run};
use vmcb_engine::transfer::runs::{self, Batch, PIECE_PAGES};

use super::load::{Load, with_holes};
use super::pace::Pace;
use super::{say, words};
use crate::migration::message::Message;
use crate::migration::source::RoundTotals;
use crate::migration::{Failure, Spaces};

/// Longest sleep of a thread that keeps a pace, so that it notices a cancel.
const SLEEP_MAX: Duration = Duration::from_millis(20);

/// What the threads of all rounds share.
pub struct Outgoing {
    pub spaces: Spaces,
    /// Digests of what the target has or is about to have.
    pub digests: Mutex<Vec<PageDigests>>,
    pub buffers: Arc<Buffers>,
    /// A checkpoint: seals every frame, and leaves out pages that the target has.
    pub sealer: Option<Sealer>,
    pub pace: Mutex<Pace>,
    pub began: Instant,
    /// Set when the transfer is over: threads end at their next piece.
    pub over: AtomicBool,
    /// Bytes of frames queued since the beginning.
    pub bytes_sent: AtomicU64,
    /// Bytes of pages of this round that are not yet queued.
    pub bytes_left: AtomicU64,
}

/// A round to be sent.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    pub number: u32,
    pub since: u32,
    /// Pages with this stamp or a later one are left to the next round.
    pub until: Option<u32>,
    pub last: bool,
    /// Pages as they were at this frozen instant.
    pub instant: Option<u32>,
}

impl Outgoing {
    fn digests(&self) -> std::sync::MutexGuard<'_, Vec<PageDigests>> {
        self.digests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in pages with stamp `since` or later.
    pub fn left_bytes(&self, since: u32) -> Result<u64, Failure> {
        let mut pages = 0;
        for space in self.spaces.iter() {
            pages += space.count_since(since).map_err(|e| cannot_read(&e))?;
        }
        Ok(pages * PAGE_BYTES)
    }

    /// Brings the digests up to date; returns the roots.
    pub fn roots(&self) -> Vec<proto::ids::Digest> {
        self.digests().iter_mut().map(PageDigests::root).collect()
    }

    /// Hashes all pages again from where they lie and compares them with what was sent. The guest stands still.
    pub fn verify(&self) -> Result<(), Failure> {
        for (number, space) in self.spaces.iter().enumerate() {
            let now = space.digests().map_err(|e| cannot_read(&e))?;
            if let Some(page) = self.digests()[number].first_difference(&now) {
                let text = format_args!("page {page} of space {number} is not what was sent: a write was not stamped");
                return Err(Failure::new(Code::Internal, text));
            }
        }
        Ok(())
    }

    /// Sends a round over all lanes; ends when everything is queued.
    pub async fn send(self: Arc<Self>, round: Round, lanes: Vec<mpsc::Sender<Bytes>>) -> Result<RoundTotals, Failure> {
        let this = Arc::clone(&self);
        let pieces = Arc::new(blocking(move || this.pieces(round)).await??);
        let next = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = lanes
            .into_iter()
            .map(|lane| {
                let (this, pieces, next) = (Arc::clone(&self), Arc::clone(&pieces), Arc::clone(&next));
                tokio::task::spawn_blocking(move || this.send_on(&lane, round, &pieces, &next))
            })
            .collect();
        let mut totals = RoundTotals::default();
        for thread in threads {
            let part = thread.await.map_err(|e| Failure::new(Code::Internal, e))??;
            totals.pages += part.pages;
            totals.zero_pages += part.zero_pages;
            totals.bytes += part.bytes;
            totals.left_out_pages += part.left_out_pages;
        }
        // Pages in holes of the files were not even read.
        let read: u64 = pieces.iter().map(|(_, run)| run.pages).sum();
        if round.since == 0 {
            let holes = self.spaces.iter().map(|space| space.pages()).sum::<u64>() - read;
            totals.pages += holes;
            totals.zero_pages += holes;
        }
        Ok(totals)
    }

    fn pieces(&self, round: Round) -> Result<Vec<(u16, Run)>, Failure> {
        let mut pieces = Vec::new();
        for (number, space) in (0..).zip(self.spaces.iter()) {
            let mut runs = match (round.instant, round.since) {
                (Some(instant), since) => space.since_frozen(since, instant),
                (None, 0) => space.filled(space.whole()),
                (None, since) => space.since(since),
            }
            .map_err(|e| cannot_read(&e))?;
            if round.since == 0 {
                // Everything: holes need be looked at only where the target has something else than zeros.
                runs = with_holes(runs, &self.digests()[usize::from(number)]);
            }
            pieces.extend(runs.into_iter().flat_map(runs::pieces).map(|run| (number, run)));
        }
        self.bytes_left.store(pieces.iter().map(|(_, run)| run.pages * PAGE_BYTES).sum(), Ordering::Relaxed);
        Ok(pieces)
    }

    fn send_on(
        &self,
        lane: &mpsc::Sender<Bytes>,
        round: Round,
        pieces: &[(u16, Run)],
        next: &AtomicUsize,
    ) -> Result<RoundTotals, Failure> {
        let lost = |_| Failure::new(Code::Unreachable, "a lane was lost");
        let mut totals = RoundTotals::default();
        let (mut frames, mut data_pages) = (0, 0);
        while let Some(taken) = take(pieces, next) {
            let pieces = &self.still_due(taken, round.until)?;
            let batch = self.batch(pieces, round.instant)?;
            let bytes = batch.frame_bytes;
            if !round.last {
                self.wait(bytes)?;
            }
            data_pages += batch.data_pages;
            totals.bytes += bytes;
            frames += batch.frames;
            // Nothing to say is not an end: an empty piece of a body would be one.
            if batch.frames > 0 {
                lane.blocking_send(self.buffers.lend(batch.bytes)).map_err(lost)?;
            }
            self.bytes_sent.fetch_add(bytes, Ordering::Relaxed);
            let pages: u64 = pieces.iter().map(|(_, run)| run.pages).sum();
            let due: u64 = taken.iter().map(|(_, run)| run.pages).sum();
            totals.pages += pages;
            totals.left_out_pages += due - pages;
            self.bytes_left.fetch_sub(due * PAGE_BYTES, Ordering::Relaxed);
        }
        totals.zero_pages = totals.pages - data_pages;
        let end = RoundEnd { round: round.number, frames, last: round.last };
        lane.blocking_send(say(Message::RoundEnd(end))).map_err(lost)?;
        Ok(totals)
    }

    /// Without the pages that are dirty again: whatever is sent of them now, the next round sends them.
    fn still_due<'a>(&self, pieces: &'a [(u16, Run)], until: Option<u32>) -> Result<Cow<'a, [(u16, Run)]>, Failure> {
        let Some(until) = until else { return Ok(pieces.into()) };
        let mut due = Vec::with_capacity(pieces.len());
        for (space, run) in pieces {
            let runs = self.spaces[usize::from(*space)].before(*run, until).map_err(|e| cannot_read(&e))?;
            due.extend(runs.into_iter().map(|run| (*space, run)));
        }
        Ok(due.into())
    }

    fn batch(&self, pieces: &[(u16, Run)], instant: Option<u32>) -> Result<Load, Failure> {
        if self.over.load(Ordering::Relaxed) {
            return Err(Failure::new(Code::Cancelled, "the transfer is over"));
        }
        let zero_there: Vec<Vec<bool>> = {
            let digests = self.digests();
            let of = |(space, run): &(u16, Run)| {
                let digests = &digests[usize::from(*space)];
                (run.first..run.end()).map(|page| digests.get(page) == ZERO_LEAF).collect()
            };
            pieces.iter().map(of).collect()
        };
        let mut batch = Batch::new(self.buffers.take(), lane::begin);
        for ((space, run), zero_there) in pieces.iter().zip(&zero_there) {
            let is_zero_there = |page: u64| zero_there[(page - run.first) as usize];
            let pages = &self.spaces[usize::from(*space)];
            batch.push(*space, pages, *run, instant, is_zero_there).map_err(|e| cannot_read(&e))?;
        }
        let batch = batch.seal();
        let mut changed = Vec::new();
        {
            let mut digests = self.digests();
            for (space, page, leaf) in batch.digests() {
                let digests = &mut digests[usize::from(space)];
                changed.push(digests.get(page) != leaf);
                digests.set(page, leaf);
            }
        }
        Ok(match &self.sealer {
            None => Load::plain(batch),
            Some(sealer) => Load::sealed(sealer, batch, &changed, self.buffers.take()),
        })
    }

    /// Takes in what the target says that its base holds.
    pub fn learn(&self, told: &BaseLeaves) -> Result<(), Failure> {
        let mut digests = self.digests();
        let space = usize::try_from(told.space).ok().and_then(|space| digests.get_mut(space));
        let (leaves, rest) = told.leaves.as_chunks::<32>();
        let fits = |pages| told.first_page.checked_add(leaves.len() as u64).is_some_and(|end| end <= pages);
        match space {
            Some(space) if rest.is_empty() && fits(space.pages()) => {
                (told.first_page..).zip(leaves).for_each(|(page, leaf)| space.set(page, *leaf));
                Ok(())
            }
            _ => Err(Failure::new(Code::Protocol, "the target told digests of pages that are not there")),
        }
    }

    fn wait(&self, bytes: u64) -> Result<(), Failure> {
        let now = || self.began.elapsed().as_micros() as u64;
        let us = self.pace.lock().unwrap_or_else(PoisonError::into_inner).admit(bytes, now());
        let until = Instant::now() + Duration::from_micros(us);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            if self.over.load(Ordering::Relaxed) {
                return Err(Failure::new(Code::Cancelled, "the transfer is over"));
            }
            std::thread::sleep(left.min(SLEEP_MAX));
        }
    }
}

/// The next pieces that nobody has taken: few pages together, and one piece at least.
fn take<'a>(pieces: &'a [(u16, Run)], next: &AtomicUsize) -> Option<&'a [(u16, Run)]> {
    let grown = |first: usize| {
        let mut pages = 0;
        let more = pieces.get(first..)?.iter().take_while(|(_, run)| {
            pages += run.pages;
            pages <= PIECE_PAGES
        });
        Some(first + more.count().max(1))
    };
    let first = next
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |first| grown(first).filter(|end| *end <= pieces.len()))
        .ok()?;
    // The same sum as in the update that succeeded.
    grown(first).map(|end| &pieces[first..end])
}

/// Runs on a thread that may block.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Failure::new(Code::Internal, e))
}

fn cannot_read(error: &PagesError) -> Failure {
    Failure::new(Code::Internal, words(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_taken_once_and_small_ones_together() {
        let piece = |first, pages| (0, Run { first, pages });
        let pieces = [piece(0, 64), piece(64, 1), piece(70, 60), piece(200, 4), piece(300, 64)];
        let next = AtomicUsize::new(0);
        let taken: Vec<usize> = std::iter::from_fn(|| take(&pieces, &next)).map(<[_]>::len).collect();
        assert_eq!(taken, [1, 2, 1, 1]);
        assert!(take(&[], &AtomicUsize::new(0)).is_none());
    }
}

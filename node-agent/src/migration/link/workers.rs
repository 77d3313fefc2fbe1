//! Threads that put the pages of a round on the lanes: read, hash, queue.
//!
//! The round's runs are cut into pieces of 1 MiB in a list; each lane has a thread that takes the next piece when its
//! queue has room, so a slow lane takes fewer. When the list is empty each thread queues the `RoundEnd` of its lane.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use proto::frame::Encoding;
use proto::status::Code;
use proto::v1::{Chunk, RoundEnd};
use tokio::sync::mpsc;
use vmcb_engine::memory::PAGE_BYTES;
use vmcb_engine::memory::digest::{PageDigests, ZERO_LEAF};
use vmcb_engine::memory::shared::{PagesError, Run};
use vmcb_engine::transfer::runs;

use super::pace::Pace;
use super::{chunk, words};
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
    pub last: bool,
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
    pub async fn send(self: Arc<Self>, round: Round, lanes: Vec<mpsc::Sender<Chunk>>) -> Result<RoundTotals, Failure> {
        let this = Arc::clone(&self);
        let pieces = Arc::new(blocking(move || this.pieces(round.since)).await??);
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

    fn pieces(&self, since: u32) -> Result<Vec<(u16, Run)>, Failure> {
        let mut pieces = Vec::new();
        for (number, space) in (0..).zip(self.spaces.iter()) {
            let mut runs = space.since(since).map_err(|e| cannot_read(&e))?;
            if since == 0 {
                // Everything, and the target has zeros: holes need not be looked at.
                let filled: Result<Vec<_>, _> = runs.into_iter().map(|run| space.filled(run)).collect();
                runs = filled.map_err(|e| cannot_read(&e))?.concat();
            }
            pieces.extend(runs.into_iter().flat_map(runs::pieces).map(|run| (number, run)));
        }
        self.bytes_left.store(pieces.iter().map(|(_, run)| run.pages * PAGE_BYTES).sum(), Ordering::Relaxed);
        Ok(pieces)
    }

    fn send_on(
        &self,
        lane: &mpsc::Sender<Chunk>,
        round: Round,
        pieces: &[(u16, Run)],
        next: &AtomicUsize,
    ) -> Result<RoundTotals, Failure> {
        let lost = |_| Failure::new(Code::Unreachable, "a lane was lost");
        let mut totals = RoundTotals::default();
        let (mut frames, mut data_pages) = (0, 0);
        while let Some((space, run)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            for frame in self.frames(*space, *run)? {
                let bytes = frame.bytes.len() as u64;
                if !round.last {
                    self.wait(bytes)?;
                }
                if frame.run.encoding == Encoding::Raw {
                    data_pages += u64::from(frame.run.pages);
                }
                totals.bytes += bytes;
                frames += 1;
                lane.blocking_send(Chunk { frame: frame.bytes.into() }).map_err(lost)?;
                self.bytes_sent.fetch_add(bytes, Ordering::Relaxed);
            }
            totals.pages += run.pages;
            self.bytes_left.fetch_sub(run.pages * PAGE_BYTES, Ordering::Relaxed);
        }
        totals.zero_pages = totals.pages - data_pages;
        let end = RoundEnd { round: round.number, frames, last: round.last };
        lane.blocking_send(chunk(Message::RoundEnd(end))).map_err(lost)?;
        Ok(totals)
    }

    fn frames(&self, space: u16, run: Run) -> Result<Vec<runs::PageFrame>, Failure> {
        if self.over.load(Ordering::Relaxed) {
            return Err(Failure::new(Code::Cancelled, "the transfer is over"));
        }
        let at = usize::from(space);
        let zero_there: Vec<bool> = {
            let digests = self.digests();
            (run.first..run.end()).map(|page| digests[at].get(page) == ZERO_LEAF).collect()
        };
        let is_zero_there = |page: u64| zero_there[(page - run.first) as usize];
        let frames = runs::frames(space, &self.spaces[at], run, is_zero_there).map_err(|e| cannot_read(&e))?;
        let mut digests = self.digests();
        for (page, leaf) in frames.iter().flat_map(runs::PageFrame::digests) {
            digests[at].set(page, leaf);
        }
        Ok(frames)
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

/// Runs on a thread that may block.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Failure::new(Code::Internal, e))
}

fn cannot_read(error: &PagesError) -> Failure {
    Failure::new(Code::Internal, words(error))
}

//! Whether a guest whose pages are missing may go on, and for which of them it waits.
//!
//! A thread that sleeps on a missing page cannot look at its lease or hear that it is to pause. So who places pages
//! looks for it: nothing is placed while the lease has ended or a pause was promised, under one lock with the promise.
//! A guest that has waited for longer than a moment is *stalled*: then nobody waits for an answer of its thread.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::clock::{Clock, HostClock};

/// A guest that waits for longer than this is stalled.
const STALL: Duration = Duration::from_secs(1);

/// Nobody runs it yet.
const NOT_RUNNING: u64 = u64::MAX;
/// A lease that ended long ago.
const ENDED: u64 = 1;

/// Everything under the lock.
#[derive(Debug)]
struct Inner {
    lease_until_ns: u64,
    held: bool,
    waiting: BTreeMap<u64, Instant>,
}

/// One guest's standing.
#[derive(Debug)]
pub struct Standing {
    inner: Mutex<Inner>,
    stalled: watch::Sender<Option<u64>>,
}

impl Default for Standing {
    fn default() -> Standing {
        let inner = Inner { lease_until_ns: NOT_RUNNING, held: false, waiting: BTreeMap::new() };
        Standing { inner: Mutex::new(inner), stalled: watch::Sender::new(None) }
    }
}

impl Standing {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It was found running by an agent that does not know its lease.
    pub fn found(&self, paused: bool) {
        let mut inner = self.lock();
        inner.lease_until_ns = ENDED;
        inner.held = paused;
    }

    /// Its lease, an instant of `CLOCK_BOOTTIME`; 0: no limit.
    pub fn lease(&self, until_ns: u64) {
        self.lock().lease_until_ns = until_ns;
    }

    /// Promises that it stands still, which it does anyway if it is stalled; says whether it is.
    pub fn hold(&self) -> bool {
        let mut inner = self.lock();
        let stalled = self.stalled.borrow().is_some() && !inner.waiting.is_empty();
        inner.held |= stalled;
        stalled
    }

    /// It may go on.
    pub fn release(&self) {
        self.lock().held = false;
    }

    /// Does `place` if the guest may go on; `None` if it may not now. Those of `pages` for which it waited are here then.
    pub fn placing<T>(&self, pages: std::ops::Range<u64>, place: impl FnOnce() -> T) -> Option<T> {
        let mut inner = self.lock();
        let leased = matches!(inner.lease_until_ns, 0 | NOT_RUNNING) || HostClock.boottime_ns() <= inner.lease_until_ns;
        if inner.held || !leased {
            return None;
        }
        let done = place();
        inner.waiting.retain(|page, _| !pages.contains(page));
        self.note(&inner);
        Some(done)
    }

    /// The guest waits for this page.
    pub fn waits(&self, page: u64) {
        self.lock().waiting.entry(page).or_insert_with(Instant::now);
    }

    /// It waits for nothing.
    pub fn over(&self) {
        let mut inner = self.lock();
        inner.waiting.clear();
        self.note(&inner);
    }

    /// The pages for which it waits.
    pub fn waiting(&self) -> Vec<u64> {
        self.lock().waiting.keys().copied().collect()
    }

    /// For how long it has waited; zero: it does not.
    pub fn waiting_for(&self) -> Duration {
        self.lock().waiting.values().min().map_or(Duration::ZERO, Instant::elapsed)
    }

    /// Looks whether it has become stalled. To be called now and then.
    pub fn look(&self) {
        let inner = self.lock();
        self.note(&inner);
    }

    fn note(&self, inner: &Inner) {
        let oldest = inner.waiting.iter().min_by_key(|(_, since)| **since);
        let stalled = oldest.filter(|(_, since)| since.elapsed() > STALL).map(|(page, _)| *page);
        self.stalled.send_if_modified(|now| std::mem::replace(now, stalled) != stalled);
    }

    /// The page for which it is stalled.
    pub fn stalled(&self) -> Option<u64> {
        *self.stalled.borrow()
    }

    /// Waits until it is stalled.
    pub async fn until_stalled(&self) -> u64 {
        let mut stalled = self.stalled.subscribe();
        loop {
            if let Some(page) = *stalled.borrow_and_update() {
                return page;
            }
            if stalled.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_placed_without_a_lease_or_against_a_promise() {
        let standing = Standing::default();
        assert_eq!(standing.placing(0..1, || 1), Some(1), "nobody runs it yet");
        standing.lease(HostClock.boottime_ns() + 3_600_000_000_000);
        assert_eq!(standing.placing(0..1, || 2), Some(2));
        standing.lease(ENDED);
        assert_eq!(standing.placing(0..1, || 3), None);
        standing.lease(0);
        standing.waits(7);
        assert!(!standing.hold(), "it has not waited for long: it hears a pause itself");
        standing.lock().waiting.insert(7, Instant::now().checked_sub(STALL * 2).unwrap());
        standing.look();
        assert_eq!(standing.stalled(), Some(7));
        assert!(standing.hold());
        assert_eq!(standing.placing(0..8, || 4), None);
        standing.release();
        assert_eq!(standing.placing(0..8, || 5), Some(5));
        assert_eq!((standing.stalled(), standing.waiting_for()), (None, Duration::ZERO));
    }

    #[test]
    fn who_is_found_waits_for_the_next_word_of_the_controller() {
        let standing = Standing::default();
        standing.found(false);
        assert_eq!(standing.placing(0..1, || 1), None);
        standing.lease(0);
        assert_eq!(standing.placing(0..1, || 1), Some(1));
        standing.found(true);
        standing.lease(0);
        assert_eq!(standing.placing(0..1, || 1), None, "an operator paused it");
    }
}

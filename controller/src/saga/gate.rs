//! How many checkpoints are taken at once: a gate with a number of places for the cluster and one for each host.
//!
//! Whoever finds no place waits in line; a place that is left goes to the first in line whom it fits, so that a full host
//! holds up nobody else. A place is left, and a place in line given up, by dropping it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// How many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// In the cluster.
    pub cluster: usize,
    /// On one host.
    pub host: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { cluster: 4, host: 2 }
    }
}

impl Limits {
    /// Why one more on a host must wait, if it must.
    pub fn full(self, busy: &BTreeMap<String, usize>, host: &str) -> Option<String> {
        let (all, here) = (busy.values().sum::<usize>(), busy.get(host).copied().unwrap_or(0));
        let are = |count: usize| if count == 1 { "1 checkpoint is".into() } else { format!("{count} checkpoints are") };
        if here >= self.host {
            return Some(format!("{} under way on {host}", are(here)));
        }
        (all >= self.cluster).then(|| format!("{} under way", are(all)))
    }
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    host: String,
    told: oneshot::Sender<()>,
}

#[derive(Debug)]
struct Line {
    limits: Limits,
    busy: BTreeMap<String, usize>,
    waiting: VecDeque<Waiting>,
    next: u64,
}

impl Line {
    fn take(&mut self, host: &str) {
        *self.busy.entry(host.into()).or_default() += 1;
    }

    fn leave(&mut self, host: &str) {
        if let Some(count) = self.busy.get_mut(host) {
            *count -= 1;
            if *count == 0 {
                self.busy.remove(host);
            }
        }
        self.admit();
    }

    /// Lets in whoever fits, the first in line first.
    fn admit(&mut self) {
        let mut at = 0;
        while at < self.waiting.len() {
            if self.limits.full(&self.busy, &self.waiting[at].host).is_some() {
                at += 1;
                continue;
            }
            let Some(Waiting { host, told, .. }) = self.waiting.remove(at) else { return };
            // One that does not listen any more takes no place.
            if told.send(()).is_ok() {
                self.take(&host);
            }
        }
    }
}

/// The gate; clones are the same.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Mutex<Line>>);

/// A place; left when it is dropped.
#[derive(Debug)]
pub struct Place {
    gate: Gate,
    host: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.gate.line().leave(&self.host);
    }
}

/// A place in line, until it is let in or given up.
struct InLine<'a> {
    gate: &'a Gate,
    number: u64,
    host: &'a str,
    told: oneshot::Receiver<()>,
    inside: bool,
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        if self.inside {
            return;
        }
        let mut line = self.gate.line();
        let before = line.waiting.len();
        line.waiting.retain(|waiting| waiting.number != self.number);
        // Told a moment ago, and gone before it went in: the place is free again.
        if line.waiting.len() == before && self.told.try_recv().is_ok() {
            line.leave(self.host);
        }
    }
}

impl Gate {
    /// With so many places.
    pub fn new(limits: Limits) -> Gate {
        Gate(Arc::new(Mutex::new(Line { limits, busy: BTreeMap::new(), waiting: VecDeque::new(), next: 0 })))
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of places from now on.
    pub fn limit(&self, limits: Limits) {
        let mut line = self.line();
        line.limits = limits;
        line.admit();
    }

    /// The number of places.
    pub fn limits(&self) -> Limits {
        self.line().limits
    }

    /// Waits for a place for a checkpoint of a guest on this host; says why, if it must.
    pub async fn enter(&self, host: &str, note: impl FnOnce(&str)) -> Place {
        let mut in_line = {
            let mut line = self.line();
            let Some(why) = line.limits.full(&line.busy, host) else {
                line.take(host);
                return Place { gate: self.clone(), host: host.into() };
            };
            let (tell, told) = oneshot::channel();
            let number = line.next;
            line.next += 1;
            line.waiting.push_back(Waiting { number, host: host.into(), told: tell });
            drop(line);
            note(&why);
            InLine { gate: self, number, host, told, inside: false }
        };
        // The sender is dropped by nobody but the one who admits.
        let _ = (&mut in_line.told).await;
        in_line.inside = true;
        Place { gate: self.clone(), host: host.into() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn twenty_at_once_are_four_at_a_time_and_two_on_a_host_and_all_get_through() {
        let gate = Gate::new(Limits::default());
        let (busy, noted) = (Arc::new(Mutex::new(BTreeMap::<String, usize>::new())), Arc::new(AtomicUsize::new(0)));
        let one = |number: usize| {
            let (gate, busy, noted) = (gate.clone(), busy.clone(), noted.clone());
            async move {
                let host = format!("host{}", number % 3);
                let place = gate.enter(&host, |_| _ = noted.fetch_add(1, Ordering::SeqCst)).await;
                {
                    let mut busy = busy.lock().unwrap();
                    *busy.entry(host.clone()).or_default() += 1;
                    assert!(busy[&host] <= 2 && busy.values().sum::<usize>() <= 4, "{busy:?}");
                }
                for _ in 0..5 {
                    tokio::task::yield_now().await;
                }
                *busy.lock().unwrap().get_mut(&host).unwrap() -= 1;
                drop(place);
            }
        };
        let mut all = tokio::task::JoinSet::new();
        (0..20).for_each(|number| drop(all.spawn(one(number))));
        while let Some(done) = all.join_next().await {
            done.unwrap();
        }
        assert_eq!(noted.load(Ordering::SeqCst), 16);
        assert!(gate.line().busy.is_empty() && gate.line().waiting.is_empty());
    }

    #[tokio::test]
    async fn a_full_host_holds_up_nobody_else_and_who_gives_up_leaves_no_hole() {
        let gate = Gate::new(Limits { cluster: 3, host: 1 });
        let first = gate.enter("hostA", |_| panic!("there is room")).await;
        let mut why = String::new();
        let mut waiting = Box::pin(gate.enter("hostA", |text| why = text.into()));
        assert!(futures_poll(&mut waiting).await.is_none());
        let other = gate.enter("hostB", |_| panic!("there is room on hostB")).await;
        // Told and gone in the same moment.
        drop(first);
        drop(waiting);
        assert_eq!(why, "1 checkpoint is under way on hostA");
        let again = gate.enter("hostA", |_| panic!("the place was lost")).await;
        drop((again, other));
        assert!(gate.line().busy.is_empty());
    }

    /// One look at a future.
    async fn futures_poll<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        std::future::poll_fn(|context| match future.as_mut().poll(context) {
            std::task::Poll::Ready(value) => std::task::Poll::Ready(Some(value)),
            std::task::Poll::Pending => std::task::Poll::Ready(None),
        })
        .await
    }

    #[tokio::test]
    async fn more_places_let_in_who_waits() {
        let gate = Gate::new(Limits { cluster: 1, host: 1 });
        let first = gate.enter("hostA", |_| ()).await;
        let mut waiting = Box::pin(gate.enter("hostB", |_| ()));
        assert!(futures_poll(&mut waiting).await.is_none());
        gate.limit(Limits { cluster: 2, host: 1 });
        drop(waiting.await);
        drop(first);
    }
}

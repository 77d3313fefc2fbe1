//! Checkpoints by the clock: the loop that looks, and carries out what the book decides.
//!
//! ```text
//!   ledger, hosts -> facts (pure) -> book (pure, what is due: due) -> actions
//!   Begin: the checkpoint saga      Prune: retention's plan, then the removal saga, one at a time
//!   BackOff, Missed, Recovered: a record in the ledger, said once
//! ```
//! It keeps nothing that the ledger does not: a controller that starts again goes on from the newest checkpoints' times.
//! An operator goes first: what the schedule has begun makes way ([`Schedule::make_way`]). Nothing here reads a
//! clock but through [`Clock`].

pub mod book;
pub mod due;
pub mod facts;
pub mod sweeping;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::v1::CheckpointsKept;
use tokio_util::sync::CancellationToken;

use self::book::{Action, Book, Standing};
use self::due::Now;
use self::facts::{Observe, busy, gather};
use crate::api::plans;
use crate::failure::Failure;
use crate::ledger::Ledger;
use crate::ledger::event::{CheckpointEntry, Event, Task};
use crate::ledger::state::{State, checkpoint_lock};
use crate::retention::period::Zone;
use crate::retention::{self, Decision, Item, policy};
use crate::saga::Sagas;
use crate::saga::world::World;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// How long an operator's operation waits for the schedule to make way.
const WAY: Duration = Duration::from_secs(30);

/// Both clocks.
pub trait Clock: Send + Sync {
    /// One instant on both.
    fn now(&self) -> Now;
}

/// The machine's clocks.
pub struct SystemClock {
    began: std::time::Instant,
}

impl Default for SystemClock {
    fn default() -> SystemClock {
        SystemClock { began: std::time::Instant::now() }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Now {
        Now {
            mono_ms: i64::try_from(self.began.elapsed().as_millis()).unwrap_or(i64::MAX),
            wall_ms: i64::try_from(crate::ledger::unix_ms()).unwrap_or(i64::MAX),
        }
    }
}

struct Inner<W> {
    ledger: Ledger,
    sagas: Sagas<W>,
    observe: Observe,
    clock: Box<dyn Clock>,
    /// In whose name it begins operations.
    actor: String,
    book: Mutex<Book>,
    /// Whoever prunes: one at a time in the cluster.
    pruning: tokio::sync::Mutex<()>,
}

/// The schedule; clones are the same.
pub struct Schedule<W> {
    inner: Arc<Inner<W>>,
}

impl<W> Clone for Schedule<W> {
    fn clone(&self) -> Self {
        Schedule { inner: self.inner.clone() }
    }
}

/// The checkpoints of a VM as retention sees them, in the order in which they were made, with what is decided.
pub fn decide(state: &State, vm: &str, vm_id: &str) -> Vec<(Arc<CheckpointEntry>, Decision)> {
    let policy = state.policies.get(vm).map(|scheduled| scheduled.policy.clone());
    let (keep, zone) = match &policy {
        Some(policy) => (policy::keep(policy), policy::zone(policy)),
        None => (CheckpointsKept::default(), Zone::UTC),
    };
    let entries: Vec<Arc<CheckpointEntry>> = state.checkpoints_of(vm_id).into_iter().cloned().collect();
    let items: Vec<Item> = entries.iter().map(|entry| item(state, entry)).collect();
    entries.into_iter().zip(retention::plan(&items, &keep, &zone)).collect()
}

/// A checkpoint as retention sees it.
pub fn item(state: &State, entry: &CheckpointEntry) -> Item {
    Item {
        id: entry.id.clone(),
        unix_ms: entry.created_unix_ms,
        pinned: !entry.by_policy,
        held: state.lock_holder(&checkpoint_lock(&entry.id)).is_some() || state.fed_by(&entry.id).is_some(),
        sound: !entry.verified.starts_with("damaged"),
    }
}

impl<W: World> Schedule<W> {
    /// Over these operations; `observe` says what hosts report.
    pub fn new(
        ledger: Ledger,
        sagas: Sagas<W>,
        observe: Observe,
        clock: impl Clock + 'static,
        actor: String,
    ) -> Schedule<W> {
        let (clock, book, pruning) = (Box::new(clock), Mutex::default(), tokio::sync::Mutex::default());
        Schedule { inner: Arc::new(Inner { ledger, sagas, observe, clock, actor, book, pruning }) }
    }

    /// Looks and acts until shutdown. What has begun goes on by itself.
    pub async fn run(self, shutdown: CancellationToken) {
        loop {
            self.turn(&shutdown).await;
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// One look, and what follows from it.
    async fn turn(&self, shutdown: &CancellationToken) {
        let actions = self.look();
        for action in actions {
            if shutdown.is_cancelled() {
                return;
            }
            if let Err(failure) = self.act(action, shutdown).await {
                // The next look decides again.
                tracing::debug!(%failure, "not now");
            }
        }
    }

    fn look(&self) -> Vec<Action> {
        let Inner { ledger, sagas, observe, clock, book, .. } = &*self.inner;
        let state = ledger.state();
        let (facts, busy, limits) = (gather(&state, observe), busy(&state), sagas.gate().limits());
        book.lock().unwrap_or_else(PoisonError::into_inner).look(&facts, &busy, limits, clock.now())
    }

    async fn act(&self, action: Action, shutdown: &CancellationToken) -> Result<(), Failure> {
        let Inner { ledger, sagas, actor, .. } = &*self.inner;
        let event = match action {
            Action::Begin { vm } => {
                let plan = plans::checkpoint(&ledger.state(), &vm, true)?;
                return sagas.begin(actor, plan).await.map(drop);
            }
            Action::Prune { vm } => {
                let (schedule, shutdown) = (self.clone(), shutdown.clone());
                tokio::spawn(async move {
                    let pruned = tokio::select! {
                        () = shutdown.cancelled() => return,
                        pruned = schedule.prune(&schedule.inner.actor, &vm) => pruned,
                    };
                    match pruned {
                        Ok(0) => {}
                        Ok(count) => tracing::info!(vm, count, "checkpoints removed by policy"),
                        Err(failure) => tracing::warn!(vm, %failure, "not pruned; the next checkpoint tries again"),
                    }
                });
                return Ok(());
            }
            Action::BackOff { vm, operation, failures, wait_ms, reason } => {
                tracing::warn!(vm, failures, wait_ms, reason, "a checkpoint by policy failed");
                Event::PolicyBackedOff { vm, operation, failures, wait_ms, reason }
            }
            Action::Missed { vm, age_ms } => {
                tracing::warn!(vm, age_ms, "the newest checkpoint is too old");
                Event::PolicyMissed { vm, age_ms }
            }
            Action::Recovered { vm, age_ms } => Event::PolicyRecovered { vm, age_ms },
        };
        Ok(ledger.append(actor, event).await.map(drop)?)
    }

    /// Removes what a VM's policy does not keep, oldest first, one after the other; how many. What is removed is decided
    /// anew before each.
    ///
    /// # Errors
    /// [`Code::Conflict`] if something else holds the VM's packs; what a removal failed with.
    pub async fn prune(&self, actor: &str, vm: &str) -> Result<u32, Failure> {
        let Inner { ledger, pruning, .. } = &*self.inner;
        let _alone = pruning.lock().await;
        let mut count = 0;
        loop {
            let state = ledger.state();
            let Some(found) = state.vms.get(vm) else { return Ok(count) };
            let decisions = decide(&state, vm, &found.id);
            let Some((entry, _)) = decisions.into_iter().find(|(_, decision)| decision.keep.is_none()) else {
                return Ok(count);
            };
            let task = Task::RemoveCheckpoint { checkpoint: entry.id.clone(), generation: entry.generation };
            let plan = plans::on_checkpoint(&state, &entry.id, |_| task)?;
            self.to_the_end(actor, plan).await?;
            count += 1;
        }
    }

    /// How a VM stands, if it has a policy and was looked at.
    pub fn standing(&self, vm: &str) -> Option<Standing> {
        self.inner.book.lock().unwrap_or_else(PoisonError::into_inner).standing(vm).cloned()
    }

    /// An operator wants these locks: checkpoints that the schedule has begun are cancelled, removals waited for.
    pub async fn make_way(&self, locks: &[String]) {
        let Inner { ledger, sagas, actor, .. } = &*self.inner;
        let mut states = ledger.watch();
        let way = async {
            loop {
                let state = states.borrow_and_update().clone();
                let held = locks.iter().filter_map(|lock| state.lock_holder(lock));
                let ours: Vec<_> = held
                    .filter(|operation| operation.actor == *actor)
                    .filter(|o| {
                        matches!(
                            o.plan.task,
                            Task::Checkpoint { .. }
                                | Task::RemoveCheckpoint { .. }
                                | Task::Sweep { .. }
                                | Task::Sample { .. }
                        )
                    })
                    .collect();
                if ours.is_empty() {
                    return;
                }
                for operation in ours {
                    if !matches!(operation.plan.task, Task::RemoveCheckpoint { .. }) && operation.failure.is_none() {
                        // It may have passed its commit; then it ends in a moment.
                        let _ = sagas.cancel(actor, &operation.id).await;
                    }
                }
                if states.changed().await.is_err() {
                    return;
                }
            }
        };
        // Whoever is still in the way then is named by the refusal.
        let _ = tokio::time::timeout(WAY, way).await;
    }
}

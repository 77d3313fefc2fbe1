//! Operations as sagas: steps with a way back, a log in the ledger, and one record that is the point of no return.
//!
//! [`table`] says what may follow what; [`steps`] says what the steps are; this file drives: look at the ledger, take
//! one turn, append what happened, look again. It keeps no status of its own, so a controller that was killed anywhere
//! goes on by looking: what is committed goes forward, everything else is undone. A step after the commit that cannot
//! be done in time, and a step that cannot be undone because a host is silent, are left to the verdicts that the host
//! hears when it comes back.

#[cfg(test)]
pub(crate) mod fake;
pub mod gate;
pub mod hosts;
pub mod report;
pub mod steps;
pub mod table;
#[cfg(test)]
mod tests;
pub mod voice;
pub mod world;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::ids::OperationId;
use proto::status::Code;
use proto::v1::VmRecord;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use self::gate::{Gate, Limits};
use self::steps::{Hands, Memory};
use self::table::Status;
use self::voice::{Voice, Voices};
use self::world::World;
use crate::failure::Failure;
use crate::ledger::event::{Event, Plan, Task};
use crate::ledger::state::Operation;
use crate::ledger::{Ledger, LedgerError};

/// How often a call is repeated before something else is done.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Attempts to take a step back before it is left to the verdicts.
    pub undo: u32,
    /// Attempts to go forward after a commit.
    pub forward: u32,
    /// Time between attempts.
    pub pause: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { undo: 3, forward: 20, pause: Duration::from_secs(1) }
    }
}

/// Looks up how a VM is shown to people.
pub type ShowVm = Arc<dyn Fn(&str) -> Option<VmRecord> + Send + Sync>;

struct Inner<W> {
    ledger: Ledger,
    world: W,
    voices: Voices,
    patience: Patience,
    /// Who appends what nobody asked for.
    actor: String,
    show: ShowVm,
    gate: Gate,
    cancels: Mutex<HashMap<String, CancellationToken>>,
}

/// All operations; clones are the same.
pub struct Sagas<W> {
    inner: Arc<Inner<W>>,
}

impl<W> Clone for Sagas<W> {
    fn clone(&self) -> Self {
        Sagas { inner: self.inner.clone() }
    }
}

impl<W: World> Sagas<W> {
    /// Over this world. `actor` is this controller's identity.
    pub fn new(ledger: Ledger, world: W, patience: Patience, actor: String, show: ShowVm) -> Sagas<W> {
        let (voices, gate, cancels) = (Voices::default(), Gate::new(Limits::default()), Mutex::default());
        let inner = Inner { ledger, world, voices, patience, actor, show, gate, cancels };
        Sagas { inner: Arc::new(inner) }
    }

    /// The world.
    pub fn world(&self) -> &W {
        &self.inner.world
    }

    /// How many checkpoints are taken at once.
    pub fn gate(&self) -> &Gate {
        &self.inner.gate
    }

    /// Begins an operation: reserves its locks and generation in the ledger, then drives it beside the caller.
    ///
    /// # Errors
    /// [`Code::Conflict`] if another operation holds what it needs; the ledger's.
    pub async fn begin(&self, actor: &str, plan: Plan) -> Result<Voice, Failure> {
        let id = OperationId(crate::entropy::bytes()).to_string();
        let event = Event::OperationBegan { operation: id.clone(), plan: Box::new(plan) };
        self.inner.ledger.append(actor, event).await?;
        Ok(self.spawn(&id))
    }

    /// Takes up every operation that a controller before this one left. Call once, at start.
    ///
    /// # Errors
    /// The ledger's.
    pub async fn recover(&self) -> Result<(), LedgerError> {
        let left: Vec<Arc<Operation>> = self.inner.ledger.state().active().cloned().collect();
        for operation in left {
            tracing::warn!(operation = operation.id, task = operation.plan.task.label(), "taken up after a restart");
            let event = Event::Interrupted { operation: operation.id.clone() };
            self.inner.ledger.append(&self.inner.actor, event).await?;
            self.spawn(&operation.id);
        }
        Ok(())
    }

    /// Takes an operation back, if it is not committed.
    ///
    /// # Errors
    /// [`Code::Conflict`] if it is; [`Code::NotFound`].
    pub async fn cancel(&self, actor: &str, id: &str) -> Result<(), Failure> {
        self.inner.ledger.append(actor, Event::Cancelled { operation: id.into() }).await?;
        let cancels = self.inner.cancels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(token) = cancels.get(id) {
            token.cancel();
        }
        Ok(())
    }

    /// What an operation says; of one that ended before a restart, how it ended.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub fn voice(&self, id: &str) -> Result<Voice, Failure> {
        let known = self.inner.voices.knows(id);
        let operation = self.inner.ledger.state().operations.get(id).cloned();
        let voice = match &operation {
            None if !known => {
                return Err(Failure::new(Code::NotFound, format!("there is no operation {id}"))
                    .hint("only operations that are under way or ended lately can be followed"));
            }
            _ => self.inner.voices.of(id),
        };
        if let Some(operation) = operation.filter(|operation| operation.status.ended() && !known) {
            voice.end(self.inner.last_word(&operation, &Memory::default(), &voice));
        }
        Ok(voice)
    }

    fn spawn(&self, id: &str) -> Voice {
        let (voice, token) = (self.inner.voices.of(id), CancellationToken::new());
        let mut cancels = self.inner.cancels.lock().unwrap_or_else(PoisonError::into_inner);
        cancels.insert(id.into(), token.clone());
        drop(cancels);
        let drive =
            Drive { inner: self.inner.clone(), id: id.into(), voice: voice.clone(), memory: Memory::default(), token };
        let span = match self.inner.ledger.state().operations.get(id) {
            Some(operation) => {
                tracing::info_span!("operation", id, vm = operation.plan.vm, task = operation.plan.task.label())
            }
            None => tracing::info_span!("operation", id),
        };
        tokio::spawn(drive.run().instrument(span));
        voice
    }
}

impl<W: World> Inner<W> {
    fn last_word(&self, operation: &Operation, memory: &Memory, voice: &Voice) -> proto::v1::operation_event::Event {
        let state = self.ledger.state();
        report::last_word(&state, operation, memory, &voice.transfers(), (self.show)(&operation.plan.vm))
    }
}

/// One operation being driven.
struct Drive<W> {
    inner: Arc<Inner<W>>,
    id: String,
    voice: Voice,
    memory: Memory,
    token: CancellationToken,
}

impl<W: World> Drive<W> {
    async fn run(mut self) {
        let began = Instant::now();
        while let Some(operation) = self.operation().filter(|operation| !operation.status.ended()) {
            if let Err(error) = self.turn(&operation).await {
                // The store failed. Nobody knows whether the record is there: only a restart, which reads it, may
                // decide.
                tracing::error!(%error, "the operation stands still until the controller is restarted");
                let failed = report::failed(&Failure::from(error), "the operation stands still");
                self.voice.end(failed);
                return;
            }
        }
        self.inner.cancels.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
        let Some(operation) = self.operation() else { return };
        report::measure(&operation, &self.memory, began.elapsed());
        let last = self.inner.last_word(&operation, &self.memory, &self.voice);
        tracing::info!(status = ?operation.status, failure = operation.failure.as_ref().map(|f| &f.message), "ended");
        self.voice.end(last);
    }

    fn operation(&self) -> Option<Arc<Operation>> {
        self.inner.ledger.state().operations.get(&self.id).cloned()
    }

    /// One step forward or back, and its record.
    async fn turn(&mut self, operation: &Operation) -> Result<(), LedgerError> {
        let shape = operation.plan.task.shape();
        let id = self.id.clone();
        let event = match operation.status {
            Status::Doing(step) if step == shape.commit => {
                self.voice.step(shape.steps[step]);
                match self.hands(operation).outcome(&self.memory) {
                    Ok(result) => Event::Committed { operation: id, result: Box::new(result) },
                    Err(failure) => Event::StepFailed { operation: id, step, failure },
                }
            }
            Status::Doing(step) if step < shape.commit => match self.attempt(operation, step).await {
                None => return Ok(()),
                Some(Ok(())) => Event::StepDone { operation: id, step },
                Some(Err(failure)) => Event::StepFailed { operation: id, step, failure },
            },
            Status::Doing(step) => match self.insist(operation, step).await {
                Ok(()) => Event::StepDone { operation: id, step },
                Err(failure) => Event::GaveUp { operation: id, step, failure },
            },
            Status::Undoing(step) => {
                self.undo(operation, step).await;
                Event::StepUndone { operation: id, step }
            }
            Status::Done | Status::Undone | Status::Left(_) => return Ok(()),
        };
        self.append(operation, event).await
    }

    async fn append(&self, before: &Operation, event: Event) -> Result<(), LedgerError> {
        match self.inner.ledger.append(&self.inner.actor, event).await {
            Ok(_) => Ok(()),
            Err(LedgerError::Refused(refusal)) => {
                let moved = self.operation().is_none_or(|now| now.status != before.status);
                match before.status {
                    // A cancel was faster; the next look at the ledger sees it.
                    _ if moved => Ok(()),
                    Status::Doing(step) if step <= before.plan.task.shape().commit => {
                        let failure = Failure::from(LedgerError::Refused(refusal));
                        let event = Event::StepFailed { operation: self.id.clone(), step, failure };
                        self.inner.ledger.append(&self.inner.actor, event).await.map(drop)
                    }
                    _ => Err(LedgerError::Refused(refusal)),
                }
            }
            Err(other) => Err(other),
        }
    }

    fn hands<'a>(&'a self, operation: &'a Operation) -> Hands<'a, W> {
        let Inner { world, ledger, gate, .. } = &*self.inner;
        Hands { world, ledger, operation, voice: &self.voice, gate }
    }

    /// A step before the commit: once, and no longer than nobody cancels. `None` if somebody did.
    async fn attempt(&mut self, operation: &Operation, step: usize) -> Option<Result<(), Failure>> {
        let name = operation.plan.task.shape().steps[step];
        self.voice.step(name);
        let mut memory = std::mem::take(&mut self.memory);
        let hands = self.hands(operation);
        let result = tokio::select! {
            biased;
            () = self.token.cancelled() => None,
            result = hands.perform(name, &mut memory) => Some(result),
        };
        self.memory = memory;
        result
    }

    /// A step after the commit: again and again, because there is no way back.
    async fn insist(&mut self, operation: &Operation, step: usize) -> Result<(), Failure> {
        let name = operation.plan.task.shape().steps[step];
        self.voice.step(name);
        let mut memory = std::mem::take(&mut self.memory);
        let Patience { undo, forward, pause } = self.inner.patience;
        let spare = leaves_to_verdicts(&operation.plan.task, name);
        let mut attempts = 0;
        let result = loop {
            match self.hands(operation).perform(name, &mut memory).await {
                Ok(()) => break Ok(()),
                Err(failure) => {
                    attempts += 1;
                    let most = if spare || !failure.passes() { undo } else { forward };
                    self.voice.note(format!("{name}: {failure}"));
                    if attempts >= most {
                        break if spare { Ok(()) } else { Err(failure) };
                    }
                    tokio::time::sleep(pause).await;
                }
            }
        };
        self.memory = memory;
        result
    }

    async fn undo(&self, operation: &Operation, step: usize) {
        let name = operation.plan.task.shape().steps[step];
        let Patience { undo, pause, .. } = self.inner.patience;
        for attempt in 1..=undo {
            match self.hands(operation).undo(name).await {
                Ok(()) => return,
                // What is not there need not be taken back.
                Err(failure) if failure.code == Code::NotFound => return,
                Err(failure) => self.voice.note(format!("taking back {name}: {failure}")),
            }
            if attempt < undo {
                tokio::time::sleep(pause).await;
            }
        }
        self.voice.note(format!("{name} is taken back when the host is heard again"));
    }
}

/// Steps whose work the verdicts do anyway when the host comes back, so that the operation is done without them.
fn leaves_to_verdicts(task: &Task, step: &str) -> bool {
    matches!((task, step), (Task::Migrate { .. } | Task::Restore { .. }, "release") | (Task::Remove, "discard"))
}

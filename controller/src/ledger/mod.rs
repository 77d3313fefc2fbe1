//! The ledger: what is true, as the sequence of everything that became true.
//!
//! Records are appended with a sequence number and folded into a [`State`]; nothing is ever changed. A record is
//! durable before anybody acts on it. One append that raises a VM's generation is the commit of a hand-over: before it
//! the old holder owns the VM, after it the new one, and there is no between. Every record names its actor, so that the
//! ledger is also the audit log. Stored in redb, one file, one table.
//!
//! This room knows no network, no agent and no bucket; it does not decide, it only refuses what cannot follow.

pub mod damage;
pub mod event;
pub mod policy;
pub mod recording;
pub mod saved;
pub mod state;
#[cfg(test)]
pub(crate) mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proto::status::Code;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::watch;

use self::event::{Event, FORMAT, Record};
use self::saved::SavedError;
use self::state::{Refusal, State};
use crate::failure::Failure;

const EVENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("events");

/// A file that is in use is tried again after so long.
const BUSY_STEP: Duration = Duration::from_millis(50);

/// Why the ledger cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The record cannot follow; nothing was written.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The file holds something that this release did not write, or lost something.
    #[error("the ledger is damaged at record {sequence}: {reason}")]
    Corrupt {
        /// Where.
        sequence: u64,
        /// What is wrong.
        reason: String,
    },
    /// Another process has the file.
    #[error("the ledger {0} is in use: another controller runs on it")]
    Busy(PathBuf),
    /// The file cannot be opened, read or written.
    #[error("the ledger's store failed: {0}")]
    Store(#[from] Box<redb::Error>),
    /// A record that does not encode: our own mistake.
    #[error(transparent)]
    Encode(SavedError),
    /// The thread that wrote it ended.
    #[error("the ledger's writer ended")]
    Writer,
    /// A write failed before, so that nobody knows whether its record is on the disk.
    #[error("the ledger's store failed before; restart the controller to read what it holds")]
    Unsure,
}

impl From<LedgerError> for Failure {
    fn from(error: LedgerError) -> Failure {
        let hint = "wait for it, or cancel it with its operation id";
        match &error {
            LedgerError::Refused(Refusal::Locked { .. }) => Failure::new(Code::Conflict, error.to_string()).hint(hint),
            LedgerError::Refused(Refusal::NoOperation(_)) => Failure::new(Code::NotFound, error.to_string()),
            LedgerError::Refused(Refusal::Illegal(_) | Refusal::Stale(_)) => {
                Failure::new(Code::Conflict, error.to_string())
            }
            LedgerError::Busy(_) => Failure::new(Code::Conflict, error.to_string()).hint("end that one first"),
            LedgerError::Corrupt { .. } => Failure::new(Code::Corrupt, error.to_string()),
            LedgerError::Store(_) | LedgerError::Unsure => Failure::new(Code::Exhausted, error.to_string())
                .hint("check the free space and the health of the disk that holds the store"),
            LedgerError::Refused(Refusal::Sequence { .. }) | LedgerError::Encode(_) | LedgerError::Writer => {
                Failure::new(Code::Internal, error.to_string())
            }
        }
    }
}

fn store(error: impl Into<redb::Error>) -> LedgerError {
    LedgerError::Store(Box::new(error.into()))
}

struct Tail {
    database: Database,
    chain: [u8; 32],
    /// A commit failed: its record may be durable or not. Nothing may follow until the file is folded again.
    unsure: bool,
}

struct Inner {
    tail: Mutex<Tail>,
    state: watch::Sender<Arc<State>>,
}

/// A handle; clones are the same ledger.
#[derive(Clone)]
pub struct Ledger {
    inner: Arc<Inner>,
}

impl Ledger {
    /// Opens or makes the file and folds all of it.
    ///
    /// # Errors
    /// [`LedgerError::Busy`], [`LedgerError::Store`], [`LedgerError::Corrupt`].
    pub fn open(path: &Path) -> Result<Ledger, LedgerError> {
        let database = Database::create(path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => LedgerError::Busy(path.to_owned()),
            other => store(other),
        });
        Ledger::fold(database?)
    }

    /// The same, and waits for another process to let go of the file: one that was killed holds it until it is gone.
    ///
    /// # Errors
    /// As [`Ledger::open`].
    pub async fn open_when_free(path: &Path, patience: Duration) -> Result<Ledger, LedgerError> {
        let deadline = Instant::now() + patience;
        loop {
            match Ledger::open(path) {
                Err(LedgerError::Busy(_)) if Instant::now() < deadline => tokio::time::sleep(BUSY_STEP).await,
                opened => return opened,
            }
        }
    }

    /// A ledger that is gone with its last handle.
    ///
    /// # Errors
    /// [`LedgerError::Store`].
    pub fn in_memory() -> Result<Ledger, LedgerError> {
        let backend = redb::backends::InMemoryBackend::new();
        Ledger::fold(Database::builder().create_with_backend(backend).map_err(store)?)
    }

    fn fold(database: Database) -> Result<Ledger, LedgerError> {
        let transaction = database.begin_write().map_err(store)?;
        transaction.open_table(EVENTS).map_err(store)?;
        transaction.commit().map_err(store)?;
        let (mut state, mut chain) = (State::default(), saved::CHAIN_START);
        let transaction = database.begin_read().map_err(store)?;
        let table = transaction.open_table(EVENTS).map_err(store)?;
        for entry in table.iter().map_err(store)? {
            let (key, value) = entry.map_err(store)?;
            let corrupt = |reason: String| LedgerError::Corrupt { sequence: key.value(), reason };
            let (record, after) = saved::decode(&chain, value.value()).map_err(|e| corrupt(e.to_string()))?;
            if record.sequence != key.value() {
                return Err(corrupt(format!("it says that it is record {}", record.sequence)));
            }
            state.apply(&record).map_err(|e| corrupt(e.to_string()))?;
            chain = after;
        }
        drop((table, transaction));
        let inner = Inner {
            tail: Mutex::new(Tail { database, chain, unsure: false }),
            state: watch::Sender::new(Arc::new(state)),
        };
        Ok(Ledger { inner: Arc::new(inner) })
    }

    /// The state after the last record.
    pub fn state(&self) -> Arc<State> {
        self.inner.state.borrow().clone()
    }

    /// Tells of every new state.
    pub fn watch(&self) -> watch::Receiver<Arc<State>> {
        self.inner.state.subscribe()
    }

    /// Appends one event: when this returns it is true and durable.
    ///
    /// # Errors
    /// [`LedgerError::Refused`] if it cannot follow; otherwise the store's.
    pub async fn append(&self, actor: &str, event: Event) -> Result<Arc<State>, LedgerError> {
        let (ledger, actor) = (self.clone(), actor.to_owned());
        tokio::task::spawn_blocking(move || ledger.append_now(&actor, event)).await.map_err(|_| LedgerError::Writer)?
    }

    fn append_now(&self, actor: &str, event: Event) -> Result<Arc<State>, LedgerError> {
        let mut tail = self.inner.tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.unsure {
            return Err(LedgerError::Unsure);
        }
        let before = self.state();
        let (vm, task) = subject(&before, &event);
        let (sequence, actor) = (before.sequence + 1, actor.to_owned());
        let record = Record { format: FORMAT, sequence, unix_ms: unix_ms(), actor, vm, task, event };
        let mut after = State::clone(&before);
        after.apply(&record)?;
        let (value, chain) = saved::encode(&tail.chain, &record).map_err(LedgerError::Encode)?;
        tail.unsure = true;
        write(&tail.database, sequence, &value)?;
        (tail.unsure, tail.chain) = (false, chain);
        let after = Arc::new(after);
        self.inner.state.send_replace(after.clone());
        drop(tail);
        tracing::debug!(sequence, actor = record.actor, vm = record.vm, event = ?record.event, "ledger");
        Ok(after)
    }

    /// Up to `limit` records from `since` on.
    ///
    /// # Errors
    /// [`LedgerError::Store`], [`LedgerError::Corrupt`].
    pub async fn records(&self, since: u64, limit: usize) -> Result<Vec<Record>, LedgerError> {
        let ledger = self.clone();
        let read = tokio::task::spawn_blocking(move || {
            let transaction = {
                let tail = ledger.inner.tail.lock().unwrap_or_else(PoisonError::into_inner);
                tail.database.begin_read().map_err(store)?
            };
            let table = transaction.open_table(EVENTS).map_err(store)?;
            let mut records = Vec::new();
            for entry in table.range(since..).map_err(store)?.take(limit) {
                let (key, value) = entry.map_err(store)?;
                let corrupt = |e: SavedError| LedgerError::Corrupt { sequence: key.value(), reason: e.to_string() };
                records.push(saved::reread(value.value()).map_err(corrupt)?);
            }
            Ok(records)
        });
        read.await.map_err(|_| LedgerError::Writer)?
    }
}

fn write(database: &Database, sequence: u64, value: &[u8]) -> Result<(), LedgerError> {
    let mut transaction = database.begin_write().map_err(store)?;
    transaction.set_durability(Durability::Immediate).map_err(store)?;
    transaction.open_table(EVENTS).map_err(store)?.insert(sequence, value).map_err(store)?;
    transaction.commit().map_err(store)
}

/// Which VM and task an event is about.
fn subject(state: &State, event: &Event) -> (String, String) {
    let of = |id: &String| {
        state.operations.get(id).map_or((String::new(), String::new()), |operation| {
            (operation.plan.vm.clone(), operation.plan.task.label().to_owned())
        })
    };
    match event {
        Event::LeaseSet { .. } | Event::ClusterNamed { .. } | Event::HostSeen { .. } => (String::new(), String::new()),
        Event::ContractFrozen { vm, .. } | Event::GenerationSeen { vm, .. } | Event::PagesArrived { vm, .. } => {
            (vm.clone(), String::new())
        }
        Event::CheckpointFound { entry } => (entry.vm.clone(), String::new()),
        Event::RecordingFound { entry } => (entry.vm.clone(), "record".into()),
        Event::RecordingBegan { vm, .. } | Event::RecordingEnded { vm, .. } | Event::RecordingRemoved { vm, .. } => {
            (vm.clone(), "record".into())
        }
        Event::ObjectsDamaged { vm_id, .. } => (state.name_of(vm_id).to_owned(), String::new()),
        Event::OperationBegan { plan, .. } => (plan.vm.clone(), plan.task.label().to_owned()),
        Event::PolicySet { vm, .. }
        | Event::PolicyRemoved { vm }
        | Event::PolicyMissed { vm, .. }
        | Event::PolicyRecovered { vm, .. }
        | Event::Drilled { vm, .. }
        | Event::PolicyBackedOff { vm, .. } => (vm.clone(), "policy".into()),
        Event::StepDone { operation, .. }
        | Event::StepFailed { operation, .. }
        | Event::Committed { operation, .. }
        | Event::Cancelled { operation }
        | Event::Interrupted { operation }
        | Event::StepUndone { operation, .. }
        | Event::GaveUp { operation, .. } => of(operation),
    }
}

/// Milliseconds since the Unix epoch, for people.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis() as u64)
}

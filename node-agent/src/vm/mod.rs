//! The VMs of this host.
//!
//! ```text
//! rpc, heartbeat --messages--> actor (one task a VM, the only one that changes it) --> store, runner, migration
//!                <--published--  (state for whoever wants to look: no lock, no wait)
//! ```
//! - [`debug`]: a guest under a debugger.
//! - [`journal`]: what is recorded of a guest, on its way.
//! - [`requests`]: what is accepted, ignored, refused: pure.
//! - [`store`]: what is on disk; written before anything acts on it.
//! - [`lazy`]: pages that come while the guest runs. [`runner`]: the guest's process. [`lease`]: how long it may run.
//!
//! Refuses to know other hosts' VMs, who may call, and how bytes travel.

pub mod actor;
pub mod debug;
mod journal;
pub mod lazy;
pub mod lease;
mod recover;
mod replace;
pub mod requests;
pub mod runner;
pub mod store;
mod transfer;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::status::Code;
use proto::v1::{
    ActivateReply, ActivateRequest, CreateVmRequest, OperationRef, PrepareRequest, RecordRequest, SendRequest,
};
use proto::v1::{Hello, HostInfo, StoredVm, TransferEvent, VmInfo, VmRef, VmState};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::actor::Actor;
use self::lease::Leases;
use self::requests::{Verb, Word};
use self::runner::{Launch, Runner};
use self::store::{Store, StoreError, is_vm_name};
use crate::clock::Clock;
use crate::config::Engine;
use crate::facts::Facts;
use crate::host;
use crate::migration::{Failure, Receiver};
use crate::tls::Tls;

/// How long a report of the host waits for actors that are busy.
const LOOK_DEADLINE: Duration = Duration::from_millis(100);

/// Answers one message.
pub type Reply<T> = oneshot::Sender<Result<T, Failure>>;

/// What all VMs of a host share.
pub struct Host {
    /// Its name.
    pub name: String,
    /// Where lanes are opened.
    pub address: String,
    /// Address of the controller; may be empty.
    pub controller: String,
    /// What is on disk.
    pub store: Store,
    /// Clocks.
    pub clock: Box<dyn Clock>,
    /// The host's standing with the controller.
    pub leases: Leases,
    /// How runners are started.
    pub launch: Launch,
    /// This host's identity.
    pub tls: Arc<Tls>,
    /// What it can give a guest.
    pub facts: Facts,
    /// Engine of guests whose configuration names none.
    pub engine: Engine,
    /// This boot.
    pub boot_id: String,
    /// Ends the actors; guests go on.
    pub ending: CancellationToken,
}

/// What an actor is told.
pub enum Message {
    /// Build and boot.
    Create(CreateVmRequest, Reply<VmInfo>),
    /// Pause, resume, stop or discard.
    Operate {
        /// Which.
        verb: Verb,
        /// Of which generation.
        generation: u64,
        /// For which operation.
        operation: String,
        /// For people.
        reason: String,
        /// `None` after a discard.
        reply: Reply<Option<VmInfo>>,
    },
    /// Make room.
    Prepare(Box<PrepareRequest>, Reply<()>),
    /// Run what has arrived.
    Activate(ActivateRequest, Reply<ActivateReply>),
    /// Send it.
    Send(Box<SendRequest>, mpsc::Sender<TransferEvent>, Reply<()>),
    /// End the operation as if it had not been.
    Abandon(OperationRef, Reply<()>),
    /// The ledger's word, answering a heartbeat sent at this instant.
    Verdict(Word, u64),
    /// Who takes the lanes of the hello's operation.
    Lane(Hello, Reply<Receiver>),
    /// The newest numbers.
    Look(Reply<VmInfo>),
    /// From the runner of this serial number.
    Runner(u64, runner::Event),
    /// A transfer from here has ended.
    Sent(transfer::Ended),
    /// A transfer to here has ended.
    Received(String, Result<(), Failure>),
    /// The ticket of this operation has ended.
    Expired(String),
    /// All pages of the runner of this serial number have come, or it has ended.
    Paged(u64, lazy::Over),
    /// Record from now on, or end that.
    Record(RecordRequest, Reply<VmInfo>),
    /// Attach a debugger, whose requests go to the runner.
    Debug(VmRef, Reply<Arc<Runner>>),
}

/// What is known of a VM without asking its actor.
#[derive(Clone, Default)]
pub struct Published {
    /// `None`: this host has no such VM.
    pub info: Option<VmInfo>,
    /// Its process.
    pub runner: Option<Arc<Runner>>,
    /// While it is INCOMING: the source that its ticket names.
    pub source: String,
}

/// A VM that waits for lanes.
pub struct Expected {
    /// Reaches it.
    pub handle: Handle,
    /// The source that its ticket names.
    pub source: String,
}

/// Reaches one VM.
#[derive(Clone)]
pub struct Handle {
    mailbox: mpsc::UnboundedSender<Message>,
    published: watch::Receiver<Published>,
}

impl Handle {
    /// Tells the actor something and waits for its answer.
    ///
    /// # Errors
    /// The actor's, or that the agent is shutting down.
    pub async fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        let ending = || Failure::new(Code::Unreachable, "the agent is shutting down");
        self.mailbox.send(message(reply)).map_err(|_| ending())?;
        answer.await.map_err(|_| ending())?
    }

    /// Tells the actor something.
    pub fn tell(&self, message: Message) {
        // An actor that has ended has nothing to change any more.
        let _ended = self.mailbox.send(message);
    }

    /// What is known of it now.
    pub fn published(&self) -> Published {
        self.published.borrow().clone()
    }
}

/// All VMs of this host.
pub struct Vms {
    host: Arc<Host>,
    actors: Mutex<BTreeMap<String, Handle>>,
    /// The actors' tasks.
    tasks: TaskTracker,
}

impl Vms {
    /// Finds what earlier agents left on this host: running guests are attached to again, dead ones noted as crashed.
    ///
    /// # Errors
    /// The state directory cannot be listed.
    pub async fn recover(host: Arc<Host>) -> Result<Vms, StoreError> {
        let (stored, damaged) = host.store.load()?;
        for error in damaged {
            tracing::error!(%error, "a VM cannot be read: it gets no lease, its name stays taken");
        }
        let vms = Vms { host, actors: Mutex::default(), tasks: TaskTracker::new() };
        for vm in stored {
            let name = vm.name.clone();
            let handle = vms.start(&name, Some(vm)).await;
            vms.lock().insert(name, handle);
        }
        Ok(vms)
    }

    async fn start(&self, name: &str, stored: Option<StoredVm>) -> Handle {
        let (mailbox, messages) = mpsc::unbounded_channel();
        let (publisher, published) = watch::channel(Published::default());
        let mut actor = Actor::new(Arc::clone(&self.host), name, mailbox.clone(), publisher);
        if let Some(stored) = stored {
            actor.recover(stored).await;
        }
        self.tasks.spawn(actor.run(messages));
        Handle { mailbox, published }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Handle>> {
        self.actors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the actors and waits until none is left that could write anything down: the next agent reads what is there.
    /// Guests go on.
    pub async fn end(&self) {
        self.host.ending.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// What the host's VMs share.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// The actor of a name, which may have no VM (yet).
    ///
    /// # Errors
    /// [`Code::BadInput`]: no name.
    pub async fn actor(&self, name: &str) -> Result<Handle, Failure> {
        if !is_vm_name(name) {
            let name: String = name.chars().take(60).collect();
            let text = format!("{name:?} is not the name of a VM: 1 to 40 letters, digits, -, _ and . are");
            return Err(Failure::new(Code::BadInput, text));
        }
        if let Some(handle) = self.find(name) {
            return Ok(handle);
        }
        let made = self.start(name, None).await;
        Ok(self.lock().entry(name.to_owned()).or_insert(made).clone())
    }

    /// The actor of a name that this host has had.
    pub fn find(&self, name: &str) -> Option<Handle> {
        self.lock().get(name).cloned()
    }

    /// What is known of every VM, in order of name.
    pub fn list(&self) -> Vec<VmInfo> {
        self.lock().values().filter_map(|handle| handle.published.borrow().info.clone()).collect()
    }

    /// This host as it is reported. Actors that are busy are reported as they were last seen.
    pub async fn host_info(&self, version: &str) -> HostInfo {
        let handles: Vec<Handle> = self.lock().values().cloned().collect();
        let looks: Vec<_> = handles
            .iter()
            .filter(|handle| handle.published.borrow().runner.is_some())
            .map(|handle| {
                let handle = handle.clone();
                tokio::spawn(async move { handle.ask(Message::Look).await })
            })
            .collect();
        let deadline = tokio::time::Instant::now() + LOOK_DEADLINE;
        for look in looks {
            let _busy = tokio::time::timeout_at(deadline, look).await;
        }
        let memory = host::memory();
        HostInfo {
            name: self.host.name.clone(),
            version: version.to_owned(),
            address: self.host.address.clone(),
            memory_bytes_total: memory.total,
            memory_bytes_free: memory.available.saturating_sub(Vms::promised_bytes(&self.list())),
            cpus: std::thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(1)),
            engines: self.host.facts.offered(),
            capabilities: Vec::new(),
            vms: self.list(),
            engine_facts: self.host.facts.engines.clone(),
            hardware: Some(self.host.facts.hardware.clone()),
            withheld: self.host.facts.withheld.clone(),
            lazy_refused: self.host.facts.lazy_refused.clone(),
            lazy_known: true,
        }
    }

    /// The VM that waits for this operation's lanes, and the host that its ticket names as the source.
    pub fn expecting(&self, operation: &str) -> Option<Expected> {
        let actors = self.lock();
        let handle = actors.values().find(|handle| {
            let published = handle.published.borrow();
            let waits = |info: &VmInfo| info.state() == VmState::Incoming && info.operation == operation;
            published.info.as_ref().is_some_and(waits)
        })?;
        let source = handle.published.borrow().source.clone();
        Some(Expected { handle: handle.clone(), source })
    }

    /// Memory that guests were promised and have not touched yet, in bytes.
    pub fn promised_bytes(host_vms: &[VmInfo]) -> u64 {
        host_vms
            .iter()
            .filter(|vm| vm.runner_pid != 0)
            .map(|vm| vm.config.as_ref().map_or(0, |config| config.memory_bytes).saturating_sub(vm.resident_bytes))
            .fold(0, u64::saturating_add)
    }

    /// Where a VM's files are. The name has been accepted by [`Vms::actor`].
    pub fn directory(&self, name: &str) -> PathBuf {
        self.host.store.directory(name)
    }
}

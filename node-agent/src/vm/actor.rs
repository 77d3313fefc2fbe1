//! One task per VM: the only one that changes it.
//!
//! Messages are taken one after the other; [`super::requests`] says what is accepted. What must survive a crash is on
//! disk before it is acted on: a generation before its guest runs, a hand-over before it is told. Long work (a transfer)
//! runs beside the actor and reports back by message. Everybody else sees the published state.

use std::sync::Arc;

use proto::status::Code;
use proto::v1::runner_debug::Ask as DebugAsk;
use proto::v1::runner_request::Request;
use proto::v1::{CreateVmRequest, RunnerBoot, RunnerDebugDetach, RunnerState, StoredVm, VmInfo, VmState};
use tokio::sync::{mpsc, watch};

use super::journal::Forwarding;
use super::lazy::Paging;
use super::replace::Aside;
use super::requests::{Answer, Ask, Consequence, Held, Verb, Word, admit, judge, state_words};
use super::runner::{Arrival, Event, Runner};
use super::store::StoreError;
use super::transfer::{Reception, Transfer};
use super::{Host, Message, Published};
use crate::host;
use crate::migration::{Base, Failure};

/// The state of one VM's actor.
pub struct Actor {
    pub(super) host: Arc<Host>,
    pub(super) name: String,
    pub(super) mailbox: mpsc::UnboundedSender<Message>,
    publisher: watch::Sender<Published>,
    /// As it is on disk, apart from flips between running and paused.
    pub(super) record: Option<StoredVm>,
    pub(super) runner: Option<Arc<Runner>>,
    pub(super) runner_serial: u64,
    /// Serial numbers given so far.
    serials: u64,
    pub(super) runner_state: RunnerState,
    pub(super) transfer: Option<Transfer>,
    pub(super) reception: Option<Reception>,
    pub(super) base: Option<Base>,
    /// What stood here before, and comes back if what is incoming does not stay.
    pub(super) aside: Option<Aside>,
    /// Pages of the runner that are on their way.
    pub(super) paging: Option<Paging>,
    /// The runner's journal on its way to the controller.
    pub(super) forwarding: Option<Forwarding>,
    /// When `Activate` came, `CLOCK_BOOTTIME`; 0: not to this agent.
    pub(super) activated_ns: u64,
}

/// A refusal of the policy, in the form that travels.
pub(super) fn refusal(name: &str, code: Code, text: &str) -> Failure {
    Failure::new(code, format!("{name}: {text}"))
}

impl Actor {
    pub(super) fn new(
        host: Arc<Host>,
        name: &str,
        mailbox: mpsc::UnboundedSender<Message>,
        publisher: watch::Sender<Published>,
    ) -> Actor {
        Actor {
            host,
            name: name.to_owned(),
            mailbox,
            publisher,
            record: None,
            runner: None,
            runner_serial: 0,
            serials: 0,
            runner_state: RunnerState::default(),
            transfer: None,
            reception: None,
            base: None,
            aside: None,
            paging: None,
            forwarding: None,
            activated_ns: 0,
        }
    }

    /// From here on nothing that the present runner says is heard.
    pub(super) fn next_serial(&mut self) {
        self.serials += 1;
        self.runner_serial = self.serials;
    }

    pub(super) async fn run(mut self, mut messages: mpsc::UnboundedReceiver<Message>) {
        self.publish();
        let ending = self.host.ending.clone();
        loop {
            // A message that was begun is finished: what it put on disk and what it did belong together.
            let message = tokio::select! {
                biased;
                () = ending.cancelled() => return,
                message = messages.recv() => message,
            };
            let Some(message) = message else { return };
            self.take(message).await;
            self.publish();
        }
    }

    async fn take(&mut self, message: Message) {
        // Nobody waits for an answer whose receiver is gone.
        match message {
            Message::Create(request, reply) => drop(reply.send(self.create(request).await)),
            Message::Operate { verb, generation, operation, reason, reply } => {
                let ask = Ask { verb, generation, operation };
                drop(reply.send(self.operate(ask, &reason).await));
            }
            Message::Prepare(request, reply) => drop(reply.send(self.prepare(*request).await)),
            Message::Activate(request, reply) => drop(reply.send(self.activate(request).await)),
            Message::Send(request, events, reply) => drop(reply.send(self.send(*request, events))),
            Message::Abandon(operation, reply) => self.abandon(operation, reply).await,
            Message::Verdict(word, sent_ns) => self.verdict(word, sent_ns).await,
            Message::Lane(hello, reply) => drop(reply.send(self.lane(&hello).await)),
            Message::Look(reply) => drop(reply.send(self.look().await)),
            Message::Runner(serial, event) if serial == self.runner_serial => self.runner_said(event).await,
            Message::Runner(..) => {}
            Message::Sent(ended) => self.sent(ended).await,
            Message::Received(operation, outcome) => self.received(&operation, outcome).await,
            Message::Expired(operation) => self.expired(&operation).await,
            Message::Paged(serial, over) if serial == self.runner_serial => self.paged(over).await,
            Message::Paged(..) => {}
            Message::Record(request, reply) => drop(reply.send(self.record(request).await)),
            Message::Debug(vm, reply) => drop(reply.send(self.debug(vm).await)),
        }
    }

    /// The policy's word on a request.
    pub(super) fn admit(&self, ask: &Ask) -> Result<Answer, Failure> {
        let seen = match self.record {
            Some(_) => 0,
            None => self.host.store.seen(&self.name).map_err(StoreError::into_failure)?,
        };
        match admit(seen, self.held().as_ref(), ask) {
            Answer::Refuse(code, text) => Err(refusal(&self.name, code, &text)),
            answer => Ok(answer),
        }
    }

    pub(super) fn held(&self) -> Option<Held> {
        let record = self.record.as_ref()?;
        let receiving = self.reception.as_ref().is_some_and(Reception::is_under_way);
        let loaded = match &self.reception {
            Some(reception) => reception.is_ready(),
            None => self.runner_state.state() == VmState::Paused,
        };
        Some(Held {
            generation: record.generation,
            state: record.state(),
            operation: record.operation.clone(),
            transferring: self.transfer.is_some() || receiving,
            loaded: loaded && self.runner.is_some(),
        })
    }

    /// Writes the record down.
    pub(super) async fn save(&self) -> Result<(), Failure> {
        let Some(record) = self.record.clone() else { return Ok(()) };
        let store = self.host.store.clone();
        self.on_disk(move || store.save(&record).map_err(StoreError::into_failure)).await
    }

    /// Does work with files where it does not hold up the other tasks.
    pub(super) async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let named = |failure: Failure| refusal(&self.name, failure.code, &failure.reason);
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done.map_err(named),
            Err(error) => Err(named(Failure::new(Code::Internal, error))),
        }
    }

    pub(super) fn info(&self) -> Option<VmInfo> {
        let record = self.record.as_ref()?;
        let runner = self.runner.as_deref();
        let started = self.host.clock.realtime_ns() / 1_000_000;
        Some(VmInfo {
            name: self.name.clone(),
            generation: record.generation,
            state: record.state,
            reason: record.reason.clone(),
            config: record.config.clone(),
            retired_instructions: self.runner_state.retired_instructions,
            runner_pid: runner.and_then(|runner| runner.process).map_or(0, |process| process.pid.into()),
            resident_bytes: runner.map_or(0, Runner::resident_bytes),
            operation: record.operation.clone(),
            uptime_ms: runner.map_or(0, |_| started.saturating_sub(record.created_unix_ms)),
            lazy: self.lazy_info(),
            first_instruction_us: match (self.activated_ns, self.runner_state.first_instruction_boottime_ns) {
                (0, _) | (_, 0) => 0,
                (from, to) => (to.saturating_sub(from) / 1000).max(1),
            },
            recording: runner.and(self.runner_state.recording.clone()),
            debugged: runner.is_some() && self.runner_state.debugged.is_some(),
        })
    }

    pub(super) fn info_or_gone(&self) -> Result<VmInfo, Failure> {
        self.info().ok_or_else(|| refusal(&self.name, Code::NotFound, "this host has no such VM"))
    }

    pub(super) fn publish(&self) {
        let ticket = self.record.as_ref().and_then(|record| record.ticket.as_ref());
        let source = ticket.map_or(String::new(), |ticket| ticket.source.clone());
        self.publisher.send_replace(Published { info: self.info(), runner: self.runner.clone(), source });
    }

    /// A channel whose events come to this actor, marked with a new serial number: what an earlier runner still says is
    /// not taken for the newer one's word.
    pub(super) fn runner_events(&mut self) -> mpsc::UnboundedSender<Event> {
        self.next_serial();
        let (sender, mut events) = mpsc::unbounded_channel();
        let (mailbox, serial) = (self.mailbox.clone(), self.runner_serial);
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if mailbox.send(Message::Runner(serial, event)).is_err() {
                    return;
                }
            }
        });
        sender
    }

    pub(super) async fn start_runner(&mut self, arrival: Arrival) -> Result<Arc<Runner>, Failure> {
        let events = self.runner_events();
        let directory = self.host.store.directory(&self.name);
        let runner = Arc::new(Runner::spawn(&self.host.launch, &directory, arrival, events).await?);
        self.runner_state = runner.state.clone();
        self.runner = Some(Arc::clone(&runner));
        Ok(runner)
    }

    pub(super) async fn end_runner(&mut self) {
        self.next_serial();
        if let Some(runner) = self.runner.take() {
            runner.end().await;
        } else if let Some(process) = super::runner::Process::of(&self.host.store.directory(&self.name)) {
            process.kill().await;
        }
        // Not before: a guest that sleeps on a missing page hears no word.
        self.paging = None;
        self.forwarding = None;
    }

    async fn create(&mut self, request: CreateVmRequest) -> Result<VmInfo, Failure> {
        let ask = Ask { verb: Verb::Create, generation: request.generation, operation: request.operation.clone() };
        if self.admit(&ask)? == Answer::Ignore {
            return self.info_or_gone();
        }
        let config = request.config.clone().unwrap_or_default();
        let mut config = host::settle(config, &self.name, self.host.engine)?;
        let realtime_ns = self.host.clock.realtime_ns();
        config = self
            .on_disk(move || {
                host::settle_new(&mut config, realtime_ns)?;
                host::settle_files(&mut config)?;
                Ok(config)
            })
            .await?;
        self.record = Some(StoredVm {
            name: self.name.clone(),
            generation: request.generation,
            state: VmState::Starting.into(),
            operation: request.operation.clone(),
            config: Some(config),
            on_isolation: request.on_isolation,
            created_unix_ms: self.host.clock.realtime_ns() / 1_000_000,
            ..StoredVm::default()
        });
        if let Err(failure) = self.build_and_boot().await {
            tracing::warn!(vm = self.name, %failure, "a VM could not be created");
            self.forget().await?;
            return Err(failure);
        }
        tracing::info!(vm = self.name, generation = request.generation, "created");
        self.info_or_gone()
    }

    async fn build_and_boot(&mut self) -> Result<(), Failure> {
        let boot = self.record.as_ref().and_then(|record| record.config.clone()?.boot).unwrap_or_default();
        let directory = self.host.store.directory(&self.name);
        self.on_disk(move || {
            std::fs::create_dir_all(&directory)
                .map_err(|e| Failure::new(Code::Internal, format!("{}: {e}", directory.display())))?;
            host::make_boot_image(&boot, &directory)
        })
        .await?;
        self.create_on_disk().await?;
        let runner = self.start_runner(Arrival::Boots).await?;
        let until = self.host.leases.initial(self.policy());
        runner.lease(until).await?;
        runner.call(Request::Boot(RunnerBoot {})).await?;
        let state = runner.status().await?;
        self.absorb(&state);
        self.save().await
    }

    pub(super) async fn create_on_disk(&self) -> Result<(), Failure> {
        let Some(record) = self.record.clone() else { return Ok(()) };
        let store = self.host.store.clone();
        self.on_disk(move || store.create(&record).map_err(StoreError::into_failure)).await
    }

    pub(super) fn policy(&self) -> proto::v1::IsolationPolicy {
        self.record.as_ref().map_or_else(Default::default, StoredVm::on_isolation)
    }

    /// Takes over what the runner says of its guest, where this host runs it.
    pub(super) fn absorb(&mut self, state: &RunnerState) {
        self.runner_state = state.clone();
        self.forward_journal(state);
        let Some(record) = &mut self.record else { return };
        match record.state() {
            VmState::Starting | VmState::Running | VmState::Paused => {
                record.state = state.state;
                if !(record.paused && state.state() == VmState::Paused) {
                    record.reason.clone_from(&state.reason);
                }
            }
            VmState::Unspecified | VmState::Incoming | VmState::Stopped | VmState::Crashed | VmState::HandedOver => {}
        }
    }

    /// Pause, resume, stop, discard.
    async fn operate(&mut self, ask: Ask, reason: &str) -> Result<Option<VmInfo>, Failure> {
        if self.admit(&ask)? == Answer::Ignore {
            return Ok(self.info().filter(|_| ask.verb != Verb::Discard));
        }
        match ask.verb {
            Verb::Discard => {
                self.discard("discarded by the controller").await?;
                return Ok(None);
            }
            Verb::Stop => self.stop(VmState::Stopped, "stopped").await?,
            Verb::Pause => self.pause(if reason.is_empty() { "paused" } else { reason }).await?,
            Verb::Resume => self.resume().await?,
            Verb::Create | Verb::Prepare | Verb::Activate | Verb::Send | Verb::Abandon => {
                return Err(refusal(&self.name, Code::Internal, "not an operation of this kind"));
            }
        }
        Ok(self.info())
    }

    pub(super) fn the_runner(&self) -> Result<Arc<Runner>, Failure> {
        self.runner.clone().ok_or_else(|| refusal(&self.name, Code::Internal, "its process is gone"))
    }

    async fn pause(&mut self, reason: &str) -> Result<(), Failure> {
        let state = self.the_runner()?.pause(reason).await?;
        if let Some(record) = &mut self.record {
            record.paused = true;
            reason.clone_into(&mut record.reason);
        }
        self.absorb(&state);
        self.save().await
    }

    pub(super) async fn resume(&mut self) -> Result<(), Failure> {
        if let Some(record) = &mut self.record {
            record.paused = false;
        }
        self.save().await?;
        let state = self.the_runner()?.resume().await?;
        self.absorb(&state);
        Ok(())
    }

    async fn stop(&mut self, state: VmState, reason: &str) -> Result<(), Failure> {
        self.finish_journal(reason).await;
        self.end_runner().await;
        if let Some(record) = &mut self.record {
            record.state = state.into();
            reason.clone_into(&mut record.reason);
            record.operation.clear();
        }
        self.save().await
    }

    /// Ends everything of the VM on this host and remembers that this generation was here.
    pub(super) async fn discard(&mut self, why: &str) -> Result<(), Failure> {
        if let Some(transfer) = self.transfer.take() {
            transfer.end();
        }
        let owned = self.record.as_ref().filter(|record| record.state() != VmState::Incoming);
        if let Some(record) = owned {
            let (store, name, generation) = (self.host.store.clone(), self.name.clone(), record.generation);
            self.on_disk(move || store.note_seen(&name, generation).map_err(StoreError::into_failure)).await?;
        }
        tracing::info!(vm = self.name, why, "discarded");
        self.forget().await
    }

    /// Removes what there is, as if it had never been here.
    pub(super) async fn forget(&mut self) -> Result<(), Failure> {
        if let Some(reception) = self.reception.take() {
            reception.end("the target gave up");
        }
        self.end_runner().await;
        let generation = self.record.as_ref().map_or(0, |record| record.generation);
        let (store, name) = (self.host.store.clone(), self.name.clone());
        self.on_disk(move || store.remove(&name, generation).map_err(StoreError::into_failure)).await?;
        self.record = None;
        self.base = None;
        self.runner_state = RunnerState::default();
        self.put_back().await
    }

    async fn look(&mut self) -> Result<VmInfo, Failure> {
        if let Some(runner) = self.runner.clone()
            && let Ok(state) = runner.status().await
        {
            self.absorb(&state);
        }
        self.info_or_gone()
    }

    async fn verdict(&mut self, word: Word, sent_ns: u64) {
        let Some(held) = self.held() else { return };
        let outcome = match judge(&held, &word) {
            Consequence::Nothing => Ok(()),
            Consequence::Renew => self.renew(sent_ns).await,
            Consequence::Resume => self.take_back(sent_ns, "the controller undid the hand-over").await,
            Consequence::Discard => self.pause_and_discard(&held).await,
        };
        if let Err(failure) = outcome {
            tracing::warn!(vm = self.name, %failure, "the controller's word could not be followed");
        }
    }

    async fn renew(&mut self, sent_ns: u64) -> Result<(), Failure> {
        let Some(runner) = self.runner.clone() else { return Ok(()) };
        let state = runner.lease(self.host.leases.until(sent_ns, self.policy())).await?;
        self.absorb(&state);
        Ok(())
    }

    async fn pause_and_discard(&mut self, held: &Held) -> Result<(), Failure> {
        if let Some(runner) = self.runner.clone() {
            // No debugger lets it go on meanwhile. The discard ends the process anyway; the guest must not run for one
            // moment longer than this.
            let _none = runner.debug(DebugAsk::Detach(RunnerDebugDetach {})).await;
            let _ended = runner.pause("another host owns it").await;
        }
        let why = format!("the controller says that generation {} is not this host's", held.generation);
        self.discard(&why).await
    }

    async fn runner_said(&mut self, event: Event) {
        match event {
            Event::Changed(state) => {
                self.absorb(&state);
                match state.state() {
                    VmState::Stopped => self.note_end(VmState::Stopped, &state.reason, true).await,
                    VmState::Crashed => self.note_end(VmState::Crashed, &state.reason, false).await,
                    _ => {}
                }
            }
            Event::Gone => self.runner_gone().await,
        }
    }

    /// The guest ended. A crashed one keeps its process, so that its VMCBs can be looked at until it is stopped.
    async fn note_end(&mut self, state: VmState, reason: &str, end_process: bool) {
        tracing::info!(vm = self.name, state = state_words(state), reason, "the guest ended");
        if self.transfer.is_some() {
            // The transfer finds out by itself; its end comes as a message.
            if let Some(record) = &mut self.record {
                record.state = state.into();
                reason.clone_into(&mut record.reason);
            }
            return;
        }
        let noted = if end_process { self.stop(state, reason).await } else { self.save().await };
        if let Err(failure) = noted {
            tracing::error!(vm = self.name, %failure, "the end of a guest could not be written down");
        }
    }

    async fn runner_gone(&mut self) {
        let directory = self.host.store.directory(&self.name);
        let alive = super::runner::Process::of(&directory).is_some();
        if alive {
            let events = self.runner_events();
            if let Ok(runner) = Runner::connect(&directory, events).await {
                tracing::warn!(vm = self.name, "the connection to the runner was made again");
                self.absorb(&runner.state.clone());
                self.runner = Some(Arc::new(runner));
                if let Err(failure) = self.page_again() {
                    tracing::error!(vm = self.name, %failure, "its missing pages cannot be asked for");
                }
                return;
            }
        }
        self.end_runner().await;
        let Some(record) = &mut self.record else { return };
        if record.state() == VmState::Incoming {
            if let Err(failure) = self.discard("its process ended").await {
                tracing::error!(vm = self.name, %failure, "leftovers stay");
            }
            return;
        }
        if matches!(record.state(), VmState::Stopped | VmState::Crashed) {
            return;
        }
        record.state = VmState::Crashed.into();
        record.reason = format!("its process ended unexpectedly; see {}", directory.join("runner.log").display());
        tracing::error!(vm = self.name, reason = record.reason, "crashed");
        if let Err(failure) = self.save().await {
            tracing::error!(vm = self.name, %failure, "the crash could not be written down");
        }
    }
}

/// An error with its sources, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

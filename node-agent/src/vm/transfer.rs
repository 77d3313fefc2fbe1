//! The actor's part in a VM's moves: make room, send, hand over, activate, take back.
//!
//! ```text
//! target: prepare -> INCOMING (ticket, one use) -> lanes -> ready -> activate (its generation is on disk since prepare)
//! source: send -> both digests agree -> HANDED_OVER (on disk, then told) -> discard | abandon: it goes on
//! ```
//! A source that has handed over never goes on by itself. The bytes are [`crate::migration`]'s business.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::status::Code;
use proto::v1::runner_request::Request;
use proto::v1::transfer_event::Event as Told;
use proto::v1::{
    ActivateReply, ActivateRequest, Hello, OperationRef, PrepareRequest, RunnerAnnounce, SendRequest, StoredVm, Ticket,
    TransferEvent, VmState,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::actor::{Actor, refusal};
use super::requests::{Answer, Ask, Verb};
use super::runner::{Arrival, Arriving, Leaving};
use super::{Message, Reply};
use crate::host;
use crate::migration::{self, Failure, Phase, Receiver, Sent, Spaces};
use crate::tls::{Identity, Tls};

/// Lanes of one transfer, unless the policy says how many.
const LANES: u32 = 2;
const LANES_MAX: u32 = 16;
/// When a guest that was activated announces itself on the network: at once, and again for switches that were busy.
const ANNOUNCE_AFTER: [Duration; 3] = [Duration::ZERO, Duration::from_millis(150), Duration::from_millis(850)];

/// A transfer from here that is under way.
pub(super) struct Transfer {
    operation: String,
    checkpoint: bool,
    cancel: CancellationToken,
    abandoned: Vec<Reply<()>>,
}

impl Transfer {
    /// Ends it; its task reports later.
    pub(super) fn end(self) {
        self.cancel.cancel();
        for reply in self.abandoned {
            let _gone = reply.send(Ok(()));
        }
    }
}

/// What a transfer's task reports.
pub struct Ended {
    operation: String,
    outcome: Result<Sent, Failure>,
    events: mpsc::Sender<TransferEvent>,
}

/// A transfer to here.
pub(super) struct Reception {
    operation: String,
    receiver: Receiver,
}

impl Reception {
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.receiver.phase(), Phase::Ready(_))
    }

    pub(super) fn is_under_way(&self) -> bool {
        matches!(self.receiver.phase(), Phase::Receiving)
    }

    fn is_waiting(&self) -> bool {
        matches!(self.receiver.phase(), Phase::Waiting)
    }

    pub(super) fn end(self, why: &str) {
        self.receiver.abandon(why);
    }
}

impl Actor {
    /// It is being sent to another host.
    pub(super) fn is_leaving(&self) -> bool {
        self.transfer.as_ref().is_some_and(|transfer| !transfer.checkpoint)
    }

    pub(super) async fn prepare(&mut self, request: PrepareRequest) -> Result<(), Failure> {
        let ticket = request.ticket.clone().unwrap_or_default();
        if ticket.target != self.host.name {
            let text = format!("the ticket is for {:?}, this is {:?}", ticket.target, self.host.name);
            return Err(refusal(&self.name, Code::Denied, &text));
        }
        if ticket.secret.len() != 32 || ticket.expires_in_ms == 0 || ticket.operation.is_empty() {
            return Err(refusal(&self.name, Code::BadInput, "the ticket has no secret, time or operation"));
        }
        self.set_aside(request.replaces_generation, ticket.generation).await?;
        let ask = Ask { verb: Verb::Prepare, generation: ticket.generation, operation: ticket.operation.clone() };
        match self.admit(&ask)? {
            Answer::Ignore => return Ok(()),
            Answer::Replace => self.discard("replaced by a newer operation").await?,
            Answer::Accept | Answer::Refuse(..) => {}
        }
        let config = request.config.clone().unwrap_or_default();
        let config = host::settle(config, &self.name, self.host.engine)?;
        let now_ns = self.host.clock.boottime_ns();
        self.record = Some(StoredVm {
            name: self.name.clone(),
            generation: ticket.generation,
            state: VmState::Incoming.into(),
            operation: ticket.operation.clone(),
            config: Some(config),
            on_isolation: request.on_isolation,
            ticket_until_boottime_ns: now_ns.saturating_add(ticket.expires_in_ms.saturating_mul(1_000_000)),
            ticket: Some(ticket),
            boot_id: self.host.boot_id.clone(),
            pages_from: request.pages_from.clone(),
            created_unix_ms: self.host.clock.realtime_ns() / 1_000_000,
            ..StoredVm::default()
        });
        if let Err(failure) = self.make_room().await {
            self.forget().await?;
            return Err(failure);
        }
        tracing::info!(vm = self.name, generation = ask.generation, operation = ask.operation, "prepared");
        Ok(())
    }

    /// Directory, empty local disks, a runner without state, somebody who takes the lanes.
    async fn make_room(&mut self) -> Result<(), Failure> {
        let directory = self.host.store.directory(&self.name);
        let mut config = self.record.as_ref().and_then(|record| record.config.clone()).unwrap_or_default();
        config = self
            .on_disk(move || {
                std::fs::create_dir_all(&directory)
                    .map_err(|e| Failure::new(Code::Internal, format!("{}: {e}", directory.display())))?;
                host::check_shared_disks(&config)?;
                host::make_local_disks(&mut config, &directory)?;
                Ok::<_, Failure>(config)
            })
            .await?;
        if let Some(record) = &mut self.record {
            record.config = Some(config);
        }
        self.create_on_disk().await?;
        let lazy = self.record.as_ref().is_some_and(|record| !record.pages_from.is_empty());
        self.start_runner(if lazy { Arrival::Lazy } else { Arrival::Whole }).await?;
        if lazy {
            self.page()?;
        }
        self.receive()
    }

    /// Waits for the holder of the ticket.
    pub(super) fn receive(&mut self) -> Result<(), Failure> {
        let runner = self.the_runner()?;
        let record = self.record.clone().unwrap_or_default();
        let ticket = record.ticket.unwrap_or_default();
        let operation = ticket.operation.clone();
        let lazy = !record.pages_from.is_empty();
        let receiver = Receiver::new(ticket, runner.spaces()?, Arriving { runner }, lazy)?;
        let (watched, mailbox, waited) = (receiver.clone(), self.mailbox.clone(), operation.clone());
        tokio::spawn(async move {
            let outcome = watched.finished().await.map(drop);
            let _ended = mailbox.send(Message::Received(waited, outcome));
        });
        let left = record.ticket_until_boottime_ns.saturating_sub(self.host.clock.boottime_ns());
        let (mailbox, expiring) = (self.mailbox.clone(), operation.clone());
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_nanos(left)).await;
            let _ended = mailbox.send(Message::Expired(expiring));
        });
        self.reception = Some(Reception { operation, receiver });
        Ok(())
    }

    /// Who takes a lane of this operation. The first lane uses the ticket up, on disk.
    pub(super) async fn lane(&mut self, hello: &Hello) -> Result<Receiver, Failure> {
        let none = || Failure::new(Code::Denied, "no VM is expected for this operation");
        let ours = |reception: &&Reception| reception.operation == hello.operation;
        let receiver = self.reception.as_ref().filter(ours).ok_or_else(none)?.receiver.clone();
        let record = self.record.as_mut().ok_or_else(none)?;
        let secret = record.ticket.as_ref().map_or(&[][..], |ticket| &ticket.secret);
        // Comparing hashes takes the same time wherever they differ. The ticket is used up by its holder alone.
        if record.state() != VmState::Incoming || blake3::hash(secret) != blake3::hash(&hello.secret) {
            return Err(none());
        }
        if !record.ticket_used {
            if self.host.clock.boottime_ns() > record.ticket_until_boottime_ns {
                return Err(Failure::new(Code::Denied, "the ticket has ended"));
            }
            record.ticket_used = true;
            self.save().await?;
        }
        Ok(receiver)
    }

    pub(super) async fn received(&mut self, operation: &str, outcome: Result<(), Failure>) {
        let concerned = self.reception.as_ref().is_some_and(|reception| reception.operation == operation);
        let incoming = self.record.as_ref().is_some_and(|record| record.state() == VmState::Incoming);
        match outcome {
            Ok(()) => tracing::info!(vm = self.name, operation, "its state has arrived and both digests agree"),
            Err(failure) if concerned && incoming => {
                tracing::warn!(vm = self.name, operation, %failure, "the transfer to here failed");
                if let Err(failure) = self.discard("its transfer failed").await {
                    tracing::error!(vm = self.name, %failure, "leftovers stay");
                }
            }
            Err(_) => {}
        }
    }

    pub(super) async fn expired(&mut self, operation: &str) {
        let waits =
            self.reception.as_ref().is_some_and(|reception| reception.operation == operation && reception.is_waiting());
        let unused =
            self.record.as_ref().is_some_and(|record| record.state() == VmState::Incoming && !record.ticket_used);
        if waits
            && unused
            && let Err(failure) = self.discard("nobody came before the ticket ended").await
        {
            tracing::error!(vm = self.name, %failure, "leftovers stay");
        }
    }

    pub(super) async fn activate(&mut self, request: ActivateRequest) -> Result<ActivateReply, Failure> {
        let began = Instant::now();
        let ask = Ask { verb: Verb::Activate, generation: request.generation, operation: request.operation.clone() };
        if self.admit(&ask)? == Answer::Ignore {
            return Ok(ActivateReply { vm: self.info(), resume_us: 0 });
        }
        let runner = self.the_runner()?;
        self.activated_ns = self.host.clock.boottime_ns();
        // The generation is on disk since `prepare`; what is written after the guest runs is only that it does, which the
        // runner itself knows: `recover` asks it. So no disk is waited for while nobody runs the guest.
        let until = self.host.leases.initial(self.policy());
        let state = if request.paused {
            runner.lease(until).await?
        } else {
            let (leased, resumed) = tokio::join!(runner.lease(until), runner.resume());
            leased?;
            resumed?
        };
        let resume_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let Some(record) = &mut self.record {
            record.state = VmState::Paused.into();
            record.paused = request.paused;
            record.reason = if request.paused { "paused before it came here".to_owned() } else { String::new() };
            record.operation.clear();
            record.ticket = None;
        }
        self.reception = None;
        self.absorb(&state);
        tokio::spawn(async move {
            for pause in ANNOUNCE_AFTER {
                tokio::time::sleep(pause).await;
                if let Err(failure) = runner.call(Request::Announce(RunnerAnnounce {})).await {
                    tracing::debug!(%failure, "announcement");
                }
            }
        });
        self.save().await?;
        self.drop_aside().await;
        tracing::info!(vm = self.name, generation = ask.generation, resume_us, "activated");
        Ok(ActivateReply { vm: self.info(), resume_us })
    }

    pub(super) fn send(&mut self, request: SendRequest, events: mpsc::Sender<TransferEvent>) -> Result<(), Failure> {
        let ticket = request.ticket.clone().unwrap_or_default();
        let operation = ticket.operation.clone();
        let ask = Ask { verb: Verb::Send, generation: request.generation, operation: operation.clone() };
        self.admit(&ask)?;
        if let Some(lazy) = self.lazy_info() {
            let text =
                format!("{} pages of its RAM still come from checkpoint {}", lazy.pages_missing, lazy.checkpoint);
            return Err(refusal(&self.name, Code::Conflict, &text));
        }
        if self.runner_state.debugged.is_some() && !request.checkpoint {
            let text = "a debugger is attached: it can move when that has gone";
            return Err(refusal(&self.name, Code::Conflict, text));
        }
        let identity = Identity::parse(&request.peer_identity).ok_or_else(|| {
            refusal(&self.name, Code::BadInput, &format!("{:?} is not an identity", request.peer_identity))
        })?;
        self.check_ticket(&ticket, request.checkpoint)?;
        let runner = self.the_runner()?;
        let spaces = runner.spaces()?;
        let paused = self.record.as_ref().is_some_and(|record| record.paused);
        let base = self.base.clone();
        let cancel = CancellationToken::new();
        self.transfer = Some(Transfer {
            operation: operation.clone(),
            checkpoint: request.checkpoint,
            cancel: cancel.clone(),
            abandoned: Vec::new(),
        });
        if let Some(record) = &mut self.record {
            record.operation.clone_from(&operation);
        }
        let task = Task { leaving: Leaving { runner, paused }, spaces, request, identity, base, cancel };
        let (tls, mailbox) = (Arc::clone(&self.host.tls), self.mailbox.clone());
        tokio::spawn(async move {
            let outcome = task.run(&tls, &events).await;
            let _ended = mailbox.send(Message::Sent(Ended { operation, outcome, events }));
        });
        Ok(())
    }

    fn check_ticket(&self, ticket: &Ticket, checkpoint: bool) -> Result<(), Failure> {
        let held = self.record.as_ref().map_or(0, |record| record.generation);
        if ticket.operation.is_empty() || ticket.secret.len() != 32 {
            return Err(refusal(&self.name, Code::BadInput, "the ticket has no operation or secret"));
        }
        if ticket.vm != self.name || (!checkpoint && ticket.generation <= held) {
            return Err(refusal(&self.name, Code::Denied, "the ticket is not for this VM and a newer generation"));
        }
        Ok(())
    }

    /// A transfer from here has ended: note it, then tell it.
    pub(super) async fn sent(&mut self, ended: Ended) {
        let Ended { operation, outcome, events } = ended;
        let ours = self.transfer.take_if(|transfer| transfer.operation == operation);
        let told = match ours {
            None => Told::Failed(Failure::new(Code::Cancelled, "the VM was discarded meanwhile").into()),
            Some(transfer) => self.conclude(transfer, outcome).await,
        };
        self.publish();
        // The controller may have gone: then it asks by heartbeat what has become of it.
        let _gone = events.send(TransferEvent { event: Some(told) }).await;
    }

    async fn conclude(&mut self, transfer: Transfer, outcome: Result<Sent, Failure>) -> Told {
        let abandoned = !transfer.abandoned.is_empty();
        let told = match outcome {
            Ok(sent) if transfer.checkpoint => {
                self.clear_operation();
                self.base = Some(sent.base);
                Told::HandedOver(sent.handed_over)
            }
            Ok(sent) if !abandoned => match self.hand_over().await {
                Ok(()) => Told::HandedOver(sent.handed_over),
                Err(failure) => self.go_on(failure).await,
            },
            Ok(_) => self.go_on(Failure::new(Code::Cancelled, "abandoned")).await,
            Err(failure) => self.go_on(failure).await,
        };
        for reply in transfer.abandoned {
            let _gone = reply.send(Ok(()));
        }
        let bytes_sent = if let Told::HandedOver(handed) = &told { Some(handed.bytes_sent) } else { None };
        crate::metrics::transfer_ended(transfer.checkpoint, bytes_sent);
        told
    }

    fn clear_operation(&mut self) {
        if let Some(record) = &mut self.record {
            record.operation.clear();
        }
    }

    /// The hand-over is on disk before anybody hears of it: from here on only a word of the controller starts the guest.
    async fn hand_over(&mut self) -> Result<(), Failure> {
        let before = self.record.clone();
        if let Some(record) = &mut self.record {
            if !matches!(record.state(), VmState::Running | VmState::Paused) {
                return Err(refusal(&self.name, Code::Conflict, &format!("the guest has ended: {}", record.reason)));
            }
            record.state = VmState::HandedOver.into();
            record.reason = "handed over: waits for the controller's word".to_owned();
        }
        let saved = self.save().await;
        if saved.is_err() {
            self.record = before;
        }
        saved
    }

    /// A transfer failed before the hand-over: the guest goes on here.
    async fn go_on(&mut self, failure: Failure) -> Told {
        self.clear_operation();
        let paused = self.record.as_ref().is_some_and(|record| record.paused);
        if let Some(runner) = self.runner.clone() {
            let resumed = if paused { runner.status().await } else { runner.resume().await };
            match resumed {
                Ok(state) => self.absorb(&state),
                Err(failure) => tracing::error!(vm = self.name, %failure, "the guest could not be resumed"),
            }
        }
        tracing::warn!(vm = self.name, %failure, "a transfer from here ended without a hand-over");
        Told::Failed(failure.into())
    }

    pub(super) async fn abandon(&mut self, operation: OperationRef, reply: Reply<()>) {
        let ask = Ask { verb: Verb::Abandon, generation: 0, operation: operation.operation };
        let answer = match self.admit(&ask) {
            Ok(Answer::Ignore) => Ok(()),
            Err(failure) => Err(failure),
            Ok(_) => {
                if let Some(transfer) = &mut self.transfer {
                    transfer.cancel.cancel();
                    // Answered when the transfer has ended and the guest goes on.
                    transfer.abandoned.push(reply);
                    return;
                }
                match self.record.as_ref().map(StoredVm::state) {
                    Some(VmState::HandedOver) => self.take_back(0, "the operation was abandoned").await,
                    _ => self.discard("the operation was abandoned").await,
                }
            }
        };
        let _gone = reply.send(answer);
    }

    /// Undoes a hand-over. `sent_ns`: the heartbeat that said so, 0 if it was a call.
    pub(super) async fn take_back(&mut self, sent_ns: u64, why: &str) -> Result<(), Failure> {
        tracing::info!(vm = self.name, why, "the hand-over is undone");
        let runner = self.the_runner()?;
        let paused = self.record.as_ref().is_some_and(|record| record.paused);
        if let Some(record) = &mut self.record {
            record.state = VmState::Paused.into();
            record.reason = if paused { "paused".to_owned() } else { String::new() };
            record.operation.clear();
        }
        self.save().await?;
        let until = match sent_ns {
            0 => self.host.leases.initial(self.policy()),
            sent => self.host.leases.until(sent, self.policy()),
        };
        let leased = runner.lease(until).await?;
        let state = if paused { leased } else { runner.resume().await? };
        self.absorb(&state);
        Ok(())
    }
}

struct Task {
    leaving: Leaving,
    spaces: Spaces,
    request: SendRequest,
    identity: Identity,
    base: Option<migration::Base>,
    cancel: CancellationToken,
}

impl Task {
    async fn run(self, tls: &Tls, events: &mpsc::Sender<TransferEvent>) -> Result<Sent, Failure> {
        let wanted = self.request.policy.as_ref().map_or(0, |policy| policy.lanes);
        let lanes = if wanted == 0 { LANES } else { wanted.min(LANES_MAX) };
        let mut channels = Vec::new();
        for _ in 0..lanes {
            let connecting = tls.connect(&self.request.address, &self.identity, migration::tune_endpoint);
            let channel = tokio::select! {
                channel = connecting => channel.map_err(|error| {
                    let text = format!("{}: {}", self.request.address, super::actor::chain(&error));
                    Failure::new(Code::Unreachable, text)
                })?,
                () = self.cancel.cancelled() => return Err(Failure::new(Code::Cancelled, "cancelled")),
            };
            channels.push(channel);
        }
        let cancel = self.cancel.clone();
        let sending =
            migration::send(self.leaving, self.spaces, channels, self.request, self.base, events.clone(), self.cancel);
        tokio::pin!(sending);
        tokio::select! {
            outcome = &mut sending => outcome,
            // Nobody listens any more: the controller has gone or gave up. Without it there is no commit.
            () = events.closed() => {
                cancel.cancel();
                sending.await
            }
        }
    }
}

//! The driver of the source: opens the lanes, feeds the pure machine, does its effects.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::lane::{Posting, enclose};
use proto::seal::{DataKey, Sealer};
use proto::status::Code;
use proto::v1::lanes_client::LanesClient;
use proto::v1::transfer_event::Event;
use proto::v1::{self, BaseLeaves, Hello, Section, SendRequest, StateEnd, TransferEvent, TransferProgress};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use vmcb_engine::memory::PAGE_BYTES;
use vmcb_engine::memory::digest::PageDigests;
use vmcb_engine::snapshot::{machine_digest, state_digest};

use super::pace::Pace;
use super::workers::{Outgoing, Round, blocking};
use super::{say, words};
use crate::migration::message::Message;
use crate::migration::source::{Effect, HandedOver, Input, Plan, Source, Step};
use crate::migration::{Base, Failure, MESSAGE_BYTES_MAX, PROTOCOL, Sent, SourceVm, Spaces, THROTTLE_REPEAT};

/// Batches of frames that wait in the queue of a lane.
const QUEUE_BATCHES: usize = 3;
/// How often time passes for the machine.
const TICK_EVERY: Duration = Duration::from_millis(50);
/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// How long an `Abort` may take to leave before the lanes are cut.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long a lane's listener may take to say why the lane has ended.
const GIVE_WAY: Duration = Duration::from_millis(500);

/// Sends a VM over one lane a channel. Returns when both digests agree: the guest is stopped (a checkpoint's guest runs)
/// and the caller tells the controller so. `events` gets progress, rounds and phases; the last event (`handed_over` or
/// `failed`) is the caller's, after it has noted the new state. On failure and cancel the guest goes on by itself.
///
/// # Errors
/// Why there was no hand-over.
pub async fn send(
    vm: impl SourceVm,
    spaces: Spaces,
    lanes: Vec<Channel>,
    request: SendRequest,
    base: Option<Base>,
    events: mpsc::Sender<TransferEvent>,
    cancel: CancellationToken,
) -> Result<Sent, Failure> {
    let named = !request.base.is_empty();
    let base = base.filter(|base| named && !request.base_damaged && base.checkpoint == request.base);
    let sealer = sealer(&request)?;
    let teller = Teller::new(events);
    let mut driver = Driver::new(vm, spaces, &lanes, &request, (base.as_ref(), sealer), &teller);
    driver.open(lanes, &request, base.as_ref());
    let verify_full = request.policy.as_ref().is_some_and(|policy| policy.verify_full);
    let plan = Plan {
        lanes: driver.lanes.len() as u32,
        policy: request.policy.unwrap_or_default(),
        checkpoint: request.checkpoint,
        // Where all is compared in the end, the guest stands still meanwhile.
        freeze: request.checkpoint && driver.outgoing.spaces.keep() && !verify_full,
        mark: base.as_ref().map_or(0, |base| base.mark),
        wants_leaves: named && base.is_none(),
    };
    let ended = driver.run(Source::new(plan, 0), &cancel).await;
    let sent = driver.close(ended, request.checkpoint_id).await;
    drop(driver);
    teller.close().await;
    sent
}

/// What seals the frames of a checkpoint; a migration has none: TLS keeps it from others.
fn sealer(request: &SendRequest) -> Result<Option<Sealer>, Failure> {
    if !request.checkpoint || request.data_key.is_empty() {
        return Ok(None);
    }
    let bad = || Failure::new(Code::BadInput, "a checkpoint's key and VM id do not have the right length");
    let key = DataKey::from_slice(&request.data_key).ok_or_else(bad)?;
    let vm = request.vm_id.parse().map_err(|_| bad())?;
    Ok(Some(Sealer::new(&key, vm, proto::seal::salt())))
}

/// Passes events on without ever holding up the transfer.
struct Teller {
    queue: mpsc::UnboundedSender<TransferEvent>,
    task: JoinHandle<()>,
}

impl Teller {
    fn new(events: mpsc::Sender<TransferEvent>) -> Self {
        let (queue, mut waiting) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            while let Some(event) = waiting.recv().await {
                // A listener that has gone misses the rest; whoever started the transfer cancels it if it must end.
                let _ = events.send(event).await;
            }
        });
        Self { queue, task }
    }

    async fn close(self) {
        drop(self.queue);
        let _ = self.task.await;
    }
}

struct Driver<V> {
    vm: V,
    outgoing: Arc<Outgoing>,
    lanes: Vec<mpsc::Sender<Bytes>>,
    /// One a lane: keeps the call open and reads what comes back.
    listeners: Vec<JoinHandle<()>>,
    round: Option<JoinHandle<()>>,
    round_number: u32,
    dirty_rate: u64,
    inputs: mpsc::UnboundedReceiver<Input>,
    to_inputs: mpsc::UnboundedSender<Input>,
    events: mpsc::UnboundedSender<TransferEvent>,
    told: (Instant, u64),
    /// How far the guest is held back, and when that was last said.
    throttle: (u32, Instant),
    /// An instant is frozen, and when that was last said.
    frozen: Option<Instant>,
    /// The guest could not be let go.
    stuck: Option<Failure>,
}

impl<V: SourceVm> Driver<V> {
    fn new(
        vm: V,
        spaces: Spaces,
        lanes: &[Channel],
        request: &SendRequest,
        (base, sealer): (Option<&Base>, Option<Sealer>),
        teller: &Teller,
    ) -> Self {
        let zeros = || spaces.iter().map(|space| PageDigests::new(space.pages())).collect();
        let outgoing = Outgoing {
            digests: Mutex::new(base.map_or_else(zeros, |base| base.digests.clone())),
            buffers: Arc::default(),
            pace: Mutex::new(Pace::new(request.policy.as_ref().map_or(0, |policy| policy.bandwidth_bytes_per_s))),
            began: Instant::now(),
            over: AtomicBool::new(false),
            bytes_sent: AtomicU64::new(0),
            bytes_left: AtomicU64::new(0),
            spaces,
            sealer,
        };
        let (to_inputs, inputs) = mpsc::unbounded_channel();
        Self {
            vm,
            outgoing: Arc::new(outgoing),
            lanes: Vec::with_capacity(lanes.len()),
            listeners: Vec::with_capacity(lanes.len()),
            round: None,
            round_number: 0,
            dirty_rate: 0,
            inputs,
            to_inputs,
            events: teller.queue.clone(),
            told: (Instant::now(), 0),
            throttle: (0, Instant::now()),
            frozen: None,
            stuck: None,
        }
    }

    /// Says Hello on every lane.
    fn open(&mut self, channels: Vec<Channel>, request: &SendRequest, base: Option<&Base>) {
        let lanes = channels.len() as u32;
        if lanes == 0 {
            let _ = self.to_inputs.send(Input::Lost(Failure::new(Code::BadInput, "a transfer needs a lane")));
        }
        let ticket = request.ticket.clone().unwrap_or_default();
        for (lane, channel) in (0..).zip(channels) {
            let (queue, waiting) = mpsc::channel(QUEUE_BATCHES);
            let hello = Hello {
                protocol_min: *PROTOCOL.start(),
                protocol_max: *PROTOCOL.end(),
                operation: ticket.operation.clone(),
                secret: ticket.secret.clone(),
                lane,
                lanes,
                base: request.base.clone(),
                wants_leaves: !request.base.is_empty() && base.is_none(),
            };
            queue.try_send(say(Message::Hello(hello))).expect("the queue is new and has room");
            let outbound = Posting::new(channel, ReceiverStream::new(waiting));
            let (inputs, outgoing) = (self.to_inputs.clone(), Arc::clone(&self.outgoing));
            self.lanes.push(queue);
            self.listeners.push(tokio::spawn(async move {
                let ended = listen(lane, outbound, &outgoing, &inputs).await;
                let _ = inputs.send(Input::Lost(ended));
            }));
        }
    }

    fn now_us(&self) -> u64 {
        self.outgoing.began.elapsed().as_micros() as u64
    }

    async fn run(&mut self, mut source: Source, cancel: &CancellationToken) -> Source {
        let mut answers = VecDeque::new();
        let mut ticks = tokio::time::interval(TICK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !source.is_over() {
            let input = match answers.pop_front() {
                Some(_) if cancel.is_cancelled() => cancelled(),
                Some(answer) => answer,
                None => tokio::select! {
                    biased;
                    () = cancel.cancelled() => cancelled(),
                    Some(input) = self.inputs.recv() => input,
                    _ = ticks.tick() => self.tick().await,
                },
            };
            let Step { state, effects } = source.step(input, self.now_us());
            source = state;
            for effect in effects {
                answers.extend(self.perform(effect).await);
            }
        }
        source
    }

    /// Does an effect; returns its answer if it comes at once.
    async fn perform(&mut self, effect: Effect) -> Option<Input> {
        match effect {
            Effect::AdvanceEpoch => Some(self.vm.advance_epoch().await.map_or_else(Input::Lost, Input::Epoch)),
            Effect::Stop => Some(self.vm.stop().await.map_or_else(Input::Lost, |()| Input::Stopped)),
            Effect::Capture => Some(self.vm.capture().await.map_or_else(Input::Lost, Input::Captured)),
            Effect::Throttle { percent } => self.hold_back(percent).await.err().map(Input::Lost),
            Effect::Resume => {
                self.stuck = self.vm.resume().await.err();
                None
            }
            Effect::Freeze { since } => {
                self.frozen = Some(Instant::now());
                Some(self.vm.freeze(since).await.unwrap_or_else(Input::Lost))
            }
            Effect::Thaw => {
                self.frozen = None;
                self.vm.thaw().await.err().map(Input::Lost)
            }
            Effect::SendRound { round, since, until, last, instant } => {
                self.send_round(Round { number: round, since, until, last, instant });
                None
            }
            Effect::MeasureLeft { since } => {
                // The guest runs: time to bring the digests up to date, so that little is left to do when it stands.
                let settled = Arc::clone(&self.outgoing);
                let settled = blocking(move || drop(settled.roots())).await;
                let measured = match settled {
                    Ok(()) => self.measure(since).await,
                    Err(failure) => Err(failure),
                };
                Some(measured.unwrap_or_else(Input::Lost))
            }
            Effect::Look { since } => {
                let looked = match self.vm.look().await {
                    Ok(()) => self.left_bytes(since).await,
                    Err(failure) => Err(failure),
                };
                Some(looked.map_or_else(Input::Lost, |bytes| Input::Looked { since, bytes }))
            }
            Effect::Digest { sections, verify_full } => {
                Some(self.digest(sections, verify_full).await.map_or_else(Input::Lost, Input::Digested))
            }
            Effect::SendState { sections, digest, verify_full, stopped_us } => {
                let end = StateEnd {
                    sections: sections.len() as u32,
                    digest: Some(digest),
                    verify_full,
                    stopped_us,
                    ram_follows: false,
                    replay_until: None,
                };
                self.send_state(sections, end).await;
                None
            }
            Effect::AbortTarget(failure) => {
                self.outgoing.over.store(true, Ordering::Relaxed);
                if let Some(lane) = self.lanes.first() {
                    let farewell = say(Message::Abort(failure.into()));
                    let _ = tokio::time::timeout(FAREWELL, lane.send(farewell)).await;
                }
                None
            }
            Effect::ReportRound(report) => {
                self.dirty_rate = report.dirty_rate;
                self.tell(Event::Round(report));
                None
            }
            Effect::ReportPhase(report) => {
                self.tell(Event::Phase(report));
                None
            }
        }
    }

    /// Hardware's writes are stamped when an epoch ends, and not before.
    async fn measure(&mut self, since: u32) -> Result<Input, Failure> {
        let epoch = self.vm.advance_epoch().await?;
        Ok(Input::Left { bytes: self.left_bytes(since).await?, epoch })
    }

    async fn left_bytes(&self, since: u32) -> Result<u64, Failure> {
        let outgoing = Arc::clone(&self.outgoing);
        blocking(move || outgoing.left_bytes(since)).await?
    }

    async fn tick(&mut self) -> Input {
        if self.told.0.elapsed() >= PROGRESS_EVERY {
            self.tell_progress();
        }
        if self.frozen.is_some_and(|said| said.elapsed() >= THROTTLE_REPEAT) {
            self.frozen = Some(Instant::now());
            if let Err(failure) = self.vm.stay_frozen().await {
                return Input::Lost(failure);
            }
        }
        let (percent, said) = self.throttle;
        match percent > 0 && said.elapsed() >= THROTTLE_REPEAT {
            true => self.hold_back(percent).await.map_or_else(Input::Lost, |()| self.time()),
            false => self.time(),
        }
    }

    fn time(&self) -> Input {
        Input::Tick { bytes_sent: self.outgoing.bytes_sent.load(Ordering::Relaxed) }
    }

    async fn hold_back(&mut self, percent: u32) -> Result<(), Failure> {
        self.throttle = (percent, Instant::now());
        self.vm.throttle(percent).await
    }

    fn send_round(&mut self, round: Round) {
        self.round_number = round.number;
        let (outgoing, lanes, inputs) = (Arc::clone(&self.outgoing), self.lanes.clone(), self.to_inputs.clone());
        self.round = Some(tokio::spawn(async move {
            let input = outgoing.send(round, lanes).await.map_or_else(Input::Lost, Input::RoundSent);
            if matches!(&input, Input::Lost(failure) if failure.code == Code::Unreachable) {
                give_way().await;
            }
            let _ = inputs.send(input);
        }));
    }

    async fn digest(&self, sections: Vec<Section>, verify_full: bool) -> Result<v1::MachineDigest, Failure> {
        let outgoing = Arc::clone(&self.outgoing);
        let roots = blocking(move || {
            if verify_full {
                outgoing.verify()?;
            }
            Ok(outgoing.roots())
        });
        let roots = roots.await??;
        let (ram, disks) = roots.split_first().expect("there is always RAM");
        Ok(machine_digest(*ram, state_digest(&sections), disks))
    }

    async fn send_state(&self, sections: Vec<Section>, end: StateEnd) {
        let frame = |section| {
            let frame = Message::Section(section).encode();
            match &self.outgoing.sealer {
                Some(sealer) => enclose(&sealer.seal(&frame)),
                None => enclose(&frame),
            }
        };
        let frames = sections.into_iter().map(frame).chain([say(Message::StateEnd(end))]);
        for frame in frames {
            if self.lanes[0].send(frame).await.is_err() {
                give_way().await;
                let _ = self.to_inputs.send(Input::Lost(Failure::new(Code::Unreachable, "lane 0 was lost")));
                return;
            }
        }
    }

    fn tell(&self, event: Event) {
        let _ = self.events.send(TransferEvent { event: Some(event) });
    }

    fn tell_progress(&mut self) {
        let sent = self.outgoing.bytes_sent.load(Ordering::Relaxed);
        let (then, before) = std::mem::replace(&mut self.told, (Instant::now(), sent));
        let us = then.elapsed().as_micros().max(1);
        let bytes_per_s = u128::from(sent - before) * 1_000_000 / us;
        self.tell(Event::Progress(TransferProgress {
            round: self.round_number,
            bytes_sent: sent,
            bytes_remaining: self.outgoing.bytes_left.load(Ordering::Relaxed),
            bytes_per_s: bytes_per_s.min(u64::MAX.into()) as u64,
            dirty_rate: self.dirty_rate,
            throttle_percent: self.throttle.0,
        }));
    }

    /// Ends threads and lanes; makes the result.
    async fn close(&mut self, ended: Source, operation: String) -> Result<Sent, Failure> {
        self.outgoing.over.store(true, Ordering::Relaxed);
        self.lanes.clear();
        // After a hand-over nothing more is to be said, and the guest stands still. Otherwise lanes end by themselves when
        // the target has read the farewell; those that hang are cut.
        let patience = if matches!(ended, Source::HandedOver(_)) { Duration::ZERO } else { FAREWELL };
        let deadline = tokio::time::Instant::now() + patience;
        for listener in &mut self.listeners {
            if tokio::time::timeout_at(deadline, &mut *listener).await.is_err() {
                listener.abort();
            }
        }
        if let Some(round) = self.round.take() {
            let _ = round.await;
        }
        let stuck = self.stuck.take();
        match ended {
            Source::HandedOver(state) => Ok(self.sent(state, operation)),
            Source::Failed(state) => Err(match stuck {
                None => state.failure,
                Some(stuck) => Failure {
                    reason: format!("{}; and the guest cannot be resumed: {stuck}", state.failure),
                    ..state.failure
                },
            }),
            Source::Connecting(_)
            | Source::Precopy(_)
            | Source::Frozen(_)
            | Source::Stopping(_)
            | Source::LastPages(_)
            | Source::Comparing(_) => Err(Failure::new(Code::Internal, "the driver ended before its machine")),
        }
    }

    fn sent(&self, state: HandedOver, checkpoint: String) -> Sent {
        let digests = self.outgoing.digests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let handed_over = v1::HandedOver {
            source: Some(state.source),
            target: Some(state.target),
            bytes_sent: self.outgoing.bytes_sent.load(Ordering::Relaxed),
            ram_bytes: self.outgoing.spaces[0].pages() * PAGE_BYTES,
            stopped_us: state.stopped_us,
        };
        Sent { handed_over, base: Base { checkpoint, mark: state.mark, digests } }
    }
}

/// A lane whose queue has gone away has a listener that knows why; its word goes first.
async fn give_way() {
    tokio::time::sleep(GIVE_WAY).await;
}

fn cancelled() -> Input {
    Input::Cancel(Failure::new(Code::Cancelled, "cancelled"))
}

/// Opens a lane and turns what comes back into inputs, until it ends; returns how.
async fn listen(
    lane: u32,
    outbound: Posting<ReceiverStream<Bytes>>,
    outgoing: &Outgoing,
    inputs: &mpsc::UnboundedSender<Input>,
) -> Failure {
    let lost = |what: &str, status: &tonic::Status| {
        let text = format!("lane {lane} {what}: {}", words(status));
        let code = if status.code() == tonic::Code::PermissionDenied { Code::Denied } else { Code::Unreachable };
        Failure::new(code, text)
    };
    let mut client = LanesClient::new(outbound).max_decoding_message_size(MESSAGE_BYTES_MAX);
    // The body is the queue's, not this stream's.
    let mut inbound = match client.lane(tokio_stream::empty()).await {
        Ok(response) => response.into_inner(),
        Err(status) => return lost("was not opened", &status),
    };
    loop {
        let input = match inbound.message().await {
            Ok(Some(chunk)) => match Message::decode(&chunk.frame) {
                Ok(Message::BaseLeaves(told)) if lane == 0 => match learn(outgoing, &told) {
                    Some(input) => input,
                    None => continue,
                },
                message => input(lane, message),
            },
            Ok(None) => return Failure::new(Code::Unreachable, format_args!("lane {lane} was closed by the target")),
            Err(status) => return lost("was lost", &status),
        };
        let _ = inputs.send(input);
    }
}

/// What the target says of its base goes straight to who compares with it; the machine hears of the end.
fn learn(outgoing: &Outgoing, told: &BaseLeaves) -> Option<Input> {
    match outgoing.learn(told) {
        Ok(()) => told.last.then_some(Input::LeavesTold),
        Err(failure) => Some(Input::Lost(failure)),
    }
}

fn input(lane: u32, message: Result<Message, proto::frame::FrameError>) -> Input {
    match message {
        Ok(Message::HelloReply(reply)) => Input::Replied { lane, protocol: reply.protocol },
        Ok(Message::RoundAck(ack)) if lane == 0 => Input::Acked { round: ack.round },
        Ok(Message::Ready(ready)) if lane == 0 => match ready.digest {
            Some(digest) => Input::Ready(digest),
            None => Input::Lost(Failure::new(Code::Protocol, "Ready without a digest")),
        },
        Ok(Message::Abort(abort)) => Input::Aborted(Failure::new(Code::from_number(abort.code), abort.reason)),
        Ok(
            other @ (Message::Pages(_)
            | Message::Section(_)
            | Message::Journal(_)
            | Message::Hello(_)
            | Message::BaseLeaves(_)
            | Message::RoundEnd(_)
            | Message::RoundAck(_)
            | Message::StateEnd(_)
            | Message::Ready(_)),
        ) => {
            let text = format_args!("the target sent {} on lane {lane}", other.name());
            Input::Lost(Failure::new(Code::Protocol, text))
        }
        Err(error) => Input::Lost(Failure::new(Code::Corrupt, format_args!("lane {lane}: {error}"))),
    }
}

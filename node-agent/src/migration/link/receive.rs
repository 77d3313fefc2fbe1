//! The driver of the target: one thread a lane lands its pages in order; the pure machine is behind a lock that is held
//! only for its steps.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use bytes::Bytes;
use proto::frame::FrameError;
use proto::ids::Digest;
use proto::status::Code;
use proto::v1::{self, Chunk, Hello, HelloReply, MachineDigest, RoundAck, Section, Ticket};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;
use vmcb_engine::memory::digest::PageDigests;
use vmcb_engine::memory::shared::SharedPages;
use vmcb_engine::transfer::receive::{ReceiveError, land_all};

use super::workers::blocking;
use super::{chunk, words};
use crate::migration::message::Message;
use crate::migration::target::{Effect, Input, Replay, Step, Target};
use crate::migration::{Failure, Spaces, TargetVm};

/// Batches of frames of a lane that wait for its thread.
const QUEUE_BATCHES: usize = 3;
/// Frames that go to the thread together, if they are there already: many small ones, or one large one.
const BATCH_FRAMES: usize = 64;
const BATCH_BYTES: usize = 256 << 10;

/// What goes back on a lane.
pub type Replies = UnboundedReceiverStream<Result<Chunk, Status>>;
type ReplyQueue = mpsc::UnboundedSender<Result<Chunk, Status>>;

/// Where a receiver is.
#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    /// The ticket has not been presented.
    Waiting,
    /// Lanes are open.
    Receiving,
    /// Everything is applied and both digests agree: it may be activated.
    Ready(MachineDigest),
    /// Over: discard it.
    Failed(Failure),
}

/// The target of one prepared VM. Cheap to clone; the VM is let go when the last clone is dropped.
#[derive(Clone)]
pub struct Receiver(Arc<Shared>);

struct Shared {
    /// `None` only during a step.
    target: Mutex<Option<Target>>,
    spaces: Spaces,
    lazy: bool,
    digests: Mutex<Vec<PageDigests>>,
    replies: Mutex<BTreeMap<u32, ReplyQueue>>,
    apply: mpsc::UnboundedSender<Apply>,
    phase: watch::Sender<Phase>,
    began: Instant,
}

struct Apply {
    sections: Vec<Section>,
    verify_full: bool,
    ram: Option<Digest>,
    replay: Option<Replay>,
}

impl Receiver {
    /// Waits for the holder of the ticket. The spaces must be zero. Must be called inside the runtime; reads the spaces if
    /// they are not holes. `lazy`: RAM follows while the guest runs.
    ///
    /// # Errors
    /// Spaces that hold something already.
    pub fn new(ticket: Ticket, spaces: Spaces, vm: impl TargetVm, lazy: bool) -> Result<Receiver, Failure> {
        for (number, space) in spaces.iter().enumerate() {
            if !space.is_zero().map_err(|e| Failure::new(Code::Internal, words(&e)))? {
                return Err(Failure::new(
                    Code::Conflict,
                    format_args!("space {number} of the target holds data already"),
                ));
            }
        }
        let (apply, orders) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            target: Mutex::new(Some(Target::new(ticket, 0))),
            digests: Mutex::new(spaces.iter().map(|space| PageDigests::new(space.pages())).collect()),
            spaces,
            lazy,
            replies: Mutex::default(),
            apply,
            phase: watch::Sender::new(Phase::Waiting),
            began: Instant::now(),
        });
        tokio::spawn(obey(vm, orders, Arc::downgrade(&shared)));
        Ok(Self(shared))
    }

    /// Serves one lane whose hello has been read; returns what is to be sent back. Refusals come as an `Abort` message.
    pub fn lane<S>(&self, hello: Hello, mut inbound: S) -> Replies
    where
        S: Stream<Item = Result<Chunk, Status>> + Send + Unpin + 'static,
    {
        let (queue, replies) = mpsc::unbounded_channel();
        let lane = hello.lane;
        match self.0.say_hello(hello, &queue) {
            Err(failure) => {
                let _ = queue.send(Ok(super::refusal(failure)));
            }
            Ok(()) => {
                let (to_thread, batches) = mpsc::channel(QUEUE_BATCHES);
                let shared = Arc::clone(&self.0);
                tokio::task::spawn_blocking(move || shared.serve(lane, batches));
                tokio::spawn(async move {
                    loop {
                        let batch = next_batch(&mut inbound).await;
                        let is_end = batch.end.is_some();
                        if to_thread.send(batch).await.is_err() || is_end {
                            return;
                        }
                    }
                });
            }
        }
        UnboundedReceiverStream::new(replies)
    }

    /// Ends it, any time before the activation. Repeatable.
    pub fn abandon(&self, reason: &str) {
        self.0.step(Input::Abandon { reason: reason.to_owned() });
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.0.phase.borrow().clone()
    }

    /// Waits until it is `Ready` or `Failed`.
    ///
    /// # Errors
    /// Why it failed.
    pub async fn finished(&self) -> Result<MachineDigest, Failure> {
        let mut phases = self.0.phase.subscribe();
        loop {
            match phases.borrow_and_update().clone() {
                Phase::Ready(digest) => return Ok(digest),
                Phase::Failed(failure) => return Err(failure),
                Phase::Waiting | Phase::Receiving => (),
            }
            if phases.changed().await.is_err() {
                return Err(Failure::new(Code::Internal, "the receiver has gone"));
            }
        }
    }
}

/// What has arrived on a lane, and why nothing more will come, if so.
#[derive(Default)]
struct Arrived {
    frames: Vec<Bytes>,
    end: Option<String>,
}

/// Waits for a frame, and takes those that are there already with it.
async fn next_batch(inbound: &mut (impl Stream<Item = Result<Chunk, Status>> + Unpin)) -> Arrived {
    let mut batch = Arrived::default();
    let mut next = inbound.next().await;
    let mut bytes = 0;
    loop {
        match next {
            Some(Ok(chunk)) => {
                bytes += chunk.frame.len();
                batch.frames.push(chunk.frame);
            }
            Some(Err(status)) => batch.end = Some(words(&status)),
            None => batch.end = Some("the source closed it".to_owned()),
        }
        if batch.end.is_some() || batch.frames.len() >= BATCH_FRAMES || bytes >= BATCH_BYTES {
            return batch;
        }
        next = tokio::select! {
            biased;
            item = inbound.next() => item,
            () = std::future::ready(()) => return batch,
        };
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Steps the machine and does its effects, in order; returns whether pages may still come.
    fn step(&self, input: Input) -> bool {
        let mut target = lock(&self.target);
        let effects = self.advance(&mut target, input);
        let receiving = matches!(*target, Some(Target::Receiving(_)));
        self.perform(effects);
        receiving
    }

    fn advance(&self, target: &mut Option<Target>, input: Input) -> Vec<Effect> {
        let before = target.take().expect("put back by every step");
        let Step { state, effects } = before.step(input, self.began.elapsed().as_micros() as u64);
        let phase = match &state {
            Target::Waiting(_) => Phase::Waiting,
            Target::Receiving(_) | Target::Sections(_) | Target::Applying(_) => Phase::Receiving,
            Target::Ready(state) => Phase::Ready(state.digest.clone()),
            Target::Failed(state) => Phase::Failed(state.failure.clone()),
        };
        *target = Some(state);
        self.phase.send_if_modified(|now| {
            let changed = *now != phase;
            *now = phase;
            changed
        });
        effects
    }

    /// Does effects other than those of a hello.
    fn perform(&self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Ack { round } => self.reply(Message::RoundAck(RoundAck { round })),
                Effect::SayReady(digest) => self.reply(Message::Ready(v1::Ready { digest: Some(digest) })),
                Effect::Settle => {
                    for digests in lock(&self.digests).iter_mut() {
                        digests.root();
                    }
                }
                Effect::Apply { sections, verify_full, ram, replay } => {
                    let _ = self.apply.send(Apply { sections, verify_full, ram, replay });
                }
                Effect::AbortSource(failure) => {
                    // Dropping the queues ends the streams after the farewell.
                    for (_, queue) in std::mem::take(&mut *lock(&self.replies)) {
                        let _ = queue.send(Ok(super::refusal(failure.clone())));
                    }
                }
                Effect::Accept { .. } | Effect::Refuse(_) => unreachable!("only a hello is accepted or refused"),
            }
        }
    }

    /// On lane 0. A lane that has gone is noticed by its reader.
    fn reply(&self, message: Message) {
        if let Some(queue) = lock(&self.replies).get(&0) {
            let _ = queue.send(Ok(chunk(message)));
        }
    }

    fn say_hello(&self, hello: Hello, queue: &ReplyQueue) -> Result<(), Failure> {
        let mut target = lock(&self.target);
        match self.advance(&mut target, Input::Hello(hello)).pop() {
            Some(Effect::Accept { lane, protocol }) => {
                let _ = queue.send(Ok(chunk(Message::HelloReply(HelloReply { protocol }))));
                lock(&self.replies).insert(lane, queue.clone());
                Ok(())
            }
            Some(Effect::Refuse(failure)) => Err(failure),
            None
            | Some(
                Effect::Ack { .. }
                | Effect::Settle
                | Effect::Apply { .. }
                | Effect::SayReady(_)
                | Effect::AbortSource(_),
            ) => unreachable!("a hello is accepted or refused, nothing else"),
        }
    }

    /// The thread of a lane: what has arrived before its end counts first.
    fn serve(&self, lane: u32, mut batches: mpsc::Receiver<Arrived>) {
        let reason = loop {
            match batches.blocking_recv() {
                Some(Arrived { frames, .. }) if !self.arrived(lane, &frames) => break "it was closed here".to_owned(),
                Some(Arrived { end: Some(reason), .. }) => break reason,
                Some(Arrived { end: None, .. }) => (),
                None => break "its reader has gone".to_owned(),
            }
        };
        self.step(Input::LaneEnded { lane, reason });
        lock(&self.replies).remove(&lane);
    }

    /// Takes frames in, in order; returns whether the lane goes on.
    fn arrived(&self, lane: u32, frames: &[Bytes]) -> bool {
        let mut pages: Vec<&[u8]> = Vec::with_capacity(frames.len());
        for frame in frames {
            match Message::decode(frame) {
                Ok(Message::Pages(_)) => {
                    if !self.step(Input::Pages { lane }) {
                        return false;
                    }
                    pages.push(frame);
                }
                other => {
                    // What it says holds for pages that are written.
                    self.land(&std::mem::take(&mut pages));
                    let _ = self.step(input(lane, other));
                }
            }
        }
        self.land(&pages);
        true
    }

    fn land(&self, frames: &[&[u8]]) {
        match land_all(&self.spaces, frames.iter().copied()) {
            Ok(landed) => {
                let mut digests = lock(&self.digests);
                landed.iter().for_each(|landed| landed.note(&mut digests));
            }
            Err(error) => {
                let _ = self.step(refused(&error));
            }
        }
    }

    fn roots(&self, verify_full: bool) -> Result<Vec<Digest>, Failure> {
        if verify_full {
            let fresh: Result<Vec<PageDigests>, _> = self.spaces.iter().map(SharedPages::digests).collect();
            *lock(&self.digests) = fresh.map_err(|e| Failure::new(Code::Internal, words(&e)))?;
        }
        Ok(lock(&self.digests).iter_mut().map(PageDigests::root).collect())
    }
}

fn refused(error: &ReceiveError) -> Input {
    match error {
        ReceiveError::Frame(_) => Input::Bad(Failure::new(Code::Corrupt, words(error))),
        ReceiveError::Outside { .. } => Input::Bad(Failure::new(Code::Protocol, words(error))),
        ReceiveError::Pages { .. } => Input::Broken(Failure::new(Code::Exhausted, words(error))),
    }
}

fn input(lane: u32, message: Result<Message, FrameError>) -> Input {
    match message {
        Ok(Message::Pages(_)) => Input::Pages { lane },
        Ok(Message::RoundEnd(end)) => Input::RoundEnd { lane, end },
        Ok(Message::Section(section)) => Input::Section { lane, section },
        Ok(Message::Journal(frame)) => Input::Journal { lane, frame },
        Ok(Message::StateEnd(end)) => Input::StateEnd { lane, end },
        Ok(Message::Abort(abort)) => Input::Aborted(Failure::new(Code::from_number(abort.code), abort.reason)),
        Ok(
            other @ (Message::Hello(_)
            | Message::HelloReply(_)
            | Message::BaseLeaves(_)
            | Message::RoundAck(_)
            | Message::Ready(_)),
        ) => {
            let text = format_args!("the source sent {} on lane {lane}", other.name());
            Input::Bad(Failure::new(Code::Protocol, text))
        }
        Err(error) => Input::Bad(Failure::new(Code::Corrupt, format_args!("lane {lane}: {error}"))),
    }
}

/// Owns the VM; applies the sections when they are complete.
async fn obey(mut vm: impl TargetVm, mut orders: mpsc::UnboundedReceiver<Apply>, shared: Weak<Shared>) {
    while let Some(Apply { sections, verify_full, ram, replay }) = orders.recv().await {
        let Some(strong) = shared.upgrade() else { return };
        if ram.is_some() != strong.lazy {
            let text = "one side wants RAM to follow while the guest runs, the other does not";
            strong.step(Input::Broken(Failure::new(Code::Protocol, text)));
            continue;
        }
        let hashing = {
            let shared = Arc::clone(&strong);
            blocking(move || shared.roots(verify_full))
        };
        let applying = async {
            vm.apply(sections).await?;
            vm.capture().await
        };
        // What is compared byte by byte must not change meanwhile.
        let (roots, captured) = match verify_full {
            true => (hashing.await, applying.await),
            false => tokio::join!(hashing, applying),
        };
        // What was compared is what arrived; what the recording makes of it comes after.
        let captured = match (captured, replay) {
            (Ok(captured), Some(replay)) => vm.replay(replay).await.map(|()| captured),
            (captured, _) => captured,
        };
        let input = match (roots.and_then(|roots| roots), captured) {
            (Ok(roots), Ok(sections)) => {
                let (arrived, disks) = roots.split_first().expect("there is always RAM");
                Input::Applied { sections, ram: ram.unwrap_or(*arrived), disks: disks.to_vec() }
            }
            (Err(failure), _) | (_, Err(failure)) => Input::Broken(failure),
        };
        strong.step(input);
    }
}

//! A checkpoint taken in: the I/O around [`Assembly`].
//!
//! Frames are checked and hashed beside the runtime, packs are written while the next ones fill (at most [`PUTS_MAX`]
//! at a time, which is what slows a source that is faster than the bucket). The last round is acknowledged when it has
//! arrived, so that the guest can go on; `Ready` follows only when packs and manifest are durable, in this order.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use proto::ids::{CheckpointId, Generation, VmId};
use proto::seal::{DataKey, Opener, Sealer};
use proto::status::Code;
use proto::v1::lane_message::Message as Said;
use proto::v1::{BaseLeaves, Chunk, Hello, HelloReply, MachineConfig, Manifest, Ready, RoundAck};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch};
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::assembly::{Assembly, Checked, Desk, Effect, IngestError, LANES_MAX, spaces};
use super::layers::{Base, Laid, Layers, Sink};
use super::manifest::{self, regions};
use super::map::Region;
use super::owner::Claim;
use super::pack::Pack;
use super::read::{Reader, beside};
use super::{Outgoing, PROTOCOL, say};
use crate::bucket::{Bucket, manifest_key, pack_key};
use crate::failure::Failure;
use crate::ledger::event::CheckpointEntry;
use crate::ledger::unix_ms;

/// Packs of a checkpoint that are being written at a time.
const PUTS_MAX: usize = 3;
/// Packs of all checkpoints that are being written at a time: they are what takes memory.
static PUTS: Semaphore = Semaphore::const_new(4);

/// What is going to be received.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Its id.
    pub checkpoint: CheckpointId,
    /// Name of the VM.
    pub vm: String,
    /// The VM's id.
    pub vm_id: VmId,
    /// Generation of the VM.
    pub generation: Generation,
    /// Whose that is.
    pub claim: Claim,
    /// The machine.
    pub config: MachineConfig,
    /// CPU contract.
    pub capabilities: Vec<u8>,
    /// `IsolationPolicy` of the VM.
    pub on_isolation: i32,
    /// The VM's checkpoint policy, encoded; may be empty.
    pub policy: Vec<u8>,
    /// Manifests of the checkpoints that it may build on, the best first.
    pub bases: Vec<String>,
    /// Keys of packs that are known to be missing or damaged.
    pub damaged: BTreeSet<String>,
}

enum Stage {
    /// Nobody said Hello yet.
    Empty,
    /// Frames come in.
    Open { assembly: Box<Assembly>, joined: Vec<bool>, back: Option<Outgoing> },
    /// The last frame came in, or it failed.
    Closed,
}

/// A checkpoint that is being taken in.
pub struct Ingest {
    expected: Expected,
    reader: Reader,
    desk: Desk,
    key: DataKey,
    base: Option<Base>,
    stage: Mutex<Stage>,
    puts: Puts,
    result: watch::Sender<Option<Result<CheckpointEntry, Failure>>>,
}

impl Ingest {
    /// Waits for lanes. What arrives is sealed under `key`, or will be; it may build on `base`.
    pub fn new(expected: Expected, reader: Reader, key: DataKey, base: Option<Base>) -> Arc<Ingest> {
        let sealer = Arc::new(Sealer::new(&key, expected.vm_id, proto::seal::salt()));
        Arc::new(Ingest {
            desk: Desk { opener: Opener::new(key.clone(), expected.vm_id), sealer },
            key,
            base,
            expected,
            reader,
            stage: Mutex::new(Stage::Empty),
            puts: Puts::new(),
            result: watch::Sender::new(None),
        })
    }

    /// The checkpoint, once it is durable.
    ///
    /// # Errors
    /// Why it is not.
    pub async fn finished(&self) -> Result<CheckpointEntry, Failure> {
        let mut result = self.result.subscribe();
        let result = result.wait_for(Option::is_some).await;
        let lost = || Err(Failure::new(Code::Internal, "the checkpoint's result was lost"));
        result.map_or_else(|_| lost(), |result| result.clone().unwrap_or_else(lost))
    }

    /// Waits until nothing is being written any more.
    pub async fn settled(&self) {
        self.puts.all().await;
    }

    /// Why it failed, if it did.
    pub fn failure(&self) -> Option<Failure> {
        self.result.borrow().as_ref().and_then(|result| result.as_ref().err().cloned())
    }

    /// Serves one lane to its end.
    ///
    /// # Errors
    /// What ends the whole attempt.
    pub async fn lane<S>(&self, hello: &Hello, mut incoming: S, outgoing: Outgoing) -> Result<(), Failure>
    where
        S: Stream<Item = Result<Chunk, Status>> + Send + Unpin,
    {
        let lane = self.join(hello, &outgoing)?;
        let _ = outgoing.send(Ok(say(Said::HelloReply(HelloReply { protocol: PROTOCOL })))).await;
        let served = async {
            if lane == 0 && hello.wants_leaves {
                self.tell_leaves(&outgoing).await?;
            }
            self.frames(lane, &mut incoming).await
        };
        let result = tokio::select! {
            () = self.puts.failed.cancelled() => Err(Failure::new(Code::Protocol, "another lane failed")),
            result = served => result,
        };
        if let Err(failure) = &result {
            self.fail(failure);
        }
        result
    }

    fn stage(&self) -> std::sync::MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, failure: &Failure) {
        *self.stage() = Stage::Closed;
        self.puts.failed.cancel();
        self.result.send_if_modified(|result| {
            let first = result.is_none();
            result.get_or_insert_with(|| Err(failure.clone()));
            first
        });
    }

    fn join(&self, hello: &Hello, outgoing: &Outgoing) -> Result<usize, Failure> {
        let protocol = |text: String| Failure::new(Code::Protocol, text);
        let (lane, lanes) = (hello.lane as usize, hello.lanes as usize);
        if lane >= lanes || lanes > LANES_MAX {
            return Err(protocol(format!("lane {lane} of {lanes}; at most {LANES_MAX} are served")));
        }
        let full = hello.base.is_empty();
        if !full && self.base_id() != Some(&hello.base) {
            return Err(protocol(format!("the source builds on {}, which is not here", hello.base)));
        }
        let mut stage = self.stage();
        if matches!(*stage, Stage::Empty) {
            let Expected { checkpoint, generation, config, .. } = &self.expected;
            let (id, sealer) = (checkpoint.to_string(), self.desk.sealer.clone());
            let assembly = Box::new(Assembly::new(&id, *generation, config, lanes, full, sealer));
            *stage = Stage::Open { assembly, joined: vec![false; lanes], back: None };
        }
        match &mut *stage {
            Stage::Open { joined, back, .. } => {
                if joined.len() != lanes || std::mem::replace(&mut joined[lane], true) {
                    return Err(protocol(format!("lane {lane} of {lanes} does not fit the others")));
                }
                if lane == 0 {
                    *back = Some(outgoing.clone());
                }
                Ok(lane)
            }
            Stage::Empty | Stage::Closed => Err(protocol("the checkpoint is over".into())),
        }
    }

    fn base_id(&self) -> Option<&String> {
        self.base.as_ref().map(|base| &base.opened.manifest.checkpoint)
    }

    /// Tells a source that has no memory of the base what the base holds; what is lost has a digest that no page has.
    async fn tell_leaves(&self, outgoing: &Outgoing) -> Result<(), Failure> {
        if let Some(base) = &self.base {
            let spaces = spaces(&self.expected.config);
            for ((space, first_page, pages), stated) in regions(&spaces).zip(&base.opened.manifest.regions) {
                if stated.layers.is_empty() {
                    continue;
                }
                let zero = Region::zero(space, first_page, pages);
                let region = self.reader.region(&base.opened, stated, zero).await?;
                let lost = |page: &usize| region.pack(*page).is_some_and(|pack| base.lost.contains(&pack));
                let mut leaves = region.leaves().to_vec();
                (0..leaves.len()).filter(lost).for_each(|page| leaves[page] = [0; 32]);
                let said = BaseLeaves { space, first_page, leaves: leaves.into_flattened(), last: false };
                let _ = outgoing.send(Ok(say(Said::BaseLeaves(said)))).await;
            }
        }
        let said = BaseLeaves { last: true, ..BaseLeaves::default() };
        let _ = outgoing.send(Ok(say(Said::BaseLeaves(said)))).await;
        Ok(())
    }

    async fn frames<S>(&self, lane: usize, incoming: &mut S) -> Result<(), Failure>
    where
        S: Stream<Item = Result<Chunk, Status>> + Send + Unpin,
    {
        while let Some(chunk) = incoming.next().await {
            let frame = chunk.map_err(|status| Failure::from_status(&self.expected.vm, &status))?.frame;
            let desk = self.desk.clone();
            let checked = beside(move || desk.check(&frame)).await?;
            let checked = checked.map_err(|source| IngestError::Frame { lane, source })?;
            if self.take(lane, checked).await? {
                return Ok(());
            }
        }
        match &*self.stage() {
            Stage::Open { assembly, .. } if !assembly.may_end(lane) => {
                Err(Failure::new(Code::Unreachable, format!("lane {lane} was cut")))
            }
            _ => Ok(()),
        }
    }

    /// Takes a frame and does what follows; true when everything is done.
    async fn take(&self, lane: usize, checked: Checked) -> Result<bool, Failure> {
        let (effects, back) = match &mut *self.stage() {
            Stage::Open { assembly, back, .. } => (assembly.take(lane, checked)?, back.clone()),
            Stage::Empty | Stage::Closed => return Err(Failure::new(Code::Protocol, "the checkpoint is over")),
        };
        for effect in effects {
            match effect {
                Effect::Put(pack) => self.put_beside(pack).await,
                Effect::Ack(round) => send(back.as_ref(), say(Said::RoundAck(RoundAck { round }))).await,
                Effect::Complete => {
                    self.complete(back.as_ref()).await?;
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    async fn put_beside(&self, pack: Pack) {
        let key = pack_key(&self.expected.vm_id.to_string(), self.expected.generation, pack.id);
        let result = self.result.clone();
        let tell = move |failure: Failure| {
            result.send_if_modified(|result| {
                let first = result.is_none();
                result.get_or_insert(Err(failure));
                first
            });
        };
        self.puts.put(self.reader.bucket.clone(), key, pack, tell).await;
    }

    async fn complete(&self, back: Option<&Outgoing>) -> Result<(), Failure> {
        let Stage::Open { assembly, .. } = std::mem::replace(&mut *self.stage(), Stage::Closed) else {
            return Err(Failure::new(Code::Protocol, "the checkpoint is over"));
        };
        let full = assembly.is_full();
        let (received, rest) = beside(move || assembly.finish()).await??;
        if let Some(pack) = rest {
            self.put_beside(pack).await;
        }
        let spaces = spaces(&self.expected.config);
        let checkpoint = self.expected.checkpoint.to_string();
        let layers = Layers {
            reader: &self.reader,
            base: self.base.as_ref().filter(|_| !full),
            desk: &self.desk,
            spaces: &spaces,
            sink: Beside(self),
            checkpoint: &checkpoint,
            generation: self.expected.generation,
        };
        let laid = layers.lay(received).await?;
        self.puts.all().await;
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let digest = laid.digest.clone();
        let entry = self.write_manifest(laid).await?;
        tracing::debug!(checkpoint, "durable");
        metrics::counter!(crate::metrics::CHECKPOINT_BYTES).increment(entry.own_bytes);
        self.result.send_replace(Some(Ok(entry)));
        send(back, say(Said::Ready(Ready { digest: Some(digest) }))).await;
        Ok(())
    }

    async fn write_manifest(&self, laid: Laid) -> Result<CheckpointEntry, Failure> {
        let Expected { checkpoint, vm, vm_id, generation, config, capabilities, on_isolation, policy, .. } =
            self.expected.clone();
        let manifest = Manifest {
            major: manifest::MAJOR,
            checkpoint: checkpoint.to_string(),
            vm_name: vm,
            vm_id: vm_id.to_string(),
            generation: generation.0,
            created_unix_ms: unix_ms(),
            config: Some(config),
            capabilities,
            sections: laid.sections,
            regions: laid.regions,
            packs: laid.packs.iter().map(super::map::PackAt::message).collect(),
            digest: Some(laid.digest),
            parent: self.base_id().cloned().unwrap_or_default(),
            stop_us: laid.stopped_us,
            own_bytes: self.puts.bytes(),
            on_isolation,
            policy,
            ..Manifest::default()
        };
        let wrapped = self.reader.keys.wrap(vm_id, &self.key);
        let bytes = manifest::encode(&manifest, &self.desk.sealer, wrapped)
            .map_err(|e| Failure::new(Code::Exhausted, e.to_string()))?;
        // Somebody else may have got the VM meanwhile, and sweep what this one needs.
        self.expected.claim.holds(&self.reader.bucket).await?;
        let key = manifest_key(&manifest.vm_id, checkpoint);
        let entry = manifest::entry(manifest, key, bytes.len() as u64);
        self.reader.bucket.put(&entry.manifest_key, bytes).await?;
        Ok(entry)
    }
}

/// Packs on their way to the bucket, a few at a time.
struct Puts {
    permits: Arc<Semaphore>,
    bytes: std::sync::atomic::AtomicU64,
    failed: CancellationToken,
}

impl Puts {
    fn new() -> Puts {
        Puts { permits: Arc::new(Semaphore::new(PUTS_MAX)), bytes: 0.into(), failed: CancellationToken::new() }
    }

    async fn put(&self, bucket: Bucket, key: String, pack: Pack, failed: impl FnOnce(Failure) + Send + 'static) {
        // The semaphore is never closed.
        let Ok(permit) = self.permits.clone().acquire_owned().await else { return };
        let Ok(among_all) = PUTS.acquire().await else { return };
        if self.failed.is_cancelled() {
            return;
        }
        self.bytes.fetch_add(pack.bytes.len() as u64, std::sync::atomic::Ordering::Relaxed);
        let over = self.failed.clone();
        tokio::spawn(async move {
            let _permits: (OwnedSemaphorePermit, SemaphorePermit<'_>) = (permit, among_all);
            if let Err(error) = bucket.put(&key, pack.bytes).await {
                failed(error.into());
                over.cancel();
            }
        });
    }

    /// Waits until every pack is written, or one has failed.
    async fn all(&self) {
        // Every permit back: nobody is writing. The semaphore is never closed.
        let _ = self.permits.acquire_many(PUTS_MAX as u32).await;
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// Packs of layers go the way of those of pages.
struct Beside<'a>(&'a Ingest);

impl Sink for Beside<'_> {
    async fn put(&mut self, pack: Pack) {
        self.0.put_beside(pack).await;
    }
}

async fn send(back: Option<&Outgoing>, chunk: Chunk) {
    if let Some(back) = back {
        // A source that has gone away is noticed by its incoming half.
        let _ = back.send(Ok(chunk)).await;
    }
}

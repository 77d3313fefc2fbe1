//! A checkpoint taken in: the I/O around [`Assembly`].
//!
//! Frames are checked and hashed beside the runtime, packs are written while the next ones fill (at most [`PUTS_MAX`]
//! at a time, which is what slows a source that is faster than the bucket). The last round is acknowledged when it has
//! arrived, so that the guest can go on; `Ready` follows only when packs and manifest are durable, in this order.

use std::sync::{Arc, Mutex, PoisonError};

use proto::ids::{CheckpointId, Generation};
use proto::status::Code;
use proto::v1::lane_message::Message as Said;
use proto::v1::{Chunk, Hello, HelloReply, MachineConfig, Manifest, Ready, RoundAck};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::assembly::{Assembly, Checked, Effect, Finished, IngestError, LANES_MAX, check};
use super::pack::Pack;
use super::{Outgoing, PROTOCOL, manifest, say};
use crate::bucket::{Bucket, manifest_key, pack_key};
use crate::failure::Failure;
use crate::ledger::event::CheckpointEntry;
use crate::ledger::unix_ms;

/// Packs that are being written at a time.
const PUTS_MAX: usize = 3;

/// What is going to be received.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Its id.
    pub checkpoint: CheckpointId,
    /// Name of the VM.
    pub vm: String,
    /// Hex of the VM's id.
    pub vm_id: String,
    /// Generation of the VM.
    pub generation: Generation,
    /// The machine.
    pub config: MachineConfig,
    /// CPU contract.
    pub capabilities: Vec<u8>,
}

impl From<IngestError> for Failure {
    fn from(error: IngestError) -> Failure {
        let code = match &error {
            IngestError::Frame { .. } | IngestError::Digest { .. } => Code::Corrupt,
            IngestError::Protocol { .. } => Code::Protocol,
            IngestError::TooLarge(_) => Code::Exhausted,
        };
        if code == Code::Corrupt {
            metrics::counter!(crate::metrics::DAMAGED).increment(1);
        }
        Failure::new(code, format!("checkpoint: {error}"))
    }
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
    bucket: Bucket,
    stage: Mutex<Stage>,
    puts: Arc<Semaphore>,
    failed: CancellationToken,
    result: watch::Sender<Option<Result<CheckpointEntry, Failure>>>,
    stopped: Mutex<Option<Instant>>,
}

impl Ingest {
    /// Waits for lanes.
    pub fn new(expected: Expected, bucket: Bucket) -> Arc<Ingest> {
        Arc::new(Ingest {
            expected,
            bucket,
            stage: Mutex::new(Stage::Empty),
            puts: Arc::new(Semaphore::new(PUTS_MAX)),
            failed: CancellationToken::new(),
            result: watch::Sender::new(None),
            stopped: Mutex::new(None),
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
        let result = tokio::select! {
            () = self.failed.cancelled() => Err(Failure::new(Code::Protocol, "another lane failed")),
            result = self.frames(lane, &mut incoming) => result,
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
        self.failed.cancel();
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
        let mut stage = self.stage();
        if matches!(*stage, Stage::Empty) {
            let id = self.expected.checkpoint.to_string();
            let assembly = Box::new(Assembly::new(&id, &self.expected.config, lanes));
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

    async fn frames<S>(&self, lane: usize, incoming: &mut S) -> Result<(), Failure>
    where
        S: Stream<Item = Result<Chunk, Status>> + Send + Unpin,
    {
        while let Some(chunk) = incoming.next().await {
            let frame = chunk.map_err(|status| Failure::from_status(&self.expected.vm, &status))?.frame;
            let checked = beside(move || check(&frame)).await?;
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
        self.note_stop(&checked);
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

    /// Remembers when the round that is open began: if it is the last one, the guest has stood still since about then.
    fn note_stop(&self, checked: &Checked) {
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        match checked {
            Checked::Pages(..) => drop(stopped.get_or_insert_with(Instant::now)),
            Checked::Message(Said::RoundEnd(end)) if !end.last => *stopped = None,
            Checked::Section(..) | Checked::Message(_) => {}
        }
    }

    async fn put_beside(&self, pack: Pack) {
        // The semaphore is never closed.
        let Ok(permit) = self.puts.clone().acquire_owned().await else { return };
        let (bucket, key, failed) = (self.bucket.clone(), self.key(&pack), self.failed.clone());
        let result = self.result.clone();
        tokio::spawn(async move {
            let _permit: OwnedSemaphorePermit = permit;
            if let Err(error) = bucket.put(&key, pack.bytes).await {
                result.send_if_modified(|result| result.replace(Err(error.into())).is_none());
                failed.cancel();
            }
        });
    }

    fn key(&self, pack: &Pack) -> String {
        pack_key(&self.expected.vm_id, self.expected.generation, pack.id)
    }

    async fn complete(&self, back: Option<&Outgoing>) -> Result<(), Failure> {
        let Stage::Open { assembly, .. } = std::mem::replace(&mut *self.stage(), Stage::Closed) else {
            return Err(Failure::new(Code::Protocol, "the checkpoint is over"));
        };
        let (finished, rest) = beside(move || assembly.finish()).await??;
        if let Some(pack) = rest {
            let key = self.key(&pack);
            self.bucket.put(&key, pack.bytes).await?;
        }
        // Every permit back means that every pack is written, or that one failed.
        let all = self.puts.acquire_many(PUTS_MAX as u32).await;
        if let (Some(failure), _) | (None, Err(failure)) =
            (self.failure(), all.map(drop).map_err(|_| Failure::new(Code::Internal, "no permit")))
        {
            return Err(failure);
        }
        let digest = finished.digest.clone();
        let entry = self.write_manifest(finished).await?;
        metrics::counter!(crate::metrics::CHECKPOINT_BYTES).increment(entry.stored_bytes);
        self.result.send_replace(Some(Ok(entry)));
        send(back, say(Said::Ready(Ready { digest: Some(digest) }))).await;
        Ok(())
    }

    async fn write_manifest(&self, finished: Finished) -> Result<CheckpointEntry, Failure> {
        let Expected { checkpoint, vm, vm_id, generation, config, capabilities } = self.expected.clone();
        let stopped = *self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let stop_us = stopped.map_or(0, |since| since.elapsed().as_micros() as u64);
        let ram_bytes = config.memory_bytes;
        let manifest = Manifest {
            major: manifest::MAJOR,
            minor: 0,
            checkpoint: checkpoint.to_string(),
            vm_name: vm.clone(),
            vm_id: vm_id.clone(),
            generation: generation.0,
            created_unix_ms: unix_ms(),
            config: Some(config),
            capabilities,
            sections: finished.sections,
            maps: finished.maps,
            packs: finished.packs,
            digest: Some(finished.digest.clone()),
            parent: String::new(),
            stop_us,
        };
        let bytes = manifest::encode(&manifest).map_err(|e| Failure::new(Code::Exhausted, e.to_string()))?;
        let entry = CheckpointEntry {
            id: manifest.checkpoint.clone(),
            vm,
            manifest_key: manifest_key(&vm_id, checkpoint),
            vm_id,
            generation: generation.0,
            created_unix_ms: manifest.created_unix_ms,
            ram_bytes,
            stored_bytes: manifest.packs.iter().map(|pack| pack.bytes).sum::<u64>() + bytes.len() as u64,
            stop_us,
            pack_keys: manifest::pack_keys(&manifest),
            digest: finished.digest,
            verified: "unverified".into(),
            own_bytes: 0,
            by_policy: false,
            sequence: 0,
        };
        self.bucket.put(&entry.manifest_key, bytes).await?;
        Ok(entry)
    }
}

async fn send(back: Option<&Outgoing>, chunk: Chunk) {
    if let Some(back) = back {
        // A source that has gone away is noticed by its incoming half.
        let _ = back.send(Ok(chunk)).await;
    }
}

/// Runs slow, pure work beside the runtime.
async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Failure::new(Code::Internal, "the worker ended"))
}

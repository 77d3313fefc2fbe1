//! A restore: the controller is the source of the lanes, and what it sends comes from packs.
//!
//! Packs are read one after the other, checked as a whole and frame by frame, and only the parts that are still current
//! are sent, spread over the lanes. There is one round, and it is the last. Zero pages are never stored and never sent.

use std::time::Duration;

use bytes::Bytes;
use proto::frame::{self, HEADER_BYTES, PAGES_MAX, PAGES_PREFIX_BYTES};
use proto::status::Code;
use proto::v1::lane_message::Message as Said;
use proto::v1::lanes_client::LanesClient;
use proto::v1::{Chunk, Hello, MachineDigest, Manifest, PageExtent, RoundEnd, StateEnd, Ticket, TransferProgress};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use super::assembly::compare;
use super::manifest::{extents_by_pack, pack_keys};
use super::{LANE_DEPTH, PROTOCOL, read, said, say};
use crate::agents::link::MESSAGE_MAX;
use crate::bucket::Bucket;
use crate::failure::Failure;

/// Lanes of a restore whose policy names none.
const LANES: u32 = 2;
/// How long a target may take to answer Hello.
const HELLO_MAX: Duration = Duration::from_secs(30);
/// The only round.
const ROUND: u32 = 1;

/// What is sent, and where to.
pub struct Load<'a> {
    /// Where the packs lie.
    pub bucket: &'a Bucket,
    /// What is sent.
    pub manifest: &'a Manifest,
    /// The right to deliver it.
    pub ticket: &'a Ticket,
    /// The target, for people.
    pub target: &'a str,
    /// Its Lanes service.
    pub channel: Channel,
    /// Lanes; 0 is as many as seem good.
    pub lanes: u32,
    /// Bytes per second over all lanes; 0 is no limit.
    pub bandwidth: u64,
    /// The target is to hash everything again from where it lies.
    pub verify_full: bool,
}

struct Lane {
    out: mpsc::Sender<Chunk>,
    frames: u64,
}

/// What the target said, or how its half of a lane ended.
type Heard = (usize, Result<Option<Said>, Failure>);

struct Session<'a> {
    load: &'a Load<'a>,
    lanes: Vec<Lane>,
    heard: mpsc::Receiver<Heard>,
    began: Instant,
    bytes: u64,
    next: usize,
    /// Reads the target's halves; ends with the session.
    _listeners: JoinSet<()>,
}

impl Load<'_> {
    /// Sends all of it; returns the digest that the target computed, which is the manifest's.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming what is damaged, the target's refusal, or [`Code::Unreachable`].
    pub async fn send(&self, progress: impl Fn(TransferProgress)) -> Result<MachineDigest, Failure> {
        let mut session = self.connect().await?;
        let total: u64 = self.manifest.packs.iter().map(|pack| pack.bytes).sum();
        let mut read_bytes = 0;
        for (number, extents) in extents_by_pack(self.manifest).into_iter().enumerate() {
            if !extents.is_empty() {
                session.send_pack(number, extents).await?;
            }
            read_bytes += self.manifest.packs[number].bytes;
            progress(session.progress(total - read_bytes));
        }
        let digest = session.finish().await?;
        compare(&self.manifest.digest.clone().unwrap_or_default(), &digest)
            .map_err(|error| Failure::new(Code::Corrupt, format!("{} holds something else: {error}", self.target)))?;
        Ok(digest)
    }

    async fn connect(&self) -> Result<Session<'_>, Failure> {
        let lanes = if self.lanes == 0 { LANES } else { self.lanes.min(super::assembly::LANES_MAX as u32) };
        let (tell, heard) = mpsc::channel(16);
        let mut listeners = JoinSet::new();
        let mut open = Vec::new();
        for lane in 0..lanes {
            let (out, outgoing) = mpsc::channel(LANE_DEPTH);
            let hello = Hello {
                protocol_min: PROTOCOL,
                protocol_max: PROTOCOL,
                operation: self.ticket.operation.clone(),
                secret: self.ticket.secret.clone(),
                lane,
                lanes,
                base: String::new(),
            };
            // There is room for one: the channel is new.
            let _ = out.send(say(Said::Hello(hello))).await;
            let mut client = LanesClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX);
            let answer = tokio::time::timeout(HELLO_MAX, client.lane(ReceiverStream::new(outgoing))).await;
            let answer = answer.map_err(|_| self.silent())?;
            let incoming = answer.map_err(|status| Failure::from_status(self.target, &status))?.into_inner();
            listeners.spawn(listen(lane as usize, self.target.to_owned(), incoming, tell.clone()));
            open.push(Lane { out, frames: 0 });
        }
        let mut session =
            Session { load: self, lanes: open, heard, began: Instant::now(), bytes: 0, next: 0, _listeners: listeners };
        for _ in 0..lanes {
            match tokio::time::timeout(HELLO_MAX, session.hear()).await.map_err(|_| self.silent())?? {
                Said::HelloReply(reply) if reply.protocol == PROTOCOL => {}
                _ => return Err(self.broke("an answer to Hello")),
            }
        }
        session.began = Instant::now();
        Ok(session)
    }

    fn silent(&self) -> Failure {
        Failure::new(Code::Unreachable, format!("{} did not answer on a lane", self.target))
    }

    fn broke(&self, expected: &str) -> Failure {
        Failure::new(Code::Protocol, format!("{} said something else than {expected}", self.target))
    }
}

impl Session<'_> {
    async fn send_pack(&mut self, number: usize, extents: Vec<(u16, PageExtent)>) -> Result<(), Failure> {
        let load = self.load;
        let bytes = read::pack(load.bucket, load.manifest, number).await?;
        let key = pack_keys(load.manifest)[number].clone();
        // A few frames at a time beside the runtime: as many as the lanes can hold.
        for group in extents.chunks(8) {
            let (key, bytes, group) = (key.clone(), bytes.clone(), group.to_vec());
            let work = move || group.iter().map(|(space, extent)| current(&key, &bytes, *space, extent)).collect();
            let frames: Result<Vec<Bytes>, Failure> = tokio::task::spawn_blocking(work)
                .await
                .map_err(|_| Failure::new(Code::Internal, "the worker ended"))?;
            for frame in frames? {
                self.send_pages(frame).await?;
            }
        }
        Ok(())
    }

    async fn send_pages(&mut self, frame: Bytes) -> Result<(), Failure> {
        self.bytes += frame.len() as u64;
        if self.load.bandwidth > 0 {
            let due = Duration::from_secs_f64(self.bytes as f64 / self.load.bandwidth as f64);
            tokio::time::sleep_until(self.began + due).await;
        }
        let lane = self.next;
        self.next = (self.next + 1) % self.lanes.len();
        self.lanes[lane].frames += 1;
        self.send(lane, Chunk { frame }).await
    }

    /// Sends, unless the target gives up meanwhile.
    async fn send(&mut self, lane: usize, chunk: Chunk) -> Result<(), Failure> {
        let out = self.lanes[lane].out.clone();
        tokio::select! {
            biased;
            heard = self.hear() => Err(heard.err().unwrap_or_else(|| self.load.broke("nothing"))),
            sent = out.send(chunk) => {
                sent.map_err(|_| Failure::new(Code::Unreachable, format!("{} closed lane {lane}", self.load.target)))
            }
        }
    }

    async fn hear(&mut self) -> Result<Said, Failure> {
        loop {
            match self.heard.recv().await {
                Some((_, Ok(Some(Said::Abort(abort))))) => {
                    let text = format!("{} gave up: {}", self.load.target, abort.reason);
                    return Err(Failure::new(Code::from_number(abort.code), text));
                }
                Some((_, Ok(Some(said)))) => return Ok(said),
                Some((0, Ok(None))) | None => {
                    return Err(Failure::new(Code::Unreachable, format!("{} closed the lanes", self.load.target)));
                }
                // A target may close the other lanes once it has all of their pages.
                Some((_, Ok(None))) => {}
                Some((_, Err(failure))) => return Err(failure),
            }
        }
    }

    async fn finish(&mut self) -> Result<MachineDigest, Failure> {
        for lane in 0..self.lanes.len() {
            let end = RoundEnd { round: ROUND, frames: self.lanes[lane].frames, last: true };
            self.send(lane, say(Said::RoundEnd(end))).await?;
        }
        match self.hear().await? {
            Said::RoundAck(ack) if ack.round == ROUND => {}
            _ => return Err(self.load.broke("RoundAck")),
        }
        let manifest = self.load.manifest;
        let keys = pack_keys(manifest);
        for (number, key) in keys.iter().enumerate() {
            let places: Vec<_> = manifest.sections.iter().filter(|place| place.pack as usize == number).collect();
            if places.is_empty() {
                continue;
            }
            let bytes = read::pack(self.load.bucket, manifest, number).await?;
            for place in places {
                let (_, frame) = read::section(key, &bytes, place)?;
                self.send(0, Chunk { frame }).await?;
            }
        }
        let end = StateEnd {
            sections: manifest.sections.len() as u32,
            digest: manifest.digest.clone(),
            verify_full: self.load.verify_full,
        };
        self.send(0, say(Said::StateEnd(end))).await?;
        match self.hear().await? {
            Said::Ready(ready) => Ok(ready.digest.unwrap_or_default()),
            _ => Err(self.load.broke("Ready")),
        }
    }

    fn progress(&self, remaining: u64) -> TransferProgress {
        let seconds = self.began.elapsed().as_secs_f64().max(0.001);
        TransferProgress {
            round: ROUND,
            bytes_sent: self.bytes,
            bytes_remaining: remaining,
            bytes_per_s: (self.bytes as f64 / seconds) as u64,
            dirty_rate: 0,
            throttle_percent: 0,
        }
    }
}

/// The frame of the pages of an extent: the stored one if all of it is current.
fn current(key: &str, bytes: &Bytes, space: u16, extent: &PageExtent) -> Result<Bytes, Failure> {
    let (run, payload) = read::pages(key, bytes, space, extent)?;
    if extent.frame_bytes as usize == HEADER_BYTES + PAGES_PREFIX_BYTES + payload.len() {
        let start = extent.offset as usize;
        return Ok(bytes.slice(start..start + extent.frame_bytes as usize));
    }
    assert!(run.pages <= PAGES_MAX, "a stored frame has at most {PAGES_MAX} pages");
    let mut part = run.begin();
    part.extend_from_slice(payload);
    frame::seal(&mut part);
    Ok(part.into())
}

async fn listen(lane: usize, target: String, mut incoming: tonic::Streaming<Chunk>, tell: mpsc::Sender<Heard>) {
    loop {
        let heard: Result<Option<Said>, Failure> = match incoming.next().await {
            Some(Ok(chunk)) => said(&chunk.frame).map(Some),
            Some(Err(status)) => Err(broken(&target, &status)),
            None => Ok(None),
        };
        let over = !matches!(heard, Ok(Some(_)));
        if tell.send((lane, heard)).await.is_err() || over {
            return;
        }
    }
}

fn broken(target: &str, status: &Status) -> Failure {
    Failure::from_status(target, status)
}

//! A restore: the controller is the source of the lanes, and what it sends comes from packs.
//!
//! Packs are read ahead, a few at a time, opened and held against the page maps beside what is being sent ([`super::letters`]),
//! and only what is current is sent, spread over the lanes. There is one round, and it is the last. Zero pages are never stored
//! and never sent. Blocks of a journal, if the guest is to go through one before it is ready, go on lane 0 between the sections and
//! StateEnd, a frame in each chunk.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proto::lane::{Buffers, Posting, enclose};
use proto::status::Code;
use proto::v1::lane_message::Message as Said;
use proto::v1::lanes_client::LanesClient;
use proto::v1::transfer_event::Event;
use proto::v1::{Chunk, Hello, MachineDigest, PhaseReport, Position, RoundEnd, StateEnd, Ticket, TransferProgress};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use super::assembly::compare;
use super::letters::{Letter, Writer};
use super::manifest::pack_key;
use super::map::{Extent, PackAt};
use super::read::{Opened, Reader, beside, by_pack, frames, pages_beside};
use super::{LANE_DEPTH, PROTOCOL, said, say};
use crate::agents::link::MESSAGE_MAX;
use crate::failure::Failure;
use crate::journal::read::Shelf;

/// Lanes of a restore whose policy names none.
const LANES: u32 = 2;
/// How long a target may take to answer Hello.
const HELLO_MAX: Duration = Duration::from_secs(30);
/// The only round.
const ROUND: u32 = 1;
/// Packs that are read and opened at a time.
const READS_MAX: usize = 3;
/// Pages that are opened in one go beside the runtime.
const GROUP_PAGES: u32 = 1024;
/// Groups of a pack that are open and not yet sent.
const GROUPS_AHEAD: usize = 1;

/// What is sent, and where to.
pub struct Load<'a> {
    /// Reads the packs.
    pub reader: &'a Reader,
    /// What is sent.
    pub opened: &'a Opened,
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
    /// RAM is not sent: it follows while the guest runs (see [`super::supply`]).
    pub lazy: bool,
    /// What the guest is to go through before it is ready.
    pub journal: Option<Journal>,
}

/// A part of a recording.
pub struct Journal {
    /// Where it lies.
    pub shelf: Shelf,
    /// Which blocks.
    pub blocks: Range<u64>,
    /// Where it ends.
    pub until: Position,
}

struct Lane {
    out: mpsc::Sender<Bytes>,
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
    pub async fn send(&self, tell: impl Fn(Event)) -> Result<MachineDigest, Failure> {
        let sent = self.send_all(tell).await;
        match sent {
            // The target met pages that are not what their frame says, and cannot know where they lie in the bucket.
            Err(failure) if failure.code == Code::Corrupt && failure.object.is_empty() => {
                Err(self.blame(failure).await)
            }
            sent => sent,
        }
    }

    async fn packs(&self) -> Result<Vec<(PackAt, Vec<Extent>)>, Failure> {
        Ok(by_pack(self.reader.extents_from(self.opened, self.lazy.into()).await?).into_iter().collect())
    }

    /// Reads everything once more, every byte of it: the failure that names what is damaged, or else this one.
    async fn blame(&self, failure: Failure) -> Failure {
        let looked = async {
            for (pack, extents) in self.packs().await? {
                let key = pack_key(&self.opened.manifest, &pack);
                let pieces = self.reader.pieces(&key, &pack, &extents).await?;
                let mut rest = &extents[..];
                while !rest.is_empty() {
                    let group = take_frames(&mut rest).to_vec();
                    pages_beside(self.opened.opener.clone(), key.clone(), pieces.clone(), group).await?;
                }
            }
            Ok::<(), Failure>(())
        };
        match looked.await {
            Err(found) if found.code == Code::Corrupt => found,
            _ => failure,
        }
    }

    async fn send_all(&self, tell: impl Fn(Event)) -> Result<MachineDigest, Failure> {
        let packs = self.packs().await?;
        let mut session = self.connect().await?;
        let mut left: u64 = packs.iter().flat_map(|(_, extents)| extents).map(|e| u64::from(e.pages)).sum();
        let buffers = Arc::new(Buffers::default());
        let mut ahead: VecDeque<Reading> = VecDeque::new();
        let mut next = packs.into_iter();
        loop {
            let more = next.by_ref().take(READS_MAX - ahead.len());
            ahead.extend(more.map(|(pack, extents)| self.read(pack, extents, buffers.clone())));
            let Some(mut reading) = ahead.pop_front() else { break };
            while let Some(group) = reading.groups.recv().await {
                for letter in group? {
                    session.send_pages(letter).await?;
                }
            }
            left -= reading.pages;
            tell(Event::Progress(session.progress(left * 4096)));
        }
        let (digest, ready_after) = session.finish().await?;
        if self.journal.is_some() {
            let ms = ready_after.as_secs_f64() * 1e3;
            tell(Event::Phase(PhaseReport { phase: "replay".into(), ms }));
        }
        compare(&self.opened.manifest.digest.clone().unwrap_or_default(), &digest)
            .map_err(|error| Failure::new(Code::Corrupt, format!("{} holds something else: {error}", self.target)))?;
        Ok(digest)
    }

    /// Reads a pack and opens it, as far ahead as there is room.
    fn read(&self, pack: PackAt, extents: Vec<Extent>, buffers: Arc<Buffers>) -> Reading {
        let (out, groups) = mpsc::channel(GROUPS_AHEAD);
        let pages = extents.iter().map(|extent| u64::from(extent.pages)).sum();
        let (reader, key, opener) =
            (self.reader.clone(), pack_key(&self.opened.manifest, &pack), self.opened.opener.clone());
        tokio::spawn(async move {
            // Nobody listens any more when the restore is over.
            let pieces = tokio::select! {
                pieces = reader.pieces(&key, &pack, &extents) => pieces,
                () = out.closed() => return,
            };
            let mut rest = &extents[..];
            let pieces = match pieces {
                Ok(pieces) => pieces,
                Err(failure) => return drop(out.send(Err(failure)).await),
            };
            let writer = Arc::new(Writer { opener, buffers, key, pieces });
            while !rest.is_empty() {
                let (group, writer) = (take_frames(&mut rest).to_vec(), writer.clone());
                let opened = beside(move || writer.write(&group)).await.flatten();
                let failed = opened.is_err();
                if out.send(opened).await.is_err() || failed {
                    return;
                }
            }
        });
        Reading { groups, pages }
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
                wants_leaves: false,
            };
            // There is room for one: the channel is new.
            let _ = out.send(enclosed(&say(Said::Hello(hello)))).await;
            let posting = Posting::new(self.channel.clone(), ReceiverStream::new(outgoing));
            let mut client = LanesClient::new(posting).max_decoding_message_size(MESSAGE_MAX);
            // The body is the queue's, not this stream's.
            let answer = tokio::time::timeout(HELLO_MAX, client.lane(tokio_stream::empty())).await;
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
    async fn send_pages(&mut self, letter: Letter) -> Result<(), Failure> {
        let lane = self.next;
        self.next = (self.next + 1) % self.lanes.len();
        self.lanes[lane].frames += letter.frames;
        self.send_paced(lane, letter.bytes, letter.frame_bytes).await
    }

    /// Sends what counts for the bandwidth.
    async fn send_paced(&mut self, lane: usize, envelopes: Bytes, frame_bytes: u64) -> Result<(), Failure> {
        self.bytes += frame_bytes;
        if self.load.bandwidth > 0 {
            let due = Duration::from_secs_f64(self.bytes as f64 / self.load.bandwidth as f64);
            tokio::time::sleep_until(self.began + due).await;
        }
        self.send(lane, envelopes).await
    }

    /// Sends, unless the target gives up meanwhile.
    async fn send(&mut self, lane: usize, envelopes: Bytes) -> Result<(), Failure> {
        let out = self.lanes[lane].out.clone();
        tokio::select! {
            biased;
            heard = self.hear() => Err(heard.err().unwrap_or_else(|| self.load.broke("nothing"))),
            sent = out.send(envelopes) => {
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

    /// Ends the round and sends the state; the target's digest, and how long it took from there until it was ready.
    async fn finish(&mut self) -> Result<(MachineDigest, Duration), Failure> {
        for lane in 0..self.lanes.len() {
            let end = RoundEnd { round: ROUND, frames: self.lanes[lane].frames, last: true };
            self.send(lane, enclosed(&say(Said::RoundEnd(end)))).await?;
        }
        match self.hear().await? {
            Said::RoundAck(ack) if ack.round == ROUND => {}
            _ => return Err(self.load.broke("RoundAck")),
        }
        let Load { reader, opened, .. } = self.load;
        let sections = reader.sections(opened).await?;
        let count = sections.len() as u32;
        for (_, frame) in sections {
            self.send(0, enclose(&frame)).await?;
        }
        if let Some(Journal { shelf, blocks, .. }) = &self.load.journal {
            let mut blocks = shelf.blocks(blocks.start, blocks.end);
            while let Some(block) = blocks.next().await? {
                self.send_paced(0, enclose(&block.frame), block.frame.len() as u64).await?;
            }
        }
        let end = StateEnd {
            sections: count,
            digest: opened.manifest.digest.clone(),
            verify_full: self.load.verify_full,
            stopped_us: 0,
            ram_follows: self.load.lazy,
            replay_until: self.load.journal.as_ref().map(|journal| journal.until),
        };
        self.send(0, enclosed(&say(Said::StateEnd(end)))).await?;
        let began = Instant::now();
        match self.hear().await? {
            Said::Ready(ready) => Ok((ready.digest.unwrap_or_default(), began.elapsed())),
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

/// Takes extents of whole frames off the front, about [`GROUP_PAGES`] of them.
pub(super) fn take_frames<'a>(rest: &mut &'a [Extent]) -> &'a [Extent] {
    let (mut pages, mut count) = (0, 0);
    for extents in frames(rest) {
        if pages >= GROUP_PAGES {
            break;
        }
        pages += extents.iter().map(|extent| extent.pages).sum::<u32>();
        count += extents.len();
    }
    let (group, after) = rest.split_at(count);
    *rest = after;
    group
}

/// A pack that is being read and opened; it ends with whoever waits for it.
struct Reading {
    /// What is to be sent, by group.
    groups: mpsc::Receiver<Result<Vec<Letter>, Failure>>,
    pages: u64,
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

fn enclosed(chunk: &Chunk) -> Bytes {
    enclose(&chunk.frame)
}

fn broken(target: &str, status: &Status) -> Failure {
    Failure::from_status(target, status)
}

//! Promises of the lanes: what is changed, cut, reordered or missing on the way is found; what is durable comes back
//! equal; and a relay changes nothing.
//!
//! A small machine is sent by hand, lane by lane; the target of a restore is another ingest behind a plain gRPC server.

mod journal;
mod supply;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use proto::frame::{self, Encoding, Kind, PAGE_BYTES, PageRun};
use proto::ids::{CheckpointId, Digest, Generation, VmId};
use proto::seal::{DataKey, Opener, Sealer};
use proto::status::Code;
use proto::v1::lane_message::Message as Said;
use proto::v1::lanes_server::{Lanes, LanesServer};
use proto::v1::{
    Chunk, DiskConfig, Hello, MachineConfig, MachineDigest, RoundEnd, Section, StateEnd, Ticket, WorkingSet,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use super::assembly::{Assembly, Desk, Effect, spaces};
use super::digest::{PageDigests, machine_digest, state_digest};
use super::layers::{Base, Layers, Sink};
use super::load::Load;
use super::manifest;
use super::owner::Claim;
use super::pack::Pack;
use super::read::Reader;
use super::receive::{Expected, Ingest};
use super::relay::Relay;
use super::{Road, Routes, said, say};
use crate::agents::host_identity;
use crate::bucket::file::tests::Scratch;
use crate::bucket::{Bucket, manifest_key};
use crate::failure::Failure;
use crate::keys::Keys;
use crate::ledger::event::CheckpointEntry;

const RAM_PAGES: u64 = 1024;
const DISK_PAGES: u64 = 20;
const LANES: usize = 2;
pub(crate) const VM: VmId = VmId([0x0d; 16]);

fn key() -> DataKey {
    DataKey::new([5; 32])
}

pub(crate) fn reader(bucket: &Bucket) -> Reader {
    Reader { bucket: bucket.clone(), keys: Keys::fixed() }
}

fn desk() -> Desk {
    let sealer = Arc::new(Sealer::new(&key(), VM, crate::entropy::bytes()));
    Desk { opener: Opener::new(key(), VM), sealer }
}

fn ingest(checkpoint: u8, bucket: &Bucket) -> Arc<Ingest> {
    Ingest::new(expected(checkpoint), reader(bucket), key(), None)
}

async fn verify(bucket: &Bucket, entry: &CheckpointEntry) -> Result<(), Failure> {
    let reader = reader(bucket);
    reader.verify(&reader.manifest(&entry.manifest_key).await?, |_, _| ()).await
}

fn config() -> MachineConfig {
    let disk =
        |shared| DiskConfig { size_bytes: DISK_PAGES * PAGE_BYTES as u64 - 512, shared, ..DiskConfig::default() };
    MachineConfig { memory_bytes: RAM_PAGES * 4096, disks: vec![disk(true), disk(false)], ..MachineConfig::default() }
}

pub(crate) fn claim(cluster: &str, generation: u64) -> Claim {
    Claim {
        vm_id: VM.to_string(),
        vm: "vm1".into(),
        generation: Generation(generation),
        since: Generation(1),
        cluster: cluster.into(),
        name: format!("controller/{cluster}"),
    }
}

fn expected(checkpoint: u8) -> Expected {
    Expected {
        checkpoint: CheckpointId([checkpoint; 8]),
        vm: "vm1".into(),
        vm_id: VM,
        generation: Generation(3),
        claim: claim("ours", 3),
        config: config(),
        capabilities: vec![1, 2],
        on_isolation: 0,
        policy: Vec::new(),
        bases: Vec::new(),
        damaged: BTreeSet::new(),
    }
}

fn ticket(source: &str, target: &str) -> Ticket {
    Ticket {
        operation: "op1".into(),
        vm: "vm1".into(),
        generation: 3,
        source: source.into(),
        target: target.into(),
        secret: vec![9; 32],
        expires_in_ms: 60_000,
    }
}

/// A frame of pages that each hold `fill`.
fn pages(space: u16, first_page: u64, pages: u32, fill: u8) -> Bytes {
    let encoding = if fill == 0 { Encoding::Zero } else { Encoding::Raw };
    let run = PageRun { first_page, pages, space, encoding };
    let mut frame = run.begin();
    frame.resize(frame.len() + run.payload_bytes(), fill);
    frame::seal(&mut frame);
    frame.into()
}

fn sections() -> Vec<Section> {
    ["cpu/0", "clock", "device/uart0"]
        .map(|name| Section { name: name.into(), major: 1, minor: 0, ignorable: false, body: name.repeat(9).into() })
        .into()
}

fn control(message: Said) -> Bytes {
    say(message).frame
}

/// The machine as the source knows it: fill of each page that is not zero.
pub(crate) type Contents = BTreeMap<(u16, u64), u8>;

fn digest(contents: &Contents) -> MachineDigest {
    let roots: Vec<Digest> = (0..)
        .zip([RAM_PAGES, DISK_PAGES])
        .map(|(space, pages)| {
            let mut digests = PageDigests::new(pages);
            for ((_, page), fill) in contents.iter().filter(|((of, _), _)| *of == space) {
                digests.set(*page, *blake3::hash(&[*fill; PAGE_BYTES]).as_bytes());
            }
            digests.root()
        })
        .collect();
    machine_digest(&roots, state_digest(&sections()))
}

/// Frames of each lane for rounds of (space, first page, pages, fill); every run goes to the lane of its index.
fn script(rounds: &[Vec<(u16, u64, u32, u8)>]) -> (Vec<Vec<Bytes>>, MachineDigest) {
    let mut lanes = vec![Vec::new(); LANES];
    let mut contents = Contents::new();
    for (number, round) in rounds.iter().enumerate() {
        let mut frames = [0; LANES];
        for (at, (space, first, count, fill)) in round.iter().enumerate() {
            lanes[at % LANES].push(pages(*space, *first, *count, *fill));
            frames[at % LANES] += 1;
            for page in *first..first + u64::from(*count) {
                contents.insert((*space, page), *fill);
            }
        }
        for (lane, frames) in frames.into_iter().enumerate() {
            let end = RoundEnd { round: number as u32 + 1, frames, last: number + 1 == rounds.len() };
            lanes[lane].push(control(Said::RoundEnd(end)));
        }
    }
    let digest = digest(&contents);
    for section in sections() {
        lanes[0].push(frame::encode_message(Kind::Section, &section).into());
    }
    let end = StateEnd {
        sections: sections().len() as u32,
        digest: Some(digest.clone()),
        verify_full: false,
        stopped_us: 77,
        ram_follows: false,
        replay_until: None,
    };
    lanes[0].push(control(Said::StateEnd(end)));
    (lanes, digest)
}

/// A checkpoint that builds on nothing.
pub(crate) async fn full(scratch: &Scratch, rounds: &[Vec<(u16, u64, u32, u8)>]) -> CheckpointEntry {
    store_key(&scratch.bucket).await;
    send(&scratch.bucket, script(rounds).0).await.1.unwrap()
}

/// The next one: what changed, after which the machine is `contents`.
pub(crate) async fn increment(
    scratch: &Scratch,
    number: u8,
    base: &CheckpointEntry,
    runs: &[(u16, u64, u32, u8)],
    contents: &Contents,
) -> CheckpointEntry {
    on_base(scratch, number, base, runs, contents, false).await.1.unwrap()
}

/// Puts the VM's key where a controller would have put it.
async fn store_key(bucket: &Bucket) {
    let keys = vec![Keys::fixed().wrap(VM, &key())];
    let object = proto::v1::KeyObject { vm_id: VM.to_string(), keys };
    let bytes = frame::encode_message(Kind::Envelope, &object);
    bucket.put(&crate::bucket::key_object(&VM.to_string()), bytes.into()).await.unwrap();
}

/// Three rounds that overlap: whole runs, a part in the middle, pages that become zero again, and a disk.
fn rounds() -> Vec<Vec<(u16, u64, u32, u8)>> {
    vec![
        vec![(0, 0, 256, 1), (0, 256, 256, 2), (0, 900, 100, 3), (1, 0, 20, 4)],
        vec![(0, 10, 5, 5), (0, 256, 10, 0), (1, 3, 1, 6)],
        vec![(0, 12, 1, 7), (0, 1023, 1, 8)],
    ]
}

fn hello(lane: usize) -> Bytes {
    hello_on(lane, "", false)
}

fn hello_on(lane: usize, base: &str, wants_leaves: bool) -> Bytes {
    control(Said::Hello(Hello {
        protocol_min: 1,
        protocol_max: 1,
        operation: "op1".into(),
        secret: vec![9; 32],
        lane: lane as u32,
        lanes: LANES as u32,
        base: base.into(),
        wants_leaves,
    }))
}

/// Sends lanes at once; returns what lane 0 heard and what became of the checkpoint.
async fn send(bucket: &Bucket, lanes: Vec<Vec<Bytes>>) -> (Vec<Said>, Result<CheckpointEntry, Failure>) {
    let lanes = lanes.into_iter().enumerate().map(|(lane, frames)| [vec![hello(lane)], frames].concat()).collect();
    send_to(ingest(1, bucket), lanes).await
}

async fn send_to(ingest: Arc<Ingest>, lanes: Vec<Vec<Bytes>>) -> (Vec<Said>, Result<CheckpointEntry, Failure>) {
    let routes = Routes::default();
    let _open = routes.open(&ticket("hostA", "controller"), Road::Ingest(ingest.clone()));
    let mut served = Vec::new();
    let mut heard = Vec::new();
    for frames in lanes {
        let frames = frames.into_iter().map(|frame| Ok(Chunk { frame }));
        let incoming = tokio_stream::iter(frames.collect::<Vec<_>>());
        let (out, back) = mpsc::channel(64);
        heard.push(back);
        let routes = routes.clone();
        served.push(tokio::spawn(async move { routes.serve(host_identity("hostA"), incoming, out).await }));
    }
    for lane in served {
        lane.await.unwrap();
    }
    let entry = tokio::select! {
        biased;
        entry = ingest.finished() => entry,
        () = std::future::ready(()) => Err(Failure::new(Code::Protocol, "no lane was taken")),
    };
    let mut words = Vec::new();
    while let Ok(chunk) = heard[0].try_recv() {
        words.push(said(&chunk.unwrap().frame).unwrap());
    }
    (words, entry)
}

#[tokio::test]
async fn what_was_sent_is_durable_verified_and_acknowledged_in_order() {
    let scratch = Scratch::new();
    let (lanes, digest) = script(&rounds());
    let (words, entry) = send(&scratch.bucket, lanes).await;
    let entry = entry.unwrap();
    assert_eq!(entry.digest, digest);
    let words: Vec<String> = words.iter().map(|word| format!("{word:?}").chars().take(20).collect()).collect();
    let expected = ["HelloReply", "RoundAck(RoundAck { ", "RoundAck(RoundAck { ", "RoundAck(RoundAck { ", "Ready"];
    assert!(words.len() == 5 && words.iter().zip(expected).all(|(word, begin)| word.starts_with(begin)), "{words:?}");
    let reader = reader(&scratch.bucket);
    let opened = reader.manifest(&entry.manifest_key).await.unwrap();
    assert_eq!(opened.manifest.capabilities, [1, 2]);
    reader.verify(&opened, |_, _| ()).await.unwrap();
    let extents = reader.extents(&opened).await.unwrap();
    let stored: u32 = extents.iter().filter(|extent| extent.space == 0).map(|extent| extent.pages).sum();
    assert_eq!(stored, 256 + 246 + 100 + 1, "zero pages are not stored");
}

/// Checks that a changed script makes no checkpoint, and that nothing of it can be seen.
async fn refused(lanes: Vec<Vec<Bytes>>) -> Failure {
    let scratch = Scratch::new();
    let (words, entry) = send(&scratch.bucket, lanes).await;
    let failure = entry.unwrap_err();
    let key = manifest_key(&VM.to_string(), expected(1).checkpoint);
    assert_eq!(scratch.bucket.get(&key).await.unwrap_err().to_string(), format!("the bucket has no {key}"));
    assert!(!words.iter().any(|word| matches!(word, Said::Ready(_))), "{words:?}");
    failure
}

#[tokio::test]
async fn who_loses_the_vm_while_its_checkpoint_is_taken_writes_no_manifest() {
    let scratch = Scratch::new();
    claim("theirs", 4).make(&scratch.bucket).await.unwrap();
    let (words, entry) = send(&scratch.bucket, script(&rounds()).0).await;
    let failure = entry.unwrap_err();
    assert!(failure.code == Code::Conflict && failure.message.contains("controller/theirs"), "{failure}");
    assert!(!words.iter().any(|word| matches!(word, Said::Ready(_))), "{words:?}");
    assert!(scratch.bucket.list(&crate::bucket::checkpoints_prefix(&VM.to_string())).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_flipped_byte_in_any_frame_is_found() {
    let (lanes, _) = script(&rounds());
    for lane in 0..LANES {
        for at in 0..lanes[lane].len() {
            let mut changed = lanes.clone();
            let mut frame = changed[lane][at].to_vec();
            let byte = frame.len() * 2 / 3;
            frame[byte] ^= 4;
            changed[lane][at] = frame.into();
            let failure = refused(changed).await;
            assert_eq!(failure.code, Code::Corrupt, "frame {at} of lane {lane}: {failure}");
        }
    }
}

#[tokio::test]
async fn a_missing_frame_anywhere_is_found() {
    let (lanes, _) = script(&rounds());
    for lane in 0..LANES {
        for at in 0..lanes[lane].len() {
            let mut cut = lanes.clone();
            cut[lane].remove(at);
            refused(cut).await;
            let mut cut = lanes.clone();
            cut[lane].truncate(at);
            refused(cut).await;
        }
    }
}

#[tokio::test]
async fn frames_out_of_their_round_are_found() {
    let (lanes, _) = script(&rounds());
    for at in 0..lanes[1].len() - 1 {
        let kinds = [at, at + 1].map(|at| frame::Header::parse(&lanes[1][at]).unwrap().kind);
        if kinds[0] != kinds[1] {
            let mut swapped = lanes.clone();
            swapped[1].swap(at, at + 1);
            assert_eq!(refused(swapped).await.code, Code::Protocol, "frames {at} and {}", at + 1);
        }
    }
}

#[tokio::test]
async fn a_wrong_digest_a_page_outside_and_a_section_twice_are_found() {
    let (mut lanes, _) = script(&rounds());
    let end = StateEnd {
        sections: 3,
        digest: Some(MachineDigest::default()),
        verify_full: false,
        stopped_us: 77,
        ram_follows: false,
        replay_until: None,
    };
    *lanes[0].last_mut().unwrap() = control(Said::StateEnd(end));
    let failure = refused(lanes).await;
    assert!(failure.code == Code::Corrupt && failure.message.contains("RAM"), "{failure}");
    let (mut lanes, _) = script(&rounds());
    lanes[0][0] = pages(0, RAM_PAGES - 1, 2, 1);
    assert_eq!(refused(lanes).await.code, Code::Protocol);
    let (mut lanes, _) = script(&rounds());
    lanes[0][0] = pages(7, 0, 1, 1);
    assert_eq!(refused(lanes).await.code, Code::Protocol);
    let (mut lanes, _) = script(&rounds());
    let twice = lanes[0][lanes[0].len() - 2].clone();
    lanes[0].insert(1, twice);
    assert_eq!(refused(lanes).await.code, Code::Protocol);
}

#[tokio::test]
async fn a_bucket_that_fails_fails_the_checkpoint() {
    let scratch = Scratch::new();
    std::fs::remove_dir_all(&scratch.folder).unwrap();
    std::fs::write(&scratch.folder, b"a file where the bucket was").unwrap();
    let (_, entry) = send(&scratch.bucket, script(&rounds()).0).await;
    assert_eq!(entry.unwrap_err().code, Code::Unreachable);
    std::fs::remove_file(&scratch.folder).unwrap();
}

#[tokio::test]
async fn tickets_are_for_one_host_one_operation_and_each_lane_once() {
    let scratch = Scratch::new();
    let ingest = ingest(1, &scratch.bucket);
    let routes = Routes::default();
    let open = routes.open(&ticket("hostA", "controller"), Road::Ingest(ingest.clone()));
    let answer = async |from: &str, first: Bytes| {
        let (out, mut back) = mpsc::channel(8);
        let (keep, incoming) = mpsc::channel(8);
        keep.send(Ok(Chunk { frame: first })).await.unwrap();
        let (routes, from) = (routes.clone(), host_identity(from));
        tokio::spawn(async move { routes.serve(from, ReceiverStream::new(incoming), out).await });
        said(&back.recv().await.unwrap().unwrap().frame).unwrap()
    };
    let code = |word: &Said| if let Said::Abort(abort) = word { Code::from_number(abort.code) } else { Code::Internal };
    assert_eq!(code(&answer("hostB", hello(0)).await), Code::Denied);
    let other = |change: fn(&mut Hello)| {
        let Said::Hello(mut hello) = said(&hello(0)).unwrap() else { panic!("no Hello") };
        change(&mut hello);
        control(Said::Hello(hello))
    };
    assert_eq!(code(&answer("hostA", other(|hello| hello.secret[0] = 0)).await), Code::Denied);
    assert_eq!(code(&answer("hostA", other(|hello| hello.operation = "op2".into())).await), Code::Denied);
    assert_eq!(code(&answer("hostA", other(|hello| hello.protocol_min = 2)).await), Code::Protocol);
    assert!(matches!(answer("hostA", hello(0)).await, Said::HelloReply(_)));
    assert_eq!(code(&answer("hostA", hello(0)).await), Code::Protocol);
    drop(open);
    assert_eq!(code(&answer("hostA", hello(1)).await), Code::Denied);
}

struct PlainLanes(Routes);

#[tonic::async_trait]
impl Lanes for PlainLanes {
    type LaneStream = ReceiverStream<Result<Chunk, Status>>;

    async fn lane(&self, request: Request<Streaming<Chunk>>) -> Result<Response<Self::LaneStream>, Status> {
        let (out, back) = mpsc::channel(4);
        let routes = self.0.clone();
        tokio::spawn(async move { routes.serve(host_identity("controller"), request.into_inner(), out).await });
        Ok(Response::new(ReceiverStream::new(back)))
    }
}

/// Serves lanes without TLS and returns a channel to them.
async fn plain(routes: Routes) -> Channel {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = LanesServer::new(PlainLanes(routes)).max_decoding_message_size(16 << 20);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
    Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy()
}

struct Restore {
    scratch: Scratch,
    entry: CheckpointEntry,
    target: Scratch,
    ingest: Arc<Ingest>,
    relayed: bool,
}

impl Restore {
    async fn new() -> Restore {
        let (scratch, target) = (Scratch::new(), Scratch::new());
        let entry = send(&scratch.bucket, script(&rounds()).0).await.1.unwrap();
        let ingest = ingest(2, &target.bucket);
        Restore { scratch, entry, target, ingest, relayed: false }
    }

    async fn run(&self) -> Result<MachineDigest, Failure> {
        let reader = reader(&self.scratch.bucket);
        let opened = reader.manifest(&self.entry.manifest_key).await?;
        let ticket = ticket("controller", "hostB");
        let (there, between) = (Routes::default(), Routes::default());
        let _open = there.open(&ticket, Road::Ingest(self.ingest.clone()));
        let mut channel = plain(there).await;
        let _passing = if self.relayed {
            let passing = between.open(&ticket, Road::Relay(Relay::new("hostB", channel)));
            channel = plain(between).await;
            Some(passing)
        } else {
            None
        };
        let load = Load {
            reader: &reader,
            opened: &opened,
            ticket: &ticket,
            target: "hostB",
            channel,
            lanes: 3,
            bandwidth: 0,
            verify_full: false,
            lazy: false,
            journal: None,
        };
        load.send(|_| ()).await
    }
}

#[tokio::test]
async fn what_is_restored_is_what_was_stored_directly_and_through_a_relay() {
    for relayed in [false, true] {
        let restore = Restore { relayed, ..Restore::new().await };
        let digest = restore.run().await.unwrap();
        assert_eq!(digest, restore.entry.digest);
        let there = restore.ingest.finished().await.unwrap();
        verify(&restore.target.bucket, &there).await.unwrap();
        assert_eq!(there.digest, restore.entry.digest);
    }
}

#[tokio::test]
async fn a_damaged_or_missing_pack_is_named_and_nothing_is_restored() {
    let mut restore = Restore::new().await;
    let key = restore.entry.pack_keys[0].clone();
    let path = restore.scratch.folder.join(&key);
    let sound = std::fs::read(&path).unwrap();
    let mut changed = sound.clone();
    changed[sound.len() / 2] ^= 1;
    for damaged in [Some(changed), Some(sound[..sound.len() - 1].to_vec()), None] {
        match damaged {
            Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let verified = verify(&restore.scratch.bucket, &restore.entry).await.unwrap_err();
        restore.ingest = ingest(2, &restore.target.bucket);
        let restored = restore.run().await.unwrap_err();
        for failure in [verified, restored] {
            assert!(failure.code == Code::Corrupt && failure.message.contains(&key), "{failure}");
        }
    }
}

#[tokio::test]
async fn a_frame_that_lies_about_its_pages_is_refused_by_the_target_and_named() {
    let restore = Restore::new().await;
    let reader = reader(&restore.scratch.bucket);
    let opened = reader.manifest(&restore.entry.manifest_key).await.unwrap();
    let extents = reader.extents(&opened).await.unwrap();
    let whole = extents.iter().find(|extent| extent.first_page == 900 && extent.pages == 100).unwrap();
    let pack = manifest::pack_key(&opened.manifest, &whole.place.pack);
    let path = restore.scratch.folder.join(&pack);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = whole.place.offset as usize..whole.place.offset as usize + whole.place.bytes as usize;
    // Sealed with the right key, and with the hash that the page map's digests make: only its pages are others.
    let mut frame = opened.opener.as_ref().unwrap().open(&bytes[at.clone()]).unwrap();
    frame[frame::HEADER_BYTES + frame::PAGES_PREFIX_BYTES..].fill(4);
    bytes[at].copy_from_slice(&Sealer::new(&key(), VM, [9; 16]).seal(&frame));
    std::fs::write(&path, bytes).unwrap();
    let failure = restore.run().await.unwrap_err();
    let place = format!("pack {pack}, frame at byte {}", whole.place.offset);
    assert!(failure.code == Code::Corrupt && failure.message.contains(&place), "{failure}");
}

struct Nowhere;

impl Sink for Nowhere {
    async fn put(&mut self, _: Pack) {}
}

/// A checkpoint that builds on another: these frames on lane 0 alone, after which the machine is `contents`.
async fn on_base(
    scratch: &Scratch,
    number: u8,
    base: &CheckpointEntry,
    runs: &[(u16, u64, u32, u8)],
    contents: &Contents,
    wants_leaves: bool,
) -> (Vec<Said>, Result<CheckpointEntry, Failure>) {
    let reader = reader(&scratch.bucket);
    let opened = reader.manifest(&base.manifest_key).await.unwrap();
    let damaged = reader.lost(&opened).await.unwrap();
    let lost = manifest::packs(&opened.manifest).into_iter();
    let lost = lost.filter(|pack| damaged.contains_key(&manifest::pack_key(&opened.manifest, pack))).collect();
    let ingest = Ingest::new(expected(number), reader, key(), Some(Base { opened, lost }));
    let desk = desk();
    let mut frames = vec![hello_on(0, &base.id, wants_leaves), hello_on(1, &base.id, wants_leaves)];
    let second = vec![frames.remove(1), control(Said::RoundEnd(RoundEnd { round: 1, frames: 0, last: true }))];
    frames.extend(runs.iter().map(|run| desk.sealer.seal(&pages(run.0, run.1, run.2, run.3)).into()));
    frames.push(control(Said::RoundEnd(RoundEnd { round: 1, frames: runs.len() as u64, last: true })));
    frames.extend(
        sections().iter().map(|section| Bytes::from(desk.sealer.seal(&frame::encode_message(Kind::Section, section)))),
    );
    let end = StateEnd {
        sections: 3,
        digest: Some(digest(contents)),
        verify_full: false,
        stopped_us: 77,
        ram_follows: false,
        replay_until: None,
    };
    frames.push(control(Said::StateEnd(end)));
    send_to(ingest, vec![frames, second]).await
}

pub(crate) fn contents_of(rounds: &[Vec<(u16, u64, u32, u8)>]) -> Contents {
    let mut contents = Contents::new();
    for (space, first, count, fill) in rounds.iter().flatten() {
        contents.extend((*first..first + u64::from(*count)).map(|page| ((*space, page), *fill)));
    }
    contents
}

#[tokio::test]
async fn a_checkpoint_that_builds_on_another_stores_what_changed_and_outlives_it() {
    let scratch = Scratch::new();
    let first = send(&scratch.bucket, script(&rounds()).0).await.1.unwrap();
    let mut contents = contents_of(&rounds());
    let runs = [(0, 50, 3, 9), (0, 900, 10, 0), (1, 1, 1, 9)];
    contents.extend(contents_of(&[runs.to_vec()]));
    let second = on_base(&scratch, 2, &first, &runs, &contents, false).await.1.unwrap();
    assert_eq!(second.digest, digest(&contents));
    let own: Vec<&String> = second.pack_keys.iter().filter(|key| !first.pack_keys.contains(key)).collect();
    assert_eq!(own.len(), 2, "pages, and state with page maps");
    let stored = own.iter().map(|key| std::fs::metadata(scratch.folder.join(key)).unwrap().len()).sum::<u64>();
    assert!(stored < 20_000 && second.own_bytes >= stored, "{stored} of {}", second.own_bytes);
    verify(&scratch.bucket, &second).await.unwrap();
    // The first one goes: its manifest, and its packs that the second does not need.
    scratch.bucket.delete(&first.manifest_key).await.unwrap();
    for key in first.pack_keys.iter().filter(|key| !second.pack_keys.contains(key)) {
        scratch.bucket.delete(key).await.unwrap();
    }
    verify(&scratch.bucket, &second).await.unwrap();
    // A third that says nothing new is as good as the second.
    let third = on_base(&scratch, 3, &second, &[(0, 50, 3, 9)], &contents, false).await.1.unwrap();
    assert_eq!(third.digest, second.digest);
    verify(&scratch.bucket, &third).await.unwrap();
}

#[tokio::test]
async fn pages_that_do_not_add_up_with_the_base_make_no_checkpoint() {
    let scratch = Scratch::new();
    let first = send(&scratch.bucket, script(&rounds()).0).await.1.unwrap();
    let mut contents = contents_of(&rounds());
    contents.insert((0, 77), 3);
    let failure = on_base(&scratch, 2, &first, &[(0, 50, 3, 9)], &contents, false).await.1.unwrap_err();
    assert!(failure.code == Code::Corrupt && failure.message.contains("RAM"), "{failure}");
    let mut stranger = first.clone();
    stranger.id = "ff".repeat(8);
    let (words, entry) = on_base(&scratch, 2, &stranger, &[], &contents, false).await;
    assert_eq!(entry.unwrap_err().message, "no lane was taken");
    assert!(matches!(&words[0], Said::Abort(abort) if abort.reason.contains("which is not here")), "{words:?}");
}

#[tokio::test]
async fn a_pack_that_is_lost_or_cut_short_is_asked_for_again_and_healed() {
    for cut in [false, true] {
        heals(cut).await;
    }
}

async fn heals(cut: bool) {
    let scratch = Scratch::new();
    let first = send(&scratch.bucket, script(&rounds()).0).await.1.unwrap();
    let contents = contents_of(&rounds());
    // The pack of pages goes; that of the page maps stays.
    let pages = first.pack_keys.iter().max_by_key(|key| std::fs::metadata(scratch.folder.join(key)).unwrap().len());
    let path = scratch.folder.join(pages.unwrap());
    if cut {
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    } else {
        std::fs::remove_file(path).unwrap();
    }
    let opened = reader(&scratch.bucket).manifest(&first.manifest_key).await.unwrap();
    let lost = reader(&scratch.bucket).lost(&opened).await.unwrap();
    assert_eq!(lost.keys().collect::<Vec<_>>(), [pages.unwrap()]);
    assert_eq!(verify(&scratch.bucket, &first).await.unwrap_err().code, Code::Corrupt);
    let (words, _) = on_base(&scratch, 2, &first, &[], &contents, true).await;
    let told: Vec<_> =
        words.iter().filter_map(|word| if let Said::BaseLeaves(told) = word { Some(told) } else { None }).collect();
    assert_eq!((told.len(), told.last().unwrap().last), (3, true));
    let unknown = told[0].leaves.chunks(32).filter(|leaf| leaf.iter().all(|byte| *byte == 0)).count();
    assert_eq!(unknown, 256 + 246 + 100 + 1, "every page of the lost pack");
    // A source that sends nothing again makes no checkpoint: it would need what is lost.
    let (_, trusting) = on_base(&scratch, 4, &first, &[], &contents, true).await;
    assert!(trusting.unwrap_err().message.contains("did not send again"));
    // The source sends them again, as they are.
    let again: Vec<_> = contents.iter().map(|((space, page), fill)| (*space, *page, 1, *fill)).collect();
    let healed = on_base(&scratch, 3, &first, &again, &contents, true).await.1.unwrap();
    verify(&scratch.bucket, &healed).await.unwrap();
}

#[tokio::test]
async fn everything_that_is_damaged_is_found_in_one_reading() {
    let scratch = Scratch::new();
    let entry = send(&scratch.bucket, script(&rounds()).0).await.1.unwrap();
    let reader = reader(&scratch.bucket);
    let opened = reader.manifest(&entry.manifest_key).await.unwrap();
    assert_eq!(reader.examine(&opened, |_, _| ()).await.unwrap(), BTreeMap::new());
    for key in &entry.pack_keys {
        let path = scratch.folder.join(key);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[100] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    let found = reader.examine(&opened, |_, _| ()).await.unwrap();
    assert_eq!(found.keys().collect::<BTreeSet<_>>(), entry.pack_keys.iter().collect());
    assert!(found.iter().all(|(key, why)| why.contains(key)), "{found:?}");
    assert!(entry.pack_keys.len() == 2, "pages, and page maps");
}

#[tokio::test]
async fn the_bucket_shows_nothing_of_the_content() {
    let scratch = Scratch::new();
    let mut lanes = script(&[vec![(0, 0, 1, 0x41)]]).0;
    lanes[0][0] = desk().sealer.seal(&lanes[0][0]).into();
    let entry = send(&scratch.bucket, lanes).await.1.unwrap();
    let leaf = *blake3::hash(&[0x41; PAGE_BYTES]).as_bytes();
    for object in entry.pack_keys.iter().chain([&entry.manifest_key]) {
        let bytes = std::fs::read(scratch.folder.join(object)).unwrap();
        for secret in [&b"AAAAAAAA"[..], &leaf, b"cpu/0", b"vm1", key().expose()] {
            assert!(!bytes.windows(secret.len()).any(|window| window == secret), "{object} shows {secret:x?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However the lanes interleave between their rounds, the result is the same.
    #[test]
    fn the_latest_copy_of_a_page_wins_whichever_lane_is_faster(
        runs in proptest::collection::vec(
            proptest::collection::vec((0..2u16, 0..20u64, 1..6u32, 0..4u8), 1..8), 1..5),
        order in proptest::collection::vec(any::<bool>(), 100),
    ) {
        // Within a round a source sends each page once.
        let rounds: Vec<Vec<_>> = runs.into_iter().map(|round| {
            let mut taken = std::collections::BTreeSet::new();
            round.into_iter().filter(|(space, first, count, _)| {
                let pages: Vec<_> = (*first..first + u64::from(*count)).map(|page| (*space, page)).collect();
                let fits = first + u64::from(*count) <= DISK_PAGES && pages.iter().all(|page| !taken.contains(page));
                if fits {
                    taken.extend(pages);
                }
                fits
            }).collect()
        }).collect();
        let (lanes, digest) = script(&rounds);
        let scratch = Scratch::new();
        let desk = desk();
        let mut assembly = Assembly::new("00", Generation(3), &config(), LANES, true, desk.sealer.clone());
        let mut queues: Vec<_> = lanes.into_iter().map(|frames| frames.into_iter()).collect();
        let mut complete = false;
        let mut turns = order.into_iter().chain(std::iter::repeat(true));
        loop {
            let first = usize::from(turns.next().unwrap_or(true));
            let mut lanes = [first, 1 - first].into_iter();
            let Some((lane, frame)) = lanes.find_map(|lane| queues[lane].next().map(|frame| (lane, frame))) else {
                break;
            };
            let checked = desk.check(&frame).unwrap();
            let effects = assembly.take(lane, checked).unwrap();
            complete |= effects.iter().any(|effect| matches!(effect, Effect::Complete));
        }
        prop_assert!(complete);
        let (received, _) = assembly.finish().unwrap();
        let reader = reader(&scratch.bucket);
        let spaces = spaces(&config());
        let layers = Layers {
            reader: &reader, base: None, desk: &desk, spaces: &spaces, sink: Nowhere, checkpoint: "00",
            generation: Generation(3),
        };
        let laid = tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(layers.lay(received));
        prop_assert_eq!(laid.unwrap().digest, digest);
    }
}

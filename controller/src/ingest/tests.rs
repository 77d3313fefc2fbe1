//! Promises of the lanes: what is changed, cut, reordered or missing on the way is found; what is durable comes back
//! equal; and a relay changes nothing.
//!
//! A small machine is sent by hand, lane by lane; the target of a restore is another ingest behind a plain gRPC server.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use proto::frame::{self, Encoding, Kind, PAGE_BYTES, PageRun};
use proto::ids::{CheckpointId, Digest, Generation};
use proto::status::Code;
use proto::v1::lane_message::Message as Said;
use proto::v1::lanes_server::{Lanes, LanesServer};
use proto::v1::{Chunk, DiskConfig, Hello, MachineConfig, MachineDigest, RoundEnd, Section, StateEnd, Ticket};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use super::assembly::{Assembly, Checked, Effect, check};
use super::digest::{PageDigests, machine_digest, state_digest};
use super::load::Load;
use super::receive::{Expected, Ingest};
use super::relay::Relay;
use super::{Road, Routes, read, said, say};
use crate::agents::host_identity;
use crate::bucket::file::tests::Scratch;
use crate::bucket::{Bucket, manifest_key};
use crate::failure::Failure;
use crate::ledger::event::CheckpointEntry;

const RAM_PAGES: u64 = 1024;
const DISK_PAGES: u64 = 20;
const LANES: usize = 2;
const VM_ID: &str = "0123456789abcdef0123456789abcdef";

fn config() -> MachineConfig {
    let disk =
        |shared| DiskConfig { size_bytes: DISK_PAGES * PAGE_BYTES as u64 - 512, shared, ..DiskConfig::default() };
    MachineConfig { memory_bytes: RAM_PAGES * 4096, disks: vec![disk(true), disk(false)], ..MachineConfig::default() }
}

fn expected(checkpoint: u8) -> Expected {
    Expected {
        checkpoint: CheckpointId([checkpoint; 8]),
        vm: "vm1".into(),
        vm_id: VM_ID.into(),
        generation: Generation(3),
        config: config(),
        capabilities: vec![1, 2],
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
type Contents = BTreeMap<(u16, u64), u8>;

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
    let end = StateEnd { sections: sections().len() as u32, digest: Some(digest.clone()), verify_full: false };
    lanes[0].push(control(Said::StateEnd(end)));
    (lanes, digest)
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
    control(Said::Hello(Hello {
        protocol_min: 1,
        protocol_max: 1,
        operation: "op1".into(),
        secret: vec![9; 32],
        lane: lane as u32,
        lanes: LANES as u32,
        base: String::new(),
    }))
}

/// Sends lanes at once; returns what lane 0 heard and what became of the checkpoint.
async fn send(bucket: &Bucket, lanes: Vec<Vec<Bytes>>) -> (Vec<Said>, Result<CheckpointEntry, Failure>) {
    let ingest = Ingest::new(expected(1), bucket.clone());
    let routes = Routes::default();
    let _open = routes.open(&ticket("hostA", "controller"), Road::Ingest(ingest.clone()));
    let mut served = Vec::new();
    let mut heard = Vec::new();
    for (lane, frames) in lanes.into_iter().enumerate() {
        let frames = std::iter::once(hello(lane)).chain(frames).map(|frame| Ok(Chunk { frame }));
        let incoming = tokio_stream::iter(frames.collect::<Vec<_>>());
        let (out, back) = mpsc::channel(64);
        heard.push(back);
        let routes = routes.clone();
        served.push(tokio::spawn(async move { routes.serve(host_identity("hostA"), incoming, out).await }));
    }
    let entry = ingest.finished().await;
    for lane in served {
        lane.await.unwrap();
    }
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
    let manifest = read::manifest(&scratch.bucket, &entry.manifest_key).await.unwrap();
    assert_eq!(manifest.capabilities, [1, 2]);
    read::verify(&scratch.bucket, &manifest, |_, _| ()).await.unwrap();
    let stored: u32 = manifest.maps[0].extents.iter().map(|extent| extent.pages).sum();
    assert_eq!(stored, 256 + 246 + 100 + 1, "zero pages are not stored");
}

/// Checks that a changed script makes no checkpoint, and that nothing of it can be seen.
async fn refused(lanes: Vec<Vec<Bytes>>) -> Failure {
    let scratch = Scratch::new();
    let (words, entry) = send(&scratch.bucket, lanes).await;
    let failure = entry.unwrap_err();
    let key = manifest_key(VM_ID, expected(1).checkpoint);
    assert_eq!(scratch.bucket.get(&key).await.unwrap_err().to_string(), format!("the bucket has no {key}"));
    assert!(!words.iter().any(|word| matches!(word, Said::Ready(_))), "{words:?}");
    failure
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
    let end = StateEnd { sections: 3, digest: Some(MachineDigest::default()), verify_full: false };
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
    let ingest = Ingest::new(expected(1), scratch.bucket.clone());
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
        let ingest = Ingest::new(expected(2), target.bucket.clone());
        Restore { scratch, entry, target, ingest, relayed: false }
    }

    async fn run(&self) -> Result<MachineDigest, Failure> {
        let manifest = read::manifest(&self.scratch.bucket, &self.entry.manifest_key).await?;
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
            bucket: &self.scratch.bucket,
            manifest: &manifest,
            ticket: &ticket,
            target: "hostB",
            channel,
            lanes: 3,
            bandwidth: 0,
            verify_full: false,
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
        let manifest = read::manifest(&restore.target.bucket, &there.manifest_key).await.unwrap();
        read::verify(&restore.target.bucket, &manifest, |_, _| ()).await.unwrap();
        assert_eq!(there.digest, restore.entry.digest);
    }
}

#[tokio::test]
async fn a_damaged_or_missing_pack_is_named_and_nothing_is_restored() {
    let mut restore = Restore::new().await;
    let key = restore.entry.pack_keys[0].clone();
    let path = restore.scratch.folder.join(&key);
    let sound = std::fs::read(&path).unwrap();
    let manifest = read::manifest(&restore.scratch.bucket, &restore.entry.manifest_key).await.unwrap();
    let mut changed = sound.clone();
    changed[sound.len() / 2] ^= 1;
    for damaged in [Some(changed), Some(sound[..sound.len() - 1].to_vec()), None] {
        match damaged {
            Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let verified = read::verify(&restore.scratch.bucket, &manifest, |_, _| ()).await.unwrap_err();
        restore.ingest = Ingest::new(expected(2), restore.target.bucket.clone());
        let restored = restore.run().await.unwrap_err();
        for failure in [verified, restored] {
            assert!(failure.code == Code::Corrupt && failure.message.contains(&key), "{failure}");
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
        let mut assembly = Assembly::new("00", &config(), LANES);
        let mut queues: Vec<_> = lanes.into_iter().map(|frames| frames.into_iter()).collect();
        let mut complete = false;
        let mut turns = order.into_iter().chain(std::iter::repeat(true));
        loop {
            let first = usize::from(turns.next().unwrap_or(true));
            let mut lanes = [first, 1 - first].into_iter();
            let Some((lane, frame)) = lanes.find_map(|lane| queues[lane].next().map(|frame| (lane, frame))) else {
                break;
            };
            let checked: Checked = check(&frame).unwrap();
            let effects = assembly.take(lane, checked).unwrap();
            complete |= effects.iter().any(|effect| matches!(effect, Effect::Complete));
        }
        prop_assert!(complete);
        let (finished, _) = assembly.finish().unwrap();
        prop_assert_eq!(finished.digest, digest);
    }
}

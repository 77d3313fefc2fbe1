//! One of everything that travels: what the golden files of version 1 hold, as values.
//!
//! The pieces fit together: a machine of four pages (too small to boot, large enough for every rule), one checkpoint of it in
//! one pack, the manifest of that checkpoint, and the words that two sides of a transfer would say about it. The README of
//! this crate works through the same machine. Nothing here may change; a later version gets values and files of its own.
#![allow(dead_code, reason = "each test binary uses some of it")]
#![allow(clippy::needless_update, reason = "messages gain fields; a golden file has those of its release")]

use std::path::PathBuf;

use prost::Message;
use proto::frame::{self, Encoding, Kind, PAGE_BYTES, PageRun};
use proto::ids::Digest;
use proto::v1::lane_message::Message as Said;
use proto::v1::{
    Abort, BootSource, CapabilityAtom, CapabilityRule, CapabilitySet, CheckpointRecord, ClockV1, DiskConfig,
    ExportHead, Hello, HelloReply, JournalBlock, JournalCut, LaneMessage, MachineConfig, MachineDigest, Manifest,
    NetConfig, PackEntry, PackIndex, PackRef, PageExtent, PageMap, Position, Ready, RoundAck, RoundEnd, RunnerLease,
    RunnerReply, RunnerRequest, RunnerState, Section, SectionRef, StateEnd, VmState, runner_reply, runner_request,
};

/// Pages of RAM of the machine.
pub const PAGES: u64 = 4;
/// Its checkpoint.
pub const CHECKPOINT: &str = "0123456789abcdef";
const VM_ID: &str = "00112233445566778899aabbccddeeff";

/// Folder of the golden files of version 1.
pub fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

/// A golden file.
pub fn golden(name: &str) -> Vec<u8> {
    let path = folder().join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Pages 1 and 2; pages 0 and 3 are zero.
pub fn payload() -> Vec<u8> {
    let first = (0..PAGE_BYTES).map(|at| (at * 7 + 1) as u8);
    let second = (0..PAGE_BYTES).map(|at| (at / 16) as u8);
    first.chain(second).collect()
}

/// Where the pages with data are.
pub const RUN: PageRun = PageRun { first_page: 1, pages: 2, space: 0, encoding: Encoding::Raw };
/// A run of zeros: four billion pages need no byte.
pub const ZERO_RUN: PageRun =
    PageRun { first_page: 0x1_0000_0003, pages: u32::MAX, space: 2, encoding: Encoding::Zero };

/// The frame of the pages with data.
pub fn raw_pages() -> Vec<u8> {
    let mut frame = RUN.begin();
    frame.extend(payload());
    frame::seal(&mut frame);
    frame
}

/// The frame of the run of zeros.
pub fn zero_pages() -> Vec<u8> {
    let mut frame = ZERO_RUN.begin();
    frame::seal(&mut frame);
    frame
}

/// The only section of the machine.
pub fn section() -> Section {
    let body = ClockV1 { retired: 1_000_000, skipped_tsc: 250, ..Default::default() }.encode_to_vec();
    Section { name: "clock".into(), major: 1, minor: 0, ignorable: false, body, ..Default::default() }
}

/// A section of a later minor version that may be ignored.
pub fn ignorable_section() -> Section {
    let body = vec![0xfe, 0, 1, 0xff];
    Section { name: "device/later0".into(), major: 2, minor: 7, ignorable: true, body, ..Default::default() }
}

/// The digests, word for word as the README defines them.
pub fn digest() -> MachineDigest {
    let hash = |parts: &[&[u8]]| *blake3::hash(&parts.concat()).as_bytes();
    let (payload, zero) = (payload(), [0; PAGE_BYTES]);
    let leaves = [&zero, &payload[..PAGE_BYTES], &payload[PAGE_BYTES..], &zero].map(|page| hash(&[page]));
    let ram = hash(&[leaves.as_flattened()]);
    let Section { name, major, minor, body, .. } = section();
    let state = hash(&[
        &(name.len() as u32).to_le_bytes(),
        name.as_bytes(),
        &major.to_le_bytes(),
        &minor.to_le_bytes(),
        &(body.len() as u64).to_le_bytes(),
        &body,
    ]);
    let disks = hash(&[]);
    let machine = hash(&[&ram, &state, &disks]);
    let [machine, ram, state, disks] = [machine, ram, state, disks].map(|digest| Digest(digest).to_vec());
    MachineDigest { machine, ram, state, disks, ..Default::default() }
}

/// The index of the pack.
pub fn index() -> PackIndex {
    let section = frame::encode_message(Kind::Section, &section());
    let pages = raw_pages();
    let first = PackEntry {
        space: 0,
        first_page: RUN.first_page,
        pages: RUN.pages,
        offset: 0,
        frame_bytes: pages.len() as u32,
        section: String::new(),
        ..Default::default()
    };
    let second = PackEntry {
        offset: pages.len() as u64,
        frame_bytes: section.len() as u32,
        section: "clock".into(),
        ..Default::default()
    };
    PackIndex { checkpoint: CHECKPOINT.into(), entries: vec![first, second], ..Default::default() }
}

/// The pack: two frames, the index of them, the footer.
pub fn pack() -> Vec<u8> {
    let mut pack = raw_pages();
    pack.extend(frame::encode_message(Kind::Section, &section()));
    let offset = pack.len() as u64;
    let index = frame::encode_message(Kind::PackIndex, &index());
    pack.extend_from_slice(&index);
    pack.extend_from_slice(b"GDWTPACK");
    pack.extend_from_slice(&offset.to_le_bytes());
    pack.extend_from_slice(&(index.len() as u64).to_le_bytes());
    pack
}

fn config() -> MachineConfig {
    MachineConfig {
        vcpus: 2,
        memory_bytes: PAGES * PAGE_BYTES as u64,
        cpu_model: "soft-v1".into(),
        engine: "soft".into(),
        boot: Some(BootSource {
            kernel_path: "/boot/vmlinuz".into(),
            initrd_path: "/boot/initrd".into(),
            cmdline: "console=ttyS0".into(),
            ..Default::default()
        }),
        disks: vec![DiskConfig {
            path: "/srv/images/shared.raw".into(),
            size_bytes: 1 << 30,
            shared: true,
            read_only: true,
            ..Default::default()
        }],
        nets: vec![NetConfig { tap: "tap0".into(), mac: vec![0x52, 0x54, 0, 1, 2, 3], ..Default::default() }],
        seed: (0..32).collect(),
        epoch_ns: 1_767_225_600_000_000_000,
        tsc_hz: 1_000_000_000,
        tsc_per_instruction: 3,
        paced: true,
        ..Default::default()
    }
}

fn capabilities() -> CapabilitySet {
    CapabilitySet {
        model: "soft-v1".into(),
        atoms: vec![CapabilityAtom {
            leaf: 0x8000_0001,
            subleaf: 1,
            register: 3,
            mask: 0x2000_0000,
            value: 0x2000_0000,
            rule: CapabilityRule::Subset as i32,
            ..Default::default()
        }],
        phys_bits: 48,
        linear_bits: 48,
        tsc_khz: 1_000_000,
        tsc_scaling: true,
        engines: vec!["kvm".into(), "soft".into()],
        msrs: vec![0x174, 0xc000_0081],
        ..Default::default()
    }
}

/// The manifest of the checkpoint.
pub fn manifest() -> Manifest {
    let (pack, pages) = (pack(), raw_pages().len() as u32);
    let section_bytes = frame::encode_message(Kind::Section, &section()).len() as u32;
    let extent = PageExtent {
        first_page: RUN.first_page,
        pages: RUN.pages,
        pack: 0,
        offset: 0,
        frame_bytes: pages,
        skip: 0,
        ..Default::default()
    };
    Manifest {
        major: 1,
        minor: 0,
        checkpoint: CHECKPOINT.into(),
        vm_name: "vm1".into(),
        vm_id: VM_ID.into(),
        generation: 3,
        created_unix_ms: 1_767_225_600_123,
        config: Some(config()),
        capabilities: capabilities().encode_to_vec(),
        sections: vec![SectionRef {
            name: "clock".into(),
            pack: 0,
            offset: pages.into(),
            bytes: section_bytes,
            ..Default::default()
        }],
        maps: vec![PageMap { space: 0, pages: PAGES, extents: vec![extent], ..Default::default() }],
        packs: vec![PackRef {
            id: blake3::hash(&pack).as_bytes().to_vec(),
            bytes: pack.len() as u64,
            ..Default::default()
        }],
        digest: Some(digest()),
        parent: "fedcba9876543210".into(),
        stop_us: 1234,
        ..Default::default()
    }
}

/// Every word of the lane protocol, with the file that holds it.
pub fn words() -> Vec<(&'static str, Said)> {
    let hello = Hello {
        protocol_min: 1,
        protocol_max: 2,
        operation: "00000000000000aa".into(),
        secret: vec![0x5e; 32],
        lane: 1,
        lanes: 4,
        base: CHECKPOINT.into(),
        ..Default::default()
    };
    let reason = "the disk of this host is full".into();
    vec![
        ("frame-control-hello.bin", Said::Hello(hello)),
        ("frame-control-hello-reply.bin", Said::HelloReply(HelloReply { protocol: 1, ..Default::default() })),
        (
            "frame-control-round-end.bin",
            Said::RoundEnd(RoundEnd { round: 3, frames: 70_000, last: true, ..Default::default() }),
        ),
        ("frame-control-round-ack.bin", Said::RoundAck(RoundAck { round: 3, ..Default::default() })),
        (
            "frame-control-state-end.bin",
            Said::StateEnd(StateEnd { sections: 1, digest: Some(digest()), verify_full: true, ..Default::default() }),
        ),
        ("frame-control-ready.bin", Said::Ready(Ready { digest: Some(digest()), ..Default::default() })),
        ("frame-control-abort.bin", Said::Abort(Abort { code: 6, reason, ..Default::default() })),
    ]
}

/// A word to a runner.
pub fn request() -> RunnerRequest {
    let lease = RunnerLease { until_boottime_ns: 0x0123_4567_89ab_cdef, ..Default::default() };
    RunnerRequest { id: 7, request: Some(runner_request::Request::Lease(lease)), ..Default::default() }
}

/// A runner's answer.
pub fn reply() -> RunnerReply {
    let state = RunnerState {
        state: VmState::Paused as i32,
        reason: "the lease has ended".into(),
        retired_instructions: 1 << 40,
        epoch: 9,
        stopped_boottime_ns: 1,
        started_boottime_ns: 2,
        ..Default::default()
    };
    RunnerReply { id: 7, reply: Some(runner_reply::Reply::State(state)), ..Default::default() }
}

/// Body of the journal's frame. For this crate a block of a journal is bytes.
pub const JOURNAL: &[u8] = b"a block of a journal is bytes to this crate\x00\xff";

/// The first block of a recording: something was typed, and a packet came.
pub fn block() -> JournalBlock {
    let mut events = vec![1, 16, 0, 3];
    events.extend(b"ls\n");
    events.extend([2, 0xac, 0x02, 7, 0, 4, 0xde, 0xad, 0xbe, 0xef]);
    let cut = JournalCut {
        semantics: 1,
        state_digest: digest().state,
        config_digest: blake3::hash(&config().encode_to_vec()).as_bytes().to_vec(),
        ..Default::default()
    };
    JournalBlock {
        recording: (0xa0..0xb0).collect(),
        sequence: 0,
        previous: Vec::new(),
        start: Some(Position { retired: 1_000_000, skipped_tsc: 250, ..Default::default() }),
        end: Some(Position { retired: 1_000_316, skipped_tsc: 257, ..Default::default() }),
        realtime_ns: 1_767_225_600_000_000_000,
        events,
        event_count: 2,
        cut: Some(cut),
        ended: String::new(),
        ..Default::default()
    }
}

/// The head of a recording's file.
pub fn head() -> ExportHead {
    let checkpoint = CheckpointRecord {
        id: CHECKPOINT.into(),
        vm: "vm1".into(),
        vm_id: VM_ID.into(),
        generation: 3,
        digest: Some(digest()),
        ..Default::default()
    };
    let (checkpoint, config) = (Some(checkpoint), Some(config()));
    ExportHead { checkpoint, config, sections: vec![section()], pages: 2, ..Default::default() }
}

/// Every golden file of one frame, with the frame that this release writes for it.
pub fn frames() -> Vec<(&'static str, Vec<u8>)> {
    let control = |said| frame::encode_message(Kind::Control, &LaneMessage { message: Some(said) });
    let mut frames: Vec<_> = words().into_iter().map(|(name, said)| (name, control(said))).collect();
    frames.extend([
        ("frame-section.bin", frame::encode_message(Kind::Section, &section())),
        ("frame-section-ignorable.bin", frame::encode_message(Kind::Section, &ignorable_section())),
        ("frame-pages-raw.bin", raw_pages()),
        ("frame-pages-zero.bin", zero_pages()),
        ("frame-manifest.bin", frame::encode_message(Kind::Manifest, &manifest())),
        ("frame-pack-index.bin", frame::encode_message(Kind::PackIndex, &index())),
        ("frame-journal.bin", frame::encode(Kind::Journal, JOURNAL)),
        ("frame-journal-block.bin", frame::encode_message(Kind::Journal, &block())),
        ("frame-recording.bin", frame::encode_message(Kind::Recording, &head())),
        ("frame-runner-request.bin", frame::encode_message(Kind::Control, &request())),
        ("frame-runner-reply.bin", frame::encode_message(Kind::Control, &reply())),
    ]);
    frames
}

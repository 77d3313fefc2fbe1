//! Blocks of a recording, as a hostile bucket or file may hold them: through the chain, onto a tape, and into a machine.
//!
//! An input is a list of `JournalBlock`s, or the packed events of one. They are tried as they are, and then with what a stranger would take care of: hashes,
//! sequences, positions that follow each other and the digest of the first cut, so that the events reach the machine.

use std::sync::{Arc, OnceLock};

use prost::Message;
use proto::frame::{self, Kind};
use proto::v1::Section;
use proto::v1::{
    AppendJournalRequest, BootSource, DiskConfig, JournalBlock, JournalCut, MachineConfig, NetConfig, Position,
};
use vmcb_engine::cpu::CpuState;
use vmcb_engine::device::block::DiskImage;
use vmcb_engine::journal::{Chain, ChainError, Closing, Cut, Event, Head, RecordingId, SEMANTICS, Writer};
use vmcb_engine::machine::{Machine, Outcome, Parts};
use vmcb_engine::memory::{GuestMemory, sized_memfd};
use vmcb_engine::replay::{BootImages, Goal, Pause, Player, Rate, Tape};
use vmcb_engine::snapshot::state_digest;

const RAM_BYTES: u64 = 16 << 20;
const DISK_BYTES: u64 = 1 << 20;
const CODE: u64 = 0x10_0000;
const RECORDING: [u8; 16] = [9; 16];
/// How far a replay is followed: instructions, and looks of whoever might interrupt it.
const INSTRUCTIONS: u64 = 30_000;
const LOOKS: u32 = 60;
/// Most events of a block that is repaired.
const EVENTS_MAX: u32 = 64;

/// 32 bits, as PVH says: a timer of the LAPIC every 20,000 ticks, then `inc dword [0x20_0000]; hlt` for ever.
fn kernel() -> Vec<u8> {
    let mut code = Vec::new();
    for (register, value) in [(0xf0u32, 0x1ffu32), (0x3e0, 0xb), (0x320, 0x2_0040), (0x380, 20_000)] {
        code.extend([0xc7, 0x05]);
        code.extend([0xfee0_0000 + register, value].map(u32::to_le_bytes).concat());
    }
    code.extend([0xff, 0x05, 0, 0, 0x20, 0, 0xf4, 0xeb, 0xf7]);
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64 + 2 * 56, 0);
    (file[16], file[18], file[32], file[54], file[56]) = (2, 62, 64, 56, 2);
    file[24..32].copy_from_slice(&CODE.to_le_bytes());
    let mut put = |at: usize, word: u64| file[at..at + 8].copy_from_slice(&word.to_le_bytes());
    let note = 176 + code.len() as u64;
    for (header, kind, offset, bytes) in [(64, 1, 176, code.len() as u64), (120, 4, note, 24)] {
        put(header, kind);
        put(header + 8, offset);
        put(header + 24, CODE);
        put(header + 32, bytes);
        put(header + 40, bytes);
    }
    file.extend(code);
    file.extend([4u32, 8, 18].map(u32::to_le_bytes).concat());
    file.extend(b"Xen\0");
    file.extend(CODE.to_le_bytes());
    file
}

fn config() -> MachineConfig {
    MachineConfig {
        vcpus: 2,
        memory_bytes: RAM_BYTES,
        cpu_model: "soft-v1".into(),
        engine: "soft".into(),
        boot: Some(BootSource::default()),
        disks: vec![DiskConfig { size_bytes: DISK_BYTES, ..DiskConfig::default() }],
        nets: vec![NetConfig { mac: vec![2, 0, 0, 0, 0, 9], ..NetConfig::default() }],
        seed: vec![7; 32],
        epoch_ns: 1_767_225_600_000_000_000,
        tsc_hz: 1_000_000_000,
        tsc_per_instruction: 1,
        generation_id: vec![3; 16],
        ..MachineConfig::default()
    }
}

fn machine() -> Machine {
    let disk = sized_memfd("fuzzed-disk", DISK_BYTES).expect("the host has 1 MiB");
    let disk = DiskImage::from_fd(disk, false).expect("a disk of whole sectors");
    let memory = GuestMemory::create(RAM_BYTES).expect("the host has 16 MiB");
    Machine::build(&config(), Parts { memory, disks: vec![disk], nets: vec![None] })
        .expect("a configuration that is right")
}

/// The state with which every recording here begins, and what of RAM is not zero.
struct Base {
    sections: Vec<Section>,
    pages: Vec<(u64, Vec<u8>)>,
    start: Position,
    processor: Vec<u8>,
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let mut machine = machine();
        machine.boot(&kernel(), None).expect("the kernel boots");
        assert_eq!(machine.run(4), Outcome::Reached);
        let sections = machine.capture().expect("the machine has a state");
        let page = |gpa: u64| {
            let mut bytes = vec![0; 4096];
            machine.memory().read(gpa, &mut bytes).expect("it is RAM");
            (gpa, bytes)
        };
        let pages = (0..RAM_BYTES).step_by(4096).map(page).filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0));
        let start = Position { retired: machine.retired(), skipped_tsc: machine.skipped_tsc() };
        let processor = machine.peek_cpu(0).expect("there is a first vCPU").to_bytes();
        Base { pages: pages.collect(), start, processor, sections }
    })
}

/// A machine at the beginning.
fn begun() -> Machine {
    let mut machine = machine();
    for (gpa, bytes) in &base().pages {
        machine.memory().write(*gpa, bytes).expect("it is RAM");
    }
    machine.apply(&base().sections).expect("it was captured");
    machine
}

/// Takes any bytes.
pub fn run(data: &[u8]) {
    let AppendJournalRequest { blocks, generation, .. } =
        AppendJournalRequest::decode(data).unwrap_or_else(|_| packed(data));
    let mut chain = Chain::new();
    for block in &blocks {
        chain.take(block).map_or_else(|error| drop(error.to_string()), drop);
        chain.take(&frame::encode(Kind::Journal, block)).map_or_else(|error| drop(error.to_string()), drop);
    }
    let images = (generation & 1 == 0).then(|| BootImages { kernel: kernel(), initrd: None });
    if let Some(tape) = repaired(&blocks) {
        replay(tape, images);
    }
}

/// One block that has room for any events.
fn packed(events: &[u8]) -> AppendJournalRequest {
    let Position { retired, skipped_tsc } = base().start;
    let end = Some(Position { retired: retired + (1 << 30), skipped_tsc: skipped_tsc + (1 << 50) });
    let block = JournalBlock { end, events: events.to_vec(), ..JournalBlock::default() };
    AppendJournalRequest { blocks: vec![block.encode_to_vec().into()], ..AppendJournalRequest::default() }
}

/// Whether all of it is replayed to its end.
pub fn is_replayed(data: &[u8]) -> bool {
    let blocks = AppendJournalRequest::decode(data).expect("a list of blocks").blocks;
    let count = blocks.len();
    let tape = repaired(&blocks).expect("blocks that fit");
    let images = BootImages { kernel: kernel(), initrd: None };
    replay(tape, Some(images)) && count > 0
}

/// Follows a replay as far as it goes; true if that is its end.
fn replay(tape: Tape, images: Option<BootImages>) -> bool {
    let _ = (tape.span_ns(), tape.realtime_ns(7), tape.tsc_at(7), tape.ended());
    let mut player = match Player::new(begun(), Arc::new(tape), images) {
        Ok(player) => player,
        Err(error) => {
            drop(error.to_string());
            return false;
        }
    };
    let mut looks = 0;
    let mut interrupted = || {
        looks += 1;
        looks > LOOKS
    };
    match player.run_to(Goal::instruction(base().start.retired + INSTRUCTIONS), &mut interrupted) {
        Ok(pause) => pause == Pause::End,
        Err(error) => {
            drop(error.to_string());
            false
        }
    }
}

/// The blocks as one chain from the base; those that are beyond repair are left out. `None` if nothing is left.
fn repaired(blocks: &[impl AsRef<[u8]>]) -> Option<Tape> {
    let (mut chain, mut tape) = (Chain::new(), Tape::new(Rate { tsc_per_instruction: 1, tsc_hz: 1_000_000_000 }));
    let mut next = JournalBlock {
        recording: RECORDING.to_vec(),
        start: Some(base().start),
        cut: Some(JournalCut {
            semantics: SEMANTICS,
            state_digest: state_digest(&base().sections).0.to_vec(),
            config_digest: vec![0; 32],
        }),
        ..JournalBlock::default()
    };
    let mut any = false;
    for block in blocks {
        let Ok(block) = JournalBlock::decode(block.as_ref()) else { continue };
        let JournalBlock { end, realtime_ns, events, cut, ended, .. } = block;
        let cut = next.cut.clone().or(cut);
        let wanted = JournalBlock { end, realtime_ns, events, cut, ended, ..next.clone() };
        let Some((frame, taken)) = counted(&mut chain, wanted) else { continue };
        let end = taken.end;
        if tape.push(taken).is_err() {
            break;
        }
        any = true;
        let (sequence, previous) = (next.sequence + 1, frame[16..48].to_vec());
        next = JournalBlock { sequence, previous, start: Some(end.into()), cut: None, ..next };
    }
    any.then_some(tape)
}

/// The block with the count of events that it has.
fn counted(chain: &mut Chain, mut block: JournalBlock) -> Option<(Vec<u8>, vmcb_engine::journal::Block)> {
    for count in 0..=EVENTS_MAX {
        block.event_count = count;
        let frame = frame::encode_message(Kind::Journal, &block);
        match chain.take(&frame) {
            Ok(taken) => return Some((frame, taken)),
            Err(ChainError::Field { field: "event_count", .. }) => {}
            Err(error) => {
                drop(error.to_string());
                return None;
            }
        }
    }
    None
}

/// Everything that can happen; and new starts.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let (packet, bytes) = (vec![0xff; 60], vec![1, 2, 3]);
    let mut state = CpuState::from_bytes(&base().processor).expect("it was captured");
    state.gprs[3] = 0x1234;
    let inputs = vec![
        Event::Console(b"ls\n".to_vec()),
        Event::Packet { card: 0, bytes: packet.clone() },
        Event::Link { card: 0, up: false },
        Event::Held { card: 0, bytes: packet },
        Event::Released,
    ];
    let debugger = vec![Event::Memory { gpa: 0x30_0000, bytes }, Event::Processor { vcpu: 0, state: state.to_bytes() }];
    let resets = vec![Event::Console(b"x".to_vec()), Event::Reset, Event::Link { card: 0, up: true }, Event::Reset];
    let all = recording(&[&inputs[..], &debugger, &resets].concat());
    let all = AppendJournalRequest::decode(&all[..]).expect("it was just written");
    let all = JournalBlock::decode(&all.blocks[0][..]).expect("it was just written").events;
    vec![
        ("packed", all),
        ("inputs", recording(&inputs)),
        ("debugger", recording(&debugger)),
        ("resets", recording(&resets)),
    ]
}

/// Two blocks: the events, 50 ticks of idle time before each, and time that passes.
fn recording(events: &[Event]) -> Vec<u8> {
    let head = Head { recording: RecordingId(RECORDING), sequence: 0, previous: None };
    let cut = Cut { state_digest: state_digest(&base().sections).0, config_digest: [0; 32] };
    let mut at: vmcb_engine::journal::Position = base().start.into();
    let mut writer = Writer::new(head, at, cut);
    // The guest rests after its first two instructions.
    at.retired += 2;
    for event in events {
        at.skipped_tsc += 50;
        writer.add(at, event);
        if *event == Event::Reset {
            // It starts again, and has six instructions until it rests.
            at.retired += 6;
        }
    }
    let first = writer.close(Closing { position: at, realtime_ns: 1000, ended: "" });
    at.skipped_tsc += 100;
    let second = writer.close(Closing { position: at, realtime_ns: 2000, ended: "stopped" });
    let body = |closed: vmcb_engine::journal::Closed| {
        frame::decode(&closed.frame).map(|(_, body)| body.to_vec()).expect("it was just written")
    };
    AppendJournalRequest { blocks: vec![body(first).into(), body(second).into()], ..AppendJournalRequest::default() }
        .encode_to_vec()
}

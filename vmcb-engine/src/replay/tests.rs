//! Tests of the door: what is in the chain is what came through, in order, wherever the machine was meanwhile.

use prost::Message;
use proto::v1::{MachineConfig, NetConfig};

use super::*;
use crate::device::net::NetLink;
use crate::journal::{Block, Chain, ChainError, Event, Position, RecordingId};
use crate::machine::{Machine, Outcome, Parts};
use crate::memory::GuestMemory;

const ID: RecordingId = RecordingId([5; 16]);
const CODE: u64 = 0x10_0000;

/// 32-bit code, entered as PVH says: echoes what comes on the serial port, and counts at 0x20_0000, for ever.
const ECHO: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, 0xec, // again: mov dx, 0x3fd; in al, dx
    0xa8, 0x01, 0x74, 0x06, // test al, 1; je over
    0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, // mov dx, 0x3f8; in al, dx; out dx, al
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // over: inc dword [0x20_0000]
    0xeb, 0xe9, // jmp again
];

struct Unplugged;

impl crate::device::net::Link for Unplugged {
    fn send(&mut self, _: &[u8]) {}
}

fn config() -> MachineConfig {
    MachineConfig {
        vcpus: 1,
        memory_bytes: 16 << 20,
        cpu_model: "soft-v1".into(),
        engine: "soft".into(),
        boot: Some(Default::default()),
        nets: vec![NetConfig { tap: "tap0".into(), mac: vec![2, 0, 0, 0, 0, 9] }],
        seed: vec![7; 32],
        epoch_ns: 1_700_000_000_000_000_000,
        tsc_hz: 1_000_000_000,
        tsc_per_instruction: 1,
        generation_id: vec![3; 16],
        ..MachineConfig::default()
    }
}

/// An ELF with a PVH note (type 18 of "Xen": the 32-bit entry).
fn kernel() -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64 + 2 * 56, 0);
    (file[16], file[18], file[32], file[54], file[56]) = (2, 62, 64, 56, 2);
    file[24..32].copy_from_slice(&CODE.to_le_bytes());
    let mut put = |at: usize, word: u64| file[at..at + 8].copy_from_slice(&word.to_le_bytes());
    let (code, note) = (176u64, 176 + ECHO.len() as u64);
    for (header, kind, offset, bytes) in [(64, 1, code, ECHO.len() as u64), (120, 4, note, 24)] {
        put(header, kind);
        put(header + 8, offset);
        put(header + 24, CODE);
        put(header + 32, bytes);
        put(header + 40, bytes);
    }
    file.extend(ECHO);
    for word in [4u32, 8, 18] {
        file.extend(word.to_le_bytes());
    }
    file.extend(b"Xen\0");
    file.extend(CODE.to_le_bytes());
    file
}

fn machine() -> Machine {
    let plug: Option<NetLink> = Some(Box::new(Unplugged));
    let parts = Parts { memory: GuestMemory::create(16 << 20).unwrap(), disks: vec![], nets: vec![plug] };
    Machine::build(&config(), parts).unwrap()
}

fn booted() -> Door {
    let mut door = Door::new(machine());
    door.boot(&kernel(), None).unwrap();
    assert_eq!(door.run(1000), Outcome::Reached);
    door
}

fn recorded() -> Door {
    let mut door = booted();
    door.record(ID, 1 << 20, WhenFull::End).unwrap();
    door
}

/// Everything that was closed, checked.
fn blocks(door: &mut Door, chain: &mut Chain) -> Vec<Block> {
    let from = chain.head().map_or(0, |head| head.sequence);
    door.take(from).iter().map(|frame| chain.take(frame).unwrap()).collect()
}

fn at(retired: u64) -> Position {
    Position { retired, skipped_tsc: 0 }
}

#[test]
fn what_enters_is_in_the_chain_with_its_position() {
    let mut door = recorded();
    door.set_realtime(17);
    assert_eq!(door.console_input(b"ab"), 2);
    door.run(1500);
    assert!(!door.net_input(0, &[9; 60]), "no driver has given it a buffer");
    door.run(2000);
    door.set_link(0, false);
    door.close_block();
    let block = blocks(&mut door, &mut Chain::new()).remove(0);
    assert_eq!((block.sequence, block.start, block.end, block.realtime_ns), (0, at(1000), at(2000), 17));
    let found: Vec<(u64, Event)> = block.events.into_iter().map(|it| (it.position.retired, it.event)).collect();
    let packet = Event::Packet { card: 0, bytes: vec![9; 60] };
    let expected = [(1000, Event::Console(b"ab".to_vec())), (1500, packet), (2000, Event::Link { card: 0, up: false })];
    assert_eq!(found, expected);
    let digest = crate::snapshot::state_digest(&{
        let mut other = booted();
        other.capture().unwrap()
    });
    assert_eq!(block.cut.unwrap().state_digest, digest.0, "the segment begins with the state that was");
}

#[test]
fn a_capture_begins_a_segment_and_a_quiet_machine_says_nothing() {
    let mut door = recorded();
    let mut chain = Chain::new();
    door.run(2000);
    let sections = door.capture().unwrap();
    door.close_block();
    door.close_block();
    door.close_block();
    let said = blocks(&mut door, &mut chain);
    let cuts: Vec<bool> = said.iter().map(|block| block.cut.is_some()).collect();
    assert_eq!(cuts, [true, true]);
    assert_eq!((said[1].start, said[1].end), (at(2000), at(2000)));
    assert_eq!(said[1].cut.unwrap().state_digest, crate::snapshot::state_digest(&sections).0);
    assert!(blocks(&mut door, &mut chain).is_empty(), "what was taken is kept no longer");
    assert_eq!(door.info().unwrap().kept_bytes, 0);
}

#[test]
fn probes_come_at_their_instructions_however_the_run_is_cut() {
    let probes = |slices: u64| {
        let mut door = booted();
        // Time is set, so that no test runs so many instructions.
        let mut sections = door.capture().unwrap();
        let clock = sections.iter_mut().find(|section| section.name == "clock").unwrap();
        clock.body = proto::v1::ClockV1 { retired: PROBE_EVERY - 700, skipped_tsc: 0 }.encode_to_vec();
        door.apply(&sections).unwrap();
        door.record(ID, 1 << 20, WhenFull::End).unwrap();
        while door.position().retired < PROBE_EVERY + 500 {
            let next = (door.position().retired + slices).min(PROBE_EVERY + 500);
            assert_eq!(door.run(next), Outcome::Reached);
        }
        door.close_block();
        blocks(&mut door, &mut Chain::new()).remove(0).events
    };
    let whole = probes(10_000);
    assert!(whole.iter().all(|event| event.position.retired == PROBE_EVERY));
    let [Event::Detail(detail), Event::Probe(_)] = [&whole[0].event, &whole[1].event] else { panic!("{whole:?}") };
    // What a journal pays for names: once a second of a busy guest.
    let cpu = &detail.cpus[0];
    let bytes = cpu.words.len() * 8 + cpu.checks.len() + detail.devices.len() * 4;
    assert!(detail.cpus.len() == 1 && whole.len() == 2 && bytes < 400, "{bytes} bytes");
    for slices in [1, 7, 100, 700] {
        assert_eq!(probes(slices), whole, "slices of {slices}");
    }
}

#[test]
fn the_chain_goes_on_where_the_machine_goes() {
    let mut door = recorded();
    let mut chain = Chain::new();
    door.console_input(b"x");
    door.close_block();
    assert_eq!(blocks(&mut door, &mut chain).len(), 1);
    door.run(3000);
    assert!(door.net_hold(0, &[1; 60]));
    let packed = door.pack().unwrap();

    let mut elsewhere = Door::new(machine());
    let mut ram = vec![0; 16 << 20];
    door.machine().memory().read(0, &mut ram).unwrap();
    elsewhere.machine_mut().memory().write(0, &ram).unwrap();
    elsewhere.apply(&packed).unwrap();
    assert_eq!(elsewhere.pack().unwrap(), packed, "what arrived is what left, and nothing has been added");
    assert!(elsewhere.is_recording());
    elsewhere.run(4000);
    elsewhere.stop_recording("stopped");
    // What was not taken at the source is taken here.
    let said = blocks(&mut elsewhere, &mut chain);
    let spans: Vec<(u64, u64)> = said.iter().map(|block| (block.start.retired, block.end.retired)).collect();
    assert_eq!(spans, [(1000, 3000), (3000, 4000)]);
    assert_eq!(said[0].events[0].event, Event::Held { card: 0, bytes: vec![1; 60] });
    assert_eq!(said[1].events[0].event, Event::Released);
    assert_eq!((said[1].cut.is_some(), said[1].ended.as_str()), (true, "stopped"));

    // The source goes on if the move fails: the same chain again, until one of the two is ended by its owner.
    door.run(3500);
    door.close_block();
    let mut fork = Chain::new();
    assert!(door.take(0).iter().all(|frame| !matches!(fork.take(frame), Err(ChainError::Previous { .. }))));
}

#[test]
fn a_recorder_without_room_ends_or_waits_as_it_was_told() {
    for when_full in [WhenFull::End, WhenFull::Wait] {
        let mut door = booted();
        door.record(ID, 150_000, when_full).unwrap();
        let mut packets = 0;
        while !door.must_wait() && door.info().unwrap().ended.is_empty() && packets < 1000 {
            door.net_input(0, &[packets as u8; 1500]);
            door.close_block();
            packets += 1;
        }
        assert!((90..110).contains(&packets), "{packets}");
        let kept = door.info().unwrap();
        assert_eq!(
            (door.must_wait(), kept.ended.is_empty()),
            (when_full == WhenFull::Wait, when_full == WhenFull::Wait)
        );
        let mut chain = Chain::new();
        while !blocks(&mut door, &mut chain).is_empty() {}
        assert_eq!(chain.head().unwrap().sequence, kept.next_sequence, "everything that was kept is a chain");
        door.take(kept.next_sequence);
        assert!(!door.must_wait());
    }
}

#[test]
fn only_one_recording_at_a_time() {
    let mut door = recorded();
    let other = RecordingId([6; 16]);
    assert!(matches!(door.record(other, 1, WhenFull::End), Err(DoorError::Recording(ID))));
    door.record(ID, 1 << 20, WhenFull::Wait).unwrap();
    door.stop_recording("stopped");
    door.record(other, 1 << 20, WhenFull::End).unwrap();
    assert_eq!(door.info().unwrap().recording, other.0);
    assert!(matches!(Door::new(machine()).record(ID, 1, WhenFull::End), Err(DoorError::Machine(_))));
}

#[test]
fn what_came_along_is_not_believed() {
    let mut door = recorded();
    door.close_block();
    let packed = door.pack().unwrap();
    let hostile = |change: &dyn Fn(&mut proto::v1::RecorderV1)| {
        let mut packed = packed.clone();
        let section = packed.iter_mut().find(|section| section.name == SECTION).unwrap();
        let mut message = proto::v1::RecorderV1::decode(&section.body[..]).unwrap();
        change(&mut message);
        section.body = message.encode_to_vec();
        Door::new(machine()).apply(&packed)
    };
    hostile(&|_| {}).unwrap();
    let parcel = |applied: Result<(), DoorError>| matches!(applied, Err(DoorError::Parcel(_)));
    assert!(parcel(hostile(&|message| message.recording.truncate(3))));
    assert!(parcel(hostile(&|message| message.previous.clear())));
    assert!(parcel(hostile(&|message| message.full = 9)));
    assert!(parcel(hostile(&|message| message.sequence = 0)));
    let mut twice = packed.clone();
    twice.push(packed.last().unwrap().clone());
    assert!(parcel(Door::new(machine()).apply(&twice)));
    let mut newer = packed.clone();
    newer.last_mut().unwrap().major = 2;
    assert!(parcel(Door::new(machine()).apply(&newer)));
}

/// RAM and state of a machine, without its changing.
fn everything(door: &mut Door) -> (Vec<u8>, crate::machine::Probe) {
    let mut ram = vec![0; 16 << 20];
    door.machine().memory().read(0, &mut ram).unwrap();
    (ram, door.machine().probe())
}

fn restored(ram: &[u8], sections: &[proto::v1::Section]) -> Door {
    let mut door = Door::new(machine());
    door.machine_mut().memory().write(0, ram).unwrap();
    door.apply(sections).unwrap();
    door
}

#[test]
fn a_machine_arrives_at_any_instant_of_what_was_recorded_since_its_checkpoint() {
    let mut door = recorded();
    let sections = door.capture().unwrap();
    let ram = everything(&mut door).0;
    let mut instants = Vec::new();
    for n in 0..40u64 {
        door.console_input(&[b'a' + (n % 26) as u8]);
        door.run(door.position().retired + 300 + n * 17);
        // Between two events: at the position of one it is there already.
        instants.push((door.position(), everything(&mut door)));
        door.run(door.position().retired + 10);
        if n == 20 {
            door.capture().unwrap();
        }
    }
    door.stop_recording("stopped");
    let frames = door.take(1);
    for (position, expected) in instants.into_iter().step_by(7) {
        let mut other = restored(&ram, &sections);
        frames.iter().for_each(|frame| other.expect(frame).unwrap());
        other.arrive_at(position, None).unwrap();
        assert_eq!(other.arriving(), Some(at(1000)));
        while !other.arrive().unwrap() {}
        assert_eq!((other.arriving(), other.position()), (None, position));
        assert!(everything(&mut other) == expected, "at {position}");
    }
    // Out of what was recorded, or from another state: refused, and the machine is as it was.
    let mut other = restored(&ram, &sections);
    frames.iter().for_each(|frame| other.expect(frame).unwrap());
    assert!(matches!(other.arrive_at(at(1), None), Err(ArrivalError::Span { .. })));
    assert!(matches!(other.arrive_at(at(1500), None), Err(ArrivalError::Span { .. })));
    let mut other = restored(&ram, &sections);
    assert!(matches!(other.expect(&frames[1][1..]), Err(ArrivalError::Chain(_))));
    let mut changed = ram.clone();
    changed[CODE as usize + 21] ^= 0x80;
    let mut other = restored(&changed, &sections);
    frames.iter().for_each(|frame| other.expect(frame).unwrap());
    other.arrive_at(door.position(), None).unwrap();
    let error = loop {
        match other.arrive() {
            Ok(false) => {}
            Ok(true) => panic!("it is another guest"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ArrivalError::Play(_)), "{error}");
}

#[test]
fn where_files_lie_is_no_part_of_what_a_recording_is_of() {
    let digest = config_digest(&config());
    let mut elsewhere = config();
    elsewhere.boot.as_mut().unwrap().kernel_path = "/elsewhere".into();
    elsewhere.nets[0].tap = "tap7".into();
    assert_eq!(config_digest(&elsewhere), digest);
    for other in [
        MachineConfig { seed: vec![8; 32], ..config() },
        MachineConfig { nets: vec![NetConfig { mac: vec![2, 0, 0, 0, 0, 8], ..NetConfig::default() }], ..config() },
        MachineConfig { vcpus: 2, ..config() },
    ] {
        assert_ne!(config_digest(&other), digest);
    }
}

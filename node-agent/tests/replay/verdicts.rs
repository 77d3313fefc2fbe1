//! What `vm-replay` answers.

use node_agent::replay::again::twice;
use vmcb_engine::journal::{Chain, Closing, Event, Head, Position, RecordingId, Writer};
use vmcb_engine::machine::Machine;
use vmcb_engine::replay::{Spacing, Timeline};

use crate::files::{Directory, Parts, lines, parts, recording, seed, vm_replay};
use crate::replaying::{Plan, Recorded, TURNS, record_guest, small};

#[test]
fn a_recording_is_the_same_again() {
    let directory = Directory::new("same");
    let (recorded, parts) = recording(300_000);
    let file = directory.file("one.gwr", &parts);
    let (said, code) = lines(&vm_replay(&file, &["--check"]));
    assert_eq!((said.last().unwrap().as_str(), code), ("same", 0));
    assert!(said[0].contains("vm1") && said[0].contains("0011223344556677"));
    // From each cut too.
    for base in &recorded.bases[1..] {
        let mut chain = Chain::new();
        let blocks: Vec<_> = recorded.frames.iter().map(|frame| chain.take(frame).unwrap()).collect();
        let first = blocks.iter().rposition(|block| block.cut.is_some() && block.start == base.position).unwrap();
        let file = directory.file("cut.gwr", &crate::files::parts(&recorded, base, first));
        let (said, code) = lines(&vm_replay(&file, &["--check"]));
        assert_eq!((said.last().unwrap().as_str(), code), ("same", 0));
    }
}

#[test]
fn golden_recordings_of_the_engine_are_files_of_ours() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../vmcb-engine/tests/golden/recordings");
    let folder = std::path::Path::new(folder).join(format!("v{}", vmcb_engine::journal::SEMANTICS));
    let mut replayed = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let (said, code) = lines(&vm_replay(&entry.unwrap().path(), &["--check"]));
        assert_eq!((said.last().unwrap().as_str(), code), ("same", 0));
        replayed += 1;
    }
    assert!(replayed > 2);
}

#[test]
fn a_flipped_bit_is_followed_to_its_first_consequence() {
    let directory = Directory::new("flip");
    let (_, parts) = recording(200_000);
    let file = directory.file("one.gwr", &parts);
    // The count of turns: the guest loads it into ECX two instructions after it counts.
    let (said, code) = lines(&vm_replay(&file, &["--flip", &format!("{TURNS:#x}:3")]));
    assert_eq!(code, 1);
    let last = said.last().unwrap();
    assert!(last.starts_with("diverged: at instruction "), "{last}");
    let instruction = said.iter().find(|line| line.starts_with("executed: ")).unwrap();
    // Counting it changes flags at the earliest, loading it changes a register for sure.
    assert!(instruction.contains("200004h"), "{instruction}");
    assert!(said.iter().any(|line| line.contains("cpu/0 ") && line.contains("with the bit flipped")), "{said:?}");
    // A byte that nobody reads.
    let (said, code) = lines(&vm_replay(&file, &["--flip", "0xe00000:0"]));
    assert_eq!((said.last().unwrap().as_str(), code), ("1 page differs at the end", 0));
    assert!(said.iter().any(|line| line == "page 0xe00000 of RAM differs at the end"));
    let (_, code) = lines(&vm_replay(&file, &["--flip", "0xffffffffff:0"]));
    assert_eq!(code, 2);
}

#[test]
fn who_wrote_last_and_what_was_said_is_told_at_any_instant() {
    let directory = Directory::new("last");
    let (recorded, parts) = recording(300_000);
    let file = directory.file("one.gwr", &parts);
    let at = ["--to-instruction", "150000"];
    let (said, code) = lines(&vm_replay(&file, &[&at[..], &["--last-write", "0x200004", "--length", "4"]].concat()));
    assert_eq!(code, 0);
    assert!(said.iter().any(|line| line.starts_with("by vCPU 0, rip 0x100")), "{said:?}");
    assert!(said.iter().any(|line| line.contains("inc dword ptr [200004h]")), "{said:?}");
    let change = said.last().unwrap().split(" became ").map(|word| u64::from_str_radix(&word[2..], 16).unwrap());
    let change: Vec<u64> = change.collect();
    assert_eq!(change[1], change[0] + 1);
    // By name.
    let symbols = directory.0.join("symbols.elf");
    std::fs::write(&symbols, crate::symbols::elf(&[("turns", TURNS.into(), 4), ("code", 0x10_0000, 0x1000)])).unwrap();
    let symbols = ["--symbols", symbols.to_str().unwrap(), "--last-write", "turns"];
    let (named, code) = lines(&vm_replay(&file, &[&at[..], &symbols].concat()));
    assert_eq!(code, 0);
    assert!(named.iter().any(|line| line.contains("<code+0x")), "{named:?}");
    assert_eq!(named.last(), said.last());
    let nobody = vm_replay(&file, &["--last-write", "0xe00000"]);
    assert_eq!(nobody.status.code(), Some(1));
    // The console of the whole.
    let (console, _) = lines(&vm_replay(&file, &["--console"]));
    assert!(!recorded.console.is_empty() && console.len() > 4);
    // An instant outside is answered with what there is.
    let outside = vm_replay(&file, &["--to-instruction", "1"]);
    let text = String::from_utf8(outside.stderr).unwrap();
    assert!(
        outside.status.code() == Some(2) && text.contains("was not recorded") && text.contains("from instruction 1000")
    );
    let outside = vm_replay(&file, &["--at-unix-ns", "5"]);
    assert!(String::from_utf8(outside.stderr).unwrap().contains("was not recorded"));
}

#[test]
fn instants_are_found_by_the_wall_clock() {
    let directory = Directory::new("clock");
    let (_, parts) = recording(300_000);
    let file = directory.file("one.gwr", &parts);
    let recording = node_agent::replay::file::open(&file, None).unwrap();
    let (first, last) = recording.player.tape().span_ns();
    assert!(first < last);
    let middle = first + (last - first) / 2;
    let (said, code) = lines(&vm_replay(&file, &["--at-unix-ns", &middle.to_string()]));
    let now = said.last().unwrap();
    assert!(code == 0 && now.starts_with("now at instruction "), "{now}");
    let clock = node_agent::replay::instant::clock(middle);
    assert_eq!(now.split(", ").last().unwrap()[..22], clock[..22], "to within some microseconds");
}

#[test]
fn a_divergence_is_named_with_what_was_good_before() {
    let directory = Directory::new("diverged");
    let (recorded, mut parts) = recording(200_000);
    // Another byte is typed than was: a chain of its own that is sound, but not what happened.
    let mut chain = Chain::new();
    let blocks: Vec<_> = recorded.frames.iter().map(|frame| chain.take(frame).unwrap()).collect();
    let (start, end) = (blocks[0].start, blocks.last().unwrap().end);
    let head = vmcb_engine::journal::Head {
        recording: vmcb_engine::journal::RecordingId([5; 16]),
        sequence: 0,
        previous: None,
    };
    let mut writer = vmcb_engine::journal::Writer::new(head, start, blocks[0].cut.unwrap());
    let probe = vmcb_engine::journal::Probe { cpus: vec![[1; 8]], devices: [2; 8] };
    let at = Position { retired: 100_000, skipped_tsc: 0 };
    let mut player = recorded.player(&recorded.bases[0]);
    player.run_to(vmcb_engine::replay::Goal::position(at), &mut || false).unwrap();
    let late = player.position();
    let before = blocks.iter().flat_map(|block| &block.events).filter(|stamped| stamped.position < late);
    before.for_each(|stamped| writer.add(stamped.position, &stamped.event));
    writer.add(late, &Event::Probe(probe));
    let closing =
        vmcb_engine::journal::Closing { position: Position { retired: end.retired, ..end }, realtime_ns: 9, ended: "" };
    parts.blocks = vec![writer.close(closing).frame];
    let file = directory.file("one.gwr", &parts);
    let (said, code) = lines(&vm_replay(&file, &["--check"]));
    assert_eq!(code, 1);
    let last = said.last().unwrap();
    assert!(last.starts_with(&format!("diverged: at instruction {} (skipped ", late.retired)), "{last}");
    assert!(
        last.contains("the digest of cpu/0 is ") && last.ends_with("the recording says 0101010101010101"),
        "{last}"
    );
}

/// A recording with probes so close that there are many.
fn probed() -> Recorded {
    record_guest(small(), Plan { probe_every: 20_000, ..Plan::new(seed(), 200_000) })
}

/// The same file, every hash of it right, of a machine whose RAM had one bit flipped.
fn flipped_and_sealed(recorded: &Recorded) -> Parts {
    let mut base = recorded.bases[0].clone();
    base.ram[TURNS as usize] ^= 8;
    parts(recorded, &base, 0)
}

#[test]
fn a_bit_that_was_flipped_in_a_file_is_named_with_its_pages() {
    let directory = Directory::new("damaged");
    let (_, good) = recording(100_000);
    let mut bytes = good.bytes();
    // A byte of the first page's frame, far behind its header.
    let at = bytes.len() - good.blocks.iter().map(Vec::len).sum::<usize>() - 100;
    bytes[at] ^= 1;
    let file = directory.0.join("damaged.gwr");
    std::fs::write(&file, &bytes).unwrap();
    let output = vm_replay(&file, &["--check"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.contains("damaged: a frame of pages 0x"), "{said}");
}

#[test]
fn a_base_that_was_changed_and_sealed_again_is_named_by_the_first_probe_and_beside_a_good_file_by_the_instruction() {
    let directory = Directory::new("sealed");
    let recorded = probed();
    let good = directory.file("good.gwr", &parts(&recorded, &recorded.bases[0], 0));
    let (said, code) = lines(&vm_replay(&good, &["--check"]));
    assert_eq!((said.last().unwrap().as_str(), code), ("same", 0));
    let bad = directory.file("bad.gwr", &flipped_and_sealed(&recorded));
    let (said, code) = lines(&vm_replay(&bad, &["--check"]));
    let last = said.last().unwrap();
    assert!(code == 1 && last.starts_with("diverged: at instruction "), "{last}");
    assert!(last.contains("cpu/0 ") && last.contains(", the recording says "), "a field is named: {last}");
    assert!(
        said.iter().any(|line| line.contains("were executed twice, in two ways, and both are the same")),
        "{said:?}"
    );

    let against = ["--against", good.to_str().unwrap()];
    let (said, code) = lines(&vm_replay(&bad, &against));
    assert_eq!(code, 1);
    let executed = said.iter().find(|line| line.starts_with("executed: ")).unwrap();
    assert!(executed.contains("200004h"), "{executed}");
    let first = said.last().unwrap();
    assert!(first.contains("cpu/0 ") && first.contains(", in this file "), "{first}");
    // What `--flip` says of the good file is the same instruction.
    let (flipped, _) = lines(&vm_replay(&good, &["--check", "--flip", &format!("{TURNS:#x}:3")]));
    assert!(
        flipped.contains(executed) && flipped.iter().any(|line| line.contains("the recording says")),
        "{flipped:?}"
    );
    assert_eq!(flipped.last().unwrap().split(" is ").next(), first.split(" is ").next());

    let (_, other) = recording(100_000);
    let other = directory.file("other.gwr", &other);
    let output = vm_replay(&bad, &["--against", other.to_str().unwrap()]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.contains("this is another recording"), "{said}");
}

#[test]
fn a_probe_that_says_something_else_is_named_with_its_register() {
    let directory = Directory::new("tampered");
    let recorded = probed();
    let mut parts = parts(&recorded, &recorded.bases[0], 0);
    let mut chain = Chain::new();
    let blocks: Vec<_> = recorded.frames.iter().map(|frame| chain.take(frame).unwrap()).collect();
    let first = &blocks[0];
    let head = Head { recording: RecordingId([5; 16]), sequence: 0, previous: None };
    let mut writer = Writer::new(head, first.start, first.cut.unwrap());
    let mut tampered = None;
    for stamped in blocks.iter().flat_map(|block| &block.events) {
        let mut event = stamped.event.clone();
        if let Event::Detail(detail) = &mut event
            && tampered.is_none()
        {
            detail.cpus[0].words[6] ^= 0x10;
            tampered = Some((stamped.position, detail.cpus[0].words[6]));
        }
        writer.add(stamped.position, &event);
    }
    let position = blocks.last().unwrap().end;
    parts.blocks = vec![writer.close(Closing { position, realtime_ns: 9, ended: "" }).frame];
    let (said, code) = lines(&vm_replay(&directory.file("one.gwr", &parts), &["--check"]));
    let (at, rsi) = tampered.unwrap();
    let verdict = format!(
        "diverged: at instruction {} (skipped {}): cpu/0 rsi is {:#x}, the recording says {rsi:#x}",
        at.retired,
        at.skipped_tsc,
        rsi ^ 0x10
    );
    assert_eq!((said.last().unwrap(), code), (&verdict, 1));
}

#[test]
fn an_engine_that_executes_a_span_in_two_ways_is_at_fault_and_the_instruction_is_named() {
    let recorded = probed();
    let spacing = Spacing { coarse: u64::MAX, fine: u64::MAX, ..Spacing::default() };
    let mut timeline = Timeline::new(recorded.player(&recorded.bases[0]), spacing).unwrap();
    let until = recorded.bases[0].position.retired + 150_000;
    let always = |machine: &mut Machine| machine.set_block_ops_max(usize::MAX);
    let alone = |machine: &mut Machine| machine.set_block_ops_max(1);
    assert_eq!(twice(&mut timeline, until, &mut always.clone(), &mut alone.clone(), None).unwrap(), None);
    // A fault that lies in wait in RAM, as one of an engine would.
    let mut faulty = |machine: &mut Machine| {
        alone(machine);
        let mut byte = [0];
        machine.memory().read(TURNS.into(), &mut byte).unwrap();
        machine.memory().write(TURNS.into(), &[byte[0] ^ 8]).unwrap();
    };
    let apart = twice(&mut timeline, until, &mut always.clone(), &mut faulty, None).unwrap().unwrap();
    assert!(apart.lines.iter().any(|line| line.starts_with("executed: ") && line.contains("200004h")), "{apart:?}");
    assert!(apart.lines.last().unwrap().contains("cpu/0 "), "{apart:?}");
    assert!(apart.position.retired < recorded.bases[0].position.retired + 20_000, "{apart:?}");
    // It was looked for from the beginning each time: the timeline is as good as before.
    assert_eq!(twice(&mut timeline, until, &mut always.clone(), &mut alone.clone(), None).unwrap(), None);
}

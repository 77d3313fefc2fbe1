//! What `vm-replay` answers.

use vmcb_engine::journal::{Chain, Event, Position};

use crate::files::{Directory, lines, recording, vm_replay};
use crate::replaying::TURNS;

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

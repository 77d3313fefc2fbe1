//! Files that nobody should have written: each is refused with a reason, none panics.

use proto::frame::{self, Kind};
use proto::v1::{ExportHead, JournalBlock};
use vmcb_engine::journal::{Chain, SEMANTICS};

use crate::files::{Directory, Parts, parts, recording, seed, vm_replay};
use crate::replaying::{Random, record};

/// What `vm-replay --check` says of a file that it refuses.
fn refused(directory: &Directory, bytes: &[u8]) -> String {
    let path = directory.0.join("hostile.gwr");
    std::fs::write(&path, bytes).unwrap();
    let output = vm_replay(&path, &["--check"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    println!("{}", text.trim_end());
    text
}

fn head(parts: &Parts, change: impl FnOnce(&mut ExportHead)) -> Vec<u8> {
    let mut parts = parts.clone();
    change(&mut parts.head);
    parts.bytes()
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let directory = Directory::new("hostile");
    let (recorded, good) = recording(150_000);
    let other = record(seed() ^ 0xffff, 150_000, false);
    let said = |change: &dyn Fn(&mut Parts)| {
        let mut parts = good.clone();
        change(&mut parts);
        refused(&directory, &parts.bytes())
    };
    assert!(good.blocks.len() > 3 && recorded.bases.len() > 1);
    assert!(said(&|parts| parts.blocks.swap(1, 2)).contains("out of order"));
    assert!(said(&|parts| drop(parts.blocks.remove(1))).contains("missing"));
    assert!(said(&|parts| parts.blocks[1] = other.frames[1].clone()).contains("another history"));
    // A segment of the other recording, from a cut that this one does not have.
    let mut chain = Chain::new();
    let cut = other.frames.iter().map(|frame| chain.take(frame).unwrap().cut.is_some());
    let cut = cut.enumerate().filter(|(_, is_cut)| *is_cut).map(|(at, _)| at).last();
    assert!(cut > Some(0));
    let theirs = other.frames[cut.unwrap()..].to_vec();
    assert!(said(&|parts| parts.blocks = theirs.clone()).contains("of another one, or another VM's"));
    assert!(said(&|parts| parts.blocks.clear()).contains("no journal"));
    assert!(said(&|parts| drop(parts.pages.pop())).contains("pages are in the file"));
    assert!(said(&|parts| parts.pages[0] = parts.pages[1].clone()).contains("RAM is not what"));
    assert!(said(&|parts| parts.pages.push(parts.blocks[0].clone())).contains("out of order"));
    assert!(said(&|parts| parts.blocks.push(parts.pages[0].clone())).contains("kind Pages here"));
    let newer = said(&|parts| {
        let mut block: JournalBlock = frame::decode_message(Kind::Journal, &parts.blocks[0]).unwrap();
        block.cut.as_mut().unwrap().semantics = SEMANTICS + 1;
        parts.blocks[0] = frame::encode_message(Kind::Journal, &block);
    });
    assert!(newer.contains(&(SEMANTICS + 1).to_string()), "{newer}");
    assert!(refused(&directory, b"").contains("empty"));
    assert!(refused(&directory, &[7; 4000]).contains("no recording"));
    assert!(refused(&directory, &good.pages[0]).contains("first is of kind Pages"));
    // Parts of another base.
    let wrong = parts(&recorded, &recorded.bases[1], 0);
    assert!(refused(&directory, &wrong.bytes()).contains("does not begin at this file's checkpoint"));
}

#[test]
fn heads_that_lie_are_refused_before_anything_is_allocated() {
    let directory = Directory::new("heads");
    let (_, good) = recording(100_000);
    let config = |change: &dyn Fn(&mut proto::v1::MachineConfig)| {
        refused(&directory, &head(&good, |head| change(head.config.as_mut().unwrap())))
    };
    config(&|config| config.memory_bytes = 1 << 60);
    config(&|config| config.memory_bytes = 0);
    config(&|config| config.disks[0].size_bytes = 1 << 49);
    config(&|config| config.disks[0].size_bytes = 0);
    assert!(config(&|config| config.disks[0].shared = true).contains("shared"));
    config(&|config| config.disks = vec![config.disks[0].clone(); 4000]);
    config(&|config| config.vcpus = 4_000_000);
    config(&|config| config.tsc_hz = 0);
    config(&|config| config.tsc_per_instruction = 0);
    config(&|config| config.seed = vec![1]);
    assert!(config(&|config| config.epoch_ns += 1).contains("another configuration"));
    config(&|config| config.boot.as_mut().unwrap().image_bytes = 1 << 50);
    refused(&directory, &head(&good, |head| head.config = None));
    refused(&directory, &head(&good, |head| head.checkpoint = None));
    refused(&directory, &head(&good, |head| drop(head.sections.pop())));
    refused(&directory, &head(&good, |head| head.pages = u64::MAX));
}

#[test]
fn a_file_may_be_torn_anywhere_and_is_changed_nowhere() {
    let directory = Directory::new("torn");
    let (_, good) = recording(100_000);
    let bytes = good.bytes();
    let journal: usize = good.blocks.iter().map(Vec::len).sum();
    let base = bytes.len() - journal;
    let seed = seed();
    println!("seed {seed}");
    let mut random = Random(seed);
    let open = |bytes: &[u8]| {
        let path = directory.0.join("torn.gwr");
        std::fs::write(&path, bytes).unwrap();
        node_agent::replay::file::open(&path, None)
    };
    let whole = open(&bytes).unwrap();
    assert!(whole.warnings.is_empty());
    for _ in 0..40 {
        let cut = 1 + random.below(bytes.len() as u64 - 1) as usize;
        match open(&bytes[..cut]) {
            Ok(torn) => {
                assert!(cut > base + good.blocks[0].len() - 1);
                assert!(torn.player.tape().end() <= whole.player.tape().end());
                let at_edge = torn.warnings.is_empty();
                assert!(at_edge || torn.warnings[0].contains("torn"), "{:?}", torn.warnings);
            }
            Err(_) => assert!(cut < base + good.blocks[0].len()),
        }
        let bit = random.below(bytes.len() as u64 * 8) as usize;
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        // A length in the last block's header that grew makes the file look torn.
        if let Ok(shorter) = open(&changed) {
            assert!(!shorter.warnings.is_empty(), "bit {bit} of {} was not noticed", bytes.len());
        }
    }
    // Zeros at the end are what a crashed host leaves.
    let mut zeros = bytes.clone();
    zeros.extend([0; 5000]);
    assert!(open(&zeros).unwrap().warnings[0].contains("torn"));
}

//! The fuzz bodies on the compiler and in the time of a normal test run: their seeds, the corpora, and seeded mutations of both.
//!
//! `GODWIT_FUZZ_SEED` and `GODWIT_FUZZ_COUNT` (inputs a body) make it another or a longer run; `GODWIT_GOLDEN=write` writes
//! seeds that `fuzz/corpus` lacks. An input that fails is printed as hex; put it into the corpus with the fix.
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

#[path = "../fuzz/bodies/mod.rs"]
mod bodies;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;

use bodies::{TARGETS, Target, mix};

const SEED: u64 = 0x6064_7769_7401;
/// Longest input that a mutation makes.
const BYTES_MAX: usize = 6000;
/// Numbers at which programs break.
const EDGES: [u64; 12] =
    [0, 1, 0x7f, 0x80, 0xff, 0xfff, 0x1000, 0x7fff_ffff, 0xffff_ffff, 1 << 47, i64::MAX as u64, u64::MAX];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).expect("a body of this name")
}

fn corpus(target: &Target) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name)
}

/// Seeds and corpus, in order of name.
fn inputs(target: &Target) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(corpus(target)).expect("a corpus").map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    let seeds = (target.seeds)().into_iter().map(|(_, bytes)| bytes);
    seeds.chain(files.iter().map(|path| std::fs::read(path).expect("a file"))).collect()
}

fn run(target: &Target, input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(input))) {
        let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        eprintln!("{} fails on {} bytes: {hex}", target.name, input.len());
        resume_unwind(panic);
    }
}

/// A changed copy of one input, now and then with a piece of another.
fn mutate(inputs: &[Vec<u8>], state: &mut u64) -> Vec<u8> {
    let mut below = |limit: usize| (mix(state) % limit.max(1) as u64) as usize;
    let mut input = inputs[below(inputs.len())].clone();
    for _ in 0..=below(5) {
        let at = below(input.len());
        match below(7) {
            0 => input.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << below(8)),
            1 => input.get_mut(at).into_iter().for_each(|byte| *byte = below(256) as u8),
            2 => {
                let (edge, width) = (EDGES[below(EDGES.len())].to_le_bytes(), 1 << below(4));
                input.iter_mut().skip(at).zip(&edge[..width]).for_each(|(byte, edge)| *byte = *edge);
            }
            3 => drop(input.drain(at..(at + 1 + below(8)).min(input.len()))),
            4 => {
                let random: Vec<u8> = (0..1 + below(16)).map(|_| below(256) as u8).collect();
                drop(input.splice(at..at, random));
            }
            5 => {
                let other = &inputs[below(inputs.len())];
                let from = below(other.len());
                let piece = other[from..(from + 1 + below(64)).min(other.len())].to_vec();
                drop(input.splice(at..at, piece));
            }
            _ => input.truncate(at + 1),
        }
    }
    input.truncate(BYTES_MAX);
    input
}

fn smoke(name: &str, count: u64) {
    let (target, seed) = (target(name), number("GODWIT_FUZZ_SEED", SEED));
    let count = number("GODWIT_FUZZ_COUNT", count);
    println!("{name}: seed {seed}, {count} inputs");
    let inputs = inputs(target);
    inputs.iter().for_each(|input| run(target, input));
    run(target, &[]);
    let mut state = seed;
    for _ in 0..count {
        run(target, &mutate(&inputs, &mut state));
    }
}

#[test]
fn frames_of_a_stranger() {
    smoke("frame", 3000);
}

#[test]
fn recordings_of_a_stranger() {
    smoke("journal", 1500);
}

#[test]
fn sections_of_a_stranger() {
    smoke("sections", 1500);
}

#[test]
fn vmcbs_of_a_stranger() {
    smoke("vmcb", 3000);
}

#[test]
fn code_of_a_stranger() {
    smoke("x86", 300);
}

#[test]
fn drivers_of_a_stranger() {
    smoke("virtqueue", 3000);
}

#[test]
fn missing_seeds_are_written_when_asked() {
    if std::env::var("GODWIT_GOLDEN").as_deref() != Ok("write") {
        return;
    }
    for target in &TARGETS {
        std::fs::create_dir_all(corpus(target)).unwrap();
        for (name, bytes) in (target.seeds)() {
            let path = corpus(target).join(name);
            if !path.exists() {
                std::fs::write(path, bytes).unwrap();
            }
        }
    }
}

#[test]
fn seeds_reach_deep() {
    use prost::Message;
    // A seed that is refused at the door tests nothing: the machines are whole, the drivers get answers.
    for name in ["power-up", "in-use"] {
        let (_, bytes) = (target("sections").seeds)().into_iter().find(|(seed, _)| *seed == name).unwrap();
        assert!(proto::v1::RunnerApply::decode(bytes.as_slice()).unwrap().sections.len() > 10);
        assert!(bodies::sections::is_accepted(&bytes), "{name}");
    }
    for (name, bytes) in (target("journal").seeds)().into_iter().filter(|(name, _)| *name != "packed") {
        assert!(bodies::journal::is_replayed(&bytes), "{name}");
    }
    for (name, bytes) in (target("x86").seeds)() {
        let retired = bodies::x86::retires(&bytes);
        assert!(retired > 10, "{name}: {retired} instructions");
    }
    for (name, bytes) in (target("vmcb").seeds)().into_iter().filter(|(name, _)| *name != "zero") {
        assert!(bodies::vmcb::runs(&bytes), "{name}");
    }
    let memory = bodies::memory();
    let mut bus = bodies::bus(&memory);
    bodies::virtqueue::play(&memory, &mut bus, &bodies::virtqueue::disk_in_use());
    let mut used = [0; 4];
    memory.read(0x10_2000, &mut used).unwrap();
    assert_eq!(used, [0, 0, 1, 0], "the disk used one chain");
}

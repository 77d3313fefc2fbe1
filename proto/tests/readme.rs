//! README.md says what the code does: every hex dump of it is compared with its golden file, every digest recomputed.
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

mod samples;

use proto::frame::{HEADER_BYTES, PAGE_BYTES, PAGES_PREFIX_BYTES};
use proto::ids::Digest;
use proto::leaf::{ZERO_LEAF, leaf};
use samples::golden;

const README: &str = include_str!("../README.md");

/// (golden file, whether the dump is its end, bytes) of each block of hex.
fn dumps() -> Vec<(String, bool, Vec<u8>)> {
    let mut dumps = Vec::new();
    let mut lines = README.lines();
    while let Some(line) = lines.next() {
        let Some(info) = line.strip_prefix("```hex ") else { continue };
        let (name, tail) = info.strip_suffix(" tail").map_or((info, false), |name| (name, true));
        let hex: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").flat_map(str::split_whitespace).collect();
        let bytes = hex.iter().map(|byte| u8::from_str_radix(byte, 16).expect("two hex digits")).collect();
        dumps.push((name.to_owned(), tail, bytes));
    }
    dumps
}

#[test]
fn every_dump_is_its_golden_file() {
    let dumps = dumps();
    assert_eq!(dumps.len(), 6);
    for (name, tail, bytes) in dumps {
        let file = golden(&name);
        assert!(bytes.len() >= 48, "{name}");
        let matches = if tail { file.ends_with(&bytes) } else { file.starts_with(&bytes) };
        assert!(matches, "the dump of {name} is not what the file holds");
    }
}

#[test]
fn every_digest_is_what_its_row_says() {
    let raw = golden("frame-pages-raw.bin");
    let payload = &raw[HEADER_BYTES + PAGES_PREFIX_BYTES..];
    let leaves = [leaf(&payload[..PAGE_BYTES]), leaf(&payload[PAGE_BYTES..])];
    let covered = [&raw[..16], &raw[HEADER_BYTES..][..PAGES_PREFIX_BYTES], leaves.as_flattened()].concat();
    let hash = *blake3::hash(&covered).as_bytes();
    assert_eq!(raw[16..HEADER_BYTES], hash);

    let digest = samples::digest();
    let part = |bytes: &[u8]| <[u8; 32]>::try_from(bytes).unwrap();
    let rows = [
        ("leaf 0 (page 1)", leaves[0]),
        ("leaf 1 (page 2)", leaves[1]),
        ("hash: bytes 0..16, bytes 48..64, leaf 0, leaf 1", hash),
        ("pack id: all 8435 bytes", *blake3::hash(&golden("pack.bin")).as_bytes()),
        ("leaf of a page of zeros", ZERO_LEAF),
        ("ram: BLAKE3(zero, leaf 0, leaf 1, zero)", part(&digest.ram)),
        (
            "state: BLAKE3(`05000000` \"clock\" `01000000` `00000000` `0700000000000000` `08c0843d10fa01`)",
            part(&digest.state),
        ),
        ("disks: BLAKE3(\"\")", part(&digest.disks)),
        ("machine", part(&digest.machine)),
    ];
    let expected: Vec<String> =
        rows.into_iter().map(|(what, value)| format!("| {what} | `{}` |", Digest(value))).collect();
    let found: Vec<&str> = README.lines().filter(|line| shows_a_digest(line)).collect();
    assert_eq!(found, expected);
}

fn shows_a_digest(line: &str) -> bool {
    line.strip_suffix("` |").and_then(|line| line.rsplit('`').next()).is_some_and(|hex| hex.len() == 64)
}

//! Frames of version 1 as they were written when it was released: every later release reads them.
//!
//! `tests/golden/v1` only grows. `GODWIT_GOLDEN=write cargo test -p proto --test golden` writes the files that are missing and
//! touches no other. Each is decoded and compared field by field with the values in `samples`, compared byte by byte
//! with what this release writes (a difference is a new version of the format, with files of its own), and changed in
//! every byte, which must be refused.
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

mod samples;

use proto::frame::{self, Encoding, FrameError, Kind, PAGE_BYTES, PageRun};
use proto::leaf::leaf;
use proto::v1::{
    ClockV1, ExportHead, JournalBlock, LaneMessage, Manifest, PackIndex, RunnerReply, RunnerRequest, Section,
};
use samples::golden;

/// Decodes a file as whoever reads it would.
fn accept(name: &str, bytes: &[u8]) -> Result<(), FrameError> {
    match name {
        "frame-pages-raw.bin" | "frame-pages-zero.bin" => frame::decode_pages(bytes).map(drop),
        "frame-section.bin" | "frame-section-ignorable.bin" => {
            frame::decode_message::<Section>(Kind::Section, bytes).map(drop)
        }
        "frame-manifest.bin" => frame::decode_message::<Manifest>(Kind::Manifest, bytes).map(drop),
        "frame-pack-index.bin" => frame::decode_message::<PackIndex>(Kind::PackIndex, bytes).map(drop),
        "frame-runner-request.bin" => frame::decode_message::<RunnerRequest>(Kind::Control, bytes).map(drop),
        "frame-runner-reply.bin" => frame::decode_message::<RunnerReply>(Kind::Control, bytes).map(drop),
        "frame-journal.bin" => frame::decode(bytes).map(drop),
        "frame-journal-block.bin" => frame::decode_message::<JournalBlock>(Kind::Journal, bytes).map(drop),
        "frame-recording.bin" => frame::decode_message::<ExportHead>(Kind::Recording, bytes).map(drop),
        _ if name.starts_with("frame-control-") => frame::decode_message::<LaneMessage>(Kind::Control, bytes).map(drop),
        _ => panic!("{name} is nobody's"),
    }
}

#[test]
fn missing_files_are_written_when_asked() {
    if std::env::var("GODWIT_GOLDEN").as_deref() != Ok("write") {
        return;
    }
    std::fs::create_dir_all(samples::folder()).unwrap();
    for (name, bytes) in samples::frames().into_iter().chain([("pack.bin", samples::pack())]) {
        let path = samples::folder().join(name);
        if !path.exists() {
            std::fs::write(path, bytes).unwrap();
        }
    }
}

#[test]
fn every_file_is_checked_and_every_frame_has_a_file() {
    let mut found: Vec<String> = std::fs::read_dir(samples::folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let mut expected: Vec<String> = samples::frames().into_iter().map(|(name, _)| name.to_owned()).collect();
    expected.push("pack.bin".to_owned());
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn this_release_writes_what_version_1_wrote() {
    for (name, bytes) in samples::frames().into_iter().chain([("pack.bin", samples::pack())]) {
        assert!(golden(name) == bytes, "{name}");
    }
}

#[test]
fn sections_are_read() {
    let section: Section = frame::decode_message(Kind::Section, &golden("frame-section.bin")).unwrap();
    assert_eq!((section.name.as_str(), section.major, section.minor, section.ignorable), ("clock", 1, 0, false));
    let clock: ClockV1 = prost::Message::decode(section.body.as_slice()).unwrap();
    assert_eq!((clock.retired, clock.skipped_tsc), (1_000_000, 250));
    let later: Section = frame::decode_message(Kind::Section, &golden("frame-section-ignorable.bin")).unwrap();
    assert_eq!(later, samples::ignorable_section());
}

#[test]
fn pages_are_read() {
    let bytes = golden("frame-pages-raw.bin");
    let pages = frame::decode_pages(&bytes).unwrap();
    assert_eq!(pages.run, PageRun { first_page: 1, pages: 2, space: 0, encoding: Encoding::Raw });
    assert!(pages.payload == samples::payload());
    let (first, second) = pages.payload.split_at(PAGE_BYTES);
    assert_eq!(pages.leaves, [leaf(first), leaf(second)]);

    let bytes = golden("frame-pages-zero.bin");
    let pages = frame::decode_pages(&bytes).unwrap();
    let run = PageRun { first_page: 0x1_0000_0003, pages: u32::MAX, space: 2, encoding: Encoding::Zero };
    assert_eq!((pages.run, pages.payload, pages.leaves.len()), (run, &[][..], 0));
}

#[test]
fn every_word_of_a_lane_is_read() {
    for (name, said) in samples::words() {
        let message: LaneMessage = frame::decode_message(Kind::Control, &golden(name)).unwrap();
        assert_eq!(message.message, Some(said), "{name}");
    }
}

#[test]
fn words_of_runners_are_read() {
    let request: RunnerRequest = frame::decode_message(Kind::Control, &golden("frame-runner-request.bin")).unwrap();
    assert_eq!(request, samples::request());
    let reply: RunnerReply = frame::decode_message(Kind::Control, &golden("frame-runner-reply.bin")).unwrap();
    assert_eq!(reply, samples::reply());
}

#[test]
fn a_journal_s_frame_is_read() {
    let bytes = golden("frame-journal.bin");
    let (header, body) = frame::decode(&bytes).unwrap();
    assert_eq!((header.kind, header.version, body), (Kind::Journal, 0x0100, samples::JOURNAL));
}

#[test]
fn a_block_and_the_head_of_a_recording_are_read() {
    let block: JournalBlock = frame::decode_message(Kind::Journal, &golden("frame-journal-block.bin")).unwrap();
    assert_eq!(block, samples::block());
    let head: ExportHead = frame::decode_message(Kind::Recording, &golden("frame-recording.bin")).unwrap();
    assert_eq!(head, samples::head());
}

#[test]
fn the_manifest_is_read() {
    let manifest: Manifest = frame::decode_message(Kind::Manifest, &golden("frame-manifest.bin")).unwrap();
    assert_eq!(manifest, samples::manifest());
}

#[test]
fn the_pack_is_read_from_its_end() {
    let pack = golden("pack.bin");
    let manifest = samples::manifest();
    assert_eq!(manifest.packs[0].id, blake3::hash(&pack).as_bytes());
    assert_eq!(manifest.packs[0].bytes, pack.len() as u64);

    let (before, footer) = pack.split_last_chunk::<24>().unwrap();
    assert_eq!(&footer[..8], b"GDWTPACK");
    let offset = u64::from_le_bytes(footer[8..16].try_into().unwrap()) as usize;
    let length = u64::from_le_bytes(footer[16..].try_into().unwrap()) as usize;
    assert_eq!(offset + length, before.len());
    let index: PackIndex = frame::decode_message(Kind::PackIndex, &before[offset..]).unwrap();
    assert_eq!(index, samples::index());
    assert_eq!(before[offset..], golden("frame-pack-index.bin"));

    let mut end = 0;
    for entry in &index.entries {
        assert_eq!(entry.offset, end, "frames lie side by side");
        end += u64::from(entry.frame_bytes);
        let frame = &before[entry.offset as usize..end as usize];
        let expected = if entry.section.is_empty() { "frame-pages-raw.bin" } else { "frame-section.bin" };
        assert!(frame == golden(expected), "{entry:?}");
    }
    assert_eq!(end as usize, offset);
}

#[test]
fn a_change_of_any_byte_is_refused() {
    for (name, _) in samples::frames() {
        let frame = golden(name);
        accept(name, &frame).unwrap();
        for at in 0..frame.len() {
            for flip in [0xff, 1 << (at % 8)] {
                let mut changed = frame.clone();
                changed[at] ^= flip;
                assert!(accept(name, &changed).is_err(), "{name}: byte {at} ^ {flip:#x}");
            }
        }
    }
}

#[test]
fn any_cut_and_any_byte_too_many_is_refused() {
    for (name, _) in samples::frames() {
        let frame = golden(name);
        for at in 0..frame.len() {
            assert!(matches!(accept(name, &frame[..at]), Err(FrameError::Cut { .. })), "{name}: cut at {at}");
        }
        let longer = [frame.as_slice(), &[0]].concat();
        assert_eq!(accept(name, &longer), Err(FrameError::Trailing(1)), "{name}");
    }
}

#[test]
fn a_later_minor_version_is_read_and_a_later_major_is_refused() {
    for (name, _) in samples::frames() {
        for (version, readable) in [(0x01ff_u16, true), (0x0200, false), (0x0000, false)] {
            let mut frame = golden(name);
            frame[6..8].copy_from_slice(&version.to_le_bytes());
            frame::seal(&mut frame);
            match accept(name, &frame) {
                Ok(()) => assert!(readable, "{name}: {version:#x}"),
                Err(FrameError::Version { version: found, .. }) => assert!(!readable && found == version, "{name}"),
                Err(other) => panic!("{name}: {other}"),
            }
        }
    }
}

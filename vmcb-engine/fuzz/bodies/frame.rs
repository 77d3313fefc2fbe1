//! Frames of lanes, packs and journals, as a stranger may send them.
//!
//! Random bytes never have the right hash, so the input is also taken as (kind, body) and framed properly: then every check
//! behind the hash has to stand on its own.

use prost::Message;
use proto::frame::{self, Encoding, Kind, PageRun};
use proto::v1::lane_message::Message as Said;
use proto::v1::{
    Hello, LaneMessage, MachineConfig, MachineDigest, Manifest, PackEntry, PackIndex, PageExtent, PageMap, RoundEnd,
    RunnerReply, RunnerRequest, Section, SectionRef, StateEnd,
};
use vmcb_engine::memory::digest::PageDigests;
use vmcb_engine::memory::shared::SharedPages;
use vmcb_engine::memory::sized_memfd;
use vmcb_engine::transfer::receive;

const KINDS: [Kind; 6] = [Kind::Section, Kind::Pages, Kind::Manifest, Kind::Control, Kind::PackIndex, Kind::Journal];
/// Pages of the two spaces that frames may land in.
const PAGES: [u64; 2] = [8, 3];

/// Takes any bytes.
pub fn run(data: &[u8]) {
    let mut rest = data;
    while let Ok((header, body, after)) = frame::split(rest) {
        assert_eq!(header.body_bytes, body.len());
        rest = after;
    }
    read(data);
    let Some((kind, body)) = data.split_first() else { return };
    let kind = KINDS[usize::from(*kind) % KINDS.len()];
    if body.len() <= kind.body_bytes_max() {
        let framed = frame::encode(kind, body);
        let (header, found) = frame::decode(&framed).expect("what was framed is a frame");
        assert_eq!((header.kind, found), (kind, body));
        read(&framed);
    }
}

fn read(bytes: &[u8]) {
    again::<Section>(Kind::Section, bytes);
    again::<Manifest>(Kind::Manifest, bytes);
    again::<PackIndex>(Kind::PackIndex, bytes);
    again::<LaneMessage>(Kind::Control, bytes);
    again::<RunnerRequest>(Kind::Control, bytes);
    again::<RunnerReply>(Kind::Control, bytes);
    let Ok(pages) = frame::decode_pages(bytes) else { return };
    assert_eq!(pages.run.payload_bytes(), pages.payload.len());
    land(bytes, &pages.run);
}

fn again<M: Message + Default + PartialEq + std::fmt::Debug>(kind: Kind, bytes: &[u8]) {
    if let Ok(message) = frame::decode_message::<M>(kind, bytes) {
        let twice = frame::decode_message::<M>(kind, &frame::encode_message(kind, &message));
        assert_eq!(twice.as_ref(), Ok(&message));
    }
}

fn land(bytes: &[u8], run: &PageRun) {
    let space = |pages: u64| {
        let file = |name, bytes| sized_memfd(name, bytes).expect("the host has some KiB");
        SharedPages::new(file("data", pages * 4096), file("stamps", pages * 4), pages * 4096)
            .expect("the files are long enough")
    };
    let spaces = PAGES.map(space);
    let mut digests = PAGES.map(PageDigests::new);
    let exists = PAGES
        .get(usize::from(run.space))
        .is_some_and(|pages| run.first_page.checked_add(run.pages.into()).is_some_and(|end| end <= *pages));
    match receive::land(&spaces, bytes) {
        Ok(landed) => {
            assert!(exists, "{run:?} landed");
            landed.note(&mut digests);
            for (space, noted) in spaces.iter().zip(&mut digests) {
                assert_eq!(space.digests().expect("the pages are there").root(), noted.root());
            }
        }
        Err(refused) => assert!(!exists, "{run:?} is refused: {refused}"),
    }
}

/// Whole frames, and bodies behind the number of their kind.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let digest = || Some(MachineDigest { ram: vec![1; 32], state: vec![2; 32], ..Default::default() });
    let hello = Hello { protocol_min: 1, protocol_max: 1, secret: vec![7; 32], lanes: 2, ..Default::default() };
    let control = |said| LaneMessage { message: Some(said) }.encode_to_vec();
    let extent = PageExtent { first_page: 1, pages: 2, frame_bytes: 8256, ..Default::default() };
    let manifest = Manifest {
        major: 1,
        config: Some(MachineConfig { memory_bytes: 1 << 14, cpu_model: "soft-v1".into(), ..Default::default() }),
        sections: vec![SectionRef { name: "clock".into(), offset: 8256, bytes: 66, ..Default::default() }],
        maps: vec![PageMap { space: 0, pages: 4, extents: vec![extent] }],
        digest: digest(),
        ..Default::default()
    };
    let index = PackIndex {
        checkpoint: "00aa".into(),
        entries: vec![PackEntry { offset: 64, frame_bytes: 100, section: "clock".into(), ..Default::default() }],
    };
    let section = Section { name: "clock".into(), major: 1, body: vec![8, 1], ..Default::default() };
    let behind = |kind: u8, body: Vec<u8>| [vec![kind], body].concat();
    let body = |run: PageRun| {
        let mut frame = run.begin();
        frame.resize(frame.len() + run.payload_bytes(), 0x5a);
        frame::seal(&mut frame);
        behind(1, frame[frame::HEADER_BYTES..].to_vec())
    };
    let zero = PageRun { first_page: 0, pages: 3, space: 1, encoding: Encoding::Zero };
    vec![
        ("whole-section", frame::encode_message(Kind::Section, &section)),
        ("section", behind(0, section.encode_to_vec())),
        ("pages-raw", body(PageRun { first_page: 7, pages: 1, space: 0, encoding: Encoding::Raw })),
        ("pages-zero", body(zero)),
        ("manifest", behind(2, manifest.encode_to_vec())),
        ("hello", behind(3, control(Said::Hello(hello)))),
        ("round-end", behind(3, control(Said::RoundEnd(RoundEnd { round: 1, frames: 5, last: true })))),
        (
            "state-end",
            behind(3, control(Said::StateEnd(StateEnd { sections: 9, digest: digest(), ..Default::default() }))),
        ),
        ("pack-index", behind(4, index.encode_to_vec())),
    ]
}

//! Objects of a bucket in version 2 as they were written when it was released: every later release opens them.
//!
//! `tests/golden/v2` only grows. `GODWIT_GOLDEN=write cargo test -p proto --features seal --test golden_v2` writes the files that
//! are missing and touches no other. They are opened and compared with the values that went in; the bytes themselves may
//! come out otherwise tomorrow, because another release of zstd packs otherwise.
#![cfg(feature = "seal")]
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

mod samples;

use std::path::PathBuf;

use proto::frame::{self, Kind};
use proto::ids::VmId;
use proto::leaf::leaf;
use proto::seal::{DataKey, Opener, Sealer};
use proto::v1::{Envelope, KeyObject, LayerRef, Manifest, MapFrame, MapLayer, MapRegion, MapRun, PackRef, PackUse};
use proto::wrap::ClusterKey;

const VM: VmId = VmId([0x42; 16]);

fn data_key() -> DataKey {
    DataKey::new([7; 32])
}

fn cluster_key() -> ClusterKey {
    ClusterKey::new([9; 32])
}

fn layer() -> MapLayer {
    let payload = samples::payload();
    MapLayer {
        packs: vec![PackRef { id: vec![0xaa; 32], bytes: 9000, generation: 3 }],
        frames: vec![MapFrame { pack: 0, offset: 100, bytes: 700, first_page: 1 }],
        runs: vec![MapRun { first_page: 0, pages: 1, frame: 0 }, MapRun { first_page: 1, pages: 2, frame: 1 }],
        leaves: payload.chunks(4096).flat_map(leaf).collect(),
        ..MapLayer::default()
    }
}

fn manifest() -> Manifest {
    let region = MapRegion {
        groups: vec![0x5a; 32],
        layers: vec![LayerRef { pack: 1, offset: 48, bytes: 300, pages: 3 }],
        packs: vec![PackUse { pack: 0, pages: 2 }],
        ..MapRegion::default()
    };
    Manifest {
        major: 2,
        checkpoint: samples::CHECKPOINT.into(),
        vm_id: VM.to_string(),
        generation: 3,
        regions: vec![region],
        own_bytes: 12_345,
        ..Manifest::default()
    }
}

/// Each file and what is in it.
fn files() -> Vec<(&'static str, Vec<u8>)> {
    let sealer = Sealer::new(&data_key(), VM, [3; 16]);
    let wrapped = cluster_key().wrap(&data_key(), VM, [5; 12]);
    let envelope = Envelope {
        vm_id: VM.to_string(),
        checkpoint: samples::CHECKPOINT.into(),
        generation: 3,
        keys: vec![wrapped.clone()],
        manifest: sealer.seal(&frame::encode_message(Kind::Manifest, &manifest())),
    };
    let key = KeyObject { vm_id: VM.to_string(), keys: vec![wrapped] };
    vec![
        ("frame-sealed-pages.bin", sealer.seal(&samples::raw_pages())),
        ("frame-sealed-page-map.bin", sealer.seal(&frame::encode_message(Kind::PageMap, &layer()))),
        ("frame-envelope.bin", frame::encode_message(Kind::Envelope, &envelope)),
        ("frame-key-object.bin", frame::encode_message(Kind::Envelope, &key)),
    ]
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v2")
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(folder().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[test]
fn missing_files_are_written_when_asked() {
    if std::env::var("GODWIT_GOLDEN").as_deref() != Ok("write") {
        return;
    }
    std::fs::create_dir_all(folder()).unwrap();
    for (name, bytes) in files() {
        let path = folder().join(name);
        if !path.exists() {
            std::fs::write(path, bytes).unwrap();
        }
    }
}

#[test]
fn every_file_is_checked() {
    let mut found: Vec<String> =
        std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let mut expected: Vec<String> = files().into_iter().map(|(name, _)| name.to_owned()).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn sealed_frames_open_to_what_went_in() {
    let opener = Opener::new(data_key(), VM);
    assert!(opener.open(&golden("frame-sealed-pages.bin")).unwrap() == samples::raw_pages());
    let plain = opener.open(&golden("frame-sealed-page-map.bin")).unwrap();
    assert_eq!(frame::decode_message::<MapLayer>(Kind::PageMap, &plain).unwrap(), layer());
}

#[test]
fn an_envelope_opens_with_its_own_key_under_the_cluster_key() {
    let envelope: Envelope = frame::decode_message(Kind::Envelope, &golden("frame-envelope.bin")).unwrap();
    let object: KeyObject = frame::decode_message(Kind::Envelope, &golden("frame-key-object.bin")).unwrap();
    assert_eq!(object.keys, envelope.keys);
    let key = cluster_key().unwrap(&envelope.keys[0], VM).unwrap();
    let plain = Opener::new(key, VM).open(&envelope.manifest).unwrap();
    assert_eq!(frame::decode_message::<Manifest>(Kind::Manifest, &plain).unwrap(), manifest());
}

#[test]
fn every_changed_byte_is_refused() {
    let opener = Opener::new(data_key(), VM);
    for name in ["frame-sealed-pages.bin", "frame-sealed-page-map.bin"] {
        let sealed = golden(name);
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(opener.open(&changed).is_err(), "{name}, byte {at}");
        }
    }
}

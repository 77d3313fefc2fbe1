//! Reading a checkpoint back: packs whose every byte is checked, pages and sections out of them, and the proof of the
//! whole.
//!
//! A pack that is missing, cut or changed is named with its key; a frame with its place in it. [`verify`] reads
//! everything and compares the digest that follows with the manifest's.

use bytes::Bytes;
use proto::frame::{self, Encoding, FrameError, Kind, PAGE_BYTES, PageRun};
use proto::status::Code;
use proto::v1::{Manifest, PageExtent, Section, SectionRef};

use super::assembly::compare;
use super::digest::{PageDigests, machine_digest, state_digest};
use super::manifest::{self, extents_by_pack, pack_ids, pack_keys};
use super::pack;
use crate::bucket::{Bucket, BucketError};
use crate::failure::Failure;

fn damaged(what: &str, why: impl std::fmt::Display) -> Failure {
    metrics::counter!(crate::metrics::DAMAGED).increment(1);
    Failure::new(Code::Corrupt, format!("{what}: {why}"))
        .hint("restore another checkpoint of the VM; `ctl checkpoint verify --all` shows which are sound")
}

/// Reads and checks a manifest.
///
/// # Errors
/// [`Code::Corrupt`] naming the object, or the bucket's.
pub async fn manifest(bucket: &Bucket, key: &str) -> Result<Manifest, Failure> {
    let bytes = bucket.get(key).await.map_err(|error| match error {
        BucketError::Missing(_) => damaged(&format!("manifest {key}"), "it is missing in the bucket"),
        other => other.into(),
    })?;
    manifest::parse(&bytes).map_err(|error| damaged(&format!("manifest {key}"), error))
}

/// Reads one pack of a manifest and checks its name.
///
/// # Errors
/// [`Code::Corrupt`] naming the pack, or the bucket's.
pub async fn pack(bucket: &Bucket, manifest: &Manifest, number: usize) -> Result<Bytes, Failure> {
    let key = &pack_keys(manifest)[number];
    let what = format!("pack {key}");
    let bytes = bucket.get(key).await.map_err(|error| match error {
        BucketError::Missing(_) => damaged(&what, "it is missing in the bucket"),
        other => other.into(),
    })?;
    let expected = manifest.packs[number].bytes;
    if bytes.len() as u64 != expected {
        return Err(damaged(&what, format!("it has {} of {expected} bytes", bytes.len())));
    }
    let (id, checked) = (pack_ids(manifest)[number], bytes.clone());
    let named = tokio::task::spawn_blocking(move || pack::check_name(&checked, id)).await;
    named.map_err(|_| Failure::new(Code::Internal, "the worker ended"))?.map_err(|error| damaged(&what, error))?;
    Ok(bytes)
}

/// The pages of an extent and the run that they are: bytes of a pack whose name was checked.
///
/// # Errors
/// [`Code::Corrupt`] naming pack and place.
pub fn pages<'a>(key: &str, bytes: &'a Bytes, space: u16, extent: &PageExtent) -> Result<(PageRun, &'a [u8]), Failure> {
    let what = || format!("pack {key}, frame at byte {}", extent.offset);
    let start = extent.offset as usize;
    let (header, body) =
        frame::decode(&bytes[start..start + extent.frame_bytes as usize]).map_err(|error| damaged(&what(), error))?;
    if header.kind != Kind::Pages {
        let error = FrameError::Unexpected { found: header.kind, expected: Kind::Pages };
        return Err(damaged(&what(), error));
    }
    let (run, payload) = PageRun::parse(body).map_err(|error| damaged(&what(), error))?;
    let (skip, pages) = (extent.skip as usize, extent.pages as usize);
    let fits = run.encoding == Encoding::Raw && skip + pages <= run.pages as usize;
    if !fits || run.space != space || run.first_page + skip as u64 != extent.first_page {
        return Err(damaged(&what(), format!("it holds {run:?}, not page {}", extent.first_page)));
    }
    let part = PageRun { first_page: extent.first_page, pages: extent.pages, space, encoding: Encoding::Raw };
    Ok((part, &payload[skip * PAGE_BYTES..(skip + pages) * PAGE_BYTES]))
}

/// A section and its frame.
///
/// # Errors
/// [`Code::Corrupt`] naming pack and section.
pub fn section(key: &str, bytes: &Bytes, place: &SectionRef) -> Result<(Section, Bytes), Failure> {
    let what = || format!("pack {key}, section {:?}", place.name);
    let frame = bytes.slice(place.offset as usize..place.offset as usize + place.bytes as usize);
    let section: Section = frame::decode_message(Kind::Section, &frame).map_err(|error| damaged(&what(), error))?;
    if section.name != place.name {
        return Err(damaged(&what(), format!("section {:?} lies there", section.name)));
    }
    Ok((section, frame))
}

/// Reads all of a checkpoint and compares its digest with the manifest's. `progress` hears (packs read, packs).
///
/// # Errors
/// [`Code::Corrupt`] naming the first thing that is damaged, or the bucket's.
pub async fn verify(bucket: &Bucket, manifest: &Manifest, progress: impl Fn(usize, usize)) -> Result<(), Failure> {
    let mut digests: Vec<PageDigests> = manifest.maps.iter().map(|map| PageDigests::new(map.pages)).collect();
    let mut sections = Vec::new();
    let keys = pack_keys(manifest);
    for (number, extents) in extents_by_pack(manifest).into_iter().enumerate() {
        let bytes = pack(bucket, manifest, number).await?;
        let key = keys[number].clone();
        let places: Vec<SectionRef> =
            manifest.sections.iter().filter(|place| place.pack as usize == number).cloned().collect();
        let work = move || check_pack(&key, &bytes, extents, &places, digests);
        let joined = tokio::task::spawn_blocking(work).await;
        let (found, after) = joined.map_err(|_| Failure::new(Code::Internal, "the worker ended"))??;
        sections.extend(found);
        digests = after;
        progress(number + 1, keys.len());
    }
    let roots: Vec<_> = digests.iter().map(PageDigests::root).collect();
    let computed = machine_digest(&roots, state_digest(&sections));
    compare(&manifest.digest.clone().unwrap_or_default(), &computed)
        .map_err(|error| damaged(&format!("checkpoint {}", manifest.checkpoint), error))
}

type CheckedPack = (Vec<Section>, Vec<PageDigests>);

fn check_pack(
    key: &str,
    bytes: &Bytes,
    extents: Vec<(u16, PageExtent)>,
    places: &[SectionRef],
    mut digests: Vec<PageDigests>,
) -> Result<CheckedPack, Failure> {
    let index = pack::index(bytes).map_err(|error| damaged(&format!("pack {key}"), error))?;
    for entry in &index.entries {
        let start = entry.offset as usize;
        let frame = &bytes[start..start + entry.frame_bytes as usize];
        frame::decode(frame).map_err(|error| damaged(&format!("pack {key}, frame at byte {start}"), error))?;
    }
    for (space, extent) in extents {
        let (run, payload) = pages(key, bytes, space, &extent)?;
        for (page, content) in (run.first_page..).zip(payload.chunks(PAGE_BYTES)) {
            digests[usize::from(space)].set(page, *blake3::hash(content).as_bytes());
        }
    }
    let sections = places.iter().map(|place| section(key, bytes, place).map(|(section, _)| section));
    Ok((sections.collect::<Result<_, _>>()?, digests))
}

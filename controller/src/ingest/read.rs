//! Reading a checkpoint back: manifest, regions, pages and sections, and the proof of the whole.
//!
//! Nothing is believed: a manifest must open with the VM's key and its numbers lead somewhere, a region's layers must add
//! up to the digests that the manifest states, a pack must have its name, and each page the digest that its layer
//! states. What is missing, cut, changed or swapped is named with its key and place. [`Reader::verify`] reads everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use proto::frame::{self, Encoding, FrameError, Kind, PAGE_BYTES, PageRun};
use proto::ids::PackId;
use proto::seal::{Opener, SealError};
use proto::status::Code;
use proto::v1::{Manifest, MapLayer, MapRegion, PackIndex, Section, SectionRef};

use super::assembly::{compare, spaces};
use super::digest::{PageDigests, machine_digest, state_digest};
use super::manifest::{self, Object, pack_key, packs, regions, roots};
use super::map::{Extent, PackAt, Place, Region};
use super::pack;
use crate::bucket::{Bucket, BucketError, packs_prefix};
use crate::failure::Failure;
use crate::keys::Keys;

/// A checkpoint's manifest, checked, and what opens its frames (nothing in version 1).
#[derive(Clone)]
pub struct Opened {
    /// The manifest.
    pub manifest: Manifest,
    /// The VM's key.
    pub opener: Option<Opener>,
}

/// Reads checkpoints.
#[derive(Clone)]
pub struct Reader {
    /// Where they lie.
    pub bucket: Bucket,
    /// What opens them.
    pub keys: Keys,
}

/// Objects that are missing or damaged, by key, and what is said of each.
pub type Damaged = BTreeMap<String, String>;

/// The live part of a pack: pieces of it by offset.
pub type Pieces = BTreeMap<u64, Bytes>;

/// A failure that names what is damaged.
pub fn damaged(what: &str, why: impl std::fmt::Display) -> Failure {
    metrics::counter!(crate::metrics::DAMAGED).increment(1);
    Failure::new(Code::Corrupt, format!("{what}: {why}"))
        .hint("restore another checkpoint of the VM; `ctl checkpoint verify --all` shows which are sound")
}

/// What is said of a pack that is not there.
const MISSING: &str = "it is missing in the bucket";

/// What is said of a pack of the wrong length.
fn cut(found: u64, expected: u64) -> String {
    format!("it has {found} of {expected} bytes")
}

/// Damage of a pack, or of a place in it (`, frame at byte 5`).
fn hurt(key: &str, place: &str, why: impl std::fmt::Display) -> Failure {
    damaged(&format!("pack {key}{place}"), why).object(key)
}

fn missing(what: &str, key: &str, error: BucketError) -> Failure {
    match error {
        BucketError::Missing(_) => damaged(what, MISSING).object(key),
        BucketError::Short { found, expected, .. } => damaged(what, cut(found, expected)).object(key),
        other => other.into(),
    }
}

pub(super) fn missing_pack(key: &str, error: BucketError) -> Failure {
    missing(&format!("pack {key}"), key, error)
}

/// Pieces of a pack closer than this are read in one go.
const GAP_MAX: u64 = 128 << 10;
/// A pack is read in pieces if less than one in this many of its bytes is needed.
const PIECES_BELOW: u64 = 3;

impl Reader {
    /// Reads, opens and checks a manifest.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming the object, [`Code::Denied`] naming the key that is missing, or the bucket's.
    pub async fn manifest(&self, key: &str) -> Result<Opened, Failure> {
        let what = format!("manifest {key}");
        let damaged = |what: &str, error: &dyn std::fmt::Display| damaged(what, error).object(key);
        let bytes = self.bucket.get(key).await.map_err(|error| missing(&what, key, error))?;
        let opened = match manifest::parse(&bytes).map_err(|error| damaged(&what, &error))? {
            Object::Plain(manifest) => Opened { manifest: *manifest, opener: None },
            Object::Sealed { vm, envelope } => {
                let opener = self.keys.opener(&self.bucket, vm, &envelope.keys).await.map_err(|f| f.at(&what))?;
                let manifest = manifest::open(&envelope, &opener).map_err(|error| damaged(&what, &error))?;
                Opened { manifest, opener: Some(opener) }
            }
        };
        manifest::check(&opened.manifest).map_err(|error| damaged(&what, &error))?;
        Ok(opened)
    }

    /// A region with all its layers, laid over `zero`.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming the layer, or the bucket's.
    pub async fn region(&self, opened: &Opened, stated: &MapRegion, zero: Region) -> Result<Region, Failure> {
        let mut region = zero;
        for layer in &stated.layers {
            let pack = manifest::pack(&opened.manifest, layer.pack);
            let message = self.layer(opened, &pack, layer.offset, layer.bytes).await?;
            region = laid(opened, &pack, layer.offset, Arc::new(message), region).await?;
        }
        made_of(opened, stated, &region)?;
        Ok(region)
    }

    /// One layer of a region, as it lies there.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming it, or the bucket's.
    pub async fn layer(&self, opened: &Opened, pack: &PackAt, offset: u64, bytes: u32) -> Result<MapLayer, Failure> {
        let key = pack_key(&opened.manifest, pack);
        let read = self.bucket.get_range(&key, offset, bytes as usize).await;
        let sealed = read.map_err(|error| missing_pack(&key, error))?;
        let opener = opened.opener.clone();
        let work = move || {
            let hurt = |why: &dyn std::fmt::Display| hurt(&key, &page_map_at(offset), why);
            let plain = open(opener.as_ref(), &sealed).map_err(|error| hurt(&error))?;
            frame::decode_message(Kind::PageMap, &plain).map_err(|error| hurt(&error))
        };
        beside(work).await?
    }

    /// What a pack says that it holds; only its end is read.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming it, or the bucket's.
    pub async fn pack_index(&self, opened: &Opened, key: &str, pack: &PackAt) -> Result<PackIndex, Failure> {
        let footer_at = pack.bytes.saturating_sub(pack::FOOTER_BYTES as u64);
        let read = async |offset: u64, bytes: u64| {
            let part = self.bucket.get_range(key, offset, bytes as usize).await;
            part.map_err(|error| missing_pack(key, error))
        };
        let footer = read(footer_at, pack.bytes - footer_at).await?;
        let at = pack::index_at(&footer, pack.bytes).map_err(|error| hurt(key, "", error))?;
        let end = read(at, pack.bytes - at).await?;
        let opener = opened.opener.clone();
        let index = beside(move || pack::index_of(&end, at, opener.as_ref())).await?;
        index.map_err(|error| hurt(key, "", error))
    }

    /// All regions, one after the other.
    ///
    /// # Errors
    /// As [`Reader::region`].
    pub async fn extents(&self, opened: &Opened) -> Result<Vec<Extent>, Failure> {
        self.extents_from(opened, 0).await
    }

    /// Those of this space and the later ones.
    ///
    /// # Errors
    /// As [`Reader::region`].
    pub async fn extents_from(&self, opened: &Opened, first_space: u32) -> Result<Vec<Extent>, Failure> {
        let manifest = &opened.manifest;
        if manifest.major == 1 {
            let mut extents = manifest::extents(manifest);
            extents.retain(|extent| u32::from(extent.space) >= first_space);
            return Ok(extents);
        }
        let spaces = manifest.config.as_ref().map(spaces).unwrap_or_default();
        let mut extents = Vec::new();
        for ((space, first_page, pages), stated) in regions(&spaces).zip(&manifest.regions) {
            if !stated.layers.is_empty() && space >= first_space {
                let region = self.region(opened, stated, Region::zero(space, first_page, pages)).await?;
                extents.extend(region.extents());
            }
        }
        Ok(extents)
    }

    /// Reads the pack that lies under a key and checks its name.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming the pack, or the bucket's.
    pub async fn pack(&self, key: &str, pack: &PackAt) -> Result<Bytes, Failure> {
        let bytes = self.whole(key, pack).await?;
        let (id, checked) = (pack.id, bytes.clone());
        beside(move || pack::check_name(&checked, id)).await?.map_err(|error| hurt(key, "", error))?;
        Ok(bytes)
    }

    /// Reads the pack that lies under a key, whatever its bytes are.
    async fn whole(&self, key: &str, pack: &PackAt) -> Result<Bytes, Failure> {
        let bytes = self.bucket.get(key).await.map_err(|error| missing_pack(key, error))?;
        match bytes.len() as u64 {
            length if length == pack.bytes => Ok(bytes),
            length => Err(hurt(key, "", cut(length, pack.bytes))),
        }
    }

    /// Reads a pack and compares its bytes with its name; how many they are.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming the pack, or the bucket's.
    pub async fn rehash(&self, key: &str) -> Result<u64, Failure> {
        let bytes = self.bucket.get(key).await.map_err(|error| missing_pack(key, error))?;
        let id = key.rsplit('/').next().and_then(|name| name.parse::<PackId>().ok());
        let id = id.ok_or_else(|| Failure::new(Code::Internal, format!("{key} is no key of a pack")))?;
        let length = bytes.len() as u64;
        beside(move || pack::check_name(&bytes, id)).await?.map_err(|error| hurt(key, "", error))?;
        Ok(length)
    }

    /// The frames of these extents: all of a pack of which much is needed, otherwise pieces. Its name is not compared: whoever
    /// opens them compares each page with its page map.
    ///
    /// # Errors
    /// As [`Reader::pack`].
    pub async fn pieces(&self, key: &str, pack: &PackAt, extents: &[Extent]) -> Result<Pieces, Failure> {
        let frames: BTreeMap<u64, u64> = extents.iter().map(|e| (e.place.offset, u64::from(e.place.bytes))).collect();
        if frames.values().sum::<u64>() * PIECES_BELOW > pack.bytes {
            return Ok(Pieces::from([(0, self.whole(key, pack).await?)]));
        }
        let mut spans: Vec<(u64, u64)> = Vec::new();
        for (offset, bytes) in frames {
            match spans.last_mut() {
                Some((start, end)) if offset <= *end + GAP_MAX && offset + bytes - *start <= 4 << 20 => {
                    *end = (*end).max(offset + bytes);
                }
                _ => spans.push((offset, offset + bytes)),
            }
        }
        let mut pieces = Pieces::new();
        for (start, end) in spans {
            let read = self.bucket.get_range(key, start, (end - start) as usize).await;
            pieces.insert(start, read.map_err(|error| missing_pack(key, error))?);
        }
        Ok(pieces)
    }

    /// The sections, with their frames as they are sent.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming pack and section, or the bucket's.
    pub async fn sections(&self, opened: &Opened) -> Result<Vec<(Section, Bytes)>, Failure> {
        let mut sections = Vec::new();
        for place in &opened.manifest.sections {
            let key = pack_key(&opened.manifest, &manifest::pack(&opened.manifest, place.pack));
            let read = self.bucket.get_range(&key, place.offset, place.bytes as usize).await;
            let stored = read.map_err(|error| missing_pack(&key, error))?;
            sections.push(section(opened.opener.as_ref(), &key, stored, place)?);
        }
        Ok(sections)
    }

    /// The packs of a checkpoint that are not in the bucket, or not as long as they were written, by key, and why. Only lists.
    ///
    /// # Errors
    /// The bucket's.
    pub async fn lost(&self, opened: &Opened) -> Result<Damaged, Failure> {
        let packs = packs(&opened.manifest);
        let generations: BTreeSet<_> = packs.iter().map(|pack| pack.generation).collect();
        let mut there = BTreeMap::new();
        for generation in generations {
            let objects = self.bucket.list_objects(&packs_prefix(&opened.manifest.vm_id, generation)).await?;
            there.extend(objects.into_iter().map(|object| (object.key, object.bytes)));
        }
        let mut lost = Damaged::new();
        for pack in packs {
            let key = pack_key(&opened.manifest, &pack);
            let why = match there.get(&key) {
                Some(bytes) if *bytes == pack.bytes => continue,
                Some(bytes) => hurt(&key, "", cut(*bytes, pack.bytes)),
                None => hurt(&key, "", MISSING),
            };
            lost.insert(key, why.message);
        }
        Ok(lost)
    }

    /// Reads all of a checkpoint and compares its digest with the manifest's. `progress` hears (packs read, packs).
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming the first thing that is damaged, or the bucket's.
    #[cfg(test)]
    pub async fn verify(&self, opened: &Opened, progress: impl Fn(usize, usize)) -> Result<(), Failure> {
        match self.examine(opened, progress).await?.into_iter().next() {
            None => Ok(()),
            Some((key, why)) => Err(damaged(&format!("checkpoint {}", opened.manifest.checkpoint), why).object(key)),
        }
    }

    /// The same to its end, whatever is damaged: all objects that are, by key, and why.
    ///
    /// # Errors
    /// The bucket's.
    pub async fn examine(&self, opened: &Opened, progress: impl Fn(usize, usize)) -> Result<Damaged, Failure> {
        let manifest = &opened.manifest;
        let spaces = manifest.config.as_ref().map(spaces).unwrap_or_default();
        // Version 1 states no digests of pages: they are made from what lies there.
        let mut digests: Option<Vec<PageDigests>> =
            (manifest.major == 1).then(|| spaces.iter().map(|pages| PageDigests::new(*pages)).collect());
        let mut found = Damaged::new();
        let extents = note(self.extents(opened).await, &mut found)?.unwrap_or_default();
        let mut by_pack = by_pack(extents);
        let all = packs(manifest);
        for (number, pack) in all.iter().enumerate() {
            let (key, extents) = (pack_key(manifest, pack), by_pack.remove(pack).unwrap_or_default());
            if let Some(bytes) = note(self.pack(&key, pack).await, &mut found)? {
                let (opener, mut taken) = (opened.opener.clone(), digests.take());
                let work = move || (check_pack(opener.as_ref(), &key, &bytes, &extents, &mut taken), taken);
                let (checked, back) = beside(work).await?;
                digests = back;
                note(checked, &mut found)?;
            }
            progress(number + 1, all.len());
        }
        let sections = note(self.sections(opened).await, &mut found)?;
        // What is missing in parts cannot add up.
        if let (Some(sections), true) = (sections, found.is_empty()) {
            let state: Vec<Section> = sections.into_iter().map(|(section, _)| section).collect();
            let roots = match digests {
                Some(digests) => digests.iter().map(PageDigests::root).collect(),
                None => roots(&manifest.regions, spaces.len()),
            };
            let computed = machine_digest(&roots, state_digest(&state));
            if let Err(error) = compare(&manifest.digest.clone().unwrap_or_default(), &computed) {
                found.insert(manifest::key(manifest), error.to_string());
            }
        }
        Ok(found)
    }
}

/// Puts damage of an object among what was found; other failures stay failures.
fn note<T>(result: Result<T, Failure>, found: &mut Damaged) -> Result<Option<T>, Failure> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(failure) if failure.code == Code::Corrupt && !failure.object.is_empty() => {
            found.entry(failure.object).or_insert(failure.message);
            Ok(None)
        }
        Err(failure) => Err(failure),
    }
}

fn page_map_at(offset: u64) -> String {
    format!(", page map at byte {offset}")
}

/// What is below with a layer, which lies at this place, laid over it.
///
/// # Errors
/// [`Code::Corrupt`] naming the layer.
pub async fn laid(
    opened: &Opened,
    pack: &PackAt,
    offset: u64,
    layer: Arc<MapLayer>,
    below: Region,
) -> Result<Region, Failure> {
    let laid = beside(move || below.laid(&layer)).await?;
    laid.map_err(|error| hurt(&pack_key(&opened.manifest, pack), &page_map_at(offset), error))
}

/// The layers of a region add up to what the manifest states of it.
///
/// # Errors
/// [`Code::Corrupt`] naming the manifest.
pub fn made_of(opened: &Opened, stated: &MapRegion, made: &Region) -> Result<(), Failure> {
    if made.groups() == stated.groups {
        return Ok(());
    }
    let what = format!("checkpoint {}", opened.manifest.checkpoint);
    let (page, space) = (stated.first_page, stated.space);
    let why = format!("its page maps at page {page} of space {space} do not add up");
    Err(damaged(&what, why).object(manifest::key(&opened.manifest)))
}

fn open(opener: Option<&Opener>, stored: &Bytes) -> Result<Bytes, SealError> {
    match opener {
        Some(opener) => opener.open(stored).map(Bytes::from),
        None => Ok(stored.clone()),
    }
}

/// Extents by pack, in order of place.
pub fn by_pack(extents: Vec<Extent>) -> BTreeMap<PackAt, Vec<Extent>> {
    let mut by_pack: BTreeMap<PackAt, Vec<Extent>> = BTreeMap::new();
    for extent in extents {
        by_pack.entry(extent.place.pack).or_default().push(extent);
    }
    by_pack.values_mut().for_each(|extents| extents.sort_by_key(|e| (e.place.offset, e.first_page)));
    by_pack
}

/// The bytes of a frame, if they are among the pieces.
pub(super) fn stored(pieces: &Pieces, place: &Place) -> Option<Bytes> {
    let (start, piece) = pieces.range(..=place.offset).next_back()?;
    let from = usize::try_from(place.offset - start).ok()?;
    let to = from.checked_add(place.bytes as usize)?;
    (to <= piece.len()).then(|| piece.slice(from..to))
}

/// The pages of extents that lie in one frame, as frames to be sent; and the digests of those pages.
///
/// # Errors
/// [`Code::Corrupt`] naming pack and place.
pub fn pages(
    opener: Option<&Opener>,
    key: &str,
    pieces: &Pieces,
    extents: &[Extent],
) -> Result<Vec<(PageRun, Bytes)>, Failure> {
    let Some(place) = extents.first().map(|extent| extent.place) else { return Ok(Vec::new()) };
    let hurt = |why: &dyn std::fmt::Display| hurt(key, &format!(", frame at byte {}", place.offset), why);
    let stored = stored(pieces, &place).ok_or_else(|| hurt(&"it lies outside of the pack"))?;
    let plain = open(opener, &stored).map_err(|error| hurt(&error))?;
    let held = frame::decode_pages(&plain).map_err(|error| hurt(&error))?;
    extents.iter().map(|extent| current(&plain, &held, extent).map_err(|why| hurt(&why))).collect()
}

/// The same of many frames, opened beside the runtime, in order.
///
/// # Errors
/// As [`pages`].
pub async fn pages_beside(
    opener: Option<Opener>,
    key: String,
    pieces: Pieces,
    extents: Vec<Extent>,
) -> Result<Vec<(PageRun, Bytes)>, Failure> {
    let work = move || -> Result<Vec<_>, Failure> {
        let opened = frames(&extents).map(|extents| pages(opener.as_ref(), &key, &pieces, extents));
        Ok(opened.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
    };
    beside(work).await?
}

fn current(plain: &Bytes, held: &frame::Pages<'_>, extent: &Extent) -> Result<(PageRun, Bytes), String> {
    let run = held.run;
    let skip = extent.first_page.checked_sub(run.first_page).filter(|skip| *skip < u64::from(run.pages));
    let fits = |skip: &usize| run.encoding == Encoding::Raw && skip + extent.pages as usize <= run.pages as usize;
    let Some(skip) = skip.map(|skip| skip as usize).filter(fits).filter(|_| run.space == extent.space) else {
        return Err(format!("it holds {run:?}, not page {}", extent.first_page));
    };
    let leaves = &held.leaves[skip..skip + extent.pages as usize];
    if !extent.leaves.is_empty()
        && let Some(at) = leaves.iter().zip(&extent.leaves).position(|(found, stated)| found != stated)
    {
        return Err(format!("page {} in it is not what the page map states", extent.first_page + at as u64));
    }
    let part = PageRun { first_page: extent.first_page, pages: extent.pages, ..run };
    if part == run {
        return Ok((run, plain.clone()));
    }
    let mut frame = part.begin();
    frame.extend_from_slice(&held.payload[skip * PAGE_BYTES..(skip + extent.pages as usize) * PAGE_BYTES]);
    frame::seal_pages(&mut frame, leaves);
    Ok((part, frame.into()))
}

/// Extents of one frame after those of another.
pub fn frames(extents: &[Extent]) -> impl Iterator<Item = &[Extent]> {
    extents.chunk_by(|a, b| a.place == b.place)
}

fn section(opener: Option<&Opener>, key: &str, stored: Bytes, place: &SectionRef) -> Result<(Section, Bytes), Failure> {
    let hurt = |why: &dyn std::fmt::Display| hurt(key, &format!(", section {:?}", place.name), why);
    let plain = open(opener, &stored).map_err(|error| hurt(&error))?;
    let section: Section = frame::decode_message(Kind::Section, &plain).map_err(|error| hurt(&error))?;
    if section.name != place.name {
        return Err(hurt(&format!("section {:?} lies there", section.name)));
    }
    Ok((section, plain))
}

fn check_pack(
    opener: Option<&Opener>,
    key: &str,
    bytes: &Bytes,
    extents: &[Extent],
    digests: &mut Option<Vec<PageDigests>>,
) -> Result<(), Failure> {
    let index = pack::index(bytes, opener).map_err(|error| hurt(key, "", error))?;
    for entry in &index.entries {
        let start = entry.offset as usize;
        let frame = &bytes[start..start + entry.frame_bytes as usize];
        frame::decode(frame).map_err(|error| hurt(key, &format!(", frame at byte {start}"), error))?;
    }
    let pieces = Pieces::from([(0, bytes.clone())]);
    for extents in frames(extents) {
        for (run, frame) in pages(opener, key, &pieces, extents)? {
            let Some(digests) = digests else { continue };
            let held = frame::decode_pages(&frame).map_err(|error: FrameError| hurt(key, "", error))?;
            for (page, leaf) in (run.first_page..).zip(held.leaves) {
                digests[usize::from(run.space)].set(page, leaf);
            }
        }
    }
    Ok(())
}

/// Runs slow, pure work beside the runtime.
pub async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Failure::new(Code::Internal, "the worker ended"))
}

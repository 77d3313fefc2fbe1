//! The manifest of a checkpoint: written last, and the first thing that is read.
//!
//! ```text
//! version 2: Envelope { wrapped data keys, sealed frame { Manifest } }     regions and their layers (see map)
//! version 1: Manifest                                                      page maps inside, frames not sealed
//! ```
//! A manifest from a bucket is hostile until [`check`] has looked at every number in it: after that, every layer, section
//! and extent lies in its pack and every region in its space, and nothing larger than the configuration says will be
//! allocated.

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message;
use proto::frame::{self, FrameError, HEADER_BYTES, Header, Kind, PAGE_BYTES, PAGES_PREFIX_BYTES};
use proto::ids::{CheckpointId, Digest, Generation, PackId, VmId};
use proto::seal::{Opener, SealError, Sealer};
use proto::v1::{Envelope, Manifest, MapRegion, PackRef, PageMap, WrappedKey};

use super::assembly::spaces;
use super::digest::{FAN_OUT, root_of_groups};
use super::map::{Extent, LAYERS_MAX, PackAt, Place, REGION_PAGES};
use super::pack::PACK_MAX_EVER;
use crate::ledger::event::CheckpointEntry;

/// Format that this release writes.
pub const MAJOR: u32 = 2;
/// Most guest memory, and most bytes of a disk, that anything is allocated for: 4 TiB.
pub const SPACE_BYTES_MAX: u64 = 4 << 40;

/// Why bytes are no manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The frame around it.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It does not open.
    #[error("{0}")]
    Sealed(#[from] SealError),
    /// A major version that this release does not know.
    #[error("manifest of version {0}; this release reads 1 to {MAJOR}")]
    Version(u32),
    /// A number that makes no sense.
    #[error("{0}")]
    Nonsense(String),
}

fn nonsense<T>(text: impl Into<String>) -> Result<T, ManifestError> {
    Err(ManifestError::Nonsense(text.into()))
}

/// The object to write for a manifest.
///
/// # Errors
/// [`ManifestError::Nonsense`] if it is larger than a frame can be.
pub fn encode(manifest: &Manifest, sealer: &Sealer, key: WrappedKey) -> Result<Bytes, ManifestError> {
    if manifest.encoded_len() > Kind::Manifest.body_bytes_max() / 2 {
        return nonsense("the page map is too fragmented for one manifest");
    }
    let envelope = Envelope {
        vm_id: manifest.vm_id.clone(),
        checkpoint: manifest.checkpoint.clone(),
        generation: manifest.generation,
        keys: vec![key],
        manifest: sealer.seal(&frame::encode_message(Kind::Manifest, manifest)),
    };
    Ok(frame::encode_message(Kind::Envelope, &envelope).into())
}

/// What an object below `checkpoints/` is.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// Version 2: what opens it must be found.
    Sealed {
        /// The VM that it says it is of.
        vm: VmId,
        /// The object.
        envelope: Envelope,
    },
    /// Version 1, not checked yet.
    Plain(Box<Manifest>),
}

/// Takes an object apart, as far as it goes without a key.
///
/// # Errors
/// [`ManifestError::Frame`], [`ManifestError::Nonsense`].
pub fn parse(bytes: &[u8]) -> Result<Object, ManifestError> {
    if Header::parse(bytes)?.kind != Kind::Envelope {
        return Ok(Object::Plain(Box::new(frame::decode_message(Kind::Manifest, bytes)?)));
    }
    let envelope: Envelope = frame::decode_message(Kind::Envelope, bytes)?;
    match envelope.vm_id.parse() {
        Ok(vm) => Ok(Object::Sealed { vm, envelope }),
        Err(_) => nonsense("the VM's id in it is none"),
    }
}

/// Opens the manifest in an envelope, and compares the two.
///
/// # Errors
/// [`ManifestError`].
pub fn open(envelope: &Envelope, opener: &Opener) -> Result<Manifest, ManifestError> {
    let manifest: Manifest = frame::decode_message(Kind::Manifest, &opener.open(&envelope.manifest)?)?;
    let same = (&manifest.vm_id, &manifest.checkpoint, manifest.generation)
        == (&envelope.vm_id, &envelope.checkpoint, envelope.generation);
    if manifest.major != 2 || !same {
        return nonsense("its envelope is of another checkpoint");
    }
    Ok(manifest)
}

/// Checks everything that can be checked without packs.
///
/// # Errors
/// [`ManifestError::Version`], [`ManifestError::Nonsense`].
pub fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    if !(1..=MAJOR).contains(&manifest.major) {
        return Err(ManifestError::Version(manifest.major));
    }
    let ids = manifest.checkpoint.parse::<CheckpointId>().is_ok() && manifest.vm_id.parse::<VmId>().is_ok();
    if !ids {
        return nonsense("the ids in it are none");
    }
    let Some(config) = &manifest.config else { return nonsense("there is no configuration in it") };
    let disks = config.disks.iter().map(|disk| disk.size_bytes);
    let boot = config.boot.as_ref().map(|boot| boot.image_bytes);
    if std::iter::once(config.memory_bytes).chain(disks).chain(boot).any(|bytes| bytes > SPACE_BYTES_MAX) {
        return nonsense("the machine is larger than this release can hold");
    }
    if manifest.packs.iter().any(|pack| PackId::from_slice(&pack.id).is_none() || pack.bytes > PACK_MAX_EVER as u64) {
        return nonsense("a pack in it has no name or is too large");
    }
    let spaces = spaces(config);
    if manifest.major == 1 {
        check_maps(manifest, &spaces)?
    } else {
        check_regions(manifest, &spaces)?
    }
    check_sections(manifest)
}

/// The regions of a machine with these spaces: (space, first page, pages).
pub fn regions(spaces: &[u64]) -> impl Iterator<Item = (u32, u64, u64)> {
    (0u32..).zip(spaces).flat_map(|(space, pages)| {
        let firsts = (0..*pages).step_by(REGION_PAGES as usize);
        firsts.map(move |first| (space, first, (pages - first).min(REGION_PAGES)))
    })
}

fn check_regions(manifest: &Manifest, spaces: &[u64]) -> Result<(), ManifestError> {
    let count: u64 = spaces.iter().map(|pages| pages.div_ceil(REGION_PAGES)).sum();
    if count != manifest.regions.len() as u64 {
        return nonsense("its regions are not those of its configuration");
    }
    for ((space, first, pages), region) in regions(spaces).zip(&manifest.regions) {
        let what = || format!("region at page {first} of space {space}");
        let groups = 32 * pages.div_ceil(FAN_OUT as u64);
        if (region.space, region.first_page) != (space, first) || region.groups.len() as u64 != groups {
            return nonsense(format!("{} is out of place", what()));
        }
        let layer_lies =
            |layer: &proto::v1::LayerRef| !within(manifest, layer.pack, layer.offset, layer.bytes) || layer.bytes == 0;
        let pack_lies = |usage: &proto::v1::PackUse| usage.pack as usize >= manifest.packs.len();
        let lies = region.layers.iter().any(layer_lies) || region.packs.iter().any(pack_lies);
        if lies || region.layers.len() > LAYERS_MAX {
            return nonsense(format!("{} leads nowhere", what()));
        }
    }
    Ok(())
}

fn check_maps(manifest: &Manifest, spaces: &[u64]) -> Result<(), ManifestError> {
    let found: Vec<u64> = manifest.maps.iter().map(|map| map.pages).collect();
    let numbered = manifest.maps.iter().zip(0..).all(|(map, number)| map.space == number);
    if found != spaces || !numbered {
        return nonsense("its page maps are not those of its configuration");
    }
    manifest.maps.iter().try_for_each(|map| check_map(manifest, map))
}

fn check_map(manifest: &Manifest, map: &PageMap) -> Result<(), ManifestError> {
    let mut next = 0;
    for extent in &map.extents {
        let end = extent.first_page.checked_add(extent.pages.into());
        if extent.pages == 0 || extent.first_page < next || end.is_none_or(|end| end > map.pages) {
            return nonsense(format!("extent at page {} of space {} is out of place", extent.first_page, map.space));
        }
        let inside = (extent.skip as usize).saturating_add(extent.pages as usize).saturating_mul(PAGE_BYTES);
        let least = inside.saturating_add(HEADER_BYTES + PAGES_PREFIX_BYTES);
        let frame = within(manifest, extent.pack, extent.offset, extent.frame_bytes);
        if least > extent.frame_bytes as usize || !frame || u64::from(extent.skip) > extent.first_page {
            return nonsense(format!("extent at page {} of space {} leads nowhere", extent.first_page, map.space));
        }
        next = extent.first_page + u64::from(extent.pages);
    }
    Ok(())
}

fn check_sections(manifest: &Manifest) -> Result<(), ManifestError> {
    let mut names = BTreeSet::new();
    for section in &manifest.sections {
        if !within(manifest, section.pack, section.offset, section.bytes) {
            return nonsense(format!("section {:?} leads nowhere", section.name));
        }
        if !names.insert(&section.name) {
            return nonsense(format!("section {:?} is named twice", section.name));
        }
    }
    Ok(())
}

fn within(manifest: &Manifest, pack: u32, offset: u64, bytes: u32) -> bool {
    let size = manifest.packs.get(pack as usize).map(|pack| pack.bytes);
    size.is_some_and(|size| offset.checked_add(bytes.into()).is_some_and(|end| end <= size))
}

/// What the ledger keeps of it, if it lies under this key and its object has so many bytes.
pub fn entry(manifest: Manifest, key: String, object_bytes: u64) -> CheckpointEntry {
    CheckpointEntry {
        pack_keys: pack_keys(&manifest),
        stored_bytes: manifest.packs.iter().map(|pack| pack.bytes).sum::<u64>() + object_bytes,
        id: manifest.checkpoint,
        vm: manifest.vm_name,
        vm_id: manifest.vm_id,
        generation: manifest.generation,
        created_unix_ms: manifest.created_unix_ms,
        ram_bytes: manifest.config.map_or(0, |config| config.memory_bytes),
        own_bytes: manifest.own_bytes + object_bytes,
        stop_us: manifest.stop_us,
        manifest_key: key,
        digest: manifest.digest.unwrap_or_default(),
        verified: "unverified".into(),
        by_policy: false,
        sequence: 0,
    }
}

fn at(manifest: &Manifest, pack: &PackRef) -> PackAt {
    let generation = Generation(if manifest.major == 1 { manifest.generation } else { pack.generation });
    PackAt { generation, id: PackId::from_slice(&pack.id).unwrap_or_default(), bytes: pack.bytes }
}

/// Its pack of this number, which [`check`] has seen to be there.
pub fn pack(manifest: &Manifest, number: u32) -> PackAt {
    at(manifest, &manifest.packs[number as usize])
}

/// Its packs, in order.
pub fn packs(manifest: &Manifest) -> Vec<PackAt> {
    manifest.packs.iter().map(|pack| at(manifest, pack)).collect()
}

/// Its packs that hold page maps.
pub fn layer_packs(manifest: &Manifest) -> BTreeSet<PackAt> {
    manifest.regions.iter().flat_map(|region| &region.layers).map(|layer| pack(manifest, layer.pack)).collect()
}

/// Where a pack of this VM lies.
pub fn pack_key(manifest: &Manifest, pack: &PackAt) -> String {
    crate::bucket::pack_key(&manifest.vm_id, pack.generation, pack.id)
}

/// Where it lies itself.
pub fn key(manifest: &Manifest) -> String {
    format!("{}{}.manifest", crate::bucket::checkpoints_prefix(&manifest.vm_id), manifest.checkpoint)
}

/// Where its packs lie, in order.
pub fn pack_keys(manifest: &Manifest) -> Vec<String> {
    packs(manifest).iter().map(|pack| pack_key(manifest, pack)).collect()
}

/// The extents of a manifest of version 1.
pub fn extents(manifest: &Manifest) -> Vec<Extent> {
    let packs = packs(manifest);
    let of = |map: &PageMap| -> Vec<Extent> {
        let space = map.space as u16;
        let extent = |e: &proto::v1::PageExtent| Extent {
            space,
            first_page: e.first_page,
            leaves: Vec::new(),
            pages: e.pages,
            place: Place {
                pack: packs[e.pack as usize],
                offset: e.offset,
                bytes: e.frame_bytes,
                first_page: e.first_page - u64::from(e.skip),
            },
        };
        map.extents.iter().map(extent).collect()
    };
    manifest.maps.iter().flat_map(of).collect()
}

/// The roots of a manifest of version 2, by space.
pub fn roots(regions: &[MapRegion], spaces: usize) -> Vec<Digest> {
    let mut groups = vec![Vec::new(); spaces];
    for region in regions {
        groups[region.space as usize].extend_from_slice(&region.groups);
    }
    groups.iter().map(|groups| root_of_groups(groups)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::seal::DataKey;
    use proto::v1::{LayerRef, MachineConfig, PackUse, PageExtent, SectionRef};

    use super::*;

    const VM: VmId = VmId([0x11; 16]);

    fn sealer() -> Sealer {
        Sealer::new(&DataKey::new([1; 32]), VM, [2; 16])
    }

    fn opener() -> Opener {
        Opener::new(DataKey::new([1; 32]), VM)
    }

    fn head(major: u32) -> Manifest {
        Manifest {
            major,
            checkpoint: "00".repeat(8),
            vm_id: VM.to_string(),
            generation: 4,
            config: Some(MachineConfig { memory_bytes: 8 * 4096, ..MachineConfig::default() }),
            sections: vec![SectionRef { name: "clock".into(), offset: 17_000, bytes: 100, pack: 0 }],
            packs: vec![PackRef { id: vec![7; 32], bytes: 20_000, generation: 3 }],
            ..Manifest::default()
        }
    }

    fn first() -> Manifest {
        let extent =
            PageExtent { first_page: 2, pages: 3, frame_bytes: 64 + 4 * 4096, skip: 1, ..PageExtent::default() };
        Manifest { maps: vec![PageMap { space: 0, pages: 8, extents: vec![extent] }], ..head(1) }
    }

    fn second() -> Manifest {
        let region = MapRegion {
            groups: vec![5; 32],
            layers: vec![LayerRef { pack: 0, offset: 100, bytes: 500, pages: 3 }],
            packs: vec![PackUse { pack: 0, pages: 3 }],
            ..MapRegion::default()
        };
        Manifest { regions: vec![region], ..head(2) }
    }

    fn refused(mut manifest: Manifest, change: impl FnOnce(&mut Manifest)) -> String {
        check(&manifest).unwrap();
        change(&mut manifest);
        check(&manifest).unwrap_err().to_string()
    }

    #[test]
    fn version_2_survives_its_envelope_and_opens_with_its_key_alone() {
        let bytes = encode(&second(), &sealer(), WrappedKey::default()).unwrap();
        let Object::Sealed { vm, envelope } = parse(&bytes).unwrap() else { panic!("not sealed") };
        assert_eq!((vm, open(&envelope, &opener()).unwrap()), (VM, second()));
        let stranger = Opener::new(DataKey::new([9; 32]), VM);
        assert_eq!(open(&envelope, &stranger), Err(SealError::Tag.into()));
        let moved = Envelope { checkpoint: "22".repeat(8), ..envelope };
        assert!(open(&moved, &opener()).unwrap_err().to_string().contains("another checkpoint"));
    }

    #[test]
    fn version_1_is_still_read() {
        let bytes = frame::encode_message(Kind::Manifest, &first());
        let Object::Plain(manifest) = parse(&bytes).unwrap() else { panic!("sealed") };
        check(&manifest).unwrap();
        let extents = extents(&manifest);
        assert_eq!((extents.len(), extents[0].first_page, extents[0].place.first_page), (1, 2, 1));
        assert_eq!(packs(&manifest)[0].generation, Generation(4));
        assert_eq!(packs(&second())[0].generation, Generation(3));
    }

    #[test]
    fn numbers_that_lead_out_are_refused() {
        assert!(refused(first(), |m| m.maps[0].extents[0].first_page = 6).contains("out of place"));
        assert!(refused(first(), |m| m.maps[0].extents[0].skip = 2).contains("leads nowhere"));
        assert!(refused(first(), |m| m.maps[0].extents[0].offset = u64::MAX).contains("leads nowhere"));
        assert!(refused(first(), |m| m.maps[0].extents[0].pack = 1).contains("leads nowhere"));
        assert!(refused(first(), |m| m.maps[0].extents[0].first_page = 0).contains("leads nowhere"));
        assert!(refused(first(), |m| m.maps[0].pages = 1 << 60).contains("page maps"));
        assert!(refused(second(), |m| m.regions[0].first_page = 1).contains("out of place"));
        assert!(refused(second(), |m| m.regions[0].groups.truncate(31)).contains("out of place"));
        assert!(refused(second(), |m| m.regions[0].layers[0].offset = u64::MAX).contains("leads nowhere"));
        assert!(refused(second(), |m| m.regions[0].layers[0].pack = 1).contains("leads nowhere"));
        assert!(refused(second(), |m| m.regions[0].packs[0].pack = 1).contains("leads nowhere"));
        assert!(refused(second(), |m| m.regions.clear()).contains("regions"));
        for manifest in [first(), second()] {
            assert!(refused(manifest.clone(), |m| m.sections[0].bytes = 5000).contains("leads nowhere"));
            assert!(refused(manifest.clone(), |m| m.sections.push(m.sections[0].clone())).contains("twice"));
            assert!(
                refused(manifest.clone(), |m| m.config.as_mut().unwrap().memory_bytes = u64::MAX).contains("larger")
            );
            assert!(refused(manifest.clone(), |m| m.major = 3).contains("version 3"));
            assert!(refused(manifest, |m| m.vm_id = "../..".into()).contains("ids"));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(body in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&frame::encode(Kind::Manifest, &body)).map(|object| match object {
                Object::Plain(manifest) => check(&manifest).is_ok(),
                Object::Sealed { .. } => false,
            });
            let _ = parse(&frame::encode(Kind::Envelope, &body));
            let _ = parse(&body);
        }
    }
}

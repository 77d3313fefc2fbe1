//! The manifest of a checkpoint: written last, and the first thing that is read.
//!
//! A manifest from a bucket is hostile until [`parse`] has checked every number in it: after that, every extent lies in
//! its space and every frame in its pack, nothing overlaps, and nothing larger than the configuration says will be
//! allocated.

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message;
use proto::frame::{self, FrameError, HEADER_BYTES, Kind, PAGE_BYTES, PAGES_PREFIX_BYTES};
use proto::ids::{CheckpointId, Generation, PackId, VmId};
use proto::v1::{Manifest, PageExtent, PageMap};

use super::assembly::spaces;
use super::pack::PACK_MAX;

/// Format that this release writes.
pub const MAJOR: u32 = 1;
/// Most guest memory, and most bytes of a disk, that anything is allocated for: 4 TiB.
pub const SPACE_BYTES_MAX: u64 = 4 << 40;

/// Why bytes are no manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The frame around it.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A major version that this release does not know.
    #[error("manifest of version {0}; this release reads {MAJOR}")]
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
pub fn encode(manifest: &Manifest) -> Result<Bytes, ManifestError> {
    if manifest.encoded_len() > Kind::Manifest.body_bytes_max() {
        return nonsense("the page map is too fragmented for one manifest");
    }
    Ok(frame::encode_message(Kind::Manifest, manifest).into())
}

/// Takes an object apart and checks everything that can be checked without its packs.
///
/// # Errors
/// Any [`ManifestError`].
pub fn parse(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    let manifest: Manifest = frame::decode_message(Kind::Manifest, bytes)?;
    if manifest.major != MAJOR {
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
    let expected = spaces(config);
    let found: Vec<u64> = manifest.maps.iter().map(|map| map.pages).collect();
    let numbered = manifest.maps.iter().zip(0..).all(|(map, number)| map.space == number);
    if found != expected || !numbered {
        return nonsense("its page maps are not those of its configuration");
    }
    for pack in &manifest.packs {
        if PackId::from_slice(&pack.id).is_none() || pack.bytes > 2 * PACK_MAX as u64 {
            return nonsense("a pack in it has no name or is too large");
        }
    }
    manifest.maps.iter().try_for_each(|map| check_map(&manifest, map))?;
    check_sections(&manifest)?;
    Ok(manifest)
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
        if least > extent.frame_bytes as usize || !within(manifest, extent.pack, extent.offset, extent.frame_bytes) {
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

/// Names of its packs, in order.
pub fn pack_ids(manifest: &Manifest) -> Vec<PackId> {
    manifest.packs.iter().map(|pack| PackId::from_slice(&pack.id).unwrap_or_default()).collect()
}

/// Where its packs lie, in order.
pub fn pack_keys(manifest: &Manifest) -> Vec<String> {
    let generation = Generation(manifest.generation);
    pack_ids(manifest).into_iter().map(|id| crate::bucket::pack_key(&manifest.vm_id, generation, id)).collect()
}

/// What of one pack is current, in order of place: its extents with their space.
pub fn extents_by_pack(manifest: &Manifest) -> Vec<Vec<(u16, PageExtent)>> {
    let mut by_pack = vec![Vec::new(); manifest.packs.len()];
    for map in &manifest.maps {
        for extent in &map.extents {
            by_pack[extent.pack as usize].push((map.space as u16, *extent));
        }
    }
    for extents in &mut by_pack {
        extents.sort_by_key(|(_, extent)| (extent.offset, extent.skip));
    }
    by_pack
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::v1::{MachineConfig, PackRef, SectionRef};

    use super::*;

    fn small() -> Manifest {
        let config = MachineConfig { memory_bytes: 8 * 4096, ..MachineConfig::default() };
        let extent =
            PageExtent { first_page: 2, pages: 3, frame_bytes: 64 + 4 * 4096, skip: 1, ..PageExtent::default() };
        Manifest {
            major: MAJOR,
            checkpoint: "00".repeat(8),
            vm_id: "11".repeat(16),
            config: Some(config),
            sections: vec![SectionRef { name: "clock".into(), offset: 17_000, bytes: 100, pack: 0 }],
            maps: vec![PageMap { space: 0, pages: 8, extents: vec![extent] }],
            packs: vec![PackRef { id: vec![7; 32], bytes: 20_000 }],
            ..Manifest::default()
        }
    }

    fn refused(change: impl FnOnce(&mut Manifest)) -> String {
        let mut manifest = small();
        change(&mut manifest);
        parse(&encode(&manifest).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn a_sound_manifest_survives() {
        assert_eq!(parse(&encode(&small()).unwrap()).unwrap(), small());
    }

    #[test]
    fn numbers_that_lead_out_are_refused() {
        assert!(refused(|m| m.maps[0].extents[0].first_page = 6).contains("out of place"));
        assert!(refused(|m| m.maps[0].extents[0].skip = 2).contains("leads nowhere"));
        assert!(refused(|m| m.maps[0].extents[0].offset = u64::MAX).contains("leads nowhere"));
        assert!(refused(|m| m.maps[0].extents[0].pack = 1).contains("leads nowhere"));
        assert!(refused(|m| m.sections[0].bytes = 5000).contains("leads nowhere"));
        assert!(refused(|m| m.sections.push(m.sections[0].clone())).contains("twice"));
        assert!(refused(|m| m.maps[0].pages = 1 << 60).contains("page maps"));
        assert!(refused(|m| m.config.as_mut().unwrap().memory_bytes = u64::MAX).contains("larger"));
        assert!(refused(|m| m.major = 2).contains("version 2"));
        assert!(refused(|m| m.vm_id = "../..".into()).contains("ids"));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(body in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&frame::encode(Kind::Manifest, &body));
            let _ = parse(&body);
        }
    }
}

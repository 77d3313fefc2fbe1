//! What a repacking works with: checkpoints as versions of regions, layers and pages that move, and the manifest that comes
//! out. Pure: [`super::repack`] reads and writes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use proto::ids::VmId;
use proto::seal::{DataKey, Sealer};
use proto::status::Code;
use proto::v1::{LayerRef, Manifest, MapLayer, PackUse, SectionRef};

use crate::failure::Failure;
use crate::ingest::manifest::{self, regions};
use crate::ingest::map::{Extent, PackAt, Place, Region};
use crate::ingest::packs::{Packs, Pending, Table};
use crate::ingest::read::Opened;

/// Bytes of layers of a region that are held at a time.
const LAYERS_MAX: usize = 64 << 20;

/// Where a layer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct LayerAt {
    pub(super) pack: PackAt,
    pub(super) offset: u64,
    pub(super) bytes: u32,
    pub(super) pages: u32,
}

/// One region of one of the checkpoints.
#[derive(Clone, Copy)]
pub(super) struct At {
    pub(super) checkpoint: usize,
    pub(super) region: usize,
}

/// A region, and its versions: by the layers that make it up, the checkpoints that have it so.
pub(super) struct Versions {
    pub(super) space: u32,
    pub(super) first_page: u64,
    pub(super) pages: u64,
    pub(super) versions: ByLayers,
}

/// What of each pack some checkpoint needs.
#[derive(Default)]
pub(super) struct Live {
    pub(super) pages: BTreeMap<PackAt, u64>,
    pub(super) bytes: BTreeMap<PackAt, u64>,
}

/// Pages of a victim that lie in a new pack now.
pub(super) struct Moved {
    pub(super) first_page: u64,
    pub(super) pages: u32,
    pub(super) place: Pending,
}

/// A layer after the rewriting: where it was, or written anew; none: nothing of it is alive.
#[derive(Clone, Copy)]
pub(super) enum NewLayer {
    Kept(LayerAt),
    Written(Pending, u32),
    Empty,
}

/// The versions of a region, by layers.
pub(super) type ByLayers = BTreeMap<Vec<LayerAt>, Vec<At>>;

/// A version of a region of one checkpoint after the rewriting.
pub(super) struct NewVersion {
    pub(super) at: At,
    pub(super) layers: Vec<NewLayer>,
    pub(super) uses: Vec<(PackAt, u32)>,
}

/// What a region of a checkpoint is going to be.
pub(super) struct NewRegion {
    pub(super) layers: Vec<LayerAt>,
    pub(super) uses: Vec<(PackAt, u32)>,
}

/// Layers of one region that were read, within a limit.
#[derive(Default)]
pub(super) struct Layers {
    pub(super) held: HashMap<LayerAt, Arc<MapLayer>>,
    pub(super) bytes: usize,
}

/// Everything that the steps of a repacking share.
pub(super) struct Work {
    pub(super) checkpoints: Vec<Opened>,
    pub(super) keys: Vec<String>,
    pub(super) regions: Vec<Versions>,
    pub(super) victims: BTreeSet<PackAt>,
    pub(super) moved: BTreeMap<Place, Vec<Moved>>,
    pub(super) layers: BTreeMap<LayerAt, NewLayer>,
    pub(super) sections: BTreeMap<(PackAt, u64, u32), Pending>,
    pub(super) vm: VmId,
    pub(super) key: DataKey,
    pub(super) sealer: Arc<Sealer>,
    /// Bytes of new packs.
    pub(super) written_bytes: u64,
}

impl Layers {
    pub(super) fn keep(&mut self, at: LayerAt, layer: Arc<MapLayer>) {
        let bytes = layer.leaves.len() + 24 * (layer.runs.len() + layer.frames.len());
        if self.bytes + bytes > LAYERS_MAX {
            self.held.clear();
            self.bytes = 0;
        }
        self.bytes += bytes;
        self.held.insert(at, layer);
    }
}

/// A mistake of this room, found before anything was changed.
pub(super) fn bug(text: &str) -> Failure {
    Failure::new(Code::Internal, format!("repacking: {text}; no checkpoint was changed"))
}

/// The regions of all checkpoints, each with its versions.
pub(super) fn versions(checkpoints: &[Opened]) -> Vec<Versions> {
    let mut found: BTreeMap<(u32, u64, u64), ByLayers> = BTreeMap::new();
    for (checkpoint, opened) in checkpoints.iter().enumerate() {
        let spaces = opened.manifest.config.as_ref().map(crate::ingest::assembly::spaces).unwrap_or_default();
        for (number, (place, region)) in regions(&spaces).zip(&opened.manifest.regions).enumerate() {
            let at = |layer: &LayerRef| {
                let LayerRef { pack, offset, bytes, pages } = *layer;
                LayerAt { pack: manifest::pack(&opened.manifest, pack), offset, bytes, pages }
            };
            let layers: Vec<LayerAt> = region.layers.iter().map(at).collect();
            if !layers.is_empty() {
                let versions = found.entry(place).or_default();
                versions.entry(layers).or_default().push(At { checkpoint, region: number });
            }
        }
    }
    let region = |((space, first_page, pages), versions)| Versions { space, first_page, pages, versions };
    found.into_iter().map(region).collect()
}

/// Pages of one frame, joined where they lie side by side.
pub(super) fn extents(space: u16, place: Place, pages: BTreeMap<u64, [u8; 32]>) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for (page, leaf) in pages {
        match extents.last_mut() {
            Some(extent) if extent.first_page + u64::from(extent.pages) == page => {
                extent.pages += 1;
                extent.leaves.push(leaf);
            }
            _ => extents.push(Extent { space, first_page: page, leaves: vec![leaf], pages: 1, place }),
        }
    }
    extents
}

/// A layer without what is dead in victims, and with the new places of what is alive.
pub(super) fn transformed(
    work: &Work,
    region: &Versions,
    old: &MapLayer,
    new_pages: &Packs,
) -> Result<MapLayer, Failure> {
    let alone = Region::zero(region.space, region.first_page, region.pages);
    let mut alone = alone.laid(old).map_err(|error| bug(&error.to_string()))?;
    let (mut kept, mut added) = (Vec::new(), HashMap::new());
    for run in &old.runs {
        for page in run.first_page as usize..(run.first_page + run.pages) as usize {
            let Some(place) = alone.place(page).filter(|place| work.victims.contains(&place.pack)) else {
                kept.push(page);
                continue;
            };
            let number = region.first_page + page as u64;
            let moved = work.moved.get(&place).into_iter().flatten();
            let inside =
                |moved: &&Moved| (moved.first_page..moved.first_page + u64::from(moved.pages)).contains(&number);
            if let Some(Moved { first_page, place, .. }) = moved.into_iter().find(inside) {
                let Pending { offset, bytes, .. } = *place;
                let place = Place { pack: new_pages.of(place), offset, bytes, first_page: *first_page };
                let frame = *added.entry(place).or_insert_with(|| alone.frame(place));
                let leaf = alone.leaf(page);
                alone.set(page, leaf, Some(frame));
                kept.push(page);
            }
        }
    }
    Ok(alone.layer(kept.into_iter()))
}

/// The manifest that takes the place of another.
pub(super) fn replaced(
    work: &Work,
    opened: &Opened,
    mut new: BTreeMap<usize, NewRegion>,
    maps: &Packs,
) -> Result<Manifest, Failure> {
    let old = &opened.manifest;
    let mut table = Table::default();
    let mut regions = Vec::new();
    for (at, region) in old.regions.iter().enumerate() {
        let NewRegion { layers, uses } = new.remove(&at).unwrap_or(NewRegion { layers: vec![], uses: vec![] });
        if layers.is_empty() && !region.packs.is_empty() {
            return Err(bug("a region was forgotten"));
        }
        let mut region = proto::v1::MapRegion { layers: vec![], packs: vec![], ..region.clone() };
        for LayerAt { pack, offset, bytes, pages } in layers {
            region.layers.push(LayerRef { pack: table.number(pack), offset, bytes, pages });
        }
        region.packs = uses.into_iter().map(|(pack, pages)| PackUse { pack: table.number(pack), pages }).collect();
        regions.push(region);
    }
    let mut sections = Vec::new();
    for section in &old.sections {
        let pack = manifest::pack(old, section.pack);
        sections.push(match work.sections.get(&(pack, section.offset, section.bytes)) {
            Some(place) => SectionRef {
                pack: table.number(maps.of(place)),
                offset: place.offset,
                bytes: place.bytes,
                ..section.clone()
            },
            None => SectionRef { pack: table.number(pack), ..section.clone() },
        });
    }
    if table.packs().iter().any(|pack| work.victims.contains(pack)) {
        return Err(bug("a pack that was rewritten is still needed"));
    }
    let packs = table.packs().iter().map(PackAt::message).collect();
    Ok(Manifest { regions, sections, packs, ..old.clone() })
}

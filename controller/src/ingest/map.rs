//! Where each page of a machine lies in the bucket, and what its digest is: regions of 65,536 pages, each a pile of layers.
//!
//! ```text
//! region = layer 0 (all of it) | layer 1 (what a later checkpoint changed) | layer 2 | ...
//! layer  = runs of pages, each in one sealed frame of some pack or zero, and the digest of each page that is not zero
//! ```
//! A checkpoint adds at most one layer to a region and shares the others with the checkpoint before it, so it is as
//! large as what changed and yet names all of its pages itself: no checkpoint needs another. When the later layers of a
//! region weigh half of the first, the region is written anew as one.
//!
//! A layer from a bucket is hostile until [`Region::lay`] has checked its numbers. Pure; knows no bucket and no key.

use std::collections::BTreeMap;

use proto::frame::{HEADER_BYTES, PAGES_MAX};
use proto::ids::{Generation, PackId};
use proto::leaf::{Leaf, ZERO_LEAF};
use proto::v1::{LayerRef, MapFrame, MapLayer, MapRun, PackRef};

use super::digest::FAN_OUT;

/// Pages of a region.
pub const REGION_PAGES: u64 = 65_536;
/// Most layers of a region: a reader fetches each.
pub const LAYERS_MAX: usize = 32;
/// No page: its digest is that of zeros.
const NOWHERE: u32 = u32::MAX;

/// A pack as a map names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackAt {
    /// Generation of the VM that wrote it: part of its key.
    pub generation: Generation,
    /// Its name.
    pub id: PackId,
    /// All of its bytes.
    pub bytes: u64,
}

impl PackAt {
    /// Takes a message apart.
    pub fn parse(pack: &PackRef) -> Option<PackAt> {
        let id = PackId::from_slice(&pack.id)?;
        Some(PackAt { generation: Generation(pack.generation), id, bytes: pack.bytes })
    }

    /// The message.
    pub fn message(&self) -> PackRef {
        PackRef { id: self.id.to_vec(), bytes: self.bytes, generation: self.generation.0 }
    }
}

/// A frame of pages in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The pack.
    pub pack: PackAt,
    /// Where the frame begins in it.
    pub offset: u64,
    /// Bytes of the frame as it lies there.
    pub bytes: u32,
    /// First page of the frame inside.
    pub first_page: u64,
}

/// Pages that lie side by side in one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// 0 RAM, 1.. local disks.
    pub space: u16,
    /// The first of them, of the space.
    pub first_page: u64,
    /// Their digests, one each. Empty in a manifest of version 1, whose frames answer for themselves.
    pub leaves: Vec<Leaf>,
    /// How many.
    pub pages: u32,
    /// The frame.
    pub place: Place,
}

/// Why bytes are no layer of this region.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// A layer of another region.
    #[error("it is of page {first_page} of space {space}")]
    Region {
        /// What it says.
        space: u32,
        /// What it says.
        first_page: u64,
    },
    /// A run that is out of order or leads out of the region.
    #[error("run at page {0} of the region is out of place")]
    Run(u32),
    /// A frame that leads nowhere.
    #[error("frame {0} of it leads nowhere")]
    Frame(usize),
    /// More or fewer digests than pages.
    #[error("it has {found} bytes of digests, {expected} are expected")]
    Leaves {
        /// What there is.
        found: usize,
        /// What its runs need.
        expected: usize,
    },
}

/// A region with all its layers laid over each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    space: u32,
    first_page: u64,
    leaves: Vec<Leaf>,
    /// Index of the frame of each page, or [`NOWHERE`].
    at: Vec<u32>,
    frames: Vec<Place>,
}

impl Region {
    /// A region of zeros of `pages` pages.
    pub fn zero(space: u32, first_page: u64, pages: u64) -> Region {
        let pages = pages.min(REGION_PAGES) as usize;
        Region { space, first_page, leaves: vec![ZERO_LEAF; pages], at: vec![NOWHERE; pages], frames: Vec::new() }
    }

    /// The region of a space of `pages` pages that begins at `first_page`.
    pub fn of(space: u32, first_page: u64, pages: u64) -> Region {
        Region::zero(space, first_page, pages - first_page)
    }

    /// Its space.
    pub fn space(&self) -> u32 {
        self.space
    }

    /// Its first page, of the space.
    pub fn first_page(&self) -> u64 {
        self.first_page
    }

    /// Digest of a page, counted from the region's first.
    pub fn leaf(&self, page: usize) -> Leaf {
        self.leaves[page]
    }

    /// Digests of all its pages.
    pub fn leaves(&self) -> &[Leaf] {
        &self.leaves
    }

    /// A page, counted from the region's first, lies there now; `None`: it is zero.
    pub fn set(&mut self, page: usize, leaf: Leaf, place: Option<u32>) {
        self.leaves[page] = leaf;
        self.at[page] = place.unwrap_or(NOWHERE);
    }

    /// Adds a frame that [`Region::set`] may name.
    pub fn frame(&mut self, place: Place) -> u32 {
        self.frames.push(place);
        self.frames.len() as u32 - 1
    }

    /// The same with a layer laid over it.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn laid(mut self, layer: &MapLayer) -> Result<Region, MapError> {
        self.lay(layer)?;
        Ok(self)
    }

    /// Lays a layer over what is there.
    ///
    /// # Errors
    /// [`MapError`]; the region is not to be used then.
    pub fn lay(&mut self, layer: &MapLayer) -> Result<(), MapError> {
        if (layer.space, layer.first_page) != (self.space, self.first_page) {
            return Err(MapError::Region { space: layer.space, first_page: layer.first_page });
        }
        let before = self.frames.len() as u32;
        for (number, frame) in layer.frames.iter().enumerate() {
            self.frames.push(place(layer, frame).ok_or(MapError::Frame(number))?);
        }
        let expected = 32 * layer.runs.iter().filter(|run| run.frame > 0).map(|run| run.pages as usize).sum::<usize>();
        if layer.leaves.len() != expected {
            return Err(MapError::Leaves { found: layer.leaves.len(), expected });
        }
        let (mut leaves, mut next) = (layer.leaves.as_chunks::<32>().0.iter(), 0);
        for run in &layer.runs {
            let end = run.first_page.checked_add(run.pages).filter(|end| *end as usize <= self.at.len());
            let (Some(end), true) = (end, run.pages > 0 && run.first_page >= next) else {
                return Err(MapError::Run(run.first_page));
            };
            if run.frame > 0 && !self.inside(run, before, layer.frames.len()) {
                return Err(MapError::Run(run.first_page));
            }
            for page in run.first_page as usize..end as usize {
                match run.frame.checked_sub(1) {
                    None => self.set(page, ZERO_LEAF, None),
                    Some(frame) => {
                        // Their number was compared above.
                        let leaf = leaves.next().copied().unwrap_or(ZERO_LEAF);
                        self.set(page, leaf, Some(before + frame));
                    }
                }
            }
            next = end;
        }
        Ok(())
    }

    /// Whether the frame of a run can hold its pages.
    fn inside(&self, run: &MapRun, before: u32, frames: usize) -> bool {
        if run.frame as usize > frames {
            return false;
        }
        let first = self.first_page + u64::from(run.first_page);
        let frame = &self.frames[(before + run.frame - 1) as usize];
        first.checked_sub(frame.first_page).is_some_and(|skip| skip + u64::from(run.pages) <= u64::from(PAGES_MAX))
    }

    /// All of it as one layer.
    pub fn whole(&self) -> MapLayer {
        let pages = (0..self.at.len()).filter(|page| self.at[*page] != NOWHERE);
        self.layer(pages)
    }

    /// These of its pages, in ascending order, as one layer.
    pub fn layer(&self, pages: impl Iterator<Item = usize>) -> MapLayer {
        let mut layer = MapLayer { space: self.space, first_page: self.first_page, ..MapLayer::default() };
        let (mut packs, mut frames) = (BTreeMap::new(), BTreeMap::new());
        for page in pages {
            let frame = match self.at[page] {
                NOWHERE => 0,
                at => {
                    layer.leaves.extend_from_slice(&self.leaves[page]);
                    *frames.entry(at).or_insert_with(|| {
                        let place = &self.frames[at as usize];
                        let pack = *packs.entry(place.pack).or_insert_with(|| {
                            layer.packs.push(place.pack.message());
                            layer.packs.len() as u32 - 1
                        });
                        let Place { offset, bytes, first_page, .. } = *place;
                        layer.frames.push(MapFrame { pack, offset, bytes, first_page });
                        layer.frames.len() as u32
                    })
                }
            };
            match layer.runs.last_mut() {
                Some(run) if run.frame == frame && (run.first_page + run.pages) as usize == page => run.pages += 1,
                _ => layer.runs.push(MapRun { first_page: page as u32, pages: 1, frame }),
            }
        }
        layer
    }

    /// Nodes of the digest tree over each 512 pages, one after the other.
    pub fn groups(&self) -> Vec<u8> {
        let node = |leaves: &[Leaf]| *blake3::hash(leaves.as_flattened()).as_bytes();
        self.leaves.chunks(FAN_OUT).flat_map(node).collect()
    }

    /// Pages that are not zero, joined where they lie side by side.
    pub fn extents(&self) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut open = NOWHERE;
        for (page, at) in self.at.iter().enumerate() {
            if *at == NOWHERE {
                open = NOWHERE;
                continue;
            }
            match extents.last_mut() {
                Some(extent) if open == *at => {
                    extent.pages += 1;
                    extent.leaves.push(self.leaves[page]);
                }
                _ => extents.push(Extent {
                    space: self.space as u16,
                    first_page: self.first_page + page as u64,
                    leaves: vec![self.leaves[page]],
                    pages: 1,
                    place: self.frames[*at as usize],
                }),
            }
            open = *at;
        }
        extents
    }

    /// The packs that hold a page of it, and how many.
    pub fn uses(&self) -> BTreeMap<PackAt, u32> {
        let mut uses = BTreeMap::new();
        for at in self.at.iter().filter(|at| **at != NOWHERE) {
            *uses.entry(self.frames[*at as usize].pack).or_insert(0) += 1;
        }
        uses
    }

    /// The frame in which a page lies, counted from the region's first; none for zeros.
    pub fn place(&self, page: usize) -> Option<Place> {
        (self.at[page] != NOWHERE).then(|| self.frames[self.at[page] as usize])
    }

    /// Pages that are not zero, counted from the region's first: digest, and the frame in which each lies.
    pub fn placed(&self) -> impl Iterator<Item = (usize, Leaf, Place)> {
        let frames = &self.frames;
        let there = self.at.iter().enumerate().filter(|(_, at)| **at != NOWHERE);
        there.map(|(page, at)| (page, self.leaves[page], frames[*at as usize]))
    }

    /// The pack in which a page lies, counted from the region's first; none for zeros.
    pub fn pack(&self, page: usize) -> Option<PackAt> {
        (self.at[page] != NOWHERE).then(|| self.frames[self.at[page] as usize].pack)
    }
}

fn place(layer: &MapLayer, frame: &MapFrame) -> Option<Place> {
    let pack = PackAt::parse(layer.packs.get(frame.pack as usize)?)?;
    let end = frame.offset.checked_add(frame.bytes.into())?;
    let sound = end <= pack.bytes && frame.bytes as usize >= HEADER_BYTES;
    sound.then_some(Place { pack, offset: frame.offset, bytes: frame.bytes, first_page: frame.first_page })
}

/// Whether a region that would get one more layer of `added` pages is to be written as a whole instead.
pub fn worth_rewriting(layers: &[LayerRef], added: usize) -> bool {
    let Some((first, later)) = layers.split_first() else { return true };
    let later: u64 = later.iter().map(|layer| u64::from(layer.pages)).sum();
    layers.len() + 1 > LAYERS_MAX || (later + added as u64) * 2 > u64::from(first.pages)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::digest::PageDigests;
    use super::*;

    fn pack(name: u8) -> PackAt {
        PackAt { generation: Generation(3), id: PackId([name; 32]), bytes: 1 << 24 }
    }

    fn place_at(name: u8, first_page: u64) -> Place {
        Place { pack: pack(name), offset: 4096, bytes: 100_000, first_page }
    }

    fn leaf(value: u8) -> Leaf {
        [value; 32]
    }

    #[test]
    fn layers_over_each_other_are_the_region() {
        let mut first = Region::of(0, REGION_PAGES, REGION_PAGES + 1000);
        let a = first.frame(place_at(1, REGION_PAGES + 10));
        for page in 10..20 {
            first.set(page, leaf(page as u8), Some(a));
        }
        let base = first.whole();
        assert_eq!((base.runs.len(), base.frames.len(), base.leaves.len()), (1, 1, 320));

        let mut second = first.clone();
        let b = second.frame(place_at(2, REGION_PAGES + 15));
        second.set(15, leaf(99), Some(b));
        second.set(16, ZERO_LEAF, None);
        let change = second.layer([15, 16].into_iter());
        assert_eq!((change.runs.len(), change.leaves.len()), (2, 32));

        let mut read = Region::of(0, REGION_PAGES, REGION_PAGES + 1000);
        read.lay(&base).unwrap();
        read.lay(&change).unwrap();
        assert_eq!((read.leaves(), read.groups()), (second.leaves(), second.groups()));
        assert_eq!(read.extents(), second.extents());
        let extents: Vec<(u64, u32)> = read.extents().iter().map(|e| (e.first_page - REGION_PAGES, e.pages)).collect();
        assert_eq!(extents, [(10, 5), (15, 1), (17, 3)]);
        assert_eq!(read.uses(), BTreeMap::from([(pack(1), 8), (pack(2), 1)]));
    }

    #[test]
    fn groups_are_the_nodes_of_the_digest_tree() {
        let mut region = Region::of(0, 0, 1300);
        let frame = region.frame(place_at(1, 0));
        let mut digests = PageDigests::new(1300);
        for page in [0, 511, 512, 1299] {
            region.set(page, leaf(7), Some(frame));
            digests.set(page as u64, leaf(7));
        }
        assert_eq!(super::super::digest::root_of_groups(&region.groups()), digests.root());
    }

    #[test]
    fn layers_that_lie_are_refused() {
        let mut region = Region::of(0, 0, 1000);
        let frame = region.frame(place_at(1, 0));
        (0..9).for_each(|page| region.set(page, leaf(1), Some(frame)));
        let sound = region.whole();
        let refused = |change: fn(&mut MapLayer)| {
            let mut layer = sound.clone();
            change(&mut layer);
            Region::of(0, 0, 1000).lay(&layer).unwrap_err()
        };
        Region::of(0, 0, 1000).lay(&sound).unwrap();
        assert!(matches!(refused(|l| l.space = 1), MapError::Region { .. }));
        assert!(matches!(refused(|l| l.runs[0].first_page = 992), MapError::Run(992)));
        assert!(matches!(refused(|l| l.runs[0].first_page = u32::MAX), MapError::Run(_)));
        assert!(matches!(refused(|l| l.runs[0].frame = 2), MapError::Run(0)));
        assert!(matches!(refused(|l| l.runs[0].pages = 8), MapError::Leaves { .. }));
        assert!(matches!(refused(|l| l.runs.push(l.runs[0])), MapError::Leaves { .. }));
        assert!(matches!(refused(|l| l.frames[0].pack = 1), MapError::Frame(0)));
        assert!(matches!(refused(|l| l.frames[0].offset = u64::MAX), MapError::Frame(0)));
        assert!(matches!(refused(|l| l.frames[0].first_page = 1), MapError::Run(0)));
        assert!(matches!(refused(|l| l.packs[0].id.truncate(31)), MapError::Frame(0)));
    }

    #[test]
    fn a_region_is_rewritten_when_its_later_layers_weigh_half_of_the_first() {
        let layer = |pages| LayerRef { pages, ..LayerRef::default() };
        assert!(worth_rewriting(&[], 1));
        assert!(!worth_rewriting(&[layer(1000)], 500));
        assert!(worth_rewriting(&[layer(1000), layer(400)], 101));
        assert!(worth_rewriting(&[layer(60_000)].repeat(LAYERS_MAX), 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn any_history_reads_back(
            rounds in proptest::collection::vec(proptest::collection::btree_map(0..700usize, 0..4u8, 0..60), 1..5),
        ) {
            let mut region = Region::of(1, 0, 700);
            let mut layers = Vec::new();
            for (number, changes) in rounds.iter().enumerate() {
                for (page, value) in changes {
                    let frame = region.frame(place_at(number as u8, (*page as u64 / 256) * 256));
                    match value {
                        0 => region.set(*page, ZERO_LEAF, None),
                        value => region.set(*page, leaf(*value), Some(frame)),
                    }
                }
                layers.push(region.layer(changes.keys().copied()));
            }
            let mut read = Region::of(1, 0, 700);
            for layer in &layers {
                read.lay(layer).unwrap();
            }
            prop_assert_eq!(read.leaves(), region.leaves());
            prop_assert_eq!(read.groups(), region.groups());
            prop_assert_eq!(read.uses(), region.uses());
            let mut again = Region::of(1, 0, 700);
            again.lay(&read.whole()).unwrap();
            prop_assert_eq!(again.extents(), read.extents());
        }
    }
}

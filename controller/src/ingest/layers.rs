//! What arrived, laid over the checkpoint before it: the regions of the new manifest.
//!
//! ```text
//! region untouched          its layers and digests are those of the base; nothing is read or written
//! region touched            the base's layers are read, pages that differ become one more layer (or all become one)
//! ```
//! A page whose digest is that of the base keeps its old place, unless that place is lost: then the copy that arrived
//! takes it. One region is in memory at a time. Layers and sections go to packs of their own, after those of pages.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proto::frame::{self, Kind};
use proto::status::Code;
use proto::v1::{LayerRef, MachineDigest, MapRegion, PackEntry, PackUse, Section, SectionRef};

use super::assembly::{Desk, IngestError, Received, Touched, compare};
use super::digest::{machine_digest, state_digest};
use super::manifest::{self, regions, roots};
use super::map::{PackAt, Place, Region, worth_rewriting};
use super::pack::Pack;
use super::packs::{Packs, Pending, Table};
use super::read::{Opened, Reader};
use crate::failure::Failure;

/// The checkpoint that a new one builds on.
pub struct Base {
    /// Its manifest.
    pub opened: Opened,
    /// Its packs that the bucket has lost.
    pub lost: BTreeSet<PackAt>,
}

/// What a manifest says of pages and sections.
pub struct Laid {
    /// Regions, in order.
    pub regions: Vec<MapRegion>,
    /// Sections.
    pub sections: Vec<SectionRef>,
    /// All packs that are needed.
    pub packs: Vec<PackAt>,
    /// The digest that was computed, which is the source's.
    pub digest: MachineDigest,
    /// How long the guest stood still, in microseconds.
    pub stopped_us: u64,
}

/// Where full packs go.
pub trait Sink {
    /// Takes a pack; may return before it is durable.
    fn put(&mut self, pack: Pack) -> impl Future<Output = ()> + Send;
}

/// Lays what arrived over its base.
pub struct Layers<'a, S> {
    /// Reads the base.
    pub reader: &'a Reader,
    /// The base; none for a full checkpoint.
    pub base: Option<&'a Base>,
    /// Seals what is written.
    pub desk: &'a Desk,
    /// Pages of each space.
    pub spaces: &'a [u64],
    /// Where packs go.
    pub sink: S,
    /// Hex of the checkpoint's id.
    pub checkpoint: &'a str,
    /// Generation that writes.
    pub generation: proto::ids::Generation,
}

/// A region of the base.
#[derive(Clone, Copy)]
struct Under<'a> {
    base: &'a Base,
    region: &'a MapRegion,
}

impl Under<'_> {
    /// As it is there.
    fn kept(&self, table: &mut Table) -> MapRegion {
        let mut kept = MapRegion { layers: self.layers(table), ..self.region.clone() };
        kept.packs.iter_mut().for_each(|usage| usage.pack = self.number(usage.pack, table));
        kept
    }

    fn layers(&self, table: &mut Table) -> Vec<LayerRef> {
        let layer = |layer: &LayerRef| LayerRef { pack: self.number(layer.pack, table), ..*layer };
        self.region.layers.iter().map(layer).collect()
    }

    /// The number in the new manifest of a pack of the base's.
    fn number(&self, pack: u32, table: &mut Table) -> u32 {
        table.number(manifest::pack(&self.base.opened.manifest, pack))
    }
}

impl<S: Sink> Layers<'_, S> {
    /// All of it.
    ///
    /// # Errors
    /// [`Code::Corrupt`] if the digest is not the source's or the base is damaged, or the bucket's.
    pub async fn lay(mut self, received: Received) -> Result<Laid, Failure> {
        let Received { mut touched, places, sections, digest, .. } = received;
        let mut own = Packs::new(self.checkpoint, self.generation, self.desk.sealer.clone());
        let (mut table, mut laid, mut pending) = (Table::default(), Vec::new(), Vec::new());
        let spaces = self.spaces.to_vec();
        for (number, (space, first_page, pages)) in regions(&spaces).enumerate() {
            let said = touched[space as usize][(first_page / super::map::REGION_PAGES) as usize].take();
            let under = self.base.map(|base| Under { base, region: &base.opened.manifest.regions[number] });
            let region = match (said, under) {
                (None, Some(under)) => under.kept(&mut table),
                (None, None) => Self::described(&Region::zero(space, first_page, pages), &mut table),
                (Some(said), under) => {
                    let zero = Region::zero(space, first_page, pages);
                    let (region, layer) = self.region(zero, under, *said, &places, &mut own, &mut table).await?;
                    pending.extend(layer.map(|layer| (laid.len(), layer)));
                    region
                }
            };
            laid.push(region);
        }
        let (sections, state): (Vec<_>, Vec<Section>) = self.sections(sections, &mut own).await;
        if let Some(pack) = own.close() {
            self.sink.put(pack).await;
        }
        for (region, (layer, pages)) in pending {
            let pack = table.number(own.of(&layer));
            laid[region].layers.push(LayerRef { pack, offset: layer.offset, bytes: layer.bytes, pages });
        }
        let sections = sections.into_iter().map(|(name, at)| SectionRef {
            name,
            pack: table.number(own.of(&at)),
            offset: at.offset,
            bytes: at.bytes,
        });
        let sections = sections.collect();
        self.trusted(&table)?;
        let computed = machine_digest(&roots(&laid, spaces.len()), state_digest(&state));
        compare(&digest, &computed)?;
        Ok(Laid {
            regions: laid,
            sections,
            packs: table.into_packs(),
            digest: computed,
            stopped_us: received.stopped_us,
        })
    }

    /// What a base has lost is in no checkpoint that builds on it.
    fn trusted(&self, table: &Table) -> Result<(), Failure> {
        let Some(base) = self.base else { return Ok(()) };
        match table.packs().iter().find(|pack| base.lost.contains(pack)) {
            None => Ok(()),
            Some(pack) => {
                let text = format!("the source did not send again what pack {} held, which is lost", pack.id);
                Err(Failure::new(Code::Corrupt, text).hint("ask again: the next checkpoint is written in full"))
            }
        }
    }

    /// A region without layers.
    fn described(region: &Region, table: &mut Table) -> MapRegion {
        let uses = region.uses().into_iter().map(|(pack, pages)| PackUse { pack: table.number(pack), pages });
        MapRegion {
            space: region.space(),
            first_page: region.first_page(),
            groups: region.groups(),
            layers: Vec::new(),
            packs: uses.collect(),
        }
    }

    async fn region(
        &mut self,
        zero: Region,
        under: Option<Under<'_>>,
        said: Touched,
        places: &[Place],
        own: &mut Packs,
        table: &mut Table,
    ) -> Result<(MapRegion, Option<(Pending, u32)>), Failure> {
        let below = match under {
            Some(Under { base, region }) => self.reader.region(&base.opened, region, zero).await?,
            None => zero,
        };
        let (region, changed) = changed(below, &said, places, under.map(|under| &under.base.lost));
        if let Some(under) = under
            && changed.is_empty()
        {
            return Ok((under.kept(table), None));
        }
        let mut described = Self::described(&region, table);
        let layers = under.map_or(&[][..], |under| &under.region.layers);
        let layer = if worth_rewriting(layers, changed.len()) {
            region.whole()
        } else {
            described.layers = under.map(|under| under.layers(table)).unwrap_or_default();
            region.layer(changed.into_iter())
        };
        let pages = layer.runs.iter().map(|run| run.pages).sum();
        if pages == 0 {
            return Ok((described, None));
        }
        let sealed = self.desk.sealer.seal(&frame::encode_message(Kind::PageMap, &layer));
        let entry = PackEntry { space: layer.space, first_page: layer.first_page, ..PackEntry::default() };
        let layer = self.push(own, &sealed, entry).await;
        Ok((described, Some((layer, pages))))
    }

    async fn sections(
        &mut self,
        sections: BTreeMap<String, (Section, Bytes)>,
        own: &mut Packs,
    ) -> (Vec<(String, Pending)>, Vec<Section>) {
        let (mut places, mut state) = (Vec::new(), Vec::new());
        for (name, (section, sealed)) in sections {
            let entry = PackEntry { section: name.clone(), ..PackEntry::default() };
            places.push((name, self.push(own, &sealed, entry).await));
            state.push(section);
        }
        (places, state)
    }

    async fn push(&mut self, own: &mut Packs, frame: &[u8], entry: PackEntry) -> Pending {
        let (place, full) = own.push(frame, entry);
        if let Some(pack) = full {
            self.sink.put(pack).await;
        }
        place
    }
}

/// The region with what was said of it, and the pages that changed, in order.
fn changed(
    mut region: Region,
    said: &Touched,
    places: &[Place],
    lost: Option<&BTreeSet<PackAt>>,
) -> (Region, Vec<usize>) {
    let (mut frames, mut changed) = (BTreeMap::new(), Vec::new());
    for (page, leaf, at) in said.said() {
        let lies_well = region.pack(page).is_none_or(|pack| !lost.is_some_and(|lost| lost.contains(&pack)));
        if region.leaf(page) == leaf && lies_well {
            continue;
        }
        let frame = at.map(|at| *frames.entry(at).or_insert_with(|| region.frame(places[at as usize])));
        region.set(page, leaf, frame);
        changed.push(page);
    }
    (region, changed)
}

impl From<IngestError> for Failure {
    fn from(error: IngestError) -> Failure {
        let code = match &error {
            IngestError::Frame { .. } | IngestError::Digest { .. } => Code::Corrupt,
            IngestError::Protocol { .. } => Code::Protocol,
            IngestError::TooLarge(_) => Code::Exhausted,
        };
        if code == Code::Corrupt {
            metrics::counter!(crate::metrics::DAMAGED).increment(1);
        }
        Failure::new(code, format!("checkpoint: {error}"))
    }
}

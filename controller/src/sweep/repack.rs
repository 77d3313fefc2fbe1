//! Packs that are mostly dead, rewritten with what is alive.
//!
//! ```text
//!   count    which pages of which frames some checkpoint needs, one region of all checkpoints after the other
//!   copy     live pages of the victims into new packs of pages                         (new packs: nobody names them yet)
//!   map      layers that name a victim, or lie in one, anew; each compared with what it was   (new packs of page maps)
//!   swap     each manifest that needs a victim replaced by one that needs the new packs, one after the other
//! ```
//! Killed anywhere, every checkpoint is whole: before its swap it needs only old packs, after it only new ones, and old packs
//! go when no manifest names them. New packs that nobody names yet go with the next sweep. Layers stay shared: each is
//! rewritten once, whichever checkpoints share it. In memory at a time: one region, its layers, a pack that is read and one
//! that is written, and the manifests, which have a limit.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use proto::frame::{self, Kind};
use proto::ids::PackId;
use proto::seal::Sealer;
use proto::status::Code;
use proto::v1::{MapLayer, PackEntry, PackRef};

use super::Request;
use super::mark::Ground;
use super::shape::{
    At, LayerAt, Layers, Live, Moved, NewLayer, NewRegion, NewVersion, Versions, Work, bug, extents, replaced,
    transformed, versions,
};
use crate::bucket;
use crate::failure::Failure;
use crate::ingest::manifest::{self, pack_key};
use crate::ingest::map::{Extent, PackAt, Place, Region};
use crate::ingest::pack::Pack;
use crate::ingest::packs::{Packs, Pending};
use crate::ingest::read::{Opened, Reader, beside, by_pack, frames, laid, made_of, pages};

/// Bytes of manifests that are held at a time.
const MANIFESTS_MAX: u64 = 256 << 20;
/// Live bytes that are copied in one go; the rest waits for the next sweep.
const COPY_MAX: u64 = 256 << 20;

/// How many pages a pack holds, of packs that were looked into: what a pack holds never changes.
#[derive(Default)]
pub struct Totals {
    known: Mutex<HashMap<PackId, u64>>,
}

/// A repacking.
pub struct Repack<'a, S> {
    /// Reads and opens.
    pub reader: &'a Reader,
    /// Of which VM.
    pub request: &'a Request,
    /// What is known of packs.
    pub totals: &'a Totals,
    /// Hears what is done.
    pub say: &'a S,
}

/// What was done.
#[derive(Default)]
pub struct Repacked {
    /// Packs that are rewritten.
    pub repacked: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Manifests that were replaced.
    pub manifests: Vec<String>,
    /// Why nothing was done; may be empty.
    pub note: String,
}

impl<S: Fn(String) + Sync> Repack<'_, S> {
    /// Does all of it.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming what is damaged, or the bucket's; every checkpoint is as good as before.
    pub async fn run(&self, ground: &Ground) -> Result<Repacked, Failure> {
        let mut done = Repacked::default();
        if ground.manifests.iter().map(|manifest| manifest.bytes).sum::<u64>() > MANIFESTS_MAX {
            done.note = format!("not repacked: the manifests are larger than {} MiB together", MANIFESTS_MAX >> 20);
            return Ok(done);
        }
        let Some(mut work) = self.open(ground, &mut done).await? else { return Ok(done) };
        let live = self.count(&work).await?;
        work.victims = self.victims(&work, &live).await?;
        done.repacked = work.victims.len() as u64;
        if work.victims.is_empty() || self.request.dry_run {
            return Ok(done);
        }
        (self.say)(format!(
            "{} packs of {} are mostly dead: rewriting what is alive",
            done.repacked, self.request.claim.vm
        ));
        // New packs are this generation's: nobody else may write any.
        self.request.claim.make(&self.reader.bucket).await?;
        let mut pages = self.packs(&work);
        self.copy(&mut work, &mut pages).await?;
        self.write(&mut work, pages.close()).await?;
        let mut maps = self.packs(&work);
        let new = self.map(&mut work, &pages, &mut maps).await?;
        self.write(&mut work, maps.close()).await?;
        self.swap(&work, new, &maps, &mut done).await?;
        done.written_bytes = work.written_bytes;
        Ok(done)
    }

    /// Reads all manifests. One that cannot be read stays as it is, and so do all packs: it may need any of them.
    async fn open(&self, ground: &Ground, done: &mut Repacked) -> Result<Option<Work>, Failure> {
        let (mut checkpoints, mut keys) = (Vec::new(), Vec::new());
        for object in &ground.manifests {
            match self.reader.manifest(&object.key).await {
                Ok(opened) if opened.manifest.major == 2 => {
                    checkpoints.push(opened);
                    keys.push(object.key.clone());
                }
                // Its packs are its own.
                Ok(_) => {}
                Err(failure) if matches!(failure.code, Code::Corrupt | Code::Denied) => {
                    done.note = format!("not repacked: {failure}");
                    return Ok(None);
                }
                Err(failure) => return Err(failure),
            }
        }
        if checkpoints.is_empty() {
            return Ok(None);
        }
        let vm = self.request.claim.vm_id.parse().map_err(|_| Failure::new(Code::Internal, "no id of a VM"))?;
        let key = self.reader.keys.data_key(&self.reader.bucket, vm).await?;
        let regions = versions(&checkpoints);
        Ok(Some(Work {
            checkpoints,
            keys,
            regions,
            victims: BTreeSet::new(),
            moved: BTreeMap::new(),
            layers: BTreeMap::new(),
            sections: BTreeMap::new(),
            sealer: Arc::new(Sealer::new(&key, vm, proto::seal::salt())),
            vm,
            key,
            written_bytes: 0,
        }))
    }

    /// A region as these layers make it.
    async fn compose(
        &self,
        work: &Work,
        region: &Versions,
        layers: &[LayerAt],
        at: At,
        held: &mut Layers,
    ) -> Result<Region, Failure> {
        let opened = &work.checkpoints[at.checkpoint];
        let mut made = Region::zero(region.space, region.first_page, region.pages);
        for layer in layers {
            let message = match held.held.get(layer) {
                Some(message) => message.clone(),
                None => {
                    let read = Arc::new(self.reader.layer(opened, &layer.pack, layer.offset, layer.bytes).await?);
                    held.keep(*layer, read.clone());
                    read
                }
            };
            made = laid(opened, &layer.pack, layer.offset, message, made).await?;
        }
        made_of(opened, &opened.manifest.regions[at.region], &made)?;
        Ok(made)
    }

    /// Counts what some checkpoint needs.
    async fn count(&self, work: &Work) -> Result<Live, Failure> {
        let mut live = Live::default();
        let mut counted: BTreeSet<(PackAt, u64)> = BTreeSet::new();
        let mut bytes = |pack: PackAt, offset: u64, length: u32| {
            if counted.insert((pack, offset)) {
                *live.bytes.entry(pack).or_insert(0) += u64::from(length);
            }
        };
        for opened in &work.checkpoints {
            for section in &opened.manifest.sections {
                bytes(manifest::pack(&opened.manifest, section.pack), section.offset, section.bytes);
            }
        }
        for layer in work.regions.iter().flat_map(|region| region.versions.keys().flatten()) {
            bytes(layer.pack, layer.offset, layer.bytes);
        }
        drop(counted);
        for region in &work.regions {
            let mut held = Layers::default();
            let mut needed: HashMap<Place, [u64; 4]> = HashMap::new();
            for (layers, there) in &region.versions {
                let made = self.compose(work, region, layers, there[0], &mut held).await?;
                for (page, _, place) in made.placed() {
                    let bit = (region.first_page + page as u64 - place.first_page) as usize;
                    needed.entry(place).or_default()[bit / 64 % 4] |= 1 << (bit % 64);
                }
            }
            for (place, mask) in needed {
                let count: u32 = mask.iter().map(|word| word.count_ones()).sum();
                *live.pages.entry(place.pack).or_insert(0) += u64::from(count);
            }
        }
        Ok(live)
    }

    /// The packs that are worth rewriting, the deadest first, up to a limit.
    async fn victims(&self, work: &Work, live: &Live) -> Result<BTreeSet<PackAt>, Failure> {
        let percent = u64::from(self.request.live_percent_min.min(100));
        let manifest = &work.checkpoints[0].manifest;
        let named: BTreeSet<PackAt> =
            work.checkpoints.iter().flat_map(|opened| manifest::packs(&opened.manifest)).collect();
        let mut found = Vec::new();
        for pack in named {
            let key = pack_key(manifest, &pack);
            if self.request.damaged.contains(&key) {
                continue;
            }
            let pages = live.pages.get(&pack).copied().unwrap_or(0);
            let (alive, all) = match self.total(&work.checkpoints[0], &key, &pack).await? {
                0 => (live.bytes.get(&pack).copied().unwrap_or(0), pack.bytes),
                total => (pages, total),
            };
            if alive * 100 < all * percent {
                found.push((alive * 1000 / all.max(1), pack.bytes * alive / all.max(1), pack));
            }
        }
        found.sort();
        let mut copied = 0;
        let fits = |(_, bytes, _): &(u64, u64, PackAt)| {
            copied += bytes;
            copied <= COPY_MAX
        };
        Ok(found.into_iter().take_while(fits).map(|(_, _, pack)| pack).collect())
    }

    /// How many pages a pack holds, by its own index; 0 if it holds page maps and sections.
    async fn total(&self, opened: &Opened, key: &str, pack: &PackAt) -> Result<u64, Failure> {
        let known = || self.totals.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(total) = known().get(&pack.id) {
            return Ok(*total);
        }
        let index = self.reader.pack_index(opened, key, pack).await?;
        let total = index.entries.iter().map(|entry| u64::from(entry.pages)).sum();
        known().insert(pack.id, total);
        Ok(total)
    }

    /// New packs of one kind, in the name of the newest checkpoint.
    fn packs(&self, work: &Work) -> Packs {
        let newest = work.checkpoints.iter().max_by_key(|opened| opened.manifest.created_unix_ms);
        let id = newest.map_or("", |opened| opened.manifest.checkpoint.as_str());
        Packs::new(id, self.request.claim.generation, work.sealer.clone())
    }

    async fn push(&self, work: &mut Work, out: &mut Packs, frame: &[u8], entry: PackEntry) -> Result<Pending, Failure> {
        let (place, full) = out.push(frame, entry);
        self.write(work, full).await?;
        Ok(place)
    }

    /// Writes a pack that is complete, if there is one.
    async fn write(&self, work: &mut Work, pack: Option<Pack>) -> Result<(), Failure> {
        if let Some(Pack { id, bytes }) = pack {
            let key = bucket::pack_key(&self.request.claim.vm_id, self.request.claim.generation, id);
            work.written_bytes += bytes.len() as u64;
            self.reader.bucket.put(&key, bytes).await?;
        }
        Ok(())
    }

    /// Copies the live pages of victims.
    async fn copy(&self, work: &mut Work, out: &mut Packs) -> Result<(), Failure> {
        for number in 0..work.regions.len() {
            let region = &work.regions[number];
            let mut held = Layers::default();
            let mut needed: BTreeMap<Place, BTreeMap<u64, [u8; 32]>> = BTreeMap::new();
            for (layers, there) in &region.versions {
                let made = self.compose(work, region, layers, there[0], &mut held).await?;
                for (page, leaf, place) in made.placed().filter(|(_, _, place)| work.victims.contains(&place.pack)) {
                    needed.entry(place).or_default().insert(region.first_page + page as u64, leaf);
                }
            }
            drop(held);
            let space = region.space as u16;
            let extents: Vec<Extent> =
                needed.into_iter().flat_map(|(place, pages)| extents(space, place, pages)).collect();
            for (pack, extents) in by_pack(extents) {
                self.copy_pack(work, &pack, &extents, out).await?;
            }
        }
        Ok(())
    }

    async fn copy_pack(
        &self,
        work: &mut Work,
        pack: &PackAt,
        extents: &[Extent],
        out: &mut Packs,
    ) -> Result<(), Failure> {
        let key = pack_key(&work.checkpoints[0].manifest, pack);
        let pieces = self.reader.pieces(&key, pack, extents).await?;
        for extents in frames(extents) {
            let (opener, key, pieces) = (work.checkpoints[0].opener.clone(), key.clone(), pieces.clone());
            let (sealer, place, extents) = (work.sealer.clone(), extents[0].place, extents.to_vec());
            let sealed = beside(move || {
                let opened = pages(opener.as_ref(), &key, &pieces, &extents)?;
                Ok::<_, Failure>(opened.into_iter().map(|(run, frame)| (run, sealer.seal(&frame))).collect::<Vec<_>>())
            });
            for (run, frame) in sealed.await?? {
                let (first_page, pages) = (run.first_page, run.pages);
                let entry = PackEntry { space: run.space.into(), first_page, pages, ..PackEntry::default() };
                let moved = Moved { first_page, pages, place: self.push(work, out, &frame, entry).await? };
                work.moved.entry(place).or_default().push(moved);
            }
        }
        Ok(())
    }

    /// Rewrites what names a victim or lies in one; what each region of each checkpoint is going to be.
    async fn map(&self, work: &mut Work, new_pages: &Packs, out: &mut Packs) -> Result<Vec<NewVersion>, Failure> {
        let mut new = Vec::new();
        for number in 0..work.regions.len() {
            let (mut held, mut anew) = (Layers::default(), HashMap::new());
            let versions: Vec<(Vec<LayerAt>, Vec<At>)> =
                work.regions[number].versions.iter().map(|(layers, there)| (layers.clone(), there.clone())).collect();
            for (layers, there) in versions {
                let before = self.compose(work, &work.regions[number], &layers, there[0], &mut held).await?;
                let mut after = {
                    let region = &work.regions[number];
                    Region::zero(region.space, region.first_page, region.pages)
                };
                let mut written = Vec::new();
                for layer in layers {
                    let (message, is) =
                        self.layer(work, number, layer, there[0], new_pages, &mut held, &mut anew, out).await?;
                    after = after.laid(&message).map_err(|error| bug(&error.to_string()))?;
                    written.push(is);
                }
                if after.leaves() != before.leaves() || after.uses().keys().any(|pack| work.victims.contains(pack)) {
                    return Err(bug("a region that was rewritten is not what it was"));
                }
                let uses: Vec<(PackAt, u32)> = after.uses().into_iter().collect();
                new.extend(there.into_iter().map(|at| NewVersion { at, layers: written.clone(), uses: uses.clone() }));
            }
        }
        for number in 0..work.checkpoints.len() {
            let sections = work.checkpoints[number].manifest.sections.clone();
            for section in sections {
                let pack = manifest::pack(&work.checkpoints[number].manifest, section.pack);
                let at = (pack, section.offset, section.bytes);
                if work.victims.contains(&pack) && !work.sections.contains_key(&at) {
                    let key = pack_key(&work.checkpoints[number].manifest, &pack);
                    let frame = self.reader.bucket.get_range(&key, section.offset, section.bytes as usize).await?;
                    let entry = PackEntry { section: section.name.clone(), ..PackEntry::default() };
                    let place = self.push(work, out, &frame, entry).await?;
                    work.sections.insert(at, place);
                }
            }
        }
        Ok(new)
    }

    /// One layer as it is going to be: the message, and where it lies.
    #[allow(clippy::too_many_arguments, reason = "one region's work in progress, which nothing else shares")]
    async fn layer(
        &self,
        work: &mut Work,
        number: usize,
        layer: LayerAt,
        at: At,
        new_pages: &Packs,
        held: &mut Layers,
        anew: &mut HashMap<LayerAt, Arc<MapLayer>>,
        out: &mut Packs,
    ) -> Result<(Arc<MapLayer>, NewLayer), Failure> {
        if let (Some(message), Some(is)) = (anew.get(&layer), work.layers.get(&layer)) {
            return Ok((message.clone(), *is));
        }
        let old = match held.held.get(&layer) {
            Some(message) => message.clone(),
            None => {
                let opened = &work.checkpoints[at.checkpoint];
                Arc::new(self.reader.layer(opened, &layer.pack, layer.offset, layer.bytes).await?)
            }
        };
        let names = |pack: &PackRef| PackAt::parse(pack).is_some_and(|pack| work.victims.contains(&pack));
        let (message, is) = if !work.victims.contains(&layer.pack) && !old.packs.iter().any(names) {
            (old, NewLayer::Kept(layer))
        } else {
            let message = Arc::new(transformed(work, &work.regions[number], &old, new_pages)?);
            let pages: u32 = message.runs.iter().map(|run| run.pages).sum();
            let is = if pages == 0 {
                NewLayer::Empty
            } else {
                let sealed = work.sealer.seal(&frame::encode_message(Kind::PageMap, &*message));
                let entry = PackEntry { space: message.space, first_page: message.first_page, ..PackEntry::default() };
                NewLayer::Written(self.push(work, out, &sealed, entry).await?, pages)
            };
            (message, is)
        };
        work.layers.insert(layer, is);
        anew.insert(layer, message.clone());
        Ok((message, is))
    }

    /// Replaces every manifest that needs a victim.
    async fn swap(&self, work: &Work, new: Vec<NewVersion>, maps: &Packs, done: &mut Repacked) -> Result<(), Failure> {
        let mut by_checkpoint: BTreeMap<usize, BTreeMap<usize, NewRegion>> = BTreeMap::new();
        for NewVersion { at, layers, uses } in new {
            let place = |layer: NewLayer| match layer {
                NewLayer::Kept(layer) => Some(layer),
                NewLayer::Written(place, pages) => {
                    let Pending { offset, bytes, .. } = place;
                    Some(LayerAt { pack: maps.of(&place), offset, bytes, pages })
                }
                NewLayer::Empty => None,
            };
            let region = NewRegion { layers: layers.into_iter().filter_map(place).collect(), uses };
            by_checkpoint.entry(at.checkpoint).or_default().insert(at.region, region);
        }
        for (number, opened) in work.checkpoints.iter().enumerate() {
            if !manifest::packs(&opened.manifest).iter().any(|pack| work.victims.contains(pack)) {
                continue;
            }
            let manifest = replaced(work, opened, by_checkpoint.remove(&number).unwrap_or_default(), maps)?;
            manifest::check(&manifest).map_err(|error| bug(&error.to_string()))?;
            let bytes = manifest::encode(&manifest, &work.sealer, self.reader.keys.wrap(work.vm, &work.key))
                .map_err(|error| Failure::new(Code::Exhausted, error.to_string()))?;
            self.reader.bucket.put(&work.keys[number], bytes).await?;
            done.manifests.push(work.keys[number].clone());
        }
        Ok(())
    }
}

//! Pages on demand: what a guest that runs before its RAM has come is given, out of packs.
//!
//! ```text
//! PagesWanted (a run of pages) -> region of the page map (read once) -> frames that hold any of it -> checked -> sent
//! ```
//! A frame is sent with all of its pages that are current, asked for or not: reading them is what costs, and who wants
//! one page wants its neighbours soon. A stream is sent no frame twice. Whatever fails ends the stream; who asks
//! asks again, for ever. The pages that guests of a VM waited for are kept for its next lazy restore, as advice. It knows no
//! VM: who may ask is decided by who opens it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use proto::frame::{self, Kind, PAGE_BYTES};
use proto::ids::VmId;
use proto::seal::Sealer;
use proto::status::Code;
use proto::v1::pages_part::Part;
use proto::v1::{MapRegion, PagesAnswered, PagesPart, PagesWanted, WorkingSet};
use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinSet;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

use super::assembly::spaces;
use super::manifest::{self, pack_key, regions};
use super::map::{Extent, Place, Region};
use super::read::{Opened, Pieces, Reader, beside, missing_pack, pages_beside};
use crate::bucket::{BucketError, working_set_key};
use crate::failure::Failure;

/// Most pages of one request.
const WANTED_MAX: u32 = 4096;
/// Most requests of a stream that are worked on at a time.
const WORK_MAX: usize = 32;
/// Most pages of a working set that is kept.
const WORKING_SET_MAX: usize = 16_384;
/// Parts that wait for the host to take them.
pub const PARTS_DEPTH: usize = 4;

/// What a stream was sent: of which area, which frames.
type Sent = Mutex<HashSet<(u64, Place)>>;

/// Where parts go.
pub type Parts = mpsc::Sender<Result<PagesPart, Status>>;

/// RAM of one checkpoint.
pub struct Supply {
    reader: Reader,
    opened: Opened,
    areas: Vec<Area>,
}

/// Consecutive pages whose map is read in one go.
struct Area {
    first_page: u64,
    pages: u64,
    stated: MapRegion,
    index: OnceCell<Index>,
}

/// Where the pages of an area lie.
struct Index {
    /// In order of page.
    extents: Vec<Extent>,
    by_place: HashMap<Place, Vec<usize>>,
}

impl Index {
    fn new(mut extents: Vec<Extent>) -> Index {
        extents.sort_by_key(|extent| extent.first_page);
        let mut by_place: HashMap<Place, Vec<usize>> = HashMap::new();
        for (number, extent) in extents.iter().enumerate() {
            by_place.entry(extent.place).or_default().push(number);
        }
        Index { extents, by_place }
    }

    /// The frames that hold any of these pages, in order.
    fn places(&self, first: u64, end: u64) -> Vec<Place> {
        let from = self.extents.partition_point(|extent| end_of(extent) <= first);
        let within = self.extents[from..].iter().take_while(|extent| extent.first_page < end);
        let mut seen = HashSet::new();
        within.map(|extent| extent.place).filter(|place| seen.insert(*place)).collect()
    }

    /// The pages around these that are all zero, if these are; within `area`.
    fn zeros(&self, first: u64, end: u64, area: (u64, u64)) -> Option<(u64, u64)> {
        let next = self.extents.partition_point(|extent| end_of(extent) <= first);
        let after = self.extents.get(next).map_or(area.1, |extent| extent.first_page);
        let before = next.checked_sub(1).map_or(area.0, |at| end_of(&self.extents[at]));
        (after >= end).then(|| (before.max(area.0), after))
    }

    fn extents_of(&self, place: &Place) -> Vec<Extent> {
        let numbers = self.by_place.get(place).map_or(&[][..], Vec::as_slice);
        numbers.iter().map(|number| self.extents[*number].clone()).collect()
    }
}

fn end_of(extent: &Extent) -> u64 {
    extent.first_page + u64::from(extent.pages)
}

impl Supply {
    /// Reads the manifest.
    ///
    /// # Errors
    /// As [`Reader::manifest`].
    pub async fn open(reader: Reader, manifest_key: &str) -> Result<Supply, Failure> {
        let opened = reader.manifest(manifest_key).await?;
        let ram = opened.manifest.config.as_ref().map_or(0, |config| config.memory_bytes) / PAGE_BYTES as u64;
        let whole = |first_page, pages, stated: &MapRegion| Area {
            first_page,
            pages,
            stated: stated.clone(),
            index: OnceCell::new(),
        };
        let areas = if opened.manifest.major == 1 {
            vec![whole(0, ram, &MapRegion::default())]
        } else {
            let spaces = opened.manifest.config.as_ref().map(spaces).unwrap_or_default();
            let regions = regions(&spaces).zip(&opened.manifest.regions).filter(|((space, ..), _)| *space == 0);
            regions.map(|((_, first, pages), stated)| whole(first, pages, stated)).collect()
        };
        Ok(Supply { reader, opened, areas })
    }

    async fn index<'a>(&self, area: &'a Area) -> Result<&'a Index, Failure> {
        let read = async || {
            if self.opened.manifest.major == 1 {
                let extents = manifest::extents(&self.opened.manifest);
                return Ok(Index::new(extents.into_iter().filter(|extent| extent.space == 0).collect()));
            }
            if area.stated.layers.is_empty() {
                return Ok(Index::new(Vec::new()));
            }
            let zero = Region::zero(0, area.first_page, area.pages);
            let region = self.reader.region(&self.opened, &area.stated, zero).await?;
            beside(move || Index::new(region.extents())).await
        };
        area.index.get_or_try_init(read).await
    }

    /// Serves a stream to its end.
    ///
    /// # Errors
    /// The bucket's, [`Code::Corrupt`] naming what is damaged, or [`Code::Protocol`].
    pub async fn serve<S>(self: &Arc<Self>, mut wanted: S, out: Parts) -> Result<(), Failure>
    where
        S: Stream<Item = Result<PagesWanted, Status>> + Unpin,
    {
        let sent: Arc<Sent> = Arc::default();
        let mut work = JoinSet::new();
        let mut over = false;
        loop {
            tokio::select! {
                next = wanted.next(), if !over && work.len() < WORK_MAX => match next {
                    Some(Ok(wanted)) => {
                        let (supply, sent, out) = (self.clone(), sent.clone(), out.clone());
                        work.spawn(async move { supply.answer(wanted, &sent, &out).await });
                    }
                    // The host has gone, or will ask by another stream.
                    Some(Err(_)) => return Ok(()),
                    None => over = true,
                },
                Some(done) = work.join_next() => {
                    done.unwrap_or_else(|_| Err(Failure::new(Code::Internal, "the worker ended")))?;
                }
                else => return Ok(()),
            }
        }
    }

    /// The pages that a guest of this VM touched soon after an earlier lazy restore, in order. No more than advice: what
    /// cannot be read is none.
    pub async fn working_set(&self) -> WorkingSet {
        let key = working_set_key(&self.opened.manifest.vm_id);
        let read = async {
            let sealed = match self.reader.bucket.get(&key).await {
                Err(BucketError::Missing(_)) => return Ok(WorkingSet::default()),
                other => other.map_err(|error| error.to_string())?,
            };
            let opener = self.opened.opener.as_ref().ok_or("the checkpoint is not sealed")?;
            let plain = opener.open(&sealed).map_err(|error| error.to_string())?;
            frame::decode_message::<WorkingSet>(Kind::Control, &plain).map_err(|error| error.to_string())
        };
        let read: Result<WorkingSet, String> = read.await;
        read.unwrap_or_else(|why| {
            tracing::warn!(key, why, "a working set cannot be read");
            WorkingSet::default()
        })
    }

    async fn keep_working_set(&self, touched: WorkingSet) {
        let key = working_set_key(&self.opened.manifest.vm_id);
        let kept = async {
            let vm = self.opened.manifest.vm_id.parse::<VmId>().map_err(|error| error.to_string())?;
            let Reader { bucket, keys } = &self.reader;
            let data_key = keys.data_key(bucket, vm).await.map_err(|failure| failure.to_string())?;
            let sealer = Sealer::new(&data_key, vm, proto::seal::salt());
            let sealed = sealer.seal(&frame::encode_message(Kind::Control, &touched));
            bucket.put(&key, sealed.into()).await.map_err(|error| error.to_string())
        };
        let kept: Result<(), String> = kept.await;
        if let Err(why) = kept {
            tracing::warn!(key, why, "a working set cannot be kept");
        }
    }

    async fn answer(&self, mut wanted: PagesWanted, sent: &Sent, out: &Parts) -> Result<(), Failure> {
        if let Some(mut touched) = wanted.touched.take() {
            touched.pages.truncate(WORKING_SET_MAX);
            self.keep_working_set(touched).await;
            let answer = PagesAnswered { id: wanted.id, ..PagesAnswered::default() };
            let _gone = out.send(Ok(PagesPart { part: Some(Part::Answered(answer)) })).await;
            return Ok(());
        }
        let first = wanted.first_page;
        let end = first.checked_add(wanted.pages.into()).filter(|_| (1..=WANTED_MAX).contains(&wanted.pages));
        let pages: u64 = self.areas.iter().map(|area| area.pages).sum();
        let Some(end) = end.filter(|end| *end <= pages) else {
            let text = format!("pages {first} and {} more are asked for, of {pages}", wanted.pages);
            return Err(Failure::new(Code::Protocol, text));
        };
        let mut zeros = None;
        for area in &self.areas {
            let bounds = (area.first_page, area.first_page + area.pages);
            if bounds.1 <= first || bounds.0 >= end {
                continue;
            }
            let index = self.index(area).await?;
            if first >= bounds.0 && end <= bounds.1 {
                zeros = index.zeros(first, end, bounds);
            }
            for place in index.places(first, end) {
                // A frame may reach into two areas, each of which knows its own pages alone.
                let part = (area.first_page, place);
                if sent.lock().unwrap_or_else(PoisonError::into_inner).contains(&part) {
                    continue;
                }
                self.send(index.extents_of(&place), out).await?;
                // Noted after it is on its way, so that no answer overtakes it.
                sent.lock().unwrap_or_else(PoisonError::into_inner).insert(part);
            }
        }
        let (zero_first_page, zero_end) = zeros.unwrap_or_default();
        let answer = PagesAnswered { id: wanted.id, zero_first_page, zero_pages: zero_end - zero_first_page };
        let _gone = out.send(Ok(PagesPart { part: Some(Part::Answered(answer)) })).await;
        Ok(())
    }

    /// Reads one frame, checks its pages, and sends them.
    async fn send(&self, extents: Vec<Extent>, out: &Parts) -> Result<(), Failure> {
        let Some(place) = extents.first().map(|extent| extent.place) else { return Ok(()) };
        let key = pack_key(&self.opened.manifest, &place.pack);
        let read = self.reader.bucket.get_range(&key, place.offset, place.bytes as usize).await;
        let stored = read.map_err(|error| missing_pack(&key, error))?;
        let (opener, pieces) = (self.opened.opener.clone(), Pieces::from([(place.offset, stored)]));
        for (_, frame) in pages_beside(opener, key, pieces, extents).await? {
            let _gone = out.send(Ok(PagesPart { part: Some(Part::Frame(frame)) })).await;
        }
        Ok(())
    }
}

/// The supplies that are in use, by key of their manifest; clones are the same.
#[derive(Clone, Default)]
pub struct Supplies(Arc<tokio::sync::Mutex<HashMap<String, Weak<Supply>>>>);

impl Supplies {
    /// The supply of a checkpoint: the streams of a VM share one.
    ///
    /// # Errors
    /// As [`Supply::open`].
    pub async fn of(&self, reader: &Reader, manifest_key: &str) -> Result<Arc<Supply>, Failure> {
        let mut open = self.0.lock().await;
        if let Some(supply) = open.get(manifest_key).and_then(Weak::upgrade) {
            return Ok(supply);
        }
        let supply = Arc::new(Supply::open(reader.clone(), manifest_key).await?);
        open.retain(|_, there| there.strong_count() > 0);
        open.insert(manifest_key.to_owned(), Arc::downgrade(&supply));
        Ok(supply)
    }
}

//! A checkpoint that is being received, without its I/O: frames in, effects out.
//!
//! ```text
//! every lane:  Hello  (Pages* RoundEnd)*  (Pages* RoundEnd{last})
//! lane 0:                                        then  Section*  StateEnd
//! effects:     Put(pack) when one is full;  Ack(round) when every lane has ended it;  Complete at the end
//! ```
//! The latest copy of a page wins: of a later round over an earlier one whichever lane was faster, and of a later frame
//! of the same lane. Frames arrive opened and checked ([`Desk::check`] can run on any thread) and are stored as they
//! came, sealed. What arrived is laid over the checkpoint before it by [`super::layers`]. Whatever a source sends, this
//! refuses or accepts; it never panics and allocates only what the configuration says.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use proto::frame::{self, Encoding, FrameError, Header, Kind, PAGE_BYTES, PageRun};
use proto::ids::{Digest, Generation};
use proto::leaf::{Leaf, ZERO_LEAF};
use proto::seal::{Opener, SealError, Sealer};
use proto::v1::lane_message::Message as Said;
use proto::v1::{LaneMessage, MachineConfig, MachineDigest, PackEntry, RoundEnd, Section, StateEnd};

use super::map::{PackAt, Place, REGION_PAGES};
use super::pack::Pack;
use super::packs::{Packs, Pending};

/// Most sections of a machine.
const SECTIONS_MAX: usize = 4096;
/// Most bytes of all sections together.
const SECTION_BYTES_MAX: usize = 256 << 20;
/// Most lanes of a transfer.
pub const LANES_MAX: usize = 16;

/// Why a checkpoint cannot be taken in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IngestError {
    /// Bytes that are no frame, or not what was sent.
    #[error("lane {lane}: {source}")]
    Frame {
        /// Where it came.
        lane: usize,
        /// What is wrong with it.
        source: SealError,
    },
    /// A message that must not come now.
    #[error("lane {lane}: {text}")]
    Protocol {
        /// Where it came.
        lane: usize,
        /// What is wrong with it.
        text: String,
    },
    /// What arrived is not what was sent.
    #[error("the {part} that arrived has digest {computed}, the source says {expected}")]
    Digest {
        /// `RAM`, `state` or `disks`.
        part: &'static str,
        /// The source's.
        expected: Digest,
        /// From what arrived.
        computed: Digest,
    },
    /// More than this release stores.
    #[error("{0}")]
    TooLarge(&'static str),
}

/// A frame whose hash was checked.
#[derive(Debug)]
pub enum Checked {
    /// Pages, the leaf of each that is not elided, and the sealed frame to store.
    Pages(PageRun, Vec<Leaf>, Bytes),
    /// A piece of state, and the sealed frame to store.
    Section(Section, Bytes),
    /// A word about the transfer.
    Message(Said),
}

/// Opens what a source has sealed, and seals what it has not.
#[derive(Clone)]
pub struct Desk {
    /// For what arrives.
    pub opener: Opener,
    /// For what is written here.
    pub sealer: Arc<Sealer>,
}

impl Desk {
    /// Checks a frame's bytes and hashes its pages: those that come out of the very bytes that will be stored. Slow: run
    /// it beside the runtime.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn check(&self, bytes: &Bytes) -> Result<Checked, SealError> {
        let header = Header::parse(bytes)?;
        match header.kind {
            Kind::Sealed => self.opener.show(bytes, |plain| inside(plain, bytes.clone()))?,
            Kind::Pages | Kind::Section => inside(bytes, self.sealer.seal(bytes).into()),
            Kind::Control => {
                let message: LaneMessage = frame::decode_message(Kind::Control, bytes)?;
                let empty = || FrameError::Body { kind: Kind::Control, text: "empty message".into() };
                Ok(Checked::Message(message.message.ok_or_else(empty)?))
            }
            found => Err(FrameError::Unexpected { found, expected: Kind::Sealed }.into()),
        }
    }
}

fn inside(plain: &[u8], stored: Bytes) -> Result<Checked, SealError> {
    match Header::parse(plain)?.kind {
        Kind::Pages => {
            let pages = frame::decode_pages(plain)?;
            Ok(Checked::Pages(pages.run, pages.leaves, stored))
        }
        Kind::Section => Ok(Checked::Section(frame::decode_message(Kind::Section, plain)?, stored)),
        found => Err(FrameError::Unexpected { found, expected: Kind::Pages }.into()),
    }
}

/// What is to be done outside.
#[derive(Debug)]
pub enum Effect {
    /// Write this pack.
    Put(Pack),
    /// Tell the source on lane 0.
    Ack(u32),
    /// Everything arrived: [`Assembly::finish`].
    Complete,
}

/// Nothing was said of the page.
const UNSAID: u32 = u32::MAX;
/// The page is zero.
const ZERO: u32 = u32::MAX - 1;

/// What was said of the pages of a region.
#[derive(Clone, Debug)]
pub struct Touched {
    leaves: Vec<Leaf>,
    /// Index of the frame that has the latest copy, [`ZERO`] or [`UNSAID`].
    at: Vec<u32>,
    /// Round of that copy.
    rounds: Vec<u32>,
}

impl Touched {
    fn new(pages: u64) -> Touched {
        let pages = pages.min(REGION_PAGES) as usize;
        Touched { leaves: vec![ZERO_LEAF; pages], at: vec![UNSAID; pages], rounds: vec![0; pages] }
    }

    /// Pages of which something was said, counted from the region's first: digest, and index of the frame that arrived;
    /// none for zeros.
    pub fn said(&self) -> impl Iterator<Item = (usize, Leaf, Option<u32>)> {
        let said = self.at.iter().enumerate().filter(|(_, at)| **at != UNSAID);
        said.map(|(page, at)| (page, self.leaves[page], (*at != ZERO).then_some(*at)))
    }
}

struct Space {
    pages: u64,
    regions: Vec<Option<Box<Touched>>>,
}

/// A frame of pages that arrived.
struct Arrived {
    place: Pending,
    first_page: u64,
}

#[derive(Clone, Default)]
struct Lane {
    /// Rounds that this lane has ended.
    ended: usize,
    /// Frames of pages in the round that is open.
    frames: u64,
    last: bool,
}

/// A checkpoint that is being received.
pub struct Assembly {
    /// Nothing lies below: a page of which nothing is said is zero.
    full: bool,
    spaces: Vec<Space>,
    arrived: Vec<Arrived>,
    lanes: Vec<Lane>,
    /// (number, last) of each round that some lane has ended.
    rounds: Vec<(u32, bool)>,
    acked: usize,
    packs: Packs,
    sections: BTreeMap<String, (Section, Bytes)>,
    section_bytes: usize,
    state_end: Option<StateEnd>,
}

/// Everything that arrived.
pub struct Received {
    /// By space and region.
    pub touched: Vec<Vec<Option<Box<Touched>>>>,
    /// Where the frames lie.
    pub places: Vec<Place>,
    /// The packs of pages, in order.
    pub packs: Vec<PackAt>,
    /// By name, with the frame to store.
    pub sections: BTreeMap<String, (Section, Bytes)>,
    /// The source's digest.
    pub digest: MachineDigest,
    /// How long the guest stood still, in microseconds.
    pub stopped_us: u64,
}

/// Pages of each space of a machine: RAM first, then local disks in order, then what it boots from.
pub fn spaces(config: &MachineConfig) -> Vec<u64> {
    let page = PAGE_BYTES as u64;
    let disks = config.disks.iter().filter(|disk| !disk.shared).map(|disk| disk.size_bytes.div_ceil(page));
    let boot = config.boot.as_ref().map_or(0, |boot| boot.image_bytes).div_ceil(page);
    std::iter::once(config.memory_bytes.div_ceil(page)).chain(disks).chain((boot > 0).then_some(boot)).collect()
}

impl Assembly {
    /// Nothing arrived yet. `lanes` is between 1 and [`LANES_MAX`]; `full` if the source builds on no checkpoint.
    pub fn new(
        checkpoint: &str,
        generation: Generation,
        config: &MachineConfig,
        lanes: usize,
        full: bool,
        sealer: Arc<Sealer>,
    ) -> Assembly {
        let space = |pages: u64| Space { pages, regions: vec![None; pages.div_ceil(REGION_PAGES) as usize] };
        Assembly {
            full,
            spaces: spaces(config).into_iter().map(space).collect(),
            arrived: Vec::new(),
            lanes: vec![Lane::default(); lanes],
            rounds: Vec::new(),
            acked: 0,
            packs: Packs::new(checkpoint, generation, sealer),
            sections: BTreeMap::new(),
            section_bytes: 0,
            state_end: None,
        }
    }

    /// Takes the next frame of a lane.
    ///
    /// # Errors
    /// [`IngestError`]; the checkpoint is lost then.
    pub fn take(&mut self, lane: usize, frame: Checked) -> Result<Vec<Effect>, IngestError> {
        let mut effects = Vec::new();
        match frame {
            Checked::Pages(run, leaves, bytes) => self.pages(lane, run, &leaves, &bytes, &mut effects)?,
            Checked::Section(section, bytes) => self.section(lane, section, bytes)?,
            Checked::Message(Said::RoundEnd(end)) => self.round_end(lane, end, &mut effects)?,
            Checked::Message(Said::StateEnd(end)) => self.state_end(lane, end)?,
            Checked::Message(Said::Abort(abort)) => {
                return Err(protocol(lane, format!("the source gave up: {}", abort.reason)));
            }
            Checked::Message(other) => return Err(protocol(lane, format!("unexpected message {}", name(&other)))),
        }
        if self.state_end.is_some() && self.lanes.iter().all(|lane| lane.last) {
            effects.push(Effect::Complete);
        }
        Ok(effects)
    }

    /// Whether the source builds on no checkpoint.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// Whether a lane may end now without being missed.
    pub fn may_end(&self, lane: usize) -> bool {
        self.lanes[lane].last && (lane != 0 || self.state_end.is_some())
    }

    fn pages(
        &mut self,
        lane: usize,
        run: PageRun,
        leaves: &[Leaf],
        bytes: &[u8],
        effects: &mut Vec<Effect>,
    ) -> Result<(), IngestError> {
        if self.lanes[lane].last {
            return Err(protocol(lane, "pages after the last round"));
        }
        let end = run.first_page + u64::from(run.pages);
        match self.spaces.get(usize::from(run.space)) {
            Some(space) if end <= space.pages => {}
            _ => return Err(protocol(lane, format!("{run:?} lies outside of the machine"))),
        }
        self.lanes[lane].frames += 1;
        let at = match run.encoding {
            Encoding::Zero => ZERO,
            Encoding::Raw => self.store(&run, bytes, effects)?,
        };
        let (round, full) = (self.lanes[lane].ended as u32, self.full);
        let space = &mut self.spaces[usize::from(run.space)];
        for (skip, page) in (run.first_page..end).enumerate() {
            let leaf = leaves.get(skip).copied().unwrap_or(ZERO_LEAF);
            let (number, inside) = ((page / REGION_PAGES) as usize, (page % REGION_PAGES) as usize);
            let region = &mut space.regions[number];
            // Not so in later rounds: a lane that is behind may still bring what was there before.
            if region.is_none() && full && round == 0 && leaf == ZERO_LEAF {
                continue;
            }
            let touched =
                region.get_or_insert_with(|| Box::new(Touched::new(space.pages - number as u64 * REGION_PAGES)));
            if touched.rounds[inside] > round {
                continue;
            }
            touched.rounds[inside] = round;
            touched.leaves[inside] = leaf;
            // A page of zeros that was sent in full is stored with its frame but need not be read back.
            touched.at[inside] = if leaf == ZERO_LEAF { ZERO } else { at };
        }
        Ok(())
    }

    fn store(&mut self, run: &PageRun, bytes: &[u8], effects: &mut Vec<Effect>) -> Result<u32, IngestError> {
        let entry =
            PackEntry { space: run.space.into(), first_page: run.first_page, pages: run.pages, ..PackEntry::default() };
        let (place, full) = self.packs.push(bytes, entry);
        effects.extend(full.map(Effect::Put));
        self.arrived.push(Arrived { place, first_page: run.first_page });
        let index = self.arrived.len() as u32 - 1;
        if index < ZERO { Ok(index) } else { Err(IngestError::TooLarge("more frames than a page map can name")) }
    }

    fn section(&mut self, lane: usize, section: Section, bytes: Bytes) -> Result<(), IngestError> {
        if lane != 0 || !self.lanes[0].last || self.state_end.is_some() {
            return Err(protocol(lane, format!("section {:?} out of place", section.name)));
        }
        if self.sections.contains_key(&section.name) {
            return Err(protocol(lane, format!("section {:?} comes twice", section.name)));
        }
        self.section_bytes += section.body.len() + bytes.len();
        if self.sections.len() == SECTIONS_MAX || self.section_bytes > SECTION_BYTES_MAX {
            return Err(IngestError::TooLarge("more sections than a machine may have"));
        }
        self.sections.insert(section.name.clone(), (section, bytes));
        Ok(())
    }

    fn round_end(&mut self, lane: usize, end: RoundEnd, effects: &mut Vec<Effect>) -> Result<(), IngestError> {
        let Lane { ended, frames, last } = self.lanes[lane];
        if last {
            return Err(protocol(lane, "a round after the last round"));
        }
        if frames != end.frames {
            return Err(protocol(
                lane,
                format!("{frames} frames arrived in round {}, {} were sent", end.round, end.frames),
            ));
        }
        match self.rounds.get(ended) {
            Some(round) if *round != (end.round, end.last) => {
                return Err(protocol(lane, format!("round {} ends where another lane ended {}", end.round, round.0)));
            }
            Some(_) => {}
            None if self.rounds.last().is_some_and(|before| before.0 >= end.round) => {
                return Err(protocol(lane, format!("round {} is not after the one before", end.round)));
            }
            None => self.rounds.push((end.round, end.last)),
        }
        self.lanes[lane] = Lane { ended: ended + 1, frames: 0, last: end.last };
        let reached = self.lanes.iter().map(|lane| lane.ended).min().unwrap_or(0);
        effects.extend(self.rounds[self.acked..reached].iter().map(|(round, _)| Effect::Ack(*round)));
        self.acked = reached;
        Ok(())
    }

    fn state_end(&mut self, lane: usize, end: StateEnd) -> Result<(), IngestError> {
        if lane != 0 || !self.lanes[0].last || self.state_end.is_some() {
            return Err(protocol(lane, "the end of the state out of place"));
        }
        if end.sections as usize != self.sections.len() {
            let (found, expected) = (self.sections.len(), end.sections);
            return Err(protocol(lane, format!("{found} sections arrived, {expected} were sent")));
        }
        self.state_end = Some(end);
        Ok(())
    }

    /// All that arrived, and the last pack of pages. Call it after [`Effect::Complete`].
    ///
    /// # Errors
    /// [`IngestError::Protocol`] if it is not complete.
    pub fn finish(mut self) -> Result<(Received, Option<Pack>), IngestError> {
        let end = self.state_end.take().ok_or_else(|| protocol(0, "the state did not arrive"))?;
        let rest = self.packs.close();
        let packs = self.packs.into_named();
        let place = |arrived: &Arrived| Place {
            pack: packs[arrived.place.pack as usize],
            offset: arrived.place.offset,
            bytes: arrived.place.bytes,
            first_page: arrived.first_page,
        };
        let received = Received {
            places: self.arrived.iter().map(place).collect(),
            touched: self.spaces.into_iter().map(|space| space.regions).collect(),
            packs,
            sections: self.sections,
            stopped_us: end.stopped_us,
            digest: end.digest.unwrap_or_default(),
        };
        Ok((received, rest))
    }
}

/// Whether two digests agree, and if not, in what.
///
/// # Errors
/// [`IngestError::Digest`].
pub fn compare(expected: &MachineDigest, computed: &MachineDigest) -> Result<(), IngestError> {
    let parts = [
        ("RAM", &expected.ram, &computed.ram),
        ("state", &expected.state, &computed.state),
        ("disks", &expected.disks, &computed.disks),
        ("machine", &expected.machine, &computed.machine),
    ];
    for (part, expected, computed) in parts {
        if expected != computed {
            let digest = |bytes: &Vec<u8>| Digest::from_slice(bytes).unwrap_or_default();
            return Err(IngestError::Digest { part, expected: digest(expected), computed: digest(computed) });
        }
    }
    Ok(())
}

fn protocol(lane: usize, text: impl Into<String>) -> IngestError {
    IngestError::Protocol { lane, text: text.into() }
}

fn name(message: &Said) -> &'static str {
    match message {
        Said::Hello(_) => "Hello",
        Said::HelloReply(_) => "HelloReply",
        Said::RoundEnd(_) => "RoundEnd",
        Said::RoundAck(_) => "RoundAck",
        Said::StateEnd(_) => "StateEnd",
        Said::Ready(_) => "Ready",
        Said::Abort(_) => "Abort",
        Said::BaseLeaves(_) => "BaseLeaves",
    }
}

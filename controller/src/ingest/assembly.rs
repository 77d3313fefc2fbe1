//! A checkpoint that is being received, without its I/O: frames in, effects out.
//!
//! ```text
//! every lane:  Hello  (Pages* RoundEnd)*  (Pages* RoundEnd{last})
//! lane 0:                                        then  Section*  StateEnd
//! effects:     Put(pack) when one is full;  Ack(round) when every lane has ended it;  Complete at the end
//! ```
//! The latest copy of a page wins: of a later round over an earlier one whichever lane was faster, and of a later frame
//! of the same lane. Frames arrive checked ([`check`] can run on any thread). Whatever a source sends, this refuses or
//! accepts; it never panics and allocates only what the configuration says.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;
use proto::frame::{self, Encoding, FrameError, Kind, PAGE_BYTES, PageRun};
use proto::ids::Digest;
use proto::v1::lane_message::Message as Said;
use proto::v1::{
    LaneMessage, MachineConfig, MachineDigest, PackEntry, PackRef, PageExtent, PageMap, RoundEnd, Section, SectionRef,
    StateEnd,
};

use super::digest::{PageDigests, ZERO_LEAF, machine_digest, state_digest};
use super::pack::{Pack, PackWriter};

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
        source: FrameError,
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
    /// Pages, and the leaf of each that is not elided.
    Pages(PageRun, Vec<[u8; 32]>, Bytes),
    /// A piece of state.
    Section(Section, Bytes),
    /// A word about the transfer.
    Message(Said),
}

/// Checks a frame's bytes and hashes its pages. Slow: run it beside the runtime.
///
/// # Errors
/// Any [`FrameError`].
pub fn check(bytes: &Bytes) -> Result<Checked, FrameError> {
    let (header, body) = frame::decode(bytes)?;
    let decode_failed = |error: prost::DecodeError| FrameError::Body { kind: header.kind, text: error.to_string() };
    match header.kind {
        Kind::Pages => {
            let (run, payload) = PageRun::parse(body)?;
            let leaves = payload.chunks(PAGE_BYTES).map(|page| *blake3::hash(page).as_bytes()).collect();
            Ok(Checked::Pages(run, leaves, bytes.clone()))
        }
        Kind::Section => Ok(Checked::Section(Section::decode(body).map_err(decode_failed)?, bytes.clone())),
        Kind::Control => {
            let message = LaneMessage::decode(body).map_err(decode_failed)?.message;
            message.map(Checked::Message).ok_or(FrameError::Body { kind: header.kind, text: "empty message".into() })
        }
        found => Err(FrameError::Unexpected { found, expected: Kind::Pages }),
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

struct Space {
    /// Index of the frame that has the page's latest copy, plus one; 0 is a zero page.
    latest: Vec<u32>,
    /// Round of that copy.
    rounds: Vec<u32>,
    digests: PageDigests,
}

struct Place {
    pack: u32,
    offset: u64,
    first_page: u64,
    frame_bytes: u32,
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
    checkpoint: String,
    spaces: Vec<Space>,
    places: Vec<Place>,
    lanes: Vec<Lane>,
    /// (number, last) of each round that some lane has ended.
    rounds: Vec<(u32, bool)>,
    acked: usize,
    writer: PackWriter,
    packs: Vec<PackRef>,
    sections: BTreeMap<String, (Section, SectionRef)>,
    section_bytes: usize,
    state_end: Option<StateEnd>,
}

/// Everything that a manifest says of what arrived.
#[derive(Debug)]
pub struct Finished {
    /// Where the sections lie.
    pub sections: Vec<SectionRef>,
    /// Where the pages lie.
    pub maps: Vec<PageMap>,
    /// The packs, in order.
    pub packs: Vec<PackRef>,
    /// Both sides' digest.
    pub digest: MachineDigest,
}

/// Pages of each space of a machine: RAM first, then local disks in order, then what it boots from.
pub fn spaces(config: &MachineConfig) -> Vec<u64> {
    let page = PAGE_BYTES as u64;
    let disks = config.disks.iter().filter(|disk| !disk.shared).map(|disk| disk.size_bytes.div_ceil(page));
    let boot = config.boot.as_ref().map_or(0, |boot| boot.image_bytes).div_ceil(page);
    std::iter::once(config.memory_bytes.div_ceil(page)).chain(disks).chain((boot > 0).then_some(boot)).collect()
}

impl Assembly {
    /// Nothing arrived yet. `lanes` is between 1 and [`LANES_MAX`].
    pub fn new(checkpoint: &str, config: &MachineConfig, lanes: usize) -> Assembly {
        let space = |pages: u64| Space {
            latest: vec![0; pages as usize],
            rounds: vec![0; pages as usize],
            digests: PageDigests::new(pages),
        };
        Assembly {
            checkpoint: checkpoint.into(),
            spaces: spaces(config).into_iter().map(space).collect(),
            places: Vec::new(),
            lanes: vec![Lane::default(); lanes],
            rounds: Vec::new(),
            acked: 0,
            writer: PackWriter::new(checkpoint),
            packs: Vec::new(),
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
            Checked::Section(section, bytes) => self.section(lane, section, &bytes, &mut effects)?,
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

    /// Whether a lane may end now without being missed.
    pub fn may_end(&self, lane: usize) -> bool {
        self.lanes[lane].last && (lane != 0 || self.state_end.is_some())
    }

    fn pages(
        &mut self,
        lane: usize,
        run: PageRun,
        leaves: &[[u8; 32]],
        bytes: &[u8],
        effects: &mut Vec<Effect>,
    ) -> Result<(), IngestError> {
        if self.lanes[lane].last {
            return Err(protocol(lane, "pages after the last round"));
        }
        let end = run.first_page + u64::from(run.pages);
        match self.spaces.get(usize::from(run.space)) {
            Some(space) if end <= space.latest.len() as u64 => {}
            _ => return Err(protocol(lane, format!("{run:?} lies outside of the machine"))),
        }
        self.lanes[lane].frames += 1;
        let place = match run.encoding {
            Encoding::Zero => 0,
            Encoding::Raw => self.store(&run, bytes, effects)?,
        };
        let round = self.lanes[lane].ended as u32;
        let space = &mut self.spaces[usize::from(run.space)];
        for (skip, page) in (run.first_page..end).enumerate() {
            if space.rounds[page as usize] > round {
                continue;
            }
            let leaf = leaves.get(skip).copied().unwrap_or(ZERO_LEAF);
            space.rounds[page as usize] = round;
            // A page of zeros that was sent in full is stored with its frame but need not be read back.
            space.latest[page as usize] = if leaf == ZERO_LEAF { 0 } else { place };
            space.digests.set(page, leaf);
        }
        Ok(())
    }

    fn store(&mut self, run: &PageRun, bytes: &[u8], effects: &mut Vec<Effect>) -> Result<u32, IngestError> {
        let entry =
            PackEntry { space: run.space.into(), first_page: run.first_page, pages: run.pages, ..PackEntry::default() };
        let (pack, offset) = self.push(bytes, entry, effects);
        self.places.push(Place { pack, offset, first_page: run.first_page, frame_bytes: bytes.len() as u32 });
        u32::try_from(self.places.len()).map_err(|_| IngestError::TooLarge("more frames than a page map can name"))
    }

    fn push(&mut self, bytes: &[u8], entry: PackEntry, effects: &mut Vec<Effect>) -> (u32, u64) {
        if !self.writer.fits(bytes.len(), &entry.section) {
            effects.push(Effect::Put(self.seal()));
        }
        (self.packs.len() as u32, self.writer.push(bytes, entry))
    }

    fn seal(&mut self) -> Pack {
        let pack = std::mem::replace(&mut self.writer, PackWriter::new(&self.checkpoint)).seal();
        self.packs.push(PackRef { id: pack.id.to_vec(), bytes: pack.bytes.len() as u64 });
        pack
    }

    fn section(
        &mut self,
        lane: usize,
        section: Section,
        bytes: &[u8],
        effects: &mut Vec<Effect>,
    ) -> Result<(), IngestError> {
        if lane != 0 || !self.lanes[0].last || self.state_end.is_some() {
            return Err(protocol(lane, format!("section {:?} out of place", section.name)));
        }
        if self.sections.contains_key(&section.name) {
            return Err(protocol(lane, format!("section {:?} comes twice", section.name)));
        }
        self.section_bytes += bytes.len();
        if self.sections.len() == SECTIONS_MAX || self.section_bytes > SECTION_BYTES_MAX {
            return Err(IngestError::TooLarge("more sections than a machine may have"));
        }
        let entry = PackEntry { section: section.name.clone(), ..PackEntry::default() };
        let (pack, offset) = self.push(bytes, entry, effects);
        let place = SectionRef { name: section.name.clone(), pack, offset, bytes: bytes.len() as u32 };
        self.sections.insert(section.name.clone(), (section, place));
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

    /// Computes the digests and compares them with the source's, seals the last pack and writes the page maps. Slow.
    /// Call it after [`Effect::Complete`].
    ///
    /// # Errors
    /// [`IngestError::Digest`], [`IngestError::Protocol`] if it is not complete.
    pub fn finish(mut self) -> Result<(Finished, Option<Pack>), IngestError> {
        let end = self.state_end.take().ok_or_else(|| protocol(0, "the state did not arrive"))?;
        let roots: Vec<Digest> = self.spaces.iter().map(|space| space.digests.root()).collect();
        let (sections, places): (Vec<Section>, Vec<SectionRef>) =
            std::mem::take(&mut self.sections).into_values().unzip();
        let computed = machine_digest(&roots, state_digest(&sections));
        compare(&end.digest.unwrap_or_default(), &computed)?;
        let rest = if self.writer.is_empty() { None } else { Some(self.seal()) };
        let maps = (0..).zip(&self.spaces).map(|(number, space)| map(number, space, &self.places)).collect();
        Ok((Finished { sections: places, maps, packs: self.packs, digest: computed }, rest))
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

/// Joins pages whose latest copies lie side by side in one frame.
fn map(number: u32, space: &Space, places: &[Place]) -> PageMap {
    let mut extents: Vec<PageExtent> = Vec::new();
    let mut open: Option<u32> = None;
    for (page, latest) in (0u64..).zip(&space.latest) {
        let Some(place) = latest.checked_sub(1) else {
            open = None;
            continue;
        };
        match extents.last_mut() {
            Some(extent) if open == Some(place) => extent.pages += 1,
            _ => {
                let Place { pack, offset, first_page, frame_bytes } = places[place as usize];
                let skip = (page - first_page) as u32;
                extents.push(PageExtent { first_page: page, pages: 1, pack, offset, frame_bytes, skip });
            }
        }
        open = Some(place);
    }
    PageMap { space: number, pages: space.latest.len() as u64, extents }
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
    }
}

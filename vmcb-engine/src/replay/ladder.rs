//! Rungs to go back to: what the machine was at some positions, as what changed from one to the next.
//!
//! A rung holds the processors' and devices' state whole, and of RAM and disks the pages that were written since the rung
//! before it. What a page held at a rung is the newest version that is not later; a page without one holds what it held at
//! the beginning, which lies in sparse memfds of its own. Which pages were written is told by the page stamps
//! (`memory/stamps`): the machine's RAM and disks are always those of one rung, [`Ladder::on`], and of what was stamped
//! since. Going to a rung writes back pages that differ, and only those.
//!
//! Memory is bounded. Rungs are thinned out where they are dense for their distance from the present, so that what is
//! left is spaced ever wider, and going anywhere costs little more than the distance to it. This file refuses to know why
//! anybody goes back.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::play::Player;
use crate::engine::{Stops, Uses};
use crate::journal::Position;
use crate::machine::{Machine, MachineError, Rung};
use crate::memory::shared::{PagesError, Run, SharedPages};
use crate::memory::{GuestMemory, MemoryError, PAGE_BYTES, sized_memfd};

/// Most rungs.
const RUNGS_MAX: usize = 400;
/// Pages copied at once.
const PAGES_AT_ONCE: u64 = 256;

/// Why a rung cannot be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum LadderError {
    /// RAM or a disk cannot be read or written.
    #[error("RAM or a disk of the replayed machine")]
    Pages(#[from] PagesError),
    /// No memory for the beginning.
    #[error("no memory for a second copy of RAM and disks")]
    Memory(#[from] MemoryError),
    /// The machine refuses its own state.
    #[error("the machine cannot be put back")]
    Machine(#[from] MachineError),
}

/// A page of a space: 0 is RAM, then the disks.
type Key = (usize, u64);
/// A page's contents; `None` is zero.
type Page = Option<Box<[u8; PAGE_BYTES as usize]>>;

struct Step {
    position: Position,
    rung: Rung,
    cursor: usize,
    /// Pages that have a version of this position.
    keys: Vec<Key>,
    /// What may have been used from here to the next rung; `None`: anything.
    uses: Option<Uses>,
}

impl Step {
    /// Bytes of host memory that it takes besides its pages.
    fn bytes(&self) -> u64 {
        (self.rung.bytes() + self.uses.as_ref().map_or(0, Uses::bytes)) as u64
    }
}

/// The rungs of one machine.
pub struct Ladder {
    /// RAM and disks of the machine.
    spaces: Vec<SharedPages>,
    /// RAM and disks at the first rung.
    base: Vec<SharedPages>,
    /// In order of position; the first is the beginning and stays.
    steps: Vec<Step>,
    versions: BTreeMap<Key, Vec<(Position, Page)>>,
    /// The rung whose contents RAM and disks have, but for what was stamped since.
    on: usize,
    /// Epoch that began there.
    mark: u32,
    page_bytes: u64,
    rung_bytes: u64,
    bytes_max: u64,
}

impl std::fmt::Debug for Ladder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ladder").field("rungs", &self.steps.len()).field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

/// RAM and disks as files with stamps.
fn spaces(machine: &Machine) -> Result<Vec<SharedPages>, PagesError> {
    let memory = machine.memory();
    let ram = SharedPages::of(memory.ram_fd(), memory.stamps_fd(), memory.bytes());
    let disks = machine.disks().map(|disk| SharedPages::of(disk.file_fd(), disk.stamps_fd(), disk.bytes()));
    std::iter::once(ram).chain(disks).collect()
}

/// A copy of a space in memory of its own, holes included.
fn copy(space: &SharedPages) -> Result<SharedPages, LadderError> {
    let bytes = space.pages() * PAGE_BYTES;
    let stamps = sized_memfd("replay-base-stamps", space.pages() * 4)?;
    let base = SharedPages::new(sized_memfd("replay-base", bytes)?, stamps, bytes)?;
    let mut buffer = Vec::new();
    for piece in space.filled(space.whole())?.into_iter().flat_map(|run| run.pieces(PAGES_AT_ONCE)) {
        buffer.clear();
        space.append_pages(piece, &mut buffer)?;
        base.write_pages(piece.first, &buffer)?;
    }
    Ok(base)
}

impl Ladder {
    /// The first rung is where the player is.
    ///
    /// # Errors
    /// No memory for a copy of RAM and disks.
    pub fn new(player: &mut Player, bytes_max: u64) -> Result<Self, LadderError> {
        let spaces = spaces(player.machine())?;
        let base: Result<Vec<SharedPages>, LadderError> = spaces.iter().map(copy).collect();
        let mut ladder = Self {
            spaces,
            base: base?,
            steps: Vec::new(),
            versions: BTreeMap::new(),
            on: 0,
            mark: 0,
            page_bytes: 0,
            rung_bytes: 0,
            bytes_max,
        };
        ladder.lay(0, player, Vec::new(), None)?;
        ladder.begin(0, player)?;
        Ok(ladder)
    }

    fn lay(&mut self, at: usize, player: &Player, keys: Vec<Key>, uses: Option<Uses>) -> Result<(), LadderError> {
        let rung = player.machine().rung()?;
        let step = Step { position: player.position(), rung, cursor: player.cursor(), keys, uses };
        self.rung_bytes += step.bytes();
        self.steps.insert(at, step);
        Ok(())
    }

    /// The player's machine stands on a rung: what it writes and uses from here on is of the span behind it.
    fn begin(&mut self, on: usize, player: &mut Player) -> Result<(), LadderError> {
        self.on = on;
        self.mark = player.machine_mut().advance_epoch()?;
        player.machine_mut().take_uses();
        Ok(())
    }

    /// Replaces what is known of the span behind a rung.
    fn note_uses(&mut self, rung: usize, uses: Option<Uses>) {
        let step = &mut self.steps[rung];
        self.rung_bytes -= step.bytes();
        step.uses = uses;
        self.rung_bytes += step.bytes();
    }

    /// How many rungs.
    pub fn rungs(&self) -> usize {
        self.steps.len()
    }

    /// Bytes that rungs take.
    pub fn bytes(&self) -> u64 {
        self.page_bytes + self.rung_bytes
    }

    /// Position of a rung.
    pub fn position(&self, rung: usize) -> Position {
        self.steps[rung].position
    }

    /// The last rung that is not after a position, if the first one is not.
    pub fn at_or_before(&self, position: Position) -> Option<usize> {
        self.steps.partition_point(|step| step.position <= position).checked_sub(1)
    }

    /// The last rung before a position.
    pub fn before(&self, position: Position) -> Option<usize> {
        self.steps.partition_point(|step| step.position < position).checked_sub(1)
    }

    /// Whether pages of RAM may have been written between a rung and the position of the next one; false is certain.
    pub fn wrote_after(&self, rung: usize, until: Position, pages: RangeInclusive<u64>) -> bool {
        match self.steps.get(rung + 1) {
            Some(next) if next.position == until => {
                next.keys.iter().any(|(space, page)| *space == 0 && pages.contains(page))
            }
            _ => true,
        }
    }

    /// Whether any of these stops may be met between a rung and the position of the next one; false is certain.
    pub fn may_meet_after(&self, rung: usize, until: Position, stops: &Stops) -> bool {
        let next = self.steps.get(rung + 1).filter(|next| next.position == until);
        let uses = next.and(self.steps[rung].uses.as_ref());
        uses.is_none_or(|uses| uses.may_meet(stops))
    }

    /// RAM at a guest-physical address as it was at a rung; what is no RAM reads as nothing.
    ///
    /// # Errors
    /// A file of RAM cannot be read.
    pub fn ram_at(&self, rung: usize, memory: &GuestMemory, gpa: u64, bytes: usize) -> Result<Vec<u8>, LadderError> {
        let last = gpa.saturating_add((bytes as u64).saturating_sub(1));
        let mut pages = Vec::new();
        for page in gpa / PAGE_BYTES..=last / PAGE_BYTES {
            let Some(page) = memory.page_of(page * PAGE_BYTES) else { return Ok(Vec::new()) };
            self.contents((0, page), self.steps[rung].position, &mut pages)?;
        }
        let from = (gpa % PAGE_BYTES) as usize;
        Ok(pages.get(from..from + bytes).map(<[u8]>::to_vec).unwrap_or_default())
    }

    /// The player stands on a rung from now on: on the one that is there, or a new one.
    ///
    /// # Errors
    /// RAM or a disk cannot be read.
    pub fn stand(&mut self, player: &mut Player) -> Result<(), LadderError> {
        let here = player.position();
        let at = self.at_or_before(here).unwrap_or(0);
        let on = if self.steps[at].position == here { at } else { at + 1 };
        let uses = player.machine_mut().take_uses();
        if on != at {
            // What is known of the whole span holds for its second part.
            let rest = self.steps[at].uses.clone();
            self.insert(on, player, rest)?;
            self.note_uses(at, uses);
        } else if on == self.on + 1 && self.steps[self.on].uses.is_none() {
            self.note_uses(self.on, uses);
        }
        self.begin(on, player)?;
        self.thin(here);
        Ok(())
    }

    /// Pages that may differ from those of the rung that the machine is on.
    fn changed(&self) -> Result<Vec<Key>, PagesError> {
        let mut keys = Vec::new();
        for (space, pages) in self.spaces.iter().enumerate() {
            let runs = pages.since(self.mark)?;
            keys.extend(runs.into_iter().flat_map(|run: Run| run.first..run.end()).map(|page| (space, page)));
        }
        Ok(keys)
    }

    fn insert(&mut self, at: usize, player: &mut Player, uses: Option<Uses>) -> Result<(), LadderError> {
        let keys = self.changed()?;
        let here = player.position();
        let mut bytes = Vec::new();
        for &(space, page) in &keys {
            bytes.clear();
            self.spaces[space].append_pages(Run { first: page, pages: 1 }, &mut bytes)?;
            let contents = filled(&bytes);
            self.page_bytes += contents.as_ref().map_or(0, |_| PAGE_BYTES);
            let versions = self.versions.entry((space, page)).or_default();
            let place = versions.partition_point(|(position, _)| *position < here);
            versions.insert(place, (here, contents));
        }
        self.lay(at, player, keys, uses)
    }

    /// Puts the player's machine onto a rung.
    ///
    /// # Errors
    /// RAM or a disk cannot be read or written, or the machine refuses; then it is of no use.
    pub fn climb(&mut self, player: &mut Player, rung: usize) -> Result<(), LadderError> {
        let mut keys = self.changed()?;
        let between = self.on.min(rung) + 1..=self.on.max(rung);
        keys.extend(self.steps[between].iter().flat_map(|step| &step.keys));
        keys.sort_unstable();
        keys.dedup();
        let position = self.steps[rung].position;
        let (mut now, mut then) = (Vec::new(), Vec::new());
        for (space, page) in keys {
            let one = Run { first: page, pages: 1 };
            now.clear();
            then.clear();
            self.spaces[space].append_pages(one, &mut now)?;
            self.contents((space, page), position, &mut then)?;
            if now == then {
                continue;
            }
            if space == 0 {
                // By the machine's own memory: decoded code of the page is forgotten.
                let memory = player.machine().memory();
                memory.write(memory.gpa_of(page), &then).expect("a page of RAM");
            } else {
                self.spaces[space].write_pages(page, &then)?;
            }
        }
        let step = &self.steps[rung];
        player.machine_mut().climb(&step.rung)?;
        player.set_cursor(step.cursor);
        self.begin(rung, player)?;
        Ok(())
    }

    fn contents(&self, key: Key, position: Position, into: &mut Vec<u8>) -> Result<(), PagesError> {
        let versions = self.versions.get(&key).map_or(&[][..], Vec::as_slice);
        let at = versions.partition_point(|(version, _)| *version <= position);
        match at.checked_sub(1).map(|at| &versions[at].1) {
            Some(Some(page)) => into.extend_from_slice(&page[..]),
            Some(None) => into.resize(into.len() + PAGE_BYTES as usize, 0),
            None => self.base[key.0].append_pages(Run { first: key.1, pages: 1 }, into)?,
        }
        Ok(())
    }

    /// Removes rungs until what is left fits.
    fn thin(&mut self, present: Position) {
        while self.steps.len() > RUNGS_MAX || self.bytes() > self.bytes_max {
            let Some(at) = self.densest(present) else { return };
            self.remove(at);
        }
    }

    /// The rung that is missed least: where the gap that it would leave is small for its distance from the present.
    fn densest(&self, present: Position) -> Option<usize> {
        let near = |step: &Step| step.position.retired.abs_diff(present.retired) + 1;
        let last = self.steps.len().checked_sub(1)?;
        let candidates = (1..=last).filter(|at| *at != self.on);
        let cost = |at: &usize| {
            let after = self.steps.get(at + 1).map_or(self.steps[*at].position.retired, |step| step.position.retired);
            let gap = after.saturating_sub(self.steps[at - 1].position.retired);
            u128::from(gap) * u128::from(u32::MAX) / u128::from(near(&self.steps[*at]))
        };
        candidates.min_by_key(cost)
    }

    /// Takes a rung out: its versions of pages become the next rung's, where that one has none of its own.
    fn remove(&mut self, at: usize) {
        let removed = self.steps.remove(at);
        self.rung_bytes -= removed.bytes();
        let Step { position, keys, uses, .. } = removed;
        let before = self.steps[at - 1].uses.clone();
        self.note_uses(at - 1, both(before, uses));
        self.on -= usize::from(self.on > at);
        let mut handed_on = Vec::new();
        let next = self.steps.get(at).map(|step| step.position);
        for key in keys {
            let Some(versions) = self.versions.get_mut(&key) else { continue };
            let Some(place) = versions.iter().position(|(version, _)| *version == position) else { continue };
            let superseded =
                next.is_none() || versions.get(place + 1).is_some_and(|(version, _)| Some(*version) == next);
            if let Some(next) = next.filter(|_| !superseded) {
                versions[place].0 = next;
                handed_on.push(key);
            } else {
                let (_, page) = versions.remove(place);
                self.page_bytes -= page.map_or(0, |_| PAGE_BYTES);
            }
            if versions.is_empty() {
                self.versions.remove(&key);
            }
        }
        if let Some(step) = self.steps.get_mut(at) {
            step.keys.extend(handed_on);
        }
    }
}

/// What was used in two spans.
fn both(first: Option<Uses>, second: Option<Uses>) -> Option<Uses> {
    let (mut all, second) = (first?, second?);
    all.add(&second);
    Some(all)
}

fn filled(bytes: &[u8]) -> Page {
    let page: &[u8; PAGE_BYTES as usize] = bytes.try_into().expect("one page was read");
    page.iter().any(|byte| *byte != 0).then(|| Box::new(*page))
}

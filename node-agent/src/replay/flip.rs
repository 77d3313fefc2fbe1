//! What another beginning changes: two replays of one recording, side by side, one of them with a bit of RAM flipped at the
//! beginning, or from a file whose RAM is not what the other file's is.
//!
//! Processors and devices are compared at every few ten thousand instructions; in the first span at whose end they differ
//! they go on instruction by instruction, and the first one after which a processor or a device differs is named. A register
//! that was equal again at the end of its span may have left something in RAM: where RAM differs in other bytes too, the span
//! in which that began is gone through too. What left nothing anywhere is not seen. It refuses to know where recordings come
//! from.

use std::collections::BTreeSet;

use vmcb_engine::journal::Position;
use vmcb_engine::machine::Machine;
use vmcb_engine::memory::PAGE_BYTES;
use vmcb_engine::replay::{PlayError, Player, Spacing, Timeline, TimelineError};

use super::differences::{self, State, told};
use super::instant::instant;
use super::symbols::Symbols;

/// Instructions from one comparison to the next.
const SPAN: u64 = 50_000;
/// Pages that are named.
const PAGES_NAMED: usize = 16;
/// Bytes compared at once.
const CHUNK_BYTES: usize = 1 << 20;

/// What came of it: lines for people, the last one is the answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Consequence {
    /// One line each.
    pub lines: Vec<String>,
    /// A processor or a device differed.
    pub differs: bool,
}

/// One of the two, and why it could not go on.
struct Side {
    timeline: Timeline,
    stuck: Option<String>,
}

impl Side {
    fn machine(&self) -> &Machine {
        self.timeline.player().machine()
    }

    /// Goes to a position; one that diverges from the recording stays where it is.
    fn go(&mut self, position: Position) -> Result<(), TimelineError> {
        self.stuck = None;
        match self.timeline.seek(position, &mut || false) {
            Ok(_) => Ok(()),
            Err(TimelineError::Play(PlayError::Diverged(mismatch))) => {
                self.stuck = Some(mismatch.to_string());
                Ok(())
            }
            Err(other) => Err(other),
        }
    }
}

/// The two, and what they began with.
struct Pair<'a> {
    ours: Side,
    theirs: Side,
    /// Guest-physical addresses of the bytes of RAM that differed at the beginning.
    bytes: BTreeSet<u64>,
    /// What values of theirs are called.
    with: &'a str,
    symbols: Option<&'a Symbols>,
}

/// Compares two replays of one recording; values of the second are called what `with` says.
///
/// # Errors
/// The recording itself cannot be replayed.
pub fn consequence(
    original: Player,
    other: Player,
    with: &str,
    symbols: Option<&Symbols>,
) -> Result<Consequence, TimelineError> {
    let end = original.tape().end().min(other.tape().end());
    let side = |player| Timeline::new(player, Spacing::default()).map(|timeline| Side { timeline, stuck: None });
    let (ours, theirs) = (side(original)?, side(other)?);
    let bytes = differing_bytes(ours.machine(), theirs.machine());
    Pair { ours, theirs, bytes, with, symbols }.compare(end)
}

impl Pair<'_> {
    fn compare(&mut self, end: Position) -> Result<Consequence, TimelineError> {
        let start = self.ours.timeline.position().retired;
        let mut low = start;
        loop {
            if self.differ() {
                let early = self.spread(start, low)?;
                for from in early.into_iter().chain([low]) {
                    if let Some(found) = self.first_after(from, end)? {
                        return Ok(found);
                    }
                }
                return Ok(self.at_the_end());
            }
            let here = self.ours.timeline.position();
            if here >= end {
                if let Some(from) = self.spread(start, end.retired)?
                    && let Some(found) = self.first_after(from, end)?
                {
                    return Ok(found);
                }
                self.go_to(end)?;
                return Ok(self.at_the_end());
            }
            low = here.retired;
            // The last span ends where the recording does, also if that is in idle time.
            let next = Position { retired: low.saturating_add(SPAN), skipped_tsc: 0 };
            self.go_to(next.min(end))?;
            if let Some(why) = &self.ours.stuck {
                let lines = vec![format!("the recording itself does not replay: {why}")];
                return Ok(Consequence { lines, differs: true });
            }
        }
    }

    fn go_to(&mut self, position: Position) -> Result<(), TimelineError> {
        self.ours.go(position)?;
        self.theirs.go(position)
    }

    /// Both go to the first instant after so many instructions.
    fn go(&mut self, retired: u64) -> Result<(), TimelineError> {
        self.go_to(Position { retired, skipped_tsc: 0 })
    }

    fn differ(&self) -> bool {
        self.theirs.stuck.is_some() || self.ours.machine().probe() != self.theirs.machine().probe()
    }

    /// The last instant at which RAM differed in nothing but what it began with, a span exactly; `None` if it is so up to
    /// `high`.
    fn spread(&mut self, start: u64, high: u64) -> Result<Option<u64>, TimelineError> {
        let (mut low, mut high) = (start, high);
        self.go(high)?;
        if !self.differs_beyond() {
            return Ok(None);
        }
        while high - low > SPAN {
            let middle = low + (high - low) / 2;
            self.go(middle)?;
            if self.differs_beyond() { high = middle } else { low = middle }
        }
        Ok(Some(low))
    }

    /// Whether RAM differs in more than the bytes in which it did at the beginning.
    fn differs_beyond(&self) -> bool {
        let (ours, theirs) = (self.ours.machine(), self.theirs.machine());
        differing_pages(ours, theirs).into_iter().any(|gpa| {
            let bytes = |machine: &Machine| {
                let mut page = vec![0; PAGE_BYTES as usize];
                // It was read a moment ago.
                let _read = machine.memory().read(gpa, &mut page);
                self.bytes.range(gpa..gpa + PAGE_BYTES).for_each(|byte| page[(byte - gpa) as usize] = 0);
                page
            };
            bytes(ours) != bytes(theirs)
        })
    }

    /// Instruction by instruction from where both are equal, for two spans at most.
    fn first_after(&mut self, low: u64, end: Position) -> Result<Option<Consequence>, TimelineError> {
        self.go(low)?;
        let begun = self.ours.timeline.position().retired;
        let mut retired = begun;
        while !self.differ() {
            if retired - begun > 2 * SPAN || self.ours.timeline.position() >= end {
                return Ok(None);
            }
            retired += 1;
            self.go(retired)?;
        }
        if retired == begun {
            return Ok(Some(named(&self.ours, &self.theirs, self.with, "before any instruction")));
        }
        let vcpu = self.ours.machine().current_vcpu();
        self.ours.go(Position { retired: retired - 1, skipped_tsc: 0 })?;
        let executed = told(self.ours.machine(), vcpu, self.symbols);
        self.ours.go(Position { retired, skipped_tsc: 0 })?;
        Ok(Some(named(&self.ours, &self.theirs, self.with, &executed)))
    }

    /// No processor and no device ever differed: what is left of it in RAM.
    fn at_the_end(&self) -> Consequence {
        let pages = differing_pages(self.ours.machine(), self.theirs.machine());
        let mut lines = vec!["no processor and no device ever differed where they were compared".to_owned()];
        let named = pages.iter().take(PAGES_NAMED).map(|gpa| format!("page {gpa:#x} of RAM differs at the end"));
        lines.extend(named);
        lines.push(match pages.len() {
            0 => "no page differs at the end: what was different was overwritten".to_owned(),
            1 => "1 page differs at the end".to_owned(),
            pages => format!("{pages} pages differ at the end"),
        });
        Consequence { lines, differs: false }
    }
}

/// Both have just executed an instruction, and differ since.
fn named(ours: &Side, theirs: &Side, with: &str, executed: &str) -> Consequence {
    let position = ours.timeline.position();
    let mut lines = vec![
        format!("the first difference is after {}", instant(ours.timeline.player().tape(), position)),
        format!("executed: {executed}"),
    ];
    let fields = State::of(ours.machine()).differences(&State::of(theirs.machine()));
    lines.extend(theirs.stuck.iter().map(|why| format!("{with} it does not go on: {why}")));
    lines.extend(differences::lines(&fields, with));
    lines.push(differences::verdict(position, &fields, with));
    Consequence { lines, differs: true }
}

/// Guest-physical addresses of the pages of RAM that differ.
fn differing_pages(ours: &Machine, theirs: &Machine) -> Vec<u64> {
    let (a, b) = (ours.memory(), theirs.memory());
    let (mut one, mut other) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut pages = Vec::new();
    for mapping in a.mappings() {
        let start = a.gpa_of(mapping.first_page);
        // RAM is a multiple of 2 MiB.
        for gpa in (start..start + mapping.pages * PAGE_BYTES).step_by(CHUNK_BYTES) {
            let read = a.read(gpa, &mut one).and_then(|()| b.read(gpa, &mut other));
            if read.is_ok() && one != other {
                let chunks = one.chunks(PAGE_BYTES as usize).zip(other.chunks(PAGE_BYTES as usize));
                let differ = (0..).zip(chunks).filter(|(_, (one, other))| one != other);
                pages.extend(differ.map(|(page, _): (u64, _)| gpa + page * PAGE_BYTES));
            }
        }
    }
    pages
}

/// Guest-physical addresses of the bytes of RAM that differ.
fn differing_bytes(ours: &Machine, theirs: &Machine) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    let (mut one, mut other) = (vec![0; PAGE_BYTES as usize], vec![0; PAGE_BYTES as usize]);
    for gpa in differing_pages(ours, theirs) {
        let read = ours.memory().read(gpa, &mut one).and_then(|()| theirs.memory().read(gpa, &mut other));
        let differing = (gpa..).zip(one.iter().zip(&other)).filter(|(_, (one, other))| one != other);
        found.extend(differing.map(|(at, _)| at).filter(|_| read.is_ok()));
    }
    found
}

//! What one bit changes: two replays of one recording, side by side, one of them with a bit of RAM flipped at the beginning.
//!
//! Processors and devices are compared at every few ten thousand instructions; in the first span at whose end they differ
//! they go on instruction by instruction, and the first one after which a processor or a device differs is named. A register
//! that was equal again at the end of its span may have left something in RAM: where RAM differs in more than the bit, the span
//! in which that began is gone through too. What left nothing anywhere is not seen. It refuses to know where recordings come
//! from.

use vmcb_engine::cpu::CpuState;
use vmcb_engine::machine::Machine;
use vmcb_engine::memory::PAGE_BYTES;
use vmcb_engine::replay::{PlayError, Player, Spacing, Timeline, TimelineError};

use super::file::Bit;
use super::instant::{disassembled, instant, place};
use super::symbols::Symbols;

/// Instructions from one comparison to the next.
const SPAN: u64 = 50_000;
/// Pages that are named.
const PAGES_NAMED: usize = 16;
/// Bytes compared at once.
const CHUNK_BYTES: usize = 1 << 20;
/// Fields that are named.
const FIELDS_NAMED: usize = 16;

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

    /// Goes to the first instant after so many instructions; one that diverges from the recording stays where it is.
    fn go(&mut self, retired: u64) -> Result<(), TimelineError> {
        let position = vmcb_engine::journal::Position { retired, skipped_tsc: 0 };
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

/// Compares a recording with itself but for a bit.
///
/// # Errors
/// The recording itself cannot be replayed.
pub fn consequence(
    original: Player,
    flipped: Player,
    bit: Bit,
    symbols: Option<&Symbols>,
) -> Result<Consequence, TimelineError> {
    let end = original.tape().end();
    let side = |player| Timeline::new(player, Spacing::default()).map(|timeline| Side { timeline, stuck: None });
    let (mut ours, mut theirs) = (side(original)?, side(flipped)?);
    let start = ours.timeline.position().retired;
    let mut low = start;
    loop {
        if differ(&ours, &theirs) {
            let early = spread(&mut ours, &mut theirs, bit, start, low)?;
            for from in early.into_iter().chain([low]) {
                if let Some(found) = first_after(&mut ours, &mut theirs, from, symbols)? {
                    return Ok(found);
                }
            }
            return Ok(at_the_end(&ours, &theirs));
        }
        let here = ours.timeline.position();
        if here >= end {
            if let Some(from) = spread(&mut ours, &mut theirs, bit, start, end.retired)?
                && let Some(found) = first_after(&mut ours, &mut theirs, from, symbols)?
            {
                return Ok(found);
            }
            ours.timeline.seek(end, &mut || false)?;
            theirs.timeline.seek(end, &mut || false)?;
            return Ok(at_the_end(&ours, &theirs));
        }
        low = here.retired;
        let next = low.saturating_add(SPAN);
        if next > end.retired {
            // The last span ends where the recording does, also if that is in idle time.
            ours.timeline.seek(end, &mut || false)?;
            if let Err(TimelineError::Play(PlayError::Diverged(mismatch))) = theirs.timeline.seek(end, &mut || false) {
                theirs.stuck = Some(mismatch.to_string());
            }
        } else {
            ours.go(next)?;
            theirs.go(next)?;
        }
        if let Some(why) = &ours.stuck {
            let lines = vec![format!("the recording itself does not replay: {why}")];
            return Ok(Consequence { lines, differs: true });
        }
    }
}

fn differ(ours: &Side, theirs: &Side) -> bool {
    theirs.stuck.is_some() || ours.machine().probe() != theirs.machine().probe()
}

/// The last instant at which RAM differed in nothing but the bit, a span exactly; `None` if it is so up to `high`.
fn spread(ours: &mut Side, theirs: &mut Side, bit: Bit, start: u64, high: u64) -> Result<Option<u64>, TimelineError> {
    let (mut low, mut high) = (start, high);
    ours.go(high)?;
    theirs.go(high)?;
    if !differs_beyond(ours.machine(), theirs.machine(), bit) {
        return Ok(None);
    }
    while high - low > SPAN {
        let middle = low + (high - low) / 2;
        ours.go(middle)?;
        theirs.go(middle)?;
        if differs_beyond(ours.machine(), theirs.machine(), bit) { high = middle } else { low = middle }
    }
    Ok(Some(low))
}

/// Whether RAM differs in more than the byte of a bit.
fn differs_beyond(ours: &Machine, theirs: &Machine, bit: Bit) -> bool {
    let flipped = bit.gpa - bit.gpa % PAGE_BYTES;
    differing_pages(ours, theirs).into_iter().any(|gpa| {
        let bytes = |machine: &Machine| {
            let mut page = vec![0; PAGE_BYTES as usize];
            // It was read a moment ago.
            let _read = machine.memory().read(gpa, &mut page);
            if gpa == flipped {
                page[(bit.gpa % PAGE_BYTES) as usize] = 0;
            }
            page
        };
        bytes(ours) != bytes(theirs)
    })
}

/// Instruction by instruction from where both are equal, for two spans at most.
fn first_after(
    ours: &mut Side,
    theirs: &mut Side,
    low: u64,
    symbols: Option<&Symbols>,
) -> Result<Option<Consequence>, TimelineError> {
    ours.go(low)?;
    theirs.go(low)?;
    let begun = ours.timeline.position().retired;
    let mut retired = begun;
    while !differ(ours, theirs) {
        if retired - begun > 2 * SPAN || ours.timeline.position() >= ours.timeline.player().tape().end() {
            return Ok(None);
        }
        retired += 1;
        ours.go(retired)?;
        theirs.go(retired)?;
    }
    if retired == begun {
        return Ok(Some(named(ours, theirs, "before any instruction")));
    }
    let vcpu = ours.machine().current_vcpu();
    ours.go(retired - 1)?;
    let executed = told(ours.machine(), vcpu, symbols);
    ours.go(retired)?;
    Ok(Some(named(ours, theirs, &executed)))
}

/// Both have just executed an instruction, and differ since.
fn named(ours: &Side, theirs: &Side, executed: &str) -> Consequence {
    let tape = ours.timeline.player().tape();
    let mut lines = vec![format!("the first difference is after {}", instant(tape, ours.timeline.position()))];
    lines.push(format!("executed: {executed}"));
    let fields = fields(ours.machine(), theirs.machine());
    let more = fields.len().saturating_sub(FIELDS_NAMED);
    lines.extend(theirs.stuck.iter().map(|why| format!("with the bit flipped it does not go on: {why}")));
    lines.extend(
        fields.iter().take(FIELDS_NAMED).map(|(field, a, b)| format!("{field}: {a}, with the bit flipped {b}")),
    );
    if more > 0 {
        lines.push(format!("and {more} more fields"));
    }
    let (field, a, b) = fields
        .into_iter()
        .next()
        .unwrap_or_else(|| ("the replay".to_owned(), "goes on".to_owned(), "does not".to_owned()));
    let position = ours.timeline.position();
    lines.push(format!(
        "diverged: at instruction {} (skipped {}): {field} is {a}, with the bit flipped {b}",
        position.retired, position.skipped_tsc
    ));
    Consequence { lines, differs: true }
}

/// What the instruction that a vCPU executes next is, and where.
fn told(machine: &Machine, vcpu: usize, symbols: Option<&Symbols>) -> String {
    format!("vCPU {vcpu}, {}: {}", place(machine, vcpu, symbols), disassembled(machine, vcpu))
}

/// Fields in which two machines differ, with both values.
fn fields(ours: &Machine, theirs: &Machine) -> Vec<(String, String, String)> {
    let mut found = Vec::new();
    let mut compare = |field: &str, a: u64, b: u64| {
        if a != b {
            found.push((field.to_owned(), format!("{a:#x}"), format!("{b:#x}")));
        }
    };
    compare("clock.retired", ours.retired(), theirs.retired());
    compare("clock.skipped_tsc", ours.skipped_tsc(), theirs.skipped_tsc());
    let text =
        |value: &Option<vmcb_engine::cpu::LeafValue>| value.as_ref().map_or("absent".to_owned(), ToString::to_string);
    for vcpu in 0..ours.config().vcpus as usize {
        let (a, b) = (ours.peek_cpu(vcpu), theirs.peek_cpu(vcpu));
        let (Some(a), Some(b)): (Option<CpuState>, Option<CpuState>) = (a, b) else { continue };
        let differences = a.compare(&b).into_iter();
        found.extend(differences.map(|d| (format!("cpu/{vcpu} {}", d.field), text(&d.left), text(&d.right))));
    }
    let (a, b) = (ours.device_sections(), theirs.device_sections());
    for (a, b) in a.iter().zip(&b).filter(|(a, b)| a != b) {
        let short = |body: &[u8]| blake3::hash(body).to_hex().as_str()[..16].to_owned();
        found.push((a.name.clone(), short(&a.body), short(&b.body)));
    }
    found
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

/// No processor and no device ever differed: what is left of it in RAM.
fn at_the_end(ours: &Side, theirs: &Side) -> Consequence {
    let pages = differing_pages(ours.machine(), theirs.machine());
    let mut lines = vec!["no processor and no device ever differed where they were compared".to_owned()];
    let named = pages.iter().take(PAGES_NAMED).map(|gpa| format!("page {gpa:#x} of RAM differs at the end"));
    lines.extend(named);
    lines.push(match pages.len() {
        0 => "no page differs at the end: what was flipped was overwritten".to_owned(),
        1 => "1 page differs at the end".to_owned(),
        pages => format!("{pages} pages differ at the end"),
    });
    Consequence { lines, differs: false }
}

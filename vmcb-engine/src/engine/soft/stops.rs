//! Breakpoints and watchpoints of one processor, at no cost where there are none and little where they are far.
//!
//! A breakpoint is a linear address, blocks are known by guest-physical ones. Whenever code of a page with a breakpoint is
//! fetched, its guest-physical address becomes *suspect*: blocks end before a suspect instruction and none that begins
//! there is kept, so that the loop passes there and compares linear addresses. Where blocks are cut is never visible.
//!
//! Pages with watched bytes stay in the TLB with the tag of those that wait to be stamped, so every use of them takes the
//! slow path ([`super::walk`]), which notes what it did. The noted instruction is done as always; its block ends behind it
//! as one does whose code was overwritten, and the loop comes back.

use super::core::{Core, RIP_BASE, Step};
use super::decode::Fetched;
use super::op::Flow;
use super::tlb::{ENTRIES, Tlb};
use crate::engine::stops::{Stops, WatchKind, Watchpoint, Why};

/// Suspects that are remembered before they are gathered anew, if there are few breakpoints.
const SUSPECTS: usize = 4096;

/// What one processor knows of its stops.
pub struct Stopping {
    /// Sorted.
    breakpoints: Vec<u64>,
    /// Guest-physical addresses at which breakpoints may lie; sorted.
    suspects: Vec<u64>,
    linear: Vec<Watchpoint>,
    physical: Vec<Watchpoint>,
    met: Option<Met>,
    /// A block runs, as opposed to a fetch or a delivery.
    in_block: bool,
    /// Guest-physical and linear address of what the loop fetched last.
    entered: (u64, u64),
}

/// Why the loop comes back, as soon as it can.
struct Met {
    why: Why,
    /// What is left to find out: which instruction of its block it was.
    within: Option<Within>,
}

/// The block in which something was noted.
struct Within {
    /// RIP of its first instruction.
    start: u64,
    /// Offsets of its instructions.
    offsets: Vec<u16>,
    /// The budget, the whole block paid.
    budget: i64,
}

/// One use of memory within a page.
#[derive(Clone, Copy)]
pub(super) struct Use {
    /// Linear address.
    pub linear: u64,
    /// Where it leads.
    pub gpa: u64,
    /// How many bytes.
    pub bytes: usize,
    /// A store.
    pub write: bool,
}

impl Core {
    /// Stops there from now on. A processor that stands at a breakpoint goes on from it as before.
    pub fn set_stops(&mut self, stops: &Stops) {
        self.returns.forget();
        self.blocks.drop_held();
        self.tlb.disarm_reads();
        self.stops = None;
        if stops.is_empty() {
            return;
        }
        let mut breakpoints = stops.breakpoints.clone();
        breakpoints.sort_unstable();
        breakpoints.dedup();
        let of = |physical| {
            let wanted = move |watch: &&Watchpoint| (watch.kind == WatchKind::PhysicalWrite) == physical;
            stops.watchpoints.iter().filter(wanted).copied().collect::<Vec<_>>()
        };
        let stopping = Stopping {
            breakpoints,
            suspects: Vec::new(),
            linear: of(false),
            physical: of(true),
            met: None,
            in_block: false,
            entered: (0, 0),
        };
        let reads = |linear| stopping.linear.iter().any(|watch| watch.kind.counts(false) && watch.is_in_page(linear));
        self.tlb.arm_reads(reads);
        self.tlb.rearm();
        self.stops = Some(Box::new(stopping));
        self.suspect_cached();
    }

    /// The instruction at which this processor stands, `linear`, runs without a stop before it.
    pub fn pass_breakpoint(&mut self, linear: u64) {
        self.passed = Some((self.retired(), linear));
    }

    /// Why the loop came back with [`super::run::Ended::Stopped`], once.
    pub fn take_stop(&mut self) -> Option<Why> {
        self.stops.as_deref_mut().and_then(|stops| stops.met.take()).map(|met| met.why)
    }

    /// A part of a repeated instruction is done, and RIP is at it: its next part is not an instruction of its own.
    pub(super) fn goes_on_repeating(&mut self) {
        self.repeating = Some((self.retired(), self.linear_rip(self.rip)));
    }

    /// Between two instructions with stops set: true if the loop comes back here.
    #[cold]
    pub(super) fn must_stop(&mut self) -> bool {
        let linear = self.linear_rip(self.rip);
        let here = Some((self.retired(), linear));
        // Standing there still, or in the middle of a repeated instruction.
        let known = self.passed == here || self.repeating == here;
        let runs = self.budget > 0;
        let Some(stops) = self.stops.as_deref_mut() else { return false };
        if stops.met.is_some() {
            return true;
        }
        if !runs || known || stops.breakpoints.binary_search(&linear).is_err() {
            return false;
        }
        stops.met = Some(Met { why: Why::Breakpoint { address: linear }, within: None });
        self.passed = here;
        true
    }

    /// Where the code at RIP lies, for a block that is about to run.
    pub(super) fn fetch(&mut self) -> Step<Fetched> {
        let linear = self.linear_rip(self.rip);
        let fetched = self.translate_code(self.rip);
        if self.noting.is_some() {
            self.note_fetch(linear, &fetched);
        }
        let fetched = fetched?;
        if let Some(stops) = self.stops.as_deref_mut() {
            stops.entered = (fetched.gpa, linear);
        }
        Ok(fetched)
    }

    /// Instructions that may run before the loop is seen: one if the fetch of it was noted already.
    pub(super) fn limit_of(&mut self, limit: usize) -> usize {
        let met = self.stops.as_deref().is_some_and(|stops| stops.met.is_some());
        if met {
            self.follow = 0;
        }
        if met { 1 } else { limit }
    }

    /// A block is entered from the loop.
    #[inline(always)]
    pub(super) fn begin_block(&mut self) {
        if let Some(stops) = self.stops.as_deref_mut() {
            stops.in_block = true;
        }
    }

    /// The loop is back: which instruction was it?
    #[cold]
    pub(super) fn block_ended(&mut self, flow: Flow) {
        let budget = self.budget;
        let Some(stops) = self.stops.as_deref_mut() else { return };
        stops.in_block = false;
        if let Some(met) = &mut stops.met
            && let Some(within) = met.within.take()
            && let Why::Watchpoint { rip, .. } = &mut met.why
        {
            let done = within.offsets.len() as i64 - (budget - within.budget);
            let index = if flow == Flow::Next { done - 1 } else { done };
            let offset = usize::try_from(index).ok().and_then(|index| within.offsets.get(index));
            *rip = within.start.wrapping_add(offset.copied().unwrap_or(0).into());
        }
        // What runs once would be taken for the block that is kept at the same address.
        if self.blocks.drop_held() {
            self.returns.forget();
        }
    }

    /// True if a breakpoint may lie at this guest-physical address.
    #[inline]
    pub(super) fn is_suspect(&self, gpa: u64) -> bool {
        self.stops.as_deref().is_some_and(|stops| stops.suspects.binary_search(&gpa).is_ok())
    }

    /// Code of the page at `linear` is about to be known as that of the page at `gpa`.
    #[cold]
    pub(super) fn suspect_page(&mut self, linear: u64, gpa: u64, page: u64) {
        let Some(stops) = self.stops.as_deref_mut() else { return };
        let first = linear & !0xfff;
        let from = stops.breakpoints.partition_point(|at| *at < first);
        let inside = stops.breakpoints[from..].iter().take_while(|at| **at & !0xfff == first);
        let fresh: Vec<u64> = inside
            .map(|at| gpa & !0xfff | at & 0xfff)
            .filter(|suspect| stops.suspects.binary_search(suspect).is_err())
            .collect();
        if fresh.is_empty() {
            return;
        }
        // Far more than what the TLB's two sets can lead to.
        let most = SUSPECTS.max(4 * stops.breakpoints.len());
        let full = stops.suspects.len() + fresh.len() > most;
        if full {
            stops.suspects.clear();
        }
        stops.suspects.extend(fresh);
        stops.suspects.sort_unstable();
        self.drop_code(&[page]);
        if full {
            self.suspect_cached();
        }
    }

    /// The same for what the TLB has already.
    fn suspect_cached(&mut self) {
        let Some(stops) = self.stops.as_deref() else { return };
        let mut pages: Vec<u64> = stops.breakpoints.iter().map(|at| at & !0xfff).collect();
        pages.dedup();
        for linear in pages {
            for (gpa, page) in self.tlb.code_pages(linear).into_iter().flatten() {
                self.suspect_page(linear, gpa, page);
            }
        }
    }

    /// True if loads from this page are watched.
    #[inline]
    pub(super) fn watches_reads(&self, linear: u64) -> bool {
        self.stops
            .as_deref()
            .is_some_and(|stops| stops.linear.iter().any(|watch| watch.kind.counts(false) && watch.is_in_page(linear)))
    }

    /// True if stores to this page are watched; or loads, which may go by the table of stores too.
    #[inline]
    pub(super) fn watches_writes(&self, linear: u64, page: u64) -> bool {
        self.stops.as_deref().is_some_and(|stops| {
            let gpa = self.memory.gpa_of(page);
            stops.linear.iter().any(|watch| watch.is_in_page(linear))
                || stops.physical.iter().any(|watch| watch.is_in_page(gpa))
        })
    }

    /// Notes a use of linear addresses. It happens, whatever is found here.
    #[cold]
    pub(super) fn note_use(&mut self, used: Use) {
        let Some(stops) = self.stops.as_deref() else { return };
        let first = |watch: &Watchpoint| {
            let found = watch.kind.counts(used.write).then(|| watch.first_in(used.linear, used.bytes as u64))?;
            found.map(|at| (*watch, used.gpa + (at - used.linear)))
        };
        if let Some((watched, gpa)) = stops.linear.iter().find_map(first) {
            self.note(watched, used.write, gpa);
        }
    }

    /// Notes a store to RAM.
    #[cold]
    pub(super) fn note_store(&mut self, page: u64, offset: u64, bytes: usize) {
        let Some(stops) = self.stops.as_deref() else { return };
        if stops.physical.is_empty() {
            return;
        }
        let at = self.memory.gpa_of(page) + (offset & 0xfff);
        let first = |watch: &Watchpoint| watch.first_in(at, bytes as u64).map(|gpa| (*watch, gpa));
        if let Some((watched, gpa)) = stops.physical.iter().find_map(first) {
            self.note(watched, true, gpa);
        }
    }

    fn note(&mut self, watched: Watchpoint, wrote: bool, gpa: u64) {
        let Some(stops) = self.stops.as_deref() else { return };
        if stops.met.is_some() {
            return;
        }
        let within = if stops.in_block { self.end_block() } else { None };
        let met = Met { why: Why::Watchpoint { watched, wrote, gpa, rip: self.rip }, within };
        if let Some(stops) = self.stops.as_deref_mut() {
            stops.met = Some(met);
        }
    }

    /// The running block ends behind the running instruction.
    fn end_block(&mut self) -> Option<Within> {
        self.follow = 0;
        let (entered, start) = (self.stops.as_deref()?.entered, self.gprs[RIP_BASE as usize]);
        let linear = self.linear_rip(start);
        let set = if self.mode.user { ENTRIES } else { 0 };
        let same = (entered.1 ^ linear) & !0xfff == 0;
        // Where alignment is checked nothing is cached: then what runs is what was fetched, or in the same page.
        let gpa = Tlb::code_gpa(self.tlb.base(set), linear)
            .or_else(|| same.then_some(entered.0 & !0xfff | linear & 0xfff))?;
        let offsets = self.blocks.stop_running(gpa, self.mode)?;
        Some(Within { start, offsets, budget: self.budget })
    }
}

//! What may have been used: what a search for the last use of an address may pass over.
//!
//! A linear page is used by a translation that was cached before, or by one that was looked for. So the pages that were
//! cached at the beginning of a span, and those that were looked for in it, are all that can have been used in it. Pages of
//! data are kept as hashes: one that was not used may be taken for one that was, never the other way round. Of code it is
//! known besides which page of RAM each linear page was, and which lines of that page were executed, by whatever linear
//! address. Nothing of this can be seen by the guest. What is searched is not known here.

use std::collections::{BTreeMap, BTreeSet};

use super::stops::{Stops, WatchKind, Watchpoint};

/// Words of a set: 64 Kibit, of which a span of a busy Linux guest sets about a fifth.
const WORDS: usize = 1024;
/// Pages of a watched range that are looked at; a longer one may always have been used.
const PAGES_MAX: u64 = 64;

/// A set of linear pages, with false members and no false strangers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pages {
    bits: Box<[u64]>,
}

impl Default for Pages {
    fn default() -> Self {
        Self { bits: vec![0; WORDS].into() }
    }
}

/// The two bits of a page: word and mask.
fn bits_of(linear: u64) -> [(usize, u64); 2] {
    // Fibonacci hashing: the upper bits depend on all of the page's.
    let hash = (linear >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let bit = |at: u64| ((at >> 6) as usize % WORDS, 1 << (at & 63));
    [bit(hash >> 48), bit(hash >> 32)]
}

impl Pages {
    /// Adds the page of an address.
    #[inline]
    pub fn insert(&mut self, linear: u64) {
        for (word, mask) in bits_of(linear) {
            self.bits[word] |= mask;
        }
    }

    /// False is certain.
    pub fn may_contain(&self, linear: u64) -> bool {
        bits_of(linear).into_iter().all(|(word, mask)| self.bits[word] & mask != 0)
    }

    fn add(&mut self, other: &Pages) {
        self.bits.iter_mut().zip(&other.bits).for_each(|(ours, theirs)| *ours |= theirs);
    }
}

/// Code that may have been executed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Code {
    /// Linear pages, and the guest-physical ones that they were.
    pages: BTreeSet<(u64, u64)>,
    /// Linear pages of which it is not known what they were: their translation failed.
    nowhere: BTreeSet<u64>,
    /// Lines (64 bytes each, one bit each) of guest-physical pages.
    lines: BTreeMap<u64, u64>,
}

impl Code {
    /// A linear page was this guest-physical one; both by any address in them.
    pub fn insert_page(&mut self, linear: u64, gpa: u64) {
        self.pages.insert((linear >> 12, gpa >> 12));
    }

    /// A fetch from there failed.
    pub fn insert_nowhere(&mut self, linear: u64) {
        self.nowhere.insert(linear >> 12);
    }

    /// Lines of a guest-physical page were executed.
    pub fn insert_lines(&mut self, gpa: u64, lines: u64) {
        *self.lines.entry(gpa >> 12).or_default() |= lines;
    }

    /// False is certain.
    pub fn may_contain(&self, linear: u64) -> bool {
        let (page, line) = (linear >> 12, 1 << ((linear >> 6) & 63));
        let mut pages = self.pages.range((page, 0)..=(page, u64::MAX));
        let executed = |gpa: &u64| self.lines.get(gpa).is_some_and(|lines| lines & line != 0);
        self.nowhere.contains(&page) || pages.any(|(_, gpa)| executed(gpa))
    }

    fn add(&mut self, other: &Code) {
        self.pages.extend(&other.pages);
        self.nowhere.extend(&other.nowhere);
        other.lines.iter().for_each(|(page, lines)| *self.lines.entry(*page).or_default() |= lines);
    }
}

/// What may have been used in a span.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Uses {
    /// Pages loaded from.
    pub read: Pages,
    /// Pages stored to.
    pub write: Pages,
    /// Code executed.
    pub execute: Code,
}

impl Uses {
    /// Bytes of host memory that they take, about.
    pub fn bytes(&self) -> usize {
        let Code { pages, nowhere, lines } = &self.execute;
        2 * WORDS * size_of::<u64>() + (pages.len() + lines.len()) * 24 + nowhere.len() * 12
    }

    /// Those of two spans.
    pub fn add(&mut self, other: &Uses) {
        self.read.add(&other.read);
        self.write.add(&other.write);
        self.execute.add(&other.execute);
    }

    /// False if none of these stops can have been met, and that is certain. What is watched by guest-physical address is not
    /// looked at: stamps of pages tell more of it.
    pub fn may_meet(&self, stops: &Stops) -> bool {
        let watched = stops.watchpoints.iter().any(|watch| self.may_use(watch));
        watched || stops.breakpoints.iter().any(|linear| self.execute.may_contain(*linear))
    }

    fn may_use(&self, watch: &Watchpoint) -> bool {
        let Some(last) = watch.bytes.checked_sub(1).map(|more| watch.address.saturating_add(more)) else {
            return false;
        };
        let (first, last) = (watch.address >> 12, last >> 12);
        // An instruction that loads and stores looks for the right to store only.
        let used = |page: u64| match watch.kind {
            WatchKind::Write => self.write.may_contain(page << 12),
            WatchKind::Read | WatchKind::Access => {
                self.read.may_contain(page << 12) || self.write.may_contain(page << 12)
            }
            WatchKind::PhysicalWrite => false,
        };
        last - first >= PAGES_MAX || (first..=last).any(used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watching(address: u64, bytes: u64, kind: WatchKind) -> Stops {
        Stops { breakpoints: Vec::new(), watchpoints: vec![Watchpoint { address, bytes, kind }] }
    }

    #[test]
    fn what_was_used_may_have_been_met_and_little_else() {
        let mut uses = Uses::default();
        for page in 0..3000u64 {
            uses.write.insert(0xffff_ffff_8100_0000 + page * 0x1000 + 5);
        }
        let at = |address| watching(address, 8, WatchKind::Write);
        assert!((0..3000u64).all(|page| uses.may_meet(&at(0xffff_ffff_8100_0000 + page * 0x1000 + 0x123))));
        let strangers = (0..3000u64).filter(|page| uses.may_meet(&at(0x5555_0000_0000 + page * 0x1000))).count();
        assert!(strangers < 100, "{strangers}");
    }

    #[test]
    fn code_is_known_by_its_lines_whatever_it_was_called() {
        let at = |address| Stops { breakpoints: vec![address], watchpoints: Vec::new() };
        let mut uses = Uses::default();
        // One page of RAM by two names; it was executed by one of them, and nobody knows by which.
        uses.execute.insert_page(0x40_0123, 0x9000);
        uses.execute.insert_page(0x7000_0fff, 0x9000);
        uses.execute.insert_page(0x50_0000, 0xa000);
        uses.execute.insert_lines(0x9000, 1 << 2);
        for (address, met) in [
            (0x40_0080, true),
            (0x40_00bf, true),
            (0x40_00c0, false),
            (0x40_007f, false),
            (0x7000_0085, true),
            (0x50_0085, false),
            (0x9085, false),
        ] {
            assert_eq!(uses.may_meet(&at(address)), met, "{address:#x}");
        }
        uses.execute.insert_nowhere(0x9abc);
        assert!(uses.may_meet(&at(0x9085)), "a breakpoint is met before the fetch fails");
        let mut both = Uses::default();
        both.execute.insert_lines(0xa000, 1 << 2);
        both.add(&uses);
        assert!(both.may_meet(&at(0x50_0085)) && both.bytes() > uses.bytes());
    }

    #[test]
    fn a_watched_range_is_used_with_any_of_its_pages() {
        let mut uses = Uses::default();
        uses.write.insert(0x7000);
        assert!(uses.may_meet(&watching(0x6ffc, 8, WatchKind::Write)));
        assert!(uses.may_meet(&watching(0x6ffc, 8, WatchKind::Read)));
        assert!(!uses.may_meet(&watching(0x6ff8, 8, WatchKind::Write)));
        assert!(!uses.may_meet(&watching(0x7000, 0, WatchKind::Write)));
        assert!(uses.may_meet(&watching(0, u64::MAX, WatchKind::Write)));
        assert!(!uses.may_meet(&watching(0x7000, 8, WatchKind::PhysicalWrite)));
        let mut both = Uses::default();
        both.read.insert(0x9000);
        both.add(&uses);
        assert!(both.may_meet(&watching(0x7fff, 1, WatchKind::Write)) && both.read.may_contain(0x9fff));
    }
}

//! What may have been used: what a search for the last use of an address may pass over.
//!
//! A linear page is used by a translation that was cached before, or by one that was looked for. So the pages that were
//! cached at the beginning of a span, and those that were looked for in it, are all that can have been used in it. Of pages
//! that were loaded from no more is known, as hashes: one that was not used may be taken for one that was, never the other
//! way round. Of stores and of code it is known which page of RAM each linear page was; of that page which words (eight bytes
//! each) were stored to, and where instructions began that may have been executed, by whatever linear address. Nothing of
//! this can be seen by the guest. What is searched is not known here, nor how it is gathered.

use std::collections::BTreeSet;

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

/// A set of numbers that lie close together: (number / 64, one bit each), sorted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Marks(Vec<(u64, u64)>);

impl Marks {
    /// Adds 64 numbers, of which those are members whose bits are set.
    pub fn insert(&mut self, key: u64, bits: u64) {
        match self.0.last_mut() {
            _ if bits == 0 => {}
            None => self.0.push((key, bits)),
            Some(last) if last.0 < key => self.0.push((key, bits)),
            Some(last) if last.0 == key => last.1 |= bits,
            Some(_) => match self.0.binary_search_by_key(&key, |(key, _)| *key) {
                Ok(at) => self.0[at].1 |= bits,
                Err(at) => self.0.insert(at, (key, bits)),
            },
        }
    }

    /// True if a number of this range, both ends included, is a member.
    pub fn meet(&self, first: u64, last: u64) -> bool {
        let from = self.0.partition_point(|(key, _)| *key < first >> 6);
        self.0[from..].iter().take_while(|(key, _)| *key <= last >> 6).any(|(key, bits)| {
            let above = if *key == first >> 6 { u64::MAX << (first & 63) } else { u64::MAX };
            let below = if *key == last >> 6 { u64::MAX >> (63 - (last & 63)) } else { u64::MAX };
            bits & above & below != 0
        })
    }

    fn add(&mut self, other: &Marks) {
        let (mut all, mut theirs) = (Vec::with_capacity(self.0.len() + other.0.len()), other.0.iter().peekable());
        for ours in &self.0 {
            while let Some(before) = theirs.next_if(|it| it.0 < ours.0) {
                all.push(*before);
            }
            let same = theirs.next_if(|it| it.0 == ours.0).map_or(0, |it| it.1);
            all.push((ours.0, ours.1 | same));
        }
        all.extend(theirs);
        all.shrink_to_fit();
        self.0 = all;
    }

    fn bytes(&self) -> usize {
        self.0.len() * size_of::<(u64, u64)>()
    }
}

/// Code that may have been executed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Code {
    /// Linear pages, and the guest-physical ones that they were.
    pages: BTreeSet<(u64, u64)>,
    /// Linear addresses of which it is not known what they were: their translation failed.
    nowhere: BTreeSet<u64>,
    /// Guest-physical addresses at which instructions began.
    pub starts: Marks,
}

impl Code {
    /// A linear page was this guest-physical one; both by any address in them.
    pub fn insert_page(&mut self, linear: u64, gpa: u64) {
        self.pages.insert((linear >> 12, gpa >> 12));
    }

    /// A fetch from there failed.
    pub fn insert_nowhere(&mut self, linear: u64) {
        self.nowhere.insert(linear);
    }

    /// Whether an instruction may have begun there; false is certain.
    pub fn may_contain(&self, linear: u64) -> bool {
        let page = linear >> 12;
        let mut pages = self.pages.range((page, 0)..=(page, u64::MAX));
        let executed = |gpa: u64| self.starts.meet(gpa, gpa);
        self.nowhere.contains(&linear) || pages.any(|(_, gpa)| executed(gpa << 12 | linear & 0xfff))
    }

    fn add(&mut self, other: &Code) {
        self.pages.extend(&other.pages);
        self.nowhere.extend(&other.nowhere);
        self.starts.add(&other.starts);
    }
}

/// Memory that may have been stored to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stored {
    /// Linear pages, and where the processor's stores to them went: RAM or a device.
    pages: BTreeSet<(u64, u64)>,
    /// Words: guest-physical addresses / 8.
    pub words: Marks,
}

impl Stored {
    /// Stores to a linear page would have gone to this guest-physical one; both by any address in them.
    pub fn insert_page(&mut self, linear: u64, gpa: u64) {
        self.pages.insert((linear >> 12, gpa >> 12));
    }

    fn in_page(&self, linear: u64) -> impl Iterator<Item = u64> + '_ {
        let page = linear >> 12;
        self.pages.range((page, 0)..=(page, u64::MAX)).map(|(_, gpa)| gpa << 12)
    }

    /// Whether any byte of these, which lie in one page, may have been stored to; false is certain.
    fn may_contain(&self, first: u64, last: u64) -> bool {
        self.in_page(first).any(|gpa| self.words.meet((gpa | first & 0xfff) >> 3, (gpa | last & 0xfff) >> 3))
    }

    fn add(&mut self, other: &Stored) {
        self.pages.extend(&other.pages);
        self.words.add(&other.words);
    }
}

/// What may have been used in a span.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Uses {
    /// Pages loaded from.
    pub read: Pages,
    /// Memory stored to.
    pub write: Stored,
    /// Code executed.
    pub execute: Code,
}

impl Uses {
    /// Bytes of host memory that they take, about.
    pub fn bytes(&self) -> usize {
        let Code { pages, nowhere, starts } = &self.execute;
        let sets = (pages.len() + self.write.pages.len()) * 24 + nowhere.len() * 12;
        WORDS * size_of::<u64>() + sets + starts.bytes() + self.write.words.bytes()
    }

    /// Those of two spans.
    pub fn add(&mut self, other: &Uses) {
        self.read.add(&other.read);
        self.write.add(&other.write);
        self.execute.add(&other.execute);
    }

    /// False if none of these stops can have been met, and that is certain.
    pub fn may_meet(&self, stops: &Stops) -> bool {
        let watched = stops.watchpoints.iter().any(|watch| self.may_use(watch));
        watched || stops.breakpoints.iter().any(|linear| self.execute.may_contain(*linear))
    }

    fn may_use(&self, watch: &Watchpoint) -> bool {
        let Some(last) = watch.bytes.checked_sub(1).map(|more| watch.address.saturating_add(more)) else {
            return false;
        };
        if watch.kind == WatchKind::PhysicalWrite {
            return self.write.words.meet(watch.address >> 3, last >> 3);
        }
        let pages = watch.address >> 12..=last >> 12;
        let used = |page: u64| {
            let (first, last) = (watch.address.max(page << 12), last.min(page << 12 | 0xfff));
            match watch.kind {
                WatchKind::Write => self.write.may_contain(first, last),
                // An instruction that loads and stores looks for the right to store only.
                WatchKind::Read | WatchKind::Access => {
                    self.read.may_contain(first) || self.write.in_page(first).next().is_some()
                }
                WatchKind::PhysicalWrite => false,
            }
        };
        pages.end() - pages.start() >= PAGES_MAX || pages.into_iter().any(used)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn watching(address: u64, bytes: u64, kind: WatchKind) -> Stops {
        Stops { breakpoints: Vec::new(), watchpoints: vec![Watchpoint { address, bytes, kind }] }
    }

    #[test]
    fn what_was_loaded_may_have_been_met_and_little_else() {
        let mut uses = Uses::default();
        for page in 0..3000u64 {
            uses.read.insert(0xffff_ffff_8100_0000 + page * 0x1000 + 5);
        }
        let at = |address| watching(address, 8, WatchKind::Read);
        assert!((0..3000u64).all(|page| uses.may_meet(&at(0xffff_ffff_8100_0000 + page * 0x1000 + 0x123))));
        let strangers = (0..3000u64).filter(|page| uses.may_meet(&at(0x5555_0000_0000 + page * 0x1000))).count();
        assert!(strangers < 100, "{strangers}");
    }

    #[test]
    fn code_is_known_by_its_instructions_whatever_it_was_called() {
        let at = |address| Stops { breakpoints: vec![address], watchpoints: Vec::new() };
        let mut uses = Uses::default();
        // One page of RAM by two names; it was executed by one of them, and nobody knows by which.
        uses.execute.insert_page(0x40_0123, 0x9000);
        uses.execute.insert_page(0x7000_0fff, 0x9000);
        uses.execute.insert_page(0x50_0000, 0xa000);
        uses.execute.starts.insert(0x9080 >> 6, 1 | 1 << 5 | 1 << 63);
        for (address, met) in [
            (0x40_0080, true),
            (0x40_0081, false),
            (0x40_0085, true),
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
        assert!(uses.may_meet(&at(0x9abc)), "a breakpoint is met before the fetch fails");
        let mut both = Uses::default();
        both.execute.starts.insert(0xa080 >> 6, 1 << 5);
        both.add(&uses);
        assert!(both.may_meet(&at(0x50_0085)) && both.bytes() > uses.bytes());
    }

    #[test]
    fn a_watched_range_is_stored_to_with_any_of_its_words() {
        let mut uses = Uses::default();
        uses.write.insert_page(0x7000, 0x2000);
        uses.write.insert_page(0x8000, 0x5000);
        // Bytes 0..8 of one page, the last eight of the other.
        uses.write.words.insert(0x2000 >> 9, 1);
        uses.write.words.insert(0x5e00 >> 9, 1 << 63);
        for (address, bytes, kind, met) in [
            (0x6ffc, 8, WatchKind::Write, true),
            (0x6ff8, 8, WatchKind::Write, false),
            (0x7000, 0, WatchKind::Write, false),
            (0x7007, 1, WatchKind::Write, true),
            (0x7008, 0xff8, WatchKind::Write, false),
            (0x7008, 0x1ff1, WatchKind::Write, true),
            (0x8ff8, 1, WatchKind::Write, true),
            (0x8ff0, 8, WatchKind::Write, false),
            (0x8ff0, 8, WatchKind::Read, true),
            (0x9ff0, 8, WatchKind::Access, false),
            (0, u64::MAX, WatchKind::Write, true),
            (0x7000, 8, WatchKind::PhysicalWrite, false),
            (0x2004, 4, WatchKind::PhysicalWrite, true),
            (0x2008, 0x3ff1, WatchKind::PhysicalWrite, true),
            (0x2008, 0x3ff0, WatchKind::PhysicalWrite, false),
        ] {
            assert_eq!(uses.may_meet(&watching(address, bytes, kind)), met, "{bytes} at {address:#x}, {kind:?}");
        }
        let mut both = Uses::default();
        both.read.insert(0x9000);
        both.add(&uses);
        assert!(both.may_meet(&watching(0x7007, 1, WatchKind::Write)) && both.read.may_contain(0x9fff));
    }

    proptest! {
        #[test]
        fn marks_know_their_members_and_no_others(
            first in proptest::collection::btree_set(0u64..1000, 0..40),
            second in proptest::collection::btree_set(0u64..1000, 0..40),
            asked in proptest::collection::vec((0u64..1000, 0u64..100), 50),
        ) {
            let of = |members: &BTreeSet<u64>| {
                let mut marks = Marks::default();
                // In no order that helps.
                members.iter().rev().for_each(|it| marks.insert(it >> 6, 1 << (it & 63)));
                marks
            };
            let mut marks = of(&first);
            marks.add(&of(&second));
            let all: BTreeSet<u64> = first.union(&second).copied().collect();
            prop_assert_eq!(&marks, &of(&all));
            for (from, more) in asked {
                prop_assert_eq!(marks.meet(from, from + more), all.range(from..=from + more).next().is_some());
            }
        }
    }
}

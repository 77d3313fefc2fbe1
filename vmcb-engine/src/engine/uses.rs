//! What may have been used: what a search for the last use of an address may pass over.
//!
//! A linear page is used by a translation that was cached before, or by one that was looked for. So the pages that were
//! cached at the beginning of a span, and those that were looked for in it, are all that can have been used in it. Of each it is
//! known which page of RAM it was; of that page which words (eight bytes each) were stored to, which lines (64 bytes each) were
//! loaded from, and where instructions began that may have been executed, by whatever linear address. Nothing of this can be
//! seen by the guest. What is searched is not known here, nor how it is gathered.

use std::collections::BTreeSet;

use super::stops::{Stops, WatchKind, Watchpoint};

/// Pages of a watched range that are looked at; a longer one may always have been used.
const PAGES_MAX: u64 = 64;

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

/// Memory that may have been loaded from or stored to, by pieces of `1 << SHIFT` bytes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Memory<const SHIFT: u32> {
    /// Linear pages, and where the processor's accesses to them went: RAM or a device.
    pages: BTreeSet<(u64, u64)>,
    /// Pieces: guest-physical addresses >> `SHIFT`.
    pub pieces: Marks,
}

/// Memory that may have been loaded from: lines of 64 bytes.
pub type Loaded = Memory<6>;
/// Memory that may have been stored to: words of eight bytes.
pub type Stored = Memory<3>;

impl<const SHIFT: u32> Memory<SHIFT> {
    /// Accesses to a linear page would have gone to this guest-physical one; both by any address in them.
    pub fn insert_page(&mut self, linear: u64, gpa: u64) {
        self.pages.insert((linear >> 12, gpa >> 12));
    }

    /// Bytes from one guest-physical address to another, both included, were used.
    pub fn insert(&mut self, first: u64, last: u64) {
        for piece in first >> SHIFT..=last >> SHIFT {
            self.pieces.insert(piece >> 6, 1 << (piece & 63));
        }
    }

    /// Whether any byte of these may have been used, by whatever linear address; false is certain.
    fn meets(&self, first: u64, last: u64) -> bool {
        self.pieces.meet(first >> SHIFT, last >> SHIFT)
    }

    /// Whether any byte of these, which lie in one linear page, may have been used; false is certain.
    fn may_contain(&self, first: u64, last: u64) -> bool {
        let page = first >> 12;
        let mut pages = self.pages.range((page, 0)..=(page, u64::MAX)).map(|(_, gpa)| gpa << 12);
        pages.any(|gpa| self.meets(gpa | first & 0xfff, gpa | last & 0xfff))
    }

    fn add(&mut self, other: &Self) {
        self.pages.extend(&other.pages);
        self.pieces.add(&other.pieces);
    }

    fn bytes(&self) -> usize {
        self.pages.len() * 24 + self.pieces.bytes()
    }
}

/// What may have been used in a span.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Uses {
    /// Memory loaded from.
    pub read: Loaded,
    /// Memory stored to.
    pub write: Stored,
    /// Code executed.
    pub execute: Code,
}

impl Uses {
    /// Bytes of host memory that they take, about.
    pub fn bytes(&self) -> usize {
        let Code { pages, nowhere, starts } = &self.execute;
        pages.len() * 24 + nowhere.len() * 12 + starts.bytes() + self.read.bytes() + self.write.bytes()
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
            return self.write.meets(watch.address, last);
        }
        let pages = watch.address >> 12..=last >> 12;
        let used = |page: u64| {
            let (first, last) = (watch.address.max(page << 12), last.min(page << 12 | 0xfff));
            match watch.kind {
                WatchKind::Write => self.write.may_contain(first, last),
                // An instruction that loads and stores looks for the right to store only.
                WatchKind::Read | WatchKind::Access => {
                    self.read.may_contain(first, last) || self.write.may_contain(first, last)
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
    fn a_watched_range_is_loaded_from_with_any_of_its_lines() {
        let mut uses = Uses::default();
        uses.read.insert_page(0x7000, 0x2000);
        uses.read.insert_page(0x9000, 0x2000);
        uses.read.insert_page(0x8000, 0xfed0_0000);
        // A line and the one behind it; the last byte of a device's page.
        uses.read.insert(0x207c, 0x2083);
        uses.read.insert(0xfed0_0fff, 0xfed0_0fff);
        // What loads and stores is noted as a store.
        uses.write.insert_page(0x7000, 0x2000);
        uses.write.insert(0x2800, 0x2807);
        for (address, bytes, met) in [
            (0x7040, 1, true),
            (0x70bf, 1, true),
            (0x703f, 1, false),
            (0x70c0, 0x100, false),
            (0x9080, 4, true),
            (0x8fc0, 1, true),
            (0x8fb0, 16, false),
            (0x8fb0, 17, true),
            (0x7804, 4, true),
            (0x7808, 8, false),
            (0xa040, 8, false),
        ] {
            for kind in [WatchKind::Read, WatchKind::Access] {
                assert_eq!(uses.may_meet(&watching(address, bytes, kind)), met, "{bytes} at {address:#x}");
            }
        }
        assert!(!uses.may_meet(&watching(0x7040, 8, WatchKind::Write)));
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
        uses.write.pieces.insert(0x2000 >> 9, 1);
        uses.write.pieces.insert(0x5e00 >> 9, 1 << 63);
        for (address, bytes, kind, met) in [
            (0x6ffc, 8, WatchKind::Write, true),
            (0x6ff8, 8, WatchKind::Write, false),
            (0x7000, 0, WatchKind::Write, false),
            (0x7007, 1, WatchKind::Write, true),
            (0x7008, 0xff8, WatchKind::Write, false),
            (0x7008, 0x1ff1, WatchKind::Write, true),
            (0x8ff8, 1, WatchKind::Write, true),
            (0x8ff0, 8, WatchKind::Write, false),
            (0x8ff0, 8, WatchKind::Read, false),
            (0x8ff8, 8, WatchKind::Read, true),
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
        both.read.insert_page(0x9000, 0x9000);
        both.read.insert(0x9000, 0x9007);
        both.add(&uses);
        assert!(both.may_meet(&watching(0x7007, 1, WatchKind::Write)));
        assert!(both.may_meet(&watching(0x9007, 1, WatchKind::Read)));
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

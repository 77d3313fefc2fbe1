//! What may have been used: what a search for the last use of an address may pass over.
//!
//! Loads and stores are known by the words (eight bytes each) of linear addresses that they touched, in whatever address
//! space: a watchpoint is on a linear address, too, so what the kernel copies by another name of the same page does not count.
//! What loads and stores is both. Of stores it is known besides which words of RAM they reached, also by the processor's own page
//! walks. Of code it is known where instructions began, by guest-physical address, and which of those pages a linear one may
//! have been: pages that were cached at the beginning of a span and those that were looked for in it. Nothing of this can
//! be seen by the guest. What is searched is not known here, nor how it is gathered.

use std::collections::BTreeSet;

use super::stops::{Stops, WatchKind, Watchpoint};

/// Words are this many bytes, as a power of two.
const WORD: u32 = 3;

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

/// Words of memory, by one kind of address.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Words(Marks);

impl Words {
    /// Adds 64 words that begin at address `key << 9`, of which those are members whose bits are set.
    pub fn insert(&mut self, key: u64, bits: u64) {
        self.0.insert(key, bits);
    }

    /// Whether any word of these bytes is among them.
    fn meets(&self, first: u64, last: u64) -> bool {
        self.0.meet(first >> WORD, last >> WORD)
    }
}

/// What may have been used in a span.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Uses {
    /// Linear addresses loaded from.
    pub loaded: Words,
    /// Linear addresses stored to.
    pub stored: Words,
    /// Guest-physical addresses stored to.
    pub reached: Words,
    /// Code executed.
    pub execute: Code,
}

impl Uses {
    /// Bytes of host memory that they take, about.
    pub fn bytes(&self) -> usize {
        let Uses { loaded, stored, reached, execute: Code { pages, nowhere, starts } } = self;
        let words = loaded.0.bytes() + stored.0.bytes() + reached.0.bytes();
        pages.len() * 24 + nowhere.len() * 12 + starts.bytes() + words
    }

    /// Those of two spans.
    pub fn add(&mut self, other: &Uses) {
        self.loaded.0.add(&other.loaded.0);
        self.stored.0.add(&other.stored.0);
        self.reached.0.add(&other.reached.0);
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
        match watch.kind {
            WatchKind::Read => self.loaded.meets(watch.address, last),
            WatchKind::Write => self.stored.meets(watch.address, last),
            WatchKind::Access => self.loaded.meets(watch.address, last) || self.stored.meets(watch.address, last),
            WatchKind::PhysicalWrite => self.reached.meets(watch.address, last),
        }
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
    fn a_watched_range_is_used_with_any_of_its_words_by_the_address_that_is_watched() {
        let mut uses = Uses::default();
        // Bytes 0..8 of a page are loaded from, the last eight of the next stored to, and both by other addresses too.
        uses.loaded.insert(0x7000 >> 9, 1);
        uses.stored.insert(0x8e00 >> 9, 1 << 63);
        uses.loaded.insert(0xffff_8000_0000_2000 >> 9, u64::MAX);
        uses.stored.insert(0xffff_8000_0000_5000 >> 9, u64::MAX);
        uses.reached.insert(0x5000 >> 9, u64::MAX);
        uses.reached.insert(0x5e00 >> 9, 1 << 63);
        for (address, bytes, kind, met) in [
            (0x6ffc, 8, WatchKind::Read, true),
            (0x6ff8, 8, WatchKind::Read, false),
            (0x7000, 0, WatchKind::Read, false),
            (0x7007, 1, WatchKind::Read, true),
            (0x7007, 1, WatchKind::Access, true),
            (0x7007, 1, WatchKind::Write, false),
            (0x7008, 0xff8, WatchKind::Access, false),
            (0x7008, 0x1ff0, WatchKind::Write, false),
            (0x7008, 0x1ff1, WatchKind::Write, true),
            (0x7008, 0x1ff1, WatchKind::Access, true),
            (0x7008, 0x1ff1, WatchKind::Read, false),
            (0x8ff8, 1, WatchKind::Write, true),
            (0x8ff0, 8, WatchKind::Write, false),
            (0x9ff0, 8, WatchKind::Access, false),
            (0, u64::MAX, WatchKind::Write, true),
            (0x5000, 8, WatchKind::Access, false),
            (0xffff_8000_0000_5000, 8, WatchKind::Access, true),
            (0x8ff8, 8, WatchKind::PhysicalWrite, false),
            (0x5004, 4, WatchKind::PhysicalWrite, true),
            (0x5200, 0xdf8, WatchKind::PhysicalWrite, false),
            (0x5200, 0xdf9, WatchKind::PhysicalWrite, true),
        ] {
            assert_eq!(uses.may_meet(&watching(address, bytes, kind)), met, "{bytes} at {address:#x}, {kind:?}");
        }
        let mut both = Uses::default();
        both.loaded.insert(0x9000 >> 9, 1);
        both.add(&uses);
        assert!(both.may_meet(&watching(0x7007, 1, WatchKind::Read)));
        assert!(both.may_meet(&watching(0x9007, 1, WatchKind::Read)));
        assert!(both.may_meet(&watching(0x5007, 1, WatchKind::PhysicalWrite)));
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

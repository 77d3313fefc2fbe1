//! What one processor notes of what it uses, for [`Uses`]; nothing before somebody asks.
//!
//! Code: each block is looked for again when it runs first in a span (`Blocks::hide`), and then the addresses of its
//! instructions are noted. Loads and stores: entries of the read and the write table carry a tag that no fast path knows
//! (`Tlb::note_accesses`), so each comes by here. What is marked is words of linear pages, in a small table from which a page
//! goes to a list when another one needs its place; and of stores words of pages of RAM besides, in a table as large as a 64th
//! of RAM of which only what is used takes memory. Which spans there are is not known here.

use std::collections::BTreeMap;

use super::block::Block;
use super::core::{Core, Step};
use super::decode::Fetched;
use super::tlb::Access;
use crate::engine::Uses;
use crate::engine::uses;
use crate::memory::GuestMemory;

/// Bit maps of a page's words.
const WORD_MAPS: usize = 8;
/// Linear pages whose words are at hand.
const AT_HAND: usize = 1024;
/// Entries of the list that are gathered, however few they were before.
const LISTED: usize = 1 << 14;

/// What was used since somebody asked.
pub struct Noting {
    uses: Uses,
    /// Instructions that began in a guest-physical page, a bit for each byte.
    starts: BTreeMap<u64, Box<[u64; 64]>>,
    words: Words,
    loaded: LinearWords,
    stored: LinearWords,
    /// Words of devices: key and bits of `Marks`.
    devices: BTreeMap<u64, u64>,
}

/// Maps of a linear page's words that were used.
#[derive(Clone, Copy, Default)]
struct LinearPage {
    number: u64,
    maps: [u64; WORD_MAPS],
}

/// Words of linear pages that were used.
struct LinearWords {
    /// Each page has one place.
    at_hand: Box<[LinearPage; AT_HAND]>,
    /// What had to make room: maps by the address of the first word >> 9. A map may be there in parts.
    listed: Vec<(u64, u64)>,
    /// Entries of the list at which the parts of each map are put together.
    gather_at: usize,
}

impl Default for LinearWords {
    fn default() -> Self {
        Self { at_hand: Box::new([LinearPage::default(); AT_HAND]), listed: Vec::new(), gather_at: LISTED }
    }
}

impl LinearWords {
    /// Marks bytes of a page.
    #[inline(always)]
    fn mark(&mut self, linear: u64, bytes: usize) {
        let page = linear >> 12;
        let place = page as usize % AT_HAND;
        if self.at_hand[place].number != page {
            self.make_room(place, page);
        }
        let maps = &mut self.at_hand[place].maps;
        let first = (linear & 0xfff) >> 3;
        let last = (((linear & 0xfff) + bytes.max(1) as u64 - 1) >> 3).min(511);
        let (low, high) = (u64::MAX << (first & 63), u64::MAX >> (63 - (last & 63)));
        let (begin, end) = ((first >> 6) as usize, (last >> 6) as usize);
        if begin == end {
            maps[begin] |= low & high;
        } else {
            maps[begin] |= low;
            maps[begin + 1..end].fill(u64::MAX);
            maps[end] |= high;
        }
    }

    #[cold]
    fn make_room(&mut self, place: usize, number: u64) {
        self.list(place);
        self.at_hand[place] = LinearPage { number, ..LinearPage::default() };
        if self.listed.len() >= self.gather_at {
            self.gather();
            self.gather_at = (2 * self.listed.len()).max(LISTED);
        }
    }

    fn list(&mut self, place: usize) {
        let LinearPage { number, maps } = self.at_hand[place];
        let keys = number * WORD_MAPS as u64..;
        self.listed.extend(keys.zip(maps).filter(|(_, map)| *map != 0));
    }

    /// Each map is in the list once, in order.
    fn gather(&mut self) {
        self.listed.sort_unstable();
        self.listed.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                kept.1 |= next.1;
            }
            same
        });
    }

    /// All of them; none are marked then.
    fn take(&mut self) -> uses::Words {
        (0..AT_HAND).for_each(|place| self.list(place));
        self.at_hand.fill(LinearPage::default());
        self.gather();
        self.gather_at = LISTED;
        let mut taken = uses::Words::default();
        std::mem::take(&mut self.listed).into_iter().for_each(|(key, map)| taken.insert(key, map));
        taken
    }
}

/// Words of RAM that were stored to.
#[derive(Default)]
struct Words {
    /// Eight maps for each page.
    maps: Vec<u64>,
    /// Pages whose maps are not all zero.
    touched: Vec<u64>,
}

impl Words {
    /// Marks bytes of a page that is touched.
    #[inline(always)]
    fn mark(&mut self, page: u64, address: u64, bytes: usize) {
        let first = (address & 0xfff) >> 3;
        let last = (((address & 0xfff) + bytes.max(1) as u64 - 1) >> 3).min(511);
        let from = page as usize * WORD_MAPS;
        let (low, high) = (u64::MAX << (first & 63), u64::MAX >> (63 - (last & 63)));
        let (begin, end) = (from + (first >> 6) as usize, from + (last >> 6) as usize);
        match self.maps.get_mut(begin) {
            Some(map) if begin == end => *map |= low & high,
            Some(map) => {
                *map |= low;
                self.mark_more(begin, end, high);
            }
            None => {}
        }
    }

    #[cold]
    fn mark_more(&mut self, begin: usize, end: usize, high: u64) {
        if let Some(maps) = self.maps.get_mut(begin + 1..=end) {
            let whole = maps.len() - 1;
            maps[..whole].fill(u64::MAX);
            maps[whole] |= high;
        }
    }

    fn touch(&mut self, page: u64) {
        let from = page as usize * WORD_MAPS;
        let maps = self.maps.get(from..from + WORD_MAPS);
        if maps.is_some_and(|maps| maps.iter().all(|map| *map == 0)) {
            self.touched.push(page);
        }
    }
}

impl Noting {
    fn new(memory: &GuestMemory) -> Self {
        let maps = vec![0; memory.pages() as usize * WORD_MAPS];
        let words = Words { maps, touched: Vec::new() };
        Self {
            uses: Uses::default(),
            starts: BTreeMap::new(),
            words,
            loaded: LinearWords::default(),
            stored: LinearWords::default(),
            devices: BTreeMap::new(),
        }
    }

    /// All of it; nothing is noted then.
    fn take(&mut self, memory: &GuestMemory) -> Uses {
        let mut uses = std::mem::take(&mut self.uses);
        for (page, lines) in std::mem::take(&mut self.starts) {
            (0..).zip(lines.iter()).for_each(|(line, bits)| uses.execute.starts.insert(page << 6 | line, *bits));
        }
        // RAM above the hole lies above it by number, too.
        self.words.touched.sort_unstable();
        for page in self.words.touched.drain(..) {
            let (first, from) = (memory.gpa_of(page) >> 9, page as usize * WORD_MAPS);
            for (key, map) in (first..).zip(&mut self.words.maps[from..from + WORD_MAPS]) {
                uses.reached.insert(key, std::mem::take(map));
            }
        }
        std::mem::take(&mut self.devices).into_iter().for_each(|(key, bits)| uses.reached.insert(key, bits));
        (uses.loaded, uses.stored) = (self.loaded.take(), self.stored.take());
        uses
    }
}

impl Core {
    /// What may have been used since this was asked last, between two runs. Every block is looked for again when it runs next,
    /// and every page when it is stored to.
    pub fn take_uses(&mut self) -> Option<Uses> {
        let known = self.noting.is_some();
        let mut noting = self.noting.take().unwrap_or_else(|| Box::new(Noting::new(&self.memory)));
        let taken = noting.take(&self.memory);
        let begun = &mut noting.uses;
        self.tlb.pages(Access::Execute).for_each(|found| begun.execute.insert_page(found.linear, found.gpa));
        self.tlb.note_accesses();
        self.returns.forget();
        self.blocks.hide();
        self.noting = Some(noting);
        known.then_some(taken)
    }

    /// What begins at a linear address was fetched, or was not.
    #[cold]
    pub(super) fn note_fetch(&mut self, linear: u64, fetched: &Step<Fetched>) {
        let Some(noting) = self.noting.as_deref_mut() else { return };
        let Ok(fetched) = fetched else { return noting.uses.execute.insert_nowhere(linear) };
        noting.uses.execute.insert_page(linear, fetched.gpa);
        // What begins there may go on in a page that is not there: then nothing is decoded.
        let lines = noting.starts.entry(fetched.gpa >> 12).or_insert_with(|| Box::new([0; 64]));
        lines[(fetched.gpa >> 6 & 63) as usize] |= 1 << (fetched.gpa & 63);
    }

    /// A block runs.
    pub(super) fn note_block(&mut self, block: &Block) {
        if let Some(noting) = self.noting.as_deref_mut() {
            noting.run(block);
        }
    }

    /// Bytes of a linear page are loaded from.
    #[inline]
    pub(super) fn note_load(&mut self, linear: u64, bytes: usize) {
        if let Some(noting) = self.noting.as_deref_mut() {
            noting.loaded.mark(linear, bytes);
        }
    }

    /// Where a load comes from that is to be noted and needs nothing besides; it is noted. Null if it needs more, or its page is
    /// not cached.
    #[cold]
    #[inline(never)]
    pub fn noted_source(&mut self, linear: u64, bytes: usize) -> *const u8 {
        let Some(noting) = self.noting.as_deref_mut() else { return std::ptr::null() };
        let Some(host) = self.tlb.noted_load(linear, self.tlb_set, bytes) else { return std::ptr::null() };
        noting.loaded.mark(linear, bytes);
        host
    }

    /// Bytes of a linear page are stored to.
    #[inline]
    pub(super) fn note_linear_store(&mut self, linear: u64, bytes: usize) {
        if let Some(noting) = self.noting.as_deref_mut() {
            noting.stored.mark(linear, bytes);
        }
    }

    /// A page of RAM is stored to, by whatever linear address.
    #[inline]
    pub(super) fn note_words(&mut self, page: u64, address: u64, bytes: usize) {
        if let Some(noting) = self.noting.as_deref_mut() {
            noting.words.touch(page);
            noting.words.mark(page, address, bytes);
        }
    }

    /// A device is stored to.
    #[inline]
    pub(super) fn note_device(&mut self, gpa: u64, bytes: usize) {
        let Some(noting) = self.noting.as_deref_mut() else { return };
        for word in gpa >> 3..=(gpa + bytes.max(1) as u64 - 1) >> 3 {
            *noting.devices.entry(word >> 6).or_default() |= 1 << (word & 63);
        }
    }

    /// Where a store goes that is to be noted and needs nothing besides; it is noted. Null if it needs more, or its page is
    /// not cached.
    #[cold]
    #[inline(never)]
    pub fn noted_host(&mut self, linear: u64, bytes: usize) -> *mut u8 {
        self.note_hit(linear, bytes)
    }

    /// The same in line.
    #[inline(always)]
    pub(super) fn note_hit(&mut self, linear: u64, bytes: usize) -> *mut u8 {
        let Some((host, page)) = self.tlb.noted(linear, self.tlb_set, bytes) else { return std::ptr::null_mut() };
        match self.noting.as_deref_mut() {
            Some(noting) => {
                noting.words.mark(page, linear, bytes);
                noting.stored.mark(linear, bytes);
            }
            None => return std::ptr::null_mut(),
        }
        host
    }
}

impl Noting {
    /// A block runs.
    pub(super) fn run(&mut self, block: &Block) {
        let lines = self.starts.entry(block.gpa >> 12).or_insert_with(|| Box::new([0; 64]));
        for op in block.ops.iter().take(block.count as usize) {
            let at = (block.gpa & 0xfff) + u64::from(op.offset);
            lines[(at >> 6 & 63) as usize] |= 1 << (at & 63);
        }
    }
}

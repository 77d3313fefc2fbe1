//! The software TLB: three direct-mapped tables (read, write, execute), each in two sets (supervisor, user).
//!
//! An entry holds a tag (the linear page) and an addend (host address minus linear address; for code guest-physical minus
//! linear, since blocks are found by that), so a hit costs one compare.
//! What must be seen is kept out of the write table: pages not yet dirty in the guest's page tables, pages not stamped in
//! this epoch (the tag is marked [`REARM`], the translation kept), pages with decoded code, and everything not RAM. Watched
//! pages are marked in the same way, in the read table too. Where loads and stores are noted, entries that would be fast are
//! marked [`NOTED`] instead, which no fast path knows.
//!
//! Geometry and replacement are guest-visible through stale translations (a guest that changes a table and does not flush
//! may see the old one as long as it is cached), so they belong to the engine's semantics. [`Tlb::halve`] makes tables that
//! behave as smaller ones, for tests that show that nothing else depends on them.
#![allow(unsafe_code, reason = "hot path: a slot is read by address, without a look at which set is in use")]

use super::block::lines_of;

/// Entries of one table and set.
pub const ENTRIES: usize = 1024;
/// Most halvings: four entries are left.
pub const HALVINGS_MAX: u32 = 8;
/// Never the page of anything.
const EMPTY: u64 = u64::MAX;
/// The translation is good but the page must be stamped before the next write.
const REARM: u64 = 1;
/// An access needs nothing but to be noted.
const NOTED: u64 = 2;
const PAGE_MASK: u64 = !0xfff;

/// Plain values that guest memory holds.
pub trait Word: Copy + 'static {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}
impl Word for u128 {}

/// One translation.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Entry {
    tag: u64,
    addend: u64,
}

impl Entry {
    const NONE: Entry = Entry { tag: EMPTY, addend: 0 };

    /// True if all of an access of a `T` lies in this entry's page. The slot was chosen by the first byte; if the access
    /// crosses into the next page, its last byte's page cannot have the tag of this slot.
    #[inline(always)]
    pub fn hits<T: Word>(self, linear: u64) -> bool {
        linear.wrapping_add(size_of::<T>() as u64 - 1) & PAGE_MASK == self.tag
    }

    /// Host address of a linear address that hits.
    #[inline(always)]
    pub fn host<T: Word>(self, linear: u64) -> *mut T {
        linear.wrapping_add(self.addend) as *mut T
    }
}

/// What else is known of a translation, kept beside the hot entries.
#[derive(Clone, Copy, Default)]
struct Extra {
    page: u64,
    gpa: u64,
    host: u64,
    global: bool,
}

/// Entries of both sets of one table: the distance from a table's entry to the same entry of the next.
const TABLE: usize = 2 * ENTRIES;

/// All tables of one processor.
#[repr(C)]
pub struct Tlb {
    read: [Entry; 2 * ENTRIES],
    write: [Entry; 2 * ENTRIES],
    execute: [Entry; 2 * ENTRIES],
    read_extra: [Extra; 2 * ENTRIES],
    write_extra: [Extra; 2 * ENTRIES],
    execute_extra: [Extra; 2 * ENTRIES],
    /// Each table behaves as if it had so many times half the entries.
    halvings: u32,
    /// Loads and stores are noted: no entry of the read and the write table is fast.
    notes: bool,
}

/// A translation as the walker found it.
#[derive(Clone, Copy, Debug)]
pub struct Translation {
    /// Host address of the page.
    pub host: *mut u8,
    /// Page number of RAM.
    pub page: u64,
    /// Guest-physical address of the page.
    pub gpa: u64,
    /// Survives CR3 loads.
    pub global: bool,
}

/// A page that a table has.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Linear address.
    pub linear: u64,
    /// Guest-physical address.
    pub gpa: u64,
    /// Page number of RAM.
    pub page: u64,
}

/// A translation as it is kept outside of the TLB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cached {
    /// Table, set and slot.
    at: u16,
    /// Survives CR3 loads.
    global: bool,
    /// Linear address of the page.
    linear: u64,
    /// Guest-physical address of the page.
    gpa: u64,
    /// Page number of RAM.
    page: u64,
}

/// Which table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Data load.
    Read,
    /// Data store.
    Write,
    /// Instruction fetch.
    Execute,
}

#[inline(always)]
fn slot(linear: u64, set: usize) -> usize {
    ((linear >> 12) as usize & (ENTRIES - 1)) + set
}

impl Tlb {
    /// An empty TLB.
    pub fn new() -> Box<Self> {
        Box::new(Self {
            read: [Entry::NONE; 2 * ENTRIES],
            write: [Entry::NONE; 2 * ENTRIES],
            execute: [Entry::NONE; 2 * ENTRIES],
            read_extra: [Extra::default(); 2 * ENTRIES],
            write_extra: [Extra::default(); 2 * ENTRIES],
            execute_extra: [Extra::default(); 2 * ENTRIES],
            halvings: 0,
            notes: false,
        })
    }

    /// Makes each table behave as if it had half the entries, so many times; 8 at most, since two pages that follow each
    /// other must not share a slot. For an empty TLB.
    pub fn halve(&mut self, halvings: u32) {
        self.halvings = halvings.min(HALVINGS_MAX);
    }

    /// Address of a set's entries: what [`Tlb::read_entry`] and its like take. Right as long as the TLB stays in its box.
    pub fn base(&self, set: usize) -> usize {
        &raw const self.read as usize + set * size_of::<Entry>()
    }

    #[inline(always)]
    fn entry<const NUMBER: usize>(base: usize, linear: u64) -> Entry {
        let at = (linear >> 12) as usize & (ENTRIES - 1);
        // SAFETY: `base` is of `Tlb::base` (core.rs keeps the TLB in its box), so this is an entry of one of the three
        // tables, which follow each other (`repr(C)`).
        unsafe { *(base as *const Entry).add(NUMBER * TABLE + at) }
    }

    /// The slot for a load.
    #[inline(always)]
    pub fn read_entry(base: usize, linear: u64) -> Entry {
        Self::entry::<0>(base, linear)
    }

    /// The slot for a store.
    #[inline(always)]
    pub fn write_entry(base: usize, linear: u64) -> Entry {
        Self::entry::<1>(base, linear)
    }

    /// Guest-physical address of code at `linear`, if its translation is cached.
    #[inline(always)]
    pub fn code_gpa(base: usize, linear: u64) -> Option<u64> {
        let entry = Self::entry::<2>(base, linear);
        (entry.tag == linear & PAGE_MASK).then_some(linear.wrapping_add(entry.addend))
    }

    /// The cached translation for a data write that only waits to be stamped again.
    pub fn rearmed(&mut self, linear: u64, set: usize) -> Option<Translation> {
        let at = slot(linear, set);
        (self.write[at].tag == linear & PAGE_MASK | REARM).then(|| {
            let extra = self.write_extra[at];
            Translation { host: extra.host as *mut u8, page: extra.page, gpa: extra.gpa, global: extra.global }
        })
    }

    /// Any cached translation of `linear` for a data read or a write: used by slow paths (crossing, unaligned).
    pub fn cached(&self, linear: u64, set: usize, access: Access) -> Option<Translation> {
        let at = slot(linear, set);
        let (entry, extra) = match access {
            Access::Read => (self.read[at], self.read_extra[at]),
            Access::Write => (self.write[at], self.write_extra[at]),
            Access::Execute => (self.execute[at], self.execute_extra[at]),
        };
        // Reads of watched pages are marked as writes are that wait to be stamped.
        let tag = match access {
            Access::Read => entry.tag & !(REARM | NOTED),
            Access::Write => entry.tag & !NOTED,
            Access::Execute => entry.tag,
        };
        (tag == linear & PAGE_MASK).then_some(Translation {
            host: extra.host as *mut u8,
            page: extra.page,
            gpa: extra.gpa,
            global: extra.global,
        })
    }

    /// Adds a translation.
    pub fn insert(&mut self, linear: u64, set: usize, access: Access, found: Translation) {
        let at = slot(linear, set);
        let page = linear & PAGE_MASK;
        let (host, gpa) = (found.host as u64, found.gpa & PAGE_MASK);
        let base = if access == Access::Execute { gpa } else { host };
        let noted = if self.notes && access != Access::Execute { NOTED } else { 0 };
        let (entries, extras) = self.table(access);
        entries[at] = Entry { tag: page | noted, addend: base.wrapping_sub(page) };
        extras[at] = Extra { page: found.page, gpa, host, global: found.global };
        if self.halvings > 0 {
            self.empty_twins(at, access);
        }
    }

    /// Empties the slots that would be this one if the tables were smaller.
    #[cold]
    fn empty_twins(&mut self, at: usize, access: Access) {
        let step = ENTRIES >> self.halvings;
        let (set, slot) = (at / ENTRIES * ENTRIES, at % ENTRIES);
        let (entries, _) = self.table(access);
        for twin in (slot % step..ENTRIES).step_by(step).filter(|twin| *twin != slot) {
            entries[set + twin] = Entry::NONE;
        }
    }

    /// Adds a translation that only the slow path uses: for writes, the next one completes it and stamps the page.
    pub fn insert_armed(&mut self, linear: u64, set: usize, access: Access, found: Translation) {
        self.insert(linear, set, access, found);
        let (entries, _) = self.table(access);
        entries[slot(linear, set)].tag = linear & PAGE_MASK | REARM;
    }

    /// Loads from these pages go through the slow path, with their translations kept.
    pub fn arm_reads(&mut self, is_watched: impl Fn(u64) -> bool) {
        let watched = self.read.iter_mut().filter(|entry| entry.tag != EMPTY && is_watched(entry.tag & PAGE_MASK));
        watched.for_each(|entry| entry.tag = entry.tag & PAGE_MASK | REARM);
    }

    /// The pages of a table.
    pub fn pages(&self, access: Access) -> impl Iterator<Item = Held> {
        let (entries, extras) = match access {
            Access::Read => (&self.read, &self.read_extra),
            Access::Write => (&self.write, &self.write_extra),
            Access::Execute => (&self.execute, &self.execute_extra),
        };
        let filled = entries.iter().zip(extras).filter(|(entry, _)| entry.tag != EMPTY);
        filled.map(|(entry, extra)| Held { linear: entry.tag & PAGE_MASK, gpa: extra.gpa, page: extra.page })
    }

    /// Every translation. By which path it is used is left out: two processors that agree here cannot be told apart by
    /// their guests.
    pub fn contents(&self) -> Vec<Cached> {
        let tables =
            [(&self.read, &self.read_extra), (&self.write, &self.write_extra), (&self.execute, &self.execute_extra)];
        let all = tables.into_iter().flat_map(|(entries, extras)| entries.iter().zip(extras));
        let found = all.enumerate().filter(|(_, (entry, _))| entry.tag != EMPTY);
        let cached = |(at, (entry, extra)): (usize, (&Entry, &Extra))| Cached {
            at: at as u16,
            global: extra.global,
            linear: entry.tag & PAGE_MASK,
            gpa: extra.gpa,
            page: extra.page,
        };
        found.map(cached).collect()
    }

    /// Makes the contents these and no others. Each write is stamped again; no read is watched. `host_of` finds the host
    /// address of a page of RAM; what it does not find is forgotten.
    pub fn replace(&mut self, contents: &[Cached], host_of: impl Fn(u64) -> Option<*mut u8>) {
        self.flush();
        for cached in contents {
            let Cached { at, global, linear, gpa, page } = *cached;
            let (table, set) = (usize::from(at) / TABLE, usize::from(at) % TABLE / ENTRIES * ENTRIES);
            let access = match table {
                0 => Access::Read,
                1 => Access::Write,
                _ => Access::Execute,
            };
            if let Some(host) = host_of(page) {
                self.insert(linear, set, access, Translation { host, page, gpa, global });
            }
        }
        self.rearm();
    }

    /// All loads are as fast again as they may be.
    pub fn disarm_reads(&mut self) {
        let noted = if self.notes { NOTED } else { 0 };
        let filled = self.read.iter_mut().filter(|entry| entry.tag != EMPTY);
        filled.for_each(|entry| entry.tag = entry.tag & PAGE_MASK | noted);
    }

    /// Guest-physical address and number of the page of code at `linear`, in either set.
    pub fn code_pages(&self, linear: u64) -> [Option<(u64, u64)>; 2] {
        let in_set = |set| self.cached(linear, set, Access::Execute).map(|found| (found.gpa, found.page));
        [in_set(0), in_set(ENTRIES)]
    }

    fn table(&mut self, access: Access) -> (&mut [Entry; 2 * ENTRIES], &mut [Extra; 2 * ENTRIES]) {
        match access {
            Access::Read => (&mut self.read, &mut self.read_extra),
            Access::Write => (&mut self.write, &mut self.write_extra),
            Access::Execute => (&mut self.execute, &mut self.execute_extra),
        }
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        self.read.fill(Entry::NONE);
        self.write.fill(Entry::NONE);
        self.execute.fill(Entry::NONE);
    }

    /// Forgets what is not global: a load of CR3.
    pub fn flush_local(&mut self) {
        for access in [Access::Read, Access::Write, Access::Execute] {
            let (entries, extras) = self.table(access);
            for (entry, extra) in entries.iter_mut().zip(extras.iter()) {
                if !extra.global {
                    *entry = Entry::NONE;
                }
            }
        }
    }

    /// Forgets one page: INVLPG.
    pub fn flush_page(&mut self, linear: u64) {
        for set in [0, ENTRIES] {
            let at = slot(linear, set);
            for access in [Access::Read, Access::Write, Access::Execute] {
                let (entries, _) = self.table(access);
                if entries[at].tag & PAGE_MASK == linear & PAGE_MASK {
                    entries[at] = Entry::NONE;
                }
            }
        }
    }

    /// The epoch of stamps advanced: every write goes through the slow path once, with its translation kept.
    pub fn rearm(&mut self) {
        for entry in &mut self.write {
            if entry.tag != EMPTY {
                entry.tag = entry.tag & PAGE_MASK | REARM;
            }
        }
    }

    /// Each load and each store is noted from now on, and the stores of each page anew.
    pub fn note_accesses(&mut self) {
        self.notes = true;
        self.rearm();
        let fast = self.read.iter_mut().filter(|entry| entry.tag & !PAGE_MASK == 0);
        fast.for_each(|entry| entry.tag |= NOTED);
    }

    /// Host address of bytes that lie in one page, if loads there need nothing but to be noted.
    #[inline(always)]
    pub fn noted_load(&self, linear: u64, set: usize, bytes: usize) -> Option<*const u8> {
        noted_in(self.read[slot(linear, set)], linear, bytes).map(<*mut u8>::cast_const)
    }

    /// Host address and page of RAM of bytes that lie in one page, if stores there need nothing but to be noted.
    #[inline(always)]
    pub fn noted(&self, linear: u64, set: usize, bytes: usize) -> Option<(*mut u8, u64)> {
        let at = slot(linear, set);
        noted_in(self.write[at], linear, bytes).map(|host| (host, self.write_extra[at].page))
    }

    /// A page of RAM got decoded code: writes to it must be seen from now on.
    pub fn protect_code(&mut self, page: u64) {
        for (entry, extra) in self.write.iter_mut().zip(&self.write_extra) {
            if extra.page == page && entry.tag != EMPTY {
                entry.tag = entry.tag & PAGE_MASK | REARM;
            }
        }
    }
}

/// Where bytes lie by an entry, if it is marked [`NOTED`] and has all of them.
#[inline(always)]
fn noted_in(entry: Entry, linear: u64, bytes: usize) -> Option<*mut u8> {
    let last = linear.wrapping_add(bytes as u64 - 1) & PAGE_MASK;
    (last | NOTED == entry.tag).then(|| linear.wrapping_add(entry.addend) as *mut u8)
}

/// Lines of decoded code that a write of `bytes` at `gpa` touches.
pub fn written_lines(gpa: u64, bytes: usize) -> u64 {
    lines_of(gpa & 0xfff, bytes)
}

//! The software TLB: three direct-mapped tables (read, write, execute), each in two sets (supervisor, user).
//!
//! An entry holds a tag (the linear page) and an addend (host address minus linear address), so a hit costs one compare.
//! What must be seen is kept out of the write table: pages not yet dirty in the guest's page tables, pages not stamped in
//! this epoch (the tag is marked [`REARM`], the translation kept), pages with decoded code, and everything not RAM.
//!
//! Geometry and replacement are guest-visible through stale translations, so they belong to the engine's semantics.

use super::block::lines_of;

/// Entries of one table and set.
pub const ENTRIES: usize = 1024;
/// Never the page of anything.
const EMPTY: u64 = u64::MAX;
/// The translation is good but the page must be stamped before the next write.
const REARM: u64 = 1;
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
    global: bool,
}

/// All tables of one processor.
pub struct Tlb {
    read: [Entry; 2 * ENTRIES],
    write: [Entry; 2 * ENTRIES],
    execute: [Entry; 2 * ENTRIES],
    read_extra: [Extra; 2 * ENTRIES],
    write_extra: [Extra; 2 * ENTRIES],
    execute_extra: [Extra; 2 * ENTRIES],
    /// Raised whenever a translation of code may have changed: caches keyed by linear RIP carry it.
    pub map_epoch: u32,
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
            map_epoch: 1,
        })
    }

    /// The slot for a load.
    #[inline(always)]
    pub fn read_entry(&self, linear: u64, set: usize) -> Entry {
        self.read[slot(linear, set) & (2 * ENTRIES - 1)]
    }

    /// The slot for a store.
    #[inline(always)]
    pub fn write_entry(&self, linear: u64, set: usize) -> Entry {
        self.write[slot(linear, set) & (2 * ENTRIES - 1)]
    }

    /// Guest-physical address of code at `linear`, if its translation is cached.
    #[inline]
    pub fn code_gpa(&self, linear: u64, set: usize) -> Option<u64> {
        let at = slot(linear, set);
        (self.execute[at].tag == linear & PAGE_MASK).then(|| self.execute_extra[at].gpa | linear & !PAGE_MASK)
    }

    /// Host address of code at `linear`, if its translation is cached.
    #[inline]
    pub fn code_host(&self, linear: u64, set: usize) -> Option<*const u8> {
        let entry = self.execute[slot(linear, set)];
        (entry.tag == linear & PAGE_MASK).then(|| entry.host::<u8>(linear) as *const u8)
    }

    /// The cached translation for a data write that only waits to be stamped again.
    pub fn rearmed(&mut self, linear: u64, set: usize) -> Option<Translation> {
        let at = slot(linear, set);
        (self.write[at].tag == linear & PAGE_MASK | REARM).then(|| {
            let extra = self.write_extra[at];
            let host = (linear & PAGE_MASK).wrapping_add(self.write[at].addend) as *mut u8;
            Translation { host, page: extra.page, gpa: extra.gpa, global: extra.global }
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
        (entry.tag == linear & PAGE_MASK).then(|| Translation {
            host: (linear & PAGE_MASK).wrapping_add(entry.addend) as *mut u8,
            page: extra.page,
            gpa: extra.gpa,
            global: extra.global,
        })
    }

    /// Adds a translation.
    pub fn insert(&mut self, linear: u64, set: usize, access: Access, found: Translation) {
        let at = slot(linear, set);
        let page = linear & PAGE_MASK;
        let entry = Entry { tag: page, addend: (found.host as u64).wrapping_sub(page) };
        let extra = Extra { page: found.page, gpa: found.gpa & PAGE_MASK, global: found.global };
        let (entries, extras) = self.table(access);
        let evicts = entries[at].tag != EMPTY && entries[at].tag != page;
        entries[at] = entry;
        extras[at] = extra;
        if access == Access::Execute && evicts {
            // What is found by RIP must not outlive its translation, or where a run is cut would be visible.
            self.map_epoch = self.map_epoch.wrapping_add(1);
        }
    }

    /// Adds a translation for writes that the next write completes: it is stamped then.
    pub fn insert_armed(&mut self, linear: u64, set: usize, found: Translation) {
        self.insert(linear, set, Access::Write, found);
        self.write[slot(linear, set)].tag |= REARM;
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
        self.map_epoch = self.map_epoch.wrapping_add(1);
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
        self.map_epoch = self.map_epoch.wrapping_add(1);
    }

    /// Forgets one page: INVLPG.
    pub fn flush_page(&mut self, linear: u64) {
        for set in [0, ENTRIES] {
            let at = slot(linear, set);
            for access in [Access::Read, Access::Write, Access::Execute] {
                let (entries, _) = self.table(access);
                if entries[at].tag & !REARM == linear & PAGE_MASK {
                    entries[at] = Entry::NONE;
                }
            }
        }
        self.map_epoch = self.map_epoch.wrapping_add(1);
    }

    /// The epoch of stamps advanced: every write goes through the slow path once, with its translation kept.
    pub fn rearm(&mut self) {
        for entry in &mut self.write {
            if entry.tag != EMPTY {
                entry.tag |= REARM;
            }
        }
    }

    /// A page of RAM got decoded code: writes to it must be seen from now on.
    pub fn protect_code(&mut self, page: u64) {
        for (entry, extra) in self.write.iter_mut().zip(&self.write_extra) {
            if extra.page == page && entry.tag != EMPTY {
                entry.tag |= REARM;
            }
        }
    }
}

/// Lines of decoded code that a write of `bytes` at `gpa` touches.
pub fn written_lines(gpa: u64, bytes: usize) -> u64 {
    lines_of(gpa & 0xfff, bytes)
}

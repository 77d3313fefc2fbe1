//! Guest-physical to system-physical: the nested page tables that N_CR3 names (APM2 15.25), and a small cache of pages.
//!
//! Nested tables are walked as a user access in four-level long-mode format; accessed and dirty bits are set as hardware
//! does. Without nested paging (a processor without a guest) guest-physical is system-physical. The cache holds pages of
//! RAM only; it is emptied with the guest's TLB.
#![allow(unsafe_code, reason = "page tables in guest RAM are read and written through the host address of their page")]

use crate::engine::soft::core::Core;
use crate::vmcb::exit::npf;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Address bits of an entry: this processor has 48 physical address bits.
pub const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
/// Address bits that an entry may not use.
pub const ADDRESS_RESERVED: u64 = 0x000f_0000_0000_0000;
const ENTRIES: usize = 512;
const NO_PAGE: u64 = u64::MAX;

/// A page of guest-physical memory that is RAM.
#[derive(Clone, Copy, Debug)]
pub struct RamPage {
    /// Host address of its first byte, as a number: what holds these may move between threads.
    pub host: u64,
    /// Page number of RAM.
    pub page: u64,
}

impl RamPage {
    /// Host address of a byte of the page.
    #[inline]
    pub fn at(self, offset: u64) -> *mut u8 {
        (self.host + (offset & 0xfff)) as *mut u8
    }
}

/// What a guest-physical address is needed for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Data load.
    Read,
    /// Data store.
    Write,
    /// Instruction fetch.
    Fetch,
    /// An entry of a guest page table: a write at the nested level (APM2 15.25.6).
    Table,
}

/// EXITINFO1 of a nested page fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NestedFault(pub u64);

#[derive(Clone, Copy)]
struct Entry {
    gpa: u64,
    page: RamPage,
    writable: bool,
    executable: bool,
}

/// Nested paging of the loaded guest.
pub struct Nested {
    enabled: bool,
    root: u64,
    entries: Box<[Entry; ENTRIES]>,
}

impl Default for Nested {
    fn default() -> Self {
        let none = Entry { gpa: NO_PAGE, page: RamPage { host: 0, page: 0 }, writable: false, executable: false };
        Self { enabled: false, root: 0, entries: Box::new([none; ENTRIES]) }
    }
}

impl Nested {
    /// Uses these tables from now on. True if they are other ones than before.
    pub fn select(&mut self, root: Option<u64>) -> bool {
        let (enabled, root) = (root.is_some(), root.unwrap_or(0) & ADDRESS);
        let changed = (enabled, root) != (self.enabled, self.root);
        if changed {
            self.flush();
        }
        (self.enabled, self.root) = (enabled, root);
        changed
    }

    /// True if a guest with nested paging is loaded.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// The tables in use; `None` without nested paging.
    pub fn root(&self) -> Option<u64> {
        self.enabled.then_some(self.root)
    }

    /// Forgets all translations.
    pub fn flush(&mut self) {
        for entry in self.entries.iter_mut() {
            entry.gpa = NO_PAGE;
        }
    }
}

impl Core {
    /// The RAM page that a guest-physical address lies in.
    ///
    /// # Errors
    /// It is not mapped for this purpose by the nested tables, or not RAM.
    #[inline]
    pub fn ram_page(&mut self, gpa: u64, purpose: Purpose) -> Result<RamPage, NestedFault> {
        let page = gpa & !0xfff;
        let entry = &self.nested.entries[(gpa >> 12) as usize & (ENTRIES - 1)];
        let allowed = match purpose {
            Purpose::Read => true,
            Purpose::Write | Purpose::Table => entry.writable,
            Purpose::Fetch => entry.executable,
        };
        if entry.gpa == page && allowed { Ok(entry.page) } else { self.ram_page_slow(gpa, purpose) }
    }

    #[cold]
    fn ram_page_slow(&mut self, gpa: u64, purpose: Purpose) -> Result<RamPage, NestedFault> {
        let (system, writable, executable) =
            if self.nested.enabled { self.nested_walk(gpa, purpose)? } else { (gpa, true, true) };
        let Some((host, page)) = self.memory.host_page(system) else {
            return Err(fault(purpose, 0));
        };
        let page = RamPage { host: host as u64, page };
        self.nested.entries[(gpa >> 12) as usize & (ENTRIES - 1)] =
            Entry { gpa: gpa & !0xfff, page, writable, executable };
        Ok(page)
    }

    /// System-physical address, may write (the dirty bit is set already), may execute.
    fn nested_walk(&mut self, gpa: u64, purpose: Purpose) -> Result<(u64, bool, bool), NestedFault> {
        let write = matches!(purpose, Purpose::Write | Purpose::Table);
        let (mut table, mut writable, mut executable) = (self.nested.root, true, true);
        let mut path = [(0, 0); 4];
        for (depth, level) in (0..4_u32).rev().enumerate() {
            let at = table + (gpa >> (12 + 9 * level) & 0x1ff) * 8;
            let entry = self.system_u64(at).unwrap_or(0);
            path[depth] = (at, entry);
            if entry & PRESENT == 0 {
                return Err(fault(purpose, 0));
            }
            let leaf = level == 0 || (level < 3 && entry & LARGE != 0);
            let reserved = match level {
                3 => ADDRESS_RESERVED | LARGE,
                1 | 2 if leaf => ADDRESS_RESERVED | ((1 << (12 + 9 * level)) - 1) & !0x1fff,
                _ => ADDRESS_RESERVED,
            };
            if entry & reserved != 0 {
                return Err(fault(purpose, npf::PRESENT.mask() | npf::RESERVED.mask()));
            }
            writable &= entry & WRITABLE != 0;
            executable &= entry & NO_EXECUTE == 0;
            let refused = entry & USER == 0 || (write && !writable) || (purpose == Purpose::Fetch && !executable);
            if refused {
                return Err(fault(purpose, npf::PRESENT.mask()));
            }
            if leaf {
                let mask = (1 << (12 + 9 * level)) - 1;
                let dirty = self.nested_mark(&path[..=depth], write);
                return Ok((entry & ADDRESS & !mask | gpa & mask, writable && dirty, executable));
            }
            table = entry & ADDRESS;
        }
        Err(fault(purpose, 0))
    }

    /// Sets accessed bits on the path and, for a write, the leaf's dirty bit. True if the leaf is dirty now.
    fn nested_mark(&mut self, path: &[(u64, u64)], write: bool) -> bool {
        let mut dirty = false;
        for (index, (at, entry)) in path.iter().enumerate() {
            let leaf = index + 1 == path.len();
            let marked = entry | ACCESSED | if leaf && write { DIRTY } else { 0 };
            if marked != *entry {
                self.set_system_u64(*at, marked);
            }
            dirty = leaf && marked & DIRTY != 0;
        }
        dirty
    }

    /// Eight aligned bytes of system-physical memory, if there is any.
    pub fn system_u64(&self, address: u64) -> Option<u64> {
        if let Some(value) = self.arena.read_u64(address) {
            return Some(value);
        }
        let (host, _) = self.memory.host_page(address)?;
        // SAFETY: host_page's page is mapped as long as `self.memory` lives; the offset is aligned and within it.
        Some(unsafe { host.add((address & 0xff8) as usize).cast::<u64>().read() })
    }

    /// One byte of system-physical memory, if there is any.
    pub fn system_u8(&self, address: u64) -> Option<u8> {
        if let Some(value) = self.arena.read_u8(address) {
            return Some(value);
        }
        let (host, _) = self.memory.host_page(address)?;
        // SAFETY: as above.
        Some(unsafe { host.add((address & 0xfff) as usize).read() })
    }

    /// Writes eight aligned bytes of system-physical memory, if there is any.
    pub fn set_system_u64(&mut self, address: u64, value: u64) {
        if self.arena.write_u64(address, value).is_some() {
            return;
        }
        if let Some((host, page)) = self.memory.host_page(address) {
            self.memory.keep(page);
            // SAFETY: as above.
            unsafe { host.add((address & 0xff8) as usize).cast::<u64>().write(value) };
            self.page_written(page, address, 8);
        }
    }
}

/// EXITINFO1: always a user access; where the walk failed follows from the purpose.
fn fault(purpose: Purpose, bits: u64) -> NestedFault {
    let bits = bits | npf::USER.mask();
    NestedFault(match purpose {
        Purpose::Read => bits | npf::FINAL.mask(),
        Purpose::Write => bits | npf::WRITE.mask() | npf::FINAL.mask(),
        Purpose::Fetch => bits | npf::FETCH.mask() | npf::FINAL.mask(),
        Purpose::Table => bits | npf::WRITE.mask() | npf::GUEST_TABLE.mask(),
    })
}

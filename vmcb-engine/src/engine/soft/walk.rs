//! Linear to guest-physical: the page walk (APM2 chapter 5), and every memory access that the TLB did not answer.
//!
//! Accessed and dirty bits are set by the access that the architecture says sets them, never by a speculative fill: the
//! write table holds only pages whose dirty bit is set. An access that crosses pages is translated whole before its first
//! byte moves. Decoded code, page stamps and devices are noticed here and nowhere else.
//!
//! Not raised: violations of data segment limits.
#![allow(unsafe_code, reason = "guest RAM is reached through host addresses of its pages")]

use std::mem::MaybeUninit;

use super::core::{CS, Core, Fault, Step, Stop, rflags};
use super::decode::Fetched;
use super::stops::Use;
use super::svm::nested::{ADDRESS, ADDRESS_RESERVED, NestedFault, Purpose, RamPage};
use super::tlb::{Access, Translation, Word, written_lines};
use crate::addr::is_canonical;
use crate::vmcb::ExitCode;
use crate::vmcb::registers::{cr0, cr4, efer};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;

/// Bits of a #PF error code (APM2 8.4.2).
mod pf {
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

/// What a linear address leads to.
#[derive(Clone, Copy)]
enum Target {
    Ram(Translation),
    /// Guest-physical address of the first byte.
    Device(u64),
}

impl Target {
    /// Guest-physical address of `linear`, which led here.
    fn gpa(self, linear: u64) -> u64 {
        match self {
            Target::Ram(found) => found.gpa & !0xfff | linear & 0xfff,
            Target::Device(gpa) => gpa,
        }
    }
}

/// What the guest's tables say of a page.
struct Mapping {
    gpa: u64,
    global: bool,
    user: bool,
}

/// An entry on the way down.
#[derive(Clone, Copy)]
struct Visited {
    page: RamPage,
    offset: u64,
    value: u64,
}

#[derive(Clone, Copy)]
struct Rights {
    writable: bool,
    user: bool,
    executable: bool,
}

impl Core {
    /// Loads what the TLB does not answer.
    #[cold]
    #[inline(never)]
    pub fn load_slow<T: Word>(&mut self, linear: u64) -> Step<T> {
        if self.noting.is_some() {
            let host = self.noted_source(linear, size_of::<T>()).cast::<T>();
            if !host.is_null() {
                // SAFETY: as in `load_hit`; the whole access lies in one page, and it was noted.
                return Ok(unsafe { host.read_unaligned() });
            }
        }
        let mut value = MaybeUninit::<T>::zeroed();
        // SAFETY: a `Word` is an integer: `size_of::<T>()` initialised bytes without padding.
        let bytes = unsafe { std::slice::from_raw_parts_mut(value.as_mut_ptr().cast::<u8>(), size_of::<T>()) };
        self.read_linear(linear, bytes)?;
        // SAFETY: any bytes make an integer.
        Ok(unsafe { value.assume_init() })
    }

    /// Stores where the TLB does not answer.
    #[cold]
    #[inline(never)]
    pub fn store_slow<T: Word>(&mut self, linear: u64, value: T) -> Step {
        // SAFETY: a `Word` is an integer: `size_of::<T>()` initialised bytes without padding.
        let bytes = unsafe { std::slice::from_raw_parts((&raw const value).cast::<u8>(), size_of::<T>()) };
        if self.noting.is_some() {
            let host = self.note_hit(linear, size_of::<T>()).cast::<T>();
            if !host.is_null() {
                // SAFETY: as in `store_hit`; the whole access lies in one page, and it was noted.
                unsafe { host.write_unaligned(value) };
                return Ok(());
            }
        }
        self.write_linear(linear, bytes)
    }

    /// Loads up to a page of bytes from a linear address. All or nothing as far as faults go.
    pub fn read_linear(&mut self, linear: u64, into: &mut [u8]) -> Step {
        let (first, second) = self.split(linear, into.len())?;
        self.check_alignment(linear, into.len())?;
        let low = self.read_target(first)?;
        let room = (0x1000 - (first & 0xfff) as usize).min(into.len());
        let high = if let Some(second) = second { Some(self.read_target(second)?) } else { None };
        if self.stops.is_some() {
            self.note_pieces((low, first), second.zip(high), into.len(), false);
        }
        self.read_from(low, first, &mut into[..room]);
        if let (Some(high), Some(second)) = (high, second) {
            self.read_from(high, second, &mut into[room..]);
        }
        Ok(())
    }

    /// Stores up to a page of bytes to a linear address; raises before the first byte is written.
    pub fn write_linear(&mut self, linear: u64, from: &[u8]) -> Step {
        let (first, second) = self.split(linear, from.len())?;
        self.check_alignment(linear, from.len())?;
        let low = self.write_target(first)?;
        let room = (0x1000 - (first & 0xfff) as usize).min(from.len());
        let high = if let Some(second) = second { Some(self.write_target(second)?) } else { None };
        if self.stops.is_some() {
            self.note_pieces((low, first), second.zip(high), from.len(), true);
        }
        self.write_to(low, first, &from[..room]);
        if let (Some(high), Some(second)) = (high, second) {
            self.write_to(high, second, &from[room..]);
        }
        Ok(())
    }

    /// Raises what a store of so many bytes (a page at most) would raise, and stores nothing.
    #[cold]
    pub fn probe_write(&mut self, linear: u64, bytes: usize) -> Step {
        let (first, second) = self.split(linear, bytes)?;
        self.check_alignment(linear, bytes)?;
        self.write_target(first)?;
        if let Some(second) = second {
            self.write_target(second)?;
        }
        Ok(())
    }

    /// Raises what a load of so many bytes (a page at most) would raise.
    #[cold]
    pub fn probe_read(&mut self, linear: u64, bytes: usize) -> Step {
        let (first, second) = self.split(linear, bytes)?;
        self.read_target(first)?;
        if let Some(second) = second {
            self.read_target(second)?;
        }
        Ok(())
    }

    /// The linear address of the access, and that of its second page if it crosses into one. An access that leaves the
    /// canonical range is refused before its first page is looked at.
    fn split(&mut self, linear: u64, bytes: usize) -> Step<(u64, Option<u64>)> {
        let wrap = |linear: u64| if self.mode.long { linear } else { linear & 0xffff_ffff };
        let first = wrap(linear);
        let crosses = (first & 0xfff) as usize + bytes > 0x1000;
        let second = crosses.then(|| wrap((first & !0xfff).wrapping_add(0x1000)));
        if let Some(second) = second.filter(|second| self.mode.long && !is_canonical(*second, 48)) {
            self.fault = Fault { vector: 13, code: Some(0), address: second };
            return Err(Stop::Fault);
        }
        Ok((first, second))
    }

    /// Runs `access` with supervisor rights, as the processor reads descriptor tables (APM2 5.6.1).
    pub fn as_supervisor<R>(&mut self, access: impl FnOnce(&mut Self) -> Step<R>) -> Step<R> {
        let set = self.tlb_set;
        self.use_tlb_set(0);
        let result = access(self);
        self.use_tlb_set(set);
        result
    }

    /// Tells the watchpoints of an access that cannot fault any more.
    #[cold]
    fn note_pieces(&mut self, (low, first): (Target, u64), high: Option<(u64, Target)>, bytes: usize, write: bool) {
        let room = (0x1000 - (first & 0xfff) as usize).min(bytes);
        self.note_use(Use { linear: first, gpa: low.gpa(first), bytes: room, write });
        if let Some((second, high)) = high {
            self.note_use(Use { linear: second, gpa: high.gpa(second), bytes: bytes - room, write });
        }
    }

    fn read_target(&mut self, linear: u64) -> Step<Target> {
        match self.tlb.cached(linear, self.tlb_set, Access::Read) {
            Some(found) => Ok(Target::Ram(found)),
            None => self.translate(linear, Access::Read),
        }
    }

    fn write_target(&mut self, linear: u64) -> Step<Target> {
        let set = self.tlb_set;
        match self.tlb.cached(linear, set, Access::Write).or_else(|| self.tlb.rearmed(linear, set)) {
            Some(found) => Ok(Target::Ram(found)),
            None => self.translate(linear, Access::Write),
        }
    }

    fn read_from(&mut self, target: Target, linear: u64, into: &mut [u8]) {
        self.note_load(linear, into.len());
        match target {
            Target::Ram(found) => {
                // SAFETY: the caller split at the page's end, and `host` is the page's first byte of mapped RAM.
                unsafe {
                    let from = found.host.add((linear & 0xfff) as usize);
                    std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len());
                }
            }
            Target::Device(gpa) => self.mmio.read(gpa, into),
        }
    }

    fn write_to(&mut self, target: Target, linear: u64, from: &[u8]) {
        self.note_linear_store(linear, from.len());
        match target {
            Target::Ram(found) => {
                self.memory.keep(found.page);
                // SAFETY: as in `read_from`.
                unsafe {
                    let to = found.host.add((linear & 0xfff) as usize);
                    std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
                }
                let free = self.page_written(found.page, linear, from.len());
                let fast = free && !self.bypasses_tlb(None) && !self.watches_writes(linear, found.page);
                if fast && self.tlb.rearmed(linear, self.tlb_set).is_some() {
                    self.tlb.insert(linear, self.tlb_set, Access::Write, found);
                }
            }
            Target::Device(gpa) => {
                self.note_device(gpa, from.len());
                self.mmio.write(gpa, from);
            }
        }
    }

    /// Stamps a page of RAM that was written at these bytes, and ends what was decoded from them. True if the page holds
    /// no decoded code any more.
    pub(crate) fn page_written(&mut self, page: u64, address: u64, bytes: usize) -> bool {
        if self.stops.is_some() {
            self.note_store(page, address, bytes);
        }
        self.note_words(page, address, bytes);
        self.memory.stamps().mark(page);
        let code = self.memory.stamps().code_lines(page);
        if code == 0 {
            return true;
        }
        let lines = written_lines(address, bytes);
        if code & lines == 0 {
            return false;
        }
        let left = self.blocks.invalidate(page, lines);
        if self.blocks.has_dead() {
            // The running block, and any that would follow it, may be among them.
            self.follow = 0;
        }
        if self.shares_memory {
            // Other processors may have decoded the same lines.
            self.memory.stamps().report_written_code(page);
        }
        self.memory.stamps().clear_code_lines(page);
        self.memory.stamps().add_code_lines(page, left);
        left == 0
    }

    /// Where the code at RIP lies.
    ///
    /// # Errors
    /// The fetch faults, or leaves the guest.
    pub fn translate_code(&mut self, rip: u64) -> Step<Fetched> {
        let linear = if self.mode.long {
            rip
        } else {
            if rip > u64::from(self.segments[CS].limit) {
                return self.general_protection();
            }
            (rip.wrapping_add(self.segments[CS].base)) & 0xffff_ffff
        };
        let found = match self.tlb.cached(linear, self.tlb_set, Access::Execute) {
            Some(found) => Target::Ram(found),
            None => self.translate(linear, Access::Execute)?,
        };
        let offset = linear & 0xfff;
        match found {
            Target::Ram(found) => Ok(Fetched {
                gpa: found.gpa & !0xfff | offset,
                page: found.page,
                // SAFETY: the offset is within the page.
                host: unsafe { found.host.add(offset as usize) },
            }),
            // Code outside of RAM reads as all ones: an undefined opcode.
            Target::Device(_) => self.undefined(),
        }
    }

    /// True if the byte at RIP + `offset` lies beyond the limit of CS. 64-bit mode has no limits (APM2 4.12.1).
    pub fn is_beyond_code(&self, offset: usize) -> bool {
        !self.mode.long && self.rip + offset as u64 > u64::from(self.segments[CS].limit)
    }

    /// True if this translation must not be cached: its use depends on more than the TLB's two sets.
    fn bypasses_tlb(&self, mapping: Option<&Mapping>) -> bool {
        self.alignment_checked
            || (self.cr4 & cr4::SMAP != 0 && self.tlb_set == 0 && mapping.is_none_or(|mapping| mapping.user))
    }

    /// Walks, and caches what it finds. A write table entry begins re-armed: the store itself completes it.
    fn translate(&mut self, linear: u64, access: Access) -> Step<Target> {
        if self.mode.long && !is_canonical(linear, 48) {
            // The address is kept: an operand on the stack makes it #SS (`Core::blame_stack`).
            self.fault = Fault { vector: 13, code: Some(0), address: linear };
            return Err(Stop::Fault);
        }
        let mapping = self.walk(linear, access)?;
        let purpose = match access {
            Access::Read => Purpose::Read,
            Access::Write => Purpose::Write,
            Access::Execute => Purpose::Fetch,
        };
        let page = match self.ram_page(mapping.gpa, purpose) {
            Ok(page) => page,
            Err(fault) => return self.not_ram(mapping.gpa, fault),
        };
        let host = page.at(0);
        let found = Translation { host, page: page.page, gpa: mapping.gpa & !0xfff, global: mapping.global };
        // Of fetches it is noted where they are asked for: one that fails has been preceded by a stop, too.
        if access == Access::Execute && self.stops.is_some() {
            self.suspect_page(linear, found.gpa, found.page);
        }
        if !self.bypasses_tlb(Some(&mapping)) {
            match access {
                Access::Write => self.tlb.insert_armed(linear, self.tlb_set, access, found),
                Access::Read if self.watches_reads(linear) => {
                    self.tlb.insert_armed(linear, self.tlb_set, access, found);
                }
                _ => self.tlb.insert(linear, self.tlb_set, access, found),
            }
        }
        Ok(Target::Ram(found))
    }

    /// The final address is not RAM: the host's business, unless the host has just asked for it.
    fn not_ram(&mut self, gpa: u64, fault: NestedFault) -> Step<Target> {
        if self.nested.enabled() && !self.mmio.emulating() {
            return self.exit_with(ExitCode::NPF, fault.0, gpa);
        }
        Ok(Target::Device(gpa))
    }

    fn walk(&mut self, linear: u64, access: Access) -> Step<Mapping> {
        if self.cr0 & cr0::PG == 0 {
            return Ok(Mapping { gpa: linear & 0xffff_ffff, global: false, user: false });
        }
        if self.efer & efer::LMA != 0 {
            self.walk_wide(linear, access, 4, self.cr3 & ADDRESS)
        } else if self.cr4 & cr4::PAE != 0 {
            self.walk_wide(linear, access, 3, self.cr3 & 0xffff_ffe0)
        } else {
            self.walk_legacy(linear, access)
        }
    }

    /// Eight-byte entries: long mode (four levels) and PAE (three, the top one without rights).
    fn walk_wide(&mut self, linear: u64, access: Access, levels: u32, root: u64) -> Step<Mapping> {
        let no_execute = self.efer & efer::NXE != 0;
        let mut rights = Rights { writable: true, user: true, executable: true };
        let mut path = [Visited { page: RamPage { host: 0, page: 0 }, offset: 0, value: 0 }; 4];
        let mut table = root;
        for (depth, level) in (0..levels).rev().enumerate() {
            let visited = self.visit(table + (linear >> (12 + 9 * level) & 0x1ff) * 8, 8)?;
            path[depth] = visited;
            let entry = visited.value;
            if entry & PRESENT == 0 {
                return self.page_fault(linear, access, 0);
            }
            let top_of_pae = levels == 3 && level == 2;
            let leaf = level == 0 || (level < 3 && !top_of_pae && entry & LARGE != 0);
            let mut reserved = match level {
                3 => ADDRESS_RESERVED | LARGE,
                2 if top_of_pae => ADDRESS_RESERVED | 0xfff0_0000_0000_01e6,
                1 | 2 if leaf => ADDRESS_RESERVED | ((1 << (12 + 9 * level)) - 1) & !0x1fff,
                _ => ADDRESS_RESERVED,
            };
            if !no_execute {
                reserved |= NO_EXECUTE;
            }
            if entry & reserved != 0 {
                return self.page_fault(linear, access, pf::PRESENT | pf::RESERVED);
            }
            if !top_of_pae {
                rights.writable &= entry & WRITABLE != 0;
                rights.user &= entry & USER != 0;
                rights.executable &= entry & NO_EXECUTE == 0;
            }
            if leaf {
                self.check_rights(linear, access, rights)?;
                let first = usize::from(levels == 3);
                self.mark_path(&path[first..=depth], access, 8);
                let mask = (1 << (12 + 9 * level)) - 1;
                let global = entry & GLOBAL != 0 && self.cr4 & cr4::PGE != 0;
                return Ok(Mapping { gpa: entry & ADDRESS & !mask | linear & mask, global, user: rights.user });
            }
            table = entry & ADDRESS;
        }
        self.page_fault(linear, access, 0)
    }

    /// Four-byte entries, two levels, 4 MiB pages with PSE-36 (APM2 5.2).
    fn walk_legacy(&mut self, linear: u64, access: Access) -> Step<Mapping> {
        let directory = self.visit((self.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4, 4)?;
        let entry = directory.value;
        if entry & PRESENT == 0 {
            return self.page_fault(linear, access, 0);
        }
        let mut rights = Rights { writable: entry & WRITABLE != 0, user: entry & USER != 0, executable: true };
        let pge = self.cr4 & cr4::PGE != 0;
        if entry & LARGE != 0 && self.cr4 & cr4::PSE != 0 {
            if entry & 1 << 21 != 0 {
                return self.page_fault(linear, access, pf::PRESENT | pf::RESERVED);
            }
            self.check_rights(linear, access, rights)?;
            self.mark_path(&[directory], access, 4);
            let gpa = entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32 | linear & 0x3f_ffff;
            return Ok(Mapping { gpa, global: entry & GLOBAL != 0 && pge, user: rights.user });
        }
        let table = self.visit((entry & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4, 4)?;
        let leaf = table.value;
        if leaf & PRESENT == 0 {
            return self.page_fault(linear, access, 0);
        }
        rights.writable &= leaf & WRITABLE != 0;
        rights.user &= leaf & USER != 0;
        self.check_rights(linear, access, rights)?;
        self.mark_path(&[directory, table], access, 4);
        let gpa = leaf & 0xffff_f000 | linear & 0xfff;
        Ok(Mapping { gpa, global: leaf & GLOBAL != 0 && pge, user: rights.user })
    }

    /// Reads an entry of a guest page table.
    fn visit(&mut self, gpa: u64, bytes: u32) -> Step<Visited> {
        match self.ram_page(gpa, Purpose::Table) {
            Ok(page) => {
                let at = page.at(gpa);
                // SAFETY: entries are aligned, so they lie within the mapped page.
                let value =
                    unsafe { if bytes == 8 { at.cast::<u64>().read() } else { at.cast::<u32>().read().into() } };
                Ok(Visited { page, offset: gpa & 0xfff, value })
            }
            Err(fault) if self.nested.enabled() => self.exit_with(ExitCode::NPF, fault.0, gpa),
            // Nothing is there on a bare processor: an entry that is not present.
            Err(_) => Ok(Visited { page: RamPage { host: 0, page: 0 }, offset: 0, value: 0 }),
        }
    }

    /// Sets accessed bits, and the dirty bit of the last entry for a write (APM2 5.4.2).
    fn mark_path(&mut self, path: &[Visited], access: Access, bytes: u32) {
        for (index, visited) in path.iter().enumerate() {
            let leaf = index + 1 == path.len();
            let marked = visited.value | ACCESSED | if leaf && access == Access::Write { DIRTY } else { 0 };
            if marked == visited.value {
                continue;
            }
            self.memory.keep(visited.page.page);
            let at = visited.page.at(visited.offset);
            // SAFETY: the entry that `visit` read, in a page of mapped RAM.
            unsafe { if bytes == 8 { at.cast::<u64>().write(marked) } else { at.cast::<u32>().write(marked as u32) } };
            self.page_written(visited.page.page, visited.offset, bytes as usize);
        }
    }

    /// APM2 5.6: user and supervisor, read and write, no-execute, SMEP, SMAP.
    fn check_rights(&mut self, linear: u64, access: Access, rights: Rights) -> Step {
        let user = self.tlb_set != 0;
        let refused = match access {
            Access::Write if !rights.writable => user || self.cr0 & cr0::WP != 0,
            Access::Execute => !rights.executable || (!user && rights.user && self.cr4 & cr4::SMEP != 0),
            _ => false,
        };
        // An implicit supervisor access (descriptor tables at CPL 3) is not excused by RFLAGS.AC.
        let excused = self.cpl < 3 && self.system_flags & rflags::AC != 0;
        let prevented = access != Access::Execute && !user && rights.user && self.cr4 & cr4::SMAP != 0 && !excused;
        if refused || prevented || (user && !rights.user) {
            return self.page_fault(linear, access, pf::PRESENT);
        }
        Ok(())
    }

    #[cold]
    fn page_fault<T>(&mut self, linear: u64, access: Access, bits: u32) -> Step<T> {
        let mut code = bits;
        if self.tlb_set != 0 {
            code |= pf::USER;
        }
        let fetch_is_told = (self.efer & efer::NXE != 0 && self.cr4 & cr4::PAE != 0) || self.cr4 & cr4::SMEP != 0;
        match access {
            Access::Write => code |= pf::WRITE,
            Access::Execute if fetch_is_told => code |= pf::FETCH,
            _ => {}
        }
        self.fault = Fault { vector: 14, code: Some(code), address: linear };
        Err(Stop::Fault)
    }

    /// #AC for user data that is not naturally aligned, where the guest asked for it (APM2 8.2.18).
    #[inline]
    fn check_alignment(&mut self, linear: u64, bytes: usize) -> Step {
        if self.alignment_checked && self.tlb_set != 0 && bytes <= 8 && linear & (bytes as u64 - 1) != 0 {
            return self.raise_code(17, 0);
        }
        Ok(())
    }

    /// Somebody other than this processor wrote to decoded code of these pages: devices, the host, other processors. The
    /// caller clears the pages' lines when every processor knows.
    pub fn drop_code(&mut self, pages: &[u64]) {
        for page in pages {
            self.blocks.invalidate(*page, u64::MAX);
        }
    }

    /// CPL, CR0.AM or RFLAGS.AC changed: while alignment is checked no translation is cached, so that every access comes
    /// here.
    pub fn refresh_alignment(&mut self) {
        let checked = self.cpl == 3 && self.cr0 & cr0::AM != 0 && self.system_flags & rflags::AC != 0;
        if checked != self.alignment_checked {
            self.alignment_checked = checked;
            self.tlb.flush();
        }
    }
}

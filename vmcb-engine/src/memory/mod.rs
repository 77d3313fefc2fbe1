//! Guest RAM: a file in memory ([`backing`]), with a memfd of page stamps beside it.
//!
//! Dirt is a date, not a flag: each page has the epoch of its last write ([`stamps`]). Nothing is ever cleared, so a
//! reader that failed forgets nothing, and several readers never disturb each other.
//!
//! Layout (notes of the boot contract): RAM up to 3 GiB lies at guest-physical 0; what is above lies at 4 GiB, so that
//! the hole below 4 GiB is free for devices. A *page number* is the index into the file, never a guest-physical number.
//!
//! This room refuses to know what the pages mean, who reads them, and the wall clock.

mod backing;
pub mod digest;
pub mod frozen;
pub mod shared;
pub mod stamps;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

pub use backing::Backing;
pub use frozen::Keeper;
pub use stamps::{StampSlice, StampTable};

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// First guest-physical address that is never RAM below 4 GiB.
pub const HOLE_START: u64 = 3 << 30;
/// Where RAM goes on above the hole.
pub const HOLE_END: u64 = 4 << 30;
/// Guest RAM is a multiple of this.
pub const MEMORY_GRANULE_BYTES: u64 = 2 << 20;

/// Why guest memory cannot be had or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size makes no machine.
    #[error("guest memory of {0} bytes: it must be a multiple of 2 MiB and at least 16 MiB")]
    Size(u64),
    /// The host refused.
    #[error("cannot make guest memory: {step}")]
    Host {
        /// What was being done.
        step: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// RAM would lie on a disk.
    #[error("{0} is on no tmpfs")]
    NotTmpfs(PathBuf),
    /// The mapping was refused.
    #[error("cannot map guest memory")]
    Map(#[source] MmapRegionError),
    /// The regions do not make an address space.
    #[error("cannot lay out guest memory")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// An access beyond RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at guest-physical {gpa:#x} are not RAM")]
pub struct OutOfRange {
    /// Where it began.
    pub gpa: u64,
    /// How long it was.
    pub bytes: usize,
}

/// Pages of RAM that lie side by side in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Where the first lies.
    pub address: usize,
    /// Its number.
    pub first_page: u64,
    /// How many.
    pub pages: u64,
}

/// The guest's RAM and its page stamps. Owned by the machine; other processes hold the descriptors.
#[derive(Debug)]
pub struct GuestMemory {
    vm: GuestMemoryMmap<StampSlice>,
    stamps: Arc<StampTable>,
    ram: Arc<File>,
    keeper: Keeper,
    bytes: u64,
}

impl GuestMemory {
    /// New, zeroed RAM of `bytes`, of small pages.
    ///
    /// # Errors
    /// A size that makes no machine, or a host without memory.
    pub fn create(bytes: u64) -> Result<Self, MemoryError> {
        Self::create_on(Backing::Small, bytes)
    }

    /// New, zeroed RAM of `bytes`.
    ///
    /// # Errors
    /// A size that makes no machine, a host without memory, or a directory that is on no tmpfs.
    pub fn create_on(backing: Backing<'_>, bytes: u64) -> Result<Self, MemoryError> {
        check_size(bytes)?;
        let ram = backing.file(bytes)?;
        let stamps = sized_memfd("guest-ram-stamps", StampTable::file_bytes(bytes / PAGE_BYTES))?;
        Self::attach(ram, stamps, bytes)
    }

    /// RAM that exists already, by its descriptors.
    ///
    /// # Errors
    /// A size that makes no machine, or descriptors that are too short.
    pub fn attach(ram: OwnedFd, stamps: OwnedFd, bytes: u64) -> Result<Self, MemoryError> {
        check_size(bytes)?;
        let ram = Arc::new(File::from(ram));
        let stamps = Arc::new(StampTable::map(File::from(stamps), bytes / PAGE_BYTES)?);
        let low = bytes.min(HOLE_START);
        let mut regions = vec![region(&ram, &stamps, 0, low, 0)?];
        if bytes > low {
            regions.push(region(&ram, &stamps, low, bytes - low, HOLE_END)?);
        }
        let vm = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)?;
        let data = ram.try_clone().map_err(|source| MemoryError::Host { step: "share a descriptor", source })?;
        let keeper = Keeper::new(data.into(), bytes / PAGE_BYTES)?;
        Ok(Self { vm, stamps, ram, keeper, bytes })
    }

    /// Bytes of RAM.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Pages of RAM.
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE_BYTES
    }

    /// The file of RAM.
    pub fn ram_fd(&self) -> BorrowedFd<'_> {
        self.ram.as_fd()
    }

    /// The memfd of stamps: one little-endian u32 a page.
    pub fn stamps_fd(&self) -> BorrowedFd<'_> {
        self.stamps.fd()
    }

    /// What pages held at a frozen instant.
    pub fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// The stamps, shared with whoever writes.
    pub fn stamps(&self) -> &Arc<StampTable> {
        &self.stamps
    }

    /// For device libraries; what they write through it is stamped too, and they call [`GuestMemory::keep_range`] first.
    pub fn vm(&self) -> &GuestMemoryMmap<StampSlice> {
        &self.vm
    }

    /// Epoch with which writes are stamped now.
    pub fn epoch(&self) -> u32 {
        self.stamps.epoch()
    }

    /// Begins the next epoch and returns it. The engine must re-arm its own write paths before it runs again.
    pub fn advance_epoch(&self) -> u32 {
        self.stamps.advance_epoch()
    }

    /// A page is about to be written: what it held at a frozen instant is kept. Whoever writes calls it first, and stamps
    /// afterwards.
    #[inline]
    pub fn keep(&self, page: u64) {
        if self.keeper.is_frozen() {
            self.keep_now(page);
        }
    }

    #[cold]
    fn keep_now(&self, page: u64) {
        self.keeper.keep(page, self.stamps.stamp(page));
        // Before the write: a reader that sees new bytes must see the new stamp too.
        self.stamps.mark(page);
    }

    /// [`GuestMemory::keep`] for every page of RAM in a range of guest-physical addresses.
    pub fn keep_range(&self, gpa: u64, bytes: u64) {
        if !self.keeper.is_frozen() || bytes == 0 {
            return;
        }
        let pages = gpa / PAGE_BYTES..=gpa.saturating_add(bytes - 1) / PAGE_BYTES;
        pages.filter_map(|page| self.page_of(page * PAGE_BYTES)).for_each(|page| self.keep_now(page));
    }

    /// Where RAM lies in this process, in order of page number.
    pub fn mappings(&self) -> Vec<Mapping> {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        let mut first_page = 0;
        let mapping = |region: &GuestRegionMmap<StampSlice>| {
            let pages = region.len() / PAGE_BYTES;
            first_page += pages;
            Mapping { address: region.as_ptr() as usize, first_page: first_page - pages, pages }
        };
        self.vm.iter().map(mapping).collect()
    }

    /// Copies RAM out.
    ///
    /// # Errors
    /// Any byte of the range that is not RAM.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), OutOfRange> {
        self.vm.read_slice(into, GuestAddress(gpa)).map_err(|_| OutOfRange { gpa, bytes: into.len() })
    }

    /// Copies into RAM, and stamps it.
    ///
    /// # Errors
    /// Any byte of the range that is not RAM.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<(), OutOfRange> {
        self.keep_range(gpa, from.len() as u64);
        self.vm.write_slice(from, GuestAddress(gpa)).map_err(|_| OutOfRange { gpa, bytes: from.len() })
    }

    /// Makes all of RAM zero, as when it was new, and gives its memory back. Pages that held anything are stamped: for
    /// whoever reads stamps they have changed.
    ///
    /// # Errors
    /// The host refused.
    pub fn clear(&self) -> Result<(), shared::PagesError> {
        let pages = shared::SharedPages::of(self.ram_fd(), self.stamps_fd(), self.bytes)?;
        for run in pages.filled(pages.whole())? {
            (run.first..run.end()).for_each(|page| self.keep(page));
            pages.zero_pages(run)?;
            (run.first..run.end()).for_each(|page| self.stamps.mark(page));
        }
        Ok(())
    }

    /// Page number of a guest-physical address, if it is RAM.
    pub fn page_of(&self, gpa: u64) -> Option<u64> {
        let low = self.bytes.min(HOLE_START);
        let offset = if gpa < low {
            gpa
        } else if gpa >= HOLE_END && gpa - HOLE_END < self.bytes - low {
            gpa - HOLE_END + low
        } else {
            return None;
        };
        Some(offset / PAGE_BYTES)
    }

    /// Guest-physical address of a page of RAM, by its number.
    pub fn gpa_of(&self, page: u64) -> u64 {
        let offset = page * PAGE_BYTES;
        if offset < HOLE_START { offset } else { offset - HOLE_START + HOLE_END }
    }

    /// Host address of a page of RAM, by its number. For the software engine's TLB only, as [`GuestMemory::host_page`].
    pub(crate) fn host_of(&self, page: u64) -> Option<*mut u8> {
        if page >= self.pages() {
            return None;
        }
        self.host_page(self.gpa_of(page)).map(|(host, _)| host)
    }

    /// Host address of the page that holds `gpa`, and its page number. For the software engine's TLB only: writes
    /// through it must stamp.
    pub(crate) fn host_page(&self, gpa: u64) -> Option<(*mut u8, u64)> {
        let page = self.page_of(gpa)?;
        let address = GuestAddress(gpa & !(PAGE_BYTES - 1));
        let pointer = vm_memory::GuestMemoryBackend::get_host_address(&self.vm, address).ok()?;
        Some((pointer, page))
    }
}

fn check_size(bytes: u64) -> Result<(), MemoryError> {
    if bytes < 16 << 20 || !bytes.is_multiple_of(MEMORY_GRANULE_BYTES) || bytes > 1 << 40 {
        return Err(MemoryError::Size(bytes));
    }
    Ok(())
}

/// A memfd of this length, all zero.
///
/// # Errors
/// The host refused.
pub fn sized_memfd(name: &str, bytes: u64) -> Result<OwnedFd, MemoryError> {
    let host = |step| move |e: rustix::io::Errno| MemoryError::Host { step, source: e.into() };
    let fd = memfd_create(name, MemfdFlags::CLOEXEC).map_err(host("memfd_create"))?;
    rustix::fs::ftruncate(&fd, bytes).map_err(host("ftruncate"))?;
    Ok(fd)
}

fn region(
    ram: &Arc<File>,
    stamps: &Arc<StampTable>,
    offset: u64,
    bytes: u64,
    gpa: u64,
) -> Result<GuestRegionMmap<StampSlice>, MemoryError> {
    let slice = StampSlice::new(Arc::clone(stamps), offset);
    let mapping = MmapRegionBuilder::new_with_bitmap(bytes as usize, slice)
        .with_file_offset(FileOffset::from_arc(Arc::clone(ram), offset))
        .with_mmap_prot((rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE).bits() as i32)
        .with_mmap_flags(rustix::mm::MapFlags::SHARED.bits() as i32 | rustix::mm::MapFlags::NORESERVE.bits() as i32)
        .build()
        .map_err(MemoryError::Map)?;
    GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or(MemoryError::Size(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_stamped_with_the_epoch_and_reads_are_not() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        memory.write(0x1fff, &[1, 2]).unwrap();
        let next = memory.advance_epoch();
        memory.write(0x5000, &[3]).unwrap();
        let mut bytes = [0; 2];
        memory.read(0x1fff, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2]);
        let stamps: Vec<u32> = (0..7).map(|page| memory.stamps().stamp(page)).collect();
        assert_eq!(stamps, [0, next - 1, next - 1, 0, 0, next, 0]);
    }

    #[test]
    fn ram_above_the_hole_lies_at_four_gib() {
        let memory = GuestMemory::create((3 << 30) + (4 << 20)).unwrap();
        assert!(memory.write(HOLE_START, &[1]).is_err());
        memory.write(HOLE_END + 5, &[9]).unwrap();
        assert_eq!(memory.page_of(HOLE_END), Some((3 << 30) / PAGE_BYTES));
        for gpa in [0, HOLE_START - PAGE_BYTES, HOLE_END, HOLE_END + 0x5000] {
            assert_eq!(memory.gpa_of(memory.page_of(gpa).unwrap()), gpa);
        }
        assert_eq!(memory.page_of(HOLE_END + (4 << 20)), None);
        assert_eq!(memory.stamps().stamp((3 << 30) / PAGE_BYTES), memory.epoch());
    }

    #[test]
    fn mappings_name_every_page_once() {
        let memory = GuestMemory::create((3 << 30) + (4 << 20)).unwrap();
        let pages: Vec<(u64, u64)> = memory.mappings().iter().map(|m| (m.first_page, m.pages)).collect();
        assert_eq!(pages, [(0, (3 << 30) / PAGE_BYTES), ((3 << 30) / PAGE_BYTES, (4 << 20) / PAGE_BYTES)]);
        let (above, _) = memory.host_page(HOLE_END + 0x1000).unwrap();
        assert_eq!(memory.mappings()[1].address + 0x1000, above as usize);
    }

    #[test]
    fn cleared_ram_is_zero_and_stamped_where_it_was_not() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        memory.write(0x3000, &[1; 0x2000]).unwrap();
        let next = memory.advance_epoch();
        memory.clear().unwrap();
        let mut bytes = [7; 0x2000];
        memory.read(0x3000, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 0x2000]);
        let stamps: Vec<u32> = (0..7).map(|page| memory.stamps().stamp(page)).collect();
        assert_eq!(stamps, [0, 0, 0, next, next, 0, 0]);
    }

    #[test]
    fn a_second_view_sees_the_same_ram() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let ram = memory.ram_fd().try_clone_to_owned().unwrap();
        let stamps = memory.stamps_fd().try_clone_to_owned().unwrap();
        let other = GuestMemory::attach(ram, stamps, 16 << 20).unwrap();
        memory.write(0x3000, b"godwit").unwrap();
        let mut bytes = [0; 6];
        other.read(0x3000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"godwit");
        assert_eq!(other.stamps().stamp(3), memory.epoch());
    }

    #[test]
    fn sizes_that_make_no_machine_are_refused() {
        for bytes in [0, 4096, (16 << 20) + 4096, !0x1f_ffff] {
            assert!(matches!(GuestMemory::create(bytes), Err(MemoryError::Size(_))), "{bytes}");
        }
    }
}

//! Page stamps: the epoch of the last write of every page, in a memfd that others may map.
//!
//! Epoch 0 means "never written"; a machine's first epoch is 1. Writers stamp after they wrote; a reader first has the
//! epoch advanced while the writer stands still, and then reads every page whose stamp is at least its mark. A writer
//! and a reader therefore never race for a stamp of the reader's past.
//!
//! The table also knows which 64-byte lines of RAM hold decoded code, so that whoever writes there (a device, an
//! operator) tells the engine: the engine drains [`StampTable::take_written_code`] before it runs.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{FileOffset, bitmap};

use super::{MemoryError, PAGE_BYTES};

/// One u32 a page, mapped shared.
#[derive(Debug)]
pub struct StampTable {
    mapping: MmapRegion<()>,
    file: Arc<File>,
    pages: u64,
    epoch: AtomicU32,
    code: Box<[AtomicU64]>,
    code_written: AtomicBool,
    written_code: Mutex<Vec<u64>>,
}

impl StampTable {
    /// Bytes of the file for so many pages: whole pages of stamps.
    pub fn file_bytes(pages: u64) -> u64 {
        (pages * 4).next_multiple_of(PAGE_BYTES)
    }

    /// Maps a table for `pages`.
    ///
    /// # Errors
    /// The file is too short or cannot be mapped.
    pub fn map(file: File, pages: u64) -> Result<Self, MemoryError> {
        let file = Arc::new(file);
        let mapping = MmapRegionBuilder::<()>::new(Self::file_bytes(pages) as usize)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), 0))
            .with_mmap_prot((rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE).bits() as i32)
            .with_mmap_flags(rustix::mm::MapFlags::SHARED.bits() as i32)
            .build()
            .map_err(MemoryError::Map)?;
        let code = (0..pages).map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            mapping,
            file,
            pages,
            epoch: AtomicU32::new(1),
            code,
            code_written: AtomicBool::new(false),
            written_code: Mutex::default(),
        })
    }

    /// The descriptor of the table.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Pages in the table.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Epoch with which writes are stamped now.
    pub fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Begins the next epoch and returns it.
    pub fn advance_epoch(&self) -> u32 {
        let next = self.epoch().checked_add(1).expect("4 billion epochs outlive any machine");
        self.epoch.store(next, Ordering::Release);
        next
    }

    /// Goes on at an epoch of an earlier process of this machine.
    pub fn set_epoch(&self, epoch: u32) {
        self.epoch.store(epoch.max(1), Ordering::Release);
    }

    fn entry(&self, page: u64) -> &AtomicU32 {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.mapping.get_atomic_ref(page as usize * 4).expect("the mapping has a stamp for every page")
    }

    /// Epoch of the last write of a page; 0 if it was never written.
    pub fn stamp(&self, page: u64) -> u32 {
        self.entry(page).load(Ordering::Acquire)
    }

    /// Stamps a page as written now.
    #[inline]
    pub fn mark(&self, page: u64) {
        self.entry(page).store(self.epoch(), Ordering::Release);
    }

    /// Lines of a page that hold decoded code, one bit each of 64 bytes.
    #[inline]
    pub fn code_lines(&self, page: u64) -> u64 {
        self.code[page as usize].load(Ordering::Relaxed)
    }

    /// Adds lines of decoded code; `0` lines with `clear` forgets all of the page.
    pub fn add_code_lines(&self, page: u64, lines: u64) {
        self.code[page as usize].fetch_or(lines, Ordering::Relaxed);
    }

    /// No line of this page holds decoded code any more.
    pub fn clear_code_lines(&self, page: u64) {
        self.code[page as usize].store(0, Ordering::Relaxed);
    }

    /// Pages with decoded code that somebody other than the engine wrote to; drains the list. Cheap when empty.
    pub fn take_written_code(&self) -> Vec<u64> {
        if !self.code_written.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        std::mem::take(&mut *self.written_code.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells every processor that decoded code of this page was written: it is in the next
    /// [`StampTable::take_written_code`].
    pub fn report_written_code(&self, page: u64) {
        self.written_code.lock().unwrap_or_else(PoisonError::into_inner).push(page);
        self.code_written.store(true, Ordering::Release);
    }

    fn mark_range(&self, offset: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        for page in offset / PAGE_BYTES..=(offset + bytes - 1) / PAGE_BYTES {
            self.mark(page);
            if self.code_lines(page) != 0 {
                self.report_written_code(page);
            }
        }
    }
}

/// The part of a table that belongs to one region of RAM, in the form vm-memory marks writes in.
#[derive(Debug, Clone)]
pub struct StampSlice {
    table: Arc<StampTable>,
    offset: u64,
}

impl StampSlice {
    /// Stamps of the region that begins at this byte of the memfd.
    pub fn new(table: Arc<StampTable>, offset: u64) -> Self {
        Self { table, offset }
    }
}

impl<'a> WithBitmapSlice<'a> for StampSlice {
    type S = StampSlice;
}

impl BitmapSlice for StampSlice {}

impl Bitmap for StampSlice {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.table.mark_range(self.offset + offset as u64, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = (self.offset + offset as u64) / PAGE_BYTES;
        self.table.stamp(page) >= self.table.epoch()
    }

    fn slice_at(&self, offset: usize) -> bitmap::BS<'_, Self> {
        Self { table: Arc::clone(&self.table), offset: self.offset + offset as u64 }
    }
}

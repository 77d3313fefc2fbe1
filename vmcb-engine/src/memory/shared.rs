//! Pages as another process sees them: RAM's memfd or a disk's file, with the stamps beside it.
//!
//! The agent reads and writes a guest's pages without being the guest. It does so by `pread` and `pwrite`, not through
//! a mapping: a hole that is read through a mapping of a memfd becomes memory, a hole that is read by `pread` stays a
//! hole, and writing a whole page by `pwrite` need not clear it first. A page may change while it is read; then its
//! stamp says so and the reader comes back (`since`).
//!
//! What is written here is not stamped: it is what the guest starts with, not what it did.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom};

use super::PAGE_BYTES;
use super::digest::{PageDigests, leaves};
use super::frozen::{self, Kept};

/// Stamps read at once: those of 256 MiB.
const STAMPS_AT_ONCE: usize = 1 << 16;
/// Pages read at once: 1 MiB.
const PAGES_AT_ONCE: u64 = 256;

/// Pages that lie one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Number of the first.
    pub first: u64,
    /// How many, at least one.
    pub pages: u64,
}

impl Run {
    /// Number after the last.
    pub fn end(&self) -> u64 {
        self.first + self.pages
    }

    /// Cuts it at multiples of `step` pages.
    pub fn pieces(self, step: u64) -> impl Iterator<Item = Run> {
        let mut first = self.first;
        std::iter::from_fn(move || {
            let next = (first / step + 1).saturating_mul(step).min(self.end());
            let piece = Run { first, pages: next - first };
            first = next;
            (piece.pages > 0).then_some(piece)
        })
    }
}

/// Why pages cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The pages do not exist.
    #[error("pages {first}..{end} of {pages}", end = .first.saturating_add(*.count))]
    Range {
        /// First page asked for.
        first: u64,
        /// Pages asked for.
        count: u64,
        /// Pages that there are.
        pages: u64,
    },
    /// The file is too short for what it should hold.
    #[error("{what} holds {found} bytes, {expected} are needed")]
    Short {
        /// Which file.
        what: &'static str,
        /// Its length.
        found: u64,
        /// Needed length.
        expected: u64,
    },
    /// The host refused.
    #[error("cannot {step}")]
    Host {
        /// What was being done.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A space of pages shared with the process that runs the guest: its data and one `u32` stamp a page. The last page may
/// be partial: what lies behind the end reads as zero and is not written.
#[derive(Debug)]
pub struct SharedPages {
    data: File,
    stamps: File,
    kept: Option<Kept>,
    bytes: u64,
    pages: u64,
}

impl SharedPages {
    /// The first `bytes` of `data` and the stamps of their pages.
    ///
    /// # Errors
    /// Files that are too short.
    pub fn new(data: OwnedFd, stamps: OwnedFd, bytes: u64) -> Result<Self, PagesError> {
        let (data, stamps) = (File::from(data), File::from(stamps));
        let pages = bytes.div_ceil(PAGE_BYTES);
        for (what, file, expected) in [("data", &data, bytes), ("stamps", &stamps, pages * 4)] {
            // A block device has no length in its status; its end has. The descriptor's position is nobody's.
            let found = match file.metadata().map_err(host("find the length"))?.len() {
                0 => rustix::fs::seek(file, SeekFrom::End(0)).map_err(|e| host("find the end")(e.into()))?,
                bytes => bytes,
            };
            if found < expected {
                return Err(PagesError::Short { what, found, expected });
            }
        }
        Ok(Self { data, stamps, kept: None, bytes, pages })
    }

    /// [`SharedPages::new`] with descriptors that stay their owner's.
    ///
    /// # Errors
    /// Files that are too short, or a host that has no more descriptors.
    pub fn of(data: BorrowedFd<'_>, stamps: BorrowedFd<'_>, bytes: u64) -> Result<Self, PagesError> {
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(host("share a descriptor"));
        Self::new(own(data)?, own(stamps)?, bytes)
    }

    /// With what the process keeps of a frozen instant.
    ///
    /// # Errors
    /// A file that is too short.
    pub fn with_kept(self, kept: OwnedFd) -> Result<Self, PagesError> {
        let file = File::from(kept);
        let (found, expected) =
            (file.metadata().map_err(host("find the length"))?.len(), frozen::file_bytes(self.pages));
        if found < expected {
            return Err(PagesError::Short { what: "kept pages", found, expected });
        }
        Ok(Self { kept: Some(Kept::new(file, self.pages)), ..self })
    }

    /// All of them.
    pub fn whole(&self) -> Run {
        Run { first: 0, pages: self.pages }
    }

    /// Whether the process can keep an instant of these pages.
    pub fn keeps(&self) -> bool {
        self.kept.is_some()
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Epoch of the last write to a page, 0 if there was none.
    ///
    /// # Errors
    /// A page that does not exist, or the host.
    pub fn stamp(&self, page: u64) -> Result<u32, PagesError> {
        self.check(page, 1)?;
        let mut bytes = [0; 4];
        self.stamps.read_exact_at(&mut bytes, page * 4).map_err(host("read a stamp"))?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Pages written in epoch `mark` or later, as runs in order. Mark 0 is every page.
    ///
    /// # Errors
    /// The host.
    pub fn since(&self, mark: u32) -> Result<Vec<Run>, PagesError> {
        if mark == 0 {
            return Ok(if self.pages == 0 { vec![] } else { vec![Run { first: 0, pages: self.pages }] });
        }
        let mut runs: Vec<Run> = Vec::new();
        self.scan(|page, stamp| {
            push_page(&mut runs, page, stamp >= mark);
        })?;
        Ok(runs)
    }

    /// Pages of `run` that were not written in epoch `epoch` or later, as runs in order.
    ///
    /// # Errors
    /// Pages that do not exist, or the host.
    pub fn before(&self, run: Run, epoch: u32) -> Result<Vec<Run>, PagesError> {
        self.check(run.first, run.pages)?;
        let mut runs = Vec::new();
        (run.first..).zip(self.stamps(run)?).for_each(|(page, stamp)| push_page(&mut runs, page, stamp < epoch));
        Ok(runs)
    }

    /// Pages of a frozen instant that were written in epoch `mark` or later, as runs in order: without those that were first
    /// written after it. Mark 0 is every page that may hold anything but zeros.
    ///
    /// # Errors
    /// The host.
    pub fn since_frozen(&self, mark: u32, instant: u32) -> Result<Vec<Run>, PagesError> {
        if mark == 0 {
            // A page that has become a hole since then held something that was kept.
            return Ok(joined(self.filled(self.whole())?, &self.since(instant.saturating_add(1))?));
        }
        let Some(kept) = &self.kept else { return self.since(mark) };
        let (mut runs, mut later): (Vec<Run>, Vec<Run>) = (Vec::new(), Vec::new());
        self.scan(|page, stamp| {
            push_page(&mut runs, page, (mark..=instant).contains(&stamp));
            push_page(&mut later, page, stamp > instant);
        })?;
        let mut wanted: Vec<Run> = Vec::new();
        for run in later {
            let settled = kept.settled(run.first, run.pages).map_err(host("read what is kept"))?;
            (run.first..).zip(settled).for_each(|(page, settled)| push_page(&mut wanted, page, settled != instant));
        }
        Ok(joined(runs, &wanted))
    }

    /// Appends whole pages as they were at a frozen instant, and tells the process that they need not be kept any more.
    ///
    /// # Errors
    /// Pages that do not exist, or the host.
    pub fn append_frozen(&self, run: Run, instant: u32, into: &mut Vec<u8>) -> Result<(), PagesError> {
        let start = into.len();
        self.append_pages(run, into)?;
        let Some(kept) = &self.kept else { return Ok(()) };
        let failed = host("read what is kept");
        // The page first, then its stamp: whoever writes stamps first.
        for (at, stamp) in self.stamps(run)?.into_iter().enumerate() {
            if stamp > instant {
                let page = start + at * PAGE_BYTES as usize;
                let bytes = &mut into[page..page + PAGE_BYTES as usize];
                kept.read(run.first + at as u64, bytes).map_err(&failed)?;
            }
        }
        kept.settle(run.first, run.pages, instant).map_err(&failed)?;
        kept.give_back(run.first, run.pages).map_err(failed)
    }

    fn stamps(&self, run: Run) -> Result<Vec<u32>, PagesError> {
        let mut bytes = vec![0; run.pages as usize * 4];
        self.stamps.read_exact_at(&mut bytes, run.first * 4).map_err(host("read stamps"))?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    /// How many pages were written in epoch `mark` or later.
    ///
    /// # Errors
    /// The host.
    pub fn count_since(&self, mark: u32) -> Result<u64, PagesError> {
        let mut count = 0;
        self.scan(|_, stamp| count += u64::from(stamp >= mark))?;
        Ok(count)
    }

    fn scan(&self, mut visit: impl FnMut(u64, u32)) -> Result<(), PagesError> {
        let mut bytes = vec![0; 4 * STAMPS_AT_ONCE.min(self.pages as usize)];
        let mut first = 0;
        while first < self.pages {
            let count = (self.pages - first).min(STAMPS_AT_ONCE as u64);
            let part = &mut bytes[..4 * count as usize];
            self.stamps.read_exact_at(part, first * 4).map_err(host("read stamps"))?;
            for (page, stamp) in (first..).zip(part.chunks_exact(4)) {
                visit(page, u32::from_le_bytes([stamp[0], stamp[1], stamp[2], stamp[3]]));
            }
            first += count;
        }
        Ok(())
    }

    /// Appends whole pages to `into`. What lies behind the end of the file reads as zero.
    ///
    /// # Errors
    /// Pages that do not exist, or the host.
    pub fn append_pages(&self, run: Run, into: &mut Vec<u8>) -> Result<(), PagesError> {
        self.check(run.first, run.pages)?;
        let start = into.len();
        let bytes = run.pages * PAGE_BYTES;
        let mut offset = run.first * PAGE_BYTES;
        let inside = start + bytes.min(self.bytes.saturating_sub(offset)) as usize;
        into.reserve_exact(bytes as usize);
        while into.len() < inside {
            match rustix::io::pread(&self.data, rustix::buffer::spare_capacity(into), offset) {
                Ok(0) => break,
                Ok(bytes) => offset += bytes as u64,
                Err(rustix::io::Errno::INTR) => (),
                Err(e) => return Err(host("read pages")(e.into())),
            }
        }
        // The vector may have had more room than was asked for, and the file more bytes than belong to the space.
        into.truncate(inside);
        into.resize(start + bytes as usize, 0);
        Ok(())
    }

    /// Copies whole pages in, from `first` on.
    ///
    /// # Errors
    /// Pages that do not exist, or the host.
    pub fn write_pages(&self, first: u64, from: &[u8]) -> Result<(), PagesError> {
        self.check(first, whole_pages(from.len()))?;
        let offset = first * PAGE_BYTES;
        let inside = from.len().min((self.bytes - offset.min(self.bytes)) as usize);
        self.data.write_all_at(&from[..inside], offset).map_err(host("write pages"))
    }

    /// Makes pages zero and gives their memory back.
    ///
    /// # Errors
    /// Pages that do not exist, or the host.
    pub fn zero_pages(&self, run: Run) -> Result<(), PagesError> {
        self.check(run.first, run.pages)?;
        let (offset, bytes) = (run.first * PAGE_BYTES, run.pages * PAGE_BYTES);
        match rustix::fs::fallocate(&self.data, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, bytes) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => self.write_zeros(run),
            Err(e) => Err(host("punch a hole")(e.into())),
        }
    }

    fn write_zeros(&self, run: Run) -> Result<(), PagesError> {
        let zeros = [0; PAGE_BYTES as usize];
        (run.first..run.end()).try_for_each(|page| self.write_pages(page, &zeros))
    }

    /// The part of `run` that may hold anything but zeros, in order: what is not a hole in the file.
    ///
    /// # Errors
    /// Pages that do not exist, or the host.
    pub fn filled(&self, run: Run) -> Result<Vec<Run>, PagesError> {
        self.check(run.first, run.pages)?;
        let end = run.end() * PAGE_BYTES;
        let mut runs: Vec<Run> = Vec::new();
        let mut at = run.first * PAGE_BYTES;
        while at < end {
            let from = match rustix::fs::seek(&self.data, SeekFrom::Data(at)) {
                Ok(from) if from < end => from,
                Ok(_) | Err(rustix::io::Errno::NXIO) => break,
                // A file system that knows no holes.
                Err(rustix::io::Errno::INVAL) => return Ok(vec![run]),
                Err(e) => return Err(host("look for data")(e.into())),
            };
            let to =
                rustix::fs::seek(&self.data, SeekFrom::Hole(from)).map_err(|e| host("look for a hole")(e.into()))?;
            let first = (from / PAGE_BYTES).max(runs.last().map_or(0, Run::end));
            let last = to.min(end).div_ceil(PAGE_BYTES);
            if last > first {
                runs.push(Run { first, pages: last - first });
            }
            at = to.max(at + 1);
        }
        Ok(runs)
    }

    /// Whether every page is zero.
    ///
    /// # Errors
    /// The host.
    pub fn is_zero(&self) -> Result<bool, PagesError> {
        let mut bytes = Vec::new();
        for filled in self.filled(self.whole())? {
            for piece in filled.pieces(PAGES_AT_ONCE) {
                bytes.clear();
                self.append_pages(piece, &mut bytes)?;
                if bytes.as_chunks::<64>().0.iter().any(|line| *line != [0; 64]) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Digests of all pages as they are now, read from where they lie.
    ///
    /// # Errors
    /// The host.
    pub fn digests(&self) -> Result<PageDigests, PagesError> {
        let mut digests = PageDigests::new(self.pages);
        let mut bytes = Vec::new();
        for filled in self.filled(self.whole())? {
            for piece in filled.pieces(PAGES_AT_ONCE) {
                bytes.clear();
                self.append_pages(piece, &mut bytes)?;
                (piece.first..).zip(leaves(&bytes)).for_each(|(page, leaf)| digests.set(page, leaf));
            }
        }
        Ok(digests)
    }

    fn check(&self, first: u64, count: u64) -> Result<(), PagesError> {
        match first.checked_add(count) {
            Some(end) if end <= self.pages => Ok(()),
            _ => Err(PagesError::Range { first, count, pages: self.pages }),
        }
    }
}

/// Appends a page, which lies behind all others, if it is wanted.
fn push_page(runs: &mut Vec<Run>, page: u64, wanted: bool) {
    match runs.last_mut() {
        _ if !wanted => {}
        Some(run) if run.end() == page => run.pages += 1,
        _ => runs.push(Run { first: page, pages: 1 }),
    }
}

/// Pages that are in either list, in order.
fn joined(mut all: Vec<Run>, more: &[Run]) -> Vec<Run> {
    if more.is_empty() {
        return all;
    }
    all.extend_from_slice(more);
    all.sort_unstable_by_key(|run| run.first);
    let mut runs: Vec<Run> = Vec::with_capacity(all.len());
    for run in all {
        match runs.last_mut() {
            Some(last) if last.end() >= run.first => last.pages = last.end().max(run.end()) - last.first,
            _ => runs.push(run),
        }
    }
    runs
}

fn whole_pages(bytes: usize) -> u64 {
    assert!((bytes as u64).is_multiple_of(PAGE_BYTES), "{bytes} bytes are no whole pages");
    bytes as u64 / PAGE_BYTES
}

fn host(step: &'static str) -> impl Fn(io::Error) -> PagesError {
    move |source| PagesError::Host { step, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestMemory, sized_memfd};

    const MIB_16: u64 = 16 << 20;

    fn shared(memory: &GuestMemory) -> SharedPages {
        SharedPages::of(memory.ram_fd(), memory.stamps_fd(), MIB_16).unwrap()
    }

    fn read(pages: &SharedPages, run: Run) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(3 * MIB_16 as usize);
        bytes.push(9);
        pages.append_pages(run, &mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, 1 + run.pages * PAGE_BYTES);
        bytes.split_off(1)
    }

    #[test]
    fn a_partial_last_page_is_filled_with_zeros_and_never_grows_the_file() {
        let data = sized_memfd("data", 10_000).unwrap();
        std::fs::File::from(data.try_clone().unwrap()).write_all_at(&[5; 10_000], 0).unwrap();
        let pages = SharedPages::new(data.try_clone().unwrap(), sized_memfd("stamps", 4096).unwrap(), 9000).unwrap();
        assert_eq!(pages.pages(), 3);
        let bytes = read(&pages, Run { first: 1, pages: 2 });
        assert!(bytes[..9000 - 4096].iter().all(|b| *b == 5) && bytes[9000 - 4096..].iter().all(|b| *b == 0));
        pages.write_pages(2, &[6; 4096]).unwrap();
        let file = std::fs::File::from(data);
        let mut all = vec![0; 10_000];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!((file.metadata().unwrap().len(), all[8999], all[9000]), (10_000, 6, 5));
    }

    #[test]
    fn the_guests_writes_are_seen_as_runs_since_the_mark() {
        let memory = GuestMemory::create(MIB_16).unwrap();
        let pages = shared(&memory);
        assert_eq!(pages.since(0).unwrap(), [Run { first: 0, pages: 4096 }]);
        memory.write(0x1fff, &[1, 2]).unwrap();
        let mark = memory.advance_epoch();
        memory.write(0x4000, &[3; 8192]).unwrap();
        memory.write(0xff_f000, &[4]).unwrap();
        assert_eq!(pages.since(mark).unwrap(), [Run { first: 4, pages: 2 }, Run { first: 4095, pages: 1 }]);
        assert_eq!(pages.since(1).unwrap().iter().map(|run| run.pages).sum::<u64>(), 5);
        assert_eq!((pages.count_since(mark).unwrap(), pages.count_since(mark + 1).unwrap()), (3, 0));
        assert_eq!(pages.stamp(4).unwrap(), mark);
    }

    #[test]
    fn what_the_agent_writes_the_guest_reads_and_no_stamp_changes() {
        let memory = GuestMemory::create(MIB_16).unwrap();
        let pages = shared(&memory);
        pages.write_pages(3, &[7; 8192]).unwrap();
        let mut bytes = [0; 2];
        memory.read(0x4fff, &mut bytes).unwrap();
        assert_eq!((bytes, pages.count_since(1).unwrap()), ([7, 0], 0));
        pages.zero_pages(Run { first: 3, pages: 1 }).unwrap();
        let page = read(&pages, Run { first: 3, pages: 2 });
        assert!(page[..4096].iter().all(|b| *b == 0) && page[4096..].iter().all(|b| *b == 7));
    }

    #[test]
    fn holes_are_found_and_reading_makes_none_of_them_memory() {
        let memory = GuestMemory::create(MIB_16).unwrap();
        let pages = shared(&memory);
        pages.write_pages(100, &[1; 4096]).unwrap();
        let whole = Run { first: 0, pages: 4096 };
        read(&pages, whole);
        assert_eq!(pages.filled(whole).unwrap(), [Run { first: 100, pages: 1 }]);
        assert_eq!(pages.filled(Run { first: 0, pages: 100 }).unwrap(), []);
        assert!(!pages.is_zero().unwrap());
        let mut digests = pages.digests().unwrap();
        let mut expected = PageDigests::new(4096);
        assert_ne!(digests.root(), expected.root());
        expected.set(100, crate::memory::digest::leaf(&[1; 4096]));
        assert_eq!(digests.root(), expected.root());
        pages.write_pages(100, &[0; 4096]).unwrap();
        assert!(pages.is_zero().unwrap());
    }

    #[test]
    fn pages_that_do_not_exist_are_refused() {
        let memory = GuestMemory::create(MIB_16).unwrap();
        let pages = shared(&memory);
        assert!(matches!(pages.write_pages(4096, &[0; 4096]), Err(PagesError::Range { .. })));
        let beyond = Run { first: u64::MAX, pages: 1 };
        assert!(matches!(pages.append_pages(beyond, &mut vec![]), Err(PagesError::Range { .. })));
        assert!(pages.zero_pages(Run { first: 4095, pages: 2 }).is_err());
        let short = SharedPages::new(sized_memfd("a", 4096).unwrap(), sized_memfd("b", 4).unwrap(), 8192);
        assert!(matches!(short, Err(PagesError::Short { what: "data", .. })));
    }
}

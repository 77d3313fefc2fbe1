//! Pages as they were at an instant, while the guest goes on: copy on write.
//!
//! A checkpoint names an instant, the end of an epoch. From then on whoever writes a page for the first time keeps what was
//! there, and only then stamps and writes it; whoever reads pages of that instant reads the page, then its stamp, and
//! takes the kept copy where the stamp is of a later epoch. The guest's stop is as long as naming the instant takes, however
//! much RAM there is.
//!
//! Copies lie in a memfd shared with the reader, each at its page's own place, so a page of zeros is a hole. Behind them
//! lies a word a page: the instant at which it was last *settled*, so that no copy of it is needed any more: set by the
//! reader when it has the page, and by the writer when the page was not asked for. What nobody reads is not kept.
//!
//! ```text
//! writer, before it writes page p             reader of page p
//! frozen, mark <= stamp(p) <= instant?        data(p)
//!   settled(p)? nothing : kept(p) := data(p)  stamp(p) <= instant? data : kept(p)
//! stamp(p) := epoch of today                  settled(p) := instant; kept(p) is given back
//! ```
//! It refuses to know what a page is, who reads, and how long the instant is wanted.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::fs::FallocateFlags;

use super::{MemoryError, PAGE_BYTES, sized_memfd};

const PAGE: usize = PAGE_BYTES as usize;

/// Where the words of a space of so many pages begin in the file of its copies.
fn words_at(pages: u64) -> u64 {
    pages * PAGE_BYTES
}

/// Length of the file of copies for so many pages.
pub fn file_bytes(pages: u64) -> u64 {
    (words_at(pages) + pages * 4).next_multiple_of(PAGE_BYTES)
}

/// The writer's side: of RAM, or of a disk.
#[derive(Debug)]
pub struct Keeper {
    data: File,
    kept: File,
    pages: u64,
    /// Last epoch of the instant; 0: none is wanted.
    instant: AtomicU32,
    /// Pages with an older stamp are not asked for.
    mark: AtomicU32,
    /// A page could not be kept: the instant is lost.
    lost: AtomicBool,
}

impl Keeper {
    /// For so many pages of this file.
    ///
    /// # Errors
    /// The host refused.
    pub fn new(data: OwnedFd, pages: u64) -> Result<Self, MemoryError> {
        let kept = File::from(sized_memfd("kept-pages", file_bytes(pages))?);
        let (instant, mark, lost) = (AtomicU32::new(0), AtomicU32::new(0), AtomicBool::new(false));
        Ok(Self { data: File::from(data), kept, pages, instant, mark, lost })
    }

    /// The memfd of copies and words.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.kept.as_fd()
    }

    /// Keeps from now on what pages with a stamp from `mark` to `instant` hold. Writers stamp with a later epoch already.
    ///
    /// # Errors
    /// The host refused; then nothing is kept.
    pub fn freeze(&self, mark: u32, instant: u32) -> io::Result<()> {
        self.empty()?;
        self.lost.store(false, Ordering::Relaxed);
        self.mark.store(mark, Ordering::Relaxed);
        self.instant.store(instant, Ordering::Release);
        Ok(())
    }

    /// Keeps nothing any more and gives the copies back. False if the instant was lost, or none was frozen.
    pub fn thaw(&self) -> bool {
        let frozen = self.instant.swap(0, Ordering::AcqRel) != 0;
        // Memory that could not be given back is emptied before it is used again.
        let _later = self.empty();
        frozen && !self.lost.load(Ordering::Relaxed)
    }

    /// Whether an instant is frozen.
    #[inline]
    pub fn is_frozen(&self) -> bool {
        self.instant.load(Ordering::Relaxed) != 0
    }

    /// A page whose last write is of epoch `stamp` is about to be written.
    #[cold]
    pub fn keep(&self, page: u64, stamp: u32) {
        let instant = self.instant.load(Ordering::Acquire);
        if instant == 0 || stamp > instant || self.lost.load(Ordering::Relaxed) {
            return;
        }
        let outcome = match stamp < self.mark.load(Ordering::Relaxed) {
            true => set_words(&self.kept, self.pages, page, 1, instant),
            false => self.copy(page, instant),
        };
        if outcome.is_err() {
            self.lost.store(true, Ordering::Relaxed);
        }
    }

    fn copy(&self, page: u64, instant: u32) -> io::Result<()> {
        if word(&self.kept, self.pages, page)? == instant {
            return Ok(());
        }
        let mut bytes = [0; PAGE];
        let mut read = 0;
        while read < PAGE {
            match self.data.read_at(&mut bytes[read..], page * PAGE_BYTES + read as u64) {
                // The last page of a disk may be cut.
                Ok(0) => break,
                Ok(count) => read += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if bytes.as_chunks::<64>().0.iter().all(|line| *line == [0; 64]) {
            return Ok(());
        }
        self.kept.write_all_at(&bytes, page * PAGE_BYTES)
    }

    /// Bytes of host memory that copies take now.
    pub fn kept_bytes(&self) -> u64 {
        let blocks = rustix::fs::fstat(&self.kept).map_or(0, |stat| stat.st_blocks);
        u64::try_from(blocks).unwrap_or(0) * 512
    }

    fn empty(&self) -> io::Result<()> {
        give_back(&self.kept, 0, file_bytes(self.pages))
    }
}

/// The reader's side: copies and words of a space.
#[derive(Debug)]
pub struct Kept {
    file: File,
    pages: u64,
}

impl Kept {
    /// The copies of a space of so many pages. The caller has seen that the file is [`file_bytes`] long.
    pub fn new(file: File, pages: u64) -> Self {
        Self { file, pages }
    }

    /// Instants at which pages were last settled, in order.
    ///
    /// # Errors
    /// The host.
    pub fn settled(&self, first: u64, count: u64) -> io::Result<Vec<u32>> {
        let mut bytes = vec![0; count as usize * 4];
        self.file.read_exact_at(&mut bytes, words_at(self.pages) + first * 4)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    /// The copy of a page.
    ///
    /// # Errors
    /// The host.
    pub fn read(&self, page: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, page * PAGE_BYTES)
    }

    /// The reader has these pages: their copies are given back, and no more are made.
    ///
    /// # Errors
    /// The host.
    pub fn settle(&self, first: u64, count: u64, instant: u32) -> io::Result<()> {
        set_words(&self.file, self.pages, first, count, instant)
    }

    /// Gives the copies of these pages back.
    ///
    /// # Errors
    /// The host.
    pub fn give_back(&self, first: u64, count: u64) -> io::Result<()> {
        give_back(&self.file, first * PAGE_BYTES, count * PAGE_BYTES)
    }
}

fn word(file: &File, pages: u64, page: u64) -> io::Result<u32> {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, words_at(pages) + page * 4)?;
    Ok(u32::from_le_bytes(bytes))
}

fn set_words(file: &File, pages: u64, first: u64, count: u64, instant: u32) -> io::Result<()> {
    file.write_all_at(&instant.to_le_bytes().repeat(count as usize), words_at(pages) + first * 4)
}

fn give_back(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, offset, bytes).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::shared::{Run, SharedPages};
    use super::super::{GuestMemory, HOLE_START};
    use super::*;

    const MIB_16: u64 = 16 << 20;
    const PAGES: u64 = MIB_16 / PAGE_BYTES;

    fn shared(memory: &GuestMemory) -> SharedPages {
        let pages = SharedPages::of(memory.ram_fd(), memory.stamps_fd(), memory.bytes()).unwrap();
        pages.with_kept(memory.keeper().fd().try_clone_to_owned().unwrap()).unwrap()
    }

    fn all(memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = vec![0; memory.bytes() as usize];
        memory.read(0, &mut bytes).unwrap();
        bytes
    }

    fn freeze(memory: &GuestMemory, mark: u32) -> u32 {
        let instant = memory.advance_epoch() - 1;
        memory.keeper().freeze(mark, instant).unwrap();
        instant
    }

    /// Reads a frozen instant into a copy of what the reader had before.
    fn read(pages: &SharedPages, mark: u32, instant: u32, into: &mut [u8], mut between: impl FnMut()) {
        for run in pages.since_frozen(mark, instant).unwrap() {
            for piece in run.pieces(8) {
                let mut bytes = Vec::new();
                pages.append_frozen(piece, instant, &mut bytes).unwrap();
                into[(piece.first * PAGE_BYTES) as usize..][..bytes.len()].copy_from_slice(&bytes);
                between();
            }
        }
    }

    #[test]
    fn a_page_is_kept_once_and_only_if_it_is_asked_for() {
        let memory = GuestMemory::create(MIB_16).unwrap();
        let pages = shared(&memory);
        memory.write(0x1000, &[1; 0x3000]).unwrap();
        let mark = memory.advance_epoch();
        memory.write(0x2000, &[2; 0x2000]).unwrap();
        let instant = freeze(&memory, mark);
        memory.write(0x1000, &[3]).unwrap();
        assert_eq!(memory.keeper().kept_bytes(), PAGE_BYTES, "one page of words: nobody asked for page 1");
        memory.write(0x2000, &[3]).unwrap();
        memory.write(0x2000, &[4]).unwrap();
        memory.write(0x9000, &[5]).unwrap();
        assert_eq!(pages.since_frozen(mark, instant).unwrap(), [Run { first: 2, pages: 2 }]);
        let mut bytes = Vec::new();
        pages.append_frozen(Run { first: 2, pages: 2 }, instant, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 2));
        memory.write(0x3000, &[6]).unwrap();
        assert_eq!(
            memory.keeper().kept_bytes(),
            PAGE_BYTES,
            "copies that were read are given back, and not made again"
        );
        assert!(memory.keeper().thaw());
        assert!(!memory.keeper().thaw());
        assert_eq!(memory.keeper().kept_bytes(), 0);
    }

    #[test]
    fn cleared_ram_is_read_as_it_was() {
        let memory = GuestMemory::create(MIB_16).unwrap();
        let pages = shared(&memory);
        memory.write(0x5000, &[7; 0x1000]).unwrap();
        let (before, instant) = (all(&memory), freeze(&memory, 0));
        memory.clear().unwrap();
        memory.write(0x8000, &[8]).unwrap();
        let mut copy = vec![0; MIB_16 as usize];
        read(&pages, 0, instant, &mut copy, || ());
        assert!(copy == before);
    }

    #[test]
    fn pages_beyond_the_hole_are_kept_too() {
        let memory = GuestMemory::create(HOLE_START + (2 << 20)).unwrap();
        let pages = shared(&memory);
        memory.write(super::super::HOLE_END, &[9; 2]).unwrap();
        let instant = freeze(&memory, 0);
        memory.write(super::super::HOLE_END, &[1]).unwrap();
        let mut bytes = Vec::new();
        pages.append_frozen(Run { first: HOLE_START / PAGE_BYTES, pages: 1 }, instant, &mut bytes).unwrap();
        assert_eq!(bytes[..3], [9, 9, 0]);
    }

    #[test]
    fn a_writer_that_never_rests_does_not_show_in_what_is_read() {
        let memory = GuestMemory::create(MIB_16).unwrap();
        let pages = shared(&memory);
        (0..PAGES).for_each(|page| memory.write(page * PAGE_BYTES, &[page as u8; PAGE]).unwrap());
        let (before, instant) = (all(&memory), freeze(&memory, 0));
        let (over, mut copy) = (AtomicBool::new(false), vec![0; MIB_16 as usize]);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut page = 0;
                while !over.load(Ordering::Relaxed) {
                    // In a stride, so that it meets the reader again and again.
                    page = (page + 1021) % PAGES;
                    memory.write(page * PAGE_BYTES, &[0xff; PAGE]).unwrap();
                }
            });
            read(&pages, 0, instant, &mut copy, || ());
            over.store(true, Ordering::Relaxed);
        });
        assert!(memory.keeper().thaw() && copy == before);
    }

    #[derive(Debug, Clone)]
    enum Act {
        Write(u64, u16, u8),
        Clear,
    }

    fn act() -> impl Strategy<Value = Act> {
        let write = (0..48_u64 * PAGE_BYTES, 1..9000_u16, any::<u8>());
        prop_oneof![40 => write.prop_map(|(at, bytes, fill)| Act::Write(at, bytes, fill)), 1 => Just(Act::Clear)]
    }

    fn perform(memory: &GuestMemory, act: &Act) {
        match act {
            Act::Write(at, bytes, fill) => memory.write(*at, &vec![*fill; usize::from(*bytes)]).unwrap(),
            Act::Clear => memory.clear().unwrap(),
        }
    }

    proptest! {
        // Each case copies all of RAM a few times.
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn whatever_is_written_an_instant_stays_what_it_was(
            rounds in proptest::collection::vec(
                (proptest::collection::vec(act(), 0..12), proptest::collection::vec(act(), 0..40)), 1..4),
        ) {
            let memory = GuestMemory::create(MIB_16).unwrap();
            let pages = shared(&memory);
            let (mut copy, mut mark) = (vec![0; MIB_16 as usize], 0);
            for (before, during) in &rounds {
                before.iter().for_each(|act| perform(&memory, act));
                let (expected, instant) = (all(&memory), freeze(&memory, mark));
                let mut during = during.iter();
                during.by_ref().take(3).for_each(|act| perform(&memory, act));
                read(&pages, mark, instant, &mut copy, || {
                    during.by_ref().take(2).for_each(|act| perform(&memory, act));
                });
                during.for_each(|act| perform(&memory, act));
                prop_assert!(memory.keeper().thaw());
                prop_assert!(copy == expected);
                mark = instant + 1;
            }
        }
    }
}

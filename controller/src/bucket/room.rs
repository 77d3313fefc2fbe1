//! The memory of packs: pieces as large as a pack that are used again and again while packs are made or read, and go back
//! to the host when none is.
//!
//! A piece that the host gives anew costs a page fault for every page that is written, an eighth of what taking in a
//! checkpoint costs. glibc keeps no piece of this size without holes in its heaps, so a few are kept here. Each begins where
//! a disk's block does ([`uncached`]), so that packs are written as they lie. Nothing of what was in a piece is seen again.

use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};

use super::uncached;

/// Larger objects are packs, bytes: they are read into this memory.
pub(super) const PACK_LEAST: u64 = 4 << 20;
/// glibc gives pieces of more than 32 MiB a mapping of their own, of which only what is written is memory, and all of which
/// goes back at once.
const BYTES: usize = (32 << 20) + (64 << 10);
/// Most pieces that wait for their next use.
const SPARE_MAX: usize = 3;

static ROOMS: Mutex<Rooms> = Mutex::new(Rooms { used: 0, spare: Vec::new() });

struct Rooms {
    used: usize,
    spare: Vec<Vec<u8>>,
}

/// A piece, empty at first. It grows by what is appended, and does not move while that is at most a pack.
pub struct Room {
    buffer: Vec<u8>,
    begin: usize,
}

fn rooms() -> std::sync::MutexGuard<'static, Rooms> {
    ROOMS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Room {
    /// One that was used before, or a new one.
    pub fn take() -> Room {
        let mut rooms = rooms();
        rooms.used += 1;
        let mut buffer = rooms.spare.pop().unwrap_or_else(|| Vec::with_capacity(BYTES));
        let begin = uncached::first_block(&buffer);
        buffer.resize(begin, 0);
        Room { buffer, begin }
    }

    /// What was appended so far.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.begin..]
    }

    /// Appends all that comes.
    ///
    /// # Errors
    /// Those of the reader.
    pub fn read(&mut self, mut from: impl Read) -> io::Result<usize> {
        from.read_to_end(&mut self.buffer)
    }

    /// Appends.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }
}

impl AsRef<[u8]> for Room {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut rooms = rooms();
        rooms.used -= 1;
        if rooms.used == 0 {
            rooms.spare.clear();
        } else if rooms.spare.len() < SPARE_MAX && buffer.capacity() == BYTES {
            buffer.clear();
            rooms.spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_empty_again_and_begins_where_a_block_does() {
        // Keeps the spare ones from being given back meanwhile.
        let _other = Room::take();
        for byte in 1..10 {
            let mut room = Room::take();
            assert!(room.bytes().is_empty());
            room.read(&[byte; 5000][..]).unwrap();
            room.push(&vec![byte; 12 << 20]);
            assert!(room.bytes().len() == 5000 + (12 << 20) && room.bytes().iter().all(|it| *it == byte));
            assert_eq!(room.bytes().as_ptr().align_offset(4096), 0);
        }
    }

    #[test]
    fn no_more_are_kept_than_was_said() {
        let many: Vec<Room> = (0..3 * SPARE_MAX).map(|_| Room::take()).collect();
        drop(many);
        assert!(rooms().spare.len() <= SPARE_MAX);
    }
}

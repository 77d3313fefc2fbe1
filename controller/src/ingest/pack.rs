//! A pack: frames one after the other, an index of them, and a footer that finds the index.
//!
//! ```text
//! frame | frame | ... | frame of kind PackIndex | "GDWTPACK" | index offset u64 | index frame bytes u64
//! ```
//! At most 16 MiB, named by the BLAKE3 of all of it. All frames are sealed, the index too (in version 1 none was). The
//! index says of each frame what it is, so that a page map that is lost can be made again from packs; it names the
//! checkpoint that the pack was written for. Numbers are little endian. Pure: bytes in, bytes out.

use bytes::Bytes;
use proto::frame::{self, FrameError, HEADER_BYTES, Kind};
use proto::ids::PackId;
use proto::seal::{Opener, SealError, Sealer};
use proto::v1::{PackEntry, PackIndex};

use crate::bucket::room::Room;

/// Most bytes of a pack.
pub const PACK_MAX: usize = 16 << 20;
/// Most bytes of a pack that an earlier release wrote.
pub const PACK_MAX_EVER: usize = 64 << 20;
/// Bytes after the index frame.
pub const FOOTER_BYTES: usize = 24;
const MAGIC: &[u8; 8] = b"GDWTPACK";
/// What an entry of the index takes at most besides a section's name.
const ENTRY_MAX: usize = 48;
/// What sealing adds to the index at most.
const SEAL_MAX: usize = 256;

/// A pack that is being filled.
pub struct PackWriter {
    /// None while nothing is in it.
    room: Option<Room>,
    index: PackIndex,
    index_bytes_max: usize,
}

/// A pack that is complete.
#[derive(Clone, Debug)]
pub struct Pack {
    /// BLAKE3 of the bytes.
    pub id: PackId,
    /// All of it.
    pub bytes: Bytes,
}

impl PackWriter {
    /// An empty pack of this checkpoint.
    pub fn new(checkpoint: &str) -> PackWriter {
        let index = PackIndex { checkpoint: checkpoint.into(), entries: Vec::new() };
        PackWriter { room: None, index, index_bytes_max: HEADER_BYTES + FOOTER_BYTES + SEAL_MAX + checkpoint.len() }
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.index.entries.is_empty()
    }

    /// Whether a frame has room. One frame always has.
    pub fn fits(&self, frame_bytes: usize, section: &str) -> bool {
        let after = self.bytes() + frame_bytes + self.index_bytes_max + ENTRY_MAX + section.len();
        self.is_empty() || after <= PACK_MAX
    }

    /// Appends a frame and returns its offset; `entry` says what it is.
    pub fn push(&mut self, frame: &[u8], entry: PackEntry) -> u64 {
        let offset = self.bytes() as u64;
        self.index_bytes_max += ENTRY_MAX + entry.section.len();
        self.index.entries.push(PackEntry { offset, frame_bytes: frame.len() as u32, ..entry });
        self.room.get_or_insert_with(Room::take).push(frame);
        offset
    }

    fn bytes(&self) -> usize {
        self.room.as_ref().map_or(0, |room| room.bytes().len())
    }

    /// Appends index and footer, and names the pack.
    pub fn seal(self, sealer: &Sealer) -> Pack {
        let offset = self.bytes() as u64;
        let mut room = self.room.unwrap_or_else(Room::take);
        let frame = sealer.seal(&frame::encode_message(Kind::PackIndex, &self.index));
        room.push(&frame);
        room.push(MAGIC);
        room.push(&offset.to_le_bytes());
        room.push(&(frame.len() as u64).to_le_bytes());
        let id = PackId(*blake3::hash(room.bytes()).as_bytes());
        Pack { id, bytes: Bytes::from_owner(room) }
    }
}

/// Why bytes are not the pack that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// Some byte is not as it was written.
    #[error("its bytes do not match its name (they hash to {0})")]
    Hash(PackId),
    /// No footer at its end.
    #[error("it has no footer")]
    Footer,
    /// The index frame is damaged.
    #[error("its index: {0}")]
    Index(FrameError),
    /// The index does not open.
    #[error("its index: {0}")]
    Sealed(#[from] SealError),
    /// An entry that leads out of the pack.
    #[error("entry {0} of its index leads nowhere")]
    Entry(usize),
}

/// Checks the name of a pack's bytes.
///
/// # Errors
/// [`PackError::Hash`].
pub fn check_name(bytes: &[u8], id: PackId) -> Result<(), PackError> {
    let found = PackId(*blake3::hash(bytes).as_bytes());
    if found == id { Ok(()) } else { Err(PackError::Hash(found)) }
}

/// The index of a pack; `opener` is needed since version 2.
///
/// # Errors
/// [`PackError::Footer`], [`PackError::Index`], [`PackError::Sealed`], [`PackError::Entry`].
pub fn index(bytes: &[u8], opener: Option<&Opener>) -> Result<PackIndex, PackError> {
    let offset = index_at(bytes, bytes.len() as u64)?;
    index_of(&bytes[offset as usize..], offset, opener)
}

/// Where the index of a pack of so many bytes begins, by the end of it.
///
/// # Errors
/// [`PackError::Footer`].
pub fn index_at(end: &[u8], pack_bytes: u64) -> Result<u64, PackError> {
    let (_, footer) = end.split_last_chunk::<FOOTER_BYTES>().ok_or(PackError::Footer)?;
    let number = |at: usize| footer[at..at + 8].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    let (offset, length) = (number(8), number(16));
    let before = pack_bytes.checked_sub(FOOTER_BYTES as u64);
    if &footer[..8] != MAGIC || offset.checked_add(length).is_none_or(|end| Some(end) != before) {
        return Err(PackError::Footer);
    }
    Ok(offset)
}

/// The index out of a pack's end, which begins where the index does: at this offset of the pack.
///
/// # Errors
/// As [`index`].
pub fn index_of(end: &[u8], offset: u64, opener: Option<&Opener>) -> Result<PackIndex, PackError> {
    let frame = end.split_last_chunk::<FOOTER_BYTES>().ok_or(PackError::Footer)?.0;
    let index: PackIndex = match opener {
        Some(opener) => frame::decode_message(Kind::PackIndex, &opener.open(frame)?),
        None => frame::decode_message(Kind::PackIndex, frame),
    }
    .map_err(PackError::Index)?;
    for (at, entry) in index.entries.iter().enumerate() {
        if entry.offset.checked_add(entry.frame_bytes.into()).is_none_or(|end| end > offset) {
            return Err(PackError::Entry(at));
        }
    }
    Ok(index)
}

#[cfg(test)]
mod tests {
    use proto::ids::VmId;
    use proto::seal::DataKey;

    use super::*;

    fn sealer() -> Sealer {
        Sealer::new(&DataKey::new([1; 32]), VmId([2; 16]), [3; 16])
    }

    fn opener() -> Opener {
        Opener::new(DataKey::new([1; 32]), VmId([2; 16]))
    }

    fn small() -> Pack {
        let mut writer = PackWriter::new("00aa");
        for name in ["cpu/0", "clock"] {
            let frame = frame::encode(Kind::Section, name.as_bytes());
            writer.push(&frame, PackEntry { section: name.into(), ..PackEntry::default() });
        }
        writer.seal(&sealer())
    }

    #[test]
    fn the_index_finds_every_frame() {
        let pack = small();
        check_name(&pack.bytes, pack.id).unwrap();
        let index = index(&pack.bytes, Some(&opener())).unwrap();
        assert_eq!(index.checkpoint, "00aa");
        for entry in &index.entries {
            let at = entry.offset as usize;
            let (_, body) = frame::decode(&pack.bytes[at..at + entry.frame_bytes as usize]).unwrap();
            assert_eq!(body, entry.section.as_bytes());
        }
    }

    #[test]
    fn any_changed_byte_and_any_cut_is_seen_and_nothing_panics() {
        let pack = small();
        for at in 0..pack.bytes.len() {
            let mut changed = pack.bytes.to_vec();
            changed[at] ^= 0x40;
            assert!(check_name(&changed, pack.id).is_err());
            let _ = index(&changed, Some(&opener()));
            assert!(index(&pack.bytes[..at], Some(&opener())).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn packs_stay_within_their_limit() {
        let mut writer = PackWriter::new("00aa");
        let frame = frame::encode(Kind::Section, &vec![7; 1 << 20]);
        while writer.fits(frame.len(), "section") {
            writer.push(&frame, PackEntry { section: "section".into(), ..PackEntry::default() });
        }
        let pack = writer.seal(&sealer());
        assert!(pack.bytes.len() <= PACK_MAX && pack.bytes.len() > PACK_MAX - (2 << 20), "{}", pack.bytes.len());
        assert_eq!(pack.bytes.as_ptr().align_offset(4096), 0, "a disk takes it as it lies");
    }
}

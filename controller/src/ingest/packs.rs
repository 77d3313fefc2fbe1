//! Packs of one kind, filled one after the other. A pack has its name when it is full, so what lies in it is a [`Pending`]
//! until then; and the packs that a manifest names, each once. Pure: who writes packs away is told which.

use std::collections::BTreeMap;
use std::sync::Arc;

use proto::ids::Generation;
use proto::seal::Sealer;
use proto::v1::PackEntry;

use super::map::PackAt;
use super::pack::{Pack, PackWriter};

/// A place in [`Packs`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pending {
    /// Index among the packs.
    pub pack: u32,
    /// Byte of the pack at which the frame begins.
    pub offset: u64,
    /// Length of the frame.
    pub bytes: u32,
}

/// Packs that are being filled.
pub struct Packs {
    checkpoint: String,
    generation: Generation,
    sealer: Arc<Sealer>,
    writer: PackWriter,
    named: Vec<PackAt>,
}

impl Packs {
    /// None yet. They name the checkpoint for which they are written.
    pub fn new(checkpoint: &str, generation: Generation, sealer: Arc<Sealer>) -> Packs {
        let writer = PackWriter::new(checkpoint);
        Packs { checkpoint: checkpoint.into(), generation, sealer, writer, named: Vec::new() }
    }

    /// Appends a frame: where it lies, and the pack that had no room for it, which is complete.
    pub fn push(&mut self, frame: &[u8], entry: PackEntry) -> (Pending, Option<Pack>) {
        let full = if self.writer.fits(frame.len(), &entry.section) { None } else { self.close() };
        let offset = self.writer.push(frame, entry);
        (Pending { pack: self.named.len() as u32, offset, bytes: frame.len() as u32 }, full)
    }

    /// Completes the pack that is open, if something is in it.
    pub fn close(&mut self) -> Option<Pack> {
        if self.writer.is_empty() {
            return None;
        }
        let pack = std::mem::replace(&mut self.writer, PackWriter::new(&self.checkpoint)).seal(&self.sealer);
        self.named.push(PackAt { generation: self.generation, id: pack.id, bytes: pack.bytes.len() as u64 });
        Some(pack)
    }

    /// The pack of a place. It must be complete.
    pub fn of(&self, place: &Pending) -> PackAt {
        self.named[place.pack as usize]
    }

    /// All of them, in order, when no more is to come.
    pub fn into_named(self) -> Vec<PackAt> {
        self.named
    }
}

/// The packs of a manifest, each once, by number.
#[derive(Default)]
pub struct Table {
    packs: Vec<PackAt>,
    numbers: BTreeMap<PackAt, u32>,
}

impl Table {
    /// The number of a pack.
    pub fn number(&mut self, pack: PackAt) -> u32 {
        *self.numbers.entry(pack).or_insert_with(|| {
            self.packs.push(pack);
            self.packs.len() as u32 - 1
        })
    }

    /// By number.
    pub fn packs(&self) -> &[PackAt] {
        &self.packs
    }

    /// The same, when no more is to come.
    pub fn into_packs(self) -> Vec<PackAt> {
        self.packs
    }
}

#[cfg(test)]
mod tests {
    use proto::frame::{self, Kind};
    use proto::ids::VmId;
    use proto::seal::DataKey;

    use super::super::pack::index;
    use super::*;

    #[test]
    fn what_was_pushed_lies_where_it_was_said_to() {
        let key = DataKey::new([1; 32]);
        let (vm, opener) = (VmId([2; 16]), proto::seal::Opener::new(key.clone(), VmId([2; 16])));
        let mut packs = Packs::new("00aa", Generation(3), Arc::new(Sealer::new(&key, vm, [3; 16])));
        assert!(packs.close().is_none());
        let frames: Vec<Vec<u8>> = (0..20_u8).map(|n| frame::encode(Kind::Section, &vec![n; 1 << 20])).collect();
        let (mut places, mut full) = (Vec::new(), Vec::new());
        for frame in &frames {
            let (place, pack) = packs.push(frame, PackEntry::default());
            places.push(place);
            full.extend(pack);
        }
        full.extend(packs.close());
        assert!(packs.close().is_none() && full.len() == 2);
        for (place, frame) in places.iter().zip(&frames) {
            let bytes = &full[place.pack as usize].bytes[place.offset as usize..][..place.bytes as usize];
            assert!(bytes == frame);
        }
        let entries: usize = full.iter().map(|pack| index(&pack.bytes, Some(&opener)).unwrap().entries.len()).sum();
        assert_eq!(entries, frames.len());
        let named = packs.into_named();
        assert_eq!(named.iter().map(|at| at.id).collect::<Vec<_>>(), full.iter().map(|p| p.id).collect::<Vec<_>>());
        assert!(named.iter().zip(&full).all(|(at, pack)| at.bytes == pack.bytes.len() as u64));
    }

    #[test]
    fn a_pack_has_one_number() {
        let pack = |id| PackAt { generation: Generation(1), id: proto::ids::PackId([id; 32]), bytes: 1 };
        let mut table = Table::default();
        assert_eq!([7, 8, 7, 9].map(|id| table.number(pack(id))), [0, 1, 0, 2]);
        assert_eq!(table.into_packs(), [7, 8, 9].map(pack));
    }
}

//! The digests that two sides of a transfer compare, recomputed from what arrived.
//!
//! A page's leaf is its BLAKE3. A group is the BLAKE3 of up to 512 consecutive leaves one after the other; groups of
//! groups follow until one is left: the root. There is always at least one grouping; no pages at all have the root
//! BLAKE3(""). A page that never arrived is zero. State and machine digests are `proto::digest`'s.

pub use proto::digest::state_digest;
use proto::ids::Digest;
pub use proto::leaf::ZERO_LEAF;
use proto::v1::MachineDigest;

/// Leaves of a group, and groups of a group.
pub const FAN_OUT: usize = 512;

/// The leaves of one space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageDigests {
    leaves: Vec<[u8; 32]>,
}

impl PageDigests {
    /// Of a space of zeros.
    pub fn new(pages: u64) -> PageDigests {
        PageDigests { leaves: vec![ZERO_LEAF; pages as usize] }
    }

    /// How many there are.
    pub fn pages(&self) -> u64 {
        self.leaves.len() as u64
    }

    /// The page has this leaf now. The page must exist.
    pub fn set(&mut self, page: u64, leaf: [u8; 32]) {
        self.leaves[page as usize] = leaf;
    }

    /// The root over all pages.
    pub fn root(&self) -> Digest {
        root_of_groups(group(&self.leaves).as_flattened())
    }
}

/// The root over a space whose groups are these: 32 bytes each, in order. None is a space without pages.
pub fn root_of_groups(groups: &[u8]) -> Digest {
    let mut level = groups.as_chunks::<32>().0.to_vec();
    while level.len() > 1 {
        level = group(&level);
    }
    Digest(level.first().copied().unwrap_or_else(|| *blake3::hash(b"").as_bytes()))
}

fn group(level: &[[u8; 32]]) -> Vec<[u8; 32]> {
    level.chunks(FAN_OUT).map(|leaves| *blake3::hash(leaves.as_flattened()).as_bytes()).collect()
}

/// Digest of a whole machine; the first space is RAM, the others are its local disks in order.
pub fn machine_digest(spaces: &[Digest], state: Digest) -> MachineDigest {
    let (ram, disks) = spaces.split_first().expect("every machine has RAM");
    proto::digest::machine_digest(*ram, state, disks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(bytes: &[u8]) -> [u8; 32] {
        *blake3::hash(bytes).as_bytes()
    }

    #[test]
    fn roots_are_as_defined() {
        assert_eq!(PageDigests::new(0).root().0, hash(b""));
        let zero = hash(&[0; 4096]);
        assert_eq!(PageDigests::new(1).root().0, hash(&zero));
        assert_eq!(PageDigests::new(512).root().0, hash(&zero.repeat(512)));
        let (full, rest) = (hash(&zero.repeat(512)), hash(&zero));
        assert_eq!(PageDigests::new(513).root().0, hash(&[full, rest].concat()));
    }
}

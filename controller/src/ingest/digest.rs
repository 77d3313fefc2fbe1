//! The digests that two sides of a transfer compare, recomputed from what arrived.
//!
//! A page's leaf is its BLAKE3. A group is the BLAKE3 of up to 512 consecutive leaves one after the other; groups of
//! groups follow until one is left: the root. There is always at least one grouping; no pages at all have the root
//! BLAKE3(""). A page that never arrived is zero. State and machine digests are as `MachineDigest` says.

use std::sync::LazyLock;

use proto::v1::{MachineDigest, Section};

/// Leaves of a group, and groups of a group.
pub const FAN_OUT: usize = 512;

/// Leaf of a page of zeros.
pub static ZERO_LEAF: LazyLock<[u8; 32]> = LazyLock::new(|| *blake3::hash(&[0; proto::frame::PAGE_BYTES]).as_bytes());

/// The leaves of one space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageDigests {
    leaves: Vec<[u8; 32]>,
}

impl PageDigests {
    /// Of a space of zeros.
    pub fn new(pages: u64) -> PageDigests {
        PageDigests { leaves: vec![*ZERO_LEAF; pages as usize] }
    }

    /// The page has this leaf now. The page must exist.
    pub fn set(&mut self, page: u64, leaf: [u8; 32]) {
        self.leaves[page as usize] = leaf;
    }

    /// The root over all pages.
    pub fn root(&self) -> [u8; 32] {
        if self.leaves.is_empty() {
            return *blake3::hash(b"").as_bytes();
        }
        root_of_groups(group(&self.leaves).as_flattened())
    }
}

/// The root over a space whose groups are these: 32 bytes each, in order. None is a space without pages.
pub fn root_of_groups(groups: &[u8]) -> [u8; 32] {
    let mut level = groups.as_chunks::<32>().0.to_vec();
    while level.len() > 1 {
        level = group(&level);
    }
    level.first().copied().unwrap_or_else(|| *blake3::hash(b"").as_bytes())
}

fn group(level: &[[u8; 32]]) -> Vec<[u8; 32]> {
    level.chunks(FAN_OUT).map(|leaves| *blake3::hash(leaves.as_flattened()).as_bytes()).collect()
}

/// Digest over sections, whatever order they came in.
pub fn state_digest(sections: &[Section]) -> [u8; 32] {
    let mut sorted: Vec<&Section> = sections.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let mut hasher = blake3::Hasher::new();
    for section in sorted {
        hasher.update(&(section.name.len() as u32).to_le_bytes());
        hasher.update(section.name.as_bytes());
        hasher.update(&section.major.to_le_bytes());
        hasher.update(&section.minor.to_le_bytes());
        hasher.update(&(section.body.len() as u64).to_le_bytes());
        hasher.update(&section.body);
    }
    *hasher.finalize().as_bytes()
}

/// Digest of a whole machine; the first space is RAM, the others are its local disks in order.
pub fn machine_digest(spaces: &[[u8; 32]], state: [u8; 32]) -> MachineDigest {
    let (ram, disks) = spaces.split_first().expect("every machine has RAM");
    let disks = *blake3::hash(disks.as_flattened()).as_bytes();
    let machine = blake3::hash(&[*ram, state, disks].concat());
    MachineDigest {
        machine: machine.as_bytes().to_vec(),
        ram: ram.to_vec(),
        state: state.to_vec(),
        disks: disks.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(bytes: &[u8]) -> [u8; 32] {
        *blake3::hash(bytes).as_bytes()
    }

    #[test]
    fn roots_are_as_defined() {
        assert_eq!(PageDigests::new(0).root(), hash(b""));
        let zero = hash(&[0; 4096]);
        assert_eq!(PageDigests::new(1).root(), hash(&zero));
        assert_eq!(PageDigests::new(512).root(), hash(&zero.repeat(512)));
        let (full, rest) = (hash(&zero.repeat(512)), hash(&zero));
        assert_eq!(PageDigests::new(513).root(), hash(&[full, rest].concat()));
    }

    #[test]
    fn the_order_of_sections_does_not_matter_but_their_bytes_do() {
        let section =
            |name: &str, body: &[u8]| Section { name: name.into(), major: 1, body: body.into(), ..Section::default() };
        let (a, b) = (section("cpu/0", b"1"), section("clock", b"2"));
        assert_eq!(state_digest(&[a.clone(), b.clone()]), state_digest(&[b.clone(), a.clone()]));
        assert_ne!(state_digest(&[a, b.clone()]), state_digest(&[section("cpu/0", b"3"), b]));
    }
}

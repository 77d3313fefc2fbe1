//! The digests of state that two sides of a transfer compare, each computed on its own.
//!
//! ```text
//! state   = BLAKE3 over the sections sorted by name, each: name length u32, name, major u32, minor u32, body length u64,
//!           body (numbers little endian)
//! disks   = BLAKE3(roots of the local disks, one after the other)
//! machine = BLAKE3(ram root | state | disks)
//! ```
//! A root is that of the tree over page digests ([`crate::leaf`]); who keeps the tree, and what a section holds, is not known
//! here.

use crate::ids::Digest;
use crate::v1::{MachineDigest, Section};

/// Digest of all sections, whatever their order.
pub fn state_digest(sections: &[Section]) -> Digest {
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
    Digest(*hasher.finalize().as_bytes())
}

/// Joins the parts to the digest that two sides compare. `disks` are the roots of the local disks in order.
pub fn machine_digest(ram: Digest, state: Digest, disks: &[Digest]) -> MachineDigest {
    let mut hasher = blake3::Hasher::new();
    disks.iter().for_each(|root| {
        hasher.update(&root.0);
    });
    let disks = Digest(*hasher.finalize().as_bytes());
    let machine = Digest(*blake3::hash(&[ram.0, state.0, disks.0].concat()).as_bytes());
    MachineDigest { machine: machine.to_vec(), ram: ram.to_vec(), state: state.to_vec(), disks: disks.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(name: &str) -> Section {
        Section { name: name.into(), major: 1, body: name.as_bytes().to_vec(), ..Section::default() }
    }

    #[test]
    fn the_state_digest_ignores_order_and_nothing_else() {
        let (a, b) = (section("a"), section("b"));
        let digest = state_digest(&[a.clone(), b.clone()]);
        assert_eq!(digest, state_digest(&[b.clone(), a.clone()]));
        for changed in [
            Section { name: "c".into(), ..b.clone() },
            Section { major: 2, ..b.clone() },
            Section { minor: 1, ..b.clone() },
            Section { body: vec![], ..b.clone() },
        ] {
            assert_ne!(digest, state_digest(&[a.clone(), changed]));
        }
    }

    #[test]
    fn the_machine_digest_covers_every_part() {
        let digest = |ram, state, disks: &[u8]| {
            let disks: Vec<Digest> = disks.iter().map(|b| Digest([*b; 32])).collect();
            machine_digest(Digest([ram; 32]), Digest([state; 32]), &disks).machine
        };
        let all =
            [digest(1, 2, &[3]), digest(9, 2, &[3]), digest(1, 9, &[3]), digest(1, 2, &[]), digest(1, 2, &[3, 3])];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }
}

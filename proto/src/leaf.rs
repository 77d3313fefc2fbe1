//! BLAKE3 of pages, many at once.
//!
//! A page's digest (a *leaf*) is the plain BLAKE3 of its 4096 bytes, so anybody can compute it. One page alone fills only
//! four lanes of a vector unit; sixteen pages side by side fill all of them, which doubles the speed. The BLAKE3 crate
//! has the kernel for it (`hash_many`) but not in its promised interface; therefore the workspace names the minor version
//! of the crate exactly, and the tests compare every result with the promised one.
//!
//! Shape of the tree over 4 chunks of 1 KiB (BLAKE3 paper, 2.1): parent(parent(c0, c1), parent(c2, c3)), the last one
//! with the root flag.

use blake3::IncrementCounter;
use blake3::platform::Platform;

use crate::frame::PAGE_BYTES;

/// Digest of one page.
pub type Leaf = [u8; 32];

/// Pages hashed side by side.
const SIDE_BY_SIDE: usize = 16;
const CHUNK_BYTES: usize = 1024;
const CHUNKS: usize = PAGE_BYTES / CHUNK_BYTES;
const IV: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;

/// Digest of a page of zeros.
pub const ZERO_LEAF: Leaf = [
    0xb6, 0xfb, 0x73, 0xfc, 0x46, 0x93, 0x8c, 0x98, 0x1e, 0x2b, 0x0b, 0x4b, 0x1e, 0xf2, 0x82, 0xad, 0xcf, 0xc8, 0x98,
    0x54, 0xd0, 0x1b, 0xfe, 0x39, 0x72, 0xfd, 0xc4, 0x78, 0x5b, 0x41, 0xb2, 0xc7,
];

/// Digest of one page (or of any other bytes).
pub fn leaf(page: &[u8]) -> Leaf {
    *blake3::hash(page).as_bytes()
}

/// Digests of the pages of `bytes`; a last piece shorter than a page is hashed as it is.
pub fn leaves(bytes: &[u8]) -> Vec<Leaf> {
    let (pages, rest) = bytes.as_chunks::<PAGE_BYTES>();
    let mut leaves = leaves_of_pages(pages.iter());
    if !rest.is_empty() {
        leaves.push(leaf(rest));
    }
    leaves
}

/// Digests of pages, wherever each of them lies.
pub fn leaves_of_pages<'a>(pages: impl Iterator<Item = &'a [u8; PAGE_BYTES]>) -> Vec<Leaf> {
    let mut leaves = Vec::with_capacity(pages.size_hint().0);
    let platform = Platform::detect();
    let mut group = Vec::with_capacity(SIDE_BY_SIDE);
    for page in pages {
        group.push(page);
        if group.len() == SIDE_BY_SIDE {
            hash_side_by_side(platform, &group, &mut leaves);
            group.clear();
        }
    }
    hash_side_by_side(platform, &group, &mut leaves);
    leaves
}

fn hash_side_by_side(platform: Platform, pages: &[&[u8; PAGE_BYTES]], leaves: &mut Vec<Leaf>) {
    if pages.is_empty() {
        return;
    }
    // Chaining values: of the chunks, by chunk and page; then of the parents.
    let mut chunks = [[[0; 32]; SIDE_BY_SIDE]; CHUNKS];
    for (number, values) in chunks.iter_mut().enumerate() {
        let mut inputs: [&[u8; CHUNK_BYTES]; SIDE_BY_SIDE] = [&[0; CHUNK_BYTES]; SIDE_BY_SIDE];
        for (input, page) in inputs.iter_mut().zip(pages) {
            *input = &page.as_chunks::<CHUNK_BYTES>().0[number];
        }
        let out = values.as_flattened_mut();
        let (inputs, out) = (&inputs[..pages.len()], &mut out[..32 * pages.len()]);
        platform.hash_many(inputs, &IV, number as u64, IncrementCounter::No, 0, CHUNK_START, CHUNK_END, out);
    }
    let mut halves = [[[0; 32]; SIDE_BY_SIDE]; 2];
    for (half, values) in halves.iter_mut().enumerate() {
        let (left, right) = (&chunks[2 * half], &chunks[2 * half + 1]);
        hash_parents(platform, left, right, PARENT, &mut values[..pages.len()]);
    }
    let before = leaves.len();
    leaves.resize(before + pages.len(), [0; 32]);
    hash_parents(platform, &halves[0], &halves[1], PARENT | ROOT, &mut leaves[before..]);
}

fn hash_parents(
    platform: Platform,
    left: &[Leaf; SIDE_BY_SIDE],
    right: &[Leaf; SIDE_BY_SIDE],
    flags: u8,
    out: &mut [Leaf],
) {
    let mut blocks = [[0; 64]; SIDE_BY_SIDE];
    for ((block, left), right) in blocks.iter_mut().zip(left).zip(right) {
        block[..32].copy_from_slice(left);
        block[32..].copy_from_slice(right);
    }
    let inputs: [&[u8; 64]; SIDE_BY_SIDE] = std::array::from_fn(|at| &blocks[at]);
    let inputs = &inputs[..out.len()];
    platform.hash_many(inputs, &IV, 0, IncrementCounter::No, flags, 0, 0, out.as_flattened_mut());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_digest_of_a_zero_page_is_the_constant() {
        assert_eq!(leaf(&[0; PAGE_BYTES]), ZERO_LEAF, "{:02x?}", leaf(&[0; PAGE_BYTES]));
        assert_eq!(leaves(&[0; 33 * PAGE_BYTES]), [ZERO_LEAF; 33]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn many_at_once_are_the_same_as_one_by_one(seed in any::<u64>(), bytes in 0..40 * PAGE_BYTES) {
            let mut data = vec![0; bytes];
            blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut data);
            let alone: Vec<Leaf> = data.chunks(PAGE_BYTES).map(leaf).collect();
            prop_assert_eq!(leaves(&data), alone);
        }
    }
}

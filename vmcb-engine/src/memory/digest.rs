//! One digest of many pages, kept up to date page by page.
//!
//! ```text
//! leaf    = BLAKE3(page)
//! group   = BLAKE3(up to 512 leaves, one after the other)
//! above   = groups of 512 groups in the same way, until one node is left: the root. There is at least one grouping.
//! root of no pages = BLAKE3("")
//! ```
//! A page that nobody has set is a zero page. Leaves are kept only for groups that hold something else than zeros, so an
//! empty guest costs nothing. Only groups with a changed leaf are hashed again.
//!
//! This room refuses to know where pages come from.

use proto::ids::Digest;
use proto::leaf::Leaf;

pub use proto::leaf::{ZERO_LEAF, leaf, leaves};

use super::shared::Run;

/// Fan-out of the tree.
pub const FAN_OUT: usize = 512;

/// Digests of the pages of one space, and the tree over them.
#[derive(Clone, Debug)]
pub struct PageDigests {
    pages: u64,
    /// Leaves by group; `None` is a group of zero pages.
    groups: Vec<Option<Box<[Leaf; FAN_OUT]>>>,
    /// Nodes above the leaves, by level; the last level has one node, the root (none if there are no pages).
    levels: Vec<Vec<Leaf>>,
    /// Nodes of the first level that must be computed again.
    stale: Vec<bool>,
}

impl PageDigests {
    /// Digests of so many zero pages.
    pub fn new(pages: u64) -> Self {
        let groups = pages.div_ceil(FAN_OUT as u64) as usize;
        let mut levels = vec![vec![[0; 32]; groups]];
        while let Some(nodes) = levels.last().map(Vec::len).filter(|nodes| *nodes > 1) {
            levels.push(vec![[0; 32]; nodes.div_ceil(FAN_OUT)]);
        }
        Self { pages, groups: vec![None; groups], levels, stale: vec![true; groups] }
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Sets the digest of a page.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn set(&mut self, page: u64, leaf: Leaf) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let (group, at) = (page as usize / FAN_OUT, page as usize % FAN_OUT);
        if self.groups[group].is_none() && leaf == ZERO_LEAF {
            return;
        }
        let leaves = self.groups[group].get_or_insert_with(|| Box::new([ZERO_LEAF; FAN_OUT]));
        if leaves[at] != leaf {
            leaves[at] = leaf;
            self.stale[group] = true;
        }
    }

    /// Makes pages zero.
    ///
    /// # Panics
    /// If there are no such pages.
    pub fn set_zero(&mut self, run: Run) {
        assert!(run.end() <= self.pages, "{run:?} of {}", self.pages);
        let mut page = run.first;
        while page < run.end() {
            let group = page as usize / FAN_OUT;
            let next = ((group + 1) * FAN_OUT) as u64;
            if self.groups[group].is_some() {
                (page..next.min(run.end())).for_each(|page| self.set(page, ZERO_LEAF));
            }
            page = next;
        }
    }

    /// Digest of a page.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn get(&self, page: u64) -> Leaf {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.groups[page as usize / FAN_OUT].as_ref().map_or(ZERO_LEAF, |leaves| leaves[page as usize % FAN_OUT])
    }

    /// The digest of all pages.
    pub fn root(&mut self) -> Digest {
        if self.pages == 0 {
            return Digest(*blake3::hash(&[]).as_bytes());
        }
        let mut stale = std::mem::take(&mut self.stale);
        let zero_group = *blake3::hash([ZERO_LEAF; FAN_OUT].as_flattened()).as_bytes();
        for group in touched(&stale) {
            let leaves = (self.pages as usize - group * FAN_OUT).min(FAN_OUT);
            self.levels[0][group] = match &self.groups[group] {
                None if leaves == FAN_OUT => zero_group,
                None => hash_nodes(&[ZERO_LEAF; FAN_OUT][..leaves]),
                Some(group) => hash_nodes(&group[..leaves]),
            };
        }
        self.stale = vec![false; stale.len()];
        for level in 1..self.levels.len() {
            let above: Vec<bool> = stale.chunks(FAN_OUT).map(|nodes| nodes.contains(&true)).collect();
            let (below, here) = self.levels.split_at_mut(level);
            for (node, nodes) in below[level - 1].chunks(FAN_OUT).enumerate().filter(|(node, _)| above[*node]) {
                here[0][node] = hash_nodes(nodes);
            }
            stale = above;
        }
        Digest(self.levels.last().expect("there is at least one level")[0])
    }

    /// The first page whose digest differs, if any.
    ///
    /// # Panics
    /// If the two are not of the same length.
    pub fn first_difference(&self, other: &PageDigests) -> Option<u64> {
        assert_eq!(self.pages, other.pages);
        (0..self.pages).find(|page| self.get(*page) != other.get(*page))
    }
}

fn touched(stale: &[bool]) -> impl Iterator<Item = usize> {
    stale.iter().enumerate().filter_map(|(node, stale)| stale.then_some(node))
}

fn hash_nodes(nodes: &[Leaf]) -> Leaf {
    *blake3::hash(nodes.as_flattened()).as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, word for word.
    fn plain(pages: &[Leaf]) -> Digest {
        let mut nodes = pages.to_vec();
        if nodes.is_empty() {
            return Digest(*blake3::hash(b"").as_bytes());
        }
        loop {
            nodes = nodes.chunks(512).map(|group| *blake3::hash(&group.concat()).as_bytes()).collect();
            if let [root] = nodes[..] {
                return Digest(root);
            }
        }
    }

    #[test]
    fn roots_of_zero_pages_follow_the_definition() {
        for pages in [0, 1, 2, 511, 512, 513, 1024, 512 * 512, 512 * 512 + 1] {
            assert_eq!(PageDigests::new(pages).root(), plain(&vec![ZERO_LEAF; pages as usize]), "{pages} pages");
        }
    }

    #[test]
    fn three_levels_follow_the_definition() {
        let pages = 512 * 512 + 700;
        let mut leaves = vec![ZERO_LEAF; pages];
        let mut digests = PageDigests::new(pages as u64);
        digests.root();
        for page in [0, 511, 512, 70_000, pages - 1] {
            leaves[page] = leaf(&page.to_le_bytes());
            digests.set(page as u64, leaves[page]);
            assert_eq!(digests.root(), plain(&leaves), "page {page}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn any_order_of_changes_gives_the_root_of_the_definition(
            pages in 1..1500u64,
            changes in proptest::collection::vec((any::<prop::sample::Index>(), 0..4u8, any::<bool>()), 0..60),
        ) {
            let mut leaves = vec![ZERO_LEAF; pages as usize];
            let mut digests = PageDigests::new(pages);
            for (at, value, look) in changes {
                let at = at.index(pages as usize);
                if value == 0 {
                    let run = Run { first: at as u64, pages: (pages - at as u64).min(600) };
                    leaves[at..run.end() as usize].fill(ZERO_LEAF);
                    digests.set_zero(run);
                } else {
                    leaves[at] = leaf(&[value]);
                    digests.set(at as u64, leaves[at]);
                }
                if look {
                    prop_assert_eq!(digests.root(), plain(&leaves));
                }
            }
            prop_assert_eq!(digests.root(), plain(&leaves));
        }
    }
}

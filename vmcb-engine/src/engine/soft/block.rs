//! Decoded blocks: straight runs of operations within one page of RAM, keyed by guest-physical address and [`Mode`].
//!
//! A block is found by its key; that the key is right is the execute TLB's word, asked each time. The branch that ends a
//! block remembers where the blocks lie that followed it ([`Link`]), and each block remembers who remembers it. A write to
//! a line that holds decoded code kills the blocks of that line: their operations are patched to end at once, whoever links
//! to them forgets them, and the memory stays until the loop is out of the block.

use std::cell::Cell;
use std::collections::BTreeMap;

use super::core::Mode;
use super::op::{Op, stop_here};

/// Most operations of a block.
pub const OPS_MAX: usize = 32;
const SLOTS: usize = 1 << 16;
/// Slot of a block that is run once.
const NO_SLOT: u32 = u32::MAX;

/// Where the block lies that follows another one; empty until it was found once.
#[derive(Default)]
pub struct Link {
    /// Address of its operations, as a number: what holds these may move between threads. 0 if unknown.
    pub ops: Cell<usize>,
    /// Guest-physical address of its first byte.
    pub gpa: Cell<u64>,
}

/// The links of one block: [0] to what follows it, [1] to the target of the branch that ends it.
pub struct Links {
    /// Slot of the block.
    pub slot: u32,
    /// See the type.
    pub exits: [Link; 2],
}

impl Default for Links {
    fn default() -> Self {
        Self { slot: NO_SLOT, exits: Default::default() }
    }
}

/// A decoded run of instructions.
pub struct Block {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Mode it was decoded for.
    pub mode: Mode,
    /// Page number of RAM.
    pub page: u64,
    /// Lines of the page that its bytes touch.
    pub lines: u64,
    /// Instructions in it.
    pub count: u32,
    /// Operations; the last returns.
    pub ops: Box<[Op]>,
    /// The operation that uses `links`, if one does.
    pub linked: Option<usize>,
    /// What its last operation remembers.
    pub links: Links,
    /// (slot, exit) of links that were made to it. Some may lead elsewhere by now.
    pub incoming: Vec<(u32, u8)>,
}

impl Block {
    /// Whatever of it has not run yet never will, and nothing follows it.
    fn stop(&self) {
        for op in &self.ops {
            op.run.set(stop_here);
        }
        for link in &self.links.exits {
            link.ops.set(0);
        }
    }

    fn first(&self) -> usize {
        self.ops.as_ptr() as usize
    }

    /// Gives it its final place, which its last operation then knows.
    fn settle(mut self, slot: u32) -> Box<Self> {
        self.links.slot = slot;
        let mut block = Box::new(self);
        if let Some(at) = block.linked {
            block.ops[at].immediate = &raw const block.links as u64;
        }
        block
    }
}

/// What finding a block needs to know of it: address and mode in one word, and where its operations are.
#[derive(Clone, Copy)]
struct Head {
    key: u64,
    ops: usize,
}

/// Calls that are remembered.
const CALLS: usize = 32;

/// Where the last calls return to, as a ring: RIP, and the address of the [`Links`] of the block that called.
#[derive(Default)]
pub struct Returns {
    calls: [(u64, u64); CALLS],
    next: usize,
}

impl Returns {
    /// A call whose links (0 if there are none) know what follows it.
    #[inline(always)]
    pub fn push(&mut self, rip: u64, links: u64) {
        self.calls[self.next % CALLS] = (rip, links);
        self.next = self.next.wrapping_add(1);
    }

    /// The call that returns next.
    #[inline(always)]
    pub fn top(&self) -> (u64, u64) {
        self.calls[self.next.wrapping_sub(1) % CALLS]
    }

    /// It has returned.
    #[inline(always)]
    pub fn pop(&mut self) {
        self.next = self.next.wrapping_sub(1);
    }

    /// Blocks are about to go.
    pub fn forget(&mut self) {
        self.calls = Default::default();
    }
}

/// All decoded blocks of a processor.
pub struct Blocks {
    heads: Box<[Head]>,
    slots: Box<[Option<Box<Block>>]>,
    pages: BTreeMap<u64, Vec<u32>>,
    #[allow(clippy::vec_box, reason = "a dead block may still run, and its last operation knows where its links are")]
    dead: Vec<Box<Block>>,
    held: Option<Box<Block>>,
}

/// Lines (64 bytes each) of a page that a range touches, one bit each. Ranges do not leave their page.
#[inline]
pub fn lines_of(offset: u64, bytes: usize) -> u64 {
    let first = (offset >> 6) & 63;
    let last = ((offset + bytes.max(1) as u64 - 1) >> 6).min(63);
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

#[inline(always)]
fn slot_of(key: u64) -> usize {
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize & (SLOTS - 1)
}

impl Default for Blocks {
    fn default() -> Self {
        Self::new()
    }
}

impl Blocks {
    /// None yet.
    pub fn new() -> Self {
        Self {
            // No address is all ones.
            heads: vec![Head { key: u64::MAX, ops: 0 }; SLOTS].into_boxed_slice(),
            slots: (0..SLOTS).map(|_| None).collect(),
            pages: BTreeMap::new(),
            dead: Vec::new(),
            held: None,
        }
    }

    /// Operations of the block that begins at `gpa`, if there is one.
    #[inline(always)]
    pub fn find(&self, gpa: u64, mode: Mode) -> Option<*const Op> {
        let key = gpa | mode.key();
        let slot = slot_of(key);
        let (head, other) = (self.heads[slot], self.heads[slot ^ 1]);
        if head.key == key {
            return Some(head.ops as *const Op);
        }
        (other.key == key).then_some(other.ops as *const Op)
    }

    /// The slot of the block with this key, or where it would go: its own, unless only the other one is free.
    fn place_of(&self, key: u64) -> usize {
        let slot = slot_of(key);
        let (head, other) = (self.heads[slot].key, self.heads[slot ^ 1].key);
        if head != key && (other == key || (head != u64::MAX && other == u64::MAX)) { slot ^ 1 } else { slot }
    }

    /// True if blocks wait to be let go of: the loop must be reached.
    #[inline(always)]
    pub fn has_dead(&self) -> bool {
        !self.dead.is_empty()
    }

    /// Adds a block and returns its operations. The caller has told the stamps and the TLB about its lines.
    pub fn insert(&mut self, block: Block) -> *const Op {
        let key = block.gpa | block.mode.key();
        let slot = self.place_of(key);
        self.bury(slot as u32);
        self.pages.entry(block.page).or_default().push(slot as u32);
        let block = self.slots[slot].insert(block.settle(slot as u32));
        self.heads[slot] = Head { key, ops: block.first() };
        block.ops.as_ptr()
    }

    /// Between two runs: no block is found any more, and none leads to another one, until each is shown again. What is hidden
    /// is killed and replaced as ever. The caller forgets what returns know.
    pub fn hide(&mut self) {
        self.heads.fill(Head { key: u64::MAX, ops: 0 });
        for slot in self.pages.values().flatten() {
            let Some(block) = self.slots[*slot as usize].as_deref_mut() else { continue };
            block.links.exits.iter().for_each(|link| link.ops.set(0));
            block.incoming.clear();
        }
        self.held = None;
    }

    /// Lets the hidden block that begins at `gpa` be found again.
    pub fn show(&mut self, gpa: u64, mode: Mode) -> Option<&Block> {
        let slot = slot_of(gpa | mode.key());
        let is =
            |slot: &usize| self.slots[*slot].as_deref().is_some_and(|block| block.gpa == gpa && block.mode == mode);
        let slot = [slot, slot ^ 1].into_iter().find(is)?;
        let block = self.slots[slot].as_deref()?;
        self.heads[slot] = Head { key: gpa | mode.key(), ops: block.first() };
        Some(block)
    }

    /// Keeps a block that is run once, and returns its operations.
    pub fn hold(&mut self, block: Block) -> *const Op {
        self.held.insert(block.settle(NO_SLOT)).ops.as_ptr()
    }

    /// Lets go of the block that was run once. The caller forgets what returns know. False if there is none.
    pub fn drop_held(&mut self) -> bool {
        self.held.take().is_some()
    }

    /// The block with this key runs: nothing of it does any more but the instruction that does now. Returns the offsets of
    /// its instructions.
    pub fn stop_running(&mut self, gpa: u64, mode: Mode) -> Option<Vec<u16>> {
        let is = |block: &&Block| block.gpa == gpa && block.mode == mode;
        let offsets = |block: &Block| block.ops.iter().take(block.count as usize).map(|op| op.offset).collect();
        if let Some(held) = self.held.as_deref().filter(is) {
            held.stop();
            return Some(offsets(held));
        }
        let slot = self.place_of(gpa | mode.key());
        if let Some(kept) = self.slots[slot].as_deref().filter(is) {
            let offsets = offsets(kept);
            self.bury(slot as u32);
            return Some(offsets);
        }
        // The instruction has overwritten itself.
        self.dead.iter().rev().map(|block| &**block).find(is).map(offsets)
    }

    /// Makes an exit of the block in slot `from` lead to the block at `gpa`. A block that is run once has no use for it.
    pub fn connect(&mut self, from: u32, exit: usize, gpa: u64, mode: Mode) {
        let key = gpa | mode.key();
        let to = self.place_of(key);
        if from == NO_SLOT || self.heads[to].key != key {
            return;
        }
        let first = self.heads[to].ops;
        let Some(source) = self.slots[from as usize].as_deref() else { return };
        source.links.exits[exit].ops.set(first);
        source.links.exits[exit].gpa.set(gpa);
        let slots = &self.slots;
        let leads_here = |(slot, exit): &(u32, u8)| {
            let source = slots[*slot as usize].as_deref();
            source.is_some_and(|source| source.links.exits[usize::from(*exit)].ops.get() == first)
        };
        let Some(target) = slots[to].as_deref() else { return };
        // Before the list grows, what does not lead here any more goes.
        let mut incoming = match target.incoming.len() == target.incoming.capacity() {
            true => Some(target.incoming.iter().copied().filter(leads_here).collect::<Vec<_>>()),
            false => None,
        };
        let target = self.slots[to].as_deref_mut().expect("it was there a moment ago");
        if let Some(kept) = incoming.take() {
            target.incoming.clear();
            target.incoming.extend(kept);
        }
        target.incoming.push((from, exit as u8));
    }

    fn bury(&mut self, slot: u32) {
        if let Some(block) = self.slots[slot as usize].take() {
            self.heads[slot as usize] = Head { key: u64::MAX, ops: 0 };
            block.stop();
            let first = block.first();
            for (source, exit) in &block.incoming {
                let source = self.slots[*source as usize].as_deref();
                let link = source.map(|source| &source.links.exits[usize::from(*exit)]);
                if let Some(link) = link.filter(|link| link.ops.get() == first) {
                    link.ops.set(0);
                }
            }
            if let Some(slots) = self.pages.get_mut(&block.page) {
                slots.retain(|other| *other != slot);
            }
            self.dead.push(block);
        }
    }

    /// Somebody wrote these lines of a page: kills what was decoded from them. Returns the lines that still hold code.
    pub fn invalidate(&mut self, page: u64, lines: u64) -> u64 {
        if let Some(held) = self.held.as_deref().filter(|held| held.page == page && held.lines & lines != 0) {
            held.stop();
        }
        let Some(slots) = self.pages.get(&page).cloned() else { return 0 };
        let mut left = 0;
        for slot in slots {
            match self.slots[slot as usize].as_deref().map(|block| block.lines) {
                Some(held) if held & lines != 0 => self.bury(slot),
                Some(held) => left |= held,
                None => {}
            }
        }
        if left == 0 {
            self.pages.remove(&page);
        }
        left
    }

    /// Between blocks: lets go of dead ones.
    pub fn sweep(&mut self) {
        self.dead.clear();
    }

    /// Pages that hold decoded code.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_cover_first_and_last_byte() {
        assert_eq!(lines_of(0, 1), 1);
        assert_eq!(lines_of(63, 2), 3);
        assert_eq!(lines_of(4095, 1), 1 << 63);
        assert_eq!(lines_of(0, 4096), u64::MAX);
    }
}

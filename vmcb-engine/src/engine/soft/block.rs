//! Decoded blocks: straight runs of operations within one page of RAM, keyed by guest-physical address and [`Mode`].
//!
//! Blocks are found by linear RIP through a jump cache whose entries die with the TLB's map epoch, else by key. A write to
//! a line that holds decoded code kills the blocks of that line: their operations are patched to end at once, and the
//! memory stays until the loop is out of the block.

use std::collections::BTreeMap;

use super::core::Mode;
use super::op::{Op, stop_here};

/// Most operations of a block.
pub const OPS_MAX: usize = 32;
const SLOTS: usize = 1 << 16;
const JUMPS: usize = 1 << 12;

/// A decoded run of instructions.
pub struct Block {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Mode it was decoded for.
    pub mode: u32,
    /// Page number of RAM.
    pub page: u64,
    /// Lines of the page that its bytes touch.
    pub lines: u64,
    /// Instructions in it.
    pub count: u32,
    /// Operations; the last returns.
    pub ops: Box<[Op]>,
}

impl Block {
    /// Whatever of it has not run yet never will.
    fn stop(&self) {
        for op in &self.ops {
            op.run.set(stop_here);
        }
    }
}

/// Where the block of a linear RIP is. Dies with any translation of code and with any block: `epoch` is the sum of both
/// counts, and each only grows.
#[derive(Clone, Copy, Default)]
struct Jump {
    rip: u64,
    /// Address of its operations, as a number: what holds these may move between threads.
    ops: usize,
    epoch: u32,
    mode: u32,
    count: u32,
}

/// All decoded blocks of a processor.
pub struct Blocks {
    slots: Box<[Option<Box<Block>>]>,
    jumps: Box<[Jump]>,
    pages: BTreeMap<u64, Vec<u32>>,
    dead: Vec<Block>,
    held: Option<Box<Block>>,
    /// Blocks that died so far.
    buried: u32,
}

/// Lines (64 bytes each) of a page that a range touches, one bit each. Ranges do not leave their page.
#[inline]
pub fn lines_of(offset: u64, bytes: usize) -> u64 {
    let first = (offset >> 6) & 63;
    let last = ((offset + bytes.max(1) as u64 - 1) >> 6).min(63);
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

#[inline]
fn slot_of(gpa: u64, mode: u32) -> usize {
    let mixed = (gpa ^ u64::from(mode) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 48) as usize & (SLOTS - 1)
}

#[inline(always)]
fn jump_of(rip: u64) -> usize {
    (rip ^ rip >> 12) as usize & (JUMPS - 1)
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
            slots: (0..SLOTS).map(|_| None).collect(),
            // Epoch 0 never is: the TLB's begins at 1.
            jumps: vec![Jump::default(); JUMPS].into_boxed_slice(),
            pages: BTreeMap::new(),
            dead: Vec::new(),
            held: None,
            buried: 0,
        }
    }

    /// Operations and instruction count of the block that begins at linear `rip`, if the jump cache knows it.
    #[inline(always)]
    pub fn jump(&self, rip: u64, map_epoch: u32, mode: u32) -> Option<(*const Op, u32)> {
        let jump = &self.jumps[jump_of(rip)];
        let known = jump.rip == rip && jump.epoch == map_epoch.wrapping_add(self.buried) && jump.mode == mode;
        known.then_some((jump.ops as *const Op, jump.count))
    }

    /// The block that begins at `gpa`, if there is one; remembers it for `rip`.
    pub fn find(&mut self, rip: u64, map_epoch: u32, gpa: u64, mode: Mode) -> Option<&Block> {
        let (mode, slot) = (mode.key(), slot_of(gpa, mode.key()));
        let block = self.slots[slot].as_deref().filter(|block| block.gpa == gpa && block.mode == mode)?;
        let epoch = map_epoch.wrapping_add(self.buried);
        self.jumps[jump_of(rip)] = Jump { rip, ops: block.ops.as_ptr() as usize, epoch, mode, count: block.count };
        Some(block)
    }

    /// True if blocks wait to be let go of: the loop must be reached.
    #[inline(always)]
    pub fn has_dead(&self) -> bool {
        !self.dead.is_empty()
    }

    /// Adds a block and returns its operations. The caller has told the stamps and the TLB about its lines.
    pub fn insert(&mut self, block: Block) -> *const Op {
        let slot = slot_of(block.gpa, block.mode);
        self.bury(slot as u32);
        self.pages.entry(block.page).or_default().push(slot as u32);
        self.slots[slot].insert(Box::new(block)).ops.as_ptr()
    }

    /// Keeps a block that is run once, and returns its operations.
    pub fn hold(&mut self, block: Block) -> *const Op {
        self.held.insert(Box::new(block)).ops.as_ptr()
    }

    fn bury(&mut self, slot: u32) {
        if let Some(block) = self.slots[slot as usize].take() {
            block.stop();
            self.buried = self.buried.wrapping_add(1);
            if let Some(slots) = self.pages.get_mut(&block.page) {
                slots.retain(|other| *other != slot);
            }
            self.dead.push(*block);
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
    #[inline(always)]
    pub fn sweep(&mut self) {
        if !self.dead.is_empty() {
            self.dead.clear();
        }
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

//! The loop of one processor: find the block at RIP, run it, deliver what it raised; stop exactly where asked.
//!
//! Exactness does not depend on how code was split: a block longer than what is left of the budget is decoded again, only
//! as long as that, outside the cache.

use super::block::Block;
use super::core::{CS, Core, RIP_BASE};
use super::decode;
use super::op::{Flow, Op, count_of};
use super::tlb::Tlb;

/// Blocks that run one after the other before the loop is seen again.
const FOLLOW: u32 = 64;

/// Why the loop ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// The stop point, between two instructions.
    Reached,
    /// A #VMEXIT: [`Core::exit`].
    Exit,
    /// A breakpoint or watchpoint, between two instructions: [`Core::take_stop`].
    Stopped,
}

impl Core {
    /// Runs the loaded guest until `stop_at` instructions have retired or a #VMEXIT happens. Whether an interrupt may be
    /// taken is looked at before every block that follows an event; a block never contains an instruction after which that
    /// could change.
    pub fn run_until(&mut self, stop_at: u64) -> Ended {
        let ended = self.run_blocks(stop_at);
        self.settle_mxcsr();
        ended
    }

    fn run_blocks(&mut self, stop_at: u64) -> Ended {
        let retired = self.retired();
        assert!(stop_at >= retired, "time does not run backwards: {stop_at} < {retired}");
        self.stop_at = stop_at;
        self.budget = (stop_at - retired) as i64;
        loop {
            self.sweep();
            if self.event_pending() {
                if self.take_event() == Flow::Exit && !self.leave_to_hosted() {
                    return Ended::Exit;
                }
                // Another one may be pending behind it.
                continue;
            }
            if self.stops.is_some() && self.must_stop() {
                return Ended::Stopped;
            }
            if self.budget <= 0 {
                return Ended::Reached;
            }
            // One instruction only, where an event must be looked at right after it (interrupt shadow, single step).
            // Otherwise there is none until an instruction that ends with a look at the loop.
            let alone = self.single_step();
            let limit = if alone { 1 } else { self.budget as usize };
            self.follow = if alone { 0 } else { FOLLOW };
            let mut flow = self.run_from_loop(limit);
            if flow == Flow::Fault {
                flow = self.deliver_fault();
            }
            if flow == Flow::Exit && !self.leave_to_hosted() {
                return Ended::Exit;
            }
        }
    }

    /// Sets the count of retired instructions, between two runs: time may have been set, or other processors have run.
    pub fn set_retired(&mut self, retired: u64) {
        self.stop_at = retired;
        self.budget = 0;
    }

    /// Runs one instruction and delivers what it raised, whatever the budget is.
    pub(super) fn step_one(&mut self) -> Flow {
        self.sweep();
        self.single_step();
        self.follow = 0;
        let flow = self.run_from_loop(1);
        self.settle_mxcsr();
        match flow {
            Flow::Fault => self.deliver_fault(),
            flow => flow,
        }
    }

    /// Lets go of dead blocks, and of what is known of them.
    #[inline(always)]
    fn sweep(&mut self) {
        if self.blocks.has_dead() {
            self.returns.forget();
            self.blocks.sweep();
        }
    }

    /// Runs a block once.
    fn hold(&mut self, block: Block) -> *const Op {
        // The one before it goes.
        self.returns.forget();
        self.blocks.hold(block)
    }

    /// True where a block could reach beyond the limit of CS: blocks know pages, not segments.
    #[inline(always)]
    fn is_near_code_end(&self) -> bool {
        !self.mode.long && self.rip.saturating_add(0x1000) > u64::from(self.segments[CS].limit)
    }

    /// One instruction, decoded anew, so that no byte of it lies beyond the limit of CS.
    #[cold]
    #[inline(never)]
    fn run_near_code_end(&mut self) -> Flow {
        let decoded = match self.fetch().and_then(|fetched| decode::block(self, fetched, 1)) {
            Ok(decoded) => decoded,
            Err(stop) => return self.fetch_stopped(stop),
        };
        self.note_block(&decoded.block);
        let ops = self.hold(decoded.block);
        self.begin_block();
        self.enter(ops)
    }

    /// The block that begins at `gpa`, if it was decoded but hidden.
    fn show(&mut self, gpa: u64) -> Option<*const Op> {
        let noting = self.noting.as_deref_mut()?;
        let block = self.blocks.show(gpa, self.mode)?;
        noting.run(block);
        Some(block.ops.as_ptr())
    }

    fn run_from_loop(&mut self, limit: usize) -> Flow {
        let flow = self.run_block(limit);
        if self.stops.is_some() {
            self.block_ended(flow);
        }
        flow
    }

    fn run_block(&mut self, limit: usize) -> Flow {
        if self.is_near_code_end() {
            return self.run_near_code_end();
        }
        match self.block_at(self.rip) {
            Some((_, ops)) if count_of(ops) as usize <= limit => {
                self.begin_block();
                self.enter(ops)
            }
            _ => self.run_found(limit),
        }
    }

    /// Linear address of an instruction.
    #[inline(always)]
    pub(super) fn linear_rip(&self, rip: u64) -> u64 {
        if self.mode.long { rip } else { rip.wrapping_add(self.segments[CS].base) & 0xffff_ffff }
    }

    /// Guest-physical address and operations of the block that begins at `rip`, if it is known and the translation of its
    /// page is cached: what is found must not outlive its translation, or where a run is cut would be visible.
    #[inline(always)]
    pub(super) fn block_at(&self, rip: u64) -> Option<(u64, *const Op)> {
        let linear = self.linear_rip(rip);
        let gpa = Tlb::code_gpa(self.tlb_base, linear)?;
        self.blocks.find(gpa, self.mode).map(|ops| (gpa, ops))
    }

    /// From the end of a block that changed nothing but RIP, registers and memory: runs the next one, if the loop would do
    /// nothing but that. No event can have come up: what makes one possible ends its block with a look at the loop.
    #[inline(always)]
    pub(super) fn follow(&mut self) -> Flow {
        if self.follow == 0 || self.is_near_code_end() {
            return Flow::Next;
        }
        match self.block_at(self.rip) {
            Some((_, ops)) => self.enter_next(ops),
            None => Flow::Next,
        }
    }

    /// Enters the next block without a look at the loop, if the budget allows.
    #[inline(always)]
    pub(super) fn enter_next(&mut self, ops: *const Op) -> Flow {
        if count_of(ops) > self.budget {
            return Flow::Next;
        }
        self.follow -= 1;
        self.enter(ops)
    }

    #[inline(always)]
    fn enter(&mut self, ops: *const Op) -> Flow {
        self.gprs[RIP_BASE as usize] = self.rip;
        self.budget -= count_of(ops);
        super::op::start(self, ops)
    }

    #[inline(never)]
    fn run_found(&mut self, limit: usize) -> Flow {
        let fetched = match self.fetch() {
            Ok(fetched) => fetched,
            Err(stop) => return self.fetch_stopped(stop),
        };
        let limit = self.limit_of(limit);
        if let Some(ops) = self.blocks.find(fetched.gpa, self.mode).or_else(|| self.show(fetched.gpa))
            && count_of(ops) as usize <= limit
        {
            self.begin_block();
            return self.enter(ops);
        }
        let decoded = match decode::block(self, fetched, limit.min(self.block_ops_max)) {
            Ok(decoded) => decoded,
            Err(stop) => return self.fetch_stopped(stop),
        };
        let count = decoded.block.count;
        self.note_block(&decoded.block);
        for (page, lines) in [(decoded.block.page, decoded.block.lines)].into_iter().chain(decoded.second) {
            // A page that has code already is not in any write table.
            if self.memory.stamps().code_lines(page) == 0 {
                if self.shares_memory {
                    self.new_code_pages.push(page);
                }
                self.tlb.protect_code(page);
            }
            self.memory.stamps().add_code_lines(page, lines);
        }
        // Not kept: a block that was cut short by the budget, one whose last instruction crosses into another page, which
        // could change unseen, and one before which the loop must be passed.
        let whole = decoded.second.is_none() && (limit >= self.block_ops_max || (count as usize) < limit);
        let keep = whole && !self.is_suspect(fetched.gpa);
        let ops = if keep { self.blocks.insert(decoded.block) } else { self.hold(decoded.block) };
        self.begin_block();
        self.enter(ops)
    }
}

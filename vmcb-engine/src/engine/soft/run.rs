//! The loop of one processor: find the block at RIP, run it, deliver what it raised; stop exactly where asked.
//!
//! Exactness does not depend on how code was split: a block longer than what is left of the budget is decoded again, only
//! as long as that, outside the cache.

use super::block::OPS_MAX;
use super::core::{CS, Core, RIP_BASE, rflags};
use super::decode;
use super::op::Flow;

/// Blocks that run one after the other before the loop is seen again.
const FOLLOW: u32 = 64;

/// Why the loop ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// The stop point, between two instructions.
    Reached,
    /// A #VMEXIT: [`Core::exit`].
    Exit,
}

impl Core {
    /// Runs the loaded guest until `stop_at` instructions have retired or a #VMEXIT happens. Whether an interrupt may be
    /// taken is looked at before every block that follows an event; a block never contains an instruction after which that
    /// could change.
    pub fn run_until(&mut self, stop_at: u64) -> Ended {
        let retired = self.retired();
        assert!(stop_at >= retired, "time does not run backwards: {stop_at} < {retired}");
        self.stop_at = stop_at;
        self.budget = (stop_at - retired) as i64;
        loop {
            self.blocks.sweep();
            if self.event_pending() && self.take_event() == Flow::Exit && !self.leave_to_hosted() {
                return Ended::Exit;
            }
            if self.budget <= 0 {
                return Ended::Reached;
            }
            // One instruction only, where an event must be looked at right after it (interrupt shadow, single step).
            let limit = if self.single_step() { 1 } else { self.budget as usize };
            self.follow = FOLLOW;
            let mut flow = self.run_block(limit);
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
        self.blocks.sweep();
        self.single_step();
        self.follow = 0;
        match self.run_block(1) {
            Flow::Fault => self.deliver_fault(),
            flow => flow,
        }
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
        let decoded = match self.translate_code(self.rip).and_then(|fetched| decode::block(self, fetched, 1)) {
            Ok(decoded) => decoded,
            Err(stop) => return self.fetch_stopped(stop),
        };
        let count = decoded.block.count;
        let ops = self.blocks.hold(decoded.block);
        self.enter(ops, count)
    }

    fn run_block(&mut self, limit: usize) -> Flow {
        if self.is_near_code_end() {
            return self.run_near_code_end();
        }
        let mode = self.mode.key();
        if let Some((ops, count)) = self.blocks.jump(self.rip, self.tlb.map_epoch, mode)
            && count as usize <= limit
        {
            return self.enter(ops, count);
        }
        self.run_found(limit)
    }

    /// From the end of a block that changed nothing but RIP, registers and memory: runs the next one, if the loop would do
    /// nothing but that.
    #[inline(always)]
    pub(super) fn follow(&mut self) -> Flow {
        if self.follow == 0
            || self.blocks.has_dead()
            || self.interrupt_shadow
            || self.system_flags & rflags::TF != 0
            || self.event_pending()
        {
            return Flow::Next;
        }
        match self.blocks.jump(self.rip, self.tlb.map_epoch, self.mode.key()) {
            Some((ops, count)) if i64::from(count) <= self.budget => {
                self.follow -= 1;
                // Ends the shadow of the instruction before; there is none to begin.
                self.single_step();
                self.enter(ops, count)
            }
            _ => Flow::Next,
        }
    }

    #[inline(always)]
    fn enter(&mut self, ops: *const super::op::Op, count: u32) -> Flow {
        self.gprs[RIP_BASE as usize] = self.rip;
        self.budget -= i64::from(count);
        super::op::start(self, ops)
    }

    #[inline(never)]
    fn run_found(&mut self, limit: usize) -> Flow {
        let fetched = match self.translate_code(self.rip) {
            Ok(fetched) => fetched,
            Err(stop) => return self.fetch_stopped(stop),
        };
        let (rip, epoch, mode) = (self.rip, self.tlb.map_epoch, self.mode);
        if let Some(block) = self.blocks.find(rip, epoch, fetched.gpa, mode)
            && block.count as usize <= limit
        {
            let (ops, count) = (block.ops.as_ptr(), block.count);
            return self.enter(ops, count);
        }
        let decoded = match decode::block(self, fetched, limit.min(OPS_MAX)) {
            Ok(decoded) => decoded,
            Err(stop) => return self.fetch_stopped(stop),
        };
        let count = decoded.block.count;
        for (page, lines) in [(decoded.block.page, decoded.block.lines)].into_iter().chain(decoded.second) {
            if self.shares_memory && self.memory.stamps().code_lines(page) == 0 {
                self.new_code_pages.push(page);
            }
            self.memory.stamps().add_code_lines(page, lines);
            self.tlb.protect_code(page);
        }
        // Not kept: a block that was cut short by the budget, and one whose last instruction crosses into another page,
        // which could change unseen.
        let keep = decoded.second.is_none() && (limit >= OPS_MAX || (count as usize) < limit);
        let ops = if keep { self.blocks.insert(decoded.block) } else { self.blocks.hold(decoded.block) };
        self.enter(ops, count)
    }
}

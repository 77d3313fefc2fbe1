//! A processor as it stands between two runs, caches of translations included, to come back to in the same process or in
//! another one.
//!
//! What a guest could notice is here; what it cannot (decoded code, which path a translation takes, pages of nested tables)
//! is made anew. RAM is not here. A new field of [`Core`] does not compile until somebody decides on which side it is.

use super::core::{Core, Fault, Flags};
use super::deliver::Events;
use super::fpu::Fpu;
use super::svm::control::Controls;
use super::svm::exit::SvmExit;
use super::svm::leave::Hosted;
use super::svm::msr::Msrs;
use super::tlb::Cached;
use crate::vmcb::Segment;

/// One processor.
#[derive(Clone)]
pub struct CoreRung {
    gprs: [u64; 32],
    flags: Flags,
    rip: u64,
    system_flags: u64,
    segments: [Segment; 6],
    tables: [Segment; 4],
    cpl: u8,
    control_registers: [u64; 5],
    debug: [u64; 6],
    fpu: Fpu,
    msrs: Msrs,
    fault: Fault,
    exit: SvmExit,
    control: Controls,
    interrupt_shadow: bool,
    alignment_checked: bool,
    events: Events,
    nested_root: Option<u64>,
    hosted: Option<Box<Hosted>>,
    retired: u64,
    tsc: (u64, u64),
    repeating: Option<(u64, u64)>,
    translations: Vec<Cached>,
}

impl CoreRung {
    /// Bytes of host memory that it takes.
    pub fn bytes(&self) -> usize {
        size_of::<Self>() + self.translations.len() * size_of::<Cached>()
    }
}

impl Core {
    /// The processor now.
    pub fn rung(&self) -> CoreRung {
        let Core {
            gprs,
            flags,
            budget: _,
            follow: _,
            tlb_set: _,
            tlb_base: _,
            tlb,
            rip,
            system_flags,
            segments,
            gdtr,
            idtr,
            ldtr,
            tr,
            cpl,
            mode: _,
            cr0,
            cr2,
            cr3,
            cr4,
            efer,
            debug,
            fpu,
            msrs,
            fault,
            exit,
            control,
            interrupt_shadow,
            alignment_checked,
            events,
            nested,
            arena: _,
            limits: _,
            shares_memory: _,
            block_ops_max: _,
            new_code_pages: _,
            noting: _,
            hosted,
            gathers_flags: _,
            stop_at: _,
            tsc_per_instruction,
            tsc_base,
            blocks: _,
            returns: _,
            mmio: _,
            stops: _,
            passed: _,
            repeating,
            memory: _,
        } = self;
        CoreRung {
            gprs: *gprs,
            flags: *flags,
            rip: *rip,
            system_flags: *system_flags,
            segments: *segments,
            tables: [*gdtr, *idtr, *ldtr, *tr],
            cpl: *cpl,
            control_registers: [*cr0, *cr2, *cr3, *cr4, *efer],
            debug: *debug,
            fpu: fpu.clone(),
            msrs: msrs.clone(),
            fault: *fault,
            exit: *exit,
            control: control.clone(),
            interrupt_shadow: *interrupt_shadow,
            alignment_checked: *alignment_checked,
            events: *events,
            nested_root: nested.root(),
            hosted: hosted.clone(),
            retired: self.retired(),
            tsc: (*tsc_per_instruction, *tsc_base),
            repeating: *repeating,
            translations: tlb.contents(),
        }
    }

    /// Makes the processor what it was; no breakpoint was met here, and stops stay set. Decoded code stays as long as nobody
    /// says that its page was written: each fetch asks for its translation first, and those are the rung's.
    pub fn climb(&mut self, rung: &CoreRung) {
        self.blocks.drop_held();
        self.returns.forget();
        (self.gprs, self.flags, self.rip) = (rung.gprs, rung.flags, rung.rip);
        (self.system_flags, self.segments, self.cpl) = (rung.system_flags, rung.segments, rung.cpl);
        [self.gdtr, self.idtr, self.ldtr, self.tr] = rung.tables;
        [self.cr0, self.cr2, self.cr3, self.cr4, self.efer] = rung.control_registers;
        self.debug = rung.debug;
        (self.fpu, self.msrs) = (rung.fpu.clone(), rung.msrs.clone());
        (self.fault, self.exit) = (rung.fault, rung.exit);
        self.control = rung.control.clone();
        self.interrupt_shadow = rung.interrupt_shadow;
        // Before the mode: a change would empty the TLB.
        self.alignment_checked = rung.alignment_checked;
        self.events = rung.events;
        self.nested.select(rung.nested_root);
        self.hosted = rung.hosted.clone();
        (self.tsc_per_instruction, self.tsc_base) = rung.tsc;
        (self.passed, self.repeating) = (None, rung.repeating);
        self.set_retired(rung.retired);
        self.refresh_mode();
        let memory = &self.memory;
        self.tlb.replace(&rung.translations, |page| memory.host_of(page));
    }

    /// Lets go of everything that was decoded. The caller clears the lines of the pages that it returns when every processor
    /// has.
    pub fn forget_code(&mut self) -> Vec<u64> {
        let pages: Vec<u64> = self.blocks.pages().collect();
        self.drop_code(&pages);
        self.blocks.drop_held();
        self.returns.forget();
        self.new_code_pages.clear();
        pages
    }
}

//! A processor for tests: 64-bit mode over identity-mapped RAM, no VMCB, no host.
//!
//! Page tables lie in the first pages of RAM from [`TABLES`]; code may be put anywhere else. Both privilege levels see
//! all of RAM up to 1 GiB through 2 MiB pages.

use std::sync::Arc;

use crate::engine::soft::core::{CS, Core, DS, ES, FS, Flags, GS, SS};
use crate::memory::GuestMemory;
use crate::vmcb::Segment;
use crate::vmcb::registers::{cr0, cr4, efer};

/// Where the three page-table pages of [`Core::bare`] lie.
pub const TABLES: u64 = 0x1000;
/// Flat 64-bit code.
pub const CODE: Segment = Segment::new(0x10, 0xa9b, 0xffff_ffff, 0);
/// Flat data.
pub const DATA: Segment = Segment::new(0x18, 0xc93, 0xffff_ffff, 0);

impl Core {
    /// A processor after RESET as far as this engine keeps such state: real mode, nothing cached, time 0.
    pub fn new(memory: Arc<GuestMemory>) -> Box<Self> {
        let real = |selector, base| Segment::new(selector, 0x93, 0xffff, base);
        let mut core = Box::new(Core {
            gprs: [0; 32],
            flags: Flags::from_rflags(0),
            budget: 0,
            follow: 0,
            tlb_set: 0,
            tlb_base: 0,
            tlb: crate::engine::soft::tlb::Tlb::new(),
            rip: 0xfff0,
            system_flags: 0,
            segments: [real(0, 0); 6],
            gdtr: Segment::new(0, 0, 0xffff, 0),
            idtr: Segment::new(0, 0, 0xffff, 0),
            ldtr: Segment::new(0, 0x82, 0xffff, 0),
            tr: Segment::new(0, 0x8b, 0xffff, 0),
            cpl: 0,
            mode: Default::default(),
            cr0: cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            debug: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            fpu: Default::default(),
            msrs: Default::default(),
            fault: Default::default(),
            exit: Default::default(),
            control: Default::default(),
            interrupt_shadow: false,
            alignment_checked: false,
            gathers_flags: false,
            events: Default::default(),
            nested: Default::default(),
            arena: Default::default(),
            limits: super::enter::LIMITS,
            shares_memory: false,
            block_ops_max: crate::engine::soft::block::OPS_MAX,
            new_code_pages: Vec::new(),
            noting: None,
            hosted: None,
            stop_at: 0,
            tsc_per_instruction: 1,
            tsc_base: 0,
            blocks: crate::engine::soft::block::Blocks::new(),
            returns: Default::default(),
            mmio: Default::default(),
            stops: None,
            passed: None,
            repeating: None,
            memory,
        });
        core.segments[CS] = Segment::new(0xf000, 0x9b, 0xffff, 0xffff_0000);
        core.msrs.pat = 0x0007_0406_0007_0406;
        core.refresh_mode();
        core
    }

    /// A processor in 64-bit mode at `rip`, CPL 0, with paging over identity-mapped RAM.
    pub fn bare(memory: Arc<GuestMemory>) -> Box<Self> {
        let entry =
            |at: u64, value: u64| memory.write(at, &value.to_le_bytes()).expect("RAM of a test has these pages");
        entry(TABLES, (TABLES + 0x1000) | 7);
        entry(TABLES + 0x1000, (TABLES + 0x2000) | 7);
        for large in 0..512 {
            entry(TABLES + 0x2000 + large * 8, large << 21 | 0x87);
        }
        let mut core = Self::new(memory);
        core.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP;
        core.cr3 = TABLES;
        core.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::FSGSBASE;
        core.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        core.segments[CS] = CODE;
        for register in [ES, SS, DS, FS, GS] {
            core.segments[register] = DATA;
        }
        core.refresh_mode();
        core
    }

    /// The same processor at CPL 3.
    pub fn to_user(&mut self) {
        for register in [ES, CS, SS, DS, FS, GS] {
            self.segments[register].attrib |= 0x60;
            self.segments[register].selector |= 3;
        }
        self.cpl = 3;
        self.refresh_mode();
    }
}

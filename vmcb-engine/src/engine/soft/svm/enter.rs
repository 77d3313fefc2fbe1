//! VMRUN and VMLOAD (APM2 15.5): from the VMCB into the processor.
//!
//! VMRUN switches exactly what the manual says: FS, GS, TR, LDTR and the SYSCALL MSRs move by VMLOAD only; general
//! registers other than RAX and RSP, DR0-3 and the FPU are the host's duty.

use super::control::Controls;
use super::exit::SvmExit;
use super::leave::Hosted;
use crate::engine::Platform;
use crate::engine::soft::core::{CS, Core, DS, ES, FS, GS, RAX, RSP, SS, Step};
use crate::engine::soft::interp::control::CR4_BITS;
use crate::engine::soft::op::{Flow, Op};
use crate::engine::soft::run::Ended;
use crate::engine::soft::svm::msr::EFER_WRITABLE;
use crate::vmcb::check::{Limits, violations};
use crate::vmcb::registers::{cr0, efer};
use crate::vmcb::{EventType, ExitCode, SaveArea, Vmcb, tlb_control};

/// Control bits that this processor has; a host may give a guest fewer by [`Core::limits`].
pub const LIMITS: Limits = Limits { phys_bits: 48, cr4: CR4_BITS, efer: EFER_WRITABLE };

/// The TSC of the host's world, to which TSC_OFFSET is added: TSC = retired * tsc_per_instruction + this.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostTsc(pub u64);

impl Core {
    /// VMRUN by a host outside of this processor: runs the guest of `vmcb` until `stop_at` instructions have retired (exit
    /// INTR: the host's own timer) or it exits. The exit is in the VMCB's control area.
    pub fn vmrun(&mut self, vmcb: &mut Vmcb, tsc: HostTsc, stop_at: u64) -> ExitCode {
        if self.load_guest(vmcb, tsc).is_none() {
            return refuse(vmcb);
        }
        if self.run_until(stop_at) != Ended::Exit {
            self.exit = SvmExit::default();
        }
        self.save_guest(vmcb)
    }

    /// Runs one instruction of the guest of `vmcb` with `platform` answering what is not RAM. `None`: done; else the exit
    /// that stands in the way.
    pub fn vmrun_emulating(
        &mut self,
        vmcb: &mut Vmcb,
        tsc: HostTsc,
        platform: &mut dyn Platform,
        platform_tsc: u64,
    ) -> Option<ExitCode> {
        if self.load_guest(vmcb, tsc).is_none() {
            return Some(refuse(vmcb));
        }
        let mut flow = self.emulate_one(platform, platform_tsc);
        if flow == Flow::Next && self.event_pending() {
            flow = self.take_event();
        }
        if flow == Flow::Exit {
            return Some(self.save_guest(vmcb));
        }
        self.exit = SvmExit::default();
        self.save_guest(vmcb);
        None
    }

    /// VMRUN by software that runs on this processor, its VMCB in its own RAM. RIP is the guest's afterwards.
    pub(crate) fn run_hosted(&mut self, address: u64, op: &Op) -> Step {
        let mut page = [0; 4096];
        if self.memory.read(address, &mut page).is_err() {
            return self.general_protection();
        }
        let mut vmcb = Vmcb::from_bytes(&page);
        let host = Hosted::of(self, address, self.next_rip(op));
        let tsc = HostTsc(self.tsc_base);
        if self.load_guest(&vmcb, tsc).is_none() {
            refuse(&mut vmcb);
            self.write_hosted(address, &vmcb);
            return Ok(());
        }
        self.hosted = Some(Box::new(host));
        Ok(())
    }

    /// Checks and loads a VMCB; `None` is VMEXIT_INVALID.
    fn load_guest(&mut self, vmcb: &Vmcb, tsc: HostTsc) -> Option<()> {
        if !violations(vmcb, self.limits).is_empty() {
            return None;
        }
        let (control, save) = (&vmcb.control, &vmcb.save);
        self.flush_for(vmcb);
        self.control = Controls::load(control);
        self.tsc_base = tsc.0.wrapping_add(control.tsc_offset);
        for (register, segment) in [(ES, save.es), (CS, save.cs), (SS, save.ss), (DS, save.ds)] {
            self.segments[register] = segment;
        }
        (self.gdtr, self.idtr) = (save.gdtr, save.idtr);
        (self.cr0, self.cr2, self.cr3, self.cr4) = (save.cr0, save.cr2, save.cr3, save.cr4);
        // LMA follows from LME and PG (APM2 15.5.1).
        let long = save.efer & efer::LME != 0 && save.cr0 & cr0::PG != 0;
        self.efer = save.efer & !efer::LMA | if long { efer::LMA } else { 0 };
        (self.debug[4], self.debug[5]) = (save.dr6, save.dr7);
        self.msrs.pat = save.g_pat;
        self.set_rflags(save.rflags);
        self.rip = save.rip;
        (self.gprs[RSP], self.gprs[RAX]) = (save.rsp, save.rax);
        self.cpl = save.effective_cpl();
        self.interrupt_shadow = control.in_interrupt_shadow();
        self.refresh_alignment();
        self.refresh_mode();
        self.events.begin_guest();
        let event = control.injected_event();
        if event.valid() {
            // What an instruction asked for returns behind it: nRIP where the host knows it (APM2 15.20).
            let by_instruction = event.kind() == Some(EventType::Software)
                || (event.kind() == Some(EventType::Exception) && matches!(event.vector(), 3 | 4));
            let return_rip = if by_instruction && control.nrip != 0 { control.nrip } else { save.rip };
            self.events.injection = Some((event, return_rip));
        }
        Some(())
    }

    /// Drops translations that the new guest must not see: as TLB_CONTROL asks, and for another ASID, other nested tables,
    /// or registers of paging that the host changed.
    fn flush_for(&mut self, vmcb: &Vmcb) {
        let (control, save) = (&vmcb.control, &vmcb.save);
        let root = control.nested_paging().then_some(control.n_cr3);
        let other_tables = self.nested.select(root);
        let other_guest = self.control.asid != control.guest_asid || control.tlb_control != tlb_control::NONE;
        let paging = (self.cr0 ^ save.cr0) & (cr0::PG | cr0::WP | cr0::PE) != 0
            || (self.cr3, self.cr4) != (save.cr3, save.cr4)
            || (self.efer ^ save.efer) & efer::NXE != 0;
        if control.tlb_control != tlb_control::NONE {
            self.nested.flush();
        }
        if other_tables || other_guest || paging || self.segments[CS].base != save.cs.base {
            self.tlb.flush();
        }
    }

    /// VMLOAD.
    pub fn vmload(&mut self, save: &SaveArea) {
        (self.segments[FS], self.segments[GS]) = (save.fs, save.gs);
        (self.tr, self.ldtr) = (save.tr, save.ldtr);
        let msrs = &mut self.msrs;
        msrs.kernel_gs_base = save.kernel_gs_base;
        (msrs.star, msrs.lstar, msrs.cstar, msrs.sfmask) = (save.star, save.lstar, save.cstar, save.sfmask);
        msrs.sysenter_cs = save.sysenter_cs;
        (msrs.sysenter_esp, msrs.sysenter_eip) = (save.sysenter_esp, save.sysenter_eip);
    }
}

fn refuse(vmcb: &mut Vmcb) -> ExitCode {
    vmcb.control.exitcode = ExitCode::INVALID.0;
    ExitCode::INVALID
}

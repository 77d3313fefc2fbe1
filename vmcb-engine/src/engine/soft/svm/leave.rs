//! #VMEXIT and VMSAVE (APM2 15.6): from the processor into the VMCB, and back to software that runs on this processor.

use super::control::Controls;
use crate::engine::soft::core::{CS, Core, DS, ES, FS, GS, RAX, RSP, SS};
use crate::vmcb::control::{INTERRUPT_SHADOW, V_IRQ, V_TPR};
use crate::vmcb::registers::cr0;
use crate::vmcb::{ExitCode, SaveArea, Segment, Vmcb};

/// State of software on this processor while a guest of its own runs (what VM_HSAVE_PA stands for).
#[derive(Clone)]
pub struct Hosted {
    vmcb: u64,
    segments: [Segment; 4],
    gdtr: Segment,
    idtr: Segment,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    rflags: u64,
    rip: u64,
    rsp: u64,
    rax: u64,
    pat: u64,
    tsc_base: u64,
}

impl Hosted {
    /// The state to come back to, at the instruction after VMRUN.
    pub fn of(core: &Core, vmcb: u64, rip: u64) -> Self {
        Self {
            vmcb,
            segments: [core.segments[ES], core.segments[CS], core.segments[SS], core.segments[DS]],
            gdtr: core.gdtr,
            idtr: core.idtr,
            cr0: core.cr0,
            cr3: core.cr3,
            cr4: core.cr4,
            efer: core.efer,
            rflags: core.rflags(),
            rip,
            rsp: core.gprs[RSP],
            rax: core.gprs[RAX],
            pat: core.msrs.pat,
            tsc_base: core.tsc_base,
        }
    }
}

impl Core {
    /// Writes guest state and the exit into the VMCB. The processor keeps its registers; only a next VMRUN replaces them.
    pub(super) fn save_guest(&mut self, vmcb: &mut Vmcb) -> ExitCode {
        let exit = self.exit;
        if !matches!(exit.code, ExitCode::INTR | ExitCode::VINTR) {
            self.unbegin();
        }
        self.control.guest = false;
        let save = &mut vmcb.save;
        (save.es, save.cs) = (self.segments[ES], self.segments[CS]);
        (save.ss, save.ds) = (self.segments[SS], self.segments[DS]);
        (save.gdtr, save.idtr) = (self.gdtr, self.idtr);
        (save.cr0, save.cr2, save.cr3, save.cr4) = (self.cr0, self.cr2, self.cr3, self.cr4);
        save.efer = self.efer;
        (save.dr6, save.dr7) = (self.debug[4], self.debug[5]);
        save.g_pat = self.msrs.pat;
        save.cpl = self.cpl;
        save.rflags = self.rflags();
        save.rip = self.rip;
        (save.rsp, save.rax) = (self.gprs[RSP], self.gprs[RAX]);
        let control = &mut vmcb.control;
        INTERRUPT_SHADOW.put(&mut control.interrupt_shadow, u64::from(self.interrupt_shadow));
        V_TPR.put(&mut control.vintr, V_TPR.get(self.control.vintr));
        V_IRQ.put(&mut control.vintr, V_IRQ.get(self.control.vintr));
        control.eventinj = self.events.injection.take().map_or(0, |(event, _)| event.0);
        control.exitcode = exit.code.0;
        (control.exitinfo1, control.exitinfo2) = (exit.info1, exit.info2);
        control.exitintinfo = exit.interrupted.0;
        control.nrip = if exit.reports_next_rip() { exit.next_rip } else { 0 };
        control.bytes_fetched = 0;
        exit.code
    }

    /// VMSAVE.
    pub fn vmsave(&self, save: &mut SaveArea) {
        (save.fs, save.gs) = (self.segments[FS], self.segments[GS]);
        (save.tr, save.ldtr) = (self.tr, self.ldtr);
        let msrs = &self.msrs;
        save.kernel_gs_base = msrs.kernel_gs_base;
        (save.star, save.lstar, save.cstar, save.sfmask) = (msrs.star, msrs.lstar, msrs.cstar, msrs.sfmask);
        save.sysenter_cs = msrs.sysenter_cs;
        (save.sysenter_esp, save.sysenter_eip) = (msrs.sysenter_esp, msrs.sysenter_eip);
    }

    /// The guest of software on this processor exits: false if there is no such software, and the exit is for the host
    /// outside.
    pub(crate) fn leave_to_hosted(&mut self) -> bool {
        let Some(host) = self.hosted.take() else { return false };
        let mut page = [0; 4096];
        self.memory.read(host.vmcb, &mut page).expect("VMRUN read the VMCB from this page of RAM");
        let mut vmcb = Vmcb::from_bytes(&page);
        self.save_guest(&mut vmcb);
        self.write_hosted(host.vmcb, &vmcb);
        self.nested.select(None);
        self.tlb.flush();
        self.control = Controls::default();
        [self.segments[ES], self.segments[CS], self.segments[SS], self.segments[DS]] = host.segments;
        (self.gdtr, self.idtr) = (host.gdtr, host.idtr);
        (self.cr0, self.cr3, self.cr4) = (host.cr0 | cr0::PE, host.cr3, host.cr4);
        (self.efer, self.msrs.pat, self.tsc_base) = (host.efer, host.pat, host.tsc_base);
        self.set_rflags(host.rflags);
        (self.rip, self.gprs[RSP], self.gprs[RAX]) = (host.rip, host.rsp, host.rax);
        self.debug[5] = 0x400;
        self.interrupt_shadow = false;
        self.cpl = 0;
        self.refresh_alignment();
        self.refresh_mode();
        true
    }

    /// Writes a VMCB into RAM; decoded code that lies there ends.
    pub(crate) fn write_hosted(&mut self, address: u64, vmcb: &Vmcb) {
        self.memory.write(address, vmcb.as_page()).expect("the page was checked to be RAM");
        let written = self.memory.stamps().take_written_code();
        self.drop_code(&written);
        written.iter().for_each(|page| self.memory.stamps().clear_code_lines(*page));
    }
}

//! Between [`CpuState`] and a VMCB: exactly what VMRUN and VMLOAD load, and #VMEXIT and VMSAVE store.
//!
//! Sources: APM2 15.5.1 (VMRUN), 15.5.2 (VMLOAD, VMSAVE), 15.20 (EVENTINJ), 15.21 (V_TPR). RAX and RSP are the only general
//! registers in a VMCB; DR0-DR3, the FPU and XCR0 are the host's duty and stay out. This file refuses to set
//! intercepts, ASID or nested paging: those are the host's choice, not the guest's state.

use crate::cpu::fields::CpuState;
use crate::cpu::gpr::{RAX, RSP};
use crate::vmcb::control::{INTERRUPT_SHADOW, V_NMI, V_NMI_ENABLE, V_NMI_MASK, V_TPR};
use crate::vmcb::registers::efer;
use crate::vmcb::{SaveArea, Vmcb};

/// An MSR that has a row in the save area.
struct SavedMsr {
    index: u32,
    /// True if every guest has it; the others travel only when the contract lists them.
    always: bool,
    row: fn(&mut SaveArea) -> &mut u64,
}

const fn saved(index: u32, always: bool, row: fn(&mut SaveArea) -> &mut u64) -> SavedMsr {
    SavedMsr { index, always, row }
}

/// The MSRs that VMRUN or VMLOAD switch and that live in [`CpuState::msrs`].
const SAVED_MSRS: [SavedMsr; 15] = [
    saved(0xc000_0081, true, |save| &mut save.star),
    saved(0xc000_0082, true, |save| &mut save.lstar),
    saved(0xc000_0083, true, |save| &mut save.cstar),
    saved(0xc000_0084, true, |save| &mut save.sfmask),
    saved(0xc000_0102, true, |save| &mut save.kernel_gs_base),
    saved(0x174, true, |save| &mut save.sysenter_cs),
    saved(0x175, true, |save| &mut save.sysenter_esp),
    saved(0x176, true, |save| &mut save.sysenter_eip),
    saved(0x277, true, |save| &mut save.g_pat),
    saved(0x1d9, false, |save| &mut save.dbgctl),
    saved(0x1db, false, |save| &mut save.br_from),
    saved(0x1dc, false, |save| &mut save.br_to),
    saved(0x1dd, false, |save| &mut save.lastexcpfrom),
    saved(0x1de, false, |save| &mut save.lastexcpto),
    saved(0x48, false, |save| &mut save.spec_ctrl),
];

/// PAT after RESET (APM2 7.8.2).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

impl CpuState {
    /// Writes the guest's state into `vmcb`: the save area, the pending event, the interrupt shadow, V_TPR and the TSC
    /// offset. EFER.SVME is set, because VMRUN demands it, whatever the guest itself
    /// sees. All clean bits are dropped; every other control survives.
    pub fn to_vmcb(&self, vmcb: &mut Vmcb) {
        let save = &mut vmcb.save;
        save.es = self.es;
        save.cs = self.cs;
        save.ss = self.ss;
        save.ds = self.ds;
        save.fs = self.fs;
        save.gs = self.gs;
        save.gdtr = self.gdtr;
        save.ldtr = self.ldtr;
        save.idtr = self.idtr;
        save.tr = self.tr;
        save.cpl = self.cpl;
        save.efer = self.efer | efer::SVME;
        save.cr0 = self.cr0;
        save.cr2 = self.cr2;
        save.cr3 = self.cr3;
        save.cr4 = self.cr4;
        save.dr6 = self.drs[4];
        save.dr7 = self.drs[5];
        save.rflags = self.rflags;
        save.rip = self.rip;
        save.rsp = self.gprs[RSP];
        save.rax = self.gprs[RAX];
        for msr in &SAVED_MSRS {
            let absent = if msr.index == 0x277 { PAT_RESET } else { 0 };
            if let Some(value) = self.msrs.get(&msr.index).copied().or(msr.always.then_some(absent)) {
                *(msr.row)(save) = value;
            }
        }
        let control = &mut vmcb.control;
        control.eventinj = self.event_injection.0;
        INTERRUPT_SHADOW.put(&mut control.interrupt_shadow, u64::from(self.interrupt_shadow));
        V_TPR.put(&mut control.vintr, self.cr8);
        if V_NMI_ENABLE.is_set(control.vintr) {
            V_NMI.put(&mut control.vintr, u64::from(self.nmi_pending));
            V_NMI_MASK.put(&mut control.vintr, u64::from(self.nmi_masked));
        }
        control.tsc_offset = self.tsc_offset;
        control.vmcb_clean = 0;
    }

    /// Takes back what [`CpuState::to_vmcb`] wrote, after the guest ran: the inverse of it. The event that an exit
    /// interrupted (EXITINTINFO) is the engine's to judge and is not read here; EFER.SVME stays what the guest sees.
    pub fn from_vmcb(&mut self, vmcb: &Vmcb) {
        let save = &vmcb.save;
        self.es = save.es;
        self.cs = save.cs;
        self.ss = save.ss;
        self.ds = save.ds;
        self.fs = save.fs;
        self.gs = save.gs;
        self.gdtr = save.gdtr;
        self.ldtr = save.ldtr;
        self.idtr = save.idtr;
        self.tr = save.tr;
        self.cpl = save.effective_cpl();
        self.efer = (save.efer & !efer::SVME) | (self.efer & efer::SVME);
        self.cr0 = save.cr0;
        self.cr2 = save.cr2;
        self.cr3 = save.cr3;
        self.cr4 = save.cr4;
        self.drs[4] = save.dr6;
        self.drs[5] = save.dr7;
        self.rflags = save.rflags;
        self.rip = save.rip;
        self.gprs[RSP] = save.rsp;
        self.gprs[RAX] = save.rax;
        // The rows are reached through one list of `fn(&mut SaveArea)`, so a copy is read.
        let mut rows = save.clone();
        for msr in &SAVED_MSRS {
            if msr.always || self.msrs.contains_key(&msr.index) {
                self.msrs.insert(msr.index, *(msr.row)(&mut rows));
            }
        }
        let control = &vmcb.control;
        self.event_injection = control.injected_event();
        self.interrupt_shadow = control.in_interrupt_shadow();
        self.cr8 = V_TPR.get(control.vintr);
        if V_NMI_ENABLE.is_set(control.vintr) {
            self.nmi_pending = V_NMI.is_set(control.vintr);
            self.nmi_masked = V_NMI_MASK.is_set(control.vintr);
        }
        self.tsc_offset = control.tsc_offset;
    }
}

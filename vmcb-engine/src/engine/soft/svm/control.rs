//! The control area of the loaded VMCB, in the form that the processor uses while the guest runs.
//!
//! Intercepts are asked for when an instruction runs, not when it is decoded, so decoded blocks serve every set of them
//! and `Mode::intercepts` stays 0. Clean bits are ignored: everything is read again at each VMRUN, which is always right.

use crate::engine::soft::core::Core;
use crate::vmcb::control::{V_IGN_TPR, V_INTR_MASKING, V_INTR_PRIO, V_INTR_VECTOR, V_IRQ, V_TPR};
use crate::vmcb::permission::msrpm_bit;
use crate::vmcb::{ControlArea, Intercept, MsrAccess};

/// Controls of the loaded VMCB; all off while none is loaded.
#[derive(Clone, Default)]
pub struct Controls {
    /// A guest is loaded: intercepts count.
    pub guest: bool,
    /// Global interrupt flag (APM2 15.17). Only a processor without a guest can clear it.
    pub gif: bool,
    /// The six intercept words.
    pub words: [u32; 6],
    /// Physical address of the I/O permission map.
    pub iopm: u64,
    /// Physical address of the MSR permission map.
    pub msrpm: u64,
    /// ASID of the loaded guest, to see changes.
    pub asid: u32,
    /// The word at 060h, V_TPR and V_IRQ kept up to date.
    pub vintr: u64,
}

impl Controls {
    /// From the control area.
    pub fn load(control: &ControlArea) -> Self {
        Self {
            guest: true,
            gif: true,
            words: control.intercept,
            iopm: control.iopm_address(),
            msrpm: control.msrpm_address(),
            asid: control.guest_asid,
            vintr: control.vintr,
        }
    }

    /// True if a guest is loaded and `which` is intercepted.
    #[inline]
    pub fn intercepts(&self, which: Intercept) -> bool {
        self.guest && self.words[which.word()] & which.mask() != 0
    }

    /// Virtual task priority: what CR8 is (APM2 15.21.2).
    pub fn task_priority(&self) -> u8 {
        V_TPR.get(self.vintr) as u8
    }

    /// MOV to CR8.
    pub fn set_task_priority(&mut self, value: u8) {
        V_TPR.put(&mut self.vintr, u64::from(value));
    }

    /// The guest's RFLAGS.IF and CR8 concern virtual interrupts only.
    pub fn masks_interrupts(&self) -> bool {
        V_INTR_MASKING.is_set(self.vintr)
    }

    /// A virtual interrupt is pending and its priority is above the task priority (APM2 15.21.4).
    #[inline]
    pub fn virtual_interrupt(&self) -> bool {
        V_IRQ.is_set(self.vintr)
            && (V_IGN_TPR.is_set(self.vintr) || V_INTR_PRIO.get(self.vintr) > V_TPR.get(self.vintr))
    }

    /// Takes the pending virtual interrupt: its vector.
    pub fn take_virtual_interrupt(&mut self) -> u8 {
        V_IRQ.put(&mut self.vintr, 0);
        V_INTR_VECTOR.get(self.vintr) as u8
    }
}

impl Core {
    /// True if the host wants to see this access of an MSR.
    pub fn msr_intercepted(&self, msr: u32, write: bool) -> bool {
        if !self.control.intercepts(Intercept::MSR_PROT) || self.mmio.emulating() {
            return false;
        }
        let access = if write { MsrAccess::Write } else { MsrAccess::Read };
        let Some(bit) = msrpm_bit(msr, access) else { return true };
        let bit = bit as u64;
        // A map that is not memory reads as all ones.
        self.system_u8(self.control.msrpm + bit / 8).unwrap_or(0xff) >> (bit % 8) & 1 != 0
    }

    /// True if the host wants to see this access of `size` bytes at a port: any of its bytes' bits (APM2 15.10.1).
    pub fn io_intercepted(&self, port: u16, size: u8) -> bool {
        if !self.control.intercepts(Intercept::IOIO_PROT) || self.mmio.emulating() {
            return false;
        }
        (u64::from(port)..u64::from(port) + u64::from(size))
            .any(|bit| self.system_u8(self.control.iopm + bit / 8).unwrap_or(0xff) >> (bit % 8) & 1 != 0)
    }
}

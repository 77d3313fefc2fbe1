//! What starts and stops a vCPU: interrupts, NMI, INIT and start-up (APM2 14.1, 15.21, 16.5).
//!
//! The local APICs are the platform's; here is only what the processor does when they ask.

use super::{SoftEngine, Vcpu};
use crate::capability::CpuModel;
use crate::cpu::{CpuState, RunState, gpr};
use crate::engine::{Platform, Request};
use crate::vmcb::control::{V_IGN_TPR, V_INTR_PRIO, V_INTR_VECTOR, V_IRQ, V_TPR};
use crate::vmcb::registers::{cr0, rflags};
use crate::vmcb::{Event, Intercept, Segment};

impl Vcpu {
    fn index(&self) -> usize {
        self.topology.vcpu as usize
    }

    fn takes_nmi(&self) -> bool {
        self.nmi_pending && !self.core.events.nmi_masked
    }

    fn takes_interrupts(&self) -> bool {
        self.vmcb.save.rflags & rflags::IF != 0
    }

    /// True if the vCPU executes; a halted one is woken by what it can take.
    pub(super) fn awake(&mut self, platform: &mut dyn Platform) -> bool {
        if self.run_state == RunState::Halted {
            let interrupt = self.takes_interrupts() && platform.pending_interrupt(self.index()).is_some();
            if self.takes_nmi() || interrupt {
                self.run_state = RunState::Runnable;
            }
        }
        self.run_state == RunState::Runnable
    }

    /// Injects what waits, if the guest can take it now; else asks to be told when it can.
    pub(super) fn offer_interrupts(&mut self, platform: &mut dyn Platform) {
        let index = self.index();
        let pending = platform.pending_interrupt(index);
        let (nmi, enabled) = (self.takes_nmi(), self.takes_interrupts());
        let control = &mut self.vmcb.control;
        V_TPR.put(&mut control.vintr, u64::from(platform.cr8(index) & 15));
        let free = !control.injected_event().valid() && !control.in_interrupt_shadow();
        let mut waits = pending.is_some();
        if nmi && free {
            control.eventinj = Event::nmi().0;
            self.nmi_pending = false;
        } else if let Some(vector) = pending
            && free
            && enabled
        {
            platform.acknowledge(index, vector);
            control.eventinj = Event::interrupt(vector).0;
            waits = platform.pending_interrupt(index).is_some();
        }
        self.request_window(waits);
    }

    /// A virtual interrupt that is never delivered: its intercept says when one could be (APM2 15.21.5).
    fn request_window(&mut self, wanted: bool) {
        let control = &mut self.vmcb.control;
        V_IRQ.put(&mut control.vintr, u64::from(wanted));
        V_IGN_TPR.put(&mut control.vintr, u64::from(wanted));
        V_INTR_PRIO.put(&mut control.vintr, 0);
        V_INTR_VECTOR.put(&mut control.vintr, 0);
        control.set_intercept(Intercept::VINTR, wanted);
    }

    /// The state of this vCPU after INIT (APM2 table 14-1): as after RESET, but caches, FPU, MSRs and the TSC stay.
    fn initialised(&mut self, model: CpuModel) -> CpuState {
        let before = self.store();
        let mut state = model.power_up(&self.topology);
        state.cr0 = state.cr0 & !(cr0::CD | cr0::NW) | before.cr0 & (cr0::CD | cr0::NW);
        (state.msrs, state.fpu, state.xcr0) = (before.msrs, before.fpu, before.xcr0);
        state.tsc_offset = before.tsc_offset;
        state.run_state = RunState::InitReceived;
        state
    }

    fn take_request(&mut self, model: CpuModel, request: Request) {
        match (request, self.run_state) {
            (Request::Nmi, RunState::Runnable | RunState::Halted) => self.nmi_pending = true,
            // The first vCPU would begin at the reset vector, where no firmware is.
            (Request::Init, _) if self.topology.vcpu == 0 => self.shut_down = true,
            (Request::Init, _) => {
                let state = self.initialised(model);
                self.load(&state).expect("the state after INIT is legal");
            }
            (Request::Startup(page), RunState::InitReceived) => {
                let mut state = self.initialised(model);
                state.cs = Segment { selector: u16::from(page) << 8, base: u64::from(page) << 12, ..state.cs };
                (state.rip, state.run_state) = (0, RunState::Runnable);
                state.gprs[gpr::RSP] = 0;
                self.load(&state).expect("the state after a start-up is legal");
            }
            (Request::Startup(_) | Request::Nmi, _) => {}
        }
    }
}

impl SoftEngine {
    /// INIT, start-up and NMI, between two instructions.
    pub(super) fn take_requests(&mut self, platform: &mut dyn Platform) {
        for index in 0..self.vcpus.len() {
            while let Some(request) = platform.take_request(index) {
                self.vcpus[index].take_request(self.model, request);
            }
        }
    }
}

//! Between [`CpuState`] and a processor with its VMCB.

use super::Vcpu;
use crate::cpu::{CpuState, FxState};
use crate::engine::LoadError;
use crate::engine::soft::fpu::Fpu;
use crate::engine::soft::svm::msr::TSC_AUX;
use crate::vmcb::check::refusal;
use crate::vmcb::tlb_control;

/// Bytes of an FXSAVE image that a processor keeps; the rest is reserved.
const IMAGE: usize = 416;

impl Vcpu {
    /// The state now. Forgets cached translations, so that a machine that goes on and one that is restored from this
    /// state behave the same.
    pub(super) fn store(&mut self) -> CpuState {
        let state = self.peek();
        self.forget();
        state
    }

    /// The state now; nothing is forgotten.
    pub(super) fn peek(&self) -> CpuState {
        let mut vmcb = self.vmcb.clone();
        self.core.vmsave(&mut vmcb.save);
        let mut state = CpuState::reset();
        state.msrs = self.msrs.clone();
        state.from_vmcb(&vmcb);
        for register in (0..16).filter(|register| !matches!(register, 0 | 4)) {
            state.gprs[register] = self.core.gprs[register];
        }
        state.drs[..4].copy_from_slice(&self.core.debug[..4]);
        let mut image = [0; 512];
        image[..IMAGE].copy_from_slice(&self.core.fpu.to_fxsave());
        state.fpu = Box::new(FxState::from_fxsave(&image));
        state.xcr0 = self.xcr0;
        state.nmi_masked = self.core.events.nmi_masked;
        state.nmi_pending = self.nmi_pending;
        state.run_state = self.run_state;
        state
    }

    /// Takes over a state; nothing changes if VMRUN would refuse it.
    pub(super) fn load(&mut self, state: &CpuState) -> Result<(), LoadError> {
        let mut vmcb = self.vmcb.clone();
        state.to_vmcb(&mut vmcb);
        if let Some(reasons) = refusal(&vmcb, self.core.limits) {
            return Err(LoadError::Illegal(reasons));
        }
        vmcb.control.tlb_control = tlb_control::FLUSH_GUEST;
        vmcb.control.exitintinfo = 0;
        self.vmcb = vmcb;
        self.core.vmload(&self.vmcb.save);
        for (register, value) in state.gprs.iter().enumerate() {
            self.core.gprs[register] = *value;
        }
        self.core.debug = state.drs;
        let image: &[u8; IMAGE] = state.fpu.fxsave().first_chunk().expect("the image is 512 bytes long");
        self.core.fpu = Fpu::from_fxsave(image);
        self.core.msrs.tsc_aux = state.msrs.get(&TSC_AUX).copied().unwrap_or(0);
        self.core.events = Default::default();
        self.core.events.nmi_masked = state.nmi_masked;
        self.msrs = state.msrs.clone();
        self.xcr0 = state.xcr0;
        self.nmi_pending = state.nmi_pending;
        self.run_state = state.run_state;
        self.shut_down = false;
        self.forget();
        Ok(())
    }

    fn forget(&mut self) {
        self.core.tlb.flush();
        self.core.nested.flush();
        self.core.events.forget_deliveries();
    }
}

//! The engine as it stands between two runs: each vCPU with its VMCB and its processor, and whose turn it is.

use std::collections::BTreeMap;

use super::{SoftEngine, Vcpu};
use crate::cpu::RunState;
use crate::engine::soft::rung::CoreRung;
use crate::engine::{Clock, EngineRung, LoadError};
use crate::vmcb::Vmcb;

/// One vCPU.
struct VcpuRung {
    core: CoreRung,
    vmcb: Box<Vmcb>,
    msrs: BTreeMap<u32, u64>,
    xcr0: u64,
    run_state: RunState,
    nmi_pending: bool,
    shut_down: bool,
}

/// All of them.
struct SoftRung {
    vcpus: Vec<VcpuRung>,
    current: usize,
    clock: Clock,
}

impl Vcpu {
    fn rung(&self) -> VcpuRung {
        let Vcpu { core, vmcb, topology: _, msrs, xcr0, run_state, nmi_pending, shut_down } = self;
        VcpuRung {
            core: core.rung(),
            vmcb: vmcb.clone(),
            msrs: msrs.clone(),
            xcr0: *xcr0,
            run_state: *run_state,
            nmi_pending: *nmi_pending,
            shut_down: *shut_down,
        }
    }

    fn climb(&mut self, rung: &VcpuRung) {
        let VcpuRung { core, vmcb, msrs, xcr0, run_state, nmi_pending, shut_down } = rung;
        self.core.climb(core);
        self.vmcb = vmcb.clone();
        self.msrs = msrs.clone();
        (self.xcr0, self.run_state) = (*xcr0, *run_state);
        (self.nmi_pending, self.shut_down) = (*nmi_pending, *shut_down);
    }
}

impl SoftEngine {
    /// The engine now.
    pub(super) fn take_rung(&self) -> EngineRung {
        let vcpus: Vec<VcpuRung> = self.vcpus.iter().map(Vcpu::rung).collect();
        let bytes = vcpus.iter().map(|vcpu| vcpu.core.bytes() + size_of::<Vmcb>()).sum();
        EngineRung::new(SoftRung { vcpus, current: self.current, clock: self.clock }, bytes)
    }

    /// Makes the engine what it was.
    pub(super) fn climb_to(&mut self, rung: &EngineRung) -> Result<(), LoadError> {
        let rung = rung.get::<SoftRung>().filter(|rung| rung.vcpus.len() == self.vcpus.len());
        let rung = rung.ok_or_else(|| LoadError::Illegal("the rung is of another kind of engine".to_owned()))?;
        for (vcpu, rung) in self.vcpus.iter_mut().zip(&rung.vcpus) {
            vcpu.climb(rung);
        }
        (self.current, self.clock) = (rung.current, rung.clock);
        self.last_ran.fill(0);
        // What is watched is said by where translations are, and those are others now.
        for vcpu in &mut self.vcpus {
            vcpu.core.set_stops(&self.stops);
        }
        Ok(())
    }

    pub(super) fn forget_all_code(&mut self) {
        for vcpu in &mut self.vcpus {
            for page in vcpu.core.forget_code() {
                self.memory.stamps().clear_code_lines(page);
            }
        }
    }
}

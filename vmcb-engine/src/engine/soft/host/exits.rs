//! What the host does with each #VMEXIT (APM2 15.9-15.14): devices, CPUID, MSRs, and the instructions that this guest
//! does not have.
//!
//! An instruction that the host completes counts as retired; one that faults does not.

use super::{SoftEngine, Vcpu};
use crate::cpu::RunState;
use crate::engine::soft::core::{RAX, RBX, RCX, RDX};
use crate::engine::{Exit, Platform};
use crate::vmcb::check::refusal;
use crate::vmcb::control::V_TPR;
use crate::vmcb::registers::{dr6, rflags};
use crate::vmcb::{Event, EventType, ExitCode, IoInfo, npf, tlb_control};

/// What a hypercall that does not exist answers (KVM's ENOSYS).
const NO_SUCH_HYPERCALL: u64 = -1000_i64 as u64;

impl Vcpu {
    /// Faults on the instruction that exited.
    fn inject(&mut self, vector: u8, error: Option<u32>) {
        self.vmcb.control.eventinj = Event::exception(vector, error).0;
    }

    /// The instruction that exited is done: RIP goes on, the shadow ends, a single-step trap follows.
    fn complete(&mut self, next_rip: u64) {
        let (control, save) = (&mut self.vmcb.control, &mut self.vmcb.save);
        save.rip = next_rip;
        control.interrupt_shadow &= !1;
        if save.rflags & rflags::TF != 0 {
            save.dr6 |= dr6::BS;
            control.eventinj = Event::exception(1, None).0;
        }
    }

    /// General register `number`: RAX and RSP are in the VMCB.
    fn register(&self, number: usize) -> u64 {
        match number {
            0 => self.vmcb.save.rax,
            4 => self.vmcb.save.rsp,
            _ => self.core.gprs[number & 15],
        }
    }

    /// An event whose delivery the exit interrupted is delivered again, except what RIP's instruction raises anyway.
    fn keep_interrupted_event(&mut self) {
        let event = self.vmcb.control.interrupted_event();
        let of_instruction = match event.kind() {
            Some(EventType::Software) => true,
            Some(EventType::Exception) => matches!(event.vector(), 3 | 4),
            _ => false,
        };
        if event.valid() && !of_instruction {
            self.vmcb.control.eventinj = event.0;
        }
    }
}

impl SoftEngine {
    /// The instruction that exited is done and has retired.
    fn retire(&mut self) {
        let next_rip = self.vcpus[self.current].vmcb.control.nrip;
        self.retire_to(next_rip);
    }

    fn retire_to(&mut self, next_rip: u64) {
        self.vcpus[self.current].complete(next_rip);
        self.clock.retired += 1;
    }

    /// Handles the exit of the current vCPU.
    pub(super) fn handle(&mut self, platform: &mut dyn Platform, code: ExitCode) -> Result<(), Exit> {
        let vcpu = &mut self.vcpus[self.current];
        vcpu.keep_interrupted_event();
        match code {
            ExitCode::INTR | ExitCode::VINTR => {}
            ExitCode::IOIO => return self.port_access(platform),
            ExitCode::NPF => return self.nested_fault(platform),
            ExitCode::MSR => self.msr_access(platform),
            ExitCode::CPUID => self.identify(),
            ExitCode::HLT => {
                vcpu.run_state = RunState::Halted;
                self.retire();
            }
            ExitCode::SHUTDOWN => {
                vcpu.shut_down = true;
                return Err(Exit::Shutdown);
            }
            ExitCode::INVD | ExitCode::WBINVD => self.retire(),
            ExitCode::RDPMC => vcpu.inject(13, Some(0)),
            ExitCode::VMMCALL => {
                vcpu.vmcb.save.rax = NO_SUCH_HYPERCALL;
                self.retire();
            }
            ExitCode::VMRUN
            | ExitCode::VMLOAD
            | ExitCode::VMSAVE
            | ExitCode::STGI
            | ExitCode::CLGI
            | ExitCode::SKINIT
            | ExitCode::INVLPGA
            | ExitCode::MONITOR
            | ExitCode::MWAIT
            | ExitCode::XSETBV
            | ExitCode::RSM
            | ExitCode::RDPRU => vcpu.inject(6, None),
            code if code == ExitCode::cr_write(8) => self.write_priority(platform),
            ExitCode::INVALID => return Err(Exit::Failed(self.why_invalid())),
            other => return Err(Exit::Failed(format!("exit {other} at {:#x}", vcpu.vmcb.save.rip))),
        }
        Ok(())
    }

    fn why_invalid(&self) -> String {
        let vcpu = &self.vcpus[self.current];
        let reasons = refusal(&vcpu.vmcb, vcpu.core.limits).unwrap_or_default();
        format!("VMRUN refuses the VMCB: {reasons}")
    }

    fn port_access(&mut self, platform: &mut dyn Platform) -> Result<(), Exit> {
        let control = &self.vcpus[self.current].vmcb.control;
        let next_rip = control.exitinfo2;
        let Some(io) = IoInfo::decode(control.exitinfo1) else {
            return Err(Exit::Failed(format!("IOIO with EXITINFO1 {:#x}", control.exitinfo1)));
        };
        if io.string {
            return self.emulate(platform);
        }
        let tsc = self.clock.tsc();
        let rax = &mut self.vcpus[self.current].vmcb.save.rax;
        if io.input {
            let value = u64::from(platform.io_read(tsc, io.port, io.size));
            *rax = match io.size {
                1 => *rax & !0xff | value & 0xff,
                2 => *rax & !0xffff | value & 0xffff,
                _ => value,
            };
        } else {
            let mask = u32::MAX >> (32 - 8 * u32::from(io.size));
            platform.io_write(tsc, io.port, io.size, *rax as u32 & mask);
        }
        self.retire_to(next_rip);
        Ok(())
    }

    /// A data access beyond RAM is a device's. Code, page tables, and stacks of events are not there.
    fn nested_fault(&mut self, platform: &mut dyn Platform) -> Result<(), Exit> {
        let control = &self.vcpus[self.current].vmcb.control;
        let (info, gpa) = (control.exitinfo1, control.exitinfo2);
        let what = if npf::GUEST_TABLE.is_set(info) {
            "has a page table"
        } else if npf::FETCH.is_set(info) {
            "executes"
        } else if control.interrupted_event().valid() {
            "delivers an event through memory"
        } else {
            return self.emulate(platform);
        };
        Err(Exit::Failed(format!(
            "the guest {what} at {gpa:#x}, which is not RAM (RIP {:#x})",
            self.vcpus[self.current].vmcb.save.rip
        )))
    }

    /// Runs the instruction that exited with devices answering.
    fn emulate(&mut self, platform: &mut dyn Platform) -> Result<(), Exit> {
        let (host_tsc, tsc) = (self.host_tsc(), self.clock.tsc());
        let vcpu = &mut self.vcpus[self.current];
        vcpu.core.set_retired(self.clock.retired);
        let exit = vcpu.core.vmrun_emulating(&mut vcpu.vmcb, host_tsc, platform, tsc);
        vcpu.vmcb.control.tlb_control = tlb_control::NONE;
        self.clock.retired = vcpu.core.retired();
        match exit {
            None => Ok(()),
            // What still exits (a page table or code beyond RAM, shutdown) cannot be emulated again.
            Some(ExitCode::NPF) => {
                let rip = self.vcpus[self.current].vmcb.save.rip;
                Err(Exit::Failed(format!("the instruction at {rip:#x} cannot be emulated")))
            }
            Some(code) => self.handle(platform, code),
        }
    }

    fn identify(&mut self) {
        let vcpu = &mut self.vcpus[self.current];
        let (leaf, subleaf) = (vcpu.vmcb.save.rax as u32, vcpu.core.gprs[RCX] as u32);
        let answer = self.model.cpuid(leaf, subleaf, &vcpu.topology);
        vcpu.vmcb.save.rax = answer[0].into();
        for (register, value) in [(RBX, answer[1]), (RCX, answer[2]), (RDX, answer[3])] {
            vcpu.core.gprs[register] = value.into();
        }
        self.retire();
    }

    fn msr_access(&mut self, platform: &mut dyn Platform) {
        let tsc = self.clock.tsc();
        let vcpu = &mut self.vcpus[self.current];
        let msr = vcpu.core.gprs[RCX] as u32;
        let write = vcpu.vmcb.control.exitinfo1 & 1 != 0;
        let done = if write {
            let value = vcpu.core.gprs[RDX] << 32 | vcpu.register(RAX) & 0xffff_ffff;
            vcpu.write_msr(self.model, platform, tsc, msr, value)
        } else {
            vcpu.read_msr(self.model, platform, tsc, msr).map(|value| {
                vcpu.vmcb.save.rax = value & 0xffff_ffff;
                vcpu.core.gprs[RDX] = value >> 32;
            })
        };
        match done {
            Some(()) => self.retire(),
            None => vcpu.inject(13, Some(0)),
        }
    }

    fn write_priority(&mut self, platform: &mut dyn Platform) {
        let vcpu = &mut self.vcpus[self.current];
        let value = vcpu.register((vcpu.vmcb.control.exitinfo1 & 15) as usize);
        if value > 15 {
            vcpu.inject(13, Some(0));
            return;
        }
        platform.set_cr8(self.current, value as u8);
        V_TPR.put(&mut vcpu.vmcb.control.vintr, value);
        self.retire();
    }
}

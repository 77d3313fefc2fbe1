//! Why a vCPU came back from the kernel, and what is answered (KVM API 5).
//!
//! What it left with lies in the page that it shares with the kernel, and the answer is written there; the kernel completes the
//! instruction at the next entry.

use kvm_bindings::KVM_EXIT_INTERNAL_ERROR;
use kvm_ioctls::VcpuExit;

use super::msr::{ModelMsrs, write_msr};
use super::vcpu::Vcpu;
use crate::engine::{Exit, Platform};

/// Why a vCPU is back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Left {
    /// It was called back, or interrupted for no reason of ours.
    Interrupted,
    /// IN or OUT, once or repeated.
    Port,
    /// A load from an address that is not RAM: where, and how many bytes.
    Load(u64, usize),
    /// A store to an address that is not RAM: where, and the bytes.
    Store(u64, [u8; 8], usize),
    /// RDMSR.
    ReadMsr(u32),
    /// WRMSR.
    WriteMsr(u32, u64),
    /// A level-triggered interrupt of this vector ended. It may be told before the guest's handler has come to its data, which then
    /// brings an interrupt without a cause: that is what drivers expect of lines. None is lost, because the line is looked at now.
    EndOfInterrupt(u8),
    /// Triple fault.
    Shutdown,
    /// The kernel met an error of its own; the shared page says which.
    InternalError,
    /// The kernel cannot go on, in words.
    Failed(String),
}

/// Lets a vCPU run until it leaves the kernel. Where it may stand from then on, the count of its timer is known.
pub(super) fn enter(vcpu: &mut Vcpu) -> Left {
    vcpu.forget_timer();
    let left = enter_once(vcpu);
    if left == Left::Interrupted {
        vcpu.note_timer();
    }
    left
}

fn enter_once(vcpu: &mut Vcpu) -> Left {
    match vcpu.fd.run() {
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Left::Port,
        Ok(VcpuExit::MmioRead(gpa, bytes)) => Left::Load(gpa, bytes.len()),
        Ok(VcpuExit::MmioWrite(gpa, bytes)) => {
            let mut data = [0; 8];
            data.iter_mut().zip(bytes).for_each(|(place, byte)| *place = *byte);
            Left::Store(gpa, data, bytes.len())
        }
        Ok(VcpuExit::X86Rdmsr(exit)) => Left::ReadMsr(exit.index),
        Ok(VcpuExit::X86Wrmsr(exit)) => Left::WriteMsr(exit.index, exit.data),
        Ok(VcpuExit::IoapicEoi(vector)) => Left::EndOfInterrupt(vector),
        Ok(VcpuExit::Intr) => Left::Interrupted,
        Ok(VcpuExit::Shutdown) => Left::Shutdown,
        Ok(VcpuExit::InternalError) => Left::InternalError,
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            Left::Failed(format!("VMRUN of vCPU {cpu} fails with hardware reason {reason:#x}"))
        }
        Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
            Left::Failed(format!("memory at {gpa:#x} ({size} bytes, flags {flags:#x}) cannot be given to the guest"))
        }
        Ok(other) => Left::Failed(format!("the kernel leaves with {other:?}, which is not known here")),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Left::Interrupted,
        Err(error) => Left::Failed(format!("KVM_RUN: {error}")),
    }
}

/// What the kernel says of an error of its own: which, and the bytes of an instruction that it cannot emulate.
fn internal_error(vcpu: &mut Vcpu) -> String {
    let rip = vcpu.fd.get_regs().map_or(0, |regs| regs.rip);
    let run = vcpu.fd.get_kvm_run();
    debug_assert_eq!(run.exit_reason, KVM_EXIT_INTERNAL_ERROR);
    // SAFETY: the reason for the exit says that this is the member that the kernel wrote; it is made of integers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let data = internal.data.iter().take(internal.ndata as usize).map(|word| format!("{word:#x}"));
    let data: Vec<String> = data.collect();
    let what = match internal.suberror {
        1 => "an instruction cannot be emulated",
        2 => "an exit came at the same time as another event",
        3 => "an event cannot be delivered",
        4 => "the hardware exits for an unknown reason",
        _ => "unknown",
    };
    format!("internal error {} of KVM at RIP {rip:#x}: {what} [{}]", internal.suberror, data.join(" "))
}

/// What a vCPU is to do after it was answered.
pub(super) enum Next {
    /// Enter the kernel again, which completes the instruction.
    Enter,
    /// Stay, if it was called back; enter again if not.
    Interrupted,
    /// The run has come to an end.
    End(Exit),
}

/// Answers what a vCPU left with.
pub(super) fn answer(vcpu: &mut Vcpu, left: Left, platform: &mut dyn Platform, tsc: u64) -> Next {
    let index = vcpu.topology.vcpu as usize;
    let failed = |words: String| Next::End(Exit::Failed(format!("vCPU {index}: {words}")));
    match left {
        Left::Interrupted => return Next::Interrupted,
        Left::Shutdown => return Next::End(Exit::Shutdown),
        Left::InternalError => return failed(internal_error(vcpu)),
        Left::Failed(words) => return failed(words),
        Left::Port => port(vcpu, platform, tsc),
        Left::Load(gpa, bytes) => {
            let value = platform.mmio_read(tsc, gpa, bytes as u8).to_le_bytes();
            // SAFETY: the vCPU left with a load, so this is the member that the kernel reads; it is made of integers.
            let mmio = unsafe { &mut vcpu.fd.get_kvm_run().__bindgen_anon_1.mmio };
            mmio.data = value;
        }
        Left::Store(gpa, data, bytes) => platform.mmio_write(tsc, gpa, bytes as u8, u64::from_le_bytes(data)),
        Left::ReadMsr(msr) => {
            let value = vcpu.msrs.read(msr);
            set_msr_answer(vcpu, value.is_none(), value);
        }
        Left::WriteMsr(msr, value) => {
            let written = vcpu.msrs.write(platform, tsc, index, msr, value);
            if let Some(used) = ModelMsrs::used_by_processor(msr, value).filter(|_| written.is_some())
                && let Err(refusal) = write_msr(&vcpu.fd, msr, used, "set SYSENTER")
            {
                return failed(refusal.to_string());
            }
            set_msr_answer(vcpu, written.is_none(), None);
        }
        Left::EndOfInterrupt(vector) => platform.end_of_interrupt(vector),
    }
    Next::Enter
}

fn set_msr_answer(vcpu: &mut Vcpu, faults: bool, value: Option<u64>) {
    // SAFETY: the vCPU left with RDMSR or WRMSR, so this is the member that the kernel reads; it is made of integers.
    let msr = unsafe { &mut vcpu.fd.get_kvm_run().__bindgen_anon_1.msr };
    msr.error = faults.into();
    if let Some(value) = value {
        msr.data = value;
    }
}

/// IN or OUT: `count` items of `size` bytes, one after the other.
fn port(vcpu: &mut Vcpu, platform: &mut dyn Platform, tsc: u64) {
    let run = vcpu.fd.get_kvm_run();
    // SAFETY: the vCPU left with IN or OUT, so this is the member that the kernel wrote; it is made of integers.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (size, bytes) = (usize::from(io.size).clamp(1, 4), usize::from(io.size) * io.count as usize);
    let start = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: the kernel put the items at this offset of the mapping of which `run` is the beginning, and the vCPU, whose
    // mapping it is, is borrowed here alone.
    let items = unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), bytes) };
    for item in items.chunks_exact_mut(size) {
        let mut word = [0; 4];
        word[..size].copy_from_slice(item);
        if u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_OUT {
            platform.io_write(tsc, io.port, size as u8, u32::from_le_bytes(word));
        } else {
            item.copy_from_slice(&platform.io_read(tsc, io.port, size as u8).to_le_bytes()[..size]);
        }
    }
}

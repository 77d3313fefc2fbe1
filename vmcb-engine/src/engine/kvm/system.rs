//! `/dev/kvm`: what it must have, and why it cannot be used.

use std::io::ErrorKind;

use kvm_bindings::{KVM_API_VERSION, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2};
use kvm_ioctls::{Cap, Kvm};

use super::Refusal;
use crate::engine::LoadError;

/// The device.
pub const DEVICE: &str = "/dev/kvm";

/// Why this host cannot run a machine on KVM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No KVM in the kernel, or no SVM in the processor.
    #[error("{DEVICE} does not exist: this host has no hardware virtualisation, or its module (kvm_amd) is not loaded")]
    Missing,
    /// The device is not for this user.
    #[error("{DEVICE} may not be opened by this user: give it the device's group, or run as root")]
    NotPermitted,
    /// The device cannot be opened.
    #[error("{DEVICE} cannot be opened")]
    Open(#[source] std::io::Error),
    /// Another interface altogether.
    #[error("KVM speaks version {0} of its interface, {KVM_API_VERSION} is needed")]
    Version(i32),
    /// The kernel is too old, or built without it.
    #[error("KVM of this kernel has no {0}; Linux 5.16 or newer is needed")]
    Lacks(&'static str),
    /// The guest's TSC rate is neither the host's nor one that it scales to.
    #[error("the guest's TSC runs at {guest_khz} kHz, this host's at {host_khz} kHz, and it cannot scale it")]
    TscRate {
        /// Wanted.
        guest_khz: u64,
        /// There.
        host_khz: u64,
    },
    /// A call failed that should not.
    #[error("KVM: {step}")]
    Call {
        /// What was being done.
        step: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The power-up state of the CPU model cannot be set.
    #[error("KVM does not take the state after power-up")]
    PowerUp(#[source] LoadError),
}

impl From<Refusal> for KvmError {
    fn from(Refusal { step, source }: Refusal) -> Self {
        KvmError::Call { step, source: source.into() }
    }
}

/// What the engine builds on, by its name in the KVM API.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
    (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

/// The same for capabilities that kvm-ioctls has no word for.
const NEEDED_RAW: &[(u32, &str)] = &[
    (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"),
    (KVM_CAP_ENFORCE_PV_FEATURE_CPUID, "KVM_CAP_ENFORCE_PV_FEATURE_CPUID"),
];

/// Opens the device and looks for what is needed.
pub(super) fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| not_opened(error.into()))?;
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => {}
        other => return Err(KvmError::Version(other)),
    }
    let known = NEEDED.iter().find(|(capability, _)| !kvm.check_extension(*capability)).map(|(_, name)| *name);
    let raw = NEEDED_RAW.iter().find(|(number, _)| kvm.check_extension_raw(u64::from(*number)) <= 0);
    match known.or(raw.map(|(_, name)| *name)) {
        Some(name) => Err(KvmError::Lacks(name)),
        None => Ok(kvm),
    }
}

fn not_opened(error: std::io::Error) -> KvmError {
    match error.kind() {
        ErrorKind::NotFound => KvmError::Missing,
        ErrorKind::PermissionDenied => KvmError::NotPermitted,
        // The node is there and nothing is behind it.
        _ if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => KvmError::Missing,
        _ => KvmError::Open(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_the_device_does_not_open_is_said_in_words() {
        let of = |code| not_opened(std::io::Error::from_raw_os_error(code));
        assert!(matches!(of(2), KvmError::Missing) && matches!(of(19), KvmError::Missing));
        assert!(matches!(of(13), KvmError::NotPermitted) && matches!(of(24), KvmError::Open(_)));
        assert!(of(2).to_string().contains("kvm_amd"));
        let rate = KvmError::TscRate { guest_khz: 1_000_000, host_khz: 2_596_146 };
        assert!(rate.to_string().contains("1000000 kHz") && rate.to_string().contains("2596146 kHz"));
    }
}

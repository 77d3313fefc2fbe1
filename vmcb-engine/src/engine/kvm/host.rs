//! What a host's KVM has to offer to guests: the other side of a contract.
//!
//! CPUID is what KVM supports, not what the processor says: a bit that KVM does not virtualise is no use to a guest. Of MSRs
//! there are those that KVM can set, and all that the engine keeps itself.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::{KvmError, ModelMsrs, refused, system};
use crate::capability::{CapabilitySet, CpuModel, Facts};

/// TSC-deadline, of CPUID 1 ECX: supported by the kernel's local APIC, whatever the table says (KVM API 4.46).
const TSC_DEADLINE: u32 = 1 << 24;

/// Measures it.
///
/// # Errors
/// There is no KVM here that can run machines.
pub fn capabilities() -> Result<CapabilitySet, KvmError> {
    let kvm = system::open()?;
    let table = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("KVM_GET_SUPPORTED_CPUID"))?;
    let mut msrs = std::collections::BTreeSet::new();
    for model in CpuModel::ALL {
        msrs.extend(ModelMsrs::new(&kvm, model)?.settable());
    }
    let [widths, ..] = answer(&table, 0x8000_0008, 0);
    let facts = Facts {
        phys_bits: widths & 0xff,
        linear_bits: widths >> 8 & 0xff,
        tsc_khz: tsc_khz(&kvm)?,
        tsc_scaling: kvm.check_extension(Cap::TscControl),
        engines: ["kvm".to_owned()].into(),
        msrs,
    };
    Ok(CapabilitySet::from_cpuid("", &mut |leaf, subleaf| answer(&table, leaf, subleaf), facts))
}

/// The rate at which guests' TSCs run that are not scaled, in kHz.
fn tsc_khz(kvm: &Kvm) -> Result<u64, KvmError> {
    let vm = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
    let vcpu = vm.create_vcpu(0).map_err(refused("KVM_CREATE_VCPU"))?;
    Ok(vcpu.get_tsc_khz().map_err(refused("KVM_GET_TSC_KHZ"))?.into())
}

fn answer(table: &CpuId, leaf: u32, subleaf: u32) -> [u32; 4] {
    let found = table.as_slice().iter().find(|entry| (entry.function, entry.index) == (leaf, subleaf));
    let [eax, ebx, ecx, edx] = found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]);
    [eax, ebx, if leaf == 1 { ecx | TSC_DEADLINE } else { ecx }, edx]
}

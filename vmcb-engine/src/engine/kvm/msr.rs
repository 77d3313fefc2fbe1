//! Which MSRs KVM has, and which are kept here.
//!
//! The guest reaches those directly that the processor itself needs. All others leave the kernel (KVM API 4.97 and 4.135), and
//! are answered here by the rows of the CPU model as on the software engine, so both engines know the same MSRs and the same
//! legal writes. x2APIC's are the kernel's: no filter sees them.

use std::collections::BTreeMap;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};

use super::{Refusal, no_memory, refused};
use crate::capability::CpuModel;
use crate::capability::msr::Home;
use crate::engine::{LoadError, Platform};

/// First index and count of those that the guest reaches without leaving the kernel: TSC, APIC_BASE, TSC_ADJUST, SPEC_CTRL and PRED_CMD,
/// SYSENTER_CS, PAT, TSC_DEADLINE, EFER and SYSCALL, FS and GS bases, and TSC_AUX. Of these, those that the model has.
const DIRECT: [(u32, u32); 10] = [
    (0x10, 1),
    (0x1b, 1),
    (0x3b, 1),
    (0x48, 2),
    (0x174, 1),
    (0x277, 1),
    (0x6e0, 1),
    (0xc000_0080, 5),
    (0xc000_0100, 3),
    (0xc000_0103, 1),
];

/// SYSENTER_ESP and SYSENTER_EIP, of which an AMD processor uses 32 bits: SYSENTER is illegal in long mode (APM3, SYSENTER).
/// A 64-bit guest writes 64 all the same. kvm_amd sets the lower half and reads EIP's lower half alone, so the whole is kept
/// here, and the kernel is given what the processor uses.
const HALVES: [u32; 2] = [0x175, 0x176];

/// The two MSRs of kvm-clock, which the platform follows.
const CLOCK: [u32; 2] = [0x4b56_4d00, 0x4b56_4d01];

/// MSRs of a vCPU: what KVM holds by index, what is kept here by value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ModelMsrs {
    model: CpuModel,
    kernels: Vec<u32>,
    kept: BTreeMap<u32, u64>,
}

/// Lets nothing but [`DIRECT`] pass.
pub(super) fn set_filter(vm: &VmFd, model: CpuModel) -> Result<(), Refusal> {
    let flags = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
    let bitmap = [0xff];
    let known = DIRECT.into_iter().filter(|(base, _)| model.msr(*base).is_some());
    let range = |(base, msr_count)| MsrFilterRange { flags, base, msr_count, bitmap: &bitmap };
    let ranges: Vec<MsrFilterRange<'_>> = known.map(range).collect();
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges).map_err(refused("KVM_X86_SET_MSR_FILTER"))
}

fn is_direct(msr: u32) -> bool {
    DIRECT.iter().any(|(first, count)| (*first..first + count).contains(&msr))
}

impl ModelMsrs {
    /// The MSRs of a model on this host.
    pub(super) fn new(kvm: &Kvm, model: CpuModel) -> Result<Self, Refusal> {
        let known = kvm.get_msr_index_list().map_err(refused("KVM_GET_MSR_INDEX_LIST"))?;
        let kernels = model.saved_msrs().map(|(msr, _)| msr);
        let kernels = kernels.filter(|msr| is_direct(*msr) && known.as_slice().contains(msr)).collect();
        Ok(Self { model, kernels, kept: BTreeMap::new() })
    }

    /// Those of the model that a restore can set on this host: the kernel's, and all that are kept here.
    pub(super) fn settable(&self) -> impl Iterator<Item = u32> {
        let saved = self.model.saved_msrs().map(|(msr, _)| msr);
        saved.filter(|msr| !is_direct(*msr) || self.kernels.contains(msr))
    }

    /// All of them.
    pub(super) fn store(&self, fd: &VcpuFd) -> Result<BTreeMap<u32, u64>, Refusal> {
        let mut values = self.kept.clone();
        values.extend(read_msrs(fd, &self.kernels, "KVM_GET_MSRS")?);
        Ok(values)
    }

    /// Takes over all of them; the first that cannot be set is named.
    pub(super) fn load(&mut self, fd: &VcpuFd, values: &BTreeMap<u32, u64>) -> Result<(), LoadError> {
        let kernels = self.for_kernel(values);
        let msrs = entries(kernels.iter().copied(), "KVM_SET_MSRS")?;
        let set = fd.set_msrs(&msrs).map_err(refused("KVM_SET_MSRS"))?;
        if let Some((msr, value)) = kernels.get(set) {
            let reason = format!("MSR {msr:#x} cannot be set to {value:#x} on this host");
            return Err(LoadError::Refused { step: "KVM_SET_MSRS", reason });
        }
        let kept = values.iter().filter(|(msr, _)| !self.kernels.contains(msr));
        self.kept = kept.map(|(msr, value)| (*msr, *value)).collect();
        Ok(())
    }

    /// What the kernel is given of a state's MSRs.
    fn for_kernel(&self, values: &BTreeMap<u32, u64>) -> Vec<(u32, u64)> {
        let of = |msr: &u32, bits: u64| values.get(msr).map(|value| (*msr, value & bits));
        let whole = self.kernels.iter().filter_map(|msr| of(msr, u64::MAX));
        whole.chain(HALVES.iter().filter_map(|msr| of(msr, u32::MAX.into()))).collect()
    }

    /// What the processor is to use of an MSR that is kept here, if it uses it.
    pub(super) fn used_by_processor(msr: u32, value: u64) -> Option<u64> {
        HALVES.contains(&msr).then_some(value & u64::from(u32::MAX))
    }

    /// RDMSR that left the kernel; `None` is #GP(0).
    pub(super) fn read(&self, msr: u32) -> Option<u64> {
        let row = self.model.msr(msr)?;
        match row.home {
            Home::Constant => Some(row.reset),
            Home::Saved => self.kept.get(&msr).copied(),
            Home::Field | Home::Lapic | Home::Command => None,
        }
    }

    /// WRMSR that left the kernel; `None` is #GP(0).
    pub(super) fn write(
        &mut self,
        platform: &mut dyn Platform,
        tsc: u64,
        vcpu: usize,
        msr: u32,
        value: u64,
    ) -> Option<()> {
        let current = self.read(msr)?;
        if !self.model.msr(msr)?.accepts(current, value) {
            return None;
        }
        if CLOCK.contains(&msr) {
            platform.msr_write(tsc, vcpu, msr, value)?;
        }
        let place = self.kept.get_mut(&msr)?;
        *place = value;
        Some(())
    }
}

/// Reads MSRs of a vCPU, by index.
fn read_msrs(fd: &VcpuFd, indices: &[u32], step: &'static str) -> Result<Vec<(u32, u64)>, Refusal> {
    let mut msrs = entries(indices.iter().map(|msr| (*msr, 0)), step)?;
    if fd.get_msrs(&mut msrs).map_err(refused(step))? != indices.len() {
        return Err(not_all(step));
    }
    Ok(msrs.as_slice().iter().map(|entry| (entry.index, entry.data)).collect())
}

/// Reads one MSR of a vCPU.
pub(super) fn read_msr(fd: &VcpuFd, index: u32, step: &'static str) -> Result<u64, Refusal> {
    read_msrs(fd, &[index], step)?.first().map(|(_, value)| *value).ok_or_else(|| not_all(step))
}

/// Writes one MSR of a vCPU.
pub(super) fn write_msr(fd: &VcpuFd, index: u32, value: u64, step: &'static str) -> Result<(), Refusal> {
    match fd.set_msrs(&entries([(index, value)].into_iter(), step)?).map_err(refused(step))? {
        1 => Ok(()),
        _ => Err(not_all(step)),
    }
}

/// The kernel stopped at an MSR that it does not let be read or written.
fn not_all(step: &'static str) -> Refusal {
    refused(step)(vmm_sys_util::errno::Error::new(libc::EPERM))
}

fn entries(values: impl Iterator<Item = (u32, u64)>, step: &'static str) -> Result<Msrs, Refusal> {
    let entries: Vec<kvm_msr_entry> =
        values.map(|(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| no_memory(step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_sysenter_addresses_the_kernel_has_the_half_that_processors_use() {
        assert!(is_direct(0x174) && !is_direct(0x175) && !is_direct(0x176));
        let msrs = ModelMsrs { model: CpuModel::X86V2, kernels: vec![0xc000_0082], kept: BTreeMap::new() };
        let values = [(0x175, 0xffff_fe00_0000_3000), (0x200, 6), (0xc000_0082, u64::MAX)].into();
        assert_eq!(msrs.for_kernel(&values), [(0xc000_0082, u64::MAX), (0x175, 0x3000)]);
        assert_eq!(ModelMsrs::used_by_processor(0x176, 0xffff_ffff_81c0_17b0), Some(0x81c0_17b0));
        assert_eq!(ModelMsrs::used_by_processor(0x200, 6), None);
    }
}

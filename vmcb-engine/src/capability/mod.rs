//! CPU models: what a guest of a model sees and needs, and what the software engine has to offer.
//!
//! | file | what |
//! |---|---|
//! | `soft_v1` | the frozen CPU model `soft-v1`: CPUID, power-up state, writable control bits |
//! | `x86_64` | the frozen CPU models `x86-64-v1` and `x86-64-v2`: the same with less, for any AMD host |
//! | `hardware` | the frozen CPU models `x86-64-v3`, `zen2`, `zen3` and `zen4`, which only hardware keeps |
//! | `msr` | their MSRs: reset values, legal writes, and which part holds them |
//!
//! A contract is made once, when the guest is created, and travels with it. How contracts and hosts compare, and what the
//! bits are called, is `proto::capability`, which is passed on here. This room refuses to execute CPUID.

pub mod hardware;
pub mod msr;
pub mod soft_v1;
pub mod x86_64;

#[cfg(test)]
mod tests;

pub use proto::capability::{
    Atom, BadSet, CapabilitySet, CpuidRegister, Facts, Failing, Place, Rule, names, same_rate,
};

use self::x86_64::Level;
use crate::cpu::CpuState;
use crate::vmcb::check::Limits;

/// What varies between the vCPUs and machines of one model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Topology {
    /// This vCPU, from 0; also its APIC id.
    pub vcpu: u32,
    /// vCPUs of the machine, at least 1.
    pub vcpus: u32,
    /// Guest TSC frequency.
    pub tsc_hz: u64,
}

/// A named CPU contract.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CpuModel {
    /// [`soft_v1`].
    SoftV1,
    /// [`x86_64`], level 1.
    X86V1,
    /// [`x86_64`], level 2.
    X86V2,
    /// One of [`hardware`].
    Hardware(hardware::Model),
}

impl CpuModel {
    /// Every model.
    pub const ALL: [CpuModel; 7] = [
        CpuModel::SoftV1,
        CpuModel::X86V1,
        CpuModel::X86V2,
        CpuModel::Hardware(hardware::Model::X86V3),
        CpuModel::Hardware(hardware::Model::Zen2),
        CpuModel::Hardware(hardware::Model::Zen3),
        CpuModel::Hardware(hardware::Model::Zen4),
    ];

    /// By the name that `MachineConfig.cpu_model` carries.
    pub fn by_name(name: &str) -> Option<CpuModel> {
        Self::ALL.into_iter().find(|model| model.name() == name)
    }

    /// The name.
    pub const fn name(self) -> &'static str {
        match self {
            CpuModel::SoftV1 => "soft-v1",
            CpuModel::X86V1 => "x86-64-v1",
            CpuModel::X86V2 => "x86-64-v2",
            CpuModel::Hardware(model) => model.name(),
        }
    }

    /// EAX, EBX, ECX, EDX of CPUID.
    pub fn cpuid(self, leaf: u32, subleaf: u32, topology: &Topology) -> [u32; 4] {
        match self {
            CpuModel::SoftV1 => soft_v1::cpuid(leaf, subleaf, topology),
            CpuModel::X86V1 => x86_64::cpuid(Level::V1, leaf, subleaf, topology),
            CpuModel::X86V2 => x86_64::cpuid(Level::V2, leaf, subleaf, topology),
            CpuModel::Hardware(model) => model.cpuid(leaf, subleaf, topology),
        }
    }

    /// State of a vCPU when the machine is built: RESET plus what depends on the model.
    pub fn power_up(self, topology: &Topology) -> CpuState {
        match self {
            CpuModel::SoftV1 => soft_v1::power_up(topology),
            CpuModel::X86V1 | CpuModel::X86V2 => x86_64::power_up(topology),
            CpuModel::Hardware(model) => model.power_up(topology),
        }
    }

    /// The MSR `index`, or `None` where RDMSR and WRMSR raise #GP(0).
    pub fn msr(self, index: u32) -> Option<&'static msr::MsrRow> {
        match self {
            CpuModel::SoftV1 => msr::find(index),
            CpuModel::X86V1 | CpuModel::X86V2 => x86_64::find(index),
            CpuModel::Hardware(model) => model.msr(index),
        }
    }

    /// Index and reset value of every MSR that `CpuState::msrs` holds.
    pub fn saved_msrs(self) -> impl Iterator<Item = (u32, u64)> {
        let rows: Vec<(u32, u64)> = match self {
            CpuModel::Hardware(model) => model.saved_msrs().collect(),
            _ => msr::saved().filter(|(index, _)| self.msr(*index).is_some()).collect(),
        };
        rows.into_iter()
    }

    /// Engines that keep it.
    pub const fn engines(self) -> &'static [&'static str] {
        match self {
            CpuModel::Hardware(_) => &["kvm"],
            _ => &["kvm", "soft"],
        }
    }

    /// What VMRUN's consistency checks take as existing bits.
    pub fn limits(self) -> Limits {
        match self {
            CpuModel::SoftV1 => soft_v1::LIMITS,
            CpuModel::X86V1 | CpuModel::X86V2 => x86_64::LIMITS,
            CpuModel::Hardware(model) => model.limits(),
        }
    }

    /// What a guest of this model needs from any host.
    pub fn contract(self, tsc_khz: u64) -> CapabilitySet {
        let topology = Topology { vcpu: 0, vcpus: 1, tsc_hz: tsc_khz.saturating_mul(1000) };
        let facts = Facts {
            phys_bits: soft_v1::PHYS_BITS,
            linear_bits: soft_v1::LINEAR_BITS,
            tsc_khz,
            tsc_scaling: false,
            engines: self.engines().iter().copied().map(str::to_owned).collect(),
            msrs: self.saved_msrs().map(|(index, _)| index).collect(),
        };
        CapabilitySet::from_cpuid(self.name(), &mut |leaf, subleaf| self.cpuid(leaf, subleaf, &topology), facts)
    }
}

/// What the software engine offers on any host: the table of its richest model, at any TSC rate.
pub fn soft_host() -> CapabilitySet {
    let mut set = CpuModel::SoftV1.contract(0);
    set.model.clear();
    set.facts.tsc_scaling = true;
    set.facts.engines = ["soft".to_owned()].into();
    set
}

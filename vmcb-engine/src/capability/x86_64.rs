//! CPU models `x86-64-v1` and `x86-64-v2`: frozen for ever. What processors have by the levels of the System V ABI, and what
//! KVM offers on all of them; nothing of the mitigations that newer processors spare their guests.
//!
//! They are [`soft_v1`] with less, so the software engine runs them too, and a guest of them moves between engines and across
//! generations of hosts: no FSGSBASE, SMEP, ERMS, FSRM, LZCNT, RDTSCP, 1 GiB pages, no AutoIBRS, no claim to be immune to
//! anything.

use super::{Topology, msr, soft_v1};
use crate::cpu::CpuState;
use crate::vmcb::check::Limits;
use crate::vmcb::registers::{cr4, efer};

/// How much of the instruction set there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// The first AMD64 processors, CMPXCHG16B and LAHF.
    V1,
    /// And SSE3, SSSE3, SSE4.1, SSE4.2, POPCNT.
    V2,
}

impl Level {
    /// Brand string, at most 47 bytes.
    fn brand(self) -> &'static str {
        match self {
            Level::V1 => "Godwit x86-64-v1",
            Level::V2 => "Godwit x86-64-v2",
        }
    }

    /// Bits of CPUID 1 ECX that a level lacks.
    fn lacks(self) -> u32 {
        match self {
            Level::V1 => 1 | 1 << 9 | 1 << 19 | 1 << 20 | 1 << 23,
            Level::V2 => 0,
        }
    }
}

/// CR4 bits that can be set.
pub const CR4_WRITABLE: u64 = soft_v1::CR4_WRITABLE & !(cr4::FSGSBASE | cr4::SMEP);
/// EFER bits that WRMSR can change.
pub const EFER_WRITABLE: u64 = soft_v1::EFER_WRITABLE & !efer::AIBRSE;

/// What VMRUN takes as existing.
pub const LIMITS: Limits =
    Limits { phys_bits: soft_v1::PHYS_BITS, cr4: CR4_WRITABLE, efer: EFER_WRITABLE | efer::LMA | efer::SVME };

/// TSC_ADJUST.
const LEAF_7_EBX: u32 = 1 << 1;
/// LZCNT.
const NOT_EXT_1_ECX: u32 = 1 << 5;
/// 1 GiB pages, RDTSCP.
const NOT_EXT_1_EDX: u32 = 1 << 26 | 1 << 27;
/// RstrFpErrPtrs.
const EXT_8_EBX: u32 = 1 << 2;
/// LFENCE always serialises.
const EXT_21_EAX: u32 = 1 << 2;

const TSC_AUX: u32 = 0xc000_0103;
const EFER: u32 = 0xc000_0080;

/// CPUID.
pub fn cpuid(level: Level, leaf: u32, subleaf: u32, topology: &Topology) -> [u32; 4] {
    let [eax, ebx, ecx, edx] = soft_v1::cpuid(leaf, subleaf, topology);
    match leaf {
        1 => [eax, ebx, ecx & !level.lacks(), edx],
        7 => [eax, ebx & LEAF_7_EBX, ecx, 0],
        0x8000_0001 => [eax, ebx, ecx & !NOT_EXT_1_ECX, edx & !NOT_EXT_1_EDX],
        0x8000_0002..=0x8000_0004 => soft_v1::brand(level.brand(), leaf - 0x8000_0002),
        0x8000_0008 => [eax, ebx & EXT_8_EBX, ecx, edx],
        0x8000_0021 => [eax & EXT_21_EAX, 0, 0, 0],
        _ => [eax, ebx, ecx, edx],
    }
}

/// The MSR `index`: those of [`msr`] but TSC_AUX, and an EFER without AutoIBRS.
pub fn find(index: u32) -> Option<&'static msr::MsrRow> {
    match index {
        TSC_AUX => None,
        EFER => Some(&EFER_ROW),
        _ => msr::find(index),
    }
}

static EFER_ROW: msr::MsrRow = msr::MsrRow {
    first: EFER,
    count: 1,
    name: "EFER",
    reset: 0,
    form: msr::Form::Mask(EFER_WRITABLE | efer::LMA),
    home: msr::Home::Field,
};

/// State of a vCPU when the machine is built.
pub fn power_up(topology: &Topology) -> CpuState {
    let mut state = soft_v1::power_up(topology);
    state.msrs.remove(&TSC_AUX);
    state
}

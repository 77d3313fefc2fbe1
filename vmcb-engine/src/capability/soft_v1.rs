//! CPU model `soft-v1`: frozen for ever, whatever the software engine learns later.
//!
//! An AMD processor of family 19h with the x86-64-v2 instruction set and nothing that an interpreter pays for (XSAVE,
//! AVX) or that its guests would pay for (retpolines, return thunks: AutoIBRS, SRSO_NO, TSA_*_NO, SSB_NO). ERMS and FSRM
//! make guests copy with REP MOVSB, which is one host copy a page. The KVM leaves give the TSC frequency, kvm-clock,
//! and x2APIC without interrupt remapping.
//!
//! Sources: APM3 appendix E; the KVM leaves as Linux documents them in `virt/kvm/x86/cpuid`. CR4- and APIC-dependent bits
//! (OSXSAVE, APIC) have no dynamic form here: no XSAVE, and the APIC cannot be turned off.

use crate::capability::{Topology, msr};
use crate::cpu::{CpuState, RunState, gpr};
use crate::vmcb::check::Limits;
use crate::vmcb::registers::{cr0, cr4, efer};

/// Family 19h, model 11h, stepping 1 (CPUID 1 EAX, APM3 appendix E.3.2).
pub const SIGNATURE: u32 = 0x00a1_0f11;
/// Physical address bits.
pub const PHYS_BITS: u32 = 48;
/// Linear address bits.
pub const LINEAR_BITS: u32 = 48;
/// Brand string, at most 47 bytes.
pub const BRAND: &str = "Godwit soft-v1";

/// CR0 bits that can be set.
pub const CR0_WRITABLE: u64 = cr0::ALL;
/// CR4 bits that can be set; MOV to CR4 of another raises #GP(0).
pub const CR4_WRITABLE: u64 = cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::FSGSBASE
    | cr4::SMEP;
/// EFER bits that WRMSR can change; LMA follows CR0.PG, others raise #GP(0).
pub const EFER_WRITABLE: u64 = efer::SCE | efer::LME | efer::NXE | efer::AIBRSE;
/// CR3 bits that must be zero in long mode.
pub const CR3_RESERVED: u64 = !((1 << PHYS_BITS) - 1);

/// What VMRUN takes as existing: a guest's EFER also carries SVME and LMA.
pub const LIMITS: Limits =
    Limits { phys_bits: PHYS_BITS, cr4: CR4_WRITABLE, efer: EFER_WRITABLE | efer::LMA | efer::SVME };

/// Greatest standard leaf: no XSAVE, so nothing above 7.
pub const MAX_STANDARD: u32 = 7;
/// Greatest extended leaf.
pub const MAX_EXTENDED: u32 = 0x8000_0021;
/// Greatest leaf of the KVM range.
pub const MAX_KVM: u32 = 0x4000_0010;

/// A word with these bits set.
pub(super) const fn bits<const N: usize>(numbers: [u32; N]) -> u32 {
    let (mut word, mut index) = (0, 0);
    while index < N {
        word |= 1 << numbers[index];
        index += 1;
    }
    word
}

/// SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, x2APIC, POPCNT, TSC-deadline, hypervisor.
const LEAF_1_ECX: u32 = bits([0, 9, 13, 19, 20, 21, 23, 24, 31]);
/// FPU DE PSE TSC MSR PAE MCE CX8 APIC MTRR PGE MCA CMOV PAT PSE36 MMX FXSR: shared by leaves 1 and 8000_0001.
const COMMON_EDX: u32 = bits([0, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 23, 24]);
/// SEP, CLFLUSH, SSE, SSE2.
const LEAF_1_EDX: u32 = COMMON_EDX | bits([11, 19, 25, 26]);
/// HTT: more than one logical processor.
const LEAF_1_EDX_HTT: u32 = bits([28]);
/// FSGSBASE, TSC_ADJUST, SMEP, ERMS.
const LEAF_7_EBX: u32 = bits([0, 1, 7, 9]);
/// FSRM.
const LEAF_7_EDX: u32 = bits([4]);
/// LAHF/SAHF in 64-bit mode, ABM (LZCNT), PREFETCHW.
const EXT_1_ECX: u32 = bits([0, 5, 8]);
/// CmpLegacy: more than one core.
const EXT_1_ECX_CMP: u32 = bits([1]);
/// SYSCALL, NX, MMX extensions, 1 GiB pages, RDTSCP, long mode.
const EXT_1_EDX: u32 = COMMON_EDX | bits([11, 20, 22, 26, 27, 29]);
/// Invariant TSC.
const EXT_7_EDX: u32 = bits([8]);
/// RstrFpErrPtrs, no EFER.LMSLE, SSB_NO, BTC_NO.
const EXT_8_EBX: u32 = bits([2, 20, 26, 29]);
/// LFENCE always serialising, null selector clears base, automatic IBRS, SRSO_NO.
const EXT_21_EAX: u32 = bits([2, 6, 8, 29]);
/// TSA_SQ_NO, TSA_L1_NO.
const EXT_21_ECX: u32 = bits([1, 2]);
/// NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE_STABLE.
const KVM_FEATURES: u32 = bits([1, 3, 24]);

const fn word(text: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*text)
}

/// CPUID. A leaf beyond the greatest, or an unknown one, is all zeros as on AMD processors.
pub fn cpuid(leaf: u32, subleaf: u32, topology: &Topology) -> [u32; 4] {
    match leaf {
        0..=MAX_STANDARD => standard(leaf, subleaf, topology),
        0x4000_0000..=MAX_KVM => kvm(leaf, topology),
        0x8000_0000..=MAX_EXTENDED => extended(leaf, topology),
        _ => [0; 4],
    }
}

fn standard(leaf: u32, subleaf: u32, topology: &Topology) -> [u32; 4] {
    match (leaf, subleaf) {
        (0, _) => vendor(MAX_STANDARD),
        (1, _) => {
            let processors = topology.vcpus.min(255);
            let ebx = (topology.vcpu & 0xff) << 24 | processors << 16 | 8 << 8;
            let htt = if topology.vcpus > 1 { LEAF_1_EDX_HTT } else { 0 };
            [SIGNATURE, ebx, LEAF_1_ECX, LEAF_1_EDX | htt]
        }
        // ARAT: the APIC timer never stops.
        (6, _) => [bits([2]), 0, 0, 0],
        (7, 0) => [0, LEAF_7_EBX, 0, LEAF_7_EDX],
        _ => [0; 4],
    }
}

fn kvm(leaf: u32, topology: &Topology) -> [u32; 4] {
    match leaf {
        0x4000_0000 => [MAX_KVM, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")],
        0x4000_0001 => [KVM_FEATURES, 0, 0, 0],
        // TSC and APIC bus frequency in kHz: the APIC timer counts at the TSC's rate.
        0x4000_0010 => {
            let khz = u32::try_from(topology.tsc_hz / 1000).unwrap_or(u32::MAX);
            [khz, khz, 0, 0]
        }
        _ => [0; 4],
    }
}

fn extended(leaf: u32, topology: &Topology) -> [u32; 4] {
    match leaf {
        0x8000_0000 => vendor(MAX_EXTENDED),
        0x8000_0001 => {
            let cmp = if topology.vcpus > 1 { EXT_1_ECX_CMP } else { 0 };
            [SIGNATURE, 0, EXT_1_ECX | cmp, EXT_1_EDX]
        }
        0x8000_0002..=0x8000_0004 => brand(BRAND, leaf - 0x8000_0002),
        // 64 TLB entries of each kind; L1 caches of 32 KiB, 8 ways, lines of 64 bytes.
        0x8000_0005 => [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140],
        // L2 of 512 KiB, 8 ways; L3 of 32 MiB, 16 ways.
        0x8000_0006 => [0x4800_6400, 0x6800_4200, 0x0200_6140, 0x0100_8140],
        0x8000_0007 => [0, 0, 0, EXT_7_EDX],
        0x8000_0008 => {
            let cores = topology.vcpus.clamp(1, 256);
            let id_bits = cores.next_power_of_two().trailing_zeros();
            [LINEAR_BITS << 8 | PHYS_BITS, EXT_8_EBX, id_bits << 12 | (cores - 1), 0]
        }
        0x8000_0021 => [EXT_21_EAX, 0, EXT_21_ECX, 0],
        _ => [0; 4],
    }
}

const fn vendor(max: u32) -> [u32; 4] {
    [max, word(b"Auth"), word(b"cAMD"), word(b"enti")]
}

/// One of the three leaves that a brand string takes, which has 47 bytes at most.
pub fn brand(brand: &str, part: u32) -> [u32; 4] {
    let mut text = [0; 48];
    text[..brand.len()].copy_from_slice(brand.as_bytes());
    let at = |index: usize| {
        let start = part as usize * 16 + index * 4;
        word(&[text[start], text[start + 1], text[start + 2], text[start + 3]])
    };
    [at(0), at(1), at(2), at(3)]
}

/// State of a vCPU when the machine is built: RESET, the signature in RDX, and the MSRs of the contract. The first vCPU
/// runs; the others wait for INIT.
pub fn power_up(topology: &Topology) -> CpuState {
    let mut state = CpuState::reset();
    state.gprs[gpr::RDX] = u64::from(SIGNATURE);
    state.msrs = msr::saved().collect();
    state.run_state = if topology.vcpu == 0 { RunState::Runnable } else { RunState::Uninitialised };
    state
}

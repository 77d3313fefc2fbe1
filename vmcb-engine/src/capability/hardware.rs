//! CPU models for hardware alone, frozen for ever: `x86-64-v3`, and `zen2`, `zen3`, `zen4`, named after the oldest processors
//! that keep them. The software engine has no AVX and keeps none of them.
//!
//! `x86-64-v3` is `x86-64-v2` and what the System V ABI's third level adds. The others are what EPYCs of a generation (7002,
//! 7003, 9004) have and KVM of Linux 6.1 passes on, without what needs more state than a guest's own (IBS, performance
//! counters, XSAVES, SVM), a topology of the processor (TOPOEXT), or a microcode (AutoIBRS, and claims to be immune).
//! XSAVE state has the standard form, whose places AMD has in common (APM2 11.5.2): AVX at 240h, opmask at 340h, ZMM_Hi256 at
//! 380h, Hi16_ZMM at 580h, PKRU at 980h.
//!
//! Sources: APM3 appendix E. This file refuses to know what the host at hand has.

use super::msr::{Form, Home, MsrRow};
use super::soft_v1::bits;
use super::x86_64::{self, Level};
use super::{Topology, soft_v1};
use crate::cpu::{CpuState, gpr};
use crate::vmcb::check::Limits;
use crate::vmcb::registers::{cr4, efer};

/// Greatest standard leaf: XSAVE's.
const MAX_STANDARD: u32 = 0xd;
/// Size and offset of XSAVE components 2 and up in the standard form, in bytes.
const COMPONENTS: [(u32, u32, u32); 5] =
    [(2, 256, 0x240), (5, 64, 0x340), (6, 512, 0x380), (7, 1024, 0x580), (9, 8, 0x980)];
/// The area of x87 and SSE, and the header.
const LEGACY_BYTES: u32 = 576;

/// One of the models.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Model {
    /// The third level of the System V ABI.
    X86V3,
    /// EPYC 7002.
    Zen2,
    /// EPYC 7003.
    Zen3,
    /// EPYC 9004.
    Zen4,
}

/// What a model has beyond the leaves of the software models.
struct Table {
    name: &'static str,
    /// Brand string, at most 47 bytes.
    brand: &'static str,
    /// CPUID 1 EAX.
    signature: u32,
    leaf_1_ecx: u32,
    leaf_7: [u32; 3],
    leaf_7_1_eax: u32,
    /// XCR0.
    components: u32,
    /// CPUID D.1 EAX.
    xsave: u32,
    ext_1_ecx: u32,
    ext_1_edx: u32,
    ext_8_ebx: u32,
    ext_21_eax: u32,
    limits: Limits,
    msrs: &'static [MsrRow],
    /// MSRs of `soft-v1` that it lacks.
    without: &'static [u32],
}

const fn limits(cr4: u64) -> Limits {
    Limits { phys_bits: soft_v1::PHYS_BITS, cr4, efer: x86_64::EFER_WRITABLE | efer::LMA | efer::SVME }
}

/// SSE3, FMA, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT, TSC-deadline, XSAVE, AVX, F16C, hypervisor.
const V3_1_ECX: u32 = bits([0, 9, 12, 13, 19, 20, 21, 22, 23, 24, 26, 28, 29, 31]);
/// And PCLMULQDQ, AES, RDRAND.
const ZEN_1_ECX: u32 = V3_1_ECX | bits([1, 25, 30]);
/// PCID.
const ZEN3_1_ECX: u32 = ZEN_1_ECX | bits([17]);
/// FSGSBASE, TSC_ADJUST, BMI1, AVX2, SMEP, BMI2, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, SHA.
const ZEN2_7_EBX: u32 = bits([0, 1, 3, 5, 7, 8, 18, 19, 20, 23, 24, 29]);
/// And INVPCID.
const ZEN3_7_EBX: u32 = ZEN2_7_EBX | bits([10]);
/// And ERMS, AVX512 F, DQ, IFMA, CD, BW, VL.
const ZEN4_7_EBX: u32 = ZEN3_7_EBX | bits([9, 16, 17, 21, 28, 30, 31]);
/// UMIP, RDPID.
const ZEN2_7_ECX: u32 = bits([2, 22]);
/// And PKU, VAES, VPCLMULQDQ.
const ZEN3_7_ECX: u32 = ZEN2_7_ECX | bits([3, 9, 10]);
/// And AVX512_VBMI, VBMI2, GFNI, AVX512_VNNI, BITALG, VPOPCNTDQ.
const ZEN4_7_ECX: u32 = ZEN3_7_ECX | bits([1, 6, 8, 11, 12, 14]);
/// LAHF, ABM (LZCNT), PREFETCHW.
const V3_EXT_1_ECX: u32 = bits([0, 5, 8]);
/// And MOV CR8 by LOCK, SSE4A.
const ZEN_EXT_1_ECX: u32 = V3_EXT_1_ECX | bits([4, 6]);
/// 1 GiB pages, RDTSCP.
const LATER_EXT_1_EDX: u32 = bits([26, 27]);
/// CLZERO, RstrFpErrPtrs, WBNOINVD, IBPB, STIBP, SSBD.
const ZEN_EXT_8_EBX: u32 = bits([0, 2, 9, 12, 15, 24]);
/// XSAVEOPT, XSAVEC, XGETBV with ECX = 1.
const ZEN_XSAVE: u32 = bits([0, 1, 2]);
/// LFENCE always serialises.
const LFENCE: u32 = bits([2]);
/// And a null selector clears the base.
const NULL_SELECTOR: u32 = LFENCE | bits([6]);

const V3_CR4: u64 = x86_64::CR4_WRITABLE | cr4::OSXSAVE;
const ZEN2_CR4: u64 = soft_v1::CR4_WRITABLE | cr4::OSXSAVE | cr4::SMAP | cr4::UMIP;
const ZEN3_CR4: u64 = ZEN2_CR4 | cr4::PKE | cr4::PCIDE;

const TSC_AUX: u32 = 0xc000_0103;
const EFER: u32 = 0xc000_0080;

/// Speculation control: STIBP and SSBD can be set in the one, IBPB is done by writing the other.
static SPECULATION: [MsrRow; 2] = [
    MsrRow { first: 0x48, count: 1, name: "SPEC_CTRL", reset: 0, form: Form::Mask(0b110), home: Home::Saved },
    MsrRow { first: 0x49, count: 1, name: "PRED_CMD", reset: 0, form: Form::Mask(1), home: Home::Command },
];

static X86V3: Table = Table {
    name: "x86-64-v3",
    brand: "Godwit x86-64-v3",
    signature: soft_v1::SIGNATURE,
    leaf_1_ecx: V3_1_ECX,
    // TSC_ADJUST, BMI1, AVX2, BMI2.
    leaf_7: [bits([1, 3, 5, 8]), 0, 0],
    leaf_7_1_eax: 0,
    components: bits([0, 1, 2]),
    xsave: 0,
    ext_1_ecx: V3_EXT_1_ECX,
    ext_1_edx: 0,
    ext_8_ebx: bits([2]),
    ext_21_eax: LFENCE,
    limits: limits(V3_CR4),
    msrs: &[],
    without: &[TSC_AUX],
};

static ZEN2: Table = Table {
    name: "zen2",
    brand: "Godwit zen2",
    signature: 0x0083_0f10,
    leaf_1_ecx: ZEN_1_ECX,
    leaf_7: [ZEN2_7_EBX, ZEN2_7_ECX, 0],
    leaf_7_1_eax: 0,
    components: bits([0, 1, 2]),
    xsave: ZEN_XSAVE,
    ext_1_ecx: ZEN_EXT_1_ECX,
    ext_1_edx: LATER_EXT_1_EDX,
    ext_8_ebx: ZEN_EXT_8_EBX,
    ext_21_eax: LFENCE,
    limits: limits(ZEN2_CR4),
    msrs: &SPECULATION,
    without: &[],
};

static ZEN3: Table = Table {
    name: "zen3",
    brand: "Godwit zen3",
    signature: 0x00a0_0f11,
    leaf_1_ecx: ZEN3_1_ECX,
    leaf_7: [ZEN3_7_EBX, ZEN3_7_ECX, 0],
    leaf_7_1_eax: 0,
    components: bits([0, 1, 2, 9]),
    xsave: ZEN_XSAVE,
    ext_1_ecx: ZEN_EXT_1_ECX,
    ext_1_edx: LATER_EXT_1_EDX,
    ext_8_ebx: ZEN_EXT_8_EBX,
    ext_21_eax: NULL_SELECTOR,
    limits: limits(ZEN3_CR4),
    msrs: &SPECULATION,
    without: &[],
};

static ZEN4: Table = Table {
    name: "zen4",
    brand: "Godwit zen4",
    signature: 0x00a1_0f11,
    leaf_1_ecx: ZEN3_1_ECX,
    // FSRM.
    leaf_7: [ZEN4_7_EBX, ZEN4_7_ECX, bits([4])],
    // AVX512_BF16.
    leaf_7_1_eax: bits([5]),
    components: bits([0, 1, 2, 5, 6, 7, 9]),
    xsave: ZEN_XSAVE,
    ext_1_ecx: ZEN_EXT_1_ECX,
    ext_1_edx: LATER_EXT_1_EDX,
    ext_8_ebx: ZEN_EXT_8_EBX,
    ext_21_eax: NULL_SELECTOR,
    limits: limits(ZEN3_CR4),
    msrs: &SPECULATION,
    without: &[],
};

/// As the models of the ABI have it: no AutoIBRS.
static EFER_ROW: MsrRow = MsrRow {
    first: EFER,
    count: 1,
    name: "EFER",
    reset: 0,
    form: Form::Mask(x86_64::EFER_WRITABLE | efer::LMA),
    home: Home::Field,
};

impl Model {
    const fn table(self) -> &'static Table {
        match self {
            Model::X86V3 => &X86V3,
            Model::Zen2 => &ZEN2,
            Model::Zen3 => &ZEN3,
            Model::Zen4 => &ZEN4,
        }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        self.table().name
    }

    /// CPUID.
    pub fn cpuid(self, leaf: u32, subleaf: u32, topology: &Topology) -> [u32; 4] {
        let table = self.table();
        // What no feature depends on is as in the models of the ABI: KVM's leaves, caches, topology.
        let [eax, ebx, ecx, edx] = x86_64::cpuid(Level::V2, leaf, subleaf, topology);
        match (leaf, subleaf) {
            (0, _) => [MAX_STANDARD, ebx, ecx, edx],
            (1, _) => [table.signature, ebx, table.leaf_1_ecx, edx],
            (7, 0) => [u32::from(table.leaf_7_1_eax != 0), table.leaf_7[0], table.leaf_7[1], table.leaf_7[2]],
            (7, 1) => [table.leaf_7_1_eax, 0, 0, 0],
            (0xd, _) => table.xsave_leaf(subleaf),
            (0x8000_0001, _) => {
                // CmpLegacy follows the number of processors.
                [table.signature, ebx, table.ext_1_ecx | ecx & bits([1]), edx | table.ext_1_edx]
            }
            (0x8000_0002..=0x8000_0004, _) => soft_v1::brand(table.brand, leaf - 0x8000_0002),
            (0x8000_0008, _) => [eax, table.ext_8_ebx, ecx, edx],
            (0x8000_0021, _) => [table.ext_21_eax, 0, 0, 0],
            _ => [eax, ebx, ecx, edx],
        }
    }

    /// What VMRUN takes as existing.
    pub fn limits(self) -> Limits {
        self.table().limits
    }

    /// The MSR `index`.
    pub fn msr(self, index: u32) -> Option<&'static MsrRow> {
        let table = self.table();
        match index {
            EFER => Some(&EFER_ROW),
            _ if table.without.contains(&index) => None,
            _ => table.msrs.iter().find(|row| row.first == index).or_else(|| super::msr::find(index)),
        }
    }

    /// Index and reset value of every MSR that `CpuState::msrs` holds.
    pub fn saved_msrs(self) -> impl Iterator<Item = (u32, u64)> {
        let table = self.table();
        let common = super::msr::saved().filter(|(index, _)| !table.without.contains(index));
        let own = table.msrs.iter().filter(|row| row.home == Home::Saved);
        own.map(|row| (row.first, row.reset)).chain(common)
    }

    /// State of a vCPU when the machine is built.
    pub fn power_up(self, topology: &Topology) -> CpuState {
        let mut state = soft_v1::power_up(topology);
        state.gprs[gpr::RDX] = u64::from(self.table().signature);
        state.msrs = self.saved_msrs().collect();
        state
    }
}

impl Table {
    /// CPUID 0000_000D (APM3 E.3.8). What follows XCR0, KVM keeps up to date; here it is as after RESET.
    fn xsave_leaf(&self, subleaf: u32) -> [u32; 4] {
        let here = |component: &&(u32, u32, u32)| self.components & (1 << component.0) != 0;
        match subleaf {
            0 => {
                let ends = COMPONENTS.iter().filter(here).map(|(_, bytes, offset)| bytes + offset);
                [self.components, LEGACY_BYTES, ends.fold(LEGACY_BYTES, u32::max), 0]
            }
            // The compacted form is there with XSAVEC.
            1 => [self.xsave, if self.xsave & bits([1]) != 0 { LEGACY_BYTES } else { 0 }, 0, 0],
            _ => {
                let found = COMPONENTS.iter().filter(here).find(|component| component.0 == subleaf);
                found.map_or([0; 4], |(_, bytes, offset)| [*bytes, *offset, 0, 0])
            }
        }
    }
}

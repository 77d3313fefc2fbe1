//! A name for every known bit of the feature leaves (APM3 appendix E; the manual's or, where it has none, Linux').
//!
//! Names are for people who read why a host was refused. Bits without a row print by number.

use crate::capability::CpuidRegister::{self, Eax, Ebx, Ecx, Edx};

struct Word {
    leaf: u32,
    subleaf: u32,
    register: CpuidRegister,
    names: &'static [(u32, &'static str)],
}

/// The name of one bit, or `None`.
pub fn name(leaf: u32, subleaf: u32, register: CpuidRegister, bit: u32) -> Option<&'static str> {
    let word = WORDS.iter().find(|word| (word.leaf, word.subleaf, word.register) == (leaf, subleaf, register))?;
    word.names.iter().find(|(number, _)| *number == bit).map(|(_, name)| *name)
}

const fn word(leaf: u32, subleaf: u32, register: CpuidRegister, names: &'static [(u32, &'static str)]) -> Word {
    Word { leaf, subleaf, register, names }
}

#[rustfmt::skip]
const WORDS: &[Word] = &[
    word(0x1, 0, Ecx, &[
        (0, "SSE3"), (1, "PCLMULQDQ"), (2, "DTES64"), (3, "MONITOR"), (4, "DS_CPL"), (5, "VMX"), (6, "SMX"),
        (7, "EST"), (8, "TM2"), (9, "SSSE3"), (10, "CID"), (11, "SDBG"), (12, "FMA"), (13, "CMPXCHG16B"), (14, "XTPR"),
        (15, "PDCM"), (17, "PCID"), (18, "DCA"), (19, "SSE4.1"), (20, "SSE4.2"), (21, "x2APIC"), (22, "MOVBE"),
        (23, "POPCNT"), (24, "TSC_DEADLINE"), (25, "AES"), (26, "XSAVE"), (27, "OSXSAVE"), (28, "AVX"), (29, "F16C"),
        (30, "RDRAND"), (31, "HYPERVISOR"),
    ]),
    word(0x1, 0, Edx, &[
        (0, "FPU"), (1, "VME"), (2, "DE"), (3, "PSE"), (4, "TSC"), (5, "MSR"), (6, "PAE"), (7, "MCE"),
        (8, "CMPXCHG8B"), (9, "APIC"), (11, "SYSENTER"), (12, "MTRR"), (13, "PGE"), (14, "MCA"), (15, "CMOV"),
        (16, "PAT"), (17, "PSE36"), (18, "PSN"), (19, "CLFLUSH"), (21, "DS"), (22, "ACPI"), (23, "MMX"), (24, "FXSR"),
        (25, "SSE"), (26, "SSE2"), (27, "SS"), (28, "HTT"), (29, "TM"), (31, "PBE"),
    ]),
    word(0x6, 0, Eax, &[(0, "DTHERM"), (1, "IDA"), (2, "ARAT")]),
    word(0x7, 0, Ebx, &[
        (0, "FSGSBASE"), (1, "TSC_ADJUST"), (2, "SGX"), (3, "BMI1"), (4, "HLE"), (5, "AVX2"), (6, "FDP_EXCPTN_ONLY"),
        (7, "SMEP"), (8, "BMI2"), (9, "ERMS"), (10, "INVPCID"), (11, "RTM"), (12, "PQM"), (13, "ZERO_FCS_FDS"),
        (14, "MPX"), (15, "PQE"), (16, "AVX512F"), (17, "AVX512DQ"), (18, "RDSEED"), (19, "ADX"), (20, "SMAP"),
        (21, "AVX512_IFMA"), (22, "RDPID_LEGACY"), (23, "CLFLUSHOPT"), (24, "CLWB"), (25, "INTEL_PT"),
        (26, "AVX512PF"), (27, "AVX512ER"), (28, "AVX512CD"), (29, "SHA"), (30, "AVX512BW"), (31, "AVX512VL"),
    ]),
    word(0x7, 0, Ecx, &[
        (0, "PREFETCHWT1"), (1, "AVX512_VBMI"), (2, "UMIP"), (3, "PKU"), (4, "OSPKE"), (5, "WAITPKG"),
        (6, "AVX512_VBMI2"), (7, "CET_SS"), (8, "GFNI"), (9, "VAES"), (10, "VPCLMULQDQ"), (11, "AVX512_VNNI"),
        (12, "AVX512_BITALG"), (14, "AVX512_VPOPCNTDQ"), (16, "LA57"), (22, "RDPID"), (24, "BUS_LOCK_DETECT"),
        (25, "CLDEMOTE"), (27, "MOVDIRI"), (28, "MOVDIR64B"), (29, "ENQCMD"), (30, "SGX_LC"), (31, "PKS"),
    ]),
    word(0x7, 0, Edx, &[
        (2, "AVX512_4VNNIW"), (3, "AVX512_4FMAPS"), (4, "FSRM"), (8, "AVX512_VP2INTERSECT"), (9, "SRBDS_CTRL"),
        (10, "MD_CLEAR"), (14, "SERIALIZE"), (16, "TSXLDTRK"), (18, "PCONFIG"), (20, "CET_IBT"), (22, "AMX_BF16"),
        (23, "AVX512_FP16"), (24, "AMX_TILE"), (25, "AMX_INT8"), (26, "SPEC_CTRL"), (27, "INTEL_STIBP"),
        (28, "FLUSH_L1D"), (29, "ARCH_CAPABILITIES"), (30, "CORE_CAPABILITIES"), (31, "SPEC_CTRL_SSBD"),
    ]),
    word(0x7, 1, Eax, &[
        (4, "AVX_VNNI"), (5, "AVX512_BF16"), (7, "CMPCCXADD"), (10, "FZRM"), (11, "FSRS"), (12, "FSRC"), (21, "AMX_FP16"),
        (23, "AVX_IFMA"), (26, "LAM"),
    ]),
    word(0xd, 1, Eax, &[(0, "XSAVEOPT"), (1, "XSAVEC"), (2, "XGETBV1"), (3, "XSAVES"), (4, "XFD")]),
    word(0x4000_0001, 0, Eax, &[
        (0, "KVM_CLOCKSOURCE"), (1, "KVM_NOP_IO_DELAY"), (2, "KVM_MMU_OP"), (3, "KVM_CLOCKSOURCE2"), (4, "KVM_ASYNC_PF"),
        (5, "KVM_STEAL_TIME"), (6, "KVM_PV_EOI"), (7, "KVM_PV_UNHALT"), (9, "KVM_PV_TLB_FLUSH"),
        (10, "KVM_ASYNC_PF_VMEXIT"), (11, "KVM_PV_SEND_IPI"), (12, "KVM_POLL_CONTROL"), (13, "KVM_PV_SCHED_YIELD"),
        (14, "KVM_ASYNC_PF_INT"), (15, "KVM_MSI_EXT_DEST_ID"), (16, "KVM_HC_MAP_GPA_RANGE"),
        (17, "KVM_MIGRATION_CONTROL"), (24, "KVM_CLOCKSOURCE_STABLE"),
    ]),
    word(0x8000_0001, 0, Ecx, &[
        (0, "LAHF_LM"), (1, "CMP_LEGACY"), (2, "SVM"), (3, "EXTAPIC"), (4, "CR8_LEGACY"), (5, "ABM"), (6, "SSE4A"),
        (7, "MISALIGNSSE"), (8, "3DNOWPREFETCH"), (9, "OSVW"), (10, "IBS"), (11, "XOP"), (12, "SKINIT"), (13, "WDT"),
        (15, "LWP"), (16, "FMA4"), (17, "TCE"), (19, "NODEID_MSR"), (21, "TBM"), (22, "TOPOEXT"), (23, "PERFCTR_CORE"),
        (24, "PERFCTR_NB"), (26, "BPEXT"), (27, "PTSC"), (28, "PERFCTR_LLC"), (29, "MONITORX"), (30, "ADDR_MASK_EXT"),
    ]),
    word(0x8000_0001, 0, Edx, &[
        (0, "FPU"), (1, "VME"), (2, "DE"), (3, "PSE"), (4, "TSC"), (5, "MSR"), (6, "PAE"), (7, "MCE"),
        (8, "CMPXCHG8B"), (9, "APIC"), (11, "SYSCALL"), (12, "MTRR"), (13, "PGE"), (14, "MCA"), (15, "CMOV"),
        (16, "PAT"), (17, "PSE36"), (19, "MP"), (20, "NX"), (22, "MMXEXT"), (23, "MMX"), (24, "FXSR"), (25, "FXSR_OPT"),
        (26, "PDPE1GB"), (27, "RDTSCP"), (29, "LM"), (30, "3DNOWEXT"), (31, "3DNOW"),
    ]),
    word(0x8000_0007, 0, Edx, &[
        (0, "TS"), (1, "FID"), (2, "VID"), (3, "TTP"), (4, "TM"), (6, "100MHZSTEPS"), (7, "HWPSTATE"),
        (8, "INVARIANT_TSC"), (9, "CPB"), (10, "EFFFREQ_RO"), (11, "PROC_FEEDBACK"), (12, "PROC_POWER"),
        (15, "FAST_CPPC"),
    ]),
    word(0x8000_0008, 0, Ebx, &[
        (0, "CLZERO"), (1, "IRPERF"), (2, "XSAVEERPTR"), (3, "INVLPGB"), (4, "RDPRU"), (6, "MBE"), (8, "MCOMMIT"),
        (9, "WBNOINVD"), (12, "IBPB"), (13, "INT_WBINVD"), (14, "IBRS"), (15, "STIBP"), (16, "IBRS_ALWAYS_ON"),
        (17, "STIBP_ALWAYS_ON"), (18, "IBRS_PREFERRED"), (19, "IBRS_SAME_MODE"), (20, "EFER_LMSLE_UNSUPPORTED"),
        (21, "INVLPGB_NESTED"), (23, "PPIN"), (24, "SSBD"), (25, "VIRT_SSBD"), (26, "SSB_NO"), (27, "CPPC"), (28, "PSFD"),
        (29, "BTC_NO"), (30, "IBPB_RET"), (31, "BRS"),
    ]),
    word(0x8000_000a, 0, Edx, &[
        (0, "NPT"), (1, "LBRV"), (2, "SVM_LOCK"), (3, "NRIP_SAVE"), (4, "TSC_SCALE"), (5, "VMCB_CLEAN"),
        (6, "FLUSH_BY_ASID"), (7, "DECODE_ASSISTS"), (8, "PMC_VIRT"), (10, "PAUSE_FILTER"), (12, "PAUSE_FILTER_THRESHOLD"),
        (13, "AVIC"), (15, "V_VMSAVE_VMLOAD"), (16, "VGIF"), (17, "GMET"), (18, "X2AVIC"), (19, "SSS_CHECK"),
        (20, "V_SPEC_CTRL"), (21, "ROGPT"), (23, "HOST_MCE_OVERRIDE"), (24, "TLBSYNC"), (25, "VNMI"), (26, "IBS_VIRT"),
        (27, "EXT_LVT_OFFSET_FAULT_CHANGE"), (28, "SVME_ADDR_CHK"), (29, "BUS_LOCK_THRESHOLD"), (30, "IDLE_HLT"),
    ]),
    word(0x8000_0021, 0, Eax, &[
        (0, "NO_NESTED_DATA_BP"), (1, "FS_GS_BASE_NON_SERIALIZING"), (2, "LFENCE_SERIALIZING"), (3, "SMM_PAGE_CFG_LOCK"),
        (5, "VERW_CLEAR"), (6, "NULL_SELECTOR_CLEARS_BASE"), (7, "UPPER_ADDRESS_IGNORE"), (8, "AUTOIBRS"),
        (9, "NO_SMM_CTL_MSR"), (10, "FSRS_AMD"), (11, "FSRC_AMD"), (13, "PREFETCH_CTL_MSR"), (17, "CPUID_USER_DIS"),
        (18, "EPSF"), (22, "WORKLOAD_CLASS"), (24, "ERAPS"), (27, "SBPB"), (28, "IBPB_BRTYPE"), (29, "SRSO_NO"),
        (30, "SRSO_USER_KERNEL_NO"), (31, "SRSO_MSR_FIX"),
    ]),
    word(0x8000_0021, 0, Ecx, &[(1, "TSA_SQ_NO"), (2, "TSA_L1_NO")]),
];

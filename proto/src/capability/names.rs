//! Names for people: of every known bit of the feature leaves, of XSAVE components, of MSRs.
//!
//! Sources: APM3 appendix E, APM2 appendix A; where the manual has no name, Linux'. Bits are named in small letters as
//! `/proc/cpuinfo` does, MSRs as the manual does. What has no row prints by number. This file refuses to know what any
//! engine or model has: a name is no promise.

use crate::capability::CpuidRegister::{self, Eax, Ebx, Ecx, Edx};
use crate::capability::Place;

struct Word {
    leaf: u32,
    subleaf: u32,
    register: CpuidRegister,
    names: &'static [(u32, &'static str)],
}

/// The name of one bit, or `None`.
pub fn name(place: Place) -> Option<&'static str> {
    let Place { leaf, subleaf, register, bit } = place;
    let word = WORDS.iter().find(|word| (word.leaf, word.subleaf, word.register) == (leaf, subleaf, register))?;
    word.names.iter().find(|(number, _)| *number == bit).map(|(_, name)| *name)
}

/// Every bit of this name, capital or small: some stand in a leaf of Intel's and one of AMD's.
pub fn places(name: &str) -> Vec<Place> {
    let in_word = |word: &'static Word| {
        let Word { leaf, subleaf, register, names } = *word;
        let named = names.iter().filter(move |(_, known)| known.eq_ignore_ascii_case(name));
        named.map(move |&(bit, _)| Place { leaf, subleaf, register, bit })
    };
    WORDS.iter().flat_map(in_word).collect()
}

/// The name of an MSR; of one of several that are alike, that of them all.
pub fn msr_name(index: u32) -> Option<&'static str> {
    MSRS.iter().find(|(first, count, _)| index.checked_sub(*first).is_some_and(|at| at < *count)).map(|row| row.2)
}

/// MSRs of this name, capital or small.
pub fn msrs(name: &str) -> impl Iterator<Item = u32> {
    let rows = MSRS.iter().filter(move |(_, _, known)| known.eq_ignore_ascii_case(name));
    rows.flat_map(|(first, count, _)| *first..first + count)
}

const fn word(leaf: u32, subleaf: u32, register: CpuidRegister, names: &'static [(u32, &'static str)]) -> Word {
    Word { leaf, subleaf, register, names }
}

#[rustfmt::skip]
const WORDS: &[Word] = &[
    word(0x1, 0, Ecx, &[
        (0, "sse3"), (1, "pclmulqdq"), (2, "dtes64"), (3, "monitor"), (4, "ds_cpl"), (5, "vmx"), (6, "smx"),
        (7, "est"), (8, "tm2"), (9, "ssse3"), (10, "cid"), (11, "sdbg"), (12, "fma"), (13, "cmpxchg16b"), (14, "xtpr"),
        (15, "pdcm"), (17, "pcid"), (18, "dca"), (19, "sse4.1"), (20, "sse4.2"), (21, "x2apic"), (22, "movbe"),
        (23, "popcnt"), (24, "tsc_deadline"), (25, "aes"), (26, "xsave"), (27, "osxsave"), (28, "avx"), (29, "f16c"),
        (30, "rdrand"), (31, "hypervisor"),
    ]),
    word(0x1, 0, Edx, &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"),
        (8, "cmpxchg8b"), (9, "apic"), (11, "sysenter"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"),
        (16, "pat"), (17, "pse36"), (18, "psn"), (19, "clflush"), (21, "ds"), (22, "acpi"), (23, "mmx"), (24, "fxsr"),
        (25, "sse"), (26, "sse2"), (27, "ss"), (28, "htt"), (29, "tm"), (31, "pbe"),
    ]),
    word(0x6, 0, Eax, &[(0, "dtherm"), (1, "ida"), (2, "arat")]),
    word(0x7, 0, Ebx, &[
        (0, "fsgsbase"), (1, "tsc_adjust"), (2, "sgx"), (3, "bmi1"), (4, "hle"), (5, "avx2"), (6, "fdp_excptn_only"),
        (7, "smep"), (8, "bmi2"), (9, "erms"), (10, "invpcid"), (11, "rtm"), (12, "pqm"), (13, "zero_fcs_fds"),
        (14, "mpx"), (15, "pqe"), (16, "avx512f"), (17, "avx512dq"), (18, "rdseed"), (19, "adx"), (20, "smap"),
        (21, "avx512_ifma"), (22, "rdpid_legacy"), (23, "clflushopt"), (24, "clwb"), (25, "intel_pt"),
        (26, "avx512pf"), (27, "avx512er"), (28, "avx512cd"), (29, "sha"), (30, "avx512bw"), (31, "avx512vl"),
    ]),
    word(0x7, 0, Ecx, &[
        (0, "prefetchwt1"), (1, "avx512_vbmi"), (2, "umip"), (3, "pku"), (4, "ospke"), (5, "waitpkg"),
        (6, "avx512_vbmi2"), (7, "cet_ss"), (8, "gfni"), (9, "vaes"), (10, "vpclmulqdq"), (11, "avx512_vnni"),
        (12, "avx512_bitalg"), (14, "avx512_vpopcntdq"), (16, "la57"), (22, "rdpid"), (24, "bus_lock_detect"),
        (25, "cldemote"), (27, "movdiri"), (28, "movdir64b"), (29, "enqcmd"), (30, "sgx_lc"), (31, "pks"),
    ]),
    word(0x7, 0, Edx, &[
        (2, "avx512_4vnniw"), (3, "avx512_4fmaps"), (4, "fsrm"), (8, "avx512_vp2intersect"), (9, "srbds_ctrl"),
        (10, "md_clear"), (14, "serialize"), (16, "tsxldtrk"), (18, "pconfig"), (20, "cet_ibt"), (22, "amx_bf16"),
        (23, "avx512_fp16"), (24, "amx_tile"), (25, "amx_int8"), (26, "spec_ctrl"), (27, "intel_stibp"),
        (28, "flush_l1d"), (29, "arch_capabilities"), (30, "core_capabilities"), (31, "spec_ctrl_ssbd"),
    ]),
    word(0x7, 1, Eax, &[
        (4, "avx_vnni"), (5, "avx512_bf16"), (7, "cmpccxadd"), (10, "fzrm"), (11, "fsrs"), (12, "fsrc"), (21, "amx_fp16"),
        (23, "avx_ifma"), (26, "lam"),
    ]),
    word(0xd, 0, Eax, &[
        (0, "xcr0_x87"), (1, "xcr0_sse"), (2, "xcr0_avx"), (3, "xcr0_bndregs"), (4, "xcr0_bndcsr"), (5, "xcr0_opmask"),
        (6, "xcr0_zmm_hi256"), (7, "xcr0_hi16_zmm"), (9, "xcr0_pkru"), (17, "xcr0_tilecfg"), (18, "xcr0_tiledata"),
    ]),
    word(0xd, 1, Eax, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")]),
    word(0x4000_0001, 0, Eax, &[
        (0, "kvm_clocksource"), (1, "kvm_nop_io_delay"), (2, "kvm_mmu_op"), (3, "kvm_clocksource2"), (4, "kvm_async_pf"),
        (5, "kvm_steal_time"), (6, "kvm_pv_eoi"), (7, "kvm_pv_unhalt"), (9, "kvm_pv_tlb_flush"),
        (10, "kvm_async_pf_vmexit"), (11, "kvm_pv_send_ipi"), (12, "kvm_poll_control"), (13, "kvm_pv_sched_yield"),
        (14, "kvm_async_pf_int"), (15, "kvm_msi_ext_dest_id"), (16, "kvm_hc_map_gpa_range"),
        (17, "kvm_migration_control"), (24, "kvm_clocksource_stable"),
    ]),
    word(0x8000_0001, 0, Ecx, &[
        (0, "lahf_lm"), (1, "cmp_legacy"), (2, "svm"), (3, "extapic"), (4, "cr8_legacy"), (5, "abm"), (6, "sse4a"),
        (7, "misalignsse"), (8, "3dnowprefetch"), (9, "osvw"), (10, "ibs"), (11, "xop"), (12, "skinit"), (13, "wdt"),
        (15, "lwp"), (16, "fma4"), (17, "tce"), (19, "nodeid_msr"), (21, "tbm"), (22, "topoext"), (23, "perfctr_core"),
        (24, "perfctr_nb"), (26, "bpext"), (27, "ptsc"), (28, "perfctr_llc"), (29, "monitorx"), (30, "addr_mask_ext"),
    ]),
    word(0x8000_0001, 0, Edx, &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"),
        (8, "cmpxchg8b"), (9, "apic"), (11, "syscall"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"),
        (16, "pat"), (17, "pse36"), (19, "mp"), (20, "nx"), (22, "mmxext"), (23, "mmx"), (24, "fxsr"), (25, "fxsr_opt"),
        (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm"), (30, "3dnowext"), (31, "3dnow"),
    ]),
    word(0x8000_0007, 0, Edx, &[
        (0, "ts"), (1, "fid"), (2, "vid"), (3, "ttp"), (4, "tm"), (6, "100mhzsteps"), (7, "hwpstate"),
        (8, "invariant_tsc"), (9, "cpb"), (10, "efffreq_ro"), (11, "proc_feedback"), (12, "proc_power"),
        (15, "fast_cppc"),
    ]),
    word(0x8000_0008, 0, Ebx, &[
        (0, "clzero"), (1, "irperf"), (2, "xsaveerptr"), (3, "invlpgb"), (4, "rdpru"), (6, "mbe"), (8, "mcommit"),
        (9, "wbnoinvd"), (12, "ibpb"), (13, "int_wbinvd"), (14, "ibrs"), (15, "stibp"), (16, "ibrs_always_on"),
        (17, "stibp_always_on"), (18, "ibrs_preferred"), (19, "ibrs_same_mode"), (20, "efer_lmsle_unsupported"),
        (21, "invlpgb_nested"), (23, "ppin"), (24, "ssbd"), (25, "virt_ssbd"), (26, "ssb_no"), (27, "cppc"), (28, "psfd"),
        (29, "btc_no"), (30, "ibpb_ret"), (31, "brs"),
    ]),
    word(0x8000_000a, 0, Edx, &[
        (0, "npt"), (1, "lbrv"), (2, "svm_lock"), (3, "nrip_save"), (4, "tsc_scale"), (5, "vmcb_clean"),
        (6, "flush_by_asid"), (7, "decode_assists"), (8, "pmc_virt"), (10, "pause_filter"), (12, "pause_filter_threshold"),
        (13, "avic"), (15, "v_vmsave_vmload"), (16, "vgif"), (17, "gmet"), (18, "x2avic"), (19, "sss_check"),
        (20, "v_spec_ctrl"), (21, "rogpt"), (23, "host_mce_override"), (24, "tlbsync"), (25, "vnmi"), (26, "ibs_virt"),
        (27, "ext_lvt_offset_fault_change"), (28, "svme_addr_chk"), (29, "bus_lock_threshold"), (30, "idle_hlt"),
    ]),
    word(0x8000_0021, 0, Eax, &[
        (0, "no_nested_data_bp"), (1, "fs_gs_base_non_serializing"), (2, "lfence_serializing"), (3, "smm_page_cfg_lock"),
        (5, "verw_clear"), (6, "null_selector_clears_base"), (7, "upper_address_ignore"), (8, "autoibrs"),
        (9, "no_smm_ctl_msr"), (10, "fsrs_amd"), (11, "fsrc_amd"), (13, "prefetch_ctl_msr"), (17, "cpuid_user_dis"),
        (18, "epsf"), (22, "workload_class"), (24, "eraps"), (27, "sbpb"), (28, "ibpb_brtype"), (29, "srso_no"),
        (30, "srso_user_kernel_no"), (31, "srso_msr_fix"),
    ]),
    word(0x8000_0021, 0, Ecx, &[(1, "tsa_sq_no"), (2, "tsa_l1_no")]),
];

/// First index, how many alike, name.
#[rustfmt::skip]
const MSRS: &[(u32, u32, &str)] = &[
    (0x10, 1, "TSC"), (0x1b, 1, "APIC_BASE"), (0x3b, 1, "TSC_ADJUST"), (0x48, 1, "SPEC_CTRL"), (0x49, 1, "PRED_CMD"),
    (0x8b, 1, "PATCH_LEVEL"), (0xfe, 1, "MTRRcap"), (0x10a, 1, "ARCH_CAPABILITIES"), (0x174, 1, "SYSENTER_CS"),
    (0x175, 1, "SYSENTER_ESP"), (0x176, 1, "SYSENTER_EIP"), (0x179, 1, "MCG_CAP"), (0x17a, 1, "MCG_STATUS"),
    (0x1d9, 1, "DBGCTL"), (0x1db, 1, "BR_FROM"), (0x1dc, 1, "BR_TO"), (0x1dd, 1, "LASTEXCPFROM"),
    (0x1de, 1, "LASTEXCPTO"), (0x200, 16, "MTRRphys"), (0x250, 1, "MTRRfix64K_00000"), (0x258, 2, "MTRRfix16K"),
    (0x268, 8, "MTRRfix4K"), (0x277, 1, "PAT"), (0x2ff, 1, "MTRRdefType"), (0x6e0, 1, "TSC_DEADLINE"),
    (0x800, 0x100, "X2APIC"), (0xda0, 1, "XSS"), (0x4b56_4d00, 1, "KVM_WALL_CLOCK_NEW"),
    (0x4b56_4d01, 1, "KVM_SYSTEM_TIME_NEW"), (0x4b56_4d02, 1, "KVM_ASYNC_PF_EN"), (0x4b56_4d03, 1, "KVM_STEAL_TIME"),
    (0x4b56_4d04, 1, "KVM_PV_EOI_EN"), (0x4b56_4d05, 1, "KVM_POLL_CONTROL"), (0xc000_0080, 1, "EFER"),
    (0xc000_0081, 1, "STAR"), (0xc000_0082, 1, "LSTAR"), (0xc000_0083, 1, "CSTAR"), (0xc000_0084, 1, "SFMASK"),
    (0xc000_0100, 1, "FS_BASE"), (0xc000_0101, 1, "GS_BASE"), (0xc000_0102, 1, "KERNEL_GS_BASE"),
    (0xc000_0103, 1, "TSC_AUX"), (0xc000_0104, 1, "TSC_RATIO"), (0xc000_0108, 1, "PREFETCH_CTL"),
    (0xc001_0010, 1, "SYSCFG"), (0xc001_0015, 1, "HWCR"), (0xc001_001a, 1, "TOP_MEM"), (0xc001_001d, 1, "TOM2"),
    (0xc001_001f, 1, "NB_CFG"), (0xc001_0055, 1, "INT_PENDING"), (0xc001_0114, 1, "VM_CR"),
    (0xc001_0117, 1, "VM_HSAVE_PA"), (0xc001_011f, 1, "VIRT_SPEC_CTRL"), (0xc001_1020, 1, "LS_CFG"),
    (0xc001_1022, 1, "DC_CFG"), (0xc001_1029, 1, "DE_CFG"),
];

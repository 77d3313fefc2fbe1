//! #VMEXIT codes (APM vol. 2 appendix C) and the words that come with them.
//!
//! EXITCODE is 64 bits wide: INVALID is all ones, never a 32-bit -1. Codes here are numbers with names; which one a
//! processor reports is its own business.

use crate::vmcb::bits::{Bits, NamedBits};

/// A value of EXITCODE.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExitCode(pub u64);

impl ExitCode {
    /// Read of control register `number`.
    pub const fn cr_read(number: u8) -> Self {
        Self((number & 15) as u64)
    }

    /// Write of control register `number`.
    pub const fn cr_write(number: u8) -> Self {
        Self(0x10 + (number & 15) as u64)
    }

    /// Read of debug register `number`.
    pub const fn dr_read(number: u8) -> Self {
        Self(0x20 + (number & 15) as u64)
    }

    /// Write of debug register `number`.
    pub const fn dr_write(number: u8) -> Self {
        Self(0x30 + (number & 15) as u64)
    }

    /// Exception `vector`.
    pub const fn exception(vector: u8) -> Self {
        Self(0x40 + (vector & 31) as u64)
    }

    /// Trap after a write of control register `number`.
    pub const fn cr_write_trap(number: u8) -> Self {
        Self(0x90 + (number & 15) as u64)
    }

    /// The manual's name without the prefix `VMEXIT_`; `None` for a code that no manual knows.
    pub fn name(self) -> Option<String> {
        Some(match self.0 {
            code @ 0x00..=0x0f => format!("CR{code}_READ"),
            code @ 0x10..=0x1f => format!("CR{}_WRITE", code - 0x10),
            code @ 0x20..=0x2f => format!("DR{}_READ", code - 0x20),
            code @ 0x30..=0x3f => format!("DR{}_WRITE", code - 0x30),
            code @ 0x40..=0x5f => format!("EXCP{}", code - 0x40),
            code @ 0x90..=0x9f => format!("CR{}_WRITE_TRAP", code - 0x90),
            _ => NAMED.iter().find(|(code, _)| *code == self).map(|(_, name)| (*name).to_owned())?,
        })
    }
}

impl std::fmt::Display for ExitCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.name() {
            Some(name) => f.write_str(&name),
            None => write!(f, "{:#x}", self.0),
        }
    }
}

impl std::fmt::Debug for ExitCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ExitCode({self})")
    }
}

macro_rules! exits {
    ($($value:literal $name:ident $doc:literal;)*) => {
        impl ExitCode {
            $(
                #[doc = $doc]
                pub const $name: ExitCode = ExitCode($value);
            )*
        }

        /// Codes with a name of their own; the numbered families are not listed.
        pub const NAMED: &[(ExitCode, &str)] = &[$((ExitCode::$name, stringify!($name)),)*];
    };
}

exits! {
    0x60 INTR "Physical maskable interrupt.";
    0x61 NMI "Physical NMI.";
    0x62 SMI "Physical SMI.";
    0x63 INIT "Physical INIT.";
    0x64 VINTR "The guest could take a virtual interrupt.";
    0x65 CR0_SEL_WRITE "CR0 write that changed more than TS and MP.";
    0x66 IDTR_READ "SIDT.";
    0x67 GDTR_READ "SGDT.";
    0x68 LDTR_READ "SLDT.";
    0x69 TR_READ "STR.";
    0x6a IDTR_WRITE "LIDT.";
    0x6b GDTR_WRITE "LGDT.";
    0x6c LDTR_WRITE "LLDT.";
    0x6d TR_WRITE "LTR.";
    0x6e RDTSC "RDTSC.";
    0x6f RDPMC "RDPMC.";
    0x70 PUSHF "PUSHF.";
    0x71 POPF "POPF.";
    0x72 CPUID "CPUID.";
    0x73 RSM "RSM.";
    0x74 IRET "IRET.";
    0x75 SWINT "INTn.";
    0x76 INVD "INVD.";
    0x77 PAUSE "PAUSE.";
    0x78 HLT "HLT.";
    0x79 INVLPG "INVLPG.";
    0x7a INVLPGA "INVLPGA.";
    0x7b IOIO "IN or OUT; EXITINFO1 is an [`IoInfo`], EXITINFO2 the next RIP.";
    0x7c MSR "RDMSR (EXITINFO1 = 0) or WRMSR (EXITINFO1 = 1).";
    0x7d TASK_SWITCH "Task switch.";
    0x7e FERR_FREEZE "Legacy FERR freeze.";
    0x7f SHUTDOWN "Shutdown: triple fault.";
    0x80 VMRUN "VMRUN.";
    0x81 VMMCALL "VMMCALL.";
    0x82 VMLOAD "VMLOAD.";
    0x83 VMSAVE "VMSAVE.";
    0x84 STGI "STGI.";
    0x85 CLGI "CLGI.";
    0x86 SKINIT "SKINIT.";
    0x87 RDTSCP "RDTSCP.";
    0x88 ICEBP "ICEBP.";
    0x89 WBINVD "WBINVD or WBNOINVD.";
    0x8a MONITOR "MONITOR or MONITORX.";
    0x8b MWAIT "MWAIT or MWAITX.";
    0x8c MWAIT_ARMED "MWAIT or MWAITX with the monitor armed.";
    0x8d XSETBV "XSETBV.";
    0x8e RDPRU "RDPRU.";
    0x8f EFER_WRITE_TRAP "Trap after a write of EFER.";
    0xa0 INVLPGB "INVLPGB.";
    0xa1 INVLPGB_ILLEGAL "INVLPGB with illegal arguments.";
    0xa2 INVPCID "INVPCID.";
    0xa3 MCOMMIT "MCOMMIT.";
    0xa4 TLBSYNC "TLBSYNC.";
    0xa5 BUSLOCK "Bus lock threshold reached.";
    0xa6 IDLE_HLT "HLT with nothing pending.";
    0x400 NPF "Nested page fault; EXITINFO1 is its error code, EXITINFO2 the guest-physical address.";
    0x401 AVIC_INCOMPLETE_IPI "AVIC: an IPI could not be delivered.";
    0x402 AVIC_NOACCEL "AVIC: access that is not accelerated.";
    0x403 VMGEXIT "VMGEXIT of an SEV-ES guest.";
    0xf000_0000 SW "Reserved for use by software.";
    0xffff_ffff_ffff_ffff INVALID "Illegal guest state in the VMCB.";
    0xffff_ffff_ffff_fffe BUSY "The VMSA is in use.";
    0xffff_ffff_ffff_fffd IDLE_REQUIRED "The sibling thread is not idle.";
    0xffff_ffff_ffff_fffc INVALID_PMC "Illegal performance counter state.";
}

/// EXITINFO1 of #NPF (APM2 15.25.6): a page-fault error code and where the walk failed.
pub mod npf {
    use super::{Bits, NamedBits};

    /// Bit 0: the nested page was present; clear: it was not.
    pub const PRESENT: Bits = Bits::bit(0);
    /// Bit 1: a write.
    pub const WRITE: Bits = Bits::bit(1);
    /// Bit 2: user access; always set, because nested tables are walked as user.
    pub const USER: Bits = Bits::bit(2);
    /// Bit 3: a reserved bit was set in a nested entry.
    pub const RESERVED: Bits = Bits::bit(3);
    /// Bit 4: an instruction fetch.
    pub const FETCH: Bits = Bits::bit(4);
    /// Bit 6: the guest page is a shadow stack.
    pub const SHADOW_STACK: Bits = Bits::bit(6);
    /// Bit 31: RMP violation (SEV-SNP).
    pub const RMP: Bits = Bits::bit(31);
    /// Bit 32: translating the final guest-physical address.
    pub const FINAL: Bits = Bits::bit(32);
    /// Bit 33: translating an address of a guest page table.
    pub const GUEST_TABLE: Bits = Bits::bit(33);
    /// Bit 37: supervisor shadow-stack page.
    pub const SUPERVISOR_SHADOW_STACK: Bits = Bits::bit(37);

    /// All of them by name.
    pub const BITS: &[NamedBits] = &[
        NamedBits::new("P", PRESENT),
        NamedBits::new("RW", WRITE),
        NamedBits::new("US", USER),
        NamedBits::new("RSV", RESERVED),
        NamedBits::new("ID", FETCH),
        NamedBits::new("SS", SHADOW_STACK),
        NamedBits::new("RMP", RMP),
        NamedBits::new("FINAL", FINAL),
        NamedBits::new("GUEST_TABLE", GUEST_TABLE),
        NamedBits::new("SSS", SUPERVISOR_SHADOW_STACK),
    ];
}

/// EXITINFO1 of IOIO (APM2 15.10.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IoInfo {
    /// IN, not OUT.
    pub input: bool,
    /// INS or OUTS.
    pub string: bool,
    /// With a REP prefix.
    pub rep: bool,
    /// Operand bytes: 1, 2 or 4.
    pub size: u8,
    /// Address bytes: 2, 4 or 8.
    pub address_size: u8,
    /// Effective segment of INS/OUTS, in encoding order.
    pub segment: u8,
    /// Port.
    pub port: u16,
}

/// IOIO EXITINFO1 bit 0: IN.
pub const IO_TYPE: Bits = Bits::bit(0);
/// Bit 2: string form.
pub const IO_STRING: Bits = Bits::bit(2);
/// Bit 3: REP.
pub const IO_REP: Bits = Bits::bit(3);
/// Bits 6:4: operand size, one bit each for 1, 2 and 4 bytes.
pub const IO_SIZE: Bits = Bits::range(6, 4);
/// Bits 9:7: address size, one bit each for 16, 32 and 64 bits.
pub const IO_ADDRESS: Bits = Bits::range(9, 7);
/// Bits 12:10: segment.
pub const IO_SEGMENT: Bits = Bits::range(12, 10);
/// Bits 31:16: port.
pub const IO_PORT: Bits = Bits::range(31, 16);

/// IOIO EXITINFO1 by name.
pub const IO_BITS: &[NamedBits] = &[
    NamedBits::new("IN", IO_TYPE),
    NamedBits::new("STR", IO_STRING),
    NamedBits::new("REP", IO_REP),
    NamedBits::new("SZ", IO_SIZE),
    NamedBits::new("A", IO_ADDRESS),
    NamedBits::new("SEG", IO_SEGMENT),
    NamedBits::new("PORT", IO_PORT),
];

impl IoInfo {
    /// The word that reports this access.
    pub const fn encode(&self) -> u64 {
        let mut word = IO_TYPE.with(0, self.input as u64);
        word = IO_STRING.with(word, self.string as u64);
        word = IO_REP.with(word, self.rep as u64);
        word = IO_SIZE.with(word, self.size as u64);
        word = IO_ADDRESS.with(word, (self.address_size >> 1) as u64);
        word = IO_SEGMENT.with(word, self.segment as u64);
        IO_PORT.with(word, self.port as u64)
    }

    /// From EXITINFO1; `None` if a size is not exactly one of the legal ones.
    pub const fn decode(word: u64) -> Option<Self> {
        let (size, address) = (IO_SIZE.get(word) as u8, IO_ADDRESS.get(word) as u8);
        if !size.is_power_of_two() || !address.is_power_of_two() {
            return None;
        }
        Some(Self {
            input: IO_TYPE.is_set(word),
            string: IO_STRING.is_set(word),
            rep: IO_REP.is_set(word),
            size,
            address_size: address << 1,
            segment: IO_SEGMENT.get(word) as u8,
            port: IO_PORT.get(word) as u16,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_info_round_trips() {
        for (size, address_size) in [(1, 2), (2, 4), (4, 8)] {
            let io = IoInfo { input: true, string: true, rep: false, size, address_size, segment: 3, port: 0x3f8 };
            assert_eq!(IoInfo::decode(io.encode()), Some(io));
        }
        assert_eq!(IoInfo::decode(0), None);
        // OUT DX, AL with 64-bit addresses, as hardware reports it.
        let out = IoInfo { input: false, string: false, rep: false, size: 1, address_size: 8, segment: 0, port: 0x80 };
        assert_eq!(out.encode(), 0x0080_0210);
    }

    #[test]
    fn every_code_has_one_name() {
        for (index, (code, name)) in NAMED.iter().enumerate() {
            assert_eq!(code.name().as_deref(), Some(*name));
            assert!(
                NAMED[..index].iter().all(|(other, _)| other < code || code.0 > u64::MAX - 4),
                "{name} out of order"
            );
        }
        assert_eq!(ExitCode::cr_write(8).to_string(), "CR8_WRITE");
        assert_eq!(ExitCode::exception(14).to_string(), "EXCP14");
        assert_eq!(ExitCode(0xbeef).to_string(), "0xbeef");
    }
}

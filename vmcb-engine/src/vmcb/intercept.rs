//! The six intercept words, 000h-017h: every bit by name (APM vol. 2 table B-1, section 15.9).
//!
//! One table gives enum, name and position; what an intercept does is the processor's business.

/// One interceptable event: its word (0..6) in the high byte, its bit in the low byte.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Intercept(u16);

impl Intercept {
    const fn at(word: u16, bit: u16) -> Self {
        assert!(word < 6 && bit < 32);
        Self((word << 8) | bit)
    }

    /// Reads of control register `number` (0..16), word 0 bits 15:0.
    pub const fn cr_read(number: u8) -> Self {
        Self::at(0, (number & 15) as u16)
    }

    /// Writes of control register `number` (0..16), word 0 bits 31:16.
    pub const fn cr_write(number: u8) -> Self {
        Self::at(0, 16 + (number & 15) as u16)
    }

    /// Reads of debug register `number` (0..16), word 1 bits 15:0.
    pub const fn dr_read(number: u8) -> Self {
        Self::at(1, (number & 15) as u16)
    }

    /// Writes of debug register `number` (0..16), word 1 bits 31:16.
    pub const fn dr_write(number: u8) -> Self {
        Self::at(1, 16 + (number & 15) as u16)
    }

    /// Exception `vector` (0..32), word 2.
    pub const fn exception(vector: u8) -> Self {
        Self::at(2, (vector & 31) as u16)
    }

    /// Trap after a write of control register `number` (0..16), word 4 bits 31:16.
    pub const fn cr_write_trap(number: u8) -> Self {
        Self::at(4, 16 + (number & 15) as u16)
    }

    /// Any bit by position; `None` outside of the six words.
    pub const fn from_position(word: usize, bit: u32) -> Option<Self> {
        if word < 6 && bit < 32 { Some(Self::at(word as u16, bit as u16)) } else { None }
    }

    /// Which of the six words.
    pub const fn word(self) -> usize {
        (self.0 >> 8) as usize
    }

    /// Which bit of the word.
    pub const fn bit(self) -> u32 {
        (self.0 & 31) as u32
    }

    /// The bit in place.
    pub const fn mask(self) -> u32 {
        1 << self.bit()
    }

    /// The manual's name; bits without one are `WORDw.BITb`.
    pub fn name(self) -> String {
        match (self.word(), self.bit()) {
            (0, bit @ 0..16) => format!("CR{bit}_READ"),
            (0, bit) => format!("CR{}_WRITE", bit - 16),
            (1, bit @ 0..16) => format!("DR{bit}_READ"),
            (1, bit) => format!("DR{}_WRITE", bit - 16),
            (2, bit) => format!("EXCP{bit}"),
            (4, bit @ 16..32) => format!("CR{}_WRITE_TRAP", bit - 16),
            (word, bit) => match NAMED.iter().find(|(which, _)| *which == self) {
                Some((_, name)) => (*name).to_owned(),
                None => format!("WORD{word}.BIT{bit}"),
            },
        }
    }
}

impl std::fmt::Debug for Intercept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

macro_rules! intercepts {
    ($($word:literal $bit:literal $name:ident $doc:literal;)*) => {
        impl Intercept {
            $(
                #[doc = $doc]
                pub const $name: Intercept = Intercept::at($word, $bit);
            )*
        }

        /// The bits with a fixed name: words 3, 4 (low half) and 5.
        pub const NAMED: &[(Intercept, &str)] = &[$((Intercept::$name, stringify!($name)),)*];
    };
}

intercepts! {
    3 0 INTR "Physical maskable interrupt.";
    3 1 NMI "Physical NMI.";
    3 2 SMI "Physical SMI.";
    3 3 INIT "Physical INIT.";
    3 4 VINTR "Virtual interrupt: the guest could take one now.";
    3 5 CR0_SEL_WRITE "CR0 writes that change bits other than TS and MP.";
    3 6 IDTR_READ "SIDT.";
    3 7 GDTR_READ "SGDT.";
    3 8 LDTR_READ "SLDT.";
    3 9 TR_READ "STR.";
    3 10 IDTR_WRITE "LIDT.";
    3 11 GDTR_WRITE "LGDT.";
    3 12 LDTR_WRITE "LLDT.";
    3 13 TR_WRITE "LTR.";
    3 14 RDTSC "RDTSC.";
    3 15 RDPMC "RDPMC.";
    3 16 PUSHF "PUSHF.";
    3 17 POPF "POPF.";
    3 18 CPUID "CPUID.";
    3 19 RSM "RSM.";
    3 20 IRET "IRET.";
    3 21 INTN "INTn.";
    3 22 INVD "INVD.";
    3 23 PAUSE "PAUSE, counted by the pause filter.";
    3 24 HLT "HLT.";
    3 25 INVLPG "INVLPG.";
    3 26 INVLPGA "INVLPGA.";
    3 27 IOIO_PROT "IN and OUT as the IOPM says.";
    3 28 MSR_PROT "RDMSR and WRMSR as the MSRPM says.";
    3 29 TASK_SWITCH "Task switch.";
    3 30 FERR_FREEZE "Processor freeze during legacy FERR handling.";
    3 31 SHUTDOWN "Shutdown: triple fault.";
    4 0 VMRUN "VMRUN; VMRUN itself demands this bit.";
    4 1 VMMCALL "VMMCALL.";
    4 2 VMLOAD "VMLOAD.";
    4 3 VMSAVE "VMSAVE.";
    4 4 STGI "STGI.";
    4 5 CLGI "CLGI.";
    4 6 SKINIT "SKINIT.";
    4 7 RDTSCP "RDTSCP.";
    4 8 ICEBP "ICEBP.";
    4 9 WBINVD "WBINVD and WBNOINVD.";
    4 10 MONITOR "MONITOR and MONITORX.";
    4 11 MWAIT "MWAIT and MWAITX, always.";
    4 12 MWAIT_ARMED "MWAIT and MWAITX when the monitor is armed.";
    4 13 XSETBV "XSETBV.";
    4 14 RDPRU "RDPRU.";
    4 15 EFER_WRITE_TRAP "Trap after a write of EFER.";
    5 0 INVLPGB "Every INVLPGB.";
    5 1 INVLPGB_ILLEGAL "INVLPGB with illegal arguments.";
    5 2 INVPCID "INVPCID.";
    5 3 MCOMMIT "MCOMMIT.";
    5 4 TLBSYNC "TLBSYNC.";
    5 5 BUS_LOCK "Bus lock threshold reached.";
    5 6 IDLE_HLT "HLT with no virtual interrupt or NMI pending.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_and_names_agree_with_the_exit_codes() {
        // Words 3 and 4 were laid out so that exit code = 60h + bit, 80h + bit (APM2 appendix C).
        for (which, _) in NAMED.iter().filter(|(which, _)| which.word() == 3) {
            let code = crate::vmcb::exit::ExitCode(0x60 + u64::from(which.bit()));
            assert!(code.name().is_some(), "{which:?}");
        }
        assert_eq!(Intercept::MSR_PROT.mask(), 1 << 28);
        assert_eq!(Intercept::cr_write(8).name(), "CR8_WRITE");
        assert_eq!(Intercept::cr_write_trap(0).name(), "CR0_WRITE_TRAP");
        assert_eq!(Intercept::from_position(5, 30).map(Intercept::name).as_deref(), Some("WORD5.BIT30"));
        assert_eq!(Intercept::from_position(6, 0), None);
    }
}

//! Bits of the control registers, EFER, RFLAGS and the debug registers, by the manual's names (APM2 ch. 3, 13).
//!
//! Constants for code, tables for people. Which bits a guest may set depends on the CPU model and is not known here.

use crate::vmcb::bits::{Bits, NamedBits};

macro_rules! register_bits {
    ($(#[$meta:meta])* $module:ident { $($name:ident $bit:literal;)* }) => {
        $(#[$meta])*
        pub mod $module {
            use super::{Bits, NamedBits};
            $(
                #[doc = concat!("Bit ", stringify!($bit), ".")]
                pub const $name: u64 = 1 << $bit;
            )*
            /// All of them by name.
            pub const BITS: &[NamedBits] = &[$(NamedBits::new(stringify!($name), Bits::bit($bit)),)*];
            /// All of them.
            pub const ALL: u64 = 0 $(| $name)*;
        }
    };
}

register_bits! {
    /// CR0 (APM2 3.1.1).
    cr0 { PE 0; MP 1; EM 2; TS 3; ET 4; NE 5; WP 16; AM 18; NW 29; CD 30; PG 31; }
}

register_bits! {
    /// CR4 (APM2 3.1.3).
    cr4 {
        VME 0; PVI 1; TSD 2; DE 3; PSE 4; PAE 5; MCE 6; PGE 7; PCE 8; OSFXSR 9; OSXMMEXCPT 10; UMIP 11; LA57 12;
        FSGSBASE 16; PCIDE 17; OSXSAVE 18; SMEP 20; SMAP 21; PKE 22; CET 23;
    }
}

register_bits! {
    /// EFER (APM2 3.1.7).
    efer {
        SCE 0; LME 8; LMA 10; NXE 11; SVME 12; LMSLE 13; FFXSR 14; TCE 15; MCOMMIT 17; INTWB 18; UAIE 20; AIBRSE 21;
    }
}

register_bits! {
    /// RFLAGS (APM2 3.1.6); IOPL is [`IOPL`].
    rflags { CF 0; PF 2; AF 4; ZF 6; SF 7; TF 8; IF 9; DF 10; OF 11; NT 14; RF 16; VM 17; AC 18; VIF 19; VIP 20; ID 21; }
}

register_bits! {
    /// DR6 (APM2 13.1.1.4).
    dr6 { B0 0; B1 1; B2 2; B3 3; BLD 11; BD 13; BS 14; BT 15; }
}

register_bits! {
    /// DR7 (APM2 13.1.1.5), enables only.
    dr7 { L0 0; G0 1; L1 2; G1 3; L2 4; G2 5; L3 6; G3 7; LE 8; GE 9; GD 13; }
}

register_bits! {
    /// DebugCtl (APM2 13.1.1.6).
    dbgctl { LBR 0; BTF 1; PB0 2; PB1 3; PB2 4; PB3 5; BLCKDB 7; }
}

/// RFLAGS bits 13:12.
pub const IOPL: Bits = Bits::range(13, 12);

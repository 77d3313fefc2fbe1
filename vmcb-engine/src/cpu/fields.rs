//! The one table of architectural state, and everything that is derived from it.
//!
//! A row names a field of [`CpuState`], its type, its reset value (APM2 14.1.3) and the fields of `CpuStateV1` that carry
//! it. The macro makes from the rows: the struct, reset, encode, decode, and the leaves that digest and compare read.
//! Both directions of the codec name every wire field without `..`: a field that is added to the message or to the
//! table on one side only does not compile.
//!
//! This file refuses to know how a value travels (`stored`) and what a processor does with it.

use std::collections::BTreeMap;

use proto::v1::CpuStateV1;

use crate::cpu::fpu::FxState;
use crate::cpu::stored::{DecodeError, Leaf, Stored};
use crate::vmcb::{Event, Segment};

/// What a vCPU is doing (KVM's mp_state words).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u32)]
pub enum RunState {
    /// Executes instructions.
    #[default]
    Runnable = 0,
    /// An application processor that waits for INIT.
    Uninitialised = 1,
    /// INIT received, waits for SIPI.
    InitReceived = 2,
    /// HLT, waits for an interrupt.
    Halted = 3,
}

macro_rules! cpu_state {
    ($($(#[$doc:meta])* $field:ident: $type:ty = $reset:expr => ($($wire:ident),+);)*) => {
        /// Architectural state of one vCPU, the same whichever engine runs it.
        ///
        /// Each thing has one home: FS and GS base live in their segments, EFER in `efer`, TPR in `cr8`; `msrs`
        /// holds the rest of the contract's MSRs.
        #[derive(Clone, PartialEq, Eq, Debug)]
        pub struct CpuState {
            $($(#[$doc])* pub $field: $type,)*
        }

        impl CpuState {
            /// Names of the rows, in order.
            pub const FIELDS: &'static [&'static str] = &[$(stringify!($field)),*];

            /// State after RESET (APM2 table 14-1). What depends on the CPU model (RDX, MSRs) is left zero and absent:
            /// see `capability`.
            pub fn reset() -> CpuState {
                CpuState { $($field: $reset,)* }
            }

            /// The saved form.
            pub fn encode(&self) -> CpuStateV1 {
                $(let ($($wire,)+) = self.$field.store();)*
                CpuStateV1 { $($($wire,)+)* }
            }

            /// From the saved form, which may hold anything; the error names the field.
            pub fn decode(state: CpuStateV1) -> Result<CpuState, DecodeError> {
                let CpuStateV1 { $($($wire,)+)* } = state;
                $(let $field = Stored::load(stringify!($field), ($($wire,)+))?;)*
                Ok(CpuState { $($field,)* })
            }

            /// Visits every leaf of the state: name and value, in a fixed order.
            pub fn leaves(&self, visit: &mut dyn FnMut(Leaf)) {
                $(Stored::leaves(&self.$field, stringify!($field), visit);)*
            }
        }
    };
}

cpu_state! {
    /// rax rcx rdx rbx rsp rbp rsi rdi r8..r15, in encoding order.
    gprs: [u64; 16] = [0; 16] => (gprs);
    /// Instruction pointer.
    rip: u64 = 0xfff0 => (rip);
    /// Flags; bit 1 is always set.
    rflags: u64 = 2 => (rflags);
    /// ES.
    es: Segment = Segment::new(0, 0x93, 0xffff, 0) => (es);
    /// CS.
    cs: Segment = Segment::new(0xf000, 0x9b, 0xffff, 0xffff_0000) => (cs);
    /// SS.
    ss: Segment = Segment::new(0, 0x93, 0xffff, 0) => (ss);
    /// DS.
    ds: Segment = Segment::new(0, 0x93, 0xffff, 0) => (ds);
    /// FS; its base is MSR C000_0100h.
    fs: Segment = Segment::new(0, 0x93, 0xffff, 0) => (fs);
    /// GS; its base is MSR C000_0101h.
    gs: Segment = Segment::new(0, 0x93, 0xffff, 0) => (gs);
    /// GDTR: base and limit only.
    gdtr: Segment = Segment::new(0, 0, 0xffff, 0) => (gdtr);
    /// LDTR.
    ldtr: Segment = Segment::new(0, 0x82, 0xffff, 0) => (ldtr);
    /// IDTR: base and limit only.
    idtr: Segment = Segment::new(0, 0, 0xffff, 0) => (idtr);
    /// TR.
    tr: Segment = Segment::new(0, 0x8b, 0xffff, 0) => (tr);
    /// Current privilege level, 0..=3.
    cpl: u8 = 0 => (cpl);
    /// CR0.
    cr0: u64 = 0x6000_0010 => (cr0);
    /// CR2.
    cr2: u64 = 0 => (cr2);
    /// CR3.
    cr3: u64 = 0 => (cr3);
    /// CR4.
    cr4: u64 = 0 => (cr4);
    /// CR8: the task priority, 0..=15.
    cr8: u64 = 0 => (cr8);
    /// EFER.
    efer: u64 = 0 => (efer);
    /// XCR0.
    xcr0: u64 = 1 => (xcr0);
    /// dr0 dr1 dr2 dr3 dr6 dr7.
    drs: [u64; 6] = [0, 0, 0, 0, 0xffff_0ff0, 0x400] => (debug);
    /// The contract's MSRs that have no other home, by index.
    msrs: BTreeMap<u32, u64> = BTreeMap::new() => (msrs);
    /// x87, SSE, and later XSAVE components.
    fpu: Box<FxState> = Box::new(FxState::reset()) => (xsave, mxcsr);
    /// The event that the next entry delivers first; [`Event::NONE`] if none.
    event_injection: Event = Event::NONE => (event_injection);
    /// STI or a load of SS inhibits interrupts for one instruction.
    interrupt_shadow: bool = false => (interrupt_shadow);
    /// An NMI handler runs: NMIs wait for IRET.
    nmi_masked: bool = false => (nmi_masked);
    /// An NMI waits.
    nmi_pending: bool = false => (nmi_pending);
    /// Running, halted, or waiting for INIT or SIPI.
    run_state: RunState = RunState::Runnable => (run_state);
    /// What the guest's TSC is ahead of the machine's clock, modulo 2^64.
    tsc_offset: u64 = 0 => (tsc_offset);
}

//! State of one software processor, and the fast paths that touch it: lazy flags, loads and stores through the TLB.
//!
//! A processor is what AMD sells: registers, caches of translations, time counted in retired instructions. It refuses to
//! know devices and hosts: whatever an intercept or a nested page fault hands to its host is in [`Core::exit`].
//!
//! Rule of every instruction: raise before the first architectural write (notes of the engine, A.4). RIP and time are
//! materialised only at the end of a block; inside a block they follow from the operation ([`Op::offset`],
//! [`Op::remaining`]).
#![allow(unsafe_code, reason = "hot path: the TLB's host addresses are dereferenced here and in tlb.rs only")]

use std::sync::Arc;

use super::fpu::Fpu;
use super::op::Op;
use super::svm::exit::SvmExit;
use super::tlb::{Tlb, Word};
use crate::memory::GuestMemory;
use crate::vmcb::segment::Segment;

/// Index of the register that is always 0: "no base", "no index".
pub const ZERO: u8 = 16;
/// Index of the register that holds the RIP of the first instruction of the running block.
pub const RIP_BASE: u8 = 17;
/// Register numbers in APM3 encoding order.
pub const RAX: usize = 0;
/// See [`RAX`].
pub const RCX: usize = 1;
/// See [`RAX`].
pub const RDX: usize = 2;
/// See [`RAX`].
pub const RBX: usize = 3;
/// See [`RAX`].
pub const RSP: usize = 4;
/// See [`RAX`].
pub const RBP: usize = 5;
/// See [`RAX`].
pub const RSI: usize = 6;
/// See [`RAX`].
pub const RDI: usize = 7;

/// Segment numbers in APM3 encoding order; index of [`Core::segments`].
pub const ES: usize = 0;
/// See [`ES`].
pub const CS: usize = 1;
/// See [`ES`].
pub const SS: usize = 2;
/// See [`ES`].
pub const DS: usize = 3;
/// See [`ES`].
pub const FS: usize = 4;
/// See [`ES`].
pub const GS: usize = 5;

/// RFLAGS bits (APM2 3.1.6).
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Always one.
    pub const RESERVED_ONE: u64 = 1 << 1;
    /// Parity.
    pub const PF: u64 = 1 << 2;
    /// Auxiliary carry.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Trap.
    pub const TF: u64 = 1 << 8;
    /// Interrupt.
    pub const IF: u64 = 1 << 9;
    /// Direction.
    pub const DF: u64 = 1 << 10;
    /// Overflow.
    pub const OF: u64 = 1 << 11;
    /// I/O privilege level.
    pub const IOPL: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume.
    pub const RF: u64 = 1 << 16;
    /// Virtual 8086.
    pub const VM: u64 = 1 << 17;
    /// Alignment check / SMAP override.
    pub const AC: u64 = 1 << 18;
    /// Virtual interrupt.
    pub const VIF: u64 = 1 << 19;
    /// Virtual interrupt pending.
    pub const VIP: u64 = 1 << 20;
    /// CPUID can be used.
    pub const ID: u64 = 1 << 21;
    /// The six that arithmetic sets.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Why an instruction did not simply end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Stop {
    /// An exception: [`Core::fault`] says which. RIP stays at the instruction; it does not retire.
    Fault,
    /// A #VMEXIT: [`Core::exit`] says which. RIP stays at the instruction; it does not retire.
    Exit,
    /// Part of a repeated string instruction is done: one tick, RIP stays at the instruction.
    Again,
    /// The instruction is done and retires, RIP is set by it, but the block must end (a trap-like event is pending).
    Done,
}

/// Result of every instruction and memory access.
pub type Step<T = ()> = Result<T, Stop>;

/// An exception on its way to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fault {
    /// Vector.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub code: Option<u32>,
    /// For #PF: the address for CR2.
    pub address: u64,
}

/// Which decoding rules hold: part of the key of every block. Recomputed by `Core::refresh_mode` whenever CS, CR0,
/// EFER, CPL or intercepts change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Mode {
    /// 64-bit mode (EFER.LMA and CS.L).
    pub long: bool,
    /// Default operand and address size is 32 bits (CS.D), else 16. Meaningless in 64-bit mode.
    pub big: bool,
    /// CPL 3.
    pub user: bool,
    /// CR0.PE.
    pub protected: bool,
    key: u64,
}

impl Mode {
    /// The mode as a number above all guest-physical addresses (52 bits): together they are the key of a block.
    #[inline(always)]
    pub fn key(self) -> u64 {
        self.key
    }

    /// A mode whose key is worked out: that is done here, since the key is asked for at every block.
    pub fn new(long: bool, big: bool, user: bool, protected: bool) -> Self {
        let bits = u64::from(long) | u64::from(big) << 1 | u64::from(user) << 2 | u64::from(protected) << 3;
        Self { long, big, user, protected, key: bits << 52 }
    }
}

/// One software processor.
pub struct Core {
    /// rax..r15, then [`ZERO`] and [`RIP_BASE`]; 32 long, so that a masked number is always in range.
    pub gprs: [u64; 32],
    /// Lazy arithmetic flags: see [`Flags`].
    pub flags: Flags,
    /// Instructions that may still retire before the stop point, counted from the start of the running block as if it
    /// were already done.
    pub budget: i64,
    /// Blocks that may still follow one another without a look at the loop. Bounds the stack where LLVM does not turn the
    /// last call of a handler into a jump.
    pub follow: u32,
    /// Offset into the TLB's arrays: 0 for CPL 0-2, `tlb::ENTRIES` for CPL 3. Set by `Core::use_tlb_set`.
    pub tlb_set: usize,
    /// Address of that set's entries: see [`Tlb::base`].
    pub tlb_base: usize,
    /// Translations.
    pub tlb: Box<Tlb>,
    /// RIP between blocks.
    pub rip: u64,
    /// RFLAGS without the arithmetic six.
    pub system_flags: u64,
    /// es cs ss ds fs gs, hidden parts included.
    pub segments: [Segment; 6],
    /// Global descriptor table register.
    pub gdtr: Segment,
    /// Interrupt descriptor table register.
    pub idtr: Segment,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Current privilege level.
    pub cpl: u8,
    /// Decoding rules now.
    pub mode: Mode,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER as the guest sees it (SVME included while a VMCB is loaded).
    pub efer: u64,
    /// DR0-3, DR6, DR7.
    pub debug: [u64; 6],
    /// x87, MMX and SSE state.
    pub fpu: Fpu,
    /// MSRs that the processor itself keeps; see `svm/msr.rs`.
    pub msrs: super::svm::msr::Msrs,
    /// The exception that [`Stop::Fault`] speaks of.
    pub fault: Fault,
    /// The #VMEXIT that [`Stop::Exit`] speaks of.
    pub exit: SvmExit,
    /// Controls of the loaded VMCB, in usable form.
    pub control: super::svm::control::Controls,
    /// After STI, MOV SS, POP SS: no interrupt before the next instruction.
    pub interrupt_shadow: bool,
    /// Alignment is checked now: CPL 3 with CR0.AM and RFLAGS.AC. See `Core::refresh_alignment`.
    pub alignment_checked: bool,
    /// What is pending between two instructions; see deliver.rs.
    pub events: super::deliver::Events,
    /// Nested paging of the loaded guest.
    pub nested: super::svm::nested::Nested,
    /// The host's pages of system-physical memory.
    pub arena: super::svm::physical::Arena,
    /// Control bits that exist: what MOV to CR4 and VMRUN's checks go by.
    pub limits: crate::vmcb::check::Limits,
    /// Other processors run code out of the same RAM: they are told of what this one decodes and overwrites.
    pub shares_memory: bool,
    /// Most operations of a block: [`super::block::OPS_MAX`] or fewer.
    pub block_ops_max: usize,
    /// Pages in which this processor was the first to decode code, since somebody asked.
    pub new_code_pages: Vec<u64>,
    /// What may have been used since somebody asked; nothing is noted before anybody does.
    pub noting: Option<Box<super::noting::Noting>>,
    /// Software on this processor whose guest is loaded.
    pub hosted: Option<Box<super::svm::leave::Hosted>>,
    /// The host's MXCSR gathers the flags that SSE operations raise; see `sse/operand.rs`.
    pub gathers_flags: bool,
    /// Retired instructions at which the running `run_until` stops: retired now = `stop_at - budget` between blocks.
    pub stop_at: u64,
    /// TSC = retired * this + `tsc_base` (offset and idle time folded in).
    pub tsc_per_instruction: u64,
    /// See `tsc_per_instruction`.
    pub tsc_base: u64,
    /// Decoded blocks.
    pub blocks: super::block::Blocks,
    /// Where calls that have not returned yet return to: the block that follows is known to the caller's links.
    pub returns: super::block::Returns,
    /// Set while an instruction is emulated for its host: accesses that are not RAM are recorded or answered here.
    pub mmio: super::svm::mmio::MmioPort,
    /// Breakpoints and watchpoints, if any; see stops.rs.
    pub stops: Option<Box<super::stops::Stopping>>,
    /// Retired instructions and linear address of RIP where a breakpoint was met and need not be met again.
    pub passed: Option<(u64, u64)>,
    /// The same where a repeated instruction goes on.
    pub repeating: Option<(u64, u64)>,
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
}

/// Arithmetic flags in two words, so that most operations store a result and a carry word and compute no flag.
///
/// `result` is the result sign-extended to 64 bits. `aux`: bit 63 CF; bit 62 CF xor OF; bit 3 AF; bit 0 flips SF;
/// bits 15:8 are xored into the byte whose parity is PF.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flags {
    /// See the type.
    pub result: u64,
    /// See the type.
    pub aux: u64,
}

impl Flags {
    /// From the six arithmetic bits of an RFLAGS value.
    #[inline]
    pub fn from_rflags(value: u64) -> Self {
        let bit = |mask: u64| u64::from(value & mask != 0);
        let (cf, of) = (bit(rflags::CF), bit(rflags::OF));
        let aux = cf << 63 | (cf ^ of) << 62 | (1 - bit(rflags::PF)) << 8 | bit(rflags::AF) << 3 | bit(rflags::SF);
        // Low byte 0 has even parity and sign 0: PF and SF come from aux alone.
        Self { result: if value & rflags::ZF != 0 { 0 } else { 0x100 }, aux }
    }

    /// The six arithmetic bits as in RFLAGS.
    #[inline]
    pub fn to_rflags(self) -> u64 {
        u64::from(self.cf())
            | u64::from(self.pf()) << 2
            | u64::from(self.af()) << 4
            | u64::from(self.zf()) << 6
            | u64::from(self.sf()) << 7
            | u64::from(self.of()) << 11
    }

    /// Carry.
    #[inline(always)]
    pub fn cf(self) -> bool {
        self.aux >> 63 != 0
    }

    /// Overflow.
    #[inline(always)]
    pub fn of(self) -> bool {
        (self.aux ^ self.aux << 1) >> 63 != 0
    }

    /// Zero.
    #[inline(always)]
    pub fn zf(self) -> bool {
        self.result == 0
    }

    /// Sign.
    #[inline(always)]
    pub fn sf(self) -> bool {
        self.result >> 63 != self.aux & 1
    }

    /// Parity.
    #[inline(always)]
    pub fn pf(self) -> bool {
        ((self.result ^ self.aux >> 8) as u8).count_ones().is_multiple_of(2)
    }

    /// Auxiliary carry.
    #[inline(always)]
    pub fn af(self) -> bool {
        self.aux & 8 != 0
    }

    /// After AND, OR, XOR, TEST: CF, OF and AF are zero. `result` sign-extended.
    #[inline(always)]
    pub fn logic(result: u64) -> Self {
        Self { result, aux: 0 }
    }

    /// After an addition or subtraction of `bits` bits: `carries` holds the carry (borrow) out of every bit.
    #[inline(always)]
    pub fn arithmetic(result: u64, carries: u64, bits: u32) -> Self {
        Self { result, aux: (carries << (64 - bits)) & (3 << 62) | carries & 8 }
    }

    /// From a sign-extended result (ZF, SF, PF) and the other three.
    #[inline(always)]
    pub fn parts(result: u64, cf: bool, of: bool, af: bool) -> Self {
        let cf = u64::from(cf);
        Self { result, aux: cf << 63 | (cf ^ u64::from(of)) << 62 | u64::from(af) << 3 }
    }

    /// The same flags with another CF (INC, DEC, STC, CLC, CMC, BT...).
    #[inline(always)]
    pub fn with_cf(self, cf: bool) -> Self {
        self.with_cf_of(cf, self.of())
    }

    /// The same flags with another CF and OF (rotations, MUL).
    #[inline(always)]
    pub fn with_cf_of(self, cf: bool, of: bool) -> Self {
        let (cf, of) = (u64::from(cf), u64::from(of));
        Self { result: self.result, aux: self.aux & !(3 << 62) | cf << 63 | (cf ^ of) << 62 }
    }

    /// The same flags with another ZF (BSF, BSR, CMPXCHG8B).
    #[inline(always)]
    pub fn with_zf(self, zf: bool) -> Self {
        let bit = |set: bool| u64::from(set);
        let carries = self.aux & (3 << 62 | 8);
        // As in `from_rflags`: PF and SF come from `aux` alone.
        let result = if zf { 0 } else { 0x100 };
        Self { result, aux: carries | (1 - bit(self.pf())) << 8 | bit(self.sf()) }
    }

    /// ZF given and the other five clear (POPCNT).
    #[inline(always)]
    pub fn only_zf(zf: bool) -> Self {
        Self { result: u64::from(!zf), aux: u64::from(zf) << 8 }
    }

    /// Condition `cc` of Jcc, SETcc, CMOVcc (APM3 1.2.2, low four opcode bits).
    #[inline(always)]
    pub fn condition(self, cc: u8) -> bool {
        let positive = match cc >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        positive != (cc & 1 != 0)
    }
}

/// True if bits 63:47 are all alike (APM2 5.3.1, 48-bit linear addresses).
#[inline(always)]
pub fn canonical(linear: u64) -> bool {
    ((linear as i64) << 16 >> 16) as u64 == linear
}

impl Core {
    /// RFLAGS, whole.
    #[inline]
    pub fn rflags(&self) -> u64 {
        self.system_flags | self.flags.to_rflags() | rflags::RESERVED_ONE
    }

    /// Sets all of RFLAGS. The one function through which POPF, IRET, SYSRET, VMRUN, #VMEXIT, gdb and restore go.
    #[inline]
    pub fn set_rflags(&mut self, value: u64) {
        self.flags = Flags::from_rflags(value);
        let before = self.system_flags;
        self.system_flags = value & !rflags::ARITHMETIC & !rflags::RESERVED_ONE;
        if (before ^ value) & rflags::AC != 0 {
            self.refresh_alignment();
        }
    }

    /// Virtual-8086 mode.
    #[inline(always)]
    pub fn virtual_8086(&self) -> bool {
        self.system_flags & rflags::VM != 0
    }

    /// RIP of the instruction that `op` is.
    #[inline(always)]
    pub fn op_rip(&self, op: &Op) -> u64 {
        self.mask_rip(self.gprs[RIP_BASE as usize].wrapping_add(op.offset.into()))
    }

    /// RIP of the instruction after `op`.
    #[inline(always)]
    pub fn next_rip(&self, op: &Op) -> u64 {
        self.mask_rip(self.gprs[RIP_BASE as usize].wrapping_add(u64::from(op.offset) + u64::from(op.length)))
    }

    /// RIP is 32 bits wide outside 64-bit mode.
    #[inline(always)]
    pub fn mask_rip(&self, rip: u64) -> u64 {
        if self.mode.long { rip } else { rip & 0xffff_ffff }
    }

    /// Instructions retired before `op`, from inside a block.
    #[inline]
    pub fn retired_before(&self, op: &Op) -> u64 {
        self.stop_at.wrapping_sub(self.budget as u64).wrapping_sub(u64::from(op.remaining))
    }

    /// Instructions retired, between blocks.
    #[inline]
    pub fn retired(&self) -> u64 {
        self.stop_at.wrapping_sub(self.budget as u64)
    }

    /// Raises an exception without an error code.
    #[cold]
    pub fn raise<T>(&mut self, vector: u8) -> Step<T> {
        self.fault = Fault { vector, code: None, address: 0 };
        Err(Stop::Fault)
    }

    /// Raises an exception with an error code.
    #[cold]
    pub fn raise_code<T>(&mut self, vector: u8, code: u32) -> Step<T> {
        self.fault = Fault { vector, code: Some(code), address: 0 };
        Err(Stop::Fault)
    }

    /// A non-canonical address on the stack segment is #SS(0), not #GP(0) (APM2 8.2.13). The slow path leaves such an
    /// address in [`Fault::address`].
    #[cold]
    #[inline(never)]
    pub fn blame_stack(&mut self) {
        if self.fault.vector == 13 && !canonical(self.fault.address) {
            self.fault.vector = 12;
        }
    }

    /// #UD.
    #[cold]
    pub fn undefined<T>(&mut self) -> Step<T> {
        self.raise(6)
    }

    /// #GP(0).
    #[cold]
    pub fn general_protection<T>(&mut self) -> Step<T> {
        self.raise_code(13, 0)
    }

    /// Makes the TLB's set for this privilege level the one in use.
    pub fn use_tlb_set(&mut self, set: usize) {
        (self.tlb_set, self.tlb_base) = (set, self.tlb.base(set));
    }

    /// Loads from a linear address if the TLB has its page; `None` has changed nothing.
    #[inline(always)]
    pub fn load_hit<T: Word>(&self, linear: u64) -> Option<T> {
        let entry = Tlb::read_entry(self.tlb_base, linear);
        entry.hits::<T>(linear).then(|| {
            // SAFETY: a tag that matches the page of the access's last byte in the slot of its first byte means that
            // the whole access lies in one mapped page of guest RAM (tlb.rs: entries are made for RAM pages only, and
            // dropped before the mapping could go). T is plain data, any bytes are valid, and the read is unaligned.
            unsafe { entry.host::<T>(linear).read_unaligned() }
        })
    }

    /// [`Core::load_hit`], and the same where loads are noted.
    #[inline(always)]
    pub fn load_known<T: Word>(&mut self, linear: u64) -> Option<T> {
        self.load_hit(linear).or_else(|| {
            let host = self.noted_source(linear, size_of::<T>()).cast::<T>();
            // SAFETY: as in `load_hit`; where it is not null the whole access lies in one page, and it was noted.
            (!host.is_null()).then(|| unsafe { host.read_unaligned() })
        })
    }

    /// Host address for a load of so many bytes, all in one page, that needs no notice or has just been noted.
    #[inline(always)]
    pub fn host_for_load(&mut self, linear: u64, bytes: usize) -> Option<*const u8> {
        let entry = Tlb::read_entry(self.tlb_base, linear);
        if entry.hits::<u8>(linear) {
            return Some(entry.host::<u8>(linear).cast_const());
        }
        let host = self.noted_source(linear, bytes);
        (!host.is_null()).then_some(host)
    }

    /// Stores to a linear address if the TLB has its page; `None` has changed nothing.
    #[inline(always)]
    pub fn store_hit<T: Word>(&mut self, linear: u64, value: T) -> Option<()> {
        let entry = Tlb::write_entry(self.tlb_base, linear);
        entry.hits::<T>(linear).then(|| {
            // SAFETY: as in `load_hit`; write entries exist only for pages that are writable for the guest, stamped in
            // this epoch, dirty in the guest's page table and free of decoded code.
            unsafe { entry.host::<T>(linear).write_unaligned(value) }
        })
    }

    /// Loads from a linear address. Unaligned and page-crossing accesses are legal; #AC is the slow path's business.
    #[inline(always)]
    pub fn load<T: Word>(&mut self, linear: u64) -> Step<T> {
        match self.load_hit(linear) {
            Some(value) => Ok(value),
            None => self.load_slow(linear),
        }
    }

    /// Stores to a linear address.
    #[inline(always)]
    pub fn store<T: Word>(&mut self, linear: u64, value: T) -> Step {
        match self.store_hit(linear, value) {
            Some(()) => Ok(()),
            None => self.store_slow(linear, value),
        }
    }

    /// Host address for a read-modify-write of one value, if the page is in the write table: both halves then cannot
    /// fault. Otherwise `None`, and the caller probes with [`Core::probe_write`] first.
    #[inline(always)]
    pub fn fast_rmw<T: Word>(&mut self, linear: u64) -> Option<*mut T> {
        let entry = Tlb::write_entry(self.tlb_base, linear);
        entry.hits::<T>(linear).then(|| entry.host::<T>(linear))
    }

    /// The same where loads and stores are noted.
    #[inline(always)]
    fn noted_rmw<T: Word>(&mut self, linear: u64) -> Option<*mut T> {
        let host = self.noted_host(linear, size_of::<T>());
        (!host.is_null()).then(|| {
            self.note_load(linear, size_of::<T>());
            host.cast()
        })
    }

    /// Host address for a store of so many bytes, all in one page, that needs no notice or has just been noted.
    #[inline(always)]
    pub fn host_for_store(&mut self, linear: u64, bytes: usize) -> Option<*mut u8> {
        let entry = Tlb::write_entry(self.tlb_base, linear);
        if entry.hits::<u8>(linear) {
            return Some(entry.host(linear));
        }
        let host = self.noted_host(linear, bytes);
        (!host.is_null()).then_some(host)
    }

    /// Loads, applies, stores, if the TLB has the page; `None` has changed nothing.
    #[inline(always)]
    pub fn modify_hit<T: Word, R>(&mut self, linear: u64, f: impl FnOnce(&mut Self, T) -> (T, R)) -> Option<R> {
        let host = self.fast_rmw::<T>(linear)?;
        // SAFETY: as in `store_hit`; the page is readable because it is writable.
        let old = unsafe { host.read_unaligned() };
        let (new, out) = f(self, old);
        // SAFETY: the same address; `f` cannot unmap RAM.
        unsafe { host.write_unaligned(new) };
        Some(out)
    }

    /// Loads, applies, stores; faults are those of a write. `f` returns what to store and what to hand back. Must have no
    /// architectural effect of its own.
    #[inline(always)]
    pub fn modify<T: Word, R>(&mut self, linear: u64, f: impl FnOnce(&mut Self, T) -> (T, R)) -> Step<R> {
        let host = self.fast_rmw::<T>(linear).or_else(|| self.noted_rmw::<T>(linear));
        if let Some(host) = host {
            // SAFETY: as in `store_hit`, also where it was noted; the page is readable because it is writable.
            let old = unsafe { host.read_unaligned() };
            let (new, out) = f(self, old);
            // SAFETY: the same address; `f` cannot unmap RAM.
            unsafe { host.write_unaligned(new) };
            return Ok(out);
        }
        self.probe_write(linear, size_of::<T>())?;
        let old = self.load_slow::<T>(linear)?;
        let (new, out) = f(self, old);
        self.store_slow(linear, new)?;
        Ok(out)
    }
}

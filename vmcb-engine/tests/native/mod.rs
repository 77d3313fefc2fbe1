//! One user-mode instruction on the host's own processor: registers in through a signal frame, one step under TF, and
//! whatever came of it out of the next signal's frame.
//!
//! Scratch memory lies at fixed addresses with nothing mapped around it, so that wrong lengths and wrong addresses fault.
#![allow(unsafe_code, reason = "signal frames and fixed mappings are the whole point")]

use std::ptr::{addr_of_mut, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The page whose end holds the instruction; the page after it is not mapped.
pub const CODE: u64 = 0x1000_0000;
/// Scratch memory.
pub const DATA: u64 = 0x1010_0000;
/// Bytes of scratch memory; the pages around are not mapped.
pub const DATA_BYTES: usize = 4 * 4096;
/// Base of GS.
pub const GS_BASE: u64 = DATA + 0x1800;

/// What goes in and comes out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct State {
    /// rax..r15 in encoding order.
    pub gprs: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// FXSAVE image: 512 bytes.
    pub fxsave: [u64; 64],
}

/// An exception.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Vector.
    pub vector: u8,
    /// CR2 of a page fault, else 0.
    pub address: u64,
}

struct Shared {
    input: State,
    output: State,
    fault: Option<Fault>,
    resume: libc::ucontext_t,
    resume_fp: [u8; 4096],
    /// Go on while RIP stays here: repeated string instructions trap after every element.
    repeat_at: u64,
    steps: u32,
}

static mut SHARED: Option<Box<Shared>> = None;
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Registers of a signal frame in encoding order.
const ORDER: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];
const TF: u64 = 1 << 8;
/// Bytes of a frame's floating-point state that are put back: FXSAVE and the XSAVE header.
const FP_BYTES: usize = 576;

/// The host's processor, taken for one caller.
pub struct Native {
    _guard: MutexGuard<'static, ()>,
}

impl Native {
    /// Maps the scratch memory and installs the handlers.
    pub fn new() -> Self {
        let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: fixed mappings at addresses that nothing uses (NOREPLACE says so), handlers that touch only SHARED, and
        // an alternate stack because the guest's RSP is arbitrary.
        unsafe {
            for (at, bytes, rights) in [
                (CODE, 4096, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC),
                (DATA, DATA_BYTES, libc::PROT_READ | libc::PROT_WRITE),
            ] {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                let mapped = libc::mmap(at as *mut _, bytes, rights, flags, -1, 0);
                assert_eq!(mapped as u64, at, "scratch memory at its place");
            }
            const STACK: usize = 256 << 10;
            let stack = libc::mmap(
                null_mut(),
                STACK,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            let alternate = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK };
            assert_eq!(libc::sigaltstack(&alternate, null_mut()), 0);
            for (signal, handler) in [
                (libc::SIGUSR1, enter as *const () as usize),
                (libc::SIGTRAP, leave as *const () as usize),
                (libc::SIGSEGV, leave as *const () as usize),
                (libc::SIGILL, leave as *const () as usize),
                (libc::SIGFPE, leave as *const () as usize),
                (libc::SIGBUS, leave as *const () as usize),
            ] {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                assert_eq!(libc::sigaction(signal, &action, null_mut()), 0);
            }
            const ARCH_SET_GS: i32 = 0x1001;
            assert_eq!(libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE), 0);
            let empty = State { gprs: [0; 16], rip: 0, rflags: 0, fxsave: [0; 64] };
            *addr_of_mut!(SHARED) = Some(Box::new(Shared {
                input: empty,
                output: empty,
                fault: None,
                resume: std::mem::zeroed(),
                resume_fp: [0; 4096],
                repeat_at: 0,
                steps: 0,
            }));
        }
        Self { _guard: guard }
    }

    /// Runs the instruction `bytes`, placed at the end of the code page; `input.rip` must point there. With `repeats`, it
    /// is stepped until it is done.
    pub fn run(&mut self, bytes: &[u8], input: &State, repeats: bool) -> (State, Option<Fault>) {
        assert_eq!(input.rip, CODE + 4096 - bytes.len() as u64);
        // SAFETY: the code page is ours; SHARED is used by this thread alone, and by its own signal handlers meanwhile.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), input.rip as *mut u8, bytes.len());
            let shared = (*addr_of_mut!(SHARED)).as_mut().expect("new() set it");
            shared.input = *input;
            shared.fault = None;
            shared.steps = 0;
            shared.repeat_at = if repeats { input.rip } else { 0 };
            libc::raise(libc::SIGUSR1);
            let shared = (*addr_of_mut!(SHARED)).as_mut().expect("new() set it");
            (shared.output, shared.fault)
        }
    }

    /// Scratch memory.
    pub fn data(&mut self) -> &mut [u8] {
        // SAFETY: mapped in new(), and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(DATA as *mut u8, DATA_BYTES) }
    }
}

extern "C" fn enter(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a frame; SHARED is this thread's.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let shared = (*addr_of_mut!(SHARED)).as_mut().expect("new() set it");
        shared.resume = *context;
        let fp = context.uc_mcontext.fpregs.cast::<u8>();
        std::ptr::copy_nonoverlapping(fp, shared.resume_fp.as_mut_ptr(), FP_BYTES);
        let registers = &mut context.uc_mcontext.gregs;
        for (number, slot) in ORDER.iter().enumerate() {
            registers[*slot as usize] = shared.input.gprs[number] as i64;
        }
        registers[libc::REG_RIP as usize] = shared.input.rip as i64;
        registers[libc::REG_EFL as usize] = (shared.input.rflags | TF | 2) as i64;
        // The image up to the bytes that the kernel uses for itself (464..512), then XSTATE_BV: x87 and SSE are there.
        std::ptr::copy_nonoverlapping(shared.input.fxsave.as_ptr().cast::<u8>(), fp, 416);
        *fp.add(512) |= 3;
    }
}

extern "C" fn leave(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: as in `enter`.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let shared = (*addr_of_mut!(SHARED)).as_mut().expect("new() set it");
        let registers = &mut context.uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as u64;
        shared.steps += 1;
        if signal == libc::SIGTRAP && rip == shared.repeat_at && shared.steps < 100_000 {
            return;
        }
        for (number, slot) in ORDER.iter().enumerate() {
            shared.output.gprs[number] = registers[*slot as usize] as u64;
        }
        shared.output.rip = rip;
        shared.output.rflags = registers[libc::REG_EFL as usize] as u64;
        let vector = registers[libc::REG_TRAPNO as usize] as u8;
        if signal != libc::SIGTRAP || vector != 1 {
            let address = if vector == 14 { registers[libc::REG_CR2 as usize] as u64 } else { 0 };
            shared.fault = Some(Fault { vector, address });
        }
        let fp = context.uc_mcontext.fpregs.cast::<u8>();
        std::ptr::copy_nonoverlapping(fp, shared.output.fxsave.as_mut_ptr().cast::<u8>(), 512);
        let (segments, fpregs) = (registers[libc::REG_CSGSFS as usize], context.uc_mcontext.fpregs);
        context.uc_mcontext = shared.resume.uc_mcontext;
        context.uc_mcontext.fpregs = fpregs;
        context.uc_mcontext.gregs[libc::REG_CSGSFS as usize] = segments;
        std::ptr::copy_nonoverlapping(shared.resume_fp.as_ptr(), fp, FP_BYTES);
    }
}

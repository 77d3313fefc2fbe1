//! A guest that spends its time at CPL 3: where KVM itself is emulated, such code runs at the processor's own speed.
//!
//! The kernel below it is a dozen instructions: an interrupt that user code sends to itself sleeps for the TSC ticks in RSI. It
//! is that because where KVM is emulated neither SYSCALL nor INT arrives in the kernel; and it is ticks from now, because the
//! TSC that user code reads there need not be the one of a deadline. User code has the serial port to itself (a TSS whose map
//! permits every port, APM2 12.2.4). [`Dirtier`] fills a region with incompressible pages and then rewrites whole pages, one
//! after the other, so many bytes a second or as fast as it can. The first and the last word of a page say which rewrite it
//! holds, and are looked at before the next: what comes back from elsewhere older is `bad`.
//!
//! It beats: an empty line at a steady interval, so that whoever looks at the console sees for how long it stood. Lines
//! `tick N writes W bad B` are as those of [`super::Program`].

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::printing::Printer;
use super::{
    ENTRY, Gate, HOLE_BYTES, HOLE_START, MULTIPLIER, PAGE, PML4, REGION, STACK, TABLES, TSS, TSS_BYTES, USER_PAGES,
    VECTOR, elf, entry_to, page_tables, read_tsc, tables,
};

/// The kernel, and what runs above it.
const KERNEL: u64 = 0x10_1000;
const USER: u64 = 0x10_4000;
const USER_STACK: u64 = 0x1e_f000;
/// Interrupts on.
const USER_FLAGS: i32 = 0x202;
/// The TSS: 104 bytes, then a bit for each port, and a byte of ones (APM2 12.2.5).
const TSS_PORT_MAP: usize = 104;
const TSS_SELECTOR: u32 = 0x30;
/// Selectors of CPL 3.
const USER_SS: i32 = 0x23;
const USER_CS: i32 = 0x2b;
/// The vector with which the guest sleeps, and the low half of the register that sends it (APM2 16.5): fixed, to itself.
const SLEEP: u8 = 0x50;
const SEND: u64 = 0xfee0_0300;
const TASK_PRIORITY: u64 = 0xfee0_0080;
const END_OF_INTERRUPT: u64 = 0xfee0_00b0;
const SPURIOUS: u64 = 0xfee0_00f0;
const TIMER_VECTOR: u64 = 0xfee0_0320;
const TSC_DEADLINE: u32 = 0x6e0;
const DEADLINE_MODE: u32 = 1 << 18;
const TO_ITSELF: u32 = 1 << 18;
/// Two milliseconds: how often a paced guest looks at what is due, as parts of a second.
const PERIODS_A_SECOND: u64 = 500;
/// Periods that a guest may be late and still make up for.
const PERIODS_LATE_MAX: u64 = 3;
/// Pages that a guest in full flight rewrites between two looks at the clock.
const PAGES_IN_FULL_FLIGHT: u64 = 64;

/// How fast pages are rewritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pace {
    /// So many bytes a second of guest time, 0 included, to the nearest 2 MB.
    BytesPerS(u64),
    /// As fast as it can.
    Full,
}

/// What the guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dirtier {
    /// Bytes of the region that is filled and rewritten, from [`REGION`] on; a multiple of 4096. RAM above 3 GiB lies at 4 GiB.
    pub region_bytes: u64,
    /// How fast.
    pub pace: Pace,
    /// Milliseconds of guest time between two empty lines.
    pub beat_ms: u64,
    /// Empty lines between two lines of numbers.
    pub beats_per_tick: u64,
    /// Guest TSC frequency.
    pub tsc_hz: u64,
}

impl Dirtier {
    /// The ELF file.
    ///
    /// # Errors
    /// The assembler refused; a bug in this file.
    pub fn elf(&self) -> Result<Vec<u8>, IcedError> {
        assert!(self.region_bytes > 0 && self.region_bytes.is_multiple_of(PAGE), "region of whole pages");
        above_kernel(|asm| self.code(asm))
    }

    fn pages(&self) -> u64 {
        self.region_bytes / PAGE
    }

    /// Pages a period, and whether the guest sleeps until the next one.
    fn quota(&self) -> (u64, bool) {
        match self.pace {
            Pace::Full => (PAGES_IN_FULL_FLIGHT, false),
            Pace::BytesPerS(bytes) => ((bytes / PAGE + PERIODS_A_SECOND / 2) / PERIODS_A_SECOND, true),
        }
    }

    /// r12 ticks, r13 TSC of the next beat, r14 writes, r15 TSC of the next period, rbp bad pages, rbx the page that is next,
    /// r9 how often the region was gone through, r10 beats until the next tick.
    fn code(&self, asm: &mut CodeAssembler) -> Result<(), IcedError> {
        let mut routines = Routines::new(asm);
        let (mut fill, mut again, mut no_beat) = (asm.create_label(), asm.create_label(), asm.create_label());
        routines.printer.print(asm, "guest: filling\n")?;
        asm.xor(ebx, ebx)?;
        asm.xor(r9d, r9d)?;
        asm.set_label(&mut fill)?;
        asm.call(routines.write_page)?;
        asm.inc(rbx)?;
        asm.mov(rax, self.pages())?;
        asm.cmp(rbx, rax)?;
        asm.jb(fill)?;
        routines.printer.print(asm, "guest: filled\n")?;
        asm.xor(ebx, ebx)?;
        asm.mov(r9d, 1u32)?;
        asm.xor(r12d, r12d)?;
        asm.xor(r14d, r14d)?;
        asm.xor(ebp, ebp)?;
        asm.mov(r10d, 1u32)?;
        read_tsc(asm)?;
        asm.mov(r13, rax)?;
        asm.mov(r15, rax)?;

        asm.set_label(&mut again)?;
        read_tsc(asm)?;
        asm.cmp(rax, r13)?;
        asm.jb(no_beat)?;
        self.beat(asm, &mut routines)?;
        asm.set_label(&mut no_beat)?;
        let (quota, sleeps) = self.quota();
        if quota > 0 {
            self.rewrite(asm, &routines, quota)?;
        }
        if sleeps {
            self.sleep(asm, quota > 0)?;
        }
        asm.jmp(again)?;
        self.emit(asm, &mut routines)
    }

    /// rax: now. An empty line, or a line of numbers.
    fn beat(&self, asm: &mut CodeAssembler, routines: &mut Routines) -> Result<(), IcedError> {
        let mut beat = asm.create_label();
        // The next beat is counted from now: what was missed is not made up for.
        asm.mov(rcx, self.tsc_hz / 1000 * self.beat_ms)?;
        asm.lea(r13, ptr(rax + rcx))?;
        asm.dec(r10)?;
        asm.jnz(beat)?;
        asm.mov(r10, self.beats_per_tick)?;
        asm.inc(r12)?;
        routines.printer.print_ticks(asm, [r12, r14, rbp])?;
        asm.set_label(&mut beat)?;
        asm.mov(al, i32::from(b'\n'))?;
        asm.call(routines.printer.byte)
    }

    /// Looks at so many pages and rewrites them.
    fn rewrite(&self, asm: &mut CodeAssembler, routines: &Routines, quota: u64) -> Result<(), IcedError> {
        let (mut next, mut good, mut same) = (asm.create_label(), asm.create_label(), asm.create_label());
        asm.mov(r11, quota)?;
        asm.set_label(&mut next)?;
        asm.call(routines.check_page)?;
        asm.test(rax, rax)?;
        asm.jz(good)?;
        asm.inc(rbp)?;
        asm.set_label(&mut good)?;
        asm.call(routines.write_page)?;
        asm.inc(r14)?;
        asm.inc(rbx)?;
        asm.mov(rax, self.pages())?;
        asm.cmp(rbx, rax)?;
        asm.jb(same)?;
        asm.xor(ebx, ebx)?;
        asm.inc(r9)?;
        asm.set_label(&mut same)?;
        asm.dec(r11)?;
        asm.jnz(next)
    }

    /// Until the next period, or the next beat of a guest that has nothing else to do.
    fn sleep(&self, asm: &mut CodeAssembler, busy: bool) -> Result<(), IcedError> {
        let (mut late, mut woken) = (asm.create_label(), asm.create_label());
        if !busy {
            read_tsc(asm)?;
            asm.mov(rsi, r13)?;
            asm.sub(rsi, rax)?;
            asm.jbe(woken)?;
            sleep(asm)?;
            asm.set_label(&mut woken)?;
            return asm.nop();
        }
        let period = self.tsc_hz / PERIODS_A_SECOND;
        asm.mov(rax, period)?;
        asm.add(r15, rax)?;
        read_tsc(asm)?;
        asm.cmp(rax, r15)?;
        asm.jae(late)?;
        asm.mov(rsi, r15)?;
        asm.sub(rsi, rax)?;
        sleep(asm)?;
        asm.jmp(woken)?;
        asm.set_label(&mut late)?;
        asm.mov(rcx, period * PERIODS_LATE_MAX)?;
        asm.sub(rax, rcx)?;
        asm.cmp(r15, rax)?;
        asm.cmovb(r15, rax)?;
        asm.set_label(&mut woken)?;
        asm.nop()
    }

    fn emit(&self, asm: &mut CodeAssembler, routines: &mut Routines) -> Result<(), IcedError> {
        let (mut words, mut bad) = (asm.create_label(), asm.create_label());
        asm.set_label(&mut routines.write_page)?;
        seed(asm)?;
        asm.mov(ecx, (PAGE / 64) as u32)?;
        asm.set_label(&mut words)?;
        for word in 0..8 {
            asm.mov(qword_ptr(rdi + word * 8), rax)?;
            asm.add(rax, rdx)?;
        }
        asm.add(rdi, 64)?;
        asm.dec(ecx)?;
        asm.jnz(words)?;
        asm.ret()?;

        // What the page holds is of the time before.
        asm.set_label(&mut routines.check_page)?;
        asm.dec(r9)?;
        seed(asm)?;
        asm.inc(r9)?;
        asm.cmp(qword_ptr(rdi), rax)?;
        asm.jne(bad)?;
        asm.imul_3(rdx, rdx, 511)?;
        asm.add(rax, rdx)?;
        asm.cmp(qword_ptr(rdi + 4088), rax)?;
        asm.jne(bad)?;
        asm.xor(eax, eax)?;
        asm.ret()?;
        asm.set_label(&mut bad)?;
        asm.mov(eax, 1u32)?;
        asm.ret()?;
        routines.printer.emit(asm, false)
    }
}

/// rbx page, r9 time -> rdi address, rax first word, rdx what is added from word to word.
fn seed(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut low = asm.create_label();
    asm.mov(rdi, rbx)?;
    asm.shl(rdi, 12)?;
    asm.add(rdi, REGION as i32)?;
    asm.mov(rax, HOLE_START)?;
    asm.cmp(rdi, rax)?;
    asm.jb(low)?;
    asm.add(rdi, HOLE_BYTES as i32)?;
    asm.set_label(&mut low)?;
    asm.lea(rax, ptr(rbx + 1))?;
    asm.shl(rax, 24)?;
    asm.add(rax, r9)?;
    asm.mov(rdx, MULTIPLIER)?;
    asm.imul_2(rax, rdx)?;
    asm.lea(rdx, ptr(rdx + rax))?;
    asm.or(rdx, 1)
}

/// Subroutines.
struct Routines {
    /// Writes page rbx for the time r9. Clobbers rax, rcx, rdx, rdi.
    write_page: CodeLabel,
    /// rax is 0 if page rbx is as it was left. Clobbers rdx, rdi.
    check_page: CodeLabel,
    printer: Printer,
}

impl Routines {
    fn new(asm: &mut CodeAssembler) -> Self {
        Self { write_page: asm.create_label(), check_page: asm.create_label(), printer: Printer::new(asm) }
    }
}

/// An ELF with a PVH note that runs `code` at CPL 3, with the first 10 GiB mapped one to one, SSE on, the serial port its own
/// and interrupts on. [`sleep`] sleeps.
///
/// # Errors
/// The assembler refused.
pub fn above_kernel(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(64)?;
    asm.mov(rsp, USER_STACK)?;
    code(&mut asm)?;
    let user = asm.assemble(USER)?;
    let (kernel, gates) = kernel()?;
    assert!(KERNEL + kernel.len() as u64 <= USER && USER + user.len() as u64 <= TABLES, "code fits its places");
    let segments = [
        (ENTRY, entry_to(KERNEL)?),
        (KERNEL, kernel),
        (USER, user),
        (TABLES, tables(&gates)),
        (TSS, tss()),
        (PML4, page_tables(USER_PAGES)),
    ];
    Ok(elf(&segments))
}

/// Writes a register of the local APIC. Clobbers rax.
fn apic(asm: &mut CodeAssembler, register: u64, value: u32) -> Result<(), IcedError> {
    asm.mov(rax, register)?;
    asm.mov(dword_ptr(rax), value)
}

/// Sends an interrupt to itself, which sleeps for the TSC ticks in rsi, and waits until it has. Clobbers rax and rsi.
///
/// # Errors
/// The assembler refused.
pub fn sleep(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut awaited = asm.create_label();
    apic(asm, SEND, TO_ITSELF | u32::from(SLEEP))?;
    asm.set_label(&mut awaited)?;
    asm.test(rsi, rsi)?;
    asm.jnz(awaited)
}

/// A TSS with a stack for the kernel, that permits every port.
fn tss() -> Vec<u8> {
    let mut bytes = vec![0; TSS_BYTES];
    bytes[4..12].copy_from_slice(&STACK.to_le_bytes());
    bytes[102..104].copy_from_slice(&(TSS_PORT_MAP as u16).to_le_bytes());
    bytes[TSS_BYTES - 1] = 0xff;
    bytes
}

/// Goes to [`USER`]; how it sleeps; the timer's handler. Also the gates to both.
fn kernel() -> Result<(Vec<u8>, [Gate; 2]), IcedError> {
    let mut asm = CodeAssembler::new(64)?;
    let (mut handler, mut call) = (asm.create_label(), asm.create_label());
    asm.mov(rsp, STACK)?;
    asm.lidt(ptr(TABLES + 0xff0))?;
    for (register, value) in [(SPURIOUS, 0x1ff), (TASK_PRIORITY, 0), (TIMER_VECTOR, DEADLINE_MODE | VECTOR as u32)] {
        apic(&mut asm, register, value)?;
    }
    // Where there are old interrupt controllers, their firmware's timer must not come.
    asm.mov(al, 0xff)?;
    asm.out(0x21, al)?;
    asm.out(0xa1, al)?;
    asm.mov(eax, TSS_SELECTOR)?;
    asm.ltr(ax)?;
    // SSE: CR4.OSFXSR and OSXMMEXCPT; CR0 is as it must be.
    asm.mov(rax, cr4)?;
    asm.or(rax, 0x600)?;
    asm.mov(cr4, rax)?;
    asm.push(USER_SS)?;
    asm.mov(rax, USER_STACK)?;
    asm.push(rax)?;
    asm.push(USER_FLAGS)?;
    asm.push(USER_CS)?;
    asm.mov(rax, USER)?;
    asm.push(rax)?;
    asm.iretq()?;

    asm.set_label(&mut call)?;
    asm.push(rax)?;
    asm.push(rcx)?;
    asm.push(rdx)?;
    apic(&mut asm, END_OF_INTERRUPT, 0)?;
    read_tsc(&mut asm)?;
    asm.add(rax, rsi)?;
    asm.mov(rdx, rax)?;
    asm.shr(rdx, 32)?;
    asm.mov(ecx, TSC_DEADLINE)?;
    asm.wrmsr()?;
    asm.sti()?;
    asm.hlt()?;
    asm.cli()?;
    asm.xor(esi, esi)?;
    asm.pop(rdx)?;
    asm.pop(rcx)?;
    asm.pop(rax)?;
    asm.iretq()?;

    asm.set_label(&mut handler)?;
    asm.push(rax)?;
    apic(&mut asm, END_OF_INTERRUPT, 0)?;
    asm.pop(rax)?;
    asm.iretq()?;
    let result = asm.assemble_options(KERNEL, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let gates = [(VECTOR as u8, result.label_ip(&handler)?), (SLEEP, result.label_ip(&call)?)];
    Ok((result.inner.code_buffer, gates))
}

#[cfg(test)]
mod tests {
    use proto::v1::{BootSource, MachineConfig};
    use vmcb_engine::machine::{Machine, Outcome, Parts};
    use vmcb_engine::memory::GuestMemory;

    use super::*;
    use crate::cluster::Ticks;

    fn machine(dirtier: Dirtier) -> Machine {
        let memory_bytes = (REGION + dirtier.region_bytes).next_multiple_of(2 << 20);
        let config = MachineConfig {
            vcpus: 1,
            memory_bytes,
            cpu_model: "soft-v1".into(),
            engine: "soft".into(),
            boot: Some(BootSource::default()),
            seed: vec![7; 32],
            tsc_hz: dirtier.tsc_hz,
            tsc_per_instruction: 1,
            ..MachineConfig::default()
        };
        let parts = Parts { memory: GuestMemory::create(memory_bytes).unwrap(), disks: vec![], nets: vec![] };
        let mut machine = Machine::build(&config, parts).unwrap();
        machine.boot(&dirtier.elf().unwrap(), None).unwrap();
        machine
    }

    /// Runs for so many milliseconds of guest time; what the console said.
    fn run(machine: &mut Machine, ms: u64) -> String {
        let (mut console, until) = (String::new(), machine.tsc() + ms * 1_000_000);
        while machine.tsc() < until {
            match machine.run(machine.retired() + 1_000_000) {
                Outcome::Reached => {}
                Outcome::Idle { until_tsc: Some(tsc) } => machine.skip_idle_until(tsc),
                other => panic!("{other:?}\n{console}"),
            }
            console += &String::from_utf8_lossy(&machine.take_console_output());
        }
        console
    }

    fn dirtier(pace: Pace) -> Dirtier {
        Dirtier { region_bytes: 1 << 20, pace, beat_ms: 4, beats_per_tick: 25, tsc_hz: 1_000_000_000 }
    }

    #[test]
    fn the_guest_rewrites_as_fast_as_it_is_told_and_beats() {
        let console = run(&mut machine(dirtier(Pace::BytesPerS(8 << 20))), 2000);
        let last = Ticks::last(&console).unwrap();
        assert!((18..=20).contains(&last.tick) && last.bad == 0, "{last:?}\n{console}");
        assert!((3600..=4200).contains(&last.writes), "{last:?}");
        assert!((470..=520).contains(&console.matches('\n').count()), "{console}");
        let idle = Ticks::last(&run(&mut machine(dirtier(Pace::BytesPerS(0))), 1000)).unwrap();
        assert_eq!((idle.writes, idle.bad), (0, 0));
    }

    #[test]
    fn a_page_that_is_set_back_is_found() {
        let mut machine = machine(dirtier(Pace::Full));
        run(&mut machine, 300);
        let mut page = vec![0; PAGE as usize];
        machine.memory().read(REGION + PAGE * 7, &mut page).unwrap();
        let before = Ticks::last(&run(&mut machine, 300)).unwrap();
        assert!(before.bad == 0 && before.writes > 1000, "{before:?}");
        machine.memory().write(REGION + PAGE * 7, &page).unwrap();
        assert_eq!(Ticks::last(&run(&mut machine, 300)).unwrap().bad, 1);
    }
}

//! Guests for the contract of engines: a few dozen instructions of 64-bit code each, behind an entry as PVH says, and the machine
//! around them on either engine. They keep to integer instructions: where KVM itself runs in a guest it may have to emulate
//! what the guest's kernel executes, and knows no others.

#[path = "../pvh/mod.rs"]
mod pvh;

use iced_x86::code_asm::*;
use proto::v1::{BootSource, MachineConfig, Section};
use vmcb_engine::capability::CpuModel;
use vmcb_engine::engine::kvm;
use vmcb_engine::machine::{Machine, Outcome, Parts};
use vmcb_engine::memory::GuestMemory;

/// Where the code lies, and where it is entered.
pub const CODE: u32 = 0x10_0000;
/// 64-bit code; the entry before it has 32 bits.
const PROGRAM: u32 = CODE + 0x100;
/// GDT and pseudo-descriptors, IDT, and page tables: all of 4 GiB where it is, in pages of 2 MiB.
const TABLES: u32 = CODE + 0x2000;
const POINTERS: u32 = TABLES + 0x100;
const IDT: u32 = TABLES + 0x1000;
const PML4: u32 = TABLES + 0x2000;
const TABLES_END: u32 = TABLES + 0x8000;
const STACK: u32 = 0x18_0000;
pub const RAM_BYTES: u64 = 16 << 20;
/// TSC rate where there is no KVM that says one.
const TSC_HZ: u64 = 1_000_000_000;
/// A slice is a millisecond of the guest's time, and no test takes longer than so many.
const SLICES_MAX: u32 = 30_000;

/// Which engine runs the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum On {
    Soft,
    Kvm,
}

impl On {
    /// Both, or the software engine alone where there is no KVM.
    pub fn those_here() -> Vec<On> {
        if On::Kvm.is_here() { vec![On::Soft, On::Kvm] } else { vec![On::Soft] }
    }

    /// False, and said aloud, where this engine cannot run.
    pub fn is_here(self) -> bool {
        match (self, kvm::capabilities()) {
            (On::Kvm, Err(error)) => {
                eprintln!("skipped on KVM: {error}");
                false
            }
            _ => true,
        }
    }

    fn name(self) -> &'static str {
        match self {
            On::Soft => "soft",
            On::Kvm => "kvm",
        }
    }
}

/// The rate that both engines have here.
fn tsc_hz() -> u64 {
    kvm::capabilities().map_or(TSC_HZ, |host| host.facts.tsc_khz * 1000)
}

/// A program: what is assembled, and which label handles which vector.
pub struct Program {
    pub a: CodeAssembler,
    handlers: Vec<(u8, CodeLabel)>,
}

impl Program {
    /// Begins with segments and an IDT.
    pub fn new() -> Self {
        let mut a = CodeAssembler::new(64).unwrap();
        a.mov(eax, 16).unwrap();
        a.mov(ss, eax).unwrap();
        a.mov(ds, eax).unwrap();
        a.mov(es, eax).unwrap();
        a.mov(esp, STACK).unwrap();
        a.lidt(ptr(POINTERS + 16)).unwrap();
        Self { a, handlers: Vec::new() }
    }

    /// The next instructions handle this vector.
    pub fn handler(&mut self, vector: u8) {
        let mut label = self.a.create_label();
        self.a.set_label(&mut label).unwrap();
        self.handlers.push((vector, label));
    }

    /// Says a character.
    pub fn say(&mut self, character: u8) {
        self.a.mov(dx, 0x3f8).unwrap();
        self.a.mov(al, i32::from(character)).unwrap();
        self.a.out(dx, al).unwrap();
    }

    /// Says the low `digits` hexadecimal digits of EBP. Uses EAX, ECX and EDX.
    pub fn say_count(&mut self, digits: u32) {
        let a = &mut self.a;
        let (mut next, mut small) = (a.create_label(), a.create_label());
        a.mov(dx, 0x3f8).unwrap();
        a.mov(ecx, digits * 4).unwrap();
        a.set_label(&mut next).unwrap();
        a.sub(ecx, 4).unwrap();
        a.mov(eax, ebp).unwrap();
        a.shr(eax, cl).unwrap();
        a.and(eax, 15).unwrap();
        a.add(eax, 0x30).unwrap();
        a.cmp(eax, 0x3a).unwrap();
        a.jb(small).unwrap();
        a.add(eax, 0x27).unwrap();
        a.set_label(&mut small).unwrap();
        a.out(dx, al).unwrap();
        a.test(ecx, ecx).unwrap();
        a.jne(next).unwrap();
    }

    /// Stores to any address below 4 GiB. Uses R15.
    pub fn store(&mut self, address: u32, value: u32) {
        self.a.mov(r15d, address).unwrap();
        self.a.mov(dword_ptr(r15), value as i32).unwrap();
    }

    /// Loads EAX from any address below 4 GiB. Uses R15.
    pub fn load(&mut self, address: u32) {
        self.a.mov(r15d, address).unwrap();
        self.a.mov(eax, dword_ptr(r15)).unwrap();
    }

    /// Switches the machine off.
    pub fn power_off(&mut self) {
        self.a.mov(dx, 0x600).unwrap();
        self.a.mov(al, 0x34).unwrap();
        self.a.out(dx, al).unwrap();
        self.rest();
    }

    /// Rests for ever.
    pub fn rest(&mut self) {
        let mut label = self.a.create_label();
        self.a.set_label(&mut label).unwrap();
        self.a.hlt().unwrap();
        self.a.jmp(label).unwrap();
    }

    /// The kernel image: ELF with a PVH note.
    pub fn image(mut self) -> Vec<u8> {
        let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let assembled = self.a.assemble_options(PROGRAM.into(), options).unwrap();
        let ip = |label: &CodeLabel| assembled.label_ip(label).unwrap();
        let handlers: Vec<(u8, u64)> = self.handlers.iter().map(|(vector, label)| (*vector, ip(label))).collect();
        let mut contents = entry();
        contents.resize((PROGRAM - CODE) as usize, 0x90);
        contents.extend(assembled.inner.code_buffer);
        assert!(contents.len() <= (TABLES - CODE) as usize);
        contents.resize((TABLES_END - CODE) as usize, 0);
        let mut put = |at: u32, word: u64| contents[(at - CODE) as usize..][..8].copy_from_slice(&word.to_le_bytes());
        put(TABLES + 8, 0x00af_9b00_0000_ffff);
        put(TABLES + 16, 0x00cf_9300_0000_ffff);
        put(POINTERS, u64::from(TABLES) << 16 | 0x17);
        put(POINTERS + 16, u64::from(IDT) << 16 | 0xfff);
        for (vector, ip) in handlers {
            let gate = ip & 0xffff | 8 << 16 | 0x8e00 << 32 | (ip >> 16 & 0xffff) << 48;
            put(IDT + 16 * u32::from(vector), gate);
        }
        // Accessed and dirty already, so that walks write nothing.
        put(PML4, u64::from(PML4 + 0x1000) | 0x23);
        for gib in 0..4 {
            let directory = PML4 + 0x2000 + 0x1000 * gib;
            put(PML4 + 0x1000 + 8 * gib, u64::from(directory) | 0x23);
            (0..512).for_each(|n| put(directory + 8 * n, u64::from(gib) << 30 | u64::from(n) << 21 | 0xe3));
        }
        pvh::elf(CODE, &contents)
    }
}

/// From the state that PVH enters with into 64-bit mode (APM2 14.6).
fn entry() -> Vec<u8> {
    let mut a = CodeAssembler::new(32).unwrap();
    a.mov(eax, PML4).unwrap();
    a.mov(cr3, eax).unwrap();
    a.mov(eax, 0x620).unwrap();
    a.mov(cr4, eax).unwrap();
    a.mov(ecx, 0xc000_0080_u32).unwrap();
    a.mov(eax, 0x100).unwrap();
    a.xor(edx, edx).unwrap();
    a.wrmsr().unwrap();
    a.lgdt(ptr(POINTERS)).unwrap();
    a.mov(eax, 0x8000_0011_u32).unwrap();
    a.mov(cr0, eax).unwrap();
    // JMP 8:PROGRAM.
    a.db(&[0xea]).unwrap();
    a.dd(&[PROGRAM]).unwrap();
    a.dw(&[8]).unwrap();
    a.assemble(CODE.into()).unwrap()
}

/// A machine, and what it has said.
pub struct Guest {
    pub machine: Machine,
    pub said: Vec<u8>,
    config: MachineConfig,
}

impl Guest {
    fn empty(config: MachineConfig) -> Guest {
        let memory = GuestMemory::create(RAM_BYTES).unwrap();
        let machine = Machine::build(&config, Parts { memory, disks: Vec::new(), nets: Vec::new() }).unwrap();
        Guest { machine, said: Vec::new(), config }
    }

    /// A machine that is about to enter the program.
    pub fn new(on: On, vcpus: u32, image: &[u8]) -> Guest {
        let mut guest = Guest::empty(MachineConfig {
            vcpus,
            memory_bytes: RAM_BYTES,
            cpu_model: CpuModel::X86V1.name().into(),
            engine: on.name().into(),
            boot: Some(BootSource::default()),
            seed: vec![7; 32],
            epoch_ns: 1_700_000_000_000_000_000,
            tsc_hz: tsc_hz(),
            tsc_per_instruction: 1,
            ..MachineConfig::default()
        });
        guest.machine.boot(image, None).unwrap();
        guest
    }

    /// Another machine on this engine, in the state of this one, with the same RAM.
    pub fn moved_to(mut self, on: On) -> Guest {
        let sections = self.machine.capture().unwrap();
        let mut other = Guest::empty(MachineConfig { engine: on.name().into(), ..self.config });
        let mut ram = vec![0; RAM_BYTES as usize];
        self.machine.memory().read(0, &mut ram).unwrap();
        other.machine.memory().write(0, &ram).unwrap();
        other.machine.apply(&sections).unwrap();
        // What arrived is what was sent: both sides of a migration compare it.
        let arrived = other.machine.capture().unwrap();
        let differing: Vec<&str> = sections
            .iter()
            .zip(&arrived)
            .filter(|(sent, here)| sent != here)
            .map(|(sent, _)| sent.name.as_str())
            .collect();
        assert_eq!(differing, [""; 0], "on {on:?}");
        self.said.extend(self.machine.take_console_output());
        other.said = self.said;
        other
    }

    /// The machine's sections.
    pub fn captured(&mut self) -> Vec<Section> {
        self.machine.capture().unwrap()
    }

    /// Runs about a millisecond of the guest's time. Idle time passes at once, where it is the machine's own.
    pub fn slice(&mut self) -> Outcome {
        let outcome = self.machine.run(self.machine.retired() + self.config.tsc_hz / 1000);
        self.said.extend(self.machine.take_console_output());
        if let Outcome::Idle { until_tsc: Some(until) } = outcome {
            self.machine.skip_idle_until(until);
        }
        outcome
    }

    /// Runs until something is so.
    pub fn run_until(&mut self, what: &str, mut so: impl FnMut(&Guest) -> bool) {
        for _ in 0..SLICES_MAX {
            if so(self) {
                return;
            }
            match self.slice() {
                Outcome::Reached | Outcome::Idle { .. } => {}
                other if so(self) => panic!("{other:?} although {what}"),
                other => panic!("{other:?} before {what}; it said {:?}", self.last_words()),
            }
        }
        panic!("it never came that {what}; it said {:?}", self.last_words());
    }

    /// Runs until it has said this.
    pub fn run_until_said(&mut self, text: &str) {
        self.run_until(&format!("it said {text:?}"), |guest| guest.text().contains(text));
    }

    /// Runs until it ends by itself.
    pub fn run_to_end(&mut self) -> Outcome {
        for _ in 0..SLICES_MAX {
            match self.slice() {
                Outcome::Reached | Outcome::Idle { until_tsc: Some(_) } => {}
                other => return other,
            }
        }
        panic!("it never ended; it said {:?}", self.last_words());
    }

    /// The last of what it said, for messages.
    fn last_words(&self) -> String {
        String::from_utf8_lossy(&self.said[self.said.len().saturating_sub(60)..]).into_owned()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.said).into_owned()
    }

    pub fn word(&self, gpa: u64) -> u32 {
        let mut bytes = [0; 4];
        self.machine.memory().read(gpa, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }
}

//! The guest's kernel: from 32 bits (and, on the second processor, 16) to 64, faults that are mended or skipped, interrupts,
//! and a system call that uses what only a kernel may.

use iced_x86::code_asm::*;

use super::*;
use crate::replaying::CODE;

const LAPIC: u64 = 0xfee0_0000;
/// Windows of the disk, the network card and the entropy device.
const DISK: u32 = 0xd000_0000;
const CARD: u32 = 0xd000_1000;
const ENTROPY: u32 = 0xd000_2000;
/// Descriptors, available and used ring of: the disk, received packets, sent packets, entropy.
const DISK_RINGS: u64 = RINGS;
const RECEIVED: u64 = RINGS + 0x300;
const SENT: u64 = RINGS + 0x600;
const ENTROPY_RINGS: u64 = RINGS + 0x900;
/// Header and status of the disk's request.
const REQUEST: u64 = RINGS + 0xc00;
const SECTOR: u64 = BUFFERS;
const SENT_PACKET: u64 = BUFFERS + 0x200;
const RANDOM: u64 = BUFFERS + 0x300;
const ENTRIES: u64 = 8;
const PACKET_BYTES: u64 = 2048;

/// 32 bits, flat: tables, long mode, and into the kernel. Both processors pass here.
pub fn entry() -> Vec<u8> {
    let mut a = CodeAssembler::new(32).unwrap();
    a.cli().unwrap();
    a.mov(eax, 0x10).unwrap();
    a.mov(ds, eax).unwrap();
    a.mov(es, eax).unwrap();
    a.mov(ss, eax).unwrap();
    // PAE, PGE, OSFXSR, OSXMMEXCPT, FSGSBASE.
    a.mov(eax, 0x1_06a0).unwrap();
    a.mov(cr4, eax).unwrap();
    a.mov(eax, PML4 as u32).unwrap();
    a.mov(cr3, eax).unwrap();
    a.mov(ecx, 0xc000_0080u32).unwrap();
    a.mov(eax, 0x901).unwrap();
    a.xor(edx, edx).unwrap();
    a.wrmsr().unwrap();
    // PG, WP, NE, MP, PE.
    a.mov(eax, 0x8001_0033u32).unwrap();
    a.mov(cr0, eax).unwrap();
    a.lgdt(ptr(POINTERS as u32)).unwrap();
    let mut code = a.assemble(CODE.into()).unwrap();
    far_jump(&mut code, KERNEL as u32, KERNEL_CS);
    code
}

fn far_jump(code: &mut Vec<u8>, to: u32, segment: u16) {
    code.push(0xea);
    code.extend(to.to_le_bytes());
    code.extend(segment.to_le_bytes());
}

/// Real mode at [`STARTUP`]: protected mode, and to the 32-bit entry.
pub fn trampoline() -> Vec<u8> {
    let mut a = CodeAssembler::new(16).unwrap();
    a.cli().unwrap();
    a.xor(ax, ax).unwrap();
    a.mov(ds, eax).unwrap();
    // LGDT with a 32-bit base, of the pseudo-descriptor at the end.
    a.db(&[0x66, 0x0f, 0x01, 0x16]).unwrap();
    a.dw(&[STARTUP as u16 + 0x40]).unwrap();
    a.mov(eax, cr0).unwrap();
    a.or(al, 1).unwrap();
    a.mov(cr0, eax).unwrap();
    let mut code = a.assemble(STARTUP).unwrap();
    code.push(0x66);
    far_jump(&mut code, CODE, 8);
    code.resize(0x40, 0x90);
    code.extend(0x5fu16.to_le_bytes());
    code.extend((GDT as u32).to_le_bytes());
    code
}

/// Stores that bring up IOAPIC pins 4 to 7 and the virtio devices.
fn device_stores() -> Vec<u8> {
    let mut stores: Vec<(u32, u32)> = Vec::new();
    for (pin, entry) in [(4, 0x41), (5, 0x8043), (6, 0x8042), (7, 0x8044)] {
        for (register, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, entry)] {
            stores.extend([(0xfec0_0000, register), (0xfec0_0010, value)]);
        }
    }
    let queues: [(u32, &[u64]); 3] = [(DISK, &[DISK_RINGS]), (CARD, &[RECEIVED, SENT]), (ENTROPY, &[ENTROPY_RINGS])];
    for (window, rings) in queues {
        let begin = [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)];
        stores.extend(begin.map(|(offset, value)| (window + offset, value)));
        for (queue, rings) in (0..).zip(rings) {
            let rings = *rings as u32;
            let rows = [(0x30, queue), (0x38, ENTRIES as u32), (0x80, rings), (0x90, rings + 0x100)];
            stores.extend(rows.map(|(offset, value)| (window + offset, value)));
            stores.extend([(window + 0xa0, rings + 0x200), (window + 0x44, 1)]);
        }
        stores.extend([(window + 0x70, 15), (window + 0x50, 0)]);
    }
    stores.iter().flat_map(|(address, value)| [address.to_le_bytes(), value.to_le_bytes()].concat()).collect()
}

/// What the devices' rings hold at the beginning.
pub fn put_rings(put: &mut dyn FnMut(u64, u64, &[u8])) {
    let row = |address: u64, bytes: u64, flags: u64, next: u64| [address, bytes | flags << 32 | next << 48];
    let disk = [row(REQUEST, 16, 1, 1), row(SECTOR, 512, 1, 2), row(REQUEST + 0x10, 1, 2, 0)];
    // The second half of the rows reads: its data is the device's to write.
    let reads = [row(REQUEST, 16, 1, 4), row(SECTOR, 512, 3, 5), row(REQUEST + 0x10, 1, 2, 0)];
    put(DISK_RINGS, BUFFERS, &words([disk, reads].concat().as_flattened()));
    let received: Vec<_> = (0..ENTRIES).map(|n| row(PACKETS + n * PACKET_BYTES, PACKET_BYTES, 2, 0)).collect();
    put(RECEIVED, BUFFERS, &words(received.as_flattened()));
    let numbers: Vec<u8> = (0..ENTRIES as u16).flat_map(u16::to_le_bytes).collect();
    put(RECEIVED + 0x102, BUFFERS, &(ENTRIES as u16).to_le_bytes());
    put(RECEIVED + 0x104, BUFFERS, &numbers);
    put(SENT, BUFFERS, &words(&row(SENT_PACKET, 76, 0, 0)));
    put(ENTROPY_RINGS, BUFFERS, &words(&row(RANDOM, 64, 2, 0)));
    // Write and read by turns: rows 0 and 3.
    for at in (2..ENTRIES * 2).step_by(4) {
        put(DISK_RINGS + 0x104 + at, BUFFERS, &3u16.to_le_bytes());
    }
}

/// Where gates lead: (vector, from CPL 3 too, address).
pub type Gates = Vec<(u8, bool, u64)>;

/// The 64-bit code, and its gates.
pub fn code(vcpus: u32, user_bytes: usize) -> (Vec<u8>, Gates) {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut system = a.create_label();
    start(&mut a, vcpus, user_bytes, system);
    a.set_label(&mut system).unwrap();
    system_call(&mut a, vcpus);
    let mut gates = faults(&mut a);
    gates.extend(interrupts(&mut a));
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let assembled = a.assemble_options(KERNEL, options).unwrap();
    let gates = gates.into_iter().map(|(vector, label)| (vector, vector == 3, assembled.label_ip(&label).unwrap()));
    (assembled.inner.code_buffer.clone(), gates.collect())
}

fn write_msr(a: &mut CodeAssembler, msr: u32) {
    a.mov(ecx, msr).unwrap();
    a.mov(rdx, rax).unwrap();
    a.shr(rdx, 32).unwrap();
    a.wrmsr().unwrap();
}

/// From the entry to CPL 3. The first processor brings up devices and the second processor.
fn start(a: &mut CodeAssembler, vcpus: u32, user_bytes: usize, system: CodeLabel) {
    a.mov(eax, u32::from(KERNEL_SS)).unwrap();
    a.mov(ss, eax).unwrap();
    // The kernel's own would be taken away, base and all, on the way to CPL 3.
    a.mov(eax, u32::from(USER_SS)).unwrap();
    a.mov(fs, eax).unwrap();
    a.mov(gs, eax).unwrap();
    a.lidt(ptr(POINTERS + 16)).unwrap();
    a.mov(eax, 1).unwrap();
    a.cpuid().unwrap();
    a.shr(ebx, 24).unwrap();
    // R8 is this processor's data.
    a.imul_3(r8d, ebx, KERNEL_DATA_BYTES as i32).unwrap();
    a.add(r8, KERNEL_DATA as i32).unwrap();
    a.lea(rsp, ptr(r8 + KERNEL_DATA_BYTES as i32)).unwrap();
    a.mov(qword_ptr(r8 + 8), rsp).unwrap();
    a.mov(qword_ptr(r8 + 16), rbx).unwrap();
    a.mov(rax, r8).unwrap();
    write_msr(a, 0xc000_0101);
    a.lea(rax, ptr(rbx + 0x1234_5000)).unwrap();
    write_msr(a, 0xc000_0102);
    a.lea(rax, ptr(rbx + 0x77)).unwrap();
    write_msr(a, 0xc000_0103);
    a.mov(rax, (u64::from(KERNEL_CS) | 0x28 << 16) << 32).unwrap();
    write_msr(a, 0xc000_0081);
    a.lea(rax, ptr(system)).unwrap();
    write_msr(a, 0xc000_0082);
    a.mov(eax, 0x4_0700).unwrap();
    write_msr(a, 0xc000_0084);
    a.imul_3(eax, ebx, 16).unwrap();
    a.add(eax, 0x40).unwrap();
    a.ltr(ax).unwrap();
    a.mov(rdi, LAPIC).unwrap();
    for (register, value) in [(0xf0, 0x1ff), (0x3e0, 0xb), (0x320, 0x2_0040)] {
        a.mov(dword_ptr(rdi + register), value).unwrap();
    }
    a.imul_3(eax, ebx, 7000).unwrap();
    a.add(eax, 60_000).unwrap();
    a.mov(dword_ptr(rdi + 0x380), eax).unwrap();
    a.fninit().unwrap();
    bring_up(a, vcpus, user_bytes);
    a.mov(r14d, ebx).unwrap();
    a.shl(r14d, 16).unwrap();
    a.add(r14d, USER_DATA as i32).unwrap();
    a.mov(ebp, ebx).unwrap();
    a.shl(ebp, 20).unwrap();
    a.add(ebp, DEMANDED as i32).unwrap();
    a.lea(r13, ptr(rbx + 0x1234_5677)).unwrap();
    a.xor(r12d, r12d).unwrap();
    a.push(i32::from(USER_SS)).unwrap();
    a.lea(rax, ptr(r14 + 0x8000)).unwrap();
    a.push(rax).unwrap();
    a.push(0x202).unwrap();
    a.push(i32::from(USER_CS)).unwrap();
    a.push(USER as i32).unwrap();
    a.lea(rbx, ptr(r14 + 0x1800)).unwrap();
    a.swapgs().unwrap();
    a.iretq().unwrap();
}

/// The first processor copies code, brings up devices and wakes the second one.
fn bring_up(a: &mut CodeAssembler, vcpus: u32, user_bytes: usize) {
    let (mut bring_up, mut stores, mut next, mut go) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.test(ebx, ebx).unwrap();
    a.jne(go).unwrap();
    for (from, to, bytes) in [(USER_IMAGE, USER, user_bytes as u32), (TRAMPOLINE, STARTUP, 0x50)] {
        a.mov(esi, from as u32).unwrap();
        a.mov(edi, to as u32).unwrap();
        a.mov(ecx, bytes).unwrap();
        a.rep().movsb().unwrap();
    }
    a.jmp(bring_up).unwrap();
    a.set_label(&mut stores).unwrap();
    let table = device_stores();
    a.db(&table).unwrap();
    a.set_label(&mut bring_up).unwrap();
    a.lea(rsi, ptr(stores)).unwrap();
    a.mov(ecx, table.len() as u32 / 8).unwrap();
    a.set_label(&mut next).unwrap();
    a.lodsd().unwrap();
    a.mov(edi, eax).unwrap();
    a.movsd().unwrap();
    a.dec(ecx).unwrap();
    a.jne(next).unwrap();
    for (port, value) in [(0x3fbu32, 3u32), (0x3fa, 1), (0x3fc, 0xb), (0x3f9, 1)] {
        a.mov(edx, port).unwrap();
        a.mov(eax, value).unwrap();
        a.out(dx, al).unwrap();
    }
    if vcpus > 1 {
        a.mov(rdi, LAPIC).unwrap();
        for command in [0x4500, 0x4608] {
            a.mov(dword_ptr(rdi + 0x310), 1 << 24).unwrap();
            a.mov(dword_ptr(rdi + 0x300), command).unwrap();
        }
    }
    a.set_label(&mut go).unwrap();
}

/// What a register holds becomes part of R12 for ever.
pub fn fold(a: &mut CodeAssembler, value: AsmRegister64) {
    a.rol(r12, 9).unwrap();
    a.xor(r12, value).unwrap();
    a.imul_3(r12, r12, 0x4f1b_cdc9).unwrap();
}

/// Once a turn: paging, segments, control and debug registers, CPUID, MSRs, IPIs, devices, HLT.
fn system_call(a: &mut CodeAssembler, vcpus: u32) {
    let (mut awake, mut no_flush) = (a.create_label(), a.create_label());
    a.swapgs().unwrap();
    a.mov(qword_ptr(0).gs(), rsp).unwrap();
    a.mov(rsp, qword_ptr(8).gs()).unwrap();
    for register in [rcx, r11, rbx] {
        a.push(register).unwrap();
    }
    a.inc(qword_ptr(24).gs()).unwrap();
    a.mov(r8, qword_ptr(24).gs()).unwrap();
    a.mov(r9, qword_ptr(16).gs()).unwrap();
    // The page that was demanded last goes.
    a.mov(rax, r13).unwrap();
    a.shr(rax, 44).unwrap();
    a.and(eax, 0xff).unwrap();
    a.mov(ecx, r9d).unwrap();
    a.shl(ecx, 8).unwrap();
    a.add(eax, ecx).unwrap();
    a.mov(edi, DEMANDED_TABLE as u32).unwrap();
    a.mov(rcx, qword_ptr(rdi + rax * 8)).unwrap();
    fold(a, rcx);
    a.mov(qword_ptr(rdi + rax * 8), 0).unwrap();
    a.shl(eax, 12).unwrap();
    a.add(eax, DEMANDED as i32).unwrap();
    a.invlpg(ptr(rax)).unwrap();
    a.test(r8d, 7).unwrap();
    a.jne(no_flush).unwrap();
    a.mov(rax, cr3).unwrap();
    a.mov(cr3, rax).unwrap();
    a.set_label(&mut no_flush).unwrap();
    a.mov(rax, cr0).unwrap();
    a.or(eax, 8).unwrap();
    a.mov(cr0, rax).unwrap();
    a.smsw(ecx).unwrap();
    fold(a, rcx);
    a.clts().unwrap();
    a.mov(dr0, r8).unwrap();
    a.mov(rax, dr6).unwrap();
    fold(a, rax);
    a.mov(eax, 2).unwrap();
    a.mov(cr8, rax).unwrap();
    a.xor(eax, eax).unwrap();
    a.mov(cr8, rax).unwrap();
    a.sgdt(ptr(rsp - 64)).unwrap();
    a.mov(rax, qword_ptr(rsp - 64)).unwrap();
    fold(a, rax);
    a.str(eax).unwrap();
    fold(a, rax);
    look_around(a);
    if vcpus > 1 {
        ask_the_other(a);
    }
    use_devices(a);
    // Every fourth turn it rests.
    a.test(r8d, 3).unwrap();
    a.jne(awake).unwrap();
    a.sti().unwrap();
    a.hlt().unwrap();
    a.cli().unwrap();
    a.set_label(&mut awake).unwrap();
    for register in [rbx, r11, rcx] {
        a.pop(register).unwrap();
    }
    a.mov(rsp, qword_ptr(0).gs()).unwrap();
    a.swapgs().unwrap();
    a.sysretq().unwrap();
}

/// Segments, a far return, MSRs and CPUID.
fn look_around(a: &mut CodeAssembler) {
    let mut far = a.create_label();
    for selector in [USER_CS, USER_SS, KERNEL_CS, 0x40, 0x1000] {
        a.mov(ecx, u32::from(selector)).unwrap();
        a.lar(eax, ecx).unwrap();
        a.lsl(edx, ecx).unwrap();
        a.verw(cx).unwrap();
        a.pushfq().unwrap();
        a.add(rax, qword_ptr(rsp)).unwrap();
        a.add(rax, rdx).unwrap();
        a.popfq().unwrap();
        fold(a, rax);
    }
    a.mov(eax, u32::from(USER_SS)).unwrap();
    a.mov(ds, eax).unwrap();
    a.push(i32::from(KERNEL_CS)).unwrap();
    a.lea(rax, ptr(far)).unwrap();
    a.push(rax).unwrap();
    a.db(&[0x48, 0xcb]).unwrap();
    a.set_label(&mut far).unwrap();
    for msr in [0x10, 0x1b, 0x277, 0xc000_0101, 0xc000_0080u32] {
        a.mov(ecx, msr).unwrap();
        a.rdmsr().unwrap();
        fold(a, rax);
    }
    a.mov(eax, r8d).unwrap();
    a.and(eax, 7).unwrap();
    a.xor(ecx, ecx).unwrap();
    a.cpuid().unwrap();
    for register in [rax, rbx, rcx, rdx] {
        fold(a, register);
    }
}

/// An IPI to the other processor, every fourth turn.
fn ask_the_other(a: &mut CodeAssembler) {
    let mut quiet = a.create_label();
    a.mov(eax, r8d).unwrap();
    a.and(eax, 3).unwrap();
    a.cmp(eax, 1).unwrap();
    a.jne(quiet).unwrap();
    a.mov(rdi, LAPIC).unwrap();
    a.mov(eax, r9d).unwrap();
    a.xor(eax, 1).unwrap();
    a.shl(eax, 24).unwrap();
    a.mov(dword_ptr(rdi + 0x310), eax).unwrap();
    a.mov(dword_ptr(rdi + 0x300), 0x4050).unwrap();
    a.set_label(&mut quiet).unwrap();
}

/// The first processor writes and reads a sector by turns, asks for entropy, and says a letter.
fn use_devices(a: &mut CodeAssembler) {
    let (mut done, mut no_disk) = (a.create_label(), a.create_label());
    a.test(r9d, r9d).unwrap();
    a.jne(done).unwrap();
    a.mov(edx, 0x3f8).unwrap();
    a.mov(eax, r8d).unwrap();
    a.and(eax, 63).unwrap();
    a.add(eax, 33).unwrap();
    a.out(dx, al).unwrap();
    a.test(r8d, 2).unwrap();
    a.jne(no_disk).unwrap();
    a.mov(edi, SECTOR as u32).unwrap();
    a.mov(rax, qword_ptr(rdi + 8)).unwrap();
    fold(a, rax);
    a.mov(qword_ptr(rdi), r12).unwrap();
    a.mov(edi, RINGS as u32).unwrap();
    // OUT where the available index is even, IN where it is odd.
    a.movzx(eax, word_ptr(rdi + 0x102)).unwrap();
    a.mov(ecx, eax).unwrap();
    a.and(ecx, 1).unwrap();
    a.xor(ecx, 1).unwrap();
    a.mov(dword_ptr(rdi + 0xc00), ecx).unwrap();
    a.mov(ecx, eax).unwrap();
    a.shr(ecx, 1).unwrap();
    a.and(ecx, 0x3f).unwrap();
    a.mov(qword_ptr(rdi + 0xc08), rcx).unwrap();
    a.inc(eax).unwrap();
    a.mov(word_ptr(rdi + 0x102), ax).unwrap();
    a.mov(edi, DISK).unwrap();
    a.mov(dword_ptr(rdi + 0x50), 0).unwrap();
    a.set_label(&mut no_disk).unwrap();
    a.test(r8d, 4).unwrap();
    a.jne(done).unwrap();
    a.mov(edi, ENTROPY_RINGS as u32).unwrap();
    a.inc(word_ptr(rdi + 0x102)).unwrap();
    a.mov(edi, ENTROPY).unwrap();
    a.mov(dword_ptr(rdi + 0x50), 0).unwrap();
    a.mov(edi, RANDOM as u32).unwrap();
    a.mov(rax, qword_ptr(rdi)).unwrap();
    fold(a, rax);
    a.set_label(&mut done).unwrap();
}

/// Exceptions: a page that was demanded is mapped; the user goes on at R15 after anything else; the kernel has none.
fn faults(a: &mut CodeAssembler) -> Vec<(u8, CodeLabel)> {
    let (mut any, mut skip, mut lost) = (a.create_label(), a.create_label(), a.create_label());
    let mut gates = Vec::new();
    for vector in 0..20u8 {
        let mut label = a.create_label();
        a.set_label(&mut label).unwrap();
        if !matches!(vector, 8 | 10..=14 | 17) {
            a.push(0).unwrap();
        }
        a.push(i32::from(vector)).unwrap();
        a.jmp(any).unwrap();
        gates.push((vector, label));
    }
    a.set_label(&mut any).unwrap();
    a.test(byte_ptr(rsp + 24), 3).unwrap();
    a.je(lost).unwrap();
    a.push(rax).unwrap();
    a.push(rcx).unwrap();
    a.mov(rax, cr2).unwrap();
    a.cmp(dword_ptr(rsp + 16), 14).unwrap();
    a.jne(skip).unwrap();
    a.test(byte_ptr(rsp + 24), 1).unwrap();
    a.jne(skip).unwrap();
    a.sub(rax, DEMANDED as i32).unwrap();
    a.cmp(rax, 0x20_0000).unwrap();
    a.jae(skip).unwrap();
    a.shr(eax, 12).unwrap();
    a.mov(ecx, eax).unwrap();
    a.shl(ecx, 12).unwrap();
    a.add(ecx, DEMANDED as i32 + 7).unwrap();
    a.push(rdx).unwrap();
    a.mov(edx, DEMANDED_TABLE as u32).unwrap();
    a.mov(qword_ptr(rdx + rax * 8), rcx).unwrap();
    for register in [rdx, rcx, rax] {
        a.pop(register).unwrap();
    }
    a.add(rsp, 16).unwrap();
    a.iretq().unwrap();
    a.set_label(&mut skip).unwrap();
    a.mov(rcx, qword_ptr(rsp + 16)).unwrap();
    a.mov(eax, COUNTS as u32).unwrap();
    a.lock().inc(qword_ptr(rax + rcx * 8)).unwrap();
    fold(a, rcx);
    a.mov(rcx, qword_ptr(rsp + 24)).unwrap();
    fold(a, rcx);
    a.mov(qword_ptr(rsp + 32), r15).unwrap();
    a.pop(rcx).unwrap();
    a.pop(rax).unwrap();
    a.add(rsp, 16).unwrap();
    a.iretq().unwrap();
    // Asleep for ever: who records it notices.
    a.set_label(&mut lost).unwrap();
    a.cli().unwrap();
    a.hlt().unwrap();
    a.jmp(lost).unwrap();
    gates
}

fn interrupts(a: &mut CodeAssembler) -> Vec<(u8, CodeLabel)> {
    let mut gates = Vec::new();
    type Handler = fn(&mut CodeAssembler);
    let handlers: [(u8, Handler); 7] = [
        (0x40, |_| {}),
        (0x41, typed),
        (0x42, packet),
        (0x43, |a| acknowledge(a, DISK)),
        (0x44, |a| acknowledge(a, ENTROPY)),
        (0x50, |a| {
            a.mov(edi, SHARED as u32).unwrap();
            a.lock().inc(qword_ptr(rdi + 0x58)).unwrap();
        }),
        (0xff, |_| {}),
    ];
    for (vector, handle) in handlers {
        let mut label = a.create_label();
        a.set_label(&mut label).unwrap();
        let used = [rax, rcx, rdx, rsi, rdi];
        used.into_iter().for_each(|register| a.push(register).unwrap());
        a.cld().unwrap();
        handle(a);
        // When it came is seen too.
        a.rdtsc().unwrap();
        a.mov(ecx, SHARED as u32).unwrap();
        a.lock().add(qword_ptr(rcx + 0x50), rax).unwrap();
        a.mov(eax, COUNTS as u32).unwrap();
        a.lock().inc(qword_ptr(rax + 0x100 + i32::from(vector) * 8)).unwrap();
        if vector != 0xff {
            a.mov(rdi, LAPIC).unwrap();
            a.mov(dword_ptr(rdi + 0xb0), 0).unwrap();
        }
        used.into_iter().rev().for_each(|register| a.pop(register).unwrap());
        a.iretq().unwrap();
        gates.push((vector, label));
    }
    gates
}

/// All that waits in the serial port is mixed, and echoed.
fn typed(a: &mut CodeAssembler) {
    let (mut more, mut empty) = (a.create_label(), a.create_label());
    a.mov(edi, SHARED as u32).unwrap();
    a.set_label(&mut more).unwrap();
    a.mov(edx, 0x3fd).unwrap();
    a.in_(al, dx).unwrap();
    a.test(al, 1).unwrap();
    a.je(empty).unwrap();
    a.mov(edx, 0x3f8).unwrap();
    a.in_(al, dx).unwrap();
    a.out(dx, al).unwrap();
    a.movzx(eax, al).unwrap();
    a.lock().add(qword_ptr(rdi + 0x60), rax).unwrap();
    a.rol(qword_ptr(rdi + 0x60), 7).unwrap();
    a.jmp(more).unwrap();
    a.set_label(&mut empty).unwrap();
    a.mov(edx, 0x3fa).unwrap();
    a.in_(al, dx).unwrap();
}

fn acknowledge(a: &mut CodeAssembler, window: u32) {
    a.mov(edi, window).unwrap();
    a.mov(eax, dword_ptr(rdi + 0x60)).unwrap();
    a.mov(dword_ptr(rdi + 0x64), eax).unwrap();
}

/// The newest packet is mixed and sent back; all buffers are the card's again.
fn packet(a: &mut CodeAssembler) {
    let mut nothing = a.create_label();
    acknowledge(a, CARD);
    a.mov(esi, RECEIVED as u32).unwrap();
    a.movzx(eax, word_ptr(rsi + 0x202)).unwrap();
    // What was sent interrupts too; what was seen is remembered behind the available ring.
    a.cmp(ax, word_ptr(rsi + 0x120)).unwrap();
    a.je(nothing).unwrap();
    a.mov(word_ptr(rsi + 0x120), ax).unwrap();
    a.lea(ecx, ptr(rax + ENTRIES as i32)).unwrap();
    a.mov(word_ptr(rsi + 0x102), cx).unwrap();
    a.dec(eax).unwrap();
    a.and(eax, ENTRIES as i32 - 1).unwrap();
    a.imul_3(esi, eax, PACKET_BYTES as i32).unwrap();
    a.add(esi, PACKETS as i32).unwrap();
    a.mov(rax, qword_ptr(rsi + 12)).unwrap();
    a.mov(ecx, SHARED as u32).unwrap();
    a.lock().add(qword_ptr(rcx + 0x68), rax).unwrap();
    a.mov(edx, edi).unwrap();
    a.mov(edi, SENT_PACKET as u32).unwrap();
    a.mov(ecx, 76).unwrap();
    a.rep().movsb().unwrap();
    a.mov(esi, SENT as u32).unwrap();
    a.inc(word_ptr(rsi + 0x102)).unwrap();
    a.mov(dword_ptr(rdx + 0x50), 0).unwrap();
    a.mov(dword_ptr(rdx + 0x50), 1).unwrap();
    a.set_label(&mut nothing).unwrap();
}

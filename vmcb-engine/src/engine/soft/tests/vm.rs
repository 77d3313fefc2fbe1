//! VMRUN of a VMCB: each intercept's exit, injection, nested page faults, and a host that runs on the processor itself.

use iced_x86::code_asm::*;

use super::*;
use crate::engine::soft::svm::enter::HostTsc;
use crate::vmcb::{Event, Intercept, IoInfo, Vmcb, npf};

const HOST: HostTsc = HostTsc(0);

/// A guest in 64-bit mode over the tables of [`Bare`], nested paging off, with one intercept.
fn vmcb(bare: &mut Bare, intercepts: &[Intercept]) -> Box<Vmcb> {
    let mut vmcb = Vmcb::boxed();
    long_state(&bare.memory, CODE).to_vmcb(&mut vmcb);
    vmcb.control.guest_asid = 1;
    vmcb.control.set_intercept(Intercept::VMRUN, true);
    vmcb.control.set_intercept(Intercept::HLT, true);
    for which in intercepts {
        vmcb.control.set_intercept(*which, true);
    }
    bare.core.vmload(&vmcb.save);
    vmcb
}

fn exit_of(program: impl FnOnce(&mut CodeAssembler), intercepts: &[Intercept]) -> Box<Vmcb> {
    let mut bare = Bare::new(program);
    handlers(&bare.memory, 0..256);
    let mut vmcb = vmcb(&mut bare, intercepts);
    bare.core.vmrun(&mut vmcb, HOST, 1000);
    vmcb
}

#[test]
fn each_intercept_exits_with_its_code_info_and_next_rip() {
    type Program = fn(&mut CodeAssembler);
    let mov_cr = 1 << 63;
    let rows: &[(Intercept, Program, ExitCode, u64)] = &[
        (Intercept::cr_read(0), |a| a.mov(rbx, cr0).unwrap(), ExitCode::cr_read(0), mov_cr | 3),
        (Intercept::cr_write(3), |a| a.mov(cr3, rcx).unwrap(), ExitCode::cr_write(3), mov_cr | 1),
        (Intercept::cr_write(8), |a| a.mov(cr8, r9).unwrap(), ExitCode::cr_write(8), mov_cr | 9),
        (Intercept::cr_write(0), |a| a.clts().unwrap(), ExitCode::cr_write(0), 0),
        (Intercept::cr_read(0), |a| a.smsw(eax).unwrap(), ExitCode::cr_read(0), 0),
        (Intercept::dr_read(7), |a| a.mov(rbx, dr7).unwrap(), ExitCode::dr_read(7), 3),
        (Intercept::dr_write(0), |a| a.mov(dr0, rsi).unwrap(), ExitCode::dr_write(0), 6),
        (Intercept::CPUID, |a| a.cpuid().unwrap(), ExitCode::CPUID, 0),
        (Intercept::HLT, |a| a.hlt().unwrap(), ExitCode::HLT, 0),
        (Intercept::RDTSC, |a| a.rdtsc().unwrap(), ExitCode::RDTSC, 0),
        (Intercept::RDTSCP, |a| a.rdtscp().unwrap(), ExitCode::RDTSCP, 0),
        (Intercept::RDPMC, |a| a.rdpmc().unwrap(), ExitCode::RDPMC, 0),
        (Intercept::PUSHF, |a| a.pushfq().unwrap(), ExitCode::PUSHF, 0),
        (Intercept::POPF, |a| a.popfq().unwrap(), ExitCode::POPF, 0),
        (Intercept::IRET, |a| a.iretq().unwrap(), ExitCode::IRET, 0),
        (Intercept::INTN, |a| a.int(0x80).unwrap(), ExitCode::SWINT, 0x80),
        (Intercept::INVD, |a| a.invd().unwrap(), ExitCode::INVD, 0),
        (Intercept::WBINVD, |a| a.wbinvd().unwrap(), ExitCode::WBINVD, 0),
        (Intercept::PAUSE, |a| a.pause().unwrap(), ExitCode::PAUSE, 0),
        (Intercept::INVLPG, |a| a.invlpg(byte_ptr(0x1234)).unwrap(), ExitCode::INVLPG, 0x1234),
        (Intercept::INVLPGA, |a| a.invlpga().unwrap(), ExitCode::INVLPGA, 0),
        (Intercept::VMRUN, |a| a.vmrun().unwrap(), ExitCode::VMRUN, 0),
        (Intercept::VMLOAD, |a| a.vmload().unwrap(), ExitCode::VMLOAD, 0),
        (Intercept::VMSAVE, |a| a.vmsave().unwrap(), ExitCode::VMSAVE, 0),
        (Intercept::VMMCALL, |a| a.vmmcall().unwrap(), ExitCode::VMMCALL, 0),
        (Intercept::STGI, |a| a.stgi().unwrap(), ExitCode::STGI, 0),
        (Intercept::CLGI, |a| a.clgi().unwrap(), ExitCode::CLGI, 0),
        (Intercept::MONITOR, |a| a.monitor().unwrap(), ExitCode::MONITOR, 0),
        (Intercept::MWAIT, |a| a.mwait().unwrap(), ExitCode::MWAIT, 0),
        (Intercept::IDTR_READ, |a| a.sidt(ptr(rbx)).unwrap(), ExitCode::IDTR_READ, 0),
        (Intercept::GDTR_READ, |a| a.sgdt(ptr(rbx)).unwrap(), ExitCode::GDTR_READ, 0),
        (Intercept::LDTR_READ, |a| a.sldt(eax).unwrap(), ExitCode::LDTR_READ, 0),
        (Intercept::TR_READ, |a| a.str(eax).unwrap(), ExitCode::TR_READ, 0),
        (Intercept::IDTR_WRITE, |a| a.lidt(ptr(rbx)).unwrap(), ExitCode::IDTR_WRITE, 0),
        (Intercept::GDTR_WRITE, |a| a.lgdt(ptr(rbx)).unwrap(), ExitCode::GDTR_WRITE, 0),
        (Intercept::LDTR_WRITE, |a| a.lldt(ax).unwrap(), ExitCode::LDTR_WRITE, 0),
        (Intercept::TR_WRITE, |a| a.ltr(ax).unwrap(), ExitCode::TR_WRITE, 0),
        (Intercept::ICEBP, |a| a.int1().unwrap(), ExitCode::ICEBP, 0),
        // No map of MSRs or ports is RAM at 0 that is all zero: the first pages hold what `Bare` wrote there.
        (Intercept::exception(3), |a| a.int3().unwrap(), ExitCode::exception(3), 0),
    ];
    for (which, program, code, info1) in rows {
        let length = assemble(64, CODE, program).len() as u64;
        let vmcb = exit_of(program, &[*which]);
        let control = &vmcb.control;
        assert_eq!(control.exit_code(), *code, "{which:?}");
        assert_eq!(control.exitinfo1, *info1, "{which:?}");
        assert_eq!((vmcb.save.rip, control.nrip), (CODE, CODE + length), "{which:?}");
        assert_eq!(control.exitintinfo, 0, "{which:?}");
    }
}

#[test]
fn selective_writes_of_cr0_let_ts_and_mp_pass() {
    let vmcb = exit_of(
        |a| {
            a.mov(rax, cr0).unwrap();
            a.xor(eax, 0b1010).unwrap();
            a.mov(cr0, rax).unwrap();
            a.xor(eax, 1 << 18).unwrap();
            a.mov(cr0, rax).unwrap();
        },
        &[Intercept::CR0_SEL_WRITE],
    );
    assert_eq!(vmcb.control.exit_code(), ExitCode::CR0_SEL_WRITE);
    assert_eq!(vmcb.save.cr0 & 0b1000, 0b1000);
}

#[test]
fn exceptions_exit_with_error_code_and_address_and_without_cr2() {
    let vmcb = exit_of(|a| a.mov(byte_ptr(0x4000_0123), al).unwrap(), &[Intercept::exception(14)]);
    let control = &vmcb.control;
    assert_eq!(control.exit_code(), ExitCode::exception(14));
    assert_eq!((control.exitinfo1, control.exitinfo2), (2, 0x4000_0123));
    assert_eq!((vmcb.save.cr2, vmcb.save.rip, control.nrip), (0, CODE, 0));
}

#[test]
fn a_fault_in_the_middle_of_a_delivery_reports_the_event() {
    let mut bare = Bare::new(|a| a.ud2().unwrap());
    let mut vmcb = vmcb(&mut bare, &[Intercept::exception(14)]);
    vmcb.save.rsp = 0x4000_1000;
    bare.core.vmrun(&mut vmcb, HOST, 1000);
    let control = &vmcb.control;
    assert_eq!((control.exit_code(), control.exitinfo2), (ExitCode::exception(14), 0x4000_1000 - 40));
    assert_eq!(control.interrupted_event(), Event::exception(6, None));
}

#[test]
fn ports_exit_with_the_whole_description_of_the_access() {
    type Program = fn(&mut CodeAssembler);
    let io = |input, string, rep, size, port| IoInfo { input, string, rep, size, address_size: 8, segment: 3, port };
    let plain = |input, size, port| IoInfo { segment: 0, ..io(input, false, false, size, port) };
    let rows: &[(Program, IoInfo)] = &[
        (|a| a.in_(al, 0x60).unwrap(), plain(true, 1, 0x60)),
        (|a| a.out(0x80, ax).unwrap(), plain(false, 2, 0x80)),
        (|a| a.in_(eax, dx).unwrap(), plain(true, 4, 0xcf8)),
        (|a| a.outsb().unwrap(), io(false, true, false, 1, 0xcf8)),
        (|a| a.rep().outsd().unwrap(), io(false, true, true, 4, 0xcf8)),
        (|a| a.rep().insw().unwrap(), IoInfo { segment: 0, ..io(true, true, true, 2, 0xcf8) }),
    ];
    for (index, (program, expected)) in rows.iter().enumerate() {
        let mut bare = Bare::new(program);
        let mut vmcb = vmcb(&mut bare, &[Intercept::IOIO_PROT]);
        let map = bare.core.arena.allocate(3);
        bare.core.arena.slice_mut(map, 0x3000).unwrap().fill(0xff);
        vmcb.control.iopm_base_pa = map;
        bare.core.gprs[2] = 0xcf8;
        bare.core.gprs[1] = 4;
        bare.core.vmrun(&mut vmcb, HOST, 1000);
        assert_eq!(vmcb.control.exit_code(), ExitCode::IOIO, "row {index}");
        assert_eq!(IoInfo::decode(vmcb.control.exitinfo1), Some(*expected), "row {index}");
        let length = assemble(64, CODE, program).len() as u64;
        assert_eq!((vmcb.control.exitinfo2, vmcb.control.nrip), (CODE + length, CODE + length), "row {index}");
    }
}

#[test]
fn permission_maps_let_pass_what_they_allow() {
    let mut bare = Bare::new(|a| {
        a.in_(al, 0x60).unwrap();
        a.mov(ecx, 0xc000_0100_u32).unwrap();
        a.rdmsr().unwrap();
        a.wrmsr().unwrap();
        a.hlt().unwrap();
    });
    let mut vmcb = vmcb(&mut bare, &[Intercept::IOIO_PROT, Intercept::MSR_PROT]);
    let maps = bare.core.arena.allocate(5);
    (vmcb.control.iopm_base_pa, vmcb.control.msrpm_base_pa) = (maps, maps + 0x3000);
    let bit = crate::vmcb::permission::msrpm_bit(0xc000_0100, crate::vmcb::MsrAccess::Write).unwrap();
    bare.core.arena.slice_mut(maps + 0x3000, 0x2000).unwrap()[bit / 8] |= 1 << (bit % 8);
    bare.core.vmrun(&mut vmcb, HOST, 1000);
    assert_eq!((vmcb.control.exit_code(), vmcb.control.exitinfo1), (ExitCode::MSR, 1));
    assert_eq!(vmcb.save.rip, CODE + 9);
}

#[test]
fn injected_events_arrive_before_the_first_instruction() {
    for (event, vector, error) in [
        (Event::interrupt(0x40), 0x40, None),
        (Event::nmi(), 2, None),
        (Event::exception(13, Some(0x18)), 13, Some(0x18)),
        (Event::exception(3, None), 3, None),
    ] {
        let mut bare = Bare::new(|a| a.ud2().unwrap());
        handlers(&bare.memory, 0..256);
        let mut vmcb = vmcb(&mut bare, &[]);
        vmcb.control.eventinj = event.0;
        bare.core.vmrun(&mut vmcb, HOST, 1000);
        assert_eq!(vmcb.control.exit_code(), ExitCode::HLT);
        assert_eq!(vmcb.save.rip, HANDLERS + vector * 16);
        let skip = if let Some(error) = error {
            assert_eq!(get(&bare.memory, vmcb.save.rsp), error);
            8
        } else {
            0
        };
        assert_eq!(get(&bare.memory, vmcb.save.rsp + skip), CODE);
        assert_eq!(vmcb.control.eventinj, 0);
    }
}

#[test]
fn illegal_vmcbs_are_refused_with_all_sixty_four_bits() {
    let mut bare = Bare::new(|a| a.hlt().unwrap());
    let mut vmcb = vmcb(&mut bare, &[]);
    vmcb.save.efer &= !efer::SVME;
    assert_eq!(bare.core.vmrun(&mut vmcb, HOST, 1000), ExitCode::INVALID);
    assert_eq!(vmcb.control.exitcode, u64::MAX);
}

#[test]
fn virtual_interrupts_are_taken_or_intercepted_when_the_guest_can() {
    use crate::vmcb::control::{V_INTR_PRIO, V_INTR_VECTOR, V_IRQ, V_TPR};
    let program = |a: &mut CodeAssembler| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.ud2().unwrap();
    };
    let run = |intercept: &[Intercept], priority: u64| {
        let mut bare = Bare::new(program);
        handlers(&bare.memory, 0..256);
        let mut vmcb = vmcb(&mut bare, intercept);
        V_IRQ.put(&mut vmcb.control.vintr, 1);
        V_INTR_VECTOR.put(&mut vmcb.control.vintr, 0x55);
        V_INTR_PRIO.put(&mut vmcb.control.vintr, 5);
        V_TPR.put(&mut vmcb.control.vintr, priority);
        bare.core.vmrun(&mut vmcb, HOST, 1000);
        vmcb
    };
    let taken = run(&[], 4);
    assert_eq!(taken.save.rip, HANDLERS + 0x55 * 16);
    assert!(!V_IRQ.is_set(taken.control.vintr));
    let seen = run(&[Intercept::VINTR], 4);
    assert_eq!((seen.control.exit_code(), seen.save.rip), (ExitCode::VINTR, CODE + 3));
    assert!(V_IRQ.is_set(seen.control.vintr));
    let held = run(&[], 5);
    assert_eq!(held.save.rip, HANDLERS + 6 * 16);
    assert!(V_IRQ.is_set(held.control.vintr));
}

#[test]
fn the_shadow_of_sti_is_reported_by_the_exit_of_the_next_instruction() {
    let vmcb = exit_of(
        |a| {
            a.sti().unwrap();
            a.hlt().unwrap();
        },
        &[],
    );
    assert_eq!((vmcb.control.exit_code(), vmcb.save.rip), (ExitCode::HLT, CODE + 1));
    assert!(vmcb.control.in_interrupt_shadow());
}

/// Nested tables in the arena: the first GiB in 2 MiB pages, identity, with `bits` for the page at 20 0000h.
fn nest(core: &mut Core, vmcb: &mut Vmcb, bits: u64) -> u64 {
    let root = core.arena.allocate(3);
    core.arena.write_u64(root, (root + 0x1000) | 7);
    core.arena.write_u64(root + 0x1000, (root + 0x2000) | 7);
    for page in 0..8 {
        core.arena.write_u64(root + 0x2000 + page * 8, page << 21 | 0x87);
    }
    core.arena.write_u64(root + 0x2008, 1 << 21 | bits);
    (vmcb.control.np_enable, vmcb.control.n_cr3) = (1, root);
    root
}

#[test]
fn nested_page_faults_say_what_was_tried_and_where() {
    type Program = fn(&mut CodeAssembler);
    let final_user = npf::FINAL.mask() | npf::USER.mask();
    let rows: &[(Program, u64, u64, u64)] = &[
        (|a| a.mov(eax, dword_ptr(0x20_0010)).unwrap(), 0, final_user, 0x20_0010),
        (|a| a.mov(dword_ptr(0x20_0010), eax).unwrap(), 0, final_user | 2, 0x20_0010),
        (|a| a.mov(dword_ptr(0x20_0010), eax).unwrap(), 0x85, final_user | 3, 0x20_0010),
        (|a| a.mov(eax, dword_ptr(0x20_0010)).unwrap(), 0x83, final_user | 1, 0x20_0010),
        (|a| a.mov(eax, dword_ptr(0x20_0010)).unwrap(), 0x87 | 1 << 13, final_user | 9, 0x20_0010),
        (|a| a.jmp(0x20_0040).unwrap(), 0x87 | 1 << 63, final_user | 17, 0x20_0040),
        (|a| a.mov(eax, dword_ptr(DEVICE)).unwrap(), 0x87, final_user, DEVICE),
    ];
    for (index, (program, bits, info1, info2)) in rows.iter().enumerate() {
        let mut bare = Bare::new(program);
        let mut vmcb = vmcb(&mut bare, &[]);
        nest(&mut bare.core, &mut vmcb, *bits);
        bare.core.vmrun(&mut vmcb, HOST, 1000);
        let control = &vmcb.control;
        assert_eq!(control.exit_code(), ExitCode::NPF, "row {index}");
        assert_eq!((control.exitinfo1, control.exitinfo2), (*info1, *info2), "row {index}");
    }
}

#[test]
fn a_guest_page_table_that_may_not_be_written_faults_as_a_table() {
    let mut bare = Bare::new(|a| a.hlt().unwrap());
    let mut vmcb = vmcb(&mut bare, &[]);
    nest(&mut bare.core, &mut vmcb, 0x85);
    vmcb.save.cr3 = 0x20_0000;
    bare.core.vmrun(&mut vmcb, HOST, 1000);
    assert_eq!(vmcb.control.exit_code(), ExitCode::NPF);
    assert_eq!(vmcb.control.exitinfo1, npf::GUEST_TABLE.mask() | 7);
    assert_eq!(vmcb.control.exitinfo2, 0x20_0000);
}

#[test]
fn nested_tables_get_their_accessed_and_dirty_bits() {
    let mut bare = Bare::new(|a| {
        a.mov(eax, dword_ptr(0x20_0010)).unwrap();
        a.hlt().unwrap();
    });
    let mut vmcb = vmcb(&mut bare, &[]);
    let root = nest(&mut bare.core, &mut vmcb, 0x87);
    bare.core.vmrun(&mut vmcb, HOST, 1000);
    assert_eq!(vmcb.control.exit_code(), ExitCode::HLT);
    assert_eq!(bare.core.arena.read_u64(root + 0x2008), Some(0x20_00a7));
    assert_eq!(bare.core.arena.read_u64(root).map(|entry| entry & 0xfff), Some(0x27));
}

#[test]
fn software_on_the_processor_runs_a_guest_of_its_own() {
    const VMCB: u64 = 0x30_0000;
    let mut bare = Bare::new(|a| {
        a.mov(rax, VMCB).unwrap();
        a.vmload().unwrap();
        a.vmrun().unwrap();
        a.vmsave().unwrap();
        a.mov(rbx, qword_ptr(VMCB + 0x70)).unwrap();
        a.hlt().unwrap();
    });
    bare.core.efer |= efer::SVME;
    bare.memory
        .write(
            CODE + 0x800,
            &assemble(64, CODE + 0x800, |a| {
                a.mov(eax, 77).unwrap();
                a.cpuid().unwrap();
            }),
        )
        .unwrap();
    let mut vmcb = vmcb(&mut bare, &[Intercept::CPUID]);
    vmcb.save.rip = CODE + 0x800;
    bare.memory.write(VMCB, vmcb.as_page()).unwrap();
    bare.halt();
    assert_eq!(bare.core.gprs[3], ExitCode::CPUID.0);
    assert_eq!(bare.core.gprs[0], VMCB);
    assert_eq!(get(&bare.memory, VMCB + 0x400 + 0x1f8), 77);
    assert_eq!(get(&bare.memory, VMCB + 0xc8), CODE + 0x807);
    assert!(!bare.core.control.gif);
}

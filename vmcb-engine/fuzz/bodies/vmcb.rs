//! Any 4096 bytes as a VMCB: described, compared, checked, its registers written and read, and run on the software processor.
//!
//! Bytes that the input lacks are zero. What follows byte 4096 is put into guest memory at [`CODE`], where the seeds run.

use vmcb_engine::cpu::CpuState;
use vmcb_engine::engine::soft::core::Core;
use vmcb_engine::engine::soft::svm::enter::HostTsc;
use vmcb_engine::vmcb::check::{Limits, violations};
use vmcb_engine::vmcb::decode::{describe, diff};
use vmcb_engine::vmcb::{Access, ExitCode, Intercept, Register, SegmentRegister, Snapshot, Vmcb, Width, registers};

/// Where the seeds' code lies.
const CODE: u64 = 0x20_0000;
const INSTRUCTIONS: u64 = 200;

/// Takes any bytes.
pub fn run(data: &[u8]) {
    let (page, code) = data.split_at(data.len().min(4096));
    let mut bytes = [0; 4096];
    bytes[..page.len()].copy_from_slice(page);
    let vmcb = Vmcb::from_bytes(&bytes);
    for row in describe(&vmcb) {
        assert!(!row.field.is_empty() && !row.value.is_empty(), "{row:?}");
    }
    assert_eq!(diff(&vmcb, &vmcb), []);
    assert_eq!(diff(&vmcb, &Vmcb::default()).is_empty(), bytes == [0; 4096]);
    for limits in [Limits::full(48), Limits::full(64), vmcb_engine::capability::soft_v1::LIMITS] {
        violations(&vmcb, limits).iter().for_each(|violation| drop(violation.to_string()));
    }
    registers_are_read_back(&vmcb);
    state_survives(&vmcb);
    enter(&vmcb, code);
}

/// Whether VMRUN takes the VMCB and the guest retires an instruction.
pub fn runs(data: &[u8]) -> bool {
    let (page, code) = data.split_at(4096);
    let vmcb = Vmcb::from_bytes(page.try_into().expect("4096 bytes"));
    enter(&vmcb, code) > 0
}

fn registers_are_read_back(vmcb: &Vmcb) {
    let mut copy = vmcb.clone();
    let segments = SegmentRegister::ALL.into_iter().map(Register::Selector);
    for register in Register::NAMED.iter().copied().chain(segments) {
        let value = copy.read(register);
        copy.write(register, !value);
        assert_eq!(copy.read(register) & 0xffff, !value & 0xffff, "{register:?}");
        copy.write(register, value);
    }
    for offset in (0..4096).step_by(509) {
        for width in [Width::Byte, Width::Word, Width::Double, Width::Quad] {
            let Some(access) = Access::new(offset, width) else { continue };
            let value = copy.read_any(access);
            copy.write_any(access, value);
            assert_eq!(copy.read_any(access), value);
        }
    }
    let mut saved = Vec::new();
    for segment in SegmentRegister::ALL {
        let descriptor = copy.descriptor(segment);
        copy.set_descriptor(segment, descriptor);
        copy.snapshot_segment(segment, &mut Snapshot::Save(&mut saved)).expect("a buffer has room");
    }
    let mut rest = Snapshot::Restore(&saved);
    SegmentRegister::ALL.into_iter().for_each(|segment| copy.snapshot_segment(segment, &mut rest).expect("as saved"));
}

/// What a VMCB says of a CPU survives a second way through it.
fn state_survives(vmcb: &Vmcb) {
    let mut state = CpuState::reset();
    state.from_vmcb(vmcb);
    let mut page = vmcb.clone();
    state.to_vmcb(&mut page);
    let mut again = state.clone();
    again.from_vmcb(&page);
    assert_eq!(state.compare(&again), []);
    let _ = CpuState::from_bytes(&state.to_bytes());
}

/// Instructions that retire.
fn enter(vmcb: &Vmcb, code: &[u8]) -> u64 {
    let memory = super::memory();
    memory.write(CODE, &code[..code.len().min(4096)]).expect("RAM is there");
    let mut core = Core::bare(memory);
    let mut vmcb = vmcb.clone();
    for stop in [INSTRUCTIONS / 2, INSTRUCTIONS] {
        core.vmload(&vmcb.save);
        let exit = core.vmrun(&mut vmcb, HostTsc(0), stop);
        assert!(core.retired() <= stop, "{} instructions retired, at most {stop} were asked for", core.retired());
        assert_eq!(vmcb.control.exit_code(), exit);
        describe(&vmcb);
        core.vmsave(&mut vmcb.save);
        if exit == ExitCode::INVALID {
            break;
        }
    }
    core.retired()
}

fn legal() -> Vmcb {
    let mut vmcb = Vmcb::default();
    vmcb_engine::capability::soft_v1::power_up(&vmcb_engine::capability::Topology {
        vcpu: 0,
        vcpus: 1,
        tsc_hz: 1_000_000_000,
    })
    .to_vmcb(&mut vmcb);
    vmcb.control.set_intercept(Intercept::VMRUN, true);
    vmcb.control.guest_asid = 1;
    vmcb.save.cs.base = CODE;
    vmcb.save.rip = 0;
    vmcb
}

/// Nothing; a real-mode guest; a 64-bit guest over the tables of `Core::bare`; one with nested paging; one with an event.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use registers::{cr0, cr4, efer};
    let with_code = |vmcb: &Vmcb, code: &[u8]| [vmcb.as_page().as_slice(), code].concat();
    let real = legal();
    let mut long = legal();
    long.save.cr0 = cr0::PE | cr0::PG | cr0::NE;
    long.save.cr3 = 0x1000;
    long.save.cr4 = cr4::PAE;
    long.save.efer = efer::SVME | efer::LME | efer::LMA;
    long.save.cs = vmcb_engine::engine::soft::svm::bare::CODE;
    long.save.ss = vmcb_engine::engine::soft::svm::bare::DATA;
    long.save.rip = CODE;
    long.save.rsp = CODE + 0x8000;
    let mut nested = long.clone();
    nested.control.np_enable = 1;
    nested.control.n_cr3 = 0x1000;
    nested.save.g_pat = 0x0007_0406_0007_0406;
    let mut event = long.clone();
    event.control.eventinj = 0x8000_0b0d | 5 << 32;
    event.save.idtr.limit = 0xfff;
    event.save.idtr.base = CODE + 0x1000;
    // xor eax, eax; inc rax; push rax; pop rcx; cpuid; jmp back.
    let code64 = [0x31, 0xc0, 0x48, 0xff, 0xc0, 0x50, 0x59, 0x0f, 0xa2, 0xeb, 0xf7];
    // mov ax, 5; push ax; int 0x10; hlt.
    let code16 = [0xb8, 5, 0, 0x50, 0xcd, 0x10, 0xf4];
    vec![
        ("zero", vec![0]),
        ("real-mode", with_code(&real, &code16)),
        ("long-mode", with_code(&long, &code64)),
        ("nested", with_code(&nested, &code64)),
        ("event", with_code(&event, &code64)),
    ]
}

//! The real `vm-runner`, jailed, with a real machine: a few instructions that say hello and count in RAM.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use proto::v1::{ConsoleInput, DiskConfig, RecordRequest, StopVmRequest, VmRef, VmState};
use tokio_stream::StreamExt;
use vmcb_engine::journal::{Block, Event};

use crate::fleet::{Host, TestFleet, runs};
use crate::moves::migrate;

const ENTRY: u32 = 0x10_0000;

/// 32-bit code, entered as PVH says: prints "hi" on the 8250, then counts at 0x20_0000 for ever.
const CODE: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'h', 0xee, // mov al, 'h'; out dx, al
    0xb0, b'i', 0xee, // mov al, 'i'; out dx, al
    0xb0, b'\n', 0xee, // mov al, '\n'; out dx, al
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // again: inc dword [0x200000]
    0xeb, 0xf8, // jmp again
];

/// An ELF with one segment and a PVH note (type 18 of "Xen": the 32-bit entry).
fn kernel() -> Vec<u8> {
    let header = |bytes: &mut Vec<u8>, kind: u32, offset: u64, address: u64, size: u64| {
        bytes.extend([kind.to_le_bytes(), 7u32.to_le_bytes()].concat());
        for word in [offset, address, address, size, size, 0x1000] {
            bytes.extend(word.to_le_bytes());
        }
    };
    let note = [4u32.to_le_bytes(), 4u32.to_le_bytes(), 18u32.to_le_bytes(), *b"Xen\0", ENTRY.to_le_bytes()].concat();
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_EXEC, EM_X86_64, version, entry, program headers at 64, no sections.
    elf.extend([2u16.to_le_bytes(), 62u16.to_le_bytes()].concat());
    elf.extend(1u32.to_le_bytes());
    elf.extend([u64::from(ENTRY).to_le_bytes(), 64u64.to_le_bytes(), [0; 8]].concat());
    elf.extend([0; 4]);
    elf.extend([64u16, 56, 2, 64, 0, 0].map(u16::to_le_bytes).concat());
    header(&mut elf, 1, 0x1000, ENTRY.into(), CODE.len() as u64);
    header(&mut elf, 4, 0x800, 0, note.len() as u64);
    elf.resize(0x800, 0);
    elf.extend(note);
    elf.resize(0x1000, 0);
    elf.extend(CODE);
    elf
}

pub async fn fleet() -> TestFleet {
    let mut fleet = TestFleet::start().await;
    std::fs::write(fleet.root.join("kernel"), kernel()).unwrap();
    fleet.runner = (PathBuf::from(env!("CARGO_BIN_EXE_vm-runner")), true);
    fleet
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jailed_machine_moves_with_its_disk_and_comes_back() {
    let fleet = fleet().await;
    let (mut a, mut b) = (fleet.host("hostA").await, fleet.host("hostB").await);
    let image = fleet.root.join("disk.img");
    std::fs::write(&image, vec![0xd1; 1 << 20]).unwrap();
    let mut request = fleet.create("vm1", 1);
    let disk =
        |read_only| DiskConfig { path: image.to_string_lossy().into_owned(), read_only, ..DiskConfig::default() };
    request.config.as_mut().unwrap().disks = vec![disk(false), disk(true)];
    a.client.create_vm(request).await.unwrap();
    a.until("vm1", |vm| runs(vm) && vm.retired_instructions > 1_000_000).await;
    migrate(&mut a, &mut b, 2).await;
    for index in 0..2 {
        let moved = fleet.root.join(format!("hostB/vms/vm1/disk{index}.img"));
        assert_eq!(std::fs::read(&moved).unwrap(), vec![0xd1; 1 << 20], "{}", moved.display());
    }
    assert!(image.exists(), "the operator's image stays");
    migrate(&mut b, &mut a, 3).await;
    assert!(!fleet.root.join("hostB/vms/vm1").exists());

    let log = ConsoleInput { vm: "vm1".into(), log_only: true, ..ConsoleInput::default() };
    let outputs = a.client.console(tokio_stream::iter([log])).await.unwrap().into_inner();
    let said: Vec<u8> = outputs.map(|output| output.unwrap().data).collect::<Vec<_>>().await.concat();
    assert_eq!(String::from_utf8_lossy(&said), "", "the guest said nothing since it came back");
    let of = VmRef { vm: "vm1".into(), generation: 3, ..VmRef::default() };
    let vmcbs = a.client.get_vmcb(of.clone()).await.unwrap().into_inner().vmcbs;
    assert_eq!(vmcbs.iter().map(Vec::len).collect::<Vec<_>>(), [4096]);
    a.client.discard_vm(of).await.unwrap();
    a.end().await;
    b.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jailed_machine_outlives_its_agent() {
    let fleet = fleet().await;
    let mut host = fleet.host("hostA").await;
    host.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    let before = host.until("vm1", |vm| runs(vm) && vm.retired_instructions > 0).await;
    assert_eq!(std::fs::read(fleet.root.join("hostA/vms/vm1/console.log")).unwrap(), b"hi\n");
    let status = std::fs::read_to_string(format!("/proc/{}/status", before.runner_pid)).unwrap();
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
    if rustix::process::geteuid().is_root() {
        assert!(!status.contains("Uid:\t0\t"), "{status}");
    }
    host.end().await;
    let mut host = fleet.host("hostA").await;
    let after = host.until("vm1", |vm| runs(vm) && vm.retired_instructions > before.retired_instructions).await;
    assert_eq!(after.runner_pid, before.runner_pid);
    let paused = VmRef { vm: "vm1".into(), generation: 1, ..VmRef::default() };
    assert_eq!(host.client.pause_vm(paused.clone()).await.unwrap().into_inner().state(), VmState::Paused);
    host.client.discard_vm(paused).await.unwrap();
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_is_none_is_refused_and_leaves_nothing() {
    let fleet = fleet().await;
    let mut host = fleet.host("hostA").await;
    std::fs::write(fleet.root.join("kernel"), b"no kernel").unwrap();
    let refused = host.client.create_vm(fleet.create("vm1", 1)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    assert!(!fleet.root.join("hostA/vms/vm1").exists());
    assert!(host.vm("vm1").await.is_none());
    host.end().await;
}

fn recording(generation: u64, recording: &[u8]) -> RecordRequest {
    RecordRequest { vm: "vm1".into(), generation, recording: recording.to_vec(), ..RecordRequest::default() }
}

/// Types something and waits until it is in the journal.
async fn type_in(fleet: &TestFleet, host: &mut Host, text: &str) {
    let input = ConsoleInput { vm: "vm1".into(), data: text.into(), ..ConsoleInput::default() };
    let _outputs = host.client.console(tokio_stream::iter([input])).await.unwrap();
    let typed = |block: &Block| block.events.iter().any(|it| it.event == Event::Console(text.into()));
    fleet.until_journal(|blocks| blocks.iter().any(typed)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_is_one_chain_through_a_killed_agent_a_silent_controller_and_a_move() {
    let fleet = fleet().await;
    let (mut a, mut b) = (fleet.host("hostA").await, fleet.host("hostB").await);
    a.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    let refused = a.client.record(recording(2, &[5; 16])).await.unwrap_err();
    assert!(refused.message().contains("generation 1 is here"), "{refused}");
    a.client.record(recording(1, &[5; 16])).await.unwrap();
    a.client.record(recording(1, &[5; 16])).await.unwrap();
    let refused = a.client.record(recording(1, &[6; 16])).await.unwrap_err();
    assert!(refused.message().contains("0505"), "{refused}");
    type_in(&fleet, &mut a, "one").await;

    fleet.words.journal_away.store(true, Ordering::SeqCst);
    let closed = a.vm("vm1").await.unwrap().recording.unwrap().next_sequence;
    a.until("vm1", |vm| vm.recording.as_ref().is_some_and(|it| it.next_sequence > closed + 1)).await;
    a.end().await;
    let mut a = fleet.host("hostA").await;
    a.until("vm1", runs).await;
    fleet.words.journal_away.store(false, Ordering::SeqCst);
    type_in(&fleet, &mut a, "two").await;

    migrate(&mut a, &mut b, 2).await;
    type_in(&fleet, &mut b, "three").await;
    b.client.stop_vm(StopVmRequest { vm: "vm1".into(), generation: 2, ..StopVmRequest::default() }).await.unwrap();
    fleet.until_journal(|blocks| blocks.last().is_some_and(|block| !block.ended.is_empty())).await;
    let cuts = fleet.words.journal.lock().unwrap().blocks.iter().filter(|block| block.cut.is_some()).count();
    assert_eq!(cuts, 2, "the beginning and the move");
    b.end().await;
}

//! One host: create, operate, fence, console, lease, an agent that ends and one that comes.

use std::sync::atomic::Ordering;

use node_agent::vm::store::Store;
use proto::v1::vm_verdict::Verdict;
use proto::v1::{ConsoleInput, GetHostRequest, MachineConfig, StopVmRequest, VmRef, VmState};
use tokio_stream::StreamExt;
use tonic::Code;

use crate::fleet::{TestFleet, runs};

fn vm1(generation: u64) -> VmRef {
    VmRef { vm: "vm1".into(), generation, ..VmRef::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_created_operated_and_discarded_and_older_generations_are_refused() {
    let fleet = TestFleet::start().await;
    let mut host = fleet.host("hostA").await;
    let made = host.client.create_vm(fleet.create("vm1", 3)).await.unwrap().into_inner();
    assert_eq!(made.generation, 3);
    let again = host.client.create_vm(fleet.create("vm1", 3)).await.unwrap().into_inner();
    assert_eq!(again.runner_pid, made.runner_pid, "a create may be repeated");
    let running = host.until("vm1", |vm| runs(vm) && vm.retired_instructions > 10_000).await;
    assert!(running.resident_bytes > 0);

    assert_eq!(host.client.pause_vm(vm1(2)).await.unwrap_err().code(), Code::PermissionDenied);
    let paused = VmRef { reason: "lunch".into(), ..vm1(3) };
    let paused = host.client.pause_vm(paused).await.unwrap().into_inner();
    assert_eq!((paused.state(), paused.reason.as_str()), (VmState::Paused, "lunch"));
    let still = host.vm("vm1").await.unwrap();
    assert_eq!(still.retired_instructions, host.vm("vm1").await.unwrap().retired_instructions);
    assert!(runs(&host.client.resume_vm(vm1(3)).await.unwrap().into_inner()));
    assert_eq!(host.client.get_vmcb(vm1(3)).await.unwrap().into_inner().vmcbs, [vec![0x5a; 4096]]);

    let stop = StopVmRequest { vm: "vm1".into(), generation: 3, operation: String::new() };
    let stopped = host.client.stop_vm(stop).await.unwrap().into_inner();
    assert_eq!((stopped.state(), stopped.runner_pid), (VmState::Stopped, 0));
    host.client.discard_vm(vm1(3)).await.unwrap();
    host.client.discard_vm(vm1(3)).await.unwrap();
    assert!(host.vm("vm1").await.is_none());
    assert!(!fleet.root.join("hostA/vms/vm1").exists());
    let old = host.client.create_vm(fleet.create("vm1", 3)).await.unwrap_err();
    assert_eq!(old.code(), Code::PermissionDenied, "{old}");
    host.client.create_vm(fleet.create("vm1", 4)).await.unwrap();
    host.client.discard_vm(vm1(4)).await.unwrap();
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_say_why() {
    let fleet = TestFleet::start().await;
    let mut host = fleet.host("hostA").await;
    let mut operator = fleet.client(&host.address, "hostA", "operator/admin").await;
    assert_eq!(operator.get_host(GetHostRequest {}).await.unwrap_err().code(), Code::PermissionDenied);

    let with = |change: fn(&mut MachineConfig)| {
        let mut request = fleet.create("vm1", 1);
        change(request.config.as_mut().unwrap());
        request
    };
    let kvm = host.client.create_vm(with(|config| config.engine = "kvm".into())).await.unwrap_err();
    assert!(kvm.code() == Code::FailedPrecondition && kvm.message().contains("kvm"), "{kvm}");
    let kernel = with(|config| config.boot.as_mut().unwrap().kernel_path = "/nowhere/vmlinuz".into());
    let kernel = host.client.create_vm(kernel).await.unwrap_err();
    assert!(kernel.code() == Code::NotFound && kernel.message().contains("/nowhere/vmlinuz"), "{kernel}");
    let memory = host.client.create_vm(with(|config| config.memory_bytes = 1 << 39)).await.unwrap_err();
    assert!(memory.code() == Code::ResourceExhausted && memory.message().contains("MiB"), "{memory}");
    let name = host.client.create_vm(fleet.create("../vm1", 1)).await.unwrap_err();
    assert_eq!(name.code(), Code::InvalidArgument);
    assert!(host.vm("vm1").await.is_none());
    assert!(!fleet.root.join("hostA/vms/vm1").exists(), "nothing is left of what was refused");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_begins_with_the_log_and_goes_on_without_a_gap() {
    let fleet = TestFleet::start().await;
    let mut host = fleet.host("hostA").await;
    host.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    host.until("vm1", |vm| runs(vm) && vm.retired_instructions > 0).await;
    let first = ConsoleInput { vm: "vm1".into(), data: b"hello\n".to_vec(), log_bytes: 1000, log_only: false };
    let inputs = tokio_stream::iter([first]).chain(tokio_stream::pending());
    let mut outputs = host.client.console(inputs).await.unwrap().into_inner();
    let mut heard = Vec::new();
    while heard.len() < b"booted\nyou said hello\n".len() {
        heard.extend(outputs.next().await.unwrap().unwrap().data);
    }
    assert_eq!(String::from_utf8_lossy(&heard), "booted\nyou said hello\n");
    drop(outputs);

    let off = ConsoleInput { vm: "vm1".into(), data: b"poweroff".to_vec(), ..ConsoleInput::default() };
    let _attached = host.client.console(tokio_stream::iter([off]).chain(tokio_stream::pending())).await.unwrap();
    let stopped = host.until("vm1", |vm| vm.state() == VmState::Stopped).await;
    assert!(stopped.reason.contains("switched itself off"), "{}", stopped.reason);
    let log = ConsoleInput { vm: "vm1".into(), log_only: true, ..ConsoleInput::default() };
    let outputs = host.client.console(tokio_stream::iter([log])).await.unwrap().into_inner();
    let log: Vec<u8> = outputs.map(|output| output.unwrap().data).collect::<Vec<_>>().await.concat();
    assert_eq!(String::from_utf8_lossy(&log), "booted\nyou said hello\nyou said poweroff");
    host.client.discard_vm(vm1(1)).await.unwrap();
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_loses_the_controller_pauses_its_guests_until_it_is_back() {
    let fleet = TestFleet::start().await;
    let mut host = fleet.host("hostA").await;
    host.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    let mut kept = fleet.create("vm2", 1);
    kept.on_isolation = proto::v1::IsolationPolicy::KeepRunning.into();
    host.client.create_vm(kept).await.unwrap();
    host.until("vm1", runs).await;
    fleet.words.silent.store(true, Ordering::SeqCst);
    let paused = host.until("vm1", |vm| vm.state() == VmState::Paused).await;
    assert!(paused.reason.starts_with("lease ended"), "{}", paused.reason);
    assert!(runs(&host.vm("vm2").await.unwrap()), "keep-running goes on");
    fleet.words.silent.store(false, Ordering::SeqCst);
    host.until("vm1", runs).await;
    fleet.say("vm1", Verdict::Discard);
    host.until_gone("vm1").await;
    host.client.discard_vm(VmRef { vm: "vm2".into(), generation: 1, ..VmRef::default() }).await.unwrap();
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_outlive_their_agent_and_the_next_one_finds_them() {
    let fleet = TestFleet::start().await;
    let mut host = fleet.host("hostA").await;
    for vm in ["vm1", "vm2", "vm3"] {
        host.client.create_vm(fleet.create(vm, 1)).await.unwrap();
    }
    host.client.pause_vm(VmRef { reason: "kept".into(), vm: "vm3".into(), ..vm1(1) }).await.unwrap();
    let before = host.until("vm1", |vm| runs(vm) && vm.retired_instructions > 0).await;
    host.end().await;
    let doomed = fleet.root.join("hostA/vms/vm2");
    node_agent::vm::runner::Process::of(&doomed).unwrap().kill().await;

    let mut host = fleet.host("hostA").await;
    let after = host.until("vm1", |vm| runs(vm) && vm.retired_instructions > before.retired_instructions).await;
    assert_eq!(after.runner_pid, before.runner_pid);
    let lost = host.vm("vm2").await.unwrap();
    assert_eq!(lost.state(), VmState::Crashed);
    assert!(lost.reason.contains("while no agent was there"), "{}", lost.reason);
    let kept = host.vm("vm3").await.unwrap();
    assert_eq!((kept.state(), kept.reason.as_str()), (VmState::Paused, "kept"));

    let alive = fleet.root.join("hostA/vms/vm1");
    node_agent::vm::runner::Process::of(&alive).unwrap().kill().await;
    let crashed = host.until("vm1", |vm| vm.state() == VmState::Crashed).await;
    assert!(crashed.reason.contains("runner.log"), "{}", crashed.reason);
    for vm in ["vm1", "vm2", "vm3"] {
        host.client.discard_vm(VmRef { vm: vm.into(), generation: 1, ..VmRef::default() }).await.unwrap();
    }
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_activation_that_was_not_written_down_is_found_by_the_next_agent() {
    let fleet = TestFleet::start().await;
    let mut host = fleet.host("hostA").await;
    host.client.create_vm(fleet.create("vm1", 2)).await.unwrap();
    let before = host.until("vm1", runs).await;
    host.end().await;
    // As if the agent had ended between the guest's first instruction and the file.
    let store = Store::open(&fleet.root.join("hostA")).unwrap();
    let (mut vms, _) = store.load().unwrap();
    vms[0].state = VmState::Incoming.into();
    vms[0].ticket_used = true;
    store.save(&vms[0]).unwrap();
    let mut host = fleet.host("hostA").await;
    let after = host.until("vm1", runs).await;
    assert_eq!((after.generation, after.runner_pid), (2, before.runner_pid));
    host.client.discard_vm(vm1(2)).await.unwrap();
    host.end().await;
}

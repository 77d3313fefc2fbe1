//! Two hosts: a guest moves, comes back, is abandoned at every point, and outlives agents in between.

use proto::v1::transfer_event::Event;
use proto::v1::vm_verdict::Verdict;
use proto::v1::{
    ActivateRequest, MachineConfig, OperationRef, PrepareRequest, SendRequest, Ticket, TransferPolicy, VmRef, VmState,
};
use tokio_stream::StreamExt;
use tonic::Code;

use crate::fleet::{Host, TestFleet, runs};

fn ticket(source: &Host, target: &Host, generation: u64, operation: &str) -> Ticket {
    Ticket {
        operation: operation.into(),
        vm: "vm1".into(),
        generation,
        source: source.name.clone(),
        target: target.name.clone(),
        secret: vec![generation as u8; 32],
        expires_in_ms: 60_000,
    }
}

fn send_request(ticket: &Ticket, target: &Host) -> SendRequest {
    SendRequest {
        vm: "vm1".into(),
        generation: ticket.generation - 1,
        ticket: Some(ticket.clone()),
        address: target.address.clone(),
        peer_identity: format!("host/{}", target.name),
        policy: Some(TransferPolicy { downtime_ms_max: 50, rounds_max: 5, lanes: 2, ..TransferPolicy::default() }),
        ..SendRequest::default()
    }
}

/// What a guest of this configuration needs.
fn contract(config: &Option<MachineConfig>) -> Vec<u8> {
    node_agent::facts::contract_of(config.as_ref().unwrap()).unwrap()
}

async fn prepare(source: &mut Host, target: &mut Host, ticket: &Ticket) {
    let config = source.vm("vm1").await.unwrap().config;
    let capabilities = contract(&config);
    let request = PrepareRequest { ticket: Some(ticket.clone()), config, capabilities, ..PrepareRequest::default() };
    let without = PrepareRequest { capabilities: Vec::new(), ..request.clone() };
    let refused = target.client.prepare(without).await.unwrap_err();
    assert!(refused.message().contains("without a contract"), "{refused}");
    let reply = target.client.prepare(request.clone()).await.unwrap().into_inner();
    assert_eq!(reply.address, target.address);
    target.client.prepare(request).await.unwrap();
}

/// Sends and returns the last event.
async fn send(source: &mut Host, target: &Host, ticket: &Ticket) -> Event {
    let mut events = source.client.send(send_request(ticket, target)).await.unwrap().into_inner();
    let mut last = None;
    while let Some(event) = events.next().await {
        last = event.unwrap().event;
    }
    last.unwrap()
}

fn activation(ticket: &Ticket) -> ActivateRequest {
    ActivateRequest {
        vm: "vm1".into(),
        generation: ticket.generation,
        operation: ticket.operation.clone(),
        paused: false,
    }
}

fn of(ticket: &Ticket) -> OperationRef {
    OperationRef { operation: ticket.operation.clone(), vm: "vm1".into(), reason: "test".into() }
}

pub async fn migrate(source: &mut Host, target: &mut Host, generation: u64) {
    let ticket = ticket(source, target, generation, &format!("move-{generation}"));
    prepare(source, target, &ticket).await;
    let Event::HandedOver(handed) = send(source, target, &ticket).await else { panic!("no hand-over") };
    assert_eq!(handed.source, handed.target);
    let left = source.vm("vm1").await.unwrap();
    assert_eq!(left.state(), VmState::HandedOver);
    let early = source.client.resume_vm(VmRef { vm: "vm1".into(), generation: generation - 1, ..VmRef::default() });
    assert_eq!(early.await.unwrap_err().code(), Code::AlreadyExists, "a source never resumes by itself");
    target.client.activate(activation(&ticket)).await.unwrap();
    target.client.activate(activation(&ticket)).await.unwrap();
    let arrived = target.until("vm1", |vm| runs(vm) && vm.retired_instructions > left.retired_instructions).await;
    assert_eq!(arrived.generation, generation);
    let old = VmRef { vm: "vm1".into(), generation: generation - 1, ..VmRef::default() };
    source.client.discard_vm(old).await.unwrap();
    assert!(source.vm("vm1").await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_and_comes_back() {
    let fleet = TestFleet::start().await;
    let (mut a, mut b) = (fleet.host("hostA").await, fleet.host("hostB").await);
    a.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    a.until("vm1", |vm| runs(vm) && vm.retired_instructions > 100_000).await;
    migrate(&mut a, &mut b, 2).await;
    migrate(&mut b, &mut a, 3).await;
    let stale = VmRef { vm: "vm1".into(), generation: 1, ..VmRef::default() };
    a.client.discard_vm(stale).await.unwrap();
    assert!(runs(&a.vm("vm1").await.unwrap()), "a late discard of an older generation changes nothing");
    a.client.discard_vm(VmRef { vm: "vm1".into(), generation: 3, ..VmRef::default() }).await.unwrap();
    a.end().await;
    b.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abandoned_move_leaves_the_guest_running_and_nothing_at_the_target() {
    let fleet = TestFleet::start().await;
    let (mut a, mut b) = (fleet.host("hostA").await, fleet.host("hostB").await);
    a.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    let before = a.until("vm1", |vm| runs(vm) && vm.retired_instructions > 0).await;

    // Before anything was sent.
    let first = ticket(&a, &b, 2, "first");
    prepare(&mut a, &mut b, &first).await;
    assert_eq!(b.vm("vm1").await.unwrap().state(), VmState::Incoming);
    assert_eq!(b.client.activate(activation(&first)).await.unwrap_err().code(), Code::AlreadyExists);
    for host in [&mut a, &mut b] {
        host.client.abandon(of(&first)).await.unwrap();
        host.client.abandon(of(&first)).await.unwrap();
    }
    assert!(b.vm("vm1").await.is_none());
    let Event::Failed(refused) = send(&mut a, &b, &first).await else { panic!("an abandoned ticket was taken") };
    assert!(!refused.reason.is_empty());
    a.until("vm1", runs).await;

    // After the hand-over.
    let second = ticket(&a, &b, 2, "second");
    prepare(&mut a, &mut b, &second).await;
    fleet.say("vm1", Verdict::Wait);
    assert!(matches!(send(&mut a, &b, &second).await, Event::HandedOver(_)));
    assert_eq!(a.vm("vm1").await.unwrap().state(), VmState::HandedOver);
    b.client.abandon(of(&second)).await.unwrap();
    a.client.abandon(of(&second)).await.unwrap();
    fleet.say("vm1", Verdict::Hold);
    let after = a.until("vm1", |vm| runs(vm) && vm.retired_instructions > before.retired_instructions).await;
    assert_eq!((after.generation, after.operation.as_str()), (1, ""));
    assert!(b.vm("vm1").await.is_none());
    a.client.discard_vm(VmRef { vm: "vm1".into(), generation: 1, ..VmRef::default() }).await.unwrap();
    a.end().await;
    b.end().await;
}

/// A restore to the host that has the VM: the old copy is kept until the new one is activated, across agents.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_restore_in_place_replaces_comes_back_if_the_restore_fails() {
    let fleet = TestFleet::start().await;
    let (mut a, b) = (fleet.host("hostA").await, fleet.host("hostB").await);
    a.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    let config = a.until("vm1", |vm| runs(vm) && vm.retired_instructions > 0).await.config;
    let of_first = VmRef { vm: "vm1".into(), generation: 1, ..VmRef::default() };
    let request = |operation: &str, replaces_generation| {
        let ticket = ticket(&b, &a, 2, operation);
        PrepareRequest {
            ticket: Some(ticket),
            config: config.clone(),
            capabilities: contract(&config),
            replaces_generation,
            ..PrepareRequest::default()
        }
    };
    let (running, first, second) = (request("zeroth", 1), request("first", 1), request("second", 1));
    assert_eq!(a.client.prepare(running).await.unwrap_err().code(), Code::AlreadyExists, "a guest that runs stays");
    a.client.pause_vm(of_first.clone()).await.unwrap();
    let paused = a.vm("vm1").await.unwrap();
    a.client.prepare(first.clone()).await.unwrap();
    a.client.prepare(first.clone()).await.unwrap();
    assert_eq!(a.vm("vm1").await.unwrap().state(), VmState::Incoming);
    assert_ne!(a.vm("vm1").await.unwrap().runner_pid, paused.runner_pid);
    a.client.abandon(of(first.ticket.as_ref().unwrap())).await.unwrap();
    let back = a.vm("vm1").await.unwrap();
    assert_eq!((back.state(), back.generation, back.runner_pid), (VmState::Paused, 1, paused.runner_pid));
    assert_eq!(back.retired_instructions, paused.retired_instructions);

    // The agent ends in between; the next one finds both.
    a.client.prepare(second.clone()).await.unwrap();
    a.end().await;
    let mut a = fleet.host("hostA").await;
    assert_eq!(a.vm("vm1").await.unwrap().state(), VmState::Incoming);
    a.client.abandon(of(second.ticket.as_ref().unwrap())).await.unwrap();
    a.until("vm1", |vm| vm.state() == VmState::Paused && vm.runner_pid == paused.runner_pid).await;
    a.client.resume_vm(of_first.clone()).await.unwrap();
    a.until("vm1", |vm| runs(vm) && vm.retired_instructions > paused.retired_instructions).await;
    a.client.discard_vm(of_first).await.unwrap();
    a.end().await;
    b.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_agents_may_be_replaced_between_the_hand_over_and_the_activation() {
    let fleet = TestFleet::start().await;
    let (mut a, mut b) = (fleet.host("hostA").await, fleet.host("hostB").await);
    a.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    a.until("vm1", |vm| runs(vm) && vm.retired_instructions > 0).await;
    let ticket = ticket(&a, &b, 2, "move");
    prepare(&mut a, &mut b, &ticket).await;
    fleet.say("vm1", Verdict::Wait);
    assert!(matches!(send(&mut a, &b, &ticket).await, Event::HandedOver(_)));
    a.end().await;
    b.end().await;
    let (mut a, mut b) = (fleet.host("hostA").await, fleet.host("hostB").await);
    let left = a.vm("vm1").await.unwrap();
    assert_eq!(left.state(), VmState::HandedOver);
    assert_eq!(b.vm("vm1").await.unwrap().state(), VmState::Incoming);
    b.client.activate(activation(&ticket)).await.unwrap();
    fleet.say("vm1", Verdict::Hold);
    b.until("vm1", |vm| runs(vm) && vm.retired_instructions > left.retired_instructions).await;
    a.client.discard_vm(VmRef { vm: "vm1".into(), generation: 1, ..VmRef::default() }).await.unwrap();
    b.client.discard_vm(VmRef { vm: "vm1".into(), generation: 2, ..VmRef::default() }).await.unwrap();
    a.end().await;
    b.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_that_the_ledger_undid_ends_by_heartbeat() {
    let fleet = TestFleet::start().await;
    let (mut a, mut b) = (fleet.host("hostA").await, fleet.host("hostB").await);
    a.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    a.until("vm1", runs).await;
    let ticket = ticket(&a, &b, 2, "move");
    prepare(&mut a, &mut b, &ticket).await;
    fleet.say("vm1", Verdict::Wait);
    assert!(matches!(send(&mut a, &b, &ticket).await, Event::HandedOver(_)));
    a.end().await;
    let mut a = fleet.host("hostA").await;
    assert_eq!(a.vm("vm1").await.unwrap().state(), VmState::HandedOver);
    b.client.abandon(of(&ticket)).await.unwrap();
    fleet.say("vm1", Verdict::Hold);
    a.until("vm1", runs).await;
    a.client.discard_vm(VmRef { vm: "vm1".into(), generation: 1, ..VmRef::default() }).await.unwrap();
    a.end().await;
    b.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tickets_of_others_are_refused() {
    let fleet = TestFleet::start().await;
    let (mut a, mut b) = (fleet.host("hostA").await, fleet.host("hostB").await);
    a.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    let foreign = ticket(&b, &a, 2, "foreign");
    let config = a.vm("vm1").await.unwrap().config;
    let capabilities = contract(&config);
    let request = PrepareRequest { ticket: Some(foreign), config, capabilities, ..PrepareRequest::default() };
    assert_eq!(b.client.prepare(request).await.unwrap_err().code(), Code::PermissionDenied);

    let right = ticket(&a, &b, 2, "right");
    prepare(&mut a, &mut b, &right).await;
    let wrong = Ticket { secret: vec![9; 32], ..right.clone() };
    assert!(matches!(send(&mut a, &b, &wrong).await, Event::Failed(_)));
    assert!(
        matches!(send(&mut a, &b, &right).await, Event::HandedOver(_)),
        "a wrong secret does not use up the ticket"
    );
    for host in [&mut a, &mut b] {
        host.client.discard_vm(VmRef { vm: "vm1".into(), generation: 2, ..VmRef::default() }).await.unwrap();
    }
    a.end().await;
    b.end().await;
}

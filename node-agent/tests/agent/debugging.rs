//! Debuggers on a live guest: the real `vm-runner`, and real gdb through the agent's stream.

use std::process::{Command, Stdio};

use proto::v1::{DebugBytes, RecordRequest, SendRequest, Ticket, VmRef, VmState};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};
use vmcb_engine::cpu::CpuState;
use vmcb_engine::journal::{Block, Event};

use crate::fleet::{Host, runs};
use crate::machine::fleet;

/// The loop of the guest: `inc dword [0x200000]`, and the jump behind it.
const AGAIN: u64 = 0x10_000d;
const JUMP: u64 = 0x10_0013;

fn vm1() -> DebugBytes {
    DebugBytes { vm: "vm1".into(), generation: 1, data: Vec::new() }
}

/// A stream with a debugger's first word said.
async fn stream(host: &mut Host) -> (mpsc::Sender<DebugBytes>, Streaming<DebugBytes>) {
    let (say, said) = mpsc::channel(16);
    say.send(vm1()).await.unwrap();
    (say, host.client.debug(ReceiverStream::new(said)).await.unwrap().into_inner())
}

/// Carries one gdb's bytes.
async fn carry(gdb: TcpStream, say: mpsc::Sender<DebugBytes>, mut told: Streaming<DebugBytes>) {
    let (mut from, mut to) = gdb.into_split();
    let mut bytes = vec![0; 4096];
    loop {
        tokio::select! {
            read = from.read(&mut bytes) => match read {
                Ok(count) if count > 0 => {
                    let data = bytes[..count].to_vec();
                    let _ended = say.send(DebugBytes { data, ..DebugBytes::default() }).await;
                }
                _ => return,
            },
            message = told.message() => match message {
                Ok(Some(message)) => to.write_all(&message.data).await.unwrap(),
                _ => return,
            },
        }
    }
}

/// Runs gdb with these commands; what it said. `None` if there is no gdb.
async fn gdb(host: &mut Host, commands: &[&str]) -> Option<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-ex", "set confirm off", "-ex", &format!("target remote {address}")]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let Ok(child) = gdb.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() else {
        eprintln!("SKIPPED: there is no gdb");
        return None;
    };
    let (socket, _) = listener.accept().await.unwrap();
    let (say, told) = stream(host).await;
    let carried = tokio::spawn(carry(socket, say, told));
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    carried.await.unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    println!("{text}");
    Some(text)
}

#[tokio::test(flavor = "multi_thread")]
async fn gdb_stops_reads_and_writes_a_live_guest_and_leaves_it_running() {
    let fleet = fleet().await;
    let mut host = fleet.host("hostA").await;
    host.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    host.until("vm1", |vm| runs(vm) && vm.retired_instructions > 1000).await;
    let record = RecordRequest { vm: "vm1".into(), generation: 1, recording: vec![5; 16], ..RecordRequest::default() };
    host.client.record(record).await.unwrap();
    let commands = [
        &format!("break *{JUMP:#x}") as &str,
        "continue",
        "printf \"broke at %x\\n\", $rip",
        "set $count = *(int*)0x200000",
        "stepi",
        "printf \"stepped to %x\\n\", $rip",
        "delete",
        "hbreak *0x10000d",
        "continue",
        "delete",
        "watch *(int*)0x200000",
        "continue",
        "printf \"counted %d\\n\", *(int*)0x200000 - $count",
        "delete",
        "set *(int*)0x200000 = 0x40000000",
        "x/1xw 0x200000",
        &format!("set $rip = {AGAIN:#x}"),
        "stepi",
        "printf \"it became %x at %x\\n\", *(int*)0x200000, $rip",
        "set $rbx = 0x1234",
        "info registers rbx cr0 mxcsr",
        "set $cs = 5",
        "monitor why",
        "set $cr0 = 0x100000011",
        "monitor why",
        "set *(int*)0x7000000 = 1",
        "monitor why",
        "x/1xw 0x7000000",
        "reverse-stepi",
        "info threads",
        "monitor physical 0x200000 16",
        "monitor position",
        "monitor help",
        "detach",
    ];
    let Some(said) = gdb(&mut host, &commands).await else { return };
    let has = |text: &str| assert!(said.contains(text), "{text:?} was not said");
    has(&format!("broke at {JUMP:x}"));
    has(&format!("stepped to {AGAIN:x}"));
    has("counted 2");
    has("0x200000:\t0x40000000");
    has(&format!("it became 40000001 at {JUMP:x}"));
    has("rbx            0x1234");
    has("cs cannot be changed by itself");
    has("cpu/0 cannot be loaded");
    has("is not RAM");
    has("Cannot access memory at address 0x7000000");
    has("does not support this command");
    has("vCPU 0");
    has("0x000000200000: 01 00 00 40");
    has("only goes forwards");

    // It goes on with what was written, and that was recorded in this order.
    host.until("vm1", runs).await;
    let said = gdb(&mut host, &["printf \"now %x\\n\", *(int*)0x200000 >> 24", "p $rbx"]).await.unwrap();
    assert!(said.contains("now 4") && said.contains("= 4660"), "{said}");
    let entered = |blocks: &[Block]| {
        let events = blocks.iter().flat_map(|block| &block.events).map(|stamped| &stamped.event);
        let wrote = Event::Memory { gpa: 0x20_0000, bytes: 0x4000_0000u32.to_le_bytes().to_vec() };
        let registers = |event: &&Event| match event {
            Event::Processor { vcpu: 0, state } => CpuState::from_bytes(state).unwrap().gprs[3] == 0x1234,
            _ => false,
        };
        let mut events = events.skip_while(|event| **event != wrote);
        events.any(|event| registers(&event))
    };
    fleet.until_journal(entered).await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_debugger_at_a_time_and_no_move_and_a_client_that_goes_is_gone() {
    let fleet = fleet().await;
    let mut host = fleet.host("hostA").await;
    host.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    host.until("vm1", runs).await;
    let (say, mut told) = stream(&mut host).await;
    assert!(told.message().await.unwrap().unwrap().data.is_empty());
    let halted = host.until("vm1", |vm| vm.debugged).await;
    assert_eq!((halted.state(), halted.reason.as_str()), (VmState::Paused, "under a debugger"));

    let (_other, mut refused) = stream(&mut host).await;
    let refused = refused.message().await.unwrap_err();
    assert!(refused.message().contains("attached already"), "{refused}");
    let ticket = Ticket { vm: "vm1".into(), operation: "op".into(), ..Ticket::default() };
    let send = SendRequest { vm: "vm1".into(), generation: 1, ticket: Some(ticket), ..SendRequest::default() };
    let refused = host.client.send(send).await.unwrap_err();
    assert!(refused.code() == Code::AlreadyExists && refused.message().contains("debugger"), "{refused}");
    // A resume is for when the debugger has gone.
    let vm = VmRef { vm: "vm1".into(), generation: 1, ..VmRef::default() };
    host.client.resume_vm(vm.clone()).await.unwrap();
    assert_eq!(host.vm("vm1").await.unwrap().state(), VmState::Paused);

    drop((say, told));
    host.until("vm1", |vm| runs(vm) && !vm.debugged).await;

    // One that says nonsense goes the same way, also of a paused guest.
    host.client.pause_vm(vm).await.unwrap();
    let (say, mut told) = stream(&mut host).await;
    say.send(DebugBytes { data: [b"$".to_vec(), vec![b'a'; 100_000]].concat(), ..vm1() }).await.unwrap();
    told.message().await.unwrap().unwrap();
    drop((say, told));
    let paused = host.until("vm1", |vm| !vm.debugged).await;
    assert_eq!((paused.state(), paused.reason.as_str()), (VmState::Paused, "paused"));

    let (_say, mut refused) = {
        let (say, said) = mpsc::channel(1);
        say.send(DebugBytes { generation: 2, ..vm1() }).await.unwrap();
        (say, host.client.debug(ReceiverStream::new(said)).await.unwrap().into_inner())
    };
    assert_eq!(refused.message().await.unwrap_err().code(), Code::PermissionDenied);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_takes_its_debugger_along() {
    let fleet = fleet().await;
    let mut host = fleet.host("hostA").await;
    host.client.create_vm(fleet.create("vm1", 1)).await.unwrap();
    let (_say, mut told) = stream(&mut host).await;
    told.message().await.unwrap().unwrap();
    let halted = host.until("vm1", |vm| vm.debugged).await;
    host.end().await;
    let mut host = fleet.host("hostA").await;
    let goes = |vm: &proto::v1::VmInfo| runs(vm) && vm.retired_instructions > halted.retired_instructions;
    host.until("vm1", goes).await;
    host.end().await;
}

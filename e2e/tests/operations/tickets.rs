//! The right to deliver a VM: a ticket that has ended, was used, or is for another VM, generation, source or target starts
//! nothing. The test speaks to real agents with the controller's certificate, the controller being dead.

use std::time::Duration;

use e2e::cluster::Cluster;
use node_agent::config::TlsFiles;
use node_agent::tls::{Identity, Tls};
use proto::status::Code;
use proto::v1::agent_client::AgentClient;
use proto::v1::transfer_event::Event;
use proto::v1::{
    ActivateRequest, MachineConfig, OperationRef, PrepareRequest, SendRequest, Ticket, TransferPolicy, VmInfo, VmRef,
    VmState,
};
use tonic::transport::Channel;

use super::BUSY;

struct Agents {
    cluster: Cluster,
    config: MachineConfig,
    a: AgentClient<Channel>,
    b: AgentClient<Channel>,
}

async fn client(cluster: &Cluster, file: &str, host: &str) -> AgentClient<Channel> {
    let path = |end: &str| cluster.dir().join("tls").join(format!("{file}.{end}"));
    let files = TlsFiles { ca: cluster.dir().join("tls/ca.pem"), cert: path("pem"), key: path("key") };
    let identity = Identity::parse(&format!("host/{host}")).unwrap();
    let tls = Tls::load(files).unwrap();
    AgentClient::new(tls.connect(&cluster.setting(host, "listen"), &identity, |endpoint| endpoint).await.unwrap())
}

fn vm1() -> VmRef {
    VmRef { vm: "vm1".into(), ..VmRef::default() }
}

impl Agents {
    async fn start() -> Agents {
        let cluster = Cluster::up(3);
        cluster.create("vm1", "hostA", BUSY);
        cluster.goes_on("vm1", 3);
        let (mut a, b) = (client(&cluster, "controller", "hostA").await, client(&cluster, "controller", "hostB").await);
        let config = a.get_vm(vm1()).await.unwrap().into_inner().config.unwrap();
        // Only the test speaks for the controller now.
        cluster.kill(cluster.daemon("controller"));
        Agents { cluster, config, a, b }
    }

    async fn prepare(&mut self, ticket: &Ticket) -> Result<(), tonic::Status> {
        let capabilities = node_agent::facts::contract_of(&self.config).unwrap();
        let config = Some(self.config.clone());
        let request =
            PrepareRequest { ticket: Some(ticket.clone()), config, capabilities, ..PrepareRequest::default() };
        self.b.prepare(request).await.map(drop)
    }

    /// hostA sends with this ticket; the last event.
    async fn send(&mut self, ticket: &Ticket) -> Result<Event, tonic::Status> {
        let request = SendRequest {
            vm: "vm1".into(),
            generation: 1,
            ticket: Some(ticket.clone()),
            address: self.cluster.setting("hostB", "listen"),
            peer_identity: "host/hostB".into(),
            policy: Some(TransferPolicy { downtime_ms_max: 50, rounds_max: 5, lanes: 2, ..TransferPolicy::default() }),
            ..SendRequest::default()
        };
        let mut events = self.a.send(request).await?.into_inner();
        let mut last = None;
        while let Some(event) = events.message().await? {
            last = event.event;
        }
        Ok(last.expect("a transfer has a last word"))
    }

    /// The transfer is refused with this code and these words.
    async fn refused(&mut self, ticket: &Ticket, words: &str) {
        match self.send(ticket).await.unwrap() {
            Event::Failed(abort) => {
                assert_eq!(abort.code, Code::Denied as u32, "{}", abort.reason);
                assert!(abort.reason.contains(words), "{}", abort.reason);
            }
            other => panic!("{ticket:?} was taken: {other:?}"),
        }
        self.nothing_started().await;
    }

    async fn on_b(&mut self) -> Option<VmInfo> {
        self.b.get_vm(vm1()).await.ok().map(tonic::Response::into_inner)
    }

    async fn nothing_started(&mut self) {
        if let Some(info) = self.on_b().await {
            assert_eq!(info.state(), VmState::Incoming, "{info:?}");
            assert_eq!(info.retired_instructions, 0, "{info:?}");
        }
    }

    async fn abandon(&mut self, ticket: &Ticket) {
        let of = OperationRef { operation: ticket.operation.clone(), vm: "vm1".into(), reason: "test".into() };
        self.a.abandon(of.clone()).await.unwrap();
        self.b.abandon(of).await.unwrap();
        assert!(self.on_b().await.is_none());
    }
}

fn ticket(operation: &str) -> Ticket {
    Ticket {
        operation: operation.into(),
        vm: "vm1".into(),
        generation: 2,
        source: "hostA".into(),
        target: "hostB".into(),
        secret: vec![7; 32],
        expires_in_ms: 60_000,
    }
}

fn denied<T: std::fmt::Debug>(result: Result<T, tonic::Status>, words: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains(words), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_is_for_one_delivery_of_one_vm_from_one_host_in_time() {
    let mut agents = Agents::start().await;
    // Never prepared.
    agents.refused(&ticket("unknown"), "no VM is expected").await;
    // For another target, VM, generation.
    denied(agents.prepare(&Ticket { target: "hostC".into(), ..ticket("elsewhere") }).await, "hostC");
    denied(agents.send(&Ticket { vm: "vm2".into(), ..ticket("other-vm") }).await, "not for this VM");
    denied(agents.send(&Ticket { generation: 1, ..ticket("old") }).await, "newer generation");
    // For another source: hostA is not who may deliver it.
    let foreign = Ticket { source: "hostC".into(), ..ticket("foreign") };
    agents.prepare(&foreign).await.unwrap();
    agents.refused(&foreign, "no VM is expected").await;
    agents.abandon(&foreign).await;
    // With another secret: refused, and the right one is not used up by it.
    let right = ticket("right");
    agents.prepare(&right).await.unwrap();
    agents.refused(&Ticket { secret: vec![8; 32], ..right.clone() }, "no VM is expected").await;
    // Nothing can be activated that has not come.
    let activation = |operation: &str| ActivateRequest {
        vm: "vm1".into(),
        generation: 2,
        operation: operation.into(),
        paused: false,
    };
    assert_eq!(agents.b.activate(activation("right")).await.unwrap_err().code(), tonic::Code::AlreadyExists);
    assert!(matches!(agents.send(&right).await.unwrap(), Event::HandedOver(_)));
    // What has come is activated by its own operation alone.
    denied(agents.b.activate(activation("other")).await, "right");
    agents.nothing_loaded_runs().await;
    // Used twice: the source took it back and tries again.
    let back = OperationRef { operation: "right".into(), vm: "vm1".into(), reason: "test".into() };
    agents.a.abandon(back).await.unwrap();
    match agents.send(&right).await.unwrap() {
        Event::Failed(abort) => assert!(!abort.reason.is_empty()),
        other => panic!("a ticket was taken twice: {other:?}"),
    }
    agents.nothing_loaded_runs().await;
    agents.abandon(&right).await;
    // Ended: the room that was made is gone, and whoever comes now finds nobody.
    let late = Ticket { expires_in_ms: 300, ..ticket("late") };
    agents.prepare(&late).await.unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while agents.on_b().await.is_some() {
        assert!(std::time::Instant::now() < deadline, "the room of an ended ticket stays");
        tokio::task::yield_now().await;
    }
    agents.refused(&late, "no VM is expected").await;
    // Only a controller makes room.
    let mut host = client(&agents.cluster, "hostC", "hostB").await;
    let config = Some(agents.config.clone());
    let by_a_host = PrepareRequest { ticket: Some(ticket("host")), config, ..PrepareRequest::default() };
    denied(host.prepare(by_a_host).await, "host/hostC may not make this call");
    // After all of it the guest is where it was, and moves.
    let cluster = agents.cluster;
    cluster.start(3);
    e2e::cluster::wait("the guest to be seen", || (cluster.observed("vm1") == "running").then_some(()));
    cluster.goes_on("vm1", 3);
    cluster.ok(["migrate", "vm1", "--to", "hostB"]);
    cluster.goes_on("vm1", 3);
}

impl Agents {
    /// The target holds a state that has come; it does not move.
    async fn nothing_loaded_runs(&mut self) {
        let first = self.on_b().await.unwrap();
        let second = self.on_b().await.unwrap();
        assert_eq!((first.state(), second.state()), (VmState::Incoming, VmState::Incoming));
        assert_eq!(first.retired_instructions, second.retired_instructions);
    }
}

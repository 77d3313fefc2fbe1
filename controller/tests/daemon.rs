//! The daemon as a whole, over real TLS: who may do what, what a heartbeat brings, and what is there after a restart.

#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::agents::link;
use controller::cluster::Controller;
use controller::config::{Config, LogFormat, TlsFiles};
use controller::ledger::Ledger;
use controller::ledger::event::{Event, Outcome, Plan, Task};
use controller::tls::{Identity, Tls};
use proto::v1::control_client::ControlClient;
use proto::v1::fleet_client::FleetClient;
use proto::v1::lanes_client::LanesClient;
use proto::v1::vm_verdict::Verdict;
use proto::v1::{
    CheckpointName, CreateVmRecordRequest, Empty, EngineFacts, EventsRequest, HeartbeatRequest, HostInfo,
    MachineConfig, MigrateRequest, OperationRef, VmInfo, VmName, VmState,
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Channel;
use vmcb_engine::capability::{CpuModel, soft_host};

/// A directory with an authority, and certificates from it.
struct Cluster {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Cluster {
    fn new(name: &str) -> Cluster {
        let folder = std::env::temp_dir().join(format!("godwit-daemon-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(DnType::CommonName, "test authority");
        std::fs::write(folder.join("ca.pem"), parameters.self_signed(&key).unwrap().pem()).unwrap();
        Cluster { folder, issuer: Issuer::new(parameters, key) }
    }

    fn certificate(&self, identity: &str) -> TlsFiles {
        let file = |end: &str| self.folder.join(format!("{}.{end}", identity.replace('/', "-")));
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.subject_alt_names = vec![SanType::URI(format!("spiffe://godwit/{identity}").try_into().unwrap())];
        std::fs::write(file("pem"), parameters.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(file("key"), key.serialize_pem()).unwrap();
        TlsFiles { ca: self.folder.join("ca.pem"), cert: file("pem"), key: file("key") }
    }

    fn config(&self) -> Config {
        Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            address: String::new(),
            store: self.folder.join("controller.redb"),
            bucket: format!("file:{}", self.folder.join("bucket").display()).into(),
            keys: None,
            tls: self.certificate("controller/main"),
            lease_ms: 10_000,
            checkpoints_at_once: 4,
            sweep_every_ms: 0,
            checkpoints_at_once_per_host: 2,
            metrics: None,
            log: LogFormat::Text,
            filter: "info".into(),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

struct Running {
    address: String,
    shutdown: CancellationToken,
    ended: tokio::task::JoinHandle<Result<(), controller::cluster::ClusterError>>,
}

async fn start(config: Config) -> Running {
    // Connections of the controller before may hold the ledger for a moment longer.
    let deadline = Instant::now() + Duration::from_secs(20);
    let controller = loop {
        match Controller::build(config.clone()).await {
            Ok(controller) => break controller,
            Err(error) if Instant::now() > deadline => panic!("{error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    let (address, shutdown) = (controller.address().to_string(), CancellationToken::new());
    let ended = tokio::spawn(controller.run(shutdown.clone()));
    Running { address, shutdown, ended }
}

impl Running {
    fn channel(&self, files: &TlsFiles, expected: &str) -> Channel {
        let expected: Identity = expected.parse().unwrap();
        link::channel(&Arc::new(Tls::load(files).unwrap()), &self.address, &expected).unwrap()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.ended.await.unwrap().unwrap();
    }
}

fn beat(host: &str, vms: Vec<VmInfo>) -> HeartbeatRequest {
    let host = HostInfo {
        name: host.into(),
        address: "127.0.0.1:1".into(),
        engines: vec!["soft".into()],
        memory_bytes_free: 1 << 30,
        engine_facts: vec![EngineFacts {
            engine: "soft".into(),
            offered: true,
            capabilities: Some(soft_host().encode()),
            models: vec![CpuModel::SoftV1.contract(1_000_000).encode()],
            ..EngineFacts::default()
        }],
        vms,
        ..HostInfo::default()
    };
    HeartbeatRequest { host: Some(host) }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_role_may_do_its_own_and_nothing_else() {
    let cluster = Cluster::new("roles");
    let running = start(cluster.config()).await;
    let operator = running.channel(&cluster.certificate("operator/admin"), "controller/main");
    let host = running.channel(&cluster.certificate("host/hostA"), "controller/main");
    let code = |status: tonic::Status| status.code();

    ControlClient::new(operator.clone()).list_hosts(Empty {}).await.unwrap();
    let beaten = FleetClient::new(operator.clone()).heartbeat(beat("hostA", vec![])).await;
    assert_eq!(code(beaten.unwrap_err()), Code::PermissionDenied);
    let lanes = LanesClient::new(operator).lane(tokio_stream::empty()).await;
    assert_eq!(code(lanes.unwrap_err()), Code::PermissionDenied);

    FleetClient::new(host.clone()).heartbeat(beat("hostA", vec![])).await.unwrap();
    let another = FleetClient::new(host.clone()).heartbeat(beat("hostB", vec![])).await;
    assert_eq!(code(another.unwrap_err()), Code::PermissionDenied);
    let listed = ControlClient::new(host).list_vms(Empty {}).await;
    assert_eq!(code(listed.unwrap_err()), Code::PermissionDenied);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused_on_both_sides() {
    let (cluster, stranger) = (Cluster::new("ours"), Cluster::new("theirs"));
    let running = start(cluster.config()).await;
    let from_elsewhere = TlsFiles { ca: cluster.folder.join("ca.pem"), ..stranger.certificate("operator/admin") };
    let refused = ControlClient::new(running.channel(&from_elsewhere, "controller/main")).list_hosts(Empty {}).await;
    assert!(refused.is_err(), "a certificate of another authority was accepted");
    let ours = cluster.certificate("operator/admin");
    let mistaken = ControlClient::new(running.channel(&ours, "controller/other")).list_hosts(Empty {}).await;
    assert!(mistaken.is_err(), "another controller's certificate was accepted");
    let both = cluster.certificate("operator/admin");
    ControlClient::new(running.channel(&both, "controller/main")).list_hosts(Empty {}).await.unwrap();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_unknown_is_discarded_and_what_failed_is_told_and_remembered() {
    let cluster = Cluster::new("memory");
    let running = start(cluster.config()).await;
    let (admin, host) = (cluster.certificate("operator/admin"), cluster.certificate("host/hostA"));
    let mut fleet = FleetClient::new(running.channel(&host, "controller/main"));
    let unknown = VmInfo { name: "vm9".into(), generation: 4, state: VmState::Running.into(), ..VmInfo::default() };
    let reply = fleet.heartbeat(beat("hostA", vec![unknown])).await.unwrap().into_inner();
    assert_eq!(reply.lease_ms, 10_000);
    assert_eq!((reply.vms[0].verdict(), reply.vms[0].generation), (Verdict::Discard, 4));

    // The host's agent does not answer: the creation is taken back and says so.
    let mut control = ControlClient::new(running.channel(&admin, "controller/main"));
    let config = MachineConfig { vcpus: 1, memory_bytes: 2 << 20, engine: "soft".into(), ..MachineConfig::default() };
    let request = CreateVmRecordRequest {
        vm: "vm1".into(),
        host: "hostA".into(),
        config: Some(config),
        ..CreateVmRecordRequest::default()
    };
    let mut events = control.create_vm_record(request).await.unwrap().into_inner();
    let mut last = None;
    while let Some(event) = events.message().await.unwrap() {
        last = Some(event);
    }
    let last = last.unwrap();
    assert!(format!("{last:?}").contains("there is no VM vm1, as before"), "{last:?}");
    let missing = control.get_vm_record(VmName { vm: "vm1".into() }).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    let refused = control.migrate(MigrateRequest { vm: "vm1".into(), to: "hostA".into(), ..Default::default() }).await;
    assert_eq!(refused.unwrap_err().code(), Code::NotFound);
    let manifest = control.get_manifest(CheckpointName { id: "00".repeat(8) }).await.unwrap_err();
    assert_eq!(manifest.code(), Code::NotFound);
    drop((fleet, control));
    running.stop().await;

    // Another process reads the same ledger: the audit trail and the end of the operation are there.
    let running = start(cluster.config()).await;
    let mut control = ControlClient::new(running.channel(&admin, "controller/main"));
    let mut events = control.events(EventsRequest::default()).await.unwrap().into_inner();
    let mut trail = Vec::new();
    while let Some(event) = events.message().await.unwrap() {
        trail.push((event.kind, event.actor));
    }
    assert!(trail.contains(&("create.began".into(), "operator/admin".into())), "{trail:?}");
    assert!(trail.contains(&("host.seen".into(), "host/hostA".into())), "{trail:?}");
    let operation = OperationRef { operation: last.operation.clone(), ..OperationRef::default() };
    let mut watched = control.watch_operation(operation).await.unwrap().into_inner();
    let end = watched.message().await.unwrap().unwrap();
    assert!(format!("{end:?}").contains("Failed"), "{end:?}");
    assert!(watched.message().await.unwrap().is_none());
    let hosts = control.list_hosts(Empty {}).await.unwrap().into_inner().hosts;
    assert_eq!((hosts.len(), hosts[0].state.as_str()), (1, "lost"));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_of_a_release_before_contracts_gets_that_of_its_model() {
    let cluster = Cluster::new("contracts");
    let config = MachineConfig { cpu_model: "soft-v1".into(), engine: "soft".into(), ..MachineConfig::default() };
    {
        let ledger = Ledger::open(&cluster.config().store).unwrap();
        let task = Task::Create { host: "hostA".into(), config, on_isolation: 0, capabilities: Vec::new() };
        let (vm_id, locks) = ("00".repeat(16), vec!["VM vm1".to_owned()]);
        let plan = Plan { vm: "vm1".into(), vm_id, locks, holder: None, generation: 1, task };
        let operation = "op1".to_owned();
        let began = Event::OperationBegan { operation: operation.clone(), plan: Box::new(plan) };
        let committed = Event::Committed { operation: operation.clone(), result: Box::new(Outcome::AsPlanned) };
        for event in [began, Event::StepDone { operation, step: 0 }, committed] {
            ledger.append("operator/admin", event).await.unwrap();
        }
    }
    let running = start(cluster.config()).await;
    let (admin, host) = (cluster.certificate("operator/admin"), cluster.certificate("host/hostB"));
    let mut control = ControlClient::new(running.channel(&admin, "controller/main"));
    let name = || VmName { vm: "vm1".into() };
    assert_eq!(control.get_vm_record(name()).await.unwrap().into_inner().capabilities, Vec::<u8>::new());
    let mut fleet = FleetClient::new(running.channel(&host, "controller/main"));
    for _ in 0..2 {
        fleet.heartbeat(beat("hostB", vec![])).await.unwrap();
        let vm = control.get_vm_record(name()).await.unwrap().into_inner();
        // The configuration names no TSC rate: the model's.
        assert_eq!(vm.capabilities, CpuModel::SoftV1.contract(1_000_000).to_bytes());
    }
    let mut events =
        control.events(EventsRequest { vm: "vm1".into(), ..EventsRequest::default() }).await.unwrap().into_inner();
    let mut frozen = 0;
    while let Some(event) = events.message().await.unwrap() {
        frozen += usize::from(event.kind == "vm.contract");
    }
    assert_eq!(frozen, 1, "a contract is frozen once");
    drop((fleet, control));
    running.stop().await;
}

#[test]
fn a_settings_file_is_read_relative_to_its_folder() {
    let cluster = Cluster::new("settings");
    let path = cluster.folder.join("controller.toml");
    let text = "listen = \"127.0.0.1:0\"\nstore = \"a.redb\"\nbucket = \"file:/b\"\n\
                tls = { ca = \"ca.pem\", cert = \"c.pem\", key = \"/k.pem\" }\n";
    std::fs::write(&path, text).unwrap();
    let config = Config::read(&path).unwrap();
    assert_eq!(config.store, cluster.folder.join("a.redb"));
    assert_eq!(config.tls.key, Path::new("/k.pem"));
}

//! Agents, a controller that says what the test wants it to say, and their certificates.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use node_agent::agent::Agent;
use node_agent::config::{Capabilities, Config, Engine, LogFormat, TlsFiles};
use node_agent::tls::{Identity, Tls};
use proto::frame::{Kind, decode_message};
use proto::v1::agent_client::AgentClient;
use proto::v1::fleet_server::{Fleet, FleetServer};
use proto::v1::vm_verdict::Verdict;
use proto::v1::{
    AppendJournalReply, AppendJournalRequest, BootSource, CreateVmRequest, HeartbeatReply, HeartbeatRequest,
    JournalBlock, MachineConfig, PagesPart, PagesWanted, VmInfo, VmRef, VmState, VmVerdict,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};
use vmcb_engine::journal::{Block, Chain};

pub const LEASE_MS: u32 = 1000;
const PATIENCE: Duration = Duration::from_secs(20);
static FLEETS: AtomicU32 = AtomicU32::new(0);

/// What the controller says by heartbeat. Unless told otherwise it holds whatever is reported, but a hand-over waits.
#[derive(Default)]
pub struct Words {
    pub verdicts: Mutex<BTreeMap<String, Verdict>>,
    pub silent: AtomicBool,
    /// No journal is taken.
    pub journal_away: AtomicBool,
    pub journal: Mutex<Journal>,
}

/// A journal as a controller takes it: a chain, in order, whatever comes twice.
#[derive(Default)]
pub struct Journal {
    pub chain: Chain,
    pub blocks: Vec<Block>,
}

struct FleetService(Arc<Words>);

#[tonic::async_trait]
impl Fleet for FleetService {
    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Result<Response<HeartbeatReply>, Status> {
        if self.0.silent.load(Ordering::SeqCst) {
            return Err(Status::unavailable("the test says so"));
        }
        let verdicts = self.0.verdicts.lock().unwrap();
        let host = request.into_inner().host.unwrap();
        let vms = host.vms.iter().map(|vm| {
            let usual = if vm.state() == VmState::HandedOver { Verdict::Wait } else { Verdict::Hold };
            let verdict = verdicts.get(&vm.name).copied().unwrap_or(usual).into();
            VmVerdict { vm: vm.name.clone(), verdict, generation: vm.generation }
        });
        Ok(Response::new(HeartbeatReply { lease_ms: LEASE_MS, vms: vms.collect() }))
    }

    async fn append_journal(
        &self,
        request: Request<AppendJournalRequest>,
    ) -> Result<Response<AppendJournalReply>, Status> {
        if self.0.journal_away.load(Ordering::SeqCst) {
            return Err(Status::unavailable("the test says so"));
        }
        let mut journal = self.0.journal.lock().unwrap();
        let next = |journal: &Journal| journal.chain.head().map_or(0, |head| head.sequence);
        for frame in request.into_inner().blocks {
            let message: JournalBlock = decode_message(Kind::Journal, &frame).unwrap();
            if message.sequence >= next(&journal) {
                let block = journal.chain.take(&frame).unwrap();
                journal.blocks.push(block);
            }
        }
        Ok(Response::new(AppendJournalReply { next_sequence: next(&journal), refused: String::new() }))
    }

    type PagesStream = tokio_stream::Empty<Result<PagesPart, Status>>;

    async fn pages(&self, _: Request<Streaming<PagesWanted>>) -> Result<Response<Self::PagesStream>, Status> {
        Err(Status::unimplemented("this fleet restores nothing lazily"))
    }
}

pub struct TestFleet {
    /// What agents start for a guest, and whether it jails itself.
    pub runner: (PathBuf, bool),
    pub root: PathBuf,
    pub words: Arc<Words>,
    controller: String,
}

/// An agent that runs in this process.
pub struct Host {
    pub name: String,
    pub address: String,
    pub client: AgentClient<Channel>,
    shutdown: CancellationToken,
    running: JoinHandle<()>,
}

impl TestFleet {
    pub async fn start() -> TestFleet {
        let number = FLEETS.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("godwit-fleet-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(&root).unwrap();
        certify(&root, &["host/hostA", "host/hostB", "controller/main", "operator/admin"]);
        std::fs::write(root.join("kernel"), b"a kernel that counts").unwrap();
        let words = Arc::new(Words::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let controller = listener.local_addr().unwrap().to_string();
        let tls = Arc::new(Tls::load(files(&root, "controller/main")).unwrap());
        let (greeted, incoming) = mpsc::channel(8);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok(stream) = tls.accept(stream).await {
                    let _ended = greeted.send(Ok::<_, std::io::Error>(stream)).await;
                }
            }
        });
        let service = FleetServer::new(FleetService(Arc::clone(&words)));
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(ReceiverStream::new(incoming)));
        TestFleet { runner: (crate::counter::program(&root), false), root, words, controller }
    }

    pub fn config(&self, name: &str) -> Config {
        Config {
            name: name.into(),
            listen: "127.0.0.1:0".into(),
            address: String::new(),
            controller: self.controller.clone(),
            state_dir: self.root.join(name),
            runner: self.runner.0.clone(),
            tls: files(&self.root, &format!("host/{name}")),
            metrics: None,
            log_format: LogFormat::Text,
            engine: Engine::Auto,
            sandbox: self.runner.1,
            ram_dir: None,
            capabilities: Capabilities::default(),
        }
        .check()
        .unwrap()
    }

    pub async fn host(&self, name: &str) -> Host {
        let agent = Agent::build(self.config(name)).await.unwrap();
        let address = agent.local_address().unwrap().to_string();
        let shutdown = CancellationToken::new();
        let running = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { agent.run(shutdown).await.unwrap() }
        });
        let client = self.client(&address, name, "controller/main").await;
        Host { name: name.into(), address, client, shutdown, running }
    }

    /// A client of a host with this identity.
    pub async fn client(&self, address: &str, host: &str, identity: &str) -> AgentClient<Channel> {
        let tls = Tls::load(files(&self.root, identity)).unwrap();
        let expected = Identity::parse(&format!("host/{host}")).unwrap();
        AgentClient::new(tls.connect(address, &expected, |endpoint| endpoint).await.unwrap())
    }

    pub fn say(&self, vm: &str, verdict: Verdict) {
        self.words.verdicts.lock().unwrap().insert(vm.into(), verdict);
    }

    /// Waits until the journal that was taken is as `wanted`.
    pub async fn until_journal(&self, wanted: impl Fn(&[Block]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !wanted(&self.words.journal.lock().unwrap().blocks) {
            assert!(Instant::now() < deadline, "{:#?}", self.words.journal.lock().unwrap().blocks);
            tokio::task::yield_now().await;
        }
    }

    pub fn create(&self, vm: &str, generation: u64) -> CreateVmRequest {
        let kernel_path = self.root.join("kernel").to_string_lossy().into_owned();
        CreateVmRequest {
            vm: vm.into(),
            generation,
            operation: format!("create-{vm}-{generation}"),
            config: Some(MachineConfig {
                memory_bytes: 16 << 20,
                boot: Some(BootSource { kernel_path, ..BootSource::default() }),
                paced: true,
                ..MachineConfig::default()
            }),
            on_isolation: 0,
            capabilities: Vec::new(),
        }
    }
}

impl Drop for TestFleet {
    /// Guests outlive their agents, but not their test.
    fn drop(&mut self) {
        for host in ["hostA", "hostB"] {
            let vms = std::fs::read_dir(self.root.join(host).join("vms")).into_iter().flatten().flatten();
            for process in vms.filter_map(|vm| node_agent::vm::runner::Process::of(&vm.path())) {
                let pid = rustix::process::Pid::from_raw(process.pid as i32).unwrap();
                let _ended = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        let _gone = std::fs::remove_dir_all(&self.root);
    }
}

impl Host {
    /// Ends the agent as a kill does for its guests: they are not told.
    pub async fn end(self) {
        self.shutdown.cancel();
        self.running.await.unwrap();
    }

    pub async fn vm(&mut self, vm: &str) -> Option<VmInfo> {
        let asked = self.client.get_vm(VmRef { vm: vm.into(), ..VmRef::default() }).await;
        asked.ok().map(Response::into_inner)
    }

    /// Waits until the VM is as `wanted`; says what it was instead after a while.
    pub async fn until(&mut self, vm: &str, wanted: impl Fn(&VmInfo) -> bool) -> VmInfo {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = self.vm(vm).await;
            match info {
                Some(info) if wanted(&info) => return info,
                other => assert!(Instant::now() < deadline, "{vm} on {} is {other:?}", self.name),
            }
            tokio::task::yield_now().await;
        }
    }

    pub async fn until_gone(&mut self, vm: &str) {
        let deadline = Instant::now() + PATIENCE;
        while let Some(info) = self.vm(vm).await {
            assert!(Instant::now() < deadline, "{vm} on {} is still {info:?}", self.name);
            tokio::task::yield_now().await;
        }
    }
}

pub fn runs(info: &VmInfo) -> bool {
    info.state() == VmState::Running
}

fn file_name(identity: &str) -> String {
    identity.replace('/', "-")
}

fn files(root: &Path, identity: &str) -> TlsFiles {
    let name = file_name(identity);
    TlsFiles { ca: root.join("ca.pem"), cert: root.join(format!("{name}.pem")), key: root.join(format!("{name}.key")) }
}

fn certify(root: &Path, identities: &[&str]) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    std::fs::write(root.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(params, key);
    for identity in identities {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://godwit/{identity}").try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        let files = files(root, identity);
        std::fs::write(files.cert, certificate.pem()).unwrap();
        std::fs::write(files.key, key.serialize_pem()).unwrap();
    }
}

//! Tests of `ctl` against a controller that plays a script, over real TLS with a dev cluster's certificates.
//!
//! What is rehearsed is what no table shows: who is taken for a controller, Ctrl-C in the middle of an operation, a stream
//! that breaks, a console whose VM moves. The script is [`Script`]; everything it does not play is unimplemented.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use proto::status::Code;
use proto::v1::control_server::{Control, ControlServer};
use proto::v1::operation_event::Event;
use proto::v1::*;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::dev::certificates::{self, Identity};
use super::settings::{Settings, TlsFiles};
use super::{client, operation};

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Reply<T> = Result<Response<T>, Status>;

/// What the controller of a rehearsal does.
#[derive(Default)]
struct Script {
    cancelled: Arc<Notify>,
}

fn event(event: Event) -> Result<OperationEvent, Status> {
    Ok(OperationEvent { operation: "00000000000000aa".into(), event: Some(event) })
}

/// Written out as `async_trait` would: it does not look into macros.
macro_rules! unplayed {
    ($($method:ident($request:ty) -> $reply:ty;)*) => {$(
        fn $method<'a, 'b>(&'a self, _: Request<$request>) -> Pin<Box<dyn Future<Output = Reply<$reply>> + Send + 'b>>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async { Err(Status::unimplemented(stringify!($method))) })
        }
    )*};
}

#[tonic::async_trait]
impl Control for Script {
    type CreateVmRecordStream = Events<OperationEvent>;
    type PauseStream = Events<OperationEvent>;
    type ResumeStream = Events<OperationEvent>;
    type StopStream = Events<OperationEvent>;
    type RemoveStream = Events<OperationEvent>;
    type AttachConsoleStream = Events<ConsoleOutput>;
    type DebugStream = Events<DebugBytes>;
    type MigrateStream = Events<OperationEvent>;
    type CreateCheckpointStream = Events<OperationEvent>;
    type VerifyCheckpointStream = Events<OperationEvent>;
    type RemoveCheckpointStream = Events<OperationEvent>;
    type RestoreStream = Events<OperationEvent>;
    type WatchOperationStream = Events<OperationEvent>;
    type EventsStream = Events<LedgerEvent>;
    type ExportCheckpointStream = Events<ExportMessage>;
    type ExportRecordingStream = Events<ExportMessage>;

    async fn list_hosts(&self, _: Request<Empty>) -> Reply<ListHostsReply> {
        let info = HostInfo { name: "hostA".into(), ..Default::default() };
        Ok(Response::new(ListHostsReply {
            hosts: vec![HostRecord { info: Some(info), state: "up".into(), heartbeat_age_ms: 1 }],
        }))
    }

    /// Says one step, interrupts whoever follows, and fails once it is cancelled.
    async fn migrate(&self, _: Request<MigrateRequest>) -> Reply<Self::MigrateStream> {
        let (events, stream) = tokio::sync::mpsc::channel(4);
        let cancelled = self.cancelled.clone();
        tokio::spawn(async move {
            let _ = events.send(event(Event::Step("precopy".into()))).await;
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::INT).unwrap();
            cancelled.notified().await;
            let failed = OperationFailed {
                code: Code::Cancelled as u32,
                message: "cancelled by operator/admin".into(),
                outcome: "vm1 runs on hostA as before".into(),
                ..Default::default()
            };
            let _ = events.send(event(Event::Failed(failed))).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn cancel_operation(&self, request: Request<OperationRef>) -> Reply<Empty> {
        assert_eq!(request.get_ref().operation, "00000000000000aa");
        self.cancelled.notify_one();
        Ok(Response::new(Empty {}))
    }

    /// The stream ends in the middle.
    async fn create_checkpoint(&self, _: Request<CreateCheckpointRequest>) -> Reply<Self::CreateCheckpointStream> {
        Ok(Response::new(Box::pin(tokio_stream::once(event(Event::Note("begun".into()))))))
    }

    async fn watch_operation(&self, request: Request<OperationRef>) -> Reply<Self::WatchOperationStream> {
        let operation = request.into_inner().operation;
        let checkpoint = CheckpointRecord { id: operation, ..Default::default() };
        let done = OperationDone { checkpoint: Some(checkpoint), ..Default::default() };
        Ok(Response::new(Box::pin(tokio_stream::once(event(Event::Done(done))))))
    }

    async fn attach_console(&self, _: Request<Streaming<ConsoleInput>>) -> Reply<Self::AttachConsoleStream> {
        Err(Status::unimplemented("attach_console"))
    }

    async fn debug(&self, _: Request<Streaming<DebugBytes>>) -> Reply<Self::DebugStream> {
        Err(Status::unimplemented("debug"))
    }

    unplayed! {
        list_vms(Empty) -> ListVmsReply;
        get_vm_record(VmName) -> VmRecord;
        create_vm_record(CreateVmRecordRequest) -> Self::CreateVmRecordStream;
        pause(VmName) -> Self::PauseStream;
        resume(VmName) -> Self::ResumeStream;
        stop(VmName) -> Self::StopStream;
        remove(VmName) -> Self::RemoveStream;
        list_checkpoints(VmName) -> ListCheckpointsReply;
        get_checkpoint(CheckpointName) -> CheckpointRecord;
        get_manifest(CheckpointName) -> Blob;
        verify_checkpoint(CheckpointName) -> Self::VerifyCheckpointStream;
        remove_checkpoint(CheckpointName) -> Self::RemoveCheckpointStream;
        restore(RestoreRequest) -> Self::RestoreStream;
        get_vmcbs(VmOrCheckpoint) -> VmcbReply;
        events(EventsRequest) -> Self::EventsStream;
        set_policy(SetPolicyRequest) -> PolicyRecord;
        remove_policy(VmName) -> Empty;
        list_policies(VmName) -> ListPoliciesReply;
        prune_checkpoints(PruneRequest) -> PruneReply;
        drill_checkpoint(DrillRequest) -> DrillReply;
        sweep_checkpoints(SweepRequest) -> SweepReply;
        adopt_checkpoints(AdoptRequest) -> AdoptReply;
        export_keys(Empty) -> Blob;
        import_keys(Blob) -> KeysReply;
        rotate_keys(Empty) -> KeysReply;
        export_checkpoint(ExportRequest) -> Self::ExportCheckpointStream;
        start_recording(StartRecordingRequest) -> StartRecordingReply;
        stop_recording(VmName) -> RecordingRecord;
        list_recordings(VmName) -> ListRecordingsReply;
        remove_recording(RecordingName) -> Empty;
        export_recording(ExportRecordingRequest) -> Self::ExportRecordingStream;
    }
}

/// Certificates, and a server with the identity of `role`/`name`; ends with the runtime of the test.
struct Stage {
    folder: PathBuf,
    settings: Settings,
}

impl Stage {
    async fn set(test: &str, role: &'static str, name: &str) -> Stage {
        let folder = std::env::temp_dir().join(format!("godwit-rehearsal-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let identity = |role, name: &str| Identity { role, name: name.into(), file: name.into() };
        certificates::ensure(&folder, &[identity(role, name), identity("operator", "admin")]).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, tls(&folder, name)));
        let (cert, key) = certificates::files(&folder, "admin");
        let tls = TlsFiles { ca: folder.join("ca.pem"), cert, key };
        Stage { settings: Settings { controller: address.to_string(), tls }, folder }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.folder).unwrap();
    }
}

fn tls(folder: &Path, name: &str) -> tokio_rustls::TlsAcceptor {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("ca.pem")).unwrap()).unwrap();
    let clients =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
    let (cert, key) = certificates::files(folder, name);
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(clients)
        .with_single_cert(
            vec![CertificateDer::from_pem_file(cert).unwrap()],
            PrivateKeyDer::from_pem_file(key).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    tokio_rustls::TlsAcceptor::from(Arc::new(config))
}

async fn serve(listener: TcpListener, tls: tokio_rustls::TlsAcceptor) {
    let (connections, incoming) = tokio::sync::mpsc::channel(4);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            if let Ok(stream) = tls.accept(socket).await {
                let _ = connections.send(Ok::<_, std::io::Error>(stream)).await;
            }
        }
    });
    let service = ControlServer::new(Script::default());
    tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(ReceiverStream::new(incoming))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_controller_is_believed_and_a_host_is_not() {
    let stage = Stage::set("controller", "controller", "main").await;
    let mut client = client::connect(&stage.settings).await.unwrap();
    let hosts = client.list_hosts(Empty {}).await.unwrap().into_inner().hosts;
    assert_eq!(hosts.len(), 1);

    let stage = Stage::set("host", "host", "hostA").await;
    let failure = client::connect(&stage.settings).await.unwrap_err();
    assert_eq!(failure.code, Code::Unreachable);
    assert!(failure.message.contains("spiffe://godwit/host/hostA"), "{}", failure.message);
}

#[tokio::test]
async fn certificates_of_another_cluster_open_nothing() {
    let stage = Stage::set("ours", "controller", "main").await;
    let other = Stage::set("other", "controller", "main").await;
    let settings = Settings { controller: stage.settings.controller.clone(), tls: other.settings.tls.clone() };
    assert_eq!(client::connect(&settings).await.unwrap_err().code, Code::Unreachable);
}

#[tokio::test]
async fn an_interrupt_cancels_and_the_outcome_is_waited_for() {
    let stage = Stage::set("cancel", "controller", "main").await;
    let client = client::connect(&stage.settings).await.unwrap();
    let mut calls = client.clone();
    let failure =
        operation::follow(&client, "migrate vm1 to hostB", calls.migrate(MigrateRequest::default())).await.unwrap_err();
    assert_eq!(failure.code, Code::Cancelled);
    assert_eq!(failure.outcome.as_deref(), Some("vm1 runs on hostA as before"));
}

#[tokio::test]
async fn a_broken_stream_is_taken_up_again() {
    let stage = Stage::set("broken", "controller", "main").await;
    let client = client::connect(&stage.settings).await.unwrap();
    let mut calls = client.clone();
    let outcome =
        operation::follow(&client, "checkpoint vm1", calls.create_checkpoint(CreateCheckpointRequest::default()))
            .await
            .unwrap();
    assert_eq!(outcome.done.checkpoint.unwrap().id, "00000000000000aa");
    assert_eq!(outcome.notes, ["begun"]);
}

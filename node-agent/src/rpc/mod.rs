//! What the agent offers by gRPC: who may call what, and messages to the VMs' actors.
//!
//! | service | who |
//! |---------|-----|
//! | Agent   | the controller |
//! | Lanes   | hosts and the controller, with a ticket's secret |
//!
//! Every call is checked by the identity of the connection's certificate. Refuses to decide anything about a VM.

mod agent_service;
mod console;
mod debug;
mod lanes;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use proto::lane::Aside;
use proto::status::Code;
use proto::v1::agent_server::AgentServer;
use proto::v1::lanes_server::LanesServer;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Status};

use crate::migration::{Failure, MESSAGE_BYTES_MAX, tune_server};
use crate::tls::{Identity, Peer, PeerStream, Tls};
use crate::vm::Vms;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HANDSHAKES_MAX: usize = 64;

/// A failure as a gRPC status; its code survives the way.
pub fn status(failure: Failure) -> Status {
    Status::new(failure.code.into(), failure.reason)
}

/// A name that somebody sent, short enough for a message.
fn short(name: &str) -> String {
    name.chars().take(60).collect()
}

/// Whose call this is, if the role may make it.
fn caller<T>(request: &Request<T>, roles: &[&str]) -> Result<Arc<Identity>, Status> {
    let peer = request.extensions().get::<Peer>();
    let identity = peer.map(|peer| Arc::clone(&peer.0)).ok_or_else(|| Status::unauthenticated("no identity"))?;
    if roles.contains(&identity.role.as_str()) {
        return Ok(identity);
    }
    tracing::warn!(caller = %identity, "refused: wrong role");
    Err(status(Failure::new(
        Code::Denied,
        format!("{identity} may not make this call; it is for: {}", roles.join(", ")),
    )))
}

/// Serves both services until `shutdown`, then lets calls under way end.
///
/// # Errors
/// The transport's.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<Tls>,
    vms: Arc<Vms>,
    version: String,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let agent = AgentServer::new(agent_service::AgentService::new(Arc::clone(&vms), version))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let lanes = LanesServer::new(lanes::LanesService::new(vms))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let lanes = Aside::new(lanes, MESSAGE_BYTES_MAX);
    let (greeted, incoming) = mpsc::channel(HANDSHAKES_MAX);
    let accepting = tokio::spawn(accept(listener, tls, greeted, shutdown.clone()));
    let served = tune_server(Server::builder())
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(agent)
        .add_service(lanes)
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), shutdown.cancelled_owned())
        .await;
    accepting.abort();
    served
}

/// Accepts connections and greets them beside each other: a slow client holds up nobody.
async fn accept(
    listener: TcpListener,
    tls: Arc<Tls>,
    greeted: mpsc::Sender<Result<PeerStream, std::io::Error>>,
    shutdown: CancellationToken,
) {
    let slots = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Some(slot) = unless(&shutdown, Arc::clone(&slots).acquire_owned()).await else { return };
        let Some(accepted) = unless(&shutdown, listener.accept()).await else { return };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // tonic sets this only on sockets that it accepts itself.
        let _ended_already = stream.set_nodelay(true);
        let (tls, greeted) = (Arc::clone(&tls), greeted.clone());
        tokio::spawn(async move {
            let _slot = slot;
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
                Ok(Ok(stream)) => drop(greeted.send(Ok(stream)).await),
                Ok(Err(error)) => {
                    metrics::counter!(crate::metrics::HANDSHAKES_REFUSED).increment(1);
                    tracing::warn!(%from, %error, "refused: handshake");
                }
                Err(_) => {
                    metrics::counter!(crate::metrics::HANDSHAKES_REFUSED).increment(1);
                    tracing::warn!(%from, "refused: no handshake in time");
                }
            }
        });
    }
}

async fn unless<T>(shutdown: &CancellationToken, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        () = shutdown.cancelled() => None,
        done = work => Some(done),
    }
}

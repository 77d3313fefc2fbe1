//! The one room of the migration that awaits (being written; signatures are final).

use proto::v1::{self, Chunk, Hello, MachineDigest, SendRequest, Ticket, TransferEvent};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::{Base, Failure, Sent, SourceVm, Spaces, TargetVm};
use proto::status::Code;

/// Sends a VM over one lane a channel. Returns when both digests agree: the guest is stopped (a checkpoint's guest runs)
/// and the caller tells the controller so. `events` gets progress, rounds and phases; the last event (`handed_over` or
/// `failed`) is the caller's, after it has noted the new state. On failure and cancel the guest goes on by itself.
///
/// # Errors
/// Why there was no hand-over.
pub async fn send(
    vm: impl SourceVm,
    spaces: Spaces,
    lanes: Vec<Channel>,
    request: SendRequest,
    base: Option<Base>,
    events: mpsc::Sender<TransferEvent>,
    cancel: CancellationToken,
) -> Result<Sent, Failure> {
    let _ = (vm, spaces, lanes, request, base, events, cancel);
    Err(Failure::new(Code::Internal, "not yet written"))
}

/// HTTP/2 settings that let a lane run at the speed of the wire; set `tonic::transport::Server` likewise.
pub fn tune_endpoint(endpoint: Endpoint) -> Endpoint {
    endpoint.tcp_nodelay(true).initial_stream_window_size(16 << 20).initial_connection_window_size(32 << 20)
}

/// Reads the first message of a lane, so that the `Lanes` service can find the receiver of `hello.operation`.
///
/// # Errors
/// The lane ended, or it did not begin with a hello.
pub async fn read_hello<S>(inbound: &mut S) -> Result<Hello, Failure>
where
    S: Stream<Item = Result<Chunk, Status>> + Unpin,
{
    let _ = inbound.next().await;
    Err(Failure::new(Code::Internal, "not yet written"))
}

/// Where a receiver is.
#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    /// The ticket has not been presented.
    Waiting,
    /// Lanes are open.
    Receiving,
    /// Everything is applied and both digests agree: it may be activated.
    Ready(MachineDigest),
    /// Over: discard it.
    Failed(Failure),
}

/// The target of one prepared VM. Cheap to clone.
#[derive(Clone)]
pub struct Receiver;

impl Receiver {
    /// Waits for the holder of the ticket. The spaces must be zero.
    ///
    /// # Errors
    /// Spaces that hold something already.
    pub fn new(ticket: Ticket, spaces: Spaces, vm: impl TargetVm) -> Result<Receiver, Failure> {
        let _ = (ticket, spaces, vm);
        Err(Failure::new(Code::Internal, "not yet written"))
    }

    /// Serves one lane: what is to be sent back. Refusals come as an `Abort` message.
    pub fn lane<S>(&self, hello: Hello, inbound: S) -> impl Stream<Item = Result<Chunk, Status>> + Send + use<S>
    where
        S: Stream<Item = Result<Chunk, Status>> + Send + Unpin + 'static,
    {
        let _ = (hello, inbound);
        tokio_stream::empty()
    }

    /// Ends it, any time before the activation. Repeatable.
    pub fn abandon(&self, reason: &str) {
        let _ = reason;
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        Phase::Waiting
    }

    /// Waits until it is `Ready` or `Failed`.
    ///
    /// # Errors
    /// Why it failed.
    pub async fn finished(&self) -> Result<MachineDigest, Failure> {
        let _ = v1::Empty {};
        Err(Failure::new(Code::Internal, "not yet written"))
    }
}

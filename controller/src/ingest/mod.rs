//! The data plane: lanes that end here (a checkpoint taken in), lanes that begin here (a checkpoint sent to a host),
//! and lanes that pass through (hosts that cannot reach each other).
//!
//! ```text
//!   source agent --lanes--> receive  -> packs -> manifest      checkpoint
//!   bucket       -> load    --lanes--> target agent            restore
//!   bucket       -> supply  --pages asked for--> target agent  lazy restore, while the guest runs
//!   source agent --lanes--> relay    --lanes--> target agent   migration --via controller
//! ```
//! The ticket secret in the first frame of a lane selects its [`Route`]; an operation opens a route and its drop closes
//! it. Nothing of a lane outlives its operation, so that any controller can serve any lane. This room changes no
//! ledger.

pub mod assembly;
pub mod digest;
pub mod export;
pub mod layers;
mod letters;
pub mod load;
pub mod manifest;
pub mod map;
pub mod owner;
pub mod pack;
pub mod packs;
pub mod read;
pub mod receive;
pub mod relay;
pub mod supply;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use proto::frame::{self, Kind};
use proto::status::Code;
use proto::v1::lane_message::Message as Said;
use proto::v1::{Abort, Chunk, Hello, LaneMessage, Ticket};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

use self::receive::Ingest;
use self::relay::Relay;
use crate::failure::Failure;
use crate::tls::{Identity, Role};

/// Version of the lane protocol that this release speaks.
pub const PROTOCOL: u32 = 1;
/// How long a lane may take to say its first word.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// Chunks in flight inside the controller, each way of a lane.
pub const LANE_DEPTH: usize = 4;

/// A lane's outgoing half.
pub type Outgoing = mpsc::Sender<Result<Chunk, Status>>;

/// Where the lanes of a ticket go.
pub enum Road {
    /// Into the bucket.
    Ingest(Arc<Ingest>),
    /// On to a host.
    Relay(Relay),
}

/// An open route.
pub struct Route {
    operation: String,
    source: Identity,
    expires: Instant,
    road: Road,
}

/// All routes that are open, by ticket secret.
#[derive(Clone, Default)]
pub struct Routes {
    open: Arc<Mutex<HashMap<Vec<u8>, Arc<Route>>>>,
}

/// Closes its route when it is dropped.
pub struct OpenRoute {
    routes: Routes,
    secret: Vec<u8>,
}

impl Drop for OpenRoute {
    fn drop(&mut self) {
        self.routes.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.secret);
    }
}

impl Routes {
    /// Opens a route for a ticket.
    #[must_use = "the route closes when this is dropped"]
    pub fn open(&self, ticket: &Ticket, road: Road) -> OpenRoute {
        let route = Route {
            operation: ticket.operation.clone(),
            source: Identity { role: Role::Host, name: ticket.source.clone() },
            expires: Instant::now() + Duration::from_millis(ticket.expires_in_ms),
            road,
        };
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(ticket.secret.clone(), Arc::new(route));
        OpenRoute { routes: self.clone(), secret: ticket.secret.clone() }
    }

    fn find(&self, from: &Identity, hello: &Hello) -> Result<Arc<Route>, Failure> {
        let denied = |why: &str| Failure::new(Code::Denied, format!("the ticket of {from} is refused: {why}"));
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let route = open.get(&hello.secret).ok_or_else(|| denied("nobody waits for it"))?;
        if route.source != *from {
            return Err(denied(&format!("it was issued to {}", route.source)));
        }
        if route.operation != hello.operation {
            return Err(denied("it was issued for another operation"));
        }
        if route.expires < Instant::now() {
            return Err(denied("it has expired"));
        }
        if hello.protocol_min > PROTOCOL || hello.protocol_max < PROTOCOL {
            let (min, max) = (hello.protocol_min, hello.protocol_max);
            let text = format!("{from} speaks lane protocol {min} to {max}, this controller {PROTOCOL}");
            return Err(Failure::new(Code::Protocol, text).hint("bring all hosts to one release"));
        }
        Ok(route.clone())
    }

    /// Serves one lane to its end.
    pub async fn serve<S>(&self, from: Identity, mut incoming: S, outgoing: Outgoing)
    where
        S: Stream<Item = Result<Chunk, Status>> + Send + Unpin + 'static,
    {
        let served = async {
            let (first, hello) = first_word(&mut incoming).await?;
            let route = self.find(&from, &hello)?;
            match &route.road {
                Road::Ingest(ingest) => ingest.lane(&hello, incoming, outgoing.clone()).await,
                Road::Relay(relay) => relay.lane(first, incoming, outgoing.clone()).await,
            }
        };
        if let Err(failure) = served.await {
            tracing::warn!(%from, %failure, "lane");
            let _ = outgoing.send(Ok(abort(&failure))).await;
        }
    }
}

async fn first_word<S>(incoming: &mut S) -> Result<(Bytes, Hello), Failure>
where
    S: Stream<Item = Result<Chunk, Status>> + Unpin,
{
    let protocol = |text: &str| Failure::new(Code::Protocol, format!("a lane began with {text}"));
    let chunk = tokio::time::timeout(HELLO_MAX, incoming.next()).await.map_err(|_| protocol("silence"))?;
    let chunk = chunk.ok_or_else(|| protocol("its end"))?.map_err(|status| Failure::from_status("lane", &status))?;
    match said(&chunk.frame)? {
        Said::Hello(hello) => Ok((chunk.frame, hello)),
        _ => Err(protocol("something else than Hello")),
    }
}

/// The message in a frame of kind Control.
///
/// # Errors
/// [`Code::Corrupt`].
pub fn said(bytes: &[u8]) -> Result<Said, Failure> {
    let corrupt = |text: String| Failure::new(Code::Corrupt, format!("lane: {text}"));
    let message: LaneMessage = frame::decode_message(Kind::Control, bytes).map_err(|e| corrupt(e.to_string()))?;
    message.message.ok_or_else(|| corrupt("an empty message".into()))
}

/// A chunk that says this.
pub fn say(message: Said) -> Chunk {
    Chunk { frame: frame::encode_message(Kind::Control, &LaneMessage { message: Some(message) }).into() }
}

/// A chunk that ends the attempt.
pub fn abort(failure: &Failure) -> Chunk {
    say(Said::Abort(Abort { code: failure.code as u32, reason: failure.message.clone() }))
}

//! The room of the migration that awaits: it does what the pure machines say, and tells them what happened.
//!
//! - [`send`]: the source's driver, one task; [`workers`]: threads that read, hash and queue pages, one a lane.
//! - [`Receiver`]: the target's driver; one thread a lane checks and writes pages, in the order of the lane.
//! - [`load`]: what goes out in one go; for a checkpoint without what the target has, and sealed.
//! - [`pace`]: how long a thread must wait so that all lanes together keep to a bandwidth.
//!
//! ```text
//! memfd --pread--> frame (hashed in place) --queue of the lane--> tonic --TLS--> tonic --queue--> check --pwrite--> memfd
//! ```
//! A page is copied into its frame once and never again on our side; a queue holds a few batches of frames, so that memory
//! stays bounded and a slow lane only slows itself. It refuses to decide anything that the machines can decide.

mod load;
mod pace;
mod receive;
mod send;
#[cfg(test)]
mod tests;
mod workers;

use std::time::Duration;

use bytes::Bytes;
use proto::status::Code;
use proto::v1::{Chunk, Hello};
use tokio_stream::{Stream, StreamExt};
use tonic::Status;
use tonic::transport::{Endpoint, Server};

use super::Failure;
use super::message::Message;
pub use receive::{Phase, Receiver, Replies};
pub use send::send;

/// HTTP/2 windows: well above a batch of frames, or the wire stands still between two of them; and no larger, because what
/// has arrived and is not yet written lies in memory.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// Bytes of an HTTP/2 frame: a batch of ours has room in one.
const FRAME_BYTES: u32 = 512 << 10;

/// A connection that says nothing for so long is asked, and given up when it does not answer: a silent network must not
/// keep a guest standing.
const SILENCE: Duration = Duration::from_secs(3);
const ANSWER: Duration = Duration::from_secs(10);

/// A message in its frame in its envelope.
fn say(message: Message) -> Bytes {
    proto::lane::enclose(&message.encode())
}

/// Settings of a channel that carries a lane.
pub fn tune_endpoint(endpoint: Endpoint) -> Endpoint {
    endpoint
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(SILENCE)
        .keep_alive_timeout(ANSWER)
        .keep_alive_while_idle(true)
}

/// Settings of a server that serves lanes. `TCP_NODELAY` must be set on accepted sockets by who accepts them.
pub fn tune_server<L>(server: Server<L>) -> Server<L> {
    server
        .tcp_nodelay(true)
        .max_frame_size(FRAME_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(SILENCE))
        .http2_keepalive_timeout(Some(ANSWER))
}

/// Reads the first message of a lane, so that the `Lanes` service can find the receiver of `hello.operation`.
///
/// # Errors
/// The lane ended, or it did not begin with a hello.
pub async fn read_hello<S>(inbound: &mut S) -> Result<Hello, Failure>
where
    S: Stream<Item = Result<Chunk, Status>> + Unpin,
{
    match inbound.next().await {
        Some(Ok(chunk)) => match Message::decode(&chunk.frame) {
            Ok(Message::Hello(hello)) => Ok(hello),
            Ok(other) => {
                Err(Failure::new(Code::Protocol, format_args!("a lane begins with Hello, not {}", other.name())))
            }
            Err(error) => Err(Failure::new(Code::Corrupt, error)),
        },
        Some(Err(status)) => Err(Failure::new(Code::Unreachable, status.message())),
        None => Err(Failure::new(Code::Protocol, "a lane ended before its Hello")),
    }
}

/// What to answer on a lane that no receiver is there for.
pub fn refusal(failure: Failure) -> Chunk {
    chunk(Message::Abort(failure.into()))
}

fn chunk(message: Message) -> Chunk {
    Chunk { frame: message.encode() }
}

/// The words of an error and of all its causes.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

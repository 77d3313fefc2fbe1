//! Lanes that pass through, byte for byte: for hosts that cannot reach each other.
//!
//! Only the first frame is looked at, by whoever chose the route. The target checks every frame and the ticket itself,
//! so nothing here has to be trusted; a relay that falsifies is found by the hashes.

use bytes::Bytes;
use proto::status::Code;
use proto::v1::Chunk;
use proto::v1::lanes_client::LanesClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;
use tonic::transport::Channel;

use super::{LANE_DEPTH, Outgoing};
use crate::agents::link::MESSAGE_MAX;
use crate::failure::Failure;

/// Where to forward to.
pub struct Relay {
    target: String,
    channel: Channel,
}

impl Relay {
    /// To a host over this channel.
    pub fn new(target: &str, channel: Channel) -> Relay {
        Relay { target: target.into(), channel }
    }

    /// Forwards one lane until both ways have ended.
    ///
    /// # Errors
    /// [`Code::Unreachable`] if the target cannot be reached, and what the target answers instead of a stream.
    pub async fn lane<S>(&self, first: Bytes, mut incoming: S, outgoing: Outgoing) -> Result<(), Failure>
    where
        S: Stream<Item = Result<Chunk, Status>> + Send + Unpin + 'static,
    {
        let (forward, forwarded) = mpsc::channel(LANE_DEPTH);
        // There is room for one: the channel is new.
        let _ = forward.send(Chunk { frame: first }).await;
        let mut client = LanesClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX);
        let answer = client.lane(ReceiverStream::new(forwarded)).await;
        let mut back = answer.map_err(|status| Failure::from_status(&self.target, &status))?.into_inner();
        let there = async move {
            while let Some(chunk) = incoming.next().await {
                let chunk = chunk.map_err(|status| Failure::from_status("source", &status))?;
                metrics::counter!(crate::metrics::RELAY_BYTES).increment(chunk.frame.len() as u64);
                if forward.send(chunk).await.is_err() {
                    break;
                }
            }
            Ok::<(), Failure>(())
        };
        let here = async {
            while let Some(chunk) = back.next().await {
                let chunk = chunk.map_err(|status| Failure::from_status(&self.target, &status))?;
                if outgoing.send(Ok(chunk)).await.is_err() {
                    return Err(Failure::new(Code::Unreachable, "the source went away"));
                }
            }
            Ok(())
        };
        // The target ends its way last; a source that breaks ends both.
        tokio::pin!(there, here);
        tokio::select! {
            ended = &mut here => ended,
            sent = &mut there => { sent?; here.await }
        }
    }
}

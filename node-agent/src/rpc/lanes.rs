//! The Lanes service: hands each lane to the receiver of the operation that its hello names.
//!
//! The caller must hold the ticket's secret, which the receiver compares; a host's certificate must also name the
//! source that the ticket names. Knows nothing of what travels.

use std::sync::Arc;

use proto::lane::Inbound;
use proto::status::Code;
use proto::v1::lanes_server::Lanes;
use proto::v1::{Chunk, Hello};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::caller;
use crate::migration::{Failure, Receiver, Replies, read_hello, refusal};
use crate::tls::Identity;
use crate::vm::{Message, Vms};

pub(super) struct LanesService {
    vms: Arc<Vms>,
}

impl LanesService {
    pub(super) fn new(vms: Arc<Vms>) -> LanesService {
        LanesService { vms }
    }
}

#[tonic::async_trait]
impl Lanes for LanesService {
    type LaneStream = Replies;

    async fn lane(&self, mut request: Request<Streaming<Chunk>>) -> Result<Response<Replies>, Status> {
        let caller = caller(&request, &["host", "controller"])?;
        let vms = Arc::clone(&self.vms);
        let laid = Inbound::take(request.extensions_mut());
        let mut inbound = laid.ok_or_else(|| Status::internal("a lane without a body"))?;
        let (queue, replies) = mpsc::unbounded_channel();
        // The answer's headers go out at once: a source may wait for them before its hello.
        tokio::spawn(async move {
            let found = async {
                let hello = read_hello(&mut inbound).await?;
                find(&vms, &caller, &hello).await.map(|receiver| (receiver, hello))
            };
            match found.await {
                Err(failure) => drop(queue.send(Ok(refusal(failure)))),
                Ok((receiver, hello)) => {
                    // Replies are few and small: acknowledgements and the last word.
                    let mut lane = receiver.lane(hello, inbound);
                    while let Some(reply) = lane.next().await {
                        if queue.send(reply).is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(replies)))
    }
}

/// Who takes this lane, if the caller may open it.
async fn find(vms: &Vms, caller: &Identity, hello: &Hello) -> Result<Receiver, Failure> {
    let denied = || Failure::new(Code::Denied, "no VM is expected for this operation");
    let expected = vms.expecting(&hello.operation).ok_or_else(denied)?;
    if caller.role == "host" && caller.name != expected.source {
        tracing::warn!(%caller, source = expected.source, "refused: a lane from another host than the ticket names");
        return Err(denied());
    }
    expected.handle.ask(|reply| Message::Lane(hello.clone(), reply)).await
}

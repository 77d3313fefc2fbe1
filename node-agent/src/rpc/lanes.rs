//! The Lanes service: hands each lane to the receiver of the operation that its hello names.
//!
//! The caller must hold the ticket's secret, which the receiver compares; a host's certificate must also name the
//! source that the ticket names. Knows nothing of what travels.

use std::pin::Pin;
use std::sync::Arc;

use proto::status::Code;
use proto::v1::Chunk;
use proto::v1::lanes_server::Lanes;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::{caller, status};
use crate::migration::{Failure, read_hello};
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
    type LaneStream = Pin<Box<dyn Stream<Item = Result<Chunk, Status>> + Send>>;

    async fn lane(&self, request: Request<Streaming<Chunk>>) -> Result<Response<Self::LaneStream>, Status> {
        let caller = caller(&request, &["host", "controller"])?;
        let vms = Arc::clone(&self.vms);
        let mut inbound = request.into_inner();
        // The answer's headers go out at once: the source sends its hello when it has them.
        let outbound = async_stream(async move {
            let hello = read_hello(&mut inbound).await.map_err(status)?;
            let denied = || status(Failure::new(Code::Denied, "no VM is expected for this operation"));
            let expected = vms.expecting(&hello.operation).ok_or_else(denied)?;
            if caller.role == "host" && caller.name != expected.source {
                tracing::warn!(%caller, source = expected.source, "refused: a lane from another host than the ticket names");
                return Err(denied());
            }
            let operation = hello.operation.clone();
            let receiver = expected.handle.ask(|reply| Message::Lane(operation, reply)).await.map_err(status)?;
            Ok(receiver.lane(hello, inbound))
        });
        Ok(Response::new(Box::pin(outbound)))
    }
}

/// A stream that begins when `first` says which; an error is its only item.
fn async_stream<S>(
    first: impl Future<Output = Result<S, Status>> + Send + 'static,
) -> impl Stream<Item = Result<Chunk, Status>> + Send
where
    S: Stream<Item = Result<Chunk, Status>> + Send + 'static,
{
    enum Begun<S> {
        Lane(Pin<Box<S>>),
        Refused(Option<Status>),
    }
    impl<S: Stream<Item = Result<Chunk, Status>>> Stream for Begun<S> {
        type Item = Result<Chunk, Status>;
        fn poll_next(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<Option<Self::Item>> {
            match &mut *self {
                Begun::Lane(lane) => lane.as_mut().poll_next(cx),
                Begun::Refused(status) => std::task::Poll::Ready(status.take().map(Err)),
            }
        }
    }
    let begun = async move {
        match first.await {
            Ok(lane) => Begun::Lane(Box::pin(lane)),
            Err(status) => Begun::Refused(Some(status)),
        }
    };
    FlattenOnce { begun: Some(Box::pin(begun)), lane: None }.fuse()
}

/// `futures::FutureExt::flatten_stream`, for which alone a dependency would be too much.
struct FlattenOnce<F, S> {
    begun: Option<Pin<Box<F>>>,
    lane: Option<Pin<Box<S>>>,
}

impl<F, S> Stream for FlattenOnce<F, S>
where
    F: Future<Output = S>,
    S: Stream,
{
    type Item = S::Item;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<Option<S::Item>> {
        if let Some(begun) = &mut self.begun {
            match begun.as_mut().poll(cx) {
                std::task::Poll::Pending => return std::task::Poll::Pending,
                std::task::Poll::Ready(lane) => {
                    self.begun = None;
                    self.lane = Some(Box::pin(lane));
                }
            }
        }
        match &mut self.lane {
            Some(lane) => lane.as_mut().poll_next(cx),
            None => std::task::Poll::Ready(None),
        }
    }
}

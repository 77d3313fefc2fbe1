//! Lanes of hosts. The answer's headers go out at once; the ticket decides afterwards where the lane goes.

use proto::lane::Inbound;
use proto::v1::Chunk;
use proto::v1::lanes_server::Lanes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Api, require};
use crate::ingest::LANE_DEPTH;
use crate::tls::Role;

#[tonic::async_trait]
impl Lanes for Api {
    type LaneStream = ReceiverStream<Result<Chunk, Status>>;

    async fn lane(&self, mut request: Request<Streaming<Chunk>>) -> Result<Response<Self::LaneStream>, Status> {
        let identity = require(&request, Role::Host)?;
        let (outgoing, back) = mpsc::channel(LANE_DEPTH);
        let incoming = Inbound::take(request.extensions_mut());
        let incoming = incoming.ok_or_else(|| Status::internal("a lane without a body"))?;
        let routes = self.routes.clone();
        tokio::spawn(async move { routes.serve(identity, incoming, outgoing).await });
        Ok(Response::new(ReceiverStream::new(back)))
    }
}

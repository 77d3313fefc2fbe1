//! What the `Lane` call puts around a frame, and how it leaves without being copied again.
//!
//! A message of gRPC over HTTP/2 is a flag, a length and the protobuf bytes; those of a `Chunk` are a tag, a length and the
//! frame. The threads that make frames write all of that in front of each of them, so that the call only passes finished
//! buffers on: an encoder would copy each frame once more into memory that has never been touched. Everything else of the
//! call (headers, replies, status) is tonic's. Buffers are used again when their bytes have left.
//!
//! It refuses to know what is in a frame.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use http_body::Frame;
use prost::bytes::Bytes;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::tokio_stream::Stream;
use tonic::transport::Channel;

use crate::frame::PAGE_BYTES;

/// Tag of `Chunk.frame`: field 1, length-delimited.
pub(super) const TAG: u8 = 1 << 3 | 2;

/// What a new buffer has room for: a batch of 64 pages, and a header and an envelope for each of them.
const BUFFER_BYTES: usize = 64 * (PAGE_BYTES + 80);

/// Appends what precedes a frame of so many bytes.
pub fn begin(frame_bytes: usize, into: &mut Vec<u8>) {
    let mut length = [0u8; 10];
    let mut used = 0;
    let mut left = frame_bytes;
    loop {
        let more = left >> 7 > 0;
        length[used] = (left & 0x7f) as u8 | u8::from(more) << 7;
        used += 1;
        left >>= 7;
        if !more {
            break;
        }
    }
    let message_bytes = 1 + used + frame_bytes;
    into.push(0);
    into.extend_from_slice(&u32::try_from(message_bytes).expect("frames are limited to far less").to_be_bytes());
    into.push(TAG);
    into.extend_from_slice(&length[..used]);
}

/// A frame in its envelope.
pub fn enclose(frame: &[u8]) -> Bytes {
    let mut bytes = Vec::with_capacity(frame.len() + 16);
    begin(frame.len(), &mut bytes);
    bytes.extend_from_slice(frame);
    bytes.into()
}

/// A channel whose one call has the body that a stream of finished envelopes brings, and ends where that ends.
pub struct Posting<S> {
    channel: Channel,
    body: Option<Letters<S>>,
}

impl<S> Posting<S> {
    /// The call goes over this channel and takes its body from here.
    pub fn new(channel: Channel, envelopes: S) -> Self {
        Self { channel, body: Some(Letters(envelopes)) }
    }
}

impl<S: Stream<Item = Bytes> + Send + Unpin + 'static> Service<Request<Body>> for Posting<S> {
    type Response = Response<Body>;
    type Error = <Channel as Service<Request<Body>>>::Error;
    type Future = <Channel as Service<Request<Body>>>::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Service::<Request<Body>>::poll_ready(&mut self.channel, context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let body = self.body.take().map_or_else(Body::empty, Body::new);
        self.channel.call(request.map(|_| body))
    }
}

struct Letters<S>(S);

impl<S: Stream<Item = Bytes> + Unpin> http_body::Body for Letters<S> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.0).poll_next(context).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// Buffers that are used again: as many as are under way at once, and no more.
#[derive(Debug, Default)]
pub struct Buffers(Mutex<Vec<Vec<u8>>>);

struct Lent {
    bytes: Vec<u8>,
    home: Arc<Buffers>,
}

impl Buffers {
    /// A buffer that nobody uses.
    pub fn take(&self) -> Vec<u8> {
        let used = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        used.unwrap_or_else(|| Vec::with_capacity(BUFFER_BYTES))
    }

    /// The bytes of a buffer; it comes back when they are dropped.
    pub fn lend(self: &Arc<Self>, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent { bytes, home: Arc::clone(self) })
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.home.0.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::v1::Chunk;

    #[test]
    fn an_envelope_is_what_an_encoder_would_write() {
        for bytes in [1, 127, 128, 16_383, 16_384, 300_000] {
            let chunk = Chunk { frame: vec![7; bytes].into() };
            let mut enclosed = Vec::new();
            begin(bytes, &mut enclosed);
            enclosed.extend_from_slice(&chunk.frame);
            let message = chunk.encode_to_vec();
            assert_eq!(enclosed[..5], [&[0], &(message.len() as u32).to_be_bytes()[..]].concat());
            assert!(enclosed[5..] == message, "{bytes}");
        }
        let frame = [1, 2, 3];
        assert_eq!(Chunk::decode(&enclose(&frame)[5..]).unwrap().frame, &frame[..]);
    }

    #[test]
    fn a_buffer_comes_back_when_its_last_bytes_are_dropped() {
        let buffers = Arc::new(Buffers::default());
        let mut buffer = buffers.take();
        buffer.extend([1, 2, 3]);
        let address = buffer.as_ptr();
        let bytes = buffers.lend(buffer);
        let part = bytes.slice(1..2);
        drop(bytes);
        let another = buffers.take();
        assert_ne!(another.as_ptr(), address);
        drop(part);
        let again = buffers.take();
        assert_eq!((again.as_ptr(), again.len()), (address, 3), "it is for its user to clear");
    }
}

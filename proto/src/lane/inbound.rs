//! The messages of a `Lane` call as they arrive, each in one piece of memory that is used again.
//!
//! Counterpart of [`super::envelope`]: HTTP/2 brings an envelope in one piece or in several. tonic gathers them in memory that
//! is new for each message and grows while it does; here what came in one piece is passed on as it lies, and other large
//! messages are gathered in buffers of the size that senders fill. Everything else of the call (headers, replies, status) is
//! tonic's, which is given an empty body ([`Aside`]).
//!
//! It refuses to know what is in a frame, and believes nothing: lengths are checked before anything is allocated.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use http_body::Body as _;
use prost::Message as _;
use prost::bytes::{Buf, Bytes};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Extensions, Request, Response};
use tonic::codegen::tokio_stream::Stream;
use tonic::server::NamedService;

use super::envelope::{Buffers, TAG};
use crate::v1::Chunk;

/// Bytes of gRPC's flag and length.
const PREFIX_BYTES: usize = 5;
/// Smaller messages get memory of their own size.
const LARGE_BYTES: usize = 64 << 10;

/// A service whose calls find their body in the extensions of the request ([`Inbound::take`]).
#[derive(Clone, Debug)]
pub struct Aside<S> {
    service: S,
    bytes_max: usize,
}

#[derive(Clone)]
struct Laid {
    body: Arc<Mutex<Option<Body>>>,
    bytes_max: usize,
}

impl<S> Aside<S> {
    /// Messages are to have at most so many bytes.
    pub fn new(service: S, bytes_max: usize) -> Self {
        Self { service, bytes_max }
    }
}

impl<S> Service<Request<Body>> for Aside<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (mut parts, body) = request.into_parts();
        let laid = Laid { body: Arc::new(Mutex::new(Some(body))), bytes_max: self.bytes_max };
        parts.extensions.insert(laid);
        self.service.call(Request::from_parts(parts, Body::empty()))
    }
}

impl<S: NamedService> NamedService for Aside<S> {
    const NAME: &'static str = S::NAME;
}

/// The messages of one call, in order.
pub struct Inbound {
    body: Body,
    bytes_max: usize,
    piece: Bytes,
    prefix: Vec<u8>,
    /// The message that is being gathered, and how long it will be.
    message: Option<(Vec<u8>, usize)>,
    buffers: Arc<Buffers>,
    over: bool,
}

impl Inbound {
    /// What the caller sends; `None` if the service is not [`Aside`], or it was taken before.
    pub fn take(extensions: &mut Extensions) -> Option<Inbound> {
        let laid = extensions.remove::<Laid>()?;
        let body = laid.body.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(Self::of(body, laid.bytes_max))
    }

    fn of(body: Body, bytes_max: usize) -> Inbound {
        let prefix = Vec::with_capacity(PREFIX_BYTES);
        Inbound { body, bytes_max, piece: Bytes::new(), prefix, message: None, buffers: Arc::default(), over: false }
    }

    /// Takes in as much of the piece as belongs to one message; returns the message if that completes it, and otherwise leaves
    /// nothing of the piece.
    fn gather(&mut self) -> Result<Option<Chunk>, Status> {
        if self.message.is_none() {
            let wanted = (PREFIX_BYTES - self.prefix.len()).min(self.piece.len());
            self.prefix.extend_from_slice(&self.piece.split_to(wanted));
            let Some(&[flag, a, b, c, d]) = self.prefix.first_chunk() else { return Ok(None) };
            let bytes = u32::from_be_bytes([a, b, c, d]) as usize;
            if flag != 0 {
                return Err(Status::unimplemented("messages of lanes are not compressed"));
            }
            if bytes > self.bytes_max {
                let text = format!("a message of {bytes} bytes; {} are the most", self.bytes_max);
                return Err(Status::out_of_range(text));
            }
            self.prefix.clear();
            if self.piece.len() >= bytes {
                // Nothing to gather: the memory that it came in is kept until the message is done with.
                return open(self.piece.split_to(bytes)).map(Some);
            }
            let mut buffer = if bytes >= LARGE_BYTES { self.buffers.take() } else { Vec::with_capacity(bytes) };
            buffer.clear();
            self.message = Some((buffer, bytes));
        }
        let Some((mut gathered, bytes)) = self.message.take() else { return Ok(None) };
        let wanted = (bytes - gathered.len()).min(self.piece.len());
        gathered.extend_from_slice(&self.piece[..wanted]);
        self.piece.advance(wanted);
        if gathered.len() < bytes {
            self.message = Some((gathered, bytes));
            return Ok(None);
        }
        let message = if bytes >= LARGE_BYTES { self.buffers.lend(gathered) } else { gathered.into() };
        open(message).map(Some)
    }
}

/// Takes the frame out of a `Chunk`. Those that our senders write hold nothing else.
fn open(message: Bytes) -> Result<Chunk, Status> {
    if message.first() == Some(&TAG) {
        let mut rest = &message[1..];
        if let Ok(bytes) = prost::encoding::decode_varint(&mut rest)
            && bytes == rest.len() as u64
        {
            return Ok(Chunk { frame: message.slice(message.len() - rest.len()..) });
        }
    }
    Chunk::decode(message).map_err(|error| Status::internal(error.to_string()))
}

impl Stream for Inbound {
    type Item = Result<Chunk, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        let end = loop {
            match self.gather() {
                Ok(Some(chunk)) => return Poll::Ready(Some(Ok(chunk))),
                Err(status) => break Some(Err(status)),
                Ok(None) => {}
            }
            match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => self.piece = frame.into_data().unwrap_or_default(),
                Some(Err(status)) => break Some(Err(status)),
                None if self.message.is_none() && self.prefix.is_empty() => break None,
                None => break Some(Err(Status::internal("the lane ended in the middle of a message"))),
            }
        };
        self.over = true;
        Poll::Ready(end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lane::enclose;

    const BYTES_MAX: usize = 10 << 20;

    struct Pieces(std::vec::IntoIter<Bytes>);

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.next().map(|piece| Ok(http_body::Frame::data(piece))))
        }
    }

    /// What comes out, and whether it ended well.
    fn read(bytes: &[u8], cuts: &[usize]) -> (Vec<Bytes>, Option<Status>) {
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).chain([bytes.len()]).collect();
        ends.sort_unstable();
        let mut from = 0;
        let pieces: Vec<Bytes> = ends
            .into_iter()
            .map(|end| Bytes::copy_from_slice(&bytes[std::mem::replace(&mut from, end)..end]))
            .collect();
        let mut inbound = Inbound::of(Body::new(Pieces(pieces.into_iter())), BYTES_MAX);
        let mut frames = Vec::new();
        while let Some(next) = next(&mut inbound) {
            match next {
                Ok(chunk) => frames.push(chunk.frame),
                Err(status) => {
                    assert!(self::next(&mut inbound).is_none(), "an error is the last word");
                    return (frames, Some(status));
                }
            }
        }
        (frames, None)
    }

    /// The next message; all pieces are there already.
    fn next(inbound: &mut Inbound) -> Option<Result<Chunk, Status>> {
        let mut context = Context::from_waker(std::task::Waker::noop());
        match Pin::new(inbound).poll_next(&mut context) {
            Poll::Ready(next) => next,
            Poll::Pending => panic!("it waits for nothing"),
        }
    }

    proptest! {
        #[test]
        fn messages_are_those_that_were_sent_however_they_are_cut(
            sizes in proptest::collection::vec(prop_oneof![0..40usize, 60_000..140_000usize], 0..6),
            cuts in proptest::collection::vec(any::<usize>(), 0..12),
            missing in 0..30usize,
        ) {
            let sent: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(at, size)| vec![at as u8 + 1; *size]).collect();
            let whole: Vec<u8> = sent.iter().flat_map(|frame| enclose(frame)).collect();
            let (frames, failed) = read(&whole, &cuts);
            prop_assert!(failed.is_none(), "{failed:?}");
            prop_assert_eq!(&frames, &sent);
            let cut = &whole[..whole.len().saturating_sub(missing)];
            let (frames, failed) = read(cut, &cuts);
            prop_assert!(sent.starts_with(&frames.iter().map(|f| f.to_vec()).collect::<Vec<_>>()));
            let complete: usize = frames.iter().map(|frame| enclose(frame).len()).sum();
            prop_assert_eq!(failed.is_some(), complete < cut.len());
        }

        #[test]
        fn whatever_comes_does_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = read(&bytes, &[7]);
        }
    }

    #[test]
    fn messages_of_other_writers_are_understood_and_those_that_are_too_long_refused() {
        // Field 2, unknown here, before the frame.
        let message = [&[0x10, 5, TAG, 3][..], b"abc"].concat();
        let enveloped = [&[0, 0, 0, 0, message.len() as u8][..], &message].concat();
        assert_eq!(read(&enveloped, &[]).0, ["abc"]);
        assert_eq!(read(&[0, 0, 0, 0, 0], &[]).0, [""]);
        let refused = |bytes: &[u8]| read(bytes, &[]).1.unwrap().code();
        assert_eq!(refused(&[1, 0, 0, 0, 0]), tonic::Code::Unimplemented);
        assert_eq!(refused(&[0, 255, 255, 255, 255]), tonic::Code::OutOfRange);
        assert_eq!(refused(&[0, 0, 0, 0, 2, TAG, 9]), tonic::Code::Internal);
    }

    /// Where the frame of each message lies, one after the other, each dropped before the next is asked for.
    fn addresses(pieces: Vec<Bytes>) -> Vec<*const u8> {
        let mut inbound = Inbound::of(Body::new(Pieces(pieces.into_iter())), BYTES_MAX);
        let mut addresses = Vec::new();
        while let Some(chunk) = next(&mut inbound) {
            addresses.push(chunk.unwrap().frame.as_ptr());
        }
        addresses
    }

    #[test]
    fn buffers_of_large_messages_are_used_again() {
        let whole = enclose(&vec![3; LARGE_BYTES]);
        let halves = || [whole.slice(..LARGE_BYTES / 2), whole.slice(LARGE_BYTES / 2..)];
        let found = addresses([halves(), halves()].concat());
        assert!(found.len() == 2 && found[0] == found[1], "{found:?}");
    }

    #[test]
    fn what_came_in_one_piece_is_passed_on_as_it_lies() {
        let whole = Bytes::from([enclose(&vec![3; LARGE_BYTES]), enclose(&[4])].concat());
        let range = whole.as_ptr_range();
        let found = addresses(vec![whole.clone()]);
        assert!(found.len() == 2 && found.iter().all(|address| range.contains(address)), "{found:?}");
    }
}

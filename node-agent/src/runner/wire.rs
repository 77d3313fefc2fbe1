//! Frames on the runner's unix socket, cut out of a byte stream with a bound known before anything is allocated.
//!
//! Both ends use it. A stream that carries anything but well-formed frames of kind Control is over: there is no way
//! to find the next frame. Descriptors travel beside the bytes (`SCM_RIGHTS`, unix(7)).

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use proto::frame::{self, FrameError, HEADER_BYTES, Header, Kind};
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// Most descriptors that one reply brings: three for RAM and for each local disk, two for what the guest boots from, and
/// the one over missing pages. Linux takes at most 253 in a message.
pub const DESCRIPTORS_MAX: usize = 3 + 3 * 64 + 2 + 1;

/// Collects bytes until they are a frame.
#[derive(Default, Debug)]
pub struct Inbox {
    bytes: Vec<u8>,
    taken: usize,
}

impl Inbox {
    /// Adds bytes that came from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, if it has arrived.
    ///
    /// # Errors
    /// [`FrameError`]: the stream is beyond repair.
    pub fn take<M: prost::Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let rest = &self.bytes[self.taken..];
        if rest.len() < HEADER_BYTES {
            return Ok(None);
        }
        let header = Header::parse(rest)?;
        if header.kind != Kind::Control {
            return Err(FrameError::Unexpected { found: header.kind, expected: Kind::Control });
        }
        let end = HEADER_BYTES + header.body_bytes;
        if rest.len() < end {
            return Ok(None);
        }
        let message = frame::decode_message(Kind::Control, &rest[..end])?;
        self.taken += end;
        Ok(Some(message))
    }
}

/// Sends bytes, and descriptors beside the first of them. Returns how many bytes went.
///
/// # Errors
/// Of sendmsg(2).
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(rustix::io::Errno::TOOBIG);
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
}

/// Receives bytes and the descriptors beside them. 0 bytes: the other side has closed.
///
/// # Errors
/// Of recvmsg(2).
pub fn receive(socket: impl AsFd, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = rustix::net::recvmsg(socket, &mut [std::io::IoSliceMut::new(bytes)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proto::v1::{RunnerReply, RunnerRequest, RunnerStatus, runner_request::Request};

    #[test]
    fn a_frame_is_found_however_it_is_cut() {
        let request = RunnerRequest { id: 7, request: Some(Request::Status(RunnerStatus {})) };
        let frame = frame::encode_message(Kind::Control, &request);
        let two = [frame.clone(), frame].concat();
        for step in 1..two.len() {
            let (mut inbox, mut found) = (Inbox::default(), 0);
            for piece in two.chunks(step) {
                inbox.push(piece);
                while let Some(message) = inbox.take::<RunnerRequest>().unwrap() {
                    assert_eq!(message, request);
                    found += 1;
                }
            }
            assert_eq!(found, 2, "step {step}");
        }
    }

    #[test]
    fn other_kinds_are_refused_from_the_header() {
        let mut inbox = Inbox::default();
        inbox.push(&frame::encode(Kind::Manifest, &[0; 100])[..HEADER_BYTES]);
        assert!(matches!(inbox.take::<RunnerReply>(), Err(FrameError::Unexpected { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut inbox = Inbox::default();
            inbox.push(&bytes);
            let _ = inbox.take::<RunnerRequest>();
        }
    }
}

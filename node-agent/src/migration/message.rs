//! What a lane carries: one enum, its frames, and nothing else. The tag is the frame's kind or the `LaneMessage`'s case.
//!
//! A frame of pages is passed on unopened: whoever lands it checks its hash, so that it is hashed only once. All others
//! are checked here. This module refuses to know which message may come when; that is for [`super::source`] and
//! [`super::target`].

use bytes::Bytes;
use proto::frame::{self, FrameError, Kind};
use proto::v1::lane_message::Message as Case;
use proto::v1::{Abort, BaseLeaves, Hello, HelloReply, LaneMessage, Ready, RoundAck, RoundEnd, Section, StateEnd};

/// A message on a lane.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// A whole frame of kind `Pages`, its header checked, its hash not.
    Pages(Bytes),
    /// A section.
    Section(Section),
    /// A block of a recording, whole and unopened.
    Journal(Bytes),
    /// First from the source.
    Hello(Hello),
    /// First from the target.
    HelloReply(HelloReply),
    /// Digests of what the base of a checkpoint holds.
    BaseLeaves(BaseLeaves),
    /// The lane's part of a round is complete.
    RoundEnd(RoundEnd),
    /// All lanes' parts are written.
    RoundAck(RoundAck),
    /// The sections are complete.
    StateEnd(StateEnd),
    /// The target has applied everything.
    Ready(Ready),
    /// The attempt is over.
    Abort(Abort),
}

impl Message {
    /// Takes a frame from a lane apart.
    ///
    /// # Errors
    /// Any [`FrameError`]; of a frame of pages only those of its header.
    pub fn decode(bytes: &Bytes) -> Result<Self, FrameError> {
        match frame::Header::parse(bytes)?.kind {
            Kind::Pages => Ok(Self::Pages(bytes.clone())),
            Kind::Journal => Ok(Self::Journal(bytes.clone())),
            Kind::Section => frame::decode_message(Kind::Section, bytes).map(Self::Section),
            Kind::Control => {
                let message: LaneMessage = frame::decode_message(Kind::Control, bytes)?;
                let body = |text: &str| FrameError::Body { kind: Kind::Control, text: text.to_owned() };
                message.message.map(Self::from).ok_or_else(|| body("a lane message of no known case"))
            }
            found @ (Kind::Manifest
            | Kind::PackIndex
            | Kind::Sealed
            | Kind::PageMap
            | Kind::Envelope
            | Kind::Recording) => Err(FrameError::Unexpected { found, expected: Kind::Control }),
        }
    }

    /// The frame of a message.
    pub fn encode(self) -> Bytes {
        let case = match self {
            Self::Pages(bytes) | Self::Journal(bytes) => return bytes,
            Self::Section(section) => return frame::encode_message(Kind::Section, &section).into(),
            Self::Hello(m) => Case::Hello(m),
            Self::HelloReply(m) => Case::HelloReply(m),
            Self::BaseLeaves(m) => Case::BaseLeaves(m),
            Self::RoundEnd(m) => Case::RoundEnd(m),
            Self::RoundAck(m) => Case::RoundAck(m),
            Self::StateEnd(m) => Case::StateEnd(m),
            Self::Ready(m) => Case::Ready(m),
            Self::Abort(m) => Case::Abort(m),
        };
        frame::encode_message(Kind::Control, &LaneMessage { message: Some(case) }).into()
    }

    /// Its name, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Pages(_) => "Pages",
            Self::Section(_) => "Section",
            Self::Journal(_) => "Journal",
            Self::Hello(_) => "Hello",
            Self::HelloReply(_) => "HelloReply",
            Self::BaseLeaves(_) => "BaseLeaves",
            Self::RoundEnd(_) => "RoundEnd",
            Self::RoundAck(_) => "RoundAck",
            Self::StateEnd(_) => "StateEnd",
            Self::Ready(_) => "Ready",
            Self::Abort(_) => "Abort",
        }
    }
}

impl From<Case> for Message {
    fn from(case: Case) -> Self {
        match case {
            Case::Hello(m) => Self::Hello(m),
            Case::HelloReply(m) => Self::HelloReply(m),
            Case::BaseLeaves(m) => Self::BaseLeaves(m),
            Case::RoundEnd(m) => Self::RoundEnd(m),
            Case::RoundAck(m) => Self::RoundAck(m),
            Case::StateEnd(m) => Self::StateEnd(m),
            Case::Ready(m) => Self::Ready(m),
            Case::Abort(m) => Self::Abort(m),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_message_survives_its_frame() {
        let run = frame::PageRun { first_page: 1, pages: 1, space: 0, encoding: frame::Encoding::Zero };
        let mut pages = run.begin();
        frame::seal(&mut pages);
        for message in [
            Message::Pages(pages.into()),
            Message::Section(Section { name: "clock".into(), ..Default::default() }),
            Message::Journal(frame::encode(Kind::Journal, b"block").into()),
            Message::Hello(Hello { lane: 3, ..Default::default() }),
            Message::HelloReply(HelloReply { protocol: 1 }),
            Message::RoundEnd(RoundEnd { round: 2, frames: 7, last: true }),
            Message::RoundAck(RoundAck { round: 2 }),
            Message::StateEnd(StateEnd {
                sections: 4,
                digest: None,
                verify_full: true,
                stopped_us: 5,
                ram_follows: false,
                replay_until: Some(proto::v1::Position { retired: 7, skipped_tsc: 8 }),
            }),
            Message::Ready(Ready { digest: None }),
            Message::Abort(Abort { code: 9, reason: "x".into() }),
        ] {
            assert_eq!(Message::decode(&message.clone().encode()), Ok(message));
        }
    }

    #[test]
    fn frames_that_do_not_belong_on_a_lane_are_refused() {
        let manifest: Bytes = frame::encode(Kind::Manifest, &[]).into();
        assert!(matches!(Message::decode(&manifest), Err(FrameError::Unexpected { .. })));
        let empty: Bytes = frame::encode(Kind::Control, &[]).into();
        assert!(matches!(Message::decode(&empty), Err(FrameError::Body { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0..8u16) {
            let _ = Message::decode(&bytes.clone().into());
            let mut frame = frame::encode(Kind::Control, &bytes);
            frame[4..6].copy_from_slice(&kind.to_le_bytes());
            let _ = Message::decode(&frame.into());
            let _ = Message::decode(&frame::encode(Kind::Control, &bytes).into());
        }
    }
}

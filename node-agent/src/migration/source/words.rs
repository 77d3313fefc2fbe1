//! What the source hears, and what it asks for.
//!
//! Inputs and effects are values: who reads pages, speaks to lanes and to the runner is [`crate::migration::link`]. It refuses
//! to know in which state what is heard.

use proto::status::Code;
use proto::v1::{MachineDigest, PhaseReport, RoundReport, Section};

use crate::migration::Failure;

/// What a round put on the lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoundTotals {
    /// Pages read.
    pub pages: u64,
    /// Of these, pages whose bytes did not travel because they are zero.
    pub zero_pages: u64,
    /// Bytes of frames.
    pub bytes: u64,
    /// Pages that were dirty again before their turn came: the next round has them.
    pub left_out_pages: u64,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// A lane's target accepted our Hello.
    Replied {
        /// Which lane.
        lane: u32,
        /// The version it chose.
        protocol: u32,
    },
    /// The target has told all that its base holds.
    LeavesTold,
    /// Answer to [`Effect::AdvanceEpoch`].
    Epoch(u32),
    /// Answer to [`Effect::SendRound`]: all its frames and `RoundEnd`s are on the lanes.
    RoundSent(RoundTotals),
    /// `RoundAck`.
    Acked {
        /// Which round.
        round: u32,
    },
    /// Answer to [`Effect::MeasureLeft`].
    Left {
        /// Bytes in pages that became dirty before `epoch` began.
        bytes: u64,
        /// The epoch that began with the measurement.
        epoch: u32,
    },
    /// Answer to [`Effect::Look`]. Never out of place.
    Looked {
        /// As asked for.
        since: u32,
        /// Bytes in pages with this stamp or a later one.
        bytes: u64,
    },
    /// Answer to [`Effect::Stop`].
    Stopped,
    /// Answer to [`Effect::Capture`].
    Captured(Vec<Section>),
    /// Answer to [`Effect::Freeze`].
    Frozen {
        /// What is stamped with this epoch or later came after the instant.
        epoch: u32,
        /// Sections of the instant.
        sections: Vec<Section>,
        /// How long the guest stood still for it.
        stopped_us: u64,
    },
    /// Answer to [`Effect::Digest`].
    Digested(MachineDigest),
    /// `Ready`.
    Ready(MachineDigest),
    /// `Abort` from the target.
    Aborted(Failure),
    /// A lane is lost, the runner refuses, a page cannot be read.
    Lost(Failure),
    /// The operator or the controller wants no more of it.
    Cancel(Failure),
    /// Time has passed; so many bytes have left since the beginning. Never out of place.
    Tick {
        /// Bytes of frames.
        bytes_sent: u64,
    },
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Close the running epoch.
    AdvanceEpoch,
    /// Put pages with stamp `since` or later on the lanes, then `RoundEnd` on each.
    SendRound {
        /// Number of the round, from 1.
        round: u32,
        /// Mark.
        since: u32,
        /// Pages with this stamp or a later one may be left to the next round.
        until: Option<u32>,
        /// The guest is stopped, or an instant is frozen.
        last: bool,
        /// Pages as they were at this frozen instant.
        instant: Option<u32>,
    },
    /// Close the running epoch and count pages with stamp `since` or later.
    MeasureLeft {
        /// Mark.
        since: u32,
    },
    /// Count pages that have stamp `since` or a later one already, while the epoch goes on.
    Look {
        /// Epoch.
        since: u32,
    },
    /// Pause the guest.
    Stop,
    /// Get its sections.
    Capture,
    /// Name an instant and keep what pages stamped since then held at it; get its sections.
    Freeze {
        /// Mark.
        since: u32,
    },
    /// The instant is not needed any more.
    Thaw,
    /// Compute the digest of all pages (as sent) and of the sections.
    Digest {
        /// The sections.
        sections: Vec<Section>,
        /// Hash all pages again from memory and compare with what was sent.
        verify_full: bool,
    },
    /// Put the sections and `StateEnd` on lane 0.
    SendState {
        /// The sections.
        sections: Vec<Section>,
        /// Our digest.
        digest: MachineDigest,
        /// Ask the target to hash all pages again.
        verify_full: bool,
        /// How long the guest has stood still, for the manifest of a checkpoint.
        stopped_us: u64,
    },
    /// Hold the guest back by so much of its time from now on; 0 lets it run free.
    Throttle {
        /// Percent.
        percent: u32,
    },
    /// Let the guest go on.
    Resume,
    /// Tell the target that it is over.
    AbortTarget(Failure),
    /// A round is done.
    ReportRound(RoundReport),
    /// A phase is done.
    ReportPhase(PhaseReport),
}

impl Input {
    fn name(&self) -> &'static str {
        match self {
            Self::Replied { .. } => "HelloReply",
            Self::LeavesTold => "digests of a base",
            Self::Epoch(_) => "an epoch",
            Self::RoundSent(_) => "the end of a round",
            Self::Acked { .. } => "RoundAck",
            Self::Left { .. } => "a measurement",
            Self::Looked { .. } => "a look",
            Self::Stopped => "a stop",
            Self::Captured(_) => "sections",
            Self::Frozen { .. } => "a frozen instant",
            Self::Digested(_) => "a digest",
            Self::Ready(_) => "Ready",
            Self::Aborted(_) => "Abort",
            Self::Lost(_) => "a loss",
            Self::Cancel(_) => "a cancel",
            Self::Tick { .. } => "the time",
        }
    }

    /// What an input means that does not fit the state.
    pub(super) fn misplaced(&self, state: &str) -> Failure {
        let from_target = matches!(self, Self::Replied { .. } | Self::Acked { .. } | Self::Ready(_));
        let code = if from_target { Code::Protocol } else { Code::Internal };
        Failure::new(code, format_args!("{} came while {state}", self.name()))
    }
}

//! Moves a VM over lanes: to another agent (migration), or to the controller (checkpoint); receives one likewise.
//!
//! ```text
//! Source                                            Target                          who may run the guest
//! Connecting  Hello (every lane) ───────────────>   Waiting                         source
//!             <─────────────────── HelloReply       Receiving
//! Precopy     Pages… RoundEnd (every lane) ─────>   Receiving                       source
//!             <─────────────────── RoundAck         (mark moves at the source)
//!             … until `transfer::rounds` says stop, or the operator cancels …
//! Stopping    stop, capture the sections                                            nobody
//! LastPages   Pages… RoundEnd{last} (every lane) >  Receiving                       nobody
//!             <─────────────────── RoundAck         Sections                        (a checkpoint's source goes on)
//! Comparing   Section… StateEnd{digest} ────────>   Applying: apply, capture again  nobody
//!             <─────────────────── Ready{digest}    Ready                           nobody
//! HandedOver                                                                        nobody
//! ─────────── the controller's ledger append: the point of no return ──────────────────────────────────────────
//! (discarded)                                       (activated)                     target
//! ```
//! Any failure, loss of a lane, `Abort`, cancel or long silence of the target before `HandedOver` ends in `Failed` on that side: the source lets the
//! guest go on, the target keeps it stopped and discards it. A source in `HandedOver` does nothing by itself any more.
//! Since only the controller's word can start the target and that word needs `HandedOver`, both never run.
//!
//! [`source`] and [`target`] are pure: they take inputs and `now`, and return effects. [`link`] does what they say: lanes,
//! threads that read and hash pages, pace, progress, cancel. The simulator joins the two pure machines under a seed.
//! This room refuses to know sagas, leases, the runner's socket and who may call.

#[cfg(test)]
mod bank;
pub mod link;
pub mod message;
#[cfg(test)]
mod sim;
pub mod source;
pub mod target;

use std::fmt;
use std::sync::Arc;

use proto::status::Code;
use proto::v1::{self, Section};
use vmcb_engine::memory::digest::PageDigests;
use vmcb_engine::memory::shared::SharedPages;

/// Versions of the lane protocol that this release speaks.
pub const PROTOCOL: std::ops::RangeInclusive<u32> = 1..=1;
/// How often a guest that is held back must be held back again: it must run free when this agent dies.
pub const THROTTLE_REPEAT: std::time::Duration = std::time::Duration::from_secs(1);
/// Limit to set on both ends of the `Lanes` service for one message.
pub const MESSAGE_BYTES_MAX: usize = 10 << 20;

/// Why a transfer ended without a hand-over; travels as [`v1::Abort`] and `OperationFailed`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    /// What kind of failure.
    pub code: Code,
    /// What, where and why, for people.
    pub reason: String,
}

impl Failure {
    /// A failure in words.
    pub fn new(code: Code, reason: impl fmt::Display) -> Self {
        Self { code, reason: reason.to_string() }
    }
}

impl From<Failure> for v1::Abort {
    fn from(failure: Failure) -> Self {
        v1::Abort { code: failure.code as u32, reason: failure.reason }
    }
}

/// What the migration needs of a VM that leaves. The agent implements it over the runner's socket.
pub trait SourceVm: Send + 'static {
    /// Closes the running epoch and returns the new one (`RunnerAdvanceEpoch`).
    fn advance_epoch(&mut self) -> impl Future<Output = Result<u32, Failure>> + Send;
    /// Stamps what the guest has written so far, while the epoch goes on (`RunnerLook`).
    fn look(&mut self) -> impl Future<Output = Result<(), Failure>> + Send;
    /// Holds the guest back by so much percent of its time; 0 lifts it. It lapses by itself unless it is repeated every
    /// [`THROTTLE_REPEAT`].
    fn throttle(&mut self, percent: u32) -> impl Future<Output = Result<(), Failure>> + Send;
    /// Pauses the guest for the hand-over. It stays paused until [`SourceVm::resume`], whatever the lease says.
    fn stop(&mut self) -> impl Future<Output = Result<(), Failure>> + Send;
    /// Sections of the stopped guest.
    fn capture(&mut self) -> impl Future<Output = Result<Vec<Section>, Failure>> + Send;
    /// Stops the guest for the instant in which its sections are captured and an epoch ends; from then on keeps what pages
    /// stamped since `mark` held, until [`SourceVm::thaw`]. It lapses by itself unless it is repeated every
    /// [`THROTTLE_REPEAT`]. The answer is [`source::Input::Frozen`].
    fn freeze(&mut self, mark: u32) -> impl Future<Output = Result<source::Input, Failure>> + Send;
    /// Repeats [`SourceVm::freeze`]; fails if the instant is lost.
    fn stay_frozen(&mut self) -> impl Future<Output = Result<(), Failure>> + Send;
    /// Ends [`SourceVm::freeze`]; fails if the instant was lost, so that what was read must not be used.
    fn thaw(&mut self) -> impl Future<Output = Result<(), Failure>> + Send;
    /// Undoes [`SourceVm::stop`]: a guest that ran before runs again. Repeatable; called also when `stop` failed.
    fn resume(&mut self) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// What the migration needs of a VM that arrives: a runner without state.
pub trait TargetVm: Send + 'static {
    /// Loads the sections; RAM and disks have been written through the shared descriptors.
    fn apply(&mut self, sections: Vec<Section>) -> impl Future<Output = Result<(), Failure>> + Send;
    /// Captures the sections again, to prove that they arrived.
    fn capture(&mut self) -> impl Future<Output = Result<Vec<Section>, Failure>> + Send;
    /// Goes through a recording that began with what was applied.
    fn replay(&mut self, replay: target::Replay) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// The pages of a VM: RAM is space 0, local disks are 1, 2, ... in order of the configuration (shared disks have none).
#[derive(Clone, Debug)]
pub struct Spaces(Arc<Vec<SharedPages>>);

impl Spaces {
    /// RAM and the local disks.
    pub fn new(ram: SharedPages, disks: Vec<SharedPages>) -> Self {
        Self(Arc::new(std::iter::once(ram).chain(disks).collect()))
    }

    /// Whether the runner can keep an instant: one of an earlier release, which has outlived its agent, cannot.
    pub fn keep(&self) -> bool {
        self.0[0].keeps()
    }
}

impl std::ops::Deref for Spaces {
    type Target = [SharedPages];
    fn deref(&self) -> &[SharedPages] {
        &self.0
    }
}

/// What a checkpoint's source remembers, so that the next checkpoint sends only what changed.
#[derive(Clone, Debug)]
pub struct Base {
    /// The checkpoint: the id that the target is asked to build on. The agent sets it to what the controller calls it.
    pub checkpoint: String,
    /// Pages stamped with this epoch or later are not in it.
    pub mark: u32,
    /// Digests of all its pages, by space.
    pub digests: Vec<PageDigests>,
}

/// A transfer that ended well.
#[derive(Clone, Debug)]
pub struct Sent {
    /// For the controller; not yet sent as an event.
    pub handed_over: v1::HandedOver,
    /// For the next checkpoint; `checkpoint` is the operation's id until the agent knows better.
    pub base: Base,
}

/// Names of the parts in which two digests differ.
fn differing_parts(ours: &v1::MachineDigest, theirs: &v1::MachineDigest) -> Vec<&'static str> {
    let mut parts = Vec::new();
    for (name, same) in
        [("RAM", ours.ram == theirs.ram), ("state", ours.state == theirs.state), ("disks", ours.disks == theirs.disks)]
    {
        if !same {
            parts.push(name);
        }
    }
    // Parts that agree under a root that does not: the other side computed nonsense.
    if parts.is_empty() && ours.machine != theirs.machine {
        parts.push("digest");
    }
    parts
}

pub use link::{Phase, Receiver, Replies, read_hello, refusal, send, tune_endpoint, tune_server};

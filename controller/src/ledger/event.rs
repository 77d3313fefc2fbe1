//! What the ledger says: records, and the plans of operations that they begin.
//!
//! A record is JSON with a format number, so that it can be read by people and by every later release; protobuf
//! messages inside it (configurations, policies) are the hex of their bytes. Fields are added with a default, never
//! changed. This file knows nothing of disks and networks.

use proto::v1::{CheckpointPolicy, MachineConfig, MachineDigest, TransferPolicy};
use serde::{Deserialize, Serialize};

use super::recording::Recording;
use crate::failure::Failure;
use crate::saga::table::Shape;
use crate::sweep::Swept;

/// Format of [`Record`].
pub const FORMAT: u32 = 1;

/// One entry of the ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`FORMAT`].
    pub format: u32,
    /// Position in the ledger: 1, 2, 3, ... without a gap.
    pub sequence: u64,
    /// When, on the controller's clock. For people; nothing is decided by it.
    pub unix_ms: u64,
    /// Who asked: `operator/admin`, `host/hostA`, `controller/main`.
    pub actor: String,
    /// VM it is about; may be empty.
    pub vm: String,
    /// Label of the operation's task; may be empty.
    pub task: String,
    /// What happened.
    pub event: Event,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A controller with this length of lease started.
    LeaseSet {
        /// Milliseconds.
        lease_ms: u64,
    },
    /// A host was heard for the first time, or under another address.
    HostSeen {
        /// Its name.
        host: String,
        /// `host:port` of its agent.
        address: String,
    },
    /// A VM of a release before contracts got the contract of its CPU model.
    ContractFrozen {
        /// Name of the VM.
        vm: String,
        /// A `CapabilitySet`.
        #[serde(with = "super::saved::bytes")]
        capabilities: Vec<u8>,
    },
    /// This ledger's cluster has this name from now on, by which its claims in buckets are known.
    ClusterNamed {
        /// Hex of its id.
        cluster: String,
    },
    /// A checkpoint lies in the bucket that this ledger did not know.
    CheckpointFound {
        /// What its manifest says.
        entry: Box<CheckpointEntry>,
    },
    /// Objects in the bucket are missing or damaged.
    ObjectsDamaged {
        /// Hex of the id of the VM whose they are.
        vm_id: String,
        /// What is said of each, by key.
        objects: std::collections::BTreeMap<String, String>,
        /// The checkpoints that need one of them.
        checkpoints: Vec<String>,
    },
    /// Generations of a VM lie in the bucket that this ledger did not offer; it offers newer ones from now on.
    GenerationSeen {
        /// Name of the VM.
        vm: String,
        /// The newest of them.
        generation: u64,
    },
    /// Everything that enters a VM is recorded from now on.
    RecordingBegan {
        /// The VM.
        vm: String,
        /// Hex of the recording's id.
        recording: String,
        /// `JournalFull`.
        full: i32,
    },
    /// A recording does not go on.
    RecordingEnded {
        /// The VM.
        vm: String,
        /// Hex of the recording's id.
        recording: String,
        /// Why.
        why: String,
    },
    /// A recording lies in the bucket that this ledger did not know.
    RecordingFound {
        /// What its blocks say.
        entry: Box<Recording>,
    },
    /// A recording was removed with all that it had in the bucket.
    RecordingRemoved {
        /// The VM.
        vm: String,
        /// Hex of the recording's id.
        recording: String,
    },
    /// A checkpoint was restored, watched and destroyed again.
    Drilled {
        /// The VM whose checkpoint it is.
        vm: String,
        /// The checkpoint.
        checkpoint: String,
        /// It showed a sign of life.
        alive: bool,
        /// How it went.
        words: String,
    },
    /// An operation began: its locks are held and its generation is reserved from here on.
    OperationBegan {
        /// Hex of an operation id.
        operation: String,
        /// What it is going to do.
        plan: Box<Plan>,
    },
    /// A step before or after the commit was done.
    StepDone {
        /// The operation.
        operation: String,
        /// Index in its shape.
        step: usize,
    },
    /// A step before the commit failed: everything is undone from here.
    StepFailed {
        /// The operation.
        operation: String,
        /// Index in its shape.
        step: usize,
        /// Why.
        failure: Failure,
    },
    /// The point of no return: the operation's change is true from this record on.
    Committed {
        /// The operation.
        operation: String,
        /// What the plan could not know.
        result: Box<Outcome>,
    },
    /// The operator cancelled it.
    Cancelled {
        /// The operation.
        operation: String,
    },
    /// The controller was started again while it was under way.
    Interrupted {
        /// The operation.
        operation: String,
    },
    /// A step was undone.
    StepUndone {
        /// The operation.
        operation: String,
        /// Index in its shape.
        step: usize,
    },
    /// A step after the commit is left to reconciliation.
    GaveUp {
        /// The operation.
        operation: String,
        /// Index in its shape.
        step: usize,
        /// Why.
        failure: Failure,
    },
    /// All pages of a lazily restored VM have come: it does not need its checkpoint any more.
    PagesArrived {
        /// The VM.
        vm: String,
        /// Its generation.
        generation: u64,
    },
    /// From here on checkpoints of a VM are made and kept by this policy.
    PolicySet {
        /// The VM.
        vm: String,
        /// When, and which are kept.
        #[serde(with = "super::saved::message")]
        policy: CheckpointPolicy,
    },
    /// From here on no checkpoint of a VM is made or removed by the clock.
    PolicyRemoved {
        /// The VM.
        vm: String,
    },
    /// The newest checkpoint is older than twice the interval.
    PolicyMissed {
        /// The VM.
        vm: String,
        /// Its age, milliseconds.
        age_ms: u64,
    },
    /// There is a checkpoint again that is young enough.
    PolicyRecovered {
        /// The VM.
        vm: String,
        /// Its age, milliseconds.
        age_ms: u64,
    },
    /// A checkpoint by policy failed; the next attempt waits.
    PolicyBackedOff {
        /// The VM.
        vm: String,
        /// The operation that failed.
        operation: String,
        /// Failures since the newest checkpoint, this one among them.
        failures: u32,
        /// How long the next attempt waits, milliseconds.
        wait_ms: u64,
        /// Why it failed.
        reason: String,
    },
}

/// What a commit adds to its plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing: the plan says it all.
    AsPlanned,
    /// A checkpoint was made.
    Checkpoint(Box<CheckpointEntry>),
    /// A checkpoint was read in full: `ok` or `damaged: ...`.
    Verified(String),
    /// Packs were hashed again.
    Sampled {
        /// How many.
        packs: u64,
        /// Their bytes.
        bytes: u64,
        /// How many of them are damaged.
        damaged: u64,
    },
    /// A VM's packs were swept.
    Swept(Box<Swept>),
}

/// What the operator asked a VM to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Intent {
    /// It should run.
    Running,
    /// It should be there and stand still.
    Paused,
    /// It should have no process.
    Stopped,
}

impl Intent {
    /// The word for people.
    pub fn word(self) -> &'static str {
        match self {
            Intent::Running => "running",
            Intent::Paused => "paused",
            Intent::Stopped => "stopped",
        }
    }
}

/// Who holds a VM: only this host may run it, and only as this generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The host.
    pub host: String,
    /// The generation it holds.
    pub generation: u64,
}

/// What an operation is going to do: all that a controller needs that goes on with it after a restart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Name of the VM.
    pub vm: String,
    /// Hex of the VM's id.
    pub vm_id: String,
    /// Names that no other operation may hold at the same time.
    pub locks: Vec<String>,
    /// Who holds the VM when the operation begins.
    pub holder: Option<Holder>,
    /// Generation that the commit raises the VM to; 0 if it does not. Never offered twice.
    pub generation: u64,
    /// The kind of operation and its own parameters.
    pub task: Task,
}

/// Kinds of operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Build and start a new VM.
    Create {
        /// Where.
        host: String,
        /// The machine.
        #[serde(with = "super::saved::message")]
        config: MachineConfig,
        /// `IsolationPolicy`.
        on_isolation: i32,
        /// CPU contract, a `CapabilitySet`; empty in a record of a release before contracts.
        #[serde(with = "super::saved::bytes")]
        capabilities: Vec<u8>,
    },
    /// Stand still.
    Pause {
        /// What was asked for before.
        was: Intent,
    },
    /// Go on.
    Resume {
        /// What was asked for before.
        was: Intent,
    },
    /// End the runner.
    Stop,
    /// Forget the VM and free what its host keeps of it.
    Remove,
    /// Move to another host.
    Migrate {
        /// Where to.
        target: String,
        /// Lanes go through the controller.
        via_controller: bool,
        /// Whether it stands still on arrival.
        paused: bool,
        /// The engine that it goes on with there; empty: the one that it has.
        #[serde(default)]
        engine: String,
        /// The operator's limits.
        #[serde(with = "super::saved::message")]
        policy: TransferPolicy,
    },
    /// Write the whole state to the bucket.
    Checkpoint {
        /// Hex of the checkpoint's id.
        checkpoint: String,
        /// A policy may remove it again; otherwise only an operator does.
        #[serde(default)]
        by_policy: bool,
    },
    /// Load a checkpoint into a VM.
    Restore {
        /// Which.
        checkpoint: String,
        /// Where.
        target: String,
        /// The VM is not in the ledger yet.
        new: bool,
        /// The machine, from the manifest.
        #[serde(with = "super::saved::message")]
        config: MachineConfig,
        /// CPU contract, from the manifest, a `CapabilitySet`; empty in a record of a release before contracts.
        #[serde(with = "super::saved::bytes")]
        capabilities: Vec<u8>,
        /// `IsolationPolicy`.
        on_isolation: i32,
        /// The operator's limits.
        #[serde(with = "super::saved::message")]
        policy: TransferPolicy,
        /// The guest runs before its RAM has come.
        #[serde(default)]
        lazy: bool,
        /// The checkpoint policy that a new VM gets, from the manifest; empty: none.
        #[serde(default, with = "super::saved::bytes")]
        checkpoint_policy: Vec<u8>,
        /// It is going to be watched and destroyed.
        #[serde(default)]
        drill: bool,
        /// What the guest goes through before it is ready.
        #[serde(default)]
        replay: Option<Replay>,
    },
    /// Read a checkpoint in full and check everything.
    Verify {
        /// Which.
        checkpoint: String,
    },
    /// Remove a checkpoint from the bucket.
    RemoveCheckpoint {
        /// Which.
        checkpoint: String,
        /// Generation whose packs are its own.
        generation: u64,
    },
    /// Hash some packs of a VM again.
    Sample {
        /// Their keys.
        packs: Vec<String>,
    },
    /// Remove the packs of a VM that no checkpoint needs.
    Sweep {
        /// Packs of which less than so many percent are needed are rewritten; 0: none.
        live_percent_min: u32,
    },
}

impl Task {
    /// Word for logs, metrics and events.
    pub fn label(&self) -> &'static str {
        match self {
            Task::Create { .. } => "create",
            Task::Pause { .. } => "pause",
            Task::Resume { .. } => "resume",
            Task::Stop => "stop",
            Task::Remove => "remove",
            Task::Migrate { .. } => "migrate",
            Task::Checkpoint { .. } => "checkpoint",
            Task::Restore { .. } => "restore",
            Task::Verify { .. } => "verify",
            Task::RemoveCheckpoint { .. } => "remove-checkpoint",
            Task::Sweep { .. } => "sweep",
            Task::Sample { .. } => "sample",
        }
    }

    /// The steps, in order, and which of them is the commit.
    pub fn shape(&self) -> Shape {
        shape(self.label()).expect("every label has a shape; a test looks")
    }

    /// The host that holds the VM after the commit, where the commit changes that.
    pub fn new_host(&self) -> Option<&str> {
        match self {
            Task::Create { host, .. } => Some(host),
            Task::Migrate { target, .. } | Task::Restore { target, .. } => Some(target),
            _ => None,
        }
    }
}

/// The labels of all tasks.
pub const LABELS: [&str; 12] = [
    "create",
    "pause",
    "resume",
    "stop",
    "remove",
    "migrate",
    "checkpoint",
    "restore",
    "verify",
    "remove-checkpoint",
    "sweep",
    "sample",
];

/// The steps of the task with this label, as records name it.
pub fn shape(label: &str) -> Option<Shape> {
    let (steps, commit): (&[&str], usize) = match label {
        "create" => (&["create", "commit"], 1),
        "pause" => (&["pause", "commit"], 1),
        "resume" => (&["resume", "commit"], 1),
        "stop" => (&["commit", "stop"], 0),
        "remove" => (&["commit", "discard"], 0),
        "migrate" => (&["prepare", "precopy", "commit", "activate", "release"], 2),
        "checkpoint" => (&["stream", "commit"], 1),
        "restore" => (&["fence", "prepare", "load", "commit", "activate", "release"], 3),
        "verify" => (&["read", "commit"], 1),
        "remove-checkpoint" => (&["commit", "erase"], 0),
        "sweep" => (&["sweep", "commit"], 1),
        "sample" => (&["read", "commit"], 1),
        _ => return None,
    };
    Some(Shape { steps, commit })
}

/// The part of a recording that a restored guest goes through before it is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replay {
    /// Hex of the recording's id.
    pub recording: String,
    /// Sequence of the first block, which begins with the checkpoint.
    pub first: u64,
    /// Of the last one.
    pub last: u64,
    /// Where it ends: `Position`.
    pub retired: u64,
    /// The same.
    pub skipped_tsc: u64,
    /// How long it took when it was recorded.
    pub span_ms: u64,
    /// How much of the journal it is, about; 0: written by a controller that did not ask.
    #[serde(default)]
    pub bytes: u64,
}

impl Replay {
    /// Where it ends.
    pub fn until(&self) -> proto::v1::Position {
        proto::v1::Position { retired: self.retired, skipped_tsc: self.skipped_tsc }
    }
}

/// What the ledger keeps of a checkpoint. The manifest in the bucket says the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointEntry {
    /// Hex of the checkpoint's id.
    pub id: String,
    /// Name of the VM when it was made.
    pub vm: String,
    /// Hex of the VM's id.
    pub vm_id: String,
    /// Generation of the VM when it was made.
    pub generation: u64,
    /// When it was made.
    pub created_unix_ms: u64,
    /// Guest RAM.
    pub ram_bytes: u64,
    /// Bytes of all packs that it needs, those that it shares with others included, and of its manifest.
    pub stored_bytes: u64,
    /// Of these, what was written for it alone.
    #[serde(default)]
    pub own_bytes: u64,
    /// How long the guest stood still, microseconds.
    pub stop_us: u64,
    /// Where the manifest lies.
    pub manifest_key: String,
    /// Where the packs lie.
    pub pack_keys: Vec<String>,
    /// Digest over all of it.
    #[serde(with = "super::saved::message")]
    pub digest: MachineDigest,
    /// `unverified`, `ok` or `damaged: ...`.
    pub verified: String,
    /// A policy may remove it; otherwise it was made by hand and only an operator does.
    #[serde(default)]
    pub by_policy: bool,
    /// Record that made it true: the order in which checkpoints were made, whatever the clock said. The fold fills it.
    #[serde(default)]
    pub sequence: u64,
}

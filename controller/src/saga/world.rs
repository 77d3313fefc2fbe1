//! What an operation can do to the world: the calls that steps are made of.
//!
//! Every call may be repeated; every call may have happened although its answer was lost. The real world is in
//! `hosts.rs`; tests have one that fails, repeats and forgets on purpose. A call knows nothing of the ledger.

use std::future::Future;

use proto::v1::{
    ActivateReply, ActivateRequest, CreateVmRequest, HandedOver, MachineDigest, OperationRef, PrepareReply,
    PrepareRequest, SendRequest, StopVmRequest, Ticket, TransferPolicy, VmInfo, VmRef,
};

use super::voice::Voice;
use crate::failure::Failure;
use crate::ingest::read::Damaged;
use crate::ingest::receive::Expected;
use crate::ledger::event::{CheckpointEntry, Replay};
use crate::ledger::recording::Recording;
use crate::sweep::{Request, Swept};

/// Answer of a call.
pub trait Answer<T>: Future<Output = Result<T, Failure>> + Send {}
impl<T, F: Future<Output = Result<T, Failure>> + Send> Answer<T> for F {}

/// Hosts, bucket and time.
pub trait World: Send + Sync + 'static {
    /// Builds and starts a VM.
    fn create(&self, host: &str, request: CreateVmRequest) -> impl Answer<VmInfo>;
    /// What a host has of a VM now.
    fn look(&self, host: &str, vm: VmRef) -> impl Answer<VmInfo>;
    /// Makes a VM stand still.
    fn pause(&self, host: &str, vm: VmRef) -> impl Answer<VmInfo>;
    /// Lets a VM go on.
    fn resume(&self, host: &str, vm: VmRef) -> impl Answer<VmInfo>;
    /// Ends a VM's runner.
    fn stop(&self, host: &str, request: StopVmRequest) -> impl Answer<VmInfo>;
    /// Removes all that a host keeps of a VM up to a generation.
    fn discard(&self, host: &str, vm: VmRef) -> impl Answer<()>;
    /// Reserves what a VM needs that is going to arrive.
    fn prepare(&self, host: &str, request: PrepareRequest) -> impl Answer<PrepareReply>;
    /// Lets a VM run that has arrived and is committed.
    fn activate(&self, host: &str, request: ActivateRequest) -> impl Answer<ActivateReply>;
    /// Takes back `prepare` and `send`.
    fn abandon(&self, host: &str, operation: OperationRef) -> impl Answer<()>;
    /// Sends a VM to its target, through the controller if `relay` names the target's own address; ends when it stands
    /// still there and both digests agree.
    fn send(&self, host: &str, request: SendRequest, relay: Option<&str>, voice: &Voice) -> impl Answer<HandedOver>;
    /// Sends a VM's state into the bucket; ends when it is durable.
    fn checkpoint(
        &self,
        host: &str,
        request: SendRequest,
        expected: Expected,
        voice: &Voice,
    ) -> impl Answer<CheckpointEntry>;
    /// Sends a checkpoint to a host that is prepared for it; ends when it has all of it and the digests agree.
    fn load(&self, load: LoadRequest<'_>, voice: &Voice) -> impl Answer<MachineDigest>;
    /// Waits until this host surely does not run this VM any more.
    fn lease_end(&self, host: &str, vm: &str, voice: &Voice) -> impl Future<Output = ()> + Send;
    /// Which packs of a checkpoint are missing or cut short; only lists. A manifest that is damaged is the one thing that is named then.
    fn lost(&self, manifest_key: &str) -> impl Answer<Damaged>;
    /// Reads a checkpoint in full; what of it is missing or damaged.
    fn verify(&self, entry: &CheckpointEntry, voice: &Voice) -> impl Answer<Damaged>;
    /// Hashes packs again: their bytes, and what is missing or damaged.
    fn sample(&self, packs: &[String]) -> impl Answer<(u64, Damaged)>;
    /// Removes a manifest: from then on the checkpoint does not exist, whatever happens to its packs.
    fn erase(&self, manifest_key: &str) -> impl Answer<()>;
    /// Removes the segments of a recording before the first one that begins with one of these captures; how many. Whoever calls
    /// holds the lock of the VM's packs.
    fn prune_journal(&self, recording: &Recording, kept: &[Vec<u8>]) -> impl Answer<usize>;
    /// Removes what no checkpoint of a VM needs. Whoever calls holds the lock of the VM's packs.
    fn sweep(&self, request: &Request, say: &(dyn Fn(String) + Sync)) -> impl Answer<Swept>;
}

/// What [`World::load`] needs.
#[derive(Clone, Copy, Debug)]
pub struct LoadRequest<'a> {
    /// Where the manifest lies.
    pub manifest_key: &'a str,
    /// The right to deliver.
    pub ticket: &'a Ticket,
    /// The target.
    pub host: &'a str,
    /// Where its lanes are.
    pub address: &'a str,
    /// The operator's limits.
    pub policy: &'a TransferPolicy,
    /// All but RAM, which follows while the guest runs.
    pub lazy: bool,
    /// What the guest goes through before it is ready.
    pub replay: Option<&'a Replay>,
}

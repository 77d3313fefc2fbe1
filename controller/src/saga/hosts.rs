//! The world as it is: agents over mutual TLS, the bucket, and the clock.
//!
//! Every call to an agent has a limit of time but the streams of a transfer, which end with their connection (kept
//! alive by HTTP/2 pings), with the operator's cancel, or by themselves. What an agent answers about a VM is remembered
//! as observed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use proto::status::Code;
use proto::v1::transfer_event::Event as Said;
use proto::v1::{
    ActivateReply, ActivateRequest, CreateVmRequest, HandedOver, MachineDigest, OperationRef, PrepareReply,
    PrepareRequest, SendRequest, StopVmRequest, TransferEvent, VmInfo, VmRef,
};
use tokio::time::Instant;

use super::voice::Voice;
use super::world::{LoadRequest, World};
use crate::agents::{Agents, host_identity, link};
use crate::failure::Failure;
use crate::ingest::assembly::spaces;
use crate::ingest::layers::Base;
use crate::ingest::load::{Journal, Load};
use crate::ingest::manifest;
use crate::ingest::map::PackAt;
use crate::ingest::owner::Claim;
use crate::ingest::read::{Damaged, Reader};
use crate::ingest::receive::{Expected, Ingest};
use crate::ingest::relay::Relay;
use crate::ingest::{Road, Routes};
use crate::journal::Journals;
use crate::ledger::event::{CheckpointEntry, Replay};
use crate::ledger::recording::Recording;
use crate::sweep::{Request, Sweeper, Swept};
use crate::tls::Tls;

/// Limit of a call that only changes what is there.
const QUICK: Duration = Duration::from_secs(15);
/// Limit of a call that builds a machine or removes its files.
const SLOW: Duration = Duration::from_secs(120);

/// Agents, bucket, lanes.
pub struct Hosts {
    /// How agents are called.
    pub agents: Arc<Agents>,
    /// Where checkpoints lie, and what opens them.
    pub reader: Reader,
    /// Recordings in the bucket.
    pub journals: Journals,
    /// Lanes that end in, or pass through, this controller.
    pub routes: Routes,
    /// Certificates for lanes that begin here.
    pub tls: Arc<Tls>,
    /// How agents reach this controller's Lanes service.
    pub address: String,
    /// Removes what nobody needs.
    pub sweeper: Sweeper,
}

impl Hosts {
    async fn transfer(&self, host: &str, request: SendRequest, voice: &Voice) -> Result<HandedOver, Failure> {
        let mut client = self.agents.client(host)?;
        let broken = |status: tonic::Status| Failure::from_status(host, &status);
        let mut events = client.send(request).await.map_err(broken)?.into_inner();
        while let Some(event) = events.message().await.map_err(broken)? {
            match event.event {
                Some(Said::HandedOver(handed_over)) => return Ok(handed_over),
                Some(Said::Failed(abort)) => {
                    return Err(Failure::new(Code::from_number(abort.code), format!("{host}: {}", abort.reason)));
                }
                Some(_) => voice.transfer(event),
                None => {}
            }
        }
        Err(Failure::new(Code::Unreachable, format!("{host} ended the transfer without a word")))
    }

    /// The checkpoint that a new one builds on: the best of those that can be read and whose page maps are not damaged. None
    /// is no reason to make no checkpoint: then it is full.
    async fn base(&self, expected: &Expected, voice: &Voice) -> Option<Base> {
        for key in &expected.bases {
            let opened = match self.reader.manifest(key).await {
                Ok(opened) => opened,
                Err(failure) => {
                    voice.note(format!("{failure}: nothing is built on it"));
                    continue;
                }
            };
            let manifest = &opened.manifest;
            if manifest.major != 2 || manifest.config.as_ref().map(spaces) != Some(spaces(&expected.config)) {
                continue;
            }
            let is_lost = |pack: &PackAt| expected.damaged.contains(&manifest::pack_key(manifest, pack));
            if manifest::layer_packs(manifest).iter().any(is_lost) {
                voice.note(format!(
                    "page maps of checkpoint {} are damaged: nothing is built on it",
                    manifest.checkpoint
                ));
                continue;
            }
            let lost: BTreeSet<PackAt> = manifest::packs(manifest).into_iter().filter(is_lost).collect();
            if !lost.is_empty() {
                let (count, id) = (lost.len(), &manifest.checkpoint);
                voice.note(format!("{count} packs of checkpoint {id} are lost: their pages are sent again"));
            }
            return Some(Base { opened, lost });
        }
        None
    }

    /// Has a source send a checkpoint, until it is durable or has failed.
    async fn taken(
        &self,
        host: &str,
        request: SendRequest,
        ingest: &Ingest,
        voice: &Voice,
    ) -> Result<CheckpointEntry, Failure> {
        let sent = self.transfer(host, self.to_this_controller(request), voice);
        tokio::pin!(sent);
        tokio::select! {
            // The ingest knows better why, if it is the one that gave up.
            sent = &mut sent => drop(sent.map_err(|failure| ingest.failure().unwrap_or(failure))?),
            finished = ingest.finished() => { finished?; sent.await?; }
        }
        ingest.finished().await
    }

    /// A claim in this controller's name.
    pub fn named(&self, claim: Claim) -> Claim {
        Claim { name: format!("{} at {}", self.tls.identity(), self.address), ..claim }
    }

    fn to_this_controller(&self, request: SendRequest) -> SendRequest {
        SendRequest { address: self.address.clone(), peer_identity: self.tls.identity().to_string(), ..request }
    }
}

/// A damaged object as what was found, and no failure.
fn damage_alone(failure: Failure) -> Result<Damaged, Failure> {
    if failure.code == Code::Corrupt && !failure.object.is_empty() {
        return Ok([(failure.object, failure.message)].into());
    }
    Err(failure)
}

/// The part of a recording of this VM that a guest goes through.
fn journal(journals: &Journals, vm_id: &str, replay: &Replay) -> Result<Journal, Failure> {
    let bad = || Failure::new(Code::Internal, format!("{} is no recording of {vm_id}", replay.recording));
    let shelf = journals.shelf(vm_id.parse().map_err(|_| bad())?, replay.recording.parse().map_err(|_| bad())?);
    Ok(Journal { shelf, blocks: replay.first..replay.last.saturating_add(1), until: replay.until() })
}

impl World for Hosts {
    async fn prune_journal(&self, recording: &Recording, kept: &[Vec<u8>]) -> Result<usize, Failure> {
        let bad = || Failure::new(Code::Internal, format!("{} is no recording", recording.id));
        let (vm, id) = (recording.vm_id.parse().map_err(|_| bad())?, recording.id.parse().map_err(|_| bad())?);
        self.journals.prune(vm, id, kept, recording.ended.is_empty()).await
    }

    async fn create(&self, host: &str, request: CreateVmRequest) -> Result<VmInfo, Failure> {
        let info = self.agents.call(host, SLOW, async |mut agent| agent.create_vm(request).await).await?;
        self.agents.observe(host, &info);
        Ok(info)
    }

    async fn look(&self, host: &str, vm: VmRef) -> Result<VmInfo, Failure> {
        self.agents.call(host, QUICK, async |mut agent| agent.get_vm(vm).await).await
    }

    async fn pause(&self, host: &str, vm: VmRef) -> Result<VmInfo, Failure> {
        let info = self.agents.call(host, QUICK, async |mut agent| agent.pause_vm(vm).await).await?;
        self.agents.observe(host, &info);
        Ok(info)
    }

    async fn resume(&self, host: &str, vm: VmRef) -> Result<VmInfo, Failure> {
        let info = self.agents.call(host, QUICK, async |mut agent| agent.resume_vm(vm).await).await?;
        self.agents.observe(host, &info);
        Ok(info)
    }

    async fn stop(&self, host: &str, request: StopVmRequest) -> Result<VmInfo, Failure> {
        let info = self.agents.call(host, SLOW, async |mut agent| agent.stop_vm(request).await).await?;
        self.agents.observe(host, &info);
        Ok(info)
    }

    async fn discard(&self, host: &str, vm: VmRef) -> Result<(), Failure> {
        let (name, generation) = (vm.vm.clone(), vm.generation);
        self.agents.call(host, SLOW, async |mut agent| agent.discard_vm(vm).await).await?;
        self.agents.observe_discarded(host, &name, generation);
        Ok(())
    }

    async fn prepare(&self, host: &str, request: PrepareRequest) -> Result<PrepareReply, Failure> {
        self.agents.call(host, SLOW, async |mut agent| agent.prepare(request).await).await
    }

    async fn activate(&self, host: &str, request: ActivateRequest) -> Result<ActivateReply, Failure> {
        let reply = self.agents.call(host, QUICK, async |mut agent| agent.activate(request).await).await?;
        if let Some(info) = &reply.vm {
            self.agents.observe(host, info);
        }
        Ok(reply)
    }

    async fn abandon(&self, host: &str, operation: OperationRef) -> Result<(), Failure> {
        self.agents.call(host, QUICK, async |mut agent| agent.abandon(operation).await).await.map(drop)
    }

    async fn send(
        &self,
        host: &str,
        request: SendRequest,
        relay: Option<&str>,
        voice: &Voice,
    ) -> Result<HandedOver, Failure> {
        let (Some(address), Some(ticket)) = (relay, &request.ticket) else {
            return self.transfer(host, request, voice).await;
        };
        let channel = link::channel(&self.tls, address, &host_identity(&ticket.target))?;
        let _open = self.routes.open(ticket, Road::Relay(Relay::new(&ticket.target, channel)));
        self.transfer(host, self.to_this_controller(request), voice).await
    }

    async fn checkpoint(
        &self,
        host: &str,
        request: SendRequest,
        expected: Expected,
        voice: &Voice,
    ) -> Result<CheckpointEntry, Failure> {
        let ticket = request.ticket.clone().ok_or_else(|| Failure::new(Code::Internal, "no ticket"))?;
        let expected = Expected { claim: self.named(expected.claim.clone()), ..expected };
        expected.claim.make(&self.reader.bucket).await?;
        let key = self.reader.keys.data_key(&self.reader.bucket, expected.vm_id).await?;
        let base = self.base(&expected, voice).await;
        let request = SendRequest {
            data_key: key.expose().to_vec(),
            vm_id: expected.vm_id.to_string(),
            checkpoint_id: expected.checkpoint.to_string(),
            base: base.as_ref().map(|base| base.opened.manifest.checkpoint.clone()).unwrap_or_default(),
            base_damaged: base.as_ref().is_some_and(|base| !base.lost.is_empty()),
            ..request
        };
        let ingest = Ingest::new(expected, self.reader.clone(), key, base);
        let _open = self.routes.open(&ticket, Road::Ingest(ingest.clone()));
        let taken = self.taken(host, request, &ingest, voice).await;
        if taken.is_err() {
            // What is being written would appear after it was looked for and removed.
            ingest.settled().await;
        }
        taken
    }

    async fn load(&self, load: LoadRequest<'_>, voice: &Voice) -> Result<MachineDigest, Failure> {
        let opened = self.reader.manifest(load.manifest_key).await?;
        let journal = match load.replay {
            Some(replay) => Some(journal(&self.journals, &opened.manifest.vm_id, replay)?),
            None => None,
        };
        let load = Load {
            reader: &self.reader,
            opened: &opened,
            ticket: load.ticket,
            target: load.host,
            channel: link::channel(&self.tls, load.address, &host_identity(load.host))?,
            lanes: load.policy.lanes,
            bandwidth: load.policy.bandwidth_bytes_per_s,
            verify_full: load.policy.verify_full,
            lazy: load.lazy,
            journal,
        };
        load.send(|event| voice.transfer(TransferEvent { event: Some(event) })).await
    }

    async fn lease_end(&self, host: &str, vm: &str, voice: &Voice) {
        let end = self.agents.lease_ended_at(host, vm);
        let left = end.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            let seconds = left.as_secs_f64();
            voice.note(format!("waiting {seconds:.1} s until the lease of {vm} on {host} has surely ended"));
            tokio::time::sleep_until(end).await;
        }
        voice.note(format!("the lease of {vm} on {host} has ended"));
    }

    async fn lost(&self, manifest_key: &str) -> Result<Damaged, Failure> {
        match self.reader.manifest(manifest_key).await {
            Ok(opened) => self.reader.lost(&opened).await,
            Err(failure) => damage_alone(failure),
        }
    }

    async fn verify(&self, entry: &CheckpointEntry, voice: &Voice) -> Result<Damaged, Failure> {
        match self.reader.manifest(&entry.manifest_key).await {
            Ok(opened) => {
                let progress = |done, all| voice.note(format!("{done} of {all} packs are read"));
                self.reader.examine(&opened, progress).await
            }
            Err(failure) => damage_alone(failure),
        }
    }

    async fn sample(&self, packs: &[String]) -> Result<(u64, Damaged), Failure> {
        let (mut bytes, mut found) = (0, Damaged::new());
        for key in packs {
            match self.reader.rehash(key).await {
                Ok(length) => bytes += length,
                Err(failure) => found.extend(damage_alone(failure)?),
            }
        }
        Ok((bytes, found))
    }

    async fn erase(&self, manifest_key: &str) -> Result<(), Failure> {
        Ok(self.reader.bucket.delete(manifest_key).await?)
    }

    async fn sweep(&self, request: &Request, say: &(dyn Fn(String) + Sync)) -> Result<Swept, Failure> {
        let request = Request { claim: self.named(request.claim.clone()), ..request.clone() };
        self.sweeper.sweep(&self.reader, &request, say).await
    }
}

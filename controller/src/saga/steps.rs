//! What each step of each operation does, and how it is taken back.
//!
//! | operation  | steps (the one in capitals is the commit)              | taken back by                         |
//! |------------|--------------------------------------------------------|---------------------------------------|
//! | create     | create, COMMIT                                         | discard                               |
//! | pause      | pause, COMMIT                                          | resume, if it ran                     |
//! | resume     | resume, COMMIT                                         | pause, if it stood still              |
//! | stop       | COMMIT, stop                                           |                                       |
//! | remove     | COMMIT, discard                                        |                                       |
//! | migrate    | prepare, precopy, COMMIT, activate, release            | abandon on the target, on the source  |
//! | checkpoint | stream, COMMIT                                         | abandon on the source; erase          |
//! | restore    | fence, prepare, load, COMMIT, activate, release        | resume, if it ran; abandon            |
//! | verify     | read, COMMIT                                           |                                       |
//! | remove-checkpoint | COMMIT, erase                                   |                                       |
//! | sweep      | sweep, COMMIT                                          |                                       |
//! | sample     | read, COMMIT                                           |                                       |
//!
//! Steps may be repeated. What only lives in memory ([`Memory`]) is needed before the commit alone, because a
//! controller that starts again undoes what is not committed; after it everything comes from the plan.

use std::collections::BTreeSet;
use std::time::Duration;

use proto::ids::Generation;
use proto::status::Code;
use proto::v1::{
    ActivateRequest, CreateVmRequest, HandedOver, IsolationPolicy, MachineConfig, OperationRef, PhaseReport,
    PrepareRequest, SendRequest, StopVmRequest, Ticket, TransferPolicy, VmRef, VmState,
};
use tokio::time::Instant;

use super::gate::Gate;
use super::voice::Voice;
use super::world::{LoadRequest, World};
use crate::failure::Failure;
use crate::ingest::read::Damaged;
use crate::ingest::receive::Expected;
use crate::ledger::event::{CheckpointEntry, Event, Holder, Intent, Outcome, Plan, Replay, Task};
use crate::ledger::state::Operation;
use crate::ledger::{Ledger, unix_ms};
use crate::retention::policy;
use crate::sweep::{Request, Swept};

/// How long a ticket is good for the first word of a lane.
const TICKET_MS: u64 = 120_000;

/// How long is waited for the first instruction of a lazily restored guest, for the report alone.
const FIRST_INSTRUCTION_MAX: Duration = Duration::from_secs(3);
const LOOK_PAUSE: Duration = Duration::from_millis(3);
/// A restore that goes through more of a journal than this says so.
const LONG_JOURNAL_BYTES: u64 = 256 << 20;

/// What is said before a guest goes through a part of its recording.
pub(super) fn told_before(replay: &Replay, target: &str) -> Vec<String> {
    let (blocks, seconds) = (replay.last - replay.first + 1, replay.span_ms as f64 / 1e3);
    let mut notes = vec![format!("{target} will go through {blocks} blocks that were recorded in {seconds:.1} s")];
    if replay.bytes > LONG_JOURNAL_BYTES {
        let mib = replay.bytes >> 20;
        notes.push(format!(
            "warning: that is {mib} MiB of journal, which takes a while; `ctl policy set VM --every TIME` makes checkpoints that are nearer"
        ));
    }
    notes
}

/// What an operation remembers between its steps; gone after a restart.
#[derive(Default)]
pub struct Memory {
    ticket: Option<Ticket>,
    address: String,
    /// Both digests agreed; the guest stands still at the source.
    pub handed_over: Option<(HandedOver, Instant)>,
    /// The checkpoint that was made.
    pub checkpoint: Option<CheckpointEntry>,
    /// Packs that were hashed again, their bytes, and how many are damaged.
    pub sampled: Option<(u64, u64, u64)>,
    /// What a sweep did.
    pub swept: Option<Swept>,
    /// What reading a checkpoint found.
    pub verdict: Option<String>,
    /// Time from the hand-over to the answer of the target, and the phases that the controller measured itself.
    pub downtime_ms: f64,
    /// When the target said that the guest runs there, in milliseconds of the Unix clock: what comes after it
    /// (`release`) is no part of the migration's time.
    pub running_unix_ms: Option<u64>,
    /// Phases that the controller measured itself.
    pub phases: Vec<PhaseReport>,
    /// A restore: from its beginning to the guest's first instruction; 0: not known.
    pub first_instruction_ms: f64,
    /// How long the target took to let it go on.
    resume_ms: f64,
}

/// One operation's hands: where its steps are done.
pub struct Hands<'a, W> {
    /// The world.
    pub world: &'a W,
    /// What is true.
    pub ledger: &'a Ledger,
    /// The operation.
    pub operation: &'a Operation,
    /// What it says.
    pub voice: &'a Voice,
    /// How many checkpoints are taken at once.
    pub gate: &'a Gate,
}

fn lost(what: &str) -> Failure {
    Failure::new(Code::Internal, format!("{what} is not remembered"))
}

impl<W: World> Hands<'_, W> {
    fn plan(&self) -> &Plan {
        &self.operation.plan
    }

    fn holder(&self) -> Result<&Holder, Failure> {
        self.plan().holder.as_ref().ok_or_else(|| lost("who holds the VM"))
    }

    fn of(&self, generation: u64, reason: &str) -> VmRef {
        VmRef { vm: self.plan().vm.clone(), generation, operation: self.operation.id.clone(), reason: reason.into() }
    }

    fn itself(&self, reason: &str) -> OperationRef {
        OperationRef { operation: self.operation.id.clone(), vm: self.plan().vm.clone(), reason: reason.into() }
    }

    /// Does a step that is not the commit. What it finds damaged in the bucket is in the ledger afterwards.
    ///
    /// # Errors
    /// The world's.
    pub async fn perform(&self, step: &str, memory: &mut Memory) -> Result<(), Failure> {
        let done = self.act(step, memory).await;
        if let Err(failure) = &done
            && failure.code == Code::Corrupt
            && !failure.object.is_empty()
        {
            self.damaged([(failure.object.clone(), failure.message.clone())].into()).await?;
        }
        done
    }

    /// Puts damage into the ledger that it does not know, and says which checkpoints that hurts.
    async fn damaged(&self, mut objects: Damaged) -> Result<(), Failure> {
        let state = self.ledger.state();
        objects.retain(|key, _| !state.damaged.contains_key(key));
        let hurt: BTreeSet<&String> =
            objects.keys().flat_map(|key| state.hurt_by(key)).map(|entry| &entry.id).collect();
        let checkpoints: Vec<String> = hurt.into_iter().cloned().collect();
        if checkpoints.is_empty() {
            return Ok(());
        }
        for why in objects.values() {
            self.voice.note(format!("{why}; this damages {}", checkpoints.join(", ")));
        }
        let vm_id = self.plan().vm_id.clone();
        let vm_id = checkpoints.first().and_then(|id| state.checkpoints.get(id)).map_or(vm_id, |c| c.vm_id.clone());
        let event = Event::ObjectsDamaged { vm_id, objects, checkpoints };
        self.ledger.append(&self.operation.actor, event).await?;
        Ok(())
    }

    async fn act(&self, step: &str, memory: &mut Memory) -> Result<(), Failure> {
        match (&self.plan().task, step) {
            (Task::Create { host, config, on_isolation, capabilities }, _) => {
                self.create(host, config, *on_isolation, capabilities).await
            }
            (Task::Pause { .. }, _) => self.pause("paused by the operator").await,
            (Task::Resume { .. }, _) => self.resume().await,
            (Task::Stop, _) => self.stop().await,
            (Task::Remove, _) => self.discard().await,
            (Task::Migrate { target, .. }, "prepare") => self.prepare(target, memory).await,
            (Task::Migrate { target, via_controller, policy, .. }, "precopy") => {
                self.precopy(target, *via_controller, policy, memory).await
            }
            (Task::Migrate { target, paused, .. }, "activate") => self.activate(target, *paused, memory).await,
            (Task::Migrate { .. }, _) => self.release(memory).await,
            (Task::Checkpoint { checkpoint, .. }, _) => self.stream(checkpoint, memory).await,
            (Task::Restore { .. }, "fence") => self.fence().await,
            (Task::Restore { target, .. }, "prepare") => self.prepare(target, memory).await,
            (Task::Restore { .. }, "load") => self.load(memory).await,
            (Task::Restore { target, lazy, .. }, "activate") => {
                self.activate(target, false, memory).await?;
                self.note_first_instruction(target, *lazy, memory).await;
                Ok(())
            }
            (Task::Restore { .. }, _) => self.release(memory).await,
            (Task::Verify { checkpoint }, _) => self.verify(checkpoint, memory).await,
            (Task::RemoveCheckpoint { checkpoint, generation }, _) => {
                if self.erase(checkpoint, *generation).await? {
                    self.prune_journals().await?;
                }
                Ok(())
            }
            (Task::Sample { packs }, _) => self.sample(packs, memory).await,
            (Task::Sweep { live_percent_min }, _) => self.sweep(*live_percent_min, memory).await,
        }
    }

    /// Takes back a step that was done, or may have been.
    ///
    /// # Errors
    /// The world's.
    pub async fn undo(&self, step: &str) -> Result<(), Failure> {
        let why = self.operation.failure.as_ref().map_or("it failed", |failure| &failure.message);
        match (&self.plan().task, step) {
            (_, "commit") => Ok(()),
            (Task::Create { host, .. }, _) => self.world.discard(host, self.of(self.plan().generation, why)).await,
            (Task::Pause { was: Intent::Running }, _) => self.resume().await,
            (Task::Resume { was: Intent::Paused }, _) => self.pause("paused by the operator").await,
            (Task::Migrate { target, .. } | Task::Restore { target, .. }, "prepare") => {
                self.world.abandon(target, self.itself(why)).await
            }
            (Task::Migrate { .. }, "precopy") => self.world.abandon(&self.holder()?.host, self.itself(why)).await,
            (Task::Checkpoint { checkpoint, .. }, _) => self.unstream(checkpoint, why).await,
            (Task::Restore { .. }, "fence") => self.unfence().await,
            (
                Task::Pause { .. }
                | Task::Resume { .. }
                | Task::Stop
                | Task::Remove
                | Task::Migrate { .. }
                | Task::Restore { .. }
                | Task::Verify { .. }
                | Task::RemoveCheckpoint { .. }
                | Task::Sample { .. }
                | Task::Sweep { .. },
                _,
            ) => Ok(()),
        }
    }

    /// What the commit says. Pure but for `memory`.
    ///
    /// # Errors
    /// If the steps before it did not bring what it needs.
    pub fn outcome(&self, memory: &Memory) -> Result<Outcome, Failure> {
        match &self.plan().task {
            Task::Checkpoint { by_policy, .. } => memory
                .checkpoint
                .clone()
                .map(|entry| Outcome::Checkpoint(Box::new(CheckpointEntry { by_policy: *by_policy, ..entry })))
                .ok_or_else(|| lost("the checkpoint")),
            Task::Sample { .. } => memory
                .sampled
                .map(|(packs, bytes, damaged)| Outcome::Sampled { packs, bytes, damaged })
                .ok_or_else(|| lost("what was read")),
            Task::Sweep { .. } => {
                memory.swept.clone().map(|swept| Outcome::Swept(Box::new(swept))).ok_or_else(|| lost("what was swept"))
            }
            Task::Verify { .. } => memory.verdict.clone().map(Outcome::Verified).ok_or_else(|| lost("the verdict")),
            Task::Migrate { .. } => {
                memory.handed_over.is_some().then_some(Outcome::AsPlanned).ok_or_else(|| lost("the hand-over"))
            }
            _ => Ok(Outcome::AsPlanned),
        }
    }

    async fn create(
        &self,
        host: &str,
        config: &MachineConfig,
        on_isolation: i32,
        capabilities: &[u8],
    ) -> Result<(), Failure> {
        let request = CreateVmRequest {
            vm: self.plan().vm.clone(),
            generation: self.plan().generation,
            operation: self.operation.id.clone(),
            config: Some(config.clone()),
            on_isolation,
            capabilities: capabilities.to_vec(),
        };
        self.world.create(host, request).await.map(drop)
    }

    async fn pause(&self, reason: &str) -> Result<(), Failure> {
        let holder = self.holder()?;
        self.world.pause(&holder.host, self.of(holder.generation, reason)).await.map(drop)
    }

    async fn resume(&self) -> Result<(), Failure> {
        let holder = self.holder()?;
        self.world.resume(&holder.host, self.of(holder.generation, "")).await.map(drop)
    }

    async fn stop(&self) -> Result<(), Failure> {
        let holder = self.holder()?;
        let request = StopVmRequest {
            vm: self.plan().vm.clone(),
            generation: holder.generation,
            operation: self.operation.id.clone(),
        };
        self.world.stop(&holder.host, request).await.map(drop)
    }

    async fn discard(&self) -> Result<(), Failure> {
        let holder = self.holder()?;
        self.world.discard(&holder.host, self.of(holder.generation, "removed")).await
    }

    /// Discards what the old holder keeps, if there was one.
    async fn release(&self, memory: &mut Memory) -> Result<(), Failure> {
        let Some(holder) = &self.plan().holder else { return Ok(()) };
        let began = Instant::now();
        self.world.discard(&holder.host, self.of(holder.generation, "another host has it now")).await?;
        memory.phase("release", began);
        Ok(())
    }

    async fn prepare(&self, target: &str, memory: &mut Memory) -> Result<(), Failure> {
        let (config, capabilities, on_isolation) = self.machine()?;
        let source = match &self.plan().task {
            Task::Restore { .. } => "controller".to_owned(),
            _ => self.holder()?.host.clone(),
        };
        // A restore to the host that has the VM: what stands still there is kept until the new copy is activated.
        let replaced = self.plan().holder.as_ref().filter(|holder| holder.host == target);
        let replaces_generation = replaced.map_or(0, |holder| holder.generation);
        let ticket = memory.ticket.get_or_insert_with(|| self.ticket(&source, target, self.plan().generation));
        let ticket = Some(ticket.clone());
        let pages_from = match &self.plan().task {
            Task::Restore { checkpoint, lazy: true, .. } => checkpoint.clone(),
            _ => String::new(),
        };
        let config = Some(config);
        let request = PrepareRequest { ticket, config, capabilities, on_isolation, replaces_generation, pages_from };
        let began = Instant::now();
        memory.address = self.world.prepare(target, request).await?.address;
        if matches!(self.plan().task, Task::Restore { .. }) {
            memory.phase("prepare", began);
        }
        Ok(())
    }

    fn ticket(&self, source: &str, target: &str, generation: u64) -> Ticket {
        Ticket {
            operation: self.operation.id.clone(),
            vm: self.plan().vm.clone(),
            generation,
            source: source.into(),
            target: target.into(),
            secret: crate::entropy::bytes::<32>().to_vec(),
            expires_in_ms: TICKET_MS,
        }
    }

    /// The machine: of the ledger's VM, or of the checkpoint's manifest.
    fn machine(&self) -> Result<(MachineConfig, Vec<u8>, i32), Failure> {
        if let Task::Restore { config, capabilities, on_isolation, .. } = &self.plan().task {
            return Ok((config.clone(), capabilities.clone(), *on_isolation));
        }
        let state = self.ledger.state();
        let vm = state.vms.get(&self.plan().vm).ok_or_else(|| lost("the VM"))?;
        let mut config = vm.config.clone();
        if let Task::Migrate { engine, .. } = &self.plan().task
            && !engine.is_empty()
        {
            config.engine.clone_from(engine);
        }
        Ok((config, vm.capabilities.clone(), vm.on_isolation))
    }

    async fn precopy(
        &self,
        target: &str,
        via_controller: bool,
        policy: &TransferPolicy,
        memory: &mut Memory,
    ) -> Result<(), Failure> {
        let holder = self.holder()?;
        let request = SendRequest {
            vm: self.plan().vm.clone(),
            generation: holder.generation,
            ticket: Some(memory.ticket.clone().ok_or_else(|| lost("the ticket"))?),
            address: memory.address.clone(),
            peer_identity: format!("host/{target}"),
            policy: Some(*policy),
            checkpoint: false,
            ..SendRequest::default()
        };
        let relay = via_controller.then_some(memory.address.as_str());
        let handed_over = self.world.send(&holder.host, request, relay, self.voice).await?;
        let digest = |side: &Option<proto::v1::MachineDigest>| side.clone().unwrap_or_default().machine;
        let (source, arrived) = (digest(&handed_over.source), digest(&handed_over.target));
        if source != arrived || source.len() != 32 {
            return Err(Failure::new(Code::Corrupt, format!("{target} holds something else than {}", holder.host)));
        }
        memory.handed_over = Some((handed_over, Instant::now()));
        Ok(())
    }

    async fn activate(&self, target: &str, paused: bool, memory: &mut Memory) -> Result<(), Failure> {
        let request = ActivateRequest {
            vm: self.plan().vm.clone(),
            generation: self.plan().generation,
            operation: self.operation.id.clone(),
            paused,
        };
        let began = Instant::now();
        let reply = self.world.activate(target, request).await?;
        if let Some((handed_over, at)) = &memory.handed_over {
            memory.phases.push(phase("commit", began.duration_since(*at).as_secs_f64() * 1e3));
            memory.downtime_ms = handed_over.stopped_us as f64 / 1e3 + at.elapsed().as_secs_f64() * 1e3;
        }
        memory.running_unix_ms.get_or_insert_with(unix_ms);
        memory.resume_ms = reply.resume_us as f64 / 1e3;
        memory.phases.push(phase("resume", memory.resume_ms));
        Ok(())
    }

    async fn stream(&self, checkpoint: &str, memory: &mut Memory) -> Result<(), Failure> {
        let holder = self.holder()?;
        let (config, capabilities, on_isolation) = self.machine()?;
        // Before the ticket is made, which expires.
        let _room = self.gate.enter(&holder.host, |why| self.voice.note(format!("waits: {why}"))).await;
        let request = SendRequest {
            vm: self.plan().vm.clone(),
            generation: holder.generation,
            ticket: Some(self.ticket(&holder.host, "controller", holder.generation)),
            address: String::new(),
            peer_identity: String::new(),
            policy: Some(TransferPolicy::default()),
            checkpoint: true,
            ..SendRequest::default()
        };
        let expected = Expected {
            checkpoint: checkpoint.parse().map_err(|_| lost("the checkpoint's id"))?,
            vm: self.plan().vm.clone(),
            vm_id: self.plan().vm_id.parse().map_err(|_| lost("the VM's id"))?,
            generation: Generation(holder.generation),
            claim: Request::of(&self.ledger.state(), &self.plan().vm_id, holder.generation, 0).claim,
            config,
            capabilities,
            on_isolation,
            policy: self.policy(),
            bases: self.bases().await?,
            damaged: self.ledger.state().damaged.keys().cloned().collect(),
        };
        memory.checkpoint = Some(self.world.checkpoint(&holder.host, request, expected, self.voice).await?);
        Ok(())
    }

    /// Manifests of what the new checkpoint may build on. What has become of the first one's packs is looked up before.
    async fn bases(&self) -> Result<Vec<String>, Failure> {
        let keys = || -> Vec<String> {
            let state = self.ledger.state();
            state.bases(&self.plan().vm_id).into_iter().map(|entry| entry.manifest_key.clone()).collect()
        };
        let before = keys();
        if let Some(first) = before.first() {
            self.damaged(self.world.lost(first).await?).await?;
        }
        Ok(keys())
    }

    /// The VM's checkpoint policy as its manifests carry it.
    fn policy(&self) -> Vec<u8> {
        let state = self.ledger.state();
        policy::to_bytes(state.policies.get(&self.plan().vm).map(|scheduled| &*scheduled.policy))
    }

    /// Stops the source, then removes what has arrived.
    async fn unstream(&self, checkpoint: &str, why: &str) -> Result<(), Failure> {
        let holder = self.holder()?;
        let abandoned = self.world.abandon(&holder.host, self.itself(why)).await;
        self.erase(checkpoint, holder.generation).await?;
        abandoned
    }

    /// Makes sure that the old holder does not run the VM and will not begin to.
    ///
    /// From the record on that began this operation, heartbeats renew no lease of this VM.
    async fn fence(&self) -> Result<(), Failure> {
        let Some(holder) = &self.plan().holder else { return Ok(()) };
        if self.stands_still(holder).await {
            return Ok(());
        }
        let policy = self.machine()?.2;
        if policy == IsolationPolicy::KeepRunning as i32 {
            let (vm, host) = (&self.plan().vm, &holder.host);
            let text =
                format!("{host} does not answer and {vm} keeps running there by its policy: two of it could run");
            return Err(Failure::new(Code::Unreachable, text)
                .hint(format!("bring {host} back, or restore under another name with --as")));
        }
        self.world.lease_end(&holder.host, &self.plan().vm, self.voice).await;
        Ok(())
    }

    /// Whether the holder itself says that the VM does not run there. What it says otherwise, or that it says nothing,
    /// is noted.
    async fn stands_still(&self, holder: &Holder) -> bool {
        let itself = || self.of(holder.generation, "a restore replaces it");
        let answer = match self.world.pause(&holder.host, itself()).await {
            // A guest that has ended cannot be paused.
            Err(failure) if failure.code == Code::Conflict => self.world.look(&holder.host, itself()).await,
            answer => answer,
        };
        match answer {
            Ok(info) if matches!(info.state(), VmState::Paused | VmState::Stopped | VmState::Crashed) => true,
            Err(failure) if failure.code == Code::NotFound => true,
            Ok(info) => {
                self.voice.note(format!("{} says that {} is {:?}", holder.host, self.plan().vm, info.state()));
                false
            }
            Err(failure) => {
                self.voice.note(failure.message);
                false
            }
        }
    }

    async fn unfence(&self) -> Result<(), Failure> {
        let state = self.ledger.state();
        let wanted = state.vms.get(&self.plan().vm).is_some_and(|vm| vm.intent == Intent::Running);
        match &self.plan().holder {
            Some(_) if wanted => self.resume().await,
            _ => Ok(()),
        }
    }

    async fn load(&self, memory: &mut Memory) -> Result<(), Failure> {
        let Task::Restore { checkpoint, target, policy, lazy, replay, .. } = &self.plan().task else {
            return Err(lost("what is restored"));
        };
        let began = Instant::now();
        let state = self.ledger.state();
        let entry = state.checkpoints.get(checkpoint).ok_or_else(|| lost("the checkpoint"))?;
        let ticket = memory.ticket.as_ref().ok_or_else(|| lost("the ticket"))?;
        let request = LoadRequest {
            manifest_key: &entry.manifest_key,
            ticket,
            host: target,
            address: &memory.address,
            policy,
            lazy: *lazy,
            replay: replay.as_ref(),
        };
        if let Some(replay) = replay {
            told_before(replay, target).into_iter().for_each(|note| self.voice.note(note));
        }
        self.world.load(request, self.voice).await?;
        memory.phase("load", began);
        Ok(())
    }

    /// When the guest's first instruction was, for the report. A lazily restored guest may have to wait for its page.
    async fn note_first_instruction(&self, target: &str, lazy: bool, memory: &mut Memory) {
        let (now, deadline) = (unix_ms(), Instant::now() + FIRST_INSTRUCTION_MAX);
        memory.first_instruction_ms = now.saturating_sub(self.operation.began_unix_ms) as f64;
        if !lazy {
            return;
        }
        let answered = Instant::now();
        loop {
            let looked = self.world.look(target, self.of(self.plan().generation, "")).await;
            let first_us = looked.map_or(0, |info| info.first_instruction_us);
            if first_us > 0 {
                memory.first_instruction_ms += (first_us as f64 / 1e3 - memory.resume_ms).max(0.0);
                return;
            }
            if Instant::now() > deadline {
                let waited = answered.elapsed().as_secs_f64();
                self.voice.note(format!("no instruction within {waited:.1} s: the guest waits for its pages"));
                memory.first_instruction_ms = 0.0;
                return;
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    async fn verify(&self, checkpoint: &str, memory: &mut Memory) -> Result<(), Failure> {
        let state = self.ledger.state();
        let entry = state.checkpoints.get(checkpoint).ok_or_else(|| lost("the checkpoint"))?;
        let found = self.world.verify(entry, self.voice).await?;
        let more = if found.len() > 1 { format!(" ({} more)", found.len() - 1) } else { String::new() };
        let verdict = found.values().next().map_or("ok".into(), |why| format!("damaged: {why}{more}"));
        memory.verdict = Some(verdict);
        self.damaged(found).await
    }

    /// Removes a manifest, and then what no other needs. The lock of the VM's packs keeps others from adding any meanwhile.
    /// Whether it was this cluster's to remove, and all of it could be looked at.
    async fn erase(&self, checkpoint: &str, generation: u64) -> Result<bool, Failure> {
        let id = checkpoint.parse().map_err(|_| lost("the checkpoint's id"))?;
        self.world.erase(&crate::bucket::manifest_key(&self.plan().vm_id, id)).await?;
        let request = Request::of(&self.ledger.state(), &self.plan().vm_id, generation, 0);
        match self.world.sweep(&request, &|_| ()).await {
            Ok(swept) if swept.note.is_empty() => return Ok(true),
            Ok(swept) => self.voice.note(swept.note),
            // What it names cannot be known, so nothing is removed: the next sweep looks again.
            Err(failure) if matches!(failure.code, Code::Corrupt | Code::Denied) => self.voice.note(failure.message),
            Err(failure) => return Err(failure),
        }
        Ok(false)
    }

    /// Removes what was recorded before the oldest checkpoint that is left of each recording. The lock of the VM's packs keeps
    /// checkpoints from being made meanwhile.
    async fn prune_journals(&self) -> Result<(), Failure> {
        let state = self.ledger.state();
        let vm_id = &self.plan().vm_id;
        let kept: Vec<Vec<u8>> = state.checkpoints_of(vm_id).iter().map(|entry| entry.digest.state.clone()).collect();
        for recording in state.recordings_of(vm_id) {
            let count = self.world.prune_journal(recording, &kept).await?;
            if count > 0 {
                let what = format!("{count} segments of recording {}", recording.id);
                self.voice.note(format!("{what} are gone: no checkpoint is left from which they could be replayed"));
            }
        }
        Ok(())
    }

    async fn sample(&self, packs: &[String], memory: &mut Memory) -> Result<(), Failure> {
        let (bytes, found) = self.world.sample(packs).await?;
        memory.sampled = Some((packs.len() as u64, bytes, found.len() as u64));
        let result = if found.is_empty() { "ok" } else { "failed" };
        metrics::counter!(crate::metrics::CHECKS, "check" => "sample", "result" => result).increment(1);
        self.damaged(found).await
    }

    async fn sweep(&self, live_percent_min: u32, memory: &mut Memory) -> Result<(), Failure> {
        let request = Request::of(&self.ledger.state(), &self.plan().vm_id, 0, live_percent_min);
        let mut swept = self.world.sweep(&request, &|said| self.voice.note(said)).await?;
        let state = self.ledger.state();
        swept.changed.retain(|changed| {
            let keys = |entry: &CheckpointEntry| entry.pack_keys.iter().cloned().collect::<BTreeSet<_>>();
            let now: BTreeSet<String> = changed.pack_keys.iter().cloned().collect();
            state.checkpoints.get(&changed.checkpoint).is_some_and(|entry| keys(entry) != now)
        });
        memory.swept = Some(swept);
        Ok(())
    }
}

impl Memory {
    fn phase(&mut self, name: &str, began: Instant) {
        self.phases.push(phase(name, began.elapsed().as_secs_f64() * 1e3));
    }
}

fn phase(name: &str, ms: f64) -> PhaseReport {
    PhaseReport { phase: name.into(), ms }
}

//! The Control service: every call of `ctl`.
//!
//! Calls that change something answer with the stream of their operation, which goes on whether anybody listens or not.

use std::pin::Pin;
use std::time::Duration;

use proto::frame::{self, Kind};
use proto::ids::Generation;
use proto::status::Code;
use proto::v1::control_server::Control;
use proto::v1::operation_event::Event as Said;
use proto::v1::{
    AdoptReply, AdoptRequest, Blob, CheckpointName, CheckpointRecord, ConsoleInput, ConsoleOutput,
    CreateCheckpointRequest, CreateVmRecordRequest, DebugBytes, DrillReply, DrillRequest, Empty, EventsRequest,
    ExportRecordingRequest, ExportRequest, KeysReply, LedgerEvent, ListCheckpointsReply, ListHostsReply,
    ListPoliciesReply, ListRecordingsReply, ListVmsReply, MigrateRequest, OperationDone, OperationEvent, OperationRef,
    PolicyRecord, PruneReply, PruneRequest, RecordingName, RecordingRecord, RestoreRequest, SetPolicyRequest,
    StartRecordingReply, StartRecordingRequest, SweepReply, SweepRequest, VmName, VmOrCheckpoint, VmRecord, VmRef,
    VmcbReply,
};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::placement::{Fleet, Need};
use super::plans::{self, unknown_checkpoint, unknown_vm};
use super::{Api, console, debug, events, export, policies, require, views};
use crate::bucket::packs_prefix;
use crate::failure::Failure;
use crate::ledger::event::{CheckpointEntry, Plan, Task};
use crate::tls::{Identity, Role};

type Operation = Pin<Box<dyn Stream<Item = Result<OperationEvent, Status>> + Send>>;
type Began = Result<Response<Operation>, Status>;

/// How long an agent may take to look into a guest.
const LOOK_MAX: Duration = Duration::from_secs(10);

impl Api {
    pub(super) fn fleet(&self) -> Fleet {
        let state = self.ledger.state();
        Fleet { hosts: state.hosts.keys().map(|host| self.candidate(host)).collect() }
    }

    async fn begin(&self, operator: &Identity, plan: Result<Plan, Failure>) -> Began {
        let plan = plan?;
        self.schedule.make_way(&plan.locks).await;
        let voice = self.sagas.begin(&operator.to_string(), plan).await?;
        Ok(Response::new(Box::pin(voice.listen())))
    }

    fn show(&self, vm: &str) -> Result<VmRecord, Failure> {
        views::show(&self.ledger, &self.agents, vm).ok_or_else(|| unknown_vm(vm))
    }

    pub(super) fn checkpoint(&self, id: &str) -> Result<CheckpointRecord, Failure> {
        policies::checkpoint(&self.ledger.state(), id).ok_or_else(|| unknown_checkpoint(id))
    }

    /// Bodies of a checkpoint's sections `cpu/N`, by vCPU: bytes that were hashed, which the caller decodes.
    async fn cpu_states(&self, entry: &CheckpointEntry) -> Result<Vec<Vec<u8>>, Failure> {
        let opened = self.reader.manifest(&entry.manifest_key).await?;
        let mut states = Vec::new();
        for (section, _) in self.reader.sections(&opened).await? {
            if let Some(number) = section.name.strip_prefix("cpu/") {
                states.push((number.parse().unwrap_or(u32::MAX), section.body));
            }
        }
        states.sort();
        Ok(states.into_iter().map(|(_, body)| body).collect())
    }

    async fn power(&self, request: Request<VmName>, task: impl FnOnce(crate::ledger::event::Intent) -> Task) -> Began {
        let operator = require(&request, Role::Operator)?;
        let plan = plans::power(&self.ledger.state(), &request.into_inner().vm, task);
        self.begin(&operator, plan).await
    }

    /// What a migration would do, without doing it.
    fn rehearse(&self, plan: &Plan, fleet: &Fleet, target: &str) -> Result<Operation, Failure> {
        let state = self.ledger.state();
        let vm = state.vms.get(&plan.vm).ok_or_else(|| unknown_vm(&plan.vm))?;
        let contract = plans::contract(vm)?;
        let need = Need { vm: &vm.name, config: &vm.config, contract: &contract };
        let info = fleet.host(target)?.keeps(&need)?;
        let (source, record) = (&vm.host, self.show(&plan.vm).ok());
        let others = match &fleet.able(&need, &[target, source])[..] {
            [] => "no other host would do".to_owned(),
            able => format!("{} would do as well", able.join(", ")),
        };
        let notes = [
            format!("{} would move from {source} to {target} as generation {}", plan.vm, plan.generation),
            format!("{source} is {}", self.agents.host_state(source).word()),
            format!("{target} is up, offers {}", info.engines.join(", ")),
            format!("{target} keeps the contract {}: {} things compared", contract.model, contract.demands()),
            format!(
                "{} bytes of RAM are needed; {target} has {} free",
                need.config.memory_bytes, info.memory_bytes_free
            ),
            others,
        ];
        let done = Said::Done(OperationDone { vm: record, ..OperationDone::default() });
        let said = notes.into_iter().map(Said::Note).chain([done]);
        let events: Vec<_> =
            said.map(|event| Ok(OperationEvent { operation: String::new(), event: Some(event) })).collect();
        Ok(Box::pin(tokio_stream::iter(events)))
    }
}

#[tonic::async_trait]
impl Control for Api {
    type CreateVmRecordStream = Operation;
    type PauseStream = Operation;
    type ResumeStream = Operation;
    type StopStream = Operation;
    type RemoveStream = Operation;
    type AttachConsoleStream = ReceiverStream<Result<ConsoleOutput, Status>>;
    type DebugStream = ReceiverStream<Result<DebugBytes, Status>>;
    type MigrateStream = Operation;
    type CreateCheckpointStream = Operation;
    type VerifyCheckpointStream = Operation;
    type RemoveCheckpointStream = Operation;
    type RestoreStream = Operation;
    type WatchOperationStream = Operation;
    type EventsStream = ReceiverStream<Result<LedgerEvent, Status>>;
    type ExportCheckpointStream = export::Export;
    type ExportRecordingStream = export::Export;

    async fn list_hosts(&self, request: Request<Empty>) -> Result<Response<ListHostsReply>, Status> {
        require(&request, Role::Operator)?;
        Ok(Response::new(ListHostsReply { hosts: self.agents.records() }))
    }

    async fn list_vms(&self, request: Request<Empty>) -> Result<Response<ListVmsReply>, Status> {
        require(&request, Role::Operator)?;
        let state = self.ledger.state();
        let vms = state.vms.keys().filter_map(|name| views::show(&self.ledger, &self.agents, name)).collect();
        Ok(Response::new(ListVmsReply { vms }))
    }

    async fn get_vm_record(&self, request: Request<VmName>) -> Result<Response<VmRecord>, Status> {
        require(&request, Role::Operator)?;
        let vm = request.into_inner().vm;
        Ok(Response::new(VmRecord { policy: self.policy(&vm), ..self.show(&vm)? }))
    }

    async fn create_vm_record(&self, request: Request<CreateVmRecordRequest>) -> Began {
        let operator = require(&request, Role::Operator)?;
        let asked = request.into_inner();
        let config = asked.config.unwrap_or_default();
        let fleet = self.fleet();
        let plan = plans::create(&self.ledger.state(), &fleet, &asked.vm, &asked.host, config, asked.on_isolation);
        self.begin(&operator, plan).await
    }

    async fn pause(&self, request: Request<VmName>) -> Began {
        self.power(request, |was| Task::Pause { was }).await
    }

    async fn resume(&self, request: Request<VmName>) -> Began {
        self.power(request, |was| Task::Resume { was }).await
    }

    async fn stop(&self, request: Request<VmName>) -> Began {
        self.power(request, |_| Task::Stop).await
    }

    async fn remove(&self, request: Request<VmName>) -> Began {
        self.power(request, |_| Task::Remove).await
    }

    async fn attach_console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::AttachConsoleStream>, Status> {
        require(&request, Role::Operator)?;
        Ok(Response::new(console::attach(self.clone(), request.into_inner())))
    }

    async fn debug(&self, request: Request<Streaming<DebugBytes>>) -> Result<Response<Self::DebugStream>, Status> {
        let operator = require(&request, Role::Operator)?;
        Ok(Response::new(debug::attach(self.clone(), operator, request.into_inner())))
    }

    async fn migrate(&self, request: Request<MigrateRequest>) -> Began {
        let operator = require(&request, Role::Operator)?;
        let asked = request.into_inner();
        let fleet = self.fleet();
        let policy = asked.policy.unwrap_or_default();
        let (state, via) = (self.ledger.state(), asked.via_controller);
        let plan = plans::migrate(&state, &fleet, &asked.vm, &asked.to, &asked.engine, via, policy);
        if asked.dry_run {
            return Ok(Response::new(self.rehearse(&plan?, &fleet, &asked.to)?));
        }
        self.begin(&operator, plan).await
    }

    async fn create_checkpoint(&self, request: Request<CreateCheckpointRequest>) -> Began {
        let operator = require(&request, Role::Operator)?;
        let asked = request.into_inner();
        let plan = plans::checkpoint(&self.ledger.state(), &asked.vm, asked.by_policy);
        self.begin(&operator, plan).await
    }

    async fn list_checkpoints(&self, request: Request<VmName>) -> Result<Response<ListCheckpointsReply>, Status> {
        require(&request, Role::Operator)?;
        let checkpoints = policies::checkpoints(&self.ledger.state(), &request.into_inner().vm);
        Ok(Response::new(ListCheckpointsReply { checkpoints }))
    }

    async fn get_checkpoint(&self, request: Request<CheckpointName>) -> Result<Response<CheckpointRecord>, Status> {
        require(&request, Role::Operator)?;
        Ok(Response::new(self.checkpoint(&request.into_inner().id)?))
    }

    async fn get_manifest(&self, request: Request<CheckpointName>) -> Result<Response<Blob>, Status> {
        require(&request, Role::Operator)?;
        let checkpoint = self.checkpoint(&request.into_inner().id)?;
        let opened = self.reader.manifest(&checkpoint.manifest_key).await?;
        let data = frame::encode_message(Kind::Manifest, &opened.manifest);
        Ok(Response::new(Blob { data }))
    }

    async fn verify_checkpoint(&self, request: Request<CheckpointName>) -> Began {
        let operator = require(&request, Role::Operator)?;
        let plan = plans::on_checkpoint(&self.ledger.state(), &request.into_inner().id, |entry| Task::Verify {
            checkpoint: entry.id.clone(),
        });
        self.begin(&operator, plan).await
    }

    async fn remove_checkpoint(&self, request: Request<CheckpointName>) -> Began {
        let operator = require(&request, Role::Operator)?;
        let id = request.get_ref().id.clone();
        if let Some(entry) = self.ledger.state().checkpoints.get(&id) {
            // What the ledger forgets nobody would look for: the bucket must be there to forget it, too.
            let prefix = packs_prefix(&entry.vm_id, Generation(entry.generation));
            self.reader.bucket.list(&prefix).await.map_err(Failure::from)?;
        }
        let plan = plans::on_checkpoint(&self.ledger.state(), &request.into_inner().id, |entry| {
            Task::RemoveCheckpoint { checkpoint: entry.id.clone(), generation: entry.generation }
        });
        self.begin(&operator, plan).await
    }

    async fn restore(&self, request: Request<RestoreRequest>) -> Began {
        let operator = require(&request, Role::Operator)?;
        let asked = request.into_inner();
        let (entry, replay) = match asked.at.and_then(|instant| instant.at) {
            Some(at) => {
                let (entry, replay) = self.replay_to(&asked.name, at).await?;
                (entry, Some(replay))
            }
            None => (plans::named_checkpoint(&self.ledger.state(), &asked.name)?.clone(), None),
        };
        let manifest = self.reader.manifest(&entry.manifest_key).await?.manifest;
        let fleet = self.fleet();
        let how = plans::How { policy: asked.policy.unwrap_or_default(), lazy: asked.lazy, replay };
        let plan = plans::restore(&self.ledger.state(), &fleet, &entry, manifest, &asked.to, &asked.as_name, how);
        self.begin(&operator, plan).await
    }

    async fn adopt_checkpoints(&self, request: Request<AdoptRequest>) -> Result<Response<AdoptReply>, Status> {
        let operator = require(&request, Role::Operator)?;
        let AdoptRequest { from, name } = request.into_inner();
        Ok(Response::new(self.adopt(&operator, &from, &name).await?))
    }

    async fn export_keys(&self, request: Request<Empty>) -> Result<Response<Blob>, Status> {
        let operator = require(&request, Role::Operator)?;
        tracing::warn!(%operator, "the cluster keys are exported");
        Ok(Response::new(Blob { data: self.reader.keys.export().into_bytes() }))
    }

    async fn import_keys(&self, request: Request<Blob>) -> Result<Response<KeysReply>, Status> {
        let operator = require(&request, Role::Operator)?;
        let bad = || Failure::new(Code::BadInput, "an export of keys is text");
        let text = String::from_utf8(request.into_inner().data).map_err(|_| bad())?;
        let ids = self.reader.keys.import(&text)?;
        tracing::warn!(%operator, ?ids, "cluster keys are imported");
        Ok(Response::new(KeysReply { ids }))
    }

    async fn rotate_keys(&self, request: Request<Empty>) -> Result<Response<KeysReply>, Status> {
        let operator = require(&request, Role::Operator)?;
        Ok(Response::new(KeysReply { ids: self.rotate(&operator).await? }))
    }

    async fn export_checkpoint(
        &self,
        request: Request<ExportRequest>,
    ) -> Result<Response<Self::ExportCheckpointStream>, Status> {
        let operator = require(&request, Role::Operator)?;
        Ok(Response::new(self.export(&operator, request.into_inner()).await?))
    }

    async fn start_recording(
        &self,
        request: Request<StartRecordingRequest>,
    ) -> Result<Response<StartRecordingReply>, Status> {
        let operator = require(&request, Role::Operator)?;
        Ok(Response::new(self.start_to_record(&operator, request.into_inner()).await?))
    }

    async fn stop_recording(&self, request: Request<VmName>) -> Result<Response<RecordingRecord>, Status> {
        let operator = require(&request, Role::Operator)?;
        Ok(Response::new(self.stop_recording_of(&operator, &request.into_inner().vm).await?))
    }

    async fn list_recordings(&self, request: Request<VmName>) -> Result<Response<ListRecordingsReply>, Status> {
        require(&request, Role::Operator)?;
        Ok(Response::new(self.recordings(&request.into_inner().vm).await?))
    }

    async fn remove_recording(&self, request: Request<RecordingName>) -> Result<Response<Empty>, Status> {
        let operator = require(&request, Role::Operator)?;
        self.remove_recording_of(&operator, &request.into_inner()).await?;
        Ok(Response::new(Empty {}))
    }

    async fn export_recording(
        &self,
        request: Request<ExportRecordingRequest>,
    ) -> Result<Response<Self::ExportRecordingStream>, Status> {
        let operator = require(&request, Role::Operator)?;
        Ok(Response::new(self.export_replay(&operator, request.into_inner()).await?))
    }

    async fn get_vmcbs(&self, request: Request<VmOrCheckpoint>) -> Result<Response<VmcbReply>, Status> {
        require(&request, Role::Operator)?;
        let name = request.into_inner().name;
        let state = self.ledger.state();
        let Some(vm) = state.vms.get(&name) else {
            let cpu_states = self.cpu_states(plans::named_checkpoint(&state, &name)?).await?;
            return Ok(Response::new(VmcbReply { cpu_states, ..VmcbReply::default() }));
        };
        let itself = VmRef { vm: name, generation: vm.generation, ..VmRef::default() };
        let reply = self.agents.call(&vm.host, LOOK_MAX, async |mut agent| agent.get_vmcb(itself).await).await?;
        Ok(Response::new(reply))
    }

    async fn cancel_operation(&self, request: Request<OperationRef>) -> Result<Response<Empty>, Status> {
        let operator = require(&request, Role::Operator)?;
        self.sagas.cancel(&operator.to_string(), &request.into_inner().operation).await?;
        Ok(Response::new(Empty {}))
    }

    async fn watch_operation(&self, request: Request<OperationRef>) -> Began {
        require(&request, Role::Operator)?;
        let voice = self.sagas.voice(&request.into_inner().operation)?;
        Ok(Response::new(Box::pin(voice.listen())))
    }

    async fn events(&self, request: Request<EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        require(&request, Role::Operator)?;
        Ok(Response::new(events::stream(self.ledger.clone(), request.into_inner())))
    }

    async fn set_policy(&self, request: Request<SetPolicyRequest>) -> Result<Response<PolicyRecord>, Status> {
        let operator = require(&request, Role::Operator)?;
        Ok(Response::new(self.set(&operator, request.into_inner()).await?))
    }

    async fn remove_policy(&self, request: Request<VmName>) -> Result<Response<Empty>, Status> {
        let operator = require(&request, Role::Operator)?;
        self.unset(&operator, request.into_inner().vm).await?;
        Ok(Response::new(Empty {}))
    }

    async fn list_policies(&self, request: Request<VmName>) -> Result<Response<ListPoliciesReply>, Status> {
        require(&request, Role::Operator)?;
        Ok(Response::new(ListPoliciesReply { policies: self.policies(&request.into_inner().vm)? }))
    }

    async fn drill_checkpoint(&self, request: Request<DrillRequest>) -> Result<Response<DrillReply>, Status> {
        let operator = require(&request, Role::Operator)?;
        Ok(Response::new(self.drill(&operator.to_string(), request.into_inner()).await?))
    }

    async fn sweep_checkpoints(&self, request: Request<SweepRequest>) -> Result<Response<SweepReply>, Status> {
        let operator = require(&request, Role::Operator)?;
        Ok(Response::new(self.sweep(&operator, request.into_inner()).await?))
    }

    async fn prune_checkpoints(&self, request: Request<PruneRequest>) -> Result<Response<PruneReply>, Status> {
        let operator = require(&request, Role::Operator)?;
        Ok(Response::new(self.prune(&operator, request.into_inner()).await?))
    }
}

//! The Agent service: each call becomes a message to one VM's actor.
//!
//! Only the controller may call. Names and sizes are checked here, admission is the actor's, memory the host's.

use std::pin::Pin;
use std::sync::Arc;

use proto::status::Code;
use proto::v1::agent_server::Agent;
use proto::v1::runner_reply::Reply as RunnerSaid;
use proto::v1::runner_request::Request as RunnerAsk;
use proto::v1::{
    ActivateReply, ActivateRequest, ConsoleInput, ConsoleOutput, CreateVmRequest, DebugBytes, Empty, GetHostRequest,
    HostInfo, MachineConfig, OperationRef, PrepareReply, PrepareRequest, RecordRequest, RunnerVmcbs, SendRequest,
    StopVmRequest, TransferEvent, VmInfo, VmRef, VmcbReply,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::console::Session;
use super::{caller, debug, short, status};
use crate::facts;
use crate::host;
use crate::migration::Failure;
use crate::vm::requests::Verb;
use crate::vm::{Handle, Message, Vms};

const CONTROLLER: &[&str] = &["controller"];

pub(super) struct AgentService {
    vms: Arc<Vms>,
    version: String,
}

type Stream1<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl AgentService {
    pub(super) fn new(vms: Arc<Vms>, version: String) -> AgentService {
        AgentService { vms, version }
    }

    /// The actor of a VM that this host has had.
    fn existing(&self, vm: &str) -> Result<Handle, Status> {
        let none = || Failure::new(Code::NotFound, format!("{}: this host has no such VM", short(vm)));
        self.vms.find(vm).ok_or_else(|| status(none()))
    }

    async fn operate(&self, verb: Verb, vm: VmRef) -> Result<Option<VmInfo>, Status> {
        let handle = match self.vms.find(&vm.vm) {
            None if verb == Verb::Discard => return Ok(None),
            _ => self.existing(&vm.vm)?,
        };
        let message = |reply| Message::Operate {
            verb,
            generation: vm.generation,
            operation: vm.operation,
            reason: vm.reason,
            reply,
        };
        handle.ask(message).await.map_err(status)
    }

    async fn operate_one(&self, verb: Verb, vm: VmRef) -> Result<Response<VmInfo>, Status> {
        let name = short(&vm.vm);
        let info = self.operate(verb, vm).await?;
        info.map(Response::new).ok_or_else(|| status(Failure::new(Code::NotFound, format!("{name} is gone"))))
    }

    /// Whether this host keeps the contract of a VM that is to be created; without one, that of its CPU model.
    fn check_contract(&self, request: &CreateVmRequest) -> Result<(), Failure> {
        let config = request.config.clone().unwrap_or_default();
        let facts = &self.vms.host().facts;
        if request.capabilities.is_empty() {
            return facts.check_contract(&facts::contract_of(&config)?, &config);
        }
        facts.check_contract(&request.capabilities, &config)
    }

    /// The actor of a VM that is to come, if there is memory for it.
    async fn admit(&self, vm: &str, config: Option<&MachineConfig>) -> Result<Handle, Status> {
        let handle = self.vms.actor(vm).await.map_err(status)?;
        if handle.published().info.is_none() {
            let promised = Vms::promised_bytes(&self.vms.list());
            let asked = config.map_or(0, |config| config.memory_bytes);
            let fits = host::check_memory(host::memory(), promised, asked);
            fits.map_err(|failure| status(Failure::new(failure.code, format!("{}: {failure}", short(vm)))))?;
        }
        Ok(handle)
    }
}

#[tonic::async_trait]
impl Agent for AgentService {
    type ConsoleStream = Stream1<ConsoleOutput>;
    type DebugStream = Stream1<DebugBytes>;
    type SendStream = Stream1<TransferEvent>;

    async fn get_host(&self, request: Request<GetHostRequest>) -> Result<Response<HostInfo>, Status> {
        caller(&request, CONTROLLER)?;
        Ok(Response::new(self.vms.host_info(&self.version).await))
    }

    async fn create_vm(&self, request: Request<CreateVmRequest>) -> Result<Response<VmInfo>, Status> {
        caller(&request, CONTROLLER)?;
        let request = request.into_inner();
        self.check_contract(&request).map_err(status)?;
        let handle = self.admit(&request.vm, request.config.as_ref()).await?;
        handle.ask(|reply| Message::Create(request, reply)).await.map(Response::new).map_err(status)
    }

    async fn get_vm(&self, request: Request<VmRef>) -> Result<Response<VmInfo>, Status> {
        caller(&request, CONTROLLER)?;
        let handle = self.existing(&request.into_inner().vm)?;
        handle.ask(Message::Look).await.map(Response::new).map_err(status)
    }

    async fn pause_vm(&self, request: Request<VmRef>) -> Result<Response<VmInfo>, Status> {
        caller(&request, CONTROLLER)?;
        self.operate_one(Verb::Pause, request.into_inner()).await
    }

    async fn resume_vm(&self, request: Request<VmRef>) -> Result<Response<VmInfo>, Status> {
        caller(&request, CONTROLLER)?;
        self.operate_one(Verb::Resume, request.into_inner()).await
    }

    async fn stop_vm(&self, request: Request<StopVmRequest>) -> Result<Response<VmInfo>, Status> {
        caller(&request, CONTROLLER)?;
        let StopVmRequest { vm, generation, operation } = request.into_inner();
        self.operate_one(Verb::Stop, VmRef { vm, generation, operation, reason: String::new() }).await
    }

    async fn discard_vm(&self, request: Request<VmRef>) -> Result<Response<Empty>, Status> {
        caller(&request, CONTROLLER)?;
        self.operate(Verb::Discard, request.into_inner()).await?;
        Ok(Response::new(Empty {}))
    }

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        caller(&request, CONTROLLER)?;
        let mut inputs = request.into_inner();
        let vms = Arc::clone(&self.vms);
        let (outputs, outbound) = mpsc::channel(64);
        // The headers of the answer go out at once; the first input names the VM.
        tokio::spawn(async move {
            let Some(Ok(first)) = inputs.next().await else { return };
            let Some(handle) = vms.find(&first.vm).filter(|handle| handle.published().info.is_some()) else {
                let none = Failure::new(Code::NotFound, format!("{}: this host has no such VM", short(&first.vm)));
                let _gone = outputs.send(Err(status(none))).await;
                return;
            };
            let log = vms.directory(&first.vm).join("console.log");
            let runner = handle.published().runner;
            Session { log, runner, first, inputs, outputs }.run().await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }

    async fn get_vmcb(&self, request: Request<VmRef>) -> Result<Response<VmcbReply>, Status> {
        caller(&request, CONTROLLER)?;
        let published = self.existing(&request.into_inner().vm)?.published();
        let gone = || status(Failure::new(Code::Conflict, "it has no process: its last checkpoint has its VMCBs"));
        let runner = published.runner.ok_or_else(gone)?;
        match runner.call(RunnerAsk::Vmcbs(RunnerVmcbs {})).await.map_err(status)? {
            RunnerSaid::Vmcbs(vmcbs) => Ok(Response::new(vmcbs)),
            _ => Err(status(Failure::new(Code::Protocol, "the runner answered something else"))),
        }
    }

    async fn record(&self, request: Request<RecordRequest>) -> Result<Response<VmInfo>, Status> {
        caller(&request, CONTROLLER)?;
        let request = request.into_inner();
        let handle = self.existing(&request.vm)?;
        handle.ask(|reply| Message::Record(request, reply)).await.map(Response::new).map_err(status)
    }

    async fn debug(&self, request: Request<Streaming<DebugBytes>>) -> Result<Response<Self::DebugStream>, Status> {
        caller(&request, CONTROLLER)?;
        let (outputs, outbound) = mpsc::channel(64);
        // The headers of the answer go out at once; the first message names the VM.
        tokio::spawn(debug::run(Arc::clone(&self.vms), request.into_inner(), outputs));
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }

    async fn prepare(&self, request: Request<PrepareRequest>) -> Result<Response<PrepareReply>, Status> {
        caller(&request, CONTROLLER)?;
        let request = request.into_inner();
        let vm = request.ticket.as_ref().map_or(String::new(), |ticket| ticket.vm.clone());
        let config = request.config.clone().unwrap_or_default();
        self.vms.host().facts.check_contract(&request.capabilities, &config).map_err(status)?;
        let handle = self.admit(&vm, request.config.as_ref()).await?;
        handle.ask(|reply| Message::Prepare(Box::new(request), reply)).await.map_err(status)?;
        Ok(Response::new(PrepareReply { address: self.vms.host().address.clone() }))
    }

    async fn activate(&self, request: Request<ActivateRequest>) -> Result<Response<ActivateReply>, Status> {
        caller(&request, CONTROLLER)?;
        let request = request.into_inner();
        let handle = self.existing(&request.vm)?;
        handle.ask(|reply| Message::Activate(request, reply)).await.map(Response::new).map_err(status)
    }

    async fn send(&self, request: Request<SendRequest>) -> Result<Response<Self::SendStream>, Status> {
        caller(&request, CONTROLLER)?;
        let request = request.into_inner();
        let handle = self.existing(&request.vm)?;
        let (events, told) = mpsc::channel(256);
        handle.ask(|reply| Message::Send(Box::new(request), events, reply)).await.map_err(status)?;
        Ok(Response::new(Box::pin(ReceiverStream::new(told).map(Ok))))
    }

    async fn abandon(&self, request: Request<OperationRef>) -> Result<Response<Empty>, Status> {
        caller(&request, CONTROLLER)?;
        let request = request.into_inner();
        if let Some(handle) = self.vms.find(&request.vm) {
            handle.ask(|reply| Message::Abandon(request, reply)).await.map_err(status)?;
        }
        Ok(Response::new(Empty {}))
    }
}

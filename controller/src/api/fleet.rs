//! Calls of hosts. Heartbeats: what they report goes into the registry, what the ledger says of it goes back, and what is
//! not as it should be is put right beside the answer.

use std::time::Duration;

use proto::status::Code;
use proto::v1::fleet_server::Fleet;
use proto::v1::pages_part::Part;
use proto::v1::vm_verdict::Verdict;
use proto::v1::{
    AppendJournalReply, AppendJournalRequest, HeartbeatReply, HeartbeatRequest, HostInfo, PagesPart, PagesWanted,
    VmInfo, VmState,
};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::placement::{Candidate, missing_contracts};
use super::{Api, require};
use crate::failure::Failure;
use crate::ingest::supply::PARTS_DEPTH;
use crate::ledger::LedgerError;
use crate::ledger::event::{Event, Plan, Task};
use crate::tls::Role;

/// How long a stream of pages may take to say whose they are.
const FIRST_MAX: Duration = Duration::from_secs(10);

impl Api {
    pub(super) fn candidate(&self, host: &str) -> Candidate {
        Candidate { name: host.into(), state: self.agents.host_state(host), info: self.agents.host(host) }
    }

    /// The manifest of the checkpoint from which a host may have the pages of a VM: the ledger says so, or an operation that
    /// is about to.
    fn source_of_pages(&self, host: &str, wanted: &PagesWanted) -> Result<String, Failure> {
        let state = self.ledger.state();
        let holds = state.vms.get(&wanted.vm).is_some_and(|vm| {
            vm.host == host && vm.generation == wanted.generation && vm.pages_from == wanted.checkpoint
        });
        let comes = state.active().any(|operation| {
            let same = |task: &Task| {
                matches!(task, Task::Restore { checkpoint, target, lazy: true, .. }
                if *checkpoint == wanted.checkpoint && target == host)
            };
            let Plan { vm, generation, task, .. } = &operation.plan;
            *vm == wanted.vm && *generation == wanted.generation && same(task)
        });
        let entry = state.checkpoints.get(&wanted.checkpoint).filter(|_| holds || comes);
        entry.map(|entry| entry.manifest_key.clone()).ok_or_else(|| {
            let PagesWanted { vm, generation, checkpoint, .. } = wanted;
            let text =
                format!("{host} may not have pages of checkpoint {checkpoint} for {vm} (generation {generation})");
            Failure::new(Code::Denied, text)
        })
    }

    /// VMs whose pages were still coming and of which a host says that they have come.
    async fn note_arrived(&self, report: &HostInfo) -> Result<(), Failure> {
        let state = self.ledger.state();
        let over = |info: &&VmInfo| {
            let there = state.vms.get(&info.name);
            let waits = there.is_some_and(|vm| {
                vm.host == report.name && vm.generation == info.generation && !vm.pages_from.is_empty()
            });
            waits && info.lazy.is_none() && info.state() != VmState::Incoming
        };
        for info in report.vms.iter().filter(over) {
            let event = Event::PagesArrived { vm: info.name.clone(), generation: info.generation };
            match self.ledger.append(&format!("host/{}", report.name), event).await {
                Ok(_) | Err(LedgerError::Refused(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// VMs of a release before contracts get that of their CPU model from the first host that knows it.
    async fn freeze_missing(&self, report: &HostInfo) -> Result<(), Failure> {
        for (vm, contract) in missing_contracts(&self.ledger.state(), &self.candidate(&report.name)) {
            let event = Event::ContractFrozen { vm, capabilities: contract.to_bytes() };
            match self.ledger.append(&format!("host/{}", report.name), event).await {
                // Another host's heartbeat was faster, or the VM is gone.
                Ok(_) | Err(LedgerError::Refused(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Fleet for Api {
    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Result<Response<HeartbeatReply>, Status> {
        let identity = require(&request, Role::Host)?;
        let info = request.into_inner().host.unwrap_or_default();
        if info.name != identity.name {
            let text = format!("{identity} reports as {:?}", info.name);
            return Err(Failure::new(Code::Denied, text).hint("name the host as its certificate does").into());
        }
        let report = info.clone();
        let reply = self.agents.heartbeat(info).await?;
        metrics::counter!(crate::metrics::HEARTBEATS, "host" => identity.name).increment(1);
        for said in &reply.vms {
            let word = match said.verdict() {
                Verdict::Hold => "hold",
                Verdict::Wait => "wait",
                Verdict::Discard => "discard",
                Verdict::Unspecified => "none",
            };
            metrics::counter!(crate::metrics::VERDICTS, "verdict" => word).increment(1);
        }
        self.note_arrived(&report).await?;
        self.note_recordings(&report).await?;
        self.freeze_missing(&report).await?;
        self.reconcile.start(&self.ledger, self.sagas.clone(), report);
        Ok(Response::new(reply))
    }

    async fn append_journal(
        &self,
        request: Request<AppendJournalRequest>,
    ) -> Result<Response<AppendJournalReply>, Status> {
        let identity = require(&request, Role::Host)?;
        Ok(Response::new(self.append(&identity, request.into_inner()).await?))
    }

    type PagesStream = ReceiverStream<Result<PagesPart, Status>>;

    async fn pages(&self, request: Request<Streaming<PagesWanted>>) -> Result<Response<Self::PagesStream>, Status> {
        let identity = require(&request, Role::Host)?;
        let (api, mut wanted) = (self.clone(), request.into_inner());
        let (out, parts) = mpsc::channel(PARTS_DEPTH);
        tokio::spawn(async move {
            let served = async {
                let first = tokio::time::timeout(FIRST_MAX, wanted.next()).await;
                let Ok(Some(Ok(first))) = first else { return Ok(()) };
                let manifest_key = api.source_of_pages(&identity.name, &first)?;
                let supply = api.supplies.of(&api.reader, &manifest_key).await?;
                if first.working_set {
                    let part = Some(Part::WorkingSet(supply.working_set().await));
                    let _gone = out.send(Ok(PagesPart { part })).await;
                }
                supply.serve(wanted, out.clone()).await
            };
            if let Err(failure) = served.await {
                tracing::warn!(host = identity.name, %failure, "pages on demand");
                let _gone = out.send(Err(failure.into())).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(parts)))
    }
}

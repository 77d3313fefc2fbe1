//! Heartbeats of hosts: what they report goes into the registry, what the ledger says of it goes back, and what is
//! not as it should be is put right beside the answer.

use proto::status::Code;
use proto::v1::fleet_server::Fleet;
use proto::v1::vm_verdict::Verdict;
use proto::v1::{HeartbeatReply, HeartbeatRequest, HostInfo};
use tonic::{Request, Response, Status};

use super::placement::{Candidate, missing_contracts};
use super::{Api, require};
use crate::failure::Failure;
use crate::ledger::LedgerError;
use crate::ledger::event::Event;
use crate::tls::Role;

impl Api {
    pub(super) fn candidate(&self, host: &str) -> Candidate {
        Candidate { name: host.into(), state: self.agents.host_state(host), info: self.agents.host(host) }
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
        self.freeze_missing(&report).await?;
        self.reconcile.start(&self.ledger, self.sagas.clone(), report);
        Ok(Response::new(reply))
    }
}

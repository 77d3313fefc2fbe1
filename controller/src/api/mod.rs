//! What the controller offers: `Control` to operators, `Fleet` and `Lanes` to hosts.
//!
//! Each call first looks at who calls (the certificate's role), then turns the request into a plan ([`plans`], pure; which
//! hosts could do it: [`placement`], pure) and begins an operation, or shows what is ([`views`], pure). Nothing is decided here that the ledger does not decide
//! again.

mod adopt;
pub mod checks;
mod console;
mod control;
mod debug;
mod drill;
mod events;
mod export;
mod fleet;
mod lanes;
pub mod placement;
pub mod plans;
mod policies;
mod recordings;
pub mod views;
mod visits;

use std::sync::Arc;

use proto::lane::Aside;
use proto::status::Code;
use proto::v1::control_server::ControlServer;
use proto::v1::fleet_server::FleetServer;
use proto::v1::lanes_server::LanesServer;
use tonic::service::Routes as Services;
use tonic::{Request, Status};

use crate::agents::{Agents, link};
use crate::failure::Failure;
use crate::ingest::Routes;
use crate::ingest::read::Reader;
use crate::ingest::supply::Supplies;
use crate::journal::{APPEND_BYTES_MAX, Journals};
use crate::ledger::Ledger;
use crate::reconcile::Reconcile;
use crate::saga::Sagas;
use crate::saga::hosts::Hosts;
use crate::schedule::Schedule;
use crate::tls::{Identity, Role};

/// Everything that calls need; clones are the same.
#[derive(Clone)]
pub struct Api {
    /// What is true.
    pub ledger: Ledger,
    /// Who was heard.
    pub agents: Arc<Agents>,
    /// Operations.
    pub sagas: Sagas<Hosts>,
    /// Checkpoints by the clock.
    pub schedule: Schedule<Hosts>,
    /// Where checkpoints lie.
    pub reader: Reader,
    /// What the settings call it.
    pub bucket_url: String,
    /// Lanes.
    pub routes: Routes,
    /// Recordings in the bucket.
    pub journals: Journals,
    /// Pages on demand.
    pub supplies: Supplies,
    /// What puts hosts right that come back.
    pub reconcile: Reconcile,
}

impl Api {
    /// The three services.
    pub fn services(&self) -> Services {
        let mut services = Services::builder();
        services
            .add_service(ControlServer::new(self.clone()).max_decoding_message_size(link::MESSAGE_MAX))
            .add_service(FleetServer::new(self.clone()).max_decoding_message_size(APPEND_BYTES_MAX))
            .add_service(Aside::new(LanesServer::new(self.clone()), link::MESSAGE_MAX));
        services.routes()
    }
}

/// Who calls.
fn caller<T>(request: &Request<T>) -> Result<Identity, Status> {
    let denied = || Status::from(Failure::new(Code::Denied, "the connection has no identity"));
    request.extensions().get::<Identity>().cloned().ok_or_else(denied)
}

/// Who calls, if it may be who this service is for.
fn require<T>(request: &Request<T>, role: Role) -> Result<Identity, Status> {
    let identity = caller(request)?;
    if identity.role == role {
        return Ok(identity);
    }
    tracing::warn!(%identity, "refused a call that is for role {role} only");
    let text = format!("{identity} may not do this: a certificate of role {role} is needed");
    Err(Failure::new(Code::Denied, text).hint("use the certificate of an operator").into())
}

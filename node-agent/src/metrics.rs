//! Numbers for Prometheus, at `/metrics`.
//!
//! | name | kind | labels | what |
//! |------|------|--------|------|
//! | `godwit_agent_info` | gauge | `host`, `version` | always 1 |
//! | `godwit_agent_vms` | gauge | `state` | VMs by state |
//! | `godwit_agent_vm_retired_instructions` | gauge | `vm` | guest instructions retired |
//! | `godwit_agent_vm_resident_bytes` | gauge | `vm` | RAM that the guest has touched |
//! | `godwit_agent_memory_available_bytes` | gauge | | what the host has left |
//! | `godwit_agent_heartbeats_total` | counter | `outcome` | heartbeats answered and failed |
//! | `godwit_agent_heartbeat_age_seconds` | gauge | | since the last answered heartbeat was sent |
//!
//! Refuses to know who looks.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use proto::v1::VmState;
use tokio_util::sync::CancellationToken;

use crate::host;
use crate::vm::Vms;
use crate::vm::requests::state_words;

const STATES: [VmState; 7] = [
    VmState::Starting,
    VmState::Running,
    VmState::Paused,
    VmState::Incoming,
    VmState::Stopped,
    VmState::Crashed,
    VmState::HandedOver,
];

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// Another recorder is installed in this process.
    #[error(transparent)]
    Recorder(#[from] metrics_exporter_prometheus::BuildError),
    /// The address cannot be listened on.
    #[error("metrics on {0}")]
    Listen(SocketAddr, #[source] std::io::Error),
}

/// Serves the page until `shutdown`.
///
/// # Errors
/// [`MetricsError`], before anything is served.
pub async fn start(
    address: SocketAddr,
    vms: Arc<Vms>,
    version: String,
    shutdown: CancellationToken,
) -> Result<(), MetricsError> {
    let handle = PrometheusBuilder::new().install_recorder()?;
    let listener = tokio::net::TcpListener::bind(address).await.map_err(|e| MetricsError::Listen(address, e))?;
    let page = Router::new().route("/metrics", get(move || render(Arc::clone(&vms), version.clone(), handle.clone())));
    tokio::spawn(async move {
        let served = axum::serve(listener, page).with_graceful_shutdown(shutdown.cancelled_owned()).await;
        if let Err(error) = served {
            tracing::error!(%error, "metrics page");
        }
    });
    Ok(())
}

async fn render(vms: Arc<Vms>, version: String, handle: PrometheusHandle) -> String {
    let host = vms.host();
    metrics::gauge!("godwit_agent_info", "host" => host.name.clone(), "version" => version).set(1.0);
    let list = vms.list();
    for state in STATES {
        let count = list.iter().filter(|vm| vm.state() == state).count();
        metrics::gauge!("godwit_agent_vms", "state" => state_words(state)).set(count as f64);
    }
    for vm in &list {
        let retired = vm.retired_instructions as f64;
        metrics::gauge!("godwit_agent_vm_retired_instructions", "vm" => vm.name.clone()).set(retired);
        metrics::gauge!("godwit_agent_vm_resident_bytes", "vm" => vm.name.clone()).set(vm.resident_bytes as f64);
    }
    metrics::gauge!("godwit_agent_memory_available_bytes").set(host::memory().available as f64);
    let heard = host.leases.heard_ns();
    if heard > 0 {
        let age = host.clock.boottime_ns().saturating_sub(heard) as f64 / 1e9;
        metrics::gauge!("godwit_agent_heartbeat_age_seconds").set(age);
    }
    handle.render()
}

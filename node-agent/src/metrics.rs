//! Numbers for Prometheus, at `/metrics`.
//!
//! | name | kind | labels | what |
//! |------|------|--------|------|
//! | `godwit_agent_info` | gauge | `host`, `version` | always 1 |
//! | `godwit_agent_vms` | gauge | `state` | VMs by state |
//! | `godwit_agent_vm_retired_instructions` | gauge | `vm` | guest instructions retired since the VM was built |
//! | `godwit_agent_vm_resident_bytes` | gauge | `vm` | RAM that the guest has touched |
//! | `godwit_agent_memory_available_bytes` | gauge | | memory that the host has left |
//! | `godwit_agent_heartbeats_total` | counter | `outcome` | heartbeats answered and failed |
//! | `godwit_agent_heartbeat_age_seconds` | gauge | | since the last answered heartbeat was sent, or since the start |
//! | `godwit_agent_transfers_total` | counter | `kind`, `result` | transfers from here that ended |
//! | `godwit_agent_sent_bytes_total` | counter | `kind` | bytes sent by transfers that were handed over |
//! | `godwit_agent_journal_retries_total` | counter | | times that blocks of a journal could not be handed to the controller |
//! | `godwit_agent_handshakes_refused_total` | counter | | connections refused before any call |
//! | `godwit_agent_certificate_expiry_timestamp_seconds` | gauge | | when this host's certificate ends, Unix time |
//! | `godwit_agent_certificate_refusals_total` | counter | | changed certificate files that could not be used |
//!
//! What is said of one VM goes with the VM. The table is compared with [`METRICS`] by a test. Refuses to know who looks.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use proto::v1::{VmInfo, VmState};
use tokio_util::sync::CancellationToken;

use crate::host;
use crate::vm::Vms;
use crate::vm::requests::state_words;

/// See the table above.
pub const HEARTBEATS: &str = "godwit_agent_heartbeats_total";
/// See the table above.
pub const TRANSFERS: &str = "godwit_agent_transfers_total";
/// See the table above.
pub const SENT_BYTES: &str = "godwit_agent_sent_bytes_total";
/// See the table above.
pub const JOURNAL_RETRIES: &str = "godwit_agent_journal_retries_total";
/// See the table above.
pub const HANDSHAKES_REFUSED: &str = "godwit_agent_handshakes_refused_total";
/// See the table above.
pub const CERTIFICATE_REFUSALS: &str = "godwit_agent_certificate_refusals_total";

const INFO: &str = "godwit_agent_info";
const VMS: &str = "godwit_agent_vms";
const VM_RETIRED: &str = "godwit_agent_vm_retired_instructions";
const VM_RESIDENT: &str = "godwit_agent_vm_resident_bytes";
const MEMORY_AVAILABLE: &str = "godwit_agent_memory_available_bytes";
const HEARTBEAT_AGE: &str = "godwit_agent_heartbeat_age_seconds";
const CERTIFICATE_EXPIRY: &str = "godwit_agent_certificate_expiry_timestamp_seconds";

/// Version 0.0.4 of the text form.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Gauge,
    Counter,
}

/// Every metric: name, kind, what it says.
const METRICS: [(&str, Kind, &str); 13] = [
    (INFO, Kind::Gauge, "always 1"),
    (VMS, Kind::Gauge, "VMs by state"),
    (VM_RETIRED, Kind::Gauge, "guest instructions retired since the VM was built"),
    (VM_RESIDENT, Kind::Gauge, "RAM that the guest has touched"),
    (MEMORY_AVAILABLE, Kind::Gauge, "memory that the host has left"),
    (HEARTBEATS, Kind::Counter, "heartbeats answered and failed"),
    (HEARTBEAT_AGE, Kind::Gauge, "since the last answered heartbeat was sent, or since the start"),
    (TRANSFERS, Kind::Counter, "transfers from here that ended"),
    (SENT_BYTES, Kind::Counter, "bytes sent by transfers that were handed over"),
    (JOURNAL_RETRIES, Kind::Counter, "times that blocks of a journal could not be handed to the controller"),
    (HANDSHAKES_REFUSED, Kind::Counter, "connections refused before any call"),
    (CERTIFICATE_EXPIRY, Kind::Gauge, "when this host's certificate ends, Unix time"),
    (CERTIFICATE_REFUSALS, Kind::Counter, "changed certificate files that could not be used"),
];

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
    introduce();
    let listener = tokio::net::TcpListener::bind(address).await.map_err(|e| MetricsError::Listen(address, e))?;
    let started_ns = vms.host().clock.boottime_ns();
    let page = move || {
        let (vms, version, handle) = (Arc::clone(&vms), version.clone(), handle.clone());
        async move { ([(CONTENT_TYPE, TEXT)], render(&vms, version, started_ns, &handle)) }
    };
    let router = Router::new().route("/metrics", get(page)).route("/healthz", get(async || "ok\n"));
    tokio::spawn(async move {
        let served = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await;
        if let Err(error) = served {
            tracing::error!(%error, "metrics page");
        }
    });
    Ok(())
}

/// Says what each metric is, and lets every counter begin at 0: a rate needs a first value.
fn introduce() {
    for (name, kind, what) in METRICS {
        match kind {
            Kind::Gauge => metrics::describe_gauge!(name, what),
            Kind::Counter => metrics::describe_counter!(name, what),
        }
    }
    for outcome in ["answered", "failed"] {
        metrics::counter!(HEARTBEATS, "outcome" => outcome).increment(0);
    }
    for kind in [transfer_kind(false), transfer_kind(true)] {
        for result in ["done", "failed"] {
            metrics::counter!(TRANSFERS, "kind" => kind, "result" => result).increment(0);
        }
        metrics::counter!(SENT_BYTES, "kind" => kind).increment(0);
    }
    metrics::counter!(HANDSHAKES_REFUSED).increment(0);
    metrics::counter!(JOURNAL_RETRIES).increment(0);
    metrics::counter!(CERTIFICATE_REFUSALS).increment(0);
}

fn transfer_kind(checkpoint: bool) -> &'static str {
    if checkpoint { "checkpoint" } else { "migration" }
}

/// A transfer from here has ended: with so many bytes sent, or in vain.
pub fn transfer_ended(checkpoint: bool, bytes_sent: Option<u64>) {
    let (kind, result) = (transfer_kind(checkpoint), if bytes_sent.is_some() { "done" } else { "failed" });
    metrics::counter!(TRANSFERS, "kind" => kind, "result" => result).increment(1);
    metrics::counter!(SENT_BYTES, "kind" => kind).increment(bytes_sent.unwrap_or(0));
}

fn render(vms: &Vms, version: String, started_ns: u64, handle: &PrometheusHandle) -> String {
    let host = vms.host();
    metrics::gauge!(INFO, "host" => host.name.clone(), "version" => version).set(1.0);
    let list = vms.list();
    for state in STATES {
        let count = list.iter().filter(|vm| vm.state() == state).count();
        metrics::gauge!(VMS, "state" => state_words(state)).set(count as f64);
    }
    metrics::gauge!(MEMORY_AVAILABLE).set(host::memory().available as f64);
    let heard_ns = host.leases.heard_ns().max(started_ns);
    metrics::gauge!(HEARTBEAT_AGE).set(host.clock.boottime_ns().saturating_sub(heard_ns) as f64 / 1e9);
    metrics::gauge!(CERTIFICATE_EXPIRY).set(host.tls.expires_unix_s() as f64);
    let mut page = handle.render();
    per_vm(&mut page, VM_RETIRED, &list, |vm| vm.retired_instructions);
    per_vm(&mut page, VM_RESIDENT, &list, |vm| vm.resident_bytes);
    page
}

/// Numbers of VMs are not kept by the recorder, which would go on showing VMs that are gone. Names of VMs need no escapes.
fn per_vm(page: &mut String, name: &str, vms: &[VmInfo], value: impl Fn(&VmInfo) -> u64) {
    let what = METRICS.iter().find(|(known, ..)| *known == name).map_or("", |(_, _, what)| what);
    // Writing to a string cannot fail.
    let _ = writeln!(page, "# HELP {name} {what}\n# TYPE {name} gauge");
    for vm in vms {
        let _ = writeln!(page, "{name}{{vm=\"{}\"}} {}", vm.name, value(vm));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_at_the_head_is_what_is_served() {
        let rows = include_str!("metrics.rs").lines().filter_map(|line| line.strip_prefix("//! | `godwit_"));
        let row = |row: &str| -> Vec<String> {
            format!("godwit_{row}").split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
        };
        let told: Vec<Vec<String>> = rows.map(row).collect();
        assert_eq!(told.len(), METRICS.len());
        for (cells, (name, kind, what)) in told.iter().zip(METRICS) {
            let kind = format!("{kind:?}").to_lowercase();
            assert_eq!((cells[0].as_str(), cells[1].as_str(), cells[3].as_str()), (name, kind.as_str(), what));
        }
    }

    #[test]
    fn a_vm_that_is_gone_is_not_told() {
        let vm = |name: &str| VmInfo { name: name.into(), resident_bytes: 7, ..VmInfo::default() };
        let mut page = String::new();
        per_vm(&mut page, VM_RESIDENT, &[vm("a"), vm("b")], |vm| vm.resident_bytes);
        assert!(page.ends_with("{vm=\"a\"} 7\ngodwit_agent_vm_resident_bytes{vm=\"b\"} 7\n"), "{page}");
        page.clear();
        per_vm(&mut page, VM_RESIDENT, &[], |vm| vm.resident_bytes);
        assert_eq!(page.lines().count(), 2);
    }
}

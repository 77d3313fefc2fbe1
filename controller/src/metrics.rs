//! Numbers for operators, as Prometheus text on `http://METRICS/metrics`.
//!
//! | name                                | kind      | labels       | meaning                                          |
//! |-------------------------------------|-----------|--------------|--------------------------------------------------|
//! | `godwit_hosts`                      | gauge     | state        | hosts that are up, silent or lost                |
//! | `godwit_vms`                        | gauge     | intent       | VMs by what was asked for                        |
//! | `godwit_heartbeats_total`           | counter   | host         | heartbeats taken                                 |
//! | `godwit_verdicts_total`             | counter   | verdict      | verdicts given: hold, wait, discard              |
//! | `godwit_operations_total`           | counter   | task, result | operations ended: done, undone, left             |
//! | `godwit_operations_active`          | gauge     |              | operations under way                             |
//! | `godwit_operation_seconds`          | histogram | task         | from the beginning to the end of an operation    |
//! | `godwit_migration_downtime_seconds` | histogram |              | guest stopped, up to the target's answer         |
//! | `godwit_checkpoint_bytes_total`     | counter   |              | bytes of packs and manifests written             |
//! | `godwit_checkpoint_stop_seconds`    | histogram |              | guest stopped for a checkpoint                   |
//! | `godwit_relay_bytes_total`          | counter   |              | bytes of chunks forwarded between hosts          |
//! | `godwit_damaged_total`              | counter   |              | frames, packs and manifests that fail their hash |
//! | `godwit_handshakes_refused_total`   | counter   |              | connections refused before any call              |

use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::agents::Agents;
use crate::ledger::Ledger;

/// See the table above.
pub const HOSTS: &str = "godwit_hosts";
/// See the table above.
pub const VMS: &str = "godwit_vms";
/// See the table above.
pub const HEARTBEATS: &str = "godwit_heartbeats_total";
/// See the table above.
pub const VERDICTS: &str = "godwit_verdicts_total";
/// See the table above.
pub const OPERATIONS: &str = "godwit_operations_total";
/// See the table above.
pub const OPERATIONS_ACTIVE: &str = "godwit_operations_active";
/// See the table above.
pub const OPERATION_SECONDS: &str = "godwit_operation_seconds";
/// See the table above.
pub const MIGRATION_DOWNTIME: &str = "godwit_migration_downtime_seconds";
/// See the table above.
pub const CHECKPOINT_BYTES: &str = "godwit_checkpoint_bytes_total";
/// See the table above.
pub const CHECKPOINT_STOP: &str = "godwit_checkpoint_stop_seconds";
/// See the table above.
pub const RELAY_BYTES: &str = "godwit_relay_bytes_total";
/// See the table above.
pub const DAMAGED: &str = "godwit_damaged_total";
/// See the table above.
pub const HANDSHAKES_REFUSED: &str = "godwit_handshakes_refused_total";

const DOWNTIME_BUCKETS: [f64; 10] = [0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];
const OPERATION_BUCKETS: [f64; 9] = [0.05, 0.2, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0];

/// Why metrics cannot be collected.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The collector could not be made or installed.
    #[error("metrics: {0}")]
    Recorder(String),
}

/// Installs the collector of this process. Call once.
///
/// # Errors
/// [`MetricsError::Recorder`].
pub fn install() -> Result<PrometheusHandle, MetricsError> {
    use metrics_exporter_prometheus::Matcher;
    let failed = |error: String| MetricsError::Recorder(error);
    let full = |name: &str| Matcher::Full(name.into());
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(full(MIGRATION_DOWNTIME), &DOWNTIME_BUCKETS)
        .and_then(|builder| builder.set_buckets_for_metric(full(CHECKPOINT_STOP), &DOWNTIME_BUCKETS))
        .and_then(|builder| builder.set_buckets_for_metric(full(OPERATION_SECONDS), &OPERATION_BUCKETS))
        .map_err(|e| failed(e.to_string()))?
        .build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|e| failed(e.to_string()))?;
    Ok(handle)
}

/// What the gauges are computed from when they are asked for.
#[derive(Clone)]
pub struct Sources {
    /// What is true.
    pub ledger: Ledger,
    /// Who was heard.
    pub agents: Arc<Agents>,
}

/// Serves the numbers until shutdown.
///
/// # Errors
/// [`std::io::Error`] if the socket fails.
pub async fn serve(
    listener: TcpListener,
    handle: PrometheusHandle,
    sources: Sources,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    tracing::info!(address = %listener.local_addr()?, "metrics");
    let text = move || {
        let (handle, sources) = (handle.clone(), sources.clone());
        async move {
            measure(&sources);
            handle.render()
        }
    };
    let router = Router::new().route("/metrics", get(text)).route("/healthz", get(async || "ok\n"));
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

fn measure(sources: &Sources) {
    let state = sources.ledger.state();
    let hosts = sources.agents.records();
    for word in ["up", "silent", "lost"] {
        let count = hosts.iter().filter(|host| host.state == word).count();
        metrics::gauge!(HOSTS, "state" => word).set(count as f64);
    }
    for word in ["running", "paused", "stopped"] {
        let count = state.vms.values().filter(|vm| vm.intent.word() == word).count();
        metrics::gauge!(VMS, "intent" => word).set(count as f64);
    }
    metrics::gauge!(OPERATIONS_ACTIVE).set(state.active().count() as f64);
}

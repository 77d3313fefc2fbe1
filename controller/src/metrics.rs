//! Numbers for operators, as Prometheus text on `http://METRICS/metrics`.
//!
//! | name                                | kind      | labels       | meaning                                          |
//! |-------------------------------------|-----------|--------------|--------------------------------------------------|
//! | `godwit_hosts`                      | gauge     | state        | hosts that are up, silent or lost                |
//! | `godwit_vms`                        | gauge     | intent       | VMs by what was asked for                        |
//! | `godwit_checkpoints`                | gauge     |              | checkpoints in the ledger                        |
//! | `godwit_checkpoint_stored_bytes`    | gauge     |              | bytes of those checkpoints in the bucket         |
//! | `godwit_checkpoints_damaged`        | gauge     |              | checkpoints that are known to be damaged         |
//! | `godwit_heartbeats_total`           | counter   | host         | heartbeats taken                                 |
//! | `godwit_verdicts_total`             | counter   | verdict      | verdicts given: hold, wait, discard              |
//! | `godwit_operations_total`           | counter   | task, result | operations ended: done, undone, left             |
//! | `godwit_operations_active`          | gauge     |              | operations under way                             |
//! | `godwit_operation_seconds`          | histogram | task         | from the beginning to the end of an operation    |
//! | `godwit_migration_downtime_seconds` | histogram |              | guest stopped, up to the target's answer         |
//! | `godwit_checkpoint_bytes_total`     | counter   |              | bytes of packs and manifests written             |
//! | `godwit_checkpoint_stop_seconds`    | histogram |              | guest stopped for a checkpoint                   |
//! | `godwit_checkpoint_age_seconds`     | gauge     | vm           | since the newest checkpoint of a VM was made     |
//! | `godwit_checks_total`               | counter   | check, result | samples and drills: ok, failed                  |
//! | `godwit_journal_lag_seconds`        | gauge     | vm           | since the newest block of a recording was closed |
//! | `godwit_policies_missed`            | gauge     |              | VMs whose newest checkpoint is too old           |
//! | `godwit_bucket_requests_total`      | counter   | verb, outcome | requests to the bucket that ended               |
//! | `godwit_bucket_retries_total`       | counter   | verb         | tries of a request after its first               |
//! | `godwit_bucket_bytes_total`         | counter   | direction    | bytes of objects written and read                |
//! | `godwit_bucket_seconds`             | histogram | verb         | a request to the bucket with all its tries       |
//! | `godwit_relay_bytes_total`          | counter   |              | bytes of chunks forwarded between hosts          |
//! | `godwit_damaged_total`              | counter   |              | frames, packs and manifests that fail their hash |
//! | `godwit_bucket_failures_total`      | counter   | kind         | failed accesses: full, gone, io, denied          |
//! | `godwit_handshakes_refused_total`   | counter   |              | connections refused before any call              |
//! | `godwit_certificate_expiry_timestamp_seconds` | gauge |        | when this controller's certificate ends, Unix time |
//! | `godwit_certificate_refusals_total` | counter   |              | changed certificate files that could not be used |
//!
//! Counters begin at 0, so that rates have a first value, except those per host; a histogram appears with its first
//! value. The table is compared with [`METRICS`] by a test.

use std::sync::Arc;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use metrics_util::MetricKindMask;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::agents::Agents;
use crate::journal::Journals;
use crate::ledger::damage::is_damaged;
use crate::ledger::event::LABELS;
use crate::ledger::{Ledger, unix_ms};
use crate::tls::Tls;

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
pub const CHECKPOINT_AGE: &str = "godwit_checkpoint_age_seconds";
/// See the table above.
pub const POLICIES_MISSED: &str = "godwit_policies_missed";
/// See the table above.
pub const JOURNAL_LAG: &str = "godwit_journal_lag_seconds";
/// See the table above.
pub const BUCKET_REQUESTS: &str = "godwit_bucket_requests_total";
/// See the table above.
pub const BUCKET_RETRIES: &str = "godwit_bucket_retries_total";
/// See the table above.
pub const BUCKET_BYTES: &str = "godwit_bucket_bytes_total";
/// See the table above.
pub const BUCKET_SECONDS: &str = "godwit_bucket_seconds";
/// See the table above.
pub const RELAY_BYTES: &str = "godwit_relay_bytes_total";
/// See the table above.
pub const DAMAGED: &str = "godwit_damaged_total";
/// See the table above.
pub const HANDSHAKES_REFUSED: &str = "godwit_handshakes_refused_total";
/// See the table above.
pub const CHECKPOINTS: &str = "godwit_checkpoints";
/// See the table above.
pub const CHECKPOINT_STORED: &str = "godwit_checkpoint_stored_bytes";
/// See the table above.
pub const CHECKPOINTS_DAMAGED: &str = "godwit_checkpoints_damaged";
/// See the table above.
pub const CHECKS: &str = "godwit_checks_total";
/// See the table above.
pub const BUCKET_FAILURES: &str = "godwit_bucket_failures_total";
/// See the table above.
pub const CERTIFICATE_EXPIRY: &str = "godwit_certificate_expiry_timestamp_seconds";
/// See the table above.
pub const CERTIFICATE_REFUSALS: &str = "godwit_certificate_refusals_total";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Gauge,
    Counter,
    Histogram,
}

/// Every metric: name, kind, what it says.
const METRICS: [(&str, Kind, &str); 27] = [
    (HOSTS, Kind::Gauge, "hosts that are up, silent or lost"),
    (VMS, Kind::Gauge, "VMs by what was asked for"),
    (CHECKPOINTS, Kind::Gauge, "checkpoints in the ledger"),
    (CHECKPOINT_STORED, Kind::Gauge, "bytes of those checkpoints in the bucket"),
    (CHECKPOINTS_DAMAGED, Kind::Gauge, "checkpoints that are known to be damaged"),
    (HEARTBEATS, Kind::Counter, "heartbeats taken"),
    (VERDICTS, Kind::Counter, "verdicts given: hold, wait, discard"),
    (OPERATIONS, Kind::Counter, "operations ended: done, undone, left"),
    (OPERATIONS_ACTIVE, Kind::Gauge, "operations under way"),
    (OPERATION_SECONDS, Kind::Histogram, "from the beginning to the end of an operation"),
    (MIGRATION_DOWNTIME, Kind::Histogram, "guest stopped, up to the target's answer"),
    (CHECKPOINT_BYTES, Kind::Counter, "bytes of packs and manifests written"),
    (CHECKPOINT_STOP, Kind::Histogram, "guest stopped for a checkpoint"),
    (CHECKPOINT_AGE, Kind::Gauge, "since the newest checkpoint of a VM was made"),
    (CHECKS, Kind::Counter, "samples and drills: ok, failed"),
    (JOURNAL_LAG, Kind::Gauge, "since the newest block of a recording was closed"),
    (POLICIES_MISSED, Kind::Gauge, "VMs whose newest checkpoint is too old"),
    (BUCKET_REQUESTS, Kind::Counter, "requests to the bucket that ended"),
    (BUCKET_RETRIES, Kind::Counter, "tries of a request after its first"),
    (BUCKET_BYTES, Kind::Counter, "bytes of objects written and read"),
    (BUCKET_SECONDS, Kind::Histogram, "a request to the bucket with all its tries"),
    (RELAY_BYTES, Kind::Counter, "bytes of chunks forwarded between hosts"),
    (DAMAGED, Kind::Counter, "frames, packs and manifests that fail their hash"),
    (BUCKET_FAILURES, Kind::Counter, "failed accesses: full, gone, io, denied"),
    (HANDSHAKES_REFUSED, Kind::Counter, "connections refused before any call"),
    (CERTIFICATE_EXPIRY, Kind::Gauge, "when this controller's certificate ends, Unix time"),
    (CERTIFICATE_REFUSALS, Kind::Counter, "changed certificate files that could not be used"),
];

/// Version 0.0.4 of the text form.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// How long a gauge of a VM that is gone is still shown.
const GONE: std::time::Duration = std::time::Duration::from_secs(60);
const DOWNTIME_BUCKETS: [f64; 10] = [0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];
const REQUEST_BUCKETS: [f64; 10] = [0.002, 0.005, 0.02, 0.05, 0.2, 0.5, 1.0, 5.0, 20.0, 120.0];
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
        // Gauges are set whenever they are asked for: one that is not set any more is of a VM that is gone.
        .idle_timeout(MetricKindMask::GAUGE, Some(GONE))
        .set_buckets_for_metric(full(MIGRATION_DOWNTIME), &DOWNTIME_BUCKETS)
        .and_then(|builder| builder.set_buckets_for_metric(full(CHECKPOINT_STOP), &DOWNTIME_BUCKETS))
        .and_then(|builder| builder.set_buckets_for_metric(full(BUCKET_SECONDS), &REQUEST_BUCKETS))
        .and_then(|builder| builder.set_buckets_for_metric(full(OPERATION_SECONDS), &OPERATION_BUCKETS))
        .map_err(|e| failed(e.to_string()))?
        .build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|e| failed(e.to_string()))?;
    introduce();
    Ok(handle)
}

/// Says what each metric is, and lets counters begin at 0.
fn introduce() {
    for (name, kind, what) in METRICS {
        match kind {
            Kind::Gauge => metrics::describe_gauge!(name, what),
            Kind::Counter => metrics::describe_counter!(name, what),
            Kind::Histogram => metrics::describe_histogram!(name, what),
        }
    }
    for verdict in ["hold", "wait", "discard"] {
        metrics::counter!(VERDICTS, "verdict" => verdict).increment(0);
    }
    for task in LABELS {
        for result in ["done", "undone", "left"] {
            metrics::counter!(OPERATIONS, "task" => task, "result" => result).increment(0);
        }
    }
    for check in ["sample", "drill"] {
        for result in ["ok", "failed"] {
            metrics::counter!(CHECKS, "check" => check, "result" => result).increment(0);
        }
    }
    for kind in ["full", "gone", "io", "denied"] {
        metrics::counter!(BUCKET_FAILURES, "kind" => kind).increment(0);
    }
    for verb in ["put", "put_new", "get", "get_range", "list", "list_dirs", "delete"] {
        metrics::counter!(BUCKET_REQUESTS, "verb" => verb, "outcome" => "ok").increment(0);
        metrics::counter!(BUCKET_RETRIES, "verb" => verb).increment(0);
    }
    for direction in ["written", "read"] {
        metrics::counter!(BUCKET_BYTES, "direction" => direction).increment(0);
    }
    for name in [CHECKPOINT_BYTES, RELAY_BYTES, DAMAGED, HANDSHAKES_REFUSED, CERTIFICATE_REFUSALS] {
        metrics::counter!(name).increment(0);
    }
}

/// What the gauges are computed from when they are asked for.
#[derive(Clone)]
pub struct Sources {
    /// What is true.
    pub ledger: Ledger,
    /// Who was heard.
    pub agents: Arc<Agents>,
    /// Recordings in the bucket.
    pub journals: Journals,
    /// This controller's certificate.
    pub tls: Arc<Tls>,
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
            ([(CONTENT_TYPE, TEXT)], handle.render())
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
    metrics::gauge!(CHECKPOINTS).set(state.checkpoints.len() as f64);
    let stored: u64 = state.checkpoints.values().map(|entry| entry.stored_bytes).sum();
    metrics::gauge!(CHECKPOINT_STORED).set(stored as f64);
    let damaged = state.checkpoints.values().filter(|entry| is_damaged(entry)).count();
    metrics::gauge!(CHECKPOINTS_DAMAGED).set(damaged as f64);
    metrics::gauge!(CERTIFICATE_EXPIRY).set(sources.tls.expires_unix_s() as f64);
    let (now, newest) = (unix_ms(), state.newest_checkpoints());
    for vm in state.vms.values() {
        if let Some(newest) = newest.get(vm.id.as_str()) {
            let age = now.saturating_sub(newest.created_unix_ms) as f64 / 1e3;
            metrics::gauge!(CHECKPOINT_AGE, "vm" => vm.name.clone()).set(age);
        }
    }
    for recording in state.recordings.values().filter(|recording| recording.ended.is_empty()) {
        let newest_ns = recording.id.parse().ok().and_then(|id| sources.journals.newest_ns(id));
        if let Some(newest_ns) = newest_ns {
            let lag = now.saturating_sub(newest_ns / 1_000_000) as f64 / 1e3;
            metrics::gauge!(JOURNAL_LAG, "vm" => recording.vm.clone()).set(lag);
        }
    }
    metrics::gauge!(POLICIES_MISSED).set(state.policies.values().filter(|policy| policy.missed).count() as f64);
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
}

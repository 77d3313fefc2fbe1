//! `ctl top`: hosts and guests, and how fast each guest goes, again and again.
//!
//! Numbers are those of heartbeats; a rate is taken between two heartbeats of a host, by the host's own age of them, so
//! that looking more often does not make it jump. On a terminal the screen is drawn anew; elsewhere one table, object or
//! document follows the other. Asks the controller alone.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use proto::v1;
use serde::Serialize;

use super::client::Client;
use super::failure::Failure;
use super::grammar::TopArgs;
use super::output::{self, Format, Report, Text};
use super::report::{dash, timestamp, vm_state};
use super::units::show_bytes;

/// Moves the cursor home and clears what is below.
const HOME: &str = "\x1b[H\x1b[J";
/// Two reports that are closer than this are of the same heartbeat.
const SAME: Duration = Duration::from_millis(100);

/// One look at the cluster.
#[derive(Debug, Serialize)]
struct Look {
    time: String,
    hosts: Vec<TopHost>,
    vms: Vec<TopVm>,
}

#[derive(Debug, Serialize)]
struct TopHost {
    name: String,
    state: String,
    vms: usize,
    cpus: u32,
    memory_bytes_total: u64,
    memory_bytes_free: u64,
}

#[derive(Debug, Serialize)]
struct TopVm {
    name: String,
    host: String,
    state: &'static str,
    operation: String,
    /// Million guest instructions a second since the heartbeat before; none until there were two.
    minstructions_per_s: Option<f64>,
    retired_instructions: u64,
    memory_bytes: u64,
    resident_bytes: u64,
    uptime_ms: u64,
}

/// What a host reported last of a guest, and when.
#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    retired: u64,
    rate: Option<f64>,
}

type Samples = BTreeMap<(String, String), Sample>;

impl Report for Look {
    fn text(&self) -> Text {
        let host = |h: &TopHost| {
            let used = h.memory_bytes_total.saturating_sub(h.memory_bytes_free);
            let memory = format!("{} of {}", show_bytes(used), show_bytes(h.memory_bytes_total));
            vec![h.name.clone(), h.state.clone(), h.vms.to_string(), h.cpus.to_string(), memory]
        };
        let vm = |v: &TopVm| {
            vec![
                v.name.clone(),
                v.host.clone(),
                v.state.to_owned(),
                v.minstructions_per_s.map_or("-".to_owned(), |rate| format!("{rate:.1}")),
                format!("{} of {}", show_bytes(v.resident_bytes), show_bytes(v.memory_bytes)),
                format!("{} s", v.uptime_ms / 1000),
                dash(&v.operation),
            ]
        };
        Text::Parts(vec![
            Text::Rows {
                columns: vec!["host", "state", "vms", "cpus", "memory used"],
                rows: self.hosts.iter().map(host).collect(),
                empty: "no hosts",
            },
            Text::Rows {
                columns: vec!["vm", "host", "state", "minstr/s", "memory touched", "up", "operation"],
                rows: self.vms.iter().map(vm).collect(),
                empty: "no VMs",
            },
        ])
    }
}

/// Shows the cluster until it was shown `--count` times, or for ever.
///
/// # Errors
/// The controller does not answer, or stdout is closed.
pub async fn run(mut client: Client, args: TopArgs, format: Format) -> Result<(), Failure> {
    let redraw = format == Format::Table && std::io::stdout().is_terminal();
    let mut samples = Samples::new();
    let mut shown = 0;
    loop {
        let failed = |e: tonic::Status| Failure::from_status("list the hosts", &e);
        let hosts = client.list_hosts(v1::Empty {}).await.map_err(failed)?.into_inner().hosts;
        let look = look(hosts, Instant::now(), &mut samples);
        if redraw {
            print!("{HOME}");
        }
        output::print_streamed(format, &look)?;
        shown += 1;
        if args.count.is_some_and(|count| shown >= count) {
            return Ok(());
        }
        tokio::time::sleep(args.interval).await;
    }
}

fn look(records: Vec<v1::HostRecord>, now: Instant, samples: &mut Samples) -> Look {
    let unix_ms = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_millis();
    let mut look = Look { time: timestamp(unix_ms as u64), hosts: Vec::new(), vms: Vec::new() };
    let mut seen = Samples::new();
    for record in records {
        let info = record.info.unwrap_or_default();
        let age = Duration::from_millis(record.heartbeat_age_ms);
        let at = now.checked_sub(age).unwrap_or(now);
        for vm in &info.vms {
            let key = (info.name.clone(), vm.name.clone());
            let sample = sample(samples.get(&key).copied(), at, vm.retired_instructions);
            seen.insert(key, sample);
            look.vms.push(TopVm {
                name: vm.name.clone(),
                host: info.name.clone(),
                state: vm_state(vm.state()),
                operation: vm.operation.clone(),
                minstructions_per_s: sample.rate,
                retired_instructions: vm.retired_instructions,
                memory_bytes: vm.config.as_ref().map_or(0, |config| config.memory_bytes),
                resident_bytes: vm.resident_bytes,
                uptime_ms: vm.uptime_ms,
            });
        }
        look.hosts.push(TopHost {
            state: record.state,
            vms: info.vms.len(),
            cpus: info.cpus,
            memory_bytes_total: info.memory_bytes_total,
            memory_bytes_free: info.memory_bytes_free,
            name: info.name,
        });
    }
    look.vms.sort_by(|a, b| (&a.name, &a.host).cmp(&(&b.name, &b.host)));
    *samples = seen;
    look
}

/// The newer of two samples, with the rate between them. The same heartbeat seen again says nothing new.
fn sample(before: Option<Sample>, at: Instant, retired: u64) -> Sample {
    match before {
        Some(before) if at.saturating_duration_since(before.at) < SAME => before,
        Some(before) => {
            let passed = at.saturating_duration_since(before.at).as_secs_f64();
            let rate = retired.saturating_sub(before.retired) as f64 / passed / 1e6;
            Sample { at, retired, rate: Some(rate) }
        }
        None => Sample { at, retired, rate: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(age_ms: u64, retired: u64) -> v1::HostRecord {
        let vm = v1::VmInfo { name: "vm1".into(), retired_instructions: retired, ..Default::default() };
        let info = v1::HostInfo { name: "hostA".into(), vms: vec![vm], ..Default::default() };
        v1::HostRecord { info: Some(info), state: "up".into(), heartbeat_age_ms: age_ms }
    }

    #[test]
    fn a_rate_is_between_heartbeats_however_often_one_looks() {
        let mut samples = Samples::new();
        let start = Instant::now() + Duration::from_secs(100);
        let at = |ms: u64| start + Duration::from_millis(ms);
        assert_eq!(look(vec![record(500, 1_000_000)], at(0), &mut samples).vms[0].minstructions_per_s, None);
        assert_eq!(look(vec![record(1500, 1_000_000)], at(1000), &mut samples).vms[0].minstructions_per_s, None);
        let rate = |look: Look| look.vms[0].minstructions_per_s.unwrap();
        assert!((rate(look(vec![record(500, 9_000_000)], at(2000), &mut samples)) - 4.0).abs() < 1e-9);
        let again = look(vec![record(1500, 9_000_000)], at(3000), &mut samples);
        let text = again.text().render();
        assert!(text.contains("4.0"), "{text}");
        assert!((rate(again) - 4.0).abs() < 1e-9);
        look(Vec::new(), at(4000), &mut samples);
        assert!(samples.is_empty(), "what is gone is forgotten");
    }
}

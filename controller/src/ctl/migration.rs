//! `ctl migrate`: the request, and its result: the fields that `ctl migrate -o json` promises, and the table that people read.
//!
//! What a flag means is here; how a migration is done is the controller's and the hosts' business.

use std::time::Duration;

use proto::status::Code;
use proto::v1;
use serde::Serialize;

use super::client::Client;
use super::failure::Failure;
use super::grammar::{MigrateArgs, Verify, Via};
use super::operation;
use super::output::{self, Format, Report, Text};
use super::units::{show_bytes, show_ms};

/// Most rounds while the guest runs.
const ROUNDS_MAX: u32 = 30;
/// Streams between the hosts.
const LANES: u32 = 2;

/// Moves a VM, or says whether it could be moved.
///
/// # Errors
/// A flag that makes no sense, or the migration did not come about.
pub async fn migrate(client: &Client, args: MigrateArgs, format: Format) -> Result<(), Failure> {
    let engine = args.engine.unwrap_or_default();
    if !["", "soft", "kvm"].contains(&engine.as_str()) {
        return Err(Failure::bad_input(format!("there is no engine {engine:?}")).hint("soft or kvm"));
    }
    let request = v1::MigrateRequest {
        vm: args.vm.clone(),
        to: args.to.clone(),
        via_controller: args.via == Via::Controller,
        policy: Some(v1::TransferPolicy {
            throttle_percent_max: args.throttle,
            ..policy(args.downtime, args.bandwidth, args.verify)?
        }),
        dry_run: args.dry_run,
        engine,
    };
    let what = format!("migrate {} to {}{}", args.vm, args.to, if args.dry_run { " (dry run)" } else { "" });
    let mut calls = client.clone();
    let outcome = operation::follow(client, &what, calls.migrate(request)).await?;
    if args.dry_run {
        return output::print(format, &Plan { vm: args.vm, target: args.to, dry_run: true, findings: outcome.notes });
    }
    let report = outcome
        .done
        .migration
        .ok_or_else(|| Failure::new(Code::Protocol, format!("{what}: done, but the controller sent no report")))?;
    output::print(format, &Migration::new(outcome.operation, report))
}

/// The policy of a transfer. The longest pause is in whole milliseconds on the wire.
///
/// # Errors
/// A time or a rate that cannot be meant.
pub fn policy(downtime: Duration, bandwidth: Option<u64>, verify: Verify) -> Result<v1::TransferPolicy, Failure> {
    let downtime_ms_max = u32::try_from(downtime.as_millis()).ok().filter(|ms| *ms > 0).ok_or_else(|| {
        Failure::bad_input(format!("a downtime of {downtime:?} cannot be aimed at")).hint("1ms is the least")
    })?;
    if let Some(bytes @ 0..=4095) = bandwidth {
        return Err(Failure::bad_input(format!("a bandwidth of {bytes} bytes a second moves not even one page"))
            .hint("write for example --bandwidth 1G; leave it away for no limit"));
    }
    Ok(v1::TransferPolicy {
        downtime_ms_max,
        rounds_max: ROUNDS_MAX,
        bandwidth_bytes_per_s: bandwidth.unwrap_or(0),
        lanes: LANES,
        verify_full: verify == Verify::Full,
        throttle_percent_max: 0,
    })
}

/// A migration that is done.
#[derive(Debug, Serialize)]
pub struct Migration {
    vm: String,
    source: String,
    target: String,
    operation: String,
    total_ms: f64,
    downtime_ms: f64,
    phases: Vec<Phase>,
    rounds: Vec<Round>,
    bytes_sent: u64,
    ram_bytes: u64,
    source_digest: String,
    target_digest: String,
    generation: u64,
}

/// Where the time went.
#[derive(Debug, Serialize)]
struct Phase {
    phase: String,
    ms: f64,
}

/// One pass over what was dirty.
#[derive(Debug, Serialize)]
struct Round {
    round: u32,
    pages: u64,
    zero_pages: u64,
    bytes: u64,
    ms: f64,
    /// Bytes per second that the guest dirtied while it ran, as last measured.
    dirty_rate: u64,
    /// Percent of its time that the guest was held back.
    throttle_percent: u32,
}

impl Migration {
    /// From the controller's report.
    pub fn new(operation: String, report: v1::MigrationReport) -> Migration {
        let round = |r: v1::RoundReport| Round {
            round: r.round,
            pages: r.pages,
            zero_pages: r.zero_pages,
            bytes: r.bytes,
            ms: r.ms,
            dirty_rate: r.dirty_rate,
            throttle_percent: r.throttle_percent,
        };
        Migration {
            vm: report.vm,
            source: report.source,
            target: report.target,
            operation,
            total_ms: report.total_ms,
            downtime_ms: report.downtime_ms,
            phases: report.phases.into_iter().map(|p| Phase { phase: p.phase, ms: p.ms }).collect(),
            rounds: report.rounds.into_iter().map(round).collect(),
            bytes_sent: report.bytes_sent,
            ram_bytes: report.ram_bytes,
            source_digest: report.source_digest,
            target_digest: report.target_digest,
            generation: report.generation,
        }
    }
}

impl Report for Migration {
    fn text(&self) -> Text {
        let agree = if self.source_digest == self.target_digest { "agree" } else { "DIFFER" };
        let share =
            |ms: f64| if self.total_ms > 0.0 { format!("{:.1} %", 100.0 * ms / self.total_ms) } else { "-".into() };
        // The guest runs at the target by then.
        let share = |phase: &Phase| if phase.phase == "release" { "after".to_owned() } else { share(phase.ms) };
        let summary = Text::fields([
            ("vm", format!("{} moved from {} to {}", self.vm, self.source, self.target)),
            ("total", show_ms(self.total_ms)),
            ("downtime", show_ms(self.downtime_ms)),
            ("sent", format!("{} for {} of RAM", show_bytes(self.bytes_sent), show_bytes(self.ram_bytes))),
            ("generation", self.generation.to_string()),
            ("source digest", self.source_digest.clone()),
            ("target digest", format!("{} ({agree})", self.target_digest)),
        ]);
        let phases = Text::Rows {
            columns: vec!["phase", "time", "share"],
            rows: self.phases.iter().map(|p| vec![p.phase.clone(), show_ms(p.ms), share(p)]).collect(),
            empty: "no phases were reported",
        };
        let round = |r: &Round| {
            let rate = if r.ms > 0.0 { r.bytes as f64 * 1000.0 / r.ms } else { 0.0 };
            vec![
                r.round.to_string(),
                r.pages.to_string(),
                r.zero_pages.to_string(),
                show_bytes(r.bytes),
                show_ms(r.ms),
                format!("{}/s", show_bytes(rate as u64)),
                format!("{}/s", show_bytes(r.dirty_rate)),
                format!("{} %", r.throttle_percent),
            ]
        };
        let rounds = Text::Rows {
            columns: vec!["round", "pages", "zero", "bytes", "time", "rate", "dirty rate", "throttle"],
            rows: self.rounds.iter().map(round).collect(),
            empty: "no rounds were reported",
        };
        Text::Parts(vec![summary, phases, rounds])
    }
}

/// What a dry run found.
#[derive(Debug, Serialize)]
pub struct Plan {
    /// The VM.
    pub vm: String,
    /// Where it would go.
    pub target: String,
    /// Always true: nothing was moved.
    pub dry_run: bool,
    /// What was found and would be done, a line each.
    pub findings: Vec<String>,
}

impl Report for Plan {
    fn text(&self) -> Text {
        let mut text = format!("{} could move to {}; nothing was moved", self.vm, self.target);
        for finding in &self.findings {
            text.push_str(&format!("\n  {}", finding.replace('\n', "\n  ")));
        }
        Text::Lines(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_become_a_policy_or_are_refused() {
        let found = policy(Duration::from_millis(30), Some(1 << 30), Verify::Full).unwrap();
        assert_eq!((found.downtime_ms_max, found.bandwidth_bytes_per_s, found.verify_full), (30, 1 << 30, true));
        assert!(policy(Duration::from_micros(900), None, Verify::Stream).is_err());
        assert!(policy(Duration::from_millis(30), Some(17), Verify::Stream).is_err());
    }

    #[test]
    fn the_promised_fields_are_there() {
        let report = v1::MigrationReport {
            rounds: vec![v1::RoundReport {
                round: 1,
                pages: 7,
                bytes: 9,
                ms: 2.0,
                dirty_rate: 3,
                zero_pages: 1,
                throttle_percent: 20,
            }],
            phases: ["stop", "release"].map(|phase| v1::PhaseReport { phase: phase.into(), ms: 1.5 }).to_vec(),
            total_ms: 12.0,
            source_digest: "aa".into(),
            target_digest: "aa".into(),
            generation: 2,
            ..Default::default()
        };
        let migration = Migration::new("op".into(), report);
        let json = serde_json::to_value(&migration).unwrap();
        for field in [
            "total_ms",
            "downtime_ms",
            "phases",
            "rounds",
            "bytes_sent",
            "ram_bytes",
            "source_digest",
            "target_digest",
            "generation",
        ] {
            assert!(json.get(field).is_some(), "{field}");
        }
        for field in ["pages", "bytes", "ms", "dirty_rate", "throttle_percent"] {
            assert!(json["rounds"][0].get(field).is_some(), "{field}");
        }
        let text = migration.text().render();
        assert!(text.contains("(agree)") && text.contains("20 %") && text.contains("12.5 %"), "{text}");
        assert!(text.contains("after"), "the release is no part of the total: {text}");
    }
}

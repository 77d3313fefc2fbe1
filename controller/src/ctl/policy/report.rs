//! What `ctl policy` and `ctl checkpoint prune` print. Fields may be added, never renamed.

use proto::v1;
use serde::Serialize;

use crate::ctl::output::{Report, Text};
use crate::ctl::report::{Row, dash, timestamp};
use crate::retention::policy::{keep, show_window, span, words};
use crate::retention::simulate::{Row as Look, Simulation};

/// A policy and how it goes.
#[derive(Debug, Serialize)]
pub struct Policy {
    vm: String,
    policy: String,
    every_ms: u64,
    jitter_ms: u64,
    windows: Vec<String>,
    zone: String,
    keep: Keep,
    age_ms: u64,
    next_ms: u64,
    state: String,
    outcome: String,
    failures: u32,
    missed: bool,
    checkpoints: u32,
    pinned: u32,
    removable: u32,
    newest: String,
    verify_every_ms: u64,
    drill_every_ms: u64,
    sampled: String,
    sampled_at: String,
    drilled: String,
    drilled_at: String,
}

#[derive(Debug, Serialize)]
struct Keep {
    last: u32,
    hourly: u32,
    daily: u32,
    weekly: u32,
    monthly: u32,
}

impl From<v1::PolicyRecord> for Policy {
    fn from(record: v1::PolicyRecord) -> Policy {
        let policy = record.policy.unwrap_or_default();
        let v1::CheckpointsKept { last, hourly, daily, weekly, monthly } = keep(&policy);
        Policy {
            vm: record.vm,
            policy: words(&policy),
            every_ms: policy.every_ms,
            jitter_ms: policy.jitter_ms,
            windows: policy.windows.iter().map(show_window).collect(),
            zone: if policy.zone.is_empty() { "UTC".into() } else { policy.zone },
            keep: Keep { last, hourly, daily, weekly, monthly },
            age_ms: record.age_ms,
            next_ms: record.next_ms,
            state: record.state,
            outcome: record.outcome,
            failures: record.failures,
            missed: record.missed,
            checkpoints: record.checkpoints,
            pinned: record.pinned,
            removable: record.removable,
            newest: record.newest,
            verify_every_ms: policy.verify_every_ms,
            drill_every_ms: policy.drill_every_ms,
            sampled: record.sampled,
            sampled_at: when(record.sampled_unix_ms),
            drilled: record.drilled,
            drilled_at: when(record.drilled_unix_ms),
        }
    }
}

/// Nothing for never.
fn when(unix_ms: u64) -> String {
    if unix_ms == 0 { String::new() } else { timestamp(unix_ms) }
}

impl Policy {
    fn age(&self) -> String {
        let age = if self.newest.is_empty() { "none yet".into() } else { span(self.age_ms / 1000 * 1000) };
        if self.missed { format!("{age} MISSED") } else { age }
    }

    /// All of it, on one line.
    pub fn line(&self) -> String {
        let missed = if self.missed { "; MISSED: the newest checkpoint is too old" } else { "" };
        format!("{}; {}; {} kept{missed}", self.policy, dash(&self.state), self.checkpoints)
    }
}

impl Row for Policy {
    const COLUMNS: &'static [&'static str] = &["vm", "policy", "age", "next", "last", "kept", "by hand"];
    const EMPTY: &'static str = "no policies; `ctl policy set VM --every 5m` makes one";
    fn cells(&self) -> Vec<String> {
        vec![
            self.vm.clone(),
            self.policy.clone(),
            self.age(),
            dash(&self.state),
            dash(&self.outcome),
            self.checkpoints.to_string(),
            self.pinned.to_string(),
        ]
    }
}

impl Report for Policy {
    fn text(&self) -> Text {
        Text::fields([
            ("vm", self.vm.clone()),
            ("policy", self.policy.clone()),
            ("spread", format!("up to {} early", span(self.jitter_ms))),
            ("age", self.age()),
            ("next", self.state.clone()),
            ("last", self.outcome.clone()),
            ("sampled", format!("{} {}", self.sampled_at, self.sampled).trim().to_owned()),
            ("drilled", format!("{} {}", self.drilled_at, self.drilled).trim().to_owned()),
            ("kept", format!("{} ({} by hand, {} to be removed)", self.checkpoints, self.pinned, self.removable)),
        ])
    }
}

/// What a pruning did, or would do.
#[derive(Debug, Serialize)]
pub struct Pruned {
    dry_run: bool,
    removed: u32,
    kept: u32,
    checkpoints: Vec<Decided>,
}

#[derive(Debug, Serialize)]
struct Decided {
    id: String,
    created: String,
    age_ms: u64,
    keep: bool,
    kept_by: Vec<String>,
}

impl Pruned {
    /// From the controller's answer.
    pub fn new(reply: v1::PruneReply, dry_run: bool) -> Pruned {
        let decided = |record: v1::CheckpointRecord| Decided {
            id: record.id,
            created: timestamp(record.created_unix_ms),
            age_ms: record.age_ms,
            keep: !record.kept_by.is_empty(),
            kept_by: record.kept_by,
        };
        let checkpoints: Vec<Decided> = reply.checkpoints.into_iter().map(decided).collect();
        let kept = checkpoints.iter().filter(|checkpoint| checkpoint.keep).count() as u32;
        let removed = if dry_run { checkpoints.len() as u32 - kept } else { reply.removed };
        Pruned { dry_run, removed, kept, checkpoints }
    }
}

impl Report for Pruned {
    fn text(&self) -> Text {
        let row = |checkpoint: &Decided| {
            let word = match (checkpoint.keep, self.dry_run) {
                (true, _) => checkpoint.kept_by.join(", "),
                (false, true) => "would be removed".into(),
                (false, false) => "removed".into(),
            };
            vec![checkpoint.id.clone(), checkpoint.created.clone(), span(checkpoint.age_ms), word]
        };
        let rows = Text::Rows {
            columns: vec!["checkpoint", "created", "age", "kept by"],
            rows: self.checkpoints.iter().map(row).collect(),
            empty: "no checkpoints",
        };
        let word = if self.dry_run { "would be removed" } else { "removed" };
        Text::Parts(vec![rows, Text::Lines(format!("{} kept, {} {word}", self.kept, self.removed))])
    }
}

/// A simulation.
#[derive(Debug, Serialize)]
pub struct Simulated {
    policy: String,
    rows: Vec<SimulatedRow>,
    made: u64,
    kept: usize,
    /// Ages at the end, newest first.
    ages_ms: Vec<u64>,
}

#[derive(Debug, Serialize)]
struct SimulatedRow {
    after_ms: u64,
    made: u64,
    kept: usize,
    last: usize,
    hourly: usize,
    daily: usize,
    weekly: usize,
    monthly: usize,
    newest_age_ms: u64,
    oldest_age_ms: u64,
}

impl Simulated {
    /// Of a simulation that ended at this wall time.
    pub fn new(policy: &v1::CheckpointPolicy, end: Simulation, end_unix_ms: u64) -> Simulated {
        let row = |look: &Look| {
            let [last, hourly, daily, weekly, monthly] = look.by_rule;
            let Look { after_ms, made, kept, newest_age_ms, oldest_age_ms, .. } = *look;
            SimulatedRow { after_ms, made, kept, last, hourly, daily, weekly, monthly, newest_age_ms, oldest_age_ms }
        };
        let ages_ms = end.kept.iter().rev().map(|(made, _)| end_unix_ms.saturating_sub(*made)).collect();
        Simulated {
            policy: words(policy),
            made: end.rows.last().map_or(0, |look| look.made),
            kept: end.kept.len(),
            rows: end.rows.iter().map(row).collect(),
            ages_ms,
        }
    }
}

impl Report for Simulated {
    fn text(&self) -> Text {
        let row = |row: &SimulatedRow| {
            let counts = [row.last, row.hourly, row.daily, row.weekly, row.monthly].map(|count| count.to_string());
            let mut cells = vec![span(row.after_ms), row.made.to_string(), row.kept.to_string()];
            cells.extend(counts);
            cells.extend([span(row.newest_age_ms), span(row.oldest_age_ms)]);
            cells
        };
        let table = Text::Rows {
            columns: vec!["after", "made", "kept", "last", "hourly", "daily", "weekly", "monthly", "newest", "oldest"],
            rows: self.rows.iter().map(row).collect(),
            empty: "nothing",
        };
        let shown: Vec<String> = self.ages_ms.iter().take(200).map(|age| span(*age)).collect();
        let more = self.ages_ms.len().saturating_sub(shown.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let ages = format!("{} of {} are kept, so old: {}{more}", self.kept, self.made, dash(&shown.join(" ")));
        Text::Parts(vec![Text::Lines(self.policy.clone()), table, Text::Lines(ages)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retention::policy::keep_words;
    use crate::retention::simulate::simulate;

    #[test]
    fn a_simulation_prints_counts_and_ages() {
        let kept = v1::CheckpointsKept { last: 2, daily: 2, ..Default::default() };
        let policy = v1::CheckpointPolicy { every_ms: 3_600_000, keep: Some(kept), ..Default::default() };
        assert_eq!(keep_words(&kept), "keep last 2, daily 2");
        let begin = 1_767_225_600_000;
        let end = simulate(&policy, vec![], begin, 3 * 86_400_000).unwrap();
        let shown = Simulated::new(&policy, end, begin + 3 * 86_400_000);
        let text = shown.text().render();
        assert!(
            text.contains("3 of 73 are kept, so old: 0s 1h 1h") || text.contains("2 of 73 are kept, so old: 0s 1h"),
            "{text}"
        );
        assert_eq!(serde_json::to_value(&shown).unwrap()["made"], 73);
    }
}

//! Which checkpoints are kept: a plan from a list, and nothing else.
//!
//! ```text
//!   last N      the N that were made last
//!   hourly N    the newest of each of the newest N hours that have any; daily, weekly (ISO), monthly alike
//! ```
//! A checkpoint is kept by every rule that names it; rules count on their own. Whatever the rules say, three kinds stay:
//! those made by hand, those that an operation holds, and the newest that is sound. Those made by hand and damaged ones
//! fill no place of a rule, and damaged ones are left to people. Order is the order in which checkpoints were *made*, by
//! the ledger; their wall-clock times only name the hour or day that they fall into, so that a clock that is put back
//! does not make the newest checkpoint look old.
//!
//! This room knows no clock, no ledger and no bucket; `schedule` executes what is planned here.

pub mod period;
pub mod policy;
pub mod simulate;
#[cfg(test)]
mod tests;

use std::collections::HashSet;

use proto::v1::CheckpointsKept;

use self::period::{Periods, Zone};

/// A checkpoint, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its id.
    pub id: String,
    /// When it was made, on the wall clock of then.
    pub unix_ms: u64,
    /// Made by hand.
    pub pinned: bool,
    /// An operation needs it.
    pub held: bool,
    /// Not found damaged.
    pub sound: bool,
}

/// Why a checkpoint is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Among the last N.
    Last,
    /// Newest of one of the last N hours that have any.
    Hourly,
    /// Newest of a day.
    Daily,
    /// Newest of an ISO week.
    Weekly,
    /// Newest of a month.
    Monthly,
    /// The newest sound one is never removed.
    Newest,
    /// Made by hand: only an operator removes it.
    ByHand,
    /// An operation needs it.
    Held,
    /// Damaged ones are left to people.
    Damaged,
    /// No rule removes anything.
    NoRule,
}

impl Reason {
    /// The word for people and programs.
    pub fn word(self) -> &'static str {
        match self {
            Reason::Last => "last",
            Reason::Hourly => "hourly",
            Reason::Daily => "daily",
            Reason::Weekly => "weekly",
            Reason::Monthly => "monthly",
            Reason::Newest => "newest",
            Reason::ByHand => "by hand",
            Reason::Held => "in use",
            Reason::Damaged => "damaged",
            Reason::NoRule => "no rule",
        }
    }
}

/// What is to become of one checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Its id.
    pub id: String,
    /// Why it is kept; `None`: it is to be removed.
    pub keep: Option<Vec<Reason>>,
}

/// Whether no rule is given: everything is kept then.
pub fn keeps_all(keep: &CheckpointsKept) -> bool {
    *keep == CheckpointsKept::default()
}

/// Decides about checkpoints that are given in the order in which they were made, oldest first.
pub fn plan(checkpoints: &[Item], keep: &CheckpointsKept, zone: &Zone) -> Vec<Decision> {
    let all = keeps_all(keep);
    let periods: Vec<Periods> =
        checkpoints.iter().map(|item| if all { Periods::default() } else { zone.periods(item.unix_ms) }).collect();
    let marks = marks(checkpoints, &periods, keep);
    let decide = |(item, marks): (&Item, Vec<Reason>)| {
        let keep = (!marks.is_empty()).then_some(marks);
        Decision { id: item.id.clone(), keep }
    };
    checkpoints.iter().zip(marks).map(decide).collect()
}

/// Which of an instant's periods a rule counts.
type PeriodOf = fn(&Periods) -> i64;

/// The reasons of each checkpoint, whose periods are known already.
fn marks(checkpoints: &[Item], periods: &[Periods], keep: &CheckpointsKept) -> Vec<Vec<Reason>> {
    let mut marks = vec![Vec::new(); checkpoints.len()];
    let counts = |item: &Item| item.sound && !item.pinned;
    let countable: Vec<usize> = (0..checkpoints.len()).rev().filter(|&at| counts(&checkpoints[at])).collect();
    for &at in countable.iter().take(keep.last as usize) {
        marks[at].push(Reason::Last);
    }
    let rules: [(Reason, u32, PeriodOf); 4] = [
        (Reason::Hourly, keep.hourly, |periods| periods.hour),
        (Reason::Daily, keep.daily, |periods| periods.day),
        (Reason::Weekly, keep.weekly, |periods| periods.week),
        (Reason::Monthly, keep.monthly, |periods| periods.month),
    ];
    for (reason, count, period) in rules {
        let mut seen = HashSet::new();
        for &at in &countable {
            if seen.len() >= count as usize {
                break;
            }
            if seen.insert(period(&periods[at])) {
                marks[at].push(reason);
            }
        }
    }
    if let Some(newest) = checkpoints.iter().rposition(|item| item.sound) {
        marks[newest].push(Reason::Newest);
    }
    let all = keeps_all(keep);
    for (item, marks) in checkpoints.iter().zip(&mut marks) {
        let more = [
            (item.pinned, Reason::ByHand),
            (item.held, Reason::Held),
            (!item.sound, Reason::Damaged),
            (all, Reason::NoRule),
        ];
        marks.extend(more.into_iter().filter(|(holds, _)| *holds).map(|(_, reason)| reason));
    }
    marks
}

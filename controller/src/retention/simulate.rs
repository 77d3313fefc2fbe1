//! What a policy would keep over time: checkpoints made as it says, and pruned as it says, on a clock that is only a number.
//!
//! Pruning early and pruning late keep the same (`tests.rs` proves it), so that here it is done only when the list has
//! grown, and at the rows that are shown.

use proto::v1::CheckpointPolicy;

use super::period::Periods;
use super::{Item, Reason, keeps_all, marks, policy};

/// Most checkpoints that are simulated.
pub const MADE_MAX: u64 = 4_000_000;
/// The list may grow to this before it is pruned.
const LIST_MIN: usize = 256;
/// Times at which is looked, hours after the beginning.
const ROWS_HOURS: [u64; 16] = [1, 3, 6, 12, 24, 48, 72, 168, 336, 720, 1440, 2160, 4320, 8760, 17_520, 26_280];

/// What is kept at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Since the beginning.
    pub after_ms: u64,
    /// Made until then.
    pub made: u64,
    /// Kept of them.
    pub kept: usize,
    /// Kept by each rule: last, hourly, daily, weekly, monthly.
    pub by_rule: [usize; 5],
    /// Age of the newest and of the oldest.
    pub newest_age_ms: u64,
    /// Age of the oldest.
    pub oldest_age_ms: u64,
}

/// The end of a simulation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Simulation {
    /// Over time; the last row is the end.
    pub rows: Vec<Row>,
    /// What is there at the end, oldest first: when it was made, and why it is kept.
    pub kept: Vec<(u64, Vec<Reason>)>,
}

/// Too many checkpoints to simulate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} checkpoints are too many to simulate; {MADE_MAX} are the most: simulate a shorter time")]
pub struct TooMany(pub u64);

/// Makes and prunes checkpoints for so long, beginning with those that are there.
///
/// # Errors
/// [`TooMany`].
pub fn simulate(
    checkpoint: &CheckpointPolicy,
    there: Vec<Item>,
    begin_unix_ms: u64,
    for_ms: u64,
) -> Result<Simulation, TooMany> {
    let made_most = for_ms / checkpoint.every_ms.max(1);
    if made_most > MADE_MAX {
        return Err(TooMany(made_most));
    }
    let mut world = World { zone: policy::zone(checkpoint), keep: policy::keep(checkpoint), items: vec![], made: 0 };
    there.into_iter().for_each(|item| world.add(item));
    let mut looks: Vec<u64> =
        ROWS_HOURS.iter().map(|hours| hours * 3_600_000).filter(|after| *after < for_ms).collect();
    looks.push(for_ms);
    let (mut at, mut rows) = (begin_unix_ms, Vec::new());
    for after_ms in looks {
        let until = begin_unix_ms.saturating_add(after_ms);
        loop {
            let next = world.zone.next_open(&checkpoint.windows, i64::try_from(at).unwrap_or(i64::MAX));
            at = u64::try_from(next).unwrap_or(0);
            if at > until {
                break;
            }
            world.made += 1;
            let id = world.made.to_string();
            world.add(Item { id, unix_ms: at, pinned: false, held: false, sound: true });
            at = at.saturating_add(checkpoint.every_ms);
        }
        rows.push(world.row(after_ms, until));
    }
    let marks = world.prune();
    Ok(Simulation { rows, kept: world.items.iter().map(|(item, _)| item.unix_ms).zip(marks).collect() })
}

struct World {
    zone: super::period::Zone,
    keep: proto::v1::CheckpointsKept,
    items: Vec<(Item, Periods)>,
    made: u64,
}

impl World {
    fn add(&mut self, item: Item) {
        let periods = self.zone.periods(item.unix_ms);
        self.items.push((item, periods));
        let keep = [self.keep.last, self.keep.hourly, self.keep.daily, self.keep.weekly, self.keep.monthly];
        let most: usize = keep.iter().map(|count| *count as usize).sum();
        if !keeps_all(&self.keep) && self.items.len() > LIST_MIN + 2 * most {
            self.prune();
        }
    }

    /// The reasons of what is left.
    fn prune(&mut self) -> Vec<Vec<Reason>> {
        let (items, periods): (Vec<Item>, Vec<Periods>) = std::mem::take(&mut self.items).into_iter().unzip();
        let marks = marks(&items, &periods, &self.keep);
        let left = items.into_iter().zip(periods).zip(marks).filter(|(_, reasons)| !reasons.is_empty());
        let (items, reasons) = left.unzip();
        self.items = items;
        reasons
    }

    fn row(&mut self, after_ms: u64, now: u64) -> Row {
        let reasons = self.prune();
        let rules = [Reason::Last, Reason::Hourly, Reason::Daily, Reason::Weekly, Reason::Monthly];
        let by_rule = rules.map(|rule| reasons.iter().filter(|reasons| reasons.contains(&rule)).count());
        let age = |item: Option<&(Item, Periods)>| item.map_or(0, |(item, _)| now.saturating_sub(item.unix_ms));
        Row {
            after_ms,
            made: self.made,
            kept: self.items.len(),
            by_rule,
            newest_age_ms: age(self.items.last()),
            oldest_age_ms: age(self.items.first()),
        }
    }
}

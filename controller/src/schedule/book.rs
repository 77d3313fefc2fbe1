//! The schedule's book: what it remembers of each VM between two looks, and what it decides at each. Pure.
//!
//! ```text
//!   look:  facts, busy hosts, now  ->  Begin | BackOff | Missed | Recovered | Prune, and a status for people
//! ```
//! It remembers only when things happened on the monotonic clock. A book that is new (the controller was restarted) puts
//! the ledger's wall-clock times there once and goes on.

use std::collections::BTreeMap;

use super::due::{History, Now, back_off, missed_at, next_due};
use super::facts::{Attempt, Facts, Stands};
use crate::retention::policy;
use crate::saga::gate::Limits;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin a checkpoint.
    Begin {
        /// Of this VM.
        vm: String,
    },
    /// Count a failure.
    BackOff {
        /// Of this VM.
        vm: String,
        /// The operation that failed.
        operation: String,
        /// This one among them.
        failures: u32,
        /// Until the next attempt, milliseconds.
        wait_ms: u64,
        /// Why.
        reason: String,
    },
    /// Say that the newest checkpoint is too old.
    Missed {
        /// Of this VM.
        vm: String,
        /// Its age.
        age_ms: u64,
    },
    /// Say that it is young enough again.
    Recovered {
        /// Of this VM.
        vm: String,
        /// Its age.
        age_ms: u64,
    },
    /// Remove what the policy does not keep.
    Prune {
        /// Of this VM.
        vm: String,
    },
}

/// How a VM stands, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Age of the newest checkpoint, or since the policy was set.
    pub age_ms: u64,
    /// Until the next one is due; 0: now.
    pub next_ms: u64,
    /// What it waits for.
    pub word: String,
}

#[derive(Debug)]
struct Memory {
    newest: Option<(String, u64)>,
    history: History,
    set_unix_ms: u64,
    failures: u32,
    /// It stood still until then, when it was no miss.
    still_until: Option<i64>,
    /// Newest checkpoint when it was pruned.
    pruned: Option<String>,
}

/// All that is remembered.
#[derive(Debug, Default)]
pub struct Book {
    pages: BTreeMap<String, Memory>,
    standings: BTreeMap<String, Standing>,
}

impl Memory {
    fn new(facts: &Facts, now: Now) -> Memory {
        Memory {
            newest: None,
            history: History { made: None, since: now.mono_of(facts.set_unix_ms), failed: None },
            set_unix_ms: facts.set_unix_ms,
            failures: 0,
            still_until: None,
            pruned: None,
        }
    }

    /// Takes over what is new.
    fn update(&mut self, facts: &Facts, now: Now, first: bool) {
        let newest = facts.newest.as_ref().map(|newest| (newest.id.clone(), newest.sequence));
        if newest != self.newest || first {
            self.history.made = facts.newest.as_ref().map(|found| {
                // One that came while we looked on was made now, whatever the wall clock says.
                let seen = !first && self.newest.as_ref().is_none_or(|(_, before)| found.sequence > *before);
                (found.id.clone(), if seen { now.mono_ms } else { now.mono_of(found.unix_ms) })
            });
            self.newest = newest;
        }
        if facts.failures != self.failures || first {
            let at = if first { now.mono_of(facts.failed_unix_ms) } else { now.mono_ms };
            self.history.failed = (facts.failures > 0).then_some((facts.failures, at));
            self.failures = facts.failures;
        }
        if matches!(facts.stands, Stands::Still(_)) {
            self.still_until = Some(now.mono_ms);
        }
    }

    fn age_ms(&self, now: Now) -> u64 {
        let last = self.history.made.as_ref().map_or(self.history.since, |(_, made)| *made);
        u64::try_from(now.mono_ms.saturating_sub(last)).unwrap_or(0)
    }
}

impl Book {
    /// How a VM stood at the last look.
    pub fn standing(&self, vm: &str) -> Option<&Standing> {
        self.standings.get(vm)
    }

    /// Looks at everything and decides. Beginning checkpoints takes the longest overdue first, as far as places reach.
    pub fn look(&mut self, facts: &[Facts], busy: &BTreeMap<String, usize>, limits: Limits, now: Now) -> Vec<Action> {
        self.pages.retain(|vm, memory| {
            // Set anew after it was removed: another policy.
            facts.iter().any(|facts| facts.vm == *vm && facts.set_unix_ms == memory.set_unix_ms)
        });
        let (mut actions, mut ready, mut standings) = (Vec::new(), Vec::new(), BTreeMap::new());
        for facts in facts {
            let first = !self.pages.contains_key(&facts.vm);
            let memory = self.pages.entry(facts.vm.clone()).or_insert_with(|| Memory::new(facts, now));
            memory.update(facts, now, first);
            actions.extend(memory.events(facts, now));
            let due = next_due(&facts.policy, &facts.vm_id, &memory.history, now);
            let standing = memory.standing(facts, due, now);
            if standing.word.is_empty() {
                ready.push((memory.overdue_since(facts), facts));
            }
            standings.insert(facts.vm.clone(), standing);
        }
        ready.sort_by(|(a, one), (b, other)| (a, &one.vm).cmp(&(b, &other.vm)));
        let mut busy = busy.clone();
        for (_, facts) in ready {
            let word = match limits.full(&busy, &facts.host) {
                Some(why) => why,
                None => {
                    *busy.entry(facts.host.clone()).or_default() += 1;
                    actions.push(Action::Begin { vm: facts.vm.clone() });
                    "taking".into()
                }
            };
            if let Some(standing) = standings.get_mut(&facts.vm) {
                standing.word = word;
            }
        }
        self.standings = standings;
        actions
    }
}

impl Memory {
    /// What is to be said and cleaned, apart from checkpoints.
    fn events(&mut self, facts: &Facts, now: Now) -> Vec<Action> {
        let (vm, age_ms) = (facts.vm.clone(), self.age_ms(now));
        let mut actions = Vec::new();
        if let Attempt::Failed { operation, reason } = &facts.attempt {
            let failures = facts.failures.saturating_add(1);
            actions.push(Action::BackOff {
                vm: vm.clone(),
                operation: operation.clone(),
                failures,
                wait_ms: back_off(&facts.policy, failures).unsigned_abs(),
                reason: reason.clone(),
            });
        }
        let limit = missed_at(&facts.policy, &self.history, now);
        // A guest that stood still gets as long as one whose newest checkpoint was made when it went on.
        let allowance = i64::try_from(facts.policy.every_ms).unwrap_or(i64::MAX).saturating_mul(2);
        let limit = self.still_until.map_or(limit, |until| limit.max(until.saturating_add(allowance)));
        let late = now.mono_ms > limit;
        if late && !facts.missed {
            actions.push(Action::Missed { vm: vm.clone(), age_ms });
        }
        if facts.missed && now.mono_ms <= missed_at(&facts.policy, &self.history, now) {
            actions.push(Action::Recovered { vm: vm.clone(), age_ms });
        }
        let newest = self.newest.as_ref().map(|(id, _)| id.clone());
        if newest.is_some() && newest != self.pruned && facts.attempt != Attempt::UnderWay {
            self.pruned = newest;
            actions.push(Action::Prune { vm });
        }
        actions
    }

    /// Without a word: it is due and nothing is in the way.
    fn standing(&self, facts: &Facts, due: i64, now: Now) -> Standing {
        let next_ms = u64::try_from(due.saturating_sub(now.mono_ms)).unwrap_or(0);
        let word = match (&facts.attempt, &facts.stands) {
            (Attempt::UnderWay, _) => "taking".into(),
            (_, Stands::Still(word)) => (*word).into(),
            (_, Stands::Blocked(why)) if next_ms == 0 => why.clone(),
            // The next look counts the failure and waits for it.
            (Attempt::Failed { .. }, _) => "failed".into(),
            _ if next_ms == 0 => String::new(),
            _ => format!("due in {}", policy::span(next_ms.max(1000) / 1000 * 1000)),
        };
        Standing { age_ms: self.age_ms(now), next_ms, word }
    }

    /// For the order among those that are due.
    fn overdue_since(&self, facts: &Facts) -> i64 {
        let last = self.history.made.as_ref().map_or(self.history.since, |(_, made)| *made);
        last.saturating_add(i64::try_from(facts.policy.every_ms).unwrap_or(i64::MAX))
    }
}

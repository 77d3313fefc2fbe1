//! Policies and what they keep: how they are set, shown and executed for operators.

use proto::status::Code;
use proto::v1::{
    self, CheckpointRecord, PolicyRecord, PruneReply, PruneRequest, SetPolicyRequest, SweepReply, SweepRequest,
};

use super::Api;
use super::plans::unknown_vm;
use crate::failure::Failure;
use crate::ledger::event::{CheckpointEntry, Event};
use crate::ledger::policy::Scheduled;
use crate::ledger::state::State;
use crate::retention::{Decision, policy};
use crate::saga::report::record;
use crate::schedule::book::Standing;
use crate::schedule::decide;
use crate::schedule::sweeping::{SweptVm, swept_ids};
use crate::sweep::Swept;
use crate::tls::Identity;

fn no_policy(vm: &str) -> Failure {
    Failure::new(Code::NotFound, format!("{vm} has no policy")).hint(format!("`ctl policy set {vm} --every 5m`"))
}

fn decided(entry: &CheckpointEntry, decision: &Decision) -> CheckpointRecord {
    let reasons = decision.keep.iter().flatten();
    CheckpointRecord { kept_by: reasons.map(|reason| reason.word().to_owned()).collect(), ..record(entry) }
}

/// Checkpoints of one VM, or of all, oldest first, with what keeps them. Those of a VM that is gone are kept by no rule.
pub(super) fn checkpoints(state: &State, vm: &str) -> Vec<CheckpointRecord> {
    let wanted = state.checkpoints.values().filter(|entry| vm.is_empty() || entry.vm == vm);
    let ids: std::collections::BTreeSet<&str> = wanted.map(|entry| entry.vm_id.as_str()).collect();
    let mut found = Vec::new();
    for vm_id in ids {
        let name = state.vms.values().find(|there| there.id == vm_id).map_or("", |there| there.name.as_str());
        let decisions = decide(state, name, vm_id);
        let wanted = decisions.iter().filter(|(entry, _)| vm.is_empty() || entry.vm == vm);
        found.extend(wanted.map(|(entry, decision)| (entry.sequence, decided(entry, decision))));
    }
    found.sort_by_key(|(sequence, checkpoint)| (*sequence, checkpoint.created_unix_ms));
    found.into_iter().map(|(_, checkpoint)| checkpoint).collect()
}

/// One checkpoint, with what keeps it.
pub(super) fn checkpoint(state: &State, id: &str) -> Option<CheckpointRecord> {
    let entry = state.checkpoints.get(id)?;
    let vm = state.vms.values().find(|there| there.id == entry.vm_id).map_or("", |there| there.name.as_str());
    let mut decisions = decide(state, vm, &entry.vm_id).into_iter();
    let (found, decision) = decisions.find(|(found, _)| found.id == id)?;
    let told = |(key, why): (&String, &String)| {
        let others: Vec<&str> = state.hurt_by(key).iter().map(|c| c.id.as_str()).filter(|other| *other != id).collect();
        if others.is_empty() { why.clone() } else { format!("{why}; {} too", others.join(", ")) }
    };
    Some(CheckpointRecord { damaged: state.damage_of(entry).map(told).collect(), ..decided(&found, &decision) })
}

fn swept_vm(swept: SweptVm) -> v1::SweptVm {
    let named = v1::SweptVm { vm: swept.vm, vm_id: swept.vm_id, ..v1::SweptVm::default() };
    match swept.result {
        Ok(Swept { packs, bytes, removed, removed_bytes, left, repacked, written_bytes, note, .. }) => {
            v1::SweptVm { packs, bytes, removed, removed_bytes, left, repacked, written_bytes, note, ..named }
        }
        Err(failure) => v1::SweptVm { note: failure.message, code: failure.code as u32, ..named },
    }
}

fn policy_record(state: &State, vm: &str, scheduled: &Scheduled, standing: Standing) -> PolicyRecord {
    let vm_id = state.vms.get(vm).map(|found| found.id.clone()).unwrap_or_default();
    let decisions = decide(state, vm, &vm_id);
    let count = |wanted: &dyn Fn(&CheckpointEntry, &Decision) -> bool| {
        decisions.iter().filter(|(entry, decision)| wanted(entry, decision)).count() as u32
    };
    let newest = state.newest_checkpoint(&vm_id).map(|entry| entry.id.clone()).unwrap_or_default();
    let under_way = state.operations.get(&scheduled.attempt).is_some_and(|operation| !operation.status.ended());
    let outcome = match () {
        () if under_way => "under way".to_owned(),
        () if scheduled.failures > 0 => format!("failed: {}", scheduled.failure),
        () if newest.is_empty() => String::new(),
        () => "done".to_owned(),
    };
    PolicyRecord {
        vm: vm.into(),
        policy: Some(scheduled.policy.as_ref().clone()),
        age_ms: standing.age_ms,
        next_ms: standing.next_ms,
        state: standing.word,
        outcome,
        failures: scheduled.failures,
        missed: scheduled.missed,
        checkpoints: decisions.len() as u32,
        pinned: count(&|entry, _| !entry.by_policy),
        removable: count(&|_, decision| decision.keep.is_none()),
        newest,
        sampled: scheduled.sampled.clone(),
        sampled_unix_ms: scheduled.sampled_unix_ms,
        drilled: scheduled.drilled.clone(),
        drilled_unix_ms: scheduled.drilled_unix_ms,
    }
}

impl Api {
    /// The policy of a VM and how it goes, if it has one.
    pub(super) fn policy(&self, vm: &str) -> Option<PolicyRecord> {
        let state = self.ledger.state();
        let scheduled = state.policies.get(vm)?;
        Some(policy_record(&state, vm, scheduled, self.schedule.standing(vm).unwrap_or_default()))
    }

    pub(super) fn policies(&self, vm: &str) -> Result<Vec<PolicyRecord>, Failure> {
        let state = self.ledger.state();
        if !vm.is_empty() && !state.vms.contains_key(vm) {
            return Err(unknown_vm(vm));
        }
        let wanted = state.policies.keys().filter(|name| vm.is_empty() || *name == vm);
        Ok(wanted.filter_map(|name| self.policy(name)).collect())
    }

    pub(super) async fn set(&self, operator: &Identity, asked: SetPolicyRequest) -> Result<PolicyRecord, Failure> {
        let SetPolicyRequest { vm, policy } = asked;
        let policy = policy.unwrap_or_default();
        policy::check(&policy)?;
        if !self.ledger.state().vms.contains_key(&vm) {
            return Err(unknown_vm(&vm));
        }
        self.ledger.append(&operator.to_string(), Event::PolicySet { vm: vm.clone(), policy }).await?;
        self.policy(&vm).ok_or_else(|| unknown_vm(&vm))
    }

    pub(super) async fn unset(&self, operator: &Identity, vm: String) -> Result<(), Failure> {
        let state = self.ledger.state();
        if !state.vms.contains_key(&vm) {
            return Err(unknown_vm(&vm));
        }
        if !state.policies.contains_key(&vm) {
            return Err(no_policy(&vm));
        }
        Ok(self.ledger.append(&operator.to_string(), Event::PolicyRemoved { vm }).await.map(drop)?)
    }

    pub(super) async fn sweep(&self, operator: &Identity, asked: SweepRequest) -> Result<SweepReply, Failure> {
        if !asked.vm.is_empty() && swept_ids(&self.ledger.state(), &asked.vm).is_empty() {
            return Err(unknown_vm(&asked.vm));
        }
        let swept = self.schedule.sweep(&operator.to_string(), &asked.vm, asked.dry_run).await;
        Ok(SweepReply { vms: swept.into_iter().map(swept_vm).collect() })
    }

    pub(super) async fn prune(&self, operator: &Identity, asked: PruneRequest) -> Result<PruneReply, Failure> {
        let state = self.ledger.state();
        let vm = state.vms.get(&asked.vm).ok_or_else(|| unknown_vm(&asked.vm))?;
        if !state.policies.contains_key(&asked.vm) {
            return Err(no_policy(&asked.vm));
        }
        let decisions = decide(&state, &vm.name, &vm.id);
        let checkpoints = decisions.iter().map(|(entry, decision)| decided(entry, decision)).collect();
        let removed = match asked.dry_run {
            true => 0,
            false => self.schedule.prune(&operator.to_string(), &asked.vm).await?,
        };
        Ok(PruneReply { checkpoints, removed })
    }
}

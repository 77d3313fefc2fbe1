//! How what is true and what was observed are shown. Pure.

use proto::capability::CapabilitySet;
use proto::v1::{LazyInfo, LedgerEvent, VmInfo, VmRecord, VmState};

use crate::agents::Agents;
use crate::agents::lease::HostState;
use crate::ledger::event::{Event, Outcome, Record, shape};
use crate::ledger::state::{State, Vm};
use crate::ledger::{Ledger, unix_ms};
use crate::retention::policy;

/// A VM by name, as it is now.
pub fn show(ledger: &Ledger, agents: &Agents, name: &str) -> Option<VmRecord> {
    let state = ledger.state();
    let vm = state.vms.get(name)?;
    Some(vm_record(&state, vm, agents.host_state(&vm.host), agents.observed(&vm.host, name)))
}

/// A VM with what its host says of it.
pub fn vm_record(state: &State, vm: &Vm, host: HostState, observed: Option<VmInfo>) -> VmRecord {
    let observed = observed.filter(|info| info.generation == vm.generation);
    let word = match (host, &observed) {
        (HostState::Silent | HostState::Lost, _) => format!("unknown ({} is {})", vm.host, host.word()),
        (HostState::Up, Some(info)) => state_word(info.state()).to_owned(),
        (HostState::Up, None) if vm.creating => "starting".to_owned(),
        (HostState::Up, None) => format!("missing ({} does not have it)", vm.host),
    };
    let info = observed.unwrap_or_default();
    VmRecord {
        name: vm.name.clone(),
        id: vm.id.clone(),
        host: vm.host.clone(),
        generation: vm.generation,
        intent: vm.intent.word().into(),
        observed: word,
        reason: info.reason,
        config: Some(vm.config.clone()),
        operation: state.operation_of(&vm.name).map(|operation| operation.id.clone()).unwrap_or_default(),
        created_unix_ms: vm.created_unix_ms,
        last_checkpoint: vm.last_checkpoint.clone(),
        retired_instructions: info.retired_instructions,
        resident_bytes: info.resident_bytes,
        on_isolation: vm.on_isolation,
        capabilities: vm.capabilities.clone(),
        policy: None,
        lazy: info.lazy.or_else(|| unheard(vm)),
        checkpoint_age_ms: state
            .newest_checkpoint(&vm.id)
            .map_or(0, |entry| unix_ms().saturating_sub(entry.created_unix_ms)),
    }
}

/// What is known of a VM's missing pages if its host says nothing.
fn unheard(vm: &Vm) -> Option<LazyInfo> {
    let pages = vm.config.memory_bytes / 4096;
    let known = LazyInfo { checkpoint: vm.pages_from.clone(), pages, pages_missing: pages, ..LazyInfo::default() };
    (!vm.pages_from.is_empty()).then_some(known)
}

/// What a host says that a VM does, in a word.
pub fn state_word(state: VmState) -> &'static str {
    match state {
        VmState::Unspecified => "unknown",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Incoming => "incoming",
        VmState::Stopped => "stopped",
        VmState::Crashed => "crashed",
        VmState::HandedOver => "handed over",
    }
}

/// A record for people.
pub fn event(record: &Record) -> LedgerEvent {
    let task = &record.task;
    let (kind, operation, text) = match &record.event {
        Event::LeaseSet { lease_ms } => ("controller.started".into(), "", format!("leases of {lease_ms} ms")),
        Event::ClusterNamed { cluster } => ("cluster.named".into(), "", format!("cluster {cluster}")),
        Event::HostSeen { host, address } => ("host.seen".into(), "", format!("{host} at {address}")),
        Event::ContractFrozen { capabilities, .. } => {
            let contract = CapabilitySet::from_bytes(capabilities).unwrap_or_default();
            ("vm.contract".into(), "", format!("{} needs what a {} has", record.vm, contract.model))
        }
        Event::CheckpointFound { entry } => {
            ("checkpoint.found".into(), "", format!("checkpoint {} of {} lies in the bucket", entry.id, entry.vm))
        }
        Event::GenerationSeen { vm, generation } => {
            ("vm.generation".into(), "", format!("generation {generation} of {vm} lies in the bucket"))
        }
        Event::ObjectsDamaged { objects, checkpoints, .. } => {
            let whys: Vec<&str> = objects.values().map(String::as_str).take(3).collect();
            let more = if objects.len() > 3 { format!("; {} more", objects.len() - 3) } else { String::new() };
            let text = format!("{}{more}; this damages {}", whys.join("; "), checkpoints.join(", "));
            ("checkpoint.damaged".into(), "", text)
        }
        Event::OperationBegan { operation, plan } => {
            let to = plan.task.new_host().map(|host| format!(" to {host}")).unwrap_or_default();
            (format!("{task}.began"), operation.as_str(), format!("{task} {}{to}", plan.vm))
        }
        Event::StepDone { operation, step } => {
            (format!("{task}.step"), operation.as_str(), format!("{} is done", step_name(task, *step)))
        }
        Event::StepFailed { operation, failure, .. } => {
            (format!("{task}.failed"), operation.as_str(), failure.message.clone())
        }
        Event::Committed { operation, result } => {
            let text = match &**result {
                Outcome::AsPlanned => format!("{task} of {} is committed", record.vm),
                Outcome::Checkpoint(entry) => format!("checkpoint {} of {} bytes", entry.id, entry.stored_bytes),
                Outcome::Verified(verdict) => verdict.clone(),
                Outcome::Sampled { packs, bytes, damaged } => {
                    format!("{packs} packs of {bytes} bytes were hashed again, {damaged} are damaged")
                }
                Outcome::Swept(swept) => swept.words(),
            };
            (committed(task).into(), operation.as_str(), text)
        }
        Event::Cancelled { operation } => (format!("{task}.cancelled"), operation.as_str(), "cancelled".into()),
        Event::Interrupted { operation } => {
            (format!("{task}.interrupted"), operation.as_str(), "the controller was restarted".into())
        }
        Event::StepUndone { operation, step } => {
            (format!("{task}.undone"), operation.as_str(), format!("{} is taken back", step_name(task, *step)))
        }
        Event::GaveUp { operation, failure, .. } => {
            (format!("{task}.left"), operation.as_str(), failure.message.clone())
        }
        Event::PagesArrived { vm, generation } => {
            ("vm.pages-arrived".into(), "", format!("all pages of {vm} (generation {generation}) have come"))
        }
        Event::RecordingBegan { vm, recording, .. } => {
            ("recording.began".into(), "", format!("recording {recording} of {vm} begins"))
        }
        Event::RecordingEnded { vm, recording, why } => {
            ("recording.ended".into(), "", format!("recording {recording} of {vm} ended: {why}"))
        }
        Event::RecordingFound { entry } => {
            ("recording.found".into(), "", format!("recording {} of {} lies in the bucket", entry.id, entry.vm))
        }
        Event::RecordingRemoved { vm, recording } => {
            ("recording.removed".into(), "", format!("recording {recording} of {vm} is removed"))
        }
        Event::PolicySet { policy, .. } => ("policy.set".into(), "", policy::words(policy)),
        Event::PolicyRemoved { vm } => ("policy.removed".into(), "", format!("no checkpoints of {vm} by the clock")),
        Event::PolicyMissed { vm, age_ms } => {
            ("policy.missed".into(), "", format!("the newest checkpoint of {vm} is {} old", policy::span(*age_ms)))
        }
        Event::PolicyRecovered { vm, age_ms } => {
            ("policy.recovered".into(), "", format!("the newest checkpoint of {vm} is {} old", policy::span(*age_ms)))
        }
        Event::Drilled { checkpoint, alive, words, .. } => {
            let kind = if *alive { "checkpoint.drilled" } else { "checkpoint.drill-failed" };
            (kind.into(), "", format!("{checkpoint}: {words}"))
        }
        Event::PolicyBackedOff { operation, failures, wait_ms, reason, .. } => {
            let text = format!("failed {failures} in a row, waits {}: {reason}", policy::span(*wait_ms));
            ("policy.backed-off".into(), operation.as_str(), text)
        }
    };
    LedgerEvent {
        sequence: record.sequence,
        unix_ms: record.unix_ms,
        kind,
        vm: record.vm.clone(),
        operation: operation.into(),
        actor: record.actor.clone(),
        text,
    }
}

fn step_name(task: &str, step: usize) -> &'static str {
    shape(task).and_then(|shape| shape.steps.get(step).copied()).unwrap_or("a step")
}

/// What the commit of a task is called.
fn committed(task: &str) -> &'static str {
    match task {
        "create" => "vm.created",
        "pause" => "vm.paused",
        "resume" => "vm.resumed",
        "stop" => "vm.stopped",
        "remove" => "vm.removed",
        "migrate" => "migration.committed",
        "checkpoint" => "checkpoint.created",
        "restore" => "restore.committed",
        "verify" => "checkpoint.verified",
        "remove-checkpoint" => "checkpoint.removed",
        "sweep" => "checkpoint.swept",
        "sample" => "checkpoint.sampled",
        _ => "operation.committed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::running_vm;

    #[test]
    fn a_silent_host_says_nothing_about_its_vms() {
        let state = running_vm("hostA");
        let vm = &state.vms["vm1"];
        let info = VmInfo { generation: 1, state: VmState::Running.into(), ..VmInfo::default() };
        let word = |host, info| vm_record(&state, vm, host, info).observed;
        assert_eq!(word(HostState::Up, Some(info.clone())), "running");
        assert_eq!(word(HostState::Silent, Some(info.clone())), "unknown (hostA is silent)");
        let older = VmInfo { generation: 0, ..info };
        assert_eq!(word(HostState::Up, Some(older)), "missing (hostA does not have it)");
    }
}

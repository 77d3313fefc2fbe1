//! The last word of an operation: done with what it made, or failed with where the guest is now. Pure but for metrics.

use std::time::Duration;

use proto::ids::Digest;
use proto::status::Code;
use proto::v1::operation_event::Event;
use proto::v1::transfer_event::Event as Said;
use proto::v1::{
    CheckpointRecord, MigrationReport, OperationDone, OperationFailed, RestoreReport, TransferEvent, VmRecord,
};

use super::steps::Memory;
use super::table::Status;
use crate::failure::Failure;
use crate::ledger::event::{CheckpointEntry, Outcome, Task};
use crate::ledger::state::{Operation, State};
use crate::ledger::unix_ms;

/// The last event of an operation that has ended.
pub fn last_word(
    state: &State,
    operation: &Operation,
    memory: &Memory,
    transfers: &[TransferEvent],
    vm: Option<VmRecord>,
) -> Event {
    let failure = operation.failure.clone().unwrap_or_else(|| Failure::new(Code::Internal, "it failed"));
    match (operation.status, &operation.result) {
        (Status::Done, Some(Outcome::Verified(verdict))) if verdict != "ok" => {
            let text = format!("checkpoint is {verdict}");
            let failure = Failure::new(Code::Corrupt, text).hint("remove it, and make a new one of a running VM");
            failed(&failure, "no VM was touched")
        }
        (Status::Done, _) => Event::Done(OperationDone {
            vm,
            checkpoint: checkpoint(state, operation),
            migration: migration(operation, memory, transfers),
            restore: restore(operation, memory, transfers),
        }),
        (Status::Left(step), _) => {
            let step = operation.plan.task.shape().steps.get(step).copied().unwrap_or_default();
            failed(
                &failure,
                &format!("{}; `{step}` goes on when the host is heard again", whereabouts(state, operation)),
            )
        }
        (Status::Doing(_) | Status::Undoing(_) | Status::Undone, _) => failed(&failure, &before(state, operation)),
    }
}

/// A failed end.
pub fn failed(failure: &Failure, outcome: &str) -> Event {
    Event::Failed(OperationFailed {
        code: failure.code as u32,
        message: failure.message.clone(),
        hint: failure.hint.clone(),
        outcome: outcome.into(),
    })
}

/// Where a VM is after an operation that was taken back.
fn before(state: &State, operation: &Operation) -> String {
    format!("{}, as before", whereabouts(state, operation))
}

fn whereabouts(state: &State, operation: &Operation) -> String {
    let name = &operation.plan.vm;
    match state.vms.get(name) {
        Some(vm) => format!("{name} is {} on {} (generation {})", vm.intent.word(), vm.host, vm.generation),
        None => format!("there is no VM {name}"),
    }
}

fn checkpoint(state: &State, operation: &Operation) -> Option<CheckpointRecord> {
    match (&operation.plan.task, &operation.result) {
        (_, Some(Outcome::Checkpoint(entry))) => Some(record(entry)),
        (Task::Verify { checkpoint } | Task::Restore { checkpoint, .. }, _) => {
            state.checkpoints.get(checkpoint).map(|entry| record(entry))
        }
        _ => None,
    }
}

/// A checkpoint as it is shown.
pub fn record(entry: &CheckpointEntry) -> CheckpointRecord {
    CheckpointRecord {
        id: entry.id.clone(),
        vm: entry.vm.clone(),
        vm_id: entry.vm_id.clone(),
        generation: entry.generation,
        created_unix_ms: entry.created_unix_ms,
        ram_bytes: entry.ram_bytes,
        stored_bytes: entry.stored_bytes,
        stop_us: entry.stop_us,
        manifest_key: entry.manifest_key.clone(),
        digest: Some(entry.digest.clone()),
        verified: entry.verified.clone(),
        own_bytes: entry.own_bytes,
        kept_by: Vec::new(),
        pinned: !entry.by_policy,
        damaged: Vec::new(),
        age_ms: unix_ms().saturating_sub(entry.created_unix_ms),
    }
}

fn migration(operation: &Operation, memory: &Memory, transfers: &[TransferEvent]) -> Option<MigrationReport> {
    let Task::Migrate { target, .. } = &operation.plan.task else { return None };
    let (handed_over, _) = memory.handed_over.clone().unzip();
    let handed_over = handed_over.unwrap_or_default();
    let digest = |side: Option<proto::v1::MachineDigest>| {
        side.and_then(|side| Digest::from_slice(&side.machine)).map(|digest| digest.to_string()).unwrap_or_default()
    };
    let mut phases = Vec::new();
    let mut rounds = Vec::new();
    for event in transfers {
        match &event.event {
            Some(Said::Round(round)) => rounds.push(*round),
            Some(Said::Phase(phase)) => phases.push(phase.clone()),
            Some(Said::Progress(_) | Said::HandedOver(_) | Said::Failed(_)) | None => {}
        }
    }
    phases.extend(memory.phases.iter().cloned());
    Some(MigrationReport {
        vm: operation.plan.vm.clone(),
        source: operation.plan.holder.as_ref().map(|holder| holder.host.clone()).unwrap_or_default(),
        target: target.clone(),
        total_ms: memory.running_unix_ms.unwrap_or_else(unix_ms).saturating_sub(operation.began_unix_ms) as f64,
        downtime_ms: memory.downtime_ms,
        phases,
        rounds,
        bytes_sent: handed_over.bytes_sent,
        ram_bytes: handed_over.ram_bytes,
        source_digest: digest(handed_over.source),
        target_digest: digest(handed_over.target),
        generation: operation.plan.generation,
    })
}

fn restore(operation: &Operation, memory: &Memory, transfers: &[TransferEvent]) -> Option<RestoreReport> {
    let Task::Restore { lazy, .. } = operation.plan.task else { return None };
    let first_instruction_ms = memory.first_instruction_ms;
    let told = transfers.iter().filter_map(|event| match &event.event {
        Some(Said::Phase(phase)) => Some(phase.clone()),
        _ => None,
    });
    Some(RestoreReport { lazy, first_instruction_ms, phases: told.chain(memory.phases.iter().cloned()).collect() })
}

/// Counts an operation that has ended.
pub fn measure(operation: &Operation, memory: &Memory, took: Duration) {
    let result = match operation.status {
        Status::Done => "done",
        Status::Left(_) => "left",
        Status::Undone | Status::Doing(_) | Status::Undoing(_) => "undone",
    };
    let task = operation.plan.task.label();
    metrics::counter!(crate::metrics::OPERATIONS, "task" => task, "result" => result).increment(1);
    metrics::histogram!(crate::metrics::OPERATION_SECONDS, "task" => task).record(took.as_secs_f64());
    if operation.status != Status::Done {
        return;
    }
    if matches!(operation.plan.task, Task::Migrate { .. }) {
        metrics::histogram!(crate::metrics::MIGRATION_DOWNTIME).record(memory.downtime_ms / 1e3);
    }
    if let Some(Outcome::Checkpoint(entry)) = &operation.result {
        metrics::histogram!(crate::metrics::CHECKPOINT_STOP).record(entry.stop_us as f64 / 1e6);
    }
}

//! What is to be put right when a host is heard: the difference between the ledger and what the host reports. Pure, and
//! then its execution.
//!
//! | the holder reports                     | and no operation is under way | correction                   |
//! |----------------------------------------|-------------------------------|------------------------------|
//! | arrived, committed, but not running    |                               | activate                     |
//! | handed over by an attempt that failed  |                               | abandon: it goes on          |
//! | running, but is to stand still         |                               | pause                        |
//! | standing still, but is to run          |                               | resume                       |
//! | running or standing still, to be ended |                               | stop                         |
//!
//! Hosts that report what they must not have any more are told so by their verdicts (DISCARD) and act by themselves.
//! Corrections are repeatable calls; the next heartbeat brings those that failed again.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use proto::v1::{ActivateRequest, HostInfo, OperationRef, StopVmRequest, VmInfo, VmRef, VmState};
use tracing::Instrument;

use crate::failure::Failure;
use crate::ledger::Ledger;
use crate::ledger::event::Intent;
use crate::ledger::state::{State, Vm};
use crate::saga::world::World;

/// One call that puts something right.
#[derive(Clone, Debug, PartialEq)]
pub enum Correction {
    /// It is committed here and does not run yet.
    Activate(ActivateRequest),
    /// The attempt that it was handed over in is over.
    Abandon(OperationRef),
    /// It should stand still.
    Pause(VmRef),
    /// It should run.
    Resume(VmRef),
    /// It should have no runner.
    Stop(StopVmRequest),
}

/// Everything that is to be put right on a host, by its report.
pub fn corrections(state: &State, report: &HostInfo) -> Vec<Correction> {
    report.vms.iter().filter_map(|info| correction(state, &report.name, info)).collect()
}

fn correction(state: &State, host: &str, info: &VmInfo) -> Option<Correction> {
    let vm = state.vms.get(&info.name)?;
    let holds = vm.host == host && vm.generation == info.generation;
    if !holds || state.operation_of(&info.name).is_some() {
        return None;
    }
    let itself = |reason: &str| VmRef {
        vm: vm.name.clone(),
        generation: vm.generation,
        operation: String::new(),
        reason: reason.into(),
    };
    match (info.state(), vm.intent) {
        (VmState::Incoming, Intent::Running | Intent::Paused) => Some(Correction::Activate(activate(vm, info))),
        (VmState::HandedOver, _) => Some(Correction::Abandon(OperationRef {
            operation: info.operation.clone(),
            vm: vm.name.clone(),
            reason: "the attempt is over".into(),
        })),
        (VmState::Running, Intent::Paused) => Some(Correction::Pause(itself("paused by the operator"))),
        // Its debugger decides.
        (VmState::Paused, Intent::Running) if info.debugged => None,
        (VmState::Paused, Intent::Running) => Some(Correction::Resume(itself(""))),
        (VmState::Running | VmState::Paused | VmState::Incoming, Intent::Stopped) => {
            Some(Correction::Stop(StopVmRequest {
                vm: vm.name.clone(),
                generation: vm.generation,
                operation: String::new(),
            }))
        }
        (VmState::Running, Intent::Running) | (VmState::Paused, Intent::Paused) => None,
        // A guest that ended by itself stays as it is, for people to look at.
        (VmState::Stopped | VmState::Crashed | VmState::Starting | VmState::Unspecified, _) => None,
    }
}

fn activate(vm: &Vm, info: &VmInfo) -> ActivateRequest {
    ActivateRequest {
        vm: vm.name.clone(),
        generation: vm.generation,
        operation: info.operation.clone(),
        paused: vm.intent == Intent::Paused,
    }
}

/// Executes corrections, one at a time for each host.
#[derive(Clone, Default)]
pub struct Reconcile {
    busy: Arc<Mutex<HashSet<String>>>,
}

impl Reconcile {
    /// Puts right what a report shows, beside the caller, unless an earlier report of the host is still being worked
    /// on.
    pub fn start<W: World>(&self, ledger: &Ledger, world: crate::saga::Sagas<W>, report: HostInfo) {
        let work = corrections(&ledger.state(), &report);
        if work.is_empty() || !self.lock().insert(report.name.clone()) {
            return;
        }
        let (this, ledger) = (self.clone(), ledger.clone());
        let span = tracing::info_span!("reconcile", host = report.name);
        let put_right = async move {
            for correction in work {
                // An operation may have begun meanwhile; then it is the one to decide.
                if !corrections(&ledger.state(), &report).contains(&correction) {
                    continue;
                }
                tracing::info!(?correction, "putting right");
                if let Err(failure) = execute(world.world(), &report.name, correction).await {
                    tracing::warn!(%failure, "not put right yet");
                }
            }
            this.lock().remove(&report.name);
        };
        tokio::spawn(put_right.instrument(span));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn execute<W: World>(world: &W, host: &str, correction: Correction) -> Result<(), Failure> {
    match correction {
        Correction::Activate(request) => world.activate(host, request).await.map(drop),
        Correction::Abandon(operation) => world.abandon(host, operation).await,
        Correction::Pause(vm) => world.pause(host, vm).await.map(drop),
        Correction::Resume(vm) => world.resume(host, vm).await.map(drop),
        Correction::Stop(request) => world.stop(host, request).await.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::{begin, migrate_plan, running_vm};

    fn report(host: &str, generation: u64, state: VmState) -> HostInfo {
        let vm = VmInfo { name: "vm1".into(), generation, state: state.into(), ..VmInfo::default() };
        HostInfo { name: host.into(), vms: vec![vm], ..HostInfo::default() }
    }

    #[test]
    fn a_handed_over_vm_of_a_failed_attempt_goes_on() {
        let state = running_vm("hostA");
        let work = corrections(&state, &report("hostA", 1, VmState::HandedOver));
        assert!(matches!(work[..], [Correction::Abandon(_)]), "{work:?}");
        assert_eq!(corrections(&state, &report("hostB", 1, VmState::HandedOver)), []);
        assert_eq!(corrections(&state, &report("hostA", 2, VmState::HandedOver)), []);
    }

    #[test]
    fn nothing_is_corrected_while_an_operation_decides() {
        let mut state = running_vm("hostA");
        let plan = migrate_plan(&state, "hostB");
        begin(&mut state, "op9", plan);
        assert_eq!(corrections(&state, &report("hostA", 1, VmState::HandedOver)), []);
        assert_eq!(corrections(&state, &report("hostA", 1, VmState::Paused)), []);
    }

    #[test]
    fn a_committed_arrival_is_activated_wherever_the_controller_died() {
        let state = running_vm("hostA");
        let work = corrections(&state, &report("hostA", 1, VmState::Incoming));
        assert!(matches!(&work[..], [Correction::Activate(request)] if !request.paused), "{work:?}");
    }

    #[test]
    fn a_vm_under_a_debugger_is_left_to_it() {
        let state = running_vm("hostA");
        let mut report = report("hostA", 1, VmState::Paused);
        assert!(matches!(corrections(&state, &report)[..], [Correction::Resume(_)]));
        report.vms[0].debugged = true;
        assert_eq!(corrections(&state, &report), []);
    }

    #[test]
    fn a_vm_that_ended_by_itself_is_left_for_people() {
        let state = running_vm("hostA");
        assert_eq!(corrections(&state, &report("hostA", 1, VmState::Crashed)), []);
    }
}

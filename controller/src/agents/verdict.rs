//! The ledger's word on a VM that a host reports: hold, wait or discard. Pure.
//!
//! | the report is                                             | verdict |
//! |-----------------------------------------------------------|---------|
//! | the ledger's holder and generation                        | HOLD    |
//! | the same, but handed over in a migration under way        | WAIT    |
//! | the same, but a restore under way is going to replace it  | WAIT    |
//! | what an operation before its commit is preparing here     | WAIT    |
//! | anything else                                             | DISCARD |
//!
//! HOLD renews the lease, so it is said of at most one (host, generation) of a VM at any time. WAIT renews nothing: a
//! guest that runs under WAIT stops by itself when its lease has passed, which is what a restore waits for.

use proto::v1::VmState;
use proto::v1::VmVerdict;
use proto::v1::vm_verdict::Verdict;

use crate::ledger::event::Task;
use crate::ledger::state::State;

/// What a host says of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report<'a> {
    /// The VM's name.
    pub vm: &'a str,
    /// The generation that the host has.
    pub generation: u64,
    /// What it does there.
    pub state: VmState,
}

/// The ledger's word on one report. The generation in it is the one that the verdict is about: what the host reported.
pub fn verdict(state: &State, host: &str, report: Report<'_>) -> VmVerdict {
    VmVerdict { vm: report.vm.into(), verdict: judge(state, host, report).into(), generation: report.generation }
}

fn judge(state: &State, host: &str, report: Report<'_>) -> Verdict {
    let undecided = state.operation_of(report.vm).filter(|operation| !operation.committed());
    let holds = state.vms.get(report.vm).is_some_and(|vm| vm.host == host && vm.generation == report.generation);
    if holds {
        return match undecided.map(|operation| &operation.plan.task) {
            Some(Task::Restore { .. }) => Verdict::Wait,
            Some(Task::Migrate { .. }) if report.state == VmState::HandedOver => Verdict::Wait,
            _ => Verdict::Hold,
        };
    }
    match undecided {
        Some(operation)
            if operation.plan.task.new_host() == Some(host) && operation.plan.generation == report.generation =>
        {
            Verdict::Wait
        }
        _ => Verdict::Discard,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::tests::histories;

    const STATES: [VmState; 5] =
        [VmState::Running, VmState::Paused, VmState::Incoming, VmState::HandedOver, VmState::Stopped];

    fn judge_all(state: &State, vm: &str) -> Vec<(String, u64, VmState, Verdict)> {
        let mut all = Vec::new();
        for host in ["hostA", "hostB", "hostC"] {
            for generation in 0..state.fresh_generation(vm) + 2 {
                for vm_state in STATES {
                    let report = Report { vm, generation, state: vm_state };
                    all.push((host.to_string(), generation, vm_state, judge(state, host, report)));
                }
            }
        }
        all
    }

    proptest! {
        #[test]
        fn at_most_one_host_holds_a_vm_in_any_history(states in histories()) {
            for state in &states {
                for vm in ["vm1", "vm2"] {
                    let mut holders: Vec<(String, u64)> = judge_all(state, vm).into_iter()
                        .filter(|(.., verdict)| *verdict == Verdict::Hold).map(|(h, g, ..)| (h, g)).collect();
                    holders.dedup();
                    prop_assert!(holders.len() <= 1, "{holders:?} hold {vm} in {state:?}");
                    if let (Some((host, generation)), Some(entry)) = (holders.first(), state.vms.get(vm)) {
                        prop_assert_eq!((host, *generation), (&entry.host, entry.generation));
                    }
                }
            }
        }

        #[test]
        fn the_holder_is_never_told_to_discard(states in histories()) {
            for state in &states {
                for vm in state.vms.values() {
                    for vm_state in STATES {
                        let report = Report { vm: &vm.name, generation: vm.generation, state: vm_state };
                        prop_assert_ne!(judge(state, &vm.host, report), Verdict::Discard);
                    }
                }
            }
        }

        #[test]
        fn a_restore_under_way_renews_no_lease(states in histories()) {
            for state in &states {
                let restores = state.active().filter(|o| matches!(o.plan.task, Task::Restore { .. }));
                for operation in restores.filter(|operation| !operation.committed()) {
                    let held = judge_all(state, &operation.plan.vm).into_iter().any(|(.., v)| v == Verdict::Hold);
                    prop_assert!(!held, "{operation:?}");
                }
            }
        }
    }
}

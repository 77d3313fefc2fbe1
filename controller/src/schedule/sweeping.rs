//! Sweeps: one operation for each VM that has checkpoints, one after the other, asked for by an operator or by the clock.
//!
//! A sweep that would also rewrite packs holds all checkpoints of its VM, because whoever reads one has its old manifest in
//! hand. Where somebody does, it only removes.

use std::collections::BTreeSet;
use std::time::Duration;

use proto::status::Code;
use tokio_util::sync::CancellationToken;

use super::Schedule;
use crate::api::plans;
use crate::failure::Failure;
use crate::ledger::Ledger;
use crate::ledger::event::{Outcome, Plan};
use crate::ledger::state::{State, packs_lock};
use crate::saga::world::World;
use crate::sweep::{LIVE_PERCENT_MIN, Request, Swept};

/// The sweep of one VM.
#[derive(Clone, Debug, PartialEq)]
pub struct SweptVm {
    /// Its name.
    pub vm: String,
    /// Hex of its id.
    pub vm_id: String,
    /// What was done, or why not.
    pub result: Result<Swept, Failure>,
}

/// Ids of all VMs whose packs this cluster knows, of one name if it is not empty.
pub fn swept_ids(state: &State, vm: &str) -> Vec<String> {
    let there = state.vms.values().filter(|found| vm.is_empty() || found.name == vm).map(|found| &found.id);
    let kept = state.checkpoints.values().filter(|entry| vm.is_empty() || entry.vm == vm).map(|entry| &entry.vm_id);
    there.chain(kept).collect::<BTreeSet<_>>().into_iter().cloned().collect()
}

impl<W: World> Schedule<W> {
    /// Sweeps what a VM has in the bucket, or what all have.
    pub async fn sweep(&self, actor: &str, vm: &str, dry_run: bool) -> Vec<SweptVm> {
        let ids = swept_ids(&self.inner.ledger.state(), vm);
        let mut all = Vec::new();
        for vm_id in ids {
            let vm = self.inner.ledger.state().name_of(&vm_id).to_owned();
            let result = if dry_run { self.rehearse(&vm_id).await } else { self.sweep_one(actor, &vm_id).await };
            all.push(SweptVm { vm, vm_id, result });
        }
        all
    }

    async fn rehearse(&self, vm_id: &str) -> Result<Swept, Failure> {
        let state = self.inner.ledger.state();
        let request = Request { dry_run: true, ..Request::of(&state, vm_id, 0, LIVE_PERCENT_MIN) };
        let mut swept = self.inner.sagas.world().sweep(&request, &|_| ()).await?;
        if let Some(holder) = state.lock_holder(&packs_lock(vm_id)) {
            swept.note =
                format!("a {} is under way: its packs are among those that nobody names", holder.plan.task.label());
        }
        Ok(swept)
    }

    async fn sweep_one(&self, actor: &str, vm_id: &str) -> Result<Swept, Failure> {
        match self.sweep_as(actor, vm_id, LIVE_PERCENT_MIN).await {
            Err(failure) if failure.code == Code::Conflict => self.sweep_as(actor, vm_id, 0).await,
            ended => ended,
        }
    }

    async fn sweep_as(&self, actor: &str, vm_id: &str, live_percent_min: u32) -> Result<Swept, Failure> {
        let plan = plans::sweep(&self.inner.ledger.state(), vm_id, live_percent_min);
        match self.to_the_end(actor, plan).await? {
            Some(Outcome::Swept(swept)) => Ok(*swept),
            _ => Err(Failure::new(Code::Internal, "the sweep's result was lost")),
        }
    }

    /// Begins an operation and waits for its end: what its commit added.
    ///
    /// # Errors
    /// What it failed with.
    pub async fn to_the_end(&self, actor: &str, plan: Plan) -> Result<Option<Outcome>, Failure> {
        let super::Inner { ledger, sagas, .. } = &*self.inner;
        if actor != self.inner.actor {
            self.make_way(&plan.locks).await;
        }
        let voice = sagas.begin(actor, plan).await?;
        voice.ended().await?;
        Ok(ledger.state().operations.get(voice.operation()).and_then(|operation| operation.result.clone()))
    }

    /// In whose name the clock does things.
    pub fn actor(&self) -> &str {
        &self.inner.actor
    }

    /// What is true.
    pub fn ledger(&self) -> &Ledger {
        &self.inner.ledger
    }

    /// Sweeps everything again and again until shutdown.
    pub async fn sweep_by_clock(self, every: Duration, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(every) => {}
            }
            let actor = self.inner.actor.clone();
            let swept = tokio::select! {
                () = shutdown.cancelled() => return,
                swept = self.sweep(&actor, "", false) => swept,
            };
            for SweptVm { vm, result, .. } in swept {
                match result {
                    Ok(Swept { removed: 0, repacked: 0, .. }) => {}
                    Ok(Swept { removed, removed_bytes, repacked, .. }) => {
                        tracing::info!(vm, removed, removed_bytes, repacked, "swept");
                    }
                    Err(failure) => tracing::warn!(vm, %failure, "not swept; the next sweep tries again"),
                }
            }
        }
    }
}

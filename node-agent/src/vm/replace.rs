//! A restore to the host that has the VM: the old copy stands still beside the new one until that is activated.
//!
//! ```text
//! prepare (replaces generation N) -> vms/NAME moves to aside/NAME, its process stays, paused
//! activate                        -> the old process ends, aside/NAME goes
//! anything else                   -> what was incoming goes, aside/NAME moves back: as before
//! ```
//! Whether generation N may run again is for the controller to say: what comes back is paused.

use std::sync::Arc;

use proto::v1::{RunnerState, StoredVm, VmState};

use super::Message;
use super::actor::Actor;
use super::runner::{Event, Process, Runner};
use super::store::StoreError;
use crate::migration::{Base, Failure};

/// The old copy of a VM.
pub struct Aside {
    record: StoredVm,
    runner: Option<Arc<Runner>>,
    runner_serial: u64,
    runner_state: RunnerState,
    base: Option<Base>,
}

impl Actor {
    /// Sets aside what stands still here, if it is of this generation and older than what comes.
    pub(super) async fn set_aside(&mut self, replaces: u64, comes: u64) -> Result<(), Failure> {
        let held = self.held().filter(|held| {
            let still = matches!(held.state, VmState::Paused | VmState::Stopped | VmState::Crashed);
            still && !held.transferring && held.generation == replaces && comes > replaces
        });
        let (Some(_), Some(mut record)) = (held, self.record.clone()) else { return Ok(()) };
        if let Some(runner) = self.runner.clone().filter(|_| record.state() == VmState::Paused) {
            // It stands still by its lease perhaps; from here on it does so by word.
            runner.pause("a restore replaces it").await?;
            record.paused = true;
            self.record = Some(record.clone());
            self.save().await?;
        }
        let (store, name) = (self.host.store.clone(), self.name.clone());
        self.on_disk(move || store.set_aside(&name).map_err(StoreError::into_failure)).await?;
        tracing::info!(vm = self.name, generation = replaces, "set aside for a restore");
        self.aside = Some(Aside {
            record,
            runner: self.runner.take(),
            runner_serial: self.runner_serial,
            runner_state: std::mem::take(&mut self.runner_state),
            base: self.base.take(),
        });
        self.paging = None;
        self.record = None;
        self.next_serial();
        Ok(())
    }

    /// What was set aside, if anything, is what this host has again.
    pub(super) async fn put_back(&mut self) -> Result<(), Failure> {
        let Some(aside) = self.aside.take() else { return Ok(()) };
        let Aside { record, runner, runner_serial, runner_state, base } = aside;
        let (store, name) = (self.host.store.clone(), self.name.clone());
        self.on_disk(move || store.put_back(&name).map_err(StoreError::into_failure)).await?;
        tracing::info!(vm = self.name, generation = record.generation, "what was set aside is back");
        (self.record, self.runner, self.runner_serial) = (Some(record), runner, runner_serial);
        (self.runner_state, self.base) = (runner_state, base);
        if self.runner.is_some()
            && let Err(failure) = self.page_again()
        {
            tracing::error!(vm = self.name, %failure, "its missing pages cannot be asked for");
        }
        // What its process said meanwhile was not heard; whether it is still there is looked at next.
        let answer = match self.runner.clone() {
            Some(runner) => runner.status().await.ok(),
            None => None,
        };
        match answer {
            Some(state) => self.absorb(&state),
            None if self.record.as_ref().is_some_and(|record| record.state() == VmState::Paused) => {
                self.next_serial();
                let _ending = self.mailbox.send(Message::Runner(self.runner_serial, Event::Gone));
            }
            None => {}
        }
        Ok(())
    }

    /// What was set aside is not needed any more. Whatever stays is removed by the next agent.
    pub(super) async fn drop_aside(&mut self) {
        let Some(aside) = self.aside.take() else { return };
        if let Some(runner) = aside.runner {
            runner.end().await;
        }
        self.remove_aside(aside.record.generation).await;
    }

    async fn remove_aside(&self, generation: u64) {
        let (store, name) = (self.host.store.clone(), self.name.clone());
        let removed = self.on_disk(move || {
            if let Some((_, directory)) = store.kept_aside(&name)
                && let Some(process) = Process::of(&directory)
            {
                process.end();
            }
            store.note_seen(&name, generation).and_then(|()| store.drop_aside(&name)).map_err(StoreError::into_failure)
        });
        if let Err(failure) = removed.await {
            tracing::warn!(vm = self.name, %failure, "what was set aside stays until the next start");
        }
    }

    /// After a start: what an earlier agent had set aside waits on beside what is incoming, or goes.
    pub(super) async fn recover_aside(&mut self) {
        let Some((record, _)) = self.host.store.kept_aside(&self.name) else { return };
        let state = self.record.as_ref().map(StoredVm::state);
        if state.is_some_and(|state| state != VmState::Incoming) {
            return self.remove_aside(record.generation).await;
        }
        let record = StoredVm { name: self.name.clone(), ..record };
        self.aside =
            Some(Aside { record, runner: None, runner_serial: 0, runner_state: RunnerState::default(), base: None });
        if state.is_none()
            && let Err(failure) = self.put_back().await
        {
            tracing::error!(vm = self.name, %failure, "what was set aside cannot be put back");
        }
    }
}

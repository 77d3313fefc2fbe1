//! What a new agent makes of what an earlier one left: the files say what was, the runner says what is.
//!
//! | on disk      | runner alive                                             | runner gone                    |
//! |--------------|----------------------------------------------------------|--------------------------------|
//! | RUNNING etc. | attached again; a stop for a hand-over that never was is undone | CRASHED                 |
//! | INCOMING     | RUNNING if it runs; kept if its state arrived or its ticket is unused | removed           |
//! | HANDED_OVER  | stays stopped until the controller's word                | CRASHED                        |
//! | STOPPED      | -                                                        | as it is                       |
//!
//! Leases are not touched: the runner keeps its own, and the next heartbeat decides.

use std::sync::Arc;

use proto::v1::{StoredVm, VmState};

use super::actor::Actor;
use super::runner::{Process, Runner};
use crate::migration::Failure;

impl Actor {
    /// Takes over a VM from disk.
    pub(super) async fn recover(&mut self, stored: StoredVm) {
        let directory = self.host.store.directory(&self.name);
        let was = stored.state();
        self.record = Some(stored);
        let process = Process::of(&directory);
        if process.is_some() {
            let events = self.runner_events();
            match Runner::connect(&directory, events).await {
                Ok(runner) => {
                    self.runner_state = runner.state.clone();
                    self.runner = Some(Arc::new(runner));
                    if let Err(failure) = self.page_again() {
                        tracing::error!(vm = self.name, %failure, "its missing pages cannot be asked for");
                    }
                }
                Err(failure) => tracing::warn!(vm = self.name, %failure, "a runner lives but does not answer"),
            }
        }
        let outcome = match (self.runner.is_some(), was) {
            (_, VmState::Stopped) => {
                self.end_runner().await;
                Ok(())
            }
            (false, VmState::Crashed) => Ok(()),
            (false, VmState::Incoming) => self.discard("its runner is gone").await,
            (false, _) => self.note_lost(process).await,
            (true, VmState::Incoming) => self.recover_incoming().await,
            (true, VmState::HandedOver | VmState::Crashed) => Ok(()),
            (true, _) => self.recover_running().await,
        };
        if let Err(failure) = outcome {
            tracing::error!(vm = self.name, %failure, "recovery is not complete");
        }
        self.recover_aside().await;
        if let Some(record) = &self.record {
            let state = super::requests::state_words(record.state());
            tracing::info!(vm = self.name, generation = record.generation, state, "found");
        }
    }

    async fn note_lost(&mut self, process: Option<Process>) -> Result<(), Failure> {
        if let Some(process) = process {
            process.kill().await;
        }
        if let Some(record) = &mut self.record {
            record.reason = if record.boot_id.is_empty() || record.boot_id == self.host.boot_id {
                "its process ended while no agent was there".to_owned()
            } else {
                "the host was started again".to_owned()
            };
            record.state = VmState::Crashed.into();
            record.operation.clear();
        }
        self.save().await
    }

    async fn recover_running(&mut self) -> Result<(), Failure> {
        let runner = self.the_runner()?;
        let state = runner.state.clone();
        if let Some(record) = &mut self.record {
            record.operation.clear();
            if state.state() == VmState::Starting {
                record.state = VmState::Crashed.into();
                record.reason = "the agent ended while it was starting".to_owned();
                self.end_runner().await;
                return self.save().await;
            }
            record.state = VmState::Running.into();
        }
        self.absorb(&state);
        match state.state() {
            VmState::Stopped => {
                self.end_runner().await;
                self.save().await
            }
            VmState::Crashed => self.save().await,
            _ => {
                // It was stopped for a hand-over of which nobody was told, or it is paused by the lease: either way it
                // may go on as far as its lease lets it, unless an operator paused it.
                // One whose pages are missing was not stopped, and may be asleep now.
                if self.record.as_ref().is_some_and(|record| !record.paused && record.pages_from.is_empty()) {
                    let state = runner.resume().await?;
                    self.absorb(&state);
                }
                Ok(())
            }
        }
    }

    async fn recover_incoming(&mut self) -> Result<(), Failure> {
        let loaded = self.runner_state.state() == VmState::Paused;
        let now_ns = self.host.clock.boottime_ns();
        let fresh = self.record.as_ref().is_some_and(|record| {
            let in_time = record.boot_id == self.host.boot_id && now_ns < record.ticket_until_boottime_ns;
            !record.ticket_used && in_time
        });
        if self.runner_state.state() == VmState::Running {
            // It was activated; the agent ended before it could write that down.
            if let Some(record) = &mut self.record {
                record.state = VmState::Running.into();
                record.operation.clear();
                record.ticket = None;
            }
            return self.save().await;
        }
        match (loaded, fresh) {
            (true, _) => Ok(()),
            (false, true) => self.receive(),
            (false, false) => self.discard("its transfer was cut off").await,
        }
    }
}

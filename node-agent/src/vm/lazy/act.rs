//! The actor's part in a lazy restore: begin to ask for pages, say how far it is, note that all are here.
//!
//! What survives a crash is one word in the VM's record, the checkpoint; it is written before the guest can run and
//! removed after the last page. Pages that are here are not asked for again.

use std::sync::Arc;

use proto::v1::{LazyInfo, StoredVm, VmState};

use super::{Over, Paging, Wanted};
use crate::migration::Failure;
use crate::vm::Message;
use crate::vm::actor::Actor;

impl Actor {
    /// Asks for the pages of a runner that has just been started.
    pub(in crate::vm) fn page(&mut self) -> Result<(), Failure> {
        let runner = self.the_runner()?;
        let record = self.record.clone().unwrap_or_default();
        let wanted = Wanted { vm: self.name.clone(), generation: record.generation, checkpoint: record.pages_from };
        let (mailbox, serial) = (self.mailbox.clone(), self.runner_serial);
        let over = move |over| drop(mailbox.send(Message::Paged(serial, over)));
        self.paging = Some(Paging::begin(&Arc::clone(&self.host), &runner, wanted, over)?);
        Ok(())
    }

    /// Goes on where an earlier agent, or an earlier connection, was. Nothing comes before the next renewal of its lease.
    pub(in crate::vm) fn page_again(&mut self) -> Result<(), Failure> {
        let Some(record) = self.record.as_ref().filter(|record| !record.pages_from.is_empty()) else { return Ok(()) };
        let paused = record.paused;
        self.the_runner()?.standing.found(paused);
        self.page()
    }

    /// How far it is; none if nothing is missing.
    pub(in crate::vm) fn lazy_info(&self) -> Option<LazyInfo> {
        let ended = |record: &StoredVm| matches!(record.state(), VmState::Stopped | VmState::Crashed);
        let record = self.record.as_ref().filter(|record| !record.pages_from.is_empty() && !ended(record))?;
        let unknown = || LazyInfo { checkpoint: record.pages_from.clone(), ..LazyInfo::default() };
        Some(self.paging.as_ref().map_or_else(unknown, Paging::info))
    }

    /// No page is missing any more, or nobody is there to miss one.
    pub(in crate::vm) async fn paged(&mut self, over: Over) {
        self.paging = None;
        if over == Over::Gone {
            // The end of the process is told by the process.
            return;
        }
        if let Some(record) = &mut self.record {
            record.pages_from.clear();
        }
        if let Err(failure) = self.save().await {
            tracing::error!(vm = self.name, %failure, "that all pages are here could not be written down");
        }
    }
}

//! The journal of a recorded guest on its way to the controller.
//!
//! ```text
//! runner keeps blocks <--TakeJournal{from}-- here --AppendJournal--> controller --> bucket
//!                      forgets those below `from`      <--next_sequence-- in the bucket
//! ```
//! Nothing is kept here: what the controller has not answered for is still with the runner, so an agent that is killed, a
//! controller that is away and a bucket that is full cost time and no block. What the runner does when it has no room is its
//! own business. One task a guest; it ends when the recording has ended and all of it is taken. It refuses to know what is in
//! a block, and buckets.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proto::status::Code;
use proto::v1::fleet_client::FleetClient;
use proto::v1::runner_reply::Reply;
use proto::v1::runner_request::Request;
use proto::v1::{AppendJournalRequest, RecordRequest, RunnerJournal, RunnerState, RunnerTakeJournal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::Host;
use super::actor::{Actor, chain, refusal};
use super::runner::Runner;
use crate::migration::{Failure, MESSAGE_BYTES_MAX};
use crate::tls::Identity;

/// How often is looked for new blocks.
const LOOK: Duration = Duration::from_millis(500);
/// Pauses before the controller is asked again.
const RETRY: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3);
/// A controller that takes longer to answer is asked again.
const CALL_DEADLINE: Duration = Duration::from_secs(60);
/// How long the end of a guest waits for its last blocks.
const LAST_BLOCKS: Duration = Duration::from_secs(5);

/// A guest's journal on its way; ends when it is dropped.
pub struct Forwarding {
    over: watch::Receiver<bool>,
    _task: JoinSet<()>,
}

struct Way {
    host: Arc<Host>,
    runner: Arc<Runner>,
    vm: String,
    generation: u64,
    client: Option<FleetClient<Channel>>,
}

impl Forwarding {
    fn begin(host: Arc<Host>, runner: Arc<Runner>, vm: String, generation: u64) -> Forwarding {
        let (said, over) = watch::channel(false);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut way = Way { host, runner, vm, generation, client: None };
            if let Err(failure) = way.go().await {
                tracing::debug!(vm = way.vm, %failure, "the journal's runner is gone");
            }
            // Whoever waited may have left.
            let _ = said.send(true);
        });
        Forwarding { over, _task: task }
    }

    fn is_over(&self) -> bool {
        *self.over.borrow()
    }
}

impl Way {
    /// Until the recording has ended and everything is taken, or the runner is gone.
    async fn go(&mut self) -> Result<(), Failure> {
        let mut from = 0;
        loop {
            let journal = self.take(from).await?;
            let Some(info) = journal.info else { return Ok(()) };
            if journal.blocks.is_empty() {
                if !info.ended.is_empty() {
                    return Ok(());
                }
                tokio::time::sleep(LOOK).await;
                continue;
            }
            from = self.append(&info.recording, journal.blocks).await?;
        }
    }

    async fn take(&self, from: u64) -> Result<RunnerJournal, Failure> {
        match self.runner.call(Request::TakeJournal(RunnerTakeJournal { from })).await {
            Ok(Reply::Journal(journal)) => Ok(journal),
            Ok(_) => Err(Failure::new(Code::Protocol, "the runner answered something else")),
            // A guest that waits for a page of its RAM answers after it has come.
            Err(_) if self.runner.standing.stalled().is_some() => {
                Ok(RunnerJournal { info: Some(Default::default()), blocks: Vec::new() })
            }
            Err(failure) => Err(failure),
        }
    }

    /// Brings blocks to the bucket, however long that takes; the sequence after the last one that is there.
    async fn append(&mut self, recording: &[u8], blocks: Vec<Vec<u8>>) -> Result<u64, Failure> {
        let (vm, generation) = (self.vm.clone(), self.generation);
        // Asked again without a copy: blocks are shared.
        let blocks = blocks.into_iter().map(Bytes::from).collect();
        let request = AppendJournalRequest { vm, generation, recording: recording.to_vec(), blocks };
        let mut pause = *RETRY.start();
        loop {
            match self.ask(request.clone()).await {
                Ok(reply) if reply.refused.is_empty() => return Ok(reply.next_sequence),
                Ok(reply) => {
                    tracing::warn!(vm = self.vm, reason = reply.refused, "the controller wants no more of the journal");
                    let stop = RecordRequest { vm: self.vm.clone(), generation, ..RecordRequest::default() };
                    self.runner.call(Request::Record(stop)).await?;
                    // What is left is forgotten.
                    return Ok(u64::MAX);
                }
                Err(failure) => {
                    tracing::debug!(vm = self.vm, %failure, "the journal waits");
                    self.client = None;
                    metrics::counter!(crate::metrics::JOURNAL_RETRIES).increment(1);
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(*RETRY.end());
        }
    }

    async fn ask(&mut self, request: AppendJournalRequest) -> Result<proto::v1::AppendJournalReply, Failure> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => self.connect().await?,
        };
        let answered = tokio::time::timeout(CALL_DEADLINE, client.append_journal(request)).await;
        let answered = answered.map_err(|_| Failure::new(Code::Unreachable, "the controller does not answer"))?;
        let reply = answered.map_err(|status| Failure::new(Code::Unreachable, status.message()))?;
        self.client = Some(client);
        Ok(reply.into_inner())
    }

    async fn connect(&self) -> Result<FleetClient<Channel>, Failure> {
        let identity = Identity::controller();
        let channel = self.host.tls.connect(&self.host.controller, &identity, |endpoint| endpoint.tcp_nodelay(true));
        let channel = channel.await.map_err(|error| Failure::new(Code::Unreachable, chain(&error)))?;
        Ok(FleetClient::new(channel).max_encoding_message_size(MESSAGE_BYTES_MAX))
    }
}

impl Actor {
    /// Records from now on, or ends that.
    pub(super) async fn record(&mut self, request: RecordRequest) -> Result<proto::v1::VmInfo, Failure> {
        let generation = self.record.as_ref().map_or(0, |record| record.generation);
        if generation != request.generation {
            let text = format!("generation {generation} is here, not {}", request.generation);
            return Err(refusal(&self.name, Code::Conflict, &text));
        }
        if self.host.controller.is_empty() {
            return Err(refusal(&self.name, Code::Conflict, "this agent has no controller that would take a journal"));
        }
        let runner = self.the_runner()?;
        runner.call(Request::Record(request)).await?;
        let state = runner.status().await?;
        self.absorb(&state);
        self.info_or_gone()
    }

    /// Begins to forward the journal of which the runner speaks, if nobody does.
    pub(super) fn forward_journal(&mut self, state: &RunnerState) {
        let waiting = |info: &proto::v1::RecordingInfo| info.ended.is_empty() || info.first_kept < info.next_sequence;
        let forwarded = self.forwarding.as_ref().is_some_and(|forwarding| !forwarding.is_over());
        if forwarded || self.host.controller.is_empty() || !state.recording.as_ref().is_some_and(waiting) {
            return;
        }
        let (Some(runner), Some(record)) = (self.runner.clone(), &self.record) else { return };
        let (host, vm) = (Arc::clone(&self.host), self.name.clone());
        self.forwarding = Some(Forwarding::begin(host, runner, vm, record.generation));
    }

    /// The guest will not run again: what was recorded of it is brought away before its process ends.
    pub(super) async fn finish_journal(&mut self, why: &str) {
        let recording = self.runner_state.recording.as_ref().is_some_and(|info| info.ended.is_empty());
        let (Some(runner), Some(forwarding)) = (self.runner.clone(), self.forwarding.take()) else { return };
        if recording {
            // It may have ended by itself meanwhile.
            let stop = RecordRequest { vm: self.name.clone(), ..RecordRequest::default() };
            let _ended = runner.call(Request::Record(stop)).await;
        }
        let mut over = forwarding.over.clone();
        if tokio::time::timeout(LAST_BLOCKS, over.wait_for(|over| *over)).await.is_err() {
            tracing::warn!(
                vm = self.name,
                why,
                "the last blocks of its journal could not be brought to the controller"
            );
        }
    }
}

//! A drill: a checkpoint is restored under a name of its own, without a network, watched until it shows that it lives, and
//! destroyed, however it went.
//!
//! It is made of ordinary operations: a restore whose cards are unplugged, and a removal. A VM of a drill is marked in the
//! ledger, so that a controller that was killed in the middle removes it at its next start. A guest with a disk that
//! hosts share is not drilled: it would write where the real one does.

use std::time::Duration;

use proto::ids::OperationId;
use proto::status::Code;
use proto::v1::{ConsoleInput, DrillReply, DrillRequest, VmRef};
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::{Api, plans};
use crate::failure::Failure;
use crate::ledger::event::{Event, Plan, Task};

/// Longest that a sign of life is waited for, milliseconds.
pub const TIMEOUT_MS_MAX: u64 = 3_600_000;
/// How long a sign of life is waited for where nobody said.
pub const TIMEOUT_MS: u64 = 60_000;
/// Bytes of console that are kept to look for a pattern.
const CONSOLE_MAX: usize = 1 << 20;
/// Between two looks at a guest that says nothing.
const LOOK: Duration = Duration::from_millis(100);

impl Api {
    /// Drills a checkpoint (or the newest of a VM) to its end, also if whoever asked goes away.
    ///
    /// # Errors
    /// Why it cannot be restored, or that it showed no sign of life; the VM is gone then, too.
    pub(super) async fn drill(&self, actor: &str, asked: DrillRequest) -> Result<DrillReply, Failure> {
        let (api, actor) = (self.clone(), actor.to_owned());
        let ended = tokio::spawn(async move { api.drill_to_the_end(&actor, asked).await });
        ended.await.unwrap_or_else(|_| Err(Failure::new(Code::Internal, "the drill ended without a word")))
    }

    async fn drill_to_the_end(&self, actor: &str, asked: DrillRequest) -> Result<DrillReply, Failure> {
        if asked.timeout_ms > TIMEOUT_MS_MAX {
            let text = format!("a drill waits {TIMEOUT_MS_MAX} ms at most");
            return Err(Failure::new(Code::BadInput, text));
        }
        let state = self.ledger.state();
        let entry = plans::named_checkpoint(&state, &asked.id)?.clone();
        let plan = self.drill_plan(&entry, &asked.to).await?;
        let (name, host) = (plan.vm.clone(), plan.task.new_host().unwrap_or_default().to_owned());
        let mut reply =
            DrillReply { checkpoint: entry.id.clone(), vm: entry.vm.clone(), host, ..DrillReply::default() };
        let alive = self.live(actor, plan, &asked, &mut reply).await;
        let began = Instant::now();
        let gone = self.destroy(actor, &name).await;
        reply.destroy_ms = ms(began);
        let ended = alive.and(gone);
        let result = if ended.is_ok() { "ok" } else { "failed" };
        metrics::counter!(crate::metrics::CHECKS, "check" => "drill", "result" => result).increment(1);
        let words = match &ended {
            Ok(()) => {
                format!("restored to {} in {:.0} ms, alive after {:.0} ms", reply.host, reply.restore_ms, reply.life_ms)
            }
            Err(failure) => failure.message.clone(),
        };
        let event = Event::Drilled { vm: entry.vm, checkpoint: entry.id, alive: ended.is_ok(), words };
        self.ledger.append(actor, event).await?;
        ended.map(|()| reply)
    }

    async fn drill_plan(&self, entry: &crate::ledger::event::CheckpointEntry, to: &str) -> Result<Plan, Failure> {
        let manifest = self.reader.manifest(&entry.manifest_key).await?.manifest;
        let shared =
            manifest.config.iter().flat_map(|config| &config.disks).find(|disk| disk.shared && !disk.read_only);
        if let Some(disk) = shared {
            let text = format!("{} has the disk {} that hosts share: a drill would write to it", entry.vm, disk.path);
            return Err(Failure::new(Code::BadInput, text).hint("`ctl checkpoint verify` proves its bytes"));
        }
        let name = format!("drill-{}", OperationId(crate::entropy::bytes()));
        let how = plans::How::default();
        let mut plan = plans::restore(&self.ledger.state(), &self.fleet(), entry, manifest, to, &name, how)?;
        if let Task::Restore { config, drill, .. } = &mut plan.task {
            *drill = true;
            config.nets.iter_mut().for_each(|net| net.tap.clear());
        }
        Ok(plan)
    }

    /// Restores and watches.
    async fn live(&self, actor: &str, plan: Plan, asked: &DrillRequest, reply: &mut DrillReply) -> Result<(), Failure> {
        let (name, generation) = (plan.vm.clone(), plan.generation);
        let began = Instant::now();
        self.sagas.begin(actor, plan).await?.ended().await.map_err(|failure| failure.at("the restore failed"))?;
        (reply.restore_ms, reply.host) = (ms(began), self.host_of(&name).unwrap_or(reply.host.clone()));
        let timeout = Duration::from_millis(if asked.timeout_ms == 0 { TIMEOUT_MS } else { asked.timeout_ms });
        let began = Instant::now();
        let seen = match asked.expect.as_str() {
            "" => tokio::time::timeout(timeout, self.retires(&reply.host, &name, generation)).await,
            pattern => tokio::time::timeout(timeout, self.says(&reply.host, &name, pattern)).await,
        };
        let waited = || {
            let sign =
                if asked.expect.is_empty() { "ran an instruction".into() } else { format!("said {:?}", asked.expect) };
            Failure::new(Code::Unreachable, format!("the restored guest has not {sign} in {} ms", timeout.as_millis()))
        };
        reply.seen = seen.map_err(|_| waited())??;
        reply.life_ms = ms(began);
        Ok(())
    }

    fn host_of(&self, vm: &str) -> Option<String> {
        self.ledger.state().vms.get(vm).map(|vm| vm.host.clone())
    }

    /// Waits until the guest retires instructions.
    async fn retires(&self, host: &str, vm: &str, generation: u64) -> Result<String, Failure> {
        let mut first = None;
        loop {
            let itself = VmRef { vm: vm.into(), generation, ..VmRef::default() };
            let info = self.agents.call(host, LOOK * 50, async |mut agent| agent.get_vm(itself).await).await?;
            if matches!(info.state(), proto::v1::VmState::Crashed | proto::v1::VmState::Stopped) {
                let why = if info.reason.is_empty() { "ended" } else { &info.reason };
                return Err(Failure::new(Code::Internal, format!("the restored guest ended: {why}")));
            }
            let before = *first.get_or_insert(info.retired_instructions);
            if info.retired_instructions > before {
                return Ok(format!("{} instructions", info.retired_instructions - before));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until the guest's console says this; the line in which it does.
    async fn says(&self, host: &str, vm: &str, pattern: &str) -> Result<String, Failure> {
        let broken = |status: tonic::Status| Failure::from_status(host, &status);
        let (tell, told) = tokio::sync::mpsc::channel(1);
        let first = ConsoleInput { vm: vm.into(), log_bytes: CONSOLE_MAX as u64, ..ConsoleInput::default() };
        // There is room for one: the channel is new. It stays open, or the console ends.
        let _ = tell.send(first).await;
        let mut outputs =
            self.agents.client(host)?.console(ReceiverStream::new(told)).await.map_err(broken)?.into_inner();
        let mut text = Vec::new();
        while let Some(output) = outputs.next().await {
            text.extend_from_slice(&output.map_err(broken)?.data);
            let said = String::from_utf8_lossy(&text);
            if let Some(at) = said.find(pattern) {
                let begin = said[..at].rfind('\n').map_or(0, |newline| newline + 1);
                let end = said[at..].find('\n').map_or(said.len(), |newline| at + newline);
                return Ok(said[begin..end].trim_end().to_owned());
            }
            let surplus = text.len().saturating_sub(CONSOLE_MAX);
            text.drain(..surplus);
        }
        Err(Failure::new(Code::Internal, format!("the console of the restored guest ended before it said {pattern:?}")))
    }

    /// Removes the VM of a drill, if it came to be.
    pub(super) async fn destroy(&self, actor: &str, vm: &str) -> Result<(), Failure> {
        let state = self.ledger.state();
        if !state.vms.get(vm).is_some_and(|vm| vm.drill) {
            return Ok(());
        }
        let plan = plans::power(&state, vm, |_| Task::Remove)?;
        self.sagas
            .begin(actor, plan)
            .await?
            .ended()
            .await
            .map_err(|failure| failure.at("the drill's VM is still there"))
    }

    /// Removes what drills of a controller before this one left.
    pub async fn clear_drills(&self, actor: &str) {
        let state = self.ledger.state();
        for vm in state.vms.values().filter(|vm| vm.drill) {
            if let Err(failure) = self.destroy(actor, &vm.name).await {
                tracing::warn!(vm = vm.name, %failure, "left by a drill; `ctl vm rm` removes it");
            }
        }
    }
}

fn ms(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}

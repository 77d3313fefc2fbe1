//! Recordings: begun, ended, shown and removed for operators, and taken block by block from hosts.
//!
//! The ledger says which recordings there are; a host records what the ledger knows. Blocks are taken from the host that
//! holds the VM alone, and from the one before it while a hand-over is being finished, because both have the same chain.
//! Whoever is refused is told why, and the recording ends in the ledger: what was taken until then can be visited.

use std::time::Duration;

use proto::ids::{Generation, OperationId, RecordingId, VmId};
use proto::status::Code;
use proto::v1::{
    AppendJournalReply, AppendJournalRequest, HostInfo, JournalFull, ListRecordingsReply, RecordRequest,
    RecordedSegment, RecordingInfo, RecordingName, RecordingRecord, StartRecordingReply, StartRecordingRequest, VmInfo,
    VmState,
};

use super::plans::unknown_vm;
use super::{Api, visits};
use crate::failure::Failure;
use crate::ingest::owner::Claim;
use crate::journal::{Appended, BLOCKS_MAX};
use crate::ledger::event::{Event, Intent, Plan, Task};
use crate::ledger::recording::Recording;
use crate::ledger::saved::to_hex;
use crate::ledger::state::{State, Vm};
use crate::ledger::{LedgerError, unix_ms};
use crate::tls::Identity;

/// How long the end of a recording waits for its last blocks, and how often it looks.
const LAST_BLOCKS: Duration = Duration::from_secs(10);
const LAST_BLOCKS_LOOK: Duration = Duration::from_millis(20);
/// How long an agent may take to begin or end a recording.
const RECORD_MAX: Duration = Duration::from_secs(30);
/// The engine whose machines can be recorded: their time is the count of their instructions.
const ENGINE: &str = "soft";

/// Whose the blocks are that a host sends.
#[derive(Debug, PartialEq, Eq)]
struct Sender {
    vm_id: String,
    /// The generation in whose name they are stored, and the one with which this cluster got the VM.
    generation: u64,
    since: u64,
}

/// Whose the blocks are that a host sends, if it may send them.
fn sender(state: &State, host: &str, request: &AppendJournalRequest) -> Result<Sender, Failure> {
    let AppendJournalRequest { vm: name, generation, .. } = request;
    let vm = state.vms.get(name);
    let of = |vm: &Vm| Sender { vm_id: vm.id.clone(), generation: vm.generation, since: vm.since };
    if let Some(vm) = vm.filter(|vm| vm.host == host && vm.generation == *generation) {
        return Ok(of(vm));
    }
    // Committed, but not over: what the old holder had kept it may still bring.
    let operation = state.operation_of(name).filter(|operation| operation.committed());
    let held = operation.map(|operation| &operation.plan).filter(|plan| {
        let holder = plan.holder.as_ref();
        let goes = matches!(plan.task, Task::Migrate { .. } | Task::Restore { .. } | Task::Remove);
        goes && holder.is_some_and(|holder| holder.host == host && holder.generation == *generation)
    });
    let gone = |plan: &Plan| Sender { vm_id: plan.vm_id.clone(), generation: *generation, since: *generation };
    held.map(|plan| vm.map_or_else(|| gone(plan), |vm| of(vm))).ok_or_else(|| {
        let text = format!("{host} may not bring blocks of {name} (generation {generation}): it does not hold it");
        Failure::new(Code::Denied, text)
    })
}

/// Whether a VM can be recorded.
///
/// # Errors
/// [`Code::Conflict`], [`Code::Incapable`].
fn recordable(state: &State, vm: &Vm) -> Result<(), Failure> {
    let name = &vm.name;
    if vm.config.engine != ENGINE {
        let text = format!("{name} runs on engine {}: only the software engine is deterministic", vm.config.engine);
        return Err(
            Failure::new(Code::Incapable, text).hint(format!("`ctl migrate {name} --to HOST --engine soft` first"))
        );
    }
    if let Some(disk) = vm.config.disks.iter().find(|disk| disk.shared) {
        let text = format!("{name} has the shared disk {}: others may change what it reads there", disk.path);
        return Err(Failure::new(Code::Incapable, text).hint("only disks that travel with the VM can be recorded"));
    }
    let conflict = |text: String| Err(Failure::new(Code::Conflict, text));
    if vm.intent == Intent::Stopped || vm.creating {
        return conflict(format!("{name} does not run"));
    }
    if !vm.pages_from.is_empty() {
        return conflict(format!("pages of {name} still come from checkpoint {}; ask again later", vm.pages_from));
    }
    match state.operation_of(name) {
        Some(operation) if !matches!(operation.plan.task, Task::Checkpoint { .. }) => {
            conflict(format!("operation {} ({}) holds {name}", operation.id, operation.plan.task.label()))
        }
        _ => Ok(()),
    }
}

impl Api {
    /// Takes blocks from a host.
    ///
    /// # Errors
    /// [`Code::Denied`] for a host that does not hold the VM; the bucket's: asking again later may help.
    pub(super) async fn append(
        &self,
        from: &Identity,
        request: AppendJournalRequest,
    ) -> Result<AppendJournalReply, Failure> {
        let state = self.ledger.state();
        let Sender { vm_id, generation, since } = sender(&state, &from.name, &request)?;
        let refused = |why: String| AppendJournalReply { next_sequence: 0, refused: why };
        let id = to_hex(&request.recording);
        let Some(recording) = state.recordings.get(&id).filter(|recording| recording.vm_id == vm_id) else {
            return Ok(refused(format!("the controller knows no recording {id} of {}", request.vm)));
        };
        let (vm, of) = ids(recording)?;
        let claim = self.sagas.world().named(Claim {
            vm_id: vm_id.clone(),
            vm: request.vm.clone(),
            generation: Generation(generation),
            since: Generation(since),
            cluster: state.cluster.clone(),
            name: String::new(),
        });
        let AppendJournalRequest { vm: name, blocks, .. } = request;
        let frames = blocks.into_iter().take(BLOCKS_MAX).collect();
        let appended = match self.journals.append(vm, of, &claim, frames).await {
            // Another cluster has the VM, or what lies there is none of ours.
            Err(failure) if matches!(failure.code, Code::Conflict | Code::Corrupt) => {
                Appended::Refused(failure.message)
            }
            appended => appended?,
        };
        match appended {
            Appended::Below { next, ended } => {
                if !ended.is_empty() && recording.ended.is_empty() {
                    self.note_ended(&format!("host/{}", from.name), recording, &ended).await?;
                }
                Ok(AppendJournalReply { next_sequence: next, refused: String::new() })
            }
            Appended::Refused(why) => {
                tracing::warn!(host = from.name, vm = name, recording = id, why, "blocks are refused");
                self.note_ended(&format!("host/{}", from.name), recording, &why).await?;
                Ok(refused(why))
            }
        }
    }

    /// Ends a recording in the ledger, unless it has ended.
    async fn note_ended(&self, actor: &str, recording: &Recording, why: &str) -> Result<(), Failure> {
        let Recording { id, vm, .. } = recording;
        let event = Event::RecordingEnded { vm: vm.clone(), recording: id.clone(), why: why.to_owned() };
        match self.ledger.append(actor, event).await {
            Ok(_) | Err(LedgerError::Refused(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Recordings of which their host says that they have ended.
    pub(super) async fn note_recordings(&self, report: &HostInfo) -> Result<(), Failure> {
        let state = self.ledger.state();
        for info in &report.vms {
            let vm = state.vms.get(&info.name);
            let vm = vm.filter(|vm| vm.host == report.name && vm.generation == info.generation);
            let Some(recording) = vm.and_then(|vm| state.recording_of(&vm.id)) else { continue };
            if let Some(why) = over(recording, info) {
                self.note_ended(&format!("host/{}", report.name), recording, &why).await?;
            }
        }
        Ok(())
    }

    /// Begins to record a VM, or says that it is recorded.
    ///
    /// # Errors
    /// Why it cannot be; the host's.
    pub(super) async fn start_to_record(
        &self,
        operator: &Identity,
        asked: StartRecordingRequest,
    ) -> Result<StartRecordingReply, Failure> {
        let state = self.ledger.state();
        let vm = state.vms.get(&asked.vm).ok_or_else(|| unknown_vm(&asked.vm))?;
        recordable(&state, vm)?;
        let full = match asked.full() {
            JournalFull::Unspecified => JournalFull::Wait,
            full => full,
        };
        let (id, full) = match state.recording_of(&vm.id) {
            Some(there) => (there.id.clone(), there.full),
            None => {
                let id = RecordingId(crate::entropy::bytes()).to_string();
                let event = Event::RecordingBegan { vm: vm.name.clone(), recording: id.clone(), full: full.into() };
                self.ledger.append(&operator.to_string(), event).await?;
                (id, full.into())
            }
        };
        let state = self.ledger.state();
        let recording = state.recordings.get(&id).ok_or_else(|| unknown(&asked.vm, &id))?;
        if let Err(failure) = self.tell(vm, recording, full).await {
            // Whether it records is not known if it did not answer: then the same recording is asked for again.
            if !failure.passes() {
                let why = format!("it could not begin: {}", failure.message);
                self.note_ended(&operator.to_string(), recording, &why).await?;
            }
            return Err(failure);
        }
        let record = self.recording(recording).await;
        let wants_checkpoint = !record.segments.iter().any(|segment| !segment.checkpoint.is_empty());
        Ok(StartRecordingReply { recording: Some(record), wants_checkpoint })
    }

    /// Tells a VM's host to record it.
    async fn tell(&self, vm: &Vm, recording: &Recording, full: i32) -> Result<VmInfo, Failure> {
        let (_, id) = ids(recording)?;
        let request = RecordRequest {
            vm: vm.name.clone(),
            generation: vm.generation,
            operation: OperationId(crate::entropy::bytes()).to_string(),
            recording: id.0.to_vec(),
            full,
            kept_bytes_max: 0,
        };
        self.record(&vm.host, request).await
    }

    async fn record(&self, host: &str, request: RecordRequest) -> Result<VmInfo, Failure> {
        let info = self.agents.call(host, RECORD_MAX, async |mut agent| agent.record(request).await).await?;
        self.agents.observe(host, &info);
        Ok(info)
    }

    /// Ends a VM's recording.
    ///
    /// # Errors
    /// [`Code::Conflict`] if it has none; the host's.
    pub(super) async fn stop_recording_of(&self, operator: &Identity, name: &str) -> Result<RecordingRecord, Failure> {
        let state = self.ledger.state();
        let vm = state.vms.get(name).ok_or_else(|| unknown_vm(name))?;
        let Some(recording) = state.recording_of(&vm.id) else {
            let text = format!("{name} is not recorded");
            return Err(Failure::new(Code::Conflict, text).hint(format!("`ctl record start {name}` begins to")));
        };
        let request = RecordRequest {
            vm: vm.name.clone(),
            generation: vm.generation,
            operation: OperationId(crate::entropy::bytes()).to_string(),
            ..RecordRequest::default()
        };
        match self.record(&vm.host, request).await {
            // What has no runner records nothing.
            Err(failure) if failure.code != Code::NotFound => return Err(failure),
            Err(_) => {}
            Ok(_) => self.until_ended(&recording.id).await,
        }
        self.note_ended(&operator.to_string(), recording, "stopped by the operator").await?;
        let state = self.ledger.state();
        let ended = state.recordings.get(&recording.id).ok_or_else(|| unknown(name, &recording.id))?;
        Ok(self.recording(ended).await)
    }

    /// The last blocks are on their way, and who stops a recording wants to find them in it; but not for ever.
    async fn until_ended(&self, id: &str) {
        let ended = |state: &State| state.recordings.get(id).is_none_or(|recording| !recording.ended.is_empty());
        let waited = async {
            while !ended(&self.ledger.state()) {
                tokio::time::sleep(LAST_BLOCKS_LOOK).await;
            }
        };
        // Blocks that come later are taken all the same.
        let _in_time = tokio::time::timeout(LAST_BLOCKS, waited).await;
    }

    /// The recordings of a VM, or all, the oldest first.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub(super) async fn recordings(&self, name: &str) -> Result<ListRecordingsReply, Failure> {
        let state = self.ledger.state();
        let wanted = match name {
            "" => None,
            name => Some(state.id_of(name).ok_or_else(|| unknown_vm(name))?),
        };
        let mut found: Vec<_> = state.recordings.values().filter(|r| wanted.is_none_or(|id| r.vm_id == id)).collect();
        found.sort_by_key(|recording| (&recording.vm, recording.started_unix_ms, &recording.id));
        let mut recordings = Vec::new();
        for recording in found {
            recordings.push(self.recording(recording).await);
        }
        Ok(ListRecordingsReply { recordings })
    }

    /// Removes a recording that has ended.
    ///
    /// # Errors
    /// [`Code::NotFound`], [`Code::Conflict`]; the bucket's.
    pub(super) async fn remove_recording_of(&self, operator: &Identity, asked: &RecordingName) -> Result<(), Failure> {
        let state = self.ledger.state();
        let vm_id = state.id_of(&asked.vm).ok_or_else(|| unknown_vm(&asked.vm))?;
        let recording = state.recordings.get(&asked.recording).filter(|recording| recording.vm_id == vm_id);
        let recording = recording.ok_or_else(|| unknown(&asked.vm, &asked.recording))?;
        if recording.ended.is_empty() {
            let text = format!("recording {} of {} goes on", recording.id, recording.vm);
            return Err(Failure::new(Code::Conflict, text).hint(format!("`ctl record stop {}` ends it", recording.vm)));
        }
        let (vm, id) = ids(recording)?;
        self.journals.remove(vm, id).await?;
        let event = Event::RecordingRemoved { vm: recording.vm.clone(), recording: recording.id.clone() };
        self.ledger.append(&operator.to_string(), event).await?;
        Ok(())
    }

    /// How a recording is shown.
    pub(super) async fn recording(&self, recording: &Recording) -> RecordingRecord {
        let state = self.ledger.state();
        let visited = visits::visited(&self.journals, &state, recording).await;
        let (mut segments, mut problems) = (Vec::new(), Vec::new());
        let mut newest_ns = 0;
        match visited {
            Err(failure) => problems.push(failure.message),
            Ok(visited) => {
                newest_ns = visited.tape.segments.last().map_or(0, |segment| segment.end_ns);
                let shown = visited.tape.segments.iter().zip(visited.bases);
                segments = shown.map(|(segment, base)| shown_segment(segment, base)).collect();
                problems = visited.tape.problems;
            }
        }
        let Recording { id, vm, vm_id, started_unix_ms, full, ended, ended_unix_ms } = recording.clone();
        let lag_ms =
            if ended.is_empty() && newest_ns > 0 { unix_ms().saturating_sub(newest_ns / 1_000_000) } else { 0 };
        let host = self.host_word(&state, recording);
        RecordingRecord { id, vm, vm_id, started_unix_ms, ended, ended_unix_ms, full, segments, lag_ms, problems, host }
    }

    fn host_word(&self, state: &State, recording: &Recording) -> Option<RecordingInfo> {
        let vm = state.vms.get(&recording.vm).filter(|vm| vm.id == recording.vm_id)?;
        let said = self.agents.observed(&vm.host, &vm.name)?.recording?;
        (to_hex(&said.recording) == recording.id).then_some(said)
    }
}

fn shown_segment(segment: &crate::journal::segment::Segment, base: Option<String>) -> RecordedSegment {
    RecordedSegment {
        first_sequence: segment.first,
        next_sequence: segment.next,
        checkpoint: base.unwrap_or_default(),
        start: Some(segment.start),
        end: Some(segment.end),
        start_unix_ns: segment.start_ns,
        end_unix_ns: segment.end_ns,
        bytes: segment.bytes(),
        objects: segment.parts.len() as u32,
        semantics: segment.cut.as_ref().map_or(0, |cut| cut.semantics),
    }
}

/// Why a recording is over, by what its host says of the VM, if it is.
fn over(recording: &Recording, info: &VmInfo) -> Option<String> {
    match &info.recording {
        Some(said) if to_hex(&said.recording) == recording.id => (!said.ended.is_empty()).then(|| said.ended.clone()),
        // A guest that has no process any more is not recorded any more.
        _ if matches!(info.state(), VmState::Crashed | VmState::Stopped) => Some("the guest has ended".into()),
        _ => None,
    }
}

/// The ids of a recording.
///
/// # Errors
/// [`Code::Internal`]: the ledger holds what is none.
pub(super) fn ids(recording: &Recording) -> Result<(VmId, RecordingId), Failure> {
    let bad = || Failure::new(Code::Internal, format!("recording {} of {} has no id", recording.id, recording.vm_id));
    Ok((recording.vm_id.parse().map_err(|_| bad())?, recording.id.parse().map_err(|_| bad())?))
}

fn unknown(vm: &str, id: &str) -> Failure {
    Failure::new(Code::NotFound, format!("there is no recording {id} of {vm}"))
        .hint(format!("`ctl record ls {vm}` names them"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::event::Outcome;
    use crate::ledger::tests::{append, begin, migrate_plan, running_vm, simple_plan};
    use proto::v1::DiskConfig;
    use std::sync::Arc;

    fn request(generation: u64) -> AppendJournalRequest {
        AppendJournalRequest { vm: "vm1".into(), generation, ..AppendJournalRequest::default() }
    }

    #[test]
    fn only_the_holder_brings_blocks_and_the_one_before_it_while_a_hand_over_ends() {
        let mut state = running_vm("hostA");
        let may = |state: &State, host: &str, generation| sender(state, host, &request(generation)).is_ok();
        assert!(may(&state, "hostA", 1));
        for (host, generation) in [("hostB", 1), ("hostA", 0), ("hostA", 2)] {
            assert!(!may(&state, host, generation), "{host} {generation}");
        }
        let plan = migrate_plan(&state, "hostB");
        begin(&mut state, "op2", plan);
        assert!(may(&state, "hostA", 1) && !may(&state, "hostB", 2));
        for step in 0..2 {
            append(&mut state, Event::StepDone { operation: "op2".into(), step }).unwrap();
        }
        append(&mut state, Event::Committed { operation: "op2".into(), result: Box::new(Outcome::AsPlanned) }).unwrap();
        assert!(may(&state, "hostA", 1) && may(&state, "hostB", 2) && !may(&state, "hostA", 2));
        for step in 3..5 {
            append(&mut state, Event::StepDone { operation: "op2".into(), step }).unwrap();
        }
        assert!(!may(&state, "hostA", 1) && may(&state, "hostB", 2));
        // What a guest that is removed leaves behind is brought while it is being removed.
        let plan = simple_plan(&state, "vm1", Task::Remove);
        begin(&mut state, "op3", plan);
        append(&mut state, Event::Committed { operation: "op3".into(), result: Box::new(Outcome::AsPlanned) }).unwrap();
        assert!(!state.vms.contains_key("vm1") && may(&state, "hostB", 2) && !may(&state, "hostA", 1));
        append(&mut state, Event::StepDone { operation: "op3".into(), step: 1 }).unwrap();
        assert!(!may(&state, "hostB", 2));
    }

    #[test]
    fn what_is_not_deterministic_is_not_recorded() {
        let state = running_vm("hostA");
        let with = |change: &dyn Fn(&mut Vm)| {
            let mut vm = Vm::clone(&state.vms["vm1"]);
            change(&mut vm);
            recordable(&state, &vm).map_err(|failure| failure.code)
        };
        assert_eq!(with(&|_| ()), Ok(()));
        let shared = DiskConfig { shared: true, read_only: true, ..DiskConfig::default() };
        assert_eq!(with(&|vm| vm.config.disks = vec![shared.clone()]), Err(Code::Incapable));
        assert_eq!(with(&|vm| vm.config.engine = "kvm".into()), Err(Code::Incapable));
        assert_eq!(with(&|vm| vm.intent = Intent::Stopped), Err(Code::Conflict));
        assert_eq!(with(&|vm| vm.pages_from = "c1".into()), Err(Code::Conflict));
        let mut moving = state.clone();
        let plan = migrate_plan(&moving, "hostB");
        begin(&mut moving, "op2", plan);
        assert_eq!(recordable(&moving, &Arc::clone(&state.vms["vm1"])).unwrap_err().code, Code::Conflict);
    }

    #[test]
    fn a_host_that_says_that_a_recording_ended_is_believed_about_that_one_alone() {
        let recording = Recording {
            id: "ab".repeat(16),
            vm: "vm1".into(),
            vm_id: String::new(),
            started_unix_ms: 0,
            full: 1,
            ended: String::new(),
            ended_unix_ms: 0,
        };
        let info = |id: u8, ended: &str| {
            let recording = RecordingInfo { recording: vec![id; 16], ended: ended.into(), ..RecordingInfo::default() };
            VmInfo { recording: Some(recording), state: VmState::Running.into(), ..VmInfo::default() }
        };
        assert_eq!(over(&recording, &info(0xab, "no room")), Some("no room".into()));
        assert_eq!(over(&recording, &info(0xab, "")), None);
        assert_eq!(over(&recording, &info(0xac, "no room")), None);
        assert_eq!(over(&recording, &VmInfo { state: VmState::Running.into(), ..VmInfo::default() }), None);
        assert!(over(&recording, &VmInfo { state: VmState::Crashed.into(), ..VmInfo::default() }).is_some());
    }
}

//! A guest's process, seen from the agent: start it, find it again, talk to it.
//!
//! ```text
//! spawn vm-runner --dir D   ->   connect D/runner.sock   ->   attach: configuration, state, descriptors (SCM_RIGHTS)
//! request(id) / reply(id), any number under way; id 0: the console said something, the state changed by itself
//! ```
//! The process outlives the agent; the next one connects to the same socket. Every request has a deadline. Refuses to
//! decide anything about the VM: it reports to its actor.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::frame::{Kind, encode_message};
use proto::status::Code;
use proto::v1::runner_debug::Ask;
use proto::v1::runner_reply::Reply;
use proto::v1::runner_request::Request;
use proto::v1::{
    MachineConfig, RunnerAdvanceEpoch, RunnerApply, RunnerAttach, RunnerCapture, RunnerConsoleOutput, RunnerDebug,
    RunnerFreeze, RunnerFrozen, RunnerLease, RunnerLook, RunnerMapping, RunnerPause, RunnerReplay, RunnerReply,
    RunnerRequest, RunnerResume, RunnerSections, RunnerShutdown, RunnerState, RunnerStatus, RunnerStayFrozen,
    RunnerThaw, RunnerThrottle, VmState,
};
use rustix::process::{Pid, Signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use vmcb_engine::memory::Mapping;
use vmcb_engine::memory::shared::SharedPages;

use super::lazy::standing::Standing;
use crate::migration::source::Input;
use crate::migration::target::Replay;
use crate::migration::{Failure, SourceVm, Spaces, TargetVm};
use crate::runner::faults::Faults;
use crate::runner::open::{short_path, start_time};
use crate::runner::wire::{self, Inbox};

const START_DEADLINE: Duration = Duration::from_secs(20);
const CONNECT_STEP: Duration = Duration::from_millis(2);
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// Unpacking a kernel, capturing and applying state.
const LONG_CALL_DEADLINE: Duration = Duration::from_secs(60);
/// A guest that is held back runs free, and a frozen instant lapses, after so long without a word: several times what the
/// migration repeats it in.
const HELD_VALID_MS: u32 = 5_000;
const EXIT_DEADLINE: Duration = Duration::from_secs(2);
const CONSOLE_BACKLOG: usize = 1024;
const LOG_TAIL_BYTES: usize = 2000;

/// What a runner says of its own accord.
#[derive(Debug)]
pub enum Event {
    /// The state changed by itself.
    Changed(Box<RunnerState>),
    /// The connection ended.
    Gone,
}

/// A process, for ever: ids are used again, start times are not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    start: u64,
}

impl Process {
    /// The process that a VM's directory names, if it is alive.
    pub fn of(directory: &Path) -> Option<Process> {
        let text = std::fs::read_to_string(directory.join("runner.pid")).ok()?;
        let mut words = text.split_whitespace();
        let pid = words.next()?.parse().ok()?;
        let start = words.next()?.parse().ok()?;
        let process = Process { pid, start };
        process.is_alive().then_some(process)
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        let zombie = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
            stat.rsplit_once(')')
                .is_some_and(|(_, rest)| matches!(rest.trim_start().as_bytes().first(), Some(b'Z' | b'X')))
        };
        start_time(self.pid) == Some(self.start) && !zombie()
    }

    /// Ends it for good and waits until it is gone.
    pub async fn kill(self) {
        if !self.is_alive() {
            return;
        }
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            // It may end by itself in between.
            let _ended = rustix::process::kill_process(pid, Signal::KILL);
        }
        self.gone_within(EXIT_DEADLINE).await;
    }

    /// Ends it without waiting.
    pub fn end(self) {
        if self.is_alive()
            && let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw)
        {
            // It may end by itself in between.
            let _ended = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    async fn gone_within(self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.is_alive() {
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(CONNECT_STEP).await;
        }
        true
    }
}

/// Where the state of a guest comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrival {
    /// From nowhere: it boots.
    Boots,
    /// From outside, before it runs.
    Whole,
    /// From outside, RAM while it runs.
    Lazy,
}

/// How runners are started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Whether it jails itself.
    pub sandbox: bool,
    /// Where RAM lies; `None`: wherever the runner finds best.
    pub ram_dir: Option<PathBuf>,
}

struct Call {
    request: Request,
    reply: oneshot::Sender<Reply>,
}

/// A connection to a runner.
#[derive(Debug)]
pub struct Runner {
    calls: mpsc::Sender<Call>,
    /// Weak: when the conversation ends, those who listen to the console must hear that it did.
    console: broadcast::WeakSender<RunnerConsoleOutput>,
    directory: PathBuf,
    /// What the machine was built from.
    pub config: MachineConfig,
    /// State when it was attached.
    pub state: RunnerState,
    /// The process.
    pub process: Option<Process>,
    /// Whether it may go on, if pages of it are missing.
    pub standing: Arc<Standing>,
    descriptors: Vec<(String, OwnedFd)>,
    ram: Vec<Mapping>,
    changes: watch::Receiver<RunnerState>,
}

fn internal(text: impl std::fmt::Display) -> Failure {
    Failure::new(Code::Internal, text)
}

impl Runner {
    /// Starts a process for the VM of this directory and attaches to it.
    ///
    /// # Errors
    /// The program cannot be started, or it ended before it served; the text has its last words.
    pub async fn spawn(
        launch: &Launch,
        directory: &Path,
        arrival: Arrival,
        events: mpsc::UnboundedSender<Event>,
    ) -> Result<Runner, Failure> {
        let program = launch.program.display();
        let log_path = directory.join("runner.log");
        let open = || std::fs::OpenOptions::new().create(true).append(true).open(&log_path);
        let (out, err) = open().and_then(|out| Ok((out, open()?))).map_err(internal)?;
        for stale in ["runner.sock", "runner.pid"] {
            let _absent = std::fs::remove_file(directory.join(stale));
        }
        let mut command = tokio::process::Command::new(&launch.program);
        command.arg("--dir").arg(directory).arg("--sandbox").arg(launch.sandbox.to_string());
        if let Some(directory) = &launch.ram_dir {
            command.arg("--ram-dir").arg(directory);
        }
        match arrival {
            Arrival::Boots => {}
            Arrival::Whole => {
                command.arg("--incoming");
            }
            Arrival::Lazy => {
                command.arg("--incoming").arg("--lazy");
            }
        }
        command.current_dir("/").stdin(Stdio::null()).stdout(out).stderr(err).kill_on_drop(false);
        let mut child = command.spawn().map_err(|error| internal(format!("{program}: {error}")))?;
        let (ended, mut exit) = watch::channel(None);
        tokio::spawn(async move {
            let status = child.wait().await;
            let _nobody = ended.send(Some(status.map_or_else(|e| e.to_string(), |status| status.to_string())));
        });
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            if let Ok(runner) = Runner::connect(directory, events.clone()).await {
                return Ok(runner);
            }
            let status = exit.borrow_and_update().clone();
            if let Some(status) = status {
                let words = last_words(&log_path);
                return Err(Failure::new(Code::BadInput, format!("vm-runner ended ({status}): {words}")));
            }
            if Instant::now() > deadline {
                return Err(internal(format!("{program} does not serve its socket: {}", last_words(&log_path))));
            }
            let _ended_or_time = tokio::time::timeout(CONNECT_STEP, exit.changed()).await;
        }
    }

    /// Attaches to the process that serves a VM's directory.
    ///
    /// # Errors
    /// There is none, or it does not speak our language.
    pub async fn connect(directory: &Path, events: mpsc::UnboundedSender<Event>) -> Result<Runner, Failure> {
        // Addresses of sockets are short; a path through the directory's descriptor always fits.
        let handle = File::open(directory).map_err(internal)?;
        let mut stream = UnixStream::connect(short_path(&handle, "runner.sock")).await.map_err(internal)?;
        let (attached, inbox) = tokio::time::timeout(CALL_DEADLINE, attach(&mut stream))
            .await
            .map_err(|_| Failure::new(Code::Unreachable, "the runner does not answer"))??;
        let (calls, mailbox) = mpsc::channel(64);
        let (console, _) = broadcast::channel(CONSOLE_BACKLOG);
        let listeners = console.downgrade();
        let Attached { config, state, descriptors, ram } = attached;
        let (changed, changes) = watch::channel(state.clone());
        let pending = HashMap::new();
        let conversation = Conversation { stream, inbox, pending, next_id: 2, console, events, changed };
        tokio::spawn(conversation.run(mailbox));
        let (process, standing) = (Process::of(directory), Arc::default());
        let directory = directory.to_owned();
        Ok(Runner { calls, console: listeners, directory, config, state, process, standing, descriptors, ram, changes })
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// The runner refuses, is gone, or does not answer in time.
    pub async fn call(&self, request: Request) -> Result<Reply, Failure> {
        let limit = match request {
            Request::Boot(_) | Request::Capture(_) | Request::Apply(_) | Request::Freeze(_) => LONG_CALL_DEADLINE,
            _ => CALL_DEADLINE,
        };
        let gone = || Failure::new(Code::Unreachable, "the guest's process is gone");
        let stalled = |page| Failure::new(Code::Unreachable, format!("the guest waits for page {page} of its RAM"));
        if let Some(page) = self.standing.stalled() {
            // Its thread sleeps: it would answer after that page has come.
            return Err(stalled(page));
        }
        let (reply, answer) = oneshot::channel();
        self.calls.send(Call { request, reply }).await.map_err(|_| gone())?;
        let answered = tokio::select! {
            biased;
            answered = tokio::time::timeout(limit, answer) => answered,
            page = self.standing.until_stalled() => return Err(stalled(page)),
        };
        match answered {
            Ok(Ok(Reply::Failure(failure))) => Err(Failure::new(Code::from_number(failure.code), failure.message)),
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Err(gone()),
            Err(_) => {
                Err(Failure::new(Code::Unreachable, format!("the guest's process did not answer within {limit:?}")))
            }
        }
    }

    async fn state_after(&self, request: Request) -> Result<RunnerState, Failure> {
        match self.call(request).await? {
            Reply::State(state) => Ok(state),
            _ => Err(Failure::new(Code::Protocol, "the runner answered something else")),
        }
    }

    /// Pauses between two instructions.
    ///
    /// # Errors
    /// As [`Runner::call`].
    pub async fn pause(&self, reason: &str) -> Result<RunnerState, Failure> {
        if self.standing.hold() {
            // It stands still, and nothing that it waits for comes before it is resumed.
            let reason = format!("{reason}, while it waited for a page");
            return Ok(RunnerState { state: VmState::Paused.into(), reason, ..self.state.clone() });
        }
        self.state_after(Request::Pause(RunnerPause { reason: reason.to_owned() })).await
    }

    /// Lets the guest go on.
    ///
    /// # Errors
    /// As [`Runner::call`].
    pub async fn resume(&self) -> Result<RunnerState, Failure> {
        self.standing.release();
        if self.standing.stalled().is_some() {
            return Ok(RunnerState { state: VmState::Running.into(), reason: String::new(), ..self.state.clone() });
        }
        self.state_after(Request::Resume(RunnerResume {})).await
    }

    /// Sets the lease: an instant of `CLOCK_BOOTTIME`, 0 for no limit.
    ///
    /// # Errors
    /// As [`Runner::call`].
    pub async fn lease(&self, until_boottime_ns: u64) -> Result<RunnerState, Failure> {
        // A guest that sleeps on a missing page hears it afterwards; until then this is what its pages come by.
        self.standing.lease(until_boottime_ns);
        self.state_after(Request::Lease(RunnerLease { until_boottime_ns })).await
    }

    /// What it sleeps on: the faults, and where its RAM lies.
    ///
    /// # Errors
    /// It has no missing pages.
    pub fn missing(&self) -> Result<(Faults, Vec<Mapping>), Failure> {
        Ok((Faults::from_descriptor(self.descriptor("faults")?), self.ram.clone()))
    }

    /// How it is.
    ///
    /// # Errors
    /// As [`Runner::call`].
    pub async fn status(&self) -> Result<RunnerState, Failure> {
        self.state_after(Request::Status(RunnerStatus {})).await
    }

    /// What a debugger asks, where the answer is how the guest stands then.
    ///
    /// # Errors
    /// As [`Runner::call`].
    pub async fn debug(&self, ask: Ask) -> Result<RunnerState, Failure> {
        self.state_after(Request::Debug(RunnerDebug { ask: Some(ask) })).await
    }

    /// The state each time that it changed by itself, at first as it was attached.
    pub fn changes(&self) -> watch::Receiver<RunnerState> {
        self.changes.clone()
    }

    /// Ends the process, by word and then by force.
    pub async fn end(&self) {
        let asked = self.call(Request::Shutdown(RunnerShutdown {})).await;
        if let Some(process) = self.process.or_else(|| Process::of(&self.directory))
            && (asked.is_err() || !process.gone_within(EXIT_DEADLINE).await)
        {
            process.kill().await;
        }
    }

    /// Console output from now on; closed when the process is gone.
    pub fn console(&self) -> broadcast::Receiver<RunnerConsoleOutput> {
        self.console.upgrade().map_or_else(|| broadcast::channel(1).1, |console| console.subscribe())
    }

    /// RAM that the guest has touched, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let ram = self.descriptors.iter().find(|(name, _)| name == "ram");
        let blocks = ram.and_then(|(_, fd)| rustix::fs::fstat(fd).ok()).map_or(0, |stat| stat.st_blocks);
        u64::try_from(blocks).unwrap_or(0).saturating_mul(512)
    }

    /// The pages that travel: RAM, then local disks, then what the guest boots from.
    ///
    /// # Errors
    /// A descriptor is missing or too short.
    pub fn spaces(&self) -> Result<Spaces, Failure> {
        let pages = |name: &str, bytes: u64| {
            let data = self.descriptor(name)?;
            let stamps = self.descriptor(&format!("{name}-stamps"))?;
            let failed = |error| internal(format!("{name}: {error}"));
            let pages = SharedPages::new(data, stamps, bytes).map_err(failed)?;
            match self.descriptor(&format!("{name}-kept")) {
                Ok(kept) => pages.with_kept(kept).map_err(failed),
                // What the guest does not write, and any space of a runner of an earlier release.
                Err(_) => Ok(pages),
            }
        };
        let ram = pages("ram", self.config.memory_bytes)?;
        let local = self.config.disks.iter().enumerate().filter(|(_, disk)| !disk.shared);
        let disks = local.map(|(index, disk)| pages(&format!("disk{index}"), disk.size_bytes));
        let boot = self.config.boot.as_ref().map_or(0, |boot| boot.image_bytes);
        let boot = (boot > 0).then(|| pages("boot", boot));
        Ok(Spaces::new(ram, disks.chain(boot).collect::<Result<_, _>>()?))
    }

    fn descriptor(&self, name: &str) -> Result<OwnedFd, Failure> {
        let found = self.descriptors.iter().find(|(found, _)| found == name);
        let (_, fd) = found.ok_or_else(|| Failure::new(Code::Protocol, format!("the runner gave no {name}")))?;
        fd.try_clone().map_err(internal)
    }
}

fn last_words(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(LOG_TAIL_BYTES)..]).into_owned();
    tail.lines().last().unwrap_or("it said nothing").to_owned()
}

struct Attached {
    config: MachineConfig,
    state: RunnerState,
    descriptors: Vec<(String, OwnedFd)>,
    ram: Vec<Mapping>,
}

async fn attach(stream: &mut UnixStream) -> Result<(Attached, Inbox), Failure> {
    let request = RunnerRequest { id: 1, request: Some(Request::Attach(RunnerAttach {})) };
    stream.write_all(&encode_message(Kind::Control, &request)).await.map_err(internal)?;
    let (mut inbox, mut descriptors, mut bytes) = (Inbox::default(), Vec::new(), vec![0; 64 << 10]);
    loop {
        let received = stream
            .async_io(Interest::READABLE, || Ok(wire::receive(&*stream, &mut bytes, &mut descriptors)?))
            .await
            .map_err(internal)?;
        if received == 0 {
            return Err(Failure::new(Code::Unreachable, "the runner closed the connection"));
        }
        inbox.push(&bytes[..received]);
        let reply: Option<RunnerReply> = inbox.take().map_err(|error| Failure::new(Code::Protocol, error))?;
        match reply.and_then(|reply| reply.reply) {
            None => {}
            Some(Reply::Attached(attached)) => {
                if attached.descriptors.len() != descriptors.len() {
                    return Err(Failure::new(Code::Protocol, "descriptors are missing"));
                }
                let mapping = |m: &RunnerMapping| Mapping {
                    address: m.address as usize,
                    first_page: m.first_page,
                    pages: m.pages,
                };
                let attached = Attached {
                    config: attached.config.unwrap_or_default(),
                    state: attached.state.unwrap_or_default(),
                    ram: attached.ram.iter().map(mapping).collect(),
                    descriptors: attached.descriptors.into_iter().zip(descriptors).collect(),
                };
                return Ok((attached, inbox));
            }
            Some(other) => return Err(Failure::new(Code::Protocol, format!("{other:?} before the attach"))),
        }
    }
}

struct Conversation {
    stream: UnixStream,
    inbox: Inbox,
    pending: HashMap<u64, oneshot::Sender<Reply>>,
    next_id: u64,
    console: broadcast::Sender<RunnerConsoleOutput>,
    events: mpsc::UnboundedSender<Event>,
    changed: watch::Sender<RunnerState>,
}

impl Conversation {
    async fn run(mut self, mut mailbox: mpsc::Receiver<Call>) {
        if let Err(error) = self.talk(&mut mailbox).await {
            tracing::debug!(%error, "conversation with a runner ended");
        }
        let _actor_ended = self.events.send(Event::Gone);
    }

    async fn talk(&mut self, mailbox: &mut mpsc::Receiver<Call>) -> Result<(), Failure> {
        let mut bytes = vec![0; 64 << 10];
        // The inbox may hold what came with the attach.
        self.take_replies()?;
        loop {
            tokio::select! {
                call = mailbox.recv() => {
                    let Some(Call { request, reply }) = call else { return Ok(()) };
                    let id = self.next_id;
                    self.next_id += 1;
                    let request = RunnerRequest { id, request: Some(request) };
                    if prost::Message::encoded_len(&request) > Kind::Control.body_bytes_max() {
                        let text = "the state is too large for one message".to_owned();
                        let refusal = proto::v1::RunnerFailure { code: Code::Exhausted as u32, message: text };
                        let _caller_left = reply.send(Reply::Failure(refusal));
                        continue;
                    }
                    self.pending.insert(id, reply);
                    self.stream.write_all(&encode_message(Kind::Control, &request)).await.map_err(internal)?;
                }
                read = self.stream.read(&mut bytes) => {
                    match read.map_err(internal)? {
                        0 => return Err(internal("closed")),
                        count => self.inbox.push(&bytes[..count]),
                    }
                    self.take_replies()?;
                }
            }
        }
    }

    fn take_replies(&mut self) -> Result<(), Failure> {
        while let Some(reply) = self.inbox.take::<RunnerReply>().map_err(|e| Failure::new(Code::Protocol, e))? {
            match (reply.id, reply.reply) {
                (0, Some(Reply::Console(output))) => drop(self.console.send(output)),
                (0, Some(Reply::Changed(state))) => {
                    self.changed.send_replace(state.clone());
                    drop(self.events.send(Event::Changed(Box::new(state))));
                }
                (id, Some(reply)) => {
                    if let Some(caller) = self.pending.remove(&id) {
                        let _caller_left = caller.send(reply);
                    }
                }
                (_, None) => return Err(Failure::new(Code::Protocol, "a reply without content")),
            }
        }
        Ok(())
    }
}

/// A VM that leaves, for the migration.
#[derive(Debug)]
pub struct Leaving {
    /// Its runner.
    pub runner: Arc<Runner>,
    /// It was paused by an operator: nothing resumes it here.
    pub paused: bool,
}

impl Leaving {
    fn sections(reply: Reply) -> Result<RunnerSections, Failure> {
        match reply {
            Reply::Sections(sections) => Ok(sections),
            _ => Err(Failure::new(Code::Protocol, "the runner answered something else")),
        }
    }
}

impl SourceVm for Leaving {
    async fn advance_epoch(&mut self) -> Result<u32, Failure> {
        match self.runner.call(Request::AdvanceEpoch(RunnerAdvanceEpoch {})).await? {
            Reply::Epoch(epoch) => Ok(epoch.epoch),
            _ => Err(Failure::new(Code::Protocol, "the runner answered something else")),
        }
    }

    async fn look(&mut self) -> Result<(), Failure> {
        match self.runner.call(Request::Look(RunnerLook {})).await {
            // A runner of an earlier release knows no looks: its stamps are as old as the epoch, and that does no harm.
            Err(failure) if failure.code == Code::Protocol => Ok(()),
            looked => looked.map(drop),
        }
    }

    async fn throttle(&mut self, percent: u32) -> Result<(), Failure> {
        self.runner.state_after(Request::Throttle(RunnerThrottle { percent, valid_ms: HELD_VALID_MS })).await.map(drop)
    }

    async fn stop(&mut self) -> Result<(), Failure> {
        let state = self.runner.pause("handing over").await?;
        match state.state() {
            VmState::Paused => Ok(()),
            _ => Err(Failure::new(Code::Conflict, format!("the guest has ended: {}", state.reason))),
        }
    }

    async fn capture(&mut self) -> Result<Vec<proto::v1::Section>, Failure> {
        Ok(Leaving::sections(self.runner.call(Request::Capture(RunnerCapture {})).await?)?.sections)
    }

    async fn freeze(&mut self, mark: u32) -> Result<Input, Failure> {
        let request = Request::Freeze(RunnerFreeze { mark, valid_ms: HELD_VALID_MS });
        match self.runner.call(request).await? {
            Reply::Frozen(RunnerFrozen { epoch, sections, stopped_us }) => {
                Ok(Input::Frozen { epoch, sections, stopped_us })
            }
            _ => Err(Failure::new(Code::Protocol, "the runner answered something else")),
        }
    }

    async fn stay_frozen(&mut self) -> Result<(), Failure> {
        self.runner.state_after(Request::StayFrozen(RunnerStayFrozen { valid_ms: HELD_VALID_MS })).await.map(drop)
    }

    async fn thaw(&mut self) -> Result<(), Failure> {
        self.runner.state_after(Request::Thaw(RunnerThaw {})).await.map(drop)
    }

    async fn resume(&mut self) -> Result<(), Failure> {
        if !self.paused {
            self.runner.resume().await?;
        }
        Ok(())
    }
}

/// Blocks of a recording that are handed to a runner at once, bytes.
const REPLAY_BATCH_BYTES: usize = 4 << 20;
/// How often is looked how far a replay is.
const REPLAY_LOOK: std::time::Duration = std::time::Duration::from_millis(50);

/// A VM that arrives, for the migration.
#[derive(Debug)]
pub struct Arriving {
    /// Its runner, without state.
    pub runner: Arc<Runner>,
}

impl TargetVm for Arriving {
    async fn apply(&mut self, sections: Vec<proto::v1::Section>) -> Result<(), Failure> {
        self.runner.state_after(Request::Apply(RunnerApply { sections })).await.map(drop)
    }

    async fn capture(&mut self) -> Result<Vec<proto::v1::Section>, Failure> {
        Ok(Leaving::sections(self.runner.call(Request::Capture(RunnerCapture {})).await?)?.sections)
    }

    async fn replay(&mut self, replay: Replay) -> Result<(), Failure> {
        let Replay { blocks, until } = replay;
        let mut batch = RunnerReplay::default();
        let mut bytes = 0;
        for block in blocks {
            if bytes + block.len() > REPLAY_BATCH_BYTES && bytes > 0 {
                self.runner.state_after(Request::Replay(std::mem::take(&mut batch))).await?;
                bytes = 0;
            }
            bytes += block.len();
            batch.blocks.push(block.into());
        }
        batch.until = Some(until);
        let mut state = self.runner.state_after(Request::Replay(batch)).await?;
        while state.replaying.is_some() {
            tokio::time::sleep(REPLAY_LOOK).await;
            state = self.runner.status().await?;
        }
        match state.state() {
            VmState::Crashed | VmState::Stopped => Err(Failure::new(Code::Corrupt, state.reason)),
            _ => Ok(()),
        }
    }
}

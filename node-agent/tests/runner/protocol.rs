//! The runner's socket: the agent's own client, and hostile ones, against a scripted guest behind the real I/O thread.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::scripted::{Act, Kernel, Scripted, Shared, terms};
use node_agent::clock::HostClock;
use node_agent::runner::console::Log;
use node_agent::runner::driver::Driver;
use node_agent::runner::serve::{Mailbox, Ports, join};
use node_agent::vm::runner::{Event, Runner};
use proto::frame::{Kind, encode, encode_message};
use proto::v1::runner_request::Request;
use proto::v1::{RunnerAttach, RunnerBoot, RunnerRequest, VmState};
use tokio::sync::mpsc;

static DIRECTORIES: AtomicU32 = AtomicU32::new(0);

struct Process {
    directory: PathBuf,
    seen: Shared,
    threads: Vec<std::thread::JoinHandle<()>>,
}

/// The threads of a runner, in this process.
fn start(script: impl IntoIterator<Item = Act>) -> Process {
    let number = DIRECTORIES.fetch_add(1, Ordering::Relaxed);
    let directory = std::env::temp_dir().join(format!("godwit-protocol-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let listener = UnixListener::bind(directory.join("runner.sock")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let log = File::options().create(true).append(true).open(directory.join("console.log")).unwrap();
    let ram = vmcb_engine::memory::GuestMemory::create(16 << 20).unwrap();
    let descriptors: Vec<OwnedFd> =
        vec![ram.ram_fd().try_clone_to_owned().unwrap(), ram.stamps_fd().try_clone_to_owned().unwrap()];
    let log = Log::new(log).unwrap();
    let ports = Ports { listener: listener.into(), log, taps: Vec::new(), descriptors, standing_answer: None };
    let (inputs, taken) = std::sync::mpsc::channel();
    let (server, outlet) = join(ports, Mailbox { inputs, bell: None }).unwrap();
    let (guest, seen) = Scripted::new(script);
    let io = std::thread::spawn(move || server.run());
    let machine = std::thread::spawn(move || {
        let images = Box::new(Kernel(b"kernel"));
        let mut driver = Driver::new(guest, HostClock, outlet, terms(false, &["ram", "ram-stamps"]), Some(images));
        driver.serve(&taken).unwrap();
    });
    Process { directory, seen, threads: vec![io, machine] }
}

impl Process {
    async fn connect(&self) -> (Runner, mpsc::UnboundedReceiver<Event>) {
        let (events, said) = mpsc::unbounded_channel();
        (Runner::connect(&self.directory, events).await.unwrap(), said)
    }

    async fn ended(self) {
        let threads = self.threads;
        tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| thread.join().unwrap()))
            .await
            .unwrap();
        std::fs::remove_dir_all(self.directory).unwrap();
    }
}

async fn boot(runner: &Runner) {
    runner.lease(0).await.unwrap();
    runner.call(Request::Boot(RunnerBoot {})).await.unwrap();
}

#[tokio::test]
async fn an_agent_attaches_runs_pauses_and_ends_a_guest() {
    let process = start([]);
    let (runner, _said) = process.connect().await;
    assert_eq!(runner.state.state(), VmState::Starting);
    assert_eq!(runner.spaces().unwrap().len(), 1);
    assert_eq!(runner.spaces().unwrap()[0].pages(), 4096);
    boot(&runner).await;
    let paused = runner.pause("test").await.unwrap();
    assert_eq!(paused.state(), VmState::Paused);
    assert_eq!(runner.status().await.unwrap().retired_instructions, paused.retired_instructions);
    assert_eq!(process.seen.lock().unwrap().booted, b"kernel");
    assert_eq!(runner.resume().await.unwrap().state(), VmState::Running);
    runner.end().await;
    process.ended().await;
}

#[tokio::test]
async fn the_console_is_in_the_log_and_told_with_its_place_there() {
    let process = start([Act::IdleUntil(None), Act::Say(b"hello "), Act::Say(b"world"), Act::IdleUntil(None)]);
    let (runner, _said) = process.connect().await;
    let mut console = runner.console();
    boot(&runner).await;
    // An input wakes it from its first rest.
    runner.call(Request::Console(proto::v1::RunnerConsoleInput { data: b"x".to_vec() })).await.unwrap();
    let mut heard = Vec::new();
    while heard.len() < 11 {
        let output = tokio::time::timeout(Duration::from_secs(10), console.recv()).await.unwrap().unwrap();
        assert_eq!(output.log_offset, heard.len() as u64);
        heard.extend(output.data);
    }
    assert_eq!(heard, b"hello world");
    assert_eq!(std::fs::read(process.directory.join("console.log")).unwrap(), b"hello world");
    runner.end().await;
    process.ended().await;
}

#[tokio::test]
async fn the_newest_agent_wins_and_the_guest_outlives_the_older() {
    let process = start([]);
    let (old, mut old_said) = process.connect().await;
    boot(&old).await;
    let (new, _said) = process.connect().await;
    assert_eq!(new.state.state(), VmState::Running);
    let gone = tokio::time::timeout(Duration::from_secs(10), old_said.recv()).await.unwrap();
    assert!(matches!(gone, Some(Event::Gone)), "{gone:?}");
    assert!(old.status().await.is_err());
    assert_eq!(new.status().await.unwrap().state(), VmState::Running);
    new.end().await;
    process.ended().await;
}

#[tokio::test]
async fn a_guest_that_ends_by_itself_is_told() {
    let process = start([Act::End(node_agent::runner::guest::Outcome::TripleFault)]);
    let (runner, mut said) = process.connect().await;
    boot(&runner).await;
    let event = tokio::time::timeout(Duration::from_secs(10), said.recv()).await.unwrap();
    assert!(matches!(&event, Some(Event::Changed(state)) if state.state() == VmState::Crashed), "{event:?}");
    runner.end().await;
    process.ended().await;
}

fn hostile(process: &Process, bytes: &[u8]) {
    let mut stream = UnixStream::connect(process.directory.join("runner.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // The other side may hang up while we write.
    let _cut = stream.write_all(bytes);
    let _shut = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer);
}

#[tokio::test]
async fn hostile_bytes_close_their_connection_and_nothing_else() {
    let process = start([]);
    let attach = RunnerRequest { id: 1, request: Some(Request::Attach(RunnerAttach {})) };
    let frame = encode_message(Kind::Control, &attach);
    let mut huge = frame.clone();
    huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let cases: Vec<Vec<u8>> = vec![
        Vec::new(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        frame[..frame.len() - 1].to_vec(),
        huge,
        encode(Kind::Control, &[0xff; 100]),
        encode(Kind::Manifest, &[0; 100]),
        encode_message(Kind::Control, &RunnerRequest { id: 1, request: None }),
        frame.repeat(1000),
    ];
    for case in &cases {
        hostile(&process, case);
    }
    let seed = 0x5eed_u64;
    let mut state = seed;
    for round in 0..200 {
        let mut bytes = frame.clone();
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (state >> 33) as usize % bytes.len();
        bytes[at] ^= 1 << (state >> 61);
        println!("seed {seed:#x} round {round}");
        hostile(&process, &bytes);
    }
    let (runner, _said) = process.connect().await;
    boot(&runner).await;
    assert_eq!(runner.status().await.unwrap().state(), VmState::Running);
    runner.end().await;
    process.ended().await;
}

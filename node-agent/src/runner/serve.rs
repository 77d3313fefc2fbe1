//! The I/O thread: the unix socket, the console log and the taps.
//!
//! One poll(2) loop. The newest connection is the agent; an older one is closed. Replies of a connection that is gone
//! are dropped, console output never is: it is in the log first. Bytes from the socket are hostile until they are a
//! frame; a connection that breaks the protocol is closed and the guest goes on. Refuses to know the guest.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use proto::frame::{Kind, encode_message};
use proto::v1::runner_reply::Reply;
use proto::v1::runner_request::Request;
use proto::v1::{RunnerAttached, RunnerConsoleOutput, RunnerReply, RunnerRequest};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use vmcb_engine::engine::Bell;

use super::console::Log;
use super::driver::{Closed, Input, Outbox, Output};
use super::wire::{self, Inbox};

/// Bytes that wait for an agent that does not read; beyond, it is cut off (its console is in the log).
const UNSENT_BYTES_MAX: usize = 32 << 20;
/// Requests and packets under way to the machine thread.
const REQUESTS_MAX: usize = 64;
const PACKETS_MAX: usize = 256;
/// The same when the guest's state is about to be captured: what the host has queued for it travels with it.
const PACKETS_AT_CAPTURE_MAX: usize = 512;
/// Longest Ethernet frame that a tap delivers (a jumbo frame without offloads).
const PACKET_BYTES_MAX: usize = 9216 + 18;
/// Connections count from 1.
const NOBODY: u64 = 0;
const READ_BYTES: usize = 64 << 10;
/// How long the last reply may take to leave after a shutdown.
const FLUSH_POLLS: u32 = 20;
const FLUSH_POLL_NS: i64 = 50_000_000;

/// What the I/O thread serves.
pub struct Ports {
    /// Listening unix socket, nonblocking.
    pub listener: OwnedFd,
    /// The console's log.
    pub log: Log,
    /// A tap per card that has one.
    pub taps: Vec<(usize, Arc<OwnedFd>)>,
    /// Sent with the reply to `attach`.
    pub descriptors: Vec<OwnedFd>,
    /// The answer to `attach`, kept up to date, of a guest whose thread may sleep until an agent has attached.
    pub standing_answer: Option<StandingAnswer>,
}

/// What is answered to `attach` without the machine thread.
pub type StandingAnswer = Arc<Mutex<RunnerAttached>>;

/// The machine thread's end: a bounded channel and a bell.
pub struct Outlet {
    outputs: Option<SyncSender<Output>>,
    bell: Arc<OwnedFd>,
}

impl Outbox for Outlet {
    fn send(&mut self, output: Output) -> Result<(), Closed> {
        self.outputs.as_ref().ok_or(Closed)?.send(output).map_err(|_| Closed)?;
        ring(&self.bell);
        Ok(())
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        // Disconnect first, so that the woken thread sees it.
        self.outputs = None;
        ring(&self.bell);
    }
}

fn ring(bell: &OwnedFd) {
    // A full counter has already rung.
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

struct Connection {
    number: u64,
    socket: OwnedFd,
    inbox: Inbox,
    unsent: VecDeque<(Vec<u8>, bool)>,
    sent_of_first: usize,
    unsent_bytes: usize,
    attached: bool,
    under_way: usize,
}

/// The I/O thread's state.
pub struct Server {
    ports: Ports,
    inputs: Mailbox,
    outputs: Receiver<Output>,
    bell: Arc<OwnedFd>,
    connection: Option<Connection>,
    connections: u64,
    packets_under_way: usize,
    log_broken: bool,
}

/// Where inputs go: the machine thread takes them between two runs, and a long run ends for them.
pub struct Mailbox {
    /// To the machine thread.
    pub inputs: Sender<Input>,
    /// What ends a run.
    pub bell: Option<Bell>,
}

impl Mailbox {
    fn send(&self, input: Input) -> Result<(), Closed> {
        self.inputs.send(input).map_err(|_| Closed)?;
        if let Some(bell) = &self.bell {
            bell.ring();
        }
        Ok(())
    }
}

/// Joins the two threads: the server, and the outlet for the driver.
///
/// # Errors
/// Of eventfd(2).
pub fn join(ports: Ports, inputs: Mailbox) -> rustix::io::Result<(Server, Outlet)> {
    let bell = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
    let (sender, outputs) = sync_channel(256);
    let server = Server {
        ports,
        inputs,
        outputs,
        bell: Arc::clone(&bell),
        connection: None,
        connections: 0,
        packets_under_way: 0,
        log_broken: false,
    };
    Ok((server, Outlet { outputs: Some(sender), bell }))
}

#[derive(Clone, Copy)]
struct Ready {
    bell: bool,
    listener: bool,
    readable: bool,
    writable: bool,
}

impl Server {
    /// Serves until the machine thread has ended and its last words are sent.
    pub fn run(mut self) {
        loop {
            let Ok((ready, taps)) = self.wait() else { continue };
            if ready.bell {
                let _ = rustix::io::read(&*self.bell, &mut [0u8; 8]);
            }
            if !self.take_outputs() {
                return self.flush();
            }
            if ready.listener {
                self.accept();
            }
            if ready.readable {
                self.read();
            }
            if ready.writable {
                self.write();
            }
            for index in taps {
                if !self.read_tap(index, PACKETS_MAX) {
                    return self.flush();
                }
            }
        }
    }

    fn wait(&self) -> rustix::io::Result<(Ready, Vec<usize>)> {
        let mut polled =
            vec![PollFd::new(&*self.bell, PollFlags::IN), PollFd::new(&self.ports.listener, PollFlags::IN)];
        if let Some(connection) = &self.connection {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, connection.under_way < REQUESTS_MAX);
            flags.set(PollFlags::OUT, !connection.unsent.is_empty());
            polled.push(PollFd::new(&connection.socket, flags));
        }
        let first_tap = polled.len();
        if self.packets_under_way < PACKETS_MAX {
            polled.extend(self.ports.taps.iter().map(|(_, tap)| PollFd::new(&**tap, PollFlags::IN)));
        }
        poll(&mut polled, Some(&Timespec { tv_sec: 1, tv_nsec: 0 }))?;
        let ended = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        let has = |at: usize, flags: PollFlags| polled[at].revents().intersects(flags);
        let connected = self.connection.is_some();
        let ready = Ready {
            bell: has(0, PollFlags::IN),
            listener: has(1, PollFlags::IN),
            readable: connected && has(2, PollFlags::IN | ended),
            writable: connected && has(2, PollFlags::OUT),
        };
        let taps = (first_tap..polled.len()).filter(|at| has(*at, PollFlags::IN)).map(|at| at - first_tap).collect();
        Ok((ready, taps))
    }

    fn accept(&mut self) {
        let Ok(socket) = rustix::net::accept_with(&self.ports.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)
        else {
            return;
        };
        self.connections += 1;
        // The newest wins: an agent that was replaced must not hold the guest.
        self.connection = Some(Connection {
            number: self.connections,
            socket,
            inbox: Inbox::default(),
            unsent: VecDeque::new(),
            sent_of_first: 0,
            unsent_bytes: 0,
            attached: false,
            under_way: 0,
        });
    }

    fn read(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        let mut bytes = vec![0; READ_BYTES];
        match rustix::io::read(&connection.socket, &mut bytes[..]) {
            Ok(0) => self.hang_up("the agent has gone"),
            Ok(count) => {
                connection.inbox.push(&bytes[..count]);
                self.take_requests();
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => self.hang_up(&error.to_string()),
        }
    }

    fn take_requests(&mut self) {
        loop {
            let Some(connection) = &mut self.connection else { return };
            if connection.under_way >= REQUESTS_MAX {
                return;
            }
            match connection.inbox.take::<RunnerRequest>() {
                Ok(Some(request))
                    if matches!(request.request, Some(Request::Attach(_))) && self.answer_attach(&request) => {}
                Ok(Some(request)) => {
                    let Some(connection) = &mut self.connection else { return };
                    connection.under_way += 1;
                    let captures = matches!(request.request, Some(Request::Capture(_)));
                    let input = Input::Request { connection: connection.number, request };
                    if captures {
                        self.read_taps_at_capture();
                    }
                    if self.inputs.send(input).is_err() {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => return self.hang_up(&format!("broken protocol: {error}")),
            }
        }
    }

    /// Answers `attach`, if the machine thread is not needed for it.
    fn answer_attach(&mut self, request: &RunnerRequest) -> bool {
        let (Some(answer), Some(connection)) = (&self.ports.standing_answer, &mut self.connection) else {
            return false;
        };
        let attached = answer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if attached.config.is_none() {
            // The machine thread has not begun; it will answer.
            return false;
        }
        connection.attached = true;
        self.enqueue(&RunnerReply { id: request.id, reply: Some(Reply::Attached(attached)) }, true);
        // The machine thread does when it can what belongs to it; its answer is for nobody.
        let heard = Input::Request { connection: NOBODY, request: request.clone() };
        self.inputs.send(heard).is_ok()
    }

    /// What the host has queued for the guest becomes part of the state that is about to be captured.
    fn read_taps_at_capture(&mut self) {
        for index in 0..self.ports.taps.len() {
            // If the machine thread has ended, the loop finds out by itself.
            let _ended = self.read_tap(index, PACKETS_AT_CAPTURE_MAX);
        }
    }

    fn hang_up(&mut self, why: &str) {
        if self.connection.take().is_some() {
            eprintln!("vm-runner: connection closed: {why}");
        }
    }

    /// Moves everything that the machine thread has said. `false` when it has ended.
    fn take_outputs(&mut self) -> bool {
        loop {
            match self.outputs.try_recv() {
                Ok(output) => self.take_output(output),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn take_output(&mut self, output: Output) {
        match output {
            Output::PacketTaken => self.packets_under_way = self.packets_under_way.saturating_sub(1),
            Output::Console(data) => {
                let log_offset = self.log(&data);
                let reply = Reply::Console(RunnerConsoleOutput { data, log_offset });
                self.push(RunnerReply { id: 0, reply: Some(reply) });
            }
            Output::Changed(state) => self.push(RunnerReply { id: 0, reply: Some(Reply::Changed(*state)) }),
            Output::Reply { connection, reply } => {
                let Some(current) = self.connection.as_mut().filter(|current| current.number == connection) else {
                    return;
                };
                current.under_way = current.under_way.saturating_sub(1);
                let attaches = matches!(reply.reply, Some(Reply::Attached(_)));
                current.attached |= attaches;
                self.enqueue(&reply, attaches);
                // Requests that arrived while too many were under way wait in the inbox.
                self.take_requests();
            }
        }
    }

    fn log(&mut self, data: &[u8]) -> u64 {
        match self.ports.log.append(data) {
            Ok(offset) => {
                self.log_broken = false;
                offset
            }
            Err(error) => {
                if !self.log_broken {
                    eprintln!("vm-runner: console.log: {error}");
                }
                self.log_broken = true;
                u64::MAX
            }
        }
    }

    /// Sends what was not asked for, if the agent has attached.
    fn push(&mut self, reply: RunnerReply) {
        if self.connection.as_ref().is_some_and(|connection| connection.attached) {
            self.enqueue(&reply, false);
        }
    }

    fn enqueue(&mut self, reply: &RunnerReply, with_descriptors: bool) {
        let Some(connection) = &mut self.connection else { return };
        if prost::Message::encoded_len(reply) > Kind::Control.body_bytes_max() {
            return self.hang_up("a reply is too long for a frame");
        }
        let frame = encode_message(Kind::Control, reply);
        connection.unsent_bytes += frame.len();
        connection.unsent.push_back((frame, with_descriptors));
        if connection.unsent_bytes > UNSENT_BYTES_MAX {
            return self.hang_up("the agent does not read");
        }
        self.write();
    }

    fn write(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        while let Some((frame, with_descriptors)) = connection.unsent.front() {
            let descriptors: Vec<BorrowedFd<'_>> = match *with_descriptors && connection.sent_of_first == 0 {
                true => self.ports.descriptors.iter().map(AsFd::as_fd).collect(),
                false => Vec::new(),
            };
            match wire::send(&connection.socket, &frame[connection.sent_of_first..], &descriptors) {
                Ok(count) => connection.sent_of_first += count,
                Err(Errno::AGAIN | Errno::INTR) => return,
                Err(error) => return self.hang_up(&error.to_string()),
            }
            if connection.sent_of_first == frame.len() {
                connection.unsent_bytes -= frame.len();
                connection.sent_of_first = 0;
                connection.unsent.pop_front();
            }
        }
    }

    /// Reads one tap until it is empty or enough is under way. `false` when the machine thread has ended.
    fn read_tap(&mut self, index: usize, under_way_max: usize) -> bool {
        let (card, tap) = &self.ports.taps[index];
        let mut bytes = vec![0; PACKET_BYTES_MAX];
        while self.packets_under_way < under_way_max {
            let Ok(count) = rustix::io::read(&**tap, &mut bytes[..]) else { return true };
            self.packets_under_way += 1;
            if self.inputs.send(Input::Packet { card: *card, bytes: bytes[..count].to_vec() }).is_err() {
                return false;
            }
        }
        true
    }

    /// The machine thread has ended: its last reply leaves, if the agent takes it in time.
    fn flush(mut self) {
        for _ in 0..FLUSH_POLLS {
            self.write();
            let Some(connection) = self.connection.as_ref().filter(|connection| !connection.unsent.is_empty()) else {
                return;
            };
            let mut polled = [PollFd::new(&connection.socket, PollFlags::OUT)];
            let _ = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: FLUSH_POLL_NS }));
        }
    }
}

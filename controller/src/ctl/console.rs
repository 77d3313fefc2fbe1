//! `ctl vm console`: the serial console of a VM on this terminal.
//!
//! ```text
//!   stdin ──reader thread──> keys ──> AttachConsole ──> stdout
//! ```
//! The terminal is raw while attached and is put back however this ends. `Ctrl-]` detaches (only from a terminal: in a pipe
//! it is a byte like others). A stream that ends is not the end of the VM: it migrated, or the controller was restarted,
//! so we attach again for as long as there is a VM that may speak. What was typed and not acknowledged is typed again then.
//! The end of piped input does not end the output.

use std::collections::VecDeque;
use std::io::{IsTerminal as _, Read as _, Write as _};
use std::time::{Duration, Instant};

use proto::status::Code;
use proto::v1::{ConsoleInput, ConsoleOutput, VmName};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::signal::unix::{Signal, SignalKind};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::client::Client;
use super::failure::Failure;
use super::interrupts::listen;

/// Ctrl-].
const ESCAPE: u8 = 0x1d;
/// What is shown of the past when attaching.
const LOG_BYTES: u64 = 4096;
/// Attaching on another host: its log begins with the guest's arrival, and all of it is new.
const WHOLE_LOG: u64 = u64::MAX;
/// How long nobody may be able to say where the VM is.
const LOST_MAX: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_millis(200);
/// Typed bytes that may wait for an acknowledgement; then no more are read.
const TYPED_BYTES_MAX: usize = 64 << 10;
/// How long a detach waits for what was typed before it.
const DETACH_WAIT: Duration = Duration::from_secs(2);

/// Attaches to a VM, or prints what it has said (`log_only`).
///
/// # Errors
/// No such VM; stdout is closed; the controller is gone for too long.
pub async fn run(client: Client, vm: &str, log_only: bool) -> Result<(), Failure> {
    if log_only {
        return print_log(client, vm).await;
    }
    let on_terminal = std::io::stdin().is_terminal();
    let raw = RawTerminal::enter(on_terminal)?;
    if on_terminal {
        eprint!("attached to {vm}; Ctrl-] detaches\r\n");
    }
    let terminations = listen(SignalKind::terminate())?;
    let session = Session {
        client,
        vm: vm.to_owned(),
        keys: read_keys(on_terminal),
        keys_ended: false,
        typed: Typed::default(),
        terminations,
        host: String::new(),
    };
    let ended = session.run().await;
    drop(raw);
    match ended? {
        Ended::Detached if on_terminal => eprintln!("\ndetached from {vm}"),
        Ended::Gone(why) => eprintln!("\n{why}"),
        Ended::Detached | Ended::Broken(_) => {}
    }
    Ok(())
}

async fn print_log(mut client: Client, vm: &str) -> Result<(), Failure> {
    let doing = format!("read the console log of {vm}");
    let failed = |e: tonic::Status| Failure::from_status(&doing, &e);
    let first = ConsoleInput { vm: vm.to_owned(), data: Vec::new(), log_bytes: u64::MAX, log_only: true };
    let mut stream = client.attach_console(tokio_stream::once(first)).await.map_err(failed)?.into_inner();
    while let Some(output) = stream.message().await.map_err(failed)? {
        show(&output.data)?;
    }
    Ok(())
}

/// What the reader of stdin found.
#[derive(Debug, PartialEq, Eq)]
enum Keys {
    Bytes(Vec<u8>),
    /// Up to here, then Ctrl-].
    Detach(Vec<u8>),
}

/// Why a session or a stream is over.
enum Ended {
    Detached,
    Gone(String),
    Broken(tonic::Status),
}

/// What was typed and is not yet the guest's.
#[derive(Debug, Default)]
struct Typed {
    bytes: VecDeque<u8>,
    /// Bytes of the present stream that were acknowledged.
    taken: u64,
}

impl Typed {
    /// A new stream: all that is left, to be typed again.
    fn again(&mut self) -> Vec<u8> {
        self.taken = 0;
        self.bytes.iter().copied().collect()
    }

    fn acknowledge(&mut self, taken: u64) {
        let newly = usize::try_from(taken.saturating_sub(self.taken)).unwrap_or(usize::MAX);
        self.bytes.drain(..newly.min(self.bytes.len()));
        self.taken = self.taken.max(taken);
    }
}

struct Session {
    client: Client,
    vm: String,
    keys: mpsc::Receiver<Keys>,
    keys_ended: bool,
    typed: Typed,
    terminations: Signal,
    /// Where the VM was when its record was last seen.
    host: String,
}

impl Session {
    async fn run(mut self) -> Result<Ended, Failure> {
        let mut log_bytes = LOG_BYTES;
        let mut lost_since: Option<Instant> = None;
        let mut first = true;
        // Where it is now; that it is not there is for `attach` to say.
        let _ = self.gone(Instant::now()).await?;
        loop {
            match self.attach(log_bytes).await {
                Ok((input, stream)) => {
                    log_bytes = 0;
                    match self.pump(input, stream, &mut lost_since).await? {
                        Ended::Broken(status) if status.code() == tonic::Code::PermissionDenied => {
                            return Err(Failure::from_status(&format!("attach to {}", self.vm), &status));
                        }
                        Ended::Broken(_) => {}
                        ended => return Ok(ended),
                    }
                }
                // The first attempt tells what is wrong; later ones are part of a hand-over.
                Err(status) if first => {
                    return Err(Failure::from_status(&format!("attach to {}", self.vm), &status));
                }
                Err(_) => {}
            }
            first = false;
            let host = self.host.clone();
            if let Some(why) = self.gone(*lost_since.get_or_insert_with(Instant::now)).await? {
                return Ok(Ended::Gone(why));
            }
            if self.host != host {
                log_bytes = WHOLE_LOG;
            }
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                _ = self.terminations.recv() => return Ok(Ended::Detached),
            }
        }
    }

    async fn attach(
        &mut self,
        log_bytes: u64,
    ) -> Result<(mpsc::Sender<ConsoleInput>, Streaming<ConsoleOutput>), tonic::Status> {
        let (input, requests) = mpsc::channel(16);
        let first = ConsoleInput { vm: self.vm.clone(), data: self.typed.again(), log_bytes, log_only: false };
        input.try_send(first).expect("the channel is new and holds 16");
        let stream = self.client.attach_console(ReceiverStream::new(requests)).await?.into_inner();
        Ok((input, stream))
    }

    /// Carries bytes both ways until one side ends.
    async fn pump(
        &mut self,
        input: mpsc::Sender<ConsoleInput>,
        mut stream: Streaming<ConsoleOutput>,
        lost_since: &mut Option<Instant>,
    ) -> Result<Ended, Failure> {
        let mut leaving: Option<tokio::time::Instant> = None;
        loop {
            if leaving.is_some() && self.typed.bytes.is_empty() {
                return Ok(Ended::Detached);
            }
            // A guest that does not read its input holds up the input, never its output.
            let room = input.capacity() > 0 && self.typed.bytes.len() < TYPED_BYTES_MAX;
            let reading = !self.keys_ended && leaving.is_none() && room;
            tokio::select! {
                message = stream.message() => match message {
                    Ok(Some(output)) => {
                        *lost_since = None;
                        self.typed.acknowledge(output.input_taken);
                        show(&output.data)?;
                    }
                    Ok(None) => return Ok(Ended::Broken(tonic::Status::unavailable("the stream ended"))),
                    Err(status) => return Ok(Ended::Broken(status)),
                },
                () = tokio::time::sleep_until(leaving.unwrap_or_else(tokio::time::Instant::now)), if leaving.is_some() => {
                    return Ok(Ended::Detached);
                }
                keys = self.keys.recv(), if reading => {
                    let (data, detach) = match keys {
                        Some(Keys::Bytes(data)) => (data, false),
                        Some(Keys::Detach(data)) => (data, true),
                        None => {
                            self.keys_ended = true;
                            continue;
                        }
                    };
                    // If the stream is broken, its end is what comes next.
                    self.typed.bytes.extend(&data);
                    let _ = input.send(ConsoleInput { data, ..Default::default() }).await;
                    leaving = detach.then(|| tokio::time::Instant::now() + DETACH_WAIT);
                }
                _ = self.terminations.recv() => return Ok(Ended::Detached),
            }
        }
    }

    /// After a stream ended: is there still a VM that may speak?
    async fn gone(&mut self, lost_since: Instant) -> Result<Option<String>, Failure> {
        let vm = &self.vm;
        match self.client.get_vm_record(VmName { vm: vm.clone() }).await {
            Ok(reply) => {
                let record = reply.into_inner();
                self.host.clone_from(&record.host);
                let over = ["stopped", "crashed"].iter().any(|word| record.observed.starts_with(word));
                Ok(over.then(|| {
                    let reason = if record.reason.is_empty() { String::new() } else { format!(": {}", record.reason) };
                    format!("{vm} is {}{reason}", record.observed)
                }))
            }
            Err(status) if status.code() == tonic::Code::NotFound => Ok(Some(format!("{vm} is no more"))),
            Err(status) if lost_since.elapsed() > LOST_MAX => {
                Err(Failure::from_status(&format!("find {vm} again"), &status))
            }
            Err(_) => Ok(None),
        }
    }
}

/// Guest output, as it is: this is its terminal.
fn show(data: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(data)
        .and_then(|()| out.flush())
        .map_err(|e| Failure::new(Code::Cancelled, format!("cannot write to stdout: {e}")))
}

/// Reads stdin on a thread of its own: a read of a terminal cannot be called off.
fn read_keys(escape: bool) -> mpsc::Receiver<Keys> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        let mut stdin = std::io::stdin();
        loop {
            let keys = match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => split_at_escape(&buffer[..count], escape),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            if sender.blocking_send(keys).is_err() {
                return;
            }
        }
    });
    receiver
}

fn split_at_escape(bytes: &[u8], escape: bool) -> Keys {
    match bytes.iter().position(|byte| escape && *byte == ESCAPE) {
        Some(at) => Keys::Detach(bytes[..at].to_vec()),
        None => Keys::Bytes(bytes.to_vec()),
    }
}

/// Stdin in raw mode for as long as this lives.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter(on_terminal: bool) -> Result<RawTerminal, Failure> {
        if !on_terminal {
            return Ok(RawTerminal(None));
        }
        let failed = |e| Failure::new(Code::Internal, format!("cannot make the terminal raw: {e}"));
        let saved = tcgetattr(std::io::stdin()).map_err(failed)?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Flush, &raw).map_err(failed)?;
        Ok(RawTerminal(Some(saved)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(saved) = &self.0 {
            // There is nobody left to tell.
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, saved);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_acknowledged_is_typed_again_once() {
        let mut typed = Typed::default();
        typed.bytes.extend(b"abcdef");
        typed.acknowledge(2);
        typed.acknowledge(0);
        typed.acknowledge(4);
        assert_eq!(typed.again(), b"ef");
        typed.acknowledge(1);
        assert_eq!(typed.again(), b"f");
        typed.acknowledge(u64::MAX);
        assert_eq!(typed.again(), b"");
    }

    #[test]
    fn the_escape_counts_on_a_terminal_only() {
        assert_eq!(split_at_escape(b"ls\x1drest", true), Keys::Detach(b"ls".to_vec()));
        assert_eq!(split_at_escape(b"ls\x1drest", false), Keys::Bytes(b"ls\x1drest".to_vec()));
        assert_eq!(split_at_escape(b"\x1b]x", true), Keys::Bytes(b"\x1b]x".to_vec()));
    }
}

//! Attaching to a guest's serial console: the log first, then what it says, without a gap and without repetition.
//!
//! Output carries its offset in the log, where the runner wrote it before it told anybody. A reader that falls behind
//! reads on from the log. Input is acknowledged when the machine has it; while the guest is handed over, or does not read,
//! it waits here and no more is taken from the stream. Knows nothing of what is typed.

use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proto::status::Code;
use proto::v1::runner_request::Request;
use proto::v1::{ConsoleInput, ConsoleOutput, RunnerConsoleInput, RunnerConsoleOutput};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

use super::status;
use crate::migration::Failure;
use crate::runner::console::KEPT_BYTES;
use crate::vm::runner::Runner;

const CHUNK_BYTES: usize = 64 << 10;
const INPUT_BYTES_MAX: usize = 64 << 10;

/// How long input that the machine cannot take now waits before it is offered again.
const RETRY: Duration = Duration::from_millis(20);

type Outputs = mpsc::Sender<Result<ConsoleOutput, Status>>;

/// One attached console.
pub(super) struct Session {
    pub log: PathBuf,
    pub runner: Option<Arc<Runner>>,
    pub first: ConsoleInput,
    pub inputs: Streaming<ConsoleInput>,
    pub outputs: Outputs,
}

impl Session {
    pub(super) async fn run(self) {
        let outputs = self.outputs.clone();
        if let Err(failure) = self.converse().await {
            let _gone = outputs.send(Err(status(failure))).await;
        }
    }

    async fn converse(mut self) -> Result<(), Failure> {
        // Subscribe first: what is said while the log is read is then either in the log or in the queue, or in both.
        let said = self.runner.as_ref().map(|runner| runner.console());
        let asked = if self.first.log_only && self.first.log_bytes == 0 { KEPT_BYTES } else { self.first.log_bytes };
        let mut at = self.replay(asked.min(KEPT_BYTES)).await?;
        if self.first.log_only {
            return Ok(());
        }
        let (Some(mut said), Some(runner)) = (said, self.runner.clone()) else {
            return Err(Failure::new(Code::Conflict, "it does not run: --log shows what it has said"));
        };
        let mut typed = Typed { bytes: std::mem::take(&mut self.first.data), taken: 0 };
        loop {
            let acknowledged = typed.offer(&runner).await?;
            if acknowledged && self.outputs.send(Ok(typed.receipt())).await.is_err() {
                return Ok(());
            }
            tokio::select! {
                input = self.inputs.next(), if typed.bytes.is_empty() => match input {
                    Some(Ok(input)) => typed.bytes = input.data,
                    Some(Err(_)) | None => return Ok(()),
                },
                () = tokio::time::sleep(RETRY), if !typed.bytes.is_empty() => {}
                output = said.recv() => match self.tell(output, &mut at).await? {
                    true => {}
                    false => return Ok(()),
                },
                () = self.outputs.closed() => return Ok(()),
            }
        }
    }

    /// Sends what the log has from `bytes` before its end; returns the offset that was reached.
    async fn replay(&self, bytes: u64) -> Result<u64, Failure> {
        let end = std::fs::metadata(&self.log).map_or(0, |log| log.len());
        self.replay_from(end.saturating_sub(bytes)).await
    }

    async fn replay_from(&self, start: u64) -> Result<u64, Failure> {
        let mut at = start;
        loop {
            let path = self.log.clone();
            let read = tokio::task::spawn_blocking(move || read_at(&path, at)).await;
            let data = read.map_err(|error| Failure::new(Code::Internal, error))?;
            let data =
                data.map_err(|error| Failure::new(Code::Internal, format!("{}: {error}", self.log.display())))?;
            if data.is_empty() {
                return Ok(at);
            }
            at += data.len() as u64;
            if self.outputs.send(Ok(ConsoleOutput { data, ..ConsoleOutput::default() })).await.is_err() {
                return Ok(at);
            }
        }
    }

    /// Passes on what was said, unless the log had it already. `false`: the guest's process is gone.
    async fn tell(&self, output: Result<RunnerConsoleOutput, RecvError>, at: &mut u64) -> Result<bool, Failure> {
        match output {
            Err(broadcast::error::RecvError::Closed) => Ok(false),
            Err(broadcast::error::RecvError::Lagged(_)) => {
                *at = self.replay_from(*at).await?;
                Ok(true)
            }
            Ok(output) => {
                let data = unseen(&output, *at);
                if !data.is_empty() {
                    *at = output.log_offset.saturating_add(output.data.len() as u64);
                    let data = data.to_vec();
                    let output = ConsoleOutput { data, ..ConsoleOutput::default() };
                    return Ok(self.outputs.send(Ok(output)).await.is_ok());
                }
                Ok(true)
            }
        }
    }
}

/// The part of an output that lies at `at` or behind it in the log.
fn unseen(output: &RunnerConsoleOutput, at: u64) -> &[u8] {
    let seen = at.saturating_sub(output.log_offset);
    usize::try_from(seen).ok().and_then(|seen| output.data.get(seen..)).unwrap_or(&[])
}

fn read_at(path: &std::path::Path, at: u64) -> std::io::Result<Vec<u8>> {
    let mut file = match std::fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        opened => opened?,
    };
    file.seek(SeekFrom::Start(at))?;
    let mut data = Vec::new();
    file.take(CHUNK_BYTES as u64).read_to_end(&mut data)?;
    Ok(data)
}

/// Input of one message, and how much came before it.
struct Typed {
    bytes: Vec<u8>,
    taken: u64,
}

impl Typed {
    /// Offers what there is to the machine; true if it was there and is now taken.
    async fn offer(&mut self, runner: &Runner) -> Result<bool, Failure> {
        if self.bytes.is_empty() {
            return Ok(false);
        }
        if self.bytes.len() > INPUT_BYTES_MAX {
            return Err(Failure::new(Code::BadInput, "too much input at once"));
        }
        match runner.call(Request::Console(RunnerConsoleInput { data: self.bytes.clone() })).await {
            Ok(_) => {
                self.taken += self.bytes.len() as u64;
                self.bytes.clear();
                Ok(true)
            }
            Err(failure) if matches!(failure.code, Code::Conflict | Code::Exhausted) => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    fn receipt(&self) -> ConsoleOutput {
        ConsoleOutput { input_taken: self.taken, ..ConsoleOutput::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_shown_twice() {
        let output = RunnerConsoleOutput { data: b"abcd".to_vec(), log_offset: 10 };
        assert_eq!(unseen(&output, 0), b"abcd");
        assert_eq!(unseen(&output, 12), b"cd");
        assert_eq!(unseen(&output, 14), b"");
        assert_eq!(unseen(&output, 99), b"");
    }
}

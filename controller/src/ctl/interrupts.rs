//! SIGINT and SIGTERM: while somebody listens they do not end ctl by themselves.

use proto::status::Code;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::failure::Failure;

/// Ctrl-C, or a request to end.
pub struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    /// Listens from now on.
    ///
    /// # Errors
    /// As [`listen`].
    pub fn listen() -> Result<Interrupts, Failure> {
        Ok(Interrupts { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    /// Waits for the next one of either.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Listens for one signal.
///
/// # Errors
/// [`Code::Internal`]: the kernel does not let us.
pub fn listen(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::new(Code::Internal, format!("cannot listen for signals: {error}")))
}

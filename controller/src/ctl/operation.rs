//! Follows one operation of the controller to its end.
//!
//! ```text
//!   call ──> step, transfer, note ... ──> done | failed
//!     Ctrl-C: CancelOperation, then on to the end; a second Ctrl-C leaves the operation to the controller
//!     the stream breaks: WatchOperation, until the controller answers again or RECONNECT has passed
//! ```
//! Cancelling is asking: before the commit the operation is undone, after it there is no way back, and which of the two
//! it was is for the controller to say. Hence the outcome is always waited for.

use std::future::Future;
use std::time::{Duration, Instant};

use proto::status::Code;
use proto::v1::operation_event::Event;
use proto::v1::{OperationDone, OperationEvent, OperationRef};
use tonic::{Response, Status, Streaming};

use super::client::Client;
use super::failure::Failure;
use super::interrupts::Interrupts;
use super::progress::Progress;

/// How long a controller may be gone while one of its operations is followed.
const RECONNECT: Duration = Duration::from_secs(30);
/// How often in a row a stream may break without a word.
const BREAKS_MAX: u32 = 10;
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);

/// The end of an operation that went well.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Its id.
    pub operation: String,
    /// What it made or changed.
    pub done: OperationDone,
    /// What it said on the way.
    pub notes: Vec<String>,
    /// From the call to the first word of the operation.
    pub before: Duration,
}

/// Follows `call` to its end; `what` names it to people, for example `migrate vm1 to hostB`.
///
/// # Errors
/// The operation failed or was cancelled, or the controller is gone for too long.
pub async fn follow<C>(client: &Client, what: &str, call: C) -> Result<Outcome, Failure>
where
    C: Future<Output = Result<Response<Streaming<OperationEvent>>, Status>>,
{
    let mut follower = Follower::new(client, what)?;
    let mut stream = follower.begin(call).await?;
    loop {
        match follower.until_break(&mut stream).await? {
            Ended::Done(done) => {
                follower.progress.end();
                let Follower { operation, notes, before, .. } = follower;
                return Ok(Outcome { operation, done: *done, notes, before });
            }
            Ended::Broken(status) => stream = follower.watch_again(&status).await?,
        }
    }
}

/// Why a stream of events is over.
enum Ended {
    Done(Box<OperationDone>),
    Broken(Status),
}

struct Follower {
    client: Client,
    what: String,
    progress: Progress,
    operation: String,
    notes: Vec<String>,
    interrupts: Interrupts,
    interrupted: u32,
    cancel_sent: bool,
    /// Streams that broke since the last event.
    breaks: u32,
    began: Instant,
    before: Duration,
}

impl Follower {
    fn new(client: &Client, what: &str) -> Result<Follower, Failure> {
        Ok(Follower {
            client: client.clone(),
            what: what.to_owned(),
            progress: Progress::new(what),
            operation: String::new(),
            notes: Vec::new(),
            interrupts: Interrupts::listen()?,
            interrupted: 0,
            cancel_sent: false,
            breaks: 0,
            began: Instant::now(),
            before: Duration::ZERO,
        })
    }

    async fn begin<C>(&mut self, call: C) -> Result<Streaming<OperationEvent>, Failure>
    where
        C: Future<Output = Result<Response<Streaming<OperationEvent>>, Status>>,
    {
        tokio::pin!(call);
        loop {
            tokio::select! {
                answer = &mut call => {
                    return match answer {
                        Ok(response) => Ok(response.into_inner()),
                        Err(status) => Err(Failure::from_status(&self.what, &status)),
                    };
                }
                () = self.interrupts.next() => self.interrupt().await?,
            }
        }
    }

    async fn until_break(&mut self, stream: &mut Streaming<OperationEvent>) -> Result<Ended, Failure> {
        loop {
            tokio::select! {
                message = stream.message() => match message {
                    Ok(Some(event)) => {
                        if let Some(done) = self.event(event).await? {
                            return Ok(Ended::Done(Box::new(done)));
                        }
                    }
                    Ok(None) => return Ok(Ended::Broken(Status::unavailable("the controller ended the stream"))),
                    Err(status) => return Ok(Ended::Broken(status)),
                },
                () = self.interrupts.next() => self.interrupt().await?,
            }
        }
    }

    async fn event(&mut self, event: OperationEvent) -> Result<Option<OperationDone>, Failure> {
        self.breaks = 0;
        if self.operation.is_empty() {
            self.operation = event.operation;
            self.before = self.began.elapsed();
            if self.interrupted > 0 {
                self.cancel().await;
            }
        }
        match event.event {
            Some(Event::Step(step)) => self.progress.step(&step),
            Some(Event::Transfer(transfer)) => {
                if let Some(event) = &transfer.event {
                    self.progress.transfer(event);
                }
            }
            Some(Event::Note(note)) => {
                self.progress.note(&note);
                self.notes.push(note);
            }
            Some(Event::Done(done)) => return Ok(Some(done)),
            Some(Event::Failed(failed)) => return Err(Failure::from_operation(&failed)),
            // A newer controller's word.
            None => {}
        }
        Ok(None)
    }

    async fn interrupt(&mut self) -> Result<(), Failure> {
        self.interrupted += 1;
        if self.interrupted > 1 {
            let message = format!("no longer following: {}", self.what);
            let failure = Failure::new(Code::Cancelled, message);
            return Err(match self.operation.as_str() {
                "" => failure,
                id => failure.hint(format!("operation {id} is left to the controller; `ctl events -f` shows its end")),
            });
        }
        self.progress.note("cancelling; press Ctrl-C again to leave without waiting for the outcome");
        if !self.operation.is_empty() {
            self.cancel().await;
        }
        Ok(())
    }

    async fn cancel(&mut self) {
        if std::mem::replace(&mut self.cancel_sent, true) {
            return;
        }
        let operation = OperationRef {
            operation: self.operation.clone(),
            vm: String::new(),
            reason: "cancelled by the operator".into(),
        };
        if let Err(status) = self.client.cancel_operation(operation).await {
            self.progress.note(&format!("cannot be cancelled: {}", status.message()));
        }
    }

    async fn watch_again(&mut self, broken: &Status) -> Result<Streaming<OperationEvent>, Failure> {
        let transient = matches!(
            broken.code(),
            tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled | tonic::Code::Internal
        );
        if self.operation.is_empty() || !transient {
            return Err(Failure::from_status(&self.what, broken));
        }
        self.progress.note("lost the controller; the operation goes on without us, looking for it again");
        self.breaks += 1;
        if self.breaks > BREAKS_MAX {
            return Err(Failure::from_status(&self.what, broken));
        }
        let deadline = Instant::now() + RECONNECT;
        loop {
            tokio::select! {
                () = tokio::time::sleep(RECONNECT_PAUSE) => {}
                () = self.interrupts.next() => self.interrupt().await?,
            }
            let operation = OperationRef { operation: self.operation.clone(), ..Default::default() };
            match self.client.watch_operation(operation).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) if status.code() == tonic::Code::Unavailable && Instant::now() < deadline => {}
                Err(status) => return Err(Failure::from_status(&self.what, &status)),
            }
        }
    }
}

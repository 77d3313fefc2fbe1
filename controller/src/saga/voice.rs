//! What operations say while they run, kept for whoever asks later.
//!
//! Each operation has a log of events; a listener reads it from the beginning and then follows. Logs of operations that
//! have ended are kept for a while. Nothing here is durable and nothing is decided by it: the ledger is the truth.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::status::Code;
use proto::v1::operation_event::Event;
use proto::v1::{OperationEvent, TransferEvent};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::failure::Failure;

/// Logs that are kept.
const LOGS_MAX: usize = 256;
/// Events of one operation that are kept; further progress is not.
const EVENTS_MAX: usize = 20_000;

#[derive(Default)]
struct Log {
    events: Vec<OperationEvent>,
    ended: bool,
}

struct Entry {
    log: Mutex<Log>,
    length: watch::Sender<usize>,
}

#[derive(Default)]
struct Logs {
    entries: HashMap<String, Arc<Entry>>,
    order: VecDeque<String>,
}

/// All logs.
#[derive(Clone, Default)]
pub struct Voices {
    logs: Arc<Mutex<Logs>>,
}

/// The voice of one operation.
#[derive(Clone)]
pub struct Voice {
    operation: String,
    entry: Arc<Entry>,
}

impl Voices {
    /// The voice of an operation; its log begins if there is none.
    pub fn of(&self, operation: &str) -> Voice {
        let mut logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        let logs = &mut *logs;
        let entry = logs.entries.entry(operation.into()).or_insert_with(|| {
            logs.order.push_back(operation.into());
            Arc::new(Entry { log: Mutex::default(), length: watch::Sender::new(0) })
        });
        let voice = Voice { operation: operation.into(), entry: entry.clone() };
        while logs.order.len() > LOGS_MAX {
            if let Some(oldest) = logs.order.pop_front() {
                logs.entries.remove(&oldest);
            }
        }
        voice
    }

    /// Whether there is a log of this operation.
    pub fn knows(&self, operation: &str) -> bool {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner).entries.contains_key(operation)
    }
}

impl Voice {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.entry.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The operation that speaks.
    pub fn operation(&self) -> &str {
        &self.operation
    }

    fn say(&self, event: Event) {
        let last = matches!(event, Event::Done(_) | Event::Failed(_));
        let length = {
            let mut log = self.log();
            if log.ended || (log.events.len() >= EVENTS_MAX && !last) {
                return;
            }
            log.events.push(OperationEvent { operation: self.operation.clone(), event: Some(event) });
            log.ended = last;
            log.events.len()
        };
        self.entry.length.send_replace(length);
    }

    /// Waits for the end of the operation.
    ///
    /// # Errors
    /// What it failed with.
    pub async fn ended(&self) -> Result<(), Failure> {
        let last = self.listen().filter_map(Result::ok).fold(None, |_, event| event.event).await;
        match last {
            Some(Event::Failed(failed)) => {
                Err(Failure::new(Code::from_number(failed.code), failed.message).hint(failed.hint))
            }
            _ => Ok(()),
        }
    }

    /// A step begins.
    pub fn step(&self, name: &str) {
        tracing::info!(step = name, "step");
        self.say(Event::Step(name.into()));
    }

    /// A line for people.
    pub fn note(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::info!(note = text, "note");
        self.say(Event::Note(text));
    }

    /// Something that the source agent said.
    pub fn transfer(&self, event: TransferEvent) {
        self.say(Event::Transfer(event));
    }

    /// What the source agent has said so far.
    pub fn transfers(&self) -> Vec<TransferEvent> {
        let log = self.log();
        let said = log.events.iter().filter_map(|event| match &event.event {
            Some(Event::Transfer(transfer)) => Some(transfer.clone()),
            _ => None,
        });
        said.collect()
    }

    /// The last word; nothing follows.
    pub fn end(&self, event: Event) {
        debug_assert!(matches!(event, Event::Done(_) | Event::Failed(_)), "the last word is done or failed");
        self.say(event);
    }

    /// The whole log, and what follows, to its end.
    pub fn listen(&self) -> ReceiverStream<Result<OperationEvent, Status>> {
        let (out, listener) = mpsc::channel(64);
        let (voice, mut length) = (self.clone(), self.entry.length.subscribe());
        tokio::spawn(async move {
            let mut heard = 0;
            loop {
                length.mark_unchanged();
                let (news, ended) = {
                    let log = voice.log();
                    (log.events[heard..].to_vec(), log.ended)
                };
                heard += news.len();
                for event in news {
                    if out.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
                if ended {
                    return;
                }
                tokio::select! {
                    () = out.closed() => return,
                    changed = length.changed() => if changed.is_err() { return },
                }
            }
        });
        ReceiverStream::new(listener)
    }
}

#[cfg(test)]
mod tests {
    use proto::v1::OperationDone;
    use tokio_stream::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_late_listener_hears_everything_once() {
        let voices = Voices::default();
        let voice = voices.of("op");
        voice.step("prepare");
        let early = voice.listen();
        voice.note("slow");
        voice.end(Event::Done(OperationDone::default()));
        voice.note("after the end");
        let late = voices.of("op").listen();
        for listener in [early, late] {
            let heard: Vec<_> = listener.map(|event| event.unwrap().event.unwrap()).collect().await;
            let done = Event::Done(OperationDone::default());
            assert_eq!(heard, [Event::Step("prepare".into()), Event::Note("slow".into()), done]);
        }
    }

    #[test]
    fn old_logs_are_forgotten() {
        let voices = Voices::default();
        for number in 0..=LOGS_MAX {
            voices.of(&number.to_string());
        }
        assert!(!voices.knows("0") && voices.knows("1"));
    }
}

//! The ledger as a stream for people: what happened, and with `follow` what happens.

use proto::v1::{EventsRequest, LedgerEvent};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::failure::Failure;
use crate::ledger::Ledger;

/// Records that are read at a time.
const PAGE: usize = 256;

/// Records from `since` on; ends with the last one unless the request follows.
pub(super) fn stream(ledger: Ledger, request: EventsRequest) -> ReceiverStream<Result<LedgerEvent, Status>> {
    let (out, events) = mpsc::channel(PAGE);
    tokio::spawn(async move {
        let mut news = ledger.watch();
        let mut next = request.since.max(1);
        loop {
            news.mark_unchanged();
            let records = match ledger.records(next, PAGE).await {
                Ok(records) => records,
                Err(error) => return drop(out.send(Err(Failure::from(error).into())).await),
            };
            let full = records.len() == PAGE;
            for record in records {
                next = record.sequence + 1;
                let wanted = request.vm.is_empty() || record.vm == request.vm;
                if wanted && out.send(Ok(super::views::event(&record))).await.is_err() {
                    return;
                }
            }
            if full {
                continue;
            }
            if !request.follow {
                return;
            }
            tokio::select! {
                () = out.closed() => return,
                changed = news.changed() => if changed.is_err() { return },
            }
        }
    });
    ReceiverStream::new(events)
}

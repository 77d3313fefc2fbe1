//! A checkpoint streamed to an operator: head, pages, end.
//!
//! What can be refused is refused before the stream begins. It is no operation: it changes nothing, holds nothing, and ends
//! with its listener. A checkpoint that is removed meanwhile is said to be gone, not damaged.

use proto::status::Code;
use proto::v1::export_message::Message as Said;
use proto::v1::{ExportEnd, ExportHead, ExportMessage, ExportRequest};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Api, plans};
use crate::failure::Failure;
use crate::ingest::export::{self, Wanted};
use crate::ingest::read::Opened;
use crate::ledger::event::CheckpointEntry;
use crate::tls::Identity;

/// Frames on their way to the listener.
pub(super) const DEPTH: usize = 4;
/// Exports at a time: each holds a pack. More wait.
static ROOM: Semaphore = Semaphore::const_new(2);

/// An export's stream.
pub(super) type Export = ReceiverStream<Result<ExportMessage, Status>>;

impl Api {
    /// Begins an export.
    ///
    /// # Errors
    /// [`Code::NotFound`]; what the manifest and the bucket say.
    pub(super) async fn export(&self, operator: &Identity, request: ExportRequest) -> Result<Export, Failure> {
        let entry = plans::named_checkpoint(&self.ledger.state(), &request.name)?.clone();
        let wanted = if request.disks { Wanted::All } else { Wanted::Ram };
        let (head, opened) = self.export_head(&entry, wanted).await?;
        // All of a guest's memory leaves the cluster: that is worth a line.
        tracing::warn!(%operator, checkpoint = entry.id, vm = entry.vm, ?wanted, "a checkpoint is exported");
        let (out, stream) = mpsc::channel(DEPTH);
        let api = self.clone();
        tokio::spawn(async move {
            let sent = api.send_export(head, &opened, wanted, &out).await;
            api.end_export(&entry.id, sent.map(|pages| ExportEnd { pages, blocks: 0 }), &out).await;
        });
        Ok(ReceiverStream::new(stream))
    }

    /// What a checkpoint's export begins with, and where its pages lie.
    ///
    /// # Errors
    /// What the manifest and the bucket say.
    pub(super) async fn export_head(
        &self,
        entry: &CheckpointEntry,
        wanted: Wanted,
    ) -> Result<(ExportHead, Opened), Failure> {
        let opened = self.reader.manifest(&entry.manifest_key).await?;
        let sections = self.reader.sections(&opened).await?.into_iter().map(|(section, _)| section).collect();
        let head = ExportHead {
            checkpoint: Some(self.checkpoint(&entry.id)?),
            config: opened.manifest.config.clone(),
            sections,
            pages: export::pages_of(&opened, wanted),
        };
        Ok((head, opened))
    }

    /// Sends head and pages; how many pages.
    pub(super) async fn send_export(
        &self,
        head: ExportHead,
        opened: &Opened,
        wanted: Wanted,
        out: &export::Outgoing,
    ) -> Result<u64, Failure> {
        let _room = ROOM.acquire().await.map_err(|_| Failure::new(Code::Internal, "exports are closed"))?;
        export::say(out, Said::Head(head)).await?;
        export::send(&self.reader, opened, wanted, out).await
    }

    /// Sends what an export ends with.
    pub(super) async fn end_export(&self, checkpoint: &str, sent: Result<ExportEnd, Failure>, out: &export::Outgoing) {
        let last = match sent {
            Ok(end) => Ok(ExportMessage { message: Some(Said::End(end)) }),
            Err(failure) => Err(self.why(checkpoint, failure).into()),
        };
        // Who does not listen any more need not be told.
        let _ = out.send(last).await;
    }

    /// A checkpoint that was removed meanwhile is gone, not damaged.
    fn why(&self, checkpoint: &str, failure: Failure) -> Failure {
        if failure.code != Code::Cancelled && !self.ledger.state().checkpoints.contains_key(checkpoint) {
            return Failure::new(Code::NotFound, format!("checkpoint {checkpoint} was removed while it was exported"))
                .hint("export another one: `ctl checkpoint ls`");
        }
        failure
    }
}

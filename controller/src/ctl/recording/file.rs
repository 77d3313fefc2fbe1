//! A recording's file (`*.gwr`): a frame of kind Recording, frames of kind Pages of all spaces, frames of kind Journal.
//!
//! ```text
//! controller ──head, pages, blocks, end──> draft beside its final name ──digest equal, chain whole──> its name
//! ```
//! Each frame is checked as it comes, the pages in the end against the checkpoint's digest, the blocks against each other, and the
//! first block against the checkpoint. Until then nothing has the name that was asked for.

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::frame::{self, Kind, PAGE_BYTES};
use proto::ids::RecordingId;
use proto::status::Code;
use proto::v1;
use proto::v1::export_message::Message as Said;
use serde::Serialize;

use crate::ctl::client::Client;
use crate::ctl::export::draft::Draft;
use crate::ctl::export::proof::Proof;
use crate::ctl::export::protocol;
use crate::ctl::failure::Failure;
use crate::ctl::output::{Report, Text};
use crate::ctl::progress::Progress;
use crate::ctl::units::show_bytes;
use crate::journal::chain::{self, Block, Head};
use crate::journal::span::moment;

/// How often the bar moves.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// What was written.
#[derive(Debug, Serialize)]
pub struct Written {
    vm: String,
    checkpoint: String,
    recording: String,
    path: String,
    bytes: u64,
    pages: u64,
    blocks: u64,
    from_instruction: u64,
    to_instruction: u64,
    /// When the last block ended.
    to: String,
}

impl Report for Written {
    fn text(&self) -> Text {
        Text::fields([
            ("recording", format!("{} of {}", self.recording, self.vm)),
            ("path", self.path.clone()),
            ("checkpoint", format!("{}, {} pages", self.checkpoint, self.pages)),
            ("journal", format!("{} blocks, up to {}", self.blocks, self.to)),
            ("instructions", format!("{} to {}", self.from_instruction, self.to_instruction)),
            ("written", show_bytes(self.bytes)),
        ])
    }
}

/// Writes what the controller exports into a file.
///
/// # Errors
/// Times that were not recorded, a name that is taken, a full disk, or bytes that are not what they should be.
pub async fn write(
    client: &mut Client,
    request: v1::ExportRecordingRequest,
    doing: &str,
    out: &Path,
) -> Result<Written, Failure> {
    let failed = |status: tonic::Status| Failure::from_status(doing, &status);
    let mut stream = client.export_recording(request).await.map_err(failed)?.into_inner();
    let mut file: Option<Recorded> = None;
    while let Some(message) = stream.message().await.map_err(failed)? {
        match (message.message, &mut file) {
            (Some(Said::Head(head)), None) => file = Some(Recorded::begin(out, head, doing)?),
            (Some(Said::Pages(chunk)), Some(file)) => tokio::task::block_in_place(|| file.pages(&chunk.frame))?,
            (Some(Said::Journal(chunk)), Some(file)) => tokio::task::block_in_place(|| file.block(chunk.frame))?,
            (Some(Said::End(end)), Some(_)) => {
                let file = file.take().expect("it was matched as there");
                return tokio::task::block_in_place(|| file.finish(&end));
            }
            _ => return Err(protocol(doing, "a message that does not belong there")),
        }
    }
    Err(protocol(doing, "the stream's end before the recording's"))
}

/// A file that is being written.
struct Recorded {
    doing: String,
    path: String,
    proof: Proof,
    draft: Draft,
    bytes: u64,
    /// First block, what the next one must continue, the last block's end, and how many came.
    first: Option<Block>,
    head: Option<Head>,
    last_ns: u64,
    blocks: u64,
    progress: Progress,
    shown: Instant,
}

impl Recorded {
    fn begin(out: &Path, head: v1::ExportHead, doing: &str) -> Result<Recorded, Failure> {
        let draft = Draft::stream(out)?;
        let frame = frame::encode_message(Kind::Recording, &head);
        let proof = Proof::new(doing, head, usize::MAX)?;
        let mut recorded = Recorded {
            doing: doing.to_owned(),
            path: out.display().to_string(),
            proof,
            draft,
            bytes: 0,
            first: None,
            head: None,
            last_ns: 0,
            blocks: 0,
            progress: Progress::new(doing),
            shown: Instant::now(),
        };
        recorded.append(&frame)?;
        Ok(recorded)
    }

    fn append(&mut self, frame: &[u8]) -> Result<(), Failure> {
        self.bytes += frame.len() as u64;
        if self.shown.elapsed() >= PROGRESS_EVERY {
            let bytes = |pages: u64| pages.saturating_mul(PAGE_BYTES as u64);
            self.progress.bytes(bytes(self.proof.came), bytes(self.proof.head.pages));
            self.shown = Instant::now();
        }
        self.draft.append(frame)
    }

    fn pages(&mut self, frame: &[u8]) -> Result<(), Failure> {
        if self.head.is_some() {
            return Err(protocol(&self.doing, "pages after blocks"));
        }
        self.proof.take(frame)?;
        self.append(frame)
    }

    fn block(&mut self, frame: Bytes) -> Result<(), Failure> {
        let corrupt = |why: String| Failure::new(Code::Corrupt, format!("{}: {why}", self.doing));
        let recording = match &self.first {
            Some(first) => first.message.recording.clone(),
            None => {
                let message: v1::JournalBlock =
                    frame::decode_message(Kind::Journal, &frame).map_err(|error| corrupt(error.to_string()))?;
                message.recording
            }
        };
        let id = <[u8; 16]>::try_from(recording).map_err(|_| corrupt("a block of no recording".into()))?;
        let blocks = chain::check(RecordingId(id), self.head.as_ref(), [frame]).map_err(|e| corrupt(e.to_string()))?;
        let block = blocks.into_iter().next().ok_or_else(|| corrupt("a block came twice".into()))?;
        if self.first.is_none() {
            let checkpoint = self.proof.head.checkpoint.clone().unwrap_or_default();
            let state = checkpoint.digest.unwrap_or_default().state;
            if block.message.cut.as_ref().is_none_or(|cut| cut.state_digest != state) {
                return Err(corrupt("the first block does not begin with the checkpoint".into()));
            }
            self.first = Some(block.clone());
        }
        (self.head, self.last_ns) = (Some(Head::after(&block)), block.message.realtime_ns);
        self.blocks += 1;
        self.append(&block.frame)
    }

    fn finish(self, end: &v1::ExportEnd) -> Result<Written, Failure> {
        self.proof.check(end.pages)?;
        let (Some(first), Some(head)) = (self.first, self.head) else {
            return Err(Failure::new(Code::Corrupt, format!("{}: no block came", self.doing)));
        };
        if end.blocks != self.blocks {
            let text = format!("{}: {} of {} blocks came", self.doing, self.blocks, end.blocks);
            return Err(Failure::new(Code::Corrupt, text));
        }
        self.progress.end();
        self.draft.finish()?;
        let checkpoint = self.proof.head.checkpoint.unwrap_or_default();
        Ok(Written {
            vm: checkpoint.vm,
            checkpoint: checkpoint.id,
            recording: crate::ctl::report::hex(&first.message.recording),
            path: self.path,
            bytes: self.bytes,
            pages: self.proof.came,
            blocks: self.blocks,
            from_instruction: first.start().retired,
            to_instruction: head.end.unwrap_or_default().retired,
            to: moment(self.last_ns),
        })
    }
}

#[cfg(test)]
mod tests {
    use proto::digest::machine_digest;

    use super::*;
    use crate::ingest::digest::{PageDigests, state_digest};
    use crate::journal::chain::tests::{RECORDING, Recorder};

    /// Of a guest of 2 MiB that is all zero but for page 3, and a recording of which it is the beginning.
    fn script() -> (v1::ExportHead, Vec<u8>, Vec<Bytes>) {
        let run = frame::PageRun { first_page: 3, pages: 1, space: 0, encoding: frame::Encoding::Raw };
        let mut pages = run.begin();
        pages.extend_from_slice(&[9; PAGE_BYTES]);
        frame::seal(&mut pages);
        let mut digests = PageDigests::new(512);
        digests.set(3, proto::leaf::leaf(&[9; PAGE_BYTES]));
        let digest = machine_digest(digests.root(), state_digest(&[]), &[]);
        let mut recorder = Recorder::new(RECORDING);
        let state = digest.state.clone().try_into().unwrap();
        let blocks = vec![recorder.cut_of(state), recorder.block(), recorder.block()];
        let checkpoint = v1::CheckpointRecord { vm: "vm1".into(), digest: Some(digest), ..Default::default() };
        let config = v1::MachineConfig { memory_bytes: 2 << 20, ..Default::default() };
        let head = v1::ExportHead { checkpoint: Some(checkpoint), config: Some(config), sections: vec![], pages: 1 };
        (head, pages, blocks)
    }

    fn folder(test: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("godwit-gwr-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn the_file_is_head_pages_and_blocks_and_gets_its_name_last() {
        let folder = folder("whole");
        let out = folder.join("vm1.gwr");
        let (head, pages, blocks) = script();
        let mut file = Recorded::begin(&out, head.clone(), "export vm1").unwrap();
        file.pages(&pages).unwrap();
        blocks.iter().for_each(|block| file.block(block.clone()).unwrap());
        assert!(!out.exists());
        let written = file.finish(&v1::ExportEnd { pages: 1, blocks: 3 }).unwrap();
        assert_eq!((written.blocks, written.from_instruction, written.to_instruction), (3, 1000, 3_001_000));
        let bytes = std::fs::read(&out).unwrap();
        assert_eq!(bytes.len() as u64, written.bytes);
        let expected = [frame::encode_message(Kind::Recording, &head), pages].concat();
        assert_eq!(bytes, [expected, blocks.concat()].concat());
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn what_is_not_whole_leaves_nothing() {
        let folder = folder("lies");
        let out = folder.join("vm1.gwr");
        let (head, pages, blocks) = script();
        let begin = |with_pages: bool| {
            let mut file = Recorded::begin(&out, head.clone(), "export vm1").unwrap();
            if with_pages {
                file.pages(&pages).unwrap();
            }
            file
        };
        assert!(begin(true).block(blocks[1].clone()).unwrap_err().message.contains("begin with the checkpoint"));
        let mut gap = begin(true);
        gap.block(blocks[0].clone()).unwrap();
        assert!(gap.block(blocks[2].clone()).unwrap_err().message.contains("a gap"));
        assert_eq!(gap.pages(&pages).unwrap_err().code, Code::Protocol);
        assert_eq!(gap.block(blocks[0].clone()).unwrap_err().code, Code::Corrupt);
        assert!(gap.finish(&v1::ExportEnd { pages: 1, blocks: 2 }).unwrap_err().message.contains("1 of 2 blocks"));
        assert!(begin(true).finish(&v1::ExportEnd { pages: 1, blocks: 0 }).is_err());
        let mut without = begin(false);
        without.block(blocks[0].clone()).unwrap();
        assert!(without.finish(&v1::ExportEnd { pages: 0, blocks: 1 }).unwrap_err().message.contains("pages came"));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        std::fs::remove_dir_all(folder).unwrap();
    }
}

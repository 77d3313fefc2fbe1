//! Which instants of a VM can be visited: a checkpoint, and the journal from there on; for an export, and for a restore.
//!
//! Checkpoints are the ledger's, segments are the bucket's; what belongs together is known by the digest of the state.

use proto::status::Code;
use proto::v1::export_message::Message as Said;
use proto::v1::recorded_instant::At;
use proto::v1::{Chunk, ExportEnd, ExportHead, ExportRecordingRequest, RecordedInstant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::export::{DEPTH, Export};
use super::plans::unknown_vm;
use super::{Api, recordings};
use crate::failure::Failure;
use crate::ingest::export::{self, Outgoing, Wanted};
use crate::ingest::read::Opened;
use crate::journal::read::Blocks;
use crate::journal::span::{self, Visit, Visited};
use crate::journal::{Journals, segment::Segment};
use crate::ledger::damage::is_damaged;
use crate::ledger::event::{CheckpointEntry, Replay};
use crate::ledger::recording::Recording;
use crate::ledger::state::State;
use crate::tls::Identity;

/// A recording with the newest sound checkpoint that each of its segments begins with.
///
/// # Errors
/// The bucket's.
pub(super) async fn visited(journals: &Journals, state: &State, recording: &Recording) -> Result<Visited, Failure> {
    let (vm, id) = recordings::ids(recording)?;
    let tape = journals.tape(vm, id).await?;
    let checkpoints = state.checkpoints_of(&recording.vm_id);
    let base = |segment: &Segment| {
        let mut newest = checkpoints.iter().rev();
        let found = newest.find(|entry| segment.begins_with(&entry.digest.state) && !is_damaged(entry));
        found.map(|entry| entry.id.clone())
    };
    let bases = tape.segments.iter().map(base).collect();
    Ok(Visited { recording: recording.id.clone(), tape, bases })
}

/// An instant, if one was named.
fn instant(named: Option<RecordedInstant>) -> Option<At> {
    named.and_then(|instant| instant.at)
}

/// What is asked for: where it lies.
struct Place {
    visit: Visit,
    visited: Visited,
    recording: Recording,
    entry: CheckpointEntry,
}

impl Place {
    fn segments(&self) -> &[Segment] {
        &self.visited.tape.segments
    }
}

impl Api {
    /// All recordings of a VM, the newest first.
    async fn all_visited(&self, state: &State, vm_id: &str) -> Result<Vec<(Recording, Visited)>, Failure> {
        let mut all = Vec::new();
        for recording in state.recordings_of(vm_id) {
            all.push((Recording::clone(recording), visited(&self.journals, state, recording).await?));
        }
        Ok(all)
    }

    /// Finds the checkpoint for an instant of a VM; for none the newest one that belongs to a recording, or the one that is
    /// named instead of a VM.
    async fn place(&self, name: &str, at: Option<At>) -> Result<Place, Failure> {
        let state = self.ledger.state();
        let named = state.checkpoints.get(name);
        let vm_id = named.map(|entry| entry.vm_id.as_str()).or_else(|| state.id_of(name));
        let vm_id = vm_id.ok_or_else(|| unknown_vm(name))?;
        let vm = state.name_of(vm_id).to_owned();
        let (kept, visited): (Vec<_>, Vec<_>) = self.all_visited(&state, vm_id).await?.into_iter().unzip();
        let none = || {
            let text = format!("no checkpoint of {name} belongs to a recording: {}", span::told(&visited));
            Failure::new(Code::NotFound, text).hint(format!("`ctl record start {vm}` begins one"))
        };
        let visit = match (named, at) {
            (Some(_), Some(_)) => {
                return Err(Failure::new(Code::BadInput, "an instant is named of a VM, not of a checkpoint"));
            }
            (Some(entry), None) => span::find_checkpoint(&visited, &entry.id).ok_or_else(none)?,
            (None, Some(at)) => span::find(&vm, &visited, at)?,
            (None, None) => {
                let newest = state.checkpoints_of(vm_id).into_iter().rev();
                newest.into_iter().find_map(|entry| span::find_checkpoint(&visited, &entry.id)).ok_or_else(none)?
            }
        };
        let entry = state.checkpoints.get(&visit.checkpoint).ok_or_else(none)?;
        let entry = CheckpointEntry::clone(entry);
        let mut both = kept.into_iter().zip(visited);
        let (recording, visited) = both.nth(visit.recording).ok_or_else(|| unknown_vm(name))?;
        Ok(Place { visit, visited, recording, entry })
    }

    fn blocks(&self, place: &Place, from: usize, to: usize) -> Result<Blocks, Failure> {
        let (vm, id) = recordings::ids(&place.recording)?;
        let segments = place.segments();
        Ok(self.journals.shelf(vm, id).blocks(segments[from].first, segments[to].next))
    }

    /// The checkpoint and the part of the journal that lead to an instant of a VM.
    ///
    /// # Errors
    /// [`Code::NotFound`] naming what can be visited; [`Code::Corrupt`]; the bucket's.
    pub(super) async fn replay_to(&self, vm: &str, at: At) -> Result<(CheckpointEntry, Replay), Failure> {
        let place = self.place(vm, Some(at)).await?;
        let Visit { base, target, .. } = place.visit;
        let (first, began_ns) = (&place.segments()[base], place.segments()[target].start_ns);
        let mut blocks = self.blocks(&place, target, target)?;
        let mut before_ns = began_ns;
        let before = &place.segments()[base..target];
        let mut bytes: u64 = before.iter().flat_map(|segment| &segment.parts).map(|part| part.bytes).sum();
        while let Some(block) = blocks.next().await? {
            bytes += block.frame.len() as u64;
            if !span::reached(&block, at) {
                before_ns = before_ns.max(block.message.realtime_ns);
                continue;
            }
            let until = span::position(&block, before_ns, at);
            let replay = Replay {
                recording: place.recording.id.clone(),
                first: first.first,
                last: block.message.sequence,
                retired: until.retired,
                skipped_tsc: until.skipped_tsc,
                span_ms: block.message.realtime_ns.saturating_sub(first.start_ns) / 1_000_000,
                bytes,
            };
            return Ok((place.entry, replay));
        }
        Err(Failure::new(Code::Corrupt, format!("recording {} ends before it should", place.recording.id)))
    }

    /// Begins the export of a recording.
    ///
    /// # Errors
    /// As [`Api::replay_to`].
    pub(super) async fn export_replay(
        &self,
        operator: &Identity,
        asked: ExportRecordingRequest,
    ) -> Result<Export, Failure> {
        let until = instant(asked.until);
        let place = self.place(&asked.name, instant(asked.at)).await?;
        if let Some(until) = until {
            // It must lie behind the beginning, and have been recorded.
            let Place { visited, visit, .. } = &place;
            let tape = crate::journal::segment::Tape {
                segments: visited.tape.segments[visit.base..=visit.last].to_vec(),
                ..Default::default()
            };
            let mut bases = vec![None; tape.segments.len()];
            bases[0] = Some(visit.checkpoint.clone());
            let part = Visited { recording: visited.recording.clone(), tape, bases };
            span::find(&place.entry.vm, &[part], until)?;
        }
        let (head, opened) = self.export_head(&place.entry, Wanted::All).await?;
        let blocks = self.blocks(&place, place.visit.base, place.visit.last)?;
        let (checkpoint, recording) = (place.entry.id, place.recording.id);
        tracing::warn!(%operator, checkpoint, vm = place.entry.vm, recording, "a recording is exported");
        let (out, stream) = mpsc::channel(DEPTH);
        let api = self.clone();
        tokio::spawn(async move {
            let sent = api.send_replay(head, &opened, blocks, until, &out).await;
            api.end_export(&checkpoint, sent, &out).await;
        });
        Ok(ReceiverStream::new(stream))
    }

    async fn send_replay(
        &self,
        head: ExportHead,
        opened: &Opened,
        mut blocks: Blocks,
        until: Option<At>,
        out: &Outgoing,
    ) -> Result<ExportEnd, Failure> {
        let pages = self.send_export(head, opened, Wanted::All, out).await?;
        let mut sent = 0;
        while let Some(block) = blocks.next().await? {
            let over = until.is_some_and(|until| span::reached(&block, until));
            export::say(out, Said::Journal(Chunk { frame: block.frame })).await?;
            sent += 1;
            if over {
                break;
            }
        }
        Ok(ExportEnd { pages, blocks: sent })
    }
}

//! Merging: the many small objects of a complete segment become few, and the segment gets an index.
//!
//! ```text
//!   1. the merged object takes the place of its first part (one put: before it the parts are there, after it all blocks)
//!   2. the index is put
//!   3. the other parts go
//! ```
//! It may be cut short anywhere and begun again: readers go by sequences, so that blocks that lie there twice are read
//! once, and what is left over is found by the next one who reads the recording back. Nothing is removed that was
//! not read, checked, and put elsewhere before.

use bytes::{Bytes, BytesMut};
use proto::frame::{self, Kind};
use proto::seal::Sealer;
use proto::v1::JournalPart;

use super::Entry;
use super::chain;
use super::segment::Segment;
use crate::failure::Failure;
use crate::ingest::read::damaged;

/// Largest object that is made, bytes: who reads one has all of it in memory.
const MERGED_BYTES_MAX: u64 = 64 << 20;

impl Entry {
    /// Merges all segments that are complete, and removes what others have taken the place of.
    ///
    /// # Errors
    /// The bucket's; how far it came is found out by reading back.
    pub(super) async fn tidy(&self) -> Result<(), Failure> {
        let _upkeep = self.upkeep.lock().await;
        let tidied = self.merge_all().await;
        if tidied.is_err() {
            *self.tape.lock().await = None;
        }
        tidied
    }

    async fn merge_all(&self) -> Result<(), Failure> {
        loop {
            let tape = self.current().await?;
            self.delete(&tape.stale).await?;
            let Some(number) = tape.unindexed().next() else {
                if let Some(tape) = &mut *self.tape.lock().await {
                    tape.stale.clear();
                }
                return Ok(());
            };
            let segment = &tape.segments[number];
            let merged = self.merge(segment).await?;
            if let Some(tape) = &mut *self.tape.lock().await {
                tape.stale.clear();
                let there = tape.segments.iter_mut().find(|there| there.first == merged.first);
                there.into_iter().for_each(|there| *there = merged.clone());
            }
        }
    }

    async fn delete(&self, keys: &[String]) -> Result<(), Failure> {
        for key in keys {
            self.shelf.reader.bucket.delete(key).await?;
        }
        Ok(())
    }

    /// Merges a segment; what it is then.
    async fn merge(&self, segment: &Segment) -> Result<Segment, Failure> {
        let mut merged = Segment { parts: Vec::new(), indexed: true, ..segment.clone() };
        let mut gone = Vec::new();
        for (parts, end) in groups(segment) {
            let part = match parts {
                [alone] => *alone,
                parts => self.join(parts, end).await?,
            };
            gone.extend(parts[1..].iter().map(|part| self.shelf.key(part.first_sequence)));
            merged.parts.push(part);
        }
        let key = self.shelf.index_key(segment.first);
        let sealed = self.sealed(&merged).await?;
        self.shelf.reader.bucket.put(&key, sealed).await?;
        self.delete(&gone).await?;
        Ok(merged)
    }

    async fn sealed(&self, segment: &Segment) -> Result<Bytes, Failure> {
        let reader = &self.shelf.reader;
        let data_key = reader.keys.data_key(&reader.bucket, self.shelf.vm).await?;
        let sealer = Sealer::new(&data_key, self.shelf.vm, proto::seal::salt());
        let plain = frame::encode_message(Kind::Control, &segment.to_message(self.shelf.recording));
        Ok(sealer.seal(&plain).into())
    }

    /// Puts these parts, whose blocks end before `end`, as one object. The sealed frames stay as they are.
    async fn join(&self, parts: &[JournalPart], end: u64) -> Result<JournalPart, Failure> {
        let first = parts[0].first_sequence;
        let (mut joined, mut frames) = (BytesMut::new(), Vec::new());
        for part in parts {
            let key = self.shelf.key(part.first_sequence);
            let gone = || damaged(&format!("journal {key}"), "it is missing in the bucket");
            let (stored, inside) = self.shelf.object(part.first_sequence).await?.ok_or_else(gone)?;
            joined.extend_from_slice(&stored);
            frames.extend(inside);
        }
        let what = format!("journal {}", self.shelf.key(first));
        let blocks = chain::check(self.shelf.recording, None, frames).map_err(|broken| damaged(&what, broken))?;
        let found = blocks.first().zip(blocks.last()).map(|(a, b)| (a.message.sequence, b.message.sequence + 1));
        if found != Some((first, end)) {
            return Err(damaged(&what, "its parts hold other blocks than their names say"));
        }
        let bytes = joined.len() as u64;
        self.shelf.reader.bucket.put(&self.shelf.key(first), joined.freeze()).await?;
        Ok(JournalPart { first_sequence: first, bytes })
    }
}

/// Parts that become one object each, and the sequence before which each ends.
fn groups(segment: &Segment) -> Vec<(&[JournalPart], u64)> {
    let (mut groups, mut rest) = (Vec::new(), &segment.parts[..]);
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |part: &&JournalPart| {
            bytes += part.bytes;
            bytes <= MERGED_BYTES_MAX
        };
        let count = rest.iter().take_while(fits).count().max(1);
        let (group, after) = rest.split_at(count);
        groups.push((group, after.first().map_or(segment.next, |part| part.first_sequence)));
        rest = after;
    }
    groups
}

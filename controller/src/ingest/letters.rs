//! What a restore puts on its lanes: the frames of packs, opened into buffers that go to TLS as they are.
//!
//! A sealed frame is decrypted where it will be sent from, behind its envelope. Its pages are not hashed here: that it opens says
//! that its bytes are those that were sealed; its hash, which it brings along, is compared with what the page map's digests make;
//! and the target, which trusts nobody, compares the pages with that hash and all of them with the checkpoint's digest. So no page
//! arrives that is not the page map's, and a hash of its own would only find again what the target finds. What does not fit,
//! and frames that are not wanted whole or not sealed, go by [`pages`], which looks at every byte and says what is wrong.

use std::sync::Arc;

use bytes::Bytes;
use proto::frame;
use proto::lane::{self, Buffers};
use proto::seal::Opener;

use super::map::Extent;
use super::read::{Pieces, frames, pages, stored};
use crate::failure::Failure;

/// Pages after which a letter is full: many small frames, or one large one.
const PAGES: u32 = 64;

/// Frames in their envelopes, one after the other.
pub struct Letter {
    /// All of it; never empty.
    pub bytes: Bytes,
    /// How many frames.
    pub frames: u64,
    /// Their bytes, without envelopes.
    pub frame_bytes: u64,
}

/// Opens what lies in a pack.
pub struct Writer {
    /// Nothing in version 1.
    pub opener: Option<Opener>,
    /// Where letters lie until they have left.
    pub buffers: Arc<Buffers>,
    /// The pack.
    pub key: String,
    /// Its bytes.
    pub pieces: Pieces,
}

#[derive(Default)]
struct Draft {
    bytes: Vec<u8>,
    pages: u32,
    frames: u64,
    frame_bytes: u64,
}

impl Writer {
    /// The pages of these extents. Slow: run it beside the runtime.
    ///
    /// # Errors
    /// As [`pages`].
    pub fn write(&self, extents: &[Extent]) -> Result<Vec<Letter>, Failure> {
        let mut letters = Vec::new();
        let mut draft = self.begin();
        for extents in frames(extents) {
            if draft.pages >= PAGES {
                letters.push(self.finish(std::mem::replace(&mut draft, self.begin())));
            }
            if !self.as_it_is(&mut draft, extents) {
                for (run, frame) in pages(self.opener.as_ref(), &self.key, &self.pieces, extents)? {
                    lane::begin(frame.len(), &mut draft.bytes);
                    draft.bytes.extend_from_slice(&frame);
                    draft.note(run.pages, frame.len());
                }
            }
        }
        if draft.frames > 0 {
            letters.push(self.finish(draft));
        }
        Ok(letters)
    }

    fn begin(&self) -> Draft {
        let mut bytes = self.buffers.take();
        bytes.clear();
        Draft { bytes, ..Draft::default() }
    }

    fn finish(&self, draft: Draft) -> Letter {
        let Draft { bytes, frames, frame_bytes, .. } = draft;
        Letter { bytes: self.buffers.lend(bytes), frames, frame_bytes }
    }

    /// Appends a sealed frame of which all is wanted. If it is none, or anything is odd, nothing is appended.
    fn as_it_is(&self, draft: &mut Draft, extents: &[Extent]) -> bool {
        let (Some(opener), [extent]) = (&self.opener, extents) else { return false };
        if extent.leaves.is_empty() {
            return false;
        }
        let Some(sealed) = stored(&self.pieces, &extent.place) else { return false };
        let (before, mut frame_at) = (draft.bytes.len(), 0);
        let opened = opener.open_into(&sealed, &mut draft.bytes, |bytes, buffer| {
            lane::begin(bytes, buffer);
            frame_at = buffer.len();
        });
        let fits = opened.is_ok()
            && frame::decode_stated_pages(&draft.bytes[frame_at..], &extent.leaves).is_ok_and(|run| {
                (run.space, run.first_page, run.pages) == (extent.space, extent.first_page, extent.pages)
            });
        if fits {
            draft.note(extent.pages, draft.bytes.len() - frame_at);
        } else {
            draft.bytes.truncate(before);
        }
        fits
    }
}

impl Draft {
    fn note(&mut self, pages: u32, frame_bytes: usize) {
        self.pages += pages;
        self.frames += 1;
        self.frame_bytes += frame_bytes as u64;
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use proto::frame::{Encoding, PageRun};
    use proto::ids::{Generation, PackId, VmId};
    use proto::leaf::Leaf;
    use proto::seal::{DataKey, Sealer};
    use proto::v1::Chunk;

    use super::super::map::{PackAt, Place};
    use super::*;

    const VM: VmId = VmId([2; 16]);

    fn key() -> DataKey {
        DataKey::new([1; 32])
    }

    /// A pack of sealed frames of so many pages each, and the extents that want all of it.
    fn packed(counts: &[u32]) -> (Writer, Vec<Extent>) {
        let sealer = Sealer::new(&key(), VM, [3; 16]);
        let (mut bytes, mut extents, mut first_page) = (Vec::new(), Vec::new(), 7);
        let pack = PackAt { generation: Generation(1), id: PackId([0; 32]), bytes: 0 };
        for pages in counts {
            let run = PageRun { first_page, pages: *pages, space: 0, encoding: Encoding::Raw };
            let mut frame = run.begin();
            let noise = frame.len();
            frame.resize(noise + run.payload_bytes(), 0);
            blake3::Hasher::new().update(&first_page.to_le_bytes()).finalize_xof().fill(&mut frame[noise..]);
            frame::seal(&mut frame);
            let leaves: Vec<Leaf> = frame::decode_pages(&frame).unwrap().leaves;
            let sealed = sealer.seal(&frame);
            let place = Place { pack, offset: bytes.len() as u64, bytes: sealed.len() as u32, first_page };
            extents.push(Extent { space: 0, first_page, leaves, pages: *pages, place });
            bytes.extend(sealed);
            first_page += u64::from(*pages);
        }
        let pieces = Pieces::from([(0, bytes.into())]);
        (Writer { opener: Some(Opener::new(key(), VM)), buffers: Arc::default(), key: "pack".into(), pieces }, extents)
    }

    /// The frames in letters.
    fn read(letters: &[Letter]) -> Vec<Bytes> {
        let mut frames = Vec::new();
        for letter in letters {
            let before = frames.len();
            let mut rest = letter.bytes.clone();
            while let Some(head) = rest.first_chunk::<5>() {
                let bytes = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                frames.push(Chunk::decode(rest.slice(5..5 + bytes)).unwrap().frame);
                rest = rest.slice(5 + bytes..);
            }
            let ours = &frames[before..];
            assert_eq!(letter.frames, ours.len() as u64);
            assert_eq!(letter.frame_bytes, ours.iter().map(|frame| frame.len() as u64).sum::<u64>());
        }
        frames
    }

    #[test]
    fn letters_hold_all_that_is_wanted_and_are_not_large() {
        let (writer, extents) = packed(&[1, 2, 60, 1, 1, 64, 200, 3]);
        let letters = writer.write(&extents).unwrap();
        assert_eq!(letters.iter().map(|letter| letter.frames).collect::<Vec<_>>(), [4, 2, 1, 1]);
        let found = read(&letters);
        assert_eq!(found.len(), extents.len());
        for (frame, extent) in found.iter().zip(&extents) {
            let held = frame::decode_pages(frame).unwrap();
            assert_eq!((held.run.first_page, &held.leaves), (extent.first_page, &extent.leaves));
        }
        assert!(writer.write(&[]).unwrap().is_empty());
    }

    #[test]
    fn parts_of_frames_are_cut_out() {
        let (writer, extents) = packed(&[10, 4]);
        let part = |skip: usize, pages: usize| Extent {
            first_page: extents[0].first_page + skip as u64,
            leaves: extents[0].leaves[skip..skip + pages].to_vec(),
            pages: pages as u32,
            ..extents[0].clone()
        };
        let found = read(&writer.write(&[part(0, 3), part(5, 5), extents[1].clone()]).unwrap());
        let runs: Vec<_> = found.iter().map(|frame| frame::decode_pages(frame).unwrap().run).collect();
        assert_eq!(runs.iter().map(|run| (run.first_page, run.pages)).collect::<Vec<_>>(), [(7, 3), (12, 5), (17, 4)]);
    }

    #[test]
    fn what_the_page_map_does_not_state_is_named_and_not_sent() {
        let (writer, extents) = packed(&[4, 4, 4]);
        let mut stated = extents.clone();
        stated[1].leaves[2][5] ^= 1;
        let failure = writer.write(&stated).err().unwrap();
        assert!(failure.message.contains("page 13 in it is not what the page map states"), "{failure}");
        let mut swapped = extents.clone();
        swapped[0].place = extents[1].place;
        let failure = writer.write(&swapped).err().unwrap();
        assert!(failure.message.contains("not page 7"), "{failure}");
        let mut outside = extents;
        outside[2].place.bytes += 1;
        assert!(writer.write(&outside).err().unwrap().message.contains("outside of the pack"));
    }
}

//! What a thread puts on a lane in one go: the frames of a batch, or for a checkpoint their sealed forms.
//!
//! A checkpoint goes to a bucket that keeps what it has: pages whose digest the target already knows are left out, even from
//! the middle of a frame. What is left is compressed and encrypted here, before it leaves the host. It refuses to know
//! lanes and rounds.

use proto::frame::{self, Encoding, HEADER_BYTES, PAGES_PREFIX_BYTES, PageRun};
use proto::lane;
use proto::leaf::Leaf;
use proto::seal::Sealer;
use vmcb_engine::memory::PAGE_BYTES;
use vmcb_engine::memory::digest::{PageDigests, ZERO_LEAF};
use vmcb_engine::memory::shared::Run;
use vmcb_engine::transfer::runs::Sealed;

/// Frames in their envelopes, one after the other.
#[derive(Debug, PartialEq, Eq)]
pub struct Load {
    /// All of it.
    pub bytes: Vec<u8>,
    /// How many frames.
    pub frames: u64,
    /// Their bytes, without envelopes.
    pub frame_bytes: u64,
    /// Pages whose bytes are in them.
    pub data_pages: u64,
}

impl Load {
    /// The frames as they are.
    pub fn plain(batch: Sealed) -> Load {
        let raw = batch.frames.iter().filter(|frame| frame.run.encoding == Encoding::Raw);
        Load {
            data_pages: raw.map(|frame| u64::from(frame.run.pages)).sum(),
            frames: batch.frames.len() as u64,
            frame_bytes: batch.frame_bytes().map(|frame| frame.len() as u64).sum(),
            bytes: batch.bytes,
        }
    }

    /// The sealed forms of the frames, reduced to pages that changed: one word for each page of the batch, in order.
    pub fn sealed(sealer: &Sealer, batch: Sealed, changed: &[bool], mut buffer: Vec<u8>) -> Load {
        buffer.clear();
        let mut load = Load { bytes: buffer, frames: 0, frame_bytes: 0, data_pages: 0 };
        let leaves: Vec<Leaf> = batch.digests().map(|(_, _, leaf)| leaf).collect();
        let mut first = 0;
        for (part, whole) in batch.frames.iter().zip(batch.frame_bytes()) {
            let pages = first..first + part.run.pages as usize;
            load.push(sealer, part.run, whole, &leaves[pages.clone()], &changed[pages.clone()]);
            first = pages.end;
        }
        load
    }

    fn push(&mut self, sealer: &Sealer, run: PageRun, whole: &[u8], leaves: &[Leaf], changed: &[bool]) {
        if changed.iter().all(|changed| *changed) {
            return self.append(sealer, whole, &run);
        }
        let page_bytes = PAGE_BYTES as usize;
        let mut at = 0;
        for same in changed.chunk_by(|a, b| a == b) {
            let pages = at..at + same.len();
            at = pages.end;
            if !same[0] {
                continue;
            }
            let part = PageRun { first_page: run.first_page + pages.start as u64, pages: same.len() as u32, ..run };
            let mut frame = part.begin();
            match run.encoding {
                Encoding::Zero => frame::seal(&mut frame),
                Encoding::Raw => {
                    let payload = &whole[HEADER_BYTES + PAGES_PREFIX_BYTES..];
                    frame.extend_from_slice(&payload[pages.start * page_bytes..pages.end * page_bytes]);
                    frame::seal_pages(&mut frame, &leaves[pages]);
                }
            }
            self.append(sealer, &frame, &part);
        }
    }

    fn append(&mut self, sealer: &Sealer, frame: &[u8], run: &PageRun) {
        let mut frame_bytes = 0;
        sealer.seal_into(frame, &mut self.bytes, |bytes, buffer| {
            frame_bytes = bytes as u64;
            lane::begin(bytes, buffer);
        });
        self.frames += 1;
        self.frame_bytes += frame_bytes;
        self.data_pages += if run.encoding == Encoding::Raw { u64::from(run.pages) } else { 0 };
    }
}

/// The runs, which are in order, and between them the pages that the target has as something else than zeros.
pub fn with_holes(filled: Vec<Run>, there: &PageDigests) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(filled.len());
    let mut next = 0;
    let end = Run { first: there.pages(), pages: 0 };
    for run in filled.into_iter().chain([end]) {
        for page in (next..run.first).filter(|page| there.get(*page) != ZERO_LEAF) {
            match runs.last_mut() {
                Some(last) if last.end() == page => last.pages += 1,
                _ => runs.push(Run { first: page, pages: 1 }),
            }
        }
        next = run.end();
        if run.pages > 0 {
            runs.push(run);
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use proto::frame::decode_pages;
    use proto::ids::VmId;
    use proto::seal::{DataKey, Opener};
    use proto::v1::Chunk;
    use vmcb_engine::transfer::runs::Batch;

    use super::*;
    use crate::migration::bank::Bank;

    fn batch(fill: &[u8]) -> Sealed {
        let bank = Bank::new(fill.len() as u64);
        (0..).zip(fill).for_each(|(page, fill)| bank.write(page, &[*fill; 4096], 1));
        let mut batch = Batch::new(Vec::new(), lane::begin);
        batch.push(0, &bank.shared(), Run { first: 0, pages: bank.pages }, None, |_| false).unwrap();
        batch.seal()
    }

    /// First page and fills of each frame.
    fn opened(load: &Load) -> Vec<(u64, Vec<u8>)> {
        let opener = Opener::new(DataKey::new([1; 32]), VmId([2; 16]));
        let (mut rest, mut frames) = (&load.bytes[..], Vec::new());
        while let Some(head) = rest.first_chunk::<5>() {
            let bytes = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let chunk = Chunk::decode(&rest[5..5 + bytes]).unwrap();
            rest = &rest[5 + bytes..];
            let plain = opener.open(&chunk.frame).unwrap();
            let held = decode_pages(&plain).unwrap();
            let fills = held.payload.chunks(4096).map(|page| page[0]).chain(std::iter::repeat(0));
            frames.push((held.run.first_page, fills.take(held.run.pages as usize).collect()));
        }
        frames
    }

    #[test]
    fn what_the_target_has_is_cut_out_of_frames() {
        let sealer = Sealer::new(&DataKey::new([1; 32]), VmId([2; 16]), [3; 16]);
        let fill = [1, 2, 3, 4, 0, 0, 0, 0, 0, 9];
        let changed = [true, false, true, true, false, true, true, true, true, false];
        let load = Load::sealed(&sealer, batch(&fill), &changed, Vec::new());
        assert_eq!(opened(&load), [(0, vec![1]), (2, vec![3, 4]), (5, vec![0; 4])]);
        assert_eq!((load.frames, load.data_pages), (3, 3));
        let nothing = Load::sealed(&sealer, batch(&fill), &[false; 10], Vec::new());
        assert_eq!((nothing.frames, nothing.bytes.len()), (0, 0));
        let all = Load::sealed(&sealer, batch(&fill), &[true; 10], Vec::new());
        assert_eq!(opened(&all), [(0, vec![1, 2, 3, 4]), (4, vec![0; 5]), (9, vec![9])]);
    }

    #[test]
    fn holes_count_where_the_target_has_something() {
        let mut there = PageDigests::new(20);
        for page in [0, 5, 6, 19] {
            there.set(page, [7; 32]);
        }
        let run = |first, pages| Run { first, pages };
        assert_eq!(with_holes(vec![run(3, 3), run(10, 2)], &there), [run(0, 1), run(3, 4), run(10, 2), run(19, 1)]);
        assert_eq!(with_holes(vec![], &PageDigests::new(5)), []);
    }
}

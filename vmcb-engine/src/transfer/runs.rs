//! From runs of dirty pages to frames: cut into pieces, read, hashed, zeros elided.
//!
//! A piece is at most [`PIECE_PAGES`] pages: what is read, hashed and sent stays in the processor's caches on the way.
//! Pieces are independent, so several threads may make frames of one round; a [`Batch`] takes several small ones, because
//! dirt is often single pages, and hashes their pages side by side.
//! A page that is zero and that the target has as zero is not mentioned at all; a zero page that the target has
//! otherwise travels as a frame without payload. A few zeros between data are sent as data: frames cost more than they do.
//!
//! The bytes are copied out of the guest once, into the frame itself, and hashed there: a guest that writes at the same
//! moment cannot make hash and payload disagree.

use std::ops::Range;

use proto::frame::{self, Encoding, PAGE_BYTES, PageRun};
use proto::leaf::{Leaf, ZERO_LEAF, leaves_of_pages};

use crate::memory::shared::{PagesError, Run, SharedPages};

/// Pages of a piece: 256 KiB.
pub const PIECE_PAGES: u64 = 64;
/// A run of zero pages between data is worth a cut from this length on.
const ZERO_RUN_MIN: usize = 4;
const PAYLOAD_OFFSET: usize = frame::HEADER_BYTES + frame::PAGES_PREFIX_BYTES;

/// Cuts a run into pieces of at most [`PIECE_PAGES`] pages, at multiples of it.
pub fn pieces(run: Run) -> impl Iterator<Item = Run> {
    run.pieces(PIECE_PAGES)
}

/// Frames of pages one after the other in one buffer, each behind the envelope of whoever carries it.
#[derive(Debug)]
pub struct Batch<E> {
    envelope: E,
    bytes: Vec<u8>,
    frames: Vec<PageFrame>,
}

/// A frame in a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageFrame {
    /// Which pages.
    pub run: PageRun,
    /// Where the frame lies in the buffer.
    pub at: Range<usize>,
}

/// A batch whose frames are complete.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sealed {
    /// Envelopes and frames.
    pub bytes: Vec<u8>,
    /// The frames, in order.
    pub frames: Vec<PageFrame>,
    /// Digests of the pages that have payload, in order.
    leaves: Vec<Leaf>,
}

impl<E: Fn(usize, &mut Vec<u8>)> Batch<E> {
    /// An empty batch in this buffer, whose room is used again. `envelope` appends what precedes a frame of so many bytes.
    pub fn new(mut buffer: Vec<u8>, envelope: E) -> Self {
        buffer.clear();
        Self { envelope, bytes: buffer, frames: Vec::new() }
    }

    /// Reads a piece, as it is or as it was at a frozen instant, and appends its frames. `is_zero_there` says of a page whether the target has it as zero.
    ///
    /// # Errors
    /// Pages that cannot be read.
    pub fn push(
        &mut self,
        space: u16,
        pages: &SharedPages,
        piece: Run,
        instant: Option<u32>,
        is_zero_there: impl Fn(u64) -> bool,
    ) -> Result<(), PagesError> {
        let start = self.bytes.len();
        let run = PageRun { first_page: piece.first, pages: piece.pages as u32, space, encoding: Encoding::Raw };
        let frame = self.begin(run);
        match instant {
            None => pages.append_pages(piece, &mut self.bytes)?,
            Some(instant) => pages.append_frozen(piece, instant, &mut self.bytes)?,
        }
        let (payload, _) = self.bytes[frame + PAYLOAD_OFFSET..].as_chunks::<PAGE_BYTES>();
        let kinds: Vec<Content> =
            (piece.first..).zip(payload).map(|(page, bytes)| kind_of(bytes, page, &is_zero_there)).collect();
        let segments = segments(&kinds);
        if let [(Content::Data, _, _)] = segments[..] {
            self.frames.push(PageFrame { run, at: frame..self.bytes.len() });
            return Ok(());
        }
        let payload = self.bytes.split_off(frame + PAYLOAD_OFFSET);
        self.bytes.truncate(start);
        for (content, at, count) in segments {
            let run = PageRun { first_page: piece.first + at as u64, pages: count as u32, ..run };
            match content {
                Content::Data => {
                    let frame = self.begin(run);
                    self.bytes.extend_from_slice(&payload[at * PAGE_BYTES..(at + count) * PAGE_BYTES]);
                    self.frames.push(PageFrame { run, at: frame..self.bytes.len() });
                }
                Content::Zero => {
                    let run = PageRun { encoding: Encoding::Zero, ..run };
                    let frame = self.begin(run);
                    self.frames.push(PageFrame { run, at: frame..self.bytes.len() });
                }
                Content::ZeroThere => (),
            }
        }
        Ok(())
    }

    /// Appends envelope and header of a frame; returns where the frame begins.
    fn begin(&mut self, run: PageRun) -> usize {
        (self.envelope)(run.frame_bytes(), &mut self.bytes);
        let at = self.bytes.len();
        run.begin_in(&mut self.bytes);
        at
    }

    /// Hashes all pages and completes the frames.
    pub fn seal(self) -> Sealed {
        let Self { mut bytes, frames, .. } = self;
        let payload = |frame: &PageFrame| bytes[frame.at.clone()][PAYLOAD_OFFSET..].as_chunks::<PAGE_BYTES>().0;
        let leaves = leaves_of_pages(frames.iter().flat_map(payload));
        let mut first = 0;
        for frame in &frames {
            let count = frame.run.payload_bytes() / PAGE_BYTES;
            frame::seal_pages(&mut bytes[frame.at.clone()], &leaves[first..first + count]);
            first += count;
        }
        Sealed { bytes, frames, leaves }
    }
}

impl Sealed {
    /// Digest of each page, by space and number.
    pub fn digests(&self) -> impl Iterator<Item = (u16, u64, Leaf)> {
        let mut leaves = self.leaves.iter();
        let pages = self
            .frames
            .iter()
            .flat_map(|frame| (frame.run.first_page..).zip(std::iter::repeat_n(frame.run, frame.run.pages as usize)));
        pages.map(move |(page, run)| {
            let leaf = match run.encoding {
                Encoding::Raw => *leaves.next().expect("a leaf for each page with payload"),
                Encoding::Zero => ZERO_LEAF,
            };
            (run.space, page, leaf)
        })
    }

    /// The bytes of its frames, without their envelopes.
    pub fn frame_bytes(&self) -> impl Iterator<Item = &[u8]> {
        self.frames.iter().map(|frame| &self.bytes[frame.at.clone()])
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Content {
    Data,
    Zero,
    ZeroThere,
}

fn kind_of(bytes: &[u8; PAGE_BYTES], page: u64, is_zero_there: &impl Fn(u64) -> bool) -> Content {
    let zero = bytes.as_chunks::<64>().0.iter().all(|line| *line == [0; 64]);
    match zero {
        false => Content::Data,
        true if is_zero_there(page) => Content::ZeroThere,
        true => Content::Zero,
    }
}

/// Joins pages of the same content to (content, first, count); short runs of zeros between data become data.
fn segments(kinds: &[Content]) -> Vec<(Content, usize, usize)> {
    let mut segments: Vec<(Content, usize, usize)> = Vec::new();
    for (at, kind) in kinds.iter().enumerate() {
        match segments.last_mut() {
            Some((content, _, count)) if content == kind => *count += 1,
            _ => segments.push((*kind, at, 1)),
        }
        // A run of zeros has just ended in data: is it long enough?
        if let [.., (Content::Data, from, _), (_, _, zeros), (Content::Data, _, 1)] = segments[..]
            && zeros < ZERO_RUN_MIN
        {
            segments.truncate(segments.len() - 3);
            segments.push((Content::Data, from, at + 1 - from));
        }
    }
    segments
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::memory::sized_memfd;
    use proptest::prelude::*;

    pub fn space(pages: u64) -> SharedPages {
        let (data, stamps) = (sized_memfd("data", pages * 4096).unwrap(), sized_memfd("stamps", pages * 4).unwrap());
        SharedPages::new(data, stamps, pages * 4096).unwrap()
    }

    /// The frames of one piece, without envelopes.
    pub fn frames(space: u16, pages: &SharedPages, piece: Run, is_zero_there: impl Fn(u64) -> bool) -> Sealed {
        let mut batch = Batch::new(Vec::new(), |_, _: &mut Vec<u8>| ());
        batch.push(space, pages, piece, None, is_zero_there).unwrap();
        batch.seal()
    }

    #[test]
    fn pieces_cover_the_run_and_are_cut_at_multiples() {
        let cut = |first, pages| pieces(Run { first, pages }).map(|run| (run.first, run.pages)).collect::<Vec<_>>();
        assert_eq!(cut(250, 100), [(250, 6), (256, 64), (320, 30)]);
        assert_eq!(cut(0, 64), [(0, 64)]);
        assert_eq!(cut(u64::MAX - 3, 2), [(u64::MAX - 3, 2)]);
        assert_eq!(cut(7, 0), []);
    }

    #[test]
    fn zeros_the_target_has_are_not_mentioned_and_others_have_no_payload() {
        let pages = space(256);
        pages.write_pages(0, &[1; 4096]).unwrap();
        pages.write_pages(2, &[1; 4096]).unwrap();
        pages.write_pages(100, &[1; 4096]).unwrap();
        let made = |zero_there: fn(u64) -> bool| -> Vec<(u64, u32, Encoding)> {
            let made = frames(0, &pages, Run { first: 0, pages: 256 }, zero_there);
            made.frames.iter().map(|f| (f.run.first_page, f.run.pages, f.run.encoding)).collect()
        };
        assert_eq!(made(|_| true), [(0, 3, Encoding::Raw), (100, 1, Encoding::Raw)]);
        assert_eq!(
            made(|page| page != 50 && page != 51),
            [(0, 3, Encoding::Raw), (50, 2, Encoding::Zero), (100, 1, Encoding::Raw)]
        );
        assert_eq!(made(|_| false).len(), 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn frames_bring_a_target_to_the_same_pages(
            here in proptest::collection::vec(0..3u8, 1..80),
            there in proptest::collection::vec(0..3u8, 80),
        ) {
            let (source, target) = (space(80), space(80));
            for (page, (a, b)) in (0..).zip(here.iter().zip(&there)) {
                source.write_pages(page, &[*a; 4096]).unwrap();
                target.write_pages(page, &[*b; 4096]).unwrap();
            }
            let run = Run { first: 0, pages: here.len() as u64 };
            // In two pieces with an envelope of three bytes, as one that carries them would.
            let mut batch = Batch::new(vec![9; 5], |bytes, into: &mut Vec<u8>| into.extend(&(bytes as u32).to_be_bytes()[1..]));
            for piece in run.pieces(48) {
                batch.push(3, &source, piece, None, |page| there[page as usize] == 0).unwrap();
            }
            let sealed = batch.seal();
            let mut end = 0;
            for (made, bytes) in sealed.frames.iter().zip(sealed.frame_bytes()) {
                prop_assert_eq!(made.at.start, end + 3);
                prop_assert_eq!(&sealed.bytes[end..end + 3], &(bytes.len() as u32).to_be_bytes()[1..]);
                end = made.at.end;
                let pages = frame::decode_pages(bytes).unwrap();
                prop_assert_eq!(pages.run, made.run);
                let whole = Run { first: made.run.first_page, pages: made.run.pages.into() };
                let noted = sealed.digests().filter(|(_, page, _)| (whole.first..whole.end()).contains(page));
                let noted: Vec<Leaf> = noted.map(|(space, _, leaf)| { assert_eq!(space, 3); leaf }).collect();
                match made.run.encoding {
                    Encoding::Raw => prop_assert_eq!(&pages.leaves, &noted),
                    Encoding::Zero => prop_assert_eq!(vec![ZERO_LEAF; whole.pages as usize], noted),
                }
                match made.run.encoding {
                    Encoding::Raw => target.write_pages(whole.first, pages.payload).unwrap(),
                    Encoding::Zero => target.zero_pages(whole).unwrap(),
                }
            }
            prop_assert_eq!(end, sealed.bytes.len());
            let (mut a, mut b) = (vec![], vec![]);
            source.append_pages(run, &mut a).unwrap();
            target.append_pages(run, &mut b).unwrap();
            prop_assert!(a == b);
        }
    }
}

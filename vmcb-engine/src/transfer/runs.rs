//! From runs of dirty pages to frames: cut into pieces, read, hashed, zeros elided.
//!
//! A piece is at most [`PAGES_MAX`] pages (1 MiB); pieces are independent, so several threads may make frames of one round.
//! A page that is zero and that the target has as zero is not mentioned at all; a zero page that the target has
//! otherwise travels as a frame without payload. A few zeros between data are sent as data: frames cost more than they do.
//!
//! The bytes are copied out of the guest once, into the frame itself, and hashed there: a guest that writes at the same
//! moment cannot make hash and payload disagree.

use proto::frame::{self, Encoding, PAGE_BYTES, PAGES_MAX, PageRun};
use proto::leaf::{Leaf, ZERO_LEAF, leaves};

use crate::memory::shared::{PagesError, Run, SharedPages};

/// A run of zero pages between data is worth a cut from this length on.
const ZERO_RUN_MIN: usize = 4;
const PAYLOAD_OFFSET: usize = frame::HEADER_BYTES + frame::PAGES_PREFIX_BYTES;

/// A complete frame and what it says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageFrame {
    /// Which pages.
    pub run: PageRun,
    /// Their digests; none if they are zero.
    pub leaves: Vec<Leaf>,
    /// The frame.
    pub bytes: Vec<u8>,
}

/// Cuts a run into pieces of at most [`PAGES_MAX`] pages, at multiples of it.
pub fn pieces(run: Run) -> impl Iterator<Item = Run> {
    run.pieces(PAGES_MAX.into())
}

/// Reads a piece and makes its frames. `is_zero_there` says of a page whether the target has it as zero.
///
/// # Errors
/// Pages that cannot be read.
///
/// # Panics
/// If the piece is longer than [`PAGES_MAX`].
pub fn frames(
    space: u16,
    pages: &SharedPages,
    piece: Run,
    is_zero_there: impl Fn(u64) -> bool,
) -> Result<Vec<PageFrame>, PagesError> {
    assert!(piece.pages <= u64::from(PAGES_MAX), "{piece:?}");
    let run = PageRun { first_page: piece.first, pages: piece.pages as u32, space, encoding: Encoding::Raw };
    let mut bytes = run.begin();
    pages.append_pages(piece, &mut bytes)?;
    let (payload, _) = bytes[PAYLOAD_OFFSET..].as_chunks::<PAGE_BYTES>();
    let kinds: Vec<Content> =
        (piece.first..).zip(payload).map(|(page, bytes)| kind_of(bytes, page, &is_zero_there)).collect();
    let segments = segments(&kinds);
    if let [(Content::Data, _, _)] = segments[..] {
        let leaves = leaves(&bytes[PAYLOAD_OFFSET..]);
        frame::seal_pages(&mut bytes, &leaves);
        return Ok(vec![PageFrame { run, leaves, bytes }]);
    }
    let made = segments.into_iter().filter_map(|(content, at, count)| {
        let run = PageRun { first_page: piece.first + at as u64, pages: count as u32, ..run };
        match content {
            Content::Data => Some(data_frame(run, &payload[at..at + count])),
            Content::Zero => Some(zero_frame(run)),
            Content::ZeroThere => None,
        }
    });
    Ok(made.collect())
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

fn data_frame(run: PageRun, payload: &[[u8; PAGE_BYTES]]) -> PageFrame {
    let mut bytes = run.begin();
    bytes.extend_from_slice(payload.as_flattened());
    let leaves = leaves(payload.as_flattened());
    frame::seal_pages(&mut bytes, &leaves);
    PageFrame { run, leaves, bytes }
}

fn zero_frame(run: PageRun) -> PageFrame {
    let run = PageRun { encoding: Encoding::Zero, ..run };
    let mut bytes = run.begin();
    frame::seal_pages(&mut bytes, &[]);
    PageFrame { run, leaves: Vec::new(), bytes }
}

impl PageFrame {
    /// Digest of each of its pages, in order.
    pub fn digests(&self) -> impl Iterator<Item = (u64, Leaf)> {
        let leaves = self.leaves.iter().copied().chain(std::iter::repeat(ZERO_LEAF));
        (self.run.first_page..).zip(leaves).take(self.run.pages as usize)
    }
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

    #[test]
    fn pieces_cover_the_run_and_are_cut_at_multiples() {
        let cut = |first, pages| pieces(Run { first, pages }).map(|run| (run.first, run.pages)).collect::<Vec<_>>();
        assert_eq!(cut(250, 300), [(250, 6), (256, 256), (512, 38)]);
        assert_eq!(cut(0, 256), [(0, 256)]);
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
            let frames = frames(0, &pages, Run { first: 0, pages: 256 }, zero_there).unwrap();
            frames.iter().map(|f| (f.run.first_page, f.run.pages, f.run.encoding)).collect()
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
            for frame in frames(3, &source, run, |page| there[page as usize] == 0).unwrap() {
                let pages = frame::decode_pages(&frame.bytes).unwrap();
                prop_assert_eq!(&pages.leaves, &frame.leaves);
                prop_assert_eq!(pages.run, frame.run);
                let whole = Run { first: frame.run.first_page, pages: frame.run.pages.into() };
                match frame.run.encoding {
                    Encoding::Raw => target.write_pages(whole.first, pages.payload).unwrap(),
                    Encoding::Zero => target.zero_pages(whole).unwrap(),
                }
            }
            let (mut a, mut b) = (vec![], vec![]);
            source.append_pages(run, &mut a).unwrap();
            target.append_pages(run, &mut b).unwrap();
            prop_assert!(a == b);
        }
    }
}

//! A frame of pages arrives: check it, check that its pages exist, write them, note their digests.
//!
//! The frame is hostile until all of that has been done. Nothing is allocated from its numbers; its pages must lie in the
//! spaces of the configuration, which the other side did not choose.

use proto::frame::{self, Encoding, FrameError, PageRun, Pages};
use proto::leaf::Leaf;

use crate::memory::digest::PageDigests;
use crate::memory::shared::{PagesError, Run, SharedPages};

/// Why a frame of pages is refused.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The bytes were changed on the way, or never were a frame of pages.
    #[error("bad frame of pages")]
    Frame(#[from] FrameError),
    /// Pages outside the machine: the other side broke the protocol.
    #[error("pages {first}..{end} of space {space}, which has {pages}", first = .run.first_page, space = .run.space,
        end = .run.first_page.saturating_add(.run.pages.into()))]
    Outside {
        /// What the frame says.
        run: PageRun,
        /// Pages of that space; 0 if there is no such space.
        pages: u64,
    },
    /// This host cannot write them.
    #[error("cannot write pages of space {space}")]
    Pages {
        /// Which space.
        space: u16,
        /// Why not.
        #[source]
        source: PagesError,
    },
}

/// Pages that have been written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Landed {
    /// Which.
    pub run: PageRun,
    /// Their digests; none if they are zero.
    pub leaves: Vec<Leaf>,
}

/// Checks that the pages of a frame exist; returns them.
///
/// # Errors
/// [`ReceiveError::Outside`].
pub fn check(run: &PageRun, pages_of: impl Fn(u16) -> Option<u64>) -> Result<Run, ReceiveError> {
    let pages = pages_of(run.space).unwrap_or(0);
    match run.first_page.checked_add(run.pages.into()) {
        Some(end) if end <= pages => Ok(Run { first: run.first_page, pages: run.pages.into() }),
        _ => Err(ReceiveError::Outside { run: *run, pages }),
    }
}

/// Checks a frame and writes its pages.
///
/// # Errors
/// Any [`ReceiveError`]; nothing is written then, unless the host failed in the middle.
pub fn land(spaces: &[SharedPages], frame: &[u8]) -> Result<Landed, ReceiveError> {
    write(spaces, frame::decode_pages(frame)?)
}

/// [`land`] for several frames, in order; their pages are hashed side by side before the first is written.
///
/// # Errors
/// As [`land`]; of the frames before the one that is refused some may be written.
pub fn land_all<'a>(
    spaces: &[SharedPages],
    frames: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Vec<Landed>, ReceiveError> {
    frame::decode_all_pages(frames)?.into_iter().map(|pages| write(spaces, pages)).collect()
}

fn write(spaces: &[SharedPages], pages: Pages<'_>) -> Result<Landed, ReceiveError> {
    let at = check(&pages.run, |space| spaces.get(usize::from(space)).map(SharedPages::pages))?;
    let space = &spaces[usize::from(pages.run.space)];
    let written = match pages.run.encoding {
        Encoding::Raw => space.write_pages(at.first, pages.payload),
        Encoding::Zero => space.zero_pages(at),
    };
    written.map_err(|source| ReceiveError::Pages { space: pages.run.space, source })?;
    Ok(Landed { run: pages.run, leaves: pages.leaves })
}

impl Landed {
    /// Notes the digests of the pages.
    ///
    /// # Panics
    /// If `digests` are not of the spaces that the pages were written to.
    pub fn note(&self, digests: &mut [PageDigests]) {
        let digests = &mut digests[usize::from(self.run.space)];
        match self.run.encoding {
            Encoding::Raw => {
                (self.run.first_page..).zip(&self.leaves).for_each(|(page, leaf)| digests.set(page, *leaf))
            }
            Encoding::Zero => digests.set_zero(Run { first: self.run.first_page, pages: self.run.pages.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::runs;
    use super::*;
    use crate::transfer::runs::tests::space;
    use proptest::prelude::*;

    fn raw(first_page: u64, pages: u32, space: u16) -> Vec<u8> {
        let run = PageRun { first_page, pages, space, encoding: Encoding::Raw };
        let mut frame = run.begin();
        frame.resize(frame.len() + run.payload_bytes(), 9);
        frame::seal(&mut frame);
        frame
    }

    #[test]
    fn what_landed_has_the_senders_digests() {
        let (source, target) = (space(600), [space(1), space(600)]);
        source.write_pages(3, &[1; 8192]).unwrap();
        source.write_pages(500, &[2; 4096]).unwrap();
        let (mut ours, mut theirs) = (PageDigests::new(600), [PageDigests::new(1), PageDigests::new(600)]);
        for piece in runs::pieces(Run { first: 0, pages: 600 }) {
            let made = runs::tests::frames(1, &source, piece, |_| true);
            made.digests().for_each(|(_, page, leaf)| ours.set(page, leaf));
            land_all(&target, made.frame_bytes()).unwrap().iter().for_each(|landed| landed.note(&mut theirs));
        }
        assert_eq!(ours.root(), theirs[1].root());
        assert_ne!(ours.root(), PageDigests::new(600).root());
        let mut page = vec![];
        target[1].append_pages(Run { first: 500, pages: 1 }, &mut page).unwrap();
        assert!(page == [2; 4096]);
    }

    #[test]
    fn pages_outside_the_configured_spaces_are_refused() {
        let spaces = [space(8), space(4)];
        for (first, pages, space) in [(8, 1, 0), (7, 2, 0), (0, 5, 1), (0, 1, 2), (u64::MAX - 1, 1, 0), (1 << 52, 1, 0)]
        {
            let refused = land(&spaces, &raw(first, pages, space));
            assert!(matches!(refused, Err(ReceiveError::Outside { .. })), "{first} {pages} {space}: {refused:?}");
        }
        let zero = PageRun { first_page: 0, pages: u32::MAX, space: 0, encoding: Encoding::Zero };
        let mut frame = zero.begin();
        frame::seal(&mut frame);
        assert!(matches!(land(&spaces, &frame), Err(ReceiveError::Outside { .. })));
        land(&spaces, &raw(6, 2, 0)).unwrap();
    }

    proptest! {
        #[test]
        fn hostile_frames_never_panic_and_never_land_outside(
            first_page in prop_oneof![0..20u64, any::<u64>()],
            pages in prop_oneof![0..12u32, any::<u32>()],
            space_number in 0..4u16,
            encoding in 0..4u16,
            payload in 0..5usize,
            odd in 0..2usize,
        ) {
            let mut body = [first_page.to_le_bytes().as_slice(), &pages.to_le_bytes()].concat();
            body.extend([space_number.to_le_bytes(), encoding.to_le_bytes()].concat());
            body.resize(body.len() + payload * 4096 + odd, 1);
            let spaces = [space(8), space(4)];
            let mut digests = [PageDigests::new(8), PageDigests::new(4)];
            if let Ok(landed) = land(&spaces, &frame::encode(frame::Kind::Pages, &body)) {
                prop_assert!(first_page + u64::from(pages) <= [8, 4][usize::from(space_number)]);
                landed.note(&mut digests);
            }
        }

        #[test]
        fn flipped_bytes_never_land(at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let spaces = [space(8)];
            let mut frame = raw(2, 2, 0);
            let at = at.index(frame.len());
            frame[at] ^= 1 << bit;
            prop_assert!(land(&spaces, &frame).is_err());
        }
    }
}

//! The proof that pages which come are those of a checkpoint: each frame by itself, and in the end the digest of them all.

use proto::digest::machine_digest;
use proto::frame::{self, Encoding};
use proto::ids::Digest as Root;
use proto::status::Code;
use proto::v1;

use super::protocol;
use crate::ctl::failure::Failure;
use crate::ingest::assembly::spaces;
use crate::ingest::digest::{PageDigests, state_digest};
use crate::ingest::manifest::SPACE_BYTES_MAX;

/// What has come so far.
pub struct Proof {
    /// For people: `export vm1`.
    doing: String,
    /// What was said first.
    pub head: v1::ExportHead,
    digests: Vec<PageDigests>,
    /// How many pages.
    pub came: u64,
}

impl Proof {
    /// Of the first `wanted` spaces of a checkpoint.
    ///
    /// # Errors
    /// [`Code::Protocol`]: a head that makes no sense.
    pub fn new(doing: &str, head: v1::ExportHead, wanted: usize) -> Result<Proof, Failure> {
        let config = head.config.clone().unwrap_or_default();
        let local = config.disks.iter().filter(|disk| !disk.shared).map(|disk| disk.size_bytes);
        let boot = config.boot.as_ref().map_or(0, |boot| boot.image_bytes);
        if local.chain([config.memory_bytes, boot]).any(|bytes| bytes > SPACE_BYTES_MAX) {
            return Err(protocol(doing, "a configuration that makes no sense"));
        }
        let digests = spaces(&config).into_iter().take(wanted).map(PageDigests::new).collect();
        Ok(Proof { doing: doing.to_owned(), head, digests, came: 0 })
    }

    /// Takes a frame of pages.
    ///
    /// # Errors
    /// [`Code::Corrupt`]: it is none, or of pages that are nowhere.
    pub fn take<'a>(&mut self, bytes: &'a [u8]) -> Result<frame::Pages<'a>, Failure> {
        let corrupt = |why: String| Failure::new(Code::Corrupt, format!("{}: {why}", self.doing));
        let held = frame::decode_pages(bytes).map_err(|error| corrupt(error.to_string()))?;
        let run = held.run;
        let digests = self
            .digests
            .get_mut(usize::from(run.space))
            .filter(|digests| run.first_page.checked_add(run.pages.into()).is_some_and(|end| end <= digests.pages()));
        let Some(digests) = digests.filter(|_| run.encoding == Encoding::Raw) else {
            return Err(corrupt(format!("pages that are nowhere: {run:?}")));
        };
        (run.first_page..).zip(&held.leaves).for_each(|(page, leaf)| digests.set(page, *leaf));
        self.came += u64::from(run.pages);
        Ok(held)
    }

    /// All pages came, and they are what the checkpoint's digest says.
    ///
    /// # Errors
    /// [`Code::Corrupt`].
    pub fn check(&self, pages: u64) -> Result<(), Failure> {
        let wrong = |why: String| Failure::new(Code::Corrupt, format!("{}: {why}", self.doing));
        if (pages, self.head.pages) != (self.came, self.came) {
            return Err(wrong(format!("{} of {} pages came", self.came, self.head.pages)));
        }
        let stated = self.head.checkpoint.clone().unwrap_or_default().digest.unwrap_or_default();
        let roots: Vec<Root> = self.digests.iter().map(PageDigests::root).collect();
        let (ram, others) = roots.split_first().ok_or_else(|| wrong("there is no RAM".into()))?;
        let computed = machine_digest(*ram, state_digest(&self.head.sections), others);
        let ram_only = self.digests.len() < spaces(&self.head.config.clone().unwrap_or_default()).len();
        let same = match ram_only {
            true => (&stated.ram, &stated.state) == (&computed.ram, &computed.state),
            false => stated == computed,
        };
        same.then_some(()).ok_or_else(|| wrong("what came is not what the checkpoint's digest says".into()))
    }
}

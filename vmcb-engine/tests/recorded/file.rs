//! Recordings as files: what an export writes (`*.gwr`), as far as one base and a journal go.

use std::path::Path;

use proto::frame::{self, Encoding, Kind, PAGE_BYTES, PAGES_MAX, PageRun};
use proto::v1::{CheckpointRecord, ExportHead};
use vmcb_engine::journal::Position;
use vmcb_engine::memory::digest::{PageDigests, leaf};
use vmcb_engine::snapshot::{machine_digest, state_digest};

use crate::replaying::{Base, Guest, Recorded};

fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

/// Frames of the pages of a space that are not zero, and its digest.
fn pages(space: u16, bytes: &[u8], into: &mut Vec<u8>) -> (u64, proto::ids::Digest) {
    let mut digests = PageDigests::new(bytes.len().div_ceil(PAGE_BYTES) as u64);
    let mut count = 0;
    let all: Vec<(u64, &[u8])> = (0..).zip(bytes.chunks(PAGE_BYTES)).filter(|(_, page)| !is_zero(page)).collect();
    for run in all.chunk_by(|before, after| before.0 + 1 == after.0).flat_map(|run| run.chunks(PAGES_MAX as usize)) {
        let (first_page, pages) = (run[0].0, run.len() as u32);
        let mut frame = PageRun { first_page, pages, space, encoding: Encoding::Raw }.begin();
        for (page, bytes) in run {
            digests.set(*page, leaf(bytes));
            frame.extend_from_slice(bytes);
        }
        frame::seal(&mut frame);
        into.extend(frame);
        count += u64::from(pages);
    }
    (count, digests.root())
}

/// The kernel and the initial file system, as a VM carries them with it.
fn boot_image(guest: &Guest) -> Vec<u8> {
    let mut image = guest.kernel.clone();
    image.resize(image.len().next_multiple_of(PAGE_BYTES), 0);
    image.extend(guest.initrd.iter().flatten());
    image.resize(image.len().next_multiple_of(PAGE_BYTES), 0);
    image
}

/// The configuration of a guest whose boot image goes with it.
pub fn with_image(mut guest: Guest) -> Guest {
    let bytes = boot_image(&guest).len() as u64;
    let boot = guest.config.boot.as_mut().unwrap();
    (boot.image_bytes, boot.kernel_bytes) = (bytes, guest.kernel.len() as u64);
    boot.initrd_bytes = guest.initrd.as_ref().map_or(0, |initrd| initrd.len() as u64);
    guest
}

/// The file of a recording from its beginning. A guest that is started again must be one [`with_image`].
pub fn bytes(recorded: &Recorded) -> Vec<u8> {
    let base = &recorded.bases[0];
    let (mut frames, mut count, mut roots) = (Vec::new(), 0, Vec::new());
    let travels = recorded.guest.config.boot.as_ref().is_some_and(|boot| boot.image_bytes > 0);
    let image = travels.then(|| boot_image(&recorded.guest));
    let spaces = std::iter::once(&base.ram).chain(&base.disks).chain(&image);
    for (space, bytes) in (0..).zip(spaces) {
        let (pages, root) = pages(space, bytes, &mut frames);
        count += pages;
        roots.push(root);
    }
    let digest = machine_digest(roots[0], state_digest(&base.sections), &roots[1..]);
    let checkpoint = CheckpointRecord {
        id: "0011223344556677".into(),
        vm: "recorded".into(),
        digest: Some(digest),
        ..CheckpointRecord::default()
    };
    let (config, sections) = (Some(recorded.guest.config.clone()), base.sections.clone());
    let head = ExportHead { checkpoint: Some(checkpoint), config, sections, pages: count };
    let mut file = frame::encode_message(Kind::Recording, &head);
    file.extend(frames);
    file.extend(recorded.frames.iter().flatten());
    file
}

/// What [`bytes`] wrote.
pub fn read(path: &Path) -> Recorded {
    let file = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut frames = split(&file).into_iter();
    let head: ExportHead = frame::decode_message(Kind::Recording, frames.next().unwrap()).unwrap();
    let config = head.config.unwrap();
    let boot = config.boot.clone().unwrap();
    let sizes = config.disks.iter().map(|disk| disk.size_bytes);
    let sizes = std::iter::once(config.memory_bytes).chain(sizes).chain([boot.image_bytes]);
    let mut spaces: Vec<Vec<u8>> = sizes.map(|bytes| vec![0; bytes as usize]).collect();
    let mut blocks = Vec::new();
    for frame in frames {
        match frame::decode_pages(frame) {
            Ok(pages) => {
                let at = pages.run.first_page as usize * PAGE_BYTES;
                spaces[usize::from(pages.run.space)][at..][..pages.payload.len()].copy_from_slice(pages.payload);
            }
            Err(_) => blocks.push(frame.to_vec()),
        }
    }
    let (image, ram) = (spaces.pop().unwrap(), spaces.remove(0));
    let initrd_at = boot.kernel_bytes.next_multiple_of(PAGE_BYTES as u64) as usize;
    let initrd = (boot.initrd_bytes > 0).then(|| image[initrd_at..][..boot.initrd_bytes as usize].to_vec());
    let guest = Guest { config, kernel: image[..boot.kernel_bytes as usize].to_vec(), initrd };
    let position = start(&blocks[0]);
    let base = Base { position, sections: head.sections, ram, disks: spaces };
    Recorded { guest, bases: vec![base], frames: blocks, sights: Vec::new(), console: Vec::new() }
}

fn start(block: &[u8]) -> Position {
    let block: proto::v1::JournalBlock = frame::decode_message(Kind::Journal, block).unwrap();
    block.start.unwrap().into()
}

/// The frames of a file.
fn split(mut file: &[u8]) -> Vec<&[u8]> {
    let mut frames = Vec::new();
    while !file.is_empty() {
        let header = frame::Header::parse(file).unwrap();
        let (frame, rest) = file.split_at(frame::HEADER_BYTES + header.body_bytes);
        frames.push(frame);
        file = rest;
    }
    frames
}

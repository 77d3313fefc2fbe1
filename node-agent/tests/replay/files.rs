//! Recordings' files, written as an export writes them, in a directory that is removed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use proto::frame::{self, Encoding, Kind, PAGE_BYTES, PageRun};
use proto::v1::{CheckpointRecord, ExportHead};
use vmcb_engine::memory::digest::{PageDigests, leaf};
use vmcb_engine::snapshot::{machine_digest, state_digest};

use crate::replaying::{Base, Recorded, config, record};

/// A directory of a test's own.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("godwit-replay-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn file(&self, name: &str, parts: &Parts) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, parts.bytes()).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn seed() -> u64 {
    std::env::var("GODWIT_REPLAY_SEED").ok().and_then(|value| value.parse().ok()).unwrap_or(0x1234_5677)
}

/// Frames of a file.
#[derive(Clone)]
pub struct Parts {
    pub head: ExportHead,
    pub pages: Vec<Vec<u8>>,
    pub blocks: Vec<Vec<u8>>,
}

impl Parts {
    pub fn bytes(&self) -> Vec<u8> {
        let head = frame::encode_message(Kind::Recording, &self.head);
        let frames = std::iter::once(&head).chain(&self.pages).chain(&self.blocks);
        frames.flatten().copied().collect()
    }
}

/// The frames of a recording from a base on.
pub fn parts(recorded: &Recorded, base: &Base, from_block: usize) -> Parts {
    let mut digests = PageDigests::new(base.ram.len() as u64 / PAGE_BYTES as u64);
    let mut pages = Vec::new();
    for (page, bytes) in (0..).zip(base.ram.chunks(PAGE_BYTES)).filter(|(_, bytes)| bytes.iter().any(|b| *b != 0)) {
        digests.set(page, leaf(bytes));
        let run = PageRun { first_page: page, pages: 1, space: 0, encoding: Encoding::Raw };
        let mut frame = run.begin();
        frame.extend_from_slice(bytes);
        frame::seal(&mut frame);
        pages.push(frame);
    }
    let disk = PageDigests::new((1 << 20) / PAGE_BYTES as u64).root();
    let digest = machine_digest(digests.root(), state_digest(&base.sections), &[disk]);
    let checkpoint = CheckpointRecord {
        id: "0011223344556677".into(),
        vm: "vm1".into(),
        digest: Some(digest),
        ..CheckpointRecord::default()
    };
    let head = ExportHead {
        checkpoint: Some(checkpoint),
        config: Some(config()),
        sections: base.sections.clone(),
        pages: pages.len() as u64,
    };
    Parts { head, pages, blocks: recorded.frames[from_block..].to_vec() }
}

/// A recording and its file's frames.
pub fn recording(instructions: u64) -> (Recorded, Parts) {
    let recorded = record(seed(), instructions, false);
    let parts = parts(&recorded, &recorded.bases[0], 0);
    (recorded, parts)
}

/// Runs `vm-replay`.
pub fn vm_replay(file: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vm-replay")).arg(file).args(arguments).output().unwrap()
}

/// Standard output as lines, and the exit code.
pub fn lines(output: &Output) -> (Vec<String>, i32) {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    eprint!("{text}{}", String::from_utf8_lossy(&output.stderr));
    (text.lines().map(str::to_owned).collect(), output.status.code().unwrap())
}

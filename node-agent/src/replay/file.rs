//! A recording's file (`*.gwr`): from bytes that nobody vouches for to a machine and what happened to it.
//!
//! ```text
//! frame Recording (an ExportHead) | frames Pages: RAM, local disks, boot image | frames Journal, in order
//! ```
//! Every frame is checked against its hash before it is used, pages against the checkpoint's digest, blocks against each
//! other by `vmcb_engine::journal`. A file may end anywhere in its journal: what was torn off is dropped, aloud. Anything
//! else that does not fit is refused, and the refusal says where. Nothing is allocated from numbers that were not checked.
//!
//! Disks become memfds: a replay changes no file. This file refuses to know what is asked of a recording.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::frame::{self, FrameError, HEADER_BYTES, Header, Kind, PageRun};
use proto::ids::Digest;
use proto::v1::{CheckpointRecord, ExportHead, MachineConfig, Section};
use vmcb_engine::device::block::DiskImage;
use vmcb_engine::journal::{Chain, ChainError};
use vmcb_engine::machine::{Machine, MachineError, Parts};
use vmcb_engine::memory::digest::PageDigests;
use vmcb_engine::memory::shared::{PagesError, Run, SharedPages};
use vmcb_engine::memory::{GuestMemory, MemoryError, PAGE_BYTES, sized_memfd};
use vmcb_engine::replay::{BootImages, PlayError, Player, Rate, SECTION, Tape, TapeError, config_digest};
use vmcb_engine::snapshot::{machine_digest, state_digest};
use vmcb_engine::transfer::receive::{ReceiveError, land};

/// Largest RAM that is taken from a file.
const RAM_BYTES_MAX: u64 = 256 << 30;
/// Largest disk, and boot image.
const DISK_BYTES_MAX: u64 = 4 << 40;
const IMAGE_BYTES_MAX: u64 = 2 << 30;

/// Why a file is no recording that can be replayed here.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The host's answer.
    #[error("{path}: cannot {step}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another kind of file, or damage before the journal.
    #[error("{path} at byte {at}: this is no recording, or it is damaged")]
    Frame {
        /// The file.
        path: PathBuf,
        /// Where the frame begins.
        at: u64,
        /// What is wrong.
        #[source]
        source: FrameError,
    },
    /// Bytes were changed.
    #[error("{path} at byte {at}: damaged: {holds} is not what its hash says", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the frame begins.
        at: u64,
        /// What the frame says that it holds, for people.
        holds: String,
    },
    /// Frames in an order that no recording has.
    #[error("{path} at byte {at}: {why}")]
    Order {
        /// The file.
        path: PathBuf,
        /// Where.
        at: u64,
        /// What.
        why: String,
    },
    /// The base is not what its checkpoint says.
    #[error("{path}: the base is damaged", path = .path.display())]
    Base {
        /// The file.
        path: PathBuf,
        /// What.
        #[source]
        source: BaseError,
    },
    /// A block that does not continue the journal.
    #[error("{path} at byte {at}: the journal does not go on", path = .path.display())]
    Chain {
        /// The file.
        path: PathBuf,
        /// Where the block begins.
        at: u64,
        /// Why.
        #[source]
        source: ChainError,
    },
    /// A block of a time that no machine reaches.
    #[error("{path} at byte {at}", path = .path.display())]
    Tape {
        /// The file.
        path: PathBuf,
        /// Where the block begins.
        at: u64,
        /// Why.
        #[source]
        source: TapeError,
    },
    /// The base and the journal's beginning do not fit.
    #[error("{0}")]
    Play(#[from] PlayError),
}

/// Why a base makes no machine.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// Something is missing or too large.
    #[error("{0}")]
    Shape(String),
    /// No memory for RAM or disks.
    #[error("no memory for it")]
    Memory(#[from] MemoryError),
    /// A disk cannot be made.
    #[error("a disk cannot be made")]
    Disk(#[from] vmcb_engine::device::block::DiskError),
    /// Pages cannot be written.
    #[error("pages")]
    Pages(#[from] PagesError),
    /// A frame of pages that does not fit.
    #[error("a frame of pages")]
    Receive(#[from] ReceiveError),
    /// The configuration or the state makes no machine.
    #[error("configuration or state")]
    Machine(#[from] MachineError),
}

/// A recording that was read: its machine stands at its beginning.
#[derive(Debug)]
pub struct Recording {
    /// The machine, and what happens to it.
    pub player: Player,
    /// The checkpoint that it begins with.
    pub checkpoint: CheckpointRecord,
    /// What was dropped or is odd; for people.
    pub warnings: Vec<String>,
}

/// One bit of RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bit {
    /// Guest-physical address of its byte.
    pub gpa: u64,
    /// 0 to 7.
    pub bit: u8,
}

/// Frames of a file, one after the other.
struct Frames {
    path: PathBuf,
    file: BufReader<File>,
    at: u64,
}

/// What comes next in a file.
enum Next {
    Frame {
        at: u64,
        kind: Kind,
        bytes: Vec<u8>,
    },
    End,
    /// The file ends within a frame.
    Torn {
        at: u64,
    },
    Bad {
        at: u64,
        source: FrameError,
    },
    /// Whole, but not what its hash says.
    Damaged {
        at: u64,
        holds: String,
    },
}

impl Frames {
    fn open(path: &Path) -> Result<Self, FileError> {
        let file = File::open(path).map_err(|source| io_error(path, "open it", source))?;
        Ok(Self { path: path.to_owned(), file: BufReader::with_capacity(1 << 20, file), at: 0 })
    }

    fn read(&mut self, bytes: usize, into: &mut Vec<u8>) -> Result<bool, FileError> {
        let before = into.len();
        let read = self.file.by_ref().take(bytes as u64).read_to_end(into);
        read.map_err(|source| io_error(&self.path, "read it", source))?;
        Ok(into.len() - before == bytes)
    }

    fn next(&mut self) -> Result<Next, FileError> {
        let at = self.at;
        let mut bytes = Vec::new();
        if !self.read(HEADER_BYTES, &mut bytes)? {
            return Ok(if bytes.is_empty() { Next::End } else { Next::Torn { at } });
        }
        // A file system that had no time for data leaves zeros.
        if bytes.iter().all(|byte| *byte == 0) && self.only_zeros()? {
            return Ok(Next::Torn { at });
        }
        let header = match Header::parse(&bytes) {
            Ok(header) => header,
            Err(source) => return Ok(Next::Bad { at, source }),
        };
        if !self.read(header.body_bytes, &mut bytes)? {
            return Ok(Next::Torn { at });
        }
        self.at += bytes.len() as u64;
        match frame::split(&bytes) {
            Ok(_) => Ok(Next::Frame { at, kind: header.kind, bytes }),
            Err(FrameError::Hash { .. }) => Ok(Next::Damaged { at, holds: holds(header.kind, &bytes[HEADER_BYTES..]) }),
            Err(source) => Ok(Next::Bad { at, source }),
        }
    }

    /// Reads the rest of the file.
    fn only_zeros(&mut self) -> Result<bool, FileError> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(true),
                Ok(bytes) if buffer[..bytes].iter().all(|byte| *byte == 0) => {}
                Ok(_) => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(io_error(&self.path, "read it", source)),
            }
        }
    }

    fn order(&self, at: u64, why: impl Into<String>) -> FileError {
        FileError::Order { path: self.path.clone(), at, why: why.into() }
    }

    fn bad(&self, at: u64, source: FrameError) -> FileError {
        FileError::Frame { path: self.path.clone(), at, source }
    }

    fn damaged(&self, at: u64, holds: String) -> FileError {
        FileError::Damaged { path: self.path.clone(), at, holds }
    }

    fn base(&self, source: BaseError) -> FileError {
        FileError::Base { path: self.path.clone(), source }
    }
}

/// What a frame says that it holds. It is damaged, so that may not be so.
fn holds(kind: Kind, body: &[u8]) -> String {
    match (kind, PageRun::parse(body)) {
        (Kind::Pages, Ok((PageRun { first_page, pages, space, .. }, _))) => {
            let last = first_page + u64::from(pages) - 1;
            let space = if space == 0 { "RAM".to_owned() } else { format!("space {space}") };
            format!("a frame of pages {first_page:#x} to {last:#x} of {space}")
        }
        (Kind::Journal, _) => "a block of the journal".to_owned(),
        _ => "its head".to_owned(),
    }
}

fn io_error(path: &Path, step: &'static str, source: io::Error) -> FileError {
    FileError::Io { path: path.to_owned(), step, source }
}

/// Reads a file; `flip` changes one bit of RAM before anything happens.
///
/// # Errors
/// It is no recording, is damaged, was made by another version of the engine, or its parts do not belong together.
pub fn open(path: &Path, flip: Option<Bit>) -> Result<Recording, FileError> {
    let mut frames = Frames::open(path)?;
    let head = head(&mut frames)?;
    let config = head.config.clone().unwrap_or_default();
    let mut base = Base::new(&config).map_err(|e| frames.base(e))?;
    let mut journal = Journal { chain: Chain::new(), tape: Tape::new(Rate::of(&config)), warnings: Vec::new() };
    let mut blocks = 0;
    loop {
        match frames.next()? {
            Next::Frame { kind: Kind::Pages, bytes, .. } if blocks == 0 => {
                base.take(&bytes).map_err(|e| frames.base(e))?;
            }
            Next::Frame { at, kind: Kind::Journal, bytes } => {
                if blocks == 0 {
                    base.check(&head).map_err(|e| frames.base(e))?;
                }
                journal.take(&frames, at, &bytes, (blocks == 0).then_some(&head))?;
                blocks += 1;
            }
            Next::Frame { at, kind, .. } => return Err(frames.order(at, format!("a frame of kind {kind:?} here"))),
            Next::End => break,
            Next::Torn { at } if blocks > 0 => {
                journal.warnings.push(format!("the file is torn at byte {at}: what follows was dropped"));
                break;
            }
            Next::Torn { at } => return Err(frames.order(at, "the file ends here, before its journal begins")),
            Next::Bad { at, source } => return Err(frames.bad(at, source)),
            Next::Damaged { at, holds } => return Err(frames.damaged(at, holds)),
        }
    }
    if blocks == 0 {
        return Err(frames.order(frames.at, "the file has no journal"));
    }
    let Journal { tape, warnings, .. } = journal;
    let images = base.images().map_err(|e| frames.base(e))?;
    let machine = base.machine(&head.sections, flip).map_err(|e| frames.base(e))?;
    let player = Player::new(machine, Arc::new(tape), images)?;
    Ok(Recording { player, checkpoint: head.checkpoint.unwrap_or_default(), warnings })
}

fn head(frames: &mut Frames) -> Result<ExportHead, FileError> {
    match frames.next()? {
        Next::Frame { bytes, kind: Kind::Recording, at } => {
            let head: ExportHead = frame::decode_message(Kind::Recording, &bytes).map_err(|e| frames.bad(at, e))?;
            if head.config.is_none() || head.checkpoint.is_none() {
                return Err(frames.order(at, "a head without configuration or checkpoint"));
            }
            Ok(head)
        }
        Next::Frame { at, kind, .. } => {
            Err(frames.order(at, format!("this is a file of frames, but no recording: the first is of kind {kind:?}")))
        }
        Next::Bad { at, source } => Err(frames.bad(at, source)),
        Next::Damaged { at, holds } => Err(frames.damaged(at, holds)),
        Next::End => Err(frames.order(0, "the file is empty")),
        Next::Torn { at } => Err(frames.order(at, "the file ends within its first frame")),
    }
}

/// The journal as far as it was read.
struct Journal {
    chain: Chain,
    tape: Tape,
    warnings: Vec<String>,
}

impl Journal {
    /// Takes a block; the first one must begin where `head` was captured.
    fn take(&mut self, frames: &Frames, at: u64, bytes: &[u8], head: Option<&ExportHead>) -> Result<(), FileError> {
        let taken = self.chain.take(bytes);
        let block = taken.map_err(|source| FileError::Chain { path: frames.path.clone(), at, source })?;
        if let (Some(head), Some(cut)) = (head, block.cut) {
            let sections = machine_sections(&head.sections);
            if state_digest(&sections).0 != cut.state_digest {
                let why = "the journal does not begin at this file's checkpoint: it is of another one, or another VM's";
                return Err(frames.order(at, why));
            }
            if config_digest(&head.config.clone().unwrap_or_default()) != cut.config_digest {
                return Err(frames.order(at, "the journal is of a machine of another configuration"));
            }
        }
        let pushed = self.tape.push(block);
        pushed.map_err(|source| FileError::Tape { path: frames.path.clone(), at, source })
    }
}

/// Sections without what the recorder adds when it travels.
fn machine_sections(sections: &[Section]) -> Vec<Section> {
    sections.iter().filter(|section| section.name != SECTION).cloned().collect()
}

/// RAM, disks and boot image on their way into memory.
struct Base {
    config: MachineConfig,
    memory: GuestMemory,
    disks: Vec<DiskImage>,
    spaces: Vec<SharedPages>,
    digests: Vec<PageDigests>,
    pages: u64,
}

fn must(holds: bool, why: impl FnOnce() -> String) -> Result<(), BaseError> {
    if holds { Ok(()) } else { Err(BaseError::Shape(why())) }
}

impl Base {
    fn new(config: &MachineConfig) -> Result<Self, BaseError> {
        let (ram, boot) = (config.memory_bytes, config.boot.clone().unwrap_or_default());
        must(ram <= RAM_BYTES_MAX, || format!("RAM of {ram} bytes; at most {RAM_BYTES_MAX} are replayed"))?;
        must(boot.image_bytes <= IMAGE_BYTES_MAX, || format!("a boot image of {} bytes", boot.image_bytes))?;
        let memory = GuestMemory::create(ram)?;
        let mut spaces = vec![SharedPages::of(memory.ram_fd(), memory.stamps_fd(), ram)?];
        let mut disks = Vec::new();
        let mut left = DISK_BYTES_MAX;
        for (number, disk) in config.disks.iter().enumerate() {
            must(!disk.shared, || format!("disk {number} is shared: what was on it is not in the recording"))?;
            let room = left.checked_sub(disk.size_bytes);
            must(room.is_some(), || format!("disks of more than {DISK_BYTES_MAX} bytes"))?;
            left = room.unwrap_or(0);
            let image = DiskImage::from_fd(sized_memfd("replay-disk", disk.size_bytes)?, disk.read_only)?;
            spaces.push(SharedPages::of(image.file_fd(), image.stamps_fd(), image.bytes())?);
            disks.push(image);
        }
        if boot.image_bytes > 0 {
            let bytes = boot.image_bytes;
            let stamps = sized_memfd("replay-boot-stamps", bytes.div_ceil(PAGE_BYTES) * 4)?;
            spaces.push(SharedPages::new(sized_memfd("replay-boot", bytes)?, stamps, bytes)?);
        }
        let digests = spaces.iter().map(|space| PageDigests::new(space.pages())).collect();
        Ok(Self { config: config.clone(), memory, disks, spaces, digests, pages: 0 })
    }

    fn take(&mut self, frame: &[u8]) -> Result<(), BaseError> {
        let landed = land(&self.spaces, frame)?;
        landed.note(&mut self.digests);
        self.pages += u64::from(landed.run.pages);
        Ok(())
    }

    /// All pages are here, and they are the checkpoint's.
    fn check(&mut self, head: &ExportHead) -> Result<(), BaseError> {
        let pages = self.pages;
        must(pages == head.pages, || format!("{pages} of {} pages are in the file", head.pages))?;
        let stated = head.checkpoint.clone().unwrap_or_default().digest.unwrap_or_default();
        let roots: Vec<Digest> = self.digests.iter_mut().map(PageDigests::root).collect();
        let (ram, others) = roots.split_first().expect("RAM is always there");
        let ours = machine_digest(*ram, state_digest(&head.sections), others);
        let parts = [
            ("RAM", ours.ram == stated.ram),
            ("the state", ours.state == stated.state),
            ("disks or the boot image", ours.disks == stated.disks),
            ("all of it", ours.machine == stated.machine),
        ];
        let wrong = parts.into_iter().find(|(_, same)| !same);
        must(wrong.is_none(), || {
            format!("{} is not what the checkpoint's digest says", wrong.map_or("", |(part, _)| part))
        })
    }

    /// What the machine boots from, if that travelled.
    fn images(&self) -> Result<Option<BootImages>, BaseError> {
        let boot = self.config.boot.clone().unwrap_or_default();
        if boot.image_bytes == 0 {
            return Ok(None);
        }
        let initrd_at = boot.kernel_bytes.checked_next_multiple_of(PAGE_BYTES);
        let end = initrd_at.and_then(|at| at.checked_add(boot.initrd_bytes));
        let fits = boot.kernel_bytes <= boot.image_bytes && (boot.initrd_bytes == 0 || end <= Some(boot.image_bytes));
        must(fits && end.is_some(), || "kernel and initrd do not fit into the boot image".to_owned())?;
        let space = self.spaces.last().expect("RAM is always there");
        let read = |at: u64, bytes: u64| {
            let mut part = Vec::new();
            let run = Run { first: at / PAGE_BYTES, pages: bytes.div_ceil(PAGE_BYTES) };
            space.append_pages(run, &mut part)?;
            part.truncate(bytes as usize);
            Ok::<_, PagesError>(part)
        };
        let kernel = read(0, boot.kernel_bytes)?;
        let initrd = (boot.initrd_bytes > 0).then(|| read(initrd_at.unwrap_or(0), boot.initrd_bytes)).transpose()?;
        Ok(Some(BootImages { kernel, initrd }))
    }

    /// The machine in its base state.
    fn machine(self, sections: &[Section], flip: Option<Bit>) -> Result<Machine, BaseError> {
        let nets = self.config.nets.iter().map(|_| None).collect();
        if let Some(Bit { gpa, bit }) = flip {
            let mut byte = [0];
            let outside = |_| BaseError::Shape(format!("{gpa:#x} is no RAM"));
            self.memory.read(gpa, &mut byte).map_err(outside)?;
            self.memory.write(gpa, &[byte[0] ^ 1 << (bit & 7)]).map_err(outside)?;
        }
        let parts = Parts { memory: self.memory, disks: self.disks, nets };
        let mut machine = Machine::build(&self.config, parts)?;
        machine.apply(&machine_sections(sections))?;
        Ok(machine)
    }
}

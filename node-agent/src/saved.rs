//! Small files that outlive a process: one frame of kind Section around a named, versioned message.
//!
//! Self-describing like everything that leaves a process: `ctl inspect` prints them, a changed byte is seen, and a file
//! of another name or of a newer major version is refused. Written by temporary file, fsync, rename and fsync of the
//! directory, so a reader finds the old file or the new one, whole.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use proto::frame::{self, FrameError, Kind};
use proto::v1::Section;

/// Longest file that is read.
const FILE_BYTES_MAX: u64 = 9 << 20;
const MAJOR: u32 = 1;

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// The file system's answer.
    #[error("{path}: {step}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The bytes are not whole.
    #[error("{path} is damaged: {source}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FrameError,
    },
    /// Something else than was asked for.
    #[error("{path} holds section {found:?}, not {expected:?} of version 1")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Name and version found.
        found: String,
        /// Name expected.
        expected: String,
    },
}

impl SavedError {
    /// True if there is no such file.
    pub fn is_missing(&self) -> bool {
        matches!(self, SavedError::File { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// The bytes of a file that holds `message` under `name`.
pub fn encode(name: &str, message: &impl prost::Message) -> Vec<u8> {
    let section =
        Section { name: name.to_owned(), major: MAJOR, minor: 0, ignorable: false, body: message.encode_to_vec() };
    frame::encode_message(Kind::Section, &section)
}

/// Reads back what [`encode`] made.
///
/// # Errors
/// [`SavedError`].
pub fn decode<M: prost::Message + Default>(path: &Path, name: &str, bytes: &[u8]) -> Result<M, SavedError> {
    let damaged = |source| SavedError::Damaged { path: path.to_owned(), source };
    let section: Section = frame::decode_message(Kind::Section, bytes).map_err(damaged)?;
    if section.name != name || section.major != MAJOR {
        let found =
            format!("{} {}.{}", section.name.chars().take(40).collect::<String>(), section.major, section.minor);
        return Err(SavedError::Foreign { path: path.to_owned(), found, expected: name.to_owned() });
    }
    M::decode(&*section.body).map_err(|e| damaged(FrameError::Body { kind: Kind::Section, text: e.to_string() }))
}

/// Reads a file.
///
/// # Errors
/// [`SavedError`].
pub fn read<M: prost::Message + Default>(path: &Path, name: &str) -> Result<M, SavedError> {
    let failed = |step| move |source| SavedError::File { path: path.to_owned(), step, source };
    let length = std::fs::metadata(path).map_err(failed("read"))?.len();
    if length > FILE_BYTES_MAX {
        return Err(failed("read")(io::Error::other(format!("{length} bytes are too many"))));
    }
    decode(path, name, &std::fs::read(path).map_err(failed("read"))?)
}

/// Writes a file so that it is there, whole and for good, when this returns.
///
/// # Errors
/// [`SavedError::File`].
pub fn write(path: &Path, name: &str, message: &impl prost::Message) -> Result<(), SavedError> {
    let failed = |step| move |source| SavedError::File { path: path.to_owned(), step, source };
    let new = path.with_extension("new");
    let mut file = File::create(&new).map_err(failed("create"))?;
    file.write_all(&encode(name, message)).map_err(failed("write"))?;
    file.sync_all().map_err(failed("fsync"))?;
    std::fs::rename(&new, path).map_err(failed("rename"))?;
    let parent = path.parent().unwrap_or(Path::new("."));
    File::open(parent).and_then(|directory| directory.sync_all()).map_err(failed("fsync of the directory"))
}

//! Everything that the process of a guest opens, before it gives up the right to open anything.
//!
//! The VM's directory holds `config.pb` (read), `console.log` (append), `runner.sock` (bound here) and `runner.pid`
//! (written here), and `boot.img`: kernel and initrd, which travel with the VM like a disk that is never written. Disks and
//! taps are those of the configuration. Refuses to know what an agent is.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::v1::{BootSource, MachineConfig};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::console::Log;
use super::driver::{BootImages, Cable};
use super::tap::{self, TapError};
use crate::host::{self, BOOT_IMAGE};
use crate::saved::{self, SavedError};

/// Longest kernel or initrd.
const IMAGE_BYTES_MAX: u64 = 1 << 30;

/// Why the process cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file that the guest needs.
    #[error("{path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] SavedError),
    /// A network card's tap.
    #[error(transparent)]
    Tap(#[from] TapError),
}

/// Kernel and initrd, open, by path: of a VM without a `boot.img`.
pub struct Images {
    kernel: (PathBuf, File),
    initrd: Option<(PathBuf, File)>,
}

/// `boot.img`: the kernel, and from the next page on the initrd.
#[derive(Debug)]
pub struct BootImage {
    /// The file; writable for a VM that arrives, whose agent fills it.
    pub file: File,
    /// Its length.
    pub bytes: u64,
}

/// Kernel and initrd in a `boot.img`.
struct Parts {
    file: File,
    source: BootSource,
}

impl Parts {
    fn read(&self, offset: u64, bytes: u64) -> Result<Vec<u8>, String> {
        let mut part = vec![0; usize::try_from(bytes).map_err(|error| error.to_string())?];
        self.file.read_exact_at(&mut part, offset).map_err(|error| format!("{BOOT_IMAGE}: {error}"))?;
        Ok(part)
    }
}

impl BootImages for Parts {
    fn load(&mut self) -> Result<(Vec<u8>, Option<Vec<u8>>), String> {
        let kernel = self.read(0, self.source.kernel_bytes)?;
        let initrd = match self.source.initrd_bytes {
            0 => None,
            bytes => Some(self.read(host::initrd_offset(&self.source), bytes)?),
        };
        Ok((kernel, initrd))
    }

    fn kernel_path(&self) -> String {
        self.source.kernel_path.clone()
    }

    fn travel(&self) -> bool {
        true
    }
}

impl BootImages for Images {
    fn load(&mut self) -> Result<(Vec<u8>, Option<Vec<u8>>), String> {
        let kernel = read_image(&mut self.kernel)?;
        let initrd = self.initrd.as_mut().map(read_image).transpose()?;
        Ok((kernel, initrd))
    }

    fn kernel_path(&self) -> String {
        self.kernel.0.display().to_string()
    }

    fn travel(&self) -> bool {
        false
    }
}

fn read_image((path, file): &mut (PathBuf, File)) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.take(IMAGE_BYTES_MAX + 1).read_to_end(&mut bytes));
    match read {
        Err(error) => Err(format!("{}: {error}", path.display())),
        Ok(_) if bytes.len() as u64 > IMAGE_BYTES_MAX => Err(format!("{} is longer than 1 GiB", path.display())),
        Ok(_) => Ok(bytes),
    }
}

/// The machine thread's end of a tap.
pub struct TapCable(pub Arc<OwnedFd>);

impl Cable for TapCable {
    fn send(&mut self, frame: &[u8]) {
        // A full queue drops the frame, as a wire does.
        let _ = rustix::io::write(&*self.0, frame);
    }
}

/// What was opened.
pub struct Opened {
    /// The configuration.
    pub config: MachineConfig,
    /// Kernel and initrd; none for a guest that arrives without them.
    pub images: Option<Box<dyn BootImages>>,
    /// The file that they are in, where they travel with the VM.
    pub boot_image: Option<BootImage>,
    /// A tap per card that has one.
    pub taps: Vec<(usize, Arc<OwnedFd>)>,
    /// The console's log.
    pub log: Log,
    /// The listening socket.
    pub listener: OwnedFd,
}

/// Opens everything but memory and disks, which belong to the engine. `incoming`: the state comes from outside, no kernel
/// is needed.
///
/// # Errors
/// [`OpenError`]; it names the file.
pub fn open(directory: &Path, incoming: bool) -> Result<Opened, OpenError> {
    let config: MachineConfig = saved::read(&directory.join("config.pb"), "config")?;
    let (images, boot_image) = open_boot(directory, config.boot.as_ref(), incoming)?;
    let mut taps = Vec::new();
    for (card, net) in config.nets.iter().enumerate().filter(|(_, net)| !net.tap.is_empty()) {
        taps.push((card, Arc::new(tap::open(&net.tap)?)));
    }
    let log_path = directory.join("console.log");
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log_path)
        .and_then(Log::new)
        .map_err(|source| OpenError::File { path: log_path, source })?;
    let socket = directory.join("runner.sock");
    let listener = listen(directory).map_err(|errno| OpenError::File { path: socket, source: errno.into() })?;
    Ok(Opened { config, images, boot_image, taps, log, listener })
}

type Boot = (Option<Box<dyn BootImages>>, Option<BootImage>);

fn open_boot(directory: &Path, source: Option<&BootSource>, incoming: bool) -> Result<Boot, OpenError> {
    let Some(source) = source else { return Ok((None, None)) };
    if source.image_bytes > 0 {
        let path = directory.join(BOOT_IMAGE);
        let failed = |error| OpenError::File { path: path.clone(), source: error };
        let file = OpenOptions::new().read(true).write(incoming).open(&path).map_err(failed)?;
        let parts = Parts { file: file.try_clone().map_err(failed)?, source: source.clone() };
        return Ok((Some(Box::new(parts)), Some(BootImage { file, bytes: source.image_bytes })));
    }
    if incoming {
        return Ok((None, None));
    }
    let kernel = open_image(&source.kernel_path)?;
    let initrd = match source.initrd_path.as_str() {
        "" => None,
        path => Some(open_image(path)?),
    };
    Ok((Some(Box::new(Images { kernel, initrd })), None))
}

fn open_image(path: &str) -> Result<(PathBuf, File), OpenError> {
    let path = PathBuf::from(path);
    match File::open(&path) {
        Ok(file) => Ok((path, file)),
        Err(source) => Err(OpenError::File { path, source }),
    }
}

fn listen(directory: &Path) -> rustix::io::Result<OwnedFd> {
    // Addresses of sockets are short (unix(7)); a path through the directory's descriptor always fits.
    let directory = File::open(directory)
        .map_err(|error| rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO))?;
    let _absent = rustix::fs::unlinkat(&directory, "runner.sock", rustix::fs::AtFlags::empty());
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let address = SocketAddrUnix::new(short_path(&directory, "runner.sock"))?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, 8)?;
    Ok(socket)
}

/// A short path of a file in an open directory.
pub fn short_path(directory: &File, name: &str) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}/{name}", directory.as_raw_fd())
}

/// Writes `runner.pid`: process id and start time, which together name a process for ever (proc(5)).
///
/// # Errors
/// [`OpenError::File`].
pub fn write_pid(directory: &Path) -> Result<(), OpenError> {
    let path = directory.join("runner.pid");
    let pid = std::process::id();
    let text = format!("{pid} {}\n", start_time(pid).unwrap_or(0));
    std::fs::write(&path, text).map_err(|source| OpenError::File { path, source })
}

/// When a process began, in clock ticks since the host's boot; `None` if there is no such process.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything; field 22 is the 20th after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_named_by_its_start() {
        assert!(start_time(std::process::id()).is_some_and(|ticks| ticks > 0));
        assert_eq!(start_time(u32::MAX), None);
    }
}

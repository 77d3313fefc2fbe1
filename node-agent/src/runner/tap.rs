//! Opens a tap device of the host for one network card of a guest (Linux `Documentation/networking/tuntap.rst`).
//!
//! Frames are raw Ethernet without the packet information header. The descriptor is nonblocking: a full queue drops a
//! frame, as a full wire does. Refuses to create interfaces: the operator makes the tap and puts it on a bridge.
#![allow(unsafe_code, reason = "TUNSETIFF is an ioctl that no safe binding offers")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Names have 1 to 15 bytes of ASCII without `/`.
    #[error("{0:?} is not the name of a network interface")]
    Name(String),
    /// The host has no such interface: TUNSETIFF would silently make a new one.
    #[error("tap {0} does not exist on this host; make it with: ip tuntap add dev {0} mode tap")]
    Missing(String),
    /// The system refused.
    #[error("tap {name}: {step}")]
    System {
        /// Interface.
        name: String,
        /// What was tried.
        step: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// Attaches to an existing tap.
///
/// # Errors
/// [`TapError`].
pub fn open(name: &str) -> Result<OwnedFd, TapError> {
    let valid = (1..16).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
    if !valid || name == "." || name == ".." {
        return Err(TapError::Name(name.chars().take(80).collect()));
    }
    if !std::path::Path::new("/sys/class/net").join(name).exists() {
        return Err(TapError::Missing(name.to_owned()));
    }
    let system = |step| move |source| TapError::System { name: name.to_owned(), step, source };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(system("open /dev/net/tun"))?;
    attach(&file, name).map_err(system("TUNSETIFF"))?;
    Ok(file.into())
}

fn attach(file: &File, name: &str) -> io::Result<()> {
    // SAFETY: `ifreq` is plain old data for which zero bytes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open and the kernel reads and writes one `ifreq` behind the pointer, which outlives the call.
    let code = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_interfaces_are_refused() {
        for name in ["", "a/b", "..", "a name", "sixteen-bytes-xx"] {
            assert!(matches!(open(name), Err(TapError::Name(_))), "{name:?}");
        }
        assert!(matches!(open("gdwt-none"), Err(TapError::Missing(_))));
    }
}

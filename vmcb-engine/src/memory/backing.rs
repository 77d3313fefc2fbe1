//! The file that guest RAM lies in. Huge pages make it four times faster to fill and twice as fast to read (2 MiB of RAM
//! are one object of the kernel's and not 512), and guests miss the TLB less.
//!
//! A memfd has them only where the host's administrator says so for all memfds (`shmem_enabled`); a tmpfs says so for
//! itself. So RAM is an unnamed file on a tmpfs: one in a directory that the administrator prepared, or one that nobody
//! else sees and that ends with its file. Without the right to mount, RAM is a memfd with small pages, and works alike.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::{MemoryError, sized_memfd};

/// What `statfs` says of a tmpfs (statfs(2)).
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// Which pages RAM is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing<'a> {
    /// Small ones: a memfd. Whether a page is missing can be told for each of them, on every kernel.
    Small,
    /// Huge ones where the host gives them, on a tmpfs of its own.
    Huge,
    /// On the tmpfs that holds this directory; the pages are as it was mounted.
    On(&'a Path),
}

impl Backing<'_> {
    /// A new file of `bytes`, all zero.
    ///
    /// # Errors
    /// The host refused, or the directory is on no tmpfs.
    pub(super) fn file(self, bytes: u64) -> Result<OwnedFd, MemoryError> {
        let host = |step| move |e: Errno| MemoryError::Host { step, source: e.into() };
        let file = match self {
            Backing::Small => return sized_memfd("guest-ram", bytes),
            Backing::Huge => match private_tmpfs().and_then(unnamed) {
                Ok(file) => file,
                Err(_not_allowed) => return sized_memfd("guest-ram", bytes),
            },
            Backing::On(directory) => {
                let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
                let opened =
                    rustix::fs::open(directory, flags, Mode::empty()).map_err(host("open the directory of RAM"))?;
                let kind = rustix::fs::fstatfs(&opened).map_err(host("look at the directory of RAM"))?;
                if kind.f_type != TMPFS_MAGIC {
                    return Err(MemoryError::NotTmpfs(directory.to_owned()));
                }
                unnamed(opened).map_err(host("make a file for RAM"))?
            }
        };
        rustix::fs::ftruncate(&file, bytes).map_err(host("ftruncate"))?;
        Ok(file)
    }
}

/// The root of a tmpfs that is mounted nowhere: it lives as long as what is open on it.
fn private_tmpfs() -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Within the size: the last pages of a file are not made larger than it. 0: as much as there is.
    for (key, value) in [("huge", "within_size"), ("size", "0"), ("mode", "0700")] {
        rustix::mount::fsconfig_set_string(context.as_fd(), key, value)?;
    }
    rustix::mount::fsconfig_create(context.as_fd())?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

fn unnamed(directory: OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::openat(directory, ".", flags, Mode::RUSR | Mode::WUSR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;
    use crate::memory::shared::{Run, SharedPages};

    const BYTES: u64 = 16 << 20;

    #[test]
    fn ram_reads_and_writes_alike_whatever_it_lies_in() {
        for backing in [Backing::Small, Backing::Huge, Backing::On(Path::new("/dev/shm"))] {
            let memory = GuestMemory::create_on(backing, BYTES).unwrap();
            memory.write(0x20_1ffe, &[1, 2, 3, 4]).unwrap();
            let pages = SharedPages::of(memory.ram_fd(), memory.stamps_fd(), BYTES).unwrap();
            pages.write_pages(7, &[9; 4096]).unwrap();
            let mut read = Vec::new();
            pages.append_pages(Run { first: 0x201, pages: 2 }, &mut read).unwrap();
            assert_eq!((&read[4094..4098], read[0], read[8191]), (&[1, 2, 3, 4][..], 0, 0), "{backing:?}");
            let filled = pages.filled(pages.whole()).unwrap();
            for page in [7, 0x201, 0x202] {
                assert!(filled.iter().any(|run| (run.first..run.end()).contains(&page)), "{backing:?}: {filled:?}");
            }
            pages.zero_pages(Run { first: 7, pages: 1 }).unwrap();
            memory.clear().unwrap();
            assert!(pages.is_zero().unwrap(), "{backing:?}");
        }
    }

    #[test]
    fn ram_never_lies_on_a_disk() {
        let refused = GuestMemory::create_on(Backing::On(Path::new("/proc")), BYTES);
        assert!(matches!(refused, Err(MemoryError::NotTmpfs(_))), "{refused:?}");
        let missing = GuestMemory::create_on(Backing::On(Path::new("/no/such/directory")), BYTES);
        assert!(matches!(missing, Err(MemoryError::Host { .. })), "{missing:?}");
    }
}

//! Pages of RAM that are not here yet: userfaultfd(2), the part of it that a lazy restore needs.
//!
//! The runner registers the mappings of its guest's RAM before it gives up its rights, and keeps the descriptor; the
//! agent gets it with the others and answers: whoever touches a page that is missing (the guest, a device, a system call)
//! sleeps until the page is placed. An agent that dies answers nothing; the next one gets the same descriptor and
//! wakes all sleepers, who then ask again. What was placed is never placed twice, so that nothing the guest wrote is lost.
//!
//! Faults inside system calls must be answered, too (virtio reads files straight into RAM): a host that allows only
//! `UFFD_USER_MODE_ONLY` cannot do this. Refuses to know where pages come from.
#![allow(unsafe_code, reason = "userfaultfd is made of ioctls that no safe binding offers")]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Setter, Updater, ioctl};
use rustix::mm::UserfaultfdFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use vmcb_engine::memory::{Mapping, PAGE_BYTES};

/// `linux/userfaultfd.h`: `_IOWR(0xAA, 0x3F, struct uffdio_api)` and the others.
const API: u32 = 0xc018_aa3f;
const REGISTER: u32 = 0xc020_aa00;
const UNREGISTER: u32 = 0x8010_aa01;
const WAKE: u32 = 0x8010_aa02;
const COPY: u32 = 0xc028_aa03;
/// `_IO(0xAA, 0x00)` of /dev/userfaultfd.
const NEW: u32 = 0xaa00;
const VERSION: u64 = 0xaa;
const MISSING_SHMEM: u64 = 1 << 5;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const MESSAGE_BYTES: usize = 32;

/// The request with which a guest's process gives up all pages that are still missing; the only ioctl it may make.
pub const UNREGISTER_REQUEST: u32 = UNREGISTER;

#[repr(C)]
struct ApiWords {
    version: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    bytes: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    bytes: u64,
    mode: u64,
    copied: i64,
}

/// Why a host cannot do it.
#[derive(Debug, thiserror::Error)]
pub enum FaultsError {
    /// No descriptor is to be had.
    #[error(
        "userfaultfd is not permitted here ({0}): run node-agent as root, or set the sysctl \
         vm.unprivileged_userfaultfd=1, or give its user /dev/userfaultfd"
    )]
    Refused(Errno),
    /// The kernel is too old.
    #[error("the kernel's userfaultfd does not know shared memory ({0}): Linux 4.11 does")]
    Features(Errno),
    /// A mapping is refused.
    #[error("RAM cannot be registered for faults ({0})")]
    Register(Errno),
}

/// How placing a page ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placed {
    /// All of them are there, these or others before them.
    All,
    /// Nothing is missing any more: the process gave the rest up.
    Unregistered,
    /// The process is gone.
    Gone,
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Faults(OwnedFd);

/// A runner's side of it: the descriptor, and where RAM lies.
#[derive(Debug)]
pub struct Missing {
    /// The descriptor.
    pub faults: Faults,
    /// In order of page.
    pub mappings: Vec<Mapping>,
}

impl Missing {
    /// Watches these mappings, all of whose pages are missing.
    ///
    /// # Errors
    /// [`FaultsError`].
    pub fn watch(mappings: Vec<Mapping>) -> Result<Missing, FaultsError> {
        let faults = Faults::open()?;
        for mapping in &mappings {
            faults.register(mapping)?;
        }
        Ok(Missing { faults, mappings })
    }

    /// From here on pages that are missing are zero.
    ///
    /// # Errors
    /// Of ioctl(2).
    pub fn give_up(&self) -> Result<(), Errno> {
        self.mappings.iter().try_for_each(|mapping| self.faults.unregister(mapping))
    }
}

impl Faults {
    /// A new one, for this process.
    ///
    /// # Errors
    /// [`FaultsError::Refused`], [`FaultsError::Features`].
    pub fn open() -> Result<Faults, FaultsError> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: the descriptor does nothing to memory until a mapping is registered.
        let made = unsafe { rustix::mm::userfaultfd(flags) };
        let fd = made.or_else(|errno| from_device(flags).map_err(|_| errno)).map_err(FaultsError::Refused)?;
        let mut words = ApiWords { version: VERSION, features: MISSING_SHMEM, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes one `struct uffdio_api`, which `ApiWords` is.
        unsafe { ioctl(&fd, Updater::<API, ApiWords>::new(&mut words)) }.map_err(FaultsError::Features)?;
        Ok(Faults(fd))
    }

    /// One that a runner handed over.
    pub fn from_descriptor(descriptor: OwnedFd) -> Faults {
        Faults(descriptor)
    }

    /// Another descriptor of the same.
    ///
    /// # Errors
    /// Of dup(2).
    pub fn share(&self) -> std::io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// To be waited for in a task.
    ///
    /// # Errors
    /// Of epoll(7).
    pub fn watched(self) -> std::io::Result<AsyncFd<Faults>> {
        // SAFETY: a `Faults` owns its descriptor, never changes it, and closes it only when it is dropped.
        unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }.map_err(Into::into)
    }

    fn register(&self, mapping: &Mapping) -> Result<(), FaultsError> {
        let mut words = Register { range: range(mapping), mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER reads and writes one `struct uffdio_register`. The mapping stays for the life of the
        // process; a thread that touches a missing page of it sleeps and sees no other memory than before.
        unsafe { ioctl(&self.0, Updater::<REGISTER, Register>::new(&mut words)) }.map_err(FaultsError::Register)
    }

    /// From here on missing pages of this mapping are zero; sleepers go on.
    ///
    /// # Errors
    /// Of ioctl(2).
    pub fn unregister(&self, mapping: &Mapping) -> Result<(), Errno> {
        // SAFETY: UFFDIO_UNREGISTER reads one `struct uffdio_range`.
        unsafe { ioctl(&self.0, Setter::<UNREGISTER, Range>::new(range(mapping))) }
    }

    /// Sleepers of this mapping look again.
    ///
    /// # Errors
    /// Of ioctl(2).
    pub fn wake(&self, mapping: &Mapping) -> Result<(), Errno> {
        // SAFETY: UFFDIO_WAKE reads one `struct uffdio_range`.
        unsafe { ioctl(&self.0, Setter::<WAKE, Range>::new(range(mapping))) }
    }

    /// Places whole pages from `address` on of the process that registered; pages that are there stay as they are. Whoever
    /// sleeps on one of them goes on.
    ///
    /// # Errors
    /// The host has no memory, or what else is not said by [`Placed`].
    pub fn place(&self, address: u64, pages: &[u8]) -> Result<Placed, Errno> {
        assert!(pages.len().is_multiple_of(PAGE_BYTES as usize), "whole pages");
        let mut done = 0;
        while done < pages.len() {
            let (to, rest) = (address + done as u64, &pages[done..]);
            let mut words = Copy { to, from: rest.as_ptr() as u64, bytes: rest.len() as u64, mode: 0, copied: 0 };
            // SAFETY: UFFDIO_COPY reads and writes one `struct uffdio_copy`, and reads `rest` from this process, which
            // outlives the call; it writes only to missing pages of what the other process registered.
            let copied = unsafe { ioctl(&self.0, Updater::<COPY, Copy>::new(&mut words)) };
            match copied {
                Ok(()) => return Ok(Placed::All),
                Err(Errno::EXIST) => {
                    let there = Mapping { address: to as usize, first_page: 0, pages: 1 };
                    self.wake(&there)?;
                    done += PAGE_BYTES as usize;
                }
                Err(Errno::AGAIN | Errno::INTR) => done += usize::try_from(words.copied).unwrap_or(0),
                Err(Errno::NOENT) => return Ok(Placed::Unregistered),
                Err(Errno::SRCH) => return Ok(Placed::Gone),
                Err(other) => return Err(other),
            }
        }
        Ok(Placed::All)
    }

    /// The address that somebody sleeps on; none if nobody has come since.
    ///
    /// # Errors
    /// Of read(2).
    pub fn next(&self) -> Result<Option<u64>, Errno> {
        loop {
            let mut message = [0; MESSAGE_BYTES];
            match rustix::io::read(&self.0, &mut message[..]) {
                Ok(MESSAGE_BYTES) if message[0] == EVENT_PAGEFAULT => {
                    let [.., a, b, c, d, e, f, g, h] = message[..24] else { unreachable!("24 bytes are more than 8") };
                    return Ok(Some(u64::from_ne_bytes([a, b, c, d, e, f, g, h])));
                }
                Ok(0) | Err(Errno::AGAIN) => return Ok(None),
                Ok(_) | Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
    }
}

impl AsFd for Faults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl std::os::fd::AsRawFd for Faults {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

fn range(mapping: &Mapping) -> Range {
    Range { start: mapping.address as u64, bytes: mapping.pages * PAGE_BYTES }
}

fn from_device(flags: UserfaultfdFlags) -> rustix::io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    // SAFETY: USERFAULTFD_IOC_NEW takes flags and returns a new descriptor or -1.
    let made = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&device), NEW.into(), flags.bits()) };
    if made < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    // SAFETY: the call has just made it and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmcb_engine::memory::GuestMemory;

    const BYTES: u64 = 16 << 20;

    /// RAM whose pages are missing; `None` where the host does not permit it (said, so that a skip is seen).
    fn missing() -> Option<(GuestMemory, Missing)> {
        let memory = GuestMemory::create(BYTES).unwrap();
        match Missing::watch(memory.mappings()) {
            Ok(missing) => Some((memory, missing)),
            Err(error) => {
                eprintln!("SKIPPED: {error}");
                None
            }
        }
    }

    fn wait_for_fault(faults: &Faults) -> u64 {
        let mut polled = [rustix::event::PollFd::new(faults, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut polled, Some(&rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 })).unwrap();
        faults.next().unwrap().expect("somebody sleeps")
    }

    #[test]
    fn whoever_touches_a_missing_page_sleeps_until_it_is_placed() {
        let Some((memory, missing)) = missing() else { return };
        let base = missing.mappings[0].address as u64;
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut bytes = [0; 2];
                memory.read(0x5fff, &mut bytes).unwrap();
                memory.write(0x5000, &[9]).unwrap();
                bytes
            });
            assert_eq!(wait_for_fault(&missing.faults) & !0xfff, base + 0x5000);
            let pages = [[5; 4096], [6; 4096]].concat();
            assert_eq!(missing.faults.place(base + 0x5000, &pages).unwrap(), Placed::All);
            assert_eq!(reader.join().unwrap(), [5, 6]);
        });
        // What the guest wrote stays, however often the page comes.
        assert_eq!(missing.faults.place(base + 0x4000, &[1; 3 * 4096]).unwrap(), Placed::All);
        let mut bytes = [0; 3];
        memory.read(0x4fff, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 9, 5]);
        // A system call that fills a missing page sleeps as the guest does: here the page is placed before.
        missing.faults.place(base + 0x9000, &[3; 4096]).unwrap();
        missing.give_up().unwrap();
        memory.read(0x10_0000, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 3], "what was given up is zero");
        assert_eq!(missing.faults.place(base + 0x20_0000, &[1; 4096]).unwrap(), Placed::Unregistered);
    }

    #[test]
    fn who_waits_is_heard_again_by_the_next_holder_of_the_descriptor() {
        let Some((memory, missing)) = missing() else { return };
        let mapping = missing.mappings[0];
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut bytes = [0; 1];
                memory.read(0x7000, &mut bytes).unwrap();
                bytes[0]
            });
            wait_for_fault(&missing.faults);
            // Its agent dies here, having read the fault. The next one has another descriptor of the same.
            let next = Faults::from_descriptor(missing.faults.share().unwrap());
            assert_eq!(next.next().unwrap(), None);
            next.wake(&mapping).unwrap();
            let again = wait_for_fault(&next);
            assert_eq!(again & !0xfff, mapping.address as u64 + 0x7000);
            next.place(again & !0xfff, &[8; 4096]).unwrap();
            assert_eq!(reader.join().unwrap(), 8);
        });
    }
}

//! The threads that run vCPUs, and how they are called back.
//!
//! A vCPU is sent to its thread, runs there until it leaves the kernel with something that the thread cannot answer, and is sent
//! back with it. Whoever has the vCPU may use it; nobody else touches it, but for one byte: [`Kick`] sets `immediate_exit`
//! in the page that the vCPU shares with the kernel (KVM API 5), and a signal makes the kernel look. A thread that is not in
//! KVM_RUN yet finds the byte when it enters, so no kick is lost.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::exits::{self, Left};
use super::vcpu::Vcpu;
use crate::engine::Bell;

/// The signal of a kick: it does nothing but interrupt.
fn kick_signal() -> i32 {
    SIGRTMIN() + 1
}

extern "C" fn interrupted(_signal: i32, _info: *mut libc::siginfo_t, _context: *mut std::ffi::c_void) {}

/// Says that a vCPU must leave KVM_RUN.
#[derive(Clone, Copy)]
pub(super) struct Kick(NonNull<AtomicU8>);

impl Kick {
    /// `immediate_exit` of a vCPU.
    pub(super) fn at(place: NonNull<AtomicU8>) -> Kick {
        Kick(place)
    }

    fn set(self, leave: bool) {
        // SAFETY: the page is mapped while the vCPU exists, and the engine drops its crew before its vCPUs. The kernel reads the
        // byte, the program writes it here alone, and atomically.
        unsafe { self.0.as_ref() }.store(leave.into(), Ordering::SeqCst);
    }
}

/// What was heard instead of a vCPU that comes back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Word {
    /// Nothing, in time.
    Nothing,
    /// Somebody wants the run to end; see [`Bell`].
    Rung,
    /// The thread of a vCPU has ended.
    Gone,
}

/// A vCPU that came back from its thread.
pub(super) struct Back {
    pub(super) index: usize,
    pub(super) vcpu: Vcpu,
    pub(super) left: Left,
}

struct Member {
    inbox: Option<Sender<Vcpu>>,
    kick: Kick,
    thread: Option<JoinHandle<()>>,
}

/// A thread for every vCPU.
pub(super) struct Crew {
    members: Vec<Member>,
    outbox: Receiver<Result<Back, Word>>,
    bell: Bell,
}

impl Crew {
    /// Makes the threads.
    ///
    /// # Errors
    /// The host makes none.
    pub(super) fn hire(kicks: Vec<Kick>) -> io::Result<Crew> {
        register_signal_handler(kick_signal(), interrupted).map_err(io::Error::from)?;
        let (back, outbox) = channel();
        let (started, starts) = channel();
        let rung: Sender<Result<Back, Word>> = Sender::clone(&back);
        // Nobody to hear it is nobody who runs.
        let bell = Bell::new(move || drop(rung.send(Err(Word::Rung))));
        let mut crew = Crew { members: Vec::new(), outbox, bell };
        for (index, kick) in kicks.into_iter().enumerate() {
            let (inbox, work) = channel::<Vcpu>();
            let (back, started) = (back.clone(), started.clone());
            let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
                let _hired = started.send(());
                let _last_word = LastWord(back.clone());
                while let Ok(mut vcpu) = work.recv() {
                    let left = exits::enter(&mut vcpu);
                    if back.send(Ok(Back { index, vcpu, left })).is_err() {
                        return;
                    }
                }
            })?;
            crew.members.push(Member { inbox: Some(inbox), kick, thread: Some(thread) });
        }
        // What a thread does to begin is over when this returns: a process may give up the right to it.
        let _begun = starts.iter().take(crew.members.len()).count();
        Ok(crew)
    }

    /// Lets a vCPU enter the kernel. Gives it back if its thread has ended.
    pub(super) fn send(&self, index: usize, vcpu: Vcpu, entry: Entry) -> Result<(), Box<Vcpu>> {
        let Some(Member { inbox: Some(inbox), kick, .. }) = self.members.get(index) else { return Err(Box::new(vcpu)) };
        kick.set(entry == Entry::ComeBack);
        inbox.send(vcpu).map_err(|error| Box::new(error.0))
    }

    /// Calls every vCPU back.
    pub(super) fn call_back(&self) {
        for Member { kick, thread, .. } in &self.members {
            kick.set(true);
            // A thread that has ended runs nothing.
            let _gone = thread.as_ref().map(|thread| thread.kill(kick_signal()));
        }
    }

    /// The next vCPU that comes back, or what was heard instead.
    pub(super) fn next(&self, within: Option<Duration>) -> Result<Back, Word> {
        match within {
            None => self.outbox.recv().unwrap_or(Err(Word::Gone)),
            Some(within) => self.outbox.recv_timeout(within).unwrap_or(Err(Word::Nothing)),
        }
    }

    /// What ends a run.
    pub(super) fn bell(&self) -> Bell {
        self.bell.clone()
    }
}

/// Says that a thread has ended, however it did.
struct LastWord(Sender<Result<Back, Word>>);

impl Drop for LastWord {
    fn drop(&mut self) {
        // An engine that has ended too does not listen.
        let _ = self.0.send(Err(Word::Gone));
    }
}

/// How a vCPU enters the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Entry {
    /// To run.
    GoOn,
    /// To complete what it left with, and nothing else.
    ComeBack,
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.members.iter_mut().for_each(|member| member.inbox = None);
        for thread in self.members.iter_mut().filter_map(|member| member.thread.take()) {
            // It has nothing to say, and waits for work or has ended.
            let _ended = thread.join();
        }
    }
}

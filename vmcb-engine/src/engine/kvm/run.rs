//! All vCPUs until there is a reason to stop: the time that was asked for, the guest's own wish, or an error.
//!
//! ```text
//! standing --send--> its thread: KVM_RUN --leaves--> answered here --send--> ...
//! a reason to stop: every vCPU is called back; one that is answered afterwards enters once more with immediate_exit, so that
//! its instruction is complete, and then stands
//! ```

use std::time::Duration;

use super::exits::{self, Next};
use super::thread::{Back, Crew, Entry, Word};
use super::{KvmEngine, Refusal, Vcpu};
use crate::engine::{Engine, Exit, Platform};

/// How long the guest's output gathers before somebody may look at it.
const OUTPUT_WAITS: Duration = Duration::from_millis(2);

impl KvmEngine {
    /// [`Engine::run`].
    pub(super) fn run_until(&mut self, platform: &mut dyn Platform, until_retired: u64) -> Exit {
        if platform.stopped() {
            return Exit::Stopped;
        }
        if let Err(error) = self.prepare() {
            return Exit::Failed(format!("threads for vCPUs: {error}"));
        }
        if let Err(refusal) = self.time.settle(&mut self.vcpus) {
            return failed(refusal);
        }
        if self.time.clock.retired >= until_retired {
            return Exit::Reached;
        }
        let exit = self.deliver(platform).map_or_else(failed, |()| self.drive(platform, until_retired));
        match self.now() {
            Ok(tsc) => self.time.pass_to(tsc),
            Err(refusal) => return failed(refusal),
        }
        exit
    }

    /// The machine's time, by a vCPU that stands.
    fn now(&self) -> Result<u64, Refusal> {
        self.vcpus.iter().flatten().next().map_or(Ok(self.time.clock.tsc()), |vcpu| self.time.now(&vcpu.fd))
    }

    /// Brings what devices have sent to the local APICs.
    fn deliver(&self, platform: &mut dyn Platform) -> Result<(), Refusal> {
        if let Some(messages) = platform.take_level_messages() {
            self.vm.await_ends(&messages)?;
        }
        while let Some(message) = platform.take_message() {
            self.vm.signal(message)?;
        }
        Ok(())
    }

    /// Has the crew run all vCPUs.
    fn drive(&mut self, platform: &mut dyn Platform, until_retired: u64) -> Exit {
        let Some(crew) = self.crew.take() else { return Exit::Failed("there are no threads for vCPUs".to_owned()) };
        let exit = self.drive_with(&crew, platform, until_retired);
        self.crew = Some(crew);
        exit
    }

    /// Lets every vCPU run, answers them, and has all of them back at the end.
    fn drive_with(&mut self, crew: &Crew, platform: &mut dyn Platform, until_retired: u64) -> Exit {
        let mut verdict = None;
        let mut away = 0;
        for index in 0..self.vcpus.len() {
            if let Some(vcpu) = self.vcpus[index].take() {
                match self.enter(crew, index, vcpu, Entry::GoOn) {
                    Ok(()) => away += 1,
                    Err(exit) => verdict = Some(exit),
                }
            }
        }
        if verdict.is_some() {
            crew.call_back();
        }
        let mut span = Span { until_retired, now: self.time.clock.tsc(), said: false };
        while away > 0 {
            let within = self.time.left(span.until_retired, span.now);
            let handled = match crew.next(verdict.is_none().then_some(within)) {
                Ok(back) => self.handle(crew, platform, back, &mut span, verdict.is_some()),
                Err(Word::Gone) => return Exit::Failed("the thread of a vCPU has ended".to_owned()),
                Err(Word::Nothing | Word::Rung) => Handled { stands: false, end: Some(Exit::Reached) },
            };
            away -= usize::from(handled.stands);
            if verdict.is_none() && handled.end.is_some() {
                crew.call_back();
                verdict = handled.end;
            }
        }
        verdict.unwrap_or(Exit::Reached)
    }

    fn enter(&mut self, crew: &Crew, index: usize, vcpu: Vcpu, entry: Entry) -> Result<(), Exit> {
        crew.send(index, vcpu, entry).map_err(|vcpu| {
            self.vcpus[index] = Some(*vcpu);
            Exit::Failed(format!("the thread of vCPU {index} has ended"))
        })
    }

    /// Answers a vCPU and sends it on, or keeps it.
    fn handle(
        &mut self,
        crew: &Crew,
        platform: &mut dyn Platform,
        back: Back,
        span: &mut Span,
        stopping: bool,
    ) -> Handled {
        let Back { index, mut vcpu, left } = back;
        let tsc = match self.time.now(&vcpu.fd) {
            Ok(tsc) => tsc,
            Err(refusal) => return self.keep(index, vcpu, Some(failed(refusal))),
        };
        let next = exits::answer(&mut vcpu, left, platform, tsc);
        span.now = span.now.max(tsc);
        if platform.has_output() && !std::mem::replace(&mut span.said, true) {
            // Whoever listens should not wait for the end of a long run.
            span.until_retired = span.until_retired.min(self.time.retired_after(tsc, OUTPUT_WAITS));
        }
        let wish = match self.deliver(platform) {
            Err(refusal) => Some(failed(refusal)),
            Ok(()) if platform.stopped() => Some(Exit::Stopped),
            Ok(()) => self.time.is_reached(span.until_retired, tsc).then_some(Exit::Reached),
        };
        match next {
            Next::End(exit) => return self.keep(index, vcpu, Some(exit)),
            Next::Interrupted if stopping => return self.keep(index, vcpu, None),
            Next::Enter | Next::Interrupted => {}
        }
        let entry = if stopping || wish.is_some() { Entry::ComeBack } else { Entry::GoOn };
        match self.enter(crew, index, vcpu, entry) {
            Ok(()) => Handled { stands: false, end: wish },
            Err(exit) => Handled { stands: true, end: Some(exit) },
        }
    }

    fn keep(&mut self, index: usize, vcpu: Vcpu, end: Option<Exit>) -> Handled {
        self.vcpus[index] = Some(vcpu);
        Handled { stands: true, end }
    }
}

/// How long the run goes on.
struct Span {
    until_retired: u64,
    /// The machine's time when it was last looked at.
    now: u64,
    /// The guest has said something.
    said: bool,
}

/// What became of a vCPU that was answered.
struct Handled {
    /// It is not with its thread any more.
    stands: bool,
    /// Why the run ends with it, if it does.
    end: Option<Exit>,
}

fn failed(refusal: Refusal) -> Exit {
    Exit::Failed(refusal.to_string())
}

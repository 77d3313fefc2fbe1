//! All vCPUs until there is a reason to stop: the time that was asked for, the guest's own wish, or an error.
//!
//! ```text
//! standing --send--> its thread: KVM_RUN --leaves--> answered here --send--> ...
//! a reason to stop: every vCPU is called back; one that is answered afterwards enters once more with immediate_exit, so that
//! its instruction is complete, and then stands
//! ```

use super::exits::{self, Next};
use super::thread::{Back, Entry};
use super::{KvmEngine, Refusal};
use crate::engine::{Exit, Platform};

impl KvmEngine {
    /// [`crate::engine::Engine::run`].
    pub(super) fn run_until(&mut self, platform: &mut dyn Platform, until_retired: u64) -> Exit {
        if platform.stopped() {
            return Exit::Stopped;
        }
        if let Err(error) = crate::engine::Engine::prepare(self) {
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

    /// Lets every vCPU run, answers them, and has all of them back at the end.
    fn drive(&mut self, platform: &mut dyn Platform, until_retired: u64) -> Exit {
        let mut verdict = None;
        let mut away = 0;
        for index in 0..self.vcpus.len() {
            if let Some(vcpu) = self.vcpus[index].take() {
                match self.enter(index, vcpu, Entry::GoOn) {
                    Ok(()) => away += 1,
                    Err(exit) => verdict = Some(exit),
                }
            }
        }
        let Some(crew) = &self.crew else { return Exit::Failed("there are no threads for vCPUs".to_owned()) };
        if verdict.is_some() {
            crew.call_back();
        }
        let within = self.time.until(until_retired);
        while away > 0 {
            let back = self.crew.as_ref().and_then(|crew| crew.next(verdict.is_none().then_some(within)));
            let Some(back) = back else {
                if verdict.is_some() {
                    return Exit::Failed("the thread of a vCPU has ended".to_owned());
                }
                verdict = Some(self.stop(Exit::Reached));
                continue;
            };
            match self.handle(platform, back, until_retired, verdict.is_some()) {
                Handled::Entered => {}
                Handled::Stands => away -= 1,
                Handled::EnteredFor(exit) => verdict = verdict.or_else(|| Some(self.stop(exit))),
                Handled::StandsFor(exit) => {
                    away -= 1;
                    verdict = verdict.or_else(|| Some(self.stop(exit)));
                }
            }
        }
        verdict.unwrap_or(Exit::Reached)
    }

    /// Calls everyone back.
    fn stop(&self, exit: Exit) -> Exit {
        self.crew.iter().for_each(super::thread::Crew::call_back);
        exit
    }

    fn enter(&mut self, index: usize, vcpu: super::Vcpu, entry: Entry) -> Result<(), Exit> {
        let sent = match &self.crew {
            Some(crew) => crew.send(index, vcpu, entry),
            None => Err(Box::new(vcpu)),
        };
        sent.map_err(|vcpu| {
            self.vcpus[index] = Some(*vcpu);
            Exit::Failed(format!("the thread of vCPU {index} has ended"))
        })
    }

    /// Answers a vCPU and sends it on, or keeps it.
    fn handle(&mut self, platform: &mut dyn Platform, back: Back, until_retired: u64, stopping: bool) -> Handled {
        let Back { index, mut vcpu, left } = back;
        let tsc = match self.time.now(&vcpu.fd) {
            Ok(tsc) => tsc,
            Err(refusal) => {
                self.vcpus[index] = Some(vcpu);
                return Handled::StandsFor(failed(refusal));
            }
        };
        let next = exits::answer(&mut vcpu, left, platform, tsc);
        let wish = match self.deliver(platform) {
            Err(refusal) => Some(failed(refusal)),
            Ok(()) if platform.stopped() => Some(Exit::Stopped),
            Ok(()) => self.time.is_reached(until_retired, tsc).then_some(Exit::Reached),
        };
        let stays = match next {
            Next::Enter => false,
            Next::Interrupted => stopping,
            Next::End(exit) => {
                self.vcpus[index] = Some(vcpu);
                return Handled::StandsFor(exit);
            }
        };
        if stays {
            self.vcpus[index] = Some(vcpu);
            return Handled::Stands;
        }
        let entry = if stopping || wish.is_some() { Entry::ComeBack } else { Entry::GoOn };
        match (self.enter(index, vcpu, entry), wish) {
            (Err(exit), _) => Handled::StandsFor(exit),
            (Ok(()), Some(exit)) => Handled::EnteredFor(exit),
            (Ok(()), None) => Handled::Entered,
        }
    }
}

/// Where a vCPU is after it was answered, and what that says of the run.
enum Handled {
    Entered,
    EnteredFor(Exit),
    Stands,
    StandsFor(Exit),
}

fn failed(refusal: Refusal) -> Exit {
    Exit::Failed(refusal.to_string())
}

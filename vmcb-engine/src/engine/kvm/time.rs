//! The machine's clock on the guest's TSC.
//!
//! The TSC of a vCPU is its host's, scaled, plus an offset that KVM keeps; the machine's clock is the same counter plus an
//! offset that is kept here, so a vCPU's own offset is the difference of the two. While the machine runs, time passes by
//! itself; [`Time::set`] makes it stand, until the machine runs again: then every vCPU's offset moves by the same amount, in one
//! write each, and timers are armed anew, because the kernel computed their instants from the offset of before.
//!
//! Where KVM itself runs in a guest that emulates it, guests may read their host's TSC whatever offset is asked for. Then a vCPU's
//! TSC lies by a *skew* beside where it was put. What was loaded is what is stored until the vCPU runs; afterwards its state says
//! where its TSC is, so that it goes on from there wherever TSCs can be set. Timers always know where it is.
//!
//! An instruction is [`Clock::tsc_per_instruction`] ticks that passed while the machine could run.

use std::time::Duration;

use kvm_ioctls::VcpuFd;

use super::msr::{read_msr, write_msr};
use super::vcpu::Vcpu;
use super::{Refusal, ioctl, refused};
use crate::engine::Clock;

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
/// A run is at least so long, so that the guest gets on however little was asked for.
const RUN_MIN: Duration = Duration::from_micros(200);

/// The clock, and how it lies to the host's counter.
pub(super) struct Time {
    /// The machine's time when it stopped last.
    pub clock: Clock,
    tsc_hz: u64,
    /// What the machine's clock is ahead of the host's counter, scaled, modulo 2^64.
    offset: u64,
    /// The counter goes on from the clock by itself.
    settled: bool,
}

impl Time {
    /// A clock at zero that stands.
    pub(super) fn new(tsc_hz: u64, tsc_per_instruction: u32) -> Time {
        let clock = Clock { tsc_per_instruction, ..Clock::default() };
        Time { clock, tsc_hz, offset: 0, settled: false }
    }

    /// The machine stands at this time until it runs again.
    pub(super) fn set(&mut self, clock: Clock) {
        self.clock = clock;
        self.settled = false;
    }

    /// A vCPU was loaded: its timers are armed when the machine runs.
    pub(super) fn unsettle(&mut self) {
        self.settled = false;
    }

    /// What a vCPU's TSC is ahead of the machine's clock.
    pub(super) fn own_offset(&self, fd: &VcpuFd) -> Result<u64, Refusal> {
        let offset = ioctl::tsc_offset(fd).map_err(refused("read the TSC's offset"))?;
        Ok(offset.wrapping_sub(self.offset))
    }

    /// Puts a vCPU's TSC so far ahead of the machine's clock, and returns by how much it missed: 0 on any host that sets TSCs.
    pub(super) fn set_own_offset(&self, fd: &VcpuFd, own: u64) -> Result<u64, Refusal> {
        ioctl::set_tsc_offset(fd, self.offset.wrapping_add(own)).map_err(refused("set the TSC's offset"))?;
        Ok(self.own_offset(fd)?.wrapping_sub(own))
    }

    /// The machine's time now, by the TSC of a vCPU.
    pub(super) fn now(&self, fd: &VcpuFd) -> Result<u64, Refusal> {
        Ok(read_msr(fd, TSC, "read the TSC")?.wrapping_sub(self.own_offset(fd)?))
    }

    /// Lets time go on from where the clock stands.
    pub(super) fn settle(&mut self, vcpus: &mut [Option<Vcpu>]) -> Result<(), Refusal> {
        let Some(first) = vcpus.iter().flatten().next() else { return Ok(()) };
        if self.settled {
            self.pass_to(self.now(&first.fd)?);
            vcpus.iter_mut().flatten().for_each(Vcpu::forget_timer);
            return Ok(());
        }
        let behind = self.clock.tsc().wrapping_sub(self.now(&first.fd)?);
        let mut stood = Vec::new();
        for vcpu in vcpus.iter().flatten() {
            stood.push((self.deadline(&vcpu.fd)?, vcpu.tsc_offset(self)?));
        }
        self.offset = self.offset.wrapping_add(behind);
        for (vcpu, (deadline, own)) in vcpus.iter_mut().flatten().zip(stood) {
            self.set_own_offset(&vcpu.fd, own)?;
            // From here on the guest sees its TSC and its segments as they are, and so does whoever asks for its state.
            vcpu.tsc_skew = 0;
            vcpu.ss_dpl = None;
            vcpu.start_timer(self.clock.tsc())?;
            self.arm(&vcpu.fd, deadline)?;
        }
        self.settled = true;
        Ok(())
    }

    /// When a vCPU's TSC-deadline timer fires, in the machine's time; 0 if it is not armed.
    pub(super) fn deadline(&self, fd: &VcpuFd) -> Result<u64, Refusal> {
        match read_msr(fd, TSC_DEADLINE, "read the TSC deadline")? {
            0 => Ok(0),
            guest => Ok(guest.wrapping_sub(self.own_offset(fd)?).max(1)),
        }
    }

    /// Arms a vCPU's TSC-deadline timer for an instant of the machine's time. The kernel ignores it in other modes.
    pub(super) fn arm(&self, fd: &VcpuFd, deadline: u64) -> Result<(), Refusal> {
        if deadline == 0 {
            return Ok(());
        }
        let guest = deadline.wrapping_add(self.own_offset(fd)?).max(1);
        write_msr(fd, TSC_DEADLINE, guest, "set the TSC deadline")
    }

    /// The machine's time is this now.
    pub(super) fn pass_to(&mut self, tsc: u64) {
        let clock = &mut self.clock;
        // The counters of two processors may differ by a little; time does not go back.
        let passed = tsc.wrapping_sub(clock.tsc());
        if passed >> 63 != 0 {
            return;
        }
        let ticks = u64::from(clock.tsc_per_instruction.max(1));
        clock.retired += passed / ticks;
        clock.skipped_tsc += passed % ticks;
    }

    /// Whether the machine's time has come to that count of instructions by this TSC.
    pub(super) fn is_reached(&self, until_retired: u64, tsc: u64) -> bool {
        let until =
            until_retired.saturating_sub(self.clock.retired).saturating_mul(self.clock.tsc_per_instruction.into());
        tsc.saturating_sub(self.clock.tsc()) >= until
    }

    /// How long it is from this TSC until that count of instructions, and at least [`RUN_MIN`].
    pub(super) fn left(&self, until_retired: u64, tsc: u64) -> Duration {
        let left = u128::from(until_retired.saturating_sub(self.clock.retired));
        let passed = u128::from(tsc.saturating_sub(self.clock.tsc()));
        let ticks = (left * u128::from(self.clock.tsc_per_instruction)).saturating_sub(passed);
        let ns = u64::try_from(ticks * 1_000_000_000 / u128::from(self.tsc_hz.max(1))).unwrap_or(u64::MAX);
        Duration::from_nanos(ns).max(RUN_MIN)
    }

    /// The count of instructions so long after this TSC.
    pub(super) fn retired_after(&self, tsc: u64, later: Duration) -> u64 {
        let passed = u128::from(tsc.saturating_sub(self.clock.tsc()));
        let ticks = passed + later.as_nanos() * u128::from(self.tsc_hz) / 1_000_000_000;
        let count = u64::try_from(ticks / u128::from(self.clock.tsc_per_instruction.max(1))).unwrap_or(u64::MAX);
        self.clock.retired.saturating_add(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_ticks_that_passed_and_none_is_lost() {
        let mut time = Time::new(1_000_000_000, 4);
        time.pass_to(1_000_003);
        assert_eq!((time.clock.tsc(), time.clock.retired), (1_000_003, 250_000));
        time.pass_to(1_000_002);
        assert_eq!(time.clock.tsc(), 1_000_003, "time does not go back");
        time.pass_to(1_000_004);
        assert_eq!(time.clock.tsc(), 1_000_004);
        assert!(!time.is_reached(250_001, 1_000_004) && time.is_reached(250_001, 1_000_008));
        assert_eq!(time.left(1_250_000, 1_000_004), Duration::from_nanos(4_000_000));
        assert_eq!(time.left(1_250_000, 3_000_004), Duration::from_nanos(2_000_000));
        assert_eq!((time.left(0, 0), time.left(250_002, u64::MAX)), (RUN_MIN, RUN_MIN));
        assert_eq!(time.retired_after(1_000_004 + 4_000_000, Duration::from_millis(4)), 250_000 + 2_000_000);
    }
}

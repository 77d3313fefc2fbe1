//! A #VMEXIT on its way to the host, and the question that every interceptable instruction asks.
//!
//! Exit codes were laid out so that code = 32 * word + bit of the intercept (APM2 table B-1, appendix C); nothing here
//! is a table therefore. This file refuses to know what the host does with an exit.

use crate::engine::soft::core::{Core, Step, Stop};
use crate::vmcb::{Event, ExitCode, Intercept};

/// What #VMEXIT will write into the control area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SvmExit {
    /// EXITCODE.
    pub code: ExitCode,
    /// EXITINFO1.
    pub info1: u64,
    /// EXITINFO2.
    pub info2: u64,
    /// RIP of the next instruction; set for every exit from inside an instruction, reported for instruction intercepts.
    pub next_rip: u64,
    /// EXITINTINFO: the event whose delivery was interrupted.
    pub interrupted: Event,
}

impl Default for SvmExit {
    fn default() -> Self {
        Self { code: ExitCode::INTR, info1: 0, info2: 0, next_rip: 0, interrupted: Event::NONE }
    }
}

impl SvmExit {
    /// True if nRIP is reported: intercepts of instructions (APM2 15.7.1).
    pub fn reports_next_rip(&self) -> bool {
        let code = self.code.0;
        // CR and DR accesses; #BP and #OF, which instructions raise by intent; the instruction codes proper.
        matches!(code, 0x00..=0x3f | 0x43 | 0x44 | 0x65..=0x7c | 0x80..=0x8e | 0xa0..=0xa6) && code != 0x73
    }
}

impl Core {
    /// Leaves the guest with this exit, from inside an instruction.
    #[cold]
    pub fn exit_with<T>(&mut self, code: ExitCode, info1: u64, info2: u64) -> Step<T> {
        self.exit = SvmExit { code, info1, info2, next_rip: self.exit.next_rip, interrupted: Event::NONE };
        Err(Stop::Exit)
    }

    /// Exits if a guest is loaded and `which` is intercepted. Call after the exceptions that have precedence (APM2 15.7).
    #[inline]
    pub fn intercept(&mut self, which: Intercept) -> Step {
        self.intercept_info(which, 0)
    }

    /// As [`Core::intercept`], with EXITINFO1.
    #[inline]
    pub fn intercept_info(&mut self, which: Intercept, info1: u64) -> Step {
        if !self.control.intercepts(which) || self.mmio.emulating() {
            return Ok(());
        }
        let code = ExitCode(which.word() as u64 * 32 + u64::from(which.bit()));
        self.exit_with(code, info1, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_from_the_intercepts_position() {
        for (which, code) in [
            (Intercept::cr_read(3), ExitCode::cr_read(3)),
            (Intercept::cr_write(8), ExitCode::cr_write(8)),
            (Intercept::dr_write(7), ExitCode::dr_write(7)),
            (Intercept::exception(14), ExitCode::exception(14)),
            (Intercept::CPUID, ExitCode::CPUID),
            (Intercept::VMRUN, ExitCode::VMRUN),
            (Intercept::XSETBV, ExitCode::XSETBV),
            (Intercept::INVPCID, ExitCode::INVPCID),
        ] {
            assert_eq!(which.word() as u64 * 32 + u64::from(which.bit()), code.0, "{which:?}");
        }
    }
}

//! What the runner asks of a machine: the seam between the driver and the engine.
//!
//! The driver (pacing, lease, pause, console) is tested against a guest made of a script; the only real
//! implementation is a [`Door`], behind which there is a [`vmcb_engine::machine::Machine`]. The seam refuses to know processes,
//! sockets and time.

use proto::v1::Section;
use vmcb_engine::engine::{Bell, Stops};
pub use vmcb_engine::machine::Outcome;
use vmcb_engine::replay::Door;

/// Which memory a debugger means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// By a vCPU's page tables.
    Linear {
        /// Whose.
        vcpu: usize,
        /// Of the first byte.
        address: u64,
    },
    /// Guest-physical.
    Physical(u64),
}

/// A machine under a debugger, as the driver sees it.
pub trait Debugged {
    /// State of a vCPU as the section `cpu/N` has it; none: there is no such vCPU.
    fn read_cpu(&self, vcpu: usize) -> Option<Vec<u8>>;
    /// Puts a vCPU into a state: an input of the guest.
    ///
    /// # Errors
    /// It is no state of this vCPU; nothing has changed.
    fn write_cpu(&mut self, vcpu: usize, state: &[u8]) -> Result<(), String>;
    /// Reads RAM without any effect; how many bytes could be read.
    fn read_memory(&self, place: Place, into: &mut [u8]) -> usize;
    /// Writes RAM: an input of the guest.
    ///
    /// # Errors
    /// Not all of it is mapped, or RAM; nothing has changed.
    fn write_memory(&mut self, place: Place, bytes: &[u8]) -> Result<(), String>;
    /// Where runs come back from now on.
    fn set_stops(&mut self, stops: &Stops);
    /// The instructions before which the vCPUs stand are executed without a stop.
    fn pass_breakpoints(&mut self);
    /// The vCPU that retired the last instruction.
    fn current_vcpu(&self) -> usize;
    /// Instructions that had retired over all vCPUs after this one's last; none: it has run none.
    fn last_ran(&self, vcpu: usize) -> Option<u64>;
}

/// A machine as the driver sees it.
pub trait Guest: Debugged {
    /// What records it, and goes through recordings; none: it cannot be recorded.
    fn door(&self) -> Option<&Door>;
    /// The same, to be used.
    fn door_mut(&mut self) -> Option<&mut Door>;
    /// Loads the kernel into a machine without state.
    ///
    /// # Errors
    /// What is wrong with the kernel or initrd, in words.
    fn boot(&mut self, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(), String>;
    /// Starts a machine that has run afresh from the kernel; time and disks go on.
    ///
    /// # Errors
    /// As [`Guest::boot`]; then the machine is of no use.
    fn reset(&mut self, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(), String>;
    /// Runs until exactly this many instructions are retired since the machine was built, or until something else stops it.
    fn run(&mut self, until_retired: u64) -> Outcome;
    /// Lets the time of an idle guest jump forward; never backwards.
    fn skip_idle_until(&mut self, tsc: u64);
    /// Instructions retired since the machine was built.
    fn retired(&self) -> u64;
    /// Guest TSC.
    fn tsc(&self) -> u64;
    /// Feeds the serial console; returns how many bytes fitted.
    fn console_input(&mut self, bytes: &[u8]) -> usize;
    /// How many bytes would fit now.
    fn console_room(&self) -> usize;
    /// What the serial console said since the last call.
    fn take_console_output(&mut self) -> Vec<u8>;
    /// Delivers an Ethernet frame to a card; `false` when the guest had no buffer and it was dropped.
    fn net_input(&mut self, card: usize, packet: &[u8]) -> bool;
    /// Keeps an Ethernet frame as part of the state of a machine that stands still; `false` when there is no room.
    fn net_hold(&mut self, card: usize, packet: &[u8]) -> bool;
    /// The running epoch of page stamps.
    fn epoch(&self) -> u32;
    /// Closes the running epoch; returns the new one.
    ///
    /// # Errors
    /// What the guest wrote is not known, in words.
    fn advance_epoch(&mut self) -> Result<u32, String>;
    /// Stamps what the guest has written so far with the running epoch.
    ///
    /// # Errors
    /// What the guest wrote is not known, in words.
    fn look_at_writes(&mut self) -> Result<(), String> {
        Ok(())
    }
    /// Closes the running epoch, and keeps what pages and blocks stamped since `mark` hold now; returns the new epoch.
    ///
    /// # Errors
    /// The host's, in words.
    fn freeze(&mut self, mark: u32) -> Result<u32, String>;
    /// Keeps nothing any more; false if something could not be kept.
    fn thaw(&mut self) -> bool;
    /// Host memory that what is kept takes.
    fn kept_bytes(&self) -> u64;
    /// All sections of the stopped machine.
    ///
    /// # Errors
    /// What could not be captured.
    fn capture(&mut self) -> Result<Vec<Section>, String>;
    /// Loads sections into a machine without state.
    ///
    /// # Errors
    /// Which section is unknown, missing, twice there or malformed.
    fn apply(&mut self, sections: &[Section]) -> Result<(), String>;
    /// VMCBs by vCPU.
    ///
    /// # Errors
    /// The engine does not give them, in words.
    fn vmcbs(&self) -> Result<Vec<Box<[u8; 4096]>>, String>;
    /// Makes what the process may make no more once it is sealed.
    ///
    /// # Errors
    /// The host's, in words.
    fn prepare(&mut self) -> Result<(), String> {
        Ok(())
    }
    /// What makes a run come back early; none: runs are as long as they were asked to be.
    fn bell(&self) -> Option<Bell> {
        None
    }
    /// True if its time goes on by itself, also while it does not run: whoever lets it go on says where its time stands.
    fn runs_in_real_time(&self) -> bool {
        false
    }
}

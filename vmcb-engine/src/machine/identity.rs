//! Who the machine is, where more than one may come from one checkpoint: the VM generation ID (Microsoft's "Virtual Machine
//! Generation ID" paper; Linux's `vmgenid` driver). The configuration says which generation this is, RAM says which one the
//! guest has seen. Where they differ, a machine that was put into a captured state tells the guest before its first
//! instruction, and the guest makes its random numbers anew. It refuses to know where a generation comes from.

use super::{Machine, MachineError};
use crate::boot::layout::GENERATION_ID;

/// Bytes of a generation ID.
pub const GENERATION_BYTES: usize = 16;

/// A configuration's generation ID, if the machine has one.
///
/// # Errors
/// Neither none nor 16 bytes.
pub(super) fn check(bytes: &[u8]) -> Result<(), MachineError> {
    match bytes.len() {
        0 | GENERATION_BYTES => Ok(()),
        found => {
            let (field, rule) = ("generation_id", "none or 16 bytes".to_owned());
            Err(MachineError::Config { field, found: format!("{found} bytes"), rule })
        }
    }
}

impl Machine {
    /// Tells the guest which generation it is, if it has seen another one.
    pub(super) fn renew_identity(&mut self) {
        let mut seen = [0; GENERATION_BYTES];
        let ours = &self.config.generation_id;
        if ours.is_empty() || self.memory.read(GENERATION_ID, &mut seen).is_err() || *ours == seen {
            return;
        }
        self.memory.write(GENERATION_ID, ours).expect("what was read can be written");
        self.bus.tell_generation();
    }
}

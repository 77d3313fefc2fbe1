//! What an engine keeps for itself, brought to where it is saved, and back: local APICs and stamps. On the software engine
//! there is nothing to do.
//!
//! ```text
//! capture   messages that wait -> engine's local APICs -> the bus's, which are saved
//! apply     the bus's local APICs, which were restored -> engine's
//! ```
//! A message may be on its way in both directions when a machine stops; it is brought to its end first, so that what is
//! saved is one state and not two halves.

use super::{Machine, MachineError};
use crate::engine::{LocalApics, StoreError};

/// Most rounds of messages until nothing is on its way: every level-triggered pin may be sent again once.
const ROUNDS_MAX: usize = 64;

impl Machine {
    /// Brings what the engine has of the machine's state to where it is saved.
    ///
    /// # Errors
    /// The engine does not give it, or it has no saved form.
    pub(super) fn gather(&mut self) -> Result<(), MachineError> {
        self.engine.settle_stamps().map_err(MachineError::Stamps)?;
        let Some(lapics) = self.engine.local_apics() else { return Ok(()) };
        for _ in 0..ROUNDS_MAX {
            while let Some(message) = self.bus.take_message() {
                lapics.send(message).map_err(|source| MachineError::Load { vcpu: 0, source })?;
            }
            collect(lapics, &mut self.bus)?;
            if !self.bus.end_what_nobody_has() {
                return Ok(());
            }
        }
        let reason = "interrupts never come to rest".to_owned();
        Err(MachineError::Store { vcpu: 0, source: StoreError::Refused { step: "local APICs", reason } })
    }

    /// Gives the engine the local APICs that were restored, if they are its own.
    ///
    /// # Errors
    /// The engine refuses one.
    pub(super) fn hand_out_lapics(&mut self) -> Result<(), MachineError> {
        let Some(lapics) = self.engine.local_apics() else { return Ok(()) };
        for vcpu in 0..self.bus.vcpus() {
            let saved = self.bus.lapic(vcpu);
            lapics.restore(vcpu, &saved).map_err(|source| MachineError::Load { vcpu, source })?;
        }
        Ok(())
    }
}

fn collect(lapics: &mut dyn LocalApics, bus: &mut crate::device::bus::Bus) -> Result<(), MachineError> {
    for vcpu in 0..bus.vcpus() {
        let saved = lapics.save(vcpu).map_err(|source| MachineError::Store { vcpu, source })?;
        bus.set_lapic(vcpu, &saved).map_err(|source| MachineError::Lapic { vcpu, source })?;
    }
    Ok(())
}

//! Rungs: states of a machine to come back to, without any trace in the run that goes on.
//!
//! A capture makes the engine forget its cached translations, because a restored machine has none; a guest that relies on
//! a stale one can tell. A rung has them, so taking one is no event. It is of one machine: it says nothing of RAM and
//! disks, which the caller keeps and puts back before the machine climbs. Who keeps how many rungs is not known here.

use proto::v1::Section;

use super::{Life, Machine, MachineError};
use crate::device::bus::SECTION_VERSION;
use crate::device::virtio::block::Outcomes;
use crate::engine::EngineRung;
use crate::snapshot::Sections;

/// A machine between two instructions, but for RAM and disks.
#[derive(Debug)]
pub struct Rung {
    engine: EngineRung,
    devices: Vec<Section>,
    vcpu: usize,
    arrived: bool,
    disk_outcomes: Vec<Outcomes>,
}

impl Rung {
    /// Bytes of host memory that it takes, about.
    pub fn bytes(&self) -> usize {
        self.engine.bytes() + self.devices.iter().map(|section| section.body.len()).sum::<usize>()
    }
}

impl Machine {
    /// The machine now.
    ///
    /// # Errors
    /// It has no state.
    pub fn rung(&self) -> Result<Rung, MachineError> {
        if self.life != Life::Ready {
            return Err(MachineError::Empty);
        }
        if self.engine.runs_in_real_time() {
            return Err(MachineError::SoftOnly("coming back to an instant"));
        }
        let (engine, devices, disk_outcomes) = (self.engine.rung(), self.bus.save(), self.bus.disk_outcomes());
        Ok(Rung { engine, devices, vcpu: self.bus.vcpu(), arrived: self.arrived, disk_outcomes })
    }

    /// Makes the machine what it was, its time included. RAM and disks hold what they held then already, RAM by writes through
    /// [`Machine::memory`], which says where decoded code lay; pages are stamped when they are written again. Console output
    /// that nobody took is gone; stops that are set stay.
    ///
    /// # Errors
    /// The rung is not one of this machine: then nothing has changed, or the machine is of no use.
    pub fn climb(&mut self, rung: &Rung) -> Result<(), MachineError> {
        let mut devices = Sections::new(rung.devices.iter().cloned())?;
        let was = std::mem::replace(&mut self.life, Life::Broken);
        if let Err(source) = self.engine.climb(&rung.engine) {
            self.life = was;
            return Err(MachineError::Load { vcpu: 0, source });
        }
        self.bus.restore(&mut |name: &str| Ok::<_, MachineError>(devices.take(name, SECTION_VERSION)?.body))?;
        devices.finish()?;
        self.bus.set_vcpu(rung.vcpu);
        self.bus.set_disk_outcomes(&rung.disk_outcomes);
        self.arrived = rung.arrived;
        self.life = Life::Ready;
        Ok(())
    }
}

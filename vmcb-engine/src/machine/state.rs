//! Capture, apply, digest.
//!
//! | section | body |
//! |---|---|
//! | `clock` | `ClockV1` |
//! | `cpu/N` | `CpuStateV1` |
//! | `device/...` | device.proto, see `device/bus/saved.rs` |
//!
//! RAM and disks are no sections: they travel as pages. The configuration decides which sections there must be.

use std::os::fd::BorrowedFd;

use prost::Message;
use proto::ids::Digest;
use proto::v1::{ClockV1, MachineDigest, Section};

use super::{Life, Machine, MachineError};
use crate::cpu::CpuState;
use crate::device::bus::SECTION_VERSION;
use crate::engine::Clock;
use crate::memory::shared::{PagesError, SharedPages};
use crate::snapshot::{SectionError, Sections, machine_digest, state_digest};

/// Versions of the sections that this file writes.
const CLOCK_VERSION: (u32, u32) = (1, 0);
const CPU_VERSION: (u32, u32) = (1, 0);

fn section(name: String, (major, minor): (u32, u32), body: Vec<u8>) -> Section {
    Section { name, major, minor, ignorable: false, body }
}

impl Machine {
    /// All state besides RAM and disks.
    ///
    /// # Errors
    /// The machine has no state.
    pub fn capture(&mut self) -> Result<Vec<Section>, MachineError> {
        if self.life != Life::Ready {
            return Err(MachineError::Empty);
        }
        self.gather()?;
        let Clock { retired, skipped_tsc, tsc_per_instruction: _ } = self.engine.clock();
        let clock = ClockV1 { retired, skipped_tsc }.encode_to_vec();
        let mut sections = vec![section("clock".to_owned(), CLOCK_VERSION, clock)];
        for vcpu in 0..self.bus.vcpus() {
            let mut state = self.engine.store(vcpu).map_err(|source| MachineError::Store { vcpu, source })?;
            // The task priority lives in the local APIC.
            state.cr8 = self.bus.cr8(vcpu).into();
            sections.push(section(format!("cpu/{vcpu}"), CPU_VERSION, state.to_bytes()));
        }
        sections.extend(self.bus.save());
        Ok(sections)
    }

    /// Puts the machine into a captured state. RAM and disks must hold what they held then.
    ///
    /// # Errors
    /// Sections are missing, left over, twice or too new: then nothing has changed. Or one of them makes no sense: then
    /// the machine is of no use.
    pub fn apply(&mut self, sections: &[Section]) -> Result<(), MachineError> {
        let mut given = Sections::new(sections.iter().cloned())?;
        let clock = given.take("clock", CLOCK_VERSION)?;
        let cpus: Result<Vec<Section>, SectionError> =
            (0..self.bus.vcpus()).map(|vcpu| given.take(&format!("cpu/{vcpu}"), CPU_VERSION)).collect();
        let cpus = cpus?;
        let devices: Result<Vec<Section>, SectionError> =
            self.bus.section_names().iter().map(|name| given.take(name, SECTION_VERSION)).collect();
        let devices = Sections::new(devices?)?;
        given.finish()?;
        let clock = self.decode_clock(&clock.body)?;
        let states: Result<Vec<CpuState>, MachineError> = cpus
            .iter()
            .enumerate()
            .map(|(vcpu, section)| {
                CpuState::from_bytes(&section.body).map_err(|source| MachineError::Cpu { vcpu, source })
            })
            .collect();
        let states = states?;
        self.life = Life::Broken;
        self.install(clock, &states, devices)?;
        self.life = Life::Ready;
        self.arrived = true;
        Ok(())
    }

    fn install(&mut self, clock: Clock, states: &[CpuState], mut devices: Sections) -> Result<(), MachineError> {
        self.bus.restore(&mut |name: &str| {
            let section = devices.take(name, SECTION_VERSION)?;
            Ok::<_, MachineError>(section.body)
        })?;
        devices.finish()?;
        self.engine.set_clock(clock);
        for (vcpu, state) in states.iter().enumerate() {
            let tpr = self.bus.cr8(vcpu);
            if state.cr8 != u64::from(tpr) {
                return Err(MachineError::TaskPriority { vcpu, cr8: state.cr8, tpr });
            }
            self.engine.load(vcpu, state).map_err(|source| MachineError::Load { vcpu, source })?;
        }
        self.engine.watch_writes().map_err(MachineError::Stamps)?;
        self.hand_out_lapics()
    }

    fn decode_clock(&self, body: &[u8]) -> Result<Clock, MachineError> {
        let ClockV1 { retired, skipped_tsc } =
            ClockV1::decode(body).map_err(|_| MachineError::Clock("does not decode"))?;
        let tsc_per_instruction = self.config.tsc_per_instruction;
        let busy = retired.checked_mul(tsc_per_instruction.into());
        let tsc = busy.and_then(|busy| busy.checked_add(skipped_tsc));
        if tsc.is_none_or(|tsc| tsc >= 1 << 63) {
            return Err(MachineError::Clock("a time that no machine reaches"));
        }
        Ok(Clock { retired, skipped_tsc, tsc_per_instruction })
    }

    /// Digest of everything: RAM, state, and the disks that travel. Slow: it hashes them all.
    ///
    /// # Errors
    /// The machine has no state, or RAM or a disk cannot be read.
    pub fn digest(&mut self) -> Result<MachineDigest, MachineError> {
        let state = state_digest(&self.capture()?);
        let ram = root(self.memory.ram_fd(), self.memory.stamps_fd(), self.memory.bytes())?;
        let local = self.config.disks.iter().map(|disk| !disk.shared);
        let disks: Result<Vec<Digest>, PagesError> = self
            .bus
            .disk_images()
            .zip(local)
            .filter(|(_, local)| *local)
            .map(|(image, _)| root(image.file_fd(), image.stamps_fd(), image.bytes()))
            .collect();
        Ok(machine_digest(ram, state, &disks?))
    }
}

fn root(data: BorrowedFd<'_>, stamps: BorrowedFd<'_>, bytes: u64) -> Result<Digest, PagesError> {
    Ok(SharedPages::of(data, stamps, bytes)?.digests()?.root())
}

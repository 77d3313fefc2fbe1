//! A machine: engine, memory, devices. Four verbs: run, capture, apply, digest.
//!
//! | file | what |
//! |---|---|
//! | `build` | from a configuration and its parts to a machine |
//! | `state` | capture, apply, digest |
//! | `inspect` | registers, addresses and digests for whoever looks at it |
//! | `rung` | states to come back to |
//! | `gather` | what an engine keeps for itself, brought to where it is saved |
//! | `identity` | a guest that began elsewhere learns that it is another one |
//! | `platform` | the devices as an engine sees them |
//!
//! One thread owns a machine. Nothing happens in it but by a call: input is handed in, output is fetched, time passes by
//! instructions or by [`Machine::skip_idle_until`]. What is captured does not depend on how [`Machine::run`] was cut into
//! pieces. This room refuses to know processes, sockets, hosts and the wall clock.

mod build;
mod gather;
mod identity;
mod inspect;
mod platform;
mod rung;
mod state;

use std::sync::Arc;

pub use inspect::Probe;
use proto::v1::MachineConfig;
pub use rung::Rung;

use crate::boot::{self, Boot, BootError};
use crate::cpu;
use crate::device::Unfit;
use crate::device::block::DiskImage;
use crate::device::bus::{Bus, RestoreError};
use crate::device::net::NetLink;
use crate::device::power::Stop;
use crate::device::virtio::block::Failure;
use crate::engine::kvm::KvmError;
use crate::engine::{Bell, Engine, Exit, LoadError, Stops, StoreError, Why};
use crate::memory::shared::PagesError;
use crate::memory::{GuestMemory, Keeper};
use crate::snapshot::SectionError;

/// What a machine is made of, besides its configuration.
pub struct Parts {
    /// RAM, of the size that the configuration says.
    pub memory: GuestMemory,
    /// Disks, as many and in the order of the configuration.
    pub disks: Vec<DiskImage>,
    /// Cables of the network cards, as many and in the order of the configuration; `None` is unplugged.
    pub nets: Vec<Option<NetLink>>,
}

/// Why a machine cannot be built, started, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A configuration that makes no machine, or does not fit its parts.
    #[error("configuration: {field} is {found}: {rule}")]
    Config {
        /// Field of `MachineConfig`.
        field: &'static str,
        /// What it says.
        found: String,
        /// What it must be.
        rule: String,
    },
    /// The kernel cannot be started.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Sections are missing, left over, twice, or too new.
    #[error(transparent)]
    Sections(#[from] SectionError),
    /// A section makes no device.
    #[error(transparent)]
    Device(#[from] RestoreError),
    /// A section makes no vCPU.
    #[error("section \"cpu/{vcpu}\"")]
    Cpu {
        /// Which.
        vcpu: usize,
        /// Why.
        #[source]
        source: cpu::DecodeError,
    },
    /// The engine refuses a vCPU's state.
    #[error("cpu/{vcpu} cannot be loaded")]
    Load {
        /// Which.
        vcpu: usize,
        /// Why.
        #[source]
        source: LoadError,
    },
    /// The engine does not give a vCPU's state.
    #[error("cpu/{vcpu} cannot be read")]
    Store {
        /// Which.
        vcpu: usize,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// A local APIC of the engine's is in a state that has no saved form.
    #[error("local APIC of cpu/{vcpu}")]
    Lapic {
        /// Which.
        vcpu: usize,
        /// Which field, and why.
        #[source]
        source: Unfit,
    },
    /// What the guest wrote cannot be had from the engine.
    #[error("which pages the guest wrote is not known")]
    Stamps(#[source] StoreError),
    /// The host cannot run the machine on KVM.
    #[error("engine \"kvm\"")]
    Kvm(#[from] KvmError),
    /// Asked of an engine that cannot.
    #[error("{0} is not possible on engine \"kvm\": it needs the software engine")]
    SoftOnly(&'static str),
    /// The clock's section makes no sense.
    #[error("section \"clock\": {0}")]
    Clock(&'static str),
    /// The task priority differs between a vCPU and its local APIC.
    #[error("section \"cpu/{vcpu}\": cr8 is {cr8}, its local APIC says {tpr}")]
    TaskPriority {
        /// Which.
        vcpu: usize,
        /// From the vCPU.
        cr8: u64,
        /// From the APIC.
        tpr: u8,
    },
    /// The host does not keep an instant.
    #[error("an instant cannot be kept")]
    Freeze(#[source] std::io::Error),
    /// Neither booted nor restored.
    #[error("the machine has no state: boot it or apply a capture first")]
    Empty,
    /// RAM or a disk cannot be read.
    #[error("cannot hash RAM or disks")]
    Pages(#[from] PagesError),
}

/// Why [`Machine::run`] came back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The instruction that was asked for.
    Reached,
    /// Every vCPU waits for an interrupt. The next one that is certain comes at `until_tsc`, if any.
    Idle {
        /// When a timer fires.
        until_tsc: Option<u64>,
    },
    /// The guest switched itself off.
    PowerOff,
    /// The guest wants to start again.
    Reset,
    /// The guest's processor shut down.
    TripleFault,
    /// One of the stops that were set; see [`Machine::set_stops`].
    Stop {
        /// The vCPU that met it.
        vcpu: usize,
        /// Which.
        why: Why,
    },
    /// The machine cannot go on; why.
    Failed(String),
}

/// What is in the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Life {
    /// Nothing yet.
    Empty,
    /// A state that can run.
    Ready,
    /// Half of a state: an apply failed.
    Broken,
}

/// Makes an engine on this memory.
type MakeEngine = Box<dyn Fn(Arc<GuestMemory>) -> Result<Box<dyn Engine>, MachineError>>;

/// A virtual machine.
pub struct Machine {
    config: MachineConfig,
    memory: Arc<GuestMemory>,
    bus: Bus,
    engine: Box<dyn Engine>,
    /// A reset takes a new software engine: no cache of the old one may outlive the memory that it describes.
    make_engine: MakeEngine,
    life: Life,
    /// It was put into a captured state and has not run since.
    arrived: bool,
    /// Where a run comes back; an engine after a reset is told too.
    stops: Stops,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let clock = self.engine.clock();
        f.debug_struct("Machine").field("life", &self.life).field("clock", &clock).finish_non_exhaustive()
    }
}

impl Machine {
    /// Writes a kernel into RAM and makes the first vCPU ready to enter it. Takes a bzImage, an ELF, or an ELF with a PVH
    /// note. RAM must be new.
    ///
    /// # Errors
    /// The files make no bootable kernel, or do not fit.
    pub fn boot(&mut self, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(), MachineError> {
        let position = self.retired();
        let command_line = self.config.boot.as_ref().map_or("", |boot| boot.cmdline.as_str());
        let vcpus = self.bus.vcpus();
        let windows = self.bus.windows();
        let (seed, generation_id) = (&self.config.seed, &self.config.generation_id);
        let boot = Boot { kernel, initrd, command_line, seed, generation_id, position, vcpus, windows: &windows };
        for vcpu in 0..vcpus {
            let mut state = build::power_up(&self.config, vcpu)?;
            if vcpu == 0 {
                boot::load(&self.memory, &boot, &mut state)?;
            }
            self.engine.load(vcpu, &state).map_err(|source| MachineError::Load { vcpu, source })?;
        }
        self.hand_out_lapics()?;
        self.life = Life::Ready;
        Ok(())
    }

    /// Makes what the engine needs and has not made yet: for a process that is about to give up the rights to.
    ///
    /// # Errors
    /// The host refused.
    pub fn prepare(&mut self) -> std::io::Result<()> {
        self.engine.prepare()
    }

    /// What ends [`Machine::run`] from another thread; only of engines that run in real time, once they are prepared.
    pub fn bell(&self) -> Option<Bell> {
        self.engine.bell()
    }

    /// True if the guest's time is the host's; see [`Engine::runs_in_real_time`].
    pub fn runs_in_real_time(&self) -> bool {
        self.engine.runs_in_real_time()
    }

    /// Starts a machine afresh that has run: RAM is zero, processors and devices are as after power-up, the kernel is
    /// loaded again. Time and the count of instructions go on, and so do stamps: what was in RAM counts as written. Disks,
    /// console input and what has a battery stay.
    ///
    /// # Errors
    /// The machine never had a state, or as [`Machine::boot`]; then it has no state any more.
    pub fn reset(&mut self, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(), MachineError> {
        if self.life != Life::Ready {
            return Err(MachineError::Empty);
        }
        self.life = Life::Broken;
        let clock = self.engine.clock();
        self.memory.clear()?;
        self.bus.reset();
        // What hardware caches, its host forgets with the memory.
        if !self.engine.runs_in_real_time() {
            self.engine = (self.make_engine)(Arc::clone(&self.memory))?;
        }
        self.engine.set_clock(clock);
        self.engine.set_stops(&self.stops);
        self.boot(kernel, initrd)
    }

    /// Runs until exactly `until_retired` instructions have retired since the machine was built, or until an earlier
    /// [`Outcome`]. An engine that runs in real time comes back early when its bell is rung.
    pub fn run(&mut self, until_retired: u64) -> Outcome {
        if self.life != Life::Ready {
            return Outcome::Failed(MachineError::Empty.to_string());
        }
        if std::mem::take(&mut self.arrived) {
            self.renew_identity();
        }
        self.bus.net_release();
        self.bus.count_disk_requests();
        loop {
            match self.bus.stopped() {
                Some(Stop::PowerOff) => return Outcome::PowerOff,
                Some(Stop::Reset) => return Outcome::Reset,
                None => {}
            }
            match self.engine.run(&mut self.bus, until_retired) {
                Exit::Reached => return Outcome::Reached,
                Exit::Shutdown => return Outcome::TripleFault,
                Exit::Stop { vcpu, why } => return Outcome::Stop { vcpu, why },
                Exit::Failed(why) => return Outcome::Failed(why),
                Exit::Stopped if self.bus.stopped().is_none() => {
                    return Outcome::Failed("the engine says that the guest stopped, and it did not".to_owned());
                }
                Exit::Stopped => {}
                Exit::Halted => {
                    let until_tsc = self.bus.next_deadline();
                    if until_tsc.is_none_or(|deadline| deadline > self.tsc()) {
                        return Outcome::Idle { until_tsc };
                    }
                    self.bus.tick(self.tsc());
                }
            }
        }
    }

    /// Lets time pass while every vCPU is halted. Never goes back: an earlier time is ignored.
    pub fn skip_idle_until(&mut self, tsc: u64) {
        let mut clock = self.engine.clock();
        let Some(skipped) = tsc.checked_sub(clock.tsc()) else { return };
        clock.skipped_tsc += skipped;
        self.engine.set_clock(clock);
        self.bus.tick(tsc);
    }

    /// TSC at which a device acts by itself next.
    pub fn next_deadline(&self) -> Option<u64> {
        self.bus.next_deadline()
    }

    /// Guest instructions retired since the machine was built, over all vCPUs.
    pub fn retired(&self) -> u64 {
        self.engine.clock().retired
    }

    /// TSC ticks that passed while the machine was idle.
    pub fn skipped_tsc(&self) -> u64 {
        self.engine.clock().skipped_tsc
    }

    /// TSC ticks since the machine was built.
    pub fn tsc(&self) -> u64 {
        self.engine.clock().tsc()
    }

    /// The configuration.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Serial input; returns how many bytes fit.
    pub fn console_input(&mut self, bytes: &[u8]) -> usize {
        self.bus.console_input(bytes)
    }

    /// How many bytes of serial input fit now.
    pub fn console_room(&self) -> usize {
        self.bus.console_room()
    }

    /// Serial output since the last call.
    pub fn take_console_output(&mut self) -> Vec<u8> {
        self.bus.take_console_output()
    }

    /// A packet for a network card; false if the guest has no buffer for it, and then it is dropped.
    pub fn net_input(&mut self, card: usize, packet: &[u8]) -> bool {
        self.bus.net_release();
        self.bus.net_input(card, packet)
    }

    /// Keeps a packet for a network card as part of the state of a machine that stands still: RAM does not change before
    /// it runs again. False if there is no room.
    pub fn net_hold(&mut self, card: usize, packet: &[u8]) -> bool {
        self.bus.net_hold(card, packet)
    }

    /// True if packets are kept for the cards.
    pub fn holds_packets(&self) -> bool {
        self.bus.net_holds()
    }

    /// Gives the cards what was kept for them: what [`Machine::run`] and [`Machine::net_input`] begin with.
    pub fn release_packets(&mut self) {
        self.bus.net_release();
    }

    /// Lets nothing out of the network cards, as in a replay of what was sent before; or does again.
    pub fn mute(&mut self, muted: bool) {
        self.bus.mute(muted);
    }

    /// MAC of a network card; zeros if there is no such card.
    pub fn mac(&self, card: usize) -> [u8; 6] {
        self.bus.mac(card).unwrap_or_default()
    }

    /// Plugs the cable of a network card in or pulls it out; an input of the guest like a packet.
    pub fn set_link(&mut self, card: usize, up: bool) {
        self.bus.set_link(card, up);
    }

    /// Begins the next epoch of page and block stamps and returns it.
    ///
    /// # Errors
    /// The engine does not say what the guest wrote; the epoch goes on.
    pub fn advance_epoch(&mut self) -> Result<u32, MachineError> {
        self.engine.settle_stamps().map_err(MachineError::Stamps)?;
        let epoch = self.memory.advance_epoch();
        self.bus.set_epoch(epoch);
        self.engine.rearm_stamps();
        Ok(epoch)
    }

    /// Stamps what the guest has written so far with the running epoch, which goes on.
    ///
    /// # Errors
    /// The engine does not say what the guest wrote.
    pub fn look_at_writes(&mut self) -> Result<(), MachineError> {
        self.engine.look_at_writes().map_err(MachineError::Stamps)
    }

    /// Names an instant: pages and blocks stamped since `mark` are kept as they are now while the guest goes on, until
    /// [`Machine::thaw`]. Returns the epoch that begins: what is stamped with it came later.
    ///
    /// # Errors
    /// The host refused, or the guest writes without its engine knowing; then nothing is kept.
    pub fn freeze(&mut self, mark: u32) -> Result<u32, MachineError> {
        if self.engine.runs_in_real_time() {
            return Err(MachineError::SoftOnly("an instant kept while the guest runs"));
        }
        let epoch = self.advance_epoch()?;
        let frozen = self.keepers().try_for_each(|keeper| keeper.freeze(mark, epoch - 1));
        if frozen.is_err() {
            self.thaw();
        }
        frozen.map(|()| epoch).map_err(MachineError::Freeze)
    }

    /// Keeps nothing any more. False if the instant was lost because a page could not be kept, or there was none.
    pub fn thaw(&mut self) -> bool {
        // Every keeper thaws, whatever the others say.
        let lost = self.keepers().filter(|keeper| !keeper.thaw()).count();
        lost == 0
    }

    /// Bytes of host memory that pages and blocks of a frozen instant take now.
    pub fn kept_bytes(&self) -> u64 {
        self.keepers().map(Keeper::kept_bytes).sum()
    }

    fn keepers(&self) -> impl Iterator<Item = &Keeper> {
        std::iter::once(self.memory.keeper()).chain(self.bus.disk_images().map(DiskImage::keeper))
    }

    /// The VMCB of every vCPU as it is now.
    ///
    /// # Errors
    /// The engine does not give a vCPU's state.
    pub fn vmcbs(&self) -> Result<Vec<Box<[u8; 4096]>>, MachineError> {
        let page = |vcpu| self.engine.vmcb(vcpu).map(|vmcb| build::vmcb_bytes(&vmcb));
        (0..self.bus.vcpus()).map(|vcpu| page(vcpu).map_err(|source| MachineError::Store { vcpu, source })).collect()
    }

    /// RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Requests that the host failed to do in the last run, and of which disk they were, once.
    pub fn take_disk_failures(&mut self) -> Vec<(usize, Failure)> {
        self.bus.take_disk_failures()
    }

    /// A request of a disk is to fail, counted from here on, as it did when this run was recorded. False if there is no such
    /// disk.
    pub fn expect_disk_failure(&mut self, disk: usize, failure: Failure) -> bool {
        self.bus.expect_disk_failure(disk, failure)
    }

    /// The first disk of which requests are to fail that have not come.
    pub fn expects_disk_failures(&self) -> Option<usize> {
        self.bus.expects_disk_failures()
    }

    /// No request is to fail any more but by the host.
    pub fn forget_disk_failures(&mut self) {
        self.bus.set_disk_outcomes(&[]);
    }

    /// Disks, in the order of the configuration.
    pub fn disks(&self) -> impl Iterator<Item = &DiskImage> {
        self.bus.disk_images()
    }
}

#[cfg(test)]
mod tests;

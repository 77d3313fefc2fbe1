//! The real guest: a [`Machine`] built from the opened configuration, and what of it the agent shares.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::v1::{MachineConfig, Section};
use vmcb_engine::cpu::CpuState;
use vmcb_engine::device::block::DiskImage;
use vmcb_engine::device::net::{Link, NetLink};
use vmcb_engine::engine::{Bell, Stops};
use vmcb_engine::machine::{Machine, Outcome, Parts};
use vmcb_engine::memory::{Backing, GuestMemory, PAGE_BYTES, StampTable, sized_memfd};
use vmcb_engine::replay::Door;
use vmcb_engine::snapshot;

use super::Built;
use super::driver::Cable;
use super::faults::Missing;
use super::guest::{Debugged, Guest, Place};
use super::open::{Opened, TapCable};

/// How RAM and disks of a machine begin.
#[derive(Clone, Debug, Default)]
pub struct Beginnings {
    /// What is in them comes from outside.
    pub incoming: bool,
    /// Pages of RAM come while the guest runs.
    pub lazy: bool,
    /// A directory on a tmpfs for RAM; otherwise it has a tmpfs of its own.
    pub ram_dir: Option<PathBuf>,
}

/// Builds the machine of a runner process.
///
/// # Errors
/// What does not fit, in words; a disk's error names its file.
pub fn build(config: &MachineConfig, opened: &Opened, beginnings: &Beginnings) -> Result<Built<Door>, String> {
    let Beginnings { incoming, lazy, ref ram_dir } = *beginnings;
    let backing = match ram_dir {
        // A huge page is there as a whole, and pages that are missing are asked for one by one.
        _ if lazy => Backing::Small,
        Some(directory) => Backing::On(directory),
        None => Backing::Huge,
    };
    let memory = GuestMemory::create_on(backing, config.memory_bytes).map_err(|error| text(&error))?;
    let mut descriptors =
        vec![("ram".to_owned(), share(memory.ram_fd())?), ("ram-stamps".to_owned(), share(memory.stamps_fd())?)];
    // Hardware writes pages without anybody being asked first: no instant can be kept, and who wants one stops the guest.
    let keeps = config.engine != "kvm";
    if keeps {
        descriptors.push(("ram-kept".to_owned(), share(memory.keeper().fd())?));
    }
    let mut disks = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let failed = |why: String| format!("{}: {why}", disk.path);
        let image = DiskImage::open(Path::new(&disk.path), disk.read_only).map_err(|error| failed(text(&error)))?;
        if !disk.shared {
            // The agent fills the disks of a guest that arrives, also those that the guest may not write.
            let data = match incoming && disk.read_only {
                true => std::fs::File::options()
                    .read(true)
                    .write(true)
                    .open(&disk.path)
                    .map(OwnedFd::from)
                    .map_err(|error| failed(error.to_string()))?,
                false => share(image.file_fd())?,
            };
            descriptors.push((format!("disk{index}"), data));
            descriptors.push((format!("disk{index}-stamps"), share(image.stamps_fd())?));
            if keeps {
                descriptors.push((format!("disk{index}-kept"), share(image.keeper().fd())?));
            }
        }
        disks.push(image);
    }
    if let Some(boot) = &opened.boot_image {
        let pages = boot.bytes.div_ceil(PAGE_BYTES);
        let stamps = sized_memfd("boot-stamps", StampTable::file_bytes(pages)).map_err(|error| text(&error))?;
        descriptors.push(("boot".to_owned(), share(boot.file.as_fd())?));
        descriptors.push(("boot-stamps".to_owned(), stamps));
    }
    let missing = lazy.then(|| Missing::watch(memory.mappings())).transpose().map_err(|error| text(&error))?;
    if let Some(missing) = &missing {
        descriptors.push(("faults".to_owned(), missing.faults.share().map_err(|error| error.to_string())?));
    }
    let plug = |card: usize| {
        let tap = opened.taps.iter().find(|(of, _)| *of == card)?;
        let link: NetLink = Box::new(TapCable(Arc::clone(&tap.1)));
        Some(link)
    };
    let nets = (0..config.nets.len()).map(plug).collect();
    let machine = Machine::build(config, Parts { memory, disks, nets }).map_err(|error| text(&error))?;
    let macs = (0..config.nets.len()).map(|card| machine.mac(card)).collect();
    let guest = Door::new(machine);
    Ok(Built { guest, descriptors, macs, state_digest: |sections| snapshot::state_digest(sections).0, missing })
}

fn share(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, String> {
    descriptor.try_clone_to_owned().map_err(|error| error.to_string())
}

fn text(error: &dyn std::error::Error) -> String {
    crate::vm::actor::chain(error)
}

impl Debugged for Door {
    fn read_cpu(&self, vcpu: usize) -> Option<Vec<u8>> {
        self.machine().peek_cpu(vcpu).map(|state| state.to_bytes())
    }

    fn write_cpu(&mut self, vcpu: usize, state: &[u8]) -> Result<(), String> {
        let state = CpuState::from_bytes(state).map_err(|error| text(&error))?;
        Door::write_cpu(self, vcpu, &state).map_err(|error| text(&error))
    }

    fn read_memory(&self, place: Place, into: &mut [u8]) -> usize {
        match place {
            Place::Linear { vcpu, address } => self.machine().read_linear(vcpu, address, into),
            Place::Physical(gpa) => self.machine().read_physical(gpa, into),
        }
    }

    fn write_memory(&mut self, place: Place, bytes: &[u8]) -> Result<(), String> {
        let pieces: Option<Vec<_>> = pieces(self.machine(), place, bytes.len() as u64).collect();
        let pieces = pieces.ok_or_else(|| "not all of it is mapped".to_owned())?;
        let not_ram = |gpa: &u64| self.machine().memory().page_of(*gpa).is_none();
        if let Some(gpa) = pieces.iter().map(|(gpa, _)| *gpa).find(not_ram) {
            return Err(format!("guest-physical {gpa:#x} is not RAM"));
        }
        let mut rest = bytes;
        for (gpa, length) in pieces {
            let (piece, behind) = rest.split_at(length);
            Door::write_memory(self, gpa, piece).map_err(|error| text(&error))?;
            rest = behind;
        }
        Ok(())
    }

    fn set_stops(&mut self, stops: &Stops) {
        self.machine_mut().set_stops(stops);
    }

    fn pass_breakpoints(&mut self) {
        self.machine_mut().pass_breakpoints();
    }

    fn current_vcpu(&self) -> usize {
        self.machine().current_vcpu()
    }

    fn last_ran(&self, vcpu: usize) -> Option<u64> {
        self.machine().last_ran(vcpu)
    }
}

/// Guest-physical address and length of each part of a range that lies in one page; none where nothing is mapped.
fn pieces(machine: &Machine, place: Place, length: u64) -> impl Iterator<Item = Option<(u64, usize)>> {
    let (start, vcpu) = match place {
        Place::Linear { vcpu, address } => (address, Some(vcpu)),
        Place::Physical(gpa) => (gpa, None),
    };
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = length.checked_sub(done).filter(|left| *left > 0)?;
        let Some(at) = start.checked_add(done) else {
            done = length;
            return Some(None);
        };
        let bytes = left.min(PAGE_BYTES - at % PAGE_BYTES);
        done += bytes;
        let gpa = vcpu.map_or(Some(at), |vcpu| machine.translate(vcpu, at));
        Some(gpa.map(|gpa| (gpa, bytes as usize)))
    })
}

impl Link for TapCable {
    fn send(&mut self, packet: &[u8]) {
        Cable::send(self, packet);
    }
}

impl Guest for Door {
    fn door(&self) -> Option<&Door> {
        Some(self)
    }

    fn door_mut(&mut self) -> Option<&mut Door> {
        Some(self)
    }

    fn boot(&mut self, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(), String> {
        Door::boot(self, kernel, initrd).map_err(|error| text(&error))
    }

    fn reset(&mut self, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(), String> {
        Door::reset(self, kernel, initrd).map_err(|error| text(&error))
    }

    fn run(&mut self, until_retired: u64) -> Outcome {
        Door::run(self, until_retired)
    }

    fn skip_idle_until(&mut self, tsc: u64) {
        Door::skip_idle_until(self, tsc);
    }

    fn retired(&self) -> u64 {
        self.machine().retired()
    }

    fn tsc(&self) -> u64 {
        self.machine().tsc()
    }

    fn console_input(&mut self, bytes: &[u8]) -> usize {
        Door::console_input(self, bytes)
    }

    fn console_room(&self) -> usize {
        self.machine().console_room()
    }

    fn take_console_output(&mut self) -> Vec<u8> {
        self.machine_mut().take_console_output()
    }

    fn net_input(&mut self, card: usize, packet: &[u8]) -> bool {
        Door::net_input(self, card, packet)
    }

    fn net_hold(&mut self, card: usize, packet: &[u8]) -> bool {
        Door::net_hold(self, card, packet)
    }

    fn epoch(&self) -> u32 {
        self.machine().memory().epoch()
    }

    fn advance_epoch(&mut self) -> Result<u32, String> {
        self.machine_mut().advance_epoch().map_err(|error| text(&error))
    }

    fn look_at_writes(&mut self) -> Result<(), String> {
        self.machine_mut().look_at_writes().map_err(|error| text(&error))
    }

    fn freeze(&mut self, mark: u32) -> Result<u32, String> {
        self.machine_mut().freeze(mark).map_err(|error| text(&error))
    }

    fn thaw(&mut self) -> bool {
        self.machine_mut().thaw()
    }

    fn kept_bytes(&self) -> u64 {
        self.machine().kept_bytes()
    }

    fn capture(&mut self) -> Result<Vec<Section>, String> {
        Door::capture(self).map_err(|error| text(&error))
    }

    fn apply(&mut self, sections: &[Section]) -> Result<(), String> {
        Door::apply(self, sections).map_err(|error| text(&error))
    }

    fn vmcbs(&self) -> Result<Vec<Box<[u8; 4096]>>, String> {
        self.machine().vmcbs().map_err(|error| text(&error))
    }

    fn prepare(&mut self) -> Result<(), String> {
        self.machine_mut().prepare().map_err(|error| text(&error))
    }

    fn bell(&self) -> Option<Bell> {
        self.machine().bell()
    }

    fn runs_in_real_time(&self) -> bool {
        self.machine().runs_in_real_time()
    }
}

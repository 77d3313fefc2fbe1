//! The real guest: a [`Machine`] built from the opened configuration, and what of it the agent shares.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use proto::v1::{MachineConfig, Section};
use vmcb_engine::device::block::DiskImage;
use vmcb_engine::device::net::{Link, NetLink};
use vmcb_engine::machine::{Machine, Outcome, Parts};
use vmcb_engine::memory::{GuestMemory, PAGE_BYTES, StampTable, sized_memfd};
use vmcb_engine::snapshot;

use super::Built;
use super::driver::Cable;
use super::faults::Missing;
use super::guest::Guest;
use super::open::{Opened, TapCable};

/// Builds the machine of a runner process. `lazy`: pages of RAM come while it runs.
///
/// # Errors
/// What does not fit, in words; a disk's error names its file.
pub fn build(config: &MachineConfig, opened: &Opened, incoming: bool, lazy: bool) -> Result<Built<Machine>, String> {
    let memory = GuestMemory::create(config.memory_bytes).map_err(|error| text(&error))?;
    let mut descriptors = vec![
        ("ram".to_owned(), share(memory.ram_fd())?),
        ("ram-stamps".to_owned(), share(memory.stamps_fd())?),
        ("ram-kept".to_owned(), share(memory.keeper().fd())?),
    ];
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
            descriptors.push((format!("disk{index}-kept"), share(image.keeper().fd())?));
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
    let guest = Machine::build(config, Parts { memory, disks, nets }).map_err(|error| text(&error))?;
    let macs = (0..config.nets.len()).map(|card| guest.mac(card)).collect();
    Ok(Built { guest, descriptors, macs, state_digest: |sections| snapshot::state_digest(sections).0, missing })
}

fn share(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, String> {
    descriptor.try_clone_to_owned().map_err(|error| error.to_string())
}

fn text(error: &dyn std::error::Error) -> String {
    crate::vm::actor::chain(error)
}

impl Link for TapCable {
    fn send(&mut self, packet: &[u8]) {
        Cable::send(self, packet);
    }
}

impl Guest for Machine {
    fn boot(&mut self, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(), String> {
        Machine::boot(self, kernel, initrd).map_err(|error| text(&error))
    }

    fn reset(&mut self, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(), String> {
        Machine::reset(self, kernel, initrd).map_err(|error| text(&error))
    }

    fn run(&mut self, until_retired: u64) -> Outcome {
        Machine::run(self, until_retired)
    }

    fn skip_idle_until(&mut self, tsc: u64) {
        Machine::skip_idle_until(self, tsc);
    }

    fn retired(&self) -> u64 {
        Machine::retired(self)
    }

    fn tsc(&self) -> u64 {
        Machine::tsc(self)
    }

    fn console_input(&mut self, bytes: &[u8]) -> usize {
        Machine::console_input(self, bytes)
    }

    fn console_room(&self) -> usize {
        Machine::console_room(self)
    }

    fn take_console_output(&mut self) -> Vec<u8> {
        Machine::take_console_output(self)
    }

    fn net_input(&mut self, card: usize, packet: &[u8]) -> bool {
        Machine::net_input(self, card, packet)
    }

    fn net_hold(&mut self, card: usize, packet: &[u8]) -> bool {
        Machine::net_hold(self, card, packet)
    }

    fn epoch(&self) -> u32 {
        self.memory().epoch()
    }

    fn advance_epoch(&mut self) -> u32 {
        Machine::advance_epoch(self)
    }

    fn freeze(&mut self, mark: u32) -> Result<u32, String> {
        Machine::freeze(self, mark).map_err(|error| text(&error))
    }

    fn thaw(&mut self) -> bool {
        Machine::thaw(self)
    }

    fn kept_bytes(&self) -> u64 {
        Machine::kept_bytes(self)
    }

    fn capture(&mut self) -> Result<Vec<Section>, String> {
        Machine::capture(self).map_err(|error| text(&error))
    }

    fn apply(&mut self, sections: &[Section]) -> Result<(), String> {
        Machine::apply(self, sections).map_err(|error| text(&error))
    }

    fn vmcbs(&self) -> Vec<Box<[u8; 4096]>> {
        Machine::vmcbs(self)
    }
}

//! A virtual machine of KVM: memory, interrupt routing, MSR filter, dirty log.
//!
//! Writes of the guest are logged from the first reader on, not before: until then pages may be as large as the host has
//! them. What had been written by then counts as written in the epoch that ends, and what RAM holds is a superset of that. RAM
//! that came from elsewhere is watched at once, so that only what changed since is sent again.
//! Pages are protected again when their writes have been read (manual protection), never by the reading itself.

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_IRQ_ROUTING_MSI, KVM_MEM_LOG_DIRTY_PAGES, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::system::KvmError;
use super::{Refusal, ioctl, msr, no_memory, refused};
use crate::capability::CpuModel;
use crate::device::ioapic::PINS;
use crate::device::lapic::{Message, Target};
use crate::memory::shared::{PagesError, SharedPages};
use crate::memory::{GuestMemory, MEMORY_GRANULE_BYTES, PAGE_BYTES};

/// Where messages for local APICs are written (APM2 16.11.2 and the MSI format of the PCI specification).
const MSI_ADDRESS: u32 = 0xfee0_0000;
const MSI_LOGICAL: u32 = 1 << 2;
const MSI_ASSERT: u32 = 1 << 14;
const MSI_LEVEL: u32 = 1 << 15;
/// Pages whose writes are looked for at once: the kernel takes the count of bits as a multiple of 64.
const PAGES_OF_WORD: u64 = 64;

/// A run of RAM as the kernel knows it.
struct Slot {
    region: kvm_userspace_memory_region,
    first_page: u64,
}

/// The machine.
pub(super) struct Vm {
    fd: VmFd,
    slots: Vec<Slot>,
    logging: bool,
}

impl Vm {
    /// A machine with this RAM, for vCPUs of this model.
    pub(super) fn new(kvm: &Kvm, memory: &GuestMemory, model: CpuModel) -> Result<Vm, KvmError> {
        let fd = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
        enable(&fd, KVM_CAP_SPLIT_IRQCHIP, PINS as u64, "KVM_CAP_SPLIT_IRQCHIP")?;
        let reasons = KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN;
        enable(&fd, KVM_CAP_X86_USER_SPACE_MSR, reasons.into(), "KVM_CAP_X86_USER_SPACE_MSR")?;
        let protect = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
        enable(&fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, protect, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")?;
        msr::set_filter(&fd, model)?;
        let slot = |(slot, mapping): (usize, crate::memory::Mapping)| Slot {
            region: kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: memory.gpa_of(mapping.first_page),
                memory_size: mapping.pages * PAGE_BYTES,
                userspace_addr: mapping.address as u64,
            },
            first_page: mapping.first_page,
        };
        let slots = memory.mappings().into_iter().enumerate().map(slot).collect();
        let vm = Vm { fd, slots, logging: false };
        vm.set_memory(0)?;
        Ok(vm)
    }

    fn set_memory(&self, flags: u32) -> Result<(), Refusal> {
        for slot in &self.slots {
            let region = kvm_userspace_memory_region { flags, ..slot.region };
            // SAFETY: the mapping lives as long as the guest memory, which the engine holds beside this VM.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(refused("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Whether guests' TSCs run at rates of their own.
    pub(super) fn scales_tsc(&self) -> bool {
        self.fd.check_extension(Cap::TscControl)
    }

    /// A new vCPU, not yet set up.
    pub(super) fn create_vcpu(&self, vcpu: u32) -> Result<VcpuFd, Refusal> {
        self.fd.create_vcpu(vcpu.into()).map_err(refused("KVM_CREATE_VCPU"))
    }

    /// Writes of the guest are logged from now on.
    pub(super) fn watch_writes(&mut self) -> Result<(), Refusal> {
        if !self.logging {
            self.set_memory(KVM_MEM_LOG_DIRTY_PAGES)?;
            self.logging = true;
        }
        Ok(())
    }

    /// Stamps what the guest has written since it was asked last, and watches for the next writes. No vCPU runs.
    pub(super) fn settle_stamps(&mut self, memory: &GuestMemory) -> Result<(), Refusal> {
        if !self.logging {
            self.watch_writes()?;
            return stamp_all(memory);
        }
        for slot in &self.slots {
            let mut bitmap = self.stamp(slot, memory)?;
            clear(&self.fd, slot, &mut bitmap)?;
        }
        Ok(())
    }

    /// Stamps what the guest has written since, without watching anew: its next writes to these pages cost it nothing.
    pub(super) fn look_at_writes(&self, memory: &GuestMemory) -> Result<(), Refusal> {
        self.slots.iter().filter(|_| self.logging).try_for_each(|slot| self.stamp(slot, memory).map(drop))
    }

    /// Stamps what the log of a slot holds, and returns that.
    fn stamp(&self, slot: &Slot, memory: &GuestMemory) -> Result<Vec<u64>, Refusal> {
        let bytes = slot.region.memory_size as usize;
        let bitmap = self.fd.get_dirty_log(slot.region.slot, bytes).map_err(refused("KVM_GET_DIRTY_LOG"))?;
        for (word, bits) in (0..).zip(&bitmap).filter(|(_, bits)| **bits != 0) {
            let first = word * PAGES_OF_WORD;
            let pages = (0..PAGES_OF_WORD).filter(|page| *bits >> page & 1 == 1);
            pages.for_each(|page| memory.stamps().mark(slot.first_page + first + page));
        }
        Ok(bitmap)
    }

    /// Brings a message to the local APICs it is for.
    pub(super) fn signal(&self, message: Message) -> Result<(), Refusal> {
        let (address_lo, data) = msi(message);
        let message = kvm_msi { address_lo, data, ..kvm_msi::default() };
        // A message that nobody accepts is lost, as on the bus.
        self.fd.signal_msi(message).map(drop).map_err(refused("KVM_SIGNAL_MSI"))
    }

    /// Which level-triggered messages end with a word to the IOAPIC (KVM API 5, KVM_EXIT_IOAPIC_EOI).
    pub(super) fn await_ends(&self, messages: &[Message]) -> Result<(), Refusal> {
        let entry = |(pin, message): (u32, &Message)| {
            let mut entry = kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            let (address_lo, data) = msi(*message);
            entry.u.msi.address_lo = address_lo;
            entry.u.msi.data = data;
            entry
        };
        let entries: Vec<_> = (0..PINS as u32).zip(messages).map(entry).collect();
        let routing = KvmIrqRouting::from_entries(&entries);
        let routing = routing.map_err(|_| no_memory("interrupt routes"))?;
        self.fd.set_gsi_routing(&routing).map_err(refused("KVM_SET_GSI_ROUTING"))
    }
}

/// Protects the pages again whose writes were read. RAM comes in whole words of pages ([`MEMORY_GRANULE_BYTES`]).
fn clear(fd: &VmFd, slot: &Slot, bitmap: &mut [u64]) -> Result<(), Refusal> {
    if bitmap.iter().all(|bits| *bits == 0) {
        return Ok(());
    }
    const { assert!(MEMORY_GRANULE_BYTES.is_multiple_of(PAGES_OF_WORD * PAGE_BYTES)) };
    ioctl::clear_dirty_log(fd, slot.region.slot, bitmap).map_err(refused("KVM_CLEAR_DIRTY_LOG"))
}

/// Stamps every page that holds anything.
fn stamp_all(memory: &GuestMemory) -> Result<(), Refusal> {
    let failed = |error: PagesError| refused("look for pages that were written")(std::io::Error::other(error).into());
    let pages = SharedPages::of(memory.ram_fd(), memory.stamps_fd(), memory.bytes()).map_err(failed)?;
    for run in pages.filled(pages.whole()).map_err(failed)? {
        (run.first..run.end()).for_each(|page| memory.stamps().mark(page));
    }
    Ok(())
}

fn enable(fd: &VmFd, cap: u32, argument: u64, step: &'static str) -> Result<(), Refusal> {
    let cap = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..kvm_enable_cap::default() };
    fd.enable_cap(&cap).map_err(refused(step))
}

/// Address and data of a message from the IOAPIC. Its targets are physical or logical; the others are between local APICs.
fn msi(message: Message) -> (u32, u32) {
    let Message { vector, delivery, target, level } = message;
    let (id, logical) = match target {
        Target::Physical(id) => (id, 0),
        Target::Logical(id) => (id, MSI_LOGICAL),
        Target::Own | Target::All | Target::Others => (0xff, 0),
    };
    let trigger = if level { MSI_LEVEL | MSI_ASSERT } else { 0 };
    (MSI_ADDRESS | (id & 0xff) << 12 | logical, u32::from(vector) | u32::from(delivery) << 8 | trigger)
}

//! The bus: the only place that knows at which port or address a device sits, which line it pulls, and which vCPU a
//! message reaches. What nobody claims reads as all ones.
//!
//! ```text
//! ports   0x070-0x071 CMOS clock    0x3f8-0x3ff serial (line 4)    0x600-0x602 sleep control, sleep status, reset
//!         0x064, 0xcf9 (writes): reset as the PC's keyboard controller and chipset do it
//! line 3: events that the guest is told by ACPI
//! memory  0xd000_0000 + n * 4 KiB   virtio window n (line 5 + n): disks, network cards, entropy
//!         0xfec0_0000               IOAPIC
//!         APIC_BASE                 local APIC of the vCPU that looks
//! ```
//! This file refuses to know what registers mean, and engines.

mod outgoing;
mod saved;

use outgoing::Outgoing;
pub use saved::{RestoreError, SECTION_VERSION, Take};

use std::sync::Arc;

use super::block::DiskImage;
use super::ioapic::{Ioapic, PINS};
use super::kvm_clock::KvmClock;
use super::lapic::{Action, Lapic, Message, Request, delivery};
use super::net::NetLink;
use super::power::{Power, RESET_VALUE, Stop};
use super::rtc::{Epoch, Rtc};
use super::uart::Uart;
use super::virtio::block::{Block, Failure, Outcomes};
use super::virtio::mmio::{Mmio, WINDOW_BYTES};
use super::virtio::net::Net;
use super::virtio::rng::Rng;
use crate::memory::GuestMemory;

/// First port of the serial port, and how many.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Line of the serial port.
pub const SERIAL_LINE: u32 = 4;
/// First of the two ports of the CMOS clock.
pub const RTC_PORT: u16 = 0x70;
/// Sleep control register (hardware-reduced ACPI).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// Reset register.
pub const RESET_PORT: u16 = 0x602;
/// Command port of the PC's keyboard controller; the reset pulse is all there is of it.
const KEYBOARD_PORT: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
/// Reset control register of PC chipsets: written with this bit it resets.
const CHIPSET_RESET_PORT: u16 = 0xcf9;
const CHIPSET_RESET: u8 = 1 << 2;
/// Line of the generic event device: edge triggered.
pub const EVENT_LINE: u32 = 3;
/// First virtio window.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Line of the first virtio device; the others follow.
pub const VIRTIO_LINE: u32 = 5;
/// IOAPIC registers.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Where local APICs are after reset.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Most vCPUs: xAPIC ids and the tables stay simple.
pub const VCPUS_MAX: usize = 32;
/// Most virtio devices besides the entropy device: one line each.
pub const CARDS_MAX: usize = PINS - VIRTIO_LINE as usize - 1;

const APIC_BASE_MSR: u32 = 0x1b;
const TSC_DEADLINE_MSR: u32 = 0x6e0;
const X2APIC_MSR: u32 = 0x800;
const X2APIC_MSR_LAST: u32 = 0x8ff;

/// Where a virtio device sits, for the tables that tell the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length.
    pub bytes: u64,
    /// Line of the IOAPIC, level triggered.
    pub line: u32,
}

/// What devices are made of.
pub struct Fitting {
    /// vCPUs: 1 to [`VCPUS_MAX`].
    pub vcpus: usize,
    /// Seed of the entropy device.
    pub seed: [u8; 32],
    /// Unix nanoseconds at TSC 0.
    pub epoch_ns: u64,
    /// TSC ticks per second.
    pub tsc_hz: u64,
    /// Disks, in order.
    pub disks: Vec<DiskImage>,
    /// Network cards, in order.
    pub nets: Vec<([u8; 6], Option<NetLink>)>,
}

/// All devices of a machine.
#[derive(Debug)]
pub struct Bus {
    memory: Arc<GuestMemory>,
    lapics: Vec<Lapic>,
    ioapic: Ioapic,
    uart: Uart,
    rtc: Rtc,
    kvm_clock: KvmClock,
    power: Power,
    disks: Vec<Mmio<Block>>,
    nets: Vec<Mmio<Net>>,
    rng: Mmio<Rng>,
    /// The vCPU that executes now; chosen by the engine, no state.
    vcpu: usize,
    /// Where messages go while local APICs are the engine's.
    outgoing: Option<Outgoing>,
}

/// Which device a window belongs to.
enum Slot {
    Disk(usize),
    Net(usize),
    Rng,
}

/// Calls a method on the device of a slot.
macro_rules! on_slot {
    ($bus:expr, $slot:expr, $device:ident => $call:expr) => {
        match $slot {
            Slot::Disk(n) => {
                let $device = &mut $bus.disks[n];
                $call
            }
            Slot::Net(n) => {
                let $device = &mut $bus.nets[n];
                $call
            }
            Slot::Rng => {
                let $device = &mut $bus.rng;
                $call
            }
        }
    };
}

impl Bus {
    /// Devices after power-up.
    ///
    /// # Panics
    /// If there are more vCPUs or cards than there are places.
    pub fn new(memory: Arc<GuestMemory>, fitting: Fitting) -> Self {
        let Fitting { vcpus, seed, epoch_ns, tsc_hz, disks, nets } = fitting;
        assert!((1..=VCPUS_MAX).contains(&vcpus) && disks.len() + nets.len() <= CARDS_MAX);
        let disks =
            disks.into_iter().enumerate().map(|(n, image)| Mmio::new(Block::new(image, &format!("godwit-{n}"))));
        Self {
            memory,
            lapics: (0..vcpus).map(Lapic::new).collect(),
            ioapic: Ioapic::default(),
            uart: Uart::new(),
            rtc: Rtc::new(Epoch { epoch_ns, tsc_hz }),
            kvm_clock: KvmClock::new(epoch_ns, tsc_hz, vcpus),
            power: Power::default(),
            disks: disks.collect(),
            nets: nets.into_iter().map(|(mac, link)| Mmio::new(Net::new(mac, link))).collect(),
            rng: Mmio::new(Rng::new(&seed)),
            vcpu: 0,
            outgoing: None,
        }
    }

    /// How many vCPUs.
    pub fn vcpus(&self) -> usize {
        self.lapics.len()
    }

    /// Windows of the virtio devices, in order.
    pub fn windows(&self) -> Vec<Window> {
        let count = self.disks.len() + self.nets.len() + 1;
        (0..count as u32)
            .map(|n| Window {
                gpa: VIRTIO_BASE + u64::from(n) * WINDOW_BYTES,
                bytes: WINDOW_BYTES,
                line: VIRTIO_LINE + n,
            })
            .collect()
    }

    fn slot(&self, index: usize) -> Option<Slot> {
        let (disks, nets) = (self.disks.len(), self.nets.len());
        match index {
            _ if index < disks => Some(Slot::Disk(index)),
            _ if index < disks + nets => Some(Slot::Net(index - disks)),
            _ if index == disks + nets => Some(Slot::Rng),
            _ => None,
        }
    }

    /// All devices as after a reset of the machine. What has a battery or lies beyond the machine stays: the clock's
    /// settings, disks, cables, the entropy's position, what was typed.
    pub fn reset(&mut self) {
        let Bus { memory: _, lapics, ioapic, uart, rtc: _, kvm_clock, power, disks, nets, rng, vcpu, outgoing } = self;
        *lapics = (0..lapics.len()).map(Lapic::new).collect();
        *ioapic = Ioapic::default();
        uart.reset();
        kvm_clock.reset();
        *power = Power::default();
        disks.iter_mut().for_each(Mmio::reset);
        nets.iter_mut().for_each(Mmio::reset);
        rng.reset();
        *vcpu = 0;
        outgoing.iter_mut().for_each(Outgoing::renew);
    }

    /// The engine executes this vCPU from now on.
    pub fn set_vcpu(&mut self, vcpu: usize) {
        self.vcpu = vcpu;
    }

    /// The vCPU that the engine executes.
    pub fn vcpu(&self) -> usize {
        self.vcpu
    }

    /// IN.
    pub fn io_read(&mut self, tsc: u64, port: u16, size: u8) -> u32 {
        let mut value = 0;
        for n in 0..size.min(4) {
            value |= u32::from(self.read_port(tsc, port.wrapping_add(n.into()))) << (8 * n);
        }
        value
    }

    fn read_port(&mut self, tsc: u64, port: u16) -> u8 {
        match port {
            0x3f8..=0x3ff => {
                let value = self.uart.read(port - SERIAL_PORT);
                self.drive(SERIAL_LINE as usize, self.uart.interrupt());
                value
            }
            // The index register cannot be read in the PC either.
            0x71 => self.rtc.read(tsc),
            SLEEP_CONTROL_PORT => self.power.sleep_control(),
            SLEEP_STATUS_PORT | RESET_PORT => 0,
            _ => 0xff,
        }
    }

    /// OUT.
    pub fn io_write(&mut self, tsc: u64, port: u16, size: u8, value: u32) {
        // A byte of its own: it lies inside of PCI's configuration address, which guests write in words.
        if (port, size) == (CHIPSET_RESET_PORT, 1) && value as u8 & CHIPSET_RESET != 0 {
            return self.power.reset(RESET_VALUE);
        }
        for n in 0..size.min(4) {
            self.write_port(tsc, port.wrapping_add(n.into()), (value >> (8 * n)) as u8);
        }
    }

    fn write_port(&mut self, tsc: u64, port: u16, value: u8) {
        match port {
            0x3f8..=0x3ff => {
                self.uart.write(port - SERIAL_PORT, value);
                self.drive(SERIAL_LINE as usize, self.uart.interrupt());
            }
            0x70 => self.rtc.select(value),
            0x71 => self.rtc.write(tsc, value),
            SLEEP_CONTROL_PORT => self.power.set_sleep_control(value),
            RESET_PORT => self.power.reset(value),
            KEYBOARD_PORT if value == KEYBOARD_RESET => self.power.reset(RESET_VALUE),
            _ => {}
        }
    }

    /// Load from an address that is not RAM.
    pub fn mmio_read(&mut self, tsc: u64, gpa: u64, size: u8) -> u64 {
        let ones = if size >= 8 { u64::MAX } else { (1 << (8 * size)) - 1 };
        let (page, offset) = (gpa & !0xfff, gpa & 0xfff);
        if self.lapic_page() == Some(page) {
            // Parts of a register show; loads across one do not exist in the chip.
            let shift = 8 * (offset & 3);
            let word = self.lapics[self.vcpu].read_page(tsc, offset as u16 & !3);
            return u64::from(word) >> shift & ones;
        }
        if page == IOAPIC_BASE {
            return u64::from(self.ioapic.read(offset as u16));
        }
        match self.window_of(gpa) {
            Some((slot, _, offset)) => on_slot!(self, slot, device => device.read(offset, size)) & ones,
            None => ones,
        }
    }

    /// Store to an address that is not RAM.
    pub fn mmio_write(&mut self, tsc: u64, gpa: u64, size: u8, value: u64) {
        let (page, offset) = (gpa & !0xfff, gpa & 0xfff);
        if self.lapic_page() == Some(page) {
            if size >= 4 {
                let action = self.lapics[self.vcpu].write_page(tsc, offset as u16, value as u32);
                self.act(self.vcpu, action);
            }
        } else if page == IOAPIC_BASE {
            self.ioapic.write(offset as u16, value as u32);
            self.outgoing.iter_mut().for_each(Outgoing::pins_changed);
            self.settle();
        } else if let Some((slot, line, offset)) = self.window_of(gpa) {
            let memory = Arc::clone(&self.memory);
            let interrupt = on_slot!(self, slot, device => {
                device.write(&memory, offset, size, value);
                device.interrupt()
            });
            self.drive(line, interrupt);
        }
    }

    /// Where the vCPU that executes sees its local APIC's registers. An engine with local APICs of its own answers there itself.
    fn lapic_page(&self) -> Option<u64> {
        self.lapics[self.vcpu].page().filter(|_| self.outgoing.is_none())
    }

    /// Slot, line and offset of an address in a virtio window.
    fn window_of(&self, gpa: u64) -> Option<(Slot, usize, u64)> {
        let distance = gpa.checked_sub(VIRTIO_BASE)?;
        let index = usize::try_from(distance / WINDOW_BYTES).ok()?;
        let slot = self.slot(index)?;
        Some((slot, VIRTIO_LINE as usize + index, distance % WINDOW_BYTES))
    }

    /// RDMSR; `None` is #GP(0).
    pub fn msr_read(&mut self, tsc: u64, vcpu: usize, msr: u32) -> Option<u64> {
        let lapic = &mut self.lapics[vcpu];
        match msr {
            APIC_BASE_MSR => Some(lapic.base()),
            TSC_DEADLINE_MSR => Some(lapic.tsc_deadline()),
            X2APIC_MSR..=X2APIC_MSR_LAST => lapic.read_msr(tsc, msr - X2APIC_MSR),
            _ => self.kvm_clock.read(vcpu, msr),
        }
    }

    /// WRMSR; `None` is #GP(0).
    pub fn msr_write(&mut self, tsc: u64, vcpu: usize, msr: u32, value: u64) -> Option<()> {
        let lapic = &mut self.lapics[vcpu];
        match msr {
            APIC_BASE_MSR => lapic.set_base(value),
            TSC_DEADLINE_MSR => {
                lapic.set_tsc_deadline(tsc, value);
                Some(())
            }
            X2APIC_MSR..=X2APIC_MSR_LAST => {
                let action = lapic.write_msr(tsc, msr - X2APIC_MSR, value)?;
                self.act(vcpu, action);
                Some(())
            }
            _ => self.kvm_clock.write(&self.memory, tsc, vcpu, msr, value),
        }
    }

    fn act(&mut self, vcpu: usize, action: Action) {
        match action {
            Action::None => {}
            Action::EndOfInterrupt(vector) => {
                self.ioapic.end_of_interrupt(vector);
                self.settle();
            }
            Action::Send(message) => {
                self.deliver(message, Some(vcpu as u32));
            }
        }
    }

    /// Brings a message to the local APICs it is for; true if one accepted it.
    fn deliver(&mut self, message: Message, sender: Option<u32>) -> bool {
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.push(message);
            return true;
        }
        let targets = self.lapics.iter_mut().filter(|lapic| lapic.is_target(message.target, sender));
        if message.delivery == delivery::LOWEST {
            // The first of equals, so that it does not depend on history.
            return targets.min_by_key(|lapic| lapic.arbitration()).is_some_and(|lapic| lapic.accept(message));
        }
        targets.fold(false, |accepted, lapic| lapic.accept(message) | accepted)
    }

    fn drive(&mut self, line: usize, asserted: bool) {
        if let Some(edge) = self.ioapic.set_line(line, asserted) {
            self.deliver(edge, None);
        }
        self.settle_pin(line);
    }

    fn settle(&mut self) {
        (0..PINS).for_each(|pin| self.settle_pin(pin));
    }

    fn settle_pin(&mut self, pin: usize) {
        if let Some(message) = self.ioapic.level_message(pin)
            && self.deliver(message, None)
        {
            self.ioapic.accepted(pin);
        }
    }

    /// Lets time-driven devices act.
    pub fn tick(&mut self, tsc: u64) {
        self.lapics.iter_mut().for_each(|lapic| lapic.tick(tsc));
    }

    /// TSC at which [`Bus::tick`] must be called next.
    #[inline]
    pub fn next_deadline(&self) -> Option<u64> {
        self.lapics.iter().filter_map(Lapic::deadline).min()
    }

    /// The vector that may interrupt a vCPU now.
    #[inline]
    pub fn pending_interrupt(&self, vcpu: usize) -> Option<u8> {
        self.lapics[vcpu].pending()
    }

    /// A vCPU took a vector.
    pub fn acknowledge(&mut self, vcpu: usize, vector: u8) {
        self.lapics[vcpu].acknowledge(vector);
    }

    /// What a vCPU is asked to do apart from interrupts.
    pub fn take_request(&mut self, vcpu: usize) -> Option<Request> {
        self.lapics[vcpu].take_request()
    }

    /// True if [`Bus::take_request`] would say something.
    pub fn has_request(&self, vcpu: usize) -> bool {
        self.lapics[vcpu].has_request()
    }

    /// CR8.
    pub fn cr8(&self, vcpu: usize) -> u8 {
        self.lapics[vcpu].cr8()
    }

    /// MOV to CR8.
    pub fn set_cr8(&mut self, vcpu: usize, value: u8) {
        self.lapics[vcpu].set_cr8(value);
    }

    /// What the guest asked for: off or reset.
    pub fn stopped(&self) -> Option<Stop> {
        self.power.stopped()
    }

    /// Serial input; returns how many bytes fit.
    pub fn console_input(&mut self, bytes: &[u8]) -> usize {
        let fit = self.uart.input(bytes);
        self.drive(SERIAL_LINE as usize, self.uart.interrupt());
        fit
    }

    /// How many bytes of serial input fit now.
    pub fn console_room(&self) -> usize {
        self.uart.input_room()
    }

    /// Serial output since the last call.
    pub fn take_console_output(&mut self) -> Vec<u8> {
        self.uart.take_output()
    }

    /// Whether there is any.
    pub fn has_console_output(&self) -> bool {
        self.uart.has_output()
    }

    /// A packet for a network card; false if the guest has no buffer for it.
    pub fn net_input(&mut self, card: usize, packet: &[u8]) -> bool {
        let Some(net) = self.nets.get_mut(card) else { return false };
        let taken = net.input(&self.memory, packet);
        let interrupt = net.interrupt();
        self.drive(VIRTIO_LINE as usize + self.disks.len() + card, interrupt);
        taken
    }

    /// Keeps a packet for a network card of a machine that stands still; false if there is no room.
    pub fn net_hold(&mut self, card: usize, packet: &[u8]) -> bool {
        self.nets.get_mut(card).is_some_and(|net| net.hold(packet))
    }

    /// True if [`Bus::net_release`] would do something.
    pub fn net_holds(&self) -> bool {
        self.nets.iter().any(Mmio::holds)
    }

    /// The machine goes on: the guest gets what was kept for it.
    pub fn net_release(&mut self) {
        for card in 0..self.nets.len() {
            if self.nets[card].holds() {
                self.nets[card].release(&self.memory);
                let interrupt = self.nets[card].interrupt();
                self.drive(VIRTIO_LINE as usize + self.disks.len() + card, interrupt);
            }
        }
    }

    /// Plugs the cable of a network card in or pulls it out.
    pub fn set_link(&mut self, card: usize, up: bool) {
        let Some(net) = self.nets.get_mut(card) else { return };
        net.set_link(up);
        let interrupt = net.interrupt();
        self.drive(VIRTIO_LINE as usize + self.disks.len() + card, interrupt);
    }

    /// Lets nothing out of the network cards, or does again.
    pub fn mute(&mut self, muted: bool) {
        self.nets.iter_mut().for_each(|net| net.device_mut().mute(muted));
    }

    /// MAC of a network card.
    pub fn mac(&self, card: usize) -> Option<[u8; 6]> {
        self.nets.get(card).map(|net| net.device().mac())
    }

    /// Images of the disks, in order.
    pub fn disk_images(&self) -> impl Iterator<Item = &DiskImage> {
        self.disks.iter().map(|disk| disk.device().image())
    }

    /// The machine is about to run: requests of the disks are counted from here on.
    pub fn count_disk_requests(&mut self) {
        self.disks.iter_mut().for_each(|disk| disk.device_mut().count_requests());
    }

    /// What the host failed to do for a disk since requests are counted, once: disk and request.
    pub fn take_disk_failures(&mut self) -> Vec<(usize, Failure)> {
        let disks = self.disks.iter_mut().enumerate();
        disks.flat_map(|(n, disk)| disk.device_mut().take_failures().into_iter().map(move |it| (n, it))).collect()
    }

    /// Requests of a disk are counted from here on, and this one is to fail. False if there is no such disk.
    pub fn expect_disk_failure(&mut self, disk: usize, failure: Failure) -> bool {
        let disk = self.disks.get_mut(disk);
        disk.map(|disk| disk.device_mut().expect_failure(failure)).is_some()
    }

    /// The first disk of which requests are to fail that have not come.
    pub fn expects_disk_failures(&self) -> Option<usize> {
        self.disks.iter().position(|disk| disk.device().expects_failures())
    }

    /// How requests of the disks end, to go back to.
    pub fn disk_outcomes(&self) -> Vec<Outcomes> {
        self.disks.iter().map(|disk| disk.device().outcomes().clone()).collect()
    }

    /// The same again; disks of which nothing is said end theirs as the host does.
    pub fn set_disk_outcomes(&mut self, outcomes: &[Outcomes]) {
        for (n, disk) in self.disks.iter_mut().enumerate() {
            disk.device_mut().set_outcomes(outcomes.get(n).cloned().unwrap_or_default());
        }
    }

    /// Tells the guest that its generation ID has changed.
    pub fn tell_generation(&mut self) {
        self.drive(EVENT_LINE as usize, true);
        self.drive(EVENT_LINE as usize, false);
    }

    /// Blocks written from now on are stamped with this epoch.
    pub fn set_epoch(&mut self, epoch: u32) {
        self.disks.iter_mut().for_each(|disk| disk.device_mut().image_mut().set_epoch(epoch));
    }
}

#[cfg(test)]
mod tests;

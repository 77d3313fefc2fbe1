//! Sections of the devices: which there are is what the configuration says; each is one message of device.proto.

use prost::Message;
use proto::v1::{
    IoapicV1, KvmClockV1, LapicV1, PowerV1, RtcV1, Section, UartV1, VirtioBlkV1, VirtioNetV1, VirtioRngV1,
};

use super::{Bus, SERIAL_LINE, VIRTIO_LINE};
use crate::device::Unfit;
use crate::device::ioapic::Ioapic;
use crate::device::lapic::Lapic;
use crate::device::power::Power;
use crate::device::rtc::Rtc;
use crate::device::uart::Uart;

/// Newest version of a device section that this release knows. 1.1 added what waits for the guest to the serial port and to
/// network cards; a section in which nothing waits is written as 1.0.
pub const SECTION_VERSION: (u32, u32) = (1, 1);

/// Why a section makes no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// It does not decode.
    #[error("section {name:?} does not decode")]
    NotAMessage {
        /// The section.
        name: String,
        /// The decoder's words.
        #[source]
        source: prost::DecodeError,
    },
    /// A field holds what it cannot.
    #[error("section {name:?}: {source}")]
    Unfit {
        /// The section.
        name: String,
        /// Which field, and why.
        source: Unfit,
    },
}

fn section(name: String, message: &impl Message) -> Section {
    section_with(name, message, false)
}

fn section_with(name: String, message: &impl Message, waiting: bool) -> Section {
    let minor = waiting.into();
    Section { name, major: SECTION_VERSION.0, minor, ignorable: false, body: message.encode_to_vec() }
}

/// Gives the body of a section by name.
pub type Take<'a, E> = &'a mut dyn FnMut(&str) -> Result<Vec<u8>, E>;

fn read<M: Message + Default, E: From<RestoreError>>(name: &str, take: Take<'_, E>) -> Result<M, E> {
    let body = take(name)?;
    M::decode(body.as_slice()).map_err(|source| RestoreError::NotAMessage { name: name.to_owned(), source }.into())
}

fn unfit(name: &str) -> impl Fn(Unfit) -> RestoreError {
    move |source| RestoreError::Unfit { name: name.to_owned(), source }
}

impl Bus {
    /// The sections of all devices.
    pub fn save(&self) -> Vec<Section> {
        let Bus { memory: _, lapics, ioapic, uart, rtc, kvm_clock, power, disks, nets, rng, vcpu: _, outgoing: _ } =
            self;
        let mut sections = Vec::new();
        for (n, lapic) in lapics.iter().enumerate() {
            sections.push(section(format!("device/lapic{n}"), &lapic.save()));
        }
        sections.push(section("device/ioapic".into(), &ioapic.save()));
        let uart = uart.save();
        sections.push(section_with("device/uart0".into(), &uart, !uart.waiting.is_empty()));
        sections.push(section("device/rtc".into(), &rtc.save()));
        sections.push(section("device/kvm-clock".into(), &kvm_clock.save()));
        sections.push(section("device/power".into(), &power.save()));
        for (n, disk) in disks.iter().enumerate() {
            sections.push(section(format!("device/virtio-blk{n}"), &disk.save()));
        }
        for (n, net) in nets.iter().enumerate() {
            sections.push(section_with(format!("device/virtio-net{n}"), &net.save(), net.holds()));
        }
        sections.push(section("device/virtio-rng".into(), &rng.save()));
        sections
    }

    /// Names of the sections that this configuration has.
    pub fn section_names(&self) -> Vec<String> {
        self.save().into_iter().map(|section| section.name).collect()
    }

    /// Puts all devices into a saved state. `take` consumes a section by name; each that this configuration has is asked
    /// for exactly once. After an error the devices are of no use.
    ///
    /// # Errors
    /// Whatever `take` says, or a section that makes no device.
    pub fn restore<E: From<RestoreError>>(&mut self, take: Take<'_, E>) -> Result<(), E> {
        for n in 0..self.lapics.len() {
            let name = format!("device/lapic{n}");
            let saved: LapicV1 = read(&name, take)?;
            self.lapics[n] = Lapic::restore(n, &saved).map_err(unfit(&name))?;
        }
        let ioapic: IoapicV1 = read("device/ioapic", take)?;
        self.ioapic = Ioapic::restore(&ioapic).map_err(unfit("device/ioapic"))?;
        let uart: UartV1 = read("device/uart0", take)?;
        self.uart = Uart::restore(&uart).map_err(unfit("device/uart0"))?;
        let rtc: RtcV1 = read("device/rtc", take)?;
        self.rtc = Rtc::restore(self.rtc.epoch(), &rtc).map_err(unfit("device/rtc"))?;
        let kvm_clock: KvmClockV1 = read("device/kvm-clock", take)?;
        self.kvm_clock = self.kvm_clock.restore(&kvm_clock).map_err(unfit("device/kvm-clock"))?;
        let power: PowerV1 = read("device/power", take)?;
        self.power = Power::restore(&power).map_err(unfit("device/power"))?;
        for (n, disk) in self.disks.iter_mut().enumerate() {
            let name = format!("device/virtio-blk{n}");
            let saved: VirtioBlkV1 = read(&name, take)?;
            disk.restore(&saved, &self.memory).map_err(unfit(&name))?;
        }
        for (n, net) in self.nets.iter_mut().enumerate() {
            let name = format!("device/virtio-net{n}");
            let saved: VirtioNetV1 = read(&name, take)?;
            net.restore(&saved, &self.memory).map_err(unfit(&name))?;
        }
        let rng: VirtioRngV1 = read("device/virtio-rng", take)?;
        self.rng.restore(&rng, &self.memory).map_err(unfit("device/virtio-rng"))?;
        self.check_lines(ioapic.lines).map_err(unfit("device/ioapic"))?;
        self.outgoing.iter_mut().for_each(super::Outgoing::renew);
        Ok(())
    }

    /// Lines are as the devices drive them; anything else is a state that no machine was ever in.
    fn check_lines(&self, lines: u32) -> Result<(), Unfit> {
        let virtio = self.disks.iter().map(|disk| disk.interrupt());
        let virtio = virtio.chain(self.nets.iter().map(|net| net.interrupt())).chain([self.rng.interrupt()]);
        let mut driven = u32::from(self.uart.interrupt()) << SERIAL_LINE;
        for (n, asserted) in virtio.enumerate() {
            driven |= u32::from(asserted) << (VIRTIO_LINE + n as u32);
        }
        Unfit::check(lines == driven, "lines", lines, "as the devices drive them")
    }
}

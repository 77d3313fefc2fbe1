//! The IOAPIC: 24 pins between device lines and local APICs (Intel 82093AA, with the EOI register of version 0x20).
//!
//! A line is asserted or not; which address or port pulled it is unknown here, and so is who accepts the message that
//! comes out. Polarity bits are kept for the guest but a line that is asserted is asserted. Edges on a masked pin are
//! lost, as in the chip.

use super::lapic::{Message, Target, delivery};
use super::{Unfit, narrow};

/// Pins.
pub const PINS: usize = 24;
const VERSION: u32 = 0x20;
const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const LOGICAL: u64 = 1 << 11;
/// What the guest can write: not delivery status (12) and remote IRR (14).
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Register numbers behind the select register.
mod reg {
    pub const ID: u32 = 0x00;
    pub const VERSION: u32 = 0x01;
    pub const ARBITRATION: u32 = 0x02;
    pub const PINS: u32 = 0x10;
    pub const PINS_LAST: u32 = 0x3f;
}

/// The interrupt controller that devices are wired to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ioapic {
    id: u32,
    select: u32,
    pins: [u64; PINS],
    lines: u32,
}

impl Default for Ioapic {
    fn default() -> Self {
        Self { id: 0, select: 0, pins: [MASKED; PINS], lines: 0 }
    }
}

impl Ioapic {
    /// Reads a register of the window: 0x00 select, 0x10 data.
    pub fn read(&self, offset: u16) -> u32 {
        match (offset, self.select) {
            (0x00, _) => self.select,
            (0x10, reg::ID | reg::ARBITRATION) => self.id << 24,
            (0x10, reg::VERSION) => (PINS as u32 - 1) << 16 | VERSION,
            (0x10, reg::PINS..=reg::PINS_LAST) => {
                let (pin, high) = self.selected();
                (self.pins[pin] >> (32 * high)) as u32
            }
            _ => 0,
        }
    }

    fn selected(&self) -> (usize, u32) {
        let index = self.select - reg::PINS;
        (index as usize / 2, index & 1)
    }

    /// Writes a register of the window: 0x00 select, 0x10 data, 0x40 EOI. Afterwards the bus asks every pin for
    /// its [`Ioapic::message`].
    pub fn write(&mut self, offset: u16, value: u32) {
        match (offset, self.select) {
            (0x00, _) => self.select = value & 0xff,
            (0x10, reg::ID) => self.id = value >> 24 & 15,
            (0x10, reg::PINS..=reg::PINS_LAST) => {
                let (pin, high) = self.selected();
                self.write_half(pin, high, value);
            }
            (0x40, _) => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }

    fn write_half(&mut self, pin: usize, high: u32, value: u32) {
        let half = 0xffff_ffff << (32 * high);
        let writable = WRITABLE & half;
        let mut entry = self.pins[pin] & !writable | u64::from(value) << (32 * high) & writable;
        if entry & LEVEL == 0 {
            entry &= !REMOTE_IRR;
        }
        self.pins[pin] = entry;
    }

    /// A local APIC has ended a level-triggered interrupt of this vector. Lines that are still asserted interrupt again.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for entry in self.pins.iter_mut().filter(|entry| **entry as u8 == vector && **entry & LEVEL != 0) {
            *entry &= !REMOTE_IRR;
        }
    }

    /// A device drives its line. An edge on an edge-triggered pin gives its message.
    pub fn set_line(&mut self, pin: usize, asserted: bool) -> Option<Message> {
        let bit = 1 << pin;
        let rises = asserted && self.lines & bit == 0;
        self.lines = if asserted { self.lines | bit } else { self.lines & !bit };
        let entry = self.pins[pin];
        (rises && entry & (LEVEL | MASKED) == 0).then(|| message(entry)).flatten()
    }

    /// The message of a level-triggered pin that is asserted and waits for no end of interrupt.
    #[inline]
    pub fn level_message(&self, pin: usize) -> Option<Message> {
        let entry = self.pins[pin];
        let due = self.lines >> pin & 1 == 1 && entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL;
        due.then(|| message(entry)).flatten()
    }

    /// Messages of all level-triggered pins, masked or not.
    pub fn level_messages(&self) -> Vec<Message> {
        let pins = self.pins.iter().filter(|entry| **entry & LEVEL != 0 && **entry as u8 >= 16);
        pins.filter_map(|entry| message(*entry)).collect()
    }

    /// Vectors of level-triggered pins that wait for an end of interrupt.
    pub fn awaited(&self) -> impl Iterator<Item = u8> {
        self.pins.iter().filter(|entry| **entry & REMOTE_IRR != 0).map(|entry| *entry as u8)
    }

    /// A local APIC accepted the level-triggered message of this pin.
    pub fn accepted(&mut self, pin: usize) {
        self.pins[pin] |= REMOTE_IRR;
    }
}

fn message(entry: u64) -> Option<Message> {
    let mode = (entry >> 8 & 7) as u8;
    if !matches!(mode, delivery::FIXED | delivery::LOWEST | delivery::NMI | delivery::INIT) {
        return None;
    }
    let destination = (entry >> 56) as u32;
    let target = if entry & LOGICAL != 0 { Target::Logical(destination) } else { Target::Physical(destination) };
    let level = entry & LEVEL != 0 && mode <= delivery::LOWEST;
    Some(Message { vector: entry as u8, delivery: mode, target, level })
}

mod saved {
    use proto::v1::IoapicV1;

    use super::*;

    impl Ioapic {
        /// The saved form.
        pub fn save(&self) -> IoapicV1 {
            let Ioapic { id, select, pins, lines } = self;
            IoapicV1 { id: *id, select: *select, pins: pins.to_vec(), lines: *lines }
        }

        /// The IOAPIC in a saved state.
        ///
        /// # Errors
        /// A field that no IOAPIC could hold.
        pub fn restore(saved: &IoapicV1) -> Result<Ioapic, Unfit> {
            Unfit::check(saved.id < 16, "id", saved.id, "four bits")?;
            let select = u32::from(narrow::<u8>("select", saved.select)?);
            let pins: [u64; PINS] =
                saved.pins.as_slice().try_into().map_err(|_| Unfit::new("pins", saved.pins.len(), "24 pins"))?;
            for entry in pins {
                let edge_waits = entry & (LEVEL | REMOTE_IRR) == REMOTE_IRR;
                Unfit::check(entry & !(WRITABLE | REMOTE_IRR) == 0 && !edge_waits, "pins", entry, "no reserved bits")?;
            }
            Unfit::check(saved.lines >> PINS == 0, "lines", saved.lines, "24 bits")?;
            Ok(Ioapic { id: saved.id, select, pins, lines: saved.lines })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set_pin(ioapic: &mut Ioapic, pin: u32, entry: u64) {
        ioapic.write(0x00, 0x10 + 2 * pin);
        ioapic.write(0x10, entry as u32);
        ioapic.write(0x00, 0x11 + 2 * pin);
        ioapic.write(0x10, (entry >> 32) as u32);
    }

    #[test]
    fn the_chip_says_24_pins_all_masked() {
        let mut ioapic = Ioapic::default();
        ioapic.write(0, 1);
        assert_eq!(ioapic.read(0x10), 0x0017_0020);
        for register in 0x10..0x40 {
            ioapic.write(0, register);
            assert_eq!(ioapic.read(0x10), if register % 2 == 0 { 0x1_0000 } else { 0 });
        }
    }

    #[test]
    fn an_edge_is_one_message() {
        let mut ioapic = Ioapic::default();
        set_pin(&mut ioapic, 4, 2 << 56 | 0x34);
        let message = ioapic.set_line(4, true).unwrap();
        let expected = Message { vector: 0x34, delivery: 0, target: Target::Physical(2), level: false };
        assert_eq!(message, expected);
        assert_eq!(ioapic.set_line(4, true), None);
        assert_eq!(ioapic.set_line(4, false), None);
        assert!(ioapic.set_line(4, true).is_some());
    }

    #[test]
    fn an_edge_on_a_masked_pin_is_lost() {
        let mut ioapic = Ioapic::default();
        assert_eq!(ioapic.set_line(4, true), None);
        set_pin(&mut ioapic, 4, 0x34);
        assert_eq!((ioapic.set_line(4, true), ioapic.level_message(4)), (None, None));
    }

    #[test]
    fn a_level_interrupts_until_it_falls() {
        let mut ioapic = Ioapic::default();
        assert_eq!(ioapic.set_line(5, true), None);
        set_pin(&mut ioapic, 5, LEVEL | 0x51);
        assert!(ioapic.level_message(5).unwrap().level);
        ioapic.accepted(5);
        assert_eq!(ioapic.level_message(5), None);
        ioapic.write(0, 0x10 + 10);
        assert_eq!(ioapic.read(0x10), (LEVEL | REMOTE_IRR | 0x51) as u32);
        ioapic.end_of_interrupt(0x50);
        assert_eq!(ioapic.level_message(5), None);
        ioapic.write(0x40, 0x51);
        assert!(ioapic.level_message(5).is_some());
        ioapic.set_line(5, false);
        assert_eq!(ioapic.level_message(5), None);
    }

    proptest! {
        #[test]
        fn any_history_survives_saving(steps in proptest::collection::vec((any::<u16>(), any::<u32>()), 0..80)) {
            let mut ioapic = Ioapic::default();
            for (what, value) in steps {
                match what % 5 {
                    0 => ioapic.write(0, value),
                    1 => ioapic.write(0x10, value),
                    2 => ioapic.write(0x40, value),
                    3 => { let _ = ioapic.set_line(value as usize % PINS, value & 32 != 0); }
                    _ => {
                        let pin = value as usize % PINS;
                        if ioapic.level_message(pin).is_some() { ioapic.accepted(pin); }
                    }
                }
            }
            prop_assert_eq!(Ioapic::restore(&ioapic.save()), Ok(ioapic));
        }
    }

    #[test]
    fn hostile_saved_forms_are_refused_by_name() {
        let good = Ioapic::default().save();
        let field = |saved| Ioapic::restore(&saved).unwrap_err().field;
        assert_eq!(field(proto::v1::IoapicV1 { id: 16, ..good.clone() }), "id");
        assert_eq!(field(proto::v1::IoapicV1 { select: 256, ..good.clone() }), "select");
        assert_eq!(field(proto::v1::IoapicV1 { pins: vec![0; 25], ..good.clone() }), "pins");
        assert_eq!(field(proto::v1::IoapicV1 { pins: vec![REMOTE_IRR; 24], ..good.clone() }), "pins");
        assert_eq!(field(proto::v1::IoapicV1 { lines: 1 << 24, ..good }), "lines");
    }
}

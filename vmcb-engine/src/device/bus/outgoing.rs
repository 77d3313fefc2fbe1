//! Local APICs that an engine has itself: what the bus sends them, and the state in which they are saved and restored.
//!
//! Messages of the IOAPIC wait here until the engine takes them. The bus's own local APICs then only carry state: they are
//! given the engine's before devices are saved, and hold what the engine is to have after devices were restored.

use std::collections::VecDeque;

use proto::v1::LapicV1;

use super::Bus;
use crate::device::Unfit;
use crate::device::lapic::{Lapic, Message};

/// Messages on their way to local APICs beyond the bus.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    messages: VecDeque<Message>,
    /// The pins of the IOAPIC have changed since [`Bus::take_level_messages`].
    levels_changed: bool,
}

impl Outgoing {
    pub(super) fn push(&mut self, message: Message) {
        self.messages.push_back(message);
    }

    /// After a reset or a restore: nothing is on its way, and every pin may be another.
    pub(super) fn renew(&mut self) {
        *self = Outgoing { messages: VecDeque::new(), levels_changed: true };
    }

    pub(super) fn pins_changed(&mut self) {
        self.levels_changed = true;
    }
}

impl Bus {
    /// From now on local APICs are the engine's.
    pub fn send_to_engine(&mut self) {
        self.outgoing = Some(Outgoing { levels_changed: true, ..Outgoing::default() });
    }

    /// The next message for the engine's local APICs.
    pub fn take_message(&mut self) -> Option<Message> {
        self.outgoing.as_mut()?.messages.pop_front()
    }

    /// Every level-triggered message that the IOAPIC may send, masked or not, if pins have changed since it was asked last.
    pub fn take_level_messages(&mut self) -> Option<Vec<Message>> {
        let changed = std::mem::take(&mut self.outgoing.as_mut()?.levels_changed);
        changed.then(|| self.ioapic.level_messages())
    }

    /// One of the engine's local APICs ended a level-triggered interrupt.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
        self.settle();
    }

    /// Ends level-triggered interrupts that no local APIC has any more: their end was on its way to the IOAPIC when the
    /// machine stopped. True if there was one.
    pub fn end_what_nobody_has(&mut self) -> bool {
        let ended = |vector: &u8| !self.lapics.iter().any(|lapic| lapic.has(*vector));
        let vectors: Vec<u8> = self.ioapic.awaited().filter(ended).collect();
        vectors.iter().for_each(|vector| self.end_of_interrupt(*vector));
        !vectors.is_empty()
    }

    /// The saved form of a vCPU's local APIC.
    pub fn lapic(&self, vcpu: usize) -> LapicV1 {
        self.lapics[vcpu].save()
    }

    /// Takes over the state of a vCPU's local APIC from the engine.
    ///
    /// # Errors
    /// A field that no local APIC could hold.
    pub fn set_lapic(&mut self, vcpu: usize, saved: &LapicV1) -> Result<(), Unfit> {
        self.lapics[vcpu] = Lapic::restore(vcpu, saved)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{bus, set_pin};
    use super::super::{LAPIC_BASE, SERIAL_LINE, SERIAL_PORT};
    use crate::device::lapic::{Message, Target, delivery};

    #[test]
    fn messages_wait_for_the_engine_and_ends_bring_them_again() {
        let mut bus = bus(1);
        bus.send_to_engine();
        assert_eq!(bus.mmio_read(0, LAPIC_BASE + 0x30, 4), 0xffff_ffff, "the registers are the engine's");
        assert_eq!(bus.take_level_messages(), Some(Vec::new()));
        set_pin(&mut bus, SERIAL_LINE.into(), 1 << 15 | 0x41);
        let message = Message { vector: 0x41, delivery: delivery::FIXED, target: Target::Physical(0), level: true };
        assert_eq!(bus.take_level_messages(), Some(vec![message]));
        assert_eq!(bus.take_level_messages(), None);
        // The line is connected, and the transmitter is empty: an enabled interrupt of it is due.
        bus.io_write(0, SERIAL_PORT + 4, 1, 8);
        bus.io_write(0, SERIAL_PORT + 1, 1, 2);
        assert_eq!((bus.take_message(), bus.take_message()), (Some(message), None));
        bus.end_of_interrupt(0x41);
        assert_eq!(bus.take_message(), Some(message), "the line is still asserted");
        bus.set_lapic(0, &bus.lapic(0)).unwrap();
        assert!(bus.end_what_nobody_has());
        assert_eq!(bus.take_message(), Some(message));
        bus.reset();
        assert_eq!((bus.take_message(), bus.take_level_messages()), (None, Some(Vec::new())));
    }
}

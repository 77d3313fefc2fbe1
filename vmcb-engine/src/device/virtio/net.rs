//! The network card (virtio 1.2, section 5.1): two queues, a MAC and a link status, no offloads. Packets are Ethernet
//! frames; the 12-byte header in front is zero both ways.

use std::collections::VecDeque;

use super::mmio::Mmio;
use super::queue::{Queue, gather, scatter, slice};
use super::{Broken, Device, copy_config};
use crate::device::Unfit;
use crate::device::net::NetLink;
use crate::memory::GuestMemory;

const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_STATUS: u64 = 1 << 16;
const HEADER_BYTES: u64 = 12;
/// Longest frame that leaves or arrives.
pub const PACKET_BYTES_MAX: usize = 65_550;
/// Most packets, and most of their bytes, that wait while the machine stands still.
pub const WAITING_PACKETS_MAX: usize = 512;
/// See [`WAITING_PACKETS_MAX`].
pub const WAITING_BYTES_MAX: usize = 1 << 20;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// The card.
pub struct Net {
    mac: [u8; 6],
    link: Option<NetLink>,
    link_up: bool,
    /// What the guest sends was sent before.
    muted: bool,
    waiting: VecDeque<Vec<u8>>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net").field("mac", &self.mac).field("link_up", &self.link_up).finish_non_exhaustive()
    }
}

impl Net {
    /// A card; without a link the cable is unplugged.
    pub fn new(mac: [u8; 6], link: Option<NetLink>) -> Self {
        let link_up = link.is_some();
        Self { mac, link, link_up, muted: false, waiting: VecDeque::new() }
    }

    /// The card's address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Lets nothing out, or does again. No part of the state, and the guest cannot tell.
    pub fn mute(&mut self, muted: bool) {
        self.muted = muted;
    }

    fn transmit(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<bool, Broken> {
        let mut used = false;
        while let Some(chain) = queue.pop(memory)? {
            let bytes = chain.readable_bytes();
            if bytes < HEADER_BYTES {
                return Err(Broken("a packet without a header"));
            }
            let frame = slice(&chain.readable, HEADER_BYTES, u64::MAX);
            // Whether somebody listens is the host's: the guest must not be able to tell.
            if self.link_up && bytes <= PACKET_BYTES_MAX as u64 {
                let mut packet = vec![0; (bytes - HEADER_BYTES) as usize];
                gather(memory, &frame, &mut packet)?;
                if let Some(link) = self.link.as_mut().filter(|_| !self.muted) {
                    link.send(&packet);
                }
            }
            queue.push(memory, &chain, 0)?;
            used = true;
        }
        Ok(used)
    }

    fn receive(&mut self, queue: &mut Queue, memory: &GuestMemory, packet: &[u8]) -> Result<bool, Broken> {
        let Some(chain) = queue.pop(memory)? else { return Ok(false) };
        let bytes = HEADER_BYTES + packet.len() as u64;
        if chain.writable_bytes() < bytes {
            queue.unpop();
            return Ok(false);
        }
        // One buffer holds the packet: num_buffers is 1.
        let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        scatter(memory, &slice(&chain.writable, 0, HEADER_BYTES), &header)?;
        scatter(memory, &slice(&chain.writable, HEADER_BYTES, u64::MAX), packet)?;
        queue.push(memory, &chain, bytes as u32)?;
        Ok(true)
    }
}

impl Device for Net {
    const ID: u32 = 1;
    const QUEUES: usize = 2;
    const QUEUE_ENTRIES_MAX: u16 = 256;

    fn features(&self) -> u64 {
        FEATURE_MAC | FEATURE_STATUS
    }

    fn read_config(&self, offset: usize, into: &mut [u8]) {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac);
        config[6] = self.link_up.into();
        copy_config(&config, offset, into);
    }

    fn notify(&mut self, queue: usize, queues: &mut [Queue], memory: &GuestMemory) -> Result<bool, Broken> {
        if queue == TRANSMIT { self.transmit(&mut queues[TRANSMIT], memory) } else { Ok(false) }
    }
}

impl Mmio<Net> {
    /// A packet from outside; false if the guest has no buffer for it (it is dropped).
    pub fn input(&mut self, memory: &GuestMemory, packet: &[u8]) -> bool {
        let fits = self.device().link_up && packet.len() <= PACKET_BYTES_MAX;
        fits && self.serve(memory, |net, queues, memory| net.receive(&mut queues[RECEIVE], memory, packet))
    }

    /// Keeps a packet that came while the machine stands still, as part of its state; false if there is no room.
    pub fn hold(&mut self, packet: &[u8]) -> bool {
        let waiting = &mut self.device_mut().waiting;
        let bytes: usize = waiting.iter().map(Vec::len).sum();
        let fits = packet.len() <= PACKET_BYTES_MAX
            && waiting.len() < WAITING_PACKETS_MAX
            && bytes + packet.len() <= WAITING_BYTES_MAX;
        if fits {
            waiting.push_back(packet.to_vec());
        }
        fits
    }

    /// Gives the guest what [`Mmio::hold`] kept; what it has no buffer for is dropped.
    pub fn release(&mut self, memory: &GuestMemory) {
        for packet in std::mem::take(&mut self.device_mut().waiting) {
            self.input(memory, &packet);
        }
    }

    /// True if [`Mmio::release`] would do something.
    #[inline]
    pub fn holds(&self) -> bool {
        !self.device().waiting.is_empty()
    }

    /// Plugs the cable in or pulls it out.
    pub fn set_link(&mut self, up: bool) {
        if std::mem::replace(&mut self.device_mut().link_up, up) != up {
            self.config_changed();
        }
    }
}

mod saved {
    use proto::v1::VirtioNetV1;

    use super::*;

    impl Mmio<Net> {
        /// The saved form.
        pub fn save(&self) -> VirtioNetV1 {
            // The MAC is configuration, the link is the host's, and so is whether anything is let out.
            let Net { mac: _, link: _, link_up, muted: _, waiting } = self.device();
            let waiting = waiting.iter().cloned().collect();
            VirtioNetV1 { transport: Some(self.save_transport()), link_up: *link_up, waiting }
        }

        /// Puts the card into a saved state. On an error nothing has changed.
        ///
        /// # Errors
        /// A field that it could not hold.
        pub fn restore(&mut self, saved: &VirtioNetV1, memory: &GuestMemory) -> Result<(), Unfit> {
            let (packets, bytes) = (saved.waiting.len(), saved.waiting.iter().map(Vec::len).sum::<usize>());
            Unfit::check(packets <= WAITING_PACKETS_MAX, "waiting", packets, "at most 512 packets")?;
            Unfit::check(bytes <= WAITING_BYTES_MAX, "waiting", bytes, "at most 1 MiB")?;
            self.restore_transport(saved.transport.as_ref(), memory)?;
            self.device_mut().link_up = saved.link_up;
            self.device_mut().waiting = saved.waiting.iter().cloned().collect();
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::super::mmio::tests::bring_up;
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    type Sent = Rc<RefCell<Vec<Vec<u8>>>>;

    struct Recorder(Sent);

    impl crate::device::net::Link for Recorder {
        fn send(&mut self, packet: &[u8]) {
            self.0.borrow_mut().push(packet.to_vec());
        }
    }

    fn card() -> (Mmio<Net>, Sent) {
        let sent = Sent::default();
        (Mmio::new(Net::new(MAC, Some(Box::new(Recorder(Rc::clone(&sent)))))), sent)
    }

    #[test]
    fn packets_leave_without_their_header() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let (mut card, sent) = card();
        let mut drivers = bring_up(&mut card, &memory);
        memory.write(0x40_0000 + 10, &[9, 9, b'h', b'e', b'l']).unwrap();
        memory.write(0x41_0000, b"lo").unwrap();
        drivers[1].offer(&memory, &[(0x40_0000, 15, 0), (0x41_0000, 2, 0)]);
        card.write(&memory, 0x050, 4, 1);
        assert_eq!(*sent.borrow(), [b"hello".to_vec()]);
        assert_eq!(drivers[1].used(&memory), [(0, 0)]);
        assert!(card.interrupt());
    }

    #[test]
    fn packets_arrive_in_one_buffer_or_are_dropped() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let (mut card, _) = card();
        assert!(!card.input(&memory, b"early"));
        let mut drivers = bring_up(&mut card, &memory);
        assert!(!card.input(&memory, b"no buffer"));
        drivers[0].offer(&memory, &[(0x40_0000, 20, 2)]);
        assert!(!card.input(&memory, &[5; 9]), "too long for the buffer, which stays");
        assert!(card.input(&memory, &[5; 8]));
        let mut bytes = [0; 20];
        memory.read(0x40_0000, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 5, 5, 5, 5, 5, 5, 5, 5]);
        assert_eq!(drivers[0].used(&memory), [(0, 20)]);
    }

    #[test]
    fn the_cable_shows_in_the_configuration() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let (mut card, sent) = card();
        let mut drivers = bring_up(&mut card, &memory);
        assert_eq!(card.read(0x100, 8).to_le_bytes(), [2, 0, 0, 0, 0, 7, 1, 0]);
        card.set_link(false);
        assert_eq!((card.read(0x106, 2), card.read(0x060, 4), card.read(0x0fc, 4)), (0, 2, 1));
        drivers[1].offer(&memory, &[(0x40_0000, 30, 0)]);
        card.write(&memory, 0x050, 4, 1);
        assert!(sent.borrow().is_empty());
        assert_eq!(Mmio::new(Net::new(MAC, None)).read(0x106, 2), 0);
    }

    #[test]
    fn a_packet_without_a_header_breaks_the_card() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let (mut card, _) = card();
        let mut drivers = bring_up(&mut card, &memory);
        drivers[1].offer(&memory, &[(0x40_0000, 11, 0)]);
        card.write(&memory, 0x050, 4, 1);
        assert!(!card.running());
    }

    #[test]
    fn a_saved_card_goes_on_where_it_was() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let (mut card, _) = card();
        let mut drivers = bring_up(&mut card, &memory);
        drivers[0].offer(&memory, &[(0x40_0000, 100, 2)]);
        drivers[0].offer(&memory, &[(0x41_0000, 100, 2)]);
        assert!(card.input(&memory, b"one"));
        let (mut target, _) = self::card();
        target.restore(&card.save(), &memory).unwrap();
        assert_eq!(target.save(), card.save());
        assert!(target.input(&memory, b"second"));
        assert_eq!(drivers[0].used(&memory), [(0, 15), (1, 18)]);
    }

    #[test]
    fn packets_that_came_while_it_stood_still_travel_with_it_and_are_bounded() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let (mut card, _) = card();
        let mut drivers = bring_up(&mut card, &memory);
        drivers[0].offer(&memory, &[(0x40_0000, 100, 2)]);
        assert!(card.hold(b"first") && card.hold(b"no buffer for it"));
        assert!(drivers[0].used(&memory).is_empty(), "held packets change no RAM");
        let (mut target, _) = self::card();
        target.restore(&card.save(), &memory).unwrap();
        assert_eq!(target.save(), card.save());
        target.release(&memory);
        assert_eq!(drivers[0].used(&memory), [(0, 17)]);
        assert!(!target.holds());
        assert!((0..16).all(|_| target.hold(&[0; 65_000])) && !target.hold(&[0; 65_000]));
        let waiting = vec![vec![]; WAITING_PACKETS_MAX + 1];
        let hostile = proto::v1::VirtioNetV1 { waiting, ..card.save() };
        assert_eq!(target.restore(&hostile, &memory).unwrap_err().field, "waiting");
    }
}

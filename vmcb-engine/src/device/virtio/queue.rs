//! A split virtqueue (virtio 1.2, section 2.7): the guest's addresses, and chains taken from it. The walk itself is
//! rust-vmm's; this file adds what a hostile guest makes necessary: a chain is either whole, in RAM, readable parts
//! before writable ones, and of bounded length, or the queue is broken.

use proto::v1::VirtqueueV1;
use virtio_queue::{Queue as Ring, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::Broken;
use crate::device::{Unfit, narrow};
use crate::memory::GuestMemory;

/// Flags and index of a used ring (virtio 1.2, 2.7.8).
const USED_HEADER_BYTES: u64 = 4;
/// An entry of it.
const USED_ENTRY_BYTES: u64 = 8;
/// Most parts of a chain, indirect ones included.
const PARTS_MAX: usize = 1024;

/// A piece of guest memory, wholly in RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length.
    pub bytes: u32,
}

/// What the driver put into the queue as one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chain {
    head: u16,
    /// Parts the device reads.
    pub readable: Vec<Part>,
    /// Parts the device writes.
    pub writable: Vec<Part>,
}

impl Chain {
    /// Bytes of the readable parts.
    pub fn readable_bytes(&self) -> u64 {
        total(&self.readable)
    }

    /// Bytes of the writable parts.
    pub fn writable_bytes(&self) -> u64 {
        total(&self.writable)
    }
}

/// Bytes of all parts.
pub fn total(parts: &[Part]) -> u64 {
    parts.iter().map(|part| u64::from(part.bytes)).sum()
}

/// The part of `parts` that begins after `skip` bytes and has at most `bytes`.
pub fn slice(parts: &[Part], mut skip: u64, mut bytes: u64) -> Vec<Part> {
    let mut out = Vec::with_capacity(parts.len());
    for part in parts {
        let length = u64::from(part.bytes);
        if skip >= length {
            skip -= length;
            continue;
        }
        let count = (length - skip).min(bytes);
        if count > 0 {
            out.push(Part { gpa: part.gpa + skip, bytes: count as u32 });
        }
        bytes -= count;
        skip = 0;
    }
    out
}

/// Copies from parts until the buffer is full; returns how many bytes there were.
///
/// # Errors
/// A part that is not RAM, which a [`Chain`] never has.
pub fn gather(memory: &GuestMemory, parts: &[Part], into: &mut [u8]) -> Result<usize, Broken> {
    let mut done = 0;
    for part in parts {
        let count = (part.bytes as usize).min(into.len() - done);
        memory.read(part.gpa, &mut into[done..done + count]).map_err(|_| Broken("a buffer is not RAM"))?;
        done += count;
    }
    Ok(done)
}

/// Copies into parts until they are full; returns how many bytes fit.
///
/// # Errors
/// A part that is not RAM, which a [`Chain`] never has.
pub fn scatter(memory: &GuestMemory, parts: &[Part], from: &[u8]) -> Result<usize, Broken> {
    let mut done = 0;
    for part in parts {
        let count = (part.bytes as usize).min(from.len() - done);
        memory.write(part.gpa, &from[done..done + count]).map_err(|_| Broken("a buffer is not RAM"))?;
        done += count;
    }
    Ok(done)
}

/// One queue: registers until it is ready, a ring afterwards.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Queue {
    entries_max: u16,
    /// Entries that the driver chose.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    next_available: u16,
    next_used: u16,
    ready: bool,
}

impl Queue {
    /// A queue after reset.
    pub fn new(entries_max: u16) -> Self {
        let (descriptors, available, used) = (0, 0, 0);
        let (next_available, next_used, ready) = (0, 0, false);
        Self { entries_max, size: entries_max, descriptors, available, used, next_available, next_used, ready }
    }

    /// Most entries.
    pub fn entries_max(&self) -> u16 {
        self.entries_max
    }

    /// True once the driver has set it up.
    pub fn ready(&self) -> bool {
        self.ready
    }

    fn ring(&self) -> Result<Ring, virtio_queue::Error> {
        Ring::try_from(QueueState {
            max_size: self.entries_max,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: false,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })
    }

    /// The driver says that the registers are complete.
    ///
    /// # Errors
    /// They make no queue.
    pub fn enable(&mut self, memory: &GuestMemory) -> Result<(), Broken> {
        let ring = self.ring().map_err(|_| Broken("a queue is misaligned or of a bad size"))?;
        if self.available == 0 || !ring.is_valid(memory.vm()) {
            return Err(Broken("a queue is not in RAM"));
        }
        self.ready = true;
        Ok(())
    }

    /// The driver takes the queue back.
    pub fn disable(&mut self) {
        self.ready = false;
        (self.next_available, self.next_used) = (0, 0);
    }

    /// The next chain, if there is one.
    ///
    /// # Errors
    /// The ring or the chain makes no sense.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, Broken> {
        if !self.ready {
            return Ok(None);
        }
        let vm = memory.vm();
        let mut ring = self.ring().map_err(|_| Broken("a queue is misaligned or of a bad size"))?;
        let mut chains = ring.iter(vm).map_err(|_| Broken("the available index makes no sense"))?;
        let Some(mut descriptors) = chains.next() else { return Ok(None) };
        let mut chain = Chain { head: descriptors.head_index(), readable: Vec::new(), writable: Vec::new() };
        let mut whole = false;
        for descriptor in &mut descriptors {
            let part = Part { gpa: descriptor.addr().0, bytes: descriptor.len() };
            if part.bytes == 0 || !vm.check_range(GuestAddress(part.gpa), part.bytes as usize) {
                return Err(Broken("a buffer is empty or not in RAM"));
            }
            if chain.readable.len() + chain.writable.len() == PARTS_MAX {
                return Err(Broken("a chain has too many parts"));
            }
            match descriptor.is_write_only() {
                true => chain.writable.push(part),
                false if chain.writable.is_empty() => chain.readable.push(part),
                false => return Err(Broken("a readable buffer follows a writable one")),
            }
            whole = !descriptor.has_next();
        }
        if !whole {
            return Err(Broken("a chain loops or leaves its table"));
        }
        self.next_available = ring.next_avail();
        Ok(Some(chain))
    }

    /// Puts the last popped chain back.
    pub fn unpop(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    /// Gives a chain back to the driver, with the number of bytes written to it.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub fn push(&mut self, memory: &GuestMemory, chain: &Chain, written: u32) -> Result<(), Broken> {
        let mut ring = self.ring().map_err(|_| Broken("a queue is misaligned or of a bad size"))?;
        memory.keep_range(self.used, USED_HEADER_BYTES + USED_ENTRY_BYTES * u64::from(self.size));
        ring.add_used(memory.vm(), chain.head, written).map_err(|_| Broken("the used ring cannot be written"))?;
        self.next_used = ring.next_used();
        Ok(())
    }

    pub(super) fn save(&self) -> VirtqueueV1 {
        // The device says how many entries there may be.
        let Queue { entries_max: _, size, descriptors, available, used, next_available, next_used, ready } = self;
        VirtqueueV1 {
            size: (*size).into(),
            ready: *ready,
            descriptors: *descriptors,
            available: *available,
            used: *used,
            next_available: (*next_available).into(),
            next_used: (*next_used).into(),
        }
    }

    pub(super) fn restore(entries_max: u16, saved: &VirtqueueV1, memory: &GuestMemory) -> Result<Queue, Unfit> {
        let size: u16 = narrow("queues.size", saved.size)?;
        let mut queue = Queue {
            entries_max,
            size,
            descriptors: saved.descriptors,
            available: saved.available,
            used: saved.used,
            next_available: narrow("queues.next_available", saved.next_available)?,
            next_used: narrow("queues.next_used", saved.next_used)?,
            ready: false,
        };
        if saved.ready {
            let rule = "addresses of a queue in RAM";
            queue.enable(memory).map_err(|_| Unfit::new("queues", saved, rule))?;
        } else {
            let at_rest = queue.next_available == 0 && queue.next_used == 0;
            Unfit::check(at_rest, "queues.next_available", queue.next_available, "0 while not ready")?;
        }
        Ok(queue)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::driver::{Descriptor, Driver, INDIRECT, NEXT, WRITE};
    use super::*;

    fn setup() -> (GuestMemory, Driver, Queue) {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let driver = Driver::new(0x10_0000, 16);
        let mut queue = Queue::new(16);
        (queue.descriptors, queue.available, queue.used) = driver.addresses();
        queue.enable(&memory).unwrap();
        (memory, driver, queue)
    }

    #[test]
    fn a_chain_is_taken_and_given_back() {
        let (memory, mut driver, mut queue) = setup();
        assert_eq!(queue.pop(&memory), Ok(None));
        driver.offer(&memory, &[(0x20_0000, 16, 0), (0x20_1000, 512, WRITE), (0x20_2000, 1, WRITE)]);
        let chain = queue.pop(&memory).unwrap().unwrap();
        assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (16, 513));
        assert_eq!(
            slice(&chain.writable, 500, 13),
            [Part { gpa: 0x20_11f4, bytes: 12 }, Part { gpa: 0x20_2000, bytes: 1 }]
        );
        queue.unpop();
        assert_eq!(queue.pop(&memory), Ok(Some(chain.clone())));
        queue.push(&memory, &chain, 513).unwrap();
        assert_eq!(driver.used(&memory), [(0, 513)]);
        assert_eq!(queue.pop(&memory), Ok(None));
    }

    #[test]
    fn an_indirect_table_is_followed() {
        let (memory, mut driver, mut queue) = setup();
        driver.write_descriptors(
            &memory,
            0x30_0000,
            &[
                Descriptor { gpa: 0x20_0000, bytes: 4, flags: NEXT, next: 1 },
                Descriptor { gpa: 0x20_1000, bytes: 8, flags: WRITE, next: 0 },
            ],
        );
        driver.offer(&memory, &[(0x30_0000, 32, INDIRECT)]);
        let chain = queue.pop(&memory).unwrap().unwrap();
        assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (4, 8));
    }

    #[test]
    fn chains_that_make_no_sense_break_the_queue() {
        let bad: [&[Descriptor]; 6] = [
            &[Descriptor { gpa: 0x20_0000, bytes: 4, flags: NEXT, next: 0 }],
            &[Descriptor { gpa: 0x20_0000, bytes: 4, flags: NEXT, next: 99 }],
            &[Descriptor { gpa: 0xffff_ffff_ffff_fff0, bytes: 0x40, flags: 0, next: 0 }],
            &[Descriptor { gpa: 0x20_0000, bytes: u32::MAX, flags: 0, next: 0 }],
            &[Descriptor { gpa: 0x30_0000, bytes: 17, flags: INDIRECT, next: 0 }],
            &[
                Descriptor { gpa: 0x20_0000, bytes: 4, flags: WRITE | NEXT, next: 1 },
                Descriptor { gpa: 0x20_0000, bytes: 4, flags: 0, next: 0 },
            ],
        ];
        for descriptors in bad {
            let (memory, mut driver, mut queue) = setup();
            driver.write_descriptors(&memory, driver.addresses().0, descriptors);
            driver.make_available(&memory, 0);
            assert!(queue.pop(&memory).is_err(), "{descriptors:?}");
        }
    }

    #[test]
    fn queues_outside_ram_are_refused() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        for (descriptors, available, used) in [
            (0x1_0000, 0x2_0000, 0xffff_ffff_ffff_fffc),
            (15, 0x2_0000, 0x3_0000),
            (0x100_0000, 0x2_0000, 0x3_0000),
            (0, 0, 0),
        ] {
            let mut queue = Queue { descriptors, available, used, ..Queue::new(16) };
            assert!(queue.enable(&memory).is_err());
        }
        let mut odd = Queue { size: 3, descriptors: 0x1000, available: 0x2000, used: 0x3000, ..Queue::new(16) };
        assert!(odd.enable(&memory).is_err());
    }

    proptest! {
        #[test]
        fn no_ring_of_a_hostile_guest_panics(bytes in proptest::collection::vec(any::<u8>(), 1024), near: bool, index: u16) {
            let (memory, driver, mut queue) = setup();
            let mut bytes = bytes;
            if near {
                // Mostly plausible: small addresses and lengths, indices within the table.
                for descriptor in bytes[..256].chunks_exact_mut(16) {
                    descriptor[3..8].fill(0);
                    descriptor[10..12].fill(0);
                    descriptor[12] &= 7;
                    descriptor[13] = 0;
                    descriptor[14] &= 15;
                    descriptor[15] = 0;
                }
            }
            let (descriptors, available, _) = driver.addresses();
            memory.write(descriptors, &bytes[..256]).unwrap();
            memory.write(available, &bytes[256..300]).unwrap();
            memory.write(available + 2, &index.to_le_bytes()).unwrap();
            memory.write(0x20_0000, &bytes).unwrap();
            for _ in 0..20 {
                let Ok(Some(chain)) = queue.pop(&memory) else { break };
                let mut copy = vec![0; chain.readable_bytes().min(70_000) as usize];
                gather(&memory, &chain.readable, &mut copy).unwrap();
                let _ = queue.push(&memory, &chain, 0);
            }
            let restored = Queue::restore(16, &queue.save(), &memory);
            prop_assert_eq!(restored, Ok(queue));
        }
    }
}

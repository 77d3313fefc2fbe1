//! A small virtio driver for tests: lays out rings in guest memory and offers chains.

use crate::memory::GuestMemory;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// One row of a descriptor table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub gpa: u64,
    pub bytes: u32,
    pub flags: u16,
    pub next: u16,
}

/// Rings of one queue.
pub struct Driver {
    base: u64,
    entries: u16,
    next: u16,
    offered: u16,
}

impl Driver {
    pub fn new(base: u64, entries: u16) -> Self {
        Self { base, entries, next: 0, offered: 0 }
    }

    /// Descriptor table, available ring, used ring.
    pub fn addresses(&self) -> (u64, u64, u64) {
        (self.base, self.base + 0x1000, self.base + 0x2000)
    }

    pub fn write_descriptors(&self, memory: &GuestMemory, gpa: u64, descriptors: &[Descriptor]) {
        for (at, descriptor) in descriptors.iter().enumerate() {
            let mut row = [0; 16];
            row[..8].copy_from_slice(&descriptor.gpa.to_le_bytes());
            row[8..12].copy_from_slice(&descriptor.bytes.to_le_bytes());
            row[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
            row[14..].copy_from_slice(&descriptor.next.to_le_bytes());
            memory.write(gpa + 16 * at as u64, &row).unwrap();
        }
    }

    pub fn make_available(&mut self, memory: &GuestMemory, head: u16) {
        let (_, available, _) = self.addresses();
        let slot = u64::from(self.offered % self.entries);
        memory.write(available + 4 + 2 * slot, &head.to_le_bytes()).unwrap();
        self.offered = self.offered.wrapping_add(1);
        memory.write(available + 2, &self.offered.to_le_bytes()).unwrap();
    }

    /// Offers one chain of (address, bytes, flags); returns its head.
    pub fn offer(&mut self, memory: &GuestMemory, parts: &[(u64, u32, u16)]) -> u16 {
        let head = self.next;
        for (at, (gpa, bytes, flags)) in parts.iter().enumerate() {
            let last = at + 1 == parts.len();
            let index = self.next;
            self.next = (self.next + 1) % self.entries;
            let flags = if last { *flags } else { flags | NEXT };
            let descriptor = Descriptor { gpa: *gpa, bytes: *bytes, flags, next: self.next };
            self.write_descriptors(memory, self.base + 16 * u64::from(index), &[descriptor]);
        }
        self.make_available(memory, head);
        head
    }

    /// All (head, written) that came back.
    pub fn used(&self, memory: &GuestMemory) -> Vec<(u32, u32)> {
        let (_, _, used) = self.addresses();
        let word = |gpa| {
            let mut bytes = [0; 4];
            memory.read(gpa, &mut bytes).unwrap();
            u32::from_le_bytes(bytes)
        };
        let count = word(used) >> 16;
        (0..count)
            .map(|n| u64::from(n % u32::from(self.entries)))
            .map(|n| (word(used + 4 + 8 * n), word(used + 8 + 8 * n)))
            .collect()
    }
}

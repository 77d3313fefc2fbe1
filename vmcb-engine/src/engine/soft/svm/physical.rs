//! System-physical memory of a software processor: guest RAM at its own addresses, and the host's arena far above it,
//! which holds nested page tables and permission maps. No nested table maps the arena, so no guest can reach it.

/// First system-physical address of the arena: above any guest RAM (1 TiB at most), below 2^48.
pub const ARENA_BASE: u64 = 1 << 47;

/// Pages that belong to the host.
#[derive(Clone, Default)]
pub struct Arena {
    bytes: Vec<u8>,
}

impl Arena {
    /// Adds zeroed pages and returns the system-physical address of the first.
    pub fn allocate(&mut self, pages: usize) -> u64 {
        let at = self.bytes.len();
        self.bytes.resize(at + pages * 4096, 0);
        ARENA_BASE + at as u64
    }

    fn at(&self, address: u64, bytes: usize) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(ARENA_BASE)?).ok()?;
        (offset.checked_add(bytes)? <= self.bytes.len()).then_some(offset)
    }

    /// Eight bytes, if the arena has them.
    pub fn read_u64(&self, address: u64) -> Option<u64> {
        let at = self.at(address, 8)?;
        Some(u64::from_le_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes")))
    }

    /// Writes eight bytes, if the arena has them.
    pub fn write_u64(&mut self, address: u64, value: u64) -> Option<()> {
        let at = self.at(address, 8)?;
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        Some(())
    }

    /// One byte, if the arena has it.
    pub fn read_u8(&self, address: u64) -> Option<u8> {
        self.at(address, 1).map(|at| self.bytes[at])
    }

    /// The bytes of a range, writable, if the arena has them.
    pub fn slice_mut(&mut self, address: u64, bytes: usize) -> Option<&mut [u8]> {
        let at = self.at(address, bytes)?;
        Some(&mut self.bytes[at..at + bytes])
    }
}

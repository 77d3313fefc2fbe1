//! Virtio devices behind the memory-mapped transport, version 2 (virtio 1.2, section 4.2).
//!
//! [`mmio`] is the transport that all share, [`queue`] the only place where rings in guest memory are read. The guest is
//! hostile: a ring or chain that makes no sense puts the device into NEEDS_RESET and nothing else happens.

pub mod block;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;

#[cfg(test)]
mod driver;

/// The driver broke the protocol; the text says how. The device needs a reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("virtio driver broke the protocol: {0}")]
pub struct Broken(pub &'static str);

/// What a device is, apart from the transport.
pub trait Device {
    /// Virtio device id (virtio 1.2, section 5).
    const ID: u32;
    /// How many queues, and how many entries each may have.
    const QUEUES: usize;
    /// Most entries of a queue.
    const QUEUE_ENTRIES_MAX: u16;

    /// Feature bits offered, apart from those of the transport.
    fn features(&self) -> u64;
    /// Fills in bytes of the configuration space from an offset; what is beyond stays zero.
    fn read_config(&self, offset: usize, into: &mut [u8]);
    /// The driver says that a queue has buffers. Returns true if any were used.
    ///
    /// # Errors
    /// The driver broke the protocol.
    fn notify(
        &mut self,
        queue: usize,
        queues: &mut [queue::Queue],
        memory: &crate::memory::GuestMemory,
    ) -> Result<bool, Broken>;
}

/// Copies what a configuration space of `config` has at `offset`.
fn copy_config(config: &[u8], offset: usize, into: &mut [u8]) {
    let available = config.get(offset..).unwrap_or(&[]);
    let count = available.len().min(into.len());
    into[..count].copy_from_slice(&available[..count]);
}

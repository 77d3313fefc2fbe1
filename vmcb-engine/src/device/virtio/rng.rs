//! The entropy device (virtio 1.2, section 5.4). Its stream comes from the machine's seed and nothing else, so that a
//! run can be repeated: BLAKE3 in output mode, at a position that is part of the saved state.

use super::mmio::Mmio;
use super::queue::{Queue, scatter, slice};
use super::{Broken, Device};
use crate::device::Unfit;
use crate::memory::GuestMemory;

/// Most bytes for one request; the guest asks again.
const REQUEST_BYTES_MAX: u64 = 64 << 10;

/// The stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rng {
    key: [u8; 32],
    position: u64,
}

impl Rng {
    /// The stream of a machine with this seed.
    pub fn new(seed: &[u8]) -> Self {
        Self { key: blake3::derive_key("godwit virtio-rng 1", seed), position: 0 }
    }

    fn take(&mut self, bytes: usize) -> Vec<u8> {
        let mut output = blake3::Hasher::new_keyed(&self.key).finalize_xof();
        output.set_position(self.position);
        let mut taken = vec![0; bytes];
        output.fill(&mut taken);
        self.position += bytes as u64;
        taken
    }
}

impl Device for Rng {
    const ID: u32 = 4;
    const QUEUES: usize = 1;
    const QUEUE_ENTRIES_MAX: u16 = 64;

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: usize, _into: &mut [u8]) {}

    fn notify(&mut self, _queue: usize, queues: &mut [Queue], memory: &GuestMemory) -> Result<bool, Broken> {
        let queue = &mut queues[0];
        let mut used = false;
        while let Some(chain) = queue.pop(memory)? {
            let bytes = chain.writable_bytes().min(REQUEST_BYTES_MAX);
            let random = self.take(bytes as usize);
            scatter(memory, &slice(&chain.writable, 0, bytes), &random)?;
            queue.push(memory, &chain, bytes as u32)?;
            used = true;
        }
        Ok(used)
    }
}

mod saved {
    use proto::v1::VirtioRngV1;

    use super::*;

    impl Mmio<Rng> {
        /// The saved form.
        pub fn save(&self) -> VirtioRngV1 {
            // The key comes from the configuration.
            let Rng { key: _, position } = self.device();
            VirtioRngV1 { transport: Some(self.save_transport()), position: *position }
        }

        /// Puts the device into a saved state. On an error nothing has changed.
        ///
        /// # Errors
        /// A field that it could not hold.
        pub fn restore(&mut self, saved: &VirtioRngV1, memory: &GuestMemory) -> Result<(), Unfit> {
            Unfit::check(saved.position < 1 << 63, "position", saved.position, "below 2^63")?;
            self.restore_transport(saved.transport.as_ref(), memory)?;
            self.device_mut().position = saved.position;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mmio::tests::bring_up;
    use super::*;

    fn draw(mmio: &mut Mmio<Rng>, memory: &GuestMemory, bytes: u32) -> Vec<u8> {
        let mut drivers = bring_up(mmio, memory);
        // A fresh used and available ring: the driver starts from zero after a reset.
        memory.write(drivers[0].addresses().1, &[0; 8]).unwrap();
        memory.write(drivers[0].addresses().2, &[0; 8]).unwrap();
        drivers[0].offer(memory, &[(0x30_0000, bytes, 2)]);
        mmio.write(memory, 0x050, 4, 0);
        assert_eq!(drivers[0].used(memory), [(0, bytes)]);
        let mut random = vec![0; bytes as usize];
        memory.read(0x30_0000, &mut random).unwrap();
        random
    }

    #[test]
    fn the_stream_is_the_seeds_and_survives_saving() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let mut whole = Mmio::new(Rng::new(&[1; 32]));
        let both = draw(&mut whole, &memory, 100);
        let mut first = Mmio::new(Rng::new(&[1; 32]));
        let mut halves = draw(&mut first, &memory, 33);
        let mut second = Mmio::new(Rng::new(&[1; 32]));
        second.restore(&first.save(), &memory).unwrap();
        halves.extend(draw(&mut second, &memory, 67));
        assert_eq!(both, halves);
        assert_ne!(both, draw(&mut Mmio::new(Rng::new(&[2; 32])), &memory, 100));
    }

    #[test]
    fn a_hostile_position_is_refused() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let mut mmio = Mmio::new(Rng::new(&[1; 32]));
        let saved = proto::v1::VirtioRngV1 { position: u64::MAX, ..mmio.save() };
        assert_eq!(mmio.restore(&saved, &memory).unwrap_err().field, "position");
    }
}

//! The memory-mapped transport, version 2 (virtio 1.2, section 4.2.2): registers of one device at offsets of its window.
//!
//! Registers are read and written as 32-bit words; only the configuration space takes other sizes. What the driver may
//! not do now is ignored; what breaks the protocol sets NEEDS_RESET, and then nothing works until the driver resets.

use super::queue::Queue;
use super::{Broken, Device};
use crate::memory::GuestMemory;

/// Bytes of a window.
pub const WINDOW_BYTES: u64 = 0x1000;
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "GDWT" as a vendor.
const VENDOR: u32 = 0x5457_4447;
const FEATURE_INDIRECT: u64 = 1 << 28;
const FEATURE_VERSION_1: u64 = 1 << 32;
const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;
const CONFIG: u64 = 0x100;

/// Device status bits (virtio 1.2, section 2.1).
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver.
    pub const DRIVER: u32 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u32 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u32 = 8;
    /// The driver broke the protocol.
    pub const NEEDS_RESET: u32 = 64;
    /// The driver gave up.
    pub const FAILED: u32 = 128;
}

/// A device and its registers.
#[derive(Debug)]
pub struct Mmio<D> {
    device: D,
    registers: Registers,
}

/// What all virtio devices have.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    queues: Vec<Queue>,
}

impl Registers {
    fn new<D: Device>() -> Self {
        Self {
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            interrupt_status: 0,
            config_generation: 0,
            queues: vec![Queue::new(D::QUEUE_ENTRIES_MAX); D::QUEUES],
        }
    }

    fn queue(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(self.queue_select as usize)
    }

    /// The queue whose registers may be written: selected and not ready.
    fn resting_queue(&mut self) -> Option<&mut Queue> {
        self.queue().filter(|queue| !queue.ready())
    }

    fn running(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET | status::FAILED) == status::DRIVER_OK
    }

    fn needs_reset(&mut self) {
        if self.status & status::NEEDS_RESET == 0 {
            self.status |= status::NEEDS_RESET;
            if self.status & status::DRIVER_OK != 0 {
                self.interrupt_status |= INTERRUPT_CONFIG;
            }
        }
    }
}

fn set_low(word: &mut u64, value: u32) {
    *word = *word & 0xffff_ffff_0000_0000 | u64::from(value);
}

fn set_high(word: &mut u64, value: u32) {
    *word = *word & 0xffff_ffff | u64::from(value) << 32;
}

impl<D: Device> Mmio<D> {
    /// The device after power-up.
    pub fn new(device: D) -> Self {
        Self { device, registers: Registers::new::<D>() }
    }

    /// What is behind the transport.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// What is behind the transport.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// True while the device pulls its interrupt line.
    #[inline]
    pub fn interrupt(&self) -> bool {
        self.registers.interrupt_status != 0
    }

    /// True if the driver uses the device.
    pub fn running(&self) -> bool {
        self.registers.running()
    }

    fn features(&self) -> u64 {
        self.device.features() | FEATURE_VERSION_1 | FEATURE_INDIRECT
    }

    /// Reads `size` bytes at an offset of the window.
    pub fn read(&mut self, offset: u64, size: u8) -> u64 {
        if offset >= CONFIG {
            let mut bytes = [0; 8];
            self.device.read_config((offset - CONFIG) as usize, &mut bytes[..usize::from(size.min(8))]);
            return u64::from_le_bytes(bytes);
        }
        if size != 4 || !offset.is_multiple_of(4) {
            return 0;
        }
        let features = self.features();
        let registers = &mut self.registers;
        u64::from(match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => D::ID,
            0x00c => VENDOR,
            0x010 if registers.device_features_select < 2 => {
                (features >> (32 * registers.device_features_select)) as u32
            }
            0x034 => registers.queue().map_or(0, |queue| queue.entries_max().into()),
            0x044 => registers.queue().is_some_and(|queue| queue.ready()).into(),
            0x060 => registers.interrupt_status,
            0x070 => registers.status,
            // There is no shared memory: a length of all ones.
            0x0b0 | 0x0b4 | 0x0b8 | 0x0bc => u32::MAX,
            0x0fc => registers.config_generation,
            _ => 0,
        })
    }

    /// Writes `size` bytes at an offset of the window.
    pub fn write(&mut self, memory: &GuestMemory, offset: u64, size: u8, value: u64) {
        if size != 4 || !offset.is_multiple_of(4) || offset >= CONFIG {
            return;
        }
        let value = value as u32;
        let negotiating = self.registers.status & (status::DRIVER | status::FEATURES_OK) == status::DRIVER;
        let registers = &mut self.registers;
        match offset {
            0x014 => registers.device_features_select = value,
            0x020 if negotiating && registers.driver_features_select == 0 => {
                set_low(&mut registers.driver_features, value);
            }
            0x020 if negotiating && registers.driver_features_select == 1 => {
                set_high(&mut registers.driver_features, value);
            }
            0x024 => registers.driver_features_select = value,
            0x030 => registers.queue_select = value,
            0x044 => self.write_ready(memory, value),
            0x050 => self.notify(memory, value as usize),
            0x064 => registers.interrupt_status &= !value,
            0x070 => self.write_status(value),
            _ => self.write_queue(offset, value),
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.registers.resting_queue() else { return };
        match offset {
            0x038 => queue.size = u16::try_from(value).unwrap_or(0),
            0x080 => set_low(&mut queue.descriptors, value),
            0x084 => set_high(&mut queue.descriptors, value),
            0x090 => set_low(&mut queue.available, value),
            0x094 => set_high(&mut queue.available, value),
            0x0a0 => set_low(&mut queue.used, value),
            0x0a4 => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    fn write_ready(&mut self, memory: &GuestMemory, value: u32) {
        if self.registers.status & status::FEATURES_OK == 0 {
            return;
        }
        let Some(queue) = self.registers.queue() else { return };
        if value & 1 == 0 {
            queue.disable();
        } else if !queue.ready() && queue.enable(memory).is_err() {
            self.registers.needs_reset();
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let agreed = self.registers.driver_features & !self.features() == 0
            && self.registers.driver_features & FEATURE_VERSION_1 != 0;
        let mut value = value & (0x8f | status::NEEDS_RESET);
        if !agreed {
            value &= !status::FEATURES_OK;
        }
        if value & status::FEATURES_OK == 0 {
            value &= !status::DRIVER_OK;
        }
        // Bits are only ever added; NEEDS_RESET is the device's own.
        self.registers.status |= value & !status::NEEDS_RESET;
    }

    /// As after power-up, by the driver's word or by a reset of the machine. The interrupt line falls too; the generation
    /// goes on, so that no driver mistakes old for new.
    pub fn reset(&mut self) {
        let config_generation = self.registers.config_generation;
        self.registers = Registers { config_generation, ..Registers::new::<D>() };
    }

    fn notify(&mut self, memory: &GuestMemory, queue: usize) {
        if queue < D::QUEUES && self.registers.running() {
            let outcome = self.device.notify(queue, &mut self.registers.queues, memory);
            self.finish(outcome);
        }
    }

    /// Lets the device use a queue because something came from outside. False if the driver is not ready, or nothing
    /// was used.
    pub(super) fn serve(
        &mut self,
        memory: &GuestMemory,
        work: impl FnOnce(&mut D, &mut [Queue], &GuestMemory) -> Result<bool, Broken>,
    ) -> bool {
        if !self.registers.running() {
            return false;
        }
        let outcome = work(&mut self.device, &mut self.registers.queues, memory);
        self.finish(outcome)
    }

    fn finish(&mut self, outcome: Result<bool, Broken>) -> bool {
        match outcome {
            Ok(used) => {
                self.registers.interrupt_status |= if used { INTERRUPT_USED } else { 0 };
                used
            }
            Err(Broken(_)) => {
                self.registers.needs_reset();
                false
            }
        }
    }

    /// The configuration space has changed.
    pub fn config_changed(&mut self) {
        self.registers.config_generation = self.registers.config_generation.wrapping_add(1);
        if self.registers.status & status::DRIVER_OK != 0 {
            self.registers.interrupt_status |= INTERRUPT_CONFIG;
        }
    }
}

mod saved {
    use proto::v1::VirtioV1;

    use super::*;
    use crate::device::Unfit;

    impl<D: Device> Mmio<D> {
        /// The saved form of the transport.
        pub fn save_transport(&self) -> VirtioV1 {
            // The device has a saved form of its own.
            let Mmio { device: _, registers } = self;
            let Registers {
                device_features_select,
                driver_features_select,
                driver_features,
                queue_select,
                status,
                interrupt_status,
                config_generation,
                queues,
            } = registers;
            VirtioV1 {
                device_features_select: *device_features_select,
                driver_features_select: *driver_features_select,
                driver_features: *driver_features,
                queue_select: *queue_select,
                status: *status,
                interrupt_status: *interrupt_status,
                config_generation: *config_generation,
                queues: queues.iter().map(Queue::save).collect(),
            }
        }

        /// Puts the transport into a saved state. On an error nothing has changed.
        ///
        /// # Errors
        /// A field that it could not hold.
        pub fn restore_transport(&mut self, saved: Option<&VirtioV1>, memory: &GuestMemory) -> Result<(), Unfit> {
            let saved = saved.ok_or(Unfit::new("transport", "nothing", "must be there"))?;
            let status = saved.status;
            let agreed = status & super::status::FEATURES_OK != 0;
            let fits = status & !0xcf == 0 && (agreed || status & super::status::DRIVER_OK == 0);
            Unfit::check(fits, "transport.status", status, "a legal device status")?;
            let foreign = agreed && saved.driver_features & !self.features() != 0;
            Unfit::check(!foreign, "transport.driver_features", saved.driver_features, "features of this device")?;
            let interrupts = saved.interrupt_status;
            Unfit::check(interrupts & !3 == 0, "transport.interrupt_status", interrupts, "two bits")?;
            let count = saved.queues.len();
            Unfit::check(count == D::QUEUES, "transport.queues", count, "as many as the device has")?;
            let queues: Result<Vec<Queue>, Unfit> =
                saved.queues.iter().map(|queue| Queue::restore(D::QUEUE_ENTRIES_MAX, queue, memory)).collect();
            self.registers = Registers {
                device_features_select: saved.device_features_select,
                driver_features_select: saved.driver_features_select,
                driver_features: saved.driver_features,
                queue_select: saved.queue_select,
                status,
                interrupt_status: interrupts,
                config_generation: saved.config_generation,
                queues: queues?,
            };
            Ok(())
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::super::driver::Driver;
    use super::super::rng::Rng;
    use super::*;

    /// Brings a device up as a driver does, its queues at 1 MiB, 2 MiB, ...
    pub fn bring_up<D: Device>(mmio: &mut Mmio<D>, memory: &GuestMemory) -> Vec<Driver> {
        let mut set = |offset, value: u64| mmio.write(memory, offset, 4, value);
        set(0x070, 0);
        set(0x070, 1);
        set(0x070, 3);
        set(0x024, 1);
        set(0x020, 1);
        set(0x070, 11);
        let drivers: Vec<Driver> = (1..=D::QUEUES as u64).map(|n| Driver::new(n << 20, 16)).collect();
        for (n, driver) in drivers.iter().enumerate() {
            let (descriptors, available, used) = driver.addresses();
            set(0x030, n as u64);
            set(0x038, 16);
            set(0x080, descriptors);
            set(0x090, available);
            set(0x0a0, used);
            set(0x044, 1);
        }
        set(0x070, 15);
        assert_eq!(mmio.read(0x070, 4), 15);
        drivers
    }

    fn rng() -> Mmio<Rng> {
        Mmio::new(Rng::new(&[1; 32]))
    }

    #[test]
    fn a_driver_finds_a_version_2_device() {
        let mut mmio = rng();
        let words = [0x000, 0x004, 0x008, 0x00c].map(|offset| mmio.read(offset, 4));
        assert_eq!(words, [0x7472_6976, 2, 4, 0x5457_4447]);
        assert_eq!(mmio.read(0x000, 1), 0, "registers are words");
    }

    #[test]
    fn features_that_were_not_offered_are_not_agreed() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let mut mmio = rng();
        for (select, value) in [(1, 3), (1, 0)] {
            mmio.write(&memory, 0x070, 4, 0);
            mmio.write(&memory, 0x070, 4, 3);
            mmio.write(&memory, 0x024, 4, select);
            mmio.write(&memory, 0x020, 4, value);
            mmio.write(&memory, 0x070, 4, 11);
            assert_eq!(mmio.read(0x070, 4), 3);
        }
    }

    #[test]
    fn interrupts_stay_until_acknowledged_and_reset_forgets_all() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let mut mmio = rng();
        let mut drivers = bring_up(&mut mmio, &memory);
        drivers[0].offer(&memory, &[(0x20_0000, 32, 2)]);
        mmio.write(&memory, 0x050, 4, 0);
        assert!(mmio.interrupt());
        assert_eq!(mmio.read(0x060, 4), 1);
        mmio.write(&memory, 0x064, 4, 1);
        assert!(!mmio.interrupt());
        mmio.config_changed();
        assert!(mmio.interrupt());
        mmio.write(&memory, 0x070, 4, 0);
        assert!(!mmio.interrupt());
        assert_eq!((mmio.read(0x070, 4), mmio.read(0x044, 4), mmio.read(0x0fc, 4)), (0, 0, 1));
    }

    #[test]
    fn a_broken_driver_must_reset() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let mut mmio = rng();
        let mut drivers = bring_up(&mut mmio, &memory);
        drivers[0].offer(&memory, &[(0xffff_0000, 32, 2)]);
        mmio.write(&memory, 0x050, 4, 0);
        assert_eq!((mmio.read(0x070, 4), mmio.read(0x060, 4)), (15 | 64, 2));
        mmio.write(&memory, 0x050, 4, 0);
        assert!(!mmio.running());
        bring_up(&mut mmio, &memory);
        assert!(mmio.running());
    }

    proptest! {
        #[test]
        fn no_writes_panic_and_any_history_survives_saving(writes in proptest::collection::vec((0u64..0x120, any::<u32>(), any::<u8>()), 0..120)) {
            let memory = GuestMemory::create(16 << 20).unwrap();
            let mut mmio = rng();
            for (n, (offset, value, small)) in writes.into_iter().enumerate() {
                if n % 40 == 5 { bring_up(&mut mmio, &memory); }
                let value = if small & 1 == 0 { value } else { u32::from(small >> 1) };
                mmio.write(&memory, offset & !3, 4, value.into());
                let _ = mmio.read(offset & !3, 4);
                let _ = mmio.read(offset, small % 9);
            }
            let mut restored = rng();
            prop_assert_eq!(restored.restore(&mmio.save(), &memory), Ok(()));
            prop_assert_eq!(&restored.registers, &mmio.registers);
        }
    }

    #[test]
    fn hostile_saved_forms_are_refused_by_name() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let mut mmio = rng();
        bring_up(&mut mmio, &memory);
        let good = mmio.save_transport();
        let refused = |change: &dyn Fn(&mut proto::v1::VirtioV1)| {
            let mut saved = good.clone();
            change(&mut saved);
            rng().restore_transport(Some(&saved), &memory).unwrap_err().field
        };
        assert_eq!(refused(&|s| s.status = 0x10), "transport.status");
        assert_eq!(refused(&|s| s.status = 4), "transport.status");
        assert_eq!(refused(&|s| s.driver_features = 1), "transport.driver_features");
        assert_eq!(refused(&|s| s.interrupt_status = 4), "transport.interrupt_status");
        assert_eq!(refused(&|s| s.queues.clear()), "transport.queues");
        assert_eq!(refused(&|s| s.queues[0].size = 65_536), "queues.size");
        assert_eq!(refused(&|s| s.queues[0].used = 0xffff_ffff_ffff_fff0), "queues");
        assert_eq!(rng().restore_transport(None, &memory).unwrap_err().field, "transport");
    }
}

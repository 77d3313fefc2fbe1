//! KVM's paravirtual clock: two pages that the guest names by MSR and the machine fills in (Linux
//! `Documentation/virt/kvm/x86/msr.rst`). The TSC is the machine's own time and never changes its rate, so a page is
//! written once, when the guest asks, and is stable.

use super::{Unfit, nanoseconds};
use crate::memory::GuestMemory;

const WALL_CLOCK_OLD: u32 = 0x11;
const SYSTEM_TIME_OLD: u32 = 0x12;
const WALL_CLOCK: u32 = 0x4b56_4d00;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const ENABLE: u64 = 1;
const TSC_STABLE: u8 = 1;

/// Which pages the guest named, for every vCPU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KvmClock {
    epoch_ns: u64,
    tsc_hz: u64,
    wall_clock: u64,
    wall_version: u32,
    cpus: Vec<Cpu>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Cpu {
    system_time: u64,
    version: u32,
}

impl KvmClock {
    /// A clock that nobody asked yet.
    pub fn new(epoch_ns: u64, tsc_hz: u64, vcpus: usize) -> Self {
        Self { epoch_ns, tsc_hz, wall_clock: 0, wall_version: 0, cpus: vec![Cpu::default(); vcpus] }
    }

    /// The clock after a reset of the machine: nobody asked it.
    pub fn reset(&mut self) {
        *self = Self::new(self.epoch_ns, self.tsc_hz, self.cpus.len());
    }

    /// RDMSR; `None` if the MSR is not of this clock.
    pub fn read(&self, vcpu: usize, msr: u32) -> Option<u64> {
        match msr {
            WALL_CLOCK | WALL_CLOCK_OLD => Some(self.wall_clock),
            SYSTEM_TIME | SYSTEM_TIME_OLD => Some(self.cpus[vcpu].system_time),
            _ => None,
        }
    }

    /// WRMSR; `None` if the MSR is not of this clock. An address that is not RAM is the guest's loss.
    pub fn write(&mut self, memory: &GuestMemory, tsc: u64, vcpu: usize, msr: u32, value: u64) -> Option<()> {
        match msr {
            WALL_CLOCK | WALL_CLOCK_OLD => {
                self.wall_clock = value;
                self.wall_version = next_version(self.wall_version);
                let page = wall_page(self.wall_version, self.epoch_ns);
                let _ = memory.write(value, &page);
            }
            SYSTEM_TIME | SYSTEM_TIME_OLD => {
                self.cpus[vcpu].system_time = value;
                if value & ENABLE != 0 {
                    let cpu = &mut self.cpus[vcpu];
                    cpu.version = next_version(cpu.version);
                    let page = time_page(cpu.version, tsc, self.tsc_hz);
                    let _ = memory.write(value & !ENABLE, &page);
                }
            }
            _ => return None,
        }
        Some(())
    }
}

/// Versions are even: a page is never half written between two instructions of the guest.
fn next_version(version: u32) -> u32 {
    version.wrapping_add(2)
}

/// Wall clock at system time 0: version, seconds, nanoseconds.
fn wall_page(version: u32, epoch_ns: u64) -> [u8; 12] {
    let mut page = [0; 12];
    page[..4].copy_from_slice(&version.to_le_bytes());
    page[4..8].copy_from_slice(&((epoch_ns / 1_000_000_000) as u32).to_le_bytes());
    page[8..].copy_from_slice(&((epoch_ns % 1_000_000_000) as u32).to_le_bytes());
    page
}

/// System time: version, pad, TSC, nanoseconds, multiplier, shift, flags, pad.
fn time_page(version: u32, tsc: u64, tsc_hz: u64) -> [u8; 32] {
    let (multiplier, shift) = scale(tsc_hz);
    let mut page = [0; 32];
    page[..4].copy_from_slice(&version.to_le_bytes());
    page[8..16].copy_from_slice(&tsc.to_le_bytes());
    page[16..24].copy_from_slice(&nanoseconds(tsc, tsc_hz).to_le_bytes());
    page[24..28].copy_from_slice(&multiplier.to_le_bytes());
    page[28] = shift as u8;
    page[29] = TSC_STABLE;
    page
}

/// Multiplier and shift with `ns = (ticks << shift) * multiplier >> 32` (a negative shift is to the right).
fn scale(tsc_hz: u64) -> (u32, i8) {
    let mut hz = u128::from(tsc_hz.max(1));
    let mut shift = 0;
    while hz > 2_000_000_000 {
        hz >>= 1;
        shift -= 1;
    }
    while hz <= 1_000_000_000 {
        hz <<= 1;
        shift += 1;
    }
    (((1_000_000_000u128 << 32) / hz) as u32, shift)
}

mod saved {
    use proto::v1::{KvmClockCpuV1, KvmClockV1};

    use super::*;

    impl KvmClock {
        /// The saved form.
        pub fn save(&self) -> KvmClockV1 {
            // Epoch and rate are configuration.
            let KvmClock { epoch_ns: _, tsc_hz: _, wall_clock, wall_version, cpus } = self;
            let cpus = cpus.iter().map(|cpu| {
                let Cpu { system_time, version } = cpu;
                KvmClockCpuV1 { system_time: *system_time, version: *version }
            });
            KvmClockV1 { wall_clock: *wall_clock, wall_version: *wall_version, cpus: cpus.collect() }
        }

        /// This clock in a saved state.
        ///
        /// # Errors
        /// A field that no clock could hold.
        pub fn restore(&self, saved: &KvmClockV1) -> Result<KvmClock, Unfit> {
            let count = saved.cpus.len();
            Unfit::check(count == self.cpus.len(), "cpus", count, "one for every vCPU")?;
            Unfit::check(saved.wall_version.is_multiple_of(2), "wall_version", saved.wall_version, "even")?;
            let odd = saved.cpus.iter().any(|cpu| !cpu.version.is_multiple_of(2));
            Unfit::check(!odd, "cpus.version", &saved.cpus, "even")?;
            let cpus = saved.cpus.iter().map(|cpu| Cpu { system_time: cpu.system_time, version: cpu.version });
            Ok(KvmClock {
                wall_clock: saved.wall_clock,
                wall_version: saved.wall_version,
                cpus: cpus.collect(),
                ..self.clone()
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest_time(page: &[u8], tsc: u64) -> u64 {
        let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
        let multiplier = u32::from_le_bytes(page[24..28].try_into().unwrap());
        let delta = tsc - word(8);
        let shift = page[28] as i8;
        let shifted = if shift < 0 { delta >> -shift } else { delta << shift };
        word(16) + ((u128::from(shifted) * u128::from(multiplier)) >> 32) as u64
    }

    #[test]
    fn the_guest_computes_our_time() {
        for tsc_hz in [100_000_000u64, 999_999_999, 1_000_000_000, 2_450_000_000, 6_000_000_000] {
            let start = 7 * tsc_hz + 13;
            let page = time_page(2, start, tsc_hz);
            for seconds in [0, 1, 100, 86_400] {
                let tsc = start + seconds * tsc_hz;
                let error = guest_time(&page, tsc).abs_diff(nanoseconds(tsc, tsc_hz));
                assert!(error <= 1 + seconds, "{tsc_hz} Hz, {seconds} s: {error} ns");
            }
        }
    }

    #[test]
    fn pages_are_written_where_the_guest_says() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let mut clock = KvmClock::new(1_700_000_000_000_000_005, 1_000_000_000, 2);
        assert_eq!(clock.write(&memory, 50, 1, SYSTEM_TIME, 0x5000 | ENABLE), Some(()));
        clock.write(&memory, 50, 0, WALL_CLOCK, 0x6000);
        let mut page = [0; 32];
        memory.read(0x5000, &mut page).unwrap();
        assert_eq!((guest_time(&page, 60), page[29], page[0]), (60, TSC_STABLE, 2));
        let mut wall = [0; 12];
        memory.read(0x6000, &mut wall).unwrap();
        assert_eq!(u32::from_le_bytes(wall[4..8].try_into().unwrap()), 1_700_000_000);
        assert_eq!((clock.read(1, SYSTEM_TIME_OLD), clock.read(0, SYSTEM_TIME)), (Some(0x5001), Some(0)));
        assert_eq!(clock.read(0, 0x4b56_4d02), None);
    }

    #[test]
    fn an_address_that_is_not_ram_harms_nobody() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let mut clock = KvmClock::new(0, 1, 1);
        assert_eq!(clock.write(&memory, 0, 0, SYSTEM_TIME, u64::MAX), Some(()));
        assert_eq!(clock.write(&memory, 0, 0, WALL_CLOCK, u64::MAX), Some(()));
    }

    #[test]
    fn saved_forms_survive_or_are_refused_by_name() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let fresh = KvmClock::new(5, 1_000_000_000, 2);
        let mut clock = fresh.clone();
        clock.write(&memory, 9, 1, SYSTEM_TIME, 0x5001);
        clock.write(&memory, 9, 0, WALL_CLOCK, 0x6000);
        let saved = clock.save();
        assert_eq!(fresh.restore(&saved), Ok(clock));
        let field = |saved| fresh.restore(&saved).unwrap_err().field;
        assert_eq!(field(proto::v1::KvmClockV1 { cpus: Vec::new(), ..saved.clone() }), "cpus");
        assert_eq!(field(proto::v1::KvmClockV1 { wall_version: 3, ..saved }), "wall_version");
    }
}

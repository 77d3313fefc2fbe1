//! What is fuzzed, apart from who makes the inputs: libFuzzer (`fuzz_targets`) or the seeded mutations of the smoke test.
//!
//! A body takes any bytes and must not panic, unless something that must hold for every input does not. It makes everything
//! it needs from the input and keeps nothing, so an input alone repeats a failure. Bodies use only what the crates offer to
//! everybody.

pub mod frame;
pub mod journal;
pub mod sections;
pub mod virtqueue;
pub mod vmcb;
pub mod x86;

use std::sync::Arc;

use vmcb_engine::device::block::DiskImage;
use vmcb_engine::device::bus::{Bus, Fitting};
use vmcb_engine::memory::{GuestMemory, sized_memfd};

/// A body with what it starts from.
pub struct Target {
    /// Its name, also of its corpus.
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
    /// Inputs that reach deep: (name, bytes).
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
}

/// All of them.
pub const TARGETS: [Target; 6] = [
    Target { name: "frame", run: frame::run, seeds: frame::seeds },
    Target { name: "journal", run: journal::run, seeds: journal::seeds },
    Target { name: "sections", run: sections::run, seeds: sections::seeds },
    Target { name: "vmcb", run: vmcb::run, seeds: vmcb::seeds },
    Target { name: "x86", run: x86::run, seeds: x86::seeds },
    Target { name: "virtqueue", run: virtqueue::run, seeds: virtqueue::seeds },
];

/// Bytes taken from the front; zeros when there are no more.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// At most so many bytes.
    pub fn take(&mut self, most: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(most.min(self.0.len()));
        self.0 = tail;
        head
    }

    /// A number of so many bytes, at most 8.
    pub fn number(&mut self, bytes: usize) -> u64 {
        self.take(bytes).iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        self.number(1) as u8
    }
}

/// RAM of 16 MiB.
pub fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::create(16 << 20).expect("the host has 16 MiB"))
}

/// Devices of a small machine: two vCPUs, a disk of 1 MiB, a network card, the entropy device.
pub fn bus(memory: &Arc<GuestMemory>) -> Bus {
    let disk = sized_memfd("fuzzed-disk", 1 << 20).expect("the host has 1 MiB");
    let disk = DiskImage::from_fd(disk, false).expect("a disk of whole sectors");
    let fitting = Fitting {
        vcpus: 2,
        seed: [7; 32],
        epoch_ns: 1_767_225_600_000_000_000,
        tsc_hz: 1_000_000_000,
        disks: vec![disk],
        nets: vec![([0x52, 0x54, 0, 0, 0, 1], None)],
    };
    Bus::new(Arc::clone(memory), fitting)
}

/// Numbers that look random: SplitMix64.
pub fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

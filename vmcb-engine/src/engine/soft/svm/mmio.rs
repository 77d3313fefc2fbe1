//! One instruction emulated for the host: the host got #NPF for an address that is not RAM (or IOIO for a string
//! instruction), and has the processor run exactly that instruction with devices answering.
//!
//! Devices see every access once: the intercepted attempt never reached them, and the emulated one calls them at the
//! moment of the access. Intercepts of instructions do not count meanwhile; exceptions do.
#![allow(unsafe_code, reason = "the platform is lent to the processor for one instruction; a lifetime cannot say that")]

use std::ptr::NonNull;

use crate::engine::Platform;
use crate::engine::soft::core::Core;
use crate::engine::soft::op::Flow;

/// Where accesses that are not RAM go while an instruction is emulated.
#[derive(Default)]
pub struct MmioPort {
    platform: Option<NonNull<dyn Platform>>,
    tsc: u64,
}

// SAFETY: the pointer is there only while `Core::emulate_one` borrows the processor; it cannot be sent meanwhile.
unsafe impl Send for MmioPort {}

impl MmioPort {
    /// True while an instruction is emulated.
    #[inline]
    pub fn emulating(&self) -> bool {
        self.platform.is_some()
    }

    fn platform(&mut self) -> Option<&mut dyn Platform> {
        // SAFETY: `Core::emulate_one` has the only reference to the platform, puts the pointer here, and takes it away
        // before it returns; the reference made here does not outlive this access.
        self.platform.map(|mut platform| unsafe { platform.as_mut() })
    }

    /// Loads from a device. Pieces are naturally aligned powers of two, as on a bus. Without a device: all ones.
    pub fn read(&mut self, gpa: u64, into: &mut [u8]) {
        let tsc = self.tsc;
        for (at, size) in pieces(gpa, into.len()) {
            let value =
                self.platform().map_or(u64::MAX, |platform| platform.mmio_read(tsc, gpa + at as u64, size as u8));
            into[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }

    /// Stores to a device. Without a device: nothing.
    pub fn write(&mut self, gpa: u64, from: &[u8]) {
        let tsc = self.tsc;
        for (at, size) in pieces(gpa, from.len()) {
            let mut value = [0; 8];
            value[..size].copy_from_slice(&from[at..at + size]);
            if let Some(platform) = self.platform() {
                platform.mmio_write(tsc, gpa + at as u64, size as u8, u64::from_le_bytes(value));
            }
        }
    }

    /// IN. Without a device: all ones.
    pub fn input(&mut self, port: u16, size: u8) -> u32 {
        let tsc = self.tsc;
        self.platform().map_or(u32::MAX, |platform| platform.io_read(tsc, port, size))
    }

    /// OUT. Without a device: nothing.
    pub fn output(&mut self, port: u16, size: u8, value: u32) {
        let tsc = self.tsc;
        if let Some(platform) = self.platform() {
            platform.io_write(tsc, port, size, value);
        }
    }
}

fn pieces(gpa: u64, bytes: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = bytes - at;
        if left == 0 {
            return None;
        }
        let aligned = 1 << ((gpa + at as u64) | 8).trailing_zeros();
        let largest = 1 << left.min(8).ilog2();
        let piece = (at, aligned.min(largest));
        at += piece.1;
        Some(piece)
    })
}

impl Core {
    /// Runs one instruction (or one part of a repeated one) of the loaded guest with `platform` answering what is not
    /// RAM. `tsc` is the machine's clock.
    pub fn emulate_one(&mut self, platform: &mut dyn Platform, tsc: u64) -> Flow {
        let erased: NonNull<dyn Platform + '_> = NonNull::from(platform);
        // SAFETY: only the lifetime changes; the pointer is taken away again below, before `platform` can die, and
        // nothing in between unwinds past this frame with the processor still in use.
        self.mmio.platform =
            Some(unsafe { std::mem::transmute::<NonNull<dyn Platform + '_>, NonNull<dyn Platform>>(erased) });
        self.mmio.tsc = tsc;
        let flow = self.step_one();
        self.mmio.platform = None;
        flow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_powers_of_two() {
        let of = |gpa, bytes| pieces(gpa, bytes).collect::<Vec<_>>();
        assert_eq!(of(0x1000, 8), [(0, 8)]);
        assert_eq!(of(0x1000, 16), [(0, 8), (8, 8)]);
        assert_eq!(of(0x1002, 4), [(0, 2), (2, 2)]);
        assert_eq!(of(0x1001, 3), [(0, 1), (1, 2)]);
    }
}

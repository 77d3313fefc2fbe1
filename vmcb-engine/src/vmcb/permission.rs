//! The two permission maps that a VMCB points at: IOPM (APM2 15.10.1) and MSRPM (APM2 15.11).
//!
//! Both are plain bytes in host memory; positions are also given as functions, so that a processor may read a map
//! where it lies. MSRs outside of the three ranges of the MSRPM are always intercepted while MSR_PROT is set. This file
//! refuses to know the intercept bits that turn the maps on.

use zerocopy::FromBytes;

/// Bytes of the IOPM: 64 K bits and the two pages' worth of rounding that lets port FFFFh have a size.
pub const IOPM_BYTES: usize = 12 << 10;
/// Bytes of the MSRPM.
pub const MSRPM_BYTES: usize = 8 << 10;

/// Width of a port access in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PortSize {
    /// 8 bits.
    Byte = 1,
    /// 16 bits.
    Word = 2,
    /// 32 bits.
    Double = 4,
}

/// Direction of an MSR access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MsrAccess {
    /// RDMSR: the low bit of the pair.
    Read = 0,
    /// WRMSR: the high bit of the pair.
    Write = 1,
}

/// Bits of the IOPM that an access of `size` bytes at `port` consults: numbers of bits, not wrapping at 64 K.
pub const fn iopm_bits(port: u16, size: PortSize) -> std::ops::Range<usize> {
    port as usize..port as usize + size as usize
}

/// Bit number in the MSRPM of an access to `msr`; `None` outside of the three ranges.
pub const fn msrpm_bit(msr: u32, access: MsrAccess) -> Option<usize> {
    let (start, first) = match msr {
        0x0000_0000..=0x0000_1fff => (0x000, 0x0000_0000),
        0xc000_0000..=0xc000_1fff => (0x800, 0xc000_0000),
        0xc001_0000..=0xc001_1fff => (0x1000, 0xc001_0000),
        _ => return None,
    };
    Some(start * 8 + (msr - first) as usize * 2 + access as usize)
}

fn bit_is_set(map: &[u8], bit: usize) -> bool {
    map[bit / 8] & (1 << (bit % 8)) != 0
}

fn put_bit(map: &mut [u8], bit: usize, on: bool) {
    let mask = 1 << (bit % 8);
    if on {
        map[bit / 8] |= mask;
    } else {
        map[bit / 8] &= !mask;
    }
}

macro_rules! map {
    ($(#[$meta:meta])* $name:ident[$size:expr]) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Eq, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)]
        #[repr(C)]
        pub struct $name([u8; $size]);

        impl $name {
            /// A map that intercepts nothing.
            pub fn none() -> Box<Self> {
                Box::new(Self([0; $size]))
            }

            /// A map that intercepts everything.
            pub fn all() -> Box<Self> {
                Box::new(Self([0xff; $size]))
            }

            /// From bytes in memory; `None` if the length is wrong.
            pub fn from_bytes(bytes: &[u8]) -> Option<Box<Self>> {
                Self::read_from_bytes(bytes).ok().map(Box::new)
            }

            /// The bytes as they must lie in memory.
            pub fn as_bytes(&self) -> &[u8; $size] {
                &self.0
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let bits: u32 = self.0.iter().map(|byte| byte.count_ones()).sum();
                write!(f, concat!(stringify!($name), " {{ {} bits set, .. }}"), bits)
            }
        }
    };
}

map! {
    /// I/O permission map: a set bit intercepts the port.
    Iopm[IOPM_BYTES]
}

map! {
    /// MSR permission map: two bits an MSR, read below write.
    Msrpm[MSRPM_BYTES]
}

impl Iopm {
    /// Intercepts every byte of the access.
    pub fn set(&mut self, port: u16, size: PortSize) {
        iopm_bits(port, size).for_each(|bit| put_bit(&mut self.0, bit, true));
    }

    /// Lets every byte of the access pass.
    pub fn clear(&mut self, port: u16, size: PortSize) {
        iopm_bits(port, size).for_each(|bit| put_bit(&mut self.0, bit, false));
    }

    /// True if the access is intercepted: any of its bytes is.
    pub fn intercepts(&self, port: u16, size: PortSize) -> bool {
        iopm_bits(port, size).any(|bit| bit_is_set(&self.0, bit))
    }
}

impl Msrpm {
    /// Intercepts the access; `false` if the MSR lies outside of the map (it is intercepted anyway).
    pub fn set(&mut self, msr: u32, access: MsrAccess) -> bool {
        self.put(msr, access, true)
    }

    /// Lets the access pass; `false` if the MSR lies outside of the map and cannot pass.
    pub fn clear(&mut self, msr: u32, access: MsrAccess) -> bool {
        self.put(msr, access, false)
    }

    fn put(&mut self, msr: u32, access: MsrAccess, on: bool) -> bool {
        msrpm_bit(msr, access).map(|bit| put_bit(&mut self.0, bit, on)).is_some()
    }

    /// True if the access is intercepted; always true outside of the three ranges.
    pub fn intercepts(&self, msr: u32, access: MsrAccess) -> bool {
        msrpm_bit(msr, access).is_none_or(|bit| bit_is_set(&self.0, bit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn size() -> impl Strategy<Value = PortSize> {
        prop_oneof![Just(PortSize::Byte), Just(PortSize::Word), Just(PortSize::Double)]
    }

    proptest! {
        #[test]
        fn a_port_is_set_alone_and_cleared_alone(port: u16, size in size()) {
            let mut map = Iopm::none();
            map.set(port, size);
            prop_assert!(map.intercepts(port, size));
            prop_assert_eq!(map.as_bytes().iter().map(|byte| byte.count_ones()).sum::<u32>(), size as u32);
            // An access that only touches the last byte is intercepted as well.
            if let Some(last) = port.checked_add(size as u16 - 1) {
                prop_assert!(map.intercepts(last, PortSize::Byte));
            }
            map.clear(port, size);
            prop_assert_eq!(map, Iopm::none());
        }

        #[test]
        fn no_msr_panics_and_only_three_ranges_can_pass(msr: u32) {
            let mapped = matches!(msr >> 13, 0 | 0x6_0000) || (0xc001_0000..0xc001_2000).contains(&msr);
            prop_assert_eq!(!Msrpm::none().intercepts(msr, MsrAccess::Write), mapped);
            prop_assert!(Msrpm::all().intercepts(msr, MsrAccess::Read));
            let mut map = Msrpm::none();
            prop_assert_eq!(map.set(msr, MsrAccess::Write), mapped);
            prop_assert!(map.intercepts(msr, MsrAccess::Write));
            prop_assert_eq!(map.intercepts(msr, MsrAccess::Read), !mapped);
        }
    }

    #[test]
    fn positions_as_the_manual_counts_them() {
        assert_eq!(msrpm_bit(0, MsrAccess::Read), Some(0));
        assert_eq!(msrpm_bit(0x1fff, MsrAccess::Write), Some(0x800 * 8 - 1));
        assert_eq!(msrpm_bit(0xc000_0080, MsrAccess::Read), Some(0x820 * 8));
        assert_eq!(msrpm_bit(0xc001_1fff, MsrAccess::Write), Some(0x1800 * 8 - 1));
        assert_eq!(Msrpm::from_bytes(&[0; 4096]), None);
        assert_eq!(Iopm::from_bytes(&[0; IOPM_BYTES]), Some(Iopm::none()));
    }
}

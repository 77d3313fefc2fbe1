//! A named run of bits inside a VMCB word, and the macro that declares a page area row by row.
//!
//! Words with several meanings stay raw integers; a [`Bits`] reads or replaces its own bits and leaves every other
//! bit, known or unknown, as it was. That is what the bit-fields of older headers got wrong.

/// A run of bits: `shift` is its lowest bit, `width` the number of bits (1..=64).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bits {
    shift: u32,
    width: u32,
}

impl Bits {
    /// The single bit `number`.
    pub const fn bit(number: u32) -> Self {
        Self::range(number, number)
    }

    /// Bits `high:low`, both included, as the manual writes them.
    pub const fn range(high: u32, low: u32) -> Self {
        assert!(high < 64 && low <= high);
        Self { shift: low, width: high - low + 1 }
    }

    /// Lowest bit.
    pub const fn shift(self) -> u32 {
        self.shift
    }

    /// Number of bits.
    pub const fn width(self) -> u32 {
        self.width
    }

    /// The bits as a mask in place.
    pub const fn mask(self) -> u64 {
        (u64::MAX >> (64 - self.width)) << self.shift
    }

    /// The value of these bits, shifted down.
    pub const fn get(self, word: u64) -> u64 {
        (word & self.mask()) >> self.shift
    }

    /// True if any of these bits is set.
    pub const fn is_set(self, word: u64) -> bool {
        word & self.mask() != 0
    }

    /// `word` with these bits replaced by the low bits of `value`; all others survive.
    #[must_use]
    pub const fn with(self, word: u64, value: u64) -> u64 {
        (word & !self.mask()) | ((value << self.shift) & self.mask())
    }

    /// Replaces these bits inside `word`.
    pub const fn put(self, word: &mut u64, value: u64) {
        *word = self.with(*word, value);
    }
}

/// A run of bits with the name that the manual gives it; single bits print as flags, longer runs as `NAME=value`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NamedBits {
    /// The manual's name.
    pub name: &'static str,
    /// Where it lies.
    pub bits: Bits,
}

impl NamedBits {
    /// Names `bits`.
    pub const fn new(name: &'static str, bits: Bits) -> Self {
        Self { name, bits }
    }
}

/// One row of an area's layout table: what decode, raw access and the layout test iterate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayoutRow {
    /// The manual's name of the row, or `reserved`.
    pub name: &'static str,
    /// Byte offset inside the area.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
}

impl LayoutRow {
    /// True for rows that the manual reserves.
    pub fn is_reserved(&self) -> bool {
        self.name == "reserved"
    }
}

/// Declares a `repr(C)` area. Each row is `offset field: type, "ROW NAME"`; the offset of every field and the size of
/// the whole are checked at compile time, and absence of padding by zerocopy's `IntoBytes`.
macro_rules! area {
    ($(#[$meta:meta])* pub struct $area:ident[$size:literal] {
        $($offset:literal $field:ident: $type:ty, $row:literal;)*
    }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(
            Clone, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        pub struct $area {
            $(
                #[doc = concat!("Offset ", stringify!($offset), ": ", $row, ".")]
                pub $field: $type,
            )*
        }

        $(const _: () = assert!(
            std::mem::offset_of!($area, $field) == $offset,
            concat!(stringify!($field), " is not at ", stringify!($offset)),
        );)*
        const _: () = assert!(std::mem::size_of::<$area>() == $size);

        impl $area {
            /// Every row, in order of offset, reserved ones included.
            pub const LAYOUT: &'static [$crate::vmcb::bits::LayoutRow] = &[$(
                $crate::vmcb::bits::LayoutRow { name: $row, offset: $offset, size: std::mem::size_of::<$type>() },
            )*];
        }

        impl Default for $area {
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }
    };
}
pub(crate) use area;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_bits_survive_a_write() {
        let prio = Bits::range(19, 16);
        assert_eq!(prio.with(u64::MAX, 0), !0xf_0000);
        assert_eq!(prio.with(0, 0x1ff), 0xf_0000);
        assert_eq!(Bits::range(63, 0).mask(), u64::MAX);
        assert_eq!(Bits::bit(63).get(u64::MAX), 1);
    }
}

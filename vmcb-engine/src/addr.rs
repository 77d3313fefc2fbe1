//! Addresses and pages: the few facts of APM vol. 2 ch. 5 that every other room needs.
//!
//! A guest-physical address is a type of its own, so that it is never taken for an index into RAM or for a
//! host pointer. This room refuses to know where memory lies.

use std::fmt;

/// Bytes of a page, everywhere in this crate.
pub const PAGE_SIZE: usize = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of a large page (APM2 5.3): guest RAM is a multiple of it.
pub const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// A guest-physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestPhys(pub u64);

impl GuestPhys {
    /// First address of guest-physical page `number`.
    pub const fn of_page(number: u64) -> Self {
        Self(number << PAGE_SHIFT)
    }

    /// Guest-physical page number.
    pub const fn page(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }

    /// Byte offset inside the page.
    pub const fn offset(self) -> usize {
        (self.0 & (PAGE_SIZE as u64 - 1)) as usize
    }

    /// The address `bytes` further, or `None` past the end of the address space.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

impl fmt::Display for GuestPhys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for GuestPhys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestPhys({:#x})", self.0)
    }
}

/// `value` rounded down to a page boundary.
pub const fn page_floor(value: u64) -> u64 {
    value & !(PAGE_SIZE as u64 - 1)
}

/// `value` rounded up to a page boundary; `None` when that does not fit in 64 bits.
pub const fn page_ceil(value: u64) -> Option<u64> {
    match value.checked_add(PAGE_SIZE as u64 - 1) {
        Some(sum) => Some(page_floor(sum)),
        None => None,
    }
}

/// True if `value` is a canonical linear address for `bits` of linear address (APM2 5.3.1): 48, or 57 with CR4.LA57.
pub const fn is_canonical(value: u64, bits: u32) -> bool {
    let shift = 64 - bits;
    (((value << shift) as i64) >> shift) as u64 == value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_split_and_join() {
        let address = GuestPhys(0x1234_5678);
        assert_eq!((address.page(), address.offset()), (0x12345, 0x678));
        assert_eq!(GuestPhys::of_page(0x12345), GuestPhys(0x1234_5000));
        assert_eq!(GuestPhys(u64::MAX).checked_add(1), None);
        assert_eq!(page_floor(0x1fff), 0x1000);
        assert_eq!(page_ceil(0x1001), Some(0x2000));
        assert_eq!(page_ceil(u64::MAX), None);
    }

    #[test]
    fn canonical_means_sign_extended() {
        assert!(is_canonical(0x0000_7fff_ffff_ffff, 48));
        assert!(!is_canonical(0x0000_8000_0000_0000, 48));
        assert!(is_canonical(0xffff_8000_0000_0000, 48));
        assert!(is_canonical(0x0000_8000_0000_0000, 57));
    }
}

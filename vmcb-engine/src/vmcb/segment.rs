//! Segment registers as the VMCB holds them, and their conversion from and to descriptor-table bytes.
//!
//! Source: APM2 4.7-4.8 (descriptors), 15.5.1 "segment state in the VMCB", table B-2. The attribute is 12 bits:
//! descriptor bits 47:40 (type, S, DPL, P) joined with 55:52 (AVL, L, D/B, G). Limits are stored expanded, in bytes.
//! This room refuses to know which segment may be loaded when: that is the processor's business.

use crate::vmcb::bits::Bits;

/// Attribute bits 3:0: segment type (APM2 4.7.2, 4.8.3).
pub const ATTRIB_TYPE: Bits = Bits::range(3, 0);
/// Attribute bit 4: S, 1 for code and data, 0 for system segments.
pub const ATTRIB_S: Bits = Bits::bit(4);
/// Attribute bits 6:5: descriptor privilege level.
pub const ATTRIB_DPL: Bits = Bits::range(6, 5);
/// Attribute bit 7: present. A segment without it is unusable ("null").
pub const ATTRIB_P: Bits = Bits::bit(7);
/// Attribute bit 8: available to software.
pub const ATTRIB_AVL: Bits = Bits::bit(8);
/// Attribute bit 9: L, 64-bit code.
pub const ATTRIB_L: Bits = Bits::bit(9);
/// Attribute bit 10: D/B, default operand size.
pub const ATTRIB_DB: Bits = Bits::bit(10);
/// Attribute bit 11: G, limit counted in pages.
pub const ATTRIB_G: Bits = Bits::bit(11);
/// The bits that exist; the upper four of the 16-bit field are reserved and survive untouched.
pub const ATTRIB_MASK: u16 = 0x0fff;

/// One segment register: 16 bytes of table B-2.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Debug,
    Default,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::Immutable,
    zerocopy::KnownLayout,
)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Attributes, packed in 12 bits.
    pub attrib: u16,
    /// Limit in bytes, already expanded by G.
    pub limit: u32,
    /// Base address.
    pub base: u64,
}

const _: () = assert!(std::mem::offset_of!(Segment, selector) == 0);
const _: () = assert!(std::mem::offset_of!(Segment, attrib) == 2);
const _: () = assert!(std::mem::offset_of!(Segment, limit) == 4);
const _: () = assert!(std::mem::offset_of!(Segment, base) == 8);
const _: () = assert!(std::mem::size_of::<Segment>() == 16);

impl Segment {
    /// A segment from its four parts.
    pub const fn new(selector: u16, attrib: u16, limit: u32, base: u64) -> Self {
        Self { selector, attrib, limit, base }
    }

    /// Type field.
    pub const fn kind(&self) -> u8 {
        ATTRIB_TYPE.get(self.attrib as u64) as u8
    }

    /// Code or data, not a system segment.
    pub const fn is_code_or_data(&self) -> bool {
        ATTRIB_S.is_set(self.attrib as u64)
    }

    /// Code segment.
    pub const fn is_code(&self) -> bool {
        self.is_code_or_data() && self.kind() & 8 != 0
    }

    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        ATTRIB_DPL.get(self.attrib as u64) as u8
    }

    /// Present; false means unusable.
    pub const fn present(&self) -> bool {
        ATTRIB_P.is_set(self.attrib as u64)
    }

    /// 64-bit code.
    pub const fn long(&self) -> bool {
        ATTRIB_L.is_set(self.attrib as u64)
    }

    /// D/B: 32-bit default.
    pub const fn big(&self) -> bool {
        ATTRIB_DB.is_set(self.attrib as u64)
    }

    /// G: the descriptor counts its limit in pages.
    pub const fn granular(&self) -> bool {
        ATTRIB_G.is_set(self.attrib as u64)
    }

    /// Replaces one attribute; the others, reserved ones included, survive.
    pub const fn set_attrib(&mut self, bits: Bits, value: u64) {
        self.attrib = bits.with(self.attrib as u64, value) as u16;
    }

    /// Hidden part from the low eight bytes of a descriptor (APM2 4.7.1, figure 4-13).
    pub const fn from_descriptor(selector: u16, descriptor: u64) -> Self {
        let attrib = ((descriptor >> 40) & 0xff) | ((descriptor >> 44) & 0xf00);
        let raw_limit = (descriptor & 0xffff) | ((descriptor >> 32) & 0xf_0000);
        let limit = if ATTRIB_G.is_set(attrib) { (raw_limit << 12) | 0xfff } else { raw_limit };
        let base = ((descriptor >> 16) & 0xff_ffff) | ((descriptor >> 32) & 0xff00_0000);
        Self { selector, attrib: attrib as u16, limit: limit as u32, base }
    }

    /// Hidden part from a 16-byte system descriptor of long mode (APM2 4.8.3): LDT, TSS.
    pub const fn from_system_descriptor(selector: u16, low: u64, high: u64) -> Self {
        let mut segment = Self::from_descriptor(selector, low);
        segment.base |= (high & 0xffff_ffff) << 32;
        segment
    }

    /// The low eight bytes of a descriptor that would load this segment; base bits 63:32 need
    /// [`Segment::to_system_descriptor`]. With G set, the limit loses its low 12 bits, as any descriptor does.
    pub const fn to_descriptor(&self) -> u64 {
        let attrib = (self.attrib & ATTRIB_MASK) as u64;
        let limit = if self.granular() { self.limit >> 12 } else { self.limit } as u64;
        (limit & 0xffff)
            | ((self.base & 0xff_ffff) << 16)
            | ((attrib & 0xff) << 40)
            | ((limit & 0xf_0000) << 32)
            | ((attrib & 0xf00) << 44)
            | ((self.base & 0xff00_0000) << 32)
    }

    /// Both halves of a 16-byte system descriptor.
    pub const fn to_system_descriptor(&self) -> (u64, u64) {
        (self.to_descriptor(), self.base >> 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn flat_64_bit_code_descriptor() {
        let code = Segment::from_descriptor(0x10, 0x00af_9b00_0000_ffff);
        assert_eq!(code, Segment::new(0x10, 0xa9b, 0xffff_ffff, 0));
        assert!(code.long() && !code.big() && code.present() && code.is_code() && code.dpl() == 0);
        assert_eq!(code.to_descriptor(), 0x00af_9b00_0000_ffff);
    }

    #[test]
    fn byte_limits_are_not_expanded() {
        let tss = Segment::from_system_descriptor(0x40, 0x8900_8b12_3456_2087, 0xffff_8880);
        assert_eq!(tss, Segment::new(0x40, 0x08b, 0x2087, 0xffff_8880_8912_3456));
        assert_eq!(tss.to_system_descriptor(), (0x8900_8b12_3456_2087, 0xffff_8880));
    }

    proptest! {
        #[test]
        fn any_descriptor_survives_the_round_trip(low: u64, high: u32, selector: u16) {
            let segment = Segment::from_system_descriptor(selector, low, u64::from(high));
            prop_assert_eq!(segment.to_system_descriptor(), (low, u64::from(high)));
        }
    }
}

//! The Virtual Machine Control Block: one page of APM vol. 2 (rev. 3.44) appendix B.
//!
//! | file | what |
//! |---|---|
//! | `control`, `save` | the two areas, row by row, every offset checked at compile time |
//! | `bits` | named runs of bits; unknown bits survive every write |
//! | `segment`, `event`, `exit`, `intercept`, `permission` | the words inside and the maps beside it |
//! | `access` | registers by name, and any (offset, width) |
//! | `registers` | bits of control registers, EFER, RFLAGS, debug registers |
//! | `check` | the consistency checks of VMRUN as a pure list of violations |
//! | `decode` | the page for people: rows and differences |
//!
//! This room refuses to know who runs the VMCB: the software processor, KVM, or nobody. It never fails on any 4096
//! bytes, whatever they hold.

pub mod access;
pub mod bits;
pub mod check;
pub mod control;
pub mod decode;
pub mod event;
pub mod exit;
pub mod intercept;
pub mod permission;
pub mod registers;
pub mod save;
pub mod segment;

use zerocopy::{FromBytes, IntoBytes};

pub use access::{Access, Descriptor, Register, SegmentRegister, Snapshot, Width};
pub use bits::Bits;
pub use control::{ControlArea, clean, tlb_control};
pub use event::{Event, EventType};
pub use exit::{ExitCode, IoInfo, npf};
pub use intercept::Intercept;
pub use permission::{Iopm, MsrAccess, Msrpm, PortSize};
pub use save::SaveArea;
pub use segment::Segment;

use crate::addr::PAGE_SIZE;

#[cfg(target_endian = "big")]
compile_error!("VMCB words are little-endian in memory");

/// The page. Words are little-endian, as is every host that this is built for.
#[repr(C)]
#[derive(
    Clone, PartialEq, Eq, Default, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
)]
pub struct Vmcb {
    /// 000h-3FFh.
    pub control: ControlArea,
    /// 400h-FFFh.
    pub save: SaveArea,
}

/// Where the state-save area starts.
pub const SAVE_OFFSET: usize = 0x400;

const _: () = assert!(std::mem::size_of::<Vmcb>() == PAGE_SIZE);
const _: () = assert!(std::mem::offset_of!(Vmcb, control) == 0);
const _: () = assert!(std::mem::offset_of!(Vmcb, save) == SAVE_OFFSET);

impl Vmcb {
    /// A page of zeros, on the heap.
    pub fn boxed() -> Box<Vmcb> {
        Box::default()
    }

    /// A copy of any 4096 bytes.
    pub fn from_bytes(bytes: &[u8; PAGE_SIZE]) -> Vmcb {
        Self::read_from_bytes(bytes).expect("the array has the size of the page")
    }

    /// The page as it lies in memory.
    pub fn as_page(&self) -> &[u8; PAGE_SIZE] {
        self.as_bytes().try_into().expect("the page has 4096 bytes")
    }

    /// The page as it lies in memory, writable: every byte pattern is a VMCB.
    pub fn as_page_mut(&mut self) -> &mut [u8; PAGE_SIZE] {
        self.as_mut_bytes().try_into().expect("the page has 4096 bytes")
    }
}

impl std::fmt::Debug for Vmcb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vmcb {{ exit {}, rip {:#x}, .. }}", self.control.exit_code(), self.save.rip)
    }
}

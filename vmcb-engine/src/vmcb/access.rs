//! Registers of a VMCB by identifier, and any bytes of it by (offset, width).
//!
//! The model is the ancestor's `vmcb_read`/`vmcb_write`, `vmcb_seg`, `vmcb_getdesc`/`vmcb_setdesc`,
//! `vmcb_getany`/`vmcb_setany`, `vmcb_snapshot_desc`/`vmcb_snapshot_any` and `VMCB_ACCESS(o, w)` of bhyve
//! (`sys/amd64/vmm/amd/vmcb.c`). A write clears the clean bits of its group (APM2 15.15.1). This file refuses to judge
//! values: `check` does.

use crate::addr::PAGE_SIZE;
use crate::vmcb::segment::{ATTRIB_MASK, Segment};
use crate::vmcb::{Vmcb, clean};

/// A segment or descriptor-table register, in the order of the save area.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum SegmentRegister {
    /// ES.
    Es = 0,
    /// CS.
    Cs = 1,
    /// SS.
    Ss = 2,
    /// DS.
    Ds = 3,
    /// FS.
    Fs = 4,
    /// GS.
    Gs = 5,
    /// GDTR.
    Gdtr = 6,
    /// LDTR.
    Ldtr = 7,
    /// IDTR.
    Idtr = 8,
    /// TR.
    Tr = 9,
}

impl SegmentRegister {
    /// All ten, in order.
    pub const ALL: [SegmentRegister; 10] =
        [Self::Es, Self::Cs, Self::Ss, Self::Ds, Self::Fs, Self::Gs, Self::Gdtr, Self::Ldtr, Self::Idtr, Self::Tr];

    /// Clean-bit group that covers it; FS, GS, LDTR and TR are VMLOAD's and have none.
    pub const fn clean_group(self) -> u32 {
        match self {
            Self::Es | Self::Cs | Self::Ss | Self::Ds => clean::SEG,
            Self::Gdtr | Self::Idtr => clean::DT,
            Self::Fs | Self::Gs | Self::Ldtr | Self::Tr => 0,
        }
    }
}

/// Bytes of one raw access.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Width {
    /// 8 bits.
    Byte = 1,
    /// 16 bits.
    Word = 2,
    /// 32 bits.
    Double = 4,
    /// 64 bits.
    Quad = 8,
}

/// `VMCB_ACCESS(offset, width)`: a place in the page that certainly lies inside it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Access {
    offset: u16,
    width: Width,
}

impl Access {
    /// `None` if the access would leave the page.
    pub const fn new(offset: u16, width: Width) -> Option<Access> {
        if offset as usize + width as usize <= PAGE_SIZE { Some(Access { offset, width }) } else { None }
    }

    /// Offset inside the page.
    pub const fn offset(self) -> usize {
        self.offset as usize
    }

    /// Bytes.
    pub const fn width(self) -> usize {
        self.width as usize
    }
}

macro_rules! registers {
    ($($name:ident $area:ident.$field:ident $group:ident;)*) => {
        /// A 64-bit register of a VMCB, a selector, or a raw access.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Register {
            $(
                #[doc = concat!("`", stringify!($area), ".", stringify!($field), "`.")]
                $name,
            )*
            /// Selector of a segment; table registers have none and read as stored.
            Selector(SegmentRegister),
            /// Any bytes.
            Raw(Access),
        }

        impl Register {
            /// Every register that has a name.
            pub const NAMED: &'static [Register] = &[$(Register::$name),*];
        }

        impl Vmcb {
            /// Reads a register. Narrow values are zero-extended.
            pub fn read(&self, register: Register) -> u64 {
                match register {
                    $(Register::$name => self.$area.$field,)*
                    Register::Selector(segment) => u64::from(self.segment(segment).selector),
                    Register::Raw(access) => self.read_any(access),
                }
            }

            /// Writes a register and drops the clean bits that cover it. Narrow places take the low bits.
            pub fn write(&mut self, register: Register, value: u64) {
                match register {
                    $(Register::$name => {
                        self.$area.$field = value;
                        self.control.mark_dirty(clean::$group);
                    })*
                    Register::Selector(segment) => self.segment_mut(segment).selector = value as u16,
                    Register::Raw(access) => self.write_any(access, value),
                }
            }
        }
    };
}

registers! {
    Cr0 save.cr0 CRX;
    Cr2 save.cr2 CR2;
    Cr3 save.cr3 CRX;
    Cr4 save.cr4 CRX;
    Dr6 save.dr6 DRX;
    Dr7 save.dr7 DRX;
    Efer save.efer CRX;
    Rax save.rax NONE;
    Rflags save.rflags NONE;
    Rip save.rip NONE;
    Rsp save.rsp NONE;
    Star save.star NONE;
    Lstar save.lstar NONE;
    Cstar save.cstar NONE;
    Sfmask save.sfmask NONE;
    KernelGsBase save.kernel_gs_base NONE;
    SysenterCs save.sysenter_cs NONE;
    SysenterEsp save.sysenter_esp NONE;
    SysenterEip save.sysenter_eip NONE;
    GPat save.g_pat NP;
    DbgCtl save.dbgctl LBR;
    BrFrom save.br_from LBR;
    BrTo save.br_to LBR;
    LastExcpFrom save.lastexcpfrom LBR;
    LastExcpTo save.lastexcpto LBR;
    SpecCtrl save.spec_ctrl NONE;
    NCr3 control.n_cr3 NP;
    TscOffset control.tsc_offset INTERCEPTS;
    IopmBasePa control.iopm_base_pa IOPM;
    MsrpmBasePa control.msrpm_base_pa IOPM;
    Vintr control.vintr TPR;
    InterruptShadow control.interrupt_shadow NONE;
    ExitCode control.exitcode NONE;
    ExitInfo1 control.exitinfo1 NONE;
    ExitInfo2 control.exitinfo2 NONE;
    ExitIntInfo control.exitintinfo NONE;
    EventInj control.eventinj NONE;
    NRip control.nrip NONE;
}

/// A segment without its selector, as hypervisor interfaces pass it (the ancestor's `seg_desc`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Descriptor {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Access rights as VMX and `seg_desc` lay them out: descriptor bits 47:40 in 7:0, bits 55:52 in 15:12; bit 16 means unusable.
    pub access: u32,
}

/// Access rights, bit 16: the segment is unusable.
pub const ACCESS_UNUSABLE: u32 = 1 << 16;

/// Offset of VMCB_CLEAN.
const CLEAN_WORD: usize = 0xc0;

/// Which way a snapshot runs: one list of fields serves both.
pub enum Snapshot<'a> {
    /// Appends to a buffer.
    Save(&'a mut Vec<u8>),
    /// Consumes bytes from their start; what is left stays in here.
    Restore(&'a [u8]),
}

/// A snapshot that ends too early.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("snapshot ends {missing} bytes before the end of the value at VMCB offset {offset:#x}")]
pub struct SnapshotEnds {
    /// Offset of the value that was to be filled.
    pub offset: usize,
    /// Bytes that lack.
    pub missing: usize,
}

impl Snapshot<'_> {
    fn exchange(&mut self, offset: usize, value: &mut [u8]) -> Result<(), SnapshotEnds> {
        match self {
            Snapshot::Save(buffer) => buffer.extend_from_slice(value),
            Snapshot::Restore(rest) => {
                let missing = value.len().saturating_sub(rest.len());
                let (head, tail) = rest.split_at_checked(value.len()).ok_or(SnapshotEnds { offset, missing })?;
                value.copy_from_slice(head);
                *rest = tail;
            }
        }
        Ok(())
    }
}

impl Vmcb {
    /// A segment or table register (`vmcb_seg`).
    pub fn segment(&self, register: SegmentRegister) -> &Segment {
        match register {
            SegmentRegister::Es => &self.save.es,
            SegmentRegister::Cs => &self.save.cs,
            SegmentRegister::Ss => &self.save.ss,
            SegmentRegister::Ds => &self.save.ds,
            SegmentRegister::Fs => &self.save.fs,
            SegmentRegister::Gs => &self.save.gs,
            SegmentRegister::Gdtr => &self.save.gdtr,
            SegmentRegister::Ldtr => &self.save.ldtr,
            SegmentRegister::Idtr => &self.save.idtr,
            SegmentRegister::Tr => &self.save.tr,
        }
    }

    /// A segment or table register, writable; its clean bit is dropped.
    pub fn segment_mut(&mut self, register: SegmentRegister) -> &mut Segment {
        self.control.mark_dirty(register.clean_group());
        match register {
            SegmentRegister::Es => &mut self.save.es,
            SegmentRegister::Cs => &mut self.save.cs,
            SegmentRegister::Ss => &mut self.save.ss,
            SegmentRegister::Ds => &mut self.save.ds,
            SegmentRegister::Fs => &mut self.save.fs,
            SegmentRegister::Gs => &mut self.save.gs,
            SegmentRegister::Gdtr => &mut self.save.gdtr,
            SegmentRegister::Ldtr => &mut self.save.ldtr,
            SegmentRegister::Idtr => &mut self.save.idtr,
            SegmentRegister::Tr => &mut self.save.tr,
        }
    }

    /// Base, limit and access rights of a segment (`vmcb_getdesc`). A segment without P,
    /// other than CS and TR, is marked unusable, as VMX-shaped interfaces expect it. Tables have no access rights.
    pub fn descriptor(&self, register: SegmentRegister) -> Descriptor {
        let segment = self.segment(register);
        if matches!(register, SegmentRegister::Gdtr | SegmentRegister::Idtr) {
            return Descriptor { base: segment.base, limit: segment.limit, access: 0 };
        }
        let attrib = u32::from(segment.attrib & ATTRIB_MASK);
        let mut access = (attrib & 0xff) | ((attrib & 0xf00) << 4);
        if !segment.present() && !matches!(register, SegmentRegister::Cs | SegmentRegister::Tr) {
            access |= ACCESS_UNUSABLE;
        }
        Descriptor { base: segment.base, limit: segment.limit, access }
    }

    /// Sets base, limit and access rights; the selector stays (`vmcb_setdesc`). An unusable segment gets P = 0.
    pub fn set_descriptor(&mut self, register: SegmentRegister, descriptor: Descriptor) {
        let segment = self.segment_mut(register);
        segment.base = descriptor.base;
        segment.limit = descriptor.limit;
        if matches!(register, SegmentRegister::Gdtr | SegmentRegister::Idtr) {
            return;
        }
        let mut attrib = (descriptor.access & 0xff) | ((descriptor.access >> 4) & 0xf00);
        if descriptor.access & ACCESS_UNUSABLE != 0 {
            attrib &= !0x80;
        }
        segment.attrib = (segment.attrib & !ATTRIB_MASK) | attrib as u16;
    }

    /// Any bytes (`vmcb_getany`), zero-extended.
    pub fn read_any(&self, access: Access) -> u64 {
        let mut value = [0; 8];
        value[..access.width()].copy_from_slice(&self.as_page()[access.offset()..][..access.width()]);
        u64::from_le_bytes(value)
    }

    /// Any bytes (`vmcb_setany`). What they cover is unknown, so every clean bit is dropped (unless the clean word
    /// itself is what was written).
    pub fn write_any(&mut self, access: Access, value: u64) {
        self.as_page_mut()[access.offset()..][..access.width()].copy_from_slice(&value.to_le_bytes()[..access.width()]);
        let (start, end) = (access.offset(), access.offset() + access.width());
        if end <= CLEAN_WORD || start >= CLEAN_WORD + 4 {
            self.control.vmcb_clean = 0;
        }
    }

    /// Saves or restores one segment in its 16 bytes (`vmcb_snapshot_desc`).
    pub fn snapshot_segment(
        &mut self,
        register: SegmentRegister,
        snapshot: &mut Snapshot<'_>,
    ) -> Result<(), SnapshotEnds> {
        let offset = super::SAVE_OFFSET + 16 * register as usize;
        self.exchange(offset, 16, register.clean_group(), snapshot)
    }

    /// Saves or restores any bytes (`vmcb_snapshot_any`).
    pub fn snapshot_any(&mut self, access: Access, snapshot: &mut Snapshot<'_>) -> Result<(), SnapshotEnds> {
        self.exchange(access.offset(), access.width(), clean::ALL, snapshot)
    }

    fn exchange(
        &mut self,
        offset: usize,
        size: usize,
        groups: u32,
        snapshot: &mut Snapshot<'_>,
    ) -> Result<(), SnapshotEnds> {
        snapshot.exchange(offset, &mut self.as_page_mut()[offset..][..size])?;
        if matches!(snapshot, Snapshot::Restore(_)) {
            self.control.mark_dirty(groups);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn access() -> impl Strategy<Value = Access> {
        let width = prop_oneof![Just(Width::Byte), Just(Width::Word), Just(Width::Double), Just(Width::Quad)];
        (0..PAGE_SIZE as u16, width).prop_filter_map("leaves the page", |(offset, width)| Access::new(offset, width))
    }

    #[test]
    fn an_access_cannot_leave_the_page() {
        assert!(Access::new(4088, Width::Quad).is_some());
        assert!(Access::new(4089, Width::Quad).is_none());
        assert!(Access::new(u16::MAX, Width::Byte).is_none());
    }

    #[test]
    fn every_named_register_is_one_place() {
        for &register in Register::NAMED {
            let mut vmcb = Vmcb::boxed();
            vmcb.write(register, 0x0123_4567_89ab_cdef);
            assert_eq!(vmcb.read(register), 0x0123_4567_89ab_cdef, "{register:?}");
            assert_eq!(vmcb.as_page().iter().filter(|byte| **byte != 0).count(), 8, "{register:?}");
        }
    }

    #[test]
    fn a_short_snapshot_is_refused_and_changes_nothing() {
        let mut vmcb = Vmcb::boxed();
        let before = vmcb.clone();
        let mut short = Snapshot::Restore(&[1; 15]);
        let ends = vmcb.snapshot_segment(SegmentRegister::Cs, &mut short);
        assert_eq!(ends, Err(SnapshotEnds { offset: 0x410, missing: 1 }));
        assert!(vmcb == before && matches!(short, Snapshot::Restore(rest) if rest.len() == 15));
    }

    proptest! {
        #[test]
        fn raw_access_touches_its_own_bytes_only(access in access(), value: u64, fill: u8) {
            let mut vmcb = Vmcb::from_bytes(&[fill; PAGE_SIZE]);
            vmcb.control.vmcb_clean = 0;
            let before = vmcb.clone();
            vmcb.write_any(access, value);
            let mask = if access.width() == 8 { u64::MAX } else { (1 << (8 * access.width())) - 1 };
            prop_assert_eq!(vmcb.read_any(access), value & mask);
            vmcb.write_any(access, before.read_any(access));
            prop_assert!(vmcb == before);
        }

        #[test]
        fn snapshots_restore_what_they_saved(selector: u16, attrib: u16, limit: u32, base: u64, access in access()) {
            let mut source = Vmcb::boxed();
            source.save.gs = Segment::new(selector, attrib, limit, base);
            source.write_any(access, base);
            let mut buffer = Vec::new();
            source.snapshot_segment(SegmentRegister::Gs, &mut Snapshot::Save(&mut buffer)).unwrap();
            source.snapshot_any(access, &mut Snapshot::Save(&mut buffer)).unwrap();
            let mut target = Vmcb::boxed();
            let mut restore = Snapshot::Restore(&buffer);
            target.snapshot_segment(SegmentRegister::Gs, &mut restore).unwrap();
            target.snapshot_any(access, &mut restore).unwrap();
            prop_assert!(matches!(restore, Snapshot::Restore([])));
            prop_assert_eq!(target.segment(SegmentRegister::Gs), source.segment(SegmentRegister::Gs));
            // Clean bits are no state: what was restored must be loaded anew.
            source.control.mark_dirty(clean::ALL);
            prop_assert_eq!(target.read_any(access), source.read_any(access));
        }

        #[test]
        fn a_restored_page_has_no_clean_group(access in access()) {
            let mut source = Vmcb::boxed();
            source.control.vmcb_clean = clean::ALL;
            let mut buffer = Vec::new();
            source.snapshot_any(access, &mut Snapshot::Save(&mut buffer)).unwrap();
            source.snapshot_any(access, &mut Snapshot::Restore(&buffer)).unwrap();
            prop_assert_eq!(source.control.vmcb_clean & clean::ALL, 0);
        }

        #[test]
        fn descriptors_keep_selector_and_unknown_attributes(selector: u16, attrib: u16, limit: u32, base: u64) {
            let mut vmcb = Vmcb::boxed();
            *vmcb.segment_mut(SegmentRegister::Cs) = Segment::new(selector, attrib, limit, base);
            let before = vmcb.clone();
            let descriptor = vmcb.descriptor(SegmentRegister::Cs);
            vmcb.set_descriptor(SegmentRegister::Cs, descriptor);
            prop_assert!(vmcb == before);
        }
    }
}

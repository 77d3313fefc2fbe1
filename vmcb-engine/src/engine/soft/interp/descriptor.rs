//! Descriptors (APM2 4.7, 4.8): reading them from the GDT and LDT, gates, and the rules for loading a segment register.
//!
//! Tables are read with supervisor rights whatever CPL is. This file refuses to know which instruction asks.

use crate::addr::is_canonical;
use crate::engine::soft::core::{CS, Core, SS, Step};
use crate::vmcb::Segment;
use crate::vmcb::registers::{cr0, efer};

/// A gate's first eight bytes.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    /// Code segment.
    pub selector: u16,
    /// Offset, bits 31:0.
    pub offset: u64,
    /// Type.
    pub kind: u8,
    /// The S bit, which no gate has set.
    pub is_code_or_data: bool,
    /// Privilege level.
    pub dpl: u8,
    /// Present.
    pub present: bool,
    /// Parameters that a legacy call gate copies.
    pub parameters: u8,
}

impl Gate {
    /// Takes a gate apart.
    pub fn from_descriptor(low: u64) -> Self {
        Self {
            selector: (low >> 16) as u16,
            offset: low & 0xffff | (low >> 32) & 0xffff_0000,
            kind: (low >> 40 & 15) as u8,
            is_code_or_data: low >> 44 & 1 != 0,
            dpl: (low >> 45 & 3) as u8,
            present: low >> 47 & 1 != 0,
            parameters: (low >> 32 & 31) as u8,
        }
    }
}

/// The segment with its accessed bit set, as it is once loaded.
pub fn accessed(mut segment: Segment) -> Segment {
    segment.attrib |= 1;
    segment
}

/// A data segment register that is loaded with a null selector: unusable. AMD keeps base and limit; this processor clears
/// them, as processors with NullSelectorClearsBase do (CPUID 8000_0021 EAX bit 6).
pub fn null(selector: u16) -> Segment {
    Segment::new(selector, 0, 0, 0)
}

impl Core {
    /// Linear address of a descriptor, if the selector lies within its table.
    pub fn descriptor_address(&self, selector: u16, bytes: u32) -> Option<u64> {
        let table = if selector & 4 != 0 { &self.ldtr } else { &self.gdtr };
        if selector & 4 != 0 && !self.ldtr.present() {
            return None;
        }
        let offset = u32::from(selector & !7);
        (offset + bytes - 1 <= table.limit).then(|| {
            let linear = table.base.wrapping_add(offset.into());
            if self.efer & efer::LMA != 0 { linear } else { linear & 0xffff_ffff }
        })
    }

    /// The eight bytes that a selector names; `None` beyond its table.
    pub fn read_descriptor(&mut self, selector: u16) -> Step<Option<u64>> {
        match self.descriptor_address(selector, 8) {
            Some(at) => self.as_supervisor(|core| core.load::<u64>(at)).map(Some),
            None => Ok(None),
        }
    }

    /// The segment that a selector names; `None` beyond its table.
    pub fn read_segment(&mut self, selector: u16) -> Step<Option<Segment>> {
        Ok(self.read_descriptor(selector)?.map(|descriptor| Segment::from_descriptor(selector, descriptor)))
    }

    /// A 16-byte system descriptor in long mode, eight bytes else; with its low half. `None` beyond its table.
    pub fn read_system_descriptor(&mut self, selector: u16) -> Step<Option<(Segment, u64)>> {
        if self.efer & efer::LMA == 0 {
            return Ok(self.read_descriptor(selector)?.map(|low| (Segment::from_descriptor(selector, low), low)));
        }
        let Some(at) = self.descriptor_address(selector, 16) else { return Ok(None) };
        let (low, high) =
            self.as_supervisor(|core| Ok((core.load::<u64>(at)?, core.load::<u64>(at.wrapping_add(8))?)))?;
        Ok(Some((Segment::from_system_descriptor(selector, low, high), low)))
    }

    /// Sets the accessed bit of a code or data descriptor in its table, if it is clear there.
    pub fn mark_accessed(&mut self, segment: Segment) -> Step {
        if segment.kind() & 1 != 0 {
            return Ok(());
        }
        let Some(at) = self.descriptor_address(segment.selector, 8) else { return Ok(()) };
        let at = at.wrapping_add(5);
        self.as_supervisor(|core| {
            let byte = core.load::<u8>(at)?;
            core.store::<u8>(at, byte | 1)
        })
    }

    /// Sets CS and CPL.
    pub fn set_code_segment(&mut self, segment: Segment, cpl: u8) {
        self.segments[CS] = segment;
        self.cpl = cpl;
        self.refresh_mode();
    }

    /// Loads ES, SS, DS, FS or GS as MOV and POP do (APM2 4.8, 4.10). In real mode only selector and base change.
    pub fn load_segment(&mut self, register: usize, selector: u16) -> Step {
        if self.cr0 & cr0::PE == 0 {
            self.segments[register].selector = selector;
            self.segments[register].base = u64::from(selector) << 4;
            return Ok(());
        }
        let named = u32::from(selector & !3);
        let rpl = (selector & 3) as u8;
        if selector & !3 == 0 {
            // SS may be null in 64-bit mode below CPL 3, with RPL = CPL.
            if register == SS && (!self.mode.long || self.cpl == 3 || rpl != self.cpl) {
                return self.general_protection();
            }
            self.segments[register] = null(selector);
            return Ok(());
        }
        let Some(segment) = self.read_segment(selector)? else { return self.raise_code(13, named) };
        let (kind, dpl) = (segment.kind(), segment.dpl());
        let legal = if register == SS {
            segment.is_code_or_data() && kind & 0xa == 2 && rpl == self.cpl && dpl == self.cpl
        } else {
            let readable = segment.is_code_or_data() && kind & 0xa != 8;
            let conforming = kind & 0xc == 0xc;
            readable && (conforming || dpl >= rpl.max(self.cpl))
        };
        if !legal {
            return self.raise_code(13, named);
        }
        if !segment.present() {
            return self.raise_code(if register == SS { 12 } else { 11 }, named);
        }
        self.mark_accessed(segment)?;
        self.segments[register] = accessed(segment);
        Ok(())
    }

    /// Data segments that a return to an outer level may not keep are made null (APM2 4.9.3).
    pub fn drop_inner_segments(&mut self) {
        use crate::engine::soft::core::{DS, ES, FS, GS};
        for register in [ES, DS, FS, GS] {
            let segment = self.segments[register];
            let conforming = segment.is_code() && segment.kind() & 4 != 0;
            if segment.present() && !conforming && segment.dpl() < self.cpl {
                self.segments[register] = null(0);
            }
        }
    }

    /// #GP(0) unless a target offset is canonical (64-bit code) or within the segment's limit.
    pub fn check_target(&mut self, code: &Segment, offset: u64) -> Step {
        let long = self.efer & efer::LMA != 0 && code.long();
        let legal = if long { is_canonical(offset, 48) } else { offset <= u64::from(code.limit) };
        if legal { Ok(()) } else { self.general_protection() }
    }
}

//! ELF kernels (32 and 64 bits): segments by physical address, the entry, and the PVH note. Only what is needed to place
//! a kernel is read; every number is checked against the file before it is used.

use super::layout::TABLES_END;
use super::{BootError, u16_at, u32_at, u64_at};
use crate::memory::GuestMemory;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
/// Note type XEN_ELFNOTE_PHYS32_ENTRY.
const NOTE_PVH_ENTRY: u32 = 18;

/// A parsed file.
#[derive(Debug)]
pub struct Elf<'a> {
    bytes: &'a [u8],
    wide: bool,
    entry: u64,
    segments: Vec<Segment>,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    kind: u32,
    offset: u64,
    gpa: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

impl<'a> Elf<'a> {
    /// Reads headers.
    ///
    /// # Errors
    /// Not an ELF for x86, or damage.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BootError> {
        let cut = || BootError::Damaged("its ELF header is cut");
        if !bytes.starts_with(b"\x7fELF") {
            return Err(BootError::Damaged("its payload is no ELF"));
        }
        let wide = match bytes.get(4..6).ok_or_else(cut)? {
            [1, 1] => false,
            [2, 1] => true,
            _ => return Err(BootError::NotAKernel("an ELF file of the other byte order".to_owned())),
        };
        let machine = u16_at(bytes, 18).ok_or_else(cut)?;
        if machine != if wide { MACHINE_X86_64 } else { MACHINE_386 } {
            return Err(BootError::NotAKernel(format!("an ELF file for machine {machine}")));
        }
        if u16_at(bytes, 16) != Some(2) && u16_at(bytes, 16) != Some(3) {
            return Err(BootError::NotAKernel("an ELF file that is not executable".to_owned()));
        }
        let (entry, table, entry_bytes, count) = if wide {
            (u64_at(bytes, 24), u64_at(bytes, 32), u16_at(bytes, 54), u16_at(bytes, 56))
        } else {
            (u32_at(bytes, 24).map(u64::from), u32_at(bytes, 28).map(u64::from), u16_at(bytes, 42), u16_at(bytes, 44))
        };
        let (entry, table) = (entry.ok_or_else(cut)?, table.ok_or_else(cut)?);
        let (entry_bytes, count) = (entry_bytes.ok_or_else(cut)?, count.ok_or_else(cut)?);
        if entry_bytes != if wide { 56 } else { 32 } {
            return Err(BootError::Damaged("its program headers have an odd size"));
        }
        let mut elf = Elf { bytes, wide, entry, segments: Vec::new() };
        for n in 0..usize::from(count) {
            let at = usize::try_from(table).ok().and_then(|table| table.checked_add(n * usize::from(entry_bytes)));
            let segment = at.and_then(|at| elf.segment(at)).ok_or(BootError::Damaged("its program headers are cut"))?;
            elf.segments.push(segment);
        }
        if elf.loads().next().is_none() {
            return Err(BootError::NotAKernel("an ELF file with nothing to load".to_owned()));
        }
        Ok(elf)
    }

    fn segment(&self, at: usize) -> Option<Segment> {
        let bytes = self.bytes;
        let word = |offset| u32_at(bytes, at.checked_add(offset)?);
        let long = |offset| u64_at(bytes, at.checked_add(offset)?);
        let segment = if self.wide {
            Segment { kind: word(0)?, offset: long(8)?, gpa: long(24)?, file_bytes: long(32)?, memory_bytes: long(40)? }
        } else {
            Segment {
                kind: word(0)?,
                offset: word(4)?.into(),
                gpa: word(12)?.into(),
                file_bytes: word(16)?.into(),
                memory_bytes: word(20)?.into(),
            }
        };
        Some(segment)
    }

    fn loads(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.kind == PT_LOAD && segment.memory_bytes != 0)
    }

    fn contents(&self, segment: &Segment) -> Result<&'a [u8], BootError> {
        let start = usize::try_from(segment.offset).ok();
        let end = segment.offset.checked_add(segment.file_bytes).and_then(|end| usize::try_from(end).ok());
        let range = start.zip(end).and_then(|(start, end)| self.bytes.get(start..end));
        range.ok_or(BootError::Damaged("a segment lies beyond its end"))
    }

    /// Entry address from the header.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// True for a 64-bit file.
    pub fn wide(&self) -> bool {
        self.wide
    }

    /// First address behind all segments in memory.
    ///
    /// # Errors
    /// A segment that wraps.
    pub fn end(&self) -> Result<u64, BootError> {
        let ends = self.loads().map(|segment| segment.gpa.checked_add(segment.memory_bytes));
        ends.max().flatten().ok_or(BootError::Damaged("a segment wraps around memory"))
    }

    /// Copies the segments to their physical addresses. RAM is zero before, so that what the file leaves out is zero.
    ///
    /// # Errors
    /// A segment that does not lie in RAM above the tables, or damage.
    pub fn place(&self, memory: &GuestMemory) -> Result<(), BootError> {
        for segment in self.loads() {
            let (gpa, bytes) = (segment.gpa, segment.memory_bytes);
            let misplaced = BootError::Segment { gpa, bytes };
            let contents = self.contents(segment)?;
            let last = gpa.checked_add(bytes - 1).ok_or(misplaced.clone())?;
            if segment.file_bytes > bytes {
                return Err(BootError::Damaged("a segment is longer in the file than in memory"));
            }
            if gpa < TABLES_END || memory.page_of(gpa).is_none() || memory.page_of(last).is_none() {
                return Err(misplaced);
            }
            memory.write(gpa, contents).map_err(|_| misplaced)?;
        }
        Ok(())
    }

    /// The 32-bit entry of the PVH protocol, if the file has such a note.
    ///
    /// # Errors
    /// Damage.
    pub fn pvh_entry(&self) -> Result<Option<u64>, BootError> {
        for segment in self.segments.iter().filter(|segment| segment.kind == PT_NOTE) {
            let mut notes = self.contents(segment)?;
            while let (Some(name_bytes), Some(value_bytes), Some(kind)) =
                (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8))
            {
                let value_at = 12 + (name_bytes as usize).next_multiple_of(4);
                let end = value_at.saturating_add((value_bytes as usize).next_multiple_of(4));
                let name = notes.get(12..12 + name_bytes as usize);
                if kind == NOTE_PVH_ENTRY && name == Some(b"Xen\0") {
                    let entry = u32_at(notes, value_at).filter(|_| value_bytes >= 4);
                    return entry.map(|entry| Some(entry.into())).ok_or(BootError::Damaged("its PVH note is cut"));
                }
                notes = notes.get(end..).unwrap_or(&[]);
            }
        }
        Ok(None)
    }
}

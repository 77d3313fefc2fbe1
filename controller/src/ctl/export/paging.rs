//! Which kernel addresses a guest's own page tables map to which RAM: APM2 5.3 (long mode) and 5.3.3 (five levels).
//!
//! The upper half of the address space is walked from a processor's CR3. Neighbouring mappings become one run; what leads
//! to no RAM is left out. Tables are a guest's and may be anything, itself included: the walk looks at so many and no more.

use vmcb_engine::cpu::CpuState;

use super::super::failure::Failure;
use super::elf::{RUNS_MAX, Ram, Range};

const PAGE: u64 = 4096;
const ENTRIES: usize = 512;
const PRESENT: u64 = 1;
/// In an entry of level 2 or 3: it maps 2 MiB or 1 GiB itself.
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// CR0.PG, CR4.LA57, EFER.LMA.
const CR0_PAGING: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LONG_MODE: u64 = 1 << 10;
/// Most tables that are looked at: those of 512 GiB in pages of 4 KiB.
const TABLES_MAX: u32 = 1 << 18;

/// RAM by virtual address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Its first virtual address.
    pub virt: u64,
    /// What lies there.
    pub range: Range,
}

impl Run {
    /// Whether what begins there goes on where this ends.
    fn ends_at(&self, virt: u64, physical: u64) -> bool {
        let Range { bytes, physical: first, .. } = self.range;
        self.virt.wrapping_add(bytes) == virt && first + bytes == physical
    }
}

/// What a walk found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// In order of virtual address.
    pub runs: Vec<Run>,
    /// Nothing was left out.
    pub complete: bool,
}

struct Walker<'a, R> {
    ram: &'a Ram,
    read: R,
    walk: Walk,
    tables: u32,
}

/// Walks the kernel's half of the processor's address space; `read` reads a page from a byte of RAM. A processor
/// that is not in long mode has none.
///
/// # Errors
/// Those of `read`.
pub fn kernel<R>(cpu: &CpuState, ram: &Ram, read: R) -> Result<Walk, Failure>
where
    R: FnMut(u64, &mut [u8]) -> Result<(), Failure>,
{
    let mut walker = Walker { ram, read, walk: Walk { runs: Vec::new(), complete: true }, tables: 0 };
    if cpu.cr0 & CR0_PAGING != 0 && cpu.efer & EFER_LONG_MODE != 0 {
        let levels = if cpu.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        // Everything above is a sign extension of the topmost bit.
        let half = u64::MAX << (12 + 9 * levels - 1);
        walker.table(cpu.cr3 & ADDRESS, levels, half, ENTRIES / 2)?;
    }
    Ok(walker.walk)
}

impl<R> Walker<'_, R>
where
    R: FnMut(u64, &mut [u8]) -> Result<(), Failure>,
{
    /// Walks entries of a table from `first` on, of which the first maps `virt`.
    fn table(&mut self, physical: u64, level: u32, virt: u64, first: usize) -> Result<(), Failure> {
        let Some(range) = self.ram.parts(physical, PAGE).next().filter(|range| range.bytes == PAGE) else {
            return Ok(());
        };
        if self.tables == TABLES_MAX || self.walk.runs.len() >= RUNS_MAX {
            self.walk.complete = false;
            return Ok(());
        }
        self.tables += 1;
        let mut page = [0; PAGE as usize];
        (self.read)(range.offset, &mut page)?;
        let span = PAGE << (9 * (level - 1));
        for (number, entry) in page.as_chunks::<8>().0[first..].iter().enumerate() {
            let entry = u64::from_le_bytes(*entry);
            if entry & PRESENT == 0 {
                continue;
            }
            // The last entry of the last table ends where addresses do.
            let virt = virt.wrapping_add(number as u64 * span);
            match level {
                1 => self.map(virt, entry & ADDRESS, span),
                2 | 3 if entry & LARGE != 0 => self.map(virt, entry & ADDRESS & !(span - 1), span),
                _ => self.table(entry & ADDRESS, level - 1, virt, 0)?,
            }
        }
        Ok(())
    }

    fn map(&mut self, virt: u64, physical: u64, bytes: u64) {
        for range in self.ram.parts(physical, bytes) {
            let virt = virt + (range.physical - physical);
            let full = self.walk.runs.len() >= RUNS_MAX;
            match self.walk.runs.last_mut() {
                Some(last) if last.ends_at(virt, range.physical) => last.range.bytes += range.bytes,
                _ if full => self.walk.complete = false,
                _ => self.walk.runs.push(Run { virt, range }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM_BYTES: u64 = 64 << 20;
    const DIRECT: u64 = 0xffff_8880_0000_0000;
    const IMAGE: u64 = 0xffff_ffff_8000_0000;

    /// RAM with tables in it.
    struct Tables(Vec<u64>);

    impl Tables {
        fn new() -> Tables {
            Tables(vec![0; RAM_BYTES as usize / 8])
        }

        fn set(&mut self, table: u64, index: usize, entry: u64) {
            self.0[table as usize / 8 + index] = entry;
        }

        fn walk(&self, change: impl FnOnce(&mut CpuState)) -> Walk {
            let mut cpu = CpuState::reset();
            (cpu.cr0, cpu.efer, cpu.cr3) = (CR0_PAGING | 1, EFER_LONG_MODE, 0x1000);
            change(&mut cpu);
            let read = |offset: u64, page: &mut [u8]| {
                let words = &self.0[offset as usize / 8..][..ENTRIES];
                page.copy_from_slice(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>());
                Ok(())
            };
            kernel(&cpu, &Ram::new(RAM_BYTES), read).unwrap()
        }
    }

    fn run(virt: u64, physical: u64, bytes: u64) -> Run {
        Run { virt, range: Range { physical, bytes, offset: physical } }
    }

    /// A direct map in pages of 1 GiB and 2 MiB, and a kernel image in pages of 2 MiB and 4 KiB.
    fn linux() -> Tables {
        let mut tables = Tables::new();
        tables.set(0x1000, 273, 0x2003);
        tables.set(0x2000, 0, LARGE | 3);
        tables.set(0x2000, 1, 0x3003);
        tables.set(0x3000, 0, 0x60_0000 | LARGE | 3);
        tables.set(0x1000, 511, 0x4003);
        tables.set(0x4000, 510, 0x5003);
        tables.set(0x5000, 8, 0x100_0000 | LARGE | 3);
        tables.set(0x5000, 9, 0x120_0000 | LARGE | 3);
        tables.set(0x5000, 10, 0x6003);
        tables.set(0x6000, 0, 0x140_0003);
        tables.set(0x6000, 1, 0x150_0001);
        // Not present; devices; the lower half, which is no kernel's.
        tables.set(0x6000, 2, 0x160_0002);
        tables.set(0x6000, 3, 0xfee0_0003);
        tables.set(0x1000, 0, 0x2003);
        tables
    }

    #[test]
    fn pages_of_all_sizes_are_found_joined_and_cut_to_ram() {
        let found = linux().walk(|_| {});
        let expected = [
            run(DIRECT, 0, RAM_BYTES),
            run(DIRECT + (1 << 30), 0x60_0000, 2 << 20),
            run(IMAGE + 0x100_0000, 0x100_0000, 0x40_1000),
            run(IMAGE + 0x140_1000, 0x150_0000, 4096),
        ];
        assert_eq!(found, Walk { runs: expected.to_vec(), complete: true });
    }

    #[test]
    fn only_long_mode_with_paging_has_a_kernel_half() {
        let tables = linux();
        for change in [|cpu: &mut CpuState| cpu.cr0 = 1, |cpu: &mut CpuState| cpu.efer = 0] {
            assert_eq!(tables.walk(change), Walk { runs: Vec::new(), complete: true });
        }
        // A table beyond RAM.
        assert_eq!(tables.walk(|cpu| cpu.cr3 = 1 << 40).runs, []);
    }

    #[test]
    fn five_levels_are_walked_by_the_same_rule() {
        let mut tables = linux();
        tables.set(0x7000, 511, 0x1003);
        let found = tables.walk(|cpu| (cpu.cr3, cpu.cr4) = (0x7000, CR4_LA57));
        assert!(found.runs.contains(&run(IMAGE + 0x100_0000, 0x100_0000, 0x40_1000)), "{found:x?}");
    }

    #[test]
    fn the_last_page_of_all_is_found() {
        let mut tables = Tables::new();
        for (table, next) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x5003)] {
            tables.set(table, 511, next);
        }
        tables.set(0x4000, 510, 0x4003);
        let found = tables.walk(|_| {});
        assert_eq!(found.runs, [run(u64::MAX - 8191, 0x4000, 8192)]);
    }

    #[test]
    fn tables_that_lead_to_themselves_end() {
        let mut tables = Tables::new();
        (0..ENTRIES).for_each(|index| tables.set(0x1000, index, 0x1003));
        let found = tables.walk(|_| {});
        assert!(!found.complete && found.runs.len() <= RUNS_MAX, "{}", found.runs.len());
    }
}

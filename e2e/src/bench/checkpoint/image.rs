//! A guest's RAM as its host sees it, from the file descriptors of the guest's runner: for a comparison of what was stored
//! with what was there.
//!
//! Knows the size of RAM and nothing else of a guest. Needs the rights of who runs the guest, and more if the runner is
//! sealed off (`ptrace` rights: root has them).

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

const PAGE_BYTES: usize = 4096;
/// What is compared, and compressed, in one go.
const BLOCK_BYTES: usize = 1 << 20;

/// RAM as it was when it was last read.
pub(super) struct Image {
    ram: File,
    bytes: Vec<u8>,
}

impl Image {
    /// RAM of a paused guest: the only file without a name of its runner that is so large, on whichever file system.
    pub(super) fn of(runner: i32, ram_bytes: u64) -> Result<Image, String> {
        let folder = format!("/proc/{runner}/fd");
        let entries = std::fs::read_dir(&folder).map_err(|e| format!("{folder}: {e}"))?;
        let is_ram = |path: &std::path::PathBuf| {
            let nameless = std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().ends_with(" (deleted)"));
            nameless && std::fs::metadata(path).is_ok_and(|data| data.len() == ram_bytes)
        };
        let path = entries.flatten().map(|entry| entry.path()).find(is_ram);
        let path = path.ok_or_else(|| format!("{folder} shows no RAM of {ram_bytes} bytes"))?;
        let ram = File::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut image = Image { ram, bytes: vec![0; ram_bytes as usize] };
        image.read_again()?;
        Ok(image)
    }

    /// Reads all of it again; pages that differ from what was read before, and bytes that zstd makes of them.
    pub(super) fn read_again(&mut self) -> Result<(u64, u64), String> {
        let (mut now, mut changes) = (vec![0; BLOCK_BYTES], Changes::default());
        for (number, before) in self.bytes.chunks_mut(BLOCK_BYTES).enumerate() {
            let now = &mut now[..before.len()];
            let read = self.ram.read_exact_at(now, (number * BLOCK_BYTES) as u64);
            read.map_err(|e| format!("the guest's RAM: {e}"))?;
            changes.add(before, now)?;
            before.copy_from_slice(now);
        }
        changes.end()
    }
}

/// Writes the image as it was last read.
pub(super) fn write(image: &Image, file: &Path) -> Result<(), String> {
    std::fs::write(file, &image.bytes).map_err(|e| format!("{}: {e}", file.display()))
}

/// Pages that differ, gathered and compressed as they come.
#[derive(Default)]
struct Changes {
    pages: u64,
    packed: u64,
    gathered: Vec<u8>,
}

impl Changes {
    fn add(&mut self, before: &[u8], now: &[u8]) -> Result<(), String> {
        let pages = before.chunks(PAGE_BYTES).zip(now.chunks(PAGE_BYTES));
        for (_, page) in pages.filter(|(before, now)| before != now) {
            self.pages += 1;
            self.gathered.extend_from_slice(page);
            if self.gathered.len() >= BLOCK_BYTES {
                self.pack()?;
            }
        }
        Ok(())
    }

    fn pack(&mut self) -> Result<(), String> {
        if !self.gathered.is_empty() {
            self.packed += zstd::bulk::compress(&self.gathered, 1).map_err(|e| format!("zstd: {e}"))?.len() as u64;
            self.gathered.clear();
        }
        Ok(())
    }

    /// Pages, and bytes after zstd.
    fn end(mut self) -> Result<(u64, u64), String> {
        self.pack()?;
        Ok((self.pages, self.packed))
    }
}

#[cfg(test)]
mod tests {
    use vmcb_engine::memory::{Backing, GuestMemory};

    use super::*;

    #[test]
    fn only_pages_that_differ_count() {
        let before = vec![0; 16 * PAGE_BYTES];
        let mut now = before.clone();
        blake3::Hasher::new().finalize_xof().fill(&mut now[3 * PAGE_BYTES..4 * PAGE_BYTES]);
        now[7 * PAGE_BYTES] = 1;
        let mut changes = Changes::default();
        changes.add(&before, &now).unwrap();
        let (pages, packed) = changes.end().unwrap();
        assert_eq!(pages, 2);
        // Noise stays as long as it is; a page with one byte is nearly nothing.
        assert!((4096..4296).contains(&packed), "{packed}");
    }

    #[test]
    fn ram_is_found_whatever_it_lies_in() {
        for (backing, bytes) in [(Backing::Small, 34 << 20), (Backing::Huge, 38 << 20)] {
            let memory = GuestMemory::create_on(backing, bytes).unwrap();
            memory.write(0x20_0000, &[7; 3]).unwrap();
            let image = Image::of(std::process::id() as i32, bytes).unwrap();
            assert_eq!(image.bytes[0x1f_ffff..0x20_0004], [0, 7, 7, 7, 0], "{backing:?}");
        }
    }
}

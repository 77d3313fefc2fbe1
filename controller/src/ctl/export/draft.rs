//! Files that get their name when they are whole: sparse, readable by their owner alone, gone if that never comes.
//!
//! Knows where pages of a space go, and neither digests nor ELF.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use proto::frame::PAGE_BYTES;
use proto::status::Code;
use proto::v1::MachineConfig;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::super::failure::Failure;
use super::elf::DATA_AT;

/// Where the pages of a space go.
struct Space {
    file: File,
    path: PathBuf,
    /// Byte of the file at which the space begins.
    at: u64,
    bytes: u64,
}

/// An export that has no name yet.
pub struct Draft {
    out: PathBuf,
    part: PathBuf,
    /// By number; a space that nobody wants as a file has none.
    spaces: Vec<Option<Space>>,
    /// Names of files in a folder.
    names: Vec<String>,
    named: bool,
}

/// Nothing has this name yet.
///
/// # Errors
/// [`Code::Conflict`].
pub fn free(out: &Path) -> Result<(), Failure> {
    match out.symlink_metadata() {
        Ok(_) => Err(taken(out)),
        Err(_) => Ok(()),
    }
}

fn taken(out: &Path) -> Failure {
    Failure::new(Code::Conflict, format!("cannot export to {}: it is there already", out.display()))
        .hint("name another --out, or remove it first")
}

fn failed(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    let failure = Failure::file(what, path, error);
    match failure.code {
        Code::Exhausted => {
            failure.hint("make room there, or name an --out on another disk; nothing is left of the export")
        }
        _ => failure,
    }
}

impl Draft {
    /// Of one file: a core whose head is written later.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn core(out: &Path, ram_bytes: u64) -> Result<Draft, Failure> {
        let mut draft = Draft::new(out)?;
        let space = create(&draft.part, DATA_AT, ram_bytes)?;
        draft.spaces.push(Some(space));
        Ok(draft)
    }

    /// Of a folder: `ram.raw`, and `diskN.raw` for each local disk, N being its place in the configuration.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn raw(out: &Path, config: &MachineConfig) -> Result<Draft, Failure> {
        let mut draft = Draft::new(out)?;
        DirBuilder::new().mode(0o700).create(&draft.part).map_err(|e| failed("make", &draft.part, &e))?;
        let disks = config.disks.iter().enumerate().filter(|(_, disk)| !disk.shared);
        let disks = disks.map(|(number, disk)| (format!("disk{number}.raw"), disk.size_bytes));
        for (name, bytes) in std::iter::once(("ram.raw".to_owned(), config.memory_bytes)).chain(disks) {
            let space = create(&draft.part.join(&name), 0, bytes)?;
            draft.spaces.push(Some(space));
            draft.names.push(name);
        }
        // The boot image comes last, and is for nobody.
        draft.spaces.push(None);
        Ok(draft)
    }

    /// Of one file that is written from its beginning to its end.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn stream(out: &Path) -> Result<Draft, Failure> {
        let mut draft = Draft::new(out)?;
        let space = create(&draft.part, 0, 0)?;
        draft.spaces.push(Some(space));
        Ok(draft)
    }

    /// Writes the next bytes of [`Draft::stream`].
    ///
    /// # Errors
    /// The disk is full, or fails.
    pub fn append(&self, bytes: &[u8]) -> Result<(), Failure> {
        let Some(Some(space)) = self.spaces.first() else { return Ok(()) };
        (&space.file).write_all(bytes).map_err(|e| failed("write", &space.path, &e))
    }

    fn new(out: &Path) -> Result<Draft, Failure> {
        free(out)?;
        let name = out.file_name().ok_or_else(|| Failure::bad_input(format!("{} is no name", out.display())))?;
        let mut part = name.to_owned();
        part.push(format!(".{}.part", std::process::id()));
        let part = out.with_file_name(part);
        free(&part)?;
        Ok(Draft { out: out.to_owned(), part, spaces: Vec::new(), names: Vec::new(), named: false })
    }

    /// Writes pages of a space.
    ///
    /// # Errors
    /// The disk is full, or fails.
    pub fn write(&self, space: usize, first_page: u64, pages: &[u8]) -> Result<(), Failure> {
        let Some(Some(space)) = self.spaces.get(space) else { return Ok(()) };
        let from = first_page * PAGE_BYTES as u64;
        // A disk's last page may reach beyond its end.
        let length = pages.len().min(usize::try_from(space.bytes.saturating_sub(from)).unwrap_or(usize::MAX));
        space.file.write_all_at(&pages[..length], space.at + from).map_err(|e| failed("write", &space.path, &e))
    }

    /// Reads what was written to the first space.
    ///
    /// # Errors
    /// The disk fails.
    pub fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        let Some(Some(space)) = self.spaces.first() else { return Ok(()) };
        space.file.read_exact_at(bytes, space.at + from).map_err(|e| failed("read", &space.path, &e))
    }

    /// Writes what comes before the first space.
    ///
    /// # Errors
    /// The disk is full, or fails.
    pub fn head(&self, bytes: &[u8]) -> Result<(), Failure> {
        let Some(Some(space)) = self.spaces.first() else { return Ok(()) };
        assert!(bytes.len() as u64 <= space.at, "the head fits before the pages");
        space.file.write_all_at(bytes, 0).map_err(|e| failed("write", &space.path, &e))
    }

    /// Gives it its name; the names of files below it.
    ///
    /// # Errors
    /// The disk is full, or somebody took the name meanwhile.
    pub fn finish(mut self) -> Result<Vec<String>, Failure> {
        for space in self.spaces.iter().flatten() {
            space.file.sync_all().map_err(|e| failed("write", &space.path, &e))?;
        }
        match renameat_with(CWD, &self.part, CWD, &self.out, RenameFlags::NOREPLACE) {
            // A file system that cannot do both at once.
            Err(Errno::INVAL) => free(&self.out)
                .and_then(|()| std::fs::rename(&self.part, &self.out).map_err(|e| failed("name", &self.out, &e)))?,
            Err(Errno::EXIST) => return Err(taken(&self.out)),
            renamed => renamed.map_err(|e| failed("name", &self.out, &e.into()))?,
        }
        self.named = true;
        Ok(std::mem::take(&mut self.names))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.named {
            // One of the two it is, or nothing; what cannot be removed cannot be helped.
            let _ = std::fs::remove_file(&self.part).or_else(|_| std::fs::remove_dir_all(&self.part));
        }
    }
}

fn create(path: &Path, at: u64, bytes: u64) -> Result<Space, Failure> {
    let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = made.map_err(|e| failed("make", path, &e))?;
    if let Err(error) = file.set_len(at + bytes) {
        let _ = std::fs::remove_file(path);
        return Err(failed("make", path, &error));
    }
    Ok(Space { file, path: path.to_owned(), at, bytes })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use proto::v1::DiskConfig;

    use super::*;

    fn folder(test: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("godwit-draft-{test}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn raw_images_are_sparse_private_and_as_long_as_they_were() {
        let folder = folder("raw");
        let disk = |size_bytes, shared| DiskConfig { size_bytes, shared, ..Default::default() };
        let disks = vec![disk(5000, false), disk(4096, true), disk(8192, false)];
        let config = MachineConfig { memory_bytes: 64 << 20, disks, ..Default::default() };
        let out = folder.join("out");
        let draft = Draft::raw(&out, &config).unwrap();
        assert!(!out.exists());
        draft.write(0, 100, &[7; 4096]).unwrap();
        draft.write(1, 1, &[8; 4096]).unwrap();
        draft.write(2, 1, &[9; 4096]).unwrap();
        draft.write(3, 0, &[1; 4096]).unwrap();
        assert_eq!(draft.finish().unwrap(), ["ram.raw", "disk0.raw", "disk2.raw"]);
        let read = |name: &str| std::fs::read(out.join(name)).unwrap();
        assert_eq!(read("disk0.raw"), [vec![0; 4096], vec![8; 904]].concat());
        assert_eq!(read("disk2.raw"), [vec![0; 4096], vec![9; 4096]].concat());
        let ram = std::fs::metadata(out.join("ram.raw")).unwrap();
        assert_eq!((ram.len(), ram.permissions().mode() & 0o777), (64 << 20, 0o600));
        assert!(ram.blocks() * 512 < 1 << 20, "{} blocks", ram.blocks());
        assert_eq!(read("ram.raw")[100 * 4096..101 * 4096], [7; 4096]);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn what_is_not_finished_leaves_nothing_and_what_is_there_stays() {
        let folder = folder("gone");
        let out = folder.join("core");
        drop(Draft::core(&out, 1 << 20).unwrap());
        drop(Draft::raw(&out, &MachineConfig::default()).unwrap());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        let draft = Draft::core(&out, 1 << 20).unwrap();
        std::fs::write(&out, "somebody's").unwrap();
        assert_eq!(draft.finish().unwrap_err().code, Code::Conflict);
        assert_eq!(Draft::core(&out, 1 << 20).err().unwrap().code, Code::Conflict);
        assert_eq!(std::fs::read(&out).unwrap(), b"somebody's");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        let nowhere = Draft::core(&folder.join("none/core"), 1 << 20).err().unwrap();
        assert!(nowhere.message.contains("none/core"), "{nowhere}");
        std::fs::remove_dir_all(folder).unwrap();
    }
}

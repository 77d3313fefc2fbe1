//! What this host keeps of its VMs, on disk.
//!
//! ```text
//! <state_dir>/vms/<name>/vm.pb        StoredVm: generation, state, ticket (written before anything acts on it)
//!                       config.pb     MachineConfig for the runner
//!                       boot.img runner.sock runner.pid runner.log console.log disk<N>.img
//! <state_dir>/aside/<name>/...         the copy that a restore to this host is about to replace; comes back if that fails
//! <state_dir>/seen/<name>.pb          newest generation ever owned; outlives the directory
//! <state_dir>/trash/...               directories on their way out; emptied at start
//! ```
//! Each file is replaced whole (`saved`). A directory without a readable `vm.pb` was never finished: no VM was ever
//! reported from it. An older generation never replaces a newer one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use proto::status::Code;
use proto::v1::StoredVm;

use crate::migration::Failure;
use crate::saved::{self, SavedError};

/// Why something could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// A directory.
    #[error("{path}: {step}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Something older than what is there.
    #[error("generation {found} of {vm} is older than {kept}, which is on disk")]
    Older {
        /// The VM.
        vm: String,
        /// What was to be written.
        found: u64,
        /// What is there.
        kept: u64,
    },
}

impl StoreError {
    /// In the form that travels.
    pub fn into_failure(self) -> Failure {
        let code = match self {
            StoreError::Older { .. } => Code::Denied,
            StoreError::Saved(SavedError::Damaged { .. } | SavedError::Foreign { .. }) => Code::Corrupt,
            StoreError::Saved(SavedError::File { .. }) | StoreError::Directory { .. } => Code::Internal,
        };
        Failure::new(code, super::actor::chain(&self))
    }
}

/// The state directory.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// VM names: 1 to 40 letters, digits, `-`, `_` and `.`; the first is a letter or digit. They name directories.
pub fn is_vm_name(name: &str) -> bool {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    first && name.len() <= 40 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

impl Store {
    /// Opens a state directory, makes its folders and empties its trash.
    ///
    /// # Errors
    /// [`StoreError::Directory`].
    pub fn open(root: &Path) -> Result<Store, StoreError> {
        let trash = root.join("trash");
        match fs::remove_dir_all(&trash) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::Directory { path: trash, step: "empty", source });
            }
            _ => {}
        }
        for folder in ["vms", "aside", "seen", "trash"] {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(|source| StoreError::Directory { path, step: "create", source })?;
        }
        // Runners of several users reach their files by descriptors; nobody else has business here.
        let _unowned = fs::set_permissions(root, std::os::unix::fs::PermissionsExt::from_mode(0o700));
        Ok(Store { root: root.to_owned() })
    }

    /// The directory of a VM. The name has been checked by [`is_vm_name`].
    pub fn directory(&self, name: &str) -> PathBuf {
        assert!(is_vm_name(name), "{name:?} was not checked");
        self.root.join("vms").join(name)
    }

    fn aside(&self, name: &str) -> PathBuf {
        assert!(is_vm_name(name), "{name:?} was not checked");
        self.root.join("aside").join(name)
    }

    /// Moves a VM's directory aside, in one step.
    ///
    /// # Errors
    /// [`StoreError::Directory`]: there is one aside already, or there is nothing to move.
    pub fn set_aside(&self, name: &str) -> Result<(), StoreError> {
        self.rename(&self.directory(name), &self.aside(name), "set aside")
    }

    /// Moves what was set aside back. The VM has no directory now.
    ///
    /// # Errors
    /// [`StoreError::Directory`].
    pub fn put_back(&self, name: &str) -> Result<(), StoreError> {
        self.rename(&self.aside(name), &self.directory(name), "put back")
    }

    /// What is set aside of this VM, and where.
    pub fn kept_aside(&self, name: &str) -> Option<(StoredVm, PathBuf)> {
        let directory = self.aside(name);
        let vm = saved::read::<StoredVm>(&directory.join("vm.pb"), "vm").ok()?;
        Some((vm, directory))
    }

    /// Removes what was set aside.
    ///
    /// # Errors
    /// [`StoreError::Directory`].
    pub fn drop_aside(&self, name: &str) -> Result<(), StoreError> {
        self.trash(&self.aside(name), &format!("{name}-aside"))
    }

    fn rename(&self, from: &Path, to: &Path, step: &'static str) -> Result<(), StoreError> {
        let failed = |source| StoreError::Directory { path: from.to_owned(), step, source };
        fs::rename(from, to).map_err(failed)?;
        for folder in ["vms", "aside"] {
            fs::File::open(self.root.join(folder)).and_then(|folder| folder.sync_all()).map_err(failed)?;
        }
        Ok(())
    }

    /// Every VM on disk, in order of name, and what could not be read: such a VM gets no lease, and its name stays taken.
    /// What was never finished is removed.
    ///
    /// # Errors
    /// [`StoreError::Directory`].
    pub fn load(&self) -> Result<(Vec<StoredVm>, Vec<StoreError>), StoreError> {
        let folder = self.root.join("vms");
        let failed = |source| StoreError::Directory { path: folder.clone(), step: "list", source };
        let (mut vms, mut damaged) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if !is_vm_name(&name) {
                tracing::warn!(name, "not a VM's directory: left alone");
                continue;
            }
            match saved::read::<StoredVm>(&self.directory(&name).join("vm.pb"), "vm") {
                Ok(vm) => vms.push(StoredVm { name, ..vm }),
                Err(error) if error.is_missing() => self.remove(&name, 0)?,
                Err(error) => damaged.push(error.into()),
            }
        }
        self.load_left_aside(&mut vms, &damaged)?;
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((vms, damaged))
    }

    /// What was set aside and has nothing in its place any more is put back.
    fn load_left_aside(&self, vms: &mut Vec<StoredVm>, damaged: &[StoreError]) -> Result<(), StoreError> {
        let folder = self.root.join("aside");
        let failed = |source| StoreError::Directory { path: folder.clone(), step: "list", source };
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if !is_vm_name(&name) || vms.iter().any(|vm| vm.name == name) || self.directory(&name).exists() {
                continue;
            }
            let Some((vm, _)) = self.kept_aside(&name) else {
                tracing::error!(name, damaged = damaged.len(), "what was set aside cannot be read: left alone");
                continue;
            };
            self.put_back(&name)?;
            vms.push(StoredVm { name, ..vm });
        }
        Ok(())
    }

    /// Keeps a VM; it is on disk when this returns.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn save(&self, vm: &StoredVm) -> Result<(), StoreError> {
        let directory = self.directory(&vm.name);
        let path = directory.join("vm.pb");
        match saved::read::<StoredVm>(&path, "vm") {
            Ok(kept) if kept.generation > vm.generation => {
                return Err(StoreError::Older { vm: vm.name.clone(), found: vm.generation, kept: kept.generation });
            }
            Err(error) if !error.is_missing() => return Err(error.into()),
            _ => {}
        }
        Ok(saved::write(&path, "vm", vm)?)
    }

    /// Makes a VM's directory with its machine configuration, and `vm.pb` last.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn create(&self, vm: &StoredVm) -> Result<(), StoreError> {
        let directory = self.directory(&vm.name);
        let made = fs::create_dir_all(&directory);
        made.map_err(|source| StoreError::Directory { path: directory.clone(), step: "create", source })?;
        saved::write(&directory.join("config.pb"), "config", &vm.config.clone().unwrap_or_default())?;
        self.save(vm)
    }

    /// Newest generation of a VM that this host ever owned; 0 if none.
    ///
    /// # Errors
    /// [`StoreError::Saved`] if it is there and cannot be read.
    pub fn seen(&self, name: &str) -> Result<u64, StoreError> {
        match saved::read::<StoredVm>(&self.seen_path(name), "seen") {
            Ok(seen) => Ok(seen.generation),
            Err(error) if error.is_missing() => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Remembers that this host owned a generation.
    ///
    /// # Errors
    /// [`StoreError::Saved`].
    pub fn note_seen(&self, name: &str, generation: u64) -> Result<(), StoreError> {
        if self.seen(name)? >= generation {
            return Ok(());
        }
        let seen = StoredVm { name: name.to_owned(), generation, ..StoredVm::default() };
        Ok(saved::write(&self.seen_path(name), "seen", &seen)?)
    }

    fn seen_path(&self, name: &str) -> PathBuf {
        assert!(is_vm_name(name), "{name:?} was not checked");
        self.root.join("seen").join(format!("{name}.pb"))
    }

    /// Removes a VM's directory in one step: it is gone, or it is there whole.
    ///
    /// # Errors
    /// [`StoreError::Directory`].
    pub fn remove(&self, name: &str, generation: u64) -> Result<(), StoreError> {
        self.trash(&self.directory(name), &format!("{name}-{generation}"))
    }

    fn trash(&self, directory: &Path, label: &str) -> Result<(), StoreError> {
        let trash = self.root.join("trash").join(format!("{label}-{}", std::process::id()));
        let _left_over = fs::remove_dir_all(&trash);
        match fs::rename(directory, &trash) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(StoreError::Directory { path: directory.to_owned(), step: "remove", source }),
        }
        // What stays is removed when the agent starts again.
        if let Err(error) = fs::remove_dir_all(&trash) {
            tracing::warn!(path = %trash.display(), %error, "trash stays until the next start");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::v1::{MachineConfig, VmState};

    fn scratch(test: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("godwit-store-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    fn vm(generation: u64) -> StoredVm {
        StoredVm {
            name: "vm1".into(),
            generation,
            state: VmState::Running.into(),
            config: Some(MachineConfig { memory_bytes: 64 << 20, ..MachineConfig::default() }),
            ..StoredVm::default()
        }
    }

    #[test]
    fn what_is_kept_comes_back_and_what_is_older_is_refused() {
        let root = scratch("keep");
        let store = Store::open(&root).unwrap();
        store.create(&vm(3)).unwrap();
        assert_eq!(Store::open(&root).unwrap().load().unwrap().0, [vm(3)]);
        assert!(matches!(store.save(&vm(2)), Err(StoreError::Older { kept: 3, .. })));
        store.note_seen("vm1", 3).unwrap();
        store.note_seen("vm1", 2).unwrap();
        store.remove("vm1", 3).unwrap();
        assert!(store.load().unwrap().0.is_empty());
        assert_eq!(store.seen("vm1").unwrap(), 3);
        fs::remove_dir_all(root).unwrap();
    }

    /// A crash between any two steps of a write leaves the old VM or the new one, never half of one.
    #[test]
    fn a_crash_while_writing_loses_nothing() {
        let root = scratch("crash");
        let store = Store::open(&root).unwrap();
        store.create(&vm(1)).unwrap();
        let path = store.directory("vm1").join("vm.pb");
        let new = path.with_extension("new");
        let bytes = saved::encode("vm", &vm(2));
        for cut in 0..=bytes.len() {
            fs::write(&new, &bytes[..cut]).unwrap();
            assert_eq!(Store::open(&root).unwrap().load().unwrap().0, [vm(1)], "cut at {cut}");
        }
        fs::rename(&new, &path).unwrap();
        assert_eq!(store.load().unwrap().0, [vm(2)]);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_directory_that_was_never_finished_is_removed_and_a_damaged_file_is_not_overlooked() {
        let root = scratch("damage");
        let store = Store::open(&root).unwrap();
        fs::create_dir(store.directory("half")).unwrap();
        store.create(&vm(1)).unwrap();
        assert_eq!(store.load().unwrap().0, [vm(1)]);
        assert!(!store.directory("half").exists());
        let path = store.directory("vm1").join("vm.pb");
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        let (vms, damaged) = store.load().unwrap();
        assert!(vms.is_empty() && matches!(damaged[..], [StoreError::Saved(SavedError::Damaged { .. })]));
        assert!(store.create(&vm(9)).is_err(), "its name stays taken");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn what_was_set_aside_comes_back_unless_something_took_its_place() {
        let root = scratch("aside");
        let store = Store::open(&root).unwrap();
        store.create(&vm(3)).unwrap();
        store.set_aside("vm1").unwrap();
        assert_eq!(store.kept_aside("vm1").map(|(vm, _)| vm.generation), Some(3));
        store.create(&vm(4)).unwrap();
        assert_eq!(Store::open(&root).unwrap().load().unwrap().0, [vm(4)]);
        store.remove("vm1", 4).unwrap();
        // The agent ends here; the next one finds no generation 4.
        assert_eq!(Store::open(&root).unwrap().load().unwrap().0, [vm(3)]);
        assert!(store.kept_aside("vm1").is_none() && store.directory("vm1").exists());
        store.set_aside("vm1").unwrap();
        store.drop_aside("vm1").unwrap();
        assert!(store.load().unwrap().0.is_empty());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        for name in ["", ".", "..", ".tmp", "-x", "a/b", "a b", "ä", &"x".repeat(41)] {
            assert!(!is_vm_name(name), "{name:?}");
        }
        assert!(is_vm_name("web-01") && is_vm_name("Vm_1.test"));
    }
}

//! restic, for comparison: the same RAM backed up into a repository in a directory.
//!
//! Its repository is made with its own defaults; what it stores is the size of the repository's files.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PROGRAM: &str = "restic";

/// A repository.
pub(super) struct Restic {
    repository: PathBuf,
    bytes: u64,
}

impl Restic {
    /// An empty repository; `None` if there is no restic.
    pub(super) fn start(repository: &Path) -> Result<Option<Restic>, String> {
        if Command::new(PROGRAM).arg("version").stdout(Stdio::null()).status().is_err() {
            return Ok(None);
        }
        let restic = Restic { repository: repository.to_owned(), bytes: 0 };
        restic.run(&[Path::new("init")])?;
        Ok(Some(Restic { bytes: size(repository)?, ..restic }))
    }

    /// Backs up a file; by how many bytes the repository has grown.
    pub(super) fn backup(&mut self, file: &Path) -> Result<u64, String> {
        self.run(&[Path::new("backup"), file])?;
        let before = std::mem::replace(&mut self.bytes, size(&self.repository)?);
        Ok(self.bytes.saturating_sub(before))
    }

    fn run(&self, args: &[&Path]) -> Result<(), String> {
        let mut command = Command::new(PROGRAM);
        command.args(["--quiet", "--no-cache", "--repo"]).arg(&self.repository).args(args);
        command.env("RESTIC_PASSWORD", "of a benchmark").stdin(Stdio::null());
        let output = command.output().map_err(|e| format!("{PROGRAM}: {e}"))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(format!("{PROGRAM} {args:?}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        }
    }
}

/// Bytes of all files below a folder.
fn size(folder: &Path) -> Result<u64, String> {
    let failed = |e: std::io::Error| format!("{}: {e}", folder.display());
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let data = entry.metadata().map_err(failed)?;
        bytes += if data.is_dir() { size(&entry.path())? } else { data.len() };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_folder_is_that_of_all_files_below_it() {
        let dir = std::env::temp_dir().join(format!("godwit-size-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("a/b")).unwrap();
        std::fs::write(dir.join("one"), [0; 10]).unwrap();
        std::fs::write(dir.join("a/b/two"), [0; 32]).unwrap();
        assert_eq!(size(&dir), Ok(42));
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(size(&dir).is_err());
    }
}

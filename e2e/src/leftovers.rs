//! What a program leaves behind that ends before its time: clusters, servers and folders, and how they go.
//!
//! Values remove what is theirs when they are dropped. A benchmark that panics is aborted, and one that is interrupted is
//! killed: nothing is dropped then. So whoever starts something that outlives the process claims it here, and
//! [`watch`] removes what is claimed when the end comes early. Tests do not watch: they unwind.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

use crate::cluster;

/// Exit code of a program that a signal has ended.
const INTERRUPTED: i32 = 130;
/// Exit code of a program that has panicked.
const PANICKED: i32 = 101;

/// What would be left.
#[derive(Debug, Clone)]
pub enum Leftover {
    /// A dev cluster: its `ctl` ends it, then its directory goes.
    Cluster {
        /// The program.
        ctl: PathBuf,
        /// The cluster's directory.
        dir: PathBuf,
    },
    /// A process of our own.
    Process(i32),
    /// A folder. Folders go last.
    Folder(PathBuf),
}

/// All that is claimed, by number. Held for as long as it is being removed: nobody ends the process meanwhile.
static CLAIMED: Mutex<Vec<(u64, Leftover)>> = Mutex::new(Vec::new());

/// A claim; it ends when this is dropped.
#[derive(Debug)]
pub struct Claim(u64);

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).retain(|(number, _)| *number != self.0);
    }
}

/// Claims something.
#[must_use = "the claim ends when this is dropped"]
pub fn claim(what: Leftover) -> Claim {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).push((number, what));
    Claim(number)
}

/// A folder of its own for files that nobody needs afterwards. It goes with the value, or with the program.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    _claim: Claim,
}

impl Scratch {
    /// A new folder, named after what it is for.
    ///
    /// # Errors
    /// It cannot be made; the text names it.
    pub fn new(what: &str) -> Result<Scratch, String> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("godwit-{what}-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        let claim = claim(Leftover::Folder(dir.clone()));
        Ok(Scratch { dir, _claim: claim })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is left, as in `remove`.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Removes all that is claimed, and ends the process. Whoever comes second waits for the first.
fn end(code: i32) -> ! {
    let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
    remove(std::mem::take(&mut *claimed).into_iter().map(|(_, what)| what).collect());
    std::process::exit(code)
}

fn remove(mut leftovers: Vec<Leftover>) {
    leftovers.sort_by_key(|what| matches!(what, Leftover::Folder(_)));
    for what in leftovers {
        // What cannot be removed is left: there is nobody to tell who could do more.
        match what {
            Leftover::Cluster { ctl, dir } => {
                let mut down = Command::new(ctl);
                down.args(["dev", "down", "--dir"]).arg(&dir).stdin(Stdio::null()).stdout(Stdio::null());
                let _ = down.status();
                let _ = std::fs::remove_dir_all(dir);
            }
            Leftover::Process(pid) => cluster::signal(pid, Signal::KILL),
            Leftover::Folder(dir) => {
                let _ = std::fs::remove_dir_all(dir);
            }
        }
    }
}

/// From now on a panic, Ctrl-C and SIGTERM remove what is claimed before they end the process.
///
/// # Errors
/// Signals cannot be listened for.
pub fn watch() -> std::io::Result<()> {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        told(panic);
        end(PANICKED);
    }));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("leftovers".into()).spawn(move || {
        runtime.block_on(async {
            let listen = |kind| signal(kind).expect("a process can listen for signals");
            let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt()), listen(SignalKind::terminate()));
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        eprintln!("interrupted: removing what is left");
        end(INTERRUPTED)
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_claimed_is_removed_and_what_is_dropped_is_not() {
        let dir = std::env::temp_dir().join(format!("godwit-leftovers-{}", std::process::id()));
        let folder = |name: &str| {
            std::fs::create_dir_all(dir.join(name).join("inside")).unwrap();
            Leftover::Folder(dir.join(name))
        };
        let (kept, gone) = (claim(folder("kept")), claim(folder("gone")));
        let mut process = Command::new("sleep").arg("600").spawn().unwrap();
        let running = claim(Leftover::Process(process.id() as i32));
        drop(kept);
        let ours = [gone.0, running.0];
        let claimed = CLAIMED.lock().unwrap().iter().filter(|(n, _)| ours.contains(n)).cloned().collect::<Vec<_>>();
        remove(claimed.into_iter().map(|(_, what)| what).collect());
        assert!(!process.wait().unwrap().success(), "it was killed");
        assert_eq!((dir.join("kept").exists(), dir.join("gone").exists()), (true, false));
        std::fs::remove_dir_all(dir).unwrap();
    }
}

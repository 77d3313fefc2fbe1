//! The Linux guest of `deploy/guest` on a cluster: Debian's kernel and a shell that counts and writes files whose names are
//! the digests of their contents.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use crate::cluster::{Cluster, wait_for};

/// How long the guest may take for something, on an emulated host too.
const PATIENCE: Duration = Duration::from_secs(240);

/// The files of `deploy/guest`.
#[derive(Clone, Debug)]
pub struct Linux(PathBuf);

impl Linux {
    /// Where they are; says so if they are not.
    pub fn found() -> Option<Linux> {
        let dir = std::env::var_os("GODWIT_GUEST")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest"), PathBuf::from);
        match dir.canonicalize() {
            Ok(dir) if dir.join("vmlinuz").is_file() => Some(Linux(dir)),
            _ => {
                eprintln!("SKIPPED: no Linux guest in {}; run deploy/guest", dir.display());
                None
            }
        }
    }

    /// Path of one of them.
    ///
    /// # Panics
    /// It is no text.
    pub fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("paths are text").to_owned()
    }

    /// The kernel's command line that goes with them.
    ///
    /// # Panics
    /// It cannot be read.
    pub fn cmdline(&self) -> String {
        std::fs::read_to_string(self.0.join("cmdline")).expect("the command line").trim().to_owned()
    }

    /// A copy of the disk for one VM of a cluster.
    ///
    /// # Panics
    /// It cannot be copied.
    pub fn disk(&self, cluster: &Cluster, vm: &str) -> String {
        let disk = cluster.dir().join(format!("{vm}.img"));
        std::fs::copy(self.0.join("disk.img"), &disk).expect("a copy of the disk");
        disk.to_str().expect("temporary paths are text").to_owned()
    }

    /// Creates a VM of this kernel, with a disk and an unplugged network card, which works from then on. `more` says how much
    /// memory it has.
    ///
    /// # Panics
    /// It cannot be created.
    pub fn create(&self, cluster: &Cluster, vm: &str, host: &str, kernel: &str, more: &[&str]) {
        let (initrd, disk, cmdline) = (self.file("initramfs.cpio"), self.disk(cluster, vm), self.cmdline());
        let files = ["--kernel", kernel, "--initrd", &initrd, "--cmdline", &cmdline, "--disk", &disk];
        let args = ["vm", "create", vm, "--host", host, "--net", "tap="];
        cluster.ok(args.into_iter().chain(files).chain(more.iter().copied()));
    }
}

/// The newest `godwit: beat N SHA256` of the guest's console.
pub fn count(cluster: &Cluster, vm: &str) -> Option<u64> {
    let console = cluster.ctl(["vm", "console", vm, "--log"]).stdout;
    let beat = |line: &str| line.split_once("godwit: beat ")?.1.split(' ').next()?.parse().ok();
    console.lines().rev().find_map(beat)
}

/// Waits until the guest has counted on.
///
/// # Panics
/// It does not, or something is wrong with it.
pub fn goes_on(cluster: &Cluster, vm: &str) -> u64 {
    let before = count(cluster, vm).unwrap_or(0);
    let now = wait_for(PATIENCE, "Linux to go on counting", || count(cluster, vm).filter(|now| *now >= before + 3));
    let console = cluster.console(vm);
    for trouble in ["DAMAGED", "BUG:", "Oops", "panic", "I/O error", "Call Trace"] {
        assert!(!console.contains(trouble), "{trouble} in:\n{console}");
    }
    now
}

/// Types a line at the guest's shell, and waits until the guest has said something that `answered` takes.
///
/// # Panics
/// It does not.
pub fn asked<T>(cluster: &Cluster, vm: &str, line: &str, answered: impl Fn(&str) -> Option<T>) -> T {
    let mut console = cluster.command(["vm", "console", vm]);
    let console = console.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut console = console.expect("ctl can be run");
    let mut keys = console.stdin.take().expect("stdin is piped");
    keys.write_all(format!("{line}\n").as_bytes()).expect("ctl reads its input");
    let answer = wait_for(PATIENCE, &format!("{vm} to answer {line:?}"), || {
        // A slow host may not answer at once.
        let console = cluster.ctl(["vm", "console", vm, "--log"]);
        answered(&console.stdout).filter(|_| console.code == Some(0))
    });
    console.kill().expect("ctl is running");
    console.wait().expect("ctl ends");
    answer
}

/// Has the guest read every file back from its disk; how many there are.
///
/// # Panics
/// One of them is not what the guest wrote.
pub fn verified(cluster: &Cluster, vm: &str) -> u64 {
    let verdicts = |console: &str| console.matches("godwit: verify ").count();
    let before = verdicts(&cluster.console(vm));
    let whole = |console: &str| {
        let (_, verdict) = console.rsplit_once("godwit: verify ").filter(|_| verdicts(console) > before)?;
        verdict.split_once('\n').map(|(line, _)| line.trim().to_owned())
    };
    let verdict = asked(cluster, vm, "verify", whole);
    let files = verdict.strip_prefix("ok ").and_then(|files| files.parse().ok());
    files.unwrap_or_else(|| panic!("verify {verdict}:\n{}", cluster.console(vm)))
}

//! A guest of ours under QEMU, for figures beside ours: under TCG with instruction counting, or on KVM.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::has_program;
use crate::cluster;
use crate::leftovers::{self, Claim, Leftover};

/// The program.
pub const QEMU: &str = "qemu-system-x86_64";
/// A machine on KVM. No clock interrupts of a firmware: guests have no use for them, and count on nothing of the processor.
pub const ON_KVM: [&str; 6] =
    ["-M", "microvm,pit=off,pic=off,rtc=on", "-accel", "kvm", "-cpu", "qemu64,-pni,+tsc-deadline"];
/// No devices but those that are named, and no window.
pub const BARE: [&str; 5] = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"];

/// What runs, and how it is counted.
pub struct Counted<'a> {
    /// A kernel with the PVH protocol, or a bzImage.
    pub kernel: &'a Path,
    /// Its first file system.
    pub initrd: Option<&'a Path>,
    /// Its command line.
    pub cmdline: &'a str,
    /// RAM.
    pub memory_bytes: u64,
    /// QEMU's `-icount`, or none: it runs on KVM.
    pub icount: Option<&'a str>,
    /// Its devices, in QEMU's words.
    pub devices: &'a [String],
    /// What is typed when the first mark appears.
    pub typed: &'a str,
    /// Seconds after which it is given up.
    pub patience_s: u32,
}

/// What QEMU says it is; `None` where there is none.
pub fn version() -> Option<String> {
    let output = Command::new(QEMU).arg("--version").output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

/// Ends the process with the value, or with the program.
struct Ended(Child, #[expect(dead_code, reason = "held for its end")] Claim);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Counted<'_> {
    /// Time between two marks on its console, the second of which ends it. An empty first mark is the start of QEMU, where
    /// nothing is typed. `None` where there is no QEMU, or it stalls.
    ///
    /// # Errors
    /// QEMU does not run.
    pub fn between_marks(&self, from: &str, to: &str) -> Result<Option<Duration>, String> {
        if !has_program(QEMU) {
            return Ok(None);
        }
        let begun = Instant::now();
        let child = self.command().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let child = child.map_err(|e| format!("{QEMU}: {e}"))?;
        let claim = leftovers::claim(Leftover::Process(child.id() as i32));
        let pid = child.id() as i32;
        let mut child = Ended(child, claim);
        // QEMU may stall under -icount; the reader sees the end of its output when it is ended.
        let (_over, watched) = channel::<()>();
        let patience = Duration::from_secs(self.patience_s.into());
        std::thread::spawn(move || {
            if watched.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                cluster::signal(pid, Signal::KILL);
            }
        });
        let stdout = child.0.stdout.take().expect("stdout is piped");
        // Open as long as it runs: the end of its input is an input.
        let mut stdin = child.0.stdin.take().expect("stdin is piped");
        let mut start = from.is_empty().then_some(begun);
        let mut lines = BufReader::new(stdout.take(1 << 20));
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            let text = String::from_utf8_lossy(&line).into_owned();
            line.clear();
            if start.is_none() && text.contains(from) {
                start = Some(Instant::now());
                stdin.write_all(self.typed.as_bytes()).map_err(|e| format!("{QEMU}: {e}"))?;
            }
            if let (Some(start), true) = (start, text.contains(to)) {
                return Ok(Some(start.elapsed()));
            }
        }
        let Self { patience_s, .. } = self;
        let how = self.icount.map_or("on KVM".to_owned(), |icount| format!("with -icount {icount}"));
        eprintln!("skipped: QEMU {how} did not print {to:?} in {patience_s} s");
        Ok(None)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(QEMU);
        command
            .args(BARE)
            .args(["-serial", "stdio", "-m", &(self.memory_bytes >> 20).to_string()])
            .arg("-kernel")
            .arg(self.kernel)
            .args(["-append", self.cmdline])
            .args(self.devices);
        match self.icount {
            // With its PIT, against which Linux finds the frequency of the TSC here.
            Some(icount) => {
                command.args(["-M", "microvm,acpi=on,rtc=on", "-accel", "tcg", "-cpu", "qemu64", "-icount", icount])
            }
            None => command.args(ON_KVM),
        };
        if let Some(initrd) = self.initrd {
            command.arg("-initrd").arg(initrd);
        }
        command
    }
}

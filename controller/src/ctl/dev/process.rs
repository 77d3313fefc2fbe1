//! Daemons of a dev cluster as processes: started, recognised, ended.
//!
//! A process id is used again by the kernel; together with the start time it is not (proc(5), `stat` field 22). Nothing is
//! signalled but through a pidfd whose process was recognised after it was opened. Knows no TOML and no TLS.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use proto::status::Code;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::layout::Directory;
use crate::ctl::failure::Failure;

/// How long a killed process may take to be gone.
const KILL_MAX: Duration = Duration::from_secs(5);

/// Names one process for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessId {
    pid: u32,
    /// Clock ticks from the boot of the host to its start.
    start: u64,
}

impl ProcessId {
    /// Of a process that is there now.
    pub fn of(pid: u32) -> Option<ProcessId> {
        stat(pid).map(|(_, start)| ProcessId { pid, start })
    }

    /// From a pid file: `PID START`.
    pub fn read(path: &Path) -> Option<ProcessId> {
        let text = std::fs::read_to_string(path).ok()?;
        let mut words = text.split_whitespace();
        let id = ProcessId { pid: words.next()?.parse().ok()?, start: words.next()?.parse().ok()? };
        words.next().is_none().then_some(id)
    }

    /// As a pid file has it.
    pub fn text(self) -> String {
        format!("{} {}\n", self.pid, self.start)
    }

    /// Does it run (and is it still the same)? One that was killed does not, though it may take a while to be gone.
    pub fn alive(self) -> bool {
        let runs = stat(self.pid).is_some_and(|(state, start)| start == self.start && !"ZX".contains(state));
        runs && !is_killed(self.pid)
    }

    /// Asks it to end (SIGTERM).
    pub fn ask_to_end(self) {
        if let Some(handle) = self.open() {
            // It may have ended meanwhile, which is what was wanted.
            let _ = pidfd_send_signal(&handle, Signal::TERM);
        }
    }

    /// Ends it: asks, waits, and kills what has not ended by then. Returns whether asking was enough.
    pub fn end(self, patience: Duration) -> bool {
        let Some(handle) = self.open() else { return true };
        let _ = pidfd_send_signal(&handle, Signal::TERM);
        if ended_within(&handle, patience) {
            return true;
        }
        let _ = pidfd_send_signal(&handle, Signal::KILL);
        ended_within(&handle, KILL_MAX);
        false
    }

    /// A handle of this process and no other: recognised after it was opened.
    fn open(self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        self.alive().then_some(handle)
    }
}

/// A pidfd is readable once its process has ended.
fn ended_within(handle: &OwnedFd, patience: Duration) -> bool {
    let patience = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: i64::from(patience.subsec_nanos()) };
    let mut fds = [PollFd::new(handle, PollFlags::IN)];
    loop {
        match poll(&mut fds, Some(&patience)) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.is_ok_and(|ready| ready > 0),
        }
    }
}

/// State letter and start time.
fn stat(pid: u32) -> Option<(char, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, also spaces and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Whether SIGKILL waits for a process or its first thread (proc(5), `status`: masks in which signal 1 is bit 0).
fn is_killed(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let masks = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    let kill = 1 << (Signal::KILL.as_raw() - 1);
    masks.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok()).any(|mask| mask & kill != 0)
}

/// Starts a daemon in a session of its own, with its words in its log, and records who it is.
///
/// # Errors
/// The program cannot be started, or the files cannot be written.
pub fn start(directory: &Directory, name: &str, program: &Path, config: &Path) -> Result<ProcessId, Failure> {
    let log = directory.log(name);
    let open = |path: &Path| -> std::io::Result<File> { OpenOptions::new().create(true).append(true).open(path) };
    let failed = |e: std::io::Error| Failure::file("write the log", &log, &e);
    let (out, err) = (open(&log).map_err(failed)?, open(&log).map_err(failed)?);
    let ctl = std::env::current_exe()
        .map_err(|e| Failure::new(Code::Internal, format!("cannot tell where ctl itself is: {e}")))?;
    let mut command = Command::new(&ctl);
    if name != "controller" {
        // Keys of the bucket are the controller's alone.
        for (variable, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"AWS_")) {
            command.env_remove(variable);
        }
    }
    let child = command
        .args(["dev", "launch", "--"])
        .arg(program)
        .arg("--config")
        .arg(config)
        .current_dir(&directory.root)
        .env_remove("GODWIT_CONFIG")
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .map_err(|e| Failure::file("run", &ctl, &e))?;
    let id = ProcessId::of(child.id()).ok_or_else(|| {
        Failure::new(Code::Internal, format!("{name} was gone at once")).hint(format!("see {}", log.display()))
    })?;
    let pid_file = directory.pid_file(name);
    std::fs::write(&pid_file, id.text()).map_err(|e| Failure::file("write", &pid_file, &e))?;
    Ok(id)
}

/// Processes of these programs with a path of the cluster among their arguments, recorded or not.
pub fn strays(root: &Path, programs: &[&str]) -> Vec<(String, ProcessId)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let found = pids.filter_map(|pid| {
        let id = ProcessId::of(pid).filter(|id| id.alive())?;
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<&Path> =
            words.split(|byte| *byte == 0).filter_map(|word| std::str::from_utf8(word).ok().map(Path::new)).collect();
        let program = words.first()?.file_name()?.to_str()?;
        let ours = programs.contains(&program) && words[1..].iter().any(|word| word.starts_with(root));
        ours.then(|| (format!("{program} {pid}"), id))
    });
    found.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> std::process::Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    #[test]
    fn a_process_is_recognised_by_pid_and_start_together() {
        let own = ProcessId::of(std::process::id()).unwrap();
        assert!(own.alive());
        assert!(!ProcessId { start: own.start + 1, ..own }.alive());
        assert_eq!(ProcessId::of(u32::MAX), None);
    }

    #[test]
    fn a_reused_pid_is_never_signalled() {
        let mut child = sleeper();
        let id = ProcessId::of(child.id()).unwrap();
        let other = ProcessId { start: id.start + 1, ..id };
        other.ask_to_end();
        assert!(other.end(Duration::from_millis(1)));
        assert_eq!(child.try_wait().unwrap(), None);
        assert!(id.end(Duration::from_secs(10)));
        assert!(!id.alive());
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_was_killed_does_not_run_any_more() {
        for _ in 0..50 {
            let mut child = sleeper();
            let id = ProcessId::of(child.id()).unwrap();
            assert!(id.alive());
            child.kill().unwrap();
            assert!(!id.alive(), "it is dying, or nobody has asked yet how it ended");
            child.wait().unwrap();
            assert!(!id.alive());
        }
    }

    #[test]
    fn pid_files_survive_and_rubbish_is_none() {
        let path = std::env::temp_dir().join(format!("godwit-pid-{}", std::process::id()));
        let id = ProcessId { pid: 7, start: 99 };
        std::fs::write(&path, id.text()).unwrap();
        assert_eq!(ProcessId::read(&path), Some(id));
        for rubbish in ["", "7", "7 x", "7 99 1", "-1 5"] {
            std::fs::write(&path, rubbish).unwrap();
            assert_eq!(ProcessId::read(&path), None, "{rubbish:?}");
        }
        std::fs::remove_file(&path).unwrap();
    }
}

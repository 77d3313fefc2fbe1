//! What recording costs QEMU: the same kernel from its first instruction to the shell, under `-icount` alone and with
//! `rr=record`, and how long its log is.

use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::SUITE;
use crate::bench::{Measurement, Report, has_program};

const QEMU: &str = "qemu-system-x86_64";
const PATIENCE_S: &str = "120";
const RUNS: usize = 3;
const MARK: &str = "godwit: up";
/// Ways of counting, and the names of their figures.
const WAYS: [(&str, &str, &str); 2] =
    [("shift=auto", "seconds_auto", "log_auto"), ("shift=0,sleep=off", "seconds_shift0", "log_shift0")];

/// Ends the process with the value.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // `timeout` passes it on to the program that it watches.
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), rustix::process::Signal::TERM);
        let _ = self.0.wait();
    }
}

/// Boots it, with and without a recorder, in turns.
pub fn boot(report: &Report, guest: &Path) -> Result<(), String> {
    if !has_program(QEMU) {
        report.skip("qemu: there is none");
        return Ok(());
    }
    let log = std::env::temp_dir().join(format!("godwit-bench-rr-{}", std::process::id()));
    for (counting, seconds, bytes) in WAYS {
        let (mut plain, mut recorded, mut logs) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..RUNS {
            plain.extend(to_shell(guest, counting)?);
            let recording = format!("{counting},rr=record,rrfile={}", log.display());
            recorded.extend(to_shell(guest, &recording)?);
            logs.extend(std::fs::metadata(&log).ok().map(|log| log.len() as f64));
            let _ = std::fs::remove_file(&log);
        }
        let measured = Measurement::of(SUITE, "qemu", seconds, "s", &recorded);
        report.add(measured.map(|m| m.beside("not_recorded", &plain)));
        report.add(Measurement::of(SUITE, "qemu", bytes, "B", &logs));
    }
    Ok(())
}

/// Seconds from its start to the shell; `None` if it does not get there.
fn to_shell(guest: &Path, icount: &str) -> Result<Option<f64>, String> {
    let mut command = Command::new("timeout");
    command
        .args([PATIENCE_S, QEMU, "-M", "microvm,acpi=on,rtc=on", "-accel", "tcg", "-cpu", "qemu64", "-icount", icount])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot", "-m", "256"])
        .arg("-kernel")
        .arg(guest.join("vmlinuz"))
        .arg("-initrd")
        .arg(guest.join("initramfs.cpio"))
        .args(["-append", "console=ttyS0 quiet panic=-1 godwit.work=off"]);
    let begun = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = Ended(child.map_err(|e| format!("{QEMU}: {e}"))?);
    let stdout = child.0.stdout.take().expect("stdout is piped");
    let mut lines = BufReader::new(stdout.take(1 << 20));
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
        if String::from_utf8_lossy(&line).contains(MARK) {
            return Ok(Some(begun.elapsed().as_secs_f64()));
        }
        line.clear();
    }
    eprintln!("skipped: QEMU with -icount {icount} did not print {MARK:?} in {PATIENCE_S} s");
    Ok(None)
}

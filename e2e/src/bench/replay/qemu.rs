//! What recording costs QEMU: the same kernel from its first instruction to the shell, under `-icount` alone and with
//! `rr=record`, and how long its log is.

use std::path::Path;

use super::SUITE;
use crate::bench::qemu::{self, Counted};
use crate::bench::{Measurement, Report};

const PATIENCE_S: u32 = 120;
const RUNS: usize = 3;
const MARK: &str = "godwit: up";
/// Ways of counting, and the names of their figures.
const WAYS: [(&str, &str, &str); 2] =
    [("shift=auto", "seconds_auto", "log_auto"), ("shift=0,sleep=off", "seconds_shift0", "log_shift0")];

/// Boots it, with and without a recorder, in turns.
pub fn boot(report: &Report, guest: &Path) -> Result<(), String> {
    if qemu::version().is_none() {
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
    let counted = Counted {
        kernel: &guest.join("vmlinuz"),
        initrd: Some(&guest.join("initramfs.cpio")),
        cmdline: "console=ttyS0 quiet panic=-1 godwit.work=off",
        memory_bytes: 256 << 20,
        icount,
        patience_s: PATIENCE_S,
    };
    Ok(counted.between_marks("", MARK)?.map(|elapsed| elapsed.as_secs_f64()))
}

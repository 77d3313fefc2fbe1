//! What recording costs QEMU: the same kernel with the same loads under `-icount` alone and with `rr=record`, in turns, and how
//! long its log is.

use std::path::{Path, PathBuf};

use super::SUITE;
use crate::bench::qemu::{self, Counted};
use crate::bench::recorded::{CMDLINE, COUNT, DISK_BYTES, DONE, MEMORY_BYTES, READ_AND_WRITE, UP};
use crate::bench::{Measurement, Report};
use crate::leftovers::Scratch;

const PATIENCE_S: u32 = 90;
const RUNS: usize = 3;
/// Ways of counting, and the names of their figures.
const WAYS: [(&str, &str, &str); 2] =
    [("shift=auto", "seconds_auto", "log_auto"), ("shift=0,sleep=off", "seconds_shift0", "log_shift0")];
/// Pings that the guest sends, one after the other, to the gateway that QEMU is to it.
const PINGS: u32 = 5_000;

/// Files that a measurement needs for a while.
struct Files {
    log: PathBuf,
    disk: PathBuf,
    _scratch: Scratch,
}

impl Files {
    fn new() -> Result<Files, String> {
        let scratch = Scratch::new("rr")?;
        let files = Files { log: scratch.path().join("log"), disk: scratch.path().join("disk"), _scratch: scratch };
        let disk = std::fs::File::create(&files.disk).and_then(|disk| disk.set_len(DISK_BYTES));
        disk.map_err(|e| format!("{}: {e}", files.disk.display()))?;
        Ok(files)
    }

    /// The device that a load needs, with an end that `rr=record` knows.
    fn device(&self, needed: Option<Device>) -> Vec<String> {
        let file = format!("driver=file,filename={},node-name=file", self.disk.display());
        let options: &[&str] = match needed {
            None => &[],
            Some(Device::Disk) => &[
                "-blockdev",
                &file,
                "-blockdev",
                "driver=raw,file=file,node-name=raw",
                "-blockdev",
                "driver=blkreplay,image=raw,node-name=disk",
                "-device",
                "virtio-blk-device,drive=disk",
            ],
            Some(Device::Card) => &[
                "-netdev",
                "user,id=net",
                "-object",
                "filter-replay,id=replay,netdev=net",
                "-device",
                "virtio-net-device,netdev=net",
            ],
        };
        options.iter().map(|option| (*option).to_owned()).collect()
    }
}

#[derive(Clone, Copy)]
enum Device {
    Disk,
    Card,
}

/// A load: what is typed, and between which marks it lies.
struct Load {
    name: &'static str,
    device: Option<Device>,
    typed: String,
    from: &'static str,
    to: &'static str,
}

fn loads() -> [Load; 4] {
    let load = |name, device, typed: &str| Load { name, device, typed: typed.to_owned(), from: UP, to: DONE };
    let ping = format!(
        "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; \
         ping -A -q -c {PINGS} -s 1000 10.0.2.2 >/dev/null; echo fin$((1+1))\n"
    );
    [
        Load { from: "", to: UP, ..load("boot", None, "") },
        load("cpu", None, COUNT),
        load("net", Some(Device::Card), &ping),
        load("disk", Some(Device::Disk), READ_AND_WRITE),
    ]
}

/// Does each load with and without a recorder, in turns.
pub fn loads_recorded(report: &Report, guest: &Path) -> Result<(), String> {
    if qemu::version().is_none() {
        report.skip("qemu: there is none");
        return Ok(());
    }
    let files = Files::new()?;
    for load in &loads() {
        let case = format!("qemu-{}", load.name);
        for (counting, seconds_name, log_name) in WAYS {
            let (mut plain, mut recorded, mut logs) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..RUNS {
                plain.extend(seconds(guest, &files, load, counting)?);
                let recording = format!("{counting},rr=record,rrfile={}", files.log.display());
                recorded.extend(seconds(guest, &files, load, &recording)?);
                logs.extend(std::fs::metadata(&files.log).ok().map(|log| log.len() as f64));
                let _ = std::fs::remove_file(&files.log);
            }
            let measured = Measurement::of(SUITE, &case, seconds_name, "s", &recorded);
            report.add(measured.map(|m| m.beside("not_recorded", &plain)));
            // From the first instruction on, whatever the load.
            report.add(Measurement::of(SUITE, &case, log_name, "B", &logs));
        }
    }
    Ok(())
}

/// How long the load takes; `None` if it does not end.
fn seconds(guest: &Path, files: &Files, load: &Load, icount: &str) -> Result<Option<f64>, String> {
    let counted = Counted {
        kernel: &guest.join("vmlinuz"),
        initrd: Some(&guest.join("initramfs.cpio")),
        cmdline: CMDLINE,
        memory_bytes: MEMORY_BYTES,
        icount: Some(icount),
        devices: &files.device(load.device),
        typed: &load.typed,
        patience_s: PATIENCE_S,
    };
    Ok(counted.between_marks(load.from, load.to)?.map(|elapsed| elapsed.as_secs_f64()))
}

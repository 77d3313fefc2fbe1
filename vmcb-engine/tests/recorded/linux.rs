//! A real Linux to record: the kernel that `GODWIT_TEST_KERNEL` names, or that `deploy/guest` has made.

use std::path::Path;

use proto::v1::{BootSource, DiskConfig, MachineConfig};

use crate::replaying::{Guest, config};

const RAM_BYTES: u64 = 512 << 20;
const DISK_BYTES: u64 = 8 << 20;
/// A line that keeps a shell busy with console and disk.
pub const TYPED: &[u8] = b"echo godwit; dmesg | tail -3; dd if=/dev/vda of=/dev/null count=64\n";

fn named_or(variable: &str, file: &str) -> Option<Vec<u8>> {
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest").join(file);
    let path = std::env::var_os(variable).map_or(made, Into::into);
    if !path.exists() {
        eprintln!("SKIPPED: {variable} names no file");
    }
    std::fs::read(path).ok()
}

/// With a disk and a network card; `None`, aloud, where there is no kernel.
pub fn linux(vcpus: u32) -> Option<Guest> {
    let kernel = named_or("GODWIT_TEST_KERNEL", "vmlinuz")?;
    let initrd = named_or("GODWIT_TEST_INITRD", "initramfs.cpio");
    let config = MachineConfig {
        vcpus,
        memory_bytes: RAM_BYTES,
        boot: Some(BootSource { cmdline: "console=ttyS0 panic=-1 reboot=t".into(), ..BootSource::default() }),
        disks: vec![DiskConfig { size_bytes: DISK_BYTES, ..DiskConfig::default() }],
        ..config()
    };
    Some(Guest { config, kernel, initrd })
}

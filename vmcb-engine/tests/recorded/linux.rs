//! A real Linux to record: the kernel that `GODWIT_TEST_KERNEL` names, or that `deploy/guest` has made.

use std::path::Path;

use proto::v1::{BootSource, DiskConfig, MachineConfig, NetConfig};

use crate::replaying::Guest;

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

fn config(vcpus: u32) -> MachineConfig {
    MachineConfig {
        vcpus,
        memory_bytes: RAM_BYTES,
        cpu_model: "soft-v1".into(),
        engine: "soft".into(),
        boot: Some(BootSource { cmdline: "console=ttyS0 panic=-1 reboot=t".into(), ..BootSource::default() }),
        disks: vec![DiskConfig { size_bytes: DISK_BYTES, ..DiskConfig::default() }],
        nets: vec![NetConfig { tap: String::new(), mac: vec![2, 0, 0, 0, 0, 9] }],
        seed: vec![7; 32],
        epoch_ns: 1_700_000_000_000_000_000,
        tsc_hz: 1_000_000_000,
        tsc_per_instruction: 1,
        paced: false,
        generation_id: vec![3; 16],
    }
}

/// With a disk and a network card; `None`, aloud, where there is no kernel.
pub fn linux(vcpus: u32) -> Option<Guest> {
    let kernel = named_or("GODWIT_TEST_KERNEL", "vmlinuz")?;
    let initrd = named_or("GODWIT_TEST_INITRD", "initramfs.cpio");
    Some(Guest { config: config(vcpus), kernel, initrd })
}

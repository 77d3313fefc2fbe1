//! What this host will take on: memory, files, and what a machine may ask for. What its engines can is in [`crate::facts`].
//!
//! Guest RAM is a memfd that fills as the guest touches it, so free memory alone says too little: what running guests
//! may still touch is counted as taken. Checks are plain functions over numbers; only the readings look at the host.

use std::io::Read;
use std::path::Path;

use proto::status::Code;
use proto::v1::{BootSource, MachineConfig, NetConfig};

use crate::config::Engine;
use crate::facts;
use crate::migration::Failure;

/// Left for the host itself when guests are admitted.
const RESERVE_BYTES: u64 = 128 << 20;
/// Guest RAM is a multiple of this.
const MEMORY_STEP_BYTES: u64 = 2 << 20;
const MEMORY_BYTES: std::ops::RangeInclusive<u64> = 16 << 20..=1 << 40;
/// Clock of a guest whose configuration names none.
pub const TSC_HZ: u64 = 1_000_000_000;
const TSC_PER_INSTRUCTION: u32 = 4;
const DISKS_MAX: usize = 16;
const NETS_MAX: usize = 8;

/// Memory of the host, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Memory {
    /// All of it.
    pub total: u64,
    /// What can be had without swapping (proc(5), MemAvailable).
    pub available: u64,
}

/// Reads `/proc/meminfo`; zeros if it cannot be read, which admits nothing.
pub fn memory() -> Memory {
    std::fs::read_to_string("/proc/meminfo").map(|text| parse_memory(&text)).unwrap_or_default()
}

fn parse_memory(text: &str) -> Memory {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
    };
    let bytes = |name| field(name).unwrap_or(0).saturating_mul(1024);
    Memory { total: bytes("MemTotal"), available: bytes("MemAvailable") }
}

/// Identifies this boot of the host: `CLOCK_BOOTTIME` readings are comparable within it.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Checks that a guest of `asked` bytes fits. `promised` is what other guests have not touched yet.
///
/// # Errors
/// [`Code::Exhausted`] with the numbers.
pub fn check_memory(memory: Memory, promised: u64, asked: u64) -> Result<(), Failure> {
    let free = memory.available.saturating_sub(promised).saturating_sub(RESERVE_BYTES);
    if asked <= free {
        return Ok(());
    }
    let mib = |bytes: u64| bytes >> 20;
    let text = format!(
        "{} MiB of memory are needed, {} MiB are free ({} MiB available, {} MiB promised to other guests, {} MiB kept for the host)",
        mib(asked),
        mib(free),
        mib(memory.available),
        mib(promised),
        mib(RESERVE_BYTES)
    );
    Err(Failure::new(Code::Exhausted, text))
}

fn bad(text: impl Into<String>) -> Failure {
    Failure::new(Code::BadInput, text.into())
}

/// Checks what a machine asks for, apart from files, and fills what it leaves open.
///
/// # Errors
/// [`Code::BadInput`] or [`Code::Incapable`], with the value.
pub fn settle(mut config: MachineConfig, vm: &str, default: Engine) -> Result<MachineConfig, Failure> {
    if config.vcpus == 0 {
        config.vcpus = 1;
    }
    let memory = config.memory_bytes;
    if !MEMORY_BYTES.contains(&memory) || !memory.is_multiple_of(MEMORY_STEP_BYTES) {
        return Err(bad(format!("memory of {memory} bytes: a multiple of 2 MiB from 16 MiB to 1 TiB is needed")));
    }
    if config.disks.len() > DISKS_MAX || config.nets.len() > NETS_MAX {
        return Err(bad(format!("at most {DISKS_MAX} disks and {NETS_MAX} network cards are possible")));
    }
    match (config.engine.as_str(), default) {
        ("soft" | "kvm", _) => {}
        ("" | "auto", Engine::Auto | Engine::Soft) => "soft".clone_into(&mut config.engine),
        ("" | "auto", Engine::Kvm) => "kvm".clone_into(&mut config.engine),
        (other, _) => return Err(bad(format!("engine {other:?} is not known: soft, kvm or auto"))),
    }
    config.cpu_model = facts::named_model(&config).to_owned();
    facts::model(&config.cpu_model)?;
    if config.tsc_hz == 0 {
        config.tsc_hz = TSC_HZ;
    }
    if config.tsc_per_instruction == 0 {
        config.tsc_per_instruction = TSC_PER_INSTRUCTION;
    }
    config.boot.as_ref().map_or(Ok(()), check_boot)?;
    for (card, net) in config.nets.iter_mut().enumerate() {
        settle_mac(net, vm, card)?;
    }
    Ok(config)
}

/// Fills what only a machine that is made for the first time may leave open: its randomness and its time of day.
///
/// # Errors
/// The host has no randomness.
pub fn settle_new(config: &mut MachineConfig, realtime_ns: u64) -> Result<(), Failure> {
    if config.seed.is_empty() {
        config.seed = random::<32>()?.to_vec();
    }
    if config.generation_id.is_empty() {
        config.generation_id = random::<16>()?.to_vec();
    }
    if config.epoch_ns == 0 {
        config.epoch_ns = realtime_ns;
    }
    Ok(())
}

fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|error| Failure::new(Code::Internal, format!("/dev/urandom: {error}")))?;
    Ok(bytes)
}

fn settle_mac(net: &mut NetConfig, vm: &str, card: usize) -> Result<(), Failure> {
    if net.mac.is_empty() {
        let hash = blake3::hash(format!("{vm}/{card}").as_bytes());
        // Locally administered, unicast.
        net.mac = [&[0x52, 0x54], &hash.as_bytes()[..4]].concat();
    }
    match net.mac[..] {
        [first, _, _, _, _, _] if first & 1 == 0 => Ok(()),
        _ => Err(bad(format!("network card {card}: {:02x?} is not a unicast MAC address", net.mac))),
    }
}

/// Checks that the files a guest boots from can be read, and fills the sizes of its disks.
///
/// # Errors
/// [`Code::BadInput`] or [`Code::NotFound`]; it names the file.
pub fn settle_files(config: &mut MachineConfig) -> Result<(), Failure> {
    let boot = config.boot.get_or_insert_default();
    if boot.kernel_path.is_empty() {
        return Err(bad("a kernel is needed: --kernel FILE"));
    }
    let kernel_bytes = image_length(&boot.kernel_path)?;
    let initrd_bytes = if boot.initrd_path.is_empty() { 0 } else { image_length(&boot.initrd_path)? };
    // Whoever keeps the configuration has said what travels; it is too late to say anything else.
    if boot.image_bytes > 0 && (boot.kernel_bytes, boot.initrd_bytes) != (kernel_bytes, initrd_bytes) {
        return Err(bad(format!("{} or the initrd has changed its length: create the VM again", boot.kernel_path)));
    }
    for disk in &mut config.disks {
        let bytes = readable(&disk.path, !disk.read_only)?;
        if bytes == 0 || !bytes.is_multiple_of(512) {
            return Err(bad(format!("disk {}: {bytes} bytes are not a multiple of 512", disk.path)));
        }
        disk.size_bytes = bytes;
    }
    Ok(())
}

/// Kernel and initrd in the VM's directory, from where they travel.
pub const BOOT_IMAGE: &str = "boot.img";
/// Longest kernel or initrd.
const IMAGE_BYTES_MAX: u64 = 1 << 30;

/// Where the initrd lies in a [`BOOT_IMAGE`]: on the page behind the kernel.
pub fn initrd_offset(boot: &BootSource) -> u64 {
    boot.kernel_bytes.next_multiple_of(4096)
}

fn image_length(path: &str) -> Result<u64, Failure> {
    match readable(path, false)? {
        bytes if bytes > IMAGE_BYTES_MAX => Err(bad(format!("{path} is longer than 1 GiB"))),
        bytes => Ok(bytes),
    }
}

/// Lengths that came from elsewhere and make no boot image.
fn check_boot(boot: &BootSource) -> Result<(), Failure> {
    let (kernel, initrd, image) = (boot.kernel_bytes, boot.initrd_bytes, boot.image_bytes);
    let fits = kernel <= IMAGE_BYTES_MAX && initrd <= IMAGE_BYTES_MAX && image == initrd_offset(boot) + initrd;
    if image == 0 || fits {
        return Ok(());
    }
    Err(bad(format!("kernel of {kernel} bytes and initrd of {initrd} make no boot image of {image}")))
}

/// Copies kernel and initrd into the VM's directory, if they travel: from now on they are part of the VM.
///
/// # Errors
/// A file that cannot be read or has changed its length, or no room.
pub fn make_boot_image(boot: &BootSource, directory: &Path) -> Result<(), Failure> {
    if boot.image_bytes == 0 {
        return Ok(());
    }
    let path = directory.join(BOOT_IMAGE);
    let failed = |path: &Path, error: std::io::Error| {
        let code = if error.kind() == std::io::ErrorKind::StorageFull { Code::Exhausted } else { Code::Internal };
        Failure::new(code, format!("{}: {error}", path.display()))
    };
    let mut image = std::fs::File::create(&path).map_err(|e| failed(&path, e))?;
    let parts =
        [(&boot.kernel_path, 0, boot.kernel_bytes), (&boot.initrd_path, initrd_offset(boot), boot.initrd_bytes)];
    for (from, offset, bytes) in parts.into_iter().filter(|(_, _, bytes)| *bytes > 0) {
        let mut source = std::fs::File::open(from).map_err(|e| failed(Path::new(from), e))?;
        std::io::Seek::seek(&mut image, std::io::SeekFrom::Start(offset)).map_err(|e| failed(&path, e))?;
        let copied = std::io::copy(&mut source, &mut image).map_err(|e| failed(&path, e))?;
        if copied != bytes {
            return Err(bad(format!("{from} has changed while it was copied: {bytes} bytes, then {copied}")));
        }
    }
    image.set_len(boot.image_bytes).map_err(|e| failed(&path, e))
}

/// Checks that a shared disk is there too.
///
/// # Errors
/// As [`settle_files`].
pub fn check_shared_disks(config: &MachineConfig) -> Result<(), Failure> {
    for disk in config.disks.iter().filter(|disk| disk.shared) {
        let bytes = readable(&disk.path, !disk.read_only)?;
        if bytes != disk.size_bytes {
            return Err(bad(format!(
                "shared disk {}: {bytes} bytes here, {} at the source",
                disk.path, disk.size_bytes
            )));
        }
    }
    Ok(())
}

fn readable(path: &str, write: bool) -> Result<u64, Failure> {
    let opened = std::fs::OpenOptions::new().read(true).write(write).open(path);
    let length = opened.and_then(|mut file| {
        // Block devices have no length of their own in metadata: the end tells.
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))
    });
    length.map_err(|error| {
        let code = if error.kind() == std::io::ErrorKind::NotFound { Code::NotFound } else { Code::BadInput };
        Failure::new(code, format!("{path}: {error}"))
    })
}

/// Makes an empty boot image and empty local disks in `directory` for a guest that arrives, and points the configuration at them.
///
/// # Errors
/// [`Code::Exhausted`] if they do not fit; otherwise what the file system says.
pub fn make_local_disks(config: &mut MachineConfig, directory: &Path) -> Result<(), Failure> {
    let failed =
        |path: &Path, error: std::io::Error| Failure::new(Code::Internal, format!("{}: {error}", path.display()));
    let boot_bytes = config.boot.as_ref().map_or(0, |boot| boot.image_bytes);
    let local = config.disks.iter().filter(|disk| !disk.shared);
    let needed: u64 = local.fold(boot_bytes, |sum, disk| sum.saturating_add(disk.size_bytes));
    let space = rustix::fs::statvfs(directory).map_err(|e| failed(directory, e.into()))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    if needed > free {
        let text =
            format!("local disks need {} MiB, {} has {} MiB free", needed >> 20, directory.display(), free >> 20);
        return Err(Failure::new(Code::Exhausted, text));
    }
    let make = |path: &Path, bytes: u64| {
        let made = std::fs::File::create(path).and_then(|file| file.set_len(bytes));
        made.map_err(|e| failed(path, e))
    };
    if boot_bytes > 0 {
        make(&directory.join(BOOT_IMAGE), boot_bytes)?;
    }
    for (index, disk) in config.disks.iter_mut().enumerate().filter(|(_, disk)| !disk.shared) {
        let path = directory.join(format!("disk{index}.img"));
        make(&path, disk.size_bytes)?;
        disk.path = path.to_string_lossy().into_owned();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::v1::DiskConfig;

    fn machine() -> MachineConfig {
        MachineConfig { memory_bytes: 64 << 20, nets: vec![NetConfig::default()], ..MachineConfig::default() }
    }

    #[test]
    fn meminfo_is_read() {
        let memory = parse_memory("MemTotal:       1000 kB\nMemFree: 5 kB\nMemAvailable:   600 kB\n");
        assert_eq!(memory, Memory { total: 1_024_000, available: 614_400 });
        assert_eq!(parse_memory("nonsense"), Memory::default());
    }

    #[test]
    fn memory_that_is_promised_is_not_given_twice() {
        let memory = Memory { total: 8 << 30, available: 4 << 30 };
        assert!(check_memory(memory, 0, 3 << 30).is_ok());
        let refusal = check_memory(memory, 2 << 30, 3 << 30).unwrap_err();
        assert_eq!(refusal.code, Code::Exhausted);
        assert!(refusal.reason.contains("2048 MiB promised"), "{refusal}");
    }

    #[test]
    fn open_values_are_settled_and_wrong_ones_named() {
        let settled = settle(machine(), "vm1", Engine::Auto).unwrap();
        assert_eq!((settled.engine.as_str(), settled.vcpus), ("soft", 1));
        assert_eq!(settled.nets[0].mac.len(), 6);
        assert_eq!(settle(machine(), "vm1", Engine::Auto).unwrap(), settled);
        let odd = MachineConfig { memory_bytes: 3 << 20, ..machine() };
        assert_eq!(settle(odd, "vm1", Engine::Auto).unwrap_err().code, Code::BadInput);
        let kvm = settle(MachineConfig { engine: "auto".into(), ..machine() }, "vm1", Engine::Kvm).unwrap();
        assert_eq!((kvm.engine.as_str(), kvm.cpu_model.as_str()), ("kvm", "x86-64-v2"));
        let unknown = MachineConfig { engine: "xen".into(), ..machine() };
        assert_eq!(settle(unknown, "vm1", Engine::Auto).unwrap_err().code, Code::BadInput);
        let group = MachineConfig { nets: vec![NetConfig { mac: vec![1; 6], ..NetConfig::default() }], ..machine() };
        assert_eq!(settle(group, "vm1", Engine::Auto).unwrap_err().code, Code::BadInput);
    }

    #[test]
    fn a_missing_file_is_named() {
        let mut config = machine();
        config.boot.get_or_insert_default().kernel_path = "/nowhere/vmlinuz".into();
        let refusal = settle_files(&mut config).unwrap_err();
        assert!(refusal.code == Code::NotFound && refusal.reason.contains("/nowhere/vmlinuz"), "{refusal}");
    }

    #[test]
    fn local_disks_are_made_empty_and_shared_ones_left() {
        let directory = std::env::temp_dir().join(format!("godwit-disks-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let disk = |shared| DiskConfig { path: "/elsewhere".into(), size_bytes: 1 << 20, shared, read_only: false };
        let mut config = MachineConfig { disks: vec![disk(true), disk(false)], ..machine() };
        make_local_disks(&mut config, &directory).unwrap();
        assert_eq!(config.disks[0].path, "/elsewhere");
        assert_eq!(std::fs::metadata(&config.disks[1].path).unwrap().len(), 1 << 20);
        std::fs::remove_dir_all(directory).unwrap();
    }
}

//! `ctl vm create`'s flags become a `MachineConfig`: everything that is needed to build the machine, on any host.
//!
//! What is wrong with the flags is said here, before anything is asked of a host. Randomness (seed, MAC) and the clock
//! (epoch) enter here and are part of the configuration from then on.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use proto::status::Code;
use proto::v1;

use super::failure::Failure;
use super::grammar::VmCreateArgs;
use super::units::show_bytes;

const LARGE_PAGE: u64 = 2 << 20;
const MEMORY_BYTES_MIN: u64 = 16 << 20;
const SECTOR: u64 = 512;
const TSC_HZ: u64 = 1_000_000_000;
const TSC_PER_INSTRUCTION: u32 = 4;
/// CPU model of a machine on the software engine.
const MODEL: &str = "soft-v1";
/// Most processors of a machine.
const VCPUS_MAX: u32 = 32;

/// Puts the configuration together.
///
/// # Errors
/// A flag that makes no sense, or a file that is not there.
pub fn build(args: &VmCreateArgs) -> Result<v1::MachineConfig, Failure> {
    check_name(&args.name)?;
    if !["soft", "kvm"].contains(&args.engine.as_str()) {
        return Err(Failure::bad_input(format!("there is no engine {:?}", args.engine)).hint("soft or kvm"));
    }
    if !(1..=VCPUS_MAX).contains(&args.vcpus) {
        return Err(Failure::bad_input(format!("a VM with {} processors cannot run", args.vcpus))
            .hint(format!("--vcpus 1 to {VCPUS_MAX}; on engine soft they take turns on one host processor")));
    }
    if args.memory < MEMORY_BYTES_MIN || !args.memory.is_multiple_of(LARGE_PAGE) {
        return Err(Failure::bad_input(format!("{} is no size of guest RAM", show_bytes(args.memory)))
            .hint(format!("a multiple of 2M, {} or more", show_bytes(MEMORY_BYTES_MIN))));
    }
    // What hardware has is its host's to say: the controller fills it in.
    let (model, tsc_hz) = if args.engine == "kvm" { ("", 0) } else { (MODEL, TSC_HZ) };
    let boot = boot(&args.kernel, args.initrd.as_deref(), &args.cmdline)?;
    let seed = random_bytes::<32>()?;
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(v1::MachineConfig {
        vcpus: args.vcpus,
        memory_bytes: args.memory,
        cpu_model: args.cpu.as_deref().unwrap_or(model).to_owned(),
        engine: args.engine.clone(),
        boot: Some(boot),
        disks: args.disks.iter().map(|text| disk(text)).collect::<Result<_, _>>()?,
        nets: args.nets.iter().map(|text| net(text)).collect::<Result<_, _>>()?,
        seed: seed.to_vec(),
        epoch_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
        tsc_hz,
        tsc_per_instruction: TSC_PER_INSTRUCTION,
        paced: !args.unpaced,
        generation_id: random_bytes::<16>()?.to_vec(),
    })
}

/// Names become directories and object keys.
fn check_name(name: &str) -> Result<(), Failure> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if first && name.len() <= 40 && name.chars().all(allowed) {
        return Ok(());
    }
    Err(Failure::bad_input(format!("{name:?} cannot be the name of a VM"))
        .hint("1 to 40 letters, digits, '-', '_' and '.', beginning with a letter or digit"))
}

/// The absolute path of a file that can be read.
fn readable(what: &str, path: &Path) -> Result<PathBuf, Failure> {
    let failed = |e: std::io::Error| Failure::file(&format!("read the {what}"), path, &e);
    let absolute = std::path::absolute(path).map_err(failed)?;
    let metadata = File::open(&absolute).and_then(|file| file.metadata()).map_err(failed)?;
    if metadata.is_dir() {
        return Err(Failure::bad_input(format!("the {what} {} is a directory", path.display())));
    }
    Ok(absolute)
}

fn text(path: &Path) -> Result<String, Failure> {
    let text = path.to_str().ok_or_else(|| Failure::bad_input(format!("the path {} is not UTF-8", path.display())))?;
    Ok(text.to_owned())
}

/// Kernel and initrd, with the lengths of what travels with the VM: the kernel up to a page's end, then the initrd.
fn boot(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<v1::BootSource, Failure> {
    let image = |what: &str, path: &Path| {
        let path = readable(what, path)?;
        let metadata = std::fs::metadata(&path).map_err(|e| Failure::file(&format!("size the {what}"), &path, &e))?;
        Ok::<_, Failure>((text(&path)?, metadata.len()))
    };
    let (kernel_path, kernel_bytes) = image("kernel", kernel)?;
    let (initrd_path, initrd_bytes) = initrd.map_or(Ok((String::new(), 0)), |path| image("initrd", path))?;
    let image_bytes = kernel_bytes.next_multiple_of(4096) + initrd_bytes;
    let cmdline = cmdline.to_owned();
    Ok(v1::BootSource { kernel_path, initrd_path, cmdline, image_bytes, kernel_bytes, initrd_bytes })
}

/// `PATH[,shared][,ro]`
fn disk(given: &str) -> Result<v1::DiskConfig, Failure> {
    let mut words = given.split(',');
    let path = words.next().unwrap_or_default();
    let (mut shared, mut read_only) = (false, false);
    for word in words {
        match word {
            "shared" => shared = true,
            "ro" => read_only = true,
            _ => {
                return Err(Failure::bad_input(format!("{word:?} in --disk {given:?} is not understood"))
                    .hint("--disk PATH[,shared][,ro]"));
            }
        }
    }
    let path = readable("disk", Path::new(path))?;
    // Seeking gives the size of block devices too.
    let size_bytes = File::open(&path)
        .and_then(|mut file| file.seek(SeekFrom::End(0)))
        .map_err(|e| Failure::file("size the disk", &path, &e))?;
    if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR) {
        return Err(Failure::bad_input(format!("the disk {} has {size_bytes} bytes", path.display()))
            .hint("a raw image is a whole number of 512-byte sectors, 4K or more"));
    }
    Ok(v1::DiskConfig { path: text(&path)?, size_bytes, shared, read_only })
}

/// `tap=T[,mac=M]`
fn net(given: &str) -> Result<v1::NetConfig, Failure> {
    let wrong = |why: String| Failure::bad_input(format!("--net {given:?}: {why}")).hint("--net tap=T[,mac=M]");
    let (mut tap, mut mac) = (None, None);
    for word in given.split(',') {
        let slot = match word.split_once('=') {
            Some(("tap", name)) if name.len() < 16 && !name.contains('/') => (&mut tap, name),
            Some(("tap", name)) => return Err(wrong(format!("{name:?} is no name of a network device"))),
            Some(("mac", address)) => (&mut mac, address),
            _ => return Err(wrong(format!("{word:?} is not understood"))),
        };
        if slot.0.replace(slot.1).is_some() {
            return Err(wrong(format!("{word:?} says again what was said")));
        }
    }
    let tap = tap.ok_or_else(|| wrong("tap= is missing; an empty tap= is a card without a cable".to_owned()))?;
    let mac = match mac {
        Some(address) => parse_mac(address).ok_or_else(|| {
            wrong(format!("{address:?} is no unicast address of six bytes, such as 02:00:00:00:00:01"))
        })?,
        None => random_mac()?,
    };
    Ok(v1::NetConfig { tap: tap.to_owned(), mac: mac.to_vec() })
}

fn parse_mac(address: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = address.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    // Bit 0 of the first byte makes it a group address, which no card may have.
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

/// Locally administered, unicast (IEEE 802 clause 8.2).
fn random_mac() -> Result<[u8; 6], Failure> {
    let mut mac = random_bytes::<6>()?;
    mac[0] = mac[0] & 0xfc | 0x02;
    Ok(mac)
}

fn random_bytes<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|e| Failure::new(Code::Internal, format!("cannot read /dev/urandom: {e}")))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::grammar::{Cli, Command, VmCommand};
    use clap::Parser as _;

    fn args(line: &str) -> VmCreateArgs {
        match Cli::parse_from(format!("ctl vm create {line}").split_whitespace()).command {
            Command::Vm(VmCommand::Create(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_become_a_whole_configuration() {
        let disk = std::env::temp_dir().join(format!("godwit-disk-{}", std::process::id()));
        std::fs::write(&disk, [0; 8192]).unwrap();
        let line = format!(
            "vm1 --host h --memory 64M --kernel /proc/version --disk {},ro --net tap= --unpaced",
            disk.display()
        );
        let config = build(&args(&line)).unwrap();
        std::fs::remove_file(&disk).unwrap();
        assert_eq!((config.vcpus, config.memory_bytes), (1, 64 << 20));
        assert_eq!((config.cpu_model.as_str(), config.engine.as_str()), ("soft-v1", "soft"));
        let kvm = build(&args("vm1 --host h --memory 64M --kernel /proc/version --engine kvm")).unwrap();
        assert_eq!((kvm.cpu_model.as_str(), kvm.tsc_hz), ("", 0), "the host says what it has");
        assert_eq!(
            (config.disks[0].size_bytes, config.disks[0].read_only, config.disks[0].shared),
            (8192, true, false)
        );
        assert_eq!(config.nets[0].mac[0] & 3, 2);
        assert_eq!((config.seed.len(), config.paced), (32, false));
        assert_ne!(config.seed, build(&args("vm1 --host h --memory 64M --kernel /proc/version")).unwrap().seed);
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        let wrong = [
            ("vm1 --host h --memory 64M --kernel /nonexistent", "/nonexistent"),
            ("vm1 --host h --memory 3M --kernel /proc/version", "guest RAM"),
            ("vm1 --host h --memory 64M --kernel /proc/version --vcpus 0", "0 processors"),
            ("vm1 --host h --memory 64M --kernel /proc/version --vcpus 33", "33 processors"),
            ("vm1 --host h --memory 64M --kernel /proc/version --engine tcg", "no engine"),
            ("../vm1 --host h --memory 64M --kernel /proc/version", "name of a VM"),
            ("vm1 --host h --memory 64M --kernel /proc/version --net mac=02:00:00:00:00:01", "tap= is missing"),
            ("vm1 --host h --memory 64M --kernel /proc/version --net tap=t,mac=01:00:00:00:00:01", "unicast"),
            ("vm1 --host h --memory 64M --kernel /proc/version --net tap=t,tap=u", "again"),
            ("vm1 --host h --memory 64M --kernel /proc/version --disk /proc/version,rw", "rw"),
            ("vm1 --host h --memory 64M --kernel /tmp", "directory"),
        ];
        for (line, why) in wrong {
            let failure = build(&args(line)).expect_err(line);
            assert!(failure.message.contains(why), "{line}: {}", failure.message);
            assert_eq!(failure.code, Code::BadInput);
        }
    }
}

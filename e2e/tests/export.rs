//! Exports of checkpoints: what they hold is what the guest wrote, gdb reads it, and what cannot be leaves nothing behind.
//!
//! Headers are parsed here by hand; where there is a gdb it must find the same.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::cluster::{Cluster, wait};
use e2e::guest::{Program, REGION, bare};
use e2e::linux::Linux;
use iced_x86::code_asm::{al, dx, edx, qword_ptr, rax, rdi};
use proto::status::Code;

const PAGE: u64 = 4096;
const PAGES: u64 = 4096;
/// A guest of about 40 MiB that rewrites 8 MiB/s.
const BUSY: Program =
    Program { start: REGION, region_bytes: PAGES * PAGE, pages_per_s: 2000, tick_ms: 20, tsc_hz: 1_000_000_000 };
/// As the in-tree guest has them.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
const PML4: u64 = 0x20_0000;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn checkpoint(cluster: &Cluster) -> String {
    cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap().to_owned()
}

fn export(cluster: &Cluster, id: &str, format: &str, out: &Path) -> serde_json::Value {
    cluster.json(["checkpoint", "export", id, "--format", format, "--out", text(out)])
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

/// The page as the in-tree guest writes it for the `count`th time.
fn written(page: u64, count: u64) -> Vec<u64> {
    let mut word = (MULTIPLIER.wrapping_mul(count) ^ page.rotate_left(32)) | 1 << 63;
    let mut words = vec![page, count];
    for _ in 2..512 {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        words.push(word);
    }
    words
}

/// A PT_LOAD segment: offset in the file, virtual and physical address, bytes.
#[derive(Debug, PartialEq, Eq)]
struct Load(u64, u64, u64, u64);

fn loads(core: &[u8]) -> Vec<Load> {
    assert_eq!(core[..5], *b"\x7fELF\x02");
    // A core for x86-64.
    assert_eq!(core[16..20], [4, 0, 62, 0]);
    let number = |at: usize| u64::from_le_bytes(core[at..at + 8].try_into().unwrap());
    let headers = usize::from(u16::from_le_bytes([core[56], core[57]]));
    let headers = (0..headers).map(|index| number(32) as usize + 56 * index).filter(|at| core[*at] == 1);
    headers.map(|at| Load(number(at + 8), number(at + 16), number(at + 24), number(at + 32))).collect()
}

/// What gdb says to these commands; `None`, said aloud, where there is none.
fn gdb(core: &Path, commands: &[&str]) -> Option<String> {
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-ex"]).arg(format!("core-file {}", core.display()));
    for command in commands {
        gdb.args(["-ex", command]);
    }
    match gdb.output() {
        Ok(output) => Some(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()),
        Err(_) => {
            eprintln!("SKIPPED: there is no gdb to read the core with");
            None
        }
    }
}

/// RIP of a checkpoint as `ctl vmcb show` decodes it.
fn rip(cluster: &Cluster, id: &str) -> u64 {
    let fields = cluster.json(["vmcb", "show", id]);
    let found = fields["fields"].as_array().unwrap().iter().find(|field| field["field"] == "RIP");
    let value = found.unwrap()["value"].as_str().unwrap().split_whitespace().next().unwrap().replace('_', "");
    u64::from_str_radix(value.trim_start_matches("0x"), 16).unwrap()
}

#[test]
fn an_export_holds_what_the_guest_wrote() {
    let cluster = Cluster::up(1);
    let mut disk = vec![0; 300 << 10];
    disk[100_000..200_000].iter_mut().enumerate().for_each(|(at, byte)| *byte = at as u8 ^ 0x5a);
    let image = cluster.dir().join("disk.img");
    fs::write(&image, &disk).unwrap();
    let memory = BUSY.memory_bytes().to_string();
    cluster.create_with("vm1", "hostA", BUSY, &["--memory", &memory, "--disk", text(&image)]);
    cluster.goes_on("vm1", 20);
    checkpoint(&cluster);
    cluster.goes_on("vm1", 20);
    let id = checkpoint(&cluster);
    let (raw, core) = (cluster.dir().join("raw"), cluster.dir().join("core"));
    let said = export(&cluster, &id, "raw", &raw);
    assert_eq!((&said["files"], &said["vm"]), (&serde_json::json!(["ram.raw", "disk0.raw"]), &"vm1".into()));
    assert_eq!(fs::read(raw.join("disk0.raw")).unwrap(), disk);

    let ram = fs::read(raw.join("ram.raw")).unwrap();
    assert_eq!(ram.len() as u64, BUSY.memory_bytes());
    let shadow = words(&ram[(REGION + BUSY.region_bytes) as usize..][..8 * PAGES as usize]);
    let region = ram[REGION as usize..].chunks(PAGE as usize).map(words);
    let wrong: Vec<usize> = region
        .zip(&shadow)
        .enumerate()
        .filter_map(|(page, (words, count))| (words != written(page as u64, *count)).then_some(page))
        .collect();
    // The guest may have stood still in the middle of one.
    assert!(wrong.len() <= 1, "pages that are not what the guest wrote: {wrong:?}");
    assert!(shadow.iter().any(|count| *count > 1), "the guest has rewritten something");

    // By the VM's name: its newest checkpoint.
    let said = export(&cluster, "vm1", "elf-core", &core);
    assert_eq!((&said["checkpoint"], &said["vcpus"]), (&serde_json::json!(id), &1.into()));
    let file = fs::read(&core).unwrap();
    let found = loads(&file);
    assert_eq!(found, [Load(found[0].0, 0, 0, BUSY.memory_bytes())]);
    assert!(file[found[0].0 as usize..] == ram, "the core has other RAM than the raw image");
    // Most of what was never touched is holes.
    let holes = BUSY.memory_bytes() - said["bytes_written"].as_u64().unwrap();
    let blocks = File::open(&core).unwrap().metadata().unwrap().blocks() * 512;
    assert!(holes > 1 << 20 && blocks < file.len() as u64 - holes / 2, "{blocks} of {} are on disk", file.len());
    let first = words(&ram[REGION as usize..][..16]);
    if let Some(said) = gdb(&core, &["info registers rip", &format!("x/2gx {REGION:#x}")]) {
        assert!(said.contains(&format!("{:#x}", rip(&cluster, &id))), "{said}");
        assert!(said.contains(&format!("0x{:016x}\t0x{:016x}", first[0], first[1])), "{said}");
    }
}

/// A guest that maps all of its memory at the beginning of the kernel's half too, and says `k` when it has.
fn kernel_half() -> Vec<u8> {
    let code = bare(|asm| {
        asm.mov(rdi, PML4)?;
        asm.mov(rax, qword_ptr(rdi))?;
        asm.mov(qword_ptr(rdi + 8 * 256), rax)?;
        asm.mov(rdi, MARKER_AT)?;
        asm.mov(rax, MARKER)?;
        asm.mov(qword_ptr(rdi), rax)?;
        let mut wait = asm.create_label();
        let mut turn = asm.create_label();
        asm.mov(edx, 0x3fd)?;
        asm.set_label(&mut wait)?;
        asm.in_(al, dx)?;
        asm.test(al, 0x20)?;
        asm.jz(wait)?;
        asm.mov(edx, 0x3f8)?;
        asm.mov(al, i32::from(b'k'))?;
        asm.out(dx, al)?;
        asm.set_label(&mut turn)?;
        asm.jmp(turn)
    });
    code.unwrap()
}

const MARKER_AT: u64 = 0x30_0000;
const MARKER: u64 = 0x0123_4567_89ab_cdef;
const KERNEL: u64 = 0xffff_8000_0000_0000;

#[test]
fn a_core_has_the_kernel_s_own_addresses() {
    let cluster = Cluster::up(1);
    let kernel = cluster.dir().join("kernel.elf");
    fs::write(&kernel, kernel_half()).unwrap();
    cluster.ok(["vm", "create", "vm1", "--host", "hostA", "--memory", "64M", "--kernel", text(&kernel)]);
    wait("the guest to map its memory", || cluster.console("vm1").contains('k').then_some(()));
    let id = checkpoint(&cluster);
    let core = cluster.dir().join("core");
    assert_eq!(export(&cluster, &id, "elf-core", &core)["kernel_mappings"], 1);
    let file = File::open(&core).unwrap();
    let mut head = vec![0; 1 << 20];
    file.read_exact_at(&mut head, 0).unwrap();
    let found = loads(&head);
    let at = found[0].0;
    assert_eq!(found, [Load(at, 0, 0, 64 << 20), Load(at, KERNEL, 0, 64 << 20)]);
    let mut marker = [0; 8];
    file.read_exact_at(&mut marker, at + MARKER_AT).unwrap();
    assert_eq!(u64::from_le_bytes(marker), MARKER);
    let (here, there) = (KERNEL + MARKER_AT, KERNEL + (64 << 20));
    let commands = ["info threads", "info registers rip", &format!("x/gx {here:#x}"), &format!("x/gx {there:#x}")];
    if let Some(said) = gdb(&core, &commands) {
        assert!(said.contains(&format!("0x{MARKER:016x}")), "{said}");
        assert!(said.contains(&format!("{:#x}", rip(&cluster, &id))), "{said}");
        // Beyond RAM there is nothing, rather than something else.
        assert!(said.contains(&format!("Cannot access memory at address {there:#x}")), "{said}");
    }
}

/// Where Linux's image begins when its place is not random.
const LINUX: u64 = 0xffff_ffff_8100_0000;

#[test]
fn linux_is_found_where_its_kernel_was_linked() {
    let Some(linux) = Linux::found() else { return };
    let cluster = Cluster::up(1);
    let (kernel, initrd) = (linux.file("vmlinuz"), linux.file("initramfs.cpio"));
    let files = ["--kernel", &kernel, "--initrd", &initrd];
    let args = ["vm", "create", "vm1", "--host", "hostA", "--memory", "256M"];
    let cmdline = ["--cmdline", "console=ttyS0 nokaslr panic=-1"];
    cluster.ok(args.into_iter().chain(files).chain(cmdline));
    wait("Linux to be up", || cluster.console("vm1").contains("godwit: up").then_some(()));
    let (id, core) = (checkpoint(&cluster), cluster.dir().join("core"));
    export(&cluster, &id, "elf-core", &core);
    let file = fs::read(&core).unwrap();
    let found = loads(&file);
    let image = found.iter().find(|load| load.1 == LINUX).unwrap();
    let bytes = &file[image.0 as usize..][..image.3 as usize];
    let banner = b"Linux version ";
    let at = bytes.windows(banner.len()).position(|window| window == banner).unwrap() as u64;
    if let Some(said) = gdb(&core, &[&format!("x/s {:#x}", LINUX + at), "x/i $rip"]) {
        assert!(said.contains("\"Linux version "), "{said}");
        assert!(said.contains("=> 0x"), "{said}");
    }
}

/// A small file system of its own.
struct Disk(PathBuf);

impl Disk {
    fn mount(bytes: &str) -> Option<Disk> {
        let path = std::env::temp_dir().join(format!("godwit-export-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        let disk = Disk(path);
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", bytes, "tmpfs"]).arg(&disk.0).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(disk);
        }
        eprintln!("SKIPPED: a full disk: mounting a tmpfs needs root");
        None
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l"]).arg(&self.0).output();
        let _ = fs::remove_dir(&self.0);
    }
}

fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn what_cannot_be_exported_is_named_and_leaves_nothing() {
    let cluster = Cluster::up(1);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 5);
    let id = checkpoint(&cluster);
    let folder = cluster.dir().join("exports");
    fs::create_dir(&folder).unwrap();
    let out = folder.join("out");
    let refused = |code: Code, id: &str, format: &str, out: &Path| {
        cluster.fails(code, ["checkpoint", "export", id, "--format", format, "--out", text(out)])
    };
    let said = refused(Code::NotFound, "vm2", "raw", &out);
    assert!(said.contains("no VM and no checkpoint vm2"), "{said}");
    let said = refused(Code::BadInput, &id, "raw", &folder.join("none/out"));
    assert!(said.contains("none/out"), "{said}");
    fs::write(&out, "somebody's").unwrap();
    for format in ["raw", "elf-core"] {
        let said = refused(Code::Conflict, &id, format, &out);
        assert!(said.contains("it is there already"), "{said}");
    }
    assert_eq!(fs::read(&out).unwrap(), b"somebody's");
    assert_eq!(names(&folder), ["out"]);
    fs::remove_file(&out).unwrap();
    if let Some(disk) = Disk::mount("size=8M") {
        for format in ["raw", "elf-core"] {
            let said = refused(Code::Exhausted, &id, format, &disk.0.join("out"));
            assert!(said.contains("make room there"), "{said}");
            assert_eq!(names(&disk.0), [""; 0]);
        }
    }
    // A host may not look into guests of others.
    let config = fs::read_to_string(cluster.dir().join("ctl.toml")).unwrap();
    let as_host = cluster.dir().join("host.toml");
    fs::write(&as_host, config.replace("admin", "hostA")).unwrap();
    let args = ["checkpoint", "export", &id, "--format", "raw", "--out", text(&out)];
    let denied = cluster.command(args).env("GODWIT_CONFIG", &as_host).output().unwrap();
    let said = String::from_utf8_lossy(&denied.stderr).into_owned();
    assert!(denied.status.code() == Some(Code::Denied as i32) && said.contains("host/hostA may not"), "{said}");
    // A pack that is not what it was: the export says so, and which.
    let record = cluster.json(["checkpoint", "show", &id]);
    let manifest = cluster.dir().join("bucket").join(record["manifest_key"].as_str().unwrap());
    let packs = manifest.parent().unwrap().with_file_name("g00000001").join("packs");
    let pack = packs.join(&names(&packs)[0]);
    let file = fs::OpenOptions::new().write(true).open(&pack).unwrap();
    file.write_all_at(&[0xff; 64], 2000).unwrap();
    let said = refused(Code::Corrupt, &id, "raw", &out);
    assert!(said.contains("pack"), "{said}");
    assert_eq!(names(&folder), [""; 0]);
}

//! An AMD host in software: QEMU emulates an EPYC with SVM, Debian's kernel runs on it with `kvm_amd`, and a whole cluster
//! works inside, driven by a shell script. So hardware guests are tried on any machine, at an emulator's pace.
//!
//! The host is an initramfs of the built programs, their shared libraries, and the Linux guest of `deploy/guest`, whose kernel
//! is also the host's. What the script and the host's kernel say comes back as text.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::cluster::binaries;
use crate::leftovers::Scratch;
use crate::linux::Linux;

/// An EPYC as every host of `x86-64-v2` is: QEMU emulates what the last five lack, and does not claim an invariant TSC although
/// its TSC is one, so that claim is forced.
pub const EPYC: &str = "EPYC,+svm,+npt,+xsaveerptr,phys-bits=48,+invtsc,x-force-features=on,-nrip-save,-xsavec,-topoext,\
                        -osvw,-misalignsse,-fxsr-opt";

const PROGRAMS: [&str; 4] = ["node-agent", "vm-runner", "controller", "ctl"];
/// In this order: each needs those before it.
const MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm-amd"];
/// RAM of the host, in MiB.
const MEMORY_MIB: u32 = 3072;

const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/godwit HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=80% tmp /tmp
ip link set lo up
for module in $MODULES; do insmod /modules/$module.ko; done
sh /script
poweroff -f
";

/// What a host is made of.
pub struct Lab {
    linux: Linux,
    modules: Vec<PathBuf>,
}

impl Lab {
    /// Where everything is there that it takes; says what is not.
    pub fn found() -> Option<Lab> {
        let linux = Linux::found()?;
        for program in ["qemu-system-x86_64", "busybox", "cpio", "strip", "ldd"] {
            let there =
                Command::new("sh").args(["-c", &format!("command -v {program}")]).stdout(Stdio::null()).status();
            if !there.is_ok_and(|status| status.success()) {
                eprintln!("SKIPPED: no {program}: no AMD host is emulated");
                return None;
            }
        }
        let cache = PathBuf::from(linux.file("cache"));
        let module = |name: &str| find(&cache, &format!("{name}.ko"));
        let Some(modules) = MODULES.into_iter().map(module).collect() else {
            eprintln!("SKIPPED: no kvm-amd.ko in {}: no AMD host is emulated", cache.display());
            return None;
        };
        Some(Lab { linux, modules })
    }

    /// Runs a script on a host with this processor (QEMU's `-cpu`), and returns all that was said there.
    ///
    /// # Panics
    /// The host cannot be made, or it has not ended in time.
    pub fn run(&self, cpu: &str, script: &str, within: Duration) -> String {
        let scratch = Scratch::new("lab").expect("a directory for the host");
        let (ended, said) = self.run_in(scratch.path(), cpu, script, within);
        assert!(ended, "the host has not ended within {within:?}:\n{said}");
        said
    }

    /// Whether it ended in time, and what was said.
    fn run_in(&self, dir: &Path, cpu: &str, script: &str, within: Duration) -> (bool, String) {
        let initramfs = self.initramfs(dir, script);
        let serial = dir.join("serial");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", cpu, "-smp", "2", "-m", &MEMORY_MIB.to_string()]);
        qemu.args(["-nodefaults", "-no-reboot", "-display", "none", "-append", "console=ttyS0 quiet panic=-1"]);
        qemu.arg("-serial").arg(format!("file:{}", serial.display()));
        qemu.arg("-kernel").arg(self.linux.file("vmlinuz")).arg("-initrd").arg(initramfs);
        let mut qemu =
            qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("QEMU runs");
        let end = Instant::now() + within;
        let mut ended = false;
        while !ended && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(100));
            ended = qemu.try_wait().expect("QEMU is ours").is_some();
        }
        if !ended {
            qemu.kill().expect("QEMU is ours");
        }
        qemu.wait().expect("QEMU is ours");
        (ended, String::from_utf8_lossy(&std::fs::read(serial).unwrap_or_default()).into_owned())
    }

    /// The host's file system.
    fn initramfs(&self, dir: &Path, script: &str) -> PathBuf {
        let tree = dir.join("tree");
        for folder in ["bin", "dev", "proc", "sys", "tmp", "modules", "godwit", "guest"] {
            std::fs::create_dir_all(tree.join(folder)).expect("a folder of the host");
        }
        let bin = binaries();
        for program in PROGRAMS {
            sh(&format!("strip -o {} {}", tree.join("godwit").join(program).display(), bin.join(program).display()));
            // Libraries go where the program looks for them; the kernel's own page is no file.
            let there = "ldd \"$0\" | grep -o '/[^ ]*' | while read -r file; do mkdir -p \"$1/${file%/*}\" && cp -L \"$file\" \"$1$file\"; done";
            run(Command::new("sh").args(["-c", there]).arg(bin.join(program)).arg(&tree));
        }
        sh(&format!("cp \"$(command -v busybox)\" {}", tree.join("bin/busybox").display()));
        for module in &self.modules {
            run(Command::new("cp").arg(module).arg(tree.join("modules")));
        }
        for file in ["vmlinuz", "initramfs.cpio", "cmdline", "disk.img"] {
            run(Command::new("cp").arg(self.linux.file(file)).arg(tree.join("guest")));
        }
        std::fs::write(tree.join("init"), INIT.replace("$MODULES", &MODULES.join(" ")))
            .expect("the host's first program");
        std::fs::write(tree.join("script"), script).expect("the script");
        sh(&format!("chmod 755 {}", tree.join("init").display()));
        let out = dir.join("initramfs.cpio");
        sh(&format!("cd {} && find . -mindepth 1 | cpio --quiet -o -H newc -R 0:0 >{}", tree.display(), out.display()));
        out
    }
}

fn sh(line: &str) {
    run(Command::new("sh").args(["-c", line]));
}

fn run(command: &mut Command) {
    let output = command.output().expect("a program of the system");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A file of this name at or below a folder.
fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).ok()?.flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(_) if entry.file_name() == name => return Some(entry.path()),
                _ => {}
            }
        }
    }
    None
}

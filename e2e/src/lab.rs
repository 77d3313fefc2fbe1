//! AMD hosts in software: QEMU emulates EPYCs with SVM, Debian's kernel runs on each with `kvm_amd`, and our agent is its only
//! program. Controller, `ctl` and agents of the software engine run outside, on the machine itself; so hardware guests are tried
//! on any machine, at an emulator's pace, and whoever pulls the plug of a host kills one process.
//!
//! A host is an initramfs: the agent, the runner, their shared libraries, a guest that checks its registers, and the Linux guest of
//! `deploy/guest`, whose kernel is also the host's. It needs no rights: its card is on QEMU's user network, where a port of the machine leads to its agent. Agents
//! are told addresses at `localhost`. That is the machine for whoever is outside, and a host's `/etc/hosts` names the machine so,
//! too: one address means one agent wherever one stands.
//!
//! This room refuses to know what a test does with a host, and how a cluster is talked to.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::cluster::{Cluster, binaries, wait_for};
use crate::guest::registers::Registers;
use crate::leftovers::{self, Claim, Leftover, Scratch};
use crate::linux::Linux;

/// An EPYC as every host of `x86-64-v2` is: QEMU emulates what the last five lack, and does not claim an invariant TSC although
/// its TSC is one, so that claim is forced.
pub const EPYC: &str = "EPYC,+svm,+npt,+xsaveerptr,phys-bits=48,+invtsc,x-force-features=on,-nrip-save,-xsavec,-topoext,\
                        -osvw,-misalignsse,-fxsr-opt";
/// How long a host, or a guest on one, may take for what takes seconds on hardware.
pub const PATIENCE: Duration = Duration::from_secs(240);
/// The tap of each host, for one guest. All have the same address and MAC: a guest that has moved finds its neighbour again.
pub const TAP: &str = "tap0";
/// The host's address on [`TAP`]; the network has 24 bits.
pub const TAP_ADDRESS: &str = "192.168.77.1";

const PROGRAMS: [&str; 2] = ["node-agent", "vm-runner"];
/// In this order: each needs those before it.
const MODULES: [&str; 13] = [
    "irqbypass",
    "kvm",
    "kvm-amd",
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "tun",
    "virtio-rng",
];
/// RAM of a host, in MiB.
const MEMORY_MIB: u32 = 1536;
/// Where an agent listens on its host.
const AGENT_PORT: u16 = 7401;

const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/godwit HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $MODULES; do insmod /modules/$module.ko; done
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
echo '10.0.2.2 localhost' >/etc/hosts
tunctl -t $TAP >/dev/null
ip link set $TAP address 02:00:00:00:00:01 up
ip addr add $TAP_ADDRESS/24 dev $TAP
gunzip $GUEST/disk.img.gz
echo 7 >/proc/sys/kernel/printk
(while sleep 1; do cat /state/vms/*/runner.log >/tmp/now 2>/dev/null; cmp -s /tmp/now /tmp/said || cat /tmp/now; mv /tmp/now /tmp/said; done) &
while true; do node-agent --config /host/agent.toml 2>&1 | cat; echo 'LAB: the agent has ended'; sleep 1; done
";

/// What hosts are made of.
pub struct Lab {
    linux: Linux,
    /// What all hosts have in common.
    initramfs: PathBuf,
    scratch: Scratch,
}

impl Lab {
    /// Where everything is there that it takes; says what is not.
    ///
    /// # Panics
    /// The hosts' file system cannot be made.
    pub fn found() -> Option<Lab> {
        let linux = Linux::found()?;
        for program in ["qemu-system-x86_64", "busybox", "cpio", "strip", "ldd", "openssl", "setpriv"] {
            let there =
                Command::new("sh").args(["-c", &format!("command -v {program}")]).stdout(Stdio::null()).status();
            if !there.is_ok_and(|status| status.success()) {
                eprintln!("SKIPPED: no {program}: no AMD host is emulated");
                return None;
            }
        }
        let cache = PathBuf::from(linux.file("cache"));
        let module = |name: &str| find(&cache, &format!("{name}.ko"));
        let Some(modules) = MODULES.into_iter().map(module).collect::<Option<Vec<_>>>() else {
            eprintln!("SKIPPED: no kvm-amd.ko in {}: no AMD host is emulated", cache.display());
            return None;
        };
        let scratch = Scratch::new("lab").expect("a directory for the hosts");
        for avx in [false, true] {
            // Rates are near enough to each other for a guest that only wants to sleep for some milliseconds.
            let guest = Registers { avx, tsc_hz: 2_500_000_000 };
            let elf = guest.elf().expect("the guest assembles");
            std::fs::write(registers(scratch.path(), avx), elf).expect("the guest's file");
        }
        let initramfs = common(scratch.path(), &linux, &modules);
        Some(Lab { linux, initramfs, scratch })
    }

    /// A cluster outside, with so many hosts of the software engine, whose daemons can be reached from emulated hosts.
    ///
    /// # Panics
    /// It does not come up.
    pub fn cluster(&self, hosts: u32) -> Cluster {
        let cluster = Cluster::up(hosts);
        let names = up(&cluster);
        for daemon in ["controller"].into_iter().chain(names.iter().map(String::as_str)) {
            let port = port(&cluster, daemon);
            // It is found and ended with the cluster.
            drop(cluster.restart_with(daemon, &[("address", &format!("\"localhost:{port}\""))], &[]));
        }
        wait_for(PATIENCE, "the cluster to be up again", || (up(&cluster).len() == names.len()).then_some(()));
        cluster
    }

    /// Powers a host up: QEMU's `-cpu` says what it is. [`Host::up`] waits for it.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn host(&self, cluster: &Cluster, name: &str, cpu: &str) -> Host {
        let dir = self.scratch.path().join(name);
        std::fs::create_dir_all(&dir).expect("a directory for the host");
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|free| free.local_addr()).expect("a free port");
        let initramfs = self.identity(cluster, &dir, name, port.port());
        let serial = dir.join("serial");
        // A host does not outlive the test, however that ends.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", cpu, "-smp", "1", "-m", &MEMORY_MIB.to_string()]);
        qemu.args(["-nodefaults", "-no-reboot", "-display", "none", "-append", "console=ttyS0 quiet panic=-1"]);
        qemu.arg("-serial").arg(format!("file:{}", serial.display()));
        qemu.arg("-netdev").arg(format!("user,id=net,ipv6=off,hostfwd=tcp:{port}-:{AGENT_PORT}"));
        qemu.args(["-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"]);
        qemu.arg("-kernel").arg(self.linux.file("vmlinuz")).arg("-initrd").arg(initramfs);
        let qemu = qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().expect("QEMU runs");
        let claim = leftovers::claim(Leftover::Process(qemu.id() as i32));
        Host { name: name.to_owned(), qemu, serial, _claim: claim }
    }

    /// The host's file system: what all have in common, and behind it who this one is.
    fn identity(&self, cluster: &Cluster, dir: &Path, name: &str, port: u16) -> PathBuf {
        let tls = cluster.dir().join("tls");
        let issue = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/certs/issue");
        run(Command::new(issue).arg("--dir").arg(&tls).args(["host", name]));
        let host = dir.join("tree/host");
        std::fs::create_dir_all(&host).expect("a folder of the host");
        for (from, to) in [("ca.pem", "ca.pem"), (&*format!("{name}.pem"), "pem"), (&*format!("{name}.key"), "key")] {
            std::fs::copy(tls.join(from), host.join(to)).expect("the host's certificates");
        }
        let controller = self::port(cluster, "controller");
        let settings = format!(
            "name = \"{name}\"\nlisten = \"0.0.0.0:{AGENT_PORT}\"\naddress = \"localhost:{port}\"\n\
             controller = \"localhost:{controller}\"\nstate_dir = \"/state\"\nrunner = \"/godwit/vm-runner\"\n\
             tls = {{ ca = \"ca.pem\", cert = \"pem\", key = \"key\" }}\n"
        );
        std::fs::write(host.join("agent.toml"), settings).expect("the agent's settings");
        let own = archive(&dir.join("tree"), &dir.join("own.cpio"));
        let out = dir.join("initramfs.cpio");
        sh(&format!("cat {} {} >{}", self.initramfs.display(), own.display(), out.display()));
        out
    }

    /// Creates a VM of the Linux guest on an emulated host: with a disk, and a card on this tap; `""`: unplugged.
    ///
    /// # Panics
    /// It cannot be created.
    pub fn create(&self, cluster: &Cluster, vm: &str, host: &str, tap: &str, more: &[&str]) {
        let (cmdline, net) = (self.linux.cmdline(), format!("tap={tap}"));
        let [kernel, initrd, disk] = ["vmlinuz", "initramfs.cpio", "disk.img"].map(|name| self.linux.file(name));
        let files = ["--kernel", &kernel, "--initrd", &initrd, "--disk", &disk];
        let args = ["vm", "create", vm, "--host", host, "--engine", "kvm", "--cmdline", &cmdline, "--net", &net];
        cluster.ok(args.into_iter().chain(files).chain(more.iter().copied()));
    }

    /// Creates a VM of the guest that checks its registers on an emulated host; with `--cpu x86-64-v3`, those of AVX, too.
    ///
    /// # Panics
    /// It cannot be created.
    pub fn create_registers(&self, cluster: &Cluster, vm: &str, host: &str, cpu: &str) {
        let kernel = registers(self.scratch.path(), cpu == "x86-64-v3");
        let (kernel, memory) = (kernel.to_str().expect("paths are text"), Registers::MEMORY_BYTES.to_string());
        let args = ["vm", "create", vm, "--host", host, "--engine", "kvm", "--kernel", kernel, "--memory", &memory];
        cluster.ok(args.into_iter().chain(["--cpu", cpu]));
    }
}

/// The guest that checks its registers, outside and on each host.
fn registers(dir: &Path, avx: bool) -> PathBuf {
    dir.join(if avx { "registers-avx.elf" } else { "registers.elf" })
}

/// An emulated host. Its power is cut when this is dropped.
pub struct Host {
    name: String,
    qemu: Child,
    serial: PathBuf,
    _claim: Claim,
}

impl Host {
    /// Waits until the cluster says that it is up and that its `kvm_amd` runs guests.
    ///
    /// # Panics
    /// That does not come.
    pub fn up(&mut self, cluster: &Cluster) {
        let name = self.name.clone();
        wait_for(PATIENCE, &format!("{name} to be up"), || {
            let ended = self.qemu.try_wait().expect("QEMU is ours");
            assert!(ended.is_none(), "QEMU of {name} has ended: {ended:?}\n{}", self.said());
            up(cluster).contains(&name).then_some(())
        });
    }

    /// What its kernel and its agent said.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.serial).unwrap_or_default()).into_owned()
    }

    /// Cuts its power: nothing on it ends in order.
    pub fn cut(self) {}
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.name, self.said());
        }
        // It may have ended by itself; what counts is that it is gone.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Hosts that the controller hears.
fn up(cluster: &Cluster) -> Vec<String> {
    let answer = cluster.ctl(["host", "ls", "-o", "json"]);
    let hosts: Vec<serde_json::Value> = serde_json::from_str(&answer.stdout).unwrap_or_default();
    let up = hosts.iter().filter(|host| host["state"] == "up");
    up.filter_map(|host| host["name"].as_str().map(str::to_owned)).collect()
}

/// Where a daemon of the cluster listens.
fn port(cluster: &Cluster, daemon: &str) -> u16 {
    let listen = cluster.setting(daemon, "listen");
    listen.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("daemons listen on a port")
}

/// The file system that all hosts have.
fn common(dir: &Path, linux: &Linux, modules: &[PathBuf]) -> PathBuf {
    let tree = dir.join("tree");
    for folder in ["bin", "dev", "proc", "sys", "tmp", "etc", "modules", "godwit"] {
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
    for module in modules {
        run(Command::new("cp").arg(module).arg(tree.join("modules")));
    }
    // `ctl` reads the files, too: they have one path, outside and on each host.
    let folder = linux.file("");
    let guest = tree.join(folder.trim_matches('/'));
    std::fs::create_dir_all(&guest).expect("a folder of the host");
    for file in ["vmlinuz", "initramfs.cpio"] {
        run(Command::new("cp").arg(linux.file(file)).arg(&guest));
    }
    let outside = tree.join(dir.strip_prefix("/").expect("temporary paths are absolute"));
    std::fs::create_dir_all(&outside).expect("a folder of the host");
    for avx in [false, true] {
        std::fs::copy(registers(dir, avx), registers(&outside, avx)).expect("the guest's file");
    }
    // Most of the disk is zeros, and what is loaded into a host takes time.
    sh(&format!("gzip -1 <{} >{}", linux.file("disk.img"), guest.join("disk.img.gz").display()));
    let init = INIT.replace("$MODULES", &MODULES.join(" ")).replace("$TAP_ADDRESS", TAP_ADDRESS).replace("$TAP", TAP);
    let init = init.replace("$GUEST", folder.trim_end_matches('/'));
    std::fs::write(tree.join("init"), init).expect("the host's first program");
    sh(&format!("chmod 755 {}", tree.join("init").display()));
    archive(&tree, &dir.join("common.cpio"))
}

fn archive(tree: &Path, out: &Path) -> PathBuf {
    sh(&format!("cd {} && find . -mindepth 1 | cpio --quiet -o -H newc -R 0:0 >{}", tree.display(), out.display()));
    out.to_owned()
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

//! Debian's unmodified cloud kernel on the software engine, through a migration and a restore. `deploy/guest` makes the
//! files; without them these tests say so and pass.

use std::path::PathBuf;
use std::process::Stdio;

use e2e::cluster::{Cluster, wait};

fn guest() -> Option<PathBuf> {
    let dir = std::env::var_os("GODWIT_GUEST")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest"), PathBuf::from);
    if dir.join("vmlinuz").is_file() {
        return Some(dir.canonicalize().expect("the folder is there"));
    }
    eprintln!("SKIPPED: no Linux guest in {}; run deploy/guest", dir.display());
    None
}

/// Creates `vm1` on hostA from the files of `deploy/guest`, with a copy of the disk.
fn boot(cluster: &Cluster, more: &[&str]) -> Option<()> {
    let guest = guest()?;
    // A copy of the kernel that is gone once the guest runs.
    let kernel = cluster.dir().join("vmlinuz");
    std::fs::copy(guest.join("vmlinuz"), &kernel).expect("a copy of the kernel");
    let disk = cluster.dir().join("disk.img");
    std::fs::copy(guest.join("disk.img"), &disk).expect("a copy of the disk");
    let text = |path: PathBuf| path.to_str().expect("paths are text").to_owned();
    let cmdline = std::fs::read_to_string(guest.join("cmdline")).expect("the command line");
    let (path, initrd, disk) = (text(kernel.clone()), text(guest.join("initramfs.cpio")), text(disk));
    let files = ["--kernel", &path, "--initrd", &initrd, "--cmdline", cmdline.trim(), "--disk", &disk];
    let args = ["vm", "create", "vm1", "--host", "hostA", "--memory", "512M", "--net", "tap="];
    cluster.ok(args.into_iter().chain(files).chain(more.iter().copied()));
    std::fs::remove_file(kernel).expect("the kernel's file");
    Some(())
}

/// The newest `godwit: beat N SHA256` of the guest's console.
fn count(cluster: &Cluster) -> Option<u64> {
    let console = cluster.ctl(["vm", "console", "vm1", "--log"]).stdout;
    let beat = |line: &str| line.split_once("godwit: beat ")?.1.split(' ').next()?.parse().ok();
    console.lines().rev().find_map(beat)
}

fn goes_on(cluster: &Cluster) -> u64 {
    let before = count(cluster).unwrap_or(0);
    let now = wait("Linux to go on counting", || count(cluster).filter(|now| *now >= before + 3));
    let console = cluster.console("vm1");
    for trouble in ["DAMAGED", "BUG:", "Oops", "panic", "I/O error", "Call Trace"] {
        assert!(!console.contains(trouble), "{trouble} in:\n{console}");
    }
    now
}

/// Moves the guest to hostB and lets it reboot there: it comes up again, with its disk.
fn reboots(cluster: &Cluster) {
    cluster.start(2);
    cluster.ok(["migrate", "vm1", "--to", "hostB"]);
    let before = goes_on(cluster);
    let mut console = cluster.command(["vm", "console", "vm1"]);
    let mut console = console.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("ctl can be run");
    let mut keys = console.stdin.take().expect("stdin is piped");
    std::io::Write::write_all(&mut keys, b"sync; reboot -f\n").expect("ctl reads its input");
    wait("Linux to come up again", || cluster.console("vm1").contains("godwit: up").then_some(()));
    assert!(goes_on(cluster) > before, "it counts on from what its disk says");
    assert_eq!(cluster.observed("vm1"), "running");
    console.kill().expect("ctl is running");
    console.wait().expect("ctl ends");
}

#[test]
fn linux_boots_works_moves_and_comes_back() {
    let cluster = Cluster::up(2);
    if boot(&cluster, &[]).is_none() {
        return;
    }
    goes_on(&cluster);
    let migration = cluster.json(["migrate", "vm1", "--to", "hostB"]);
    assert_eq!(migration["source_digest"], migration["target_digest"]);
    goes_on(&cluster);
    cluster.ok(["checkpoint", "create", "vm1"]);
    goes_on(&cluster);
    let runner = cluster.runner("hostB", "vm1").expect("the guest has a runner");
    cluster.kill(cluster.daemon("hostB"));
    cluster.kill(runner);
    cluster.ok(["restore", "vm1", "--to", "hostA"]);
    goes_on(&cluster);
    // The files that it booted from are not needed any more: they travelled, and it boots again from its own.
    reboots(&cluster);
    let migration = cluster.json(["migrate", "vm1", "--to", "hostA"]);
    assert_eq!(migration["source_digest"], migration["target_digest"]);
    goes_on(&cluster);
}

#[test]
fn linux_with_several_processors_moves_and_comes_back() {
    let cluster = Cluster::up(2);
    if boot(&cluster, &["--vcpus", "4"]).is_none() {
        return;
    }
    goes_on(&cluster);
    let mut console = cluster.command(["vm", "console", "vm1"]);
    let mut console = console.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("ctl can be run");
    let mut keys = console.stdin.take().expect("stdin is piped");
    let busy =
        b"for n in 1 2 3; do (while :; do :; done) & done; echo processors: $(grep -c ^processor /proc/cpuinfo)\n";
    std::io::Write::write_all(&mut keys, busy).expect("ctl reads its input");
    wait("the shell to answer", || cluster.console("vm1").contains("processors: 4").then_some(()));
    for host in ["hostB", "hostA"] {
        let migration = cluster.json(["migrate", "vm1", "--to", host]);
        assert_eq!(migration["source_digest"], migration["target_digest"]);
        goes_on(&cluster);
    }
    cluster.ok(["checkpoint", "create", "vm1"]);
    cluster.kill(cluster.runner("hostA", "vm1").expect("the guest has a runner"));
    cluster.ok(["restore", "vm1", "--to", "hostB"]);
    goes_on(&cluster);
    console.kill().expect("ctl is running");
    console.wait().expect("ctl ends");
}

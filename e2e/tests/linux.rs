//! Debian's unmodified cloud kernel on the software engine, through a migration and a restore. `deploy/guest` makes the
//! files; without them these tests say so and pass.

use e2e::cluster::Cluster;
use e2e::linux::{self, Linux, asked};

/// Creates `vm1` on hostA from a copy of the kernel that is gone once the guest runs.
fn boot(cluster: &Cluster, more: &[&str]) -> Option<()> {
    let kernel = cluster.dir().join("vmlinuz");
    let linux = Linux::found()?;
    std::fs::copy(linux.file("vmlinuz"), &kernel).expect("a copy of the kernel");
    let copied = kernel.to_str().expect("temporary paths are text");
    let more: Vec<&str> = ["--memory", "512M"].iter().chain(more).copied().collect();
    linux.create(cluster, "vm1", "hostA", copied, &more);
    std::fs::remove_file(kernel).expect("the kernel's file");
    Some(())
}

fn goes_on(cluster: &Cluster) -> u64 {
    linux::goes_on(cluster, "vm1")
}

/// Moves the guest to hostB and lets it reboot there: it comes up again, with its disk.
fn reboots(cluster: &Cluster) {
    cluster.start(2);
    cluster.ok(["migrate", "vm1", "--to", "hostB"]);
    let before = goes_on(cluster);
    asked(cluster, "vm1", "sync; reboot -f", |console| console.contains("godwit: up").then_some(()));
    assert!(goes_on(cluster) > before, "it counts on from what its disk says");
    assert_eq!(cluster.observed("vm1"), "running");
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
    let busy = "for n in 1 2 3; do (while :; do :; done) & done; echo processors: $(grep -c ^processor /proc/cpuinfo)";
    asked(&cluster, "vm1", busy, |console| console.contains("processors: 4").then_some(()));
    for host in ["hostB", "hostA"] {
        let migration = cluster.json(["migrate", "vm1", "--to", host]);
        assert_eq!(migration["source_digest"], migration["target_digest"]);
        goes_on(&cluster);
    }
    cluster.ok(["checkpoint", "create", "vm1"]);
    cluster.kill(cluster.runner("hostA", "vm1").expect("the guest has a runner"));
    cluster.ok(["restore", "vm1", "--to", "hostB"]);
    goes_on(&cluster);
}

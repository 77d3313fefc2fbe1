//! What the store does for checkpoints that lie there, on whole clusters of real binaries: damage is found, named, marked and
//! never built on; what nobody needs goes, and nothing else.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use e2e::bucket::Weed;
use e2e::cluster::{Cluster, wait};
use e2e::guest::{Program, REGION};
use proto::status::Code;
use serde_json::Value;

/// A small guest, so that a checkpoint takes a moment.
const GUEST: Program =
    Program { start: REGION, region_bytes: 4 << 20, pages_per_s: 500, tick_ms: 20, tsc_hz: 1_000_000_000 };

/// All files below a folder, with their lengths.
fn files(dir: &Path) -> Vec<(PathBuf, u64)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let inside = |path: PathBuf| {
        let length = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        if path.is_dir() { files(&path) } else { vec![(path, length)] }
    };
    entries.flat_map(inside).collect()
}

/// The packs in a cluster's bucket, the largest first.
fn packs(cluster: &Cluster) -> Vec<PathBuf> {
    let mut found = files(&cluster.dir().join("bucket/vms"));
    found.retain(|(path, _)| path.parent().is_some_and(|parent| parent.ends_with("packs")));
    found.sort_by_key(|(path, bytes)| (std::cmp::Reverse(*bytes), path.clone()));
    found.into_iter().map(|(path, _)| path).collect()
}

fn name(path: &Path) -> String {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned()
}

fn checkpoint(cluster: &Cluster) -> String {
    cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap_or_default().to_owned()
}

fn verified(cluster: &Cluster, id: &str) -> String {
    cluster.json(["checkpoint", "show", id])["verified"].as_str().unwrap_or_default().to_owned()
}

/// Changes a byte in the middle, or cuts the last one off.
fn harm(pack: &Path, cut: bool) {
    let mut bytes = std::fs::read(pack).expect("a pack can be read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    bytes.truncate(bytes.len() - usize::from(cut));
    std::fs::write(pack, bytes).expect("a pack can be written");
}

#[test]
fn what_is_damaged_is_named_marked_and_whole_again_in_the_next_checkpoint() {
    let cluster = Cluster::up(1);
    cluster.create("vm1", "hostA", GUEST);
    cluster.goes_on("vm1", 3);
    let (first, second) = (checkpoint(&cluster), checkpoint(&cluster));
    // The pack of most pages, which both need.
    let pack = packs(&cluster).remove(0);
    harm(&pack, false);
    let said = cluster.fails(Code::Corrupt, ["checkpoint", "verify", &second]);
    assert!(said.contains(&name(&pack)), "{said}");
    for id in [&first, &second] {
        assert!(verified(&cluster, id).contains(&name(&pack)), "{id}: {}", verified(&cluster, id));
    }
    let shown = cluster.json(["checkpoint", "show", &first]);
    let damaged = shown["damaged"][0].as_str().unwrap_or_default();
    assert!(damaged.contains(&name(&pack)) && damaged.contains(&format!("{second} too")), "{shown:#}");
    let events = cluster.ok(["events", "--vm", "vm1"]);
    assert_eq!(events.matches("checkpoint.damaged").count(), 1, "{events}");
    // The live guest has all of it: the next one is whole, and needs nothing of what is damaged.
    let third = checkpoint(&cluster);
    cluster.ok(["checkpoint", "verify", &third]);
    // What is cut short is noticed by its length, without anybody's reading it.
    let pack = packs(&cluster).into_iter().find(|there| *there != pack).expect("a pack of the third");
    harm(&pack, true);
    let fourth = checkpoint(&cluster);
    assert!(verified(&cluster, &third).contains("bytes"), "{}", verified(&cluster, &third));
    cluster.ok(["checkpoint", "verify", &fourth]);
    let before = cluster.goes_on("vm1", 3);
    cluster.ok(["restore", &fourth]);
    assert!(cluster.goes_on("vm1", 3).tick < before.tick + 1000);
    let page = cluster.metrics("controller");
    assert!(page.contains("godwit_checkpoints_damaged 3"), "{page}");
    for id in [&first, &second, &third] {
        cluster.ok(["checkpoint", "rm", id]);
    }
    cluster.ok(["checkpoint", "verify", "--all"]);
}

#[test]
fn damaged_page_maps_are_not_built_on() {
    let cluster = Cluster::up(1);
    cluster.create("vm1", "hostA", GUEST);
    cluster.goes_on("vm1", 3);
    let first = checkpoint(&cluster);
    // Whatever is damaged, the page maps are among it.
    for pack in packs(&cluster) {
        harm(&pack, false);
    }
    cluster.fails(Code::Corrupt, ["checkpoint", "verify", &first]);
    let second = checkpoint(&cluster);
    cluster.ok(["checkpoint", "verify", &second]);
    cluster.ok(["checkpoint", "rm", &first]);
    cluster.ok(["restore", &second]);
    cluster.goes_on("vm1", 3);
}

#[test]
fn a_sweep_removes_what_is_dead_rewrites_what_mostly_is_and_the_guest_comes_back() {
    let cluster = Cluster::up(1);
    cluster.create("vm1", "hostA", GUEST);
    cluster.goes_on("vm1", 3);
    let first = checkpoint(&cluster);
    // The guest rewrites its memory: the first checkpoint's packs die bit by bit.
    for _ in 0..4 {
        cluster.goes_on("vm1", 60);
        checkpoint(&cluster);
    }
    cluster.ok(["checkpoint", "rm", &first]);
    let orphan = packs(&cluster).remove(0).with_file_name("ab".repeat(32));
    std::fs::write(&orphan, b"what a killed checkpoint left").expect("the bucket can be written");
    let rehearsed = cluster.json(["checkpoint", "sweep", "--dry-run"]);
    assert_eq!(rehearsed["vms"][0]["removed"], 1, "{rehearsed:#}");
    assert!(orphan.exists());
    let swept = cluster.json(["checkpoint", "sweep", "vm1"]);
    assert!(swept["vms"][0]["removed"].as_u64() >= Some(1), "{swept:#}");
    assert!(swept["vms"][0]["repacked"].as_u64() >= Some(1), "{swept:#}");
    assert!(!orphan.exists());
    cluster.ok(["checkpoint", "verify", "--all"]);
    let last = checkpoint(&cluster);
    cluster.ok(["checkpoint", "verify", &last]);
    cluster.ok(["restore", &last]);
    cluster.goes_on("vm1", 5);
    let again = cluster.json(["checkpoint", "sweep"]);
    assert_eq!(again["vms"][0]["left"], 0, "{again:#}");
    cluster.fails(Code::NotFound, ["checkpoint", "sweep", "nobody"]);
}

/// Two clusters that share a bucket, which both believe to have one VM.
fn two_clusters(url: &str) {
    let first = Cluster::up_with(1, &["--bucket", url]);
    first.create("vm1", "hostA", GUEST);
    first.create("vm2", "hostA", GUEST);
    first.goes_on("vm1", 3);
    first.ok(["policy", "set", "vm1", "--every", "1d", "--keep-last", "3"]);
    let made = checkpoint(&first);
    let other = first.json(["checkpoint", "create", "vm2"])["id"].as_str().unwrap_or_default().to_owned();
    let keys = first.ok(["key", "export"]);

    let second = Cluster::up_with(1, &["--bucket", url]);
    let safe = second.dir().join("safe");
    std::fs::write(&safe, keys).expect("a file for the keys");
    second.ok(["key", "import", safe.to_str().expect("temporary paths are text")]);
    second.ok(["restore", "vm1", "--from", url]);
    second.goes_on("vm1", 3);
    // Only what was asked for was taken in, and its policy with it.
    let known = second.json(["checkpoint", "ls"]).to_string();
    assert!(known.contains(&made) && !known.contains(&other), "{known}");
    assert_eq!(second.json(["policy", "ls"])[0]["policy"], "every 1d, keep last 3");
    // Until the second writes, the first may; from then on it is told whose the VM is.
    checkpoint(&first);
    let theirs = checkpoint(&second);
    let said = first.fails(Code::Conflict, ["checkpoint", "create", "vm1"]);
    assert!(said.contains("another cluster") && said.contains(&second.setting("controller", "listen")), "{said}");
    // It removes nothing that the second may need either, and its guest goes on.
    first.ok(["checkpoint", "rm", &made]);
    let swept = first.json(["checkpoint", "sweep", "vm1"]);
    assert!(swept["vms"][0]["note"].as_str().unwrap_or_default().contains("owns generation"), "{swept:#}");
    first.goes_on("vm1", 3);
    second.ok(["checkpoint", "verify", &theirs]);
    second.ok(["checkpoint", "sweep"]);
    second.ok(["checkpoint", "verify", &theirs]);
    // What is not in dispute is not disturbed.
    first.ok(["checkpoint", "create", "vm2"]);
    first.ok(["checkpoint", "verify", &other]);
}

#[test]
fn of_two_clusters_that_have_one_vm_the_newer_writes_and_the_other_is_told_whose_it_is() {
    let scratch = std::env::temp_dir().join(format!("godwit-e2e-two-{}", std::process::id()));
    two_clusters(&format!("file:{}", scratch.display()));
    std::fs::remove_dir_all(scratch).expect("the bucket is there");
}

#[test]
fn the_same_on_an_s3_server() {
    let Some(weed) = Weed::start() else { return };
    two_clusters(&weed.url("two"));
}

/// Names of all VMs that the cluster knows, and of all that its hosts have.
fn vms(cluster: &Cluster) -> Vec<String> {
    let names = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().filter_map(|vm| vm["name"].as_str().map(str::to_owned)).collect()
    };
    let mut found = names(&cluster.json(["vm", "ls"]));
    for host in cluster.json(["host", "ls"]).as_array().into_iter().flatten() {
        found.extend(names(&host["vms"]));
    }
    found.sort();
    found.dedup();
    found
}

#[test]
fn a_drill_shows_that_a_checkpoint_lives_and_leaves_nothing_behind() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", GUEST);
    cluster.goes_on("vm1", 3);
    let id = checkpoint(&cluster);
    let drilled = cluster.json(["checkpoint", "drill", &id, "--to", "hostB", "--expect", "tick"]);
    assert!(drilled["seen"].as_str().unwrap_or_default().starts_with("tick"), "{drilled:#}");
    assert_eq!((&drilled["host"], &drilled["vm"]), (&Value::from("hostB"), &Value::from("vm1")));
    let drilled = cluster.json(["checkpoint", "drill", "vm1"]);
    assert!(drilled["seen"].as_str().unwrap_or_default().contains("instructions"), "{drilled:#}");
    let never = ["checkpoint", "drill", "vm1", "--expect", "what no guest says", "--timeout", "500ms"];
    let said = cluster.fails(Code::Unreachable, never);
    assert!(said.contains("what no guest says"), "{said}");
    wait("hosts to report that nothing is left", || (vms(&cluster) == ["vm1"]).then_some(()));
    let events = cluster.ok(["events", "--vm", "vm1"]);
    assert_eq!(
        (events.matches("checkpoint.drilled").count(), events.matches("drill-failed").count()),
        (2, 1),
        "{events}"
    );
    // A controller that dies in the middle removes what is left when it comes back.
    let mut ctl = cluster.command(["checkpoint", "drill", &id, "--expect", "what no guest says", "--timeout", "1h"]);
    let mut ctl = ctl.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("ctl can be run");
    wait("the drill's guest to run", || vms(&cluster).iter().any(|vm| vm.starts_with("drill-")).then_some(()));
    cluster.kill(cluster.daemon("controller"));
    ctl.wait().expect("ctl ends with its controller");
    cluster.start(2);
    wait("the drill's guest to be gone", || (vms(&cluster) == ["vm1"]).then_some(()));
    cluster.goes_on("vm1", 3);
}

#[test]
fn a_policy_has_samples_hashed_and_checkpoints_drilled_and_says_what_it_found() {
    let cluster = Cluster::up(1);
    cluster.create("vm1", "hostA", GUEST);
    cluster.goes_on("vm1", 3);
    let id = checkpoint(&cluster);
    let set = ["policy", "set", "vm1", "--every", "1d", "--verify-every", "10s", "--drill-every", "10s"];
    let set = cluster.json(set);
    assert_eq!(set["policy"], "every 1d, keep all, verified every 10s, drilled every 10s");
    let said = |what: &str| cluster.json(["policy", "ls"])[0][what].as_str().unwrap_or_default().to_owned();
    wait("a sample", || (said("sampled") == "ok").then_some(()));
    wait("a drill", || said("drilled").starts_with("ok: restored").then_some(()));
    for pack in packs(&cluster) {
        harm(&pack, false);
    }
    wait("a sample that finds the damage", || said("sampled").starts_with("damaged: ").then_some(()));
    assert!(verified(&cluster, &id).starts_with("damaged: pack"), "{}", verified(&cluster, &id));
    let page = cluster.metrics("controller");
    assert!(page.contains("godwit_checks_total{check=\"sample\",result=\"failed\"} 1"), "{page}");
    // What the guest still has is in the next one.
    let next = checkpoint(&cluster);
    cluster.ok(["checkpoint", "verify", &next]);
}

#[test]
fn a_vm_comes_back_from_the_bucket_of_another_cluster() {
    let first = Cluster::up(1);
    first.create("vm1", "hostA", GUEST);
    let before = first.goes_on("vm1", 20);
    let made = checkpoint(&first);
    let keys = first.ok(["key", "export"]);
    let second = Cluster::up(1);
    let safe = second.dir().join("safe");
    std::fs::write(&safe, keys).expect("a file for the keys");
    second.ok(["key", "import", safe.to_str().expect("temporary paths are text")]);
    let url = format!("file:{}", first.dir().join("bucket").display());
    second.ok(["restore", "vm1", "--from", &url]);
    assert!(second.goes_on("vm1", 3).tick >= before.tick);
    // From here on the other bucket is not needed.
    drop(first);
    second.ok(["checkpoint", "verify", &made]);
    let next = checkpoint(&second);
    second.ok(["checkpoint", "verify", &next]);
}

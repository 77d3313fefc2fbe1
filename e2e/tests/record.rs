//! Recordings on a whole cluster: made through crashes and moves, replayed by whoever has them, and what is refused.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use e2e::cluster::{Answer, Cluster, wait};
use e2e::guest::{Program, REGION};
use e2e::linux::{Linux, asked};
use proto::status::Code;
use serde_json::Value;

/// The newest recording of vm1.
fn recording(cluster: &Cluster) -> Value {
    cluster.json(["record", "ls", "vm1"]).as_array().and_then(|all| all.last().cloned()).expect("there is one")
}

/// Waits until everything up to now lies in the bucket.
fn caught_up(cluster: &Cluster) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970").as_nanos();
    wait("the journal to catch up", || {
        let recording = recording(cluster);
        let last = recording["segments"].as_array().and_then(|all| all.last()?["to_unix_ns"].as_u64());
        (u128::from(last.unwrap_or(0)) > now).then_some(recording)
    })
}

/// `ctl replay`, without a cluster.
fn replay(cluster: &Cluster, file: &Path, more: &[&str]) -> Answer {
    let output = Command::new(e2e::cluster::binaries().join("ctl"))
        .arg("replay")
        .arg(file)
        .args(more)
        .env_remove("GODWIT_CONFIG")
        .current_dir(cluster.dir())
        .output()
        .expect("ctl can be run");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Answer { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn last_line(answer: &Answer) -> &str {
    answer.stdout.lines().last().unwrap_or_default()
}

/// Exports what begins with a checkpoint.
fn export(cluster: &Cluster, checkpoint: &str) -> PathBuf {
    let file = cluster.dir().join(format!("{checkpoint}.gwr"));
    let out = file.to_str().expect("temporary paths are text");
    cluster.ok(["record", "export", "vm1", "--from-checkpoint", checkpoint, "--out", out]);
    file
}

/// Checkpoints with which a segment of the recording begins.
fn bases(recording: &Value) -> Vec<String> {
    let segments = recording["segments"].as_array().cloned().unwrap_or_default();
    let id = |segment: &Value| segment["checkpoint"].as_str().filter(|id| !id.is_empty()).map(str::to_owned);
    segments.iter().filter_map(id).collect()
}

const GUEST: Program =
    Program { start: REGION, region_bytes: 4 << 20, pages_per_s: 500, tick_ms: 20, tsc_hz: 1_000_000_000 };

/// Types a line and leaves.
fn type_in(cluster: &Cluster, line: &str, until: &str) {
    asked(cluster, "vm1", line, |console| console.contains(until).then_some(()));
}

/// Boots `deploy/guest`'s Linux as vm1 on hostA; false without its files.
fn linux(cluster: &Cluster, vcpus: &str) -> bool {
    let Some(linux) = Linux::found() else { return false };
    linux.create(cluster, "vm1", "hostA", &linux.file("vmlinuz"), &["--memory", "256M", "--vcpus", vcpus]);
    wait("Linux to count", || cluster.console("vm1").contains("godwit: beat ").then_some(()));
    true
}

#[test]
fn linux_is_recorded_through_crashes_and_moves_and_replays_from_each_checkpoint() {
    let cluster = Cluster::up(2);
    if !linux(&cluster, "2") {
        return;
    }
    cluster.ok(["record", "start", "vm1"]);
    type_in(&cluster, "ls -l /; dd if=/dev/vda of=/dev/null bs=64k count=50; echo read$((1+1))", "read2");
    cluster.ok(["checkpoint", "create", "vm1"]);
    // Whoever takes the blocks dies: they stay with the guest until the next one takes them.
    cluster.kill(cluster.daemon("hostA"));
    cluster.kill(cluster.daemon("controller"));
    cluster.start(2);
    wait("the guest to be found", || (cluster.observed("vm1") == "running").then_some(()));
    type_in(&cluster, "echo after$((1+1))", "after2");
    let migration = cluster.json(["migrate", "vm1", "--to", "hostB"]);
    assert_eq!(migration["source_digest"], migration["target_digest"]);
    type_in(&cluster, "echo there$((1+1)); dd if=/dev/zero of=/data/f bs=4k count=20; sync", "there2");
    cluster.ok(["checkpoint", "create", "vm1"]);
    caught_up(&cluster);
    cluster.ok(["record", "stop", "vm1"]);
    let recording = recording(&cluster);
    assert!(recording["ended"].as_str().is_some_and(|why| !why.is_empty()), "{recording}");

    let bases = bases(&recording);
    assert_eq!(bases.len(), 3, "{recording}");
    let files: Vec<PathBuf> = bases.iter().map(|id| export(&cluster, id)).collect();
    let verdict = cluster.ok(["replay", "vm1", "--at", recording["from"].as_str().expect("a time"), "--check"]);
    assert_eq!(verdict.lines().last(), Some("same"), "{verdict}");
    // What was exported needs no cluster.
    cluster.ok(["dev", "down", "--dir", cluster.dir().to_str().expect("temporary paths are text")]);
    for file in &files[1..] {
        let checked = replay(&cluster, file, &["--check"]);
        assert_eq!((checked.code, last_line(&checked)), (Some(0), "same"), "{checked:?}");
    }
    let cut = std::fs::read(&files[2]).expect("the file");
    let torn = cluster.dir().join("torn.gwr");
    std::fs::write(&torn, &cut[..cut.len() - 10]).expect("a file");
    let checked = replay(&cluster, &torn, &["--check"]);
    assert_eq!((checked.code, last_line(&checked)), (Some(0), "same"), "a torn tail is dropped: {checked:?}");
    assert!(!checked.stderr.is_empty(), "and that is said");
}

#[test]
fn a_vm_comes_back_as_it_was_at_an_instant() {
    let cluster = Cluster::up(2);
    if !linux(&cluster, "1") {
        return;
    }
    cluster.ok(["record", "start", "vm1"]);
    type_in(&cluster, "echo one$((0)) > /data/log; sync; echo wrote$((1+1))", "wrote2");
    let instant = caught_up(&cluster)["to"].as_str().expect("a time").to_owned();
    type_in(&cluster, "echo two$((0)) > /data/log; sync; echo again$((1+1))", "again2");
    caught_up(&cluster);
    // The host dies, with all it had.
    cluster.kill(cluster.daemon("hostA"));
    cluster.kill(cluster.runner("hostA", "vm1").expect("the guest has a runner"));
    cluster.ok(["restore", "vm1", "--at", &instant, "--to", "hostB"]);
    assert_eq!(cluster.observed("vm1"), "running");
    type_in(&cluster, "echo it says $(cat /data/log)", "it says one0");
    let ended = recording(&cluster);
    assert!(ended["ended"].as_str().is_some_and(|why| why.contains("restored")), "{ended}");
    // Its history goes on as another one.
    cluster.start(2);
    cluster.ok(["record", "start", "vm1"]);
    caught_up(&cluster);
    assert_ne!(recording(&cluster)["id"], ended["id"]);
}

#[test]
fn what_was_not_recorded_or_is_damaged_is_named() {
    let cluster = Cluster::up(1);
    cluster.create("vm1", "hostA", GUEST);
    cluster.fails(Code::NotFound, ["replay", "vm1", "--check"]);
    cluster.ok(["record", "start", "vm1"]);
    cluster.goes_on("vm1", 3);
    let recording = caught_up(&cluster);
    let span = recording["from"].as_str().expect("a time").to_owned();
    let refused = cluster.fails(Code::NotFound, ["restore", "vm1", "--at", "2020-01-01T00:00:00Z", "--as", "vm2"]);
    assert!(refused.contains(&span), "{refused} names {span}");

    // Another one at the same time is the same one.
    cluster.ok(["record", "start", "vm1"]);
    assert_eq!(self::recording(&cluster)["id"], recording["id"]);

    // The guest's process dies: what was recorded until then is there.
    cluster.kill(cluster.runner("hostA", "vm1").expect("the guest has a runner"));
    wait("the recording to be over", || {
        self::recording(&cluster)["ended"].as_str().is_some_and(|why| !why.is_empty()).then_some(())
    });
    let verdict = cluster.ok(["replay", "vm1", "--check"]);
    assert_eq!(verdict.lines().last(), Some("same"), "{verdict}");

    // A bit of a block flips in the bucket.
    let file = export(&cluster, &bases(&recording)[0]);
    let mut bytes = std::fs::read(&file).expect("the file");
    let tail = bytes.len() - 100;
    bytes[tail] ^= 1;
    std::fs::write(&file, bytes).expect("the file");
    let damaged = replay(&cluster, &file, &["--check"]);
    assert!(damaged.code != Some(0) || damaged.stderr.contains("block"), "{damaged:?}");
}

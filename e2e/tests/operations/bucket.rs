//! A bucket that is full, gone or not writable: it is named, the guest goes on, nothing half-written counts.

use std::path::{Path, PathBuf};

use e2e::cluster::Cluster;
use proto::status::Code;

use super::{BUSY, is_root, runs, skip};

/// A small file system of its own.
struct Disk(PathBuf);

impl Disk {
    fn mount(name: &str, size: &str) -> Option<Disk> {
        let path = std::env::temp_dir().join(format!("godwit-bucket-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let disk = Disk(path);
        if !is_root() || !disk.options(size, &[]) {
            skip("a bucket on a disk of its own: mounting a tmpfs needs root");
            return None;
        }
        Some(disk)
    }

    fn options(&self, options: &str, more: &[&str]) -> bool {
        let path = self.0.to_str().unwrap();
        runs("mount", &[&["-t", "tmpfs", "-o", options], more, &["tmpfs", path]].concat())
    }

    fn remount(&self, options: &str) {
        let path = self.0.to_str().unwrap();
        assert!(runs("mount", &["-o", &format!("remount,{options}"), path]));
    }

    fn url(&self) -> String {
        format!("file:{}", self.0.display())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a controller that a failed test left may still look.
        while runs("umount", &["-l", self.0.to_str().unwrap()]) {}
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The checkpoint fails, the message names the bucket and says this, the guest goes on, and no checkpoint is named.
fn fails(cluster: &Cluster, disk: &Disk, code: Code, said: &str) {
    let message = cluster.fails(code, ["checkpoint", "create", "vm1"]);
    assert!(message.contains(disk.0.to_str().unwrap()) && message.contains(said), "{message}");
    assert!(message.contains("vm1 is running on hostA"), "{message}");
    cluster.goes_on("vm1", 5);
}

#[test]
fn a_full_bucket_costs_nothing_but_the_checkpoint() {
    let Some(disk) = Disk::mount("full", "size=6M") else { return };
    let cluster = Cluster::up_with(2, &["--bucket", &disk.url()]);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 5);
    for _ in 0..2 {
        fails(&cluster, &disk, Code::Exhausted, "No space left on device");
        assert_eq!(cluster.json(["checkpoint", "ls"]), serde_json::json!([]));
        // The VM's key, once made, is for the next checkpoint too, and so is the claim to its generation.
        let stays = |file: &PathBuf| file.ends_with("key") || file.ends_with("owner");
        let left: Vec<PathBuf> = files(&disk.0).into_iter().filter(|file| !stays(file)).collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "what was half written is still there");
    }
    // Where the guest goes is not the bucket's business.
    cluster.ok(["migrate", "vm1", "--to", "hostB"]);
    cluster.ok(["migrate", "vm1", "--to", "hostA"]);
    disk.remount("size=100M");
    let id = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap().to_owned();
    cluster.ok(["checkpoint", "verify", &id]);
    // Full again: the checkpoint that is there stays sound, and removing it makes room.
    // Ballast to the last block: even what has changed since finds no room.
    let slack = disk.0.join("slack");
    std::fs::write(&slack, vec![1; 8 << 20]).unwrap();
    let full = std::fs::write(disk.0.join("ballast"), vec![1; 100 << 20]);
    assert_eq!(full.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    fails(&cluster, &disk, Code::Exhausted, "No space left on device");
    cluster.ok(["checkpoint", "verify", &id]);
    cluster.ok(["checkpoint", "rm", &id]);
    // The guest has touched more of its memory since.
    std::fs::remove_file(slack).unwrap();
    let again = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap().to_owned();
    cluster.ok(["restore", &again, "--to", "hostB", "--as", "vm2"]);
    cluster.goes_on("vm2", 5);
    drop(cluster);
}

#[test]
fn a_bucket_that_is_read_only_or_gone_is_named_and_comes_back() {
    let Some(disk) = Disk::mount("gone", "size=100M") else { return };
    let cluster = Cluster::up_with(1, &["--bucket", &disk.url()]);
    cluster.create("vm1", "hostA", BUSY);
    let id = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap().to_owned();
    disk.remount("ro");
    fails(&cluster, &disk, Code::Unreachable, "Read-only file system");
    cluster.ok(["checkpoint", "verify", &id]);
    disk.remount("rw");
    // The disk is away: only the folder on which it was mounted is there.
    let aside = disk.0.with_extension("aside");
    std::fs::create_dir_all(&aside).unwrap();
    assert!(
        runs("mount", &["--move", disk.0.to_str().unwrap(), aside.to_str().unwrap()])
            || runs("mount", &["--bind", disk.0.to_str().unwrap(), aside.to_str().unwrap()])
                && runs("umount", &[disk.0.to_str().unwrap()])
    );
    fails(&cluster, &disk, Code::Unreachable, "is not there");
    for args in [["checkpoint", "verify", &id], ["checkpoint", "rm", &id]] {
        let said = cluster.fails(Code::Unreachable, args);
        assert!(said.contains(disk.0.to_str().unwrap()), "{said}");
    }
    assert_eq!(files(&disk.0), Vec::<PathBuf>::new(), "something was written where the bucket is not");
    assert_eq!(cluster.json(["checkpoint", "ls"]).as_array().map(Vec::len), Some(1), "the ledger forgot it");
    // A controller that starts without its bucket runs, and does not make another one.
    cluster.kill(cluster.daemon("controller"));
    cluster.start(1);
    fails(&cluster, &disk, Code::Unreachable, "is not there");
    assert_eq!(std::fs::read_dir(&disk.0).unwrap().count(), 0);
    assert!(runs("mount", &["--bind", aside.to_str().unwrap(), disk.0.to_str().unwrap()]));
    let found = cluster.json(["checkpoint", "verify", &id]);
    assert_eq!(found["verified"], "ok");
    cluster.ok(["checkpoint", "create", "vm1"]);
    drop(cluster);
    assert!(runs("umount", &["-l", aside.to_str().unwrap()]));
    std::fs::remove_dir(&aside).unwrap();
}

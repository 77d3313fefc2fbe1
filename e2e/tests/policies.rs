//! Checkpoints by the clock, on a whole cluster of real binaries: made, kept and removed as the policy says, whatever is
//! killed meanwhile, and the guest does not notice.

use std::collections::BTreeSet;

use e2e::cluster::{Cluster, Ticks, wait};
use e2e::guest::{Program, REGION};
use proto::status::Code;
use serde_json::Value;

/// A small guest, so that a checkpoint takes a moment.
const GUEST: Program =
    Program { start: REGION, region_bytes: 4 << 20, pages_per_s: 500, tick_ms: 20, tsc_hz: 1_000_000_000 };

/// Ids of all checkpoints of the VM, oldest first, and which of them were made by hand.
fn checkpoints(cluster: &Cluster) -> (Vec<String>, Vec<String>) {
    let found = cluster.json(["checkpoint", "ls", "vm1"]);
    let found = found.as_array().cloned().unwrap_or_default();
    let id = |checkpoint: &Value| checkpoint["id"].as_str().unwrap_or_default().to_owned();
    let pinned = found.iter().filter(|checkpoint| checkpoint["pinned"] == true).map(id).collect();
    (found.iter().map(id).collect(), pinned)
}

/// Waits until so many checkpoints of the clock were seen, oldest first; all that were ever there go into `seen`.
fn see(cluster: &Cluster, seen: &mut Vec<String>, count: usize) {
    wait(&format!("{count} checkpoints by policy"), || {
        let (ids, pinned) = checkpoints(cluster);
        let new: Vec<String> = ids.into_iter().filter(|id| !seen.contains(id) && !pinned.contains(id)).collect();
        seen.extend(new);
        (seen.len() >= count).then_some(())
    });
}

fn manifests(cluster: &Cluster) -> usize {
    fn count(dir: &std::path::Path) -> usize {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        entries
            .map(|path| {
                if path.is_dir() {
                    count(&path)
                } else {
                    usize::from(path.extension().is_some_and(|e| e == "manifest"))
                }
            })
            .sum()
    }
    count(&cluster.dir().join("bucket"))
}

#[test]
fn checkpoints_come_by_the_clock_and_the_older_go_whatever_is_killed() {
    let cluster = Cluster::up(1);
    cluster.create("vm1", "hostA", GUEST);
    cluster.goes_on("vm1", 3);
    let by_hand = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap_or_default().to_owned();
    let set = cluster.json(["policy", "set", "vm1", "--every", "10s", "--keep-last", "2"]);
    assert_eq!((&set["every_ms"], &set["keep"]["last"]), (&Value::from(10_000), &Value::from(2)));
    let mut seen = Vec::new();
    see(&cluster, &mut seen, 3);
    cluster.kill(cluster.daemon("controller"));
    let runner = cluster.runner("hostA", "vm1");
    cluster.start(1);
    let before = seen.len();
    see(&cluster, &mut seen, before + 2);
    // Whatever is kept now is the one by hand and the last two, and nothing else lies in the bucket.
    wait("exactly the right set to be kept", || {
        let (ids, pinned) = checkpoints(&cluster);
        let new: Vec<String> = ids.iter().filter(|id| !seen.contains(id) && !pinned.contains(id)).cloned().collect();
        seen.extend(new);
        let last = seen[seen.len() - 2..].iter().cloned();
        let expected: BTreeSet<String> = [by_hand.clone()].into_iter().chain(last).collect();
        let right = ids.iter().cloned().collect::<BTreeSet<_>>() == expected && pinned == [by_hand.clone()];
        (right && manifests(&cluster) == 3).then_some(())
    });
    let policies = cluster.json(["policy", "ls"]);
    let policy = &policies[0];
    assert_eq!(
        (&policy["vm"], &policy["pinned"], &policy["missed"]),
        (&Value::from("vm1"), &Value::from(1), &Value::from(false))
    );
    assert_eq!(cluster.json(["vm", "show", "vm1"])["policy"]["policy"], "every 10s, keep last 2");
    // The guest never stopped: one process, every tick, no wrong page.
    cluster.goes_on("vm1", 5);
    assert_eq!(cluster.runner("hostA", "vm1"), runner);
    let ticks: Vec<u64> = Ticks::all(&cluster.console("vm1")).iter().map(|t| t.tick).collect();
    assert!(ticks.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ticks:?}");
    cluster.ok(["policy", "rm", "vm1"]);
    let (left, _) = checkpoints(&cluster);
    let newest = left.last().cloned().unwrap_or_default();
    cluster.ok(["checkpoint", "verify", &newest]);
    assert_eq!(cluster.json(["policy", "ls"]), serde_json::json!([]));
}

#[test]
fn a_policy_that_cannot_be_kept_is_refused_and_a_pruning_is_rehearsed() {
    let cluster = Cluster::up(1);
    cluster.create("vm1", "hostA", GUEST);
    for _ in 0..3 {
        cluster.ok(["checkpoint", "create", "vm1", "--policy"]);
    }
    cluster.ok(["checkpoint", "create", "vm1"]);
    cluster.fails(Code::NotFound, ["policy", "set", "vm9", "--every", "5m"]);
    cluster.fails(Code::NotFound, ["checkpoint", "prune", "vm1"]);
    let refused = [
        (["--every", "5s"], "between 10s"),
        (["--every", "5m"], "a check every"),
        (["--zone", "Mars/Olympus"], "time zone"),
    ];
    for (flags, word) in refused {
        let more = match word {
            "a check every" => ["--drill-every", "1s"],
            "time zone" => ["--every", "5m"],
            _ => ["--keep-last", "1"],
        };
        let said = cluster.fails(Code::BadInput, ["policy", "set", "vm1"].into_iter().chain(flags).chain(more));
        assert!(said.contains(word), "{said}");
    }
    // An interval of a day: the schedule has no part in what follows.
    cluster.ok(["policy", "set", "vm1", "--every", "1d", "--keep-last", "1", "--jitter", "0s"]);
    wait("the schedule's own pruning", || (checkpoints(&cluster).0.len() == 2).then_some(()));
    cluster.ok(["checkpoint", "create", "vm1", "--policy"]);
    let (_, pinned) = checkpoints(&cluster);
    wait("the older to go", || (checkpoints(&cluster).0.len() == 2).then_some(()));
    assert_eq!(checkpoints(&cluster).1, pinned);
    let rehearsed = cluster.json(["checkpoint", "prune", "vm1", "--dry-run"]);
    assert_eq!((&rehearsed["removed"], &rehearsed["kept"]), (&Value::from(0), &Value::from(2)));
    let simulated = cluster.json(["policy", "simulate", "vm1", "--for", "30d"]);
    assert_eq!(simulated["kept"], 2, "{simulated:#}");
    let simulated = cluster.json(["policy", "simulate", "--every", "5m", "--keep-last", "12", "--keep-daily", "14"]);
    assert!(simulated["kept"].as_u64().is_some_and(|kept| (24..=26).contains(&kept)), "{simulated:#}");
}

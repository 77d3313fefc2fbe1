//! Guests that run before their memory has come: they find all of it, whatever dies meanwhile.

use e2e::cluster::{Cluster, Ticks, wait};
use e2e::guest::{Program, REGION};
use proto::status::Code;

/// A guest of about 140 MiB that rewrites 8 MiB/s, and checks each page before.
const BUSY: Program =
    Program { start: REGION, region_bytes: 96 << 20, pages_per_s: 2000, tick_ms: 20, tsc_hz: 1_000_000_000 };

/// Pages of its RAM that still come.
fn missing(cluster: &Cluster, vm: &str) -> Option<u64> {
    cluster.json(["vm", "show", vm])["lazy"]["pages_missing"].as_u64()
}

/// Waits until the VM is an ordinary one.
fn complete(cluster: &Cluster, vm: &str) {
    wait(&format!("all pages of {vm} to come"), || missing(cluster, vm).is_none().then_some(()));
    let events = cluster.ok(["events", "-o", "json"]);
    assert!(events.contains("vm.pages-arrived"), "{events}");
}

/// The guest has looked at every page of its region since this tick, and none was wrong.
fn whole_round(cluster: &Cluster, vm: &str, program: Program) {
    let pages = program.region_bytes / 4096;
    let before = cluster.ticks(vm).map_or(0, |ticks| ticks.writes);
    let now = wait(&format!("{vm} to look at all of its pages"), || {
        cluster.ticks(vm).filter(|now: &Ticks| now.writes >= before + pages)
    });
    assert_eq!(now.bad, 0, "{vm} found wrong memory:\n{}", cluster.console(vm));
}

#[test]
fn a_guest_runs_before_its_memory_has_come_and_finds_all_of_it() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 20);
    cluster.ok(["checkpoint", "create", "vm1"]);
    cluster.goes_on("vm1", 5);
    let restored = cluster.json(["restore", "vm1", "--lazy", "--to", "hostB"]);
    assert_eq!((restored["host"].as_str(), restored["generation"].as_u64()), (Some("hostB"), Some(2)));
    let first = restored["restore"]["first_instruction_ms"].as_f64();
    assert!(first.is_some_and(|ms| ms > 0.0 && ms < 60_000.0), "{restored:#}");
    eprintln!("first instruction after {first:?} ms");
    cluster.goes_on("vm1", 5);
    assert_eq!(cluster.running_on("vm1"), ["hostB"]);
    complete(&cluster, "vm1");
    whole_round(&cluster, "vm1", BUSY);
    // It is an ordinary VM: it moves, and what it has is what a checkpoint of it has.
    cluster.ok(["migrate", "vm1", "--to", "hostA"]);
    cluster.ok(["checkpoint", "create", "vm1"]);
    cluster.ok(["checkpoint", "verify", "--all"]);
    // To its own host, and under another name.
    cluster.ok(["restore", "vm1", "--lazy", "--to", "hostA"]);
    cluster.ok(["restore", "vm1", "--lazy", "--to", "hostB", "--as", "vm2"]);
    for vm in ["vm1", "vm2"] {
        complete(&cluster, vm);
        cluster.goes_on(vm, 10);
        whole_round(&cluster, vm, BUSY);
    }
}

#[test]
fn a_bucket_that_goes_away_stops_the_guest_until_it_is_back() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 20);
    let made = cluster.json(["checkpoint", "create", "vm1"]);
    let id = made["id"].as_str().expect("a checkpoint has an id").to_owned();
    let bucket = cluster.dir().join("bucket");
    let packs = pack_folders(&bucket);
    let away: Vec<_> = packs.iter().map(|folder| folder.with_extension("away")).collect();
    // The state is in packs, too: it must be there until the guest runs.
    let mut restoring = cluster.command(["restore", "vm1", "--lazy", "--to", "hostB"]).spawn().expect("ctl can be run");
    wait("the restore to be committed", || (cluster.host_of("vm1") == "hostB").then_some(()));
    let moved: Vec<_> = packs.iter().zip(&away).map(|(from, to)| std::fs::rename(from, to)).collect();
    assert!(moved.iter().all(Result::is_ok), "{moved:?}");
    restoring.wait().expect("ctl ends");
    let shown = wait("the guest to wait for the bucket", || {
        let shown = cluster.json(["vm", "show", "vm1"]);
        let waits = shown["lazy"]["waiting_ms"].as_u64() > Some(1200) && shown["lazy"]["trouble"] != "";
        waits.then_some(shown)
    });
    assert!(shown["lazy"]["pages_missing"].as_u64() > Some(0), "{shown:#}");
    let stood = cluster.ticks("vm1").map(|ticks| ticks.tick);
    // What needs all of its pages is refused, and says why.
    let refused = cluster.fails(Code::Conflict, ["migrate", "vm1", "--to", "hostA"]);
    assert!(refused.contains("pages of vm1 still come"), "{refused}");
    cluster.fails(Code::Conflict, ["checkpoint", "create", "vm1"]);
    let refused = cluster.fails(Code::Conflict, ["checkpoint", "rm", &id]);
    assert!(refused.contains("still come from checkpoint"), "{refused}");
    // It can be paused where it stands, and goes on only when it is told to.
    cluster.ok(["vm", "pause", "vm1"]);
    assert_eq!(cluster.observed("vm1"), "paused");
    for (from, to) in away.iter().zip(&packs) {
        std::fs::rename(from, to).expect("the packs can be moved back");
    }
    wait("the trouble to be over, or a while to pass", {
        let since = std::time::Instant::now();
        move || (since.elapsed() > std::time::Duration::from_secs(2)).then_some(())
    });
    assert_eq!(cluster.ticks("vm1").map(|ticks| ticks.tick), stood, "it stands still");
    cluster.ok(["vm", "resume", "vm1"]);
    cluster.goes_on("vm1", 10);
    complete(&cluster, "vm1");
    whole_round(&cluster, "vm1", BUSY);
    cluster.ok(["migrate", "vm1", "--to", "hostA"]);
    cluster.goes_on("vm1", 5);
}

fn pack_folders(bucket: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for vm in std::fs::read_dir(bucket.join("vms")).expect("the bucket has VMs").flatten() {
        let inside = std::fs::read_dir(vm.path()).expect("a VM's folder").flatten();
        found.extend(inside.map(|entry| entry.path().join("packs")).filter(|packs| packs.is_dir()));
    }
    assert!(!found.is_empty(), "no packs in {}", bucket.display());
    found
}

#[test]
fn agent_and_controller_die_in_the_middle_and_nothing_is_lost() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 20);
    cluster.ok(["checkpoint", "create", "vm1"]);
    let bucket = cluster.dir().join("bucket");
    let mut restoring = cluster.command(["restore", "vm1", "--lazy", "--to", "hostB"]).spawn().expect("ctl can be run");
    wait("the restore to be committed", || (cluster.host_of("vm1") == "hostB").then_some(()));
    let packs = pack_folders(&bucket);
    for folder in &packs {
        std::fs::rename(folder, folder.with_extension("away")).expect("packs can be moved");
    }
    restoring.wait().expect("ctl ends");
    wait("the guest to wait", || {
        (cluster.json(["vm", "show", "vm1"])["lazy"]["waiting_ms"].as_u64() > Some(0)).then_some(())
    });
    let runner = cluster.runner("hostB", "vm1").expect("it runs");
    // The guest sleeps on a page; the agent that knew which one dies, and so does the controller.
    cluster.kill(cluster.daemon("hostB"));
    cluster.kill(cluster.daemon("controller"));
    cluster.start(2);
    wait("hostB to be heard again", || missing(&cluster, "vm1").filter(|left| *left > 0));
    assert_eq!(cluster.runner("hostB", "vm1"), Some(runner), "its process goes on");
    for folder in &packs {
        std::fs::rename(folder.with_extension("away"), folder).expect("packs can be moved back");
    }
    cluster.goes_on("vm1", 10);
    // Once more in full flight, if it still is.
    cluster.kill(cluster.daemon("hostB"));
    cluster.start(2);
    cluster.goes_on("vm1", 10);
    complete(&cluster, "vm1");
    whole_round(&cluster, "vm1", BUSY);
    assert_eq!(cluster.runner("hostB", "vm1"), Some(runner), "its process goes on");
    cluster.ok(["migrate", "vm1", "--to", "hostA"]);
    cluster.goes_on("vm1", 5);
}

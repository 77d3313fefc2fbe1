//! Power cuts: every process of a cluster is killed at a random moment, again and again, while checkpoints are made, packs are
//! swept and guests move. Afterwards every checkpoint that is listed is whole: what comes back from it finds its memory and
//! its disk as it wrote them down itself.
//!
//! `GODWIT_POWER_CUTS=200` cuts as often (a few otherwise), `GODWIT_SEED=N` repeats the moments of an earlier run. Of the disks'
//! own caches this says nothing: what was written stays written.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use e2e::cluster::{Cluster, signal, wait};
use e2e::guest::{Program, REGION};
use e2e::linux::{self, Linux};
use rustix::process::Signal;

/// Finds wrong memory.
const MEMORY: Program =
    Program { start: REGION, region_bytes: 24 << 20, pages_per_s: 2000, tick_ms: 20, tsc_hz: 1_000_000_000 };
const HOSTS: [&str; 2] = ["hostA", "hostB"];
const CUTS: u64 = 2;
/// The longest that is waited for a cut.
const MOMENT_MS_MAX: u64 = 2500;
/// Checkpoints of a VM that are kept.
const KEPT: usize = 3;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// What is under way when the power goes: something for each VM, over and over.
fn busy(cluster: &Cluster, vms: &[&str], random: &mut Random, until: Instant) {
    let mut running: Vec<(usize, Child)> = Vec::new();
    while Instant::now() < until {
        running.retain_mut(|(_, child)| matches!(child.try_wait(), Ok(None)));
        for (at, vm) in vms.iter().enumerate() {
            if running.iter().any(|(of, _)| *of == at) {
                continue;
            }
            let host = HOSTS[random.below(2) as usize];
            let args: &[&str] = match random.below(6) {
                0 => &["migrate", vm, "--to", host],
                1 => &["checkpoint", "sweep", vm],
                2 => &["checkpoint", "prune", vm],
                _ => &["checkpoint", "create", vm],
            };
            let mut command = cluster.command(args);
            let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("ctl can be run");
            running.push((at, child));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    cut(cluster, vms, random);
    for (_, mut child) in running {
        child.wait().expect("ctl ends when nobody is there any more");
    }
}

/// Kills everything, in no particular order.
fn cut(cluster: &Cluster, vms: &[&str], random: &mut Random) {
    let runners = HOSTS.iter().flat_map(|host| vms.iter().filter_map(|vm| cluster.runner(host, vm)));
    // The number of a runner that ended long ago may be another's.
    let runners = runners.filter(|pid| is_of(cluster, *pid));
    let mut all: Vec<i32> = runners.chain(["controller", "hostA", "hostB"].map(|name| cluster.daemon(name))).collect();
    while !all.is_empty() {
        let victim = all.swap_remove(random.below(all.len() as u64) as usize);
        signal(victim, Signal::KILL);
    }
}

fn is_of(cluster: &Cluster, pid: i32) -> bool {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&command).contains(cluster.dir().to_str().expect("temporary paths are text"))
}

fn listed(cluster: &Cluster, vm: &str) -> Vec<String> {
    let listed = cluster.json(["checkpoint", "ls", vm]);
    let ids = listed.as_array().into_iter().flatten().filter_map(|checkpoint| checkpoint["id"].as_str());
    ids.map(str::to_owned).collect()
}

/// The power is back: everything that is listed is restored and looks at itself.
fn comes_back(cluster: &Cluster, vm: &str, random: &mut Random) {
    wait(&format!("{vm} to be held by nothing"), || {
        let vm = cluster.json(["vm", "show", vm]);
        vm["operation"].as_str()?.is_empty().then_some(())
    });
    let ids = listed(cluster, vm);
    assert!(!ids.is_empty(), "{vm} lost its checkpoints\n{}", cluster.logs());
    for id in &ids {
        cluster.ok(["checkpoint", "verify", id]);
        cluster.ok(["restore", id, "--to", HOSTS[random.below(2) as usize]]);
        match vm {
            "linux" => {
                linux::goes_on(cluster, vm);
                assert!(linux::verified(cluster, vm) > 0, "{vm} has no files\n{}", cluster.console(vm));
            }
            _ => looks_at_all_of_its_memory(cluster, vm),
        }
    }
}

fn looks_at_all_of_its_memory(cluster: &Cluster, vm: &str) {
    let before = cluster.ticks(vm).map_or(0, |ticks| ticks.writes);
    let pages = MEMORY.region_bytes / 4096;
    let now = wait("all pages to be looked at", || cluster.ticks(vm).filter(|now| now.writes >= before + pages));
    assert_eq!(now.bad, 0, "{vm} found wrong memory:\n{}", cluster.console(vm));
}

#[test]
fn whatever_is_listed_after_a_power_cut_comes_back_whole() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970").as_nanos() as u64;
    let (cuts, seed) = (number("GODWIT_POWER_CUTS").unwrap_or(CUTS), number("GODWIT_SEED").unwrap_or(now));
    eprintln!("GODWIT_POWER_CUTS={cuts} GODWIT_SEED={seed}");
    let mut random = Random(seed);
    let cluster = Cluster::up(2);
    let mut vms = vec!["memory"];
    cluster.create("memory", "hostA", MEMORY);
    if let Some(linux) = Linux::found() {
        linux.create(&cluster, "linux", "hostB", &linux.file("vmlinuz"), &["--memory", "512M"]);
        linux::goes_on(&cluster, "linux");
        vms.push("linux");
    }
    cluster.goes_on("memory", 3);
    let kept = KEPT.to_string();
    for vm in &vms {
        cluster.ok(["checkpoint", "create", vm]);
        cluster.ok(["policy", "set", vm, "--every", "1d", "--keep-last", &kept]);
    }
    let mut restored = 0;
    for cut in 1..=cuts {
        let moment = Instant::now() + Duration::from_millis(random.below(MOMENT_MS_MAX));
        busy(&cluster, &vms, &mut random, moment);
        cluster.start(2);
        for vm in &vms {
            comes_back(&cluster, vm, &mut random);
            restored += listed(&cluster, vm).len();
            cluster.ok(["checkpoint", "prune", vm]);
        }
        eprintln!("cut {cut} of {cuts}: {restored} checkpoints came back whole so far");
    }
}

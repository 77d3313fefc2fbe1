//! `kill -9` of every process at every phase of a migration and of a checkpoint: afterwards the guest runs in exactly one
//! place, or is plainly gone because its own process was killed; and no page is wrong.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use e2e::cluster::{Cluster, wait};
use e2e::guest::{Program, REGION};

const BUSY: Program =
    Program { start: REGION, region_bytes: 16 << 20, pages_per_s: 1000, tick_ms: 20, tsc_hz: 1_000_000_000 };

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Victim {
    SourceAgent,
    SourceRunner,
    TargetAgent,
    TargetRunner,
    Controller,
}

impl Victim {
    fn kill(self, cluster: &Cluster) {
        match self {
            Victim::SourceAgent => cluster.kill(cluster.daemon("hostA")),
            Victim::TargetAgent => cluster.kill(cluster.daemon("hostB")),
            Victim::Controller => cluster.kill(cluster.daemon("controller")),
            Victim::SourceRunner => cluster.runner("hostA", "vm1").into_iter().for_each(|pid| cluster.kill(pid)),
            Victim::TargetRunner => cluster.runner("hostB", "vm1").into_iter().for_each(|pid| cluster.kill(pid)),
        }
    }
}

/// Starts `ctl ARGS`, kills the victim when it has printed so many lines of progress (or has ended), and waits for its end.
fn interrupted(cluster: &Cluster, args: &[&str], victim: Victim, lines: usize) {
    let mut command = cluster.command(args);
    let mut running = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("ctl can be run");
    let said = BufReader::new(running.stderr.take().expect("stderr is piped"));
    let mut said = said.lines();
    for _ in 0..lines {
        if said.next().is_none() {
            break;
        }
    }
    victim.kill(cluster);
    // What else it prints must not fill the pipe.
    said.for_each(drop);
    running.wait().expect("ctl ends");
}

/// Everything is started again; the cluster settles with the guest in at most one place.
fn settles(cluster: &Cluster, victim: Victim, context: &str) {
    cluster.start(2);
    // What a host says of a process that was killed a moment ago may be of the moment before: the guest is there when it
    // goes on, and gone when its host says so.
    let before = cluster.ticks("vm1").map_or(0, |t| t.tick);
    let crashed = wait(&format!("the cluster to settle after {context}"), || {
        let running = cluster.running_on("vm1");
        assert!(running.len() <= 1, "{context}: vm1 runs on {running:?}\n{}", cluster.logs());
        let vm = cluster.json(["vm", "show", "vm1"]);
        if !vm["operation"].as_str()?.is_empty() {
            return None;
        }
        let observed = vm["observed"].as_str()?;
        let goes_on = observed == "running" && cluster.ticks("vm1").is_some_and(|now| now.tick > before + 5);
        (goes_on || observed == "crashed").then_some(!goes_on)
    });
    let own = matches!(victim, Victim::SourceRunner | Victim::TargetRunner);
    assert!(own || !crashed, "{context}: the guest is gone although its process was not touched\n{}", cluster.logs());
    assert!(crashed || cluster.goes_on("vm1", 2).bad == 0, "{context}");
}

fn at_every_phase(args: &[&str], victim: Victim) {
    for lines in [1, 3, 6] {
        let cluster = Cluster::up(2);
        cluster.create("vm1", "hostA", BUSY);
        cluster.goes_on("vm1", 3);
        interrupted(&cluster, args, victim, lines);
        settles(&cluster, victim, &format!("{victim:?} killed at line {lines} of {args:?}"));
    }
}

const MIGRATE: [&str; 6] = ["migrate", "vm1", "--to", "hostB", "--bandwidth", "20M"];
const CHECKPOINT: [&str; 3] = ["checkpoint", "create", "vm1"];

#[test]
fn migration_survives_the_source_agent() {
    at_every_phase(&MIGRATE, Victim::SourceAgent);
}

#[test]
fn migration_survives_the_source_runner() {
    at_every_phase(&MIGRATE, Victim::SourceRunner);
}

#[test]
fn migration_survives_the_target_agent() {
    at_every_phase(&MIGRATE, Victim::TargetAgent);
}

#[test]
fn migration_survives_the_target_runner() {
    at_every_phase(&MIGRATE, Victim::TargetRunner);
}

#[test]
fn migration_survives_the_controller() {
    at_every_phase(&MIGRATE, Victim::Controller);
}

#[test]
fn checkpoint_survives_the_agent() {
    at_every_phase(&CHECKPOINT, Victim::SourceAgent);
}

#[test]
fn checkpoint_survives_the_controller() {
    at_every_phase(&CHECKPOINT, Victim::Controller);
}

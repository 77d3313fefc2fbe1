//! Guests on hardware SVM through Linux KVM, on real clusters: they move, are checkpointed and come back, and change engines
//! while they work. Where no KVM can run the in-tree guest the test says so and ends.

use e2e::cluster::{Cluster, Ticks};
use e2e::guest::spread::Spread;
use e2e::guest::{Program, REGION};
use proto::status::Code;
use vmcb_engine::capability::CpuModel;
use vmcb_engine::engine::kvm;

/// A guest of about 20 MiB that rewrites 1 MiB/s: where KVM itself is emulated its guests are slow.
fn light(tsc_hz: u64) -> Program {
    Program { start: REGION, region_bytes: 1 << 20, pages_per_s: 256, tick_ms: 50, tsc_hz }
}

/// The guest for this host, at the rate of its TSC, if it has KVM.
fn guest_here() -> Option<Program> {
    let host = match kvm::capabilities() {
        Ok(host) => host,
        Err(error) => {
            eprintln!("skipped: {error}");
            return None;
        }
    };
    // Without --cpu a guest gets the richest model that the host keeps.
    let failing = CpuModel::X86V1.contract(host.facts.tsc_khz).failing_on(&host);
    if !failing.is_empty() {
        let lacks: Vec<String> = failing.iter().map(ToString::to_string).collect();
        eprintln!("skipped: KVM of this host lacks {}", lacks.join(", "));
        return None;
    }
    Some(light(host.facts.tsc_khz * 1000))
}

fn create(cluster: &Cluster, vm: &str, guest: Program) {
    let memory = guest.memory_bytes().to_string();
    cluster.create_with(vm, "hostA", guest, &["--memory", &memory, "--engine", "kvm"]);
}

/// Ticks follow each other without a gap or a repetition: it is one guest.
fn one_history(cluster: &Cluster, vm: &str) {
    let ticks: Vec<u64> = Ticks::all(&cluster.console(vm)).iter().map(|t| t.tick).collect();
    assert!(ticks.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ticks:?}");
}

fn digests_agree(migration: &serde_json::Value) {
    assert_eq!(migration["source_digest"], migration["target_digest"], "{migration:#}");
}

#[test]
fn a_guest_on_kvm_moves_is_checkpointed_and_comes_back() {
    let Some(guest) = guest_here() else { return };
    let cluster = Cluster::up(2);
    create(&cluster, "vm1", guest);
    cluster.goes_on("vm1", 5);
    digests_agree(&cluster.json(["migrate", "vm1", "--to", "hostB"]));
    cluster.goes_on("vm1", 5);
    assert_eq!(cluster.running_on("vm1"), ["hostB"]);
    one_history(&cluster, "vm1");
    cluster.ok(["vm", "pause", "vm1"]);
    assert_eq!(cluster.observed("vm1"), "paused");
    let stands = cluster.ticks("vm1").map(|t| t.tick);
    assert!(cluster.ok(["vmcb", "show", "vm1"]).to_lowercase().contains("cr3"));
    assert_eq!(cluster.ticks("vm1").map(|t| t.tick), stands);
    cluster.ok(["vm", "resume", "vm1"]);
    cluster.goes_on("vm1", 5);
    // The second checkpoint is of what changed since the first.
    cluster.ok(["checkpoint", "create", "vm1"]);
    let id = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap_or_default().to_owned();
    cluster.ok(["checkpoint", "verify", &id]);
    cluster.goes_on("vm1", 5);
    cluster.ok(["restore", "vm1", "--to", "hostA"]);
    cluster.goes_on("vm1", 5);
    cluster.ok(["restore", &id, "--to", "hostB", "--as", "vm2"]);
    cluster.goes_on("vm2", 5);
    let said = cluster.fails(Code::Incapable, ["record", "start", "vm1"]);
    assert!(said.contains("kvm"), "{said}");
}

#[test]
fn a_guest_changes_engines_while_it_works() {
    let Some(guest) = guest_here() else { return };
    let cluster = Cluster::up(2);
    create(&cluster, "vm1", guest);
    cluster.goes_on("vm1", 5);
    for (host, engine) in [("hostB", "soft"), ("hostA", "kvm")] {
        digests_agree(&cluster.json(["migrate", "vm1", "--to", host, "--engine", engine]));
        assert_eq!(cluster.json(["vm", "show", "vm1"])["config"]["engine"], engine);
        cluster.goes_on("vm1", 5);
        one_history(&cluster, "vm1");
    }
    let said = cluster.fails(Code::BadInput, ["migrate", "vm1", "--to", "hostB", "--engine", "xen"]);
    assert!(said.contains("soft or kvm"), "{said}");
}

#[test]
fn a_large_guest_moves_with_what_it_has_above_the_hole_below_4_gib() {
    let Some(Program { tsc_hz, .. }) = guest_here() else { return };
    const GIB: u64 = 1 << 30;
    const BLOCK: u64 = 64 << 10;
    // RAM above 3 GiB lies at 4 GiB: 8 GiB end at 9.
    let places = vec![REGION, 3 * GIB - BLOCK, 4 * GIB, 5 * GIB + BLOCK, 9 * GIB - BLOCK];
    let guest = Spread { places, block_bytes: BLOCK, tick_ms: 50, tsc_hz };
    let cluster = Cluster::up(2);
    let kernel = cluster.dir().join("guest.elf");
    std::fs::write(&kernel, guest.elf().unwrap()).unwrap();
    let kernel = kernel.to_str().unwrap();
    cluster.ok(["vm", "create", "vm1", "--host", "hostA", "--kernel", kernel, "--memory", "8G", "--engine", "kvm"]);
    for host in ["hostB", "hostA"] {
        cluster.goes_on("vm1", 5);
        let migration = cluster.json(["migrate", "vm1", "--to", host]);
        digests_agree(&migration);
        assert_eq!(migration["ram_bytes"], 8 * GIB);
        // Hardly any of it was ever written.
        assert!(migration["bytes_sent"].as_u64().unwrap() < GIB, "{migration:#}");
    }
    cluster.goes_on("vm1", 5);
    one_history(&cluster, "vm1");
}

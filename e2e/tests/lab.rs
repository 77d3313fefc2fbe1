//! Linux on `kvm_amd`, on emulated AMD hosts with a network between them: it boots, works on its disk and its network with two
//! processors, moves while it works, and comes back from a checkpoint on a third host after the power of both others was cut. A
//! host that lacks an instruction is refused by its name before anything moves. Where no host can be emulated the tests say so
//! and pass.

use e2e::cluster::{Cluster, wait_for};
use e2e::lab::{EPYC, Lab, PATIENCE, TAP, TAP_ADDRESS};
use e2e::linux;
use proto::status::Code;

const MEMORY: [&str; 4] = ["--memory", "128M", "--vcpus", "2"];

/// Types a line that has the guest say something, once more than before. The shell echoes what is typed: the line itself does not
/// say it.
fn says(cluster: &Cluster, vm: &str, line: &str, what: &str) {
    let before = cluster.console(vm).matches(what).count();
    linux::asked(cluster, vm, line, |console| (console.matches(what).count() > before).then_some(()));
}

/// Has the guest ask its host for an answer over the network.
fn answers_on_the_network(cluster: &Cluster, vm: &str) {
    says(cluster, vm, &format!("ping -c 2 -w 30 {TAP_ADDRESS}"), " 0% packet loss");
}

fn both_processors_work(cluster: &Cluster, vm: &str) {
    for processor in ["0", "1"] {
        let line = format!("taskset -c {processor} sh -c 'echo o''n $(cut -d \" \" -f 39 /proc/self/stat) end'");
        says(cluster, vm, &line, &format!("on {processor} end"));
    }
}

#[test]
fn linux_moves_between_amd_hosts_and_comes_back_on_a_third() {
    let Some(lab) = Lab::found() else { return };
    let cluster = lab.cluster(1);
    let mut first = lab.host(&cluster, "amdA", EPYC);
    let mut second = lab.host(&cluster, "amdB", EPYC);
    let mut lesser = lab.host(&cluster, "amdD", &format!("{EPYC},-sse4.2"));
    first.up(&cluster);
    second.up(&cluster);
    lab.create(&cluster, "vm1", "amdA", TAP, &MEMORY);
    lesser.up(&cluster);
    linux::goes_on(&cluster, "vm1");
    both_processors_work(&cluster, "vm1");
    says(&cluster, "vm1", "ip addr add 192.168.77.2/24 dev eth0; echo addr''essed", "addressed");
    answers_on_the_network(&cluster, "vm1");

    // A guest that checks all that a processor holds, with registers of 256 bits, which no engine but this has.
    lab.create_registers(&cluster, "regs", "amdA", "x86-64-v3");
    cluster.goes_on("regs", 3);
    let refusal = cluster.fails(Code::Incapable, ["migrate", "regs", "--to", "hostA", "--engine", "soft"]);
    assert!(refusal.contains("CPUID 0000_0001.0 ECX[28] avx"), "{refusal}");

    // What the two differ in is what the refusal names.
    let missing = "CPUID 0000_0001.0 ECX[20] sse4.2";
    let differences = cluster.ok(["host", "compare", "amdA", "amdD"]);
    assert!(differences.contains(missing), "{differences}");
    let refusal = cluster.fails(Code::Incapable, ["migrate", "vm1", "--to", "amdD"]);
    assert!(refusal.contains(missing), "{refusal}");
    assert_eq!(cluster.host_of("vm1"), "amdA");
    drop(lesser);

    cluster.ok(["migrate", "vm1", "--to", "amdB"]);
    assert_eq!(cluster.host_of("vm1"), "amdB");
    linux::goes_on(&cluster, "vm1");
    answers_on_the_network(&cluster, "vm1");
    cluster.ok(["migrate", "regs", "--to", "amdB"]);
    cluster.goes_on("regs", 5);
    cluster.ok(["checkpoint", "create", "regs"]);
    let mut third = lab.host(&cluster, "amdC", EPYC);
    cluster.ok(["checkpoint", "create", "vm1"]);
    let counted = linux::count(&cluster, "vm1").expect("it counts");
    third.up(&cluster);

    first.cut();
    second.cut();
    cluster.ok(["restore", "vm1", "--to", "amdC"]);
    cluster.ok(["restore", "regs", "--to", "amdC"]);
    cluster.goes_on("regs", 5);
    assert_eq!(cluster.host_of("vm1"), "amdC");
    let again = linux::goes_on(&cluster, "vm1");
    assert!(again + 60 > counted, "it goes on from {again}, the checkpoint had {counted}");
    assert!(linux::verified(&cluster, "vm1") > 0);
    both_processors_work(&cluster, "vm1");
    answers_on_the_network(&cluster, "vm1");
}

/// The guest's own clock, in seconds of Unix time, and how long a sleep of three seconds took it, in hundredths.
fn clock_and_sleep(cluster: &Cluster, vm: &str) -> (u64, u64) {
    let marks = |console: &str| console.matches("\nslept ").count();
    let before = marks(&cluster.console(vm));
    let line =
        "a=$(cut -d' ' -f1 /proc/uptime); sleep 3; b=$(cut -d' ' -f1 /proc/uptime); echo slept $a $b $(date +%s) end";
    linux::asked(cluster, vm, line, |console| {
        let (_, said) = console.rsplit_once("\nslept ").filter(|_| marks(console) > before)?;
        let (said, _) = said.split_once(" end")?;
        let hundredths = |text: &str| text.replace('.', "").parse::<u64>().ok();
        let [from, to, date] = said.split(' ').collect::<Vec<_>>()[..] else { return None };
        Some((date.parse().ok()?, hundredths(to)? - hundredths(from)?))
    })
}

/// It counts, its files are whole, its clock is the world's, and its timers fire when they are due.
fn all_is_well(cluster: &Cluster, vm: &str) {
    linux::goes_on(cluster, vm);
    assert!(linux::verified(cluster, vm) > 0);
    // A busy guest of the software engine is behind; it catches up while it has nothing to do.
    says(cluster, vm, "kill -STOP $(pidof work); echo sto''pped", "stopped");
    wait_for(PATIENCE, "the guest's clock to be right", || {
        let (date, slept) = clock_and_sleep(cluster, vm);
        assert!((300..800).contains(&slept), "a sleep of 3 s took the guest {slept} hundredths");
        let world = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
        assert!(date <= world + 1, "the guest's clock says {date}, it is {world}");
        println!("{vm} is behind by {} s", world.saturating_sub(date));
        (world - date.min(world) <= 3).then_some(())
    });
    says(cluster, vm, "kill -CONT $(pidof work); echo contin''ued", "continued");
}

#[test]
fn a_guest_changes_engines_while_it_works_and_is_recorded_on_the_one_that_can() {
    let Some(lab) = Lab::found() else { return };
    let cluster = lab.cluster(1);
    let mut hardware = lab.host(&cluster, "amdA", EPYC);
    hardware.up(&cluster);
    lab.create(&cluster, "vm1", "amdA", "", &["--memory", "128M", "--vcpus", "2", "--cpu", "x86-64-v2"]);
    lab.create_registers(&cluster, "regs", "amdA", "x86-64-v2");
    all_is_well(&cluster, "vm1");
    cluster.goes_on("regs", 3);

    let moved = |to: &str, engine: &str| {
        for vm in ["vm1", "regs"] {
            let migration = cluster.json(["migrate", vm, "--to", to, "--engine", engine, "--verify", "full"]);
            assert_eq!(migration["source_digest"], migration["target_digest"], "{migration:#}");
        }
        cluster.goes_on("regs", 5);
        all_is_well(&cluster, "vm1");
    };
    moved("hostA", "soft");
    cluster.ok(["record", "start", "vm1"]);
    linux::goes_on(&cluster, "vm1");
    assert!(linux::verified(&cluster, "vm1") > 0);
    cluster.ok(["record", "stop", "vm1"]);
    moved("amdA", "kvm");
    let verdict = cluster.ok(["replay", "vm1", "--check"]);
    assert_eq!(verdict.lines().last(), Some("same"), "{verdict}");
}

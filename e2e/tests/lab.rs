//! Linux on `kvm_amd`, on emulated AMD hosts with a network between them: it boots, works on its disk and its network with two
//! processors, moves while it works, and comes back from a checkpoint on a third host after the power of both others was cut. A
//! host that lacks an instruction is refused by its name before anything moves. Where no host can be emulated the tests say so
//! and pass.

use e2e::cluster::Cluster;
use e2e::lab::{EPYC, Lab, TAP_ADDRESS};
use e2e::linux;
use proto::status::Code;

const MEMORY: [&str; 4] = ["--memory", "128M", "--vcpus", "2"];

/// Has the guest ask its host for an answer over the network.
fn answers_on_the_network(cluster: &Cluster, vm: &str) {
    let answered = |console: &str| console.matches(" 0% packet loss").count();
    let before = answered(&cluster.console(vm));
    // The marks are put together by the guest: its shell echoes what is typed.
    let line = format!("ping -c 2 -w 30 {TAP_ADDRESS}; echo pinged $?");
    linux::asked(cluster, vm, &line, |console| (answered(console) > before).then_some(()));
}

fn both_processors_work(cluster: &Cluster, vm: &str) {
    let line = "for c in 0 1; do taskset -c $c sh -c 'echo on $(cut -d \" \" -f 39 /proc/self/stat)'; done";
    linux::asked(cluster, vm, line, |console| {
        (console.contains("\non 0\r") && console.contains("\non 1\r")).then_some(())
    });
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
    lab.create(&cluster, "vm1", "amdA", &MEMORY);
    lesser.up(&cluster);
    linux::goes_on(&cluster, "vm1");
    both_processors_work(&cluster, "vm1");
    linux::asked(&cluster, "vm1", "ip addr add 192.168.77.2/24 dev eth0; echo addr''essed", |console| {
        console.contains("addressed").then_some(())
    });
    answers_on_the_network(&cluster, "vm1");

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
    let mut third = lab.host(&cluster, "amdC", EPYC);
    cluster.ok(["checkpoint", "create", "vm1"]);
    let counted = linux::count(&cluster, "vm1").expect("it counts");
    third.up(&cluster);

    first.cut();
    second.cut();
    cluster.ok(["restore", "vm1", "--to", "amdC"]);
    assert_eq!(cluster.host_of("vm1"), "amdC");
    let again = linux::goes_on(&cluster, "vm1");
    assert!(again + 60 > counted, "it goes on from {again}, the checkpoint had {counted}");
    assert!(linux::verified(&cluster, "vm1") > 0);
    both_processors_work(&cluster, "vm1");
    answers_on_the_network(&cluster, "vm1");
}

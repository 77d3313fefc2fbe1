//! Lanes that are cut, stalled, damaged or slow between two hosts: the guest goes on where it was, and the next attempt works.

use std::net::SocketAddr;

use e2e::cluster::{Cluster, wait};
use e2e::fault::{Fault, Proxy, Seed};
use proto::status::Code;

use super::BUSY;

/// Two hosts; whoever connects to hostB passes the proxy.
fn behind_a_proxy() -> (Cluster, Proxy, std::process::Child) {
    let cluster = Cluster::up(2);
    let listen: SocketAddr = cluster.setting("hostB", "listen").parse().unwrap();
    let proxy = Proxy::before(listen);
    let address = format!("\"{}\"", proxy.address());
    let agent = cluster.restart_with("hostB", &[("address", &address)], &[]);
    wait("hostB to be up behind the proxy", || {
        let host = cluster.json(["host", "show", "hostB"]);
        (host["state"] == "up" && host["address"] == proxy.address().to_string()).then_some(())
    });
    (cluster, proxy, agent)
}

#[test]
fn a_lane_that_breaks_costs_nothing_but_the_attempt() {
    let seed = std::env::var("GODWIT_FAULT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    eprintln!("GODWIT_FAULT_SEED={seed}");
    let mut seed = Seed(seed);
    let (cluster, proxy, mut agent) = behind_a_proxy();
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 3);
    // Each of the two lanes carries about 8 MiB.
    let mut at = || seed.between(100_000, 7 << 20);
    let faults = [
        Fault::Cut { after_bytes: at() },
        Fault::Flip { after_bytes: at() },
        Fault::Cut { after_bytes: at() },
        Fault::Flip { after_bytes: at() },
        Fault::Stall { after_bytes: at() },
    ];
    for fault in faults {
        let before = proxy.struck();
        proxy.set(fault);
        let answer = cluster.ctl(["migrate", "vm1", "--to", "hostB"]);
        assert!(proxy.struck() > before, "{fault:?} struck nothing: {answer:?}");
        let expected = [Code::Unreachable, Code::Corrupt, Code::Protocol].map(|code| Some(code as i32));
        assert!(expected.contains(&answer.code), "{fault:?}: {answer:#?}\n{}", cluster.logs());
        assert!(answer.stderr.contains("vm1 is running on hostA"), "{fault:?}: {answer:#?}");
        proxy.set(Fault::None);
        cluster.goes_on("vm1", 3);
        assert_eq!(cluster.running_on("vm1"), ["hostA"], "{fault:?}");
        wait("hostB to have nothing of it", || cluster.runner("hostB", "vm1").is_none().then_some(()));
    }
    proxy.set(Fault::Delay { ms: 2 });
    let moved = cluster.json(["migrate", "vm1", "--to", "hostB"]);
    assert_eq!(moved["source_digest"], moved["target_digest"]);
    proxy.set(Fault::None);
    cluster.goes_on("vm1", 5);
    assert_eq!(cluster.running_on("vm1"), ["hostB"]);
    agent.kill().unwrap();
    agent.wait().unwrap();
}

//! Ctrl-C undoes; a `ctl` that is killed leaves the operation to the controller, and another `ctl` can look at it.

use std::io::Read;

use e2e::cluster::{Cluster, signal, wait};
use proto::status::Code;
use rustix::process::Signal;

use super::BUSY;

fn said(child: &mut std::process::Child) -> String {
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

#[test]
fn ctrl_c_takes_a_migration_back_and_says_where_the_guest_is() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 3);
    for kind in [Signal::INT, Signal::TERM] {
        let mut moving = cluster.begins("vm1", ["migrate", "vm1", "--to", "hostB", "--bandwidth", "1M"]);
        signal(moving.id() as i32, kind);
        let text = said(&mut moving);
        assert_eq!(moving.wait().unwrap().code(), Some(Code::Cancelled as i32), "{text}");
        assert!(text.contains("cancelled by the operator"), "{text}");
        assert!(text.contains("vm1 is running on hostA"), "{text}");
        cluster.goes_on("vm1", 3);
        assert_eq!((cluster.host_of("vm1").as_str(), cluster.running_on("vm1")), ("hostA", vec!["hostA".to_owned()]));
        assert_eq!(cluster.runner("hostB", "vm1"), None, "the target kept something");
    }
    // Nothing of it is in the way of the next one.
    cluster.ok(["migrate", "vm1", "--to", "hostB"]);
    cluster.goes_on("vm1", 3);
}

#[test]
fn a_second_ctrl_c_leaves_at_once() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    let mut moving = cluster.begins("vm1", ["migrate", "vm1", "--to", "hostB", "--bandwidth", "1M"]);
    let source = cluster.daemon("hostA");
    // The source does not answer for a while, so that taking back takes a while.
    signal(source, Signal::STOP);
    signal(moving.id() as i32, Signal::INT);
    wait("ctl to have asked", || {
        let events = cluster.ok(["events", "--vm", "vm1"]);
        events.contains("cancel").then_some(())
    });
    signal(moving.id() as i32, Signal::INT);
    let text = said(&mut moving);
    let code = moving.wait().unwrap().code();
    signal(source, Signal::CONT);
    assert_eq!(code, Some(Code::Cancelled as i32), "{text}");
    assert!(text.contains("no longer following") && text.contains("ctl events"), "{text}");
    wait("the operation to end", || {
        cluster.json(["vm", "show", "vm1"])["operation"].as_str()?.is_empty().then_some(())
    });
    cluster.goes_on("vm1", 3);
    assert_eq!(cluster.host_of("vm1"), "hostA");
}

#[test]
fn a_ctl_that_is_killed_leaves_the_operation_going() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    let mut moving = cluster.begins("vm1", ["migrate", "vm1", "--to", "hostB", "--bandwidth", "12M"]);
    let operation = cluster.json(["vm", "show", "vm1"])["operation"].as_str().unwrap().to_owned();
    moving.kill().unwrap();
    moving.wait().unwrap();
    assert_eq!(cluster.json(["vm", "show", "vm1"])["operation"], operation.as_str(), "it ended with its ctl");
    wait("the migration to be done", || (cluster.host_of("vm1") == "hostB").then_some(()));
    let told = cluster.ok(["events", "--vm", "vm1", "-o", "json"]);
    let events: Vec<serde_json::Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_it = |event: &&serde_json::Value| event["operation"] == operation.as_str();
    let kinds: Vec<&str> = events.iter().filter(of_it).filter_map(|event| event["kind"].as_str()).collect();
    assert!(kinds.first().is_some_and(|kind| kind.contains("began")), "{kinds:?}");
    assert!(kinds.iter().any(|kind| kind.contains("committed")), "{kinds:?}");
    cluster.goes_on("vm1", 3);
}

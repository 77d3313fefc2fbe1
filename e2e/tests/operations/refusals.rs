//! What cannot be done is refused with a reason and a code of its own, and changes nothing.

use e2e::cluster::Cluster;
use proto::status::Code;

use super::BUSY;

#[test]
fn what_contradicts_an_operation_under_way_is_refused_and_names_it() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 3);
    let id = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap().to_owned();
    let mut moving = cluster.begins("vm1", ["migrate", "vm1", "--to", "hostB", "--bandwidth", "1M"]);
    let operation = cluster.json(["vm", "show", "vm1"])["operation"].as_str().unwrap().to_owned();
    let cases: [&[&str]; 8] = [
        &["migrate", "vm1", "--to", "hostB"],
        &["checkpoint", "create", "vm1"],
        &["vm", "rm", "vm1"],
        &["vm", "stop", "vm1"],
        &["vm", "pause", "vm1"],
        &["vm", "resume", "vm1"],
        &["restore", "vm1", "--to", "hostB"],
        &["restore", &id, "--to", "hostB", "--as", "vm1"],
    ];
    for args in cases {
        let said = cluster.fails(Code::Conflict, args.iter().copied());
        assert!(said.contains("vm1"), "{args:?}: {said}");
        assert!(args.contains(&"--as") || said.contains(&operation), "{args:?}: {said}");
    }
    // What does not touch it goes on beside it.
    cluster.ok(["checkpoint", "verify", &id]);
    cluster.ok(["restore", &id, "--to", "hostB", "--as", "vm2"]);
    assert!(moving.try_wait().unwrap().is_none(), "the migration was over before everything was tried");
    e2e::cluster::signal(moving.id() as i32, rustix::process::Signal::INT);
    assert_eq!(moving.wait().unwrap().code(), Some(Code::Cancelled as i32));
    cluster.goes_on("vm1", 3);
    cluster.goes_on("vm2", 3);
}

#[test]
fn what_makes_no_sense_to_the_cluster_is_refused() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.create("vm2", "hostB", BUSY);
    let id = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap().to_owned();
    cluster.ok(["vm", "stop", "vm2"]);
    let cases: [(Code, &[&str], &str); 26] = [
        (Code::Conflict, &["migrate", "vm1", "--to", "hostA"], "hostA"),
        (Code::Conflict, &["migrate", "vm2", "--to", "hostA"], "stopped"),
        (Code::Conflict, &["vm", "pause", "vm2"], "stopped"),
        (Code::Conflict, &["vm", "resume", "vm2"], "stopped"),
        (Code::Conflict, &["checkpoint", "create", "vm2"], "stopped"),
        (Code::NotFound, &["migrate", "vm1", "--to", "hostZ"], "hostZ"),
        (Code::NotFound, &["migrate", "vm9", "--to", "hostB"], "vm9"),
        (Code::NotFound, &["migrate", "vm9", "--to", "hostB", "--dry-run"], "vm9"),
        (Code::NotFound, &["vm", "show", "vm9"], "vm9"),
        (Code::NotFound, &["vm", "rm", "vm9"], "vm9"),
        (Code::NotFound, &["vm", "console", "vm9", "--log"], "vm9"),
        (Code::NotFound, &["host", "show", "hostZ"], "hostZ"),
        (Code::NotFound, &["checkpoint", "create", "vm9"], "vm9"),
        (Code::NotFound, &["checkpoint", "verify", "0123456789abcdef"], "0123456789abcdef"),
        (Code::NotFound, &["checkpoint", "rm", "0123456789abcdef"], "0123456789abcdef"),
        (Code::NotFound, &["restore", "vm9", "--to", "hostB"], "vm9"),
        (Code::NotFound, &["restore", "vm2", "--to", "hostB"], "no checkpoint"),
        (Code::NotFound, &["restore", &id, "--to", "hostZ", "--as", "vm3"], "hostZ"),
        (Code::NotFound, &["vmcb", "show", "vm9"], "vm9"),
        (Code::NotFound, &["inspect", "no-such-thing"], "no-such-thing"),
        (Code::Conflict, &["restore", &id, "--to", "hostB", "--as", "vm2"], "vm2"),
        (Code::BadInput, &["restore", &id, "--to", "hostB", "--as", "a/b"], "a/b"),
        (Code::BadInput, &["migrate", "vm1", "--to", "hostB", "--downtime", "0ms"], "downtime"),
        (Code::BadInput, &["migrate", "vm1", "--to", "hostB", "--bandwidth", "17"], "bandwidth"),
        (Code::BadInput, &["migrate", "vm1", "--to", "hostB", "--bandwidth", "fast"], "fast"),
        (Code::BadInput, &["migrate", "vm1", "--to", "hostB", "--sideways"], "--sideways"),
    ];
    for (code, args, named) in cases {
        let said = cluster.fails(code, args.iter().copied());
        assert!(said.contains(named), "{args:?}: {said:?} does not name {named:?}");
    }
    cluster.goes_on("vm1", 3);
    assert_eq!(cluster.json(["vm", "ls"]).as_array().map(Vec::len), Some(2));
}

#[test]
fn what_no_host_can_run_is_refused_before_anything_is_kept() {
    let cluster = Cluster::up(1);
    let elf = cluster.dir().join("guest.elf");
    std::fs::write(&elf, BUSY.elf().unwrap()).unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = cluster.dir().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (text, empty) = (write("text", b"not a kernel at all\n"), write("empty", b""));
    let (odd, cut) = (write("odd.img", &[0; 700]), write("cut.elf", &BUSY.elf().unwrap()[..5000]));
    let elf = elf.to_str().unwrap();
    let cases: [(Code, &[&str], &str); 18] = [
        (Code::BadInput, &["--memory", "64M", "--kernel", &text], "text"),
        (Code::BadInput, &["--memory", "64M", "--kernel", &empty], "empty"),
        (Code::BadInput, &["--memory", "64M", "--kernel", &cut], "cut.elf"),
        (Code::BadInput, &["--memory", "64M", "--kernel", "/"], "directory"),
        (Code::BadInput, &["--memory", "64M", "--kernel", elf, "--initrd", "/no/initrd"], "/no/initrd"),
        (Code::BadInput, &["--memory", "64M", "--kernel", elf, "--disk", &odd], "700"),
        (Code::BadInput, &["--memory", "64M", "--kernel", elf, "--disk", "/no/disk"], "/no/disk"),
        (Code::BadInput, &["--memory", "64M", "--kernel", elf, "--disk", "/dev/null"], "/dev/null"),
        (Code::BadInput, &["--memory", "64M", "--kernel", elf, "--net", "tap=gdwt-none"], "gdwt-none"),
        (Code::BadInput, &["--memory", "64M", "--kernel", elf, "--net", "tap=,mac=01:00:00:00:00:01"], "01:00"),
        (Code::BadInput, &["--memory", "63M", "--kernel", elf], "63"),
        (Code::BadInput, &["--memory", "1M", "--kernel", elf], "1"),
        (Code::BadInput, &["--memory", "12Q", "--kernel", elf], "12Q"),
        (Code::BadInput, &["--memory", "64M", "--kernel", elf, "--vcpus", "0"], "processor"),
        (Code::BadInput, &["--memory", "64M", "--kernel", elf, "--engine", "tcg"], "tcg"),
        (Code::Incapable, &["--memory", "64M", "--kernel", elf, "--cpu", "z80"], "z80"),
        (Code::BadInput, &["--memory", "64M", "--kernel", elf, "--cmdline", &"x".repeat(100_000)], "command line"),
        (Code::Exhausted, &["--memory", "1000G", "--kernel", elf], "memory"),
    ];
    for (code, args, named) in cases {
        let all = ["vm", "create", "vm1", "--host", "hostA"].iter().chain(args).copied();
        let said = cluster.fails(code, all);
        assert!(said.contains(named), "{args:?}: {said:?} does not name {named:?}");
        assert!(!said.contains("this is a bug"), "{args:?}: {said}");
    }
    for name in ["", "-x", "../x", "a b", "ä", "UPPER/x", &"x".repeat(41)] {
        cluster
            .fails(Code::BadInput, ["vm", "create", "--host", "hostA", "--memory", "64M", "--kernel", elf, "--", name]);
    }
    // Every name that ctl takes, hosts take.
    for name in ["a", "Vm_1.test-2", &"x".repeat(40)] {
        cluster.ok(["vm", "create", name, "--host", "hostA", "--memory", "64M", "--kernel", elf]);
        cluster.ok(["vm", "rm", name]);
    }
    assert_eq!(cluster.json(["vm", "ls"]), serde_json::json!([]));
    let kept: Vec<_> = std::fs::read_dir(cluster.dir().join("hostA/vms")).unwrap().collect();
    assert!(kept.is_empty(), "{kept:?}");
}

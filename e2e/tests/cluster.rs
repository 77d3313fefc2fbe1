//! Whole clusters of real binaries with the in-tree guest: what an operator does, and that it holds.

use e2e::cluster::{Cluster, Ticks, alive, wait};
use e2e::guest::registers::Registers;
use e2e::guest::{Program, REGION};
use proto::status::Code;

/// A guest of about 40 MiB that rewrites 8 MiB/s.
const BUSY: Program =
    Program { start: REGION, region_bytes: 16 << 20, pages_per_s: 2000, tick_ms: 20, tsc_hz: 1_000_000_000 };

fn digests_agree(migration: &serde_json::Value) {
    let digest = |side: &str| migration[side].as_str().unwrap_or_default().to_owned();
    assert_eq!(digest("source_digest"), digest("target_digest"), "{migration:#}");
    assert_eq!(digest("source_digest").len(), 64, "{migration:#}");
}

#[test]
fn every_register_and_timer_goes_with_a_guest() {
    let cluster = Cluster::up(2);
    let kernel = cluster.dir().join("registers.elf");
    std::fs::write(&kernel, Registers { avx: false, tsc_hz: 1_000_000_000 }.elf().unwrap()).unwrap();
    let (kernel, memory) = (kernel.to_str().unwrap(), Registers::MEMORY_BYTES.to_string());
    cluster.ok(["vm", "create", "vm1", "--host", "hostA", "--kernel", kernel, "--memory", &memory]);
    cluster.goes_on("vm1", 5);
    for host in ["hostB", "hostA"] {
        digests_agree(&cluster.json(["migrate", "vm1", "--to", host]));
        cluster.goes_on("vm1", 5);
    }
    cluster.ok(["checkpoint", "create", "vm1"]);
    cluster.ok(["restore", "vm1", "--to", "hostB"]);
    cluster.goes_on("vm1", 5);
}

#[test]
fn a_busy_guest_moves_there_and_back_and_loses_nothing() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 5);
    let there = cluster.json(["migrate", "vm1", "--to", "hostB"]);
    digests_agree(&there);
    assert_eq!((cluster.host_of("vm1").as_str(), &there["generation"]), ("hostB", &serde_json::json!(2)));
    cluster.goes_on("vm1", 20);
    assert_eq!(cluster.running_on("vm1"), ["hostB"]);
    let back = cluster.json(["migrate", "vm1", "--to", "hostA", "--via", "controller", "--verify", "full"]);
    digests_agree(&back);
    assert_eq!((cluster.host_of("vm1").as_str(), &back["generation"]), ("hostA", &serde_json::json!(3)));
    cluster.goes_on("vm1", 20);
    // Ticks on the console of the last host follow each other without a gap or a repetition: it is one guest.
    let ticks: Vec<u64> = Ticks::all(&cluster.console("vm1")).iter().map(|t| t.tick).collect();
    assert!(ticks.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ticks:?}");
    cluster.ok(["vm", "stop", "vm1"]);
    cluster.ok(["vm", "rm", "vm1"]);
    assert_eq!(cluster.json(["vm", "ls"]), serde_json::json!([]));
}

#[test]
fn an_attached_console_stays_attached_through_a_migration() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 5);
    let said = cluster.dir().join("attached.txt");
    let file = std::fs::File::create(&said).expect("a file for the console");
    let mut attached = cluster.command(["vm", "console", "vm1"]);
    let mut attached = attached.stdin(std::process::Stdio::piped()).stdout(file).spawn().expect("ctl can be run");
    let heard = || Ticks::all(&String::from_utf8_lossy(&std::fs::read(&said).unwrap_or_default()));
    wait("the console to be attached", || heard().last().copied());
    cluster.ok(["migrate", "vm1", "--to", "hostB"]);
    let moved = cluster.goes_on("vm1", 10);
    wait("the console to go on after the migration", || heard().last().filter(|last| last.tick >= moved.tick).copied());
    // What is typed now reaches the guest where it is, and its echo comes back.
    let mut keys = attached.stdin.take().expect("stdin is piped");
    std::io::Write::write_all(&mut keys, b"godwit!").expect("ctl reads its input");
    wait("the echo", || String::from_utf8_lossy(&std::fs::read(&said).ok()?).contains('!').then_some(()));
    let ticks: Vec<u64> = heard().iter().map(|t| t.tick).collect();
    assert!(ticks.windows(2).all(|pair| pair[1] <= pair[0] + 2), "the console lost lines: {ticks:?}");
    attached.kill().expect("ctl is running");
    attached.wait().expect("ctl ends");
}

#[test]
fn what_is_typed_during_a_migration_comes_out_once_and_whole() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 5);
    let said = cluster.dir().join("attached.txt");
    let file = std::fs::File::create(&said).expect("a file for the console");
    let mut attached = cluster.command(["vm", "console", "vm1"]);
    let mut attached = attached.stdin(std::process::Stdio::piped()).stdout(file).spawn().expect("ctl can be run");
    let heard = || String::from_utf8_lossy(&std::fs::read(&said).unwrap_or_default()).into_owned();
    wait("the console to be attached", || Ticks::last(&heard()));
    let mut keys = attached.stdin.take().expect("stdin is piped");
    let mut migration = cluster.command(["migrate", "vm1", "--to", "hostB"]).spawn().expect("ctl can be run");
    // Capitals are the echo: the guest itself prints none.
    let mut typed = String::new();
    let mut under_way = true;
    while under_way {
        under_way = migration.try_wait().expect("ctl runs").is_none();
        for _ in 0..8 {
            let word: String = (0..64).map(|n| char::from(b'A' + ((typed.len() + n * 7) % 26) as u8)).collect();
            std::io::Write::write_all(&mut keys, word.as_bytes()).expect("ctl reads its input");
            typed += &word;
        }
        wait("the guest to keep up", || {
            (heard().matches(char::is_uppercase).count() + 6000 > typed.len()).then_some(())
        });
    }
    assert!(migration.wait().expect("ctl ends").success(), "the migration failed\n{}", cluster.logs());
    let echo = || heard().chars().filter(char::is_ascii_uppercase).collect::<String>();
    wait("the whole echo", || (echo().len() >= typed.len()).then_some(()));
    assert!(echo() == typed, "typed {} bytes, {} came back", typed.len(), echo().len());
    cluster.goes_on("vm1", 5);
    attached.kill().expect("ctl is running");
    attached.wait().expect("ctl ends");
}

/// A guest of 4 GiB whose pages lie on both sides of the hole below 4 GiB.
const HIGH: Program = Program { start: (3 << 30) - (6 << 20), region_bytes: 12 << 20, pages_per_s: 1500, ..BUSY };

#[test]
fn memory_above_the_hole_moves_and_comes_back() {
    let cluster = Cluster::up(2);
    cluster.create_with("vm1", "hostA", HIGH, &["--memory", "4G"]);
    cluster.goes_on("vm1", 5);
    digests_agree(&cluster.json(["migrate", "vm1", "--to", "hostB"]));
    cluster.goes_on("vm1", 20);
    cluster.ok(["checkpoint", "create", "vm1"]);
    cluster.goes_on("vm1", 5);
    let runner = cluster.runner("hostB", "vm1").expect("the guest has a runner");
    cluster.kill(cluster.daemon("hostB"));
    cluster.kill(runner);
    cluster.ok(["restore", "vm1", "--to", "hostA"]);
    // Long enough to check each of the 3072 pages.
    cluster.goes_on("vm1", 150);
}

#[test]
fn a_checkpoint_brings_the_guest_back_after_its_host_died() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 10);
    let checkpoint = cluster.json(["checkpoint", "create", "vm1"]);
    let id = checkpoint["id"].as_str().expect("a checkpoint has an id").to_owned();
    cluster.ok(["checkpoint", "verify", &id]);
    let at_checkpoint = cluster.goes_on("vm1", 20);
    let runner = cluster.runner("hostA", "vm1").expect("the guest has a runner");
    cluster.kill(cluster.daemon("hostA"));
    cluster.kill(runner);
    cluster.ok(["restore", "vm1", "--to", "hostB"]);
    assert_eq!(cluster.host_of("vm1"), "hostB");
    let after = cluster.goes_on("vm1", 20);
    assert!(after.bad == 0 && at_checkpoint.bad == 0);
    // A clone under another name, beside the original.
    cluster.ok(["restore", &id, "--to", "hostB", "--as", "vm2"]);
    cluster.goes_on("vm2", 5);
    cluster.goes_on("vm1", 5);
    cluster.ok(["checkpoint", "rm", &id]);
    assert_eq!(cluster.json(["checkpoint", "ls"]), serde_json::json!([]));
}

#[test]
fn a_damaged_checkpoint_is_named_and_nothing_starts() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 5);
    let id = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap_or_default().to_owned();
    // Every manifest has a copy of what the key object holds, and whose the generation is matters to the next checkpoint alone.
    let hurts = |file: &std::path::PathBuf| !file.ends_with("key") && !file.ends_with("owner");
    for file in files(&cluster.dir().join("bucket")).into_iter().filter(hurts) {
        let good = std::fs::read(&file).expect("a file of the bucket");
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 0x10;
        std::fs::write(&file, &bad).expect("a file of the bucket");
        let said = cluster.fails(Code::Corrupt, ["checkpoint", "verify", &id]);
        let name = file.file_stem().and_then(|n| n.to_str()).unwrap_or_default();
        assert!(said.contains(&name[..16.min(name.len())]), "{said} does not name {name}");
        cluster.fails(Code::Corrupt, ["restore", &id, "--to", "hostB", "--as", "vm2"]);
        assert_eq!(cluster.running_on("vm2"), Vec::<String>::new());
        // In place too: what the checkpoint was to replace is as it was, and goes on.
        cluster.fails(Code::Corrupt, ["restore", "vm1", "--to", "hostA"]);
        cluster.goes_on("vm1", 2);
        std::fs::write(&file, &good).expect("a file of the bucket");
    }
    cluster.ok(["checkpoint", "verify", &id]);
    let later = cluster.goes_on("vm1", 5);
    let runner = cluster.runner("hostA", "vm1").expect("the guest has a runner");
    cluster.ok(["restore", "vm1", "--to", "hostA"]);
    assert!(cluster.ticks("vm1").is_none_or(|now| now.tick < later.tick), "the checkpoint is of an earlier time");
    wait("the old copy's process to end", || (!alive(runner)).then_some(()));
    cluster.goes_on("vm1", 5);
}

#[test]
fn everything_comes_back_from_the_bucket_and_the_keys_alone() {
    let scratch = std::env::temp_dir().join(format!("godwit-e2e-bucket-{}", std::process::id()));
    let url = format!("file:{}", scratch.display());
    let first = Cluster::up_with(2, &["--bucket", &url]);
    first.create("vm1", "hostA", BUSY);
    first.create("vm2", "hostB", BUSY);
    first.goes_on("vm1", 5);
    first.goes_on("vm2", 5);
    let full = first.json(["checkpoint", "create", "vm1"]);
    let second = first.json(["checkpoint", "create", "vm1"]);
    assert!(second["own_bytes"].as_u64() < full["own_bytes"].as_u64(), "{full:#} {second:#}");
    first.ok(["checkpoint", "create", "vm2"]);
    // After a move the target knows nothing of the base, and still sends only what changed.
    first.ok(["migrate", "vm1", "--to", "hostB"]);
    let third = first.json(["checkpoint", "create", "vm1"]);
    assert!(third["own_bytes"].as_u64() < full["own_bytes"].as_u64(), "{full:#} {third:#}");
    // The first goes, the others do not need it.
    first.ok(["checkpoint", "rm", full["id"].as_str().unwrap_or_default()]);
    first.ok(["checkpoint", "verify", "--all"]);
    let generation = first.json(["vm", "show", "vm1"])["generation"].as_u64();
    let keys = first.ok(["key", "export"]);
    let before = first.ticks("vm1").expect("the guest has said something");
    drop(first);

    let later = Cluster::up_with(2, &["--bucket", &url]);
    let said = later.fails(Code::NotFound, ["restore", "vm1", "--from", &url, "--to", "hostA"]);
    assert!(said.contains("the key is missing"), "{said}");
    let safe = later.dir().join("safe");
    std::fs::write(&safe, keys).expect("a file for the keys");
    later.ok(["key", "import", safe.to_str().expect("temporary paths are text")]);
    later.ok(["restore", "--all", "--from", &url]);
    assert!(later.json(["vm", "show", "vm1"])["generation"].as_u64() > generation);
    for vm in ["vm1", "vm2"] {
        later.goes_on(vm, 5);
    }
    assert!(later.goes_on("vm1", 1).tick > 5 && before.tick > 5);
    // A rotation: what was sealed before still opens, also for who comes after.
    later.ok(["key", "rotate"]);
    later.ok(["checkpoint", "create", "vm1"]);
    later.ok(["checkpoint", "verify", "--all"]);
    drop(later);
    std::fs::remove_dir_all(scratch).expect("the bucket is there");
}

fn files(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn a_guest_goes_only_where_every_bit_is_that_it_was_promised() {
    const MISSING: &str = "CPUID 0000_0001.0 ECX[23] popcnt";
    let cluster = Cluster::up(3);
    cluster.withhold("hostB", &["popcnt"], 3);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 5);
    let vm = cluster.json(["vm", "show", "vm1"]);
    assert_eq!(vm["contract"]["model"], "soft-v1");
    assert!(vm["contract"]["atoms"].as_u64() > Some(50), "{:#}", vm["contract"]);
    for more in [&["--dry-run"][..], &[]] {
        let args = ["migrate", "vm1", "--to", "hostB"].into_iter().chain(more.iter().copied());
        let said = cluster.fails(Code::Incapable, args);
        assert!(said.contains(MISSING) && said.contains("hostC would do"), "{said}");
    }
    assert!(!cluster.ok(["events", "--vm", "vm1"]).contains("migrate.began"), "an operation began");
    assert_eq!(
        (cluster.running_on("vm1"), cluster.json(["vm", "show", "vm1"])["generation"].as_u64()),
        (vec!["hostA".to_owned()], Some(1))
    );
    cluster.goes_on("vm1", 5);
    // Neither is it made there, nor brought back there; without --to it comes back where it can run.
    let kernel = cluster.dir().join("vm1.elf");
    let kernel = kernel.to_str().expect("temporary paths are text");
    let said = cluster
        .fails(Code::Incapable, ["vm", "create", "vm3", "--host", "hostB", "--memory", "64M", "--kernel", kernel]);
    assert!(said.contains(MISSING), "{said}");
    let id = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap_or_default().to_owned();
    let said = cluster.fails(Code::Incapable, ["restore", &id, "--to", "hostB", "--as", "vm2"]);
    assert!(said.contains(MISSING) && said.contains("hostC"), "{said}");
    assert_eq!(cluster.json(["vm", "ls"]).as_array().map(Vec::len), Some(1));
    cluster.ok(["restore", &id, "--as", "vm2"]);
    assert_ne!(cluster.host_of("vm2"), "hostB");
    cluster.goes_on("vm2", 5);
    // What differs is shown by bit, and between equal hosts nothing does.
    let differences = |a, b| cluster.json(["host", "compare", a, b])["differences"].clone();
    let row = serde_json::json!({ "of": "soft", "what": MISSING, "a": "yes", "b": "no" });
    assert_eq!(differences("hostA", "hostB")[0], row);
    assert_eq!(differences("hostA", "hostC"), serde_json::json!([]));
    assert!(cluster.ok(["host", "show", "hostB"]).contains(&format!("soft-v1 cannot run here: {MISSING}")));
    let there = cluster.json(["migrate", "vm1", "--to", "hostC"]);
    digests_agree(&there);
    cluster.goes_on("vm1", 10);
}

#[test]
fn a_guest_does_not_notice_that_its_agent_is_killed_and_started_again() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 5);
    let runner = cluster.runner("hostA", "vm1");
    cluster.kill(cluster.daemon("hostA"));
    cluster.start(2);
    wait("the new agent to find the guest", || (cluster.observed("vm1") == "running").then_some(()));
    assert_eq!(cluster.runner("hostA", "vm1"), runner, "the guest's process is another one");
    cluster.goes_on("vm1", 10);
    digests_agree(&cluster.json(["migrate", "vm1", "--to", "hostB"]));
    cluster.goes_on("vm1", 10);
}

#[test]
fn the_controller_comes_back_with_all_it_knew() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.ok(["checkpoint", "create", "vm1"]);
    let known = || {
        let mut checkpoints = cluster.json(["checkpoint", "ls"]);
        checkpoints[0]["age_ms"] = serde_json::Value::Null;
        (cluster.json(["vm", "show", "vm1"])["id"].clone(), checkpoints)
    };
    let before = known();
    cluster.kill(cluster.daemon("controller"));
    cluster.start(2);
    assert_eq!(before, known());
    wait("the guest to be seen again", || (cluster.observed("vm1") == "running").then_some(()));
    cluster.goes_on("vm1", 5);
}

#[test]
fn a_paused_guest_stands_still_and_moves_paused() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 5);
    cluster.ok(["vm", "pause", "vm1"]);
    let retired = || cluster.json(["vm", "show", "vm1"])["retired_instructions"].clone();
    let before = retired();
    cluster.ok(["migrate", "vm1", "--to", "hostB"]);
    wait("hostB to report it", || (cluster.observed("vm1") == "paused").then_some(()));
    assert_eq!(before, retired());
    cluster.ok(["vm", "resume", "vm1"]);
    cluster.goes_on("vm1", 5);
}

#[test]
fn what_makes_no_sense_is_refused_with_the_reason() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    let dir = cluster.dir().to_str().expect("temporary paths are text").to_owned();
    let (kernel, text) = (format!("{dir}/vm1.elf"), format!("{dir}/ctl.toml"));
    let create = |name: &'static str, more: &[&str]| -> Vec<String> {
        let args = ["vm", "create", name, "--host"];
        args.iter().chain(more).map(|s| (*s).to_owned()).collect()
    };
    let cases: [(Code, Vec<String>, &str); 8] = [
        (Code::Conflict, create("vm1", &["hostA", "--memory", "64M", "--kernel", &kernel]), "vm1"),
        (Code::NotFound, create("vm2", &["hostZ", "--memory", "64M", "--kernel", &kernel]), "hostZ"),
        (Code::BadInput, create("vm2", &["hostA", "--memory", "64M", "--kernel", &text]), "ctl.toml"),
        (Code::BadInput, create("vm2", &["hostA", "--memory", "64M", "--kernel", "/nonexistent"]), "/nonexistent"),
        (Code::Exhausted, create("vm2", &["hostA", "--memory", "1000G", "--kernel", &kernel]), "memory"),
        (Code::BadInput, create("vm2", &["hostA", "--memory", "12Q", "--kernel", &kernel]), "12Q"),
        (Code::BadInput, create("../x", &["hostA", "--memory", "64M", "--kernel", &kernel]), "../x"),
        (
            Code::BadInput,
            create("vm2", &["hostA", "--memory", "64M", "--kernel", &kernel, "--disk", "/no/disk"]),
            "/no/disk",
        ),
    ];
    for (code, args, named) in cases {
        let said = cluster.fails(code, args.iter().map(String::as_str));
        assert!(said.contains(named), "{args:?}: {said:?} does not name {named:?}");
    }
    cluster.fails(Code::NotFound, ["migrate", "vm9", "--to", "hostB"]);
    cluster.fails(Code::NotFound, ["migrate", "vm1", "--to", "hostZ"]);
    cluster.fails(Code::NotFound, ["checkpoint", "show", "0123456789abcdef"]);
    cluster.goes_on("vm1", 3);
    assert_eq!(cluster.json(["vm", "ls"]).as_array().map(Vec::len), Some(1));
}

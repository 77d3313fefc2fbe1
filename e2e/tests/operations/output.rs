//! Every command that prints can be read by programs, and what daemons write can be read by people.

use e2e::cluster::Cluster;
use proto::status::Code;
use serde_json::Value;

use super::BUSY;

/// One document, or with `streamed` any number, as JSON and as YAML say the same in shape.
fn parse(text: &str, format: &str, streamed: bool) -> Vec<Value> {
    let documents: Vec<Value> = match (format, streamed) {
        ("json", false) => vec![serde_json::from_str(text).unwrap_or_else(|e| panic!("{e} in {text}"))],
        ("json", true) => text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
        _ => {
            use serde::Deserialize;
            let documents = serde_yaml_ng::Deserializer::from_str(text).map(Value::deserialize);
            documents.map(|value| value.unwrap_or_else(|e| panic!("{e} in {text}"))).collect()
        }
    };
    assert!(streamed || documents.len() == 1, "{text}");
    assert!(documents.iter().all(|value| value.is_object() || value.is_array()), "{text}");
    documents
}

fn names(value: &Value) -> Vec<String> {
    match value {
        Value::Object(fields) => fields.keys().cloned().collect(),
        Value::Array(values) => values.first().map(names).unwrap_or_default(),
        _ => Vec::new(),
    }
}

#[test]
fn every_command_prints_for_people_and_for_programs() {
    let cluster = Cluster::up(2);
    let dir = cluster.dir().to_str().unwrap().to_owned();
    for args in [&["vm", "ls"][..], &["checkpoint", "ls"], &["checkpoint", "verify", "--all"]] {
        assert_eq!(cluster.json(args.iter().copied()), serde_json::json!([]));
        assert!(cluster.ok(args).starts_with("no "), "{args:?}");
    }
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 3);
    let id = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap().to_owned();
    let keys = cluster.dir().join("keys").to_str().unwrap().to_owned();
    let holds_state = |path: &str| {
        path.contains("/packs/") && cluster.ok(["inspect", path, "--keys", &keys]).contains("device/uart0")
    };
    let pack = first_file(&cluster.dir().join("bucket"), holds_state);
    let (stored, vmcb) = (format!("{dir}/hostA/vms/vm1/vm.pb"), format!("{dir}/vmcb.bin"));
    std::fs::write(&vmcb, [0; 4096]).unwrap();
    let once: &[&[&str]] = &[
        &["host", "ls"],
        &["host", "show", "hostA"],
        &["vm", "ls"],
        &["vm", "show", "vm1"],
        &["checkpoint", "create", "vm1"],
        &["checkpoint", "ls"],
        &["checkpoint", "ls", "vm1"],
        &["checkpoint", "show", &id],
        &["checkpoint", "verify", &id],
        &["checkpoint", "verify", "--all"],
        &["migrate", "vm1", "--to", "hostB", "--dry-run"],
        &["vmcb", "show", "vm1"],
        &["vmcb", "show", &id],
        &["vmcb", "diff", "vm1", &vmcb],
        &["inspect", &id],
        &["inspect", &pack],
        &["inspect", &stored],
        &["vm", "pause", "vm1"],
        &["vm", "resume", "vm1"],
        &["dev", "up", "--dir", &dir],
    ];
    let streamed: &[&[&str]] =
        &[&["events"], &["events", "--vm", "vm1"], &["top", "--count", "2", "--interval", "100ms"]];
    for (args, many) in once.iter().map(|args| (args, false)).chain(streamed.iter().map(|args| (args, true))) {
        let print = |format: &str| cluster.ok(args.iter().chain(&["-o", format]));
        let (json, yaml) = (parse(&print("json"), "json", many), parse(&print("yaml"), "yaml", many));
        assert!(!json.is_empty() && names(&json[0]) == names(&yaml[0]), "{args:?}: {json:?}\n{yaml:?}");
        let table = print("table");
        assert!(!table.trim().is_empty(), "{args:?}");
        assert!(!table.chars().any(|c| c.is_control() && c != '\n'), "{args:?}: {table:?}");
        assert!(!table.lines().any(|line| line.ends_with(' ')), "{args:?}: {table}");
    }
    // Those that leave something else behind each time.
    for (format, to) in [("json", "hostB"), ("yaml", "hostA"), ("table", "hostB")] {
        let name = format!("copy-{format}");
        let print = |args: &[&str]| {
            let text = cluster.ok(args.iter().chain(&["-o", format]));
            if format == "table" { Vec::new() } else { parse(&text, format, false) }
        };
        print(&["migrate", "vm1", "--to", to]);
        print(&["restore", &id, "--to", to, "--as", &name]);
        print(&["vm", "stop", &name]);
        print(&["vm", "rm", &name]);
    }
    devices_are_told_by_name(&cluster, &pack, &keys);
    for log in std::fs::read_dir(cluster.dir().join("logs")).unwrap() {
        let path = log.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains('\x1b'), "{} has colours", path.display());
    }
}

/// Sections of a pack and an agent's own files say what is in them.
fn devices_are_told_by_name(cluster: &Cluster, pack: &str, keys: &str) {
    let inspected = cluster.json(["inspect", pack, "--keys", keys]);
    let frames = inspected["frames"].as_array().unwrap();
    let content = |name: &str| {
        let of = |frame: &&Value| frame["detail"]["name"] == name;
        frames.iter().find(of).unwrap_or_else(|| panic!("no section {name}"))["detail"]["content"].clone()
    };
    assert!(content("clock")["retired"].as_u64() > Some(0));
    assert!(content("cpu/0")["gprs"].as_array().map(Vec::len) == Some(16));
    assert!(content("device/lapic0")["lvt"].is_array());
    assert!(content("device/uart0")["divisor"].is_u64());
    assert!(content("device/virtio-rng")["transport"]["queues"].is_array());
    let index = frames.last().unwrap();
    assert_eq!(index["kind"], "pack-index");
    assert_eq!(index["detail"]["content"]["entries"].as_array().map(Vec::len), Some(frames.len() - 1));
}

fn first_file(dir: &std::path::Path, wanted: impl Fn(&str) -> bool + Copy) -> String {
    fn walk(dir: &std::path::Path, found: &mut Vec<String>) {
        for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() { walk(&path, found) } else { found.push(path.to_str().unwrap().to_owned()) }
        }
    }
    let mut found = Vec::new();
    walk(dir, &mut found);
    found.into_iter().find(|path| wanted(path)).expect("a file")
}

#[test]
fn failures_have_codes_before_any_cluster_is_asked() {
    let cluster = Cluster::up(1);
    for args in [&["vm"][..], &["vm", "fly"], &["migrate", "vm1"], &["-o", "xml", "vm", "ls"], &["top", "--count", "0"]]
    {
        cluster.fails(Code::BadInput, args.iter().copied());
    }
    for args in [&["--help"][..], &["vm", "create", "--help"], &["--version"]] {
        assert!(!cluster.ok(args).is_empty());
    }
    let without = |config: &str| {
        let mut command = cluster.command(["vm", "ls"]);
        let output = command.env("GODWIT_CONFIG", config).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = without("/no/such/ctl.toml");
    assert!(code == Some(Code::BadInput as i32) && said.contains("/no/such/ctl.toml"), "{said}");
    let dead = cluster.dir().join("dead.toml");
    let text = std::fs::read_to_string(cluster.dir().join("ctl.toml")).unwrap();
    let listen = cluster.setting("controller", "listen");
    std::fs::write(&dead, text.replace(&listen, "127.0.0.1:1")).unwrap();
    let (code, said) = without(dead.to_str().unwrap());
    assert!(code == Some(Code::Unreachable as i32) && said.contains("127.0.0.1:1"), "{said}");
    // Whoever reads only the first line closes the pipe: that is no bug of ours.
    let mut events = cluster.command(["events", "-f"]);
    let mut child = events.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    cluster.create("vm1", "hostA", BUSY);
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(!said.contains("panic") && !said.contains("bug"), "{said}");
}

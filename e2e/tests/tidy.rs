//! The repository's own tidiness: layers, sizes, headers, `unsafe`, words and paths.
//!
//! ```text
//!   crates    proto < vmcb-engine < node-agent, controller < e2e                         from `cargo metadata`
//!   modules   addr < vmcb < cpu < ... < transfer inside vmcb-engine                      from its `crate::` paths
//! ```
//! Everything is a table on top of this file; what is found is compared with it, whichever files there are. A check lists
//! all that is wrong before it fails. It knows text and metadata, and needs no built program.
#![allow(clippy::unwrap_used, reason = "a test that cannot read the tree has failed")]

mod source;

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};
use source::SourceFile;

/// Crates of the workspace, and which of them each may use.
const CRATES: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("vmcb-engine", &["proto"]),
    ("node-agent", &["proto", "vmcb-engine"]),
    ("controller", &["proto", "vmcb-engine"]),
    ("e2e", &["proto", "vmcb-engine", "node-agent", "controller"]),
];

/// Crates that may be in nobody's tree below `vmcb-engine`: async, sockets, buckets, randomness.
const NOT_IN_ENGINE: &[&str] = &[
    "tokio",
    "tonic",
    "hyper",
    "h2",
    "mio",
    "async-std",
    "smol",
    "futures",
    "futures-util",
    "async-trait",
    "rustls",
    "reqwest",
    "socket2",
    "axum",
    "tower",
    "rand",
    "getrandom",
    "fastrand",
    "aws-sdk-s3",
    "chrono",
    "jiff",
    "time",
];

/// What a crate must not name among its own dependencies.
const NOT_DIRECTLY: &[(&str, &[&str])] = &[
    ("proto", &["tokio", "rustls", "vm-memory", "redb"]),
    ("vmcb-engine", &["tonic", "tokio", "rustls", "serde", "toml", "clap"]),
    ("node-agent", &["redb", "etcd-client", "aws-sdk-s3", "iced-x86", "kvm-ioctls"]),
    ("controller", &["vm-memory", "kvm-ioctls", "kvm-bindings", "iced-x86", "virtio-queue", "userfaultfd"]),
];

/// Modules of vmcb-engine in order: each may use those before it.
const ENGINE_ORDER: &[&str] = &[
    "addr",
    "vmcb",
    "cpu",
    "capability",
    "memory",
    "device",
    "engine",
    "boot",
    "snapshot",
    "machine",
    "journal",
    "replay",
    "transfer",
];

/// Where the controller's crate may use the engine: ctl decodes VMCBs, the daemon knows no engine.
const CONTROLLER_ENGINE_ROOMS: &[&str] = &["controller/src/ctl/", "controller/src/bin/ctl.rs"];

/// What the engine's code must not contain: the clock, the environment, sockets, async, unordered maps.
const NOT_IN_ENGINE_CODE: &[&str] = &[
    "SystemTime",
    "Instant::now",
    "std::env",
    "env::var",
    "TcpStream",
    "TcpListener",
    "UnixStream",
    "UnixListener",
    "UdpSocket",
    "async fn",
    ".await",
    "HashMap",
    "HashSet",
    "thread_rng",
    "RandomState",
];

/// Rooms where `unsafe` may be opened, by name, in a file that says why.
const UNSAFE_ROOMS: &[&str] = &[
    // Guest memory: mappings that a guest, devices and another process write at the same time.
    "vmcb-engine/src/memory/",
    // ioctls and shared run pages of KVM.
    "vmcb-engine/src/engine/kvm/",
    // Hot files of the software processor: TLB, dispatch, x87 and SSE by the host's own.
    "vmcb-engine/src/engine/soft/",
    // What the operating system offers by ioctl and descriptor passing only.
    "node-agent/src/runner/",
    "node-agent/src/vm/",
    // One setting of the C library's allocator.
    "proto/src/heap.rs",
    // Faults and measurements from outside.
    "e2e/src/",
];

const FILE_LINES_MAX: usize = 800;
/// Files that are tables: (path, why).
const LARGE_FILES: &[(&str, &str)] = &[];

const FUNCTION_LINES_MAX: usize = 100;
/// Functions that are tables: (path, function, why).
const LONG_FUNCTIONS: &[(&str, &str, &str)] = &[];

const HEADER_LINES_MAX: usize = 40;

/// Names that say nothing about what is inside.
const EMPTY_WORDS: &[&str] = &["util", "utils", "common", "helper", "helpers", "manager", "misc", "handler2"];

/// Paths that exist on somebody's machine only.
const MACHINE_PATHS: &[&str] = &["/work/", "/home/", "/root/", "/Users/"];

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(source::root().join("Cargo.toml"))
        .other_options(["--locked".to_owned(), "--offline".to_owned()])
        .exec()
        .unwrap()
}

/// Fails with everything that was found.
fn expect_none(rule: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{rule}:\n  {}\n", found.join("\n  "));
}

#[test]
fn crates_keep_their_order() {
    let metadata = metadata();
    let allowed: BTreeMap<&str, &[&str]> = CRATES.iter().copied().collect();
    let mut found = Vec::new();
    for package in metadata.workspace_packages() {
        let Some(allowed) = allowed.get(package.name.as_str()) else {
            found.push(format!("{} is not in the order of crates", package.name));
            continue;
        };
        let workspace = |name: &str| CRATES.iter().any(|(known, _)| *known == name);
        for dependency in package.dependencies.iter().filter(|d| workspace(&d.name)) {
            if !allowed.contains(&dependency.name.as_str()) {
                found.push(format!("{} uses {}", package.name, dependency.name));
            }
        }
        let forbidden =
            NOT_DIRECTLY.iter().find(|(name, _)| *name == package.name.as_str()).map_or(&[][..], |(_, f)| f);
        for dependency in package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal && !d.optional) {
            if forbidden.contains(&dependency.name.as_str()) {
                found.push(format!("{} depends on {}", package.name, dependency.name));
            }
        }
    }
    expect_none("a crate uses only what is below it", found);
}

#[test]
fn the_engine_has_no_runtime_below_it() {
    let metadata = metadata();
    let engine = metadata.workspace_packages().into_iter().find(|p| p.name.as_str() == "vmcb-engine").unwrap();
    let rpc = engine.dependencies.iter().any(|d| d.name == "proto" && d.features.iter().any(|f| f == "rpc"));
    assert!(!rpc, "vmcb-engine takes proto's messages, not its services: feature rpc is on");

    let resolve = metadata.resolve.as_ref().unwrap();
    let mut reached: BTreeMap<&PackageId, String> = BTreeMap::from([(&engine.id, "vmcb-engine".to_owned())]);
    let mut next = vec![&engine.id];
    while let Some(id) = next.pop() {
        let package = &metadata[id];
        let node = resolve.nodes.iter().find(|node| node.id == *id).unwrap();
        for dependency in &node.deps {
            let normal = dependency.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal);
            let name = metadata[&dependency.pkg].name.as_str();
            // Features are united over the workspace; what proto has for others only is optional there.
            let ours = package.name.as_str() != "proto"
                || package.dependencies.iter().any(|declared| declared.name == name && !declared.optional);
            if normal && ours && !reached.contains_key(&dependency.pkg) {
                reached.insert(&dependency.pkg, format!("{} -> {name}", reached[id]));
                next.push(&dependency.pkg);
            }
        }
    }
    let way = |(id, way): (&PackageId, &String)| {
        let name = metadata[id].name.as_str();
        // Hash seeds of allocation-free maps and the like come with a crate of their own name.
        NOT_IN_ENGINE.contains(&name).then(|| way.clone())
    };
    expect_none(
        "vmcb-engine knows no runtime, socket, clock or randomness",
        reached.iter().map(|(a, b)| (*a, b)).filter_map(way).collect(),
    );
}

#[test]
fn modules_of_the_engine_keep_their_order() {
    let position = |name: &str| ENGINE_ORDER.iter().position(|known| *known == name);
    let mut found = Vec::new();
    for file in source::rust_files().iter().filter(|file| file.path.starts_with("vmcb-engine/src/")) {
        let own = file.path["vmcb-engine/src/".len()..].split('/').next().unwrap_or_default().trim_end_matches(".rs");
        if own == "lib" {
            continue;
        }
        let Some(own_position) = position(own) else {
            found.push(format!("{}: {own} is not in the order of modules", file.path));
            continue;
        };
        for (line, used) in file.crate_paths() {
            if position(&used).is_some_and(|used_position| used_position > own_position) {
                found.push(format!("{}:{line}: {own} uses {used}, which comes after it", file.path));
            }
        }
    }
    expect_none("a module of vmcb-engine uses only those before it", found);
}

#[test]
fn only_ctl_knows_the_engine_in_the_controller() {
    let mut found = Vec::new();
    for file in source::rust_files().iter().filter(|file| file.path.starts_with("controller/src/")) {
        if !CONTROLLER_ENGINE_ROOMS.iter().any(|room| file.path.starts_with(room)) {
            found.extend(file.lines_with("vmcb_engine").map(|line| format!("{}:{line}", file.path)));
        }
    }
    expect_none("the controller daemon knows no engine", found);
}

#[test]
fn the_engine_is_deterministic() {
    let mut found = Vec::new();
    for file in source::rust_files().iter().filter(|file| file.path.starts_with("vmcb-engine/src/")) {
        for word in NOT_IN_ENGINE_CODE {
            found.extend(file.lines_with(word).map(|line| format!("{}:{line}: {word}", file.path)));
        }
    }
    expect_none("vmcb-engine has no clock, environment, socket, async or unordered map", found);
}

#[test]
fn files_are_of_a_readable_size() {
    let files = source::rust_files();
    let mut found: Vec<String> = files
        .iter()
        .filter(|file| file.lines() > FILE_LINES_MAX && !LARGE_FILES.iter().any(|(path, _)| *path == file.path))
        .map(|file| format!("{}: {} lines", file.path, file.lines()))
        .collect();
    for (path, why) in LARGE_FILES {
        assert!(!why.is_empty(), "{path} needs a reason");
        if !files.iter().any(|file| file.path == *path && file.lines() > FILE_LINES_MAX) {
            found.push(format!("{path} need not be on the list of large files"));
        }
    }
    expect_none(&format!("at most {FILE_LINES_MAX} lines a file"), found);
}

#[test]
fn functions_are_of_a_readable_size() {
    let files = source::rust_files();
    let allowed = |path: &str, name: &str| LONG_FUNCTIONS.iter().any(|(p, n, _)| *p == path && *n == name);
    let mut found = Vec::new();
    let mut long = BTreeSet::new();
    for file in &files {
        for function in file.functions().into_iter().filter(|function| function.lines > FUNCTION_LINES_MAX) {
            long.insert((file.path.clone(), function.name.clone()));
            if !allowed(&file.path, &function.name) {
                found.push(format!("{}:{}: {} has {} lines", file.path, function.line, function.name, function.lines));
            }
        }
    }
    for (path, name, why) in LONG_FUNCTIONS {
        assert!(!why.is_empty(), "{path} {name} needs a reason");
        if !long.contains(&((*path).to_owned(), (*name).to_owned())) {
            found.push(format!("{path}: {name} need not be on the list of long functions"));
        }
    }
    expect_none(&format!("at most {FUNCTION_LINES_MAX} lines a function"), found);
}

#[test]
fn every_file_says_what_it_is() {
    let wrong = |file: &SourceFile| {
        let header = file.text.lines().take_while(|line| line.starts_with("//!")).count();
        let words: usize = file.text.lines().take(header).map(|line| line.split_whitespace().count() - 1).sum();
        match header {
            0 => Some(format!("{}: no header", file.path)),
            _ if words < 2 => Some(format!("{}: a header of one word", file.path)),
            lines if lines > HEADER_LINES_MAX => Some(format!("{}: a header of {lines} lines", file.path)),
            _ => None,
        }
    };
    expect_none("every file begins with //! and what it is", source::rust_files().iter().filter_map(wrong).collect());
}

#[test]
fn unsafe_is_opened_by_name_and_argued() {
    let mut found = Vec::new();
    for file in source::rust_files() {
        let uses = file.unsafe_lines();
        let opened = file.text.contains("allow(unsafe_code");
        if uses.is_empty() && !opened {
            continue;
        }
        if !UNSAFE_ROOMS.iter().any(|room| file.path.starts_with(room)) && !file.path.contains("/tests/") {
            found.push(format!("{}: unsafe in a room that is not on the list", file.path));
        }
        if !uses.is_empty() && !opened && !file.parent_opens_unsafe() {
            found.push(format!("{}: unsafe is used but not opened with a reason", file.path));
        }
        found.extend(file.unargued_unsafe().map(|line| format!("{}:{line}: no SAFETY note", file.path)));
    }
    expect_none("unsafe only in listed rooms, each with a SAFETY note", found);
}

#[test]
fn names_say_something() {
    let mut found = Vec::new();
    for path in source::all_files() {
        let empty = |part: &str| EMPTY_WORDS.contains(&part.split('.').next().unwrap_or_default());
        if path.split('/').any(empty) {
            found.push(path);
        }
    }
    for file in source::rust_files() {
        for word in EMPTY_WORDS {
            found.extend(
                file.lines_with(&format!("mod {word}"))
                    .filter(|line| file.declares_module(*line, word))
                    .map(|line| format!("{}:{line}: mod {word}", file.path)),
            );
        }
    }
    expect_none("no file or module is called util, common, helpers or manager", found);
}

#[test]
fn no_path_of_a_machine_is_in_the_tree() {
    let mut found = Vec::new();
    for path in source::all_files().into_iter().filter(|path| !path.starts_with("e2e/tests/tidy")) {
        // What is no text has no paths that anybody reads.
        let Ok(text) = std::fs::read_to_string(source::root().join(&path)) else { continue };
        for (index, line) in text.lines().enumerate() {
            // A URL's path is no machine's: the needle must stand at the beginning of a word.
            let begins_word = |at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "./-_}*)".contains(c));
            for needle in MACHINE_PATHS {
                if line.match_indices(needle).any(|(at, _)| begins_word(at)) {
                    found.push(format!("{path}:{}: {needle}", index + 1));
                }
            }
        }
    }
    expect_none("no path of somebody's machine", found);
}

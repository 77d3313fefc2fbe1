//! What operators install: units, certificates, dashboards and alerts say what is so, and the steps of `deploy/README.md` work.
//!
//! Names of metrics are those of the tables at the heads of the two `metrics.rs`. Tools that are not there (shellcheck,
//! systemd-analyze, promtool, openssl) are said to be missing.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use e2e::cluster::{Answer, binaries, wait};
use e2e::guest::{Program, REGION};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn text(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn has(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap().status.success();
    if !found {
        eprintln!("SKIPPED: {program} is not installed here");
    }
    found
}

fn run(command: &mut Command) -> Answer {
    let shown = format!("{command:?}");
    command.output().unwrap_or_else(|e| panic!("{shown}: {e}")).into()
}

fn succeeds(command: &mut Command) -> String {
    let shown = format!("{command:?}");
    let answer = run(command);
    assert_eq!(answer.code, Some(0), "{shown}\n{}\n{}", answer.stdout, answer.stderr);
    answer.stdout
}

/// Metric names that the daemons' documents promise, those of histograms with their endings.
fn promised() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for file in ["controller/src/metrics.rs", "node-agent/src/metrics.rs"] {
        for row in text(file).lines().filter_map(|line| line.strip_prefix("//! | `")) {
            let mut cells = row.split('|').map(|cell| cell.trim().trim_matches('`').to_owned());
            let (name, kind) = (cells.next().unwrap(), cells.next().unwrap());
            if kind == "histogram" {
                names.extend(["_bucket", "_sum", "_count"].map(|end| format!("{name}{end}")));
            } else {
                names.insert(name);
            }
        }
    }
    assert!(names.len() > 30, "{names:?}");
    names
}

/// Names of our metrics in expressions.
fn used(expressions: impl IntoIterator<Item = String>) -> BTreeSet<String> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let words = |text: String| text.split(word).map(str::to_owned).collect::<Vec<_>>();
    expressions.into_iter().flat_map(words).filter(|word| word.starts_with("godwit_")).collect()
}

/// Values of this key, anywhere in a document.
fn values(document: &serde_json::Value, key: &str) -> Vec<String> {
    match document {
        serde_json::Value::Object(fields) => {
            let own = fields.get(key).and_then(|value| value.as_str()).map(str::to_owned);
            own.into_iter().chain(fields.values().flat_map(|value| values(value, key))).collect()
        }
        serde_json::Value::Array(items) => items.iter().flat_map(|item| values(item, key)).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn dashboards_and_alerts_know_only_numbers_that_are_served() {
    let promised = promised();
    let rules: serde_json::Value = serde_yaml_ng::from_str(&text("deploy/alerts/godwit.yaml")).unwrap();
    let board: serde_json::Value = serde_json::from_str(&text("deploy/dashboards/godwit.json")).unwrap();
    for document in [&rules, &board] {
        let used = used(values(document, "expr"));
        let unknown: Vec<_> = used.difference(&promised).collect();
        assert!(used.len() > 8 && unknown.is_empty(), "not documented: {unknown:?}");
    }
    // Each rule says what to do.
    let rules_of = &rules["groups"][0]["rules"];
    for rule in rules_of.as_array().unwrap() {
        for part in ["summary", "action"] {
            assert!(rule["annotations"][part].as_str().is_some_and(|text| text.len() > 10), "{}", rule["alert"]);
        }
        assert!(["warning", "critical"].contains(&rule["labels"]["severity"].as_str().unwrap()));
    }
    if has("promtool") {
        succeeds(Command::new("promtool").args(["check", "rules"]).arg(root().join("deploy/alerts/godwit.yaml")));
    }
}

fn scripts() -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                walk(&path, found);
            } else if std::fs::read(&path).unwrap().starts_with(b"#!/usr/bin/env bash") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join("deploy"), &mut found);
    assert!(found.len() >= 4, "{found:?}");
    found
}

#[test]
fn scripts_are_sound() {
    for script in scripts() {
        succeeds(Command::new("bash").arg("-n").arg(&script));
    }
    if has("shellcheck") {
        succeeds(Command::new("shellcheck").arg("-x").args(scripts()).current_dir(root().join("deploy")));
    }
}

const UNITS: [&str; 2] = ["godwit-controller.service", "godwit-node-agent.service"];

#[test]
fn units_parse_and_are_hardened() {
    if !has("systemd-analyze") {
        return;
    }
    let scratch = Scratch::new("units");
    for unit in UNITS {
        // The programs are not installed here: these are.
        let here = text(&format!("deploy/systemd/{unit}"))
            .replace("/usr/bin/godwit-controller", "/bin/true")
            .replace("/usr/bin/godwit-node-agent", "/bin/true")
            .replace("User=godwit\nGroup=godwit", "User=root");
        let path = scratch.0.join(unit);
        std::fs::write(&path, here).unwrap();
        let answer = run(Command::new("systemd-analyze").arg("verify").arg(&path));
        let complaints: Vec<&str> = answer.stderr.lines().filter(|line| line.contains(unit)).collect();
        assert!(complaints.is_empty(), "{complaints:#?}");
        // 0 is best, 10 is none at all; where this version cannot tell without a running systemd, it says so.
        let limit = if unit.contains("controller") { 20 } else { 60 };
        let rated = run(Command::new("systemd-analyze")
            .arg("security")
            .arg("--offline=yes")
            .arg(format!("--threshold={limit}"))
            .arg(&path));
        assert!(rated.code == Some(0) || rated.stderr.contains("unrecognized"), "{}\n{}", rated.stdout, rated.stderr);
    }
    let agent = text("deploy/systemd/godwit-node-agent.service");
    assert!(agent.contains("\nKillMode=process\n"), "guests would end with their agent");
}

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("godwit-deploy-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !std::thread::panicking() || std::env::var_os("GODWIT_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One machine of the installation: files where the steps put them, below a directory of its own.
struct Site {
    dir: PathBuf,
    daemons: Vec<Child>,
}

impl Site {
    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }

    /// Installs what the page says, with every place moved below `dir`.
    fn write(&self, from: &str, to: &str, changes: &[(&str, &str)]) {
        let mut text = text(from);
        for (old, new) in [("/etc/godwit", "etc"), ("/var/lib/godwit", "var")] {
            text = text.replace(old, &self.path(new));
        }
        for (old, new) in changes {
            assert!(text.contains(old), "{from} has no {old}");
            text = text.replace(old, new);
        }
        let path = self.dir.join(to);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// Starts a unit's `ExecStart` by hand, with its files below `dir`.
    fn start(&mut self, unit: &str, front: &[&str]) {
        let text = text(&format!("deploy/systemd/{unit}"));
        let line = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        let line = line.replace("/etc/godwit", &self.path("etc"));
        let line = line.replace("/usr/bin/godwit-", &format!("{}/", binaries().display()));
        let words = front.iter().map(|word| (*word).to_owned()).chain(line.split(' ').map(str::to_owned));
        let words: Vec<String> = words.collect();
        let log = std::fs::File::create(self.dir.join("log")).unwrap();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.daemons.push(command.spawn().unwrap());
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let vms = std::fs::read_dir(self.dir.join("var/agent/vms")).into_iter().flatten().flatten();
        for runner in vms.filter_map(|vm| std::fs::read_to_string(vm.path().join("runner.pid")).ok()) {
            if let Some(pid) = runner.split_whitespace().next().and_then(|pid| pid.parse().ok()) {
                e2e::cluster::signal(pid, rustix::process::Signal::KILL);
            }
        }
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}: {}", self.dir.display(), std::fs::read_to_string(self.dir.join("log")).unwrap_or_default());
        }
    }
}

/// The capabilities that the agent's unit leaves, in the words of setpriv(1).
fn capabilities() -> String {
    let unit = text("deploy/systemd/godwit-node-agent.service");
    let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let kept = line.split(' ').map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase()));
    std::iter::once("-all".to_owned()).chain(kept).collect::<Vec<_>>().join(",")
}

/// Steps 1 to 5 of the page. Daemons end before their files go.
struct Installed {
    agents: Vec<Site>,
    _controller: Site,
    config: String,
    setpriv: Vec<String>,
    scratch: Scratch,
}

fn install() -> Installed {
    let scratch = Scratch::new("steps");
    let tls = scratch.0.join("tls");
    let issue =
        |words: &[&str]| succeeds(Command::new(root().join("deploy/certs/issue")).args(words).arg("--dir").arg(&tls));
    issue(&["authority"]);
    for words in [&["controller"][..], &["host", "hostA"], &["host", "hostB"], &["operator", "alice"]] {
        issue(words);
    }
    let again = run(Command::new(root().join("deploy/certs/issue")).args(["authority", "--dir"]).arg(&tls));
    assert_eq!(again.code, Some(2), "an authority was replaced");

    let ports: Vec<u16> = (0..6).map(|_| free_port()).collect();
    let controller_at = format!("localhost:{}", ports[0]);
    let site = |name: &str, files: &[&str]| {
        let site = Site { dir: scratch.0.join(name), daemons: Vec::new() };
        std::fs::create_dir_all(site.dir.join("etc/tls")).unwrap();
        std::fs::create_dir_all(site.dir.join("var/controller")).unwrap();
        for file in ["ca.pem"].iter().chain(files) {
            std::fs::copy(tls.join(file), site.dir.join("etc/tls").join(file)).unwrap();
        }
        site
    };
    let mut controller = site("controller", &["controller.pem", "controller.key"]);
    controller.write(
        "deploy/systemd/controller.toml",
        "etc/controller.toml",
        &[
            ("0.0.0.0:7400", &format!("127.0.0.1:{}", ports[0])),
            ("controller.example:7400", &controller_at),
            ("127.0.0.1:9400", &format!("127.0.0.1:{}", ports[1])),
        ],
    );
    controller.start(UNITS[0], &[]);
    let mut agents = Vec::new();
    let setpriv = format!("--bounding-set={}", capabilities());
    let limited = rustix::process::geteuid().is_root() && has("setpriv");
    let front: &[&str] = if limited { &["setpriv", &setpriv, "--no-new-privs", "--"] } else { &[] };
    for (number, host) in ["hostA", "hostB"].into_iter().enumerate() {
        let mut agent = site(host, &[&format!("{host}.pem"), &format!("{host}.key")]);
        let (port, metrics) = (ports[2 + 2 * number], ports[3 + 2 * number]);
        let runner = binaries().join("vm-runner");
        agent.write(
            "deploy/systemd/node-agent.toml",
            "etc/node-agent.toml",
            &[
                ("\"hostA\"", &format!("\"{host}\"")),
                ("/hostA.", &format!("/{host}.")),
                ("0.0.0.0:7401", &format!("127.0.0.1:{port}")),
                ("hosta.example:7401", &format!("localhost:{port}")),
                ("controller.example:7400", &controller_at),
                ("127.0.0.1:9401", &format!("127.0.0.1:{metrics}")),
                ("/run/godwit-ram", "/dev/shm"),
                ("/usr/libexec/godwit/vm-runner", runner.to_str().unwrap()),
            ],
        );
        agent.start(UNITS[1], front);
        agents.push(agent);
    }
    let operator = site("operator", &["alice.pem", "alice.key"]);
    operator.write("deploy/systemd/ctl.toml", "etc/ctl.toml", &[("controller.example:7400", &controller_at)]);
    let config = operator.path("etc/ctl.toml");
    let setpriv = front.iter().map(|word| (*word).to_owned()).collect();
    Installed { agents, _controller: controller, config, setpriv, scratch }
}

#[test]
fn the_steps_of_the_page_make_a_cluster() {
    if !has("openssl") {
        return;
    }
    let mut installed = install();
    let config = installed.config.clone();
    let ctl = |words: &[&str]| {
        let mut command = Command::new(binaries().join("ctl"));
        command.args(words).env("GODWIT_CONFIG", &config);
        command
    };
    wait("both hosts to be up", || {
        let hosts = run(&mut ctl(&["host", "ls", "-o", "json"])).stdout;
        let hosts: serde_json::Value = serde_json::from_str(&hosts).ok()?;
        let up = hosts.as_array()?.iter().filter(|host| host["state"] == "up").count();
        (up == 2).then_some(())
    });
    let program =
        Program { start: REGION, region_bytes: 4 << 20, pages_per_s: 100, tick_ms: 20, tsc_hz: 1_000_000_000 };
    let kernel = installed.scratch.0.join("guest.elf");
    std::fs::write(&kernel, program.elf().unwrap()).unwrap();
    succeeds(&mut ctl(&[
        "vm",
        "create",
        "vm1",
        "--host",
        "hostA",
        "--memory",
        "64M",
        "--kernel",
        kernel.to_str().unwrap(),
    ]));
    succeeds(&mut ctl(&["migrate", "vm1", "--to", "hostB"]));
    succeeds(&mut ctl(&["checkpoint", "create", "vm1"]));
    // An upgrade of the agent: its process ends, the guest does not notice.
    let scratch = installed.scratch.0.clone();
    let runner = || std::fs::read_to_string(scratch.join("hostB/var/agent/vms/vm1/runner.pid")).unwrap();
    let before = runner();
    let mut agent = installed.agents[1].daemons.pop().unwrap();
    e2e::cluster::signal(agent.id() as i32, rustix::process::Signal::TERM);
    assert!(agent.wait().unwrap().success());
    let front: Vec<&str> = installed.setpriv.iter().map(String::as_str).collect();
    installed.agents[1].start(UNITS[1], &front);
    wait("the guest to be seen again, running", || {
        let vm = run(&mut ctl(&["vm", "show", "vm1", "-o", "json"])).stdout;
        let vm: serde_json::Value = serde_json::from_str(&vm).ok()?;
        (vm["observed"] == "running").then_some(())
    });
    assert_eq!(runner(), before, "the guest was started anew");
    succeeds(&mut ctl(&["migrate", "vm1", "--to", "hostA", "--via", "controller"]));
    succeeds(&mut ctl(&["vm", "rm", "vm1"]));
}

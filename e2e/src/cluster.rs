//! A whole cluster of real binaries, driven as an operator drives it: by `ctl`, and by `kill -9`.
//!
//! Everything lies in a directory of its own, which goes away with the value; so do all processes, whatever the test did to
//! them. It refuses to know gRPC: what `ctl` cannot show, a user cannot see.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::guest::Program;
use crate::leftovers::{self, Claim, Leftover};

/// How long a cluster, a guest or a host may take for what takes a moment.
pub const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// A cluster on this machine.
pub struct Cluster {
    dir: PathBuf,
    bin: PathBuf,
    _claim: Claim,
}

/// What one run of `ctl` gave.
#[derive(Debug)]
pub struct Answer {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

/// Where the workspace's binaries lie: beside (or above) the running test or benchmark.
///
/// # Panics
/// They were not built.
pub fn binaries() -> PathBuf {
    let this = std::env::current_exe().expect("a running program has a path");
    let found = this
        .ancestors()
        .skip(1)
        .take(3)
        .find(|dir| ["ctl", "controller", "node-agent", "vm-runner"].iter().all(|name| dir.join(name).is_file()));
    found.expect("binaries are missing: run `cargo build --workspace` (same profile) first").to_owned()
}

impl Cluster {
    /// `ctl dev up` with so many hosts.
    ///
    /// # Panics
    /// It does not come up.
    pub fn up(hosts: u32) -> Self {
        Self::up_with(hosts, &[])
    }

    /// `ctl dev up` with so many hosts and more arguments.
    ///
    /// # Panics
    /// It does not come up.
    pub fn up_with(hosts: u32, more: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("godwit-e2e-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).expect("a directory for the cluster");
        let bin = binaries();
        let claim = leftovers::claim(Leftover::Cluster { ctl: bin.join("ctl"), dir: dir.clone() });
        let cluster = Self { dir, bin, _claim: claim };
        let hosts = hosts.to_string();
        cluster.ok(["dev", "up", "--dir", cluster.path(), "--hosts", &hosts].iter().chain(more));
        cluster
    }

    /// `ctl dev up` again: whatever is not running is started.
    pub fn start(&self, hosts: u32) {
        let hosts = hosts.to_string();
        self.ok(["dev", "up", "--dir", self.path(), "--hosts", &hosts]);
    }

    /// Has a host of a cluster of so many withhold features from guests, as its operator would: by its settings and a new
    /// agent.
    ///
    /// # Panics
    /// The host does not come back, or does not say so.
    pub fn withhold(&self, host: &str, features: &[&str], hosts: u32) {
        let path = self.dir.join("dev.toml");
        let before = std::fs::read_to_string(&path).expect("a dev cluster has a dev.toml");
        let name = format!("name = \"{host}\"\n");
        let after = before.replace(&name, &format!("{name}withhold = {features:?}\n"));
        assert_ne!(before, after, "dev.toml does not name {host}");
        std::fs::write(&path, after).expect("dev.toml can be written");
        self.kill(self.daemon(host));
        self.start(hosts);
        wait(&format!("{host} to withhold {features:?}"), || {
            (self.json(["host", "show", host])["withheld"] == serde_json::json!(features)).then_some(())
        });
    }

    fn path(&self) -> &str {
        self.dir.to_str().expect("temporary paths are text")
    }

    /// The cluster's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A program of the workspace ("node-agent") with its arguments.
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.bin.join(name));
        command.stdin(Stdio::null());
        command
    }

    /// Kills a daemon and starts it again with its settings changed: lines `KEY = ...` are replaced or come on top. Words in front of the
    /// program ("ip netns exec a") become it.
    ///
    /// It is the test's own process then; `dev down` finds it all the same.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn restart_with(&self, name: &str, changes: &[(&str, &str)], front: &[&str]) -> Child {
        self.kill(self.daemon(name));
        let path = self.dir.join(format!("{name}.toml"));
        let text = std::fs::read_to_string(&path).expect("the daemon's settings");
        let line = |line: &str| {
            let changed = changes.iter().find(|(key, _)| line.starts_with(&format!("{key} = ")));
            changed.map_or(line.to_owned(), |(key, value)| format!("{key} = {value}")) + "\n"
        };
        let missing =
            changes.iter().filter(|(key, _)| !text.lines().any(|line| line.starts_with(&format!("{key} = "))));
        let missing: String = missing.map(|(key, value)| format!("{key} = {value}\n")).collect();
        let text = missing + &text.lines().map(line).collect::<String>();
        std::fs::write(&path, text).expect("the daemon's settings");
        let log = std::fs::File::options().append(true).open(self.log(name)).expect("the daemon's log");
        let program = if name == "controller" { "controller" } else { "node-agent" };
        let program = self.bin.join(program);
        let mut words = front.iter().map(OsStr::new).chain([program.as_os_str()]);
        let mut command = Command::new(words.next().expect("there is a program"));
        command.args(words).arg("--config").arg(&path).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(log).spawn().expect("the daemon can be run")
    }

    /// Where a daemon writes what it does.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{name}.log"))
    }

    /// Value of `KEY = "VALUE"` in the settings of a daemon.
    ///
    /// # Panics
    /// There is none.
    pub fn setting(&self, name: &str, key: &str) -> String {
        let text = std::fs::read_to_string(self.dir.join(format!("{name}.toml"))).expect("the daemon's settings");
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")));
        value.unwrap_or_else(|| panic!("no {key} in\n{text}")).trim_matches('"').to_owned()
    }

    /// The page that a daemon shows to Prometheus.
    ///
    /// # Panics
    /// It shows none.
    pub fn metrics(&self, name: &str) -> String {
        let mut stream = std::net::TcpStream::connect(self.setting(name, "metrics")).expect("metrics are served");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer in UTF-8");
        let (head, page) = answer.split_once("\r\n\r\n").expect("head and page");
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain; version=0.0.4"), "{head}");
        page.to_owned()
    }

    /// Starts `ctl ARGS` and waits until the VM is held by the operation that it asked for.
    ///
    /// # Panics
    /// It ends before.
    pub fn begins<S: AsRef<OsStr>>(&self, vm: &str, args: impl IntoIterator<Item = S>) -> Child {
        let mut command = self.command(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("ctl can be run");
        wait(&format!("an operation on {vm} to begin"), || {
            assert!(child.try_wait().expect("ctl can be waited for").is_none(), "it ended at once\n{}", self.logs());
            (!self.json(["vm", "show", vm])["operation"].as_str()?.is_empty()).then_some(())
        });
        child
    }

    /// `ctl ARGS` as a command, for those who want to watch it run.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(self.bin.join("ctl"));
        command.args(args).env("GODWIT_CONFIG", self.dir.join("ctl.toml")).stdin(Stdio::null());
        command
    }

    /// Runs `ctl ARGS`.
    pub fn ctl<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Answer {
        self.command(args).output().expect("ctl can be run").into()
    }

    /// Runs `ctl ARGS`, which must succeed; its output.
    ///
    /// # Panics
    /// It failed; the message holds what it said and the ends of all logs.
    pub fn ok<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        let command = self.command(args);
        let shown = format!("{command:?}");
        let mut command = command;
        let answer: Answer = command.output().expect("ctl can be run").into();
        assert!(answer.code == Some(0), "{shown}\n{answer:#?}\n{}", self.logs());
        answer.stdout
    }

    /// Runs `ctl ARGS -o json`, which must succeed.
    ///
    /// # Panics
    /// It failed, or printed something else.
    pub fn json<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Value {
        let text = self.ok(args.into_iter().chain(["-o", "json"]));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e} in {text:?}"))
    }

    /// Runs `ctl ARGS`, which must fail with this exit code; what it said.
    ///
    /// # Panics
    /// It did something else.
    pub fn fails<'a>(&self, code: proto::status::Code, args: impl IntoIterator<Item = &'a str>) -> String {
        let args: Vec<&str> = args.into_iter().collect();
        let answer = self.ctl(&args);
        assert_eq!(answer.code, Some(code as i32), "ctl {args:?}\n{answer:#?}\n{}", self.logs());
        answer.stderr
    }

    /// Creates a VM that runs the in-tree guest.
    ///
    /// # Panics
    /// It cannot be created.
    pub fn create(&self, vm: &str, host: &str, program: Program) {
        let memory = program.memory_bytes().to_string();
        self.create_with(vm, host, program, &["--memory", &memory]);
    }

    /// Creates a VM that runs the in-tree guest, with arguments of your own.
    ///
    /// # Panics
    /// It cannot be created.
    pub fn create_with(&self, vm: &str, host: &str, program: Program, more: &[&str]) {
        let kernel = self.dir.join(format!("{vm}.elf"));
        std::fs::write(&kernel, program.elf().expect("the guest assembles")).expect("the guest's file");
        let kernel = kernel.to_str().expect("temporary paths are text");
        let args = ["vm", "create", vm, "--host", host, "--kernel", kernel];
        self.ok(args.into_iter().chain(more.iter().copied()));
    }

    /// All that the guest has printed.
    pub fn console(&self, vm: &str) -> String {
        self.ok(["vm", "console", vm, "--log"])
    }

    /// Where the ledger says that the VM is.
    pub fn host_of(&self, vm: &str) -> String {
        self.json(["vm", "show", vm])["host"].as_str().unwrap_or_default().to_owned()
    }

    /// What the host says of the VM: "running", "paused", ...
    pub fn observed(&self, vm: &str) -> String {
        self.json(["vm", "show", vm])["observed"].as_str().unwrap_or_default().to_owned()
    }

    /// The last line `tick N writes W bad B` of the in-tree guest.
    pub fn ticks(&self, vm: &str) -> Option<Ticks> {
        let answer = self.ctl(["vm", "console", vm, "--log"]);
        (answer.code == Some(0)).then(|| Ticks::last(&answer.stdout)).flatten()
    }

    /// Waits until the guest has gone on by so many ticks from now, and has found nothing wrong.
    ///
    /// # Panics
    /// It does not go on, or it found wrong memory.
    pub fn goes_on(&self, vm: &str, ticks: u64) -> Ticks {
        let before = self.ticks(vm).map_or(0, |t| t.tick);
        let now = wait(&format!("{vm} to go on from tick {before}"), || {
            self.ticks(vm).filter(|now| now.tick >= before + ticks)
        });
        assert_eq!(now.bad, 0, "{vm} found wrong memory:\n{}", self.console(vm));
        now
    }

    /// Process id of a daemon ("controller", "hostA").
    pub fn daemon(&self, name: &str) -> i32 {
        pid_of(&self.dir.join("run").join(format!("{name}.pid")))
            .unwrap_or_else(|| panic!("no pid file of {name}\n{}", self.logs()))
    }

    /// Process id of the runner of a VM on a host.
    pub fn runner(&self, host: &str, vm: &str) -> Option<i32> {
        pid_of(&self.dir.join(host).join("vms").join(vm).join("runner.pid"))
    }

    /// `kill -9`.
    pub fn kill(&self, pid: i32) {
        signal(pid, Signal::KILL);
        wait(&format!("process {pid} to be gone"), || (!alive(pid)).then_some(()));
    }

    /// How many runners of the VM are alive on the hosts, with which state each is in.
    pub fn running_on(&self, vm: &str) -> Vec<String> {
        let hosts = self.json(["host", "ls"]);
        let hosts = hosts.as_array().cloned().unwrap_or_default();
        let runs = |host: &Value| {
            let vms = host["vms"].as_array().cloned().unwrap_or_default();
            vms.iter().any(|v| v["name"] == vm && v["state"] == "running")
        };
        hosts.iter().filter(|host| runs(host)).filter_map(|host| host["name"].as_str().map(str::to_owned)).collect()
    }

    /// The ends of all logs, for failures.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let logs = std::fs::read_dir(self.dir.join("logs")).into_iter().flatten().flatten().map(|e| e.path());
        let runners = ["hostA", "hostB", "hostC"].into_iter().flat_map(|host| {
            let vms = std::fs::read_dir(self.dir.join(host).join("vms")).into_iter().flatten().flatten();
            vms.map(|vm| vm.path().join("runner.log")).collect::<Vec<_>>()
        });
        for path in logs.chain(runners) {
            let log = std::fs::read_to_string(&path).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            text += &format!("--- {}\n{}\n", path.display(), lines[lines.len().saturating_sub(25)..].join("\n"));
        }
        text
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.ctl(["dev", "down", "--dir", self.path()]);
        if !std::thread::panicking() || std::env::var_os("GODWIT_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// What the in-tree guest says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticks {
    /// Lines so far.
    pub tick: u64,
    /// Pages rewritten.
    pub writes: u64,
    /// Pages that were not what they had to be.
    pub bad: u64,
}

impl Ticks {
    /// The last whole line of a console.
    pub fn last(console: &str) -> Option<Ticks> {
        let lines = console.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.rev().find_map(Self::parse)
    }

    /// Every whole line of a console.
    pub fn all(console: &str) -> Vec<Ticks> {
        console.split_inclusive('\n').filter(|line| line.ends_with('\n')).filter_map(Self::parse).collect()
    }

    fn parse(line: &str) -> Option<Ticks> {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["tick", tick, "writes", writes, "bad", bad] => {
                Some(Ticks { tick: tick.parse().ok()?, writes: writes.parse().ok()?, bad: bad.parse().ok()? })
            }
            _ => None,
        }
    }
}

/// Waits for a condition.
///
/// # Panics
/// It does not come in [`PATIENCE`].
pub fn wait<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_for(PATIENCE, what, condition)
}

/// Waits for a condition that may take so long.
///
/// # Panics
/// It does not come.
pub fn wait_for<T>(patience: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    // Who is given more time is slow, and each look costs it some.
    let poll = if patience > PATIENCE { POLL * 16 } else { POLL };
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {patience:?} for {what}");
        std::thread::sleep(poll);
    }
}

fn pid_of(path: &Path) -> Option<i32> {
    std::fs::read_to_string(path).ok()?.split_whitespace().next()?.parse().ok()
}

/// Sends a signal; a process that is gone has what it needs.
pub fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // It may be gone already, which is what is wanted.
        let _ = kill_process(pid, signal);
    }
}

/// Is there such a process, and is it no zombie?
pub fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !matches!(rest.trim_start().chars().next(), Some('Z' | 'X') | None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_whole_line_counts() {
        let console = "guest: filled\ntick 1 writes 5 bad 0\ntick 2 writes 9 bad 1\ntick 3 wri";
        assert_eq!(Ticks::last(console), Some(Ticks { tick: 2, writes: 9, bad: 1 }));
        assert_eq!(Ticks::last("nothing"), None);
    }
}

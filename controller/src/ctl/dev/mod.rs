//! `ctl dev up|down`: a whole cluster on this machine, with certificates, for trying and testing.
//!
//! ```text
//!   D/dev.toml          what the cluster is (layout)         D/logs/*.log   what the daemons said
//!   D/ctl.toml          how ctl reaches it                   D/run/*.pid    who they are: pid and start time (process)
//!   D/controller.toml   D/hostA.toml ...                     D/tls/         authority and certificates (certificates)
//!   D/hostA/ ...        state of the hosts                   D/bucket/      checkpoints
//! ```
//! `up` starts what is not running and waits until every host is up; so it is also the cure after a daemon was killed.
//! `down` ends agents, then guests, then the controller, each only if it is still the process that was started.
//! Knows daemons as programs with a configuration file, not what is in them.

pub(super) mod certificates;
mod layout;
mod process;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::status::Code;
use proto::v1;
use serde::Serialize;

use super::client;
use super::failure::Failure;
use super::grammar::{DevCommand, DevDownArgs, DevUpArgs};
use super::output::{self, Format, Report, Text};
use super::settings::Settings;
use layout::{Cluster, Directory};
use process::ProcessId;

/// How long all of it may take to answer.
const READY_MAX: Duration = Duration::from_secs(60);
const READY_PAUSE: Duration = Duration::from_millis(50);
/// How long a daemon or guest may take to end by itself.
const END_MAX: Duration = Duration::from_secs(10);
/// Programs of a cluster, found beside `ctl`.
const PROGRAMS: [&str; 3] = ["controller", "node-agent", "vm-runner"];

/// Carries out a command.
///
/// # Errors
/// The directory cannot be used, a program is missing, or a daemon does not come up.
pub async fn run(command: DevCommand, format: Format) -> Result<(), Failure> {
    match command {
        DevCommand::Up(args) => up(args, format).await,
        DevCommand::Down(args) => down(&args, format),
        DevCommand::Launch(args) => launch(&args.command),
    }
}

/// Begins a session of its own (no terminal can end it) and becomes `command`.
///
/// # Errors
/// The program cannot be run; otherwise this does not return.
pub fn launch(command: &[OsString]) -> Result<(), Failure> {
    let [program, arguments @ ..] = command else { return Err(Failure::bad_input("no program is named")) };
    rustix::process::setsid().map_err(|e| Failure::new(Code::Internal, format!("cannot begin a session: {e}")))?;
    let error = std::process::Command::new(program).args(arguments).exec();
    Err(Failure::file("run", Path::new(program), &error))
}

/// A cluster that answers.
#[derive(Debug, Serialize)]
struct Up {
    dir: PathBuf,
    config: PathBuf,
    controller: String,
    hosts: Vec<UpHost>,
    /// Daemons that this call started.
    started: Vec<String>,
}

#[derive(Debug, Serialize)]
struct UpHost {
    name: String,
    address: String,
}

impl Report for Up {
    fn text(&self) -> Text {
        let first = if self.started.is_empty() {
            format!("already up in {}", self.dir.display())
        } else {
            format!("up in {}: started {}", self.dir.display(), self.started.join(", "))
        };
        let mut fields = vec![("controller".to_owned(), self.controller.clone())];
        fields.extend(self.hosts.iter().map(|host| (host.name.clone(), host.address.clone())));
        let how = format!(
            "export GODWIT_CONFIG={}\nctl host ls\nctl dev down --dir {}",
            self.config.display(),
            self.dir.display()
        );
        Text::Parts(vec![Text::Lines(first), Text::Fields(fields), Text::Lines(how)])
    }
}

async fn up(args: DevUpArgs, format: Format) -> Result<(), Failure> {
    let programs = programs()?;
    let directory = Directory::create(&args.dir)?;
    let _lock = directory.lock()?;
    let running: Vec<String> = directory.recorded().into_iter().filter(|(_, id)| id.alive()).map(|(n, _)| n).collect();
    let before = directory.load()?;
    if !running.is_empty() {
        refuse_changes(&args, before.as_ref())?;
    }
    let cluster = Cluster::settle(&args, before, &directory, !running.is_empty())?;
    certificates::ensure(&directory.tls(), &cluster.identities())?;
    directory.write(&cluster, &programs.join("vm-runner"))?;

    let mut started = BTreeMap::new();
    for (name, program, config) in directory.daemons(&cluster) {
        if !running.contains(&name) {
            let id = process::start(&directory, &name, &programs.join(program), &config)?;
            started.insert(name, id);
        }
    }
    if let Err(failure) = wait_until_ready(&directory, &cluster, &started).await {
        // A cluster that is half up helps nobody; the logs stay.
        for id in started.values() {
            id.end(END_MAX);
        }
        return Err(failure);
    }
    let host = |host: &layout::HostEntry| UpHost { name: host.name.clone(), address: host.listen.to_string() };
    let report = Up {
        config: directory.ctl_toml(),
        controller: cluster.controller.listen.to_string(),
        hosts: cluster.hosts.iter().map(host).collect(),
        started: started.into_keys().collect(),
        dir: directory.root,
    };
    output::print(format, &report)
}

/// Engine, bucket and store of a running cluster cannot be changed under it.
fn refuse_changes(args: &DevUpArgs, before: Option<&Cluster>) -> Result<(), Failure> {
    let Some(before) = before else { return Ok(()) };
    let asked = [
        ("engine", args.engine.map(|engine| engine.word().to_owned()), &before.engine),
        ("bucket", args.bucket.clone(), &before.bucket),
        ("store", args.store.clone(), &before.store),
    ];
    for (what, wanted, is) in asked {
        if wanted.as_ref().is_some_and(|wanted| wanted != is) {
            return Err(
                Failure::new(Code::Conflict, format!("the cluster runs with {what} {is}")).hint("`ctl dev down` first")
            );
        }
    }
    Ok(())
}

/// Where the programs are.
fn programs() -> Result<PathBuf, Failure> {
    let exe = std::env::current_exe()
        .map_err(|e| Failure::new(Code::Internal, format!("cannot tell where ctl itself is: {e}")))?;
    let folder = exe.parent().unwrap_or(Path::new("/")).to_owned();
    match PROGRAMS.iter().find(|name| !folder.join(name).is_file()) {
        None => Ok(folder),
        Some(missing) => Err(Failure::new(
            Code::NotFound,
            format!("there is no program {missing} beside ctl in {}", folder.display()),
        )
        .hint("`cargo build --workspace` makes all of them")),
    }
}

async fn wait_until_ready(
    directory: &Directory,
    cluster: &Cluster,
    started: &BTreeMap<String, ProcessId>,
) -> Result<(), Failure> {
    let deadline = Instant::now() + READY_MAX;
    let settings = Settings::load(Some(&directory.ctl_toml()))?;
    loop {
        if let Some((name, _)) = started.iter().find(|(_, id)| !id.alive()) {
            return Err(Failure::new(
                Code::Internal,
                format!("{name} ended while starting; it said:\n{}", directory.log_tail(name)),
            )
            .hint(format!("all it said is in {}", directory.log(name).display())));
        }
        let missing = match hosts_missing(&settings, cluster).await {
            Ok(missing) if missing.is_empty() => return Ok(()),
            Ok(missing) => format!("not up yet: {}", missing.join(", ")),
            Err(failure) => failure.message,
        };
        if Instant::now() > deadline {
            let message = format!("the cluster was not ready within {} s: {missing}", READY_MAX.as_secs());
            return Err(Failure::new(Code::Unreachable, message)
                .hint(format!("the logs are in {}", directory.logs().display())));
        }
        tokio::time::sleep(READY_PAUSE).await;
    }
}

async fn hosts_missing(settings: &Settings, cluster: &Cluster) -> Result<Vec<String>, Failure> {
    let mut client = client::connect(settings).await?;
    let reply = client.list_hosts(v1::Empty {}).await.map_err(|e| Failure::from_status("list the hosts", &e))?;
    let is_up = |record: &v1::HostRecord| record.state == "up";
    let up: Vec<_> = reply.into_inner().hosts.into_iter().filter(is_up).filter_map(|record| record.info).collect();
    let names = cluster.hosts.iter().map(|host| host.name.clone());
    Ok(names.filter(|name| !up.iter().any(|info| info.name == *name)).collect())
}

/// What `down` ended.
#[derive(Debug, Serialize)]
struct Down {
    dir: PathBuf,
    ended: Vec<String>,
    /// Those that had to be killed.
    killed: Vec<String>,
}

impl Report for Down {
    fn text(&self) -> Text {
        let mut text = match self.ended.as_slice() {
            [] => format!("nothing was running in {}", self.dir.display()),
            ended => format!("down: ended {}", ended.join(", ")),
        };
        if !self.killed.is_empty() {
            text.push_str(&format!("\nhad to kill {}", self.killed.join(", ")));
        }
        Text::Lines(text)
    }
}

fn down(args: &DevDownArgs, format: Format) -> Result<(), Failure> {
    let directory = Directory::open(&args.dir)?;
    let _lock = directory.lock()?;
    let (controllers, agents): (Vec<_>, Vec<_>) =
        directory.recorded().into_iter().partition(|(name, _)| name == "controller");
    let mut report = Down { dir: directory.root.clone(), ended: Vec::new(), killed: Vec::new() };
    // Agents first: they would start guests again, or tell the controller of their end.
    end_all(&mut report, agents);
    end_all(&mut report, directory.runners());
    end_all(&mut report, controllers);
    end_all(&mut report, process::strays(&directory.root, &PROGRAMS));
    directory.forget_processes();
    let left = process::strays(&directory.root, &PROGRAMS);
    if let [(name, _), ..] = left.as_slice() {
        return Err(Failure::new(Code::Internal, format!("{name} does not end, not even when killed"))
            .hint("it hangs in the kernel; `ps` shows where"));
    }
    output::print(format, &report)
}

/// Asks all of them at once, then waits for each.
fn end_all(report: &mut Down, processes: Vec<(String, ProcessId)>) {
    let alive: Vec<_> = processes.into_iter().filter(|(_, id)| id.alive()).collect();
    for (_, id) in &alive {
        id.ask_to_end();
    }
    for (name, id) in alive {
        if !id.end(END_MAX) {
            report.killed.push(name.clone());
        }
        report.ended.push(name);
    }
}

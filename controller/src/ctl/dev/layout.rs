//! What a dev cluster is and where its files lie.
//!
//! `dev.toml` is the truth; the daemons' configurations are written from it at each `up`. Ports are picked once and kept, so
//! that a cluster comes back under its old addresses, unless somebody else has taken one meanwhile. Starts nothing.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use proto::status::Code;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::certificates::{self, Identity};
use super::process::ProcessId;
use crate::bucket::settings::BucketSettings;
use crate::ctl::failure::Failure;
use crate::ctl::grammar::DevUpArgs;
use crate::ctl::settings::{Settings, TlsFiles};

const HOSTS_DEFAULT: u8 = 2;
const LOG_TAIL_LINES: usize = 15;

/// What the cluster consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Engines that the hosts offer.
    pub engine: String,
    /// Where checkpoints go.
    pub bucket: String,
    /// Where the ledger is.
    pub store: String,
    /// Where the controller listens.
    pub controller: Ports,
    /// hostA, hostB, ...
    pub hosts: Vec<HostEntry>,
}

/// Where a daemon listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ports {
    /// gRPC.
    pub listen: SocketAddr,
    /// Metrics over HTTP.
    pub metrics: SocketAddr,
}

/// One host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostEntry {
    /// hostA, hostB, ...
    pub name: String,
    /// gRPC.
    pub listen: SocketAddr,
    /// Metrics over HTTP.
    pub metrics: SocketAddr,
    /// Features that the host withholds from guests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub withhold: Vec<String>,
}

impl Cluster {
    /// What the cluster is to be: what it was, with what is asked for now. Ports stay while anything runs.
    ///
    /// # Errors
    /// No free port.
    pub fn settle(
        args: &DevUpArgs,
        before: Option<Cluster>,
        directory: &Directory,
        running: bool,
    ) -> Result<Cluster, Failure> {
        let mut picker = PortPicker::default();
        let mut cluster = match before {
            Some(before) => before,
            None => Cluster {
                engine: "auto".into(),
                bucket: format!("file:{}", directory.root.join("bucket").display()),
                store: directory.root.join("ledger.redb").display().to_string(),
                controller: Ports { listen: picker.pick()?, metrics: picker.pick()? },
                hosts: Vec::new(),
            },
        };
        if !running {
            let hosts = cluster.hosts.iter_mut().flat_map(|host| [&mut host.listen, &mut host.metrics]);
            for address in [&mut cluster.controller.listen, &mut cluster.controller.metrics].into_iter().chain(hosts) {
                *address = picker.keep_or_pick(*address)?;
            }
        }
        let wanted = args.hosts.unwrap_or(HOSTS_DEFAULT.max(cluster.hosts.len() as u8));
        for index in cluster.hosts.len() as u8..wanted {
            let name = format!("host{}", char::from(b'A' + index));
            cluster.hosts.push(HostEntry {
                name,
                listen: picker.pick()?,
                metrics: picker.pick()?,
                withhold: Vec::new(),
            });
        }
        if let Some(engine) = args.engine {
            cluster.engine = engine.word().to_owned();
        }
        cluster.bucket = args.bucket.clone().unwrap_or(cluster.bucket);
        BucketSettings::from(cluster.bucket.as_str()).check().map_err(|e| Failure::bad_input(e.to_string()))?;
        cluster.store = args.store.clone().unwrap_or(cluster.store);
        Ok(cluster)
    }

    /// Who needs a certificate.
    pub fn identities(&self) -> Vec<Identity> {
        let identity = |role, name: &str, file: &str| Identity { role, name: name.into(), file: file.into() };
        let mut all = vec![identity("controller", "main", "controller"), identity("operator", "admin", "admin")];
        all.extend(self.hosts.iter().map(|host| identity("host", &host.name, &host.name)));
        all
    }
}

/// Picks free ports of the loopback address. Ports are held until all are picked, so that none is picked twice.
#[derive(Default)]
struct PortPicker(Vec<TcpListener>);

impl PortPicker {
    fn pick(&mut self) -> Result<SocketAddr, Failure> {
        self.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
            .map_err(|e| Failure::new(Code::Exhausted, format!("no free port on this machine: {e}")))
    }

    fn keep_or_pick(&mut self, address: SocketAddr) -> Result<SocketAddr, Failure> {
        if self.0.iter().any(|held| held.local_addr().is_ok_and(|held| held == address)) {
            return Ok(address);
        }
        self.bind(address).or_else(|_| self.pick())
    }

    fn bind(&mut self, address: SocketAddr) -> std::io::Result<SocketAddr> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        self.0.push(listener);
        Ok(address)
    }
}

#[derive(Serialize)]
struct ControllerToml<'a> {
    listen: SocketAddr,
    store: &'a str,
    bucket: &'a str,
    metrics: SocketAddr,
    tls: TlsFiles,
}

#[derive(Serialize)]
struct AgentToml<'a> {
    name: &'a str,
    listen: SocketAddr,
    address: String,
    controller: String,
    state_dir: PathBuf,
    runner: &'a Path,
    metrics: SocketAddr,
    engine: &'a str,
    tls: TlsFiles,
    capabilities: CapabilitiesToml<'a>,
}

#[derive(Serialize)]
struct CapabilitiesToml<'a> {
    withhold: &'a [String],
}

/// The directory of a cluster.
pub struct Directory {
    /// Absolute path.
    pub root: PathBuf,
}

impl Directory {
    /// Makes it if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(path: &Path) -> Result<Directory, Failure> {
        std::fs::create_dir_all(path).map_err(|e| Failure::file("make", path, &e))?;
        let root = std::fs::canonicalize(path).map_err(|e| Failure::file("open", path, &e))?;
        let directory = Directory { root };
        for folder in [directory.logs(), directory.run(), directory.tls()] {
            std::fs::create_dir_all(&folder).map_err(|e| Failure::file("make", &folder, &e))?;
        }
        Ok(directory)
    }

    /// One that is there.
    ///
    /// # Errors
    /// There is no cluster.
    pub fn open(path: &Path) -> Result<Directory, Failure> {
        let root = std::fs::canonicalize(path).map_err(|e| Failure::file("open", path, &e))?;
        let directory = Directory { root };
        if directory.run().is_dir() {
            return Ok(directory);
        }
        Err(Failure::new(Code::NotFound, format!("there is no cluster in {}", path.display()))
            .hint("`ctl dev up --dir D` makes one"))
    }

    /// Keeps other `ctl dev` out until it is dropped.
    ///
    /// # Errors
    /// Another one is at work.
    pub fn lock(&self) -> Result<File, Failure> {
        let path = self.run().join("lock");
        let file = File::create(&path).map_err(|e| Failure::file("write", &path, &e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(e) => Err(Failure::new(Code::Conflict, format!("cannot lock {}: {e}", path.display()))
                .hint("another `ctl dev` is at work on this directory; wait for it")),
        }
    }

    /// What the cluster was at the last `up`.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn load(&self) -> Result<Option<Cluster>, Failure> {
        let path = self.root.join("dev.toml");
        match std::fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text)
                .map(Some)
                .map_err(|e| Failure::new(Code::Corrupt, format!("{} is damaged: {}", path.display(), e.message()))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Failure::file("read", &path, &e)),
        }
    }

    /// Writes all configurations.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, cluster: &Cluster, runner: &Path) -> Result<(), Failure> {
        self.write_toml("dev.toml", cluster)?;
        self.write_toml(
            "ctl.toml",
            &Settings { controller: cluster.controller.listen.to_string(), tls: self.tls_files("admin") },
        )?;
        self.write_toml(
            "controller.toml",
            &ControllerToml {
                listen: cluster.controller.listen,
                store: &cluster.store,
                bucket: &cluster.bucket,
                metrics: cluster.controller.metrics,
                tls: self.tls_files("controller"),
            },
        )?;
        for host in &cluster.hosts {
            self.write_toml(
                &format!("{}.toml", host.name),
                &AgentToml {
                    name: &host.name,
                    listen: host.listen,
                    address: host.listen.to_string(),
                    controller: cluster.controller.listen.to_string(),
                    state_dir: self.root.join(&host.name),
                    runner,
                    metrics: host.metrics,
                    engine: &cluster.engine,
                    tls: self.tls_files(&host.name),
                    capabilities: CapabilitiesToml { withhold: &host.withhold },
                },
            )?;
        }
        Ok(())
    }

    fn write_toml(&self, name: &str, value: &impl Serialize) -> Result<(), Failure> {
        let path = self.root.join(name);
        let text = toml::to_string(value)
            .map_err(|e| Failure::new(Code::Internal, format!("cannot write {}: {e}", path.display())))?;
        std::fs::write(&path, text).map_err(|e| Failure::file("write", &path, &e))
    }

    fn tls_files(&self, file: &str) -> TlsFiles {
        let (cert, key) = certificates::files(&self.tls(), file);
        TlsFiles { ca: self.tls().join("ca.pem"), cert, key }
    }

    /// Name, program and configuration of each daemon, in order of start.
    pub fn daemons(&self, cluster: &Cluster) -> Vec<(String, &'static str, PathBuf)> {
        let mut all = vec![("controller".to_owned(), "controller", self.root.join("controller.toml"))];
        let host = |host: &HostEntry| (host.name.clone(), "node-agent", self.root.join(format!("{}.toml", host.name)));
        all.extend(cluster.hosts.iter().map(host));
        all
    }

    /// Daemons that were started, by name; they may have ended since.
    pub fn recorded(&self) -> Vec<(String, ProcessId)> {
        let mut found = Vec::new();
        for path in entries(&self.run()) {
            let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            if let (Some(name), true) = (name, path.extension().is_some_and(|extension| extension == "pid")) {
                found.extend(ProcessId::read(&path).map(|id| (name, id)));
            }
        }
        found
    }

    /// Guests: `hostX/vms/*/runner.pid`.
    pub fn runners(&self) -> Vec<(String, ProcessId)> {
        let vms = entries(&self.root).into_iter().flat_map(|host| entries(&host.join("vms")));
        let runner = |vm: PathBuf| {
            let name = vm.file_name()?.to_string_lossy().into_owned();
            ProcessId::read(&vm.join("runner.pid")).map(|id| (format!("runner of {name}"), id))
        };
        vms.filter_map(runner).collect()
    }

    /// Removes the pid files of daemons.
    pub fn forget_processes(&self) {
        for path in entries(&self.run()) {
            if path.extension().is_some_and(|extension| extension == "pid") {
                // A stale one does no harm: the start time tells.
                let _ = std::fs::remove_file(path);
            }
        }
    }

    /// How `ctl` reaches the cluster.
    pub fn ctl_toml(&self) -> PathBuf {
        self.root.join("ctl.toml")
    }

    /// What the daemons said.
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// Certificates and keys.
    pub fn tls(&self) -> PathBuf {
        self.root.join("tls")
    }

    fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// Log of a daemon.
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs().join(format!("{name}.log"))
    }

    /// Pid file of a daemon.
    pub fn pid_file(&self, name: &str) -> PathBuf {
        self.run().join(format!("{name}.pid"))
    }

    /// The last lines of a log.
    pub fn log_tail(&self, name: &str) -> String {
        let text = std::fs::read(self.log(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }
}

/// Paths in a folder, in order of name; none if there is no folder.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> Directory {
        Directory::create(&std::env::temp_dir().join(format!("godwit-{name}-{}", std::process::id()))).unwrap()
    }

    fn args(hosts: Option<u8>) -> DevUpArgs {
        DevUpArgs { dir: PathBuf::new(), hosts, engine: None, bucket: None, store: None }
    }

    #[test]
    fn a_cluster_keeps_its_addresses_and_only_grows() {
        let directory = scratch("layout");
        let first = Cluster::settle(&args(None), None, &directory, false).unwrap();
        assert_eq!(first.hosts.iter().map(|h| h.name.as_str()).collect::<Vec<_>>(), ["hostA", "hostB"]);
        directory.write(&first, Path::new("/bin/vm-runner")).unwrap();
        let loaded = directory.load().unwrap();
        assert_eq!(loaded.as_ref(), Some(&first));
        let second = Cluster::settle(&args(Some(3)), loaded, &directory, false).unwrap();
        assert_eq!(second.hosts[..2], first.hosts[..]);
        assert_eq!((second.controller, second.hosts.len()), (first.controller, 3));
        let third = Cluster::settle(&args(Some(1)), Some(second.clone()), &directory, true).unwrap();
        assert_eq!(third, second);
        let ports: std::collections::BTreeSet<_> = second.hosts.iter().flat_map(|h| [h.listen, h.metrics]).collect();
        assert_eq!(ports.len(), 6);
        std::fs::remove_dir_all(&directory.root).unwrap();
    }

    #[test]
    fn a_bucket_that_cannot_be_is_refused_before_anything_starts() {
        let directory = scratch("bucket");
        let settle = |bucket: &str| {
            let args = DevUpArgs { bucket: Some(bucket.into()), ..args(None) };
            Cluster::settle(&args, None, &directory, false)
        };
        assert_eq!(settle("s3://b/x?endpoint=nowhere").unwrap_err().code, Code::BadInput);
        assert_eq!(settle("s3://backups/x?endpoint=http://h:1").unwrap().bucket, "s3://backups/x?endpoint=http://h:1");
        std::fs::remove_dir_all(&directory.root).unwrap();
    }

    #[test]
    fn two_at_once_are_kept_apart_and_no_cluster_is_said() {
        let directory = scratch("lock");
        let lock = directory.lock().unwrap();
        assert_eq!(directory.lock().unwrap_err().code, Code::Conflict);
        drop(lock);
        directory.lock().unwrap();
        std::fs::remove_dir_all(&directory.root).unwrap();
        std::fs::create_dir_all(&directory.root).unwrap();
        assert!(Directory::open(&directory.root).is_err_and(|failure| failure.code == Code::NotFound));
        std::fs::remove_dir_all(&directory.root).unwrap();
    }
}

//! An S3 server for tests: SeaweedFS, started in a directory of its own on free ports, killed by its own process id.
//!
//! `deploy/weed` installs the program under `target/weed`; `GODWIT_WEED` names another. Where there is none, tests that need it
//! say that they were skipped. [`proxy`] stands between a client and the server and does what networks do.

pub mod proxy;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::cluster::wait;
use crate::leftovers::{self, Claim, Leftover};

/// The bucket that is there from the beginning.
pub const BUCKET: &str = "godwit-test";
const ACCESS_KEY: &str = "godwit-test-key";
const SECRET_KEY: &str = "a-secret-that-must-not-be-seen";
/// master, volume, filer and s3, each with its gRPC port.
const PORTS: usize = 8;

/// A server.
pub struct Weed {
    dir: PathBuf,
    program: PathBuf,
    ports: [u16; PORTS],
    volumes: u32,
    volume_mib: u32,
    process: Option<(Child, Claim)>,
    _folder: Claim,
}

impl Weed {
    /// Starts a server with the bucket [`BUCKET`]; `None`, said aloud, if this machine has none.
    ///
    /// # Panics
    /// It does not come up.
    pub fn start() -> Option<Weed> {
        Weed::with_volumes(32, 64)
    }

    /// The same with room for so many volumes of so many MiB (a volume is full when it is larger).
    ///
    /// # Panics
    /// It does not come up.
    pub fn with_volumes(volumes: u32, volume_mib: u32) -> Option<Weed> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let Some(program) = program() else {
            eprintln!("SKIPPED: no SeaweedFS here; `deploy/weed` installs it under target/weed");
            return None;
        };
        let name = format!("godwit-weed-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(dir.join("data")).expect("a directory for the server");
        let write = |name: &str, text: String| std::fs::write(dir.join(name), text).expect("a file for the server");
        let keys = serde_json::json!({ "accessKey": ACCESS_KEY, "secretKey": SECRET_KEY });
        let admin =
            serde_json::json!({ "name": "test", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"] });
        write("s3.json", serde_json::json!({ "identities": [admin] }).to_string());
        // One volume at a time, so that the number of volumes is what a bucket can hold.
        write("master.toml", "[master.volume_growth]\ncopy_1 = 1\ncopy_other = 1\n".into());
        write("keys", format!("[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"));
        write("wrong", format!("[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = other\n"));
        let folder = leftovers::claim(Leftover::Folder(dir.clone()));
        let mut weed = Weed { dir, program, ports: free_ports(), volumes, volume_mib, process: None, _folder: folder };
        weed.run();
        let made = request(weed.address(4), &format!("POST /buckets/{BUCKET}/ HTTP/1.1"), &[]);
        assert!(made.starts_with("HTTP/1.1 201"), "no bucket was made: {made}\n{}", weed.log());
        weed.wait_until_it_writes();
        Some(weed)
    }

    /// The parts of the server find each other after its door is open, and the first volume takes a while.
    fn wait_until_it_writes(&self) {
        let path = format!("/buckets/{BUCKET}/ready");
        wait("the server to write", || {
            let said = request(self.address(4), &format!("PUT {path} HTTP/1.1"), b"ready");
            said.starts_with("HTTP/1.1 201").then_some(())
        });
        request(self.address(4), &format!("DELETE {path} HTTP/1.1"), &[]);
    }

    /// Starts it again where it was.
    ///
    /// # Panics
    /// It does not come up, or it was not killed.
    pub fn run(&mut self) {
        assert!(self.process.is_none(), "it runs");
        let [master, master_rpc, volume, volume_rpc, filer, filer_rpc, s3, s3_rpc] = self.ports;
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log")).expect("a log");
        let at = |name: &str| self.dir.join(name).display().to_string();
        let mut command = Command::new(&self.program);
        command.arg("server").args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-filer", "-s3"]);
        command.args([format!("-dir={}", at("data")), format!("-s3.config={}", at("s3.json"))]);
        command.args([format!("-filer.localSocket={}", at("f.sock")), format!("-s3.localSocket={}", at("s.sock"))]);
        command.args([format!("-master.port={master}"), format!("-master.port.grpc={master_rpc}")]);
        command.args([format!("-volume.port={volume}"), format!("-volume.port.grpc={volume_rpc}")]);
        command.args([format!("-filer.port={filer}"), format!("-filer.port.grpc={filer_rpc}")]);
        command.args([format!("-s3.port={s3}"), format!("-s3.port.grpc={s3_rpc}")]);
        command.args(["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]);
        command
            .args([format!("-master.volumeSizeLimitMB={}", self.volume_mib), format!("-volume.max={}", self.volumes)]);
        command.arg("-volume.preStopSeconds=0");
        let errors = log.try_clone().expect("a second handle of the log");
        command.current_dir(&self.dir).env("HOME", &self.dir).stdin(Stdio::null()).stdout(log).stderr(errors);
        let process = command.spawn().expect("SeaweedFS can be run");
        let claim = leftovers::claim(Leftover::Process(process.id() as i32));
        self.process = Some((process, claim));
        wait("the S3 server", || {
            request(self.address(6), "GET / HTTP/1.1", &[]).starts_with("HTTP/1.1 403").then_some(())
        });
        wait("the server's files", || {
            request(self.address(4), "GET /buckets/ HTTP/1.1", &[]).starts_with("HTTP/1.1").then_some(())
        });
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some((mut process, _claim)) = self.process.take() {
            // It may have ended by itself; what counts is that it is gone.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    fn address(&self, port: usize) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.ports[port]))
    }

    /// Its process, while it runs.
    #[must_use]
    pub fn process_id(&self) -> Option<u32> {
        self.process.as_ref().map(|(process, _)| process.id())
    }

    /// Where S3 is served.
    pub fn s3(&self) -> SocketAddr {
        self.address(6)
    }

    /// URL of a place in the bucket, with working credentials and few short tries.
    pub fn url(&self, prefix: &str) -> String {
        self.url_at(self.s3(), prefix)
    }

    /// The same by way of another address.
    pub fn url_at(&self, address: SocketAddr, prefix: &str) -> String {
        self.url_of(address, BUCKET, prefix, "keys")
    }

    /// The same with everything to choose: `credentials` is "keys" (that work) or "wrong".
    pub fn url_of(&self, address: SocketAddr, bucket: &str, prefix: &str, credentials: &str) -> String {
        let file = self.dir.join(credentials);
        format!("s3://{bucket}/{prefix}?endpoint=http://{address}&credentials={}", file.display())
    }

    /// Access key and secret: what must not be seen anywhere.
    pub fn keys(&self) -> (&'static str, &'static str) {
        (ACCESS_KEY, SECRET_KEY)
    }

    /// The end of what the server said.
    pub fn log(&self) -> String {
        let text = String::from_utf8_lossy(&std::fs::read(self.dir.join("log")).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Weed {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The server's program, if there is one.
pub fn program() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/weed/bin/weed");
    let named = std::env::var_os("GODWIT_WEED").map(PathBuf::from);
    [named, Some(installed)].into_iter().flatten().find(|path| path.is_file())
}

/// Ports that are free now; held until all are picked, so that none is picked twice.
fn free_ports() -> [u16; PORTS] {
    let held = [(); PORTS].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    held.map(|listener| listener.local_addr().expect("a bound socket has an address").port())
}

/// One HTTP request without credentials; the whole answer, or nothing.
fn request(address: SocketAddr, line: &str, body: &[u8]) -> String {
    let exchange = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "{line}\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len())?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    exchange().unwrap_or_default()
}

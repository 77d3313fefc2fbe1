//! A guest of ours under QEMU with KVM, and its live migration to a second QEMU on this machine: what stands beside ours.
//!
//! Both are driven by QMP (QEMU `docs/interop/qmp-spec.rst`, `qapi/migration.json`). The bandwidth limit is lifted, several
//! channels are used, a guest that does not converge is held back, and the downtime that is aimed at is ours. It refuses to
//! know what is measured.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use serde_json::{Value, json};

use super::migrate::cpu_seconds_of_stat;
use super::qemu::{BARE, ON_KVM, QEMU};
use crate::leftovers::{self, Claim, Leftover, Scratch};

/// As many as ours has lanes.
pub const CHANNELS: u32 = 4;
const POLL: Duration = Duration::from_millis(5);
/// How long a migration may take before it counts as one that does not converge.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// "As much as there is", in bytes a second.
const BANDWIDTH: u64 = 1 << 40;

/// What a migration took.
#[derive(Clone, Copy, Debug)]
pub struct Moved {
    /// From the command until the guest runs at the target, as QEMU says.
    pub total_ms: f64,
    /// As QEMU says.
    pub downtime_ms: f64,
    /// All that was sent.
    pub bytes: f64,
    /// Of both processes without their vCPUs.
    pub cpu_s: f64,
    /// The most that the guest was held back.
    pub throttle_percent: f64,
}

/// A guest and where it goes.
pub struct Pair {
    source: Monitor,
    target: Monitor,
    tls: bool,
    // Goes after those that write there.
    scratch: Scratch,
}

impl Pair {
    /// Starts a guest, and a second QEMU that waits for it. `tls`: what is sent is encrypted, and both sides show certificates.
    ///
    /// # Errors
    /// QEMU does not start here.
    pub fn start(kernel: &Path, memory_bytes: u64, tls: bool) -> Result<Pair, String> {
        let scratch = Scratch::new("qemu")?;
        let dir = scratch.path();
        if tls {
            certificates(dir)?;
        }
        let of = |name: &str, endpoint: &str, incoming: bool| {
            let mut command = Command::new(QEMU);
            command.args(ON_KVM).args(BARE).args(["-m", &(memory_bytes >> 20).to_string()]);
            command.arg("-kernel").arg(kernel);
            command.arg("-serial").arg(format!("file:{}", dir.join(name).display()));
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", dir.join(format!("{name}.qmp")).display()));
            if tls {
                let object = format!("tls-creds-x509,id=tls,dir={},endpoint={endpoint},verify-peer=yes", dir.display());
                command.args(["-object", &object]);
            }
            if incoming {
                command.args(["-incoming", "defer"]);
            }
            Monitor::start(&mut command, dir, name)
        };
        let target = of("target", "server", true)?;
        let source = of("source", "client", false)?;
        Ok(Pair { source, target, tls, scratch })
    }

    /// Files that the guest's console goes to, at the source and at the target.
    pub fn consoles(&self) -> [PathBuf; 2] {
        ["source", "target"].map(|name| self.scratch.path().join(name))
    }

    /// Moves it. None: it does not converge in [`PATIENCE`].
    ///
    /// # Errors
    /// QEMU says why not.
    pub fn migrate(&mut self, downtime_ms: u32) -> Result<Option<Moved>, String> {
        let listening = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
        let uri = format!("tcp:127.0.0.1:{}", listening.map_err(|e| e.to_string())?.port());
        for (monitor, is_source) in [(&mut self.target, false), (&mut self.source, true)] {
            let on = |capability: &str| json!({"capability": capability, "state": true});
            let mut capabilities = vec![on("multifd")];
            let mut parameters = json!({"multifd-channels": CHANNELS});
            if self.tls {
                parameters["tls-creds"] = "tls".into();
            }
            if is_source {
                capabilities.push(on("auto-converge"));
                parameters["max-bandwidth"] = BANDWIDTH.into();
                parameters["downtime-limit"] = downtime_ms.into();
                if self.tls {
                    parameters["tls-hostname"] = "localhost".into();
                }
            }
            monitor.call("migrate-set-capabilities", &json!({"capabilities": capabilities}))?;
            monitor.call("migrate-set-parameters", &parameters)?;
        }
        let cpu_before = self.source.cpu_seconds()? + self.target.cpu_seconds()?;
        self.target.call("migrate-incoming", &json!({"uri": uri}))?;
        let begun = Instant::now();
        self.source.call("migrate", &json!({"uri": uri}))?;
        let mut throttle_percent = 0f64;
        while begun.elapsed() < PATIENCE {
            let info = self.source.call("query-migrate", &json!({}))?;
            throttle_percent = throttle_percent.max(info["cpu-throttle-percentage"].as_f64().unwrap_or(0.0));
            match info["status"].as_str() {
                Some("completed") => {
                    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
                    return Ok(Some(Moved {
                        total_ms: number(&info["total-time"]),
                        downtime_ms: number(&info["downtime"]),
                        bytes: number(&info["ram"]["transferred"]),
                        cpu_s: self.source.cpu_seconds()? + self.target.cpu_seconds()? - cpu_before,
                        throttle_percent,
                    }));
                }
                Some("failed" | "cancelled") => return Err(format!("QEMU's migration failed: {info}")),
                _ => std::thread::sleep(POLL),
            }
        }
        Ok(None)
    }
}

/// A QEMU and the way to talk to it; it ends with the value.
struct Monitor {
    child: Child,
    stream: BufReader<UnixStream>,
    _claim: Claim,
}

impl Monitor {
    fn start(command: &mut Command, dir: &Path, name: &str) -> Result<Monitor, String> {
        let said = std::fs::File::create(dir.join(format!("{name}.log"))).map_err(|e| e.to_string())?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said).spawn();
        let mut child = child.map_err(|e| format!("{QEMU}: {e}"))?;
        let claim = leftovers::claim(Leftover::Process(child.id() as i32));
        let path = dir.join(format!("{name}.qmp"));
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(&path) {
                break stream;
            }
            let ended = child.try_wait().map_err(|e| e.to_string())?.is_some();
            if ended || Instant::now() > deadline {
                let said = std::fs::read_to_string(dir.join(format!("{name}.log"))).unwrap_or_default();
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{QEMU} does not run here: {said}"));
            }
            std::thread::sleep(POLL);
        };
        let mut monitor = Monitor { child, stream: BufReader::new(stream), _claim: claim };
        monitor.line()?;
        monitor.call("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).map_err(|e| format!("QMP: {e}"))?;
        serde_json::from_str(&line).map_err(|e| format!("QMP: {e} in {line:?}"))
    }

    /// Calls a command; events that come meanwhile are passed over.
    fn call(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.stream.get_mut(), "{request}").map_err(|e| format!("QMP: {e}"))?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                return Err(format!("QEMU refuses {command}: {error}"));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// CPU seconds so far, of threads that have ended too, but without vCPUs.
    fn cpu_seconds(&mut self) -> Result<f64, String> {
        let stat = |path: String| std::fs::read_to_string(path).unwrap_or_default();
        let pid = self.child.id();
        let vcpus = self.call("query-cpus-fast", &json!({}))?;
        let vcpus = vcpus.as_array().into_iter().flatten().filter_map(|vcpu| vcpu["thread-id"].as_u64());
        let guest: f64 = vcpus.map(|tid| cpu_seconds_of_stat(&stat(format!("/proc/{pid}/task/{tid}/stat")))).sum();
        Ok(cpu_seconds_of_stat(&stat(format!("/proc/{pid}/stat"))) - guest)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An authority and two sides, under the names that QEMU looks for (`docs/system/tls.rst`).
fn certificates(dir: &Path) -> Result<(), String> {
    let text = |e: rcgen::Error| e.to_string();
    let write = |name: &str, pem: String| std::fs::write(dir.join(name), pem).map_err(|e| format!("{name}: {e}"));
    let mut authority = CertificateParams::default();
    authority.distinguished_name.push(DnType::CommonName, "bench");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().map_err(text)?;
    write("ca-cert.pem", authority.self_signed(&key).map_err(text)?.pem())?;
    let issuer = Issuer::new(authority, key);
    for (name, usage) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let mut side = CertificateParams::default();
        side.distinguished_name = rcgen::DistinguishedName::new();
        side.distinguished_name.push(DnType::CommonName, name);
        side.subject_alt_names = vec![SanType::DnsName("localhost".to_owned().try_into().map_err(text)?)];
        side.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature, rcgen::KeyUsagePurpose::KeyEncipherment];
        side.extended_key_usages = vec![usage];
        let key = KeyPair::generate().map_err(text)?;
        write(&format!("{name}-cert.pem"), side.signed_by(&key, &issuer).map_err(text)?.pem())?;
        write(&format!("{name}-key.pem"), key.serialize_pem())?;
    }
    Ok(())
}

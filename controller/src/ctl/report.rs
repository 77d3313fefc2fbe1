//! What `ctl` prints: one plain struct a thing, made from the messages of the wire.
//!
//! The names of these fields are a contract with scripts (`-o json`): fields may be added, never renamed. Units last.

use proto::capability::CapabilitySet;
use proto::v1;
use serde::Serialize;

use super::output::{Report, Text};
use super::policy::report::Policy;
use super::units::{show_bytes, show_ms};
use crate::retention::policy::span;

/// A list, printed as rows of a table and as an array.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct List<T>(pub Vec<T>);

/// What can stand in a [`List`].
pub trait Row: Serialize {
    /// Headings.
    const COLUMNS: &'static [&'static str];
    /// What is said of an empty list.
    const EMPTY: &'static str;
    /// One cell a heading.
    fn cells(&self) -> Vec<String>;
}

impl<T: Row> Report for List<T> {
    fn text(&self) -> Text {
        let rows = self.0.iter().map(Row::cells).collect();
        Text::Rows { columns: T::COLUMNS.to_vec(), rows, empty: T::EMPTY }
    }
}

/// A host.
#[derive(Debug, Serialize)]
pub struct Host {
    name: String,
    state: String,
    address: String,
    version: String,
    cpus: u32,
    memory_bytes_total: u64,
    memory_bytes_free: u64,
    engines: Vec<String>,
    heartbeat_age_ms: u64,
    vms: Vec<HostVm>,
}

/// A VM as its host reports it.
#[derive(Debug, Serialize)]
struct HostVm {
    name: String,
    state: &'static str,
    generation: u64,
    reason: String,
    runner_pid: u64,
    uptime_ms: u64,
}

impl From<v1::HostRecord> for Host {
    fn from(record: v1::HostRecord) -> Host {
        let info = record.info.unwrap_or_default();
        let vm = |vm: v1::VmInfo| HostVm {
            state: vm_state(vm.state()),
            name: vm.name,
            generation: vm.generation,
            reason: vm.reason,
            runner_pid: vm.runner_pid,
            uptime_ms: vm.uptime_ms,
        };
        Host {
            name: info.name,
            state: record.state,
            address: info.address,
            version: info.version,
            cpus: info.cpus,
            memory_bytes_total: info.memory_bytes_total,
            memory_bytes_free: info.memory_bytes_free,
            engines: info.engines,
            heartbeat_age_ms: record.heartbeat_age_ms,
            vms: info.vms.into_iter().map(vm).collect(),
        }
    }
}

/// The word for a state.
pub fn vm_state(state: v1::VmState) -> &'static str {
    match state {
        v1::VmState::Unspecified => "unknown",
        v1::VmState::Starting => "starting",
        v1::VmState::Running => "running",
        v1::VmState::Paused => "paused",
        v1::VmState::Incoming => "incoming",
        v1::VmState::Stopped => "stopped",
        v1::VmState::Crashed => "crashed",
        v1::VmState::HandedOver => "handed-over",
    }
}

impl Row for Host {
    const COLUMNS: &'static [&'static str] = &["host", "state", "address", "engines", "cpus", "memory", "free", "vms"];
    const EMPTY: &'static str = "no hosts";
    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.state.clone(),
            self.address.clone(),
            self.engines.join(","),
            self.cpus.to_string(),
            show_bytes(self.memory_bytes_total),
            show_bytes(self.memory_bytes_free),
            self.vms.len().to_string(),
        ]
    }
}

impl Report for Host {
    fn text(&self) -> Text {
        let vms = self.vms.iter().map(|vm| {
            let reason = if vm.reason.is_empty() { String::new() } else { format!(" ({})", vm.reason) };
            format!("{} {}{reason}, generation {}, pid {}", vm.name, vm.state, vm.generation, vm.runner_pid)
        });
        Text::fields([
            ("host", self.name.clone()),
            ("state", self.state.clone()),
            ("address", self.address.clone()),
            ("version", self.version.clone()),
            ("engines", self.engines.join(", ")),
            ("cpus", self.cpus.to_string()),
            ("memory", show_bytes(self.memory_bytes_total)),
            ("free", show_bytes(self.memory_bytes_free)),
            ("heartbeat", format!("{} ago", show_ms(self.heartbeat_age_ms as f64))),
            ("vms", vms.collect::<Vec<_>>().join("\n")),
        ])
    }
}

/// A VM.
#[derive(Debug, Serialize)]
pub struct Vm {
    name: String,
    id: String,
    host: String,
    generation: u64,
    intent: String,
    observed: String,
    reason: String,
    operation: String,
    created: String,
    last_checkpoint: String,
    checkpoint_age_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<Policy>,
    retired_instructions: u64,
    resident_bytes: u64,
    on_isolation: &'static str,
    contract: Option<Contract>,
    config: Config,
    /// Its pages still come; absent: it has all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    lazy: Option<Lazy>,
    /// After a restore only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore: Option<Restored>,
}

/// A guest that runs while its pages come.
#[derive(Debug, Serialize)]
struct Lazy {
    checkpoint: String,
    pages: u64,
    pages_missing: u64,
    faults: u64,
    waiting_ms: u64,
    trouble: String,
}

impl Lazy {
    fn line(&self) -> String {
        let Lazy { checkpoint, pages, pages_missing, waiting_ms, trouble, .. } = self;
        let mut line = format!("{pages_missing} of {pages} still come from checkpoint {checkpoint}");
        if *waiting_ms > 1000 {
            line +=
                &format!("\nthe guest has stood still for {} because it waits for one", show_ms(*waiting_ms as f64));
        }
        if !trouble.is_empty() {
            line += &format!("\n{trouble}");
        }
        line
    }
}

impl From<v1::LazyInfo> for Lazy {
    fn from(info: v1::LazyInfo) -> Lazy {
        let v1::LazyInfo { checkpoint, pages, pages_missing, faults, waiting_ms, trouble } = info;
        Lazy { checkpoint, pages, pages_missing, faults, waiting_ms, trouble }
    }
}

/// How a restore went.
#[derive(Debug, Serialize)]
pub struct Restored {
    lazy: bool,
    /// From the command to the guest's first instruction; 0: not known.
    pub first_instruction_ms: f64,
    /// What of it the controller measured.
    phases: Vec<Phase>,
}

#[derive(Debug, Serialize)]
struct Phase {
    phase: String,
    ms: f64,
}

impl Restored {
    /// `before_ms`: from the command to the beginning of the operation.
    pub fn new(report: v1::RestoreReport, before_ms: f64) -> Restored {
        let first_instruction_ms = match report.first_instruction_ms {
            0.0 => 0.0,
            ms => ms + before_ms,
        };
        let phase = |phase: v1::PhaseReport| Phase { phase: phase.phase, ms: phase.ms };
        Restored { lazy: report.lazy, first_instruction_ms, phases: report.phases.into_iter().map(phase).collect() }
    }
}

/// What a VM was promised, and every host that runs it must have.
#[derive(Debug, Serialize)]
struct Contract {
    model: String,
    /// Single things that a host is asked for.
    atoms: usize,
}

impl Contract {
    fn decode(bytes: &[u8]) -> Option<Contract> {
        let set = CapabilitySet::from_bytes(bytes).ok().filter(|_| !bytes.is_empty())?;
        Some(Contract { atoms: set.demands(), model: set.model })
    }
}

/// What a VM is made of.
#[derive(Debug, Default, Serialize)]
pub struct Config {
    vcpus: u32,
    memory_bytes: u64,
    cpu_model: String,
    engine: String,
    kernel: String,
    initrd: String,
    cmdline: String,
    disks: Vec<Disk>,
    nets: Vec<Net>,
    tsc_hz: u64,
    tsc_per_instruction: u32,
    paced: bool,
}

#[derive(Debug, Serialize)]
struct Disk {
    path: String,
    size_bytes: u64,
    shared: bool,
    read_only: bool,
}

#[derive(Debug, Serialize)]
struct Net {
    tap: String,
    mac: String,
}

impl From<v1::MachineConfig> for Config {
    fn from(config: v1::MachineConfig) -> Config {
        let boot = config.boot.unwrap_or_default();
        let disk = |d: v1::DiskConfig| Disk {
            path: d.path,
            size_bytes: d.size_bytes,
            shared: d.shared,
            read_only: d.read_only,
        };
        let mac = |mac: &[u8]| mac.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":");
        Config {
            vcpus: config.vcpus,
            memory_bytes: config.memory_bytes,
            cpu_model: config.cpu_model,
            engine: config.engine,
            kernel: boot.kernel_path,
            initrd: boot.initrd_path,
            cmdline: boot.cmdline,
            disks: config.disks.into_iter().map(disk).collect(),
            nets: config.nets.into_iter().map(|n| Net { mac: mac(&n.mac), tap: n.tap }).collect(),
            tsc_hz: config.tsc_hz,
            tsc_per_instruction: config.tsc_per_instruction,
            paced: config.paced,
        }
    }
}

impl From<v1::VmRecord> for Vm {
    fn from(record: v1::VmRecord) -> Vm {
        let on_isolation = match record.on_isolation() {
            v1::IsolationPolicy::Pause => "pause",
            v1::IsolationPolicy::KeepRunning => "keep-running",
        };
        Vm {
            name: record.name,
            id: record.id,
            host: record.host,
            generation: record.generation,
            intent: record.intent,
            observed: record.observed,
            reason: record.reason,
            operation: record.operation,
            created: timestamp(record.created_unix_ms),
            last_checkpoint: record.last_checkpoint,
            checkpoint_age_ms: record.checkpoint_age_ms,
            policy: record.policy.map(Policy::from),
            retired_instructions: record.retired_instructions,
            resident_bytes: record.resident_bytes,
            on_isolation,
            contract: Contract::decode(&record.capabilities),
            config: record.config.unwrap_or_default().into(),
            lazy: record.lazy.map(Lazy::from),
            restore: None,
        }
    }
}

impl Row for Vm {
    const COLUMNS: &'static [&'static str] = &["vm", "host", "state", "generation", "memory", "engine", "checkpoint"];
    const EMPTY: &'static str = "no VMs; `ctl vm create` makes one";
    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.host.clone(),
            match &self.lazy {
                Some(lazy) => format!("{}, {} pages come", self.observed, lazy.pages_missing),
                None => self.observed.clone(),
            },
            self.generation.to_string(),
            show_bytes(self.config.memory_bytes),
            self.config.engine.clone(),
            dash(&self.last_checkpoint),
        ]
    }
}

impl Report for Vm {
    fn text(&self) -> Text {
        let c = &self.config;
        let flag = |set: bool, word: &'static str| if set { word } else { "" };
        let disk = |d: &Disk| {
            format!("{} {}{}{}", d.path, show_bytes(d.size_bytes), flag(d.shared, " shared"), flag(d.read_only, " ro"))
        };
        let checkpoint = match self.last_checkpoint.as_str() {
            "" => String::new(),
            id => format!("{id} ({} old)", span(self.checkpoint_age_ms)),
        };
        let net =
            |n: &Net| if n.tap.is_empty() { format!("{} unplugged", n.mac) } else { format!("{} on {}", n.mac, n.tap) };
        Text::fields([
            ("vm", self.name.clone()),
            ("id", self.id.clone()),
            ("host", self.host.clone()),
            ("generation", self.generation.to_string()),
            ("state", self.observed.clone()),
            ("wanted", self.intent.clone()),
            ("reason", self.reason.clone()),
            ("operation", self.operation.clone()),
            ("created", self.created.clone()),
            ("checkpoint", checkpoint),
            ("policy", self.policy.as_ref().map(Policy::line).unwrap_or_default()),
            ("instructions", self.retired_instructions.to_string()),
            ("memory", format!("{} ({} in use)", show_bytes(c.memory_bytes), show_bytes(self.resident_bytes))),
            ("pages", self.lazy.as_ref().map(Lazy::line).unwrap_or_default()),
            ("processors", format!("{} {} on engine {}", c.vcpus, c.cpu_model, c.engine)),
            (
                "contract",
                match &self.contract {
                    Some(contract) => format!("{}, {} atoms", contract.model, contract.atoms),
                    None => "not known yet".to_owned(),
                },
            ),
            ("kernel", c.kernel.clone()),
            ("initrd", c.initrd.clone()),
            ("cmdline", c.cmdline.clone()),
            ("disks", c.disks.iter().map(disk).collect::<Vec<_>>().join("\n")),
            ("nets", c.nets.iter().map(net).collect::<Vec<_>>().join("\n")),
            ("clock", format!("TSC {} Hz, {}", c.tsc_hz, if c.paced { "paced" } else { "unpaced" })),
            ("isolation", self.on_isolation.to_owned()),
        ])
    }
}

/// A checkpoint.
#[derive(Debug, Serialize)]
pub struct Checkpoint {
    id: String,
    vm: String,
    vm_id: String,
    generation: u64,
    created: String,
    age_ms: u64,
    ram_bytes: u64,
    stored_bytes: u64,
    own_bytes: u64,
    stop_us: u64,
    manifest_key: String,
    digest: Digest,
    verified: String,
    pinned: bool,
    kept_by: Vec<String>,
    damaged: Vec<String>,
}

/// What two sides compare, in hex.
#[derive(Debug, Default, Serialize)]
pub struct Digest {
    machine: String,
    ram: String,
    state: String,
    disks: String,
}

impl From<v1::MachineDigest> for Digest {
    fn from(digest: v1::MachineDigest) -> Digest {
        Digest {
            machine: hex(&digest.machine),
            ram: hex(&digest.ram),
            state: hex(&digest.state),
            disks: hex(&digest.disks),
        }
    }
}

impl From<v1::CheckpointRecord> for Checkpoint {
    fn from(record: v1::CheckpointRecord) -> Checkpoint {
        Checkpoint {
            id: record.id,
            vm: record.vm,
            vm_id: record.vm_id,
            generation: record.generation,
            created: timestamp(record.created_unix_ms),
            age_ms: record.age_ms,
            ram_bytes: record.ram_bytes,
            stored_bytes: record.stored_bytes,
            own_bytes: record.own_bytes,
            stop_us: record.stop_us,
            manifest_key: record.manifest_key,
            digest: record.digest.unwrap_or_default().into(),
            verified: record.verified,
            pinned: record.pinned,
            kept_by: record.kept_by,
            damaged: record.damaged,
        }
    }
}

impl Row for Checkpoint {
    const COLUMNS: &'static [&'static str] =
        &["checkpoint", "vm", "created", "age", "ram", "stored", "own", "stopped", "kept by", "verified"];
    const EMPTY: &'static str = "no checkpoints; `ctl checkpoint create VM` makes one";
    fn cells(&self) -> Vec<String> {
        vec![
            self.id.clone(),
            self.vm.clone(),
            self.created.clone(),
            span(self.age_ms),
            show_bytes(self.ram_bytes),
            show_bytes(self.stored_bytes),
            own_bytes(self.own_bytes),
            show_ms(self.stop_us as f64 / 1000.0),
            dash(&self.kept_by.join(", ")),
            self.verified.clone(),
        ]
    }
}

/// 0 is unknown.
fn own_bytes(bytes: u64) -> String {
    if bytes == 0 { "-".into() } else { show_bytes(bytes) }
}

impl Report for Checkpoint {
    fn text(&self) -> Text {
        Text::fields([
            ("checkpoint", self.id.clone()),
            ("vm", format!("{} ({})", self.vm, self.vm_id)),
            ("generation", self.generation.to_string()),
            ("created", format!("{} ({} ago)", self.created, span(self.age_ms))),
            ("made", if self.pinned { "by hand: no policy removes it" } else { "by policy" }.into()),
            ("kept by", dash(&self.kept_by.join(", "))),
            ("ram", show_bytes(self.ram_bytes)),
            ("stored", show_bytes(self.stored_bytes)),
            ("own", own_bytes(self.own_bytes)),
            ("stopped", show_ms(self.stop_us as f64 / 1000.0)),
            ("manifest", self.manifest_key.clone()),
            ("digest", self.digest.machine.clone()),
            ("verified", self.verified.clone()),
            ("damaged", self.damaged.join("\n")),
        ])
    }
}

/// An entry of the ledger.
#[derive(Debug, Serialize)]
pub struct Event {
    sequence: u64,
    time: String,
    kind: String,
    vm: String,
    operation: String,
    actor: String,
    text: String,
}

impl From<v1::LedgerEvent> for Event {
    fn from(event: v1::LedgerEvent) -> Event {
        Event {
            sequence: event.sequence,
            time: timestamp(event.unix_ms),
            kind: event.kind,
            vm: event.vm,
            operation: event.operation,
            actor: event.actor,
            text: event.text,
        }
    }
}

impl Report for Event {
    fn text(&self) -> Text {
        let line = format!(
            "{:>6}  {}  {:<24}  {:<12}  {:<18}  {}",
            self.sequence,
            self.time,
            self.kind,
            dash(&self.vm),
            dash(&self.actor),
            self.text
        );
        Text::Lines(line.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect())
    }
}

/// A word on what was done, where there is nothing else to show.
#[derive(Debug, Serialize)]
pub struct Done {
    /// What was done, for people.
    pub message: String,
    /// The operation that did it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub operation: String,
}

impl Report for Done {
    fn text(&self) -> Text {
        Text::Lines(self.message.clone())
    }
}

/// Bytes as hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Unix milliseconds as UTC, `2026-01-31T12:00:00Z`; empty for 0.
pub fn timestamp(unix_ms: u64) -> String {
    let stamp = i64::try_from(unix_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    match stamp {
        Some(stamp) if unix_ms != 0 => format!("{stamp:.0}"),
        _ => String::new(),
    }
}

/// A cell is never empty.
pub fn dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_shows_as_table_and_json() {
        let contract = vmcb_engine::capability::CpuModel::SoftV1.contract(1_000_000);
        let record = v1::VmRecord {
            capabilities: contract.to_bytes(),
            name: "vm1".into(),
            host: "hostA".into(),
            observed: "running".into(),
            created_unix_ms: 1_700_000_000_000,
            config: Some(v1::MachineConfig {
                memory_bytes: 512 << 20,
                nets: vec![v1::NetConfig { tap: String::new(), mac: vec![2, 0, 0, 0, 0, 1] }],
                ..Default::default()
            }),
            ..Default::default()
        };
        let vm = Vm::from(record);
        let json = serde_json::to_value(&vm).unwrap();
        assert_eq!(json["contract"], serde_json::json!({ "model": "soft-v1", "atoms": contract.demands() }));
        assert!(vm.text().render().contains(&format!("soft-v1, {} atoms", contract.demands())));
        assert_eq!(json["created"], "2023-11-14T22:13:20Z");
        assert_eq!(json["config"]["memory_bytes"], 512 << 20);
        assert_eq!(json["config"]["nets"][0]["mac"], "02:00:00:00:00:01");
        assert!(Report::text(&vm).render().contains("02:00:00:00:00:01 unplugged"));
        assert!(List(vec![vm]).text().render().contains("512 MiB"));
    }

    #[test]
    fn no_time_is_no_text() {
        assert_eq!(timestamp(0), "");
        assert_eq!(timestamp(u64::MAX), "");
    }
}

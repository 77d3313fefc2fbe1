//! gdb on a live VM of a whole cluster: what it does is seen by the guest, recorded, and over when it has gone.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use e2e::cluster::{Cluster, wait};
use e2e::guest::{Program, REGION};
use proto::status::Code;
use serde_json::Value;

const GUEST: Program =
    Program { start: REGION, region_bytes: 4 << 20, pages_per_s: 500, tick_ms: 20, tsc_hz: 1_000_000_000 };

/// `ctl vm gdb`, while it runs.
struct Listening {
    ctl: Child,
    address: String,
}

impl Listening {
    fn begin(cluster: &Cluster) -> Self {
        let mut command = cluster.command(["vm", "gdb", "vm1", "--listen", "127.0.0.1:0"]);
        let mut ctl = command.stdout(Stdio::piped()).spawn().expect("ctl can be run");
        let mut lines = BufReader::new(ctl.stdout.take().expect("stdout is piped")).lines();
        let line = lines.next().expect("it says where").expect("text");
        let address = line.strip_prefix("gdb: target remote ").expect("an address").to_owned();
        Self { ctl, address }
    }

    /// Runs gdb with these commands; what it said. `None` if there is no gdb.
    fn gdb(&self, commands: &[&str]) -> Option<String> {
        let mut gdb = Command::new("gdb");
        gdb.args(["-nx", "-batch", "-ex", "set confirm off", "-ex", &format!("target remote {}", self.address)]);
        for command in commands {
            gdb.args(["-ex", command]);
        }
        let Ok(output) = gdb.stdin(Stdio::null()).output() else {
            eprintln!("SKIPPED: there is no gdb");
            return None;
        };
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        println!("{text}");
        Some(text)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.ctl.kill();
        let _ = self.ctl.wait();
    }
}

fn show(cluster: &Cluster) -> Value {
    cluster.json(["vm", "show", "vm1"])
}

fn is_halted(cluster: &Cluster) -> bool {
    let vm = show(cluster);
    vm["observed"] == "paused" && vm["reason"].as_str().is_some_and(|why| why.contains("under a debugger"))
}

#[test]
fn gdb_on_a_recorded_vm_is_replayed_and_leaves_no_trace_when_anything_dies() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", GUEST);
    cluster.fails(Code::NotFound, ["vm", "gdb", "vm2"]);
    cluster.goes_on("vm1", 3);
    cluster.ok(["record", "start", "vm1"]);
    let listening = Listening::begin(&cluster);
    // r12 counts ticks, and each page of the region holds what the guest wrote there last.
    let commands = [
        "break *$rip",
        "continue",
        "delete",
        "stepi 100",
        "watch -l *(long*)($rsp-8)",
        "continue",
        "delete",
        "set $r12 = $r12 + 1000000",
        "set *(long*)0x1000008 = 5",
        "x/1xg 0x1000008",
        "detach",
    ];
    let Some(said) = listening.gdb(&commands) else { return };
    for text in
        ["Breakpoint 1, ", "Hardware watchpoint 2", "Old value = ", "0x1000008:\t0x0000000000000005", "detached"]
    {
        assert!(said.contains(text), "{text:?} was not said");
    }
    wait("the guest to count from what gdb wrote", || cluster.ticks("vm1").filter(|now| now.tick > 1_000_000));
    wait("the guest to find what gdb wrote", || cluster.console("vm1").contains("BAD page").then_some(()));

    // A checkpoint of a guest that a debugger holds; a move is refused; whoever has it, it goes on without them.
    let held = TcpStream::connect(&listening.address).expect("ctl listens");
    wait("the guest to stand still", || is_halted(&cluster).then_some(()));
    cluster.ok(["checkpoint", "create", "vm1"]);
    let refused = cluster.fails(Code::Conflict, ["migrate", "vm1", "--to", "hostB"]);
    assert!(refused.contains("debugger"), "{refused}");
    assert!(is_halted(&cluster));
    cluster.kill(cluster.daemon("hostA"));
    cluster.start(2);
    wait("the guest to go on without its agent's debugger", || (cluster.observed("vm1") == "running").then_some(()));
    drop(held);
    let _held = TcpStream::connect(&listening.address).expect("ctl listens");
    wait("the guest to stand still again", || is_halted(&cluster).then_some(()));
    drop(listening);
    wait("the guest to go on without ctl", || (cluster.observed("vm1") == "running").then_some(()));

    let now = show(&cluster)["retired_instructions"].as_u64().expect("a count of instructions");
    let recording = wait("the journal to catch up", || {
        let recording = cluster.json(["record", "ls", "vm1"])[0].clone();
        (recording["to_instruction"].as_u64() > Some(now)).then_some(recording)
    });
    let segments = recording["segments"].as_array().cloned().unwrap_or_default();
    let mut bases = segments.iter().filter_map(|segment| segment["checkpoint"].as_str());
    let base = bases.find(|id| !id.is_empty()).expect("a checkpoint to begin with");
    let file = cluster.dir().join("vm1.gwr");
    let file = file.to_str().expect("temporary paths are text");
    cluster.ok(["record", "export", "vm1", "--from-checkpoint", base, "--out", file]);
    let verdict = cluster.ok(["replay", file, "--check"]);
    assert_eq!(verdict.lines().last(), Some("same"), "{verdict}");
}

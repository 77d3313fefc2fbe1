//! A guest made of a script, and a clock that stands until it is moved.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use node_agent::clock::Clock;
use node_agent::runner::driver::{BootImages, Closed, Outbox, Output, Terms};
use node_agent::runner::guest::{Debugged, Guest, Outcome, Place};
use proto::v1::{MachineConfig, Section};
use vmcb_engine::engine::Stops;
use vmcb_engine::replay::Door;

/// A clock that the test moves.
#[derive(Clone, Default)]
pub struct Hand(Arc<AtomicU64>);

impl Hand {
    pub fn at(ns: u64) -> Hand {
        Hand(Arc::new(AtomicU64::new(ns)))
    }

    pub fn advance(&self, ns: u64) {
        self.0.fetch_add(ns, Ordering::SeqCst);
    }
}

impl Clock for Hand {
    fn boottime_ns(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn realtime_ns(&self) -> u64 {
        // Far from any configured epoch: nothing is caught up.
        1 << 62
    }
}

/// What a test sees of the guest.
#[derive(Default)]
pub struct Seen {
    pub runs: u64,
    pub retired: u64,
    pub tsc: u64,
    pub packets: Vec<Vec<u8>>,
    pub typed: Vec<u8>,
    pub applied: Vec<Section>,
    pub booted: Vec<u8>,
    pub resets: u32,
    pub epoch: u32,
    /// Bytes kept of a frozen instant, if one is.
    pub frozen: Option<u64>,
    pub thawed: u32,
    pub stops: Stops,
}

pub type Shared = Arc<Mutex<Seen>>;

/// What the guest does in its next run. When the script is over it is busy.
#[derive(Clone)]
pub enum Act {
    Busy,
    IdleUntil(Option<u64>),
    /// Busy while the clock goes on by so much.
    Takes(Hand, u64),
    Say(&'static [u8]),
    End(Outcome),
}

pub struct Scripted {
    pub seen: Shared,
    pub script: VecDeque<Act>,
    said: Vec<u8>,
    held: Vec<Vec<u8>>,
}

impl Scripted {
    pub fn new(script: impl IntoIterator<Item = Act>) -> (Scripted, Shared) {
        let seen = Shared::default();
        seen.lock().unwrap().epoch = 1;
        (
            Scripted {
                seen: Arc::clone(&seen),
                script: script.into_iter().collect(),
                said: Vec::new(),
                held: Vec::new(),
            },
            seen,
        )
    }
}

impl Debugged for Scripted {
    fn read_cpu(&self, vcpu: usize) -> Option<Vec<u8>> {
        (vcpu == 0).then(Vec::new)
    }

    fn write_cpu(&mut self, _: usize, _: &[u8]) -> Result<(), String> {
        Err("this guest has no registers".into())
    }

    fn read_memory(&self, _: Place, _: &mut [u8]) -> usize {
        0
    }

    fn write_memory(&mut self, _: Place, _: &[u8]) -> Result<(), String> {
        Err("this guest has no memory".into())
    }

    fn set_stops(&mut self, stops: &Stops) {
        self.seen.lock().unwrap().stops = stops.clone();
    }

    fn pass_breakpoints(&mut self) {}

    fn current_vcpu(&self) -> usize {
        0
    }

    fn last_ran(&self, _: usize) -> Option<u64> {
        Some(Guest::retired(self))
    }
}

impl Guest for Scripted {
    fn door(&self) -> Option<&Door> {
        None
    }

    fn door_mut(&mut self) -> Option<&mut Door> {
        None
    }

    fn boot(&mut self, kernel: &[u8], _initrd: Option<&[u8]>) -> Result<(), String> {
        self.seen.lock().unwrap().booted = kernel.to_vec();
        if kernel.is_empty() { Err("the kernel is empty".into()) } else { Ok(()) }
    }

    fn reset(&mut self, kernel: &[u8], _initrd: Option<&[u8]>) -> Result<(), String> {
        assert_eq!(kernel, self.seen.lock().unwrap().booted);
        self.seen.lock().unwrap().resets += 1;
        Ok(())
    }

    fn run(&mut self, until_retired: u64) -> Outcome {
        let mut seen = self.seen.lock().unwrap();
        seen.packets.append(&mut self.held);
        seen.runs += 1;
        let act = self.script.pop_front().unwrap_or(Act::Busy);
        if !matches!(act, Act::IdleUntil(_)) {
            seen.tsc += until_retired - seen.retired;
            seen.retired = until_retired;
        }
        match act {
            Act::Busy => Outcome::Reached,
            Act::Takes(clock, ns) => {
                clock.advance(ns);
                Outcome::Reached
            }
            Act::IdleUntil(until_tsc) => Outcome::Idle { until_tsc },
            Act::Say(bytes) => {
                self.said.extend_from_slice(bytes);
                Outcome::Reached
            }
            Act::End(outcome) => outcome,
        }
    }

    fn skip_idle_until(&mut self, tsc: u64) {
        let mut seen = self.seen.lock().unwrap();
        assert!(tsc >= seen.tsc, "guest time went back from {} to {tsc}", seen.tsc);
        seen.tsc = tsc;
    }

    fn retired(&self) -> u64 {
        self.seen.lock().unwrap().retired
    }

    fn tsc(&self) -> u64 {
        self.seen.lock().unwrap().tsc
    }

    fn console_input(&mut self, bytes: &[u8]) -> usize {
        // A small FIFO: sixteen at a time.
        let taken = bytes.len().min(16);
        self.seen.lock().unwrap().typed.extend_from_slice(&bytes[..taken]);
        taken
    }

    fn console_room(&self) -> usize {
        1000
    }

    fn take_console_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.said)
    }

    fn net_input(&mut self, _card: usize, packet: &[u8]) -> bool {
        self.seen.lock().unwrap().packets.push(packet.to_vec());
        true
    }

    fn net_hold(&mut self, _card: usize, packet: &[u8]) -> bool {
        self.held.push(packet.to_vec());
        true
    }

    fn epoch(&self) -> u32 {
        self.seen.lock().unwrap().epoch
    }

    fn advance_epoch(&mut self) -> Result<u32, String> {
        let mut seen = self.seen.lock().unwrap();
        seen.epoch += 1;
        Ok(seen.epoch)
    }

    fn freeze(&mut self, _mark: u32) -> Result<u32, String> {
        self.seen.lock().unwrap().frozen = Some(0);
        self.advance_epoch()
    }

    fn thaw(&mut self) -> bool {
        let mut seen = self.seen.lock().unwrap();
        seen.thawed += 1;
        seen.frozen.take().is_some()
    }

    fn kept_bytes(&self) -> u64 {
        self.seen.lock().unwrap().frozen.unwrap_or(0)
    }

    fn capture(&mut self) -> Result<Vec<Section>, String> {
        let seen = self.seen.lock().unwrap();
        let body = seen.retired.to_le_bytes().to_vec();
        Ok(vec![Section { name: "clock".into(), major: 1, body, ..Section::default() }])
    }

    fn apply(&mut self, sections: &[Section]) -> Result<(), String> {
        if sections.is_empty() {
            return Err("section \"clock\" is missing".into());
        }
        self.seen.lock().unwrap().applied = sections.to_vec();
        Ok(())
    }

    fn vmcbs(&self) -> Result<Vec<Box<[u8; 4096]>>, String> {
        Ok(vec![Box::new([7; 4096])])
    }
}

/// Outputs, kept for the test.
#[derive(Clone, Default)]
pub struct Kept(pub Arc<Mutex<Vec<Output>>>);

impl Outbox for Kept {
    fn send(&mut self, output: Output) -> Result<(), Closed> {
        self.0.lock().unwrap().push(output);
        Ok(())
    }
}

pub struct Kernel(pub &'static [u8]);

/// The same, as part of the VM.
pub struct TravellingKernel(pub &'static [u8]);

impl BootImages for TravellingKernel {
    fn kernel_path(&self) -> String {
        "scripted kernel".into()
    }

    fn load(&mut self) -> Result<(Vec<u8>, Option<Vec<u8>>), String> {
        Ok((self.0.to_vec(), None))
    }

    fn travel(&self) -> bool {
        true
    }
}

impl BootImages for Kernel {
    fn kernel_path(&self) -> String {
        "scripted kernel".into()
    }

    fn load(&mut self) -> Result<(Vec<u8>, Option<Vec<u8>>), String> {
        Ok((self.0.to_vec(), None))
    }

    fn travel(&self) -> bool {
        false
    }
}

pub fn terms(paced: bool, descriptors: &[&str]) -> Terms {
    Terms {
        config: MachineConfig { paced, tsc_hz: 1_000_000_000, memory_bytes: 16 << 20, ..MachineConfig::default() },
        descriptors: descriptors.iter().map(|name| (*name).to_owned()).collect(),
        state_digest: |sections| *blake3::hash(&sections[0].body).as_bytes(),
        cables: Vec::new(),
        missing: None,
        standing_answer: None,
    }
}

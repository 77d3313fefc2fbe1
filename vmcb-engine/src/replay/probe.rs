//! What a machine is like, in as few bytes as a journal has for it, and which part of it is not what it was.
//!
//! A probe decides: digests of each vCPU and of all devices. A detail names: the general registers of the vCPU that ran
//! last as they were, a byte of each other field, four of each device. It is compared first, so that what differs has a name;
//! where nothing of it differs, or none was recorded, the digests speak. Refuses to know positions and what follows.

use proto::ids::Digest;

use crate::cpu::{CpuState, Leaf, LeafValue};
use crate::journal::{CpuDetail, Detail, Probe};
use crate::machine::Machine;

/// Fields that are kept as they were: general registers, RIP and RFLAGS.
const WORDS: usize = 18;

/// A part that is not what it was.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Differing {
    /// Its name.
    pub field: String,
    /// How it is here.
    pub ours: String,
    /// How it was.
    pub recorded: String,
}

/// Digests of a machine.
pub(super) fn probe(machine: &Machine) -> Probe {
    let probe = machine.probe();
    let short = |digest: Digest| first(&digest.0);
    Probe { cpus: probe.cpus.into_iter().map(short).collect(), devices: short(probe.devices) }
}

/// Fields of a machine.
pub(super) fn detail(machine: &Machine) -> Detail {
    // The others' would be most of the journal of a busy guest.
    let vcpu = machine.current_vcpu();
    let cpus = machine.peek_cpu(vcpu).map(|state| cpu_detail(vcpu, &state));
    let devices = machine.device_sections().into_iter().map(|section| first(blake3::hash(&section.body).as_bytes()));
    Detail { cpus: cpus.into_iter().collect(), devices: devices.collect() }
}

fn first<const N: usize>(digest: &[u8; 32]) -> [u8; N] {
    let mut first = [0; N];
    first.copy_from_slice(&digest[..N]);
    first
}

fn leaves(state: &CpuState) -> Vec<Leaf> {
    let mut leaves = Vec::new();
    state.leaves(&mut |leaf| leaves.push(leaf));
    leaves
}

fn word(value: &LeafValue) -> u64 {
    match value {
        LeafValue::Word(word) => *word,
        LeafValue::Bytes(_) => 0,
    }
}

fn check(value: &LeafValue) -> u8 {
    let digest = match value {
        LeafValue::Word(word) => blake3::hash(&word.to_le_bytes()),
        LeafValue::Bytes(bytes) => blake3::hash(bytes),
    };
    digest.as_bytes()[0]
}

fn cpu_detail(vcpu: usize, state: &CpuState) -> CpuDetail {
    let leaves = leaves(state);
    let (words, others) = leaves.split_at(WORDS);
    let words = words.iter().map(|leaf| word(&leaf.value)).collect();
    CpuDetail { vcpu: vcpu as u32, words, checks: others.iter().map(|leaf| check(&leaf.value)).collect() }
}

/// The first field of a machine that is not what a detail says.
pub(super) fn differs_from_detail(machine: &Machine, recorded: &Detail) -> Option<Differing> {
    recorded.cpus.iter().find_map(|cpu| cpu_differs(machine, cpu)).or_else(|| device_differs(machine, recorded))
}

fn cpu_differs(machine: &Machine, recorded: &CpuDetail) -> Option<Differing> {
    let vcpu = recorded.vcpu;
    let leaves = leaves(&machine.peek_cpu(vcpu as usize)?);
    if recorded.words.len() != WORDS || leaves.len() - WORDS != recorded.checks.len() {
        return None;
    }
    let differing = |leaf: &Leaf, recorded: String| Differing {
        field: format!("cpu/{vcpu} {}", leaf.name),
        ours: leaf.value.to_string(),
        recorded,
    };
    let (words, others) = leaves.split_at(WORDS);
    let mut words = words.iter().zip(&recorded.words);
    let mut others = others.iter().zip(&recorded.checks);
    let word = words.find(|(leaf, recorded)| word(&leaf.value) != **recorded);
    let word = word.map(|(leaf, recorded)| differing(leaf, format!("{recorded:#x}")));
    word.or_else(|| {
        let other = others.find(|(leaf, recorded)| check(&leaf.value) != **recorded);
        other.map(|(leaf, _)| differing(leaf, "another value".to_owned()))
    })
}

fn device_differs(machine: &Machine, recorded: &Detail) -> Option<Differing> {
    let sections = machine.device_sections();
    if sections.len() != recorded.devices.len() {
        return None;
    }
    let short = |body: &[u8]| first::<4>(blake3::hash(body).as_bytes());
    let found = sections.iter().zip(&recorded.devices).find(|(section, recorded)| short(&section.body) != **recorded);
    found.map(|(section, recorded)| Differing {
        field: format!("the digest of {}", section.name),
        ours: hex(&short(&section.body)),
        recorded: hex(recorded),
    })
}

/// The first part of a machine that is not what a probe says.
pub(super) fn differs_from_probe(machine: &Machine, recorded: &Probe) -> Option<Differing> {
    let ours = probe(machine);
    let differing = |field: String, ours: String, recorded: String| Some(Differing { field, ours, recorded });
    if ours.cpus.len() != recorded.cpus.len() {
        let (ours, recorded) = (ours.cpus.len().to_string(), recorded.cpus.len().to_string());
        return differing("the number of vCPUs".to_owned(), ours, recorded);
    }
    let cpus = ours.cpus.iter().zip(&recorded.cpus).enumerate();
    let cpus = cpus.map(|(vcpu, (ours, recorded))| (format!("the digest of cpu/{vcpu}"), ours, recorded));
    let devices = ("the digest of the devices".to_owned(), &ours.devices, &recorded.devices);
    let found = cpus.chain([devices]).find(|(_, ours, recorded)| ours != recorded);
    found.and_then(|(field, ours, recorded)| differing(field, hex(ours), hex(recorded)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

//! In what two machines differ, by name, for people. It refuses to know how they came to.

use proto::v1::Section;
use vmcb_engine::cpu::{CpuState, LeafValue};
use vmcb_engine::journal::Position;
use vmcb_engine::machine::Machine;

use super::instant::{disassembled, place};
use super::symbols::Symbols;

/// Fields that are named.
const FIELDS_NAMED: usize = 16;

/// Processors and devices of a machine.
#[derive(Clone, PartialEq, Debug)]
pub struct State {
    /// Where it is.
    pub position: Position,
    cpus: Vec<CpuState>,
    devices: Vec<Section>,
}

/// A field that differs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Field {
    /// Its name.
    pub name: String,
    /// In the first machine.
    pub one: String,
    /// In the second.
    pub other: String,
}

impl State {
    /// Of a machine as it is.
    pub fn of(machine: &Machine) -> Self {
        let position = Position { retired: machine.retired(), skipped_tsc: machine.skipped_tsc() };
        let cpus = (0..machine.config().vcpus as usize).filter_map(|vcpu| machine.peek_cpu(vcpu)).collect();
        Self { position, cpus, devices: machine.device_sections() }
    }

    /// Fields in which another one differs: time, processors, devices.
    pub fn differences(&self, other: &State) -> Vec<Field> {
        let mut found = Vec::new();
        let mut compare = |name: &str, one: u64, other: u64| {
            if one != other {
                found.push(Field { name: name.to_owned(), one: format!("{one:#x}"), other: format!("{other:#x}") });
            }
        };
        compare("clock.retired", self.position.retired, other.position.retired);
        compare("clock.skipped_tsc", self.position.skipped_tsc, other.position.skipped_tsc);
        let text = |value: Option<LeafValue>| value.map_or("absent".to_owned(), |value| value.to_string());
        for (vcpu, (one, other)) in self.cpus.iter().zip(&other.cpus).enumerate() {
            found.extend(one.compare(other).into_iter().map(|difference| Field {
                name: format!("cpu/{vcpu} {}", difference.field),
                one: text(difference.left),
                other: text(difference.right),
            }));
        }
        let devices = self.devices.iter().zip(&other.devices).filter(|(one, other)| one != other);
        let short = |body: &[u8]| blake3::hash(body).to_hex().as_str()[..16].to_owned();
        found.extend(devices.map(|(one, other)| Field {
            name: format!("the digest of {}", one.name),
            one: short(&one.body),
            other: short(&other.body),
        }));
        found
    }
}

/// One line for each of the first fields, and how many more there are; `with` says of whom the second value is.
pub fn lines(fields: &[Field], with: &str) -> Vec<String> {
    let named = fields.iter().take(FIELDS_NAMED);
    let mut lines: Vec<String> =
        named.map(|Field { name, one, other }| format!("{name}: {one}, {with} {other}")).collect();
    match fields.len().saturating_sub(FIELDS_NAMED) {
        0 => {}
        more => lines.push(format!("and {more} more fields")),
    }
    lines
}

/// The verdict: where, and the first field.
pub fn verdict(position: Position, fields: &[Field], with: &str) -> String {
    let Position { retired, skipped_tsc } = position;
    let what = match fields.first() {
        Some(Field { name, one, other }) => format!("{name} is {one}, {with} {other}"),
        None => format!("the replay goes on, {with} it does not"),
    };
    format!("diverged: at instruction {retired} (skipped {skipped_tsc}): {what}")
}

/// What the instruction that a vCPU executes next is, and where.
pub fn told(machine: &Machine, vcpu: usize, symbols: Option<&Symbols>) -> String {
    format!("vCPU {vcpu}, {}: {}", place(machine, vcpu, symbols), disassembled(machine, vcpu))
}

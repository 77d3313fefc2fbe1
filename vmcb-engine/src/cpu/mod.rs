//! `CpuState`: all that one vCPU is, independent of the engine that runs it.
//!
//! | file | what |
//! |---|---|
//! | `fields` | the one table: struct, reset, encode, decode, leaves |
//! | `stored` | how each type of value travels and is named |
//! | `fpu` | the FXSAVE image and later XSAVE components |
//! | `load` | between this and a VMCB: what VMRUN and VMLOAD switch |
//!
//! This room refuses to know engines, CPU models (`capability`) and interrupt controllers (`device`).

mod fields;
mod fpu;
mod load;
mod stored;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod traps;

use prost::Message;

pub use fields::{CpuState, RunState};
pub use fpu::{FxState, LATER_COMPONENT_MAX, MXCSR_MASK, MXCSR_RESET};
pub use stored::{DR_NAMES, DecodeError, GPR_NAMES, Leaf, LeafValue};

use proto::ids::Digest;

use crate::vmcb::Segment;
use crate::vmcb::access::SegmentRegister;
use crate::vmcb::registers::{cr0, efer};

/// Indices into [`CpuState::gprs`], in encoding order.
pub mod gpr {
    /// RAX.
    pub const RAX: usize = 0;
    /// RCX.
    pub const RCX: usize = 1;
    /// RDX.
    pub const RDX: usize = 2;
    /// RBX.
    pub const RBX: usize = 3;
    /// RSP.
    pub const RSP: usize = 4;
    /// RBP.
    pub const RBP: usize = 5;
    /// RSI.
    pub const RSI: usize = 6;
    /// RDI.
    pub const RDI: usize = 7;
}

/// A leaf in which two states differ; `None` where one of them has no such leaf.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Name of the leaf.
    pub field: String,
    /// Its value here.
    pub left: Option<LeafValue>,
    /// Its value there.
    pub right: Option<LeafValue>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |value: &Option<LeafValue>| value.as_ref().map_or("absent".to_owned(), LeafValue::to_string);
        write!(f, "{}: {} / {}", self.field, text(&self.left), text(&self.right))
    }
}

impl Default for CpuState {
    fn default() -> Self {
        Self::reset()
    }
}

impl CpuState {
    /// True if instructions are 64-bit ones: long mode, and CS says so (APM2 4.8.1).
    pub fn is_64_bit(&self) -> bool {
        self.efer & efer::LME != 0 && self.cr0 & cr0::PG != 0 && self.cs.long()
    }

    /// Linear address of the instruction that is executed next: CS has no base in 64-bit mode (APM2 4.5.3).
    pub fn code_address(&self) -> u64 {
        if self.is_64_bit() { self.rip } else { self.rip.wrapping_add(self.cs.base) & 0xffff_ffff }
    }

    /// The saved form as bytes: the body of a section `cpu/N`.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode().encode_to_vec()
    }

    /// From the body of a section.
    pub fn from_bytes(bytes: &[u8]) -> Result<CpuState, DecodeError> {
        CpuState::decode(proto::v1::CpuStateV1::decode(bytes).map_err(DecodeError::NotAMessage)?)
    }

    /// BLAKE3 over every leaf: name, a tag, and value, each with its length.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        self.leaves(&mut |leaf| {
            hasher.update(&(leaf.name.len() as u32).to_le_bytes());
            hasher.update(leaf.name.as_bytes());
            match leaf.value {
                LeafValue::Word(word) => hasher.update(&[0]).update(&word.to_le_bytes()),
                LeafValue::Bytes(bytes) => {
                    hasher.update(&[1]).update(&(bytes.len() as u32).to_le_bytes()).update(&bytes)
                }
            };
        });
        Digest(*hasher.finalize().as_bytes())
    }

    /// The leaves in which `self` and `other` differ, in the order of the table.
    pub fn compare(&self, other: &CpuState) -> Vec<Difference> {
        let collect = |state: &CpuState| {
            let mut leaves = Vec::new();
            state.leaves(&mut |leaf| leaves.push(leaf));
            leaves
        };
        let (ours, mut theirs) = (collect(self), collect(other));
        let mut differences = Vec::new();
        for Leaf { name, value } in ours {
            let twin = theirs.iter().position(|leaf| leaf.name == name).map(|at| theirs.remove(at).value);
            if twin.as_ref() != Some(&value) {
                differences.push(Difference { field: name, left: Some(value), right: twin });
            }
        }
        let only_there = |leaf: Leaf| Difference { field: leaf.name, left: None, right: Some(leaf.value) };
        differences.extend(theirs.into_iter().map(only_there));
        differences
    }

    /// A segment or table register by identifier.
    pub fn segment(&self, register: SegmentRegister) -> &Segment {
        match register {
            SegmentRegister::Es => &self.es,
            SegmentRegister::Cs => &self.cs,
            SegmentRegister::Ss => &self.ss,
            SegmentRegister::Ds => &self.ds,
            SegmentRegister::Fs => &self.fs,
            SegmentRegister::Gs => &self.gs,
            SegmentRegister::Gdtr => &self.gdtr,
            SegmentRegister::Ldtr => &self.ldtr,
            SegmentRegister::Idtr => &self.idtr,
            SegmentRegister::Tr => &self.tr,
        }
    }

    /// A segment or table register by identifier, writable.
    pub fn segment_mut(&mut self, register: SegmentRegister) -> &mut Segment {
        match register {
            SegmentRegister::Es => &mut self.es,
            SegmentRegister::Cs => &mut self.cs,
            SegmentRegister::Ss => &mut self.ss,
            SegmentRegister::Ds => &mut self.ds,
            SegmentRegister::Fs => &mut self.fs,
            SegmentRegister::Gs => &mut self.gs,
            SegmentRegister::Gdtr => &mut self.gdtr,
            SegmentRegister::Ldtr => &mut self.ldtr,
            SegmentRegister::Idtr => &mut self.idtr,
            SegmentRegister::Tr => &mut self.tr,
        }
    }
}

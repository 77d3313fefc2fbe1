//! How each type of value in the table travels, and its leaves by name.
//!
//! `store` and `load` are one another's inverse; `load` takes anything and refuses what `store` cannot have written, so
//! equal states have equal bytes. This file refuses to know which fields exist (`fields`).

use std::collections::BTreeMap;

use proto::v1::{MsrState, SegmentState, XsaveComponent};

use crate::cpu::fields::RunState;
use crate::cpu::fpu::{FxState, LATER_COMPONENT_MAX};
use crate::vmcb::segment::ATTRIB_MASK;
use crate::vmcb::{Event, Segment};

/// A saved CPU state that no encoder wrote.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    /// A value is out of range or of the wrong length.
    #[error("CPU state: field {field}: {problem}")]
    Malformed {
        /// Name of the row.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Not a `CpuStateV1` at all.
    #[error("CPU state: not a CpuStateV1 message")]
    NotAMessage(#[source] prost::DecodeError),
}

pub(crate) fn malformed<T>(field: &'static str, problem: impl Into<String>) -> Result<T, DecodeError> {
    Err(DecodeError::Malformed { field, problem: problem.into() })
}

/// One named value of a state: what a digest covers and a comparison prints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// For example `rax`, `cs.base`, `msr c0000082`, `xmm3`.
    pub name: String,
    /// Little-endian bytes.
    pub value: LeafValue,
}

/// A number, or bytes that are none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LeafValue {
    /// Up to 64 bits.
    Word(u64),
    /// Anything longer.
    Bytes(Vec<u8>),
}

impl std::fmt::Display for LeafValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LeafValue::Word(word) => write!(f, "{word:#x}"),
            LeafValue::Bytes(bytes) => bytes.iter().rev().try_for_each(|byte| write!(f, "{byte:02x}")),
        }
    }
}

/// Names of the general registers, in encoding order.
pub const GPR_NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// Names of the debug registers, in the order of `drs`.
pub const DR_NAMES: [&str; 6] = ["dr0", "dr1", "dr2", "dr3", "dr6", "dr7"];

/// No contract has more MSRs than this.
const MSRS_MAX: usize = 4096;

/// A value that travels in the wire fields `Wire` (a tuple, one element a field).
pub(crate) trait Stored: Sized {
    type Wire;
    fn store(&self) -> Self::Wire;
    fn load(field: &'static str, wire: Self::Wire) -> Result<Self, DecodeError>;
    fn leaves(&self, field: &'static str, visit: &mut dyn FnMut(Leaf));
}

fn word(name: impl Into<String>, value: u64) -> Leaf {
    Leaf { name: name.into(), value: LeafValue::Word(value) }
}

impl Stored for u64 {
    type Wire = (u64,);
    fn store(&self) -> (u64,) {
        (*self,)
    }
    fn load(field: &'static str, (value,): (u64,)) -> Result<u64, DecodeError> {
        if field == "cr8" && value > 15 {
            return malformed(field, format!("{value:#x} is above 15"));
        }
        Ok(value)
    }
    fn leaves(&self, field: &'static str, visit: &mut dyn FnMut(Leaf)) {
        visit(word(field, *self));
    }
}

impl Stored for bool {
    type Wire = (bool,);
    fn store(&self) -> (bool,) {
        (*self,)
    }
    fn load(_: &'static str, (value,): (bool,)) -> Result<bool, DecodeError> {
        Ok(value)
    }
    fn leaves(&self, field: &'static str, visit: &mut dyn FnMut(Leaf)) {
        visit(word(field, u64::from(*self)));
    }
}

/// The privilege level is the only byte of the table.
impl Stored for u8 {
    type Wire = (u32,);
    fn store(&self) -> (u32,) {
        (u32::from(*self),)
    }
    fn load(field: &'static str, (value,): (u32,)) -> Result<u8, DecodeError> {
        match u8::try_from(value) {
            Ok(level @ 0..=3) => Ok(level),
            _ => malformed(field, format!("{value} is above 3")),
        }
    }
    fn leaves(&self, field: &'static str, visit: &mut dyn FnMut(Leaf)) {
        visit(word(field, u64::from(*self)));
    }
}

impl<const N: usize> Stored for [u64; N] {
    type Wire = (Vec<u64>,);
    fn store(&self) -> (Vec<u64>,) {
        (self.to_vec(),)
    }
    fn load(field: &'static str, (values,): (Vec<u64>,)) -> Result<[u64; N], DecodeError> {
        let found = values.len();
        <[u64; N]>::try_from(values).or_else(|_| malformed(field, format!("{found} values, {N} expected")))
    }
    fn leaves(&self, field: &'static str, visit: &mut dyn FnMut(Leaf)) {
        let names: &[&str] = if field == "gprs" { &GPR_NAMES } else { &DR_NAMES };
        self.iter().zip(names).for_each(|(value, name)| visit(word(*name, *value)));
    }
}

impl Stored for Segment {
    type Wire = (Option<SegmentState>,);
    fn store(&self) -> Self::Wire {
        (Some(SegmentState {
            selector: u32::from(self.selector),
            attrib: u32::from(self.attrib & ATTRIB_MASK),
            limit: self.limit,
            base: self.base,
        }),)
    }
    fn load(field: &'static str, (state,): Self::Wire) -> Result<Segment, DecodeError> {
        let Some(SegmentState { selector, attrib, limit, base }) = state else {
            return malformed(field, "missing");
        };
        let Ok(selector) = u16::try_from(selector) else {
            return malformed(field, format!("selector {selector:#x} is wider than 16 bits"));
        };
        match u16::try_from(attrib) {
            Ok(attrib) if attrib & !ATTRIB_MASK == 0 => Ok(Segment { selector, attrib, limit, base }),
            _ => malformed(field, format!("attrib {attrib:#x} is wider than 12 bits")),
        }
    }
    fn leaves(&self, field: &'static str, visit: &mut dyn FnMut(Leaf)) {
        visit(word(format!("{field}.selector"), u64::from(self.selector)));
        visit(word(format!("{field}.attrib"), u64::from(self.attrib & ATTRIB_MASK)));
        visit(word(format!("{field}.limit"), u64::from(self.limit)));
        visit(word(format!("{field}.base"), self.base));
    }
}

impl Stored for BTreeMap<u32, u64> {
    type Wire = (Vec<MsrState>,);
    fn store(&self) -> Self::Wire {
        (self.iter().map(|(&index, &value)| MsrState { index, value }).collect(),)
    }
    fn load(field: &'static str, (msrs,): Self::Wire) -> Result<Self, DecodeError> {
        if msrs.len() > MSRS_MAX {
            return malformed(field, format!("{} MSRs, at most {MSRS_MAX} expected", msrs.len()));
        }
        if let Some(pair) = msrs.windows(2).find(|pair| pair[0].index >= pair[1].index) {
            return malformed(field, format!("MSR {:#x} is out of order or twice", pair[1].index));
        }
        Ok(msrs.into_iter().map(|msr| (msr.index, msr.value)).collect())
    }
    fn leaves(&self, _: &'static str, visit: &mut dyn FnMut(Leaf)) {
        self.iter().for_each(|(index, value)| visit(word(format!("msr {index:x}"), *value)));
    }
}

impl Stored for Event {
    type Wire = (u64,);
    fn store(&self) -> (u64,) {
        (self.0,)
    }
    fn load(field: &'static str, (value,): (u64,)) -> Result<Event, DecodeError> {
        match (Event(value), Event(value).illegal()) {
            (_, Some(problem)) => malformed(field, problem),
            (event, None) if event.valid() || value == 0 => Ok(event),
            _ => malformed(field, format!("{value:#x} is not valid and not zero")),
        }
    }
    fn leaves(&self, field: &'static str, visit: &mut dyn FnMut(Leaf)) {
        visit(word(field, self.0));
    }
}

impl Stored for RunState {
    type Wire = (u32,);
    fn store(&self) -> (u32,) {
        (*self as u32,)
    }
    fn load(field: &'static str, (value,): (u32,)) -> Result<RunState, DecodeError> {
        match value {
            0 => Ok(RunState::Runnable),
            1 => Ok(RunState::Uninitialised),
            2 => Ok(RunState::InitReceived),
            3 => Ok(RunState::Halted),
            _ => malformed(field, format!("{value} is not a run state")),
        }
    }
    fn leaves(&self, field: &'static str, visit: &mut dyn FnMut(Leaf)) {
        visit(word(field, *self as u64));
    }
}

impl Stored for Box<FxState> {
    type Wire = (Vec<XsaveComponent>, u32);
    fn store(&self) -> Self::Wire {
        let mut components = vec![
            XsaveComponent { id: 0, data: self.x87_component().to_vec() },
            XsaveComponent { id: 1, data: self.sse_component().to_vec() },
        ];
        components.extend(self.later.iter().map(|(&id, data)| XsaveComponent { id, data: data.clone() }));
        (components, self.mxcsr())
    }
    fn load(field: &'static str, (components, mxcsr): Self::Wire) -> Result<Self, DecodeError> {
        let ascending = components.windows(2).all(|pair| pair[0].id < pair[1].id);
        let [x87, sse, later @ ..] = components.as_slice() else {
            return malformed(field, "x87 and SSE components missing");
        };
        if !ascending || x87.id != 0 || sse.id != 1 {
            return malformed(field, "components missing, out of order, or twice");
        }
        let Some(mut state) = FxState::from_components(&x87.data, &sse.data, mxcsr) else {
            return malformed(
                field,
                "x87 or SSE component has a wrong length or reserved bytes, or MXCSR reserved bits",
            );
        };
        for component in later {
            if component.id > 62 || component.data.len() > LATER_COMPONENT_MAX {
                return malformed(field, format!("component {} is not one of XSAVE's", component.id));
            }
            state.later.insert(component.id, component.data.clone());
        }
        Ok(Box::new(state))
    }
    fn leaves(&self, _: &'static str, visit: &mut dyn FnMut(Leaf)) {
        visit(word("fcw", u64::from(self.fcw())));
        visit(word("fsw", u64::from(self.fsw())));
        visit(word("ftw", u64::from(self.ftw())));
        visit(word("fop", u64::from(self.fop())));
        visit(word("fip", self.fip()));
        visit(word("fdp", self.fdp()));
        visit(word("mxcsr", u64::from(self.mxcsr())));
        for register in 0..8 {
            visit(Leaf { name: format!("st{register}"), value: LeafValue::Bytes(self.st(register).to_vec()) });
        }
        for register in 0..16 {
            let bytes = self.xmm(register).to_le_bytes().to_vec();
            visit(Leaf { name: format!("xmm{register}"), value: LeafValue::Bytes(bytes) });
        }
        for (id, data) in &self.later {
            visit(Leaf { name: format!("xsave {id}"), value: LeafValue::Bytes(data.clone()) });
        }
    }
}

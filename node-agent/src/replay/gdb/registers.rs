//! x86-64 registers as gdb numbers them: one table from which the target description, the bytes of the `g` packet and
//! single registers follow. The features `core`, `sse` and `segments` are gdb's own names with gdb's own order; what a
//! kernel developer wants besides (control registers, EFER, the other GS base) is a feature of ours behind them.
//!
//! This file refuses to know packets and where a state comes from. Sources: gdb manual, appendix G.5.14; APM2 11.4.4.

use std::fmt::Write;
use std::num::NonZeroUsize;
use std::sync::LazyLock;

use gdbstub::arch::{Arch, RegId, Registers};
use vmcb_engine::cpu::{CpuState, FxState};

/// MSR that SWAPGS exchanges with the base of GS.
const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// General registers in gdb's order, as indices in encoding order.
const GENERAL: [(&str, usize); 16] = [
    ("rax", 0),
    ("rbx", 3),
    ("rcx", 1),
    ("rdx", 2),
    ("rsi", 6),
    ("rdi", 7),
    ("rbp", 5),
    ("rsp", 4),
    ("r8", 8),
    ("r9", 9),
    ("r10", 10),
    ("r11", 11),
    ("r12", 12),
    ("r13", 13),
    ("r14", 14),
    ("r15", 15),
];
const X87_CONTROL: [&str; 8] = ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"];

/// One register: its description, and how its bytes are taken from a state and put into one.
struct Row {
    feature: &'static str,
    name: String,
    bits: usize,
    kind: &'static str,
    group: &'static str,
    value: fn(&CpuState, usize) -> u128,
    put: Option<Put>,
    index: usize,
}

/// Puts a value into a state.
type Put = fn(&mut CpuState, usize, u128);

const CORE: &str = "org.gnu.gdb.i386.core";
const SSE: &str = "org.gnu.gdb.i386.sse";
const SEGMENTS: &str = "org.gnu.gdb.i386.segments";
const SYSTEM: &str = "org.godwit.x86.system";

static ROWS: LazyLock<Vec<Row>> = LazyLock::new(rows);
static DESCRIPTION: LazyLock<String> = LazyLock::new(description);

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |feature, name: &str, (bits, kind), group, index, value: fn(&CpuState, usize) -> u128| {
        rows.push(Row { feature, name: name.to_owned(), bits, kind, group, value, put: put_of(name), index });
    };
    for (name, index) in GENERAL {
        let kind = if matches!(name, "rbp" | "rsp") { "data_ptr" } else { "int64" };
        add(CORE, name, (64, kind), "general", index, |state, index| state.gprs[index].into());
    }
    add(CORE, "rip", (64, "code_ptr"), "general", 0, |state, _| state.rip.into());
    add(CORE, "eflags", (32, "i386_eflags"), "general", 0, |state, _| state.rflags.into());
    for (index, name) in ["cs", "ss", "ds", "es", "fs", "gs"].into_iter().enumerate() {
        add(CORE, name, (32, "int32"), "general", index, |state, index| {
            let segments = [&state.cs, &state.ss, &state.ds, &state.es, &state.fs, &state.gs];
            segments[index].selector.into()
        });
    }
    for index in 0..8 {
        add(CORE, &format!("st{index}"), (80, "i387_ext"), "float", index, |state, index| {
            let mut bytes = [0; 16];
            bytes[..10].copy_from_slice(&state.fpu.st(index));
            u128::from_le_bytes(bytes)
        });
    }
    for (index, name) in X87_CONTROL.into_iter().enumerate() {
        add(CORE, name, (32, "int"), "float", index, |state, index| x87_control(&state.fpu, index).into());
    }
    for index in 0..16 {
        add(SSE, &format!("xmm{index}"), (128, "vec128"), "vector", index, |state, index| state.fpu.xmm(index));
    }
    add(SSE, "mxcsr", (32, "i386_mxcsr"), "vector", 0, |state, _| state.fpu.mxcsr().into());
    add(SEGMENTS, "fs_base", (64, "int64"), "general", 0, |state, _| state.fs.base.into());
    add(SEGMENTS, "gs_base", (64, "int64"), "general", 0, |state, _| state.gs.base.into());
    add(SYSTEM, "k_gs_base", (64, "int64"), "system", 0, |state, _| {
        state.msrs.get(&KERNEL_GS_BASE).copied().unwrap_or(0).into()
    });
    for (index, name) in ["cr0", "cr2", "cr3", "cr4", "cr8", "efer"].into_iter().enumerate() {
        add(SYSTEM, name, (64, "int64"), "system", index, |state, index| {
            [state.cr0, state.cr2, state.cr3, state.cr4, state.cr8, state.efer][index].into()
        });
    }
    rows
}

/// How a register is changed; none: a selector alone makes no segment, and what the x87 unit did last is not to be made up.
fn put_of(name: &str) -> Option<Put> {
    let digits = name.ends_with(|last: char| last.is_ascii_digit());
    Some(match name {
        _ if GENERAL.iter().any(|(general, _)| *general == name) => {
            |state, index, value| state.gprs[index] = value as u64
        }
        "rip" => |state, _, value| state.rip = value as u64,
        "eflags" => |state, _, value| state.rflags = value as u64,
        "fctrl" => |state, _, value| state.fpu.set_fcw(value as u16),
        "fstat" => |state, _, value| state.fpu.set_fsw(value as u16),
        "ftag" => |state, _, value| {
            let empty = |physical: usize| value >> (2 * physical) & 3 == 3;
            state.fpu.set_ftw((0..8).filter(|physical| !empty(*physical)).fold(0, |tags, bit| tags | 1 << bit));
        },
        "mxcsr" => |state, _, value| state.fpu.set_mxcsr(value as u32),
        "fs_base" => |state, _, value| state.fs.base = value as u64,
        "gs_base" => |state, _, value| state.gs.base = value as u64,
        "k_gs_base" => |state, _, value| {
            if let Some(base) = state.msrs.get_mut(&KERNEL_GS_BASE) {
                *base = value as u64;
            }
        },
        "cr0" => |state, _, value| state.cr0 = value as u64,
        "cr2" => |state, _, value| state.cr2 = value as u64,
        "cr3" => |state, _, value| state.cr3 = value as u64,
        "cr4" => |state, _, value| state.cr4 = value as u64,
        "cr8" => |state, _, value| state.cr8 = value as u64,
        "efer" => |state, _, value| state.efer = value as u64,
        _ if name.starts_with("xmm") && digits => |state, index, value| state.fpu.set_xmm(index, value),
        _ if name.starts_with("st") && digits => |state, index, value| {
            let mut bytes = [0; 10];
            bytes.copy_from_slice(&value.to_le_bytes()[..10]);
            state.fpu.set_st(index, bytes);
        },
        _ => return None,
    })
}

fn x87_control(fpu: &FxState, index: usize) -> u32 {
    match index {
        0 => fpu.fcw().into(),
        1 => fpu.fsw().into(),
        2 => full_tags(fpu),
        3 => (fpu.fip() >> 32) as u32 & 0xffff,
        4 => fpu.fip() as u32,
        5 => (fpu.fdp() >> 32) as u32 & 0xffff,
        6 => fpu.fdp() as u32,
        _ => fpu.fop().into(),
    }
}

/// Two bits a physical register: valid, zero, special, empty (APM1 6.2.4); the image has only "empty or not".
fn full_tags(fpu: &FxState) -> u32 {
    let top = usize::from(fpu.fsw() >> 11 & 7);
    let tag = |physical: usize| {
        if fpu.ftw() >> physical & 1 == 0 {
            return 3;
        }
        let value = fpu.st((physical + 8 - top) % 8);
        let significand = u64::from_le_bytes(value[..8].try_into().expect("eight of ten bytes"));
        let exponent = u16::from_le_bytes([value[8], value[9]]) & 0x7fff;
        match (exponent, significand) {
            (0, 0) => 1,
            (0 | 0x7fff, _) => 2,
            (_, significand) if significand >> 63 == 0 => 2,
            _ => 0,
        }
    };
    (0..8).fold(0, |word, physical| word | tag(physical) << (2 * physical))
}

/// Types that gdb wants to be told of before they are used.
fn types(feature: &str) -> &'static str {
    match feature {
        CORE => concat!(
            r#"<flags id="i386_eflags" size="4">"#,
            r#"<field name="CF" start="0" end="0"/><field name="" start="1" end="1"/>"#,
            r#"<field name="PF" start="2" end="2"/><field name="AF" start="4" end="4"/>"#,
            r#"<field name="ZF" start="6" end="6"/><field name="SF" start="7" end="7"/>"#,
            r#"<field name="TF" start="8" end="8"/><field name="IF" start="9" end="9"/>"#,
            r#"<field name="DF" start="10" end="10"/><field name="OF" start="11" end="11"/>"#,
            r#"<field name="NT" start="14" end="14"/><field name="RF" start="16" end="16"/>"#,
            r#"<field name="VM" start="17" end="17"/><field name="AC" start="18" end="18"/>"#,
            r#"<field name="VIF" start="19" end="19"/><field name="VIP" start="20" end="20"/>"#,
            r#"<field name="ID" start="21" end="21"/></flags>"#,
        ),
        SSE => concat!(
            r#"<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/>"#,
            r#"<vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/>"#,
            r#"<vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/>"#,
            r#"<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>"#,
            r#"<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/>"#,
            r#"<field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/>"#,
            r#"<field name="uint128" type="uint128"/></union>"#,
            r#"<flags id="i386_mxcsr" size="4"><field name="IE" start="0" end="0"/><field name="DE" start="1" end="1"/>"#,
            r#"<field name="ZE" start="2" end="2"/><field name="OE" start="3" end="3"/>"#,
            r#"<field name="UE" start="4" end="4"/><field name="PE" start="5" end="5"/>"#,
            r#"<field name="DAZ" start="6" end="6"/><field name="IM" start="7" end="7"/>"#,
            r#"<field name="DM" start="8" end="8"/><field name="ZM" start="9" end="9"/>"#,
            r#"<field name="OM" start="10" end="10"/><field name="UM" start="11" end="11"/>"#,
            r#"<field name="PM" start="12" end="12"/><field name="FZ" start="15" end="15"/></flags>"#,
        ),
        _ => "",
    }
}

fn description() -> String {
    let mut xml = String::from(
        r#"<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0"><architecture>i386:x86-64</architecture>"#,
    );
    for feature in [CORE, SSE, SEGMENTS, SYSTEM] {
        let _infallible = write!(xml, r#"<feature name="{feature}">{}"#, types(feature));
        for row in ROWS.iter().filter(|row| row.feature == feature) {
            let Row { name, bits, kind, group, .. } = row;
            let _infallible = write!(xml, r#"<reg name="{name}" bitsize="{bits}" type="{kind}" group="{group}"/>"#);
        }
        xml.push_str("</feature>");
    }
    xml.push_str("</target>");
    xml
}

/// x86-64 with the registers of the table.
pub enum X86_64 {}

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = RegisterFile;
    type BreakpointKind = usize;
    type RegId = RegisterNumber;

    fn target_description_xml() -> Option<&'static str> {
        Some(&DESCRIPTION)
    }
}

/// All registers as gdb receives them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RegisterFile {
    bytes: Vec<u8>,
    rip: u64,
}

impl RegisterFile {
    /// Those of a state.
    pub fn of(state: &CpuState) -> Self {
        let bytes = (0..ROWS.len()).filter_map(|number| RegisterNumber(number).bytes(state)).flatten().collect();
        Self { bytes, rip: state.rip }
    }

    /// Puts what differs into a state.
    ///
    /// # Errors
    /// Not all registers are there, or one that cannot be changed differs; for people.
    pub fn put_into(&self, state: &mut CpuState) -> Result<(), String> {
        let mut rest = &self.bytes[..];
        for (number, row) in ROWS.iter().enumerate() {
            let (bytes, behind) = rest.split_at_checked(row.bits / 8).ok_or("these are not all registers")?;
            RegisterNumber(number).put(state, bytes)?;
            rest = behind;
        }
        Ok(())
    }
}

impl Registers for RegisterFile {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.bytes.iter().for_each(|byte| write_byte(Some(*byte)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.bytes = bytes.to_vec();
        Ok(())
    }
}

/// Number of a register in the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegisterNumber(usize);

impl RegisterNumber {
    /// Its bytes, little endian.
    pub fn bytes(self, state: &CpuState) -> Option<Vec<u8>> {
        let row = ROWS.get(self.0)?;
        Some((row.value)(state, row.index).to_le_bytes()[..row.bits / 8].to_vec())
    }

    /// Puts bytes into a state, little endian.
    ///
    /// # Errors
    /// No such register, not as many bytes as it has, or it is not one that can be changed; for people.
    pub fn put(self, state: &mut CpuState, bytes: &[u8]) -> Result<(), String> {
        let row = ROWS.get(self.0).ok_or("there is no such register")?;
        if bytes.len() != row.bits / 8 {
            return Err(format!("{} has {} bits, not {}", row.name, row.bits, bytes.len() * 8));
        }
        let mut word = [0; 16];
        word[..bytes.len()].copy_from_slice(bytes);
        let value = u128::from_le_bytes(word);
        if value == (row.value)(state, row.index) {
            return Ok(());
        }
        let put = row.put.ok_or_else(|| format!("{} cannot be changed by itself", row.name))?;
        put(state, row.index, value);
        Ok(())
    }
}

impl RegId for RegisterNumber {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let row = ROWS.get(id)?;
        Some((Self(id), NonZeroUsize::new(row.bits / 8)))
    }

    fn to_raw_id(&self) -> Option<usize> {
        Some(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(name: &str) -> RegisterNumber {
        RegisterNumber(ROWS.iter().position(|row| row.name == name).unwrap())
    }

    #[test]
    fn registers_lie_where_gdb_looks_for_them() {
        // The numbers of gdb's amd64 registers: rip is 16, st0 24, xmm0 40, mxcsr 56.
        let names =
            [("rax", 0), ("rbx", 1), ("rip", 16), ("gs", 23), ("st0", 24), ("fctrl", 32), ("xmm0", 40), ("mxcsr", 56)];
        for (name, at) in names {
            assert_eq!(number(name).0, at, "{name}");
        }
        let mut state = CpuState { rip: 0x1234_5678_9abc, ..CpuState::reset() };
        state.gprs[3] = 0xb;
        state.gs.base = 0xffff_8880_0000_0000;
        state.msrs.insert(KERNEL_GS_BASE, 7);
        state.fpu.set_xmm(15, 1 << 127);
        let word = |name| u64::from_le_bytes(number(name).bytes(&state).unwrap().try_into().unwrap());
        assert_eq!((word("rip"), word("rbx"), word("gs_base")), (0x1234_5678_9abc, 0xb, 0xffff_8880_0000_0000));
        assert_eq!((word("k_gs_base"), word("cr0")), (7, 0x6000_0010));
        assert_eq!(number("xmm15").bytes(&state).unwrap()[15], 0x80);
        let all = RegisterFile::of(&state);
        assert_eq!(all.bytes.len(), ROWS.iter().map(|row| row.bits / 8).sum::<usize>());
        assert_eq!(RegisterNumber::from_raw_id(ROWS.len()), None);
    }

    #[test]
    fn tags_say_what_registers_hold() {
        let mut fpu = FxState::fninit();
        assert_eq!(full_tags(&fpu), 0xffff);
        // TOP is 6: ST0 is physical register 6, ST1 is 7.
        fpu.set_fsw(6 << 11);
        fpu.set_ftw(0b1100_0000);
        fpu.set_st(0, [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
        assert_eq!(full_tags(&fpu), 0b01_00_11_11_11_11_11_11);
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let mut state = CpuState::reset();
        state.msrs.insert(KERNEL_GS_BASE, 0);
        for (at, row) in ROWS.iter().enumerate() {
            let bytes = vec![0x15; row.bits / 8];
            let selector = (17..24).contains(&at) && row.name != "eflags";
            let pointer = ["fiseg", "fioff", "foseg", "fooff", "fop"].contains(&row.name.as_str());
            let put = RegisterNumber(at).put(&mut state, &bytes);
            assert_eq!(put.is_err(), selector || pointer, "{}: {put:?}", row.name);
            // Of these there are fewer bits than gdb has room for.
            if put.is_ok() && !["ftag", "mxcsr", "fctrl", "fstat"].contains(&row.name.as_str()) {
                assert_eq!(RegisterNumber(at).bytes(&state).unwrap(), bytes, "{}", row.name);
            }
            assert!(RegisterNumber(at).put(&mut state, &[0; 3]).is_err());
        }
        let mut other = CpuState::reset();
        other.gprs = state.gprs;
        let all = RegisterFile::of(&other);
        let mut copy = CpuState::reset();
        all.put_into(&mut copy).unwrap();
        assert_eq!(RegisterFile::of(&copy), all);
        let cut = RegisterFile { bytes: all.bytes[..20].to_vec(), rip: 0 };
        assert!(cut.put_into(&mut copy).is_err());
    }

    #[test]
    fn the_description_names_each_register_once() {
        for row in ROWS.iter() {
            let needle = format!("name=\"{}\" bitsize", row.name);
            assert_eq!(DESCRIPTION.matches(&needle).count(), 1, "{needle}");
        }
    }
}

//! What a debugger and a recording ask of a machine that stands still: registers, addresses, digests.
//!
//! Looking is never visible to the guest: nothing is forgotten, no accessed bit is set, no device is asked. Changing
//! registers is an input of the guest like any other, and its caches forget what they know of the vCPU. RAM is read and
//! written through [`Machine::memory`], which stamps what it writes and reports decoded code.
//!
//! Linear addresses are translated by the guest's own tables (APM2 chapter 5), rights not asked. This file refuses to know
//! who looks.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use proto::ids::Digest;
use proto::v1::Section;

use super::{Life, Machine, MachineError};
use crate::addr::is_canonical;
use crate::cpu::CpuState;
use crate::engine::{Clock, LoadError, Stops, Uses};
use crate::memory::{GuestMemory, PAGE_BYTES};
use crate::snapshot::state_digest;
use crate::vmcb::registers::{cr0, cr4, efer};
use crate::vmcb::segment::ATTRIB_DB;

/// MSRs that a device follows: they change by the guest's own hand only.
const FOLLOWED_MSRS: [u32; 2] = [0x4b56_4d00, 0x4b56_4d01];

/// Longest instruction.
const INSTRUCTION_BYTES_MAX: usize = 15;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// Digests of all state but RAM and disks, cheap enough to be taken often.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Probe {
    /// The machine's time.
    pub clock: Clock,
    /// BLAKE3 of each vCPU's encoded state.
    pub cpus: Vec<Digest>,
    /// Digest of the devices' sections.
    pub devices: Digest,
}

impl Machine {
    /// State of a vCPU, as [`Machine::capture`] would have it; nothing is forgotten. `None` if there is no such vCPU, or its
    /// engine does not give it.
    pub fn peek_cpu(&self, vcpu: usize) -> Option<CpuState> {
        if vcpu >= self.bus.vcpus() {
            return None;
        }
        let mut state = self.engine.peek(vcpu).ok()?;
        if !self.engine.runs_in_real_time() {
            // The task priority lives in the local APIC, and that is the bus's.
            state.cr8 = self.bus.cr8(vcpu).into();
        }
        Some(state)
    }

    /// Gives a vCPU another state: an input of the guest. Its cached translations are forgotten.
    ///
    /// # Errors
    /// The machine has no state or no such vCPU; a state that VMRUN would refuse, that has other MSRs than the vCPU has,
    /// or changes one that a device follows. Then nothing has changed.
    pub fn poke_cpu(&mut self, vcpu: usize, state: &CpuState) -> Result<(), MachineError> {
        if self.life != Life::Ready {
            return Err(MachineError::Empty);
        }
        if self.engine.runs_in_real_time() {
            return Err(MachineError::SoftOnly("changing registers"));
        }
        let load = |source| MachineError::Load { vcpu, source };
        let now = self.peek_cpu(vcpu).ok_or_else(|| load(LoadError::NoVcpu(vcpu)))?;
        if !state.msrs.keys().eq(now.msrs.keys()) {
            return Err(load(LoadError::Illegal("it has other MSRs than this vCPU".to_owned())));
        }
        if let Some(msr) = FOLLOWED_MSRS.iter().find(|msr| state.msrs.get(msr) != now.msrs.get(msr)) {
            return Err(load(LoadError::Illegal(format!("MSR {msr:#x} changes by the guest's own hand only"))));
        }
        let priority = u8::try_from(state.cr8).ok().filter(|priority| *priority < 16);
        let priority = priority.ok_or_else(|| load(LoadError::Illegal(format!("cr8 is {:#x}", state.cr8))))?;
        self.engine.load(vcpu, state).map_err(load)?;
        self.bus.set_cr8(vcpu, priority);
        Ok(())
    }

    /// Guest-physical address of a linear one, by the tables of a vCPU as they are now in RAM: what a walk would find, not
    /// what is cached. `None` if nothing is mapped there. Without paging linear is physical.
    pub fn translate(&self, vcpu: usize, linear: u64) -> Option<u64> {
        let state = self.peek_cpu(vcpu)?;
        translate(&self.memory, &state, linear)
    }

    /// Linear address of the instruction before which a vCPU stands; `None` if there is no such vCPU.
    pub fn stands_at(&self, vcpu: usize) -> Option<u64> {
        self.peek_cpu(vcpu).map(|state| state.code_address())
    }

    /// Sections of the devices, as [`Machine::capture`] would have them; nothing is forgotten.
    pub fn device_sections(&self) -> Vec<Section> {
        self.bus.save()
    }

    /// Instructions that had retired over all vCPUs after this one's last; `None` if it has run none since the machine was
    /// built, reset, or climbed to a rung.
    pub fn last_ran(&self, vcpu: usize) -> Option<u64> {
        self.engine.last_ran(vcpu)
    }

    /// The vCPU that retired the last instruction.
    pub fn current_vcpu(&self) -> usize {
        self.engine.current()
    }

    /// Reads linear memory by the tables of a vCPU; how many bytes from the beginning are mapped RAM.
    pub fn read_linear(&self, vcpu: usize, linear: u64, into: &mut [u8]) -> usize {
        self.read_by(|at| self.translate(vcpu, at), linear, into)
    }

    /// Reads guest-physical memory; how many bytes from the beginning are RAM.
    pub fn read_physical(&self, gpa: u64, into: &mut [u8]) -> usize {
        self.read_by(Some, gpa, into)
    }

    fn read_by(&self, gpa_of: impl Fn(u64) -> Option<u64>, start: u64, into: &mut [u8]) -> usize {
        let mut done = 0;
        while done < into.len() {
            let Some(at) = start.checked_add(done as u64) else { break };
            let Some(gpa) = gpa_of(at) else { break };
            let end = into.len().min(done + (PAGE_BYTES - at % PAGE_BYTES) as usize);
            if self.memory.read(gpa, &mut into[done..end]).is_err() {
                break;
            }
            done = end;
        }
        done
    }

    /// The instruction that a vCPU executes next, in Intel's syntax, and its bytes; `None` if there is no such vCPU, or no
    /// instruction can be read there.
    pub fn next_instruction(&self, vcpu: usize) -> Option<(String, Vec<u8>)> {
        let state = self.peek_cpu(vcpu)?;
        let mut bytes = [0; INSTRUCTION_BYTES_MAX];
        let read = self.read_linear(vcpu, state.code_address(), &mut bytes);
        let bits = match (state.is_64_bit(), ATTRIB_DB.get(state.cs.attrib.into())) {
            (true, _) => 64,
            (false, 1) => 32,
            _ => 16,
        };
        let instruction = Decoder::with_ip(bits, &bytes[..read], state.rip, DecoderOptions::AMD).decode();
        if instruction.is_invalid() {
            return None;
        }
        let mut text = String::new();
        IntelFormatter::new().format(&instruction, &mut text);
        Some((text, bytes[..instruction.len()].to_vec()))
    }

    /// Runs come back there from now on; replaces what was set before. Not part of the machine's state, and nothing that
    /// the guest could notice.
    pub fn set_stops(&mut self, stops: &Stops) {
        self.stops = stops.clone();
        self.engine.set_stops(stops);
    }

    /// Where runs come back.
    pub fn stops(&self) -> &Stops {
        &self.stops
    }

    /// What may have been used since this was asked last; `None`: anything. Whoever climbs asks then, too: what was used before
    /// is no use of what comes.
    pub fn take_uses(&mut self) -> Option<Uses> {
        self.engine.take_uses()
    }

    /// The engine does its work with decoded blocks of at most so many operations from now on, all of them decoded anew. No
    /// guest can tell: two executions that differ show a fault of the engine.
    pub fn set_block_ops_max(&mut self, ops_max: usize) {
        self.engine.set_block_ops_max(ops_max);
    }

    /// The instructions before which the vCPUs stand now are executed without a stop. After a breakpoint that is so by
    /// itself; a machine that was put to that place by other means does not know that it was met.
    pub fn pass_breakpoints(&mut self) {
        self.engine.pass_breakpoints();
    }

    /// Digests of the state now; see [`Probe`].
    pub fn probe(&self) -> Probe {
        let cpus = (0..self.bus.vcpus()).filter_map(|vcpu| self.peek_cpu(vcpu));
        Probe {
            clock: self.engine.clock(),
            cpus: cpus.map(|state| Digest(*blake3::hash(&state.to_bytes()).as_bytes())).collect(),
            devices: state_digest(&self.bus.save()),
        }
    }
}

/// Walks the tables of `state`.
fn translate(memory: &GuestMemory, state: &CpuState, linear: u64) -> Option<u64> {
    let long = state.efer & efer::LME != 0;
    if state.cr0 & cr0::PG == 0 {
        return Some(linear & 0xffff_ffff);
    }
    if long && state.cr4 & cr4::PAE != 0 {
        return is_canonical(linear, 48).then(|| walk_wide(memory, linear, 4, state.cr3 & ADDRESS))?;
    }
    let linear = linear & 0xffff_ffff;
    if state.cr4 & cr4::PAE != 0 {
        return walk_wide(memory, linear, 3, state.cr3 & 0xffff_ffe0);
    }
    walk_legacy(memory, linear, state.cr3 & 0xffff_f000, state.cr4 & cr4::PSE != 0)
}

/// Eight-byte entries (APM2 5.2.3, 5.3).
fn walk_wide(memory: &GuestMemory, linear: u64, levels: u32, root: u64) -> Option<u64> {
    let mut table = root;
    for level in (0..levels).rev() {
        let mut bytes = [0; 8];
        memory.read(table + (linear >> (12 + 9 * level) & 0x1ff) * 8, &mut bytes).ok()?;
        let entry = u64::from_le_bytes(bytes);
        if entry & PRESENT == 0 {
            return None;
        }
        let large = entry & LARGE != 0 && (level == 1 || (level == 2 && levels == 4));
        if level == 0 || large {
            let mask = (1 << (12 + 9 * level)) - 1;
            return Some(entry & ADDRESS & !mask | linear & mask);
        }
        table = entry & ADDRESS;
    }
    None
}

/// Four-byte entries (APM2 5.2.1, 5.2.2).
fn walk_legacy(memory: &GuestMemory, linear: u64, root: u64, pse: bool) -> Option<u64> {
    let entry = |at: u64| {
        let mut bytes = [0; 4];
        memory.read(at, &mut bytes).ok()?;
        Some(u64::from(u32::from_le_bytes(bytes))).filter(|entry| entry & PRESENT != 0)
    };
    let directory = entry(root + (linear >> 22) * 4)?;
    if directory & LARGE != 0 && pse {
        return Some(directory & 0xffc0_0000 | (directory >> 13 & 0xff) << 32 | linear & 0x3f_ffff);
    }
    let leaf = entry((directory & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)?;
    Some(leaf & 0xffff_f000 | linear & 0xfff)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(memory: &GuestMemory, at: u64, entry: u64) {
        memory.write(at, &entry.to_le_bytes()).unwrap();
    }

    fn state(cr0: u64, cr4: u64, efer: u64) -> CpuState {
        CpuState { cr0, cr3: 0x1000, cr4, efer, ..CpuState::reset() }
    }

    #[test]
    fn every_form_of_tables_is_walked() {
        let memory = GuestMemory::create(16 << 20).unwrap();
        let real = state(0, 0, 0);
        assert_eq!(translate(&memory, &real, 0x1_0000_5678), Some(0x5678));

        let long = state(cr0::PE | cr0::PG, cr4::PAE, efer::LME | efer::LMA);
        put(&memory, 0x1000, 0x2003);
        put(&memory, 0x2000, 0x3003);
        put(&memory, 0x2008, (3 << 30) | 0x83);
        put(&memory, 0x3000, 0x4003);
        put(&memory, 0x3008, 0x60_0083);
        put(&memory, 0x4008, 1 << 63 | 0x9003);
        assert_eq!(translate(&memory, &long, 0x1abc), Some(0x9abc));
        assert_eq!(translate(&memory, &long, 0x20_1abc), Some(0x60_1abc));
        assert_eq!(translate(&memory, &long, (1 << 30) + 5), Some((3 << 30) + 5));
        for unmapped in [0x2000, 1 << 39, 1 << 63] {
            assert_eq!(translate(&memory, &long, unmapped), None, "{unmapped:#x}");
        }

        let pae = state(cr0::PE | cr0::PG, cr4::PAE, 0);
        put(&memory, 0x1000, 0x3001);
        assert_eq!(translate(&memory, &pae, 0x1abc), Some(0x9abc));

        let legacy = state(cr0::PE | cr0::PG, cr4::PSE, 0);
        put(&memory, 0x1000, 0x0083 | 1 << 13 | 0x0000_2003 << 32);
        put(&memory, 0x2000, 0x9003 << 32);
        assert_eq!(translate(&memory, &legacy, 0x1abc), Some(0x1_0000_1abc));
        assert_eq!(translate(&memory, &legacy, 0x40_1abc), Some(0x9abc));
        assert_eq!(translate(&memory, &legacy, 0x40_0abc), None);
    }
}

//! From a configuration and its parts to a machine with devices and an engine. The configuration came from outside: all
//! of it is checked, and the parts must be what it says.

use std::sync::Arc;

use proto::v1::MachineConfig;
use zerocopy::IntoBytes;

use super::{Life, Machine, MachineError, Parts};
use crate::capability::{CpuModel, Topology};
use crate::cpu::{CpuState, RunState};
use crate::device::bus::{Bus, CARDS_MAX, Fitting, VCPUS_MAX};
use crate::engine::kvm::{KvmConfig, KvmEngine};
use crate::engine::soft::{SoftConfig, SoftEngine, Tuning};
use crate::engine::{Engine, Stops};
use crate::memory::GuestMemory;
use crate::vmcb::Vmcb;

/// TSC rates that make sense: 1 MHz to 100 GHz.
const TSC_HZ: std::ops::RangeInclusive<u64> = 1_000_000..=100_000_000_000;
/// TSC ticks an instruction may take.
const TSC_PER_INSTRUCTION: std::ops::RangeInclusive<u32> = 1..=1_000_000;

fn wrong(field: &'static str, found: impl std::fmt::Display, rule: impl Into<String>) -> MachineError {
    MachineError::Config { field, found: found.to_string(), rule: rule.into() }
}

fn must(holds: bool, field: &'static str, found: impl std::fmt::Display, rule: &str) -> Result<(), MachineError> {
    if holds { Ok(()) } else { Err(wrong(field, found, rule)) }
}

impl Machine {
    /// Builds devices and an engine around the parts. There is no state in RAM yet.
    ///
    /// # Errors
    /// A configuration that makes no machine, or does not fit the parts; a host that cannot run it.
    pub fn build(config: &MachineConfig, parts: Parts) -> Result<Machine, MachineError> {
        Self::build_tuned(config, parts, Tuning::default())
    }

    /// [`Machine::build`] with an engine that does its work otherwise, for tests and measurements.
    ///
    /// # Errors
    /// As [`Machine::build`].
    pub fn build_tuned(config: &MachineConfig, parts: Parts, tuning: Tuning) -> Result<Machine, MachineError> {
        let model = check(config, &parts)?;
        if config.engine == "kvm" {
            let kvm = KvmConfig {
                vcpus: config.vcpus,
                model,
                tsc_hz: config.tsc_hz,
                tsc_per_instruction: config.tsc_per_instruction,
            };
            return Self::assemble(config, parts, move |memory| Ok(Box::new(KvmEngine::new(memory, &kvm)?)));
        }
        must(config.engine == "soft", "engine", &config.engine, "\"soft\" or \"kvm\"")?;
        let soft = SoftConfig {
            vcpus: config.vcpus,
            model,
            tsc_hz: config.tsc_hz,
            tsc_per_instruction: config.tsc_per_instruction,
            tuning,
        };
        Self::assemble(config, parts, move |memory| Ok(Box::new(SoftEngine::new(memory, &soft))))
    }

    /// Builds devices around the parts, and takes the engine from `engine`.
    ///
    /// # Errors
    /// A configuration that makes no machine, or does not fit the parts.
    pub(super) fn assemble(
        config: &MachineConfig,
        parts: Parts,
        make_engine: impl Fn(Arc<GuestMemory>) -> Result<Box<dyn Engine>, MachineError> + 'static,
    ) -> Result<Machine, MachineError> {
        check(config, &parts)?;
        let Parts { memory, disks, nets } = parts;
        let memory = Arc::new(memory);
        let macs = config.nets.iter().map(|net| mac(&net.mac));
        let nets: Result<Vec<_>, _> = macs.zip(nets).map(|(mac, link)| mac.map(|mac| (mac, link))).collect();
        let fitting = Fitting {
            vcpus: config.vcpus as usize,
            seed: seed(&config.seed)?,
            epoch_ns: config.epoch_ns,
            tsc_hz: config.tsc_hz,
            disks,
            nets: nets?,
        };
        let mut bus = Bus::new(Arc::clone(&memory), fitting);
        bus.set_epoch(memory.epoch());
        let mut engine = make_engine(Arc::clone(&memory))?;
        if engine.local_apics().is_some() {
            bus.send_to_engine();
        }
        let make_engine = Box::new(make_engine);
        let stops = Stops::default();
        Ok(Machine {
            config: config.clone(),
            memory,
            bus,
            engine,
            make_engine,
            life: Life::Empty,
            arrived: false,
            stops,
        })
    }
}

fn check(config: &MachineConfig, parts: &Parts) -> Result<CpuModel, MachineError> {
    let vcpus = config.vcpus;
    must((1..=VCPUS_MAX as u32).contains(&vcpus), "vcpus", vcpus, "1 to 32")?;
    let bytes = parts.memory.bytes();
    must(config.memory_bytes == bytes, "memory_bytes", config.memory_bytes, &format!("RAM has {bytes}"))?;
    must(TSC_HZ.contains(&config.tsc_hz), "tsc_hz", config.tsc_hz, "1 MHz to 100 GHz")?;
    let ticks = config.tsc_per_instruction;
    must(TSC_PER_INSTRUCTION.contains(&ticks), "tsc_per_instruction", ticks, "1 to 1000000")?;
    seed(&config.seed)?;
    super::identity::check(&config.generation_id)?;
    let (disks, nets) = (config.disks.len(), config.nets.len());
    must(disks == parts.disks.len(), "disks", disks, &format!("{} are there", parts.disks.len()))?;
    must(nets == parts.nets.len(), "nets", nets, &format!("{} are there", parts.nets.len()))?;
    must(disks + nets <= CARDS_MAX, "disks", disks + nets, "disks and network cards are at most 18 together")?;
    for (described, image) in config.disks.iter().zip(&parts.disks) {
        let (size, found) = (described.size_bytes, image.bytes());
        must(size == found, "disks.size_bytes", size, &format!("the image has {found}"))?;
        let read_only = described.read_only;
        must(read_only == image.read_only(), "disks.read_only", read_only, "as the image was opened")?;
    }
    config.nets.iter().try_for_each(|net| mac(&net.mac).map(drop))?;
    let model = CpuModel::by_name(&config.cpu_model).ok_or_else(|| {
        let known: Vec<&str> = CpuModel::ALL.iter().map(|model| model.name()).collect();
        wrong("cpu_model", &config.cpu_model, format!("this release knows {}", known.join(", ")))
    })?;
    let engine = if config.engine == "kvm" { "kvm" } else { "soft" };
    let engines = model.engines();
    must(engines.contains(&engine), "cpu_model", model.name(), &format!("engine {engine} does not keep it"))?;
    Ok(model)
}

fn seed(bytes: &[u8]) -> Result<[u8; 32], MachineError> {
    bytes.try_into().map_err(|_| wrong("seed", format!("{} bytes", bytes.len()), "32 bytes"))
}

fn mac(bytes: &[u8]) -> Result<[u8; 6], MachineError> {
    let mac: [u8; 6] = bytes.try_into().map_err(|_| wrong("nets.mac", format!("{bytes:02x?}"), "six bytes"))?;
    must(mac[0] & 1 == 0 && mac != [0; 6], "nets.mac", format!("{mac:02x?}"), "an address of one card")?;
    Ok(mac)
}

/// State of a vCPU when the machine is built: all but the first wait for INIT.
pub(super) fn power_up(config: &MachineConfig, vcpu: usize) -> Result<CpuState, MachineError> {
    let model = CpuModel::by_name(&config.cpu_model).ok_or_else(|| wrong("cpu_model", &config.cpu_model, "known"))?;
    let topology = Topology { vcpu: vcpu as u32, vcpus: config.vcpus, tsc_hz: config.tsc_hz };
    let mut state = model.power_up(&topology);
    if vcpu != 0 {
        state.run_state = RunState::Uninitialised;
    }
    Ok(state)
}

/// The page of a VMCB.
pub(super) fn vmcb_bytes(vmcb: &Vmcb) -> Box<[u8; 4096]> {
    let mut page = Box::new([0; 4096]);
    page.copy_from_slice(vmcb.as_bytes());
    page
}

//! Sections of a machine, as a hostile bucket or source may hold them: bookkeeping, every device, every vCPU, the clock; and a
//! capability set.
//!
//! What is accepted must be a machine: saved again it is the same, and its devices answer a guest.

use std::sync::Arc;

use prost::Message;
use proto::v1::{ClockV1, RunnerApply, Section};
use vmcb_engine::capability::{CapabilitySet, CpuModel, Topology, soft_host};
use vmcb_engine::cpu::{CpuState, DecodeError};
use vmcb_engine::device::bus::{Bus, RestoreError, VIRTIO_BASE};
use vmcb_engine::memory::GuestMemory;
use vmcb_engine::snapshot::{SectionError, Sections, state_digest};
use vmcb_engine::vmcb::Vmcb;

const VCPUS: u32 = 2;
const DEVICES: (u32, u32) = vmcb_engine::device::bus::SECTION_VERSION;

/// The texts are what an operator would read.
#[derive(Debug)]
enum Refused {
    Sections(SectionError),
    Device(RestoreError),
    Cpu(DecodeError),
    Clock(prost::DecodeError),
}

impl From<RestoreError> for Refused {
    fn from(error: RestoreError) -> Self {
        Refused::Device(error)
    }
}

/// Takes any bytes.
pub fn run(data: &[u8]) {
    capabilities(data);
    let Ok(RunnerApply { sections }) = RunnerApply::decode(data) else { return };
    let memory = super::memory();
    match apply(&memory, sections) {
        Ok((mut bus, tsc)) => {
            assert_saved_form_is_stable(&memory, &bus);
            use_devices(&mut bus, tsc);
        }
        Err(Refused::Sections(error)) => drop(error.to_string()),
        Err(Refused::Device(error)) => drop(error.to_string()),
        Err(Refused::Cpu(error)) => drop(error.to_string()),
        Err(Refused::Clock(error)) => drop(error.to_string()),
    }
}

/// Whether the sections make a machine.
pub fn is_accepted(data: &[u8]) -> bool {
    RunnerApply::decode(data).is_ok_and(|message| apply(&super::memory(), message.sections).is_ok())
}

fn apply(memory: &Arc<GuestMemory>, sections: Vec<Section>) -> Result<(Bus, u64), Refused> {
    let mut sections = Sections::new(sections).map_err(Refused::Sections)?;
    let mut bus = super::bus(memory);
    bus.restore::<Refused>(&mut |name| Ok(sections.take(name, DEVICES).map_err(Refused::Sections)?.body))?;
    for vcpu in 0..VCPUS {
        let section = sections.take(&format!("cpu/{vcpu}"), (1, 0)).map_err(Refused::Sections)?;
        let state = CpuState::from_bytes(&section.body).map_err(Refused::Cpu)?;
        let again = CpuState::from_bytes(&state.to_bytes()).expect("what was saved is a state");
        assert_eq!((state.compare(&again), state.digest()), (Vec::new(), again.digest()));
        let mut vmcb = Vmcb::boxed();
        state.to_vmcb(&mut vmcb);
    }
    let clock = sections.take("clock", (1, 0)).map_err(Refused::Sections)?;
    let clock = ClockV1::decode(clock.body.as_slice()).map_err(Refused::Clock)?;
    sections.finish().map_err(Refused::Sections)?;
    Ok((bus, clock.retired.wrapping_mul(3).wrapping_add(clock.skipped_tsc)))
}

/// Saves, restores and saves again.
pub fn assert_saved_form_is_stable(memory: &Arc<GuestMemory>, bus: &Bus) {
    let saved = bus.save();
    let mut sections = Sections::new(saved.clone()).expect("no device is saved twice");
    let mut twin = super::bus(memory);
    let restored =
        twin.restore::<Refused>(&mut |name| Ok(sections.take(name, DEVICES).map_err(Refused::Sections)?.body));
    assert!(restored.is_ok(), "{restored:?} of what was just saved");
    assert_eq!(sections.finish(), Ok(()));
    assert_eq!(state_digest(&twin.save()), state_digest(&saved));
}

/// What a guest and the host do with devices; nothing of it may panic whatever they hold.
fn use_devices(bus: &mut Bus, tsc: u64) {
    for tsc in [tsc, tsc.wrapping_add(1), tsc.saturating_add(1 << 40), u64::MAX] {
        for vcpu in 0..VCPUS as usize {
            bus.set_vcpu(vcpu);
            let _ = (bus.cr8(vcpu), bus.take_request(vcpu));
            if let Some(vector) = bus.pending_interrupt(vcpu) {
                bus.acknowledge(vcpu, vector);
            }
            for offset in (0..0x400).step_by(0x10) {
                bus.mmio_read(tsc, 0xfee0_0000 + offset, 4);
            }
            bus.mmio_write(tsc, 0xfee0_00b0, 4, 0);
            for msr in [0x1b, 0x6e0, 0x80b, 0x839, 0x4b56_4d00, 0x4b56_4d01] {
                bus.msr_read(tsc, vcpu, msr);
            }
            bus.msr_write(tsc, vcpu, 0x4b56_4d01, 0x5001);
        }
        bus.tick(tsc);
        let _ = bus.next_deadline();
        for register in 0..0x80 {
            bus.io_write(tsc, 0x70, 1, register);
            bus.io_read(tsc, 0x71, 1);
        }
        for port in 0x3f8..0x400 {
            bus.io_read(tsc, port, 1);
        }
        for window in 0..3 {
            let base = VIRTIO_BASE + window * 0x1000;
            for offset in (0..0x110).step_by(4) {
                bus.mmio_read(tsc, base + offset, 4);
            }
            (0..2).for_each(|queue| bus.mmio_write(tsc, base + 0x50, 4, queue));
        }
        bus.net_input(0, &[0xff; 60]);
        bus.set_link(0, false);
        bus.console_input(b"hello");
        bus.take_console_output();
    }
}

fn capabilities(data: &[u8]) {
    match CapabilitySet::from_bytes(data) {
        Ok(set) => {
            assert_eq!(CapabilitySet::from_bytes(&set.to_bytes()), Ok(set.clone()));
            set.failing_on(&soft_host()).iter().for_each(|failing| drop(failing.to_string()));
        }
        Err(error) => drop(error.to_string()),
    }
}

/// The sections of a machine at power-up; of one whose driver has set up its disk; a capability set.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let machine = |prepare: fn(&Arc<GuestMemory>, &mut Bus)| {
        let memory = super::memory();
        let mut bus = super::bus(&memory);
        prepare(&memory, &mut bus);
        let mut sections = bus.save();
        let section = |name: String, body| Section { name, major: 1, body, ..Default::default() };
        for vcpu in 0..VCPUS {
            let topology = Topology { vcpu, vcpus: VCPUS, tsc_hz: 1_000_000_000 };
            sections.push(section(format!("cpu/{vcpu}"), CpuModel::SoftV1.power_up(&topology).to_bytes()));
        }
        sections.push(section("clock".into(), ClockV1 { retired: 1000, skipped_tsc: 5 }.encode_to_vec()));
        RunnerApply { sections }.encode_to_vec()
    };
    vec![
        ("power-up", machine(|_, _| {})),
        ("in-use", machine(|memory, bus| super::virtqueue::play(memory, bus, &super::virtqueue::disk_in_use()))),
        ("capabilities", CpuModel::SoftV1.contract(1_000_000).to_bytes()),
    ]
}

//! Golden files: sections of devices as releases have written them. Each is a frame of kind Section. They are only ever
//! added, and every release loads all of them.
//!
//! `GODWIT_WRITE_GOLDEN=1 cargo test -p vmcb-engine --test golden` writes those of the present version that are missing;
//! it never writes over one.
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use proto::frame::{self, Kind};
use proto::v1::Section;
use vmcb_engine::device::block::DiskImage;
use vmcb_engine::device::bus::{Bus, Fitting, LAPIC_BASE, RestoreError, SECTION_VERSION, VIRTIO_BASE};
use vmcb_engine::memory::{GuestMemory, sized_memfd};

fn directory(version: u32) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden", &format!("v{version}")].iter().collect()
}

fn bus() -> (Bus, Arc<GuestMemory>) {
    let memory = Arc::new(GuestMemory::create(16 << 20).unwrap());
    let disk = DiskImage::from_fd(sized_memfd("golden-disk", 1 << 20).unwrap(), false).unwrap();
    let nets = vec![([2, 0, 0, 0, 0, 1], None)];
    let (seed, epoch_ns, tsc_hz) = ([3; 32], 1_700_000_000_000_000_000, 1_000_000_000);
    let fitting = Fitting { vcpus: 2, seed, epoch_ns, tsc_hz, disks: vec![disk], nets };
    (Bus::new(Arc::clone(&memory), fitting), memory)
}

/// A history that leaves something in every field: timers that run, interrupts at every stage, input that waits, a clock
/// that is being set, queues in use. Not to be changed: what it writes is `v1`.
fn history_v1(bus: &mut Bus, memory: &GuestMemory) {
    for (offset, value) in [(0xf0, 0x1ff), (0x80, 0x20), (0xd0, 0x100_0000), (0x3e0, 0xb), (0x320, 0x2_00ec)] {
        bus.mmio_write(1000, LAPIC_BASE + offset, 4, value);
    }
    bus.mmio_write(2000, LAPIC_BASE + 0x380, 4, 50_000);
    bus.tick(52_000);
    bus.acknowledge(0, 0xec);
    bus.mmio_write(53_000, LAPIC_BASE + 0x310, 4, 1 << 24);
    bus.mmio_write(53_000, LAPIC_BASE + 0x300, 4, 0x4500);
    bus.mmio_write(53_000, LAPIC_BASE + 0x300, 4, 0x469a);
    bus.mmio_write(53_000, LAPIC_BASE + 0x300, 4, 0x4005);
    for (register, value) in [(0x18, 0x34), (0x1a, 0x8051), (0x1c, 0x8052), (0x1e, 0x8053)] {
        bus.mmio_write(0, 0xfec0_0000, 4, register);
        bus.mmio_write(0, 0xfec0_0010, 4, value);
    }
    for (port, value) in [(0x3fb, 0x83), (0x3f8, 1), (0x3fb, 3), (0x3fa, 0xc7), (0x3fc, 0xb), (0x3f9, 7), (0x3ff, 0xa5)]
    {
        bus.io_write(0, port, 1, value);
    }
    assert_eq!(bus.console_input(b"typed ahead"), 11);
    for (index, value) in [(0x0b, 0x82), (0x08, 0x02), (0x40, 0x77)] {
        bus.io_write(60_000, 0x70, 1, index);
        bus.io_write(60_000, 0x71, 1, value);
    }
    bus.msr_write(61_000, 0, 0x4b56_4d00, 0x6000);
    bus.msr_write(61_000, 1, 0x4b56_4d01, 0x7001);
    bus.io_write(0, 0x600, 1, 0x14);
    bus.set_link(0, true);
    for window in 0..3 {
        for queue in 0..=u64::from(window == 1) {
            offer_buffer(memory, rings(window, queue));
        }
        bring_up(bus, window, if window == 1 { 2 } else { 1 });
    }
    assert!(bus.net_input(0, b"a packet that arrived"));
}

fn rings(window: u64, queue: u64) -> u64 {
    0x10_0000 + window * 0x1_0000 + queue * 0x4000
}

/// One writable buffer of 64 bytes; the disk gets a request for its name.
fn offer_buffer(memory: &GuestMemory, base: u64) {
    let request = base == rings(0, 0);
    let row = |at: u64, gpa: u64, bytes: u32, flags: u16| {
        memory.write(base + 16 * at, &gpa.to_le_bytes()).unwrap();
        memory.write(base + 16 * at + 8, &bytes.to_le_bytes()).unwrap();
        memory.write(base + 16 * at + 12, &[flags as u8, 0, at as u8 + 1, 0]).unwrap();
    };
    if request {
        memory.write(0x20_0000, &8u32.to_le_bytes()).unwrap();
        row(0, 0x20_0000, 16, 1);
        row(1, 0x20_1000, 64, 2);
    } else {
        row(0, 0x20_1000, 64, 2);
    }
    memory.write(base + 0x1002, &1u16.to_le_bytes()).unwrap();
}

fn bring_up(bus: &mut Bus, window: u64, queues: u64) {
    let mut set = |offset: u64, value: u64| bus.mmio_write(0, VIRTIO_BASE + window * 0x1000 + offset, 4, value);
    for (offset, value) in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)] {
        set(offset, value);
    }
    for queue in 0..queues {
        let base = rings(window, queue);
        let rows = [(0x30, queue), (0x38, 64), (0x80, base), (0x90, base + 0x1000), (0xa0, base + 0x2000), (0x44, 1)];
        rows.into_iter().for_each(|(offset, value)| set(offset, value));
    }
    set(0x70, 15);
    set(0x50, 0);
}

fn file_name(section: &str) -> String {
    format!("{}.bin", section.replace('/', "-"))
}

#[test]
fn every_version_ever_written_still_loads() {
    let mut seen = 0;
    for version in 1..=SECTION_VERSION.0 {
        let mut sections = BTreeMap::new();
        for entry in std::fs::read_dir(directory(version)).unwrap() {
            let path = entry.unwrap().path();
            // The golden files of the CPU and of capabilities have a test of their own: golden_cpu.rs.
            if !path.file_name().unwrap().to_string_lossy().starts_with("device-") {
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            let section: Section =
                frame::decode_message(Kind::Section, &bytes).unwrap_or_else(|e| panic!("{path:?}: {e}"));
            assert_eq!(path.file_name().unwrap().to_str(), Some(file_name(&section.name).as_str()));
            assert_eq!(section.major, version, "{path:?}");
            sections.insert(section.name.clone(), section);
        }
        let (mut bus, _) = bus();
        let mut taken = 0;
        bus.restore(&mut |name: &str| {
            taken += 1;
            Ok::<_, RestoreError>(sections.get(name).unwrap_or_else(|| panic!("no golden {name}")).body.clone())
        })
        .unwrap_or_else(|e| panic!("v{version}: {e}"));
        assert_eq!(taken, sections.len(), "a golden section that no device asks for");
        for now in bus.save().into_iter().filter(|now| now.major == version) {
            assert_eq!(now.body, sections[&now.name].body, "{}: loading and saving changes it", now.name);
        }
        seen += taken;
    }
    assert!(seen > 0);
}

#[test]
fn the_present_version_writes_what_its_golden_files_say() {
    let (mut bus, memory) = bus();
    history_v1(&mut bus, &memory);
    let directory = directory(SECTION_VERSION.0);
    for section in bus.save() {
        let path = directory.join(file_name(&section.name));
        let bytes = frame::encode_message(Kind::Section, &section);
        if std::env::var_os("GODWIT_WRITE_GOLDEN").is_some() && !path.exists() {
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        let golden = std::fs::read(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
        assert_eq!(golden, bytes, "{}: the saved form has changed; give it a new version", section.name);
    }
}

/// What 1.1 added: input and packets that wait.
fn history_v1_1(bus: &mut Bus, memory: &GuestMemory) {
    history_v1(bus, memory);
    let line: Vec<u8> = (0..4500).map(|n| b'a' + (n % 26) as u8).collect();
    assert_eq!(bus.console_input(&line), line.len());
    assert!(bus.net_hold(0, b"a packet that waits") && bus.net_hold(0, b"and another"));
}

#[test]
fn version_1_1_is_written_only_where_something_waits_and_loads() {
    let (mut source, memory) = bus();
    history_v1_1(&mut source, &memory);
    let directory: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "golden", "v1.1"].iter().collect();
    let mut sections = BTreeMap::new();
    for section in source.save() {
        if section.minor == 1 {
            let path = directory.join(file_name(&section.name));
            let bytes = frame::encode_message(Kind::Section, &section);
            if std::env::var_os("GODWIT_WRITE_GOLDEN").is_some() && !path.exists() {
                std::fs::create_dir_all(&directory).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            let golden = std::fs::read(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
            assert_eq!(golden, bytes, "{}: the saved form has changed; give it a new version", section.name);
        }
        sections.insert(section.name.clone(), section);
    }
    let newer: Vec<&str> = sections.values().filter(|s| s.minor == 1).map(|s| s.name.as_str()).collect();
    assert_eq!(newer, ["device/uart0", "device/virtio-net0"]);
    let (mut target, _) = bus();
    target.restore(&mut |name: &str| Ok::<_, RestoreError>(sections[name].body.clone())).unwrap();
    let saved: BTreeMap<String, Section> = target.save().into_iter().map(|s| (s.name.clone(), s)).collect();
    assert_eq!(saved, sections);
}

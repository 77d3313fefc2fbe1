//! Tests of the bus: who sits where, and how interrupts travel.

use super::*;
use crate::memory::sized_memfd;

pub(super) fn bus(vcpus: usize) -> Bus {
    let memory = Arc::new(GuestMemory::create(16 << 20).unwrap());
    let disk = DiskImage::from_fd(sized_memfd("test-disk", 1 << 20).unwrap(), false).unwrap();
    let nets = vec![([2, 0, 0, 0, 0, 1], None)];
    let (seed, epoch_ns, tsc_hz) = ([3; 32], 1_700_000_000_000_000_000, 1_000_000_000);
    Bus::new(memory, Fitting { vcpus, seed, epoch_ns, tsc_hz, disks: vec![disk], nets })
}

fn enable_lapic(bus: &mut Bus, vcpu: usize) {
    bus.set_vcpu(vcpu);
    bus.mmio_write(0, LAPIC_BASE + 0xf0, 4, 0x1ff);
}

pub(super) fn set_pin(bus: &mut Bus, pin: u64, entry: u64) {
    for (register, value) in [(0x11 + 2 * pin, entry >> 32), (0x10 + 2 * pin, entry & 0xffff_ffff)] {
        bus.mmio_write(0, IOAPIC_BASE, 4, register);
        bus.mmio_write(0, IOAPIC_BASE + 0x10, 4, value);
    }
}

#[test]
fn looking_for_pci_does_not_reset() {
    let mut bus = bus(1);
    bus.io_write(0, 0xcf8, 4, 0x8000_ff00);
    bus.io_write(0, 0xcf8, 2, 0xffff);
    assert_eq!(bus.stopped(), None);
    bus.io_write(0, 0xcf9, 1, 6);
    assert_eq!(bus.stopped(), Some(crate::device::power::Stop::Reset));
}

#[test]
fn what_nobody_claims_reads_as_ones() {
    let mut bus = bus(1);
    assert_eq!((bus.io_read(0, 0x60, 1), bus.io_read(0, 0x64, 4), bus.io_read(0, 0x80, 2)), (0xff, u32::MAX, 0xffff));
    assert_eq!(bus.mmio_read(0, 0xc000_0000, 8), u64::MAX);
    assert_eq!(bus.mmio_read(0, VIRTIO_BASE + 3 * WINDOW_BYTES, 4), 0xffff_ffff);
    assert_eq!(bus.msr_read(0, 0, 0x4b56_4d02), None);
    bus.io_write(0, 0x80, 1, 7);
}

#[test]
fn every_device_is_where_the_guest_is_told() {
    let mut bus = bus(1);
    let ids: Vec<u64> = bus.windows().iter().map(|window| bus.mmio_read(0, window.gpa + 8, 4)).collect();
    assert_eq!(ids, [2, 1, 4]);
    assert_eq!(bus.windows().iter().map(|window| window.line).collect::<Vec<_>>(), [5, 6, 7]);
    bus.io_write(0, 0x3f8, 1, u32::from(b'!'));
    assert_eq!(bus.take_console_output(), b"!");
    bus.io_write(0, 0x70, 1, 0x32);
    assert_eq!(bus.io_read(0, 0x71, 1), 0x20);
    assert_eq!(bus.mmio_read(0, LAPIC_BASE + 0x30, 4), 0x0005_0014);
    bus.io_write(0, RESET_PORT, 1, 1);
    assert_eq!(bus.stopped(), Some(Stop::Reset));
}

#[test]
fn serial_input_becomes_an_edge() {
    let mut bus = bus(1);
    enable_lapic(&mut bus, 0);
    set_pin(&mut bus, 4, 0x34);
    bus.io_write(0, 0x3fc, 1, 8);
    bus.io_write(0, 0x3f9, 1, 1);
    assert_eq!(bus.console_input(b"x"), 1);
    assert_eq!(bus.pending_interrupt(0), Some(0x34));
    bus.acknowledge(0, 0x34);
    assert_eq!(bus.io_read(0, 0x3f8, 1), u32::from(b'x'));
    bus.mmio_write(0, LAPIC_BASE + 0xb0, 4, 0);
    assert_eq!(bus.pending_interrupt(0), None);
}

#[test]
fn a_level_line_interrupts_again_after_the_end_of_interrupt() {
    let mut bus = bus(1);
    enable_lapic(&mut bus, 0);
    set_pin(&mut bus, 6, 1 << 15 | 0x51);
    for status in [1, 3, 11, 15] {
        if status == 11 {
            bus.mmio_write(0, VIRTIO_BASE + 0x1024, 4, 1);
            bus.mmio_write(0, VIRTIO_BASE + 0x1020, 4, 1);
        }
        bus.mmio_write(0, VIRTIO_BASE + 0x1070, 4, status);
    }
    bus.set_link(0, true);
    for _ in 0..3 {
        assert_eq!(bus.pending_interrupt(0), Some(0x51));
        bus.acknowledge(0, 0x51);
        assert_eq!(bus.pending_interrupt(0), None);
        bus.mmio_write(0, LAPIC_BASE + 0xb0, 4, 0);
    }
    bus.acknowledge(0, 0x51);
    bus.mmio_write(0, VIRTIO_BASE + 0x1064, 4, 2);
    bus.mmio_write(0, LAPIC_BASE + 0xb0, 4, 0);
    assert_eq!(bus.pending_interrupt(0), None);
}

#[test]
fn processors_start_and_interrupt_each_other() {
    let mut bus = bus(3);
    enable_lapic(&mut bus, 0);
    bus.mmio_write(0, LAPIC_BASE + 0x310, 4, 2 << 24);
    bus.mmio_write(0, LAPIC_BASE + 0x300, 4, 0x4500);
    bus.mmio_write(0, LAPIC_BASE + 0x300, 4, 0x4608);
    assert!(!bus.has_request(1));
    assert_eq!((bus.take_request(2), bus.take_request(2)), (Some(Request::Init), Some(Request::Startup(8))));
    enable_lapic(&mut bus, 2);
    enable_lapic(&mut bus, 1);
    bus.set_vcpu(0);
    bus.mmio_write(0, LAPIC_BASE + 0x300, 4, 0xc_40f3);
    assert_eq!([0, 1, 2].map(|vcpu| bus.pending_interrupt(vcpu)), [None, Some(0xf3), Some(0xf3)]);
    set_pin(&mut bus, 5, 0xff << 56 | 1 << 8 | 0x61);
    bus.set_cr8(0, 3);
    bus.drive(5, true);
    assert_eq!([0, 1, 2].map(|vcpu| bus.pending_interrupt(vcpu)), [None, Some(0xf3), Some(0xf3)]);
    bus.acknowledge(1, 0xf3);
    bus.mmio_write(0, LAPIC_BASE + 0x300, 4, 0x4_0077);
    assert_eq!(bus.pending_interrupt(0), Some(0x77));
}

#[test]
fn all_sections_are_asked_for_once_and_survive() {
    let mut source = bus(2);
    enable_lapic(&mut source, 0);
    source.io_write(0, 0x3fc, 1, 8);
    source.io_write(0, 0x3f9, 1, 1);
    source.console_input(b"abc");
    let sections = source.save();
    let mut target = bus(2);
    let mut asked = Vec::new();
    let mut take = |name: &str| {
        asked.push(name.to_owned());
        Ok::<_, RestoreError>(sections.iter().find(|section| section.name == name).unwrap().body.clone())
    };
    target.restore(&mut take).unwrap();
    assert_eq!(target.save(), sections);
    asked.sort();
    let mut names: Vec<_> = sections.iter().map(|section| section.name.clone()).collect();
    names.sort();
    assert_eq!(asked, names);
}

#[test]
fn hostile_sections_are_refused_by_name_and_field() {
    let mut source = bus(1);
    let sections = source.save();
    let mut refused = |bad: &str, body: Vec<u8>| {
        let mut take = |name: &str| {
            let own = sections.iter().find(|section| section.name == name).unwrap();
            Ok::<_, RestoreError>(if name == bad { body.clone() } else { own.body.clone() })
        };
        source.restore(&mut take).unwrap_err().to_string()
    };
    assert_eq!(refused("device/uart0", vec![0xff]), "section \"device/uart0\" does not decode");
    let power = prost::Message::encode_to_vec(&proto::v1::PowerV1 { sleep_control: 0, stopped: 9 });
    assert_eq!(refused("device/power", power), "section \"device/power\": saved field stopped is 9: 0, 1 or 2");
    let ioapic = proto::v1::IoapicV1 { lines: 1, ..Ioapic::default().save() };
    let text = refused("device/ioapic", prost::Message::encode_to_vec(&ioapic));
    assert_eq!(text, "section \"device/ioapic\": saved field lines is 1: as the devices drive them");
}

/// One access of a hostile guest, or of the world.
fn poke(bus: &mut Bus, tsc: u64, what: u8, place: u16, value: u64) {
    let size = 1 << (value % 4);
    let windows = [LAPIC_BASE, IOAPIC_BASE, VIRTIO_BASE, VIRTIO_BASE + 0x1000, VIRTIO_BASE + 0x2000, 0xffff_f000];
    let gpa = windows[usize::from(place) % windows.len()] + u64::from(place >> 3 & 0x1ff) * 4;
    let port = [0x70u16, 0x71, 0x3f8, 0x600, 0xfffe][usize::from(place) % 5].wrapping_add(place >> 8 & 7);
    let msr = [0x1b, 0x6e0, 0x4b56_4d00, 0x4b56_4d01, 0x800 + u32::from(place >> 3 & 0x3f)][usize::from(place) % 5];
    match what % 10 {
        0 => {
            let _ = bus.io_read(tsc, port, size.min(4));
        }
        1 => bus.io_write(tsc, port, size.min(4), value as u32),
        2 => {
            let _ = bus.mmio_read(tsc, gpa, size);
        }
        3 | 4 => bus.mmio_write(tsc, gpa, 4, value >> 8),
        5 => {
            let _ = bus.msr_read(tsc, 0, msr);
        }
        6 => {
            let _ = bus.msr_write(tsc, 0, msr, value);
        }
        7 => {
            let _ = bus.console_input(&value.to_le_bytes());
        }
        8 => {
            let _ = bus.net_input(0, &value.to_le_bytes());
        }
        _ => {
            bus.tick(tsc);
            let _ = bus.take_request(0);
            if let Some(vector) = bus.pending_interrupt(0) {
                bus.acknowledge(0, vector);
            }
        }
    }
}

fn restore(bus: &mut Bus, sections: &[proto::v1::Section]) -> Result<(), RestoreError> {
    bus.restore(&mut |name: &str| {
        Ok(sections.iter().find(|section| section.name == name).map_or(Vec::new(), |section| section.body.clone()))
    })
}

proptest::proptest! {
    #[test]
    fn no_history_panics_and_any_survives_saving(
        steps in proptest::collection::vec(proptest::prelude::any::<(u8, u16, u64)>(), 0..200),
    ) {
        let mut source = bus(1);
        for (n, (what, place, value)) in steps.into_iter().enumerate() {
            poke(&mut source, 1000 * n as u64, what, place, value);
        }
        let sections = source.save();
        let mut target = bus(1);
        proptest::prop_assert_eq!(restore(&mut target, &sections), Ok(()));
        proptest::prop_assert_eq!(target.save(), sections);
    }

    #[test]
    fn no_saved_bytes_panic_now_or_later(
        changes in proptest::collection::vec(proptest::prelude::any::<(u16, u16, u8)>(), 1..6),
        steps in proptest::collection::vec(proptest::prelude::any::<(u8, u16, u64)>(), 0..60),
    ) {
        let mut source = bus(1);
        enable_lapic(&mut source, 0);
        source.io_write(0, 0x3f9, 1, 7);
        let mut sections = source.save();
        for (which, at, byte) in changes {
            let count = sections.len();
            let body = &mut sections[usize::from(which) % count].body;
            if body.is_empty() || byte % 7 == 0 {
                body.push(byte);
            } else {
                let at = usize::from(at) % body.len();
                body[at] = byte;
            }
        }
        let mut target = bus(1);
        if restore(&mut target, &sections).is_ok() {
            for (n, (what, place, value)) in steps.into_iter().enumerate() {
                poke(&mut target, 1000 * n as u64, what, place, value);
            }
        }
    }
}

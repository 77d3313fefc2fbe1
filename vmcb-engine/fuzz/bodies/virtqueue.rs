//! A hostile driver: the input is a list of deeds upon the registers, rings and descriptors of virtio devices, with packets and
//! save-and-restore in between.
//!
//! ```text
//! deed 0 store to a register    1 load    2 write RAM    3 descriptor    4 make available    5 notify
//!      6 set a queue up         7 packet  8 save, restore, compare       9 console byte      10 let time pass
//! ```

use std::sync::Arc;

use vmcb_engine::device::bus::{Bus, VIRTIO_BASE};
use vmcb_engine::memory::GuestMemory;

use super::Input;

/// Rings of queue n of window w lie at this + w * 0x10000 + n * 0x4000: descriptors, available, used, one page each.
const RINGS: u64 = 0x10_0000;
/// Buffers begin here.
const BUFFERS: u64 = 0x20_0000;
const DEEDS_MAX: usize = 400;

/// Takes any bytes.
pub fn run(data: &[u8]) {
    let memory = super::memory();
    let mut bus = super::bus(&memory);
    play(&memory, &mut bus, data);
    super::sections::assert_saved_form_is_stable(&memory, &bus);
}

fn rings(window: u64, queue: u64) -> u64 {
    RINGS + window * 0x1_0000 + queue * 0x4000
}

/// Does the deeds of `data`.
pub fn play(memory: &Arc<GuestMemory>, bus: &mut Bus, data: &[u8]) {
    let mut input = Input(data);
    let mut tsc = 0u64;
    for _ in 0..DEEDS_MAX {
        if input.0.is_empty() {
            return;
        }
        let deed = input.byte() % 11;
        let window = u64::from(input.byte() % 4);
        let queue = window >> 1 & 1;
        let base = VIRTIO_BASE + window * 0x1000;
        match deed {
            0 => {
                let (offset, value) = (input.number(2) & 0xfff, input.number(4));
                bus.mmio_write(tsc, base + offset, 1 << (offset & 3), value);
                bus.mmio_write(tsc, base + (offset & 0x1fc), 4, value);
            }
            1 => {
                let offset = input.number(2) & 0xfff;
                bus.mmio_read(tsc, base + offset, 1 << (offset & 3));
            }
            2 => {
                let (at, length) = (input.number(2), usize::from(input.byte()));
                let _ = memory.write(rings(0, 0) + at, input.take(length));
            }
            3 => descriptor(memory, rings(window, input.number(1) & 1), &mut input),
            4 => {
                let at = rings(window, input.number(1) & 1) + 0x1000;
                let mut index = [0; 2];
                let _ = memory.read(at + 2, &mut index);
                let index = u16::from_le_bytes(index);
                let _ = memory.write(at + 4 + 2 * u64::from(index % 16), &(input.byte() as u16).to_le_bytes());
                let _ = memory.write(at + 2, &index.wrapping_add(1).to_le_bytes());
            }
            5 => bus.mmio_write(tsc, base + 0x50, 4, input.number(1) & 3),
            6 => set_up(bus, tsc, window, input.number(1) & 1),
            7 => {
                let length = input.number(2) as usize % 70_000;
                bus.net_input(queue as usize, &vec![0xee; length]);
            }
            8 => super::sections::assert_saved_form_is_stable(memory, bus),
            9 => drop(bus.console_input(input.take(1))),
            _ => {
                tsc = tsc.saturating_add(input.number(8));
                bus.tick(tsc);
            }
        }
    }
}

fn descriptor(memory: &GuestMemory, table: u64, input: &mut Input<'_>) {
    let place = u64::from(input.byte() % 16);
    let mut row = [0; 16];
    row[..8].copy_from_slice(&(BUFFERS + input.number(3)).to_le_bytes());
    row[8..12].copy_from_slice(&(input.number(2) as u32).to_le_bytes());
    row[12] = input.byte() & 7;
    row[14] = input.byte() & 31;
    let _ = memory.write(table + place * 16, &row);
}

/// What a driver does before it uses a queue of 16 entries.
fn set_up(bus: &mut Bus, tsc: u64, window: u64, queue: u64) {
    let mut store = |offset, value| bus.mmio_write(tsc, VIRTIO_BASE + window * 0x1000 + offset, 4, value);
    [1, 3].into_iter().for_each(|status| store(0x70, status));
    // VIRTIO_F_VERSION_1 and nothing else.
    [(0x24, 1), (0x20, 1), (0x70, 11), (0x30, queue), (0x38, 16)].into_iter().for_each(|(at, value)| store(at, value));
    let base = rings(window, queue);
    for (at, address) in [(0x80, base), (0x90, base + 0x1000), (0xa0, base + 0x2000)] {
        store(at, address);
        store(at + 4, 0);
    }
    store(0x44, 1);
    store(0x70, 15);
}

/// A driver that reads the disk: header, buffer, status; then asks for entropy; then receives a packet.
pub fn disk_in_use() -> Vec<u8> {
    let mut deeds = vec![6, 0, 0];
    // BUFFERS + 0: type IN, sector 0 (zeros).
    deeds.extend([3, 0, 0, 0, 0, 0, 0, 16, 0, 1, 1]);
    deeds.extend([3, 0, 0, 1, 0, 1, 0, 0, 2, 3, 2]);
    deeds.extend([3, 0, 0, 2, 0, 4, 0, 1, 0, 2, 0]);
    deeds.extend([4, 0, 0, 0, 5, 0, 0]);
    deeds
}

/// Sound drivers of each device.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut entropy = vec![6, 2, 0, 3, 2, 0, 0, 0, 8, 0, 0, 1, 2, 0];
    entropy.extend([4, 2, 0, 0, 5, 2, 0, 8, 0]);
    let mut packets = vec![6, 1, 0, 6, 1, 1, 3, 1, 0, 0, 0, 8, 0, 0, 8, 2, 0];
    packets.extend([4, 1, 0, 0, 5, 1, 0, 7, 0, 60, 0, 8, 0]);
    packets.extend([3, 1, 1, 0, 0, 9, 0, 100, 0, 0, 0, 4, 1, 1, 0, 5, 1, 1]);
    let registers = (0..0x110u16).step_by(4).flat_map(|at| [1, 0, at as u8, (at >> 8) as u8, 1, 1, at as u8, 1]);
    let indirect = {
        let mut deeds = vec![6, 0, 0];
        deeds.extend([2, 0, 0, 0, 0]);
        deeds.extend([3, 0, 0, 0, 0, 0, 0, 32, 0, 4, 0, 4, 0, 0, 0, 5, 0, 0]);
        deeds
    };
    vec![
        ("disk", disk_in_use()),
        ("entropy", entropy),
        ("packets", packets),
        ("registers", registers.collect()),
        ("indirect", indirect),
    ]
}

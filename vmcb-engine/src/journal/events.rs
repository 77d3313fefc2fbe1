//! What can enter a machine, and its bytes.
//!
//! ```text
//! event    kind u8 | retired, after the one before: varint | skipped TSC, after the one before: varint | payload
//! payload  1 console   bytes            6 reset      nothing
//!          2 packet    card, bytes      7 probe      vCPUs, digest of each (8), digest of the devices (8)
//!          3 link      card, up u8      8 memory     address, bytes
//!          4 held      card, bytes      9 processor  vCPU, bytes (a `CpuStateV1`)
//!          5 released  nothing               10 stood      vCPU, linear address
//!         11 detail    vCPUs, each: number, words (8 bytes each), checks | checks of the devices (4 bytes each)
//!         12 failed    disk, request, bytes done
//! ```
//! Numbers are LEB128 varints of at most ten bytes, `bytes` are a length and as many bytes. A packet costs 6 to 14 bytes
//! besides itself.

use super::Position;

/// Longest payload: a block's frame holds 8 MiB, no packet and no console line comes near this.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Most vCPUs that a probe speaks of.
const VCPUS_MAX: u64 = 64;

/// What entered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// Bytes that the serial port took in.
    Console(Vec<u8>),
    /// A packet for a network card.
    Packet {
        /// Which.
        card: u32,
        /// The Ethernet frame.
        bytes: Vec<u8>,
    },
    /// A cable was plugged in or pulled out.
    Link {
        /// Which card's.
        card: u32,
        /// Plugged in.
        up: bool,
    },
    /// A packet came while the machine stood still: it is part of its state from then on.
    Held {
        /// Which card's.
        card: u32,
        /// The Ethernet frame.
        bytes: Vec<u8>,
    },
    /// The cards got what was held for them.
    Released,
    /// The machine was started again from its boot images.
    Reset,
    /// Nothing entered: what the machine was like here, to compare with.
    Probe(Probe),
    /// Nothing entered: more of what the machine was like at the probe that follows, to name what differs.
    Detail(Detail),
    /// A debugger wrote to RAM.
    Memory {
        /// Guest-physical address.
        gpa: u64,
        /// What it wrote.
        bytes: Vec<u8>,
    },
    /// A debugger wrote registers.
    Processor {
        /// Which.
        vcpu: u32,
        /// All of its state, a `CpuStateV1`.
        state: Vec<u8>,
    },
    /// A debugger had stopped the machine with this vCPU before the instruction at a linear address. That may be behind
    /// the delivery of an event, which retires no instruction: what follows at this position entered there.
    Stood {
        /// Which.
        vcpu: u32,
        /// Where.
        linear: u64,
    },
    /// The host failed to do what a disk was asked after this position, before the next event: it did a part of it.
    DiskFailed {
        /// Which disk.
        disk: u32,
        /// Requests of this disk that came before it since this position.
        request: u64,
        /// Bytes that were read or written all the same.
        done: u64,
    },
}

/// Digests of a machine's parts, the first 8 bytes of BLAKE3 each.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Probe {
    /// Of each vCPU's state.
    pub cpus: Vec<[u8; 8]>,
    /// Of all devices' sections.
    pub devices: [u8; 8],
}

/// More of a machine than a [`Probe`] says: equal digests are equal machines, this is for those that are not.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Detail {
    /// Of some vCPUs.
    pub cpus: Vec<CpuDetail>,
    /// The first 4 bytes of BLAKE3 of each device's section, in order.
    pub devices: Vec<[u8; 4]>,
}

/// One vCPU's fields, in the order of `cpu/fields.rs`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CpuDetail {
    /// Which.
    pub vcpu: u32,
    /// The first fields as they were.
    pub words: Vec<u64>,
    /// The first byte of BLAKE3 of each other field.
    pub checks: Vec<u8>,
}

/// Why bytes are no events.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EventError {
    /// They end within an event.
    #[error("an event is cut at byte {0}")]
    Cut(usize),
    /// A number of more than 64 bits.
    #[error("a number at byte {0} has more than 64 bits")]
    Number(usize),
    /// A kind that this release does not know.
    #[error("unknown event kind {kind} at byte {at}")]
    Kind {
        /// The kind.
        kind: u8,
        /// Where.
        at: usize,
    },
    /// A payload that is too long or makes no sense.
    #[error("an event's payload at byte {0} makes no sense")]
    Payload(usize),
}

fn put_number(mut value: u64, into: &mut Vec<u8>) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

fn put_bytes(bytes: &[u8], into: &mut Vec<u8>) {
    put_number(bytes.len() as u64, into);
    into.extend_from_slice(bytes);
}

/// Appends an event that happened so long after the one before.
pub(super) fn put(event: &Event, after: Position, into: &mut Vec<u8>) {
    let kind = match event {
        Event::Console(_) => 1,
        Event::Packet { .. } => 2,
        Event::Link { .. } => 3,
        Event::Held { .. } => 4,
        Event::Released => 5,
        Event::Reset => 6,
        Event::Probe(_) => 7,
        Event::Memory { .. } => 8,
        Event::Processor { .. } => 9,
        Event::Stood { .. } => 10,
        Event::Detail(_) => 11,
        Event::DiskFailed { .. } => 12,
    };
    into.push(kind);
    put_number(after.retired, into);
    put_number(after.skipped_tsc, into);
    match event {
        Event::Console(bytes) => put_bytes(bytes, into),
        Event::Packet { card: number, bytes }
        | Event::Held { card: number, bytes }
        | Event::Processor { vcpu: number, state: bytes } => {
            put_number((*number).into(), into);
            put_bytes(bytes, into);
        }
        Event::Link { card, up } => {
            put_number((*card).into(), into);
            into.push((*up).into());
        }
        Event::Released | Event::Reset => {}
        Event::Probe(Probe { cpus, devices }) => {
            put_number(cpus.len() as u64, into);
            cpus.iter().for_each(|digest| into.extend_from_slice(digest));
            into.extend_from_slice(devices);
        }
        Event::Detail(detail) => put_detail(detail, into),
        Event::Memory { gpa, bytes } => {
            put_number(*gpa, into);
            put_bytes(bytes, into);
        }
        Event::Stood { vcpu, linear } => {
            put_number((*vcpu).into(), into);
            put_number(*linear, into);
        }
        Event::DiskFailed { disk, request, done } => {
            [u64::from(*disk), *request, *done].into_iter().for_each(|number| put_number(number, into));
        }
    }
}

fn put_detail(Detail { cpus, devices }: &Detail, into: &mut Vec<u8>) {
    put_number(cpus.len() as u64, into);
    for CpuDetail { vcpu, words, checks } in cpus {
        put_number((*vcpu).into(), into);
        put_number(words.len() as u64, into);
        words.iter().for_each(|word| into.extend_from_slice(&word.to_le_bytes()));
        put_bytes(checks, into);
    }
    put_number(devices.len() as u64, into);
    devices.iter().for_each(|check| into.extend_from_slice(check));
}

/// Reads events one after the other.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn is_at_end(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// The next event, and how long after the one before it happened.
    pub(super) fn next(&mut self) -> Result<(Event, Position), EventError> {
        let begun = self.at;
        let kind = self.byte()?;
        let after = Position { retired: self.number()?, skipped_tsc: self.number()? };
        let event = match kind {
            1 => Event::Console(self.payload()?),
            2 => Event::Packet { card: self.small()?, bytes: self.payload()? },
            3 => Event::Link { card: self.small()?, up: self.flag()? },
            4 => Event::Held { card: self.small()?, bytes: self.payload()? },
            5 => Event::Released,
            6 => Event::Reset,
            7 => Event::Probe(self.probe()?),
            8 => Event::Memory { gpa: self.number()?, bytes: self.payload()? },
            9 => Event::Processor { vcpu: self.small()?, state: self.payload()? },
            10 => Event::Stood { vcpu: self.small()?, linear: self.number()? },
            11 => Event::Detail(self.detail()?),
            12 => Event::DiskFailed { disk: self.small()?, request: self.number()?, done: self.number()? },
            kind => return Err(EventError::Kind { kind, at: begun }),
        };
        Ok((event, after))
    }

    fn byte(&mut self) -> Result<u8, EventError> {
        let byte = *self.bytes.get(self.at).ok_or(EventError::Cut(self.at))?;
        self.at += 1;
        Ok(byte)
    }

    fn number(&mut self) -> Result<u64, EventError> {
        let begun = self.at;
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return Err(EventError::Number(begun));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(EventError::Number(begun))
    }

    fn small(&mut self) -> Result<u32, EventError> {
        let begun = self.at;
        self.number()?.try_into().map_err(|_| EventError::Payload(begun))
    }

    fn flag(&mut self) -> Result<bool, EventError> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(EventError::Payload(self.at - 1)),
        }
    }

    fn slice(&mut self, bytes: usize) -> Result<&'a [u8], EventError> {
        let end = self.at.checked_add(bytes).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or(EventError::Cut(self.bytes.len()))?;
        let slice = &self.bytes[self.at..end];
        self.at = end;
        Ok(slice)
    }

    fn payload(&mut self) -> Result<Vec<u8>, EventError> {
        let begun = self.at;
        let bytes = usize::try_from(self.number()?).ok().filter(|bytes| *bytes <= PAYLOAD_BYTES_MAX);
        self.slice(bytes.ok_or(EventError::Payload(begun))?).map(<[u8]>::to_vec)
    }

    fn digest(&mut self) -> Result<[u8; 8], EventError> {
        let mut digest = [0; 8];
        digest.copy_from_slice(self.slice(8)?);
        Ok(digest)
    }

    fn probe(&mut self) -> Result<Probe, EventError> {
        let begun = self.at;
        let vcpus = self.number()?;
        if vcpus > VCPUS_MAX {
            return Err(EventError::Payload(begun));
        }
        let cpus: Result<Vec<[u8; 8]>, EventError> = (0..vcpus).map(|_| self.digest()).collect();
        Ok(Probe { cpus: cpus?, devices: self.digest()? })
    }

    fn detail(&mut self) -> Result<Detail, EventError> {
        let begun = self.at;
        let vcpus = self.number()?;
        if vcpus > VCPUS_MAX {
            return Err(EventError::Payload(begun));
        }
        let cpus: Result<Vec<CpuDetail>, EventError> = (0..vcpus).map(|_| self.cpu_detail()).collect();
        Ok(Detail { cpus: cpus?, devices: self.items()? })
    }

    fn cpu_detail(&mut self) -> Result<CpuDetail, EventError> {
        let vcpu = self.small()?;
        let words = self.items()?.into_iter().map(u64::from_le_bytes).collect();
        Ok(CpuDetail { vcpu, words, checks: self.payload()? })
    }

    /// A count, and as many times `N` bytes.
    fn items<const N: usize>(&mut self) -> Result<Vec<[u8; N]>, EventError> {
        let begun = self.at;
        let count = usize::try_from(self.number()?).ok().filter(|count| *count <= PAYLOAD_BYTES_MAX / N);
        let bytes = self.slice(count.ok_or(EventError::Payload(begun))? * N)?;
        Ok(bytes.chunks_exact(N).filter_map(|chunk| chunk.try_into().ok()).collect())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_detail() -> impl Strategy<Value = CpuDetail> {
        let words = proptest::collection::vec(any::<u64>(), 0..20);
        let checks = proptest::collection::vec(any::<u8>(), 0..200);
        (any::<u32>(), words, checks).prop_map(|(vcpu, words, checks)| CpuDetail { vcpu, words, checks })
    }

    /// Any event.
    pub(in crate::journal) fn any_event() -> impl Strategy<Value = Event> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..200);
        prop_oneof![
            bytes().prop_map(Event::Console),
            (any::<u32>(), bytes()).prop_map(|(card, bytes)| Event::Packet { card, bytes }),
            (any::<u32>(), any::<bool>()).prop_map(|(card, up)| Event::Link { card, up }),
            (any::<u32>(), bytes()).prop_map(|(card, bytes)| Event::Held { card, bytes }),
            Just(Event::Released),
            Just(Event::Reset),
            (proptest::collection::vec(any::<[u8; 8]>(), 0..4), any::<[u8; 8]>())
                .prop_map(|(cpus, devices)| Event::Probe(Probe { cpus, devices })),
            (proptest::collection::vec(any_detail(), 0..3), proptest::collection::vec(any::<[u8; 4]>(), 0..9))
                .prop_map(|(cpus, devices)| Event::Detail(Detail { cpus, devices })),
            (any::<u64>(), bytes()).prop_map(|(gpa, bytes)| Event::Memory { gpa, bytes }),
            (any::<u32>(), bytes()).prop_map(|(vcpu, state)| Event::Processor { vcpu, state }),
            (any::<u32>(), any::<u64>()).prop_map(|(vcpu, linear)| Event::Stood { vcpu, linear }),
            (any::<u32>(), any::<u64>(), any::<u64>()).prop_map(|(disk, request, done)| Event::DiskFailed {
                disk,
                request,
                done
            }),
        ]
    }

    #[test]
    fn a_packet_costs_little_besides_itself() {
        let mut packed = Vec::new();
        let after = Position { retired: 3_000_000, skipped_tsc: 40_000_000 };
        put(&Event::Packet { card: 0, bytes: vec![7; 1500] }, after, &mut packed);
        assert_eq!(packed.len(), 1500 + 12);
        assert_eq!(packed[..12], [2, 0xc0, 0x8d, 0xb7, 0x01, 0x80, 0xb4, 0x89, 0x13, 0, 0xdc, 0x0b]);
    }

    #[test]
    fn numbers_of_more_than_64_bits_are_refused() {
        let most = [1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0, 0];
        let (event, after) = Cursor::new(&most).next().unwrap();
        assert_eq!((event, after.retired), (Event::Console(vec![]), u64::MAX));
        let mut more = most;
        more[10] = 0x02;
        assert_eq!(Cursor::new(&more).next(), Err(EventError::Number(1)));
        more[10] = 0x81;
        assert_eq!(Cursor::new(&more).next(), Err(EventError::Number(1)));
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(events in proptest::collection::vec((any_event(), any::<u64>(), any::<u64>()), 0..20)) {
            let mut packed = Vec::new();
            for (event, retired, skipped_tsc) in &events {
                put(event, Position { retired: *retired, skipped_tsc: *skipped_tsc }, &mut packed);
            }
            let mut cursor = Cursor::new(&packed);
            for (event, retired, skipped_tsc) in events {
                prop_assert_eq!(cursor.next(), Ok((event, Position { retired, skipped_tsc })));
            }
            prop_assert!(cursor.is_at_end());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut cursor = Cursor::new(&bytes);
            while !cursor.is_at_end() && cursor.next().is_ok() {}
        }
    }
}

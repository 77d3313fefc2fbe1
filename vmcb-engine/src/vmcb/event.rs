//! EVENTINJ and EXITINTINFO: an interrupt or exception on its way, as one 64-bit word.
//!
//! Source: APM2 15.20 and 15.7.2. The error code is the high half of the word: whoever splits it into two 32-bit
//! halves must not shift again. Legality of an injection is judged here; delivering it is the processor's business.

use crate::vmcb::bits::Bits;

/// Bits 7:0: vector.
pub const VECTOR: Bits = Bits::range(7, 0);
/// Bits 10:8: type.
pub const TYPE: Bits = Bits::range(10, 8);
/// Bit 11: the error code is valid and is pushed.
pub const ERROR_VALID: Bits = Bits::bit(11);
/// Bit 31: the whole word is valid.
pub const VALID: Bits = Bits::bit(31);
/// Bits 63:32: error code.
pub const ERROR_CODE: Bits = Bits::range(63, 32);

/// Type of an event (APM2 table 15-11). Other encodings are illegal to inject.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum EventType {
    /// External or virtual interrupt: INTR.
    Interrupt = 0,
    /// Non-maskable interrupt.
    Nmi = 2,
    /// Exception: fault, trap or abort; INT3 and INTO inject as this with vectors 3 and 4.
    Exception = 3,
    /// Software interrupt: INTn.
    Software = 4,
}

impl EventType {
    /// From bits 10:8; `None` for reserved encodings.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::Interrupt),
            2 => Some(Self::Nmi),
            3 => Some(Self::Exception),
            4 => Some(Self::Software),
            _ => None,
        }
    }

    /// Name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interrupt => "INTR",
            Self::Nmi => "NMI",
            Self::Exception => "EXCEPTION",
            Self::Software => "INTn",
        }
    }
}

/// The word, as stored at 088h or 0A8h. `Event(0)` is no event.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Event(pub u64);

impl Event {
    /// No event.
    pub const NONE: Event = Event(0);

    /// A valid event without error code.
    pub const fn new(kind: EventType, vector: u8) -> Self {
        Self(VALID.mask() | TYPE.with(0, kind as u64) | vector as u64)
    }

    /// External interrupt `vector`.
    pub const fn interrupt(vector: u8) -> Self {
        Self::new(EventType::Interrupt, vector)
    }

    /// Non-maskable interrupt; the vector is 2 by definition.
    pub const fn nmi() -> Self {
        Self::new(EventType::Nmi, 2)
    }

    /// Exception, with its error code where it has one.
    pub const fn exception(vector: u8, error: Option<u32>) -> Self {
        let event = Self::new(EventType::Exception, vector);
        match error {
            Some(code) => event.with_error(code),
            None => event,
        }
    }

    /// The same event with an error code.
    #[must_use]
    pub const fn with_error(self, code: u32) -> Self {
        Self(ERROR_CODE.with(self.0 | ERROR_VALID.mask(), code as u64))
    }

    /// True if there is an event.
    pub const fn valid(self) -> bool {
        VALID.is_set(self.0)
    }

    /// Vector.
    pub const fn vector(self) -> u8 {
        VECTOR.get(self.0) as u8
    }

    /// Raw type bits.
    pub const fn type_bits(self) -> u8 {
        TYPE.get(self.0) as u8
    }

    /// Type; `None` for reserved encodings.
    pub const fn kind(self) -> Option<EventType> {
        EventType::from_bits(self.type_bits())
    }

    /// Error code, where one is to be pushed.
    pub const fn error(self) -> Option<u32> {
        if ERROR_VALID.is_set(self.0) { Some(ERROR_CODE.get(self.0) as u32) } else { None }
    }

    /// Why VMRUN would exit with INVALID for this EVENTINJ (APM2 15.20); `None` if legal or absent.
    pub const fn illegal(self) -> Option<&'static str> {
        if !self.valid() {
            return None;
        }
        match self.kind() {
            None => Some("EVENTINJ has a reserved type"),
            Some(EventType::Exception) if self.vector() == 2 => Some("EVENTINJ injects vector 2 (NMI) as an exception"),
            Some(EventType::Exception) if self.vector() > 31 => Some("EVENTINJ injects an exception above vector 31"),
            Some(_) => None,
        }
    }

    /// Does an exception of this vector push an error code (APM2 8.4.1)?
    pub const fn exception_has_error(vector: u8) -> bool {
        matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
    }
}

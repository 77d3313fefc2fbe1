//! Devices: registers apart from bus glue.
//!
//! Every device is plain registers with `read`, `write` and, where time drives it, `tick`; [`bus`] alone knows at which
//! port or address it sits and which line it pulls. Each has a saved form of its own in a `mod saved` at the end of its
//! file: `save` takes the runtime struct apart without `..`, so that a new field does not compile until someone decides
//! whether it is saved, and `restore` believes nothing.
//!
//! This room refuses to know engines, hosts' clocks, sockets and how a section travels. Time is the `tsc` argument: TSC
//! ticks since the machine was built.

pub mod block;
pub mod bus;
pub mod civil;
pub mod ioapic;
pub mod kvm_clock;
pub mod lapic;
pub mod net;
pub mod power;
pub mod rtc;
pub mod uart;
pub mod virtio;

/// A saved form that makes no device. Saved bytes are hostile until checked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("saved field {field} is {found}: {rule}")]
pub struct Unfit {
    /// Name of the field in device.proto.
    pub field: &'static str,
    /// What it holds.
    pub found: String,
    /// What it must be.
    pub rule: &'static str,
}

impl Unfit {
    fn new(field: &'static str, found: impl std::fmt::Debug, rule: &'static str) -> Self {
        let mut found = format!("{found:x?}");
        if found.len() > 80 {
            found = format!("{}...", found.chars().take(77).collect::<String>());
        }
        Self { field, found, rule }
    }

    fn check(holds: bool, field: &'static str, found: impl std::fmt::Debug, rule: &'static str) -> Result<(), Self> {
        if holds { Ok(()) } else { Err(Self::new(field, found, rule)) }
    }
}

/// A saved number that must fit a narrower register.
fn narrow<T: TryFrom<u32>>(field: &'static str, value: u32) -> Result<T, Unfit> {
    T::try_from(value).map_err(|_| Unfit::new(field, value, "must fit its register"))
}

/// Ticks since the machine was built, as nanoseconds.
fn nanoseconds(tsc: u64, tsc_hz: u64) -> u64 {
    (u128::from(tsc) * 1_000_000_000 / u128::from(tsc_hz.max(1))) as u64
}

//! ACPI tables: what the guest is told about the machine (ACPI 6.5). Hardware-reduced: no PIC, no PIT, no SCI.
//!
//! ```text
//! RSDP -> XSDT -> FADT (sleep and reset registers) -> DSDT (serial, clock, virtio devices, S5)
//!              -> MADT (local APICs, IOAPIC, NMI on LINT1)
//! ```

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes};

use super::Boot;
use super::layout::GENERATION_ID;
use crate::device::bus::{
    EVENT_LINE, IOAPIC_BASE, LAPIC_BASE, RESET_PORT, RTC_PORT, SERIAL_LINE, SERIAL_PORT, SLEEP_CONTROL_PORT,
    SLEEP_STATUS_PORT, Window,
};
use crate::device::power::{RESET_VALUE, SLEEP_TYPE_OFF};
use crate::memory::{GuestMemory, OutOfRange};

/// Where the root pointer lies: in the BIOS area, so that a guest that searches finds it.
pub const RSDP: u64 = 0xe_0000;
const TABLES: u64 = RSDP + 0x40;
const OEM: [u8; 6] = *b"GODWIT";
const OEM_TABLE: [u8; 8] = *b"GODWITVM";
const OEM_REVISION: u32 = 1;
/// VGA not present, MSI not supported (FADT IA-PC boot architecture flags).
const BOOT_ARCHITECTURE: u16 = 0x000c;
const CENTURY: u8 = 0x32;

/// Writes all tables.
///
/// # Errors
/// There is no RAM below 1 MiB.
pub fn write(memory: &GuestMemory, boot: &Boot<'_>) -> Result<(), OutOfRange> {
    for (gpa, table) in tables(boot.vcpus, boot.windows, !boot.generation_id.is_empty()) {
        memory.write(gpa, &table)?;
    }
    Ok(())
}

/// All tables with their addresses.
pub fn tables(vcpus: usize, windows: &[Window], has_generation: bool) -> Vec<(u64, Vec<u8>)> {
    let mut at = TABLES;
    let mut placed = Vec::new();
    let mut place = |table: Vec<u8>| {
        let gpa = at;
        at = (at + table.len() as u64).next_multiple_of(16);
        placed.push((gpa, table));
        gpa
    };
    let dsdt = place(dsdt(windows, has_generation));
    let fadt = place(fadt(dsdt));
    let madt = place(madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt));
    placed.push((RSDP, bytes(&Rsdp::new(OEM, xsdt))));
    placed
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address.into())
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let flags =
        [Flags::Wbinvd, Flags::PwrButton, Flags::SlpButton, Flags::ResetRegSup, Flags::Headless, Flags::HwReducedAcpi];
    let mut fadt = flags.into_iter().fold(FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION), FADTBuilder::flag);
    fadt = fadt.dsdt_64(dsdt);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.century = CENTURY;
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    bytes(&fadt.finalize())
}

/// Local APIC NMI structure (ACPI 6.5, 5.2.12.7); the crate has none.
#[repr(C, packed)]
#[derive(Clone, IntoBytes, Immutable)]
struct LocalApicNmi {
    kind: u8,
    length: u8,
    processor: u8,
    flags: U16,
    lint: u8,
}

impl Aml for LocalApicNmi {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.as_bytes());
    }
}

fn madt(vcpus: usize) -> Vec<u8> {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LAPIC_BASE as u32));
    for vcpu in 0..vcpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_BASE as u32, 0));
    // Every processor.
    madt.add_structure(LocalApicNmi { kind: 4, length: 6, processor: 0xff, flags: U16::ZERO, lint: 1 });
    bytes(&madt)
}

fn dsdt(windows: &[Window], has_generation: bool) -> Vec<u8> {
    let mut aml = Vec::new();
    Scope::new("_SB_".into(), vec![&Serial, &Clock]).to_aml_bytes(&mut aml);
    for (n, window) in windows.iter().enumerate() {
        Scope::new("_SB_".into(), vec![&Virtio { n: n as u8, window: *window }]).to_aml_bytes(&mut aml);
    }
    if has_generation {
        Scope::new("_SB_".into(), vec![&Generation, &Events]).to_aml_bytes(&mut aml);
    }
    Name::new(Path::new("_S5_"), &Package::new(vec![&SLEEP_TYPE_OFF, &SLEEP_TYPE_OFF])).to_aml_bytes(&mut aml);
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&aml);
    table.as_slice().to_vec()
}

struct Serial;

impl Aml for Serial {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let id = EISAName::new("PNP0501");
        let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8);
        let line = Interrupt::new(true, true, false, false, SERIAL_LINE);
        let resources = ResourceTemplate::new(vec![&ports, &line]);
        let children: [&dyn Aml; 3] =
            [&Name::new("_HID".into(), &id), &Name::new("_UID".into(), &0u8), &Name::new("_CRS".into(), &resources)];
        Device::new("COM1".into(), children.to_vec()).to_aml_bytes(sink);
    }
}

struct Clock;

impl Aml for Clock {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let id = EISAName::new("PNP0B00");
        let ports = IO::new(RTC_PORT, RTC_PORT, 1, 2);
        let resources = ResourceTemplate::new(vec![&ports]);
        let children: [&dyn Aml; 2] = [&Name::new("_HID".into(), &id), &Name::new("_CRS".into(), &resources)];
        Device::new("RTC_".into(), children.to_vec()).to_aml_bytes(sink);
    }
}

/// VM generation ID: where it lies.
struct Generation;

const GENERATION: &str = "VGEN";
/// What drivers look for.
const GENERATION_COMPATIBLE: &str = "VM_Gen_Counter";
/// `Notify` code: it has changed.
const GENERATION_CHANGED: u8 = 0x80;

impl Aml for Generation {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (low, high) = (GENERATION_ID as u32, (GENERATION_ID >> 32) as u32);
        let children: [&dyn Aml; 4] = [
            &Name::new("_HID".into(), &"GDWT0001"),
            &Name::new("_CID".into(), &GENERATION_COMPATIBLE),
            &Name::new("_DDN".into(), &GENERATION_COMPATIBLE),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ];
        Device::new(GENERATION.into(), children.to_vec()).to_aml_bytes(sink);
    }
}

/// Generic Event Device (ACPI 6.5, 5.6.9): its line says that the generation has changed.
struct Events;

impl Aml for Events {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let line = Interrupt::new(true, true, false, false, EVENT_LINE);
        let resources = ResourceTemplate::new(vec![&line]);
        let (event, generation, number) = (Arg(0), Path::new(GENERATION), EVENT_LINE as u8);
        let tell = Notify::new(&generation, &GENERATION_CHANGED);
        let ours = Equal::new(&event, &number);
        let which = If::new(&ours, vec![&tell]);
        let children: [&dyn Aml; 4] = [
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &resources),
            &Method::new("_EVT".into(), 1, true, vec![&which]),
        ];
        Device::new("GED_".into(), children.to_vec()).to_aml_bytes(sink);
    }
}

/// The id that Linux's virtio_mmio driver matches.
const VIRTIO_ID: &str = "LNRO0005";

struct Virtio {
    n: u8,
    window: Window,
}

impl Aml for Virtio {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let name = format!("VR{:02}", self.n);
        let registers = Memory32Fixed::new(true, self.window.gpa as u32, self.window.bytes as u32);
        let line = Interrupt::new(true, false, false, false, self.window.line);
        let resources = ResourceTemplate::new(vec![&registers, &line]);
        let children: [&dyn Aml; 4] = [
            &Name::new("_HID".into(), &VIRTIO_ID),
            &Name::new("_UID".into(), &self.n),
            &Name::new("_CCA".into(), &1u8),
            &Name::new("_CRS".into(), &resources),
        ];
        Device::new(name.as_str().into(), children.to_vec()).to_aml_bytes(sink);
    }
}

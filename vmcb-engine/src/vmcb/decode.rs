//! The page for people: rows with flags spelled by name, and the rows in which two pages differ.
//!
//! Rows come from the layout tables of the two areas, so a field cannot be forgotten; reserved rows appear when they
//! are not zero. Any 4096 bytes can be described. This file refuses to judge what it shows (`check`).

use zerocopy::IntoBytes;

use crate::vmcb::bits::{LayoutRow, NamedBits};
use crate::vmcb::control::{
    CLEAN_BITS, INTERRUPT_SHADOW_BITS, LBR_BITS, NP_ENABLE_BITS, RAP_CONTROL_BITS, VINTR_BITS, tlb_control,
};
use crate::vmcb::exit::{IO_BITS, npf};
use crate::vmcb::registers::{self, cr0, cr4, dbgctl, dr6, dr7, efer, rflags};
use crate::vmcb::{ControlArea, Event, ExitCode, Intercept, SaveArea, Segment, Vmcb};

/// One line of a description.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// `control` or `save`.
    pub section: &'static str,
    /// The manual's name of the field.
    pub field: String,
    /// Its value with flags by name.
    pub value: String,
}

/// One field in which two pages differ.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiffRow {
    /// `control` or `save`.
    pub section: &'static str,
    /// The manual's name of the field.
    pub field: String,
    /// Value in the first page.
    pub left: String,
    /// Value in the second page.
    pub right: String,
}

/// Every field of the page in order; reserved bytes, counters and branch records only where they are not zero.
pub fn describe(vmcb: &Vmcb) -> Vec<Row> {
    let is_quiet = |cell: &Cell<'_>| cell.may_be_omitted && cell.bytes.iter().all(|byte| *byte == 0);
    cells(vmcb)
        .filter(|cell| !is_quiet(cell))
        .map(|cell| Row { section: cell.section, field: cell.field.clone(), value: cell.value(vmcb) })
        .collect()
}

/// Every field in which the pages differ, in order.
pub fn diff(left: &Vmcb, right: &Vmcb) -> Vec<DiffRow> {
    cells(left)
        .zip(cells(right))
        .filter(|(a, b)| a.bytes != b.bytes)
        .map(|(a, b)| DiffRow { section: a.section, left: a.value(left), right: b.value(right), field: a.field })
        .collect()
}

/// A place of the page that is shown on one line.
struct Cell<'a> {
    section: &'static str,
    row: &'static str,
    field: String,
    bytes: &'a [u8],
    may_be_omitted: bool,
}

/// Rows that hold several like things; each is shown on a line of its own, of so many bytes.
fn element_size(row: &LayoutRow) -> usize {
    match row.name {
        "INTERCEPT" => 4,
        "REQUESTED_IRR" => 8,
        "PERF_CTL/PERF_CTR" | "LBR_STACK" => 16,
        _ => row.size,
    }
}

fn cells(vmcb: &Vmcb) -> impl Iterator<Item = Cell<'_>> {
    let areas =
        [("control", ControlArea::LAYOUT, vmcb.control.as_bytes()), ("save", SaveArea::LAYOUT, vmcb.save.as_bytes())];
    areas.into_iter().flat_map(|(section, layout, bytes)| {
        layout.iter().flat_map(move |row| {
            let size = element_size(row);
            (0..row.size / size).map(move |index| {
                let field = match (row.is_reserved(), row.size == size) {
                    (true, _) => format!("reserved {:03X}h", row.offset),
                    (false, true) => row.name.to_owned(),
                    (false, false) => format!("{}[{index}]", row.name),
                };
                Cell {
                    section,
                    row: row.name,
                    field,
                    bytes: &bytes[row.offset + index * size..][..size],
                    may_be_omitted: row.is_reserved() || (row.size != size && row.name != "INTERCEPT"),
                }
            })
        })
    })
}

impl Cell<'_> {
    fn value(&self, vmcb: &Vmcb) -> String {
        match self.row {
            "INTERCEPT" => intercepts(self.field.as_bytes()["INTERCEPT[".len()] - b'0', self.word()),
            "EXITCODE" => format!("{:#x} {}", self.word(), ExitCode(self.word())),
            "EXITINFO1" => exit_info(vmcb.control.exit_code(), self.word()),
            "EXITINTINFO" | "EVENTINJ" => event(Event(self.word())),
            "TLB_CONTROL" => tlb(self.word() as u8),
            "RFLAGS" => format!("{} IOPL={}", flags(self.word(), rflags::BITS), registers::IOPL.get(self.word())),
            "ES" | "CS" | "SS" | "DS" | "FS" | "GS" | "LDTR" | "TR" => segment(self.bytes),
            "GDTR" | "IDTR" => table(self.bytes),
            name => match (bits_of(name), self.bytes.len()) {
                (Some(bits), _) => flags(self.word(), bits),
                (None, 1 | 2 | 4 | 8) => format!("{:#x}", self.word()),
                (None, _) => hex(self.bytes),
            },
        }
    }

    /// The value of a cell of at most eight bytes.
    fn word(&self) -> u64 {
        let mut bytes = [0; 8];
        let size = self.bytes.len().min(8);
        bytes[..size].copy_from_slice(&self.bytes[..size]);
        u64::from_le_bytes(bytes)
    }
}

fn bits_of(row: &str) -> Option<&'static [NamedBits]> {
    Some(match row {
        "RAP_CONTROL" => RAP_CONTROL_BITS,
        "VINTR" => VINTR_BITS,
        "INTERRUPT_SHADOW" => INTERRUPT_SHADOW_BITS,
        "NP_ENABLE" => NP_ENABLE_BITS,
        "LBR_VIRTUALIZATION_ENABLE" => LBR_BITS,
        "VMCB_CLEAN" => CLEAN_BITS,
        "CR0" => cr0::BITS,
        "CR4" => cr4::BITS,
        "EFER" => efer::BITS,
        "DR6" => dr6::BITS,
        "DR7" => dr7::BITS,
        "DBGCTL" => dbgctl::BITS,
        _ => return None,
    })
}

/// `0x5 PE EM`, with `NAME=value` for runs of bits; bits without a name show in the number only.
pub fn flags(word: u64, names: &[NamedBits]) -> String {
    let mut text = format!("{word:#x}");
    for named in names.iter().filter(|named| named.bits.is_set(word)) {
        text.push(' ');
        text.push_str(named.name);
        if named.bits.width() > 1 {
            text.push_str(&format!("={:#x}", named.bits.get(word)));
        }
    }
    text
}

fn intercepts(word_number: u8, word: u64) -> String {
    let mut text = format!("{word:#010x}");
    for bit in (0..32).filter(|bit| word & (1 << bit) != 0) {
        if let Some(which) = Intercept::from_position(usize::from(word_number), bit) {
            text.push(' ');
            text.push_str(&which.name());
        }
    }
    text
}

fn exit_info(code: ExitCode, word: u64) -> String {
    match code {
        ExitCode::NPF => flags(word, npf::BITS),
        ExitCode::IOIO => flags(word, IO_BITS),
        ExitCode::MSR => format!("{word:#x} {}", if word & 1 == 0 { "RDMSR" } else { "WRMSR" }),
        _ => format!("{word:#x}"),
    }
}

fn event(event: Event) -> String {
    if !event.valid() {
        return format!("{:#x}", event.0);
    }
    let kind = event.kind().map_or("reserved type", |kind| kind.name());
    let error = event.error().map_or(String::new(), |error| format!(" error {error:#x}"));
    format!("{:#x} {kind} vector {:#x}{error}", event.0, event.vector())
}

fn tlb(value: u8) -> String {
    let name = match value {
        tlb_control::NONE => "nothing",
        tlb_control::FLUSH_ALL => "flush all",
        tlb_control::FLUSH_GUEST => "flush guest",
        tlb_control::FLUSH_GUEST_NON_GLOBAL => "flush guest, not global",
        _ => "reserved",
    };
    format!("{value:#x} {name}")
}

fn segment_of(bytes: &[u8]) -> Segment {
    zerocopy::FromBytes::read_from_bytes(bytes).unwrap_or_default()
}

fn segment(bytes: &[u8]) -> String {
    let segment = segment_of(bytes);
    let mut text = format!(
        "selector {:#06x} attrib {:#05x} limit {:#x} base {:#x}",
        segment.selector, segment.attrib, segment.limit, segment.base
    );
    if !segment.present() {
        return text + " unusable";
    }
    text += match (segment.is_code_or_data(), segment.is_code()) {
        (false, _) => " system",
        (true, true) => " code",
        (true, false) => " data",
    };
    text += &format!(" type {:#x} DPL{}", segment.kind(), segment.dpl());
    for (set, name) in [(segment.long(), " L"), (segment.big(), " D"), (segment.granular(), " G")] {
        text += if set { name } else { "" };
    }
    text
}

fn table(bytes: &[u8]) -> String {
    let segment = segment_of(bytes);
    let text = format!("limit {:#x} base {:#x}", segment.limit, segment.base);
    match (segment.selector, segment.attrib) {
        (0, 0) => text,
        (selector, attrib) => format!("{text} reserved {selector:#x} {attrib:#x}"),
    }
}

/// Bytes as hex; long runs of zeros at the end are cut.
fn hex(bytes: &[u8]) -> String {
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let mut text: String = bytes[..end].iter().map(|byte| format!("{byte:02x}")).collect();
    if end < bytes.len() {
        text += &format!("{}00 x{}", if end == 0 { "" } else { " " }, bytes.len() - end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_SIZE;
    use proptest::prelude::*;

    fn value<'a>(rows: &'a [Row], field: &str) -> &'a str {
        &rows.iter().find(|row| row.field == field).unwrap_or_else(|| panic!("{field} missing")).value
    }

    #[test]
    fn flags_are_spelled_by_name() {
        let mut vmcb = Vmcb::boxed();
        vmcb.save.cr0 = cr0::PE | cr0::PG;
        vmcb.save.rflags = 0x3202;
        vmcb.save.cs = Segment::new(0x10, 0xa9b, 0xffff_ffff, 0);
        vmcb.control.exitcode = ExitCode::NPF.0;
        vmcb.control.exitinfo1 = 0x1_0000_0006;
        vmcb.control.vintr = 0x9_0f04;
        vmcb.control.eventinj = Event::exception(14, Some(2)).0;
        vmcb.control.set_intercept(Intercept::MSR_PROT, true);
        let rows = describe(&vmcb);
        assert_eq!(value(&rows, "CR0"), "0x80000001 PE PG");
        assert_eq!(value(&rows, "RFLAGS"), "0x3202 IF IOPL=3");
        assert_eq!(value(&rows, "CS"), "selector 0x0010 attrib 0xa9b limit 0xffffffff base 0x0 code type 0xb DPL0 L G");
        assert_eq!(value(&rows, "EXITCODE"), "0x400 NPF");
        assert_eq!(value(&rows, "EXITINFO1"), "0x100000006 RW US FINAL");
        assert_eq!(value(&rows, "VINTR"), "0x90f04 V_TPR=0x4 V_IRQ V_GIF V_NMI V_INTR_PRIO=0x9");
        assert_eq!(value(&rows, "EVENTINJ"), "0x280000b0e EXCEPTION vector 0xe error 0x2");
        assert_eq!(value(&rows, "INTERCEPT[3]"), "0x10000000 MSR_PROT");
        assert!(!rows.iter().any(|row| row.field.starts_with("reserved")));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn any_page_can_be_described_and_every_change_shows(
            bytes in proptest::collection::vec(any::<u8>(), PAGE_SIZE), at in 0..PAGE_SIZE, flip in 1u8..,
        ) {
            let page: [u8; PAGE_SIZE] = bytes.try_into().unwrap();
            let vmcb = Vmcb::from_bytes(&page);
            prop_assert_eq!(vmcb.as_page(), &page);
            prop_assert!(describe(&vmcb).len() > 100);
            let mut other = vmcb.clone();
            other.as_page_mut()[at] ^= flip;
            prop_assert_eq!(diff(&vmcb, &vmcb), vec![]);
            let rows = diff(&vmcb, &other);
            prop_assert_eq!(rows.len(), 1);
            prop_assert_ne!(&rows[0].left, &rows[0].right);
        }
    }
}

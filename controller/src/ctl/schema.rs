//! Messages by the names of their fields: sections, indexes and words of a lane as JSON, from the schema that `proto` carries.
//!
//! One walk over the schema shows every message there is and will be; nothing is written down twice. Bytes are shown in hex,
//! enumerations by name, and what this release does not know by its number. Knows which message a section holds by the
//! section's name, as proto/README.md 2 has it; knows nothing of what the values mean.

use std::sync::OnceLock;

use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, Kind, ReflectMessage, Value};
use serde_json::{Map, Value as Json};

use super::report::hex;

/// Sections by name without their last number, and the message that they hold in major version 1.
const SECTIONS: [(&str, &str); 14] = [
    ("clock", "ClockV1"),
    ("cpu/", "CpuStateV1"),
    ("device/lapic", "LapicV1"),
    ("device/ioapic", "IoapicV1"),
    ("device/uart", "UartV1"),
    ("device/rtc", "RtcV1"),
    ("device/kvm-clock", "KvmClockV1"),
    ("device/power", "PowerV1"),
    ("device/virtio-blk", "VirtioBlkV1"),
    ("device/virtio-net", "VirtioNetV1"),
    ("device/virtio-rng", "VirtioRngV1"),
    ("vm", "StoredVm"),
    ("config", "MachineConfig"),
    ("seen", "StoredVm"),
];

/// Bytes of one field that are shown.
const HEX_BYTES_MAX: usize = 256;

fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    POOL.get_or_init(|| DescriptorPool::decode(proto::DESCRIPTORS).expect("the build made this schema"))
}

/// The name of the message that a section of this name holds.
fn message_of_section(name: &str) -> Option<&'static str> {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    SECTIONS.iter().find(|(known, _)| *known == stem).map(|(_, message)| *message)
}

/// The body of a section; none if this release does not know it, or if these bytes are none.
pub fn section(name: &str, major: u32, body: &[u8]) -> Option<Json> {
    if major != 1 {
        return None;
    }
    message(message_of_section(name)?, body)
}

/// A message of package `godwit.v1`.
pub fn message(name: &str, bytes: &[u8]) -> Option<Json> {
    let descriptor = pool().get_message_by_name(&format!("godwit.v1.{name}"))?;
    let message = DynamicMessage::decode(descriptor, bytes).ok()?;
    Some(object(&message))
}

fn object(message: &DynamicMessage) -> Json {
    let mut fields = Map::new();
    for field in message.descriptor().fields() {
        // A message, an optional value or one of several that is not there says nothing; a plain value is its default.
        if !field.supports_presence() || message.has_field(&field) {
            fields.insert(field.name().to_owned(), json(&field, &message.get_field(&field)));
        }
    }
    let unknown: Vec<Json> = message.unknown_fields().map(|field| field.number().into()).collect();
    if !unknown.is_empty() {
        fields.insert("unknown_fields".to_owned(), unknown.into());
    }
    Json::Object(fields)
}

fn json(field: &FieldDescriptor, value: &Value) -> Json {
    match value {
        Value::Bool(value) => (*value).into(),
        Value::I32(value) => (*value).into(),
        Value::I64(value) => (*value).into(),
        Value::U32(value) => (*value).into(),
        Value::U64(value) => (*value).into(),
        Value::F32(value) => (*value).into(),
        Value::F64(value) => (*value).into(),
        Value::String(value) => value.as_str().into(),
        Value::Bytes(bytes) if bytes.len() > HEX_BYTES_MAX => {
            format!("{}... ({} bytes)", hex(&bytes[..HEX_BYTES_MAX]), bytes.len()).into()
        }
        Value::Bytes(bytes) => hex(bytes).into(),
        Value::EnumNumber(number) => match field.kind() {
            Kind::Enum(words) => words.get_value(*number).map_or((*number).into(), |word| word.name().into()),
            _ => (*number).into(),
        },
        Value::Message(message) => object(message),
        Value::List(values) => values.iter().map(|value| json(field, value)).collect(),
        // No message of ours has a map.
        Value::Map(map) => format!("{} entries", map.len()).into(),
    }
}

/// How numbers are shown to people.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Numbers {
    /// As counts are.
    Decimal,
    /// As registers are.
    Hex,
}

/// The same for people: a line a value, what is nested indented.
pub fn lines(value: &Json, numbers: Numbers) -> String {
    let mut text = String::new();
    match value {
        Json::Object(fields) => fields.iter().for_each(|(name, value)| put(&mut text, name, value, numbers, 0)),
        other => put(&mut text, "", other, numbers, 0),
    }
    text
}

fn put(text: &mut String, name: &str, value: &Json, numbers: Numbers, depth: usize) {
    let indent = "  ".repeat(depth);
    let plain = |value: &Json| match value {
        Json::Number(number) if numbers == Numbers::Hex => {
            number.as_u64().map_or_else(|| number.to_string(), |number| format!("{number:#x}"))
        }
        Json::String(word) => word.clone(),
        other => other.to_string(),
    };
    match value {
        Json::Object(fields) => {
            text.push_str(&format!("{indent}{name}:\n"));
            fields.iter().for_each(|(name, value)| put(text, name, value, numbers, depth + 1));
        }
        Json::Array(values) if values.iter().any(Json::is_object) => {
            for (index, value) in values.iter().enumerate() {
                put(text, &format!("{name}[{index}]"), value, numbers, depth);
            }
        }
        Json::Array(values) => {
            let values: Vec<String> = values.iter().map(plain).collect();
            text.push_str(&format!("{indent}{name}: {}\n", super::report::dash(&values.join(" "))));
        }
        other => text.push_str(&format!("{indent}{name}: {}\n", super::report::dash(&plain(other)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message as _;
    use proto::v1;

    #[test]
    fn every_section_has_a_message_of_the_schema() {
        for (stem, message) in SECTIONS {
            assert!(pool().get_message_by_name(&format!("godwit.v1.{message}")).is_some(), "{stem}");
        }
        assert_eq!(message_of_section("device/virtio-blk12"), Some("VirtioBlkV1"));
        assert_eq!(message_of_section("device/kvm-clock"), Some("KvmClockV1"));
        assert_eq!(message_of_section("device/flux-capacitor0"), None);
    }

    #[test]
    fn a_device_is_told_by_the_names_of_its_fields() {
        let uart = v1::UartV1 { divisor: 12, received: vec![0xab, 1], ..Default::default() };
        let json = section("device/uart0", 1, &uart.encode_to_vec()).unwrap();
        assert_eq!(
            (&json["divisor"], &json["received"], &json["overrun"]),
            (&12.into(), &"ab01".into(), &false.into())
        );
        assert_eq!(section("device/uart0", 2, &uart.encode_to_vec()), None);
        let stored = v1::StoredVm { state: v1::VmState::Running.into(), ..Default::default() };
        let json = section("vm", 1, &stored.encode_to_vec()).unwrap();
        assert_eq!(json["state"], "VM_STATE_RUNNING");
        assert!(json.get("config").is_none());
    }

    #[test]
    fn registers_read_as_registers() {
        let cpu = v1::CpuStateV1 {
            gprs: vec![1, 255],
            cs: Some(v1::SegmentState { selector: 8, ..Default::default() }),
            ..Default::default()
        };
        let text = lines(&section("cpu/0", 1, &cpu.encode_to_vec()).unwrap(), Numbers::Hex);
        assert!(text.contains("gprs: 0x1 0xff\n") && text.contains("\n  selector: 0x8\n"), "{text}");
    }

    #[test]
    fn what_a_newer_release_adds_is_told_by_its_number() {
        let mut body = v1::ClockV1 { retired: 7, skipped_tsc: 0 }.encode_to_vec();
        body.extend([0xf8, 0x06, 1]);
        let json = section("clock", 1, &body).unwrap();
        assert_eq!((&json["retired"], &json["unknown_fields"]), (&7.into(), &serde_json::json!([111])));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), section_at in 0..SECTIONS.len()) {
            let _ = message(SECTIONS[section_at].1, &bytes);
        }
    }
}

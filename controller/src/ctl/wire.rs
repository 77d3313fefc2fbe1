//! Protobuf without a schema: prints the fields of bytes whose message nobody told us.
//!
//! `ctl inspect` must show sections of releases and devices that this one does not know. A field of length-delimited bytes
//! is shown as text, as a message, or as hex, whichever it can be, in this order. Hostile bytes cost no more than their
//! length: depth and lines are bounded, nothing panics. Encoding: protobuf.dev/programming-guides/encoding.

const DEPTH_MAX: usize = 8;
const LINES_MAX: usize = 4096;
const HEX_BYTES_MAX: usize = 64;

/// One line a field, nested messages indented; none if these bytes are not a message.
pub fn describe(bytes: &[u8]) -> Option<String> {
    let mut lines = Vec::new();
    message(bytes, 0, &mut lines)?;
    Some(lines.join("\n"))
}

fn message(bytes: &[u8], depth: usize, lines: &mut Vec<String>) -> Option<()> {
    let mut rest = bytes;
    let indent = "  ".repeat(depth);
    while !rest.is_empty() {
        let (key, after) = varint(rest)?;
        let number = key >> 3;
        if number == 0 || number > 0x1fff_ffff || lines.len() > LINES_MAX {
            return None;
        }
        rest = match key & 7 {
            0 => {
                let (value, after) = varint(after)?;
                lines.push(format!("{indent}{number}: {value} ({value:#x})"));
                after
            }
            1 => {
                let (value, after) = after.split_first_chunk::<8>()?;
                lines.push(format!("{indent}{number}: {:#018x}", u64::from_le_bytes(*value)));
                after
            }
            5 => {
                let (value, after) = after.split_first_chunk::<4>()?;
                lines.push(format!("{indent}{number}: {:#010x}", u32::from_le_bytes(*value)));
                after
            }
            2 => {
                let (length, after) = varint(after)?;
                let (value, after) = after.split_at_checked(usize::try_from(length).ok()?)?;
                delimited(number, value, depth, lines);
                after
            }
            _ => return None,
        };
    }
    Some(())
}

fn delimited(number: u64, value: &[u8], depth: usize, lines: &mut Vec<String>) {
    let indent = "  ".repeat(depth);
    let text = std::str::from_utf8(value).ok().filter(|text| !text.chars().any(char::is_control));
    if let Some(text) = text {
        lines.push(format!("{indent}{number}: {text:?}"));
        return;
    }
    let mut nested = Vec::new();
    if depth < DEPTH_MAX && message(value, depth + 1, &mut nested).is_some() {
        lines.push(format!("{indent}{number}:"));
        lines.append(&mut nested);
        return;
    }
    let shown = super::report::hex(&value[..value.len().min(HEX_BYTES_MAX)]);
    let more = if value.len() > HEX_BYTES_MAX { format!("... ({} bytes)", value.len()) } else { String::new() };
    lines.push(format!("{indent}{number}: {shown}{more}"));
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().take(10).enumerate() {
        if index == 9 && *byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[index + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message as _;

    #[test]
    fn a_message_is_shown_without_its_schema() {
        let manifest = proto::v1::Manifest {
            vm_name: "vm1".into(),
            generation: 7,
            packs: vec![proto::v1::PackRef { id: vec![0xff; 100], bytes: 300, generation: 0 }],
            ..Default::default()
        };
        let text = describe(&manifest.encode_to_vec()).unwrap();
        assert!(text.contains("4: \"vm1\"") && text.contains("6: 7 (0x7)"), "{text}");
        assert!(text.contains("12:\n  1: ffff") && text.contains("(100 bytes)\n  2: 300"), "{text}");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = describe(&bytes);
        }

        #[test]
        fn cut_messages_are_refused_not_guessed(cut in 1usize..8) {
            let bytes = proto::v1::VmName { vm: "12345678".into() }.encode_to_vec();
            prop_assert!(describe(&bytes[..bytes.len() - cut]).is_none());
        }
    }
}

//! How records are written: a hash chained to the record before, then JSON.
//!
//! ```text
//! value = BLAKE3(chain of the record before || JSON) (32 bytes) | JSON
//! ```
//! A record that was changed, lost or put elsewhere breaks the chain and is found at the next start. Protobuf messages
//! and bytes inside the JSON are hex.

use super::event::{FORMAT, Record};

/// Chain before the first record.
pub const CHAIN_START: [u8; 32] = [0; 32];

/// Why bytes are not the next record.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// The hash does not match: changed bytes, or a record is missing before this one.
    #[error("the record does not match the chain of hashes")]
    Chain,
    /// Written by a release that this one does not know.
    #[error("record of format {0}; this release reads {FORMAT}")]
    Format(u32),
    /// The JSON does not have the form of a record.
    #[error("the record does not decode: {0}")]
    Json(#[from] serde_json::Error),
}

/// The value to store for a record, and the chain after it.
///
/// # Errors
/// [`SavedError::Json`].
pub fn encode(chain: &[u8; 32], record: &Record) -> Result<(Vec<u8>, [u8; 32]), SavedError> {
    let json = serde_json::to_vec(record)?;
    let hash = chained(chain, &json);
    Ok(([&hash[..], &json].concat(), hash))
}

/// The record of a stored value, and the chain after it.
///
/// # Errors
/// Any [`SavedError`].
pub fn decode(chain: &[u8; 32], value: &[u8]) -> Result<(Record, [u8; 32]), SavedError> {
    let (hash, json) = value.split_first_chunk::<32>().ok_or(SavedError::Chain)?;
    if *hash != chained(chain, json) {
        return Err(SavedError::Chain);
    }
    Ok((record(json)?, *hash))
}

/// The record of a stored value whose chain was checked when the ledger was opened.
///
/// # Errors
/// Any [`SavedError`].
pub fn reread(value: &[u8]) -> Result<Record, SavedError> {
    record(value.get(32..).ok_or(SavedError::Chain)?)
}

fn record(json: &[u8]) -> Result<Record, SavedError> {
    #[derive(serde::Deserialize)]
    struct Format {
        format: u32,
    }
    let Format { format } = serde_json::from_slice(json)?;
    if format != FORMAT {
        return Err(SavedError::Format(format));
    }
    Ok(serde_json::from_slice(json)?)
}

fn chained(chain: &[u8; 32], json: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(chain);
    hasher.update(json);
    *hasher.finalize().as_bytes()
}

/// Hex of bytes.
pub fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Bytes of hex; `None` if it is none.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    text.as_bytes().chunks(2).map(|pair| Some((digit(pair[0])? << 4 | digit(pair[1])?) as u8)).collect()
}

/// serde form of bytes: hex.
pub mod bytes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// Writes hex.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::to_hex(bytes))
    }

    /// Reads hex.
    ///
    /// # Errors
    /// Text that is no hex.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        super::from_hex(&text).ok_or_else(|| D::Error::custom("not hex"))
    }
}

/// serde form of a protobuf message: hex of its bytes.
pub mod message {
    use prost::Message;
    use serde::{Deserializer, Serializer, de::Error};

    /// Writes hex.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<M: Message, S: Serializer>(message: &M, serializer: S) -> Result<S::Ok, S::Error> {
        super::bytes::serialize(&message.encode_to_vec(), serializer)
    }

    /// Reads hex.
    ///
    /// # Errors
    /// Text that is no hex or bytes that do not decode.
    pub fn deserialize<'de, M: Message + Default, D: Deserializer<'de>>(deserializer: D) -> Result<M, D::Error> {
        let bytes = super::bytes::deserialize(deserializer)?;
        M::decode(&bytes[..]).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::event::Event;

    fn record(sequence: u64) -> Record {
        let event = Event::LeaseSet { lease_ms: 10_000 };
        Record {
            format: FORMAT,
            sequence,
            unix_ms: 5,
            actor: "a".into(),
            vm: String::new(),
            task: String::new(),
            event,
        }
    }

    #[test]
    fn a_changed_or_missing_record_breaks_the_chain() {
        let (first, chain) = encode(&CHAIN_START, &record(1)).unwrap();
        let (second, _) = encode(&chain, &record(2)).unwrap();
        let (found, after) = decode(&CHAIN_START, &first).unwrap();
        assert_eq!((found, after), (record(1), chain));
        assert!(matches!(decode(&CHAIN_START, &second), Err(SavedError::Chain)));
        for at in 0..first.len() {
            let mut changed = first.clone();
            changed[at] ^= 1;
            assert!(decode(&CHAIN_START, &changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn hex_survives_and_refuses() {
        assert_eq!(from_hex(&to_hex(&[0, 0xa5, 255])), Some(vec![0, 0xa5, 255]));
        assert_eq!(from_hex("é"), None);
        assert_eq!(from_hex("abc"), None);
    }
}

//! Identifiers that cannot be confused: each is a type of its own, made by one macro.
//!
//! Digest-like ids are 32 bytes (BLAKE3) and print as hex; [`Generation`] is a counter that only the ledger raises.

use std::fmt;
use std::str::FromStr;

/// A text that is not the hex form of an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} must be {expected} hex digits, not {found:?}")]
pub struct BadId {
    what: &'static str,
    expected: usize,
    found: String,
}

macro_rules! byte_ids {
    ($($(#[$doc:meta])* $name:ident[$len:literal];)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// From bytes that came from outside; `None` if the length is wrong.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }

            /// The bytes, for a message.
            pub fn to_vec(self) -> Vec<u8> {
                self.0.to_vec()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = BadId;
            fn from_str(text: &str) -> Result<Self, BadId> {
                let bad = || BadId { what: stringify!($name), expected: 2 * $len, found: text.chars().take(80).collect() };
                if text.len() != 2 * $len || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(bad());
                }
                let mut bytes = [0; $len];
                for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
                    let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
                    *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
                }
                Ok(Self(bytes))
            }
        }
    )*};
}

byte_ids! {
    /// BLAKE3 of bytes, or the root of a tree of such: what two sides compare.
    Digest[32];
    /// Names a pack in the bucket: BLAKE3 of the whole file.
    PackId[32];
    /// Names a checkpoint.
    CheckpointId[8];
    /// Names an operation, in every process and log line that takes part in it.
    OperationId[8];
    /// Names a cluster key.
    KeyId[8];
    /// Names a recording, by random bytes: one chain of blocks, whichever hosts wrote it.
    RecordingId[16];
    /// Names a VM for ever, however often its name is used again.
    VmId[16];
}

/// Counts the owners of a VM; raised only by a ledger append, which is the commit of every hand-over.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_text() {
        let id = VmId([0xa5; 16]);
        assert_eq!(id.to_string().parse::<VmId>(), Ok(id));
    }

    #[test]
    fn text_that_is_no_id_is_refused() {
        for text in ["", "zz", "a5a5", "é", "+5a5a5a5a5a5a5a5", &"f".repeat(17)] {
            assert!(text.parse::<CheckpointId>().is_err(), "{text:?}");
        }
    }
}

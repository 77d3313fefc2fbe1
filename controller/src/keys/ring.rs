//! The cluster keys as text: one a line, newest last.
//!
//! ```text
//! # comment
//! godwit-key 1 <id, 16 hex digits> <secret, 64 hex digits> <created, Unix milliseconds>
//! ```
//! The id is recomputed on reading, so a mistyped secret is noticed. Pure; knows no files.

use std::fmt;

use proto::ids::{Digest, VmId};
use proto::seal::DataKey;
use proto::v1::WrappedKey;
use proto::wrap::ClusterKey;

const HEAD: &str = "# Godwit cluster keys, newest last. Whoever has these and the bucket has every VM: keep them safe.";

/// Why text is no list of keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// A line of another form.
    #[error("line {0} is no key")]
    Line(usize),
    /// A secret that does not belong to its id.
    #[error("line {0}: the secret does not belong to the id; a digit is wrong")]
    Mistyped(usize),
    /// No line has a key.
    #[error("it holds no key")]
    Empty,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    key: ClusterKey,
    created_unix_ms: u64,
}

/// Cluster keys, oldest first. Never empty once one was made or read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    entries: Vec<Entry>,
}

impl Ring {
    /// Reads the text.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn parse(text: &str) -> Result<Ring, RingError> {
        let mut ring = Ring::default();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            let ["godwit-key", "1", id, secret, created] = words[..] else { return Err(RingError::Line(number)) };
            let secret: Digest = secret.parse().map_err(|_| RingError::Line(number))?;
            let created_unix_ms = created.parse().map_err(|_| RingError::Line(number))?;
            let key = ClusterKey::new(secret.0);
            if key.id().to_string() != id {
                return Err(RingError::Mistyped(number));
            }
            ring.insert(Entry { key, created_unix_ms });
        }
        if ring.entries.is_empty() { Err(RingError::Empty) } else { Ok(ring) }
    }

    fn insert(&mut self, entry: Entry) {
        if self.entries.iter().all(|known| known.key != entry.key) {
            self.entries.push(entry);
            self.entries.sort_by_key(|entry| entry.created_unix_ms);
        }
    }

    /// With one key more, the newest.
    pub fn rotated(&self, secret: [u8; 32], unix_ms: u64) -> Ring {
        let mut ring = self.clone();
        // A clock that went back must not make an older key the newest.
        let last = ring.entries.last().map_or(0, |entry| entry.created_unix_ms);
        ring.insert(Entry { key: ClusterKey::new(secret), created_unix_ms: unix_ms.max(last + 1) });
        ring
    }

    /// The keys of both.
    pub fn joined(&self, other: &Ring) -> Ring {
        let mut ring = self.clone();
        other.entries.iter().cloned().for_each(|entry| ring.insert(entry));
        ring
    }

    /// The key that wraps.
    ///
    /// # Panics
    /// If there is none.
    pub fn newest(&self) -> &ClusterKey {
        &self.entries.last().expect("a ring that was read or made has a key").key
    }

    /// Names of all keys, oldest first.
    pub fn ids(&self) -> Vec<String> {
        self.entries.iter().map(|entry| entry.key.id().to_string()).collect()
    }

    /// What some key of the ring unwraps.
    pub fn unwrap(&self, wrapped: &WrappedKey, vm: VmId) -> Option<DataKey> {
        let named = self.entries.iter().filter(|entry| entry.key.id().0[..] == wrapped.cluster_key[..]);
        named.map(|entry| &entry.key).find_map(|key| key.unwrap(wrapped, vm))
    }
}

impl fmt::Display for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEAD}")?;
        for Entry { key, created_unix_ms } in &self.entries {
            writeln!(f, "godwit-key 1 {} {} {created_unix_ms}", key.id(), Digest(*key.expose()))?;
        }
        Ok(())
    }
}

/// The name of a cluster key as a wrapped key has it.
pub fn name(bytes: &[u8]) -> String {
    bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_and_the_newest_is_last_whatever_the_clock_does() {
        let ring = Ring::default().rotated([1; 32], 5000).rotated([2; 32], 1000);
        assert_eq!(Ring::parse(&ring.to_string()), Ok(ring.clone()));
        assert_eq!(ring.newest(), &ClusterKey::new([2; 32]));
        assert_eq!(ring.joined(&ring), ring);
    }

    #[test]
    fn text_that_is_no_list_of_keys_is_refused() {
        assert_eq!(Ring::parse("# nothing\n"), Err(RingError::Empty));
        assert_eq!(Ring::parse("\nhello"), Err(RingError::Line(2)));
        let text = Ring::default().rotated([1; 32], 7).to_string();
        assert_eq!(Ring::parse(&text.replace("0101", "0110")), Err(RingError::Mistyped(2)));
    }
}

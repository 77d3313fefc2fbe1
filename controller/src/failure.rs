//! What went wrong, in the form in which it travels: a code, what and where, and what to do about it.
//!
//! Rooms below have small error enums of their own; at their door they become a [`Failure`], which the ledger can
//! keep, a gRPC status can carry and an operator can read. This file knows nothing of who failed or why.

use proto::status::Code;
use serde::{Deserialize, Serialize};
use tonic::metadata::MetadataValue;

/// Header of a gRPC status that carries [`Failure::hint`].
pub const HINT: &str = "godwit-hint";

/// A failed call, step or operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Failure {
    /// What kind of trouble; also `ctl`'s exit code.
    #[serde(with = "code_number")]
    pub code: Code,
    /// What, where and why.
    pub message: String,
    /// What to do about it; may be empty.
    pub hint: String,
    /// Key of the object in the bucket that is missing or damaged; empty if that is not the trouble.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub object: String,
}

impl Failure {
    /// A failure without advice.
    pub fn new(code: Code, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into(), hint: String::new(), object: String::new() }
    }

    /// The same with advice.
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = hint.into();
        self
    }

    /// The same, known to be the fault of this object in the bucket.
    pub fn object(mut self, key: impl Into<String>) -> Failure {
        self.object = key.into();
        self
    }

    /// The same, said of a place: `at: message`.
    pub fn at(mut self, place: &str) -> Failure {
        self.message = format!("{place}: {}", self.message);
        self
    }

    /// From a status of another process, said of a place.
    ///
    /// Agents answer with our codes only; `Unknown` is what the transport says when a connection breaks under a call.
    pub fn from_status(place: &str, status: &tonic::Status) -> Failure {
        let code = match status.code() {
            tonic::Code::Unknown => Code::Unreachable,
            code => Code::from(code),
        };
        let hint = hint_of(status).unwrap_or_default();
        let text = if status.message().is_empty() { "no reason given" } else { status.message() };
        Failure::new(code, format!("{place}: {text}")).hint(hint)
    }

    /// Whether asking again later may help.
    pub fn passes(&self) -> bool {
        matches!(self.code, Code::Unreachable)
    }
}

/// The advice that a status carries.
pub fn hint_of(status: &tonic::Status) -> Option<&str> {
    status.metadata().get(HINT)?.to_str().ok()
}

impl From<Failure> for tonic::Status {
    fn from(failure: Failure) -> tonic::Status {
        let mut status = tonic::Status::new(failure.code.into(), failure.message);
        if let Ok(hint) = MetadataValue::try_from(failure.hint)
            && !hint.is_empty()
        {
            status.metadata_mut().insert(HINT, hint);
        }
        status
    }
}

mod code_number {
    use proto::status::Code;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(code: &Code, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(*code as u32)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Code, D::Error> {
        u32::deserialize(deserializer).map(Code::from_number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_survives_the_wire_with_its_hint() {
        let failure = Failure::new(Code::Exhausted, "bucket is full").hint("remove checkpoints");
        let status = tonic::Status::from(failure);
        let back = Failure::from_status("hostA", &status);
        assert_eq!(back, Failure::new(Code::Exhausted, "hostA: bucket is full").hint("remove checkpoints"));
    }

    #[test]
    fn a_broken_connection_counts_as_unreachable() {
        let broken = tonic::Status::new(tonic::Code::Unknown, "transport error");
        assert!(Failure::from_status("hostA", &broken).passes());
    }
}

//! What can go wrong, as a code that travels in `Abort`, `OperationFailed` and `RunnerFailure`, and as `ctl`'s exit code.

/// Numbers are for ever; exit codes of `ctl` are these numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u32)]
pub enum Code {
    /// Our own broken invariant.
    Internal = 1,
    /// Wrong flag, name, size or file.
    BadInput = 2,
    /// No such VM, host, checkpoint or operation.
    NotFound = 3,
    /// The name is taken, or another operation holds the VM.
    Conflict = 4,
    /// The host lacks what the guest needs; the text names it.
    Incapable = 5,
    /// Memory, disk, bucket or lanes are full.
    Exhausted = 6,
    /// A host, the controller or the bucket does not answer.
    Unreachable = 7,
    /// Not allowed: certificate, role, ticket or generation.
    Denied = 8,
    /// Bytes that do not match their hash, or do not decode.
    Corrupt = 9,
    /// Cancelled by the operator.
    Cancelled = 10,
    /// The other side broke the protocol.
    Protocol = 11,
}

impl Code {
    /// Every code, in order of number.
    pub const ALL: [Code; 11] = [
        Code::Internal,
        Code::BadInput,
        Code::NotFound,
        Code::Conflict,
        Code::Incapable,
        Code::Exhausted,
        Code::Unreachable,
        Code::Denied,
        Code::Corrupt,
        Code::Cancelled,
        Code::Protocol,
    ];

    /// The code of a number from outside; unknown numbers (a newer peer's) are [`Code::Internal`].
    pub fn from_number(number: u32) -> Code {
        Code::ALL.into_iter().find(|code| *code as u32 == number).unwrap_or(Code::Internal)
    }
}

#[cfg(feature = "rpc")]
impl From<Code> for tonic::Code {
    fn from(code: Code) -> tonic::Code {
        match code {
            Code::Internal => tonic::Code::Internal,
            Code::BadInput => tonic::Code::InvalidArgument,
            Code::NotFound => tonic::Code::NotFound,
            Code::Conflict => tonic::Code::AlreadyExists,
            Code::Incapable => tonic::Code::FailedPrecondition,
            Code::Exhausted => tonic::Code::ResourceExhausted,
            Code::Unreachable => tonic::Code::Unavailable,
            Code::Denied => tonic::Code::PermissionDenied,
            Code::Corrupt => tonic::Code::DataLoss,
            Code::Cancelled => tonic::Code::Cancelled,
            Code::Protocol => tonic::Code::OutOfRange,
        }
    }
}

#[cfg(feature = "rpc")]
impl From<tonic::Code> for Code {
    fn from(code: tonic::Code) -> Code {
        Code::ALL.into_iter().find(|ours| tonic::Code::from(*ours) == code).unwrap_or(match code {
            tonic::Code::Unauthenticated => Code::Denied,
            tonic::Code::DeadlineExceeded => Code::Unreachable,
            _ => Code::Internal,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_for_ever() {
        let numbers: Vec<u32> = Code::ALL.iter().map(|code| *code as u32).collect();
        assert_eq!(numbers, (1..=11).collect::<Vec<u32>>());
        assert_eq!(Code::from_number(9), Code::Corrupt);
        assert_eq!(Code::from_number(4_000_000), Code::Internal);
    }
}

//! How `ctl` fails: what, where, why, and what to do, with an exit code that scripts can rely on.
//!
//! Exit codes are the numbers of [`Code`], for ever; 0 is success. Text is put together here, at the edge.

use proto::status::Code;
use proto::v1::OperationFailed;

use crate::failure::hint_of;

/// The table of exit codes, as `--help` and the README show it.
pub const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  internal error: a bug in Godwit
   2  bad input: wrong flag, name, size or file
   3  no such VM, host, checkpoint or operation
   4  conflict: the name is taken, or another operation holds the VM
   5  the host lacks what the guest needs; the message names it
   6  memory, disk, bucket or lanes are full
   7  a host, the controller or the bucket does not answer
   8  not allowed: certificate, role, ticket or generation
   9  bytes that do not match their hash, or do not decode
  10  cancelled by the operator
  11  the other side broke the protocol";

/// A failed command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind; also the exit code.
    pub code: Code,
    /// What, where and why.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// Where the guest is now.
    pub outcome: Option<String>,
}

impl Failure {
    /// A failure without advice yet.
    pub fn new(code: Code, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into(), hint: None, outcome: None }
    }

    /// Wrong flag, name, size or file.
    pub fn bad_input(message: impl Into<String>) -> Failure {
        Failure::new(Code::BadInput, message)
    }

    /// Adds what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }

    /// A file that cannot be read or written.
    pub fn file(what: &str, path: &std::path::Path, error: &std::io::Error) -> Failure {
        let code = match error.kind() {
            std::io::ErrorKind::StorageFull => Code::Exhausted,
            std::io::ErrorKind::PermissionDenied => Code::Denied,
            _ => Code::BadInput,
        };
        Failure::new(code, format!("cannot {what} {}: {error}", path.display()))
    }

    /// From the answer to one call; `doing` says which, for example "list the hosts".
    pub fn from_status(doing: &str, status: &tonic::Status) -> Failure {
        let code = Code::from(status.code());
        let message = match status.message() {
            "" => format!("cannot {doing}: {}", status.code().description()),
            text => format!("cannot {doing}: {text}"),
        };
        let failure = Failure::new(code, message);
        match hint_of(status).or_else(|| default_hint(code)) {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }

    /// From the last event of an operation.
    pub fn from_operation(failed: &OperationFailed) -> Failure {
        let code = Code::from_number(failed.code);
        let given = |text: &String| (!text.is_empty()).then(|| text.clone());
        Failure {
            code,
            message: failed.message.clone(),
            hint: given(&failed.hint).or_else(|| default_hint(code).map(str::to_owned)),
            outcome: given(&failed.outcome),
        }
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        self.code as u8
    }

    /// All of it, one fact a line, for stderr.
    pub fn lines(&self) -> String {
        let mut text = format!("error: {}", self.message);
        for (label, line) in [("now", &self.outcome), ("hint", &self.hint)] {
            if let Some(line) = line {
                text.push_str(&format!("\n{label:>5}: {line}"));
            }
        }
        text
    }
}

/// What helps most often.
fn default_hint(code: Code) -> Option<&'static str> {
    match code {
        Code::NotFound => Some("`ctl vm ls`, `ctl host ls` and `ctl checkpoint ls` show what there is"),
        Code::Conflict => Some("`ctl vm ls` shows which operation holds which VM"),
        Code::Unreachable => Some("`ctl host ls` shows who answers; the logs of the silent one say why it does not"),
        Code::Denied => Some("check which certificate the configuration names, and its role"),
        Code::Internal => Some("this is a bug: keep the logs of the controller and of the host"),
        Code::BadInput | Code::Incapable | Code::Exhausted | Code::Corrupt | Code::Cancelled | Code::Protocol => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_documented_under_its_number() {
        for code in Code::ALL {
            let number = format!("\n{:>4}  ", code as u32);
            assert!(EXIT_CODES.contains(&number), "{code:?} is missing in the table of exit codes");
            assert_eq!(u32::from(Failure::new(code, "").exit_code()), code as u32);
        }
        assert_eq!(EXIT_CODES.lines().count(), 2 + Code::ALL.len());
        let readme = include_str!("../../../README.md");
        for line in EXIT_CODES.lines().skip(1) {
            let (number, meaning) = line.trim().split_once("  ").unwrap();
            assert!(readme.contains(&format!("| {number} | {meaning} |")), "README.md lacks {line}");
        }
    }

    #[test]
    fn a_failed_operation_says_all_four() {
        let failed = OperationFailed {
            code: 5,
            message: "cannot migrate vm1 to hostB: it lacks CPUID 0000_0007.0 EBX[5] avx2".into(),
            hint: "ctl host compare hostA hostB".into(),
            outcome: "vm1 runs on hostA as before".into(),
        };
        let failure = Failure::from_operation(&failed);
        assert_eq!(failure.exit_code(), 5);
        let lines = failure.lines();
        for part in ["avx2", "ctl host compare", "runs on hostA"] {
            assert!(lines.contains(part), "{lines}");
        }
    }

    #[test]
    fn a_status_keeps_its_code() {
        let failure = Failure::from_status("show vm1", &tonic::Status::not_found("no VM is called vm1"));
        assert_eq!((failure.code, failure.message.as_str()), (Code::NotFound, "cannot show vm1: no VM is called vm1"));
        assert!(failure.hint.is_some());
        let refused = crate::failure::Failure::new(Code::Incapable, "hostB lacks avx2").hint("hostC would do");
        let failure = Failure::from_status("migrate vm1", &refused.into());
        assert_eq!(failure.hint.as_deref(), Some("hostC would do"));
    }
}

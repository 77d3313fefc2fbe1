//! What an answer of an S3 server, or the lack of one, means.
//!
//! Servers agree on codes less than on statuses, and proxies before them know neither: a code decides where it is known, else
//! words in it, else the status. Texts are made of code and message alone: the rest of an answer may repeat what was signed.

use std::error::Error;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use crate::bucket::BucketError;

/// Longest text of a server that is repeated, characters.
const TEXT_MAX: usize = 300;

/// A try that failed.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) kind: Kind,
    pub(super) text: String,
}

/// What it means.
#[derive(Debug)]
pub(super) enum Kind {
    /// No such object.
    Missing,
    /// No such bucket.
    NoBucket,
    /// No such multipart upload.
    NoUpload,
    /// Not with these credentials, or not with this clock.
    Denied,
    /// No room.
    Full,
    /// Later, please.
    Busy,
    /// No answer, or half of one: it may have been done or not.
    Unanswered,
    /// The server failed.
    Broken,
    /// Two at once; neither may have been done.
    Contended,
    /// What arrived is not what was sent.
    Damaged,
    /// A condition does not hold: there is such an object.
    Exists,
    /// The object ends before what was asked for.
    Range,
    /// The server does not know how.
    Unsupported,
    /// Anything else that will be the same next time.
    Other,
    /// Already in the words of the room.
    Known(Box<BucketError>),
}

impl Kind {
    /// Whether the next try may fare better.
    pub(super) fn passes(&self) -> bool {
        matches!(self, Kind::Busy | Kind::Unanswered | Kind::Broken | Kind::Contended | Kind::Damaged)
    }
}

impl Fault {
    pub(super) fn new(kind: Kind, text: impl Into<String>) -> Fault {
        Fault { kind, text: text.into() }
    }
}

impl From<BucketError> for Fault {
    fn from(error: BucketError) -> Fault {
        Fault { text: error.to_string(), kind: Kind::Known(Box::new(error)) }
    }
}

impl<E> From<SdkError<E, HttpResponse>> for Fault
where
    E: Error + ProvideErrorMetadata + Send + Sync + 'static,
{
    fn from(error: SdkError<E, HttpResponse>) -> Fault {
        let status = error.raw_response().map_or(0, |raw| raw.status().as_u16());
        match &error {
            SdkError::ServiceError(answer) => {
                let (code, message) = (answer.err().code().unwrap_or(""), answer.err().message().unwrap_or(""));
                let kind = judge(status, code, message);
                let mut text = said(status, code, message);
                if let (Kind::Other, 300..400, Some(raw)) = (&kind, status, error.raw_response())
                    && let Some(region) = raw.headers().get("x-amz-bucket-region")
                {
                    text.push_str(&format!("; the bucket is in region {region}"));
                }
                Fault { kind, text }
            }
            SdkError::ResponseError(_) => match judge(status, "", "") {
                // Half an answer, or one that is not S3's.
                Kind::Other => Fault::new(Kind::Broken, format!("an answer that cannot be read (status {status})")),
                kind => Fault::new(kind, said(status, "", "")),
            },
            SdkError::TimeoutError(_) => Fault::new(Kind::Unanswered, chain("no answer in time", &error)),
            SdkError::DispatchFailure(failure) if failure.is_user() => {
                Fault::new(Kind::Other, chain("it could not be sent", &error))
            }
            SdkError::DispatchFailure(_) => {
                let text = chain("no connection", &error);
                match text.contains("credential") {
                    true => Fault::new(Kind::Denied, text),
                    false => Fault::new(Kind::Unanswered, text),
                }
            }
            _ => Fault::new(Kind::Other, chain("it could not be asked", &error)),
        }
    }
}

fn judge(status: u16, code: &str, message: &str) -> Kind {
    match code {
        "NoSuchBucket" => Kind::NoBucket,
        "NoSuchKey" | "NotFound" => Kind::Missing,
        "NoSuchUpload" => Kind::NoUpload,
        "AccessDenied"
        | "InvalidAccessKeyId"
        | "SignatureDoesNotMatch"
        | "ExpiredToken"
        | "InvalidToken"
        | "TokenRefreshRequired"
        | "AccountProblem"
        | "AllAccessDisabled"
        | "RequestTimeTooSkewed"
        | "RequestExpired"
        | "InvalidSecurity"
        | "NotSignedUp" => Kind::Denied,
        "SlowDown"
        | "SlowDownRead"
        | "SlowDownWrite"
        | "Throttling"
        | "ThrottlingException"
        | "TooManyRequests"
        | "RequestLimitExceeded"
        | "BandwidthLimitExceeded"
        | "ServiceUnavailable"
        | "ServerBusy"
        | "Busy" => Kind::Busy,
        "RequestTimeout" => Kind::Unanswered,
        "PreconditionFailed" => Kind::Exists,
        "ConditionalRequestConflict" | "OperationAborted" => Kind::Contended,
        "InvalidRange" => Kind::Range,
        "BadDigest" | "IncompleteBody" | "XAmzContentSHA256Mismatch" => Kind::Damaged,
        "NotImplemented" => Kind::Unsupported,
        _ if status == 507 || full(code) || (status >= 500 && full(message)) => Kind::Full,
        _ => match status {
            404 => Kind::Missing,
            401 | 403 => Kind::Denied,
            408 => Kind::Unanswered,
            409 => Kind::Contended,
            412 => Kind::Exists,
            416 => Kind::Range,
            429 | 503 => Kind::Busy,
            501 => Kind::Unsupported,
            500.. => Kind::Broken,
            _ => Kind::Other,
        },
    }
}

/// How servers say that there is no room: `InsufficientStorage`, `QuotaExceeded`, `XMinioStorageFull`, "no writable volumes".
fn full(text: &str) -> bool {
    let text = text.to_ascii_lowercase().replace([' ', '-', '_'], "");
    [
        "quota",
        "storagefull",
        "diskfull",
        "insufficientstorage",
        "insufficientcapacity",
        "nospace",
        "writablevolume",
        "nofreevolume",
    ]
    .iter()
    .any(|word| text.contains(word))
}

fn said(status: u16, code: &str, message: &str) -> String {
    let words = [code, message].into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(": ");
    let words: String = words.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect();
    if words.is_empty() { format!("status {status}") } else { format!("status {status}, {words}") }
}

/// An error with what is behind it; each word once.
pub(super) fn chain(what: &str, error: &(dyn Error + 'static)) -> String {
    let mut text = what.to_owned();
    let mut next = error.source();
    while let Some(error) = next {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.extend(words.chars().filter(|c| !c.is_control()).take(TEXT_MAX));
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_many_servers_are_understood() {
        for (status, code, message, word) in [
            (404, "NoSuchBucket", "", "NoBucket"),
            (404, "", "", "Missing"),
            (403, "", "", "Denied"),
            (403, "RequestTimeTooSkewed", "", "Denied"),
            (503, "SlowDown", "", "Busy"),
            (429, "", "", "Busy"),
            (500, "InternalError", "We encountered an internal error", "Broken"),
            (500, "InternalError", "No writable volumes", "Full"),
            (507, "XMinioStorageFull", "", "Full"),
            (400, "XMinioAdminBucketQuotaExceeded", "", "Full"),
            (507, "", "", "Full"),
            (412, "PreconditionFailed", "", "Exists"),
            (409, "ConditionalRequestConflict", "", "Contended"),
            (400, "BadDigest", "", "Damaged"),
            (416, "InvalidRange", "", "Range"),
            (501, "NotImplemented", "", "Unsupported"),
            (400, "InvalidArgument", "your quota is fine", "Other"),
            (301, "PermanentRedirect", "", "Other"),
        ] {
            assert_eq!(format!("{:?}", judge(status, code, message)), word, "{status} {code}");
        }
    }

    #[test]
    fn what_a_server_says_is_cut_and_stays_on_its_line() {
        let text = said(500, "Bad", &"x\n\x1b".repeat(1_000));
        assert!(text.len() < 400 && !text.contains(['\n', '\x1b']), "{text:?}");
    }
}

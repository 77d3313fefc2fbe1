//! How a bucket is named: by a URL alone, or by a table of the controller's settings.
//!
//! ```text
//!   file:DIR
//!   s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&path_style=BOOL&credentials=FILE&profile=NAME&ca=FILE&
//!                         if_none_match=BOOL&timeout_ms=N&attempts=N]
//! ```
//! ```toml
//! bucket = "s3://backups/godwit?endpoint=https://s3.example:9000"     # or, the same:
//!
//! [bucket]
//! url         = "s3://backups/godwit"
//! endpoint    = "https://s3.example:9000"       # left out: Amazon's
//! region      = "us-east-1"                     # left out: AWS_REGION, the profile, us-east-1
//! path_style  = true                            # left out: true where an endpoint is named
//! credentials = "/etc/godwit/bucket.credentials" # INI of the AWS tools; left out: the chain of the SDK
//! profile     = "default"                       # which section
//! ca          = "/etc/godwit/s3-ca.pem"         # who signed the endpoint's certificate, besides the system's list
//! if_none_match = true                          # may writes that must not replace anything rely on the server's own
//!                                               # `If-None-Match: *`? left out: found out by trying
//! timeout_ms  = 15000                           # for one try, and 2 s more for each MiB
//! attempts    = 8                               # tries, with pauses that grow from 0.1 s to 5 s
//! ```
//! A URL is printed, logged and kept; so it cannot hold a secret, and one that tries is refused without being repeated.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;

use super::BucketError;

const TIMEOUT_MS_DEFAULT: u64 = 15_000;
const TIMEOUT_MS_MIN: u64 = 100;
const ATTEMPTS_DEFAULT: u32 = 8;
const ATTEMPTS_MAX: u32 = 100;

/// A bucket as an operator names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BucketSettings {
    /// `file:DIR` or `s3://...`.
    pub url: String,
    more: Table,
}

/// What may be said beside the URL, or inside of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(default)]
    url: String,
    endpoint: Option<String>,
    region: Option<String>,
    path_style: Option<bool>,
    credentials: Option<PathBuf>,
    profile: Option<String>,
    ca: Option<PathBuf>,
    if_none_match: Option<bool>,
    timeout_ms: Option<u64>,
    attempts: Option<u32>,
}

/// Where a bucket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Location {
    /// A directory.
    File(PathBuf),
    /// A server that speaks S3.
    S3(S3Location),
}

/// Where a bucket of an S3 server is, and how it is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct S3Location {
    pub(super) bucket: String,
    /// Empty, or ends in `/`.
    pub(super) prefix: String,
    pub(super) endpoint: Option<String>,
    pub(super) region: Option<String>,
    pub(super) path_style: Option<bool>,
    pub(super) credentials: Option<PathBuf>,
    pub(super) profile: Option<String>,
    pub(super) ca: Option<PathBuf>,
    /// Whether the server is known to honour (or not to honour) conditions on writes.
    pub(super) if_none_match: Option<bool>,
    /// For one try of a small request.
    pub(super) timeout: Duration,
    pub(super) attempts: u32,
}

impl fmt::Display for S3Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.prefix.trim_end_matches('/'))?;
        self.endpoint.as_ref().map_or(Ok(()), |endpoint| write!(f, " at {endpoint}"))
    }
}

impl From<&str> for BucketSettings {
    fn from(url: &str) -> BucketSettings {
        BucketSettings { url: url.into(), more: Table::default() }
    }
}

impl From<String> for BucketSettings {
    fn from(url: String) -> BucketSettings {
        BucketSettings::from(url.as_str())
    }
}

/// A text or a table. By hand, because what is wrong in a table would be hidden by trying one after the other.
impl<'de> Deserialize<'de> for BucketSettings {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<BucketSettings, D::Error> {
        struct Either;
        impl<'de> serde::de::Visitor<'de> for Either {
            type Value = BucketSettings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a bucket's URL, or a table with `url`")
            }

            fn visit_str<E: serde::de::Error>(self, url: &str) -> Result<BucketSettings, E> {
                Ok(url.into())
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<BucketSettings, A::Error> {
                let mut more = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(BucketSettings { url: std::mem::take(&mut more.url), more })
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl BucketSettings {
    /// The same with relative paths taken as relative to a folder.
    pub fn within(mut self, folder: &Path) -> BucketSettings {
        for file in [&mut self.more.credentials, &mut self.more.ca].into_iter().flatten() {
            *file = folder.join(&*file);
        }
        self
    }

    /// Says what is wrong with it, without looking for the bucket.
    ///
    /// # Errors
    /// [`BucketError::Url`].
    pub fn check(&self) -> Result<(), BucketError> {
        self.location().map(drop)
    }

    pub(super) fn location(&self) -> Result<Location, BucketError> {
        if let Some(path) = self.url.strip_prefix("file:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() {
                return Err(wrong("file: names no directory"));
            }
            if self.more != Table::default() {
                return Err(wrong("a file: bucket has no settings besides its URL"));
            }
            return Ok(Location::File(path.into()));
        }
        let Some(rest) = self.url.strip_prefix("s3://") else {
            return Err(wrong("file:DIR or s3://BUCKET/PREFIX is expected"));
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        if path.contains('@') || path.contains('#') {
            return Err(wrong("a bucket's URL cannot hold credentials; they come from a file or the environment"));
        }
        let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
        let prefix = prefix.trim_matches('/');
        check_bucket(bucket)?;
        if !prefix.is_empty() {
            super::check_key(prefix).map_err(|_| wrong(format!("{prefix:?} cannot be a prefix of keys")))?;
        }
        let mut more = self.more.clone();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            more.set(name, decode(value).ok_or_else(|| wrong(format!("{name} in the URL is not well encoded")))?)?;
        }
        more.settle(bucket, prefix).map(Location::S3)
    }
}

impl Table {
    fn set(&mut self, name: &str, value: String) -> Result<(), BucketError> {
        let number = |value: &str| value.parse::<u64>().map_err(|_| wrong(format!("{name} must be a number")));
        let truth = |value: &str| value.parse().map_err(|_| wrong(format!("{name} must be true or false")));
        let before = match name {
            "endpoint" => self.endpoint.replace(value).is_some(),
            "region" => self.region.replace(value).is_some(),
            "credentials" | "ca" if !value.starts_with('/') => {
                return Err(wrong(format!("{name} in a URL must be an absolute path")));
            }
            "credentials" => self.credentials.replace(value.into()).is_some(),
            "profile" => self.profile.replace(value).is_some(),
            "ca" => self.ca.replace(value.into()).is_some(),
            "timeout_ms" => self.timeout_ms.replace(number(&value)?).is_some(),
            "attempts" => {
                let tries = u32::try_from(number(&value)?).map_err(|_| wrong("attempts is too large"))?;
                self.attempts.replace(tries).is_some()
            }
            "path_style" => self.path_style.replace(truth(&value)?).is_some(),
            "if_none_match" => self.if_none_match.replace(truth(&value)?).is_some(),
            // What it was set to is not repeated: it may be a key.
            _ => {
                return Err(wrong(format!(
                    "{name:?} is no setting of a bucket; endpoint, region, path_style, credentials, profile, ca, \
                     if_none_match, timeout_ms and attempts are"
                )));
            }
        };
        if before { Err(wrong(format!("{name} is set twice"))) } else { Ok(()) }
    }

    fn settle(self, bucket: &str, prefix: &str) -> Result<S3Location, BucketError> {
        let endpoint = self.endpoint.map(|endpoint| check_endpoint(&endpoint)).transpose()?;
        let timeout_ms = self.timeout_ms.unwrap_or(TIMEOUT_MS_DEFAULT);
        let attempts = self.attempts.unwrap_or(ATTEMPTS_DEFAULT);
        if timeout_ms < TIMEOUT_MS_MIN || !(1..=ATTEMPTS_MAX).contains(&attempts) {
            return Err(wrong(format!(
                "timeout_ms must be {TIMEOUT_MS_MIN} or more, and attempts between 1 and {ATTEMPTS_MAX}"
            )));
        }
        Ok(S3Location {
            bucket: bucket.into(),
            prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
            path_style: self.path_style.or(endpoint.is_some().then_some(true)),
            endpoint,
            region: self.region,
            credentials: self.credentials,
            profile: self.profile,
            ca: self.ca,
            if_none_match: self.if_none_match,
            timeout: Duration::from_millis(timeout_ms),
            attempts,
        })
    }
}

fn wrong(why: impl Into<String>) -> BucketError {
    BucketError::Url(why.into())
}

/// Names of buckets as S3 has them; older ones may have capitals and underscores.
fn check_bucket(bucket: &str) -> Result<(), BucketError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if (3..=255).contains(&bucket.len()) && bucket.chars().all(plain) {
        Ok(())
    } else {
        Err(wrong(format!("{bucket:?} cannot be the name of a bucket")))
    }
}

fn check_endpoint(endpoint: &str) -> Result<String, BucketError> {
    let host = ["http://", "https://"].iter().find_map(|scheme| endpoint.strip_prefix(scheme));
    match host {
        Some(host) if host.contains('@') => {
            Err(wrong("an endpoint cannot hold credentials; they come from a file or the environment"))
        }
        Some(host) if !host.is_empty() && !host.contains(['?', '#', ' ']) => Ok(endpoint.trim_end_matches('/').into()),
        _ => Err(wrong(format!("{endpoint:?} is no endpoint; http://HOST:PORT or https://HOST:PORT is expected"))),
    }
}

/// Percent-encoding undone.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?].map(|digit| char::from(digit).to_digit(16));
                u8::try_from(digits[0]? << 4 | digits[1]?).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s3(url: &str) -> S3Location {
        match BucketSettings::from(url).location() {
            Ok(Location::S3(location)) => location,
            other => panic!("{url}: {other:?}"),
        }
    }

    #[test]
    fn a_url_alone_says_everything() {
        let at = s3(
            "s3://backups/a/b/?endpoint=http://127.0.0.1:8333/&region=eu-west-1&credentials=%2fetc%2fkeys&attempts=3",
        );
        assert_eq!((at.bucket.as_str(), at.prefix.as_str(), at.attempts), ("backups", "a/b/", 3));
        assert_eq!(at.endpoint.as_deref(), Some("http://127.0.0.1:8333"));
        assert_eq!((at.region.as_deref(), at.path_style), (Some("eu-west-1"), Some(true)));
        assert_eq!(at.credentials.as_deref(), Some(Path::new("/etc/keys")));
        assert_eq!(at.to_string(), "s3://backups/a/b at http://127.0.0.1:8333");
        let plain = s3("s3://backups");
        assert_eq!((plain.prefix.as_str(), plain.path_style, plain.endpoint), ("", None, None));
        assert!(
            matches!(BucketSettings::from("file:///b").location(), Ok(Location::File(dir)) if dir == Path::new("/b"))
        );
    }

    #[test]
    fn a_table_says_the_same_and_what_is_said_twice_is_refused() {
        #[derive(Deserialize)]
        struct Whole {
            bucket: BucketSettings,
        }
        let read = |text: &str| toml::from_str::<Whole>(text).map(|whole| whole.bucket);
        let table =
            read("[bucket]\nurl = \"s3://backups/x\"\nendpoint = \"http://h:1\"\ncredentials = \"keys\"").unwrap();
        let Ok(Location::S3(at)) = table.within(Path::new("/etc")).location() else { panic!("not s3") };
        assert_eq!(at.credentials.as_deref(), Some(Path::new("/etc/keys")));
        let plain = read("bucket = \"s3://backups/x?endpoint=http://h:1&credentials=/etc/keys\"").unwrap();
        assert_eq!(plain.location().unwrap(), Location::S3(at));
        let twice = read("[bucket]\nurl = \"s3://backups/x?region=a\"\nregion = \"b\"").unwrap();
        assert_eq!(twice.check().unwrap_err().to_string(), "no bucket: region is set twice");
        assert!(read("[bucket]\nurl = \"s3://b\"\nregoin = \"b\"").unwrap_err().to_string().contains("regoin"));
    }

    #[test]
    fn other_urls_are_refused_and_no_secret_is_repeated() {
        for url in [
            "",
            "file:",
            "/plain/path",
            "http://host/bucket",
            "s3://",
            "s3://ab",
            "s3://bucket/a/../b",
            "s3://bucket?endpoint=ftp://x",
            "s3://bucket?endpoint=http://",
            "s3://bucket?attempts=0",
            "s3://bucket?path_style=maybe",
            "s3://bucket?region=%zz",
            "s3://bucket?credentials=keys",
        ] {
            assert!(matches!(BucketSettings::from(url).check(), Err(BucketError::Url(_))), "{url:?}");
        }
        for url in [
            "s3://AKIA:hunter2@bucket",
            "s3://bucket?secret_access_key=hunter2",
            "s3://bucket?endpoint=http://u:hunter2@host",
        ] {
            let said = BucketSettings::from(url).check().unwrap_err().to_string();
            assert!(!said.contains("hunter2"), "{said}");
        }
    }
}

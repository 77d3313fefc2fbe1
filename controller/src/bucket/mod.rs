//! The bucket: where checkpoints lie. Whole objects under keys, written once, seen complete or not at all.
//!
//! Keys: `vms/<vm id>/g<generation, 8 digits>/packs/<pack id>`, `.../owner` beside `packs`, `vms/<vm id>/key`,
//! `vms/<vm id>/checkpoints/<checkpoint id>.manifest`, and `vms/<vm id>/journal/<recording>/<first sequence, 16 hex digits>`
//! with `.index` beside some. A checkpoint that has no manifest does not exist. Two kinds of bucket: a directory ([`file`]) and an S3 server ([`s3`]); how one is
//! named is in [`settings`]. This room does not know what the objects mean and checks no hash of theirs; who reads does.

pub(crate) mod file;
pub(crate) mod room;
mod s3;
pub mod settings;
mod uncached;

use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::ids::{CheckpointId, Generation, PackId, RecordingId};
use proto::status::Code;

use self::file::FileBucket;
use self::s3::S3Bucket;
use self::settings::{BucketSettings, Location};
use crate::failure::Failure;
use crate::metrics as names;

/// Longest key.
const KEY_MAX: usize = 512;
/// Largest object that is read, bytes: what is larger is none of ours.
const OBJECT_BYTES_MAX: u64 = 1 << 30;

/// Why an object could not be written, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    /// Not a bucket that this release knows.
    #[error("no bucket: {0}")]
    Url(String),
    /// A key that could lead out of the bucket.
    #[error("{0:?} is no key")]
    Key(String),
    /// No such object.
    #[error("the bucket has no {0}")]
    Missing(String),
    /// No room is left.
    #[error("the bucket {bucket} is full: {key} of {bytes} bytes could not be written: {why}")]
    Full {
        /// Which bucket.
        bucket: String,
        /// What was to be written.
        key: String,
        /// How much.
        bytes: usize,
        /// What the system or the server says.
        why: String,
    },
    /// The bucket itself is not there: not mounted, or removed.
    #[error("the bucket {bucket} is not there: {source}")]
    Gone {
        /// Which bucket.
        bucket: String,
        /// The system's word.
        source: std::io::Error,
    },
    /// An object that is shorter than what was asked of it.
    #[error("{key} has {found} bytes where {expected} are expected")]
    Short {
        /// The object.
        key: String,
        /// What there is.
        found: u64,
        /// What was asked for.
        expected: u64,
    },
    /// An object that nobody of ours has written.
    #[error("{key} has {bytes} bytes; none of ours is as large")]
    Large {
        /// The object.
        key: String,
        /// What there is.
        bytes: u64,
    },
    /// The disk failed, or does not allow it.
    #[error("the bucket {bucket} cannot be used, {key}: {source}")]
    Io {
        /// Which bucket.
        bucket: String,
        /// The object.
        key: String,
        /// Why.
        source: std::io::Error,
    },
    /// There are no credentials.
    #[error("no credentials for {bucket}: {why}")]
    Credentials {
        /// Where.
        bucket: String,
        /// What was tried.
        why: String,
    },
    /// The server does not allow it.
    #[error("{bucket}: {verb} is denied: {why}")]
    Denied {
        /// Where.
        bucket: String,
        /// What was asked.
        verb: String,
        /// What the server says, and with which credentials it was asked.
        why: String,
    },
    /// The server has no such bucket.
    #[error("there is no bucket {bucket}")]
    NoBucket {
        /// Where.
        bucket: String,
    },
    /// The server is too busy, or does not answer.
    #[error("{bucket}: {verb}: {why} (given up after {tries} tries)")]
    Unreachable {
        /// Where.
        bucket: String,
        /// What was asked.
        verb: String,
        /// What the last try met.
        why: String,
        /// How often.
        tries: u32,
    },
    /// The server fails.
    #[error("{bucket}: {verb}: the server fails: {why} (given up after {tries} tries)")]
    Broken {
        /// Where.
        bucket: String,
        /// What was asked.
        verb: String,
        /// What the last try met.
        why: String,
        /// How often.
        tries: u32,
    },
    /// The server fails at every write, and answers reads.
    #[error("{bucket}: {verb}: the server answers, but fails to write: {why} (given up after {tries} tries)")]
    Unwritable {
        /// Where.
        bucket: String,
        /// What was asked.
        verb: String,
        /// What the last try met.
        why: String,
        /// How often.
        tries: u32,
    },
    /// What the server has is not what was sent.
    #[error("{bucket}: {verb}: {why}")]
    Mismatch {
        /// Where.
        bucket: String,
        /// What was asked.
        verb: String,
        /// What differs.
        why: String,
    },
    /// The server refuses in a way that trying again does not help.
    #[error("{bucket}: {verb}: {why}")]
    Refused {
        /// Where.
        bucket: String,
        /// What was asked.
        verb: String,
        /// What the server says.
        why: String,
    },
}

impl From<BucketError> for Failure {
    fn from(error: BucketError) -> Failure {
        let (code, hint) = match &error {
            BucketError::Url(_) => {
                (Code::BadInput, "such as file:/srv/bucket or s3://bucket/prefix?endpoint=http://host:port")
            }
            BucketError::Key(_) => (Code::Internal, ""),
            BucketError::Missing(_) => (Code::NotFound, ""),
            BucketError::Full { .. } => {
                (Code::Exhausted, "remove checkpoints (`ctl checkpoint rm`) or enlarge the bucket")
            }
            BucketError::Short { .. } | BucketError::Large { .. } => {
                (Code::Corrupt, "`ctl checkpoint verify --all` shows what else is damaged")
            }
            BucketError::Gone { .. } => {
                (Code::Unreachable, "mount or make it again; checkpoints that it held are not lost yet")
            }
            BucketError::Io { .. } => {
                (Code::Unreachable, "check the disk that holds the bucket, and that the controller may write there")
            }
            BucketError::Credentials { .. } => (
                Code::Denied,
                "give the controller AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a file: credentials=FILE",
            ),
            BucketError::Denied { .. } => {
                (Code::Denied, "check the keys, the clock, and that they may list, read, write and delete there")
            }
            BucketError::NoBucket { .. } => (Code::NotFound, "make it, or check its name, endpoint and region"),
            BucketError::Unreachable { .. } => {
                (Code::Unreachable, "check the endpoint, and that the server runs and has peace")
            }
            BucketError::Broken { .. } => (Code::Unreachable, "the server's own log says why"),
            BucketError::Unwritable { .. } => (
                Code::Exhausted,
                "most often its disk is full: the server's own log says; `ctl checkpoint rm` makes room",
            ),
            BucketError::Mismatch { .. } => (Code::Corrupt, "something between here and the server changes bytes"),
            BucketError::Refused { .. } => (Code::Protocol, "check the endpoint, the region and path_style"),
        };
        Failure::new(code, error.to_string()).hint(hint)
    }
}

/// An object as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its key.
    pub key: String,
    /// Its length.
    pub bytes: u64,
    /// When it was written by the clock of who keeps the bucket, ms since 1970.
    pub modified_unix_ms: u64,
}

/// What came of [`Bucket::put_new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutNew {
    /// It was not there, and now it is, as given.
    Created,
    /// It was there, and is as it was.
    Exists,
}

/// A bucket; clones are the same.
#[derive(Clone, Debug)]
pub enum Bucket {
    /// A directory.
    File(FileBucket),
    /// A bucket of an S3 server.
    S3(S3Bucket),
}

impl Bucket {
    /// Opens what a URL names. A directory is made if it is not there and the bucket is `fresh`: no checkpoint is expected in
    /// it. An S3 server is not asked yet: see [`Bucket::check`].
    ///
    /// # Errors
    /// [`BucketError::Url`], [`BucketError::Io`].
    pub fn open(url: &str, fresh: bool) -> Result<Bucket, BucketError> {
        Bucket::with(&url.into(), fresh)
    }

    /// The same from settings.
    ///
    /// # Errors
    /// [`BucketError::Url`], [`BucketError::Io`].
    pub fn with(settings: &BucketSettings, fresh: bool) -> Result<Bucket, BucketError> {
        match settings.location()? {
            Location::File(path) => FileBucket::open(&path, fresh).map(Bucket::File),
            Location::S3(location) => Ok(Bucket::S3(S3Bucket::new(location))),
        }
    }

    /// Tries what will be needed: that the bucket is there, and can be listed, written, read and removed from; finds out how
    /// [`Bucket::put_new`] is to be done; removes what uploads of a dead controller left.
    ///
    /// # Errors
    /// Any [`BucketError`].
    pub async fn check(&self) -> Result<(), BucketError> {
        match self {
            Bucket::File(_) => Ok(()),
            Bucket::S3(s3) => Box::pin(s3.check()).await,
        }
    }

    /// Writes an object: when this returns it is there for good, and it was never there in part.
    ///
    /// # Errors
    /// Any [`BucketError`].
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), BucketError> {
        check_key(key)?;
        let length = bytes.len() as u64;
        self.measured("put", async {
            match self {
                Bucket::File(file) => file.blocking(key, move |file, key| file.put(key, &bytes)).await,
                Bucket::S3(s3) => Box::pin(s3.put(key, bytes)).await,
            }
        })
        .await?;
        metrics::counter!(names::BUCKET_BYTES, "direction" => "written").increment(length);
        Ok(())
    }

    /// Writes an object if there is none under the key. Of any number of writers, wherever they are, at most one is told
    /// [`PutNew::Created`]. An error leaves open whether the object was written; whoever needs to know reads it back.
    ///
    /// # Errors
    /// Any [`BucketError`].
    pub async fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutNew, BucketError> {
        check_key(key)?;
        self.measured("put_new", async {
            match self {
                Bucket::File(file) => file.blocking(key, move |file, key| file.put_new(key, &bytes)).await,
                Bucket::S3(s3) => Box::pin(s3.put_new(key, bytes)).await,
            }
        })
        .await
    }

    /// Reads an object.
    ///
    /// # Errors
    /// [`BucketError::Missing`]; any other.
    pub async fn get(&self, key: &str) -> Result<Bytes, BucketError> {
        check_key(key)?;
        let read = self.measured("get", async {
            match self {
                Bucket::File(file) => file.blocking(key, FileBucket::get).await,
                Bucket::S3(s3) => Box::pin(s3.get(key, None)).await,
            }
        });
        Ok(count_read(read.await?))
    }

    /// Reads exactly this part of an object.
    ///
    /// # Errors
    /// [`BucketError::Missing`], [`BucketError::Short`]; any other.
    pub async fn get_range(&self, key: &str, offset: u64, bytes: usize) -> Result<Bytes, BucketError> {
        check_key(key)?;
        let read = self.measured("get_range", async {
            match self {
                Bucket::File(file) => file.blocking(key, move |file, key| file.get_range(key, offset, bytes)).await,
                Bucket::S3(s3) => Box::pin(s3.get(key, Some((offset, bytes)))).await,
            }
        });
        Ok(count_read(read.await?))
    }

    /// Keys below a prefix that is empty or ends in `/`, sorted.
    ///
    /// # Errors
    /// Any [`BucketError`].
    pub async fn list(&self, prefix: &str) -> Result<Vec<String>, BucketError> {
        Ok(self.list_objects(prefix).await?.into_iter().map(|object| object.key).collect())
    }

    /// Objects below a prefix that is empty or ends in `/`, sorted by key.
    ///
    /// # Errors
    /// Any [`BucketError`].
    pub async fn list_objects(&self, prefix: &str) -> Result<Vec<Object>, BucketError> {
        let folder = check_prefix(prefix)?;
        self.measured("list", async {
            match self {
                Bucket::File(file) => file.blocking(folder, FileBucket::list_objects).await,
                Bucket::S3(s3) => Box::pin(s3.list_objects(prefix)).await,
            }
        })
        .await
    }

    /// First parts of the keys below a prefix that is empty or ends in `/`, up to their next `/`, without the prefix and
    /// without that `/`, sorted: of `vms/`, the ids of all VMs that have objects. Objects right below the prefix are left out. Some
    /// servers go on naming one whose last object was removed.
    ///
    /// # Errors
    /// Any [`BucketError`].
    pub async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>, BucketError> {
        let folder = check_prefix(prefix)?;
        self.measured("list_dirs", async {
            match self {
                Bucket::File(file) => file.blocking(folder, FileBucket::list_dirs).await,
                Bucket::S3(s3) => Box::pin(s3.list_dirs(prefix)).await,
            }
        })
        .await
    }

    /// Removes an object. One that is not there is removed already.
    ///
    /// # Errors
    /// Any [`BucketError`].
    pub async fn delete(&self, key: &str) -> Result<(), BucketError> {
        check_key(key)?;
        self.measured("delete", async {
            match self {
                Bucket::File(file) => file.blocking(key, FileBucket::delete).await,
                Bucket::S3(s3) => Box::pin(s3.delete(key)).await,
            }
        })
        .await
    }

    async fn measured<T>(
        &self,
        verb: &'static str,
        work: impl Future<Output = Result<T, BucketError>>,
    ) -> Result<T, BucketError> {
        let start = Instant::now();
        let done = work.await;
        let outcome = done.as_ref().map_or_else(BucketError::word, |_| "ok");
        metrics::counter!(names::BUCKET_REQUESTS, "verb" => verb, "outcome" => outcome).increment(1);
        metrics::histogram!(names::BUCKET_SECONDS, "verb" => verb).record(start.elapsed());
        if let Some(kind) = done.as_ref().err().and_then(BucketError::failure) {
            metrics::counter!(names::BUCKET_FAILURES, "kind" => kind).increment(1);
        }
        done
    }
}

fn count_read(bytes: Bytes) -> Bytes {
    metrics::counter!(names::BUCKET_BYTES, "direction" => "read").increment(bytes.len() as u64);
    bytes
}

impl BucketError {
    /// One word, for metrics.
    fn word(&self) -> &'static str {
        match self {
            BucketError::Url(_) | BucketError::Key(_) => "refused",
            BucketError::Missing(_) => "missing",
            BucketError::Full { .. } => "full",
            BucketError::Short { .. } | BucketError::Large { .. } | BucketError::Mismatch { .. } => "damaged",
            BucketError::Gone { .. } | BucketError::NoBucket { .. } => "gone",
            BucketError::Io { .. } => "failed",
            BucketError::Credentials { .. } | BucketError::Denied { .. } => "denied",
            BucketError::Unreachable { .. } | BucketError::Broken { .. } => "unreachable",
            BucketError::Unwritable { .. } => "full",
            BucketError::Refused { .. } => "refused",
        }
    }
}

impl BucketError {
    /// Which kind of failure of the bucket as a whole it is, if it is one.
    fn failure(&self) -> Option<&'static str> {
        match self.word() {
            "full" => Some("full"),
            "gone" => Some("gone"),
            "denied" => Some("denied"),
            "failed" | "unreachable" => Some("io"),
            _ => None,
        }
    }
}

fn check_key(key: &str) -> Result<(), BucketError> {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    if key.len() <= KEY_MAX && key.split('/').all(plain) { Ok(()) } else { Err(BucketError::Key(key.into())) }
}

/// Where all VMs lie.
pub const VMS: &str = "vms/";

/// The prefix without its last `/`.
fn check_prefix(prefix: &str) -> Result<&str, BucketError> {
    if prefix.is_empty() {
        return Ok(prefix);
    }
    let folder = prefix.strip_suffix('/').ok_or_else(|| BucketError::Key(prefix.into()))?;
    check_key(folder).map(|()| folder)
}

/// A pause before the next try: doubled each time from a tenth of a second up to 5 s, of which up to a half is left to chance, so
/// that those who failed together do not come back together.
fn pause(tries: u32) -> Duration {
    let whole_ms = (100u64 << tries.saturating_sub(1).min(10)).min(5_000);
    let chance = u64::from(u16::from_le_bytes(crate::entropy::bytes::<2>()));
    Duration::from_millis(whole_ms - whole_ms / 2 * chance / u64::from(u16::MAX))
}

/// Where all of a VM lies; ends in `/`.
pub fn vm_prefix(vm_id: &str) -> String {
    format!("vms/{vm_id}/")
}

/// Where the packs of one generation of a VM lie; ends in `/`.
pub fn packs_prefix(vm_id: &str, generation: Generation) -> String {
    format!("vms/{vm_id}/g{:08}/packs/", generation.0)
}

/// Where a pack lies.
pub fn pack_key(vm_id: &str, generation: Generation, pack: PackId) -> String {
    format!("{}{pack}", packs_prefix(vm_id, generation))
}

/// Where it is said whose a generation of a VM is.
pub fn owner_key(vm_id: &str, generation: Generation) -> String {
    format!("vms/{vm_id}/g{:08}/owner", generation.0)
}

/// The generation that a folder of a VM is of.
pub fn generation_folder(name: &str) -> Option<Generation> {
    name.strip_prefix('g')?.parse().ok().map(Generation)
}

/// The generation in the key of a pack.
pub fn generation_of(key: &str) -> Option<Generation> {
    let (before, _) = key.split_once("/packs/")?;
    generation_folder(before.rsplit('/').next()?)
}

/// Where a manifest lies.
pub fn manifest_key(vm_id: &str, checkpoint: CheckpointId) -> String {
    format!("{}{checkpoint}.manifest", checkpoints_prefix(vm_id))
}

/// The checkpoint, in hex, whose manifest has this key.
pub fn checkpoint_of(key: &str) -> Option<&str> {
    let (_, name) = key.split_once("/checkpoints/")?;
    name.strip_suffix(".manifest")
}

/// Where the manifests of a VM lie; ends in `/`.
pub fn checkpoints_prefix(vm_id: &str) -> String {
    format!("vms/{vm_id}/checkpoints/")
}

/// Where all recordings of a VM lie; ends in `/`.
pub fn journals_prefix(vm_id: &str) -> String {
    format!("vms/{vm_id}/journal/")
}

/// Where a recording of a VM lies; ends in `/`.
pub fn journal_prefix(vm_id: &str, recording: RecordingId) -> String {
    format!("{}{recording}/", journals_prefix(vm_id))
}

/// Where blocks of a recording lie, from this sequence on.
pub fn journal_key(vm_id: &str, recording: RecordingId, first_sequence: u64) -> String {
    format!("{}{first_sequence:016x}", journal_prefix(vm_id, recording))
}

/// Where it is said what the segment is that begins there.
pub fn segment_key(vm_id: &str, recording: RecordingId, first_sequence: u64) -> String {
    format!("{}.index", journal_key(vm_id, recording, first_sequence))
}

/// What an object of a recording is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JournalObject {
    /// Blocks, from this sequence on.
    Blocks(u64),
    /// What the segment is that begins with this sequence.
    Index(u64),
}

/// What lies under a key below [`journal_prefix`]; `None` if it is nothing of ours.
pub fn journal_object(key: &str) -> Option<JournalObject> {
    let name = key.rsplit('/').next()?;
    let (digits, index) = name.strip_suffix(".index").map_or((name, false), |digits| (digits, true));
    let plain = digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let sequence = plain.then(|| u64::from_str_radix(digits, 16).ok()).flatten()?;
    Some(if index { JournalObject::Index(sequence) } else { JournalObject::Blocks(sequence) })
}

/// Where the wrapped data key of a VM lies.
pub fn key_object(vm_id: &str) -> String {
    format!("vms/{vm_id}/key")
}

/// Where it is kept which pages guests of a VM touch first.
pub fn working_set_key(vm_id: &str) -> String {
    format!("vms/{vm_id}/working-set")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_manifests_are_checkpoints() {
        let key = manifest_key("00", CheckpointId([0x11; 8]));
        assert_eq!(checkpoint_of(&key), Some("1111111111111111"));
        assert_eq!(checkpoint_of("vms/00/g00000001/packs/0011"), None);
    }

    #[test]
    fn objects_of_a_recording_are_known_by_their_names() {
        let recording = RecordingId([0xab; 16]);
        let (blocks, index) = (journal_key("00", recording, 0x1f), segment_key("00", recording, 0x1f));
        assert_eq!(blocks, format!("vms/00/journal/{}/000000000000001f", "ab".repeat(16)));
        assert_eq!(journal_object(&blocks), Some(JournalObject::Blocks(0x1f)));
        assert_eq!(journal_object(&index), Some(JournalObject::Index(0x1f)));
        for other in ["vms/00/journal/x/1f", "a/000000000000001F", "a/+00000000000001f", "a/000000000000001f.new"] {
            assert_eq!(journal_object(other), None, "{other}");
        }
        // They are neither packs nor manifests nor generations.
        assert_eq!((checkpoint_of(&blocks), generation_of(&blocks), generation_folder("journal")), (None, None, None));
    }

    #[test]
    fn keys_cannot_lead_out_of_the_bucket() {
        for key in ["", "/", "a//b", "../x", "a/../b", "a/.tmp", "a b", "a\0b", &"k".repeat(600)] {
            assert!(matches!(check_key(key), Err(BucketError::Key(_))), "{key:?}");
        }
        check_key(&pack_key("00ff", Generation(3), PackId([7; 32]))).unwrap();
        assert!(matches!((check_prefix("a/b/"), check_prefix(""), check_prefix("a")), (Ok("a/b"), Ok(""), Err(_))));
    }

    #[test]
    fn pauses_grow_and_end() {
        for (tries, (least, most)) in
            [(1, (50, 100)), (2, (100, 200)), (6, (1_600, 3_200)), (7, (2_500, 5_000)), (90, (2_500, 5_000))]
        {
            let pause = pause(tries).as_millis();
            assert!((least..=most).contains(&pause), "{tries}: {pause}");
        }
    }
}

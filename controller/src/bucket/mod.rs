//! The bucket: where checkpoints lie. Whole objects under keys, written once, seen complete or not at all.
//!
//! Keys: `vms/<vm id>/g<generation, 8 digits>/packs/<pack id>` and `vms/<vm id>/checkpoints/<checkpoint id>.manifest`.
//! What has no manifest does not exist. One kind of bucket so far: `file:DIR`. This room does not know what the objects
//! mean and checks no hash; who reads does.

pub(crate) mod file;

use std::path::PathBuf;

use bytes::Bytes;
use proto::ids::{CheckpointId, Generation, PackId};
use proto::status::Code;

use self::file::FileBucket;
use crate::failure::Failure;

/// Longest key.
const KEY_MAX: usize = 512;

/// Why an object could not be written, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    /// Not a bucket that this release knows.
    #[error("{0:?} names no bucket; file:DIR is expected")]
    Url(String),
    /// A key that could lead out of the bucket.
    #[error("{0:?} is no key")]
    Key(String),
    /// No such object.
    #[error("the bucket has no {0}")]
    Missing(String),
    /// No room is left.
    #[error("the bucket {bucket} is full: {key} of {bytes} bytes could not be written: {source}")]
    Full {
        /// Which bucket.
        bucket: String,
        /// What was to be written.
        key: String,
        /// How much.
        bytes: usize,
        /// The system's word.
        source: std::io::Error,
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
}

impl From<BucketError> for Failure {
    fn from(error: BucketError) -> Failure {
        let (code, hint) = match &error {
            BucketError::Url(_) => (Code::BadInput, ""),
            BucketError::Key(_) => (Code::Internal, ""),
            BucketError::Missing(_) => (Code::NotFound, ""),
            BucketError::Full { .. } => {
                (Code::Exhausted, "remove checkpoints (`ctl checkpoint rm`) or enlarge the bucket")
            }
            BucketError::Short { .. } => (Code::Corrupt, "`ctl checkpoint verify --all` shows what else is damaged"),
            BucketError::Gone { .. } => {
                (Code::Unreachable, "mount or make it again; checkpoints that it held are not lost yet")
            }
            BucketError::Io { .. } => {
                (Code::Unreachable, "check the disk that holds the bucket, and that the controller may write there")
            }
        };
        Failure::new(code, error.to_string()).hint(hint)
    }
}

/// A bucket; clones are the same.
#[derive(Clone, Debug)]
pub enum Bucket {
    /// A directory.
    File(FileBucket),
}

impl Bucket {
    /// Opens `file:DIR`. The directory is made if it is not there and the bucket is `fresh`: no checkpoint is expected in it.
    ///
    /// # Errors
    /// [`BucketError::Url`], [`BucketError::Io`].
    pub fn open(url: &str, fresh: bool) -> Result<Bucket, BucketError> {
        match url.strip_prefix("file:") {
            Some(path) if !path.is_empty() => {
                let path = path.strip_prefix("//").unwrap_or(path);
                FileBucket::open(&PathBuf::from(path), fresh).map(Bucket::File)
            }
            _ => Err(BucketError::Url(url.into())),
        }
    }

    /// Writes an object: when this returns it is there for good, and it was never there in part.
    ///
    /// # Errors
    /// [`BucketError::Full`], [`BucketError::Io`].
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), BucketError> {
        self.blocking(key, move |file, key| file.put(key, &bytes)).await
    }

    /// Reads an object.
    ///
    /// # Errors
    /// [`BucketError::Missing`], [`BucketError::Io`].
    pub async fn get(&self, key: &str) -> Result<Bytes, BucketError> {
        self.blocking(key, FileBucket::get).await
    }

    /// Reads exactly this part of an object.
    ///
    /// # Errors
    /// [`BucketError::Missing`], [`BucketError::Short`], [`BucketError::Io`].
    pub async fn get_range(&self, key: &str, offset: u64, bytes: usize) -> Result<Bytes, BucketError> {
        self.blocking(key, move |file, key| file.get_range(key, offset, bytes)).await
    }

    /// Keys below a prefix that ends in `/`, sorted.
    ///
    /// # Errors
    /// [`BucketError::Io`].
    pub async fn list(&self, prefix: &str) -> Result<Vec<String>, BucketError> {
        self.blocking(prefix.trim_end_matches('/'), FileBucket::list).await
    }

    /// Removes an object. One that is not there is removed already.
    ///
    /// # Errors
    /// [`BucketError::Io`].
    pub async fn delete(&self, key: &str) -> Result<(), BucketError> {
        self.blocking(key, FileBucket::delete).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        key: &str,
        work: impl FnOnce(&FileBucket, &str) -> Result<T, BucketError> + Send + 'static,
    ) -> Result<T, BucketError> {
        check_key(key)?;
        let Bucket::File(file) = self.clone();
        let owned = key.to_owned();
        let bucket = file.name();
        let joined = tokio::task::spawn_blocking(move || work(&file, &owned)).await;
        let ended = || std::io::Error::other("the worker ended");
        let done = joined.unwrap_or_else(|_| Err(BucketError::Io { bucket, key: key.into(), source: ended() }));
        if let Err(error) = &done {
            count(error);
        }
        done
    }
}

fn count(error: &BucketError) {
    let kind = match error {
        BucketError::Full { .. } => "full",
        BucketError::Gone { .. } => "gone",
        BucketError::Io { .. } => "io",
        BucketError::Url(_) | BucketError::Key(_) | BucketError::Missing(_) | BucketError::Short { .. } => return,
    };
    metrics::counter!(crate::metrics::BUCKET_FAILURES, "kind" => kind).increment(1);
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

/// The generation in the key of a pack.
pub fn generation_of(key: &str) -> Option<Generation> {
    let (before, _) = key.split_once("/packs/")?;
    let number = before.rsplit('/').next()?.strip_prefix('g')?;
    number.parse().ok().map(Generation)
}

/// Where a manifest lies.
pub fn manifest_key(vm_id: &str, checkpoint: CheckpointId) -> String {
    format!("vms/{vm_id}/checkpoints/{checkpoint}.manifest")
}

/// Where the wrapped data key of a VM lies.
pub fn key_object(vm_id: &str) -> String {
    format!("vms/{vm_id}/key")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_cannot_lead_out_of_the_bucket() {
        for key in ["", "/", "a//b", "../x", "a/../b", "a/.tmp", "a b", "a\0b", &"k".repeat(600)] {
            assert!(matches!(check_key(key), Err(BucketError::Key(_))), "{key:?}");
        }
        check_key(&pack_key("00ff", Generation(3), PackId([7; 32]))).unwrap();
    }

    #[test]
    fn other_urls_are_refused() {
        for url in ["s3://bucket", "file:", "/plain/path", ""] {
            assert!(matches!(Bucket::open(url, true), Err(BucketError::Url(_))), "{url:?}");
        }
    }
}

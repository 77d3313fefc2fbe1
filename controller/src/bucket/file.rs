//! A bucket that is a directory on a local disk.
//!
//! An object appears by rename: written to a file of its own under `.tmp`, synced, renamed to its key, and the
//! directories synced up to the root. One that must be new appears by a hard link instead, which the kernel makes only if the
//! name is free. A crash leaves at most a file under `.tmp`, which a start an hour later removes: another controller may be
//! writing there now. `.tmp` is also what a bucket is known
//! by: a mount point whose disk is not there has none, and nothing is written there.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;

use super::room::{PACK_LEAST, Room};
use super::{BucketError, OBJECT_BYTES_MAX, Object, PutNew, uncached};
use crate::ledger::saved::to_hex;

const UNFINISHED: &str = ".tmp";
/// How old a file is that nobody writes any more.
const ABANDONED: Duration = Duration::from_secs(3600);

/// The directory.
#[derive(Clone, Debug)]
pub struct FileBucket {
    root: Arc<PathBuf>,
    /// Changes until it fails for good.
    #[cfg(test)]
    budget: Arc<std::sync::atomic::AtomicI64>,
}

impl FileBucket {
    /// Opens it. Only a `fresh` bucket, in which nothing is expected yet, is made where there is none.
    pub(super) fn open(root: &Path, fresh: bool) -> Result<FileBucket, BucketError> {
        let bucket = FileBucket {
            root: Arc::new(root.into()),
            #[cfg(test)]
            budget: Arc::new(i64::MAX.into()),
        };
        let io = |source| BucketError::Io { bucket: bucket.name(), key: UNFINISHED.into(), source };
        if !fresh && !bucket.is_there() {
            tracing::error!(
                bucket = bucket.name(),
                "checkpoints are expected in the bucket, but no bucket is there: is it mounted? \
                 If it is lost for good, make a folder .tmp there"
            );
            return Ok(bucket);
        }
        let unfinished = root.join(UNFINISHED);
        fs::create_dir_all(&unfinished).map_err(io)?;
        for entry in fs::read_dir(&unfinished).map_err(io)? {
            let entry = entry.map_err(io)?;
            let age = entry.metadata().and_then(|metadata| metadata.modified()).ok().and_then(|at| at.elapsed().ok());
            if age.is_some_and(|age| age >= ABANDONED) {
                // Whoever is faster has removed it.
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(bucket)
    }

    /// A change costs; one of a write before it is made, one after.
    #[cfg(test)]
    fn spend(&self, key: &str) -> Result<(), BucketError> {
        match self.budget.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) > 0 {
            true => Ok(()),
            false => Err(self.failed(key, io::Error::other("the controller is dead"))),
        }
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps, reason = "only tests let it fail")]
    fn spend(&self, _: &str) -> Result<(), BucketError> {
        Ok(())
    }

    fn is_there(&self) -> bool {
        self.root.join(UNFINISHED).is_dir()
    }

    /// How people name it.
    pub(super) fn name(&self) -> String {
        format!("file:{}", self.root.display())
    }

    /// Runs work that may wait for the disk where that holds up nobody.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        key: &str,
        work: impl FnOnce(&FileBucket, &str) -> Result<T, BucketError> + Send + 'static,
    ) -> Result<T, BucketError> {
        let (file, owned) = (self.clone(), key.to_owned());
        let joined = tokio::task::spawn_blocking(move || work(&file, &owned)).await;
        joined.unwrap_or_else(|_| Err(self.failed(key, io::Error::other("the worker ended"))))
    }

    pub(super) fn put(&self, key: &str, bytes: &[u8]) -> Result<(), BucketError> {
        self.spend(key)?;
        self.write(key, bytes, |unfinished, path| fs::rename(unfinished, path))?;
        self.spend(key)
    }

    pub(super) fn put_new(&self, key: &str, bytes: &[u8]) -> Result<PutNew, BucketError> {
        self.spend(key)?;
        let mut outcome = PutNew::Created;
        self.write(key, bytes, |unfinished, path| {
            match fs::hard_link(unfinished, path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => outcome = PutNew::Exists,
                done => done?,
            }
            fs::remove_file(unfinished)
        })?;
        Ok(outcome)
    }

    /// Writes a file of its own and gives it its name in the given way.
    fn write(
        &self,
        key: &str,
        bytes: &[u8],
        name: impl FnOnce(&Path, &Path) -> io::Result<()>,
    ) -> Result<(), BucketError> {
        let unfinished = self.root.join(UNFINISHED).join(to_hex(&crate::entropy::bytes::<16>()));
        self.try_write(key, &unfinished, bytes, name).map_err(|source| {
            // Nobody has seen it; if even removing fails, the next start does it.
            let _ = fs::remove_file(&unfinished);
            match source.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => BucketError::Full {
                    bucket: self.name(),
                    key: key.into(),
                    bytes: bytes.len(),
                    why: source.to_string(),
                },
                _ => self.failed(key, source),
            }
        })
    }

    fn try_write(
        &self,
        key: &str,
        unfinished: &Path,
        bytes: &[u8],
        name: impl FnOnce(&Path, &Path) -> io::Result<()>,
    ) -> io::Result<()> {
        uncached::write_new(unfinished, bytes)?;
        let path = self.root.join(key);
        let folder = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder)?;
        name(unfinished, &path)?;
        let inside = folder.ancestors().take_while(|folder| folder.starts_with(&*self.root));
        inside.into_iter().try_for_each(|folder| File::open(folder)?.sync_all())
    }

    pub(super) fn get(&self, key: &str) -> Result<Bytes, BucketError> {
        let io = |source| self.failed(key, source);
        let path = self.root.join(key);
        let file = File::open(path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        if bytes > OBJECT_BYTES_MAX {
            return Err(BucketError::Large { key: key.into(), bytes });
        }
        // No more than that, should somebody write there.
        let mut file = file.take(bytes);
        if bytes >= PACK_LEAST {
            let mut room = Room::take();
            room.read(file).map_err(io)?;
            return Ok(Bytes::from_owner(room));
        }
        let mut object = Vec::with_capacity(bytes as usize);
        file.read_to_end(&mut object).map_err(io)?;
        Ok(object.into())
    }

    pub(super) fn get_range(&self, key: &str, offset: u64, bytes: usize) -> Result<Bytes, BucketError> {
        let io = |source| self.failed(key, source);
        let mut file = File::open(self.root.join(key)).map_err(io)?;
        let (found, expected) = (file.metadata().map_err(io)?.len(), offset.saturating_add(bytes as u64));
        if found < expected {
            return Err(BucketError::Short { key: key.into(), found, expected });
        }
        let mut part = vec![0; bytes];
        file.seek(SeekFrom::Start(offset)).map_err(io)?;
        file.read_exact(&mut part).map_err(io)?;
        Ok(part.into())
    }

    pub(super) fn list_objects(&self, folder: &str) -> Result<Vec<Object>, BucketError> {
        let mut objects = Vec::new();
        let mut folders = vec![self.root.join(folder)];
        while let Some(folder) = folders.pop() {
            for (path, metadata) in self.entries(&folder)? {
                if metadata.is_dir() {
                    folders.push(path);
                } else if let Ok(Some(key)) = path.strip_prefix(&*self.root).map(Path::to_str) {
                    let modified = metadata.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
                    objects.push(Object {
                        key: key.to_owned(),
                        bytes: metadata.len(),
                        modified_unix_ms: modified.map_or(0, |at| at.as_millis() as u64),
                    });
                }
            }
        }
        objects.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(objects)
    }

    pub(super) fn list_dirs(&self, folder: &str) -> Result<Vec<String>, BucketError> {
        let mut names = Vec::new();
        for (path, metadata) in self.entries(&self.root.join(folder))? {
            // S3 knows no empty directories; here one is what is left when its last object was removed.
            if let (true, Some(name)) = (metadata.is_dir(), path.file_name().and_then(|name| name.to_str()))
                && self.holds_something(&path)?
            {
                names.push(name.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    fn holds_something(&self, folder: &Path) -> Result<bool, BucketError> {
        for (path, metadata) in self.entries(folder)? {
            if !metadata.is_dir() || self.holds_something(&path)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What is in a folder; nothing if it is gone. What is gone meanwhile is left out, and so is what is hidden.
    fn entries(&self, folder: &Path) -> Result<Vec<(PathBuf, fs::Metadata)>, BucketError> {
        let io = |source| self.failed(&folder.display().to_string(), source);
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            // A bucket that is not there has no empty folders.
            Err(error) if error.kind() == ErrorKind::NotFound && self.is_there() => return Ok(Vec::new()),
            Err(error) => return Err(io(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io)?;
            match entry.metadata() {
                _ if entry.file_name().as_encoded_bytes().starts_with(b".") => {}
                Ok(metadata) => found.push((entry.path(), metadata)),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(io(error)),
            }
        }
        Ok(found)
    }

    pub(super) fn delete(&self, key: &str) -> Result<(), BucketError> {
        self.spend(key)?;
        match fs::remove_file(self.root.join(key)) {
            Err(error) if error.kind() != ErrorKind::NotFound || !self.is_there() => Err(self.failed(key, error)),
            _ => Ok(()),
        }
    }

    /// An object that is missing in a bucket that is there is another trouble than a bucket that is not.
    fn failed(&self, key: &str, source: io::Error) -> BucketError {
        match source.kind() {
            ErrorKind::NotFound if !self.is_there() => BucketError::Gone { bucket: self.name(), source },
            ErrorKind::NotFound => BucketError::Missing(key.into()),
            _ => BucketError::Io { bucket: self.name(), key: key.into(), source },
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::bucket::Bucket;

    /// A bucket in a directory that goes with it.
    pub(crate) struct Scratch {
        pub(crate) bucket: Bucket,
        pub(crate) folder: PathBuf,
    }

    impl Scratch {
        pub(crate) fn new() -> Scratch {
            let folder = std::env::temp_dir().join(format!("godwit-{}", to_hex(&crate::entropy::bytes::<8>())));
            let bucket = Bucket::open(&format!("file:{}", folder.display()), true).unwrap();
            Scratch { bucket, folder }
        }

        /// The bucket as a controller sees it that dies after so many changes: each write costs two.
        pub(crate) fn dying(&self, changes: i64) -> Bucket {
            let bucket = FileBucket { root: Arc::new(self.folder.clone()), budget: Arc::new(changes.into()) };
            Bucket::File(bucket)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }

    #[tokio::test]
    async fn objects_come_back_and_go() {
        let scratch = Scratch::new();
        let bucket = &scratch.bucket;
        bucket.put("a/b/one", Bytes::from_static(b"0123456789")).await.unwrap();
        bucket.put("a/c", Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(&bucket.get("a/b/one").await.unwrap()[..], b"0123456789");
        assert_eq!(&bucket.get_range("a/b/one", 2, 3).await.unwrap()[..], b"234");
        assert_eq!(bucket.list("a/").await.unwrap(), ["a/b/one", "a/c"]);
        bucket.delete("a/c").await.unwrap();
        bucket.delete("a/c").await.unwrap();
        assert_eq!(bucket.list("a/").await.unwrap(), ["a/b/one"]);
        assert_eq!(bucket.list("nothing/").await.unwrap(), [""; 0]);
    }

    #[tokio::test]
    async fn what_is_not_there_or_too_short_is_named() {
        let scratch = Scratch::new();
        let missing = scratch.bucket.get("a/b").await.unwrap_err();
        assert_eq!(missing.to_string(), "the bucket has no a/b");
        scratch.bucket.put("a/b", Bytes::from_static(b"12")).await.unwrap();
        let short = scratch.bucket.get_range("a/b", 1, 2).await.unwrap_err();
        assert_eq!(short.to_string(), "a/b has 2 bytes where 3 are expected");
    }

    #[tokio::test]
    async fn unfinished_objects_are_never_seen_and_go_at_a_later_start() {
        let scratch = Scratch::new();
        let unfinished = scratch.folder.join(UNFINISHED).join("half");
        fs::write(&unfinished, b"half").unwrap();
        assert!(scratch.bucket.get(".tmp/half").await.is_err());
        let start = || Bucket::open(&format!("file:{}", scratch.folder.display()), true).unwrap();
        start();
        assert!(unfinished.exists(), "another controller may be writing it");
        let file = fs::File::options().write(true).open(&unfinished).unwrap();
        file.set_modified(std::time::SystemTime::now() - ABANDONED).unwrap();
        start();
        assert!(!unfinished.exists());
    }

    #[tokio::test]
    async fn a_bucket_that_is_gone_is_named_and_never_made_again_by_itself() {
        let scratch = Scratch::new();
        scratch.bucket.put("a/b", Bytes::from_static(b"12")).await.unwrap();
        let aside = scratch.folder.with_extension("aside");
        fs::rename(&scratch.folder, &aside).unwrap();
        for error in [
            scratch.bucket.put("a/c", Bytes::from_static(b"x")).await.unwrap_err(),
            scratch.bucket.get("a/b").await.unwrap_err(),
            scratch.bucket.get_range("a/b", 0, 1).await.unwrap_err(),
            scratch.bucket.list("a/").await.unwrap_err(),
            scratch.bucket.delete("a/b").await.unwrap_err(),
        ] {
            assert!(
                matches!(&error, BucketError::Gone { bucket, .. } if bucket.ends_with(scratch.folder.to_str().unwrap()))
            );
        }
        assert!(!scratch.folder.exists());
        // The mount point is there, its disk is not.
        fs::create_dir(&scratch.folder).unwrap();
        let nowhere = scratch.bucket.put("a/c", Bytes::from_static(b"x")).await.unwrap_err();
        assert!(matches!(nowhere, BucketError::Gone { .. }), "{nowhere}");
        let url = format!("file:{}", scratch.folder.display());
        let reopened = Bucket::open(&url, false).unwrap();
        assert!(matches!(reopened.get("a/b").await.unwrap_err(), BucketError::Gone { .. }));
        assert_eq!(fs::read_dir(&scratch.folder).unwrap().count(), 0);
        fs::remove_dir(&scratch.folder).unwrap();
        fs::rename(&aside, &scratch.folder).unwrap();
        scratch.bucket.put("a/c", Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(reopened.list("a/").await.unwrap(), ["a/b", "a/c"]);
    }

    #[tokio::test]
    async fn a_put_that_fails_leaves_nothing_behind() {
        let scratch = Scratch::new();
        scratch.bucket.put("a", Bytes::from_static(b"file")).await.unwrap();
        // A folder is needed where a file lies.
        scratch.bucket.put("a/b", Bytes::from_static(b"x")).await.unwrap_err();
        assert_eq!(fs::read_dir(scratch.folder.join(UNFINISHED)).unwrap().count(), 0);
    }
}

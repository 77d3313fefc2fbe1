//! Keys: the cluster's, in a file of their own, and each VM's, which lies in the bucket under a cluster key.
//!
//! ```text
//! file of cluster keys        bucket
//! newest last  ── wraps ──>   vms/<vm id>/key: the VM's data key  ── seals ──>  packs and manifests
//! older ones   ── open what they wrapped
//! ```
//! An operator keeps an export of the file in a safe: it and the bucket are all that a recovery needs. A rotation makes a
//! new cluster key and wraps every data key anew; the old one is kept until the operator removes it. Secrets are never
//! logged and leave this process only as an export, and as the data key of one VM to the agent that seals for it.

pub mod ring;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use proto::frame::{self, Kind};
use proto::ids::VmId;
use proto::seal::{DataKey, Opener};
use proto::status::Code;
use proto::v1::{KeyObject, WrappedKey};

use self::ring::Ring;
use crate::bucket::{Bucket, BucketError, key_object};
use crate::entropy;
use crate::failure::Failure;

/// All keys of this controller; clones are the same.
#[derive(Clone)]
pub struct Keys {
    path: Arc<PathBuf>,
    ring: Arc<RwLock<Ring>>,
    /// Data keys that were unwrapped, by VM. Also the lock under which one is made.
    data: Arc<tokio::sync::Mutex<HashMap<VmId, DataKey>>>,
}

impl Keys {
    /// Reads the file of cluster keys; a cluster without one gets its first key.
    ///
    /// # Errors
    /// [`Code::Corrupt`] naming the line, or what the disk says.
    pub fn open(path: &Path) -> Result<Keys, Failure> {
        let ring = match std::fs::read_to_string(path) {
            Ok(text) => Ring::parse(&text).map_err(|error| unreadable(path, &error))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let ring = Ring::default().rotated(entropy::bytes(), crate::ledger::unix_ms());
                save(path, &ring)?;
                tracing::info!(path = %path.display(), "made the cluster's first key: keep an export of it (ctl key export)");
                ring
            }
            Err(error) => return Err(unreadable(path, &error)),
        };
        Ok(Keys { path: Arc::new(path.into()), ring: Arc::new(RwLock::new(ring)), data: Arc::default() })
    }

    /// A ring of one known key, kept nowhere.
    #[cfg(test)]
    pub(crate) fn fixed() -> Keys {
        let ring = Ring::default().rotated([8; 32], 1);
        Keys { path: Arc::default(), ring: Arc::new(RwLock::new(ring)), data: Arc::default() }
    }

    /// The same cluster keys for another bucket, in which a VM may have another data key.
    pub fn apart(&self) -> Keys {
        Keys { path: self.path.clone(), ring: self.ring.clone(), data: Arc::default() }
    }

    fn ring(&self) -> Ring {
        self.ring.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, change: impl FnOnce(&Ring) -> Result<Ring, Failure>) -> Result<Ring, Failure> {
        let mut ring = self.ring.write().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&ring)?;
        save(&self.path, &changed)?;
        *ring = changed.clone();
        Ok(changed)
    }

    /// The text that an operator keeps in a safe.
    pub fn export(&self) -> String {
        self.ring().to_string()
    }

    /// Adds the keys of an export to those that are here; the newest of all wraps from now on. Returns all key ids.
    ///
    /// # Errors
    /// [`Code::BadInput`] if it is no export.
    pub fn import(&self, text: &str) -> Result<Vec<String>, Failure> {
        let other = Ring::parse(text).map_err(|error| {
            Failure::new(Code::BadInput, format!("this is no export of keys: {error}"))
                .hint("give the file that `ctl key export` wrote")
        })?;
        self.replace(|ring| Ok(ring.joined(&other))).map(|ring| ring.ids())
    }

    /// Makes a new cluster key, which wraps from now on. Returns all key ids; [`Keys::rewrap`] follows for each VM.
    ///
    /// # Errors
    /// What the disk says.
    pub fn rotate(&self) -> Result<Vec<String>, Failure> {
        self.replace(|ring| Ok(ring.rotated(entropy::bytes(), crate::ledger::unix_ms()))).map(|ring| ring.ids())
    }

    /// Names of the cluster keys, oldest first.
    pub fn ids(&self) -> Vec<String> {
        self.ring().ids()
    }

    /// A data key under the newest cluster key.
    pub fn wrap(&self, vm: VmId, key: &DataKey) -> WrappedKey {
        self.ring().newest().wrap(key, vm, entropy::bytes())
    }

    /// A VM's data key, out of what some object says.
    ///
    /// # Errors
    /// [`Code::Denied`] naming the cluster key that is missing.
    pub fn unwrap(&self, vm: VmId, wrapped: &[WrappedKey]) -> Result<DataKey, Failure> {
        let ring = self.ring();
        if let Some(key) = wrapped.iter().find_map(|wrapped| ring.unwrap(wrapped, vm)) {
            return Ok(key);
        }
        let needed: Vec<String> = wrapped.iter().map(|wrapped| ring::name(&wrapped.cluster_key)).collect();
        let text = match (needed.is_empty(), needed.iter().any(|id| ring.ids().contains(id))) {
            (true, _) => format!("the key of VM {vm} is lost: nothing in the bucket holds it"),
            (_, true) => format!("the wrong key: cluster key {} does not open the key of VM {vm}", needed.join(", ")),
            (_, false) => format!(
                "the key is missing: VM {vm} is sealed under cluster key {}, and this cluster has {}",
                needed.join(", "),
                ring.ids().join(", ")
            ),
        };
        Err(Failure::new(Code::Denied, text).hint("bring the export of that key: `ctl key import FILE`"))
    }

    /// The data key of a VM: from memory, from the bucket, or a new one that is durable in the bucket when this returns.
    ///
    /// # Errors
    /// The bucket's, [`Keys::unwrap`]'s.
    pub async fn data_key(&self, bucket: &Bucket, vm: VmId) -> Result<DataKey, Failure> {
        let mut known = self.data.lock().await;
        if let Some(key) = known.get(&vm) {
            return Ok(key.clone());
        }
        let key = match wrapped(bucket, vm).await? {
            Some(wrapped) => self.unwrap(vm, &wrapped)?,
            None => {
                let key = DataKey::new(entropy::bytes());
                self.store(bucket, vm, &key).await?;
                key
            }
        };
        known.insert(vm, key.clone());
        Ok(key)
    }

    /// What opens a checkpoint: the VM's key object knows the newest wrapping, the checkpoint's own envelope an older.
    ///
    /// # Errors
    /// The bucket's, [`Keys::unwrap`]'s.
    pub async fn opener(&self, bucket: &Bucket, vm: VmId, envelope: &[WrappedKey]) -> Result<Opener, Failure> {
        let mut known = self.data.lock().await;
        if let Some(key) = known.get(&vm) {
            return Ok(Opener::new(key.clone(), vm));
        }
        let mut candidates = wrapped(bucket, vm).await?.unwrap_or_default();
        candidates.extend_from_slice(envelope);
        let key = self.unwrap(vm, &candidates)?;
        known.insert(vm, key.clone());
        Ok(Opener::new(key, vm))
    }

    /// Wraps the key of a VM by the newest cluster key, if it is not yet. True if something was written.
    ///
    /// # Errors
    /// The bucket's, [`Keys::unwrap`]'s.
    pub async fn rewrap(&self, bucket: &Bucket, vm: VmId) -> Result<bool, Failure> {
        let Some(wrapped) = wrapped(bucket, vm).await? else { return Ok(false) };
        let newest = self.ring().newest().id().to_vec();
        if wrapped.iter().any(|wrapped| wrapped.cluster_key == newest) {
            return Ok(false);
        }
        let key = self.unwrap(vm, &wrapped)?;
        self.store(bucket, vm, &key).await.map(|()| true)
    }

    async fn store(&self, bucket: &Bucket, vm: VmId, key: &DataKey) -> Result<(), Failure> {
        let object = KeyObject { vm_id: vm.to_string(), keys: vec![self.wrap(vm, key)] };
        let bytes = frame::encode_message(Kind::Envelope, &object);
        Ok(bucket.put(&key_object(&vm.to_string()), bytes.into()).await?)
    }
}

/// The wrapped forms of a VM's key that its key object holds.
async fn wrapped(bucket: &Bucket, vm: VmId) -> Result<Option<Vec<WrappedKey>>, Failure> {
    let name = key_object(&vm.to_string());
    match bucket.get(&name).await {
        Ok(bytes) => match frame::decode_message::<KeyObject>(Kind::Envelope, &bytes) {
            Ok(object) => Ok(Some(object.keys)),
            // Every manifest has a copy, so a damaged object is as good as none to a reader; it is not overwritten.
            Err(error) => {
                tracing::warn!(object = name, %error, "the key object is damaged");
                Ok(Some(Vec::new()))
            }
        },
        Err(BucketError::Missing(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn unreadable(path: &Path, why: &dyn std::fmt::Display) -> Failure {
    Failure::new(Code::Corrupt, format!("{}: {why}", path.display()))
        .hint("put back the file of cluster keys from an export; without it no checkpoint opens")
}

/// Writes the file of keys: complete or not at all, readable by its owner alone.
fn save(path: &Path, ring: &Ring) -> Result<(), Failure> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let fresh = path.with_extension("new");
    let written = (|| {
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(ring.to_string().as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)?;
        std::fs::File::open(path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))?
            .sync_all()
    })();
    written.map_err(|error: std::io::Error| {
        Failure::new(Code::Internal, format!("{}: the cluster keys cannot be kept: {error}", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket::file::tests::Scratch;

    const VM: VmId = VmId([3; 16]);

    fn keys(scratch: &Scratch, name: &str) -> Keys {
        Keys::open(&scratch.folder.join(name)).unwrap()
    }

    #[tokio::test]
    async fn a_data_key_outlives_the_controller_and_a_rotation() {
        let scratch = Scratch::new();
        let bucket = scratch.bucket.clone();
        let key = keys(&scratch, "keys").data_key(&bucket, VM).await.unwrap();
        let again = keys(&scratch, "keys");
        assert_eq!(again.data_key(&bucket, VM).await.unwrap(), key);
        assert_eq!(again.rotate().unwrap().len(), 2);
        assert!(again.rewrap(&bucket, VM).await.unwrap());
        assert!(!again.rewrap(&bucket, VM).await.unwrap());
        assert_eq!(keys(&scratch, "keys").data_key(&bucket, VM).await.unwrap(), key);
    }

    #[tokio::test]
    async fn another_cluster_opens_it_with_the_export_alone() {
        let scratch = Scratch::new();
        let bucket = scratch.bucket.clone();
        let first = keys(&scratch, "first");
        let key = first.data_key(&bucket, VM).await.unwrap();
        let second = keys(&scratch, "second");
        let failure = second.data_key(&bucket, VM).await.unwrap_err();
        assert_eq!(failure.code, Code::Denied);
        assert!(failure.message.contains("key is missing") && failure.message.contains(&first.ids()[0]), "{failure}");
        second.import(&first.export()).unwrap();
        assert_eq!(second.data_key(&bucket, VM).await.unwrap(), key);
        assert_eq!(second.import("nonsense").unwrap_err().code, Code::BadInput);
    }

    #[test]
    fn the_file_is_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = Scratch::new();
        keys(&scratch, "keys");
        let mode = std::fs::metadata(scratch.folder.join("keys")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

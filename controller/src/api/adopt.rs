//! From the bucket back into a ledger: after a disaster the bucket and the keys are all that there is.
//!
//! What is found becomes `CheckpointFound` in the ledger, in order of age, and is restored like any other checkpoint. A
//! manifest that does not open or makes no sense is named and left alone: nothing is removed here. A rotation of the
//! cluster key passes here too, since it walks the same VMs.

use proto::ids::VmId;
use proto::status::Code;
use proto::v1::AdoptReply;

use super::Api;
use crate::bucket::VMS;
use crate::failure::Failure;
use crate::ingest::manifest::{pack_keys, packs};
use crate::ledger::event::{CheckpointEntry, Event};
use crate::saga::report::record;
use crate::tls::Identity;

impl Api {
    /// Takes in what the ledger does not know. `from` names the bucket; it must be this controller's.
    ///
    /// # Errors
    /// [`Code::BadInput`] if it is another bucket, or the bucket's and the ledger's.
    pub(super) async fn adopt(&self, operator: &Identity, from: &str) -> Result<AdoptReply, Failure> {
        if !from.is_empty() && plain(from) != plain(&self.bucket_url) {
            let text = format!("this controller's bucket is {}, not {from}", self.bucket_url);
            let hint = format!("name it in the controller's settings (bucket = \"{from}\") and start it again");
            return Err(Failure::new(Code::BadInput, text).hint(hint));
        }
        let known = self.ledger.state();
        let mut reply = AdoptReply::default();
        let mut found = Vec::new();
        for key in self.reader.bucket.list(VMS).await? {
            let Some(id) = checkpoint_of(&key) else { continue };
            if known.checkpoints.contains_key(id) {
                continue;
            }
            match self.entry(&key).await {
                Ok(entry) => found.push(entry),
                Err(failure) if matches!(failure.code, Code::Corrupt | Code::Denied) => {
                    reply.problems.push(failure.to_string());
                }
                Err(failure) => return Err(failure),
            }
        }
        found.sort_by_key(|entry| (entry.generation, entry.created_unix_ms));
        for entry in found {
            reply.adopted.push(record(&entry));
            self.ledger.append(&operator.to_string(), Event::CheckpointFound { entry: Box::new(entry) }).await?;
        }
        Ok(reply)
    }

    async fn entry(&self, key: &str) -> Result<CheckpointEntry, Failure> {
        let manifest = self.reader.manifest(key).await?.manifest;
        let pack_bytes: u64 = packs(&manifest).iter().map(|pack| pack.bytes).sum();
        Ok(CheckpointEntry {
            pack_keys: pack_keys(&manifest),
            id: manifest.checkpoint,
            vm: manifest.vm_name,
            vm_id: manifest.vm_id,
            generation: manifest.generation,
            created_unix_ms: manifest.created_unix_ms,
            ram_bytes: manifest.config.map_or(0, |config| config.memory_bytes),
            stored_bytes: pack_bytes,
            own_bytes: manifest.own_bytes,
            stop_us: manifest.stop_us,
            manifest_key: key.to_owned(),
            digest: manifest.digest.unwrap_or_default(),
            verified: "unverified".into(),
            by_policy: false,
            sequence: 0,
        })
    }

    /// Makes a new cluster key and wraps the key of every VM in the bucket by it.
    ///
    /// # Errors
    /// The disk's, the bucket's, or [`Code::Denied`] for a VM whose key does not open.
    pub(super) async fn rotate(&self, operator: &Identity) -> Result<Vec<String>, Failure> {
        let ids = self.reader.keys.rotate()?;
        tracing::warn!(%operator, ?ids, "the cluster key is rotated");
        let keys = self.reader.bucket.list(VMS).await?;
        let vms = keys.iter().filter_map(|key| key.strip_prefix(VMS)?.strip_suffix("/key")?.parse::<VmId>().ok());
        for vm in vms {
            self.reader.keys.rewrap(&self.reader.bucket, vm).await?;
        }
        Ok(ids)
    }
}

/// The checkpoint whose manifest has this key.
fn checkpoint_of(key: &str) -> Option<&str> {
    let (_, name) = key.split_once("/checkpoints/")?;
    name.strip_suffix(".manifest")
}

/// A URL in the form in which two are compared: how a server is reached does not make another bucket.
fn plain(url: &str) -> String {
    let url = url.split('?').next().unwrap_or(url);
    let path = url.strip_prefix("file://").or_else(|| url.strip_prefix("file:"));
    path.map_or_else(|| url.to_owned(), |path| format!("file:{path}")).trim_end_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_manifests_are_checkpoints_and_urls_are_compared_without_their_slashes() {
        assert_eq!(checkpoint_of("vms/00/checkpoints/0011.manifest"), Some("0011"));
        assert_eq!(checkpoint_of("vms/00/g00000001/packs/0011"), None);
        assert_eq!(plain("file:///srv/bucket/"), plain("file:/srv/bucket"));
        assert_eq!(plain("s3://a/b?region=x"), plain("s3://a/b"));
        assert_ne!(plain("s3://a/b"), plain("s3://a/c"));
    }
}

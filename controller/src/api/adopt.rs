//! From the bucket back into a ledger: after a disaster the bucket and the keys are all that there is.
//!
//! What is found becomes `CheckpointFound` in the ledger, in order of age, and is restored like any other checkpoint. A
//! manifest that does not open or makes no sense is named and left alone: nothing is removed here. A rotation of the
//! cluster key passes here too, since it walks the same VMs.

use proto::ids::VmId;
use proto::status::Code;
use proto::v1::AdoptReply;

use super::Api;
use crate::bucket::{VMS, checkpoints_prefix};
use crate::failure::Failure;
use crate::ingest::manifest::entry;
use crate::ledger::event::Event;
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
        let mut keys = Vec::new();
        for vm in self.reader.bucket.list_dirs(VMS).await? {
            keys.extend(self.reader.bucket.list(&checkpoints_prefix(&vm)).await?);
        }
        for key in keys {
            let Some(id) = checkpoint_of(&key) else { continue };
            if known.checkpoints.contains_key(id) {
                continue;
            }
            match self.reader.manifest(&key).await {
                // How long the object is was not asked.
                Ok(opened) => found.push(entry(opened.manifest, key, 0)),
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

    /// Makes a new cluster key and wraps the key of every VM in the bucket by it.
    ///
    /// # Errors
    /// The disk's, the bucket's, or [`Code::Denied`] for a VM whose key does not open.
    pub(super) async fn rotate(&self, operator: &Identity) -> Result<Vec<String>, Failure> {
        let ids = self.reader.keys.rotate()?;
        tracing::warn!(%operator, ?ids, "the cluster key is rotated");
        let vms = self.reader.bucket.list_dirs(VMS).await?;
        for vm in vms.iter().filter_map(|vm| vm.parse::<VmId>().ok()) {
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

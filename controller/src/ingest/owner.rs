//! Whose a generation of a VM is: `vms/<vm id>/g<generation>/owner`, written once, before the first pack of the generation.
//!
//! Two clusters that share a bucket may both believe to have a VM. Of two that write one generation the first is the one, and
//! of two that write different ones the newest: whoever finds another cluster's claim to a generation since it got the VM
//! itself is told so and writes no more. Claims of before that are history: the VM was restored from what they left.

use proto::frame::{self, Kind};
use proto::ids::Generation;
use proto::status::Code;
use proto::v1::Owner;

use crate::bucket::{Bucket, BucketError, PutNew, generation_folder, owner_key, vm_prefix};
use crate::failure::Failure;
use crate::retention::policy::span;

/// What a cluster says when it writes for a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Hex of the VM's id.
    pub vm_id: String,
    /// Name of the VM, for people.
    pub vm: String,
    /// The generation that writes.
    pub generation: Generation,
    /// The generation with which this cluster got the VM.
    pub since: Generation,
    /// Hex of the cluster's id.
    pub cluster: String,
    /// The cluster for people: who, and where it is reached.
    pub name: String,
}

impl Claim {
    /// Says it, unless another cluster has.
    ///
    /// # Errors
    /// [`Code::Conflict`] naming the other; the bucket's.
    pub async fn make(&self, bucket: &Bucket) -> Result<(), Failure> {
        if self.holds(bucket).await? {
            return Ok(());
        }
        let owner = Owner {
            vm_id: self.vm_id.clone(),
            generation: self.generation.0,
            cluster: self.cluster.clone(),
            name: self.name.clone(),
            claimed_unix_ms: crate::ledger::unix_ms(),
        };
        let bytes = frame::encode_message(Kind::Envelope, &owner);
        match bucket.put_new(&owner_key(&self.vm_id, self.generation), bytes.into()).await? {
            PutNew::Created => tracing::info!(vm = self.vm, generation = self.generation.0, "claimed in the bucket"),
            PutNew::Exists => {}
        }
        // Whoever was faster is seen now.
        match self.holds(bucket).await? {
            true => Ok(()),
            false => {
                let key = owner_key(&self.vm_id, self.generation);
                let text = format!(
                    "{key} is damaged: it does not say whose generation {} of {} is",
                    self.generation.0, self.vm
                );
                let hint = "if no other cluster has the VM, remove that object; the next checkpoint writes it anew";
                Err(Failure::new(Code::Corrupt, text).hint(hint))
            }
        }
    }

    /// Whether it is said already, and nobody else's is in its way.
    ///
    /// # Errors
    /// [`Code::Conflict`] naming the other; the bucket's.
    pub async fn holds(&self, bucket: &Bucket) -> Result<bool, Failure> {
        let folders = bucket.list_dirs(&vm_prefix(&self.vm_id)).await?;
        let mut generations: Vec<Generation> = folders.iter().filter_map(|folder| generation_folder(folder)).collect();
        generations.retain(|generation| *generation >= self.since);
        generations.sort_by_key(|generation| std::cmp::Reverse(generation.0));
        for generation in generations {
            match owner(bucket, &self.vm_id, generation).await? {
                Some(owner) if owner.cluster != self.cluster => return Err(self.refused(&owner)),
                // What is older was looked at when this one was made.
                Some(_) => return Ok(generation >= self.generation),
                None => {}
            }
        }
        Ok(false)
    }

    fn refused(&self, owner: &Owner) -> Failure {
        let Owner { name, cluster, generation, claimed_unix_ms, .. } = owner;
        let since = span(crate::ledger::unix_ms().saturating_sub(*claimed_unix_ms));
        let text = format!(
            "{} is another cluster's: {name} (cluster {cluster}) writes its checkpoints as generation {generation}, claimed {since} ago; \
             here it has generation {}",
            self.vm, self.generation.0
        );
        Failure::new(Code::Conflict, text).hint(format!(
            "if that cluster is to have it, remove it here (`ctl vm rm {0}`); if not, end it there, remove it here, and restore it \
             (`ctl restore {0} --from URL`)",
            self.vm
        ))
    }
}

/// The claim to a generation, if there is one. What is no claim says nothing.
///
/// # Errors
/// The bucket's.
pub async fn owner(bucket: &Bucket, vm_id: &str, generation: Generation) -> Result<Option<Owner>, Failure> {
    let key = owner_key(vm_id, generation);
    match bucket.get(&key).await {
        Ok(bytes) => match frame::decode_message::<Owner>(Kind::Envelope, &bytes) {
            Ok(owner) if owner.generation == generation.0 && owner.vm_id == vm_id => Ok(Some(owner)),
            Ok(_) => {
                tracing::warn!(key, "a claim to something else lies there");
                Ok(None)
            }
            Err(error) => {
                tracing::warn!(key, %error, "no claim");
                Ok(None)
            }
        },
        Err(BucketError::Missing(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket::file::tests::Scratch;

    fn claim(cluster: &str, generation: u64, since: u64) -> Claim {
        Claim {
            vm_id: "0d".repeat(16),
            vm: "vm1".into(),
            generation: Generation(generation),
            since: Generation(since),
            cluster: cluster.into(),
            name: format!("controller/{cluster} at there:1"),
        }
    }

    #[tokio::test]
    async fn of_two_clusters_the_first_has_a_generation_and_the_other_is_told_whose_it_is() {
        let bucket = &Scratch::new();
        let bucket = &bucket.bucket;
        for _ in 0..2 {
            claim("a", 1, 1).make(bucket).await.unwrap();
        }
        let refused = claim("b", 1, 1).make(bucket).await.unwrap_err();
        assert_eq!(refused.code, Code::Conflict);
        for word in ["controller/a at there:1", "generation 1", "vm1"] {
            assert!(refused.message.contains(word), "{refused}");
        }
        assert!(!claim("a", 2, 1).holds(bucket).await.unwrap());
    }

    #[tokio::test]
    async fn who_restores_it_has_it_and_who_had_it_before_is_refused_in_every_generation() {
        let scratch = Scratch::new();
        let bucket = &scratch.bucket;
        claim("a", 1, 1).make(bucket).await.unwrap();
        claim("a", 2, 1).make(bucket).await.unwrap();
        claim("b", 3, 3).make(bucket).await.unwrap();
        for generation in [2, 3, 9] {
            let refused = claim("a", generation, 1).make(bucket).await.unwrap_err();
            assert!(refused.message.contains("controller/b"), "{refused}");
        }
        assert!(claim("b", 3, 3).holds(bucket).await.unwrap());
        // The other way round: restored from what the second wrote.
        claim("a", 4, 4).make(bucket).await.unwrap();
        assert_eq!(claim("b", 5, 3).make(bucket).await.unwrap_err().code, Code::Conflict);
    }

    #[tokio::test]
    async fn of_many_at_once_one_cluster_has_it() {
        let scratch = Scratch::new();
        let mut all = tokio::task::JoinSet::new();
        for number in 0..8 {
            let bucket = scratch.bucket.clone();
            all.spawn(async move { claim(&format!("c{number}"), 1, 1).make(&bucket).await.is_ok() });
        }
        assert_eq!(all.join_all().await.into_iter().filter(|ours| *ours).count(), 1);
    }

    #[tokio::test]
    async fn what_is_no_claim_says_nothing() {
        let scratch = Scratch::new();
        let key = owner_key(&"0d".repeat(16), Generation(7));
        scratch.bucket.put(&key, bytes::Bytes::from_static(b"nonsense")).await.unwrap();
        claim("a", 1, 1).make(&scratch.bucket).await.unwrap();
        // In the generation itself nobody can tell.
        let damaged = claim("a", 7, 1).make(&scratch.bucket).await.unwrap_err();
        assert!(damaged.code == Code::Corrupt && damaged.message.contains(&key), "{damaged}");
    }
}

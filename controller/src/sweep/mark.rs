//! What lies there of a VM, and what its manifests name.
//!
//! A manifest is read once: what it names is remembered under its key, its length and the time at which it was written. A
//! few are read at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use proto::ids::Generation;
use proto::status::Code;
use proto::v1::Owner;

use crate::abreast::abreast;
use crate::bucket::{Bucket, Object, checkpoint_of, generation_folder, vm_prefix};
use crate::failure::Failure;
use crate::ingest::manifest::pack_keys;
use crate::ingest::owner::{Claim, owner};
use crate::ingest::read::Reader;

/// Manifests that are read at a time.
pub const READS_MAX: usize = 8;

/// Everything that lies there of a VM.
pub struct Ground {
    /// Its packs.
    pub packs: Vec<Object>,
    /// Its manifests.
    pub manifests: Vec<Object>,
    /// Who claims which of its generations, the newest first.
    pub owners: Vec<Owner>,
}

impl Ground {
    /// Who claims a generation.
    pub fn owner(&self, generation: Generation) -> Option<&Owner> {
        self.owners.iter().find(|owner| owner.generation == generation.0)
    }

    /// The newest claim, if it is of another cluster.
    pub fn foreign(&self, claim: &Claim) -> Option<&Owner> {
        self.owners.first().filter(|owner| owner.cluster != claim.cluster)
    }
}

/// What a manifest names, and of which object that was read.
struct Known {
    bytes: u64,
    modified_unix_ms: u64,
    packs: Arc<BTreeSet<String>>,
}

/// What manifests name, and what claims say.
#[derive(Default)]
pub struct Marks {
    known: Mutex<BTreeMap<String, Known>>,
    claims: Mutex<BTreeMap<(String, Generation), Owner>>,
}

impl Marks {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks what there is. A claim is never written twice, so each is read once.
    ///
    /// # Errors
    /// The bucket's.
    pub async fn survey(&self, bucket: &Bucket, vm_id: &str) -> Result<Ground, Failure> {
        let (packs, rest): (Vec<_>, Vec<_>) = bucket
            .list_objects(&vm_prefix(vm_id))
            .await?
            .into_iter()
            .partition(|object| object.key.contains("/packs/"));
        let claimed = |object: &Object| {
            let folder = object.key.strip_prefix(&vm_prefix(vm_id))?.strip_suffix("/owner")?;
            generation_folder(folder)
        };
        let generations: Vec<Generation> = rest.iter().filter_map(claimed).collect();
        let known = |generation: &Generation| self.claims().get(&(vm_id.to_owned(), *generation)).cloned();
        let unread = generations.iter().copied().filter(|generation| known(generation).is_none());
        let read = abreast(READS_MAX, unread, |generation| {
            let (bucket, vm_id) = (bucket.clone(), vm_id.to_owned());
            async move { Ok(owner(&bucket, &vm_id, generation).await?.map(|owner| (generation, owner))) }
        });
        let read = read.await?.into_iter().flatten();
        read.for_each(|(generation, owner)| drop(self.claims().insert((vm_id.to_owned(), generation), owner)));
        let mut owners: Vec<Owner> = generations.iter().filter_map(known).collect();
        owners.sort_by_key(|owner| std::cmp::Reverse(owner.generation));
        let is_manifest = |object: &Object| checkpoint_of(&object.key).is_some();
        Ok(Ground { packs, manifests: rest.into_iter().filter(is_manifest).collect(), owners })
    }

    fn claims(&self) -> std::sync::MutexGuard<'_, BTreeMap<(String, Generation), Owner>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These objects are others now.
    pub fn forget<'a>(&self, keys: impl Iterator<Item = &'a String>) {
        let mut known = self.lock();
        keys.for_each(|key| drop(known.remove(key)));
    }

    /// The packs of every manifest that lies there, by its key. One that the ledger knows (`in_ledger`) and that cannot be
    /// opened is left out.
    ///
    /// # Errors
    /// [`Code::Corrupt`] or [`Code::Denied`] naming a manifest that could name anything; the bucket's.
    pub async fn all(
        &self,
        reader: &Reader,
        ground: &Ground,
        in_ledger: &BTreeSet<String>,
    ) -> Result<BTreeMap<String, Arc<BTreeSet<String>>>, Failure> {
        let mut marked = BTreeMap::new();
        let mut unread = Vec::new();
        for object in &ground.manifests {
            let found = self.lock().get(&object.key).and_then(|known| {
                let same = known.bytes == object.bytes && known.modified_unix_ms == object.modified_unix_ms;
                same.then(|| known.packs.clone())
            });
            match found {
                Some(packs) => drop(marked.insert(object.key.clone(), packs)),
                None => unread.push(object.clone()),
            }
        }
        let read = abreast(READS_MAX, unread, |object| {
            let (reader, known) = (reader.clone(), in_ledger.contains(&object.key));
            async move {
                match reader.manifest(&object.key).await {
                    Ok(opened) => {
                        let packs: BTreeSet<String> = pack_keys(&opened.manifest).into_iter().collect();
                        Ok(Some((object, packs)))
                    }
                    Err(failure) if matches!(failure.code, Code::Corrupt | Code::Denied) && known => Ok(None),
                    Err(failure) => Err(failure.at("nothing is swept, because nobody knows what it needs")),
                }
            }
        });
        for (object, packs) in read.await?.into_iter().flatten() {
            let (Object { key, bytes, modified_unix_ms }, packs) = (object, Arc::new(packs));
            self.lock().insert(key.clone(), Known { bytes, modified_unix_ms, packs: packs.clone() });
            marked.insert(key, packs);
        }
        Ok(marked)
    }
}

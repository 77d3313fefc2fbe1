//! Mark and sweep of one VM's packs in the bucket, and the rewriting of packs that are mostly dead ([`repack`]).
//!
//! ```text
//!   list     packs and manifests of the VM, and whose its generations are
//!   mark     what the ledger's checkpoints name, and what any manifest in the bucket names, whoever wrote it
//!   sweep    the rest: of our generations at once, of others when it has lain there for an hour, of newer ones never
//! ```
//! Only the cluster whose claim to the VM is the newest sweeps at all: an older one can complete no checkpoint any more, so
//! that nobody builds on what goes. Whoever calls holds the lock of the VM's packs: no checkpoint of this cluster is under
//! way. A manifest that cannot be read, and that the ledger does not know, could name anything: then nothing is removed.

mod mark;
mod repack;
mod shape;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proto::ids::Generation;
use serde::{Deserialize, Serialize};

use self::mark::{Ground, Marks};
use self::repack::Repack;
use crate::abreast::abreast;
use crate::bucket::{Bucket, Object, checkpoint_of, generation_of};
use crate::failure::Failure;
use crate::ingest::owner::Claim;
use crate::ingest::read::Reader;
use crate::ledger::state::State;

/// How long a pack that nobody names lies there if its generation is not known to be ours, milliseconds.
pub const GRACE_MS: u64 = 3_600_000;
/// A pack of which less than this is needed is worth rewriting.
pub const LIVE_PERCENT_MIN: u32 = 30;
/// Objects that are removed at a time.
const DELETES_MAX: usize = 8;

/// Sweeps buckets; clones are the same, and remember what manifests name.
#[derive(Clone, Default)]
pub struct Sweeper {
    marks: Arc<Marks>,
    totals: Arc<repack::Totals>,
}

/// What is to be swept, and what the ledger knows of it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Who asks, with the newest generation of the VM that this cluster has.
    pub claim: Claim,
    /// Whether a running VM is behind it: then packs may be written as its generation.
    pub may_write: bool,
    /// Manifests that the ledger knows.
    pub known: BTreeSet<String>,
    /// Packs that the ledger's checkpoints need.
    pub used: BTreeSet<String>,
    /// Packs that are damaged: they are not read.
    pub damaged: BTreeSet<String>,
    /// Packs of which less than so many percent are needed are rewritten; 0: none.
    pub live_percent_min: u32,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// What a sweep did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swept {
    /// Packs that are needed.
    pub packs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packs that nobody needs and that are gone.
    pub removed: u64,
    /// Their bytes.
    pub removed_bytes: u64,
    /// Packs that nobody names and that are left for now.
    pub left: u64,
    /// Packs that are rewritten.
    pub repacked: u64,
    /// Bytes that were written for that.
    pub written_bytes: u64,
    /// Checkpoints whose packs are others now.
    pub changed: Vec<Changed>,
    /// Why not all was done; empty if it was.
    pub note: String,
}

impl Swept {
    /// In a sentence.
    pub fn words(&self) -> String {
        let Swept { packs, bytes, removed, removed_bytes, left, repacked, .. } = self;
        let note = if self.note.is_empty() { String::new() } else { format!("; {}", self.note) };
        format!(
            "{packs} packs of {bytes} bytes are needed, {removed} of {removed_bytes} bytes are gone, {left} are left for now, \
             {repacked} were rewritten{note}"
        )
    }
}

/// A checkpoint whose packs are others than the ledger knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Hex of its id.
    pub checkpoint: String,
    /// Where its packs lie now.
    pub pack_keys: Vec<String>,
    /// Their bytes, and those of the manifest.
    pub stored_bytes: u64,
}

impl Request {
    /// For a VM as the ledger has it. `generation` is one that this cluster is known to have had.
    pub fn of(state: &State, vm_id: &str, generation: u64, live_percent_min: u32) -> Request {
        let vm = state.vms.values().find(|vm| vm.id == vm_id);
        let entries: Vec<_> = state.checkpoints.values().filter(|entry| entry.vm_id == vm_id).collect();
        let newest = entries.iter().map(|entry| entry.generation).chain(vm.map(|vm| vm.generation)).max().unwrap_or(0);
        let generation = newest.max(generation);
        let claim = Claim {
            vm_id: vm_id.into(),
            vm: state.name_of(vm_id).into(),
            generation: Generation(generation),
            since: Generation(vm.map_or(generation, |vm| vm.since)),
            cluster: state.cluster.clone(),
            name: String::new(),
        };
        Request {
            claim,
            may_write: vm.is_some_and(|vm| vm.generation == generation),
            known: entries.iter().map(|entry| entry.manifest_key.clone()).collect(),
            used: entries.iter().flat_map(|entry| entry.pack_keys.iter().cloned()).collect(),
            damaged: state.damaged.keys().cloned().collect(),
            live_percent_min,
            dry_run: false,
        }
    }
}

impl Sweeper {
    /// Sweeps what a VM has in the bucket. May be given up anywhere and repeated.
    ///
    /// # Errors
    /// `Corrupt` or `Denied` naming a manifest that cannot be read, the bucket's.
    pub async fn sweep(
        &self,
        reader: &Reader,
        request: &Request,
        say: impl Fn(String) + Sync,
    ) -> Result<Swept, Failure> {
        let mut swept = Swept::default();
        let ground = self.marks.survey(&reader.bucket, &request.claim.vm_id).await?;
        if let Some(theirs) = ground.foreign(&request.claim) {
            swept.note = format!("{} owns generation {} of it: left to that cluster", theirs.name, theirs.generation);
            swept.left = ground.packs.len() as u64;
            return Ok(swept);
        }
        self.remove(reader, request, &ground, &mut swept).await?;
        if request.live_percent_min > 0 && (request.may_write || request.dry_run) {
            let repack = Repack { reader, request, totals: &self.totals, say: &say };
            let done = repack.run(&ground).await?;
            (swept.repacked, swept.written_bytes) = (done.repacked, done.written_bytes);
            swept.note = done.note;
            if done.repacked > 0 && !request.dry_run {
                self.marks.forget(done.manifests.iter());
                let ground = self.marks.survey(&reader.bucket, &request.claim.vm_id).await?;
                // The ledger still names what was rewritten; what counts is what lies there now.
                let request = Request { used: BTreeSet::new(), known: BTreeSet::new(), ..request.clone() };
                self.remove(reader, &request, &ground, &mut swept).await?;
            }
        }
        Ok(swept)
    }

    /// Removes what nobody names.
    async fn remove(
        &self,
        reader: &Reader,
        request: &Request,
        ground: &Ground,
        swept: &mut Swept,
    ) -> Result<(), Failure> {
        let marked = self.marks.all(reader, ground, &request.known).await?;
        let used: BTreeSet<&String> = marked.values().flat_map(|packs| packs.iter()).chain(&request.used).collect();
        let (needed, rest): (Vec<&Object>, Vec<&Object>) =
            ground.packs.iter().partition(|pack| used.contains(&pack.key));
        (swept.packs, swept.bytes) = (needed.len() as u64, needed.iter().map(|pack| pack.bytes).sum());
        let now = crate::ledger::unix_ms();
        let (gone, left): (Vec<&Object>, Vec<&Object>) =
            rest.into_iter().partition(|pack| removable(pack, ground, &request.claim, now));
        swept.left = left.len() as u64;
        swept.removed += gone.len() as u64;
        swept.removed_bytes += gone.iter().map(|pack| pack.bytes).sum::<u64>();
        if !request.dry_run {
            delete(&reader.bucket, gone.into_iter().map(|pack| pack.key.clone()).collect()).await?;
        }
        swept.changed = changed(&marked, ground);
        Ok(())
    }
}

/// Whether a pack that nobody names may go.
fn removable(pack: &Object, ground: &Ground, claim: &Claim, now_unix_ms: u64) -> bool {
    let Some(generation) = generation_of(&pack.key).filter(|generation| *generation <= claim.generation) else {
        return false;
    };
    let ours = generation == claim.generation || ground.owner(generation).is_some_and(|o| o.cluster == claim.cluster);
    ours || now_unix_ms.saturating_sub(pack.modified_unix_ms) >= GRACE_MS
}

/// What each checkpoint that lies there needs.
fn changed(marked: &BTreeMap<String, Arc<BTreeSet<String>>>, ground: &Ground) -> Vec<Changed> {
    let bytes: BTreeMap<&String, u64> = ground.packs.iter().map(|pack| (&pack.key, pack.bytes)).collect();
    let of = |manifest: &Object| {
        let packs = marked.get(&manifest.key)?;
        Some(Changed {
            checkpoint: checkpoint_of(&manifest.key)?.to_owned(),
            pack_keys: packs.iter().cloned().collect(),
            stored_bytes: packs.iter().filter_map(|key| bytes.get(key)).sum::<u64>() + manifest.bytes,
        })
    };
    ground.manifests.iter().filter_map(of).collect()
}

async fn delete(bucket: &Bucket, keys: Vec<String>) -> Result<(), Failure> {
    let removed = abreast(DELETES_MAX, keys, |key| {
        let bucket = bucket.clone();
        async move { Ok(bucket.delete(&key).await?) }
    });
    removed.await.map(drop)
}

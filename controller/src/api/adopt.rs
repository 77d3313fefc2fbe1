//! From the bucket back into a ledger: after a disaster the bucket and the keys are all that there is.
//!
//! Recordings are found with them. Of another bucket than the cluster's own, what is wanted is copied first. What is found becomes `CheckpointFound` in the ledger, in order of age, and is restored like any other checkpoint. A
//! manifest that does not open or makes no sense is named and left alone: nothing is removed here. A rotation of the
//! cluster key passes here too, since it walks the same VMs.

use std::collections::BTreeMap;

use proto::ids::{RecordingId, VmId};
use proto::status::Code;
use proto::v1::{AdoptReply, Manifest};

use super::Api;
use crate::abreast::abreast;
use crate::bucket::{
    Bucket, JournalObject, Object, VMS, checkpoint_of, checkpoints_prefix, generation_folder, journal_object,
    journals_prefix, key_object, vm_prefix,
};
use crate::failure::Failure;
use crate::ingest::manifest::{entry, pack_key, packs};
use crate::ingest::read::Reader;
use crate::journal::Journals;
use crate::journal::segment::Tape;
use crate::ledger::event::Event;
use crate::ledger::recording::Recording;
use crate::ledger::state::State;
use crate::saga::report::record;
use crate::tls::Identity;

/// Manifests that are read, and VMs that are looked at, at a time.
const READS_MAX: usize = 16;
/// Packs that are copied at a time.
const COPIES_MAX: usize = 4;

impl Api {
    /// Takes in what the ledger does not know of a VM (`name`: its name or id, or the id of a checkpoint), or of all. What
    /// `from` names is this controller's bucket, or another one, whose newest checkpoints are copied into this one first.
    ///
    /// # Errors
    /// The buckets' and the ledger's.
    pub(super) async fn adopt(&self, operator: &Identity, from: &str, name: &str) -> Result<AdoptReply, Failure> {
        if !from.is_empty() && plain(from) != plain(&self.bucket_url) {
            let brought = bring(&self.reader, from, name).await?;
            tracing::info!(%operator, from, packs = brought, "checkpoints are copied from another bucket");
        }
        let state = self.ledger.state();
        let mut reply = AdoptReply::default();
        let mut found = Vec::new();
        for vm in wanted(&self.reader, &state, name).await? {
            let unknown: Vec<String> = vm.manifests.iter().filter(|key| !knows(&state, key)).cloned().collect();
            let read = abreast(READS_MAX, unknown, |key| {
                let reader = self.reader.clone();
                async move { readable(reader.manifest(&key).await.map(|opened| entry(opened.manifest, key, 0))) }
            });
            let mut name = state.name_of(&vm.id).to_owned();
            for read in read.await? {
                match read {
                    // How long the object is was not asked.
                    Ok(entry) => {
                        name.clone_from(&entry.vm);
                        found.push(entry);
                    }
                    Err(problem) => reply.problems.push(problem),
                }
            }
            if !name.is_empty() {
                self.find_recordings(operator, &vm.id, &name).await?;
            }
            // Whoever had it may have written in generations of which no checkpoint is left.
            let offered = state.generations.get(&name).copied().unwrap_or(0);
            if let Some(generation) = vm.generation.filter(|generation| *generation > offered && !name.is_empty()) {
                let event = Event::GenerationSeen { vm: name, generation };
                self.ledger.append(&operator.to_string(), event).await?;
            }
        }
        found.sort_by_key(|entry| (entry.generation, entry.created_unix_ms));
        for entry in found {
            reply.adopted.push(record(&entry));
            self.ledger.append(&operator.to_string(), Event::CheckpointFound { entry: Box::new(entry) }).await?;
        }
        Ok(reply)
    }

    /// Takes the recordings of a VM into the ledger that it does not know. None of them goes on: whoever recorded is gone.
    async fn find_recordings(&self, operator: &Identity, vm_id: &str, vm: &str) -> Result<(), Failure> {
        let Ok(id) = vm_id.parse::<VmId>() else { return Ok(()) };
        for folder in self.reader.bucket.list_dirs(&journals_prefix(vm_id)).await? {
            let Ok(recording) = folder.parse::<RecordingId>() else { continue };
            if self.ledger.state().recordings.contains_key(&folder) {
                continue;
            }
            let tape = self.journals.tape(id, recording).await?;
            if let Some(entry) = found_recording(vm, vm_id, folder, &tape) {
                self.ledger.append(&operator.to_string(), Event::RecordingFound { entry: Box::new(entry) }).await?;
            }
        }
        Ok(())
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

/// A recording as its blocks tell it; none if there are none.
fn found_recording(vm: &str, vm_id: &str, id: String, tape: &Tape) -> Option<Recording> {
    let (first, last) = (tape.segments.first()?, tape.segments.last()?);
    let ended = if last.ended.is_empty() { "it was found in the bucket: who recorded it is gone" } else { &last.ended };
    Some(Recording {
        id,
        vm: vm.to_owned(),
        vm_id: vm_id.to_owned(),
        started_unix_ms: first.start_ns / 1_000_000,
        full: 0,
        ended: ended.to_owned(),
        ended_unix_ms: last.end_ns / 1_000_000,
    })
}

/// Copies what was recorded from a checkpoint on, the oldest first, so that what is cut short is a shorter recording.
async fn bring_recording(ours: &Reader, theirs: &Reader, vm_id: &str, manifest: &Manifest) -> Result<(), Failure> {
    let state = manifest.digest.clone().unwrap_or_default().state;
    let Ok(vm) = vm_id.parse::<VmId>() else { return Ok(()) };
    for folder in theirs.bucket.list_dirs(&journals_prefix(vm_id)).await? {
        let Ok(recording) = folder.parse::<RecordingId>() else { continue };
        let shelf = Journals::new(theirs.clone()).shelf(vm, recording);
        let tape = shelf.tape().await?;
        let Some(from) = tape.segments.iter().find(|segment| segment.begins_with(&state)) else { continue };
        let there = ours.bucket.list(&shelf.prefix()).await?;
        for key in theirs.bucket.list(&shelf.prefix()).await? {
            let wanted = match journal_object(&key) {
                Some(JournalObject::Blocks(first) | JournalObject::Index(first)) => first >= from.first,
                None => false,
            };
            if wanted && !there.contains(&key) {
                ours.bucket.put(&key, theirs.bucket.get(&key).await?).await?;
            }
        }
    }
    Ok(())
}

/// What lies there of a VM.
struct Lying {
    id: String,
    manifests: Vec<String>,
    /// The newest generation in which something lies.
    generation: Option<u64>,
}

/// The VMs that are wanted. A name is sealed inside of manifests: to find it, one of each VM is read.
async fn wanted(reader: &Reader, state: &State, name: &str) -> Result<Vec<Lying>, Failure> {
    let known = state.vms.get(name).map(|vm| &vm.id);
    let known = known.or_else(|| state.checkpoints.values().find(|entry| entry.vm == name).map(|entry| &entry.vm_id));
    let mut ids = reader.bucket.list_dirs(VMS).await?;
    let by_id = known.or_else(|| ids.iter().find(|id| *id == name)).cloned();
    if let Some(id) = &by_id {
        ids.retain(|found| found == id);
    }
    let all = name.is_empty() || by_id.is_some();
    let looked = abreast(READS_MAX, ids, |id| {
        let (reader, name) = (reader.clone(), name.to_owned());
        async move {
            let mut objects = reader.bucket.list_objects(&checkpoints_prefix(&id)).await?;
            objects.retain(|object| checkpoint_of(&object.key).is_some());
            let is_named = |object: &Object| checkpoint_of(&object.key) == Some(name.as_str());
            let wanted = all || objects.iter().any(is_named) || named(&reader, &objects, &name).await?;
            if !wanted {
                return Ok(None);
            }
            let folders = reader.bucket.list_dirs(&vm_prefix(&id)).await?;
            let generation = folders.iter().filter_map(|folder| generation_folder(folder)).map(|g| g.0).max();
            Ok(Some(Lying { id, manifests: objects.into_iter().map(|object| object.key).collect(), generation }))
        }
    });
    Ok(looked.await?.into_iter().flatten().collect())
}

/// Copies what is wanted from another bucket, which is only read: of each VM the newest checkpoint that opens, or the one that
/// is named. The manifest comes last, so that what was cut short does not exist. How many packs were copied.
async fn bring(ours: &Reader, from: &str, name: &str) -> Result<usize, Failure> {
    // Their VM may have another key than ours of the same id: nothing of it is remembered.
    let theirs = Reader { bucket: Bucket::open(from, false)?, keys: ours.keys.apart() };
    let mut copied = 0;
    for vm in wanted(&theirs, &State::default(), name).await? {
        let read = abreast(READS_MAX, vm.manifests, |key| {
            let theirs = theirs.clone();
            async move { Ok(readable(theirs.manifest(&key).await)?.ok().map(|opened| (key, opened.manifest))) }
        });
        let found: Vec<_> = read.await?.into_iter().flatten().collect();
        let named = found.iter().find(|(_, manifest)| manifest.checkpoint == name);
        let newest = || found.iter().max_by_key(|(_, manifest)| (manifest.generation, manifest.created_unix_ms));
        let Some((key, manifest)) = named.or_else(newest) else { continue };
        let there = ours.bucket.list_objects(&vm_prefix(&vm.id)).await?;
        let there: BTreeMap<String, u64> = there.into_iter().map(|object| (object.key, object.bytes)).collect();
        let missing = packs(manifest).into_iter().map(|pack| (pack_key(manifest, &pack), pack));
        let missing: Vec<_> = missing.filter(|(key, pack)| there.get(key) != Some(&pack.bytes)).collect();
        copied += missing.len();
        let moved = abreast(COPIES_MAX, missing, |(key, pack)| {
            let (theirs, bucket) = (theirs.clone(), ours.bucket.clone());
            async move { Ok(bucket.put(&key, theirs.pack(&key, &pack).await?).await?) }
        });
        moved.await?;
        bring_recording(ours, &theirs, &vm.id, manifest).await?;
        for object in [key_object(&vm.id), key.clone()] {
            if !there.contains_key(&object) {
                ours.bucket.put(&object, theirs.bucket.get(&object).await?).await?;
            }
        }
    }
    Ok(copied)
}

/// Whether these manifests are of a VM of this name: asked of the newest that opens. One of which none opens may be it.
async fn named(reader: &Reader, objects: &[Object], name: &str) -> Result<bool, Failure> {
    let mut newest: Vec<&Object> = objects.iter().collect();
    newest.sort_by_key(|object| std::cmp::Reverse(object.modified_unix_ms));
    for object in newest {
        if let Ok(opened) = readable(reader.manifest(&object.key).await)? {
            return Ok(opened.manifest.vm_name == name);
        }
    }
    Ok(true)
}

/// What was read, or why this one cannot be; other failures are of the bucket as a whole.
fn readable<T>(read: Result<T, Failure>) -> Result<Result<T, String>, Failure> {
    match read {
        Ok(value) => Ok(Ok(value)),
        Err(failure) if matches!(failure.code, Code::Corrupt | Code::Denied) => Ok(Err(failure.to_string())),
        Err(failure) => Err(failure),
    }
}

fn knows(state: &State, key: &str) -> bool {
    checkpoint_of(key).is_some_and(|id| state.checkpoints.contains_key(id))
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
    use crate::bucket::file::tests::Scratch;
    use crate::ingest::tests::{VM, claim, full, reader};
    use crate::journal::chain::tests::{RECORDING, Recorder};

    #[test]
    fn only_manifests_are_checkpoints_and_urls_are_compared_without_their_slashes() {
        assert_eq!(checkpoint_of("vms/00/checkpoints/0011.manifest"), Some("0011"));
        assert_eq!(checkpoint_of("vms/00/g00000001/packs/0011"), None);
        assert_eq!(plain("file:///srv/bucket/"), plain("file:/srv/bucket"));
        assert_eq!(plain("s3://a/b?region=x"), plain("s3://a/b"));
        assert_ne!(plain("s3://a/b"), plain("s3://a/c"));
    }

    #[tokio::test]
    async fn no_more_is_looked_at_than_what_is_wanted() {
        let scratch = Scratch::new();
        let entry = full(&scratch, &[vec![(0, 0, 8, 1)]]).await;
        let other = "ee".repeat(16);
        let stranger = format!("{}{}.manifest", checkpoints_prefix(&other), "ab".repeat(8));
        scratch.bucket.put(&stranger, bytes::Bytes::from_static(b"nonsense")).await.unwrap();
        let reader = reader(&scratch.bucket);
        let state = State::default();
        let ids = async |name: &str| -> Vec<String> {
            wanted(&reader, &state, name).await.unwrap().into_iter().map(|lying| lying.id).collect()
        };
        let vm = VM.to_string();
        assert_eq!(ids("").await, [vm.clone(), other.clone()]);
        // What does not open may be of any name.
        assert_eq!(ids("vm1").await, [vm.clone(), other.clone()]);
        assert_eq!(ids("vm2").await, std::slice::from_ref(&other));
        scratch.bucket.delete(&stranger).await.unwrap();
        assert_eq!(ids("vm2").await, [""; 0]);
        for name in ["vm1", &vm, &entry.id] {
            let lying = wanted(&reader, &state, name).await.unwrap();
            assert_eq!((lying.len(), lying[0].manifests.len(), lying[0].generation), (1, 1, Some(3)), "{name}");
        }
    }

    #[tokio::test]
    async fn what_another_bucket_has_is_copied_whole_and_once() {
        let (there, here) = (Scratch::new(), Scratch::new());
        let entry = full(&there, &[vec![(0, 0, 256, 1), (1, 2, 3, 4)]]).await;
        let (ours, from) = (reader(&here.bucket), format!("file:{}", there.folder.display()));
        assert_eq!(bring(&ours, &from, "nobody").await.unwrap(), 0);
        assert_eq!(bring(&ours, &from, "vm1").await.unwrap(), entry.pack_keys.len());
        let opened = ours.manifest(&entry.manifest_key).await.unwrap();
        ours.verify(&opened, |_, _| ()).await.unwrap();
        assert_eq!(bring(&ours, &from, &entry.id).await.unwrap(), 0);
        // What is damaged there does not become a checkpoint here.
        let (third, path) = (Scratch::new(), there.folder.join(&entry.pack_keys[0]));
        std::fs::write(&path, b"short").unwrap();
        let failure = bring(&reader(&third.bucket), &from, "").await.unwrap_err();
        assert!(failure.code == Code::Corrupt && failure.message.contains(&entry.pack_keys[0]), "{failure}");
        assert!(third.bucket.get(&entry.manifest_key).await.is_err());
    }

    #[tokio::test]
    async fn what_was_recorded_from_the_newest_checkpoint_on_is_found_there_and_copied() {
        let (there, here) = (Scratch::new(), Scratch::new());
        let entry = full(&there, &[vec![(0, 0, 8, 1)]]).await;
        let (theirs, ours) = (reader(&there.bucket), reader(&here.bucket));
        let mut recorder = Recorder::new(RECORDING);
        let mut frames = vec![recorder.cut(1), recorder.block()];
        frames.extend([recorder.cut_of(entry.digest.state.clone().try_into().unwrap()), recorder.block()]);
        frames.extend([recorder.cut(3), recorder.block()]);
        let journals = Journals::new(theirs.clone());
        journals.append(VM, RECORDING, &claim("theirs", 3), frames).await.unwrap();
        let tape = journals.tape(VM, RECORDING).await.unwrap();
        let found = found_recording("vm1", &VM.to_string(), "ab".repeat(16), &tape).unwrap();
        assert_eq!(
            found.ended_unix_ms - found.started_unix_ms,
            7000,
            "six blocks of a second, the first of which lasted two"
        );
        assert!(found.ended.contains("found in the bucket"));
        assert!(found_recording("vm1", "", String::new(), &Tape::default()).is_none());
        bring(&ours, &format!("file:{}", there.folder.display()), "").await.unwrap();
        let tape = Journals::new(ours).tape(VM, RECORDING).await.unwrap();
        assert_eq!(tape.segments.iter().map(|segment| segment.first).collect::<Vec<_>>(), [2, 4]);
        assert!(tape.segments[0].begins_with(&entry.digest.state) && tape.problems.is_empty());
    }
}

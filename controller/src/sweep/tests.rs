//! Promises of sweeping: what some checkpoint needs is never removed, whoever made it and wherever a sweep is killed; what
//! none needs goes; and checkpoints are the same after a repacking as before it.

use std::collections::{BTreeMap, BTreeSet};

use proto::ids::Generation;
use proto::status::Code;
use proto::v1::MachineDigest;

use super::*;
use crate::bucket::file::tests::Scratch;
use crate::bucket::{journals_prefix, pack_key, vm_prefix};
use crate::ingest::manifest;
use crate::ingest::tests::{Contents, VM, claim, contents_of, full, increment, reader};
use crate::journal::chain::tests::{RECORDING, Recorder};
use crate::ledger::event::CheckpointEntry;

/// Runs of (space, first page, pages, fill).
type Runs = Vec<(u16, u64, u32, u8)>;

/// A bucket with a history of checkpoints that each build on the one before.
struct History {
    scratch: Scratch,
    entries: Vec<CheckpointEntry>,
    made: u8,
    contents: Contents,
}

impl History {
    async fn new(first: Runs) -> History {
        let scratch = Scratch::new();
        claim("ours", 3).make(&scratch.bucket).await.unwrap();
        let entry = full(&scratch, std::slice::from_ref(&first)).await;
        History { scratch, entries: vec![entry], made: 1, contents: contents_of(&[first]) }
    }

    async fn then(&mut self, runs: Runs) {
        self.contents.extend(contents_of(std::slice::from_ref(&runs)));
        self.made += 1;
        let entry = increment(&self.scratch, self.made, self.entries.last().unwrap(), &runs, &self.contents).await;
        self.entries.push(entry);
    }

    async fn removed(&mut self, at: usize) {
        let entry = self.entries.remove(at);
        self.scratch.bucket.delete(&entry.manifest_key).await.unwrap();
    }

    fn request(&self, live_percent_min: u32) -> Request {
        Request {
            claim: claim("ours", 3),
            may_write: true,
            known: self.entries.iter().map(|entry| entry.manifest_key.clone()).collect(),
            used: self.entries.iter().flat_map(|entry| entry.pack_keys.iter().cloned()).collect(),
            damaged: BTreeSet::new(),
            live_percent_min,
            dry_run: false,
        }
    }

    async fn sweep(&self, request: &Request) -> Result<Swept, Failure> {
        Sweeper::default().sweep(&reader(&self.scratch.bucket), request, |_| ()).await
    }

    /// Every checkpoint is whole, and is what it was.
    async fn whole(&self, at: &str) {
        let digests: Vec<MachineDigest> = self.entries.iter().map(|entry| entry.digest.clone()).collect();
        for (entry, digest) in self.entries.iter().zip(digests) {
            let reader = reader(&self.scratch.bucket);
            let opened = reader.manifest(&entry.manifest_key).await.unwrap();
            assert_eq!(opened.manifest.digest, Some(digest), "{at}");
            let found = reader.examine(&opened, |_, _| ()).await.unwrap();
            assert!(found.is_empty(), "{at}: checkpoint {}: {found:?}", entry.id);
        }
    }

    async fn packs(&self) -> BTreeMap<String, u64> {
        let objects = self.scratch.bucket.list_objects(&vm_prefix(&VM.to_string())).await.unwrap();
        objects.into_iter().filter(|o| o.key.contains("/packs/")).map(|o| (o.key, o.bytes)).collect()
    }

    /// What the manifests name.
    async fn named(&self) -> BTreeSet<String> {
        let mut named = BTreeSet::new();
        for entry in &self.entries {
            let opened = reader(&self.scratch.bucket).manifest(&entry.manifest_key).await.unwrap();
            named.extend(manifest::pack_keys(&opened.manifest));
        }
        named
    }
}

/// One large pack of which later checkpoints leave little.
async fn mostly_dead() -> History {
    let fills = |fill: u8| (0..10).map(|at| (0, at * 100, 100, fill.wrapping_add(at as u8) | 1)).collect::<Runs>();
    let mut history = History::new(fills(1)).await;
    history.then((0..9).map(|at| (0, at * 100, 100, 200 + at as u8)).collect()).await;
    history.then(vec![(0, 950, 20, 7), (0, 3, 1, 9), (1, 5, 2, 6)]).await;
    history.then(vec![(0, 10, 1, 0), (0, 990, 5, 8)]).await;
    // The first is gone: of its packs pages 900 to 999 are needed in the second, fewer later.
    history.removed(0).await;
    history
}

#[tokio::test]
async fn what_nobody_needs_goes_and_nothing_else() {
    let mut history = History::new(vec![(0, 0, 256, 1), (0, 300, 10, 2)]).await;
    history.then(vec![(0, 0, 256, 5), (0, 300, 10, 3)]).await;
    let before = history.packs().await;
    let swept = history.sweep(&history.request(0)).await.unwrap();
    assert_eq!((swept.removed, swept.left, swept.packs), (0, 0, before.len() as u64));
    let orphan = pack_key(&VM.to_string(), Generation(3), proto::ids::PackId([9; 32]));
    history.scratch.bucket.put(&orphan, bytes::Bytes::from_static(b"left by a checkpoint that failed")).await.unwrap();
    let rehearsed = history.sweep(&Request { dry_run: true, ..history.request(0) }).await.unwrap();
    assert_eq!((rehearsed.removed, history.packs().await.len()), (1, before.len() + 1));
    history.sweep(&history.request(0)).await.unwrap();
    assert_eq!(history.packs().await, before);
    history.removed(0).await;
    let swept = history.sweep(&history.request(0)).await.unwrap();
    assert!(swept.removed > 0, "{swept:?}");
    assert_eq!(history.packs().await.into_keys().collect::<BTreeSet<_>>(), history.named().await);
    history.whole("swept").await;
}

#[tokio::test]
async fn what_a_checkpoint_needs_that_the_ledger_does_not_know_stays() {
    let mut history = History::new(vec![(0, 0, 256, 1)]).await;
    history.then(vec![(0, 3, 10, 3)]).await;
    let forgetful = Request { known: BTreeSet::new(), used: BTreeSet::new(), ..history.request(30) };
    assert_eq!(history.sweep(&forgetful).await.unwrap().removed, 0);
    history.whole("forgotten").await;
    // One that cannot be read might need anything.
    let stranger = format!("{}checkpoints/{}.manifest", vm_prefix(&VM.to_string()), "ab".repeat(8));
    history.scratch.bucket.put(&stranger, bytes::Bytes::from_static(b"nonsense")).await.unwrap();
    let orphan = pack_key(&VM.to_string(), Generation(3), proto::ids::PackId([9; 32]));
    history.scratch.bucket.put(&orphan, bytes::Bytes::from_static(b"x")).await.unwrap();
    let failure = history.sweep(&history.request(0)).await.unwrap_err();
    assert!(failure.code == Code::Corrupt && failure.message.contains(&stranger), "{failure}");
    assert!(history.packs().await.contains_key(&orphan));
}

#[tokio::test]
async fn generations_of_others_wait_an_hour_newer_ones_for_ever_and_who_lost_the_vm_sweeps_nothing() {
    let history = History::new(vec![(0, 0, 256, 1)]).await;
    let bucket = &history.scratch.bucket;
    let id = VM.to_string();
    let orphans = [2, 3, 4].map(|generation| pack_key(&id, Generation(generation), proto::ids::PackId([9; 32])));
    for orphan in &orphans {
        bucket.put(orphan, bytes::Bytes::from_static(b"x")).await.unwrap();
    }
    let ground = Marks::default().survey(bucket, &id).await.unwrap();
    let pack = |key: &str| ground.packs.iter().find(|pack| pack.key == key).unwrap();
    let at = |key: &str, later_ms: u64| {
        removable(pack(key), &ground, &claim("ours", 3), pack(key).modified_unix_ms + later_ms)
    };
    assert_eq!(orphans.each_ref().map(|key| at(key, 1000)), [false, true, false]);
    assert_eq!(orphans.each_ref().map(|key| at(key, GRACE_MS)), [true, true, false]);
    // A generation before that we have claimed ourselves need not wait.
    let owner = proto::v1::Owner { vm_id: id.clone(), generation: 2, cluster: "ours".into(), ..Default::default() };
    let owner = proto::frame::encode_message(proto::frame::Kind::Envelope, &owner);
    bucket.put(&crate::bucket::owner_key(&id, Generation(2)), owner.into()).await.unwrap();
    let ground = Marks::default().survey(bucket, &id).await.unwrap();
    assert!(removable(&ground.packs[0], &ground, &claim("ours", 3), 0), "{:?}", ground.packs[0]);
    Claim { since: Generation(4), ..claim("theirs", 4) }.make(bucket).await.unwrap();
    let swept = history.sweep(&history.request(30)).await.unwrap();
    assert!(swept.removed == 0 && swept.note.contains("controller/theirs"), "{swept:?}");
    assert_eq!(history.packs().await.len(), 2 + 3);
}

#[tokio::test]
async fn a_pack_that_is_mostly_dead_is_rewritten_and_all_checkpoints_are_what_they_were() {
    let history = mostly_dead().await;
    history.whole("before").await;
    let before = history.packs().await;
    let rehearsed = history.sweep(&Request { dry_run: true, ..history.request(30) }).await.unwrap();
    assert!(rehearsed.repacked > 0 && history.packs().await == before, "{rehearsed:?}");
    let swept = history.sweep(&history.request(30)).await.unwrap();
    assert!(swept.repacked > 0 && swept.written_bytes > 0, "{swept:?}");
    history.whole("after").await;
    let after = history.packs().await;
    assert_eq!(after.keys().cloned().collect::<BTreeSet<_>>(), history.named().await, "old packs are gone");
    for changed in &swept.changed {
        let opened = reader(&history.scratch.bucket);
        let entry = history.entries.iter().find(|entry| entry.id == changed.checkpoint).unwrap();
        let opened = opened.manifest(&entry.manifest_key).await.unwrap();
        let named: BTreeSet<String> = manifest::pack_keys(&opened.manifest).into_iter().collect();
        assert_eq!(named, changed.pack_keys.iter().cloned().collect(), "what the ledger is told");
    }
    // There is nothing left to gain.
    let again = history.sweep(&history.request(30)).await.unwrap();
    assert_eq!((again.repacked, again.removed), (0, 0));
}

#[tokio::test]
async fn a_checkpoint_builds_on_one_that_was_repacked() {
    let mut history = mostly_dead().await;
    history.sweep(&history.request(30)).await.unwrap();
    history.then(vec![(0, 5, 3, 77), (0, 995, 2, 0)]).await;
    history.whole("built on").await;
    history.removed(0).await;
    history.sweep(&history.request(30)).await.unwrap();
    history.whole("and swept again").await;
}

#[tokio::test]
async fn killed_after_any_change_every_checkpoint_is_whole_and_the_next_sweep_ends_it() {
    let mut changes = 0;
    loop {
        let history = mostly_dead().await;
        let dying = history.scratch.dying(changes);
        let ended = Sweeper::default().sweep(&reader(&dying), &history.request(30), |_| ()).await;
        history.whole(&format!("killed after {changes} changes")).await;
        // Whoever comes next has the ledger of before.
        history.sweep(&history.request(30)).await.unwrap();
        let left = history.sweep(&Request { used: BTreeSet::new(), ..history.request(0) }).await.unwrap();
        assert_eq!(left.left, 0);
        history.whole(&format!("killed after {changes} changes, and swept")).await;
        assert_eq!(history.packs().await.into_keys().collect::<BTreeSet<_>>(), history.named().await);
        if ended.is_ok() {
            break;
        }
        changes += 1;
    }
    assert!(changes > 8, "two packs, three manifests and their old packs are changes: {changes}");
}

#[tokio::test]
async fn a_damaged_pack_is_not_rewritten_and_names_itself() {
    let (mut named, mut tries) = (0, 0);
    // Names of packs, and so their order, differ from history to history: not every one that is damaged is read.
    while named < 2 {
        assert!(tries < 100, "no damaged pack is read");
        let history = mostly_dead().await;
        let keys: Vec<String> = history.packs().await.into_keys().collect();
        let key = keys[tries % keys.len()].clone();
        tries += 1;
        let path = history.scratch.folder.join(&key);
        let sound = std::fs::read(&path).unwrap();
        let mut bytes = sound.clone();
        bytes[200] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        if let Err(failure) = history.sweep(&history.request(30)).await {
            assert_eq!((failure.code, &failure.object), (Code::Corrupt, &key), "{failure}");
            named += 1;
            // Once that is known, the pack is left as it is.
            let knowing = Request { damaged: [key.clone()].into(), ..history.request(30) };
            let _ = history.sweep(&knowing).await;
            assert!(path.exists());
        }
        if path.exists() {
            std::fs::write(&path, sound).unwrap();
        }
        history.whole(&key).await;
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(12))]

    /// Any history, any of its checkpoints removed, repacked at any threshold.
    #[test]
    fn any_history_is_the_same_after_a_repacking(
        rounds in proptest::collection::vec(
            proptest::collection::vec((0..2u16, 0..18u64, 1..9u32, 0..5u8), 1..6), 2..7),
        removed in proptest::collection::vec(0..7usize, 0..4),
        percent in 1..100u32,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let fits = |runs: &Vec<(u16, u64, u32, u8)>| -> Runs {
                let mut taken = BTreeSet::new();
                runs.iter().filter(|(space, first, count, _)| {
                    let pages: Vec<_> = (*first..first + u64::from(*count)).map(|page| (*space, page)).collect();
                    let fits = first + u64::from(*count) <= 20 && pages.iter().all(|page| !taken.contains(page));
                    if fits { taken.extend(pages); }
                    fits
                }).copied().collect()
            };
            let mut history = History::new(fits(&rounds[0])).await;
            for runs in &rounds[1..] {
                history.then(fits(runs)).await;
            }
            for at in removed {
                if history.entries.len() > 1 {
                    let at = at % history.entries.len();
                    history.removed(at).await;
                }
            }
            history.sweep(&history.request(percent)).await.unwrap();
            history.whole("repacked").await;
            assert_eq!(history.packs().await.into_keys().collect::<BTreeSet<_>>(), history.named().await);
        });
    }
}

#[tokio::test]
async fn what_was_recorded_is_none_of_a_sweeps_business() {
    let history = mostly_dead().await;
    let journals = crate::journal::Journals::new(reader(&history.scratch.bucket));
    let mut recorder = Recorder::new(RECORDING);
    let frames: Vec<_> = (0..6).map(|n| if n % 3 == 0 { recorder.cut(n) } else { recorder.block() }).collect();
    journals.append(VM, RECORDING, &claim("ours", 3), frames).await.unwrap();
    journals.tidy_now(VM, RECORDING).await.unwrap();
    let recorded = async || history.scratch.bucket.list_objects(&journals_prefix(&VM.to_string())).await.unwrap();
    let before = recorded().await;
    assert_eq!(before.len(), 3);
    let swept = history.sweep(&history.request(90)).await.unwrap();
    assert!(swept.repacked > 0, "{swept:?}");
    assert_eq!(recorded().await, before);
}

//! Promises of recordings in the bucket: what is answered is durable, what is hostile is refused, and whatever dies in the
//! middle leaves a chain that is read back whole.

use bytes::Bytes;
use proto::v1::JournalBlock;

use super::chain::tests::{RECORDING, Recorder};
use super::*;
use crate::bucket::Bucket;
use crate::bucket::file::tests::Scratch;
use crate::ingest::tests::{VM, claim};
use crate::keys::Keys;

/// One ring of keys for all controllers of a test.
struct Cluster {
    scratch: Scratch,
    keys: Keys,
}

impl Cluster {
    fn new() -> Cluster {
        Cluster { scratch: Scratch::new(), keys: Keys::fixed() }
    }

    /// A controller that has just started.
    fn controller(&self) -> Journals {
        self.on(self.scratch.bucket.clone())
    }

    fn on(&self, bucket: Bucket) -> Journals {
        Journals::new(Reader { bucket, keys: self.keys.clone() })
    }

    async fn names(&self) -> Vec<String> {
        let prefix = crate::bucket::journal_prefix(&VM.to_string(), RECORDING);
        let keys = self.scratch.bucket.list(&prefix).await.unwrap();
        keys.iter().map(|key| key[prefix.len()..].trim_start_matches('0').to_owned()).collect()
    }
}

fn below(next: u64) -> Appended {
    Appended::Below { next, ended: String::new() }
}

async fn append(journals: &Journals, frames: &[Bytes]) -> Appended {
    journals.append(VM, RECORDING, &claim("ours", 3), frames.to_vec()).await.unwrap()
}

async fn sequences(journals: &Journals, first: u64, end: u64) -> Vec<u64> {
    let (mut blocks, mut found) = (journals.shelf(VM, RECORDING).blocks(first, end), Vec::new());
    while let Some(block) = blocks.next().await.unwrap() {
        found.push(block.message.sequence);
    }
    found
}

/// Segments of four blocks each.
fn recorded(blocks: u8) -> Vec<Bytes> {
    let mut recorder = Recorder::new(RECORDING);
    (0..blocks).map(|n| if n % 4 == 0 { recorder.cut(n / 4) } else { recorder.block() }).collect()
}

#[tokio::test]
async fn what_is_answered_lies_in_the_bucket_and_the_next_controller_goes_on() {
    let cluster = Cluster::new();
    let (first, frames) = (cluster.controller(), recorded(10));
    assert_eq!(append(&first, &frames[..2]).await, below(2));
    assert_eq!(append(&first, &frames[..2]).await, below(2));
    assert_eq!(append(&first, &frames[1..3]).await, below(3));
    let second = cluster.controller();
    assert_eq!(append(&second, &frames[..6]).await, below(6));
    // Whatever the first one remembers, it finds out.
    assert_eq!(append(&first, &frames[2..8]).await, below(8));
    assert_eq!(append(&second, &frames[4..10]).await, below(10));
    let third = cluster.controller();
    assert_eq!(third.head(VM, RECORDING).await.next, 10);
    assert_eq!(sequences(&third, 0, 10).await, (0..10).collect::<Vec<_>>());
    assert_eq!(sequences(&third, 5, 9).await, (5..9).collect::<Vec<_>>());
    // What lies there is sealed.
    let stored = cluster.scratch.bucket.get(&third.shelf(VM, RECORDING).key(0)).await.unwrap();
    assert!(proto::frame::decode_message::<JournalBlock>(proto::frame::Kind::Journal, &stored).is_err());
}

#[tokio::test]
async fn a_gap_is_refused_and_nothing_of_it_is_stored() {
    let cluster = Cluster::new();
    let (journals, frames) = (cluster.controller(), recorded(10));
    append(&journals, &frames[..3]).await;
    let before = cluster.names().await;
    let gap = Appended::Refused("a gap after block 2: block 4 came".into());
    assert_eq!(append(&journals, &frames[4..]).await, gap);
    assert_eq!(
        append(&journals, &[frames[3].clone(), frames[5].clone()]).await,
        Appended::Refused("a gap after block 3: block 5 came".into())
    );
    let flipped = |at: usize| {
        let mut bytes = frames[at].to_vec();
        bytes[70] ^= 1;
        Bytes::from(bytes)
    };
    assert!(matches!(append(&journals, &[flipped(3)]).await, Appended::Refused(_)));
    assert_eq!(cluster.names().await, before);
    assert_eq!(append(&journals, &frames[3..]).await, below(10));
}

#[tokio::test]
async fn another_content_under_a_name_is_refused_and_the_same_is_not() {
    let cluster = Cluster::new();
    let frames = recorded(8);
    // A controller that has put blocks and died before it could answer.
    append(&cluster.controller(), &frames[..3]).await;
    let journals = cluster.controller();
    append(&journals, &frames[..3]).await;
    append(&cluster.controller(), &frames[..5]).await;
    assert_eq!(append(&journals, &frames[3..4]).await, below(5), "it is seen that the bucket has more");
    let mut fork = Recorder::new(RECORDING);
    let theirs: Vec<Bytes> = (0..8).map(|n| if n == 0 { fork.cut(77) } else { fork.block() }).collect();
    assert!(matches!(append(&journals, &theirs[5..]).await, Appended::Refused(_)));
    assert!(matches!(append(&cluster.controller(), &theirs).await, Appended::Refused(_)));
    // Nonsense where blocks should go.
    cluster.scratch.bucket.put(&journals.shelf(VM, RECORDING).key(5), Bytes::from_static(b"x")).await.unwrap();
    let refused = append(&journals, &frames[5..]).await;
    assert!(matches!(&refused, Appended::Refused(why) if why.contains("holds something else")), "{refused:?}");
    let refused = append(&cluster.controller(), &frames[5..]).await;
    assert!(matches!(&refused, Appended::Refused(why) if why.contains("cannot be continued")), "{refused:?}");
}

#[tokio::test]
async fn another_cluster_that_claims_the_vm_is_not_written_over() {
    let cluster = Cluster::new();
    claim("theirs", 4).make(&cluster.scratch.bucket).await.unwrap();
    let failure = cluster.controller().append(VM, RECORDING, &claim("ours", 3), recorded(2)).await.unwrap_err();
    assert_eq!(failure.code, Code::Conflict);
    assert_eq!(cluster.names().await, [""; 0]);
}

/// Appends blocks one by one without letting anything be merged.
async fn scattered(cluster: &Cluster, frames: &[Bytes]) {
    let journals = cluster.controller();
    let entry = journals.entry(VM, RECORDING);
    let upkeep = entry.upkeep.lock().await;
    for frame in frames {
        append(&journals, std::slice::from_ref(frame)).await;
    }
    // Whoever waits to merge waits until the test's runtime ends.
    std::mem::forget(upkeep);
}

#[tokio::test]
async fn a_segment_that_is_complete_becomes_one_object_with_an_index() {
    let cluster = Cluster::new();
    scattered(&cluster, &recorded(10)).await;
    assert_eq!(cluster.names().await.len(), 10);
    let journals = cluster.controller();
    journals.tidy_now(VM, RECORDING).await.unwrap();
    assert_eq!(cluster.names().await, ["", ".index", "4", "4.index", "8", "9"]);
    assert_eq!(sequences(&journals, 0, 10).await, (0..10).collect::<Vec<_>>());
    assert_eq!(sequences(&journals, 6, 10).await, (6..10).collect::<Vec<_>>());
    let (tape, read_back) =
        (journals.tape(VM, RECORDING).await.unwrap(), cluster.controller().tape(VM, RECORDING).await.unwrap());
    assert_eq!(tape, read_back);
    let starts: Vec<_> =
        tape.segments.iter().map(|segment| (segment.first, segment.indexed, segment.parts.len())).collect();
    assert_eq!(starts, [(0, true, 1), (4, true, 1), (8, false, 2)]);
    assert_eq!(tape.segments[1].start_ns, tape.segments[0].end_ns);
    assert!(tape.segments[2].begins_with(&[2; 32]));
    // The recording ends: its last segment is complete, too.
    let mut recorder = Recorder::new(RECORDING);
    (0..10).for_each(|n| drop(if n % 4 == 0 { recorder.cut(n / 4) } else { recorder.block() }));
    let ended = Appended::Below { next: 11, ended: "stopped".into() };
    assert_eq!(append(&journals, &[recorder.last()]).await, ended);
    journals.tidy_now(VM, RECORDING).await.unwrap();
    assert_eq!(cluster.names().await, ["", ".index", "4", "4.index", "8", "8.index"]);
    assert!(
        matches!(append(&journals, &[recorder.block()]).await, Appended::Refused(why) if why.contains("end of the recording"))
    );
}

#[tokio::test]
async fn whatever_dies_while_merging_leaves_all_blocks_and_is_done_again() {
    for changes in 0.. {
        let cluster = Cluster::new();
        scattered(&cluster, &recorded(10)).await;
        let done = cluster.on(cluster.scratch.dying(changes)).tidy_now(VM, RECORDING).await.is_ok();
        let next = cluster.controller();
        assert_eq!(sequences(&next, 0, 10).await, (0..10).collect::<Vec<_>>(), "after {changes} changes");
        let tape = next.tape(VM, RECORDING).await.unwrap();
        assert_eq!((tape.problems.len(), tape.head().next), (0, 10), "after {changes} changes: {tape:?}");
        next.tidy_now(VM, RECORDING).await.unwrap();
        assert_eq!(cluster.names().await, ["", ".index", "4", "4.index", "8", "9"], "after {changes} changes");
        assert_eq!(sequences(&next, 0, 10).await, (0..10).collect::<Vec<_>>());
        assert_eq!(append(&next, &recorded(12)[9..]).await, below(12));
        if done {
            assert!(changes > 10, "the bucket never failed");
            return;
        }
    }
}

#[tokio::test]
async fn segments_go_up_to_the_first_checkpoint_that_is_kept_and_no_further() {
    let cluster = Cluster::new();
    let journals = cluster.controller();
    append(&journals, &recorded(18)).await;
    let firsts = async |journals: &Journals| -> Vec<u64> {
        journals.tape(VM, RECORDING).await.unwrap().segments.iter().map(|segment| segment.first).collect()
    };
    assert_eq!(firsts(&journals).await, [0, 4, 8, 12, 16]);
    let prune = async |kept: &[u8], goes_on: bool| {
        let kept: Vec<Vec<u8>> = kept.iter().map(|digest| vec![*digest; 32]).collect();
        journals.prune(VM, RECORDING, &kept, goes_on).await.unwrap()
    };
    assert_eq!(prune(&[0, 2], true).await, 0, "the oldest has its checkpoint");
    assert_eq!(prune(&[2, 3], true).await, 2);
    assert_eq!(firsts(&journals).await, [8, 12, 16]);
    assert_eq!(firsts(&cluster.controller()).await, [8, 12, 16]);
    assert_eq!(sequences(&journals, 8, 18).await, (8..18).collect::<Vec<_>>());
    assert_eq!(prune(&[2], true).await, 0, "segments behind a checkpoint stay, whether they have one or not");
    assert_eq!(append(&journals, &recorded(20)[18..]).await, below(20));
    assert_eq!(prune(&[], true).await, 2, "what is being recorded stays");
    let successor = cluster.controller();
    assert_eq!(append(&successor, &recorded(22)[18..]).await, below(22));
    // What it merges behind the answer would put back what is removed here.
    successor.tidy_now(VM, RECORDING).await.unwrap();
    journals.remove(VM, RECORDING).await.unwrap();
    assert_eq!(cluster.names().await, [""; 0]);
}

#[tokio::test]
async fn whatever_dies_while_removing_leaves_the_rest_of_a_chain() {
    for changes in 0.. {
        let cluster = Cluster::new();
        scattered(&cluster, &recorded(10)).await;
        cluster.controller().tidy_now(VM, RECORDING).await.unwrap();
        let dying = cluster.on(cluster.scratch.dying(changes));
        let done = dying.prune(VM, RECORDING, &[vec![2; 32]], true).await.is_ok();
        let next = cluster.controller();
        let tape = next.tape(VM, RECORDING).await.unwrap();
        let from = tape.segments[0].first;
        assert_eq!(tape.problems, [""; 0], "after {changes} changes");
        assert_eq!(sequences(&next, from, 10).await, (from..10).collect::<Vec<_>>(), "after {changes} changes");
        next.prune(VM, RECORDING, &[vec![2; 32]], true).await.unwrap();
        assert_eq!(cluster.names().await, ["8", "9"]);
        if done {
            assert!(changes > 3, "the bucket never failed");
            return;
        }
    }
}

#[tokio::test]
async fn damage_is_named_and_what_lies_before_it_can_be_read() {
    let cluster = Cluster::new();
    scattered(&cluster, &recorded(10)).await;
    cluster.controller().tidy_now(VM, RECORDING).await.unwrap();
    let key = |first| cluster.controller().shelf(VM, RECORDING).key(first);
    let path = cluster.scratch.folder.join(key(4));
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let journals = cluster.controller();
    let mut blocks = journals.shelf(VM, RECORDING).blocks(0, 10);
    for _ in 0..4 {
        assert!(blocks.next().await.unwrap().is_some());
    }
    let failure = blocks.next().await.unwrap_err();
    assert!(failure.code == Code::Corrupt && failure.message.contains(&key(4)), "{failure}");
    std::fs::remove_file(&path).unwrap();
    let tape = cluster.controller().tape(VM, RECORDING).await.unwrap();
    assert!(tape.problems.iter().any(|problem| problem.contains(&key(4))), "{:?}", tape.problems);
    assert_eq!(tape.head().next, 10, "what is recorded now goes on");
}

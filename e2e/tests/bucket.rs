//! Buckets: one contract for directories and S3 servers, and what happens when a server fails. A real server (SeaweedFS) runs
//! for each test; without one, these tests say that they were skipped.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use controller::bucket::{Bucket, BucketError, PutNew};
use controller::failure::Failure;
use e2e::bucket::Weed;
use e2e::bucket::proxy::{Action, Proxy};
use e2e::cluster::{Cluster, wait};
use e2e::guest::{Program, REGION};
use proto::status::Code;
use tokio::task::JoinSet;

/// A guest of about 40 MiB that rewrites 8 MiB/s.
const BUSY: Program =
    Program { start: REGION, region_bytes: 16 << 20, pages_per_s: 2000, tick_ms: 20, tsc_hz: 1_000_000_000 };
const MIB: usize = 1 << 20;
/// Few and short tries, for tests that wait for them to end.
const HASTY: &str = "&attempts=3&timeout_ms=1500";

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test);
}

/// Bytes that no compression and no repetition makes smaller.
fn noise(seed: u64, length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes.into()
}

/// What every bucket does.
async fn contract(bucket: &Bucket) {
    bucket.check().await.unwrap();
    let put = async |key: &str, bytes: &'static [u8]| bucket.put(key, Bytes::from_static(bytes)).await.unwrap();
    put("vms/00/g1/one", b"0123456789").await;
    put("vms/00/two", b"x").await;
    put("vms/01/three", b"").await;
    put("other", b"y").await;
    put("vms/00/two", b"replaced").await;
    assert_eq!(&bucket.get("vms/00/two").await.unwrap()[..], b"replaced");
    assert_eq!(&bucket.get("vms/01/three").await.unwrap()[..], b"");
    assert_eq!(&bucket.get_range("vms/00/g1/one", 2, 3).await.unwrap()[..], b"234");
    assert_eq!(&bucket.get_range("vms/00/g1/one", 10, 0).await.unwrap()[..], b"");
    assert_eq!(bucket.get_range("vms/00/g1/one", 8, 2).await.unwrap().len(), 2);
    for (offset, length) in [(8, 3), (10, 1), (1_000, 1), (11, 0)] {
        let error = bucket.get_range("vms/00/g1/one", offset, length).await.unwrap_err();
        assert!(matches!(error, BucketError::Short { found: 10, .. }), "{offset} {length}: {error}");
    }
    for error in [bucket.get("vms/none").await.unwrap_err(), bucket.get_range("vms/none", 0, 1).await.unwrap_err()] {
        assert_eq!(error.to_string(), "the bucket has no vms/none");
    }
    assert_eq!(bucket.list("vms/").await.unwrap(), ["vms/00/g1/one", "vms/00/two", "vms/01/three"]);
    assert_eq!(bucket.list("vms/00/").await.unwrap(), ["vms/00/g1/one", "vms/00/two"]);
    assert_eq!(bucket.list("nothing/").await.unwrap(), [""; 0]);
    let objects = bucket.list_objects("vms/00/").await.unwrap();
    let now_ms = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    assert_eq!(objects.iter().map(|object| object.bytes).collect::<Vec<_>>(), [10, 8]);
    assert!(objects.iter().all(|object| object.modified_unix_ms.abs_diff(now_ms) < 600_000), "{objects:?}");
    assert_eq!(bucket.list_dirs("vms/").await.unwrap(), ["00", "01"]);
    assert!(bucket.list_dirs("").await.unwrap().contains(&"vms".to_owned()));
    assert_eq!(bucket.list_dirs("vms/00/g1/").await.unwrap(), [""; 0]);
    let new = async |key: &str, bytes: &'static [u8]| bucket.put_new(key, Bytes::from_static(bytes)).await.unwrap();
    assert_eq!(new("vms/00/owner", b"first").await, PutNew::Created);
    assert_eq!(new("vms/00/owner", b"second").await, PutNew::Exists);
    assert_eq!(&bucket.get("vms/00/owner").await.unwrap()[..], b"first");
    for key in bucket.list("").await.unwrap() {
        bucket.delete(&key).await.unwrap();
        bucket.delete(&key).await.unwrap();
    }
    assert_eq!(bucket.list("").await.unwrap(), [""; 0]);
    assert_eq!(new("vms/00/owner", b"again").await, PutNew::Created);
    bucket.delete("vms/00/owner").await.unwrap();
}

/// Of eight writers at a time, by way of these buckets in turn, exactly one is the one, and it is its object that is there.
async fn races(buckets: &[Bucket], rounds: usize) {
    for round in 0..rounds {
        let key = format!("races/{round}");
        let mut writers = JoinSet::new();
        for writer in 0..8 {
            let (bucket, key) = (buckets[writer % buckets.len()].clone(), key.clone());
            writers
                .spawn(async move { (writer, bucket.put_new(&key, format!("writer {writer}").into()).await.unwrap()) });
        }
        let ended = writers.join_all().await;
        let created: Vec<usize> =
            ended.iter().filter(|(_, new)| *new == PutNew::Created).map(|(writer, _)| *writer).collect();
        let there = buckets[0].get(&key).await.unwrap();
        assert_eq!(
            created.iter().map(|writer| format!("writer {writer}")).collect::<Vec<_>>(),
            [there],
            "round {round}"
        );
    }
}

/// More keys than a page of a list holds, and an object of several parts.
async fn many_and_large(bucket: &Bucket) {
    let mut writers = JoinSet::new();
    for worker in 0..8 {
        let bucket = bucket.clone();
        writers.spawn(async move {
            for number in (worker..1_100).step_by(8) {
                bucket.put(&format!("many/d{number:04}/x"), Bytes::from_static(b"1")).await.unwrap();
            }
        });
    }
    writers.join_all().await;
    let expected: Vec<String> = (0..1_100).map(|number| format!("many/d{number:04}/x")).collect();
    assert_eq!(bucket.list("many/").await.unwrap(), expected);
    assert_eq!(bucket.list_dirs("many/").await.unwrap().len(), 1_100);
    let large = noise(1, 40 * MIB + 12_345);
    bucket.put("large", large.clone()).await.unwrap();
    assert!(bucket.get("large").await.unwrap() == large);
    let part = bucket.get_range("large", 39 * MIB as u64, MIB).await.unwrap();
    assert!(part == large[39 * MIB..40 * MIB]);
    assert_eq!(bucket.list_objects("").await.unwrap()[0].bytes, large.len() as u64);
}

#[test]
fn a_directory_keeps_the_contract() {
    let folder = std::env::temp_dir().join(format!("godwit-contract-{}", std::process::id()));
    let bucket = Bucket::open(&format!("file:{}", folder.display()), true).unwrap();
    run(async {
        contract(&bucket).await;
        races(std::slice::from_ref(&bucket), 50).await;
        many_and_large(&bucket).await;
    });
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn an_s3_server_keeps_the_contract() {
    let Some(weed) = Weed::start() else { return };
    let bucket = Bucket::open(&weed.url("a/b"), true).unwrap();
    run(async {
        contract(&bucket).await;
        contract(&Bucket::open(&weed.url(""), true).unwrap()).await;
        races(std::slice::from_ref(&bucket), 20).await;
        many_and_large(&bucket).await;
    });
}

/// `GODWIT_S3_URL=s3://BUCKET/PREFIX?endpoint=...`: an empty place on any server; keys come from the environment or the URL.
#[test]
fn a_server_of_your_own_keeps_the_contract() {
    let Ok(url) = std::env::var("GODWIT_S3_URL") else {
        eprintln!("SKIPPED: GODWIT_S3_URL names no place on an S3 server");
        return;
    };
    let bucket = Bucket::open(&url, true).unwrap();
    run(async {
        races(std::slice::from_ref(&bucket), 10).await;
        for key in bucket.list("").await.unwrap() {
            bucket.delete(&key).await.unwrap();
        }
        contract(&bucket).await;
        many_and_large(&bucket).await;
        for key in bucket.list("").await.unwrap() {
            bucket.delete(&key).await.unwrap();
        }
    });
}

#[test]
fn on_a_server_without_conditions_one_writer_is_the_first_all_the_same() {
    let Some(weed) = Weed::start() else { return };
    let open = || Bucket::open(&(weed.url("claims") + "&if_none_match=false"), true).unwrap();
    // Two of them: as two controllers, they share nothing but the server.
    let buckets = [open(), open()];
    run(async {
        contract(&buckets[0]).await;
        races(&buckets, 5).await;
        assert_eq!(buckets[0].list("claims/").await.unwrap(), [""; 0]);
    });
}

#[test]
fn a_lost_answer_does_not_make_the_first_writer_a_second_one() {
    let Some(weed) = Weed::start() else { return };
    let lost = AtomicUsize::new(0);
    let proxy = Proxy::start(weed.s3(), move |seen| match seen.method.as_str() {
        "PUT" if seen.target.contains("owner") && lost.fetch_add(1, Ordering::SeqCst) == 0 => Action::CutAnswer(0),
        _ => Action::Pass,
    });
    let bucket = Bucket::open(&weed.url_at(proxy.address(), "lost"), true).unwrap();
    run(async {
        assert_eq!(bucket.put_new("owner", Bytes::from_static(b"me")).await.unwrap(), PutNew::Created);
        assert_eq!(proxy.count("PUT", "owner"), 2);
        assert_eq!(bucket.put_new("owner", Bytes::from_static(b"you")).await.unwrap(), PutNew::Exists);
        assert_eq!(&bucket.get("owner").await.unwrap()[..], b"me");
    });
}

#[test]
fn who_may_not_is_told_what_was_tried() {
    let Some(weed) = Weed::start() else { return };
    let (_, secret) = weed.keys();
    let failure = |url: String| async move {
        let error = Bucket::open(&url, true).unwrap().check().await.unwrap_err();
        let failure = Failure::from(error);
        assert!(!format!("{failure:?}").contains(secret) && !failure.hint.is_empty(), "{failure:?}");
        failure
    };
    run(async {
        let wrong = failure(weed.url_of(weed.s3(), e2e::bucket::BUCKET, "x", "wrong")).await;
        assert_eq!(wrong.code, Code::Denied, "{wrong:?}");
        assert!(wrong.message.contains("godwit-test") && wrong.message.contains("the file"), "{wrong}");
        let absent = failure(weed.url_of(weed.s3(), e2e::bucket::BUCKET, "x", "no-such-file")).await;
        assert_eq!(absent.code, Code::Denied, "{absent:?}");
        assert!(absent.message.contains("no credentials") && absent.message.contains("no-such-file"), "{absent}");
        let nobucket = failure(weed.url_of(weed.s3(), "no-such-bucket", "x", "keys")).await;
        assert_eq!(nobucket.code, Code::NotFound, "{nobucket:?}");
        assert!(nobucket.message.contains("no-such-bucket"), "{nobucket}");
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let nobody = failure(weed.url_at(closed, "x") + HASTY).await;
        assert_eq!(nobody.code, Code::Unreachable, "{nobody:?}");
        assert!(nobody.message.contains("3 tries"), "{nobody}");
    });
}

#[test]
fn a_server_that_asks_for_peace_gets_it_and_one_that_never_stops_is_given_up() {
    let Some(weed) = Weed::start() else { return };
    let left = Arc::new(AtomicUsize::new(3));
    let busy = left.clone();
    let proxy = Proxy::start(weed.s3(), move |_| {
        let again = busy.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        if again { Action::Answer(503) } else { Action::Pass }
    });
    let bucket = Bucket::open(&weed.url_at(proxy.address(), "busy"), true).unwrap();
    run(async {
        bucket.put("a", Bytes::from_static(b"1")).await.unwrap();
        assert_eq!(proxy.count("PUT", "/busy/a"), 4);
        let hasty = Bucket::open(&(weed.url_at(proxy.address(), "busy") + HASTY), true).unwrap();
        left.store(1_000, Ordering::SeqCst);
        let failure = Failure::from(hasty.get("a").await.unwrap_err());
        assert_eq!(failure.code, Code::Unreachable);
        assert!(failure.message.contains("503") && failure.message.contains("3 tries"), "{failure}");
        left.store(0, Ordering::SeqCst);
        assert_eq!(&hasty.get("a").await.unwrap()[..], b"1");
    });
}

#[test]
fn requests_that_stall_or_break_off_are_made_again() {
    let Some(weed) = Weed::start() else { return };
    let plan = Arc::new(Mutex::new(Vec::new()));
    let steps = plan.clone();
    let proxy = Proxy::start(weed.s3(), move |_| steps.lock().unwrap().pop().unwrap_or(Action::Pass));
    let bucket = Bucket::open(&(weed.url_at(proxy.address(), "slow") + HASTY), true).unwrap();
    let body = noise(2, MIB);
    run(async {
        for action in [Action::Stall, Action::CutBody(MIB / 2), Action::CutAnswer(0), Action::CutAnswer(20)] {
            plan.lock().unwrap().push(action.clone());
            bucket.put("a", body.clone()).await.unwrap_or_else(|error| panic!("{action:?}: {error}"));
        }
        for action in [Action::Stall, Action::CutAnswer(0), Action::CutAnswer(MIB / 2), Action::CutAnswer(MIB)] {
            plan.lock().unwrap().push(action.clone());
            let read = bucket.get("a").await.unwrap_or_else(|error| panic!("{action:?}: {error}"));
            assert!(read == body, "{action:?}");
        }
        plan.lock().unwrap().extend(vec![Action::Stall; 3]);
        let failure = Failure::from(bucket.get_range("a", 0, 10).await.unwrap_err());
        assert_eq!(failure.code, Code::Unreachable, "{failure:?}");
        plan.lock().unwrap().clear();
        assert!(bucket.get("a").await.unwrap() == body);
    });
}

#[test]
fn a_server_that_dies_in_the_middle_of_an_upload_leaves_nothing_or_all() {
    let Some(weed) = Weed::start() else { return };
    let address = weed.s3();
    let weed = Arc::new(Mutex::new(weed));
    let (dying, parts) = (weed.clone(), Arc::new(AtomicUsize::new(0)));
    let seen_parts = parts.clone();
    let proxy = Proxy::start(address, move |seen| {
        if seen.target.contains("partNumber") && seen_parts.fetch_add(1, Ordering::SeqCst) == 2 {
            dying.lock().unwrap().kill();
        }
        Action::Pass
    });
    let url = weed.lock().unwrap().url_at(proxy.address(), "dies");
    let body = noise(3, 40 * MIB);
    run(async {
        let hasty = Bucket::open(&(url.clone() + HASTY), true).unwrap();
        let failure = Failure::from(hasty.put("big", body.clone()).await.unwrap_err());
        assert_eq!(failure.code, Code::Unreachable, "{failure:?}");
        assert!(parts.load(Ordering::SeqCst) > 2);
        weed.lock().unwrap().run();
        assert_eq!(hasty.list("").await.unwrap(), [""; 0]);
        assert!(matches!(hasty.get("big").await, Err(BucketError::Missing(_))));
        // The same with a server that comes back while the client still tries.
        parts.store(0, Ordering::SeqCst);
        let patient = Bucket::open(&(url.clone() + "&attempts=30"), true).unwrap();
        let (again, upload) = (weed.clone(), body.clone());
        let upload = tokio::spawn(async move { patient.put("big", upload).await });
        let restarted = tokio::task::spawn_blocking(move || {
            wait("the third part", || (parts.load(Ordering::SeqCst) > 2).then_some(()));
            again.lock().unwrap().run();
        });
        restarted.await.unwrap();
        let done = upload.await.unwrap();
        match (done, hasty.get("big").await) {
            (Ok(()), Ok(read)) => assert!(read == body),
            (Err(_), Err(BucketError::Missing(_))) => {}
            (done, read) => panic!("{done:?}, but {:?}", read.map(|bytes| bytes.len())),
        }
        hasty.put("big", body.clone()).await.unwrap();
        assert!(hasty.get("big").await.unwrap() == body);
    });
}

#[test]
fn a_full_server_is_said_to_be_full() {
    let Some(weed) = Weed::with_volumes(2, 1) else { return };
    let bucket = Bucket::open(&(weed.url("full") + HASTY), true).unwrap();
    run(async {
        let mut kept = Vec::new();
        let error = loop {
            let number = kept.len() as u64;
            assert!(number < 64, "64 MiB are in a server of 2 MiB");
            match bucket.put(&format!("n{number}"), noise(number, MIB)).await {
                Ok(()) => kept.push(number),
                Err(error) => break error,
            }
        };
        let failure = Failure::from(error);
        assert_eq!(failure.code, Code::Exhausted, "{failure:?}");
        for number in kept {
            assert!(bucket.get(&format!("n{number}")).await.unwrap() == noise(number, MIB));
        }
    });
}

/// Whether a text is in any file of a directory.
fn is_in(text: &str, dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => is_in(text, &entry.path()),
            Ok(kind) if kind.is_file() => {
                let bytes = std::fs::read(entry.path()).unwrap_or_default();
                let found = bytes.windows(text.len()).any(|window| window == text.as_bytes());
                if found { vec![entry.path()] } else { Vec::new() }
            }
            _ => Vec::new(),
        })
        .collect()
}

#[test]
fn a_cluster_keeps_its_checkpoints_on_an_s3_server() {
    let Some(weed) = Weed::start() else { return };
    let cluster = Cluster::up_with(2, &["--bucket", &weed.url("cluster")]);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 10);
    let id = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap().to_owned();
    cluster.ok(["checkpoint", "verify", &id]);
    cluster.goes_on("vm1", 5);
    let runner = cluster.runner("hostA", "vm1").unwrap();
    cluster.kill(cluster.daemon("hostA"));
    cluster.kill(runner);
    cluster.ok(["restore", "vm1", "--to", "hostB"]);
    cluster.goes_on("vm1", 20);
    cluster.ok(["checkpoint", "rm", &id]);
    let (access_key, secret_key) = weed.keys();
    for text in [access_key, secret_key] {
        assert_eq!(is_in(text, cluster.dir()), Vec::<std::path::PathBuf>::new());
    }
}

#[test]
fn a_guest_goes_on_when_the_server_dies_during_its_checkpoint() {
    let Some(weed) = Weed::start() else { return };
    let address = weed.s3();
    let weed = Arc::new(Mutex::new(weed));
    let (dying, killed) = (weed.clone(), Arc::new(AtomicUsize::new(0)));
    let deaths = killed.clone();
    let proxy = Proxy::start(address, move |seen| {
        // Once armed, at the first pack.
        let armed = seen.target.contains("/packs/") && deaths.load(Ordering::SeqCst) == 1;
        if armed && deaths.swap(2, Ordering::SeqCst) == 1 {
            dying.lock().unwrap().kill();
        }
        Action::Pass
    });
    let url = weed.lock().unwrap().url_at(proxy.address(), "cluster");
    let cluster = Cluster::up_with(2, &["--bucket", &url]);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 10);
    // It stays away: the checkpoint fails, and says so.
    killed.store(1, Ordering::SeqCst);
    let said = cluster.fails(Code::Unreachable, ["checkpoint", "create", "vm1"]);
    assert!(said.contains("s3://godwit-test/cluster"), "{said}");
    assert_eq!(cluster.json(["checkpoint", "ls"]), serde_json::json!([]));
    cluster.goes_on("vm1", 10);
    weed.lock().unwrap().run();
    let id = cluster.json(["checkpoint", "create", "vm1"])["id"].as_str().unwrap().to_owned();
    cluster.ok(["checkpoint", "verify", &id]);
    // It comes back at once: the checkpoint fails or is whole.
    killed.store(1, Ordering::SeqCst);
    let mut create = cluster.command(["checkpoint", "create", "vm1"]).spawn().unwrap();
    wait("the server to be killed", || (killed.load(Ordering::SeqCst) == 2).then_some(()));
    weed.lock().unwrap().run();
    let done = create.wait().unwrap().success();
    cluster.goes_on("vm1", 10);
    assert_eq!(cluster.json(["checkpoint", "ls"]).as_array().map(Vec::len), Some(if done { 2 } else { 1 }));
    cluster.ok(["checkpoint", "verify", "--all"]);
    cluster.ok(["restore", &id, "--to", "hostB", "--as", "vm2"]);
    cluster.goes_on("vm2", 5);
}

#[test]
fn a_cluster_does_not_come_up_over_a_bucket_that_is_not_there() {
    let Some(weed) = Weed::start() else { return };
    let dir = std::env::temp_dir().join(format!("godwit-no-bucket-{}", std::process::id()));
    let url = weed.url_of(weed.s3(), "no-such-bucket", "x", "keys");
    let ctl = e2e::cluster::binaries().join("ctl");
    let up = std::process::Command::new(ctl).args(["dev", "up", "--bucket", &url, "--dir"]).arg(&dir).output().unwrap();
    let said = String::from_utf8_lossy(&up.stderr);
    assert!(!up.status.success() && said.contains("there is no bucket s3://no-such-bucket/x"), "{said}");
    std::fs::remove_dir_all(dir).unwrap();
}

//! A whole guest into a bucket and back: a directory, and an S3 server on this machine.
//!
//! `first-*` is the first checkpoint of an idle guest of 1 GiB, `restore-*` brings it back beside itself; `lazy-*` is a
//! restore of 4 GiB that lets the guest run before its pages are there, and is left out where `ctl` cannot do that. Before each
//! measurement memory is touched, as for migrations: what free memory costs that this machine gave back is not what is asked.

use std::path::Path;

use controller::bucket::Bucket;
use tokio::runtime::Runtime;

use super::super::migrate::warm;
use super::budget::{Budget, Depot, Road};
use super::parts::{Parts, Store};
use super::restic::Restic;
use super::{GIB, RUNS, Suite, figure, fill, forget, image, rate, take, timed};
use crate::bucket::Weed;
use crate::cluster::{Cluster, wait};

/// Room of the S3 server: what is removed is given back late.
const VOLUMES: u32 = 320;
const VOLUME_MIB: u32 = 64;

/// Where checkpoints go. The server outlives its cluster.
struct Place {
    cluster: Cluster,
    store: Store,
    weed: Option<Weed>,
    /// The controller's own client of the same kind of bucket, for the budget.
    bucket: Bucket,
    runtime: Runtime,
}

impl Place {
    /// `None`, said aloud, where there is no server.
    fn open(word: &str) -> Result<Option<Place>, String> {
        let open = |url: &str| Bucket::open(url, true).map_err(|e| e.to_string());
        let runtime = || Runtime::new().map_err(|e| e.to_string());
        if word == "file" {
            let cluster = Cluster::up(1);
            let store = Store::File(cluster.dir().to_owned());
            let bucket = open(&format!("file:{}", cluster.dir().join("budget").display()))?;
            return Ok(Some(Place { cluster, store, weed: None, bucket, runtime: runtime()? }));
        }
        let Some(weed) = Weed::with_volumes(VOLUMES, VOLUME_MIB) else { return Ok(None) };
        let cluster = Cluster::up_with(1, &["--bucket", &weed.url("guests")]);
        let bucket = open(&weed.url("ceilings"))?;
        let store = Store::S3(bucket.clone(), Box::new(runtime()?));
        Ok(Some(Place { cluster, store, weed: Some(weed), bucket, runtime: runtime()? }))
    }

    fn depot(&self) -> Depot<'_> {
        let server = self.weed.as_ref().and_then(Weed::process_id);
        Depot { bucket: &self.bucket, runtime: &self.runtime, server }
    }
}

pub(super) fn run(suite: &Suite<'_>) -> Result<(), String> {
    for word in ["file", "s3"] {
        let [first, restore, lazy] = ["first", "restore", "lazy"].map(|road| format!("{road}-{word}"));
        if suite.wanted(&first) || suite.wanted(&restore) {
            match Place::open(word)? {
                Some(place) => there_and_back(suite, &place, &first, &restore)?,
                None => suite.report.skip(&format!("{first} and {restore}: there is no S3 server; run deploy/weed")),
            }
        }
        if suite.wanted(&lazy) {
            lazily(suite, word, &lazy)?;
        }
    }
    Ok(())
}

fn there_and_back(suite: &Suite<'_>, place: &Place, first: &str, restore: &str) -> Result<(), String> {
    let (cluster, ram) = (&place.cluster, suite.ram(GIB));
    let region = fill(cluster, "vm1", "hostA", ram, 0).region_bytes;
    let (mut parts, mut budget, mut totals) = (Parts::default(), Budget::default(), Vec::new());
    // `restore` needs one checkpoint only.
    for run in 0..if suite.wanted(first) { RUNS } else { 1 } {
        if run > 0 {
            forget(cluster, "vm1");
        }
        warm(2 * ram);
        parts.measure(&place.store)?;
        if suite.wanted(first) {
            budget.measure(&place.depot(), Road::First)?;
        }
        warm(2 * ram);
        let taken = take(cluster, "hostA", "vm1")?;
        if taken.stored < region as f64 {
            return Err(format!("{first}: a first checkpoint has {} bytes of {region}", taken.stored));
        }
        totals.push(taken.total_ms);
    }
    if suite.wanted(first) {
        let restic = if place.weed.is_none() { restic(suite, cluster, ram)? } else { Default::default() };
        tell(suite, first, region, &totals, (&parts, &budget), &restic);
    }
    if suite.wanted(restore) {
        let (mut parts, mut budget, mut totals) = (Parts::default(), Budget::default(), Vec::new());
        for _ in 0..RUNS {
            warm(2 * ram);
            parts.measure(&place.store)?;
            budget.measure(&place.depot(), Road::Restore)?;
            warm(5 * ram / 2);
            let (_, ms) = timed(|| cluster.ok(["restore", "vm1", "--as", "back", "--to", "hostA"]));
            totals.push(ms);
            cluster.goes_on("back", 5);
            cluster.ok(["vm", "rm", "back"]);
        }
        tell(suite, restore, region, &totals, (&parts, &budget), &Default::default());
    }
    Ok(())
}

/// Milliseconds and bytes, a value a run.
type Restics = (Vec<f64>, Vec<f64>);

fn tell(
    suite: &Suite<'_>,
    case: &str,
    bytes: u64,
    totals: &[f64],
    (parts, budget): (&Parts, &Budget),
    restic: &Restics,
) {
    let rates: Vec<f64> = totals.iter().map(|ms| rate(bytes, *ms)).collect();
    suite.report.add(suite.of(case, "throughput_mb_per_s", "MB/s", &rates).map(|m| parts.beside(m)));
    let share = suite.of(case, "share_of_cpu_ceiling_percent", "%", &budget.shares(&rates));
    suite.report.add(share.map(|m| budget.beside(m)));
    let total = suite.of(case, "total_ms", "ms", totals);
    suite.report.add(total.map(|m| m.beside("restic_ms", &restic.0).beside("restic_bytes", &restic.1)));
}

/// restic's first backup of the same RAM, once.
fn restic(suite: &Suite<'_>, cluster: &Cluster, ram_bytes: u64) -> Result<Restics, String> {
    let mut runs = Restics::default();
    cluster.ok(["vm", "pause", "vm1"]);
    let image = image::Image::of(wait("the guest's runner", || cluster.runner("hostA", "vm1")), ram_bytes)?;
    let file = cluster.dir().join("ram.img");
    image::write(&image, &file)?;
    drop(image);
    let folder = cluster.dir().join("restic");
    match Restic::start(&folder)? {
        None => suite.report.skip("restic is not installed: nothing is beside first-file"),
        Some(mut restic) => {
            let (bytes, ms) = timed(|| restic.backup(&file));
            runs.0.push(ms);
            runs.1.push(bytes? as f64);
            remove(&folder)?;
        }
    }
    cluster.ok(["vm", "resume", "vm1"]);
    std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    Ok(runs)
}

fn remove(folder: &Path) -> Result<(), String> {
    std::fs::remove_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))
}

fn lazily(suite: &Suite<'_>, word: &str, case: &str) -> Result<(), String> {
    let Some(place) = Place::open(word)? else {
        suite.report.skip(&format!("{case}: there is no S3 server; run deploy/weed"));
        return Ok(());
    };
    let cluster = &place.cluster;
    fill(cluster, "vm1", "hostA", suite.ram(4 * GIB), 0);
    let id = take(cluster, "hostA", "vm1")?.id;
    cluster.ok(["vm", "rm", "vm1"]);
    let (mut first, mut totals) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let (answer, ms) = timed(|| cluster.json(["restore", &id, "--as", "back", "--to", "hostA", "--lazy"]));
        let found = figure(&answer["restore"], "first_instruction_ms");
        first.push(found.ok_or_else(|| format!("no first_instruction_ms in {answer}"))?);
        totals.push(ms);
        cluster.goes_on("back", 5);
        // It may still be on its way.
        wait("the restored guest to go", || (cluster.ctl(["vm", "rm", "back"]).code == Some(0)).then_some(()));
    }
    suite.add(case, "first_instruction_ms", "ms", &first);
    suite.add(case, "total_ms", "ms", &totals);
    Ok(())
}

//! What a checkpoint costs after 1, 5 or 20 % of a guest's pages were rewritten, scattered over all of its RAM.
//!
//! The guest is paused before and at the checkpoint, and its RAM is read both times: so the pages that differ are known
//! exactly, and what zstd makes of them is what an ideal checkpoint would store.

use super::image::{Image, write};
use super::restic::Restic;
use super::{GIB, PAGE, RUNS, Suite, fill, take, timed, until};
use crate::cluster::{Cluster, wait};

/// Case and percent of pages.
const CASES: [(&str, u64); 3] = [("incremental-1", 1), ("incremental-5", 5), ("incremental-20", 20)];
/// Beside this one restic backs up the same two images.
const BESIDE_RESTIC: &str = "incremental-5";
/// 26 MB/s.
const PAGES_PER_S: u64 = 6400;
/// Bytes of a page in RAM's map: its digest.
const MAP_BYTES: f64 = 32.0;

#[derive(Default)]
struct Runs {
    sent: Vec<f64>,
    stored: Vec<f64>,
    total: Vec<f64>,
    dirty: Vec<f64>,
    ideal: Vec<f64>,
    restic_ms: Vec<f64>,
    restic_bytes: Vec<f64>,
}

pub(super) fn run(suite: &Suite<'_>) -> Result<(), String> {
    let cases: Vec<_> = CASES.into_iter().filter(|(case, _)| suite.wanted(case)).collect();
    if cases.is_empty() {
        return Ok(());
    }
    let ram = suite.ram(GIB);
    let pages = ram / PAGE;
    let cluster = Cluster::up(1);
    fill(&cluster, "vm1", "hostA", ram, PAGES_PER_S);
    cluster.ok(["vm", "pause", "vm1"]);
    take(&cluster, "hostA", "vm1")?;
    let mut image = Image::of(wait("the guest's runner", || cluster.runner("hostA", "vm1")), ram)?;
    for (case, percent) in cases {
        let mut restic = if case == BESIDE_RESTIC { beside(suite, &cluster, &image)? } else { None };
        let mut runs = Runs::default();
        for _ in 0..RUNS {
            // Its table of counts changes too, all over.
            rewrite(&cluster, pages * percent / 100 - pages / 512);
            let (changed, ideal) = image.read_again()?;
            // Once is enough: it takes longer than all the rest.
            if let Some((mut restic, file)) = restic.take() {
                write(&image, &file)?;
                let (backup, ms) = timed(|| restic.backup(&file));
                runs.restic_bytes.push(backup? as f64);
                runs.restic_ms.push(ms);
            }
            let taken = take(&cluster, "hostA", "vm1")?;
            runs.dirty.push(100.0 * changed as f64 / pages as f64);
            runs.ideal.push(ideal as f64);
            runs.sent.push(taken.sent);
            runs.stored.push(taken.stored);
            runs.total.push(taken.total_ms);
        }
        runs.tell(suite, case, pages);
    }
    Ok(())
}

/// Lets the guest rewrite so many pages.
fn rewrite(cluster: &Cluster, pages: u64) {
    let writes = || cluster.ticks("vm1").map_or(0, |ticks| ticks.writes);
    let before = writes();
    cluster.ok(["vm", "resume", "vm1"]);
    until(cluster, "the guest to rewrite its pages", || (writes() >= before + pages).then_some(()));
    cluster.ok(["vm", "pause", "vm1"]);
}

/// A repository of restic's with the image as it is before; `None`, said aloud, where there is no restic.
fn beside(suite: &Suite<'_>, cluster: &Cluster, image: &Image) -> Result<Option<(Restic, std::path::PathBuf)>, String> {
    let Some(mut restic) = Restic::start(&cluster.dir().join("restic"))? else {
        suite.report.skip("restic is not installed: nothing is beside incremental-5");
        return Ok(None);
    };
    let file = cluster.dir().join("ram.img");
    write(image, &file)?;
    restic.backup(&file)?;
    Ok(Some((restic, file)))
}

impl Runs {
    fn tell(&self, suite: &Suite<'_>, case: &str, pages: u64) {
        let (map, aims) = (pages as f64 * MAP_BYTES, self.ideal.iter().map(|ideal| aim(*ideal, pages)));
        let aims: Vec<f64> = aims.collect();
        suite.add(case, "dirty_percent", "%", &self.dirty);
        suite.add(case, "bytes_sent", "B", &self.sent);
        let stored = suite.of(case, "bytes_stored", "B", &self.stored);
        let stored = stored.map(|m| m.beside("ideal", &self.ideal).beside("ram_map", &[map]).beside("aim", &aims));
        suite.report.add(stored.map(|m| m.beside("restic_bytes", &self.restic_bytes)));
        let total = suite.of(case, "total_ms", "ms", &self.total);
        suite.report.add(total.map(|m| m.beside("restic_ms", &self.restic_ms)));
    }
}

/// The most that a checkpoint is to store: 15 % more than the changed pages, and 1 % of RAM's map.
fn aim(ideal: f64, pages: u64) -> f64 {
    1.15 * ideal + 0.01 * pages as f64 * MAP_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_aim_is_of_the_pages_and_of_the_map() {
        assert_eq!(aim(0.0, 262_144).round(), 83_886.0);
        assert_eq!((aim(1e6, 262_144) - aim(0.0, 262_144)).round(), 1_150_000.0);
    }
}

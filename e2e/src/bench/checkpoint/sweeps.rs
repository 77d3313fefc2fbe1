//! How much memory the controller needs to sweep a bucket whose page maps are of a million pages, and how long it takes.
//!
//! A guest of 4 GiB leaves behind a first checkpoint and increments, of which the older ones are removed: packs die, and some
//! are rewritten.

use super::{GIB, RUNS, Suite, controllers_peak, fill, forget, take, timed};
use crate::cluster::Cluster;

const CASE: &str = "sweep-4g";
const RAM_BYTES: u64 = 4 * GIB;
/// 100 MB/s.
const PAGES_PER_S: u64 = 25_600;
/// Increments, of which the last two stay.
const INCREMENTS: usize = 4;
/// MiB.
const AIM: f64 = 512.0;

pub(super) fn run(suite: &Suite<'_>) -> Result<(), String> {
    if !suite.wanted(CASE) {
        return Ok(());
    }
    let cluster = Cluster::up(1);
    fill(&cluster, "vm1", "hostA", suite.ram(RAM_BYTES), PAGES_PER_S);
    let (mut peaks, mut totals) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let mut ids = vec![take(&cluster, "hostA", "vm1")?.id];
        for _ in 0..INCREMENTS {
            cluster.goes_on("vm1", 50);
            ids.push(take(&cluster, "hostA", "vm1")?.id);
        }
        for id in &ids[..INCREMENTS - 1] {
            cluster.ok(["checkpoint", "rm", id]);
        }
        let ((swept, ms), peak_mib) =
            controllers_peak(&cluster, || timed(|| cluster.ok(["checkpoint", "sweep", "vm1"])))?;
        eprintln!("{CASE}: {}", swept.trim());
        peaks.push(peak_mib);
        totals.push(ms);
        forget(&cluster, "vm1");
    }
    let peak = suite.of(CASE, "controller_peak_mib", "MiB", &peaks);
    suite.report.add(peak.map(|m| m.beside("aim", &[AIM])));
    suite.add(CASE, "total_ms", "ms", &totals);
    Ok(())
}

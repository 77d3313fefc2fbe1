//! How far the bucket is behind a recorded guest: the age of the newest byte of its journal there, seen from outside, while
//! the guest runs on a cluster of one host. That is what a host that dies takes along.

use std::thread;
use std::time::{Duration, Instant};

use super::SUITE;
use crate::bench::{Measurement, Report};
use crate::cluster::{Cluster, wait};
use crate::guest::{Program, REGION};

/// A guest that writes all the time.
const GUEST: Program =
    Program { start: REGION, region_bytes: 16 << 20, pages_per_s: 1000, tick_ms: 20, tsc_hz: 1_000_000_000 };
/// For so long is looked, and so often.
const SPAN: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);

/// Age of the newest block's end in the bucket, in seconds; `None` before the first one.
fn behind(cluster: &Cluster) -> Option<f64> {
    let recordings = cluster.json(["record", "ls", "vm1"]);
    let lag_ms = recordings.as_array()?.last()?["lag_ms"].as_u64().filter(|lag_ms| *lag_ms > 0)?;
    Some(lag_ms as f64 / 1e3)
}

/// Records a guest for a while and looks all the time.
pub fn lag(report: &Report) -> Result<(), String> {
    let cluster = Cluster::up(1);
    cluster.create("vm1", "hostA", GUEST);
    cluster.goes_on("vm1", 5);
    cluster.ok(["record", "start", "vm1"]);
    wait("the first block", || behind(&cluster));
    let (begun, mut ages) = (Instant::now(), Vec::new());
    while begun.elapsed() < SPAN {
        ages.push(behind(&cluster).ok_or("the recording has ended")?);
        thread::sleep(LOOK);
    }
    report.add(Measurement::of(SUITE, "lag", "age_of_the_newest_byte", "s", &ages));
    Ok(())
}

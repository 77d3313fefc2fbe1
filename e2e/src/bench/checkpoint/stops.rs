//! How long a guest of 512 MiB to 4 GiB that rewrites 25 MB/s stands still for its first checkpoint and for the next one.
//!
//! A checkpoint is a first one when the VM has no other: all are removed between runs.

use super::super::median;
use super::{GIB, RUNS, Suite, fill, forget, take};
use crate::cluster::Cluster;

/// Case and RAM.
const CASES: [(&str, u64); 4] = [("ram-512m", GIB / 2), ("ram-1g", GIB), ("ram-2g", 2 * GIB), ("ram-4g", 4 * GIB)];
/// 25 MB/s.
const PAGES_PER_S: u64 = 6400;
/// Increments of a run: stops are short, and their clock is coarse.
const STOPS: usize = 5;
/// What a stop may grow from 1 GiB to 4 GiB.
const RATIO_AIM: f64 = 1.3;

pub(super) fn run(suite: &Suite<'_>) -> Result<(), String> {
    let mut of_one_gib = None;
    for (case, bytes) in CASES.into_iter().filter(|(case, _)| suite.wanted(case)) {
        let stops = stops(suite, case, suite.ram(bytes))?;
        match case {
            "ram-1g" => of_one_gib = Some(median(&stops)),
            "ram-4g" => {
                let ratio: Vec<f64> = of_one_gib.map(|one| ratio(median(&stops), one)).into_iter().collect();
                let measured = suite.of(case, "stop_ratio", "x", &ratio);
                suite.report.add(measured.map(|m| m.beside("aim", &[RATIO_AIM])));
            }
            _ => {}
        }
    }
    Ok(())
}

fn stops(suite: &Suite<'_>, case: &str, ram_bytes: u64) -> Result<Vec<f64>, String> {
    let cluster = Cluster::up(1);
    let program = fill(&cluster, "vm1", "hostA", ram_bytes, PAGES_PER_S);
    let (mut first, mut later, mut totals) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        cluster.goes_on("vm1", 5);
        let taken = take(&cluster, "hostA", "vm1")?;
        if taken.stored < program.region_bytes as f64 {
            return Err(format!("{case}: a first checkpoint has {} bytes of {}", taken.stored, program.region_bytes));
        }
        first.push(taken.stop_ms);
        // A second of changes; then less, for more stops.
        cluster.goes_on("vm1", 50);
        let taken = take(&cluster, "hostA", "vm1")?;
        later.push(taken.stop_ms);
        totals.push(taken.total_ms);
        for _ in 1..STOPS {
            cluster.goes_on("vm1", 5);
            later.push(take(&cluster, "hostA", "vm1")?.stop_ms);
        }
        forget(&cluster, "vm1");
    }
    cluster.goes_on("vm1", 5);
    suite.add(case, "stop_ms", "ms", &later);
    suite.add(case, "first_stop_ms", "ms", &first);
    suite.add(case, "total_ms", "ms", &totals);
    Ok(later)
}

fn ratio(large: f64, small: f64) -> f64 {
    if small > 0.0 { large / small } else { f64::NAN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_of_nothing_is_no_number() {
        assert_eq!(ratio(3.0, 2.0), 1.5);
        assert!(ratio(3.0, 0.0).is_nan());
    }
}

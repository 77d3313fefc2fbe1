//! Twenty small guests that are all checkpointed at once: how much memory the controller needs at the most.

use std::process::{Child, Stdio};

use super::{RUNS, Suite, controllers_peak, fill, forget, timed};
use crate::cluster::Cluster;

const CASE: &str = "fleet-20";
const GUESTS: usize = 20;
const RAM_BYTES: u64 = 64 << 20;
/// 1 MB/s each.
const PAGES_PER_S: u64 = 256;
/// MiB.
const AIM: f64 = 256.0;

pub(super) fn run(suite: &Suite<'_>) -> Result<(), String> {
    if !suite.wanted(CASE) {
        return Ok(());
    }
    // The smallest that a guest fits in, when quick.
    let ram_bytes = suite.ram(RAM_BYTES).max(32 << 20);
    let cluster = Cluster::up(2);
    let names: Vec<String> = (1..=GUESTS).map(|number| format!("vm{number}")).collect();
    for (number, vm) in names.iter().enumerate() {
        fill(&cluster, vm, ["hostA", "hostB"][number % 2], ram_bytes, PAGES_PER_S);
    }
    let (mut peaks, mut totals) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let ((done, ms), peak_mib) = controllers_peak(&cluster, || timed(|| all_at_once(&cluster, &names)))?;
        done?;
        peaks.push(peak_mib);
        totals.push(ms);
        names.iter().for_each(|vm| forget(&cluster, vm));
    }
    let peak = suite.of(CASE, "controller_peak_mib", "MiB", &peaks);
    suite.report.add(peak.map(|m| m.beside("aim", &[AIM])));
    suite.add(CASE, "total_ms", "ms", &totals);
    Ok(())
}

fn all_at_once(cluster: &Cluster, names: &[String]) -> Result<(), String> {
    let begin = |vm: &String| {
        let mut command = cluster.command(["checkpoint", "create", vm]);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(|e| format!("ctl: {e}"))
    };
    let begun: Vec<Child> = names.iter().map(begin).collect::<Result<_, _>>()?;
    for (vm, child) in names.iter().zip(begun) {
        let output = child.wait_with_output().map_err(|e| format!("ctl: {e}"))?;
        if !output.status.success() {
            return Err(format!("{vm}: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }
    Ok(())
}

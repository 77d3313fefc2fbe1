//! Twenty small guests that are all checkpointed at once: how much memory the controller needs at the most.

use std::process::{Child, Stdio};

use super::{RUNS, Suite, fill, forget, timed};
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
    let controller = cluster.daemon("controller");
    let (mut peaks, mut totals) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        // From now on the peak is that of this run.
        let forget_peak = format!("/proc/{controller}/clear_refs");
        std::fs::write(&forget_peak, "5").map_err(|e| format!("{forget_peak}: {e}"))?;
        let (done, ms) = timed(|| all_at_once(&cluster, &names));
        done?;
        let status = format!("/proc/{controller}/status");
        let text = std::fs::read_to_string(&status).map_err(|e| format!("{status}: {e}"))?;
        peaks.push(peak_mib(&text).ok_or_else(|| format!("{status} has no VmHWM"))?);
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

/// The most that a process ever had resident, from its `/proc/PID/status`.
fn peak_mib(status: &str) -> Option<f64> {
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"))?;
    Some(kib.trim().parse::<f64>().ok()? / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read_in_mib() {
        let status = "VmPeak:\t  900000 kB\nVmHWM:\t  262144 kB\nVmRSS:\t   1000 kB\n";
        assert_eq!(peak_mib(status), Some(256.0));
        assert_eq!(peak_mib("VmRSS:\t 1 kB\n"), None);
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(peak_mib(&own).unwrap() > 0.0);
    }
}

//! Benchmarks: `cargo run --release -p e2e --bin bench -- SUITE [--json]`. Timings live here, never in tests.
//!
//! Each measurement is one line: what was measured, the median and spread of its runs, and beside it what was measured in
//! the same run for comparison. This room refuses to judge.

pub mod ceilings;
pub mod checkpoint;
pub mod engine;
pub mod hardware;
pub mod loops;
pub mod migrate;
pub mod qemu;
pub mod qemu_pair;
pub mod recorded;
pub mod replay;
pub mod report;

use std::process::Command;
use std::time::Duration;

pub use report::{Measurement, Report};

/// Median of the values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Is this program on the PATH?
pub fn has_program(name: &str) -> bool {
    Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// How long a guest may take before a benchmark gives up on it.
pub const GUEST_PATIENCE: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}

//! What operators meet: refusals, interruptions, full disks, cut connections, old certificates, numbers and pages.
//!
//! Real programs, driven by `ctl`; each file is one subject. Those that need root, or a program that is not there, say so
//! and pass.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

mod bucket;
mod certificates;
mod cuts;
mod interrupts;
mod metrics;
mod network;
mod output;
mod refusals;
mod tickets;

use e2e::guest::{Program, REGION};

/// A guest of about 40 MiB that rewrites 4 MiB/s.
const BUSY: Program =
    Program { start: REGION, region_bytes: 16 << 20, pages_per_s: 1000, tick_ms: 20, tsc_hz: 1_000_000_000 };

/// Says that a test could not be made, where people look.
fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs a program of the system; whether it succeeded.
fn runs(program: &str, args: &[&str]) -> bool {
    let ran = std::process::Command::new(program).args(args).output();
    ran.is_ok_and(|output| {
        if !output.status.success() {
            eprintln!("{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        output.status.success()
    })
}

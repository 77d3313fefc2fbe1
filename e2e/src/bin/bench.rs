//! `bench SUITE [CASE...] [--json]`: measures, prints one figure a line.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use e2e::bench::{Report, checkpoint, engine, hardware, migrate, replay};
use e2e::leftovers;

/// Godwit's benchmarks.
#[derive(Parser)]
struct Arguments {
    /// One JSON object a line instead of a table.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Subcommand)]
enum Suite {
    /// Instructions a second of an engine: int, mem, branch, sse; linux-boot on the software engine.
    Engine {
        /// What runs the guest.
        #[arg(long, value_enum, default_value_t = Engine::Soft)]
        engine: Engine,
        /// Only these cases.
        cases: Vec<String>,
        /// What `deploy/guest` made.
        #[arg(long, default_value = "target/guest")]
        guest: PathBuf,
    },
    /// Guests into a bucket and back: ram-512m ... ram-4g, incremental-1, -5, -20, first-file, restore-file, lazy-file,
    /// first-s3, restore-s3, lazy-s3, fleet-20.
    Checkpoint {
        /// Only these cases.
        cases: Vec<String>,
        /// Small guests, to see that all of it works: the figures mean nothing.
        #[arg(long)]
        quick: bool,
    },
    /// What recording costs and how fast it is gone through again: boot, cpu, net, disk, idle, back
    /// (with reverse-continue), arrive, qemu.
    Replay {
        /// Only these cases.
        cases: Vec<String>,
        /// What `deploy/guest` made.
        #[arg(long, default_value = "target/guest")]
        guest: PathBuf,
    },
    /// A guest of 1 GiB between two agents: idle, dirty-50, dirty-200; on KVM also dirty-1000 and dirty-max, and all of them
    /// with 4 GiB (idle-4g, ...).
    Migrate {
        /// Only these cases.
        cases: Vec<String>,
        /// What runs the guest.
        #[arg(long, value_enum, default_value_t = Engine::Soft)]
        engine: Engine,
        /// RAM of guests on KVM where no case is named.
        #[arg(long, default_value = "1g", value_parser = ["1g", "4g"])]
        memory: String,
        /// Each figure on KVM is the median of so many migrations.
        #[arg(long, default_value_t = 3)]
        runs: usize,
    },
}

/// What runs guests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Engine {
    Soft,
    Kvm,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let report = Report::new(arguments.json);
    if let Err(error) = leftovers::watch() {
        eprintln!("bench: cannot listen for signals: {error}");
        return ExitCode::FAILURE;
    }
    let result = match &arguments.suite {
        Suite::Checkpoint { cases, quick } => checkpoint::run(&report, cases, *quick),
        Suite::Engine { cases, engine: Engine::Kvm, .. } => engine::run_on_kvm(&report, cases),
        Suite::Engine { cases, guest, .. } => engine::run(&report, guest, cases),
        Suite::Replay { cases, guest } => replay::run(&report, guest, cases),
        Suite::Migrate { cases, engine: Engine::Soft, .. } => migrate::run(&report, cases),
        Suite::Migrate { cases, engine: Engine::Kvm, memory, runs } => {
            hardware::migrate(&report, cases, if memory == "4g" { 4 } else { 1 }, *runs)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("bench: {why}");
            ExitCode::FAILURE
        }
    }
}

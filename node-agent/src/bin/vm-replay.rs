//! `vm-replay FILE`: goes through a recording again. See `node_agent::replay`.

use std::process::ExitCode;

use clap::Parser;
use node_agent::replay::program::{Arguments, run};

fn main() -> ExitCode {
    run(&Arguments::parse())
}

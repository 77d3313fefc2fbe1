//! `vm-runner --dir DIR`: the process of one guest, started by the agent. See `node_agent::runner`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use node_agent::runner::machine::{self, Beginnings};
use node_agent::runner::{Options, run};
use node_agent::vm::actor::chain;

/// Runs one guest; it is started by node-agent.
#[derive(Parser, Debug)]
#[command(version)]
struct Arguments {
    /// The VM's directory; holds config.pb.
    #[arg(long)]
    dir: PathBuf,
    /// The state comes from outside: no kernel is opened.
    #[arg(long)]
    incoming: bool,
    /// Pages of RAM come while the guest runs.
    #[arg(long, requires = "incoming")]
    lazy: bool,
    /// A directory on a tmpfs for the guest's RAM.
    #[arg(long)]
    ram_dir: Option<PathBuf>,
    /// Drop privileges and filter system calls.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    sandbox: bool,
}

fn main() -> ExitCode {
    let Arguments { dir: directory, incoming, lazy, ram_dir, sandbox } = Arguments::parse();
    let beginnings = Beginnings { incoming, lazy, ram_dir };
    let options = Options { directory, incoming, sandbox };
    match run(&options, |config, opened| machine::build(config, opened, &beginnings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vm-runner: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

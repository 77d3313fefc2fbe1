//! `ctl`, the operator's tool: parses, calls the controller, prints.
//!
//! ```text
//! grammar ──> a room a command ──> client ──mTLS gRPC──> controller
//!               │                    operation follows long work, progress shows it
//!               └──> output: table | json | yaml on stdout; failures on stderr, their code is the exit code
//! ```
//! It decides nothing about VMs: what may be done, and in which order, the controller knows. `dev` alone starts processes.
//! Of the engine it knows the pure decoding of processors' states: [`vmcb`], [`export`].

mod baseline;
mod checkpoint;
mod client;
mod config;
mod console;
mod dev;
mod export;
mod failure;
mod gdb;
mod grammar;
mod hosts;
mod inspect;
mod interrupts;
mod keys;
mod migration;
mod operation;
mod output;
mod policy;
mod progress;
mod recording;
#[cfg(test)]
mod rehearsal;
mod report;
mod schema;
mod settings;
mod sweeping;
mod top;
mod units;
mod vm;
mod vmcb;
mod wire;

use std::process::ExitCode;

use clap::Parser as _;
use proto::status::Code;
use proto::v1;

use client::Client;
use failure::Failure;
use grammar::{Cli, Command, DevCommand, EventsArgs};
use output::Format;
use recording::words::ReplayArgs;
use report::Event;

/// The whole program. Exit codes: see [`proto::status::Code`].
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("{}", failure.lines());
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let command = match cli.command {
        Command::Dev(DevCommand::Launch(args)) => return dev::launch(&args.command).map(|()| ExitCode::SUCCESS),
        command => command,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Code::Exhausted, format!("cannot start threads: {e}")))?;
    let (format, config) = (cli.output, cli.config.as_deref());
    let result = runtime.block_on(async {
        match command {
            Command::Replay(args) => replay(args, config).await,
            command => dispatch(command, format, config).await.map(|()| ExitCode::SUCCESS),
        }
    });
    // The console's reader may sit in a read of stdin for ever.
    runtime.shutdown_background();
    result
}

/// The one command whose exit code is another program's.
async fn replay(args: ReplayArgs, config: Option<&std::path::Path>) -> Result<ExitCode, Failure> {
    let client = match recording::replay::is_file(&args) {
        true => None,
        false => Some(client::connect(&settings::Settings::load(config)?).await?),
    };
    recording::replay::run(client, &args).await
}

async fn dispatch(command: Command, format: Format, config: Option<&std::path::Path>) -> Result<(), Failure> {
    // What needs no cluster.
    let command = match command {
        Command::Dev(command) => return dev::run(command, format).await,
        Command::Inspect(args) if std::path::Path::new(&args.what).exists() => {
            return inspect::file(args.what.as_ref(), args.keys.as_deref(), format);
        }
        Command::Policy(command) if policy::needs_no_cluster(&command) => {
            return policy::run(None, command, format).await;
        }
        Command::Vmcb(command) if vmcb::needs_no_cluster(&command) => return vmcb::run(None, command, format).await,
        command => command,
    };
    let client = client::connect(&settings::Settings::load(config)?).await?;
    match command {
        Command::Host(command) => hosts::run(client, command, format).await,
        Command::Vm(command) => vm::run(client, command, format).await,
        Command::Migrate(args) => migration::migrate(&client, args, format).await,
        Command::Checkpoint(command) => checkpoint::run(client, command, format).await,
        Command::Policy(command) => policy::run(Some(client), command, format).await,
        Command::Restore(args) => checkpoint::restore(client, args, format).await,
        Command::Record(command) => recording::run(client, command, format).await,
        Command::Key(command) => keys::run(client, command, format).await,
        Command::Vmcb(command) => vmcb::run(Some(client), command, format).await,
        Command::Inspect(args) => inspect::checkpoint(client, &args.what, format).await,
        Command::Events(args) => events(client, args, format).await,
        Command::Top(args) => top::run(client, args, format).await,
        Command::Dev(_) => unreachable!("handled above: a dev command needs no cluster"),
        Command::Replay(_) => unreachable!("handled above: its exit code is another program's"),
    }
}

async fn events(mut client: Client, args: EventsArgs, format: Format) -> Result<(), Failure> {
    let failed = |e: tonic::Status| Failure::from_status("read the ledger", &e);
    let request = v1::EventsRequest { follow: args.follow, since: args.since, vm: args.vm.unwrap_or_default() };
    let mut stream = client.events(request).await.map_err(failed)?.into_inner();
    while let Some(event) = stream.message().await.map_err(failed)? {
        output::print_streamed(format, &Event::from(event))?;
    }
    Ok(())
}

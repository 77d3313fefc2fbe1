//! The controller's process: settings, log, signals. Everything else is in the library.
//!
//! `controller --config FILE`. Ends on SIGTERM and SIGINT after a drain; exit code 0, or 1 with the reason on stderr.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use controller::cluster::Controller;
use controller::config::{Config, LogFormat};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// The orchestrator daemon of a Godwit cluster.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Settings; see the head of `config.rs` for what they are.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    proto::heap::keep_freed();
    let arguments = Arguments::parse();
    let config = match Config::read(&arguments.config) {
        Ok(config) => config,
        Err(error) => return failed(&error),
    };
    if let Err(error) = log(&config) {
        return failed(&error);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    let ended = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        tokio::spawn(stop_on_signal(shutdown.clone()));
        Controller::build(config).await?.run(shutdown).await
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("controller: {error}");
    ExitCode::FAILURE
}

fn log(config: &Config) -> Result<(), tracing_subscriber::filter::ParseError> {
    // The SDK names access keys at lower levels, whatever else is wanted of the log.
    let filter = EnvFilter::try_new(&config.filter)?.add_directive("aws=warn".parse()?);
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
    match config.log {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

async fn stop_on_signal(shutdown: CancellationToken) {
    let signals = signal(SignalKind::terminate()).and_then(|term| Ok((term, signal(SignalKind::interrupt())?)));
    match signals {
        Ok((mut term, mut int)) => {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            tracing::info!("shutting down");
            shutdown.cancel();
        }
        Err(error) => tracing::error!(%error, "signals cannot be heard"),
    }
}

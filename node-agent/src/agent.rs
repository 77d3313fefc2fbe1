//! The daemon: config -> build -> run until shutdown -> drain.
//!
//! Build reads certificates, opens the state directory and finds the guests that earlier agents left running. Run serves
//! and beats. Shutdown ends the services; guests go on: an agent can be killed or replaced at any time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::clock::HostClock;
use crate::config::Config;
use crate::facts::Facts;
use crate::metrics::MetricsError;
use crate::tls::{Tls, TlsError};
use crate::vm::lease::Leases;
use crate::vm::runner::Launch;
use crate::vm::store::{Store, StoreError};
use crate::vm::{Host, Vms};
use crate::{heartbeat, host, metrics, rpc};

/// How often certificate files are looked at.
const CERTIFICATE_INTERVAL: Duration = Duration::from_secs(5);
/// How long an agent waits for the one before it, which was killed, to be gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(15);
const LOCK_STEP: Duration = Duration::from_millis(50);
/// How long calls under way may take to end after a shutdown.
const DRAIN: Duration = Duration::from_secs(5);

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The certificate is another host's.
    #[error("the certificate names {found}, the configuration says host/{name}")]
    Name {
        /// In the certificate.
        found: String,
        /// In the configuration.
        name: String,
    },
    /// The state directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another agent works on the same state directory.
    #[error("{0} is in use by another agent")]
    Locked(std::path::PathBuf),
    /// The address cannot be listened on.
    #[error("listen on {0}")]
    Listen(String, #[source] std::io::Error),
    /// The metrics page.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The services ended.
    #[error("serving")]
    Serve(#[from] tonic::transport::Error),
}

/// A daemon that is ready to run.
pub struct Agent {
    config: Config,
    listener: TcpListener,
    tls: Arc<Tls>,
    vms: Arc<Vms>,
    _lock: std::fs::File,
}

impl Agent {
    /// Builds everything; guests of an earlier agent are found here.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn build(config: Config) -> Result<Agent, AgentError> {
        let tls = Arc::new(Tls::load(config.tls.clone())?);
        let own = tls.own_identity()?;
        if own.role != "host" || own.name != config.name {
            return Err(AgentError::Name { found: own.to_string(), name: config.name.clone() });
        }
        let lock = lock(&config.state_dir, LOCK_PATIENCE).await?;
        let store = Store::open(&config.state_dir)?;
        let listener =
            TcpListener::bind(&config.listen).await.map_err(|e| AgentError::Listen(config.listen.clone(), e))?;
        // A port of 0 has become a real one.
        let address = match (config.address == config.listen, listener.local_addr()) {
            (true, Ok(local)) if config.listen.ends_with(":0") => local.to_string(),
            _ => config.address.clone(),
        };
        let host = Host {
            name: config.name.clone(),
            address,
            controller: config.controller.clone(),
            store,
            clock: Box::new(HostClock),
            leases: Leases::new(!config.controller.is_empty()),
            launch: Launch { program: config.runner.clone(), sandbox: config.sandbox, ram_dir: config.ram_dir.clone() },
            tls: Arc::clone(&tls),
            facts: Facts::measure(&config.capabilities.withhold),
            engine: config.engine,
            boot_id: host::boot_id(),
            ending: CancellationToken::new(),
        };
        let vms = Arc::new(Vms::recover(Arc::new(host)).await?);
        Ok(Agent { config, listener, tls, vms, _lock: lock })
    }

    /// Where it listens (a port of 0 in the configuration becomes a real one).
    ///
    /// # Errors
    /// Of getsockname(2).
    pub fn local_address(&self) -> std::io::Result<std::net::SocketAddr> {
        self.listener.local_addr()
    }

    /// Runs until `shutdown`, then lets calls under way end.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), AgentError> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        if let Some(address) = self.config.metrics {
            metrics::start(address, Arc::clone(&self.vms), version.clone(), shutdown.clone()).await?;
        }
        let mut beating = None;
        if self.config.controller.is_empty() {
            tracing::warn!("no controller is configured: guests run without leases");
        } else {
            let (vms, controller) = (Arc::clone(&self.vms), self.config.controller.clone());
            beating = Some(tokio::spawn(heartbeat::run(vms, controller, version.clone(), shutdown.clone())));
        }
        let vms = Arc::clone(&self.vms);
        let (tls, ended) = (Arc::clone(&self.tls), shutdown.clone());
        tokio::spawn(async move {
            while tokio::time::timeout(CERTIFICATE_INTERVAL, ended.cancelled()).await.is_err() {
                tls.refresh();
            }
        });
        tracing::info!(host = self.config.name, listen = self.config.listen, "the agent serves");
        let serving = rpc::serve(self.listener, self.tls, self.vms, version, shutdown.clone());
        tokio::pin!(serving);
        tokio::select! {
            served = &mut serving => served?,
            () = shutdown.cancelled() => {
                // Consoles and transfers may have no end of their own; guests go on without them.
                if let Ok(served) = tokio::time::timeout(DRAIN, serving).await {
                    served?;
                }
            }
        }
        if let Some(beating) = beating {
            let _ended = beating.await;
        }
        // An actor that waits for a runner that is stuck is left to the end of the process.
        let _stuck = tokio::time::timeout(DRAIN, vms.end()).await;
        tracing::info!("the agent has ended; guests go on");
        Ok(())
    }
}

/// One agent per state directory: two would fight over the runners' sockets. One that was killed holds it until it is gone.
async fn lock(state_dir: &std::path::Path, patience: Duration) -> Result<std::fs::File, AgentError> {
    let path = state_dir.join("agent.lock");
    let locked = || AgentError::Locked(state_dir.to_owned());
    let _there_already = std::fs::create_dir_all(state_dir);
    let file = std::fs::File::create(path).map_err(|_| locked())?;
    let deadline = Instant::now() + patience;
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => tokio::time::sleep(LOCK_STEP).await,
            Err(_) => return Err(locked()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_in_use_is_said_to_be_and_waited_for() {
        let directory = std::env::temp_dir().join(format!("godwit-agent-lock-{}", std::process::id()));
        let first = lock(&directory, Duration::ZERO).await.unwrap();
        assert!(matches!(lock(&directory, Duration::ZERO).await, Err(AgentError::Locked(_))));
        let waiting = directory.clone();
        let second = tokio::spawn(async move { lock(&waiting, Duration::from_secs(60)).await.map(drop) });
        tokio::task::yield_now().await;
        drop(first);
        second.await.unwrap().unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
    }
}

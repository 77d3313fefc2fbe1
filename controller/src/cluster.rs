//! The daemon: build from settings, run until shutdown, drain.
//!
//! Order at start: ledger (folded whole), length of the lease written down, certificates, bucket, operations of the
//! controller before taken up, and only then the door is opened. At the end: no new connections, operations get a
//! moment to end, and what is left is taken up by the next start.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::agents::{Agents, link};
use crate::api::{Api, views};
use crate::bucket::{Bucket, BucketError};
use crate::config::Config;
use crate::entropy;
use crate::failure::Failure;
use crate::ingest::Routes;
use crate::ingest::read::Reader;
use crate::ingest::supply::Supplies;
use crate::journal::Journals;
use crate::keys::Keys;
use crate::ledger::event::Event;
use crate::ledger::saved::to_hex;
use crate::ledger::{Ledger, LedgerError};
use crate::metrics::{self, MetricsError, Sources};
use crate::reconcile::Reconcile;
use crate::saga::gate::Limits;
use crate::saga::hosts::Hosts;
use crate::saga::{Patience, Sagas, ShowVm};
use crate::schedule::facts::Observe;
use crate::schedule::{Schedule, SystemClock};
use crate::sweep::Sweeper;
use crate::tls::{Tls, TlsError};

/// How long a controller waits for the one before it, which was killed, to be gone.
const LEDGER_PATIENCE: Duration = Duration::from_secs(15);
/// How long operations may take to end at shutdown.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// Accepted connections that wait for the server.
const ACCEPTED_MAX: usize = 64;

/// Why the controller cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The bucket.
    #[error("{0}")]
    Bucket(String),
    /// Metrics.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// An address that cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The server ended.
    #[error("the server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// The cluster keys cannot be read or kept.
    #[error(transparent)]
    Keys(#[from] crate::failure::Failure),
}

/// A controller that is ready to run.
pub struct Controller {
    config: Config,
    listener: TcpListener,
    address: SocketAddr,
    tls: Arc<Tls>,
    api: Api,
}

impl Controller {
    /// Opens everything that the settings name and takes up what a controller before left.
    ///
    /// # Errors
    /// Any [`ClusterError`] but `Serve` and `Metrics`.
    pub async fn build(config: Config) -> Result<Controller, ClusterError> {
        let tls = Arc::new(Tls::load(&config.tls)?);
        let actor = tls.identity().to_string();
        let ledger = Ledger::open_when_free(&config.store, LEDGER_PATIENCE).await?;
        // Until the leases of a longer lease have ended, they count: `Agents` takes the larger of the two.
        let lease = Duration::from_millis(config.lease_ms.max(ledger.state().lease_ms));
        let bucket = Bucket::with(&config.bucket, ledger.state().checkpoints.is_empty())?;
        check_bucket(&bucket, ledger.state().vms.is_empty()).await?;
        let reader = Reader { bucket, keys: Keys::open(&config.keys_file())? };
        let listen = |source| ClusterError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let agents = Agents::new(ledger.clone(), tls.clone(), Duration::from_millis(config.lease_ms), lease);
        let agents = Arc::new(agents);
        ledger.append(&actor, Event::LeaseSet { lease_ms: config.lease_ms }).await?;
        if ledger.state().cluster.is_empty() {
            let cluster = to_hex(&entropy::bytes::<16>());
            ledger.append(&actor, Event::ClusterNamed { cluster }).await?;
        }
        let (routes, journals) = (Routes::default(), Journals::new(reader.clone()));
        let reached = if config.address.is_empty() { address.to_string() } else { config.address.clone() };
        let world = Hosts {
            agents: agents.clone(),
            reader: reader.clone(),
            journals: journals.clone(),
            routes: routes.clone(),
            tls: tls.clone(),
            address: reached,
            sweeper: Sweeper::default(),
        };
        let shown = (ledger.clone(), agents.clone());
        let show: ShowVm = Arc::new(move |name| views::show(&shown.0, &shown.1, name));
        let sagas = Sagas::new(ledger.clone(), world, Patience::default(), actor.clone(), show);
        sagas.gate().limit(Limits { cluster: config.checkpoints_at_once, host: config.checkpoints_at_once_per_host });
        let heard = agents.clone();
        let observe: Observe = Arc::new(move |vm| (heard.host_state(&vm.host), heard.observed(&vm.host, &vm.name)));
        let schedule = Schedule::new(ledger.clone(), sagas.clone(), observe, SystemClock::default(), actor);
        let api = Api {
            ledger,
            agents,
            sagas,
            schedule,
            reader,
            bucket_url: config.bucket.url.clone(),
            routes,
            journals,
            supplies: Supplies::default(),
            reconcile: Reconcile::default(),
        };
        Ok(Controller { config, listener, address, tls, api })
    }

    /// Where gRPC is served.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until shutdown, then drains.
    ///
    /// # Errors
    /// [`ClusterError::Serve`], [`ClusterError::Listen`], [`ClusterError::Metrics`], [`ClusterError::Ledger`].
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), ClusterError> {
        let Controller { config, listener, address, tls, api } = self;
        if let Some(address) = config.metrics {
            let sources = Sources {
                ledger: api.ledger.clone(),
                agents: api.agents.clone(),
                journals: api.journals.clone(),
                tls: tls.clone(),
            };
            let bound = TcpListener::bind(address).await.map_err(|source| ClusterError::Listen { address, source })?;
            tokio::spawn(metrics::serve(bound, metrics::install()?, sources, shutdown.clone()));
        }
        let watched = tls.clone();
        tokio::spawn(async move { watched.watch().await });
        let (accepted, connections) = mpsc::channel(ACCEPTED_MAX);
        tokio::spawn(link::accept(listener, tls.clone(), accepted));
        api.sagas.recover().await?;
        tokio::spawn(api.schedule.clone().run(shutdown.clone()));
        tokio::spawn(api.clone().check_by_clock(shutdown.clone()));
        if config.sweep_every_ms > 0 {
            let every = Duration::from_millis(config.sweep_every_ms);
            tokio::spawn(api.schedule.clone().sweep_by_clock(every, shutdown.clone()));
        }
        tracing::info!(%address, identity = %tls.identity(), bucket = config.bucket.url, "ready");
        let server = Server::builder()
            .initial_stream_window_size(link::STREAM_WINDOW)
            .initial_connection_window_size(link::CONNECTION_WINDOW)
            .max_frame_size(link::HTTP_FRAME)
            .http2_keepalive_interval(Some(Duration::from_secs(5)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .add_routes(api.services());
        let stopping = shutdown.clone();
        let served = server.serve_with_incoming_shutdown(ReceiverStream::new(connections), stopping.cancelled_owned());
        tokio::pin!(served);
        tokio::select! {
            ended = &mut served => return Ok(ended?),
            () = shutdown.cancelled() => {}
        }
        // Listeners that follow something would hold the server for ever: operations decide how long it goes on.
        tokio::select! {
            ended = &mut served => ended?,
            () = drain(&api.ledger) => {}
        }
        Ok(())
    }
}

impl From<BucketError> for ClusterError {
    fn from(error: BucketError) -> ClusterError {
        let failure = Failure::from(error);
        let hint = if failure.hint.is_empty() { String::new() } else { format!("; {}", failure.hint) };
        ClusterError::Bucket(format!("{}{hint}", failure.message))
    }
}

/// A controller without guests refuses a bucket that does not work. One that has guests must come back whatever the bucket
/// does: their leases are running out.
async fn check_bucket(bucket: &Bucket, no_guests: bool) -> Result<(), BucketError> {
    if no_guests {
        return bucket.check().await;
    }
    let bucket = bucket.clone();
    tokio::spawn(async move {
        if let Err(error) = bucket.check().await {
            let failure = Failure::from(error);
            tracing::error!(
                hint = failure.hint,
                "{}; checkpoints and restores will fail until it works",
                failure.message
            );
        }
    });
    Ok(())
}

/// Waits until no operation is under way, or for a while.
async fn drain(ledger: &Ledger) {
    let mut states = ledger.watch();
    let quiet = states.wait_for(|state| state.active().next().is_none());
    match tokio::time::timeout(DRAIN_MAX, quiet).await {
        Ok(_) => tracing::info!("drained"),
        Err(_) => tracing::warn!("operations are still under way; the next start takes them up"),
    }
}

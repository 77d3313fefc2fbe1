//! The connection to the controller: TLS 1.3, both sides with a certificate of the cluster's authority.
//!
//! A certificate of the right authority is not enough, since every host has one: the other side must bear an identity
//! `spiffe://godwit/controller/...`. Knows addresses and certificates, no command.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use proto::status::Code;
use proto::v1::control_client::ControlClient;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::failure::Failure;
use super::settings::{Settings, TlsFiles};
use crate::tls::{TlsError, check_days};

/// Calls of the controller.
pub type Client = ControlClient<Channel>;

/// Name that every certificate of a cluster bears beside its identity.
const SERVER_NAME: &str = "godwit";
/// What the identity of a controller begins with.
const CONTROLLER: &str = "spiffe://godwit/controller/";
const CONNECT: Duration = Duration::from_secs(5);
const MESSAGE_BYTES_MAX: usize = 300 << 20;

/// Connects.
///
/// # Errors
/// A certificate file that is missing or wrong, a controller that does not answer or is none.
pub async fn connect(settings: &Settings) -> Result<Client, Failure> {
    let address = settings.controller.clone();
    let tls = Arc::new(tls_config(&settings.tls)?);
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| Failure::bad_input(format!("{address:?} is not an address of the form host:port")))?
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(10))
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20);
    let channel = endpoint.connect_with_connector(Connector { address: address.clone(), tls }).await.map_err(|e| {
        Failure::new(Code::Unreachable, format!("the controller at {address} does not answer: {}", root_cause(&e)))
            .hint("is it running, and is it the one that --config or GODWIT_CONFIG means?")
    })?;
    Ok(ControlClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// The last `source()`: transport errors put the news there.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn tls_config(files: &TlsFiles) -> Result<rustls::ClientConfig, Failure> {
    let wrong = |path: &Path, why: &dyn std::fmt::Display| {
        Failure::bad_input(format!("cannot use {}: {why}", path.display()))
            .hint("tls = { ca, cert, key } in the configuration name PEM files")
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(&files.ca).map_err(|e| wrong(&files.ca, &e))? {
        roots.add(certificate).map_err(|e| wrong(&files.ca, &e))?;
    }
    let chain = certificates(&files.cert).map_err(|e| wrong(&files.cert, &e))?;
    if let Some(Err(error @ TlsError::Days { .. })) = chain.first().map(|own| check_days(&files.cert, own)) {
        return Err(Failure::new(Code::Denied, error.to_string())
            .hint("have a new certificate issued; the controller would refuse this one"));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| wrong(&files.key, &e))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the ring provider offers TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(|e| wrong(&files.key, &e))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, rustls_pki_types::pem::Error> {
    CertificateDer::pem_file_iter(path)?.collect()
}

/// Opens one checked connection whenever the channel asks for one.
#[derive(Clone)]
struct Connector {
    address: String,
    tls: Arc<rustls::ClientConfig>,
}

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Connector { address, tls } = self.clone();
        Box::pin(async move {
            let socket = TcpStream::connect(&address).await?;
            socket.set_nodelay(true)?;
            let name = ServerName::try_from(SERVER_NAME).expect("a plain name is a DNS name");
            let stream = TlsConnector::from(tls).connect(name, socket).await?;
            let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
            match chain.first().map(|certificate| identities(certificate)) {
                Some(found) if found.iter().any(|identity| identity.starts_with(CONTROLLER)) => {
                    Ok(TokioIo::new(stream))
                }
                found => Err(std::io::Error::other(format!(
                    "who answers there is no controller but {}",
                    found.unwrap_or_default().join(", ")
                ))),
            }
        })
    }
}

/// URI names of a certificate.
fn identities(certificate: &CertificateDer<'_>) -> Vec<String> {
    use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let uri = |name: &GeneralName<'_>| if let GeneralName::URI(uri) = name { Some((*uri).to_owned()) } else { None };
    names.value.general_names.iter().filter_map(uri).collect()
}

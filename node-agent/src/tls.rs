//! Who is on the other side: TLS 1.3, both sides certified by the cluster's authority, names by SPIFFE.
//!
//! A certificate bears one URI, `spiffe://godwit/<role>/<name>` (SPIFFE X.509-SVID 2). Addresses are not identities, so
//! DNS names are not looked at: a client says which identity it expects. Files are read again when they change; new
//! connections use the new ones. Refuses to know which call needs which role: that is said beside each call (`rpc`).

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{CipherSuite, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tonic::transport::{Channel, Endpoint, Uri};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use crate::config::TlsFiles;

const TRUST_DOMAIN: &str = "spiffe://godwit/";
/// The TLS library reads 4 KiB at a time; reading ahead for it saves most of the system calls.
const READ_AHEAD_BYTES: usize = 64 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Whom a certificate names.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub struct Identity {
    /// "host", "controller" or "operator".
    pub role: String,
    /// The name within the role.
    pub name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.role, self.name)
    }
}

impl Identity {
    /// Of the cluster's controller.
    pub fn controller() -> Identity {
        Identity { role: "controller".to_owned(), name: "main".to_owned() }
    }

    /// From `role/name`, with or without the trust domain in front.
    pub fn parse(text: &str) -> Option<Identity> {
        let (role, name) = text.strip_prefix(TRUST_DOMAIN).unwrap_or(text).split_once('/')?;
        let known = matches!(role, "host" | "controller" | "operator");
        let plain = !name.is_empty() && name.len() <= 64 && !name.contains('/');
        (known && plain).then(|| Identity { role: role.to_owned(), name: name.to_owned() })
    }

    fn of_certificate(certificate: &[u8]) -> Result<Identity, TlsError> {
        let parsed = parse(certificate)?;
        let names = parsed.subject_alternative_name().map_err(|e| TlsError::Certificate(e.to_string()))?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .collect();
        match uris[..] {
            [uri] if uri.starts_with(TRUST_DOMAIN) => {
                Identity::parse(uri).ok_or_else(|| TlsError::Certificate(format!("{uri} is no identity")))
            }
            _ => Err(TlsError::Certificate(format!("one URI {TRUST_DOMAIN}<role>/<name> is needed, not {uris:?}"))),
        }
    }
}

/// Why there is no trust.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file.
    #[error("{path}: {text}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        text: String,
    },
    /// A certificate that names nobody.
    #[error("certificate: {0}")]
    Certificate(String),
    /// A certificate outside of its days.
    #[error("{path} {word} valid (from {from} to {until})")]
    Days {
        /// The file.
        path: PathBuf,
        /// "is not yet" or "is no longer".
        word: &'static str,
        /// First instant.
        from: String,
        /// Last instant.
        until: String,
    },
    /// The library's word.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// The authority's certificate cannot verify clients.
    #[error(transparent)]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

struct Loaded {
    server: Arc<ServerConfig>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    expires_unix_s: i64,
}

/// This process's identity and whom it trusts; follows its files.
pub struct Tls {
    files: TlsFiles,
    provider: Arc<CryptoProvider>,
    loaded: ArcSwap<Loaded>,
    changed: Mutex<[Option<SystemTime>; 3]>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tls({})", self.files.cert.display())
    }
}

fn modified(files: &TlsFiles) -> [Option<SystemTime>; 3] {
    [&files.ca, &files.cert, &files.key].map(|path| std::fs::metadata(path).and_then(|file| file.modified()).ok())
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError`]; it names the file.
    pub fn load(files: TlsFiles) -> Result<Tls, TlsError> {
        let mut provider = rustls::crypto::ring::default_provider();
        // The lighter of two strong ciphers first: a lane is as fast as its cipher.
        provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        let provider = Arc::new(provider);
        let changed = Mutex::new(modified(&files));
        let loaded = ArcSwap::from_pointee(read(&files, &provider)?);
        Ok(Tls { files, provider, loaded, changed })
    }

    /// Whom this process's own certificate names.
    ///
    /// # Errors
    /// A certificate without an identity.
    pub fn own_identity(&self) -> Result<Identity, TlsError> {
        let loaded = self.loaded.load();
        let own = loaded.chain.first().ok_or_else(|| TlsError::Certificate("the chain is empty".to_owned()))?;
        Identity::of_certificate(own)
    }

    /// Reads the files again if one has changed. Files that do not fit together yet are left for the next time.
    pub fn refresh(&self) {
        let now = modified(&self.files);
        if *self.changed.lock().unwrap_or_else(PoisonError::into_inner) == now {
            return;
        }
        match read(&self.files, &self.provider) {
            Ok(loaded) => {
                self.loaded.store(Arc::new(loaded));
                *self.changed.lock().unwrap_or_else(PoisonError::into_inner) = now;
                tracing::info!(cert = %self.files.cert.display(), "certificates were read again");
            }
            Err(error) => {
                metrics::counter!(crate::metrics::CERTIFICATE_REFUSALS).increment(1);
                tracing::warn!(%error, "changed certificates are not usable: the old ones stay");
            }
        }
    }

    /// When this process's own certificate ends, Unix time in seconds.
    pub fn expires_unix_s(&self) -> i64 {
        self.loaded.load().expires_unix_s
    }

    /// Greets a client: its certificate is checked, its identity read.
    ///
    /// # Errors
    /// The handshake failed, or the certificate names nobody.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<PeerStream> {
        let acceptor = TlsAcceptor::from(Arc::clone(&self.loaded.load().server));
        let stream = acceptor.accept(BufReader::with_capacity(READ_AHEAD_BYTES, stream)).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).cloned();
        let certificate = certificate.ok_or_else(|| io::Error::other("the client has no certificate"))?;
        let identity = Identity::of_certificate(&certificate).map_err(io::Error::other)?;
        Ok(PeerStream { stream: TlsStream::Server(stream), peer: Peer(Arc::new(identity)) })
    }

    /// Connects to `address` (host:port), whose certificate must name `identity`. `tune` sets the endpoint's windows.
    ///
    /// # Errors
    /// The address is none, nobody answers, or somebody else does.
    pub async fn connect(
        &self,
        address: &str,
        identity: &Identity,
        tune: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Channel, tonic::transport::Error> {
        let config = Arc::new(self.client(identity.clone()));
        // The scheme is plain: this connector makes the TLS stream itself.
        let endpoint = tune(Endpoint::from_shared(format!("http://{address}"))?.connect_timeout(CONNECT_TIMEOUT));
        let connector = tower::service_fn(move |uri: Uri| {
            let config = Arc::clone(&config);
            async move {
                let authority = uri.authority().ok_or_else(|| io::Error::other("no address"))?.to_string();
                let stream = TcpStream::connect(&authority).await?;
                stream.set_nodelay(true)?;
                let name = ServerName::try_from("godwit").map_err(io::Error::other)?;
                let stream = BufReader::with_capacity(READ_AHEAD_BYTES, stream);
                let stream = TlsConnector::from(config).connect(name, stream).await?;
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        endpoint.connect_with_connector(connector).await
    }

    fn client(&self, expected: Identity) -> ClientConfig {
        let loaded = self.loaded.load_full();
        let verifier =
            IdentityVerifier { expected, roots: Arc::clone(&loaded.roots), provider: Arc::clone(&self.provider) };
        let config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the ring provider has TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = config
            .with_client_auth_cert(loaded.chain.clone(), loaded.key.clone_key())
            .expect("the same key and chain were accepted for the server side when they were read");
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

fn read(files: &TlsFiles, provider: &Arc<CryptoProvider>) -> Result<Loaded, TlsError> {
    let bad = |path: &PathBuf| {
        let path = path.clone();
        move |text: rustls::pki_types::pem::Error| TlsError::File { path, text: text.to_string() }
    };
    let certificates = |path: &PathBuf| -> Result<Vec<CertificateDer<'static>>, TlsError> {
        CertificateDer::pem_file_iter(path).map_err(bad(path))?.collect::<Result<_, _>>().map_err(bad(path))
    };
    let mut roots = RootCertStore::empty();
    for authority in certificates(&files.ca)? {
        roots.add(authority)?;
    }
    let roots = Arc::new(roots);
    let chain = certificates(&files.cert)?;
    let expires_unix_s = check_days(&files.cert, &chain)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(bad(&files.key))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(provider)).build()?;
    let mut server = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain.clone(), key.clone_key())?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Loaded { server: Arc::new(server), roots, chain, key, expires_unix_s })
}

fn parse(certificate: &[u8]) -> Result<X509Certificate<'_>, TlsError> {
    let parsed = x509_parser::parse_x509_certificate(certificate);
    parsed.map(|(_, parsed)| parsed).map_err(|e| TlsError::Certificate(e.to_string()))
}

/// A certificate that nobody would believe is not taken: who has a good one keeps it. Returns when it ends.
fn check_days(path: &std::path::Path, chain: &[CertificateDer<'_>]) -> Result<i64, TlsError> {
    let own = chain.first().ok_or_else(|| TlsError::Certificate(format!("{} holds none", path.display())))?;
    let parsed = parse(own)?;
    let days = parsed.validity();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
    let word = match now {
        now if now < days.not_before.timestamp() => "is not yet",
        now if now > days.not_after.timestamp() => "is no longer",
        _ => return Ok(days.not_after.timestamp()),
    };
    let (from, until) = (days.not_before.to_string(), days.not_after.to_string());
    Err(TlsError::Days { path: path.to_owned(), word, from, until })
}

/// Verifies the chain up to the cluster's authority, and the identity instead of a DNS name.
#[derive(Debug)]
struct IdentityVerifier {
    expected: Identity,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for IdentityVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = rustls::server::ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        match Identity::of_certificate(end_entity) {
            Ok(found) if found == self.expected => Ok(ServerCertVerified::assertion()),
            Ok(found) => Err(rustls::Error::General(format!("{} was expected, {found} answers", self.expected))),
            Err(error) => Err(rustls::Error::General(error.to_string())),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Who makes a call; in the extensions of every request.
#[derive(Clone, Debug)]
pub struct Peer(pub Arc<Identity>);

/// A connection whose other side is known.
pub struct PeerStream {
    stream: TlsStream<BufReader<TcpStream>>,
    peer: Peer,
}

impl tonic::transport::server::Connected for PeerStream {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_a_role_and_a_name() {
        let identity = Identity::parse("spiffe://godwit/host/hostA").unwrap();
        assert_eq!((identity.role.as_str(), identity.name.as_str()), ("host", "hostA"));
        assert_eq!(Identity::parse("controller/main").unwrap().to_string(), "controller/main");
        for text in ["", "host", "host/", "root/me", "host/a/b", "spiffe://other/host/a"] {
            assert_eq!(Identity::parse(text), None, "{text:?}");
        }
    }
}

//! Mutual TLS 1.3 with one authority, and who is at the other end.
//!
//! Every certificate bears exactly one SPIFFE URI as subject alternative name: `spiffe://godwit/host/hostA`,
//! `spiffe://godwit/controller/main`, `spiffe://godwit/operator/admin`. Names and addresses of machines mean nothing
//! here. The files are read again when they change; connections that stand keep the certificate they began with. This
//! file knows nothing of what an identity may do beyond its role.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
};
use x509_parser::extensions::GeneralName;

use crate::config::TlsFiles;

const TRUST_DOMAIN: &str = "spiffe://godwit/";
/// How often the files' dates are looked at.
const WATCH_EVERY: Duration = Duration::from_secs(2);

/// What an identity may be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Role {
    /// A node-agent.
    Host,
    /// A controller.
    Controller,
    /// A person or a script with `ctl`.
    Operator,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Host => "host",
            Role::Controller => "controller",
            Role::Operator => "operator",
        })
    }
}

/// Who is at the other end of a connection.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Identity {
    /// What it may be.
    pub role: Role,
    /// Its name within the role.
    pub name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.role, self.name)
    }
}

impl FromStr for Identity {
    type Err = TlsError;

    /// Of the form `host/hostA`.
    fn from_str(text: &str) -> Result<Identity, TlsError> {
        let bad = || TlsError::Identity(text.chars().take(200).collect());
        let (role, name) = text.split_once('/').ok_or_else(bad)?;
        let role = match role {
            "host" => Role::Host,
            "controller" => Role::Controller,
            "operator" => Role::Operator,
            _ => return Err(bad()),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
            return Err(bad());
        }
        Ok(Identity { role, name: name.into() })
    }
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or holds no PEM of the kind.
    #[error("{path}: {source}")]
    Pem {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// Certificate and key do not make a configuration.
    #[error("the certificates cannot be used: {0}")]
    Rustls(#[from] Error),
    /// The authority's file makes no verifier of clients.
    #[error("the authority's certificate cannot be used: {0}")]
    Authority(#[from] rustls::server::VerifierBuilderError),
    /// Not an identity of this cluster.
    #[error("{0:?} is no identity: host/NAME, controller/NAME or operator/NAME is expected")]
    Identity(String),
    /// A certificate that is not one of ours.
    #[error("the certificate bears {0} SPIFFE identities; exactly one of {TRUST_DOMAIN} is expected")]
    Certificate(usize),
    /// A certificate that is not X.509.
    #[error("the certificate does not parse")]
    Malformed,
    /// A certificate outside of its days.
    #[error("{path} {word} valid (from {from} to {until})")]
    Days {
        /// The file.
        path: std::path::PathBuf,
        /// "is not yet" or "is no longer".
        word: &'static str,
        /// First instant.
        from: String,
        /// Last instant.
        until: String,
    },
}

/// The identity that a certificate bears.
///
/// # Errors
/// [`TlsError::Malformed`], [`TlsError::Certificate`], [`TlsError::Identity`].
pub fn identity_of(certificate: &CertificateDer<'_>) -> Result<Identity, TlsError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|_| TlsError::Malformed)?;
    let names = parsed.subject_alternative_name().map_err(|_| TlsError::Malformed)?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(TRUST_DOMAIN),
            _ => None,
        })
        .collect();
    match uris[..] {
        [one] => one.parse(),
        _ => Err(TlsError::Certificate(uris.len())),
    }
}

struct Loaded {
    server: Arc<ServerConfig>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    identity: Identity,
    expires_unix_s: i64,
}

/// This process's certificates, always as they are in the files now.
pub struct Tls {
    files: TlsFiles,
    loaded: ArcSwap<Loaded>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// Any [`TlsError`].
    pub fn load(files: &TlsFiles) -> Result<Tls, TlsError> {
        Ok(Tls { files: files.clone(), loaded: ArcSwap::from_pointee(load(files)?) })
    }

    /// Who this process is.
    pub fn identity(&self) -> Identity {
        self.loaded.load().identity.clone()
    }

    /// When this process's own certificate ends, Unix time in seconds.
    pub fn expires_unix_s(&self) -> i64 {
        self.loaded.load().expires_unix_s
    }

    /// Configuration of a server: any client of the cluster's authority.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.loaded.load().server.clone()
    }

    /// Configuration of a client that will speak only with this identity.
    ///
    /// # Errors
    /// [`TlsError::Rustls`].
    pub fn client(&self, expected: &Identity) -> Result<Arc<ClientConfig>, TlsError> {
        let loaded = self.loaded.load();
        let provider = Arc::new(ring::default_provider());
        let verifier =
            PeerVerifier { roots: loaded.roots.clone(), provider: provider.clone(), expected: expected.clone() };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(loaded.chain.clone(), loaded.key.clone_key())?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// Reads the files again whenever their dates change. Never returns.
    pub async fn watch(&self) {
        let mut seen = self.dates();
        loop {
            tokio::time::sleep(WATCH_EVERY).await;
            let now = self.dates();
            if now == seen {
                continue;
            }
            match load(&self.files) {
                Ok(loaded) => {
                    tracing::info!(identity = %loaded.identity, "certificates were read again");
                    self.loaded.store(Arc::new(loaded));
                    seen = now;
                }
                // Likely half written: the old ones are kept, and the next look tries again.
                Err(error) => {
                    metrics::counter!(crate::metrics::CERTIFICATE_REFUSALS).increment(1);
                    tracing::warn!(%error, "changed certificates cannot be used: the old ones stay");
                }
            }
        }
    }

    fn dates(&self) -> [Option<SystemTime>; 3] {
        [&self.files.ca, &self.files.cert, &self.files.key]
            .map(|path| std::fs::metadata(path).and_then(|data| data.modified()).ok())
    }
}

fn load(files: &TlsFiles) -> Result<Loaded, TlsError> {
    let certificates = |path: &std::path::PathBuf| {
        let pem = |source| TlsError::Pem { path: path.clone(), source };
        CertificateDer::pem_file_iter(path).map_err(pem)?.collect::<Result<Vec<_>, _>>().map_err(pem)
    };
    let chain = certificates(&files.cert)?;
    let key =
        PrivateKeyDer::from_pem_file(&files.key).map_err(|source| TlsError::Pem { path: files.key.clone(), source })?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.ca)? {
        roots.add(certificate)?;
    }
    let roots = Arc::new(roots);
    let own = chain.first().ok_or(TlsError::Malformed)?;
    let identity = identity_of(own)?;
    let expires_unix_s = check_days(&files.cert, own)?;
    let provider = Arc::new(ring::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain.clone(), key.clone_key())?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Loaded { server: Arc::new(server), roots, chain, key, identity, expires_unix_s })
}

/// A certificate that nobody would believe is not taken: who has a good one keeps it. Returns when it ends.
///
/// # Errors
/// [`TlsError::Days`], [`TlsError::Malformed`].
pub fn check_days(path: &std::path::Path, certificate: &CertificateDer<'_>) -> Result<i64, TlsError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|_| TlsError::Malformed)?;
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

/// Checks a server's chain and its SPIFFE identity instead of a host name.
#[derive(Debug)]
struct PeerVerifier {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    expected: Identity,
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        match identity_of(end_entity) {
            Ok(found) if found == self.expected => Ok(ServerCertVerified::assertion()),
            Ok(found) => Err(Error::General(format!("the certificate is of {found}, not of {}", self.expected))),
            Err(_) => Err(Error::InvalidCertificate(CertificateError::NotValidForName)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_survive_text_and_refuse_others() {
        let identity: Identity = "host/hostA".parse().unwrap();
        assert_eq!(identity.to_string(), "host/hostA");
        for text in ["", "host", "host/", "root/a", "host/a/b", "host/..%2f", "operator/a b"] {
            assert!(text.parse::<Identity>().is_err(), "{text:?}");
        }
    }
}

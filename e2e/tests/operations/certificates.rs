//! Certificates change under running daemons: new connections use the new ones, guests notice nothing, and one that has
//! ended is refused by name.

use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;

use e2e::cluster::{Cluster, wait};
use proto::status::Code;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType, date_time_ymd};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use super::BUSY;

/// The certificate's last year.
#[derive(Clone, Copy)]
enum Days {
    Good,
    Ended,
}

fn tls(cluster: &Cluster, file: &str) -> PathBuf {
    cluster.dir().join("tls").join(file)
}

/// A new certificate from the cluster's authority in the place of the old one.
fn issue(cluster: &Cluster, identity: &str, file: &str, days: Days) {
    let key = KeyPair::from_pem(&std::fs::read_to_string(tls(cluster, "ca.key")).unwrap()).unwrap();
    let mut authority = CertificateParams::default();
    authority.distinguished_name = rcgen::DistinguishedName::new();
    authority.distinguished_name.push(DnType::CommonName, "Godwit dev cluster");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let issuer = Issuer::new(authority, key);
    let mut leaf = CertificateParams::default();
    let names = ["godwit", "localhost"].map(|name| SanType::DnsName(name.try_into().unwrap()));
    leaf.subject_alt_names = vec![SanType::URI(format!("spiffe://godwit/{identity}").try_into().unwrap())];
    leaf.subject_alt_names.extend(names);
    (leaf.not_before, leaf.not_after) = match days {
        Days::Good => (date_time_ymd(2020, 1, 1), date_time_ymd(2099, 12, 31)),
        Days::Ended => (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1)),
    };
    let key = KeyPair::generate().unwrap();
    let certificate = leaf.signed_by(&key, &issuer).unwrap();
    // As tools do: beside it, then renamed; between the two renames key and certificate do not fit together.
    for (end, text) in [("key", key.serialize_pem()), ("pem", certificate.pem())] {
        let beside = tls(cluster, &format!("{file}.{end}.new"));
        std::fs::write(&beside, text).unwrap();
        std::fs::rename(beside, tls(cluster, &format!("{file}.{end}"))).unwrap();
    }
}

/// Believes everybody: the test looks at what was shown.
#[derive(Debug)]
struct Anyone(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Connects with the certificate of `file`; what the other side shows, and how it ends the connection.
fn shown(cluster: &Cluster, address: &str, file: &str) -> (Vec<u8>, String) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = vec![CertificateDer::from_pem_file(tls(cluster, &format!("{file}.pem"))).unwrap()];
    let key = PrivateKeyDer::from_pem_file(tls(cluster, &format!("{file}.key"))).unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_client_auth_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut connection = rustls::ClientConnection::new(Arc::new(config), "godwit".try_into().unwrap()).unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    let mut ended = String::new();
    while connection.is_handshaking() {
        connection.complete_io(&mut stream).unwrap();
    }
    // What the server thinks of our certificate comes after our handshake: its settings, or an alert.
    if let Err(error) = connection.complete_io(&mut stream) {
        ended = error.to_string();
    }
    (connection.peer_certificates().unwrap()[0].to_vec(), ended)
}

fn on_disk(cluster: &Cluster, file: &str) -> Vec<u8> {
    CertificateDer::from_pem_file(tls(cluster, &format!("{file}.pem"))).unwrap().to_vec()
}

#[test]
fn new_certificates_are_taken_up_and_ended_ones_refused_while_guests_run() {
    let cluster = Cluster::up(2);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 3);
    let runner = cluster.runner("hostA", "vm1");
    let daemons = [("controller", "controller/main"), ("hostA", "host/hostA"), ("hostB", "host/hostB")];
    let before: Vec<_> = daemons.iter().map(|(file, _)| (cluster.daemon(file), on_disk(&cluster, file))).collect();
    for (file, identity) in daemons {
        issue(&cluster, identity, file, Days::Good);
    }
    for ((file, _), (pid, old)) in daemons.iter().zip(&before) {
        let listen = cluster.setting(file, "listen");
        wait(&format!("{file} to show its new certificate"), || {
            let (now, _) = shown(&cluster, &listen, "admin");
            assert!(now == *old || now == on_disk(&cluster, file));
            (now != *old).then_some(())
        });
        assert_eq!(cluster.daemon(file), *pid, "{file} was restarted");
    }
    cluster.goes_on("vm1", 3);
    assert_eq!(cluster.runner("hostA", "vm1"), runner, "the guest's process is another one");
    cluster.ok(["migrate", "vm1", "--to", "hostB"]);
    cluster.goes_on("vm1", 3);

    // Certificates that have ended are not taken up: the good ones stay, and the log and the numbers say so.
    let good: Vec<_> =
        daemons.iter().map(|(file, _)| shown(&cluster, &cluster.setting(file, "listen"), "admin").0).collect();
    for (file, identity) in daemons {
        issue(&cluster, identity, file, Days::Ended);
    }
    for ((file, _), good) in daemons.iter().zip(good) {
        wait(&format!("{file} to refuse its ended certificate"), || {
            let log = std::fs::read_to_string(cluster.log(file)).unwrap();
            log.contains(&format!("{file}.pem is no longer valid")).then_some(())
        });
        assert_eq!(shown(&cluster, &cluster.setting(file, "listen"), "admin").0, good);
        let page = cluster.metrics(file);
        let refusals = page.lines().find(|line| line.contains("certificate_refusals_total") && !line.starts_with('#'));
        assert!(!refusals.unwrap().ends_with(" 0"), "{refusals:?}");
    }
    cluster.ok(["migrate", "vm1", "--to", "hostA"]);
    cluster.goes_on("vm1", 3);
    for (file, identity) in daemons {
        issue(&cluster, identity, file, Days::Good);
    }
}

#[test]
fn who_comes_with_an_ended_or_foreign_certificate_is_told_so() {
    let cluster = Cluster::up(1);
    // ctl looks at its own certificate before it asks.
    issue(&cluster, "operator/admin", "admin", Days::Ended);
    let said = cluster.fails(Code::Denied, ["vm", "ls"]);
    assert!(said.contains("admin.pem is no longer valid") && said.contains("2021"), "{said}");
    // Who does not look is refused at the door.
    for daemon in ["controller", "hostA"] {
        let (_, ended) = shown(&cluster, &cluster.setting(daemon, "listen"), "admin");
        assert!(ended.contains("Expired"), "{daemon}: {ended:?}");
        let page = cluster.metrics(daemon);
        let refused = page.lines().find(|line| line.contains("handshakes_refused_total") && !line.starts_with('#'));
        assert!(!refused.unwrap().ends_with(" 0"), "{daemon}: {refused:?}");
    }
    // A host is no operator.
    issue(&cluster, "host/hostA", "admin", Days::Good);
    let said = cluster.fails(Code::Denied, ["vm", "ls"]);
    assert!(said.contains("host/hostA"), "{said}");
    issue(&cluster, "operator/admin", "admin", Days::Good);
    cluster.ok(["vm", "ls"]);
    // A daemon does not begin with a certificate that nobody believes.
    cluster.kill(cluster.daemon("hostA"));
    issue(&cluster, "host/hostA", "hostA", Days::Ended);
    let config = cluster.dir().join("hostA.toml");
    let ran = cluster.program("node-agent").arg("--config").arg(config).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(!ran.status.success() && said.contains("hostA.pem is no longer valid"), "{said}");
    issue(&cluster, "host/hostA", "hostA", Days::Good);
    cluster.start(1);
}

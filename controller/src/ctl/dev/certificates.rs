//! Certificates of a dev cluster: one authority, and one certificate with one identity for each process and operator.
//!
//! An identity is a URI name `spiffe://godwit/ROLE/NAME`. Every certificate also bears the DNS names `godwit` and
//! `localhost` and the address 127.0.0.1, so that any TLS library agrees with the address it dialled; who the other side
//! is, the identity alone says. Keys are readable by their owner only. What is there is never made again.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use proto::status::Code;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::ctl::failure::Failure;

/// Whom a certificate is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `host`, `controller` or `operator`.
    pub role: &'static str,
    /// Name within the role.
    pub name: String,
    /// Name of the files, without extension.
    pub file: String,
}

impl Identity {
    fn uri(&self) -> String {
        format!("spiffe://godwit/{}/{}", self.role, self.name)
    }
}

/// Certificate and key files of a name.
pub fn files(folder: &Path, file: &str) -> (PathBuf, PathBuf) {
    (folder.join(format!("{file}.pem")), folder.join(format!("{file}.key")))
}

/// Makes what is missing: the authority, and a certificate for each identity.
///
/// # Errors
/// A file cannot be read or written, or is not what it should be.
pub fn ensure(folder: &Path, identities: &[Identity]) -> Result<(), Failure> {
    let (ca_pem, ca_key) = files(folder, "ca");
    if !ca_pem.exists() {
        let key = KeyPair::generate().map_err(|e| failed(&ca_key, &e))?;
        let certificate = authority().self_signed(&key).map_err(|e| failed(&ca_pem, &e))?;
        write_key(&ca_key, &key)?;
        std::fs::write(&ca_pem, certificate.pem()).map_err(|e| Failure::file("write", &ca_pem, &e))?;
    }
    let key = std::fs::read_to_string(&ca_key).map_err(|e| Failure::file("read", &ca_key, &e))?;
    let key = KeyPair::from_pem(&key).map_err(|e| failed(&ca_key, &e))?;
    // The authority is made from constants, so that name and key are all that signing needs.
    let issuer = Issuer::new(authority(), key);
    for identity in identities {
        let (pem, key_file) = files(folder, &identity.file);
        if pem.exists() && key_file.exists() {
            continue;
        }
        let key = KeyPair::generate().map_err(|e| failed(&key_file, &e))?;
        let parameters = leaf(identity).map_err(|e| failed(&pem, &e))?;
        let certificate = parameters.signed_by(&key, &issuer).map_err(|e| failed(&pem, &e))?;
        write_key(&key_file, &key)?;
        std::fs::write(&pem, certificate.pem()).map_err(|e| Failure::file("write", &pem, &e))?;
    }
    Ok(())
}

fn failed(path: &Path, error: &rcgen::Error) -> Failure {
    Failure::new(Code::Internal, format!("cannot make {}: {error}", path.display()))
        .hint("remove the cluster's tls folder to have all certificates made anew")
}

fn authority() -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = named("Godwit dev cluster");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters
}

fn leaf(identity: &Identity) -> Result<CertificateParams, rcgen::Error> {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = named(&format!("{}/{}", identity.role, identity.name));
    parameters.subject_alt_names = vec![
        SanType::URI(identity.uri().try_into()?),
        SanType::DnsName("godwit".to_owned().try_into()?),
        SanType::DnsName("localhost".to_owned().try_into()?),
        SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)),
    ];
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    parameters.use_authority_key_identifier_extension = true;
    Ok(parameters)
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// Never readable by others, not even for an instant.
fn write_key(path: &Path, key: &KeyPair) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::file("write", path, &e);
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    file.write_all(key.serialize_pem().as_bytes()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject as _;
    use std::os::unix::fs::PermissionsExt as _;
    use x509_parser::prelude::{FromDer as _, X509Certificate};

    #[test]
    fn later_certificates_come_from_the_same_authority_and_keys_are_private() {
        let folder = std::env::temp_dir().join(format!("godwit-tls-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let identity = |name: &str| Identity { role: "host", name: name.into(), file: name.into() };
        ensure(&folder, &[identity("hostA")]).unwrap();
        let first = std::fs::read(folder.join("hostA.pem")).unwrap();
        ensure(&folder, &[identity("hostA"), identity("hostB")]).unwrap();
        assert_eq!(std::fs::read(folder.join("hostA.pem")).unwrap(), first);

        let ca = CertificateDer::from_pem_file(folder.join("ca.pem")).unwrap();
        let (_, ca) = X509Certificate::from_der(&ca).unwrap();
        for name in ["hostA", "hostB"] {
            let leaf = CertificateDer::from_pem_file(folder.join(format!("{name}.pem"))).unwrap();
            let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
            assert_eq!(leaf.issuer(), ca.subject());
            let names = format!("{:?}", leaf.subject_alternative_name().unwrap().unwrap().value);
            assert!(names.contains(&format!("spiffe://godwit/host/{name}")), "{names}");
            let mode = std::fs::metadata(folder.join(format!("{name}.key"))).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

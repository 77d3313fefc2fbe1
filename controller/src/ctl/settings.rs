//! Reads `ctl.toml`: which controller, and which certificate proves who we are.
//!
//! ```toml
//! controller = "127.0.0.1:7000"
//! tls = { ca = "tls/ca.pem", cert = "tls/admin.pem", key = "tls/admin.key" }
//! ```
//! Paths that are not absolute are meant from the file's directory. Opens no connection.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::failure::Failure;

/// What `ctl.toml` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// host:port of the controller.
    pub controller: String,
    /// Certificates.
    pub tls: TlsFiles,
}

/// Certificate files, PEM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The cluster's certificate authority.
    pub ca: PathBuf,
    /// Our certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Settings {
    /// Reads the file that `--config` or `GODWIT_CONFIG` names.
    ///
    /// # Errors
    /// Nothing is named, or the file cannot be read or is wrong.
    pub fn load(named: Option<&Path>) -> Result<Settings, Failure> {
        let path = named.ok_or_else(|| {
            Failure::bad_input("no cluster is named").hint(
                "give --config FILE or set GODWIT_CONFIG; `ctl dev up --dir D` makes a cluster and its D/ctl.toml",
            )
        })?;
        let text = std::fs::read_to_string(path).map_err(|e| {
            Failure::file("read the configuration", path, &e).hint("--config or GODWIT_CONFIG names a ctl.toml")
        })?;
        Settings::parse(&text, path.parent().unwrap_or(Path::new("")))
            .map_err(|e| Failure::bad_input(format!("{} is not a ctl.toml: {}", path.display(), e.message())))
    }

    fn parse(text: &str, base: &Path) -> Result<Settings, toml::de::Error> {
        let mut settings: Settings = toml::from_str(text)?;
        let tls = &mut settings.tls;
        for path in [&mut tls.ca, &mut tls.cert, &mut tls.key] {
            *path = base.join(&path);
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_meant_from_the_file() {
        let text = "controller = 'localhost:1'\ntls = { ca = 'ca.pem', cert = '/abs/c.pem', key = 'k' }";
        let settings = Settings::parse(text, Path::new("/etc/godwit")).unwrap();
        assert_eq!(settings.tls.ca, Path::new("/etc/godwit/ca.pem"));
        assert_eq!(settings.tls.cert, Path::new("/abs/c.pem"));
    }

    #[test]
    fn unknown_keys_are_refused_and_no_file_is_explained() {
        assert!(Settings::parse("controler = 'x'", Path::new("/")).is_err());
        assert!(Settings::load(None).unwrap_err().hint.unwrap().contains("GODWIT_CONFIG"));
    }
}

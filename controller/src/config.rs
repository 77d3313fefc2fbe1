//! Settings of the controller: one TOML file, read once at start.
//!
//! ```toml
//! listen   = "0.0.0.0:7400"            # gRPC: Control, Fleet, Lanes
//! address  = "controller.example:7400" # how hosts reach `listen`; default: `listen`
//! store    = "/var/lib/godwit/controller.redb"
//! bucket   = "file:/var/lib/godwit/bucket" # or "s3://...", or a table: see `bucket/settings.rs`
//! keys     = "/var/lib/godwit/keys"    # the cluster keys; default: beside `store`
//! lease_ms = 10000
//! checkpoints_at_once          = 4     # in the cluster; more of them wait in line
//! checkpoints_at_once_per_host = 2
//! sweep_every_ms = 21600000             # packs that no checkpoint needs are removed so often; 0: only when asked
//! metrics  = "127.0.0.1:9400"          # Prometheus over HTTP; left out: none
//! log      = "text"                    # or "json"
//! filter   = "info"                    # which log lines: a level, or directives such as "info,controller=debug"
//!
//! [tls]
//! ca   = "/etc/godwit/ca.pem"
//! cert = "/etc/godwit/controller.pem"
//! key  = "/etc/godwit/controller.key"
//! ```
//! Only this file reads settings; unknown keys are refused, so that a misspelt one is not silently a default.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::bucket::BucketError;
use crate::bucket::settings::BucketSettings;
use crate::saga::gate::Limits;

/// Shortest lease that heartbeats can keep up with, milliseconds.
const LEASE_MS_MIN: u64 = 500;
/// Longest lease: how long a restore away from a dead host may have to wait, milliseconds.
const LEASE_MS_MAX: u64 = 600_000;

/// Everything that an operator can set.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where gRPC is served. Port 0 picks a free one.
    pub listen: SocketAddr,
    /// How agents reach `listen`, `host:port`; the address that was bound if empty.
    #[serde(default)]
    pub address: String,
    /// The ledger's file.
    pub store: PathBuf,
    /// Where checkpoints lie.
    pub bucket: BucketSettings,
    /// The file of cluster keys; `keys` beside [`Config::store`] if it is not named.
    #[serde(default)]
    pub keys: Option<PathBuf>,
    /// Identity of this controller and the authority that all certificates come from.
    pub tls: TlsFiles,
    /// How long an agent may run a VM without hearing from a controller, milliseconds.
    #[serde(default = "lease_ms_default")]
    pub lease_ms: u64,
    /// Checkpoints that are taken at once in the cluster.
    #[serde(default = "at_once_default")]
    pub checkpoints_at_once: usize,
    /// Checkpoints that are taken at once of guests of one host.
    #[serde(default = "at_once_per_host_default")]
    pub checkpoints_at_once_per_host: usize,
    /// How often packs that no checkpoint needs are looked for and removed, milliseconds; 0: only when an operator asks.
    #[serde(default = "sweep_every_ms_default")]
    pub sweep_every_ms: u64,
    /// Where metrics are served over HTTP.
    #[serde(default)]
    pub metrics: Option<SocketAddr>,
    /// Form of log lines.
    #[serde(default)]
    pub log: LogFormat,
    /// Which log lines.
    #[serde(default = "filter_default")]
    pub filter: String,
}

/// PEM files; read again when they change.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Certificate of the cluster's authority.
    pub ca: PathBuf,
    /// Certificate chain of this process, leaf first.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML of this form.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A number outside of what works.
    #[error("lease_ms is {0}; it must lie between {LEASE_MS_MIN} and {LEASE_MS_MAX}")]
    Lease(u64),
    /// No checkpoint could ever be taken.
    #[error("checkpoints_at_once and checkpoints_at_once_per_host must be at least 1")]
    AtOnce,
    /// The bucket.
    #[error(transparent)]
    Bucket(#[from] BucketError),
}

fn sweep_every_ms_default() -> u64 {
    6 * 3_600_000
}

fn at_once_default() -> usize {
    Limits::default().cluster
}

fn at_once_per_host_default() -> usize {
    Limits::default().host
}

fn lease_ms_default() -> u64 {
    10_000
}

fn filter_default() -> String {
    "info".into()
}

impl Config {
    /// Where the cluster keys lie.
    pub fn keys_file(&self) -> PathBuf {
        self.keys.clone().unwrap_or_else(|| self.store.with_file_name("keys"))
    }

    /// Reads the settings; relative paths are relative to the file's folder.
    ///
    /// # Errors
    /// Any [`ConfigError`].
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let mut config = Config::parse(&text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })?;
        config.check()?;
        let folder = path.parent().unwrap_or(Path::new("."));
        for file in [&mut config.store, &mut config.tls.ca, &mut config.tls.cert, &mut config.tls.key] {
            *file = folder.join(&*file);
        }
        config.keys = config.keys.map(|file| folder.join(file));
        config.bucket = config.bucket.within(folder);
        Ok(config)
    }

    fn parse(text: &str) -> Result<Config, toml::de::Error> {
        toml::from_str(text)
    }

    fn check(&self) -> Result<(), ConfigError> {
        self.bucket.check()?;
        if self.checkpoints_at_once == 0 || self.checkpoints_at_once_per_host == 0 {
            return Err(ConfigError::AtOnce);
        }
        if (LEASE_MS_MIN..=LEASE_MS_MAX).contains(&self.lease_ms) {
            Ok(())
        } else {
            Err(ConfigError::Lease(self.lease_ms))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "listen = \"127.0.0.1:0\"\nstore = \"s.redb\"\nbucket = \"file:/b\"\n";
    const TLS: &str = "[tls]\nca = \"ca.pem\"\ncert = \"c.pem\"\nkey = \"c.key\"\n";

    #[test]
    fn a_small_file_is_enough() {
        let config = Config::parse(&format!("{SMALL}{TLS}")).unwrap();
        assert_eq!((config.lease_ms, config.log, config.metrics), (10_000, LogFormat::Text, None));
    }

    #[test]
    fn a_misspelt_key_is_refused() {
        let error = Config::parse(&format!("{SMALL}leese_ms = 5\n{TLS}")).unwrap_err();
        assert!(error.to_string().contains("leese_ms"), "{error}");
    }

    #[test]
    fn a_lease_that_cannot_be_kept_is_refused() {
        let config = Config::parse(&format!("{SMALL}lease_ms = 5\n{TLS}")).unwrap();
        assert!(matches!(config.check(), Err(ConfigError::Lease(5))));
    }

    #[test]
    fn a_limit_that_lets_no_checkpoint_through_is_refused() {
        let config = Config::parse(&format!("{SMALL}checkpoints_at_once = 0\n{TLS}")).unwrap();
        assert!(matches!(config.check(), Err(ConfigError::AtOnce)));
    }
}

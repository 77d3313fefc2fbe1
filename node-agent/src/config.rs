//! The agent's settings: one TOML file, every key documented here. The only place of the agent that reads settings.
//!
//! ```toml
//! name = "hostA"                       # this host, as its certificate says
//! listen = "0.0.0.0:7401"              # where the controller and other agents connect
//! address = "10.0.0.1:7401"            # what others are told; default: `listen`
//! controller = "10.0.0.9:7400"         # host:port of the controller; without it VMs run without leases
//! state_dir = "/var/lib/godwit"        # VMs live in `vms/` below it
//! runner = "/usr/libexec/godwit/vm-runner"   # default: vm-runner beside this program
//! tls = { ca = "ca.pem", cert = "hostA.pem", key = "hostA.key" }   # re-read when they change
//! metrics = "127.0.0.1:9401"           # Prometheus text at /metrics; default: off
//! log_format = "text"                  # or "json"
//! engine = "soft"                      # or "auto"
//! sandbox = true                       # runners drop privileges and filter system calls
//! ram_dir = "/run/godwit-ram"          # a tmpfs for guests' RAM, mounted huge=within_size; default: each guest its own, which
//!                                      # needs CAP_SYS_ADMIN, or else small pages
//!
//! [capabilities]
//! withhold = ["avx2", "MSR C001_1029"]   # features that guests here are not promised, to level a pool; default: none
//! ```

use std::path::{Path, PathBuf};

use proto::capability::Withheld;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// Settings of one agent.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this host.
    pub name: String,
    /// Address to listen on.
    pub listen: String,
    /// Address that others are told.
    #[serde(default)]
    pub address: String,
    /// Address of the controller; empty: none.
    #[serde(default)]
    pub controller: String,
    /// Where VMs are kept.
    pub state_dir: PathBuf,
    /// The program of a guest's process.
    #[serde(default)]
    pub runner: PathBuf,
    /// Certificates.
    pub tls: TlsFiles,
    /// Address of the metrics page.
    pub metrics: Option<std::net::SocketAddr>,
    /// Form of log lines.
    #[serde(default)]
    pub log_format: LogFormat,
    /// Engine of guests whose configuration names none.
    #[serde(default)]
    pub engine: Engine,
    /// Whether runners are jailed.
    #[serde(default = "yes")]
    pub sandbox: bool,
    /// A directory on a tmpfs for the RAM of guests.
    #[serde(default)]
    pub ram_dir: Option<PathBuf>,
    /// What guests are promised.
    #[serde(default)]
    pub capabilities: Capabilities,
}

/// What guests of this host are promised.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capabilities {
    /// Features that the host has and that no guest may count on, for example because another host of the pool lacks them.
    #[serde(default, deserialize_with = "withheld")]
    pub withhold: Vec<Withheld>,
}

fn withheld<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Withheld>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| Withheld::parse(text).map_err(D::Error::custom)).collect()
}

/// PEM files of this host's identity.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The cluster's certificate authority.
    pub ca: PathBuf,
    /// This host's certificate chain.
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

/// Which engine runs guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// The best that this host has.
    #[default]
    Auto,
    /// The software SVM processor.
    Soft,
    /// Hardware SVM.
    Kvm,
}

fn yes() -> bool {
    true
}

/// Why the settings are not usable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file does not parse.
    #[error("{path}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: toml::de::Error,
    },
    /// A key has a value that cannot be.
    #[error("{key}: {text}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong.
        text: String,
    },
}

impl Config {
    /// Reads a file; relative paths in it are relative to it.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
        let mut config: Config =
            toml::from_str(&text).map_err(|source| ConfigError::Syntax { path: path.to_owned(), source })?;
        let base = path.parent().unwrap_or(Path::new("."));
        for file in [&mut config.state_dir, &mut config.tls.ca, &mut config.tls.cert, &mut config.tls.key] {
            *file = base.join(&*file);
        }
        config.ram_dir = config.ram_dir.map(|directory| base.join(directory));
        if config.runner.as_os_str().is_empty() {
            let program = std::env::current_exe()
                .map_err(|source| ConfigError::File { path: PathBuf::from("/proc/self/exe"), source })?;
            config.runner = program.with_file_name("vm-runner");
        } else {
            config.runner = base.join(&config.runner);
        }
        config.check()
    }

    /// Checks values and fills defaults that depend on others.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn check(mut self) -> Result<Config, ConfigError> {
        let value = |key, text: &str| Err(ConfigError::Value { key, text: text.to_owned() });
        if !is_host_name(&self.name) {
            return value("name", "1 to 40 letters, digits and hyphens");
        }
        if self.address.is_empty() {
            self.address.clone_from(&self.listen);
        }
        Ok(self)
    }
}

fn is_host_name(name: &str) -> bool {
    (1..=40).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"
        name = "hostA"
        listen = "127.0.0.1:7401"
        state_dir = "state"
        tls = { ca = "ca.pem", cert = "a.pem", key = "a.key" }
    "#;

    #[test]
    fn defaults_are_filled() {
        let config = toml::from_str::<Config>(WHOLE).unwrap().check().unwrap();
        assert_eq!(config.address, "127.0.0.1:7401");
        assert!(config.sandbox && config.metrics.is_none() && config.capabilities.withhold.is_empty());
        let level = format!("{WHOLE}\n[capabilities]\nwithhold = [\"AVX2\", \"CPUID 0000_0007.0 EBX[8]\"]");
        assert_eq!(toml::from_str::<Config>(&level).unwrap().capabilities.withhold.len(), 2);
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused() {
        assert!(toml::from_str::<Config>(&format!("{WHOLE}\nsandbx = true")).is_err());
        assert!(toml::from_str::<Config>(&format!("engine = \"xen\"\n{WHOLE}")).is_err());
        let withheld =
            toml::from_str::<Config>(&format!("{WHOLE}\n[capabilities]\nwithhold = [\"avx9\"]")).unwrap_err();
        assert!(withheld.to_string().contains("\"avx9\" is no feature"), "{withheld}");
        let name = toml::from_str::<Config>(&WHOLE.replace("hostA", "host/A")).unwrap();
        assert!(matches!(name.check(), Err(ConfigError::Value { key: "name", .. })));
    }
}

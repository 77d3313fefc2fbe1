//! The agents: who was heard when, what they last said, which leases they hold, and how to call them.
//!
//! Heartbeats come in, verdicts go out: [`verdict`] decides by the ledger alone, [`lease`] knows when a lease that was
//! granted has surely ended. Verdicts are computed and remembered under one lock, so that whoever looks up the end of a
//! lease after an append to the ledger sees every grant that was made from the state before it. This room starts no
//! operation.

pub mod lease;
pub mod link;
pub mod verdict;

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::status::Code;
use proto::v1::agent_client::AgentClient;
use proto::v1::vm_verdict::Verdict;
use proto::v1::{HeartbeatReply, HostInfo, HostRecord, VmInfo};
use tokio::time::Instant;
use tonic::transport::Channel;

use self::lease::{HostState, Leases, host_state};
use self::verdict::{Report, verdict};
use crate::failure::Failure;
use crate::ledger::Ledger;
use crate::ledger::event::Event;
use crate::tls::{Identity, Role, Tls};

struct Host {
    info: HostInfo,
    heard: Instant,
}

struct Book {
    hosts: BTreeMap<String, Host>,
    leases: Leases,
}

/// All agents that were ever heard.
pub struct Agents {
    ledger: Ledger,
    tls: Arc<Tls>,
    lease: Duration,
    /// The longest that this controller or the one before it granted.
    lease_max: Duration,
    book: Mutex<Book>,
    channels: Mutex<HashMap<(String, String), Channel>>,
}

impl Agents {
    /// Nobody heard yet. `lease` is what this controller grants, `lease_max` the longest that anybody may still hold.
    pub fn new(ledger: Ledger, tls: Arc<Tls>, lease: Duration, lease_max: Duration) -> Agents {
        let book = Book { hosts: BTreeMap::new(), leases: Leases::new(Instant::now()) };
        Agents { ledger, tls, lease, lease_max, book: Mutex::new(book), channels: Mutex::default() }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a heartbeat and answers it.
    ///
    /// # Errors
    /// The ledger's, if the host is new and cannot be written down.
    pub async fn heartbeat(&self, info: HostInfo) -> Result<HeartbeatReply, Failure> {
        if self.ledger.state().hosts.get(&info.name) != Some(&info.address) {
            let event = Event::HostSeen { host: info.name.clone(), address: info.address.clone() };
            self.ledger.append(&format!("host/{}", info.name), event).await?;
        }
        let mut book = self.book();
        let state = self.ledger.state();
        let vms = info.vms.iter().map(|vm| {
            let report = Report { vm: &vm.name, generation: vm.generation, state: vm.state() };
            verdict(&state, &info.name, report)
        });
        let vms: Vec<_> = vms.collect();
        let now = Instant::now();
        for said in vms.iter().filter(|said| said.verdict() == Verdict::Hold) {
            book.leases.grant(&info.name, &said.vm, now);
        }
        book.hosts.insert(info.name.clone(), Host { info, heard: now });
        Ok(HeartbeatReply { lease_ms: u32::try_from(self.lease.as_millis()).unwrap_or(u32::MAX), vms })
    }

    /// From when on this host does not run this VM even if nobody can reach it.
    pub fn lease_ended_at(&self, host: &str, vm: &str) -> Instant {
        self.book().leases.ended_at(host, vm, self.lease_max)
    }

    /// How a host is.
    pub fn host_state(&self, host: &str) -> HostState {
        host_state(self.book().hosts.get(host).map(|host| host.heard.elapsed()), self.lease)
    }

    /// What a host last said of itself.
    pub fn host(&self, host: &str) -> Option<HostInfo> {
        self.book().hosts.get(host).map(|host| host.info.clone())
    }

    /// What a host last said of a VM.
    pub fn observed(&self, host: &str, vm: &str) -> Option<VmInfo> {
        let book = self.book();
        let reported = book.hosts.get(host)?.info.vms.iter().filter(|info| info.name == vm);
        reported.max_by_key(|info| info.generation).cloned()
    }

    /// Remembers an answer that is newer than the last heartbeat.
    pub fn observe(&self, host: &str, vm: &VmInfo) {
        if let Some(host) = self.book().hosts.get_mut(host) {
            host.info.vms.retain(|info| info.name != vm.name || info.generation > vm.generation);
            host.info.vms.push(vm.clone());
        }
    }

    /// Remembers that a host has discarded a VM up to this generation.
    pub fn observe_discarded(&self, host: &str, vm: &str, generation: u64) {
        if let Some(host) = self.book().hosts.get_mut(host) {
            host.info.vms.retain(|info| info.name != vm || info.generation > generation);
        }
    }

    /// Every host of the ledger, heard or not.
    pub fn records(&self) -> Vec<HostRecord> {
        let state = self.ledger.state();
        let book = self.book();
        let record = |(name, address): (&String, &String)| {
            let heard = book.hosts.get(name);
            let age = heard.map(|host| host.heard.elapsed());
            let unheard = || HostInfo { name: name.clone(), address: address.clone(), ..HostInfo::default() };
            HostRecord {
                info: Some(heard.map_or_else(unheard, |host| host.info.clone())),
                state: host_state(age, self.lease).word().into(),
                heartbeat_age_ms: age.map_or(u64::MAX, |age| age.as_millis() as u64),
            }
        };
        state.hosts.iter().map(record).collect()
    }

    /// A client of a host's agent.
    ///
    /// # Errors
    /// [`Code::NotFound`] if no such host was ever heard.
    pub fn client(&self, host: &str) -> Result<AgentClient<Channel>, Failure> {
        let client = AgentClient::new(self.channel(host)?);
        Ok(client.max_decoding_message_size(link::MESSAGE_MAX).max_encoding_message_size(link::MESSAGE_MAX))
    }

    fn channel(&self, host: &str) -> Result<Channel, Failure> {
        let address = self.ledger.state().hosts.get(host).cloned().ok_or_else(|| unknown_host(host))?;
        let key = (host.to_owned(), address);
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(&key) {
            return Ok(channel.clone());
        }
        let channel = link::channel(&self.tls, &key.1, &host_identity(host))?;
        channels.retain(|(name, _), _| name != host);
        channels.insert(key, channel.clone());
        Ok(channel)
    }

    /// Calls an agent, with a limit of time.
    ///
    /// # Errors
    /// The agent's, or [`Code::Unreachable`].
    pub async fn call<T, F, R>(&self, host: &str, limit: Duration, call: F) -> Result<T, Failure>
    where
        F: FnOnce(AgentClient<Channel>) -> R,
        R: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let client = self.client(host)?;
        match tokio::time::timeout(limit, call(client)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(Failure::from_status(host, &status)),
            Err(_) => {
                let text = format!("{host} did not answer within {} s", limit.as_secs());
                Err(Failure::new(Code::Unreachable, text).hint(format!("check the node-agent on {host}")))
            }
        }
    }
}

/// The identity that an agent's certificate must bear.
pub fn host_identity(host: &str) -> Identity {
    Identity { role: Role::Host, name: host.into() }
}

/// Says that a name is of no host.
pub fn unknown_host(host: &str) -> Failure {
    Failure::new(Code::NotFound, format!("there is no host {host}")).hint("`ctl host ls` names the hosts")
}

//! A world for tests: hosts that keep VMs as real agents do, a bucket, leases, and one fault.
//!
//! Every change is checked against the promise that a VM runs on at most one host. Calls are counted; a fault strikes
//! at one of them: before its effect, after it, by a controller that dies there, by a cancel, or by a host that falls
//! silent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use proto::status::Code;
use proto::v1::{
    ActivateReply, ActivateRequest, CreateVmRequest, HandedOver, HostInfo, MachineDigest, OperationRef, Position,
    PrepareReply, PrepareRequest, SendRequest, StopVmRequest, VmInfo, VmRef, VmState,
};
use tokio::sync::Notify;

use super::voice::Voice;
use super::world::{LoadRequest, World};
use crate::bucket::{manifest_key, packs_prefix, vm_prefix};
use crate::failure::Failure;
use crate::ingest::read::Damaged;
use crate::ingest::receive::Expected;
use crate::ledger::event::{CheckpointEntry, Replay};
use crate::ledger::recording::Recording;
use crate::sweep::{Request, Swept};

/// What goes wrong, at which call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    Nothing,
    /// The call fails and did nothing.
    Before(usize),
    /// The call fails and did its work.
    After(usize),
    /// The controller dies before the call does anything.
    DiesBefore(usize),
    /// The controller dies when the call has done its work.
    DiesAfter(usize),
    /// Every call is made twice.
    Twice,
    /// From this call on the host does not answer.
    Silent(usize, &'static str),
    /// The call takes until somebody cancels.
    Hangs(usize),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub generation: u64,
    pub state: VmState,
    pub operation: String,
    pub loaded: bool,
    /// Where it went before it was ready.
    pub replay: Option<Position>,
    pub paused: bool,
}

#[derive(Debug, Default)]
pub struct Field {
    pub hosts: BTreeMap<String, BTreeMap<String, Held>>,
    /// Newest generation that a host owned of a VM.
    seen: BTreeMap<(String, String), u64>,
    /// What a restore in place is about to replace.
    pub aside: BTreeMap<(String, String), Held>,
    pub bucket: BTreeSet<String>,
    pub silent: BTreeSet<String>,
    /// Recordings whose segments were looked at, and which captures were to be kept.
    pub pruned: Vec<(String, Vec<Vec<u8>>)>,
    /// Somebody waited for the end of a lease.
    pub waited: bool,
    /// What was broken of the promises.
    pub broken: Vec<String>,
}

impl Field {
    fn check(&mut self, what: &str) {
        let names: BTreeSet<String> = self.hosts.values().flat_map(|vms| vms.keys().cloned()).collect();
        for name in names {
            let runs = |vms: &BTreeMap<String, Held>| vms.get(&name).is_some_and(|held| held.state == VmState::Running);
            let running: Vec<_> = self.hosts.iter().filter(|(_, vms)| runs(vms)).map(|(host, _)| host).collect();
            if running.len() > 1 {
                self.broken.push(format!("{name} runs on {running:?} after {what}"));
            }
        }
    }

    pub fn report(&self, host: &str) -> HostInfo {
        let vms = self.hosts[host].iter().map(|(name, held)| info(name, held));
        HostInfo { name: host.into(), vms: vms.collect(), ..HostInfo::default() }
    }

    /// What was incoming is gone; what it was to replace is there again.
    pub fn give_up(&mut self, host: &str, vm: &str) {
        let vms = self.hosts.get_mut(host).expect("the host is known");
        vms.remove(vm);
        if let Some(held) = self.aside.remove(&(host.to_owned(), vm.to_owned())) {
            vms.insert(vm.into(), held);
        }
    }

    fn set_aside(&mut self, host: &str, vm: &str, generation: u64) {
        let Some(held) = self.held(host, vm).filter(|held| held.generation == generation) else { return };
        if matches!(held.state, VmState::Paused | VmState::Stopped | VmState::Crashed) {
            let held = held.clone();
            self.hosts.get_mut(host).map(|vms| vms.remove(vm));
            self.aside.insert((host.into(), vm.into()), held);
        }
    }

    /// Which of these objects the bucket does not have.
    fn missing(&self, keys: impl IntoIterator<Item = String>) -> Damaged {
        let gone = keys.into_iter().filter(|key| !self.bucket.contains(key));
        gone.map(|key| (key.clone(), format!("pack {key}: gone"))).collect()
    }

    pub fn held(&mut self, host: &str, vm: &str) -> Option<&mut Held> {
        self.hosts.get_mut(host).and_then(|vms| vms.get_mut(vm))
    }
}

fn info(name: &str, held: &Held) -> VmInfo {
    VmInfo {
        name: name.into(),
        generation: held.generation,
        state: held.state.into(),
        operation: held.operation.clone(),
        ..VmInfo::default()
    }
}

/// The world as one controller sees it.
#[derive(Clone)]
pub struct FakeWorld {
    pub field: Arc<Mutex<Field>>,
    fault: Fault,
    calls: Arc<AtomicUsize>,
    /// Told when a call hangs for ever or until a cancel.
    pub struck: Arc<Notify>,
}

type Effect<'a, T> = dyn Fn(&mut Field) -> Result<T, Failure> + Send + Sync + 'a;

impl FakeWorld {
    pub fn new(field: Arc<Mutex<Field>>, fault: Fault) -> FakeWorld {
        FakeWorld { field, fault, calls: Arc::default(), struck: Arc::default() }
    }

    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    pub fn field(&self) -> MutexGuard<'_, Field> {
        self.field.lock().unwrap()
    }

    async fn call<T>(&self, host: &str, what: &str, effect: &Effect<'_, T>) -> Result<T, Failure> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst);
        let lost = || Failure::new(Code::Unreachable, format!("{what} on {host}: no answer"));
        match self.fault {
            Fault::Before(at) if at == number => return Err(lost()),
            Fault::DiesBefore(at) | Fault::Hangs(at) if at == number => {
                self.struck.notify_one();
                std::future::pending::<()>().await;
            }
            Fault::Silent(at, name) if at == number => drop(self.field().silent.insert(name.into())),
            Fault::Twice => drop(self.apply(host, what, effect)),
            _ => {}
        }
        let result = self.apply(host, what, effect);
        match self.fault {
            Fault::After(at) if at == number => Err(lost()),
            Fault::DiesAfter(at) if at == number => {
                self.struck.notify_one();
                std::future::pending().await
            }
            _ => result,
        }
    }

    fn apply<T>(&self, host: &str, what: &str, effect: &Effect<'_, T>) -> Result<T, Failure> {
        let mut field = self.field();
        if field.silent.contains(host) {
            return Err(Failure::new(Code::Unreachable, format!("{host} is silent")));
        }
        let result = effect(&mut field);
        field.check(what);
        result
    }

    /// An effect on a VM that the host must hold in this generation.
    async fn on<'a>(
        &self,
        host: &'a str,
        what: &str,
        vm: &'a str,
        generation: u64,
        change: impl Fn(&mut Held) -> Result<(), Failure> + Send + Sync,
    ) -> Result<VmInfo, Failure> {
        self.call(host, what, &move |field: &mut Field| {
            let held = field.held(host, vm).ok_or_else(|| Failure::new(Code::NotFound, "no such VM"))?;
            if held.generation != generation {
                return Err(Failure::new(Code::Denied, "another generation"));
            }
            change(held)?;
            Ok(info(vm, held))
        })
        .await
    }
}

fn conflict(text: &str) -> Failure {
    Failure::new(Code::Conflict, text)
}

fn arrive(field: &mut Field, host: &str, vm: &str, held: Held) -> Result<(), Failure> {
    let key = (host.to_owned(), vm.to_owned());
    let vms = field.hosts.get_mut(host).ok_or_else(|| Failure::new(Code::NotFound, "no such host"))?;
    match vms.get(vm) {
        Some(there) if there.generation == held.generation && there.operation == held.operation => return Ok(()),
        Some(_) => return Err(conflict("the host has it already")),
        None if field.seen.get(&key).is_some_and(|seen| *seen >= held.generation) => {
            return Err(Failure::new(Code::Denied, "generation is not newer than one that was owned"));
        }
        None => {}
    }
    if held.state == VmState::Running {
        field.seen.insert(key, held.generation);
    }
    vms.insert(vm.into(), held);
    Ok(())
}

impl World for FakeWorld {
    async fn create(&self, host: &str, r: CreateVmRequest) -> Result<VmInfo, Failure> {
        self.call(host, "create", &|field: &mut Field| {
            let held = Held {
                generation: r.generation,
                state: VmState::Running,
                operation: r.operation.clone(),
                loaded: true,
                replay: None,
                paused: false,
            };
            arrive(field, host, &r.vm, held.clone())?;
            Ok(info(&r.vm, &held))
        })
        .await
    }

    async fn look(&self, host: &str, vm: VmRef) -> Result<VmInfo, Failure> {
        self.on(host, "look", &vm.vm, vm.generation, |_| Ok(())).await
    }

    async fn pause(&self, host: &str, vm: VmRef) -> Result<VmInfo, Failure> {
        let change = |held: &mut Held| match held.state {
            VmState::Running | VmState::Paused => {
                (held.state, held.paused) = (VmState::Paused, true);
                Ok(())
            }
            _ => Err(conflict("not running")),
        };
        self.on(host, "pause", &vm.vm, vm.generation, change).await
    }

    async fn resume(&self, host: &str, vm: VmRef) -> Result<VmInfo, Failure> {
        let change = |held: &mut Held| match held.state {
            VmState::Running | VmState::Paused => {
                (held.state, held.paused) = (VmState::Running, false);
                Ok(())
            }
            _ => Err(conflict("not paused")),
        };
        self.on(host, "resume", &vm.vm, vm.generation, change).await
    }

    async fn stop(&self, host: &str, r: StopVmRequest) -> Result<VmInfo, Failure> {
        let change = |held: &mut Held| {
            held.state = VmState::Stopped;
            Ok(())
        };
        self.on(host, "stop", &r.vm, r.generation, change).await
    }

    async fn discard(&self, host: &str, vm: VmRef) -> Result<(), Failure> {
        self.call(host, "discard", &|field: &mut Field| {
            if field.held(host, &vm.vm).is_some_and(|held| held.generation <= vm.generation) {
                field.hosts.get_mut(host).map(|vms| vms.remove(&vm.vm));
            }
            Ok(())
        })
        .await
    }

    async fn prepare(&self, host: &str, r: PrepareRequest) -> Result<PrepareReply, Failure> {
        let ticket = r.ticket.unwrap();
        self.call(host, "prepare", &|field: &mut Field| {
            let held = Held {
                generation: ticket.generation,
                state: VmState::Incoming,
                operation: ticket.operation.clone(),
                loaded: false,
                replay: None,
                paused: false,
            };
            field.set_aside(host, &ticket.vm, r.replaces_generation);
            arrive(field, host, &ticket.vm, held)?;
            Ok(PrepareReply { address: format!("{host}:1") })
        })
        .await
    }

    async fn activate(&self, host: &str, r: ActivateRequest) -> Result<ActivateReply, Failure> {
        self.call(host, "activate", &|field: &mut Field| {
            let held = field.held(host, &r.vm).ok_or_else(|| Failure::new(Code::NotFound, "no such VM"))?;
            match held.state {
                VmState::Running | VmState::Paused if held.generation == r.generation => {}
                VmState::Incoming
                    if held.generation == r.generation && held.operation == r.operation && held.loaded =>
                {
                    held.state = if r.paused { VmState::Paused } else { VmState::Running };
                    held.paused = r.paused;
                    field.seen.insert((host.into(), r.vm.clone()), r.generation);
                    field.aside.remove(&(host.into(), r.vm.clone()));
                }
                _ => return Err(conflict("not prepared")),
            }
            Ok(ActivateReply::default())
        })
        .await
    }

    async fn abandon(&self, host: &str, operation: OperationRef) -> Result<(), Failure> {
        self.call(host, "abandon", &|field: &mut Field| {
            let Some(held) = field.held(host, &operation.vm).filter(|held| held.operation == operation.operation)
            else {
                return Ok(());
            };
            match held.state {
                VmState::HandedOver => held.state = if held.paused { VmState::Paused } else { VmState::Running },
                VmState::Incoming => field.give_up(host, &operation.vm),
                _ => {}
            }
            Ok(())
        })
        .await
    }

    async fn send(&self, host: &str, r: SendRequest, _: Option<&str>, _: &Voice) -> Result<HandedOver, Failure> {
        let ticket = r.ticket.unwrap();
        self.call(host, "send", &|field: &mut Field| {
            if field.silent.contains(&ticket.target) {
                return Err(Failure::new(Code::Unreachable, "the target is silent"));
            }
            let target = field.held(&ticket.target, &r.vm).ok_or_else(|| conflict("the target expects nothing"))?;
            if (target.state, &target.operation) != (VmState::Incoming, &ticket.operation) {
                return Err(conflict("the target expects another"));
            }
            target.loaded = true;
            let source = field.held(host, &r.vm).ok_or_else(|| Failure::new(Code::NotFound, "no such VM"))?;
            match source.state {
                VmState::Running | VmState::Paused | VmState::HandedOver if source.generation == r.generation => {
                    source.state = VmState::HandedOver;
                    source.operation.clone_from(&ticket.operation);
                }
                _ => return Err(conflict("nothing to send")),
            }
            let digest = Some(MachineDigest { machine: vec![7; 32], ..MachineDigest::default() });
            Ok(HandedOver { source: digest.clone(), target: digest, ..HandedOver::default() })
        })
        .await
    }

    async fn checkpoint(
        &self,
        host: &str,
        _: SendRequest,
        expected: Expected,
        _: &Voice,
    ) -> Result<CheckpointEntry, Failure> {
        let Expected { checkpoint, vm, vm_id, generation, .. } = expected;
        let vm_id = vm_id.to_string();
        let pack = format!("{}{checkpoint}", packs_prefix(&vm_id, generation));
        // A pack is written before whatever strikes.
        self.field().bucket.insert(pack.clone());
        self.call(host, "checkpoint", &|field: &mut Field| {
            field.held(host, &vm).ok_or_else(|| Failure::new(Code::NotFound, "no such VM"))?;
            let manifest_key = manifest_key(&vm_id, checkpoint);
            field.bucket.extend([pack.clone(), manifest_key.clone()]);
            let mut entry = crate::ledger::tests::entry(&checkpoint.to_string(), &vm, generation.0);
            (entry.vm_id, entry.manifest_key, entry.pack_keys) = (vm_id.clone(), manifest_key, vec![pack.clone()]);
            Ok(entry)
        })
        .await
    }

    async fn load(&self, load: LoadRequest<'_>, _: &Voice) -> Result<MachineDigest, Failure> {
        let host = load.host;
        self.call(host, "load", &|field: &mut Field| {
            if !field.bucket.contains(load.manifest_key) {
                return Err(Failure::new(Code::Corrupt, "no manifest"));
            }
            let target = field.held(host, &load.ticket.vm).ok_or_else(|| conflict("the target expects nothing"))?;
            if (target.state, &target.operation) != (VmState::Incoming, &load.ticket.operation) {
                return Err(conflict("the target expects another"));
            }
            (target.loaded, target.replay) = (true, load.replay.map(Replay::until));
            Ok(MachineDigest::default())
        })
        .await
    }

    async fn lease_end(&self, host: &str, vm: &str, _: &Voice) {
        self.field().waited = true;
        // The runner pauses its guest by itself.
        if let Some(held) = self.field().held(host, vm).filter(|held| held.state == VmState::Running) {
            held.state = VmState::Paused;
        }
    }

    async fn lost(&self, manifest_key: &str) -> Result<Damaged, Failure> {
        self.call("bucket", "lost", &|field: &mut Field| Ok(field.missing([manifest_key.to_owned()]))).await
    }

    async fn verify(&self, entry: &CheckpointEntry, _: &Voice) -> Result<Damaged, Failure> {
        let keys = || entry.pack_keys.iter().chain([&entry.manifest_key]).cloned();
        self.call("bucket", "verify", &|field: &mut Field| Ok(field.missing(keys()))).await
    }

    async fn sample(&self, packs: &[String]) -> Result<(u64, Damaged), Failure> {
        let keys = || packs.iter().cloned();
        self.call("bucket", "sample", &|field: &mut Field| Ok((packs.len() as u64, field.missing(keys())))).await
    }

    async fn erase(&self, manifest: &str) -> Result<(), Failure> {
        self.call("bucket", "erase", &|field: &mut Field| {
            field.bucket.remove(manifest);
            Ok(())
        })
        .await
    }

    async fn prune_journal(&self, recording: &Recording, kept: &[Vec<u8>]) -> Result<usize, Failure> {
        self.call("bucket", "prune", &|field: &mut Field| {
            field.pruned.push((recording.id.clone(), kept.to_vec()));
            Ok(0)
        })
        .await
    }

    async fn sweep(&self, request: &Request, _: &(dyn Fn(String) + Sync)) -> Result<Swept, Failure> {
        let prefix = vm_prefix(&request.claim.vm_id);
        let dead = |key: &String| key.starts_with(&prefix) && key.contains("/packs/") && !request.used.contains(key);
        self.call("bucket", "sweep", &|field: &mut Field| {
            let before = field.bucket.len();
            field.bucket.retain(|key| !dead(key));
            Ok(Swept { removed: (before - field.bucket.len()) as u64, ..Swept::default() })
        })
        .await
    }
}

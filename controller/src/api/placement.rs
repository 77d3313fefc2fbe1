//! Which hosts can run a guest, and what keeps the others from it. Pure: over what hosts last said of themselves.
//!
//! A guest's contract and what an engine of a host can give are the same data (`proto::capability`); engine and model are
//! names here. The agent checks again when it prepares: what a host said may be a heartbeat old.

use proto::capability::CapabilitySet;
use proto::status::Code;
use proto::v1::{EngineFacts, HostInfo, MachineConfig};

use crate::agents::lease::HostState;
use crate::agents::unknown_host;
use crate::failure::Failure;
use crate::ledger::state::State;

/// How many missing things a refusal names.
const NAMED_MAX: usize = 12;

/// What is known of one host.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// How long ago it was heard.
    pub state: HostState,
    /// What it said then.
    pub info: Option<HostInfo>,
}

/// What a guest asks of the host that runs it.
#[derive(Clone, Copy, Debug)]
pub struct Need<'a> {
    /// Its name, for people.
    pub vm: &'a str,
    /// Its machine.
    pub config: &'a MachineConfig,
    /// What it was promised.
    pub contract: &'a CapabilitySet,
}

/// Every host of the ledger.
#[derive(Clone, Debug, Default)]
pub struct Fleet {
    /// In order of name.
    pub hosts: Vec<Candidate>,
}

impl Candidate {
    /// The host's own word, if it was heard lately.
    fn heard(&self) -> Result<&HostInfo, Failure> {
        match (self.state, &self.info) {
            (HostState::Up, Some(info)) => Ok(info),
            _ => Err(Failure::new(Code::Unreachable, format!("{} is {}", self.name, self.state.word()))
                .hint(format!("check the node-agent on {}", self.name))),
        }
    }

    /// What the engine of a machine can give a guest there.
    fn engine(&self, config: &MachineConfig) -> Result<&EngineFacts, Failure> {
        let (info, engine, name) = (self.heard()?, &config.engine, &self.name);
        let incapable = |text| Err(Failure::new(Code::Incapable, text));
        match info.engine_facts.iter().find(|facts| facts.engine == *engine) {
            Some(facts) if facts.offered => Ok(facts),
            Some(facts) => incapable(format!("{name} cannot run guests on engine {engine}: {}", facts.reason)),
            None if info.engines.contains(engine) => {
                incapable(format!("{name} does not say what its engine {engine} can: its agent is of an older release"))
            }
            None => incapable(format!("{name} has no engine {engine}; it offers: {}", info.engines.join(", "))),
        }
    }

    /// Whether the host keeps a guest's contract.
    ///
    /// # Errors
    /// [`Code::Unreachable`]; [`Code::Incapable`] with every bit that is missing.
    pub fn keeps(&self, need: &Need<'_>) -> Result<&HostInfo, Failure> {
        let facts = self.engine(need.config)?;
        let known = facts.capabilities.clone().and_then(|set| CapabilitySet::decode(set).ok());
        let Some(host) = known else {
            let text = format!("{} does not say what its engine {} can", self.name, facts.engine);
            return Err(Failure::new(Code::Incapable, text));
        };
        let failing = need.contract.failing_on(&host);
        if failing.is_empty() {
            return self.heard();
        }
        let mut missing: Vec<String> = failing.iter().take(NAMED_MAX).map(ToString::to_string).collect();
        if let Some(more @ 1..) = failing.len().checked_sub(NAMED_MAX) {
            missing.push(format!("and {more} more"));
        }
        let model = &need.contract.model;
        let text = format!("{} cannot run {}, a {model}: it lacks {}", self.name, need.vm, missing.join(", "));
        Err(Failure::new(Code::Incapable, text))
    }

    /// Whether the host keeps the contract and has the memory.
    ///
    /// # Errors
    /// As [`Candidate::keeps`], and [`Code::Exhausted`].
    pub fn fits(&self, need: &Need<'_>) -> Result<&HostInfo, Failure> {
        let info = self.keeps(need)?;
        let (free, needed) = (info.memory_bytes_free, need.config.memory_bytes);
        if free >= needed {
            return Ok(info);
        }
        let text = format!("{} has {free} bytes of memory free, {} needs {needed}", self.name, need.vm);
        Err(Failure::new(Code::Exhausted, text))
    }

    /// Whether a guest can run here before its pages have come.
    ///
    /// # Errors
    /// [`Code::Incapable`] with what its operator can do; [`Code::Unreachable`].
    pub fn pages_on_demand(&self) -> Result<(), Failure> {
        let info = self.heard()?;
        let why = match info.lazy_refused.as_str() {
            "" if info.lazy_known => return Ok(()),
            "" => "its agent is of an older release",
            refused => refused,
        };
        let text = format!("{} cannot run a guest before its pages have come: {why}", self.name);
        Err(Failure::new(Code::Incapable, text).hint("restore without --lazy, or to another host"))
    }

    /// The contract of the CPU model that a machine names, at the machine's TSC rate; of the engine's default model and
    /// rate where it names none.
    fn model(&self, config: &MachineConfig) -> Option<CapabilitySet> {
        let facts = self.engine(config).ok()?;
        let mut models = facts.models.iter();
        let found = models.find(|model| config.cpu_model.is_empty() || model.model == config.cpu_model)?;
        let mut contract = CapabilitySet::decode(found.clone()).ok()?;
        if config.tsc_hz > 0 {
            contract.facts.tsc_khz = config.tsc_hz / 1000;
        }
        Some(contract)
    }

    /// Freezes the contract of a machine that is to be made here, and writes what it leaves open into its configuration.
    ///
    /// # Errors
    /// [`Code::Unreachable`], [`Code::Incapable`]: the host does not know the model.
    pub fn freeze(&self, config: &mut MachineConfig) -> Result<CapabilitySet, Failure> {
        let facts = self.engine(config)?;
        let Some(contract) = self.model(config) else {
            let known: Vec<&str> = facts.models.iter().map(|model| model.model.as_str()).collect();
            let text = format!("{} does not know CPU model {:?}", self.name, config.cpu_model);
            return Err(Failure::new(Code::Incapable, text).hint(format!("it knows: {}", known.join(", "))));
        };
        config.cpu_model.clone_from(&contract.model);
        if config.tsc_hz == 0 {
            config.tsc_hz = contract.facts.tsc_khz.saturating_mul(1000);
        }
        Ok(contract)
    }
}

impl Fleet {
    /// A host by name.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub fn host(&self, name: &str) -> Result<&Candidate, Failure> {
        self.hosts.iter().find(|host| host.name == name).ok_or_else(|| unknown_host(name))
    }

    /// The host of this name, if it keeps the guest's contract and has the memory; a refusal names the hosts that would
    /// do, but for `from`, where the guest is.
    ///
    /// # Errors
    /// [`Code::NotFound`], and what [`Candidate::fits`] says.
    pub fn fitting(&self, name: &str, need: &Need<'_>, from: Option<&str>) -> Result<&Candidate, Failure> {
        let host = self.host(name)?;
        host.fits(need).map(|_| host).map_err(|failure| self.advised(failure, name, need, from))
    }

    /// The host of this name, if it keeps the guest's contract; what memory there is its agent says.
    ///
    /// # Errors
    /// [`Code::NotFound`], and what [`Candidate::keeps`] says.
    pub fn keeping(&self, name: &str, need: &Need<'_>, from: Option<&str>) -> Result<&Candidate, Failure> {
        let host = self.host(name)?;
        host.keeps(need).map(|_| host).map_err(|failure| self.advised(failure, name, need, from))
    }

    fn advised(&self, failure: Failure, refused: &str, need: &Need<'_>, from: Option<&str>) -> Failure {
        match failure.code {
            Code::Incapable | Code::Exhausted => failure.hint(self.advice(refused, need, from)),
            _ => failure,
        }
    }

    fn advice(&self, refused: &str, need: &Need<'_>, from: Option<&str>) -> String {
        let compare = from.map(|from| format!("; `ctl host compare {from} {refused}` shows what differs"));
        let who = match &self.able(need, &[Some(refused), from].map(Option::unwrap_or_default))[..] {
            [] => "no other host of the cluster would do".to_owned(),
            able => format!("{} would do", able.join(", ")),
        };
        format!("{who}{}", compare.unwrap_or_default())
    }

    /// Names of the hosts that can run the guest, but for some.
    pub fn able(&self, need: &Need<'_>, except: &[&str]) -> Vec<&str> {
        let others = self.hosts.iter().filter(|host| !except.contains(&host.name.as_str()));
        others.filter(|host| host.fits(need).is_ok()).map(|host| host.name.as_str()).collect()
    }

    /// Of the hosts that can run the guest the one with the most memory free; the first by name of several. `holder` gets
    /// the memory back that the guest has there.
    ///
    /// # Errors
    /// [`Code::Incapable`], with what keeps each host from it.
    pub fn place(&self, need: &Need<'_>, holder: Option<&str>) -> Result<&Candidate, Failure> {
        let judge = |host: &Candidate| match holder == Some(host.name.as_str()) {
            true => host.keeps(need).map(|info| info.memory_bytes_free.saturating_add(need.config.memory_bytes)),
            false => host.fits(need).map(|info| info.memory_bytes_free),
        };
        let able = self.hosts.iter().filter_map(|host| Some((host, judge(host).ok()?)));
        let best = able.rev().max_by_key(|(_, free)| *free);
        best.map(|(host, _)| host).ok_or_else(|| {
            let why: Vec<String> = self.hosts.iter().filter_map(|host| judge(host).err()).map(|f| f.message).collect();
            Failure::new(Code::Incapable, format!("no host can run {}: {}", need.vm, why.join("; ")))
                .hint("`ctl host ls` shows the hosts")
        })
    }

    /// The contract of a machine that has none, because it was made by a release before contracts: by its model's name.
    pub fn contract_by_model(&self, config: &MachineConfig) -> Option<CapabilitySet> {
        self.hosts.iter().find_map(|host| host.model(config))
    }
}

/// Contracts of VMs that have none yet and whose model this host knows: name of the VM, and its contract.
pub fn missing_contracts(state: &State, heard: &Candidate) -> Vec<(String, CapabilitySet)> {
    let without = state.vms.values().filter(|vm| vm.capabilities.is_empty());
    without.filter_map(|vm| Some((vm.name.clone(), heard.model(&vm.config)?))).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ledger::tests::{config, contract, create_plan};
    use proto::capability::Withheld;

    /// A host that is up and lacks what is named.
    pub(crate) fn up(name: &str, lacks: &[&str]) -> Candidate {
        let mut set = CapabilitySet { model: String::new(), ..contract() };
        set.facts.tsc_scaling = true;
        for feature in lacks {
            set.withhold(&Withheld::parse(feature).unwrap());
        }
        let facts = EngineFacts {
            engine: "soft".into(),
            offered: true,
            capabilities: Some(set.encode()),
            models: vec![contract().encode()],
            ..EngineFacts::default()
        };
        let kvm = EngineFacts { engine: "kvm".into(), reason: "locked".into(), ..EngineFacts::default() };
        let info = HostInfo {
            name: name.into(),
            engines: vec!["soft".into()],
            memory_bytes_free: 1 << 30,
            engine_facts: vec![facts, kvm],
            ..HostInfo::default()
        };
        Candidate { name: name.into(), state: HostState::Up, info: Some(info) }
    }

    fn with_memory(mut host: Candidate, bytes: u64) -> Candidate {
        host.info.as_mut().unwrap().memory_bytes_free = bytes;
        host
    }

    #[test]
    fn a_refusal_names_the_bits_and_who_would_do() {
        let (config, contract) = (config(), contract());
        let need = Need { vm: "vm1", config: &config, contract: &contract };
        let silent = Candidate { state: HostState::Silent, ..up("hostD", &[]) };
        let hosts = vec![
            up("hostA", &[]),
            up("hostB", &["popcnt"]),
            up("hostC", &[]),
            silent,
            with_memory(up("hostE", &[]), 1),
        ];
        let fleet = Fleet { hosts };
        assert_eq!(fleet.fitting("hostC", &need, Some("hostA")).unwrap().name, "hostC");
        let refused = fleet.fitting("hostB", &need, Some("hostA")).unwrap_err();
        assert_eq!(refused.code, Code::Incapable);
        assert_eq!(refused.message, "hostB cannot run vm1, a soft-v1: it lacks CPUID 0000_0001.0 ECX[23] popcnt");
        assert_eq!(refused.hint, "hostC would do; `ctl host compare hostA hostB` shows what differs");
        assert_eq!(fleet.fitting("hostD", &need, None).unwrap_err().code, Code::Unreachable);
        assert_eq!(fleet.fitting("hostE", &need, None).unwrap_err().code, Code::Exhausted);
        assert_eq!(fleet.fitting("hostZ", &need, None).unwrap_err().code, Code::NotFound);
        let kvm = MachineConfig { engine: "kvm".into(), ..config.clone() };
        let refused = fleet.fitting("hostC", &Need { config: &kvm, ..need }, None).unwrap_err();
        assert_eq!(refused.message, "hostC cannot run guests on engine kvm: locked");
        assert_eq!(refused.hint, "no other host of the cluster would do");
    }

    #[test]
    fn a_host_that_does_not_say_what_it_can_is_not_trusted() {
        let (config, contract) = (config(), contract());
        let need = Need { vm: "vm1", config: &config, contract: &contract };
        let mut old = up("hostB", &[]);
        old.info.as_mut().unwrap().engine_facts.clear();
        assert!(old.keeps(&need).unwrap_err().message.contains("older release"));
        let mut mute = up("hostB", &[]);
        mute.info.as_mut().unwrap().engine_facts[0].capabilities = None;
        assert_eq!(mute.keeps(&need).unwrap_err().code, Code::Incapable);
    }

    #[test]
    fn a_guest_is_placed_where_the_most_memory_is_among_those_that_would_do() {
        let (config, contract) = (config(), contract());
        let need = Need { vm: "vm1", config: &config, contract: &contract };
        let hosts = vec![
            with_memory(up("hostA", &["popcnt"]), 9 << 30),
            with_memory(up("hostB", &[]), 2 << 30),
            with_memory(up("hostC", &[]), 2 << 30),
            with_memory(up("hostD", &[]), 1 << 30),
        ];
        assert_eq!(Fleet { hosts: hosts.clone() }.place(&need, None).unwrap().name, "hostB");
        assert_eq!(Fleet { hosts: hosts.clone() }.place(&need, Some("hostC")).unwrap().name, "hostC");
        let refused = Fleet { hosts: hosts[..1].to_vec() }.place(&need, None).unwrap_err();
        assert!(refused.code == Code::Incapable && refused.message.contains("popcnt"), "{refused}");
    }

    #[test]
    fn a_contract_is_frozen_with_what_the_configuration_leaves_open() {
        let mut open = MachineConfig { cpu_model: String::new(), tsc_hz: 0, ..config() };
        let frozen = up("hostA", &[]).freeze(&mut open).unwrap();
        assert_eq!((open.cpu_model.as_str(), open.tsc_hz), ("soft-v1", contract().facts.tsc_khz * 1000));
        assert_eq!(frozen, contract());
        let mut faster = MachineConfig { tsc_hz: 5_000_000, ..config() };
        assert_eq!(up("hostA", &[]).freeze(&mut faster).unwrap().facts.tsc_khz, 5000);
        let mut unknown = MachineConfig { cpu_model: "soft-v9".into(), ..config() };
        let refused = up("hostA", &[]).freeze(&mut unknown).unwrap_err();
        assert!(refused.code == Code::Incapable && refused.hint.contains("soft-v1"), "{refused:?}");
    }

    #[test]
    fn a_vm_without_a_contract_gets_that_of_its_model() {
        use crate::ledger::event::Task;
        let mut plan = create_plan("vm1", "hostA");
        let Task::Create { capabilities, config, .. } = &mut plan.task else { panic!("a create plan creates") };
        capabilities.clear();
        config.cpu_model = "soft-v1".into();
        let mut state = State::default();
        crate::ledger::tests::begin(&mut state, "op1", plan);
        assert_eq!(missing_contracts(&state, &up("hostA", &[])), [("vm1".to_owned(), contract())]);
        let silent = Candidate { state: HostState::Silent, ..up("hostA", &[]) };
        assert_eq!(missing_contracts(&state, &silent), []);
    }
}

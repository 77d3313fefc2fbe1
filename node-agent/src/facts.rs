//! What this host can give a guest, engine by engine, and whether that is enough for one.
//!
//! Measured once, when the agent starts: processor, kernel and settings do not change under it. What is said of an engine
//! is what was measured: KVM is reported where its device is, and offered where it has all that a guest needs.
//! This file refuses to know who asks and which guests there are.

use std::arch::x86_64::{__cpuid, __cpuid_count};

use proto::capability::{CapabilitySet, Facts as Widths, Withheld};
use proto::status::Code;
use proto::v1::{EngineFacts, HostHardware, MachineConfig};
use vmcb_engine::capability::{CpuModel, soft_host};
use vmcb_engine::engine::kvm::{self, KvmError};

use crate::host::TSC_HZ;
use crate::migration::Failure;
use crate::runner::faults::Faults;

/// All that is reported and checked.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Engines that were found, those that run guests first.
    pub engines: Vec<EngineFacts>,
    /// The machine below them.
    pub hardware: HostHardware,
    /// What the operator withholds, as it was written.
    pub withheld: Vec<String>,
    /// Why no guest can run here before its pages have come; empty: it can.
    pub lazy_refused: String,
    soft: CapabilitySet,
    kvm: Option<CapabilitySet>,
}

impl Facts {
    /// Looks at the host once.
    pub fn measure(withheld: &[Withheld]) -> Facts {
        let mut soft = soft_host();
        for feature in withheld {
            soft.withhold(feature);
        }
        let models = CpuModel::ALL.map(|model| model.contract(TSC_HZ / 1000).encode());
        let mut engines = vec![EngineFacts {
            engine: "soft".to_owned(),
            offered: true,
            reason: String::new(),
            capabilities: Some(soft.encode()),
            models: models.to_vec(),
        }];
        let measured = kvm::capabilities().map(|mut set| {
            withheld.iter().for_each(|feature| set.withhold(feature));
            set
        });
        engines.extend(kvm_facts(&measured));
        let kvm = measured.ok();
        let withheld = withheld.iter().map(|feature| feature.text.clone()).collect();
        let lazy_refused = Faults::open().err().map_or(String::new(), |error| error.to_string());
        Facts { engines, hardware: hardware(), withheld, lazy_refused, soft, kvm }
    }

    /// Names of the engines that run guests.
    pub fn offered(&self) -> Vec<String> {
        self.engines.iter().filter(|engine| engine.offered).map(|engine| engine.engine.clone()).collect()
    }

    /// Checks a guest's contract against this host; the refusal names every bit that is missing.
    ///
    /// # Errors
    /// [`Code::Protocol`]: there is none. [`Code::Corrupt`]: these bytes are none, or the configuration's guest is another.
    /// [`Code::Incapable`]: its model is not known here, or the host lacks what is named.
    pub fn check_contract(&self, contract: &[u8], config: &MachineConfig) -> Result<(), Failure> {
        if contract.is_empty() {
            return Err(Failure::new(Code::Protocol, "the guest comes without a contract of what it needs"));
        }
        let guest = CapabilitySet::from_bytes(contract).map_err(|error| Failure::new(Code::Corrupt, error))?;
        let model = model(&guest.model)?;
        let named = named_model(config);
        if named != model.name() {
            let text = format!("the contract is of CPU model {:?}, the configuration says {named:?}", guest.model);
            return Err(Failure::new(Code::Corrupt, text));
        }
        let tsc_hz = if config.tsc_hz == 0 { TSC_HZ } else { config.tsc_hz };
        if tsc_hz / 1000 != guest.facts.tsc_khz {
            let text = format!("the contract's TSC has {} kHz, the configuration's {tsc_hz} Hz", guest.facts.tsc_khz);
            return Err(Failure::new(Code::Corrupt, text));
        }
        let (host, whose) = self.engine(&config.engine)?;
        let failing = guest.failing_on(host);
        if failing.is_empty() {
            return Ok(());
        }
        let missing: Vec<String> = failing.iter().map(ToString::to_string).collect();
        Err(Failure::new(Code::Incapable, format!("{whose} lacks {}", missing.join(", "))))
    }

    /// What an engine of this host has, and what it is called in a refusal.
    fn engine(&self, engine: &str) -> Result<(&CapabilitySet, &'static str), Failure> {
        if engine != "kvm" {
            return Ok((&self.soft, "this host"));
        }
        let reason = || self.engines.iter().find(|facts| facts.engine == "kvm").map(|facts| facts.reason.as_str());
        let refused = || {
            let why = reason().unwrap_or("it has no /dev/kvm");
            Failure::new(Code::Incapable, format!("this host runs no guests on engine \"kvm\": {why}"))
        };
        self.kvm.as_ref().map(|set| (set, "engine \"kvm\" of this host")).ok_or_else(refused)
    }
}

/// The contract of the model that a configuration names, for who sends none.
///
/// # Errors
/// [`Code::Incapable`]: the model is not known here.
pub fn contract_of(config: &MachineConfig) -> Result<Vec<u8>, Failure> {
    let named = named_model(config);
    let tsc_hz = if config.tsc_hz == 0 { TSC_HZ } else { config.tsc_hz };
    Ok(model(named)?.contract(tsc_hz / 1000).to_bytes())
}

/// The name of a configuration's CPU model: its engine's default where it names none.
pub fn named_model(config: &MachineConfig) -> &str {
    match (config.cpu_model.as_str(), config.engine.as_str()) {
        ("", "kvm") => CpuModel::X86V2.name(),
        ("", _) => CpuModel::SoftV1.name(),
        (named, _) => named,
    }
}

/// A model by its name.
///
/// # Errors
/// [`Code::Incapable`], with the names of those that are known.
pub fn model(name: &str) -> Result<CpuModel, Failure> {
    CpuModel::by_name(name).ok_or_else(|| {
        let known: Vec<&str> = CpuModel::ALL.iter().map(|model| model.name()).collect();
        let name: String = name.chars().take(60).collect();
        Failure::new(Code::Incapable, format!("CPU model {name:?} is not known here; known are: {}", known.join(", ")))
    })
}

/// KVM, if this host has its device. Models at the host's own TSC rate; the one that is meant where none is named comes first:
/// the richest that the host keeps of those that the software engine keeps, too.
fn kvm_facts(measured: &Result<CapabilitySet, KvmError>) -> Option<EngineFacts> {
    let engine = "kvm".to_owned();
    match measured {
        Ok(set) => {
            let richer = CpuModel::ALL.into_iter().filter(|model| matches!(model, CpuModel::Hardware(_)));
            let models = [CpuModel::X86V2, CpuModel::X86V1, CpuModel::SoftV1].into_iter().chain(richer);
            let mut contracts: Vec<_> = models.map(|model| model.contract(set.facts.tsc_khz)).collect();
            contracts.sort_by_key(|contract| !contract.failing_on(set).is_empty());
            let models = contracts.iter().map(CapabilitySet::encode).collect();
            let capabilities = Some(set.encode());
            Some(EngineFacts { engine, offered: true, reason: String::new(), capabilities, models })
        }
        Err(KvmError::Missing) => None,
        Err(error) => Some(EngineFacts { engine, reason: crate::vm::actor::chain(error), ..EngineFacts::default() }),
    }
}

fn hardware() -> HostHardware {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let (cpu_name, microcode) = parse_cpuinfo(&read("/proc/cpuinfo"));
    let kernel_release = read("/proc/sys/kernel/osrelease").trim().to_owned();
    HostHardware { cpu_name, microcode, kernel_release, processor: Some(processor().encode()) }
}

/// Name and microcode of the first processor.
fn parse_cpuinfo(text: &str) -> (String, String) {
    let field = |name: &str| {
        let values = text.lines().filter_map(|line| line.split_once(':'));
        values.filter(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned()).next()
    };
    (field("model name").unwrap_or_default(), field("microcode").unwrap_or_default())
}

/// What CPUID says on this host. The hypervisor's leaves, if the host is itself a guest, are not the processor's.
fn processor() -> CapabilitySet {
    let mut cpuid = |leaf: u32, subleaf: u32| {
        let range = leaf & 0xffff_0000;
        if range == 0x4000_0000 || leaf > __cpuid(range).eax {
            return [0; 4];
        }
        let answer = __cpuid_count(leaf, subleaf);
        [answer.eax, answer.ebx, answer.ecx, answer.edx]
    };
    let [widths, ..] = cpuid(0x8000_0008, 0);
    let facts = Widths { phys_bits: widths & 0xff, linear_bits: widths >> 8 & 0xff, ..Widths::default() };
    CapabilitySet::from_cpuid("", &mut cpuid, facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> MachineConfig {
        MachineConfig { cpu_model: "soft-v1".into(), tsc_hz: TSC_HZ, ..MachineConfig::default() }
    }

    fn code(result: Result<(), Failure>) -> Code {
        result.unwrap_err().code
    }

    #[test]
    fn a_contract_that_this_host_keeps_is_accepted_and_what_is_none_is_not() {
        let facts = Facts::measure(&[]);
        let contract = CpuModel::SoftV1.contract(TSC_HZ / 1000);
        assert_eq!(facts.check_contract(&contract.to_bytes(), &machine()), Ok(()));
        assert_eq!(facts.check_contract(&contract_of(&machine()).unwrap(), &MachineConfig::default()), Ok(()));
        assert_eq!(code(facts.check_contract(&[], &machine())), Code::Protocol);
        assert_eq!(code(facts.check_contract(&[0xff; 7], &machine())), Code::Corrupt);
        let mut foreign = contract.clone();
        foreign.facts.engines = ["kvm".to_owned()].into();
        assert_eq!(code(facts.check_contract(&foreign.to_bytes(), &machine())), Code::Incapable);
        let unknown = CapabilitySet { model: "soft-v9".into(), ..contract.clone() };
        let refusal = facts.check_contract(&unknown.to_bytes(), &machine()).unwrap_err();
        assert!(refusal.code == Code::Incapable && refusal.reason.contains("soft-v9"), "{refusal}");
        let other = MachineConfig { cpu_model: "soft-v9".into(), ..machine() };
        assert_eq!(code(facts.check_contract(&contract.to_bytes(), &other)), Code::Corrupt);
        let faster = MachineConfig { tsc_hz: 2 * TSC_HZ, ..machine() };
        assert_eq!(code(facts.check_contract(&contract.to_bytes(), &faster)), Code::Corrupt);
    }

    #[test]
    fn what_is_withheld_is_missed_by_name() {
        let withheld = ["popcnt", "MSR C001_1029", "avx2"].map(|text| Withheld::parse(text).unwrap());
        let facts = Facts::measure(&withheld);
        let refusal = facts.check_contract(&contract_of(&machine()).unwrap(), &machine()).unwrap_err();
        assert_eq!(refusal.code, Code::Incapable);
        assert_eq!(refusal.reason, "this host lacks CPUID 0000_0001.0 ECX[23] popcnt, MSR C001_1029 DE_CFG");
        let reported = CapabilitySet::decode(facts.engines[0].capabilities.clone().unwrap()).unwrap();
        assert_eq!(facts.withheld, ["popcnt", "MSR C001_1029", "avx2"]);
        assert_eq!(facts.engines[0].models.len(), CpuModel::ALL.len(), "models are known although they are not kept");
        assert_eq!(reported.differences(&soft_host()).len(), 2);
    }

    #[test]
    fn kvm_is_offered_where_it_can_run_guests_and_the_reason_is_said_where_not() {
        assert_eq!(kvm_facts(&Err(KvmError::Missing)), None);
        let locked = kvm_facts(&Err(KvmError::NotPermitted)).unwrap();
        assert!(!locked.offered && locked.capabilities.is_none() && locked.reason.contains("/dev/kvm"), "{locked:?}");
        let mut set = soft_host();
        set.facts.tsc_khz = 2_500_000;
        let found = kvm_facts(&Ok(set)).unwrap();
        assert!(found.offered && found.models[0].model == "x86-64-v2" && found.models[0].tsc_khz == 2_500_000);
        let facts = Facts { kvm: None, engines: vec![locked], ..Facts::measure(&[]) };
        let on_kvm = MachineConfig { engine: "kvm".into(), ..machine() };
        let refusal = facts.check_contract(&contract_of(&on_kvm).unwrap(), &on_kvm).unwrap_err();
        assert!(refusal.code == Code::Incapable && refusal.reason.contains("may not be opened"), "{refusal}");
    }

    #[test]
    fn the_processor_is_measured() {
        let set = processor();
        // System V ABI, level 2: what this program itself was built for.
        let popcnt = Withheld::parse("CPUID 0000_0001.0 ECX[23]").unwrap();
        let mut less = set.clone();
        less.withhold(&popcnt);
        assert_eq!(set.failing_on(&less).iter().filter(|failing| failing.to_string().contains("popcnt")).count(), 1);
        assert!((36..=52).contains(&set.facts.phys_bits), "{:?}", set.facts);
        assert_eq!(CapabilitySet::from_bytes(&set.to_bytes()), Ok(set));
    }

    #[test]
    fn cpuinfo_is_read() {
        let text = "processor\t: 0\nmodel name\t: AMD EPYC\nmicrocode\t: 0xa101158\n\nmodel name\t: other\n";
        assert_eq!(parse_cpuinfo(text), ("AMD EPYC".to_owned(), "0xa101158".to_owned()));
        assert_eq!(parse_cpuinfo(""), (String::new(), String::new()));
    }
}

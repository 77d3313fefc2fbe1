//! `ctl host baseline`: the CPU models that every one of some hosts can run, engine by engine, and what keeps the others from it.
//!
//! A guest is created with a model; it goes to any host that keeps the model's contract. The richest model that all hosts keep
//! is therefore what a guest should be that may go to all of them. How a contract is checked is `proto::capability`'s.

use std::collections::{BTreeMap, BTreeSet};

use proto::capability::CapabilitySet;
use proto::v1;
use serde::Serialize;

use super::output::{Report, Text};
use super::report::dash;

/// What is said of a model in one line at most.
const NAMED_MAX: usize = 4;

/// What some hosts have in common.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Baseline {
    hosts: Vec<String>,
    models: Vec<Model>,
    /// By engine, the model that asks for most of those that every host keeps.
    best: BTreeMap<String, String>,
}

/// A model on an engine.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Model {
    engine: String,
    model: String,
    /// Every host keeps it.
    everywhere: bool,
    /// What is missing, by host; nothing for hosts that keep it.
    lacks: BTreeMap<String, Vec<String>>,
}

/// Puts hosts beside each other.
pub fn of(hosts: &[v1::HostRecord]) -> Baseline {
    let hosts: Vec<v1::HostInfo> = hosts.iter().filter_map(|record| record.info.clone()).collect();
    let known = |facts: &v1::EngineFacts| -> Vec<(String, String)> {
        facts.models.iter().map(|model| (facts.engine.clone(), model.model.clone())).collect()
    };
    let all: BTreeSet<(String, String)> =
        hosts.iter().flat_map(|info| info.engine_facts.iter().flat_map(known)).collect();
    let mut best: BTreeMap<String, (usize, String)> = BTreeMap::new();
    let mut models = Vec::new();
    for (engine, model) in all {
        // A guest of any of the hosts, at its TSC's rate.
        let guests: Vec<CapabilitySet> = hosts.iter().filter_map(|info| contract(info, &engine, &model)).collect();
        let missing = hosts.iter().map(|info| (info.name.clone(), lacks(info, &engine, &model, &guests)));
        let lacks: BTreeMap<String, Vec<String>> = missing.filter(|(_, lacks)| !lacks.is_empty()).collect();
        let demands = guests.first().map_or(0, CapabilitySet::demands);
        if lacks.is_empty() && best.get(&engine).is_none_or(|(most, _)| demands > *most) {
            best.insert(engine.clone(), (demands, model.clone()));
        }
        models.push(Model { engine, model, everywhere: lacks.is_empty(), lacks });
    }
    let best = best.into_iter().map(|(engine, (_, model))| (engine, model)).collect();
    Baseline { models, best, hosts: hosts.into_iter().map(|info| info.name).collect() }
}

fn decode(set: Option<&v1::CapabilitySet>) -> Option<CapabilitySet> {
    set.cloned().and_then(|set| CapabilitySet::decode(set).ok())
}

/// What a guest of a model needs that is made on an engine of this host.
fn contract(info: &v1::HostInfo, engine: &str, model: &str) -> Option<CapabilitySet> {
    let facts = info.engine_facts.iter().find(|facts| facts.engine == engine)?;
    decode(facts.models.iter().find(|known| known.model == model))
}

/// What a host lacks for any of the guests, all of a model, on an engine, in words.
fn lacks(info: &v1::HostInfo, engine: &str, model: &str, guests: &[CapabilitySet]) -> Vec<String> {
    let Some(facts) = info.engine_facts.iter().find(|facts| facts.engine == engine) else {
        return vec!["the engine".to_owned()];
    };
    if !facts.offered {
        return vec![facts.reason.clone()];
    }
    match (contract(info, engine, model), decode(facts.capabilities.as_ref())) {
        (Some(_), Some(host)) => {
            let mut words: Vec<String> = Vec::new();
            for failing in guests.iter().flat_map(|guest| guest.failing_on(&host)) {
                let word = failing.to_string();
                if !words.contains(&word) {
                    words.push(word);
                }
            }
            words
        }
        (None, _) => vec!["the model is not known there".to_owned()],
        (_, None) => vec!["it does not say what it can".to_owned()],
    }
}

impl Report for Baseline {
    fn text(&self) -> Text {
        let row = |model: &Model| {
            let of_host = |(host, lacks): (&String, &Vec<String>)| {
                let more = lacks.len().saturating_sub(NAMED_MAX);
                let named = lacks.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
                if more == 0 { format!("{host}: {named}") } else { format!("{host}: {named} and {more} more") }
            };
            let lacks: Vec<String> = model.lacks.iter().map(of_host).collect();
            let verdict = if model.everywhere { "yes" } else { "no" };
            vec![model.engine.clone(), model.model.clone(), verdict.to_owned(), dash(&lacks.join("; "))]
        };
        let mut fields = vec![("hosts".to_owned(), self.hosts.join(", "))];
        fields.extend(self.best.iter().map(|(engine, model)| (format!("best on {engine}"), model.clone())));
        Text::Parts(vec![
            Text::Fields(fields),
            Text::Rows {
                columns: vec!["engine", "model", "everywhere", "lacking"],
                rows: self.models.iter().map(row).collect(),
                empty: "no host says what it can",
            },
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::super::hosts::tests;
    use super::*;
    use vmcb_engine::capability::CpuModel;

    /// A host that knows some models.
    fn host(name: &str, withheld: &[&str]) -> v1::HostRecord {
        let mut host = tests::host(name, withheld);
        let info = host.info.as_mut().unwrap();
        let models = [CpuModel::SoftV1, CpuModel::X86V1, CpuModel::X86V2];
        info.engine_facts[0].models = models.map(|model| model.contract(1_000_000).encode()).to_vec();
        host
    }

    #[test]
    fn the_models_of_all_hosts_are_told_from_those_of_some() {
        let found = of(&[host("hostA", &[]), host("hostB", &["fsgsbase"]), host("hostC", &["popcnt", "abm"])]);
        let everywhere: Vec<(&str, bool)> = found.models.iter().map(|m| (m.model.as_str(), m.everywhere)).collect();
        assert_eq!(everywhere, [("soft-v1", false), ("x86-64-v1", true), ("x86-64-v2", false)]);
        assert_eq!(found.models[2].lacks["hostC"], ["CPUID 0000_0001.0 ECX[23] popcnt"]);
        assert_eq!(found.best, [("soft".to_owned(), "x86-64-v1".to_owned())].into());
        assert_eq!(of(&[host("hostA", &[]), host("hostB", &["fsgsbase"])]).best["soft"], "x86-64-v2");
        let text = found.text().render();
        assert!(text.contains("best on soft  x86-64-v1"), "{text}");
        assert!(text.contains("hostB: CPUID 0000_0007.0 EBX[0] fsgsbase; hostC:"), "{text}");
        // Guests of the one keep the rate of its TSC, which the other neither has nor makes.
        let mut faster = host("hostE", &[]);
        faster.info.as_mut().unwrap().engine_facts[0].models.iter_mut().for_each(|model| model.tsc_khz = 2_000_000);
        let mut fixed = host("hostF", &[]);
        let set = fixed.info.as_mut().unwrap().engine_facts[0].capabilities.as_mut().unwrap();
        (set.tsc_scaling, set.tsc_khz) = (false, 1_000_000);
        let rates = of(&[faster, fixed]);
        let lacks = &rates.models.iter().find(|model| model.model == "x86-64-v2").unwrap().lacks;
        assert_eq!(lacks["hostF"], ["a TSC of 2000000 kHz (the host's runs at 1000000 kHz and cannot be scaled)"]);
        let mut without = host("hostD", &[]);
        without.info.as_mut().unwrap().engine_facts.clear();
        assert_eq!(of(&[host("hostA", &[]), without]).models[1].lacks["hostD"], ["the engine"]);
    }
}

//! `ctl host ...`: hosts, what each can give a guest, and what two of them differ in.
//!
//! Sets of capabilities and the words for them are `proto::capability`'s; this file only puts them beside each other.

use std::collections::BTreeSet;

use proto::capability::CapabilitySet;
use proto::status::Code;
use proto::v1;
use serde::Serialize;

use super::baseline;
use super::client::Client;
use super::failure::Failure;
use super::grammar::HostCommand;
use super::output::{self, Format, Report, Text};
use super::report::{Host, List, dash};

/// Lines of features are broken here.
const WIDTH: usize = 90;

/// Carries out a command.
///
/// # Errors
/// The controller does not answer, or knows no such host.
pub async fn run(mut client: Client, command: HostCommand, format: Format) -> Result<(), Failure> {
    let reply = client.list_hosts(v1::Empty {}).await.map_err(|e| Failure::from_status("list the hosts", &e))?;
    let hosts = reply.into_inner().hosts;
    match command {
        HostCommand::Ls => output::print(format, &List(hosts.into_iter().map(Host::from).collect())),
        HostCommand::Show { host } => output::print(format, &Shown::from(find(&hosts, &host)?)),
        HostCommand::Compare { a, b } => output::print(format, &compare(find(&hosts, &a)?, find(&hosts, &b)?)),
        HostCommand::Baseline { hosts: names } if names.is_empty() => {
            let up: Vec<v1::HostRecord> = hosts.into_iter().filter(|record| record.state == "up").collect();
            output::print(format, &baseline::of(&up))
        }
        HostCommand::Baseline { hosts: names } => {
            let chosen: Result<Vec<v1::HostRecord>, Failure> = names.iter().map(|name| find(&hosts, name)).collect();
            output::print(format, &baseline::of(&chosen?))
        }
    }
}

fn name(record: &v1::HostRecord) -> &str {
    record.info.as_ref().map(|info| info.name.as_str()).unwrap_or_default()
}

fn find(hosts: &[v1::HostRecord], wanted: &str) -> Result<v1::HostRecord, Failure> {
    hosts.iter().find(|record| name(record) == wanted).cloned().ok_or_else(|| {
        let names: Vec<&str> = hosts.iter().map(name).collect();
        Failure::new(Code::NotFound, format!("no host is called {wanted:?}"))
            .hint(format!("there are: {}", dash(&names.join(", "))))
    })
}

/// A host with all that it can.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    host: Host,
    cpu_name: String,
    microcode: String,
    kernel_release: String,
    withheld: Vec<String>,
    engine_facts: Vec<Engine>,
    processor: Vec<Line>,
}

/// An engine of a host.
#[derive(Debug, Serialize)]
struct Engine {
    engine: String,
    offered: bool,
    reason: String,
    models: Vec<Model>,
    capabilities: Vec<Line>,
}

/// A CPU model that an engine knows.
#[derive(Debug, Serialize)]
struct Model {
    model: String,
    atoms: usize,
    /// What the host lacks of it; nothing: guests of it can run here.
    lacks: Vec<String>,
}

/// Some features under one heading.
#[derive(Debug, Serialize)]
struct Line {
    what: String,
    has: Vec<String>,
}

/// A set that was reported; one that does not decode is none.
fn decoded(set: Option<v1::CapabilitySet>) -> Option<CapabilitySet> {
    CapabilitySet::decode(set?).ok()
}

fn lines(set: Option<&CapabilitySet>) -> Vec<Line> {
    let lines = set.map(CapabilitySet::lines).unwrap_or_default();
    lines.into_iter().map(|line| Line { what: line.what, has: line.has }).collect()
}

impl From<v1::EngineFacts> for Engine {
    fn from(facts: v1::EngineFacts) -> Engine {
        let set = decoded(facts.capabilities);
        let model = |contract: v1::CapabilitySet| {
            let contract = decoded(Some(contract))?;
            let failing = set.as_ref().map(|set| contract.failing_on(set)).unwrap_or_default();
            let lacks = failing.iter().map(ToString::to_string).collect();
            Some(Model { atoms: contract.demands(), lacks, model: contract.model })
        };
        Engine {
            engine: facts.engine,
            offered: facts.offered,
            reason: facts.reason,
            models: facts.models.into_iter().filter_map(model).collect(),
            capabilities: lines(set.as_ref()),
        }
    }
}

impl From<v1::HostRecord> for Shown {
    fn from(record: v1::HostRecord) -> Shown {
        let info = record.info.clone().unwrap_or_default();
        let hardware = info.hardware.unwrap_or_default();
        Shown {
            host: Host::from(record),
            cpu_name: hardware.cpu_name,
            microcode: hardware.microcode,
            kernel_release: hardware.kernel_release,
            withheld: info.withheld,
            engine_facts: info.engine_facts.into_iter().map(Engine::from).collect(),
            processor: lines(decoded(hardware.processor).as_ref()),
        }
    }
}

/// Words in lines of a readable width.
fn wrapped(words: &[String]) -> String {
    let mut text = String::new();
    let mut column = 0;
    for word in words {
        let width = word.chars().count();
        if column > 0 {
            let breaks = column + 1 + width > WIDTH;
            text.push(if breaks { '\n' } else { ' ' });
            column = if breaks { 0 } else { column + 1 };
        }
        text.push_str(word);
        column += width;
    }
    text
}

fn fields(lines: &[Line]) -> impl Iterator<Item = (String, String)> {
    lines.iter().map(|line| (line.what.clone(), wrapped(&line.has)))
}

impl Engine {
    fn text(&self) -> Text {
        let runs = if self.offered { "runs guests".to_owned() } else { format!("runs no guests: {}", self.reason) };
        let model = |model: &Model| match &model.lacks[..] {
            [] => format!("{} ({} atoms)", model.model, model.atoms),
            lacks => format!("{} cannot run here: {}", model.model, lacks.join(", ")),
        };
        let models: Vec<String> = self.models.iter().map(model).collect();
        let mut all = vec![("engine".to_owned(), format!("{} {runs}", self.engine))];
        all.extend((!models.is_empty()).then(|| ("models".to_owned(), models.join("\n"))));
        all.extend(fields(&self.capabilities));
        Text::Fields(all)
    }
}

impl Report for Shown {
    fn text(&self) -> Text {
        let machine = Text::fields([
            ("processor", self.cpu_name.clone()),
            ("microcode", self.microcode.clone()),
            ("kernel", self.kernel_release.clone()),
            ("withheld", self.withheld.join(", ")),
        ]);
        let mut parts = vec![self.host.text(), machine];
        parts.extend(self.engine_facts.iter().map(Engine::text));
        let cpuid = Text::Fields(fields(&self.processor).filter(|(what, _)| what.starts_with("CPUID")).collect());
        parts.extend([Text::Lines("the processor itself:".to_owned()), cpuid]);
        Text::Parts(parts)
    }
}

/// What two hosts differ in.
#[derive(Debug, Serialize)]
struct Compared {
    a: String,
    b: String,
    differences: Vec<Row>,
}

/// One difference: `of` is an engine, `processor` or `host`.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    of: String,
    what: String,
    a: String,
    b: String,
}

fn row(of: &str, what: &str, a: impl Into<String>, b: impl Into<String>) -> Row {
    Row { of: of.to_owned(), what: what.to_owned(), a: a.into(), b: b.into() }
}

fn compare(a: v1::HostRecord, b: v1::HostRecord) -> Compared {
    let (a, b) = (a.info.unwrap_or_default(), b.info.unwrap_or_default());
    let engines: BTreeSet<&str> =
        a.engine_facts.iter().chain(&b.engine_facts).map(|facts| facts.engine.as_str()).collect();
    let mut differences = Vec::new();
    for engine in engines {
        let of = |info: &v1::HostInfo| info.engine_facts.iter().find(|facts| facts.engine == engine).cloned();
        let (a, b) = (of(&a), of(&b));
        let word = |facts: &Option<v1::EngineFacts>| match facts {
            Some(facts) if facts.offered => "runs guests".to_owned(),
            Some(facts) => facts.reason.clone(),
            None => "not there".to_owned(),
        };
        if word(&a) != word(&b) {
            differences.push(row(engine, "engine", word(&a), word(&b)));
        }
        differences.extend(sets(engine, a.and_then(|a| a.capabilities), b.and_then(|b| b.capabilities)));
    }
    let withheld = |info: &v1::HostInfo| dash(&info.withheld.join(", "));
    let texts = [("withheld", withheld(&a), withheld(&b))];
    let (ha, hb) = (a.hardware.unwrap_or_default(), b.hardware.unwrap_or_default());
    differences.extend(sets("processor", ha.processor, hb.processor));
    let hardware = [
        ("processor", ha.cpu_name, hb.cpu_name),
        ("microcode", ha.microcode, hb.microcode),
        ("kernel", ha.kernel_release, hb.kernel_release),
        ("release", a.version, b.version),
    ];
    let differ = texts.into_iter().chain(hardware).filter(|(_, a, b)| a != b);
    differences.extend(differ.map(|(what, a, b)| row("host", what, dash(&a), dash(&b))));
    Compared { a: a.name, b: b.name, differences }
}

/// What two sets differ in, where both hosts have said what they can.
fn sets(of: &str, a: Option<v1::CapabilitySet>, b: Option<v1::CapabilitySet>) -> Vec<Row> {
    match (decoded(a), decoded(b)) {
        (Some(a), Some(b)) => a.differences(&b).into_iter().map(|d| row(of, &d.what, d.a, d.b)).collect(),
        (None, None) => Vec::new(),
        (a, _) => {
            let word = |known| if known { "known" } else { "not known" };
            vec![row(of, "capabilities", word(a.is_some()), word(a.is_none()))]
        }
    }
}

impl Report for Compared {
    fn text(&self) -> Text {
        let cells = |row: &Row| vec![row.of.clone(), row.what.clone(), row.a.clone(), row.b.clone()];
        let rows = self.differences.iter().map(cells).collect();
        Text::Parts(vec![
            Text::fields([("a", self.a.clone()), ("b", self.b.clone())]),
            Text::Rows {
                columns: vec!["of", "what", "a", "b"],
                rows,
                empty: "no difference: any guest of one can run on the other",
            },
        ])
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proto::capability::Withheld;
    use vmcb_engine::capability::{CpuModel, soft_host};

    /// A host whose software engine lacks some features.
    pub fn host(name: &str, withheld: &[&str]) -> v1::HostRecord {
        let mut set = soft_host();
        for feature in withheld {
            set.withhold(&Withheld::parse(feature).unwrap());
        }
        let soft = v1::EngineFacts {
            engine: "soft".into(),
            offered: true,
            capabilities: Some(set.encode()),
            models: vec![CpuModel::SoftV1.contract(1_000_000).encode()],
            ..Default::default()
        };
        let kvm = v1::EngineFacts { engine: "kvm".into(), reason: "locked".into(), ..Default::default() };
        let hardware = v1::HostHardware { cpu_name: "AMD EPYC".into(), microcode: "0x1".into(), ..Default::default() };
        let info = v1::HostInfo {
            name: name.into(),
            engine_facts: vec![soft, kvm],
            hardware: Some(hardware),
            withheld: withheld.iter().map(|text| (*text).to_owned()).collect(),
            ..Default::default()
        };
        v1::HostRecord { info: Some(info), state: "up".into(), heartbeat_age_ms: 1 }
    }

    #[test]
    fn a_host_shows_its_engines_and_what_models_they_keep() {
        let shown = Shown::from(host("hostA", &["popcnt"]));
        let text = shown.text().render();
        assert!(text.contains("soft-v1 cannot run here: CPUID 0000_0001.0 ECX[23] popcnt"), "{text}");
        assert!(text.contains("kvm runs no guests: locked") && text.contains("AMD EPYC"), "{text}");
        assert!(text.contains("sse4.2") && text.contains("LSTAR"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH + 60), "{text}");
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!((&json["name"], &json["withheld"][0]), (&"hostA".into(), &"popcnt".into()));
        assert_eq!(json["engine_facts"][0]["models"][0]["lacks"][0], "CPUID 0000_0001.0 ECX[23] popcnt");
    }

    #[test]
    fn two_hosts_differ_by_bit_and_name() {
        let found = compare(host("hostA", &[]), host("hostB", &["popcnt", "DE_CFG"]));
        assert_eq!(
            found.differences,
            [
                row("soft", "CPUID 0000_0001.0 ECX[23] popcnt", "yes", "no"),
                row("soft", "MSR C001_1029 DE_CFG", "yes", "no"),
                row("host", "withheld", "-", "popcnt, DE_CFG"),
            ]
        );
        assert!(found.text().render().contains("popcnt"));
        let same = compare(host("hostA", &["avx2"]), host("hostB", &["avx2"]));
        assert!(same.differences.is_empty() && same.text().render().contains("no difference"), "{same:?}");
    }

    #[test]
    fn an_engine_that_is_not_there_is_a_difference() {
        let mut b = host("hostB", &[]);
        b.info.as_mut().unwrap().engine_facts.clear();
        let found = compare(host("hostA", &[]), b).differences;
        assert!(found.contains(&row("soft", "engine", "runs guests", "not there")), "{found:?}");
        assert!(found.contains(&row("soft", "capabilities", "known", "not known")), "{found:?}");
    }
}

//! The pages for Prometheus: every name that the documents promise, with a value that can be, and no other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use e2e::cluster::{Cluster, wait};

use super::BUSY;

/// Names and kinds in the table at the head of a source file.
fn promised(file: &str) -> BTreeMap<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    let text = std::fs::read_to_string(path).unwrap();
    let rows = text.lines().filter_map(|line| line.strip_prefix("//! | `"));
    let row = |row: &str| {
        let mut cells = row.split('|').map(|cell| cell.trim().trim_matches('`').to_owned());
        Some((cells.next()?, cells.next()?))
    };
    rows.filter_map(row).collect()
}

/// The samples of a page: name with labels, and value; and the kinds that it declares.
struct Page {
    samples: BTreeMap<String, f64>,
    kinds: BTreeMap<String, String>,
}

impl Page {
    fn of(cluster: &Cluster, daemon: &str) -> Page {
        let text = cluster.metrics(daemon);
        let (mut samples, mut kinds, mut helped) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(kinds.insert(name.to_owned(), kind.to_owned()), None, "{name} is declared twice");
            } else if let Some(rest) = line.strip_prefix("# HELP ") {
                helped.insert(rest.split_once(' ').unwrap().0.to_owned());
            } else {
                let (key, value) = line.rsplit_once(' ').unwrap();
                let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
                assert_eq!(samples.insert(key.to_owned(), value), None, "{key} comes twice");
            }
        }
        for name in kinds.keys() {
            assert!(helped.contains(name), "{name} is not explained");
        }
        check_with_promtool(&text);
        Page { samples, kinds }
    }

    fn get(&self, key: &str) -> f64 {
        *self.samples.get(key).unwrap_or_else(|| panic!("no {key} in {:#?}", self.samples))
    }

    /// Every name of the table is there, with a finite value that is not negative; and no other.
    fn keeps(&self, table: &BTreeMap<String, String>) {
        assert!(table.len() >= 10, "{table:?}");
        assert_eq!(&self.kinds, table);
        for (name, kind) in table {
            let ends = if kind == "histogram" { vec!["_bucket", "_sum", "_count"] } else { vec![""] };
            for end in ends {
                let full = format!("{name}{end}");
                let values = self.samples.iter().filter(|(key, _)| key.split('{').next() == Some(&full));
                let values: Vec<f64> = values.map(|(_, value)| *value).collect();
                assert!(!values.is_empty(), "{full} has no value");
                assert!(values.iter().all(|value| value.is_finite() && *value >= 0.0), "{full}: {values:?}");
            }
        }
        let family = |key: &str| {
            let name = key.split('{').next().unwrap().to_owned();
            let stem = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end).map(str::to_owned));
            if table.contains_key(&name) { name } else { stem.unwrap_or(name) }
        };
        for key in self.samples.keys() {
            assert!(table.contains_key(&family(key)), "{key} is not documented");
        }
    }
}

fn check_with_promtool(page: &str) {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut command = Command::new("promtool");
    let started = command.args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn();
    // Where Prometheus is not installed, the checks of this file are what there is.
    let Ok(mut promtool) = started else { return };
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let said = promtool.wait_with_output().unwrap();
    assert!(said.status.success(), "{}\n{page}", String::from_utf8_lossy(&said.stderr));
}

#[test]
fn every_promised_number_is_there_and_no_other() {
    let cluster = Cluster::up(2);
    let before = Page::of(&cluster, "controller");
    assert_eq!(before.get("godwit_operations_total{task=\"migrate\",result=\"done\"}"), 0.0);
    cluster.create("vm1", "hostA", BUSY);
    cluster.goes_on("vm1", 3);
    let mut moving =
        cluster.begins("vm1", ["migrate", "vm1", "--to", "hostB", "--via", "controller", "--bandwidth", "6M"]);
    let during = Page::of(&cluster, "controller");
    assert_eq!(during.get("godwit_operations_active"), 1.0);
    Page::of(&cluster, "hostA");
    // The target makes room a moment after the operation began.
    wait("hostB to show what comes", || {
        (Page::of(&cluster, "hostB").get("godwit_agent_vms{state=\"incoming\"}") == 1.0).then_some(())
    });
    assert!(moving.wait().unwrap().success());
    // With the checkpoint that a recording begins with.
    cluster.ok(["record", "start", "vm1"]);
    wait("the new host to be heard", || (cluster.observed("vm1") == "running").then_some(()));

    let page = Page::of(&cluster, "controller");
    page.keeps(&promised("controller/src/metrics.rs"));
    assert_eq!(page.get("godwit_hosts{state=\"up\"}"), 2.0);
    assert_eq!(page.get("godwit_vms{intent=\"running\"}"), 1.0);
    assert_eq!(page.get("godwit_operations_total{task=\"migrate\",result=\"done\"}"), 1.0);
    assert_eq!(page.get("godwit_operations_active"), 0.0);
    assert_eq!(page.get("godwit_migration_downtime_seconds_count"), 1.0);
    let downtime = page.get("godwit_migration_downtime_seconds_sum");
    assert!(downtime > 0.0 && downtime < 10.0, "{downtime}");
    assert_eq!(page.get("godwit_checkpoints"), 1.0);
    let stored = page.get("godwit_checkpoint_stored_bytes");
    assert!((16e6..100e6).contains(&stored), "{stored}");
    assert_eq!(page.get("godwit_checkpoint_bytes_total"), stored);
    assert!(page.get("godwit_journal_lag_seconds{vm=\"vm1\"}") < 60.0);
    assert!(page.get("godwit_relay_bytes_total") >= 16e6);
    assert!(page.get("godwit_heartbeats_total{host=\"hostA\"}") >= 1.0);
    assert_eq!((page.get("godwit_damaged_total"), page.get("godwit_handshakes_refused_total")), (0.0, 0.0));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!(page.get("godwit_certificate_expiry_timestamp_seconds") > now);

    let table = promised("node-agent/src/metrics.rs");
    let target = Page::of(&cluster, "hostB");
    target.keeps(&table);
    assert_eq!(target.get("godwit_agent_vms{state=\"running\"}"), 1.0);
    assert!(target.get("godwit_agent_vm_retired_instructions{vm=\"vm1\"}") > 1e6);
    let resident = target.get("godwit_agent_vm_resident_bytes{vm=\"vm1\"}");
    assert!((16e6..64e6).contains(&resident), "{resident}");
    assert!(target.get("godwit_agent_heartbeat_age_seconds") < 10.0);
    assert_eq!(target.get("godwit_agent_transfers_total{kind=\"checkpoint\",result=\"done\"}"), 1.0);
    let source = Page::of(&cluster, "hostA");
    assert_eq!(source.get("godwit_agent_transfers_total{kind=\"migration\",result=\"done\"}"), 1.0);
    assert!(source.get("godwit_agent_sent_bytes_total{kind=\"migration\"}") >= 16e6);
    let gone = "godwit_agent_vm_resident_bytes{vm=\"vm1\"}";
    assert!(!source.samples.contains_key(gone), "hostA still tells of a VM that has left");
}

//! What a benchmark prints: one JSON object a line, or a table.

use std::collections::BTreeMap;

use serde::Serialize;

use super::median;

/// One measured figure. The names of the fields are a contract.
#[derive(Debug, Clone, Serialize)]
pub struct Measurement {
    suite: &'static str,
    case: String,
    metric: &'static str,
    unit: &'static str,
    value: f64,
    spread: [f64; 2],
    beside: BTreeMap<String, f64>,
}

impl Measurement {
    /// The median and spread of several runs; `None` without runs.
    pub fn of(suite: &'static str, case: &str, metric: &'static str, unit: &'static str, runs: &[f64]) -> Option<Self> {
        let (min, max) = runs.iter().fold((f64::MAX, f64::MIN), |(min, max), v| (min.min(*v), max.max(*v)));
        (!runs.is_empty()).then(|| Self {
            suite,
            case: case.to_owned(),
            metric,
            unit,
            value: median(runs),
            spread: [min, max],
            beside: BTreeMap::new(),
        })
    }

    /// With the median of what was measured in the same run for comparison.
    pub fn beside(mut self, name: &str, runs: &[f64]) -> Self {
        if !runs.is_empty() {
            self.beside.insert(name.to_owned(), median(runs));
        }
        self
    }
}

/// Prints measurements as they come.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    json: bool,
}

impl Report {
    /// JSON lines or a table.
    pub fn new(json: bool) -> Self {
        if !json {
            println!(
                "{:<10} {:<14} {:<26} {:>12} {:<8} {:>25}  beside",
                "suite", "case", "metric", "median", "unit", "spread"
            );
        }
        Self { json }
    }

    /// Prints one.
    pub fn add(&self, measurement: Option<Measurement>) {
        let Some(m) = measurement else { return };
        if self.json {
            println!("{}", serde_json::to_string(&m).expect("numbers and texts are JSON"));
            return;
        }
        let beside: Vec<String> = m.beside.iter().map(|(name, value)| format!("{name} {value:.2}")).collect();
        let spread = format!("{:.2} .. {:.2}", m.spread[0], m.spread[1]);
        let beside = beside.join(", ");
        println!(
            "{:<10} {:<14} {:<26} {:>12.2} {:<8} {spread:>25}  {beside}",
            m.suite, m.case, m.metric, m.value, m.unit
        );
    }

    /// Says what is left out, and why.
    pub fn skip(&self, what: &str) {
        eprintln!("skipped: {what}");
    }
}

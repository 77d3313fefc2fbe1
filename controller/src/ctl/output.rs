//! Prints what a command found: a table for people, JSON or YAML for programs (`-o`).
//!
//! A report is a plain struct that serialises itself and says how it looks as text; this room knows nothing of what is in it.
//! Results go to stdout, progress and failures to stderr, so that `-o json` can be piped.

use std::io::Write as _;

use serde::Serialize;

use super::failure::Failure;

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum Format {
    /// Columns for people.
    #[default]
    Table,
    /// One JSON document (streams: one object a line).
    Json,
    /// One YAML document (streams: one document each).
    Yaml,
}

/// How a report looks as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Text {
    /// Rows under headings.
    Rows {
        /// Headings.
        columns: Vec<&'static str>,
        /// As many cells each as there are headings.
        rows: Vec<Vec<String>>,
        /// What is said when there is no row.
        empty: &'static str,
    },
    /// Name and value, one a line; values may have several lines.
    Fields(Vec<(String, String)>),
    /// As it is.
    Lines(String),
    /// One below the other.
    Parts(Vec<Text>),
}

impl Text {
    /// Name and value pairs.
    pub fn fields<const N: usize>(fields: [(&str, String); N]) -> Text {
        Text::Fields(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    /// The text, each line ended.
    pub fn render(&self) -> String {
        match self {
            Text::Rows { rows, empty, .. } if rows.is_empty() => format!("{empty}\n"),
            Text::Rows { columns, rows, .. } => render_rows(columns, rows),
            Text::Fields(fields) => render_fields(fields),
            Text::Lines(text) if text.is_empty() || text.ends_with('\n') => text.clone(),
            Text::Lines(text) => format!("{text}\n"),
            Text::Parts(parts) => parts.iter().map(Text::render).collect::<Vec<_>>().join("\n"),
        }
    }
}

/// What a command prints.
pub trait Report: Serialize {
    /// How it looks to people.
    fn text(&self) -> Text;
}

/// Prints a report to stdout.
///
/// # Errors
/// Stdout is closed.
pub fn print(format: Format, report: &impl Report) -> Result<(), Failure> {
    let text = match format {
        Format::Table => report.text().render(),
        Format::Json => json(report, Pretty::Yes)?,
        Format::Yaml => yaml(report)?,
    };
    write(&text)
}

/// Prints one report of a stream: JSON on one line, YAML as a document of its own, text without headings.
///
/// # Errors
/// Stdout is closed.
pub fn print_streamed(format: Format, report: &impl Report) -> Result<(), Failure> {
    let text = match format {
        Format::Table => report.text().render(),
        Format::Json => json(report, Pretty::No)?,
        Format::Yaml => format!("---\n{}", yaml(report)?),
    };
    write(&text)
}

#[derive(PartialEq, Eq)]
enum Pretty {
    Yes,
    No,
}

fn json(report: &impl Report, pretty: Pretty) -> Result<String, Failure> {
    let text = if pretty == Pretty::Yes { serde_json::to_string_pretty(report) } else { serde_json::to_string(report) };
    let text = text.map_err(|e| Failure::new(proto::status::Code::Internal, format!("cannot write JSON: {e}")))?;
    Ok(text + "\n")
}

fn yaml(report: &impl Report) -> Result<String, Failure> {
    serde_yaml_ng::to_string(report)
        .map_err(|e| Failure::new(proto::status::Code::Internal, format!("cannot write YAML: {e}")))
}

fn write(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|e| Failure::new(proto::status::Code::Cancelled, format!("cannot write to stdout: {e}")))
}

fn render_rows(columns: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = columns.iter().map(|name| name.chars().count()).collect();
    for row in rows {
        assert_eq!(row.len(), columns.len(), "a row has as many cells as there are columns");
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let headings: Vec<String> = columns.iter().map(|name| name.to_uppercase()).collect();
    let mut text = String::new();
    for row in std::iter::once(&headings).chain(rows) {
        let cells = widths.iter().zip(row).map(|(width, cell)| format!("{:<width$}", printable(cell)));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn render_fields(fields: &[(String, String)]) -> String {
    let width = fields.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in fields {
        let mut lines = value.lines();
        text.push_str(format!("{name:<width$}  {}", printable(lines.next().unwrap_or("-"))).trim_end());
        text.push('\n');
        for line in lines {
            text.push_str(&format!("{:width$}  {}\n", "", printable(line)));
        }
    }
    text
}

/// A cell came from elsewhere: control characters must not reach the terminal.
fn printable(cell: &str) -> String {
    cell.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_control_characters_do_not_pass() {
        let text = Text::Rows {
            columns: vec!["name", "state"],
            rows: vec![vec!["a".into(), "up".into()], vec!["longer".into(), "\x1b[2J".into()]],
            empty: "none",
        };
        assert_eq!(text.render(), "NAME    STATE\na       up\nlonger  \u{fffd}[2J\n");
        assert_eq!(Text::Rows { columns: vec!["name"], rows: vec![], empty: "no hosts" }.render(), "no hosts\n");
    }

    #[test]
    fn fields_with_several_lines_stay_in_their_column() {
        let text = Text::fields([("disks", "one\ntwo".into()), ("host", String::new())]);
        assert_eq!(text.render(), "disks  one\n       two\nhost   -\n");
    }
}

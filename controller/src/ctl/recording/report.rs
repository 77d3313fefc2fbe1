//! How recordings are printed. Fields may be added, never renamed.

use proto::v1;
use serde::Serialize;

use crate::ctl::output::{Report, Text};
use crate::ctl::report::{dash, timestamp};
use crate::ctl::units::{show_bytes, show_ms};
use crate::journal::span::moment;

/// A recording.
#[derive(Debug, Serialize)]
pub struct Recording {
    id: String,
    vm: String,
    vm_id: String,
    started: String,
    /// Empty: it goes on.
    ended: String,
    ended_at: String,
    when_full: &'static str,
    /// What can be visited: from the first checkpoint's instant to the last one known.
    from: String,
    to: String,
    from_instruction: u64,
    to_instruction: u64,
    bytes: u64,
    lag_ms: u64,
    /// At its host: bytes that wait to be brought here.
    waiting_bytes: u64,
    segments: Vec<Segment>,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Segment {
    first_sequence: u64,
    next_sequence: u64,
    /// Empty: a replay cannot begin here.
    checkpoint: String,
    from: String,
    to: String,
    from_unix_ns: u64,
    to_unix_ns: u64,
    from_instruction: u64,
    to_instruction: u64,
    bytes: u64,
    objects: u32,
    semantics: u32,
}

impl From<v1::RecordedSegment> for Segment {
    fn from(segment: v1::RecordedSegment) -> Segment {
        Segment {
            first_sequence: segment.first_sequence,
            next_sequence: segment.next_sequence,
            checkpoint: segment.checkpoint,
            from: moment(segment.start_unix_ns),
            to: moment(segment.end_unix_ns),
            from_unix_ns: segment.start_unix_ns,
            to_unix_ns: segment.end_unix_ns,
            from_instruction: segment.start.unwrap_or_default().retired,
            to_instruction: segment.end.unwrap_or_default().retired,
            bytes: segment.bytes,
            objects: segment.objects,
            semantics: segment.semantics,
        }
    }
}

impl From<v1::RecordingRecord> for Recording {
    fn from(record: v1::RecordingRecord) -> Recording {
        let when_full = if record.full() == v1::JournalFull::End { "end" } else { "wait" };
        let segments: Vec<Segment> = record.segments.into_iter().map(Segment::from).collect();
        let first = segments.iter().find(|segment| !segment.checkpoint.is_empty());
        let last = segments.last().filter(|_| first.is_some());
        Recording {
            from: first.map(|segment| segment.from.clone()).unwrap_or_default(),
            to: last.map(|segment| segment.to.clone()).unwrap_or_default(),
            from_instruction: first.map_or(0, |segment| segment.from_instruction),
            to_instruction: last.map_or(0, |segment| segment.to_instruction),
            bytes: segments.iter().map(|segment| segment.bytes).sum(),
            id: record.id,
            vm: record.vm,
            vm_id: record.vm_id,
            started: timestamp(record.started_unix_ms),
            ended: record.ended,
            ended_at: timestamp(record.ended_unix_ms),
            when_full,
            lag_ms: record.lag_ms,
            waiting_bytes: record.host.map_or(0, |host| host.kept_bytes),
            segments,
            problems: record.problems,
        }
    }
}

impl Recording {
    /// How it stands, in a cell.
    fn state(&self) -> String {
        match self.ended.as_str() {
            "" if self.to.is_empty() => "recording, nothing has come yet".into(),
            "" => format!("recording, {} behind", show_ms(self.lag_ms as f64)),
            why => format!("ended: {why}"),
        }
    }
}

impl Report for Recording {
    fn text(&self) -> Text {
        let span = match self.from.is_empty() {
            true => "nothing yet: no checkpoint belongs to it".into(),
            false => format!("{} to {}", self.from, self.to),
        };
        let mut fields = vec![
            ("recording", self.id.clone()),
            ("vm", self.vm.clone()),
            ("state", self.state()),
            ("can be visited", span),
            ("instructions", format!("{} to {}", self.from_instruction, self.to_instruction)),
            ("stored", format!("{} in {} segments", show_bytes(self.bytes), self.segments.len())),
            ("when full", self.when_full.to_owned()),
        ];
        if !self.problems.is_empty() {
            fields.push(("problems", self.problems.join("\n")));
        }
        Text::Fields(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }
}

/// Recordings, and their segments.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Recordings(pub Vec<Recording>);

impl Report for Recordings {
    fn text(&self) -> Text {
        let row = |recording: &Recording| {
            vec![
                recording.vm.clone(),
                recording.id.clone(),
                dash(&recording.from),
                dash(&recording.to),
                recording.segments.len().to_string(),
                show_bytes(recording.bytes),
                recording.state(),
            ]
        };
        let recordings = Text::Rows {
            columns: vec!["vm", "recording", "from", "to", "segments", "stored", "state"],
            rows: self.0.iter().map(row).collect(),
            empty: "no recordings",
        };
        let [one] = &self.0[..] else { return recordings };
        let row = |segment: &Segment| {
            vec![
                segment.first_sequence.to_string(),
                dash(&segment.checkpoint),
                segment.from.clone(),
                segment.to.clone(),
                format!("{} to {}", segment.from_instruction, segment.to_instruction),
                show_bytes(segment.bytes),
            ]
        };
        let segments = Text::Rows {
            columns: vec!["block", "checkpoint", "from", "to", "instructions", "stored"],
            rows: one.segments.iter().map(row).collect(),
            empty: "nothing of it lies in the bucket",
        };
        let problems = Text::Lines(one.problems.join("\n"));
        let told = (!one.problems.is_empty()).then_some(problems);
        Text::Parts([recordings, segments].into_iter().chain(told).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_shows_its_span_from_the_first_checkpoint_on() {
        let segment = |first: u64, checkpoint: &str| v1::RecordedSegment {
            first_sequence: first,
            checkpoint: checkpoint.into(),
            start: Some(v1::Position { retired: first * 10, skipped_tsc: 0 }),
            end: Some(v1::Position { retired: first * 10 + 40, skipped_tsc: 0 }),
            start_unix_ns: 1_700_000_000_250_000_000 + first * 1_000_000_000,
            end_unix_ns: 1_700_000_004_250_000_000 + first * 1_000_000_000,
            bytes: 2048,
            ..Default::default()
        };
        let record = v1::RecordingRecord {
            id: "ab".repeat(16),
            vm: "vm1".into(),
            segments: vec![segment(0, ""), segment(4, "c1"), segment(8, "")],
            lag_ms: 1500,
            full: v1::JournalFull::End.into(),
            ..Default::default()
        };
        let recording = Recording::from(record);
        let json = serde_json::to_value(&recording).unwrap();
        assert_eq!(json["from"], "2023-11-14T22:13:24.250Z");
        assert_eq!(json["to"], "2023-11-14T22:13:32.250Z");
        assert_eq!((&json["from_instruction"], &json["to_instruction"]), (&40.into(), &120.into()));
        assert_eq!((&json["bytes"], &json["when_full"]), (&6144.into(), &"end".into()));
        assert!(recording.text().render().contains("recording, 1.50 s behind"));
        let text = Recordings(vec![recording]).text().render();
        assert!(text.contains("c1") && text.contains("80 to 120"), "{text}");
        let nothing = Recording::from(v1::RecordingRecord { ended: "no room".into(), ..Default::default() });
        assert!(Recordings(vec![nothing]).text().render().contains("ended: no room"));
    }
}

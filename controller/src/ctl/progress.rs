//! What an operation says while it runs: a bar on a terminal, a line per phase and round elsewhere. All of it on stderr.
//!
//! The numbers come from the source host; this room only shows them.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use proto::v1::transfer_event::Event;
use proto::v1::{RoundReport, TransferProgress};

use super::units::{show_bytes, show_ms};

/// Shows progress.
pub struct Progress {
    what: String,
    bar: Option<ProgressBar>,
    bytes_sent: u64,
}

impl Progress {
    /// For `what`, for example `migrate vm1 to hostB`. A bar if stderr is a terminal.
    pub fn new(what: impl Into<String>) -> Progress {
        let what = what.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            bar.set_style(spinner_style());
            bar.set_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Progress { what, bar, bytes_sent: 0 }
    }

    /// A step of the operation begins.
    pub fn step(&self, step: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(format!("{}: {}", self.what, printable(step))),
            None => eprintln!("{}: {}", self.what, printable(step)),
        }
    }

    /// A line for people.
    pub fn note(&self, note: &str) {
        self.line(&format!("{}: {}", self.what, printable(note)));
    }

    /// News of a transfer.
    pub fn transfer(&mut self, event: &Event) {
        match event {
            Event::Progress(progress) => self.numbers(progress),
            Event::Round(round) => self.line(&format!("{}: {}", self.what, round_line(round))),
            Event::Phase(phase) => {
                self.line(&format!("{}: {} took {}", self.what, printable(&phase.phase), show_ms(phase.ms)));
            }
            Event::HandedOver(handed) => self.line(&format!(
                "{}: both sides agree on all RAM and state; {} sent, guest stopped for {} so far",
                self.what,
                show_bytes(handed.bytes_sent),
                show_ms(handed.stopped_us as f64 / 1000.0)
            )),
            Event::Failed(abort) => self.note(&format!("the transfer failed: {}", abort.reason)),
        }
    }

    /// So many of so many bytes are done.
    pub fn bytes(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_style(bar_style());
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    /// The last word; a bar disappears.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn numbers(&mut self, progress: &TransferProgress) {
        self.bytes_sent = self.bytes_sent.max(progress.bytes_sent);
        if let Some(bar) = &self.bar {
            bar.set_style(bar_style());
            bar.set_length(self.bytes_sent.saturating_add(progress.bytes_remaining));
            bar.set_position(self.bytes_sent);
            bar.set_message(format!("{}: {}", self.what, numbers_line(progress)));
        }
    }

    fn line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }
}

fn spinner_style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}").expect("the template is a constant")
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("[{bar:24}] {binary_bytes}/{binary_total_bytes} {wide_msg}")
        .expect("the template is a constant")
        .progress_chars("=> ")
}

/// Rate, round, dirty rate, time left.
fn numbers_line(progress: &TransferProgress) -> String {
    let left = match seconds_left(progress) {
        Some(seconds) => format!("{} left", show_ms(seconds * 1000.0)),
        None => "the guest dirties faster than this".to_owned(),
    };
    let throttle = match progress.throttle_percent {
        0 => String::new(),
        percent => format!("throttle {percent} %, "),
    };
    format!(
        "{}/s, round {}, dirty {}/s, {throttle}{left}",
        show_bytes(progress.bytes_per_s),
        progress.round,
        show_bytes(progress.dirty_rate)
    )
}

/// Seconds until what remains, and what is dirtied meanwhile, is sent; none if the guest dirties as fast as we send.
fn seconds_left(progress: &TransferProgress) -> Option<f64> {
    let gain = progress.bytes_per_s.checked_sub(progress.dirty_rate).filter(|gain| *gain > 0)?;
    Some(progress.bytes_remaining as f64 / gain as f64)
}

fn round_line(round: &RoundReport) -> String {
    let throttle = match round.throttle_percent {
        0 => String::new(),
        percent => format!(", throttle {percent} %"),
    };
    format!(
        "round {}: {} pages ({} zero), {} in {}, dirty rate {}/s{throttle}",
        round.round,
        round.pages,
        round.zero_pages,
        show_bytes(round.bytes),
        show_ms(round.ms),
        show_bytes(round.dirty_rate)
    )
}

/// Text from elsewhere must not steer the terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_counts_what_the_guest_dirties_meanwhile() {
        let mut progress =
            TransferProgress { bytes_remaining: 300, bytes_per_s: 200, dirty_rate: 50, ..Default::default() };
        assert_eq!(seconds_left(&progress), Some(2.0));
        progress.dirty_rate = 200;
        assert_eq!(seconds_left(&progress), None);
        assert!(numbers_line(&progress).contains("dirties faster") && !numbers_line(&progress).contains("throttle"));
        progress.throttle_percent = 30;
        assert!(numbers_line(&progress).contains("throttle 30 %"));
        let round = RoundReport { throttle_percent: 40, ..Default::default() };
        assert!(
            round_line(&round).contains("throttle 40 %") && !round_line(&RoundReport::default()).contains("throttle")
        );
    }
}

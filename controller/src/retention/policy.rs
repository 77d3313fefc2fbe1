//! What a policy may say: limits, its words for people, and its bytes in a manifest. Pure.

use prost::Message;
use proto::status::Code;
use proto::v1::{CheckpointPolicy, CheckpointsKept, DayWindow};

use super::period::{DAY_MINUTES, Zone};
use crate::failure::Failure;

/// Shortest interval, milliseconds.
pub const EVERY_MS_MIN: u64 = 10_000;
/// Longest interval, milliseconds: a year.
pub const EVERY_MS_MAX: u64 = 366 * 86_400_000;
/// Most that one rule may keep.
pub const KEEP_MAX: u32 = 10_000;
/// Most windows of a day.
pub const WINDOWS_MAX: usize = 16;
/// Longest saved form, bytes.
const BYTES_MAX: usize = 4096;

fn bad(text: impl Into<String>) -> Failure {
    Failure::new(Code::BadInput, text)
}

/// Whether a policy can be carried out as it says.
///
/// # Errors
/// [`Code::BadInput`].
pub fn check(policy: &CheckpointPolicy) -> Result<(), Failure> {
    let CheckpointPolicy { every_ms, jitter_ms, windows, zone, keep, verify_every_ms, drill_every_ms } = policy;
    if !(EVERY_MS_MIN..=EVERY_MS_MAX).contains(every_ms) {
        return Err(bad(format!("an interval of {} cannot be kept", span(*every_ms))).hint(format!(
            "between {} and {}",
            span(EVERY_MS_MIN),
            span(EVERY_MS_MAX)
        )));
    }
    if *jitter_ms > every_ms / 2 {
        return Err(bad(format!("jitter of {} is more than half of the interval", span(*jitter_ms))));
    }
    if windows.len() > WINDOWS_MAX {
        return Err(bad(format!("{} windows; {WINDOWS_MAX} are the most", windows.len())));
    }
    for window in windows {
        if window.from_minute >= DAY_MINUTES || window.to_minute > DAY_MINUTES || window.from_minute == window.to_minute
        {
            return Err(bad(format!("{} is no window of a day", show_window(window))));
        }
    }
    Zone::named(zone).map_err(|unknown| bad(unknown.to_string()))?;
    let keep = keep.unwrap_or_default();
    if [keep.last, keep.hourly, keep.daily, keep.weekly, keep.monthly].into_iter().any(|n| n > KEEP_MAX) {
        return Err(bad(format!("a rule keeps {KEEP_MAX} checkpoints at most")));
    }
    for every in [*verify_every_ms, *drill_every_ms] {
        if every != 0 && !(EVERY_MS_MIN..=EVERY_MS_MAX).contains(&every) {
            let (least, most) = (span(EVERY_MS_MIN), span(EVERY_MS_MAX));
            return Err(bad(format!("a check every {} cannot be kept", span(every)))
                .hint(format!("between {least} and {most}")));
        }
    }
    Ok(())
}

/// Its rules; none: all are kept.
pub fn keep(policy: &CheckpointPolicy) -> CheckpointsKept {
    policy.keep.unwrap_or_default()
}

/// Its time zone. A policy that was checked where the zone was known counts in UTC where it is not.
pub fn zone(policy: &CheckpointPolicy) -> Zone {
    Zone::named(&policy.zone).unwrap_or(Zone::UTC)
}

/// The bytes that a manifest carries; empty if the VM has no policy.
pub fn to_bytes(policy: Option<&CheckpointPolicy>) -> Vec<u8> {
    policy.map(Message::encode_to_vec).unwrap_or_default()
}

/// The policy in a manifest, which may hold anything.
///
/// # Errors
/// [`Code::Corrupt`], and what [`check`] says.
pub fn from_bytes(bytes: &[u8]) -> Result<Option<CheckpointPolicy>, Failure> {
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.len() > BYTES_MAX {
        return Err(Failure::new(Code::Corrupt, format!("a policy of {} bytes", bytes.len())));
    }
    let corrupt = |error: prost::DecodeError| Failure::new(Code::Corrupt, format!("no policy: {error}"));
    let policy = CheckpointPolicy::decode(bytes).map_err(corrupt)?;
    check(&policy)?;
    Ok(Some(policy))
}

/// `every 5m, 22:00-06:00 Europe/Berlin, keep last 12, daily 14, verified every 1d`.
pub fn words(policy: &CheckpointPolicy) -> String {
    let mut text = format!("every {}", span(policy.every_ms));
    if !policy.windows.is_empty() {
        let windows: Vec<String> = policy.windows.iter().map(show_window).collect();
        text += &format!(", {}", windows.join(" "));
    }
    if !policy.zone.is_empty() {
        text += &format!(" {}", policy.zone);
    }
    text += &format!(", {}", keep_words(&keep(policy)));
    for (word, every) in [("verified", policy.verify_every_ms), ("drilled", policy.drill_every_ms)] {
        if every > 0 {
            text += &format!(", {word} every {}", span(every));
        }
    }
    text
}

/// `keep last 12, daily 14`.
pub fn keep_words(keep: &CheckpointsKept) -> String {
    let rules = [
        ("last", keep.last),
        ("hourly", keep.hourly),
        ("daily", keep.daily),
        ("weekly", keep.weekly),
        ("monthly", keep.monthly),
    ];
    let rules: Vec<String> =
        rules.iter().filter(|(_, count)| *count > 0).map(|(word, count)| format!("{word} {count}")).collect();
    if rules.is_empty() { "keep all".into() } else { format!("keep {}", rules.join(", ")) }
}

/// `22:00-06:00`.
pub fn show_window(window: &DayWindow) -> String {
    let clock = |minute: u32| format!("{:02}:{:02}", minute / 60, minute % 60);
    format!("{}-{}", clock(window.from_minute), clock(window.to_minute))
}

/// A window such as `22:00-06:00`.
///
/// # Errors
/// [`Code::BadInput`].
pub fn parse_window(text: &str) -> Result<DayWindow, Failure> {
    let wrong = || bad(format!("{text:?} is no window of a day; write for example 22:00-06:00"));
    let clock = |text: &str| -> Option<u32> {
        let (hour, minute) = text.trim().split_once(':')?;
        let digits = |text: &str| text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
        let (hour, minute): (u32, u32) =
            if digits(hour) && digits(minute) { (hour.parse().ok()?, minute.parse().ok()?) } else { return None };
        let whole = hour * 60 + minute;
        (minute < 60 && whole <= DAY_MINUTES).then_some(whole)
    };
    let (from, to) = text.split_once('-').ok_or_else(wrong)?;
    let (from_minute, to_minute) = (clock(from).ok_or_else(wrong)?, clock(to).ok_or_else(wrong)?);
    if from_minute == to_minute || from_minute == DAY_MINUTES {
        return Err(wrong());
    }
    Ok(DayWindow { from_minute, to_minute })
}

/// A span in its two largest units: `10s`, `5m`, `1h30m`, `2d`.
pub fn span(ms: u64) -> String {
    let units = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
    let mut text = String::new();
    let (mut rest, mut shown) = (ms, 0);
    for (unit, size) in units {
        if rest >= size && shown < 2 {
            text += &format!("{}{unit}", rest / size);
            rest %= size;
            shown += 1;
        } else if shown == 1 {
            break;
        }
    }
    if text.is_empty() { "0s".into() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> CheckpointPolicy {
        CheckpointPolicy {
            every_ms: 300_000,
            jitter_ms: 30_000,
            windows: vec![parse_window("22:00-06:00").unwrap()],
            zone: "Europe/Berlin".into(),
            keep: Some(CheckpointsKept { last: 12, daily: 14, ..CheckpointsKept::default() }),
            ..CheckpointPolicy::default()
        }
    }

    #[test]
    fn a_policy_survives_a_manifest_and_hostile_bytes_do_not() {
        let there = to_bytes(Some(&policy()));
        assert_eq!(from_bytes(&there).unwrap(), Some(policy()));
        assert_eq!(from_bytes(&to_bytes(None)).unwrap(), None);
        assert_eq!(from_bytes(&[0xff; 20]).unwrap_err().code, Code::Corrupt);
        assert_eq!(from_bytes(&vec![0; BYTES_MAX + 1]).unwrap_err().code, Code::Corrupt);
        let short = CheckpointPolicy { every_ms: 1, ..policy() };
        assert_eq!(from_bytes(&to_bytes(Some(&short))).unwrap_err().code, Code::BadInput);
    }

    #[test]
    fn what_cannot_be_carried_out_is_refused() {
        check(&policy()).unwrap();
        type Change = fn(&mut CheckpointPolicy);
        let refused: [(&str, Change); 8] = [
            ("cannot be kept", |p| p.every_ms = 9_999),
            ("cannot be kept", |p| p.every_ms = u64::MAX),
            ("half of the interval", |p| p.jitter_ms = 200_000),
            ("windows", |p| p.windows = vec![DayWindow { from_minute: 1, to_minute: 2 }; 17]),
            ("no window", |p| p.windows[0].from_minute = 1440),
            ("time zone", |p| p.zone = "Nowhere".into()),
            ("at most", |p| p.keep.as_mut().unwrap().hourly = 10_001),
            ("a check every", |p| p.drill_every_ms = 1),
        ];
        for (word, change) in refused {
            let mut policy = policy();
            change(&mut policy);
            let failure = check(&policy).unwrap_err();
            assert!(failure.code == Code::BadInput && failure.message.contains(word), "{word}: {failure}");
        }
    }

    #[test]
    fn words_say_all_of_it() {
        assert_eq!(words(&policy()), "every 5m, 22:00-06:00 Europe/Berlin, keep last 12, daily 14");
        assert_eq!(words(&CheckpointPolicy { every_ms: 5_400_000, ..Default::default() }), "every 1h30m, keep all");
        for (ms, text) in [(0, "0s"), (999, "999ms"), (10_000, "10s"), (90_061_000, "1d1h"), (86_405_000, "1d")] {
            assert_eq!(span(ms), text);
        }
    }

    #[test]
    fn windows_are_read_as_they_are_written() {
        for text in ["22:00-06:00", "00:00-24:00", "05:30-05:31"] {
            assert_eq!(show_window(&parse_window(text).unwrap()), text);
        }
        for text in
            ["", "22-06", "22:00", "22:00-22:00", "25:00-01:00", "1:00-2:00", "24:00-01:00", "10:60-11:00", "é-é"]
        {
            assert!(parse_window(text).is_err(), "{text}");
        }
    }
}

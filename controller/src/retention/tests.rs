//! Laws of retention over arbitrary histories, and tables of what the rules mean.

use proptest::prelude::*;
use proto::v1::{CheckpointPolicy, CheckpointsKept};

use super::period::Zone;
use super::simulate::{TooMany, simulate};
use super::*;

const DAY: u64 = 86_400_000;
const HOUR: u64 = 3_600_000;
/// A Thursday, 2026-01-01T00:00:00Z.
const NEW_YEAR: u64 = 1_767_225_600_000;

fn item(id: usize, unix_ms: u64) -> Item {
    Item { id: id.to_string(), unix_ms, pinned: false, held: false, sound: true }
}

fn kept(items: &[Item], keep: &CheckpointsKept, zone: &Zone) -> Vec<Item> {
    let decisions = plan(items, keep, zone);
    assert_eq!(decisions.len(), items.len());
    let keeps = |(item, decision): (&Item, &Decision)| {
        assert_eq!(item.id, decision.id);
        decision.keep.is_some().then(|| item.clone())
    };
    items.iter().zip(&decisions).filter_map(keeps).collect()
}

fn keeps() -> impl Strategy<Value = CheckpointsKept> {
    (0..6u32, 0..6u32, 0..6u32, 0..4u32, 0..4u32)
        .prop_map(|(last, hourly, daily, weekly, monthly)| CheckpointsKept { last, hourly, daily, weekly, monthly })
        .prop_filter("a rule", |keep| !keeps_all(keep))
}

fn zones() -> impl Strategy<Value = Zone> {
    prop::sample::select(vec!["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"])
        .prop_map(|name| Zone::named(name).unwrap())
}

/// Checkpoints in the order made: minutes apart, with clocks that jump, some pinned, held or damaged.
fn histories() -> impl Strategy<Value = Vec<Item>> {
    let step = (0..20u8, 1..600i64, 0..40u8);
    proptest::collection::vec(step, 0..120).prop_map(|steps| {
        let mut now = NEW_YEAR as i64 + 80 * DAY as i64;
        let made = steps.into_iter().enumerate().map(|(id, (jump, minutes, kind))| {
            now += minutes * 60_000;
            now += match jump {
                0 => DAY as i64,
                1 => -(DAY as i64),
                _ => 0,
            };
            Item { pinned: kind == 0, held: kind == 1, sound: kind != 2, ..item(id, now as u64) }
        });
        made.collect()
    })
}

fn ids(items: &[Item]) -> std::collections::BTreeSet<String> {
    items.iter().map(|item| item.id.clone()).collect()
}

proptest! {
    #[test]
    fn a_second_pruning_removes_nothing(items in histories(), keep in keeps(), zone in zones()) {
        let once = kept(&items, &keep, &zone);
        prop_assert_eq!(kept(&once, &keep, &zone), once);
    }

    #[test]
    fn who_keeps_more_removes_no_more(items in histories(), keep in keeps(), zone in zones(), which in 0..5u8) {
        let mut more = keep;
        *[&mut more.last, &mut more.hourly, &mut more.daily, &mut more.weekly, &mut more.monthly][usize::from(which)] += 1;
        prop_assert!(ids(&kept(&items, &keep, &zone)).is_subset(&ids(&kept(&items, &more, &zone))));
        prop_assert_eq!(kept(&items, &CheckpointsKept::default(), &zone), items);
    }

    #[test]
    fn pruning_often_and_pruning_once_keep_the_same(items in histories(), keep in keeps(), zone in zones(), often in 1..9usize) {
        let mut list: Vec<Item> = Vec::new();
        for (at, item) in items.iter().enumerate() {
            list.push(Item { held: false, ..item.clone() });
            if at % often == 0 {
                list = kept(&list, &keep, &zone);
            }
        }
        let never_held: Vec<Item> = items.iter().map(|item| Item { held: false, ..item.clone() }).collect();
        // What was the newest sound one for a moment and is kept by nothing else goes with the next pruning.
        prop_assert_eq!(kept(&list, &keep, &zone), kept(&never_held, &keep, &zone));
    }

    #[test]
    fn what_must_stay_stays(items in histories(), keep in keeps(), zone in zones()) {
        let left = ids(&kept(&items, &keep, &zone));
        for item in items.iter().filter(|item| item.pinned || item.held || !item.sound) {
            prop_assert!(left.contains(&item.id));
        }
        if let Some(newest) = items.iter().rfind(|item| item.sound) {
            prop_assert!(left.contains(&newest.id));
        }
    }

    #[test]
    fn the_last_n_are_there_whatever_the_clock_does(items in histories(), last in 1..6u32, zone in zones()) {
        let keep = CheckpointsKept { last, ..CheckpointsKept::default() };
        let mut list = Vec::new();
        for item in &items {
            list.push(Item { pinned: false, held: false, sound: true, ..item.clone() });
            list = kept(&list, &keep, &zone);
            let newest = item.id.parse::<usize>().unwrap();
            let expected: Vec<String> =
                (0..newest + 1).rev().take(last as usize).rev().map(|id| id.to_string()).collect();
            prop_assert_eq!(list.iter().map(|item| item.id.clone()).collect::<Vec<_>>(), expected);
        }
    }
}

/// Hourly checkpoints for a week, then the clock jumps and they go on for two days.
fn jumping(by: i64) -> Vec<Item> {
    let (before, after) = (7 * 24, 48);
    (0..before + after)
        .map(|hour| {
            let at = NEW_YEAR as i64 + hour * HOUR as i64 + if hour >= before { by } else { 0 };
            item(hour as usize, at as u64)
        })
        .collect()
}

#[test]
fn a_clock_that_jumps_by_a_day_costs_at_most_a_day() {
    let keep = CheckpointsKept { hourly: 6, daily: 5, ..CheckpointsKept::default() };
    for by in [DAY as i64, -(DAY as i64)] {
        let mut list = Vec::new();
        for (made, item) in jumping(by).into_iter().enumerate() {
            list.push(item);
            list = kept(&list, &keep, &Zone::UTC);
            assert_eq!(list.last().unwrap().id, made.to_string(), "the one just made stays");
            assert!(list.len() >= (made + 1).min(6), "{by} {made}: {}", list.len());
            let days: std::collections::BTreeSet<_> =
                list.iter().map(|item| Zone::UTC.periods(item.unix_ms).day).collect();
            assert!(days.len() >= (made / 24 + 1).min(4), "{by} {made}: {days:?}");
        }
    }
}

#[test]
fn rules_name_the_newest_of_their_periods() {
    // Every six hours for 70 days.
    let items: Vec<Item> = (0..280).map(|at| item(at, NEW_YEAR + at as u64 * 6 * HOUR)).collect();
    let last = items.len() - 1;
    let cases: [(CheckpointsKept, Vec<usize>); 6] = [
        (CheckpointsKept { last: 3, ..Default::default() }, vec![277, 278, 279]),
        (CheckpointsKept { hourly: 2, ..Default::default() }, vec![278, 279]),
        (CheckpointsKept { daily: 3, ..Default::default() }, vec![271, 275, 279]),
        // Day 69 is Wednesday, 11 March 2026; Sundays before it are days 66 and 59.
        (CheckpointsKept { weekly: 3, ..Default::default() }, vec![239, 267, last]),
        // January ends with day 30, February with day 58.
        (CheckpointsKept { monthly: 5, ..Default::default() }, vec![123, 235, last]),
        (CheckpointsKept { last: 1, daily: 2, ..Default::default() }, vec![275, 279]),
    ];
    for (keep, expected) in cases {
        let expected: Vec<String> = expected.iter().map(usize::to_string).collect();
        let found: Vec<String> = kept(&items, &keep, &Zone::UTC).into_iter().map(|item| item.id).collect();
        assert_eq!(found, expected, "{keep:?}");
    }
}

#[test]
fn reasons_are_told() {
    let mut items: Vec<Item> = (0..4).map(|at| item(at, NEW_YEAR + at as u64 * HOUR)).collect();
    items[0].pinned = true;
    items[1].sound = false;
    let keep = CheckpointsKept { last: 1, hourly: 1, ..Default::default() };
    let reasons: Vec<_> = plan(&items, &keep, &Zone::UTC).into_iter().map(|decision| decision.keep).collect();
    use Reason::*;
    let expected = [Some(vec![ByHand]), Some(vec![Damaged]), None, Some(vec![Last, Hourly, Newest])];
    assert_eq!(reasons, expected);
}

#[test]
fn pinned_and_damaged_ones_fill_no_place() {
    let mut items: Vec<Item> = (0..6).map(|at| item(at, NEW_YEAR + at as u64 * HOUR)).collect();
    (items[5].pinned, items[4].sound) = (true, false);
    let keep = CheckpointsKept { last: 2, ..Default::default() };
    let left: Vec<String> = kept(&items, &keep, &Zone::UTC).into_iter().map(|item| item.id).collect();
    assert_eq!(left, ["2", "3", "4", "5"]);
}

#[test]
fn a_simulation_ends_with_what_the_rules_say() {
    let keep = CheckpointsKept { last: 12, daily: 14, monthly: 2, ..Default::default() };
    let policy = CheckpointPolicy { every_ms: 300_000, keep: Some(keep), ..Default::default() };
    let end = simulate(&policy, vec![], NEW_YEAR, 90 * DAY).unwrap();
    let last = end.rows.last().unwrap();
    assert_eq!((last.after_ms, last.made), (90 * DAY, 90 * 288 + 1));
    // The end is midnight of 1 April: the newest of that day and of 31 March, who are also their months', are among the last.
    assert_eq!((last.kept, last.by_rule), (12 + 12, [12, 0, 14, 0, 2]));
    assert_eq!(end.kept.len(), last.kept);
    assert!(end.rows.windows(2).all(|pair| pair[0].after_ms < pair[1].after_ms && pair[0].made <= pair[1].made));
    // Pruned after each one, the same is left.
    let items: Vec<Item> = (0..=90 * 288).map(|at| item(at, NEW_YEAR + at as u64 * 300_000)).collect();
    let whole: Vec<u64> = kept(&items, &keep, &Zone::UTC).into_iter().map(|item| item.unix_ms).collect();
    assert_eq!(end.kept.iter().map(|(at, _)| *at).collect::<Vec<_>>(), whole);
}

#[test]
fn a_simulation_keeps_to_the_windows_and_refuses_what_takes_for_ever() {
    let windows = vec![super::policy::parse_window("22:00-06:00").unwrap()];
    let policy = CheckpointPolicy { every_ms: HOUR, windows, ..Default::default() };
    let end = simulate(&policy, vec![], NEW_YEAR, 10 * DAY).unwrap();
    assert!(end.kept.iter().all(|(at, _)| !(6..22).contains(&(at / HOUR % 24))));
    assert_eq!(end.rows.last().unwrap().made, 81);
    let policy = CheckpointPolicy { every_ms: 10_000, ..Default::default() };
    assert_eq!(simulate(&policy, vec![], NEW_YEAR, 4000 * DAY), Err(TooMany(34_560_000)));
}

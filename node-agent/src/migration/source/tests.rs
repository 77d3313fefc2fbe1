//! The source as a machine: every input at every step, who holds the guest, what is told, and how it ends.
//!
//! No lanes, no clock: inputs and `now` are arguments. That both machines fit together is the simulator's part.

use proto::ids::Digest;
use vmcb_engine::snapshot::machine_digest;

use super::*;

fn digest(ram: u8) -> MachineDigest {
    machine_digest(Digest([ram; 32]), Digest([2; 32]), &[])
}

fn source(checkpoint: bool) -> Source {
    let policy = TransferPolicy { downtime_ms_max: 10, rounds_max: 2, ..Default::default() };
    Source::new(Plan { lanes: 2, policy, checkpoint, freeze: false, mark: 3, wants_leaves: false }, 0)
}

/// Every input of a transfer that ends well, in order.
fn script() -> Vec<Input> {
    let sent = Input::RoundSent(RoundTotals { pages: 512, zero_pages: 0, bytes: 2 << 20, left_out_pages: 0 });
    vec![
        Input::Replied { lane: 1, protocol: 1 },
        Input::Replied { lane: 0, protocol: 1 },
        Input::Epoch(7),
        sent.clone(),
        Input::Acked { round: 1 },
        Input::Left { bytes: 1 << 30, epoch: 8 },
        // The acknowledgement may be noticed first.
        Input::Acked { round: 2 },
        sent.clone(),
        Input::Left { bytes: 4096, epoch: 9 },
        Input::Stopped,
        Input::Captured(vec![]),
        Input::Epoch(10),
        sent,
        Input::Acked { round: 3 },
        Input::Digested(digest(1)),
        Input::Ready(digest(1)),
    ]
}

fn play(checkpoint: bool, inputs: &[Input]) -> (Source, Vec<Effect>) {
    let mut all = Vec::new();
    let mut state = source(checkpoint);
    for (at, input) in (0..).zip(inputs) {
        let step = state.step(input.clone(), at * 1000);
        state = step.state;
        all.extend(step.effects);
    }
    (state, all)
}

fn marks(effects: &[Effect]) -> Vec<(u32, u32, bool)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::SendRound { round, since, last, .. } => Some((*round, *since, *last)),
            _ => None,
        })
        .collect()
}

fn count(effects: &[Effect], wanted: &Effect) -> usize {
    effects.iter().filter(|effect| *effect == wanted).count()
}

#[test]
fn each_round_begins_at_the_epoch_that_the_one_before_closed() {
    let (state, effects) = play(false, &script());
    assert_eq!(marks(&effects), [(1, 3, false), (2, 7, false), (3, 8, true)]);
    assert!(matches!(state, Source::HandedOver(HandedOver { mark: 10, stopped_us: 7000, .. })), "{state:?}");
    assert_eq!((count(&effects, &Effect::Stop), count(&effects, &Effect::Resume)), (1, 0));
}

#[test]
fn a_checkpoints_guest_goes_on_as_soon_as_its_last_pages_are_read() {
    let inputs = script();
    let (_, effects) = play(true, &inputs[..13]);
    assert_eq!(count(&effects, &Effect::Resume), 1);
    let (state, effects) = play(true, &inputs);
    assert_eq!(count(&effects, &Effect::Resume), 1);
    assert!(matches!(state, Source::HandedOver(HandedOver { stopped_us: 4000, .. })), "{state:?}");
}

#[test]
fn a_failure_at_any_step_lets_the_guest_go_exactly_if_it_stands() {
    let failure = || Failure::new(Code::Unreachable, "x");
    for checkpoint in [false, true] {
        for steps in 0..script().len() {
            for bad in [Input::Lost(failure()), Input::Aborted(failure()), Input::Cancel(failure())] {
                let (before, effects) = play(checkpoint, &script()[..steps]);
                let stands = count(&effects, &Effect::Stop) > count(&effects, &Effect::Resume);
                assert_eq!(before.holds_guest(), stands, "after {steps} steps");
                let Step { state, effects } = before.step(bad.clone(), 99);
                assert!(matches!(&state, Source::Failed(failed) if failed.failure == failure()), "{state:?}");
                assert_eq!(count(&effects, &Effect::Resume), usize::from(stands), "after {steps} steps: {bad:?}");
                let tells = !matches!(bad, Input::Aborted(_));
                assert_eq!(count(&effects, &Effect::AbortTarget(failure())), usize::from(tells));
            }
        }
    }
}

#[test]
fn any_input_out_of_order_ends_the_transfer_and_never_panics() {
    for steps in 0..script().len() {
        for (at, input) in script().into_iter().enumerate() {
            let (before, _) = play(false, &script()[..steps]);
            let stands = before.holds_guest();
            let Step { state, effects } = before.step(input.clone(), 99);
            match state {
                Source::Failed(_) => assert_eq!(count(&effects, &Effect::Resume), usize::from(stands)),
                Source::HandedOver(_) => assert_eq!(at, script().len() - 1),
                _ => (),
            }
        }
    }
    let (state, _) = play(false, &[script()[0].clone(), Input::Acked { round: 1 }]);
    assert!(matches!(&state, Source::Failed(f) if f.failure.code == Code::Protocol), "{state:?}");
    let (state, _) = play(false, &[Input::Replied { lane: 0, protocol: 9 }]);
    assert!(matches!(&state, Source::Failed(f) if f.failure.reason.contains("protocol 9")), "{state:?}");
}

#[test]
fn a_target_with_another_digest_is_refused_by_part() {
    let mut inputs = script();
    inputs.pop();
    inputs.push(Input::Ready(digest(4)));
    let (state, effects) = play(false, &inputs);
    assert!(matches!(&state, Source::Failed(f) if f.failure.code == Code::Corrupt && f.failure.reason.contains("RAM")));
    assert_eq!(count(&effects, &Effect::Resume), 1);
}

/// Plays inputs; the last effects and the state after them.
fn at(steps: usize) -> Source {
    play(false, &script()[..steps]).0
}

#[test]
fn a_silent_target_does_not_keep_the_guest_standing_and_a_slow_one_may() {
    // The last pages are under way; the digests are compared; both with the guest stopped.
    for steps in [12, 13, 14, 15] {
        let mut state = at(steps);
        let from = steps as u64 * 1000;
        // Bytes move: it may take its time.
        for second in 1..30 {
            let Step { state: after, effects } =
                state.step(Input::Tick { bytes_sent: second }, from + second * 1_000_000);
            assert!(effects.is_empty() && after.holds_guest(), "after {steps} steps, {second} s");
            state = after;
        }
        let since = from + 29_000_000;
        let Step { state, effects } = state.step(Input::Tick { bytes_sent: 29 }, since + SILENCE_US_MAX - 1);
        assert!(effects.is_empty() && state.holds_guest());
        let Step { state, effects } = state.step(Input::Tick { bytes_sent: 29 }, since + SILENCE_US_MAX);
        assert!(matches!(&state, Source::Failed(f) if f.failure.code == Code::Unreachable), "{state:?}");
        assert!(matches!(&effects[..], [Effect::Resume, Effect::AbortTarget(_)]), "{effects:?}");
    }
}

#[test]
fn after_the_hand_over_no_silence_lets_the_guest_go() {
    let Step { state, effects } = at(script().len()).step(Input::Tick { bytes_sent: 1 }, u64::MAX);
    assert!(matches!(state, Source::HandedOver(_)) && effects.is_empty() && state.holds_guest());
    for steps in 0..12 {
        let before = at(steps);
        let held = before.holds_guest();
        let Step { state, effects } = before.step(Input::Tick { bytes_sent: 1 }, u64::MAX);
        let looks = effects.iter().all(|effect| matches!(effect, Effect::Look { .. }));
        assert!(looks && state.holds_guest() == held && !state.is_over(), "after {steps} steps");
    }
}

/// Rounds that leave most of what they sent, then `more`; the effects.
fn play_slow(more: &[Input]) -> Vec<Effect> {
    let policy = TransferPolicy { rounds_max: 9, throttle_percent_max: 99, ..Default::default() };
    let mut state =
        Source::new(Plan { lanes: 1, policy, checkpoint: false, freeze: false, mark: 0, wants_leaves: false }, 0);
    let sent = Input::RoundSent(RoundTotals { pages: 1 << 18, zero_pages: 0, bytes: 1 << 30, left_out_pages: 0 });
    let slow = |round: u32| {
        let left = Input::Left { bytes: 1 << 30, epoch: round + 2 };
        [sent.clone(), Input::Acked { round }, left]
    };
    let begin = [Input::Replied { lane: 0, protocol: 1 }, Input::Epoch(2)];
    let inputs = begin.into_iter().chain((1..=3).flat_map(slow));
    let mut effects = Vec::new();
    for (at, input) in (1..).zip(inputs.chain(more.iter().cloned())) {
        let step = state.step(input, at * 100_000);
        state = step.state;
        effects.extend(step.effects);
    }
    effects
}

fn throttles(effects: &[Effect]) -> Vec<u32> {
    let percent = |effect: &Effect| if let Effect::Throttle { percent } = effect { Some(*percent) } else { None };
    effects.iter().filter_map(percent).collect()
}

#[test]
fn a_guest_that_is_held_back_runs_free_however_it_ends() {
    let failure = || Failure::new(Code::Unreachable, "x");
    assert_eq!(throttles(&play_slow(&[])), [25, 44]);
    for bad in [Input::Lost(failure()), Input::Aborted(failure()), Input::Cancel(failure()), Input::Stopped] {
        assert_eq!(throttles(&play_slow(&[bad])), [25, 44, 0]);
    }
    let sent = Input::RoundSent(RoundTotals { pages: 1 << 18, zero_pages: 0, bytes: 1 << 30, left_out_pages: 0 });
    let fits = [sent, Input::Acked { round: 4 }, Input::Left { bytes: 4096, epoch: 9 }];
    let effects = play_slow(&fits);
    assert_eq!(throttles(&effects), [25, 44, 0]);
    let stop = effects.iter().position(|effect| *effect == Effect::Stop).unwrap();
    assert_eq!(effects[stop + 1], Effect::Throttle { percent: 0 });
}

/// A source whose second round began at 2 s, after a first one of 1 GiB in a second that left all of it.
fn in_a_second_round() -> Source {
    let policy = TransferPolicy { throttle_percent_max: 99, ..Default::default() };
    let plan = Plan { lanes: 1, policy, checkpoint: false, freeze: false, mark: 0, wants_leaves: false };
    let totals = RoundTotals { pages: 1 << 18, zero_pages: 0, bytes: 1 << 30, left_out_pages: 0 };
    let inputs = [
        (0, Input::Replied { lane: 0, protocol: 1 }),
        (1_000_000, Input::Epoch(2)),
        (2_000_000, Input::RoundSent(totals)),
        (2_000_000, Input::Acked { round: 1 }),
        (2_000_000, Input::Left { bytes: 1 << 30, epoch: 3 }),
    ];
    inputs.into_iter().fold(Source::new(plan, 0), |state, (at, input)| state.step(input, at).state)
}

#[test]
fn a_round_leaves_to_the_next_what_became_dirty_since_it_began_and_the_last_leaves_nothing() {
    let (_, effects) = play(false, &script());
    let until = |effect: &Effect| if let Effect::SendRound { until, .. } = effect { Some(*until) } else { None };
    let until: Vec<_> = effects.iter().filter_map(until).collect();
    assert_eq!(until, [Some(7), Some(8), None]);
}

#[test]
fn a_look_holds_the_guest_back_while_the_round_goes_on() {
    let look = |state: Source, at| {
        let Step { state, effects } = state.step(Input::Tick { bytes_sent: 1 }, at);
        assert_eq!(effects, [Effect::Look { since: 3 }]);
        // One at a time.
        let Step { state, effects } = state.step(Input::Tick { bytes_sent: 1 }, at);
        assert!(effects.is_empty());
        state
    };
    let looked = |state: Source, bytes, at| {
        let Step { state, effects } = state.step(Input::Looked { since: 3, bytes }, at);
        (state, throttles(&effects))
    };
    let Step { state, effects } = in_a_second_round().step(Input::Tick { bytes_sent: 1 }, 2_050_000);
    assert!(effects.is_empty(), "too soon: {effects:?}");
    // 250 MiB in 100 ms: more than twice as fast as the wire. What came of the last round says nothing of this one.
    let state = look(state, 2_100_000);
    let (state, held) = looked(state, 250 << 20, 2_100_000);
    assert_eq!(held, [84]);
    // The first look after that is where the next begins.
    let state = look(state, 2_150_000);
    let (state, held) = looked(state, 500 << 20, 2_150_000);
    assert!(held.is_empty(), "{held:?}");
    let state = look(state, 2_250_000);
    let (state, held) = looked(state, 510 << 20, 2_250_000);
    assert!(held.is_empty(), "{held:?}");
    let Step { state, effects } = state.step(Input::Looked { since: 2, bytes: u64::MAX }, 2_160_000);
    assert!(effects.is_empty() && matches!(state, Source::Precopy(_)));
    let Step { effects, .. } = state.step(Input::Cancel(Failure::new(Code::Cancelled, "x")), 2_170_000);
    assert_eq!(throttles(&effects), [0]);
}

#[test]
fn a_short_round_and_the_last_one_do_not_forget_how_fast_the_guest_dirties() {
    let sent = |bytes| Input::RoundSent(RoundTotals { pages: 1, zero_pages: 0, bytes, left_out_pages: 0 });
    let inputs = [
        (0, Input::Replied { lane: 0, protocol: 1 }),
        (0, Input::Replied { lane: 1, protocol: 1 }),
        (0, Input::Epoch(4)),
        (900_000, sent(1 << 30)),
        (900_000, Input::Acked { round: 1 }),
        // The guest went on while it was measured.
        (1_000_000, Input::Left { bytes: 500_000_000, epoch: 5 }),
        (1_000_500, sent(4096)),
        (1_000_500, Input::Acked { round: 2 }),
        (1_001_000, Input::Left { bytes: 0, epoch: 6 }),
        (1_001_000, Input::Stopped),
        (1_001_000, Input::Captured(vec![])),
        (1_001_000, Input::Epoch(7)),
        (1_001_000, sent(0)),
        (1_001_000, Input::Acked { round: 3 }),
    ];
    let mut state = source(false);
    let mut rates = Vec::new();
    for (at, input) in inputs {
        let step = state.step(input, at);
        state = step.state;
        rates.extend(step.effects.iter().filter_map(|effect| match effect {
            Effect::ReportRound(report) => Some(report.dirty_rate),
            _ => None,
        }));
    }
    assert_eq!(rates, [500_000_000; 3]);
}

#[test]
fn what_has_ended_stays_as_it_is() {
    let failure = Failure::new(Code::Cancelled, "late");
    let (state, _) = play(false, &script());
    let Step { state, effects } = state.step(Input::Cancel(failure), 99);
    assert!(matches!(state, Source::HandedOver(_)) && effects.is_empty());
}

fn frozen_script() -> Vec<Input> {
    vec![
        Input::Replied { lane: 1, protocol: 1 },
        Input::Replied { lane: 0, protocol: 1 },
        Input::Frozen { epoch: 9, sections: vec![], stopped_us: 700 },
        Input::RoundSent(RoundTotals { pages: 512, zero_pages: 0, bytes: 2 << 20, left_out_pages: 0 }),
        Input::Acked { round: 1 },
        Input::Digested(digest(1)),
        Input::Ready(digest(1)),
    ]
}

fn play_frozen(inputs: &[Input]) -> (Source, Vec<Effect>) {
    let plan = Plan {
        lanes: 2,
        policy: TransferPolicy::default(),
        checkpoint: true,
        freeze: true,
        mark: 3,
        wants_leaves: false,
    };
    let (mut state, mut all) = (Source::new(plan, 0), Vec::new());
    for (at, input) in (0..).zip(inputs) {
        let step = state.step(input.clone(), at * 1000);
        state = step.state;
        all.extend(step.effects);
    }
    (state, all)
}

#[test]
fn a_frozen_instant_is_read_in_one_round_and_the_guest_never_stands() {
    let (state, effects) = play_frozen(&frozen_script());
    assert!(matches!(state, Source::HandedOver(HandedOver { mark: 9, stopped_us: 700, guest_stands: false, .. })));
    assert_eq!(count(&effects, &Effect::Freeze { since: 3 }), 1);
    assert_eq!(
        count(&effects, &Effect::SendRound { round: 1, since: 3, until: None, last: true, instant: Some(8) }),
        1
    );
    assert_eq!((count(&effects, &Effect::Stop), count(&effects, &Effect::Resume)), (0, 0));
    // As soon as everything is read, whether it has arrived or not.
    let (_, effects) = play_frozen(&frozen_script()[..4]);
    assert_eq!((count(&effects, &Effect::Thaw), effects.last()), (1, Some(&Effect::Thaw)));
}

#[test]
fn a_frozen_instant_is_thawed_once_however_it_ends() {
    let failure = || Failure::new(Code::Unreachable, "x");
    let script = frozen_script();
    for steps in 2..script.len() {
        let mut ends = vec![Input::Lost(failure()), Input::Aborted(failure()), Input::Cancel(failure())];
        ends.extend(frozen_script());
        for bad in ends.into_iter().filter(|bad| format!("{bad:?}") != format!("{:?}", script[steps])) {
            let (before, mut effects) = play_frozen(&script[..steps]);
            assert!(!before.holds_guest());
            let after = before.step(bad.clone(), 99);
            effects.extend(after.effects);
            let waits = matches!(after.state, Source::Frozen(_));
            assert_eq!(count(&effects, &Effect::Thaw), usize::from(!waits), "after {steps} steps: {bad:?}");
        }
    }
}

#[test]
fn a_target_that_takes_nothing_of_a_frozen_instant_ends_it() {
    let (state, _) = play_frozen(&frozen_script()[..3]);
    let Step { state, effects } = state.step(Input::Tick { bytes_sent: 5 }, 1_000_000);
    assert!(effects.is_empty());
    let Step { state, effects } = state.step(Input::Tick { bytes_sent: 5 }, 1_000_000 + frozen::SILENCE_US_MAX - 1);
    assert!(effects.is_empty());
    let Step { state, effects } = state.step(Input::Tick { bytes_sent: 5 }, 1_000_000 + frozen::SILENCE_US_MAX);
    assert!(matches!(&state, Source::Failed(f) if f.failure.reason.contains("silent for 60 s")), "{state:?}");
    assert!(matches!(&effects[..], [Effect::Thaw, Effect::AbortTarget(_)]), "{effects:?}");
}

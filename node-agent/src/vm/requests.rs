//! Which requests a VM accepts, ignores and refuses: a pure policy without lock, clock or runtime.
//!
//! ```text
//! (none) --create--> STARTING -> RUNNING <-> PAUSED --stop, power-off--> STOPPED     any crash -> CRASHED
//! (none) --prepare--> INCOMING --activate (has its state)--> RUNNING | PAUSED
//! RUNNING | PAUSED --send--> (transferring) --both digests agree--> HANDED_OVER --abandon--> RUNNING | PAUSED
//! anything --discard (same or newer generation)--> (none)
//! ```
//! Generations fence: whoever asks with an older one than this host holds is told so and changes nothing. What was
//! done already is ignored and answered as if done now, so every step of a saga may be repeated.

use proto::status::Code;
use proto::v1::VmState;
use proto::v1::vm_verdict::Verdict;

/// What the policy knows of a VM that this host holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// Its generation; that of the ticket while INCOMING.
    pub generation: u64,
    /// Where it stands.
    pub state: VmState,
    /// Operation that holds it, or made it; empty: none.
    pub operation: String,
    /// A transfer reads or writes its state right now.
    pub transferring: bool,
    /// INCOMING: all of its state has been applied.
    pub loaded: bool,
}

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    /// Build and boot.
    Create,
    /// Stop between two instructions.
    Pause,
    /// Go on.
    Resume,
    /// End the runner, keep the directory.
    Stop,
    /// Remove everything.
    Discard,
    /// Make room for a VM that arrives.
    Prepare,
    /// Run what has arrived.
    Activate,
    /// Send it away, or to the bucket.
    Send,
    /// End the operation as if it had not been.
    Abandon,
}

/// A request as the policy sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ask {
    /// What.
    pub verb: Verb,
    /// Of which generation.
    pub generation: u64,
    /// For which operation.
    pub operation: String,
}

/// The policy's word.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Do it.
    Accept,
    /// Discard what is held, then do it.
    Replace,
    /// It is so already: answer as if it were done now.
    Ignore,
    /// Do nothing and say why.
    Refuse(Code, String),
}

fn refuse(code: Code, text: impl Into<String>) -> Answer {
    Answer::Refuse(code, text.into())
}

/// Decides one request. `seen` is the newest generation that this host ever owned of the VM, also if it is gone.
pub fn admit(seen: u64, held: Option<&Held>, ask: &Ask) -> Answer {
    match (held, ask.verb) {
        (None, Verb::Create | Verb::Prepare) if ask.generation <= seen => refuse(
            Code::Denied,
            format!("generation {} is not newer than {seen}, which this host has owned", ask.generation),
        ),
        (None, Verb::Create | Verb::Prepare) => Answer::Accept,
        (None, Verb::Discard | Verb::Abandon) => Answer::Ignore,
        (None, _) => refuse(Code::NotFound, "this host has no such VM"),
        (Some(held), Verb::Create) => create(held, ask),
        (Some(held), Verb::Prepare) => prepare(held, ask),
        (Some(held), Verb::Activate) => activate(held, ask),
        (Some(held), Verb::Discard) if ask.generation < held.generation => Answer::Ignore,
        (Some(_), Verb::Discard) => Answer::Accept,
        (Some(held), Verb::Abandon) => abandon(held, ask),
        (Some(held), Verb::Pause | Verb::Resume | Verb::Stop | Verb::Send) => operate(held, ask),
    }
}

fn create(held: &Held, ask: &Ask) -> Answer {
    if ask.generation == held.generation && ask.operation == held.operation && held.state != VmState::Incoming {
        return Answer::Ignore;
    }
    if ask.generation <= held.generation {
        return fenced(held, ask);
    }
    refuse(Code::Conflict, format!("this host already has it, {} at generation {}", words(held), held.generation))
}

fn prepare(held: &Held, ask: &Ask) -> Answer {
    match held.state {
        VmState::Incoming if ask.generation == held.generation && ask.operation == held.operation => Answer::Ignore,
        // Were the older operation committed, a newer one would bring a newer generation.
        VmState::Incoming if ask.generation == held.generation && ask.operation != held.operation => Answer::Replace,
        _ if ask.generation <= held.generation => fenced(held, ask),
        _ => {
            refuse(Code::Conflict, format!("this host still has generation {} of it, {}", held.generation, words(held)))
        }
    }
}

fn activate(held: &Held, ask: &Ask) -> Answer {
    if ask.generation != held.generation {
        return fenced(held, ask);
    }
    match held.state {
        VmState::Running | VmState::Paused | VmState::Stopped | VmState::Crashed => Answer::Ignore,
        VmState::Incoming if held.operation != ask.operation => {
            refuse(Code::Denied, format!("it was prepared for operation {}", held.operation))
        }
        VmState::Incoming if held.loaded && !held.transferring => Answer::Accept,
        VmState::Incoming => refuse(Code::Conflict, "its state has not arrived whole"),
        VmState::Starting | VmState::HandedOver | VmState::Unspecified => {
            refuse(Code::Conflict, format!("it is {}", words(held)))
        }
    }
}

fn abandon(held: &Held, ask: &Ask) -> Answer {
    let concerned = held.operation == ask.operation
        && (held.transferring || matches!(held.state, VmState::Incoming | VmState::HandedOver));
    if concerned { Answer::Accept } else { Answer::Ignore }
}

fn operate(held: &Held, ask: &Ask) -> Answer {
    if ask.generation != held.generation {
        return fenced(held, ask);
    }
    match (held.state, ask.verb) {
        (VmState::Stopped, Verb::Stop) => Answer::Ignore,
        (VmState::Crashed, Verb::Stop) => Answer::Accept,
        (VmState::Running | VmState::Paused, _) if held.transferring => {
            refuse(Code::Conflict, format!("operation {} holds it", held.operation))
        }
        (VmState::Running, Verb::Resume) => Answer::Ignore,
        (VmState::Running | VmState::Paused, _) => Answer::Accept,
        _ => refuse(Code::Conflict, format!("it is {}", words(held))),
    }
}

fn fenced(held: &Held, ask: &Ask) -> Answer {
    let which = if ask.generation < held.generation { "older than" } else { "not" };
    refuse(Code::Denied, format!("generation {} is {which} {}, which this host holds", ask.generation, held.generation))
}

fn words(held: &Held) -> &'static str {
    if held.transferring { "being transferred" } else { state_words(held.state) }
}

/// A state, for people.
pub fn state_words(state: VmState) -> &'static str {
    match state {
        VmState::Unspecified => "unknown",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Incoming => "incoming",
        VmState::Stopped => "stopped",
        VmState::Crashed => "crashed",
        VmState::HandedOver => "handed over",
    }
}

/// The ledger's word on a VM, with what this host had said of it in the heartbeat that it answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Word {
    /// The word.
    pub verdict: Verdict,
    /// Generation that the word names.
    pub generation: u64,
    /// Generation that the heartbeat reported.
    pub reported_generation: u64,
    /// State that the heartbeat reported.
    pub reported_state: VmState,
    /// Operation that the heartbeat reported.
    pub reported_operation: String,
}

/// What follows from the ledger's word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Consequence {
    /// Nothing changes.
    Nothing,
    /// The lease is renewed.
    Renew,
    /// The hand-over was undone: the lease is renewed and the guest goes on.
    Resume,
    /// Pause at once and discard.
    Discard,
}

/// Judges a verdict. One that answers an older report than what is held now changes nothing: the next heartbeat will.
pub fn judge(held: &Held, word: &Word) -> Consequence {
    if word.reported_generation != held.generation {
        return Consequence::Nothing;
    }
    match word.verdict {
        Verdict::Hold if word.generation != held.generation => Consequence::Nothing,
        Verdict::Hold => match held.state {
            VmState::Starting | VmState::Running | VmState::Paused => Consequence::Renew,
            // The ledger knew of this very hand-over when it said so, and no transfer is under way here.
            VmState::HandedOver
                if word.reported_state == VmState::HandedOver
                    && word.reported_operation == held.operation
                    && !held.transferring =>
            {
                Consequence::Resume
            }
            _ => Consequence::Nothing,
        },
        Verdict::Discard if word.reported_state == held.state || held.state != VmState::Incoming => {
            Consequence::Discard
        }
        Verdict::Discard | Verdict::Wait | Verdict::Unspecified => Consequence::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STATES: [VmState; 7] = [
        VmState::Starting,
        VmState::Running,
        VmState::Paused,
        VmState::Incoming,
        VmState::Stopped,
        VmState::Crashed,
        VmState::HandedOver,
    ];
    const VERBS: [Verb; 9] = [
        Verb::Create,
        Verb::Pause,
        Verb::Resume,
        Verb::Stop,
        Verb::Discard,
        Verb::Prepare,
        Verb::Activate,
        Verb::Send,
        Verb::Abandon,
    ];

    fn held() -> impl Strategy<Value = Held> {
        (1..5u64, prop::sample::select(&STATES[..]), "[ab]", any::<bool>(), any::<bool>()).prop_map(
            |(generation, state, operation, transferring, loaded)| Held {
                generation,
                state,
                operation,
                transferring,
                loaded,
            },
        )
    }

    fn ask() -> impl Strategy<Value = Ask> {
        (prop::sample::select(&VERBS[..]), 0..6u64, "[ab]").prop_map(|(verb, generation, operation)| Ask {
            verb,
            generation,
            operation,
        })
    }

    proptest! {
        #[test]
        fn an_older_generation_never_changes_anything(held in held(), ask in ask()) {
            let answer = admit(held.generation, Some(&held), &ask);
            if ask.generation < held.generation && ask.verb != Verb::Abandon {
                prop_assert!(!matches!(answer, Answer::Accept | Answer::Replace), "{answer:?}");
            }
        }

        #[test]
        fn nothing_that_was_owned_comes_back(seen in 0..6u64, ask in ask()) {
            let answer = admit(seen, None, &ask);
            if answer == Answer::Accept {
                prop_assert!(ask.generation > seen);
            }
        }

        #[test]
        fn only_activate_runs_what_is_incoming(held in held(), ask in ask()) {
            let held = Held { state: VmState::Incoming, ..held };
            if admit(0, Some(&held), &ask) != Answer::Accept {
                return Ok(());
            }
            prop_assert!(matches!(ask.verb, Verb::Activate | Verb::Discard | Verb::Abandon), "{ask:?}");
            if ask.verb == Verb::Activate {
                prop_assert!(held.loaded && ask.generation == held.generation && ask.operation == held.operation);
            }
        }

        #[test]
        fn only_abandon_and_discard_end_a_hand_over(held in held(), ask in ask()) {
            let held = Held { state: VmState::HandedOver, ..held };
            let accepted = admit(0, Some(&held), &ask) == Answer::Accept;
            prop_assert!(!accepted || matches!(ask.verb, Verb::Discard | Verb::Abandon), "{ask:?}");
        }

        #[test]
        fn a_transfer_is_disturbed_by_its_own_operation_or_a_discard_alone(held in held(), ask in ask()) {
            let held = Held { transferring: true, ..held };
            if admit(0, Some(&held), &ask) != Answer::Accept {
                return Ok(());
            }
            let crashed = held.state == VmState::Crashed && ask.verb == Verb::Stop;
            prop_assert!(
                crashed || ask.verb == Verb::Discard || (ask.verb == Verb::Abandon && ask.operation == held.operation),
                "{ask:?}"
            );
        }

        #[test]
        fn a_stale_verdict_changes_nothing(
            held in held(), reported in 0..6u64, word in 0..6u64, reported_operation in "[ab]"
        ) {
            for verdict in [Verdict::Hold, Verdict::Wait, Verdict::Discard] {
                for reported_state in STATES {
                    let word = Word {
                        verdict,
                        generation: word,
                        reported_generation: reported,
                        reported_state,
                        reported_operation: reported_operation.clone(),
                    };
                    let consequence = judge(&held, &word);
                    if reported != held.generation || verdict == Verdict::Wait {
                        prop_assert_eq!(consequence, Consequence::Nothing);
                    }
                    if consequence == Consequence::Resume {
                        prop_assert!(held.state == VmState::HandedOver && reported_state == VmState::HandedOver);
                        prop_assert_eq!(word.generation, held.generation);
                        prop_assert_eq!(&word.reported_operation, &held.operation);
                    }
                }
            }
        }
    }

    #[test]
    fn every_step_of_a_saga_may_be_repeated() {
        let held = |state, loaded| Held { generation: 2, state, operation: "op".into(), transferring: false, loaded };
        let ask = |verb, generation| Ask { verb, generation, operation: "op".into() };
        let incoming = held(VmState::Incoming, true);
        assert_eq!(admit(0, Some(&incoming), &ask(Verb::Prepare, 2)), Answer::Ignore);
        assert_eq!(admit(0, Some(&incoming), &ask(Verb::Activate, 2)), Answer::Accept);
        let running = held(VmState::Running, true);
        assert_eq!(admit(2, Some(&running), &ask(Verb::Activate, 2)), Answer::Ignore);
        assert_eq!(admit(2, Some(&running), &ask(Verb::Create, 2)), Answer::Ignore);
        assert_eq!(admit(2, Some(&running), &ask(Verb::Discard, 1)), Answer::Ignore);
        assert_eq!(admit(2, None, &ask(Verb::Discard, 2)), Answer::Ignore);
        assert_eq!(admit(2, None, &ask(Verb::Abandon, 0)), Answer::Ignore);
    }
}

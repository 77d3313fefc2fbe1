//! The target of a transfer, as a pure machine: inputs and `now` in, effects out. Diagram in [`super`].
//!
//! It judges whether a message may come now and on this lane, counts frames, and compares digests; landing pages and
//! applying sections are effects or have been done by the time it is told. Everything from a lane is hostile until it has
//! passed here. A stranger's hello is refused without disturbing the transfer; once a lane is accepted, anything out of
//! order on it ends the transfer with words that say what.
//!
//! It never starts the guest: `Ready` is the last thing it can say, and only the controller goes on from there.

use bytes::Bytes;
use proto::ids::Digest;
use proto::status::Code;
use proto::v1::{Hello, MachineDigest, Position, RoundEnd, Section, StateEnd, Ticket};
use vmcb_engine::snapshot::{first_difference, machine_digest, state_digest};

use super::{Failure, PROTOCOL, differing_parts};

/// Most lanes that a source may open.
pub const LANES_MAX: u32 = 16;
/// Most sections, and bytes of sections, that a target holds before it applies them.
const SECTIONS_MAX: usize = 1024;
const SECTION_BYTES_MAX: usize = 64 << 20;
/// Longest recording that is gone through before a guest runs. Checkpoints that are further apart need more.
const JOURNAL_BYTES_MAX: usize = 256 << 20;

/// What happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// Someone opens a lane.
    Hello(Hello),
    /// A frame of pages has arrived and is about to be landed.
    Pages {
        /// On this lane.
        lane: u32,
    },
    /// A lane's part of a round has ended; all its pages are landed.
    RoundEnd {
        /// Which lane.
        lane: u32,
        /// What it says.
        end: RoundEnd,
    },
    /// A section.
    Section {
        /// Which lane.
        lane: u32,
        /// The section.
        section: Section,
    },
    /// A block of a recording.
    Journal {
        /// Which lane.
        lane: u32,
        /// The frame.
        frame: Bytes,
    },
    /// The sections are complete.
    StateEnd {
        /// Which lane.
        lane: u32,
        /// What it says.
        end: StateEnd,
    },
    /// A message that only a target sends, or that cannot be read.
    Bad(Failure),
    /// Answer to [`Effect::Apply`]: the sections captured again, and the roots of what was landed.
    Applied {
        /// Captured after they were applied.
        sections: Vec<Section>,
        /// Root of RAM.
        ram: Digest,
        /// Roots of the local disks.
        disks: Vec<Digest>,
    },
    /// `Abort` from the source.
    Aborted(Failure),
    /// A page cannot be written, a section cannot be applied.
    Broken(Failure),
    /// A lane has ended.
    LaneEnded {
        /// Which lane.
        lane: u32,
        /// How, for people.
        reason: String,
    },
    /// The controller wants no more of it.
    Abandon {
        /// Why.
        reason: String,
    },
}

/// A recording that is gone through before the guest runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Replay {
    /// Frames of kind Journal, in order.
    pub blocks: Vec<Bytes>,
    /// Where it ends.
    pub until: Position,
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Answer this lane's hello.
    Accept {
        /// Which lane.
        lane: u32,
        /// The version we speak.
        protocol: u32,
    },
    /// Refuse the lane that has just said hello; the others are not concerned.
    Refuse(Failure),
    /// `RoundAck` on lane 0.
    Ack {
        /// Which round.
        round: u32,
    },
    /// It is time to bring the page digests up to date.
    Settle,
    /// Apply the sections, capture them again, and take the roots of all pages.
    Apply {
        /// The sections.
        sections: Vec<Section>,
        /// Hash all pages again from memory instead of trusting what was noted when they landed.
        verify_full: bool,
        /// Pages of RAM follow while the guest runs: their root is believed to be this one. A target that was not prepared
        /// for that must refuse it.
        ram: Option<Digest>,
        /// Then go through these blocks of a recording, to that position.
        replay: Option<Replay>,
    },
    /// `Ready` on lane 0.
    SayReady(MachineDigest),
    /// `Abort` on every lane.
    AbortSource(Failure),
}

/// The machine.
#[derive(Debug)]
pub enum Target {
    /// Nobody has presented the ticket.
    Waiting(Waiting),
    /// Lanes are open, pages come.
    Receiving(Receiving),
    /// All pages are there, sections come.
    Sections(Sections),
    /// Sections are being applied.
    Applying(Applying),
    /// Everything is applied and both digests agree.
    Ready(Ready),
    /// Over.
    Failed(Failed),
}

/// A state and what is to be done.
#[derive(Debug)]
pub struct Step {
    /// The state after the step.
    pub state: Target,
    /// Effects in order.
    pub effects: Vec<Effect>,
}

/// State [`Target::Waiting`].
#[derive(Debug)]
pub struct Waiting {
    ticket: Ticket,
    expires_us: u64,
}

/// State [`Target::Receiving`].
#[derive(Debug)]
pub struct Receiving {
    ticket: Ticket,
    lanes: Vec<Lane>,
    round: u32,
}

#[derive(Debug, Clone, Default)]
struct Lane {
    open: bool,
    frames: u64,
    ended: Option<RoundEnd>,
}

/// State [`Target::Sections`].
#[derive(Debug)]
pub struct Sections {
    sections: Vec<Section>,
    bytes: usize,
    blocks: Vec<Bytes>,
    block_bytes: usize,
}

/// State [`Target::Applying`].
#[derive(Debug)]
pub struct Applying {
    sections: Vec<Section>,
    digest: MachineDigest,
}

/// State [`Target::Ready`].
#[derive(Debug)]
pub struct Ready {
    /// The digest of both sides.
    pub digest: MachineDigest,
}

/// State [`Target::Failed`].
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub failure: Failure,
}

impl Target {
    /// Waits for the holder of the ticket, until it expires.
    pub fn new(ticket: Ticket, now_us: u64) -> Self {
        let expires_us = now_us.saturating_add(ticket.expires_in_ms.saturating_mul(1000));
        Self::Waiting(Waiting { ticket, expires_us })
    }

    /// Takes one input in.
    pub fn step(self, input: Input, now_us: u64) -> Step {
        match (self, input) {
            (state, Input::Hello(hello)) => state.hello(&hello, now_us),
            (state @ Self::Failed(_), _) => Step { state, effects: vec![] },
            (Self::Ready(_), Input::Abandon { reason }) => fail(Failure::new(Code::Cancelled, reason)),
            // It has all it needs. From here on it must not fail by itself: the controller may have committed.
            (
                state @ Self::Ready(_),
                Input::Pages { .. }
                | Input::RoundEnd { .. }
                | Input::Section { .. }
                | Input::Journal { .. }
                | Input::StateEnd { .. }
                | Input::Bad(_)
                | Input::Applied { .. }
                | Input::Aborted(_)
                | Input::Broken(_)
                | Input::LaneEnded { .. },
            ) => Step { state, effects: vec![] },
            (_, Input::Abandon { reason }) => fail(Failure::new(Code::Cancelled, reason)),
            (_, Input::Aborted(failure)) => Step { state: Self::Failed(Failed { failure }), effects: vec![] },
            (_, Input::Broken(failure) | Input::Bad(failure)) => fail(failure),
            (_, Input::LaneEnded { lane, reason }) => {
                fail(Failure::new(Code::Unreachable, format_args!("lane {lane} has ended: {reason}")))
            }
            (Self::Receiving(state), Input::Pages { lane }) => state.pages(lane),
            (Self::Receiving(state), Input::RoundEnd { lane, end }) => state.round_end(lane, end),
            (Self::Sections(state), Input::Section { lane: 0, section }) => state.section(section),
            (Self::Sections(state), Input::Journal { lane: 0, frame }) => state.journal(frame),
            (Self::Sections(state), Input::StateEnd { lane: 0, end }) => state.state_end(end),
            (Self::Applying(state), Input::Applied { sections, ram, disks }) => state.applied(&sections, ram, &disks),
            (
                state,
                input @ (Input::Pages { .. }
                | Input::RoundEnd { .. }
                | Input::Section { .. }
                | Input::Journal { .. }
                | Input::StateEnd { .. }
                | Input::Applied { .. }),
            ) => state.misplaced(&input),
        }
    }

    /// Its name, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Waiting(_) => "waiting for the first lane",
            Self::Receiving(_) => "receiving pages",
            Self::Sections(_) => "receiving sections",
            Self::Applying(_) => "applying sections",
            Self::Ready(_) => "ready",
            Self::Failed(_) => "over",
        }
    }

    fn misplaced(self, input: &Input) -> Step {
        let (name, lane) = match input {
            Input::Pages { lane } => ("Pages", lane),
            Input::RoundEnd { lane, .. } => ("RoundEnd", lane),
            Input::Section { lane, .. } => ("Section", lane),
            Input::Journal { lane, .. } => ("Journal", lane),
            Input::StateEnd { lane, .. } => ("StateEnd", lane),
            Input::Hello(_)
            | Input::Bad(_)
            | Input::Applied { .. }
            | Input::Aborted(_)
            | Input::Broken(_)
            | Input::LaneEnded { .. }
            | Input::Abandon { .. } => {
                return fail(Failure::new(
                    Code::Internal,
                    format_args!("an answer nobody waits for while {}", self.name()),
                ));
            }
        };
        fail(protocol(format_args!("{name} on lane {lane} while {}", self.name())))
    }

    fn hello(self, hello: &Hello, now_us: u64) -> Step {
        match self {
            Self::Waiting(state) => state.hello(hello, now_us),
            Self::Receiving(state) => state.hello(hello),
            state @ (Self::Sections(_) | Self::Applying(_) | Self::Ready(_) | Self::Failed(_)) => {
                let failure = denied(format_args!("the ticket has been used; this VM is {}", state.name()));
                Step { state, effects: vec![Effect::Refuse(failure)] }
            }
        }
    }
}

fn fail(failure: Failure) -> Step {
    let effects = vec![Effect::AbortSource(failure.clone())];
    Step { state: Target::Failed(Failed { failure }), effects }
}

fn protocol(words: impl std::fmt::Display) -> Failure {
    Failure::new(Code::Protocol, words)
}

fn denied(words: impl std::fmt::Display) -> Failure {
    Failure::new(Code::Denied, words)
}

/// Checks what every hello must have; returns the version to speak.
fn check_hello(hello: &Hello, ticket: &Ticket) -> Result<u32, Failure> {
    // Comparing hashes takes the same time wherever the secrets differ.
    let same_secret = blake3::hash(&hello.secret) == blake3::hash(&ticket.secret);
    if hello.operation != ticket.operation || !same_secret || ticket.secret.is_empty() {
        return Err(denied("wrong ticket"));
    }
    let newest = hello.protocol_max.min(*PROTOCOL.end());
    if newest < hello.protocol_min.max(*PROTOCOL.start()) {
        let (min, max) = (hello.protocol_min, hello.protocol_max);
        return Err(protocol(format_args!(
            "the source speaks lane protocols {min} to {max}, this host speaks {PROTOCOL:?}"
        )));
    }
    if hello.lanes == 0 || hello.lanes > LANES_MAX || hello.lane >= hello.lanes {
        return Err(protocol(format_args!("lane {} of {}; at most {LANES_MAX} are served", hello.lane, hello.lanes)));
    }
    if !hello.base.is_empty() {
        return Err(protocol("a host has no checkpoint to build on"));
    }
    Ok(newest)
}

impl Waiting {
    fn hello(self, hello: &Hello, now_us: u64) -> Step {
        let checked = match check_hello(hello, &self.ticket) {
            Ok(_) if now_us >= self.expires_us => Err(denied("the ticket has expired")),
            other => other,
        };
        match checked {
            Err(failure) => Step { state: Target::Waiting(self), effects: vec![Effect::Refuse(failure)] },
            Ok(_) => {
                let lanes = vec![Lane::default(); hello.lanes as usize];
                Receiving { ticket: self.ticket, lanes, round: 1 }.hello(hello)
            }
        }
    }
}

impl Receiving {
    fn hello(mut self, hello: &Hello) -> Step {
        let checked = check_hello(hello, &self.ticket).and_then(|protocol| {
            if hello.lanes as usize != self.lanes.len() {
                Err(denied(format_args!("the ticket is in use with {} lanes, not {}", self.lanes.len(), hello.lanes)))
            } else if std::mem::replace(&mut self.lanes[hello.lane as usize].open, true) {
                Err(denied(format_args!("the ticket is in use: lane {} is open", hello.lane)))
            } else {
                Ok(protocol)
            }
        });
        let effect = match checked {
            Ok(protocol) => Effect::Accept { lane: hello.lane, protocol },
            Err(failure) => Effect::Refuse(failure),
        };
        Step { state: Target::Receiving(self), effects: vec![effect] }
    }

    /// The lane's bookkeeping, if it may send now.
    fn sending(&mut self, number: u32) -> Result<&mut Lane, Failure> {
        if let Some(closed) = self.lanes.iter().position(|lane| !lane.open) {
            return Err(protocol(format_args!("lane {number} sends before lane {closed} is open")));
        }
        let round = self.round;
        match self.lanes.get_mut(number as usize) {
            Some(Lane { ended: Some(_), .. }) => {
                Err(protocol(format_args!("lane {number} sends after its RoundEnd of round {round}")))
            }
            Some(lane) => Ok(lane),
            None => Err(protocol(format_args!("there is no lane {number}"))),
        }
    }

    fn pages(mut self, number: u32) -> Step {
        match self.sending(number) {
            Ok(lane) => {
                lane.frames += 1;
                Step { state: Target::Receiving(self), effects: vec![] }
            }
            Err(failure) => fail(failure),
        }
    }

    fn round_end(mut self, number: u32, end: RoundEnd) -> Step {
        let round = self.round;
        let lane = match self.sending(number) {
            Ok(lane) => lane,
            Err(failure) => return fail(failure),
        };
        if end.round != round {
            return fail(protocol(format_args!("lane {number} ends round {}, this is round {round}", end.round)));
        }
        if end.frames != lane.frames {
            let words =
                format_args!("lane {number} sent {} frames in round {round}, {} arrived", end.frames, lane.frames);
            return fail(protocol(words));
        }
        lane.ended = Some(end);
        let ends: Option<Vec<bool>> = self.lanes.iter().map(|lane| lane.ended.as_ref().map(|end| end.last)).collect();
        match ends.as_deref() {
            None => Step { state: Target::Receiving(self), effects: vec![] },
            Some([last, others @ ..]) if others.iter().all(|other| other == last) => self.next_round(*last),
            Some(_) => fail(protocol(format_args!("lanes disagree whether round {round} is the last"))),
        }
    }

    fn next_round(mut self, last: bool) -> Step {
        // While the guest runs at the source there is time for it at once; when it stands the source has other things to do meanwhile.
        let effects = match last {
            false => vec![Effect::Settle, Effect::Ack { round: self.round }],
            true => vec![Effect::Ack { round: self.round }, Effect::Settle],
        };
        if last {
            let state =
                Target::Sections(Sections { sections: Vec::new(), bytes: 0, blocks: Vec::new(), block_bytes: 0 });
            return Step { state, effects };
        }
        let Some(round) = self.round.checked_add(1) else {
            return fail(protocol("too many rounds"));
        };
        self.round = round;
        self.lanes.iter_mut().for_each(|lane| *lane = Lane { open: true, ..Lane::default() });
        Step { state: Target::Receiving(self), effects }
    }
}

impl Sections {
    fn section(mut self, section: Section) -> Step {
        self.bytes = self.bytes.saturating_add(section.body.len()).saturating_add(section.name.len());
        if self.sections.len() >= SECTIONS_MAX || self.bytes > SECTION_BYTES_MAX {
            return fail(protocol("too many sections"));
        }
        if self.sections.iter().any(|other| other.name == section.name) {
            return fail(protocol(format_args!("section {:?} comes twice", section.name)));
        }
        self.sections.push(section);
        Step { state: Target::Sections(self), effects: vec![] }
    }

    fn journal(mut self, frame: Bytes) -> Step {
        self.block_bytes = self.block_bytes.saturating_add(frame.len());
        if self.block_bytes > JOURNAL_BYTES_MAX {
            let text = "more than 256 MiB of a recording lie between the checkpoint and that instant";
            return fail(Failure::new(Code::Exhausted, text));
        }
        self.blocks.push(frame);
        Step { state: Target::Sections(self), effects: vec![] }
    }

    fn state_end(self, end: StateEnd) -> Step {
        let Self { sections, blocks, .. } = self;
        let replay = match end.replay_until {
            Some(until) => Some(Replay { blocks, until }),
            None if blocks.is_empty() => None,
            None => return fail(protocol("blocks of a recording, and no word on how far to go")),
        };
        if replay.is_some() && end.ram_follows {
            return fail(protocol("a recording cannot be gone through while pages of RAM are missing"));
        }
        if end.sections as usize != sections.len() {
            let words = format_args!("{} sections were sent, {} arrived", end.sections, sections.len());
            return fail(protocol(words));
        }
        let Some(digest) = end.digest else {
            return fail(protocol("StateEnd without a digest"));
        };
        if state_digest(&sections).0.as_slice() != digest.state {
            return fail(Failure::new(Code::Corrupt, "the sections do not have the digest that the source says"));
        }
        let ram = match end.ram_follows.then(|| Digest::from_slice(&digest.ram)) {
            Some(None) => return fail(protocol("StateEnd without a digest of RAM")),
            Some(stated) => stated,
            None => None,
        };
        let effects = vec![Effect::Apply { sections: sections.clone(), verify_full: end.verify_full, ram, replay }];
        Step { state: Target::Applying(Applying { sections, digest }), effects }
    }
}

impl Applying {
    fn applied(self, captured: &[Section], ram: Digest, disks: &[Digest]) -> Step {
        let digest = machine_digest(ram, state_digest(captured), disks);
        let parts = differing_parts(&self.digest, &digest);
        if parts.is_empty() {
            let effects = vec![Effect::SayReady(digest.clone())];
            return Step { state: Target::Ready(Ready { digest }), effects };
        }
        let section = first_difference(&self.sections, captured).map(|name| format!(" (section {name:?})"));
        let words = format!(
            "what arrived is not what was sent: {} differs{}",
            parts.join(" and "),
            section.unwrap_or_default()
        );
        fail(Failure::new(Code::Corrupt, words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: [u8; 32] = [7; 32];

    fn waiting() -> Target {
        let ticket =
            Ticket { operation: "op".into(), secret: SECRET.to_vec(), expires_in_ms: 1000, ..Default::default() };
        Target::new(ticket, 0)
    }

    fn hello(lane: u32, lanes: u32) -> Hello {
        Hello {
            protocol_min: 1,
            protocol_max: 1,
            operation: "op".into(),
            secret: SECRET.to_vec(),
            lane,
            lanes,
            base: String::new(),
            wants_leaves: false,
        }
    }

    fn run(mut state: Target, inputs: impl IntoIterator<Item = Input>) -> (Target, Vec<Effect>) {
        let mut effects = Vec::new();
        for input in inputs {
            let step = state.step(input, 5);
            state = step.state;
            effects = step.effects;
        }
        (state, effects)
    }

    fn end(lane: u32, round: u32, frames: u64, last: bool) -> Input {
        Input::RoundEnd { lane, end: RoundEnd { round, frames, last } }
    }

    fn open_two() -> [Input; 2] {
        [Input::Hello(hello(0, 2)), Input::Hello(hello(1, 2))]
    }

    fn failure(state: &Target) -> Option<&Failure> {
        match state {
            Target::Failed(failed) => Some(&failed.failure),
            _ => None,
        }
    }

    #[test]
    fn a_strangers_hello_is_denied_and_changes_nothing() {
        let strangers = [
            Hello { secret: vec![8; 32], ..hello(0, 2) },
            Hello { secret: vec![], ..hello(0, 2) },
            Hello { operation: "other".into(), ..hello(0, 2) },
        ];
        for stranger in strangers {
            let (state, effects) = run(waiting(), [Input::Hello(stranger.clone())]);
            assert!(matches!(&effects[..], [Effect::Refuse(f)] if f.code == Code::Denied), "{effects:?}");
            let (state, _) = run(state, open_two());
            let (state, effects) = run(state, [Input::Hello(stranger)]);
            assert!(matches!(&effects[..], [Effect::Refuse(f)] if f.code == Code::Denied), "{effects:?}");
            assert!(matches!(state, Target::Receiving(_)));
        }
    }

    #[test]
    fn a_ticket_is_used_once_and_only_in_time() {
        let late = waiting().step(Input::Hello(hello(0, 1)), 1_000_000);
        assert!(matches!(&late.effects[..], [Effect::Refuse(f)] if f.reason.contains("expired")));
        for again in [hello(0, 2), hello(1, 3)] {
            let (state, _) = run(waiting(), open_two());
            let (_, effects) = run(state, [Input::Hello(again)]);
            assert!(matches!(&effects[..], [Effect::Refuse(f)] if f.code == Code::Denied), "{effects:?}");
        }
        let (state, _) = run(waiting(), open_two().into_iter().chain([end(0, 1, 0, true), end(1, 1, 0, true)]));
        let (_, effects) = run(state, [Input::Hello(hello(0, 2))]);
        assert!(matches!(&effects[..], [Effect::Refuse(f)] if f.code == Code::Denied), "{effects:?}");
    }

    #[test]
    fn versions_and_lanes_that_do_not_fit_are_refused() {
        for bad in [
            Hello { protocol_min: 2, protocol_max: 3, ..hello(0, 1) },
            Hello { protocol_min: 0, protocol_max: 0, ..hello(0, 1) },
            hello(0, 0),
            hello(0, LANES_MAX + 1),
            hello(2, 2),
            Hello { base: "cp".into(), ..hello(0, 1) },
        ] {
            let (_, effects) = run(waiting(), [Input::Hello(bad.clone())]);
            assert!(matches!(&effects[..], [Effect::Refuse(f)] if f.code == Code::Protocol), "{bad:?} {effects:?}");
        }
        let (_, effects) = run(waiting(), [Input::Hello(Hello { protocol_max: 9, ..hello(0, 1) })]);
        assert_eq!(effects, [Effect::Accept { lane: 0, protocol: 1 }]);
    }

    #[test]
    fn anything_out_of_order_on_an_accepted_lane_ends_it_in_words() {
        let section = |name: &str| Section { name: name.into(), ..Default::default() };
        let last = || open_two().into_iter().chain([end(0, 1, 0, true), end(1, 1, 0, true)]).collect::<Vec<_>>();
        let two = || open_two().to_vec();
        let cases: Vec<(Vec<Input>, Input, &str)> = vec![
            (vec![Input::Hello(hello(0, 2))], Input::Pages { lane: 0 }, "before lane 1"),
            (two(), Input::Pages { lane: 9 }, "no lane 9"),
            (two(), end(0, 2, 0, false), "ends round 2"),
            (two(), end(0, 1, 1, false), "sent 1 frames in round 1, 0 arrived"),
            ([two(), vec![end(0, 1, 0, false)]].concat(), end(0, 1, 0, false), "after its RoundEnd"),
            ([two(), vec![end(0, 1, 0, false)]].concat(), Input::Pages { lane: 0 }, "after its RoundEnd"),
            ([two(), vec![end(0, 1, 0, false)]].concat(), end(1, 1, 0, true), "disagree"),
            (two(), Input::Section { lane: 0, section: section("a") }, "while receiving pages"),
            (last(), Input::Pages { lane: 0 }, "while receiving sections"),
            (last(), Input::Section { lane: 1, section: section("a") }, "lane 1"),
            (
                [last(), vec![Input::Section { lane: 0, section: section("a") }]].concat(),
                Input::Section { lane: 0, section: section("a") },
                "twice",
            ),
            (last(), Input::StateEnd { lane: 0, end: StateEnd { sections: 1, ..Default::default() } }, "0 arrived"),
            (last(), Input::StateEnd { lane: 0, end: StateEnd::default() }, "without a digest"),
        ];
        for (before, bad, words) in cases {
            let (state, effects) = run(run(waiting(), before).0, [bad.clone()]);
            let failure = failure(&state).unwrap_or_else(|| panic!("{bad:?} was accepted"));
            assert_eq!(failure.code, Code::Protocol, "{bad:?}");
            assert!(failure.reason.contains(words), "{:?} lacks {words:?}", failure.reason);
            assert_eq!(effects, [Effect::AbortSource(failure.clone())]);
        }
    }

    #[test]
    fn blocks_of_a_recording_are_gone_through_before_it_is_ready() {
        let frame = |byte: u8| Bytes::from(vec![byte; 100]);
        let until = Position { retired: 9, skipped_tsc: 4 };
        let digest = machine_digest(Digest([1; 32]), state_digest(&[]), &[]);
        let state_end = |replay_until, ram_follows| {
            let end = StateEnd { digest: Some(digest.clone()), replay_until, ram_follows, ..StateEnd::default() };
            Input::StateEnd { lane: 0, end }
        };
        let blocks = |end: Input| {
            let pages = [open_two().to_vec(), vec![end_of(0), end_of(1)]].concat();
            let journal = [1, 2].map(|byte| Input::Journal { lane: 0, frame: frame(byte) });
            run(waiting(), pages.into_iter().chain(journal).chain([end]))
        };
        let (_, effects) = blocks(state_end(Some(until), false));
        let replay = Some(Replay { blocks: vec![frame(1), frame(2)], until });
        assert_eq!(effects.last(), Some(&Effect::Apply { sections: vec![], verify_full: false, ram: None, replay }));
        for (end, words) in
            [(state_end(None, false), "no word on how far"), (state_end(Some(until), true), "pages of RAM are missing")]
        {
            let (state, _) = blocks(end);
            let failure = failure(&state).unwrap();
            assert!(failure.reason.contains(words), "{}", failure.reason);
        }
        let elsewhere =
            [open_two().to_vec(), vec![end_of(0), end_of(1), Input::Journal { lane: 1, frame: frame(1) }]].concat();
        let (state, _) = run(waiting(), elsewhere);
        assert!(failure(&state).unwrap().reason.contains("Journal on lane 1"));
    }

    fn end_of(lane: u32) -> Input {
        end(lane, 1, 0, true)
    }

    fn applying(sections: Vec<Section>, ram: Digest) -> Target {
        let digest = machine_digest(ram, state_digest(&sections), &[]);
        let count = sections.len() as u32;
        let end_of_state = StateEnd { sections: count, digest: Some(digest), ..StateEnd::default() };
        let inputs = open_two()
            .into_iter()
            .chain([end(0, 1, 0, true), end(1, 1, 0, true)])
            .chain(sections.into_iter().map(|section| Input::Section { lane: 0, section }))
            .chain([Input::StateEnd { lane: 0, end: end_of_state }]);
        run(waiting(), inputs).0
    }

    #[test]
    fn a_difference_is_named_by_part_and_section() {
        let section = |name: &str, byte: u8| Section { name: name.into(), body: vec![byte], ..Default::default() };
        let sections = vec![section("clock", 1), section("cpu/0", 1)];
        let ram = Digest([1; 32]);
        let apply = |sections: Vec<Section>, ram, disks| {
            let state = applying(vec![section("clock", 1), section("cpu/0", 1)], Digest([1; 32]));
            run(state, [Input::Applied { sections, ram, disks }]).0
        };
        assert!(matches!(apply(sections.clone(), ram, vec![]), Target::Ready(_)));
        let words = |state: &Target| failure(state).map(|f| (f.code, f.reason.clone())).unwrap();
        let (code, text) = words(&apply(sections.clone(), Digest([2; 32]), vec![]));
        assert!(code == Code::Corrupt && text.contains("RAM") && !text.contains("state"), "{text}");
        let (_, text) = words(&apply(sections, ram, vec![Digest([3; 32])]));
        assert!(text.contains("disks"), "{text}");
        let (_, text) = words(&apply(vec![section("clock", 1), section("cpu/0", 9)], ram, vec![]));
        assert!(text.contains("state") && text.contains("\"cpu/0\""), "{text}");
    }

    #[test]
    fn a_ready_target_fails_only_when_it_is_abandoned() {
        let ready = || run(applying(vec![], Digest([1; 32])), [applied()]).0;
        fn applied() -> Input {
            Input::Applied { sections: vec![], ram: Digest([1; 32]), disks: vec![] }
        }
        for input in [
            Input::LaneEnded { lane: 0, reason: "x".into() },
            Input::Pages { lane: 0 },
            Input::Bad(protocol("x")),
            Input::Aborted(protocol("x")),
            end(0, 1, 0, true),
        ] {
            assert!(matches!(run(ready(), [input]).0, Target::Ready(_)));
        }
        let (state, _) = run(ready(), [Input::Abandon { reason: "cancelled".into() }]);
        assert_eq!(failure(&state).unwrap().code, Code::Cancelled);
    }
}

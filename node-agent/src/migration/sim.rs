//! Source, target and the controller's decision in virtual time under one seed: loss, delay, reordering between lanes,
//! duplicates, flipped bits, silence, cancels and crashes at any step. Frames and pages are the real ones; the network, the guest
//! and the clock are not.
//!
//! Each seed runs a few attempts in a row on one guest: migrations, or checkpoints that build on the last good one, with
//! faults; then one without faults, which must succeed. Held at every event: never both sides runnable; before the hand-over
//! the guest never stands still for longer than a silent target may keep it; it is never left held back; when the target
//! says Ready its memory is what the source's was when it stopped; whatever failed, the guest runs in exactly one place in the
//! end, and no page is forgotten by the attempt after. A failure prints the seed: `run(SEED)` is all there is to repeat it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use bytes::Bytes;
use proto::status::Code;
use proto::v1::{
    Hello, HelloReply, MachineDigest, Ready, RoundAck, RoundEnd, Section, StateEnd, Ticket, TransferPolicy,
};
use vmcb_engine::memory::digest::{PageDigests, ZERO_LEAF};
use vmcb_engine::memory::shared::{Run, SharedPages};
use vmcb_engine::snapshot::{machine_digest, state_digest};
use vmcb_engine::transfer::{receive, runs};

use super::Failure;
use super::bank::{Bank, noise};
use super::message::Message;
use super::source::{self, Effect, Plan, RoundTotals, SILENCE_US_MAX, SILENCE_VERIFY_US_MAX, Source};
use super::target::{self, Target};

const RAM_PAGES: u64 = 40;
const DISK_PAGES: u64 = 8;
const CONTROLLER_PATIENCE_US: u64 = 400_000;
const TICK_US: u64 = 20_000;

/// A generator of its own, so that a seed means the same for ever (splitmix64).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

struct Guest {
    ram: Bank,
    disk: Bank,
    spaces: [SharedPages; 2],
    epoch: u32,
    running: bool,
    throttle_percent: u32,
    steps: u64,
}

impl Guest {
    fn new() -> Self {
        let (ram, disk) = (Bank::new(RAM_PAGES), Bank::new(DISK_PAGES));
        Self {
            spaces: [ram.shared(), disk.shared()],
            ram,
            disk,
            epoch: 1,
            running: true,
            throttle_percent: 0,
            steps: 0,
        }
    }

    fn act(&mut self, chance: &mut Chance) {
        if self.running {
            self.steps += 1;
            let bytes = if chance.below(4) == 0 { [0; 4096] } else { noise(self.steps) };
            self.ram.write(chance.below(RAM_PAGES), &bytes, self.epoch);
            if chance.below(8) == 0 {
                self.disk.write(chance.below(DISK_PAGES), &bytes, self.epoch);
            }
        }
    }

    fn bytes(&self) -> (Vec<u8>, Vec<u8>) {
        (self.ram.bytes(), self.disk.bytes())
    }

    fn sections(&self) -> Vec<Section> {
        let section = |name: &str, body| Section { name: name.into(), major: 1, body, ..Default::default() };
        vec![section("clock", self.steps.to_le_bytes().to_vec()), section("cpu/0", vec![1; 60])]
    }
}

/// What goes wrong in an attempt; numbers are events or frames counted from its beginning.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    CutAt(u64),
    FlipFrame(u64),
    DuplicateFrame(u64),
    DropFrame(u64),
    SourceCrashesAt(u64),
    TargetCrashesAt(u64),
    CancelAt(u64),
    /// Nothing arrives any more, and no lane is seen to be lost.
    SilentFrom(u64),
    HandOverUnheard,
    CaptureDiffers,
}

impl Fault {
    fn draw(chance: &mut Chance) -> Self {
        let at = chance.below(200);
        match chance.below(12) {
            0 => Self::None,
            1 => Self::CutAt(at),
            2 => Self::FlipFrame(at / 3),
            3 => Self::DuplicateFrame(at / 3),
            4 => Self::DropFrame(at / 3),
            5 | 6 => Self::SourceCrashesAt(at),
            7 => Self::TargetCrashesAt(at),
            8 => Self::CancelAt(at),
            9 => Self::HandOverUnheard,
            10 => Self::SilentFrom(at),
            _ => Self::CaptureDiffers,
        }
    }
}

#[derive(Debug)]
enum Event {
    ToTarget {
        lane: u32,
        frame: Bytes,
    },
    ToSource {
        lane: u32,
        frame: Bytes,
    },
    /// The source's end of a lane notices that it has gone; the target's.
    SourceLosesLane,
    TargetLosesLane(u32),
    SourceAnswer(source::Input),
    TargetAnswer(target::Input),
    NextPiece,
    TimePasses,
    GuestActs,
    ControllerHears,
    ControllerLosesPatience,
    SourceAbandoned,
    TargetAbandoned,
    Activate,
}

#[derive(Debug, PartialEq)]
enum Verdict {
    Open,
    Committed,
    Abandoned,
}

/// What the last good checkpoint left.
#[derive(Clone)]
struct Base {
    mark: u32,
    digests: Vec<PageDigests>,
    bytes: (Vec<u8>, Vec<u8>),
}

struct Lane {
    up: bool,
    to_target_us: u64,
    to_source_us: u64,
    frames: u64,
}

struct Worker {
    round: u32,
    until: Option<u32>,
    last: bool,
    instant: Option<u32>,
    pieces: VecDeque<(u16, Run)>,
    totals: RoundTotals,
}

/// One attempt.
struct World<'a> {
    chance: &'a mut Chance,
    guest: &'a mut Guest,
    now_us: u64,
    sequence: u64,
    events: BinaryHeap<Reverse<(u64, u64, usize)>>,
    bodies: Vec<Option<Event>>,
    fault: Fault,
    frames: u64,
    checkpoint: bool,
    silent: bool,
    /// How long the guest may stand still before the hand-over, and since when it has.
    stands_us_max: u64,
    stands_since_us: Option<u64>,
    lanes: Vec<Lane>,
    source: Option<Source>,
    source_digests: Vec<PageDigests>,
    worker: Option<Worker>,
    target: Option<Target>,
    target_spaces: [SharedPages; 2],
    target_banks: (Bank, Bank),
    target_digests: Vec<PageDigests>,
    target_runs: bool,
    /// The machine when it was captured.
    frozen: Option<(Vec<u8>, Vec<u8>)>,
    verdict: Verdict,
}

impl<'a> World<'a> {
    fn new(chance: &'a mut Chance, guest: &'a mut Guest, fault: Fault, base: Option<&Base>, checkpoint: bool) -> Self {
        let banks = (Bank::new(RAM_PAGES), Bank::new(DISK_PAGES));
        let mut digests = vec![PageDigests::new(RAM_PAGES), PageDigests::new(DISK_PAGES)];
        if let Some(base) = base {
            banks.0.shared().write_pages(0, &base.bytes.0).unwrap();
            banks.1.shared().write_pages(0, &base.bytes.1).unwrap();
            digests.clone_from(&base.digests);
        }
        let lanes = 1 + chance.below(4) as u32;
        let policy = TransferPolicy {
            downtime_ms_max: 1 + chance.below(2) as u32,
            rounds_max: 1 + chance.below(6) as u32,
            verify_full: chance.below(3) == 0,
            throttle_percent_max: 99 * chance.below(2) as u32,
            ..Default::default()
        };
        let plan = Plan {
            lanes,
            policy,
            checkpoint,
            freeze: checkpoint && !policy.verify_full && chance.below(4) > 0,
            mark: base.map_or(0, |base| base.mark),
            wants_leaves: false,
        };
        let ticket = Ticket { operation: "op".into(), secret: vec![1], expires_in_ms: 1000, ..Default::default() };
        let lane = || Lane { up: true, to_target_us: 0, to_source_us: 0, frames: 0 };
        let mut world = World {
            chance,
            guest,
            now_us: 0,
            sequence: 0,
            events: BinaryHeap::new(),
            bodies: Vec::new(),
            fault,
            frames: 0,
            checkpoint,
            silent: false,
            stands_us_max: TICK_US + if policy.verify_full { SILENCE_VERIFY_US_MAX } else { SILENCE_US_MAX },
            stands_since_us: None,
            lanes: (0..lanes).map(|_| lane()).collect(),
            source: Some(Source::new(plan, 0)),
            source_digests: digests.clone(),
            worker: None,
            target: Some(Target::new(ticket, 0)),
            target_spaces: [banks.0.shared(), banks.1.shared()],
            target_banks: banks,
            target_digests: digests,
            target_runs: false,
            frozen: None,
            verdict: Verdict::Open,
        };
        for lane in 0..lanes {
            let hello = Hello {
                protocol_min: 1,
                protocol_max: 1,
                operation: "op".into(),
                secret: vec![1],
                lane,
                lanes,
                base: String::new(),
                wants_leaves: false,
            };
            world.tell_target(lane, Message::Hello(hello));
        }
        world.after(CONTROLLER_PATIENCE_US, Event::ControllerLosesPatience);
        world.after(10, Event::GuestActs);
        world.after(TICK_US, Event::TimePasses);
        world
    }

    fn after(&mut self, us: u64, event: Event) {
        self.events.push(Reverse((self.now_us + us, self.sequence, self.bodies.len())));
        self.sequence += 1;
        self.bodies.push(Some(event));
    }

    fn soon(&mut self, event: Event) {
        let us = 1 + self.chance.below(900);
        self.after(us, event);
    }

    fn tell_target(&mut self, lane: u32, message: Message) {
        let mut frame = message.encode();
        let number = self.frames;
        self.frames += 1;
        let copies = match self.fault {
            Fault::DropFrame(at) if at == number => 0,
            Fault::DuplicateFrame(at) if at == number => 2,
            Fault::FlipFrame(at) if at == number => {
                let mut bytes = frame.to_vec();
                let at = self.chance.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << self.chance.below(8);
                frame = bytes.into();
                1
            }
            _ => 1,
        };
        let delay = 20 + self.chance.below(400);
        let wire = &mut self.lanes[lane as usize];
        // A lane keeps its order, lanes among each other do not.
        wire.to_target_us = wire.to_target_us.max(self.now_us + delay);
        let us = wire.to_target_us - self.now_us;
        (0..copies).for_each(|_| self.after(us, Event::ToTarget { lane, frame: frame.clone() }));
    }

    fn tell_source(&mut self, lane: u32, message: Message) {
        let delay = 20 + self.chance.below(400);
        let wire = &mut self.lanes[lane as usize];
        wire.to_source_us = wire.to_source_us.max(self.now_us + delay);
        let us = wire.to_source_us - self.now_us;
        self.after(us, Event::ToSource { lane, frame: message.encode() });
    }

    fn cut(&mut self, lane: u32) {
        if std::mem::replace(&mut self.lanes[lane as usize].up, false) {
            self.soon(Event::SourceLosesLane);
            self.soon(Event::TargetLosesLane(lane));
        }
    }

    /// Ends the lanes after what is under way has arrived.
    fn close(&mut self) {
        for lane in 0..self.lanes.len() as u32 {
            let wire = &self.lanes[lane as usize];
            let (to_target, to_source) =
                (wire.to_target_us.saturating_sub(self.now_us), wire.to_source_us.saturating_sub(self.now_us));
            self.after(to_target + 1, Event::TargetLosesLane(lane));
            self.after(to_source + 1, Event::SourceLosesLane);
        }
    }

    fn run(&mut self) {
        let mut count = 0;
        while let Some(Reverse((at, _, body))) = self.events.pop() {
            self.now_us = at;
            count += 1;
            assert!(count < 100_000, "it does not end");
            self.break_something(count);
            let event = self.bodies[body].take().expect("an event happens once");
            self.happen(event);
            assert!(!(self.guest.running && self.target_runs), "both sides run");
            self.check_standing();
        }
        assert_eq!(self.guest.throttle_percent, 0, "left held back");
        assert!(!self.guest.ram.keeper.is_frozen() && !self.guest.disk.keeper.is_frozen(), "left frozen");
    }

    /// Stopped for a hand-over that has not come about: not for ever.
    fn check_standing(&mut self) {
        let holds = self.source.as_ref().is_some_and(|source| !source.is_over() && source.holds_guest());
        self.stands_since_us = self.stands_since_us.or(Some(self.now_us)).filter(|_| holds && !self.guest.running);
        let stood_us = self.stands_since_us.map_or(0, |since| self.now_us - since);
        // The bytes of the last pages and the steps around them take their time too.
        assert!(stood_us <= self.stands_us_max + 1_000_000, "it has stood still for {stood_us} us");
    }

    fn break_something(&mut self, count: u64) {
        match self.fault {
            Fault::CutAt(at) if at == count => {
                let lane = self.chance.below(self.lanes.len() as u64) as u32;
                self.cut(lane);
            }
            Fault::SourceCrashesAt(at) if at == count => {
                (self.source, self.worker) = (None, None);
                // Nobody repeats it: the runner lets it lapse.
                self.guest.throttle_percent = 0;
                let _was_frozen = [&self.guest.ram, &self.guest.disk].map(|bank| bank.keeper.thaw());
                (0..self.lanes.len() as u32).for_each(|lane| self.cut(lane));
            }
            // What a host's loss after Ready means is the controller's affair.
            Fault::TargetCrashesAt(at) if at == count && !matches!(self.target, Some(Target::Ready(_))) => {
                self.target = None;
                (0..self.lanes.len() as u32).for_each(|lane| self.cut(lane));
            }
            Fault::SilentFrom(at) if at == count => self.silent = true,
            Fault::CancelAt(at) if at == count => {
                self.step_source(source::Input::Cancel(Failure::new(Code::Cancelled, "cancelled")));
            }
            _ => (),
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::ToTarget { .. } | Event::ToSource { .. } if self.silent => (),
            Event::ToTarget { lane, frame } if self.lanes[lane as usize].up => self.target_hears(lane, &frame),
            Event::ToSource { lane, frame } if self.lanes[lane as usize].up => self.source_hears(lane, &frame),
            Event::ToTarget { .. } | Event::ToSource { .. } => (),
            Event::SourceLosesLane => {
                self.step_source(source::Input::Lost(Failure::new(Code::Unreachable, "lost")));
            }
            Event::TargetLosesLane(lane) => {
                self.step_target(target::Input::LaneEnded { lane, reason: "lost".into() });
            }
            Event::SourceAnswer(input) => self.step_source(input),
            Event::TargetAnswer(input) => self.step_target(input),
            Event::NextPiece => self.next_piece(),
            Event::GuestActs => {
                let acts = self.chance.below(6) * u64::from(100 - self.guest.throttle_percent) / 100;
                (0..acts).for_each(|_| self.guest.act(self.chance));
                match self.source.as_ref().is_some_and(|source| !source.is_over()) {
                    true if self.guest.running => self.soon(Event::GuestActs),
                    true => self.after(TICK_US / 10, Event::GuestActs),
                    false => (),
                }
            }
            Event::TimePasses => {
                let bytes_sent = self.frames;
                self.step_source(source::Input::Tick { bytes_sent });
                if self.source.as_ref().is_some_and(|source| !source.is_over()) {
                    self.after(TICK_US, Event::TimePasses);
                }
            }
            // A controller that is patient: the source must help itself.
            Event::ControllerLosesPatience
                if self.silent && self.stands_since_us.is_some() && self.verdict == Verdict::Open =>
            {
                self.after(SILENCE_US_MAX, Event::ControllerLosesPatience);
            }
            Event::ControllerHears if self.verdict == Verdict::Open => {
                self.verdict = Verdict::Committed;
                self.soon(Event::Activate);
            }
            Event::ControllerLosesPatience if self.verdict == Verdict::Open => {
                self.verdict = Verdict::Abandoned;
                self.soon(Event::SourceAbandoned);
                self.soon(Event::TargetAbandoned);
            }
            Event::ControllerHears | Event::ControllerLosesPatience => (),
            Event::SourceAbandoned => match &self.source {
                // A new agent, or one that has waited for this word.
                Some(Source::HandedOver(_)) | None => self.guest.running = true,
                Some(Source::Failed(_)) => assert!(self.guest.running, "a failed source lets the guest go by itself"),
                Some(_) => self.step_source(source::Input::Cancel(Failure::new(Code::Cancelled, "abandoned"))),
            },
            Event::TargetAbandoned => self.step_target(target::Input::Abandon { reason: "abandoned".into() }),
            Event::Activate => {
                assert!(matches!(self.target, Some(Target::Ready(_))), "committed without a target: {:?}", self.target);
                self.target_runs = true;
            }
        }
    }

    fn step_source(&mut self, input: source::Input) {
        let Some(state) = self.source.take() else { return };
        let was_over = state.is_over();
        let source::Step { state, effects } = state.step(input, self.now_us);
        let is_over = state.is_over();
        if let (false, Source::HandedOver(_), false) = (was_over, &state, self.checkpoint)
            && self.fault != Fault::HandOverUnheard
        {
            self.soon(Event::ControllerHears);
        }
        self.source = Some(state);
        effects.into_iter().for_each(|effect| self.perform(effect));
        if is_over && !was_over {
            self.worker = None;
            self.close();
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::AdvanceEpoch => {
                self.guest.epoch += 1;
                self.soon(Event::SourceAnswer(source::Input::Epoch(self.guest.epoch)));
            }
            Effect::SendRound { round, since, until, last, instant } => {
                self.begin_round(round, since, last, instant);
                self.worker.iter_mut().for_each(|worker| worker.until = until);
            }
            Effect::Freeze { since } => {
                self.guest.epoch += 1;
                for bank in [&self.guest.ram, &self.guest.disk] {
                    bank.keeper.freeze(since, self.guest.epoch - 1).unwrap();
                }
                self.frozen = Some(self.guest.bytes());
                let (epoch, sections) = (self.guest.epoch, self.guest.sections());
                self.soon(Event::SourceAnswer(source::Input::Frozen { epoch, sections, stopped_us: 1 }));
            }
            Effect::Thaw => {
                // A failure may come before the answer to the freeze, never before the freeze.
                assert!(self.guest.ram.keeper.thaw() && self.guest.disk.keeper.thaw(), "it was lost");
            }
            Effect::MeasureLeft { since } => {
                self.guest.epoch += 1;
                let (bytes, epoch) = (self.left_bytes(since), self.guest.epoch);
                self.soon(Event::SourceAnswer(source::Input::Left { bytes, epoch }));
            }
            Effect::Look { since } => {
                let bytes = self.left_bytes(since);
                self.soon(Event::SourceAnswer(source::Input::Looked { since, bytes }));
            }
            Effect::Stop => {
                self.guest.running = false;
                self.soon(Event::SourceAnswer(source::Input::Stopped));
            }
            Effect::Capture => {
                assert!(!self.guest.running, "captured while it runs");
                self.frozen = Some(self.guest.bytes());
                let sections = self.guest.sections();
                self.soon(Event::SourceAnswer(source::Input::Captured(sections)));
            }
            Effect::Throttle { percent } => self.guest.throttle_percent = percent,
            Effect::Resume => self.guest.running = true,
            Effect::Digest { sections, verify_full } => {
                if verify_full {
                    assert!(!self.guest.running, "compared while it runs");
                    for (space, digests) in self.guest.spaces.iter().zip(&self.source_digests) {
                        assert_eq!(digests.first_difference(&space.digests().unwrap()), None);
                    }
                }
                let digest = digest_of(&mut self.source_digests, &sections);
                self.soon(Event::SourceAnswer(source::Input::Digested(digest)));
            }
            Effect::SendState { sections, digest, verify_full, stopped_us } => {
                let end = StateEnd {
                    sections: sections.len() as u32,
                    digest: Some(digest),
                    verify_full,
                    stopped_us,
                    ram_follows: false,
                    replay_until: None,
                };
                sections.into_iter().for_each(|section| self.tell_target(0, Message::Section(section)));
                self.tell_target(0, Message::StateEnd(end));
            }
            Effect::AbortTarget(failure) => self.tell_target(0, Message::Abort(failure.into())),
            Effect::ReportRound(_) | Effect::ReportPhase(_) => (),
        }
    }

    fn left_bytes(&self, since: u32) -> u64 {
        self.guest.spaces.iter().map(|space| space.count_since(since).unwrap() * 4096).sum()
    }

    fn begin_round(&mut self, round: u32, since: u32, last: bool, instant: Option<u32>) {
        let mut pieces = VecDeque::new();
        for (number, space) in (0..).zip(&self.guest.spaces) {
            // Small pieces, so that much happens between them.
            let runs = match instant {
                Some(instant) => space.since_frozen(since, instant).unwrap(),
                None => space.since(since).unwrap(),
            };
            pieces.extend(runs.into_iter().flat_map(|run| run.pieces(5)).map(|run| (number, run)));
        }
        self.lanes.iter_mut().for_each(|lane| lane.frames = 0);
        self.worker = Some(Worker { round, until: None, last, instant, pieces, totals: RoundTotals::default() });
        self.soon(Event::NextPiece);
    }

    fn next_piece(&mut self) {
        let Some(mut worker) = self.worker.take() else { return };
        let Some((space, run)) = worker.pieces.pop_front() else {
            for lane in 0..self.lanes.len() as u32 {
                let frames = self.lanes[lane as usize].frames;
                self.tell_target(lane, Message::RoundEnd(RoundEnd { round: worker.round, frames, last: worker.last }));
            }
            self.soon(Event::SourceAnswer(source::Input::RoundSent(worker.totals)));
            return;
        };
        let at = usize::from(space);
        let digests = &mut self.source_digests[at];
        let pages = &self.guest.spaces[at];
        let mut batch = runs::Batch::new(Vec::new(), |_, _: &mut Vec<u8>| ());
        let due = worker.until.map_or(vec![run], |until| pages.before(run, until).unwrap());
        for run in &due {
            batch.push(space, pages, *run, worker.instant, |page| digests.get(page) == ZERO_LEAF).unwrap();
        }
        let made = batch.seal();
        made.digests().for_each(|(_, page, leaf)| digests.set(page, leaf));
        let sent: u64 = due.iter().map(|run| run.pages).sum();
        worker.totals.pages += sent;
        worker.totals.left_out_pages += run.pages - sent;
        for frame in made.frame_bytes() {
            worker.totals.bytes += frame.len() as u64;
            let lane = self.chance.below(self.lanes.len() as u64) as u32;
            self.lanes[lane as usize].frames += 1;
            self.tell_target(lane, Message::Pages(Bytes::copy_from_slice(frame)));
        }
        self.worker = Some(worker);
        let us = 1 + self.chance.below(60);
        self.after(us, Event::NextPiece);
    }

    fn source_hears(&mut self, lane: u32, frame: &Bytes) {
        let input = match Message::decode(frame).expect("nobody flips bits on the way back") {
            Message::HelloReply(HelloReply { protocol }) => source::Input::Replied { lane, protocol },
            Message::RoundAck(RoundAck { round }) => source::Input::Acked { round },
            Message::Ready(Ready { digest }) => source::Input::Ready(digest.unwrap()),
            Message::Abort(abort) => source::Input::Aborted(Failure::new(Code::from_number(abort.code), abort.reason)),
            other => panic!("the target sent {}", other.name()),
        };
        self.step_source(input);
    }

    fn target_hears(&mut self, lane: u32, frame: &Bytes) {
        let input = match Message::decode(frame) {
            Ok(Message::Pages(frame)) => {
                self.step_target(target::Input::Pages { lane });
                if !matches!(self.target, Some(Target::Receiving(_))) {
                    return;
                }
                match receive::land(&self.target_spaces, &frame) {
                    Ok(landed) => return landed.note(&mut self.target_digests),
                    Err(error) => target::Input::Bad(Failure::new(Code::Corrupt, error)),
                }
            }
            Ok(Message::Hello(hello)) => target::Input::Hello(hello),
            Ok(Message::RoundEnd(end)) => target::Input::RoundEnd { lane, end },
            Ok(Message::Section(section)) => target::Input::Section { lane, section },
            Ok(Message::Journal(frame)) => target::Input::Journal { lane, frame },
            Ok(Message::StateEnd(end)) => target::Input::StateEnd { lane, end },
            Ok(Message::Abort(abort)) => {
                target::Input::Aborted(Failure::new(Code::from_number(abort.code), abort.reason))
            }
            Ok(other) => panic!("the source sent {}", other.name()),
            Err(error) => target::Input::Bad(Failure::new(Code::Corrupt, error)),
        };
        self.step_target(input);
    }

    fn step_target(&mut self, input: target::Input) {
        let Some(state) = self.target.take() else { return };
        let was_ready = matches!(state, Target::Ready(_));
        let target::Step { state, effects } = state.step(input, self.now_us);
        if matches!(state, Target::Ready(_)) && !was_ready {
            let bytes = (self.target_banks.0.bytes(), self.target_banks.1.bytes());
            assert!(Some(bytes) == self.frozen, "Ready with other memory than the source had");
        }
        self.target = Some(state);
        for effect in effects {
            match effect {
                target::Effect::Accept { lane, protocol } => {
                    self.tell_source(lane, Message::HelloReply(HelloReply { protocol }));
                }
                target::Effect::Refuse(failure) => self.tell_source(0, Message::Abort(failure.into())),
                target::Effect::Ack { round } => self.tell_source(0, Message::RoundAck(RoundAck { round })),
                target::Effect::Settle => (),
                target::Effect::Apply { sections, verify_full, .. } => self.apply(sections, verify_full),
                target::Effect::SayReady(digest) => self.tell_source(0, Message::Ready(Ready { digest: Some(digest) })),
                target::Effect::AbortSource(failure) => {
                    self.tell_source(0, Message::Abort(failure.into()));
                    self.close();
                }
            }
        }
    }

    fn apply(&mut self, mut sections: Vec<Section>, verify_full: bool) {
        if verify_full {
            let fresh = self.target_spaces.iter().map(|space| space.digests().unwrap());
            self.target_digests = fresh.collect();
        }
        if self.fault == Fault::CaptureDiffers {
            sections[0].body.push(1);
        }
        let roots: Vec<_> = self.target_digests.iter_mut().map(PageDigests::root).collect();
        let input = target::Input::Applied { sections, ram: roots[0], disks: roots[1..].to_vec() };
        self.soon(Event::TargetAnswer(input));
    }
}

fn digest_of(digests: &mut [PageDigests], sections: &[Section]) -> MachineDigest {
    let roots: Vec<_> = digests.iter_mut().map(PageDigests::root).collect();
    machine_digest(roots[0], state_digest(sections), &roots[1..])
}

/// How attempts of a seed ended, so that the tests can see that the simulator does something.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    committed: u32,
    checkpoints: u32,
    failed: u32,
    /// Of these, by a source that let its guest go by itself because the target was silent.
    silent: u32,
}

/// Everything that a seed stands for.
fn run(seed: u64) -> Tally {
    let _printed = PrintSeed(seed);
    let mut chance = Chance(seed);
    let mut guest = Guest::new();
    (0..30).for_each(|_| guest.act(&mut chance));
    let mut base: Option<Base> = None;
    let mut tally = Tally::default();
    for attempt in 0..5 {
        // The last two are without fault: a checkpoint on the last base, then the migration.
        let fault = if attempt < 3 { Fault::draw(&mut chance) } else { Fault::None };
        let checkpoint = if attempt < 3 { chance.below(2) == 0 } else { attempt == 3 };
        let from = base.clone().filter(|_| checkpoint);
        (0..chance.below(9)).for_each(|_| guest.act(&mut chance));
        let mut world = World::new(&mut chance, &mut guest, fault, from.as_ref(), checkpoint);
        world.run();
        let running = (world.guest.running, world.target_runs);
        let (frozen, digests) = (world.frozen.take(), world.source_digests.clone());
        match world.source.take() {
            Some(Source::HandedOver(state)) if checkpoint => {
                tally.checkpoints += 1;
                base = Some(Base { mark: state.mark, digests, bytes: frozen.expect("it was captured") });
                assert_eq!(running, (true, false), "{fault:?}");
            }
            _ if world.verdict == Verdict::Committed => {
                tally.committed += 1;
                assert_eq!(running, (false, true), "{fault:?}");
                // The story begins again at the other host.
                assert!(fault == Fault::None || attempt < 3);
                return tally;
            }
            other => {
                tally.failed += 1;
                let reason = |source: &Source| {
                    if let Source::Failed(failed) = source { failed.failure.reason.clone() } else { String::new() }
                };
                tally.silent += u32::from(other.as_ref().map(reason).is_some_and(|reason| reason.contains("silent")));
                assert_eq!(running, (true, false), "{fault:?} {other:?}");
                assert!(fault != Fault::None, "failed without a fault: {other:?}");
            }
        }
    }
    unreachable!("the last attempt is a migration without a fault");
}

struct PrintSeed(u64);

impl Drop for PrintSeed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the seed is {}: repeat with run({})", self.0, self.0);
        }
    }
}

#[test]
fn thousands_of_seeds_keep_every_promise() {
    let mut sum = Tally::default();
    for seed in 0..3000 {
        let tally = run(seed);
        sum.committed += tally.committed;
        sum.checkpoints += tally.checkpoints;
        sum.failed += tally.failed;
        sum.silent += tally.silent;
    }
    // The simulator must do something: every seed ends in a commit, and most attempts before it fail.
    assert_eq!(sum.committed, 3000, "{sum:?}");
    assert!(sum.failed > 2500 && sum.checkpoints > 2500 && sum.silent > 20, "{sum:?}");
}

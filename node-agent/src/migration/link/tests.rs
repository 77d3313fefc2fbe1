//! The real driver over loopback TCP, with a guest made of a thread that writes and stamps pages.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::frame::{Header, Kind};
use proto::ids::VmId;
use proto::seal::{DataKey, Opener};
use proto::status::Code;
use proto::v1::lanes_server::{Lanes, LanesServer};
use proto::v1::transfer_event::Event;
use proto::v1::{self, Chunk, RoundAck, Section, SendRequest, Ticket, TransferEvent, TransferPolicy};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use super::{Phase, Receiver, Replies, chunk, read_hello, refusal, send, tune_endpoint, tune_server};
use crate::migration::bank::{Bank, noise};
use crate::migration::message::Message;
use crate::migration::source::Input;
use crate::migration::target::Replay;
use crate::migration::{Base, Failure, MESSAGE_BYTES_MAX, Sent, SourceVm, Spaces, TargetVm};

const PAGE: u64 = 4096;
const DEADLINE: Duration = Duration::from_secs(60);

/// A guest: RAM and a disk, an epoch, and a lock that is held while it executes an "instruction".
#[derive(Clone)]
struct Guest {
    ram: Bank,
    disk: Bank,
    cpu: Arc<Mutex<()>>,
    running: Arc<AtomicBool>,
    epoch: Arc<AtomicU32>,
    steps: Arc<AtomicU64>,
    /// Pages that hardware has written and nobody has stamped yet; none: it stamps as it writes.
    late: Option<Arc<Mutex<Vec<u64>>>>,
    /// What happens to it, for the test to look at.
    log: Arc<Mutex<Vec<&'static str>>>,
}

impl Guest {
    fn new(pages: u64) -> Self {
        let guest = Self {
            ram: Bank::new(pages),
            disk: Bank::new(64),
            cpu: Arc::default(),
            running: Arc::new(AtomicBool::new(true)),
            epoch: Arc::new(AtomicU32::new(1)),
            steps: Arc::default(),
            late: None,
            log: Arc::default(),
        };
        for page in (0..pages).filter(|page| page % 3 != 0) {
            guest.ram.write(page, &noise(page), 1);
        }
        guest.disk.write(7, &noise(99), 1);
        guest
    }

    fn spaces(&self) -> Spaces {
        Spaces::new(self.ram.shared(), vec![self.disk.shared()])
    }

    /// One write of the guest, if it runs.
    fn act(&self, page: u64, value: u64) {
        let _cpu = self.cpu.lock().unwrap();
        if self.running.load(Ordering::SeqCst) {
            let bytes = if value.is_multiple_of(5) { [0; 4096] } else { noise(value) };
            self.steps.fetch_add(1, Ordering::SeqCst);
            if let Some(late) = &self.late {
                self.ram.data.write_all_at(&bytes, page % self.ram.pages * PAGE).unwrap();
                return late.lock().unwrap().push(page % self.ram.pages);
            }
            self.ram.write(page % self.ram.pages, &bytes, self.epoch.load(Ordering::SeqCst));
            self.disk.write(value % 64, &noise(value), self.epoch.load(Ordering::SeqCst));
        }
    }

    /// Writes without end, until the token is dropped.
    fn keep_busy(&self, working_set: u64) -> Arc<()> {
        let (guest, token) = (self.clone(), Arc::new(()));
        let alive = Arc::downgrade(&token);
        std::thread::spawn(move || {
            for value in 1u64.. {
                if alive.upgrade().is_none() {
                    return;
                }
                guest.act(value.wrapping_mul(0x9e37_79b9) % working_set, value);
            }
        });
        token
    }

    fn sections(&self) -> Vec<Section> {
        let steps = self.steps.load(Ordering::SeqCst).to_le_bytes().to_vec();
        let section = |name: &str, body| Section { name: name.into(), major: 1, body, ..Default::default() };
        vec![section("clock", steps), section("cpu/0", vec![1; 5000])]
    }

    fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }
}

impl SourceVm for Guest {
    async fn throttle(&mut self, percent: u32) -> Result<(), Failure> {
        self.log.lock().unwrap().push(if percent == 0 { "free" } else { "held back" });
        Ok(())
    }

    async fn look(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    async fn advance_epoch(&mut self) -> Result<u32, Failure> {
        let _cpu = self.cpu.lock().unwrap();
        let epoch = self.epoch.load(Ordering::SeqCst).to_le_bytes();
        let written = self.late.iter().flat_map(|late| std::mem::take(&mut *late.lock().unwrap()));
        written.for_each(|page| self.ram.stamps.write_all_at(&epoch, page * 4).unwrap());
        Ok(self.epoch.fetch_add(1, Ordering::SeqCst) + 1)
    }

    async fn stop(&mut self) -> Result<(), Failure> {
        let _cpu = self.cpu.lock().unwrap();
        self.running.store(false, Ordering::SeqCst);
        self.log.lock().unwrap().push("stop");
        Ok(())
    }

    async fn capture(&mut self) -> Result<Vec<Section>, Failure> {
        assert!(!self.is_running(), "captured while it runs");
        Ok(self.sections())
    }

    async fn freeze(&mut self, mark: u32) -> Result<Input, Failure> {
        let _cpu = self.cpu.lock().unwrap();
        let instant = self.epoch.fetch_add(1, Ordering::SeqCst);
        [&self.ram, &self.disk].into_iter().for_each(|bank| bank.keeper.freeze(mark, instant).unwrap());
        self.log.lock().unwrap().push("freeze");
        Ok(Input::Frozen { epoch: instant + 1, sections: self.sections(), stopped_us: 1 })
    }

    async fn stay_frozen(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    async fn thaw(&mut self) -> Result<(), Failure> {
        let _cpu = self.cpu.lock().unwrap();
        self.log.lock().unwrap().push("thaw");
        match [&self.ram, &self.disk].map(|bank| bank.keeper.thaw()) {
            [true, true] => Ok(()),
            _ => Err(Failure::new(Code::Exhausted, "lost")),
        }
    }

    async fn resume(&mut self) -> Result<(), Failure> {
        self.running.store(true, Ordering::SeqCst);
        self.log.lock().unwrap().push("resume");
        Ok(())
    }
}

/// A target's runner.
#[derive(Default, Clone)]
struct Shell {
    sections: Arc<Mutex<Vec<Section>>>,
    refuses: bool,
    forgets: bool,
}

impl TargetVm for Shell {
    async fn apply(&mut self, sections: Vec<Section>) -> Result<(), Failure> {
        *self.sections.lock().unwrap() = sections;
        if self.refuses { Err(Failure::new(Code::Incapable, "no such device")) } else { Ok(()) }
    }

    async fn capture(&mut self) -> Result<Vec<Section>, Failure> {
        let mut sections = self.sections.lock().unwrap().clone();
        if self.forgets {
            sections[1].body[7] ^= 1;
        }
        Ok(sections)
    }

    async fn replay(&mut self, _: Replay) -> Result<(), Failure> {
        Err(Failure::new(Code::Incapable, "this shell has no machine"))
    }
}

/// What the wire does to the chunks of a lane.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    None,
    /// Lane 0 is cut after so many chunks.
    Cut(usize),
    /// A bit of lane 0's n-th chunk flips.
    Flip(usize),
}

struct Service {
    receiver: Receiver,
    trouble: Trouble,
}

#[tonic::async_trait]
impl Lanes for Service {
    type LaneStream = Replies;

    async fn lane(&self, request: Request<Streaming<Chunk>>) -> Result<Response<Replies>, Status> {
        let mut inbound = request.into_inner();
        let hello = read_hello(&mut inbound).await.map_err(|f| Status::new(f.code.into(), f.reason))?;
        let trouble = if hello.lane == 0 { self.trouble } else { Trouble::None };
        Ok(Response::new(self.receiver.lane(hello, Box::pin(troubled(inbound, trouble)))))
    }
}

fn troubled(inbound: Streaming<Chunk>, trouble: Trouble) -> impl Stream<Item = Result<Chunk, Status>> + Send + 'static {
    let mut count = 0;
    inbound.map(move |item| {
        count += 1;
        match (item, trouble) {
            (_, Trouble::Cut(after)) if count > after => Err(Status::unavailable("cut")),
            (Ok(chunk), Trouble::Flip(at)) if count == at => {
                let mut bytes = chunk.frame.to_vec();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 4;
                Ok(Chunk { frame: bytes.into() })
            }
            (item, _) => item,
        }
    })
}

async fn serve<L: Lanes>(service: L) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let accepted = tokio_stream::wrappers::TcpListenerStream::new(listener)
        .map(|stream| stream.inspect(|stream| stream.set_nodelay(true).unwrap()));
    let lanes = LanesServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX);
    tokio::spawn(tune_server(Server::builder()).add_service(lanes).serve_with_incoming(accepted));
    address
}

async fn channels(address: &str, lanes: u32) -> Vec<Channel> {
    let mut channels = Vec::new();
    for _ in 0..lanes {
        let endpoint = tune_endpoint(Endpoint::from_shared(address.to_owned()).unwrap());
        channels.push(endpoint.connect().await.unwrap());
    }
    channels
}

fn request(policy: TransferPolicy) -> SendRequest {
    let ticket = Ticket { operation: "op1".into(), secret: vec![5; 32], expires_in_ms: 60_000, ..Default::default() };
    let policy = TransferPolicy { downtime_ms_max: 5, rounds_max: 6, ..policy };
    SendRequest { vm: "vm1".into(), ticket: Some(ticket), policy: Some(policy), ..Default::default() }
}

/// One attempt and what it left behind.
struct Attempt {
    result: Result<Sent, Failure>,
    events: Vec<Event>,
    receiver: Receiver,
    ram: Bank,
    disk: Bank,
    shell: Shell,
}

struct Setting {
    lanes: u32,
    trouble: Trouble,
    request: SendRequest,
    shell: Shell,
    cancel: CancellationToken,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            lanes: 2,
            trouble: Trouble::None,
            request: request(TransferPolicy::default()),
            shell: Shell::default(),
            cancel: CancellationToken::new(),
        }
    }
}

async fn attempt(guest: &Guest, setting: Setting) -> Attempt {
    let (ram, disk) = (Bank::new(guest.ram.pages), Bank::new(64));
    let spaces = Spaces::new(ram.shared(), vec![disk.shared()]);
    let ticket = setting.request.ticket.clone().unwrap();
    let receiver = Receiver::new(ticket, spaces, setting.shell.clone(), false).unwrap();
    let address = serve(Service { receiver: receiver.clone(), trouble: setting.trouble }).await;
    let (result, events) =
        run_send(guest, channels(&address, setting.lanes).await, setting.request, None, setting.cancel).await;
    Attempt { result, events, receiver, ram, disk, shell: setting.shell }
}

async fn run_send(
    guest: &Guest,
    lanes: Vec<Channel>,
    request: SendRequest,
    base: Option<Base>,
    cancel: CancellationToken,
) -> (Result<Sent, Failure>, Vec<Event>) {
    let (to_events, mut events) = mpsc::channel::<TransferEvent>(4);
    let listening = tokio::spawn(async move {
        let mut all = Vec::new();
        while let Some(event) = events.recv().await {
            all.push(event.event.unwrap());
        }
        all
    });
    let sending = send(guest.clone(), guest.spaces(), lanes, request, base, to_events, cancel);
    let result = tokio::time::timeout(DEADLINE, sending).await.expect("a transfer always ends");
    (result, listening.await.unwrap())
}

fn phases(events: &[Event]) -> Vec<&str> {
    events
        .iter()
        .filter_map(|event| if let Event::Phase(phase) = event { Some(&phase.phase[..]) } else { None })
        .collect()
}

fn rounds(events: &[Event]) -> Vec<&v1::RoundReport> {
    events.iter().filter_map(|event| if let Event::Round(round) = event { Some(round) } else { None }).collect()
}

fn assert_moved(guest: &Guest, attempt: &Attempt) {
    let sent = attempt.result.as_ref().expect("the transfer ends well");
    assert!(!guest.is_running(), "a source that has handed over stands still");
    assert!(attempt.ram.bytes() == guest.ram.bytes() && attempt.disk.bytes() == guest.disk.bytes());
    assert_eq!(sent.handed_over.source, sent.handed_over.target);
    assert_eq!(attempt.receiver.phase(), Phase::Ready(sent.handed_over.target.clone().unwrap()));
    assert_eq!(attempt.shell.sections.lock().unwrap()[0].body, guest.steps.load(Ordering::SeqCst).to_le_bytes());
    assert_eq!(phases(&attempt.events), ["setup", "precopy", "stop", "state", "last-pages", "digest"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_stands_idle_arrives_over_any_number_of_lanes() {
    for lanes in [1, 4] {
        let guest = Guest::new(3000);
        let attempt = attempt(&guest, Setting { lanes, ..Setting::default() }).await;
        assert_moved(&guest, &attempt);
        let rounds = rounds(&attempt.events);
        assert_eq!((rounds.len(), rounds[0].pages, rounds[1].pages), (2, 3064, 0), "{lanes} lanes");
        assert_eq!(rounds[0].bytes + rounds[1].bytes, attempt.result.unwrap().handed_over.bytes_sent);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_writes_all_the_time_arrives_whole() {
    for lanes in [1, 4] {
        let guest = Guest::new(3000);
        let _busy = guest.keep_busy(700);
        let attempt = attempt(&guest, Setting { lanes, ..Setting::default() }).await;
        assert_moved(&guest, &attempt);
        assert!(guest.steps.load(Ordering::SeqCst) > 0 && rounds(&attempt.events).len() <= 7);
        assert_eq!(*guest.log.lock().unwrap(), ["stop"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_leaves_the_guest_running_and_the_next_attempt_forgets_no_page() {
    for after in [0, 1, 5, 9] {
        let guest = Guest::new(3000);
        let busy = guest.keep_busy(3000);
        let cut = attempt(&guest, Setting { trouble: Trouble::Cut(after), ..Setting::default() }).await;
        assert_eq!(cut.result.unwrap_err().code, Code::Unreachable, "cut after {after}");
        assert!(guest.is_running(), "cut after {after}");
        assert!(matches!(cut.receiver.phase(), Phase::Failed(_)));
        let again = attempt(&guest, Setting::default()).await;
        assert_moved(&guest, &again);
        drop(busy);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_ends_the_transfer_as_corrupt_wherever_it_is() {
    // With one lane: pages, RoundEnd, sections.
    for at in [1, 2, 3, 14] {
        let guest = Guest::new(3000);
        let setting = Setting { lanes: 1, trouble: Trouble::Flip(at), ..Setting::default() };
        let attempt = attempt(&guest, setting).await;
        assert_eq!(attempt.result.unwrap_err().code, Code::Corrupt, "flip at {at}");
        assert!(guest.is_running(), "flip at {at}");
        assert!(matches!(attempt.receiver.phase(), Phase::Failed(f) if f.code == Code::Corrupt));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_in_the_middle_of_a_round_is_quick_and_both_sides_know() {
    let guest = Guest::new(3000);
    let cancel = CancellationToken::new();
    let slow = TransferPolicy { bandwidth_bytes_per_s: 1 << 20, ..Default::default() };
    let setting = Setting { request: request(slow), cancel: cancel.clone(), ..Setting::default() };
    let began = Instant::now();
    let epoch = Arc::clone(&guest.epoch);
    let (attempt, ()) = tokio::join!(attempt(&guest, setting), async {
        // Until the first round has begun.
        while epoch.load(Ordering::SeqCst) < 2 && began.elapsed() < DEADLINE {
            tokio::task::yield_now().await;
        }
        cancel.cancel();
    });
    assert_eq!(attempt.result.unwrap_err().code, Code::Cancelled);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert!(guest.is_running() && guest.log.lock().unwrap().is_empty());
    let failure = attempt.receiver.finished().await.unwrap_err();
    assert_eq!(failure.code, Code::Cancelled, "{failure}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_cannot_apply_or_captures_something_else_names_it() {
    let cases = [
        (Shell { refuses: true, ..Shell::default() }, Code::Incapable, "no such device"),
        (Shell { forgets: true, ..Shell::default() }, Code::Corrupt, "section \"cpu/0\""),
    ];
    for (shell, code, words) in cases {
        let guest = Guest::new(300);
        let attempt = attempt(&guest, Setting { shell, ..Setting::default() }).await;
        let failure = attempt.result.unwrap_err();
        assert!(failure.code == code && failure.reason.contains(words), "{failure:?}");
        assert!(guest.is_running());
        assert_eq!(*guest.log.lock().unwrap(), ["stop", "resume"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_comparison_passes_and_sees_a_write_without_a_stamp() {
    let full = || request(TransferPolicy { verify_full: true, ..Default::default() });
    let guest = Guest::new(1000);
    let whole = attempt(&guest, Setting { request: full(), ..Setting::default() }).await;
    assert_moved(&guest, &whole);

    struct Liar(Guest);
    impl SourceVm for Liar {
        async fn throttle(&mut self, percent: u32) -> Result<(), Failure> {
            self.0.throttle(percent).await
        }
        async fn look(&mut self) -> Result<(), Failure> {
            self.0.look().await
        }
        async fn advance_epoch(&mut self) -> Result<u32, Failure> {
            self.0.advance_epoch().await
        }
        async fn stop(&mut self) -> Result<(), Failure> {
            self.0.ram.data.write_all_at(b"unseen", 500 * PAGE).unwrap();
            self.0.stop().await
        }
        async fn capture(&mut self) -> Result<Vec<Section>, Failure> {
            self.0.capture().await
        }
        async fn resume(&mut self) -> Result<(), Failure> {
            self.0.resume().await
        }
        async fn freeze(&mut self, mark: u32) -> Result<Input, Failure> {
            self.0.freeze(mark).await
        }
        async fn stay_frozen(&mut self) -> Result<(), Failure> {
            self.0.stay_frozen().await
        }
        async fn thaw(&mut self) -> Result<(), Failure> {
            self.0.thaw().await
        }
    }
    let guest = Guest::new(1000);
    let bank = (Bank::new(1000), Bank::new(64));
    let spaces = Spaces::new(bank.0.shared(), vec![bank.1.shared()]);
    let receiver = Receiver::new(full().ticket.unwrap(), spaces, Shell::default(), false).unwrap();
    let address = serve(Service { receiver, trouble: Trouble::None }).await;
    let (events, _kept) = mpsc::channel(100);
    let lanes = channels(&address, 1).await;
    let failure =
        send(Liar(guest.clone()), guest.spaces(), lanes, full(), None, events, CancellationToken::new()).await;
    let failure = failure.unwrap_err();
    assert!(failure.reason.contains("page 500 of space 0"), "{failure}");
    assert!(guest.is_running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_hardware_has_written_is_known_when_a_round_has_ended() {
    let guest = Guest { late: Some(Arc::default()), ..Guest::new(3000) };
    let busy = guest.keep_busy(2000);
    let moved = attempt(&guest, Setting::default()).await;
    drop(busy);
    assert_moved(&guest, &moved);
    let rate = moved.events.iter().find_map(|event| match event {
        Event::Round(round) => Some(round.dirty_rate),
        _ => None,
    });
    assert!(rate.is_some_and(|rate| rate > 0), "{:?}", moved.events);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_denied_and_a_target_that_holds_data_is_refused() {
    let guest = Guest::new(300);
    let bank = Bank::new(300);
    let spaces = || Spaces::new(bank.shared(), vec![]);
    let receiver =
        Receiver::new(request(TransferPolicy::default()).ticket.unwrap(), spaces(), Shell::default(), false).unwrap();
    let address = serve(Service { receiver: receiver.clone(), trouble: Trouble::None }).await;
    let mut stranger = request(TransferPolicy::default());
    stranger.ticket.as_mut().unwrap().secret = vec![6; 32];
    let lanes = channels(&address, 2).await;
    let (result, _) = run_send(&guest, lanes, stranger, None, CancellationToken::new()).await;
    assert_eq!(result.unwrap_err().code, Code::Denied);
    assert_eq!(receiver.phase(), Phase::Waiting);
    receiver.abandon("no longer wanted");
    assert_eq!(receiver.finished().await.unwrap_err().code, Code::Cancelled);
    bank.write(3, &noise(1), 0);
    let refused = Receiver::new(Ticket::default(), spaces(), Shell::default(), false);
    assert_eq!(refused.err().unwrap().code, Code::Conflict);
}

/// A bucket: takes everything in, opens what is sealed, acknowledges, and agrees with every digest.
#[derive(Clone, Default)]
struct Ingest {
    seen: Arc<Mutex<Vec<(u16, u64, u32)>>>,
    /// What it says of RAM if it is asked.
    leaves: Arc<Vec<[u8; 32]>>,
}

const KEY: [u8; 32] = [4; 32];
const VM: VmId = VmId([6; 16]);

impl Ingest {
    fn seen(&self) -> Vec<(u16, u64, u32)> {
        let mut seen = self.seen.lock().unwrap().clone();
        seen.sort_unstable();
        seen
    }

    fn answer(&self, frame: &Bytes) -> Vec<Message> {
        let plain = match Header::parse(frame).unwrap().kind {
            Kind::Sealed => Opener::new(DataKey::new(KEY), VM).open(frame).unwrap().into(),
            _ => frame.clone(),
        };
        match Message::decode(&plain) {
            Ok(Message::Hello(hello)) => {
                let told = |last, leaves| Message::BaseLeaves(v1::BaseLeaves { last, leaves, ..Default::default() });
                let leaves = [told(false, self.leaves.concat()), told(true, vec![])];
                let asked = if hello.wants_leaves { leaves.to_vec() } else { vec![] };
                [vec![Message::HelloReply(v1::HelloReply { protocol: 1 })], asked].concat()
            }
            Ok(Message::RoundEnd(end)) => vec![Message::RoundAck(RoundAck { round: end.round })],
            Ok(Message::StateEnd(end)) => vec![Message::Ready(v1::Ready { digest: end.digest })],
            Ok(Message::Pages(frame)) => {
                let run = proto::frame::decode_pages(&frame).unwrap().run;
                self.seen.lock().unwrap().push((run.space, run.first_page, run.pages));
                vec![]
            }
            _ => vec![],
        }
    }
}

#[tonic::async_trait]
impl Lanes for Ingest {
    type LaneStream = Replies;

    async fn lane(&self, request: Request<Streaming<Chunk>>) -> Result<Response<Replies>, Status> {
        let mut inbound = request.into_inner();
        let (replies, waiting) = mpsc::unbounded_channel();
        let ingest = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(item)) = inbound.message().await {
                for reply in ingest.answer(&item.frame) {
                    let _ = replies.send(Ok(chunk(reply)));
                }
            }
        });
        Ok(Response::new(tokio_stream::wrappers::UnboundedReceiverStream::new(waiting)))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_lets_the_guest_go_on_and_the_next_sends_only_what_changed() {
    let guest = Guest::new(1000);
    let checkpoint = |base: &str| SendRequest {
        checkpoint: true,
        base: base.into(),
        checkpoint_id: "op1".into(),
        ..request(TransferPolicy::default())
    };
    let first = Ingest::default();
    let lanes = channels(&serve(first.clone()).await, 1).await;
    let (result, events) = run_send(&guest, lanes, checkpoint(""), None, CancellationToken::new()).await;
    let base = result.unwrap().base;
    assert!(guest.is_running());
    assert_eq!(*guest.log.lock().unwrap(), ["freeze", "thaw"]);
    assert_eq!(rounds(&events)[0].pages, 1064);

    guest.act(0, 1);
    guest.act(17, 2);
    guest.act(400, 5);
    let second = Ingest::default();
    let address = serve(second.clone()).await;
    let lanes = channels(&address, 1).await;
    let (result, _) = run_send(&guest, lanes, checkpoint("op1"), Some(base.clone()), CancellationToken::new()).await;
    assert_eq!(second.seen(), [(0, 0, 1), (0, 17, 1), (0, 400, 1), (1, 1, 2), (1, 5, 1)]);
    // Its digest is that of the whole machine, as a full one would have computed it.
    let again = channels(&serve(Ingest::default()).await, 1).await;
    let (full, _) = run_send(&guest, again, checkpoint(""), None, CancellationToken::new()).await;
    let ram = |sent: &Sent| sent.handed_over.source.as_ref().unwrap().ram.clone();
    assert_eq!(ram(&result.unwrap()), ram(&full.unwrap()));
    // A base that is not remembered is compared with: what the target tells of it is not sent. It tells nothing of the
    // disk, which is sent therefore, and all of it sealed.
    let leaves = (0..1000).map(|page| base.digests[0].get(page)).collect();
    let third = Ingest { leaves: Arc::new(leaves), ..Ingest::default() };
    let lanes = channels(&serve(third.clone()).await, 1).await;
    let sealed = SendRequest { data_key: KEY.to_vec(), vm_id: VM.to_string(), ..checkpoint("other") };
    run_send(&guest, lanes, sealed, Some(base), CancellationToken::new()).await.0.unwrap();
    let disk: Vec<_> = third.seen().into_iter().filter(|(space, ..)| *space == 1).collect();
    assert_eq!(third.seen()[..3], [(0, 0, 1), (0, 17, 1), (0, 400, 1)]);
    assert_eq!(third.seen().len(), 3 + disk.len());
    assert!(disk.iter().any(|(_, page, _)| *page == 7), "{disk:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_of_a_busy_guest_is_one_instant_and_the_next_builds_on_it() {
    let guest = Guest::new(2000);
    let _busy = guest.keep_busy(2000);
    let full = SendRequest { checkpoint: true, checkpoint_id: "op1".into(), ..request(TransferPolicy::default()) };
    let mut base: Option<Base> = None;
    for round in 0..4 {
        let ingest = Ingest::default();
        let lanes = channels(&serve(ingest).await, 1).await;
        let named = base.as_ref().map(|base| base.checkpoint.clone()).unwrap_or_default();
        let request = SendRequest { base: named, ..full.clone() };
        let (result, events) = run_send(&guest, lanes, request, base.take(), CancellationToken::new()).await;
        let sent = result.unwrap();
        assert_eq!(sent.handed_over.stopped_us, 1);
        assert_eq!(phases(&events), ["setup", "stop", "pages", "digest"], "round {round}");
        assert!(guest.is_running());
        base = Some(sent.base);
    }
    // Nothing is left behind, and what was remembered is what there is.
    assert!(!guest.ram.keeper.is_frozen() && guest.ram.keeper.kept_bytes() == 0);
}

#[tokio::test]
async fn a_lane_that_does_not_begin_with_hello_is_refused() {
    let item = |message: Message| Ok(chunk(message));
    let mut wrong = tokio_stream::iter([item(Message::RoundAck(RoundAck { round: 1 }))]);
    assert_eq!(read_hello(&mut wrong).await.unwrap_err().code, Code::Protocol);
    let mut rubbish = tokio_stream::iter([Ok(Chunk { frame: vec![1; 100].into() })]);
    assert_eq!(read_hello(&mut rubbish).await.unwrap_err().code, Code::Corrupt);
    let mut empty = tokio_stream::iter([]);
    assert_eq!(read_hello(&mut empty).await.unwrap_err().code, Code::Protocol);
    let frame = refusal(Failure::new(Code::NotFound, "no such operation")).frame;
    assert!(matches!(Message::decode(&frame), Ok(Message::Abort(abort)) if abort.code == Code::NotFound as u32));
}

//! A guest that runs while its pages come: the agent's part of a lazy restore.
//!
//! ```text
//! faults: userfaultfd says who waits --> [book] known: place it | unknown: the urgent link asks for it
//! urgent link, bulk link  --PagesWanted-->  controller (Fleet.Pages)  --frames, answered-->  place, note
//! all known --> unregister: the VM is an ordinary one
//! ```
//! The bulk link asks ahead for all that is missing; the urgent one has a connection of its own, so that a page that is
//! waited for is not behind them. Whatever ends a link, it is made again, for ever: the guest waits and loses nothing.
//! What is here is seen in RAM itself, so a new agent needs no more than the checkpoint's name. Refuses to know buckets.

mod act;
pub mod book;
pub mod standing;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use proto::frame::{self, Encoding, PAGE_BYTES};
use proto::status::Code;
use proto::v1::fleet_client::FleetClient;
use proto::v1::pages_part::Part;
use proto::v1::{LazyInfo, PagesWanted, WorkingSet};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use vmcb_engine::memory::Mapping;
use vmcb_engine::memory::shared::Run;

use self::book::Book;
use self::standing::Standing;
use super::Host;
use super::runner::Runner;
use crate::migration::{self, Failure, MESSAGE_BYTES_MAX};
use crate::runner::faults::{Faults, Placed};
use crate::tls::Identity;

/// Requests ahead that are under way: 8 MiB.
const AHEAD: usize = 8;
/// Most pages that are remembered as touched.
const TOUCHED_MAX: usize = 16_384;
/// Pauses before a link is made again.
const RETRY: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(3);
/// How often is looked whether the guest is stalled, or may go on again.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_CLOSED: Duration = Duration::from_millis(5);

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Over {
    /// Every page is here, or zero; none will be asked for again.
    Complete,
    /// The guest's process has ended.
    Gone,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The VM.
    pub vm: String,
    /// Its generation here.
    pub generation: u64,
    /// The checkpoint.
    pub checkpoint: String,
}

/// The pages of one VM that are on their way; ends when it is dropped.
pub struct Paging {
    shared: Arc<Shared>,
    _task: JoinSet<()>,
}

struct Shared {
    host: Arc<Host>,
    wanted: Wanted,
    faults: AsyncFd<Faults>,
    mappings: Vec<Mapping>,
    book: Mutex<Book>,
    standing: Arc<Standing>,
    urgent: Notify,
    faulted: AtomicU64,
    /// Pages that the guest waited for and that were not known, in order.
    touched: Mutex<Vec<u64>>,
    trouble: Mutex<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Urgent,
    Bulk,
}

/// Why a link ended.
enum Ended {
    Over(Over),
    Broken(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Ended {
        Ended::Broken(failure)
    }
}

impl Paging {
    /// Begins, or goes on where an earlier agent was. `over` is called once.
    ///
    /// # Errors
    /// The runner gave no faults, or this host has no controller.
    pub fn begin(
        host: &Arc<Host>,
        runner: &Runner,
        wanted: Wanted,
        over: impl FnOnce(Over) + Send + 'static,
    ) -> Result<Paging, Failure> {
        let internal = |error: &dyn std::error::Error| Failure::new(Code::Internal, super::actor::chain(error));
        if host.controller.is_empty() {
            return Err(Failure::new(Code::BadInput, "this agent has no controller to ask for pages"));
        }
        let (faults, mappings) = runner.missing()?;
        let spaces = runner.spaces()?;
        let ram = spaces.first().ok_or_else(|| Failure::new(Code::Internal, "there is no RAM"))?;
        let pages = ram.pages();
        let here = ram.filled(Run { first: 0, pages }).map_err(|error| internal(&error))?;
        for mapping in &mappings {
            // Whoever waited for an earlier agent asks again.
            faults.wake(mapping).map_err(|error| internal(&error))?;
        }
        let shared = Arc::new(Shared {
            host: Arc::clone(host),
            wanted,
            faults: faults.watched().map_err(|error| internal(&error))?,
            mappings,
            book: Mutex::new(Book::new(pages, &here)),
            standing: Arc::clone(&runner.standing),
            urgent: Notify::new(),
            faulted: AtomicU64::new(0),
            touched: Mutex::default(),
            trouble: Mutex::default(),
        });
        let mut task = JoinSet::new();
        task.spawn(run(Arc::clone(&shared), over));
        Ok(Paging { shared, _task: task })
    }

    /// How far it is.
    pub fn info(&self) -> LazyInfo {
        let (pages, pages_missing) = {
            let book = self.shared.book();
            (book.pages(), book.missing())
        };
        LazyInfo {
            checkpoint: self.shared.wanted.checkpoint.clone(),
            pages,
            pages_missing,
            faults: self.shared.faulted.load(Ordering::Relaxed),
            waiting_ms: self.shared.standing.waiting_for().as_millis() as u64,
            trouble: self.shared.trouble().clone(),
        }
    }
}

async fn run(shared: Arc<Shared>, over: impl FnOnce(Over)) {
    let began = std::time::Instant::now();
    let ended = tokio::select! {
        ended = shared.serve_faults() => ended,
        ended = shared.keep(Link::Urgent) => ended,
        ended = shared.keep(Link::Bulk) => ended,
        ended = shared.look() => ended,
    };
    if ended == Over::Complete {
        shared.let_go().await;
    }
    shared.standing.over();
    let (vm, checkpoint) = (&shared.wanted.vm, &shared.wanted.checkpoint);
    let (seconds, faults) = (began.elapsed().as_secs_f64(), shared.faulted.load(Ordering::Relaxed));
    tracing::info!(vm, checkpoint, ?ended, seconds, faults, "pages of RAM have come");
    over(ended);
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trouble(&self) -> MutexGuard<'_, String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the faults, as soon as the guest may go on: what is a hole is zero.
    async fn let_go(&self) {
        let unregister = || {
            for mapping in &self.mappings {
                // Fails if the process has just ended, or gave its pages up itself; then nobody waits.
                let _over = self.faults.get_ref().unregister(mapping);
            }
        };
        while self.standing.placing(0..u64::MAX, unregister).is_none() {
            tokio::time::sleep(LOOK_CLOSED).await;
        }
    }

    async fn look(&self) -> Over {
        loop {
            tokio::time::sleep(LOOK).await;
            self.standing.look();
        }
    }

    /// Hears who waits for which page.
    async fn serve_faults(&self) -> Over {
        loop {
            let Ok(mut ready) = self.faults.readable().await else { return Over::Gone };
            match self.faults.get_ref().next() {
                Ok(Some(address)) => {
                    if let Err(over) = self.fault(address).await {
                        return over;
                    }
                }
                Ok(None) => ready.clear_ready(),
                Err(errno) => {
                    tracing::warn!(vm = self.wanted.vm, %errno, "faults cannot be read any more");
                    return Over::Gone;
                }
            }
        }
    }

    async fn fault(&self, address: u64) -> Result<(), Over> {
        let Some(page) = self.page_of(address) else { return Ok(()) };
        self.faulted.fetch_add(1, Ordering::Relaxed);
        let (known, zero) = {
            let mut book = self.book();
            book.touched(page);
            (book.is_known(page), book.is_zero(page))
        };
        if zero {
            self.standing.waits(page);
            return self.place(page, Bytes::from_static(&ZEROS)).await;
        }
        if known {
            // It was placed after the guest had looked.
            let there = Mapping { address: (address & !(PAGE_BYTES as u64 - 1)) as usize, first_page: page, pages: 1 };
            let _gone = self.faults.get_ref().wake(&there);
            return Ok(());
        }
        {
            let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
            if touched.len() < TOUCHED_MAX {
                touched.push(page);
            }
        }
        self.standing.waits(page);
        self.urgent.notify_one();
        Ok(())
    }

    fn page_of(&self, address: u64) -> Option<u64> {
        let within = |mapping: &&Mapping| {
            let start = mapping.address as u64;
            address >= start && address < start + mapping.pages * PAGE_BYTES as u64
        };
        let mapping = self.mappings.iter().find(within)?;
        Some(mapping.first_page + (address - mapping.address as u64) / PAGE_BYTES as u64)
    }

    /// Places whole pages from `first` on as soon as the guest may go on, and notes that they are here.
    async fn place(&self, first: u64, bytes: Bytes) -> Result<(), Over> {
        let run = Run { first, pages: (bytes.len() / PAGE_BYTES) as u64 };
        loop {
            match self.standing.placing(run.first..run.end(), || self.place_now(run, &bytes)) {
                Some(Ok(Placed::All)) => return Ok(()),
                Some(Ok(Placed::Unregistered)) => return Err(Over::Complete),
                Some(Ok(Placed::Gone)) => return Err(Over::Gone),
                Some(Err(errno)) => {
                    // The host is out of memory, most likely: the guest waits.
                    *self.trouble() = format!("this host cannot place pages: {errno}");
                    tokio::time::sleep(LOOK).await;
                }
                None => tokio::time::sleep(LOOK_CLOSED).await,
            }
        }
    }

    fn place_now(&self, run: Run, bytes: &[u8]) -> Result<Placed, rustix::io::Errno> {
        for mapping in &self.mappings {
            let first = run.first.max(mapping.first_page);
            let end = run.end().min(mapping.first_page + mapping.pages);
            if first < end {
                let at = |page: u64| (page - run.first) as usize * PAGE_BYTES;
                let address = mapping.address as u64 + (first - mapping.first_page) * PAGE_BYTES as u64;
                match self.faults.get_ref().place(address, &bytes[at(first)..at(end)])? {
                    Placed::All => {}
                    other => return Ok(other),
                }
            }
        }
        self.book().arrived(run);
        Ok(Placed::All)
    }

    /// Makes a link again whenever it ends.
    async fn keep(&self, link: Link) -> Over {
        let mut pause = *RETRY.start();
        loop {
            let answered = AtomicU64::new(0);
            match self.converse(link, &answered).await {
                Ended::Over(over) => return over,
                Ended::Broken(failure) => {
                    let mut trouble = self.trouble();
                    if trouble.is_empty() {
                        tracing::warn!(vm = self.wanted.vm, ?link, %failure, "no pages come: the guest waits for those it touches");
                    }
                    *trouble = failure.reason;
                }
            }
            if answered.load(Ordering::Relaxed) > 0 {
                pause = *RETRY.start();
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(*RETRY.end());
        }
    }

    async fn converse(&self, link: Link, answers: &AtomicU64) -> Ended {
        match self.talk(link, answers).await {
            Ok(over) => Ended::Over(over),
            Err(ended) => ended,
        }
    }

    async fn talk(&self, link: Link, answers: &AtomicU64) -> Result<Over, Ended> {
        let controller = Identity::controller();
        let broken = |text: String| Failure::new(Code::Unreachable, text);
        let channel = self.host.tls.connect(&self.host.controller, &controller, migration::tune_endpoint).await;
        let channel = channel.map_err(|error| broken(super::actor::chain(&error)))?;
        let mut client = FleetClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let (ask, asked) = mpsc::channel(64);
        let Wanted { vm, generation, checkpoint } = self.wanted.clone();
        let working_set = link == Link::Bulk;
        let first = PagesWanted { vm, generation, checkpoint, working_set, ..PagesWanted::default() };
        // There is room: the channel is new.
        let _ = ask.send(first).await;
        let parts = client.pages(ReceiverStream::new(asked)).await;
        let mut parts = parts.map_err(|status| broken(status.message().to_owned()))?.into_inner();
        let mut under_way: HashMap<u64, Run> = HashMap::new();
        let mut asked_for = HashSet::new();
        let (mut number, mut told, mut advised, mut advice) = (0, false, link == Link::Urgent, Vec::new());
        if link == Link::Bulk {
            self.book().forget_asked();
        }
        loop {
            // Ahead is asked for when it is known in which order.
            let room = if advised { AHEAD.saturating_sub(under_way.len()) } else { 0 };
            for run in self.next(link, room, &mut asked_for) {
                number += 1;
                under_way.insert(number, run);
                let pages = run.pages as u32;
                let wanted = PagesWanted { id: number, first_page: run.first, pages, ..PagesWanted::default() };
                ask.send(wanted).await.map_err(|_| broken("the controller closed the link".to_owned()))?;
            }
            if link == Link::Bulk && advised && under_way.is_empty() {
                let touched = (!std::mem::replace(&mut told, true)).then(|| self.working_set(&advice)).flatten();
                let Some(touched) = touched else { return Ok(Over::Complete) };
                number += 1;
                under_way.insert(number, Run { first: 0, pages: 0 });
                let wanted = PagesWanted { id: number, touched: Some(touched), ..PagesWanted::default() };
                ask.send(wanted).await.map_err(|_| broken("the controller closed the link".to_owned()))?;
            }
            let part = tokio::select! {
                part = parts.message() => part.map_err(|status| broken(status.message().to_owned()))?,
                () = self.urgent.notified(), if link == Link::Urgent => continue,
            };
            match part.and_then(|part| part.part) {
                Some(Part::Frame(frame)) => self.take(frame).await?,
                Some(Part::Answered(answer)) => {
                    let Some(run) = under_way.remove(&answer.id) else {
                        return Err(Failure::new(Code::Protocol, "an answer to nothing").into());
                    };
                    let zero = Run { first: answer.zero_first_page, pages: answer.zero_pages };
                    self.answered(run, zero).await.map_err(Ended::Over)?;
                    answers.fetch_add(1, Ordering::Relaxed);
                    self.trouble().clear();
                }
                Some(Part::WorkingSet(set)) => {
                    self.book().advise(&set.pages);
                    (advised, advice) = (true, set.pages);
                }
                None => return Err(broken("the controller closed the link".to_owned()).into()),
            }
        }
    }

    /// What the guest waited for, then what was asked for early because it had waited for it before; none if it is as it was.
    fn working_set(&self, advice: &[u64]) -> Option<WorkingSet> {
        let touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen = HashSet::new();
        let pages = touched.iter().chain(advice).copied().filter(|page| seen.insert(*page)).take(TOUCHED_MAX);
        (!touched.is_empty()).then(|| WorkingSet { pages: pages.collect() })
    }

    /// What is to be asked for now.
    fn next(&self, link: Link, room: usize, asked_for: &mut HashSet<u64>) -> Vec<Run> {
        match link {
            Link::Urgent => {
                let waiting = self.standing.waiting();
                asked_for.retain(|page| waiting.contains(page));
                let new: Vec<u64> = waiting.into_iter().filter(|page| asked_for.insert(*page)).collect();
                new.into_iter().map(|first| Run { first, pages: 1 }).collect()
            }
            Link::Bulk => {
                let mut book = self.book();
                std::iter::from_fn(|| book.ahead()).take(room).collect()
            }
        }
    }

    /// Checks a frame and places its pages.
    async fn take(&self, frame: Bytes) -> Result<(), Ended> {
        let corrupt = |text: String| Failure::new(Code::Corrupt, text);
        let (run, payload) = tokio::task::spawn_blocking(move || {
            let held = frame::decode_pages(&frame).map_err(|error| error.to_string())?;
            let payload = frame.slice_ref(held.payload);
            Ok::<_, String>((held.run, payload))
        })
        .await
        .map_err(|_| Failure::new(Code::Internal, "the worker ended"))?
        .map_err(corrupt)?;
        let within = run.first_page.checked_add(run.pages.into()).is_some_and(|end| end <= self.book().pages());
        if run.space != 0 || run.encoding != Encoding::Raw || !within {
            return Err(Failure::new(Code::Protocol, format!("pages that this guest does not have: {run:?}")).into());
        }
        self.place(run.first_page, payload).await.map_err(Ended::Over)
    }

    /// What did not come until now is zero; whoever waits for one of these goes on.
    async fn answered(&self, run: Run, zero: Run) -> Result<(), Over> {
        {
            let mut book = self.book();
            book.answered(run);
            book.answered(zero);
        }
        for page in self.standing.waiting() {
            let is_zero = self.book().is_zero(page);
            if is_zero {
                self.place(page, Bytes::from_static(&ZEROS)).await?;
            }
        }
        Ok(())
    }
}

static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

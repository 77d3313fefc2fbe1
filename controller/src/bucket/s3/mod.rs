//! A bucket of an S3 server: verbs over tries.
//!
//! ```text
//!   verb (here, multipart, exclusive)   what is asked of the server, and what its answer must be
//!     tried                             one request again and again, with pauses, until an answer is final
//!       one try                         client of the SDK under a deadline that grows with the bytes
//!         fault                         what an error means
//! ```
//! The SDK's own retries are off: a try here is also the reading of a body, which the SDK does not repeat, and every retry is
//! counted. Credentials live in the client alone; when the server denies, the client is made anew, so that a file that was
//! replaced meanwhile is read again. What was uploaded is proven by `Content-MD5` before and by the ETag after.

mod connect;
mod exclusive;
mod fault;
mod multipart;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use md5::{Digest, Md5};
use tokio::sync::{Mutex, OnceCell};

use self::exclusive::Exclusive;
use self::fault::{Fault, Kind};
use super::room::{PACK_LEAST, Room};
use super::settings::S3Location;
use super::{BucketError, OBJECT_BYTES_MAX, Object, PutNew, pause};
use crate::ledger::saved::to_hex;
use crate::metrics as names;

/// Objects up to here go in one request, bytes.
const SINGLE_BYTES_MAX: usize = 16 << 20;
/// The slowest way to the server that still works, bytes a second: a deadline grows by this.
const SLOWEST_BYTES_PER_S: f64 = 512.0 * 1024.0;
/// Tries of [`S3Bucket::check`]: whoever waits for it waits for a controller to start.
const CHECK_ATTEMPTS: u32 = 3;
/// Keys that a list may have: more would mean a server that repeats itself.
const KEYS_MAX: usize = 50_000_000;

/// The bucket; clones are the same.
#[derive(Clone)]
pub struct S3Bucket {
    inner: Arc<Inner>,
    attempts: u32,
}

struct Inner {
    location: S3Location,
    client: Mutex<Option<Client>>,
    exclusive: OnceCell<Exclusive>,
    /// The server's ETags were seen to be no MD5, and the objects to be right.
    other_etags: AtomicBool,
}

impl fmt::Debug for S3Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S3Bucket({})", self.inner.location)
    }
}

/// What is asked of the server: for deadlines, errors and metrics.
#[derive(Clone, Copy)]
struct Asked<'a> {
    verb: &'static str,
    key: &'a str,
    /// Bytes that travel.
    bytes: usize,
}

impl<'a> Asked<'a> {
    fn small(verb: &'static str, key: &'a str) -> Asked<'a> {
        Asked { verb, key, bytes: 0 }
    }
}

impl S3Bucket {
    pub(super) fn new(location: S3Location) -> S3Bucket {
        let attempts = location.attempts;
        let inner = Inner {
            location,
            client: Mutex::default(),
            exclusive: OnceCell::new(),
            other_etags: AtomicBool::new(false),
        };
        S3Bucket { inner: Arc::new(inner), attempts }
    }

    fn location(&self) -> &S3Location {
        &self.inner.location
    }

    fn bucket(&self) -> &str {
        &self.inner.location.bucket
    }

    /// A key as the server has it.
    fn path(&self, key: &str) -> String {
        format!("{}{key}", self.inner.location.prefix)
    }

    async fn client(&self) -> Result<Client, BucketError> {
        let mut client = self.inner.client.lock().await;
        match &*client {
            Some(client) => Ok(client.clone()),
            None => Ok(client.insert(connect::client(self.location()).await?).clone()),
        }
    }

    /// Tries until the answer is final.
    async fn tried<T, W>(&self, asked: Asked<'_>, work: impl Fn(Client) -> W) -> Result<T, BucketError>
    where
        W: Future<Output = Result<T, Fault>>,
    {
        self.tried_or_fault(asked, work).await.map_err(|(fault, tries)| self.error(asked, fault, tries))
    }

    /// The same, for who can make something of certain faults; with the number of tries.
    async fn tried_or_fault<T, W>(&self, asked: Asked<'_>, work: impl Fn(Client) -> W) -> Result<T, (Fault, u32)>
    where
        W: Future<Output = Result<T, Fault>>,
    {
        let deadline = self.location().timeout + Duration::from_secs_f64(asked.bytes as f64 / SLOWEST_BYTES_PER_S);
        let mut tries = 0;
        loop {
            tries += 1;
            let client = self.client().await.map_err(|error| (Fault::from(error), tries))?;
            // On the heap: the futures of the SDK are large, and a thread's stack is not.
            let fault = match tokio::time::timeout(deadline, Box::pin(work(client))).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(fault)) => fault,
                Err(_) => Fault::new(Kind::Unanswered, format!("no whole answer within {deadline:?}")),
            };
            if matches!(fault.kind, Kind::Denied) {
                *self.inner.client.lock().await = None;
                if tries == 1 && self.attempts > 1 {
                    // Once more with whatever the file or the environment has by now.
                    continue;
                }
            }
            if !fault.kind.passes() || tries >= self.attempts {
                return Err((fault, tries));
            }
            metrics::counter!(names::BUCKET_RETRIES, "verb" => asked.verb).increment(1);
            let pause = pause(tries);
            tracing::debug!(bucket = %self.location(), asked.verb, asked.key, fault = fault.text, tries, ?pause, "trying again");
            tokio::time::sleep(pause).await;
        }
    }

    /// A final fault in the words of the room.
    fn error(&self, asked: Asked<'_>, fault: Fault, tries: u32) -> BucketError {
        let bucket = self.location().to_string();
        let verb = format!("{} {}", asked.verb, asked.key).trim_end().to_owned();
        let why = fault.text;
        match fault.kind {
            Kind::Known(error) => *error,
            Kind::Missing => BucketError::Missing(asked.key.into()),
            Kind::NoBucket => BucketError::NoBucket { bucket },
            Kind::Denied => BucketError::Denied {
                bucket,
                verb,
                why: format!("{why}; asked with {}", connect::tried(self.location())),
            },
            Kind::Full => BucketError::Full { bucket, key: asked.key.into(), bytes: asked.bytes, why },
            Kind::Broken => BucketError::Broken { bucket, verb, why, tries },
            Kind::Busy | Kind::Unanswered | Kind::Contended => BucketError::Unreachable { bucket, verb, why, tries },
            Kind::Damaged => BucketError::Mismatch { bucket, verb, why },
            Kind::Exists | Kind::Range | Kind::NoUpload | Kind::Unsupported | Kind::Other => {
                BucketError::Refused { bucket, verb, why }
            }
        }
    }

    /// The same with fewer tries.
    fn with_attempts(&self, attempts: u32) -> S3Bucket {
        S3Bucket { inner: self.inner.clone(), attempts: self.attempts.min(attempts) }
    }

    /// Reads a little.
    async fn look(&self) -> Result<(), BucketError> {
        self.tried(Asked::small("list", ""), |client| async move {
            let page = client.list_objects_v2().bucket(self.bucket()).prefix(self.path("")).max_keys(1);
            page.send().await.map(drop).map_err(Fault::from)
        })
        .await
    }

    /// A server that fails at a write and not at reading has no room more often than anything else, and many do not say so.
    async fn explained<T>(&self, write: Result<T, BucketError>) -> Result<T, BucketError> {
        match write {
            Err(BucketError::Broken { bucket, verb, why, tries }) => match self.with_attempts(1).look().await {
                Ok(()) => Err(BucketError::Unwritable { bucket, verb, why, tries }),
                Err(_) => Err(BucketError::Broken { bucket, verb, why, tries }),
            },
            other => other,
        }
    }

    pub(super) async fn check(&self) -> Result<(), BucketError> {
        let quick = self.with_attempts(CHECK_ATTEMPTS);
        quick.look().await?;
        let exclusive = quick.exclusive().await?;
        tracing::info!(bucket = %quick.location(), put_new = exclusive.words(), "bucket");
        quick.sweep_uploads().await;
        Ok(())
    }

    pub(super) async fn put(&self, key: &str, bytes: Bytes) -> Result<(), BucketError> {
        let done = if bytes.len() > SINGLE_BYTES_MAX {
            self.put_parts(key, bytes).await
        } else {
            self.put_single(key, &bytes).await
        };
        self.explained(done).await
    }

    async fn put_single(&self, key: &str, bytes: &Bytes) -> Result<(), BucketError> {
        let md5 = Md5::digest(bytes);
        let (encoded, hex) = (&base64(&md5), &to_hex(&md5));
        self.tried(Asked { verb: "put", key, bytes: bytes.len() }, |client| async move {
            let put = client.put_object().bucket(self.bucket()).key(self.path(key)).content_md5(encoded);
            let done = put.body(ByteStream::from(bytes.clone())).send().await?;
            self.prove(&client, key, bytes, done.e_tag(), hex).await
        })
        .await
    }

    /// Holds what the server says of an object against what was sent.
    ///
    /// An ETag is the MD5 on most servers, and on none of them is it said for sure. Where it is something else, one object is
    /// read back whole; after that such ETags are known, and the length is compared.
    async fn prove(
        &self,
        client: &Client,
        key: &str,
        bytes: &Bytes,
        etag: Option<&str>,
        md5: &str,
    ) -> Result<(), Fault> {
        let etag = etag.unwrap_or_default().trim_matches('"');
        if etag.eq_ignore_ascii_case(md5) {
            return Ok(());
        }
        let differs = |what: String| Err(Fault::new(Kind::Damaged, what));
        let head = client.head_object().bucket(self.bucket()).key(self.path(key)).send().await?;
        let length = head.content_length().unwrap_or(-1);
        if length != bytes.len() as i64 {
            return differs(format!("{length} bytes are there where {} were sent", bytes.len()));
        }
        if self.inner.other_etags.load(Ordering::Relaxed) {
            return Ok(());
        }
        if self.read(client, key, None).await? != *bytes {
            return differs(format!("what is there is not what was sent (ETag {etag}, MD5 {md5})"));
        }
        self.inner.other_etags.store(true, Ordering::Relaxed);
        tracing::info!(bucket = %self.location(), "ETags of this server are no MD5; lengths are compared instead");
        Ok(())
    }

    pub(super) async fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutNew, BucketError> {
        let done = self.put_exclusive(key, bytes).await;
        self.explained(done).await
    }

    pub(super) async fn get(&self, key: &str, part: Option<(u64, usize)>) -> Result<Bytes, BucketError> {
        let bytes = part.map_or(SINGLE_BYTES_MAX, |(_, bytes)| bytes);
        let verb = if part.is_some() { "get_range" } else { "get" };
        self.tried(Asked { verb, key, bytes }, |client| async move { self.read(&client, key, part).await }).await
    }

    /// What has nothing to send has its answer soon, or has to be asked again; the body may take its time.
    async fn soon<T, E>(&self, asked: impl Future<Output = Result<T, E>>) -> Result<T, Fault>
    where
        Fault: From<E>,
    {
        match tokio::time::timeout(self.location().timeout, asked).await {
            Ok(answer) => answer.map_err(Fault::from),
            Err(_) => Err(Fault::new(Kind::Unanswered, format!("no answer within {:?}", self.location().timeout))),
        }
    }

    async fn read(&self, client: &Client, key: &str, part: Option<(u64, usize)>) -> Result<Bytes, Fault> {
        let Some((offset, bytes)) = part else {
            let get = client.get_object().bucket(self.bucket()).key(self.path(key));
            return whole(key, self.soon(get.send()).await?).await;
        };
        let expected = offset.saturating_add(bytes as u64);
        let short = |found: u64| Fault::from(BucketError::Short { key: key.into(), found, expected });
        if bytes > 0 {
            let range = format!("bytes={offset}-{}", expected - 1);
            let get = client.get_object().bucket(self.bucket()).key(self.path(key)).range(range);
            match self.soon(get.send()).await {
                Ok(answer) => {
                    let total = answer.content_range().and_then(|range| range.rsplit_once('/')?.1.parse::<u64>().ok());
                    let body = whole(key, answer).await?;
                    return match total {
                        Some(total) if total < expected => Err(short(total)),
                        Some(_) if body.len() == bytes => Ok(body),
                        // A server that knows no ranges has sent everything.
                        None if body.len() as u64 >= expected => {
                            Ok(body.slice(offset as usize..offset as usize + bytes))
                        }
                        None => Err(short(body.len() as u64)),
                        Some(_) => Err(Fault::new(Kind::Broken, format!("{} bytes came of {bytes}", body.len()))),
                    };
                }
                Err(fault) if matches!(fault.kind, Kind::Range) => {}
                Err(fault) => return Err(fault),
            }
        }
        // Nothing is asked for, or more than there is: only the length is left to be known.
        let head = client.head_object().bucket(self.bucket()).key(self.path(key)).send().await?;
        match u64::try_from(head.content_length().unwrap_or(0)).unwrap_or(0) {
            found if found < expected => Err(short(found)),
            _ if bytes == 0 => Ok(Bytes::new()),
            found => Err(Fault::new(Kind::Other, format!("a part of an object of {found} bytes is refused"))),
        }
    }

    pub(super) async fn list_objects(&self, prefix: &str) -> Result<Vec<Object>, BucketError> {
        let mut objects = Vec::new();
        self.pages(prefix, None, |page| {
            objects.extend(page.contents().iter().filter_map(|object| {
                let key = object.key()?.strip_prefix(&self.location().prefix)?;
                // What is no key of ours was put there by somebody else, such as a console that makes "folders".
                super::check_key(key).ok()?;
                Some(Object {
                    key: key.to_owned(),
                    bytes: object.size().and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0),
                    modified_unix_ms: object
                        .last_modified()
                        .and_then(|at| u64::try_from(at.to_millis().ok()?).ok())
                        .unwrap_or(0),
                })
            }));
            objects.len()
        })
        .await?;
        objects.sort_by(|a, b| a.key.cmp(&b.key));
        objects.dedup_by(|a, b| a.key == b.key);
        Ok(objects)
    }

    pub(super) async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>, BucketError> {
        let (mut found, whole) = (Vec::new(), self.path(prefix));
        self.pages(prefix, Some("/"), |page| {
            let names = page.common_prefixes().iter().filter_map(|common| common.prefix());
            found.extend(names.filter_map(|name| {
                let name = name.strip_prefix(&whole)?.strip_suffix('/')?;
                super::check_key(name).ok().map(|()| name.to_owned())
            }));
            found.len()
        })
        .await?;
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// All pages of a list. `take` says how much there is by now.
    async fn pages(
        &self,
        prefix: &str,
        delimiter: Option<&str>,
        mut take: impl FnMut(&aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output) -> usize,
    ) -> Result<(), BucketError> {
        let asked = Asked::small("list", prefix);
        let mut next: Option<String> = None;
        loop {
            let token = next.take();
            let page = self
                .tried(asked, |client| {
                    let list = client.list_objects_v2().bucket(self.bucket()).prefix(self.path(prefix));
                    let list = list.set_delimiter(delimiter.map(str::to_owned)).set_continuation_token(token.clone());
                    async move { list.send().await.map_err(Fault::from) }
                })
                .await?;
            let count = take(&page);
            if !page.is_truncated().unwrap_or(false) {
                return Ok(());
            }
            next = page.next_continuation_token().map(str::to_owned);
            if next.is_none() || next == token || count > KEYS_MAX {
                let fault = Fault::new(Kind::Other, "the list does not end: no page after this one is named");
                return Err(self.error(asked, fault, 1));
            }
        }
    }

    pub(super) async fn delete(&self, key: &str) -> Result<(), BucketError> {
        let delete = |client: Client| async move {
            let delete = client.delete_object().bucket(self.bucket()).key(self.path(key));
            delete.send().await.map(drop).map_err(Fault::from)
        };
        match self.tried(Asked::small("delete", key), delete).await {
            Err(BucketError::Missing(_)) => Ok(()),
            done => done,
        }
    }
}

/// The body of an answer, as long as its head says.
async fn whole(key: &str, answer: aws_sdk_s3::operation::get_object::GetObjectOutput) -> Result<Bytes, Fault> {
    let said = answer.content_length().and_then(|length| u64::try_from(length).ok());
    if let Some(bytes) = said.filter(|bytes| *bytes > OBJECT_BYTES_MAX) {
        return Err(BucketError::Large { key: key.into(), bytes }.into());
    }
    let mut body = answer.body;
    let mut bytes = Gathered::for_bytes(said.unwrap_or(0));
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| Fault::new(Kind::Unanswered, fault::chain("the body broke off", &error)))?;
        let length = bytes.push(&piece);
        if length > OBJECT_BYTES_MAX {
            return Err(BucketError::Large { key: key.into(), bytes: length }.into());
        }
    }
    let bytes = bytes.done();
    match said {
        Some(said) if said != bytes.len() as u64 => {
            Err(Fault::new(Kind::Unanswered, format!("the body broke off at {} of {said} bytes", bytes.len())))
        }
        _ => Ok(bytes),
    }
}

/// A body that comes in pieces.
enum Gathered {
    /// A pack: in the memory that is set aside for them.
    Pack(Room),
    /// What is smaller.
    Small(Vec<u8>),
}

impl Gathered {
    fn for_bytes(bytes: u64) -> Gathered {
        match bytes {
            PACK_LEAST.. => Gathered::Pack(Room::take()),
            _ => Gathered::Small(Vec::with_capacity(bytes as usize)),
        }
    }

    /// How much there is then.
    fn push(&mut self, piece: &[u8]) -> u64 {
        match self {
            Gathered::Pack(room) => {
                room.push(piece);
                room.bytes().len() as u64
            }
            Gathered::Small(bytes) => {
                bytes.extend_from_slice(piece);
                bytes.len() as u64
            }
        }
    }

    fn done(self) -> Bytes {
        match self {
            Gathered::Pack(room) => Bytes::from_owner(room),
            Gathered::Small(bytes) => bytes.into(),
        }
    }
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

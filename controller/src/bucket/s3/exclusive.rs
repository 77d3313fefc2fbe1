//! Writing an object only if there is none: exactly one writer is told that it was the one.
//!
//! **By condition**, where the server honours `If-None-Match: *` on a write. That is found out once: a probe object is written
//! twice, and several more are raced for. Each write carries a mark of its own as metadata, so that a writer whose first
//! answer was lost and whose second try is refused still learns that the object is its own.
//!
//! **By claims**, where it does not. A write has no condition then, so writers must be alone:
//! ```text
//!   1  write   claims/<key>/<mark>           a new name each time, so no claim ever replaces another
//!   2  list    claims/<key>/                 another claim is there: remove ours, pause, again from 1
//!   3  look for <key>                        there: remove our claim; Exists
//!   4  write   <key>                         if 1 to 4 took less than a minute, else give up
//!   5  remove  our claim                     only when 4 is known to be done; Created
//! ```
//! Two writers cannot both reach 4: of their claims one was written second, and its writer's list comes after both. It sees
//! the other's claim, unless that one was removed: then the object was there before, and 3 finds it (or nobody wrote). This
//! needs what S3 promises, that a list and a read see every write that was answered before they began. A writer that
//! dies between 1 and 5, or that does not learn how 4 went, leaves its claim and so holds up the others: they fail, and nobody
//! is told Created. A claim of an hour is removed by whoever meets it: its writer has given up after a minute, and what it
//! signed is refused by servers after fifteen.

use std::time::{Duration, Instant};

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use md5::{Digest, Md5};
use tokio::task::JoinSet;

use super::fault::{Fault, Kind};
use super::{Asked, S3Bucket, base64};
use crate::bucket::{BucketError, PutNew, pause};
use crate::ledger::saved::to_hex;

/// Metadata that says whose write an object is.
const MARK: &str = "godwit-writer";
/// Writers of the race that shows whether the server's condition is one.
const RACERS: usize = 6;
/// From its claim to its write, a writer has this long.
const CLAIM_MAX: Duration = Duration::from_secs(60);
/// Age at which a claim is nobody's.
const CLAIM_STALE: Duration = Duration::from_secs(3600);
/// How often a writer makes way for others that do the same.
const ROUNDS_MAX: u32 = 12;

/// How it is done on this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exclusive {
    /// The server honours the condition.
    Condition,
    /// It does not.
    Claims,
}

impl Exclusive {
    pub(super) fn words(self) -> &'static str {
        match self {
            Exclusive::Condition => "If-None-Match",
            Exclusive::Claims => "claims",
        }
    }
}

/// What became of one write with a condition.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    Done,
    Refused,
    Unsupported,
}

impl S3Bucket {
    pub(super) async fn put_exclusive(&self, key: &str, bytes: Bytes) -> Result<PutNew, BucketError> {
        match self.exclusive().await? {
            Exclusive::Condition => match self.put_if_absent(key, bytes).await? {
                Written::Done => Ok(PutNew::Created),
                Written::Refused => Ok(PutNew::Exists),
                Written::Unsupported => {
                    let fault = Fault::new(Kind::Unsupported, "a condition that it honoured before is not supported");
                    Err(self.error(Asked::small("put_new", key), fault, 1))
                }
            },
            Exclusive::Claims => self.put_by_claim(key, bytes).await,
        }
    }

    /// How it is done here; found out the first time.
    pub(super) async fn exclusive(&self) -> Result<Exclusive, BucketError> {
        self.inner.exclusive.get_or_try_init(|| self.find_out()).await.copied()
    }

    async fn find_out(&self) -> Result<Exclusive, BucketError> {
        let probe = format!("probes/{}", mark());
        let found = match self.location().if_none_match {
            Some(true) => Exclusive::Condition,
            Some(false) => Exclusive::Claims,
            None => {
                let found = self.probe(&probe).await;
                // The probe shows as well that what is needed is allowed, removing included.
                self.delete(&probe).await?;
                return found;
            }
        };
        self.put(&probe, Bytes::from_static(b"probe")).await?;
        self.delete(&probe).await?;
        Ok(found)
    }

    async fn probe(&self, probe: &str) -> Result<Exclusive, BucketError> {
        let once = || self.put_if_absent(probe, mark().into());
        if once().await? == Written::Unsupported {
            self.put(probe, Bytes::from_static(b"probe")).await?;
            return Ok(Exclusive::Claims);
        }
        if once().await? != Written::Refused {
            return Ok(Exclusive::Claims);
        }
        // It looks before it writes. If that is not one step, some race shows it.
        let raced = format!("{probe}-race");
        let mut racers = JoinSet::new();
        for _ in 0..RACERS {
            let (bucket, key) = (self.clone(), raced.clone());
            racers.spawn(async move { bucket.put_if_absent(&key, mark().into()).await });
        }
        let ended = racers.join_all().await;
        self.delete(&raced).await?;
        let done =
            ended.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().filter(|w| *w == Written::Done).count();
        if done != 1 {
            tracing::warn!(bucket = %self.location(), done, "several writers were told to be the first; using claims");
        }
        Ok(if done == 1 { Exclusive::Condition } else { Exclusive::Claims })
    }

    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<Written, BucketError> {
        let (mark, md5) = (mark(), Md5::digest(&bytes));
        let asked = Asked { verb: "put_new", key, bytes: bytes.len() };
        let put = |client: Client| {
            let put = client.put_object().bucket(self.bucket()).key(self.path(key)).if_none_match("*");
            let put = put.metadata(MARK, &mark).content_md5(base64(&md5)).body(ByteStream::from(bytes.clone()));
            async move { put.send().await.map(drop).map_err(Fault::from) }
        };
        match self.tried_or_fault(asked, put).await {
            Ok(()) => Ok(Written::Done),
            Err((Fault { kind: Kind::Unsupported, .. }, _)) => Ok(Written::Unsupported),
            Err((Fault { kind: Kind::Exists, .. }, 1)) => Ok(Written::Refused),
            // An earlier try may have been the one.
            Err((Fault { kind: Kind::Exists, .. }, _)) => match self.mark_of(key).await? {
                Some(found) if found == mark => Ok(Written::Done),
                _ => Ok(Written::Refused),
            },
            Err((fault, tries)) => Err(self.error(asked, fault, tries)),
        }
    }

    /// Whose write an object is: `None` if there is no object, empty if it does not say.
    async fn mark_of(&self, key: &str) -> Result<Option<String>, BucketError> {
        let head = |client: Client| async move {
            let head = client.head_object().bucket(self.bucket()).key(self.path(key)).send().await?;
            Ok(head.metadata().and_then(|metadata| metadata.get(MARK)).cloned().unwrap_or_default())
        };
        match self.tried(Asked::small("head", key), head).await {
            Ok(mark) => Ok(Some(mark)),
            Err(BucketError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn put_by_claim(&self, key: &str, bytes: Bytes) -> Result<PutNew, BucketError> {
        for round in 1..=ROUNDS_MAX {
            if self.mark_of(key).await?.is_some() {
                return Ok(PutNew::Exists);
            }
            let (mark, start) = (mark(), Instant::now());
            let claim = format!("claims/{key}/{mark}");
            self.put(&claim, Bytes::from_static(b"claim")).await?;
            if !self.is_alone(key, &claim).await? {
                self.delete(&claim).await?;
                tokio::time::sleep(pause(round)).await;
                continue;
            }
            if self.mark_of(key).await?.is_some() {
                self.delete(&claim).await?;
                return Ok(PutNew::Exists);
            }
            return self.write_claimed(key, bytes, &claim, &mark, start).await;
        }
        let fault =
            Fault::new(Kind::Contended, "other writers hold claims on it, or one left its claim less than an hour ago");
        Err(self.error(Asked::small("put_new", key), fault, ROUNDS_MAX))
    }

    /// Whether no other writer has a claim; claims that are nobody's are removed.
    async fn is_alone(&self, key: &str, ours: &str) -> Result<bool, BucketError> {
        let claims = self.list_objects(&format!("claims/{key}/")).await?;
        // Ages are compared by the server's own clock: that of our claim.
        let Some(now) = claims.iter().find(|claim| claim.key == ours).map(|claim| claim.modified_unix_ms) else {
            // A list that lacks what was written before it is no ground for anything.
            return Ok(false);
        };
        let mut alone = true;
        for other in claims.iter().filter(|claim| claim.key != ours) {
            alone = false;
            if now.saturating_sub(other.modified_unix_ms) > CLAIM_STALE.as_millis() as u64 {
                self.delete(&other.key).await?;
            }
        }
        Ok(alone)
    }

    async fn write_claimed(
        &self,
        key: &str,
        bytes: Bytes,
        claim: &str,
        mark: &str,
        start: Instant,
    ) -> Result<PutNew, BucketError> {
        let asked = Asked { verb: "put_new", key, bytes: bytes.len() };
        let md5 = Md5::digest(&bytes);
        let put = |client: Client| {
            let put = client.put_object().bucket(self.bucket()).key(self.path(key)).metadata(MARK, mark);
            let put = put.content_md5(base64(&md5)).body(ByteStream::from(bytes.clone()));
            async move {
                if start.elapsed() > CLAIM_MAX {
                    return Err(Fault::new(Kind::Other, "it took too long since the claim was laid"));
                }
                put.send().await.map(drop).map_err(Fault::from)
            }
        };
        // On an error the claim stays: what was sent may still arrive.
        self.tried(asked, put).await?;
        self.delete(claim).await?;
        Ok(PutNew::Created)
    }
}

fn mark() -> String {
    to_hex(&crate::entropy::bytes::<16>())
}

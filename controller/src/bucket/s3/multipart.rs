//! Large objects, in parts: several at a time, each with its own tries; seen when the last step is done, or not at all.
//!
//! ```text
//!   create -> part 1..n (four at a time) -> complete -> compare
//!        \------------ any failure, or nobody waits any more ------> abort
//! ```
//! A controller that dies in between leaves parts that nobody sees and somebody pays: the next start aborts those that are
//! older than a day.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use md5::{Digest, Md5};
use tokio::task::{JoinError, JoinSet};

use super::fault::{Fault, Kind};
use super::{Asked, S3Bucket, base64};
use crate::bucket::BucketError;
use crate::ledger::saved::to_hex;

/// Length of a part but the last, bytes; servers want 5 MiB or more.
const PART_BYTES: usize = 8 << 20;
/// Parts under way at once.
const PARTS_AT_ONCE: usize = 4;
/// Age from which an upload is nobody's any more.
const ABANDONED_AGE: Duration = Duration::from_secs(24 * 3600);

/// An upload that is under way; dropped, it is aborted.
struct Upload {
    bucket: S3Bucket,
    key: String,
    id: String,
    open: bool,
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        let (bucket, key, id) = (self.bucket.clone(), std::mem::take(&mut self.key), std::mem::take(&mut self.id));
        // Without a runtime the process is ending; the next start removes it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { bucket.abort(&key, &id).await });
        }
    }
}

/// A part as it was sent.
struct Part {
    number: i32,
    etag: String,
    md5: [u8; 16],
}

impl S3Bucket {
    pub(super) async fn put_parts(&self, key: &str, bytes: Bytes) -> Result<(), BucketError> {
        let asked = Asked { verb: "put", key, bytes: bytes.len() };
        let create = |client: Client| async move {
            let create = client.create_multipart_upload().bucket(self.bucket()).key(self.path(key)).send().await?;
            let id = create.upload_id().filter(|id| !id.is_empty()).map(str::to_owned);
            id.ok_or_else(|| Fault::new(Kind::Other, "an upload without an id"))
        };
        let id = self.tried(Asked { bytes: 0, ..asked }, create).await?;
        let mut upload = Upload { bucket: self.clone(), key: key.into(), id: id.clone(), open: true };
        let done = match self.send_parts(key, &id, &bytes).await {
            Ok(parts) => self.complete(asked, &id, &bytes, &parts).await,
            Err(error) => Err(error),
        };
        upload.open = false;
        if done.is_err() {
            self.abort(key, &id).await;
        }
        done
    }

    /// Sends all parts; in order of number.
    async fn send_parts(&self, key: &str, id: &str, bytes: &Bytes) -> Result<Vec<Part>, BucketError> {
        let (key, id): (Arc<str>, Arc<str>) = (key.into(), id.into());
        let stopped = || std::io::Error::other("the upload was stopped");
        let bucket = self.location().to_string();
        let ended = |part: Option<Result<Result<Part, BucketError>, JoinError>>| {
            let stopped = || Err(BucketError::Io { bucket: bucket.clone(), key: key.to_string(), source: stopped() });
            part.and_then(Result::ok).unwrap_or_else(stopped)
        };
        let mut under_way = JoinSet::new();
        let mut parts = Vec::new();
        // Dropping the set at an error stops the others.
        for (number, offset) in (1..).zip((0..bytes.len()).step_by(PART_BYTES)) {
            if under_way.len() >= PARTS_AT_ONCE {
                parts.push(ended(under_way.join_next().await)?);
            }
            let part = bytes.slice(offset..bytes.len().min(offset + PART_BYTES));
            let (bucket, key, id) = (self.clone(), key.clone(), id.clone());
            under_way.spawn(async move { bucket.send_part(&key, &id, number, part).await });
        }
        while !under_way.is_empty() {
            parts.push(ended(under_way.join_next().await)?);
        }
        parts.sort_by_key(|part| part.number);
        Ok(parts)
    }

    async fn send_part(&self, key: &str, id: &str, number: i32, bytes: Bytes) -> Result<Part, BucketError> {
        let md5 = Md5::digest(&bytes);
        let etag = self
            .tried(Asked { verb: "put", key, bytes: bytes.len() }, |client| {
                let part = client.upload_part().bucket(self.bucket()).key(self.path(key)).upload_id(id);
                let part = part.part_number(number).content_md5(base64(&md5)).body(ByteStream::from(bytes.clone()));
                async move {
                    let etag = part.send().await?.e_tag().map(str::to_owned);
                    etag.ok_or_else(|| Fault::new(Kind::Other, "a part without an ETag"))
                }
            })
            .await?;
        Ok(Part { number, etag, md5: md5.into() })
    }

    async fn complete(&self, asked: Asked<'_>, id: &str, bytes: &Bytes, parts: &[Part]) -> Result<(), BucketError> {
        let mut all = Md5::new();
        parts.iter().for_each(|part| all.update(part.md5));
        let md5 = format!("{}-{}", to_hex(&all.finalize()), parts.len());
        let list = parts.iter().map(|part| CompletedPart::builder().part_number(part.number).e_tag(&part.etag).build());
        let list = CompletedMultipartUpload::builder().set_parts(Some(list.collect())).build();
        let completed = self
            .tried_or_fault(asked, |client| {
                let complete = client.complete_multipart_upload().bucket(self.bucket()).key(self.path(asked.key));
                let complete = complete.upload_id(id).multipart_upload(list.clone());
                async move { Ok(complete.send().await?.e_tag().map(str::to_owned)) }
            })
            .await;
        let etag = match completed {
            Ok(etag) => etag,
            // An earlier try was done and its answer lost: what is there now tells.
            Err((fault, tries)) if matches!(fault.kind, Kind::NoUpload) && tries > 1 => None,
            Err((fault, tries)) => return Err(self.error(asked, fault, tries)),
        };
        let (etag, md5) = (etag.as_deref(), md5.as_str());
        self.tried(asked, |client| async move {
            let etag = match etag {
                Some(etag) => Some(etag.to_owned()),
                None => {
                    let head = client.head_object().bucket(self.bucket()).key(self.path(asked.key)).send().await?;
                    head.e_tag().map(str::to_owned)
                }
            };
            self.prove(&client, asked.key, bytes, etag.as_deref(), md5).await
        })
        .await
    }

    /// Gives an upload up. That it cannot be is worth a line, no more: nobody sees its parts.
    async fn abort(&self, key: &str, id: &str) {
        let abort = |client: Client| async move {
            let abort = client.abort_multipart_upload().bucket(self.bucket()).key(self.path(key)).upload_id(id);
            abort.send().await.map(drop).map_err(Fault::from)
        };
        match self.tried_or_fault(Asked::small("abort", key), abort).await {
            Err((Fault { kind: Kind::NoUpload | Kind::Missing, .. }, _)) | Ok(()) => {}
            Err((fault, _)) => {
                tracing::warn!(bucket = %self.location(), key, why = fault.text, "an upload stays unfinished")
            }
        }
    }

    /// Aborts uploads under our prefix that nobody can be at any more.
    pub(super) async fn sweep_uploads(&self) {
        let list = |client: Client| async move {
            let list = client.list_multipart_uploads().bucket(self.bucket()).prefix(self.path(""));
            list.send().await.map_err(Fault::from)
        };
        let uploads = match self.tried_or_fault(Asked::small("list uploads", ""), list).await {
            Ok(uploads) => uploads,
            Err((fault, _)) => {
                tracing::debug!(bucket = %self.location(), why = fault.text, "unfinished uploads cannot be listed");
                return;
            }
        };
        let oldest = SystemTime::now().checked_sub(ABANDONED_AGE).map(DateTime::from);
        for upload in uploads.uploads() {
            let old = upload.initiated().zip(oldest.as_ref()).is_some_and(|(at, oldest)| at < oldest);
            let key = upload.key().and_then(|key| key.strip_prefix(&self.location().prefix));
            if let (true, Some(key), Some(id)) = (old, key, upload.upload_id()) {
                tracing::info!(bucket = %self.location(), key, "aborting an upload that a controller before has left");
                self.abort(key, id).await;
            }
        }
    }
}

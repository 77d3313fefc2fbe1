//! What the parts of a checkpoint can do at best on this machine now: hashing, compressing, sealing, each on one processor,
//! and writing and reading objects of 16 MiB where the bucket is, three at a time as the controller does.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use bytes::Bytes;
use controller::bucket::Bucket;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::super::Measurement;
use super::{rate, timed};

const BLOCK_BYTES: usize = 1 << 20;
const BLOCKS: usize = 256;
const OBJECT_BYTES: usize = 16 << 20;
const OBJECTS: usize = 15;
const AT_ONCE: usize = 3;

/// Where objects are written.
pub(super) enum Store {
    /// A directory: written and synced as any program would.
    File(PathBuf),
    /// A server, by way of the controller's own client.
    S3(Bucket, Box<Runtime>),
}

/// Megabytes a second, one value a run.
#[derive(Default)]
pub(super) struct Parts {
    blake3: Vec<f64>,
    zstd_1: Vec<f64>,
    aead: Vec<f64>,
    put: Vec<f64>,
    get: Vec<f64>,
}

impl Parts {
    /// Measures all once more: right before what is compared with it.
    pub(super) fn measure(&mut self, store: &Store) -> Result<(), String> {
        let block = noise(BLOCK_BYTES);
        self.blake3.push(blocks(|| {
            std::hint::black_box(blake3::hash(&block));
            Ok(())
        })?);
        let mut packer = zstd::bulk::Compressor::new(1).map_err(|e| format!("zstd: {e}"))?;
        self.zstd_1.push(blocks(|| {
            let packed = packer.compress(&block).map_err(|e| format!("zstd: {e}"))?;
            std::hint::black_box(&packed);
            Ok(())
        })?);
        let key = UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| "no AES-256-GCM".to_owned())?;
        let (key, mut sealed) = (LessSafeKey::new(key), block.clone());
        self.aead.push(blocks(|| {
            // The same nonce each time: nobody will ever read this.
            let nonce = Nonce::assume_unique_for_key([1; 12]);
            let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut sealed);
            let tag = tag.map_err(|_| "AES-256-GCM fails".to_owned())?;
            std::hint::black_box(tag.as_ref());
            Ok(())
        })?);
        let (put, get) = store.measure(noise(OBJECT_BYTES).into())?;
        self.put.push(put);
        self.get.push(get);
        Ok(())
    }

    /// Puts all beside a measurement.
    pub(super) fn beside(&self, measurement: Measurement) -> Measurement {
        measurement
            .beside("blake3", &self.blake3)
            .beside("zstd_1", &self.zstd_1)
            .beside("aead", &self.aead)
            .beside("put", &self.put)
            .beside("get", &self.get)
    }
}

fn blocks(mut work: impl FnMut() -> Result<(), String>) -> Result<f64, String> {
    let (done, ms) = timed(|| (0..BLOCKS).try_for_each(|_| work()));
    done.map(|()| rate((BLOCKS * BLOCK_BYTES) as u64, ms))
}

/// Bytes that no compression makes smaller.
pub(super) fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

impl Store {
    /// Rates of writing and of reading.
    fn measure(&self, object: Bytes) -> Result<(f64, f64), String> {
        let (put, put_ms) = timed(|| self.each(Verb::Put, &object));
        put?;
        let (got, get_ms) = timed(|| self.each(Verb::Get, &object));
        got?;
        self.each(Verb::Remove, &object)?;
        let bytes = (OBJECTS * OBJECT_BYTES) as u64;
        Ok((rate(bytes, put_ms), rate(bytes, get_ms)))
    }

    fn each(&self, verb: Verb, object: &Bytes) -> Result<(), String> {
        match self {
            Store::File(dir) => thread::scope(|scope| {
                let worker =
                    |first| move || (first..OBJECTS).step_by(AT_ONCE).try_for_each(|n| verb.file(dir, n, object));
                let workers: Vec<_> = (0..AT_ONCE).map(|first| scope.spawn(worker(first))).collect();
                workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a writer ended".to_owned())?)
            }),
            Store::S3(bucket, runtime) => {
                let room = Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
                runtime.block_on(async {
                    let mut tasks = JoinSet::new();
                    for number in 0..OBJECTS {
                        let (bucket, object, room) = (bucket.clone(), object.clone(), room.clone());
                        tasks.spawn(async move {
                            let _permit = room.acquire_owned().await.map_err(|e| e.to_string())?;
                            verb.s3(&bucket, number, object).await
                        });
                    }
                    while let Some(done) = tasks.join_next().await {
                        done.map_err(|e| e.to_string())??;
                    }
                    Ok(())
                })
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Verb {
    Put,
    Get,
    Remove,
}

impl Verb {
    fn file(self, dir: &std::path::Path, number: usize, object: &Bytes) -> Result<(), String> {
        let path = dir.join(format!("ceiling-{number}"));
        let put = || {
            let mut file = std::fs::File::create(&path)?;
            std::io::Write::write_all(&mut file, object)?;
            file.sync_all()
        };
        let done = match self {
            Verb::Put => put(),
            Verb::Get => std::fs::read(&path).map(|bytes| drop(std::hint::black_box(bytes))),
            Verb::Remove => std::fs::remove_file(&path),
        };
        done.map_err(|e| format!("{}: {e}", path.display()))
    }

    async fn s3(self, bucket: &Bucket, number: usize, object: Bytes) -> Result<(), String> {
        let key = format!("ceiling/{number}");
        let done = match self {
            Verb::Put => bucket.put(&key, object).await,
            Verb::Get => bucket.get(&key).await.map(|bytes| drop(std::hint::black_box(bytes))),
            Verb::Remove => bucket.delete(&key).await,
        };
        done.map_err(|e| e.to_string())
    }
}

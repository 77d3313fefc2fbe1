//! What the processors of this machine could do at best: CPU seconds that a GiB needs in each part that it must pass, and the
//! rate at which they would all be spent if every processor were busy all the time with nothing else.
//!
//! | part | `first` | `restore` | |
//! |---|---:|---:|---|
//! | copy | 1 | 1 | out of the guest's RAM, or into RAM that is there already |
//! | blake3 | 3 | 1 | pages at the source, pages as they will be stored, the pack's name; pages at the target |
//! | zstd | 1 | | level 1 over one page in eight of the guest's kind: enough to know that they do not shrink |
//! | aead | 2 | 1 | sealed on the host and opened by the controller; opened by the controller |
//! | tls | 1 | 1 | both ends of a bare gRPC stream over loopback |
//! | bucket | put | get | by the controller's own client; of an S3 server on this machine both sides |
//!
//! Costs are CPU time while all processors do the same at once, not the inverse of a rate of one: two that share a memory or a
//! core slow each other down, and the transfer has both of them busy too. Left out is whatever only this program does:
//! page faults, its queues and wake-ups, more copies, the runner, the controller's ledger.

use std::thread;

use bytes::Bytes;
use controller::bucket::Bucket;
use proto::frame::PAGE_BYTES;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use tokio::runtime::Runtime;

use super::super::Measurement;
use super::super::ceilings::{Ceilings, own_cpu_seconds};
use super::super::migrate::cpu_seconds_of_stat;
use super::GIB;
use super::parts::noise;

/// What a thread works on: more than a processor's own caches hold.
const AREA_BYTES: usize = 64 << 20;
/// A frame of the agents.
const FRAME_BYTES: usize = 64 * PAGE_BYTES;
/// How often each thread goes over its area.
const PASSES: usize = 16;
const OBJECT_BYTES: usize = 16 << 20;
const OBJECTS: usize = 60;
const AT_ONCE: usize = 3;

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Road {
    /// Into the bucket for the first time.
    First,
    /// Back, before the guest runs.
    Restore,
}

/// CPU seconds a GiB, one value a run.
#[derive(Default)]
pub(super) struct Budget {
    ceilings: Ceilings,
    copy: Vec<f64>,
    blake3: Vec<f64>,
    zstd: Vec<f64>,
    aead: Vec<f64>,
    tls: Vec<f64>,
    bucket: Vec<f64>,
    /// Megabytes a second if all processors did nothing else.
    rates: Vec<f64>,
}

/// Where objects go, and who else works for that.
pub(super) struct Depot<'a> {
    pub(super) bucket: &'a Bucket,
    pub(super) runtime: &'a Runtime,
    /// Process of the server, if there is one on this machine.
    pub(super) server: Option<u32>,
}

impl Budget {
    /// Measures all once more: right before what is compared with it.
    pub(super) fn measure(&mut self, depot: &Depot<'_>, road: Road) -> Result<(), String> {
        let area = pages_like_the_guests(AREA_BYTES);
        let copy = all_busy(&area, |ours, other| {
            ours.chunks(FRAME_BYTES).zip(other.chunks_mut(FRAME_BYTES)).for_each(|(from, to)| {
                to.copy_from_slice(from);
                // Somebody looks at it, so that it is really copied.
                std::hint::black_box(to);
            });
            Ok(())
        })?;
        let blake3 = all_busy(&area, |ours, _| {
            ours.chunks(FRAME_BYTES).for_each(|frame| drop(std::hint::black_box(proto::leaf::leaves(frame))));
            Ok(())
        })?;
        let aead = all_busy(&area, |ours, _| seal(ours))?;
        let zstd = if road == Road::First { all_busy(&area, |ours, other| pack(ours, other))? } else { 0.0 };
        drop(area);
        self.ceilings.measure_tls()?;
        let (_, tls) = self.ceilings.last_tls();
        let bucket = depot.measure(road)?;
        let parts = Costs { copy, blake3, zstd, aead, tls, bucket };
        self.rates.push(best_rate(parts.of_a_gib(road), processors()));
        self.copy.push(copy);
        self.blake3.push(blake3);
        self.zstd.extend((road == Road::First).then_some(zstd));
        self.aead.push(aead);
        self.tls.push(tls);
        self.bucket.push(bucket);
        Ok(())
    }

    /// Percent of the best rate, a run each.
    pub(super) fn shares(&self, rates: &[f64]) -> Vec<f64> {
        rates.iter().zip(&self.rates).map(|(rate, best)| 100.0 * rate / best).collect()
    }

    /// Puts the best rate and what a GiB costs in each part, once, beside a measurement.
    pub(super) fn beside(&self, measurement: Measurement) -> Measurement {
        measurement
            .beside("ceiling_mb_per_s", &self.rates)
            .beside("copy_s_per_gib", &self.copy)
            .beside("blake3_s_per_gib", &self.blake3)
            .beside("zstd_1_s_per_gib", &self.zstd)
            .beside("aead_s_per_gib", &self.aead)
            .beside("tls_s_per_gib", &self.tls)
            .beside("bucket_s_per_gib", &self.bucket)
    }
}

/// CPU seconds a GiB of each part, once.
struct Costs {
    copy: f64,
    blake3: f64,
    zstd: f64,
    aead: f64,
    tls: f64,
    bucket: f64,
}

impl Costs {
    /// All that a GiB must pass.
    fn of_a_gib(&self, road: Road) -> f64 {
        let Costs { copy, blake3, zstd, aead, tls, bucket } = self;
        match road {
            Road::First => copy + 3.0 * blake3 + zstd + 2.0 * aead + tls + bucket,
            Road::Restore => copy + blake3 + aead + tls + bucket,
        }
    }
}

fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Megabytes a second.
fn best_rate(cpu_seconds_a_gib: f64, processors: usize) -> f64 {
    GIB as f64 / 1e6 * processors as f64 / cpu_seconds_a_gib
}

/// Lets every processor do the work over memory of its own at once; CPU seconds a GiB.
fn all_busy(area: &[u8], work: impl Fn(&mut [u8], &mut [u8]) -> Result<(), String> + Sync) -> Result<f64, String> {
    let threads = processors();
    let start = std::sync::Barrier::new(threads + 1);
    let mut before = 0.0;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let (mut ours, mut other) = (area.to_vec(), vec![1; area.len()]);
                    start.wait();
                    (0..PASSES).try_for_each(|_| work(&mut ours, &mut other))
                })
            })
            .collect();
        // What is set up is not measured.
        start.wait();
        before = own_cpu_seconds();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a worker ended".to_owned())?)
    })?;
    Ok((own_cpu_seconds() - before) / ((threads * PASSES * area.len()) as f64 / GIB as f64))
}

fn seal(area: &mut [u8]) -> Result<(), String> {
    let key = UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| "no AES-256-GCM".to_owned())?;
    let key = LessSafeKey::new(key);
    for frame in area.chunks_mut(FRAME_BYTES) {
        // The same nonce each time: nobody will ever read this.
        let nonce = Nonce::assume_unique_for_key([1; 12]);
        let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), frame);
        std::hint::black_box(tag.map_err(|_| "AES-256-GCM fails".to_owned())?.as_ref());
    }
    Ok(())
}

fn pack(area: &[u8], room: &mut [u8]) -> Result<(), String> {
    let mut packer = zstd::bulk::Compressor::new(1).map_err(|e| format!("zstd: {e}"))?;
    for page in area.chunks(PAGE_BYTES).step_by(8) {
        // That it does not get shorter is no failure here.
        std::hint::black_box(packer.compress_to_buffer(page, &mut room[..PAGE_BYTES - PAGE_BYTES / 64]).ok());
    }
    Ok(())
}

/// As `crate::guest` fills them: each begins with its number and a count, and the rest is noise.
fn pages_like_the_guests(bytes: usize) -> Vec<u8> {
    let mut area = noise(bytes);
    for (number, page) in (0u64..).zip(area.chunks_exact_mut(PAGE_BYTES)) {
        page[..8].copy_from_slice(&number.to_le_bytes());
        page[8..16].copy_from_slice(&0u64.to_le_bytes());
    }
    area
}

impl Depot<'_> {
    /// CPU seconds a GiB, on both sides, to write, or to read what was written.
    fn measure(&self, road: Road) -> Result<f64, String> {
        let object = aligned(noise(OBJECT_BYTES));
        let before_put = self.cpu_seconds()?;
        self.each(async |bucket, key| bucket.put(&key, object.clone()).await.map_err(|e| e.to_string()))?;
        let before_get = self.cpu_seconds()?;
        let spent = match road {
            Road::First => before_get - before_put,
            Road::Restore => {
                self.each(async |bucket, key| bucket.get(&key).await.map(drop).map_err(|e| e.to_string()))?;
                self.cpu_seconds()? - before_get
            }
        };
        self.each(async |bucket, key| bucket.delete(&key).await.map_err(|e| e.to_string()))?;
        Ok(spent / ((OBJECTS * OBJECT_BYTES) as f64 / GIB as f64))
    }

    fn each(&self, work: impl AsyncFn(Bucket, String) -> Result<(), String>) -> Result<(), String> {
        let work = &work;
        self.runtime.block_on(async {
            let lane = |first: usize| async move {
                for number in (first..OBJECTS).step_by(AT_ONCE) {
                    work(self.bucket.clone(), format!("budget/{number}")).await?;
                }
                Ok::<(), String>(())
            };
            tokio::try_join!(lane(0), lane(1), lane(2)).map(drop)
        })
    }

    fn cpu_seconds(&self) -> Result<f64, String> {
        let Some(server) = self.server else { return Ok(own_cpu_seconds()) };
        let path = format!("/proc/{server}/stat");
        let stat = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        Ok(own_cpu_seconds() + cpu_seconds_of_stat(&stat))
    }
}

/// The same bytes where a disk's block begins, as packs lie.
fn aligned(bytes: Vec<u8>) -> Bytes {
    let mut room: Vec<u8> = Vec::with_capacity(PAGE_BYTES + bytes.len());
    let at = room.as_ptr().align_offset(PAGE_BYTES);
    room.resize(at, 0);
    room.extend_from_slice(&bytes);
    Bytes::from(room).slice(at..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_rate_spends_every_processor_on_what_is_needed() {
        let costs = Costs { copy: 0.1, blake3: 0.3, zstd: 1.0, aead: 0.2, tls: 1.5, bucket: 0.5 };
        assert!((costs.of_a_gib(Road::First) - 4.4).abs() < 1e-9);
        assert!((costs.of_a_gib(Road::Restore) - 2.6).abs() < 1e-9);
        assert!((best_rate(2.0, 2) - 1_073.741_824).abs() < 1e-6);
        assert!((best_rate(2.0, 1) - 536.870_912).abs() < 1e-6);
    }

    #[test]
    fn pages_are_not_all_noise_and_objects_begin_with_a_block() {
        let area = pages_like_the_guests(2 * PAGE_BYTES);
        assert_eq!(area[PAGE_BYTES..PAGE_BYTES + 16], [&1u64.to_le_bytes()[..], &[0; 8]].concat());
        assert_ne!(area[16..24], [0; 8]);
        let object = aligned(area.clone());
        assert!(object == area && object.as_ptr().align_offset(PAGE_BYTES) == 0);
    }
}

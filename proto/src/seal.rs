//! Sealed frames: what the bucket holds. A frame is compressed, then encrypted, before it leaves its host.
//!
//! ```text
//! body of a frame of kind Sealed:
//! offset  0     16     28         30            32            36           37       40
//!         salt  nonce  kind u16   version u16   length u32    compression  0 0 0    ciphertext | tag (16 bytes)
//! ```
//! Kind and version are those of the frame inside, length is its bytes with its header. The ciphertext is that whole
//! frame, as it is (compression 0) or as one zstd frame (1), under AES-256-GCM (NIST SP 800-38D). The key is
//! `BLAKE3.derive_key("godwit 2026-11 frame key", data key | salt)`; a sealer draws one salt and counts its nonces, so no
//! pair of key and nonce comes twice. The associated data are the 40 bytes of the prefix and the VM's id: a frame moved
//! to another VM, or whose numbers were changed, does not open.
//!
//! This room refuses to know where keys come from and what the frames inside mean.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use zstd::bulk::{Compressor, Decompressor};

use crate::frame::{self, FrameError, HEADER_BYTES, Kind, PAGE_BYTES, SEALED_PREFIX_BYTES, SEALED_TAG_BYTES};
use crate::ids::VmId;

/// Context of the derivation of frame keys.
const CONTEXT: &str = "godwit 2026-11 frame key";
/// zstd's level: the fastest that has a level of its own.
const LEVEL: i32 = 1;
/// Shorter frames are compressed without a try.
const TRIED_FROM_BYTES: usize = 32 * PAGE_BYTES;
/// Pieces of a frame that are tried, and how long each is.
const PIECES: usize = 8;
const PIECE_BYTES: usize = PAGE_BYTES;
/// Derived keys that an [`Opener`] keeps: one for each transfer whose frames it meets side by side.
const DERIVED_MAX: usize = 64;

/// Salt of a sealer.
pub type Salt = [u8; 16];

/// A salt that nobody has used.
pub fn salt() -> Salt {
    let mut salt = Salt::default();
    let filled = SystemRandom::new().fill(&mut salt);
    filled.expect("the operating system's random source has no failure once the system is up");
    salt
}

/// The key under which everything of one VM lies in the bucket.
#[derive(Clone, PartialEq, Eq)]
pub struct DataKey([u8; 32]);

impl DataKey {
    /// From 32 random bytes.
    pub fn new(bytes: [u8; 32]) -> DataKey {
        DataKey(bytes)
    }

    /// From a message; `None` if it is not 32 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<DataKey> {
        bytes.try_into().ok().map(DataKey)
    }

    /// The secret itself, to be wrapped or handed to an agent.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    fn derive(&self, salt: &Salt) -> LessSafeKey {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&self.0);
        hasher.update(salt);
        let key = UnboundKey::new(&AES_256_GCM, hasher.finalize().as_bytes());
        LessSafeKey::new(key.expect("a BLAKE3 output has the 32 bytes of an AES-256 key"))
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(secret)")
    }
}

/// Why a sealed frame does not open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The envelope, or the frame inside, is none.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A prefix whose numbers make no sense.
    #[error("malformed sealed frame: {0}")]
    Prefix(&'static str),
    /// The tag does not match: another key, another VM, or changed bytes.
    #[error("the key does not open it, or its bytes were changed")]
    Tag,
    /// What was decrypted does not unpack to the declared length.
    #[error("it does not unpack: {0}")]
    Unpack(String),
}

/// Seals the frames of one transfer. Each lane may have its own, or share one.
pub struct Sealer {
    key: LessSafeKey,
    vm: VmId,
    salt: Salt,
    next: std::sync::atomic::AtomicU64,
}

thread_local! {
    // A compressor's tables are larger than most frames; each worker keeps its own.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
    // Memory that is new for each frame costs a fault for each of its pages, and has left the cache when it is used.
    static PACKED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    static OPENED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Most bytes that a thread keeps for its next frame: the largest frame of pages has them.
const KEPT_MAX: usize = 2 << 20;

/// Lends the thread's memory to some work. What is in it is not to be read.
fn lent<T>(memory: &'static std::thread::LocalKey<Cell<Vec<u8>>>, work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    let mut bytes = memory.take();
    let done = work(&mut bytes);
    if bytes.capacity() <= KEPT_MAX {
        memory.set(bytes);
    }
    done
}

impl Sealer {
    /// Seals for this VM. `salt` must be a new one ([`salt`]): it makes the nonces of this sealer its own.
    pub fn new(key: &DataKey, vm: VmId, salt: Salt) -> Sealer {
        Sealer { key: key.derive(&salt), vm, salt, next: 0.into() }
    }

    /// The sealed form of a frame.
    ///
    /// # Panics
    /// If `frame` is shorter than a header, or longer than any frame.
    pub fn seal(&self, frame: &[u8]) -> Vec<u8> {
        let mut sealed = Vec::new();
        self.seal_into(frame, &mut sealed, |bytes, sealed| sealed.reserve_exact(bytes));
        sealed
    }

    /// Appends the sealed form of a frame. `begin` hears first how many bytes it has, and may append what precedes it.
    ///
    /// # Panics
    /// As [`Sealer::seal`].
    pub fn seal_into(&self, frame: &[u8], into: &mut Vec<u8>, begin: impl FnOnce(usize, &mut Vec<u8>)) {
        let length = u32::try_from(frame.len()).expect("a frame is shorter than 4 GiB");
        let count = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&count.to_le_bytes());
        lent(&PACKED, |packed| {
            let packed = pack(frame, packed, count);
            let plain = packed.unwrap_or(frame);
            begin(HEADER_BYTES + SEALED_PREFIX_BYTES + plain.len() + SEALED_TAG_BYTES, into);
            let start = into.len();
            into.extend_from_slice(&[0; HEADER_BYTES]);
            into.extend_from_slice(&self.salt);
            into.extend_from_slice(&nonce);
            into.extend_from_slice(&frame[4..8]);
            into.extend_from_slice(&length.to_le_bytes());
            into.extend_from_slice(&[u8::from(packed.is_some()), 0, 0, 0]);
            let text = into.len();
            into.extend_from_slice(plain);
            let aad = associated(&into[start + HEADER_BYTES..text], self.vm);
            let nonce = Nonce::assume_unique_for_key(nonce);
            let tag = self.key.seal_in_place_separate_tag(nonce, Aad::from(aad), &mut into[text..]);
            into.extend_from_slice(tag.expect("a frame is shorter than AES-GCM's limit").as_ref());
            frame::finish(Kind::Sealed, &mut into[start..]);
        });
    }
}

/// `frame` as one zstd frame, if that is shorter; it is made in the given memory. `number` is another one for each frame.
fn pack<'a>(frame: &[u8], memory: &'a mut Vec<u8>, number: u64) -> Option<&'a [u8]> {
    // Room for less than the frame itself: what does not shrink is not compressed.
    let bytes_max = frame.len().saturating_sub(frame.len() / 64 + 1);
    if memory.len() < bytes_max {
        memory.resize(bytes_max, 0);
    }
    let room = &mut memory[..bytes_max];
    let written = COMPRESSOR.with_borrow_mut(|compressor| {
        let made = match compressor {
            Some(made) => made,
            None => compressor.insert(Compressor::new(LEVEL).ok()?),
        };
        may_shrink(made, frame, room, number).then(|| made.compress_to_buffer(frame, room).ok())?
    })?;
    Some(&memory[..written])
}

/// Whether it is worth while to compress a large frame: some piece of it gets shorter. To find out at the end of a frame
/// of noise (what is encrypted or compressed in the guest) costs more than to hash and to encrypt it together.
///
/// One piece comes from each part of the frame, and from another place in each: what alternates in memory is seen. Of a
/// frame of which a third shrinks, one in twenty-five at most is taken for noise, and is then stored as it is.
fn may_shrink(compressor: &mut Compressor<'_>, frame: &[u8], room: &mut [u8], number: u64) -> bool {
    if frame.len() < TRIED_FROM_BYTES {
        return true;
    }
    let part_bytes = frame.len() / PIECES;
    (0..PIECES).any(|part| {
        // Fibonacci hashing: the high half of what overflows is spread well.
        let spread =
            number.wrapping_mul(PIECES as u64).wrapping_add(part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let at = part * part_bytes + spread as usize % (part_bytes - PIECE_BYTES + 1);
        let piece = &frame[at..at + PIECE_BYTES];
        compressor.compress_to_buffer(piece, &mut room[..PIECE_BYTES - PIECE_BYTES / 64]).is_ok()
    })
}

fn associated(prefix: &[u8], vm: VmId) -> [u8; SEALED_PREFIX_BYTES + 16] {
    let mut aad = [0; SEALED_PREFIX_BYTES + 16];
    aad[..SEALED_PREFIX_BYTES].copy_from_slice(prefix);
    aad[SEALED_PREFIX_BYTES..].copy_from_slice(&vm.0);
    aad
}

/// Keys of salts, oldest first.
type Derived = Vec<(Salt, Arc<LessSafeKey>)>;

/// Opens what was sealed for one VM; clones share the keys that were derived.
#[derive(Clone)]
pub struct Opener {
    key: DataKey,
    vm: VmId,
    derived: Arc<Mutex<Derived>>,
}

impl Opener {
    /// Opens with this key what belongs to this VM.
    pub fn new(key: DataKey, vm: VmId) -> Opener {
        Opener { key, vm, derived: Arc::default() }
    }

    /// The frame inside a sealed frame. Its own hash is for the caller to check, as for any frame.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn open(&self, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        let mut frame = Vec::new();
        self.open_into(sealed, &mut frame, |_, _| ())?;
        Ok(frame)
    }

    /// Shows the frame inside a sealed frame, which is gone afterwards: it lies in memory that the thread uses again.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn show<T>(&self, sealed: &[u8], look: impl FnOnce(&[u8]) -> T) -> Result<T, SealError> {
        lent(&OPENED, |frame| {
            frame.clear();
            self.open_into(sealed, frame, |_, _| ())?;
            Ok(look(frame))
        })
    }

    /// Appends the frame inside a sealed frame. `begin` hears first how many bytes it has, and may append what precedes it. After
    /// an error `into` is as it was.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn open_into(
        &self,
        sealed: &[u8],
        into: &mut Vec<u8>,
        begin: impl FnOnce(usize, &mut Vec<u8>),
    ) -> Result<(), SealError> {
        let before = into.len();
        let opened = self.try_open_into(sealed, into, begin);
        if opened.is_err() {
            into.truncate(before);
        }
        opened
    }

    fn try_open_into(
        &self,
        sealed: &[u8],
        into: &mut Vec<u8>,
        begin: impl FnOnce(usize, &mut Vec<u8>),
    ) -> Result<(), SealError> {
        let (header, body) = frame::decode(sealed)?;
        if header.kind != Kind::Sealed {
            return Err(FrameError::Unexpected { found: header.kind, expected: Kind::Sealed }.into());
        }
        let (prefix, text) = body
            .split_first_chunk::<SEALED_PREFIX_BYTES>()
            .filter(|(_, text)| text.len() >= SEALED_TAG_BYTES)
            .ok_or(SealError::Prefix("it is shorter than its prefix and tag"))?;
        let inside = Inside::parse(prefix)?;
        if inside.packed {
            return lent(&PACKED, |memory| {
                memory.clear();
                self.decrypt(prefix, text, memory)?;
                begin(inside.bytes, into);
                let start = into.len();
                into.resize(start + inside.bytes, 0);
                let written = inflate(memory, &mut into[start..])?;
                inside.check(&into[start..start + written])
            });
        }
        begin(inside.bytes, into);
        let start = into.len();
        self.decrypt(prefix, text, into)?;
        inside.check(&into[start..])
    }

    /// Appends what was encrypted. Nothing of it is of use after an error.
    fn decrypt(&self, prefix: &[u8; SEALED_PREFIX_BYTES], text: &[u8], into: &mut Vec<u8>) -> Result<(), SealError> {
        let nonce: [u8; 12] = std::array::from_fn(|at| prefix[16 + at]);
        let salt: Salt = std::array::from_fn(|at| prefix[at]);
        let start = into.len();
        into.extend_from_slice(text);
        let aad = Aad::from(associated(prefix, self.vm));
        let nonce = Nonce::assume_unique_for_key(nonce);
        let opened = self.derived(&salt).open_in_place(nonce, aad, &mut into[start..]);
        let plain = opened.map_err(|_| SealError::Tag)?.len();
        into.truncate(start + plain);
        Ok(())
    }

    fn derived(&self, salt: &Salt) -> Arc<LessSafeKey> {
        let mut derived = self.derived.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, key)) = derived.iter().find(|(of, _)| of == salt) {
            return key.clone();
        }
        if derived.len() == DERIVED_MAX {
            derived.remove(0);
        }
        let key = Arc::new(self.key.derive(salt));
        derived.push((*salt, key.clone()));
        key
    }
}

/// What a prefix says of the frame inside.
struct Inside {
    kind: Kind,
    bytes: usize,
    packed: bool,
}

impl Inside {
    fn parse(prefix: &[u8; SEALED_PREFIX_BYTES]) -> Result<Inside, SealError> {
        let number = u16::from_le_bytes([prefix[28], prefix[29]]);
        let kind = Kind::from_number(number).ok_or(FrameError::Kind(number))?;
        let bytes = u32::from_le_bytes([prefix[32], prefix[33], prefix[34], prefix[35]]) as usize;
        if kind == Kind::Sealed || kind == Kind::Envelope {
            return Err(SealError::Prefix("a sealed frame inside a sealed frame"));
        }
        if bytes < HEADER_BYTES || bytes - HEADER_BYTES > kind.body_bytes_max() {
            return Err(SealError::Prefix("a length that no frame of this kind has"));
        }
        if prefix[36] > 1 || prefix[37..] != [0; 3] {
            return Err(SealError::Prefix("a compression that this release does not know"));
        }
        Ok(Inside { kind, bytes, packed: prefix[36] == 1 })
    }

    /// It is what the prefix says.
    fn check(&self, frame: &[u8]) -> Result<(), SealError> {
        if frame.len() != self.bytes {
            return Err(SealError::Unpack(format!("{} of {} bytes", frame.len(), self.bytes)));
        }
        let header = frame::Header::parse(frame)?;
        if header.kind != self.kind {
            return Err(FrameError::Unexpected { found: header.kind, expected: self.kind }.into());
        }
        Ok(())
    }
}

/// Unpacks; how many bytes it gave.
fn inflate(text: &[u8], into: &mut [u8]) -> Result<usize, SealError> {
    let failed = |error: std::io::Error| SealError::Unpack(error.to_string());
    DECOMPRESSOR.with_borrow_mut(|decompressor| {
        let made = match decompressor {
            Some(made) => made,
            None => decompressor.insert(Decompressor::new().map_err(failed)?),
        };
        made.decompress_to_buffer(text, into).map_err(failed)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VM: VmId = VmId([3; 16]);

    fn key() -> DataKey {
        DataKey::new([7; 32])
    }

    fn sealer() -> Sealer {
        Sealer::new(&key(), VM, [1; 16])
    }

    fn noise(bytes: usize) -> Vec<u8> {
        let mut noise = vec![0; bytes];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        noise
    }

    #[test]
    fn what_was_sealed_opens_and_what_repeats_shrinks() {
        let opener = Opener::new(key(), VM);
        let sealer = sealer();
        for (body, shrinks) in [(vec![9; 100_000], true), (noise(100_000), false), (vec![], false)] {
            let frame = frame::encode(Kind::Section, &body);
            let sealed = sealer.seal(&frame);
            assert_eq!(sealed.len() < frame.len() / 2, shrinks, "{} of {}", sealed.len(), frame.len());
            assert_eq!(opener.open(&sealed).unwrap(), frame);
        }
    }

    #[test]
    fn frames_that_shrink_in_parts_are_compressed_whichever_parts_these_are() {
        let (sealer, pages) = (sealer(), 64);
        // Every other page, runs of eight, and the second half.
        let shapes: [fn(usize) -> bool; 3] = [|page| page % 2 == 1, |page| page / 8 % 2 == 1, |page| page >= 32];
        for shrinks in shapes {
            let mut body = noise(pages * PAGE_BYTES);
            let text = body.chunks_exact_mut(PAGE_BYTES).enumerate().filter(|(page, _)| shrinks(*page));
            text.for_each(|(page, bytes)| bytes.fill(page as u8));
            let frame = frame::encode(Kind::Section, &body);
            let large = (0..200).filter(|_| sealer.seal(&frame).len() > frame.len() * 2 / 3).count();
            assert!(large <= 2, "{large} of 200 were stored as they are");
        }
        let frame = frame::encode(Kind::Section, &noise(pages * PAGE_BYTES));
        assert!(sealer.seal(&frame).len() > frame.len());
    }

    #[test]
    fn no_nonce_comes_twice_and_equal_frames_look_different() {
        let (sealer, frame) = (sealer(), frame::encode(Kind::Section, &noise(500)));
        let (a, b) = (sealer.seal(&frame), sealer.seal(&frame));
        let nonce = HEADER_BYTES + 16..HEADER_BYTES + 28;
        assert_ne!(a[nonce.clone()], b[nonce]);
        let text = HEADER_BYTES + SEALED_PREFIX_BYTES;
        assert!(a[text..].chunks(16).zip(b[text..].chunks(16)).all(|(a, b)| a != b));
    }

    #[test]
    fn what_is_appended_is_what_is_returned_and_an_error_leaves_nothing() {
        let (opener, sealer) = (Opener::new(key(), VM), sealer());
        let said = |bytes: usize, into: &mut Vec<u8>| into.extend_from_slice(&(bytes as u64).to_le_bytes());
        for body in [vec![9; 100_000], noise(100_000), noise(KEPT_MAX + 1), vec![]] {
            let frame = frame::encode(Kind::Section, &body);
            let mut sealed = b"before".to_vec();
            sealer.seal_into(&frame, &mut sealed, said);
            let (head, sealed) = sealed.split_at(14);
            assert_eq!(head, [&b"before"[..], &(sealed.len() as u64).to_le_bytes()].concat());
            let mut opened = b"before".to_vec();
            opener.open_into(sealed, &mut opened, said).unwrap();
            assert!(opened == [&b"before"[..], &(frame.len() as u64).to_le_bytes(), &frame].concat());
            assert!(opener.show(sealed, |shown| shown == frame).unwrap());
            let mut changed = sealed.to_vec();
            changed[HEADER_BYTES + SEALED_PREFIX_BYTES] ^= 1;
            let mut opened = b"before".to_vec();
            assert_eq!(opener.open_into(&changed, &mut opened, said), Err(SealError::Tag));
            assert_eq!(opened, b"before");
        }
    }

    #[test]
    fn another_key_and_another_vm_do_not_open_it() {
        let sealed = sealer().seal(&frame::encode(Kind::Section, b"state"));
        assert_eq!(Opener::new(DataKey::new([8; 32]), VM).open(&sealed), Err(SealError::Tag));
        assert_eq!(Opener::new(key(), VmId([4; 16])).open(&sealed), Err(SealError::Tag));
    }

    #[test]
    fn every_changed_byte_is_refused() {
        let opener = Opener::new(key(), VM);
        let sealed = sealer().seal(&frame::encode(Kind::Section, &[5; 300]));
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 0x10;
            assert!(opener.open(&changed).is_err(), "byte {at}");
            assert!(opener.open(&sealed[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_length_that_lies_allocates_nothing() {
        let sealed = sealer().seal(&frame::encode(Kind::Section, &[5; 300]));
        let mut body = sealed[HEADER_BYTES..].to_vec();
        body[32..36].copy_from_slice(&u32::MAX.to_le_bytes());
        let lying = frame::encode(Kind::Sealed, &body);
        assert_eq!(
            Opener::new(key(), VM).open(&lying),
            Err(SealError::Prefix("a length that no frame of this kind has"))
        );
    }

    proptest! {
        #[test]
        fn no_bytes_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let opener = Opener::new(key(), VM);
            prop_assert!(opener.open(&frame::encode(Kind::Sealed, &body)).is_err());
            prop_assert!(opener.open(&body).is_err());
        }
    }
}

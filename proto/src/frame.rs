//! The one envelope of wire, bucket and journal.
//!
//! ```text
//! offset  0        4     6        8            12         16                 48
//!         "GDWT"   kind  version  body length  reserved   BLAKE3 (32 bytes)  body
//!         4 bytes  u16   u16      u32          u32 = 0    see below
//! ```
//! Numbers are little endian. The version is `major << 8 | minor` of the body's format. The header and the length are
//! checked before anything is allocated; the hash is checked before the body is used. Page payloads are raw bytes:
//!
//! ```text
//! Pages body:  first page u64 | pages u32 | space u16 | encoding u16 | payload (pages * 4096 bytes, or nothing if zero)
//! ```
//! What the hash covers:
//!
//! ```text
//! kind Pages:  BLAKE3( bytes 0..16 | first 16 bytes of the body | leaf 0 | leaf 1 | ... ), where leaf i is the BLAKE3 of
//!              the i-th 4096 bytes of the payload (a last shorter piece is hashed as it is)
//! kind Sealed: BLAKE3( bytes 0..16 | first 40 bytes of the body | last 16 bytes of the body ); the tag in the latter
//!              answers for the rest ([`crate::seal`])
//! others:      BLAKE3( bytes 0..16 | body )
//! ```
//! The leaves are the very digests of which both sides build the digest of all RAM ([`crate::leaf`]), so the payload is
//! hashed once at each end. Kind and length are in bytes 0..16, so the two forms cannot be taken for each other.

use crate::leaf::Leaf;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 48;
/// Bytes before the payload in the body of a frame of kind [`Kind::Pages`].
pub const PAGES_PREFIX_BYTES: usize = 16;
/// Bytes before the ciphertext in the body of a frame of kind [`Kind::Sealed`].
pub const SEALED_PREFIX_BYTES: usize = 40;
/// Bytes of the tag at the end of it.
pub const SEALED_TAG_BYTES: usize = 16;
const SEALED_BYTES_MIN: usize = SEALED_PREFIX_BYTES + SEALED_TAG_BYTES;
/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Most pages in one frame: 1 MiB.
pub const PAGES_MAX: u32 = 256;
const MAGIC: [u8; 4] = *b"GDWT";

/// What the body is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u16)]
pub enum Kind {
    /// A `Section` message.
    Section = 1,
    /// A run of pages of RAM or blocks of a disk.
    Pages = 2,
    /// A `Manifest` message.
    Manifest = 3,
    /// A `LaneMessage`, `RunnerRequest` or `RunnerReply`.
    Control = 4,
    /// The trailing index of a pack.
    PackIndex = 5,
    /// A block of a journal.
    Journal = 6,
    /// Another frame, compressed and encrypted ([`crate::seal`]).
    Sealed = 7,
    /// A `MapLayer`: where pages lie in the bucket.
    PageMap = 8,
    /// An `Envelope`: a sealed manifest and what it takes to open it.
    Envelope = 9,
    /// An `ExportHead`: first of a recording's file.
    Recording = 10,
}

impl Kind {
    /// The kind with this number.
    pub(crate) fn from_number(number: u16) -> Option<Kind> {
        [
            Kind::Section,
            Kind::Pages,
            Kind::Manifest,
            Kind::Control,
            Kind::PackIndex,
            Kind::Journal,
            Kind::Sealed,
            Kind::PageMap,
            Kind::Envelope,
            Kind::Recording,
        ]
        .into_iter()
        .find(|kind| *kind as u16 == number)
    }

    /// Longest body that is accepted.
    pub const fn body_bytes_max(self) -> usize {
        match self {
            Kind::Pages => PAGES_PREFIX_BYTES + PAGES_MAX as usize * PAGE_BYTES,
            Kind::Section | Kind::Control | Kind::Journal | Kind::PageMap => 8 << 20,
            Kind::Manifest | Kind::PackIndex | Kind::Sealed | Kind::Envelope | Kind::Recording => 256 << 20,
        }
    }

    /// Version of the body's format that this release writes.
    pub const fn version(self) -> u16 {
        0x0100
    }
}

/// Why bytes are not a frame.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than the header or its length ask for.
    #[error("frame is cut: {found} of {expected} bytes")]
    Cut {
        /// Bytes that there are.
        found: usize,
        /// Bytes that there should be.
        expected: usize,
    },
    /// More bytes than the length says.
    #[error("{0} bytes follow the frame")]
    Trailing(usize),
    /// Not a frame at all.
    #[error("no frame here: the first bytes are {0:02x?}")]
    Magic([u8; 4]),
    /// A kind that this release does not know.
    #[error("unknown frame kind {0}")]
    Kind(u16),
    /// Another kind than was asked for.
    #[error("a frame of kind {expected:?} was expected, not {found:?}")]
    Unexpected {
        /// The kind found.
        found: Kind,
        /// The kind asked for.
        expected: Kind,
    },
    /// A major version that this release does not know.
    #[error("{kind:?} frame of version {}.{}, this release reads up to {}.255", .version >> 8, .version & 255, .kind.version() >> 8)]
    Version {
        /// The frame's kind.
        kind: Kind,
        /// Version found.
        version: u16,
    },
    /// Reserved bytes that are not zero.
    #[error("reserved header bytes are {0:#x}")]
    Reserved(u32),
    /// A length beyond what the kind may have.
    #[error("{kind:?} frame of {bytes} bytes; at most {} are allowed", .kind.body_bytes_max())]
    Oversized {
        /// The frame's kind.
        kind: Kind,
        /// Length found.
        bytes: usize,
    },
    /// The hash does not match: the bytes were changed on the way.
    #[error("{kind:?} frame does not match its hash: expected {expected}, computed {computed}")]
    Hash {
        /// The frame's kind.
        kind: Kind,
        /// From the header.
        expected: crate::ids::Digest,
        /// From the bytes.
        computed: crate::ids::Digest,
    },
    /// A pages body whose numbers make no sense.
    #[error("malformed page run: {0}")]
    Pages(&'static str),
    /// A protobuf body that does not decode.
    #[error("{kind:?} body does not decode: {text}")]
    Body {
        /// The frame's kind.
        kind: Kind,
        /// The decoder's words.
        text: String,
    },
}

/// A checked header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the body is.
    pub kind: Kind,
    /// Version of the body's format.
    pub version: u16,
    /// Bytes of the body.
    pub body_bytes: usize,
    hash: [u8; 32],
}

impl Header {
    /// Checks everything that can be checked before the body is there.
    ///
    /// # Errors
    /// Any [`FrameError`] but `Trailing`, `Hash`, `Pages` and `Body`.
    pub fn parse(bytes: &[u8]) -> Result<Header, FrameError> {
        let header: &[u8; HEADER_BYTES] =
            bytes.first_chunk().ok_or(FrameError::Cut { found: bytes.len(), expected: HEADER_BYTES })?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        if header[..4] != MAGIC {
            return Err(FrameError::Magic([header[0], header[1], header[2], header[3]]));
        }
        let kind = Kind::from_number(half(4)).ok_or(FrameError::Kind(half(4)))?;
        let version = half(6);
        if version >> 8 != kind.version() >> 8 {
            return Err(FrameError::Version { kind, version });
        }
        let body_bytes = word(8) as usize;
        if body_bytes > kind.body_bytes_max() {
            return Err(FrameError::Oversized { kind, bytes: body_bytes });
        }
        if word(12) != 0 {
            return Err(FrameError::Reserved(word(12)));
        }
        let mut hash = [0; 32];
        hash.copy_from_slice(&header[16..]);
        Ok(Header { kind, version, body_bytes, hash })
    }
}

/// Encodes a frame around a body.
pub fn encode(kind: Kind, body: &[u8]) -> Vec<u8> {
    let mut frame = begin(kind, body.len());
    frame.extend_from_slice(body);
    seal(&mut frame);
    frame
}

/// Encodes a frame around a protobuf message.
pub fn encode_message(kind: Kind, message: &impl prost::Message) -> Vec<u8> {
    let mut frame = begin(kind, message.encoded_len());
    message.encode_raw(&mut frame);
    seal(&mut frame);
    frame
}

/// A header with an empty hash and room for the body: append exactly `body_bytes`, then [`seal`].
pub fn begin(kind: Kind, body_bytes: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_BYTES + body_bytes);
    begin_in(kind, body_bytes, &mut frame);
    frame
}

/// [`begin`] at the end of a buffer that holds something already.
fn begin_in(kind: Kind, body_bytes: usize, frame: &mut Vec<u8>) {
    frame.extend_from_slice(&header(kind, body_bytes));
}

fn header(kind: Kind, body_bytes: usize) -> [u8; HEADER_BYTES] {
    assert!(body_bytes <= kind.body_bytes_max(), "{kind:?} body of {body_bytes} bytes");
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&(kind as u16).to_le_bytes());
    header[6..8].copy_from_slice(&kind.version().to_le_bytes());
    header[8..12].copy_from_slice(&(body_bytes as u32).to_le_bytes());
    header
}

/// Writes the header of a frame whose body of any length lies behind [`HEADER_BYTES`] free bytes.
#[cfg(feature = "seal")]
pub(crate) fn finish(kind: Kind, frame: &mut [u8]) {
    let header = header(kind, frame.len() - HEADER_BYTES);
    frame[..HEADER_BYTES].copy_from_slice(&header);
    seal(frame);
}

/// Writes the hash of a frame made by [`begin`] whose body is complete.
pub fn seal(frame: &mut [u8]) {
    let leaves = leaves_of(frame);
    seal_with(frame, &leaves);
}

/// [`seal`] for a frame of pages whose digests are known: `leaves` are those of the payload, in order.
pub fn seal_pages(frame: &mut [u8], leaves: &[Leaf]) {
    let payload = frame.len().saturating_sub(HEADER_BYTES + PAGES_PREFIX_BYTES);
    assert_eq!(
        (kind_bytes(frame), leaves.len()),
        (Kind::Pages as u16, payload.div_ceil(PAGE_BYTES)),
        "digests of pages"
    );
    seal_with(frame, leaves);
}

fn seal_with(frame: &mut [u8], leaves: &[Leaf]) {
    let declared = u32::from_le_bytes([frame[8], frame[9], frame[10], frame[11]]) as usize;
    assert_eq!(frame.len(), HEADER_BYTES + declared, "body is not of the declared length");
    let hash = hash(frame, leaves);
    frame[16..HEADER_BYTES].copy_from_slice(&hash);
}

fn kind_bytes(frame: &[u8]) -> u16 {
    u16::from_le_bytes([frame[4], frame[5]])
}

/// Digests of the pages of a frame's payload; none for frames of other kinds.
fn leaves_of(frame: &[u8]) -> Vec<Leaf> {
    if kind_bytes(frame) != Kind::Pages as u16 {
        return Vec::new();
    }
    frame.get(HEADER_BYTES + PAGES_PREFIX_BYTES..).map_or_else(Vec::new, crate::leaf::leaves)
}

fn hash(frame: &[u8], leaves: &[Leaf]) -> [u8; 32] {
    let body = &frame[HEADER_BYTES..];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&frame[..16]);
    if kind_bytes(frame) == Kind::Pages as u16 {
        hasher.update(&body[..body.len().min(PAGES_PREFIX_BYTES)]);
        hasher.update(leaves.as_flattened());
    } else if kind_bytes(frame) == Kind::Sealed as u16 && body.len() >= SEALED_BYTES_MIN {
        hasher.update(&body[..SEALED_PREFIX_BYTES]);
        hasher.update(&body[body.len() - SEALED_TAG_BYTES..]);
    } else {
        hasher.update(body);
    }
    *hasher.finalize().as_bytes()
}

/// Checks the first frame of `bytes`; returns header, body, and what follows.
///
/// # Errors
/// Any [`FrameError`] but `Trailing`.
pub fn split(bytes: &[u8]) -> Result<(Header, &[u8], &[u8]), FrameError> {
    let (header, end, _) = check(bytes)?;
    Ok((header, &bytes[HEADER_BYTES..end], &bytes[end..]))
}

/// Checks the first frame of `bytes`: its header, where it ends, and the digests of its pages.
fn check(bytes: &[u8]) -> Result<(Header, usize, Vec<Leaf>), FrameError> {
    let header = Header::parse(bytes)?;
    let end = HEADER_BYTES + header.body_bytes;
    if bytes.len() < end {
        return Err(FrameError::Cut { found: bytes.len(), expected: end });
    }
    let leaves = leaves_of(&bytes[..end]);
    let computed = hash(&bytes[..end], &leaves);
    if computed != header.hash {
        let expected = crate::ids::Digest(header.hash);
        return Err(FrameError::Hash { kind: header.kind, expected, computed: crate::ids::Digest(computed) });
    }
    Ok((header, end, leaves))
}

/// Checks that `bytes` are exactly one frame; returns header and body.
///
/// # Errors
/// Any [`FrameError`].
pub fn decode(bytes: &[u8]) -> Result<(Header, &[u8]), FrameError> {
    match split(bytes)? {
        (header, body, []) => Ok((header, body)),
        (_, _, rest) => Err(FrameError::Trailing(rest.len())),
    }
}

/// A checked frame of pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pages<'a> {
    /// Which pages.
    pub run: PageRun,
    /// Their bytes; nothing if they are zero.
    pub payload: &'a [u8],
    /// BLAKE3 of each page of the payload, in order; computed from the bytes, not taken from the sender.
    pub leaves: Vec<Leaf>,
}

/// Checks that `bytes` are exactly one frame of kind [`Kind::Pages`]; returns its pages with their digests.
///
/// # Errors
/// Any [`FrameError`].
pub fn decode_pages(bytes: &[u8]) -> Result<Pages<'_>, FrameError> {
    let (header, end, leaves) = check(bytes)?;
    if header.kind != Kind::Pages {
        return Err(FrameError::Unexpected { found: header.kind, expected: Kind::Pages });
    }
    if end != bytes.len() {
        return Err(FrameError::Trailing(bytes.len() - end));
    }
    let (run, payload) = PageRun::parse(&bytes[HEADER_BYTES..])?;
    Ok(Pages { run, payload, leaves })
}

/// Checks that `bytes` are exactly one frame of raw pages whose hash is made of these digests, and returns its pages. The
/// pages themselves are not read: whether they have these digests is seen by whoever checks the frame next.
///
/// # Errors
/// Any [`FrameError`].
pub fn decode_stated_pages(bytes: &[u8], stated: &[Leaf]) -> Result<PageRun, FrameError> {
    let header = Header::parse(bytes)?;
    let end = HEADER_BYTES + header.body_bytes;
    if header.kind != Kind::Pages {
        return Err(FrameError::Unexpected { found: header.kind, expected: Kind::Pages });
    }
    if bytes.len() != end {
        return Err(match bytes.len().checked_sub(end) {
            Some(rest) => FrameError::Trailing(rest),
            None => FrameError::Cut { found: bytes.len(), expected: end },
        });
    }
    let (run, payload) = PageRun::parse(&bytes[HEADER_BYTES..])?;
    if payload.len() != stated.len() * PAGE_BYTES {
        return Err(FrameError::Pages("not as many pages as digests"));
    }
    let computed = hash(bytes, stated);
    if computed != header.hash {
        let expected = crate::ids::Digest(header.hash);
        return Err(FrameError::Hash { kind: header.kind, expected, computed: crate::ids::Digest(computed) });
    }
    Ok(run)
}

/// [`decode_pages`] of several frames. Their pages are hashed side by side: many frames of one page cost hardly more than
/// one frame of many.
///
/// # Errors
/// The [`FrameError`] of the first frame that has one.
pub fn decode_all_pages<'a>(frames: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Pages<'a>>, FrameError> {
    let frames: Vec<&[u8]> = frames.into_iter().collect();
    let payload = |frame: &'a [u8]| frame.get(HEADER_BYTES + PAGES_PREFIX_BYTES..).unwrap_or_default();
    let whole = |frame: &'a [u8]| payload(frame).as_chunks::<PAGE_BYTES>().0.iter();
    let leaves = crate::leaf::leaves_of_pages(frames.iter().flat_map(|frame| whole(frame)));
    let mut first = 0;
    let mut all = Vec::with_capacity(frames.len());
    for frame in frames {
        let ours = &leaves[first..first + whole(frame).len()];
        first += ours.len();
        let header = Header::parse(frame)?;
        let usual = header.kind == Kind::Pages
            && frame.len() == HEADER_BYTES + header.body_bytes
            && payload(frame).len() == ours.len() * PAGE_BYTES
            && frame.len() >= HEADER_BYTES + PAGES_PREFIX_BYTES;
        // Whatever is wrong with it is found by the way that looks at it alone.
        all.push(match usual && hash(frame, ours) == header.hash {
            true => {
                let (run, payload) = PageRun::parse(&frame[HEADER_BYTES..])?;
                Pages { run, payload, leaves: ours.to_vec() }
            }
            false => decode_pages(frame)?,
        });
    }
    Ok(all)
}

/// Checks that `bytes` are exactly one frame of this kind and decodes its protobuf body.
///
/// # Errors
/// Any [`FrameError`].
pub fn decode_message<M: prost::Message + Default>(expected: Kind, bytes: &[u8]) -> Result<M, FrameError> {
    let (header, body) = decode(bytes)?;
    if header.kind != expected {
        return Err(FrameError::Unexpected { found: header.kind, expected });
    }
    M::decode(body).map_err(|e| FrameError::Body { kind: expected, text: e.to_string() })
}

/// How the payload of a page run is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Encoding {
    /// The pages, one after the other.
    Raw = 0,
    /// All pages are zero; there is no payload.
    Zero = 1,
}

/// What precedes the payload of a page run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRun {
    /// Number of the first page.
    pub first_page: u64,
    /// How many pages: 1 to [`PAGES_MAX`] (zero runs: to `u32::MAX`).
    pub pages: u32,
    /// 0 is RAM, 1.. are local disks in order of the configuration.
    pub space: u16,
    /// How the payload is written.
    pub encoding: Encoding,
}

impl PageRun {
    /// Bytes of the payload.
    pub fn payload_bytes(&self) -> usize {
        match self.encoding {
            Encoding::Raw => self.pages as usize * PAGE_BYTES,
            Encoding::Zero => 0,
        }
    }

    /// Starts a frame for this run: append exactly [`PageRun::payload_bytes`], then [`seal`].
    pub fn begin(&self) -> Vec<u8> {
        let mut frame = Vec::with_capacity(self.frame_bytes());
        self.begin_in(&mut frame);
        frame
    }

    /// Bytes of the whole frame of this run.
    pub fn frame_bytes(&self) -> usize {
        HEADER_BYTES + PAGES_PREFIX_BYTES + self.payload_bytes()
    }

    /// [`PageRun::begin`] at the end of a buffer that holds other frames already.
    pub fn begin_in(&self, frame: &mut Vec<u8>) {
        assert!(self.pages > 0 && (self.encoding == Encoding::Zero || self.pages <= PAGES_MAX), "{self:?}");
        begin_in(Kind::Pages, PAGES_PREFIX_BYTES + self.payload_bytes(), frame);
        frame.extend_from_slice(&self.first_page.to_le_bytes());
        frame.extend_from_slice(&self.pages.to_le_bytes());
        frame.extend_from_slice(&self.space.to_le_bytes());
        frame.extend_from_slice(&(self.encoding as u16).to_le_bytes());
    }

    /// Takes the body of a [`Kind::Pages`] frame apart. The numbers are consistent with the length of the payload; that
    /// the pages exist is for the caller to check.
    ///
    /// # Errors
    /// [`FrameError::Pages`].
    pub fn parse(body: &[u8]) -> Result<(PageRun, &[u8]), FrameError> {
        let prefix: &[u8; PAGES_PREFIX_BYTES] = body.first_chunk().ok_or(FrameError::Pages("no prefix"))?;
        let payload = &body[PAGES_PREFIX_BYTES..];
        let p = prefix;
        let encoding = match u16::from_le_bytes([p[14], p[15]]) {
            0 => Encoding::Raw,
            1 => Encoding::Zero,
            _ => return Err(FrameError::Pages("unknown encoding")),
        };
        let run = PageRun {
            first_page: u64::from_le_bytes([p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]]),
            pages: u32::from_le_bytes([p[8], p[9], p[10], p[11]]),
            space: u16::from_le_bytes([p[12], p[13]]),
            encoding,
        };
        if run.pages == 0 {
            return Err(FrameError::Pages("no pages"));
        }
        if run.first_page.checked_add(run.pages.into()).is_none() {
            return Err(FrameError::Pages("page numbers wrap"));
        }
        if run.payload_bytes() != payload.len() {
            return Err(FrameError::Pages("payload is not of the declared length"));
        }
        Ok((run, payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_survive(body in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let frame = encode(Kind::Control, &body);
            let (header, found) = decode(&frame).unwrap();
            prop_assert_eq!(header.kind, Kind::Control);
            prop_assert_eq!(found, &body[..]);
        }

        #[test]
        fn any_flipped_bit_is_seen(body in proptest::collection::vec(any::<u8>(), 1..300), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            for kind in [Kind::Section, Kind::Pages] {
                let mut frame = encode(kind, &body);
                let at = at.index(frame.len());
                frame[at] ^= 1 << bit;
                // A minor version may differ; everything else in the header and body is refused.
                prop_assert!(decode(&frame).is_err());
            }
        }

        #[test]
        fn any_cut_is_seen(body in proptest::collection::vec(any::<u8>(), 0..300), at in any::<prop::sample::Index>()) {
            let frame = encode(Kind::Section, &body);
            let cut = at.index(frame.len());
            let seen = matches!(decode(&frame[..cut]), Err(FrameError::Cut { .. }));
            prop_assert!(seen);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
            let _ = decode_pages(&bytes);
            let _ = decode_stated_pages(&bytes, &[[0; 32]]);
            let _ = decode_all_pages([&bytes[..], &bytes[..]]);
            let _ = PageRun::parse(&bytes);
        }
    }

    #[test]
    fn page_runs_survive() {
        let run = PageRun { first_page: 7, pages: 2, space: 1, encoding: Encoding::Raw };
        let mut frame = run.begin();
        frame.resize(frame.len() + run.payload_bytes(), 0x5a);
        seal(&mut frame);
        let (_, body) = decode(&frame).unwrap();
        let (found, payload) = PageRun::parse(body).unwrap();
        assert_eq!((found, payload.len()), (run, 8192));
    }

    #[test]
    fn the_hash_of_a_page_frame_is_made_of_the_digests_of_its_pages() {
        let run = PageRun { first_page: 7, pages: 3, space: 0, encoding: Encoding::Raw };
        let mut frame = run.begin();
        (0..3 * PAGE_BYTES).for_each(|at| frame.push((at / 5) as u8));
        let leaves: Vec<Leaf> = frame[HEADER_BYTES + PAGES_PREFIX_BYTES..]
            .chunks(PAGE_BYTES)
            .map(|page| *blake3::hash(page).as_bytes())
            .collect();
        let mut quick = frame.clone();
        seal(&mut frame);
        seal_pages(&mut quick, &leaves);
        assert_eq!(frame, quick);
        let covered = [&frame[..16], &frame[HEADER_BYTES..][..PAGES_PREFIX_BYTES], leaves.as_flattened()].concat();
        assert_eq!(frame[16..HEADER_BYTES], *blake3::hash(&covered).as_bytes());
        let pages = decode_pages(&frame).unwrap();
        assert_eq!((pages.run, &pages.leaves), (run, &leaves));
        assert_eq!(decode_stated_pages(&frame, &leaves), Ok(run));
        let swapped = [leaves[1], leaves[0], leaves[2]];
        assert!(matches!(decode_stated_pages(&frame, &swapped), Err(FrameError::Hash { .. })));
        assert!(matches!(decode_stated_pages(&frame, &leaves[..2]), Err(FrameError::Pages(_))));
        assert!(matches!(decode_stated_pages(&frame[..frame.len() - 1], &leaves), Err(FrameError::Cut { .. })));
        assert_eq!(decode_stated_pages(&[&frame[..], &[0]].concat(), &leaves), Err(FrameError::Trailing(1)));
    }

    proptest! {
        #[test]
        fn frames_of_pages_are_judged_together_as_they_are_alone(
            shapes in proptest::collection::vec((0..5u32, 0..3u8), 1..8), flip in any::<Option<prop::sample::Index>>()
        ) {
            let mut frames: Vec<Vec<u8>> = Vec::new();
            for (number, (pages, odd)) in (0..).zip(shapes) {
                let run = PageRun { first_page: number, pages: pages.max(1), space: 0, encoding: if pages == 0 { Encoding::Zero } else { Encoding::Raw } };
                let mut body = run.begin()[HEADER_BYTES..].to_vec();
                body.resize(body.len() + run.payload_bytes() + if odd == 2 { 7 } else { 0 }, number as u8);
                frames.push(encode(Kind::Pages, &body));
            }
            if let Some(flip) = flip {
                let frame = flip.index(frames.len());
                let at = flip.index(frames[frame].len());
                frames[frame][at] ^= 1;
            }
            let alone: Result<Vec<_>, _> = frames.iter().map(|frame| decode_pages(frame)).collect();
            prop_assert_eq!(decode_all_pages(frames.iter().map(Vec::as_slice)), alone);
        }
    }

    #[test]
    fn page_frames_that_lie_about_themselves_are_refused() {
        let run = PageRun { first_page: 7, pages: 2, space: 0, encoding: Encoding::Raw };
        for bytes in [0, 1, PAGE_BYTES, 3 * PAGE_BYTES] {
            let mut body = run.begin()[HEADER_BYTES..].to_vec();
            body.resize(PAGES_PREFIX_BYTES + bytes, 1);
            assert!(matches!(decode_pages(&encode(Kind::Pages, &body)), Err(FrameError::Pages(_))), "{bytes}");
        }
        for bytes in 0..PAGES_PREFIX_BYTES {
            assert!(
                matches!(decode_pages(&encode(Kind::Pages, &vec![0; bytes])), Err(FrameError::Pages(_))),
                "{bytes}"
            );
        }
        let control = encode(Kind::Control, &[]);
        assert!(matches!(decode_pages(&control), Err(FrameError::Unexpected { .. })));
    }

    #[test]
    fn oversized_is_refused_from_the_header_alone() {
        let mut frame = encode(Kind::Pages, &[0; 16]);
        frame[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(Header::parse(&frame), Err(FrameError::Oversized { .. })));
    }
}

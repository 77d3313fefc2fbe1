//! `ctl inspect FILE|ID`: prints any frame, section, manifest or pack, and says whether its hash holds.
//!
//! A file is a row of frames (`proto::frame`); it is read one frame at a time, so that a pack of any size can be looked at.
//! A pack ends with the 24 bytes that find its index. A frame that is damaged is shown as such and ends the walk with exit
//! code 9. Knows messages; asks no engine.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use prost::Message as _;
use proto::frame::{self, Encoding, FrameError, HEADER_BYTES, Header, Kind, PageRun};
use proto::ids::VmId;
use proto::seal::Opener;
use proto::status::Code;
use proto::v1;
use serde::Serialize;
use serde_json::Value as Json;

use super::client::Client;
use super::failure::Failure;
use super::output::{self, Format, Report, Text};
use super::report::{Config, Digest, hex, timestamp};
use super::schema::{self, Numbers};
use super::{units, wire};
use crate::keys::ring::Ring;

/// The end of a pack: these bytes, offset and length of its index (proto/README.md 4).
const PACK_TAIL: &[u8] = b"GDWTPACK";
const PACK_TAIL_BYTES: usize = 24;

/// One frame.
#[derive(Debug, Serialize)]
struct Frame {
    offset: u64,
    kind: &'static str,
    version: String,
    body_bytes: usize,
    /// "ok", or why not.
    hash: String,
    detail: Detail,
}

/// What is in it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Detail {
    Pages { first_page: u64, pages: u32, space: u16, encoding: &'static str },
    Section { name: String, major: u32, minor: u32, ignorable: bool, bytes: usize, content: Json },
    Manifest(Box<Manifest>),
    Content { content: Json },
}

/// A manifest, without its page extents, of which there may be millions.
#[derive(Debug, Serialize)]
struct Manifest {
    version: String,
    checkpoint: String,
    vm: String,
    vm_id: String,
    generation: u64,
    created: String,
    parent: String,
    stop_us: u64,
    digest: Digest,
    config: Config,
    sections: Vec<SectionRef>,
    maps: Vec<PageMap>,
    packs: Vec<Pack>,
}

#[derive(Debug, Serialize)]
struct SectionRef {
    name: String,
    pack: u32,
    offset: u64,
    bytes: u32,
}

#[derive(Debug, Serialize)]
struct PageMap {
    space: u32,
    pages: u64,
    pages_stored: u64,
    extents: usize,
}

#[derive(Debug, Serialize)]
struct Pack {
    id: String,
    bytes: u64,
}

/// All frames of a file or object.
#[derive(Debug, Serialize)]
struct Frames {
    name: String,
    bytes: u64,
    frames: Vec<Frame>,
}

impl Report for Frames {
    fn text(&self) -> Text {
        let told = |frame: &Frame| match &frame.detail {
            Detail::Pages { first_page, pages, space, encoding } => {
                let last = first_page.saturating_add(u64::from(*pages)).saturating_sub(1);
                format!("space {space}, pages {first_page}..={last}, {encoding}")
            }
            Detail::Section { name, major, minor, bytes, .. } => format!("{name} {major}.{minor}, {bytes} bytes"),
            Detail::Manifest(manifest) => format!("checkpoint {} of {}", manifest.checkpoint, manifest.vm),
            Detail::Content { content } => summary(content),
        };
        let row = |f: &Frame| {
            let hash = if f.hash == "ok" { "ok" } else { "BAD" };
            vec![
                f.offset.to_string(),
                f.kind.to_owned(),
                f.version.clone(),
                f.body_bytes.to_string(),
                hash.to_owned(),
                told(f),
            ]
        };
        let table = Text::Rows {
            columns: vec!["offset", "kind", "version", "bytes", "hash", "what"],
            rows: self.frames.iter().map(row).collect(),
            empty: "no frames",
        };
        match self.frames.as_slice() {
            // One frame alone is shown whole.
            [one] => Text::Parts(vec![table, detail_text(&one.detail)]),
            _ => table,
        }
    }
}

fn detail_text(detail: &Detail) -> Text {
    match detail {
        Detail::Pages { .. } => Text::Parts(Vec::new()),
        Detail::Section { name, content, .. } => {
            // Registers are read in hex, counts are not.
            let numbers = if name.starts_with("cpu/") { Numbers::Hex } else { Numbers::Decimal };
            Text::Lines(schema::lines(content, numbers))
        }
        Detail::Content { content } => Text::Lines(schema::lines(content, Numbers::Decimal)),
        Detail::Manifest(manifest) => manifest.text(),
    }
}

/// One line of what has no line of its own.
fn summary(content: &Json) -> String {
    let text = match content {
        Json::String(text) => text.lines().next().unwrap_or_default().to_owned(),
        Json::Object(fields) => match (fields.get("checkpoint"), fields.get("entries")) {
            (Some(Json::String(checkpoint)), Some(Json::Array(entries))) => {
                format!("{} frames of checkpoint {checkpoint}", entries.len())
            }
            _ => fields.keys().cloned().collect::<Vec<_>>().join(", "),
        },
        other => other.to_string(),
    };
    text.chars().take(100).collect()
}

impl Manifest {
    fn text(&self) -> Text {
        let sections: Vec<_> = self.sections.iter().map(|s| format!("{} ({} bytes)", s.name, s.bytes)).collect();
        let map = |m: &PageMap| {
            format!("space {}: {} of {} pages stored, in {} extents", m.space, m.pages_stored, m.pages, m.extents)
        };
        let packs: Vec<_> = self.packs.iter().map(|p| format!("{} {}", p.id, units::show_bytes(p.bytes))).collect();
        let config = serde_yaml_ng::to_string(&self.config).unwrap_or_default();
        Text::fields([
            ("checkpoint", self.checkpoint.clone()),
            ("vm", format!("{} ({}), generation {}", self.vm, self.vm_id, self.generation)),
            ("created", self.created.clone()),
            ("parent", self.parent.clone()),
            ("stopped", units::show_ms(self.stop_us as f64 / 1000.0)),
            ("config", config),
            ("sections", sections.join("\n")),
            ("maps", self.maps.iter().map(map).collect::<Vec<_>>().join("\n")),
            ("packs", packs.join("\n")),
        ])
    }
}

/// Prints the frames of a file.
///
/// # Errors
/// The file cannot be read, holds no frame, or holds a damaged one.
pub fn file(path: &Path, keys: Option<&Path>, format: Format) -> Result<(), Failure> {
    let opener = keys.map(|keys| opener(path, keys)).transpose()?;
    let opened = File::open(path).map_err(|e| Failure::file("read", path, &e))?;
    let bytes = opened.metadata().map_err(|e| Failure::file("read", path, &e))?.len();
    print(&path.display().to_string(), bytes, BufReader::with_capacity(1 << 20, opened), opener.as_ref(), format)
}

/// What opens the sealed frames of a file of a bucket's directory: the VM's key object lies in the same folder `vms/<id>`.
fn opener(path: &Path, keys: &Path) -> Result<Opener, Failure> {
    let bad = |text: String| Failure::new(Code::BadInput, text).hint("give the file that `ctl key export` printed");
    let text = std::fs::read_to_string(keys).map_err(|e| Failure::file("read", keys, &e))?;
    let ring = Ring::parse(&text).map_err(|e| bad(format!("{}: {e}", keys.display())))?;
    let of = |folder: &Path| folder.file_name()?.to_str()?.parse::<VmId>().ok().map(|vm| (vm, folder.join("key")));
    let (vm, object) = path
        .ancestors()
        .find_map(of)
        .ok_or_else(|| bad(format!("{} does not lie in a bucket's folder of a VM", path.display())))?;
    let bytes = std::fs::read(&object).map_err(|e| Failure::file("read", &object, &e))?;
    let wrapped: v1::KeyObject = frame::decode_message(Kind::Envelope, &bytes)
        .map_err(|e| Failure::new(Code::Corrupt, format!("{}: {e}", object.display())))?;
    let key = wrapped.keys.iter().find_map(|wrapped| ring.unwrap(wrapped, vm));
    let key = key.ok_or_else(|| bad(format!("no key of {} opens {}", keys.display(), object.display())))?;
    Ok(Opener::new(key, vm))
}

/// Prints the manifest of a checkpoint.
///
/// # Errors
/// No such checkpoint, or its manifest is damaged.
pub async fn checkpoint(mut client: Client, id: &str, format: Format) -> Result<(), Failure> {
    let reply = client.get_manifest(v1::CheckpointName { id: id.to_owned() }).await.map_err(|e| {
        let failure = Failure::from_status(&format!("inspect {id:?}, which is no file here"), &e);
        if failure.code == Code::NotFound {
            failure.hint("give a file, or an id that `ctl checkpoint ls` shows")
        } else {
            failure
        }
    })?;
    let data = reply.into_inner().data;
    print(id, data.len() as u64, data.as_slice(), None, format)
}

fn print(name: &str, bytes: u64, reader: impl Read, opener: Option<&Opener>, format: Format) -> Result<(), Failure> {
    let (frames, damage) = walk(reader, opener);
    let found = frames.len();
    output::print(format, &Frames { name: name.to_owned(), bytes, frames })?;
    match damage {
        None => Ok(()),
        Some((offset, why)) => {
            Err(Failure::new(Code::Corrupt, format!("{name}: after {found} frames, at byte {offset}: {why}"))
                .hint("a whole pack or manifest is frames from its first byte to its last"))
        }
    }
}

/// Frames up to the end or the first damage, and where and what that is.
fn walk(mut reader: impl Read, opener: Option<&Opener>) -> (Vec<Frame>, Option<(u64, String)>) {
    let mut frames = Vec::new();
    let mut offset = 0;
    loop {
        match next(&mut reader, offset, opener) {
            Ok(None) => return (frames, None),
            Ok(Some((frame, bytes))) => {
                let damage = (frame.hash != "ok").then(|| (offset, frame.hash.clone()));
                frames.push(frame);
                offset += bytes;
                if damage.is_some() {
                    return (frames, damage);
                }
            }
            Err(why) => return (frames, Some((offset, why))),
        }
    }
}

fn next(reader: &mut impl Read, offset: u64, opener: Option<&Opener>) -> Result<Option<(Frame, u64)>, String> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    reader.by_ref().take(HEADER_BYTES as u64).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.len() == PACK_TAIL_BYTES && bytes.starts_with(PACK_TAIL) {
        return Ok(None);
    }
    let header = Header::parse(&bytes).map_err(|e| e.to_string())?;
    reader.by_ref().take(header.body_bytes as u64).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    let length = bytes.len() as u64;
    let mut header = header;
    // What lies inside is shown in the place of its cover.
    if let (Kind::Sealed, Some(opener)) = (header.kind, opener) {
        bytes = opener.open(&bytes).map_err(|e| e.to_string())?;
        header = Header::parse(&bytes).map_err(|e| e.to_string())?;
    }
    let (hash, detail) = match frame::decode(&bytes) {
        Ok((_, body)) => match describe(header.kind, body) {
            Ok(detail) => ("ok".to_owned(), detail),
            Err(error) => (error.to_string(), Detail::Content { content: error.to_string().into() }),
        },
        Err(error) => (error.to_string(), Detail::Content { content: error.to_string().into() }),
    };
    let frame = Frame {
        offset,
        kind: kind_word(header.kind),
        version: format!("{}.{}", header.version >> 8, header.version & 255),
        body_bytes: header.body_bytes,
        hash,
        detail,
    };
    Ok(Some((frame, length)))
}

fn kind_word(kind: Kind) -> &'static str {
    match kind {
        Kind::Section => "section",
        Kind::Pages => "pages",
        Kind::Manifest => "manifest",
        Kind::Control => "control",
        Kind::PackIndex => "pack-index",
        Kind::Journal => "journal",
        Kind::Sealed => "sealed",
        Kind::PageMap => "page-map",
        Kind::Envelope => "envelope",
        Kind::Recording => "recording",
    }
}

fn describe(kind: Kind, body: &[u8]) -> Result<Detail, FrameError> {
    let failed = |e: prost::DecodeError| FrameError::Body { kind, text: e.to_string() };
    match kind {
        Kind::Pages => {
            let (run, _) = PageRun::parse(body)?;
            let encoding = match run.encoding {
                Encoding::Raw => "raw",
                Encoding::Zero => "zero",
            };
            Ok(Detail::Pages { first_page: run.first_page, pages: run.pages, space: run.space, encoding })
        }
        Kind::Section => v1::Section::decode(body).map(section).map_err(failed),
        Kind::Manifest => v1::Manifest::decode(body).map(|m| Detail::Manifest(Box::new(manifest(m)))).map_err(failed),
        Kind::Control => Ok(Detail::Content { content: control(body) }),
        Kind::PackIndex => {
            Ok(Detail::Content { content: schema::message("PackIndex", body).unwrap_or_else(|| generic(body)) })
        }
        Kind::PageMap => {
            Ok(Detail::Content { content: schema::message("MapLayer", body).unwrap_or_else(|| generic(body)) })
        }
        Kind::Sealed => Ok(Detail::Content { content: "sealed: --keys FILE shows what is in it".into() }),
        Kind::Journal => {
            Ok(Detail::Content { content: schema::message("JournalBlock", body).unwrap_or_else(|| generic(body)) })
        }
        Kind::Recording => {
            Ok(Detail::Content { content: schema::message("ExportHead", body).unwrap_or_else(|| generic(body)) })
        }
        Kind::Envelope => Ok(Detail::Content { content: generic(body) }),
    }
}

/// A word of a lane, or on a runner's socket. A secret opens a door: it is named, not shown.
fn control(body: &[u8]) -> Json {
    let lane = v1::LaneMessage::decode(body).is_ok_and(|said| said.message.is_some());
    let mut content = match lane.then(|| schema::message("LaneMessage", body)).flatten() {
        Some(content) => content,
        None => return generic(body),
    };
    if let Some(secret) = content.pointer_mut("/hello/secret") {
        *secret = "(not shown)".into();
    }
    content
}

fn section(section: v1::Section) -> Detail {
    let mut content =
        schema::section(&section.name, section.major, &section.body).unwrap_or_else(|| generic(&section.body));
    if let Some(secret) = content.pointer_mut("/ticket/secret") {
        *secret = "(not shown)".into();
    }
    Detail::Section {
        major: section.major,
        minor: section.minor,
        ignorable: section.ignorable,
        bytes: section.body.len(),
        content,
        name: section.name,
    }
}

/// What this release has no schema of.
fn generic(body: &[u8]) -> Json {
    let text = wire::describe(body).unwrap_or_else(|| {
        let shown = hex(&body[..body.len().min(256)]);
        if body.len() > 256 { format!("{shown}... ({} bytes)", body.len()) } else { shown }
    });
    text.into()
}

fn manifest(manifest: v1::Manifest) -> Manifest {
    let map = |map: v1::PageMap| PageMap {
        space: map.space,
        pages: map.pages,
        pages_stored: map.extents.iter().map(|extent| u64::from(extent.pages)).sum(),
        extents: map.extents.len(),
    };
    let section = |s: v1::SectionRef| SectionRef { name: s.name, pack: s.pack, offset: s.offset, bytes: s.bytes };
    Manifest {
        version: format!("{}.{}", manifest.major, manifest.minor),
        checkpoint: manifest.checkpoint,
        vm: manifest.vm_name,
        vm_id: manifest.vm_id,
        generation: manifest.generation,
        created: timestamp(manifest.created_unix_ms),
        parent: manifest.parent,
        stop_us: manifest.stop_us,
        digest: manifest.digest.unwrap_or_default().into(),
        config: manifest.config.unwrap_or_default().into(),
        sections: manifest.sections.into_iter().map(section).collect(),
        maps: manifest.maps.into_iter().map(map).collect(),
        packs: manifest.packs.into_iter().map(|p| Pack { id: hex(&p.id), bytes: p.bytes }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack() -> Vec<u8> {
        let clock = v1::ClockV1 { retired: 77, skipped_tsc: 5 };
        let section = v1::Section { name: "clock".into(), major: 1, body: clock.encode_to_vec(), ..Default::default() };
        let zeros = PageRun { first_page: 3, pages: 9, space: 1, encoding: Encoding::Zero };
        let mut run = zeros.begin();
        frame::seal(&mut run);
        [frame::encode_message(Kind::Section, &section), run].concat()
    }

    #[test]
    fn every_frame_of_a_pack_is_told() {
        let (frames, damage) = walk(pack().as_slice(), None);
        assert_eq!(damage, None);
        let text = Frames { name: "pack".into(), bytes: 0, frames }.text().render();
        assert!(text.contains("clock 1.0") && text.contains("space 1, pages 3..=11, zero"), "{text}");
    }

    #[test]
    fn damage_is_told_with_its_place() {
        let mut bytes = pack();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        let (frames, damage) = walk(bytes.as_slice(), None);
        let (offset, why) = damage.unwrap();
        assert_eq!((frames.len(), offset), (2, frames[1].offset));
        assert!(why.contains("does not match its hash"), "{why}");
        let (frames, damage) = walk(&pack()[..pack().len() - 1], None);
        assert!(frames.len() == 2 && damage.unwrap().1.contains("cut"));
        assert!(walk(&b"#!/bin/sh\n"[..], None).1.is_some());
    }

    #[test]
    fn every_golden_file_is_told_to_its_end() {
        let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto/tests/golden/v1");
        let mut told = 0;
        for file in std::fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path()) {
            let (frames, damage) = walk(std::fs::read(&file).unwrap().as_slice(), None);
            assert_eq!(damage, None, "{}", file.display());
            let json = serde_json::to_string(&frames).unwrap();
            let text = Frames { name: String::new(), bytes: 0, frames }.text().render();
            // Secrets of tickets open doors.
            assert!(!json.contains("\"secret\":\"0") && !text.is_empty(), "{json}");
            told += 1;
        }
        assert!(told >= 16);
        let pack =
            std::fs::read(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto/tests/golden/v1/pack.bin"));
        let (frames, _) = walk(pack.unwrap().as_slice(), None);
        let text = Frames { name: String::new(), bytes: 0, frames }.text().render();
        assert!(text.contains("2 frames of checkpoint 0123456789abcdef"), "{text}");
    }

    #[test]
    fn one_section_alone_is_shown_whole() {
        let (mut frames, _) = walk(pack().as_slice(), None);
        frames.truncate(1);
        let text = Frames { name: "section".into(), bytes: 0, frames }.text().render();
        assert!(text.contains("retired: 77"), "{text}");
    }
}

//! A checkpoint for a tool outside of the cluster: its pages as frames, region by region, opened and checked.
//!
//! The same proof as for a restore: every page has the digest that the manifest's tree states. One region's map and one
//! pack are in memory at a time, however large the guest is, and the reader's pace is ours. Who asked, and what becomes of
//! the frames, is not known here.

use std::iter::zip;

use proto::status::Code;
use proto::v1::export_message::Message as Said;
use proto::v1::{Chunk, ExportMessage, MapRegion};
use tokio::sync::mpsc;
use tonic::Status;

use super::assembly::spaces;
use super::load::take_frames;
use super::manifest::{pack_key, regions};
use super::map::{Extent, Region};
use super::read::{Opened, Reader, by_pack, pages_beside};
use crate::failure::Failure;

/// Where an export goes.
pub type Outgoing = mpsc::Sender<Result<ExportMessage, Status>>;

/// Sends a message.
///
/// # Errors
/// [`Code::Cancelled`] if nobody listens any more.
pub async fn say(out: &Outgoing, said: Said) -> Result<(), Failure> {
    let gone = |_| Failure::new(Code::Cancelled, "nobody listens to the export any more");
    out.send(Ok(ExportMessage { message: Some(said) })).await.map_err(gone)
}

/// Which of the spaces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// RAM alone.
    Ram,
    /// RAM, local disks and the boot image.
    All,
}

impl Wanted {
    fn has(self, space: u32) -> bool {
        self == Wanted::All || space == 0
    }
}

/// How many pages will come.
pub fn pages_of(opened: &Opened, wanted: Wanted) -> u64 {
    let manifest = &opened.manifest;
    let map = |map: &proto::v1::PageMap| map.extents.iter().map(|extent| u64::from(extent.pages)).sum::<u64>();
    let maps = manifest.maps.iter().filter(|map| wanted.has(map.space)).map(map);
    let region = |region: &MapRegion| region.packs.iter().map(|usage| u64::from(usage.pages)).sum::<u64>();
    let regions = manifest.regions.iter().filter(|region| wanted.has(region.space)).map(region);
    maps.chain(regions).sum()
}

/// Sends all pages that are not zero; how many.
///
/// # Errors
/// [`Code::Corrupt`] naming what is damaged, the bucket's, or as [`say`].
pub async fn send(reader: &Reader, opened: &Opened, wanted: Wanted, out: &Outgoing) -> Result<u64, Failure> {
    let manifest = &opened.manifest;
    if manifest.major == 1 {
        let mut extents = reader.extents(opened).await?;
        extents.retain(|extent| wanted.has(extent.space.into()));
        return send_extents(reader, opened, extents, out).await;
    }
    let spaces = manifest.config.as_ref().map(spaces).unwrap_or_default();
    let mut sent = 0;
    for ((space, first_page, pages), stated) in zip(regions(&spaces), &manifest.regions) {
        if wanted.has(space) && !stated.layers.is_empty() {
            let region = reader.region(opened, stated, Region::zero(space, first_page, pages)).await?;
            sent += send_extents(reader, opened, region.extents(), out).await?;
        }
    }
    Ok(sent)
}

async fn send_extents(reader: &Reader, opened: &Opened, extents: Vec<Extent>, out: &Outgoing) -> Result<u64, Failure> {
    let mut sent = 0;
    for (pack, extents) in by_pack(extents) {
        let key = pack_key(&opened.manifest, &pack);
        let pieces = reader.pieces(&key, &pack, &extents).await?;
        let mut rest = &extents[..];
        while !rest.is_empty() {
            let group = take_frames(&mut rest).to_vec();
            sent += group.iter().map(|extent| u64::from(extent.pages)).sum::<u64>();
            let (opener, key, pieces) = (opened.opener.clone(), key.clone(), pieces.clone());
            for (_, frame) in pages_beside(opener, key, pieces, group).await? {
                say(out, Said::Pages(Chunk { frame })).await?;
            }
        }
    }
    Ok(sent)
}

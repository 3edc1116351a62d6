//! Merged segments: one file that stands for several, of epochs between which nothing begins.

use super::batch::{BatchBuilder, DESCRIPTORS_MAX};
use super::format::{
    BATCH_BLOCKS_MAX, BATCH_HEADER_BYTES, DESCRIPTOR_BYTES, Kind, LOST_AT_SOURCE, MergedHeader,
    PAGE, Position, SegmentHeader,
};
use super::writer::{Segments, segment_name};
use crate::index::entry::Entry;
use crate::number::to_u64;
use crate::sabotage::{Rule, is_broken};
use std::io;

/// The name of a merged segment until all of it is durable.
pub fn unfinished_name(segment: u32) -> String {
    format!("{segment:08x}.new")
}

/// True for names of merged segments that were not finished.
pub fn is_unfinished(name: &str) -> bool {
    name.strip_suffix(".new").is_some_and(|digits| digits.len() == 8)
}

/// What a merged segment is to be.
pub struct Plan<'a> {
    /// Its header, the end apart.
    pub header: SegmentHeader,
    /// The epoch header of the first epoch.
    pub epoch_header: &'a [u8],
    /// Bytes a block.
    pub block_size: u64,
    /// What is recorded, ascending, no block twice; positions are those of the old segments.
    pub entries: &'a [Entry],
}

/// Extents too long for one descriptor take two.
fn descriptors_max(part: &[Entry]) -> usize {
    (2 * part.len()).min(DESCRIPTORS_MAX)
}

impl Plan<'_> {
    /// Bytes the segment takes at most.
    pub fn bytes_max(&self) -> u64 {
        let kept = self.entries.iter().filter(|entry| entry.kind == Kind::Preserve).count();
        let head_pages = |part: &[Entry]| {
            let head = BATCH_HEADER_BYTES + descriptors_max(part) * DESCRIPTOR_BYTES;
            to_u64(head).div_ceil(PAGE)
        };
        let heads: u64 = self.parts().map(head_pages).sum();
        (self.header.data_start_page() + 2 * heads) * PAGE + to_u64(kept) * self.block_size
    }

    /// What each batch records. One without records is last: nobody takes the payload of the one
    /// before for a torn one.
    fn parts(&self) -> impl Iterator<Item = &[Entry]> {
        self.entries.chunks(BATCH_BLOCKS_MAX).chain(std::iter::once(&[][..]))
    }
}

/// Write a merged segment; when this returns it is complete and durable, and stands for those it was
/// made from. Tells its entries, with the new positions. `read` gives old content, checked.
pub fn write_merged(
    segments: &Segments,
    plan: &Plan<'_>,
    mut read: impl FnMut(&Entry, &mut [u8]) -> io::Result<()>,
) -> io::Result<Vec<Entry>> {
    let mut header = plan.header;
    let (number, epoch) = (header.segment, header.epoch);
    let name = unfinished_name(number);
    let file = segments.directory().create(&name)?;
    let mut batch = BatchBuilder::new(header.uuid, plan.block_size);
    let mut page = header.data_start_page();
    let mut written = Vec::with_capacity(plan.entries.len());
    for (sequence, part) in (header.first_batch..).zip(plan.parts()) {
        batch.begin(epoch, descriptors_max(part));
        for entry in part {
            if entry.kind == Kind::Preserve {
                read(entry, batch.room(1))?;
                batch.keep(entry.blocks);
            } else if entry.kind == Kind::Lost && entry.checksum == LOST_AT_SOURCE {
                batch.note_lost_at_source(entry.blocks);
            } else {
                batch.note(entry.kind, entry.blocks);
            }
        }
        let first = u32::try_from(page).expect("a segment is bounded");
        written.extend(batch.preserved().iter().map(|kept| Entry {
            blocks: crate::extent::Extent::single(kept.block),
            epoch,
            kind: Kind::Preserve,
            position: Position::new(number, first + kept.page),
            checksum: kept.checksum,
        }));
        let bare = batch.descriptors().iter().filter(|d| d.kind != Kind::Preserve);
        written.extend(
            bare.map(|d| Entry { checksum: d.checksum, ..Entry::bare(d.kind, epoch, d.blocks) }),
        );
        let bytes = batch.finish(sequence);
        file.write_at(page * PAGE, bytes)?;
        page += to_u64(bytes.len()) / PAGE;
    }
    let end_page = u32::try_from(page).expect("a segment is bounded");
    let places = header.places();
    header.merged = Some(MergedHeader { first: *places.start(), last: *places.end(), end_page });
    let mut copy = header.encode();
    copy.extend_from_slice(plan.epoch_header);
    copy.resize(copy.len().next_multiple_of(crate::number::to_usize(PAGE)), 0);
    file.write_slices_at(0, &[&copy, &copy])?;
    // The name says that all of it is there: it comes after the sync.
    file.sync()?;
    segments.directory().rename(&name, &segment_name(number))?;
    if !is_broken(Rule::MergedNameDurable) {
        segments.directory().sync()?;
    }
    Ok(written)
}

//! Reading the log back: what was recorded, where it ends, and whether something in it is damaged.
//!
//! A batch that is not intact is the *torn tail* if nothing valid follows it: its sync never
//! returned, so nothing that depended on it happened. With something valid after it, it is
//! *damage*: its blocks are unknown, and whoever would read them from the origin gets an error
//! instead (P2).

use super::format::{
    BATCH_BLOCKS_MAX, BatchHeader, Descriptor, EpochHeader, Kind, PAGE, Position, SegmentError,
    SegmentHeader, payload_checksum,
};
use super::writer::{LogEnd, Segments, segment_number};
use crate::bitmap::Bitmap;
use crate::extent::{Extent, ExtentSet};
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use crate::storage::Storage;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

/// One intact batch.
#[derive(Debug, Clone)]
pub struct FoundBatch {
    /// Its header.
    pub header: BatchHeader,
    /// Its records.
    pub descriptors: Vec<Descriptor>,
    /// Segment and page of its first byte.
    pub segment: u32,
    /// See `segment`.
    pub page: u64,
}

impl FoundBatch {
    /// Its preserved blocks with the place of their payload.
    pub fn preserved(&self, block_size: u64) -> impl Iterator<Item = (u64, Position, u32)> + '_ {
        let payload = self.page + u64::from(self.header.head_pages);
        let pages_a_block = block_size / PAGE;
        let kept = self.descriptors.iter().filter(|d| d.kind == Kind::Preserve);
        kept.enumerate().map(move |(index, descriptor)| {
            let page = u32::try_from(payload + to_u64(index) * pages_a_block);
            let position = Position::new(self.segment, page.expect("a segment is bounded"));
            (descriptor.blocks.start, position, descriptor.checksum)
        })
    }
}

/// A segment with an intact header.
#[derive(Debug)]
pub struct FoundSegment {
    /// Its header.
    pub header: SegmentHeader,
    /// The epoch header, in the first segment of an epoch.
    pub epoch_header: Option<EpochHeader>,
}

/// Records that are gone: which they were is not known, only where they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loss {
    /// In which segment.
    pub segment: u32,
    /// The first epoch they may have been of. A segment that is gone may have gone on with the
    /// epoch of the one before it.
    pub first: u32,
    /// The last one.
    pub last: u32,
}

/// The blocks of REGION records, of the batches of one epoch in order, whose changes are not
/// recorded.
pub fn open_regions(batches: &[FoundBatch], block_count: u64) -> ExtentSet {
    let is_of_regions = |d: &&Descriptor| matches!(d.kind, Kind::Region | Kind::RegionEnd);
    let mut told = batches.iter().flat_map(|b| &b.descriptors).filter(is_of_regions).peekable();
    if told.peek().is_none() {
        return ExtentSet::new();
    }
    let (mut open, disk) = (Bitmap::new(block_count), Extent::new(0, block_count));
    for descriptor in told {
        open.assign(descriptor.blocks.intersection(disk), descriptor.kind == Kind::Region);
    }
    open.to_set()
}

/// All that is in a log.
#[derive(Debug, Default)]
pub struct Scan {
    /// Segments in the order of the log: by the first number they stand for.
    pub segments: BTreeMap<u32, FoundSegment>,
    /// Intact batches in the order they were written: all of them, or those of the open epoch.
    pub batches: Vec<FoundBatch>,
    /// Segments that lost a batch, with the page where it began.
    pub damaged: Vec<(u32, u64)>,
    /// Files without an intact header that hold nothing: instants that never came.
    pub unfinished: Vec<u32>,
    /// Files without an intact header that hold no record and may have held an instant.
    pub headerless: Vec<u32>,
    /// Files without an intact header that do hold records, with the epoch those are of.
    pub unreadable: Vec<(u32, u32)>,
    /// Files that others name as their predecessors and that are not there, or hold nothing.
    pub missing: Vec<Loss>,
    /// Files that a merged segment stands for, which were to be removed.
    pub superseded: Vec<u32>,
    /// Where to go on.
    pub end: LogEnd,
}

impl Scan {
    /// The log was closed before the batch `next_batch`; if it ends earlier now, its tail is gone.
    pub fn expect_end(&mut self, next_batch: u64) {
        let last = self.segment(self.end.segment).map(|s| s.header);
        if let Some(last) = last.filter(|_| self.end.next_sequence < next_batch) {
            let (segment, epoch) = (self.end.segment_max + 1, last.epoch);
            self.missing.push(Loss { segment, first: epoch, last: epoch });
        }
    }

    /// These instants are on record elsewhere, and their headers are not here. What has no header
    /// may be their segments, so it is kept; unless the log was closed, and ends where it was
    /// closed, records may have gone with them.
    pub fn expect_instants(&mut self, vanished: &BTreeSet<u32>, closed: Option<u64>) {
        let Some(&last) = vanished.last() else { return };
        let kept = std::mem::take(&mut self.unfinished);
        self.headerless.extend(kept);
        let is_whole = closed.is_some_and(|next_batch| self.end.next_sequence >= next_batch);
        if is_whole || self.end.epoch > last {
            // Every batch is there, or a later segment tells what is missing before it.
            return;
        }
        let segment = self.headerless.last().copied().unwrap_or(self.end.segment + 1);
        self.missing.push(Loss { segment, first: self.end.epoch.max(1).min(last), last });
    }

    /// Where records are gone.
    pub fn losses(&self) -> impl Iterator<Item = Loss> + '_ {
        let of = |segment, epoch| Loss { segment, first: epoch, last: epoch };
        let damaged = self
            .damaged
            .iter()
            .filter_map(move |(at, _)| Some(of(*at, self.segment(*at)?.header.epoch)));
        let unreadable = self.unreadable.iter().map(move |&(segment, epoch)| of(segment, epoch));
        damaged.chain(unreadable).chain(self.missing.iter().copied())
    }
}

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The store's disk failed.
    #[error("cannot read the log: {0}")]
    Io(#[from] io::Error),
    /// Written by a newer version of the program.
    #[error("log segment {segment:08x}: {error}")]
    Version {
        /// Which file.
        segment: u32,
        /// What it says.
        error: SegmentError,
    },
}

/// Read the whole log. Writes nothing. `aborted` are instants that failed: what is left of their
/// headers says nothing, least of all where the segment before ends, since that went on.
pub fn scan(
    segments: &Segments,
    uuid: [u8; 16],
    block_size: u64,
    aborted: &ExtentSet,
) -> Result<Scan, ScanError> {
    let mut found = scan_headers(segments, uuid, aborted)?;
    for numbers in found.epochs().into_values() {
        let mut batches = found.read_epoch(segments, uuid, &numbers)?;
        found.batches.append(&mut batches);
    }
    found.cut_torn_payload(segments, block_size)?;
    Ok(found)
}

/// Read the headers of all segments. Writes nothing.
pub fn scan_headers(
    segments: &Segments,
    uuid: [u8; 16],
    aborted: &ExtentSet,
) -> Result<Scan, ScanError> {
    let mut found = Scan::default();
    let names = segments.directory().list()?;
    let mut numbers: Vec<u32> = names.iter().filter_map(|n| segment_number(n)).collect();
    numbers.sort_unstable();
    let mut headers = Vec::new();
    for &segment in &numbers {
        found.end.segment_max = found.end.segment_max.max(segment);
        let reader = PageReader::new(segments.get(segment)?)?;
        match read_header(&reader) {
            Ok((header, _)) if header.uuid == uuid && aborted.contains(header.epoch.into()) => {
                found.unfinished.push(segment);
            }
            Ok((header, epoch_header)) if header.uuid == uuid && header.segment == segment => {
                headers.push(FoundSegment { header, epoch_header });
            }
            Err(error @ SegmentError::Version(_)) => {
                return Err(ScanError::Version { segment, error });
            }
            Ok(_) | Err(_) => {
                let epoch = reader.epoch_of_batches(uuid);
                reader.check()?;
                match epoch {
                    Some(epoch) => found.unreadable.push((segment, epoch)),
                    None => found.unfinished.push(segment),
                }
            }
        }
    }
    put_in_order(&mut found, headers);
    find_missing(&mut found);
    Ok(found)
}

/// The latest merged segment that stands for a number tells what is in it.
fn put_in_order(found: &mut Scan, headers: Vec<FoundSegment>) {
    for segment in headers.into_iter().rev() {
        let (number, places) = (segment.header.segment, segment.header.places());
        if found.standing_for(*places.start()).is_some() {
            found.superseded.push(number);
        } else {
            found.segments.insert(*places.start(), segment);
        }
    }
    let mut unreadable = std::mem::take(&mut found.unreadable);
    unreadable.retain(|&(number, epoch)| {
        // It may have been a merged one, whose place was before its number.
        let is_superseded =
            found.standing_for(number).is_some_and(|standing| standing.header.epoch <= epoch);
        if is_superseded {
            found.superseded.push(number);
        }
        !is_superseded
    });
    found.unreadable = unreadable;
}

/// Whole epochs are removed from the front of the log once nobody needs them; any other gap is a
/// loss.
fn find_missing(found: &mut Scan) {
    let numbers: BTreeSet<u32> = found.segments.values().map(|s| s.header.segment).collect();
    let is_there = |segment: u32| {
        numbers.contains(&segment)
            || found.standing_for(segment).is_some()
            || found.unreadable.iter().any(|u| u.0 == segment)
    };
    let pairs = found.segments.values().zip(found.segments.values().skip(1));
    let broken = pairs.filter(|(_, after)| !is_there(after.header.previous_segment));
    found.missing = broken
        .map(|(before, after)| {
            let (first, header) = (before.header.epoch, after.header);
            let is_same_epoch = header.ordinal > 0;
            let last = if is_same_epoch { header.epoch } else { header.epoch.saturating_sub(1) };
            Loss { segment: header.previous_segment, first: first.min(last), last }
        })
        .collect();
}

impl Scan {
    /// Every epoch, with its segments in the order they were written.
    pub fn epochs(&self) -> BTreeMap<u32, Vec<u32>> {
        let mut epochs: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for segment in self.segments.values() {
            epochs.entry(segment.header.epoch).or_default().push(segment.header.segment);
        }
        epochs
    }

    /// The segment that stands for a number.
    fn standing_for(&self, number: u32) -> Option<&FoundSegment> {
        let (_, found) = self.segments.range(..=number).next_back()?;
        found.header.places().contains(&number).then_some(found)
    }

    /// The segment with this number of its own.
    pub fn segment(&self, number: u32) -> Option<&FoundSegment> {
        let plain = self.segments.get(&number).filter(|s| s.header.segment == number);
        plain.or_else(|| self.segments.values().find(|s| s.header.segment == number))
    }

    /// Read the batches of an epoch's segments. Epochs are read in order, and the last one always,
    /// since it tells where to go on.
    pub fn read_epoch(
        &mut self,
        segments: &Segments,
        uuid: [u8; 16],
        numbers: &[u32],
    ) -> Result<Vec<FoundBatch>, ScanError> {
        let mut batches = Vec::new();
        for &segment in numbers {
            self.read_segment(segments, uuid, segment, &mut batches)?;
        }
        Ok(batches)
    }

    fn read_segment(
        &mut self,
        segments: &Segments,
        uuid: [u8; 16],
        segment: u32,
        batches: &mut Vec<FoundBatch>,
    ) -> Result<(), ScanError> {
        let Some(header) = self.segment(segment).map(|s| s.header) else { return Ok(()) };
        // Where it was closed, as it says itself or the one after it does.
        let later = self.segments.range(header.places().end() + 1..);
        // The file of the next epoch may be older than the last one of this.
        let mut others = later.chain(self.segments.range(..header.places().start()));
        let end_page = match header.merged {
            Some(merged) => Some(merged.end_page),
            None => others
                .find(|(_, s)| s.header.previous_segment == segment)
                .map(|(_, s)| s.header.previous_end_page),
        };
        let end_page = end_page.map(u64::from);
        let reader = PageReader::new(segments.get(segment)?)?;
        let mut cursor = Cursor {
            reader: &reader,
            uuid,
            epoch: header.epoch,
            expected: header.first_batch,
            page: header.data_start_page(),
            limit: end_page.unwrap_or(reader.pages).min(reader.pages),
        };
        while cursor.page < cursor.limit {
            let start = cursor.page;
            match cursor.next_batch() {
                Step::Batch(header, descriptors) => {
                    batches.push(FoundBatch { header, descriptors, segment, page: start });
                }
                Step::Damage => {
                    reader.check()?;
                    self.damaged.push((segment, start));
                }
                Step::End => {
                    reader.check()?;
                    break;
                }
            }
        }
        // A segment that was closed at a page and ends before it lost its last batches.
        if end_page.is_some_and(|end| cursor.page < end) {
            self.damaged.push((segment, cursor.page));
        }
        self.end.next_sequence = self.end.next_sequence.max(cursor.expected);
        // Not the highest number: the old epoch may have had to go on in a new segment when that of
        // the next one had been made already.
        if (header.epoch, header.ordinal) >= (self.end.epoch, self.end.ordinal) {
            self.end.segment = segment;
            self.end.epoch = header.epoch;
            self.end.ordinal = header.ordinal;
            self.end.page = cursor.page;
            self.end.is_closed = header.merged.is_some();
            self.end.takes_regions = header.takes_regions;
            let last = batches.last().filter(|batch| batch.segment == segment);
            self.end.last_page = last.map_or(0, |batch| batch.page);
        }
        Ok(())
    }

    /// In an unsynced tail any subset of sectors may have survived: the last batch counts only if
    /// its payload is intact. To be called when the last epoch was read, with its batches in
    /// [`Self::batches`].
    pub fn cut_torn_payload(&mut self, segments: &Segments, block_size: u64) -> io::Result<()> {
        let Some(last) = self.batches.last() else { return Ok(()) };
        let is_at_end = last.segment == self.end.segment
            && last.page + last.header.total_pages() == self.end.page;
        if !is_at_end {
            return Ok(());
        }
        let mut content = vec![0; to_usize(block_size)];
        let mut is_torn = false;
        for (block, position, checksum) in last.preserved(block_size) {
            let end = position.offset_bytes() + block_size;
            if segments.get(position.segment())?.len()? < end {
                is_torn = true;
                break;
            }
            segments.read(position, &mut content)?;
            is_torn |= payload_checksum(block, last.header.epoch, &content) != checksum;
        }
        if is_torn && !is_broken(Rule::LastBatchVerified) {
            if !is_broken(Rule::TornTailCut) {
                self.end.page = last.page;
                // What was before it had been synced.
                self.end.last_page = last.page;
            }
            self.end.next_sequence = last.header.sequence;
            self.batches.pop();
        }
        Ok(())
    }
}

/// True if a segment file without a header holds no record: an instant that never came.
pub fn is_without_batches(file: &Arc<dyn Storage>, uuid: [u8; 16]) -> io::Result<bool> {
    let reader = PageReader::new(Arc::clone(file))?;
    let is_without = reader.epoch_of_batches(uuid).is_none();
    reader.check()?;
    Ok(is_without)
}

pub(super) enum Step {
    Batch(BatchHeader, Vec<Descriptor>),
    Damage,
    End,
}

pub(super) struct Cursor<'a> {
    pub(super) reader: &'a PageReader,
    pub(super) uuid: [u8; 16],
    pub(super) epoch: u32,
    pub(super) expected: u64,
    pub(super) page: u64,
    pub(super) limit: u64,
}

impl Cursor<'_> {
    /// Take what begins at `page`, and move behind it.
    pub(super) fn next_batch(&mut self) -> Step {
        let at_head = self.intact(false, self.page).map(|found| (self.page, found));
        let found = at_head.or_else(|| self.search_tail());
        if let Some((_, (header, descriptors))) = found {
            self.expected = header.sequence + 1;
            self.page += header.total_pages();
            return Step::Batch(header, descriptors);
        }
        match self.search_later() {
            Some(page) => {
                self.page = page;
                Step::Damage
            }
            None => Step::End,
        }
    }

    fn intact(&self, is_tail: bool, page: u64) -> Option<(BatchHeader, Vec<Descriptor>)> {
        let head = self.reader.page(page).ok()?;
        let header = BatchHeader::decode(is_tail, &head)?;
        let is_ours = header.uuid == self.uuid
            && header.epoch == self.epoch
            && header.sequence >= self.expected
            && header.payload_pages <= u32::try_from(BATCH_BLOCKS_MAX * 16).ok()?;
        if !is_ours {
            return None;
        }
        let head = self.reader.pages(page, u64::from(header.head_pages)).ok()?;
        let descriptors = header.descriptors(&head)?;
        Some((header, descriptors))
    }

    /// The batch at `page` by its tail, its head being unreadable.
    fn search_tail(&self) -> Option<(u64, (BatchHeader, Vec<Descriptor>))> {
        let end = self.limit.min(self.page + BATCH_PAGES_MAX);
        (self.page + 1..end).find_map(|page| {
            let found = self.intact(true, page)?;
            let start =
                (page + u64::from(found.0.head_pages)).checked_sub(found.0.total_pages())?;
            (start == self.page).then_some((self.page, found))
        })
    }

    /// The first page after this one where an intact batch begins.
    fn search_later(&self) -> Option<u64> {
        (self.page + 1..self.limit).find(|&page| self.intact(false, page).is_some())
    }
}

/// Pages of the largest batch: blocks of 64 KiB, with head and tail.
const BATCH_PAGES_MAX: u64 = (BATCH_BLOCKS_MAX as u64) * 16 + 32;

pub(super) struct PageReader {
    file: Arc<dyn Storage>,
    pub(super) pages: u64,
    /// The first read that the device failed.
    failure: std::cell::RefCell<Option<io::Error>>,
}

impl PageReader {
    pub(super) fn new(file: Arc<dyn Storage>) -> io::Result<Self> {
        let pages = file.len()? / PAGE;
        Ok(Self { file, pages, failure: std::cell::RefCell::default() })
    }

    /// An error if the device failed a read. What could not be read is neither torn nor damaged nor
    /// the end: it may be there the next time, and records made meanwhile would be in its place. A
    /// second copy that was read is good enough, so this is asked where something was not found.
    fn check(&self) -> io::Result<()> {
        self.failure.take().map_or(Ok(()), Err)
    }

    fn page(&self, page: u64) -> io::Result<Vec<u8>> {
        self.pages(page, 1)
    }

    pub(super) fn pages(&self, page: u64, count: u64) -> io::Result<Vec<u8>> {
        if page + count > self.pages {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; to_usize(count * PAGE)];
        if let Err(error) = self.file.read_at(page * PAGE, &mut bytes) {
            let kind = error.kind();
            self.failure.borrow_mut().get_or_insert(error);
            return Err(kind.into());
        }
        Ok(bytes)
    }

    /// The epoch of the first intact batch of the volume on any page.
    fn epoch_of_batches(&self, uuid: [u8; 16]) -> Option<u32> {
        (0..self.pages).find_map(|page| {
            let bytes = self.page(page).ok()?;
            let mut headers =
                [false, true].into_iter().filter_map(|tail| BatchHeader::decode(tail, &bytes));
            headers.find(|header| header.uuid == uuid).map(|header| header.epoch)
        })
    }
}

pub(super) type Headers = (SegmentHeader, Option<EpochHeader>);

/// The segment's header and epoch header from the first intact copy.
fn read_header(reader: &PageReader) -> Result<Headers, SegmentError> {
    let mut last = SegmentError::NotASegment;
    if reader.pages == 0 {
        return Err(last);
    }
    match read_header_at(reader, 0) {
        Ok(found) => return Ok(found),
        Err(error @ SegmentError::Version(_)) => return Err(error),
        Err(error) => last = error,
    }
    // The second copy follows the first, whose length is not known now.
    for page in 1..reader.pages {
        match read_header_at(reader, page) {
            Err(SegmentError::NotASegment) => {}
            Ok(found) => return Ok(found),
            Err(error) => last = error,
        }
    }
    Err(last)
}

pub(super) fn read_header_at(reader: &PageReader, page: u64) -> Result<Headers, SegmentError> {
    let bytes = reader.page(page).map_err(|_| SegmentError::Damaged)?;
    let header = SegmentHeader::decode(&bytes)?;
    if header.ordinal != 0 {
        return Ok((header, None));
    }
    let length = u64::from(header.epoch_header_bytes);
    let blob = reader.pages(page + 1, length.div_ceil(PAGE)).map_err(|_| SegmentError::Damaged)?;
    let blob = &blob[..to_usize(length)];
    if crc32c::crc32c(blob) != header.epoch_header_crc {
        return Err(SegmentError::Damaged);
    }
    Ok((header, Some(EpochHeader::decode(blob)?)))
}

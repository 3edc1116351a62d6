//! Appending to the log: batch *k+1* is submitted only after the sync of batch *k* returned.

use super::batch::BatchBuilder;
use super::format::{Kind, PAGE, Position, SegmentHeader};
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use crate::storage::{Directory, Storage};
use crate::sync::RwLock;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

/// Pages of a segment file: 64 MiB, so that a year of small epochs and one huge one both have few
/// files.
const SEGMENT_PAGES: u64 = (64 << 20) / PAGE;
/// Pages kept for batches without payload, behind the room for originals: what was lost, what a
/// restore brought back, and the seal before space is given back must be said on a full store.
pub const MARK_PAGES: u64 = 32;
/// Of these for the seal alone: without it nothing could be deleted.
const SEAL_PAGES: u64 = 2;

/// Segment files that are open at once, beside those in use: far below what a process may have.
const OPEN_MAX: usize = 128;

/// The file name of a segment.
pub fn segment_name(segment: u32) -> String {
    format!("{segment:08x}.seg")
}

/// The number in a segment's file name.
pub fn segment_number(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".seg")?;
    if digits.len() == 8 { u32::from_str_radix(digits, 16).ok() } else { None }
}

/// The open segment files, shared by the committer and all readers.
pub struct Segments {
    directory: Arc<dyn Directory>,
    open: RwLock<HashMap<u32, Arc<dyn Storage>>>,
}

impl Segments {
    /// Those in `directory`.
    pub fn new(directory: Arc<dyn Directory>) -> Self {
        Self { directory, open: RwLock::default() }
    }

    /// The directory they lie in.
    pub fn directory(&self) -> &dyn Directory {
        &*self.directory
    }

    /// The file of a segment, opened if it is not.
    pub fn get(&self, segment: u32) -> io::Result<Arc<dyn Storage>> {
        if let Some(file) = self.open.read().get(&segment) {
            return Ok(Arc::clone(file));
        }
        let file = self.directory.open(&segment_name(segment))?;
        self.remember(segment, &file);
        Ok(file)
    }

    /// Read preserved content.
    pub fn read(&self, position: Position, buffer: &mut [u8]) -> io::Result<()> {
        self.get(position.segment())?.read_at(position.offset_bytes(), buffer)
    }

    fn create(&self, segment: u32) -> io::Result<Arc<dyn Storage>> {
        let file = self.directory.create(&segment_name(segment))?;
        if !is_broken(Rule::NameDurable) {
            self.directory.sync()?;
        }
        self.remember(segment, &file);
        Ok(file)
    }

    fn remember(&self, segment: u32, file: &Arc<dyn Storage>) {
        let mut open = self.open.write();
        if open.len() >= OPEN_MAX {
            // Any one: whoever reads it keeps it, and opening it again is cheap.
            let other = open.keys().next().copied();
            other.map(|other| open.remove(&other));
        }
        open.insert(segment, Arc::clone(file));
    }

    /// Remove a segment's file; its space goes back at once.
    pub fn remove(&self, segment: u32) -> io::Result<()> {
        self.open.write().remove(&segment);
        self.directory.remove(&segment_name(segment))
    }
}

struct Current {
    segment: u32,
    file: Arc<dyn Storage>,
    epoch: u32,
    ordinal: u32,
    /// Where the next batch goes: the end of the last durable one.
    page: u64,
    /// Pages up to which space is allocated: nothing is written beyond.
    allocated: u64,
    /// Readers of its version know REGION records.
    takes_regions: bool,
    /// A write or sync failed: nothing after `page` is trusted, nothing more goes here.
    is_broken: bool,
}

/// A segment file that exists but has no header yet: an instant that may still not come.
struct Prepared {
    segment: u32,
    file: Arc<dyn Storage>,
    allocated: u64,
}

impl Prepared {
    /// Pages of originals it has space for, behind a header of this length.
    fn room_pages(&self, header_bytes: u64) -> u64 {
        self.allocated.saturating_sub(data_start_page(header_bytes) + MARK_PAGES)
    }
}

fn data_start_page(header_bytes: u64) -> u64 {
    2 * (1 + header_bytes.div_ceil(PAGE))
}

/// The one writer of the log; owned by whoever holds the committer role.
pub struct LogWriter {
    uuid: [u8; 16],
    segments: Arc<Segments>,
    current: Option<Current>,
    /// The segment of the next epoch. The log's order is that of the numbers: if a batch of this
    /// epoch needs another segment before the instant, it gets this one, and the epoch a new one.
    prepared: Option<Prepared>,
    /// Its header was written and may or may not be durable.
    is_in_doubt: bool,
    next_segment: u32,
    next_sequence: u64,
    previous: (u32, u32),
    appended_bytes: u64,
    /// The last batch has payload, which a scan will verify.
    is_open_ended: bool,
}

/// Where a scan found the end of the log.
#[derive(Debug, Clone, Copy, Default)]
pub struct LogEnd {
    /// The last segment, its epoch and ordinal; number 0 if there is none.
    pub segment: u32,
    /// Its epoch.
    pub epoch: u32,
    /// Its ordinal in the epoch.
    pub ordinal: u32,
    /// Page after its last durable batch.
    pub page: u64,
    /// Page of that batch; 0 if there is none, which takes in the segment's header.
    pub last_page: u64,
    /// Sequence number the next batch gets.
    pub next_sequence: u64,
    /// Highest segment number seen in the directory.
    pub segment_max: u32,
    /// Nothing more can be appended to the last segment.
    pub is_closed: bool,
    /// Readers of its version know REGION records.
    pub takes_regions: bool,
}

impl LogWriter {
    /// Go on at the end that a scan found.
    pub fn new(uuid: [u8; 16], segments: Arc<Segments>, end: LogEnd) -> io::Result<Self> {
        let current = if end.segment == 0 {
            None
        } else {
            Some(Current {
                segment: end.segment,
                file: segments.get(end.segment)?,
                epoch: end.epoch,
                ordinal: end.ordinal,
                page: end.page,
                allocated: end.page,
                takes_regions: end.takes_regions,
                is_broken: end.is_closed,
            })
        };
        Ok(Self {
            uuid,
            segments,
            current,
            prepared: None,
            is_in_doubt: false,
            next_segment: end.segment_max + 1,
            next_sequence: end.next_sequence.max(1),
            previous: (0, 0),
            appended_bytes: 0,
            is_open_ended: true,
        })
    }

    /// Sequence number of the next batch; 0 if no epoch is open.
    pub fn next_batch(&self) -> u64 {
        if self.current.is_some() { self.next_sequence } else { 0 }
    }

    /// Make the open segment durable: a killed process may have written it and not synced.
    pub fn sync_current(&self) -> io::Result<()> {
        self.current.as_ref().map_or(Ok(()), |current| current.file.sync())
    }

    /// Bytes appended since the volume was opened.
    pub fn appended_bytes(&self) -> u64 {
        self.appended_bytes
    }

    /// Segment and page at which the next batch begins.
    pub fn position(&self) -> (u32, u32) {
        self.end_of_current()
    }

    fn end_of_current(&self) -> (u32, u32) {
        self.current.as_ref().map_or(self.previous, |current| {
            let page = u32::try_from(current.page).expect("a segment is bounded");
            (current.segment, page)
        })
    }

    fn header(&self, segment: u32, epoch: u32, ordinal: u32, blob: &[u8]) -> SegmentHeader {
        let (previous_segment, previous_end_page) = self.end_of_current();
        SegmentHeader {
            uuid: self.uuid,
            segment,
            epoch,
            ordinal,
            previous_segment,
            previous_end_page,
            first_batch: self.next_sequence,
            epoch_header_bytes: u32::try_from(blob.len()).expect("an epoch header is bounded"),
            epoch_header_crc: crc32c::crc32c(blob),
            takes_regions: true,
            merged: None,
        }
    }

    /// A segment number that nobody else gets.
    pub fn reserve_segment(&mut self) -> u32 {
        self.next_segment += 1;
        self.next_segment - 1
    }

    /// Make the file of the next epoch, so that its name is durable before the instant, with space
    /// for a header of `header_bytes` and `room_pages` of originals.
    pub fn prepare_epoch(&mut self, header_bytes: u64, room_pages: u64) -> io::Result<()> {
        assert!(self.prepared.is_none(), "one instant at a time");
        self.prepared =
            Some(self.prepare(data_start_page(header_bytes) + room_pages + MARK_PAGES)?);
        Ok(())
    }

    /// Pages of originals the next epoch has space for.
    pub fn prepared_pages(&self, header_bytes: u64) -> u64 {
        self.prepared.as_ref().map_or(0, |prepared| prepared.room_pages(header_bytes))
    }

    fn prepare(&mut self, pages: u64) -> io::Result<Prepared> {
        let segment = self.next_segment;
        let file = self.segments.create(segment)?;
        self.next_segment += 1;
        if let Err(error) = file.allocate(0, pages * PAGE) {
            // A file without a header is no part of the log: if it stays, a clean-up removes it.
            let _ = self.segments.remove(segment);
            return Err(error);
        }
        Ok(Prepared { segment, file, allocated: pages })
    }

    /// Make the epoch header durable: **the commit of an instant**; tells its segment. `room_pages`
    /// of originals have their space there, as [`Self::prepare_epoch`] was asked for. On an error
    /// the header may be durable all the same; the caller must call [`Self::discard_epoch`] and not
    /// go on if that fails.
    pub fn commit_epoch(&mut self, epoch: u32, blob: &[u8], room_pages: u64) -> io::Result<u32> {
        if self.prepared.is_none() {
            self.prepare_epoch(to_u64(blob.len()), room_pages)?;
        }
        let segment = self.prepared.as_ref().map_or(0, |prepared| prepared.segment);
        let header = self.header(segment, epoch, 0, blob);
        let mut copy = header.encode();
        copy.extend_from_slice(blob);
        copy.resize(copy.len().next_multiple_of(to_usize(PAGE)), 0);
        self.is_in_doubt = true;
        let prepared = self.prepared.as_ref().expect("made above");
        prepared.file.write_slices_at(0, &[&copy, &copy])?;
        prepared.file.sync()?;
        self.is_in_doubt = false;
        let prepared = self.prepared.take().expect("made above");
        self.appended_bytes += 2 * to_u64(copy.len());
        self.switch_to(&prepared, epoch, 0, header.data_start_page());
        Ok(segment)
    }

    /// Write the end of the log once more, and sync it. The process before may have been killed
    /// after a sync that failed: the kernel then shows what the disk does not have, and takes it
    /// for written.
    ///
    /// What lies behind it goes: a batch that was torn may hold content that is let go of later,
    /// and that nobody would know of then.
    pub fn rewrite_end(&self, end: &LogEnd) -> io::Result<()> {
        let Some(current) = &self.current else { return Ok(()) };
        let mut bytes = vec![0; to_usize((end.page - end.last_page) * PAGE)];
        // The tail of a batch may be torn: its head stands for it.
        let there = current.file.len()?.saturating_sub(end.last_page * PAGE);
        let there = to_usize(there).min(bytes.len());
        current.file.read_at(end.last_page * PAGE, &mut bytes[..there])?;
        current.file.write_at(end.last_page * PAGE, &bytes)?;
        if !end.is_closed && !is_broken(Rule::TornTailReleased) {
            current.file.set_len(end.page * PAGE)?;
        }
        current.file.sync()
    }

    /// Undo [`Self::prepare_epoch`], and [`Self::commit_epoch`] if that failed.
    pub fn discard_epoch(&mut self) -> io::Result<()> {
        if let Some(prepared) = &self.prepared {
            self.discard(prepared)?;
        }
        self.forget_prepared();
        Ok(())
    }

    /// The prepared segment is none of ours any more: removed, or denied.
    pub fn forget_prepared(&mut self) {
        self.prepared = None;
        self.is_in_doubt = false;
    }

    fn discard(&self, prepared: &Prepared) -> io::Result<()> {
        prepared.file.set_len(0)?;
        prepared.file.sync()?;
        self.segments.remove(prepared.segment)?;
        self.segments.directory().sync()
    }

    /// True if an epoch is open: records can be appended.
    pub fn is_open(&self) -> bool {
        self.current.is_some()
    }

    /// True if REGION records can be appended now: a segment that a release began which did not know
    /// them holds none.
    pub fn takes_regions(&self) -> bool {
        self.current.as_ref().is_some_and(|current| current.takes_regions && !current.is_broken)
    }

    /// Make sure that the last batch has no payload: a scan verifies the payload of the last batch,
    /// and takes the batch for torn if it is not intact. It must not be last once its payload is
    /// punched, and is better not last when the volume is closed, since damage could then not be
    /// told from a torn tail.
    pub fn seal(&mut self, batch: &mut BatchBuilder) -> io::Result<()> {
        let Some(epoch) = self.current.as_ref().map(|c| c.epoch) else { return Ok(()) };
        if self.is_open_ended && !is_broken(Rule::SealBeforePunch) {
            batch.begin(epoch, 0);
            self.append(batch)?;
            self.is_open_ended = false;
        }
        Ok(())
    }

    /// Stop using the current segment if it is one of these; only when no record will be made until
    /// the next instant.
    pub fn close_if(&mut self, segments: &[u32]) {
        if self.current.as_ref().is_some_and(|current| segments.contains(&current.segment)) {
            self.previous = self.end_of_current();
            self.current = None;
        }
    }

    /// Go on in another segment; what was allocated ahead in this one goes back.
    fn switch_to(&mut self, prepared: &Prepared, epoch: u32, ordinal: u32, page: u64) {
        self.release_ahead();
        self.previous = self.end_of_current();
        self.current = Some(Current {
            segment: prepared.segment,
            file: Arc::clone(&prepared.file),
            epoch,
            ordinal,
            page,
            allocated: prepared.allocated.max(page),
            takes_regions: true,
            is_broken: false,
        });
    }

    /// Give back what was allocated and not written.
    pub fn release_ahead(&mut self) {
        if let Some(current) = &mut self.current {
            let pages = current.allocated.saturating_sub(current.page);
            current.file.release_ahead(current.page * PAGE, pages * PAGE);
            current.allocated = current.page;
        }
    }

    /// Keep `room` pages for originals allocated, give the rest back; tells the bytes.
    pub fn shrink(&mut self, room: u64) -> u64 {
        let Some(current) = &mut self.current else { return 0 };
        let end = current.page + room + MARK_PAGES;
        let pages = current.allocated.saturating_sub(end);
        if pages > 0 {
            current.file.release_ahead(end * PAGE, pages * PAGE);
            current.allocated = end;
        }
        pages * PAGE
    }

    /// Bytes allocated and not written.
    pub fn ahead_bytes(&self) -> u64 {
        self.current.as_ref().map_or(0, |c| c.allocated.saturating_sub(c.page) * PAGE)
    }

    /// Pages that batches may take without anything being allocated; nothing is needed where no
    /// epoch is open.
    pub fn room_pages(&self) -> u64 {
        match &self.current {
            None => u64::MAX,
            Some(current) if current.is_broken => 0,
            Some(current) => current.allocated.saturating_sub(current.page + MARK_PAGES),
        }
    }

    /// True if a batch of so many pages has its space; one without payload may take what is kept
    /// for marks.
    pub fn has_room(&self, pages: u64, is_mark: bool) -> bool {
        let Some(current) = &self.current else { return false };
        let kept = if is_mark { SEAL_PAGES } else { MARK_PAGES };
        !current.is_broken && current.page + pages + kept <= current.allocated
    }

    /// What having `room` pages for originals would take: bytes to allocate.
    pub fn growth_for(&self, room: u64) -> u64 {
        let Some(current) = &self.current else { return 0 };
        let end = current.page + room + MARK_PAGES;
        if current.is_broken || end > SEGMENT_PAGES {
            return (2 + room + MARK_PAGES) * PAGE;
        }
        end.saturating_sub(current.allocated) * PAGE
    }

    /// Have `room` pages for originals allocated, in a new segment if this one ends before.
    pub fn grow(&mut self, room: u64) -> io::Result<()> {
        let Some(current) = &mut self.current else { return Ok(()) };
        let end = current.page + room + MARK_PAGES;
        if current.is_broken || end > SEGMENT_PAGES {
            return self.roll(room);
        }
        if end > current.allocated {
            let from = current.allocated;
            current.file.allocate(from * PAGE, (end - from) * PAGE)?;
            current.allocated = end;
        }
        Ok(())
    }

    /// The most that can be asked of [`Self::grow`].
    pub const ROOM_PAGES_MAX: u64 = SEGMENT_PAGES - MARK_PAGES - 2;

    /// Append a batch, for which there is room, and make it durable; tells the segment and the page
    /// it begins at.
    ///
    /// After a failure the segment is closed at its last durable batch, and nothing of this one is
    /// durable as far as anyone may rely on: it can be appended once more when [`Self::grow`] has
    /// begun another segment.
    pub fn append(&mut self, batch: &mut BatchBuilder) -> io::Result<(u32, u32)> {
        let pages = batch.total_bytes() / PAGE;
        let has_only_regions = || {
            batch.preserved().is_empty()
                && batch.descriptors().iter().any(|d| d.kind == Kind::Region)
        };
        let is_unsynced =
            is_broken(Rule::LogSync) || (is_broken(Rule::RegionFirst) && has_only_regions());
        let sequence = self.next_sequence;
        let Some(current) = &mut self.current else {
            return Err(io::Error::other("the log has no open epoch"));
        };
        if current.is_broken || current.page + pages > current.allocated {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let bytes = batch.finish(sequence);
        let offset = current.page * PAGE;
        let synced = || if is_unsynced { Ok(()) } else { current.file.sync() };
        let written = current.file.write_at(offset, bytes).and_then(|()| synced());
        if let Err(error) = written {
            self.release_ahead();
            self.current.as_mut().expect("it was there").is_broken = true;
            return Err(error);
        }
        let at = u32::try_from(current.page).expect("a segment is bounded");
        current.page += pages;
        self.is_open_ended = true;
        self.next_sequence += 1;
        self.appended_bytes += to_u64(bytes.len());
        Ok((current.segment, at))
    }

    /// Go on in a new segment of the same epoch.
    fn roll(&mut self, room: u64) -> io::Result<()> {
        let (epoch, ordinal) =
            self.current.as_ref().map(|c| (c.epoch, c.ordinal)).expect("an epoch is open");
        if self.is_in_doubt {
            return Err(io::Error::other("an instant that failed is not undone yet"));
        }
        let pages = 2 + room + MARK_PAGES;
        let prepared = match self.prepared.take() {
            None => self.prepare(pages)?,
            Some(mut taken) => {
                if taken.allocated < pages {
                    let (from, more) = (taken.allocated * PAGE, (pages - taken.allocated) * PAGE);
                    if let Err(error) = taken.file.allocate(from, more) {
                        self.prepared = Some(taken);
                        return Err(error);
                    }
                    taken.allocated = pages;
                }
                taken
            }
        };
        let header = self.header(prepared.segment, epoch, ordinal + 1, &[]);
        let page = header.encode();
        let written = prepared.file.write_slices_at(0, &[&page, &page]);
        if let Err(error) = written.and_then(|()| prepared.file.sync()) {
            // The file holds no batch; a scan ignores it, and so may we.
            self.discard(&prepared)?;
            return Err(error);
        }
        self.switch_to(&prepared, epoch, ordinal + 1, header.data_start_page());
        Ok(())
    }
}

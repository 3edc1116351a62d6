//! Appending to the log: batch *k+1* is submitted only after the sync of batch *k* returned.

use super::batch::BatchBuilder;
use super::format::{PAGE, Position, SegmentHeader};
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
    /// A write or sync failed: nothing after `page` is trusted, nothing more goes here.
    is_broken: bool,
}

/// A segment file that exists but has no header yet: an instant that may still not come.
pub struct Prepared {
    segment: u32,
    file: Arc<dyn Storage>,
}

impl Prepared {
    /// Its number.
    pub fn segment(&self) -> u32 {
        self.segment
    }
}

/// The one writer of the log; owned by whoever holds the committer role.
pub struct LogWriter {
    uuid: [u8; 16],
    segments: Arc<Segments>,
    current: Option<Current>,
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
                is_broken: end.is_closed,
            })
        };
        Ok(Self {
            uuid,
            segments,
            current,
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
            merged: None,
        }
    }

    /// A segment number that nobody else gets.
    pub fn reserve_segment(&mut self) -> u32 {
        self.next_segment += 1;
        self.next_segment - 1
    }

    /// Make the file of the next epoch, so that its name is durable before the instant.
    pub fn prepare_epoch(&mut self) -> io::Result<Prepared> {
        let segment = self.reserve_segment();
        Ok(Prepared { segment, file: self.segments.create(segment)? })
    }

    /// Make the epoch header durable: **the commit of an instant**. On an error the header may be
    /// durable all the same; the caller must call [`Self::discard_epoch`] and not go on if that
    /// fails.
    pub fn commit_epoch(&mut self, prepared: &Prepared, epoch: u32, blob: &[u8]) -> io::Result<()> {
        let header = self.header(prepared.segment, epoch, 0, blob);
        let mut copy = header.encode();
        copy.extend_from_slice(blob);
        copy.resize(copy.len().next_multiple_of(to_usize(PAGE)), 0);
        prepared.file.write_slices_at(0, &[&copy, &copy])?;
        prepared.file.sync()?;
        self.appended_bytes += 2 * to_u64(copy.len());
        self.previous = self.end_of_current();
        self.current = Some(Current {
            segment: prepared.segment,
            file: Arc::clone(&prepared.file),
            epoch,
            ordinal: 0,
            page: header.data_start_page(),
            is_broken: false,
        });
        Ok(())
    }

    /// Write the end of the log once more, and sync it. The process before may have been killed
    /// after a sync that failed: the kernel then shows what the disk does not have, and takes it
    /// for written.
    pub fn rewrite_end(&self, end: &LogEnd) -> io::Result<()> {
        let Some(current) = &self.current else { return Ok(()) };
        let mut bytes = vec![0; to_usize((end.page - end.last_page) * PAGE)];
        // The tail of a batch may be torn: its head stands for it.
        let there = current.file.len()?.saturating_sub(end.last_page * PAGE);
        let there = to_usize(there).min(bytes.len());
        current.file.read_at(end.last_page * PAGE, &mut bytes[..there])?;
        current.file.write_at(end.last_page * PAGE, &bytes)?;
        current.file.sync()
    }

    /// Undo [`Self::prepare_epoch`], and [`Self::commit_epoch`] if that failed.
    pub fn discard_epoch(&self, prepared: &Prepared) -> io::Result<()> {
        prepared.file.set_len(0)?;
        prepared.file.sync()?;
        self.segments.remove(prepared.segment)?;
        self.segments.directory().sync()
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

    /// Append a batch and make it durable; tells the segment and the page it begins at.
    ///
    /// After a failure the segment is closed at its last durable batch and the batch is written
    /// once more, elsewhere; if that fails too, nothing of it is durable as far as anyone may rely
    /// on.
    pub fn append(&mut self, batch: &mut BatchBuilder) -> io::Result<(u32, u32)> {
        let first = self.try_append(batch);
        if first.is_ok() {
            return first;
        }
        if let Some(current) = &mut self.current {
            current.is_broken = true;
        }
        self.try_append(batch)
    }

    fn try_append(&mut self, batch: &mut BatchBuilder) -> io::Result<(u32, u32)> {
        let pages = batch.total_bytes() / PAGE;
        let Some(current) = &self.current else {
            return Err(io::Error::other("the log has no open epoch"));
        };
        if current.is_broken || current.page + pages > SEGMENT_PAGES {
            self.roll()?;
        }
        let sequence = self.next_sequence;
        let current = self.current.as_mut().expect("rolled or open");
        let bytes = batch.finish(sequence);
        current.file.write_at(current.page * PAGE, bytes)?;
        if !is_broken(Rule::LogSync) {
            current.file.sync()?;
        }
        let at = u32::try_from(current.page).expect("a segment is bounded");
        current.page += pages;
        self.is_open_ended = true;
        self.next_sequence += 1;
        self.appended_bytes += to_u64(bytes.len());
        Ok((current.segment, at))
    }

    /// Go on in a new segment of the same epoch.
    fn roll(&mut self) -> io::Result<()> {
        let (epoch, ordinal) =
            self.current.as_ref().map(|c| (c.epoch, c.ordinal)).expect("an epoch is open");
        let prepared = self.prepare_epoch()?;
        let header = self.header(prepared.segment, epoch, ordinal + 1, &[]);
        let page = header.encode();
        let written = prepared.file.write_slices_at(0, &[&page, &page]);
        if let Err(error) = written.and_then(|()| prepared.file.sync()) {
            // The file holds no batch; a scan ignores it, and so may we.
            self.discard_epoch(&prepared)?;
            return Err(error);
        }
        self.previous = self.end_of_current();
        self.current = Some(Current {
            segment: prepared.segment,
            file: prepared.file,
            epoch,
            ordinal: ordinal + 1,
            page: header.data_start_page(),
            is_broken: false,
        });
        Ok(())
    }
}

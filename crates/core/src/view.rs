//! A snapshot as a read-only disk: preserved content, else the origin, else a hole.

use crate::error::{Error, Result};
use crate::export::{STATE_HOLE, STATE_ZERO, StatusExtent};
use crate::extent::{Extent, ExtentSet, round_out};
use crate::number::{to_u64, to_usize};
use crate::volume::{Patience, Volume};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Content is looked up and read in pieces of this many blocks.
const PIECE_BLOCKS: u64 = 256;

/// What reading a block gives that the snapshot does not select.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExcludedReads {
    /// Zeroes, reported as a hole.
    Zeros,
    /// An error.
    Error,
}

/// A snapshot that can be read while the disk is written. Holds the snapshot until it is closed or
/// dropped.
pub struct View {
    volume: Arc<Volume>,
    epoch: u32,
    size_bytes: u64,
    excluded: ExcludedReads,
    is_closed: AtomicBool,
}

impl View {
    /// Open the view of a snapshot.
    pub fn open(volume: &Arc<Volume>, epoch: u32, excluded: ExcludedReads) -> Result<Self> {
        let size_bytes = volume.pin(epoch)?;
        let volume = Arc::clone(volume);
        let is_closed = AtomicBool::new(false);
        Ok(Self { volume, epoch, size_bytes, excluded, is_closed })
    }

    /// Which snapshot.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Size of the disk at the instant, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(crate) fn excluded(&self) -> ExcludedReads {
        self.excluded
    }

    /// The volume it is of.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// What the snapshot selects now; an error once it was deleted.
    pub fn selection(&self) -> Result<Arc<ExtentSet>> {
        self.volume.snapshot_selection(self.epoch)
    }

    /// Let the snapshot go; reads fail from now on.
    pub fn close(&self) {
        if !self.is_closed.swap(true, Ordering::AcqRel) {
            self.volume.unpin(self.epoch);
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    fn check(&self, offset: u64, length: u64) -> Result<()> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(Error::Usage(format!(
                "bytes {offset}+{length} reach past the end of the snapshot at {}",
                self.size_bytes
            ))),
        }
    }

    /// Fill `buffer` from `offset` with what the disk held at the instant.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.check(offset, to_u64(buffer.len()))?;
        loop {
            let selection = self.selection()?;
            let read = self.volume.with_patience(|| self.read_selected(&selection, offset, buffer));
            // The snapshot may have been narrowed or deleted meanwhile: what it let go of was then
            // looked for on the origin, where it need not be (P2).
            if Arc::ptr_eq(&selection, &self.selection()?) {
                return read;
            }
        }
    }

    fn read_selected(&self, selection: &ExtentSet, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let block_size = self.volume.block_size();
        let all = round_out(offset, to_u64(buffer.len()), block_size);
        let mut at = all.start;
        for extent in selection.within(all) {
            self.excluded_part(Extent::new(at, extent.start), offset, buffer)?;
            let mut start = extent.start;
            while start < extent.end {
                let piece = Extent::new(start, extent.end.min(start + PIECE_BLOCKS));
                self.selected_part(piece, offset, buffer)?;
                start = piece.end;
            }
            at = extent.end;
        }
        self.excluded_part(Extent::new(at, all.end), offset, buffer)
    }

    /// As [`View::read`] if no device must be waited for; false if one must.
    pub fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Result<bool> {
        self.check(offset, to_u64(buffer.len()))?;
        let (block_size, length) = (self.volume.block_size(), to_u64(buffer.len()));
        let blocks = round_out(offset, length, block_size);
        let selection = self.selection()?;
        let is_whole = blocks.to_bytes(block_size) == (offset, length);
        let is_selected = selection.within(blocks).next() == Some(blocks);
        if !is_whole || !is_selected || blocks.len() > PIECE_BLOCKS {
            return Ok(false);
        }
        let is_read = self.volume.read_at_epoch(self.epoch, blocks, buffer, Patience::Try)?;
        Ok(is_read && Arc::ptr_eq(&selection, &self.selection()?))
    }

    /// The bytes of `blocks` that lie in a buffer that begins at `offset`: `(from, to)` in the
    /// buffer.
    fn bytes_in(&self, blocks: Extent, offset: u64, length: usize) -> (usize, usize) {
        let (from, to) = blocks.bytes_within(self.volume.block_size(), offset, to_u64(length));
        (to_usize(from - offset), to_usize(to - offset))
    }

    fn excluded_part(&self, blocks: Extent, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        if self.excluded == ExcludedReads::Error {
            return Err(Error::Excluded(format!(
                "block {} (byte {}) is not in this snapshot's selection",
                blocks.start,
                blocks.start * self.volume.block_size()
            )));
        }
        let (from, to) = self.bytes_in(blocks, offset, buffer.len());
        buffer[from..to].fill(0);
        Ok(())
    }

    fn selected_part(&self, blocks: Extent, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (from, to) = self.bytes_in(blocks, offset, buffer.len());
        let (start, length) = blocks.to_bytes(self.volume.block_size());
        let is_whole = to_u64(from) + offset == start && to_u64(to - from) == length;
        if is_whole {
            let part = &mut buffer[from..to];
            let read = self.volume.read_at_epoch(self.epoch, blocks, part, Patience::Wait);
            return read.map(|_| ());
        }
        let mut content = vec![0; to_usize(length)];
        self.volume.read_at_epoch(self.epoch, blocks, &mut content, Patience::Wait)?;
        let skip = to_usize(offset + to_u64(from) - start);
        buffer[from..to].copy_from_slice(&content[skip..skip + (to - from)]);
        Ok(())
    }

    /// Where the snapshot has data and holes; what it does not select is a hole.
    pub fn allocation(
        &self,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>> {
        self.check(offset, length)?;
        self.volume.with_patience(|| self.find_allocation(offset, length, extents_max))
    }

    fn find_allocation(
        &self,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>> {
        let mut found = Vec::new();
        let selected = self.selected(offset, length, usize::MAX)?;
        for part in selected {
            if found.len() >= extents_max {
                break;
            }
            if part.flags == 0 {
                let hole = STATE_HOLE | STATE_ZERO;
                crate::volume::push_status(&mut found, part.start, part.end, hole);
            } else {
                let room = extents_max - found.len();
                self.volume.allocation_at(self.epoch, part.start, part.end, room, &mut found)?;
            }
        }
        found.truncate(extents_max);
        Ok(found)
    }

    /// Selected blocks whose content could not be kept.
    pub fn lost(&self) -> Result<ExtentSet> {
        let selection = self.selection()?;
        let lost = self.volume.with_patience(|| self.volume.lost_since(self.epoch))?;
        Ok(lost.intersection(&selection))
    }

    /// Which parts the snapshot selects: flags 1 selected, 0 not.
    pub fn selected(
        &self,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>> {
        self.check(offset, length)?;
        let selection = self.selection()?;
        Ok(status_of(&selection, self.volume.block_size(), offset, length, extents_max))
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.close();
    }
}

/// A byte range as runs inside (flags 1) and outside (flags 0) a set of blocks.
pub fn status_of(
    set: &ExtentSet,
    block_size: u64,
    offset: u64,
    length: u64,
    extents_max: usize,
) -> Vec<StatusExtent> {
    let end = offset + length;
    let mut found = Vec::new();
    let mut at = offset;
    for extent in set.within(round_out(offset, length, block_size)) {
        let (start, stop) = extent.bytes_within(block_size, offset, length);
        crate::volume::push_status(&mut found, at, start, 0);
        crate::volume::push_status(&mut found, start, stop, 1);
        at = stop;
        if found.len() > extents_max {
            break;
        }
    }
    if found.len() < extents_max {
        crate::volume::push_status(&mut found, at, end, 0);
    }
    found.truncate(extents_max);
    found
}

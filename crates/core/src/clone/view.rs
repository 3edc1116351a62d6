//! A clone as a disk: its own blocks from its overlay, all others from the snapshot it began as.

use super::overlay::Overlay;
use crate::error::{Error, Result};
use crate::export::{STATE_HOLE, STATE_ZERO, StatusExtent};
use crate::extent::{Extent, ExtentSet, round_in, round_out};
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use crate::sync::Mutex;
use crate::view::{ExcludedReads, View};
use crate::volume::{Volume, push_status};
use std::sync::Arc;

/// Writes run in pieces of at most this, so that few others wait for the blocks of a long one.
const PIECE_BYTES: u64 = 1 << 20;
/// Zeroing does so in larger ones: no content is moved.
const ZERO_PIECE_BYTES: u64 = 64 << 20;
/// Room in the store is asked for in steps of this.
const ROOM_STEP_BYTES: u64 = 16 << 20;

/// A writable view on a snapshot. Holds the snapshot until it is closed or dropped; all methods may
/// be called from many threads.
///
/// P7: what is written goes to the overlay, which belongs to this clone alone. Nothing here writes
/// to the origin, to the log or to another clone.
pub struct CloneView {
    view: View,
    overlay: Overlay,
    /// Bytes that the store granted and that are not taken yet.
    granted: Mutex<u64>,
}

impl CloneView {
    pub(super) fn new(view: View, overlay: Overlay) -> Self {
        Self { view, overlay, granted: Mutex::new(0) }
    }

    /// The clone's number in its store.
    pub fn number(&self) -> u32 {
        self.overlay.header().number
    }

    /// The snapshot it began as.
    pub fn epoch(&self) -> u32 {
        self.view.epoch()
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.view.size_bytes()
    }

    /// The volume it is of.
    pub fn volume(&self) -> &Arc<Volume> {
        self.view.volume()
    }

    pub(super) fn excluded(&self) -> ExcludedReads {
        self.view.excluded()
    }

    pub(super) fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    /// Blocks that are its own.
    pub fn own_blocks(&self) -> u64 {
        self.overlay.own_blocks()
    }

    /// Why it takes no more writes; empty if it does.
    pub fn failure(&self) -> String {
        self.overlay.failure()
    }

    /// Make what was written durable, and let the snapshot go; everything fails from now on.
    pub fn close(&self) -> Result<()> {
        if self.is_closed() {
            return Ok(());
        }
        let flushed = if self.overlay.failure().is_empty() { self.flush() } else { Ok(()) };
        self.leave();
        flushed
    }

    /// Let the snapshot go; what was acknowledged outlives the process, as after a kill.
    pub(super) fn leave(&self) {
        self.view.close();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.view.is_closed()
    }

    fn check(&self, offset: u64, length: u64) -> Result<()> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        // The store may belong to another process from then on.
        self.volume().check_held_open()?;
        match offset.checked_add(length) {
            Some(end) if end <= self.size_bytes() => Ok(()),
            _ => Err(Error::Usage(format!(
                "bytes {offset}+{length} reach past the end of the clone at {}",
                self.size_bytes()
            ))),
        }
    }

    fn block_size(&self) -> u64 {
        self.volume().block_size()
    }

    /// Fill `buffer` from `offset`.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.check(offset, to_u64(buffer.len()))?;
        let block_size = self.block_size();
        let blocks = round_out(offset, to_u64(buffer.len()), block_size);
        if !self.overlay.has_any(blocks) {
            return self.view.read(offset, buffer);
        }
        let length = to_u64(buffer.len());
        for (run, is_own) in self.overlay.runs(blocks) {
            let (from, to) = run.bytes_within(block_size, offset, length);
            let part = &mut buffer[to_usize(from - offset)..to_usize(to - offset)];
            if is_own {
                self.overlay.read(from, part)?;
            } else {
                self.view.read(from, part)?;
            }
        }
        Ok(())
    }

    /// As [`CloneView::read`] if no device must be waited for; false if one must.
    pub fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Result<bool> {
        self.check(offset, to_u64(buffer.len()))?;
        let blocks = round_out(offset, to_u64(buffer.len()), self.block_size());
        if !self.overlay.has_any(blocks) {
            return self.view.try_read(offset, buffer);
        }
        Ok(self.overlay.has_all(blocks) && self.overlay.try_read(offset, buffer)?)
    }

    /// Write `data` at `offset`; with `fua` return only when it is durable.
    pub fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<()> {
        self.check(offset, to_u64(data.len()))?;
        self.overlay.check_writable()?;
        let mut at = 0;
        while at < data.len() {
            let start = offset + to_u64(at);
            let stop = (start / PIECE_BYTES + 1) * PIECE_BYTES;
            let end = data.len().min(at + to_usize(stop - start));
            self.write_piece(start, &data[at..end])?;
            at = end;
        }
        if fua { self.flush() } else { Ok(()) }
    }

    fn write_piece(&self, offset: u64, data: &[u8]) -> Result<()> {
        let blocks = round_out(offset, to_u64(data.len()), self.block_size());
        if self.overlay.has_all(blocks) {
            self.overlay.write(offset, &[data])?;
        } else {
            let claim = self.overlay.claim(blocks);
            let (before, after) = self.around(blocks, offset, data.len())?;
            self.take_room(blocks)?;
            let start = offset - to_u64(before.len());
            self.overlay.write(start, &[&before, data, &after])?;
            self.overlay.take(&claim)?;
        }
        self.overlay.note_dirty();
        Ok(())
    }

    /// The rest of the first and the last block, as they are now, where those are not the clone's own
    /// yet: what is beside us in one that is may be written by others meanwhile.
    fn around(&self, blocks: Extent, offset: u64, length: usize) -> Result<(Vec<u8>, Vec<u8>)> {
        let (start, bytes) = blocks.to_bytes(self.block_size());
        let (end, stop) = (offset + to_u64(length), (start + bytes).min(self.size_bytes()));
        let rest = |block: u64, length: u64| {
            let is_own = self.overlay.has_all(Extent::single(block));
            vec![0; if is_own { 0 } else { to_usize(length) }]
        };
        let mut before = rest(blocks.start, offset - start);
        let mut after = rest(blocks.end - 1, stop - end);
        if is_broken(Rule::CloneBlockWhole) {
            return Ok((before, after));
        }
        if !before.is_empty() {
            self.read(start, &mut before)?;
        }
        if !after.is_empty() {
            self.read(end, &mut after)?;
        }
        Ok((before, after))
    }

    /// Have room in the store for those of the blocks that are not the clone's own.
    fn take_room(&self, blocks: Extent) -> Result<()> {
        let runs = self.overlay.runs(blocks).into_iter().filter(|(_, is_own)| !is_own);
        let wanted: u64 = runs.map(|(run, _)| run.len() * self.block_size()).sum();
        let mut granted = self.granted.lock();
        if *granted < wanted {
            let more = wanted - *granted;
            let is_granted = |bytes| self.volume().take_for_clone(bytes);
            let step = more.max(ROOM_STEP_BYTES);
            if is_granted(step)? {
                *granted += step;
            } else if is_granted(more)? {
                *granted += more;
            } else {
                return Err(Error::StoreFull(format!(
                    "the store has no room for {more} bytes of a clone: what is left is kept for \
                     the originals that snapshots need; delete a clone or a snapshot, give the \
                     store room or raise --store-limit"
                )));
            }
        }
        *granted -= wanted;
        Ok(())
    }

    /// Make a range read as zeroes; its blocks are the clone's own then.
    pub fn write_zeroes(&self, offset: u64, length: u64, may_punch: bool, fua: bool) -> Result<()> {
        self.check(offset, length)?;
        self.overlay.check_writable()?;
        let block_size = self.block_size();
        let whole = round_in(offset, length, block_size, self.size_bytes());
        if whole.is_empty() {
            self.write_zero_bytes(offset, offset + length)?;
        } else {
            let (start, bytes) = whole.to_bytes(block_size);
            let (end, stop) = (offset + length, (start + bytes).min(self.size_bytes()));
            self.write_zero_bytes(offset, start)?;
            let mut at = whole.start;
            while at < whole.end {
                let upto = whole.end.min(at + ZERO_PIECE_BYTES / block_size);
                self.zero_blocks(Extent::new(at, upto), may_punch)?;
                at = upto;
            }
            self.write_zero_bytes(stop, end)?;
        }
        if fua { self.flush() } else { Ok(()) }
    }

    /// Less than two blocks.
    fn write_zero_bytes(&self, from: u64, to: u64) -> Result<()> {
        if from < to {
            let zeroes = vec![0; to_usize(to - from)];
            self.write(from, &zeroes, false)?;
        }
        Ok(())
    }

    fn zero_blocks(&self, blocks: Extent, may_punch: bool) -> Result<()> {
        let (start, bytes) = blocks.to_bytes(self.block_size());
        let length = bytes.min(self.size_bytes() - start);
        let claim = (!self.overlay.has_all(blocks)).then(|| self.overlay.claim(blocks));
        if !may_punch {
            self.take_room(blocks)?;
        }
        self.overlay.zero(start, length, may_punch)?;
        if let Some(claim) = &claim {
            self.overlay.take(claim)?;
        }
        self.overlay.note_dirty();
        Ok(())
    }

    /// Give back the space of blocks that are the clone's own and covered whole. Others read as
    /// before: a hint must not cost anything.
    pub fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<()> {
        self.check(offset, length)?;
        self.overlay.check_writable()?;
        let whole = round_in(offset, length, self.block_size(), self.size_bytes());
        for (run, _) in self.overlay.runs(whole).into_iter().filter(|(_, is_own)| *is_own) {
            let (start, bytes) = run.to_bytes(self.block_size());
            self.overlay.discard(start, bytes.min(self.size_bytes() - start))?;
            self.overlay.note_dirty();
        }
        if fua { self.flush() } else { Ok(()) }
    }

    /// Return when every write that was answered before is durable.
    pub fn flush(&self) -> Result<()> {
        self.check(0, 0)?;
        self.overlay.flush()
    }

    /// Start reading a range into the cache; a hint.
    pub fn prefetch(&self, offset: u64, length: u64) {
        self.volume().prefetch(offset, length);
    }

    /// Where the clone has data and holes.
    pub fn allocation(
        &self,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>> {
        self.check(offset, length)?;
        let block_size = self.block_size();
        let blocks = round_out(offset, length, block_size);
        let mut found = Vec::new();
        for (run, is_own) in self.overlay.runs(blocks) {
            if found.len() > extents_max {
                break;
            }
            let (from, to) = run.bytes_within(block_size, offset, length);
            if is_own {
                let mut at = from;
                while at < to && found.len() <= extents_max {
                    let (start, stop) = self.overlay.data_run(at, to)?;
                    push_status(&mut found, at, start, STATE_HOLE | STATE_ZERO);
                    push_status(&mut found, start, stop, 0);
                    at = stop;
                }
            } else {
                let room = extents_max.saturating_add(1);
                for extent in self.view.allocation(from, to - from, room)? {
                    push_status(&mut found, extent.start, extent.end, extent.flags);
                }
            }
        }
        found.truncate(extents_max);
        Ok(found)
    }

    /// Blocks whose content is lost with the snapshot's, and that were not written since.
    pub fn lost(&self) -> Result<ExtentSet> {
        let lost = self.view.lost()?;
        let is_ours = |extent: Extent| self.overlay.runs(extent);
        let left = lost.iter().flat_map(is_ours).filter(|(_, is_own)| !is_own);
        Ok(left.map(|(run, _)| run).collect())
    }

    /// Which parts hold what was at the instant, or what was written since: flags 1; the rest,
    /// flags 0, is what the snapshot does not select.
    pub fn selected(
        &self,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>> {
        self.check(offset, length)?;
        let block_size = self.block_size();
        let mut found = Vec::new();
        for (run, is_own) in self.overlay.runs(round_out(offset, length, block_size)) {
            let (from, to) = run.bytes_within(block_size, offset, length);
            if is_own {
                push_status(&mut found, from, to, 1);
                continue;
            }
            for extent in self.view.selected(from, to - from, usize::MAX)? {
                push_status(&mut found, extent.start, extent.end, extent.flags);
            }
        }
        found.truncate(extents_max);
        Ok(found)
    }
}

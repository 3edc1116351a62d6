//! Reads of the live disk: the origin, under the slots that wait, over what a restore has not
//! copied yet.

use super::past::Patience;
use super::{State, Volume};
use crate::error::{Error, Result};
use crate::export::{STATE_HOLE, STATE_ZERO, StatusExtent};
use crate::extent::{Extent, ExtentSet};
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};

/// Blocks with slots are read in pieces of this size, so that the state lock is held shortly.
const MERGE_BYTES: u64 = 64 << 10;
/// Times a merge starts over before it takes the committer role and cannot be overtaken any more.
const RETRIES_MAX: usize = 8;

impl State {
    /// True if the origin alone does not tell what these blocks hold.
    fn is_covered(&self, blocks: Extent) -> bool {
        let is_restoring = self.restoring.as_ref().is_some_and(|r| r.blocks.any(blocks));
        if is_restoring || self.buffer.is_empty() || is_broken(Rule::ReadsSeeSlots) {
            return is_restoring;
        }
        (blocks.start..blocks.end).any(|block| self.buffer.has(block))
    }

    /// Changes whenever what lies beneath the slots may have.
    fn base_version(&self) -> (u64, u64) {
        (self.buffer.dropped(), self.restored)
    }
}

impl Volume {
    /// Fill `buffer` from `offset`.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.watched_reads.note(offset, buffer.len());
        let is_covered = {
            let state = self.state.lock();
            Self::check_range(&state, offset, to_u64(buffer.len()))?;
            state.is_covered(self.extent_of(offset, to_u64(buffer.len())))
        };
        if !is_covered {
            return self.origin.read_at(offset, buffer).map_err(Error::origin("read"));
        }
        let mut at = offset;
        for piece in buffer.chunks_mut(to_usize(MERGE_BYTES)) {
            self.read_merged(at, piece)?;
            at += to_u64(piece.len());
        }
        Ok(())
    }

    /// As [`Volume::read`] if no device must be waited for; false if one must.
    pub fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Result<bool> {
        self.watched_reads.note(offset, buffer.len());
        let blocks = self.extent_of(offset, to_u64(buffer.len()));
        let version = {
            let state = self.state.lock();
            Self::check_range(&state, offset, to_u64(buffer.len()))?;
            if state.restoring.is_some() || to_u64(buffer.len()) > MERGE_BYTES {
                if state.is_covered(blocks) {
                    return Ok(false);
                }
                None
            } else {
                state.is_covered(blocks).then(|| state.base_version())
            }
        };
        if !self.origin.try_read_at(offset, buffer).map_err(Error::origin("read"))? {
            return Ok(false);
        }
        let Some(version) = version else { return Ok(true) };
        let state = self.state.lock();
        if state.base_version() != version {
            return Ok(false);
        }
        self.overlay_slots(&state, offset, buffer);
        Ok(true)
    }

    fn read_merged(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        for _ in 0..RETRIES_MAX {
            if self.try_merge(offset, buffer)? {
                return Ok(());
            }
        }
        let _committer = self.role()?;
        let is_merged = self.try_merge(offset, buffer)?;
        assert!(is_merged, "only the committer drops slots");
        Ok(())
    }

    /// Read the base without a lock, then put the slots over it, unless the base moved meanwhile: a
    /// slot that was dropped in between is on the origin now, and was not when we looked.
    fn try_merge(&self, offset: u64, buffer: &mut [u8]) -> Result<bool> {
        let blocks = self.extent_of(offset, to_u64(buffer.len()));
        let (version, restoring) = {
            let state = self.state.lock();
            let restoring: Vec<Extent> = match &state.restoring {
                Some(restoring) => restoring.blocks.set_within(blocks).collect(),
                None => Vec::new(),
            };
            (state.base_version(), restoring)
        };
        self.origin.read_at(offset, buffer).map_err(Error::origin("read"))?;
        let mut content = Vec::new();
        for block in restoring.iter().flat_map(|e| e.start..e.end) {
            content.resize(to_usize(self.block_size), 0);
            self.read_restoring(block, &mut content)?;
            let start = offset.max(block * self.block_size);
            let end = (offset + to_u64(buffer.len())).min((block + 1) * self.block_size);
            let from = to_usize(start - block * self.block_size);
            let length = to_usize(end - start);
            buffer[to_usize(start - offset)..to_usize(end - offset)]
                .copy_from_slice(&content[from..from + length]);
        }
        let state = self.state.lock();
        if state.base_version() != version {
            return Ok(false);
        }
        self.overlay_slots(&state, offset, buffer);
        Ok(true)
    }

    fn overlay_slots(&self, state: &State, offset: u64, buffer: &mut [u8]) {
        let mut at = offset;
        let end = offset + to_u64(buffer.len());
        while at < end {
            let block = at / self.block_size;
            let stop = end.min((block + 1) * self.block_size);
            let part = &mut buffer[to_usize(at - offset)..to_usize(stop - offset)];
            state.buffer.overlay(block, at % self.block_size, part);
            at = stop;
        }
    }

    /// Bring a range into the cache.
    pub fn prefetch(&self, offset: u64, length: u64) {
        self.origin.prefetch(offset, length);
    }

    /// Where the live disk has data and holes. Slots and blocks being restored count as data.
    pub fn allocation(
        &self,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>> {
        Self::check_range(&self.state.lock(), offset, length)?;
        let end = offset + length;
        // Before the origin: what is brought home meanwhile is found there.
        let covered = self.covered(self.extent_of(offset, length));
        let mut found = Vec::new();
        let mut at = offset;
        while at < end && found.len() < extents_max {
            let (data_start, data_end) = self.data_run(at, end)?;
            if at < data_start {
                self.allocation_of_hole(at, data_start, &covered, &mut found);
            }
            push_status(&mut found, data_start, data_end, 0);
            at = data_end;
        }
        found.truncate(extents_max);
        Ok(found)
    }

    /// Blocks of the range whose content is not, or not only, on the origin.
    fn covered(&self, blocks: Extent) -> ExtentSet {
        let state = self.state.lock();
        let slots = state.buffer.blocks().filter(|&block| blocks.contains(block));
        let mut extents: Vec<Extent> = slots.map(Extent::single).collect();
        if let Some(restoring) = &state.restoring {
            extents.extend(restoring.blocks.set_within(blocks));
        }
        drop(state);
        ExtentSet::from_unsorted(extents)
    }

    /// The next data of the origin, as far as it goes; empty, at `end`, if there is none.
    fn data_run(&self, at: u64, end: u64) -> Result<(u64, u64)> {
        let looking = || Error::origin("looking for holes");
        let start = self.origin.next_data(at, end).map_err(looking())?;
        let stop = if start < end { self.origin.next_hole(start, end) } else { Ok(end) };
        Ok((start, stop.map_err(looking())?))
    }

    fn allocation_of_hole(
        &self,
        start: u64,
        end: u64,
        covered: &ExtentSet,
        found: &mut Vec<StatusExtent>,
    ) {
        let mut at = start;
        for extent in covered.within(self.extent_of(start, end - start)) {
            let (from, length) = extent.to_bytes(self.block_size);
            let (from, to) = (from.max(start), (from + length).min(end));
            push_status(found, at, from, STATE_HOLE | STATE_ZERO);
            push_status(found, from, to, 0);
            at = to;
        }
        push_status(found, at, end, STATE_HOLE | STATE_ZERO);
    }
}

/// Changed blocks are looked up for this many at a time.
const STATUS_BLOCKS: u64 = 16_384;

impl Volume {
    /// Where a snapshot's selected bytes `[start, end)` are data and where holes; appends to
    /// `found` up to `extents_max` extents beyond what it holds.
    pub(crate) fn allocation_at(
        &self,
        epoch: u32,
        start: u64,
        end: u64,
        extents_max: usize,
        found: &mut Vec<StatusExtent>,
    ) -> Result<()> {
        let enough = found.len() + extents_max;
        let mut at = start;
        let mut contents = Vec::new();
        while at < end && found.len() <= enough {
            let first = at / self.block_size;
            let blocks = Extent::new(first, self.block_count(end).min(first + STATUS_BLOCKS));
            let piece_end = end.min(blocks.end * self.block_size);
            // The origin before the records: a block without one has not changed up to here, so
            // what the origin had is what the snapshot has. The other way round a block that is
            // zeroed meanwhile would be a hole.
            let mut origin = Vec::new();
            self.allocation_of_origin(at, piece_end, &mut origin)?;
            contents.clear();
            self.contents(blocks, epoch, Patience::Wait, &mut contents)?;
            let mut rest = origin.into_iter().peekable();
            let mut push_origin = |from: u64, to: u64, found: &mut Vec<StatusExtent>| {
                while let Some(extent) = rest.peek().filter(|e| e.start < to).copied() {
                    push_status(found, extent.start.max(from), extent.end.min(to), extent.flags);
                    if extent.end > to {
                        break;
                    }
                    rest.next();
                }
            };
            for &(block, content) in &contents {
                let from = (block * self.block_size).max(at);
                let to = ((block + 1) * self.block_size).min(piece_end);
                push_origin(at, from, found);
                let is_zero = content == crate::index::Content::Zero;
                push_status(found, from, to, if is_zero { STATE_HOLE | STATE_ZERO } else { 0 });
                at = to;
            }
            push_origin(at, piece_end, found);
            at = piece_end;
        }
        Ok(())
    }

    fn allocation_of_origin(
        &self,
        start: u64,
        end: u64,
        found: &mut Vec<StatusExtent>,
    ) -> Result<()> {
        let mut at = start;
        while at < end {
            let (data_start, data_end) = self.data_run(at, end)?;
            push_status(found, at, data_start, STATE_HOLE | STATE_ZERO);
            push_status(found, data_start, data_end, 0);
            at = data_end;
        }
        Ok(())
    }
}

/// Append an extent, merged with the last one if that says the same.
pub(crate) fn push_status(found: &mut Vec<StatusExtent>, start: u64, end: u64, flags: u32) {
    if start >= end {
        return;
    }
    match found.last_mut() {
        Some(last) if last.flags == flags && last.end == start => last.end = end,
        _ => found.push(StatusExtent { start, end, flags }),
    }
}

//! What blocks were at an instant: preserved content, else the origin, looked at twice.

use super::{Upkeep, Volume};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::index::run::Wait;
use crate::index::{Content, Record};
use crate::log::format::{PAGE, payload_checksum};
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use crate::storage::Storage;
use crate::sync::MutexGuard;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Whether a reader may wait for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// As long as it takes.
    Wait,
    /// Only what the cache has.
    Try,
}

impl Volume {
    /// Fill `buffer`, which holds whole blocks, with what `blocks` were at the instant of `epoch`.
    /// Bytes beyond the end of the disk are zero. The caller knows that the snapshot selects them.
    /// False if that needs a device and the caller will not wait; `buffer` is then undefined.
    pub(crate) fn read_at_epoch(
        &self,
        epoch: u32,
        blocks: Extent,
        buffer: &mut [u8],
        patience: Patience,
    ) -> Result<bool> {
        debug_assert_eq!(to_u64(buffer.len()), blocks.len() * self.block_size);
        let _no_punching = self.punching.read();
        let mut found = Vec::new();
        let Some(version) = self.contents(blocks, epoch, patience, &mut found)? else {
            return Ok(false);
        };
        if !self.fill_found(blocks, &found, buffer, patience)? {
            return Ok(false);
        }
        // The rest is unchanged and read from the origin, then looked for again: a record that was
        // made meanwhile may have let new content through to where we read (P2).
        let mut at = blocks.start;
        let ends = found.iter().map(|(block, _)| *block).chain(std::iter::once(blocks.end));
        for end in ends {
            let gap = Extent::new(at, end);
            if !gap.is_empty() && !self.read_unchanged(gap, blocks, buffer, patience)? {
                return Ok(false);
            }
            at = end + 1;
        }
        if self.index_version.load(Ordering::Acquire) == version || is_broken(Rule::SecondLook) {
            return Ok(true);
        }
        let mut again = Vec::new();
        if self.contents(blocks, epoch, patience, &mut again)?.is_none() {
            return Ok(false);
        }
        let mut known = found.iter().map(|(block, _)| *block).peekable();
        again.retain(|(block, _)| known.next_if_eq(block).is_none());
        self.fill_found(blocks, &again, buffer, patience)
    }

    /// What changed blocks were at the instant of `epoch`, and how new that is; `None` if a device
    /// must be waited for and may not be.
    pub(super) fn contents(
        &self,
        blocks: Extent,
        epoch: u32,
        patience: Patience,
        found: &mut Vec<(u64, Content)>,
    ) -> Result<Option<u64>> {
        let look_up = || {
            let index = self.index.read();
            (index.look_up(blocks, epoch), self.index_version.load(Ordering::Acquire))
        };
        if patience == Patience::Try {
            let (lookup, version) = look_up();
            // Who waits gets the error, or what the log says in its place.
            let is_found = lookup.finish(Wait::Never, found).unwrap_or(false);
            return Ok(is_found.then_some(version));
        }
        let (all, version) = self.with_index(|| {
            let (lookup, version) = look_up();
            let mut all = Vec::new();
            lookup.finish(Wait::Long, &mut all)?;
            Ok((all, version))
        })?;
        *found = all;
        Ok(Some(version))
    }

    /// Ask the index. Where a file of it is damaged, what it had is read from the log, and it is
    /// asked again.
    pub(super) fn with_index<T>(&self, ask: impl Fn() -> std::io::Result<T>) -> Result<T> {
        let mut was_whole = false;
        loop {
            match ask() {
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    // Who has the role must not wait for upkeep, which may wait for the role.
                    let Some(mut upkeep) = self.upkeep.try_lock_for(std::time::Duration::ZERO)
                    else {
                        self.want_upkeep();
                        return Err(index_error(error));
                    };
                    let is_whole = !self.is_index_damaged();
                    if is_whole && was_whole {
                        return Err(index_error(error));
                    }
                    was_whole = is_whole;
                    self.read_damaged_anew(&mut upkeep, Patience::Try)?;
                }
                answer => return answer.map_err(index_error),
            }
        }
    }

    /// Do what asks the index, for a caller who has no lock. If a file of it was found damaged while
    /// upkeep was busy, wait for that, have what the file had read from the log, and do it again;
    /// another file may be damaged as well.
    pub(crate) fn with_patience<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<T> {
        let mut was_whole = false;
        loop {
            match work() {
                Err(Error::Damaged(why)) => {
                    let is_whole = !self.is_index_damaged();
                    // It may have been done meanwhile. What else is damaged is so again.
                    if is_whole && was_whole {
                        return Err(Error::Damaged(why));
                    }
                    was_whole = is_whole;
                    if !is_whole {
                        self.read_damaged_anew(&mut self.upkeep.lock(), Patience::Wait)?;
                    }
                }
                done => return done,
            }
        }
    }

    /// As [`Self::with_patience`], for whoever does upkeep.
    pub(super) fn mending<T>(
        &self,
        upkeep: &mut MutexGuard<'_, Upkeep>,
        mut work: impl FnMut(&mut MutexGuard<'_, Upkeep>) -> Result<T>,
    ) -> Result<T> {
        loop {
            match work(upkeep) {
                Err(Error::Damaged(_)) if self.is_index_damaged() => {
                    self.read_damaged_anew(upkeep, Patience::Wait)?;
                }
                done => return done,
            }
        }
    }

    fn is_index_damaged(&self) -> bool {
        let layers = Arc::clone(self.index.read().layers());
        layers.iter().any(|layer| layer.run.is_damaged())
    }

    fn read_unchanged(
        &self,
        run: Extent,
        all: Extent,
        buffer: &mut [u8],
        patience: Patience,
    ) -> Result<bool> {
        let (offset, length) = run.to_bytes(self.block_size);
        let from = to_usize((run.start - all.start) * self.block_size);
        let part = &mut buffer[from..from + to_usize(length)];
        let valid = to_usize(length.min(self.size_bytes().saturating_sub(offset)));
        part[valid..].fill(0);
        read_with(&*self.origin, offset, &mut part[..valid], patience)
            .map_err(Error::origin("read"))
    }

    /// Put changed blocks in their places. Neighbours that lie behind one another in the log are
    /// read at once.
    fn fill_found(
        &self,
        all: Extent,
        found: &[(u64, Content)],
        buffer: &mut [u8],
        patience: Patience,
    ) -> Result<bool> {
        let size = to_usize(self.block_size);
        let place = |block: u64| to_usize(block - all.start) * size;
        let mut at = 0;
        while let Some(&(block, content)) = found.get(at) {
            at += 1;
            let from = place(block);
            match content {
                Content::Zero => buffer[from..from + size].fill(0),
                Content::Lost => return Err(self.lost_block(block)),
                Content::Preserved(first) => {
                    let mut run = vec![first];
                    while let Some(&(next, Content::Preserved(record))) = found.get(at) {
                        if next != block + to_u64(run.len()) || !self.follows(&run, &record) {
                            break;
                        }
                        run.push(record);
                        at += 1;
                    }
                    let part = &mut buffer[from..from + run.len() * size];
                    if !self.read_preserved(&run, part, patience)? {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    fn follows(&self, run: &[Record], next: &Record) -> bool {
        let pages = to_u64(run.len()) * self.block_size / PAGE;
        run.first().is_some_and(|first| first.position.0 + pages == next.position.0)
    }

    fn read_preserved(&self, run: &[Record], part: &mut [u8], patience: Patience) -> Result<bool> {
        let Some(first) = run.first() else { return Ok(true) };
        let reading = || Error::store("reading preserved content");
        let file = self.segments.get(first.position.segment()).map_err(reading())?;
        let offset = first.position.offset_bytes();
        if !read_with(&*file, offset, part, patience).map_err(reading())? {
            return Ok(false);
        }
        for (record, content) in run.iter().zip(part.chunks(to_usize(self.block_size))) {
            if payload_checksum(record.block, record.epoch, content) != record.checksum {
                self.note_rotten(record);
                return Err(Error::Damaged(format!(
                    "preserved content of block {} (byte {}) fails its checksum in segment \
                     {:08x} at byte {}; the \
                     rest of the snapshot is right",
                    record.block,
                    record.block * self.block_size,
                    record.position.segment(),
                    record.position.offset_bytes()
                )));
            }
        }
        Ok(true)
    }

    fn lost_block(&self, block: u64) -> Error {
        let is_at_source = {
            let parts = self.index.read().parts();
            // It is for people: lost it is in any case.
            parts.lost_at_source_since(0, Extent::single(block)).is_ok_and(|set| !set.is_empty())
        };
        let why = if is_at_source {
            "could not be read from the origin when it changed, and is lost at its source"
        } else {
            "could not be kept for this snapshot"
        };
        Error::Lost {
            message: format!(
                "block {block} (byte {}) {why}; the rest of it is right",
                block * self.block_size
            ),
            blocks: ExtentSet::from_extent(Extent::single(block)),
        }
    }
}

/// An index file could not be read: what it would say is not known, and nothing is guessed (P2, P5).
pub(super) fn index_error(error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::InvalidData {
        Error::Damaged(error.to_string())
    } else {
        Error::store("reading the index")(error)
    }
}

fn read_with(
    file: &dyn Storage,
    offset: u64,
    buffer: &mut [u8],
    patience: Patience,
) -> std::io::Result<bool> {
    match patience {
        Patience::Wait => file.read_at(offset, buffer).map(|()| true),
        Patience::Try => file.try_read_at(offset, buffer),
    }
}

//! The committer: makes old content durable, then lets the new content go to the origin.
//!
//! A batch of slots goes through: read the old content of pending blocks; append the records, one
//! sync; publish them in the index; clear the bits; only then submit the new content to the origin;
//! drop the slots when that is done (P2, P6). Nothing here waits for a client.

use super::{
    ADMIT_BYTES_MIN, COMMIT_AGE, COMMIT_BYTES, Committer, Counters, DRAIN_TIME, State, Volume,
};
use crate::buffer::{Arena, SectorMask, overlay_sectors, sector_runs, sectors};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::index::Record;
use crate::journal::Entry;
use crate::log::format::{BATCH_BLOCKS_MAX, Kind, LOST_AT_SOURCE, PAGE, Position};
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use crate::storage::Storage;
use crate::sync::{Clock, unix_ns};
use smallvec::SmallVec;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What a first change of a block needs.
#[allow(clippy::struct_excessive_bools)] // four questions, each with its own answer
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Class {
    /// The old content must be preserved.
    pub pending: bool,
    /// The change must be recorded.
    pub unsettled: bool,
    /// It is enough to mark the change: a record of its region is there.
    pub covered: bool,
    /// The old content is not what the block reads as: a restore has not copied it yet.
    pub restoring: bool,
}

/// The bits of blocks with slots as they were when an instant was taken.
pub(super) type FrozenClasses = HashMap<u64, Class, foldhash::fast::FixedState>;

/// How often the process says that it lives; far below the doubt that is allowed, `ALIVE_SLACK_NS`.
const HEARTBEAT: std::time::Duration = std::time::Duration::from_millis(500);

/// Blocks of one run are read and written together up to this many.
const RUN_BLOCKS_MAX: u64 = 64;
/// The background thread gives up waiting for the role after this and says that the process lives.
const ROLE_WAIT: std::time::Duration = std::time::Duration::from_secs(1);

struct Work {
    block: u64,
    slots: SmallVec<[u32; 4]>,
    /// Union of the slots' sectors.
    mask: SectorMask,
    class: Class,
    /// What lies beneath the slots, where that is not what the origin holds.
    base: Option<Vec<u8>>,
}

impl State {
    pub(super) fn class(&self, block: u64) -> Class {
        Class {
            pending: self.pending.get(block),
            unsettled: self.unsettled.get(block),
            covered: self.regions.covers(block),
            restoring: self.is_restoring(block),
        }
    }

    pub(super) fn is_restoring(&self, block: u64) -> bool {
        self.restoring.as_ref().is_some_and(|restoring| restoring.blocks.get(block))
    }
}

impl Volume {
    /// Commit every slot of epochs up to `epoch_max` with a sequence number up to `upto`.
    pub(super) fn commit_until(
        &self,
        committer: &mut Committer,
        epoch_max: u32,
        upto: u64,
        frozen: Option<&FrozenClasses>,
    ) -> Result<()> {
        loop {
            let oldest = self.state.lock().buffer.oldest_sequence();
            if oldest.is_none_or(|sequence| sequence > upto) {
                return Ok(());
            }
            if !self.commit_batch(committer, epoch_max, frozen)? {
                return Ok(());
            }
        }
    }

    /// Commit the oldest slots; false if there were none.
    fn commit_batch(
        &self,
        committer: &mut Committer,
        epoch_max: u32,
        frozen: Option<&FrozenClasses>,
    ) -> Result<bool> {
        let started = Clock::now();
        let (mut taken, arena, size_bytes) = {
            let mut state = self.state.lock();
            let taken = state.buffer.take_batch(epoch_max, BATCH_BLOCKS_MAX);
            (taken, Arc::clone(state.buffer.arena()), state.size_bytes)
        };
        if taken.is_empty() {
            return Ok(false);
        }
        let mut works = self.classify(&taken, frozen);
        let unreadable = self.read_bases(&mut works, size_bytes);
        if unreadable.is_some() {
            let is_ready = |block| works.binary_search_by_key(&block, |w| w.block).is_ok();
            let (ready, waiting) = taken.into_iter().partition(|(block, _)| is_ready(*block));
            taken = ready;
            self.state.lock().buffer.put_back(&waiting);
        }
        if is_broken(Rule::SlotsUntilWritten) {
            self.state.lock().buffer.drop_batch(&taken);
        }
        if let Err(error) = self.commit_works(committer, &works, &arena, size_bytes, frozen) {
            self.state.lock().buffer.put_back(&taken);
            return Err(error);
        }
        if is_broken(Rule::SlotsUntilWritten) {
            return Ok(true);
        }
        let bytes = to_u64(works.len()) * self.block_size;
        committer.note_drained(bytes, started);
        let mut state = self.state.lock();
        state.buffer.drop_batch(&taken);
        let admitted = committer.drain_bytes_per_second / 1000
            * u64::try_from(DRAIN_TIME.as_millis()).expect("a constant");
        let slots = to_usize(admitted.max(ADMIT_BYTES_MIN) / self.block_size);
        state.admitted_slots = slots.clamp(1, state.buffer.capacity());
        Self::note_room(&mut state, committer);
        drop(state);
        self.room.notify_all();
        self.top_up(committer);
        unreadable.map_or(Ok(true), Err)
    }

    /// Read what lies beneath slots that are brought to blocks a restore has not copied. Where the
    /// store does not give it the slots are left out: they wait, and tell it, and no other block
    /// waits with them (P1).
    fn read_bases(&self, works: &mut Vec<Work>, size_bytes: u64) -> Option<Error> {
        let mut unreadable = None;
        works.retain_mut(|work| {
            let valid = self.valid_bytes(work.block, size_bytes).div_ceil(crate::buffer::SECTOR);
            if !work.class.restoring || work.mask == sectors(0, valid) {
                return true;
            }
            let mut base = vec![0; to_usize(self.block_size)];
            let read = self.read_restoring(work.block, &mut base);
            work.base = Some(base);
            read.map_err(|error| unreadable = Some(error)).is_ok()
        });
        unreadable
    }

    fn classify(
        &self,
        taken: &[(u64, SmallVec<[u32; 4]>)],
        frozen: Option<&FrozenClasses>,
    ) -> Vec<Work> {
        let state = self.state.lock();
        let work = |(block, slots): &(u64, SmallVec<[u32; 4]>)| {
            let of_block = state.buffer.of_block(*block);
            let taken = of_block.filter(|(slot, _)| slots.contains(slot));
            let mask = taken.fold(0, |mask, (_, info)| mask | info.mask);
            let class = match frozen {
                Some(frozen) => frozen.get(block).copied().unwrap_or_default(),
                None => state.class(*block),
            };
            Work { block: *block, slots: slots.clone(), mask, class, base: None }
        };
        taken.iter().map(work).collect()
    }

    fn commit_works(
        &self,
        committer: &mut Committer,
        works: &[Work],
        arena: &Arena,
        size_bytes: u64,
        frozen: Option<&FrozenClasses>,
    ) -> Result<()> {
        let forgotten = is_broken(Rule::LastBlockWhole).then_some(size_bytes / self.block_size);
        let pending = works.iter().filter(|w| w.class.pending).map(|w| w.block);
        let pending = pending.filter(move |block| Some(*block) != forgotten);
        let choice = self.choose(committer, runs_of(pending).collect(), to_u64(works.len()));
        committer.batch.begin(committer.epoch, works.len());
        self.keep_old_content(committer, choice.kept.iter().copied(), size_bytes);
        for &lost in &choice.lost {
            committer.batch.note(Kind::Lost, lost);
        }
        let is_instant = frozen.is_some();
        let is_told = |c: Class| !c.pending && (c.unsettled || (c.covered && is_instant));
        let tracked_only = works.iter().filter(|w| is_told(w.class)).map(|w| w.block);
        let told = self.by_region(committer, tracked_only, is_instant);
        for &run in &told.regions {
            committer.batch.note(Kind::Region, run);
        }
        for &block in &told.changed {
            committer.batch.note(Kind::Changed, Extent::single(block));
        }
        if is_broken(Rule::LogFirst) {
            self.write_slots(works, arena, size_bytes)?;
        }
        let is_in_log = self.record(committer)?;
        if !is_instant && !is_broken(Rule::Settle) {
            if is_in_log {
                self.cover(&told.regions);
            } else {
                // All of them count as changed: no bit is needed.
                self.settle(told.regions.iter().copied());
            }
            let is_recorded = |c: Class| c.pending || c.unsettled || c.covered;
            let recorded = works.iter().filter(|w| is_recorded(w.class));
            self.settle(runs_of(recorded.map(|w| w.block)));
        }
        self.write_slots(works, arena, size_bytes)?;
        let restored: ExtentSet =
            runs_of(works.iter().filter(|w| w.class.restoring).map(|w| w.block)).collect();
        if restored.is_empty() { Ok(()) } else { self.finish_restored(committer, &restored) }
    }

    /// Read the old content of pending blocks into the batch. What cannot be read is lost at its
    /// source: the client's write goes on (P1).
    pub(super) fn keep_old_content(
        &self,
        committer: &mut Committer,
        runs: impl Iterator<Item = Extent> + Clone,
        size_bytes: u64,
    ) {
        let mut is_prefetched = false;
        let mut rest = runs;
        while let Some(run) = rest.next() {
            let (offset, _) = run.to_bytes(self.block_size);
            let valid = to_usize(run.len() * self.block_size)
                .min(to_usize(size_bytes.saturating_sub(offset)));
            let room = committer.batch.room(run.len());
            room[valid..].fill(0);
            let room = &mut room[..valid];
            let is_cached = self.origin.try_read_at(offset, room).unwrap_or(false);
            if !is_cached && !is_prefetched {
                is_prefetched = true;
                // The device works on all of them at once while they are taken one by one.
                for later in rest.clone() {
                    let (offset, length) = later.to_bytes(self.block_size);
                    self.origin.prefetch(offset, length);
                }
            }
            if is_cached || self.origin.read_at(offset, room).is_ok() {
                committer.batch.keep(run);
            } else {
                self.keep_block_by_block(committer, run, size_bytes);
            }
        }
    }

    fn keep_block_by_block(&self, committer: &mut Committer, run: Extent, size_bytes: u64) {
        for block in run.start..run.end {
            let valid = to_usize(self.valid_bytes(block, size_bytes));
            let room = committer.batch.room(1);
            room[valid..].fill(0);
            if read_by_sectors(&*self.origin, block * self.block_size, &mut room[..valid]).is_ok() {
                committer.batch.keep(Extent::single(block));
            } else {
                committer.batch.note_lost_at_source(Extent::single(block));
            }
        }
    }

    /// Make the batch durable and publish what it says; if the log does not take it, as a loss. False
    /// if it is not in the log.
    pub(super) fn record(&self, committer: &mut Committer) -> Result<bool> {
        if committer.batch.is_empty() {
            return Ok(true);
        }
        if committer.to_undo.is_some() {
            if let Err(error) = self.undo_instant(committer) {
                self.state.lock().store_failure =
                    format!("a failed snapshot is not undone: {error}");
                return Err(error);
            }
            if !committer.log.is_open() {
                // Nobody wants to know of changes but the one that never was.
                self.clear_store_failure();
                return Ok(false);
            }
        }
        let epoch = committer.epoch;
        let appended = self.append(committer);
        let is_in_log = appended.is_ok();
        match appended {
            Ok((segment, page)) => {
                committer.segments.insert(segment, epoch);
                self.publish(committer, segment, page);
            }
            Err(source) => self.record_loss(committer, source)?,
        }
        self.clear_store_failure();
        Ok(is_in_log)
    }

    /// Append the batch where there is room for it. After a failure it is written once more, from
    /// memory, in another segment: nothing rests on what a failed sync left behind.
    fn append(&self, committer: &mut Committer) -> std::io::Result<(u32, u32)> {
        let pages = committer.batch.total_bytes() / PAGE;
        let is_mark = committer.batch.preserved().is_empty();
        let room = if is_mark { 0 } else { pages };
        if !committer.log.has_room(pages, is_mark) {
            self.try_extend(committer, room, room)?;
        }
        let Committer { log, batch, .. } = &mut *committer;
        let first = match log.append(batch) {
            Ok(at) => return Ok(at),
            Err(error) => error,
        };
        self.try_extend(committer, room, room)?;
        let Committer { log, batch, .. } = &mut *committer;
        log.append(batch).map_err(|_| first)
    }

    pub(super) fn publish(&self, committer: &Committer, segment: u32, page: u32) {
        let (epoch, counters) = (committer.epoch, &self.counters);
        let mut index = self.index.write();
        for kept in committer.batch.preserved() {
            let position = Position::new(segment, page + kept.page);
            let (block, checksum) = (kept.block, kept.checksum);
            index.insert(Record { block, position, epoch, checksum });
        }
        for descriptor in committer.batch.descriptors() {
            let blocks = descriptor.blocks;
            match descriptor.kind {
                Kind::Preserve | Kind::Done | Kind::RegionEnd => {}
                // Which of its blocks did change is told when it is closed.
                Kind::Region => Counters::add(&counters.region_records, 1),
                Kind::PreserveZero => {
                    index.insert_zero(epoch, blocks);
                    Counters::add(&counters.preserved_zero_blocks, blocks.len());
                }
                Kind::Lost => {
                    let blocks_lost = ExtentSet::from_extent(blocks);
                    if descriptor.checksum == LOST_AT_SOURCE {
                        index.insert_lost_at_source(epoch, &blocks_lost);
                    } else {
                        index.insert_lost(epoch, &blocks_lost);
                    }
                    Counters::add(&counters.lost_blocks, blocks.len());
                }
                Kind::Changed => index.insert_changed(epoch, blocks),
            }
        }
        self.index_version.fetch_add(1, Ordering::Release);
        let compaction = index.compaction();
        drop(index);
        if let Some(compaction) = compaction {
            let (first, merged) = compaction.run();
            self.index.write().finish_compaction(first, merged);
        }
        Counters::add(&counters.batches, 1);
        Counters::add(&counters.preserved_blocks, to_u64(committer.batch.preserved().len()));
        counters.log_bytes.store(committer.log.appended_bytes(), Ordering::Relaxed);
    }

    /// The blocks are recorded in this epoch, or marked in their regions: later writes to them go
    /// straight.
    pub(super) fn settle(&self, runs: impl Iterator<Item = Extent>) {
        let mut state = self.state.lock();
        for run in runs {
            state.pending.assign(run, false);
            state.unsettled.assign(run, false);
            state.regions.mark(run);
        }
    }

    /// Bring the slots' sectors to the origin. Neighbouring whole blocks go in one write.
    fn write_slots(&self, works: &[Work], arena: &Arena, size_bytes: u64) -> Result<()> {
        let whole = sectors(0, self.block_size / crate::buffer::SECTOR);
        let mut composed: Vec<Option<Vec<u8>>> = Vec::with_capacity(works.len());
        for work in works {
            let is_plain = work.slots.len() == 1 && work.mask == whole && !work.class.restoring;
            composed.push(if is_plain { None } else { Some(self.compose(work, arena)) });
        }
        let content = |at: usize| -> &[u8] {
            let valid = to_usize(self.valid_bytes(works[at].block, size_bytes));
            match &composed[at] {
                Some(bytes) => &bytes[..valid],
                None => &arena.data(works[at].slots[0])[..valid],
            }
        };
        // A restored block is written whole: its other sectors are still those from before the
        // restore.
        let is_whole = |work: &Work, at: usize| {
            let valid = to_u64(content(at).len()).div_ceil(crate::buffer::SECTOR);
            work.class.restoring || work.mask == sectors(0, valid)
        };
        let mut at = 0;
        while at < works.len() {
            let first = at;
            if is_whole(&works[at], at) {
                let mut slices = Vec::new();
                while at < works.len()
                    && works[at].block == works[first].block + to_u64(at - first)
                    && is_whole(&works[at], at)
                {
                    slices.push(content(at));
                    at += 1;
                }
                let offset = works[first].block * self.block_size;
                let written = self.origin.write_slices_at(offset, &slices);
                written.map_err(|e| self.latch_origin("writing", e))?;
                continue;
            }
            let bytes = content(at);
            for (start, end) in sector_runs(works[at].mask) {
                let from = start * crate::buffer::SECTOR;
                let to = (end * crate::buffer::SECTOR).min(to_u64(bytes.len()));
                let offset = works[at].block * self.block_size + from;
                let written = self.origin.write_at(offset, &bytes[to_usize(from)..to_usize(to)]);
                written.map_err(|e| self.latch_origin("writing", e))?;
            }
            at += 1;
        }
        Ok(())
    }

    /// The block's slots over one another; over the snapshot's content if a restore has not copied
    /// it.
    fn compose(&self, work: &Work, arena: &Arena) -> Vec<u8> {
        let base = work.base.clone();
        let mut bytes = base.unwrap_or_else(|| vec![0; to_usize(self.block_size)]);
        let state = self.state.lock();
        for (slot, info) in state.buffer.of_block(work.block) {
            if work.slots.contains(&slot) {
                overlay_sectors(arena.data(slot), info.mask, 0, &mut bytes);
            }
        }
        bytes
    }

    /// An acknowledged write did not reach the origin, or may not have: every flush and write fails
    /// from now on, across restarts, until somebody looked. A later sync that "succeeds" proves
    /// nothing.
    pub(super) fn latch_origin(&self, what: &str, source: std::io::Error) -> Error {
        let mut state = self.state.lock();
        if state.origin_failure.is_empty() {
            state.origin_failure = format!("{what}: {source}");
        }
        drop(state);
        Error::origin(what)(source)
    }

    /// Make completed writes to the origin durable; needs no role.
    pub(super) fn sync_origin(&self) -> Result<()> {
        Self::check_writable(&self.state.lock())?;
        // One at a time: the kernel tells a failed write-back to one caller only, and the others
        // would take their writes for durable. Who waited is served by a sync that began after it
        // came.
        let begun = self.syncs_begun.load(Ordering::Acquire);
        let _turn = self.syncing.lock();
        Self::check_writable(&self.state.lock())?;
        if self.syncs_begun.load(Ordering::Acquire) > begun {
            return Ok(());
        }
        self.syncs_begun.fetch_add(1, Ordering::AcqRel);
        if is_broken(Rule::FailedSyncLatches) && self.origin.sync().is_err() {
            return self.origin.sync().map_err(Error::origin("making writes durable"));
        }
        self.origin.sync().map_err(|e| self.latch_origin("making writes durable", e))
    }

    /// The background thread: commits by size, by age and when asked, and moves restores on.
    pub(super) fn run_background(&self) {
        loop {
            let mut state = self.state.lock();
            while !(state.is_stopping || state.is_kicked || has_work(&state)) {
                let timed_out = self.work.wait_for(&mut state, std::time::Duration::from_secs(1));
                if timed_out.timed_out() {
                    break;
                }
            }
            if state.is_stopping {
                return;
            }
            let enough = to_usize(COMMIT_BYTES / self.block_size);
            let deadline = Clock::now() + COMMIT_AGE;
            while !state.buffer.is_empty()
                && state.buffer.used() < enough
                && !(state.is_kicked || state.is_stopping)
            {
                if self.work.wait_until(&mut state, deadline).timed_out() {
                    break;
                }
            }
            state.is_kicked = false;
            let (is_empty, is_restoring) = (state.buffer.is_empty(), state.restoring.is_some());
            let is_lost = !state.origin_failure.is_empty();
            let is_failed = is_lost || !state.store_failure.is_empty();
            drop(state);
            if is_failed && !(is_lost || self.is_store_back()) {
                // It is tried again when somebody asks, and now and then.
                let mut state = self.state.lock();
                if !(state.is_stopping || state.is_kicked) {
                    self.work.wait_for(&mut state, std::time::Duration::from_secs(1));
                }
                continue;
            }
            if is_lost {
                self.note_failure();
                // Nothing to be done until the volume is opened anew; do not spin on it.
                let mut state = self.state.lock();
                if !state.is_stopping {
                    self.work.wait_for(&mut state, std::time::Duration::from_secs(1));
                }
                continue;
            }
            // Not for long: whoever has the role may keep it, and signs of life must go on.
            let Some(mut committer) = self.committer.try_lock_for(ROLE_WAIT) else { continue };
            if self.state.lock().is_closed {
                continue;
            }
            let is_stuck = self.background_step(&mut committer, is_empty, is_restoring);
            drop(committer);
            if is_stuck {
                // What it needs cannot be read; slots go on, and it is tried again with each batch.
                let mut state = self.state.lock();
                if !state.is_stopping {
                    self.work.wait_for(&mut state, COMMIT_AGE);
                }
            }
        }
    }

    /// The heartbeat: says in the write buffer that the process lives, so that whoever finds it
    /// killed can tell its last writes to the origin from somebody else's. A thread of its own,
    /// since the committer may wait for a device for long.
    pub(super) fn run_heartbeat(&self) {
        let mut state = self.state.lock();
        while !state.is_stopping {
            state.buffer.arena().note_alive(unix_ns());
            self.stopping.wait_for(&mut state, HEARTBEAT);
        }
    }

    /// True if the store takes records again.
    fn is_store_back(&self) -> bool {
        if let Ok(mut committer) = self.role() {
            self.retry_store(&mut committer);
        }
        self.state.lock().store_failure.is_empty()
    }

    /// A failed origin is one across restarts, a kill included.
    pub(super) fn note_failure(&self) {
        if self.state.lock().origin_failure.is_empty() {
            return;
        }
        let Ok(mut committer) = self.role() else { return };
        let reason = self.state.lock().origin_failure.clone();
        if !reason.is_empty() && !committer.is_failure_noted {
            let entry = Entry::OriginFailed { reason: reason.into_bytes() };
            committer.is_failure_noted = committer.journal.append(&entry).is_ok();
        }
    }

    /// True if the restore cannot go on now.
    fn background_step(
        &self,
        committer: &mut Committer,
        is_empty: bool,
        is_restoring: bool,
    ) -> bool {
        // Errors are latched where they occur and reported to the next flush; here nobody waits for
        // them.
        if !is_empty {
            let epoch = committer.epoch;
            let _ = self.commit_batch(committer, epoch, None);
        }
        if is_empty {
            // Somebody may have asked for room.
            self.top_up(committer);
        }
        let _ = self.rest_regions(committer);
        is_restoring && self.restore_step(committer).map_err(|e| self.note_waiting(&e)).is_err()
    }
}

fn has_work(state: &State) -> bool {
    !state.buffer.is_empty() || state.restoring.is_some()
}

impl Committer {
    fn note_drained(&mut self, bytes: u64, started: Clock) {
        let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
        let rate = bytes.saturating_mul(1_000_000) / micros;
        // Small batches are mostly latency: they say little of the rate.
        if bytes >= COMMIT_BYTES / 4 || self.drain_bytes_per_second == 0 {
            self.drain_bytes_per_second = (self.drain_bytes_per_second * 3 + rate) / 4;
        }
    }
}

/// Read a block; if that fails sector by sector: a device may fail a long read for what is not in it.
fn read_by_sectors(origin: &dyn Storage, offset: u64, content: &mut [u8]) -> std::io::Result<()> {
    if origin.read_at(offset, content).is_ok() {
        return Ok(());
    }
    let mut at = offset;
    for sector in content.chunks_mut(to_usize(crate::buffer::SECTOR)) {
        origin.read_at(at, sector)?;
        at += to_u64(sector.len());
    }
    Ok(())
}

/// Ascending blocks as runs that are short enough to be read at once.
pub(super) fn runs_of(
    blocks: impl Iterator<Item = u64> + Clone,
) -> impl Iterator<Item = Extent> + Clone {
    let mut blocks = blocks.peekable();
    std::iter::from_fn(move || {
        let start = blocks.next()?;
        let mut end = start + 1;
        while end - start < RUN_BLOCKS_MAX && blocks.next_if_eq(&end).is_some() {
            end += 1;
        }
        Some(Extent::new(start, end))
    })
}

//! Restoring in place: from the instant of the restore the live disk *reads* as restored; copying
//! comes behind.
//!
//! The restore is part of the commit of its safety snapshot. Each block to be restored is read from
//! the source snapshot until a DONE record says that the origin holds it. Client writes to such
//! blocks keep their slots until then. The copier uses no slots: originals to the log, sync, write,
//! sync, DONE.

use super::commit::runs_of;
use super::past::Patience;
use super::room::Claim;
use super::{Committer, Moment, SnapshotRequest, Volume};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::journal::Entry;
use crate::log::format::{Kind, RestoreHeader};
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use crate::sync::{Clock, MutexGuard};
use std::sync::Arc;
use std::time::Duration;

/// Blocks the copier moves at once: a client's flush waits no longer than for these.
const COPY_BLOCKS: usize = 256;
/// A snapshot asked for during a restore waits for the copier this long.
const SNAPSHOT_WAIT: Duration = Duration::from_secs(30);

/// What to put back.
pub struct RestoreRequest {
    /// The snapshot whose content comes back.
    pub source_epoch: u32,
    /// Which blocks may be written.
    pub request: ExtentSet,
    /// What the safety snapshot selects, beside everything the restore writes.
    pub safety_selection: ExtentSet,
    /// What of it matters less.
    pub safety_low: ExtentSet,
    /// The safety snapshot's opaque bytes.
    pub meta: Vec<u8>,
    /// As for any snapshot.
    pub pause_limit: Duration,
}

/// How far a restore is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoreStatus {
    /// The snapshot whose content comes back.
    pub source_epoch: u32,
    /// The snapshot that undoes it.
    pub safety_epoch: u32,
    /// Bytes to be restored in all.
    pub total_bytes: u64,
    /// Bytes restored or overwritten since.
    pub done_bytes: u64,
}

/// A restore whose instant is still to come.
pub(super) struct PreparedRestore {
    source_epoch: u32,
    request: ExtentSet,
}

impl Volume {
    /// Start a restore; when this returns the live disk reads as restored, and will after any
    /// crash.
    pub fn restore(&self, request: &RestoreRequest) -> Result<RestoreStatus> {
        self.told(self.with_patience(|| self.start_restore(request)))
    }

    fn start_restore(&self, request: &RestoreRequest) -> Result<RestoreStatus> {
        let mut committer = self.role()?;
        self.close_regions_first(&mut committer)?;
        self.finish_restore_first(&mut committer)?;
        let source = self.restorable(request.source_epoch)?;
        let writes = source.intersection(&request.request);
        let prepared = PreparedRestore { source_epoch: request.source_epoch, request: writes };
        let safety = SnapshotRequest {
            selection: request.safety_selection.union(&prepared.request),
            low: request.safety_low.clone(),
            meta: request.meta.clone(),
            pause_limit: request.pause_limit,
        };
        let instant =
            self.take_instant(&mut committer, safety, Some(&prepared), Moment::default())?;
        drop(committer);
        let status = self.restore_status();
        Ok(status.unwrap_or(RestoreStatus {
            source_epoch: prepared.source_epoch,
            safety_epoch: instant.epoch,
            total_bytes: 0,
            done_bytes: 0,
        }))
    }

    fn restorable(&self, epoch: u32) -> Result<Arc<ExtentSet>> {
        let source = {
            let epochs = self.epochs.read();
            if let Some(found) = epochs.0.get(&epoch) {
                super::release::check_header(epoch, found)?;
            }
            let found = epochs.0.get(&epoch).and_then(|e| e.selection.clone());
            found.ok_or_else(|| Error::NotFound(format!("epoch {epoch} has no snapshot")))?
        };
        if self.index.read().is_damaged_since(epoch) {
            return Err(Error::Damaged(format!(
                "the log is damaged since snapshot {epoch}: what changed is not known, nothing \
                 was restored; \
                 copy what can be read out of the snapshot instead"
            )));
        }
        Ok(source)
    }

    /// What a restore would write now, apart from writes still to come.
    pub fn restore_plan(&self, epoch: u32, request: &ExtentSet) -> Result<ExtentSet> {
        let source = self.restorable(epoch)?;
        let changed = self.changed(epoch, None)?;
        let lost = self.with_patience(|| self.lost_since(epoch))?;
        Ok(changed.intersection(&source).intersection(request).difference(&lost))
    }

    /// At the instant: everything before it is recorded, nothing after it is.
    pub(super) fn restore_header(&self, prepared: &PreparedRestore) -> Result<RestoreHeader> {
        let changed = self.with_index(|| {
            let parts = self.index.read().parts();
            parts.changed(prepared.source_epoch, u32::MAX)
        })?;
        let lost = self.lost_since(prepared.source_epoch)?;
        let blocks = changed.intersection(&prepared.request).difference(&lost);
        Ok(RestoreHeader { source_epoch: prepared.source_epoch, blocks })
    }

    /// The running restore, if there is one.
    pub fn restore_status(&self) -> Option<RestoreStatus> {
        let state = self.state.lock();
        state.restoring.as_ref().map(|restoring| RestoreStatus {
            source_epoch: restoring.source_epoch,
            safety_epoch: restoring.safety_epoch,
            total_bytes: restoring.total_blocks * self.block_size,
            done_bytes: (restoring.total_blocks - restoring.remaining_blocks) * self.block_size,
        })
    }

    /// Wait until no restore runs; false if one still does after `timeout`.
    pub fn wait_restored(&self, timeout: Duration) -> Result<bool> {
        self.told(self.wait_until_restored(timeout))
    }

    fn wait_until_restored(&self, timeout: Duration) -> Result<bool> {
        let deadline = Clock::now() + timeout;
        loop {
            {
                let mut state = self.state.lock();
                if state.restoring.is_none() {
                    return Ok(true);
                }
                if state.is_closed {
                    return Err(Error::Closed);
                }
                if !state.origin_failure.is_empty() {
                    let why = std::io::Error::other(state.origin_failure.clone());
                    return Err(Error::origin("restore stopped")(why));
                }
                if Clock::now() >= deadline {
                    return Ok(false);
                }
                if let Some(failure) = state.restoring.as_ref().map(|r| r.failure.clone())
                    && !failure.is_empty()
                    && self.has_background
                {
                    let failed = Error::store("restoring")(std::io::Error::other(failure));
                    return Err(failed);
                }
                if self.has_background {
                    let step = deadline.min(Clock::now() + Duration::from_millis(100));
                    self.restore_ended.wait_until(&mut state, step);
                    continue;
                }
            }
            let mut committer = self.role()?;
            self.restore_step(&mut committer)?;
        }
    }

    /// The origin alone is not the live disk while a restore runs: an instant has to wait for it.
    pub(super) fn finish_restore_first(
        &self,
        committer: &mut MutexGuard<'_, Committer>,
    ) -> Result<()> {
        let deadline = Clock::now() + SNAPSHOT_WAIT;
        while self.restore_step(committer)? {
            if Clock::now() >= deadline {
                return Err(Error::RestoreRunning(format!(
                    "a restore is still copying after {} s; take the snapshot when it is done",
                    SNAPSHOT_WAIT.as_secs()
                )));
            }
            // Flushes and the buffer go on meanwhile.
            MutexGuard::bump(committer);
            if self.state.lock().is_closed {
                return Err(Error::Closed);
            }
        }
        Ok(())
    }

    /// Copy some blocks back; false if no restore runs any more.
    pub(super) fn restore_step(&self, committer: &mut Committer) -> Result<bool> {
        let (blocks, has_more, upto, size_bytes) = {
            let state = self.state.lock();
            let Some(restoring) = &state.restoring else { return Ok(false) };
            let all = Extent::new(0, restoring.blocks.block_count());
            let wanted = restoring.blocks.set_within(all).flat_map(|e| e.start..e.end);
            let free =
                wanted.filter(|&b| !state.buffer.has(b) && !restoring.unreadable.contains(&b));
            let blocks: Vec<u64> = free.take(COPY_BLOCKS).collect();
            (blocks, restoring.remaining_blocks > 0, state.buffer.last_sequence(), state.size_bytes)
        };
        if !has_more {
            return self.end_restore(committer).map(|()| false);
        }
        if blocks.is_empty() {
            // All that is left was written by clients: their slots bring it home.
            let epoch = committer.epoch;
            let committed = self.commit_until(committer, epoch, upto, None);
            return self.try_unreadable_again().and(committed).map(|()| true);
        }
        self.copy_back(committer, &blocks, size_bytes)?;
        Ok(true)
    }

    /// All other blocks are done. The disk reads as restored but for these, which give errors.
    fn try_unreadable_again(&self) -> Result<()> {
        let mut state = self.state.lock();
        let Some(restoring) = &mut state.restoring else { return Ok(()) };
        if restoring.unreadable.is_empty() {
            return Ok(());
        }
        let what = format!("restoring: {} blocks cannot be read", restoring.unreadable.len());
        restoring.unreadable.clear();
        let failure = std::mem::take(&mut restoring.failure);
        Err(Error::store(what)(std::io::Error::other(failure)))
    }

    /// The blocks that can be read, and their content. The others wait until all else is done.
    fn read_back(&self, blocks: &[u64]) -> (Vec<u64>, Vec<u8>) {
        let size = to_usize(self.block_size);
        let (mut readable, mut content) = (Vec::with_capacity(blocks.len()), Vec::new());
        for &block in blocks {
            let at = content.len();
            content.resize(at + size, 0);
            match self.read_restoring(block, &mut content[at..]) {
                Ok(()) => readable.push(block),
                Err(error) => {
                    content.truncate(at);
                    if let Some(restoring) = &mut self.state.lock().restoring {
                        restoring.unreadable.insert(block);
                        restoring.failure = error.to_string();
                    }
                }
            }
        }
        (readable, content)
    }

    /// A restore that waits for room says so to whoever waits for it.
    pub(super) fn note_waiting(&self, error: &Error) {
        if let (Error::StoreFull(why), Some(restoring)) = (error, &mut self.state.lock().restoring)
        {
            restoring.failure.clone_from(why);
        }
    }

    fn copy_back(&self, committer: &mut Committer, blocks: &[u64], size: u64) -> Result<()> {
        let (blocks, content) = &self.read_back(blocks);
        let (mut pending, changed): (Vec<Extent>, Vec<u64>) = {
            let state = self.state.lock();
            let of = |wanted: &dyn Fn(u64) -> bool| -> Vec<u64> {
                blocks.iter().copied().filter(|&b| wanted(b)).collect()
            };
            let pending = of(&|b| state.pending.get(b));
            (
                runs_of(pending.into_iter()).collect(),
                of(&|b| state.unsettled.get(b) && !state.pending.get(b)),
            )
        };
        let pending_blocks = pending.iter().map(|e| e.len()).sum();
        let mut lost = Vec::new();
        match self.claim(committer, to_u64(blocks.len()), pending_blocks)? {
            Claim::Keep => {}
            Claim::Wait => {
                return Err(Error::StoreFull(
                    "the store is full: the restore waits and goes on by itself; delete a \
                     snapshot, give the store room or raise --store-limit"
                        .into(),
                ));
            }
            Claim::Lose => {
                let choice = self.choose(committer, pending, to_u64(blocks.len()));
                (pending, lost) = (choice.kept, choice.lost);
            }
        }
        committer.batch.begin(committer.epoch, blocks.len());
        self.keep_old_content(committer, pending.into_iter(), size);
        for extent in lost {
            committer.batch.note(Kind::Lost, extent);
        }
        for block in changed {
            committer.batch.note(Kind::Changed, Extent::single(block));
        }
        self.record(committer)?;
        self.top_up(committer);
        if let Some(restoring) = &mut self.state.lock().restoring
            && restoring.unreadable.is_empty()
        {
            restoring.failure.clear();
        }
        self.settle(runs_of(blocks.iter().copied()));
        let mut rest = content.as_slice();
        for run in runs_of(blocks.iter().copied()) {
            let (offset, length) = run.to_bytes(self.block_size);
            let (part, later) = rest.split_at(to_usize(length));
            rest = later;
            let valid = to_usize(length.min(size - offset));
            let written = self.origin.write_at(offset, &part[..valid]);
            written.map_err(|e| self.latch_origin("restoring", e))?;
        }
        let restored: ExtentSet = runs_of(blocks.iter().copied()).collect();
        self.finish_restored(committer, &restored)
    }

    /// The origin holds these blocks as they are to be: make that durable, then read them from
    /// there.
    pub(super) fn finish_restored(
        &self,
        committer: &mut Committer,
        blocks: &ExtentSet,
    ) -> Result<()> {
        if !is_broken(Rule::DoneAfterSync) {
            self.sync_origin()?;
        }
        for group in blocks.as_slice().chunks(crate::log::format::BATCH_BLOCKS_MAX) {
            committer.batch.begin(committer.epoch, group.len());
            for &extent in group {
                committer.batch.note(Kind::Done, extent);
            }
            if !is_broken(Rule::DoneRecorded) {
                self.record(committer)?;
            }
            let mut state = self.state.lock();
            state.restored += 1;
            if let Some(restoring) = &mut state.restoring {
                for &extent in group {
                    let open: u64 = restoring.blocks.set_within(extent).map(Extent::len).sum();
                    restoring.remaining_blocks -= open;
                    restoring.blocks.assign(extent, false);
                }
            }
        }
        Ok(())
    }

    fn end_restore(&self, committer: &mut Committer) -> Result<()> {
        let Some(status) = self.restore_status() else { return Ok(()) };
        committer.journal.append(&Entry::RestoreEnded { epoch: status.safety_epoch })?;
        {
            let mut epochs = self.epochs.write();
            for epoch in [status.source_epoch, status.safety_epoch] {
                if let Some(found) = epochs.0.get_mut(&epoch) {
                    found.pins = found.pins.saturating_sub(1);
                }
            }
        }
        let mut state = self.state.lock();
        state.restored += 1;
        state.restoring = None;
        drop(state);
        self.restore_ended.notify_all();
        Ok(())
    }

    /// What a block that is still to be restored reads as, its slots apart. What the disk has
    /// beyond its size at the source's instant stays.
    pub(super) fn read_restoring(&self, block: u64, content: &mut [u8]) -> Result<()> {
        let source = {
            let state = self.state.lock();
            state.restoring.as_ref().map(|restoring| restoring.source_epoch)
        };
        let size_bytes = self.size_bytes();
        let valid = to_usize(self.valid_bytes(block, size_bytes));
        content.fill(0);
        let Some(source) = source else {
            // It ended a moment ago: the origin has everything.
            let read = self.origin.read_at(block * self.block_size, &mut content[..valid]);
            return read.map_err(Error::origin("read"));
        };
        let origin_bytes = self.epochs.read().0.get(&source).map_or(size_bytes, |e| e.origin_bytes);
        let then_valid = to_usize(self.valid_bytes(block, origin_bytes.min(size_bytes)));
        self.read_at_epoch(source, Extent::single(block), content, Patience::Wait)?;
        if then_valid < valid {
            let offset = block * self.block_size + to_u64(then_valid);
            let read = self.origin.read_at(offset, &mut content[then_valid..valid]);
            read.map_err(Error::origin("read"))?;
        }
        Ok(())
    }
}

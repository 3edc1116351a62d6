//! Finishing what was interrupted: what an earlier process left is made whole before anyone is
//! served.

use super::decided::apply;
use super::{Committer, Volume};
use crate::buffer::{LeftBuffer, LeftRegion};
use crate::error::{Error, Result};
use crate::extent::ExtentSet;
use crate::journal::Entry;
use crate::log::writer::LogEnd;
use crate::sabotage::{Rule, is_broken};
use crate::sync::unix_ns;
use std::path::{Path, PathBuf};

/// What an earlier process left behind.
#[derive(Default)]
pub(super) struct Past {
    pub(super) suspect: Option<String>,
    pub(super) left: Option<(PathBuf, LeftBuffer)>,
    /// Epochs in which records are gone, with every block.
    pub(super) losses: Vec<(u32, ExtentSet)>,
    /// How groups ended that the journal does not tell of yet.
    pub(super) groups: Vec<Entry>,
    /// What its memory says was written in regions.
    pub(super) regions: Vec<LeftRegion>,
}

/// Files that are of no use any more.
pub(super) struct Leftovers {
    /// There are files of instants that never came.
    pub(super) has_unfinished: bool,
    /// Segments that a merged one stands for.
    pub(super) superseded: Vec<u32>,
    /// Index files.
    pub(super) runs: Vec<u32>,
    /// Names of merged segments that were not finished.
    pub(super) merged: Vec<String>,
}

/// Rebuilding the index takes several times its size for a moment; the allocator would keep it.
pub(super) fn return_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer and only returns free memory to the system.
    unsafe {
        libc::malloc_trim(0);
    }
}

impl Volume {
    /// Finish what was interrupted. A process that was killed had its writes taken by the kernel,
    /// but not made durable: sync before anything is trusted. What its own sync failed for the
    /// kernel takes for durable: that is written once more.
    ///
    /// `end` is where the log of a volume ends that was not closed; `open_regions` are blocks that
    /// may have changed without a record.
    pub(super) fn settle_the_past(
        &self,
        past: Past,
        end: Option<LogEnd>,
        open_regions: &ExtentSet,
        leftovers: &Leftovers,
    ) -> Result<()> {
        let mut committer = self.committer.lock();
        let epoch = committer.epoch;
        committer.journal.settle_left()?;
        committer.journal.rewrite_last()?;
        // What cannot be recorded below is recorded there, as exactly as there is room.
        committer.journal.reserve();
        if let Some(end) = end {
            let rewritten = committer.log.rewrite_end(&end);
            rewritten.map_err(Error::store("making the end of the log durable"))?;
        }
        self.origin.sync().map_err(Error::origin("sync at opening"))?;
        for entry in &past.groups {
            committer.journal.append(entry)?;
        }
        // Before anything is recorded: a first change made from here on must not be taken for the
        // one that is gone (P2).
        for (epoch, blocks) in past.losses {
            committer.journal.append(&Entry::Lost { epoch, blocks })?;
        }
        let slots = past.left.as_ref().map_or(0, |(_, left)| left.slots.len());
        self.settle_left(&mut committer, open_regions, &past.regions, slots);
        let first = self.epochs.read().first().unwrap_or(epoch + 1);
        let mut useless = self.index.write().forget_before(first.min(epoch + 1));
        useless.extend(&leftovers.runs);
        self.remove_runs(&useless)?;
        self.remove_superseded(leftovers)?;
        {
            let blocks = self.block_count(self.size_bytes());
            let (unsettled, pending) = self.bits(epoch, blocks);
            let mut state = self.state.lock();
            state.replace_bits((unsettled, pending));
            if let Some(restoring) = &state.restoring {
                let pinned = [restoring.source_epoch, restoring.safety_epoch];
                drop(state);
                let mut epochs = self.epochs.write();
                for epoch in pinned {
                    if let Some(found) = epochs.0.get_mut(&epoch) {
                        found.pins += 1;
                    }
                }
            }
        }
        if leftovers.has_unfinished {
            self.remove_unfinished(&committer)?;
        }
        if let Some(reason) = past.suspect {
            self.mark_suspect(&mut committer, &reason)?;
        }
        if let Some((path, left)) = past.left.filter(|_| !is_broken(Rule::LeftReplayed)) {
            self.replay(&mut committer, &path, &left)?;
        }
        return_memory();
        Ok(())
    }

    /// Files that a merged segment stands for, and merged segments that were not finished.
    fn remove_superseded(&self, leftovers: &Leftovers) -> Result<()> {
        let directory = self.segments.directory();
        if leftovers.superseded.is_empty() && leftovers.merged.is_empty() {
            return Ok(());
        }
        // The merged segment's name may be as new as the process that was killed.
        directory.sync().map_err(Error::store("store directory"))?;
        for &segment in &leftovers.superseded {
            self.segments.remove(segment).map_err(Error::store("removing a log segment"))?;
        }
        for name in &leftovers.merged {
            directory.remove(name).map_err(Error::store("removing a log segment"))?;
        }
        directory.sync().map_err(Error::store("store directory"))
    }

    /// Files of instants that never came.
    pub(super) fn remove_unfinished(&self, committer: &Committer) -> Result<()> {
        let names = self.segments.directory().list().map_err(Error::store("listing the log"))?;
        let numbers = names.iter().filter_map(|n| crate::log::writer::segment_number(n));
        let unknown: Vec<u32> =
            numbers.filter(|number| !committer.segments.contains_key(number)).collect();
        for segment in unknown {
            let file = self.segments.get(segment).map_err(Error::store("log segment"))?;
            // What holds records is never deleted because something else does not know it.
            let is_empty = crate::log::scan::is_without_batches(&file, self.uuid);
            if is_empty.map_err(Error::store("log segment"))? || is_broken(Rule::UnknownLogKept) {
                self.segments.remove(segment).map_err(Error::store("log segment"))?;
            }
        }
        self.segments.directory().sync().map_err(Error::store("store directory"))
    }

    pub(super) fn mark_suspect(&self, committer: &mut Committer, reason: &str) -> Result<()> {
        let last = self.epochs.read().0.keys().next_back().copied();
        let Some(epoch) = last else { return Ok(()) };
        let entry = Entry::Suspect { epoch, reason: reason.as_bytes().to_vec() };
        committer.journal.append(&entry)?;
        apply(&mut self.epochs.write(), &entry);
        Ok(())
    }

    /// Bring acknowledged writes of a killed process to the origin. Repeatable: their originals are
    /// in the log or still on the origin, and the file stays until all is durable.
    pub(super) fn replay(
        &self,
        committer: &mut Committer,
        path: &Path,
        left: &LeftBuffer,
    ) -> Result<()> {
        let epoch = committer.epoch;
        // Interrupted, it is done again; the origin is then as new as this.
        let alive = || {
            let noted = self.host.note_replaying(path, unix_ns());
            noted.map_err(Error::store("write buffer"))
        };
        alive()?;
        if is_broken(Rule::ReplayBeforeClosed) {
            self.note_replayed(committer)?;
        }
        for slot in &left.slots {
            let is_full = {
                let mut state = self.state.lock();
                let blocks = state.unsettled.block_count();
                if slot.block < blocks {
                    state.buffer.adopt(slot, epoch);
                }
                state.buffer.free_count() == 0
            };
            if is_full {
                self.commit_until(committer, epoch, u64::MAX, None)?;
                alive()?;
            }
        }
        self.commit_until(committer, epoch, u64::MAX, None)?;
        self.sync_origin()?;
        self.note_replayed(committer)
    }

    fn note_replayed(&self, committer: &mut Committer) -> Result<()> {
        let identity = self.origin_device.identify().map_err(Error::origin("identifying it"))?;
        let next_batch = committer.log.next_batch();
        committer.journal.append(&Entry::Closed { identity, next_batch })?;
        Ok(())
    }
}

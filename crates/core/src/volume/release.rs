//! Letting go: deleting and narrowing snapshots, bookmarks, and what changed between instants. The
//! space goes back in `freeing`.

use super::gate::Guarded;
use super::{Committer, Volume};
use crate::epochs::{Bookmark, Epoch};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::index::copies::{Usage, for_each_copy};
use crate::index::parts::Walk;
use crate::journal::{Entry, Settled};
use crate::regions::runs_of;
use crate::sabotage::{Rule, is_broken};
use crate::sync::MutexGuard;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Slots that are wiped under one hold of the state lock: a mebibyte, well below a millisecond.
const WIPED_AT_ONCE: usize = 256;

/// One instant, for people.
#[derive(Debug, Clone)]
pub struct EpochInfo {
    /// Its number.
    pub epoch: u32,
    /// Everything the engine knows of it.
    pub state: Epoch,
    /// Blocks the snapshot selects, or the bookmark tracks.
    pub selected_blocks: u64,
    /// Blocks with content the snapshot reads from the store, shared ones included.
    pub preserved_blocks: u64,
    /// Those that no other snapshot reads.
    pub exclusive_blocks: u64,
    /// Blocks whose content is lost.
    pub lost: ExtentSet,
    /// Blocks whose content is there and is known to fail its checksum.
    pub damaged: ExtentSet,
    /// Those of them that the origin could not give.
    pub lost_at_source: ExtentSet,
}

fn unknown(epoch: u32, what: &str) -> Error {
    Error::NotFound(format!("epoch {epoch} has no {what}"))
}

/// What a snapshot without its header selects is not known, nor whether one of an undecided group
/// exists: everything asked of it is an error.
pub(super) fn check_header(number: u32, epoch: &Epoch) -> Result<()> {
    if !epoch.undecided.is_empty() {
        return Err(Error::Undecided(format!(
            "snapshot {number}: {}; open the volume where that store is, or delete the snapshot; \
             if nobody can tell any more, volume recover --keep-undecided keeps it",
            epoch.undecided
        )));
    }
    if epoch.damage.is_empty() {
        return Ok(());
    }
    Err(Error::Damaged(format!("snapshot {number}: {}", epoch.damage)))
}

impl Volume {
    /// Every live instant, ascending.
    pub fn epochs(&self) -> Result<Vec<EpochInfo>> {
        self.with_patience(|| self.list_epochs())
    }

    fn list_epochs(&self) -> Result<Vec<EpochInfo>> {
        let epochs = self.epochs.read().clone();
        let mut damaged: BTreeMap<u32, ExtentSet> = BTreeMap::new();
        for (epoch, selection) in epochs.snapshots() {
            damaged.insert(epoch, self.damaged_of(epoch, selection)?);
        }
        let end = self.block_count(self.size_bytes());
        let (preserved, lost) = self.with_index(|| {
            let parts = self.index.read().parts();
            let mut usage = Usage::new(&epochs.selections());
            let (mut walk, mut entries) = (Walk::new(0, end), Vec::new());
            while parts.next_window(&mut walk, &mut entries)? {
                for_each_copy(&entries, |entry, previous| usage.add(entry, previous));
            }
            let mut lost: BTreeMap<u32, (ExtentSet, ExtentSet)> = BTreeMap::new();
            for (epoch, selection) in epochs.snapshots() {
                let all = parts.lost_since(epoch, end)?.intersection(selection);
                let at_source = parts.lost_at_source_since(epoch, Extent::new(0, end))?;
                let at_source = at_source.intersection(&all);
                lost.insert(epoch, (all, at_source));
            }
            Ok((usage.counts(), lost))
        })?;
        let info = |(epoch, state): (u32, Epoch)| {
            let (preserved_blocks, exclusive_blocks) =
                preserved.get(&epoch).copied().unwrap_or_default();
            let selected = state.tracked().next().map_or(0, |set| set.block_count());
            let (lost, lost_at_source) = lost.get(&epoch).cloned().unwrap_or_default();
            EpochInfo {
                epoch,
                selected_blocks: selected,
                preserved_blocks,
                exclusive_blocks,
                lost,
                lost_at_source,
                damaged: damaged.get(&epoch).cloned().unwrap_or_default(),
                state,
            }
        };
        Ok(epochs.0.into_iter().map(info).collect())
    }

    /// What a snapshot selects, else what its bookmark tracks; and the size at its instant.
    pub fn selection(&self, epoch: u32) -> Result<(Arc<ExtentSet>, u64)> {
        let epochs = self.epochs.read();
        let found = epochs.0.get(&epoch);
        let found = found.and_then(|e| Some((Arc::clone(e.tracked().next()?), e.origin_bytes)));
        found.ok_or_else(|| unknown(epoch, "snapshot or bookmark"))
    }

    /// Replace a snapshot's opaque bytes; durable when this returns.
    pub fn set_epoch_meta(&self, epoch: u32, meta: Vec<u8>) -> Result<()> {
        let mut committer = self.role()?;
        self.check_snapshot(epoch)?;
        self.check_decided(epoch)?;
        committer.journal.append(&Entry::EpochMeta { epoch, meta: meta.clone() })?;
        if let Some(found) = self.epochs.write().0.get_mut(&epoch) {
            found.meta = meta;
        }
        Ok(())
    }

    fn check_snapshot(&self, epoch: u32) -> Result<()> {
        let epochs = self.epochs.read();
        let is_there = epochs.0.get(&epoch).is_some_and(Epoch::has_snapshot);
        if is_there { Ok(()) } else { Err(unknown(epoch, "snapshot")) }
    }

    /// Select less from now on; tells the bytes freed.
    pub fn narrow(&self, epoch: u32, selection: &ExtentSet) -> Result<u64> {
        self.narrow_with(epoch, selection, None)
    }

    /// Select less from now on and, in the same decision, settle what else depends on it; tells the
    /// bytes freed. When this returns, no content of a block that nobody selects any more is in the
    /// store or in the write buffer.
    pub fn narrow_with(
        &self,
        epoch: u32,
        selection: &ExtentSet,
        settled: Option<Settled>,
    ) -> Result<u64> {
        let mut committer = self.role()?;
        let old = {
            let epochs = self.epochs.read();
            if let Some(found) = epochs.0.get(&epoch) {
                check_header(epoch, found)?;
            }
            let found = epochs.0.get(&epoch).and_then(|e| e.selection.clone());
            found.ok_or_else(|| unknown(epoch, "snapshot"))?
        };
        self.check_not_restoring_from(epoch)?;
        let narrowed = Arc::new(old.intersection(selection));
        let low =
            |settled: Settled| Settled { low: settled.low.intersection(&narrowed), ..settled };
        let settled = settled.map(low);
        let entry = Entry::Narrowed { epoch, selection: (*narrowed).clone(), settled };
        committer.journal.append(&entry)?;
        if let Some(found) = self.epochs.write().0.get_mut(&epoch) {
            found.selection = Some(narrowed);
            if let Entry::Narrowed { settled: Some(settled), .. } = entry {
                found.meta = settled.meta;
                found.low = Arc::new(settled.low);
            }
        }
        if is_broken(Rule::NarrowInRole) {
            let bits = self.bits(committer.epoch, self.block_count(self.size_bytes()));
            MutexGuard::bump(&mut committer);
            let mut state = self.state.lock();
            if bits.0.block_count() == state.unsettled.block_count() {
                state.replace_bits(bits);
            }
            return Ok(0);
        }
        // First changes of what it let go of take no slots from here on.
        self.note_decision(&mut committer);
        self.wipe_buffer(&mut committer);
        drop(committer);
        self.free_space()
    }

    /// Wipe the slots that nobody uses: they hold what was written once, to blocks that nobody may
    /// select any more. Those in use are committed, and wiped when they are dropped.
    fn wipe_buffer(&self, committer: &mut Committer) {
        let (epoch, upto) = {
            let mut state = self.state.lock();
            state.buffer.wipe_when_dropped();
            (committer.epoch, state.buffer.last_sequence())
        };
        while !self.state.lock().buffer.wipe_free(WIPED_AT_ONCE) {}
        // What fails here is latched, and told to the next flush; the slots stay until it is not.
        let _ = self.commit_until(committer, epoch, upto, None);
    }

    fn check_not_restoring_from(&self, epoch: u32) -> Result<()> {
        let state = self.state.lock();
        let is_held = |r: &super::Restoring| r.source_epoch == epoch || r.safety_epoch == epoch;
        if state.restoring.as_ref().is_some_and(is_held) {
            return Err(Error::RestoreRunning(format!(
                "snapshot {epoch} takes part in a running restore; wait for it or cancel it"
            )));
        }
        Ok(())
    }

    /// Delete a snapshot; tells the bytes freed. In use, it is refused unless forced; its views
    /// then fail.
    pub fn delete_snapshot(&self, epoch: u32, force: bool) -> Result<u64> {
        let decided = self.hold_without_clones(epoch)?;
        let mut committer = self.role()?;
        self.check_snapshot(epoch)?;
        self.check_not_restoring_from(epoch)?;
        let pins = self.epochs.read().0.get(&epoch).map_or(0, |e| e.pins);
        if pins > 0 && !force {
            return Err(Error::InUse(format!(
                "snapshot {epoch} is in use by {pins} readers; close them, or delete it with \
                 --force"
            )));
        }
        let is_gone = committer.end_group_before_deletion(epoch)?;
        if !is_gone && !is_broken(Rule::RecordBeforeFree) {
            committer.journal.append(&Entry::Deleted { epoch })?;
        }
        {
            let mut epochs = self.epochs.write();
            if let Some(found) = epochs.0.get_mut(&epoch) {
                found.selection = None;
                found.damage.clear();
                found.undecided.clear();
            }
            epochs.drop_dead();
        }
        drop(decided);
        let freed = self.let_go(committer)?;
        if is_broken(Rule::RecordBeforeFree) {
            self.role()?.journal.append(&Entry::Deleted { epoch })?;
        }
        Ok(freed)
    }

    /// Keep what a snapshot selects as the baseline of a later increment.
    pub fn bookmark(&self, epoch: u32, meta: Vec<u8>) -> Result<()> {
        let mut committer = self.role()?;
        self.check_snapshot(epoch)?;
        if let Some(found) = self.epochs.read().0.get(&epoch) {
            check_header(epoch, found)?;
        }
        committer.journal.append(&Entry::Bookmarked { epoch, meta: meta.clone() })?;
        if let Some(found) = self.epochs.write().0.get_mut(&epoch) {
            let baseline = found.selection.clone().unwrap_or_default();
            found.bookmark = Some(Bookmark { baseline, meta });
        }
        Ok(())
    }

    /// Take the origin as it is: snapshots are not in doubt any more. The doubt and the note stay
    /// beside them. Tells how many there were.
    pub fn accept_origin(&self, note: &str) -> Result<usize> {
        let mut committer = self.role()?;
        let in_doubt = |e: &Epoch| !e.suspect.is_empty();
        let (count, last) = {
            let epochs = self.epochs.read();
            let count = epochs.0.values().filter(|e| in_doubt(e)).count();
            (count, epochs.0.keys().next_back().copied())
        };
        let Some(epoch) = last.filter(|_| count > 0) else { return Ok(0) };
        let entry = Entry::Accepted { epoch, note: note.as_bytes().to_vec() };
        committer.journal.append(&entry)?;
        super::decided::apply(&mut self.epochs.write(), &entry);
        Ok(count)
    }

    /// Forget a bookmark.
    pub fn delete_bookmark(&self, epoch: u32) -> Result<()> {
        let mut committer = self.role()?;
        let has_one = self.epochs.read().0.get(&epoch).is_some_and(|e| e.bookmark.is_some());
        if !has_one {
            return Err(unknown(epoch, "bookmark"));
        }
        committer.journal.append(&Entry::BookmarkDeleted { epoch })?;
        {
            let mut epochs = self.epochs.write();
            if let Some(found) = epochs.0.get_mut(&epoch) {
                found.bookmark = None;
            }
            epochs.drop_dead();
        }
        self.let_go(committer).map(|_| ())
    }

    /// The bits follow the registry; then the space goes back.
    fn let_go(&self, mut committer: MutexGuard<'_, Committer>) -> Result<u64> {
        self.note_decision(&mut committer);
        drop(committer);
        self.free_space()
    }

    /// Something is to be given back, and the bits follow the registry. Holds the role for them: no
    /// batch is under way, and only requests that set nothing run beside it. Bits only go down here,
    /// and no slot, batch or instant can set or clear one meanwhile.
    ///
    /// What is settled stays so, blocks of open regions included, which no index knows: writes may
    /// be on their way straight to them, and a write that took a slot now could bring back what it
    /// read before those came (P1).
    pub(super) fn note_decision(&self, committer: &mut Committer) {
        committer.decisions += 1;
        let blocks = self.block_count(self.size_bytes());
        let (mut unsettled, pending) = self.bits(committer.epoch, blocks);
        let before = self.state.lock().unsettled.clone();
        if unsettled.block_count() != before.block_count() {
            return;
        }
        if committer.to_undo.is_some() {
            // With it what the instant selects that is not undone.
            unsettled = before;
        } else {
            unsettled.keep_only(&before);
            drop(before);
        }
        let mut state = self.state.lock();
        (state.unsettled, state.pending) = (unsettled, pending);
    }

    pub(super) fn allocated(&self, committer: &Committer) -> Result<u64> {
        self.log_bytes(committer).map_err(Error::store("log segment"))
    }

    /// Blocks whose content since an instant is lost.
    pub(crate) fn lost_since(&self, epoch: u32) -> Result<ExtentSet> {
        let end = self.block_count(self.size_bytes());
        self.with_index(|| {
            let parts = self.index.read().parts();
            parts.lost_since(epoch, end)
        })
    }

    pub(crate) fn check_held_open(&self) -> Result<()> {
        self.check_held()
    }

    fn check_held(&self) -> Result<()> {
        let is_released = self.is_released.load(std::sync::atomic::Ordering::Acquire);
        if is_released { Err(Error::Closed) } else { Ok(()) }
    }

    /// Hold a snapshot for a reader; tells its size.
    pub(crate) fn pin(&self, epoch: u32) -> Result<u64> {
        self.check_held()?;
        let mut epochs = self.epochs.write();
        let found = epochs.0.get_mut(&epoch).filter(|e| e.has_snapshot());
        let found = found.ok_or_else(|| unknown(epoch, "snapshot"))?;
        check_header(epoch, found)?;
        found.pins += 1;
        Ok(found.origin_bytes)
    }

    /// The size at the instant of a live snapshot.
    pub(crate) fn snapshot_bytes(&self, epoch: u32) -> Option<u64> {
        let epochs = self.epochs.read();
        epochs.0.get(&epoch).filter(|e| e.has_snapshot()).map(|e| e.origin_bytes)
    }

    /// A reader is gone.
    pub(crate) fn unpin(&self, epoch: u32) {
        if let Some(found) = self.epochs.write().0.get_mut(&epoch) {
            found.pins = found.pins.saturating_sub(1);
        }
    }

    /// What a live snapshot selects now: less than at its instant once it was narrowed.
    pub(crate) fn snapshot_selection(&self, epoch: u32) -> Result<Arc<ExtentSet>> {
        self.check_held()?;
        let epochs = self.epochs.read();
        let found = epochs.0.get(&epoch).and_then(|e| e.selection.as_ref());
        found.map(Arc::clone).ok_or_else(|| unknown(epoch, "snapshot"))
    }

    /// The blocks `since` tracks that changed from its instant to that of `until`, or to now. To
    /// now it is advisory: it includes writes that are still on their way, and what a restore is
    /// still to copy.
    pub fn changed(&self, since: u32, until: Option<u32>) -> Result<ExtentSet> {
        self.with_patience(|| self.find_changed(since, until))
    }

    fn find_changed(&self, since: u32, until: Option<u32>) -> Result<ExtentSet> {
        let (tracked, from_bytes, to_bytes) = {
            let epochs = self.epochs.read();
            let from = epochs.0.get(&since).filter(|e| e.is_live());
            let from = from.ok_or_else(|| unknown(since, "snapshot or bookmark"))?;
            check_header(since, from)?;
            let mut tracked = ExtentSet::new();
            for set in from.tracked() {
                tracked = tracked.union(set);
            }
            let to_bytes = match until {
                None => self.size_bytes(),
                Some(epoch) => {
                    let to = epochs.0.get(&epoch).filter(|_| epoch >= since);
                    to.ok_or_else(|| unknown(epoch, "snapshot at or after the first"))?.origin_bytes
                }
            };
            (tracked, from.origin_bytes, to_bytes)
        };
        // What is on its way first, then what is recorded: a slot is dropped only once its record
        // can be found (P5). The other way round a change that is committed meanwhile would be in
        // neither.
        let is_live = until.is_none() && !is_broken(Rule::ChangedSeesSlots);
        let under_way = if is_live { self.changes_under_way() } else { ExtentSet::new() };
        let recorded = self.with_index(|| {
            let (is_damaged, parts) = {
                let index = self.index.read();
                (index.is_damaged_since(since), index.parts())
            };
            if is_damaged {
                return Ok(tracked.clone());
            }
            parts.changed(since, until.unwrap_or(u32::MAX))
        })?;
        let found = recorded.union(&under_way);
        let mut changed = found.intersection(&tracked);
        if to_bytes > from_bytes {
            // What did not exist then is new, the rest of a partial last block included.
            let grown = Extent::new(from_bytes / self.block_size, self.block_count(to_bytes));
            changed = changed.union(&ExtentSet::from_extent(grown));
        }
        Ok(changed)
    }

    /// Blocks with slots, those written in open regions, and those that a restore is still to copy.
    fn changes_under_way(&self) -> ExtentSet {
        let (slots, written, restoring) = {
            let state = self.state.lock();
            let slots: ExtentSet = state.buffer.blocks().map(Extent::single).collect();
            let restoring = state.restoring.as_ref().map(|r| r.blocks.to_set());
            (slots, state.regions.written(), restoring.unwrap_or_default())
        };
        let written = written.into_iter().flat_map(runs_of).collect();
        slots.union(&restoring).union(&ExtentSet::from_unsorted(written))
    }

    /// Take over the origin's present length, which may have grown; tells it.
    pub fn resize(&self) -> Result<u64> {
        let mut committer = self.role()?;
        let new = self.origin.len().map_err(Error::origin("looking at its length"))?;
        let old = self.size_bytes();
        if new < old {
            let has_live = self.epochs.read().first().is_some();
            return Err(Error::OriginChanged(format!(
                "{} shrank from {old} to {new} bytes{}; restore its length",
                self.origin_path.display(),
                if has_live { " and snapshots need what it lost" } else { "" },
            )));
        }
        if new == old {
            return Ok(new);
        }
        self.close_gate_without_slots(&mut committer, old / self.block_size)?;
        let epoch = committer.epoch;
        let recorded = committer.journal.append(&Entry::Resized { epoch, bytes: new });
        let mut state = self.state.lock();
        if recorded.is_ok() {
            let blocks = self.block_count(new);
            state.size_bytes = new;
            state.unsettled.grow(blocks);
            state.pending.grow(blocks);
            state.regions.grow(blocks);
            if let Some(restoring) = &mut state.restoring {
                restoring.blocks.grow(blocks);
            }
        }
        state.gate.open();
        drop(state);
        self.gate_opened.notify_all();
        recorded?;
        Ok(new)
    }

    /// Admit no write while no slot holds `block`. A slot of the last block ends with the disk:
    /// were it brought home, or replayed, once the disk is known to be larger, its last sector
    /// would go over what the origin has there now (P1).
    fn close_gate_without_slots(&self, committer: &mut Committer, block: u64) -> Result<()> {
        loop {
            {
                let mut state = self.state.lock();
                if !state.buffer.has(block) {
                    state.gate.close(Guarded::All);
                    return Ok(());
                }
            }
            self.commit_slots_of(committer, Extent::single(block))?;
        }
    }
}

//! From the journal and the log to what a volume is: pure, nothing is read or written here.

use super::Restoring;
use crate::bitmap::Bitmap;
use crate::epochs::{Bookmark, Epoch, Epochs, Selections};
use crate::error::Result;
use crate::extent::{Extent, ExtentSet};
use crate::index::Record;
use crate::index::memory::Memory;
use crate::journal::{Compacted, Entry, Group, OriginIdentity, StorePolicy};
use crate::log::format::{Kind, LOST_AT_SOURCE};
use crate::log::scan::{FoundBatch, Scan, open_regions, scan};
use crate::log::writer::Segments;
use crate::number::to_u64;
use crate::sabotage::{Rule, is_broken};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The journal, folded.
#[derive(Default)]
pub(super) struct Decided {
    pub(super) uuid: [u8; 16],
    pub(super) block_size: u64,
    pub(super) origin: Vec<u8>,
    pub(super) meta: Vec<u8>,
    pub(super) size_bytes: u64,
    pub(super) generation: u64,
    pub(super) opened: Option<([u8; 16], Vec<u8>)>,
    pub(super) closed: Option<(OriginIdentity, u64)>,
    pub(super) aborted: ExtentSet,
    restores_ended: BTreeSet<u32>,
    /// Of a compacted journal: the highest epoch it speaks of, and the restore that was not done.
    compacted: Option<(u32, u32)>,
    /// Of a compacted journal: instants at which nothing begins any more.
    gone: ExtentSet,
    pub(super) lost: Vec<(u32, ExtentSet)>,
    /// Copies that were given up, by epoch.
    pub(super) given_up: Vec<(u32, ExtentSet)>,
    /// Blocks brought back that the log does not tell of, by safety snapshot.
    pub(super) restored: Vec<(u32, ExtentSet)>,
    pub(super) policy: StorePolicy,
    pub(super) suspect: Option<(u32, String)>,
    pub(super) origin_failure: String,
    /// Something was deleted or narrowed and its space not given back yet.
    pub(super) owes_space: bool,
    pub(super) epoch_max: u32,
    /// Groups begun here whose end this journal does not tell, by epoch.
    pub(super) groups: BTreeMap<u32, Group>,
    /// Why their end is not known elsewhere either.
    pub(super) doubts: BTreeMap<u32, String>,
    pub(super) entries: Vec<Entry>,
    /// Sequence number of the first of them.
    pub(super) first_sequence: u64,
}

impl Decided {
    pub(super) fn from(entries: Vec<Entry>, first_sequence: u64) -> Option<Self> {
        let mut decided = Self { first_sequence, ..Self::default() };
        let created = match entries.first() {
            Some(Entry::Compacted(_)) => entries.get(1),
            first => first,
        };
        let Some(Entry::Created { .. }) = created else { return None };
        for entry in &entries {
            decided.take(entry);
        }
        decided.entries = entries;
        Some(decided)
    }

    pub(super) fn take(&mut self, entry: &Entry) {
        match entry {
            Entry::Created { uuid, block_size, origin, identity, meta } => {
                self.uuid = *uuid;
                self.block_size = u64::from(*block_size);
                self.origin.clone_from(origin);
                self.meta.clone_from(meta);
                self.size_bytes = identity.bytes;
            }
            Entry::Opened { boot_id, generation, origin, buffer } => {
                self.generation = *generation;
                self.origin.clone_from(origin);
                self.opened = Some((*boot_id, buffer.clone()));
                self.closed = None;
            }
            Entry::Closed { identity, next_batch } => self.closed = Some((*identity, *next_batch)),
            Entry::VolumeMeta(meta) => self.meta.clone_from(meta),
            Entry::Narrowed { epoch, .. }
            | Entry::Deleted { epoch }
            | Entry::BookmarkDeleted { epoch } => {
                self.owes_space = true;
                self.epoch_max = self.epoch_max.max(*epoch);
            }
            Entry::GroupBegun { epoch, group } => {
                self.groups.insert(*epoch, group.clone());
                self.epoch_max = self.epoch_max.max(*epoch);
            }
            Entry::GroupDecided { epoch, is_committed, .. } => {
                self.groups.remove(epoch);
                self.owes_space |= !is_committed;
                self.epoch_max = self.epoch_max.max(*epoch);
            }
            Entry::Freed => self.owes_space = false,
            Entry::Resized { bytes, .. } => self.size_bytes = *bytes,
            Entry::Aborted { epoch } => {
                let number = ExtentSet::from_extent(Extent::single(u64::from(*epoch)));
                self.aborted = self.aborted.union(&number);
                self.epoch_max = self.epoch_max.max(*epoch);
            }
            Entry::Lost { epoch, blocks } => self.lost.push((*epoch, blocks.clone())),
            Entry::Suspect { epoch, reason } => {
                self.suspect = Some((*epoch, String::from_utf8_lossy(reason).into_owned()));
            }
            Entry::RestoreEnded { epoch } => {
                self.restores_ended.insert(*epoch);
            }
            Entry::OriginFailed { reason } => {
                self.origin_failure = String::from_utf8_lossy(reason).into_owned();
            }
            Entry::Recovered => self.origin_failure.clear(),
            Entry::Accepted { .. } => self.suspect = None,
            Entry::Policy(policy) => self.policy = *policy,
            Entry::GivenUp { epoch, blocks } => self.given_up.push((*epoch, blocks.clone())),
            Entry::Restored { epoch, blocks } => self.restored.push((*epoch, blocks.clone())),
            Entry::Compacted(compacted) => self.take_compacted(compacted),
            Entry::EpochMeta { .. } | Entry::Bookmarked { .. } | Entry::Freeing { .. } => {}
        }
    }

    fn take_compacted(&mut self, compacted: &Compacted) {
        self.epoch_max = self.epoch_max.max(compacted.epoch_max);
        self.compacted = Some((compacted.epoch_max, compacted.restoring));
        self.gone.clone_from(&compacted.gone);
        self.aborted = self.aborted.union(&compacted.aborted);
    }

    /// True if the restore that began with this instant is done, or never was.
    fn has_ended(&self, safety: u32) -> bool {
        let was_done = |&(epoch_max, restoring): &(u32, u32)| {
            safety <= epoch_max && safety != restoring && !is_broken(Rule::EndedRestoresKept)
        };
        self.restores_ended.contains(&safety)
            || self.aborted.contains(safety.into())
            || self.compacted.as_ref().is_some_and(was_done)
    }

    /// Read all of the log, with what the journal expects of it.
    pub(super) fn scan(&self, segments: &Segments) -> Result<Scan> {
        let mut scan = scan(segments, self.uuid, self.block_size, &self.aborted)?;
        self.expect(&mut scan);
        Ok(scan)
    }

    /// Look for what the journal expects of a log whose last epoch has been read.
    pub(super) fn expect(&self, scan: &mut Scan) {
        if let Some((_, next_batch)) = self.closed {
            scan.expect_end(next_batch);
        }
        let vanished = self.vanished(scan);
        scan.expect_instants(&vanished, self.closed.map(|(_, next_batch)| next_batch));
    }

    /// Instants that the journal speaks of as live and whose headers the log does not have: a
    /// snapshot must not vanish without a word.
    pub(super) fn vanished(&self, scan: &Scan) -> BTreeSet<u32> {
        let (mut snapshots, mut bookmarks) = (BTreeSet::new(), BTreeSet::new());
        for entry in &self.entries {
            match entry {
                Entry::EpochMeta { epoch, .. }
                | Entry::Narrowed { epoch, .. }
                | Entry::GroupDecided { epoch, is_committed: true, .. } => {
                    snapshots.insert(*epoch);
                }
                Entry::Bookmarked { epoch, .. } => {
                    bookmarks.insert(*epoch);
                }
                Entry::Deleted { epoch }
                | Entry::GroupDecided { epoch, is_committed: false, .. } => {
                    snapshots.remove(epoch);
                }
                Entry::BookmarkDeleted { epoch } => {
                    bookmarks.remove(epoch);
                }
                _ => {}
            }
        }
        let headers = scan.segments.values().filter_map(|s| s.epoch_header.as_ref());
        let known: BTreeSet<u32> = headers.map(|header| header.epoch).collect();
        let live = snapshots.union(&bookmarks).copied();
        // How a group ended is kept for others when nothing begins here any more.
        let is_gone = |epoch: u32| {
            let number = u64::from(epoch);
            self.aborted.contains(number) || self.gone.contains(number)
        };
        live.filter(|epoch| !known.contains(epoch) && !is_gone(*epoch)).collect()
    }

    fn without_header(&self) -> Epoch {
        let damage = "both copies of its header in the log are missing or damaged: what it \
                      selects is not known, and nothing of it can be read; delete it"
            .to_owned();
        Epoch { origin_bytes: self.size_bytes, damage, ..Epoch::default() }
    }

    /// Blocks of the disk.
    pub(super) fn block_count(&self) -> u64 {
        self.size_bytes.div_ceil(self.block_size)
    }

    /// Every block there is.
    pub(super) fn all_blocks(&self) -> ExtentSet {
        ExtentSet::from_extent(Extent::new(0, self.block_count()))
    }

    /// The registry: epoch headers, then what the journal says of them, in order.
    pub(super) fn epochs(&self, scan: &Scan) -> Epochs {
        self.epochs_after(scan, &self.entries)
    }

    /// What snapshots selected when all space that was owed had been given back.
    pub(super) fn selections_when_freed(&self, scan: &Scan) -> Selections {
        let freed = self.entries.iter().rposition(|entry| matches!(entry, Entry::Freed));
        let entries = &self.entries[..freed.map_or(0, |at| at + 1)];
        self.epochs_after(scan, entries).selections()
    }

    /// The block from which on space is still to be given back.
    pub(super) fn freed_until(&self) -> u64 {
        let is_decision = |entry: &Entry| {
            matches!(
                entry,
                Entry::Narrowed { .. }
                    | Entry::Deleted { .. }
                    | Entry::BookmarkDeleted { .. }
                    | Entry::GroupDecided { is_committed: false, .. }
            )
        };
        let decided = self.entries.iter().rposition(is_decision);
        let decided = decided.map_or(0, |at| self.first_sequence + to_u64(at));
        match self.entries.iter().rfind(|e| matches!(e, Entry::Freed | Entry::Freeing { .. })) {
            Some(Entry::Freeing { sequence, block }) if *sequence >= decided => *block,
            _ => 0,
        }
    }

    fn epochs_after(&self, scan: &Scan, entries: &[Entry]) -> Epochs {
        let mut epochs = Epochs::default();
        let mut last: Option<Arc<ExtentSet>> = None;
        for segment in scan.segments.values() {
            let Some(header) = &segment.epoch_header else { continue };
            // Snapshots of one rule set share one copy in memory.
            let known = last.filter(|set| **set == header.selection);
            let selection = known.unwrap_or_else(|| Arc::new(header.selection.clone()));
            last = Some(Arc::clone(&selection));
            let epoch = Epoch {
                origin_bytes: header.origin_bytes,
                created_unix_ns: header.created_unix_ns,
                selection: Some(selection),
                low: Arc::new(header.low.clone()),
                meta: header.meta.clone(),
                ..Epoch::default()
            };
            if !self.aborted.contains(header.epoch.into()) {
                epochs.0.insert(header.epoch, epoch);
            }
        }
        for epoch in self.vanished(scan) {
            epochs.0.insert(epoch, self.without_header());
        }
        for entry in entries {
            apply(&mut epochs, entry);
        }
        for (epoch, group) in &self.groups {
            let found = epochs.0.get_mut(epoch).filter(|found| found.selection.is_some());
            if let Some(found) = found {
                let why = self.doubts.get(epoch).cloned();
                found.undecided = why.unwrap_or_else(|| group.where_it_is_decided());
            }
        }
        // Noted at an earlier opening; what showed it may be gone.
        let all = self.all_blocks();
        for (last, _) in self.lost.iter().filter(|(_, blocks)| *blocks == all) {
            for found in epochs.0.range_mut(..=*last).map(|(_, found)| found) {
                found.losses = format!(
                    "records of epoch {last} are gone from the log; what they held gives errors"
                );
            }
        }
        for loss in scan.losses() {
            for found in epochs.0.range_mut(..=loss.last).map(|(_, found)| found) {
                found.losses = format!(
                    "log segment {:08x} is missing or damaged; what it held gives errors",
                    loss.segment
                );
            }
        }
        epochs.drop_dead();
        epochs
    }
}

/// Epochs in which records are gone: whatever has no record of its own there counts as lost. Those
/// before the first live instant concern nobody.
pub(super) fn epochs_with_losses(scan: &Scan, epochs: &Epochs) -> BTreeSet<u32> {
    let Some(first) = epochs.first() else { return BTreeSet::new() };
    scan.losses().flat_map(|loss| loss.first.max(first)..=loss.last).collect()
}

pub(super) fn apply(epochs: &mut Epochs, entry: &Entry) {
    match entry {
        Entry::Compacted(compacted) => {
            let is_gone = |epoch: u32| compacted.gone.contains(u64::from(epoch));
            for found in epochs.0.iter_mut().filter(|(e, _)| is_gone(**e)).map(|(_, found)| found) {
                found.selection = None;
                found.bookmark = None;
                found.damage.clear();
            }
        }
        Entry::EpochMeta { epoch, meta } => {
            if let Some(found) = epochs.0.get_mut(epoch) {
                found.meta.clone_from(meta);
            }
        }
        Entry::Narrowed { epoch, selection, settled } => {
            let Some(found) = epochs.0.get_mut(epoch) else { return };
            if let Some(settled) = settled {
                found.meta.clone_from(&settled.meta);
                found.low = Arc::new(settled.low.clone());
            }
            if found.damage.is_empty() {
                found.selection = Some(Arc::new(selection.clone()));
            }
        }
        Entry::Deleted { epoch } | Entry::GroupDecided { epoch, is_committed: false, .. } => {
            if let Some(found) = epochs.0.get_mut(epoch) {
                found.selection = None;
                found.damage.clear();
                found.undecided.clear();
            }
        }
        Entry::Bookmarked { epoch, meta } => {
            // Without its header what it would track is not known.
            if let Some(found) = epochs.0.get_mut(epoch).filter(|e| e.damage.is_empty()) {
                let baseline = found.selection.clone().unwrap_or_default();
                found.bookmark = Some(Bookmark { baseline, meta: meta.clone() });
            }
        }
        Entry::BookmarkDeleted { epoch } => {
            if let Some(found) = epochs.0.get_mut(epoch) {
                found.bookmark = None;
            }
        }
        Entry::Suspect { epoch, reason } => {
            for (_, found) in epochs.0.range_mut(..=*epoch) {
                found.suspect = String::from_utf8_lossy(reason).into_owned();
            }
        }
        Entry::Accepted { epoch, note } => {
            let in_doubt = |e: &&mut Epoch| !e.suspect.is_empty();
            for found in epochs.0.range_mut(..=*epoch).map(|(_, e)| e).filter(in_doubt) {
                let doubt = std::mem::take(&mut found.suspect);
                found.accepted = format!("{doubt}: {}", String::from_utf8_lossy(note));
            }
        }
        _ => {}
    }
}

/// The records of the batches of a closed epoch. What may have changed there without a record of its
/// own counts as changed: every block of a region that was left open.
pub(super) fn memory_of(batches: &[FoundBatch], block_size: u64, block_count: u64) -> Memory {
    let mut memory = memory_of_open(batches, block_size);
    if let Some(batch) = batches.first() {
        for blocks in open_regions(batches, block_count).iter() {
            memory.insert_changed(batch.header.epoch, blocks);
        }
    }
    memory
}

/// The records of the batches of the last epoch, apart from regions left open.
pub(super) fn memory_of_open(batches: &[FoundBatch], block_size: u64) -> Memory {
    let mut records = Vec::new();
    for batch in batches {
        let epoch = batch.header.epoch;
        let kept = batch.preserved(block_size);
        records.extend(kept.map(|(block, position, checksum)| Record {
            block,
            position,
            epoch,
            checksum,
        }));
    }
    let mut memory = Memory::from_records(records);
    for batch in batches {
        let epoch = batch.header.epoch;
        for descriptor in &batch.descriptors {
            match descriptor.kind {
                Kind::Preserve | Kind::Done | Kind::Region | Kind::RegionEnd => {}
                Kind::PreserveZero => memory.insert_zero(epoch, descriptor.blocks),
                Kind::Lost if descriptor.checksum == LOST_AT_SOURCE => {
                    let blocks = ExtentSet::from_extent(descriptor.blocks);
                    memory.insert_lost_at_source(epoch, &blocks);
                }
                Kind::Lost => {
                    memory.insert_lost(epoch, &ExtentSet::from_extent(descriptor.blocks));
                }
                Kind::Changed => memory.insert_changed(epoch, descriptor.blocks),
            }
        }
    }
    memory
}

/// The restore that was running, and how far it was.
pub(super) fn restoring_of(scan: &Scan, decided: &Decided, blocks: u64) -> Option<Restoring> {
    let mut headers = scan.segments.values().filter_map(|s| s.epoch_header.as_ref());
    let header = headers.rfind(|h| h.restore.is_some() && !decided.has_ended(h.epoch))?;
    let restore = header.restore.as_ref()?;
    let mut bitmap = Bitmap::from_set(blocks, &restore.blocks);
    let done = scan.batches.iter().filter(|b| b.header.epoch == header.epoch);
    for descriptor in done.flat_map(|b| &b.descriptors).filter(|d| d.kind == Kind::Done) {
        let inside = descriptor.blocks.intersection(Extent::new(0, blocks));
        bitmap.assign(inside, false);
    }
    let said = decided.restored.iter().filter(|(epoch, _)| *epoch == header.epoch);
    for extent in said.flat_map(|(_, blocks)| blocks.iter()) {
        bitmap.assign(extent.intersection(Extent::new(0, blocks)), false);
    }
    Some(Restoring {
        source_epoch: restore.source_epoch,
        safety_epoch: header.epoch,
        total_blocks: restore.blocks.block_count(),
        remaining_blocks: bitmap.count(),
        unreadable: BTreeSet::new(),
        failure: String::new(),
        blocks: bitmap,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decided(entries: &[Entry]) -> Decided {
        Decided { entries: entries.to_vec(), first_sequence: 1, ..Decided::default() }
    }

    #[test]
    fn freeing_goes_on_where_it_was_unless_something_was_decided_since() {
        let deleted = Entry::Deleted { epoch: 3 };
        let meta = Entry::EpochMeta { epoch: 4, meta: Vec::new() };
        let freeing = Entry::Freeing { sequence: 1, block: 500 };
        let goes_on = decided(&[deleted.clone(), meta.clone(), freeing.clone(), meta.clone()]);
        assert_eq!(goes_on.freed_until(), 500);
        let again = decided(&[deleted.clone(), freeing.clone(), Entry::Deleted { epoch: 4 }]);
        assert_eq!(again.freed_until(), 0, "the front may hold what the second deletion frees");
        let done = decided(&[deleted, freeing, Entry::Freed, meta]);
        assert_eq!(done.freed_until(), 0);
    }
}

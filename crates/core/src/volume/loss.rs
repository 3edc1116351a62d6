//! What is lost when originals cannot be kept, the least important first, and how that is said.
//!
//! A loss is a record like any other, in the log, for which room is kept. Its second place is the
//! journal's reserve. Only if neither can be written the writes cannot go on.

use super::{Committer, Counters, Volume};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::index::Record;
use crate::index::copies::for_each_copy;
use crate::index::parts::Walk;
use crate::journal::Entry;
use crate::log::format::Kind;
use crate::number::to_u64;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Copies that are given up at once at least: each time costs a record and a look at all copies.
const GIVE_UP_BLOCKS_MIN: usize = 1024;

/// Originals that are to be kept, and those that there is no room for.
pub(super) struct Choice {
    pub(super) kept: Vec<Extent>,
    pub(super) lost: Vec<Extent>,
}

/// True of records that say of their blocks that they changed, or may from here on.
fn is_change(kind: Kind) -> bool {
    !matches!(kind, Kind::Done | Kind::RegionEnd)
}

impl Volume {
    /// Choose what there is room for: blocks of low priority go first, copies of them that were
    /// kept before included.
    pub(super) fn choose(
        &self,
        committer: &mut Committer,
        pending: Vec<Extent>,
        descriptors: u64,
    ) -> Choice {
        let blocks: u64 = pending.iter().map(|e| e.len()).sum();
        let pages = super::room::batch_pages(descriptors, blocks * self.block_pages());
        let is_instant = self.state.lock().epoch != committer.epoch;
        if blocks == 0
            || committer.log.has_room(pages, false)
            || self.extend(committer, pages, pages).is_ok()
        {
            return Choice { kept: pending, lost: Vec::new() };
        }
        // Bits and epochs must not move while an instant is taken.
        if !is_instant
            && self.give_up_low(committer, pages).unwrap_or(false)
            && self.extend(committer, pages, pages).is_ok()
        {
            return Choice { kept: pending, lost: Vec::new() };
        }
        let heads = super::room::batch_pages(descriptors, 0);
        let room = committer.log.room_pages().saturating_sub(heads) / self.block_pages();
        let (low, wanted): (ExtentSet, ExtentSet) =
            (self.low_blocks(), pending.into_iter().collect());
        let mut choice = Choice { kept: Vec::new(), lost: Vec::new() };
        let mut left = room;
        for part in [wanted.difference(&low), wanted.intersection(&low)] {
            for extent in part.iter() {
                let kept = Extent::new(extent.start, extent.end.min(extent.start + left));
                left -= kept.len();
                if !kept.is_empty() {
                    choice.kept.push(kept);
                }
                if kept.end < extent.end {
                    choice.lost.push(Extent::new(kept.end, extent.end));
                }
            }
        }
        choice.kept.sort_unstable_by_key(|e| e.start);
        choice
    }

    /// Blocks that matter less to every snapshot that selects them.
    fn low_blocks(&self) -> ExtentSet {
        let epochs = self.epochs.read();
        let (mut low, mut high) = (ExtentSet::new(), ExtentSet::new());
        for epoch in epochs.0.values() {
            if let Some(selection) = &epoch.selection {
                low = low.union(&epoch.low);
                high = high.union(&selection.difference(&epoch.low));
            }
        }
        low.difference(&high)
    }

    /// Give up copies that all their snapshots hold to matter less, the oldest first, for `pages`
    /// of room; false if there are none. First the journal says that they are lost; then the index
    /// does; then their readers are gone; then their space goes back.
    fn give_up_low(&self, committer: &mut Committer, pages: u64) -> Result<bool> {
        if self.state.lock().restoring.is_some() {
            // It may need them.
            return Ok(false);
        }
        let mut given_up = self.low_copies()?;
        let count = usize::try_from(2 * pages / self.block_pages()).unwrap_or(usize::MAX);
        given_up.truncate(count.max(GIVE_UP_BLOCKS_MIN));
        if given_up.is_empty() {
            return Ok(false);
        }
        let mut by_epoch: BTreeMap<u32, Vec<Extent>> = BTreeMap::new();
        for record in &given_up {
            by_epoch.entry(record.epoch).or_default().push(Extent::single(record.block));
        }
        let by_epoch: Vec<(u32, ExtentSet)> =
            by_epoch.into_iter().map(|(e, list)| (e, ExtentSet::from_unsorted(list))).collect();
        for (epoch, blocks) in &by_epoch {
            let entry = Entry::GivenUp { epoch: *epoch, blocks: blocks.clone() };
            committer.journal.append(&entry)?;
        }
        {
            let mut index = self.index.write();
            index.give_up(&by_epoch);
            self.index_version.fetch_add(1, Ordering::Release);
        }
        Counters::add(&self.counters.lost_blocks, to_u64(given_up.len()));
        // Whoever found a copy in the older index has read it once this lock was had.
        drop(self.punching.write());
        self.seal(committer).map_err(Error::store("sealing the log"))?;
        // Upkeep may have taken a segment away meanwhile, with all that was in it.
        let mut places: Vec<u64> = given_up
            .iter()
            .filter(|record| committer.segments.contains_key(&record.position.segment()))
            .map(|record| record.position.0)
            .collect();
        self.punch(&mut places)?;
        self.count_used(committer).map_err(Error::store("counting what the store takes"))?;
        committer.journal.reserve();
        Ok(true)
    }

    /// Copies that only snapshots read to which they matter less, the oldest first.
    fn low_copies(&self) -> Result<Vec<Record>> {
        let epochs = self.epochs.read().clone();
        if epochs.0.values().all(|epoch| epoch.low.is_empty()) {
            return Ok(Vec::new());
        }
        let end = self.block_count(self.size_bytes());
        let mut found = self.with_index(|| {
            let parts = self.index.read().parts();
            let (mut walk, mut entries, mut found) = (Walk::new(0, end), Vec::new(), Vec::new());
            while parts.next_window(&mut walk, &mut entries)? {
                for_each_copy(&entries, |entry, previous| {
                    let block = entry.blocks.start;
                    let between = epochs.0.range(previous + 1..=entry.epoch).map(|(_, e)| e);
                    let reads = |e: &&crate::epochs::Epoch| {
                        e.selection.as_ref().is_some_and(|s| s.contains(block))
                    };
                    let mut readers = between.filter(reads).peekable();
                    if readers.peek().is_some() && readers.all(|e| e.low.contains(block)) {
                        found.push(Record::of(entry));
                    }
                });
            }
            Ok(found)
        })?;
        found.sort_by_key(|record| record.epoch);
        Ok(found)
    }

    /// The log did not take a batch: its second place is the journal. A change that could not be
    /// recorded must not be missed (P5): lost covers it.
    pub(super) fn record_loss(&self, committer: &mut Committer, source: io::Error) -> Result<()> {
        let epoch = committer.epoch;
        let descriptors = committer.batch.descriptors();
        let blocks_of = |wanted: fn(Kind) -> bool| -> ExtentSet {
            descriptors.iter().filter(|d| wanted(d.kind)).map(|d| d.blocks).collect()
        };
        let (mut lost, done) = (blocks_of(is_change), blocks_of(|kind| kind == Kind::Done));
        let coarse = committer.journal.mark_bytes() / self.block_size;
        if coarse > 1 {
            // What else is in these parts is lost with them, and needs no mark any more.
            let blocks = self.block_count(self.size_bytes());
            let whole = |e: Extent| {
                let end = e.end.next_multiple_of(coarse).min(blocks);
                Extent::new(e.start / coarse * coarse, end)
            };
            lost = ExtentSet::from_unsorted(lost.iter().map(whole).collect());
        }
        let extents = to_u64(lost.as_slice().len() + done.as_slice().len());
        let is_last = committer.journal.is_short_of_room(extents * 16 + 1024);
        if is_last && !lost.is_empty() {
            // The last mark there is room for covers whatever is still to change: then none is
            // needed any more.
            lost = ExtentSet::from_extent(Extent::new(0, self.block_count(self.size_bytes())));
        }
        let mut entries = Vec::new();
        if !lost.is_empty() {
            entries.push(Entry::Lost { epoch, blocks: lost.clone() });
        }
        if !done.is_empty() {
            entries.push(Entry::Restored { epoch, blocks: done });
        }
        if entries.iter().any(|entry| committer.journal.append(entry).is_err()) {
            let mut state = self.state.lock();
            state.store_failure = source.to_string();
            return Err(Error::store("recording changes")(source));
        }
        if !lost.is_empty() {
            self.index.write().insert_stray_loss(epoch, &lost);
            self.index_version.fetch_add(1, Ordering::Release);
            Counters::add(&self.counters.lost_blocks, lost.block_count());
        }
        // While an instant is taken the bits are those of the next epoch already.
        if (is_last || coarse > 1) && self.state.lock().epoch == epoch {
            self.settle(lost.iter());
        }
        Ok(())
    }

    /// What a snapshot holds that matters less.
    pub fn low(&self, epoch: u32) -> Arc<ExtentSet> {
        let epochs = self.epochs.read();
        epochs.0.get(&epoch).map(|e| Arc::clone(&e.low)).unwrap_or_default()
    }
}

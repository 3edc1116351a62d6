//! Merging neighbouring epochs between which no live snapshot or bookmark begins: for each block only
//! its first record among them is ever asked for, and one file holds what many held.
//!
//! What is read is the log itself. The new segment is durable before the index follows, and the old
//! ones are removed last; interrupted in between, they are known to be superseded.

use super::decided::memory_of;
use super::past::index_error;
use super::{Upkeep, Volume};
use crate::epochs::Selections;
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::index::Content;
use crate::index::entry::Entry;
use crate::index::memory::{Memory, Record};
use crate::index::run::Wait;
use crate::log::format::{
    EpochHeader, Kind, LOST_AT_SOURCE, MergedHeader, SegmentHeader, payload_checksum,
};
use crate::log::merged::{Plan, write_merged};
use crate::log::scan::{FoundSegment, Scan, scan_headers};
use crate::log::writer::segment_number;
use crate::sync::MutexGuard;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::RangeInclusive;

use super::upkeep::Effort;

/// A merged segment is made from at most so much: what is copied at once.
const MERGED_BYTES_MAX: u64 = 32 << 20;
/// Epochs of the smallest size, a segment's headers and a few batches; each next size is four times
/// as large.
const SMALLEST_BYTES: u64 = 64 << 10;
/// As many neighbours of one size, or less, are worth it: each byte is copied once a size.
const NEIGHBOURS_MIN: usize = 8;

/// Neighbouring epochs, each with the bytes it takes, among which only the first may be live.
type Neighbours = Vec<(u32, u64)>;

/// What came of merging epochs.
enum Merged {
    Done,
    /// They cannot be read, and stay as they are.
    Unreadable,
    /// The store has no room for it now.
    NoRoom,
}

/// The neighbours to be merged next.
fn choose(neighbours: &[(u32, u64)], effort: Effort) -> Option<&[(u32, u64)]> {
    let (least, sizes) = match effort {
        Effort::Due => (NEIGHBOURS_MIN, 0..=5),
        Effort::All => (2, 5..=5),
    };
    for size in sizes {
        let limit = SMALLEST_BYTES << (2 * size);
        for span in neighbours.split(|&(_, bytes)| bytes > limit) {
            let mut start = 0;
            while span.len() - start >= least {
                let mut total = 0;
                let fits = |&&(_, bytes): &&(u32, u64)| {
                    total += bytes;
                    total <= MERGED_BYTES_MAX
                };
                let count = span[start..].iter().take_while(fits).count();
                if count >= least {
                    return Some(&span[start..start + count]);
                }
                start += count.max(1);
            }
        }
    }
    None
}

/// What is known of the blocks before anything of these epochs: the first record of each.
fn first_records(memories: &[(u32, Memory)]) -> Vec<Entry> {
    let everything = Extent::new(0, u64::MAX / 2);
    let (mut covered, mut first) = (ExtentSet::new(), Vec::new());
    for (_, memory) in memories {
        let mut entries = Vec::new();
        memory.entries_within(everything, &mut entries);
        // Kept content wins over loss in the same epoch, and anything over a mere change.
        let kinds = [
            (Kind::Preserve, None),
            (Kind::PreserveZero, None),
            (Kind::Lost, Some(LOST_AT_SOURCE)),
            (Kind::Lost, None),
            (Kind::Changed, None),
        ];
        for (kind, reason) in kinds {
            let is_it = |e: &&Entry| e.kind == kind && reason.is_none_or(|r| e.checksum == r);
            let of_kind: Vec<&Entry> = entries.iter().filter(is_it).collect();
            let blocks: ExtentSet = of_kind.iter().map(|e| e.blocks).collect();
            let new = blocks.difference(&covered);
            if kind == Kind::Preserve {
                let kept = of_kind.iter().filter(|e| new.contains(e.blocks.start));
                first.extend(kept.map(|&&entry| entry));
            } else {
                let epoch = of_kind.first().map_or(0, |entry| entry.epoch);
                let checksum = reason.unwrap_or(0);
                let bare = |blocks| Entry { checksum, ..Entry::bare(kind, epoch, blocks) };
                first.extend(new.iter().map(bare));
            }
            covered = covered.union(&new);
        }
    }
    first.sort_by_key(Entry::key);
    first
}

impl Volume {
    /// Merge epochs; the space nobody needs has been given back before.
    pub(super) fn merge_epochs(
        &self,
        upkeep: &mut MutexGuard<'_, Upkeep>,
        effort: Effort,
    ) -> Result<()> {
        loop {
            let (segments, current, selections) = {
                let committer = self.role()?;
                if committer.decisions != upkeep.decisions {
                    return Ok(());
                }
                let selections = self.epochs.read().selections();
                (committer.segments.clone(), committer.epoch, selections)
            };
            let mut is_done = true;
            for neighbours in self.neighbours(&segments, current) {
                let mut intact = neighbours.split(|n| upkeep.unmergeable.contains(&n.0));
                let chosen = intact.find_map(|neighbours| choose(neighbours, effort));
                let Some(chosen) = chosen else { continue };
                let epochs: Vec<u32> = chosen.iter().map(|n| n.0).collect();
                let merged = self.merge(&epochs, &selections);
                self.end_taking_for_upkeep();
                match merged? {
                    Merged::Done => {}
                    Merged::Unreadable => upkeep.unmergeable.extend(epochs),
                    Merged::NoRoom => return Ok(()),
                }
                is_done = false;
            }
            if is_done {
                return Ok(());
            }
        }
    }

    /// Closed, intact epochs, by live instants.
    fn neighbours(&self, segments: &BTreeMap<u32, u32>, current: u32) -> Vec<Neighbours> {
        let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
        let epochs = self.epochs.read();
        let index = self.index.read();
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        for &epoch in segments.values() {
            *counts.entry(epoch).or_default() += 1;
        }
        // At that epoch, or at one between that has no segment: its header may be gone.
        let is_begun = |last: &[u32], epoch: u32| {
            let after = last.last().map_or(0, |last| last + 1);
            epochs.0.range(after.min(epoch)..=epoch).next().is_some()
        };
        let mut all: Vec<Vec<u32>> = Vec::new();
        for &epoch in counts.keys().filter(|&&epoch| epoch < current) {
            let is_intact = !index.is_damaged(epoch);
            match all.last_mut() {
                Some(last) if is_intact && !is_begun(last, epoch) => last.push(epoch),
                _ => all.push(Vec::new()),
            }
            if let Some(last) = all.last_mut().filter(|last| is_intact && last.is_empty()) {
                last.push(epoch);
            }
        }
        drop((index, epochs));
        all.retain(|neighbours| neighbours.len() > 1);
        let wanted: BTreeSet<u32> = all.iter().flatten().copied().collect();
        for (&segment, epoch) in segments.iter().filter(|(_, epoch)| wanted.contains(epoch)) {
            let file = self.segments.get(segment);
            // One that cannot be asked is too large to be copied.
            let size = file.and_then(|file| file.allocated_bytes()).unwrap_or(u64::MAX / 4);
            *bytes.entry(*epoch).or_default() += size;
        }
        let sized = |epoch: u32| (epoch, bytes.get(&epoch).copied().unwrap_or(0));
        all.into_iter().map(|epochs| epochs.into_iter().map(sized).collect()).collect()
    }

    /// Merge these epochs.
    fn merge(&self, epochs: &[u32], selections: &Selections) -> Result<Merged> {
        let mut scan = scan_headers(&self.segments, self.uuid, &ExtentSet::default())?;
        let Some(memories) = self.read_group(&mut scan, epochs)? else {
            return Ok(Merged::Unreadable);
        };
        let by_epoch = scan.epochs();
        let old: Vec<u32> =
            epochs.iter().filter_map(|e| by_epoch.get(e)).flatten().copied().collect();
        let headers: Vec<&FoundSegment> = old.iter().filter_map(|&n| scan.segment(n)).collect();
        let Some(first) = headers.first() else { return Ok(Merged::Unreadable) };
        let Some(epoch_header) = first.epoch_header.as_ref().map(EpochHeader::encode) else {
            return Ok(Merged::Unreadable);
        };
        let mut entries = first_records(&memories);
        if !self.forget_unneeded(&mut entries, selections)? {
            return Ok(Merged::Unreadable);
        }
        let number = self.role()?.log.reserve_segment();
        let places = || headers.iter().map(|segment| segment.header.places());
        let from = places().map(|of| *of.start()).min().unwrap_or(0);
        let upto = places().map(|of| *of.end()).max().unwrap_or(0);
        if !self.has_only(&scan, &old, from..=upto)? {
            return Ok(Merged::Unreadable);
        }
        let header = SegmentHeader {
            segment: number,
            ordinal: 0,
            first_batch: 1,
            epoch_header_bytes: u32::try_from(epoch_header.len()).expect("it was read"),
            epoch_header_crc: crc32c::crc32c(&epoch_header),
            merged: Some(MergedHeader { first: from, last: upto, end_page: 0 }),
            ..first.header
        };
        let plan = Plan {
            header,
            epoch_header: &epoch_header,
            block_size: self.block_size,
            entries: &entries,
        };
        if !self.take_for_upkeep(plan.bytes_max())? {
            return Ok(Merged::NoRoom);
        }
        let written = write_merged(&self.segments, &plan, |entry, content| {
            self.segments.read(entry.position, content)?;
            let crc = payload_checksum(entry.blocks.start, entry.epoch, content);
            if crc == entry.checksum { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
        });
        match written {
            Ok(written) => {
                self.replace(epochs, &old, number, &written)?;
                Ok(Merged::Done)
            }
            Err(error) => {
                let name = crate::log::merged::unfinished_name(number);
                // What is left of it is removed at the next opening.
                let _ = self.segments.directory().remove(&name);
                if error.kind() == io::ErrorKind::InvalidData {
                    return Ok(Merged::Unreadable);
                }
                match Error::store("merging log segments")(error) {
                    Error::StoreFull(_) => Ok(Merged::NoRoom),
                    error => Err(error),
                }
            }
        }
    }

    /// True if no file with a number among these is of other epochs: a merged segment would be
    /// taken to stand for it. The last segment of an epoch may be newer than the first of the next.
    fn has_only(&self, scan: &Scan, old: &[u32], places: RangeInclusive<u32>) -> Result<bool> {
        let names = self.segments.directory().list().map_err(Error::store("listing the log"))?;
        let numbers = names.iter().filter_map(|name| segment_number(name));
        let mut inside = numbers.filter(|number| places.contains(number));
        // The number of a merged one is not its place.
        let is_merged = |n: u32| scan.segment(n).is_some_and(|s| s.header.merged.is_some());
        Ok(inside.all(|n| old.contains(&n) || scan.superseded.contains(&n) || is_merged(n)))
    }

    /// The records of the epochs, from the log, with what the journal says is lost.
    fn read_group(&self, scan: &mut Scan, epochs: &[u32]) -> Result<Option<Vec<(u32, Memory)>>> {
        let by_epoch = scan.epochs();
        let mut memories = Vec::new();
        for &epoch in epochs {
            let Some(numbers) = by_epoch.get(&epoch) else { return Ok(None) };
            let batches = scan.read_epoch(&self.segments, self.uuid, numbers)?;
            if !scan.damaged.is_empty() {
                return Ok(None);
            }
            let end = self.block_count(self.size_bytes());
            let mut memory = memory_of(&batches, self.block_size, end);
            let stray = self.index.read().stray_loss(epoch);
            if !stray.is_empty() {
                memory.insert_lost(epoch, &stray);
            }
            memories.push((epoch, memory));
        }
        Ok(Some(memories))
    }

    /// Content that no snapshot reads has been given back: of those blocks only the change is left.
    /// False if the index does not know what the log has.
    fn forget_unneeded(&self, entries: &mut [Entry], selections: &Selections) -> Result<bool> {
        let mut found = Vec::new();
        for entry in entries.iter_mut().filter(|entry| entry.kind == Kind::Preserve) {
            // The latest snapshot before it reads it, if any does: the others read no later copies.
            let (block, epoch) = (entry.blocks.start, entry.epoch);
            let mut older = selections.0.range(..=epoch).rev();
            let reader = older.find(|(_, selection)| selection.contains(block));
            let mut is_needed = false;
            if let Some((&reader, _)) = reader {
                found.clear();
                let lookup = self.index.read().look_up(entry.blocks, reader);
                lookup.finish(Wait::Long, &mut found).map_err(index_error)?;
                is_needed = match found.first() {
                    Some((_, Content::Preserved(record))) if record.epoch <= epoch => {
                        record.epoch == epoch
                    }
                    Some((_, Content::Zero | Content::Lost)) => false,
                    Some((_, Content::Preserved(_))) | None => return Ok(false),
                };
            }
            if !is_needed {
                *entry = Entry::bare(Kind::Changed, epoch, entry.blocks);
            }
        }
        Ok(true)
    }

    /// The merged segment tells its epochs from now on; the old ones go.
    fn replace(&self, epochs: &[u32], old: &[u32], number: u32, written: &[Entry]) -> Result<()> {
        let removing = || Error::store("removing a log segment");
        let label = epochs[0];
        let kept = written.iter().filter(|entry| entry.kind == Kind::Preserve);
        let mut memory = Memory::from_records(kept.map(Record::of).collect());
        for entry in written {
            match entry.kind {
                Kind::Preserve | Kind::Done | Kind::Region | Kind::RegionEnd => {}
                Kind::PreserveZero => memory.insert_zero(label, entry.blocks),
                Kind::Lost if entry.checksum == LOST_AT_SOURCE => {
                    memory.insert_lost_at_source(label, &ExtentSet::from_extent(entry.blocks));
                }
                Kind::Lost => memory.insert_lost(label, &ExtentSet::from_extent(entry.blocks)),
                Kind::Changed => memory.insert_changed(label, entry.blocks),
            }
        }
        {
            let mut committer = self.role()?;
            let mut bytes = 0;
            for &segment in old {
                let file = self.segments.get(segment).map_err(removing())?;
                bytes += file.allocated_bytes().map_err(removing())?;
            }
            // Until they are gone the old ones are what upkeep takes: a store limit means them too.
            committer.upkeep_bytes = bytes;
            for segment in old {
                committer.segments.remove(segment);
            }
            committer.segments.insert(number, label);
        }
        let useless = {
            let mut index = self.index.write();
            let useless = index.file(None, &epochs.iter().copied().collect());
            index.adopt(label, memory, false);
            useless
        };
        // Whoever found a copy in the old segments has read it once this lock was had.
        drop(self.punching.write());
        for &segment in old {
            self.segments.remove(segment).map_err(removing())?;
        }
        self.segments.directory().sync().map_err(Error::store("store directory"))?;
        self.remove_runs(&useless)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    #[test]
    fn small_neighbours_are_merged_once_there_are_enough() {
        let small: Vec<(u32, u64)> = (1..=8).map(|epoch| (epoch, 40 * KIB)).collect();
        assert_eq!(choose(&small, Effort::Due), Some(&small[..]));
        assert_eq!(choose(&small[..7], Effort::Due), None);
        assert_eq!(choose(&small[..2], Effort::All), Some(&small[..2]));
    }

    #[test]
    fn no_more_is_merged_than_may_be_copied_at_once() {
        let large: Vec<(u32, u64)> = (1..=20).map(|epoch| (epoch, MERGED_BYTES_MAX / 3)).collect();
        assert_eq!(choose(&large, Effort::Due), None);
        assert_eq!(choose(&large, Effort::All).map(<[_]>::len), Some(3));
        let huge = [(1, MERGED_BYTES_MAX + 1), (2, MERGED_BYTES_MAX + 1)];
        assert_eq!(choose(&huge, Effort::All), None);
    }

    #[test]
    fn a_large_epoch_is_not_copied_for_its_small_neighbours() {
        let mut epochs: Vec<(u32, u64)> = (2..=9).map(|epoch| (epoch, 40 * KIB)).collect();
        epochs.insert(0, (1, 8 << 20));
        assert_eq!(choose(&epochs, Effort::Due), Some(&epochs[1..]));
    }

    #[test]
    fn the_first_record_of_a_block_counts_and_kept_content_over_loss() {
        let record = |block, epoch| Record {
            block,
            position: crate::log::format::Position::new(epoch, 4),
            epoch,
            checksum: 1,
        };
        let mut five = Memory::from_records(vec![record(1, 5), record(9, 5)]);
        five.insert_lost(5, &ExtentSet::from_extent(Extent::new(0, 3)));
        let mut six = Memory::from_records(vec![record(1, 6), record(2, 6), record(20, 6)]);
        six.insert_zero(6, Extent::new(8, 12));
        six.insert_changed(6, Extent::new(30, 40));
        let first = first_records(&[(5, five), (6, six)]);
        let told: Vec<_> = first.iter().map(|e| (e.blocks.start, e.blocks.end, e.kind)).collect();
        let expected = [
            (0, 1, Kind::Lost),
            (1, 2, Kind::Preserve),
            (2, 3, Kind::Lost),
            (8, 9, Kind::PreserveZero),
            (9, 10, Kind::Preserve),
            (10, 12, Kind::PreserveZero),
            (20, 21, Kind::Preserve),
            (30, 40, Kind::Changed),
        ];
        assert_eq!(told, expected);
    }
}

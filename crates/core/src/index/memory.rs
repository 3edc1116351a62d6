//! Records of one epoch, or a few, in memory.
//!
//! Preserved content: 20 bytes a block, in sorted runs that are merged as they grow, with the
//! newest in a small tree. Runs are immutable; the committer builds new ones outside the lock and
//! swaps them in. Old content that was zero, or was lost, is kept as extents an epoch; changes
//! without content as one bit.

use super::entry::Entry;
use super::{Content, Nearest};
use crate::bitmap::SparseBitmap;
use crate::extent::{Extent, ExtentSet};
use crate::log::format::{Kind, LOST_AT_SOURCE, PAGE, Position};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Every block there can be.
const EVERYTHING: Extent = Extent { start: 0, end: 1 << 56 };

/// Records in the tree before they become a run.
const TREE_RECORDS_MAX: usize = 32_768;

/// Where the content lies that `block` had before its change in `epoch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    /// Which block.
    pub block: u64,
    /// Payload.
    pub position: Position,
    /// In which epoch it changed.
    pub epoch: u32,
    /// Of the payload.
    pub checksum: u32,
}

/// A record as the runs hold it: numbers of 48 bits for block and position.
#[derive(Clone, Copy)]
struct Packed {
    block: [u8; 6],
    position: [u8; 6],
    epoch: u32,
    checksum: u32,
}

const _: () = assert!(size_of::<Packed>() == 20, "memory of a preserved block is a promise");

/// The lower 48 bits.
fn to_48(value: u64) -> [u8; 6] {
    let [low @ .., high, higher] = value.to_le_bytes();
    assert!(high == 0 && higher == 0, "48 bits number every block and page there can be");
    low
}

fn from_48(bytes: [u8; 6]) -> u64 {
    let mut wide = [0; 8];
    wide[..6].copy_from_slice(&bytes);
    u64::from_le_bytes(wide)
}

/// A segment has less than 2^16 pages: number and page fit into 48 bits.
const PAGE_BITS: u32 = 16;

impl Packed {
    fn new(record: &Record) -> Self {
        let page = record.position.offset_bytes() / PAGE;
        assert!(page < 1 << PAGE_BITS, "a segment is bounded");
        let position = u64::from(record.position.segment()) << PAGE_BITS | page;
        let (epoch, checksum) = (record.epoch, record.checksum);
        Self { block: to_48(record.block), position: to_48(position), epoch, checksum }
    }

    fn block(&self) -> u64 {
        from_48(self.block)
    }

    fn key(&self) -> (u64, u32) {
        (self.block(), self.epoch)
    }

    fn unpack(&self) -> Record {
        let position = from_48(self.position);
        let (segment, page) = (position >> PAGE_BITS, position & ((1 << PAGE_BITS) - 1));
        let fits = |value: u64| u32::try_from(value).expect("packed from 32 bits");
        Record {
            block: self.block(),
            position: Position::new(fits(segment), fits(page)),
            epoch: self.epoch,
            checksum: self.checksum,
        }
    }
}

/// A run of records that are sorted already.
fn pack(records: &[Record]) -> Vec<Packed> {
    records.iter().map(Packed::new).collect()
}

impl Record {
    /// Of an entry that has content.
    pub const fn of(entry: &Entry) -> Self {
        let (block, position) = (entry.blocks.start, entry.position);
        Self { block, position, epoch: entry.epoch, checksum: entry.checksum }
    }

    const fn key(&self) -> (u64, u32) {
        (self.block, self.epoch)
    }
}

/// What an epoch knows beyond preserved content.
#[derive(Default, Clone)]
struct EpochExtents {
    zero: SparseBitmap,
    lost: ExtentSet,
    /// Those of them that the origin could not give.
    lost_at_source: ExtentSet,
    changed: SparseBitmap,
}

/// Records of some epochs.
#[derive(Default, Clone)]
pub struct Memory {
    tree: BTreeMap<(u64, u32), (Position, u32)>,
    runs: Vec<Arc<Vec<Packed>>>,
    epochs: BTreeMap<u32, EpochExtents>,
}

impl Memory {
    /// From the preserved content that a scan found, in any order.
    pub fn from_records(mut records: Vec<Record>) -> Self {
        records.sort_by_key(Record::key);
        // The first record of a block and epoch wins; a batch written twice has equal ones.
        records.dedup_by_key(|r| r.key());
        let runs = if records.is_empty() { Vec::new() } else { vec![Arc::new(pack(&records))] };
        Self { runs, ..Self::default() }
    }

    /// Add preserved content.
    pub fn insert(&mut self, record: Record) {
        self.tree.entry(record.key()).or_insert((record.position, record.checksum));
    }

    /// Add blocks whose old content was zero.
    pub fn insert_zero(&mut self, epoch: u32, blocks: Extent) {
        self.epochs.entry(epoch).or_default().zero.insert(blocks);
    }

    /// Add blocks whose old content is lost.
    pub fn insert_lost(&mut self, epoch: u32, blocks: &ExtentSet) {
        let extents = self.epochs.entry(epoch).or_default();
        extents.lost = extents.lost.union(blocks);
    }

    /// Add blocks whose old content could not be read.
    pub fn insert_lost_at_source(&mut self, epoch: u32, blocks: &ExtentSet) {
        self.insert_lost(epoch, blocks);
        let extents = self.epochs.entry(epoch).or_default();
        extents.lost_at_source = extents.lost_at_source.union(blocks);
    }

    /// Add blocks that changed without a copy.
    pub fn insert_changed(&mut self, epoch: u32, blocks: Extent) {
        self.epochs.entry(epoch).or_default().changed.insert(blocks);
    }

    /// Number of preserved blocks with content.
    pub fn record_count(&self) -> usize {
        self.tree.len() + self.runs.iter().map(|r| r.len()).sum::<usize>()
    }

    /// About how many entries it has: what it costs in memory, and takes to write.
    pub fn weight(&self) -> usize {
        let extents = |e: &EpochExtents| {
            e.zero.leaf_count() + e.changed.leaf_count() + e.lost.as_slice().len()
        };
        self.record_count() + self.epochs.values().map(extents).sum::<usize>()
    }

    /// True if nothing at all is recorded.
    pub fn is_empty(&self) -> bool {
        self.tree.is_empty() && self.runs.is_empty() && self.epochs.is_empty()
    }

    fn packed_within(&self, blocks: Extent) -> impl Iterator<Item = &Packed> {
        self.runs.iter().flat_map(move |run| {
            let from = run.partition_point(|r| r.block() < blocks.start);
            run[from..].iter().take_while(move |r| r.block() < blocks.end)
        })
    }

    fn tree_within(&self, blocks: Extent) -> impl Iterator<Item = Record> + '_ {
        let range = (blocks.start, 0)..(blocks.end.max(blocks.start), 0);
        self.tree.range(range).map(|(&(block, epoch), &(position, checksum))| Record {
            block,
            position,
            epoch,
            checksum,
        })
    }

    /// Add what is known of the content of `blocks` from `epoch` on.
    pub(super) fn contents(&self, blocks: Extent, epoch: u32, nearest: &mut Vec<Nearest>) {
        if blocks.is_empty() || self.is_empty() {
            return;
        }
        let records =
            self.tree_within(blocks).chain(self.packed_within(blocks).map(Packed::unpack));
        let kept = records.filter(|record| record.epoch >= epoch);
        nearest.extend(kept.map(|r| (r.block, r.epoch, Content::Preserved(r))));
        for (&at, extents) in self.epochs.range(epoch..) {
            for extent in extents.zero.within(blocks) {
                nearest.extend((extent.start..extent.end).map(|b| (b, at, Content::Zero)));
            }
            for extent in extents.lost.within(blocks) {
                nearest.extend((extent.start..extent.end).map(|b| (b, at, Content::Lost)));
            }
        }
    }

    /// Add everything recorded of `window`, clipped to it.
    pub fn entries_within(&self, window: Extent, entries: &mut Vec<Entry>) {
        let records =
            self.tree_within(window).chain(self.packed_within(window).map(Packed::unpack));
        entries.extend(records.map(|record| Entry {
            blocks: Extent::single(record.block),
            epoch: record.epoch,
            kind: Kind::Preserve,
            position: record.position,
            checksum: record.checksum,
        }));
        for (&epoch, extents) in &self.epochs {
            let bare = |kind| move |blocks| Entry::bare(kind, epoch, blocks);
            entries.extend(extents.zero.within(window).map(bare(Kind::PreserveZero)));
            // Those that the origin could not give say so where the log says it.
            let unreadable = extents.lost_at_source.within(window);
            let at_source = |blocks| Entry::lost(epoch, blocks, LOST_AT_SOURCE);
            let others = extents.lost.difference(&extents.lost_at_source);
            entries.extend(unreadable.map(at_source));
            entries.extend(others.within(window).map(bare(Kind::Lost)));
            entries.extend(extents.changed.within(window).map(bare(Kind::Changed)));
        }
    }

    /// Add all blocks recorded in the epochs from `since` up to, not including, `until`.
    pub fn changed(&self, since: u32, until: u32, extents: &mut Vec<Extent>) {
        let mut add = |block: u64| match extents.last_mut() {
            Some(last) if last.end == block => last.end += 1,
            Some(last) if last.contains(block) => {}
            _ => extents.push(Extent::single(block)),
        };
        for run in &self.runs {
            run.iter().filter(|r| since <= r.epoch && r.epoch < until).for_each(|r| add(r.block()));
        }
        let tree = self.tree.keys().filter(|(_, epoch)| since <= *epoch && *epoch < until);
        tree.for_each(|(block, _)| add(*block));
        for (_, more) in self.epochs.range(since..until.max(since)) {
            extents.extend(more.zero.within(EVERYTHING));
            extents.extend(more.lost.iter());
            extents.extend(more.changed.within(EVERYTHING));
        }
    }

    /// True if anything from `since` on says that content is lost.
    pub fn has_lost(&self, since: u32) -> bool {
        self.epochs.range(since..).any(|(_, extents)| !extents.lost.is_empty())
    }

    fn tree_records(&self) -> impl Iterator<Item = Record> + '_ {
        self.tree_within(EVERYTHING)
    }

    /// Forget epochs before `first`: no snapshot or bookmark begins early enough to need them.
    pub fn forget_before(&mut self, first: u32) {
        self.epochs = self.epochs.split_off(&first);
        self.tree.retain(|(_, epoch), _| *epoch >= first);
        for run in &mut self.runs {
            if run.iter().any(|r| r.epoch < first) {
                *run = Arc::new(run.iter().filter(|r| r.epoch >= first).copied().collect());
            }
        }
        self.runs.retain(|run| !run.is_empty());
    }

    /// The runs and tree to be merged, if the tree has grown enough. To be called by the committer,
    /// which is the only one that changes the index; the work is then done without any lock.
    pub fn compaction(&self) -> Option<Compaction> {
        if self.tree.len() < TREE_RECORDS_MAX {
            return None;
        }
        let mut total = self.tree.len();
        let mut first = self.runs.len();
        // Merge while the next older run is not much larger: each record is then moved O(log n)
        // times.
        while first > 0 && self.runs[first - 1].len() <= 2 * total {
            first -= 1;
            total += self.runs[first].len();
        }
        let runs = self.runs[first..].to_vec();
        Some(Compaction {
            first,
            runs,
            tree: self.tree_records().map(|r| Packed::new(&r)).collect(),
        })
    }

    /// Swap in what [`Compaction::run`] made; nothing was inserted meanwhile.
    pub fn finish_compaction(&mut self, first: usize, merged: Merged) {
        self.runs.truncate(first);
        self.runs.push(Arc::new(merged.0));
        self.tree.clear();
    }
}

/// A run that [`Compaction::run`] made.
pub struct Merged(Vec<Packed>);

/// Runs to be merged into one.
pub struct Compaction {
    first: usize,
    runs: Vec<Arc<Vec<Packed>>>,
    tree: Vec<Packed>,
}

impl Compaction {
    /// The merged run and the number of older runs that stay.
    pub fn run(self) -> (usize, Merged) {
        let total = self.tree.len() + self.runs.iter().map(|r| r.len()).sum::<usize>();
        let mut merged = Vec::with_capacity(total);
        for run in &self.runs {
            merged.extend_from_slice(run);
        }
        merged.extend(self.tree);
        // Sorted pieces one after another: the stable sort recognises and merges them.
        merged.sort_by_key(Packed::key);
        (self.first, Merged(merged))
    }
}

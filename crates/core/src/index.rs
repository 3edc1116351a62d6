//! Which block has which record in which epoch, in memory.
//!
//! Preserved content: 20 bytes a block, in sorted runs that are merged as they grow, with the
//! newest in a small tree. Runs are immutable; the committer builds new ones outside the lock and
//! swaps them in. Old content that was zero, or was lost, is kept as extents an epoch; changes
//! without content as one bit.

use crate::bitmap::SparseBitmap;
use crate::extent::{Extent, ExtentSet};
use crate::log::format::{PAGE, Position};
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
    /// A batch of the epoch is unreadable: what has no record may have lost it.
    is_damaged: bool,
}

/// What a snapshot's block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Kept here.
    Preserved(Record),
    /// All zeroes.
    Zero,
    /// Could not be kept, or its record is unreadable.
    Lost,
}

/// All records of a volume.
#[derive(Default)]
pub struct Index {
    tree: BTreeMap<(u64, u32), (Position, u32)>,
    runs: Vec<Arc<Vec<Packed>>>,
    epochs: BTreeMap<u32, EpochExtents>,
}

impl Index {
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

    /// Of the blocks lost since `since`, those that the origin could not give.
    pub fn lost_at_source_since(&self, since: u32) -> ExtentSet {
        let sets = self.epochs.range(since..).map(|(_, extents)| &extents.lost_at_source);
        let all = sets.fold(ExtentSet::new(), |sum, set| sum.union(set));
        if all.is_empty() { all } else { all.intersection(&self.lost_since(since)) }
    }

    /// Add blocks that changed without a copy.
    pub fn insert_changed(&mut self, epoch: u32, blocks: Extent) {
        self.epochs.entry(epoch).or_default().changed.insert(blocks);
    }

    /// A batch of the epoch is unreadable.
    pub fn mark_damaged(&mut self, epoch: u32) {
        self.epochs.entry(epoch).or_default().is_damaged = true;
    }

    /// Number of preserved blocks with content.
    pub fn record_count(&self) -> usize {
        self.tree.len() + self.runs.iter().map(|r| r.len()).sum::<usize>()
    }

    /// True if nothing at all is recorded for the blocks since `epoch`; may say false when nothing
    /// is.
    fn is_clear(&self, blocks: Extent, epoch: u32) -> bool {
        let is_bare = self.tree.is_empty() && self.runs.is_empty();
        blocks.is_empty() || (is_bare && self.epochs.range(epoch..).next().is_none())
    }

    /// For each of `blocks` that changed since the instant of `epoch`: what it was then. Ascending,
    /// appended to `found`, which is empty. Blocks not in it are unchanged: the origin has them.
    pub fn contents(&self, blocks: Extent, epoch: u32, found: &mut Vec<(u64, Content)>) {
        debug_assert!(found.is_empty());
        if self.is_clear(blocks, epoch) {
            return;
        }
        let mut nearest: Vec<(u64, u32, Content)> = Vec::new();
        for ((block, at), (position, checksum)) in
            self.tree.range((blocks.start, 0)..(blocks.end, 0))
        {
            if *at >= epoch {
                let (position, checksum) = (*position, *checksum);
                let record = Record { block: *block, position, epoch: *at, checksum };
                nearest.push((*block, *at, Content::Preserved(record)));
            }
        }
        for run in &self.runs {
            let from = run.partition_point(|r| r.block() < blocks.start);
            for record in run[from..].iter().take_while(|r| r.block() < blocks.end) {
                if record.epoch >= epoch {
                    let content = Content::Preserved(record.unpack());
                    nearest.push((record.block(), record.epoch, content));
                }
            }
        }
        for (&at, extents) in self.epochs.range(epoch..) {
            for extent in extents.zero.within(blocks) {
                nearest.extend((extent.start..extent.end).map(|b| (b, at, Content::Zero)));
            }
            for extent in extents.lost.within(blocks) {
                nearest.extend((extent.start..extent.end).map(|b| (b, at, Content::Lost)));
            }
            if extents.is_damaged {
                nearest.extend((blocks.start..blocks.end).map(|b| (b, at, Content::Lost)));
            }
        }
        // Kept content wins over loss in the same epoch.
        nearest.sort_by_key(|&(block, at, content)| (block, at, content == Content::Lost));
        nearest.dedup_by_key(|entry| entry.0);
        found.extend(nearest.into_iter().map(|(block, _, content)| (block, content)));
    }

    /// All blocks recorded in the epochs from `since` up to, not including, `until`.
    pub fn changed(&self, since: u32, until: u32) -> ExtentSet {
        let mut extents: Vec<Extent> = Vec::new();
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
            extents.extend(more.zero.to_set().iter());
            extents.extend(more.lost.iter());
            extents.extend(more.changed.to_set().iter());
        }
        ExtentSet::from_unsorted(extents)
    }

    /// The blocks recorded in each epoch, in one pass.
    pub fn changed_by_epoch(&self) -> BTreeMap<u32, ExtentSet> {
        let mut extents: BTreeMap<u32, Vec<Extent>> = BTreeMap::new();
        let runs = self.runs.iter().flat_map(|run| run.iter().map(Packed::key));
        for (block, epoch) in runs.chain(self.tree.keys().copied()) {
            let list = extents.entry(epoch).or_default();
            match list.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => list.push(Extent::single(block)),
            }
        }
        for (&epoch, more) in &self.epochs {
            let list = extents.entry(epoch).or_default();
            list.extend(more.zero.within(EVERYTHING));
            list.extend(more.lost.iter());
            list.extend(more.changed.within(EVERYTHING));
        }
        extents.into_iter().map(|(epoch, list)| (epoch, ExtentSet::from_unsorted(list))).collect()
    }

    /// True if a batch of an epoch from `since` on is unreadable.
    pub fn is_damaged_since(&self, since: u32) -> bool {
        self.epochs.range(since..).any(|(_, extents)| extents.is_damaged)
    }

    /// Blocks recorded as lost in epochs from `since` on, for which nothing older was kept.
    pub fn lost_since(&self, since: u32) -> ExtentSet {
        let mut all = ExtentSet::new();
        if self.epochs.range(since..).all(|(_, extents)| extents.lost.is_empty()) {
            return all;
        }
        // A copy from the same or an earlier epoch serves the snapshot in spite of a loss. By
        // extents: after a store was full, the whole disk may be lost.
        let mut kept_by_epoch: BTreeMap<u32, Vec<Extent>> = BTreeMap::new();
        let runs = self.runs.iter().flat_map(|run| run.iter().map(Packed::key));
        for (block, epoch) in runs.chain(self.tree.keys().copied()).filter(|key| key.1 >= since) {
            kept_by_epoch.entry(epoch).or_default().push(Extent::single(block));
        }
        let mut kept = ExtentSet::new();
        for (&epoch, extents) in self.epochs.range(since..) {
            let later = kept_by_epoch.split_off(&(epoch + 1));
            let upto = std::mem::replace(&mut kept_by_epoch, later).into_values().flatten();
            kept = kept.union(&upto.chain(extents.zero.within(EVERYTHING)).collect());
            all = all.union(&extents.lost.difference(&kept));
        }
        all
    }

    /// Every preserved block, ordered by block, then epoch.
    pub fn sorted_records(&self) -> Vec<Record> {
        let mut all = Vec::with_capacity(self.record_count());
        for run in &self.runs {
            all.extend(run.iter().map(Packed::unpack));
        }
        all.extend(self.tree_records());
        all.sort_by_key(Record::key);
        all
    }

    fn tree_records(&self) -> impl Iterator<Item = Record> + '_ {
        self.tree.iter().map(|(&(block, epoch), &(position, checksum))| Record {
            block,
            position,
            epoch,
            checksum,
        })
    }

    /// Per epoch, the blocks whose old content was zero or is lost: copies without content of their
    /// own.
    pub fn contentless_extents(&self) -> Vec<(u32, ExtentSet)> {
        let kept = self.epochs.iter().filter(|(_, e)| !e.zero.is_empty() || !e.lost.is_empty());
        kept.map(|(&epoch, e)| (epoch, e.zero.to_set().union(&e.lost))).collect()
    }

    /// The zero extents of every epoch.
    pub fn zero_extents(&self) -> Vec<(u32, ExtentSet)> {
        let kept = self.epochs.iter().filter(|(_, e)| !e.zero.is_empty());
        kept.map(|(&epoch, e)| (epoch, e.zero.to_set())).collect()
    }

    /// Records that keep nothing for anyone any more: `gone` become changes without a copy.
    pub fn release(&mut self, kept: &[Record], gone: &[Record], zero: Vec<(u32, ExtentSet)>) {
        for record in gone {
            self.insert_changed(record.epoch, Extent::single(record.block));
        }
        for (epoch, remaining) in zero {
            let extents = self.epochs.entry(epoch).or_default();
            for extent in extents.zero.to_set().difference(&remaining).iter() {
                extents.changed.insert(extent);
            }
            extents.zero = SparseBitmap::from_set(&remaining);
        }
        self.tree.clear();
        self.runs = if kept.is_empty() { Vec::new() } else { vec![Arc::new(pack(kept))] };
    }

    /// Copies that are given up: lost, as if they had never been kept.
    pub fn give_up(&mut self, by_epoch: &[(u32, ExtentSet)]) {
        let is_given_up = |record: &Record| {
            by_epoch.iter().any(|(e, blocks)| *e == record.epoch && blocks.contains(record.block))
        };
        let mut kept = self.sorted_records();
        kept.retain(|record| !is_given_up(record));
        self.tree.clear();
        self.runs = if kept.is_empty() { Vec::new() } else { vec![Arc::new(pack(&kept))] };
        for (epoch, blocks) in by_epoch {
            self.insert_lost(*epoch, blocks);
        }
    }

    /// Forget epochs before `first`: no snapshot or bookmark begins early enough to need them.
    pub fn forget_before(&mut self, first: u32) {
        self.epochs = self.epochs.split_off(&first);
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

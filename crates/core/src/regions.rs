//! Regions of tracked-only blocks: which blocks may change without a record of their own, and which
//! of them did.
//!
//! A region is a megabyte of the disk. Once a REGION record is durable its blocks are *covered*: a
//! write sets a bit in memory that outlives the process, and goes straight to the origin. Pure but
//! for that memory; called under the volume's state lock.

use crate::bitmap::Bitmap;
use crate::buffer::{Arena, REGION_BLOCKS_MAX, RegionBits, bit_runs};
use crate::extent::Extent;
use crate::number::to_usize;
use smallvec::SmallVec;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes of a region: few records, and after a power cut little that counts as changed and is not.
/// In the simulation a disk of a few blocks has several.
pub const REGION_BYTES: u64 = if cfg!(feature = "simulation") { 32 << 10 } else { 1 << 20 };
/// Regions that are open at once: 4 MiB of memory, and what a power cut makes too large is bounded.
pub const REGIONS_MAX: u64 = 1 << 16;

#[derive(Clone, Copy)]
struct Open {
    /// Where its bits are.
    entry: u32,
    /// A block was written for the first time since somebody looked.
    is_hot: bool,
}

type ByNumber = HashMap<u64, Open, foldhash::fast::FixedState>;

/// What was written in a region: its first block, and a bit for each from there on.
pub type Written = (u64, RegionBits);

/// The regions of a volume.
pub struct Regions {
    arena: Arc<Arena>,
    /// Blocks of a region.
    span: u64,
    free: Vec<u32>,
    open: ByNumber,
    /// Those of an epoch that ended: what was written in them is still to be recorded.
    ended: ByNumber,
    /// Blocks that may be written without a record and have not been.
    covered: Bitmap,
    /// One could not be opened since somebody looked.
    is_crowded: bool,
}

/// Blocks of a region.
pub fn region_blocks(block_size: u64) -> u64 {
    (REGION_BYTES / block_size).clamp(1, REGION_BLOCKS_MAX)
}

impl Regions {
    /// None open, with room for as many as the arena has.
    pub fn new(arena: Arc<Arena>, block_size: u64, block_count: u64) -> Self {
        Self {
            span: region_blocks(block_size),
            free: (0..arena.region_count()).rev().collect(),
            arena,
            open: ByNumber::default(),
            ended: ByNumber::default(),
            covered: Bitmap::new(block_count),
            is_crowded: false,
        }
    }

    /// The disk grew.
    pub fn grow(&mut self, block_count: u64) {
        self.covered.grow(block_count);
    }

    /// Regions that are open.
    pub fn open_count(&self) -> usize {
        self.open.len() + self.ended.len()
    }

    /// True if the block may be written without a record.
    pub fn covers(&self, block: u64) -> bool {
        !self.open.is_empty() && self.covered.get(block)
    }

    /// The blocks of a region.
    pub fn extent(&self, number: u64) -> Extent {
        let start = number * self.span;
        Extent { start, end: (start + self.span).min(self.covered.block_count()) }
    }

    /// The region a block is in.
    pub fn number(&self, block: u64) -> u64 {
        block / self.span
    }

    /// Have a place for the bits of a region; false if there is none.
    pub fn reserve(&mut self, number: u64, epoch: u32) -> bool {
        if self.open.contains_key(&number) {
            return true;
        }
        let Some(entry) = self.free.pop() else {
            self.is_crowded = true;
            return false;
        };
        self.arena.open_region(entry, epoch, self.extent(number));
        self.open.insert(number, Open { entry, is_hot: true });
        true
    }

    /// Blocks whose REGION record is durable may be written. Their regions have their places.
    pub fn cover(&mut self, blocks: Extent) {
        self.covered.assign(blocks, true);
    }

    /// The covered ones of these blocks are about to be written.
    pub fn mark(&mut self, blocks: Extent) {
        if self.open.is_empty() {
            return;
        }
        let runs: SmallVec<[Extent; 4]> = self.covered.set_within(blocks).collect();
        for run in runs {
            for number in run.start / self.span..run.end.div_ceil(self.span) {
                let first = number * self.span;
                let part = run.intersection(Extent { start: first, end: first + self.span });
                let open = self.open.get_mut(&number).expect("covered blocks are of open regions");
                open.is_hot = true;
                self.arena.mark_region(open.entry, part.start - first..part.end - first);
            }
            self.covered.assign(run, false);
        }
    }

    /// No block is covered any more; what was written stays known.
    pub fn uncover(&mut self) {
        if !self.open.is_empty() {
            self.covered = Bitmap::new(self.covered.block_count());
        }
    }

    /// The covered blocks of a region, which are no more.
    pub fn uncover_region(&mut self, number: u64) -> Vec<Extent> {
        let extent = self.extent(number);
        let covered = self.covered.set_within(extent).collect();
        self.covered.assign(extent, false);
        covered
    }

    /// Every open region, ascending.
    pub fn numbers(&self) -> Vec<u64> {
        sorted(self.open.keys().copied())
    }

    /// Those of the epoch that ended, ascending.
    pub fn ended_numbers(&self) -> Vec<u64> {
        sorted(self.ended.keys().copied())
    }

    /// Regions in which no block was written for the first time since the last call, ascending.
    pub fn take_idle(&mut self) -> Vec<u64> {
        self.is_crowded = false;
        let idle = sorted(self.open.iter().filter(|(_, open)| !open.is_hot).map(|(&n, _)| n));
        for open in self.open.values_mut() {
            open.is_hot = false;
        }
        idle
    }

    /// True if the region is open and none of its blocks was written for the first time since
    /// [`Self::take_idle`].
    pub fn is_idle(&self, number: u64) -> bool {
        self.open.get(&number).is_some_and(|open| !open.is_hot)
    }

    /// True if the region is open, or of the epoch that ended.
    pub fn is_open(&self, number: u64, has_ended: bool) -> bool {
        let regions = if has_ended { &self.ended } else { &self.open };
        regions.contains_key(&number)
    }

    /// Descriptors that closing all of them takes: the runs of blocks that were written, and an end
    /// each.
    pub fn descriptor_count(&self) -> usize {
        let runs = |open: &Open| {
            let bits = self.arena.region_bits(open.entry);
            let begun = bits.iter().scan(0, |before, &word| {
                let begun = word & !(word << 1 | *before);
                *before = word >> 63;
                Some(begun.count_ones())
            });
            begun.sum::<u32>()
        };
        let runs: u64 = self.open.values().map(|open| u64::from(runs(open))).sum();
        to_usize(runs) + self.open.len()
    }

    /// True if a region could not be opened since [`Self::take_idle`].
    pub fn is_crowded(&self) -> bool {
        self.is_crowded
    }

    /// Runs of blocks that were written in a region, ascending.
    pub fn written_in(&self, number: u64, has_ended: bool) -> Vec<Extent> {
        let regions = if has_ended { &self.ended } else { &self.open };
        let Some(open) = regions.get(&number) else { return Vec::new() };
        runs_of((number * self.span, self.arena.region_bits(open.entry))).collect()
    }

    /// What was written in all of them.
    pub fn written(&self) -> Vec<Written> {
        let all = self.open.iter().chain(&self.ended);
        all.map(|(&number, open)| (number * self.span, self.arena.region_bits(open.entry)))
            .collect()
    }

    /// What was written in these regions is recorded.
    pub fn close(&mut self, numbers: &[u64], has_ended: bool) {
        let regions = if has_ended { &mut self.ended } else { &mut self.open };
        for number in numbers {
            if let Some(open) = regions.remove(number) {
                self.arena.close_region(open.entry);
                self.free.push(open.entry);
            }
        }
    }

    /// An epoch ends: nothing is covered, and what was written waits to be recorded. `none` is a
    /// bitmap without a block. No I/O, and nothing that grows with what was written.
    pub fn end_epoch(&mut self, none: Bitmap) {
        self.resume();
        self.ended = std::mem::take(&mut self.open);
        self.covered = none;
    }

    /// The epoch did not end: its regions are open again, and nothing is covered.
    pub fn resume(&mut self) {
        for (number, ended) in std::mem::take(&mut self.ended) {
            if let Some(newer) = self.open.insert(number, ended) {
                for run in bit_runs(&self.arena.region_bits(newer.entry)) {
                    self.arena.mark_region(ended.entry, run);
                }
                self.arena.close_region(newer.entry);
                self.free.push(newer.entry);
            }
        }
    }
}

/// Runs of blocks that were written, ascending.
pub fn runs_of((first, bits): Written) -> impl Iterator<Item = Extent> {
    let runs: SmallVec<[std::ops::Range<u64>; 4]> = bit_runs(&bits).collect();
    runs.into_iter().map(move |run| Extent::new(first + run.start, first + run.end))
}

fn sorted(numbers: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut numbers: Vec<u64> = numbers.collect();
    numbers.sort_unstable();
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::ArenaSize;

    const BLOCK: u64 = 4096;

    fn regions(capacity: u32, blocks: u64) -> Regions {
        let size = ArenaSize { slots: 1, regions: capacity, block_size: BLOCK };
        Regions::new(Arc::new(Arena::private(size).expect("memory")), BLOCK, blocks)
    }

    fn written(regions: &Regions) -> Vec<Extent> {
        let mut runs: Vec<Extent> = regions.written().into_iter().flat_map(runs_of).collect();
        runs.sort_unstable_by_key(|run| run.start);
        runs
    }

    #[test]
    fn only_covered_blocks_are_marked_and_only_once() {
        let span = region_blocks(BLOCK);
        let mut regions = regions(4, 3 * span);
        for number in [0, 1] {
            assert!(regions.reserve(number, 7));
        }
        regions.cover(Extent::new(2, span + 5));
        regions.mark(Extent::new(0, 3 * span));
        let expected = vec![Extent::new(2, span), Extent::new(span, span + 5)];
        assert_eq!(written(&regions), expected);
        assert_eq!(regions.descriptor_count(), expected.len() + 2);
        assert!(!regions.covers(3), "written: the next write needs no mark");
    }

    #[test]
    fn bits_at_both_ends_of_words_are_those_of_the_blocks() {
        let size = ArenaSize { slots: 1, regions: 1, block_size: BLOCK };
        let arena = Arena::private(size).expect("memory");
        for range in [0..1, 63..64, 60..70, 64..128, 0..256, 200..256, 127..129] {
            arena.open_region(0, 1, Extent::new(0, 256));
            arena.mark_region(0, range.clone());
            let bits = arena.region_bits(0);
            assert_eq!(bit_runs(&bits).collect::<Vec<_>>(), vec![range]);
        }
    }

    #[test]
    fn an_epoch_that_ends_keeps_its_bits_apart_until_they_are_recorded() {
        let span = region_blocks(BLOCK);
        let mut regions = regions(2, 2 * span);
        assert!(regions.reserve(0, 1));
        regions.cover(Extent::new(0, span));
        regions.mark(Extent::single(1));
        regions.end_epoch(Bitmap::new(2 * span));
        assert!(!regions.covers(0));
        assert!(regions.reserve(0, 2));
        regions.cover(Extent::new(0, span));
        regions.mark(Extent::single(2));
        assert_eq!(regions.written_in(0, true), vec![Extent::single(1)]);
        assert_eq!(regions.written_in(0, false), vec![Extent::single(2)]);
        assert!(!regions.reserve(1, 2), "no place is left");
        regions.close(&[0], true);
        assert!(regions.reserve(1, 2), "a place is free again");
        assert_eq!(written(&regions), vec![Extent::single(2)]);
    }

    #[test]
    fn an_epoch_that_did_not_end_has_all_its_bits() {
        let span = region_blocks(BLOCK);
        let mut regions = regions(2, span);
        assert!(regions.reserve(0, 1));
        regions.cover(Extent::new(0, span));
        regions.mark(Extent::single(1));
        regions.end_epoch(Bitmap::new(span));
        assert!(regions.reserve(0, 2));
        regions.cover(Extent::new(0, span));
        regions.mark(Extent::single(3));
        regions.resume();
        let expected = vec![Extent::single(1), Extent::single(3)];
        assert_eq!(regions.written_in(0, false), expected);
    }
}

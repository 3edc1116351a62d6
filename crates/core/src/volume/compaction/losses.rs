//! Of many records that blocks were lost, few.

use crate::extent::{Extent, ExtentSet};
use std::collections::BTreeSet;

/// Losses of one epoch, of which few are made. One that is the whole disk says more than its blocks:
/// that records of the epoch are gone. So whatever may be that, now or when the disk has another
/// size, stays as it is, and is never made of others.
#[derive(Default)]
pub(super) struct Merge {
    /// Ends of those that are all blocks before one.
    whole: BTreeSet<u64>,
    /// Of all others. Put in order once: how long it takes must not grow with records times extents.
    extents: Vec<Extent>,
}

impl Merge {
    pub(super) fn add(&mut self, blocks: &ExtentSet) {
        match blocks.as_slice() {
            [all] if all.start == 0 => drop(self.whole.insert(all.end)),
            others => self.extents.extend(others),
        }
    }

    /// Sets of at most so many extents, two or more, that have all blocks together.
    pub(super) fn finish(self, extents_max: usize) -> Vec<ExtentSet> {
        let before = |end: u64| ExtentSet::from_extent(Extent::new(0, end));
        let covered = before(self.whole.last().copied().unwrap_or(0));
        let mut sets: Vec<ExtentSet> = self.whole.into_iter().map(before).collect();
        let others = ExtentSet::from_unsorted(self.extents).difference(&covered);
        match others.as_slice() {
            [all] if all.start == 0 => {
                sets.extend([before(1), ExtentSet::from_extent(Extent::new(1, all.end))]);
            }
            others => {
                let some = |extents: &[Extent]| extents.iter().copied().collect();
                sets.extend(others.chunks(extents_max).map(some));
            }
        }
        sets
    }
}

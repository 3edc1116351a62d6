//! Which copy of a block serves which snapshots. Pure.

use super::entry::Entry;
use crate::epochs::Selections;
use crate::extent::{Extent, ExtentSet};
use crate::log::format::Kind;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Call for every preserved block among `entries`, which have everything of a window, with the
/// epoch of the copy before it, 0 if there is none.
pub fn for_each_copy(entries: &[Entry], mut each: impl FnMut(&Entry, u32)) {
    let is_copy =
        |entry: &&Entry| matches!(entry.kind, Kind::Preserve | Kind::PreserveZero | Kind::Lost);
    // Single blocks in order; longer ones, which have no content of their own, by epoch.
    let mut singles: Vec<&Entry> = Vec::new();
    let mut longer: BTreeMap<u32, Vec<Extent>> = BTreeMap::new();
    for entry in entries.iter().filter(is_copy) {
        if entry.blocks.len() == 1 {
            singles.push(entry);
        } else {
            longer.entry(entry.epoch).or_default().push(entry.blocks);
        }
    }
    singles.sort_by_key(|entry| entry.key());
    let longer: Vec<(u32, ExtentSet)> = longer
        .into_iter()
        .map(|(epoch, extents)| (epoch, ExtentSet::from_unsorted(extents)))
        .collect();
    // The last block, its last epoch, and the one before that.
    let (mut block, mut last, mut before) = (u64::MAX, 0, 0);
    for entry in singles {
        if entry.blocks.start != block {
            (block, last, before) = (entry.blocks.start, entry.epoch, 0);
        } else if entry.epoch != last {
            (before, last) = (last, entry.epoch);
        }
        if entry.kind != Kind::Preserve {
            continue;
        }
        let from = longer.partition_point(|(epoch, _)| *epoch <= before);
        let upto = longer.partition_point(|(epoch, _)| *epoch < entry.epoch);
        let mut between = longer.get(from..upto).unwrap_or_default().iter().rev();
        let nearest = between.find(|(_, set)| set.contains(block));
        each(entry, nearest.map_or(before, |(epoch, _)| *epoch));
    }
}

/// How many preserved blocks each snapshot reads, and how many nobody else does.
pub struct Usage {
    /// Selections, each with the snapshots that have it, ascending.
    groups: Vec<(Arc<ExtentSet>, Vec<u32>)>,
    /// For each group the changes of both counts from one snapshot to the next.
    steps: Vec<Vec<(i64, u64)>>,
}

impl Usage {
    /// Of the live snapshots.
    pub fn new(selections: &Selections) -> Self {
        let mut groups: Vec<(Arc<ExtentSet>, Vec<u32>)> = Vec::new();
        for (&epoch, selection) in &selections.0 {
            // Snapshots of one rule set share theirs, at least those in a row.
            match groups.iter_mut().rev().find(|(set, _)| Arc::ptr_eq(set, selection)) {
                Some((_, members)) => members.push(epoch),
                None => groups.push((Arc::clone(selection), vec![epoch])),
            }
        }
        let steps = groups.iter().map(|(_, members)| vec![(0, 0); members.len() + 1]).collect();
        Self { groups, steps }
    }

    /// Count a copy.
    pub fn add(&mut self, entry: &Entry, previous: u32) {
        let mut users = 0;
        let mut last = None;
        for (group, (selection, members)) in self.groups.iter().enumerate() {
            let from = members.partition_point(|&epoch| epoch <= previous);
            let upto = members.partition_point(|&epoch| epoch <= entry.epoch);
            if from < upto && selection.contains(entry.blocks.start) {
                self.steps[group][from].0 += 1;
                self.steps[group][upto].0 -= 1;
                users += upto - from;
                last = Some((group, from));
            }
        }
        if let (1, Some((group, member))) = (users, last) {
            self.steps[group][member].1 += 1;
        }
    }

    /// Both counts, by snapshot.
    pub fn counts(&self) -> BTreeMap<u32, (u64, u64)> {
        let mut counts = BTreeMap::new();
        for ((_, members), steps) in self.groups.iter().zip(&self.steps) {
            let mut shared: i64 = 0;
            for (&epoch, (step, exclusive)) in members.iter().zip(steps) {
                shared += step;
                let all = u64::try_from(shared).expect("what begins ends later");
                counts.insert(epoch, (all, *exclusive));
            }
        }
        counts
    }
}

//! The whole index at one moment, to be looked through by windows of blocks: what a change of many
//! records needs, and in bounded memory.

use super::entry::{Entry, EpochSet};
use super::memory::Memory;
use super::run::Run;
use crate::extent::{Extent, ExtentSet};
use crate::log::format::{Kind, LOST_AT_SOURCE};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// Pages of index files looked through at once, about,
const WINDOW_PAGES_MAX: u64 = 64;
/// and entries: the next window is smaller, or larger, if one has other than these.
const WINDOW_ENTRIES_MAX: usize = 64 << 10;
const WINDOW_ENTRIES_MIN: usize = 8 << 10;
/// Blocks of a window: no entry of an index file is longer.
const WINDOW_BLOCKS_MAX: u64 = 1 << 32;

/// An index file, and the epochs that it tells: others know better of the rest.
#[derive(Clone)]
pub struct Layer {
    /// The file.
    pub run: Arc<Run>,
    /// Epochs of which it has everything.
    pub epochs: EpochSet,
}

impl Layer {
    /// True if it may know something from `epoch` on.
    pub fn reaches(&self, epoch: u32) -> bool {
        self.epochs.last().is_some_and(|last| last >= epoch)
    }
}

/// The index at one moment.
#[derive(Clone)]
pub struct Parts {
    pub(super) memories: Vec<Arc<Memory>>,
    pub(super) layers: Arc<Vec<Layer>>,
    pub(super) given_up: Arc<BTreeMap<u32, ExtentSet>>,
}

/// Where a walk is: blocks before it are done.
#[derive(Debug, Clone, Copy)]
pub struct Walk {
    at: u64,
    width: u64,
    end: u64,
}

impl Walk {
    /// Over the blocks from `start` up to `end`.
    pub const fn new(start: u64, end: u64) -> Self {
        Self { at: start, width: 1 << 16, end }
    }

    /// The first block that was not looked at.
    pub const fn position(&self) -> u64 {
        self.at
    }
}

impl Parts {
    /// Only memory: an index file to be.
    pub fn of_memories(memories: Vec<Arc<Memory>>) -> Self {
        Self { memories, layers: Arc::default(), given_up: Arc::default() }
    }

    /// Only index files.
    pub fn of_layers(layers: Vec<Layer>) -> Self {
        Self { memories: Vec::new(), layers: Arc::new(layers), given_up: Arc::default() }
    }

    /// Put the entries of the next window into `entries`, clipped to it, in no order; false if there
    /// is no more. Entries that reach over several windows come with each.
    pub fn next_window(&self, walk: &mut Walk, entries: &mut Vec<Entry>) -> io::Result<bool> {
        self.step(walk, entries, |layer, window, entries| {
            let each = &mut |entry: &Entry| {
                if layer.epochs.contains(entry.epoch) {
                    entries.push(entry.clipped(window));
                }
            };
            layer.run.overlapping(window, 0, super::run::Wait::Long, each).map(|_| ())
        })
    }

    /// As [`Self::next_window`], in order, and whole: each entry of an index file comes once.
    pub fn next_sorted(&self, walk: &mut Walk, entries: &mut Vec<Entry>) -> io::Result<bool> {
        let has_more = self.step(walk, entries, |layer, window, entries| {
            let each = &mut |entry: &Entry| {
                if layer.epochs.contains(entry.epoch) {
                    entries.push(*entry);
                }
            };
            layer.run.beginning(window, each)
        })?;
        entries.sort_by_key(Entry::key);
        Ok(has_more)
    }

    fn step(
        &self,
        walk: &mut Walk,
        entries: &mut Vec<Entry>,
        read: impl Fn(&Layer, Extent, &mut Vec<Entry>) -> io::Result<()>,
    ) -> io::Result<bool> {
        entries.clear();
        if walk.at >= walk.end {
            return Ok(false);
        }
        let window = |width: u64| Extent::new(walk.at, walk.end.min(walk.at + width));
        let pages = |window: Extent| -> u64 {
            self.layers.iter().map(|layer| layer.run.pages_within(window)).sum()
        };
        while walk.width > 1 && pages(window(walk.width)) > WINDOW_PAGES_MAX {
            walk.width /= 2;
        }
        let window = window(walk.width);
        for memory in &self.memories {
            memory.entries_within(window, entries);
        }
        for layer in self.layers.iter() {
            read(layer, window, entries)?;
        }
        if !self.given_up.is_empty() {
            entries.retain(|entry| {
                let (block, epoch) = (entry.blocks.start, entry.epoch);
                entry.kind != Kind::Preserve || !super::is_given_up(&self.given_up, block, epoch)
            });
        }
        walk.at = window.end;
        if entries.len() > WINDOW_ENTRIES_MAX {
            walk.width = (walk.width / 2).max(1);
        } else if entries.len() < WINDOW_ENTRIES_MIN {
            walk.width = (walk.width * 2).min(WINDOW_BLOCKS_MAX);
        }
        Ok(true)
    }

    /// All blocks recorded in the epochs from `since` up to, not including, `until`.
    pub fn changed(&self, since: u32, until: u32) -> io::Result<ExtentSet> {
        let mut extents = Vec::new();
        for memory in &self.memories {
            memory.changed(since, until, &mut extents);
        }
        let all = Extent::new(0, u64::MAX / 2);
        for layer in self.layers.iter().filter(|layer| layer.reaches(since)) {
            layer.run.beginning(all, &mut |entry| {
                let is_wanted = since <= entry.epoch && entry.epoch < until;
                if !is_wanted || !layer.epochs.contains(entry.epoch) {
                    return;
                }
                match extents.last_mut() {
                    Some(last) if last.end == entry.blocks.start => last.end = entry.blocks.end,
                    Some(last) if *last == entry.blocks => {}
                    _ => extents.push(entry.blocks),
                }
            })?;
        }
        Ok(ExtentSet::from_unsorted(extents))
    }

    /// Of `blocks` those that the origin could not give in an epoch from `since` on; what else was
    /// kept of them is not looked at.
    pub fn lost_at_source_since(&self, since: u32, blocks: Extent) -> io::Result<ExtentSet> {
        let in_layers = self.layers.iter().any(|l| l.reaches(since) && l.run.has_lost());
        if !in_layers && !self.memories.iter().any(|memory| memory.has_lost(since)) {
            return Ok(ExtentSet::new());
        }
        let (mut walk, mut entries) = (Walk::new(blocks.start, blocks.end), Vec::new());
        let mut all = Vec::new();
        while self.next_window(&mut walk, &mut entries)? {
            let is_one = |e: &&Entry| {
                e.kind == Kind::Lost && e.checksum == LOST_AT_SOURCE && e.epoch >= since
            };
            all.extend(entries.iter().filter(is_one).map(|entry| entry.blocks));
        }
        Ok(ExtentSet::from_unsorted(all))
    }

    /// Blocks up to `end` recorded as lost in epochs from `since` on, for which nothing older was
    /// kept.
    pub fn lost_since(&self, since: u32, end: u64) -> io::Result<ExtentSet> {
        let mut all = ExtentSet::new();
        let in_layers = self.layers.iter().any(|l| l.reaches(since) && l.run.has_lost());
        if !in_layers && !self.memories.iter().any(|memory| memory.has_lost(since)) {
            return Ok(all);
        }
        // A copy from the same or an earlier epoch serves the snapshot in spite of a loss. By
        // extents: after a store was full, the whole disk may be lost.
        let mut walk = Walk::new(0, end);
        let mut entries = Vec::new();
        while self.next_window(&mut walk, &mut entries)? {
            if !entries.iter().any(|entry| entry.kind == Kind::Lost) {
                continue;
            }
            let mut by_epoch: BTreeMap<u32, (Vec<Extent>, Vec<Extent>)> = BTreeMap::new();
            for entry in entries.iter().filter(|entry| entry.epoch >= since) {
                let (kept, lost) = by_epoch.entry(entry.epoch).or_default();
                match entry.kind {
                    Kind::Preserve | Kind::PreserveZero => kept.push(entry.blocks),
                    Kind::Lost => lost.push(entry.blocks),
                    Kind::Changed | Kind::Done | Kind::Region | Kind::RegionEnd => {}
                }
            }
            let mut kept = ExtentSet::new();
            for (more, lost) in by_epoch.into_values() {
                kept = kept.union(&ExtentSet::from_unsorted(more));
                all = all.union(&ExtentSet::from_unsorted(lost).difference(&kept));
            }
        }
        Ok(all)
    }
}

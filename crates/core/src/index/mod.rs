//! Which block has which record in which epoch.
//!
//! The open epoch is in memory ([`memory`]); so are closed ones until an index file has them
//! ([`run`]). An epoch is in exactly one of the two, and all of it. The log is the truth: whatever
//! is here was read from it, or appended to it.

pub mod copies;
pub mod entry;
pub mod memory;
pub mod parts;
pub mod run;
#[cfg(test)]
mod tests;

pub use memory::Record;
pub use parts::{Layer, Parts};

use crate::extent::{Extent, ExtentSet};
use crate::log::format::Kind;
use memory::{Compaction, Memory, Merged};
use run::Wait;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

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

/// What is known of a block in an epoch.
type Nearest = (u64, u32, Content);

/// Blocks by epoch.
type GivenUp = BTreeMap<u32, ExtentSet>;

fn is_given_up(given_up: &GivenUp, block: u64, epoch: u32) -> bool {
    given_up.get(&epoch).is_some_and(|blocks| blocks.contains(block))
}

/// All records of a volume.
#[derive(Default)]
pub struct Index {
    /// The open epoch; shared while somebody looks through all of it.
    open: Arc<Memory>,
    /// Closed epochs that no index file has.
    frozen: BTreeMap<u32, Arc<Memory>>,
    /// What the journal says is lost, of any epoch.
    stray: Memory,
    /// Copies that the journal says were given up: not kept, whatever the log says.
    given_up: Arc<GivenUp>,
    /// Index files, with the epochs that each tells.
    layers: Arc<Vec<Layer>>,
    /// Epochs with an unreadable batch: what has no record may have lost it.
    damaged: BTreeSet<u32>,
}

/// What memory knows of some blocks, and the index files that know the rest.
pub struct Lookup {
    blocks: Extent,
    epoch: u32,
    nearest: Vec<Nearest>,
    layers: Arc<Vec<Layer>>,
    given_up: Arc<GivenUp>,
}

impl Lookup {
    /// For each of the blocks that changed since the instant: what it was then. Ascending, appended
    /// to `found`, which is empty. Blocks not in it are unchanged: the origin has them. False if a
    /// device must be waited for and may not be.
    pub fn finish(mut self, wait: Wait, found: &mut Vec<(u64, Content)>) -> io::Result<bool> {
        debug_assert!(found.is_empty());
        for layer in self.layers.iter().filter(|layer| layer.reaches(self.epoch)) {
            let (blocks, since) = (self.blocks, self.epoch);
            let nearest = &mut self.nearest;
            let is_read = layer.run.overlapping(blocks, since, wait, &mut |entry| {
                if entry.epoch < since || !layer.epochs.contains(entry.epoch) {
                    return;
                }
                let content = match entry.kind {
                    Kind::Preserve => Content::Preserved(Record::of(entry)),
                    Kind::PreserveZero => Content::Zero,
                    Kind::Lost => Content::Lost,
                    Kind::Changed | Kind::Done | Kind::Region | Kind::RegionEnd => return,
                };
                let part = entry.blocks.intersection(blocks);
                nearest.extend((part.start..part.end).map(|b| (b, entry.epoch, content)));
            })?;
            if !is_read {
                return Ok(false);
            }
        }
        if !self.given_up.is_empty() {
            self.nearest.retain(|&(block, at, content)| {
                !matches!(content, Content::Preserved(_)) || !is_given_up(&self.given_up, block, at)
            });
        }
        // Kept content wins over loss in the same epoch.
        self.nearest.sort_by_key(|&(block, at, content)| (block, at, content == Content::Lost));
        self.nearest.dedup_by_key(|entry| entry.0);
        found.extend(self.nearest.into_iter().map(|(block, _, content)| (block, content)));
        Ok(true)
    }
}

impl Index {
    /// What index files know.
    pub fn of_layers(layers: Vec<Layer>) -> Self {
        Self { layers: Arc::new(layers), ..Self::default() }
    }

    /// Add preserved content of the open epoch.
    pub fn insert(&mut self, record: Record) {
        Arc::make_mut(&mut self.open).insert(record);
    }

    /// Add blocks of the open epoch whose old content was zero.
    pub fn insert_zero(&mut self, epoch: u32, blocks: Extent) {
        Arc::make_mut(&mut self.open).insert_zero(epoch, blocks);
    }

    /// Add blocks of the open epoch whose old content is lost.
    pub fn insert_lost(&mut self, epoch: u32, blocks: &ExtentSet) {
        Arc::make_mut(&mut self.open).insert_lost(epoch, blocks);
    }

    /// Add blocks of the open epoch whose old content could not be read.
    pub fn insert_lost_at_source(&mut self, epoch: u32, blocks: &ExtentSet) {
        Arc::make_mut(&mut self.open).insert_lost_at_source(epoch, blocks);
    }

    /// Add blocks of any epoch of which the journal says that their content is lost.
    pub fn insert_stray_loss(&mut self, epoch: u32, blocks: &ExtentSet) {
        self.stray.insert_lost(epoch, blocks);
    }

    /// Copies of any epoch that are given up: lost, as if they had never been kept.
    pub fn give_up(&mut self, by_epoch: &[(u32, ExtentSet)]) {
        for (epoch, blocks) in by_epoch {
            self.stray.insert_lost(*epoch, blocks);
            let given_up = Arc::make_mut(&mut self.given_up).entry(*epoch).or_default();
            *given_up = given_up.union(blocks);
        }
    }

    /// Add blocks of the open epoch that changed without a copy.
    pub fn insert_changed(&mut self, epoch: u32, blocks: Extent) {
        Arc::make_mut(&mut self.open).insert_changed(epoch, blocks);
    }

    /// A batch of the epoch is unreadable.
    pub fn mark_damaged(&mut self, epoch: u32) {
        self.damaged.insert(epoch);
    }

    /// An instant came: the open epoch is closed.
    pub fn close_epoch(&mut self, epoch: u32) {
        let closed = std::mem::take(&mut self.open);
        if epoch > 0 {
            self.frozen.insert(epoch, closed);
        }
    }

    /// A whole epoch, as a scan found it: the open one, or a closed one.
    pub fn adopt(&mut self, epoch: u32, memory: Memory, is_open: bool) {
        if is_open {
            self.open = Arc::new(memory);
        } else {
            self.frozen.insert(epoch, Arc::new(memory));
        }
    }

    /// Number of preserved blocks with content.
    pub fn record_count(&self) -> u64 {
        let memories = self.memories().map(|m| crate::number::to_u64(m.record_count()));
        let layers = self.layers.iter().map(|layer| layer.run.preserved_count());
        memories.chain(layers).sum()
    }

    fn memories(&self) -> impl Iterator<Item = &Memory> {
        self.frozen.values().map(|m| &**m).chain([&*self.open, &self.stray])
    }

    /// Look for what `blocks` were at the instant of `epoch`; to be finished without a lock.
    pub fn look_up(&self, blocks: Extent, epoch: u32) -> Lookup {
        let mut nearest = Vec::new();
        for memory in self.memories() {
            memory.contents(blocks, epoch, &mut nearest);
        }
        for &at in self.damaged.range(epoch..) {
            nearest.extend((blocks.start..blocks.end).map(|b| (b, at, Content::Lost)));
        }
        let (layers, given_up) = (Arc::clone(&self.layers), Arc::clone(&self.given_up));
        Lookup { blocks, epoch, nearest, layers, given_up }
    }

    /// Everything there is, to be looked through without a lock.
    pub fn parts(&self) -> Parts {
        let mut memories: Vec<Arc<Memory>> = self.frozen.values().map(Arc::clone).collect();
        memories.push(Arc::clone(&self.open));
        if !self.stray.is_empty() {
            memories.push(Arc::new(self.stray.clone()));
        }
        let (layers, given_up) = (Arc::clone(&self.layers), Arc::clone(&self.given_up));
        Parts { memories, layers, given_up }
    }

    /// About how much of closed epochs is in memory and may be in an index file, and how many those
    /// are.
    pub fn unfiled_weight(&self) -> (usize, usize) {
        let intact = self.frozen.iter().filter(|(epoch, _)| !self.damaged.contains(epoch));
        intact.fold((0, 0), |(weight, count), (_, m)| (weight + m.weight(), count + 1))
    }

    /// True if a batch of an epoch from `since` on is unreadable.
    pub fn is_damaged_since(&self, since: u32) -> bool {
        self.damaged.range(since..).next().is_some()
    }

    /// True if a batch of the epoch is unreadable.
    pub fn is_damaged(&self, epoch: u32) -> bool {
        self.damaged.contains(&epoch)
    }

    /// What the journal says is lost of an epoch.
    pub fn stray_loss(&self, epoch: u32) -> ExtentSet {
        let mut extents = Vec::new();
        self.stray.changed(epoch, epoch + 1, &mut extents);
        ExtentSet::from_unsorted(extents)
    }

    /// All blocks recorded in the open epoch or lost since it began: a later one may have been lost
    /// with all its records.
    pub fn changed_in_open(&self, epoch: u32) -> ExtentSet {
        let mut extents = Vec::new();
        self.open.changed(epoch, epoch + 1, &mut extents);
        self.stray.changed(epoch, u32::MAX, &mut extents);
        ExtentSet::from_unsorted(extents)
    }

    /// Forget epochs before `first`: no snapshot or bookmark begins early enough to need them. Tells
    /// the index files that know nothing any more.
    pub fn forget_before(&mut self, first: u32) -> Vec<u32> {
        self.frozen = self.frozen.split_off(&first);
        self.damaged = self.damaged.split_off(&first);
        self.stray.forget_before(first);
        if !self.given_up.is_empty() {
            self.given_up = Arc::new(Arc::make_mut(&mut self.given_up).split_off(&first));
        }
        if !self.open.is_empty() {
            Arc::make_mut(&mut self.open).forget_before(first);
        }
        let mut layers = (*self.layers).clone();
        for layer in &mut layers {
            layer.epochs.retain(|epoch| epoch >= first);
        }
        self.set_layers(layers)
    }

    fn set_layers(&mut self, mut layers: Vec<Layer>) -> Vec<u32> {
        let useless = |layer: &Layer| layer.epochs.is_empty();
        let gone = layers.iter().filter(|l| useless(l)).map(|l| l.run.number()).collect();
        layers.retain(|layer| !useless(layer));
        self.layers = Arc::new(layers);
        gone
    }

    /// Closed epochs that an index file may have and none has.
    pub fn unfiled(&self) -> Vec<(u32, Arc<Memory>)> {
        let intact = self.frozen.iter().filter(|(epoch, _)| !self.damaged.contains(epoch));
        intact.map(|(&epoch, memory)| (epoch, Arc::clone(memory))).collect()
    }

    /// The index files.
    pub fn layers(&self) -> &Arc<Vec<Layer>> {
        &self.layers
    }

    /// An index file tells its epochs from now on, and `gone` are no more; tells the files that
    /// know nothing any more.
    pub fn file(&mut self, new: Option<&Layer>, gone: &BTreeSet<u32>) -> Vec<u32> {
        let told = |epoch: u32| new.is_some_and(|new| new.epochs.contains(epoch));
        self.frozen.retain(|&epoch, _| !told(epoch) && !gone.contains(&epoch));
        let mut layers = (*self.layers).clone();
        for layer in &mut layers {
            layer.epochs.retain(|epoch| !told(epoch) && !gone.contains(&epoch));
        }
        layers.extend(new.cloned());
        self.set_layers(layers)
    }

    /// An epoch was read from the log anew: no index file tells it any more.
    pub fn take_out(&mut self, epoch: u32, memory: &Arc<Memory>) {
        let mut layers = (*self.layers).clone();
        for layer in &mut layers {
            layer.epochs.retain(|told| told != epoch);
        }
        self.layers = Arc::new(layers);
        self.frozen.insert(epoch, Arc::clone(memory));
    }

    /// An index file tells nothing any more; tells the files to be removed, if it is still there.
    pub fn remove_layer(&mut self, number: u32) -> Vec<u32> {
        let mut layers = (*self.layers).clone();
        for layer in layers.iter_mut().filter(|layer| layer.run.number() == number) {
            layer.epochs.retain(|_| false);
        }
        self.set_layers(layers)
    }

    /// See [`Memory::compaction`].
    pub fn compaction(&self) -> Option<Compaction> {
        self.open.compaction()
    }

    /// See [`Memory::finish_compaction`].
    pub fn finish_compaction(&mut self, first: usize, merged: Merged) {
        Arc::make_mut(&mut self.open).finish_compaction(first, merged);
    }
}

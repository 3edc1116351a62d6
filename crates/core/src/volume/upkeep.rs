//! What is done behind everything else: records of closed epochs go to index files, and those are
//! merged; what a damaged one had is read from the log again.
//!
//! One at a time, in a thread of its own; the role is held for moments only. What an index file says
//! is never the only copy: interrupted, nothing is lost, and the next opening reads more of the log.

use super::decided::memory_of;
use super::load::HELD_ENTRIES;
use super::past::{Patience, index_error};
use super::{Upkeep, Volume};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::index::entry::EpochSet;
use crate::index::parts::{Layer, Parts, Walk};
use crate::index::run::{Run, RunWriter, run_name};
use crate::log::format::PAGE;
use crate::log::scan::scan_headers;
use crate::storage::Directory;
use crate::sync::MutexGuard;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Records of closed epochs stay in memory, and are read from the log at opening, up to so many,
const UNFILED_ENTRIES_MAX: usize = 32 << 10;
/// of so many epochs.
const UNFILED_EPOCHS_MAX: usize = 64;
/// Index files there are at most, whatever their sizes: each is looked into by every reader.
const LAYERS_MAX: usize = 12;

/// How much is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// What has become worth it.
    Due,
    /// Whatever can be done.
    All,
}

impl Upkeep {
    pub(super) fn new(next_run: u32, resume_at: u64) -> Self {
        Self { next_run, decisions: 0, resume_at, unmergeable: BTreeSet::new() }
    }
}

/// An index file to be: everything in `parts` up to the block `end`.
pub(super) struct NewRun<'a> {
    pub(super) uuid: [u8; 16],
    pub(super) number: u32,
    pub(super) parts: &'a Parts,
    /// Epochs, each with its segments, ascending.
    pub(super) covers: Vec<(u32, u32)>,
    pub(super) end: u64,
}

/// True if the store may take so many bytes in all for what is being written.
pub(super) type MayTake<'a> = &'a dyn Fn(u64) -> Result<bool>;

/// Write an index file; complete and durable when this returns. `None` if there is no room: nobody
/// needs it so much that anything else should go without.
pub(super) fn write_run(
    directory: &dyn Directory,
    new: NewRun<'_>,
    may_take: MayTake<'_>,
) -> Result<Option<Layer>> {
    let mut epochs = EpochSet::default();
    for group in new.covers.chunk_by(|a, b| a.0 == b.0) {
        epochs.push(group[0].0);
    }
    if !may_take(PAGE)? {
        return Ok(None);
    }
    let name = run_name(new.number);
    let written = fill_run(directory, new, may_take);
    if !matches!(written, Ok(Some(_))) {
        // What cannot be removed now is removed at the next opening.
        let _ = directory.remove(&name);
    }
    match written {
        Err(Error::StoreFull(_)) => Ok(None),
        written => Ok(written?.map(|run| Layer { run: Arc::new(run), epochs })),
    }
}

fn fill_run(
    directory: &dyn Directory,
    new: NewRun<'_>,
    may_take: MayTake<'_>,
) -> Result<Option<Run>> {
    let writing = || Error::store("writing an index file");
    let mut writer = RunWriter::create(directory, new.uuid, new.number).map_err(writing())?;
    let mut walk = Walk::new(0, new.end);
    let mut entries = Vec::new();
    while new.parts.next_sorted(&mut walk, &mut entries).map_err(index_error)? {
        if !may_take(writer.bytes_max(entries.len(), new.covers.len()))? {
            return Ok(None);
        }
        let pushed = entries.iter().try_for_each(|entry| writer.push(entry));
        pushed.map_err(writing())?;
    }
    writer.finish(new.covers).map(Some).map_err(writing())
}

impl Volume {
    /// Do what is to be done behind everything else. It is done by itself; to be called where all
    /// of it is wanted now.
    pub fn maintain(&self, effort: Effort) -> Result<()> {
        if effort == Effort::All {
            let mut committer = self.role()?;
            self.close_regions_in_turns(&mut committer, 0)?;
        }
        // None of these waits for the others' success.
        let settled = self.settle_groups(&[]);
        self.free_space()?;
        let mut upkeep = self.upkeep.lock();
        let compacted = self.compact_journal(&mut upkeep, effort);
        self.read_damaged_anew(&mut upkeep, Patience::Wait)?;
        self.mending(&mut upkeep, |upkeep| {
            self.merge_epochs(upkeep, effort)?;
            self.file_closed(upkeep, effort)?;
            self.merge_layers(upkeep, effort)
        })?;
        compacted.and(settled.map(drop))
    }

    /// Wake the thread that does it.
    pub(super) fn want_upkeep(&self) {
        self.state.lock().is_upkeep_wanted = true;
        self.upkeep_wanted.notify_one();
    }

    /// The thread.
    pub(super) fn run_upkeep(&self) {
        loop {
            {
                let mut state = self.state.lock();
                while !state.is_stopping && !state.is_upkeep_wanted {
                    self.upkeep_wanted.wait(&mut state);
                }
                if state.is_stopping {
                    return;
                }
                state.is_upkeep_wanted = false;
            }
            // Nobody waits for it, and nothing depends on it; it is tried again when wanted again.
            let is_done = self.maintain(Effort::Due);
            if is_done.is_err_and(|error| !matches!(error, Error::Closed)) {
                self.counters.upkeep_failures.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn next_run(upkeep: &mut MutexGuard<'_, Upkeep>) -> u32 {
        let number = upkeep.next_run;
        upkeep.next_run += 1;
        number
    }

    /// Write an index file and believe it; false if there is no room for it.
    fn write_layer(
        &self,
        upkeep: &mut MutexGuard<'_, Upkeep>,
        parts: &Parts,
        covers: Vec<(u32, u32)>,
    ) -> Result<bool> {
        let (uuid, number) = (self.uuid, Self::next_run(upkeep));
        let end = self.block_count(self.size_bytes());
        let new = NewRun { uuid, number, parts, covers, end };
        let written = write_run(self.segments.directory(), new, &|all| self.take_for_upkeep(all));
        let done = written.and_then(|layer| {
            let Some(layer) = layer else { return Ok(false) };
            let useless = self.index.write().file(Some(&layer), &BTreeSet::new());
            self.remove_runs(&useless).map(|()| true)
        });
        self.end_taking_for_upkeep();
        done
    }

    /// Bring closed epochs to an index file.
    pub(super) fn file_closed(
        &self,
        upkeep: &mut MutexGuard<'_, Upkeep>,
        effort: Effort,
    ) -> Result<()> {
        let (unfiled, weight) = {
            let index = self.index.read();
            (index.unfiled(), index.unfiled_weight().0)
        };
        let is_due = weight >= UNFILED_ENTRIES_MAX || unfiled.len() >= UNFILED_EPOCHS_MAX;
        if unfiled.is_empty() || (effort == Effort::Due && !is_due) {
            return Ok(());
        }
        let mut covers: Vec<(u32, u32)> = {
            let committer = self.role()?;
            let wanted: BTreeSet<u32> = unfiled.iter().map(|(epoch, _)| *epoch).collect();
            let segments = committer.segments.iter().filter(|(_, epoch)| wanted.contains(epoch));
            segments.map(|(&segment, &epoch)| (epoch, segment)).collect()
        };
        covers.sort_unstable();
        let memories = unfiled.into_iter().map(|(_, memory)| memory).collect();
        self.write_layer(upkeep, &Parts::of_memories(memories), covers)?;
        Ok(())
    }

    /// Merge index files so that few are left: each record is moved O(log n) times.
    fn merge_layers(&self, upkeep: &mut MutexGuard<'_, Upkeep>, effort: Effort) -> Result<()> {
        let layers = Arc::clone(self.index.read().layers());
        let mut first = layers.len();
        let mut total = 0;
        while first > 0 {
            let entries = layers[first - 1].run.entry_count();
            let is_worth_it = first == layers.len() || entries <= 2 * total;
            if !is_worth_it && layers.len() <= LAYERS_MAX && effort == Effort::Due {
                break;
            }
            total += entries;
            first -= 1;
        }
        let merged = &layers[first..];
        if merged.len() < 2 {
            return Ok(());
        }
        let mut covers: Vec<(u32, u32)> = merged
            .iter()
            .flat_map(|layer| layer.run.covers().iter().filter(|c| layer.epochs.contains(c.0)))
            .copied()
            .collect();
        covers.sort_unstable();
        self.write_layer(upkeep, &Parts::of_layers(merged.to_vec()), covers)?;
        Ok(())
    }

    /// What a damaged index file had is read from the log again; what is too much to be held goes
    /// to another file, if there is room. Without patience nobody is waited for, and all of it is
    /// held: whoever asks may have the role.
    pub(super) fn read_damaged_anew(
        &self,
        upkeep: &mut MutexGuard<'_, Upkeep>,
        patience: Patience,
    ) -> Result<()> {
        let layers = Arc::clone(self.index.read().layers());
        for layer in layers.iter().filter(|layer| layer.run.is_damaged()) {
            let mut scan = scan_headers(&self.segments, self.uuid, &ExtentSet::default())?;
            let by_epoch = scan.epochs();
            let (mut held, mut covers, mut weight) = (Vec::new(), Vec::new(), 0);
            for epoch in layer.epochs.iter() {
                let before = scan.damaged.len();
                let numbers = by_epoch.get(&epoch).map_or(&[][..], Vec::as_slice);
                let batches = scan.read_epoch(&self.segments, self.uuid, numbers)?;
                let end = self.block_count(self.size_bytes());
                let memory = Arc::new(memory_of(&batches, self.block_size, end));
                if scan.damaged.len() > before || numbers.is_empty() {
                    let mut index = self.index.write();
                    index.take_out(epoch, &memory);
                    index.mark_damaged(epoch);
                    index.insert_stray_loss(epoch, &ExtentSet::from_extent(Extent::new(0, end)));
                    continue;
                }
                weight += memory.weight();
                covers.extend(numbers.iter().map(|&segment| (epoch, segment)));
                held.push((epoch, memory));
                if weight >= HELD_ENTRIES && patience == Patience::Wait {
                    let memories = held.iter().map(|(_, memory)| Arc::clone(memory)).collect();
                    let parts = Parts::of_memories(memories);
                    let covers = std::mem::take(&mut covers);
                    if !self.write_layer(upkeep, &parts, covers)? {
                        let mut index = self.index.write();
                        for (epoch, memory) in &held {
                            index.take_out(*epoch, memory);
                        }
                    }
                    held.clear();
                    weight = 0;
                }
            }
            let mut index = self.index.write();
            for (epoch, memory) in held {
                index.take_out(epoch, &memory);
            }
            let useless = index.remove_layer(layer.run.number());
            drop(index);
            self.remove_runs(&useless)?;
        }
        Ok(())
    }
}

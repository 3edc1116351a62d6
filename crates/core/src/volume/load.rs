//! The index at opening: from index files where they fit the log, else from the log itself.

use super::decided::{Decided, epochs_with_losses, memory_of, memory_of_open};
use super::upkeep::{NewRun, write_run};
use crate::error::{Error, Result};
use crate::extent::ExtentSet;
use crate::index::Index;
use crate::index::entry::EpochSet;
use crate::index::parts::Layer;
use crate::index::run::{Run, run_number};
use crate::log::merged::is_unfinished;
use crate::log::scan::{Scan, open_regions};
use crate::log::writer::Segments;
use crate::storage::Directory;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// So much of the log is held in memory while it is read; more goes to an index file.
pub(super) const HELD_ENTRIES: usize = 2 << 20;

/// What was loaded.
pub(super) struct Loaded {
    pub(super) index: Index,
    /// The next index file's number.
    pub(super) next_run: u32,
    /// Index files that are of no use.
    pub(super) useless: Vec<u32>,
    /// Merged segments that were not finished.
    pub(super) unfinished: Vec<String>,
    /// Blocks of the last epoch that may have changed without a record of their own.
    pub(super) regions: ExtentSet,
}

/// Read what no index file has, and always the last epoch, whose end is the end of the log.
///
/// `others_bytes` of its filesystem the store leaves to others: it is what a sparse origin needs.
pub(super) fn load_index(
    segments: &Segments,
    scan: &mut Scan,
    decided: &Decided,
    others_bytes: u64,
) -> Result<Loaded> {
    let by_epoch = scan.epochs();
    let mut loaded = layers_of(segments, scan, decided, &by_epoch)?;
    let last = by_epoch.keys().next_back().copied().unwrap_or(0);
    // No index file gets these, however much is held.
    for epoch in damaged_epochs(scan, decided) {
        loaded.index.mark_damaged(epoch);
    }
    let filed: BTreeSet<u32> =
        loaded.index.layers().iter().flat_map(|layer| layer.epochs.iter()).collect();
    let mut has_room = true;
    for (&epoch, numbers) in by_epoch.iter().filter(|(epoch, _)| !filed.contains(epoch)) {
        let damage = scan.damaged.len();
        let batches = scan.read_epoch(segments, decided.uuid, numbers)?;
        if scan.damaged.len() > damage {
            loaded.index.mark_damaged(epoch);
        }
        if epoch == last {
            scan.batches = batches;
            scan.cut_torn_payload(segments, decided.block_size)
                .map_err(Error::store("reading the log"))?;
            loaded.regions = open_regions(&scan.batches, decided.block_count());
            loaded.index.adopt(epoch, memory_of_open(&scan.batches, decided.block_size), true);
            break;
        }
        let memory = memory_of(&batches, decided.block_size, decided.block_count());
        loaded.index.adopt(epoch, memory, false);
        if has_room && loaded.index.unfiled_weight().0 >= HELD_ENTRIES {
            has_room = spill(segments, decided, others_bytes, &by_epoch, &mut loaded)?;
        }
    }
    decided.expect(scan);
    for epoch in damaged_epochs(scan, decided) {
        loaded.index.mark_damaged(epoch);
        loaded.index.insert_stray_loss(epoch, &decided.all_blocks());
    }
    for (epoch, blocks) in &decided.lost {
        loaded.index.insert_stray_loss(*epoch, blocks);
    }
    loaded.index.give_up(&decided.given_up);
    Ok(loaded)
}

fn damaged_epochs(scan: &Scan, decided: &Decided) -> BTreeSet<u32> {
    if scan.losses().next().is_none() {
        return BTreeSet::new();
    }
    epochs_with_losses(scan, &decided.epochs(scan))
}

/// Index files, and which epochs each of them tells: those of which it was made from exactly the
/// segments there are, and no later one was.
fn layers_of(
    segments: &Segments,
    scan: &Scan,
    decided: &Decided,
    by_epoch: &BTreeMap<u32, Vec<u32>>,
) -> Result<Loaded> {
    let reading = || Error::store("reading index files");
    let names = segments.directory().list().map_err(reading())?;
    let mut numbers: Vec<u32> = names.iter().filter_map(|name| run_number(name)).collect();
    numbers.sort_unstable();
    let next_run = numbers.last().copied().unwrap_or(0) + 1;
    // The open epoch may have lost its tail; a damaged one is damaged whatever an index file says.
    let mut taken = damaged_epochs(scan, decided);
    taken.extend(by_epoch.keys().next_back());
    let (mut layers, mut useless) = (Vec::new(), Vec::new());
    for &number in numbers.iter().rev() {
        let run = Run::open(segments.directory(), decided.uuid, number).map_err(reading())?;
        let Some(run) = run else {
            useless.push(number);
            continue;
        };
        let mut epochs = EpochSet::default();
        for group in run.covers().chunk_by(|a, b| a.0 == b.0) {
            let epoch = group[0].0;
            let made_from = group.iter().map(|(_, segment)| segment);
            let is_as_made = by_epoch.get(&epoch).is_some_and(|now| now.iter().eq(made_from));
            if is_as_made && taken.insert(epoch) {
                epochs.push(epoch);
            }
        }
        if epochs.is_empty() {
            useless.push(number);
        } else {
            layers.push(Layer { run: Arc::new(run), epochs });
        }
    }
    layers.reverse();
    let index = Index::of_layers(layers);
    let unfinished = names.into_iter().filter(|name| is_unfinished(name)).collect();
    Ok(Loaded { index, next_run, useless, unfinished, regions: ExtentSet::new() })
}

/// Bring what is held to an index file; false if the store has no room for it, and it stays held.
fn spill(
    segments: &Segments,
    decided: &Decided,
    others_bytes: u64,
    by_epoch: &BTreeMap<u32, Vec<u32>>,
    loaded: &mut Loaded,
) -> Result<bool> {
    let left = growth_left(segments.directory(), decided, others_bytes);
    let left = left.map_err(Error::store("looking for room"))?;
    let unfiled = loaded.index.unfiled();
    let covers = unfiled
        .iter()
        .flat_map(|(epoch, _)| by_epoch[epoch].iter().map(move |&segment| (*epoch, segment)));
    let covers: Vec<(u32, u32)> = covers.collect();
    let end = decided.block_count();
    let memories = unfiled.into_iter().map(|(_, memory)| memory).collect();
    let parts = crate::index::Parts::of_memories(memories);
    let number = loaded.next_run;
    loaded.next_run += 1;
    let new = NewRun { uuid: decided.uuid, number, parts: &parts, covers, end };
    let layer = write_run(segments.directory(), new, &|all| Ok(2 * all <= left))?;
    if let Some(layer) = &layer {
        loaded.index.file(Some(layer), &BTreeSet::new());
    }
    Ok(layer.is_some())
}

/// Bytes that the store may grow by before it is open.
fn growth_left(
    directory: &dyn Directory,
    decided: &Decided,
    others_bytes: u64,
) -> std::io::Result<u64> {
    let left = directory.free_bytes()?.saturating_sub(others_bytes);
    let limit = decided.policy.limit_bytes;
    if limit == 0 {
        return Ok(left);
    }
    let mut used = 0;
    for name in directory.list()? {
        used += directory.open(&name)?.allocated_bytes()?;
    }
    Ok(left.min(limit.saturating_sub(used)))
}

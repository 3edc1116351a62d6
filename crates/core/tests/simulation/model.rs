//! What the clients of a volume did and were told, and what may be found because of it.
//!
//! The disk is cut into cells of 256 bytes, half a sector, so that writes of parts of sectors occur.
//! Each write of a cell is a version of it, with a value of its own. What may be found is a range of
//! versions: from the last one that must be there to the last one that was begun.

use crate::clones::CloneModel;
use std::collections::BTreeMap;
use stillblock_core::extent::{Extent, ExtentSet};
use stillblock_core::regions::region_blocks;

pub const CELL: usize = 256;
pub const CELLS_A_BLOCK: usize = 4096 / CELL;
const NEVER: u64 = u64::MAX;
/// No cell has this value.
pub const UNKNOWN: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Version {
    value: u32,
    issued: u64,
    acked: u64,
}

#[derive(Clone, Debug)]
struct Cell {
    versions: Vec<Version>,
    /// The first version that may be found after a power cut.
    durable: usize,
    /// A client writes to it.
    is_busy: bool,
}

impl Cell {
    fn last_acked(&self) -> usize {
        self.versions.iter().rposition(|v| v.acked != NEVER).expect("the first one is")
    }

    fn last_issued(&self) -> usize {
        self.versions.len() - 1
    }
}

/// A snapshot, or the bookmark it left.
#[allow(clippy::struct_excessive_bools)] // each is an operation that may be under way
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub selection: ExtentSet,
    /// It is being narrowed to this.
    pub narrowing: Option<ExtentSet>,
    pub is_deleting: bool,
    /// No snapshot any more.
    pub is_deleted: bool,
    /// What its bookmark tracks.
    pub bookmark: Option<ExtentSet>,
    pub is_bookmarking: bool,
    pub is_bookmark_deleting: bool,
    /// By cell, the versions it may hold.
    low: Vec<usize>,
    high: Vec<usize>,
    began: u64,
    ended: u64,
    /// What it was seen to hold: it must for ever.
    pub pinned: Option<Vec<u32>>,
}

impl Snapshot {
    /// It is there, and nothing failed half-way that may have changed it.
    pub fn is_certain(&self) -> bool {
        let is_changing = self.is_deleting || self.is_bookmarking || self.is_bookmark_deleting;
        !self.is_deleted && !is_changing && self.narrowing.is_none()
    }
}

/// A restore whose instant may have come or not.
#[derive(Clone, Debug)]
pub struct Restore {
    pub blocks: ExtentSet,
    pub content: Vec<u32>,
    pub safety: ExtentSet,
}

#[derive(Clone, Debug)]
pub struct Model {
    time: u64,
    next_value: u32,
    cells: Vec<Cell>,
    pub size_bytes: u64,
    pub snapshots: BTreeMap<u32, Snapshot>,
    pub creating: Option<Snapshot>,
    pub restoring: Option<Restore>,
    pub clones: BTreeMap<u32, CloneModel>,
    /// The clone that is being made.
    pub cloning: Option<CloneModel>,
    /// Clones whose making failed, and that may be there.
    pub maybe_cloned: Vec<CloneModel>,
    /// A clone of it is about to be made.
    pub clone_source: Option<u32>,
    /// By epoch, blocks of regions that were open at a stop which took their bits: they count as
    /// changed, written or not.
    excess: BTreeMap<u32, ExtentSet>,
    /// The power was cut and nobody has looked since: what was not durable may be gone.
    pub was_cut: bool,
    /// A client was told that the origin failed.
    pub is_failure_told: bool,
    /// The highest epoch number that anybody was ever given.
    epoch_max: u32,
}

pub fn size(value: u64) -> usize {
    usize::try_from(value).expect("a small disk")
}

impl Model {
    pub fn new(size_bytes: u64) -> Self {
        let cell = Cell {
            versions: vec![Version { value: 1, issued: 0, acked: 0 }],
            durable: 0,
            is_busy: false,
        };
        Self {
            time: 1,
            next_value: 1,
            cells: vec![cell; size(size_bytes).div_ceil(CELL)],
            size_bytes,
            snapshots: BTreeMap::new(),
            creating: None,
            restoring: None,
            clones: BTreeMap::new(),
            cloning: None,
            maybe_cloned: Vec::new(),
            clone_source: None,
            excess: BTreeMap::new(),
            was_cut: false,
            is_failure_told: false,
            epoch_max: 0,
        }
    }

    /// A disk that holds these values, and is durable; those it is given from now on begin at
    /// `next_value`.
    pub fn holding(size_bytes: u64, values: &[u32], next_value: u32) -> Self {
        let mut model = Self { next_value, ..Self::new(size_bytes) };
        for (cell, &value) in model.cells.iter_mut().zip(values) {
            cell.versions[0].value = value;
        }
        model
    }

    pub fn next_value(&self) -> u32 {
        self.next_value
    }

    pub fn cell_count(&self) -> usize {
        self.cells.len()
    }

    pub fn block_count(&self) -> u64 {
        self.size_bytes.div_ceil(4096)
    }

    pub fn all_blocks(&self) -> ExtentSet {
        ExtentSet::from_extent(Extent::new(0, self.block_count()))
    }

    fn tick(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    /// The cells of a block.
    pub fn cells_of(&self, block: u64) -> std::ops::Range<usize> {
        let first = size(block) * CELLS_A_BLOCK;
        first..(first + CELLS_A_BLOCK).min(self.cells.len())
    }

    /// Begin to write cells, unless somebody else does; tells the value.
    pub fn begin_write(&mut self, cells: std::ops::Range<usize>, is_zero: bool) -> Option<u32> {
        if self.cells[cells.clone()].iter().any(|cell| cell.is_busy) {
            return None;
        }
        self.next_value += 1;
        let value = if is_zero { 0 } else { self.next_value };
        let issued = self.tick();
        for cell in &mut self.cells[cells] {
            cell.versions.push(Version { value, issued, acked: NEVER });
            cell.is_busy = true;
        }
        Some(value)
    }

    /// The write was acknowledged, and with `fua` is durable.
    pub fn end_write(&mut self, cells: std::ops::Range<usize>, fua: bool) {
        let acked = self.tick();
        for cell in &mut self.cells[cells] {
            cell.is_busy = false;
            cell.versions.last_mut().expect("begun").acked = acked;
            if fua {
                cell.durable = cell.last_issued();
            }
        }
    }

    /// The write failed: it may be there or not.
    pub fn fail_write(&mut self, cells: std::ops::Range<usize>) {
        for cell in &mut self.cells[cells] {
            cell.is_busy = false;
        }
    }

    /// The discard of cells left them like this.
    pub fn end_trim(&mut self, cells: std::ops::Range<usize>, found: &[u32]) {
        let now = self.tick();
        for (cell, &value) in self.cells[cells].iter_mut().zip(found) {
            cell.is_busy = false;
            cell.versions.push(Version { value, issued: now, acked: now });
        }
    }

    /// The versions that are acknowledged now.
    pub fn acked(&self) -> Vec<usize> {
        self.cells.iter().map(Cell::last_acked).collect()
    }

    /// A flush that began when these were acknowledged has returned.
    pub fn end_flush(&mut self, acked: &[usize]) {
        for (cell, &version) in self.cells.iter_mut().zip(acked) {
            cell.durable = cell.durable.max(version);
        }
    }

    /// Whether a read that began when `acked` were acknowledged may give this.
    pub fn check_read(&self, first: usize, acked: &[usize], found: &[u32]) -> Result<(), String> {
        for (index, &value) in found.iter().enumerate() {
            let cell = first + index;
            let versions = &self.cells[cell].versions[acked[cell]..];
            if !versions.iter().any(|v| v.value == value) {
                return Err(format!("a read of cell {cell} gave {value}, may be {versions:?}"));
            }
        }
        Ok(())
    }

    /// Whether this may be found on the disk after a stop.
    pub fn check_live(&self, found: &[u32], was_cut: bool) -> Result<(), String> {
        self.check_part(0, found, was_cut)
    }

    /// The same of the cells from `first` on.
    pub fn check_part(&self, first: usize, found: &[u32], was_cut: bool) -> Result<(), String> {
        for (index, &value) in (first..).zip(found) {
            let cell = &self.cells[index];
            let from = if was_cut { cell.durable } else { cell.last_acked() };
            if !cell.versions[from..].iter().any(|v| v.value == value) {
                return Err(format!(
                    "P6: cell {index} (block {}) holds {value} after a {}, may be {:?}, was {:?}",
                    index / CELLS_A_BLOCK,
                    if was_cut { "cut" } else { "kill" },
                    &cell.versions[from..],
                    &cell.versions,
                ));
            }
        }
        Ok(())
    }

    /// Somebody looked: from now on the disk holds this.
    pub fn settle(&mut self, found: &[u32], was_cut: bool) {
        self.settle_part(0, found, was_cut);
        self.was_cut = false;
    }

    /// Nobody could look: whatever a power cut may have left.
    pub fn doubt_all(&mut self) {
        for cell in &mut self.cells {
            cell.is_busy = false;
            let durable = cell.durable;
            cell.versions[durable + 1..].iter_mut().for_each(|v| v.acked = NEVER);
        }
    }

    /// The same as [`Model::settle`] of the cells from `first` on.
    pub fn settle_part(&mut self, first: usize, found: &[u32], was_cut: bool) {
        let now = self.tick();
        for (cell, &value) in self.cells[first..].iter_mut().zip(found) {
            cell.is_busy = false;
            let last = cell.versions.last_mut().expect("the first one");
            if last.value == value {
                last.acked = last.acked.min(now);
            } else {
                cell.versions.push(Version { value, issued: now, acked: now });
            }
            if was_cut {
                cell.durable = cell.last_issued();
            }
        }
    }

    /// The value of each cell; [`UNKNOWN`] while somebody writes it, or if a write of it failed.
    pub fn live(&self) -> Vec<u32> {
        let value = |cell: &Cell| {
            let last = cell.versions.last().expect("the first one");
            if last.acked == NEVER { UNKNOWN } else { last.value }
        };
        self.cells.iter().map(value).collect()
    }

    pub fn begin_snapshot(&mut self, selection: ExtentSet) {
        let began = self.tick();
        let low = self.acked();
        self.creating = Some(Snapshot { selection, low, began, ..Snapshot::default() });
    }

    /// What the snapshot that is being taken is, if its instant came.
    pub fn taken(&mut self) -> Option<Snapshot> {
        let mut snapshot = self.creating.take()?;
        snapshot.high = self.cells.iter().map(Cell::last_issued).collect();
        snapshot.ended = self.tick();
        Some(snapshot)
    }

    /// A snapshot has a number, and no other ever had it.
    pub fn add(&mut self, epoch: u32, snapshot: Snapshot) -> Result<(), String> {
        if epoch <= self.epoch_max {
            return Err(format!("P10: {epoch} is given out again, {} was before", self.epoch_max));
        }
        self.epoch_max = epoch;
        self.snapshots.insert(epoch, snapshot);
        Ok(())
    }

    /// The restore's instant came: this is the disk now, and it is durable.
    pub fn restored(&mut self, restore: &Restore, safety_epoch: u32) -> Result<(), String> {
        let content = self.live();
        let high: Vec<usize> = self.cells.iter().map(Cell::last_issued).collect();
        let now = self.tick();
        for block in restore.blocks.iter().flat_map(|e| e.start..e.end) {
            for index in self.cells_of(block) {
                let value = restore.content[index];
                self.cells[index].versions.push(Version { value, issued: now, acked: now });
            }
        }
        for cell in &mut self.cells {
            cell.durable = cell.last_acked();
        }
        let safety = Snapshot {
            selection: restore.safety.clone(),
            low: high.clone(),
            high,
            began: now,
            ended: now,
            pinned: Some(content),
            ..Snapshot::default()
        };
        self.add(safety_epoch, safety)
    }

    /// Whether a snapshot may hold this: each cell a version of the time it was taken, and all of
    /// them of one moment. `found` has the cells of the blocks it selects.
    pub fn check_snapshot(&self, epoch: u32, found: &BTreeMap<usize, u32>) -> Result<(), String> {
        let snapshot = &self.snapshots[&epoch];
        if let Some(pinned) = &snapshot.pinned {
            for (&index, &value) in found {
                if pinned[index] != value && pinned[index] != UNKNOWN {
                    return Err(format!(
                        "P2: snapshot {epoch} cell {index} (block {}) gives {value}, gave {}",
                        index / CELLS_A_BLOCK,
                        pinned[index]
                    ));
                }
            }
            return Ok(());
        }
        let (mut after, mut before) = (snapshot.began, snapshot.ended);
        for (&index, &value) in found {
            let versions = &self.cells[index].versions;
            let range = snapshot.low[index]..=snapshot.high[index];
            let mut fitting = range.clone().filter(|&v| versions[v].value == value);
            let Some(version) = fitting.next() else {
                return Err(format!(
                    "P2: snapshot {epoch} cell {index} (block {}) gives {value}, may be {:?}",
                    index / CELLS_A_BLOCK,
                    &versions[range]
                ));
            };
            if fitting.next().is_some() {
                continue;
            }
            after = after.max(versions[version].issued);
            if let Some(next) = versions.get(version + 1) {
                before = before.min(next.acked);
            }
        }
        if after > before {
            return Err(format!("P2: snapshot {epoch} is of no one moment: {after} > {before}"));
        }
        Ok(())
    }

    /// From now on it must hold this.
    pub fn pin(&mut self, epoch: u32, found: &BTreeMap<usize, u32>) {
        let count = self.cells.len();
        if let Some(snapshot) = self.snapshots.get_mut(&epoch) {
            let mut pinned = snapshot.pinned.take().unwrap_or_else(|| vec![UNKNOWN; count]);
            for (&index, &value) in found {
                pinned[index] = value;
            }
            snapshot.pinned = Some(pinned);
        }
    }

    /// Blocks of `tracked` that hold something else than at an instant, in `content`.
    pub fn differing(&self, epoch: u32, tracked: &ExtentSet, content: &[u32]) -> Vec<u64> {
        let Some(pinned) = &self.snapshots[&epoch].pinned else { return Vec::new() };
        let differs = |block: &u64| {
            self.cells_of(*block)
                .any(|c| pinned[c] != UNKNOWN && content[c] != UNKNOWN && pinned[c] != content[c])
        };
        tracked.iter().flat_map(|e| e.start..e.end).filter(differs).collect()
    }

    /// True if anything was written to the block from an instant on, to another one or to now, or
    /// if it lay in an open region whose bits are gone.
    pub fn may_have_changed(&self, since: u32, until: Option<u32>, block: u64) -> bool {
        let (from, to) = (&self.snapshots[&since], until.map(|epoch| &self.snapshots[&epoch]));
        let mut excess = self.excess.range(since..until.unwrap_or(u32::MAX));
        excess.any(|(_, blocks)| blocks.contains(block))
            || self.cells_of(block).any(|c| {
                let last = to.map_or(self.cells[c].last_issued(), |to| to.high[c]);
                last > from.low[c]
            })
    }

    /// What was written in this region is known to nobody any more.
    pub fn lose_bits(&mut self, epoch: u32, region: Extent) {
        let known = self.excess.entry(epoch).or_default();
        *known = known.union(&ExtentSet::from_extent(region));
    }

    /// The same where no bits outlive the process: of every region that may be open, in which
    /// something was written since the last instant that anybody asks for.
    pub fn lose_all_bits(&mut self) {
        let Some(&epoch) = self.snapshots.keys().next_back() else { return };
        let span = region_blocks(4096);
        let written = |block: &u64| self.may_have_changed(epoch, None, *block);
        let written: Vec<u64> = (0..self.block_count()).filter(written).collect();
        for number in written.into_iter().map(|block| block / span) {
            self.lose_bits(epoch, Extent::new(number * span, (number + 1) * span));
        }
    }

    pub fn forget_if_gone(&mut self, epoch: u32) {
        let is_gone =
            self.snapshots.get(&epoch).is_some_and(|s| s.is_deleted && s.bookmark.is_none());
        if is_gone {
            self.snapshots.remove(&epoch);
        }
    }
}

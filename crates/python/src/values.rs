//! Frozen records as Python sees them, and extents: bytes there, blocks here.

use crate::error::raise;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::collections::BTreeMap;
use stillblock_core::epochs::Epoch as Epochal;
use stillblock_core::export::{STATE_HOLE, STATE_ZERO, StatusExtent};
use stillblock_core::extent::{ExtentSet, round_out};
use stillblock_core::journal::OriginIdentity;
use stillblock_core::volume as core;
use stillblock_core::volume::inspect;

/// `extents`: neither of the snapshot's selection nor written to a clone since.
const NOT_SELECTED: u32 = 4;
/// `extents`: its content is lost.
const LOST: u32 = 8;

/// Half-open byte ranges.
pub type Ranges = Vec<(u64, u64)>;

/// Blocks touched by the ranges, clipped to the disk.
pub fn to_blocks(ranges: &[(u64, u64)], block_size: u64, size_bytes: u64) -> PyResult<ExtentSet> {
    let mut extents = Vec::with_capacity(ranges.len());
    for &(start, end) in ranges {
        if start > end || end > size_bytes {
            let message =
                format!("range {start}-{end} is not within the disk of {size_bytes} bytes");
            return Err(raise("usage", message));
        }
        extents.push(round_out(start, end - start, block_size));
    }
    Ok(ExtentSet::from_unsorted(extents))
}

/// The set in bytes, clipped to the disk.
pub fn to_ranges(set: &ExtentSet, block_size: u64, size_bytes: u64) -> Ranges {
    set.iter()
        .map(|extent| (extent.start * block_size, (extent.end * block_size).min(size_bytes)))
        .filter(|(start, end)| start < end)
        .collect()
}

/// The `extents` of a view or a clone from maps of the same range: cut at every border, then joined
/// where flags are alike.
pub fn overlaid(
    selected: &[StatusExtent],
    allocated: &[StatusExtent],
    lost: &[StatusExtent],
) -> Vec<(u64, u64, u32)> {
    let maps = [selected, allocated, lost];
    let mut cuts: Vec<u64> = maps.iter().flat_map(|list| list.iter().map(|e| e.start)).collect();
    cuts.extend(maps.iter().filter_map(|list| list.last().map(|last| last.end)));
    cuts.sort_unstable();
    cuts.dedup();
    let mut found: Vec<(u64, u64, u32)> = Vec::new();
    let mut at = [0_usize; 3];
    for pair in cuts.windows(2) {
        let (start, end) = (pair[0], pair[1]);
        let mut flags = 0;
        for (which, list) in maps.iter().enumerate() {
            while list[at[which]].end <= start {
                at[which] += 1;
            }
            flags |= match (which, list[at[which]].flags) {
                (0, 0) => NOT_SELECTED | STATE_HOLE | STATE_ZERO,
                (1, status) => status,
                (2, 1) => LOST,
                _ => 0,
            };
        }
        match found.last_mut() {
            Some(last) if last.2 == flags => last.1 = end,
            _ => found.push((start, end, flags)),
        }
    }
    found
}

#[pyclass(frozen, get_all)]
pub struct Instant {
    epoch: u32,
    size_bytes: u64,
    created_unix_ns: u64,
    pause_ns: u64,
    in_flight: u64,
    commit_ns: u64,
}

impl From<core::Instant> for Instant {
    fn from(instant: core::Instant) -> Self {
        Self {
            epoch: instant.epoch,
            size_bytes: instant.size_bytes,
            created_unix_ns: instant.created_unix_ns,
            pause_ns: core::nanoseconds(instant.pause),
            in_flight: instant.in_flight,
            commit_ns: core::nanoseconds(instant.commit),
        }
    }
}

#[pyclass(frozen, get_all)]
#[allow(clippy::struct_field_names)] // an epoch's number is its epoch, in Python too
pub struct Epoch {
    epoch: u32,
    size_bytes: u64,
    created_unix_ns: u64,
    has_snapshot: bool,
    has_bookmark: bool,
    selected_bytes: u64,
    preserved_bytes: u64,
    exclusive_bytes: u64,
    lost: Ranges,
    lost_at_source: Ranges,
    damaged: Ranges,
    damage: String,
    undecided: String,
    accepted: String,
    is_suspect: bool,
    suspect_reason: String,
    in_use: usize,
    meta: Py<PyBytes>,
    bookmark_meta: Py<PyBytes>,
}

impl Epoch {
    pub fn new(py: Python<'_>, info: core::EpochInfo, block_size: u64) -> Self {
        let state = info.state;
        let bookmark_meta = state.bookmark.as_ref().map_or(&[][..], |b| &b.meta);
        Self {
            epoch: info.epoch,
            size_bytes: state.origin_bytes,
            created_unix_ns: state.created_unix_ns,
            has_snapshot: state.has_snapshot(),
            has_bookmark: state.bookmark.is_some(),
            selected_bytes: (info.selected_blocks * block_size).min(state.origin_bytes),
            preserved_bytes: info.preserved_blocks * block_size,
            exclusive_bytes: info.exclusive_blocks * block_size,
            lost: to_ranges(&info.lost, block_size, state.origin_bytes),
            lost_at_source: to_ranges(&info.lost_at_source, block_size, state.origin_bytes),
            damaged: to_ranges(&info.damaged, block_size, state.origin_bytes),
            is_suspect: !state.suspect.is_empty() || !state.losses.is_empty(),
            in_use: state.pins,
            meta: PyBytes::new(py, &state.meta).unbind(),
            bookmark_meta: PyBytes::new(py, bookmark_meta).unbind(),
            // What is gone for good says more than a doubt.
            suspect_reason: if state.losses.is_empty() { state.suspect } else { state.losses },
            damage: state.damage,
            undecided: state.undecided,
            accepted: state.accepted,
        }
    }
}

#[pyclass(frozen, get_all)]
pub struct RestoreStatus {
    source_epoch: u32,
    safety_epoch: u32,
    total_bytes: u64,
    done_bytes: u64,
}

impl From<core::RestoreStatus> for RestoreStatus {
    fn from(status: core::RestoreStatus) -> Self {
        Self {
            source_epoch: status.source_epoch,
            safety_epoch: status.safety_epoch,
            total_bytes: status.total_bytes,
            done_bytes: status.done_bytes,
        }
    }
}

#[pyclass(frozen, get_all)]
pub struct Inspection {
    uuid: String,
    origin: String,
    block_size: u64,
    size_bytes: u64,
    meta: Py<PyBytes>,
    left_as: &'static str,
    left_in: &'static str,
    left_slots: usize,
    left_blocks: Ranges,
    differing_blocks: Ranges,
    alive_unix_ns: u64,
    closed: Option<(u64, u64, u64)>,
    found: Option<(u64, u64, u64)>,
    is_touched: bool,
    origin_failure: String,
    is_restoring: bool,
    epochs: Vec<(u32, bool, bool, Py<PyBytes>, String)>,
}

impl Inspection {
    pub fn new(py: Python<'_>, found: inspect::Inspection) -> Self {
        let identity = |i: OriginIdentity| (i.inode, i.bytes, i.modified_unix_ns);
        let ranges = |set| to_ranges(set, found.block_size, found.size_bytes);
        let epoch = |(number, epoch): (u32, Epochal)| {
            let meta = PyBytes::new(py, &epoch.meta).unbind();
            let (has_snapshot, has_bookmark) = (epoch.has_snapshot(), epoch.bookmark.is_some());
            (number, has_snapshot, has_bookmark, meta, epoch.damage)
        };
        Self {
            uuid: format!("{:032x}", u128::from_be_bytes(found.uuid)),
            origin: found.origin.to_string_lossy().into_owned(),
            block_size: found.block_size,
            size_bytes: found.size_bytes,
            meta: PyBytes::new(py, &found.meta).unbind(),
            left_as: match found.left_as {
                inspect::LeftAs::Closed => "closed",
                inspect::LeftAs::Killed => "killed",
                inspect::LeftAs::Interrupted => "interrupted",
            },
            left_in: match found.left_in {
                inspect::LeftIn::Nothing => "nothing",
                inspect::LeftIn::Lost => "lost",
                inspect::LeftIn::Buffer => "buffer",
                inspect::LeftIn::Newer => "newer",
            },
            left_slots: found.writes.slots,
            left_blocks: ranges(&found.writes.blocks),
            differing_blocks: ranges(&found.writes.differing),
            alive_unix_ns: found.writes.alive_unix_ns,
            closed: found.closed.map(identity),
            found: found.found.map(identity),
            is_touched: found.is_touched,
            origin_failure: found.origin_failure,
            is_restoring: found.is_restoring,
            epochs: found.epochs.into_iter().map(epoch).collect(),
        }
    }
}

#[pyclass(frozen, get_all)]
pub struct StoreUsage {
    on_full: &'static str,
    limit_bytes: u64,
    used_bytes: u64,
    capacity_bytes: u64,
    is_full: bool,
    held_writes: u64,
    failure: String,
}

impl StoreUsage {
    pub fn new(usage: core::StoreUsage, on_full: &'static str) -> Self {
        Self {
            on_full,
            limit_bytes: usage.policy.limit_bytes,
            used_bytes: usage.used_bytes,
            capacity_bytes: usage.capacity_bytes,
            is_full: usage.is_full,
            held_writes: usage.held_writes,
            failure: usage.failure,
        }
    }
}

#[pyclass(frozen)]
pub struct Statistics(pub BTreeMap<&'static str, u64>);

#[pymethods]
impl Statistics {
    fn as_dict(&self) -> BTreeMap<&'static str, u64> {
        self.0.clone()
    }
}

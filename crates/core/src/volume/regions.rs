//! Changes of tracked-only blocks: one record opens a region, then writes go straight.
//!
//! A block that somebody tracks and no snapshot needs takes a slot at its first write, like any
//! other. The committer then records not the block but the region around it; once that is durable
//! (P5) writes to its other blocks only set a bit. What was written becomes CHANGED records when the
//! region is closed: at an instant, at a stop, when it has rested. See ADR 10.

use super::{Committer, State, Volume};
use crate::buffer::LeftRegion;
use crate::error::Result;
use crate::extent::{Extent, ExtentSet};
use crate::log::format::{BATCH_BLOCKS_MAX, Kind};
use crate::regions::runs_of;
use crate::sabotage::{Rule, is_broken};
use crate::sync::Clock;
use std::time::Duration;

/// A region in which nothing was written for the first time for so long is closed: a power cut makes
/// it no larger then. Often enough to matter, seldom enough that a region in use stays open. In the
/// simulation programs are short.
pub(super) const REST: Duration = Duration::from_millis(if IS_SIMULATED { 50 } else { 60_000 });
/// The same while there is no place for another one.
const REST_CROWDED: Duration = Duration::from_millis(if IS_SIMULATED { 20 } else { 5_000 });
const IS_SIMULATED: bool = cfg!(feature = "simulation");

/// First changes that preserve nothing, as they are recorded.
#[derive(Default)]
pub(super) struct TrackedOnly {
    /// Runs of blocks for which a region is opened.
    pub(super) regions: Vec<Extent>,
    /// Blocks that are recorded by themselves.
    pub(super) changed: Vec<u64>,
}

impl State {
    /// A write of these blocks goes to the origin now.
    pub(super) fn begin_straight(&mut self, blocks: Extent) {
        self.in_flight.begin(blocks);
        if !is_broken(Rule::RegionMarkedFirst) {
            self.regions.mark(blocks);
        }
    }

    /// The block may be written without anything being preserved.
    fn is_free(&self, block: u64) -> bool {
        !self.pending.get(block) && !self.is_restoring(block)
    }

    /// The blocks around one of which nothing need be preserved, in its region. Settled ones do no
    /// harm: they have changed already, or nobody asks.
    fn run_around(&self, block: u64) -> Extent {
        let region = self.regions.extent(self.regions.number(block));
        let before = (region.start..block).rev().find(|&b| !self.is_free(b));
        let after = (block + 1..region.end).find(|&b| !self.is_free(b));
        Extent::new(before.map_or(region.start, |b| b + 1), after.unwrap_or(region.end))
    }
}

impl Volume {
    /// Divide tracked-only blocks, ascending, of which a batch is to tell: by region where there is
    /// a place for the bits.
    pub(super) fn by_region(
        &self,
        committer: &Committer,
        blocks: impl Iterator<Item = u64>,
        is_instant: bool,
    ) -> TrackedOnly {
        let mut told = TrackedOnly::default();
        // At an instant regions are closed, not opened.
        let is_barred = is_instant || committer.barred_regions == Some(committer.epoch);
        let takes_regions = !is_barred && committer.log.takes_regions();
        let mut state = self.state.lock();
        for block in blocks {
            if told.regions.last().is_some_and(|run| run.contains(block)) {
                continue;
            }
            let number = state.regions.number(block);
            let has_place = takes_regions
                && state.is_free(block)
                && state.regions.reserve(number, committer.epoch);
            if has_place {
                let run = state.run_around(block);
                told.regions.push(run);
            } else {
                told.changed.push(block);
            }
        }
        told
    }

    /// Blocks whose REGION record is durable may be written from now on.
    pub(super) fn cover(&self, runs: &[Extent]) {
        let mut state = self.state.lock();
        for &run in runs {
            let unsettled: Vec<Extent> = state.unsettled.set_within(run).collect();
            for part in unsettled {
                state.regions.cover(part);
            }
            state.unsettled.assign(run, false);
        }
    }

    /// Record what was written in regions, and open them no more.
    pub(super) fn close_regions(&self, committer: &mut Committer) -> Result<()> {
        let numbers = self.state.lock().regions.numbers();
        self.close_some(committer, &numbers, false)
    }

    /// Record what was written in the regions of the epoch that ended.
    pub(super) fn record_ended(&self, committer: &mut Committer) -> Result<()> {
        let numbers = self.state.lock().regions.ended_numbers();
        self.close_some(committer, &numbers, true)
    }

    /// Close what has rested; to be called now and then.
    pub(super) fn rest_regions(&self, committer: &mut Committer) -> Result<()> {
        let idle = {
            let mut state = self.state.lock();
            if state.is_store_short() {
                // What is left of it is for what must be said.
                return Ok(());
            }
            let rest = if state.regions.is_crowded() { REST_CROWDED } else { REST };
            if committer.regions_looked.elapsed() < rest {
                return Ok(());
            }
            state.regions.take_idle()
        };
        committer.regions_looked = Clock::now();
        self.close_some(committer, &idle, false)
    }

    fn close_some(
        &self,
        committer: &mut Committer,
        numbers: &[u64],
        has_ended: bool,
    ) -> Result<()> {
        let mut rest = numbers;
        while !rest.is_empty() {
            let (runs, ends, later) = self.uncover_some(rest, has_ended);
            let (closed, open) = rest.split_at(rest.len() - later);
            // Nobody wants to know where no epoch is open.
            if committer.log.is_open() {
                committer.batch.begin(committer.epoch, runs.len() + ends.len());
                for &run in &runs {
                    committer.batch.note(Kind::Changed, run);
                }
                for &end in &ends {
                    committer.batch.note(Kind::RegionEnd, end);
                }
                self.record(committer)?;
            }
            self.state.lock().regions.close(closed, has_ended);
            rest = open;
        }
        Ok(())
    }

    /// What one batch tells of regions: runs that were written, and the regions; and how many
    /// regions are left. From here on nothing more is written in these without a record.
    fn uncover_some(&self, numbers: &[u64], has_ended: bool) -> (Vec<Extent>, Vec<Extent>, usize) {
        let (mut runs, mut ends) = (Vec::new(), Vec::new());
        let mut state = self.state.lock();
        for (at, &number) in numbers.iter().enumerate() {
            if !has_ended {
                for run in state.regions.uncover_region(number) {
                    state.unsettled.assign(run, true);
                }
            }
            let written = state.regions.written_in(number, has_ended);
            if at > 0 && runs.len() + ends.len() + written.len() >= BATCH_BLOCKS_MAX {
                return (runs, ends, numbers.len() - at);
            }
            if !(has_ended && is_broken(Rule::RegionsKeptAtInstant)) {
                runs.extend(written);
            }
            ends.push(state.regions.extent(number));
        }
        (runs, ends, 0)
    }

    /// What a process before left of regions: `open` are blocks that may have changed without a
    /// record; `left` is what its memory says was written, if that outlived it. Where nothing is
    /// known all of them count as changed. If the store does not take that it stays so: the volume
    /// opens all the same (P1).
    pub(super) fn settle_left(
        &self,
        committer: &mut Committer,
        open: &ExtentSet,
        left: &[LeftRegion],
    ) {
        let has_live = self.epochs.read().first().is_some();
        if open.is_empty() || !has_live || !committer.log.is_open() {
            return;
        }
        let epoch = committer.epoch;
        let left: Vec<&LeftRegion> = left.iter().filter(|region| region.epoch == epoch).collect();
        let known = ExtentSet::from_unsorted(left.iter().map(|r| r.blocks).collect());
        let written = left.iter().flat_map(|r| runs_of((r.blocks.start, r.bits)));
        let written = ExtentSet::from_unsorted(written.collect());
        let mut changed = open.difference(&known).union(&open.intersection(&written));
        if is_broken(Rule::RegionsWholeAfterCut) {
            changed = open.intersection(&written);
        }
        let changed = changed.as_slice().iter().map(|&run| (Kind::Changed, run));
        let ends = open.as_slice().iter().map(|&run| (Kind::RegionEnd, run));
        let told: Vec<(Kind, Extent)> = changed.chain(ends).collect();
        for group in told.chunks(BATCH_BLOCKS_MAX) {
            committer.batch.begin(epoch, group.len());
            for &(kind, run) in group {
                committer.batch.note(kind, run);
            }
            if self.record(committer).is_err() {
                // Bits of this process would not tell of what was written before it.
                committer.barred_regions = Some(epoch);
                let mut index = self.index.write();
                for run in open.iter() {
                    index.insert_changed(epoch, run);
                }
                return;
            }
        }
    }
}

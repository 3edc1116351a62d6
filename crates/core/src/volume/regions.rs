//! Changes of tracked-only blocks: one record opens a region, then writes go straight.
//!
//! A block that somebody tracks and no snapshot needs takes a slot at its first write, like any
//! other. The committer then records not the block but the region around it; once that is durable
//! (P5) writes to its other blocks only set a bit. What was written becomes CHANGED records when the
//! region is closed: at an instant, at a stop, when it has rested. See ADR 10.

use super::{Committer, State, Volume};
use crate::buffer::LeftRegion;
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::log::format::{BATCH_BLOCKS_MAX, Kind, PAGE};
use crate::log::writer::LogWriter;
use crate::regions::{Written, runs_of};
use crate::sabotage::{Rule, is_broken};
use crate::sync::{Clock, MutexGuard};
use std::time::Duration;

/// Descriptors that closing a region takes at most: of 256 blocks every other was written; its end.
const RUNS_OF_REGION_MAX: usize = 129;

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

    /// Record what was written in every region, and open them no more. What the log does not take
    /// stays open there: all of it counts as changed at the next opening.
    pub(super) fn close_regions(&self, committer: &mut Committer) {
        let numbers = {
            let state = self.state.lock();
            if state.is_store_short() { Vec::new() } else { state.regions.numbers() }
        };
        self.close_each(committer, &numbers, false);
    }

    /// Close these, batch by batch; tells those that the log takes nothing of.
    fn close_each<'a>(
        &self,
        committer: &mut Committer,
        numbers: &'a [u64],
        has_ended: bool,
    ) -> &'a [u64] {
        let mut rest = numbers;
        while !rest.is_empty() {
            match self.close_batch(committer, rest, has_ended) {
                Ok(closed) if closed > 0 => rest = &rest[closed..],
                Ok(_) | Err(_) => break,
            }
        }
        rest
    }

    /// As [`Self::close_regions`], while others get the role between batches, until what is open
    /// takes no more than so many descriptors.
    pub(super) fn close_regions_in_turns(
        &self,
        committer: &mut MutexGuard<'_, Committer>,
        descriptors_max: usize,
    ) -> Result<()> {
        let numbers = self.state.lock().regions.numbers();
        let mut rest = &numbers[..];
        while !rest.is_empty() {
            {
                let state = self.state.lock();
                if state.is_closed {
                    return Err(Error::Closed);
                }
                let is_enough = state.regions.descriptor_count() <= descriptors_max;
                if is_enough || state.is_store_short() {
                    return Ok(());
                }
            }
            match self.close_batch(committer, rest, false)? {
                0 => return Ok(()),
                closed => rest = &rest[closed..],
            }
            MutexGuard::bump(committer);
        }
        if self.state.lock().is_closed { Err(Error::Closed) } else { Ok(()) }
    }

    /// Leave an instant little to record. What is not closed now is closed then, or counts whole
    /// later.
    pub(super) fn close_regions_first(
        &self,
        committer: &mut MutexGuard<'_, Committer>,
    ) -> Result<()> {
        match self.close_regions_in_turns(committer, BATCH_BLOCKS_MAX) {
            Err(Error::Closed) => Err(Error::Closed),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Record what was written in the regions of the epoch that ended; tells those of which the log
    /// takes nothing.
    pub(super) fn record_ended(&self, committer: &mut Committer) -> Vec<u64> {
        let numbers = self.state.lock().regions.ended_numbers();
        self.close_each(committer, &numbers, true).to_vec()
    }

    /// The epoch ended for good, and its log took nothing of these regions: the index has what was
    /// written in them. In the log they stay open, so all of them counts at the next opening.
    pub(super) fn keep_ended(&self, epoch: u32, numbers: &[u64]) {
        let written = |state: &State| -> Vec<Extent> {
            numbers.iter().flat_map(|&number| state.regions.written_in(number, true)).collect()
        };
        let runs = written(&self.state.lock());
        {
            let mut index = self.index.write();
            for run in runs {
                index.insert_changed(epoch, run);
            }
        }
        // Only now: who looks for changes looks here first (P5).
        self.state.lock().regions.close(numbers, true);
    }

    /// Close what has rested, a batch at a time; to be called now and then.
    pub(super) fn rest_regions(&self, committer: &mut Committer) -> Result<()> {
        let mut resting = std::mem::take(&mut committer.resting_regions);
        {
            let mut state = self.state.lock();
            if state.is_store_short() {
                // What is left of it is for what must be said.
                return Ok(());
            }
            if resting.is_empty() {
                let rest = if state.regions.is_crowded() { REST_CROWDED } else { REST };
                if committer.regions_looked.elapsed() < rest {
                    return Ok(());
                }
                resting = state.regions.take_idle();
                committer.regions_looked = Clock::now();
            } else {
                resting.retain(|&number| state.regions.is_idle(number));
            }
        }
        if resting.is_empty() {
            return Ok(());
        }
        let closed = self.close_batch(committer, &resting, false)?;
        if closed > 0 {
            committer.resting_regions = resting.split_off(closed);
        }
        Ok(())
    }

    /// Close the first of these regions, as many as a batch tells of; tells how many. 0 if the store
    /// has no room for it: they stay open. Nothing is ever lost for it (P2).
    fn close_batch(
        &self,
        committer: &mut Committer,
        numbers: &[u64],
        has_ended: bool,
    ) -> Result<usize> {
        if committer.to_undo.is_some() {
            self.undo_instant(committer)?;
        }
        let closing = self.uncover_some(numbers, has_ended);
        // Nobody wants to know where no epoch is open.
        if committer.log.is_open() && !closing.ends.is_empty() {
            let epoch = committer.epoch;
            note_closing(committer, epoch, &closing.runs, &closing.ends);
            let pages = committer.batch.total_bytes() / PAGE;
            if !self.has_room_to_close(committer, pages, has_ended) {
                self.cover(&closing.uncovered);
                return Ok(0);
            }
            if let Err(error) = self.append_closing(committer, epoch) {
                // Covered they must not be again: after a kill the log may show them ended. The next
                // write to one opens its region once more.
                self.top_up(committer);
                return Err(Error::store("closing regions")(error));
            }
        }
        self.state.lock().regions.close(&numbers[..closing.count], has_ended);
        if !has_ended {
            self.top_up(committer);
        }
        Ok(closing.count)
    }

    /// Append what `note_closing` made, without a second place: where it fails the region counts
    /// whole.
    fn append_closing(&self, committer: &mut Committer, epoch: u32) -> std::io::Result<()> {
        let Committer { log, batch, .. } = &mut *committer;
        let (segment, page) = log.append(batch)?;
        committer.segments.insert(segment, epoch);
        self.publish(committer, segment, page);
        Ok(())
    }

    /// Have room for so many pages beside what slots have taken and what is kept for marks. An epoch
    /// that ended takes no more of either.
    fn has_room_to_close(&self, committer: &mut Committer, pages: u64, has_ended: bool) -> bool {
        if has_ended {
            return committer.log.has_room(pages, true)
                || self.try_extend(committer, pages, pages).is_ok();
        }
        for is_last in [false, true] {
            let wanted = match self.take_ahead(pages) {
                Ok(()) => return true,
                Err(wanted) => wanted.min(LogWriter::ROOM_PAGES_MAX),
            };
            if is_last || self.try_extend(committer, wanted, wanted).is_err() {
                return false;
            }
            self.publish_room(committer, None);
        }
        false
    }

    /// What one batch tells of regions. From here on nothing more is written in these without a
    /// record.
    fn uncover_some(&self, numbers: &[u64], has_ended: bool) -> Closing {
        let mut closing = Closing::default();
        let mut state = self.state.lock();
        for &number in numbers {
            if !state.regions.is_open(number, has_ended) {
                closing.count += 1;
                continue;
            }
            let written = state.regions.written_in(number, has_ended);
            let descriptors = closing.runs.len() + closing.ends.len();
            if descriptors > 0 && descriptors + written.len() >= BATCH_BLOCKS_MAX {
                break;
            }
            closing.count += 1;
            if !has_ended {
                for run in state.regions.uncover_region(number) {
                    state.unsettled.assign(run, true);
                    closing.uncovered.push(run);
                }
            }
            if !(has_ended && is_broken(Rule::RegionsKeptAtInstant)) {
                closing.runs.extend(written);
            }
            closing.ends.push(state.regions.extent(number));
        }
        closing
    }

    /// What a process before left of regions: `open` are blocks that may have changed without a
    /// record; `left` is what its memory says was written, if that outlived it, with `slots` that
    /// are still to be committed. Where nothing is known all of them count as changed. If the log
    /// does not take that it stays so: nothing is lost for it (P2), and the volume opens all the
    /// same (P1).
    pub(super) fn settle_left(
        &self,
        committer: &mut Committer,
        open: &ExtentSet,
        left: &[LeftRegion],
        slots: usize,
    ) {
        let has_live = self.epochs.read().first().is_some();
        if open.is_empty() || !has_live || !committer.log.is_open() {
            return;
        }
        let epoch = committer.epoch;
        let known = left_of(epoch, left);
        let (mut runs, mut ends) = (Vec::new(), Vec::new());
        let mut parts = parts_of(open, &known).peekable();
        while let Some((part, bits)) = parts.next() {
            match bits {
                Some(written) => {
                    for run in runs_of(written).map(|run| run.intersection(part)) {
                        push_run(&mut runs, run);
                    }
                }
                None if is_broken(Rule::RegionsWholeAfterCut) => {}
                None => push_run(&mut runs, part),
            }
            push_run(&mut ends, part);
            let is_full = runs.len() + ends.len() + RUNS_OF_REGION_MAX >= BATCH_BLOCKS_MAX;
            if parts.peek().is_some() && !is_full {
                continue;
            }
            if self.record_left(committer, epoch, &runs, &ends, slots).is_err() {
                // Bits of this process would not tell of what was written before it.
                committer.barred_regions = Some(epoch);
                let first = ends[0].start;
                let mut index = self.index.write();
                for run in open.within(Extent::new(first, u64::MAX)) {
                    index.insert_changed(epoch, run);
                }
                return;
            }
            runs.clear();
            ends.clear();
        }
    }

    /// Close regions that a process before left open, beside room for the slots it left.
    fn record_left(
        &self,
        committer: &mut Committer,
        epoch: u32,
        runs: &[Extent],
        ends: &[Extent],
        slots: usize,
    ) -> std::io::Result<()> {
        note_closing(committer, epoch, runs, ends);
        let pages = committer.batch.total_bytes() / PAGE;
        let room = (pages + self.pages_for(slots)).min(LogWriter::ROOM_PAGES_MAX);
        self.try_extend(committer, room, room)?;
        self.append_closing(committer, epoch)
    }
}

/// Regions that one batch closes.
#[derive(Default)]
struct Closing {
    /// What was written in them.
    runs: Vec<Extent>,
    /// The regions.
    ends: Vec<Extent>,
    /// Blocks of them that were covered.
    uncovered: Vec<Extent>,
    /// Numbers that were looked at.
    count: usize,
}

/// All that changed in a region is in the same batch as its end.
fn note_closing(committer: &mut Committer, epoch: u32, runs: &[Extent], ends: &[Extent]) {
    committer.batch.begin(epoch, runs.len() + ends.len());
    for &run in runs {
        committer.batch.note(Kind::Changed, run);
    }
    for &end in ends {
        committer.batch.note(Kind::RegionEnd, end);
    }
}

/// Add a run behind ascending ones.
fn push_run(runs: &mut Vec<Extent>, run: Extent) {
    match runs.last_mut() {
        _ if run.is_empty() => {}
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

/// What was written in the regions of one epoch, ascending. Parts of a region that overlap another
/// prove the memory wrong: then nothing is known.
fn left_of(epoch: u32, left: &[LeftRegion]) -> Vec<LeftRegion> {
    let mut of_epoch: Vec<&LeftRegion> = left.iter().filter(|r| r.epoch == epoch).collect();
    of_epoch.sort_unstable_by_key(|region| region.blocks.start);
    let mut known: Vec<LeftRegion> = Vec::with_capacity(of_epoch.len());
    for region in of_epoch {
        match known.last_mut() {
            // Killed while one was put together from two.
            Some(last) if last.blocks == region.blocks => {
                for (word, more) in last.bits.iter_mut().zip(region.bits) {
                    *word |= more;
                }
            }
            Some(last) if last.blocks.end > region.blocks.start => return Vec::new(),
            _ => known.push(region.clone()),
        }
    }
    known
}

/// Open blocks by region, ascending, with what was written there where it is known.
fn parts_of<'a>(
    open: &'a ExtentSet,
    known: &'a [LeftRegion],
) -> impl Iterator<Item = (Extent, Option<Written>)> + 'a {
    open.iter().flat_map(move |extent| {
        let mut at = extent.start;
        std::iter::from_fn(move || {
            if at >= extent.end {
                return None;
            }
            let next = known.partition_point(|region| region.blocks.end <= at);
            let (end, written) = match known.get(next) {
                Some(region) if region.blocks.start <= at => {
                    (region.blocks.end, Some((region.blocks.start, region.bits)))
                }
                Some(region) => (region.blocks.start, None),
                None => (extent.end, None),
            };
            let part = Extent::new(at, end.min(extent.end));
            at = part.end;
            Some((part, written))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(epoch: u32, blocks: Extent, first_word: u64) -> LeftRegion {
        LeftRegion { epoch, blocks, bits: [first_word, 0, 0, 0] }
    }

    #[test]
    fn open_blocks_are_told_region_by_region_and_those_nobody_knows_apart() {
        let (first, second) = (Extent::new(0, 256), Extent::new(512, 768));
        let all = [left(7, second, 1), left(6, first, 2), left(7, first, 4), left(7, first, 8)];
        let known = left_of(7, &all);
        let open: ExtentSet = [Extent::new(10, 600), Extent::new(700, 900)].into_iter().collect();
        let parts: Vec<_> = parts_of(&open, &known).collect();
        let of_first = Some((0, [4 | 8, 0, 0, 0]));
        let of_second = Some((512, [1, 0, 0, 0]));
        let expected = vec![
            (Extent::new(10, 256), of_first),
            (Extent::new(256, 512), None),
            (Extent::new(512, 600), of_second),
            (Extent::new(700, 768), of_second),
            (Extent::new(768, 900), None),
        ];
        assert_eq!(parts, expected);
    }

    #[test]
    fn of_memory_with_regions_that_overlap_nothing_is_believed() {
        let all = [left(7, Extent::new(0, 256), 1), left(7, Extent::new(128, 384), 1)];
        assert!(left_of(7, &all).is_empty());
    }
}

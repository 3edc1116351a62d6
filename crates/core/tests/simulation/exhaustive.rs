//! All programs of up to three operations on a disk of four blocks, stopped at every step.
//!
//! Most faults of storage systems that testers found were found by programs as short as these
//! (`CrashMonkey` and `Ace`, OSDI 2018).

use crate::check::{
    Stops, Tally, Way, bytes, cells, check_kept_once, open, read_snapshot, settled_as,
};
use crate::dice::Dice;
use crate::machine::Machine;
use crate::model::{Model, Restore};
use crate::program::new_machine;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use stillblock_core::extent::{Extent, ExtentSet};
use stillblock_core::volume::{RestoreRequest, SnapshotRequest, Volume};

/// Three blocks and a half.
const SIZE_BYTES: u64 = 3 * 4096 + 2048;
const LONG: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A whole block.
    Whole,
    /// Parts of sectors of two blocks.
    Partial,
    /// The end of the disk, a partial block.
    Tail,
    Fua,
    Zero,
    Trim,
    Flush,
    Snapshot,
    /// Of the first two blocks.
    SnapshotPart,
    Delete,
    Narrow,
    Restore,
    /// Bookmark the last snapshot and delete it.
    Bookmark,
    Reopen,
}

pub const STEPS: &[Step] = &[
    Step::Whole,
    Step::Partial,
    Step::Tail,
    Step::Fua,
    Step::Zero,
    Step::Trim,
    Step::Flush,
    Step::Snapshot,
    Step::SnapshotPart,
    Step::Delete,
    Step::Narrow,
    Step::Restore,
    Step::Bookmark,
    Step::Reopen,
];

struct Run {
    machine: Arc<Machine>,
    volume: Arc<Volume>,
    way: Way,
}

fn told(step: &'static str) -> impl FnOnce(stillblock_core::error::Error) -> String {
    move |error| format!("{step} fails, and no fault: {error}")
}

impl Run {
    fn write(&self, range: Range<usize>, is_zero: bool, fua: bool) -> Result<(), String> {
        let (value, size) = {
            let mut model = self.machine.model();
            (
                model.begin_write(range.clone(), is_zero).ok_or("nobody else writes")?,
                model.size_bytes,
            )
        };
        let start = (range.start * 256) as u64;
        let done = if is_zero {
            let length = ((range.end * 256) as u64).min(size) - start;
            self.volume.write_zeroes(start, length, true, fua)
        } else {
            self.volume.write(start, &bytes(range.clone().map(|_| value)), fua)
        };
        done.map_err(told("a write"))?;
        self.machine.model().end_write(range, fua);
        Ok(())
    }

    fn trim(&self) -> Result<(), String> {
        let range = 0..16;
        self.machine.model().begin_write(range.clone(), true).ok_or("nobody else writes")?;
        let mut content = vec![0; 4096];
        let trimmed = self.volume.trim(0, 4096, false);
        let read = trimmed.and_then(|()| self.volume.read(0, &mut content));
        read.map_err(told("a discard"))?;
        self.machine.model().end_trim(range, &cells(&content)?);
        Ok(())
    }

    fn snapshot(&self, selection: ExtentSet) -> Result<(), String> {
        self.machine.model().begin_snapshot(selection.clone());
        let request = SnapshotRequest {
            selection,
            low: ExtentSet::new(),
            meta: Vec::new(),
            pause_limit: LONG,
        };
        let taken = self.volume.snapshot(request).map_err(told("a snapshot"))?;
        let mut model = self.machine.model();
        let snapshot = model.taken().ok_or("begun")?;
        model.add(taken.epoch, snapshot)
    }

    fn first(&self) -> Option<u32> {
        let model = self.machine.model();
        model.snapshots.iter().find(|(_, s)| s.is_certain()).map(|(&epoch, _)| epoch)
    }

    fn last(&self) -> Option<u32> {
        let model = self.machine.model();
        model.snapshots.iter().rfind(|(_, s)| s.is_certain()).map(|(&epoch, _)| epoch)
    }

    fn with(&self, epoch: u32, change: impl FnOnce(&mut crate::model::Snapshot)) {
        let mut model = self.machine.model();
        change(model.snapshots.get_mut(&epoch).expect("certain"));
        model.forget_if_gone(epoch);
    }

    fn delete(&self, epoch: u32) -> Result<(), String> {
        self.with(epoch, |s| s.is_deleting = true);
        self.volume.wait_restored(LONG).map_err(told("a restore"))?;
        self.volume.delete_snapshot(epoch, false).map_err(told("a deletion"))?;
        self.with(epoch, |s| (s.is_deleting, s.is_deleted) = (false, true));
        Ok(())
    }

    fn restore(&self, epoch: u32) -> Result<(), String> {
        let model = self.machine.model().clone();
        let selection = &model.snapshots[&epoch].selection;
        let found = read_snapshot(&self.volume, epoch, &model, selection, false)?;
        let content = {
            let mut model = self.machine.model();
            model.check_snapshot(epoch, &found)?;
            model.pin(epoch, &found);
            let content = model.snapshots[&epoch].pinned.clone().ok_or("just pinned")?;
            let (blocks, safety) = (selection.clone(), model.all_blocks());
            model.restoring = Some(Restore { blocks, content: content.clone(), safety });
            content
        };
        let started = self.volume.restore(&RestoreRequest {
            source_epoch: epoch,
            request: model.all_blocks(),
            safety_selection: model.all_blocks(),
            safety_low: ExtentSet::new(),
            meta: Vec::new(),
            pause_limit: LONG,
        });
        let status = started.map_err(told("a restore"))?;
        drop(content);
        let mut model = self.machine.model();
        let restore = model.restoring.take().ok_or("begun")?;
        model.restored(&restore, status.safety_epoch)
    }

    fn reopen(&mut self) -> Result<(), String> {
        self.volume.close().map_err(told("closing"))?;
        let acked = self.machine.model().acked();
        self.machine.model().end_flush(&acked);
        self.volume = open(&self.machine, self.way)?;
        Ok(())
    }

    fn run(&mut self, step: Step) -> Result<(), String> {
        let part = || ExtentSet::from_extent(Extent::new(0, 2));
        match step {
            Step::Whole => self.write(0..16, false, false),
            Step::Partial => self.write(13..19, false, false),
            Step::Tail => self.write(50..56, false, false),
            Step::Fua => self.write(8..34, false, true),
            Step::Zero => self.write(16..56, true, false),
            Step::Trim => self.trim(),
            Step::Flush => {
                let acked = self.machine.model().acked();
                self.volume.flush().map_err(told("a flush"))?;
                self.machine.model().end_flush(&acked);
                Ok(())
            }
            Step::Snapshot => {
                let all = Model::all_blocks(&self.machine.model());
                self.snapshot(all)
            }
            Step::SnapshotPart => self.snapshot(part()),
            Step::Delete => self.first().map_or(Ok(()), |epoch| self.delete(epoch)),
            Step::Narrow => {
                let Some(epoch) = self.last() else { return Ok(()) };
                self.volume.wait_restored(LONG).map_err(told("a restore"))?;
                let narrowed = |s: &crate::model::Snapshot| s.selection.intersection(&part());
                self.with(epoch, |s| s.narrowing = Some(narrowed(s)));
                let mut note = None;
                self.with(epoch, |s| note = s.narrowing.as_ref().map(settled_as));
                self.volume.narrow_with(epoch, &part(), note).map_err(told("narrowing"))?;
                self.with(epoch, |s| s.selection = s.narrowing.take().unwrap_or_default());
                Ok(())
            }
            Step::Restore => self.first().map_or(Ok(()), |epoch| self.restore(epoch)),
            Step::Bookmark => {
                let Some(epoch) = self.last() else { return Ok(()) };
                self.with(epoch, |s| s.is_bookmarking = true);
                self.volume.bookmark(epoch, Vec::new()).map_err(told("a bookmark"))?;
                self.with(epoch, |s| {
                    (s.bookmark, s.is_bookmarking) = (Some(s.selection.clone()), false);
                });
                self.delete(epoch)
            }
            Step::Reopen => self.reopen(),
        }
    }
}

/// Run one program. Every step of it is to be looked at.
pub fn run(program: &[Step]) -> Result<Stops, String> {
    let mut dice = Dice::new(program.iter().fold(1, |sum, &step| sum * 31 + step as u64));
    let way = Way { is_write_through: false, has_background: false, has_faults: false };
    let machine = new_machine(SIZE_BYTES, 6, dice.fork())?;
    let volume = open(&machine, way)?;
    let mut run = Run { machine, volume, way };
    // Most of what can go wrong needs a snapshot to go wrong with.
    let all = Model::all_blocks(&run.machine.model());
    run.snapshot(all)?;
    run.machine.watch();
    for &step in program {
        run.run(step)?;
    }
    run.volume.wait_restored(LONG).map_err(told("a restore"))?;
    run.volume.close().map_err(told("closing"))?;
    let acked = run.machine.model().acked();
    run.machine.model().end_flush(&acked);
    let mut stops = run.machine.take_stops();
    stops.push(run.machine.stop());
    let again = open(&run.machine, way)?;
    check_kept_once(&run.machine, &again)?;
    again.abandon();
    Ok(Stops { way, all: stops, dice, tally: Tally::default() })
}

/// Every program of up to three steps that begins with this one.
pub fn programs(first: Step) -> Vec<Vec<Step>> {
    let mut all = vec![vec![first]];
    for &second in STEPS {
        all.push(vec![first, second]);
        all.extend(STEPS.iter().map(|&third| vec![first, second, third]));
    }
    all
}

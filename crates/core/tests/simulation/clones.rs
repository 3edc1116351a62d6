//! Clones in the simulation: each is a disk of its own, with a model of its own, whose first content
//! is its snapshot's. What is written to one may be found in no other (P7).

use crate::check::{Stops, Tally, Way, bytes, cells, open};
use crate::dice::Dice;
use crate::machine::{Machine, STORE};
use crate::model::{CELL, Model, UNKNOWN, size};
use crate::program::{Session, look_at, new_machine, pick_range, pick_snapshot, place};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use stillblock_core::clone::view::CloneView;
use stillblock_core::error::{Error, Result as EngineResult};
use stillblock_core::extent::ExtentSet;
use stillblock_core::view::ExcludedReads;
use stillblock_core::volume::{SnapshotRequest, Volume};

/// Values of different disks never meet.
const VALUES_A_CLONE: u32 = 10_000_000;

/// What the clients of one clone did and were told.
#[derive(Clone, Debug)]
pub struct CloneModel {
    pub epoch: u32,
    /// What its snapshot holds, by cell.
    start: Vec<u32>,
    pub disk: Box<Model>,
    pub is_deleting: bool,
    pub is_resetting: bool,
    /// A sync failed: what a later one says of what was written before is worth nothing.
    is_doubtful: bool,
    meta: Vec<u8>,
    /// It is being told this.
    telling: Option<Vec<u8>>,
}

impl CloneModel {
    fn new(epoch: u32, start: Vec<u32>, size_bytes: u64, meta: Vec<u8>) -> Self {
        let disk = Box::new(Model::holding(size_bytes, &start, VALUES_A_CLONE));
        let (is_deleting, is_resetting, is_doubtful) = (false, false, false);
        let telling = None;
        Self { epoch, start, disk, is_deleting, is_resetting, is_doubtful, meta, telling }
    }

    fn reset(&mut self) {
        let values = self.disk.next_value();
        *self.disk = Model::holding(self.disk.size_bytes, &self.start, values);
        (self.is_resetting, self.is_doubtful) = (false, false);
    }
}

/// The content that a clone of a snapshot begins with; none if some of it is not known.
fn start_of(model: &Model, epoch: u32) -> Option<Vec<u32>> {
    let snapshot = &model.snapshots[&epoch];
    let pinned = snapshot.pinned.as_ref()?;
    let mut start = vec![0; model.cell_count()];
    for block in snapshot.selection.iter().flat_map(|e| e.start..e.end) {
        for cell in model.cells_of(block) {
            if pinned[cell] == UNKNOWN {
                return None;
            }
            start[cell] = pinned[cell];
        }
    }
    Some(start)
}

/// Make, reset, drop and use clones.
pub fn cloner(session: &Session, dice: &mut Dice, steps: usize) -> Result<(), String> {
    for _ in 0..steps {
        let is_any = !session.machine.model().clones.is_empty();
        match dice.below(100) {
            0..14 => create(session, dice)?,
            _ if !is_any => create(session, dice)?,
            14..19 => delete(session, dice)?,
            19..24 => reset(session, dice)?,
            24..28 => set_meta(session, dice)?,
            28..64 => write(session, dice)?,
            64..72 => trim(session, dice)?,
            72..82 => read(session, dice)?,
            _ => flush(session, dice)?,
        }
    }
    Ok(())
}

fn create(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let _alone = session.clones_gate.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let picked = {
        let mut model = session.machine.model();
        if model.clones.len() > 3 {
            return Ok(());
        }
        let picked = pick_snapshot(&model, dice);
        model.clone_source = picked;
        picked
    };
    let Some(epoch) = picked else { return Ok(()) };
    let made = create_of(session, epoch, dice);
    session.machine.model().clone_source = None;
    made
}

fn create_of(session: &Session, epoch: u32, dice: &mut Dice) -> Result<(), String> {
    look_at(session, epoch)?;
    let meta = vec![u8::try_from(dice.below(250)).expect("small"); 1 + dice.below(600)];
    {
        let mut model = session.machine.model();
        let Some(start) = start_of(&model, epoch) else { return Ok(()) };
        let clone = CloneModel::new(epoch, start, model.size_bytes, meta.clone());
        model.cloning = Some(clone);
    }
    let made = session.volume.create_clone(epoch, &meta);
    session.machine.tell(|| format!("clone of {epoch}: {made:?}"));
    let done = session.must("making a clone", made)?;
    let mut model = session.machine.model();
    if let Some(number) = done {
        let clone = model.cloning.take().ok_or("begun")?;
        model.clones.insert(number, clone);
    } else {
        // A fault may have come after its name was there.
        let clone = model.cloning.take();
        model.maybe_cloned.extend(clone);
    }
    Ok(())
}

fn pick(model: &Model, dice: &mut Dice) -> Option<u32> {
    let live = model.clones.iter().filter(|(_, c)| !c.is_deleting && !c.is_resetting);
    let live: Vec<u32> = live.map(|(&number, _)| number).collect();
    live.get(dice.below(live.len())).copied()
}

fn with<T>(
    session: &Session,
    number: u32,
    change: impl FnOnce(&mut CloneModel) -> T,
) -> Result<T, String> {
    let mut model = session.machine.model();
    Ok(change(model.clones.get_mut(&number).ok_or("picked")?))
}

fn delete(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let _alone = session.clones_gate.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(number) = pick(&session.machine.model(), dice) else { return Ok(()) };
    with(session, number, |clone| clone.is_deleting = true)?;
    let closed = session.volume.close_clone(number);
    let deleted = closed.and_then(|()| session.volume.delete_clone(number));
    session.machine.tell(|| format!("delete clone {number}: {deleted:?}"));
    if session.must("deleting a clone", deleted)?.is_some() {
        session.machine.model().clones.remove(&number);
    }
    Ok(())
}

fn reset(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let _alone = session.clones_gate.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(number) = pick(&session.machine.model(), dice) else { return Ok(()) };
    with(session, number, |clone| clone.is_resetting = true)?;
    let closed = session.volume.close_clone(number);
    let done = closed.and_then(|()| session.volume.reset_clone(number));
    session.machine.tell(|| format!("reset clone {number}: {done:?}"));
    if session.must("resetting a clone", done)?.is_some() {
        with(session, number, CloneModel::reset)?;
    }
    Ok(())
}

fn set_meta(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let _alone = session.clones_gate.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(number) = pick(&session.machine.model(), dice) else { return Ok(()) };
    let meta = vec![7; 1 + dice.below(1200)];
    with(session, number, |clone| clone.telling = Some(meta.clone()))?;
    let told = session.volume.set_clone_meta(number, meta);
    if session.must("telling a clone", told)?.is_some() {
        with(session, number, |clone| clone.meta = clone.telling.take().unwrap_or_default())?;
    }
    Ok(())
}

/// A clone that nobody removes while it is used.
fn opened(session: &Session, dice: &mut Dice) -> Result<Option<(u32, Arc<CloneView>)>, String> {
    let Some(number) = pick(&session.machine.model(), dice) else { return Ok(None) };
    let clone = session.volume.open_clone(number, ExcludedReads::Zeros);
    Ok(session.must("opening a clone", clone)?.map(|clone| (number, clone)))
}

fn write(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let _shared = session.clones_gate.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some((number, clone)) = opened(session, dice)? else { return Ok(()) };
    let (is_zero, fua) = (dice.chance(20), dice.chance(12));
    let begun = with(session, number, |clone| {
        let range = pick_range(&clone.disk, dice, false);
        let place = place(&clone.disk, &range);
        clone.disk.begin_write(range.clone(), is_zero).map(|value| (range, value, place))
    })?;
    let Some((range, value, (at, length))) = begun else { return Ok(()) };
    let written = if is_zero {
        clone.write_zeroes(at, length, dice.chance(50), fua)
    } else {
        clone.write(at, &bytes(range.clone().map(|_| value)), fua)
    };
    session.machine.tell(|| format!("clone {number}: {range:?} of {value}: {written:?}"));
    let done = session.must("a write to a clone", written)?;
    with(session, number, |clone| {
        if done.is_some() {
            clone.disk.end_write(range, fua && !clone.is_doubtful);
        } else {
            clone.disk.fail_write(range);
            clone.is_doubtful = true;
        }
    })
}

fn trim(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let _shared = session.clones_gate.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some((number, clone)) = opened(session, dice)? else { return Ok(()) };
    let begun = with(session, number, |clone| {
        let range = pick_range(&clone.disk, dice, false);
        let place = place(&clone.disk, &range);
        clone.disk.begin_write(range.clone(), true).map(|_| (range, place))
    })?;
    let Some((range, (at, length))) = begun else { return Ok(()) };
    let mut content = vec![0; size(length)];
    let trimmed = clone.trim(at, length, false);
    let done = session.must("a discard", trimmed.and_then(|()| clone.read(at, &mut content)))?;
    let found = cells(&content)?;
    with(session, number, |clone| match done {
        Some(()) => clone.disk.end_trim(range, &found),
        None => clone.disk.fail_write(range),
    })
}

fn read(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let _shared = session.clones_gate.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some((number, clone)) = opened(session, dice)? else { return Ok(()) };
    let (range, (at, length), acked) = with(session, number, |clone| {
        let range = pick_range(&clone.disk, dice, false);
        (range.clone(), place(&clone.disk, &range), clone.disk.acked())
    })?;
    let mut content = vec![0; size(length)];
    if session.must("reading a clone", clone.read(at, &mut content))?.is_some() {
        let found = cells(&content)?;
        let first = range.start;
        with(session, number, |clone| clone.disk.check_read(first, &acked, &found))??;
    }
    Ok(())
}

fn flush(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let _shared = session.clones_gate.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some((number, clone)) = opened(session, dice)? else { return Ok(()) };
    let acked = with(session, number, |clone| clone.disk.acked())?;
    let flushed = clone.flush();
    session.machine.tell(|| format!("clone {number}: flush {flushed:?}"));
    let done = session.must("flushing a clone", flushed)?;
    with(session, number, |clone| match done {
        Some(()) if !clone.is_doubtful => clone.disk.end_flush(&acked),
        Some(()) => {}
        None => clone.is_doubtful = true,
    })
}

/// The volume was closed: all that was written to clones is durable.
pub fn closed(model: &mut Model, may_fail: bool) {
    for clone in model.clones.values_mut().filter(|_| !may_fail) {
        let acked = clone.disk.acked();
        clone.disk.end_flush(&acked);
    }
}

/// What of a clone can be read, by block: the first cell, and what is there.
fn read_all(
    clone: &CloneView,
    model: &Model,
    may_fail: bool,
) -> Result<Vec<(usize, Vec<u32>)>, String> {
    let mut found = Vec::new();
    for block in 0..model.block_count() {
        let range = model.cells_of(block);
        let start = (range.start * CELL) as u64;
        let mut content = vec![0; size((model.size_bytes - start).min(4096))];
        match clone.read(start, &mut content) {
            Ok(()) => found.push((range.start, cells(&content)?)),
            Err(_) if may_fail => {}
            Err(error) => return Err(format!("P7: clone, block {block}, no fault: {error}")),
        }
    }
    Ok(found)
}

/// After a stop, or a clean start: every clone is there and holds what it must.
pub fn verify(
    volume: &Arc<Volume>,
    model: &mut Model,
    is_cut: bool,
    may_fail: bool,
) -> Result<(), String> {
    let listed = volume.clones().map_err(|e| format!("P10: listing clones: {e}"))?;
    for info in &listed {
        if !model.clones.contains_key(&info.number) {
            let is_it = |c: &CloneModel| info.epoch == Some(c.epoch) && info.meta == c.meta;
            let begun = model.cloning.take_if(|c| is_it(c)).or_else(|| {
                let at = model.maybe_cloned.iter().position(is_it)?;
                Some(model.maybe_cloned.swap_remove(at))
            });
            let clone = begun.ok_or_else(|| format!("P10: clone out of nowhere: {info:?}"))?;
            model.clones.insert(info.number, clone);
        }
    }
    model.cloning = None;
    let numbers: Vec<u32> = model.clones.keys().copied().collect();
    for number in numbers {
        let clone = model.clones.get_mut(&number).expect("listed");
        let Some(info) = listed.iter().find(|info| info.number == number) else {
            if !clone.is_deleting {
                return Err(format!("P6: clone {number} is gone"));
            }
            model.clones.remove(&number);
            continue;
        };
        clone.is_deleting = false;
        if info.meta != clone.meta && clone.telling.as_ref() != Some(&info.meta) {
            return Err(format!("P10: clone {number} is told otherwise"));
        }
        clone.meta.clone_from(&info.meta);
        clone.telling = None;
        let opened = match volume.open_clone(number, ExcludedReads::Zeros) {
            Ok(opened) => opened,
            Err(_) if may_fail => {
                clone.disk.doubt_all();
                continue;
            }
            Err(error) => return Err(format!("P6: clone {number} cannot be opened: {error}")),
        };
        let found = read_all(&opened, &clone.disk, may_fail)?;
        let is_pristine = found.iter().all(|(first, values)| {
            values.iter().enumerate().all(|(at, value)| clone.start[first + at] == *value)
        });
        if clone.is_resetting && is_pristine {
            clone.reset();
        }
        clone.is_resetting = false;
        for (first, values) in &found {
            let right = clone.disk.check_part(*first, values, is_cut);
            right.map_err(|why| format!("P7: clone {number}: {why}"))?;
        }
        clone.disk.doubt_all();
        for (first, values) in &found {
            clone.disk.settle_part(*first, values, is_cut);
        }
        let closed = volume.close_clone(number);
        if let (Err(error), false) = (closed, may_fail) {
            return Err(format!("P6: clone {number} cannot be closed: {error}"));
        }
        if !may_fail {
            let acked = clone.disk.acked();
            clone.disk.end_flush(&acked);
        }
    }
    Ok(())
}

/// No file is nobody's.
pub fn check_files(machine: &Machine, volume: &Volume) -> Result<(), String> {
    let files = machine.world().list(&Path::new(STORE).join("clones")).len();
    let clones = volume.clones().map_err(|e| format!("P10: listing clones: {e}"))?.len();
    if files == 3 * clones {
        return Ok(());
    }
    Err(format!("P10: {files} files for {clones} clones"))
}

/// What is right after a stop goes on being right.
pub fn go_on(machine: &Machine, volume: &Arc<Volume>) -> Result<(), String> {
    let told = |error: Error| format!("after a stop, a write to a clone fails: {error}");
    let mut model = machine.model().clone();
    for (&number, clone) in &mut model.clones {
        let range = 3..15.min(clone.disk.cell_count());
        let value = clone.disk.begin_write(range.clone(), false).expect("nobody writes");
        let (at, data) = ((range.start * CELL) as u64, bytes(range.clone().map(|_| value)));
        let opened = volume.open_clone(number, ExcludedReads::Zeros).map_err(told)?;
        opened.write(at, &data, false).map_err(told)?;
        clone.disk.end_write(range, false);
    }
    *machine.model() = model;
    Ok(())
}

/// Without clones nothing of them is left.
pub fn drop_all(machine: &Machine, volume: &Volume) -> Result<(), String> {
    let told = |error: Error| format!("dropping a clone: {error}");
    for info in volume.clones().map_err(told)? {
        volume.delete_clone(info.number).map_err(told)?;
    }
    machine.model().clones.clear();
    check_files(machine, volume)
}

/// One operation on the first clone of the first snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Create,
    Whole,
    /// Parts of sectors of two blocks.
    Partial,
    /// The end of the disk, a partial block.
    Tail,
    Zero,
    Trim,
    Flush,
    Reset,
    Delete,
    Meta,
    /// The live disk changes under it.
    Live,
    Reopen,
}

const STEPS: &[Step] = &[
    Step::Create,
    Step::Whole,
    Step::Partial,
    Step::Tail,
    Step::Zero,
    Step::Trim,
    Step::Flush,
    Step::Reset,
    Step::Delete,
    Step::Meta,
    Step::Live,
    Step::Reopen,
];

/// Every program of one step, and every one of three that begins with a write.
pub fn programs() -> Vec<Vec<Step>> {
    let mut all: Vec<Vec<Step>> = STEPS.iter().map(|&step| vec![step]).collect();
    for first in [Step::Whole, Step::Partial, Step::Tail, Step::Zero] {
        for &second in STEPS {
            all.extend(STEPS.iter().map(|&third| vec![first, second, third]));
        }
    }
    all
}

struct Run {
    machine: Arc<Machine>,
    volume: Arc<Volume>,
    way: Way,
}

impl Run {
    fn first(&self) -> Option<u32> {
        self.machine.model().clones.keys().next().copied()
    }

    fn change(&self, number: u32, change: impl FnOnce(&mut CloneModel)) {
        change(self.machine.model().clones.get_mut(&number).expect("there"));
    }

    fn open(&self, number: u32) -> EngineResult<Arc<CloneView>> {
        self.volume.open_clone(number, ExcludedReads::Zeros)
    }

    fn create(&self) -> EngineResult<()> {
        let epoch = self.machine.model().snapshots.keys().next().copied().expect("taken");
        let meta = vec![3; 9];
        {
            let mut model = self.machine.model();
            let start = start_of(&model, epoch).expect("looked at");
            let clone = CloneModel::new(epoch, start, model.size_bytes, meta.clone());
            model.cloning = Some(clone);
        }
        let number = self.volume.create_clone(epoch, &meta)?;
        let mut model = self.machine.model();
        let clone = model.cloning.take().expect("begun");
        model.clones.insert(number, clone);
        Ok(())
    }

    fn write(&self, number: u32, range: Range<usize>, is_zero: bool) -> EngineResult<()> {
        let (mut value, mut at_length) = (0, (0, 0));
        self.change(number, |clone| {
            value = clone.disk.begin_write(range.clone(), is_zero).expect("nobody else writes");
            at_length = place(&clone.disk, &range);
        });
        let (at, length) = at_length;
        let clone = self.open(number)?;
        if is_zero {
            clone.write_zeroes(at, length, true, false)?;
        } else {
            clone.write(at, &bytes(range.clone().map(|_| value)), false)?;
        }
        self.change(number, |clone| clone.disk.end_write(range, false));
        Ok(())
    }

    fn live(&self) -> EngineResult<()> {
        let range = 0..20;
        let value = self.machine.model().begin_write(range.clone(), false).expect("alone");
        self.volume.write(0, &bytes(range.clone().map(|_| value)), true)?;
        self.machine.model().end_write(range, true);
        Ok(())
    }

    fn run(&mut self, step: Step) -> Result<(), String> {
        let told = |error: Error| format!("{step:?} fails, and no fault: {error}");
        match step {
            Step::Create => return self.create().map_err(told),
            Step::Live => return self.live().map_err(told),
            Step::Reopen => {
                self.volume.close().map_err(told)?;
                let acked = self.machine.model().acked();
                self.machine.model().end_flush(&acked);
                closed(&mut self.machine.model(), false);
                self.volume = open(&self.machine, self.way)?;
                return Ok(());
            }
            _ => {}
        }
        let Some(number) = self.first() else { return Ok(()) };
        match step {
            Step::Whole => self.write(number, 0..16, false),
            Step::Partial => self.write(number, 13..19, false),
            Step::Tail => self.write(number, 50..56, false),
            Step::Zero => self.write(number, 10..56, true),
            Step::Trim => self.trim(number),
            Step::Flush => self.open(number).and_then(|clone| {
                let acked = self.machine.model().clones[&number].disk.acked();
                clone.flush()?;
                self.change(number, |clone| clone.disk.end_flush(&acked));
                Ok(())
            }),
            Step::Reset => {
                self.change(number, |clone| clone.is_resetting = true);
                let closed = self.volume.close_clone(number);
                let done = closed.and_then(|()| self.volume.reset_clone(number));
                done.map(|_| self.change(number, CloneModel::reset))
            }
            Step::Delete => {
                self.change(number, |clone| clone.is_deleting = true);
                let closed = self.volume.close_clone(number);
                let done = closed.and_then(|()| self.volume.delete_clone(number));
                done.map(|_| {
                    self.machine.model().clones.remove(&number);
                })
            }
            Step::Meta => {
                self.change(number, |clone| clone.telling = Some(vec![5; 700]));
                let told = self.volume.set_clone_meta(number, vec![5; 700]);
                told.map(|()| {
                    self.change(number, |c| c.meta = c.telling.take().unwrap_or_default());
                })
            }
            Step::Create | Step::Live | Step::Reopen => Ok(()),
        }
        .map_err(told)
    }

    fn trim(&self, number: u32) -> EngineResult<()> {
        self.change(number, |clone| {
            clone.disk.begin_write(0..16, true).expect("nobody else writes");
        });
        let clone = self.open(number)?;
        let mut content = vec![0; 4096];
        clone.trim(0, 4096, false)?;
        clone.read(0, &mut content)?;
        let found = cells(&content).map_err(Error::Usage)?;
        self.change(number, |clone| clone.disk.end_trim(0..16, &found));
        Ok(())
    }
}

/// Run one program on a clone of the first two blocks and a half. Every step is to be looked at.
pub fn run(program: &[Step]) -> Result<Stops, String> {
    let mut dice = Dice::new(program.iter().fold(7, |sum, &step| sum * 31 + step as u64));
    let way = Way { is_write_through: false, has_background: false, has_faults: false };
    let machine = new_machine(3 * 4096 + 2048, 6, dice.fork())?;
    let volume = open(&machine, way)?;
    let mut run = Run { machine, volume, way };
    let selection: ExtentSet =
        [0, 1, 3].map(stillblock_core::extent::Extent::single).into_iter().collect();
    run.machine.model().begin_snapshot(selection.clone());
    let taken = run.volume.snapshot(SnapshotRequest {
        selection: selection.clone(),
        low: ExtentSet::new(),
        meta: Vec::new(),
        pause_limit: Duration::from_secs(60),
    });
    let taken = taken.map_err(|e| format!("a snapshot fails: {e}"))?;
    {
        let mut model = run.machine.model();
        let snapshot = model.taken().ok_or("begun")?;
        model.snapshots.insert(taken.epoch, snapshot);
        let blocks = selection.iter().flat_map(|e| e.start..e.end);
        let ones = blocks.flat_map(|b| model.cells_of(b)).map(|cell| (cell, 1)).collect();
        model.pin(taken.epoch, &ones);
    }
    if program[0] != Step::Create {
        run.run(Step::Create)?;
    }
    run.machine.watch();
    for &step in program {
        run.run(step)?;
    }
    run.volume.close().map_err(|e| format!("closing fails: {e}"))?;
    let acked = run.machine.model().acked();
    run.machine.model().end_flush(&acked);
    closed(&mut run.machine.model(), false);
    let mut stops = run.machine.take_stops();
    stops.push(run.machine.stop());
    Ok(Stops { way, all: stops, dice, tally: Tally::default() })
}

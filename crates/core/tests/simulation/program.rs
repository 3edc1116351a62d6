//! Random programs: clients that write, flush and discard while somebody takes, narrows, deletes and
//! restores snapshots; stopped at every step.

use crate::check::{
    Stops, Tally, Way, bytes, cells, check, check_changed, check_kept_once, check_snapshots, open,
    read_live, read_snapshot, settled_as,
};
use crate::clones;
use crate::dice::Dice;
use crate::machine::{FaultPlan, Machine, ORIGIN, STORE, SimHost, Stop, Target};
use crate::model::{CELL, CELLS_A_BLOCK, Model, Restore, UNKNOWN};
use shuttle::sync::RwLock;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use stillblock_core::error::{Error, Result as EngineResult};
use stillblock_core::extent::{Extent, ExtentSet};
use stillblock_core::volume::open::{CreateRequest, create_on};
use stillblock_core::volume::{
    Effort, Moment, Quiet, RestoreRequest, SnapshotRequest, StorePolicy, Volume,
};

/// Simulated time is cheap; nobody is to fail because of it.
const LONG: Duration = Duration::from_secs(60);

/// What fails beside the power and the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    None,
    /// Anything, and headers rot.
    Any,
    /// Records of the journal.
    Decisions,
}

/// What a program does most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    Mixed,
    /// Snapshots are deleted and leave bookmarks: most blocks are tracked, and nothing is preserved.
    Bookmarks,
    /// Snapshots are deleted as soon as they are taken, beside small writes: nobody needs any more
    /// what is about to be preserved.
    Deletions,
}

/// One program.
struct Program {
    machine: Arc<Machine>,
    way: Way,
    dice: Dice,
    faults: Faults,
    habit: Habit,
    /// Stops of a session that are kept to be looked at.
    stops_max: usize,
    stops: Vec<Stop>,
    /// Of the stops after which the program went on.
    tally: Tally,
}

/// What all threads of a session share.
pub struct Session {
    pub machine: Arc<Machine>,
    pub volume: Arc<Volume>,
    /// Writers share it; a restore has it alone, so that it is known what it found.
    gate: RwLock<()>,
    /// Users of clones share it; who makes or drops one has it alone.
    pub clones_gate: RwLock<()>,
    has_faults: bool,
    habit: Habit,
    problem: std::sync::Mutex<Option<String>>,
}

impl Session {
    fn note(&self, result: Result<(), String>) -> bool {
        let Err(problem) = result else { return true };
        let mut first = self.problem.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        first.get_or_insert(problem);
        false
    }

    /// What the engine said; without faults it has nothing to complain about.
    pub fn must<T>(&self, what: &str, result: EngineResult<T>) -> Result<Option<T>, String> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if self.has_faults && self.machine.has_met_faults() => {
                // Unless the store failed as well, so that it could not be noted.
                let failed = self.machine.is_origin_failed.load(Ordering::Relaxed)
                    && self.machine.faults_met.load(Ordering::Relaxed) == 1;
                if failed && error.to_string().contains("making writes durable") {
                    self.machine.model().is_failure_told = true;
                }
                Ok(None)
            }
            Err(Error::RestoreRunning(_) | Error::PauseTimeout(_)) => Ok(None),
            Err(error) => Err(format!("{what} fails, and no fault: {error}")),
        }
    }
}

/// Write, read and flush for a while.
fn client(session: &Session, dice: &mut Dice, steps: usize) -> Result<(), String> {
    let writes = if session.habit == Habit::Bookmarks { 50 } else { 62 };
    for _ in 0..steps {
        let _gate = session.gate.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let chosen = dice.below(100);
        match if chosen < 62 && chosen >= writes { 99 } else { chosen } {
            0..62 => write(session, dice)?,
            62..70 => trim(session, dice)?,
            70..84 => read(session, dice)?,
            _ => {
                let acked = session.machine.model().acked();
                let flushed = session.volume.flush();
                session.machine.tell(|| format!("flush: {flushed:?}"));
                if session.must("a flush", flushed)?.is_some() {
                    session.machine.model().end_flush(&acked);
                }
            }
        }
    }
    Ok(())
}

/// Cells next to one another; `is_small`: of one block, so that others of its region are left.
pub fn pick_range(model: &Model, dice: &mut Dice, is_small: bool) -> Range<usize> {
    let count = model.cell_count();
    if is_small && dice.chance(70) {
        let block = dice.below(count.div_ceil(CELLS_A_BLOCK)) * CELLS_A_BLOCK;
        let end = (block + CELLS_A_BLOCK).min(count);
        return if dice.chance(70) {
            block..end
        } else {
            block..block + 1 + dice.below(end - block)
        };
    }
    let first = if dice.chance(40) { dice.below(count) / 16 * 16 } else { dice.below(count) };
    let most = [1, 16, 16, 40, count][dice.below(5)];
    first..first + 1 + dice.below((count - first).min(most))
}

pub fn place(model: &Model, range: &Range<usize>) -> (u64, u64) {
    let start = (range.start * CELL) as u64;
    (start, ((range.end * CELL) as u64).min(model.size_bytes) - start)
}

fn write(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let (is_zero, fua) = (dice.chance(15), dice.chance(12));
    let (range, value, (at, length)) = {
        let mut model = session.machine.model();
        let range = pick_range(&model, dice, session.habit != Habit::Mixed);
        let Some(value) = model.begin_write(range.clone(), is_zero) else { return Ok(()) };
        let place = place(&model, &range);
        (range, value, place)
    };
    let written = if is_zero {
        session.volume.write_zeroes(at, length, dice.chance(50), fua)
    } else {
        session.volume.write(at, &bytes(range.clone().map(|_| value)), fua)
    };
    session.machine.tell(|| format!("write {range:?} of {value}, fua {fua}: {written:?}"));
    let done = session.must("a write", written);
    let mut model = session.machine.model();
    match &done {
        Ok(Some(())) => model.end_write(range, fua),
        _ => model.fail_write(range),
    }
    done.map(|_| ())
}

fn trim(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let (range, (at, length)) = {
        let mut model = session.machine.model();
        let range = pick_range(&model, dice, session.habit != Habit::Mixed);
        if model.begin_write(range.clone(), true).is_none() {
            return Ok(());
        }
        let place = place(&model, &range);
        (range, place)
    };
    let mut content = vec![0; usize::try_from(length).expect("small")];
    let trimmed = session.volume.trim(at, length, false);
    let read = trimmed.and_then(|()| session.volume.read(at, &mut content));
    let done = session.must("a discard", read);
    let mut model = session.machine.model();
    match done? {
        Some(()) => model.end_trim(range, &cells(&content)?),
        None => model.fail_write(range),
    }
    Ok(())
}

fn read(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let (range, (at, length), acked) = {
        let model = session.machine.model();
        let range = pick_range(&model, dice, session.habit != Habit::Mixed);
        let place = place(&model, &range);
        (range, place, model.acked())
    };
    let mut content = vec![0; usize::try_from(length).expect("small")];
    if session.must("a read", session.volume.read(at, &mut content))?.is_some() {
        session.machine.model().check_read(range.start, &acked, &cells(&content)?)?;
    }
    Ok(())
}

/// Take snapshots and let them go.
fn keeper(session: &Session, dice: &mut Dice, steps: usize) -> Result<(), String> {
    for _ in 0..steps {
        match session.habit {
            Habit::Bookmarks if dice.chance(55) => {
                leave_bookmark(session)?;
                continue;
            }
            Habit::Deletions if dice.chance(75) => {
                let all = session.machine.model().all_blocks();
                if let Some(epoch) = take_snapshot(session, all, pick_quiet(dice))? {
                    delete_one(session, epoch)?;
                }
                continue;
            }
            _ => {}
        }
        match dice.below(100) {
            0..40 => snapshot(session, dice)?,
            40..52 => delete(session, dice)?,
            52..62 => narrow(session, dice)?,
            62..70 => bookmark(session, dice)?,
            70..82 => restore(session, dice)?,
            82..90 => look(session, dice)?,
            90..95 => keep_up(session)?,
            _ => look_at_changes(session, dice)?,
        }
    }
    Ok(())
}

fn pick_selection(model: &Model, dice: &mut Dice) -> ExtentSet {
    let all = model.all_blocks();
    if dice.chance(40) {
        return all;
    }
    all.iter()
        .flat_map(|e| e.start..e.end)
        .filter(|_| dice.chance(60))
        .map(Extent::single)
        .collect()
}

fn pick_few(model: &Model, dice: &mut Dice) -> ExtentSet {
    let blocks = 0..model.block_count();
    blocks.filter(|_| dice.chance(20)).map(Extent::single).collect()
}

pub fn pick_snapshot(model: &Model, dice: &mut Dice) -> Option<u32> {
    let live = model.snapshots.iter().filter(|(_, s)| s.is_certain());
    let live: Vec<u32> = live.map(|(&epoch, _)| epoch).collect();
    live.get(dice.below(live.len())).copied()
}

/// Take a snapshot and leave its bookmark only: what is written then is tracked and not preserved.
fn leave_bookmark(session: &Session) -> Result<(), String> {
    let all = session.machine.model().all_blocks();
    let Some(epoch) = take_snapshot(session, all, Quiet::Device)? else { return Ok(()) };
    look_at(session, epoch)?;
    bookmark_one(session, epoch)?;
    delete_one(session, epoch)
}

fn snapshot(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let mut selection = pick_selection(&session.machine.model(), dice);
    if session.habit == Habit::Bookmarks {
        // Most blocks stay tracked only.
        selection = selection.intersection(&pick_few(&session.machine.model(), dice));
    }
    match take_snapshot(session, selection, pick_quiet(dice))? {
        Some(epoch) if dice.chance(70) => look_at(session, epoch),
        _ => Ok(()),
    }
}

/// Which writers wait for an instant.
pub fn pick_quiet(dice: &mut Dice) -> Quiet {
    if dice.chance(50) { Quiet::Selected } else { Quiet::Device }
}

fn take_snapshot(
    session: &Session,
    selection: ExtentSet,
    holds: Quiet,
) -> Result<Option<u32>, String> {
    {
        let mut model = session.machine.model();
        if model.snapshots.len() > 6 {
            return Ok(None);
        }
        model.begin_snapshot(selection.clone());
    }
    let meta = Vec::new();
    let request = SnapshotRequest { selection, low: ExtentSet::new(), meta, pause_limit: LONG };
    let moment = Moment { holds, ..Moment::default() };
    let taken = session.volume.snapshot_at(request, moment);
    session.machine.tell(|| format!("snapshot: {taken:?}"));
    let done = session.must("a snapshot", taken);
    let Some(taken) = done? else {
        session.machine.model().creating = None;
        return Ok(None);
    };
    let mut model = session.machine.model();
    let snapshot = model.taken().ok_or("taken twice")?;
    model.add(taken.epoch, snapshot)?;
    Ok(Some(taken.epoch))
}

pub fn look_at(session: &Session, epoch: u32) -> Result<(), String> {
    let model = session.machine.model().clone();
    let selection = &model.snapshots[&epoch].selection;
    let found = read_snapshot(&session.volume, epoch, &model, selection, session.has_faults)?;
    let mut model = session.machine.model();
    model.check_snapshot(epoch, &found)?;
    model.pin(epoch, &found);
    Ok(())
}

/// Index files are written, epochs merged and the journal compacted long before they are due.
fn keep_up(session: &Session) -> Result<(), String> {
    session.must("upkeep", session.volume.maintain(Effort::All)).map(|_| ())
}

fn look(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let picked = pick_snapshot(&session.machine.model(), dice);
    picked.map_or(Ok(()), |epoch| look_at(session, epoch))
}

fn delete(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let picked = pick_snapshot(&session.machine.model(), dice);
    picked.map_or(Ok(()), |epoch| delete_one(session, epoch))
}

fn delete_one(session: &Session, epoch: u32) -> Result<(), String> {
    {
        let mut model = session.machine.model();
        if model.clone_source == Some(epoch) {
            return Ok(());
        }
        let Some(snapshot) = model.snapshots.get_mut(&epoch).filter(|s| s.is_certain()) else {
            return Ok(());
        };
        snapshot.is_deleting = true;
    }
    let deleted = session.volume.delete_snapshot(epoch, false);
    let is_busy = matches!(deleted, Err(Error::RestoreRunning(_) | Error::InUse(_)));
    session.machine.tell(|| format!("delete {epoch}: {deleted:?}"));
    let done = if is_busy { Ok(None) } else { session.must("a deletion", deleted) };
    let is_undone = is_busy || is_undone(session, epoch);
    let mut model = session.machine.model();
    let snapshot = model.snapshots.get_mut(&epoch).expect("picked");
    match done? {
        Some(_) => {
            (snapshot.is_deleting, snapshot.is_deleted) = (false, true);
            model.forget_if_gone(epoch);
        }
        // A fault may have come after the decision; before it, nothing was decided.
        None if !is_undone => {}
        None => snapshot.is_deleting = false,
    }
    Ok(())
}

/// True if an operation that failed left a snapshot as it was: it is still listed, and the one fault
/// there was did not keep the store from saying so.
fn is_undone(session: &Session, epoch: u32) -> bool {
    session.machine.faults_met.load(Ordering::Relaxed) == 1
        && session.volume.epochs().is_ok_and(|known| {
            known.iter().any(|e| e.epoch == epoch && e.state.selection.is_some())
        })
}

fn narrow(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let picked = {
        let mut model = session.machine.model();
        let selection = pick_selection(&model, dice);
        // Clones are made of what is final.
        let is_cloned = |e: u32| model.clones.values().any(|c| c.epoch == e);
        let is_free = |e: &u32| model.clone_source != Some(*e) && !is_cloned(*e);
        let picked = pick_snapshot(&model, dice).filter(is_free);
        picked.map(|epoch| {
            let snapshot = model.snapshots.get_mut(&epoch).expect("picked");
            snapshot.narrowing = Some(snapshot.selection.intersection(&selection));
            (epoch, selection)
        })
    };
    let Some((epoch, selection)) = picked else { return Ok(()) };
    // What is kept beside a snapshot changes in the same decision: `check` compares the two.
    let meta = session.machine.model().snapshots[&epoch].narrowing.as_ref().map(settled_as);
    let narrowed = session.volume.narrow_with(epoch, &selection, meta);
    let is_busy = matches!(narrowed, Err(Error::RestoreRunning(_)));
    let done = if is_busy { Ok(None) } else { session.must("narrowing", narrowed) };
    let mut model = session.machine.model();
    let snapshot = model.snapshots.get_mut(&epoch).expect("picked");
    match done? {
        Some(_) => snapshot.selection = snapshot.narrowing.take().unwrap_or_default(),
        None if !is_busy => {}
        None => snapshot.narrowing = None,
    }
    Ok(())
}

fn bookmark(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let marked: Option<u32> = {
        let model = session.machine.model();
        let mut marked =
            model.snapshots.iter().filter(|(_, s)| s.bookmark.is_some() && !s.is_bookmark_deleting);
        marked.next().map(|(&epoch, _)| epoch)
    };
    if let Some(epoch) = marked.filter(|_| dice.chance(50)) {
        session.machine.model().snapshots.get_mut(&epoch).expect("marked").is_bookmark_deleting =
            true;
        let done = session.must("deleting a bookmark", session.volume.delete_bookmark(epoch))?;
        let mut model = session.machine.model();
        if done.is_some() {
            let snapshot = model.snapshots.get_mut(&epoch).expect("marked");
            (snapshot.bookmark, snapshot.is_bookmark_deleting) = (None, false);
            model.forget_if_gone(epoch);
        }
        return Ok(());
    }
    let picked = pick_snapshot(&session.machine.model(), dice);
    picked.map_or(Ok(()), |epoch| bookmark_one(session, epoch))
}

fn bookmark_one(session: &Session, epoch: u32) -> Result<(), String> {
    {
        let mut model = session.machine.model();
        let picked = model.snapshots.get_mut(&epoch);
        let unmarked = picked.filter(|s| s.is_certain() && s.bookmark.is_none());
        let Some(snapshot) = unmarked else { return Ok(()) };
        snapshot.is_bookmarking = true;
    }
    let done = session.must("a bookmark", session.volume.bookmark(epoch, Vec::new()))?;
    let mut model = session.machine.model();
    let snapshot = model.snapshots.get_mut(&epoch).expect("picked");
    if done.is_some() {
        (snapshot.bookmark, snapshot.is_bookmarking) = (Some(snapshot.selection.clone()), false);
    }
    Ok(())
}

fn restore(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let alone = session.gate.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(epoch) = pick_snapshot(&session.machine.model(), dice) else { return Ok(()) };
    look_at(session, epoch)?;
    let (wanted, safety) = {
        let mut model = session.machine.model();
        let wanted = pick_selection(&model, dice);
        let safety = pick_selection(&model, dice);
        let source = &model.snapshots[&epoch];
        let content = source.pinned.clone().ok_or("looked at")?;
        let blocks = source.selection.intersection(&wanted);
        if blocks
            .iter()
            .flat_map(|e| e.start..e.end)
            .flat_map(|b| model.cells_of(b))
            .any(|c| content[c] == UNKNOWN)
        {
            return Ok(());
        }
        let union = safety.union(&blocks);
        model.restoring = Some(Restore { blocks, content, safety: union });
        (wanted, safety)
    };
    let started = session.volume.restore(&RestoreRequest {
        source_epoch: epoch,
        request: wanted,
        safety_selection: safety,
        safety_low: ExtentSet::new(),
        meta: Vec::new(),
        pause_limit: LONG,
    });
    session.machine.tell(|| format!("restore of {epoch}: {started:?}"));
    let done = session.must("a restore", started)?;
    let mut model = session.machine.model();
    let restore = model.restoring.take().ok_or("begun")?;
    if let Some(status) = done {
        model.restored(&restore, status.safety_epoch)?;
    }
    drop(model);
    drop(alone);
    if dice.chance(40) {
        // With faults it may never end.
        let patience = if session.has_faults { Duration::from_secs(1) } else { LONG };
        session.must("waiting for a restore", session.volume.wait_restored(patience))?;
    }
    Ok(())
}

/// While others write: everything that was acknowledged before is in the changed set.
fn look_at_changes(session: &Session, dice: &mut Dice) -> Result<(), String> {
    let (epoch, tracked, then) = {
        let model = session.machine.model();
        let Some(epoch) = pick_snapshot(&model, dice) else { return Ok(()) };
        (epoch, model.snapshots[&epoch].selection.clone(), model.live())
    };
    let Some(changed) = session.must("a changed set", session.volume.changed(epoch, None))? else {
        return Ok(());
    };
    let model = session.machine.model();
    match model.differing(epoch, &tracked, &then).iter().find(|b| !changed.contains(**b)) {
        Some(block) => Err(format!("P5: block {block} was changed and is not in {changed:?}")),
        None => Ok(()),
    }
}

impl Program {
    /// Some clients and a keeper, until all are done.
    fn session(&mut self, volume: &Arc<Volume>) -> Result<(), String> {
        let session = Arc::new(Session {
            machine: Arc::clone(&self.machine),
            volume: Arc::clone(volume),
            gate: RwLock::new(()),
            clones_gate: RwLock::new(()),
            has_faults: self.faults != Faults::None,
            habit: self.habit,
            problem: std::sync::Mutex::default(),
        });
        let mut threads = Vec::new();
        if self.habit == Habit::Bookmarks {
            session.note(leave_bookmark(&session));
        }
        let (client_steps, keeper_steps) = match self.habit {
            Habit::Bookmarks => (14, 2),
            Habit::Mixed | Habit::Deletions => (8, 7),
        };
        for _ in 0..=self.dice.below(3) {
            let (session, mut dice) = (Arc::clone(&session), self.dice.fork());
            threads.push(shuttle::thread::spawn(move || {
                session.note(client(&session, &mut dice, client_steps));
            }));
        }
        if self.dice.chance(40) {
            // Beside what is decided meanwhile.
            let session = Arc::clone(&session);
            threads.push(shuttle::thread::spawn(move || {
                session.note(keep_up(&session));
            }));
        }
        for _ in 0..[0, 0, 1, 2][self.dice.below(4)] {
            let (session, mut dice) = (Arc::clone(&session), self.dice.fork());
            threads.push(shuttle::thread::spawn(move || {
                session.note(clones::cloner(&session, &mut dice, 9));
            }));
        }
        let mut dice = self.dice.fork();
        if self.habit != Habit::Bookmarks || dice.chance(60) {
            session.note(keeper(&session, &mut dice, keeper_steps));
        }
        for thread in threads {
            thread.join().map_err(|_| "a client panicked")?;
        }
        let problem = session.problem.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        problem.clone().map_or(Ok(()), Err)
    }

    /// Keep the stops of a session, or as many as are wanted, to be looked at.
    fn keep_stops(&mut self) {
        let stops = self.machine.take_stops();
        let count = stops.len();
        for (index, stop) in stops.into_iter().enumerate() {
            if self.dice.below(count - index) < self.stops_max {
                self.stops.push(stop);
            }
        }
    }

    fn run(&mut self) -> Result<(), String> {
        self.machine.listen();
        self.machine.watch();
        let mut volume = open(&self.machine, self.way)?;
        let sessions = 2 + self.dice.below(2);
        for _ in 0..sessions {
            if self.faults != Faults::None {
                let only_decisions = self.faults == Faults::Decisions;
                self.machine.plan(pick_faults(&mut self.dice, only_decisions));
            }
            self.session(&volume)?;
            self.machine.plan(FaultPlan::default());
            if self.machine.is_origin_failed.load(Ordering::Relaxed) {
                volume.abandon();
                self.keep_stops();
                return Ok(());
            }
            let (machine, went_on) = self.end_session(&volume)?;
            self.machine = machine;
            volume = went_on;
        }
        volume.abandon();
        Ok(())
    }

    /// Close or be stopped; then go on with what is left.
    fn end_session(&mut self, volume: &Arc<Volume>) -> Result<(Arc<Machine>, Arc<Volume>), String> {
        let may_fail = self.machine.has_met_faults();
        if self.dice.chance(50) {
            let closed = volume.close();
            self.machine.tell(|| format!("close: {closed:?}"));
            if let (Err(error), false) = (&closed, may_fail) {
                return Err(format!("closing fails: {error}"));
            }
            if closed.is_ok() {
                let acked = self.machine.model().acked();
                let mut model = self.machine.model();
                model.end_flush(&acked);
                clones::closed(&mut model, may_fail);
            }
            let again = open(&self.machine, self.way)?;
            let live = read_live(&again)?;
            let mut model = self.machine.model().clone();
            model.check_live(&live, false)?;
            check_snapshots(&again, &mut model, may_fail)?;
            clones::verify(&again, &mut model, false, may_fail)?;
            if !may_fail {
                check_changed(&again, &model, &live, false)?;
                check_kept_once(&self.machine, &again)?;
            }
            *self.machine.model() = model;
            self.keep_stops();
            self.machine.watch();
            return Ok((Arc::clone(&self.machine), again));
        }
        volume.abandon();
        self.keep_stops();
        let last = self.machine.stop();
        loop {
            let (dice, tally) = (&mut self.dice, &mut self.tally);
            if let Some((machine, volume)) = check(&last, self.way, dice, 1, tally)? {
                machine.listen();
                machine.tell(|| "stopped, opened again".into());
                machine.watch();
                return Ok((machine, volume));
            }
        }
    }
}

fn pick_faults(dice: &mut Dice, only_decisions: bool) -> FaultPlan {
    use Target::{
        JournalSync, OriginRead, OriginSync, OriginWrite, StoreNames, StoreRead, StoreSync,
        StoreWrite,
    };
    let targets =
        [OriginRead, OriginSync, OriginWrite, StoreNames, StoreRead, StoreSync, StoreWrite];
    let mut fault = || (targets[dice.below(targets.len())], 1 + dice.below(30) as u64);
    let mut faults = vec![fault(), fault()];
    if only_decisions || dice.chance(35) {
        faults = vec![(JournalSync, 1 + dice.below(8) as u64)];
    }
    FaultPlan { faults }
}

/// A machine with a fresh volume, its disk full of ones.
pub fn new_machine(size_bytes: u64, slot_count: u32, dice: Dice) -> Result<Arc<Machine>, String> {
    let count = usize::try_from(size_bytes).expect("small").div_ceil(CELL);
    let mut content = bytes((0..count).map(|_| 1));
    content.truncate(usize::try_from(size_bytes).expect("small"));
    let machine = Machine::new(&content, slot_count, Model::new(size_bytes), dice);
    let made = create_on(
        &SimHost(Arc::clone(&machine)),
        &CreateRequest {
            policy: StorePolicy::default(),
            store: STORE.into(),
            origin: ORIGIN.into(),
            block_size: 4096,
            meta: Vec::new(),
        },
    );
    made.map_err(|e| format!("making a volume fails: {e}"))?;
    Ok(machine)
}

/// Run the program of a seed. Its stops are to be looked at.
pub fn run(seed: u64, faults: Faults, stops_max: usize) -> Result<Stops, String> {
    let mut dice = Dice::new(seed);
    let habit = match dice.below(100) {
        0..30 => Habit::Bookmarks,
        30..45 => Habit::Deletions,
        _ => Habit::Mixed,
    };
    let blocks_min = if habit == Habit::Bookmarks { 6 } else { 3 };
    let blocks = (blocks_min + dice.below(8)) as u64;
    let tail = [0, 0, 512, 1280, 768, 4000][dice.below(6)] / 256 * 256;
    let size_bytes = blocks * 4096 + tail;
    let slot_count = [5, 12, 40][dice.below(3)];
    let way = Way {
        is_write_through: dice.chance(15),
        has_background: dice.chance(65),
        has_faults: faults != Faults::None,
    };
    let machine = new_machine(size_bytes, slot_count, dice.fork())?;
    let mut program = Program {
        machine,
        way,
        dice,
        faults,
        habit,
        stops_max,
        stops: Vec::new(),
        tally: Tally::default(),
    };
    program.run()?;
    Ok(Stops { way: program.way, all: program.stops, dice: program.dice, tally: program.tally })
}

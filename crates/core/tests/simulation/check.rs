//! After a stop: open the volume again, and hold it to its promises.

use crate::clones;
use crate::dice::Dice;
use crate::machine::{LOG, Machine, STORE, SimHost, Stop};
use crate::model::{CELL, Model, size};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use stillblock_core::clone::CLONES_DIRECTORY;
use stillblock_core::extent::ExtentSet;
use stillblock_core::index::run::run_number;
use stillblock_core::journal::{JOURNAL_NAME, Settled};
use stillblock_core::log::scan::scan;
use stillblock_core::log::writer::{Segments, segment_name, segment_number};
use stillblock_core::view::{ExcludedReads, View};
use stillblock_core::volume::host::Host;
use stillblock_core::volume::open::{Cache, OpenRequest, Recover, open_on};
use stillblock_core::volume::{Effort, SnapshotRequest, Volume};

macro_rules! ensure {
    ($holds:expr, $($why:tt)*) => {
        if !$holds {
            return Err(format!($($why)*));
        }
    };
}

/// How a volume is opened in one program.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub is_write_through: bool,
    pub has_background: bool,
    /// Disks fail and rot.
    pub has_faults: bool,
}

/// What is kept beside a snapshot that was narrowed to this.
fn note_of(selection: &ExtentSet) -> Vec<u8> {
    format!("{selection:?}").into_bytes()
}

/// The same with all that is settled with it.
pub fn settled_as(selection: &ExtentSet) -> Settled {
    Settled { meta: note_of(selection), low: ExtentSet::new() }
}

/// What the machine's random bytes come to.
const UUID: [u8; 16] = [7, 7, 7, 7, 7, 7, 0x47, 7, 0x87, 7, 7, 7, 7, 7, 7, 7];

/// Nobody is to fail because time passes.
const LONG: Duration = Duration::from_secs(60);

/// A machine, and its volume.
pub type Opened = (Arc<Machine>, Arc<Volume>);

/// How many stops were looked at.
#[derive(Default, Debug)]
pub struct Tally {
    pub stops: u64,
    pub nested: u64,
    pub went_on: u64,
}

impl Tally {
    pub fn add(&mut self, more: &Self) {
        self.stops += more.stops;
        self.nested += more.nested;
        self.went_on += more.went_on;
    }
}

/// What is left to look at after a program, and how its volumes are opened.
pub struct Stops {
    pub way: Way,
    pub all: Vec<Stop>,
    /// For whoever looks at them.
    pub dice: Dice,
    /// Of those that were looked at on the way.
    pub tally: Tally,
}

/// Look at some of the stops of a program.
pub fn check_all(stops: &[Stop], way: Way, mut dice: Dice) -> Result<Tally, String> {
    let mut tally = Tally::default();
    for stop in stops {
        if let Some((_, volume)) = check(stop, way, &mut dice, 0, &mut tally)? {
            volume.abandon();
        }
    }
    Ok(tally)
}

pub fn request(way: Way, recover: Recover) -> OpenRequest {
    OpenRequest {
        store: crate::machine::STORE.into(),
        origin: None,
        cache: if way.is_write_through { Cache::WriteThrough } else { Cache::WriteBack },
        direct: false,
        buffer_dir: None,
        buffer_bytes: 1 << 20,
        recover,
        has_background: way.has_background,
        peers: Vec::new(),
    }
}

pub fn open(machine: &Arc<Machine>, way: Way) -> Result<Arc<Volume>, String> {
    let host = Arc::new(SimHost(Arc::clone(machine)));
    let opened = open_on(Arc::clone(&host) as Arc<dyn Host>, request(way, Recover::Refuse));
    match opened {
        Err(error) if machine.has_met_faults() && error.kind() == "recovery_needed" => {
            // It says so and asks; somebody looked at the device.
            let again = open_on(host, request(way, Recover::Replay));
            again.map_err(|e| format!("opening, having asked for it, fails: {e}"))
        }
        other => other.map_err(|e| format!("opening fails: {e}")),
    }
}

/// The cells of the live disk.
pub fn read_live(volume: &Volume) -> Result<Vec<u32>, String> {
    let mut bytes = vec![0; size(volume.size_bytes())];
    volume.read(0, &mut bytes).map_err(|e| format!("P1: reading the disk: {e}"))?;
    cells(&bytes)
}

/// Each cell has one value all over.
pub fn cells(bytes: &[u8]) -> Result<Vec<u32>, String> {
    let value = |(index, cell): (usize, &[u8])| {
        let first = u32::from_le_bytes(cell[..4].try_into().expect("four bytes"));
        let is_whole = cell[4..] == cell[..cell.len() - 4];
        if is_whole { Ok(first) } else { Err(format!("cell {index} is mixed: {cell:02x?}")) }
    };
    bytes.chunks(CELL).enumerate().map(value).collect()
}

pub fn bytes(values: impl Iterator<Item = u32>) -> Vec<u8> {
    values.flat_map(|value| value.to_le_bytes().repeat(CELL / 4)).collect()
}

/// The cells of what a snapshot selects; with faults, of what it can give.
pub fn read_snapshot(
    volume: &Arc<Volume>,
    epoch: u32,
    model: &Model,
    selection: &ExtentSet,
    may_fail: bool,
) -> Result<BTreeMap<usize, u32>, String> {
    let view = View::open(volume, epoch, ExcludedReads::Error);
    let view = view.map_err(|e| format!("P6: snapshot {epoch} cannot be opened: {e}"))?;
    let mut found = BTreeMap::new();
    for block in selection.iter().flat_map(|e| e.start..e.end) {
        let range = model.cells_of(block);
        let start = block * 4096;
        let length = size((model.size_bytes - start).min(4096));
        let mut content = vec![0; length];
        match view.read(start, &mut content) {
            Ok(()) => found.extend(range.zip(cells(&content)?)),
            Err(_) if may_fail => {}
            Err(error) => {
                return Err(format!("P2: snapshot {epoch} block {block}, and no fault: {error}"));
            }
        }
    }
    Ok(found)
}

/// Open what a stop left, be stopped again perhaps, look, and go on for a moment.
pub fn check(
    stop: &Stop,
    way: Way,
    dice: &mut Dice,
    depth: usize,
    tally: &mut Tally,
) -> Result<Option<Opened>, String> {
    tally.stops += 1;
    let is_cut = stop.model.was_cut || dice.chance(60);
    let machine = if is_cut { stop.cut(dice.fork()) } else { stop.killed(dice.fork()) };
    machine.model().was_cut = is_cut;
    machine.tell(|| format!("STOP at depth {depth}, cut {is_cut}"));
    machine.faults_met.store(u64::from(stop.had_faults), std::sync::atomic::Ordering::Relaxed);
    if stop.is_origin_failed {
        return check_refused(&machine, way, is_cut, stop.model.is_failure_told);
    }
    let rotten = if way.has_faults && dice.chance(12) { machine.rot_a_segment(dice) } else { None };
    if machine.has_index_files() && dice.chance(20) {
        // It decides nothing, so nobody may notice.
        machine.rot_an_index_file(dice);
    }
    let may_fail = stop.had_faults || rotten.is_some();
    machine.faults_met.store(u64::from(may_fail), std::sync::atomic::Ordering::Relaxed);
    let is_nested = depth == 0 && rotten.is_none() && dice.chance(8);
    if is_nested {
        machine.watch();
    }
    let found = machine.stop();
    // Only a failure is told: to look is to take steps, and the seed would run otherwise.
    let story = |why: String| format!("{why}\n{}", describe(&found.killed(Dice::new(0))));
    let volume = match open(&machine, way) {
        // Killed while it restored from what is rotten now: it says so, and a person must decide.
        Err(why) if rotten.is_some() && why.contains("could not be kept") => return Ok(None),
        opened => opened.map_err(story)?,
    };
    for again in machine.take_stops() {
        tally.nested += 1;
        if let Some((_, volume)) = check(&again, way, dice, depth + 1, tally)? {
            volume.abandon();
        }
    }
    if let Some((name, epoch)) = rotten {
        // What it held is lost, and who needs it is told; people may still want to look at it.
        let is_needed =
            volume.epochs().expect("listed").first().is_some_and(|first| first.epoch <= epoch);
        let is_there = machine.world().list(Path::new(LOG)).contains(&name);
        ensure!(
            is_there || !is_needed || is_superseded(&found, &volume, &name),
            "P10: {name} cannot be read, and was removed with its records"
        );
        check_rotten(&volume, &machine.model().clone()).map_err(story)?;
        volume.abandon();
        return Ok(None);
    }
    if !may_fail && dice.chance(30) {
        check_tails(&machine.stop().killed(Dice::new(0)), &volume).map_err(story)?;
    }
    verify(&machine, &volume, is_cut, way.is_write_through, may_fail).map_err(story)?;
    if dice.chance(25) {
        tally.went_on += 1;
        go_on(&machine, &volume, way, may_fail)?;
        return Ok(None);
    }
    Ok(Some((machine, volume)))
}

/// A merged segment, whole before it had its name, stands for this one.
fn is_superseded(stop: &Stop, volume: &Volume, name: &str) -> bool {
    let machine = stop.killed(Dice::new(0));
    let segments = Segments::new(SimHost(machine).directory(Path::new(LOG)));
    let found = scan(&segments, volume.uuid(), volume.block_size(), &ExtentSet::new());
    found.is_ok_and(|found| segment_number(name).is_some_and(|n| found.superseded.contains(&n)))
}

/// The origin lost something that it was given. Who was told so will not be told otherwise, until
/// somebody looked at the device; what it holds is then known to nobody.
fn check_refused(
    machine: &Arc<Machine>,
    way: Way,
    is_cut: bool,
    was_told: bool,
) -> Result<Option<Opened>, String> {
    let host = Arc::new(SimHost(Arc::clone(machine)));
    match open_on(host, request(way, Recover::Refuse)) {
        Err(error) if error.kind() == "recovery_needed" => Ok(None),
        Err(error) => Err(format!("opening a failed origin fails otherwise: {error}")),
        Ok(_) if was_told => {
            Err(format!("P6: a failed sync is forgotten by a restart\n{}", describe(machine)))
        }
        Ok(volume) => {
            // It was killed before anybody was told: nobody can have been told that all is well.
            let looked = verify(machine, &volume, is_cut, way.is_write_through, true);
            volume.abandon();
            looked.map(|()| None)
        }
    }
}

/// Whatever is still given is right.
fn check_rotten(volume: &Arc<Volume>, model: &Model) -> Result<(), String> {
    for info in volume.epochs().map_err(|e| format!("listing: {e}"))? {
        let known = model.snapshots.get(&info.epoch).filter(|s| s.is_certain());
        if let (Some(selection), Some(snapshot)) = (&info.state.selection, known) {
            let both = selection.intersection(&snapshot.selection);
            let found = read_snapshot(volume, info.epoch, model, &both, true)?;
            model.check_snapshot(info.epoch, &found)?;
        }
    }
    Ok(())
}

fn verify(
    machine: &Machine,
    volume: &Arc<Volume>,
    is_cut: bool,
    is_write_through: bool,
    may_fail: bool,
) -> Result<(), String> {
    let mut model = machine.model().clone();
    let known = volume.epochs().map_err(|e| format!("P6: listing snapshots: {e}"))?;
    let listed: BTreeSet<u32> = known.iter().map(|e| e.epoch).collect();
    let new: Vec<u32> =
        listed.iter().copied().filter(|e| !model.snapshots.contains_key(e)).collect();
    ensure!(new.len() <= 1, "P10: epochs nobody asked for: {new:?}");
    match (new.first(), model.restoring.take(), model.taken()) {
        (None, ..) => {}
        (Some(&epoch), Some(restore), _) => model.restored(&restore, epoch)?,
        (Some(&epoch), None, Some(snapshot)) => model.add(epoch, snapshot)?,
        (Some(&epoch), None, None) => return Err(format!("P10: epoch {epoch} out of nowhere")),
    }
    let epochs: Vec<u32> = model.snapshots.keys().copied().collect();
    for epoch in epochs {
        let info = known.iter().find(|e| e.epoch == epoch);
        let snapshot = model.snapshots.get_mut(&epoch).expect("listed");
        let has_snapshot = info.is_some_and(|i| i.state.selection.is_some());
        let has_bookmark = info.is_some_and(|i| i.state.bookmark.is_some());
        let wanted = !snapshot.is_deleted;
        ensure!(
            has_snapshot == wanted || (wanted && snapshot.is_deleting),
            "P6: snapshot {epoch} is {}there",
            if has_snapshot { "" } else { "not " }
        );
        let wants_bookmark = snapshot.bookmark.is_some();
        let is_between =
            if wants_bookmark { snapshot.is_bookmark_deleting } else { snapshot.is_bookmarking };
        ensure!(
            has_bookmark == wants_bookmark || is_between,
            "P6: bookmark {epoch} is {}there",
            if has_bookmark { "" } else { "not " }
        );
        if let Some(info) = info {
            ensure!(
                info.state.suspect.is_empty() || may_fail,
                "P2: snapshot {epoch} is suspect, and no fault: {}",
                info.state.suspect
            );
            ensure!(
                info.lost.is_empty() || may_fail,
                "P2: snapshot {epoch} lost {:?}, and no fault",
                info.lost
            );
            if let Some(selection) = &info.state.selection {
                let narrowed = snapshot.narrowing.take();
                let is_narrowed = narrowed.as_ref() == Some(&**selection);
                ensure!(
                    **selection == snapshot.selection || is_narrowed,
                    "P10: snapshot {epoch} selects {selection:?}, was told {:?}",
                    snapshot.selection
                );
                let note = &info.state.meta;
                ensure!(
                    *note == note_of(selection)
                        || (note.is_empty() && **selection == snapshot.selection),
                    "P10: snapshot {epoch} selects {selection:?}, and says it of something else"
                );
                snapshot.selection = (**selection).clone();
            }
        }
        let bookmark = info.and_then(|i| i.state.bookmark.as_ref());
        if let (Some(bookmark), Some(baseline)) = (bookmark, &snapshot.bookmark) {
            ensure!(
                *bookmark.baseline == *baseline,
                "P5: bookmark {epoch} tracks {:?}, was told {baseline:?}",
                bookmark.baseline
            );
        }
        snapshot.bookmark = bookmark.map(|b| (*b.baseline).clone());
        snapshot.is_deleted = !has_snapshot;
        (snapshot.is_deleting, snapshot.is_bookmarking) = (false, false);
        (snapshot.is_bookmark_deleting, snapshot.narrowing) = (false, None);
        model.forget_if_gone(epoch);
    }
    let live = read_live(volume)?;
    model.check_live(&live, is_cut)?;
    check_snapshots(volume, &mut model, may_fail)?;
    model.settle(&live, is_cut);
    clones::verify(volume, &mut model, is_cut, may_fail)?;
    if !may_fail {
        clones::check_files(machine, volume)?;
    }
    if is_write_through {
        model.lose_all_bits();
    }
    check_changed(volume, &model, &live, may_fail)?;
    check_store(machine, volume, may_fail)?;
    model.creating = None;
    *machine.model() = model;
    Ok(())
}

/// Every snapshot gives what it must; from now on the same.
pub fn check_snapshots(
    volume: &Arc<Volume>,
    model: &mut Model,
    may_fail: bool,
) -> Result<(), String> {
    let snapshots = model.snapshots.iter().filter(|(_, s)| s.is_certain());
    let snapshots: Vec<(u32, ExtentSet)> =
        snapshots.map(|(&epoch, s)| (epoch, s.selection.clone())).collect();
    for (epoch, selection) in snapshots {
        let found = read_snapshot(volume, epoch, model, &selection, may_fail)?;
        model.check_snapshot(epoch, &found)?;
        model.pin(epoch, &found);
    }
    Ok(())
}

/// Changed sets miss nothing, and have nothing that was never written. Nobody writes meanwhile.
pub fn check_changed(
    volume: &Volume,
    model: &Model,
    live: &[u32],
    may_fail: bool,
) -> Result<(), String> {
    let all: Vec<u32> = model.snapshots.keys().copied().collect();
    for (index, &since) in all.iter().enumerate() {
        let from = &model.snapshots[&since];
        let none = ExtentSet::new();
        let selected = if from.is_deleted { &none } else { &from.selection };
        let tracked = from.bookmark.as_ref().unwrap_or(&none).union(selected);
        let until = all[index + 1..].iter().copied().filter(|e| {
            let to = &model.snapshots[e];
            to.pinned.is_some() && !to.is_deleted
        });
        for until in until.map(Some).chain([None]) {
            let content = match until {
                Some(epoch) => model.snapshots[&epoch].pinned.as_ref().expect("filtered"),
                None => live,
            };
            let changed = volume.changed(since, until);
            let changed = changed.map_err(|e| format!("P5: changed since {since}: {e}"))?;
            for block in model.differing(since, &tracked, content) {
                ensure!(
                    changed.contains(block),
                    "P5: block {block} differs from {since} to {until:?} and is not in {changed:?}"
                );
            }
            for block in changed.iter().flat_map(|e| e.start..e.end) {
                ensure!(
                    model.may_have_changed(since, until, block) || may_fail,
                    "P5: block {block} was not written from {since} to {until:?} and is in \
                     {changed:?}"
                );
            }
        }
    }
    Ok(())
}

/// What the journal, all segments and index files take, what is allocated ahead included.
fn allocated(machine: &Machine) -> u64 {
    let world = machine.world();
    let (store, log) = (Path::new(STORE), Path::new(LOG));
    let is_kept = |name: &String| segment_number(name).is_some() || run_number(name).is_some();
    let kept = world.list(log).into_iter().filter(is_kept);
    let kept = kept.map(|name| world.find(log, &name).expect("listed"));
    let of_clones = store.join(CLONES_DIRECTORY);
    let clones = world.list(&of_clones).into_iter();
    let clones = clones.map(|name| world.find(&of_clones, &name).expect("listed"));
    let files: Vec<u64> = kept.chain(world.find(store, JOURNAL_NAME)).chain(clones).collect();
    files.into_iter().map(|id| machine.allocated(&world, id)).sum()
}

/// Nothing is orphaned. The committer may go on meanwhile, so the two are compared until they agree.
fn check_store(machine: &Machine, volume: &Volume, may_fail: bool) -> Result<(), String> {
    const TRIES: usize = 20;
    // What goes on behind everything else is done, or files go while they are counted.
    let is_kept_up = volume.maintain(Effort::Due);
    ensure!(is_kept_up.is_ok() || may_fail, "P10: upkeep: {is_kept_up:?}");
    let names = machine.world().list(Path::new(STORE));
    ensure!(names == [JOURNAL_NAME] || may_fail, "P10: {names:?} in the store");
    let mut seen = (0, 0);
    for _ in 0..TRIES {
        let on_disk = allocated(machine);
        let usage = volume.store_usage().map_err(|e| format!("P10: store: {e}"))?;
        let told = usage.used_bytes + usage.ahead_bytes;
        if told == on_disk || may_fail {
            return Ok(());
        }
        seen = (on_disk, told);
    }
    Err(format!("P10: {} bytes of the store on the disk, {} accounted for", seen.0, seen.1))
}

/// P3: of no block and epoch are there two copies.
pub fn check_kept_once(machine: &Arc<Machine>, volume: &Volume) -> Result<(), String> {
    let segments = Segments::new(SimHost(Arc::clone(machine)).directory(Path::new(LOG)));
    let found = scan(&segments, volume.uuid(), volume.block_size(), &ExtentSet::new());
    let found = found.map_err(|e| format!("reading the log: {e}"))?;
    let mut seen = BTreeSet::new();
    for batch in &found.batches {
        for (block, ..) in batch.preserved(volume.block_size()) {
            ensure!(
                seen.insert((batch.header.epoch, block)),
                "P3: block {block} is kept twice in epoch {}",
                batch.header.epoch
            );
        }
    }
    Ok(())
}

/// P10: behind the last batch of a segment nothing is left of one that was torn. What it held is in
/// no index, and nobody would remove it when it is let go of.
fn check_tails(machine: &Arc<Machine>, volume: &Volume) -> Result<(), String> {
    let segments = Segments::new(SimHost(Arc::clone(machine)).directory(Path::new(LOG)));
    let found = scan(&segments, volume.uuid(), volume.block_size(), &ExtentSet::new());
    let found = found.map_err(|e| format!("reading the log: {e}"))?;
    for segment in found.segments.values() {
        let number = segment.header.segment;
        let batches = found.batches.iter().filter(|batch| batch.segment == number);
        let ends = batches.map(|batch| batch.page + batch.header.total_pages());
        let end = ends.max().unwrap_or(segment.header.data_start_page()) * 4096;
        let name = segment_name(number);
        let world = machine.world();
        let id = world.find(Path::new(LOG), &name).ok_or("a segment went away")?;
        let bytes = &world.medium(id).now;
        let mut rest = vec![0; size(bytes.length().saturating_sub(end))];
        bytes.read(end, &mut rest).map_err(|e| format!("reading {name}: {e}"))?;
        let left = rest.iter().position(|&byte| byte != 0);
        ensure!(left.is_none(), "P10: {name} holds something {left:?} bytes behind its end, {end}");
    }
    Ok(())
}

/// What is right after a stop goes on being right: write, snapshot, close, open, look.
fn go_on(
    machine: &Arc<Machine>,
    volume: &Arc<Volume>,
    way: Way,
    may_fail: bool,
) -> Result<(), String> {
    let told = |what: &'static str| move |e| format!("after a stop, {what} fails: {e}");
    let cells = 0..(machine.model().cell_count()).min(20);
    let value = machine.model().begin_write(cells.clone(), false).expect("nobody writes");
    let data = bytes(cells.clone().map(|_| value));
    volume.write(0, &data, false).map_err(told("a write"))?;
    machine.model().end_write(cells, false);
    if !may_fail {
        clones::go_on(machine, volume)?;
    }
    let selection = machine.model().all_blocks();
    machine.model().begin_snapshot(selection.clone());
    let taken = volume.snapshot(SnapshotRequest {
        selection,
        low: ExtentSet::new(),
        meta: Vec::new(),
        pause_limit: LONG,
    });
    match taken {
        Ok(taken) => {
            let snapshot = machine.model().taken().expect("begun");
            machine.model().add(taken.epoch, snapshot)?;
        }
        Err(_) if may_fail => machine.model().creating = None,
        Err(error) => return Err(format!("after a stop, a snapshot fails: {error}")),
    }
    volume.close().map_err(told("closing"))?;
    let again = open(machine, way)?;
    let live = read_live(&again)?;
    let mut model = machine.model().clone();
    model.check_live(&live, false)?;
    check_snapshots(&again, &mut model, may_fail)?;
    check_changed(&again, &model, &live, may_fail)?;
    check_store(machine, &again, may_fail)?;
    if !may_fail {
        check_kept_once(machine, &again)?;
    }
    if may_fail {
        // A restore may never end if its source is lost.
        return again.close().map_err(told("closing"));
    }
    clones::verify(&again, &mut model, false, may_fail)?;
    *machine.model() = model.clone();
    // Without snapshots there is nothing to keep.
    if !may_fail {
        clones::drop_all(machine, &again)?;
    }
    let all: Vec<(u32, bool, bool)> = model
        .snapshots
        .iter()
        .map(|(&epoch, s)| (epoch, s.is_deleted, s.bookmark.is_some()))
        .collect();
    again.wait_restored(LONG).map_err(told("a restore"))?;
    for (epoch, is_deleted, has_bookmark) in all {
        if has_bookmark {
            again.delete_bookmark(epoch).map_err(told("deleting a bookmark"))?;
        }
        if !is_deleted {
            again.delete_snapshot(epoch, false).map_err(told("a deletion"))?;
        }
    }
    let kept = again.store_bytes().map_err(told("looking at the store"))?;
    ensure!(kept == 0, "P10: {kept} bytes of log are kept for nobody");
    again.close().map_err(told("closing"))
}

/// What the store holds, for a failure's story.
pub fn describe(machine: &Arc<Machine>) -> String {
    use std::fmt::Write;
    let host = SimHost(Arc::clone(machine));
    let mut text = String::new();
    if let Ok((_, entries)) =
        stillblock_core::journal::Journal::open(host.directory(Path::new(crate::machine::STORE)))
    {
        for entry in entries {
            let _ = writeln!(text, "  journal {entry:?}");
        }
    }
    let segments = Segments::new(host.directory(Path::new(LOG)));
    let names = machine.world().list(Path::new(LOG));
    let _ = writeln!(text, "  files {names:?}");
    for name in &names {
        let file = host.directory(Path::new(LOG)).open(name).expect("listed");
        let length = file.len().unwrap_or_default();
        for page in 0..length.div_ceil(4096) {
            let mut b = [0; 28];
            let _ = file.read_at(page * 4096, &mut b);
            let _ =
                writeln!(text, "  {name} page {page}/{length} {:?}", String::from_utf8_lossy(&b));
        }
    }
    match scan(&segments, UUID, 4096, &ExtentSet::new()) {
        Ok(found) => {
            for (number, s) in &found.segments {
                let _ = writeln!(text, "  segment {number} {:?}", s.header);
            }
            for b in &found.batches {
                let _ = writeln!(
                    text,
                    "  batch seg {} page {} {:?} {:?}",
                    b.segment, b.page, b.header.sequence, b.descriptors
                );
            }
            let _ = writeln!(
                text,
                "  damaged {:?} unfinished {:?} unreadable {:?} missing {:?} end {:?}",
                found.damaged, found.unfinished, found.unreadable, found.missing, found.end
            );
        }
        Err(error) => {
            let _ = writeln!(text, "  log {error}");
        }
    }
    text
}

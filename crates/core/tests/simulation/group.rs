//! Two volumes with one instant: both have its snapshot, or neither has, after a stop at every step.
//!
//! Each client writes to one volume, waits until that is acknowledged, then writes to the other, and
//! so on, with growing values. So at any one moment the two differ by one.

use crate::check::{Stops, Tally, Way, request};
use crate::dice::Dice;
use crate::machine::{FaultPlan, Machine, ORIGIN, STORE, SimHost, Stop, Target};
use crate::model::Model;
use crate::program::{Faults, pick_quiet};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use stillblock_core::buffer::{Arena, ArenaSize, BufferIdentity, LeftBuffer};
use stillblock_core::error::{Error, Result as EngineResult};
use stillblock_core::extent::{Extent, ExtentSet};
use stillblock_core::storage::Directory;
use stillblock_core::view::{ExcludedReads, View};
use stillblock_core::volume::host::{Held, Host, OriginDevice};
use stillblock_core::volume::open::{CreateRequest, OpenRequest, Recover, create_on, open_on};
use stillblock_core::volume::{
    Effort, GroupMoment, Member, Quiet, SnapshotRequest, StorePolicy, Volume, snapshot_group,
};

const STORES: [&str; 2] = [STORE, "/other"];
const ORIGINS: [&str; 2] = [ORIGIN, "/other.img"];
const CLIENTS: usize = 3;
const BLOCK: usize = 4096;
const LONG: Duration = Duration::from_secs(60);
/// Most that an opening is stopped at for one stop.
const NESTED_MAX: usize = 4;

/// What a client of both volumes did: its block has this value there.
#[derive(Clone, Copy, Debug, Default)]
struct Turn {
    issued: [u32; 2],
    acked: [u32; 2],
}

/// A group of snapshots.
#[derive(Clone, Debug)]
struct Taken {
    /// By client and volume, what must be in, and what may be.
    low: [[u32; 2]; CLIENTS],
    high: [[u32; 2]; CLIENTS],
    epochs: Option<[u32; 2]>,
    /// Volumes that are told to let it go.
    deleting: [bool; 2],
    /// What it was seen to hold.
    pinned: Option<[[u32; 2]; CLIENTS]>,
}

/// What the clients of two volumes did and were told.
#[derive(Clone, Debug, Default)]
pub struct Pair {
    turns: [Turn; CLIENTS],
    groups: Vec<Taken>,
    creating: Option<Taken>,
}

impl Pair {
    fn values(&self, of: impl Fn(&Turn) -> [u32; 2]) -> [[u32; 2]; CLIENTS] {
        let mut values = [[0; 2]; CLIENTS];
        for (value, turn) in values.iter_mut().zip(&self.turns) {
            *value = of(turn);
        }
        values
    }
}

impl Taken {
    /// Is this of one moment, and of the right one?
    fn check(&self, found: &[[u32; 2]; CLIENTS]) -> Result<(), String> {
        for (client, values) in found.iter().enumerate() {
            let [a, b] = *values;
            if a.abs_diff(b) > 1 {
                return Err(format!("P2: of no one moment: client {client} has {a} and {b}"));
            }
            let ranges = self.low[client].iter().zip(&self.high[client]);
            for (value, (low, high)) in values.iter().zip(ranges) {
                if value < low || value > high {
                    return Err(format!(
                        "P2: client {client} has {value}, may have {low} to {high}"
                    ));
                }
            }
        }
        match &self.pinned {
            Some(pinned) if pinned != found => {
                Err(format!("P2: a group gives {found:?}, gave {pinned:?}"))
            }
            _ => Ok(()),
        }
    }
}

/// The machine without some path: the other store is elsewhere.
struct Without(SimHost, &'static str);

impl Host for Without {
    fn boot_id(&self) -> EngineResult<[u8; 16]> {
        self.0.boot_id()
    }
    fn random(&self) -> EngineResult<[u8; 16]> {
        self.0.random()
    }
    fn directory(&self, path: &Path) -> Arc<dyn Directory> {
        self.0.directory(if path == Path::new(self.1) { Path::new("/nowhere") } else { path })
    }
    fn make_directory(&self, path: &Path) -> io::Result<()> {
        self.0.make_directory(path)
    }
    fn lock_store(&self, store: &Path) -> EngineResult<Held> {
        self.0.lock_store(store)
    }
    fn open_origin(&self, path: &Path, direct: bool) -> EngineResult<Arc<dyn OriginDevice>> {
        self.0.open_origin(path, direct)
    }
    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        self.0.canonical(path)
    }
    fn default_buffer_dir(&self) -> Option<PathBuf> {
        self.0.default_buffer_dir()
    }
    fn new_buffer(
        &self,
        path: &Path,
        size: ArenaSize,
        identity: &BufferIdentity,
    ) -> io::Result<Arc<Arena>> {
        self.0.new_buffer(path, size, identity)
    }
    fn left_buffer(&self, path: &Path) -> io::Result<Option<Result<LeftBuffer, u32>>> {
        self.0.left_buffer(path)
    }
    fn note_replaying(&self, path: &Path, unix_ns: u64) -> io::Result<()> {
        self.0.note_replaying(path, unix_ns)
    }
}

fn open_one(host: Arc<dyn Host>, at: usize, way: Way) -> EngineResult<Arc<Volume>> {
    let asked = |recover| OpenRequest { store: STORES[at].into(), ..request(way, recover) };
    match open_on(Arc::clone(&host), asked(Recover::Refuse)) {
        Err(Error::RecoveryNeeded(_)) if way.has_faults => open_on(host, asked(Recover::Replay)),
        other => other,
    }
}

fn open(machine: &Arc<Machine>, way: Way, is_reversed: bool) -> Result<[Arc<Volume>; 2], String> {
    let one = |at| {
        let host = Arc::new(SimHost(Arc::clone(machine)));
        open_one(host, at, way).map_err(|e| format!("opening {at} fails: {e}"))
    };
    if is_reversed {
        let last = one(1)?;
        Ok([one(0)?, last])
    } else {
        Ok([one(0)?, one(1)?])
    }
}

fn whole() -> ExtentSet {
    ExtentSet::from_extent(Extent::new(0, CLIENTS as u64))
}

fn write(machine: &Machine, volumes: &[Arc<Volume>; 2], client: usize) -> Result<bool, String> {
    let (at, value) = {
        let mut pair = machine.pair();
        let turn = &mut pair.turns[client];
        let at = usize::from(turn.acked[0] > turn.acked[1]);
        let value = turn.acked[1 - at] + 1;
        turn.issued[at] = value;
        (at, value)
    };
    let content = value.to_le_bytes().repeat(BLOCK / 4);
    let written = volumes[at].write((client * BLOCK) as u64, &content, false);
    machine.tell(|| format!("client {client} writes {value} to {at}: {written:?}"));
    match written {
        Ok(()) => machine.pair().turns[client].acked[at] = value,
        Err(_) if machine.has_met_faults() => return Ok(false),
        Err(error) => return Err(format!("a write fails, and no fault: {error}")),
    }
    Ok(true)
}

fn snapshot_both(
    machine: &Machine,
    volumes: &[Arc<Volume>; 2],
    id: u8,
    holds: Quiet,
    objects: bool,
) -> Result<(), String> {
    // What somebody objects to never was, at any step.
    if !objects {
        let mut pair = machine.pair();
        let low = pair.values(|turn| turn.acked);
        let high = [[u32::MAX; 2]; CLIENTS];
        let (epochs, deleting, pinned) = (None, [false; 2], None);
        pair.creating = Some(Taken { low, high, epochs, deleting, pinned });
    }
    let member = |volume: &Arc<Volume>| Member {
        volume: Arc::clone(volume),
        request: SnapshotRequest {
            selection: whole(),
            low: ExtentSet::new(),
            meta: vec![id],
            pause_limit: LONG,
        },
        quiet: None,
        holds,
    };
    let moment = GroupMoment {
        passed: None,
        objects: Some(Box::new(move || objects.then(|| "it was thawed too early".to_owned()))),
    };
    let taken = snapshot_group([id; 16], volumes.iter().map(member).collect(), moment);
    machine.tell(|| format!("group {id}: {taken:?}"));
    if objects {
        return match taken {
            Err(Error::NotHeld(_)) => Ok(()),
            Err(_) if machine.has_met_faults() => Ok(()),
            other => Err(format!("somebody objected: {other:?}")),
        };
    }
    let mut pair = machine.pair();
    let high = pair.values(|turn| turn.issued);
    let mut group = pair.creating.take().ok_or("begun")?;
    group.high = high;
    match taken {
        Ok(instants) => {
            group.epochs = Some([instants[0].epoch, instants[1].epoch]);
            pair.groups.push(group);
        }
        // It may have come all the same, to both.
        Err(_) if machine.has_met_faults() => pair.creating = Some(group),
        Err(error) => return Err(format!("a group fails, and no fault: {error}")),
    }
    Ok(())
}

fn delete(machine: &Machine, volumes: &[Arc<Volume>; 2], dice: &mut Dice) -> Result<(), String> {
    let at = dice.below(2);
    let found = {
        let mut pair = machine.pair();
        let count = pair.groups.len();
        pair.groups.get_mut(dice.below(count)).filter(|group| !group.deleting[at]).map(|group| {
            group.deleting[at] = true;
            group.epochs.expect("taken")[at]
        })
    };
    let Some(epoch) = found else { return Ok(()) };
    match volumes[at].delete_snapshot(epoch, false) {
        Err(error) if !machine.has_met_faults() => Err(format!("a deletion fails: {error}")),
        _ => Ok(()),
    }
}

/// The journal is written anew, among others.
fn keep_up(machine: &Machine, volumes: &[Arc<Volume>; 2], dice: &mut Dice) -> Result<(), String> {
    match volumes[dice.below(2)].maintain(Effort::All) {
        Err(error) if !machine.has_met_faults() => Err(format!("upkeep fails: {error}")),
        _ => Ok(()),
    }
}

/// Clients and a keeper, until all are done.
fn session(
    machine: &Arc<Machine>,
    volumes: &[Arc<Volume>; 2],
    dice: &mut Dice,
    first_id: u8,
) -> Result<(), String> {
    let problems: Arc<std::sync::Mutex<Vec<String>>> = Arc::default();
    let mut threads = Vec::new();
    for client in 0..CLIENTS {
        let (machine, volumes) = (Arc::clone(machine), volumes.clone());
        let (problems, mut dice) = (Arc::clone(&problems), dice.fork());
        threads.push(shuttle::thread::spawn(move || {
            for _ in 0..8 {
                if dice.chance(15) {
                    // With faults the next write tells as well.
                    let _ = volumes[dice.below(2)].flush();
                }
                match write(&machine, &volumes, client) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(why) => problems.lock().expect("no panic").push(why),
                }
            }
        }));
    }
    for step in 0..4 {
        let pending = machine.pair().creating.is_some();
        let done = match dice.below(100) {
            0..60 if !pending => {
                let objects = dice.chance(20);
                snapshot_both(machine, volumes, first_id + step, pick_quiet(dice), objects)
            }
            60..75 => keep_up(machine, volumes, dice),
            _ => delete(machine, volumes, dice),
        };
        if let Err(why) = done {
            problems.lock().expect("no panic").push(why);
            break;
        }
    }
    for thread in threads {
        thread.join().map_err(|_| "a client panicked")?;
    }
    let first = problems.lock().expect("no panic").first().cloned();
    first.map_or(Ok(()), Err)
}

/// Snapshots by what is written beside them: the epoch, and why they are undecided.
fn listed(volume: &Volume) -> Result<BTreeMap<u32, (u8, String)>, String> {
    let known = volume.epochs().map_err(|e| format!("listing: {e}"))?;
    let there = known.into_iter().filter(|info| info.state.selection.is_some());
    Ok(there
        .map(|info| {
            let id = info.state.meta.first().copied().unwrap_or_default();
            (info.epoch, (id, info.state.undecided))
        })
        .collect())
}

/// The value of each client's block; nothing if one cannot be given.
fn values(volume: &Arc<Volume>, epoch: u32, may_fail: bool) -> Result<Option<Vec<u32>>, String> {
    let view = match View::open(volume, epoch, ExcludedReads::Error) {
        Ok(view) => view,
        Err(error) => return Err(format!("snapshot {epoch} cannot be opened: {error}")),
    };
    let mut values = Vec::new();
    for client in 0..CLIENTS {
        let mut content = [0; BLOCK];
        match view.read((client * BLOCK) as u64, &mut content) {
            Ok(()) => {}
            Err(_) if may_fail => return Ok(None),
            Err(error) => return Err(format!("P2: snapshot {epoch}: {error}")),
        }
        let first: [u8; 4] = content[..4].try_into().expect("four");
        if content.chunks(4).any(|part| part != first) {
            return Err(format!("P2: snapshot {epoch}: block {client} is mixed"));
        }
        values.push(u32::from_le_bytes(first));
    }
    Ok(Some(values))
}

/// Both are open: every group is whole or not there, and of one moment.
fn verify(machine: &Machine, volumes: &[Arc<Volume>; 2], may_fail: bool) -> Result<(), String> {
    let mut pair = machine.pair().clone();
    let mut there = [listed(&volumes[0])?, listed(&volumes[1])?];
    for list in &there {
        if let Some((epoch, (_, why))) = list.iter().find(|(_, (_, why))| !why.is_empty()) {
            return Err(format!("P10: {epoch} is undecided though both stores are there: {why}"));
        }
    }
    let mut groups = std::mem::take(&mut pair.groups);
    for group in &mut groups {
        let epochs = group.epochs.expect("taken");
        let mut has = [false; 2];
        for at in 0..2 {
            has[at] = there[at].remove(&epochs[at]).is_some();
            if !has[at] && !group.deleting[at] {
                return Err(format!("P6: snapshot {} of {at} is gone", epochs[at]));
            }
        }
        check_values(volumes, group, has, may_fail)?;
    }
    let [first, second] = &there;
    let ids = |list: &BTreeMap<u32, (u8, String)>| -> Vec<u8> {
        list.values().map(|(id, _)| *id).collect()
    };
    if ids(first) != ids(second) || first.len() > 1 {
        return Err(format!("P10: one has {first:?}, the other {second:?}"));
    }
    if let (Some(&a), Some(&b)) = (first.keys().next(), second.keys().next()) {
        let mut group = pair.creating.take().ok_or("P10: a group out of nowhere")?;
        let high = pair.values(|turn| turn.issued);
        for (mine, high) in group.high.iter_mut().zip(high) {
            for at in 0..2 {
                mine[at] = mine[at].min(high[at]);
            }
        }
        group.epochs = Some([a, b]);
        check_values(volumes, &mut group, [true; 2], may_fail)?;
        groups.push(group);
    }
    (pair.groups, pair.creating) = (groups, None);
    *machine.pair() = pair;
    Ok(())
}

fn check_values(
    volumes: &[Arc<Volume>; 2],
    group: &mut Taken,
    has: [bool; 2],
    may_fail: bool,
) -> Result<(), String> {
    if has != [true; 2] {
        return Ok(());
    }
    let epochs = group.epochs.expect("known");
    let a = values(&volumes[0], epochs[0], may_fail)?;
    let b = values(&volumes[1], epochs[1], may_fail)?;
    let (Some(a), Some(b)) = (a, b) else { return Ok(()) };
    let mut found = [[0; 2]; CLIENTS];
    for (client, values) in found.iter_mut().enumerate() {
        *values = [a[client], b[client]];
    }
    group.check(&found)?;
    group.pinned = Some(found);
    Ok(())
}

/// One volume is opened where the other's store is not: it is served, and what it does not know it
/// says. What is written there meanwhile is no part of any snapshot.
fn open_alone(machine: &Arc<Machine>, at: usize, way: Way, is_kept_up: bool) -> Result<(), String> {
    let host = Arc::new(Without(SimHost(Arc::clone(machine)), STORES[1 - at]));
    let volume = open_one(host, at, way).map_err(|e| format!("opening {at} alone fails: {e}"))?;
    for (epoch, (_, why)) in listed(&volume)? {
        let opened = View::open(&volume, epoch, ExcludedReads::Error);
        let is_said = matches!(opened, Err(Error::Undecided(_)));
        if is_said == why.is_empty() {
            return Err(format!("P2: snapshot {epoch} of {at}: {why:?}, and opened: {is_said}"));
        }
    }
    for client in 0..CLIENTS {
        let other = 0xEEEE_EEEE_u32.to_le_bytes().repeat(BLOCK / 4);
        let written = volume.write((client * BLOCK) as u64, &other, false);
        written.map_err(|e| format!("a write to {at} alone fails: {e}"))?;
    }
    if is_kept_up {
        volume.maintain(Effort::All).map_err(|e| format!("upkeep of {at} alone fails: {e}"))?;
    }
    volume.close().map_err(|e| format!("closing {at} alone fails: {e}"))
}

fn check(
    stop: &Stop,
    way: Way,
    dice: &mut Dice,
    depth: usize,
    tally: &mut Tally,
) -> Result<(), String> {
    tally.stops += 1;
    let is_cut = dice.chance(60);
    let machine = if is_cut { stop.cut(dice.fork()) } else { stop.killed(dice.fork()) };
    machine.tell(|| format!("STOP at depth {depth}, cut {is_cut}"));
    let may_fail = stop.had_faults;
    machine.faults_met.store(u64::from(may_fail), std::sync::atomic::Ordering::Relaxed);
    let is_nested = depth == 0 && dice.chance(15);
    if is_nested {
        machine.watch();
    }
    if dice.chance(30) {
        open_alone(&machine, dice.below(2), way, dice.chance(50))?;
    }
    let volumes = open(&machine, way, dice.chance(50))?;
    let stops = machine.take_stops();
    verify(&machine, &volumes, may_fail)?;
    for volume in &volumes {
        volume.abandon();
    }
    for _ in 0..stops.len().min(NESTED_MAX) {
        tally.nested += 1;
        check(&stops[dice.below(stops.len())], way, dice, depth + 1, tally)?;
    }
    Ok(())
}

/// Run the program of a seed.
pub fn run(seed: u64, faults: Faults, stops_max: usize) -> Result<Stops, String> {
    let mut dice = Dice::new(seed);
    let way = Way {
        is_write_through: dice.chance(15),
        has_background: dice.chance(65),
        has_faults: faults != Faults::None,
    };
    let content = vec![0; CLIENTS * BLOCK];
    let model = Model::new(content.len() as u64);
    let machine = Machine::new(&content, [5, 12, 40][dice.below(3)], model, dice.fork());
    machine.add_disk("other.img", &content);
    for store in STORES {
        machine.world().put_on_a_disk(Path::new(store));
    }
    for at in 0..2 {
        let made = create_on(
            &SimHost(Arc::clone(&machine)),
            &CreateRequest {
                policy: StorePolicy::default(),
                store: STORES[at].into(),
                origin: ORIGINS[at].into(),
                block_size: 4096,
                meta: Vec::new(),
            },
        );
        made.map_err(|e| format!("making a volume fails: {e}"))?;
    }
    machine.listen();
    let volumes = open(&machine, way, false)?;
    machine.watch();
    if way.has_faults {
        machine.plan(pick_fault(&mut dice));
    }
    session(&machine, &volumes, &mut dice, 1)?;
    machine.plan(FaultPlan::default());
    let mut stops = machine.take_stops();
    stops.push(machine.stop());
    for volume in &volumes {
        volume.abandon();
    }
    if machine.is_origin_failed.load(std::sync::atomic::Ordering::Relaxed) {
        stops.clear();
    }
    while stops.len() > stops_max {
        stops.swap_remove(dice.below(stops.len()));
    }
    Ok(Stops { way, all: stops, dice, tally: Tally::default() })
}

/// Look at some of the stops of a program.
pub fn check_all(stops: &[Stop], way: Way, mut dice: Dice) -> Result<Tally, String> {
    let mut tally = Tally::default();
    for stop in stops {
        check(stop, way, &mut dice, 0, &mut tally)?;
    }
    Ok(tally)
}

fn pick_fault(dice: &mut Dice) -> FaultPlan {
    use Target::{JournalSync, StoreNames, StoreSync, StoreWrite};
    let target = [JournalSync, JournalSync, StoreSync, StoreWrite, StoreNames][dice.below(5)];
    let first = 1 + dice.below(20) as u64;
    // Two in a row: what failed cannot be taken back at once.
    let second = if dice.chance(50) { first + 1 } else { first };
    FaultPlan { faults: vec![(target, first), (target, second)] }
}

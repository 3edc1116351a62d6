//! A fault at the n-th storage operation of a fixed program, for every n, on origin and on store.
//!
//! During and after it the client's data are right or the error is told, snapshots are exact or say
//! what they lost, a failed sync is never trusted, and once the fault is over everything goes on. A
//! sync of the store that fails takes with it what it was to make durable, as kernels do.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use stillblock_core::error::{Error, Result};
use stillblock_core::extent::{Extent, ExtentSet};
use stillblock_core::storage::{Directory, Storage};
use stillblock_core::view::{ExcludedReads, View};
use stillblock_core::volume::host::System;
use stillblock_core::volume::open::{Cache, CreateRequest, OpenRequest, Recover, create, open_on};
use stillblock_core::volume::{OnFull, RestoreRequest, SnapshotRequest, StorePolicy, Volume};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 128;
const SECTOR: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Device {
    Origin,
    Store,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// One operation fails.
    Once,
    /// It and many after it.
    Sticky,
    /// There is no space, for as long.
    NoSpace,
    /// A read ends early.
    ShortRead,
    /// It takes until the test lets it go.
    Hang,
}

/// Operations that a sticky fault lasts.
const STICKY_OPERATIONS: u64 = 25;

#[derive(Default)]
struct Plan {
    fault: Option<(Device, Kind, u64)>,
    counts: BTreeMap<bool, u64>,
    /// What the first failing operation was.
    hit: Option<&'static str>,
    is_hanging: bool,
}

#[derive(Clone, Default)]
struct World(Arc<(Mutex<Plan>, Condvar)>);

impl World {
    fn plan(&self) -> std::sync::MutexGuard<'_, Plan> {
        self.0.0.lock().expect("no panic")
    }

    fn meet(&self, device: Device, operation: &'static str) -> io::Result<()> {
        let mut plan = self.plan();
        let count = plan.counts.entry(device == Device::Origin).or_default();
        *count += 1;
        let now = *count;
        if std::env::var_os("STILLBLOCK_TRACE").is_some() {
            eprintln!("{device:?} {now} {operation}");
        }
        let Some((_, kind, first)) = plan.fault.filter(|(d, ..)| *d == device) else {
            return Ok(());
        };
        let lasts = match kind {
            Kind::Sticky | Kind::NoSpace => STICKY_OPERATIONS,
            Kind::Once | Kind::ShortRead | Kind::Hang => 1,
        };
        let grows = ["write", "allocate", "create"].contains(&operation);
        let is_meant = match kind {
            Kind::NoSpace => grows,
            Kind::ShortRead => operation == "read",
            _ => true,
        };
        if !(first..first + lasts).contains(&now) || !is_meant {
            return Ok(());
        }
        plan.hit.get_or_insert(operation);
        match kind {
            Kind::Hang => {
                plan.is_hanging = true;
                self.0.1.notify_all();
                let let_go = self.0.1.wait_while(plan, |plan| plan.is_hanging);
                drop(let_go.expect("no panic"));
                Ok(())
            }
            Kind::NoSpace => Err(io::ErrorKind::StorageFull.into()),
            Kind::ShortRead => Err(io::ErrorKind::UnexpectedEof.into()),
            Kind::Once | Kind::Sticky => Err(io::Error::other("a fault of the test")),
        }
    }

    fn end(&self) {
        let mut plan = self.plan();
        plan.fault = None;
        plan.is_hanging = false;
        self.0.1.notify_all();
    }
}

/// What a write that was not synced replaced.
struct Undo {
    offset: u64,
    content: Vec<u8>,
    length: u64,
}

struct Faulty {
    inner: Arc<dyn Storage>,
    device: Device,
    world: World,
    unsynced: Mutex<Vec<Undo>>,
}

impl Faulty {
    fn note(&self, offset: u64, length: usize) -> io::Result<()> {
        if self.device == Device::Store {
            let end = self.inner.len()?;
            let known = end.saturating_sub(offset).min(length as u64);
            let mut content = vec![0; usize::try_from(known).expect("small")];
            self.inner.read_at(offset, &mut content)?;
            let undo = Undo { offset, content, length: end };
            self.unsynced.lock().expect("no panic").push(undo);
        }
        Ok(())
    }

    /// The kernel drops what it could not write, and calls it clean.
    fn drop_unsynced(&self) -> io::Result<()> {
        for undo in self.unsynced.lock().expect("no panic").drain(..).rev() {
            self.inner.write_at(undo.offset, &undo.content)?;
            self.inner.set_len(undo.length)?;
        }
        Ok(())
    }
}

impl Storage for Faulty {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.world.meet(self.device, "read")?;
        self.inner.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.world.meet(self.device, "write")?;
        self.note(offset, data.len())?;
        self.inner.write_at(offset, data)
    }
    fn zero_at(&self, offset: u64, length: u64, may_punch: bool) -> io::Result<()> {
        self.world.meet(self.device, "zero")?;
        self.inner.zero_at(offset, length, may_punch)
    }
    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.world.meet(self.device, "discard")?;
        self.inner.discard_at(offset, length)
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.world.meet(self.device, "allocate")?;
        self.inner.allocate(offset, length)
    }
    fn release_ahead(&self, offset: u64, length: u64) {
        self.inner.release_ahead(offset, length);
    }
    fn sync(&self) -> io::Result<()> {
        if let Err(error) = self.world.meet(self.device, "sync") {
            self.drop_unsynced()?;
            return Err(error);
        }
        self.inner.sync()?;
        self.unsynced.lock().expect("no panic").clear();
        Ok(())
    }
    fn next_data(&self, offset: u64, end: u64) -> io::Result<u64> {
        self.world.meet(self.device, "next_data")?;
        self.inner.next_data(offset, end)
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.world.meet(self.device, "allocated")?;
        self.inner.allocated_bytes()
    }
    fn set_len(&self, length: u64) -> io::Result<()> {
        self.world.meet(self.device, "set_len")?;
        self.inner.set_len(length)
    }
}

struct FaultyDirectory(Arc<dyn Directory>, World);

impl FaultyDirectory {
    fn wrap(&self, inner: Arc<dyn Storage>) -> Arc<dyn Storage> {
        let (world, unsynced) = (self.1.clone(), Mutex::default());
        Arc::new(Faulty { inner, device: Device::Store, world, unsynced })
    }
}

impl Directory for FaultyDirectory {
    fn open(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        self.1.meet(Device::Store, "open")?;
        Ok(self.wrap(self.0.open(name)?))
    }
    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        self.1.meet(Device::Store, "create")?;
        Ok(self.wrap(self.0.create(name)?))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.1.meet(Device::Store, "rename")?;
        self.0.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.1.meet(Device::Store, "remove")?;
        self.0.remove(name)
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.1.meet(Device::Store, "list")?;
        self.0.list()
    }
    fn sync(&self) -> io::Result<()> {
        self.1.meet(Device::Store, "sync")?;
        self.0.sync()
    }
    fn free_bytes(&self) -> io::Result<u64> {
        self.0.free_bytes()
    }
}

/// By sector: what it may hold.
type May = Vec<BTreeSet<u8>>;

struct Run {
    dir: PathBuf,
    world: World,
    volume: Option<Arc<Volume>>,
    has_background: bool,
    live: May,
    snapshots: BTreeMap<u32, May>,
    /// Deletions that failed: they may have happened.
    maybe_gone: BTreeSet<u32>,
    /// What the disk held at instants that failed: if they could not be undone in this process, they
    /// may have come.
    in_doubt: Vec<May>,
    next: u8,
    what: String,
}

fn everything() -> ExtentSet {
    ExtentSet::from_extent(Extent::new(0, BLOCKS))
}

impl Run {
    fn new(dir: &Path, world: World, has_background: bool, on_full: OnFull, what: String) -> Self {
        let size = usize::try_from(BLOCKS).expect("small") * BLOCK;
        std::fs::write(dir.join("disk.img"), vec![1; size]).expect("origin");
        create(&CreateRequest {
            store: dir.join("store"),
            origin: dir.join("disk.img"),
            block_size: 4096,
            meta: Vec::new(),
            policy: StorePolicy { on_full, limit_bytes: 0 },
        })
        .expect("create");
        Self {
            dir: dir.to_path_buf(),
            world,
            volume: None,
            has_background,
            live: vec![BTreeSet::from([1]); size / SECTOR],
            snapshots: BTreeMap::new(),
            maybe_gone: BTreeSet::new(),
            in_doubt: Vec::new(),
            next: 1,
            what,
        }
    }

    fn try_open(&self, recover: Recover) -> Result<Arc<Volume>> {
        let (world, more) = (self.world.clone(), self.world.clone());
        let host = System::through(
            Box::new(move |inner| {
                let (world, unsynced) = (world.clone(), Mutex::default());
                Arc::new(Faulty { inner, device: Device::Origin, world, unsynced })
            }),
            Box::new(move |_, inner| Arc::new(FaultyDirectory(inner, more.clone()))),
        );
        let request = OpenRequest {
            store: self.dir.join("store"),
            origin: None,
            cache: Cache::WriteBack,
            direct: false,
            buffer_dir: Some(self.dir.clone()),
            buffer_bytes: 4 << 20,
            recover,
            has_background: self.has_background,
            peers: Vec::new(),
        };
        open_on(Arc::new(host), request)
    }

    /// With the fault if need be twice, then without.
    fn open(&mut self) {
        let mut opened = self.try_open(Recover::Refuse);
        for _ in 0..2 {
            if opened.is_err() {
                opened = self.try_open(Recover::Replay);
            }
        }
        if opened.is_err() {
            self.world.end();
            opened = self.try_open(Recover::Replay);
        }
        let volume = opened.unwrap_or_else(|e| panic!("{}: does not open: {e}", self.what));
        self.volume = Some(volume);
    }

    fn volume(&self) -> &Arc<Volume> {
        self.volume.as_ref().expect("open")
    }

    /// A change of sectors; that fails, it may be there in parts.
    fn change(&mut self, first: usize, count: usize, byte: u8, done: &Result<()>) {
        for sector in &mut self.live[first..first + count] {
            if done.is_ok() {
                sector.clear();
            }
            sector.insert(byte);
        }
    }

    fn write(&mut self, first: usize, count: usize) {
        self.next += 1;
        let (at, data) = ((first * SECTOR) as u64, vec![self.next; count * SECTOR]);
        let done = self.volume().write(at, &data, false);
        self.change(first, count, self.next, &done);
    }

    fn zero(&mut self, first: usize, count: usize) {
        let (at, length) = ((first * SECTOR) as u64, (count * SECTOR) as u64);
        let done = self.volume().write_zeroes(at, length, true, false);
        self.change(first, count, 0, &done);
    }

    fn snapshot(&mut self) -> Option<u32> {
        let taken = self.volume().snapshot(SnapshotRequest {
            selection: everything(),
            low: ExtentSet::new(),
            meta: Vec::new(),
            pause_limit: Duration::from_secs(20),
        });
        let Ok(taken) = taken else {
            self.in_doubt.push(self.live.clone());
            return None;
        };
        let epoch = taken.epoch;
        self.snapshots.insert(epoch, self.live.clone());
        Some(epoch)
    }

    fn restore(&mut self, source: u32) {
        let started = self.volume().restore(&RestoreRequest {
            source_epoch: source,
            request: everything(),
            safety_selection: everything(),
            safety_low: ExtentSet::new(),
            meta: Vec::new(),
            pause_limit: Duration::from_secs(20),
        });
        let Ok(started) = started else {
            self.in_doubt.push(self.live.clone());
            for (sector, then) in self.live.iter_mut().zip(&self.snapshots[&source]) {
                sector.extend(then);
            }
            return;
        };
        self.snapshots.insert(started.safety_epoch, self.live.clone());
        let lost = self.lost(source);
        for (at, sector) in self.live.iter_mut().enumerate() {
            let then = &self.snapshots[&source][at];
            if lost.contains((at * SECTOR / BLOCK) as u64) {
                sector.extend(then);
            } else {
                sector.clone_from(then);
            }
        }
        // What the fault stops goes on when it is over.
        let _ = self.volume().wait_restored(Duration::from_millis(200));
    }

    fn delete(&mut self, epoch: u32) {
        if self.volume().delete_snapshot(epoch, true).is_ok() {
            self.snapshots.remove(&epoch);
        } else {
            self.maybe_gone.insert(epoch);
        }
    }

    fn lost(&self, epoch: u32) -> ExtentSet {
        let all = self.volume().epochs().expect("listed");
        all.into_iter().find(|e| e.epoch == epoch).map(|e| e.lost).unwrap_or_default()
    }

    fn program(&mut self) {
        self.open();
        self.write(0, 64);
        let first = self.snapshot();
        self.write(0, 32);
        self.write(50, 3); // parts of a block
        let _ = self.volume().flush();
        let second = self.snapshot();
        self.write(8, 16);
        self.zero(16, 24);
        self.write(40 * 8, 80 * 8); // past the buffer
        let _ = self.volume().flush();
        if let Some(first) = first.filter(|e| self.snapshots.contains_key(e)) {
            self.restore(first);
        }
        self.write(4, 9);
        if let Some(second) = second {
            self.delete(second);
        }
        self.write(90 * 8, 8);
        let closed = self.volume().close();
        if closed.is_err() {
            self.volume().abandon();
        }
        self.volume = None;
        self.open();
        self.write(0, 8);
        self.write(100 * 8, 8);
        let _ = self.volume().flush();
    }

    /// Everything that can be read is right; what cannot is said to be lost.
    fn check(&mut self) {
        let known: BTreeSet<u32> =
            self.volume().epochs().expect("listed").iter().map(|e| e.epoch).collect();
        for epoch in std::mem::take(&mut self.maybe_gone) {
            if !known.contains(&epoch) {
                self.snapshots.remove(&epoch);
            }
        }
        for &epoch in known.iter().filter(|_| !self.in_doubt.is_empty()) {
            self.snapshots.entry(epoch).or_insert_with(|| {
                let mut all = self.in_doubt[0].clone();
                for may in &self.in_doubt {
                    all.iter_mut().zip(may).for_each(|(all, may)| all.extend(may));
                }
                all
            });
        }
        let told: BTreeSet<u32> = self.snapshots.keys().copied().collect();
        assert_eq!(known, told, "{}: P10", self.what);
        let mut bytes = vec![0; self.live.len() * SECTOR];
        let read = self.volume().read(0, &mut bytes);
        read.unwrap_or_else(|e| panic!("{}: the live disk: {e}", self.what));
        for (at, sector) in bytes.chunks(SECTOR).enumerate() {
            let is_right =
                sector.iter().all(|b| b == &sector[0]) && self.live[at].contains(&sector[0]);
            assert!(
                is_right,
                "{}: P1: sector {at} holds {}, not {:?}",
                self.what, sector[0], self.live[at]
            );
            self.live[at] = BTreeSet::from([sector[0]]);
        }
        for (&epoch, may) in &self.snapshots {
            let lost = self.lost(epoch);
            let all = self.volume().epochs().expect("listed");
            let is_suspect = all.iter().any(|e| e.epoch == epoch && !e.state.suspect.is_empty());
            let view = View::open(self.volume(), epoch, ExcludedReads::Error).expect("view");
            for block in 0..BLOCKS {
                let mut content = vec![0; BLOCK];
                match view.read(block * 4096, &mut content) {
                    Ok(()) => {
                        let from = usize::try_from(block).expect("small") * BLOCK / SECTOR;
                        for (sector, may) in content.chunks(SECTOR).zip(&may[from..]) {
                            assert!(
                                may.contains(&sector[0]),
                                "{}: P2: snapshot {epoch} block {block} holds {}, not {may:?}",
                                self.what,
                                sector[0]
                            );
                        }
                    }
                    Err(Error::Lost { .. }) if lost.contains(block) || is_suspect => {}
                    Err(error) => panic!("{}: snapshot {epoch}: {error}; {lost:?}", self.what),
                }
            }
        }
    }

    /// The fault is over: all goes on, in this process unless the origin failed; that is told until
    /// somebody looked.
    fn go_on(&mut self) {
        self.world.end();
        if self.volume().flush().is_err() {
            // Without a thread that tries again the next write does.
            self.write(120 * 8, 8);
        }
        if let Err(error) = self.volume().flush() {
            let is_told = matches!(error, Error::Origin { .. });
            assert!(is_told, "{}: it does not go on: {error}", self.what);
            assert!(self.volume().flush().is_err(), "{}: P6: a failed sync", self.what);
            assert!(self.volume().close().is_err(), "{}: P6: a failed sync", self.what);
            self.volume = None;
            let refused = self.try_open(Recover::Refuse);
            let is_refused = matches!(refused, Err(Error::RecoveryNeeded(_)));
            assert!(is_refused, "{}: P6: across restarts", self.what);
            self.open();
        }
        let waited = self.volume().wait_restored(Duration::from_secs(20));
        assert!(waited.is_ok_and(|is_over| is_over), "{}: the restore goes on", self.what);
        self.check();
        self.write(110 * 8, 8);
        self.volume().flush().unwrap_or_else(|e| panic!("{}: {e}", self.what));
        assert!(self.snapshot().is_some(), "{}: snapshots are taken again", self.what);
        self.write(0, 64);
        self.check();
        self.volume().close().unwrap_or_else(|e| panic!("{}: {e}", self.what));
        self.volume = None;
        self.open();
        self.check();
    }
}

fn scratch() -> tempfile::TempDir {
    let base = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
    tempfile::tempdir_in(base).expect("temporary directory")
}

fn run_with(fault: Option<(Device, Kind, u64)>, on_full: OnFull) -> World {
    let (dir, world) = (scratch(), World::default());
    world.plan().fault = fault;
    let what = format!("{fault:?} {on_full:?}");
    let mut run = Run::new(dir.path(), world.clone(), false, on_full, what);
    run.program();
    run.go_on();
    world
}

fn count_of(device: Device) -> u64 {
    let (dir, world) = (scratch(), World::default());
    let mut run = Run::new(dir.path(), world.clone(), false, OnFull::Degrade, "no fault".into());
    run.program();
    run.check();
    assert!(run.snapshots.values().flatten().all(|may| may.len() == 1), "all went well");
    for epoch in run.snapshots.keys() {
        assert!(run.lost(*epoch).is_empty(), "nothing is lost without a fault");
    }
    let count = world.plan().counts[&(device == Device::Origin)];
    assert!(count > 20, "the program is too short to say anything: {count}");
    count
}

fn at_every_operation(device: Device, kind: Kind, on_full: OnFull) {
    let only = std::env::var("STILLBLOCK_FAULT").ok().and_then(|n| n.parse().ok());
    let mut hits = 0;
    for n in 1..=count_of(device) {
        if only.is_none_or(|only: u64| only == n) {
            let world = run_with(Some((device, kind, n)), on_full);
            hits += u64::from(world.plan().hit.is_some());
        }
    }
    assert!(hits > 0, "no operation was of the kind that fails");
    println!("{hits} runs met their fault");
}

#[test]
fn an_error_of_the_origin_at_any_operation_is_told_and_harms_nothing() {
    at_every_operation(Device::Origin, Kind::Once, OnFull::Degrade);
}

#[test]
fn errors_of_the_origin_from_any_operation_on_are_told_and_harm_nothing() {
    at_every_operation(Device::Origin, Kind::Sticky, OnFull::Degrade);
}

#[test]
fn a_short_read_of_the_origin_at_any_operation_is_told_and_harms_nothing() {
    at_every_operation(Device::Origin, Kind::ShortRead, OnFull::Degrade);
}

#[test]
fn an_error_of_the_store_at_any_operation_costs_at_most_what_is_told() {
    at_every_operation(Device::Store, Kind::Once, OnFull::Degrade);
}

#[test]
fn errors_of_the_store_from_any_operation_on_cost_at_most_what_is_told() {
    at_every_operation(Device::Store, Kind::Sticky, OnFull::Degrade);
}

#[test]
fn a_store_that_is_full_from_any_operation_on_costs_at_most_what_is_told() {
    at_every_operation(Device::Store, Kind::NoSpace, OnFull::Degrade);
}

#[test]
fn a_store_that_is_full_from_any_operation_on_fails_writes_if_that_is_its_policy() {
    at_every_operation(Device::Store, Kind::NoSpace, OnFull::Fail);
}

#[test]
fn a_short_read_of_the_store_at_any_operation_costs_at_most_what_is_told() {
    at_every_operation(Device::Store, Kind::ShortRead, OnFull::Degrade);
}

/// The program runs in a thread of its own beside the one that commits; what hangs is let go once it
/// is seen to.
#[test]
fn an_operation_that_hangs_holds_up_but_changes_nothing() {
    for device in [Device::Origin, Device::Store] {
        for n in (1..=count_of(device)).step_by(7) {
            let (dir, world) = (scratch(), World::default());
            world.plan().fault = Some((device, Kind::Hang, n));
            let what = format!("hang of {device:?} at {n}");
            let mut run = Run::new(dir.path(), world.clone(), true, OnFull::Degrade, what);
            let worker = std::thread::spawn(move || {
                run.program();
                run.go_on();
                for epoch in run.snapshots.keys() {
                    assert!(run.lost(*epoch).is_empty(), "{}: late is not lost", run.what);
                }
            });
            let (lock, changed) = &*world.0;
            let mut plan = lock.lock().expect("no panic");
            while !plan.is_hanging && !worker.is_finished() {
                plan = changed.wait_timeout(plan, Duration::from_millis(20)).expect("no panic").0;
            }
            drop(plan);
            world.end();
            worker.join().expect("the program went through");
        }
    }
}

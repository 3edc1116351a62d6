//! A machine that can be stopped at any step: disks, memory that outlives the process, and what its
//! clients know.

use crate::dice::Dice;
use crate::disk::{Change, Medium, PAGE, World};
use crate::group::Pair;
use crate::model::Model;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use stillblock_core::buffer::{Arena, ArenaSize, BufferIdentity, LeftBuffer};
use stillblock_core::error::{Error, Result};
use stillblock_core::index::run::run_number;
use stillblock_core::journal::{JOURNAL_NAME, JOURNAL_NEW_NAME, OriginIdentity};
use stillblock_core::log::writer::segment_number;
use stillblock_core::storage::{Directory, Storage};
use stillblock_core::sync::breathe;
use stillblock_core::volume::host::{Held, Host, OriginDevice};

pub const ORIGIN: &str = "/disk.img";
pub const STORE: &str = "/store";
pub const LOG: &str = "/store/log";
const BUFFERS: &str = "/memory";
/// Regions that are open at once; a disk has one or two.
const REGIONS_MAX: u32 = 2;

/// A write buffer in memory.
enum Buffer {
    Open(Arc<Arena>),
    Left(LeftBuffer),
}

/// Which operations fail, counted from when the plan was made.
#[derive(Clone, Debug, Default)]
pub struct FaultPlan {
    /// What is hit, and at its n-th occurrence from now.
    pub faults: Vec<(Target, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    OriginRead,
    OriginWrite,
    OriginSync,
    StoreRead,
    StoreWrite,
    StoreSync,
    StoreNames,
    /// Of the journal alone: what is decided is rare among the steps.
    JournalSync,
}

pub struct Machine {
    world: Mutex<World>,
    buffers: Mutex<BTreeMap<PathBuf, Buffer>>,
    /// Pages of files that are allocated and not written.
    reserved: Mutex<BTreeMap<u64, BTreeSet<u64>>>,
    boot: u8,
    slot_count: u32,
    /// What its clients did and were told.
    pub model: Mutex<Model>,
    /// The same of clients of two volumes.
    pub pair: Mutex<Pair>,
    /// Stores that are open.
    locked: Arc<Mutex<BTreeSet<PathBuf>>>,
    /// Identities given out.
    random_count: AtomicU64,
    /// Where it was stopped, if anybody looks.
    stops: Mutex<Option<Vec<Stop>>>,
    dice: Mutex<Dice>,
    is_told: AtomicBool,
    plan: Mutex<FaultPlan>,
    counts: Mutex<BTreeMap<Target, u64>>,
    pub faults_met: AtomicU64,
    /// A sync of the origin failed: what it was for is in doubt for ever.
    pub is_origin_failed: AtomicBool,
    pub steps: AtomicU64,
}

/// The machine in the middle of something.
#[derive(Clone)]
pub struct Stop {
    world: World,
    left: BTreeMap<PathBuf, LeftBuffer>,
    boot: u8,
    slot_count: u32,
    pub model: Model,
    pub pair: Pair,
    pub had_faults: bool,
    pub is_origin_failed: bool,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Machine {
    pub fn new(content: &[u8], slot_count: u32, model: Model, dice: Dice) -> Arc<Self> {
        let mut world = World::default();
        let id = world.add(Medium::holding(content));
        world.link(Path::new("/"), "disk.img", id);
        world.sync_names(Path::new("/"));
        Arc::new(Self::made(world, BTreeMap::new(), 1, slot_count, model, dice))
    }

    fn made(
        world: World,
        buffers: BTreeMap<PathBuf, Buffer>,
        boot: u8,
        slot_count: u32,
        model: Model,
        dice: Dice,
    ) -> Self {
        Self {
            world: Mutex::new(world),
            buffers: Mutex::new(buffers),
            reserved: Mutex::default(),
            boot,
            slot_count,
            model: Mutex::new(model),
            pair: Mutex::default(),
            locked: Arc::default(),
            random_count: AtomicU64::new(0),
            stops: Mutex::new(None),
            dice: Mutex::new(dice),
            is_told: AtomicBool::new(std::env::var_os("STILLBLOCK_TRACE").is_some()),
            plan: Mutex::default(),
            counts: Mutex::default(),
            faults_met: AtomicU64::new(0),
            is_origin_failed: AtomicBool::new(false),
            steps: AtomicU64::new(0),
        }
    }

    pub fn model(&self) -> MutexGuard<'_, Model> {
        held(&self.model)
    }

    pub fn pair(&self) -> MutexGuard<'_, Pair> {
        held(&self.pair)
    }

    /// One more disk.
    pub fn add_disk(&self, name: &str, content: &[u8]) {
        let mut world = self.world();
        let id = world.add(Medium::holding(content));
        world.link(Path::new("/"), name, id);
        world.sync_names(Path::new("/"));
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        held(&self.world)
    }

    /// From now on, remember every step.
    pub fn watch(&self) {
        *held(&self.stops) = Some(Vec::new());
    }

    pub fn take_stops(&self) -> Vec<Stop> {
        held(&self.stops).take().unwrap_or_default()
    }

    pub fn plan(&self, plan: FaultPlan) {
        held(&self.counts).clear();
        *held(&self.plan) = plan;
    }

    pub fn has_met_faults(&self) -> bool {
        self.faults_met.load(Ordering::Relaxed) > 0
    }

    /// Between any two of these the machine may stop, and other threads go on.
    fn step(&self) {
        breathe();
        self.steps.fetch_add(1, Ordering::Relaxed);
        if let Some(stops) = &mut *held(&self.stops) {
            stops.push(self.stop());
        }
    }

    pub fn stop(&self) -> Stop {
        let left = |(path, buffer): (&PathBuf, &Buffer)| {
            let left = match buffer {
                Buffer::Open(arena) => arena.left()?,
                Buffer::Left(left) => left.clone(),
            };
            Some((path.clone(), left))
        };
        Stop {
            world: held(&self.world).clone(),
            left: held(&self.buffers).iter().filter_map(left).collect(),
            boot: self.boot,
            slot_count: self.slot_count,
            model: held(&self.model).clone(),
            pair: held(&self.pair).clone(),
            had_faults: self.has_met_faults(),
            is_origin_failed: self.is_origin_failed.load(Ordering::Relaxed),
        }
    }

    fn meet(&self, target: Target) -> io::Result<()> {
        let count = {
            let mut counts = held(&self.counts);
            let count = counts.entry(target).or_default();
            *count += 1;
            *count
        };
        if held(&self.plan).faults.contains(&(target, count)) {
            self.faults_met.fetch_add(1, Ordering::Relaxed);
            self.tell(|| format!("fault: {target:?} {count}"));
            if target == Target::OriginSync {
                self.is_origin_failed.store(true, Ordering::Relaxed);
            }
            return Err(io::Error::other("a fault of the simulation"));
        }
        Ok(())
    }

    /// Tell the story of this machine, if a seed runs alone.
    pub fn listen(&self) {
        let is_told = std::env::var_os("STILLBLOCK_SEED").is_some();
        self.is_told.store(is_told, Ordering::Relaxed);
    }

    /// One line of the story, for a seed that runs alone.
    pub fn tell(&self, line: impl FnOnce() -> String) {
        if self.is_told.load(Ordering::Relaxed) {
            println!("{}", line());
        }
    }

    /// Spoil both headers of a segment that has records; tells which, and of what epoch it is.
    pub fn rot_a_segment(&self, dice: &mut Dice) -> Option<(String, u32)> {
        let mut world = self.world();
        let log = Path::new(LOG);
        let mut names = world.list(log);
        // A merged segment that has no name yet stands for nothing.
        names.retain(|name| segment_number(name).is_some());
        let name = names.get(dice.below(names.len()))?.clone();
        let id = world.find(log, &name)?;
        let bytes = world.medium(id).now.clone();
        let begins_with = |page: &u64, magic: &[u8]| {
            let mut found = vec![0; magic.len()];
            bytes.read(page * 4096, &mut found).is_ok() && found == magic
        };
        let pages = 0..bytes.length() / 4096;
        if !pages.clone().any(|page| begins_with(&page, b"SBBH")) {
            return None;
        }
        for page in pages.filter(|page| begins_with(page, b"SBLOGSEG")) {
            world.rot(id, page * 4096 + 20);
        }
        let mut epoch = [0; 4];
        bytes.read(32, &mut epoch).ok()?;
        Some((name, u32::from_le_bytes(epoch)))
    }

    fn index_files(&self) -> Vec<String> {
        let mut names = self.world().list(Path::new(LOG));
        names.retain(|name| run_number(name).is_some());
        names
    }

    pub fn has_index_files(&self) -> bool {
        !self.index_files().is_empty()
    }

    /// Spoil a byte of an index file that says something.
    pub fn rot_an_index_file(&self, dice: &mut Dice) {
        let names = self.index_files();
        let name = &names[dice.below(names.len())];
        let mut world = self.world();
        let id = world.find(Path::new(LOG), name).expect("listed");
        let bytes = world.medium(id).now.clone();
        let mut content = vec![0; usize::try_from(bytes.length()).expect("small")];
        bytes.read(0, &mut content).expect("all of it");
        let full: Vec<usize> = (0..content.len()).filter(|&at| content[at] != 0).collect();
        if let Some(&at) = full.get(dice.below(full.len())) {
            self.tell(|| format!("{name} rots at {at}"));
            world.rot(id, at as u64);
        }
    }

    /// Now and then a device takes its time.
    fn linger(&self) {
        let steps = {
            let mut dice = held(&self.dice);
            if dice.chance(4) { dice.below(250) } else { 0 }
        };
        for _ in 0..steps {
            breathe();
        }
    }

    /// What a file takes.
    pub fn allocated(&self, world: &World, id: u64) -> u64 {
        let reserved = held(&self.reserved).get(&id).map_or(0, BTreeSet::len);
        world.medium(id).now.allocated() + reserved as u64 * PAGE
    }

    fn unreserve(&self, id: u64, offset: u64, end: u64) {
        if let Some(pages) = held(&self.reserved).get_mut(&id) {
            pages.retain(|page| page * PAGE + PAGE <= offset || page * PAGE >= end);
        }
    }

    fn do_change(&self, id: u64, change: Change) {
        self.linger();
        self.step();
        match &change {
            Change::Write(offset, data) => self.unreserve(id, *offset, offset + data.len() as u64),
            Change::Zero(offset, length) => self.unreserve(id, *offset, offset + length),
            Change::SetLength(length) => self.unreserve(id, *length, u64::MAX),
        }
        let number = {
            let mut world = self.world();
            let number = world.number();
            self.tell(|| format!("  change {number} of {id}: {change:?}"));
            world.change(id).submit(number, change);
            number
        };
        self.step();
        self.world().change(id).complete(number);
    }
}

impl Stop {
    /// The machine after the process was killed: the kernel has everything, and the buffer.
    pub fn killed(&self, dice: Dice) -> Arc<Machine> {
        let left = self.left.iter().map(|(p, l)| (p.clone(), Buffer::Left(l.clone()))).collect();
        let model = self.model.clone();
        let mut world = self.world.clone();
        world.complete_all();
        let made = Machine::made(world, left, self.boot, self.slot_count, model, dice);
        *made.pair() = self.pair.clone();
        Arc::new(made)
    }

    /// The machine after the power came back.
    pub fn cut(&self, mut dice: Dice) -> Arc<Machine> {
        let world = self.world.cut(&mut dice);
        let mut model = self.model.clone();
        // What was written there is gone with the memory: all of it counts as changed, and no more
        // than that.
        for region in self.left.values().flat_map(|left| &left.regions) {
            model.lose_bits(region.epoch, region.blocks);
        }
        let made =
            Machine::made(world, BTreeMap::new(), self.boot + 1, self.slot_count, model, dice);
        *made.pair() = self.pair.clone();
        Arc::new(made)
    }
}

#[derive(Clone)]
struct SimStorage {
    machine: Arc<Machine>,
    id: u64,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Origin,
    Journal,
    Log,
}

impl SimStorage {
    fn target(&self, origin: Target, store: Target) -> Target {
        if self.kind == Kind::Origin { origin } else { store }
    }
}

impl Storage for SimStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.machine.world().medium(self.id).now.length())
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.machine.linger();
        breathe();
        self.machine.meet(self.target(Target::OriginRead, Target::StoreRead))?;
        self.machine.world().medium(self.id).now.read(offset, buffer)
    }
    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, buffer).map(|()| true)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let met = self.machine.meet(self.target(Target::OriginWrite, Target::StoreWrite));
        if met.is_err() {
            // A part of it may be there.
            let part = held(&self.machine.dice).below(data.len() + 1) / 512 * 512;
            self.machine.do_change(self.id, Change::Write(offset, data[..part].into()));
            return met;
        }
        self.machine.do_change(self.id, Change::Write(offset, data.into()));
        Ok(())
    }
    fn write_slices_at(&self, offset: u64, slices: &[&[u8]]) -> io::Result<()> {
        self.write_at(offset, &slices.concat())
    }
    fn zero_at(&self, offset: u64, length: u64, may_punch: bool) -> io::Result<()> {
        self.machine.meet(self.target(Target::OriginWrite, Target::StoreWrite))?;
        let change = if may_punch {
            Change::Zero(offset, length)
        } else {
            Change::Write(offset, vec![0; usize::try_from(length).expect("small")].into())
        };
        self.machine.do_change(self.id, change);
        Ok(())
    }
    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.machine.meet(self.target(Target::OriginWrite, Target::StoreWrite))?;
        self.machine.do_change(self.id, Change::Zero(offset, length));
        Ok(())
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        let world = self.machine.world();
        let now = &world.medium(self.id).now;
        let pages = offset / PAGE..(offset + length).div_ceil(PAGE);
        let free = pages.filter(|page| !now.has_page(*page));
        held(&self.machine.reserved).entry(self.id).or_default().extend(free);
        Ok(())
    }
    fn release_ahead(&self, offset: u64, length: u64) {
        self.machine.unreserve(self.id, offset, offset + length);
    }
    fn sync(&self) -> io::Result<()> {
        let numbers = self.machine.world().medium(self.id).completed();
        self.machine.step();
        self.machine.tell(|| format!("  sync {} of {numbers:?}", self.id));
        let mut met = self.machine.meet(self.target(Target::OriginSync, Target::StoreSync));
        if self.kind == Kind::Journal && met.is_ok() {
            met = self.machine.meet(Target::JournalSync);
        }
        let mut world = self.machine.world();
        if let Err(error) = met {
            world.change(self.id).fail_sync(&numbers, &mut held(&self.machine.dice));
            return Err(error);
        }
        world.change(self.id).make_durable(&numbers);
        Ok(())
    }
    fn next_data(&self, offset: u64, end: u64) -> io::Result<u64> {
        breathe();
        Ok(self.machine.world().medium(self.id).now.next(offset, end, true))
    }
    fn next_hole(&self, offset: u64, end: u64) -> io::Result<u64> {
        Ok(self.machine.world().medium(self.id).now.next(offset, end, false))
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.machine.allocated(&self.machine.world(), self.id))
    }
    fn set_len(&self, length: u64) -> io::Result<()> {
        self.machine.meet(self.target(Target::OriginWrite, Target::StoreWrite))?;
        self.machine.do_change(self.id, Change::SetLength(length));
        Ok(())
    }
}

struct SimDirectory {
    machine: Arc<Machine>,
    path: PathBuf,
}

impl SimDirectory {
    fn storage(&self, name: &str, id: u64) -> Arc<dyn Storage> {
        let machine = Arc::clone(&self.machine);
        let is_journal = [JOURNAL_NAME, JOURNAL_NEW_NAME].contains(&name);
        let kind = if is_journal { Kind::Journal } else { Kind::Log };
        Arc::new(SimStorage { machine, id, kind })
    }
}

impl Directory for SimDirectory {
    fn open(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        let found = self.machine.world().find(&self.path, name);
        Ok(self.storage(name, found.ok_or(io::ErrorKind::NotFound)?))
    }
    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        self.machine.step();
        self.machine.meet(Target::StoreNames)?;
        let known = self.machine.world().find(&self.path, name);
        if let Some(id) = known {
            self.machine.do_change(id, Change::SetLength(0));
            return Ok(self.storage(name, id));
        }
        let mut world = self.machine.world();
        let id = world.add(Medium::default());
        world.link(&self.path, name, id);
        drop(world);
        Ok(self.storage(name, id))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.machine.step();
        self.machine.meet(Target::StoreNames)?;
        let mut world = self.machine.world();
        let id = world.find(&self.path, from).ok_or(io::ErrorKind::NotFound)?;
        world.unlink(&self.path, from)?;
        world.link(&self.path, to, id);
        Ok(())
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.machine.step();
        self.machine.meet(Target::StoreNames)?;
        self.machine.world().unlink(&self.path, name)
    }
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.machine.world().list(&self.path))
    }
    fn sync(&self) -> io::Result<()> {
        self.machine.step();
        self.machine.meet(Target::StoreNames)?;
        self.machine.world().sync_names(&self.path);
        Ok(())
    }
}

/// The machine as the engine meets it.
pub struct SimHost(pub Arc<Machine>);

/// A store that is open.
struct Lock {
    locked: Arc<Mutex<BTreeSet<PathBuf>>>,
    store: PathBuf,
}

impl Drop for Lock {
    fn drop(&mut self) {
        held(&self.locked).remove(&self.store);
    }
}

struct SimOrigin(SimStorage);

impl OriginDevice for SimOrigin {
    fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(self.0.clone())
    }
    fn identify(&self) -> io::Result<OriginIdentity> {
        let bytes = self.0.len()?;
        Ok(OriginIdentity { device: 1, inode: self.0.id, bytes, modified_unix_ns: 0 })
    }
    fn release(&self) {}
}

impl Host for SimHost {
    fn boot_id(&self) -> Result<[u8; 16]> {
        Ok([self.0.boot; 16])
    }
    fn random(&self) -> Result<[u8; 16]> {
        let count = self.0.random_count.fetch_add(1, Ordering::Relaxed);
        Ok([u8::try_from(7 + count).expect("few"); 16])
    }
    fn directory(&self, path: &Path) -> Arc<dyn Directory> {
        Arc::new(SimDirectory { machine: Arc::clone(&self.0), path: path.to_path_buf() })
    }
    fn make_directory(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
    fn lock_store(&self, store: &Path) -> Result<Held> {
        if !held(&self.0.locked).insert(store.to_path_buf()) {
            return Err(Error::Locked(format!("{} is open", store.display())));
        }
        Ok(Box::new(Lock { locked: Arc::clone(&self.0.locked), store: store.to_path_buf() }))
    }
    fn open_origin(&self, path: &Path, _: bool) -> Result<Arc<dyn OriginDevice>> {
        let name = path.to_string_lossy();
        let found = self.0.world().find(Path::new("/"), name.trim_start_matches('/'));
        let id = found.ok_or_else(|| Error::NotFound(name.into_owned()))?;
        let machine = Arc::clone(&self.0);
        Ok(Arc::new(SimOrigin(SimStorage { machine, id, kind: Kind::Origin })))
    }
    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(path.to_path_buf())
    }
    fn default_buffer_dir(&self) -> Option<PathBuf> {
        Some(BUFFERS.into())
    }
    fn new_buffer(
        &self,
        path: &Path,
        size: ArenaSize,
        identity: &BufferIdentity,
    ) -> io::Result<Arc<Arena>> {
        // Few slots and regions: a full buffer is part of what is simulated.
        let regions = size.regions.min(if self.0.slot_count < 10 { 1 } else { REGIONS_MAX });
        let size = ArenaSize { slots: self.0.slot_count, regions, ..size };
        let arena = Arc::new(Arena::outliving(size, identity)?);
        held(&self.0.buffers).insert(path.to_path_buf(), Buffer::Open(Arc::clone(&arena)));
        Ok(arena)
    }
    fn left_buffer(&self, path: &Path) -> io::Result<Option<std::result::Result<LeftBuffer, u32>>> {
        match held(&self.0.buffers).get(path) {
            Some(Buffer::Left(left)) => Ok(Some(Ok(left.clone()))),
            Some(Buffer::Open(arena)) => Ok(arena.left().map(Ok)),
            None => Ok(None),
        }
    }
    fn note_replaying(&self, _: &Path, _: u64) -> io::Result<()> {
        Ok(())
    }
}

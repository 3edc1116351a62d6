//! Making, opening and closing volumes. Everything in memory is rebuilt from the store; nothing is
//! written before it is decided what there is.

use super::decided::{Decided, epochs_with_losses, restoring_of};
use super::group::OpenGroup;
use super::host::{Held, Host, OriginDevice, System, bytes_of, hex, path_of, random_uuid};
use super::load::{Loaded, load_index};
use super::recover::{Leftovers, Past};
use super::room::Room;
use super::{Committer, Counters, Restoring, State, Upkeep, Volume};
use crate::bitmap::Bitmap;
use crate::buffer::{Arena, ArenaSize, BufferIdentity, WriteBuffer};
use crate::error::{Error, Result};
use crate::extent::ExtentSet;
use crate::journal::{Entry, Journal, OriginIdentity, StorePolicy};
use crate::log::batch::BatchBuilder;
use crate::log::format::BATCH_BLOCKS_MAX;
use crate::log::scan::{Scan, scan_headers};
use crate::log::writer::{LogWriter, Segments};
use crate::number::to_usize;
use crate::regions::{REGIONS_MAX, Regions, region_blocks};
use crate::sabotage::{Rule, is_broken};
use crate::storage::{Directory, FileDirectory};
use crate::sync::{AtomicBool, AtomicU64, Clock, Condvar, Mutex, RwLock, spawn, unix_ns};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The directory of log segments in the store.
pub(super) const LOG_DIRECTORY: &str = "log";
/// Smallest and largest block sizes: a page of the log; as many sectors as a slot's mask has bits.
const BLOCK_SIZES: std::ops::RangeInclusive<u64> = 4096..=65536;
/// A write-through volume still needs slots for the writes in flight.
const WRITE_THROUGH_BYTES: u64 = 16 << 20;

/// What a new volume is.
pub struct CreateRequest {
    /// A directory that does not exist or is empty.
    pub store: PathBuf,
    /// The raw disk.
    pub origin: PathBuf,
    /// Bytes a block.
    pub block_size: u64,
    /// Opaque bytes.
    pub meta: Vec<u8>,
    /// What happens when the store is full, and how much it may take.
    pub policy: StorePolicy,
}

/// When first changes are acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// When they are in the write buffer.
    WriteBack,
    /// When they are on the origin.
    WriteThrough,
}

/// What to do about a volume that was not closed and whose buffer or origin is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recover {
    /// Refuse to open it.
    Refuse,
    /// Bring the buffered writes to the origin, whatever was written there since.
    Replay,
    /// Forget the buffered writes.
    Discard,
}

/// How to open a volume.
pub struct OpenRequest {
    /// The store directory.
    pub store: PathBuf,
    /// The raw disk, if it is not where it was.
    pub origin: Option<PathBuf>,
    /// When first changes are acknowledged.
    pub cache: Cache,
    /// Pass by the page cache.
    pub direct: bool,
    /// A directory in memory for the write buffer; found if not said.
    pub buffer_dir: Option<PathBuf>,
    /// Size of the write buffer.
    pub buffer_bytes: u64,
    /// What to do in doubt.
    pub recover: Recover,
    /// Commit in a thread of its own; without it every wait does the work itself (simulation).
    pub has_background: bool,
    /// Stores of other volumes: asked about groups whose end this one does not know.
    pub peers: Vec<PathBuf>,
}

/// What a store says of itself.
#[derive(Debug, Clone)]
pub struct StoreInfo {
    /// Identity of the volume.
    pub uuid: [u8; 16],
    /// Where the origin was last.
    pub origin: PathBuf,
    /// Bytes a block.
    pub block_size: u64,
    /// Opaque bytes.
    pub meta: Vec<u8>,
    /// Volumes whose stores decide groups that this one has begun and does not know the end of.
    pub waits_for: Vec<[u8; 16]>,
}

/// Make a store for an origin; tells the volume's identity.
pub fn create(request: &CreateRequest) -> Result<[u8; 16]> {
    create_on(&System::default(), request)
}

/// As [`create`], on any machine.
pub fn create_on(host: &dyn Host, request: &CreateRequest) -> Result<[u8; 16]> {
    let size_ok = BLOCK_SIZES.contains(&request.block_size) && request.block_size.is_power_of_two();
    if !size_ok {
        return Err(Error::Usage(format!(
            "block size {} is not a power of two from 4096 to 65536",
            request.block_size
        )));
    }
    super::room::check_policy(request.policy)?;
    let origin = host.open_origin(&request.origin, false)?;
    let identity = origin.identify().map_err(Error::origin("identifying it"))?;
    if identity.bytes == 0 {
        return Err(Error::Usage(format!("{} has no bytes", request.origin.display())));
    }
    let store = &request.store;
    let making = || Error::store(format!("making {}", store.display()));
    host.make_directory(&store.join(LOG_DIRECTORY)).map_err(making())?;
    let _lock = host.lock_store(store)?;
    let directory = host.directory(store);
    let names = directory.list().map_err(making())?;
    if names.iter().any(|name| name == crate::journal::JOURNAL_NAME) {
        return Err(Error::Usage(format!("{} is a store already", store.display())));
    }
    // An absolute path keeps its symlinks: a device's id is steadier than its name.
    let path = if request.origin.is_absolute() {
        request.origin.clone()
    } else {
        host.canonical(&request.origin).map_err(Error::origin("its path"))?
    };
    let uuid = random_uuid(host)?;
    let first = Entry::Created {
        uuid,
        block_size: u32::try_from(request.block_size).expect("checked above"),
        origin: bytes_of(&path),
        identity,
        meta: request.meta.clone(),
    };
    let mut journal = Journal::create(directory, &first)?;
    if request.policy != StorePolicy::default() {
        journal.append(&Entry::Policy(request.policy))?;
    }
    if let Some(parent) = store.parent().filter(|p| !p.as_os_str().is_empty()) {
        host.directory(parent).sync().map_err(making())?;
    }
    Ok(uuid)
}

/// What a store says of itself; it may be in use.
pub fn peek(store: &Path) -> Result<StoreInfo> {
    let (_, decided) = read_decisions(Arc::new(FileDirectory::new(store)), store)?;
    Ok(StoreInfo {
        uuid: decided.uuid,
        origin: path_of(&decided.origin),
        block_size: decided.block_size,
        waits_for: decided.groups.values().map(|group| group.members[0].uuid).collect(),
        meta: decided.meta,
    })
}

/// The journal in the directory of a store, and what its records come to.
pub(super) fn read_decisions(
    directory: Arc<dyn Directory>,
    store: &Path,
) -> Result<(Journal, Decided)> {
    let (journal, entries) = match Journal::open(directory).map_err(Error::from) {
        Err(Error::Store { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            let what = format!("{} is not a store: it has no journal", store.display());
            return Err(Error::NotFound(what));
        }
        other => other?,
    };
    let decided = Decided::from(entries, journal.first_sequence());
    let empty = || Error::Damaged(format!("{} has no first record", store.display()));
    Ok((journal, decided.ok_or_else(empty)?))
}

/// Keep others out of a store that must be there.
pub(super) fn lock_existing(host: &dyn Host, store: &Path) -> Result<Held> {
    match host.lock_store(store) {
        Err(Error::Store { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::NotFound(format!("no store at {}", store.display())))
        }
        other => other,
    }
}

/// Everything a volume is put together from.
struct Parts {
    request: OpenRequest,
    decided: Decided,
    journal: Journal,
    scan: Scan,
    loaded: Loaded,
    /// How groups ended that the journal does not tell of yet.
    settled: Vec<Entry>,
    host: Arc<dyn Host>,
    origin: Arc<dyn OriginDevice>,
    origin_share: Option<u64>,
    origin_path: PathBuf,
    segments: Arc<Segments>,
    store_lock: Held,
}

/// Open a volume: it belongs to this process until it is closed or dropped.
pub fn open(request: OpenRequest) -> Result<Arc<Volume>> {
    open_on(Arc::new(System::default()), request)
}

/// As [`open`], on any machine.
pub fn open_on(host: Arc<dyn Host>, request: OpenRequest) -> Result<Arc<Volume>> {
    let store_lock = lock_existing(&*host, &request.store)?;
    let (journal, mut decided) = read_decisions(host.directory(&request.store), &request.store)?;
    let origin_path = request.origin.clone().unwrap_or_else(|| path_of(&decided.origin));
    let origin = host.open_origin(&origin_path, request.direct)?;
    let segments = Arc::new(Segments::new(host.directory(&request.store.join(LOG_DIRECTORY))));
    let mut scan = scan_headers(&segments, decided.uuid, &decided.aborted)?;
    let settled = decided.settle_groups(&*host, &scan, &request.peers);
    let looking = || Error::store("looking for room");
    let need = origin.needs_beside(&request.store).map_err(looking())?;
    let free = segments.directory().free_bytes().map_err(looking())?;
    let origin_share = (need > free).then_some(free / 2);
    let others_bytes = origin_share.unwrap_or(need);
    let loaded = load_index(&segments, &mut scan, &decided, others_bytes)?;
    let parts = Parts {
        request,
        decided,
        journal,
        scan,
        loaded,
        settled,
        host,
        origin,
        origin_share,
        origin_path,
        segments,
        store_lock,
    };
    parts.assemble()
}

impl Parts {
    fn assemble(mut self) -> Result<Arc<Volume>> {
        let boot = self.host.boot_id()?;
        let groups = std::mem::take(&mut self.settled);
        let doubt = Past { losses: self.unrecorded_losses(), groups, ..self.examine(boot)? };
        let buffer_path = self.buffer_path();
        let (opened, buffer_bytes) = (self.request.has_background, self.request.buffer_bytes);
        let (recover, is_failed) = (self.request.recover, !self.decided.origin_failure.is_empty());
        let generation = self.decided.generation + 1;
        let owes_space = self.decided.owes_space;
        let leftovers = Leftovers {
            has_unfinished: !self.scan.unfinished.is_empty() || is_broken(Rule::UnknownLogKept),
            superseded: std::mem::take(&mut self.scan.superseded),
            runs: std::mem::take(&mut self.loaded.useless),
            merged: std::mem::take(&mut self.loaded.unfinished),
        };
        let end = self.decided.closed.is_none().then_some(self.scan.end);
        let open_regions = std::mem::take(&mut self.loaded.regions);
        let volume = self.build(buffer_path.is_none())?;
        if is_failed && recover == Recover::Refuse {
            return Err(Error::RecoveryNeeded(format!(
                "{} failed to keep what it was given; check the device, then volume recover",
                volume.origin_path.display()
            )));
        }
        volume.settle_the_past(doubt, end, &open_regions, &leftovers)?;
        if owes_space && !opened {
            volume.free_space()?;
        }
        if is_failed {
            volume.committer.lock().journal.append(&Entry::Recovered)?;
        }
        volume.load_clones()?;
        volume.start(boot, generation, buffer_path.as_deref(), buffer_bytes)?;
        if opened {
            volume.spawn("committer", Volume::run_background)?;
            volume.spawn("heartbeat", Volume::run_heartbeat)?;
            volume.spawn("upkeep", Volume::run_upkeep)?;
            volume.want_upkeep();
        }
        Ok(volume)
    }

    /// Losses that the log shows now and the journal does not know: what shows them may be written
    /// over, or be gone by the next opening.
    fn unrecorded_losses(&self) -> Vec<(u32, ExtentSet)> {
        if self.scan.losses().next().is_none() {
            return Vec::new();
        }
        let all = self.decided.all_blocks();
        let known =
            |epoch: u32| self.decided.lost.iter().any(|(e, set)| *e == epoch && *set == all);
        let epochs = self.decided.epochs(&self.scan);
        let damaged = epochs_with_losses(&self.scan, &epochs).into_iter();
        damaged.filter(|&epoch| !known(epoch)).map(|epoch| (epoch, all.clone())).collect()
    }

    fn buffer_path(&self) -> Option<PathBuf> {
        if self.request.cache == Cache::WriteThrough {
            return None;
        }
        let dir = self.request.buffer_dir.clone().or_else(|| self.host.default_buffer_dir())?;
        Some(dir.join(format!("stillblock-{}.buffer", hex(self.decided.uuid))))
    }

    /// What the last process left, and whether the origin is still what it was.
    fn examine(&self, boot: [u8; 16]) -> Result<Past> {
        let identity = self.origin.identify().map_err(Error::origin("identifying it"))?;
        if identity.bytes < self.decided.size_bytes {
            return Err(Error::OriginChanged(format!(
                "{} has {} bytes and had {}; restore its length",
                self.origin_path.display(),
                identity.bytes,
                self.decided.size_bytes
            )));
        }
        let Some((last_boot, buffer)) = &self.decided.opened else { return Ok(Past::default()) };
        if let Some((closed, _)) = self.decided.closed {
            let suspect = closed.is_other_than(&identity).then(|| {
                "the origin was written or replaced outside since the volume was closed".to_owned()
            });
            return Ok(Past { suspect, ..Past::default() });
        }
        if *last_boot != boot {
            // A power cut takes the buffer with it, as it takes any disk's cache. Whoever wrote to
            // a file after this boot was not us.
            let booted = self.host.booted_unix_ns();
            let is_touched = booted.is_some_and(|booted| identity.modified_unix_ns > booted);
            let suspect = is_touched.then(|| {
                "the origin was written outside since the machine was started again".to_owned()
            });
            return Ok(Past { suspect, ..Past::default() });
        }
        if buffer.is_empty() {
            return Ok(Past::default());
        }
        self.examine_left(buffer, identity)
    }

    fn examine_left(&self, buffer: &[u8], identity: OriginIdentity) -> Result<Past> {
        let path = path_of(buffer);
        let left =
            self.host.left_buffer(&path).map_err(Error::store("reading the write buffer"))?;
        if let (Some(Err(version)), Recover::Refuse | Recover::Replay) =
            (&left, self.request.recover)
        {
            return Err(Error::Version(format!(
                "the write buffer {} has version {version}, newer than this program's; open the \
                 volume with the \
                 stillblock that wrote it, or volume recover --discard it",
                path.display()
            )));
        }
        let left = left.and_then(std::result::Result::ok);
        let recover = self.request.recover;
        let Some(left) = left.filter(|left| left.is_of(self.decided.uuid, self.decided.generation))
        else {
            if recover == Recover::Discard {
                return Ok(Past::default());
            }
            return Err(Error::RecoveryNeeded(format!(
                "the volume was not closed and its write buffer {} is gone: acknowledged writes \
                 that were not \
                 flushed are lost; volume recover --discard accepts that",
                path.display()
            )));
        };
        let is_touched = left.is_origin_touched(&identity);
        if !is_touched || recover != Recover::Refuse {
            let suspect = is_touched
                .then(|| "the origin was written outside after the server was killed".to_owned());
            let regions = left.regions.clone();
            let left = (recover != Recover::Discard).then_some((path, left));
            return Ok(Past { suspect, left, regions, ..Past::default() });
        }
        let blocks: BTreeSet<u64> = left.slots.iter().map(|slot| slot.block).collect();
        Err(Error::RecoveryNeeded(format!(
            "the server was killed with {} blocks in its write buffer, and {} was written since \
             by something else; \
             volume recover --replay writes them over it, --discard forgets them",
            blocks.len(),
            self.origin_path.display()
        )))
    }

    fn build(self, is_write_through: bool) -> Result<Arc<Volume>> {
        let Self { request, decided, journal, scan, loaded, host, origin, .. } = self;
        let Self { origin_share, origin_path, segments, store_lock, .. } = self;
        let epochs = decided.epochs(&scan);
        let restoring = restoring_of(&scan, &decided, decided.block_count());
        let mut in_segments: BTreeMap<u32, u32> =
            scan.segments.values().map(|s| (s.header.segment, s.header.epoch)).collect();
        let live = in_segments.values().filter(|e| !decided.aborted.contains(u64::from(**e)));
        // Not those without a header: there is no segment to go on with.
        let known = epochs.0.iter().filter(|(_, e)| e.damage.is_empty()).map(|(&epoch, _)| epoch);
        let epoch = live.copied().max().unwrap_or(0).max(known.max().unwrap_or(0));
        // Kept until the instants they may belong to are gone.
        let last = epochs.0.keys().next_back().copied().unwrap_or(0);
        if !is_broken(Rule::UnknownLogKept) {
            in_segments.extend(scan.unreadable.iter().copied());
            in_segments.extend(scan.headerless.iter().map(|&segment| (segment, last)));
        }
        let epoch_max = in_segments.values().copied().max().unwrap_or(0);
        let epoch_max = epoch_max.max(decided.epoch_max).max(last);
        // Since the last time that nothing was owed something was decided, or not.
        let decisions = u64::from(decided.owes_space);
        let settled = decided.selections_when_freed(&scan);
        let upkeep = Upkeep::new(loaded.next_run, decided.freed_until());
        let log = LogWriter::new(decided.uuid, Arc::clone(&segments), scan.end)
            .map_err(Error::store("opening the log"))?;
        let committer = Committer {
            log,
            batch: BatchBuilder::new(decided.uuid, decided.block_size),
            journal,
            epoch,
            epoch_max,
            segments: in_segments,
            decisions,
            settled,
            drain_bytes_per_second: 0,
            used_bytes: 0,
            upkeep_bytes: 0,
            to_undo: None,
            is_failure_noted: false,
            regions_looked: Clock::now(),
            resting_regions: Vec::new(),
            barred_regions: None,
            groups: decided.groups.iter().map(|(&e, g)| (e, OpenGroup::new(g.clone()))).collect(),
        };
        let state = first_state(&decided, epoch, restoring)?;
        let volume = Volume {
            uuid: decided.uuid,
            block_size: decided.block_size,
            store_path: request.store,
            origin_path,
            origin: origin.storage(),
            origin_device: origin,
            host,
            origin_share,
            segments,
            clones: crate::clone::Clones::default(),
            meta: Mutex::new(decided.meta.clone()),
            upkeep: Mutex::new(upkeep),
            committer: Mutex::new(committer),
            epochs: RwLock::new(epochs),
            state: Mutex::new(state),
            index: RwLock::new(loaded.index),
            index_version: AtomicU64::new(0),
            punching: RwLock::new(()),
            watched_reads: super::watch::WatchedReads::default(),
            rotten: Mutex::default(),
            syncing: Mutex::new(()),
            syncs_begun: AtomicU64::new(0),
            gate_opened: Condvar::new(),
            drained: Condvar::new(),
            room: Condvar::new(),
            work: Condvar::new(),
            restore_ended: Condvar::new(),
            stopping: Condvar::new(),
            upkeep_wanted: Condvar::new(),
            // Without a place that outlives the process nothing may be acknowledged from memory
            // (P6).
            is_write_through,
            has_background: request.has_background,
            background: Mutex::default(),
            store_lock: Mutex::new(Some(store_lock)),
            peers: Mutex::new(request.peers.into_iter().collect()),
            is_released: AtomicBool::new(false),
            counters: Counters::default(),
        };
        Ok(Arc::new(volume))
    }
}

/// Memory of this process, as much as write-through needs.
fn private_arena(block_size: u64, regions: u32) -> Result<Arc<Arena>> {
    let slots = slots_for(WRITE_THROUGH_BYTES, block_size);
    let arena = Arena::private(ArenaSize { slots, regions, block_size });
    Ok(Arc::new(arena.map_err(Error::store("memory for the write buffer"))?))
}

/// What requests meet until the past is settled.
fn first_state(decided: &Decided, epoch: u32, restoring: Option<Restoring>) -> Result<State> {
    let size_bytes = decided.size_bytes;
    let block_count = decided.block_count();
    // Slots until the past is settled; nobody can be acknowledged by them.
    // And no regions: what is recorded before they can be marked is recorded block by block.
    let arena = private_arena(decided.block_size, 0)?;
    Ok(State {
        epoch,
        gate: super::gate::Gate::default(),
        in_flight: super::gate::InFlight::default(),
        unsettled: Bitmap::new(block_count),
        pending: Bitmap::new(block_count),
        restoring,
        restored: 0,
        admitted_slots: usize::MAX,
        regions: Regions::new(Arc::clone(&arena), decided.block_size, block_count),
        buffer: WriteBuffer::new(arena, 1),
        size_bytes,
        origin_failure: String::new(),
        store_failure: String::new(),
        room: Room::new(decided.policy),
        is_closed: false,
        is_kicked: false,
        is_stopping: false,
        is_upkeep_wanted: false,
        watched_writes: None,
    })
}

fn slots_for(bytes: u64, block_size: u64) -> u32 {
    let least = u64::try_from(BATCH_BLOCKS_MAX).unwrap_or(u64::MAX);
    u32::try_from((bytes / block_size).max(least)).unwrap_or(u32::MAX)
}

impl Volume {
    fn spawn(self: &Arc<Self>, name: &str, run: fn(&Self)) -> Result<()> {
        let worker = Arc::clone(self);
        let handle = spawn(name, move || run(&worker));
        let handle = handle.map_err(Error::store(format!("starting the {name}")))?;
        self.background.lock().push(handle);
        Ok(())
    }

    /// From here on clients are served.
    fn start(
        &self,
        boot: [u8; 16],
        generation: u64,
        buffer_path: Option<&Path>,
        buffer_bytes: u64,
    ) -> Result<()> {
        let mut committer = self.committer.lock();
        let origin = self.origin_device.identify().map_err(Error::origin("identifying it"))?;
        let identity = BufferIdentity { uuid: self.uuid, generation, boot_id: boot, origin };
        let block_count = self.block_count(self.size_bytes());
        let regions = block_count.div_ceil(region_blocks(self.block_size)).min(REGIONS_MAX);
        let regions = u32::try_from(regions).unwrap_or(u32::MAX);
        let arena = if let Some(path) = buffer_path {
            let slots = slots_for(buffer_bytes, self.block_size);
            let size = ArenaSize { slots, regions, block_size: self.block_size };
            let arena = self.host.new_buffer(path, size, &identity);
            arena.map_err(Error::store(format!("making {}", path.display())))?
        } else {
            private_arena(self.block_size, regions)?
        };
        arena.note_alive(unix_ns());
        let entry = Entry::Opened {
            boot_id: boot,
            generation,
            origin: bytes_of(&self.origin_path),
            buffer: buffer_path.map(bytes_of).unwrap_or_default(),
        };
        committer.journal.append(&entry)?;
        let mut state = self.state.lock();
        state.admitted_slots = to_usize(super::ADMIT_BYTES_MIN / self.block_size);
        state.regions = Regions::new(Arc::clone(&arena), self.block_size, block_count);
        state.buffer = WriteBuffer::new(arena, 1);
        drop(state);
        self.recount(&mut committer);
        Ok(())
    }

    /// Clean stop: everything on the origin, durably, and the store says so. Afterwards any tool
    /// can use it. A running restore is suspended: until it goes on the origin alone is not the
    /// restored disk.
    pub fn close(&self) -> Result<()> {
        self.put_away_clones();
        let mut committer = self.role()?;
        let epoch = committer.epoch;
        // Close the gate for good: what was admitted before drains, nothing else comes.
        let upto = {
            let mut state = self.state.lock();
            state.is_closed = true;
            while !state.in_flight.is_empty() {
                self.drained.wait_for(&mut state, std::time::Duration::from_millis(10));
            }
            state.buffer.last_sequence()
        };
        let undone = self.undo_instant(&mut committer);
        let drained = undone.and_then(|()| self.commit_until(&mut committer, epoch, upto, None));
        let synced = drained.and_then(|()| self.sync_origin());
        if let Err(error) = synced {
            let reason = error.to_string().into_bytes();
            // The store knows that it was not closed; this says why, unless the store is what
            // failed.
            if !self.state.lock().origin_failure.is_empty() {
                let _ = committer.journal.append(&Entry::OriginFailed { reason });
            }
            drop(committer);
            self.abandon();
            return Err(error);
        }
        committer.note_owed_groups();
        let closed = self.note_closed(&mut committer);
        drop(committer);
        self.abandon();
        closed
    }

    fn note_closed(&self, committer: &mut Committer) -> Result<()> {
        // A full store may refuse both; then the next opening takes open regions for changed, and
        // verifies the last batch, as after a power cut.
        self.close_regions(committer);
        let _ = self.seal(committer);
        committer.log.release_ahead();
        let identity = self.origin_device.identify().map_err(Error::origin("identifying it"))?;
        let next_batch = committer.log.next_batch();
        committer.journal.append(&Entry::Closed { identity, next_batch })?;
        self.state.lock().buffer.arena().remove();
        Ok(())
    }

    /// Stop without a clean close, as a kill would: the next opening recovers.
    pub fn abandon(&self) {
        {
            let mut state = self.state.lock();
            state.is_closed = true;
            state.is_stopping = true;
        }
        self.work.notify_all();
        self.room.notify_all();
        self.gate_opened.notify_all();
        self.restore_ended.notify_all();
        self.stopping.notify_all();
        self.upkeep_wanted.notify_all();
        let handles = std::mem::take(&mut *self.background.lock());
        for handle in handles {
            // It never panics while nobody else does; there is nothing to learn from it here.
            let _ = handle.join();
        }
        // Whoever else does upkeep notices soon; files it writes are those of the next process.
        drop(self.upkeep.lock());
        // Before the lock is given back: a view looks at it after it has read.
        self.is_released.store(true, Ordering::Release);
        self.abandon_clones();
        self.origin_device.release();
        drop(self.store_lock.lock().take());
    }
}

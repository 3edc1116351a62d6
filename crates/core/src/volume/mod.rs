//! One origin with its store: the state that every request meets, and who may change it.
//!
//! - [`open`] makes, opens and closes volumes; [`decided`] rebuilds all state from the store,
//!   [`recover`] finishes what was interrupted, [`host`] asks the operating system.
//! - [`write`] and [`read`] are the request path; [`commit`] is what happens to first changes
//!   behind it.
//! - [`load`] reads the index; [`upkeep`], [`freeing`], [`merge`] and [`compaction`] are what is
//!   done behind everything else.
//! - [`past`] reads what blocks were at an instant.
//! - [`room`] allocates log space ahead and applies the policy of a full store; [`loss`] chooses what
//!   is lost, and says so.
//! - [`regions`] opens and closes regions, where changes need no record of their own.
//! - [`gate`] admits writes; [`instant`] takes snapshots, [`group`] of several volumes at once; [`release`] narrows and
//!   deletes them; [`restore`] puts them back.
//!
//! **The committer role.** Whoever holds [`Volume::committer`] is the only one to append to the
//! log, to decide in the journal, to change bits downwards and to begin epochs. Any thread may take
//! the role: the background thread, a flush, a snapshot. Clients never need it for reads, straight
//! writes and writes that find a slot.
//!
//! **Locks, in this order:** `upkeep`, `committer`, `epochs`, `state`, `index`. Only the first two
//! are held across I/O. `syncing` comes after `committer` and before the others, across a sync of
//! the origin. `punching` is taken by readers of preserved content, last, and across their read of
//! the store. Of the two of [`crate::clone::Clones`] one comes before all others, one after.

pub mod check;
mod commit;
mod compaction;
mod decided;
mod freeing;
mod gate;
mod group;
pub mod host;
mod increment;
pub mod inspect;
mod instant;
mod load;
mod loss;
mod merge;
pub mod open;
mod past;
mod read;
mod recover;
mod regions;
mod release;
mod restore;
mod room;
#[cfg(test)]
mod tests;
mod upkeep;
mod watch;
mod write;

pub use gate::Quiet;
pub use group::{GroupMoment, Member, Objects, snapshot_group};
pub use instant::{Instant, SnapshotRequest, nanoseconds};
pub(crate) use past::Patience;
pub(crate) use read::push_status;
pub use release::EpochInfo;
pub use restore::{RestoreRequest, RestoreStatus};
pub use room::{LIMIT_BYTES_MIN, StoreUsage};
pub use upkeep::Effort;
pub use watch::{Moment, Told};

pub use crate::journal::{OnFull, StorePolicy};

use self::host::{Held, Host, OriginDevice};
use crate::bitmap::Bitmap;
use crate::buffer::WriteBuffer;
use crate::epochs::{Epochs, Selections};
use crate::error::{Error, Result};
use crate::extent::{Extent, round_out};
use crate::index::Index;
use crate::journal::Journal;
use crate::log::batch::BatchBuilder;
use crate::log::writer::{LogWriter, Segments};
use crate::number::to_u64;
use crate::regions::Regions;
use crate::storage::Storage;
use crate::sync::{AtomicBool, AtomicU64, Clock, Condvar, JoinHandle, Mutex, MutexGuard, RwLock};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64 as Count, Ordering};
use std::time::Duration;

/// Requests run in pieces of at most this, so that an instant never waits for a long one.
const PIECE_BYTES: u64 = 1 << 20;
/// The committer runs when this much waits,
const COMMIT_BYTES: u64 = 1 << 20;
/// or when the oldest slot is this old.
const COMMIT_AGE: Duration = Duration::from_millis(50);
/// The buffer admits what the measured drain rate settles in this time.
const DRAIN_TIME: Duration = Duration::from_millis(500);
/// It always admits this much, or the rate could never be measured.
const ADMIT_BYTES_MIN: u64 = 4 << 20;

/// What requests see and change; every access is short and in memory.
#[allow(clippy::struct_excessive_bools)] // five questions, each with its own answer
struct State {
    /// Writes admitted now belong to it.
    epoch: u32,
    /// Which writes may be admitted.
    gate: gate::Gate,
    /// Writes on their way to the origin without a slot.
    in_flight: gate::InFlight,
    /// The next write is a first change of the epoch and must be recorded.
    unsettled: Bitmap,
    /// Its old content must be preserved too.
    pending: Bitmap,
    /// Blocks that read as in a snapshot until a restore has copied them.
    restoring: Option<Restoring>,
    /// Grows whenever a block's base moves from a snapshot to the origin.
    restored: u64,
    buffer: WriteBuffer,
    /// Blocks that may change without a record, and those that did.
    regions: Regions,
    /// Slots that may be in use, from the measured drain rate.
    admitted_slots: usize,
    size_bytes: u64,
    /// Why the origin cannot be trusted to keep what it is given; empty if it can.
    origin_failure: String,
    /// Why not even a loss can be recorded; empty if it can.
    store_failure: String,
    /// Log space for first changes that are still to be recorded.
    room: room::Room,
    /// Somebody wants to know when the last write came.
    watched_writes: Option<watch::WatchedWrites>,
    is_closed: bool,
    /// Somebody waits for the committer to run now.
    is_kicked: bool,
    is_stopping: bool,
    /// There may be something to do behind everything else.
    is_upkeep_wanted: bool,
}

struct Restoring {
    source_epoch: u32,
    safety_epoch: u32,
    blocks: Bitmap,
    total_blocks: u64,
    remaining_blocks: u64,
    /// Blocks whose content could not be read, until all others are done; then they are tried
    /// again.
    unreadable: BTreeSet<u64>,
    /// Why; empty if all went well.
    failure: String,
}

/// What only the holder of the role touches.
pub(crate) struct Committer {
    log: LogWriter,
    batch: BatchBuilder,
    journal: Journal,
    /// The epoch whose header is durable, 0 before the first.
    epoch: u32,
    /// Highest epoch number ever given out.
    epoch_max: u32,
    /// Segment files and the epoch each belongs to.
    segments: BTreeMap<u32, u32>,
    /// Deletions and the like so far: what has to be given back.
    decisions: u64,
    /// What snapshots selected when nothing was owed; those taken since, at their instants.
    settled: Selections,
    drain_bytes_per_second: u64,
    /// Bytes the store takes, what is allocated ahead included; an estimate between two counts.
    used_bytes: u64,
    /// Those that are taken for what upkeep writes.
    upkeep_bytes: u64,
    /// An instant that failed and could be neither removed nor denied: nothing may be recorded
    /// before that is done.
    to_undo: Option<u32>,
    /// The journal says that the origin failed.
    is_failure_noted: bool,
    /// When regions were looked through for idle ones.
    regions_looked: Clock,
    /// Those found idle that are still to be closed.
    resting_regions: Vec<u64>,
    /// An epoch in which regions that a process before left open could not be closed.
    barred_regions: Option<u32>,
    /// Groups begun here whose end the journal does not say, by epoch.
    groups: BTreeMap<u32, group::OpenGroup>,
}

/// What only whoever does upkeep touches.
struct Upkeep {
    /// Decisions after which everything was given back.
    decisions: u64,
    /// Blocks before this one have been given back already.
    resume_at: u64,
    /// The next index file's number.
    next_run: u32,
    /// Epochs that cannot be read whole, and stay as they are.
    unmergeable: BTreeSet<u32>,
}

/// Counters since the volume was opened.
#[derive(Default)]
pub struct Counters {
    /// Writes that went straight to the origin.
    pub straight_writes: Count,
    /// Writes that took slots.
    pub buffered_writes: Count,
    /// Large pieces that were preserved without slots.
    pub bypass_writes: Count,
    /// Times a write waited for room in the buffer.
    pub buffer_waits: Count,
    /// Blocks preserved with content.
    pub preserved_blocks: Count,
    /// Blocks whose old content was zero.
    pub preserved_zero_blocks: Count,
    /// Blocks whose old content was lost.
    pub lost_blocks: Count,
    /// Runs of tracked-only blocks for which a region was opened.
    pub region_records: Count,
    /// Batches made durable.
    pub batches: Count,
    /// Bytes appended to the log.
    pub log_bytes: Count,
    /// Longest time the gate was closed.
    pub pause_ns_max: Count,
    /// Times that upkeep failed; it is tried again.
    pub upkeep_failures: Count,
}

impl Counters {
    fn add(counter: &Count, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }

    /// Name and value of each.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let of = |counter: &Count| counter.load(Ordering::Relaxed);
        vec![
            ("straight_writes", of(&self.straight_writes)),
            ("buffered_writes", of(&self.buffered_writes)),
            ("bypass_writes", of(&self.bypass_writes)),
            ("buffer_waits", of(&self.buffer_waits)),
            ("preserved_blocks", of(&self.preserved_blocks)),
            ("preserved_zero_blocks", of(&self.preserved_zero_blocks)),
            ("lost_blocks", of(&self.lost_blocks)),
            ("region_records", of(&self.region_records)),
            ("batches", of(&self.batches)),
            ("log_bytes", of(&self.log_bytes)),
            ("pause_ns_max", of(&self.pause_ns_max)),
            ("upkeep_failures", of(&self.upkeep_failures)),
        ]
    }
}

/// An open volume. All methods may be called from many threads.
pub struct Volume {
    uuid: [u8; 16],
    block_size: u64,
    store_path: PathBuf,
    origin_path: PathBuf,
    origin: Arc<dyn Storage>,
    origin_device: Arc<dyn OriginDevice>,
    host: Arc<dyn Host>,
    /// What is left to an origin on the store's filesystem that needs more than is free there.
    origin_share: Option<u64>,
    segments: Arc<Segments>,
    /// Writable views on snapshots.
    pub(crate) clones: crate::clone::Clones,
    meta: Mutex<Vec<u8>>,
    upkeep: Mutex<Upkeep>,
    committer: Mutex<Committer>,
    epochs: RwLock<Epochs>,
    state: Mutex<State>,
    index: RwLock<Index>,
    /// Grows with every publication in the index: whoever read the origin looks whether it did.
    index_version: AtomicU64,
    punching: RwLock<()>,
    /// Copies that were found to fail their checksum.
    rotten: Mutex<check::Rotten>,
    /// Somebody wants to know whether reads come through here.
    watched_reads: watch::WatchedReads,
    /// Held while the origin is synced.
    syncing: Mutex<()>,
    /// Syncs of the origin so far.
    syncs_begun: AtomicU64,
    gate_opened: Condvar,
    drained: Condvar,
    room: Condvar,
    work: Condvar,
    restore_ended: Condvar,
    stopping: Condvar,
    upkeep_wanted: Condvar,
    /// First changes are committed before they are acknowledged.
    is_write_through: bool,
    has_background: bool,
    background: Mutex<Vec<JoinHandle<()>>>,
    /// Held for as long as the volume is open: the store belongs to this process.
    store_lock: Mutex<Option<Held>>,
    /// Stores to look in for how a group ended.
    peers: Mutex<BTreeSet<PathBuf>>,
    /// The origin belongs to others from now on: nothing may be read through this volume any more
    /// (P2).
    is_released: AtomicBool,
    /// What happened since the volume was opened.
    pub counters: Counters,
}

impl Volume {
    /// The volume's identity.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Bytes a block.
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.state.lock().size_bytes
    }

    pub(crate) fn host(&self) -> &dyn Host {
        &*self.host
    }

    /// The store directory.
    pub fn store_path(&self) -> &std::path::Path {
        &self.store_path
    }

    /// The origin's path.
    pub fn origin_path(&self) -> &std::path::Path {
        &self.origin_path
    }

    /// The latest instant, 0 if there never was one.
    pub fn current_epoch(&self) -> u32 {
        self.state.lock().epoch
    }

    fn block_count(&self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(self.block_size)
    }

    /// Bytes of `block` that exist on a disk of `size_bytes`.
    fn valid_bytes(&self, block: u64, size_bytes: u64) -> u64 {
        size_bytes.saturating_sub(block * self.block_size).min(self.block_size)
    }

    fn check_range(state: &State, offset: u64, length: u64) -> Result<()> {
        if state.is_closed {
            return Err(Error::Closed);
        }
        match offset.checked_add(length) {
            Some(end) if end <= state.size_bytes => Ok(()),
            _ => Err(Error::Usage(format!(
                "bytes {offset}+{length} reach past the end of the disk at {}",
                state.size_bytes
            ))),
        }
    }

    fn check_writable(state: &State) -> Result<()> {
        if state.origin_failure.is_empty() {
            return Ok(());
        }
        Err(Error::Origin {
            what: "writes are refused since the origin failed".into(),
            source: std::io::Error::other(state.origin_failure.clone()),
        })
    }

    fn extent_of(&self, offset: u64, length: u64) -> Extent {
        round_out(offset, length, self.block_size)
    }

    /// Take the role, unless the volume is closed.
    pub(crate) fn role(&self) -> Result<MutexGuard<'_, Committer>> {
        let committer = self.committer.lock();
        if self.state.lock().is_closed { Err(Error::Closed) } else { Ok(committer) }
    }

    /// The same, unless somebody else keeps it for longer.
    fn role_until(&self, deadline: Clock) -> Result<MutexGuard<'_, Committer>> {
        let left = deadline.saturating_duration_since(Clock::now());
        let Some(committer) = self.committer.try_lock_for(left) else {
            return Err(Error::PauseTimeout(format!(
                "the volume with the store {} has been busy for too long; no snapshot was taken; \
                 try again when its disks have less to do",
                self.store_path.display()
            )));
        };
        if self.state.lock().is_closed { Err(Error::Closed) } else { Ok(committer) }
    }

    /// Wake the background thread.
    fn kick(&self, state: &mut State) {
        state.is_kicked = true;
        self.work.notify_one();
    }

    /// The volume's opaque bytes.
    pub fn meta(&self) -> Vec<u8> {
        self.meta.lock().clone()
    }

    /// Replace the volume's opaque bytes; durable when this returns.
    pub fn set_meta(&self, meta: Vec<u8>) -> Result<()> {
        let mut committer = self.role()?;
        committer.journal.append(&crate::journal::Entry::VolumeMeta(meta.clone()))?;
        *self.meta.lock() = meta;
        Ok(())
    }

    /// Bytes the store takes for what it keeps; not what is allocated for what may come.
    pub fn store_bytes(&self) -> Result<u64> {
        let committer = self.role()?;
        let total = self.allocated(&committer)?;
        Ok(total.saturating_sub(committer.log.ahead_bytes()))
    }

    /// Gauges beside the counters.
    pub fn gauges(&self) -> Vec<(&'static str, u64)> {
        let (index_records, index_entries, index_files) = {
            let index = self.index.read();
            let filed = index.layers().iter().map(|layer| layer.run.entry_count()).sum::<u64>();
            (index.record_count(), filed, to_u64(index.layers().len()))
        };
        let state = self.state.lock();
        vec![
            ("buffer_slots_used", to_u64(state.buffer.used())),
            ("buffer_slots", to_u64(state.buffer.capacity())),
            ("buffer_slots_admitted", to_u64(state.admitted_slots)),
            ("regions_open", to_u64(state.regions.open_count())),
            ("bitmap_bytes", state.unsettled.memory_bytes() + state.pending.memory_bytes()),
            ("index_records", index_records),
            ("index_entries", index_entries),
            ("index_files", index_files),
            ("size_bytes", state.size_bytes),
            ("epoch", u64::from(state.epoch)),
        ]
    }
}

//! Making, opening and closing volumes. Everything in memory is rebuilt from the store; nothing is
//! written before it is decided what there is.

use super::{Committer, Counters, Restoring, State, Volume};
use crate::bitmap::Bitmap;
use crate::buffer::{Arena, BufferIdentity, LeftBuffer, WriteBuffer, note_replaying, read_left};
use crate::epochs::{Bookmark, Epoch, Epochs};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::index::{Index, Record};
use crate::journal::{Entry, Journal, OriginIdentity};
use crate::log::batch::BatchBuilder;
use crate::log::format::{BATCH_BLOCKS_MAX, Kind};
use crate::log::scan::{Scan, scan};
use crate::log::writer::{LogWriter, Segments};
use crate::number::to_usize;
use crate::storage::{Directory, FileDirectory, FileStorage, OpenOptions, Storage};
use parking_lot::{Condvar, Mutex, RwLock};
use rustix::fs::FlockOperation;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The directory of log segments in the store.
const LOG_DIRECTORY: &str = "log";
const LOCK_NAME: &str = "lock";
/// Smallest and largest block sizes: a page of the log; as many sectors as a slot's mask has bits.
const BLOCK_SIZES: std::ops::RangeInclusive<u64> = 4096..=65536;
/// A write-through volume still needs slots for the writes in flight.
const WRITE_THROUGH_BYTES: u64 = 16 << 20;
/// The killed process may have written for this long after it last said that it lives.
const ALIVE_SLACK_NS: u64 = 3_000_000_000;

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
}

/// Nanoseconds since 1970.
pub fn now_unix_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

fn path_of(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

fn bytes_of(path: &Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes().to_vec()
}

fn boot_id() -> Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let text = text.map_err(Error::origin("reading the kernel's boot id"))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let mut id = [0; 16];
    for (byte, pair) in id.iter_mut().zip(digits.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).unwrap_or("0");
        *byte = u8::from_str_radix(pair, 16).unwrap_or(0);
    }
    Ok(id)
}

/// What tells the origin from other disks now.
pub fn identify(file: &File) -> std::io::Result<OriginIdentity> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let meta = file.metadata()?;
    if meta.file_type().is_block_device() {
        let bytes = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?;
        return Ok(OriginIdentity { device: meta.rdev(), inode: 0, bytes, modified_unix_ns: 0 });
    }
    let seconds = u64::try_from(meta.mtime()).unwrap_or(0);
    let nanos = u64::try_from(meta.mtime_nsec()).unwrap_or(0);
    Ok(OriginIdentity {
        device: meta.dev(),
        inode: meta.ino(),
        bytes: meta.len(),
        modified_unix_ns: seconds.saturating_mul(1_000_000_000).saturating_add(nanos),
    })
}

fn open_origin(path: &Path, direct: bool) -> Result<FileStorage> {
    let opened = FileStorage::open(path, OpenOptions { direct, read_only: false });
    let storage = opened.map_err(Error::origin(format!("opening {}", path.display())))?;
    lock_origin(storage.file(), path)?;
    Ok(storage)
}

/// Others must not write to the origin: QEMU and ourselves respect a lock of the whole file.
fn lock_origin(file: &File, path: &Path) -> Result<()> {
    if lock_whole(file, libc::F_WRLCK) {
        return Ok(());
    }
    Err(Error::Locked(format!(
        "{} is in use by another process; stop it, then try again",
        path.display()
    )))
}

/// An open file description lock: it belongs to the opening, not to the process, fcntl(2).
fn lock_whole(file: &File, kind: libc::c_int) -> bool {
    let whole = libc::flock {
        l_type: kind.try_into().unwrap_or_default(),
        l_whence: libc::SEEK_SET.try_into().unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `whole` is a valid, initialised lock that outlives the
    // call.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) == 0 }
}

fn lock_store(store: &Path) -> Result<File> {
    let path = store.join(LOCK_NAME);
    let opened = File::options().create(true).truncate(false).write(true).open(&path);
    let file = opened.map_err(Error::store(format!("opening {}", path.display())))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(_) => Err(Error::Locked(format!(
            "the store {} is open in another process; use that one, or stop it",
            store.display()
        ))),
    }
}

fn default_buffer_dir() -> Option<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let candidates = runtime.into_iter().chain(std::iter::once(PathBuf::from("/dev/shm")));
    candidates.into_iter().find(|dir| is_memory(dir) && is_writable(dir))
}

/// True if the directory lies on a filesystem that is in memory and outlives the process.
fn is_memory(dir: &Path) -> bool {
    /// `TMPFS_MAGIC` and `RAMFS_MAGIC`, statfs(2).
    const MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
    let kind = rustix::fs::statfs(dir).map(|s| u64::try_from(s.f_type).unwrap_or(0));
    kind.is_ok_and(|kind| MEMORY.contains(&kind))
}

fn is_writable(dir: &Path) -> bool {
    rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_ok()
}

fn hex(uuid: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(uuid))
}

fn random_uuid() -> Result<[u8; 16]> {
    use std::io::Read;
    let mut uuid = [0; 16];
    let read = File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut uuid));
    read.map_err(Error::store("reading random bytes"))?;
    // Version 4, variant 1: RFC 9562, section 5.4.
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}

/// Make a store for an origin; tells the volume's identity.
pub fn create(request: &CreateRequest) -> Result<[u8; 16]> {
    let size_ok = BLOCK_SIZES.contains(&request.block_size) && request.block_size.is_power_of_two();
    if !size_ok {
        return Err(Error::Usage(format!(
            "block size {} is not a power of two from 4096 to 65536",
            request.block_size
        )));
    }
    let origin = open_origin(&request.origin, false)?;
    let identity = identify(origin.file()).map_err(Error::origin("identifying it"))?;
    if identity.bytes == 0 {
        return Err(Error::Usage(format!("{} has no bytes", request.origin.display())));
    }
    let store = &request.store;
    let making = || Error::store(format!("making {}", store.display()));
    std::fs::create_dir_all(store.join(LOG_DIRECTORY)).map_err(making())?;
    let _lock = lock_store(store)?;
    let names = FileDirectory::new(store).list().map_err(making())?;
    if names.iter().any(|name| name == crate::journal::JOURNAL_NAME) {
        return Err(Error::Usage(format!("{} is a store already", store.display())));
    }
    let path = std::fs::canonicalize(&request.origin).map_err(Error::origin("its path"))?;
    let uuid = random_uuid()?;
    let first = Entry::Created {
        uuid,
        block_size: u32::try_from(request.block_size).expect("checked above"),
        origin: bytes_of(&path),
        identity,
        meta: request.meta.clone(),
    };
    Journal::create(&FileDirectory::new(store), &first)?;
    if let Some(parent) = store.parent().filter(|p| !p.as_os_str().is_empty()) {
        FileDirectory::new(parent).sync().map_err(making())?;
    }
    Ok(uuid)
}

/// What a store says of itself; it may be in use.
pub fn peek(store: &Path) -> Result<StoreInfo> {
    let (_, entries) = Journal::open(&FileDirectory::new(store))
        .map_err(|error| not_a_store(store, error.into()))?;
    let decided = Decided::from(entries)
        .ok_or_else(|| Error::Damaged(format!("{} has no first record", store.display())))?;
    Ok(StoreInfo {
        uuid: decided.uuid,
        origin: path_of(&decided.origin),
        block_size: decided.block_size,
        meta: decided.meta,
    })
}

fn not_a_store(store: &Path, error: Error) -> Error {
    match error {
        Error::Store { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Error::NotFound(format!("{} is not a store: it has no journal", store.display()))
        }
        other => other,
    }
}

/// The journal, folded.
#[derive(Default)]
struct Decided {
    uuid: [u8; 16],
    block_size: u64,
    origin: Vec<u8>,
    meta: Vec<u8>,
    size_bytes: u64,
    generation: u64,
    opened: Option<([u8; 16], Vec<u8>)>,
    closed: Option<(OriginIdentity, u64)>,
    aborted: BTreeSet<u32>,
    restores_ended: BTreeSet<u32>,
    lost: Vec<(u32, ExtentSet)>,
    suspect: Option<(u32, String)>,
    origin_failure: String,
    /// Something was deleted or narrowed and its space not given back yet.
    owes_space: bool,
    epoch_max: u32,
    entries: Vec<Entry>,
}

impl Decided {
    fn from(entries: Vec<Entry>) -> Option<Self> {
        let mut decided = Self::default();
        let Some(Entry::Created { .. }) = entries.first() else { return None };
        for entry in &entries {
            decided.take(entry);
        }
        decided.entries = entries;
        Some(decided)
    }

    fn take(&mut self, entry: &Entry) {
        match entry {
            Entry::Created { uuid, block_size, origin, identity, meta } => {
                self.uuid = *uuid;
                self.block_size = u64::from(*block_size);
                self.origin.clone_from(origin);
                self.meta.clone_from(meta);
                self.size_bytes = identity.bytes;
            }
            Entry::Opened { boot_id, generation, origin, buffer } => {
                self.generation = *generation;
                self.origin.clone_from(origin);
                self.opened = Some((*boot_id, buffer.clone()));
                self.closed = None;
            }
            Entry::Closed { identity, next_batch } => self.closed = Some((*identity, *next_batch)),
            Entry::VolumeMeta(meta) => self.meta.clone_from(meta),
            Entry::Narrowed { epoch, .. }
            | Entry::Deleted { epoch }
            | Entry::BookmarkDeleted { epoch } => {
                self.owes_space = true;
                self.epoch_max = self.epoch_max.max(*epoch);
            }
            Entry::Freed => self.owes_space = false,
            Entry::Resized { bytes, .. } => self.size_bytes = *bytes,
            Entry::Aborted { epoch } => {
                self.aborted.insert(*epoch);
                self.epoch_max = self.epoch_max.max(*epoch);
            }
            Entry::Lost { epoch, blocks } => self.lost.push((*epoch, blocks.clone())),
            Entry::Suspect { epoch, reason } => {
                self.suspect = Some((*epoch, String::from_utf8_lossy(reason).into_owned()));
            }
            Entry::RestoreEnded { epoch } => {
                self.restores_ended.insert(*epoch);
            }
            Entry::OriginFailed { reason } => {
                self.origin_failure = String::from_utf8_lossy(reason).into_owned();
            }
            Entry::Recovered => self.origin_failure.clear(),
            Entry::EpochMeta { .. } | Entry::Bookmarked { .. } => {}
        }
    }

    /// The registry: epoch headers, then what the journal says of them, in order.
    fn epochs(&self, scan: &Scan) -> Epochs {
        let mut epochs = Epochs::default();
        for segment in scan.segments.values() {
            let Some(header) = &segment.epoch_header else { continue };
            let epoch = Epoch {
                origin_bytes: header.origin_bytes,
                created_unix_ns: header.created_unix_ns,
                selection: Some(Arc::new(header.selection.clone())),
                bookmark: None,
                meta: header.meta.clone(),
                suspect: String::new(),
                pins: 0,
            };
            if !self.aborted.contains(&header.epoch) {
                epochs.0.insert(header.epoch, epoch);
            }
        }
        for entry in &self.entries {
            apply(&mut epochs, entry);
        }
        for (segment, last) in scan.losses() {
            for found in epochs.0.range_mut(..=last).map(|(_, found)| found) {
                found.suspect = format!(
                    "log segment {segment:08x} is missing or damaged; what it held gives errors"
                );
            }
        }
        epochs.drop_dead();
        epochs
    }
}

fn apply(epochs: &mut Epochs, entry: &Entry) {
    match entry {
        Entry::EpochMeta { epoch, meta } => {
            if let Some(found) = epochs.0.get_mut(epoch) {
                found.meta.clone_from(meta);
            }
        }
        Entry::Narrowed { epoch, selection } => {
            if let Some(found) = epochs.0.get_mut(epoch) {
                found.selection = Some(Arc::new(selection.clone()));
            }
        }
        Entry::Deleted { epoch } => {
            if let Some(found) = epochs.0.get_mut(epoch) {
                found.selection = None;
            }
        }
        Entry::Bookmarked { epoch, meta } => {
            if let Some(found) = epochs.0.get_mut(epoch) {
                let baseline = found.selection.clone().unwrap_or_default();
                found.bookmark = Some(Bookmark { baseline, meta: meta.clone() });
            }
        }
        Entry::BookmarkDeleted { epoch } => {
            if let Some(found) = epochs.0.get_mut(epoch) {
                found.bookmark = None;
            }
        }
        Entry::Suspect { epoch, reason } => {
            for (_, found) in epochs.0.range_mut(..=*epoch) {
                found.suspect = String::from_utf8_lossy(reason).into_owned();
            }
        }
        _ => {}
    }
}

fn index_of(scan: &Scan, decided: &Decided) -> Index {
    let block_size = decided.block_size;
    let mut records = Vec::new();
    for batch in &scan.batches {
        let epoch = batch.header.epoch;
        let kept = batch.preserved(block_size);
        records.extend(kept.map(|(block, position, checksum)| Record {
            block,
            position,
            epoch,
            checksum,
        }));
    }
    let mut index = Index::from_records(records);
    for batch in &scan.batches {
        let epoch = batch.header.epoch;
        for descriptor in &batch.descriptors {
            match descriptor.kind {
                Kind::Preserve | Kind::Done => {}
                Kind::PreserveZero => index.insert_zero(epoch, descriptor.blocks),
                Kind::Lost => {
                    index.insert_lost(epoch, &ExtentSet::from_extent(descriptor.blocks));
                }
                Kind::Changed => index.insert_changed(epoch, descriptor.blocks),
            }
        }
    }
    for (epoch, blocks) in &decided.lost {
        index.insert_lost(*epoch, blocks);
    }
    for (_, epoch) in scan.losses() {
        index.mark_damaged(epoch);
    }
    index
}

/// The restore that was running, and how far it was.
fn restoring_of(scan: &Scan, decided: &Decided, blocks: u64) -> Option<Restoring> {
    let mut headers = scan.segments.values().filter_map(|s| s.epoch_header.as_ref());
    let ended =
        |epoch: u32| decided.restores_ended.contains(&epoch) || decided.aborted.contains(&epoch);
    let header = headers.rfind(|h| h.restore.is_some() && !ended(h.epoch))?;
    let restore = header.restore.as_ref()?;
    let mut bitmap = Bitmap::from_set(blocks, &restore.blocks);
    let done = scan.batches.iter().filter(|b| b.header.epoch == header.epoch);
    for descriptor in done.flat_map(|b| &b.descriptors).filter(|d| d.kind == Kind::Done) {
        let inside = descriptor.blocks.intersection(Extent::new(0, blocks));
        bitmap.assign(inside, false);
    }
    Some(Restoring {
        source_epoch: restore.source_epoch,
        safety_epoch: header.epoch,
        total_blocks: restore.blocks.block_count(),
        remaining_blocks: bitmap.count(),
        unreadable: BTreeSet::new(),
        failure: String::new(),
        blocks: bitmap,
    })
}

/// Everything a volume is put together from.
struct Parts {
    request: OpenRequest,
    decided: Decided,
    journal: Journal,
    scan: Scan,
    origin: Arc<FileStorage>,
    /// The origin as the engine reads and writes it.
    storage: Arc<dyn Storage>,
    origin_path: PathBuf,
    segments: Arc<Segments>,
    store_lock: File,
}

/// Open a volume: it belongs to this process until it is closed or dropped.
pub fn open(request: OpenRequest) -> Result<Arc<Volume>> {
    open_through(request, &|origin| origin, &|directory| directory)
}

/// As [`open`], with something between the engine and its devices: tests put faults there.
pub fn open_through(
    request: OpenRequest,
    origin_through: &dyn Fn(Arc<dyn Storage>) -> Arc<dyn Storage>,
    directory_through: &dyn Fn(Arc<dyn Directory>) -> Arc<dyn Directory>,
) -> Result<Arc<Volume>> {
    let store_lock = match lock_store(&request.store) {
        Err(Error::Store { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::NotFound(format!("no store at {}", request.store.display())));
        }
        other => other?,
    };
    let directory = directory_through(Arc::new(FileDirectory::new(&request.store)));
    let opened = Journal::open(&*directory).map_err(Error::from);
    let (journal, entries) = opened.map_err(|error| not_a_store(&request.store, error))?;
    let decided = Decided::from(entries).ok_or_else(|| {
        Error::Damaged(format!("{} has no first record", request.store.display()))
    })?;
    let origin_path = request.origin.clone().unwrap_or_else(|| path_of(&decided.origin));
    let origin = Arc::new(open_origin(&origin_path, request.direct)?);
    let storage = origin_through(Arc::clone(&origin) as Arc<dyn Storage>);
    let log_directory = FileDirectory::new(&request.store.join(LOG_DIRECTORY));
    let segments = Arc::new(Segments::new(directory_through(Arc::new(log_directory))));
    let mut scan = scan(&segments, decided.uuid, decided.block_size, &decided.aborted)?;
    if let Some((_, next_batch)) = decided.closed {
        scan.expect_end(next_batch);
    }
    let parts = Parts {
        request,
        decided,
        journal,
        scan,
        origin,
        storage,
        origin_path,
        segments,
        store_lock,
    };
    parts.assemble()
}

impl Parts {
    fn assemble(self) -> Result<Arc<Volume>> {
        let boot = boot_id()?;
        let doubt = self.examine(boot)?;
        let buffer_path = self.buffer_path();
        let (opened, buffer_bytes) = (self.request.has_background, self.request.buffer_bytes);
        let (recover, is_failed) = (self.request.recover, !self.decided.origin_failure.is_empty());
        let generation = self.decided.generation + 1;
        let owes_space = self.decided.owes_space;
        let has_unfinished = !self.scan.unfinished.is_empty();
        let volume = self.build(buffer_path.is_none())?;
        if is_failed && recover == Recover::Refuse {
            return Err(Error::RecoveryNeeded(format!(
                "{} failed to keep what it was given; check the device, then volume recover",
                volume.origin_path.display()
            )));
        }
        volume.settle_the_past(doubt, owes_space || has_unfinished)?;
        if is_failed {
            volume.committer.lock().journal.append(&Entry::Recovered)?;
        }
        volume.start(boot, generation, buffer_path.as_deref(), buffer_bytes)?;
        if opened {
            volume.spawn("committer", Volume::run_background)?;
            volume.spawn("heartbeat", Volume::run_heartbeat)?;
        }
        Ok(volume)
    }

    fn buffer_path(&self) -> Option<PathBuf> {
        if self.request.cache == Cache::WriteThrough {
            return None;
        }
        let dir = self.request.buffer_dir.clone().or_else(default_buffer_dir)?;
        Some(dir.join(format!("stillblock-{}.buffer", hex(self.decided.uuid))))
    }

    /// What the last process left, and whether the origin is still what it was.
    fn examine(&self, boot: [u8; 16]) -> Result<Past> {
        let identity = identify(self.origin.file()).map_err(Error::origin("identifying it"))?;
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
            let is_other = closed.bytes != identity.bytes
                || closed.modified_unix_ns != identity.modified_unix_ns
                || closed.inode != identity.inode;
            let suspect = is_other.then(|| {
                "the origin was written or replaced outside since the volume was closed".to_owned()
            });
            return Ok(Past { suspect, left: None });
        }
        if *last_boot != boot || buffer.is_empty() {
            // A power cut takes the buffer with it, as it takes any disk's cache.
            return Ok(Past::default());
        }
        self.examine_left(buffer, identity)
    }

    fn examine_left(&self, buffer: &[u8], identity: OriginIdentity) -> Result<Past> {
        let path = path_of(buffer);
        let left = read_left(&path).map_err(Error::store("reading the write buffer"))?;
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
        let is_ours = |left: &LeftBuffer| {
            left.identity.uuid == self.decided.uuid
                && left.identity.generation == self.decided.generation
        };
        let recover = self.request.recover;
        let Some(left) = left.filter(is_ours) else {
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
        let same_origin = left.identity.origin.inode == identity.inode;
        let is_touched =
            identity.modified_unix_ns > left.alive_unix_ns.saturating_add(ALIVE_SLACK_NS);
        if (same_origin && !is_touched) || recover != Recover::Refuse {
            let suspect = (is_touched || !same_origin)
                .then(|| "the origin was written outside after the server was killed".to_owned());
            let left = (recover != Recover::Discard).then_some((path, left));
            return Ok(Past { suspect, left });
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
        let Self { request, decided, journal, scan, origin, .. } = self;
        let Self { storage, origin_path, segments, store_lock, .. } = self;
        let epochs = decided.epochs(&scan);
        let size_bytes = decided.size_bytes;
        let block_count = size_bytes.div_ceil(decided.block_size);
        let restoring = restoring_of(&scan, &decided, block_count);
        let in_segments: BTreeMap<u32, u32> =
            scan.segments.iter().map(|(&number, s)| (number, s.header.epoch)).collect();
        let live = in_segments.values().filter(|e| !decided.aborted.contains(e));
        let epoch =
            live.copied().max().unwrap_or(0).max(epochs.0.keys().copied().max().unwrap_or(0));
        let epoch_max = in_segments.values().copied().max().unwrap_or(0).max(decided.epoch_max);
        let index = index_of(&scan, &decided);
        let log = LogWriter::new(decided.uuid, Arc::clone(&segments), scan.end)
            .map_err(Error::store("opening the log"))?;
        let committer = Committer {
            log,
            batch: BatchBuilder::new(decided.uuid, decided.block_size),
            journal,
            epoch,
            epoch_max,
            segments: in_segments,
            drain_bytes_per_second: 0,
            is_failure_noted: false,
        };
        // Slots until the past is settled; nobody can be acknowledged by them.
        let arena =
            Arena::private(slots_for(WRITE_THROUGH_BYTES, decided.block_size), decided.block_size);
        let arena = Arc::new(arena.map_err(Error::store("memory for the write buffer"))?);
        let state = State {
            epoch,
            is_gate_closed: false,
            straight_in_flight: 0,
            unsettled: Bitmap::new(block_count),
            pending: Bitmap::new(block_count),
            restoring,
            restored: 0,
            admitted_slots: usize::MAX,
            buffer: WriteBuffer::new(arena, 1),
            size_bytes,
            origin_failure: String::new(),
            store_failure: String::new(),
            is_closed: false,
            is_kicked: false,
            is_stopping: false,
        };
        let identified = Arc::clone(&origin);
        let released = Arc::clone(&origin);
        let release_origin = Box::new(move || {
            lock_whole(released.file(), libc::F_UNLCK);
        });
        let volume = Volume {
            uuid: decided.uuid,
            block_size: decided.block_size,
            store_path: request.store,
            origin_path,
            origin: storage,
            origin_identity: Box::new(move || identify(identified.file())),
            segments,
            meta: Mutex::new(decided.meta.clone()),
            committer: Mutex::new(committer),
            epochs: RwLock::new(epochs),
            state: Mutex::new(state),
            index: RwLock::new(index),
            index_version: AtomicU64::new(0),
            punching: RwLock::new(()),
            syncing: Mutex::new(()),
            syncs_begun: AtomicU64::new(0),
            gate_opened: Condvar::new(),
            drained: Condvar::new(),
            room: Condvar::new(),
            work: Condvar::new(),
            restore_ended: Condvar::new(),
            stopping: Condvar::new(),
            // Without a place that outlives the process nothing may be acknowledged from memory
            // (P6).
            is_write_through,
            has_background: request.has_background,
            background: Mutex::default(),
            locks: Mutex::new(vec![store_lock]),
            is_released: AtomicBool::new(false),
            release_origin,
            counters: Counters::default(),
        };
        Ok(Arc::new(volume))
    }
}

/// What an earlier process left behind.
#[derive(Default)]
struct Past {
    suspect: Option<String>,
    left: Option<(PathBuf, LeftBuffer)>,
}

/// Rebuilding the index takes several times its size for a moment; the allocator would keep it.
fn return_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer and only returns free memory to the system.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn slots_for(bytes: u64, block_size: u64) -> u32 {
    let least = u64::try_from(BATCH_BLOCKS_MAX).unwrap_or(u64::MAX);
    u32::try_from((bytes / block_size).max(least)).unwrap_or(u32::MAX)
}

impl Volume {
    fn spawn(self: &Arc<Self>, name: &str, run: fn(&Self)) -> Result<()> {
        let worker = Arc::clone(self);
        let thread = std::thread::Builder::new().name(name.into());
        let handle = thread.spawn(move || run(&worker));
        let handle = handle.map_err(Error::store(format!("starting the {name}")))?;
        self.background.lock().push(handle);
        Ok(())
    }

    /// Finish what was interrupted. A process that was killed had its writes taken by the kernel,
    /// but not made durable: sync before anything is trusted.
    fn settle_the_past(&self, past: Past, owes_space: bool) -> Result<()> {
        let mut committer = self.committer.lock();
        let epoch = committer.epoch;
        committer.journal.sync()?;
        if let Some(segment) = committer.segments.keys().next_back() {
            let file = self.segments.get(*segment).map_err(Error::store("log segment"))?;
            file.sync().map_err(Error::store("log segment"))?;
        }
        self.origin.sync().map_err(Error::origin("sync at opening"))?;
        let gone = self.forget_unneeded(epoch);
        {
            let blocks = self.block_count(self.size_bytes());
            let (unsettled, pending) = self.bits(epoch, blocks);
            let mut state = self.state.lock();
            (state.unsettled, state.pending) = (unsettled, pending);
            if let Some(restoring) = &state.restoring {
                let pinned = [restoring.source_epoch, restoring.safety_epoch];
                drop(state);
                let mut epochs = self.epochs.write();
                for epoch in pinned {
                    if let Some(found) = epochs.0.get_mut(&epoch) {
                        found.pins += 1;
                    }
                }
            }
        }
        if owes_space {
            self.remove_unfinished(&committer)?;
            self.give_back(&mut committer, &gone)?;
            committer.journal.append(&Entry::Freed)?;
        }
        if let Some(reason) = past.suspect {
            self.mark_suspect(&mut committer, &reason)?;
        }
        if let Some((path, left)) = past.left {
            self.replay(&mut committer, &path, &left)?;
        }
        return_memory();
        Ok(())
    }

    /// Files of instants that never came.
    fn remove_unfinished(&self, committer: &Committer) -> Result<()> {
        let names = self.segments.directory().list().map_err(Error::store("listing the log"))?;
        let numbers = names.iter().filter_map(|n| crate::log::writer::segment_number(n));
        let unknown: Vec<u32> =
            numbers.filter(|number| !committer.segments.contains_key(number)).collect();
        for segment in unknown {
            let file = self.segments.get(segment).map_err(Error::store("log segment"))?;
            // What holds records is never deleted because something else does not know it.
            let is_empty = crate::log::scan::is_without_batches(&file, self.uuid);
            if is_empty.map_err(Error::store("log segment"))? {
                self.segments.remove(segment).map_err(Error::store("log segment"))?;
            }
        }
        self.segments.directory().sync().map_err(Error::store("store directory"))
    }

    fn mark_suspect(&self, committer: &mut Committer, reason: &str) -> Result<()> {
        let last = self.epochs.read().0.keys().next_back().copied();
        let Some(epoch) = last else { return Ok(()) };
        let entry = Entry::Suspect { epoch, reason: reason.as_bytes().to_vec() };
        committer.journal.append(&entry)?;
        apply(&mut self.epochs.write(), &entry);
        Ok(())
    }

    /// Bring acknowledged writes of a killed process to the origin. Repeatable: their originals are
    /// in the log or still on the origin, and the file stays until all is durable.
    fn replay(&self, committer: &mut Committer, path: &Path, left: &LeftBuffer) -> Result<()> {
        let epoch = committer.epoch;
        // Interrupted, it is done again; the origin is then as new as this.
        let alive = || note_replaying(path, now_unix_ns()).map_err(Error::store("write buffer"));
        alive()?;
        for slot in &left.slots {
            let is_full = {
                let mut state = self.state.lock();
                let blocks = state.unsettled.block_count();
                if slot.block < blocks {
                    state.buffer.adopt(slot, epoch);
                }
                state.buffer.free_count() == 0
            };
            if is_full {
                self.commit_until(committer, epoch, u64::MAX, None)?;
                alive()?;
            }
        }
        self.commit_until(committer, epoch, u64::MAX, None)?;
        self.sync_origin()?;
        let identity = (self.origin_identity)().map_err(Error::origin("identifying it"))?;
        let next_batch = committer.log.next_batch();
        committer.journal.append(&Entry::Closed { identity, next_batch })?;
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
        let origin = (self.origin_identity)().map_err(Error::origin("identifying it"))?;
        let identity = BufferIdentity { uuid: self.uuid, generation, boot_id: boot, origin };
        let arena = match buffer_path {
            Some(path) => {
                let slots = slots_for(buffer_bytes, self.block_size);
                let arena = Arena::shared(path, slots, self.block_size, &identity);
                arena.map_err(Error::store(format!("making {}", path.display())))?
            }
            None => {
                Arena::private(slots_for(WRITE_THROUGH_BYTES, self.block_size), self.block_size)
                    .map_err(Error::store("memory for the write buffer"))?
            }
        };
        arena.note_alive(now_unix_ns());
        let entry = Entry::Opened {
            boot_id: boot,
            generation,
            origin: bytes_of(&self.origin_path),
            buffer: buffer_path.map(bytes_of).unwrap_or_default(),
        };
        committer.journal.append(&entry)?;
        let mut state = self.state.lock();
        state.admitted_slots = to_usize(super::ADMIT_BYTES_MIN / self.block_size);
        state.buffer = WriteBuffer::new(Arc::new(arena), 1);
        Ok(())
    }

    /// Clean stop: everything on the origin, durably, and the store says so. Afterwards any tool
    /// can use it. A running restore is suspended: until it goes on the origin alone is not the
    /// restored disk.
    pub fn close(&self) -> Result<()> {
        let mut committer = self.role()?;
        let epoch = committer.epoch;
        // Close the gate for good: what was admitted before drains, nothing else comes.
        let upto = {
            let mut state = self.state.lock();
            state.is_closed = true;
            while state.straight_in_flight > 0 {
                self.drained.wait_for(&mut state, std::time::Duration::from_millis(10));
            }
            state.buffer.last_sequence()
        };
        let drained = self.commit_until(&mut committer, epoch, upto, None);
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
        let closed = self.note_closed(&mut committer);
        drop(committer);
        self.abandon();
        closed
    }

    fn note_closed(&self, committer: &mut Committer) -> Result<()> {
        let Committer { log, batch, .. } = committer;
        // A full store may refuse; without it the next opening verifies the last batch, as after a
        // power cut.
        let _ = log.seal(batch);
        let identity = (self.origin_identity)().map_err(Error::origin("identifying it"))?;
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
        let handles = std::mem::take(&mut *self.background.lock());
        for handle in handles {
            // It never panics while nobody else does; there is nothing to learn from it here.
            let _ = handle.join();
        }
        // Before the lock is given back: a view looks at it after it has read.
        self.is_released.store(true, Ordering::Release);
        (self.release_origin)();
        self.locks.lock().clear();
    }
}

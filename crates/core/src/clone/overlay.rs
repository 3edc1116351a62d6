//! Where a clone's writes are: a sparse file with its own blocks at their own places, and what says
//! which these are.
//!
//! A block is the clone's own once its content is in the data file and `recent` says so, which
//! outlives the process. A flush makes the content durable first and then says so in the map,
//! which outlives everything. So a block that the map names is never one whose content is missing,
//! whenever the power fails.

use super::map::{Header, Known, Map, MapError, Recent};
use crate::bitmap::Bitmap;
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::sabotage::{Rule, is_broken};
use crate::storage::{Directory, Storage};
use crate::sync::{AtomicBool, Condvar, Mutex, RwLock};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64 as Count, Ordering};

/// Past this what was written lately is put into the map with writers waiting.
const RECENT_BYTES_MAX: u64 = 1 << 20;

/// What only a flush touches.
struct Durable {
    map: Map,
    meta: Vec<u8>,
}

/// The writes of one clone. All methods may be called from many threads.
///
/// Locks, in this order: `durable` (held across I/O), `recent`, `own`; `busy` is held alone.
pub(super) struct Overlay {
    header: Header,
    directory: Arc<dyn Directory>,
    data: Arc<dyn Storage>,
    durable: Mutex<Durable>,
    recent: Mutex<Recent>,
    /// Bytes of the medium that the map took when it was last looked at.
    map_bytes: Count,
    /// The clone's own blocks.
    own: RwLock<Bitmap>,
    /// Something was written since the last flush began.
    is_dirty: AtomicBool,
    /// Why nothing may be written any more; empty if it may.
    failure: Mutex<String>,
    /// Blocks that are becoming the clone's own.
    busy: Mutex<Vec<Extent>>,
    let_go: Condvar,
}

/// Blocks that nobody else may make the clone's own.
pub(super) struct Claim<'a> {
    overlay: &'a Overlay,
    blocks: Extent,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut busy = self.overlay.busy.lock();
        if let Some(at) = busy.iter().position(|held| *held == self.blocks) {
            busy.swap_remove(at);
        }
        drop(busy);
        self.overlay.let_go.notify_all();
    }
}

fn found(opened: io::Result<Arc<dyn Storage>>) -> io::Result<Option<Arc<dyn Storage>>> {
    match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

impl Overlay {
    /// Make the files of a clone that owns nothing; they take the place of those of an earlier
    /// generation. It is there, durably, when this returns.
    pub(super) fn make(directory: &dyn Directory, header: Header, meta: &[u8]) -> io::Result<()> {
        let data = directory.create(&header.data_name())?;
        data.set_len(header.size_bytes)?;
        directory.create(&header.recent_name())?;
        let known = Known { meta: meta.to_vec(), ..Known::default() };
        Map::make(directory, header, &known)?;
        directory.sync()
    }

    /// Open them. What the last process of this boot wrote is there, flushed or not.
    pub(super) fn open(
        directory: Arc<dyn Directory>,
        number: u32,
        boot_id: [u8; 16],
    ) -> std::result::Result<Self, MapError> {
        let (map, known) = Map::open(&*directory, number)?;
        let header = *map.header();
        let data = match found(directory.open(&header.data_name()))? {
            Some(data) => data,
            // Its name was not durable when the power failed, so nothing was ever flushed to it.
            None if known.written.is_empty() => directory.create(&header.data_name())?,
            None => return Err(io::Error::from(io::ErrorKind::NotFound).into()),
        };
        if data.len()? < header.size_bytes {
            data.set_len(header.size_bytes)?;
        }
        let recent = match found(directory.open(&header.recent_name()))? {
            Some(recent) => recent,
            None => directory.create(&header.recent_name())?,
        };
        let blocks = header.block_count();
        let recent = Recent::open(recent, boot_id, known.through, blocks)?;
        let mut own = Bitmap::from_set(blocks, &known.written);
        for &(_, extent) in &recent.waiting {
            own.assign(extent, true);
        }
        Ok(Self {
            header,
            directory,
            data,
            map_bytes: Count::new(map.allocated_bytes()?),
            durable: Mutex::new(Durable { map, meta: known.meta }),
            recent: Mutex::new(recent),
            own: RwLock::new(own),
            // A killed process may have written in place as well.
            is_dirty: AtomicBool::new(true),
            failure: Mutex::new(known.failure),
            busy: Mutex::default(),
            let_go: Condvar::new(),
        })
    }

    /// What the clone is.
    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// The opaque bytes.
    pub(super) fn meta(&self) -> Vec<u8> {
        self.durable.lock().meta.clone()
    }

    /// Why nothing may be written any more; empty if it may.
    pub(super) fn failure(&self) -> String {
        self.failure.lock().clone()
    }

    /// Blocks that are the clone's own.
    pub(super) fn own_blocks(&self) -> u64 {
        self.own.read().count()
    }

    /// True if one of the blocks is the clone's own.
    pub(super) fn has_any(&self, blocks: Extent) -> bool {
        self.own.read().any(blocks)
    }

    /// True if all of them are.
    pub(super) fn has_all(&self, blocks: Extent) -> bool {
        self.own.read().run(blocks.start, blocks.end) == (true, blocks.end)
    }

    /// The blocks in runs, with whether each is the clone's own.
    pub(super) fn runs(&self, blocks: Extent) -> Vec<(Extent, bool)> {
        let own = self.own.read();
        let (mut at, mut runs) = (blocks.start, Vec::new());
        while at < blocks.end {
            let (is_own, end) = own.run(at, blocks.end);
            runs.push((Extent::new(at, end), is_own));
            at = end;
        }
        runs
    }

    fn reading() -> impl FnOnce(io::Error) -> Error {
        Error::store("reading a clone's own blocks")
    }

    /// Read the clone's own blocks.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.data.read_at(offset, buffer).map_err(Self::reading())
    }

    /// As [`Overlay::read`] if no device must be waited for.
    pub(super) fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Result<bool> {
        self.data.try_read_at(offset, buffer).map_err(Self::reading())
    }

    /// Where the data file has data, from an offset inside it.
    pub(super) fn data_run(&self, at: u64, end: u64) -> Result<(u64, u64)> {
        let start = self.data.next_data(at, end).map_err(Self::reading())?;
        let stop = if start < end { self.data.next_hole(start, end) } else { Ok(end) };
        Ok((start, stop.map_err(Self::reading())?))
    }

    /// An error if nothing may be written any more.
    pub(super) fn check_writable(&self) -> Result<()> {
        let failure = self.failure();
        if failure.is_empty() {
            return Ok(());
        }
        Err(Error::Store {
            what: "a clone whose writes may be lost takes no more; copy out of it what you need, \
                   then reset or delete it"
                .into(),
            source: io::Error::other(failure),
        })
    }

    /// Wait until nobody else makes any of these blocks the clone's own.
    pub(super) fn claim(&self, blocks: Extent) -> Claim<'_> {
        let mut busy = self.busy.lock();
        while busy.iter().any(|held| !held.intersection(blocks).is_empty()) {
            self.let_go.wait(&mut busy);
        }
        busy.push(blocks);
        Claim { overlay: self, blocks }
    }

    /// Write; the blocks are the clone's own, or are claimed and covered whole.
    pub(super) fn write(&self, offset: u64, slices: &[&[u8]]) -> Result<()> {
        let written = self.data.write_slices_at(offset, slices);
        written.map_err(Error::store("writing a clone's block"))
    }

    /// Zero whole blocks that are the clone's own or claimed.
    pub(super) fn zero(&self, offset: u64, length: u64, may_punch: bool) -> Result<()> {
        let zeroed = self.data.zero_at(offset, length, may_punch);
        zeroed.map_err(Error::store("zeroing a clone's blocks"))
    }

    /// Give the space of the clone's own blocks back.
    pub(super) fn discard(&self, offset: u64, length: u64) -> Result<()> {
        let discarded = self.data.discard_at(offset, length);
        discarded.map_err(Error::store("discarding a clone's blocks"))
    }

    /// Claimed blocks are the clone's own from here on: their content is in the data file.
    pub(super) fn take(&self, claim: &Claim<'_>) -> Result<()> {
        let noted = self.recent.lock().note(claim.blocks);
        noted.map_err(Error::store("noting a clone's block"))?;
        self.own.write().assign(claim.blocks, true);
        Ok(())
    }

    /// Something was written, and is about to be acknowledged.
    pub(super) fn note_dirty(&self) {
        self.is_dirty.store(true, Ordering::Release);
    }

    /// Return when all that was acknowledged is durable.
    pub(super) fn flush(&self) -> Result<()> {
        let mut durable = self.durable.lock();
        self.check_writable()?;
        // Not before the lock is had: a flush under way may be for what this one was asked for.
        if self.is_dirty.swap(false, Ordering::AcqRel) {
            self.make_durable(&mut durable)?;
        }
        Ok(())
    }

    fn make_durable(&self, durable: &mut Durable) -> Result<()> {
        let through = self.recent.lock().last();
        self.sync_data(durable)?;
        self.note_durable(durable, through)?;
        let mut recent = self.recent.lock();
        if recent.bytes() > RECENT_BYTES_MAX {
            // Writers never paused: now they do, so that it can begin at the front again.
            let through = recent.last();
            self.sync_data(durable)?;
            let blocks = waiting(&recent, through);
            let noted = durable.map.note_written(through, &blocks);
            noted.map_err(|error| self.fail(durable, "its map", error))?;
            recent.forget(through);
        }
        drop(recent);
        if durable.map.is_long() {
            self.shorten(durable)?;
        }
        self.count_map(durable);
        Ok(())
    }

    fn count_map(&self, durable: &Durable) {
        // Where a file does not tell its size the number from before stays.
        if let Ok(bytes) = durable.map.allocated_bytes() {
            self.map_bytes.store(bytes, Ordering::Relaxed);
        }
    }

    fn sync_data(&self, durable: &mut Durable) -> Result<()> {
        if is_broken(Rule::CloneDataFirst) {
            return Ok(());
        }
        self.data.sync().map_err(|error| self.fail(durable, "its data", error))
    }

    fn note_durable(&self, durable: &mut Durable, through: u64) -> Result<()> {
        let blocks = waiting(&self.recent.lock(), through);
        let noted = durable.map.note_written(through, &blocks);
        noted.map_err(|error| self.fail(durable, "its map", error))?;
        self.recent.lock().forget(through);
        Ok(())
    }

    /// After a failed sync nobody knows what is durable: nothing more may be promised.
    fn fail(&self, durable: &mut Durable, what: &str, source: io::Error) -> Error {
        let why = format!("making {what} durable failed: {source}");
        // If this cannot be said either, this process still knows.
        let _ = durable.map.note_failed(&why);
        *self.failure.lock() = why;
        Error::store(format!("making a clone's writes durable, {what}"))(source)
    }

    /// Write the map anew, without what was said twice.
    fn shorten(&self, durable: &mut Durable) -> Result<()> {
        let number = self.header.number;
        let reading = |error: MapError| match error {
            MapError::Io(source) => Error::store("reading a clone's map")(source),
            other => Error::Damaged(format!("clone {number}: {other}")),
        };
        let (_, known) = Map::open(&*self.directory, number).map_err(reading)?;
        let made = Map::make(&*self.directory, self.header, &known);
        durable.map = made.map_err(Error::store("writing a clone's map anew"))?;
        // Were the old name back after a power cut, what is said from here on would be gone.
        self.directory.sync().map_err(|error| self.fail(durable, "the name of its map", error))
    }

    /// Replace the opaque bytes, durably.
    pub(super) fn set_meta(&self, meta: Vec<u8>) -> Result<()> {
        let mut durable = self.durable.lock();
        self.check_writable()?;
        let said = durable.map.set_meta(&meta);
        said.map_err(|error| self.fail(&mut durable, "its map", error))?;
        self.count_map(&durable);
        durable.meta = meta;
        Ok(())
    }

    /// Bytes of the medium it takes.
    pub(super) fn allocated_bytes(&self) -> io::Result<u64> {
        let recent = self.recent.lock().allocated_bytes()?;
        // Not under the lock of the map, which is held across I/O.
        let map = self.map_bytes.load(Ordering::Relaxed);
        Ok(map + recent + self.data.allocated_bytes()?)
    }
}

/// What the map does not say yet, up to a number. An empty set is no news.
fn waiting(recent: &Recent, through: u64) -> ExtentSet {
    let upto = recent.waiting.iter().filter(|(number, _)| *number <= through);
    ExtentSet::from_unsorted(upto.map(|&(_, extent)| extent).collect())
}

/// Bytes that the files of a clone take that nobody has open.
pub(super) fn closed_bytes(directory: &dyn Directory, header: &Header) -> io::Result<u64> {
    let names = [Header::map_name(header.number), header.data_name(), header.recent_name()];
    let mut sum = 0;
    for name in names {
        if let Some(file) = found(directory.open(&name))? {
            sum += file.allocated_bytes()?;
        }
    }
    Ok(sum)
}

//! Clones: writable views on snapshots. Which there are is decided by the files in the directory
//! `clones` of the store: a clone is there if its map has its name (`docs/formats/overlay.md`).
//!
//! - [`map`] says which blocks are a clone's own; [`overlay`] has them; [`view`] is the whole disk,
//!   [`export`] the same for a server.

pub mod export;
pub mod map;
mod overlay;
#[cfg(test)]
mod tests;
pub mod view;

use self::map::{Header, MapError};
use self::overlay::{Overlay, closed_bytes};
use self::view::CloneView;
use crate::error::{Error, Result};
use crate::number::to_u64;
use crate::storage::Directory;
use crate::sync::{Mutex, MutexGuard, unix_ns};
use crate::view::{ExcludedReads, View};
use crate::volume::Volume;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// The directory of clones in the store.
pub const CLONES_DIRECTORY: &str = "clones";
/// What is kept beside a clone takes no more than this.
const META_BYTES_MAX: usize = 64 << 10;

/// The clones of a volume.
#[derive(Default)]
pub struct Clones {
    /// Held while one is made, opened, changed or removed, and while it is decided to delete a
    /// snapshot: across I/O, before all other locks of the volume.
    changing: Mutex<()>,
    known: Mutex<BTreeMap<u32, Known>>,
}

#[derive(Clone, Default)]
struct Known {
    /// None if it cannot be read.
    header: Option<Header>,
    meta: Vec<u8>,
    own_blocks: u64,
    /// Bytes it took in the store when it was last closed.
    closed_bytes: u64,
    /// Why it cannot be opened; empty if it can.
    damage: String,
    /// Why it takes no more writes; empty if it does.
    failure: String,
    /// Until it is closed, whoever else has let go of it: it may have more to make durable.
    opened: Option<Arc<CloneView>>,
}

impl Known {
    fn opened(&self) -> Option<Arc<CloneView>> {
        self.opened.clone().filter(|clone| !clone.is_closed())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.opened().map_or(Ok(self.closed_bytes), |clone| clone.overlay().allocated_bytes())
    }
}

/// One clone, for people.
#[derive(Debug, Clone)]
pub struct CloneInfo {
    /// Its number in the store.
    pub number: u32,
    /// The snapshot it began as; none if that cannot be read.
    pub epoch: Option<u32>,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// When it was made.
    pub created_unix_ns: u64,
    /// Opaque bytes.
    pub meta: Vec<u8>,
    /// Blocks that are its own.
    pub own_blocks: u64,
    /// Bytes it takes in the store.
    pub allocated_bytes: u64,
    /// Why it cannot be opened; empty if it can.
    pub damage: String,
    /// Why it takes no more writes; empty if it does.
    pub failure: String,
}

fn unknown(number: u32) -> Error {
    Error::NotFound(format!("no clone has the number {number}"))
}

fn damaged(number: u32, error: MapError) -> Error {
    match error {
        MapError::Io(source) => Error::store(format!("opening clone {number}"))(source),
        MapError::Version(_) => Error::Version(format!("clone {number}: {error}")),
        MapError::Damaged { .. } => {
            Error::Damaged(format!("clone {number}: {error}; its snapshot is not concerned"))
        }
    }
}

/// The clone that a file of ours belongs to, and whether it is its map.
fn number_of(name: &str) -> Option<(u32, bool)> {
    let number = u32::from_str_radix(name.get(..8)?, 16).ok()?;
    let rest = name.get(8..)?;
    let is_part = rest.strip_suffix(".data").or_else(|| rest.strip_suffix(".recent"));
    let is_part = is_part.is_some_and(|middle| middle.len() == 9 && middle.starts_with('-'));
    (rest == ".map" || rest == ".map.new" || is_part).then_some((number, rest == ".map"))
}

impl Volume {
    fn clones_directory(&self) -> Arc<dyn Directory> {
        self.host().directory(&self.store_path().join(CLONES_DIRECTORY))
    }

    fn list_clone_files(&self) -> Result<Vec<String>> {
        match self.clones_directory().list() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            listed => listed.map_err(Error::store("listing clones")),
        }
    }

    /// See which clones there are, and remove what is left of those that never came or went.
    pub(crate) fn load_clones(&self) -> Result<()> {
        let _changing = self.clones.changing.lock();
        let names = self.list_clone_files()?;
        let directory = self.clones_directory();
        let mut known = BTreeMap::new();
        for (number, _) in names.iter().filter_map(|name| number_of(name)).filter(|n| n.1) {
            known.insert(number, self.look_at(&*directory, number)?);
        }
        let is_orphan = |name: &&String| match number_of(name) {
            None | Some((_, true)) => false,
            Some((number, false)) => match known.get(&number).map(|clone| clone.header) {
                // Of one that cannot be read it is not known which files are its own.
                Some(None) => false,
                Some(Some(header)) => {
                    **name != header.data_name() && **name != header.recent_name()
                }
                None => true,
            },
        };
        let orphans: Vec<&String> = names.iter().filter(is_orphan).collect();
        for name in &orphans {
            directory.remove(name).map_err(Error::store("removing what is left of a clone"))?;
        }
        if !orphans.is_empty() {
            directory.sync().map_err(Error::store("the directory of clones"))?;
        }
        *self.clones.known.lock() = known;
        Ok(())
    }

    fn look_at(&self, directory: &dyn Directory, number: u32) -> Result<Known> {
        let reading = || Error::store("reading a clone's map");
        match map::Map::open(directory, number) {
            Ok((map, found)) => {
                let mut known = Known {
                    header: Some(*map.header()),
                    own_blocks: found.written.block_count(),
                    meta: found.meta,
                    failure: found.failure,
                    ..Known::default()
                };
                known.damage = self.misfit(map.header());
                known.closed_bytes = closed_bytes(directory, map.header()).map_err(reading())?;
                Ok(known)
            }
            // Nobody else is to suffer from what one clone's files give.
            Err(error) => Ok(Known { damage: error.to_string(), ..Known::default() }),
        }
    }

    /// Why a clone cannot be one of this volume's; empty if it can.
    fn misfit(&self, header: &Header) -> String {
        if header.volume != self.uuid() || u64::from(header.block_size) != self.block_size() {
            return "it is of another volume".into();
        }
        match self.snapshot_bytes(header.epoch) {
            None => "its snapshot is gone".into(),
            Some(bytes) if bytes != header.size_bytes => "its snapshot has another size".into(),
            Some(_) => String::new(),
        }
    }

    /// Every clone, by number.
    pub fn clones(&self) -> Result<Vec<CloneInfo>> {
        let all = self.clones.known.lock().clone();
        let counting = || Error::store("counting what a clone takes");
        let info = |(number, known): (u32, Known)| {
            let (opened, allocated) = (known.opened(), known.allocated_bytes());
            let (mut own_blocks, mut failure) = (known.own_blocks, known.failure);
            if let Some(clone) = &opened {
                (own_blocks, failure) = (clone.own_blocks(), clone.failure());
            }
            Ok(CloneInfo {
                number,
                epoch: known.header.map(|header| header.epoch),
                size_bytes: known.header.map_or(0, |header| header.size_bytes),
                created_unix_ns: known.header.map_or(0, |header| header.created_unix_ns),
                meta: opened.map_or(known.meta, |clone| clone.overlay().meta()),
                own_blocks,
                allocated_bytes: allocated.map_err(counting())?,
                damage: known.damage,
                failure,
            })
        };
        all.into_iter().map(info).collect()
    }

    /// Bytes that all clones take in the store.
    pub(crate) fn clones_bytes(&self) -> io::Result<u64> {
        let all = self.clones.known.lock().clone();
        all.values().map(Known::allocated_bytes).sum()
    }

    fn check_meta(meta: &[u8]) -> Result<()> {
        if meta.len() <= META_BYTES_MAX {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "{} bytes beside a clone are more than {META_BYTES_MAX}",
            meta.len()
        )))
    }

    /// Make a clone of a snapshot; it is there, durably, when this returns. Tells its number.
    pub fn create_clone(&self, epoch: u32, meta: &[u8]) -> Result<u32> {
        Self::check_meta(meta)?;
        let _changing = self.clones.changing.lock();
        // Held, so that nobody deletes it meanwhile; and told apart from one that cannot be read.
        let size_bytes = self.pin(epoch)?;
        let made = self.make_clone(epoch, size_bytes, meta);
        self.unpin(epoch);
        made
    }

    fn make_clone(&self, epoch: u32, size_bytes: u64, meta: &[u8]) -> Result<u32> {
        let making = || Error::store("making a clone");
        let store = self.store_path();
        self.host().make_directory(&store.join(CLONES_DIRECTORY)).map_err(making())?;
        self.host().directory(store).sync().map_err(making())?;
        let taken = self.list_clone_files()?;
        let taken = taken.iter().filter_map(|name| number_of(name)).map(|(number, _)| number);
        let number = taken.max().unwrap_or(0) + 1;
        let header = Header {
            volume: self.uuid(),
            number,
            generation: 1,
            epoch,
            block_size: u32::try_from(self.block_size()).expect("at most 64 KiB"),
            size_bytes,
            created_unix_ns: unix_ns(),
        };
        let directory = self.clones_directory();
        if let Err(error) = Overlay::make(&*directory, header, meta) {
            // What cannot be removed now is an orphan, or a clone that nobody was told of.
            let _ = Self::remove_files(&*directory, &header);
            return Err(making()(error));
        }
        let mut known = Known { header: Some(header), meta: meta.to_vec(), ..Known::default() };
        known.closed_bytes = closed_bytes(&*directory, &header).map_err(making())?;
        self.clones.known.lock().insert(number, known);
        self.recount_clones();
        Ok(number)
    }

    fn known_clone(&self, number: u32) -> Result<Known> {
        self.clones.known.lock().get(&number).cloned().ok_or_else(|| unknown(number))
    }

    fn open_overlay(&self, number: u32) -> Result<Overlay> {
        let boot_id = self.host().boot_id()?;
        let overlay = Overlay::open(self.clones_directory(), number, boot_id);
        overlay.map_err(|error| damaged(number, error))
    }

    /// Open a clone; one that is open already is the same one.
    pub fn open_clone(
        self: &Arc<Self>,
        number: u32,
        excluded: ExcludedReads,
    ) -> Result<Arc<CloneView>> {
        let _changing = self.clones.changing.lock();
        let known = self.known_clone(number)?;
        if let Some(opened) = known.opened() {
            if opened.excluded() == excluded {
                return Ok(opened);
            }
            return Err(Error::InUse(format!("clone {number} is open in another way")));
        }
        if !known.damage.is_empty() {
            return Err(Error::Damaged(format!(
                "clone {number} cannot be opened: {}; its snapshot is not concerned",
                known.damage
            )));
        }
        let overlay = self.open_overlay(number)?;
        let view = View::open(self, overlay.header().epoch, excluded)?;
        let clone = Arc::new(CloneView::new(view, overlay));
        if let Some(known) = self.clones.known.lock().get_mut(&number) {
            known.opened = Some(Arc::clone(&clone));
        }
        Ok(clone)
    }

    /// Close a clone, if it is open: what was written to it is durable when this returns.
    pub fn close_clone(&self, number: u32) -> Result<()> {
        let _changing = self.clones.changing.lock();
        self.put_away(number)
    }

    fn put_away(&self, number: u32) -> Result<()> {
        let Some(clone) = self.known_clone(number)?.opened() else { return Ok(()) };
        let closed = clone.close();
        if let Some(known) = self.clones.known.lock().get_mut(&number) {
            known.closed_bytes = clone.overlay().allocated_bytes().unwrap_or(known.closed_bytes);
            known.own_blocks = clone.own_blocks();
            known.meta = clone.overlay().meta();
            known.failure = clone.failure();
            known.opened = None;
        }
        closed
    }

    /// Close all, before the volume is. What fails is said in the clone's own map, and nobody else
    /// is to suffer from it.
    pub(crate) fn put_away_clones(&self) {
        let _changing = self.clones.changing.lock();
        let numbers: Vec<u32> = self.clones.known.lock().keys().copied().collect();
        for number in numbers {
            let _ = self.put_away(number);
        }
    }

    /// Let go of all, as a kill would.
    pub(crate) fn abandon_clones(&self) {
        let mut known = self.clones.known.lock();
        let opened: Vec<Arc<CloneView>> =
            known.values_mut().filter_map(|clone| clone.opened.take()).collect();
        drop(known);
        for clone in opened {
            clone.leave();
        }
    }

    /// Let a clone be what its snapshot is again; nobody has it open. Tells the bytes given back.
    pub fn reset_clone(&self, number: u32) -> Result<u64> {
        let _changing = self.clones.changing.lock();
        let known = self.known_clone(number)?;
        Self::check_unused(number, &known)?;
        let header = known.header.filter(|header| self.misfit(header).is_empty());
        let header = header.ok_or_else(|| {
            Error::Damaged(format!(
                "clone {number} cannot be reset: {}; delete it and make another",
                known.damage
            ))
        })?;
        let resetting = || Error::store("resetting a clone");
        let directory = self.clones_directory();
        let before = closed_bytes(&*directory, &header).map_err(resetting())?;
        let next = Header { generation: header.generation + 1, ..header };
        Overlay::make(&*directory, next, &known.meta).map_err(resetting())?;
        let mut fresh = Known { header: Some(next), meta: known.meta, ..Known::default() };
        fresh.closed_bytes = closed_bytes(&*directory, &next).unwrap_or_default();
        let freed = before.saturating_sub(fresh.closed_bytes);
        self.clones.known.lock().insert(number, fresh);
        // What stays now is an orphan to the next opening.
        let _ = directory.remove(&header.data_name());
        let _ = directory.remove(&header.recent_name());
        self.recount_clones();
        Ok(freed)
    }

    /// Remove a clone that nobody has open. Tells the bytes given back.
    pub fn delete_clone(&self, number: u32) -> Result<u64> {
        let _changing = self.clones.changing.lock();
        let known = self.known_clone(number)?;
        Self::check_unused(number, &known)?;
        let deleting = || Error::store("deleting a clone");
        let directory = self.clones_directory();
        let freed = match &known.header {
            Some(header) => {
                let bytes = closed_bytes(&*directory, header).map_err(deleting())?;
                Self::remove_files(&*directory, header).map_err(deleting())?;
                bytes
            }
            None => Self::remove_unreadable(&*directory, number).map_err(deleting())?,
        };
        self.clones.known.lock().remove(&number);
        self.recount_clones();
        Ok(freed)
    }

    fn check_unused(number: u32, known: &Known) -> Result<()> {
        if known.opened().is_none() {
            return Ok(());
        }
        Err(Error::InUse(format!("clone {number} is open; close it first")))
    }

    /// The map first: without it the rest is nobody's, and goes at the latest at the next opening.
    fn remove_files(directory: &dyn Directory, header: &Header) -> io::Result<()> {
        let gone = |removed: io::Result<()>| match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        gone(directory.remove(&Header::map_name(header.number)))?;
        directory.sync()?;
        gone(directory.remove(&header.data_name()))?;
        gone(directory.remove(&header.recent_name()))
    }

    fn remove_unreadable(directory: &dyn Directory, number: u32) -> io::Result<u64> {
        let mut names = directory.list()?;
        names.retain(|name| number_of(name).is_some_and(|(of, _)| of == number));
        names.sort_by_key(|name| number_of(name).is_none_or(|(_, is_map)| !is_map));
        let mut freed = 0;
        for name in names {
            freed += directory.open(&name)?.allocated_bytes()?;
            directory.remove(&name)?;
            directory.sync()?;
        }
        Ok(freed)
    }

    fn recount_clones(&self) {
        // A volume that is closed counts nothing any more.
        if let Ok(mut committer) = self.role() {
            self.recount(&mut committer);
        }
    }

    /// Replace a clone's opaque bytes, durably.
    pub fn set_clone_meta(&self, number: u32, meta: Vec<u8>) -> Result<()> {
        Self::check_meta(&meta)?;
        let _changing = self.clones.changing.lock();
        let known = self.known_clone(number)?;
        if let Some(clone) = known.opened() {
            clone.overlay().set_meta(meta.clone())?;
        } else {
            self.open_overlay(number)?.set_meta(meta.clone())?;
        }
        if let Some(known) = self.clones.known.lock().get_mut(&number) {
            known.meta = meta;
        }
        Ok(())
    }

    /// Keep anybody from making a clone of a snapshot that has none; an error if it has some.
    pub(crate) fn hold_without_clones(&self, epoch: u32) -> Result<MutexGuard<'_, ()>> {
        let changing = self.clones.changing.lock();
        let is_of = |known: &&Known| known.header.is_some_and(|header| header.epoch == epoch);
        let count = to_u64(self.clones.known.lock().values().filter(is_of).count());
        if count > 0 {
            return Err(Error::InUse(format!(
                "snapshot {epoch} has {count} clones, which need it; delete them first"
            )));
        }
        Ok(changing)
    }
}

//! Disks that know what is synced and what is not, and what a power cut leaves of them.
//!
//! A write that was submitted may reach the medium by sectors in any subset, and in any order with
//! those that overlap it, until a sync that began after it had completed returned. A failed sync
//! leaves what it was for in doubt for ever: a later one that succeeds says nothing of it.

use crate::dice::Dice;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a device writes whole or not at all.
pub const SECTOR: u64 = 512;
pub const PAGE: u64 = 4096;

type Page = Arc<[u8; 4096]>;

/// Sparse bytes: a page that is not there is a hole.
#[derive(Clone, Default)]
pub struct Bytes {
    pages: BTreeMap<u64, Page>,
    length: u64,
}

impl Bytes {
    pub fn length(&self) -> u64 {
        self.length
    }

    pub fn has_page(&self, page: u64) -> bool {
        self.pages.contains_key(&page)
    }

    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if offset + buffer.len() as u64 > self.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for_pages(offset, buffer.len() as u64, |page, within, from, length| {
            let part = &mut buffer[from..from + length];
            match self.pages.get(&page) {
                Some(bytes) => part.copy_from_slice(&bytes[within..within + length]),
                None => part.fill(0),
            }
        });
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for_pages(offset, data.len() as u64, |page, within, from, length| {
            let bytes = self.pages.entry(page).or_insert_with(|| Arc::new([0; 4096]));
            Arc::make_mut(bytes)[within..within + length]
                .copy_from_slice(&data[from..from + length]);
        });
        self.length = self.length.max(offset + data.len() as u64);
    }

    fn zero(&mut self, offset: u64, length: u64) {
        for_pages(offset, length, |page, within, _, length| {
            if length as u64 == PAGE {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                Arc::make_mut(bytes)[within..within + length].fill(0);
            }
        });
    }

    fn set_length(&mut self, length: u64) {
        if length < self.length {
            self.zero(length, self.length - length);
            self.pages.retain(|page, _| page * PAGE < length);
        }
        self.length = length;
    }

    pub fn next(&self, offset: u64, end: u64, wants_data: bool) -> u64 {
        let mut at = offset;
        while at < end && self.pages.contains_key(&(at / PAGE)) != wants_data {
            at = (at / PAGE + 1) * PAGE;
        }
        at.min(end)
    }
}

/// Page, first byte in it, first byte of the range, bytes.
fn for_pages(offset: u64, length: u64, mut each: impl FnMut(u64, usize, usize, usize)) {
    let mut at = offset;
    while at < offset + length {
        let stop = ((at / PAGE + 1) * PAGE).min(offset + length);
        let small = |value: u64| usize::try_from(value).expect("a small disk");
        each(at / PAGE, small(at % PAGE), small(at - offset), small(stop - at));
        at = stop;
    }
}

#[derive(Clone)]
pub enum Change {
    Write(u64, Arc<[u8]>),
    Zero(u64, u64),
    SetLength(u64),
}

impl std::fmt::Debug for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Write(offset, data) => write!(f, "write {offset}+{}", data.len()),
            Self::Zero(offset, length) => write!(f, "zero {offset}+{length}"),
            Self::SetLength(length) => write!(f, "set length {length}"),
        }
    }
}

impl Change {
    fn apply(&self, bytes: &mut Bytes) {
        match self {
            Self::Write(offset, data) => bytes.write(*offset, data),
            Self::Zero(offset, length) => {
                bytes.zero(*offset, (*length).min(bytes.length.saturating_sub(*offset)));
            }
            Self::SetLength(length) => bytes.set_length(*length),
        }
    }

    /// The part that a power cut leaves: each sector is old or new.
    fn survive(&self, bytes: &mut Bytes, survives: &mut dyn FnMut() -> bool) {
        match self {
            Self::Write(offset, data) => {
                let mut at = 0;
                while at < data.len() {
                    let position = offset + at as u64;
                    let room = usize::try_from(SECTOR - position % SECTOR).expect("a sector");
                    let stop = data.len().min(at + room);
                    if survives() {
                        bytes.write(position, &data[at..stop]);
                    }
                    at = stop;
                }
            }
            Self::Zero(..) | Self::SetLength(_) if survives() => self.apply(bytes),
            Self::Zero(..) | Self::SetLength(_) => {}
        }
    }
}

#[derive(Clone)]
struct Unsynced {
    number: u64,
    change: Change,
    is_complete: bool,
}

/// One file or device.
#[derive(Clone, Default)]
pub struct Medium {
    pub now: Bytes,
    durable: Bytes,
    unsynced: Vec<Unsynced>,
}

impl Medium {
    /// Durable from the start.
    pub fn holding(content: &[u8]) -> Self {
        let mut now = Bytes::default();
        now.write(0, content);
        Self { durable: now.clone(), now, unsynced: Vec::new() }
    }

    pub fn submit(&mut self, number: u64, change: Change) {
        change.apply(&mut self.now);
        self.unsynced.push(Unsynced { number, change, is_complete: false });
    }

    pub fn complete(&mut self, number: u64) {
        for unsynced in &mut self.unsynced {
            unsynced.is_complete |= unsynced.number == number;
        }
    }

    /// What a sync that begins now is for.
    pub fn completed(&self) -> Vec<u64> {
        self.unsynced.iter().filter(|u| u.is_complete).map(|u| u.number).collect()
    }

    pub fn make_durable(&mut self, numbers: &[u64]) {
        let (synced, rest): (Vec<_>, Vec<_>) =
            self.unsynced.drain(..).partition(|u: &Unsynced| numbers.contains(&u.number));
        self.unsynced = rest;
        for unsynced in synced {
            unsynced.change.apply(&mut self.durable);
        }
    }

    /// The device lost some of it; the kernel takes all of it for written.
    pub fn fail_sync(&mut self, numbers: &[u64], dice: &mut Dice) {
        let (doomed, rest): (Vec<_>, Vec<_>) =
            self.unsynced.drain(..).partition(|u: &Unsynced| numbers.contains(&u.number));
        self.unsynced = rest;
        for unsynced in doomed {
            unsynced.change.survive(&mut self.durable, &mut || dice.chance(50));
        }
    }

    fn cut(&self, survival: usize, dice: &mut Dice) -> Self {
        let mut after = self.durable.clone();
        let mut order: Vec<&Unsynced> = self.unsynced.iter().collect();
        if dice.chance(30) && order.len() > 1 {
            let (one, other) = (dice.below(order.len()), dice.below(order.len()));
            order.swap(one, other);
        }
        for unsynced in order {
            unsynced.change.survive(&mut after, &mut || dice.chance(survival));
        }
        Self { now: after.clone(), durable: after, unsynced: Vec::new() }
    }
}

#[derive(Clone)]
enum NameChange {
    Add(String, u64),
    Remove(String),
}

#[derive(Clone, Default)]
struct Names {
    now: BTreeMap<String, u64>,
    durable: BTreeMap<String, u64>,
    unsynced: Vec<NameChange>,
}

/// All disks of a machine.
#[derive(Clone, Default)]
pub struct World {
    media: BTreeMap<u64, Arc<Medium>>,
    directories: BTreeMap<PathBuf, Names>,
    next: u64,
    /// Directories that are disks of their own: each loses its power in its own way.
    disks: Vec<PathBuf>,
}

impl World {
    /// From now on what is in this directory is on a disk of its own.
    pub fn put_on_a_disk(&mut self, directory: &Path) {
        self.disks.push(directory.to_path_buf());
    }

    /// All media that have, or had, a name on one of the disks, with the disk.
    fn on_disks(&self) -> BTreeMap<u64, &PathBuf> {
        let mut found = BTreeMap::new();
        for disk in &self.disks {
            for (_, names) in self.directories.iter().filter(|(path, _)| path.starts_with(disk)) {
                let added = names.unsynced.iter().filter_map(|change| match change {
                    NameChange::Add(_, id) => Some(*id),
                    NameChange::Remove(_) => None,
                });
                let known = names.now.values().chain(names.durable.values()).copied();
                found.extend(known.chain(added).map(|id| (id, disk)));
            }
        }
        found
    }

    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub fn add(&mut self, medium: Medium) -> u64 {
        let id = self.number();
        self.media.insert(id, Arc::new(medium));
        id
    }

    pub fn medium(&self, id: u64) -> &Medium {
        &self.media[&id]
    }

    pub fn change(&mut self, id: u64) -> &mut Medium {
        Arc::make_mut(self.media.get_mut(&id).expect("made before"))
    }

    fn names(&mut self, directory: &Path) -> &mut Names {
        self.directories.entry(directory.to_path_buf()).or_default()
    }

    pub fn find(&self, directory: &Path, name: &str) -> Option<u64> {
        self.directories.get(directory)?.now.get(name).copied()
    }

    pub fn list(&self, directory: &Path) -> Vec<String> {
        let names = self.directories.get(directory);
        names.map(|n| n.now.keys().cloned().collect()).unwrap_or_default()
    }

    pub fn link(&mut self, directory: &Path, name: &str, id: u64) {
        let names = self.names(directory);
        names.now.insert(name.into(), id);
        names.unsynced.push(NameChange::Add(name.into(), id));
    }

    /// Change one byte of a medium, behind everybody's back.
    pub fn rot(&mut self, id: u64, offset: u64) {
        let medium = self.change(id);
        for bytes in [&mut medium.now, &mut medium.durable] {
            let mut byte = [0];
            if bytes.read(offset, &mut byte).is_ok() {
                bytes.write(offset, &[byte[0] ^ 0x40]);
            }
        }
    }

    pub fn unlink(&mut self, directory: &Path, name: &str) -> io::Result<()> {
        let names = self.names(directory);
        names.now.remove(name).ok_or(io::ErrorKind::NotFound)?;
        names.unsynced.push(NameChange::Remove(name.into()));
        Ok(())
    }

    pub fn sync_names(&mut self, directory: &Path) {
        let names = self.names(directory);
        names.durable = names.now.clone();
        names.unsynced.clear();
    }

    /// The process is gone; what it had submitted is with the kernel.
    pub fn complete_all(&mut self) {
        for medium in self.media.values_mut() {
            if medium.unsynced.iter().any(|u| !u.is_complete) {
                let medium = Arc::make_mut(medium);
                medium.unsynced.iter_mut().for_each(|u| u.is_complete = true);
            }
        }
    }

    /// What is left when the power goes now: of each file its own part, or of each disk all that it
    /// was given, or nothing but what was synced.
    pub fn cut(&self, dice: &mut Dice) -> Self {
        let mut after = Self { next: self.next, disks: self.disks.clone(), ..Self::default() };
        let profiles = [0, 100, 50, 90, 15];
        let mut whole: BTreeMap<&PathBuf, usize> = BTreeMap::new();
        for disk in &self.disks {
            if dice.chance(60) {
                whole.insert(disk, profiles[dice.below(2)]);
            }
        }
        let on_disks = self.on_disks();
        let of_disk = |id: &u64| on_disks.get(id).and_then(|disk| whole.get(disk)).copied();
        for (id, medium) in &self.media {
            let survival = of_disk(id).unwrap_or_else(|| profiles[dice.below(profiles.len())]);
            after.media.insert(*id, Arc::new(medium.cut(survival, dice)));
        }
        for (path, names) in &self.directories {
            let mut now = names.durable.clone();
            let disk = whole.iter().find(|(disk, _)| path.starts_with(disk));
            let survival = disk.map_or_else(|| profiles[dice.below(profiles.len())], |(_, s)| *s);
            for change in &names.unsynced {
                match change {
                    NameChange::Add(name, id) if dice.chance(survival) => {
                        now.insert(name.clone(), *id);
                    }
                    NameChange::Remove(name) if dice.chance(survival) => {
                        now.remove(name);
                    }
                    NameChange::Add(..) | NameChange::Remove(_) => {}
                }
            }
            let names = Names { durable: now.clone(), now, unsynced: Vec::new() };
            after.directories.insert(path.clone(), names);
        }
        after
    }
}

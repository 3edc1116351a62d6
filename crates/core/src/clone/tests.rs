//! Maps that are torn, rotten, long or of another boot, and overlays whose disk fails.

use super::map::{Header, Known, Map, MapError, Recent};
use super::overlay::Overlay;
use crate::extent::{Extent, ExtentSet};
use crate::number::{to_u64, to_usize};
use crate::storage::{Directory, FileDirectory, Storage};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 1 << 20;

fn header() -> Header {
    Header {
        volume: [9; 16],
        number: 1,
        generation: 1,
        epoch: 3,
        block_size: 4096,
        size_bytes: BLOCKS * BLOCK - 512,
        created_unix_ns: 5,
    }
}

fn blocks(pairs: &[(u64, u64)]) -> ExtentSet {
    pairs.iter().map(|&(start, end)| Extent::new(start, end)).collect()
}

/// A map with three records behind its first, in a directory of its own.
fn made(path: &Path) -> FileDirectory {
    let directory = FileDirectory::new(path);
    let known = Known { meta: vec![1; 700], ..Known::default() };
    let mut map = Map::make(&directory, header(), &known).unwrap();
    map.note_written(4, &blocks(&[(0, 2), (7, 8)])).unwrap();
    map.set_meta(b"second").unwrap();
    map.note_written(6, &blocks(&[(2, 3), (BLOCKS - 1, BLOCKS)])).unwrap();
    directory
}

fn file_of(path: &Path) -> std::path::PathBuf {
    path.join(Header::map_name(1))
}

/// What it says: own blocks, `through`, meta.
type Said = (ExtentSet, u64, Vec<u8>);

fn open(directory: &FileDirectory) -> Result<Said, MapError> {
    let (_, known) = Map::open(directory, 1)?;
    Ok((known.written, known.through, known.meta))
}

fn all() -> Said {
    (blocks(&[(0, 3), (7, 8), (BLOCKS - 1, BLOCKS)]), 6, b"second".to_vec())
}

fn without_last() -> Said {
    (blocks(&[(0, 2), (7, 8)]), 4, b"second".to_vec())
}

/// The last record's two copies, of 512 bytes each.
const LAST_BYTES: usize = 1024;

#[test]
fn a_map_torn_in_its_last_record_says_all_of_it_or_nothing_of_it() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = made(scratch.path());
    let whole = std::fs::read(file_of(scratch.path())).unwrap();
    let from = whole.len() - LAST_BYTES;
    for kept in 0..4 {
        let mut torn = whole.clone();
        for sector in 0..2 {
            if kept & 1 << sector == 0 {
                torn[from + sector * 512..from + (sector + 1) * 512].fill(0);
            }
        }
        std::fs::write(file_of(scratch.path()), &torn).unwrap();
        let wanted = if kept == 0 { without_last() } else { all() };
        assert_eq!(open(&directory).unwrap(), wanted, "kept {kept:02b}");
    }
    for length in from..whole.len() {
        std::fs::write(file_of(scratch.path()), &whole[..length]).unwrap();
        let wanted = if length >= from + 512 { all() } else { without_last() };
        assert_eq!(open(&directory).unwrap(), wanted, "{length} bytes");
    }
}

#[test]
fn what_follows_a_torn_record_takes_its_place() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = made(scratch.path());
    let mut torn = std::fs::read(file_of(scratch.path())).unwrap();
    let from = torn.len() - LAST_BYTES;
    torn[from..].fill(0xff);
    std::fs::write(file_of(scratch.path()), &torn).unwrap();
    let (mut map, known) = Map::open(&directory, 1).unwrap();
    assert_eq!(known.through, 4);
    map.note_written(5, &blocks(&[(100, 101)])).unwrap();
    let written = blocks(&[(0, 2), (7, 8), (100, 101)]);
    assert_eq!(open(&directory).unwrap(), (written, 5, b"second".to_vec()));
}

#[test]
fn any_one_rotten_bit_changes_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = made(scratch.path());
    let whole = std::fs::read(file_of(scratch.path())).unwrap();
    for place in (0..whole.len()).step_by(7) {
        let mut rotten = whole.clone();
        rotten[place] ^= 1 << (place % 8);
        std::fs::write(file_of(scratch.path()), &rotten).unwrap();
        assert_eq!(open(&directory).unwrap(), all(), "byte {place}");
    }
}

#[test]
fn a_record_that_is_gone_before_others_is_damage_and_never_unwritten_blocks() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = made(scratch.path());
    let whole = std::fs::read(file_of(scratch.path())).unwrap();
    // Header, then a record of 700 bytes twice, then three of at most 512 bytes twice.
    let places = [0..8192, 8192..10240, 10240..11264, 11264..12288];
    for range in places {
        let mut damaged = whole.clone();
        damaged[range.clone()].fill(0);
        std::fs::write(file_of(scratch.path()), &damaged).unwrap();
        let error = open(&directory).unwrap_err();
        assert!(matches!(error, MapError::Damaged { .. }), "{range:?}: {error}");
    }
}

#[test]
fn a_newer_version_is_refused_as_such_and_rot_is_not_taken_for_one() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = made(scratch.path());
    let mut newer = std::fs::read(file_of(scratch.path())).unwrap();
    for page in [0, 4096] {
        newer[page + 8] = 2;
        let crc = crc32c::crc32c(&newer[page..page + 60]);
        newer[page + 60..page + 64].copy_from_slice(&crc.to_le_bytes());
    }
    std::fs::write(file_of(scratch.path()), &newer).unwrap();
    assert!(matches!(open(&directory), Err(MapError::Version(2))));
}

#[test]
fn a_set_of_many_extents_is_said_in_several_records() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = made(scratch.path());
    let (mut map, _) = Map::open(&directory, 1).unwrap();
    let many: ExtentSet = (0..BLOCKS / 4).map(|n| Extent::single(n * 4 + 1)).collect();
    map.note_written(7, &many).unwrap();
    assert!(map.is_long());
    let written = all().0.union(&many);
    let (again, known) = Map::open(&directory, 1).unwrap();
    assert_eq!(known.written, written);
    let short = Map::make(&directory, *again.header(), &known).unwrap();
    assert!(!short.is_long());
    assert_eq!(open(&directory).unwrap(), (written, 7, b"second".to_vec()));
}

#[test]
fn what_was_written_lately_counts_in_the_boot_that_wrote_it_only() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = FileDirectory::new(scratch.path());
    let boot = [1; 16];
    let file = || directory.open("recent").unwrap();
    directory.create("recent").unwrap();
    let numbers = |recent: &Recent| recent.waiting.iter().map(|(n, _)| *n).collect::<Vec<_>>();
    let mut recent = Recent::open(file(), boot, 0, BLOCKS).unwrap();
    for block in 10..15 {
        recent.note(Extent::single(block)).unwrap();
    }
    assert_eq!(numbers(&Recent::open(file(), boot, 0, BLOCKS).unwrap()), [1, 2, 3, 4, 5]);
    assert_eq!(numbers(&Recent::open(file(), boot, 3, BLOCKS).unwrap()), [4, 5]);
    assert_eq!(numbers(&Recent::open(file(), [2; 16], 0, BLOCKS).unwrap()), []);
    // It begins at the front again; what is behind is old.
    recent.forget(5);
    recent.note(Extent::single(20)).unwrap();
    let again = Recent::open(file(), boot, 5, BLOCKS).unwrap();
    assert_eq!(again.waiting, [(6, Extent::single(20))]);
    // The next boot begins behind what the map says.
    let mut next = Recent::open(file(), [2; 16], 5, BLOCKS).unwrap();
    next.note(Extent::single(21)).unwrap();
    let again = Recent::open(file(), [2; 16], 5, BLOCKS).unwrap();
    assert_eq!(again.waiting, [(6, Extent::single(21))]);
}

/// A directory whose data files cannot be synced while it is told so.
struct Failing(FileDirectory, Arc<AtomicBool>);

struct FailingStorage(Arc<dyn Storage>, Arc<AtomicBool>);

impl Storage for FailingStorage {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, data)
    }
    fn zero_at(&self, offset: u64, length: u64, may_punch: bool) -> io::Result<()> {
        self.0.zero_at(offset, length, may_punch)
    }
    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.discard_at(offset, length)
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.allocate(offset, length)
    }
    fn sync(&self) -> io::Result<()> {
        if self.1.load(Ordering::Relaxed) {
            return Err(io::Error::other("a fault of the test"));
        }
        self.0.sync()
    }
    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }
}

impl Failing {
    fn over(&self, name: &str, file: Arc<dyn Storage>) -> Arc<dyn Storage> {
        if name == header().data_name() {
            Arc::new(FailingStorage(file, Arc::clone(&self.1)))
        } else {
            file
        }
    }
}

impl Directory for Failing {
    fn open(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        Ok(self.over(name, self.0.open(name)?))
    }
    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        Ok(self.over(name, self.0.create(name)?))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.0.list()
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

fn write(overlay: &Overlay, block: u64, value: u8) {
    let claim = overlay.claim(Extent::single(block));
    overlay.write(block * BLOCK, &[&vec![value; to_usize(BLOCK)]]).unwrap();
    overlay.take(&claim).unwrap();
    overlay.note_dirty();
}

#[test]
fn after_a_failed_sync_a_clone_promises_nothing_more_not_even_when_opened_again() {
    let scratch = tempfile::tempdir().unwrap();
    let is_failing = Arc::new(AtomicBool::new(false));
    let plain = FileDirectory::new(scratch.path());
    let directory: Arc<dyn Directory> = Arc::new(Failing(plain, Arc::clone(&is_failing)));
    Overlay::make(&*directory, header(), b"meta").unwrap();
    let open = || Overlay::open(Arc::clone(&directory), 1, [1; 16]).unwrap();
    let overlay = open();
    write(&overlay, 3, 7);
    overlay.flush().unwrap();
    write(&overlay, 4, 8);
    is_failing.store(true, Ordering::Relaxed);
    assert!(overlay.flush().is_err());
    is_failing.store(false, Ordering::Relaxed);
    assert!(overlay.flush().is_err(), "a later sync proves nothing");
    assert!(overlay.check_writable().is_err());
    let mut content = vec![0; to_usize(BLOCK)];
    overlay.read(4 * BLOCK, &mut content).unwrap();
    assert_eq!(content[0], 8, "what is there can be copied out");
    drop(overlay);
    let again = open();
    assert!(again.failure().contains("a fault of the test"));
    assert!(again.flush().is_err());
    assert_eq!(again.own_blocks(), 2);
}

#[test]
fn writers_that_never_pause_keep_what_is_noted_of_them_short() {
    const WRITES: u64 = 30_000;
    let scratch = tempfile::tempdir().unwrap();
    let directory: Arc<dyn Directory> = Arc::new(FileDirectory::new(scratch.path()));
    Overlay::make(&*directory, header(), b"").unwrap();
    let overlay = Overlay::open(Arc::clone(&directory), 1, [1; 16]).unwrap();
    for block in 0..WRITES {
        let claim = overlay.claim(Extent::single(block));
        overlay.take(&claim).unwrap();
        overlay.note_dirty();
    }
    let recent = scratch.path().join(header().recent_name());
    assert_eq!(std::fs::metadata(&recent).unwrap().len(), WRITES * 48);
    overlay.flush().unwrap();
    write(&overlay, WRITES, 1);
    assert_eq!(std::fs::metadata(&recent).unwrap().len(), WRITES * 48, "it begins at the front");
    let again = Overlay::open(directory, 1, [2; 16]).unwrap();
    assert_eq!(again.own_blocks(), WRITES, "of another boot: what was flushed");
    assert_eq!(to_u64(again.runs(Extent::new(0, BLOCKS)).len()), 2);
}

//! What must not grow with age: files of a store over many instants, and what has to be read at
//! opening. And what index files and merged segments must not change: any answer.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use stillblock_core::extent::{Extent, ExtentSet};
use stillblock_core::journal::Settled;
use stillblock_core::view::{ExcludedReads, View};
use stillblock_core::volume::open::{Cache, CreateRequest, OpenRequest, Recover, create, open};
use stillblock_core::volume::{Effort, SnapshotRequest, StorePolicy, Volume};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 4000;

struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % limit
    }
}

fn base() -> tempfile::TempDir {
    let base = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
    tempfile::tempdir_in(base).expect("temporary directory")
}

fn opened(dir: &Path) -> Arc<Volume> {
    open(OpenRequest {
        store: dir.join("store"),
        origin: None,
        cache: Cache::WriteBack,
        direct: false,
        buffer_dir: Some(dir.to_path_buf()),
        buffer_bytes: 4 << 20,
        recover: Recover::Refuse,
        has_background: false,
        peers: Vec::new(),
    })
    .expect("opened")
}

fn made(dir: &Path) -> Arc<Volume> {
    let disk: Vec<u8> = (0..BLOCKS).flat_map(|block| content(block, 1)).collect();
    std::fs::write(dir.join("disk.img"), disk).expect("origin");
    create(&CreateRequest {
        store: dir.join("store"),
        origin: dir.join("disk.img"),
        block_size: BLOCK,
        meta: Vec::new(),
        policy: StorePolicy::default(),
    })
    .expect("created");
    opened(dir)
}

/// What a block holds after its n-th change: of every seventh, zeroes.
fn content(block: u64, change: u64) -> Vec<u8> {
    let value = if block % 7 == 0 { 0 } else { block * 1_000_003 + change };
    value.to_le_bytes().repeat(512)
}

fn snapshot(volume: &Volume) -> u32 {
    let request = SnapshotRequest {
        selection: ExtentSet::from_extent(Extent::new(0, BLOCKS)),
        low: ExtentSet::new(),
        meta: Vec::new(),
        pause_limit: Duration::from_secs(5),
    };
    volume.snapshot(request).expect("snapshot").epoch
}

fn write(volume: &Volume, block: u64, change: u64) {
    volume.write(block * BLOCK, &content(block, change), false).expect("written");
}

/// The snapshot reads as when it was taken.
fn check(volume: &Arc<Volume>, epoch: u32, then: &BTreeMap<u64, u64>) {
    let view = View::open(volume, epoch, ExcludedReads::Error).expect("view");
    let mut bytes = vec![0; 4096];
    for block in 0..BLOCKS {
        view.read(block * BLOCK, &mut bytes).expect("P2: readable");
        let change = then.get(&block).copied().unwrap_or(1);
        assert!(bytes == content(block, change), "P2: snapshot {epoch} block {block}");
    }
}

fn names(dir: &Path, suffix: &str) -> Vec<String> {
    let files = std::fs::read_dir(dir.join("store/log")).expect("listed");
    let names = files.map(|file| file.expect("entry").file_name().into_string().expect("text"));
    let mut names: Vec<String> = names.filter(|name| name.ends_with(suffix)).collect();
    names.sort_unstable();
    names
}

fn changed(volume: &Volume, since: u32, until: Option<u32>) -> BTreeSet<u64> {
    let changed = volume.changed(since, until).expect("changed");
    changed.iter().flat_map(|e| e.start..e.end).collect()
}

/// A yearly snapshot, a yearly bookmark, and backups that each replace the last one.
#[test]
fn many_instants_beside_an_old_snapshot_leave_few_files_and_change_no_answer() {
    const INSTANTS: u64 = 1200;
    let dir = base();
    let mut volume = made(dir.path());
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    let mut now: BTreeMap<u64, u64> = BTreeMap::new();
    let (mut written, mut since_last) = (BTreeSet::new(), BTreeSet::new());
    let yearly = snapshot(&volume);
    let mut last = snapshot(&volume);
    let mut files_max = 0;
    for instant in 2..INSTANTS {
        since_last.clear();
        for _ in 0..8 {
            let block = dice.below(BLOCKS / 2);
            write(&volume, block, instant);
            now.insert(block, instant);
            since_last.insert(block);
        }
        written.extend(since_last.iter().copied());
        let next = snapshot(&volume);
        assert_eq!(changed(&volume, last, Some(next)), since_last, "P5: since the last backup");
        volume.bookmark(last, Vec::new()).expect("bookmark");
        volume.delete_snapshot(last, false).expect("deleted");
        volume.delete_bookmark(last).expect("deleted");
        last = next;
        if instant % 16 == 0 {
            volume.maintain(Effort::Due).expect("upkeep");
            files_max = files_max.max(names(dir.path(), "").len());
        }
        if instant % 400 == 0 {
            volume.close().expect("closed");
            volume = opened(dir.path());
            check(&volume, yearly, &BTreeMap::new());
            check(&volume, last, &now);
        }
    }
    assert!(files_max < 100, "{files_max} files after {INSTANTS} instants");
    assert_eq!(changed(&volume, yearly, Some(last)), written, "P5: since a year ago");
    check(&volume, yearly, &BTreeMap::new());
    check(&volume, last, &now);
    volume.maintain(Effort::All).expect("upkeep");
    assert!(names(dir.path(), ".seg").len() <= 4, "{:?}", names(dir.path(), ""));
    check(&volume, yearly, &BTreeMap::new());
    // Without the index everything is in the log, merged segments included.
    volume.close().expect("closed");
    for name in names(dir.path(), ".idx") {
        std::fs::remove_file(dir.path().join("store/log").join(name)).expect("removed");
    }
    let volume = opened(dir.path());
    check(&volume, yearly, &BTreeMap::new());
    check(&volume, last, &now);
    assert_eq!(changed(&volume, yearly, Some(last)), written, "P5: from the log alone");
    volume.close().expect("closed");
}

/// A snapshot, and which change each block had seen then.
type Taken = (u32, BTreeMap<u64, u64>);

fn with_index(dir: &Path) -> (Arc<Volume>, Vec<Taken>) {
    let volume = made(dir);
    let mut now: BTreeMap<u64, u64> = BTreeMap::new();
    let mut taken = Vec::new();
    for round in 2..8 {
        taken.push((snapshot(&volume), now.clone()));
        for block in (round..BLOCKS).step_by(3) {
            write(&volume, block, round);
            now.insert(block, round);
        }
    }
    taken.push((snapshot(&volume), now.clone()));
    volume.maintain(Effort::All).expect("upkeep");
    (volume, taken)
}

#[test]
fn opening_reads_no_closed_epoch_that_an_index_file_has() {
    let dir = base();
    let (volume, taken) = with_index(dir.path());
    volume.close().expect("closed");
    // Descriptors of the first epoch are damaged: who reads them knows no more what it held.
    let path = dir.path().join("store/log").join(&names(dir.path(), ".seg")[0]);
    let mut bytes = std::fs::read(&path).expect("read");
    for page in (0..bytes.len()).step_by(4096).skip(4) {
        if bytes[page..].starts_with(b"SBBH") || bytes[page..].starts_with(b"SBBT") {
            bytes[page + 30] ^= 1;
        }
    }
    std::fs::write(&path, bytes).expect("written");
    let volume = opened(dir.path());
    for (epoch, then) in &taken {
        check(&volume, *epoch, then);
    }
    volume.close().expect("closed");
}

#[test]
fn what_a_damaged_index_file_had_is_read_from_the_log_again() {
    let dir = base();
    let (volume, taken) = with_index(dir.path());
    volume.close().expect("closed");
    let name = names(dir.path(), ".idx").pop().expect("an index file");
    let path = dir.path().join("store/log").join(&name);
    let mut bytes = std::fs::read(&path).expect("read");
    for page in (4096..bytes.len() - 8192).step_by(4096) {
        bytes[page + 100] ^= 0x40;
    }
    std::fs::write(&path, bytes).expect("written");
    let volume = opened(dir.path());
    let changed: BTreeSet<u64> = changed(&volume, taken[0].0, None);
    assert_eq!(changed, (2..BLOCKS).collect(), "P5: nothing is called unchanged");
    assert!(!names(dir.path(), ".idx").contains(&name), "it is not asked again");
    write(&volume, 5, 99);
    for (epoch, then) in &taken {
        check(&volume, *epoch, then);
    }
    volume.close().expect("closed");
}

#[test]
fn a_deletion_frees_what_an_index_file_knows_of_and_nothing_else() {
    let dir = base();
    let (volume, taken) = with_index(dir.path());
    volume.close().expect("closed");
    let volume = opened(dir.path());
    let before = volume.store_bytes().expect("counted");
    let freed = volume.delete_snapshot(taken[0].0, false).expect("deleted");
    let after = volume.store_bytes().expect("counted");
    assert!(freed > 0 && before - after >= freed / 2, "{before} to {after}, {freed} freed");
    let freed = volume.delete_snapshot(taken[2].0, false).expect("deleted");
    assert_eq!(freed, 0, "an older snapshot reads the same copies");
    for (epoch, then) in taken.iter().filter(|(epoch, _)| ![taken[0].0, taken[2].0].contains(epoch))
    {
        check(&volume, *epoch, then);
    }
    for (epoch, _) in taken.iter().filter(|(epoch, _)| ![taken[0].0, taken[2].0].contains(epoch)) {
        volume.delete_snapshot(*epoch, false).expect("deleted");
    }
    assert_eq!(volume.store_bytes().expect("counted"), 0, "nothing is kept for nobody");
    assert!(names(dir.path(), "").is_empty(), "no file is left");
    volume.close().expect("closed");
}

/// Every hour a snapshot, narrowed once its rules are resolved; a day of them and a month of days are
/// kept. What the journal holds is what matters of them, twice at most, or 4 MiB.
#[test]
fn a_year_of_hourly_snapshots_leaves_a_journal_and_an_opening_of_bounded_size() {
    const HOURS: u64 = 365 * 24;
    const PARTS: u64 = 60;
    const RECEIPT_BYTES: usize = 4 << 10;
    const JOURNAL_BYTES_MAX: u64 = 5 << 20;
    let dir = base();
    let mut volume = made(dir.path());
    let journal = dir.path().join("store/journal");
    let size = || std::fs::metadata(&journal).expect("journal").len();
    let mut kept: BTreeMap<u32, u64> = BTreeMap::new();
    let mut now: BTreeMap<u64, u64> = BTreeMap::new();
    let mut then: BTreeMap<u32, BTreeMap<u64, u64>> = BTreeMap::new();
    let mut written_bytes = 0;
    for hour in 0..HOURS {
        let epoch = snapshot(&volume);
        then.insert(epoch, now.clone());
        kept.insert(epoch, hour);
        let before = size();
        let parts = (0..PARTS).map(|at| Extent::single(2 * at + hour % 2));
        // A receipt, as large as what is selected would be on a real disk.
        let mut meta = u64::to_le_bytes(hour).to_vec();
        meta.resize(RECEIPT_BYTES, 0);
        let settled = Settled { meta, low: ExtentSet::new() };
        volume.narrow_with(epoch, &parts.collect(), Some(settled)).expect("narrowed");
        written_bytes += size() - before;
        write(&volume, hour % (2 * PARTS), hour + 2);
        now.insert(hour % (2 * PARTS), hour + 2);
        let is_over = |&(_, &at): &(&u32, &u64)| match hour - at {
            0..24 => false,
            24..720 => at % 24 != 0,
            _ => true,
        };
        let over: Vec<u32> = kept.iter().filter(is_over).map(|(&epoch, _)| epoch).collect();
        for epoch in over {
            volume.delete_snapshot(epoch, false).expect("deleted");
            kept.remove(&epoch);
            then.remove(&epoch);
        }
        if hour % 24 == 0 {
            volume.maintain(Effort::Due).expect("upkeep");
            assert!(size() < JOURNAL_BYTES_MAX, "{} bytes after {hour} hours", size());
        }
        if hour % (73 * 24) == 0 {
            volume.close().expect("closed");
            volume = opened(dir.path());
        }
    }
    assert!(written_bytes > 6 * JOURNAL_BYTES_MAX, "{written_bytes} bytes were narrowings");
    volume.close().expect("closed");
    assert!(size() < JOURNAL_BYTES_MAX, "an opening reads {} bytes", size());
    let volume = opened(dir.path());
    let listed = volume.epochs().expect("listed");
    let known: BTreeMap<u32, u64> = listed
        .iter()
        .map(|e| (e.epoch, u64::from_le_bytes(e.state.meta[..8].try_into().expect("eight bytes"))))
        .collect();
    assert_eq!(known, kept, "each has what was said of it last");
    for info in listed.iter().step_by(9) {
        let view = View::open(&volume, info.epoch, ExcludedReads::Error).expect("view");
        let selection = info.state.selection.as_ref().expect("a snapshot");
        let mut bytes = vec![0; 4096];
        for block in selection.iter().flat_map(|e| e.start..e.end) {
            view.read(block * BLOCK, &mut bytes).expect("P2: readable");
            let change = then[&info.epoch].get(&block).copied().unwrap_or(1);
            assert!(bytes == content(block, change), "P2: snapshot {} block {block}", info.epoch);
        }
    }
    volume.close().expect("closed");
}

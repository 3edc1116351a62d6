//! What went wrong once: races and faults that random programs seldom meet, each made to happen.

mod clones;
mod full;
mod groups;
mod journal;
mod moments;
mod narrowing;
mod regions;
mod resizing;
mod upkeep;

use super::host::System;
use super::open::{Cache, CreateRequest, OpenRequest, Recover, create, open_on};
use super::{Moment, RestoreRequest, SnapshotRequest, StorePolicy, Volume};
use crate::error::{Error, Result};
use crate::export::STATE_ZERO;
use crate::extent::{Extent, ExtentSet};
use crate::storage::{Directory, Storage};
use crate::view::{ExcludedReads, View};
use parking_lot::Mutex;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const BLOCK: usize = 4096;
const BLOCKS: u64 = 512;

/// Called before each operation with the file's name and the operation's; an error is what the
/// operation gives.
type Hook = Arc<dyn Fn(&str, &str) -> io::Result<()> + Send + Sync>;

/// The hook in force, none at first; and what the filesystem says to have free, if not 0.
#[derive(Clone, Default)]
struct Faults(Arc<Mutex<Option<Hook>>>, Arc<AtomicU64>);

impl Faults {
    fn set(&self, hook: impl Fn(&str, &str) -> io::Result<()> + Send + Sync + 'static) {
        *self.0.lock() = Some(Arc::new(hook));
    }

    fn clear(&self) {
        *self.0.lock() = None;
    }

    /// Run the hook of the next such operation once, without it being in force meanwhile.
    fn once(
        &self,
        name: &'static str,
        operation: &'static str,
        act: impl FnOnce() + Send + 'static,
    ) {
        let (faults, act) = (self.clone(), Mutex::new(Some(act)));
        self.set(move |at, what| {
            if (at, what) == (name, operation) {
                let act = act.lock().take();
                faults.clear();
                if let Some(act) = act {
                    act();
                }
            }
            Ok(())
        });
    }

    fn meet(&self, name: &str, operation: &str) -> io::Result<()> {
        let hook = self.0.lock().clone();
        hook.map_or(Ok(()), |hook| hook(name, operation))
    }
}

fn broken() -> io::Error {
    io::Error::other("a fault of the test")
}

struct FaultyStorage(Arc<dyn Storage>, String, Faults);

impl Storage for FaultyStorage {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.2.meet(&self.1, "read")?;
        self.0.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.2.meet(&self.1, "write")?;
        self.0.write_at(offset, data)
    }
    fn zero_at(&self, offset: u64, length: u64, may_punch: bool) -> io::Result<()> {
        self.2.meet(&self.1, "zero")?;
        self.0.zero_at(offset, length, may_punch)
    }
    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        self.2.meet(&self.1, "discard")?;
        self.0.discard_at(offset, length)
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.2.meet(&self.1, "allocate")?;
        self.0.allocate(offset, length)
    }
    fn release_ahead(&self, offset: u64, length: u64) {
        self.0.release_ahead(offset, length);
    }
    fn sync(&self) -> io::Result<()> {
        self.2.meet(&self.1, "sync")?;
        self.0.sync()
    }
    fn next_data(&self, offset: u64, end: u64) -> io::Result<u64> {
        self.2.meet(&self.1, "next_data")?;
        let found = self.0.next_data(offset, end);
        self.2.meet(&self.1, "next_data done")?;
        found
    }
    fn next_hole(&self, offset: u64, end: u64) -> io::Result<u64> {
        self.0.next_hole(offset, end)
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.0.allocated_bytes()
    }
    fn set_len(&self, length: u64) -> io::Result<()> {
        self.2.meet(&self.1, "set_len")?;
        self.0.set_len(length)
    }
}

struct FaultyDirectory(Arc<dyn Directory>, Faults);

impl FaultyDirectory {
    fn wrap(&self, name: &str, file: Arc<dyn Storage>) -> Arc<dyn Storage> {
        let kind = match name {
            "journal" | "journal.new" => name,
            _ if crate::index::run::run_number(name).is_some() => "index",
            _ => "segment",
        };
        Arc::new(FaultyStorage(file, kind.into(), self.1.clone()))
    }
}

impl Directory for FaultyDirectory {
    fn open(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        Ok(self.wrap(name, self.0.open(name)?))
    }
    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        self.1.meet("directory", "create")?;
        Ok(self.wrap(name, self.0.create(name)?))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.1.meet("directory", "rename")?;
        self.0.rename(from, to)?;
        self.1.meet("directory", "rename done")
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.1.meet("directory", "remove")?;
        self.0.remove(name)
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.0.list()
    }
    fn sync(&self) -> io::Result<()> {
        self.1.meet("directory", "sync")?;
        self.0.sync()
    }
    fn free_bytes(&self) -> io::Result<u64> {
        match self.1.1.load(Ordering::Relaxed) {
            0 => self.0.free_bytes(),
            free => Ok(free),
        }
    }
}

/// A volume on a disk in which every block holds its number plus one.
struct Scene {
    dir: tempfile::TempDir,
    faults: Faults,
}

impl Scene {
    fn new(size_bytes: usize) -> Self {
        let base = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
        let dir = tempfile::tempdir_in(base).expect("temporary directory");
        let content: Vec<u8> =
            (0..size_bytes).map(|at| u8::try_from(at / BLOCK % 250 + 1).expect("small")).collect();
        std::fs::write(dir.path().join("disk.img"), content).expect("origin");
        create(&CreateRequest {
            store: dir.path().join("store"),
            origin: dir.path().join("disk.img"),
            block_size: 4096,
            meta: Vec::new(),
            policy: StorePolicy::default(),
        })
        .expect("create");
        Self { dir, faults: Faults::default() }
    }

    fn request(&self) -> OpenRequest {
        OpenRequest {
            store: self.dir.path().join("store"),
            origin: None,
            cache: Cache::WriteBack,
            direct: false,
            buffer_dir: Some(self.dir.path().to_path_buf()),
            buffer_bytes: 8 << 20,
            recover: Recover::Refuse,
            has_background: false,
            peers: Vec::new(),
        }
    }

    fn open_as(&self, request: OpenRequest) -> Result<Arc<Volume>> {
        let (faults, more) = (self.faults.clone(), self.faults.clone());
        let host = System::through(
            Box::new(move |origin| {
                Arc::new(FaultyStorage(origin, "origin".into(), faults.clone()))
            }),
            Box::new(move |_, inner| Arc::new(FaultyDirectory(inner, more.clone()))),
        );
        open_on(Arc::new(host), request)
    }

    fn open(&self) -> Arc<Volume> {
        self.open_as(self.request()).expect("open")
    }

    fn on_disk(&self, block: u64) -> u8 {
        let disk = std::fs::read(self.dir.path().join("disk.img")).expect("origin");
        disk[usize::try_from(block).expect("small") * BLOCK]
    }
}

fn everything() -> ExtentSet {
    ExtentSet::from_extent(Extent::new(0, BLOCKS))
}

fn snapshot_request(selection: ExtentSet) -> SnapshotRequest {
    SnapshotRequest {
        selection,
        low: ExtentSet::new(),
        meta: Vec::new(),
        pause_limit: Duration::from_secs(2),
    }
}

fn snapshot(volume: &Volume, selection: ExtentSet) -> u32 {
    volume.snapshot(snapshot_request(selection)).expect("snapshot").epoch
}

fn put(volume: &Volume, block: u64, byte: u8) {
    volume.write(block * 4096, &[byte; BLOCK], false).expect("write");
}

fn get(volume: &Volume, block: u64) -> u8 {
    let mut content = [0; BLOCK];
    volume.read(block * 4096, &mut content).expect("read");
    content[0]
}

fn get_old(volume: &Arc<Volume>, epoch: u32, block: u64) -> Result<u8> {
    let view = View::open(volume, epoch, ExcludedReads::Zeros)?;
    let mut content = [0; BLOCK];
    view.read(block * 4096, &mut content)?;
    Ok(content[0])
}

/// Let a thread that was started come to where it waits for the committer role.
fn let_it_wait() {
    std::thread::sleep(Duration::from_millis(200));
}

/// A flush took the number of the last write, then a rewrite dropped that write's slot before it
/// was committed, with a later number: the flush found nothing to do. The flush now says up to
/// where slots must stay.
#[test]
fn a_flush_covers_a_write_whose_slot_is_rewritten_meanwhile() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    snapshot(&volume, everything());
    put(&volume, 7, 0xA1);
    let role = volume.committer.lock();
    let flusher = Arc::clone(&volume);
    let flush = std::thread::spawn(move || flusher.flush());
    let_it_wait();
    put(&volume, 7, 0xA2);
    drop(role);
    flush.join().expect("no panic").expect("flush");
    assert!([0xA1, 0xA2].contains(&scene.on_disk(7)), "P6: the write before the flush is gone");
}

/// A discard decided that nobody needs a block, then a snapshot was taken, then the discard was
/// done. It now decides in the hands of the committer role.
#[test]
fn a_discard_does_not_take_what_a_snapshot_selected_meanwhile() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let first = snapshot(&volume, everything());
    volume.bookmark(first, Vec::new()).expect("bookmark");
    volume.delete_snapshot(first, false).expect("delete");
    let mut role = volume.committer.lock();
    let trimmer = Arc::clone(&volume);
    let trim = std::thread::spawn(move || trimmer.trim(0, 512 * 4096, false));
    let_it_wait();
    let taken =
        volume.take_instant(&mut role, snapshot_request(everything()), None, Moment::default());
    let epoch = taken.expect("snapshot").epoch;
    drop(role);
    trim.join().expect("no panic").expect("trim");
    for block in 0..BLOCKS {
        let byte = get_old(&volume, epoch, block).expect("view");
        assert_eq!(u64::from(byte), block % 250 + 1, "P2: block {block}");
    }
}

/// A view kept the selection from when it was opened: what was narrowed away under it read as the
/// live disk.
#[test]
fn a_view_does_not_show_the_live_disk_where_its_snapshot_was_narrowed() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let epoch = snapshot(&volume, everything());
    let view = View::open(&volume, epoch, ExcludedReads::Zeros).expect("view");
    volume.narrow(epoch, &ExtentSet::from_extent(Extent::new(100, 200))).expect("narrow");
    put(&volume, 7, 0xA1);
    volume.flush().expect("flush");
    let mut content = [9; BLOCK];
    view.read(7 * 4096, &mut content).expect("read");
    assert_eq!(content[0], 0, "P2: not selected any more");
    if view.try_read(7 * 4096, &mut content).expect("read") {
        assert_eq!(content[0], 0, "P2: not selected any more");
    }
    let told = view.allocation(7 * 4096, 4096, 10).expect("allocation");
    assert!(told.iter().all(|part| part.flags & STATE_ZERO != 0));
}

/// The snapshot was deleted by force between a view's look at it and its read of the origin.
#[test]
fn a_view_fails_when_its_snapshot_is_deleted_while_it_reads() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let epoch = snapshot(&volume, everything());
    let view = View::open(&volume, epoch, ExcludedReads::Zeros).expect("view");
    let other = Arc::clone(&volume);
    scene.faults.once("origin", "read", move || {
        let deleter = Arc::clone(&other);
        let deleted = std::thread::spawn(move || deleter.delete_snapshot(epoch, true));
        // Deletion waits for this very read before it gives space back; its decision does not.
        while other.epochs.read().0.contains_key(&epoch) {
            std::thread::yield_now();
        }
        while other.state.lock().pending.get(7) {
            std::thread::yield_now();
        }
        put(&other, 7, 0xA1);
        drop(deleted);
    });
    let mut content = [0; BLOCK];
    let read = view.read(7 * 4096, &mut content);
    assert!(read.is_err() || content[0] == 8, "P2: {:#x}", content[0]);
}

/// The header of an instant that failed was still there when the volume was opened again: its
/// segment was taken for the end of the log, and what was appended there was of another epoch and
/// not read back.
#[test]
fn the_segment_of_an_instant_that_failed_is_no_part_of_the_log() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let epoch = snapshot(&volume, everything());
    scene.faults.set(|name, operation| match (name, operation) {
        ("segment", "sync" | "set_len") | ("directory", "remove") => Err(broken()),
        _ => Ok(()),
    });
    assert!(volume.snapshot(snapshot_request(everything())).is_err());
    scene.faults.clear();
    put(&volume, 3, 0xA1);
    volume.flush().expect("flush");
    volume.abandon();
    let volume = scene.open();
    assert_eq!(get_old(&volume, epoch, 3).expect("view"), 4, "P2: what was appended behind it");
    put(&volume, 7, 0xA1);
    volume.flush().expect("flush");
    volume.abandon();
    let volume = scene.open();
    assert_eq!(get_old(&volume, epoch, 7).expect("view"), 8, "P2");
    assert_eq!(get_old(&volume, epoch, 3).expect("view"), 4, "P2");
}

/// A slot with the odd end of the disk says that its last sector is valid whole. After growth that
/// showed, and wrote, what its memory held before.
#[test]
fn growth_does_not_bring_old_slots_to_light() {
    let size = 511 * BLOCK + 700;
    let scene = Scene::new(size);
    let volume = scene.open();
    snapshot(&volume, everything());
    for block in 0..200 {
        put(&volume, block, 0xEE);
    }
    volume.flush().expect("flush");
    let from = 511 * 4096_u64;
    volume.write(from, &[0xA1; 700], false).expect("write");
    let file = std::fs::File::options().write(true).open(scene.dir.path().join("disk.img"));
    file.expect("origin").set_len(512 * 4096).expect("growth");
    volume.resize().expect("resize");
    let mut tail = vec![0; 4096];
    volume.read(from, &mut tail).expect("read");
    assert!(tail[..700].iter().all(|&b| b == 0xA1) && tail[700..].iter().all(|&b| b == 0));
    volume.flush().expect("flush");
    volume.read(from, &mut tail).expect("read");
    assert!(tail[..700].iter().all(|&b| b == 0xA1) && tail[700..].iter().all(|&b| b == 0));
}

/// The records were looked through before the slots: a write that moved from the one to the other
/// was missed.
#[test]
fn a_write_on_its_way_from_the_buffer_to_the_log_counts_as_changed() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let is_over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (flusher, over) = (Arc::clone(&volume), Arc::clone(&is_over));
    let flush = std::thread::spawn(move || {
        while !over.load(std::sync::atomic::Ordering::Relaxed) {
            flusher.flush().expect("flush");
        }
    });
    for _ in 0..8 {
        let epoch = snapshot(&volume, everything());
        for block in 0..BLOCKS {
            put(&volume, block, 0xA1);
            let told = volume.changed(epoch, None).expect("changed");
            assert!(told.contains(block), "P5: block {block} was written and is not told");
        }
        volume.delete_snapshot(epoch, false).expect("delete");
    }
    is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    flush.join().expect("no panic");
}

/// A block was zeroed, as a hole, between the look at the records and the look for holes: its old
/// content was told to be zero.
#[test]
fn block_status_of_a_view_does_not_call_zero_what_was_punched_meanwhile() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let epoch = snapshot(&volume, everything());
    let view = View::open(&volume, epoch, ExcludedReads::Zeros).expect("view");
    let other = Arc::clone(&volume);
    scene.faults.once("origin", "next_data", move || {
        other.write_zeroes(0, 4096 * 128, true, false).expect("zero");
    });
    let told = view.allocation(0, 512 * 4096, 100).expect("allocation");
    assert!(told.iter().all(|part| part.flags == 0), "P2: {told:?}");
}

/// As above for the live disk: a slot went to a hole of the origin after that was looked for.
#[test]
fn block_status_of_the_live_disk_does_not_call_zero_what_was_written_meanwhile() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    volume.write_zeroes(0, 512 * 4096, true, false).expect("zero");
    snapshot(&volume, everything());
    put(&volume, 7, 0xA1);
    let other = Arc::clone(&volume);
    scene.faults.once("origin", "next_data done", move || other.flush().expect("flush"));
    let told = volume.allocation(0, 512 * 4096, 100).expect("allocation");
    let part = told.iter().find(|part| part.start <= 7 * 4096 && 7 * 4096 < part.end);
    assert_eq!(part.expect("covered").flags & STATE_ZERO, 0, "{told:?}");
}

/// The kernel tells a failed write-back to one caller of sync only; another one, at the same time,
/// was told that its writes are durable.
#[test]
fn when_one_of_two_syncs_fails_both_flushes_fail() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    put(&volume, 7, 0xA1);
    let (entered, calls) = (Arc::new(std::sync::Barrier::new(2)), Mutex::new(0));
    let seen = Arc::clone(&entered);
    scene.faults.set(move |name, operation| {
        if (name, operation) != ("origin", "sync") {
            return Ok(());
        }
        let call = {
            let mut calls = calls.lock();
            *calls += 1;
            *calls
        };
        if call > 1 {
            return Ok(());
        }
        seen.wait();
        let_it_wait();
        Err(broken())
    });
    let first = Arc::clone(&volume);
    let first = std::thread::spawn(move || first.flush());
    entered.wait();
    let second = volume.flush();
    assert!(first.join().expect("no panic").is_err());
    assert!(second.is_err(), "P6: the kernel had dropped the write");
}

/// A failed origin could never be accepted: the decision was not written down, so each opening
/// asked again.
#[test]
fn a_failed_origin_that_was_recovered_opens_again() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    snapshot(&volume, everything());
    put(&volume, 7, 0xA1);
    scene.faults.set(|name, operation| match (name, operation) {
        ("origin", "sync") => Err(broken()),
        _ => Ok(()),
    });
    assert!(volume.close().is_err());
    scene.faults.clear();
    drop(volume);
    assert!(matches!(scene.open_as(scene.request()), Err(Error::RecoveryNeeded(_))));
    let mut request = scene.request();
    request.recover = Recover::Replay;
    let volume = scene.open_as(request).expect("recovered");
    assert_eq!(get(&volume, 7), 0xA1);
    volume.close().expect("close");
    drop(volume);
    scene.open().close().expect("an origin that was accepted");
}

/// Closing failed at its very end and kept the locks: the volume could neither be closed nor opened
/// any more.
#[test]
fn a_close_that_fails_lets_go_all_the_same() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    snapshot(&volume, everything());
    put(&volume, 7, 0xA1);
    volume.flush().expect("flush");
    scene.faults.set(|name, operation| match (name, operation) {
        ("segment" | "journal", "write") => Err(broken()),
        _ => Ok(()),
    });
    assert!(volume.close().is_err());
    scene.faults.clear();
    let again = scene.open();
    assert_eq!(get(&again, 7), 0xA1);
}

/// A kill while buffered writes were replayed left an origin that was newer than the last sign of
/// life: the next opening took its own writes for those of somebody else.
#[test]
fn a_replay_that_was_interrupted_is_replayed_again() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    snapshot(&volume, everything());
    for block in 0..20 {
        put(&volume, block * 2, 0xA1);
    }
    let long_ago = crate::sync::unix_ns() - 10_000_000_000;
    volume.state.lock().buffer.arena().note_alive(long_ago);
    volume.abandon();
    drop(volume);
    let disk = std::fs::File::options().write(true).open(scene.dir.path().join("disk.img"));
    let then = std::time::SystemTime::now() - Duration::from_secs(10);
    disk.expect("origin").set_modified(then).expect("time");
    let writes = Mutex::new(0);
    scene.faults.set(move |name, operation| {
        let mut writes = writes.lock();
        *writes += u32::from((name, operation) == ("origin", "write"));
        if *writes > 10 { Err(broken()) } else { Ok(()) }
    });
    assert!(scene.open_as(scene.request()).is_err());
    scene.faults.clear();
    let volume = scene.open();
    for block in 0..20 {
        assert_eq!(get(&volume, block * 2), 0xA1);
    }
}

/// Content that a restore needs and that is damaged stopped everything: no flush of any block
/// succeeded again.
#[test]
fn a_block_that_cannot_be_restored_does_not_stop_writes_to_others() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let epoch = snapshot(&volume, everything());
    for block in 0..8 {
        put(&volume, block, 0xA1);
    }
    volume.flush().expect("flush");
    let request = RestoreRequest {
        source_epoch: epoch,
        request: everything(),
        safety_selection: everything(),
        safety_low: ExtentSet::new(),
        meta: Vec::new(),
        pause_limit: Duration::from_secs(2),
    };
    volume.restore(&request).expect("restore");
    scene.faults.set(|name, operation| match (name, operation) {
        ("segment", "read") => Err(broken()),
        _ => Ok(()),
    });
    put(&volume, 3, 0xA2);
    put(&volume, 100, 0xA2);
    volume.flush().expect("whole blocks need nothing from the store");
    assert_eq!((scene.on_disk(3), scene.on_disk(100)), (0xA2, 0xA2));
    volume.write(4 * 4096, &[0xA3; 512], false).expect("write");
    put(&volume, 101, 0xA2);
    assert!(volume.flush().is_err(), "half of block 4 is not to be had");
    assert_eq!(scene.on_disk(101), 0xA2, "another block does not wait for it");
    scene.faults.clear();
    volume.flush().expect("flush");
    assert!(volume.wait_restored(Duration::from_secs(5)).expect("restore"));
    assert_eq!((get(&volume, 4), get(&volume, 5)), (0xA3, 6));
}

/// On a full store each batch of losses took room of the journal, until that was full too and
/// writes failed.
#[test]
fn a_full_store_never_fails_a_write() {
    let size = 16_384 * BLOCK;
    let scene = Scene::new(size);
    let volume = scene.open();
    let all = ExtentSet::from_extent(Extent::new(0, 16_384));
    let epoch = snapshot(&volume, all);
    put(&volume, 0, 0xA1);
    volume.flush().expect("flush");
    let journal = scene.dir.path().join("store/journal");
    // What the journal has allocated it may use; nothing else is to be had.
    let room = {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(&journal).expect("journal").blocks() * 512
    };
    scene.faults.set(move |name, operation| match (name, operation) {
        ("segment", "write") | ("journal", "allocate") | ("directory", "create") => {
            Err(io::ErrorKind::StorageFull.into())
        }
        ("journal", "write") if std::fs::metadata(&journal)?.len() + 20_000 > room => {
            Err(io::ErrorKind::StorageFull.into())
        }
        _ => Ok(()),
    });
    for block in 1..8_000 {
        put(&volume, block, 0xA2);
        volume.flush().expect("P1: the store's fault, not the client's");
    }
    volume.flush().expect("flush");
    assert_eq!(get_old(&volume, epoch, 0).expect("kept before"), 1);
    assert!(matches!(get_old(&volume, epoch, 9), Err(Error::Lost { .. })));
    assert_eq!(get(&volume, 9), 0xA2);
    assert_eq!(get_old(&volume, epoch, 16_383).expect("far from what changed"), 134);
}

/// A segment that is gone took its records with it, and its blocks were read from the origin.
#[test]
fn a_missing_segment_makes_its_blocks_errors() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let first = snapshot(&volume, everything());
    put(&volume, 1, 0xA1);
    volume.flush().expect("flush");
    let second = snapshot(&volume, everything());
    put(&volume, 2, 0xA1);
    volume.flush().expect("flush");
    let third = snapshot(&volume, everything());
    put(&volume, 3, 0xA1);
    volume.close().expect("close");
    drop(volume);
    std::fs::remove_file(scene.dir.path().join("store/log/00000002.seg")).expect("segment 2");
    let volume = scene.open();
    assert_eq!(get_old(&volume, first, 1).expect("kept before the gap"), 2);
    assert!(get_old(&volume, first, 2).is_err(), "P2");
    assert!(get_old(&volume, second, 2).is_err());
    assert_eq!(get_old(&volume, third, 2).expect("after the gap"), 0xA1);
    assert_eq!(get_old(&volume, third, 3).expect("after the gap"), 4);
}

/// With a slot in the buffer a large discard looked at every block of it in one hold of the lock,
/// for each piece.
#[test]
fn a_terabyte_is_discarded_and_zeroed_in_short_holds_of_the_lock() {
    let scene = Scene::new(BLOCK);
    let disk = std::fs::File::options().write(true).open(scene.dir.path().join("disk.img"));
    disk.expect("origin").set_len(1 << 40).expect("a sparse terabyte");
    let volume = scene.open();
    volume.resize().expect("resize");
    snapshot(&volume, ExtentSet::from_extent(Extent::new(0, 1)));
    put(&volume, 0, 0xA1);
    let started = std::time::Instant::now();
    volume.write_zeroes(1 << 20, (1 << 40) - (1 << 20), true, true).expect("zero");
    volume.trim(1 << 20, (1 << 40) - (1 << 20), true).expect("trim");
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
}

/// Files stayed open for every segment there is: some thousand were too many for one process.
#[test]
fn a_bounded_number_of_segments_is_open_at_once() {
    let scene = Scene::new(BLOCK * 512);
    let volume = scene.open();
    for _ in 0..300 {
        snapshot(&volume, everything());
    }
    let store = scene.dir.path().join("store");
    let open = std::fs::read_dir("/proc/self/fd").expect("proc").filter(|fd| {
        let target = fd.as_ref().ok().and_then(|fd| std::fs::read_link(fd.path()).ok());
        target.is_some_and(|path| path.starts_with(&store))
    });
    assert!(open.count() < 200);
}

#[test]
fn a_snapshot_that_cannot_drain_in_time_is_not_taken_and_writes_go_on() {
    let scene = Scene::new(to_bytes(BLOCKS));
    let volume = scene.open_as(scene.request()).expect("open");
    let (started, has_started) = std::sync::mpsc::channel();
    let (release, is_released) = std::sync::mpsc::channel::<()>();
    let is_released = Mutex::new(is_released);
    scene.faults.once("origin", "write", move || {
        started.send(()).expect("the test waits");
        // A disk that hangs, until the test has seen what a snapshot makes of it.
        let _ = is_released.lock().recv();
    });
    let writer = {
        let volume = Arc::clone(&volume);
        std::thread::spawn(move || volume.write(0, &[9; BLOCK], false))
    };
    has_started.recv().expect("the write is on its way");

    let taken = volume.snapshot(SnapshotRequest {
        selection: ExtentSet::from_extent(Extent::new(0, BLOCKS)),
        low: ExtentSet::new(),
        meta: Vec::new(),
        pause_limit: Duration::from_millis(20),
    });

    assert!(matches!(taken, Err(Error::PauseTimeout(_))), "{taken:?}");
    assert!(volume.epochs().expect("listed").is_empty(), "nothing is listed");
    volume.write(BLOCK as u64, &[8; BLOCK], true).expect("writes go on beside the hanging one");
    release.send(()).expect("the writer waits");
    writer.join().expect("no panic").expect("it was only late");
}

fn to_bytes(blocks: u64) -> usize {
    crate::number::to_usize(blocks) * BLOCK
}

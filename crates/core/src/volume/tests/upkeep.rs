//! Upkeep that finds no room, meets damage, or must not merge what lies beside.

use super::*;
use crate::volume::{Effort, OnFull};

const LIMIT: u64 = 6 << 20;

fn names(scene: &Scene, suffix: &str) -> Vec<String> {
    let files = std::fs::read_dir(scene.dir.path().join("store/log")).expect("listed");
    let names = files.map(|file| file.expect("entry").file_name().into_string().expect("text"));
    let mut names: Vec<String> = names.filter(|name| name.ends_with(suffix)).collect();
    names.sort_unstable();
    names
}

fn put_all(volume: &Volume, blocks: std::ops::Range<u64>, byte: u8) {
    blocks.for_each(|block| put(volume, block, byte));
    volume.flush().expect("flush");
}

fn check_all(volume: &Arc<Volume>, epoch: u32, expected: impl Fn(u64) -> u8) {
    for block in 0..BLOCKS {
        let byte = get_old(volume, epoch, block).expect("readable");
        assert_eq!(byte, expected(block), "P2: snapshot {epoch} block {block}");
    }
}

fn original(block: u64) -> u8 {
    u8::try_from(block % 250 + 1).expect("small")
}

/// Spoil every page of the log's index files that has entries.
fn spoil_indexes(scene: &Scene) {
    for name in names(scene, ".idx") {
        let path = scene.dir.path().join("store/log").join(name);
        let mut bytes = std::fs::read(&path).expect("read");
        for page in (BLOCK..bytes.len() - BLOCK).step_by(BLOCK) {
            bytes[page + 20] ^= 0x40;
        }
        std::fs::write(&path, bytes).expect("written");
    }
}

/// A merged segment stands beside those it was made from for a moment: together they took more than
/// the limit, and what a client wrote then was lost to its snapshot.
#[test]
fn merging_keeps_within_the_store_limit_and_leaves_room_to_clients() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let policy = |limit_bytes| StorePolicy { on_full: OnFull::Fail, limit_bytes };
    volume.set_store_policy(policy(LIMIT)).expect("policy");
    let first = snapshot(&volume, everything());
    for part in 0..4 {
        put_all(&volume, part * 128..(part + 1) * 128, 0xA0);
        let next = snapshot(&volume, everything());
        if part < 3 {
            volume.delete_snapshot(next, false).expect("deleted");
        }
    }
    let (path, most) = (scene.dir.path().join("store"), Arc::new(AtomicU64::new(0)));
    let seen = Arc::clone(&most);
    scene.faults.set(move |_, _| {
        use std::os::unix::fs::MetadataExt;
        let files = std::fs::read_dir(path.join("log"))?.map(|file| Ok(file?.path()));
        let mut files: Vec<_> = files.collect::<io::Result<_>>()?;
        files.push(path.join("journal"));
        let sizes = files.iter().map(|path| path.metadata());
        // One that is just being removed takes nothing.
        seen.fetch_max(sizes.flatten().map(|m| m.blocks() * 512).sum(), Ordering::Relaxed);
        Ok(())
    });
    let before = names(&scene, ".seg").len();
    volume.maintain(Effort::All).expect("without room there is nothing to do");
    assert!(most.load(Ordering::Relaxed) <= LIMIT, "{} bytes", most.load(Ordering::Relaxed));
    assert_eq!(names(&scene, ".seg").len(), before);
    put_all(&volume, 0..64, 0xB0);
    check_all(&volume, first, original);
    volume.set_store_policy(policy(64 << 20)).expect("policy");
    volume.maintain(Effort::All).expect("upkeep");
    assert!(names(&scene, ".seg").len() < before, "there is room now");
    let used = volume.store_usage().expect("usage");
    assert!(used.used_bytes + used.ahead_bytes <= most.load(Ordering::Relaxed), "counted once");
    check_all(&volume, first, original);
    volume.close().expect("close");
}

/// Each piece was no more than what was left, and all of them together nearly everything.
#[test]
fn what_grows_piece_by_piece_takes_in_all_no_more_than_it_leaves() {
    const PIECE: u64 = 64 << 10;
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let policy = StorePolicy { on_full: OnFull::Fail, limit_bytes: LIMIT };
    volume.set_store_policy(policy).expect("policy");
    snapshot(&volume, everything());
    let left = || {
        let usage = volume.store_usage().expect("usage");
        usage.capacity_bytes - usage.used_bytes - usage.ahead_bytes
    };
    let (before, mut taken) = (left(), 0);
    while volume.take_for_upkeep(taken + PIECE).expect("counted") {
        taken += PIECE;
    }
    assert!(taken > 0 && left() >= taken, "{taken} of {before} bytes, {} left", left());
    volume.end_taking_for_upkeep();
    assert!(left() + PIECE >= before, "given back: {} of {before}", left());
    volume.close().expect("close");
}

/// Writing an index file on a full disk was an error that stayed, with half a file that nobody
/// counted.
#[test]
fn an_index_file_that_finds_no_room_is_left_undone_and_leaves_nothing_behind() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let first = snapshot(&volume, everything());
    put_all(&volume, 0..100, 0xA0);
    snapshot(&volume, everything());
    scene.faults.set(|name, operation| match (name, operation) {
        ("index", "write") => Err(io::ErrorKind::StorageFull.into()),
        _ => Ok(()),
    });
    volume.maintain(Effort::All).expect("nobody needs it so much");
    assert!(names(&scene, ".idx").is_empty());
    check_all(&volume, first, original);
    scene.faults.clear();
    volume.maintain(Effort::All).expect("upkeep");
    assert_eq!(names(&scene, ".idx").len(), 1);
    check_all(&volume, first, original);
    volume.close().expect("close");
}

fn with_spoiled_index() -> (Scene, Arc<Volume>, [u32; 2]) {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let first = snapshot(&volume, everything());
    put_all(&volume, 0..100, 0xA0);
    let second = snapshot(&volume, everything());
    put_all(&volume, 50..150, 0xB0);
    let third = snapshot(&volume, everything());
    volume.delete_snapshot(third, false).expect("deleted");
    volume.maintain(Effort::All).expect("upkeep");
    spoil_indexes(&scene);
    (scene, volume, [first, second])
}

/// Whoever met a damaged index file while upkeep was busy was told that it is damaged, as if that
/// had cost anything.
#[test]
fn checks_and_readers_wait_for_upkeep_where_an_index_file_is_damaged() {
    let (_scene, volume, [first, second]) = with_spoiled_index();
    let busy = volume.upkeep.lock();
    let other = Arc::clone(&volume);
    let check = std::thread::spawn(move || other.check_structure());
    let other = Arc::clone(&volume);
    let read = std::thread::spawn(move || get_old(&other, first, 60));
    let_it_wait();
    drop(busy);
    assert_eq!(check.join().expect("no panic").expect("checked"), []);
    assert_eq!(read.join().expect("no panic").expect("read"), original(60));
    check_all(&volume, second, |block| if block < 100 { 0xA0 } else { original(block) });
    volume.close().expect("close");
}

/// Each question met one damaged file, had it mended, and gave up at the next one.
#[test]
fn several_damaged_index_files_cost_nobody_an_answer() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let first = snapshot(&volume, everything());
    for number in 1..=4 {
        put_all(&volume, 0..number * 20, 0xA0);
        snapshot(&volume, everything());
        volume.file_closed(&mut volume.upkeep.lock(), Effort::All).expect("an index file");
    }
    assert_eq!(names(&scene, ".idx").len(), 4);
    spoil_indexes(&scene);
    assert_eq!(volume.epochs().expect("listed").len(), 5);
    check_all(&volume, first, original);
    volume.close().expect("close");
}

/// Only what was there when the volume was opened, or when something was given back last, counted as
/// ever needed: copies of later snapshots were never punched.
#[test]
fn deletions_free_copies_of_snapshots_that_were_taken_since_the_volume_was_opened() {
    const COPIES: u64 = 100 * 4096;
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let first = snapshot(&volume, everything());
    put_all(&volume, 0..100, 0xA0);
    let second = snapshot(&volume, everything());
    put_all(&volume, 0..100, 0xB0);
    let third = snapshot(&volume, everything());
    put_all(&volume, 0..100, 0xC0);
    for epoch in [third, second] {
        let before = volume.store_bytes().expect("counted");
        let freed = volume.delete_snapshot(epoch, false).expect("deleted");
        let after = volume.store_bytes().expect("counted");
        assert_eq!(freed, COPIES, "snapshot {epoch}");
        // A batch that seals the log may have been added.
        assert!(before - after >= COPIES - 16 * 4096, "{before} to {after}");
    }
    check_all(&volume, first, original);
    let next = snapshot(&volume, everything());
    put_all(&volume, 0..50, 0xD0);
    assert_eq!(volume.delete_snapshot(next, false).expect("deleted"), COPIES / 2);
    check_all(&volume, first, original);
    volume.close().expect("close");
}

/// The deletion had been decided, and said that it failed.
#[test]
fn a_deletion_goes_on_where_an_index_file_is_damaged() {
    let (_scene, volume, [first, second]) = with_spoiled_index();
    let freed = volume.delete_snapshot(first, false).expect("deleted");
    assert!(freed >= 50 * 4096, "{freed} bytes");
    check_all(&volume, second, |block| if block < 100 { 0xA0 } else { original(block) });
    volume.delete_snapshot(second, false).expect("deleted");
    assert_eq!(volume.store_bytes().expect("counted"), 0);
    volume.close().expect("close");
}

/// The number of a merged segment is not its place: another that stands for the numbers around it
/// does not stand for it. Without its headers it was removed, and its snapshots read the origin.
#[test]
fn a_merged_segment_without_headers_is_not_taken_for_one_that_another_stands_for() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let first = snapshot(&volume, everything());
    for block in 0..3 {
        put(&volume, block, 0xA0);
        let next = snapshot(&volume, everything());
        volume.delete_snapshot(next, false).expect("deleted");
    }
    let second = snapshot(&volume, everything());
    volume.maintain(Effort::All).expect("upkeep");
    let merged = names(&scene, ".seg").pop().expect("merged");
    for block in 10..13 {
        put(&volume, block, 0xB0);
        let next = snapshot(&volume, everything());
        volume.delete_snapshot(next, false).expect("deleted");
    }
    snapshot(&volume, everything());
    volume.maintain(Effort::All).expect("upkeep");
    assert!(names(&scene, ".seg").contains(&merged));
    volume.close().expect("close");
    drop(volume);
    let log = scene.dir.path().join("store/log");
    let mut bytes = std::fs::read(log.join(&merged)).expect("read");
    for page in (0..bytes.len()).step_by(BLOCK) {
        if bytes[page..].starts_with(b"SBLOGSEG") {
            bytes[page + 20] ^= 1;
        }
    }
    std::fs::write(log.join(&merged), bytes).expect("written");
    let volume = scene.open();
    assert!(names(&scene, ".seg").contains(&merged), "P10: it holds records");
    for block in 0..3 {
        let read = get_old(&volume, first, block);
        assert!(read.is_err(), "P2: block {block} is {read:?}, and its record is gone");
    }
    check_all(&volume, second, |block| if block < 3 { 0xA0 } else { original(block) });
    volume.close().expect("close");
}

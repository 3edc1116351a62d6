//! A full store: what each policy promises, that room comes back, and that marks always find some.

use super::*;
use crate::volume::OnFull;
use std::sync::atomic::AtomicBool;

const DISK_BLOCKS: u64 = 3000;
const LIMIT: u64 = 6 << 20;

fn disk() -> ExtentSet {
    ExtentSet::from_extent(Extent::new(0, DISK_BLOCKS))
}

fn scene() -> Scene {
    Scene::new(to_bytes(DISK_BLOCKS))
}

fn policy(on_full: OnFull) -> StorePolicy {
    StorePolicy { on_full, limit_bytes: LIMIT }
}

fn original(block: u64) -> u8 {
    u8::try_from(block % 250 + 1).expect("small")
}

fn try_put(volume: &Volume, block: u64, byte: u8) -> Result<()> {
    volume.write(block * 4096, &[byte; BLOCK], false)
}

fn taken_by_store(scene: &Scene) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let log = std::fs::read_dir(scene.dir.path().join("store/log")).expect("log");
    let files = log.map(|entry| entry.expect("entry").path());
    let files = files.chain([scene.dir.path().join("store/journal")]);
    files.map(|path| std::fs::metadata(path).expect("file").blocks() * 512).sum()
}

/// Every block of the snapshot is its original, or lost and told to be.
fn check_snapshot(volume: &Arc<Volume>, epoch: u32) -> ExtentSet {
    let told = volume
        .epochs()
        .expect("listed")
        .into_iter()
        .find(|e| e.epoch == epoch)
        .expect("listed")
        .lost;
    for block in 0..DISK_BLOCKS {
        match get_old(volume, epoch, block) {
            Ok(byte) => {
                assert_eq!(byte, original(block), "P2: block {block}");
                assert!(!told.contains(block), "block {block} is told to be lost and is not");
            }
            Err(Error::Lost { .. }) => assert!(told.contains(block), "block {block} is not told"),
            Err(error) => panic!("block {block}: {error}"),
        }
    }
    told
}

#[test]
fn with_fail_writes_that_find_no_room_fail_and_snapshots_stay_whole() {
    let scene = scene();
    let volume = scene.open();
    volume.set_store_policy(policy(OnFull::Fail)).expect("policy");
    let epoch = snapshot(&volume, disk());
    let mut done = 0;
    let refused = loop {
        match try_put(&volume, done, 0xFA) {
            Ok(()) => done += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::StoreFull(_)), "{refused}");
    assert!((100..DISK_BLOCKS).contains(&done), "{done} blocks");
    put(&volume, 0, 0xFB); // settled, or about to be: it needs no room
    volume.flush().expect("what was acknowledged has its room");
    put(&volume, 0, 0xFC);
    let large = volume.write(2000 * 4096, &vec![1; 256 * BLOCK], false);
    assert!(matches!(large, Err(Error::StoreFull(_))), "past the buffer too: {large:?}");
    assert!(volume.write_zeroes(2000 * 4096, 1 << 20, true, false).is_err());
    assert!(check_snapshot(&volume, epoch).is_empty());
    assert_eq!((get(&volume, 0), get(&volume, done - 1)), (0xFC, 0xFA));
    assert_eq!(get(&volume, done), original(done));
    assert!(taken_by_store(&scene) <= LIMIT, "{}", taken_by_store(&scene));
    let usage = volume.store_usage().expect("usage");
    assert!(usage.is_full && usage.used_bytes * 100 >= usage.capacity_bytes * 95, "{usage:?}");

    volume.close().expect("close");
    drop(volume);
    let volume = scene.open();
    assert_eq!(volume.store_policy(), policy(OnFull::Fail));
    assert!(try_put(&volume, done, 0xFA).is_err(), "it is in force after opening");
    assert!(check_snapshot(&volume, epoch).is_empty());
    volume.delete_snapshot(epoch, false).expect("deletion works on a full store");
    let second = snapshot(&volume, disk());
    put(&volume, done, 0xFD);
    volume.flush().expect("flush");
    assert_eq!(get_old(&volume, second, done).expect("kept"), original(done));
}

#[test]
fn with_hold_first_changes_wait_until_there_is_room_and_others_go_on() {
    let scene = scene();
    let volume = scene.open_as(OpenRequest { has_background: true, ..scene.request() });
    let volume = volume.expect("open");
    volume.set_store_policy(policy(OnFull::Hold)).expect("policy");
    let epoch = snapshot(&volume, disk());
    let writer = {
        let volume = Arc::clone(&volume);
        std::thread::spawn(move || (0..DISK_BLOCKS).try_for_each(|b| try_put(&volume, b, 0xFA)))
    };
    let wait_held = |writes: u64| {
        while volume.store_usage().expect("usage").held_writes < writes {
            std::thread::yield_now();
        }
    };
    wait_held(1);
    let large = {
        let volume = Arc::clone(&volume);
        std::thread::spawn(move || volume.write(2000 * 4096, &vec![0xFA; 256 * BLOCK], false))
    };
    wait_held(2);
    put(&volume, 0, 0xFB);
    volume.flush().expect("a flush does not wait for writes that were not acknowledged");
    assert_eq!(get(&volume, 0), 0xFB);
    assert!(!volume.try_write(2900 * 4096, &[1; BLOCK]).expect("told instead of waiting"));
    assert!(volume.try_write(0, &[0xFB; BLOCK]).expect("settled"));
    assert!(check_snapshot(&volume, epoch).is_empty());
    assert!(!writer.is_finished() && !large.is_finished());

    let limit_bytes = 64 << 20;
    let more = StorePolicy { on_full: OnFull::Hold, limit_bytes };
    volume.set_store_policy(more).expect("policy");
    writer.join().expect("no panic").expect("the writes were done");
    large.join().expect("no panic").expect("the writes were done");
    volume.flush().expect("flush");
    assert!(check_snapshot(&volume, epoch).is_empty(), "nothing was lost");
    assert_eq!((get(&volume, 2100), get(&volume, DISK_BLOCKS - 1)), (0xFA, 0xFA));
    volume.close().expect("close");
}

#[test]
fn held_writes_go_on_when_a_snapshot_is_deleted_and_end_when_the_volume_is_closed() {
    let scene = scene();
    let volume = scene.open_as(OpenRequest { has_background: true, ..scene.request() });
    let volume = volume.expect("open");
    volume.set_store_policy(policy(OnFull::Hold)).expect("policy");
    let writer = |volume: &Arc<Volume>| {
        let volume = Arc::clone(volume);
        std::thread::spawn(move || (0..DISK_BLOCKS).try_for_each(|b| try_put(&volume, b, 0xFA)))
    };
    let wait_held = || {
        while volume.store_usage().expect("usage").held_writes == 0 {
            std::thread::yield_now();
        }
    };
    let first = snapshot(&volume, disk());
    let held = writer(&volume);
    wait_held();
    volume.delete_snapshot(first, false).expect("delete");
    held.join().expect("no panic").expect("there is room");
    snapshot(&volume, disk());
    let held = writer(&volume);
    wait_held();
    volume.close().expect("close");
    assert!(matches!(held.join().expect("no panic"), Err(Error::Closed)));
}

#[test]
fn with_degrade_writes_go_on_and_the_limit_holds() {
    let scene = scene();
    let volume = scene.open();
    volume.set_store_policy(policy(OnFull::Degrade)).expect("policy");
    let epoch = snapshot(&volume, disk());
    for block in 0..2500 {
        put(&volume, block, 0xFA);
        if block % 100 == 0 {
            volume.flush().expect("flush");
        }
    }
    volume.flush().expect("flush");
    volume.write(2600 * 4096, &vec![0xFA; 256 * BLOCK], false).expect("past the buffer");
    volume.flush().expect("flush");
    let lost = check_snapshot(&volume, epoch);
    assert!((1000..2756).contains(&lost.block_count()), "{}", lost.block_count());
    assert!((0..2500).all(|block| get(&volume, block) == 0xFA));
    assert!(taken_by_store(&scene) <= LIMIT, "{}", taken_by_store(&scene));
    volume.close().expect("close");
    drop(volume);
    let volume = scene.open();
    assert_eq!(check_snapshot(&volume, epoch), lost, "as before");
}

#[test]
fn with_degrade_what_matters_less_is_lost_first_also_where_it_was_kept_before() {
    let scene = scene();
    let volume = scene.open();
    volume.set_store_policy(policy(OnFull::Degrade)).expect("policy");
    let low = ExtentSet::from_extent(Extent::new(0, 2000));
    let request = SnapshotRequest { low: low.clone(), ..snapshot_request(disk()) };
    let epoch = volume.snapshot(request).expect("snapshot").epoch;
    for block in (0..2000).chain(2000..2900) {
        put(&volume, block, 0xFA);
    }
    volume.flush().expect("flush");
    let lost = check_snapshot(&volume, epoch);
    assert!(!lost.is_empty());
    assert!(lost.difference(&low).is_empty(), "only what matters less: {lost:?}");
    assert!(taken_by_store(&scene) <= LIMIT, "{}", taken_by_store(&scene));
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    assert_eq!(check_snapshot(&volume, epoch), lost, "as before");
    assert_eq!(*volume.low(epoch), low);
    assert!(volume.changed(epoch, None).expect("changed").contains(5), "P5");
}

/// A copy that another snapshot holds to matter is not given up.
#[test]
fn what_matters_to_one_of_its_snapshots_is_kept() {
    let scene = scene();
    let volume = scene.open();
    volume.set_store_policy(policy(OnFull::Degrade)).expect("policy");
    let low = ExtentSet::from_extent(Extent::new(0, 2000));
    let some = ExtentSet::from_extent(Extent::new(0, 100));
    let first = snapshot(&volume, some);
    let request = SnapshotRequest { low: low.clone(), ..snapshot_request(disk()) };
    let second = volume.snapshot(request).expect("snapshot").epoch;
    for block in (0..2000).chain(2000..2900) {
        put(&volume, block, 0xFA);
    }
    volume.flush().expect("flush");
    let lost = check_snapshot(&volume, second);
    assert!((0..100).all(|block| !lost.contains(block)), "{lost:?}");
    assert_eq!(get_old(&volume, first, 99).expect("kept"), original(99));
}

/// What was acknowledged under `hold` and `fail` had its room: a kill and a replay take nothing.
#[test]
fn acknowledged_writes_keep_their_room_over_a_kill() {
    let scene = scene();
    let volume = scene.open();
    volume.set_store_policy(policy(OnFull::Fail)).expect("policy");
    let epoch = snapshot(&volume, disk());
    let mut done = 0;
    while try_put(&volume, done, 0xFA).is_ok() {
        done += 1;
    }
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    assert!((0..done).all(|block| get(&volume, block) == 0xFA), "P6");
    assert!(check_snapshot(&volume, epoch).is_empty());
}

#[test]
fn growth_stops_before_what_a_sparse_origin_on_the_same_filesystem_needs() {
    let scene = Scene::new(BLOCK);
    let disk_bytes = DISK_BLOCKS * 4096;
    let file = std::fs::File::options().write(true).open(scene.dir.path().join("disk.img"));
    file.expect("origin").set_len(disk_bytes).expect("sparse");
    let (free, volume) = (disk_bytes + (8 << 20), {
        scene.faults.1.store(disk_bytes + (8 << 20), Ordering::Relaxed);
        scene.open()
    });
    volume.resize().expect("resize");
    volume.set_store_policy(StorePolicy { on_full: OnFull::Fail, limit_bytes: 0 }).expect("policy");
    for block in 0..DISK_BLOCKS / 2 {
        put(&volume, block, original(block));
    }
    // The test's filesystem does not tell what the origin took; this one does.
    scene.faults.1.store(free - disk_bytes / 2, Ordering::Relaxed);
    snapshot(&volume, ExtentSet::from_extent(Extent::new(0, DISK_BLOCKS / 2)));
    scene.faults.1.store(disk_bytes / 2 + 4096, Ordering::Relaxed);
    let refused = (0..DISK_BLOCKS / 2).find_map(|block| try_put(&volume, block, 0xFA).err());
    assert!(matches!(refused, Some(Error::StoreFull(_))), "{refused:?}");
    put(&volume, DISK_BLOCKS - 1, 0xFA);
}

/// With neither place for a mark the store's failure was latched until the volume was opened anew.
#[test]
fn a_store_that_takes_records_again_is_used_again() {
    for has_background in [false, true] {
        let scene = scene();
        let volume = scene.open_as(OpenRequest { has_background, ..scene.request() });
        let volume = volume.expect("open");
        let epoch = snapshot(&volume, disk());
        put(&volume, 1, 0xFA);
        scene.faults.set(|name, operation| match (name, operation) {
            ("segment" | "journal", "write" | "sync") | ("directory", "create") => Err(broken()),
            _ => Ok(()),
        });
        assert!(volume.flush().is_err(), "neither the original nor its loss could be recorded");
        assert!(try_put(&volume, 2, 0xFA).is_err(), "nothing is acknowledged that has no place");
        assert_eq!(scene.on_disk(1), 2, "P2: the origin is not touched");
        scene.faults.clear();
        let mut tries = 0;
        while try_put(&volume, 2, 0xFB).is_err() {
            tries += 1;
            assert!(tries < 10_000, "it goes on once it can");
            std::thread::sleep(Duration::from_millis(1));
        }
        volume.flush().expect("flush");
        assert_eq!((scene.on_disk(1), scene.on_disk(2)), (0xFA, 0xFB));
        assert!(check_snapshot(&volume, epoch).is_empty());
        volume.close().expect("close");
    }
}

/// P2 after a failed sync: what it was to make durable is not trusted, it is written elsewhere.
#[test]
fn after_a_failed_log_sync_the_batch_is_written_again_in_another_segment() {
    let scene = scene();
    let volume = scene.open();
    let epoch = snapshot(&volume, disk());
    put(&volume, 1, 0xFA);
    volume.flush().expect("flush");
    let has_failed = AtomicBool::new(false);
    scene.faults.set(move |name, operation| match (name, operation) {
        ("segment", "sync") if !has_failed.swap(true, Ordering::Relaxed) => Err(broken()),
        _ => Ok(()),
    });
    put(&volume, 2, 0xFA);
    volume.flush().expect("the second place took it");
    scene.faults.clear();
    put(&volume, 3, 0xFA);
    volume.flush().expect("flush");
    assert!(check_snapshot(&volume, epoch).is_empty());
    volume.abandon();
    drop(volume);
    // What the failed sync left may be anything.
    let first = scene.dir.path().join("store/log/00000001.seg");
    let length = std::fs::metadata(&first).expect("segment").len();
    let noise = std::fs::File::options().write(true).open(&first).expect("segment");
    std::os::unix::fs::FileExt::write_all_at(&noise, &[0xEE; 3 * BLOCK], length - 3 * 4096)
        .expect("noise");
    let names: Vec<_> =
        std::fs::read_dir(scene.dir.path().join("store/log")).expect("log").collect();
    assert_eq!(names.len(), 2, "a segment before the failure, one after it");
    let volume = scene.open();
    assert!(check_snapshot(&volume, epoch).is_empty());
}

#[test]
fn a_restore_on_a_full_store_goes_on_when_there_is_room() {
    for on_full in [OnFull::Degrade, OnFull::Hold, OnFull::Fail] {
        let scene = scene();
        let volume = scene.open_as(OpenRequest { has_background: true, ..scene.request() });
        let volume = volume.expect("open");
        let first = snapshot(&volume, disk());
        for block in 0..900 {
            put(&volume, block, 0xFA);
        }
        volume.flush().expect("flush");
        let used = volume.store_usage().expect("usage").used_bytes;
        let limit_bytes = used + (2 << 20);
        volume.set_store_policy(StorePolicy { on_full, limit_bytes }).expect("policy");
        let request = RestoreRequest {
            source_epoch: first,
            request: disk(),
            safety_selection: disk(),
            safety_low: ExtentSet::new(),
            meta: Vec::new(),
            pause_limit: Duration::from_secs(2),
        };
        let started = volume.restore(&request).expect("restore");
        if on_full != OnFull::Degrade {
            while volume.wait_restored(Duration::from_millis(10)).is_ok() {}
            assert!(volume.restore_status().is_some(), "it waits");
            assert_eq!(get(&volume, 899), original(899), "and reads as restored");
            volume
                .set_store_policy(StorePolicy { on_full, limit_bytes: 64 << 20 })
                .expect("policy");
        }
        let mut tries = 0;
        while !volume.wait_restored(Duration::from_secs(10)).unwrap_or(false) {
            tries += 1;
            assert!(tries < 1000, "{on_full:?}");
        }
        assert!((0..900).all(|block| get(&volume, block) == original(block)));
        let told =
            volume.epochs().expect("listed").into_iter().find(|e| e.epoch == started.safety_epoch);
        let lost = told.expect("listed").lost;
        assert_eq!(lost.is_empty(), on_full != OnFull::Degrade, "{on_full:?}: {lost:?}");
        volume.close().expect("close");
    }
}

/// An old block that the origin cannot give is lost at its source, and told apart from one that found
/// no room; the write that would have changed it goes on and may heal it.
#[test]
fn an_unreadable_old_block_is_lost_at_source_and_the_write_goes_on() {
    let scene = scene();
    let volume = scene.open();
    let epoch = snapshot(&volume, disk());
    scene.faults.set(|name, operation| match (name, operation) {
        ("origin", "read") => Err(broken()),
        _ => Ok(()),
    });
    put(&volume, 7, 0xFA);
    volume.flush().expect("P1: the write goes on");
    scene.faults.clear();
    put(&volume, 9, 0xFA);
    volume.flush().expect("flush");
    let check = |volume: &Arc<Volume>| {
        let told = volume.epochs().expect("listed").remove(0);
        assert_eq!(told.lost, ExtentSet::from_extent(Extent::single(7)));
        assert_eq!(told.lost_at_source, told.lost);
        let error = get_old(volume, epoch, 7).expect_err("lost");
        assert!(error.to_string().contains("lost at its source"), "{error}");
        assert_eq!(get_old(volume, epoch, 9).expect("kept"), original(9));
        assert_eq!(get(volume, 7), 0xFA);
    };
    check(&volume);
    volume.close().expect("close");
    drop(volume);
    check(&scene.open());
}

/// A device fails a long read for a sector that fails, or for none: each is tried for itself.
#[test]
fn a_block_that_can_be_read_by_sectors_is_kept() {
    let scene = scene();
    let volume = scene.open();
    let epoch = snapshot(&volume, disk());
    let reads = Mutex::new(0);
    scene.faults.set(move |name, operation| {
        let mut reads = reads.lock();
        *reads += u32::from((name, operation) == ("origin", "read"));
        if (name, operation) == ("origin", "read") && *reads <= 3 { Err(broken()) } else { Ok(()) }
    });
    put(&volume, 7, 0xFA);
    volume.flush().expect("flush");
    scene.faults.clear();
    assert!(volume.epochs().expect("listed")[0].lost.is_empty());
    assert_eq!(get_old(&volume, epoch, 7).expect("kept"), original(7));
}

/// Room was looked for behind the last block of a write, also where the disk ends.
#[test]
fn a_first_change_of_the_last_block_of_a_full_region_is_taken() {
    let scene = Scene::new(BLOCK);
    let disk = std::fs::File::options().write(true).open(scene.dir.path().join("disk.img"));
    let blocks = 2 * crate::bitmap::REGION_BLOCKS;
    disk.expect("origin").set_len(blocks * 4096).expect("sparse");
    let volume = scene.open();
    volume.resize().expect("resize");
    let epoch = snapshot(&volume, ExtentSet::from_extent(Extent::new(0, blocks)));
    put(&volume, blocks - 1, 0xFA);
    volume.flush().expect("flush");
    assert_eq!(get_old(&volume, epoch, blocks - 1).expect("kept"), 0);
}

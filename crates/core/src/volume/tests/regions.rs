//! Regions: what is recorded once, what goes straight then, and what is known of it afterwards.

use super::*;
use crate::volume::{Moment, OnFull, Quiet, StorePolicy};

const REGION: u64 = 256;

fn set(blocks: &[u64]) -> ExtentSet {
    ExtentSet::from_unsorted(blocks.iter().map(|&b| Extent::single(b)).collect())
}

/// A volume of which only a bookmark is left.
fn bookmarked(scene: &Scene) -> (Arc<Volume>, u32) {
    let volume = scene.open();
    let epoch = snapshot(&volume, everything());
    volume.bookmark(epoch, Vec::new()).expect("bookmark");
    volume.delete_snapshot(epoch, false).expect("deletion");
    (volume, epoch)
}

fn changed(volume: &Volume, epoch: u32) -> ExtentSet {
    volume.changed(epoch, None).expect("changed set")
}

fn count(volume: &Volume, name: &str) -> u64 {
    let found = volume.counters.list().into_iter().find(|(known, _)| *known == name);
    found.expect("a counter").1
}

#[test]
fn one_record_opens_a_region_and_the_next_writes_go_straight() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let (volume, epoch) = bookmarked(&scene);
    put(&volume, 3, 0xA0);
    volume.flush().expect("flush");
    let batches = count(&volume, "batches");
    for block in [4, 5, 200, 3, 4] {
        put(&volume, block, 0xA1);
        assert_eq!(scene.on_disk(block), 0xA1, "straight");
    }
    assert_eq!(count(&volume, "straight_writes"), 5);
    assert_eq!(count(&volume, "buffered_writes"), 1);
    assert_eq!(count(&volume, "region_records"), 1);
    assert_eq!(count(&volume, "batches"), batches, "none of them was recorded");
    put(&volume, 300, 0xA2);
    assert_eq!(scene.on_disk(300), 51, "another region has a record of its own first");
    let expected = set(&[3, 4, 5, 200, 300]);
    assert_eq!(changed(&volume, epoch), expected);
    volume.close().expect("close");
    drop(volume);
    let volume = scene.open();
    assert_eq!(changed(&volume, epoch), expected, "exact after a clean stop");
    let next = snapshot(&volume, set(&[1]));
    put(&volume, 4, 0xA3);
    assert_eq!(volume.changed(epoch, Some(next)).expect("changed set"), expected);
    assert_eq!(changed(&volume, next), ExtentSet::new(), "it does not track that");
    volume.close().expect("close");
}

#[test]
fn what_changed_in_a_region_before_an_instant_is_told_apart_from_what_did_after() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let (volume, epoch) = bookmarked(&scene);
    for block in [3, 4] {
        put(&volume, block, 0xA0);
        volume.flush().expect("flush");
    }
    let next = snapshot(&volume, everything());
    volume.bookmark(next, Vec::new()).expect("bookmark");
    volume.delete_snapshot(next, false).expect("deletion");
    for block in [4, 6, 7] {
        put(&volume, block, 0xA1);
        volume.flush().expect("flush");
    }
    assert_eq!(volume.changed(epoch, Some(next)).expect("changed set"), set(&[3, 4]));
    assert_eq!(changed(&volume, next), set(&[4, 6, 7]));
    assert_eq!(changed(&volume, epoch), set(&[3, 4, 6, 7]));
    volume.abandon();
}

#[test]
fn after_a_kill_what_changed_is_exact() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let (volume, epoch) = bookmarked(&scene);
    put(&volume, 3, 0xA0);
    volume.flush().expect("flush");
    put(&volume, 63, 0xA1);
    volume.write_zeroes(64 * 4096, 2 * 4096, false, false).expect("zeroes");
    volume.trim(255 * 4096, 4096, false).expect("trim");
    put(&volume, 400, 0xA2); // still in its slot
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    let expected = set(&[3, 63, 64, 65, 255, 400]);
    assert_eq!(changed(&volume, epoch), expected);
    assert_eq!(get(&volume, 400), 0xA2);
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    assert_eq!(changed(&volume, epoch), expected, "it was recorded by the first opening");
    volume.close().expect("close");
}

/// Open what was abandoned as after a power cut: what was in memory is gone.
fn open_without_bits(scene: &Scene) -> Arc<Volume> {
    let buffers = std::fs::read_dir(scene.dir.path()).expect("list").flatten();
    let buffer = buffers.map(|f| f.path()).find(|p| p.extension().is_some_and(|e| e == "buffer"));
    std::fs::remove_file(buffer.expect("left behind")).expect("as a power cut does");
    let volume = scene.open_as(OpenRequest { recover: Recover::Discard, ..scene.request() });
    volume.expect("open")
}

#[test]
fn where_the_bits_are_gone_the_open_regions_count_whole_and_no_other() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let (volume, epoch) = bookmarked(&scene);
    put(&volume, 300, 0xA0);
    volume.flush().expect("flush");
    volume.maintain(crate::volume::Effort::All).expect("upkeep");
    put(&volume, 3, 0xA0);
    volume.flush().expect("flush");
    volume.abandon();
    drop(volume);
    let volume = open_without_bits(&scene);
    let expected = ExtentSet::from_extent(Extent::new(0, REGION)).union(&set(&[300]));
    assert_eq!(changed(&volume, epoch), expected);
    volume.close().expect("close");
}

/// A region is in use while blocks of it are written for the first time.
#[test]
fn a_region_that_rests_is_closed_and_one_in_use_is_not() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let (volume, epoch) = bookmarked(&scene);
    let rest = || {
        let mut committer = volume.role().expect("open");
        let long_ago = crate::sync::Clock::now().checked_sub(crate::volume::regions::REST);
        committer.regions_looked = long_ago.expect("the machine runs for longer");
        volume.rest_regions(&mut committer).expect("closing");
    };
    for block in [3, 300] {
        put(&volume, block, 0xA0);
        volume.flush().expect("flush");
    }
    rest();
    assert_eq!(count(&volume, "region_records"), 2);
    put(&volume, 5, 0xA0);
    rest();
    put(&volume, 301, 0xA0);
    assert_eq!(scene.on_disk(301), 52, "its region has to be opened anew");
    volume.abandon();
    drop(volume);
    let volume = open_without_bits(&scene);
    let expected = ExtentSet::from_extent(Extent::new(0, REGION)).union(&set(&[300]));
    assert_eq!(changed(&volume, epoch), expected);
    volume.close().expect("close");
}

/// What a power cut left open could not be closed, since the store failed.
fn volume_with_a_region_left_open(scene: &Scene) -> Arc<Volume> {
    let request = || OpenRequest { cache: Cache::WriteThrough, ..scene.request() };
    let (volume, _) = bookmarked(scene);
    volume.close().expect("close");
    drop(volume);
    let volume = scene.open_as(request()).expect("open");
    put(&volume, 3, 0xA0);
    put(&volume, 4, 0xA0);
    volume.abandon();
    drop(volume);
    scene.faults.set(|name, operation| match (name, operation) {
        ("segment", "allocate") => Err(broken()),
        _ => Ok(()),
    });
    let volume = scene.open();
    scene.faults.clear();
    volume
}

/// What was not closed, then a kill, and bits that knew only of the time between.
#[test]
fn bits_do_not_stand_for_writes_of_an_earlier_process() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let volume = volume_with_a_region_left_open(&scene);
    let epoch = volume.epochs().expect("listed")[0].epoch;
    let whole = ExtentSet::from_extent(Extent::new(0, REGION));
    assert_eq!(changed(&volume, epoch), whole, "it opens, and misses nothing");
    put(&volume, 3, 0xA1);
    put(&volume, 300, 0xA1);
    volume.flush().expect("flush");
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    let expected = whole.union(&set(&[300]));
    assert_eq!(changed(&volume, epoch), expected);
    volume.close().expect("close");
}

/// The same in an epoch that is closed, filed and merged then: nobody tells less of it.
#[test]
fn a_region_that_could_not_be_closed_counts_whole_for_ever() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let volume = volume_with_a_region_left_open(&scene);
    let epoch = volume.epochs().expect("listed")[0].epoch;
    let expected = ExtentSet::from_extent(Extent::new(0, REGION)).union(&set(&[300]));
    put(&volume, 300, 0xA1);
    let scrap = snapshot(&volume, everything());
    volume.delete_snapshot(scrap, false).expect("deletion");
    let next = snapshot(&volume, everything());
    put(&volume, 400, 0xA1);
    volume.flush().expect("flush");
    let check = |volume: &Arc<Volume>, when: &str| {
        let found = volume.changed(epoch, Some(next)).expect("changed set");
        assert_eq!(found, expected, "{when}");
        assert_eq!(changed(volume, next), set(&[400]), "{when}");
    };
    check(&volume, "from the log's index in memory");
    volume.close().expect("close");
    drop(volume);
    let volume = scene.open();
    check(&volume, "from the records in the log");
    volume.maintain(crate::volume::Effort::All).expect("upkeep");
    check(&volume, "merged and filed");
    volume.close().expect("close");
    drop(volume);
    let volume = scene.open();
    check(&volume, "from the merged segment's index file");
    volume.close().expect("close");
}

#[test]
fn narrowed_blocks_are_covered_and_those_still_needed_are_preserved() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let volume = scene.open();
    let epoch = snapshot(&volume, everything());
    volume.bookmark(epoch, Vec::new()).expect("bookmark");
    put(&volume, 100, 0xA0);
    volume.flush().expect("flush");
    volume.narrow(epoch, &ExtentSet::from_extent(Extent::new(0, 50))).expect("narrow");
    put(&volume, 101, 0xA1);
    volume.flush().expect("flush");
    for block in [60, 102, 49, 0] {
        put(&volume, block, 0xA2);
    }
    assert_eq!((scene.on_disk(60), scene.on_disk(102)), (0xA2, 0xA2), "covered");
    assert_eq!((scene.on_disk(49), scene.on_disk(0)), (50, 1), "to be preserved first");
    assert_eq!(changed(&volume, epoch), set(&[0, 49, 60, 100, 101, 102]));
    assert_eq!(get_old(&volume, epoch, 49).expect("preserved"), 50);
    assert_eq!(get_old(&volume, epoch, 0).expect("preserved"), 1);
    volume.close().expect("close");
}

#[test]
fn an_instant_that_fails_forgets_nothing_that_was_written_in_regions() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let (volume, epoch) = bookmarked(&scene);
    put(&volume, 3, 0xA0);
    volume.flush().expect("flush");
    put(&volume, 4, 0xA0);
    scene.faults.set(|name, operation| match (name, operation) {
        ("segment" | "journal", "sync") => Err(broken()),
        _ => Ok(()),
    });
    assert!(volume.snapshot(snapshot_request(everything())).is_err());
    scene.faults.clear();
    assert_eq!(changed(&volume, epoch), set(&[3, 4]));
    put(&volume, 5, 0xA0);
    volume.flush().expect("flush");
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    assert_eq!(changed(&volume, epoch), set(&[3, 4, 5]));
    volume.close().expect("close");
}

/// A decision made the bitmaps anew from the index, which knows nothing of open regions: what was
/// written there took a slot again, with sectors read before another write that was on its way
/// straight to them. What is settled stays so now.
#[test]
fn a_decision_undoes_no_write_that_is_on_its_way_in_an_open_region() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let (volume, first) = bookmarked(&scene);
    let second = snapshot(&volume, everything());
    volume.bookmark(second, Vec::new()).expect("bookmark");
    volume.delete_snapshot(second, false).expect("deletion");
    put(&volume, 3, 0xA0);
    volume.flush().expect("flush");
    let inner = Arc::clone(&volume);
    scene.faults.once("origin", "write", move || {
        inner.delete_bookmark(first).expect("deletion");
        inner.write(4 * 4096 + 100, &[0xBB; 100], false).expect("the rest of the sector");
    });
    volume.write(4 * 4096, &[0xAA; 100], false).expect("a part of a sector");
    volume.flush().expect("flush");
    let mut got = [0; 300];
    volume.read(4 * 4096, &mut got).expect("read");
    assert_eq!((got[0], got[99], got[100], got[199]), (0xAA, 0xAA, 0xBB, 0xBB));
    put(&volume, 7, 0xA1);
    assert_eq!(scene.on_disk(7), 0xA1, "the region is open as before");
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    assert_eq!(changed(&volume, second), set(&[3, 4, 7]), "exact after a kill");
    volume.close().expect("close");
}

fn lost(volume: &Volume, epoch: u32) -> ExtentSet {
    let listed = volume.epochs().expect("listed");
    listed.into_iter().find(|found| found.epoch == epoch).expect("a snapshot").lost
}

/// A bookmark of everything with region 0 open, in which 3 and 4 were written, and a snapshot that
/// needs others.
fn bookmarked_beside_a_snapshot(scene: &Scene) -> (Arc<Volume>, u32, u32) {
    let (volume, first) = bookmarked(scene);
    let second = snapshot(&volume, ExtentSet::from_extent(Extent::new(300, 512)));
    put(&volume, 3, 0xA0);
    volume.flush().expect("flush");
    put(&volume, 4, 0xA0);
    assert_eq!(scene.on_disk(4), 0xA0, "straight");
    (volume, first, second)
}

/// Fail so many writes to the log; tells how many are still to fail.
fn fail_log_writes(scene: &Scene, count: u64) -> Arc<AtomicU64> {
    let left = Arc::new(AtomicU64::new(count));
    let to_fail = Arc::clone(&left);
    scene.faults.set(move |name, operation| {
        let is_one = (name, operation) == ("segment", "write");
        let take = |left: u64| left.checked_sub(1);
        if is_one && to_fail.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
            return Err(broken());
        }
        Ok(())
    });
    left
}

/// What an earlier process left could not be recorded in the log; its second place, the journal,
/// had no reserve yet and knew only one mark that covers everything: the snapshot was gone, though
/// nothing that it needs had changed.
#[test]
fn regions_left_open_cost_no_snapshot_anything_where_the_log_cannot_grow() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let (volume, first, second) = bookmarked_beside_a_snapshot(&scene);
    volume.abandon();
    drop(volume);
    scene.faults.set(|name, operation| match (name, operation) {
        ("segment", "allocate") => Err(io::ErrorKind::StorageFull.into()),
        _ => Ok(()),
    });
    let volume = scene.open();
    scene.faults.clear();
    assert_eq!(lost(&volume, second), ExtentSet::new());
    assert_eq!(get_old(&volume, second, 400).expect("whole"), 151);
    let whole = ExtentSet::from_extent(Extent::new(0, REGION));
    assert_eq!(changed(&volume, first), whole, "more than changed, and nothing less");
    volume.close().expect("close");
    drop(volume);
    let volume = scene.open();
    assert_eq!(lost(&volume, second), ExtentSet::new());
    assert_eq!(changed(&volume, first), whole);
    volume.close().expect("close");
}

#[test]
fn a_log_that_fails_as_an_instant_closes_regions_costs_no_snapshot_anything() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let (volume, first, second) = bookmarked_beside_a_snapshot(&scene);
    let left = fail_log_writes(&scene, 1);
    let third = snapshot(&volume, everything());
    assert_eq!(left.load(Ordering::Relaxed), 0, "it failed");
    scene.faults.clear();
    let exact = volume.changed(first, Some(third)).expect("changed set");
    assert_eq!(exact, set(&[3, 4]));
    assert_eq!(lost(&volume, second), ExtentSet::new());
    assert_eq!(get_old(&volume, second, 400).expect("whole"), 151);
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    let told = volume.changed(first, Some(third)).expect("changed set");
    assert_eq!(told, ExtentSet::from_extent(Extent::new(0, REGION)), "the log knows no more");
    assert_eq!(lost(&volume, second), ExtentSet::new());
    volume.close().expect("close");
}

#[test]
fn a_log_that_fails_as_regions_are_closed_costs_nothing_and_they_go_on() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let (volume, first, second) = bookmarked_beside_a_snapshot(&scene);
    let left = fail_log_writes(&scene, 1);
    assert!(volume.maintain(crate::volume::Effort::All).is_err());
    assert_eq!(left.load(Ordering::Relaxed), 0, "it failed");
    scene.faults.clear();
    assert_eq!(changed(&volume, first), set(&[3, 4]));
    assert_eq!(lost(&volume, second), ExtentSet::new());
    put(&volume, 5, 0xA0);
    assert_eq!(scene.on_disk(5), 6, "it is in doubt whether the region is open: not straight");
    volume.flush().expect("flush");
    put(&volume, 6, 0xA0);
    assert_eq!(scene.on_disk(6), 0xA0, "straight: it was opened once more");
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    assert_eq!(changed(&volume, first), set(&[3, 4, 5, 6]));
    assert_eq!(lost(&volume, second), ExtentSet::new());
    volume.close().expect("close");
}

#[test]
fn more_runs_than_a_batch_tells_are_closed_exactly() {
    const MANY: u64 = 16 * REGION;
    let scene = Scene::new(crate::number::to_usize(MANY * 4096));
    let volume = scene.open();
    let first = snapshot(&volume, ExtentSet::from_extent(Extent::new(0, MANY)));
    volume.bookmark(first, Vec::new()).expect("bookmark");
    volume.delete_snapshot(first, false).expect("deletion");
    for block in (0..MANY).step_by(2) {
        put(&volume, block, 0xA0);
        if block % REGION == 0 {
            volume.flush().expect("flush");
        }
    }
    let expected = set(&(0..MANY).step_by(2).collect::<Vec<_>>());
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    assert_eq!(changed(&volume, first), expected, "settled after a kill");
    let second = snapshot(&volume, ExtentSet::from_extent(Extent::new(0, MANY)));
    volume.bookmark(second, Vec::new()).expect("bookmark");
    volume.delete_snapshot(second, false).expect("deletion");
    for block in (1..MANY).step_by(2) {
        put(&volume, block, 0xA1);
        if block % REGION == 1 {
            volume.flush().expect("flush");
        }
    }
    let third = snapshot(&volume, set(&[1]));
    let expected = set(&(1..MANY).step_by(2).collect::<Vec<_>>());
    assert_eq!(volume.changed(second, Some(third)).expect("changed set"), expected);
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    assert_eq!(volume.changed(second, Some(third)).expect("changed set"), expected);
    volume.close().expect("close");
}

#[test]
fn a_stop_on_a_full_store_with_many_regions_costs_no_snapshot_anything() {
    const HALF: u64 = 32 * REGION;
    let scene = Scene::new(crate::number::to_usize(2 * HALF * 4096));
    let volume = scene.open();
    let policy = StorePolicy { on_full: OnFull::Fail, ..StorePolicy::default() };
    volume.set_store_policy(policy).expect("policy");
    let first = snapshot(&volume, ExtentSet::from_extent(Extent::new(0, HALF)));
    volume.bookmark(first, Vec::new()).expect("bookmark");
    volume.delete_snapshot(first, false).expect("deletion");
    let second = snapshot(&volume, ExtentSet::from_extent(Extent::new(HALF, 2 * HALF)));
    for block in (0..HALF).step_by(2) {
        put(&volume, block, 0xA0);
        if block % REGION == 0 {
            volume.flush().expect("flush");
        }
    }
    scene.faults.set(|name, operation| match (name, operation) {
        ("segment" | "journal", "allocate") | ("directory", "create") => {
            Err(io::ErrorKind::StorageFull.into())
        }
        _ => Ok(()),
    });
    let mut refused = false;
    for block in HALF..2 * HALF {
        refused = volume.write(block * 4096, &[9; BLOCK], false).is_err();
        if refused {
            break;
        }
    }
    assert!(refused, "the store is full");
    volume.close().expect("close");
    drop(volume);
    scene.faults.clear();
    let volume = scene.open();
    assert_eq!(lost(&volume, second), ExtentSet::new());
    let found = changed(&volume, first);
    assert!((0..HALF).step_by(2).all(|block| found.contains(block)), "P5: whatever it cost");
    volume.close().expect("close");
}

/// An instant for which only writers of selected blocks waited, and which failed: the bitmaps were
/// made anew as above, while others were on their way.
#[test]
fn an_instant_that_fails_undoes_no_write_that_did_not_wait_for_it() {
    let scene = Scene::new(crate::number::to_usize(BLOCKS * 4096));
    let (volume, first) = bookmarked(&scene);
    put(&volume, 3, 0xA0);
    volume.flush().expect("flush");
    let (inner, faults) = (Arc::clone(&volume), scene.faults.clone());
    scene.faults.once("origin", "write", move || {
        faults.set(|name, operation| match (name, operation) {
            ("segment" | "journal", "sync") => Err(broken()),
            _ => Ok(()),
        });
        let selection = ExtentSet::from_extent(Extent::new(300, 310));
        let moment = Moment { holds: Quiet::Selected, ..Moment::default() };
        assert!(inner.snapshot_at(snapshot_request(selection), moment).is_err());
        faults.clear();
        inner.write(4 * 4096 + 100, &[0xBB; 100], false).expect("the rest of the sector");
    });
    volume.write(4 * 4096, &[0xAA; 100], false).expect("a part of a sector");
    volume.flush().expect("flush");
    let mut got = [0; 300];
    volume.read(4 * 4096, &mut got).expect("read");
    assert_eq!((got[0], got[99], got[100], got[199]), (0xAA, 0xAA, 0xBB, 0xBB), "P1");
    volume.abandon();
    drop(volume);
    let volume = scene.open();
    assert_eq!(changed(&volume, first), set(&[3, 4]), "P5");
    volume.close().expect("close");
}

//! Growth of the disk under writes to its odd end.

use super::*;

const ODD_BLOCK: u64 = 511;
const ODD_BYTES: u64 = 700;
const OLD_SIZE: u64 = ODD_BLOCK * 4096 + ODD_BYTES;

fn odd_scene() -> Scene {
    Scene::new(crate::number::to_usize(OLD_SIZE))
}

/// The disk grows, and what it gets is not zero.
fn grow(scene: &Path) {
    use std::os::unix::fs::FileExt;
    let disk = std::fs::File::options().write(true).open(scene.join("disk.img")).expect("origin");
    let more = 513 * 4096 - OLD_SIZE;
    disk.write_all_at(&vec![0xBB; crate::number::to_usize(more)], OLD_SIZE).expect("growth");
}

fn is_grown_part_whole(scene: &Scene) -> bool {
    let disk = std::fs::read(scene.dir.path().join("disk.img")).expect("origin");
    disk[crate::number::to_usize(OLD_SIZE)..].iter().all(|&byte| byte == 0xBB)
}

/// The size was recorded before the slot of the odd last block was brought home: a kill in between,
/// and the replay put the zeros that fill up that slot's sector over what the disk had got.
#[test]
fn a_kill_while_the_disk_grows_does_not_zero_what_it_got() {
    let scene = odd_scene();
    let volume = scene.open();
    snapshot(&volume, everything());
    volume.write(ODD_BLOCK * 4096, &[0xA1; 700], false).expect("write");
    grow(scene.dir.path());
    scene.faults.set(|name, operation| match (name, operation) {
        ("origin", "write") => Err(broken()),
        _ => Ok(()),
    });
    assert!(volume.resize().is_err(), "it got no further");
    scene.faults.clear();
    volume.abandon();
    drop(volume);
    // The growth is newer than the last sign of life.
    let volume = scene.open_as(OpenRequest { recover: Recover::Replay, ..scene.request() });
    let volume = volume.expect("open");
    assert!(is_grown_part_whole(&scene), "P1");
    assert_eq!(get(&volume, 3), 4);
    volume.resize().expect("resize");
    volume.close().expect("close");
    assert!(is_grown_part_whole(&scene), "P1");
}

/// The range was rounded by the size the disk had, and zeroed by the size it had then.
#[test]
fn zeroing_the_odd_end_of_a_disk_that_grows_meanwhile_stays_within_its_range() {
    let scene = odd_scene();
    let volume = scene.open();
    let (other, path) = (Arc::clone(&volume), scene.dir.path().to_path_buf());
    scene.faults.once("origin", "write", move || {
        grow(&path);
        other.resize().expect("resize");
    });
    let from = ODD_BLOCK * 4096 - 512;
    volume.write_zeroes(from, OLD_SIZE - from, true, true).expect("zero");
    assert!(is_grown_part_whole(&scene), "P1");
    assert_eq!(volume.size_bytes(), 513 * 4096);
}

#[test]
fn a_discard_of_the_odd_end_of_a_disk_that_grows_meanwhile_stays_within_its_range() {
    let scene = odd_scene();
    let volume = scene.open();
    // Two runs: before and behind what a snapshot needs.
    snapshot(&volume, ExtentSet::from_extent(Extent::new(505, 508)));
    let (other, path) = (Arc::clone(&volume), scene.dir.path().to_path_buf());
    scene.faults.once("origin", "discard", move || {
        grow(&path);
        other.resize().expect("resize");
    });
    volume.trim(500 * 4096, OLD_SIZE - 500 * 4096, true).expect("trim");
    assert!(is_grown_part_whole(&scene), "P1");
    assert_eq!(volume.size_bytes(), 513 * 4096);
}

/// Nothing but the length tells that a device grew; its snapshots were in doubt for that.
#[test]
fn growth_while_stopped_alone_does_not_put_snapshots_in_doubt() {
    let scene = odd_scene();
    let volume = scene.open();
    let epoch = snapshot(&volume, everything());
    put(&volume, 3, 0xA1);
    volume.close().expect("close");
    drop(volume);
    let path = scene.dir.path().join("disk.img");
    let then = std::fs::metadata(&path).expect("origin").modified().expect("time");
    grow(scene.dir.path());
    let disk = std::fs::File::options().write(true).open(&path).expect("origin");
    disk.set_modified(then).expect("as a device, which has no time of change");
    let volume = scene.open();
    assert_eq!(volume.epochs().expect("listed")[0].state.suspect, "");
    volume.resize().expect("resize");
    assert_eq!(get_old(&volume, epoch, 3).expect("kept"), 4);
    assert_eq!(volume.epochs().expect("listed")[0].state.origin_bytes, OLD_SIZE);
    drop(disk);
    volume.close().expect("close");
    drop(volume);
    std::fs::write(&path, vec![1; 514 * BLOCK]).expect("written by others");
    assert!(
        !scene.open().epochs().expect("listed")[0].state.suspect.is_empty(),
        "P2: who knows what else"
    );
}

//! What a snapshot lets go of after its instant is gone from the store and from the write buffer.

use super::*;
use crate::codec::{Reader, Writer};
use crate::journal::Settled;

/// Blocks that the snapshot lets go of.
const EXCLUDED: Extent = Extent { start: 100, end: 200 };
const MARKER: u8 = 0xEC;

fn included() -> ExtentSet {
    everything().difference(&ExtentSet::from_extent(EXCLUDED))
}

fn settled() -> Settled {
    Settled { meta: b"final".to_vec(), low: ExtentSet::from_extent(Extent::new(150, 250)) }
}

/// Files of the store and the write buffer that hold a sector full of a byte.
fn holders(scene: &Scene, byte: u8) -> Vec<String> {
    fn look(at: &Path, byte: u8, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(at).expect("listed") {
            let path = entry.expect("listed").path();
            if path.is_dir() {
                look(&path, byte, found);
            } else if path.file_name().is_none_or(|name| name != "disk.img") {
                let content = std::fs::read(&path).expect("readable");
                if content.chunks(512).any(|sector| sector == [byte; 512]) {
                    found.push(path.display().to_string());
                }
            }
        }
    }
    let mut found = Vec::new();
    look(scene.dir.path(), byte, &mut found);
    found
}

/// Content of excluded blocks came into the store in three ways: preserved; as a slot that was
/// committed; as what a slot held before it was taken again, beside the sectors of its newer use.
#[test]
fn what_was_written_to_excluded_blocks_is_nowhere_after_narrowing() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    for block in EXCLUDED.start..EXCLUDED.end {
        put(&volume, block, MARKER);
    }
    let epoch = snapshot(&volume, everything());
    for block in EXCLUDED.start..EXCLUDED.end {
        put(&volume, block, MARKER);
    }
    volume.flush().expect("flush");
    put(&volume, 150, MARKER);
    put(&volume, 7, 0xA1);
    // Takes slots that held excluded content, with one sector each.
    for block in 20..60 {
        volume.write(block * 4096, &[0xA2; 512], false).expect("write");
    }
    assert_eq!(holders(&scene, MARKER).len(), 2, "preserved in the log, and in the buffer");
    volume.narrow_with(epoch, &included(), Some(settled())).expect("narrow");
    assert_eq!(holders(&scene, MARKER), Vec::<String>::new());
    for block in EXCLUDED.start..EXCLUDED.end {
        put(&volume, block, MARKER);
    }
    assert_eq!(holders(&scene, MARKER), Vec::<String>::new(), "P4: excluded blocks go straight");
    assert_eq!(get_old(&volume, epoch, 7).expect("view"), 8, "P2: what stays selected is there");
    assert_eq!(get_old(&volume, epoch, 150).expect("view"), 0);
    assert_eq!(get(&volume, 150), MARKER);
    volume.close().expect("close");
}

/// A block that had a slot when it was let go of goes on having slots for as long as it is
/// rewritten before they are dropped.
#[test]
fn slots_of_a_block_that_was_let_go_of_are_wiped_when_they_are_dropped() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    snapshot(&volume, everything());
    put(&volume, 150, MARKER);
    volume.state.lock().buffer.wipe_when_dropped();
    put(&volume, 150, MARKER);
    assert_eq!(holders(&scene, MARKER).len(), 1, "in the buffer, where it waits");
    volume.flush().expect("flush");
    assert_eq!(holders(&scene, MARKER), Vec::<String>::new());
    volume.close().expect("close");
}

/// All that a power cut leaves at the next sync of a log segment, in a directory of its own.
fn leave_at_next_sync(scene: &Scene) -> tempfile::TempDir {
    let left = tempfile::tempdir().expect("temporary directory");
    let (from, to) = (scene.dir.path().to_path_buf(), left.path().to_path_buf());
    scene.faults.once("segment", "sync", move || {
        std::fs::create_dir_all(to.join("store/log")).expect("made");
        for name in ["disk.img", "store/journal", "store/log/00000001.seg"] {
            std::fs::copy(from.join(name), to.join(name)).expect("copied");
        }
    });
    left
}

/// A batch whose sync had not returned lost its head and its tail to a power cut, but not its
/// payload. The log went on over it, and what it did not write over stayed in no index: a later
/// narrowing did not know of it. The end of the log is cut off at opening now.
#[test]
fn what_a_torn_batch_held_is_nowhere_once_the_volume_is_opened() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    for block in EXCLUDED.start..EXCLUDED.end {
        put(&volume, block, MARKER);
    }
    let epoch = snapshot(&volume, everything());
    put(&volume, 7, 0xA1);
    volume.flush().expect("flush");
    let left = leave_at_next_sync(&scene);
    for block in EXCLUDED.start..EXCLUDED.end {
        put(&volume, block, 0xA2);
    }
    volume.flush().expect("flush");
    volume.abandon();
    drop(volume);
    for name in ["disk.img", "store/journal", "store/log/00000001.seg"] {
        let mut content = std::fs::read(left.path().join(name)).expect("left");
        let magics = [*b"SBBH", *b"SBBT"];
        let is_of_batch = |page: &&mut [u8]| magics.iter().any(|magic| page.starts_with(magic));
        // The last batch's, in the segment.
        let mut pages: Vec<&mut [u8]> =
            content.chunks_mut(BLOCK).filter(|page| is_of_batch(page)).collect();
        pages.iter_mut().rev().take(2).for_each(|page| page.fill(0));
        std::fs::write(scene.dir.path().join(name), content).expect("put back");
    }
    for entry in std::fs::read_dir(scene.dir.path()).expect("listed").flatten() {
        if entry.path().extension().is_some_and(|name| name == "buffer") {
            std::fs::remove_file(entry.path()).expect("as a power cut does");
        }
    }
    assert_eq!(holders(&scene, MARKER).len(), 1, "the segment, behind its end");
    let request = OpenRequest { recover: Recover::Discard, ..scene.request() };
    let volume = scene.open_as(request).expect("open");
    assert_eq!(holders(&scene, MARKER), Vec::<String>::new());
    assert_eq!(get_old(&volume, epoch, 7).expect("view"), 8, "P2: what was synced is there");
    assert_eq!(get_old(&volume, epoch, 150).expect("view"), MARKER, "P2: it never changed");
    volume.narrow_with(epoch, &included(), Some(settled())).expect("narrow");
    put(&volume, 50, 0xA3);
    volume.flush().expect("flush");
    assert_eq!(holders(&scene, MARKER), Vec::<String>::new());
    volume.close().expect("close");
}

/// Selection and opaque bytes are one decision: they are never of different times.
#[test]
fn narrowing_and_its_record_are_one_decision_across_openings() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let epoch = snapshot(&volume, everything());
    scene.faults.set(|name, operation| match (name, operation) {
        ("journal", "sync") => Err(broken()),
        _ => Ok(()),
    });
    assert!(volume.narrow_with(epoch, &included(), Some(settled())).is_err());
    scene.faults.clear();
    let told = &volume.epochs().expect("epochs")[0];
    assert_eq!((told.selected_blocks, told.state.meta.len()), (BLOCKS, 0), "P10: nothing of it");
    volume.narrow_with(epoch, &included(), Some(settled())).expect("narrow");
    volume.close().expect("close");
    let volume = scene.open();
    let told = &volume.epochs().expect("epochs")[0];
    assert_eq!(told.state.meta, b"final");
    assert_eq!(*told.state.low, ExtentSet::from_extent(Extent::new(200, 250)), "of what is left");
    assert_eq!(told.selected_blocks, BLOCKS - EXCLUDED.len());
    volume.close().expect("close");
}

#[test]
fn packed_extents_are_read_back_and_damage_is_noticed() {
    let set: ExtentSet = [(0, 1), (5, 300), (1 << 40, (1 << 40) + 7)]
        .map(|(s, e)| Extent::new(s, e))
        .into_iter()
        .collect();
    let mut out = Writer::default();
    out.packed_extents(&set);
    assert_eq!(Reader::new(&out.0).packed_extents().expect("intact"), set);
    for length in 0..out.0.len() {
        assert!(Reader::new(&out.0[..length]).packed_extents().is_err(), "cut at {length}");
    }
    for forged in [[0, 0], [0x80, 0x80]] {
        let bytes = [1, 0, 0, 0, 0, 0, 0, 0, forged[0], forged[1]];
        assert!(Reader::new(&bytes).packed_extents().is_err());
    }
    let mut huge = Writer::default();
    huge.u64(1).varint(u64::MAX).varint(u64::MAX);
    assert!(Reader::new(&huge.0).packed_extents().is_err(), "past the largest number");
}

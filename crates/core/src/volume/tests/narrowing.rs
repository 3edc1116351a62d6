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
    let told = &volume.epochs()[0];
    assert_eq!((told.selected_blocks, told.state.meta.len()), (BLOCKS, 0), "P10: nothing of it");
    volume.narrow_with(epoch, &included(), Some(settled())).expect("narrow");
    volume.close().expect("close");
    let volume = scene.open();
    let told = &volume.epochs()[0];
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

//! Writers of one clone beside one another.

use super::*;
use crate::view::ExcludedReads;

/// A write that made one block the clone's own brought the rest of its last block along, as it had
/// read it: what was written there meanwhile, and acknowledged, was undone.
#[test]
fn a_write_into_a_new_block_undoes_nothing_beside_it_in_one_that_is_the_clones_own() {
    const HALF: u64 = 2048;
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let epoch = snapshot(&volume, everything());
    let number = volume.create_clone(epoch, b"").expect("a clone");
    let clone = volume.open_clone(number, ExcludedReads::Zeros).expect("opened");
    for (own, at, beside) in [(4, 3 * 4096 + HALF, 4 * 4096 + HALF), (6, 6 * 4096 + HALF, 6 * 4096)]
    {
        clone.write(own * 4096, &[1; BLOCK], false).expect("its own");
        let other = Arc::clone(&clone);
        scene.faults.once("segment", "write", move || {
            other.write(beside, &[2; 2048], false).expect("beside");
        });
        clone.write(at, &[3; BLOCK], false).expect("into a new block");
        let mut found = [0; 2048];
        clone.read(beside, &mut found).expect("readable");
        assert_eq!(found, [2; 2048], "P6: acknowledged");
        clone.read(at, &mut found).expect("readable");
        assert_eq!(found, [3; 2048]);
        clone.read(at + HALF, &mut found).expect("readable");
        assert_eq!(found, [3; 2048]);
    }
    drop(clone);
    volume.close().expect("close");
}

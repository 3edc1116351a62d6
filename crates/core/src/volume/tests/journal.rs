//! The journal written anew: what fails on the way, what is decided meanwhile, and what is left over.

use super::*;
use crate::journal::Settled;
use crate::volume::inspect::inspect;
use crate::volume::open::peek;
use crate::volume::{Effort, OnFull};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

fn journal(scene: &Scene) -> PathBuf {
    scene.dir.path().join("store/journal")
}

fn new_journal(scene: &Scene) -> PathBuf {
    scene.dir.path().join("store/journal.new")
}

fn content(scene: &Scene) -> Vec<u8> {
    std::fs::read(journal(scene)).expect("a journal")
}

/// Its first record says so.
fn is_compacted(scene: &Scene) -> bool {
    u32::from_le_bytes(content(scene)[16..20].try_into().expect("four bytes")) == 25
}

/// Everything that is known of all instants.
fn told(volume: &Volume) -> String {
    let epochs = volume.epochs().expect("listed");
    format!("{:?} {:?} {:?}", epochs, volume.meta(), volume.store_policy())
}

fn half() -> ExtentSet {
    ExtentSet::from_extent(Extent::new(0, BLOCKS / 2))
}

/// A volume of which much was decided: two snapshots, a bookmark, and what is gone.
fn lived() -> (Scene, Arc<Volume>, Vec<u32>) {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let taken: Vec<u32> = (0..4)
        .map(|round: u8| {
            let epoch = snapshot(&volume, everything());
            put(&volume, u64::from(round), 0xA0 + round);
            let low = ExtentSet::from_extent(Extent::new(3, 9));
            let settled = Some(Settled { meta: vec![round; 3000], low });
            volume.narrow_with(epoch, &half(), settled).expect("narrowed");
            volume.set_epoch_meta(epoch, vec![round; 2000]).expect("noted");
            volume.set_meta(vec![round; 1000]).expect("noted");
            epoch
        })
        .collect();
    volume.bookmark(taken[1], b"backup".to_vec()).expect("bookmarked");
    volume.narrow(taken[1], &ExtentSet::from_extent(Extent::new(2, 5))).expect("narrowed");
    volume.delete_snapshot(taken[0], false).expect("deleted");
    volume.delete_snapshot(taken[1], false).expect("deleted");
    volume.flush().expect("flushed");
    (scene, volume, taken)
}

/// It is opened anew, and everything is as it was.
fn check_reopened(scene: &Scene, volume: &Arc<Volume>, then: &str) -> Arc<Volume> {
    volume.close().expect("closed");
    let again = scene.open();
    assert_eq!(told(&again), then);
    again
}

#[test]
fn a_compacted_journal_is_shorter_and_everything_that_reads_one_reads_it() {
    let (scene, volume, taken) = lived();
    let (before, then) = (content(&scene).len(), told(&volume));
    volume.maintain(Effort::All).expect("upkeep");
    let after = content(&scene).len();
    assert!(is_compacted(&scene) && 3 * after < 2 * before, "{before} bytes, then {after}");
    assert!(!new_journal(&scene).exists());
    assert_eq!(told(&volume), then);
    assert_eq!(volume.check_structure().expect("checked"), []);
    assert_eq!(peek(&scene.dir.path().join("store")).expect("readable").meta, [3; 1000]);
    let volume = check_reopened(&scene, &volume, &then);
    for (round, &epoch) in taken.iter().enumerate().skip(2) {
        let old = get_old(&volume, epoch, u64::try_from(round).expect("small")).expect("readable");
        assert_eq!(usize::from(old), round + 1, "P2");
    }
    let next = snapshot(&volume, everything());
    assert!(next > *taken.last().expect("some"), "no number is given out again");
    volume.close().expect("closed");
    let bytes = content(&scene);
    let seen = inspect(&scene.dir.path().join("store"), None).expect("inspected");
    let listed: Vec<u32> = seen.epochs.iter().map(|(epoch, _)| *epoch).collect();
    assert_eq!(listed, [taken[1], taken[2], taken[3], next]);
    assert_eq!(content(&scene), bytes, "who looks writes nothing");
}

/// Whatever fails, and at whichever of its occurrences: the decisions are those there were, later
/// ones are kept, and none is made that a power cut could undo.
#[test]
fn a_compaction_that_fails_anywhere_loses_no_decision() {
    let steps = [
        ("journal.new", "allocate"),
        ("journal.new", "write"),
        ("journal.new", "sync"),
        ("journal", "read"),
        ("directory", "create"),
        ("directory", "rename"),
        ("directory", "rename done"),
        ("directory", "sync"),
    ];
    for (name, operation) in steps {
        let (scene, volume, taken) = lived();
        let (old, then) = (content(&scene), told(&volume));
        scene.faults.set(
            move |at, what| {
                if (at, what) == (name, operation) { Err(broken()) } else { Ok(()) }
            },
        );
        let failed = volume.maintain(Effort::All);
        assert!(failed.is_err(), "{name} {operation}: {failed:?}");
        let is_named = [("directory", "rename done"), ("directory", "sync")];
        assert_eq!(is_compacted(&scene), is_named.contains(&(name, operation)), "{operation}");
        let noted = volume.set_epoch_meta(taken[3], b"later".to_vec());
        if (name, operation) == ("directory", "sync") {
            // The name may lead to either after a power cut: both say the same, and go on to.
            assert!(noted.is_err(), "P10: decided in one of two journals");
            let new = content(&scene);
            volume.abandon();
            scene.faults.clear();
            for journal_left in [old, new] {
                std::fs::write(journal(&scene), journal_left).expect("written");
                // The buffer of the opening before this one is not that of the journal put back.
                let request = OpenRequest { recover: Recover::Discard, ..scene.request() };
                let volume = scene.open_as(request).expect("opened");
                assert_eq!(told(&volume), then);
                volume.abandon();
            }
            continue;
        }
        noted.expect("the journal in force takes it");
        scene.faults.clear();
        let then = told(&volume);
        let volume = check_reopened(&scene, &volume, &then);
        assert!(!new_journal(&scene).exists(), "{name} {operation}");
        volume.maintain(Effort::All).expect("upkeep");
        assert!(is_compacted(&scene), "{name} {operation}: tried again");
        check_reopened(&scene, &volume, &then).close().expect("closed");
    }
}

#[test]
fn a_name_that_becomes_durable_lets_decisions_go_on() {
    let (scene, volume, taken) = lived();
    scene.faults.set(|at, what| match (at, what) {
        ("directory", "sync") => Err(broken()),
        _ => Ok(()),
    });
    volume.maintain(Effort::All).expect_err("the directory cannot be synced");
    volume.delete_snapshot(taken[3], false).expect_err("not decided");
    volume.snapshot(snapshot_request(everything())).expect_err("not taken");
    scene.faults.clear();
    volume.delete_snapshot(taken[3], false).expect("deleted");
    let then = told(&volume);
    let volume = check_reopened(&scene, &volume, &then);
    assert!(get_old(&volume, taken[3], 0).is_err(), "it is gone");
    volume.close().expect("closed");
}

#[test]
fn what_is_decided_while_the_journal_is_compacted_is_in_the_new_one() {
    let (scene, volume, taken) = lived();
    let (meanwhile, epoch) = (Arc::clone(&volume), taken[2]);
    scene.faults.once("journal.new", "sync", move || {
        meanwhile.set_meta(b"meanwhile".to_vec()).expect("noted");
        meanwhile.bookmark(epoch, b"meanwhile".to_vec()).expect("bookmarked");
        let next = snapshot(&meanwhile, everything());
        meanwhile.set_epoch_meta(next, b"meanwhile".to_vec()).expect("noted");
    });
    volume.maintain(Effort::All).expect("upkeep");
    assert!(is_compacted(&scene));
    let then = told(&volume);
    assert_eq!(then.matches(&format!("{:?}", b"meanwhile")).count(), 3, "{then}");
    check_reopened(&scene, &volume, &then).close().expect("closed");
}

/// Half-done work of a process that is gone, or worse: a whole journal that says otherwise.
#[test]
fn what_is_left_of_a_compaction_is_never_read_and_goes() {
    let (scene, volume, taken) = lived();
    let earlier = content(&scene);
    volume.delete_snapshot(taken[3], false).expect("deleted");
    let then = told(&volume);
    volume.close().expect("closed");
    for left in [&earlier[..], &earlier[..1000], b"nothing of ours"] {
        std::fs::write(new_journal(&scene), left).expect("written");
        let looked = inspect(&scene.dir.path().join("store"), None).expect("inspected");
        assert_eq!(looked.epochs.len(), 2, "a bookmark and a snapshot");
        assert!(new_journal(&scene).exists(), "who looks changes nothing");
        let volume = scene.open();
        assert_eq!(told(&volume), then);
        assert!(!new_journal(&scene).exists());
        volume.close().expect("closed");
    }
}

#[test]
fn a_store_without_room_keeps_its_journal_as_it_is() {
    let (scene, volume, _) = lived();
    let policy = StorePolicy { on_full: OnFull::Fail, limit_bytes: 6 << 20 };
    volume.set_store_policy(policy).expect("policy");
    let before = content(&scene);
    scene.faults.1.store(1 << 20, Ordering::Relaxed);
    volume.maintain(Effort::All).expect("nobody needs it so much");
    assert_eq!(content(&scene), before);
    assert!(!new_journal(&scene).exists());
    scene.faults.1.store(0, Ordering::Relaxed);
    scene.faults.set(|at, what| match (at, what) {
        ("journal.new", "write" | "allocate") => Err(io::ErrorKind::StorageFull.into()),
        _ => Ok(()),
    });
    volume.maintain(Effort::All).expect("nobody needs it so much");
    assert_eq!(content(&scene), before);
    assert!(!new_journal(&scene).exists());
    volume.close().expect("closed");
}

/// While space is owed it matters what was selected before.
#[test]
fn a_journal_is_not_compacted_before_all_space_is_given_back() {
    let (scene, volume, taken) = lived();
    put(&volume, 7, 0xB0);
    volume.flush().expect("flushed");
    scene.faults.set(|at, what| match (at, what) {
        ("segment", "discard") => Err(broken()),
        _ => Ok(()),
    });
    let narrowed = volume.narrow(taken[2], &ExtentSet::new());
    narrowed.expect_err("the space cannot be given back");
    let before = content(&scene);
    assert!(volume.maintain(Effort::All).is_err());
    let mut upkeep = volume.upkeep.lock();
    volume.compact_journal(&mut upkeep, Effort::All).expect("nothing is done");
    drop(upkeep);
    assert_eq!(content(&scene), before);
    scene.faults.clear();
    volume.maintain(Effort::All).expect("upkeep");
    assert!(is_compacted(&scene));
    volume.close().expect("closed");
}

/// A record that rotted may look as if nothing depended on it. Left out of an intact journal, what
/// it decided would be gone without a word: a deleted snapshot would be back, a loss not a loss.
#[test]
fn a_journal_with_a_rotten_record_is_not_compacted() {
    let (scene, volume, _) = lived();
    let whole = content(&scene);
    let file = std::fs::File::options().write(true).open(journal(&scene)).expect("opened");
    let field = |at: usize| {
        usize::try_from(u32::from_le_bytes(whole[at..at + 4].try_into().expect("four bytes")))
            .expect("small")
    };
    let (mut at, mut records) = (0, 0);
    while at < whole.len() && whole[at..].starts_with(b"SBJR") {
        let length = field(at + 20);
        // The number of its epoch or another field, the last byte, and the kind.
        for (rotten, is_kind) in [(at + 28, false), (at + 27 + length, false), (at + 16, true)] {
            if rotten >= at + 28 + length {
                continue;
            }
            let offset = u64::try_from(rotten).expect("small");
            file.write_all_at(&[whole[rotten] ^ 1], offset).expect("written");
            let (damaged, done) = (content(&scene), volume.maintain(Effort::All));
            assert_eq!(content(&scene), damaged, "kind {} at {rotten}", field(at + 16));
            assert!(!new_journal(&scene).exists());
            // With another kind it may look as if there were nothing to do.
            let is_said = matches!(done, Err(Error::Damaged(_)));
            assert!(is_kind || is_said, "kind {} at {rotten}: {done:?}", field(at + 16));
            file.write_all_at(&whole[rotten..=rotten], offset).expect("written");
        }
        at += (28 + length).next_multiple_of(512);
        records += 1;
    }
    assert!(records > 20, "{records}");
    file.write_all_at(&[whole[28] ^ 1], 28).expect("written");
    let found = volume.check_structure().expect("checked");
    assert!(found.iter().any(|f| f.message.contains("the journal is damaged")), "{found:?}");
    file.write_all_at(&whole[28..29], 28).expect("written");
    volume.maintain(Effort::All).expect("upkeep");
    assert!(is_compacted(&scene));
    volume.close().expect("closed");
}

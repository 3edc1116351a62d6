//! One instant of two volumes, where a journal fails or a store is elsewhere.

use super::*;
use crate::volume::{Instant, Member, Quiet, snapshot_group};
use std::sync::atomic::AtomicBool;

const ID: [u8; 16] = [0xA5; 16];

/// Two volumes, in the order in which their journals decide.
struct Two {
    scenes: [Scene; 2],
    volumes: [Arc<Volume>; 2],
}

impl Two {
    fn new() -> Self {
        let mut both = [Scene::new(512 * BLOCK), Scene::new(512 * BLOCK)].map(|s| (s.open(), s));
        both.sort_by_key(|(volume, _)| volume.uuid);
        let [(first, one), (second, two)] = both;
        Self { scenes: [one, two], volumes: [first, second] }
    }

    fn take(&self) -> Result<Vec<Instant>> {
        let member = |volume: &Arc<Volume>| Member {
            volume: Arc::clone(volume),
            request: snapshot_request(everything()),
            quiet: None,
            holds: Quiet::Device,
        };
        snapshot_group(ID, self.volumes.iter().map(member).collect(), None)
    }

    /// As after a kill, with what was in memory lost, as a user accepts it.
    fn reopen(&mut self, at: usize) {
        self.volumes[at].abandon();
        let request = OpenRequest { recover: Recover::Discard, ..self.scenes[at].request() };
        self.volumes[at] = self.scenes[at].open_as(request).expect("open");
    }

    fn listed(&self, at: usize) -> Vec<(u32, bool)> {
        let known = self.volumes[at].epochs().expect("epochs").into_iter();
        known.map(|info| (info.epoch, info.state.undecided.is_empty())).collect()
    }
}

/// After so many syncs of the journal every write of it fails, or only every sync and what follows
/// it: then the record is there all the same.
fn fail_journal_after(scene: &Scene, syncs: u64, takes_one_more_write: bool) {
    let count = AtomicU64::new(0);
    let limit = syncs + u64::from(takes_one_more_write);
    scene.faults.set(move |name, what| {
        let is_sync = (name, what) == ("journal", "sync");
        let before = count.fetch_add(u64::from(is_sync), Ordering::SeqCst);
        let is_hit = name == "journal"
            && if takes_one_more_write {
                before + u64::from(is_sync) >= limit
            } else {
                before >= limit
            };
        if is_hit { Err(broken()) } else { Ok(()) }
    });
}

#[test]
fn a_group_is_on_all_its_volumes_as_they_were_and_goes_on_after_a_restart() {
    let mut two = Two::new();
    put(&two.volumes[0], 3, 0xA1);
    put(&two.volumes[1], 3, 0xB1);
    let taken = two.take().expect("group");
    put(&two.volumes[0], 3, 0xA2);
    put(&two.volumes[1], 3, 0xB2);
    for at in 0..2 {
        two.volumes[at].close().expect("close");
        two.volumes[at] = two.scenes[at].open();
    }
    let old = |at: usize| get_old(&two.volumes[at], taken[at].epoch, 3).expect("read");
    assert_eq!([old(0), old(1)], [0xA1, 0xB1]);
    assert_eq!([get(&two.volumes[0], 3), get(&two.volumes[1], 3)], [0xA2, 0xB2]);
}

#[test]
fn the_instants_come_back_in_the_order_they_were_asked_for() {
    let two = Two::new();
    snapshot(&two.volumes[1], everything());
    let member = |volume: &Arc<Volume>| Member {
        volume: Arc::clone(volume),
        request: snapshot_request(everything()),
        quiet: None,
        holds: Quiet::Device,
    };
    let members = vec![member(&two.volumes[1]), member(&two.volumes[0])];
    let taken = snapshot_group(ID, members, None).expect("group");
    assert_eq!([taken[0].epoch, taken[1].epoch], [2, 1]);
}

#[test]
fn a_group_of_one_or_with_a_volume_twice_is_refused() {
    let two = Two::new();
    let member = || Member {
        volume: Arc::clone(&two.volumes[0]),
        request: snapshot_request(everything()),
        quiet: None,
        holds: Quiet::Device,
    };
    for members in [vec![member()], vec![member(), member()]] {
        let refused = snapshot_group(ID, members, None).expect_err("refused");
        assert_eq!(refused.kind(), "usage");
    }
    assert!(two.listed(0).is_empty());
}

#[test]
fn if_one_volume_does_not_drain_none_has_a_snapshot_and_all_go_on() {
    let two = Two::new();
    let (is_stuck, may_go) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(())));
    let (hold, seen) = (Arc::clone(&may_go), Arc::clone(&is_stuck));
    let held = may_go.lock();
    two.scenes[1].faults.set(move |name, what| {
        if (name, what) == ("origin", "write") {
            seen.store(true, Ordering::SeqCst);
            drop(hold.lock());
        }
        Ok(())
    });
    let writer = Arc::clone(&two.volumes[1]);
    let stuck = std::thread::spawn(move || put(&writer, 9, 0xB1));
    while !is_stuck.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    let member = |volume: &Arc<Volume>| Member {
        volume: Arc::clone(volume),
        request: SnapshotRequest {
            pause_limit: Duration::from_millis(20),
            ..snapshot_request(everything())
        },
        quiet: None,
        holds: Quiet::Device,
    };
    let refused = snapshot_group(ID, two.volumes.iter().map(member).collect(), None);
    assert_eq!(refused.expect_err("it waits").kind(), "pause_timeout");
    put(&two.volumes[0], 4, 0xA1);
    drop(held);
    stuck.join().expect("no panic");
    assert!(two.listed(0).is_empty() && two.listed(1).is_empty());
    let taken = two.take().expect("the next one");
    assert_eq!(get_old(&two.volumes[1], taken[1].epoch, 9).expect("read"), 0xB1);
}

#[test]
fn a_header_that_fails_on_one_volume_takes_the_snapshot_of_the_other_back() {
    let mut two = Two::new();
    put(&two.volumes[0], 3, 0xA1);
    two.scenes[1]
        .faults
        .set(|name, what| if (name, what) == ("segment", "sync") { Err(broken()) } else { Ok(()) });
    assert_eq!(two.take().expect_err("a header fails").kind(), "store_io");
    two.scenes[1].faults.clear();
    assert!(two.listed(0).is_empty() && two.listed(1).is_empty(), "P10");
    put(&two.volumes[0], 3, 0xA2);
    put(&two.volumes[1], 3, 0xB2);
    for at in 0..2 {
        two.reopen(at);
        assert!(two.listed(at).is_empty(), "P10: after a restart");
    }
    two.take().expect("the next one");
}

/// The first one's journal says that there is a group; the other's never came to say so.
fn decided_and_not_noted() -> (Two, u32) {
    let two = Two::new();
    put(&two.volumes[1], 3, 0xB1);
    // It says that a group begins, and then nothing more.
    fail_journal_after(&two.scenes[1], 1, false);
    let taken = two.take().expect("it is decided elsewhere");
    two.scenes[1].faults.clear();
    let epoch = taken[1].epoch;
    (two, epoch)
}

#[test]
fn whoever_does_not_know_how_its_group_ended_asks_the_store_that_does() {
    let (mut two, epoch) = decided_and_not_noted();
    two.reopen(1);
    // It is open, and its last record might still be wiped out.
    assert_eq!(two.listed(1), [(epoch, false)]);
    two.volumes[0].set_meta(Vec::new()).expect("one more record");
    two.reopen(1);
    assert_eq!(two.listed(1), [(epoch, true)]);
    assert_eq!(get_old(&two.volumes[1], epoch, 3).expect("read"), 0xB1);
}

#[test]
fn where_nobody_can_be_asked_the_snapshot_is_kept_and_gives_nothing_until_somebody_can() {
    let (mut two, epoch) = decided_and_not_noted();
    two.volumes[0].close().expect("close");
    let (store, away) =
        (two.scenes[0].dir.path().join("store"), two.scenes[0].dir.path().join("x"));
    std::fs::rename(&store, &away).expect("moved");
    two.reopen(1);
    assert_eq!(two.listed(1), [(epoch, false)]);
    let volume = &two.volumes[1];
    assert_eq!(get_old(volume, epoch, 3).expect_err("not known").kind(), "undecided");
    let narrowed = volume.narrow(epoch, &ExtentSet::new());
    assert_eq!(narrowed.expect_err("not known").kind(), "undecided");
    assert_eq!(volume.bookmark(epoch, Vec::new()).expect_err("not known").kind(), "undecided");
    put(volume, 3, 0xB2);
    let later = snapshot(volume, everything());
    put(volume, 3, 0xB3);
    volume.close().expect("close");
    let request = OpenRequest { peers: vec![away], ..two.scenes[1].request() };
    two.volumes[1] = two.scenes[1].open_as(request).expect("open");
    assert_eq!(two.listed(1), [(epoch, true), (later, true)]);
    let old = |epoch| get_old(&two.volumes[1], epoch, 3).expect("read");
    assert_eq!([old(epoch), old(later)], [0xB1, 0xB2]);
}

#[test]
fn a_snapshot_of_an_undecided_group_can_be_deleted() {
    let (mut two, epoch) = decided_and_not_noted();
    two.volumes[0].close().expect("close");
    let store = two.scenes[0].dir.path().join("store");
    std::fs::rename(&store, two.scenes[0].dir.path().join("x")).expect("moved");
    two.reopen(1);
    two.volumes[1].delete_snapshot(epoch, false).expect("delete");
    two.reopen(1);
    assert!(two.listed(1).is_empty());
}

#[test]
fn a_decision_that_failed_and_cannot_be_taken_back_is_nobodys_until_it_can() {
    let mut two = Two::new();
    put(&two.volumes[0], 3, 0xA1);
    // The second record of the first journal is the decision.
    fail_journal_after(&two.scenes[0], 1, true);
    assert_eq!(two.take().expect_err("not decided").kind(), "store_io");
    two.scenes[0].faults.clear();
    for at in 0..2 {
        let listed = two.listed(at);
        assert!(listed.iter().all(|(_, is_decided)| !is_decided), "{listed:?}");
        two.reopen(at);
    }
    // Whatever was found: the same on both.
    assert_eq!(two.listed(0).len(), two.listed(1).len());
    two.reopen(1);
    assert!([two.listed(0), two.listed(1)].iter().flatten().all(|(_, is_decided)| *is_decided));
    two.take().expect("the next one");
}

//! One instant of two volumes, where a journal fails or a store is elsewhere.

use super::*;
use crate::volume::{Effort, GroupMoment, Instant, Member, Quiet, snapshot_group};
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

    fn members(&self) -> Vec<Member> {
        let member = |volume: &Arc<Volume>| Member {
            volume: Arc::clone(volume),
            request: snapshot_request(everything()),
            quiet: None,
            holds: Quiet::Device,
        };
        self.volumes.iter().map(member).collect()
    }

    fn take(&self) -> Result<Vec<Instant>> {
        snapshot_group(ID, self.members(), GroupMoment::default())
    }

    fn store(&self, at: usize) -> std::path::PathBuf {
        self.scenes[at].dir.path().join("store")
    }

    /// Bytes of the journal.
    fn journal(&self, at: usize) -> Vec<u8> {
        std::fs::read(self.store(at).join("journal")).expect("a journal")
    }

    /// The journal has nothing to give back, and is written anew.
    fn compact(&self, at: usize) {
        // Records that nothing depends on: or it is not worth it.
        for round in 0..40 {
            self.volumes[at].set_meta(vec![round; 2000]).expect("noted");
        }
        let before = self.journal(at).len();
        self.volumes[at].maintain(Effort::All).expect("upkeep");
        assert!(self.journal(at).len() < before, "it was not compacted");
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
    let taken = snapshot_group(ID, members, GroupMoment::default()).expect("group");
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
        let refused = snapshot_group(ID, members, GroupMoment::default()).expect_err("refused");
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
    let refused =
        snapshot_group(ID, two.volumes.iter().map(member).collect(), GroupMoment::default());
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

/// The record of the decision is there, or it is not, and its journal takes nothing more.
fn undecided_by_the_one_that_decides(is_there: bool) -> Two {
    let two = Two::new();
    put(&two.volumes[0], 3, 0xA1);
    put(&two.volumes[1], 3, 0xB1);
    // The second record of the first journal is the decision.
    fail_journal_after(&two.scenes[0], 1, is_there);
    assert_eq!(two.take().expect_err("not decided").kind(), "store_io");
    assert_eq!([two.listed(0), two.listed(1)], [[(1, false)], [(1, false)]]);
    two.scenes[0].faults.clear();
    two
}

#[test]
fn a_decision_that_failed_and_is_found_after_a_kill_is_that_of_all() {
    let mut two = undecided_by_the_one_that_decides(true);
    put(&two.volumes[1], 3, 0xB2);
    two.reopen(0);
    two.reopen(1);
    assert_eq!([two.listed(0), two.listed(1)], [[(1, true)], [(1, true)]]);
    assert_eq!(get_old(&two.volumes[1], 1, 3).expect("read"), 0xB1);
}

#[test]
fn a_decision_that_failed_and_is_not_found_after_a_kill_was_none() {
    let mut two = undecided_by_the_one_that_decides(false);
    two.reopen(1);
    // The first one, which is open, says only that there is a group.
    assert_eq!(two.listed(1), [(1, false)]);
    two.reopen(0);
    assert_eq!(two.listed(0), []);
    assert_eq!(two.volumes[1].settle_groups(&[]).expect("asked"), 0);
    assert_eq!(two.listed(1), []);
    two.take().expect("the next one");
}

#[test]
fn a_decision_that_failed_is_taken_back_once_the_journal_takes_it_and_then_by_all() {
    for is_there in [true, false] {
        let mut two = undecided_by_the_one_that_decides(is_there);
        assert_eq!(two.volumes[1].settle_groups(&[]).expect("asked"), 1, "nobody knows yet");
        two.volumes[0].maintain(Effort::Due).expect("upkeep");
        assert_eq!(two.listed(0), []);
        two.volumes[1].maintain(Effort::Due).expect("upkeep");
        assert_eq!(two.listed(1), []);
        for at in [1, 0] {
            two.reopen(at);
            assert_eq!(two.listed(at), [], "P10: after a restart");
        }
        two.take().expect("the next one");
    }
}

#[test]
fn nothing_is_done_with_a_snapshot_of_which_it_is_not_known_whether_it_exists() {
    let two = undecided_by_the_one_that_decides(false);
    let volume = &two.volumes[1];
    let refused = [
        get_old(volume, 1, 3).map(drop),
        volume.narrow(1, &ExtentSet::new()).map(drop),
        volume.bookmark(1, Vec::new()),
        volume.set_epoch_meta(1, b"another name".to_vec()),
    ];
    for refused in refused {
        assert_eq!(refused.expect_err("not known").kind(), "undecided");
    }
    // It is only not written down yet that there is none.
    assert_eq!(two.volumes[0].keep_undecided(1, vec![]).expect_err("gone").kind(), "undecided");
}

#[test]
fn what_a_member_could_not_note_it_notes_later_without_being_opened_anew() {
    let (mut two, epoch) = decided_and_not_noted();
    assert_eq!(two.listed(1), [(epoch, true)], "it was there when it was decided");
    two.volumes[1].maintain(Effort::Due).expect("upkeep");
    std::fs::rename(two.store(0), two.scenes[0].dir.path().join("x")).expect("moved");
    two.reopen(1);
    assert_eq!(two.listed(1), [(epoch, true)], "nobody has to be asked");
}

#[test]
fn a_snapshot_of_which_nobody_can_tell_is_kept_on_somebodys_word() {
    let (mut two, epoch) = decided_and_not_noted();
    two.volumes[0].close().expect("close");
    std::fs::remove_dir_all(two.store(0)).expect("gone for good");
    two.reopen(1);
    assert_eq!(two.listed(1), [(epoch, false)]);
    two.volumes[1].keep_undecided(epoch, b"kept".to_vec()).expect("kept");
    assert_eq!(two.volumes[1].keep_undecided(epoch, vec![]).expect_err("is").kind(), "not_found");
    put(&two.volumes[1], 3, 0xB2);
    two.reopen(1);
    assert_eq!(two.listed(1), [(epoch, true)]);
    assert_eq!(get_old(&two.volumes[1], epoch, 3).expect("read"), 0xB1);
    assert_eq!(two.volumes[1].epochs().expect("listed")[0].state.meta, b"kept");
}

/// What others ask for is kept when the journal is written anew, and nothing keeps that from
/// happening.
#[test]
fn a_compacted_journal_still_says_how_groups_ended() {
    let (mut two, epoch) = decided_and_not_noted();
    put(&two.volumes[0], 3, 0xA2);
    two.volumes[0].delete_snapshot(epoch, false).expect("deleted");
    two.compact(0);
    assert_eq!(two.listed(0), [], "what is deleted stays so");
    assert_eq!(two.volumes[0].check_structure().expect("checked"), []);
    two.reopen(0);
    assert_eq!(two.listed(0), []);
    // The sequence numbers go on, and the records are few.
    two.compact(0);
    two.reopen(1);
    assert_eq!(two.listed(1), [(epoch, true)]);
}

#[test]
fn a_group_of_which_nobody_knows_the_end_outlives_a_compaction() {
    let (mut two, epoch) = decided_and_not_noted();
    two.volumes[0].close().expect("close");
    let away = two.scenes[0].dir.path().join("x");
    std::fs::rename(two.store(0), &away).expect("moved");
    two.reopen(1);
    two.compact(1);
    two.reopen(1);
    assert_eq!(two.listed(1), [(epoch, false)]);
    assert_eq!(two.volumes[1].settle_groups(&[away]).expect("asked"), 0);
    assert_eq!(two.listed(1), [(epoch, true)]);
}

#[test]
fn a_group_that_failed_does_not_keep_the_journal_from_being_compacted() {
    let two = Two::new();
    two.scenes[1]
        .faults
        .set(|name, what| if (name, what) == ("segment", "sync") { Err(broken()) } else { Ok(()) });
    two.take().expect_err("a header fails");
    two.scenes[1].faults.clear();
    for at in 0..2 {
        two.volumes[at].maintain(Effort::Due).expect("upkeep");
        two.compact(at);
    }
}

#[test]
fn somebody_may_object_until_it_is_decided_and_then_none_has_a_snapshot() {
    let mut two = Two::new();
    put(&two.volumes[0], 3, 0xA1);
    let (passed, order) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (tell, (seen, asked)) = (Arc::clone(&passed), (Arc::clone(&passed), Arc::clone(&order)));
    let moment = GroupMoment {
        passed: Some(Box::new(move || tell.store(true, Ordering::SeqCst))),
        objects: Some(Box::new(move || {
            asked.store(seen.load(Ordering::SeqCst), Ordering::SeqCst);
            Some("it was thawed too early".into())
        })),
    };
    let refused = snapshot_group(ID, two.members(), moment).expect_err("objected");
    assert_eq!(
        (refused.kind(), refused.to_string().as_str()),
        ("quiesce", "it was thawed too early")
    );
    assert!(order.load(Ordering::SeqCst), "asked once everybody was told that it has passed");
    assert_eq!([two.listed(0), two.listed(1)], [[], []]);
    put(&two.volumes[0], 3, 0xA2);
    for at in 0..2 {
        two.reopen(at);
        assert_eq!(two.listed(at), [], "P10: after a restart");
    }
    assert_eq!(get(&two.volumes[0], 3), 0xA2);
    let moment = GroupMoment { objects: Some(Box::new(|| None)), ..GroupMoment::default() };
    let taken = snapshot_group([2; 16], two.members(), moment).expect("nobody objects");
    assert_eq!(get_old(&two.volumes[0], taken[0].epoch, 3).expect("read"), 0xA2);
}

#[test]
fn a_snapshot_that_is_objected_to_is_never_listed_as_one_that_exists() {
    let two = Two::new();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (told, volume) = (Arc::clone(&seen), Arc::downgrade(&two.volumes[1]));
    two.scenes[1].faults.set(move |name, what| {
        let is_it = (name, what) == ("journal", "sync");
        if let Some(volume) = volume.upgrade().filter(|_| is_it) {
            let listed = volume.epochs().expect("listed").into_iter();
            told.lock().extend(listed.map(|info| !info.state.undecided.is_empty()));
        }
        Ok(())
    });
    let moment = GroupMoment { objects: Some(Box::new(|| Some("no".into()))), passed: None };
    snapshot_group(ID, two.members(), moment).expect_err("objected");
    two.scenes[1].faults.clear();
    assert_eq!(*seen.lock(), [true], "while it is being denied");
    assert_eq!(two.listed(1), []);
}

#[test]
fn snapshots_of_one_instant_have_one_time() {
    let two = Two::new();
    let taken = two.take().expect("group");
    assert_eq!(taken[0].created_unix_ns, taken[1].created_unix_ns);
}

/// Nobody waits for the sum of all disks: the last syncs before the instant, and those of the headers,
/// are under way together.
#[test]
fn the_disks_of_all_are_synced_at_once() {
    let two = Two::new();
    for (name, before) in [("origin", 2), ("segment", 0)] {
        let met = Arc::new((Mutex::new(0), parking_lot::Condvar::new()));
        for scene in &two.scenes {
            let (met, count) = (Arc::clone(&met), AtomicU64::new(0));
            scene.faults.set(move |at, what| {
                let is_it = (at, what) == (name, "sync");
                if !is_it || count.fetch_add(1, Ordering::SeqCst) != before {
                    return Ok(());
                }
                let mut here = met.0.lock();
                *here += 1;
                met.1.notify_all();
                while *here < 2 {
                    if met.1.wait_for(&mut here, Duration::from_secs(20)).timed_out() {
                        return Err(broken());
                    }
                }
                Ok(())
            });
        }
        two.take().expect("neither waits for the other's end");
        two.scenes.iter().for_each(|scene| scene.faults.clear());
    }
}

#[test]
fn a_try_at_a_moment_that_is_not_quiet_writes_nothing() {
    let two = Two::new();
    let before = [two.journal(0), two.journal(1)];
    two.volumes[1].watch_writes(None);
    put(&two.volumes[1], 3, 0xB1);
    let mut members = two.members();
    members[1].quiet = Some(Duration::from_secs(3600));
    let refused = snapshot_group(ID, members, GroupMoment::default()).expect_err("not quiet");
    assert_eq!(refused.kind(), "not_quiet");
    assert_eq!([two.journal(0), two.journal(1)], before);
}

/// Whoever asks has the store for a moment only: whoever opens it then waits, and is not told that
/// somebody has it open.
#[test]
fn an_opening_waits_for_whoever_only_asks() {
    use crate::volume::host::{Host, System};
    use crate::volume::open::open;
    let scene = Scene::new(512 * BLOCK);
    scene.open().close().expect("made");
    let store = scene.dir.path().join("store");
    let asking = System::default().lock_to_ask(&store).expect("nobody has it open");
    let request = scene.request();
    let opening = std::thread::spawn(move || open(request).map(|volume| volume.close()));
    let is_waited_for = || {
        let locks = std::fs::read_to_string("/proc/locks").expect("readable");
        let pid = format!(" {} ", std::process::id());
        locks.lines().any(|line| line.contains("-> FLOCK") && line.contains(&pid))
    };
    while !is_waited_for() {
        assert!(!opening.is_finished(), "it did not wait");
        std::thread::yield_now();
    }
    drop(asking);
    opening.join().expect("no panic").expect("opened").expect("closed");
    let volume = scene.open();
    let refused = System::default().lock_to_ask(&store).err().expect("somebody has it open");
    assert_eq!(refused.kind(), "locked");
    volume.close().expect("closed");
}

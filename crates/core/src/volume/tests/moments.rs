//! Instants that wait for a quiet moment, and whoever holds still for one.

use super::*;
use crate::volume::{Instant, Moment, Quiet};
use std::sync::atomic::{AtomicBool, Ordering};

fn at(volume: &Volume, quiet_ms: u64, blocks: Option<ExtentSet>) -> crate::error::Result<u32> {
    volume.watch_writes(blocks);
    let moment =
        Moment { quiet: Some(Duration::from_millis(quiet_ms)), passed: None, ..Moment::default() };
    volume.snapshot_at(snapshot_request(everything()), moment).map(|taken| taken.epoch)
}

#[test]
fn whoever_holds_still_is_told_once_the_gate_is_open_again() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    put(&volume, 3, 1);
    let is_told = AtomicBool::new(false);
    let told = Box::new(|| {
        // Were the gate closed, this would wait for ever.
        put(&volume, 3, 2);
        is_told.store(true, Ordering::SeqCst);
    });
    let moment = Moment { quiet: None, passed: Some(told), ..Moment::default() };
    let taken = volume.snapshot_at(snapshot_request(everything()), moment).expect("snapshot");
    assert!(is_told.load(Ordering::SeqCst));
    assert_eq!((get_old(&volume, taken.epoch, 3).expect("read"), get(&volume, 3)), (1, 2));
}

#[test]
fn nobody_is_told_of_an_instant_that_never_came() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let is_told = AtomicBool::new(false);
    let told = Box::new(|| is_told.store(true, Ordering::SeqCst));
    let moment = Moment { quiet: Some(Duration::ZERO), passed: Some(told), ..Moment::default() };
    let refused = volume.snapshot_at(snapshot_request(everything()), moment);
    assert_eq!(refused.expect_err("nobody watches writes").kind(), "usage");
    assert!(!is_told.load(Ordering::SeqCst));
    put(&volume, 3, 1);
    assert_eq!(get(&volume, 3), 1);
}

#[test]
fn an_instant_that_waits_for_quiet_fails_while_writes_come_and_harms_nothing() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    volume.watch_writes(None);
    put(&volume, 3, 1);
    let hour = Duration::from_secs(3600);
    let moment = Moment { quiet: Some(hour), passed: None, ..Moment::default() };
    let refused = volume.snapshot_at(snapshot_request(everything()), moment);
    assert_eq!(refused.expect_err("a write came").kind(), "not_quiet");
    assert!(volume.epochs().expect("epochs").is_empty());
    put(&volume, 3, 2);
    let epoch = at(&volume, 0, None).expect("no time is over at once");
    put(&volume, 3, 3);
    assert_eq!(get_old(&volume, epoch, 3).expect("read"), 2);
}

#[test]
fn writes_of_other_blocks_do_not_disturb_a_watched_range() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    volume.watch_writes(Some(ExtentSet::from_extent(Extent::new(0, 4))));
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_millis(5) {
        put(&volume, 9, 1);
        volume.trim(10 * 4096, 4096, false).expect("trim");
    }
    assert!(volume.quiet().expect("watched") >= Duration::from_millis(5));
    let before = std::time::Instant::now();
    put(&volume, 3, 1);
    assert!(volume.quiet().expect("watched") <= before.elapsed());
    volume.unwatch_writes();
    assert_eq!(volume.quiet(), None);
}

#[test]
fn reads_of_the_watched_length_are_seen_where_they_were_made() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    volume.watch_reads(1536);
    let mut odd = [0; 1536];
    volume.read(4096, &mut odd).expect("read");
    volume.read(512, &mut odd[..512]).expect("read");
    volume.read(8704, &mut odd).expect("read");
    assert_eq!(volume.reads_seen(), [4096, 8704]);
    volume.watch_reads(0);
    volume.read(4096, &mut odd).expect("read");
    assert!(volume.reads_seen().is_empty());
}

/// A write that is on its way to the origin until `go` is let go.
struct Stuck {
    go: Arc<Mutex<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Stuck {
    /// Write a block, and return while the origin has not taken it; other writes pass.
    fn begin(scene: &Scene, volume: &Arc<Volume>, block: u64, held: &Arc<Mutex<()>>) -> Self {
        Self::begin_with(scene, volume, held, move |volume| put(volume, block, 0xB1))
    }

    fn begin_with(
        scene: &Scene,
        volume: &Arc<Volume>,
        held: &Arc<Mutex<()>>,
        write: impl FnOnce(&Volume) + Send + 'static,
    ) -> Self {
        let (is_first, is_there) = (AtomicBool::new(true), Arc::new(AtomicBool::new(false)));
        let (go, seen) = (Arc::clone(held), Arc::clone(&is_there));
        scene.faults.set(move |name, what| {
            if (name, what) == ("origin", "write") && is_first.swap(false, Ordering::SeqCst) {
                seen.store(true, Ordering::SeqCst);
                drop(go.lock());
            }
            Ok(())
        });
        let writer = Arc::clone(volume);
        let thread = std::thread::spawn(move || write(&writer));
        while !is_there.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        Self { go: Arc::clone(held), thread: Some(thread) }
    }

    fn wait(mut self) {
        drop(self.go.lock());
        self.thread.take().expect("once").join().expect("no panic");
    }
}

fn held_for(volume: &Volume, blocks: Extent, holds: Quiet, limit_ms: u64) -> Result<Instant> {
    let request = SnapshotRequest {
        pause_limit: Duration::from_millis(limit_ms),
        ..snapshot_request(ExtentSet::from_extent(blocks))
    };
    volume.snapshot_at(request, Moment { holds, ..Moment::default() })
}

#[test]
fn a_write_in_flight_elsewhere_is_waited_for_by_the_next_instant_that_selects_it() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let go = Arc::new(Mutex::new(()));
    let holding = go.lock();
    let stuck = Stuck::begin(&scene, &volume, 100, &go);
    let (here, there) = (Extent::new(0, 10), Extent::new(100, 101));
    let first = held_for(&volume, here, Quiet::Selected, 2000).expect("nobody writes there");
    assert_eq!(first.in_flight, 0);
    for (blocks, holds) in [(there, Quiet::Selected), (here, Quiet::Device)] {
        let refused = held_for(&volume, blocks, holds, 20);
        assert_eq!(refused.expect_err("it is on its way").kind(), "pause_timeout");
    }
    drop(holding);
    stuck.wait();
    let last = held_for(&volume, there, Quiet::Selected, 2000).expect("it has landed");
    assert_eq!(get_old(&volume, last.epoch, 100).expect("read"), 0xB1, "P2");
}

#[test]
fn while_writers_of_selected_blocks_wait_others_go_on() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    let go = Arc::new(Mutex::new(()));
    let holding = go.lock();
    let stuck = Stuck::begin(&scene, &volume, 5, &go);
    let taker = Arc::clone(&volume);
    let taking = std::thread::spawn(move || {
        held_for(&taker, Extent::new(0, 10), Quiet::Selected, 60_000).expect("snapshot")
    });
    while !volume.state.lock().gate.is_closed() {
        std::thread::yield_now();
    }
    put(&volume, 100, 0xC1);
    assert_eq!(get(&volume, 100), 0xC1);
    let waiter = Arc::clone(&volume);
    let waiting = std::thread::spawn(move || put(&waiter, 6, 0xC2));
    let_it_wait();
    assert!(!waiting.is_finished() && !taking.is_finished());
    drop(holding);
    stuck.wait();
    let taken = taking.join().expect("no panic");
    waiting.join().expect("no panic");
    assert_eq!(taken.in_flight, 1);
    let old = |block| get_old(&volume, taken.epoch, block).expect("read");
    assert_eq!([old(5), old(6)], [0xB1, 7], "P2: what was in flight is in, who waited is not");
    assert_eq!(get(&volume, 6), 0xC2);
}

/// A block was settled, a write to it on its way, and an instant that did not wait for it made its
/// next write a first change: that read the sector, took a slot, and brought back later what the
/// other write had changed. The block now stays settled.
#[test]
fn a_write_in_flight_across_an_instant_is_not_undone_by_one_to_the_same_sector() {
    let scene = Scene::new(512 * BLOCK);
    let volume = scene.open();
    snapshot(&volume, everything());
    put(&volume, 100, 0xA1);
    volume.flush().expect("flush");
    let go = Arc::new(Mutex::new(()));
    let holding = go.lock();
    let at = 100 * u64::try_from(BLOCK).expect("small");
    let stuck = Stuck::begin_with(&scene, &volume, &go, move |volume| {
        volume.write(at, &[0xB1; 256], false).expect("write");
    });
    held_for(&volume, Extent::new(0, 10), Quiet::Selected, 2000).expect("nobody writes there");
    volume.write(at + 256, &[0xC1; 256], false).expect("write");
    drop(holding);
    stuck.wait();
    volume.flush().expect("flush");
    let mut content = [0; 768];
    volume.read(at, &mut content).expect("read");
    assert_eq!([content[0], content[256], content[512]], [0xB1, 0xC1, 0xA1], "P1");
}

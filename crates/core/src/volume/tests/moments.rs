//! Instants that wait for a quiet moment, and whoever holds still for one.

use super::*;
use crate::volume::Moment;
use std::sync::atomic::{AtomicBool, Ordering};

fn at(volume: &Volume, quiet_ms: u64, blocks: Option<ExtentSet>) -> crate::error::Result<u32> {
    volume.watch_writes(blocks);
    let moment = Moment { quiet: Some(Duration::from_millis(quiet_ms)), passed: None };
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
    let moment = Moment { quiet: None, passed: Some(told) };
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
    let moment = Moment { quiet: Some(Duration::ZERO), passed: Some(told) };
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
    let moment = Moment { quiet: Some(hour), passed: None };
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

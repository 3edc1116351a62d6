//! Several threads write numbered blocks while snapshots are taken: each snapshot holds one moment
//! of each thread.
//!
//! A thread writes 1, 2, 3, ... to its own blocks in turn. If a snapshot has write n and not an
//! earlier one it is of no instant. What was answered before the snapshot was asked for is in it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use stillblock_core::extent::{Extent, ExtentSet};
use stillblock_core::view::{ExcludedReads, View};
use stillblock_core::volume::open::{Cache, CreateRequest, OpenRequest, Recover, create, open};
use stillblock_core::volume::{SnapshotRequest, StorePolicy};

const BLOCK: usize = 4096;
const THREADS: usize = 3;
const BLOCKS_A_THREAD: u64 = 40;
const SNAPSHOTS: usize = 40;

#[test]
fn each_snapshot_amid_writers_is_of_one_instant() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let blocks = THREADS as u64 * BLOCKS_A_THREAD;
    let disk = std::fs::File::create(dir.path().join("disk.img")).expect("origin");
    disk.set_len(blocks * BLOCK as u64).expect("origin");
    let store = dir.path().join("store");
    let origin = dir.path().join("disk.img");
    create(&CreateRequest {
        store: store.clone(),
        origin,
        block_size: 4096,
        meta: Vec::new(),
        policy: StorePolicy::default(),
    })
    .expect("create");
    let volume = open(OpenRequest {
        store,
        origin: None,
        cache: Cache::WriteBack,
        direct: false,
        buffer_dir: Some(dir.path().to_path_buf()),
        buffer_bytes: 4 << 20,
        recover: Recover::Refuse,
        has_background: true,
        peers: Vec::new(),
    })
    .expect("open");
    let answered: Vec<AtomicU64> = (0..THREADS).map(|_| AtomicU64::new(0)).collect();
    let is_over = AtomicBool::new(false);
    let mut taken = Vec::new();
    std::thread::scope(|scope| {
        for (thread, answered) in answered.iter().enumerate() {
            let (volume, is_over) = (&volume, &is_over);
            scope.spawn(move || {
                let mut number = 0_u64;
                while !is_over.load(Ordering::Relaxed) {
                    number += 1;
                    let block = thread as u64 * BLOCKS_A_THREAD + number % BLOCKS_A_THREAD;
                    let data = number.to_le_bytes().repeat(BLOCK / 8);
                    volume.write(block * BLOCK as u64, &data, number % 64 == 0).expect("write");
                    answered.store(number, Ordering::Release);
                }
            });
        }
        for _ in 0..SNAPSHOTS {
            let before: Vec<u64> = answered.iter().map(|a| a.load(Ordering::Acquire)).collect();
            let selection = ExtentSet::from_extent(Extent::new(0, blocks));
            let pause_limit = Duration::from_secs(5);
            let request =
                SnapshotRequest { selection, low: ExtentSet::new(), meta: Vec::new(), pause_limit };
            taken.push((volume.snapshot(request).expect("snapshot").epoch, before));
        }
        is_over.store(true, Ordering::Relaxed);
    });
    for (epoch, before) in taken {
        let view = View::open(&volume, epoch, ExcludedReads::Error).expect("view");
        for (thread, before) in before.into_iter().enumerate() {
            let mut numbers = Vec::new();
            for at in 0..BLOCKS_A_THREAD {
                let block = thread as u64 * BLOCKS_A_THREAD + at;
                let mut content = vec![0; BLOCK];
                view.read(block * BLOCK as u64, &mut content).expect("read");
                let number = u64::from_le_bytes(content[..8].try_into().expect("eight"));
                assert!(content.chunks(8).all(|c| c == &content[..8]), "a block is whole");
                numbers.push(number);
            }
            let last = numbers.iter().copied().max().unwrap_or(0);
            assert!(last >= before, "snapshot {epoch} lacks write {before} of thread {thread}");
            for (at, number) in numbers.into_iter().enumerate() {
                // The latest number up to `last` that went to this block.
                let back = (last + BLOCKS_A_THREAD - at as u64) % BLOCKS_A_THREAD;
                let wanted = last.saturating_sub(back);
                let is_first_round = last < back || wanted == 0;
                assert!(
                    number == wanted || (is_first_round && number == 0),
                    "P2: snapshot {epoch}, thread {thread}: {number}, not {wanted}, last {last}"
                );
            }
        }
    }
    volume.close().expect("close");
}

//! Random programs against a model: the live disk and one copy of it for every snapshot.
//!
//! A seed that fails is printed; run it alone with `STILLBLOCK_SEED=n cargo test --test model`.

#[path = "simulation/dice.rs"]
#[allow(dead_code)] // not every test rolls all of it
mod dice;

use dice::Dice;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use stillblock_core::extent::{Extent, ExtentSet};
use stillblock_core::regions::region_blocks;
use stillblock_core::view::{ExcludedReads, View};
use stillblock_core::volume::open::{Cache, CreateRequest, OpenRequest, Recover, create, open};
use stillblock_core::volume::{Effort, RestoreRequest, SnapshotRequest, StorePolicy, Volume};

/// With `STILLBLOCK_TRACE` set every step is told and followed by a check.
fn is_traced() -> bool {
    std::env::var_os("STILLBLOCK_TRACE").is_some()
}

macro_rules! trace {
    ($($what:tt)*) => {
        if is_traced() {
            eprintln!($($what)*);
        }
    };
}

struct Snapshot {
    content: Vec<u8>,
    selection: ExtentSet,
    /// Blocks written since, whatever they hold now.
    changed: BTreeSet<u64>,
    /// Blocks that may count as changed though they were not written: they lie in a region that was
    /// open when the process was killed, and no bits outlived it.
    excess: BTreeSet<u64>,
    bookmark: Option<ExtentSet>,
    is_deleted: bool,
}

struct Run<'a> {
    block: usize,
    dice: Dice,
    dir: &'a Path,
    volume: Arc<Volume>,
    live: Vec<u8>,
    snapshots: BTreeMap<u32, Snapshot>,
    cache: Cache,
    has_background: bool,
}

fn request(dir: &Path, cache: Cache, has_background: bool) -> OpenRequest {
    OpenRequest {
        store: dir.join("store"),
        origin: None,
        cache,
        direct: false,
        buffer_dir: Some(dir.to_path_buf()),
        buffer_bytes: 4 << 20,
        recover: Recover::Refuse,
        has_background,
        peers: Vec::new(),
    }
}

impl Run<'_> {
    fn size(&self) -> usize {
        self.live.len()
    }

    fn blocks(&self) -> u64 {
        self.size().div_ceil(self.block) as u64
    }

    fn range(&mut self, longest: usize) -> (usize, usize) {
        let size = self.size();
        let mut at = self.dice.below(size);
        let mut length = 1 + self.dice.below(longest.min(size - at));
        match self.dice.below(3) {
            0 => {}
            1 => {
                at -= at % 512;
                length = length.next_multiple_of(512).min(size - at);
            }
            _ => {
                at -= at % self.block;
                length = length.next_multiple_of(self.block).min(size - at);
            }
        }
        (at, length)
    }

    fn touch(&mut self, at: usize, length: usize) {
        trace!("touch {} {}", at / self.block, (at + length).div_ceil(self.block));
        let blocks = (at / self.block) as u64..((at + length).div_ceil(self.block)) as u64;
        for snapshot in self.snapshots.values_mut() {
            snapshot.changed.extend(blocks.clone());
        }
    }

    fn selection(&mut self) -> ExtentSet {
        if self.dice.chance(20) {
            return ExtentSet::from_extent(Extent::new(0, self.blocks()));
        }
        let blocks = usize::try_from(self.blocks()).expect("small");
        (0..=self.dice.below(6))
            .map(|_| {
                let start = self.dice.below(blocks) as u64;
                Extent::new(start, (start + 1 + self.dice.below(40) as u64).min(self.blocks()))
            })
            .collect()
    }

    fn pick(&mut self) -> Option<u32> {
        let live: Vec<u32> =
            self.snapshots.iter().filter(|(_, s)| !s.is_deleted).map(|(&e, _)| e).collect();
        (!live.is_empty()).then(|| live[self.dice.below(live.len())])
    }

    fn step(&mut self) {
        let choice = self.dice.below(100);
        trace!("choice {choice}");
        match choice {
            0..50 => {
                let longest = if self.dice.chance(10) { 600_000 } else { 3 * self.block };
                let (at, length) = self.range(longest);
                let byte = u8::try_from(self.dice.below(256)).expect("a byte");
                let data = vec![byte; length];
                let fua = self.dice.chance(5);
                self.volume.write(at as u64, &data, fua).expect("write");
                self.live[at..at + length].copy_from_slice(&data);
                self.touch(at, length);
            }
            50..58 => {
                let (at, length) = self.range(300_000);
                let punch = self.dice.chance(50);
                self.volume.write_zeroes(at as u64, length as u64, punch, false).expect("zero");
                self.live[at..at + length].fill(0);
                self.touch(at, length);
            }
            58..63 => self.trim(),
            63..68 => self.volume.flush().expect("flush"),
            68..78 if self.snapshots.len() < 12 => self.take_snapshot(),
            78..83 => self.delete_something(),
            83..86 => self.narrow(),
            86..89 => self.restore(),
            89..93 => self.reopen(true),
            93..96 => self.reopen(false),
            96 => self.grow(),
            97 => self.volume.maintain(Effort::All).expect("upkeep"),
            _ => self.check(),
        }
    }

    /// A discard may do nothing or zero: what it did is what is there.
    fn trim(&mut self) {
        let (at, length) = self.range(100_000);
        // Blocks that a snapshot did not have count as changed anyway: it could not be told what
        // the discard did.
        let oldest = self.snapshots.values().map(|s| s.content.len() / self.block).min();
        if oldest.is_some_and(|blocks| at + length > blocks * self.block) {
            return;
        }
        self.volume.trim(at as u64, length as u64, false).expect("trim");
        let mut now = vec![0; length];
        self.volume.read(at as u64, &mut now).expect("read");
        let mut at_byte = at;
        while at_byte < at + length {
            let end = ((at_byte / self.block + 1) * self.block).min(at + length);
            let (old, new) = (&self.live[at_byte..end], &now[at_byte - at..end - at]);
            if old != new {
                assert!(new.iter().all(|&b| b == 0), "a discard gives zeroes or nothing");
                self.live[at_byte..end].fill(0);
            }
            at_byte = end;
        }
        // Whether the blocks count as changed is the engine's choice: allow both.
        let trimmed = (at / self.block) as u64..((at + length).div_ceil(self.block)) as u64;
        for (&epoch, snapshot) in &mut self.snapshots {
            let told = self.volume.changed(epoch, None).expect("changed");
            let told = trimmed.clone().filter(|&b| told.contains(b));
            snapshot.changed.extend(told);
        }
    }

    fn take_snapshot(&mut self) {
        let selection = self.selection();
        let taken = self.volume.snapshot(SnapshotRequest {
            selection: selection.clone(),
            low: ExtentSet::new(),
            meta: b"name".to_vec(),
            pause_limit: Duration::from_secs(2),
        });
        let epoch = taken.expect("snapshot").epoch;
        self.remember(epoch, selection);
    }

    fn remember(&mut self, epoch: u32, selection: ExtentSet) {
        let snapshot = Snapshot {
            content: self.live.clone(),
            selection,
            changed: BTreeSet::new(),
            excess: BTreeSet::new(),
            bookmark: None,
            is_deleted: false,
        };
        trace!("epoch {epoch} {:?}", snapshot.selection);
        self.snapshots.insert(epoch, snapshot);
    }

    fn delete_something(&mut self) {
        let Some(epoch) = self.pick() else { return };
        if self.volume.restore_status().is_some() {
            return;
        }
        let bookmark = self.dice.chance(30);
        let snapshot = self.snapshots.get_mut(&epoch).expect("picked");
        if bookmark {
            self.volume.bookmark(epoch, b"mark".to_vec()).expect("bookmark");
            snapshot.bookmark = Some(snapshot.selection.clone());
        }
        self.volume.delete_snapshot(epoch, false).expect("delete");
        snapshot.is_deleted = true;
        let marks: Vec<u32> = self
            .snapshots
            .iter()
            .filter(|(_, s)| s.is_deleted && s.bookmark.is_some())
            .map(|(&e, _)| e)
            .collect();
        if marks.len() > 2 {
            self.volume.delete_bookmark(marks[0]).expect("delete bookmark");
            self.snapshots.get_mut(&marks[0]).expect("there").bookmark = None;
        }
        self.snapshots.retain(|_, s| !s.is_deleted || s.bookmark.is_some());
        if self.snapshots.is_empty() {
            let kept = self.volume.store_bytes().expect("store bytes");
            assert_eq!(kept, 0, "nothing is kept for nobody");
        }
    }

    fn narrow(&mut self) {
        let Some(epoch) = self.pick() else { return };
        if self.volume.restore_status().is_some() {
            return;
        }
        let selection = self.selection();
        self.volume.narrow(epoch, &selection).expect("narrow");
        let snapshot = self.snapshots.get_mut(&epoch).expect("picked");
        snapshot.selection = snapshot.selection.intersection(&selection);
    }

    fn restore(&mut self) {
        let Some(source) = self.pick() else { return };
        let wanted = self.selection();
        trace!("restore {source} {wanted:?}");
        let everything = ExtentSet::from_extent(Extent::new(0, self.blocks()));
        let status = self.volume.restore(&RestoreRequest {
            source_epoch: source,
            request: wanted.clone(),
            safety_selection: everything.clone(),
            safety_low: ExtentSet::new(),
            meta: b"safety".to_vec(),
            pause_limit: Duration::from_secs(2),
        });
        let safety = status.expect("restore").safety_epoch;
        self.remember(safety, everything);
        let from = &self.snapshots[&source];
        let blocks = from.selection.intersection(&wanted);
        let written: Vec<u64> = blocks
            .iter()
            .flat_map(|e| e.start..e.end)
            .filter(|b| from.changed.contains(b))
            .collect();
        let content = from.content.clone();
        for block in written {
            let at = usize::try_from(block).expect("small") * self.block;
            let end = (at + self.block).min(content.len());
            self.live[at..end].copy_from_slice(&content[at..end]);
            self.touch(at, end - at);
        }
        self.check_live();
        if self.dice.chance(50) {
            let done = self.volume.wait_restored(Duration::from_secs(20)).expect("restore");
            assert!(done, "a restore ends");
        }
    }

    fn grow(&mut self) {
        let size = self.size() + self.dice.below(3 * self.block);
        let disk = std::fs::File::options().write(true).open(self.dir.join("disk.img"));
        disk.expect("origin").set_len(size as u64).expect("growth");
        assert_eq!(self.volume.resize().expect("resize"), size as u64);
        self.live.resize(size, 0);
    }

    fn reopen(&mut self, clean: bool) {
        if clean {
            let is_restoring = self.volume.restore_status().is_some();
            self.volume.close().expect("close");
            if !is_restoring {
                let origin = std::fs::read(self.dir.join("disk.img")).expect("origin");
                assert!(origin == self.live, "the origin is complete after a clean stop");
            }
        } else {
            self.volume.abandon();
            if self.cache == Cache::WriteThrough {
                let span = region_blocks(self.block as u64);
                for snapshot in self.snapshots.values_mut() {
                    let regions = snapshot.changed.iter().map(|block| block / span);
                    let blocks = regions.flat_map(|number| number * span..(number + 1) * span);
                    snapshot.excess.extend(blocks);
                }
            }
        }
        self.volume = open(request(self.dir, self.cache, self.has_background)).expect("reopen");
    }

    fn check_live(&self) {
        let mut now = vec![0xA5; self.size()];
        self.volume.read(0, &mut now).expect("read");
        for (block, (old, new)) in
            self.live.chunks(self.block).zip(now.chunks(self.block)).enumerate()
        {
            let at = old.iter().zip(new).position(|(a, b)| a != b);
            assert!(at.is_none(), "live block {block} differs from byte {at:?} on");
        }
    }

    fn check(&mut self) {
        self.check_live();
        let is_restoring = self.volume.restore_status().is_some();
        for (&epoch, snapshot) in &self.snapshots {
            let tracked = match (&snapshot.bookmark, snapshot.is_deleted) {
                (Some(baseline), true) => baseline.clone(),
                (Some(baseline), false) => baseline.union(&snapshot.selection),
                (None, _) => snapshot.selection.clone(),
            };
            let told = self.volume.changed(epoch, None).expect("changed");
            let truth: ExtentSet = snapshot.changed.iter().map(|&b| Extent::single(b)).collect();
            let mut truth = truth.intersection(&tracked);
            if self.size() > snapshot.content.len() {
                // What did not exist at the instant is new, the rest of its last block included.
                let old_end = (snapshot.content.len() / self.block) as u64;
                let grown = ExtentSet::from_extent(Extent::new(old_end, self.blocks()));
                truth = truth.union(&grown);
            }
            let (missed, extra) = (truth.difference(&told), told.difference(&truth));
            assert!(missed.is_empty(), "P5: {epoch} misses {missed:?}");
            let excess = snapshot.excess.iter().map(|&b| Extent::single(b)).collect();
            let extra = extra.difference(&excess);
            assert!(is_restoring || extra.is_empty(), "{epoch} claims {extra:?} changed");
            if snapshot.is_deleted {
                continue;
            }
            let view = View::open(&self.volume, epoch, ExcludedReads::Zeros).expect("view");
            assert_eq!(view.size_bytes(), snapshot.content.len() as u64);
            let mut now = vec![0xA5; snapshot.content.len()];
            view.read(0, &mut now).expect("view read");
            for (block, new) in now.chunks(self.block).enumerate() {
                let at = block * self.block;
                if snapshot.selection.contains(block as u64) {
                    let old = &snapshot.content[at..at + new.len()];
                    assert!(old == new, "P2: snapshot {epoch} block {block} is wrong");
                } else {
                    assert!(new.iter().all(|&b| b == 0), "not selected reads as zeroes");
                }
            }
            if self.dice.chance(20) {
                let (at, length) = (self.dice.below(now.len() - 1), 700);
                let length = length.min(now.len() - at);
                let mut part = vec![0; length];
                view.read(at as u64, &mut part).expect("unaligned view read");
                assert_eq!(part, now[at..at + length]);
                let strict = View::open(&self.volume, epoch, ExcludedReads::Error).expect("view");
                let read = strict.read(at as u64, &mut part);
                let blocks = (at / self.block) as u64..(at + length).div_ceil(self.block) as u64;
                let is_all = blocks.clone().all(|b| snapshot.selection.contains(b));
                assert_eq!(read.is_ok(), is_all, "what is not selected is an error if asked for");
            }
        }
    }
}

fn run(seed: u64) {
    let base = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
    let dir = tempfile::tempdir_in(base).expect("temporary directory");
    let mut dice = Dice::new(seed);
    let block = [4096, 4096, 4096, 8192, 16_384, 65_536][dice.below(6)];
    let odd = if dice.chance(50) { dice.below(block) } else { 0 };
    let size = (100 + dice.below(300)) * 4096 / block * block + odd;
    let mut live = vec![0; size];
    let filled = dice.below(size);
    for (at, byte) in live[..filled].iter_mut().enumerate() {
        *byte = u8::try_from(at / block % 251).expect("a byte");
    }
    std::fs::write(dir.path().join("disk.img"), &live).expect("origin");
    create(&CreateRequest {
        store: dir.path().join("store"),
        origin: dir.path().join("disk.img"),
        block_size: block as u64,
        meta: Vec::new(),
        policy: StorePolicy::default(),
    })
    .expect("create");
    let cache = if dice.chance(20) { Cache::WriteThrough } else { Cache::WriteBack };
    let has_background = dice.chance(60);
    let volume = open(request(dir.path(), cache, has_background)).expect("open");
    let snapshots = BTreeMap::new();
    let mut run =
        Run { block, dice, dir: dir.path(), volume, live, snapshots, cache, has_background };
    for _ in 0..150 {
        run.step();
        if is_traced() {
            // Checking must not change what the seed does.
            let saved = run.dice.clone();
            run.check();
            run.dice = saved;
        }
    }
    run.check();
    run.reopen(true);
    run.check();
    run.volume.close().expect("close");
}

#[test]
fn every_snapshot_and_the_live_disk_equal_the_model() {
    let from_env = |name: &str| std::env::var(name).ok().and_then(|s| s.parse().ok());
    if let Some(seed) = from_env("STILLBLOCK_SEED") {
        return run(seed);
    }
    let count: u64 = from_env("STILLBLOCK_SEEDS").unwrap_or(60);
    for seed in 1..=count {
        let result = std::panic::catch_unwind(|| run(seed));
        assert!(result.is_ok(), "STILLBLOCK_SEED={seed} fails");
    }
}

//! What a compacted journal says, against what the whole one says.

use super::*;
use crate::epochs::Epochs;
use crate::journal::{Group, GroupMember, Journal, OnFull, OriginIdentity, Settled, StorePolicy};
use crate::log::format::{EpochHeader, RestoreHeader, SegmentHeader};
use crate::log::scan::{FoundSegment, Scan};
use crate::storage::FileDirectory;
use crate::volume::decided::{Decided, restoring_of};
use proptest::prelude::*;
use std::sync::Arc;

const BLOCKS: u64 = 40;

fn identity() -> OriginIdentity {
    OriginIdentity { device: 1, inode: 2, bytes: BLOCKS * 4096, modified_unix_ns: 3 }
}

fn blocks(seed: u8) -> ExtentSet {
    let start = u64::from(seed) % 20;
    ExtentSet::from_extent(Extent::new(start, start + 1 + u64::from(seed) / 20))
}

/// Something that is decided, about the instant that a number leads to.
#[derive(Debug, Clone, Copy)]
enum Step {
    Snapshot,
    Restore,
    EndRestore,
    Abort,
    Meta,
    Narrow,
    NarrowAs,
    Delete,
    Bookmark,
    DeleteBookmark,
    Lost,
    GivenUp,
    Suspect,
    Accept,
    Resize,
    Policy,
    VolumeMeta,
    Fail,
    Recover,
    Reopen,
    Restored,
    GroupBegun,
    GroupWithoutHeader,
    GroupCommitted,
    GroupDenied,
}

fn step() -> impl Strategy<Value = Step> {
    use Step::*;
    let often = [Snapshot, Snapshot, Narrow, NarrowAs, NarrowAs, Delete, Delete, Meta];
    let others = [
        Restore,
        EndRestore,
        Abort,
        Bookmark,
        Bookmark,
        DeleteBookmark,
        Lost,
        GivenUp,
        Suspect,
        Accept,
        Resize,
        Policy,
        VolumeMeta,
        Fail,
        Recover,
        Reopen,
        Restored,
        GroupBegun,
        GroupWithoutHeader,
        GroupCommitted,
        GroupDenied,
    ];
    prop::sample::select([&often[..], &others[..]].concat())
}

/// A volume of which only what is decided is real.
struct Life {
    _dir: tempfile::TempDir,
    directory: Arc<FileDirectory>,
    journal: Journal,
    /// Headers that may be found in the log, of whatever became of their instants.
    scan: Scan,
    highest: u32,
    restoring: u32,
    generation: u64,
}

impl Life {
    fn new() -> Self {
        let base = std::path::Path::new("/dev/shm");
        let dir = if base.is_dir() { tempfile::tempdir_in(base) } else { tempfile::tempdir() };
        let dir = dir.expect("temporary directory");
        let directory = Arc::new(FileDirectory::new(dir.path()));
        let created = Entry::Created {
            uuid: [7; 16],
            block_size: 4096,
            origin: b"/disk".to_vec(),
            identity: identity(),
            meta: b"first".to_vec(),
        };
        let journal = Journal::create(directory.clone(), &created).expect("made");
        let (scan, highest) = (Scan::default(), 0);
        let mut life =
            Self { _dir: dir, directory, journal, scan, highest, restoring: 0, generation: 0 };
        life.reopen();
        life
    }

    fn say(&mut self, entry: &Entry) {
        self.journal.append(entry).expect("appended");
    }

    fn reopen(&mut self) {
        self.say(&Entry::Closed { identity: identity(), next_batch: 9 });
        self.generation += 1;
        let (generation, origin) = (self.generation, b"/disk".to_vec());
        let buffer = vec![u8::try_from(generation % 250).expect("small")];
        self.say(&Entry::Opened { boot_id: [1; 16], generation, origin, buffer });
    }

    fn decided(&self) -> Decided {
        let (journal, entries) = Journal::open(self.directory.clone()).expect("read");
        Decided::from(entries, journal.first_sequence()).expect("whole")
    }

    fn epochs(&self) -> Epochs {
        self.decided().epochs(&self.scan)
    }

    fn header(&mut self, restore: Option<RestoreHeader>, seed: u8) {
        self.highest += 1;
        let epoch = self.highest;
        let header = SegmentHeader {
            uuid: [7; 16],
            segment: epoch,
            epoch,
            ordinal: 0,
            previous_segment: epoch - 1,
            previous_end_page: 0,
            first_batch: 1,
            epoch_header_bytes: 0,
            epoch_header_crc: 0,
            merged: None,
            takes_regions: false,
        };
        let epoch_header = Some(EpochHeader {
            epoch,
            predecessor: epoch - 1,
            created_unix_ns: 0,
            origin_bytes: BLOCKS * 4096,
            selection: ExtentSet::from_extent(Extent::new(0, BLOCKS)),
            restore,
            meta: vec![seed],
            low: ExtentSet::new(),
        });
        self.scan.segments.insert(epoch, FoundSegment { header, epoch_header });
    }

    fn begin_group(&mut self) {
        let epoch = self.highest + 1;
        let member = |uuid: u8| GroupMember { uuid: [uuid; 16], epoch, store: b"/s".to_vec() };
        let id = [u8::try_from(epoch % 250).expect("small"); 16];
        let group = Group { id, members: vec![member(1), member(7)] };
        self.say(&Entry::GroupBegun { epoch, group });
    }

    /// Of the oldest group whose end is not known.
    fn end_group(&mut self, is_committed: bool) {
        let groups = self.decided().groups;
        if let Some((&epoch, group)) = groups.first_key_value() {
            self.say(&Entry::GroupDecided { epoch, id: group.id, is_committed });
        }
    }

    fn run(&mut self, step: Step, seed: u8) {
        let epochs = self.epochs();
        let live: Vec<u32> = epochs.0.keys().copied().collect();
        let is_decided = |epoch: u32| epochs.0[&epoch].undecided.is_empty();
        let known = epochs.snapshots().map(|(epoch, _)| epoch);
        let snapshots: Vec<u32> = known.filter(|&epoch| is_decided(epoch)).collect();
        let pick = |of: &[u32]| of.get(usize::from(seed) % of.len().max(1)).copied();
        let is_held = |epoch: u32| epoch == self.restoring || epoch + 1 == self.restoring;
        let snapshot = pick(&snapshots).filter(|&epoch| !is_held(epoch));
        let meta = vec![seed, seed];
        match (step, snapshot) {
            (Step::Snapshot, _) => self.header(None, seed),
            (Step::Restore, Some(source_epoch)) if self.restoring == 0 => {
                let blocks = ExtentSet::from_extent(Extent::new(0, BLOCKS));
                self.header(Some(RestoreHeader { source_epoch, blocks }), seed);
                self.restoring = self.highest;
            }
            (Step::EndRestore, _) if self.restoring > 0 => {
                self.say(&Entry::RestoreEnded { epoch: self.restoring });
                self.restoring = 0;
            }
            (Step::Restored, _) if self.restoring > 0 => {
                self.say(&Entry::Restored { epoch: self.restoring, blocks: blocks(seed) });
            }
            (Step::Abort, _) => {
                self.header(None, seed);
                self.say(&Entry::Aborted { epoch: self.highest });
            }
            (Step::Meta, Some(epoch)) => self.say(&Entry::EpochMeta { epoch, meta }),
            (Step::Narrow | Step::NarrowAs, Some(epoch)) => {
                let known = epochs.0[&epoch].selection.clone().expect("a snapshot");
                let selection = known.difference(&blocks(seed));
                let low = selection.intersection(&blocks(seed / 2));
                let settled = matches!(step, Step::NarrowAs).then_some(Settled { meta, low });
                self.say(&Entry::Narrowed { epoch, selection, settled });
            }
            (Step::Delete, Some(epoch)) => self.say(&Entry::Deleted { epoch }),
            (Step::Bookmark, Some(epoch)) => self.say(&Entry::Bookmarked { epoch, meta }),
            (Step::DeleteBookmark, _) => {
                let marked = epochs.0.iter().find(|(_, e)| e.bookmark.is_some());
                if let Some((&epoch, _)) = marked {
                    self.say(&Entry::BookmarkDeleted { epoch });
                }
            }
            (Step::Lost | Step::GivenUp, _) => {
                let end = self.decided().block_count();
                let blocks = match seed % 6 {
                    0 => ExtentSet::from_extent(Extent::new(0, end / 2)),
                    1 => ExtentSet::from_extent(Extent::new(end / 2, end)),
                    2 => ExtentSet::from_extent(Extent::new(0, end)),
                    _ => blocks(seed),
                };
                // Records are of epochs that have begun.
                let epoch = self.scan.segments.keys().next_back().copied().unwrap_or(0);
                let is_lost = matches!(step, Step::Lost);
                let lost = Entry::Lost { epoch, blocks: blocks.clone() };
                self.say(&if is_lost { lost } else { Entry::GivenUp { epoch, blocks } });
            }
            (Step::Suspect, _) => {
                if let Some(&epoch) = live.last() {
                    self.say(&Entry::Suspect { epoch, reason: meta });
                }
            }
            (Step::Accept, _) => {
                if let Some(&epoch) = live.last() {
                    self.say(&Entry::Accepted { epoch, note: meta });
                }
            }
            (Step::Resize, _) => {
                let bytes = (BLOCKS + u64::from(seed)) * 4096;
                self.say(&Entry::Resized { epoch: self.highest, bytes });
            }
            (Step::Policy, _) => {
                let limit_bytes = u64::from(seed) << 20;
                self.say(&Entry::Policy(StorePolicy { on_full: OnFull::Hold, limit_bytes }));
            }
            (Step::VolumeMeta, _) => self.say(&Entry::VolumeMeta(meta)),
            (Step::Fail, _) => self.say(&Entry::OriginFailed { reason: meta }),
            (Step::Recover, _) => self.say(&Entry::Recovered),
            (Step::Reopen, _) => self.reopen(),
            (Step::GroupBegun, _) => {
                self.begin_group();
                self.header(None, seed);
            }
            (Step::GroupWithoutHeader, _) => {
                self.begin_group();
                self.highest += 1;
            }
            (Step::GroupCommitted, _) => self.end_group(true),
            (Step::GroupDenied, _) => self.end_group(false),
            _ => {}
        }
    }

    fn standing(&self) -> Standing {
        let live = self.epochs().0.keys().copied().collect();
        Standing { live, epoch_max: self.highest, restoring: self.restoring }
    }

    /// The records there were, and those there are now.
    fn compact(&mut self) -> (u64, u64) {
        self.say(&Entry::Freed);
        let seen = self.journal.seen();
        let outlines = outlines_of(&seen, &|| false).expect("read");
        assert!(!owes_space(&seen, &outlines).expect("read"));
        let earlier = compacted_before(&seen, &outlines).expect("read");
        let mut plan = plan(&outlines, &self.standing(), &earlier);
        plan.merge_losses(&seen, &outlines, &|| false).expect("read");
        verify(&seen, &outlines, &|| false).expect("intact");
        let before = to_u64(outlines.len());
        if plan.records() >= before {
            return (before, before);
        }
        let mut new = seen.begin(plan.records(), plan.bytes).expect("begun");
        fill(&seen, &outlines, &plan, &mut new, &|| false).expect("written");
        self.journal.replace(new).expect("replaced");
        assert_eq!(self.journal.seen().bytes(), plan.bytes, "what was asked for");
        (before, plan.records())
    }

    /// All that anybody asks of a journal.
    fn told(&self) -> String {
        let decided = self.decided();
        let mut epochs = decided.epochs(&self.scan);
        // It is asked of snapshots only.
        for epoch in epochs.0.values_mut().filter(|epoch| epoch.selection.is_none()) {
            epoch.low = Arc::default();
        }
        let first = epochs.first().unwrap_or(u32::MAX);
        // Headers of what is live are always found, others perhaps not.
        let last = epochs.0.keys().next_back().copied().unwrap_or(0);
        let sum = |of: &[(u32, ExtentSet)]| {
            let mut sums: BTreeMap<u32, ExtentSet> = BTreeMap::new();
            for (epoch, blocks) in of.iter().filter(|(epoch, _)| *epoch >= first) {
                let known = sums.entry(*epoch).or_default();
                *known = known.union(blocks);
            }
            sums
        };
        let restoring = restoring_of(&self.scan, &decided, BLOCKS + 300);
        let restoring = restoring.map(|r| (r.safety_epoch, r.blocks.to_set()));
        let is_of_group = |entry: &&Entry| matches!(entry, Entry::GroupDecided { .. });
        let ends: Vec<&Entry> = decided.entries.iter().filter(is_of_group).collect();
        format!(
            "{ends:?} {:?} {epochs:?} \
             {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {restoring:?} {} {} {} {:?}",
            decided.groups,
            sum(&decided.lost),
            sum(&decided.given_up),
            decided.policy,
            decided.meta,
            decided.origin,
            decided.opened,
            decided.closed,
            decided.origin_failure,
            decided.size_bytes,
            decided.generation,
            decided.epoch_max.max(last),
            decided.selections_when_freed(&self.scan).0,
        )
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// A compacted journal says what the one before it said, whatever was decided before, and
    /// whatever is decided afterwards means the same after either.
    #[test]
    fn a_compacted_journal_says_what_the_whole_one_says(
        steps in prop::collection::vec((step(), any::<u8>()), 1..60),
        later in prop::collection::vec((step(), any::<u8>()), 0..10),
    ) {
        let (mut whole, mut compacted) = (Life::new(), Life::new());
        for &(step, seed) in &steps {
            whole.run(step, seed);
            compacted.run(step, seed);
            if seed % 16 == 0 {
                whole.say(&Entry::Freed);
                compacted.compact();
            }
        }
        whole.say(&Entry::Freed);
        compacted.compact();
        prop_assert_eq!(compacted.told(), whole.told());
        prop_assert!(compacted.decided().epoch_max >= whole.decided().epoch_max);
        for &(step, seed) in &later {
            whole.run(step, seed);
            compacted.run(step, seed);
            prop_assert_eq!(compacted.told(), whole.told());
        }
        compacted.say(&Entry::Freed);
        let again = compacted.compact();
        prop_assert!(again.1 <= again.0);
    }
}

/// Whatever happened before, a journal of a volume with nothing in it has a few records.
#[test]
fn what_is_gone_takes_no_records() {
    let mut life = Life::new();
    for seed in 0..40 {
        for step in [Step::Snapshot, Step::NarrowAs, Step::Bookmark, Step::Delete] {
            life.run(step, seed);
        }
        life.run(Step::DeleteBookmark, seed);
        life.run(Step::Reopen, seed);
    }
    let (before, after) = life.compact();
    assert!(before > 240 && after == 4, "{before} records, then {after}");
    assert_eq!(life.decided().epoch_max, life.highest, "no number is given out again");
}

/// A loss of the whole disk says that records are gone: two halves do not, in one record either.
#[test]
fn losses_that_are_the_whole_disk_together_do_not_say_that_records_are_gone() {
    let gone = "records of epoch 1 are gone";
    let mut life = Life::new();
    life.run(Step::Snapshot, 0);
    for seed in 0..40 {
        life.run(Step::Meta, seed);
    }
    for seed in [1, 0, 3, 0] {
        life.run(Step::Lost, seed);
        life.run(Step::GivenUp, seed);
    }
    // Both halves, and the first one twice.
    let then = life.told();
    assert!(!then.contains(gone));
    let (before, after) = life.compact();
    assert!(after + 5 < before && life.journal.first_sequence() > 1, "{before}, then {after}");
    assert_eq!(life.told(), then);
    life.run(Step::Lost, 2);
    let then = life.told();
    assert!(then.contains(gone), "{then}");
    for seed in 0..40 {
        life.run(Step::Policy, seed);
    }
    let then = (life.told(), life.compact(), life.told());
    assert_eq!(then.0, then.2);
}

#[test]
fn merged_losses_stay_below_the_limit_of_a_record_and_lose_no_block() {
    let mut merge = Merge::default();
    let whole = ExtentSet::from_extent(Extent::new(0, 10));
    let odd: ExtentSet = (0..20).map(|at| Extent::single(2 * at + 1)).collect();
    let parts = [&odd, &whole, &odd.intersection(&whole), &odd];
    for part in parts {
        merge.add(part);
    }
    let sets = merge.finish(4);
    assert!(sets.contains(&whole) && sets.iter().all(|set| set.as_slice().len() <= 4));
    assert_eq!(sets.len(), 1 + 15_usize.div_ceil(4));
    let all = sets.iter().fold(ExtentSet::new(), |all, set| all.union(set));
    assert_eq!(all, odd.union(&whole));
}

#[test]
fn a_volume_that_is_closed_does_not_wait_for_its_losses_to_be_merged() {
    let mut life = Life::new();
    life.run(Step::Snapshot, 0);
    life.run(Step::Lost, 3);
    let seen = life.journal.seen();
    assert!(matches!(outlines_of(&seen, &|| true), Err(Error::Closed)));
    let outlines = outlines_of(&seen, &|| false).expect("read");
    let mut plan = plan(&outlines, &life.standing(), &Compacted::default());
    let stopped = plan.merge_losses(&seen, &outlines, &|| true);
    assert!(matches!(stopped, Err(Error::Closed)));
    assert!(matches!(verify(&seen, &outlines, &|| true), Err(Error::Closed)));
}

//! Writing the journal anew with what still matters, so that it does not grow with the age of the
//! volume (`docs/adr/0011-journal-compaction.md`).
//!
//! A record is left out if nothing that is ever asked of the journal depends on it: a later one says
//! the same thing otherwise, or nothing begins any more at the instant it is about. Everything else
//! is copied as it is, in its order.

use super::{Committer, Effort, Upkeep, Volume};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::journal::{
    Compacted, Entry, Outline, RECORD_UNIT, RESERVE_BYTES, Replacement, Seen, kind,
};
use crate::number::to_u64;
use crate::sabotage::{Rule, is_broken};
use crate::sync::MutexGuard;
use std::collections::{BTreeMap, BTreeSet};

/// A smaller journal is left alone: it is read in a few milliseconds.
pub(super) const WORTH_BYTES: u64 = 4 << 20;
/// Merged losses have so many extents a record at most, which is 16 MiB: a record has a limit.
const LOSS_EXTENTS_MAX: usize = 1 << 20;

/// What there is at the moment at which the journal was looked at.
#[derive(Debug, Default)]
struct Standing {
    /// Instants at which a snapshot or a bookmark begins.
    live: BTreeSet<u32>,
    epoch_max: u32,
    /// Safety snapshot of the restore that is not done, 0 if there is none.
    restoring: u32,
}

/// What the new journal has. Numbers are those of outlines.
#[derive(Debug, Default)]
struct Plan {
    compacted: Compacted,
    /// Records that are copied.
    kept: BTreeSet<usize>,
    /// Losses, by epoch, and the records that are made of them.
    lost: BTreeMap<u32, Vec<usize>>,
    given_up: BTreeMap<u32, Vec<usize>>,
    losses: Vec<Entry>,
    /// Bytes of all records, without losses until those are merged.
    bytes: u64,
}

impl Plan {
    fn records(&self) -> u64 {
        // The first one, and Freed.
        to_u64(self.kept.len() + self.losses.len()) + 2
    }

    /// Make few records of all losses. Reads those there are.
    fn merge_losses(
        &mut self,
        seen: &Seen,
        outlines: &[Outline],
        is_over: IsOver<'_>,
    ) -> Result<()> {
        let merged = |records: &[usize]| -> Result<Vec<ExtentSet>> {
            let mut merge = Merge::default();
            for &at in records {
                go_on(is_over)?;
                if let Entry::Lost { blocks, .. } | Entry::GivenUp { blocks, .. } =
                    seen.entry(&outlines[at])?
                {
                    merge.add(&blocks);
                }
            }
            Ok(merge.finish(LOSS_EXTENTS_MAX))
        };
        for (&epoch, records) in &self.lost {
            let sets = merged(records)?.into_iter();
            self.losses.extend(sets.map(|blocks| Entry::Lost { epoch, blocks }));
        }
        for (&epoch, records) in &self.given_up {
            let sets = merged(records)?.into_iter();
            self.losses.extend(sets.map(|blocks| Entry::GivenUp { epoch, blocks }));
        }
        self.bytes += self.losses.iter().map(Entry::record_bytes).sum::<u64>();
        Ok(())
    }

    /// True if it is shorter than what there is; where nobody asks for it, at most half as long.
    fn is_worth_it(&self, seen: &Seen, outlines: &[Outline], effort: Effort) -> bool {
        let is_shorter = self.records() < to_u64(outlines.len()) && self.bytes < seen.bytes();
        is_shorter && (effort == Effort::All || 2 * self.bytes <= seen.bytes())
    }
}

/// True once the volume is being closed: whoever has the upkeep lock is waited for.
type IsOver<'a> = &'a dyn Fn() -> bool;

fn go_on(is_over: IsOver<'_>) -> Result<()> {
    if is_over() { Err(Error::Closed) } else { Ok(()) }
}

/// Losses of one epoch, of which few are made. One that is the whole disk says more than its blocks:
/// that records of the epoch are gone. So whatever may be that, now or when the disk has another
/// size, stays as it is, and is never made of others.
#[derive(Default)]
struct Merge {
    /// Ends of those that are all blocks before one.
    whole: BTreeSet<u64>,
    /// Of all others. Put in order once: how long it takes must not grow with records times extents.
    extents: Vec<Extent>,
}

impl Merge {
    fn add(&mut self, blocks: &ExtentSet) {
        match blocks.as_slice() {
            [all] if all.start == 0 => drop(self.whole.insert(all.end)),
            others => self.extents.extend(others),
        }
    }

    /// Sets of at most so many extents, two or more, that have all blocks together.
    fn finish(self, extents_max: usize) -> Vec<ExtentSet> {
        let before = |end: u64| ExtentSet::from_extent(Extent::new(0, end));
        let covered = before(self.whole.last().copied().unwrap_or(0));
        let mut sets: Vec<ExtentSet> = self.whole.into_iter().map(before).collect();
        let others = ExtentSet::from_unsorted(self.extents).difference(&covered);
        match others.as_slice() {
            [all] if all.start == 0 => {
                sets.extend([before(1), ExtentSet::from_extent(Extent::new(1, all.end))]);
            }
            others => {
                let some = |extents: &[Extent]| extents.iter().copied().collect();
                sets.extend(others.chunks(extents_max).map(some));
            }
        }
        sets
    }
}

/// Of one live instant, the last record that says each thing.
#[derive(Debug, Default)]
struct Words {
    meta: Option<usize>,
    low: Option<usize>,
    selection: Option<usize>,
    bookmark: Option<usize>,
    /// What the snapshot selected when it was bookmarked.
    baseline: Option<usize>,
    deleted: Option<usize>,
    /// What doubts the instant, and the last doubt that was accepted, with who accepted it.
    suspect: Option<usize>,
    accepted: Option<(usize, usize)>,
}

impl Words {
    fn kept(&self) -> impl Iterator<Item = usize> {
        let of_snapshot = self.deleted.is_none().then_some([self.low, self.selection]);
        let others = [self.meta, self.bookmark, self.baseline, self.deleted, self.suspect];
        let accepted = self.accepted.map(|(doubt, accepted)| [Some(doubt), Some(accepted)]);
        let sets = of_snapshot.into_iter().flatten().chain(others);
        sets.chain(accepted.into_iter().flatten()).flatten()
    }
}

/// True if something was deleted or narrowed and its space is still to be given back: then it matters
/// what was selected before, and how far it is.
fn owes_space(outlines: &[Outline]) -> bool {
    let is_decision = |o: &Outline| {
        let kinds = [kind::NARROWED, kind::NARROWED_AS, kind::DELETED, kind::BOOKMARK_DELETED];
        kinds.contains(&o.kind)
    };
    let freed = outlines.iter().rposition(|o| o.kind == kind::FREED);
    outlines.iter().rposition(is_decision) > freed
}

/// What of a journal matters, `earlier` being what its first record says if it was compacted before.
fn plan(outlines: &[Outline], standing: &Standing, earlier: &Compacted) -> Plan {
    let mut words: BTreeMap<u32, Words> =
        standing.live.iter().map(|&epoch| (epoch, Words::default())).collect();
    let mut plan = Plan::default();
    let mut last: BTreeMap<u8, usize> = BTreeMap::new();
    let mut aborted = Vec::new();
    let first_live = standing.live.first().copied().unwrap_or(u32::MAX);
    for (at, outline) in outlines.iter().enumerate() {
        let (kind, epoch) = (outline.kind, outline.epoch);
        let is_known = epoch <= standing.epoch_max;
        match kind {
            kind::COMPACTED | kind::FREED | kind::FREEING => {}
            kind::CREATED => drop(plan.kept.insert(at)),
            kind::OPENED => {
                last.remove(&kind::CLOSED);
                last.insert(kind, at);
            }
            kind::RECOVERED => drop(last.remove(&kind::ORIGIN_FAILED)),
            kind::CLOSED
            | kind::VOLUME_META
            | kind::POLICY
            | kind::RESIZED
            | kind::ORIGIN_FAILED => drop(last.insert(kind, at)),
            _ if !is_known => drop(plan.kept.insert(at)),
            kind::ABORTED => aborted.push(number(epoch)),
            // Losses before the first live instant concern nobody.
            kind::LOST if epoch >= first_live => plan.lost.entry(epoch).or_default().push(at),
            kind::GIVEN_UP if epoch >= first_live => {
                plan.given_up.entry(epoch).or_default().push(at);
            }
            kind::LOST | kind::GIVEN_UP | kind::RESTORE_ENDED => {}
            kind::RESTORED => {
                if epoch == standing.restoring {
                    plan.kept.insert(at);
                }
            }
            kind::SUSPECT => {
                words.range_mut(..=epoch).for_each(|(_, words)| words.suspect = Some(at));
            }
            kind::ACCEPTED => {
                for words in words.range_mut(..=epoch).map(|(_, words)| words) {
                    let accepted = words.suspect.take().map(|doubt| (doubt, at));
                    words.accepted = accepted.or(words.accepted);
                }
            }
            _ => {
                if let Some(words) = words.get_mut(&epoch) {
                    words.take(kind, at);
                }
            }
        }
    }
    plan.kept.extend(last.into_values());
    plan.kept.extend(words.values().flat_map(Words::kept));
    let aborted = ExtentSet::from_unsorted(aborted).union(&earlier.aborted);
    let live = standing.live.iter().map(|&epoch| number(epoch)).collect();
    let mut epoch_max = standing.epoch_max;
    if is_broken(Rule::HighestEpochKept) {
        epoch_max = standing.live.last().copied().unwrap_or(0);
    }
    let all = ExtentSet::from_extent(Extent::new(1, u64::from(epoch_max) + 1));
    let gone = all.difference(&live).difference(&aborted);
    plan.compacted = Compacted { epoch_max, restoring: standing.restoring, gone, aborted };
    let records = plan.kept.iter().map(|&at| outlines[at].bytes);
    let first = Entry::Compacted(plan.compacted.clone()).record_bytes();
    plan.bytes = records.sum::<u64>() + first + RECORD_UNIT;
    plan
}

impl Words {
    fn take(&mut self, kind: u8, at: usize) {
        match kind {
            kind::EPOCH_META => self.meta = Some(at),
            kind::NARROWED => self.selection = Some(at),
            kind::NARROWED_AS => {
                (self.selection, self.meta, self.low) = (Some(at), Some(at), Some(at));
            }
            kind::DELETED => self.deleted = Some(at),
            kind::BOOKMARKED => (self.bookmark, self.baseline) = (Some(at), self.selection),
            kind::BOOKMARK_DELETED => (self.bookmark, self.baseline) = (None, None),
            _ => {}
        }
    }
}

/// An epoch number, to be put in a set.
fn number(epoch: u32) -> Extent {
    Extent::single(u64::from(epoch))
}

/// Write what the plan says, and make it durable.
fn fill(
    seen: &Seen,
    outlines: &[Outline],
    plan: &Plan,
    new: &mut Replacement,
    is_over: IsOver<'_>,
) -> Result<()> {
    new.push(&Entry::Compacted(plan.compacted.clone()))?;
    for &at in &plan.kept {
        go_on(is_over)?;
        seen.copy(&outlines[at], new)?;
    }
    for entry in &plan.losses {
        go_on(is_over)?;
        new.push(entry)?;
    }
    // All that was decided before: nothing is owed.
    new.push(&Entry::Freed)?;
    Ok(new.sync()?)
}

fn outlines_of(seen: &Seen, is_over: IsOver<'_>) -> Result<Vec<Outline>> {
    let mut outlines = Vec::new();
    for outline in seen.outlines() {
        go_on(is_over)?;
        outlines.push(outline?);
    }
    Ok(outlines)
}

/// That all records are intact, those that are left out as well: only a whole journal is replaced.
fn verify(seen: &Seen, outlines: &[Outline], is_over: IsOver<'_>) -> Result<()> {
    for outline in outlines {
        go_on(is_over)?;
        seen.verify(outline)?;
    }
    Ok(())
}

/// What the first record says if the journal was compacted before.
fn compacted_before(seen: &Seen, outlines: &[Outline]) -> Result<Compacted> {
    let first = outlines.first().filter(|first| first.kind == kind::COMPACTED);
    Ok(match first.map(|first| seen.entry(first)).transpose()? {
        Some(Entry::Compacted(earlier)) => earlier,
        _ => Compacted::default(),
    })
}

impl Volume {
    /// Write the journal anew if less than half of it matters. Nobody waits for it but at its end,
    /// when what was decided meanwhile is added and the new one put in its place.
    pub(super) fn compact_journal(
        &self,
        _upkeep: &mut MutexGuard<'_, Upkeep>,
        effort: Effort,
    ) -> Result<()> {
        let Some((seen, standing)) = self.look_at_journal(effort)? else { return Ok(()) };
        let is_over = || self.state.lock().is_closed;
        let outlines = outlines_of(&seen, &is_over)?;
        if owes_space(&outlines) {
            return Ok(());
        }
        let mut plan = plan(&outlines, &standing, &compacted_before(&seen, &outlines)?);
        if !plan.is_worth_it(&seen, &outlines, effort) {
            return Ok(());
        }
        plan.merge_losses(&seen, &outlines, &is_over)?;
        if !plan.is_worth_it(&seen, &outlines, effort) {
            return Ok(());
        }
        verify(&seen, &outlines, &is_over)?;
        let is_there = self.take_for_upkeep(plan.bytes + RESERVE_BYTES)?;
        let replace = || self.replace_journal(&seen, &outlines, &plan, &is_over);
        let done = if is_there { replace() } else { Ok(()) };
        self.end_taking_for_upkeep();
        match done {
            // Nobody needs it so much that anything else should go without.
            Err(Error::StoreFull(_)) => Ok(()),
            done => done,
        }
    }

    /// The journal and what it comes to, at one moment; `None` if there is nothing to be done.
    fn look_at_journal(&self, effort: Effort) -> Result<Option<(Seen, Standing)>> {
        let mut committer = self.role()?;
        committer.journal.heal()?;
        let seen = committer.journal.seen();
        let is_small = seen.bytes() < WORTH_BYTES && effort == Effort::Due;
        // An instant that failed and is not denied yet is neither gone nor live.
        if is_small || committer.to_undo.is_some() {
            return Ok(None);
        }
        Ok(Some((seen, self.standing(&committer))))
    }

    fn standing(&self, committer: &Committer) -> Standing {
        let epochs = self.epochs.read();
        let live = epochs.0.iter().filter(|(_, epoch)| epoch.is_live());
        let live = live.map(|(&number, _)| number).collect();
        drop(epochs);
        let state = self.state.lock();
        let restoring = state.restoring.as_ref().map_or(0, |restoring| restoring.safety_epoch);
        Standing { live, epoch_max: committer.epoch_max, restoring }
    }

    fn replace_journal(
        &self,
        seen: &Seen,
        outlines: &[Outline],
        plan: &Plan,
        is_over: IsOver<'_>,
    ) -> Result<()> {
        let mut new = seen.begin(plan.records(), plan.bytes)?;
        let filled = fill(seen, outlines, plan, &mut new, is_over);
        match filled.and_then(|()| self.role()) {
            Ok(mut committer) => Ok(committer.journal.replace(new)?),
            Err(error) => {
                seen.give_up();
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epochs::Epochs;
    use crate::journal::{Journal, OnFull, OriginIdentity, Settled, StorePolicy};
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

        fn run(&mut self, step: Step, seed: u8) {
            let epochs = self.epochs();
            let live: Vec<u32> = epochs.0.keys().copied().collect();
            let snapshots: Vec<u32> = epochs.snapshots().map(|(epoch, _)| epoch).collect();
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
                    let epoch = self.highest;
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
            assert!(!owes_space(&outlines));
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
            format!(
                "{epochs:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {restoring:?} {} {} {} {:?}",
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
}

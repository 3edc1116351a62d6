//! Writing the journal anew with what still matters, so that it does not grow with the age of the
//! volume (`docs/adr/0011-journal-compaction.md`).
//!
//! A record is left out if nothing that is ever asked of the journal depends on it: a later one says
//! the same thing otherwise, or nothing begins any more at the instant it is about. Everything else
//! is copied as it is, in its order.

mod losses;

use super::{Committer, Effort, Upkeep, Volume};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::journal::{
    Compacted, Entry, Outline, RECORD_UNIT, RESERVE_BYTES, Replacement, Seen, kind,
};
use crate::number::to_u64;
use crate::sabotage::{Rule, is_broken};
use crate::sync::MutexGuard;
use losses::Merge;
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
fn owes_space(seen: &Seen, outlines: &[Outline]) -> Result<bool> {
    let freed = outlines.iter().rposition(|o| o.kind == kind::FREED);
    for outline in &outlines[freed.map_or(0, |at| at + 1)..] {
        let is_decision = match outline.kind {
            kind::NARROWED | kind::NARROWED_AS | kind::DELETED | kind::BOOKMARK_DELETED => true,
            // As a deletion, if the group never was.
            kind::GROUP_DECIDED => {
                matches!(seen.entry(outline)?, Entry::GroupDecided { is_committed: false, .. })
            }
            _ => false,
        };
        if is_decision {
            return Ok(true);
        }
    }
    Ok(false)
}

/// By epoch, the records of groups whose end is not said.
fn undecided_groups(outlines: &[Outline]) -> BTreeMap<u32, usize> {
    let mut begun = BTreeMap::new();
    for (at, outline) in outlines.iter().enumerate() {
        match outline.kind {
            kind::GROUP_BEGUN => drop(begun.insert(outline.epoch, at)),
            kind::GROUP_DECIDED => drop(begun.remove(&outline.epoch)),
            _ => {}
        }
    }
    begun
}

/// What of a journal matters, `earlier` being what its first record says if it was compacted before.
fn plan(outlines: &[Outline], standing: &Standing, earlier: &Compacted) -> Plan {
    let begun = undecided_groups(outlines);
    // Whoever may turn out to be live is as good as live.
    let live = standing.live.iter().chain(begun.keys());
    let mut words: BTreeMap<u32, Words> = live.map(|&epoch| (epoch, Words::default())).collect();
    let mut plan = Plan::default();
    let mut last: BTreeMap<u8, usize> = BTreeMap::new();
    let mut aborted = Vec::new();
    let first_live = words.keys().next().copied().unwrap_or(u32::MAX);
    for (at, outline) in outlines.iter().enumerate() {
        let (kind, epoch) = (outline.kind, outline.epoch);
        let is_known = epoch <= standing.epoch_max;
        match kind {
            kind::COMPACTED | kind::FREED | kind::FREEING | kind::GROUP_BEGUN => {}
            kind::GROUP_DECIDED if is_broken(Rule::GroupEndsKept) => {}
            // How a group ended other stores may ask, as long as there are any.
            kind::CREATED | kind::GROUP_DECIDED => drop(plan.kept.insert(at)),
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
    plan.kept.extend(begun.values());
    plan.kept.extend(words.values().flat_map(Words::kept));
    let aborted = ExtentSet::from_unsorted(aborted).union(&earlier.aborted);
    let live = words.keys().map(|&epoch| number(epoch)).collect();
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
        if owes_space(&seen, &outlines)? {
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
mod tests;

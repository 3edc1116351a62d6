//! Giving back the space that nobody needs any more.
//!
//! In this order: the decision is durable in the journal; readers of what it concerns are gone; the
//! space is punched; the journal says so. It goes over the blocks in steps, and the role is held for
//! none of them. Interrupted, it goes on at the next opening from where the journal says it was.

use super::past::index_error;
use super::{Upkeep, Volume};
use crate::epochs::Selections;
use crate::error::{Error, Result};
use crate::index::copies::for_each_copy;
use crate::index::entry::Entry as Record;
use crate::index::parts::{Parts, Walk};
use crate::journal::Entry;
use crate::log::format::{PAGE, Position};
use crate::number::to_u64;
use crate::sabotage::{Rule, is_broken};

/// Segment files removed under one hold of the role.
const REMOVED_AT_ONCE: usize = 8;
/// The journal notes how far it is whenever so much was looked at since: a second of work, about.
const NOTE_ENTRIES: usize = 8 << 20;
/// Or given back.
const NOTE_BYTES: u64 = 4 << 30;

/// What is to be given back, as it was decided.
struct Owed {
    /// What snapshots selected when nothing was owed, and select now.
    before: Selections,
    now: Selections,
    /// Decisions that this is about: how many there were, and the journal's last record.
    decisions: u64,
    sequence: u64,
    /// Blocks before this one are done.
    from: u64,
    parts: Parts,
    /// Segments of epochs that nobody needs.
    unneeded: Vec<u32>,
}

impl Owed {
    /// Payloads among the records that somebody needed and nobody needs now.
    fn unneeded_of(&self, records: &[Record]) -> Vec<u64> {
        let mut places = Vec::new();
        for_each_copy(records, |record, previous| {
            let previous =
                if is_broken(Rule::OlderSnapshotsKeepCopies) { record.epoch - 1 } else { previous };
            let (block, epoch) = (record.blocks.start, record.epoch);
            let was_needed = self.before.needs(block, epoch, previous);
            if was_needed && !self.now.needs(block, epoch, previous) {
                places.push(record.position.0);
            }
        });
        places.retain(|&place| !self.unneeded.contains(&Position(place).segment()));
        places
    }
}

impl Volume {
    /// Give back everything that is owed; tells how many bytes that was.
    pub(super) fn free_space(&self) -> Result<u64> {
        let mut freed = 0;
        self.mending(&mut self.upkeep.lock(), |upkeep| self.free_owed(upkeep, &mut freed))?;
        Ok(freed)
    }

    fn free_owed(&self, upkeep: &mut Upkeep, freed: &mut u64) -> Result<()> {
        loop {
            let Some(owed) = self.begin_freeing(upkeep)? else { return Ok(()) };
            // Whoever found a copy before the decision has read it once this lock was had.
            drop(self.punching.write());
            *freed += self.remove_segments(&owed.unneeded)?;
            *freed += self.punch_unneeded(&owed)?;
            let mut committer = self.role()?;
            upkeep.decisions = owed.decisions;
            upkeep.resume_at = 0;
            // Snapshots taken meanwhile stay as they are: nothing of theirs was looked at.
            committer.settled.0.retain(|epoch, _| !owed.before.0.contains_key(epoch));
            committer.settled.0.extend(owed.now.0);
            // What was decided meanwhile is still owed.
            if committer.decisions == owed.decisions {
                committer.journal.append(&Entry::Freed)?;
                self.recount(&mut committer);
                return Ok(());
            }
        }
    }

    fn begin_freeing(&self, upkeep: &mut Upkeep) -> Result<Option<Owed>> {
        let mut committer = self.role()?;
        if upkeep.decisions == committer.decisions {
            return Ok(None);
        }
        let (now, first) = {
            let epochs = self.epochs.read();
            (epochs.selections(), epochs.first())
        };
        let current = committer.epoch;
        let files = self.index.write().forget_before(first.unwrap_or(current + 1).min(current + 1));
        let unneeded: Vec<u32> = committer
            .segments
            .iter()
            .filter(|&(_, &epoch)| first.is_none_or(|first| epoch < first))
            .map(|(&segment, _)| segment)
            .collect();
        committer.log.close_if(&unneeded);
        self.seal(&mut committer).map_err(Error::store("sealing the log"))?;
        let (decisions, sequence) = (committer.decisions, committer.journal.last_sequence());
        let before = committer.settled.clone();
        drop(committer);
        self.remove_runs(&files)?;
        // Where the process before was says nothing of what was decided since the opening.
        let from = if decisions == upkeep.decisions + 1 { upkeep.resume_at } else { 0 };
        Ok(Some(Owed {
            before,
            now,
            decisions,
            sequence,
            from,
            parts: self.index.read().parts(),
            unneeded,
        }))
    }

    /// Remove index files that know nothing any more.
    pub(super) fn remove_runs(&self, numbers: &[u32]) -> Result<()> {
        let directory = self.segments.directory();
        for &number in numbers {
            let removed = directory.remove(&crate::index::run::run_name(number));
            removed.map_err(Error::store("removing an index file"))?;
        }
        if numbers.is_empty() {
            return Ok(());
        }
        directory.sync().map_err(Error::store("store directory"))
    }

    fn remove_segments(&self, segments: &[u32]) -> Result<u64> {
        let mut freed = 0;
        for group in segments.chunks(REMOVED_AT_ONCE) {
            let mut committer = self.role()?;
            for &segment in group {
                let removing = || Error::store("removing a log segment");
                let file = self.segments.get(segment).map_err(removing())?;
                freed += file.allocated_bytes().map_err(removing())?;
                self.segments.remove(segment).map_err(removing())?;
                committer.segments.remove(&segment);
            }
        }
        if !segments.is_empty() {
            self.segments.directory().sync().map_err(Error::store("store directory"))?;
        }
        Ok(freed)
    }

    fn punch_unneeded(&self, owed: &Owed) -> Result<u64> {
        let end = self.block_count(self.size_bytes());
        let mut walk = Walk::new(owed.from, end);
        let mut entries = Vec::new();
        let (mut freed, mut looked_at, mut noted_bytes) = (0, 0, 0);
        while owed.parts.next_window(&mut walk, &mut entries).map_err(index_error)? {
            if self.state.lock().is_closed {
                return Err(Error::Closed);
            }
            let mut places = owed.unneeded_of(&entries);
            freed += self.punch(&mut places)?;
            looked_at += entries.len();
            if looked_at >= NOTE_ENTRIES || freed - noted_bytes >= NOTE_BYTES {
                (looked_at, noted_bytes) = (0, freed);
                let (sequence, block) = (owed.sequence, walk.position());
                self.role()?.journal.append(&Entry::Freeing { sequence, block })?;
            }
        }
        Ok(freed)
    }

    pub(super) fn punch(&self, places: &mut [u64]) -> Result<u64> {
        let pages_a_block = self.block_size / PAGE;
        places.sort_unstable();
        let mut freed = 0;
        for run in places.chunk_by(|&a, &b| b == a + pages_a_block) {
            let position = Position(run[0]);
            let file = self.segments.get(position.segment());
            let file = file.map_err(Error::store("log segment"))?;
            let bytes = to_u64(run.len()) * self.block_size;
            let punched = file.discard_at(position.offset_bytes(), bytes);
            punched.map_err(Error::store("giving space back"))?;
            freed += bytes;
        }
        Ok(freed)
    }
}

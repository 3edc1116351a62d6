//! Room in the store: log space is allocated before a first change that needs it is acknowledged,
//! and what happens when there is none is decided then, by the volume's policy.
//!
//! Every slot in the write buffer counts against the space that is allocated ahead. Changes past
//! the buffer and restores, which acknowledge nothing before they are recorded, claim theirs first.
//! Only the holder of the committer role extends it, so only it can say that the store is full.

use super::past::Patience;
use super::{COMMIT_AGE, Committer, State, Volume};
use crate::error::{Error, Result};
use crate::journal::{Entry, OnFull, StorePolicy};
use crate::log::format::{BATCH_BLOCKS_MAX, BATCH_HEADER_BYTES, DESCRIPTOR_BYTES, PAGE};
use crate::log::writer::{LogWriter, MARK_PAGES};
use crate::number::to_u64;
use crate::sync::MutexGuard;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Log space that is allocated ahead at most: a quarter of a segment, so that segments end well
/// filled.
const AHEAD_PAGES_MAX: u64 = (16 << 20) / PAGE;
/// Pages of descriptors that the largest batch has, before and behind its payload.
const HEADS_PAGES_MAX: u64 = 8;
/// Batches beyond those the slots fill: one under way when a slot is taken, one for slots from
/// before an instant.
const BATCHES_EXTRA: u64 = 2;
/// Held writes look for room this often: a disk that grew or files of others that went tell nobody.
const HELD_LOOK: Duration = Duration::from_secs(1);
/// A store below this could not even hold its marks and a few epochs.
pub const LIMIT_BYTES_MIN: u64 = 4 << 20;

/// What requests know of the room in the store.
#[derive(Default)]
pub(super) struct Room {
    pub(super) policy: StorePolicy,
    /// Pages allocated in the log for originals that are still to come.
    ahead_pages: u64,
    /// The last attempt to get more failed, so: empty if it did not.
    full: String,
    /// Writes that wait for room.
    held: u64,
    /// Nobody waits any more: whoever serves the volume is about to stop.
    is_ending: bool,
}

impl Room {
    pub(super) fn new(policy: StorePolicy) -> Self {
        Self { policy, ..Self::default() }
    }
}

/// How full the store is, and what happens when it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreUsage {
    /// What was decided.
    pub policy: StorePolicy,
    /// Bytes the store takes for what it keeps.
    pub used_bytes: u64,
    /// Bytes beside those that are allocated for what may come.
    pub ahead_bytes: u64,
    /// Bytes it may take: the limit, or what its filesystem lets it have.
    pub capacity_bytes: u64,
    /// A first change would find no room now.
    pub is_full: bool,
    /// Writes that wait for room.
    pub held_writes: u64,
    /// Why not even a loss can be recorded; empty if it can.
    pub failure: String,
}

/// Whether the log has space for a change that is not acknowledged yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// It is there, and taken.
    Keep,
    /// There is none; the snapshots lose the originals.
    Lose,
    /// There is none; the change has to wait.
    Wait,
}

/// Pages of a batch.
pub(super) fn batch_pages(descriptors: u64, payload_pages: u64) -> u64 {
    let head = to_u64(BATCH_HEADER_BYTES) + descriptors * to_u64(DESCRIPTOR_BYTES);
    2 * head.div_ceil(PAGE) + payload_pages
}

pub(super) fn check_policy(policy: StorePolicy) -> Result<()> {
    if (1..LIMIT_BYTES_MIN).contains(&policy.limit_bytes) {
        return Err(Error::Usage(format!(
            "a store limit of {} bytes is too small; at least {LIMIT_BYTES_MIN} are needed",
            policy.limit_bytes
        )));
    }
    Ok(())
}

impl State {
    /// A write to the block needs log space that no slot of its epoch has taken yet.
    fn needs_log(&self, block: u64) -> bool {
        let has_slot = || self.buffer.of_block(block).any(|(_, info)| info.epoch == self.epoch);
        self.unsettled.get(block) && !has_slot()
    }

    pub(super) fn is_store_short(&self) -> bool {
        !self.room.full.is_empty() || !self.store_failure.is_empty()
    }
}

impl Volume {
    pub(super) fn block_pages(&self) -> u64 {
        self.block_size / PAGE
    }

    /// What so many slots may take, however they are divided into batches.
    pub(super) fn pages_for(&self, slots: usize) -> u64 {
        let (slots, most) = (to_u64(slots), to_u64(BATCH_BLOCKS_MAX));
        let batches = slots.div_ceil(most) + BATCHES_EXTRA;
        if slots == 0 { 0 } else { slots * self.block_pages() + batches * HEADS_PAGES_MAX }
    }

    /// True if a slot for the block may be acknowledged: log space is there, none is needed, or the
    /// policy lets the snapshot lose the block.
    pub(super) fn may_take_slot(&self, state: &State, block: u64) -> bool {
        if !state.needs_log(block) {
            return true;
        }
        if !state.store_failure.is_empty() {
            return false;
        }
        let is_lossy = state.room.policy.on_full == OnFull::Degrade && !state.room.full.is_empty();
        is_lossy || self.pages_for(state.buffer.used() + 1) <= state.room.ahead_pages
    }

    /// Wait for log space as the policy says; then look again. False if that may take long and the
    /// caller will not wait.
    pub(super) fn wait_for_log_space<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        patience: Patience,
    ) -> Result<bool> {
        if !self.has_background {
            drop(state);
            let mut committer = self.role()?;
            self.retry_store(&mut committer);
            self.top_up(&mut committer);
            state = self.state.lock();
        }
        let is_short = state.is_store_short();
        if self.has_background {
            self.kick(&mut state);
        }
        if is_short {
            match state.room.policy.on_full {
                OnFull::Hold if patience == Patience::Try => return Ok(false),
                OnFull::Hold => {}
                OnFull::Degrade if state.store_failure.is_empty() => return Ok(true),
                OnFull::Degrade | OnFull::Fail => {
                    return Err(Self::refusal(&state, &state.room.full));
                }
            }
        } else if !self.has_background {
            return Ok(true);
        }
        if state.is_closed || (is_short && state.room.is_ending) {
            return Err(Error::Closed);
        }
        let longest = if is_short && self.has_background { HELD_LOOK } else { COMMIT_AGE };
        state.room.held += u64::from(is_short);
        self.room.wait_for(&mut state, longest);
        state.room.held -= u64::from(is_short);
        Ok(true)
    }

    /// What a write is told that is not done.
    fn refusal(state: &State, reason: &str) -> Error {
        let limit = state.room.policy.limit_bytes;
        let limit = if limit == 0 { String::new() } else { format!(" (limit {limit} bytes)") };
        if state.store_failure.is_empty() {
            return Error::StoreFull(format!(
                "the store is full{limit}: {reason}; the write was not done; delete a snapshot, \
                 give the store room or raise --store-limit"
            ));
        }
        Error::Store {
            what: "first changes cannot be recorded".into(),
            source: io::Error::other(state.store_failure.clone()),
        }
    }

    /// True if a first change would be held now.
    pub fn may_hold(&self) -> bool {
        let state = self.state.lock();
        state.room.policy.on_full == OnFull::Hold && state.is_store_short()
    }

    /// Let writes wait for room, or let those that wait fail: they would keep a server from
    /// stopping.
    pub fn set_holding(&self, may_wait: bool) {
        self.state.lock().room.is_ending = !may_wait;
        self.room.notify_all();
    }

    /// Hold the caller, who has no role, until the store may have room again.
    pub(super) fn wait_held(&self) -> Result<()> {
        let mut state = self.state.lock();
        if state.is_closed || state.room.is_ending {
            return Err(Error::Closed);
        }
        state.room.held += 1;
        self.room.wait_for(&mut state, HELD_LOOK);
        state.room.held -= 1;
        Ok(())
    }

    /// Take log space for a change that is not acknowledged yet, beside what slots have taken.
    pub(super) fn claim(
        &self,
        committer: &mut Committer,
        descriptors: u64,
        pending_blocks: u64,
    ) -> Result<Claim> {
        if pending_blocks == 0 {
            return Ok(Claim::Keep);
        }
        let pages = batch_pages(descriptors, pending_blocks * self.block_pages());
        let mut refused = None;
        for is_last in [false, true] {
            let wanted = match self.take_ahead(pages) {
                Ok(()) => return Ok(Claim::Keep),
                Err(wanted) => wanted,
            };
            if wanted <= LogWriter::ROOM_PAGES_MAX {
                refused = self.extend(committer, wanted, wanted).err();
                if refused.is_none() {
                    continue;
                }
            }
            if !is_last {
                let epoch = committer.epoch;
                self.commit_until(committer, epoch, u64::MAX, None)?;
            }
        }
        // Room was made, and slots took it meanwhile: it is asked again.
        let Some(reason) = refused else { return Ok(Claim::Wait) };
        let state = self.state.lock();
        match state.room.policy.on_full {
            OnFull::Degrade => Ok(Claim::Lose),
            OnFull::Hold => Ok(Claim::Wait),
            OnFull::Fail => Err(Self::refusal(&state, &reason.to_string())),
        }
    }

    /// Take so many pages of what is allocated ahead, beside what slots have taken; tells how many
    /// there would have to be if there are fewer.
    pub(super) fn take_ahead(&self, pages: u64) -> std::result::Result<(), u64> {
        let mut state = self.state.lock();
        let wanted = self.pages_for(state.buffer.used()) + pages;
        if wanted > state.room.ahead_pages {
            return Err(wanted);
        }
        // Without an open epoch there is no end to it.
        if state.room.ahead_pages != u64::MAX {
            state.room.ahead_pages -= pages;
        }
        Ok(())
    }

    /// Allocate for the slots there are, one more, and those that may come.
    pub(super) fn top_up(&self, committer: &mut Committer) {
        let (used, admitted, is_instant) = {
            let state = self.state.lock();
            (state.buffer.used(), state.admitted_slots, state.epoch != committer.epoch)
        };
        if is_instant {
            // What is taken now counts against the epoch to come.
            return;
        }
        let must = self.pages_for(used + 1).min(LogWriter::ROOM_PAGES_MAX);
        let capacity = self.state.lock().buffer.capacity();
        let nice = self.pages_for(admitted.min(capacity)).clamp(must, AHEAD_PAGES_MAX.max(must));
        if committer.log.room_pages() >= nice / 2 && committer.log.growth_for(must) == 0 {
            self.publish_room(committer, None);
        } else {
            // Requests know; what it means is theirs to decide.
            let _ = self.extend(committer, must, nice);
        }
    }

    /// Have `must` pages of room, `nice` if possible; requests know what came of it. The store is
    /// full when not even another slot finds room.
    pub(super) fn extend(&self, committer: &mut Committer, must: u64, nice: u64) -> io::Result<()> {
        let extended = self.try_extend(committer, must, nice);
        let one_more = self.pages_for(self.state.lock().buffer.used() + 1);
        let is_full = committer.log.room_pages() < one_more;
        self.publish_room(committer, extended.as_ref().err().filter(|_| is_full));
        extended
    }

    pub(super) fn try_extend(
        &self,
        committer: &mut Committer,
        must: u64,
        nice: u64,
    ) -> io::Result<()> {
        if committer.to_undo.is_some() {
            return Err(io::Error::other("an instant that failed is not undone yet"));
        }
        let mut last = None;
        for wanted in [nice, (nice / 4).max(must), must] {
            let growth = committer.log.growth_for(wanted);
            if growth == 0 {
                return Ok(());
            }
            let grown = self.allow_growth(committer, growth);
            match grown.and_then(|()| committer.log.grow(wanted)) {
                Ok(()) => {
                    committer.used_bytes += growth;
                    return Ok(());
                }
                Err(error) => last = Some(error),
            }
        }
        last.map_or(Ok(()), Err)
    }

    /// An error if the store may not take so many bytes more.
    fn allow_growth(&self, committer: &mut Committer, bytes: u64) -> io::Result<()> {
        if bytes <= self.growth_left(committer)? {
            return Ok(());
        }
        // What was counted may have been allocated before, or given back since.
        self.count_used(committer)?;
        let left = self.growth_left(committer)?;
        if bytes <= left {
            return Ok(());
        }
        let what = format!("{bytes} bytes more are wanted and {left} may be taken");
        Err(io::Error::new(io::ErrorKind::StorageFull, what))
    }

    /// Bytes the store may grow by: up to its limit, and not into what a sparse origin on the same
    /// filesystem still needs.
    fn growth_left(&self, committer: &Committer) -> io::Result<u64> {
        let free = self.segments.directory().free_bytes()?;
        let left = free.saturating_sub(self.origin_reserve()?);
        let limit = self.state.lock().room.policy.limit_bytes;
        let under_limit = limit.saturating_sub(committer.used_bytes);
        Ok(if limit == 0 { left } else { left.min(under_limit) })
    }

    /// What is not the store's: what a sparse origin beside it needs; or, where it needs more than
    /// there is, half of what was free when the volume was opened.
    fn origin_reserve(&self) -> io::Result<u64> {
        let need = self.origin_device.needs_beside(&self.store_path)?;
        Ok(self.origin_share.map_or(need, |share| need.min(share)))
    }

    /// Look how much the store takes.
    pub(super) fn count_used(&self, committer: &mut Committer) -> io::Result<()> {
        let kept = committer.journal.allocated_bytes()? + self.log_bytes(committer)?;
        committer.used_bytes = kept + committer.upkeep_bytes + self.clones_bytes()?;
        Ok(())
    }

    /// Take room for what upkeep writes, of so many bytes in all; false if the store has too little.
    /// Upkeep takes in all no more than it leaves: nobody is to lose anything because of it.
    pub(super) fn take_for_upkeep(&self, bytes: u64) -> Result<bool> {
        let mut committer = self.role()?;
        let more = bytes.saturating_sub(committer.upkeep_bytes);
        let is_there = more == 0 || self.allow_growth(&mut committer, more + bytes).is_ok();
        if is_there {
            committer.upkeep_bytes += more;
            committer.used_bytes += more;
        }
        Ok(is_there)
    }

    /// Take room for what is written to a clone; false if the store has too little. Clones leave
    /// an eighth of what the store may take: a rehearsal is to cost no snapshot anything.
    pub(crate) fn take_for_clone(&self, bytes: u64) -> Result<bool> {
        let mut committer = self.role()?;
        let left = self.growth_left(&committer).map_err(Error::store("looking for room"))?;
        let reserve = committer.used_bytes.saturating_add(left) / 8;
        let is_there = self.allow_growth(&mut committer, bytes.saturating_add(reserve)).is_ok();
        if is_there {
            committer.used_bytes += bytes;
        }
        Ok(is_there)
    }

    /// What upkeep wrote is counted like all else from now on, or is gone.
    pub(super) fn end_taking_for_upkeep(&self) {
        // A volume that is closed counts nothing any more.
        if let Ok(mut committer) = self.role() {
            committer.upkeep_bytes = 0;
            self.recount(&mut committer);
        }
    }

    /// Bytes the log and its index files take, what is allocated ahead included.
    pub(super) fn log_bytes(&self, committer: &Committer) -> io::Result<u64> {
        let numbers = committer.segments.keys();
        let segments = numbers.map(|&segment| self.segments.get(segment)?.allocated_bytes());
        let layers = Arc::clone(self.index.read().layers());
        let files = layers.iter().map(|layer| layer.run.allocated_bytes());
        Ok(segments.sum::<io::Result<u64>>()? + files.sum::<io::Result<u64>>()?)
    }

    /// Tell requests how much room there is, and why there is not more. Not while an instant is
    /// taken: what comes now counts against the next epoch's segment.
    pub(super) fn publish_room(&self, committer: &Committer, full: Option<&io::Error>) {
        let mut state = self.state.lock();
        if state.epoch != committer.epoch {
            return;
        }
        let ahead = committer.log.room_pages();
        let full = full.map(ToString::to_string).unwrap_or_default();
        // Who waits asks for this: told of no change, it would only ask again.
        let is_news =
            ahead > state.room.ahead_pages || full.is_empty() != state.room.full.is_empty();
        state.room.ahead_pages = ahead;
        state.room.full = full;
        drop(state);
        if is_news {
            self.room.notify_all();
        }
    }

    /// As [`Self::publish_room`], for whoever has the state locked and found room.
    pub(super) fn note_room(state: &mut State, committer: &Committer) {
        if state.epoch == committer.epoch {
            state.room.ahead_pages = committer.log.room_pages();
        }
    }

    /// From the flip on slots count against the segment of the epoch they begin.
    pub(super) fn note_flip(state: &mut State, room_pages: u64) {
        state.room.ahead_pages = room_pages;
        state.room.full.clear();
    }

    /// A segment for the next epoch, with space for what its first changes need; tells how many
    /// pages that are.
    pub(super) fn prepare_epoch(
        &self,
        committer: &mut Committer,
        header_bytes: u64,
    ) -> Result<u64> {
        let admitted = self.state.lock().admitted_slots;
        let must = self.pages_for(1);
        let nice = self.pages_for(admitted.min(BATCH_BLOCKS_MAX)).clamp(must, AHEAD_PAGES_MAX);
        let mut last = None;
        for (at, room) in [nice, must, must].into_iter().enumerate() {
            if at == 2 {
                self.shrink_ahead(committer);
            }
            let bytes = (2 * (1 + header_bytes.div_ceil(PAGE)) + room + MARK_PAGES) * PAGE;
            let allowed = self.allow_growth(committer, bytes);
            match allowed.and_then(|()| committer.log.prepare_epoch(header_bytes, room)) {
                Ok(()) => {
                    committer.used_bytes += bytes;
                    return Ok(room);
                }
                Err(error) => last = Some(error),
            }
        }
        let error = last.unwrap_or_else(|| io::ErrorKind::StorageFull.into());
        Err(Error::store("making the epoch's segment")(error))
    }

    /// Give back what is allocated for slots that may come, and keep what those there are need.
    fn shrink_ahead(&self, committer: &mut Committer) {
        let kept = {
            let mut state = self.state.lock();
            let kept = self.pages_for(state.buffer.used());
            state.room.ahead_pages = state.room.ahead_pages.min(kept);
            kept
        };
        committer.used_bytes = committer.used_bytes.saturating_sub(committer.log.shrink(kept));
    }

    /// Make sure that the last batch has no payload; a mark, for which room is kept.
    pub(super) fn seal(&self, committer: &mut Committer) -> io::Result<()> {
        // On a full store there is what was kept for exactly this.
        let _ = self.try_extend(committer, 0, 0);
        let Committer { log, batch, .. } = committer;
        log.seal(batch)
    }

    /// Look whether a store that failed takes records again. Nothing is trusted that was written
    /// before: what waits is written anew.
    pub(super) fn retry_store(&self, committer: &mut Committer) {
        let (is_failed, is_empty) = {
            let state = self.state.lock();
            (!state.store_failure.is_empty(), state.buffer.is_empty())
        };
        if !is_failed {
            return;
        }
        // The error is latched again where it occurs.
        if is_empty {
            let _ = self.probe_store(committer);
        } else {
            let epoch = committer.epoch;
            let _ = self.commit_until(committer, epoch, u64::MAX, None);
        }
    }

    fn probe_store(&self, committer: &mut Committer) -> Result<()> {
        self.undo_instant(committer)?;
        let epoch = committer.epoch;
        let _ = self.try_extend(committer, 0, 0);
        committer.batch.begin(epoch, 0);
        let Committer { log, batch, .. } = &mut *committer;
        if log.is_open() && log.append(batch).is_err() {
            // Its second place.
            let nothing = Entry::Lost { epoch, blocks: crate::extent::ExtentSet::new() };
            committer.journal.append(&nothing)?;
        }
        self.clear_store_failure();
        Ok(())
    }

    pub(super) fn clear_store_failure(&self) {
        let mut state = self.state.lock();
        if !state.store_failure.is_empty() {
            state.store_failure.clear();
            drop(state);
            self.room.notify_all();
        }
    }

    /// What happens when the store is full, and how much it may take; durable and in force when
    /// this returns. Writes that wait go on as it says.
    pub fn set_store_policy(&self, policy: StorePolicy) -> Result<()> {
        check_policy(policy)?;
        let mut committer = self.role()?;
        committer.journal.append(&Entry::Policy(policy))?;
        self.state.lock().room.policy = policy;
        self.shrink_ahead(&mut committer);
        self.recount(&mut committer);
        self.room.notify_all();
        Ok(())
    }

    /// After space was given back, or the rules changed: count, and let those go on who wait.
    pub(crate) fn recount(&self, committer: &mut Committer) {
        // Where a file does not tell its size the estimate stays, which errs towards full.
        let _ = self.count_used(committer);
        committer.journal.reserve();
        self.top_up(committer);
        if let Some(restoring) = &mut self.state.lock().restoring
            && restoring.unreadable.is_empty()
        {
            restoring.failure.clear();
        }
    }

    /// What happens when the store is full, and how much it may take.
    pub fn store_policy(&self) -> StorePolicy {
        self.state.lock().room.policy
    }

    /// How full the store is.
    pub fn store_usage(&self) -> Result<StoreUsage> {
        let mut committer = self.role()?;
        let counting = || Error::store("counting what the store takes");
        self.count_used(&mut committer).map_err(counting())?;
        let left = self.growth_left(&committer).map_err(counting())?;
        let ahead = committer.log.ahead_bytes();
        let used_bytes = committer.used_bytes.saturating_sub(ahead);
        drop(committer);
        let state = self.state.lock();
        Ok(StoreUsage {
            policy: state.room.policy,
            used_bytes,
            ahead_bytes: ahead,
            capacity_bytes: used_bytes.saturating_add(ahead).saturating_add(left),
            is_full: !state.room.full.is_empty(),
            held_writes: state.room.held,
            failure: state.store_failure.clone(),
        })
    }
}

//! Taking a snapshot: a flip with no I/O inside, then a commit behind it.
//!
//! From the flip on, first changes wait in the buffer while older slots go to the old epoch, the
//! origin is made durable (unchanged blocks will be read from it), and the header of the new epoch
//! is written: that header is the commit. Only then may newer slots be committed, and only then is
//! the snapshot acknowledged.

use super::commit::FrozenClasses;
use super::restore::PreparedRestore;
use super::watch::Moment;
use super::{Committer, Restoring, State, Volume};
use crate::bitmap::Bitmap;
use crate::epochs::Epoch;
use crate::error::{Error, Result};
use crate::extent::ExtentSet;
use crate::journal::Entry;
use crate::log::format::{EPOCH_HEADER_BYTES_MAX, EpochHeader};
use crate::number::to_u64;
use crate::sabotage::{Rule, is_broken};
use crate::sync::{Clock, MutexGuard, unix_ns};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Rounds in which the buffer and the origin are drained before the gate closes, so that little is
/// left after.
const DRAIN_ROUNDS: u32 = 2;

/// What to keep, and how long writers may be held.
pub struct SnapshotRequest {
    /// The blocks that matter.
    pub selection: ExtentSet,
    /// Those that matter less: given up first when the store is full.
    pub low: ExtentSet,
    /// Name, rules, receipt: kept, not looked into.
    pub meta: Vec<u8>,
    /// Beyond it the snapshot fails and writes go on.
    pub pause_limit: Duration,
}

/// A snapshot that is durable.
#[derive(Debug, Clone, Copy)]
pub struct Instant {
    /// Its number.
    pub epoch: u32,
    /// Size of the origin at the instant.
    pub size_bytes: u64,
    /// When, for people.
    pub created_unix_ns: u64,
    /// From the gate's closing to its opening.
    pub pause: Duration,
    /// Writes in flight when the gate closed; all of them are in the snapshot.
    pub in_flight: u64,
    /// From the opening of the gate until the snapshot was durable.
    pub commit: Duration,
}

/// The moment itself: what the flip saw.
struct Flip {
    /// Bits of the blocks that had slots.
    frozen: FrozenClasses,
    /// The last write before the instant.
    upto: u64,
    size_bytes: u64,
    created_unix_ns: u64,
    pause: Duration,
    in_flight: u64,
}

impl Volume {
    /// Take a snapshot of the selected blocks as they are at one instant during this call.
    pub fn snapshot(&self, request: SnapshotRequest) -> Result<Instant> {
        self.snapshot_at(request, Moment::default())
    }

    /// As [`Volume::snapshot`], at a moment that somebody prepared.
    pub fn snapshot_at(&self, request: SnapshotRequest, moment: Moment<'_>) -> Result<Instant> {
        self.told(self.role().and_then(|mut committer| {
            // Before the last look at a restore: others may begin one while regions are closed.
            self.close_regions_first(&mut committer)?;
            self.finish_restore_first(&mut committer)?;
            self.take_instant(&mut committer, request, None, moment)
        }))
    }

    /// The instant, of a snapshot or of the safety snapshot of a restore.
    pub(super) fn take_instant(
        &self,
        committer: &mut Committer,
        request: SnapshotRequest,
        restore: Option<&PreparedRestore>,
        moment: Moment<'_>,
    ) -> Result<Instant> {
        // Half of what can be read back: a restore lists its blocks beside the selection.
        let low = Arc::new(request.low.intersection(&request.selection));
        let parts = request.selection.as_slice().len() + low.as_slice().len() + 64;
        let header_bytes = to_u64(request.meta.len()) + 16 * to_u64(parts);
        if header_bytes > u64::from(EPOCH_HEADER_BYTES_MAX) / 2 {
            return Err(Error::Usage(format!(
                "a snapshot of so many parts takes {header_bytes} bytes of header, more than \
                 {}; select larger ranges",
                EPOCH_HEADER_BYTES_MAX / 2
            )));
        }
        let selection = self.share_selection(request.selection);
        let epoch = committer.epoch_max + 1;
        self.undo_instant(committer)?;
        committer.journal.heal()?;
        let room_pages = self.prepare_epoch(committer, header_bytes)?;
        let drained = self.drain_before_instant(committer);
        let flipped = drained.and_then(|()| {
            let on_flip = |state: &mut State| Self::note_flip(state, room_pages);
            self.flip(epoch, &selection, request.pause_limit, moment.quiet, on_flip)
        });
        let flip = match flipped {
            Ok(flip) => flip,
            Err(error) => {
                // If it stays it is an empty file without a header: a scan knows it for what it is,
                // and removes it.
                let _ = committer.log.discard_epoch();
                committer.log.forget_prepared();
                return Err(error);
            }
        };
        committer.epoch_max = epoch;
        let opened = Clock::now();
        if let Some(passed) = moment.passed {
            passed();
        }
        let committed = self.commit_instant(
            committer,
            epoch,
            room_pages,
            &flip,
            &selection,
            &low,
            &request.meta,
            restore,
        );
        if let Err(error) = committed {
            return Err(self.abort_instant(committer, epoch, &selection, error));
        }
        self.want_upkeep();
        // Its estimates are corrected by what is there now.
        self.recount(committer);
        Ok(Instant {
            epoch,
            size_bytes: flip.size_bytes,
            created_unix_ns: flip.created_unix_ns,
            pause: flip.pause,
            in_flight: flip.in_flight,
            commit: opened.elapsed(),
        })
    }

    /// Snapshots with equal selections share one copy in memory.
    fn share_selection(&self, selection: ExtentSet) -> Arc<ExtentSet> {
        let epochs = self.epochs.read();
        let mut known = epochs.0.values().rev().filter_map(|e| e.selection.as_ref());
        known.find(|set| ***set == selection).map_or_else(|| Arc::new(selection), Arc::clone)
    }

    /// Writes go on while most of what an instant has to wait for is done.
    fn drain_before_instant(&self, committer: &mut Committer) -> Result<()> {
        for _ in 0..DRAIN_ROUNDS {
            let sequence = self.state.lock().buffer.last_sequence();
            let epoch = committer.epoch;
            self.commit_until(committer, epoch, sequence, None)?;
            if !is_broken(Rule::OriginDurableAtInstant) {
                self.sync_origin()?;
            }
        }
        Ok(())
    }

    /// The instant: no I/O from the closing of the gate to its opening, but what is in flight
    /// already.
    fn flip(
        &self,
        epoch: u32,
        selection: &Arc<ExtentSet>,
        limit: Duration,
        quiet: Option<Duration>,
        on_flip: impl FnOnce(&mut State),
    ) -> Result<Flip> {
        let blocks = self.block_count(self.size_bytes());
        let tracked = self.epochs.read().tracked().union(selection);
        let unsettled = Bitmap::from_set(blocks, &tracked);
        // Bits change only in the hands of the committer role, which is ours: what is made of them
        // here is what they are at the flip, where both bitmaps are swapped in.
        let mut pending = self.state.lock().pending.clone();
        pending.merge(&Bitmap::from_set(blocks, selection));
        let none_covered = Bitmap::new(blocks);

        let mut state = self.state.lock();
        let closed = Clock::now();
        state.is_gate_closed = true;
        let in_flight = state.straight_in_flight;
        let is_quiet = quiet.map_or(Ok(()), |wanted| state.check_quiet(wanted));
        let drained = is_quiet.and_then(|()| self.wait_drained(&mut state, closed, limit));
        if let Err(error) = drained {
            state.is_gate_closed = false;
            drop(state);
            self.gate_opened.notify_all();
            return Err(error);
        }
        let is_drained = state.straight_in_flight == 0 || is_broken(Rule::DrainBeforeInstant);
        assert!(is_drained, "P2: no write is in flight at the instant");
        let frozen = state.freeze_classes();
        state.regions.end_epoch(none_covered);
        let old_unsettled = std::mem::replace(&mut state.unsettled, unsettled);
        let old_pending = std::mem::replace(&mut state.pending, pending);
        for &block in frozen.keys() {
            let value = selection.contains(block);
            state.pending.assign(crate::extent::Extent::single(block), value);
        }
        state.epoch = epoch;
        on_flip(&mut state);
        let upto = state.buffer.last_sequence();
        let size_bytes = state.size_bytes;
        let created_unix_ns = unix_ns();
        state.is_gate_closed = false;
        let pause = closed.elapsed();
        drop(state);
        self.gate_opened.notify_all();
        drop((old_unsettled, old_pending));
        self.counters.pause_ns_max.fetch_max(nanoseconds(pause), Ordering::Relaxed);
        Ok(Flip { frozen, upto, size_bytes, created_unix_ns, pause, in_flight })
    }

    /// Wait for straight writes in flight; they hold no slot and must reach the origin before the
    /// instant.
    fn wait_drained(
        &self,
        state: &mut MutexGuard<'_, State>,
        closed: Clock,
        limit: Duration,
    ) -> Result<()> {
        while state.straight_in_flight > 0 && !is_broken(Rule::DrainBeforeInstant) {
            let waited = self.drained.wait_until(state, closed + limit);
            if waited.timed_out() && state.straight_in_flight > 0 {
                return Err(Error::PauseTimeout(format!(
                    "{} writes did not finish within the pause limit of {} ms; no snapshot was \
                     taken, \
                     writes go on; try again or raise --pause-limit",
                    state.straight_in_flight,
                    limit.as_millis()
                )));
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // the parts of one commit, gathered by its only caller
    fn commit_instant(
        &self,
        committer: &mut Committer,
        epoch: u32,
        room_pages: u64,
        flip: &Flip,
        selection: &Arc<ExtentSet>,
        low: &Arc<ExtentSet>,
        meta: &[u8],
        restore: Option<&PreparedRestore>,
    ) -> Result<()> {
        let before = committer.epoch;
        if is_broken(Rule::HeaderBeforeNewer) {
            self.commit_until(committer, epoch, u64::MAX, None)?;
        }
        let frozen = (!is_broken(Rule::ClassesFrozen)).then_some(&flip.frozen);
        self.commit_until(committer, before, flip.upto, frozen)?;
        let unrecorded = self.record_ended(committer);
        if !is_broken(Rule::OriginDurableAtInstant) {
            self.sync_origin()?;
        }
        let restore = restore.map(|prepared| self.restore_header(prepared)).transpose()?;
        let header = EpochHeader {
            epoch,
            predecessor: before,
            created_unix_ns: flip.created_unix_ns,
            origin_bytes: flip.size_bytes,
            selection: (**selection).clone(),
            restore: restore.clone(),
            meta: meta.to_vec(),
            low: (**low).clone(),
        };
        let committed = committer.log.commit_epoch(epoch, &header.encode(), room_pages);
        let segment = committed.map_err(Error::store("writing the epoch header"))?;

        committer.segments.insert(segment, epoch);
        committer.settled.0.insert(epoch, Arc::clone(selection));
        committer.epoch = epoch;
        self.keep_ended(before, &unrecorded);
        self.index.write().close_epoch(before);
        let info = Epoch {
            origin_bytes: flip.size_bytes,
            created_unix_ns: flip.created_unix_ns,
            selection: Some(Arc::clone(selection)),
            low: Arc::clone(low),
            meta: meta.to_vec(),
            ..Epoch::default()
        };
        let mut epochs = self.epochs.write();
        epochs.0.insert(epoch, info);
        if let Some(restore) = restore {
            if let Some(source) = epochs.0.get_mut(&restore.source_epoch) {
                source.pins += 1;
            }
            if let Some(safety) = epochs.0.get_mut(&epoch) {
                safety.pins += 1;
            }
            drop(epochs);
            let mut state = self.state.lock();
            let blocks = Bitmap::from_set(self.block_count(state.size_bytes), &restore.blocks);
            let count = restore.blocks.block_count();
            state.restored += 1;
            state.restoring = Some(Restoring {
                source_epoch: restore.source_epoch,
                safety_epoch: epoch,
                blocks,
                total_blocks: count,
                remaining_blocks: count,
                unreadable: std::collections::BTreeSet::new(),
                failure: String::new(),
            });
            self.kick(&mut state);
        }
        Ok(())
    }

    /// The instant never came: its slots and bits belong to the old epoch again. Its header may be
    /// durable in spite of the error. Until that is removed or denied nothing may be recorded, and
    /// what it selects stays unsettled, so that no write reaches the origin that it would not know
    /// of: if the process ends before, the instant has come (P2).
    fn abort_instant(
        &self,
        committer: &mut Committer,
        epoch: u32,
        selection: &ExtentSet,
        error: Error,
    ) -> Error {
        committer.to_undo = Some(epoch);
        let before = committer.epoch;
        {
            let blocks = self.block_count(self.size_bytes());
            // Made before the state is locked: the registry comes first in the order of locks.
            let (mut unsettled, pending) = self.bits(before, blocks);
            unsettled.merge(&Bitmap::from_set(blocks, selection));
            let mut state = self.state.lock();
            state.store_failure = format!("a failed snapshot could not be undone: {error}");
            state.epoch = before;
            state.buffer.merge_epochs(before);
            state.regions.resume();
            state.replace_bits((unsettled, pending));
        }
        if self.undo_instant(committer).is_ok() {
            self.clear_store_failure();
        }
        self.top_up(committer);
        error
    }

    /// Deny or remove an instant that failed, if there still is one.
    pub(super) fn undo_instant(&self, committer: &mut Committer) -> Result<()> {
        let Some(epoch) = committer.to_undo else { return Ok(()) };
        let is_removed = committer.log.discard_epoch().is_ok();
        match committer.journal.append(&Entry::Aborted { epoch }) {
            Err(error) if !is_removed => return Err(error.into()),
            Ok(()) | Err(_) => committer.log.forget_prepared(),
        }
        committer.to_undo = None;
        let before = committer.epoch;
        let bits = self.bits(before, self.block_count(self.size_bytes()));
        let mut state = self.state.lock();
        state.replace_bits(bits);
        Ok(())
    }

    /// What both bitmaps are, from what is recorded and who is live.
    pub(super) fn bits(&self, current: u32, block_count: u64) -> (Bitmap, Bitmap) {
        let (selections, tracked) = {
            let epochs = self.epochs.read();
            (epochs.selections(), epochs.tracked())
        };
        let (changed_now, parts) = {
            let index = self.index.read();
            (index.changed_in_open(current), index.parts())
        };
        let mut pending = Bitmap::new(block_count);
        // What a newer snapshot selects too is pending for both or for neither: if it changed since
        // the newer one it changed since the older.
        let mut covered = ExtentSet::new();
        for (&epoch, selection) in selections.0.iter().rev() {
            let own = selection.difference(&covered);
            if own.is_empty() {
                continue;
            }
            pending.set_all(&own);
            // Where the index cannot be read more is preserved than need be, and nothing less.
            if epoch < current
                && let Ok(changed) = parts.changed(epoch, u32::MAX)
            {
                pending.clear_all(&changed.intersection(&own));
            }
            covered = covered.union(selection);
        }
        pending.clear_all(&changed_now);
        let mut unsettled = Bitmap::from_set(block_count, &tracked);
        unsettled.clear_all(&changed_now);
        (unsettled, pending)
    }
}

impl State {
    /// Take other bitmaps. They know nothing of what was written in regions: what is in them is
    /// recorded once more, which harms nobody.
    pub(super) fn replace_bits(&mut self, bits: (Bitmap, Bitmap)) {
        (self.unsettled, self.pending) = bits;
        self.regions.uncover();
    }

    /// What the slots' blocks need in the epoch that ends now.
    fn freeze_classes(&self) -> FrozenClasses {
        self.buffer.blocks().map(|block| (block, self.class(block))).collect()
    }
}

/// For the receipt: how long in whole nanoseconds.
pub fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

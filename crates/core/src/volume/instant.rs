//! Taking a snapshot: a flip with no I/O inside, then a commit behind it.
//!
//! From the flip on, first changes wait in the buffer while older slots go to the old epoch, the
//! origin is made durable (unchanged blocks will be read from it), and the header of the new epoch
//! is written: that header is the commit. Only then may newer slots be committed, and only then is
//! the snapshot acknowledged.

use super::commit::FrozenClasses;
use super::gate::{Guarded, Quiet};
use super::restore::PreparedRestore;
use super::watch::Moment;
use super::{Committer, Restoring, State, Volume};
use crate::bitmap::Bitmap;
use crate::epochs::Epoch;
use crate::error::{Error, Result};
use crate::extent::ExtentSet;
use crate::journal::Entry;
use crate::log::format::{EPOCH_HEADER_BYTES_MAX, EpochHeader, RestoreHeader};
use crate::number::to_u64;
use crate::sabotage::{Rule, is_broken};
use crate::sync::{Clock, unix_ns};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Rounds in which the buffer and the origin are drained before the gate closes, so that little is
/// left after.
pub(super) const DRAIN_ROUNDS: u32 = 2;

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

/// An instant that is about to be taken.
pub(super) struct Prepared {
    pub(super) epoch: u32,
    pub(super) selection: Arc<ExtentSet>,
    low: Arc<ExtentSet>,
    meta: Vec<u8>,
    /// Writes of which blocks wait.
    pub(super) guarded: Guarded,
    pub(super) pause_limit: Duration,
    /// Space for originals in the file of its epoch.
    room_pages: u64,
}

/// The bitmaps of the new epoch, made before the gate closes.
pub(super) struct NextBits {
    unsettled: Bitmap,
    pending: Bitmap,
    none_covered: Bitmap,
}

/// The header of an epoch that is durable.
pub(super) struct WrittenHeader {
    segment: u32,
    restore: Option<RestoreHeader>,
    /// Regions of the epoch before of which the log took nothing.
    unrecorded: Vec<u64>,
}

/// The moment itself: what the flip saw.
pub(super) struct Flip {
    /// Bits of the blocks that had slots.
    frozen: FrozenClasses,
    /// The last write before the instant.
    upto: u64,
    size_bytes: u64,
    created_unix_ns: u64,
    pub(super) pause: Duration,
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
        let prepared = self.prepare_instant(committer, request, moment.holds)?;
        let drained = self.drain_before_instant(committer);
        let flipped = drained.and_then(|()| self.flip(&prepared, moment.quiet));
        let flip = match flipped {
            Ok(flip) => flip,
            Err(error) => {
                Self::forget_instant(committer);
                return Err(error);
            }
        };
        committer.epoch_max = prepared.epoch;
        let opened = Clock::now();
        if let Some(passed) = moment.passed {
            passed();
        }
        match self.write_header(committer, &prepared, &flip, restore) {
            Ok(header) => self.begin_epoch(committer, &prepared, &flip, header, ""),
            Err(error) => {
                return Err(self.abort_instant(committer, &prepared, error));
            }
        }
        Ok(self.end_instant(committer, &prepared, &flip, opened))
    }

    /// What can be done before the gate closes, but draining: a file for the new epoch, with a name
    /// that is durable.
    pub(super) fn prepare_instant(
        &self,
        committer: &mut Committer,
        request: SnapshotRequest,
        holds: Quiet,
    ) -> Result<Prepared> {
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
        let SnapshotRequest { meta, pause_limit, .. } = request;
        let guarded = match holds {
            Quiet::Device => Guarded::All,
            Quiet::Selected if is_broken(Rule::SelectedWritersWait) => {
                Guarded::Blocks(Arc::default())
            }
            Quiet::Selected => Guarded::Blocks(Arc::clone(&selection)),
        };
        Ok(Prepared { epoch, selection, low, meta, guarded, pause_limit, room_pages })
    }

    /// There was no instant.
    pub(super) fn forget_instant(committer: &mut Committer) {
        // If it stays it is an empty file without a header: a scan knows it for what it is, and
        // removes it.
        let _ = committer.log.discard_epoch();
        committer.log.forget_prepared();
    }

    /// It is durable: tell of it.
    pub(super) fn end_instant(
        &self,
        committer: &mut Committer,
        prepared: &Prepared,
        flip: &Flip,
        opened: Clock,
    ) -> Instant {
        self.want_upkeep();
        // Its estimates are corrected by what is there now.
        self.recount(committer);
        Instant {
            epoch: prepared.epoch,
            size_bytes: flip.size_bytes,
            created_unix_ns: flip.created_unix_ns,
            pause: flip.pause,
            in_flight: flip.in_flight,
            commit: opened.elapsed(),
        }
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
            self.drain_once(committer)?;
        }
        Ok(())
    }

    pub(super) fn drain_once(&self, committer: &mut Committer) -> Result<()> {
        let sequence = self.state.lock().buffer.last_sequence();
        let epoch = committer.epoch;
        self.commit_until(committer, epoch, sequence, None)?;
        if is_broken(Rule::OriginDurableAtInstant) { Ok(()) } else { self.sync_origin() }
    }

    /// The instant: no I/O from the closing of the gate to its opening, but what is in flight
    /// already.
    fn flip(&self, prepared: &Prepared, quiet: Option<Duration>) -> Result<Flip> {
        let next = self.next_bits(&prepared.selection);
        let closed = Clock::now();
        let closing = self.close_gate(&prepared.guarded, quiet);
        let drained = closing.and_then(|count| self.wait_drained(prepared, closed).map(|()| count));
        match drained {
            Ok(in_flight) => {
                let mut flip = self.switch(prepared, next, in_flight, unix_ns());
                flip.pause = self.open_gate(closed);
                Ok(flip)
            }
            Err(error) => {
                self.open_gate(closed);
                Err(error)
            }
        }
    }

    /// Bits change only in the hands of the committer role, which is ours: what is made of them here
    /// is what they are at the flip, where both bitmaps are swapped in.
    pub(super) fn next_bits(&self, selection: &ExtentSet) -> NextBits {
        let blocks = self.block_count(self.size_bytes());
        let tracked = self.epochs.read().tracked().union(selection);
        let unsettled = Bitmap::from_set(blocks, &tracked);
        let mut pending = self.state.lock().pending.clone();
        pending.merge(&Bitmap::from_set(blocks, selection));
        let none_covered = Bitmap::new(blocks);
        NextBits { unsettled, pending, none_covered }
    }

    /// No write that has to wait is admitted from here on; tells how many are in flight. It stays
    /// closed, whatever is returned, until [`Self::open_gate`].
    pub(super) fn close_gate(&self, guarded: &Guarded, quiet: Option<Duration>) -> Result<u64> {
        let mut state = self.state.lock();
        state.gate.close(guarded.clone());
        quiet.map_or(Ok(()), |wanted| state.check_quiet(wanted))?;
        Ok(to_u64(state.in_flight.count(guarded)))
    }

    /// Writes go on; tells for how long they did not.
    pub(super) fn open_gate(&self, closed: Clock) -> Duration {
        self.state.lock().gate.open();
        let pause = closed.elapsed();
        self.gate_opened.notify_all();
        self.counters.pause_ns_max.fetch_max(nanoseconds(pause), Ordering::Relaxed);
        pause
    }

    /// From here on everything belongs to the new epoch. The gate is closed and nothing in flight.
    pub(super) fn switch(
        &self,
        prepared: &Prepared,
        next: NextBits,
        in_flight: u64,
        created_unix_ns: u64,
    ) -> Flip {
        let mut state = self.state.lock();
        let count = state.in_flight.count(&prepared.guarded);
        let is_drained = count == 0 || is_broken(Rule::DrainBeforeInstant);
        assert!(is_drained, "P2: no write to selected blocks is in flight at the instant");
        let frozen = state.freeze_classes();
        state.regions.end_epoch(next.none_covered);
        let old_unsettled = std::mem::replace(&mut state.unsettled, next.unsettled);
        let old_pending = std::mem::replace(&mut state.pending, next.pending);
        state.settle_in_flight();
        for &block in frozen.keys() {
            let value = prepared.selection.contains(block);
            state.pending.assign(crate::extent::Extent::single(block), value);
        }
        state.epoch = prepared.epoch;
        Self::note_flip(&mut state, prepared.room_pages);
        let upto = state.buffer.last_sequence();
        let size_bytes = state.size_bytes;
        drop(state);
        drop((old_unsettled, old_pending));
        let pause = Duration::ZERO;
        Flip { frozen, upto, size_bytes, created_unix_ns, pause, in_flight }
    }

    /// Wait for straight writes in flight to guarded blocks; they hold no slot and must reach the
    /// origin before the instant. `docs/adr/0013-quiet-selected.md` says why others need not.
    pub(super) fn wait_drained(&self, prepared: &Prepared, closed: Clock) -> Result<()> {
        let limit = prepared.pause_limit;
        let mut state = self.state.lock();
        loop {
            let count = state.in_flight.count(&prepared.guarded);
            if count == 0 || is_broken(Rule::DrainBeforeInstant) {
                return Ok(());
            }
            if Clock::now() >= closed + limit {
                return Err(Error::PauseTimeout(format!(
                    "{count} writes did not finish within the pause limit of {} ms; no snapshot \
                     was taken, writes go on; try again or raise --pause-limit",
                    limit.as_millis()
                )));
            }
            self.drained.wait_until(&mut state, closed + limit);
        }
    }

    /// What was written before goes to the old epoch, and the origin is made durable; then the
    /// header is: **the commit of an instant**, unless it is one of a group.
    pub(super) fn write_header(
        &self,
        committer: &mut Committer,
        prepared: &Prepared,
        flip: &Flip,
        restore: Option<&PreparedRestore>,
    ) -> Result<WrittenHeader> {
        let (before, epoch) = (committer.epoch, prepared.epoch);
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
            selection: (*prepared.selection).clone(),
            restore: restore.clone(),
            meta: prepared.meta.clone(),
            low: (*prepared.low).clone(),
        };
        let committed = committer.log.commit_epoch(epoch, &header.encode(), prepared.room_pages);
        let segment = committed.map_err(Error::store("writing the epoch header"))?;
        Ok(WrittenHeader { segment, restore, unrecorded })
    }

    /// The header is durable: what comes now is recorded in the new epoch. `undecided` says why it is
    /// not known whether there is a snapshot; empty if there is.
    pub(super) fn begin_epoch(
        &self,
        committer: &mut Committer,
        prepared: &Prepared,
        flip: &Flip,
        header: WrittenHeader,
        undecided: &str,
    ) {
        let (before, epoch, selection) = (committer.epoch, prepared.epoch, &prepared.selection);
        committer.segments.insert(header.segment, epoch);
        committer.settled.0.insert(epoch, Arc::clone(selection));
        committer.epoch = epoch;
        self.keep_ended(before, &header.unrecorded);
        self.index.write().close_epoch(before);
        let info = Epoch {
            origin_bytes: flip.size_bytes,
            created_unix_ns: flip.created_unix_ns,
            selection: Some(Arc::clone(selection)),
            low: Arc::clone(&prepared.low),
            meta: prepared.meta.clone(),
            undecided: undecided.into(),
            ..Epoch::default()
        };
        let mut epochs = self.epochs.write();
        epochs.0.insert(epoch, info);
        if let Some(restore) = header.restore {
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
    }

    /// The instant never came: its slots and bits belong to the old epoch again. Its header may be
    /// durable in spite of the error. Until that is removed or denied nothing may be recorded, and
    /// what it selects stays unsettled, so that no write reaches the origin that it would not know
    /// of: if the process ends before, the instant has come (P2).
    pub(super) fn abort_instant(
        &self,
        committer: &mut Committer,
        prepared: &Prepared,
        error: Error,
    ) -> Error {
        committer.to_undo = Some(prepared.epoch);
        let before = committer.epoch;
        {
            let blocks = self.block_count(self.size_bytes());
            // Made before the state is locked: the registry comes first in the order of locks.
            let (mut unsettled, pending) = self.bits(before, blocks);
            unsettled.merge(&Bitmap::from_set(blocks, &prepared.selection));
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
        // Other members may ask how it ended for as long as there are any.
        committer.note_group_or_owe(epoch, false);
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
        self.settle_in_flight();
    }

    /// Writes that are on their way are recorded, or nobody tracks them. One that took a slot beside
    /// them now could bring back what it read before they landed (P1).
    fn settle_in_flight(&mut self) {
        let Self { in_flight, unsettled, .. } = self;
        in_flight.iter().for_each(|blocks| unsettled.assign(blocks, false));
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

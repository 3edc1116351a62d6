//! Writes, zeroes, discards and flushes as clients make them.
//!
//! Every request is cut into runs of blocks that are treated alike: *straight* to the origin if
//! they are settled and have no slot; into *slots* if not; or, if large and covering whole blocks,
//! *past the buffer*: preserve, sync, submit.

use super::past::Patience;
use super::room::Claim;
use super::{COMMIT_BYTES, Committer, Counters, PIECE_BYTES, State, Volume};
use crate::buffer::SECTOR;
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet, round_in};
use crate::log::format::{BATCH_BLOCKS_MAX, Kind};
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use crate::sync::MutexGuard;

/// Runs of first changes of at least this size do not pass through the buffer.
const BYPASS_BYTES_MIN: u64 = 256 << 10;
/// Blocks that take slots under one hold of the state lock.
const SLOTS_AT_ONCE: u64 = 16;
/// Zeroes and discards of settled blocks go in pieces of this size: the device does not touch each
/// block.
const STRAIGHT_ZERO_BYTES: u64 = 64 << 20;
/// Zeroing blocks that are zero anyway, over a hole of the origin, goes in pieces of this size.
const HOLE_BLOCKS_MAX: u64 = 1 << 18;

/// Blocks that are looked at one by one under one hold of the state lock: well below a millisecond.
const LOOK_BLOCKS_MAX: u64 = 1 << 14;

/// Old content is read in runs of this many blocks.
const RUN_BLOCKS: u64 = 64;

/// How a run of blocks is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Straight,
    Slots,
}

/// What a large piece puts on the origin.
#[derive(Clone, Copy)]
enum Content<'a> {
    Data(&'a [u8]),
    /// Up to a byte: the disk may grow meanwhile, and what it gets then is not meant.
    Zeroes {
        may_punch: bool,
        upto: u64,
    },
    Discard {
        upto: u64,
    },
}

/// Old content that is to be kept, by what it is.
#[derive(Default)]
struct Divided {
    data: Vec<Extent>,
    holes: Vec<Extent>,
}

impl State {
    /// Changes whenever a block may have been written without leaving a trace in its slots: past
    /// the buffer, after which only an instant makes it a first change again; or by growth.
    fn version(&self) -> (u64, u32, u64) {
        (self.buffer.dropped(), self.epoch, self.size_bytes)
    }

    fn way(&self, block: u64) -> Way {
        let is_restoring = self.is_restoring(block) && !is_broken(Rule::RestoringHoldsSlots);
        let is_held = self.unsettled.get(block) || self.buffer.has(block) || is_restoring;
        if is_held { Way::Slots } else { Way::Straight }
    }

    /// The way of the first block of `extent`, and the end of the run that goes it.
    fn way_run(&self, extent: Extent) -> (Way, u64) {
        let way = self.way(extent.start);
        if self.buffer.is_empty() && self.restoring.is_none() {
            return (way, self.unsettled.run(extent.start, extent.end).1);
        }
        let end = extent.end.min(extent.start + LOOK_BLOCKS_MAX);
        let differing = (extent.start + 1..end).find(|&block| self.way(block) != way);
        (way, differing.unwrap_or(end))
    }
}

impl Volume {
    /// Write `data` at `offset`; with `fua` it is on stable storage when this returns.
    pub fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<()> {
        self.told(
            self.write_with(offset, data, Patience::Wait).and_then(|_| {
                if fua { self.make_durable(offset, to_u64(data.len())) } else { Ok(()) }
            }),
        )
    }

    /// As [`Volume::write`] unless a full store holds the write; false if it does, and then it has
    /// to be done again, whole.
    pub fn try_write(&self, offset: u64, data: &[u8]) -> Result<bool> {
        self.told(self.write_with(offset, data, Patience::Try))
    }

    fn write_with(&self, offset: u64, data: &[u8], patience: Patience) -> Result<bool> {
        Self::check_range(&self.state.lock(), offset, to_u64(data.len()))?;
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            // Pieces end at multiples of their size, so that large ones cover whole blocks.
            let room = PIECE_BYTES - at % PIECE_BYTES;
            let (piece, later) = rest.split_at(to_usize(room.min(to_u64(rest.len()))));
            if !self.write_piece(at, piece, patience)? {
                return Ok(false);
            }
            at += to_u64(piece.len());
            rest = later;
        }
        Ok(true)
    }

    fn write_piece(&self, offset: u64, data: &[u8], patience: Patience) -> Result<bool> {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let extent = self.extent_of(at, to_u64(rest.len()));
            let mut state = self.admit(extent)?;
            let (way, run_end) = state.way_run(extent);
            let run_bytes = (run_end * self.block_size - at).min(to_u64(rest.len()));
            let (run, _) = rest.split_at(to_usize(run_bytes));
            let done = match way {
                Way::Straight => {
                    let blocks = self.extent_of(at, run_bytes);
                    state.begin_straight(blocks);
                    drop(state);
                    Counters::add(&self.counters.straight_writes, 1);
                    let written = self.origin.write_at(at, run);
                    self.land_straight(blocks);
                    written.map_err(Error::origin("write"))?;
                    run_bytes
                }
                Way::Slots => {
                    let inner = round_in(at, run_bytes, self.block_size, state.size_bytes);
                    let is_whole = inner == self.extent_of(at, run_bytes);
                    if is_whole && run_bytes >= BYPASS_BYTES_MIN {
                        drop(state);
                        Counters::add(&self.counters.bypass_writes, 1);
                        if !self.change_past_buffer(inner, Content::Data(run), patience)? {
                            return Ok(false);
                        }
                        run_bytes
                    } else {
                        match self.put_slots(state, at, run, patience)? {
                            Some(taken) => taken,
                            None => return Ok(false),
                        }
                    }
                }
            };
            at += done;
            rest = &rest[to_usize(done)..];
        }
        Ok(true)
    }

    /// The state, once the gate is open and writes of these blocks are accepted.
    fn admit(&self, blocks: Extent) -> Result<MutexGuard<'_, State>> {
        let mut state = self.state.lock();
        while state.gate.holds(blocks) {
            self.gate_opened.wait(&mut state);
        }
        if state.is_closed {
            return Err(Error::Closed);
        }
        Self::check_writable(&state)?;
        state.note_write(blocks);
        Ok(state)
    }

    fn land_straight(&self, blocks: Extent) {
        let mut state = self.state.lock();
        if is_broken(Rule::RegionMarkedFirst) {
            state.regions.mark(blocks);
        }
        state.in_flight.end(blocks);
        let is_waited_for = state.is_closed || state.gate.is_closed();
        if is_waited_for && state.gate.is_drained(&state.in_flight) {
            self.drained.notify_all();
        }
    }

    /// Put the front of `data` into slots; tells how much of it. 0 if there was no room and the
    /// caller, having waited, must look again how the blocks are treated; nothing if a full store
    /// holds the write and the caller will not wait for that.
    fn put_slots(
        &self,
        mut state: MutexGuard<'_, State>,
        at: u64,
        data: &[u8],
        patience: Patience,
    ) -> Result<Option<u64>> {
        let wanted = self.extent_of(at, to_u64(data.len())).len().min(SLOTS_AT_ONCE);
        let admitted = state.admitted_slots.saturating_sub(state.buffer.used());
        let room = to_u64(admitted.min(state.buffer.free_count()));
        if room == 0 {
            Counters::add(&self.counters.buffer_waits, 1);
            return self.wait_for_room(state).map(|()| Some(0));
        }
        if !self.may_take_slot(&state, at / self.block_size) {
            let has_waited = self.wait_for_log_space(state, patience)?;
            return Ok(has_waited.then_some(0));
        }
        if let Some(block) = self.first_unaligned(at, data, state.size_bytes) {
            return self.put_patched(state, block, at, data).map(Some);
        }
        let was_empty = state.buffer.is_empty();
        let enough = to_usize(COMMIT_BYTES / self.block_size);
        let was_enough = state.buffer.used() >= enough;
        let (mut position, mut rest) = (at, data);
        for _ in 0..wanted.min(room) {
            let within = position % self.block_size;
            let length = (self.block_size - within).min(to_u64(rest.len()));
            let (piece, later) = rest.split_at(to_usize(length));
            let epoch = state.epoch;
            state.buffer.put(position / self.block_size, epoch, within, piece);
            position += length;
            rest = later;
            // The next block may have a partial sector and need its own way in.
            if rest.is_empty()
                || self.first_unaligned(position, rest, state.size_bytes).is_some()
                || !self.may_take_slot(&state, position / self.block_size)
            {
                break;
            }
        }
        if was_empty || (!was_enough && state.buffer.used() >= enough) {
            self.work.notify_one();
        }
        let sequence = if self.is_write_through { state.buffer.hold() } else { 0 };
        drop(state);
        Counters::add(&self.counters.buffered_writes, 1);
        if self.is_write_through {
            self.commit_now(sequence)?;
        }
        Ok(Some(position - at))
    }

    fn wait_for_room(&self, mut state: MutexGuard<'_, State>) -> Result<()> {
        let sequence = state.buffer.last_sequence();
        if !self.has_background {
            drop(state);
            return self.commit_now(sequence);
        }
        self.kick(&mut state);
        self.room.wait_for(&mut state, super::COMMIT_AGE);
        Ok(())
    }

    /// The first block of the range, if the range begins or ends inside a sector of it.
    fn first_unaligned(&self, at: u64, data: &[u8], size_bytes: u64) -> Option<u64> {
        if data.is_empty() {
            return None;
        }
        let end = at + to_u64(data.len());
        let first = at / self.block_size;
        let end_in_first = end.min((first + 1) * self.block_size);
        let is_end_partial = end_in_first % SECTOR != 0 && end_in_first != size_bytes;
        (at % SECTOR != 0 || is_end_partial).then_some(first)
    }

    /// A write that covers parts of sectors: read the sectors, patch them, and take a slot for
    /// them, unless the block was written meanwhile; then once more. Holds the role: a change past
    /// the buffer that was under way would otherwise lose the rest of those sectors to what was
    /// read here before it.
    fn put_patched(
        &self,
        state: MutexGuard<'_, State>,
        block: u64,
        at: u64,
        data: &[u8],
    ) -> Result<u64> {
        drop(state);
        let role = self.role()?;
        let state = self.admit(Extent::single(block))?;
        let size_bytes = state.size_bytes;
        let seen = (state.buffer.newest_sequence(block), state.version());
        let block_end = ((block + 1) * self.block_size).min(size_bytes);
        let end = (at + to_u64(data.len())).min(block_end);
        let start_out = at / SECTOR * SECTOR;
        let end_out = end.next_multiple_of(SECTOR).min(block_end);
        drop(state);
        let mut patched = vec![0; to_usize(end_out - start_out)];
        self.read(start_out, &mut patched)?;
        let length = to_usize(end - at);
        let skip = to_usize(at - start_out);
        patched[skip..skip + length].copy_from_slice(&data[..length]);
        let mut state = self.admit(Extent::single(block))?;
        let now = (state.buffer.newest_sequence(block), state.version());
        let has_room = state.buffer.free_count() > 0 && self.may_take_slot(&state, block);
        if now != seen || state.way(block) != Way::Slots || !has_room {
            return Ok(0);
        }
        let (epoch, was_empty) = (state.epoch, state.buffer.is_empty());
        state.buffer.put(block, epoch, start_out % self.block_size, &patched);
        if was_empty {
            self.work.notify_one();
        }
        let sequence = if self.is_write_through { state.buffer.hold() } else { 0 };
        drop(state);
        drop(role);
        if self.is_write_through {
            self.commit_now(sequence)?;
        }
        Ok(end - at)
    }

    /// Commit the slots up to a sequence number.
    fn commit_now(&self, sequence: u64) -> Result<()> {
        let mut committer = self.role()?;
        let epoch = committer.epoch;
        self.commit_until(&mut committer, epoch, sequence, None)
    }

    /// Change whole blocks without slots: older slots first, then preserve, sync, submit. Slots
    /// that come while this runs belong to writes that overlap it in time; they follow.
    /// False if a full store holds them and the caller will not wait for that.
    fn change_past_buffer(
        &self,
        blocks: Extent,
        content: Content<'_>,
        patience: Patience,
    ) -> Result<bool> {
        let pieces = match content {
            Content::Data(_) => to_u64(BATCH_BLOCKS_MAX),
            Content::Zeroes { .. } | Content::Discard { .. } => HOLE_BLOCKS_MAX,
        };
        let mut start = blocks.start;
        while start < blocks.end {
            let mut committer = self.role()?;
            let mut piece = Extent::new(start, blocks.end.min(start + pieces));
            let size_bytes = {
                let state = self.state.lock();
                Self::check_writable(&state)?;
                state.size_bytes
            };
            if matches!(content, Content::Discard { .. }) {
                // Asked again: an instant, a slot or a restore may have come before the role did.
                let (run, is_needed) = self.state.lock().trim_run(piece);
                if is_needed {
                    start = run.end;
                    continue;
                }
                piece = run;
            }
            let skip = (start - blocks.start) * self.block_size;
            self.commit_slots_of(&mut committer, piece)?;
            let preserved = self.preserve_piece(&mut committer, piece, size_bytes, content)?;
            let Some(preserved) = preserved else {
                drop(committer);
                if patience == Patience::Try {
                    return Ok(false);
                }
                self.wait_held()?;
                continue;
            };
            piece = preserved;
            let restoring: ExtentSet = {
                let mut state = self.state.lock();
                state.pending.assign(piece, false);
                state.unsettled.assign(piece, false);
                // From here the blocks are settled, and this write is one in flight to them.
                state.begin_straight(piece);
                let restoring = state.restoring.as_ref();
                restoring.into_iter().flat_map(|r| r.blocks.set_within(piece)).collect()
            };
            let role = if restoring.is_empty() { None } else { Some(committer) };
            let written = self.submit(piece, content, skip, size_bytes);
            self.land_straight(piece);
            written.map_err(Error::origin("write"))?;
            if let Some(mut committer) = role {
                self.finish_restored(&mut committer, &restoring)?;
            }
            start = piece.end;
        }
        Ok(true)
    }

    pub(super) fn commit_slots_of(&self, committer: &mut Committer, blocks: Extent) -> Result<()> {
        let newest = {
            let mut state = self.state.lock();
            if state.buffer.is_empty() {
                return Ok(());
            }
            state.buffer.hold();
            let few = blocks.len() <= to_u64(state.buffer.used());
            if few {
                (blocks.start..blocks.end).map(|b| state.buffer.newest_sequence(b)).max()
            } else {
                let inside = state.buffer.blocks().filter(|&b| blocks.contains(b));
                inside.map(|b| state.buffer.newest_sequence(b)).max()
            }
        };
        let epoch = committer.epoch;
        match newest {
            Some(sequence) if sequence > 0 => self.commit_until(committer, epoch, sequence, None),
            _ => Ok(()),
        }
    }

    /// Record the first changes in the front of `piece`, as much as one batch takes; tells how far
    /// that is. Nothing if there is no room in the store and the change has to wait.
    fn preserve_piece(
        &self,
        committer: &mut Committer,
        piece: Extent,
        size_bytes: u64,
        content: Content<'_>,
    ) -> Result<Option<Extent>> {
        let (mut pending, changed): (Vec<Extent>, Vec<Extent>) = {
            let state = self.state.lock();
            let pending: ExtentSet = state.pending.set_within(piece).collect();
            let unsettled: ExtentSet = state.unsettled.set_within(piece).collect();
            let changed = unsettled.difference(&pending);
            (pending.iter().collect(), changed.iter().collect())
        };
        // Room for what may come and no more: it is kept free in the log twice.
        let pending_blocks: u64 = pending.iter().map(|e| e.len()).sum();
        let kept_max = to_usize(pending_blocks).min(BATCH_BLOCKS_MAX);
        let descriptors_max = kept_max + changed.len().min(BATCH_BLOCKS_MAX);
        let mut end = piece.end;
        let mut lost = Vec::new();
        let mut holes = Vec::new();
        if matches!(content, Content::Discard { .. }) {
            pending.clear();
        } else {
            let looks_for_holes = matches!(content, Content::Zeroes { .. });
            let runs = self.divide(&pending, &mut end, size_bytes, looks_for_holes)?;
            let blocks = runs.data.iter().map(|e| e.len()).sum();
            holes = runs.holes;
            match self.claim(committer, to_u64(descriptors_max), blocks)? {
                Claim::Keep => pending = runs.data,
                Claim::Wait => return Ok(None),
                Claim::Lose => {
                    let choice = self.choose(committer, runs.data, to_u64(descriptors_max));
                    (pending, lost) = (choice.kept, choice.lost);
                }
            }
        }
        committer.batch.begin(committer.epoch, descriptors_max);
        for &hole in &holes {
            committer.batch.note(Kind::PreserveZero, hole);
        }
        self.keep_old_content(committer, pending.iter().copied(), size_bytes);
        for &extent in &lost {
            committer.batch.note(Kind::Lost, extent);
        }
        let room = BATCH_BLOCKS_MAX;
        for (count, extent) in changed.iter().filter(|e| e.start < end).enumerate() {
            if count == room {
                end = extent.start;
                break;
            }
            let noted = Extent::new(extent.start, extent.end.min(end));
            committer.batch.note(Kind::Changed, noted);
        }
        self.record(committer)?;
        self.top_up(committer);
        Ok(Some(Extent::new(piece.start, end)))
    }

    /// The end of the hole of the origin that begins at block `at`; `at` if there is data.
    fn hole_end(&self, at: u64, end: u64, size_bytes: u64) -> Result<u64> {
        let (offset, length) = Extent::new(at, end).to_bytes(self.block_size);
        let limit = (offset + length).min(size_bytes);
        let data = self.origin.next_data(offset, limit);
        let data = data.map_err(Error::origin("looking for holes"))?;
        Ok(if data >= limit { end } else { data / self.block_size })
    }

    /// Divide pending extents, up to what one batch takes, into holes of the origin, which are known
    /// to be zero without reading them, and the rest, in runs that are read at once. `end` is where
    /// that stopped. Looking for holes pays where whole ranges are zeroed.
    fn divide(
        &self,
        pending: &[Extent],
        end: &mut u64,
        size_bytes: u64,
        looks_for_holes: bool,
    ) -> Result<Divided> {
        // Copies and runs of zeroes take a descriptor each.
        let mut room = to_u64(BATCH_BLOCKS_MAX);
        let mut divided = Divided::default();
        for &extent in pending {
            let mut at = extent.start;
            while at < extent.end {
                if room == 0 {
                    *end = at;
                    return Ok(divided);
                }
                let hole_end =
                    if looks_for_holes { self.hole_end(at, extent.end, size_bytes)? } else { at };
                if hole_end > at {
                    divided.holes.push(Extent::new(at, hole_end));
                    room -= 1;
                    at = hole_end;
                    continue;
                }
                let count = (extent.end - at).min(RUN_BLOCKS).min(room);
                divided.data.push(Extent::new(at, at + count));
                room -= count;
                at += count;
            }
        }
        Ok(divided)
    }

    fn submit(
        &self,
        blocks: Extent,
        content: Content<'_>,
        skip: u64,
        size_bytes: u64,
    ) -> std::io::Result<()> {
        let (offset, length) = blocks.to_bytes(self.block_size);
        let length = length.min(size_bytes - offset);
        match content {
            Content::Data(data) => {
                let from = to_usize(skip);
                let to = (from + to_usize(length)).min(data.len());
                self.origin.write_at(offset, &data[from..to])
            }
            Content::Zeroes { may_punch, upto } => {
                self.origin.zero_at(offset, length.min(upto - offset), may_punch)
            }
            Content::Discard { upto } => self.origin.discard_at(offset, length.min(upto - offset)),
        }
    }

    /// Make a range read as zeroes, however large it is.
    pub fn write_zeroes(&self, offset: u64, length: u64, may_punch: bool, fua: bool) -> Result<()> {
        self.told(self.zero_range(offset, length, may_punch, fua))
    }

    fn zero_range(&self, offset: u64, length: u64, may_punch: bool, fua: bool) -> Result<()> {
        let size_bytes = {
            let state = self.state.lock();
            Self::check_range(&state, offset, length)?;
            state.size_bytes
        };
        let inner = round_in(offset, length, self.block_size, size_bytes);
        if inner.is_empty() {
            self.write(offset, &vec![0; to_usize(length)], false)?;
        } else {
            let (start, end) = (inner.start * self.block_size, inner.end * self.block_size);
            let head = vec![0; to_usize(start - offset)];
            self.write(offset, &head, false)?;
            let upto = offset + length;
            self.change_whole(inner, Content::Zeroes { may_punch, upto })?;
            let tail = vec![0; to_usize((offset + length).saturating_sub(end))];
            self.write(end.min(offset + length), &tail, false)?;
        }
        if fua { self.make_durable(offset, length) } else { Ok(()) }
    }

    /// True if zeroing the range would cost no copy.
    pub fn is_zeroing_fast(&self, offset: u64, length: u64) -> bool {
        let state = self.state.lock();
        if Self::check_range(&state, offset, length).is_err() {
            return false;
        }
        let extent = self.extent_of(offset, length);
        state.buffer.is_empty() && state.restoring.is_none() && !state.unsettled.any(extent)
    }

    /// Zero or discard whole blocks, run by run.
    fn change_whole(&self, blocks: Extent, content: Content<'_>) -> Result<()> {
        let mut start = blocks.start;
        while start < blocks.end {
            let rest = Extent::new(start, blocks.end);
            let mut state = self.admit(rest)?;
            let (way, run_end) = state.way_run(rest);
            let size_bytes = state.size_bytes;
            match way {
                Way::Straight => {
                    let most = STRAIGHT_ZERO_BYTES / self.block_size;
                    let run = Extent::new(start, run_end.min(start + most));
                    state.begin_straight(run);
                    drop(state);
                    let done = self.submit(run, content, 0, size_bytes);
                    self.land_straight(run);
                    done.map_err(Error::origin("zeroing"))?;
                    start = run.end;
                }
                Way::Slots => {
                    drop(state);
                    let run = Extent::new(start, run_end);
                    self.change_past_buffer(run, content, Patience::Wait)?;
                    start = run_end;
                }
            }
        }
        Ok(())
    }

    /// The content of a range is no longer needed. Where it is needed all the same, by a snapshot,
    /// a slot or a restore, nothing is done: a discard never costs a copy, and one that was put off
    /// could hit newer data.
    pub fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<()> {
        self.told(self.discard_range(offset, length, fua))
    }

    fn discard_range(&self, offset: u64, length: u64, fua: bool) -> Result<()> {
        let size_bytes = {
            let state = self.state.lock();
            Self::check_range(&state, offset, length)?;
            state.size_bytes
        };
        let inner = round_in(offset, length, self.block_size, size_bytes);
        let mut start = inner.start;
        while start < inner.end {
            let rest = Extent::new(start, inner.end);
            let (run, is_needed) = self.admit(rest)?.trim_run(rest);
            if !is_needed {
                self.change_whole(run, Content::Discard { upto: offset + length })?;
            }
            start = run.end;
        }
        if fua { self.make_durable(offset, length) } else { Ok(()) }
    }

    /// Every write that was acknowledged before this call is on stable storage when it returns.
    pub fn flush(&self) -> Result<()> {
        let (is_empty, sequence) = {
            let mut state = self.state.lock();
            if state.is_closed {
                return Err(Error::Closed);
            }
            (state.buffer.is_empty(), state.buffer.hold())
        };
        if !is_empty && !is_broken(Rule::FlushCommits) {
            self.told(self.commit_now(sequence))?;
        }
        if is_broken(Rule::FlushSyncs) { Ok(()) } else { self.told(self.sync_origin()) }
    }

    /// What a client is told. That the origin failed is noted in the store before: nobody who was
    /// told so may be told otherwise after the server was killed.
    pub(super) fn told<T>(&self, result: Result<T>) -> Result<T> {
        if matches!(result, Err(Error::Origin { .. })) {
            self.note_failure();
        }
        result
    }

    /// As a flush, for the blocks of one range.
    fn make_durable(&self, offset: u64, length: u64) -> Result<()> {
        let blocks = self.extent_of(offset, length);
        let has_slots = {
            let state = self.state.lock();
            if blocks.len() <= to_u64(state.buffer.used()) {
                (blocks.start..blocks.end).any(|block| state.buffer.has(block))
            } else {
                state.buffer.blocks().any(|block| blocks.contains(block))
            }
        };
        if has_slots {
            let mut committer = self.role()?;
            self.commit_slots_of(&mut committer, blocks)?;
        }
        self.sync_origin()
    }
}

impl State {
    /// The front of `extent` that a discard treats alike, and whether its content is still needed.
    fn trim_run(&self, extent: Extent) -> (Extent, bool) {
        let is_needed = |block: u64| {
            let is_needed =
                self.pending.get(block) || self.buffer.has(block) || self.is_restoring(block);
            is_needed && !is_broken(Rule::TrimSparesNeeded)
        };
        let first = is_needed(extent.start);
        if self.buffer.is_empty() && self.restoring.is_none() {
            let end = self.pending.run(extent.start, extent.end).1;
            return (Extent::new(extent.start, end), first);
        }
        let end = extent.end.min(extent.start + LOOK_BLOCKS_MAX);
        let differing = (extent.start + 1..end).find(|&block| is_needed(block) != first);
        (Extent::new(extent.start, differing.unwrap_or(end)), first)
    }
}

//! The write buffer: first changes wait here, acknowledged, until their originals are durable.
//!
//! It is a disk's volatile cache. When it lives in a mapped file of a memory filesystem it outlives
//! the process: a server that is killed and started again finds every acknowledged write. The file
//! is described in `docs/formats/buffer.md`.
//!
//! A slot holds the sectors of one block that one write brought. Published, it never changes; a
//! rewrite takes a new slot. All methods but [`Arena::data`] are called under the volume's state
//! lock.

mod arena;
mod left;

pub use arena::{Arena, ArenaSize, REGION_BLOCKS_MAX, RegionBits};
pub use left::{LeftBuffer, LeftRegion, LeftSlot, bit_runs, note_replaying, read_left};

use crate::journal::OriginIdentity;
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use smallvec::SmallVec;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// The unit of validity inside a slot.
pub const SECTOR: u64 = 512;

/// Which sectors of a block, one bit each; a block has at most 128.
pub type SectorMask = u128;

/// The mask of all sectors from `start` up to, not including, `end`.
pub const fn sectors(start: u64, end: u64) -> SectorMask {
    let high = if end >= 128 { SectorMask::MAX } else { (1 << end) - 1 };
    high & !((1 << start) - 1)
}

/// Runs of set bits, as half-open ranges of sectors.
pub fn sector_runs(mask: SectorMask) -> impl Iterator<Item = (u64, u64)> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let start = u64::from(rest.trailing_zeros());
        let end = start + u64::from((rest >> start).trailing_ones());
        rest &= !sectors(start, end);
        Some((start, end))
    })
}

/// Whose buffer a file is; a file that says otherwise is not replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferIdentity {
    /// The volume.
    pub uuid: [u8; 16],
    /// The opening of the volume, as its journal counts them.
    pub generation: u64,
    /// The boot of the kernel that holds the memory.
    pub boot_id: [u8; 16],
    /// The origin when the buffer was made.
    pub origin: OriginIdentity,
}

/// What is known of a slot in use.
#[derive(Debug, Clone, Copy)]
pub struct SlotInfo {
    /// Which block.
    pub block: u64,
    /// Order of the writes; 0 while free.
    pub sequence: u64,
    /// The epoch the write belongs to.
    pub epoch: u32,
    /// Which sectors count.
    pub mask: SectorMask,
    /// The committer works on it.
    pub is_in_batch: bool,
    /// What it holds is wiped when it is dropped.
    is_to_wipe: bool,
}

const FREE: SlotInfo =
    SlotInfo { block: 0, sequence: 0, epoch: 0, mask: 0, is_in_batch: false, is_to_wipe: false };

type BlockSlots = SmallVec<[u32; 4]>;

/// The slots in use, by block and by age.
pub struct WriteBuffer {
    arena: Arc<Arena>,
    free: Vec<u32>,
    slots: Vec<SlotInfo>,
    by_block: HashMap<u64, BlockSlots, foldhash::fast::FixedState>,
    /// Oldest first; an entry whose sequence is not that of the slot any more is stale.
    queue: VecDeque<(u32, u64)>,
    next_sequence: u64,
    /// Somebody waits for the slots up to this number: they stay until they are committed.
    held_upto: u64,
    dropped: u64,
    /// Slots that were dropped with what they held; some may be in use again.
    unwiped: Vec<u32>,
    /// By slot, whether it is among them.
    is_unwiped: Vec<bool>,
    /// Slots in use that are wiped when they are dropped.
    to_wipe: usize,
}

impl WriteBuffer {
    /// Empty, on an arena that nobody else uses.
    pub fn new(arena: Arc<Arena>, first_sequence: u64) -> Self {
        let count = arena.size.slots;
        Self {
            arena,
            free: (0..count).rev().collect(),
            slots: vec![FREE; to_usize(u64::from(count))],
            by_block: HashMap::default(),
            queue: VecDeque::new(),
            next_sequence: first_sequence,
            held_upto: 0,
            dropped: 0,
            unwiped: Vec::new(),
            is_unwiped: vec![false; to_usize(u64::from(count))],
            to_wipe: 0,
        }
    }

    fn info(&self, slot: u32) -> &SlotInfo {
        &self.slots[to_usize(u64::from(slot))]
    }

    /// The memory of the slots.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// True if no slot is in use.
    pub fn is_empty(&self) -> bool {
        self.by_block.is_empty()
    }

    /// Slots in use.
    pub fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Slots there are.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Slots left.
    pub fn free_count(&self) -> usize {
        self.free.len()
    }

    /// The sequence number of the latest write that took a slot.
    pub fn last_sequence(&self) -> u64 {
        self.next_sequence - 1
    }

    /// The sequence number of the latest write, for somebody who waits until it is committed. A
    /// rewrite does not drop its slot any more: it has a later number, and who waits for the
    /// earlier one would not wait for it.
    pub fn hold(&mut self) -> u64 {
        self.held_upto = self.last_sequence();
        self.held_upto
    }

    /// Grows whenever slots go after their content reached the origin: a reader that looked at the
    /// origin before must look again.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// True if the block has a slot.
    pub fn has(&self, block: u64) -> bool {
        self.by_block.contains_key(&block)
    }

    /// The slots of a block, oldest first.
    pub fn of_block(&self, block: u64) -> impl Iterator<Item = (u32, SlotInfo)> + '_ {
        let slots = self.by_block.get(&block).map(SmallVec::as_slice).unwrap_or_default();
        slots.iter().map(|&slot| (slot, *self.info(slot)))
    }

    /// The sequence number of the newest slot of a block, 0 if it has none.
    pub fn newest_sequence(&self, block: u64) -> u64 {
        self.of_block(block).last().map_or(0, |(_, info)| info.sequence)
    }

    /// Take `data` as the content of the sectors of `block` from byte `offset_in_block` on. Needs a
    /// free slot. `offset_in_block` is a multiple of a sector; so is the length, but at the end of
    /// an odd-sized disk.
    pub fn put(&mut self, block: u64, epoch: u32, offset_in_block: u64, data: &[u8]) {
        let end = offset_in_block + to_u64(data.len());
        let mask = sectors(offset_in_block / SECTOR, end.div_ceil(SECTOR));
        self.put_masked(block, epoch, mask, offset_in_block, data);
    }

    fn put_masked(&mut self, block: u64, epoch: u32, mask: SectorMask, at: u64, data: &[u8]) {
        if is_broken(Rule::SlotsImmutable)
            && let Some(slot) = self.by_block.get(&block).and_then(|list| list.last().copied())
        {
            let start = self.arena.data_at(slot) + to_usize(at);
            self.arena.slot_memory(start, data.len()).copy_from_slice(data);
            self.slots[to_usize(u64::from(slot))].mask |= mask;
            let info = *self.info(slot);
            self.arena.publish(slot, &info);
            return;
        }
        let slot = self.free.pop().expect("the caller saw a free slot under the same lock");
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let start = self.arena.data_at(slot) + to_usize(at);
        self.arena.slot_memory(start, data.len()).copy_from_slice(data);
        // The odd end of a disk: its last sector counts whole should the disk grow, and held
        // something else before.
        let rest = to_usize((at + to_u64(data.len())).next_multiple_of(SECTOR) - at) - data.len();
        self.arena.slot_memory(start + data.len(), rest).fill(0);
        // A block that was let go of while it had slots goes on having some until they are dropped.
        let is_to_wipe =
            self.to_wipe > 0 && self.of_block(block).any(|(_, older)| older.is_to_wipe);
        self.to_wipe += usize::from(is_to_wipe);
        let info = SlotInfo { block, sequence, epoch, mask, is_in_batch: false, is_to_wipe };
        self.slots[to_usize(u64::from(slot))] = info;
        self.arena.publish(slot, &info);
        self.queue.push_back((slot, sequence));
        self.drop_superseded(&info);
        self.by_block.entry(block).or_default().push(slot);
    }

    /// Older slots of the same instant whose every sector was written again will never be needed.
    fn drop_superseded(&mut self, newer: &SlotInfo) {
        let held_upto = self.held_upto;
        let Some(list) = self.by_block.get_mut(&newer.block) else { return };
        let slots = &self.slots;
        let mut superseded = BlockSlots::new();
        list.retain(|&mut slot| {
            let info = &slots[to_usize(u64::from(slot))];
            let is_superseded = info.epoch == newer.epoch
                && !info.is_in_batch
                && info.sequence > held_upto
                && info.mask & !newer.mask == 0;
            if is_superseded {
                superseded.push(slot);
            }
            !is_superseded
        });
        for slot in superseded {
            self.release(slot);
        }
    }

    /// Give a slot back.
    fn release(&mut self, slot: u32) {
        let at = to_usize(u64::from(slot));
        let is_to_wipe = std::mem::replace(&mut self.slots[at], FREE).is_to_wipe;
        self.arena.retire(slot);
        self.free.push(slot);
        if is_to_wipe {
            self.to_wipe -= 1;
            self.arena.wipe(slot);
        } else if !std::mem::replace(&mut self.is_unwiped[at], true) {
            self.unwiped.push(slot);
        }
    }

    /// What the slots in use hold now goes when they are dropped, also what earlier writes left
    /// beside their sectors.
    pub fn wipe_when_dropped(&mut self) {
        self.to_wipe = 0;
        for info in self.slots.iter_mut().filter(|info| info.sequence != 0) {
            info.is_to_wipe = true;
            self.to_wipe += 1;
        }
    }

    /// Wipe free slots, at most so many; true once none of them holds anything.
    pub fn wipe_free(&mut self, count_max: usize) -> bool {
        for slot in self.unwiped.split_off(self.unwiped.len().saturating_sub(count_max)) {
            let at = to_usize(u64::from(slot));
            self.is_unwiped[at] = false;
            if self.slots[at].sequence == 0 {
                self.arena.wipe(slot);
            } else {
                // It was taken again; its older content goes with the newer.
                self.to_wipe += usize::from(!self.slots[at].is_to_wipe);
                self.slots[at].is_to_wipe = true;
            }
        }
        self.unwiped.is_empty()
    }

    /// Take over a slot that a killed process left.
    pub fn adopt(&mut self, left: &LeftSlot, epoch: u32) {
        self.put_masked(left.block, epoch, left.mask, 0, &left.data);
    }

    /// Patch a block's content with what its slots hold: `content` begins at byte `from` of the
    /// block.
    pub fn overlay(&self, block: u64, from: u64, content: &mut [u8]) {
        for (slot, info) in self.of_block(block) {
            overlay_sectors(self.arena.data(slot), info.mask, from, content);
        }
    }

    /// Move the oldest slots of epochs up to `epoch_max` into a batch, of at most `blocks_max`
    /// blocks. Grouped by block, blocks ascending, slots of a block oldest first.
    pub fn take_batch(&mut self, epoch_max: u32, blocks_max: usize) -> Vec<(u64, BlockSlots)> {
        let mut batch: HashMap<u64, BlockSlots, foldhash::fast::FixedState> = HashMap::default();
        let mut later = Vec::new();
        while let Some(&(slot, sequence)) = self.queue.front() {
            let info = &mut self.slots[to_usize(u64::from(slot))];
            let is_stale = info.sequence != sequence;
            if !is_stale && batch.len() == blocks_max && !batch.contains_key(&info.block) {
                break;
            }
            self.queue.pop_front();
            if is_stale {
                continue;
            }
            if info.epoch > epoch_max {
                later.push((slot, sequence));
                continue;
            }
            info.is_in_batch = true;
            batch.entry(info.block).or_default().push(slot);
        }
        for entry in later.into_iter().rev() {
            self.queue.push_front(entry);
        }
        let mut sorted: Vec<_> = batch.into_iter().collect();
        sorted.sort_unstable_by_key(|(block, _)| *block);
        sorted
    }

    /// Put a batch back that could not be committed; it is the oldest again.
    pub fn put_back(&mut self, batch: &[(u64, BlockSlots)]) {
        let mut entries: Vec<(u32, u64)> = batch
            .iter()
            .flat_map(|(_, slots)| slots.iter())
            .map(|&slot| (slot, self.info(slot).sequence))
            .collect();
        entries.sort_unstable_by_key(|&(_, sequence)| sequence);
        for &(slot, sequence) in entries.iter().rev() {
            self.slots[to_usize(u64::from(slot))].is_in_batch = false;
            self.queue.push_front((slot, sequence));
        }
    }

    /// Drop a batch whose content is on the origin.
    pub fn drop_batch(&mut self, batch: &[(u64, BlockSlots)]) {
        self.dropped += 1;
        for (block, slots) in batch {
            for &slot in slots {
                self.release(slot);
            }
            if let Some(list) = self.by_block.get_mut(block) {
                list.retain(|slot| !slots.contains(slot));
                if list.is_empty() {
                    self.by_block.remove(block);
                }
            }
        }
    }

    /// The oldest sequence number in the queue.
    pub fn oldest_sequence(&self) -> Option<u64> {
        let is_live = |&&(slot, sequence): &&(u32, u64)| self.info(slot).sequence == sequence;
        self.queue.iter().find(is_live).map(|&(_, sequence)| sequence)
    }

    /// Blocks that have a slot, in no order.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.by_block.keys().copied()
    }

    /// Give every slot of a later epoch to `epoch`: the instant between them never came.
    pub fn merge_epochs(&mut self, epoch: u32) {
        for info in self.slots.iter_mut().filter(|i| i.sequence != 0 && i.epoch > epoch) {
            info.epoch = epoch;
        }
    }
}

/// Copy the sectors of `mask` from a slot's block into `content`, which begins at byte `from` of
/// the block.
pub fn overlay_sectors(data: &[u8], mask: SectorMask, from: u64, content: &mut [u8]) {
    let end = from + to_u64(content.len());
    for (first, last) in sector_runs(mask) {
        let start = (first * SECTOR).max(from);
        let stop = (last * SECTOR).min(end).min(to_u64(data.len()));
        if start < stop {
            content[to_usize(start - from)..to_usize(stop - from)]
                .copy_from_slice(&data[to_usize(start)..to_usize(stop)]);
        }
    }
}

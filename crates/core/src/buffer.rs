//! The write buffer: first changes wait here, acknowledged, until their originals are durable.
//!
//! It is a disk's volatile cache. When it lives in a mapped file of a memory filesystem it outlives
//! the process: a server that is killed and started again finds every acknowledged write. The file
//! is described in `docs/formats/buffer.md`.
//!
//! A slot holds the sectors of one block that one write brought. Published, it never changes; a
//! rewrite takes a new slot. All methods but [`Arena::data`] are called under the volume's state
//! lock.

use crate::codec::{Reader, Writer};
use crate::journal::OriginIdentity;
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use smallvec::SmallVec;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

/// The unit of validity inside a slot.
pub const SECTOR: u64 = 512;
const PAGE: usize = 4096;
const FILE_MAGIC: [u8; 8] = *b"SBBUFFER";
const FILE_VERSION: u32 = 1;
const FILE_HEADER_BYTES: usize = 256;
/// Where the time lies at which the process was last known to live, outside the checksum.
const ALIVE_AT: usize = 192;
/// Bytes of the file's header that its checksum covers.
const COVERED: usize = 8 + 4 + 16 + 8 + 16 + 4 * 8 + 4 + 8;
const SLOT_HEADER_BYTES: usize = 64;
const SLOT_LIVE: u32 = u32::from_le_bytes(*b"LIVE");

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

/// The memory of all slots.
pub struct Arena {
    memory: MmapRaw,
    path: Option<PathBuf>,
    lock: Option<File>,
    slot_count: u32,
    block_size: usize,
    #[cfg(feature = "simulation")]
    is_removed: std::sync::atomic::AtomicBool,
}

impl Arena {
    fn bytes_for(slot_count: u32, block_size: u64) -> u64 {
        let headers = u64::from(slot_count) * to_u64(SLOT_HEADER_BYTES);
        to_u64(PAGE) + headers.next_multiple_of(to_u64(PAGE)) + u64::from(slot_count) * block_size
    }

    /// In memory of this process: lost with it.
    pub fn private(slot_count: u32, block_size: u64) -> io::Result<Self> {
        let length = to_usize(Self::bytes_for(slot_count, block_size));
        let memory = MmapRaw::from(MmapOptions::new().len(length).map_anon()?);
        Ok(Self::on(memory, None, slot_count, block_size))
    }

    fn on(
        memory: MmapRaw,
        named: Option<(PathBuf, File)>,
        slot_count: u32,
        block_size: u64,
    ) -> Self {
        let (path, lock) = named.unzip();
        Self {
            memory,
            path,
            lock,
            slot_count,
            block_size: to_usize(block_size),
            #[cfg(feature = "simulation")]
            is_removed: std::sync::atomic::AtomicBool::new(false),
        }
    }

    /// In a new file of a memory filesystem: outlives the process.
    pub fn shared(
        path: &Path,
        slot_count: u32,
        block_size: u64,
        identity: &BufferIdentity,
    ) -> io::Result<Self> {
        let _ = std::fs::remove_file(path);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?);
        let length = Self::bytes_for(slot_count, block_size);
        file.set_len(length)?;
        // All of it now: a memory filesystem that is full later would kill the process that writes
        // to the mapping.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, length)?;
        let memory = MmapRaw::map_raw(&file)?;
        let named = Some((path.to_path_buf(), file));
        let arena = Self::on(memory, named, slot_count, block_size);
        arena.write_header(identity, block_size);
        Ok(arena)
    }

    /// In memory of this process, with everything a file has: the simulation keeps it beyond a kill.
    #[cfg(feature = "simulation")]
    pub fn outliving(
        slot_count: u32,
        block_size: u64,
        identity: &BufferIdentity,
    ) -> io::Result<Self> {
        let arena = Self::private(slot_count, block_size)?;
        arena.write_header(identity, block_size);
        Ok(arena)
    }

    /// What a kill at this moment leaves.
    #[cfg(feature = "simulation")]
    pub fn left(&self) -> Option<LeftBuffer> {
        if self.is_removed.load(Ordering::Relaxed) {
            return None;
        }
        // SAFETY: the mapping lives as long as `self`, and the simulation runs one thread at a time.
        let bytes = unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.memory.len()) };
        parse_left(bytes).and_then(Result::ok)
    }

    fn write_header(&self, identity: &BufferIdentity, block_size: u64) {
        let mut header = Writer::default();
        header.raw(&FILE_MAGIC).u32(FILE_VERSION).raw(&identity.uuid).u64(identity.generation);
        header.raw(&identity.boot_id).u64(identity.origin.device).u64(identity.origin.inode);
        header.u64(identity.origin.bytes).u64(identity.origin.modified_unix_ns);
        header.u32(self.slot_count).u64(block_size);
        let crc = crc32c::crc32c(&header.0);
        header.u32(crc);
        self.slot_memory(0, header.0.len()).copy_from_slice(&header.0);
    }

    fn header_at(slot: u32) -> usize {
        PAGE + to_usize(u64::from(slot)) * SLOT_HEADER_BYTES
    }

    fn data_at(&self, slot: u32) -> usize {
        let headers = to_usize(u64::from(self.slot_count)) * SLOT_HEADER_BYTES;
        PAGE + headers.next_multiple_of(PAGE) + to_usize(u64::from(slot)) * self.block_size
    }

    /// The content of a published slot: one block, of which only the slot's sectors mean anything.
    /// It stays until the slot is released, which only the committer does.
    pub fn data(&self, slot: u32) -> &[u8] {
        let at = self.data_at(slot);
        assert!(at + self.block_size <= self.memory.len());
        // SAFETY: inside the mapping; a published slot is not written, see `impl Sync`.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(at), self.block_size) }
    }

    #[allow(clippy::mut_from_ref)] // exclusive because the slot is free and the state lock is held
    fn slot_memory(&self, at: usize, length: usize) -> &mut [u8] {
        assert!(at + length <= self.memory.len());
        // SAFETY: the range lies inside the mapping. The callers hold the state lock and own the
        // slot: it is on the free list's way out, so no reference from `data` exists, and no other
        // thread writes it.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().add(at), length) }
    }

    fn state_of(&self, slot: u32) -> &AtomicU32 {
        let at = Self::header_at(slot);
        // The mapping starts at a page, and slot headers at multiples of 64 bytes.
        #[allow(clippy::cast_ptr_alignment)]
        let state = self.memory.as_mut_ptr().wrapping_add(at).cast::<u32>();
        // SAFETY: inside the mapping, aligned, and only ever accessed through this atomic.
        unsafe { AtomicU32::from_ptr(state) }
    }

    fn publish(&self, slot: u32, info: &SlotInfo) {
        // The path of every first change: filled in place, without a detour over the heap.
        let mut header = [0; SLOT_HEADER_BYTES - size_of::<u32>()];
        header[..8].copy_from_slice(&info.block.to_le_bytes());
        header[8..16].copy_from_slice(&info.sequence.to_le_bytes());
        header[16..20].copy_from_slice(&info.epoch.to_le_bytes());
        header[20..36].copy_from_slice(&info.mask.to_le_bytes());
        let crc = crc32c::crc32c(&header[..36]);
        header[36..40].copy_from_slice(&crc.to_le_bytes());
        let at = Self::header_at(slot) + size_of::<u32>();
        self.slot_memory(at, header.len()).copy_from_slice(&header);
        // The process may be killed between any two stores: the mark that makes the slot count
        // comes last.
        fence(Ordering::Release);
        self.state_of(slot).store(SLOT_LIVE, Ordering::Release);
    }

    fn retire(&self, slot: u32) {
        self.state_of(slot).store(0, Ordering::Release);
    }

    /// Forget what a free slot held.
    fn wipe(&self, slot: u32) {
        self.slot_memory(self.data_at(slot), self.block_size).fill(0);
    }

    /// Note that the process lives at this time; called by one thread.
    pub fn note_alive(&self, unix_ns: u64) {
        self.slot_memory(ALIVE_AT, size_of::<u64>()).copy_from_slice(&unix_ns.to_le_bytes());
    }

    /// True if the buffer outlives the process.
    pub fn is_shared(&self) -> bool {
        self.path.is_some()
    }

    /// Say that the buffer is empty for good, by removing its file; its memory goes back at once,
    /// although the volume, closed, may be held for long.
    pub fn remove(&self) {
        #[cfg(feature = "simulation")]
        self.is_removed.store(true, Ordering::Relaxed);
        if let Some(path) = &self.path {
            // Left behind it would be recognised as another generation's.
            let _ = std::fs::remove_file(path);
        }
        if let Some(file) = &self.lock {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Where that cannot be done the memory goes with the mapping.
            let _ = rustix::fs::fallocate(file, how, 0, to_u64(self.memory.len()));
        }
    }
}

/// The killed process may have written for this long after it last said that it lives.
const ALIVE_SLACK_NS: u64 = 3_000_000_000;

impl LeftBuffer {
    /// True if it is of this opening of the volume.
    pub fn is_of(&self, uuid: [u8; 16], generation: u64) -> bool {
        self.identity.uuid == uuid && self.identity.generation == generation
    }

    /// True if the origin is another one now, or was written after the process died.
    pub fn is_origin_touched(&self, now: &OriginIdentity) -> bool {
        let alive_until = self.alive_unix_ns.saturating_add(ALIVE_SLACK_NS);
        self.identity.origin.inode != now.inode || now.modified_unix_ns > alive_until
    }
}

/// A slot that a killed process left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftSlot {
    /// Which block.
    pub block: u64,
    /// Order of the writes.
    pub sequence: u64,
    /// The epoch the write belongs to.
    pub epoch: u32,
    /// Which sectors count.
    pub mask: SectorMask,
    /// One block.
    pub data: Vec<u8>,
}

/// What a buffer file holds.
#[derive(Debug, Clone)]
pub struct LeftBuffer {
    /// Whose it is.
    pub identity: BufferIdentity,
    /// When its process was last known to live.
    pub alive_unix_ns: u64,
    /// Its slots, oldest first.
    pub slots: Vec<LeftSlot>,
}

/// Note in the file of a killed process that somebody works on its slots at this time.
pub fn note_replaying(path: &Path, unix_ns: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = File::options().write(true).open(path)?;
    file.write_all_at(&unix_ns.to_le_bytes(), to_u64(ALIVE_AT))
}

/// Read the file that a killed process left; `None` if there is none, or none that is intact; the
/// version if that is newer than ours.
pub fn read_left(path: &Path) -> io::Result<Option<Result<LeftBuffer, u32>>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(parse_left(&bytes))
}

fn parse_left(bytes: &[u8]) -> Option<Result<LeftBuffer, u32>> {
    let mut input = Reader::new(bytes.get(..FILE_HEADER_BYTES)?);
    if input.array::<8>().ok()? != FILE_MAGIC {
        return None;
    }
    let version = input.u32().ok()?;
    let uuid = input.array().ok()?;
    let generation = input.u64().ok()?;
    let boot_id = input.array().ok()?;
    let origin = OriginIdentity {
        device: input.u64().ok()?,
        inode: input.u64().ok()?,
        bytes: input.u64().ok()?,
        modified_unix_ns: input.u64().ok()?,
    };
    let slot_count = input.u32().ok()?;
    let block_size = input.u64().ok()?;
    if input.u32().ok()? != crc32c::crc32c(&bytes[..COVERED]) {
        return None;
    }
    if version > FILE_VERSION {
        return Some(Err(version));
    }
    if to_u64(bytes.len()) != Arena::bytes_for(slot_count, block_size) {
        return None;
    }
    let data_start = bytes.len() - to_usize(u64::from(slot_count) * block_size);
    let mut slots: Vec<LeftSlot> = (0..slot_count)
        .filter_map(|slot| {
            let at = Arena::header_at(slot);
            let mut input = Reader::new(&bytes[at..at + SLOT_HEADER_BYTES]);
            if input.u32().ok()? != SLOT_LIVE {
                return None;
            }
            let (block, sequence) = (input.u64().ok()?, input.u64().ok()?);
            let epoch = input.u32().ok()?;
            let mask = SectorMask::from_le_bytes(input.array().ok()?);
            let is_intact = input.u32().ok()? == crc32c::crc32c(&bytes[at + 4..at + 4 + 36]);
            let from = data_start + to_usize(u64::from(slot) * block_size);
            let data = bytes[from..from + to_usize(block_size)].to_vec();
            is_intact.then_some(LeftSlot { block, sequence, epoch, mask, data })
        })
        .collect();
    slots.sort_by_key(|slot| slot.sequence);
    let identity = BufferIdentity { uuid, generation, boot_id, origin };
    let alive_unix_ns = u64::from_le_bytes(bytes[ALIVE_AT..ALIVE_AT + 8].try_into().ok()?);
    Some(Ok(LeftBuffer { identity, alive_unix_ns, slots }))
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
        let count = arena.slot_count;
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

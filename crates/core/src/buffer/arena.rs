//! The memory of the write buffer: slots, and what changed in regions of tracked-only blocks; in a
//! file of a memory filesystem, where there is one.

use super::{BufferIdentity, SlotInfo};
use crate::codec::Writer;
use crate::extent::Extent;
use crate::number::{to_u64, to_usize};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

const PAGE: usize = 4096;
pub(super) const FILE_MAGIC: [u8; 8] = *b"SBBUFFER";
/// Written; version 1, without regions, is read too.
pub(super) const FILE_VERSION: u32 = 2;
pub(super) const FILE_HEADER_BYTES: usize = 256;
/// Where the time lies at which the process was last known to live, outside the checksum.
pub(super) const ALIVE_AT: usize = 192;
/// Bytes of the file's header that its checksum covers.
pub(super) const COVERED: usize = 8 + 4 + 16 + 8 + 16 + 4 * 8 + 4 + 8;
/// Where the number of regions follows, with a checksum of its own: the other one stays where every
/// version has it.
pub(super) const REGIONS_AT: usize = COVERED + 4;
pub(super) const REGION_BYTES: usize = 64;
/// Where a region's bits lie in its entry.
pub(super) const BITS_AT: usize = 32;
pub(super) const SLOT_HEADER_BYTES: usize = 64;
pub(super) const SLOT_LIVE: u32 = u32::from_le_bytes(*b"LIVE");
pub(super) const REGION_OPEN: u32 = u32::from_le_bytes(*b"OPEN");

/// A bit for each block of a region.
pub type RegionBits = [u64; 4];
/// Blocks of a region at most: a bit each.
pub const REGION_BLOCKS_MAX: u64 = 256;

/// What there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaSize {
    /// Slots.
    pub slots: u32,
    /// Regions of tracked-only blocks that are open at once.
    pub regions: u32,
    /// Bytes a block.
    pub block_size: u64,
}

impl ArenaSize {
    fn headers_bytes(self) -> u64 {
        (u64::from(self.slots) * to_u64(SLOT_HEADER_BYTES)).next_multiple_of(to_u64(PAGE))
    }

    fn regions_bytes(self) -> u64 {
        (u64::from(self.regions) * to_u64(REGION_BYTES)).next_multiple_of(to_u64(PAGE))
    }

    pub(super) fn regions_at(self) -> usize {
        PAGE + to_usize(self.headers_bytes())
    }

    pub(super) fn data_at(self) -> usize {
        self.regions_at() + to_usize(self.regions_bytes())
    }

    pub(super) fn bytes(self) -> u64 {
        to_u64(self.data_at()) + u64::from(self.slots) * self.block_size
    }
}

/// The memory of all slots, and of what changed in regions.
pub struct Arena {
    memory: MmapRaw,
    path: Option<PathBuf>,
    lock: Option<File>,
    pub(super) size: ArenaSize,
    block_size: usize,
    #[cfg(feature = "simulation")]
    is_removed: std::sync::atomic::AtomicBool,
}

impl Arena {
    /// In memory of this process: lost with it.
    pub fn private(size: ArenaSize) -> io::Result<Self> {
        let length = to_usize(size.bytes());
        let memory = MmapRaw::from(MmapOptions::new().len(length).map_anon()?);
        Ok(Self::on(memory, None, size))
    }

    fn on(memory: MmapRaw, named: Option<(PathBuf, File)>, size: ArenaSize) -> Self {
        let (path, lock) = named.unzip();
        Self {
            memory,
            path,
            lock,
            size,
            block_size: to_usize(size.block_size),
            #[cfg(feature = "simulation")]
            is_removed: std::sync::atomic::AtomicBool::new(false),
        }
    }

    /// In a new file of a memory filesystem: outlives the process.
    pub fn shared(path: &Path, size: ArenaSize, identity: &BufferIdentity) -> io::Result<Self> {
        let _ = std::fs::remove_file(path);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?);
        let length = size.bytes();
        file.set_len(length)?;
        // All of it now: a memory filesystem that is full later would kill the process that writes
        // to the mapping.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, length)?;
        let memory = MmapRaw::map_raw(&file)?;
        let named = Some((path.to_path_buf(), file));
        let arena = Self::on(memory, named, size);
        arena.write_header(identity);
        Ok(arena)
    }

    /// In memory of this process, with everything a file has: the simulation keeps it beyond a kill.
    #[cfg(feature = "simulation")]
    pub fn outliving(size: ArenaSize, identity: &BufferIdentity) -> io::Result<Self> {
        let arena = Self::private(size)?;
        arena.write_header(identity);
        Ok(arena)
    }

    /// What a kill at this moment leaves.
    #[cfg(feature = "simulation")]
    pub fn left(&self) -> Option<super::LeftBuffer> {
        if self.is_removed.load(Ordering::Relaxed) {
            return None;
        }
        // SAFETY: the mapping lives as long as `self`, and the simulation runs one thread at a time.
        let bytes = unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.memory.len()) };
        super::left::parse_left(bytes).and_then(Result::ok)
    }

    fn write_header(&self, identity: &BufferIdentity) {
        let mut header = Writer::default();
        header.raw(&FILE_MAGIC).u32(FILE_VERSION).raw(&identity.uuid).u64(identity.generation);
        header.raw(&identity.boot_id).u64(identity.origin.device).u64(identity.origin.inode);
        header.u64(identity.origin.bytes).u64(identity.origin.modified_unix_ns);
        header.u32(self.size.slots).u64(self.size.block_size);
        let crc = crc32c::crc32c(&header.0);
        header.u32(crc).u32(self.size.regions);
        let crc = crc32c::crc32c(&header.0);
        header.u32(crc);
        self.slot_memory(0, header.0.len()).copy_from_slice(&header.0);
    }

    pub(super) fn header_at(slot: u32) -> usize {
        PAGE + to_usize(u64::from(slot)) * SLOT_HEADER_BYTES
    }

    pub(super) fn data_at(&self, slot: u32) -> usize {
        self.size.data_at() + to_usize(u64::from(slot)) * self.block_size
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
    pub(super) fn slot_memory(&self, at: usize, length: usize) -> &mut [u8] {
        assert!(at + length <= self.memory.len());
        // SAFETY: the range lies inside the mapping. The callers hold the state lock and own the
        // slot: it is on the free list's way out, so no reference from `data` exists, and no other
        // thread writes it.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().add(at), length) }
    }

    fn state_of(&self, slot: u32) -> &AtomicU32 {
        self.state_at(Self::header_at(slot))
    }

    fn state_at(&self, at: usize) -> &AtomicU32 {
        assert!(at + size_of::<u32>() <= self.memory.len() && at % size_of::<u32>() == 0);
        // The mapping starts at a page, and headers at multiples of 64 bytes.
        #[allow(clippy::cast_ptr_alignment)]
        let state = self.memory.as_mut_ptr().wrapping_add(at).cast::<u32>();
        // SAFETY: inside the mapping, aligned, and only ever accessed through this atomic.
        unsafe { AtomicU32::from_ptr(state) }
    }

    pub(super) fn publish(&self, slot: u32, info: &SlotInfo) {
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

    pub(super) fn retire(&self, slot: u32) {
        self.state_of(slot).store(0, Ordering::Release);
    }

    /// Forget what a free slot held.
    pub(super) fn wipe(&self, slot: u32) {
        self.slot_memory(self.data_at(slot), self.block_size).fill(0);
    }

    /// Regions there is room for.
    pub fn region_count(&self) -> u32 {
        self.size.regions
    }

    fn region_at(&self, entry: u32) -> usize {
        assert!(entry < self.size.regions);
        self.size.regions_at() + to_usize(u64::from(entry)) * REGION_BYTES
    }

    fn region_word(&self, entry: u32, word: usize) -> &AtomicU64 {
        let at = self.region_at(entry) + BITS_AT + word * size_of::<u64>();
        assert!(word < RegionBits::default().len() && at + size_of::<u64>() <= self.memory.len());
        // The mapping starts at a page, and the bits at multiples of 8 bytes.
        #[allow(clippy::cast_ptr_alignment)]
        let word = self.memory.as_mut_ptr().wrapping_add(at).cast::<u64>();
        // SAFETY: inside the mapping, aligned, and only ever accessed through this atomic.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// Take a free entry for a region: nothing in it was written.
    pub fn open_region(&self, entry: u32, epoch: u32, blocks: Extent) {
        for word in 0..RegionBits::default().len() {
            self.region_word(entry, word).store(0, Ordering::Relaxed);
        }
        let count = u32::try_from(blocks.len()).expect("a region is small");
        let mut header = [0; 20];
        header[..4].copy_from_slice(&epoch.to_le_bytes());
        header[4..12].copy_from_slice(&blocks.start.to_le_bytes());
        header[12..16].copy_from_slice(&count.to_le_bytes());
        let crc = crc32c::crc32c(&header[..16]);
        header[16..].copy_from_slice(&crc.to_le_bytes());
        let at = self.region_at(entry);
        self.slot_memory(at + size_of::<u32>(), header.len()).copy_from_slice(&header);
        self.state_at(at).store(REGION_OPEN, Ordering::Release);
    }

    /// Note that blocks of a region are written, counted from its first; before they are.
    pub fn mark_region(&self, entry: u32, blocks: std::ops::Range<u64>) {
        for (at, word) in region_words(blocks) {
            self.region_word(entry, at).fetch_or(word, Ordering::Release);
        }
    }

    /// What of a region was written.
    pub fn region_bits(&self, entry: u32) -> RegionBits {
        std::array::from_fn(|word| self.region_word(entry, word).load(Ordering::Acquire))
    }

    /// The entry is free again.
    pub fn close_region(&self, entry: u32) {
        self.state_at(self.region_at(entry)).store(0, Ordering::Release);
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

/// Words of a region's bits, and the bits of these blocks in them.
fn region_words(blocks: std::ops::Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    assert!(blocks.end <= REGION_BLOCKS_MAX);
    (blocks.start / 64..blocks.end.div_ceil(64)).map(move |word| {
        let (from, to) = (blocks.start.max(word * 64), blocks.end.min((word + 1) * 64));
        let high = if to % 64 == 0 { u64::MAX } else { (1 << (to % 64)) - 1 };
        (to_usize(word), high & !((1 << (from % 64)) - 1))
    })
}

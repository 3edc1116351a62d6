//! What a killed process left in its write buffer.

use super::arena::{
    ALIVE_AT, Arena, ArenaSize, BITS_AT, COVERED, FILE_HEADER_BYTES, FILE_MAGIC, FILE_VERSION,
    REGION_BLOCKS_MAX, REGION_BYTES, REGION_OPEN, REGIONS_AT, RegionBits, SLOT_HEADER_BYTES,
    SLOT_LIVE,
};
use super::{BufferIdentity, SectorMask};
use crate::codec::Reader;
use crate::extent::Extent;
use crate::journal::OriginIdentity;
use crate::number::{to_u64, to_usize};
use std::fs::File;
use std::io;
use std::path::Path;

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

/// What a killed process wrote in a region of tracked-only blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftRegion {
    /// The epoch it was opened in.
    pub epoch: u32,
    /// Its blocks.
    pub blocks: Extent,
    /// Which blocks were written.
    pub bits: RegionBits,
}

/// Runs of set bits.
pub fn bit_runs(bits: &RegionBits) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
    let is_set = |bit: u64| bits[to_usize(bit / 64)] >> (bit % 64) & 1 == 1;
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < REGION_BLOCKS_MAX && !is_set(at) {
            at += 1;
        }
        let start = at;
        while at < REGION_BLOCKS_MAX && is_set(at) {
            at += 1;
        }
        (start < at).then_some(start..at)
    })
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
    /// Its regions, in no order.
    pub regions: Vec<LeftRegion>,
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

pub(super) fn parse_left(bytes: &[u8]) -> Option<Result<LeftBuffer, u32>> {
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
    let regions = if version == 1 {
        0
    } else {
        let regions = input.u32().ok()?;
        if input.u32().ok()? != crc32c::crc32c(&bytes[..REGIONS_AT + size_of::<u32>()]) {
            return None;
        }
        regions
    };
    let size = ArenaSize { slots: slot_count, regions, block_size };
    if to_u64(bytes.len()) != size.bytes() {
        return None;
    }
    let data_start = size.data_at();
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
    let entries = bytes[size.regions_at()..].chunks_exact(REGION_BYTES);
    let regions = entries.take(to_usize(u64::from(regions))).filter_map(parse_region).collect();
    let identity = BufferIdentity { uuid, generation, boot_id, origin };
    let alive_unix_ns = u64::from_le_bytes(bytes[ALIVE_AT..ALIVE_AT + 8].try_into().ok()?);
    Some(Ok(LeftBuffer { identity, alive_unix_ns, slots, regions }))
}

fn parse_region(entry: &[u8]) -> Option<LeftRegion> {
    let mut input = Reader::new(entry);
    let state = input.u32().ok()?;
    let (epoch, start, count) = (input.u32().ok()?, input.u64().ok()?, input.u32().ok()?);
    let is_intact = input.u32().ok()? == crc32c::crc32c(&entry[4..20]);
    let blocks = Extent { start, end: start.checked_add(u64::from(count))? };
    let mut bits = Reader::new(&entry[BITS_AT..]);
    let mut region = LeftRegion { epoch, blocks, bits: RegionBits::default() };
    for word in &mut region.bits {
        *word = bits.u64().ok()?;
    }
    (state == REGION_OPEN && is_intact).then_some(region)
}

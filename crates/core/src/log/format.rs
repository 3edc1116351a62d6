//! Layout of segment files, pure: see `docs/formats/log.md`.
//!
//! A segment is a sequence of pages: its header, for the first segment of an epoch the epoch
//! header, both of them twice, then batches. A batch is its head (header and descriptors), payload,
//! and tail (the same again).

use crate::codec::{Malformed, Reader, Writer};
use crate::extent::{Extent, ExtentSet};
use crate::number::{to_u64, to_usize};

/// Bytes of a segment header that its checksum covers.
const COVERED: usize = 8 + 4 + 16 + 5 * 4 + 8 + 2 * 4;
/// The same of a merged segment.
const COVERED_MERGED: usize = COVERED + 3 * 4;
/// The unit of layout; everything starts at a multiple of it.
pub const PAGE: u64 = 4096;
/// First bytes of a segment file.
pub const SEGMENT_MAGIC: [u8; 8] = *b"SBLOGSEG";
/// The highest version this code reads: segments that may hold REGION records have it. Merged ones
/// have version 2, and those of earlier releases version 1.
pub const FORMAT_VERSION: u32 = 3;
/// Bytes of a batch header.
pub const BATCH_HEADER_BYTES: usize = 64;
/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: usize = 16;
/// Blocks a batch preserves at most: with their descriptors exactly four pages of head.
pub const BATCH_BLOCKS_MAX: usize = 1020;
/// An epoch header beyond this was not written by us: 16 bytes an extent, for 16 million of them.
pub const EPOCH_HEADER_BYTES_MAX: u32 = 256 << 20;

const HEAD_MAGIC: u32 = u32::from_le_bytes(*b"SBBH");
const TAIL_MAGIC: u32 = u32::from_le_bytes(*b"SBBT");

/// Where a preserved block lies: segment number and page in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub u64);

impl Position {
    /// Page `page` of segment `segment`.
    pub fn new(segment: u32, page: u32) -> Self {
        Self(u64::from(segment) << 32 | u64::from(page))
    }

    /// The segment number.
    #[allow(clippy::cast_possible_truncation)] // the upper half
    pub const fn segment(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Offset in the segment file, in bytes.
    pub const fn offset_bytes(self) -> u64 {
        (self.0 & 0xffff_ffff) * PAGE
    }
}

/// Checksum of a block's content that also covers which block of which epoch it is, so that a
/// payload that landed in the wrong place does not pass.
pub fn payload_checksum(block: u64, epoch: u32, content: &[u8]) -> u32 {
    let mut identity = [0; 12];
    identity[..8].copy_from_slice(&block.to_le_bytes());
    identity[8..].copy_from_slice(&epoch.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&identity), content)
}

/// The first page of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The volume.
    pub uuid: [u8; 16],
    /// This segment's number, unique in the volume, growing.
    pub segment: u32,
    /// The epoch its batches belong to.
    pub epoch: u32,
    /// 0 for the first segment of the epoch.
    pub ordinal: u32,
    /// The segment written before this one, and the page where its last durable batch ended: what
    /// follows there never became durable and was written again elsewhere.
    pub previous_segment: u32,
    /// See `previous_segment`.
    pub previous_end_page: u32,
    /// Sequence number its first batch has.
    pub first_batch: u64,
    /// Length of the epoch header that follows, 0 if `ordinal` is not 0.
    pub epoch_header_bytes: u32,
    /// Its checksum.
    pub epoch_header_crc: u32,
    /// Its version is one whose readers know REGION records.
    pub takes_regions: bool,
    /// Set if it was made from others; those hold no REGION records.
    pub merged: Option<MergedHeader>,
}

/// Which segments a merged one stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergedHeader {
    /// Numbers of the first and the last of them: where it stands in the order of the log.
    pub first: u32,
    /// See `first`.
    pub last: u32,
    /// Page after its last batch.
    pub end_page: u32,
}

impl SegmentHeader {
    /// Where it stands in the order of the log: the numbers of the segments it is, or was made
    /// from.
    pub fn places(&self) -> std::ops::RangeInclusive<u32> {
        self.merged.map_or(self.segment..=self.segment, |merged| merged.first..=merged.last)
    }

    /// Pages from the start to the first batch.
    pub fn data_start_page(&self) -> u64 {
        2 * (1 + u64::from(self.epoch_header_bytes).div_ceil(PAGE))
    }

    /// One page.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        let version = match (&self.merged, self.takes_regions) {
            (Some(_), _) => 2,
            (None, false) => 1,
            (None, true) => 3,
        };
        out.raw(&SEGMENT_MAGIC).u32(version).raw(&self.uuid);
        out.u32(self.segment).u32(self.epoch).u32(self.ordinal);
        out.u32(self.previous_segment).u32(self.previous_end_page).u64(self.first_batch);
        out.u32(self.epoch_header_bytes).u32(self.epoch_header_crc);
        if let Some(merged) = &self.merged {
            out.u32(merged.first).u32(merged.last).u32(merged.end_page);
        }
        let crc = crc32c::crc32c(&out.0);
        out.u32(crc);
        out.0.resize(to_usize(PAGE), 0);
        out.0
    }

    /// From the start of a page.
    pub fn decode(page: &[u8]) -> Result<Self, SegmentError> {
        let mut input = Reader::new(page);
        if input.array::<8>()? != SEGMENT_MAGIC {
            return Err(SegmentError::NotASegment);
        }
        let version = input.u32()?;
        let mut header = Self {
            uuid: input.array()?,
            segment: input.u32()?,
            epoch: input.u32()?,
            ordinal: input.u32()?,
            previous_segment: input.u32()?,
            previous_end_page: input.u32()?,
            first_batch: input.u64()?,
            epoch_header_bytes: input.u32()?,
            epoch_header_crc: input.u32()?,
            takes_regions: version == 3,
            merged: None,
        };
        let mut covered = COVERED;
        if version == 2 {
            let (first, last, end_page) = (input.u32()?, input.u32()?, input.u32()?);
            header.merged = Some(MergedHeader { first, last, end_page });
            covered = COVERED_MERGED;
        }
        // First: one rotten bit of the version is not a newer version. Newer ones keep it where one
        // of these has it.
        let mut is_intact = input.u32()? == crc32c::crc32c(&page[..covered]);
        if version > FORMAT_VERSION {
            let later =
                page.get(COVERED_MERGED..COVERED_MERGED + 4).ok_or(SegmentError::Damaged)?;
            is_intact |= later == crc32c::crc32c(&page[..COVERED_MERGED]).to_le_bytes();
        }
        if is_intact && version > FORMAT_VERSION {
            return Err(SegmentError::Version(version));
        }
        if is_intact && header.epoch_header_bytes <= EPOCH_HEADER_BYTES_MAX {
            Ok(header)
        } else {
            Err(SegmentError::Damaged)
        }
    }
}

/// Why a page is not the header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Other first bytes: never written, or torn.
    #[error("not a segment")]
    NotASegment,
    /// Checksum or fields are wrong.
    #[error("damaged segment header")]
    Damaged,
    /// Written by a newer version.
    #[error("format version {0} is newer than this program's {FORMAT_VERSION}")]
    Version(u32),
}

impl From<Malformed> for SegmentError {
    fn from(_: Malformed) -> Self {
        Self::Damaged
    }
}

/// What the commit of an instant makes durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochHeader {
    /// The epoch this instant begins.
    pub epoch: u32,
    /// The epoch before it, 0 if there is none.
    pub predecessor: u32,
    /// For people; nothing is decided by it.
    pub created_unix_ns: u64,
    /// Size of the origin at the instant.
    pub origin_bytes: u64,
    /// What the snapshot selects.
    pub selection: ExtentSet,
    /// Set if this instant starts a restore (its snapshot is then the safety snapshot).
    pub restore: Option<RestoreHeader>,
    /// Name, rules, receipt: not looked into here.
    pub meta: Vec<u8>,
    /// Selected blocks that matter less than the others: they are given up first.
    pub low: ExtentSet,
}

/// A restore in place, part of the commit of its safety snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreHeader {
    /// The snapshot whose content comes back.
    pub source_epoch: u32,
    /// The blocks that read as in the source from this instant on.
    pub blocks: ExtentSet,
}

impl EpochHeader {
    /// As bytes; their checksum goes into the segment header.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u32(self.epoch).u32(self.predecessor);
        out.u64(self.created_unix_ns).u64(self.origin_bytes).extents(&self.selection);
        match &self.restore {
            None => out.u32(0),
            Some(restore) => out.u32(restore.source_epoch).extents(&restore.blocks),
        };
        out.bytes(&self.meta).extents(&self.low);
        out.0
    }

    /// From bytes whose checksum was right.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(bytes);
        let (epoch, predecessor) = (input.u32()?, input.u32()?);
        let (created_unix_ns, origin_bytes) = (input.u64()?, input.u64()?);
        let selection = input.extents()?;
        let restore = match input.u32()? {
            0 => None,
            source_epoch => Some(RestoreHeader { source_epoch, blocks: input.extents()? }),
        };
        let meta = input.bytes()?.to_vec();
        // Headers of earlier releases end here.
        let low = if input.is_at_end() { ExtentSet::new() } else { input.extents()? };
        Ok(Self {
            epoch,
            predecessor,
            created_unix_ns,
            origin_bytes,
            selection,
            restore,
            meta,
            low,
        })
    }
}

/// What a descriptor says of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// The old content is in the payload.
    Preserve = 1,
    /// The old content was all zeroes.
    PreserveZero = 2,
    /// The old content could not be kept.
    Lost = 3,
    /// Changed; nobody needs the old content.
    Changed = 4,
    /// Copied back by a restore, or overwritten during one: the origin is right again.
    Done = 5,
    /// From here on these blocks may change without a record of their own.
    Region = 6,
    /// Which of them did is recorded: the REGION records before this one count no more.
    RegionEnd = 7,
}

impl Kind {
    const fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Preserve,
            2 => Self::PreserveZero,
            3 => Self::Lost,
            4 => Self::Changed,
            5 => Self::Done,
            6 => Self::Region,
            7 => Self::RegionEnd,
            _ => return None,
        })
    }
}

/// In the place of a LOST record's checksum: the old content could not be read from the origin. 0: it
/// could not be kept.
pub const LOST_AT_SOURCE: u32 = 1;

/// One line of a batch: a run of blocks. `Preserve` always has one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// What is said.
    pub kind: Kind,
    /// Of which blocks.
    pub blocks: Extent,
    /// Of the payload; 0 without one, but for [`LOST_AT_SOURCE`].
    pub checksum: u32,
}

const BLOCK_BITS: u32 = 56;

impl Descriptor {
    /// Sixteen bytes: kind and first block, number of blocks, checksum.
    pub fn encode(&self, out: &mut [u8]) {
        debug_assert!(self.blocks.start < 1 << BLOCK_BITS);
        let head = u64::from(self.kind as u8) << BLOCK_BITS | self.blocks.start;
        let count = u32::try_from(self.blocks.len()).expect("runs are split below 2^32 blocks");
        out[..8].copy_from_slice(&head.to_le_bytes());
        out[8..12].copy_from_slice(&count.to_le_bytes());
        out[12..16].copy_from_slice(&self.checksum.to_le_bytes());
    }

    fn decode(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        let head = input.u64()?;
        let count = u64::from(input.u32()?);
        let checksum = input.u32()?;
        let start = head & ((1 << BLOCK_BITS) - 1);
        let kind = Kind::from_u8(head.to_be_bytes()[0]).ok_or(Malformed { at: 0 })?;
        if count == 0 || (kind == Kind::Preserve && count != 1) {
            return Err(Malformed { at: 0 });
        }
        Ok(Self { kind, blocks: Extent::new(start, start + count), checksum })
    }
}

/// First 64 bytes of the head and of the tail of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// The volume.
    pub uuid: [u8; 16],
    /// Grows by one a batch, over all segments.
    pub sequence: u64,
    /// The epoch the records belong to.
    pub epoch: u32,
    /// Descriptors that follow the header.
    pub descriptor_count: u32,
    /// Pages of the head, and of the tail.
    pub head_pages: u32,
    /// Pages of payload between them.
    pub payload_pages: u32,
    /// Checksum of the descriptors.
    pub descriptors_crc: u32,
}

impl BatchHeader {
    /// Pages of the whole batch.
    pub fn total_pages(&self) -> u64 {
        2 * u64::from(self.head_pages) + u64::from(self.payload_pages)
    }

    /// Write the header to the front of `page`.
    pub fn encode(&self, is_tail: bool, page: &mut [u8]) {
        let mut out = Writer(Vec::with_capacity(BATCH_HEADER_BYTES));
        out.u32(if is_tail { TAIL_MAGIC } else { HEAD_MAGIC }).raw(&self.uuid);
        out.u64(self.sequence).u32(self.epoch).u32(self.descriptor_count);
        out.u32(self.head_pages).u32(self.payload_pages).u32(self.descriptors_crc);
        out.0.resize(BATCH_HEADER_BYTES - 4, 0);
        let crc = crc32c::crc32c(&out.0);
        out.u32(crc);
        page[..BATCH_HEADER_BYTES].copy_from_slice(&out.0);
    }

    /// From the front of a page; `None` if it is no intact header of that kind.
    pub fn decode(is_tail: bool, page: &[u8]) -> Option<Self> {
        let magic = if is_tail { TAIL_MAGIC } else { HEAD_MAGIC };
        let covered = page.get(..BATCH_HEADER_BYTES - 4)?;
        let mut input = Reader::new(page);
        if input.u32().ok()? != magic {
            return None;
        }
        let header = Self {
            uuid: input.array().ok()?,
            sequence: input.u64().ok()?,
            epoch: input.u32().ok()?,
            descriptor_count: input.u32().ok()?,
            head_pages: input.u32().ok()?,
            payload_pages: input.u32().ok()?,
            descriptors_crc: input.u32().ok()?,
        };
        let stored = page.get(BATCH_HEADER_BYTES - 4..BATCH_HEADER_BYTES)?;
        let room = u64::from(header.head_pages) * PAGE;
        let needed = to_u64(BATCH_HEADER_BYTES)
            + u64::from(header.descriptor_count) * to_u64(DESCRIPTOR_BYTES);
        let fits = header.head_pages > 0 && needed <= room;
        (stored == crc32c::crc32c(covered).to_le_bytes() && fits).then_some(header)
    }

    /// The descriptors of a head or tail whose header is intact; `None` if their checksum is wrong.
    pub fn descriptors(&self, head: &[u8]) -> Option<Vec<Descriptor>> {
        let length = usize::try_from(self.descriptor_count).ok()? * DESCRIPTOR_BYTES;
        let bytes = head.get(BATCH_HEADER_BYTES..BATCH_HEADER_BYTES + length)?;
        if crc32c::crc32c(bytes) != self.descriptors_crc {
            return None;
        }
        let mut input = Reader::new(bytes);
        (0..self.descriptor_count).map(|_| Descriptor::decode(&mut input).ok()).collect()
    }
}

//! A clone's map: which of its blocks are its own, and what is kept beside it. Layout and reasons
//! are in `docs/formats/overlay.md`.
//!
//! Records are appended one at a time, the next one only after the sync of the last. Each stands
//! twice: one bad sector loses nothing, and what follows a record that cannot be read in either
//! place proves that it was there.

use crate::codec::{Malformed, Reader, Writer};
use crate::extent::{Extent, ExtentSet};
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use crate::storage::{Directory, Storage};
use std::io;
use std::sync::Arc;

const MAGIC: [u8; 8] = *b"SBCLONE\0";
const RECORD_MAGIC: [u8; 4] = *b"SBCR";
/// The version this code writes, and the highest it reads.
pub const CLONE_VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
const PAGE: u64 = 4096;
/// The header stands in the first two pages.
const HEADERS: u64 = 2;
const UNIT: u64 = 512;
const RECORD_HEADER_BYTES: usize = 24;
/// Blocks that one record names at most, in extents, so that no record is large.
const EXTENTS_MAX: usize = 1 << 16;
/// No record is longer: as many extents of the longest numbers, or a note.
const RECORD_BYTES_MAX: u64 = 2 << 20;
/// A map below this is never written anew.
const COMPACT_BYTES_MIN: u64 = 1 << 20;

const RECENT_MAGIC: [u8; 4] = *b"SBRW";
const RECENT_BYTES: usize = 48;

/// What a clone is; never changes but for its generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The volume's identity.
    pub volume: [u8; 16],
    /// The clone's number in its store.
    pub number: u32,
    /// Grows with each reset: the data of an earlier one counts for nothing.
    pub generation: u32,
    /// The snapshot it began as.
    pub epoch: u32,
    /// Bytes a block.
    pub block_size: u32,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// When it was made.
    pub created_unix_ns: u64,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.raw(&MAGIC).u32(CLONE_VERSION).raw(&self.volume).u32(self.number);
        out.u32(self.generation).u32(self.epoch).u32(self.block_size);
        out.u64(self.size_bytes).u64(self.created_unix_ns);
        let crc = crc32c::crc32c(&out.0);
        out.u32(crc);
        debug_assert_eq!(out.0.len(), HEADER_BYTES);
        out.0
    }

    /// `None` if it is not intact.
    fn decode(bytes: &[u8]) -> Result<Option<Self>, MapError> {
        let crc = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
        let fields = || -> Result<(u32, Self, u32, bool), Malformed> {
            let mut input = Reader::new(&bytes[..HEADER_BYTES]);
            let is_ours = input.array::<8>()? == MAGIC;
            let version = input.u32()?;
            let header = Self {
                volume: input.array()?,
                number: input.u32()?,
                generation: input.u32()?,
                epoch: input.u32()?,
                block_size: input.u32()?,
                size_bytes: input.u64()?,
                created_unix_ns: input.u64()?,
            };
            Ok((version, header, input.u32()?, is_ours))
        };
        match fields() {
            Ok((version, header, found, true)) if found == crc => {
                if version > CLONE_VERSION {
                    return Err(MapError::Version(version));
                }
                let is_sound = header.block_size.is_power_of_two() && header.size_bytes > 0;
                Ok(is_sound.then_some(header))
            }
            _ => Ok(None),
        }
    }

    /// Blocks of the disk.
    pub fn block_count(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.block_size))
    }

    /// The file of a clone's map.
    pub fn map_name(number: u32) -> String {
        format!("{number:08x}.map")
    }

    /// The file of its content.
    pub fn data_name(&self) -> String {
        format!("{:08x}-{:08x}.data", self.number, self.generation)
    }

    /// The file that names what was written lately.
    pub fn recent_name(&self) -> String {
        format!("{:08x}-{:08x}.recent", self.number, self.generation)
    }
}

/// Why a map cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The store's disk failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Something that was there is not intact.
    #[error("its map is damaged at byte {at}: which blocks are its own is not known")]
    Damaged {
        /// Where.
        at: u64,
    },
    /// Written by a newer version of the program.
    #[error("its version {0} is newer than this program's {CLONE_VERSION}; use a newer stillblock")]
    Version(u32),
}

/// One record of a map.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Record {
    /// These blocks are the clone's own, durably; and the highest number of what was written lately
    /// that is among them.
    Written { through: u64, blocks: ExtentSet },
    /// Opaque bytes.
    Meta(Vec<u8>),
    /// What was written could not be made durable: why.
    Failed(Vec<u8>),
}

impl Record {
    fn encode(&self, sequence: u64) -> Vec<u8> {
        let mut payload = Writer::default();
        let kind = match self {
            Self::Written { through, blocks } => {
                payload.u64(*through).packed_extents(blocks);
                1
            }
            Self::Meta(meta) => {
                payload.bytes(meta);
                2
            }
            Self::Failed(reason) => {
                payload.bytes(reason);
                3
            }
        };
        let mut out = Writer::default();
        let length = u32::try_from(payload.0.len()).expect("a record is bounded");
        out.raw(&RECORD_MAGIC).u64(sequence).u32(kind).u32(length);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out.0), &payload.0);
        out.u32(crc).raw(&payload.0);
        out.0.resize(out.0.len().next_multiple_of(to_usize(UNIT)), 0);
        out.0
    }

    fn decode(kind: u32, payload: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(payload);
        Ok(match kind {
            1 => Self::Written { through: input.u64()?, blocks: input.packed_extents()? },
            2 => Self::Meta(input.bytes()?.to_vec()),
            3 => Self::Failed(input.bytes()?.to_vec()),
            _ => return Err(Malformed { at: 0 }),
        })
    }
}

/// What a map says.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// The clone's own blocks, all of them durable.
    pub written: ExtentSet,
    /// Of what was written lately, the highest number that is among them.
    pub through: u64,
    /// Opaque bytes.
    pub meta: Vec<u8>,
    /// Why the clone's content is in doubt; empty if it is not.
    pub failure: String,
}

/// The open map.
pub struct Map {
    file: Arc<dyn Storage>,
    header: Header,
    end: u64,
    next_sequence: u64,
    /// It is written anew from here on.
    compact_at: u64,
}

fn broken_header() -> MapError {
    MapError::Damaged { at: 0 }
}

impl Map {
    /// Make a map that takes the place of an earlier one of the same clone, if there is one. The
    /// name is durable once the directory is synced.
    pub fn make(directory: &dyn Directory, header: Header, known: &Known) -> io::Result<Self> {
        let name = Header::map_name(header.number);
        let fresh = format!("{name}.new");
        let file = directory.create(&fresh)?;
        let page = {
            let mut page = header.encode();
            page.resize(to_usize(PAGE), 0);
            page
        };
        file.write_slices_at(0, &[&page, &page])?;
        let mut map = Self { file, header, end: HEADERS * PAGE, next_sequence: 1, compact_at: 0 };
        map.put(&Record::Meta(known.meta.clone()))?;
        for extents in known.written.as_slice().chunks(EXTENTS_MAX) {
            let blocks = extents.iter().copied().collect();
            map.put(&Record::Written { through: known.through, blocks })?;
        }
        map.compact_at = (map.end * 4).max(COMPACT_BYTES_MIN);
        map.file.sync()?;
        directory.rename(&fresh, &name)?;
        Ok(map)
    }

    /// Read it all. Writes nothing.
    pub fn open(directory: &dyn Directory, number: u32) -> Result<(Self, Known), MapError> {
        let file = directory.open(&Header::map_name(number))?;
        let length = file.len()?;
        let mut header = None;
        for copy in 0..HEADERS {
            let mut bytes = [0; HEADER_BYTES];
            if copy * PAGE + PAGE <= length && file.read_at(copy * PAGE, &mut bytes).is_ok() {
                header = header.or(Header::decode(&bytes)?);
            }
        }
        let header = header.filter(|h| h.number == number).ok_or_else(broken_header)?;
        let mut known = Known::default();
        let (mut at, mut sequence) = (HEADERS * PAGE, 1);
        while let Some((record, copy_bytes)) = read_twice(&*file, at, length, sequence)? {
            match record {
                Record::Written { through, blocks } => {
                    if blocks.as_slice().last().is_some_and(|e| e.end > header.block_count()) {
                        return Err(MapError::Damaged { at });
                    }
                    known.written = known.written.union(&blocks);
                    known.through = through;
                }
                Record::Meta(meta) => known.meta = meta,
                Record::Failed(why) => known.failure = String::from_utf8_lossy(&why).into_owned(),
            }
            at += 2 * copy_bytes;
            sequence += 1;
        }
        // The next record is submitted after the sync of the last: what is behind a broken one
        // proves that it was there, and says what nobody knows any more (P2).
        let mut probe = at;
        while probe + UNIT <= length {
            let found = read_one(&*file, probe, length)?;
            if found.is_some_and(|found| found.sequence > sequence) {
                return Err(MapError::Damaged { at });
            }
            probe += UNIT;
        }
        let compact_at = (at * 4).max(COMPACT_BYTES_MIN);
        Ok((Self { file, header, end: at, next_sequence: sequence, compact_at }, known))
    }

    /// What the clone is.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the medium it takes.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }

    /// True if it should be written anew, and shorter.
    pub fn is_long(&self) -> bool {
        self.end > self.compact_at
    }

    fn put(&mut self, record: &Record) -> io::Result<()> {
        let bytes = record.encode(self.next_sequence);
        self.file.write_slices_at(self.end, &[&bytes, &bytes])?;
        self.end += 2 * to_u64(bytes.len());
        self.next_sequence += 1;
        Ok(())
    }

    /// Durable when it returns; after an error it may be there, and the next takes its place.
    fn append(&mut self, record: &Record) -> io::Result<()> {
        let before = (self.end, self.next_sequence);
        let put = self.put(record);
        let is_synced = !is_broken(Rule::CloneMapSync);
        let appended = put.and_then(|()| if is_synced { self.file.sync() } else { Ok(()) });
        if appended.is_err() {
            (self.end, self.next_sequence) = before;
        }
        appended
    }

    /// These blocks are durable; so is what this says, when it returns.
    pub fn note_written(&mut self, through: u64, blocks: &ExtentSet) -> io::Result<()> {
        for extents in blocks.as_slice().chunks(EXTENTS_MAX) {
            let blocks = extents.iter().copied().collect();
            self.append(&Record::Written { through, blocks })?;
        }
        Ok(())
    }

    /// Replace the opaque bytes, durably.
    pub fn set_meta(&mut self, meta: &[u8]) -> io::Result<()> {
        self.append(&Record::Meta(meta.to_vec()))
    }

    /// Say that what was written may be lost.
    pub fn note_failed(&mut self, why: &str) -> io::Result<()> {
        self.append(&Record::Failed(why.as_bytes().to_vec()))
    }
}

/// A record as it stands in the file.
struct Found {
    sequence: u64,
    kind: u32,
    payload: Vec<u8>,
    /// What one copy takes.
    bytes: u64,
}

/// The record with this number, from whichever place it can be read in, and the bytes of one copy.
fn read_twice(
    file: &dyn Storage,
    at: u64,
    length: u64,
    sequence: u64,
) -> Result<Option<(Record, u64)>, MapError> {
    let first = read_one(file, at, length);
    let found = match first {
        Ok(Some(found)) if found.sequence == sequence => Some(found),
        _ => match second_copy(file, at, length, sequence) {
            Some(found) => Some(found),
            // In neither place, and not for want of a record: what it says is not known (P2).
            None => first?.and(None),
        },
    };
    let Some(found) = found else { return Ok(None) };
    let record = Record::decode(found.kind, &found.payload);
    Ok(Some((record.map_err(|_| MapError::Damaged { at })?, found.bytes)))
}

/// It begins where the length in the first copy says, which cannot be read.
fn second_copy(file: &dyn Storage, at: u64, length: u64, sequence: u64) -> Option<Found> {
    let places = (1..=RECORD_BYTES_MAX / UNIT).map(|units| at + units * UNIT);
    places.take_while(|place| *place < length).find_map(|place| {
        let found = read_one(file, place, length).ok().flatten()?;
        (found.sequence == sequence && place == at + found.bytes).then_some(found)
    })
}

/// An intact record at `at`.
fn read_one(file: &dyn Storage, at: u64, length: u64) -> io::Result<Option<Found>> {
    if at + UNIT > length {
        return Ok(None);
    }
    let mut head = [0; RECORD_HEADER_BYTES];
    file.read_at(at, &mut head)?;
    let fields = || -> Result<([u8; 4], u64, u32, u32, u32), Malformed> {
        let mut input = Reader::new(&head);
        Ok((input.array()?, input.u64()?, input.u32()?, input.u32()?, input.u32()?))
    };
    let Ok((magic, sequence, kind, payload_bytes, crc)) = fields() else { return Ok(None) };
    let total = to_u64(RECORD_HEADER_BYTES) + u64::from(payload_bytes);
    if magic != RECORD_MAGIC || total > RECORD_BYTES_MAX || at + total > length {
        return Ok(None);
    }
    let mut payload = vec![0; to_usize(u64::from(payload_bytes))];
    file.read_at(at + to_u64(RECORD_HEADER_BYTES), &mut payload)?;
    let covered = crc32c::crc32c(&head[..RECORD_HEADER_BYTES - 4]);
    let is_intact = crc32c::crc32c_append(covered, &payload) == crc;
    let bytes = total.next_multiple_of(UNIT);
    Ok(is_intact.then_some(Found { sequence, kind, payload, bytes }))
}

/// What was written since the map was last extended: it counts for as long as the kernel lives,
/// which then has the content as well.
pub struct Recent {
    file: Arc<dyn Storage>,
    boot_id: [u8; 16],
    end: u64,
    next: u64,
    /// What the map does not say yet, with the number of each.
    pub waiting: Vec<(u64, Extent)>,
}

impl Recent {
    /// Read what this boot wrote after `through`.
    pub fn open(
        file: Arc<dyn Storage>,
        boot_id: [u8; 16],
        through: u64,
        block_count: u64,
    ) -> io::Result<Self> {
        let length = file.len()?;
        let mut recent = Self { file, boot_id, end: 0, next: through + 1, waiting: Vec::new() };
        let mut last = 0;
        while recent.end + to_u64(RECENT_BYTES) <= length {
            let mut bytes = [0; RECENT_BYTES];
            recent.file.read_at(recent.end, &mut bytes)?;
            let Some((boot, number, extent)) = decode_recent(&bytes) else { break };
            let is_ours = boot == boot_id || is_broken(Rule::CloneRecentOfBoot);
            if !is_ours || number <= last || extent.end > block_count {
                break;
            }
            last = number;
            recent.end += to_u64(RECENT_BYTES);
            recent.next = recent.next.max(number + 1);
            if number > through {
                recent.waiting.push((number, extent));
            }
        }
        recent.forget(through);
        Ok(recent)
    }

    /// Note that the content of these blocks is there. It outlives the process when this returns.
    pub fn note(&mut self, blocks: Extent) -> io::Result<()> {
        let mut out = Writer::default();
        out.raw(&RECENT_MAGIC).raw(&self.boot_id).u64(self.next);
        out.u64(blocks.start).u64(blocks.end);
        let crc = crc32c::crc32c(&out.0);
        out.u32(crc);
        debug_assert_eq!(out.0.len(), RECENT_BYTES);
        self.file.write_at(self.end, &out.0)?;
        self.end += to_u64(RECENT_BYTES);
        self.waiting.push((self.next, blocks));
        self.next += 1;
        Ok(())
    }

    /// The number of the last one.
    pub fn last(&self) -> u64 {
        self.next - 1
    }

    /// The map says everything up to this number: forget it, and begin at the front again if that
    /// is all.
    pub fn forget(&mut self, through: u64) {
        self.waiting.retain(|(number, _)| *number > through);
        if self.waiting.is_empty() {
            self.end = 0;
        }
    }

    /// Bytes of the medium it takes.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }

    /// Bytes of it that count.
    pub fn bytes(&self) -> u64 {
        self.end
    }
}

fn decode_recent(bytes: &[u8; RECENT_BYTES]) -> Option<([u8; 16], u64, Extent)> {
    let mut input = Reader::new(bytes);
    let magic: [u8; 4] = input.array().ok()?;
    let (boot, number) = (input.array().ok()?, input.u64().ok()?);
    let (start, end, crc) = (input.u64().ok()?, input.u64().ok()?, input.u32().ok()?);
    let is_intact =
        magic == RECENT_MAGIC && crc == crc32c::crc32c(&bytes[..RECENT_BYTES - 4]) && start < end;
    is_intact.then_some((boot, number, Extent { start, end }))
}

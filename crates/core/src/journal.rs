//! The volume journal: every decision that is not the commit of an instant, in order, durable
//! before it acts.
//!
//! Records start at multiples of 512 bytes; see `docs/formats/journal.md`. A record that is not
//! intact ends the journal if nothing valid follows it; with something valid after it the journal
//! is damaged, and the store is refused rather than guessed at.

mod compaction;
mod entry;

pub(crate) use self::compaction::{Outline, Replacement, Seen};
pub(crate) use self::entry::kind;
pub use self::entry::{
    Compacted, Entry, GROUP_MEMBERS_MAX, Group, GroupMember, OnFull, OriginIdentity, Settled,
    StorePolicy,
};

use self::entry::{VERSION_1_KIND_MAX, VERSION_2_KIND_MAX};

use crate::codec::{Malformed, Reader, Writer};
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use crate::storage::{Directory, Storage};
use std::io;
use std::sync::Arc;

/// The journal's file name in the store.
pub const JOURNAL_NAME: &str = "journal";
/// The name under which a compacted journal is written. Nothing is ever read from there.
pub const JOURNAL_NEW_NAME: &str = "journal.new";
const UNIT: u64 = 512;
/// What the shortest record takes in the file.
pub(crate) const RECORD_UNIT: u64 = UNIT;
const MAGIC: [u8; 4] = *b"SBJR";
const HEADER_BYTES: usize = 28;
/// The highest version this code reads; it writes the lowest that has a record's kind.
pub const JOURNAL_VERSION: u32 = 3;
/// Space kept allocated beyond the end, so that marks can be written when the store is full.
pub(crate) const RESERVE_BYTES: u64 = 1 << 20;
/// No record of ours is longer: a selection of 16 million extents.
const RECORD_BYTES_MAX: u32 = 256 << 20;
/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The store's disk failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Not intact, with valid records after it.
    #[error(
        "the journal is damaged at byte {at}: what was decided there, a deletion or a loss, is not \
         known, so no snapshot is opened; the origin is not touched and is a disk of its own; \
         restore the store from a copy, or let go of it with volume remove --keep-store"
    )]
    Damaged {
        /// Where.
        at: u64,
    },
    /// Written by a newer version of the program.
    #[error("journal version {0} is newer than this program's {JOURNAL_VERSION}")]
    Version(u32),
    /// More than a record may hold; nothing was written.
    #[error("a record of {bytes} bytes is more than the journal's {RECORD_BYTES_MAX}")]
    TooLarge {
        /// What it would take.
        bytes: usize,
    },
    /// What an earlier, failed write may have left cannot be wiped out.
    #[error("an earlier write of the volume journal failed, and cannot be undone yet: {0}")]
    Broken(io::Error),
    /// The name may lead to the compacted journal or to the one before it; they say the same, and
    /// must go on doing so.
    #[error("the volume journal was compacted, and its name is not known to be durable yet: {0}")]
    Unsettled(io::Error),
    /// The name leads to a file that this program did not put there.
    #[error(
        "the file {JOURNAL_NAME} in the store is not the one that this volume was opened with, and \
         is left as it is; decisions go to that one, which has no name any more: find out who \
         replaced it before you stop this volume"
    )]
    Replaced,
}

/// The open journal.
pub struct Journal {
    directory: Arc<dyn Directory>,
    file: Arc<dyn Storage>,
    /// Sequence number of the first record: 1 until it is compacted.
    first_sequence: u64,
    end: u64,
    /// Where the last record begins.
    last_start: u64,
    next_sequence: u64,
    allocated: u64,
    /// Bytes behind the end that a failed append may have left: a decision that was not taken, and
    /// that must not be found by the next opening.
    left_behind: u64,
    /// A compacted journal that says the same, and that the name may lead to by now.
    replacement: Option<Replacement>,
}

impl Journal {
    /// Make the journal of a new store; `first` is durable when this returns.
    pub fn create(directory: Arc<dyn Directory>, first: &Entry) -> Result<Self, JournalError> {
        let file = directory.create(JOURNAL_NAME)?;
        let mut journal = Self::at(directory, file, 1);
        journal.append(first)?;
        journal.directory.sync()?;
        Ok(journal)
    }

    /// Read it all. Writes nothing.
    pub fn open(directory: Arc<dyn Directory>) -> Result<(Self, Vec<Entry>), JournalError> {
        let file = directory.open(JOURNAL_NAME)?;
        let length = file.len()?;
        let first = first_sequence(&*file, length)?;
        let mut journal = Self::at(directory, Arc::clone(&file), first);
        let mut entries = Vec::new();
        while let Some((entry, next)) =
            read_record(&*file, journal.end, length, journal.next_sequence)?
        {
            entries.push(entry);
            journal.last_start = journal.end;
            journal.end = next;
            journal.next_sequence += 1;
        }
        let at = journal.end;
        let mut probe = at + UNIT;
        while probe < length {
            let found = any_record(&*file, probe, length)?;
            if found.is_some_and(|header| header.sequence >= journal.next_sequence) {
                return Err(JournalError::Damaged { at });
            }
            probe += UNIT;
        }
        journal.allocated = at;
        Ok((journal, entries))
    }

    /// An empty one.
    fn at(directory: Arc<dyn Directory>, file: Arc<dyn Storage>, first_sequence: u64) -> Self {
        Self {
            directory,
            file,
            first_sequence,
            end: 0,
            last_start: 0,
            next_sequence: first_sequence,
            allocated: 0,
            left_behind: 0,
            replacement: None,
        }
    }

    /// How coarse marks should be, in bytes of the disk: the less is left of the reserve, the more each
    /// has to cover, so that it lasts. 1: exact.
    pub fn mark_bytes(&self) -> u64 {
        match self.allocated.saturating_sub(self.end) {
            left if left >= RESERVE_BYTES / 2 => 1,
            left if left >= RESERVE_BYTES * 3 / 8 => 1 << 20,
            _ => 64 << 20,
        }
    }

    /// Make what was read durable. A killed process may have written the last record and not
    /// synced it; or its sync failed, and only what is written again will be.
    pub fn rewrite_last(&self) -> Result<(), JournalError> {
        let mut record = vec![0; to_usize(self.end - self.last_start)];
        self.file.read_at(self.last_start, &mut record)?;
        self.file.write_at(self.last_start, &record)?;
        Ok(self.file.sync()?)
    }

    /// Sequence number of the first record.
    pub fn first_sequence(&self) -> u64 {
        self.first_sequence
    }

    /// Sequence number of the last record.
    pub fn last_sequence(&self) -> u64 {
        self.next_sequence - 1
    }

    /// True if the reserve is running out: what still has to be said of a full store must be said
    /// in one record.
    pub fn is_short_of_room(&self, record_bytes: u64) -> bool {
        self.end + record_bytes + RESERVE_BYTES / 4 > self.allocated
    }

    /// Bytes of the medium it takes, its reserve included.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }

    /// Have the reserve allocated, as far as there is room.
    pub fn reserve(&mut self) {
        self.reserve_behind(0);
    }

    /// The same behind a record that is still to be written.
    fn reserve_behind(&mut self, record_bytes: u64) {
        let end = self.end + record_bytes;
        // A full store may refuse; the reserve from before is there for exactly that.
        if end + RESERVE_BYTES / 2 > self.allocated
            && self.file.allocate(self.end, record_bytes + RESERVE_BYTES).is_ok()
        {
            self.allocated = end + RESERVE_BYTES;
        }
    }

    /// Wipe out what a failed append may have left. Until that is possible nothing more can be
    /// decided, nor anything be built on what was decided before: an opening might see more.
    pub fn heal(&mut self) -> Result<(), JournalError> {
        self.settle_name()?;
        if self.left_behind == 0 || is_broken(Rule::FailedDecisionsUndone) {
            return Ok(());
        }
        let nothing = vec![0; to_usize(self.left_behind)];
        let wiped = self.file.write_at(self.end, &nothing).and_then(|()| self.file.sync());
        wiped.map_err(JournalError::Broken)?;
        self.left_behind = 0;
        Ok(())
    }

    /// Make a decision durable. After an error it is not taken.
    pub fn append(&mut self, entry: &Entry) -> Result<(), JournalError> {
        self.heal()?;
        let (kind, payload) = entry.encode();
        check_length(&payload)?;
        let record = encode_record(self.next_sequence, kind, &payload);
        let end = self.end + to_u64(record.len());
        self.reserve_behind(to_u64(record.len()));
        let synced = || if is_broken(Rule::JournalSync) { Ok(()) } else { self.file.sync() };
        let written = self.file.write_at(self.end, &record).and_then(|()| synced());
        if let Err(error) = written {
            self.left_behind = to_u64(record.len());
            // Tried again before anything else is decided.
            let _ = self.heal();
            return Err(error.into());
        }
        self.last_start = self.end;
        self.end = end;
        self.next_sequence += 1;
        Ok(())
    }
}

/// A longer record could not be read back, and the journal would end there.
fn check_length(payload: &[u8]) -> Result<(), JournalError> {
    let is_short = payload.len() <= to_usize(u64::from(RECORD_BYTES_MAX));
    if is_short { Ok(()) } else { Err(JournalError::TooLarge { bytes: payload.len() }) }
}

/// magic, version, sequence, kind, payload length, checksum of all of it, payload, padding.
fn encode_record(sequence: u64, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Writer::default();
    let length = u32::try_from(payload.len()).expect("a record is bounded");
    let version = match kind {
        _ if kind <= VERSION_1_KIND_MAX => 1,
        _ if kind <= VERSION_2_KIND_MAX => 2,
        _ => JOURNAL_VERSION,
    };
    out.raw(&MAGIC).u32(version).u64(sequence).u32(u32::from(kind)).u32(length);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&out.0), payload);
    out.u32(crc).raw(payload);
    out.0.resize(out.0.len().next_multiple_of(to_usize(UNIT)), 0);
    out.0
}

struct RecordHeader {
    version: u32,
    sequence: u64,
    kind: u32,
    length: u32,
    crc: u32,
    covered_crc: u32,
}

fn read_header(file: &dyn Storage, at: u64, length: u64) -> io::Result<Option<RecordHeader>> {
    if at + to_u64(HEADER_BYTES) > length {
        return Ok(None);
    }
    let mut bytes = [0; HEADER_BYTES];
    file.read_at(at, &mut bytes)?;
    Ok(parse_header(&bytes).ok())
}

fn parse_header(bytes: &[u8; HEADER_BYTES]) -> Result<RecordHeader, Malformed> {
    let mut input = Reader::new(bytes);
    if input.array::<4>()? != MAGIC {
        return Err(Malformed { at: 0 });
    }
    Ok(RecordHeader {
        version: input.u32()?,
        sequence: input.u64()?,
        kind: input.u32()?,
        length: input.u32()?,
        crc: input.u32()?,
        covered_crc: crc32c::crc32c(&bytes[..HEADER_BYTES - 4]),
    })
}

fn read_payload(
    file: &dyn Storage,
    at: u64,
    length: u64,
    header: &RecordHeader,
) -> io::Result<Option<Vec<u8>>> {
    let start = at + to_u64(HEADER_BYTES);
    if header.length > RECORD_BYTES_MAX || start + u64::from(header.length) > length {
        return Ok(None);
    }
    let mut payload = vec![0; to_usize(u64::from(header.length))];
    file.read_at(start, &mut payload)?;
    let crc = crc32c::crc32c_append(header.covered_crc, &payload);
    Ok((crc == header.crc).then_some(payload))
}

/// The record with this sequence number at `at`, and where the next one starts.
fn read_record(
    file: &dyn Storage,
    at: u64,
    length: u64,
    sequence: u64,
) -> Result<Option<(Entry, u64)>, JournalError> {
    let Some(header) = read_header(file, at, length)? else { return Ok(None) };
    let Some(payload) = read_payload(file, at, length, &header)? else { return Ok(None) };
    if header.version > JOURNAL_VERSION {
        return Err(JournalError::Version(header.version));
    }
    if header.sequence != sequence {
        return Ok(None);
    }
    let kind = u8::try_from(header.kind).map_err(|_| JournalError::Damaged { at })?;
    let entry = Entry::decode(kind, &payload).map_err(|_| JournalError::Damaged { at })?;
    let next = (at + to_u64(HEADER_BYTES) + u64::from(header.length)).next_multiple_of(UNIT);
    Ok(Some((entry, next)))
}

/// The header of an intact record at `at`.
fn any_record(
    file: &dyn Storage,
    at: u64,
    length: u64,
) -> Result<Option<RecordHeader>, JournalError> {
    let Some(header) = read_header(file, at, length)? else { return Ok(None) };
    Ok(read_payload(file, at, length, &header)?.map(|_| header))
}

/// The number that the first record must have: in a compacted journal the numbers go on.
fn first_sequence(file: &dyn Storage, length: u64) -> Result<u64, JournalError> {
    let first = any_record(file, 0, length)?;
    let compacted = first.filter(|header| header.kind == u32::from(kind::COMPACTED));
    Ok(compacted.map_or(1, |header| header.sequence))
}

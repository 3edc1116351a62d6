//! The volume journal: every decision that is not the commit of an instant, in order, durable
//! before it acts.
//!
//! Records start at multiples of 512 bytes; see `docs/formats/journal.md`. A record that is not
//! intact ends the journal if nothing valid follows it; with something valid after it the journal
//! is damaged, and the store is refused rather than guessed at.

mod compaction;

pub(crate) use self::compaction::{Outline, Replacement, Seen};

use crate::codec::{Malformed, Reader, Writer};
use crate::extent::{Extent, ExtentSet};
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

/// What tells the origin from any other disk, and whether somebody else wrote to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OriginIdentity {
    /// Device of the filesystem that holds the file, or of the block device.
    pub device: u64,
    /// Inode, 0 for a block device.
    pub inode: u64,
    /// Length.
    pub bytes: u64,
    /// Last change of the content, 0 for a block device.
    pub modified_unix_ns: u64,
}

impl OriginIdentity {
    /// True if it is another disk, or was written since. The device is not compared: its number
    /// changes at boot. One that grew is still what it was; a file that grew was written as well,
    /// which its time of change tells, and what else was written nobody knows.
    pub fn is_other_than(&self, now: &Self) -> bool {
        self.bytes > now.bytes
            || self.modified_unix_ns != now.modified_unix_ns
            || self.inode != now.inode
    }
}

/// One decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// The first record: the volume exists.
    Created {
        /// Its identity.
        uuid: [u8; 16],
        /// Bytes a block.
        block_size: u32,
        /// Where the origin was.
        origin: Vec<u8>,
        /// What it was.
        identity: OriginIdentity,
        /// Name, rules, policy: not looked into here.
        meta: Vec<u8>,
    },
    /// The volume was opened by a process of this boot; it is in use until `Closed`.
    Opened {
        /// The kernel's boot id.
        boot_id: [u8; 16],
        /// Grows by one an opening.
        generation: u64,
        /// Where the origin is now.
        origin: Vec<u8>,
        /// The write buffer's file, empty if it dies with the process.
        buffer: Vec<u8>,
    },
    /// The origin is complete.
    Closed {
        /// What it is now.
        identity: OriginIdentity,
        /// Sequence number the next batch of the log will have, 0 if there is no log: a log that
        /// ends earlier has lost its tail.
        next_batch: u64,
    },
    /// The volume's opaque bytes.
    VolumeMeta(Vec<u8>),
    /// A snapshot's opaque bytes.
    EpochMeta {
        /// Which.
        epoch: u32,
        /// The bytes.
        meta: Vec<u8>,
    },
    /// A snapshot selects less.
    Narrowed {
        /// Which.
        epoch: u32,
        /// What it selects now.
        selection: ExtentSet,
        /// What else is known now, if this was the last word on it.
        settled: Option<Settled>,
    },
    /// A snapshot is gone.
    Deleted {
        /// Which.
        epoch: u32,
    },
    /// What only deleted or narrowed snapshots needed, up to this record, has been given back.
    Freed,
    /// A bookmark with the selection that the snapshot has now.
    Bookmarked {
        /// Of which instant.
        epoch: u32,
        /// Opaque bytes.
        meta: Vec<u8>,
    },
    /// A bookmark is gone.
    BookmarkDeleted {
        /// Of which instant.
        epoch: u32,
    },
    /// The origin has another size.
    Resized {
        /// Since which epoch.
        epoch: u32,
        /// In bytes.
        bytes: u64,
    },
    /// An instant failed after its header may have become durable; it never was.
    Aborted {
        /// Which.
        epoch: u32,
    },
    /// Old content that could not be kept.
    Lost {
        /// In which epoch it changed.
        epoch: u32,
        /// Which blocks.
        blocks: ExtentSet,
    },
    /// The origin was written outside; snapshots up to this epoch are in doubt.
    Suspect {
        /// The last of them.
        epoch: u32,
        /// For people.
        reason: Vec<u8>,
    },
    /// A restore ended.
    RestoreEnded {
        /// Its safety snapshot.
        epoch: u32,
    },
    /// The origin failed to make writes durable: what was flushed before may be lost.
    OriginFailed {
        /// For people.
        reason: Vec<u8>,
    },
    /// Somebody looked at a failed or doubtful origin and accepts it as it is.
    Recovered,
    /// Of what was decided up to a record, the space of all blocks before one has been given back.
    Freeing {
        /// That record's sequence number.
        sequence: u64,
        /// That block.
        block: u64,
    },
    /// Somebody accepts the origin although it was written outside: the snapshots up to this epoch
    /// are in doubt no more.
    Accepted {
        /// The last of them.
        epoch: u32,
        /// Who and when, for people.
        note: Vec<u8>,
    },
    /// What happens when the store is full, and how much it may take.
    Policy(StorePolicy),
    /// Copies that were given up for blocks that matter more: lost from here on.
    GivenUp {
        /// The epoch whose records held them.
        epoch: u32,
        /// Which blocks.
        blocks: ExtentSet,
    },
    /// Blocks a restore has brought back, said here because the log had no room for it.
    Restored {
        /// The restore's safety snapshot.
        epoch: u32,
        /// Which blocks.
        blocks: ExtentSet,
    },
    /// The first record of a compacted journal: what it says of everything that has no record of its
    /// own there any more.
    Compacted(Compacted),
}

/// What was decided of instants that need no record of their own any more. Epoch numbers are in
/// sets, as blocks are elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Compacted {
    /// The highest epoch number that had been given out. All here is about those up to it.
    pub epoch_max: u32,
    /// The safety snapshot of the restore that was not done, 0 if there was none: every other one is.
    pub restoring: u32,
    /// Instants at which nothing begins any more, whatever the log has of them.
    pub gone: ExtentSet,
    /// Instants that failed after their headers may have become durable; they never were.
    pub aborted: ExtentSet,
}

/// What is known of a snapshot once its selection is final.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settled {
    /// Its opaque bytes from here on.
    pub meta: Vec<u8>,
    /// What of its selection matters less.
    pub low: ExtentSet,
}

/// What happens to a first change when its original cannot be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFull {
    /// The write goes on and the snapshot loses the block.
    #[default]
    Degrade = 0,
    /// The write waits until there is room.
    Hold = 1,
    /// The write fails.
    Fail = 2,
}

/// What happens when the store is full, and how much it may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StorePolicy {
    /// What happens to first changes then.
    pub on_full: OnFull,
    /// Bytes the store may take; 0: as much as its filesystem has.
    pub limit_bytes: u64,
}

/// The number of each kind of record. The payload of one that is about an epoch begins with it.
pub(crate) mod kind {
    pub(crate) const CREATED: u8 = 1;
    pub(crate) const OPENED: u8 = 2;
    pub(crate) const CLOSED: u8 = 3;
    pub(crate) const VOLUME_META: u8 = 4;
    pub(crate) const EPOCH_META: u8 = 5;
    pub(crate) const NARROWED: u8 = 6;
    pub(crate) const DELETED: u8 = 7;
    pub(crate) const FREED: u8 = 8;
    pub(crate) const BOOKMARKED: u8 = 9;
    pub(crate) const BOOKMARK_DELETED: u8 = 10;
    pub(crate) const RESIZED: u8 = 11;
    pub(crate) const ABORTED: u8 = 12;
    pub(crate) const LOST: u8 = 13;
    pub(crate) const SUSPECT: u8 = 14;
    pub(crate) const RESTORE_ENDED: u8 = 15;
    pub(crate) const ORIGIN_FAILED: u8 = 16;
    pub(crate) const RECOVERED: u8 = 17;
    pub(crate) const ACCEPTED: u8 = 18;
    pub(crate) const POLICY: u8 = 19;
    pub(crate) const GIVEN_UP: u8 = 20;
    pub(crate) const RESTORED: u8 = 21;
    pub(crate) const NARROWED_AS: u8 = 22;
    pub(crate) const FREEING: u8 = 24;
    pub(crate) const COMPACTED: u8 = 25;
}

/// The last kinds of versions 1 and 2: a program that does not know later ones says so.
const VERSION_1_KIND_MAX: u8 = kind::RECOVERED;
const VERSION_2_KIND_MAX: u8 = kind::FREEING;

impl Entry {
    fn encode(&self) -> (u8, Vec<u8>) {
        let mut out = Writer::default();
        let kind = match self {
            Self::Created { uuid, block_size, origin, identity, meta } => {
                out.raw(uuid).u32(*block_size).bytes(origin);
                put_identity(&mut out, identity);
                out.bytes(meta);
                kind::CREATED
            }
            Self::Opened { boot_id, generation, origin, buffer } => {
                out.raw(boot_id).u64(*generation).bytes(origin).bytes(buffer);
                kind::OPENED
            }
            Self::Closed { identity, next_batch } => {
                put_identity(&mut out, identity);
                out.u64(*next_batch);
                kind::CLOSED
            }
            Self::VolumeMeta(meta) => {
                out.bytes(meta);
                kind::VOLUME_META
            }
            Self::EpochMeta { epoch, meta } => {
                out.u32(*epoch).bytes(meta);
                kind::EPOCH_META
            }
            Self::Narrowed { epoch, selection, settled: None } => {
                out.u32(*epoch).extents(selection);
                kind::NARROWED
            }
            Self::Narrowed { epoch, selection, settled: Some(settled) } => {
                out.u32(*epoch).bytes(&settled.meta);
                out.packed_extents(selection).packed_extents(&settled.low);
                kind::NARROWED_AS
            }
            Self::Deleted { epoch } => {
                out.u32(*epoch);
                kind::DELETED
            }
            Self::Freed => kind::FREED,
            Self::Bookmarked { epoch, meta } => {
                out.u32(*epoch).bytes(meta);
                kind::BOOKMARKED
            }
            Self::BookmarkDeleted { epoch } => {
                out.u32(*epoch);
                kind::BOOKMARK_DELETED
            }
            Self::Resized { epoch, bytes } => {
                out.u32(*epoch).u64(*bytes);
                kind::RESIZED
            }
            Self::Aborted { epoch } => {
                out.u32(*epoch);
                kind::ABORTED
            }
            Self::Lost { epoch, blocks } => {
                out.u32(*epoch).extents(blocks);
                kind::LOST
            }
            Self::Suspect { epoch, reason } => {
                out.u32(*epoch).bytes(reason);
                kind::SUSPECT
            }
            Self::RestoreEnded { epoch } => {
                out.u32(*epoch);
                kind::RESTORE_ENDED
            }
            Self::OriginFailed { reason } => {
                out.bytes(reason);
                kind::ORIGIN_FAILED
            }
            Self::Recovered => kind::RECOVERED,
            Self::Accepted { epoch, note } => {
                out.u32(*epoch).bytes(note);
                kind::ACCEPTED
            }
            Self::Freeing { sequence, block } => {
                out.u64(*sequence).u64(*block);
                kind::FREEING
            }
            Self::Policy(policy) => {
                out.u32(policy.on_full as u32).u64(policy.limit_bytes);
                kind::POLICY
            }
            Self::GivenUp { epoch, blocks } => {
                out.u32(*epoch).extents(blocks);
                kind::GIVEN_UP
            }
            Self::Restored { epoch, blocks } => {
                out.u32(*epoch).extents(blocks);
                kind::RESTORED
            }
            Self::Compacted(compacted) => {
                out.u32(compacted.epoch_max).u32(compacted.restoring);
                out.packed_extents(&compacted.gone).packed_extents(&compacted.aborted);
                kind::COMPACTED
            }
        };
        (kind, out.0)
    }

    /// Bytes that its record takes in the file.
    pub(crate) fn record_bytes(&self) -> u64 {
        to_u64(HEADER_BYTES + self.encode().1.len()).next_multiple_of(UNIT)
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(payload);
        Ok(match kind {
            kind::CREATED => Self::Created {
                uuid: input.array()?,
                block_size: input.u32()?,
                origin: input.bytes()?.to_vec(),
                identity: take_identity(&mut input)?,
                meta: input.bytes()?.to_vec(),
            },
            kind::OPENED => Self::Opened {
                boot_id: input.array()?,
                generation: input.u64()?,
                origin: input.bytes()?.to_vec(),
                buffer: input.bytes()?.to_vec(),
            },
            kind::CLOSED => {
                Self::Closed { identity: take_identity(&mut input)?, next_batch: input.u64()? }
            }
            kind::VOLUME_META => Self::VolumeMeta(input.bytes()?.to_vec()),
            kind::EPOCH_META => {
                Self::EpochMeta { epoch: input.u32()?, meta: input.bytes()?.to_vec() }
            }
            kind::NARROWED => {
                let (epoch, selection) = (input.u32()?, input.extents()?);
                Self::Narrowed { epoch, selection, settled: None }
            }
            kind::DELETED => Self::Deleted { epoch: input.u32()? },
            kind::FREED => Self::Freed,
            kind::BOOKMARKED => {
                Self::Bookmarked { epoch: input.u32()?, meta: input.bytes()?.to_vec() }
            }
            kind::BOOKMARK_DELETED => Self::BookmarkDeleted { epoch: input.u32()? },
            kind::RESIZED => Self::Resized { epoch: input.u32()?, bytes: input.u64()? },
            kind::ABORTED => Self::Aborted { epoch: input.u32()? },
            kind::LOST => Self::Lost { epoch: input.u32()?, blocks: input.extents()? },
            kind::SUSPECT => Self::Suspect { epoch: input.u32()?, reason: input.bytes()?.to_vec() },
            kind::RESTORE_ENDED => Self::RestoreEnded { epoch: input.u32()? },
            kind::ORIGIN_FAILED => Self::OriginFailed { reason: input.bytes()?.to_vec() },
            kind::RECOVERED => Self::Recovered,
            kind::ACCEPTED => Self::Accepted { epoch: input.u32()?, note: input.bytes()?.to_vec() },
            kind::FREEING => Self::Freeing { sequence: input.u64()?, block: input.u64()? },
            kind::POLICY => {
                let number = input.u32()?;
                let known = [OnFull::Degrade, OnFull::Hold, OnFull::Fail];
                let on_full = known.into_iter().find(|&on_full| on_full as u32 == number);
                let on_full = on_full.ok_or(Malformed { at: 0 })?;
                Self::Policy(StorePolicy { on_full, limit_bytes: input.u64()? })
            }
            kind::GIVEN_UP => Self::GivenUp { epoch: input.u32()?, blocks: input.extents()? },
            kind::RESTORED => Self::Restored { epoch: input.u32()?, blocks: input.extents()? },
            kind::NARROWED_AS => {
                let (epoch, meta) = (input.u32()?, input.bytes()?.to_vec());
                let (selection, low) = (input.packed_extents()?, input.packed_extents()?);
                Self::Narrowed { epoch, selection, settled: Some(Settled { meta, low }) }
            }
            kind::COMPACTED => {
                let (epoch_max, restoring) = (input.u32()?, input.u32()?);
                let (gone, aborted) = (input.packed_extents()?, input.packed_extents()?);
                let is_beyond = |last: &Extent| last.end > u64::from(epoch_max) + 1;
                let last = [gone.as_slice().last(), aborted.as_slice().last()];
                if last.into_iter().flatten().any(is_beyond) {
                    // Numbers that were never given out.
                    return Err(Malformed { at: 0 });
                }
                Self::Compacted(Compacted { epoch_max, restoring, gone, aborted })
            }
            _ => return Err(Malformed { at: 0 }),
        })
    }
}

fn put_identity(out: &mut Writer, identity: &OriginIdentity) {
    out.u64(identity.device).u64(identity.inode).u64(identity.bytes).u64(identity.modified_unix_ns);
}

fn take_identity(input: &mut Reader<'_>) -> Result<OriginIdentity, Malformed> {
    Ok(OriginIdentity {
        device: input.u64()?,
        inode: input.u64()?,
        bytes: input.u64()?,
        modified_unix_ns: input.u64()?,
    })
}

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

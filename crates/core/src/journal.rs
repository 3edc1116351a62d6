//! The volume journal: every decision that is not the commit of an instant, in order, durable
//! before it acts.
//!
//! Records start at multiples of 512 bytes; see `docs/formats/journal.md`. A record that is not
//! intact ends the journal if nothing valid follows it; with something valid after it the journal
//! is damaged, and the store is refused rather than guessed at.

use crate::codec::{Malformed, Reader, Writer};
use crate::extent::ExtentSet;
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use crate::storage::{Directory, Storage};
use std::io;
use std::sync::Arc;

/// The journal's file name in the store.
pub const JOURNAL_NAME: &str = "journal";
const UNIT: u64 = 512;
const MAGIC: [u8; 4] = *b"SBJR";
const HEADER_BYTES: usize = 28;
/// The highest version this code reads; it writes the lowest that has a record's kind.
pub const JOURNAL_VERSION: u32 = 3;
/// Space kept allocated beyond the end, so that marks can be written when the store is full.
const RESERVE_BYTES: u64 = 1 << 20;
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
    /// An instant of several volumes is about to be taken here: until the group is decided the
    /// header of this epoch alone says nothing.
    GroupBegun {
        /// The epoch it begins here; the number is given to no other instant.
        epoch: u32,
        /// All who take part.
        group: Group,
    },
    /// All members of a group have their snapshots, or none has. In the journal of its first member:
    /// the commit of all of them. In the others: what was decided there.
    GroupDecided {
        /// The epoch it begins here.
        epoch: u32,
        /// Which group.
        id: [u8; 16],
        /// False: the snapshot of this epoch never was.
        is_committed: bool,
    },
}

/// Volumes that have one instant in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its identity.
    pub id: [u8; 16],
    /// Who takes part, in the order of their uuids; the journal of the first decides.
    pub members: Vec<GroupMember>,
}

/// One volume of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupMember {
    /// Which volume.
    pub uuid: [u8; 16],
    /// The epoch that the instant begins there.
    pub epoch: u32,
    /// Where its store was then.
    pub store: Vec<u8>,
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
    Degrade,
    /// The write waits until there is room.
    Hold,
    /// The write fails.
    Fail,
}

/// What happens when the store is full, and how much it may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StorePolicy {
    /// What happens to first changes then.
    pub on_full: OnFull,
    /// Bytes the store may take; 0: as much as its filesystem has.
    pub limit_bytes: u64,
}

/// Kinds above these came with versions 2 and 3: a program that does not know them says so.
const VERSION_1_KIND_MAX: u8 = 17;
const VERSION_2_KIND_MAX: u8 = 24;
/// Volumes of one group: far more than one process serves.
pub const GROUP_MEMBERS_MAX: usize = 64;

impl Entry {
    fn encode(&self) -> (u8, Vec<u8>) {
        let mut out = Writer::default();
        let kind = match self {
            Self::Created { uuid, block_size, origin, identity, meta } => {
                out.raw(uuid).u32(*block_size).bytes(origin);
                put_identity(&mut out, identity);
                out.bytes(meta);
                1
            }
            Self::Opened { boot_id, generation, origin, buffer } => {
                out.raw(boot_id).u64(*generation).bytes(origin).bytes(buffer);
                2
            }
            Self::Closed { identity, next_batch } => {
                put_identity(&mut out, identity);
                out.u64(*next_batch);
                3
            }
            Self::VolumeMeta(meta) => {
                out.bytes(meta);
                4
            }
            Self::EpochMeta { epoch, meta } => {
                out.u32(*epoch).bytes(meta);
                5
            }
            Self::Narrowed { epoch, selection, settled: None } => {
                out.u32(*epoch).extents(selection);
                6
            }
            Self::Narrowed { epoch, selection, settled: Some(settled) } => {
                out.u32(*epoch).bytes(&settled.meta);
                out.packed_extents(selection).packed_extents(&settled.low);
                22
            }
            Self::Deleted { epoch } => {
                out.u32(*epoch);
                7
            }
            Self::Freed => 8,
            Self::Bookmarked { epoch, meta } => {
                out.u32(*epoch).bytes(meta);
                9
            }
            Self::BookmarkDeleted { epoch } => {
                out.u32(*epoch);
                10
            }
            Self::Resized { epoch, bytes } => {
                out.u32(*epoch).u64(*bytes);
                11
            }
            Self::Aborted { epoch } => {
                out.u32(*epoch);
                12
            }
            Self::Lost { epoch, blocks } => {
                out.u32(*epoch).extents(blocks);
                13
            }
            Self::Suspect { epoch, reason } => {
                out.u32(*epoch).bytes(reason);
                14
            }
            Self::RestoreEnded { epoch } => {
                out.u32(*epoch);
                15
            }
            Self::OriginFailed { reason } => {
                out.bytes(reason);
                16
            }
            Self::Recovered => 17,
            Self::Accepted { epoch, note } => {
                out.u32(*epoch).bytes(note);
                18
            }
            Self::Freeing { sequence, block } => {
                out.u64(*sequence).u64(*block);
                24
            }
            Self::Policy(policy) => {
                let on_full = match policy.on_full {
                    OnFull::Degrade => 0,
                    OnFull::Hold => 1,
                    OnFull::Fail => 2,
                };
                out.u32(on_full).u64(policy.limit_bytes);
                19
            }
            Self::GivenUp { epoch, blocks } => {
                out.u32(*epoch).extents(blocks);
                20
            }
            Self::Restored { epoch, blocks } => {
                out.u32(*epoch).extents(blocks);
                21
            }
            Self::GroupBegun { .. } | Self::GroupDecided { .. } => self.encode_group(&mut out),
        };
        (kind, out.0)
    }

    fn encode_group(&self, out: &mut Writer) -> u8 {
        match self {
            Self::GroupBegun { epoch, group } => {
                out.u32(*epoch);
                put_group(out, group);
                26
            }
            Self::GroupDecided { epoch, id, is_committed } => {
                out.u32(*epoch).raw(id).u32(u32::from(*is_committed));
                27
            }
            _ => unreachable!("called for these only"),
        }
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Self, Malformed> {
        let mut input = Reader::new(payload);
        Ok(match kind {
            1 => Self::Created {
                uuid: input.array()?,
                block_size: input.u32()?,
                origin: input.bytes()?.to_vec(),
                identity: take_identity(&mut input)?,
                meta: input.bytes()?.to_vec(),
            },
            2 => Self::Opened {
                boot_id: input.array()?,
                generation: input.u64()?,
                origin: input.bytes()?.to_vec(),
                buffer: input.bytes()?.to_vec(),
            },
            3 => Self::Closed { identity: take_identity(&mut input)?, next_batch: input.u64()? },
            4 => Self::VolumeMeta(input.bytes()?.to_vec()),
            5 => Self::EpochMeta { epoch: input.u32()?, meta: input.bytes()?.to_vec() },
            6 => {
                let (epoch, selection) = (input.u32()?, input.extents()?);
                Self::Narrowed { epoch, selection, settled: None }
            }
            7 => Self::Deleted { epoch: input.u32()? },
            8 => Self::Freed,
            9 => Self::Bookmarked { epoch: input.u32()?, meta: input.bytes()?.to_vec() },
            10 => Self::BookmarkDeleted { epoch: input.u32()? },
            11 => Self::Resized { epoch: input.u32()?, bytes: input.u64()? },
            12 => Self::Aborted { epoch: input.u32()? },
            13 => Self::Lost { epoch: input.u32()?, blocks: input.extents()? },
            14 => Self::Suspect { epoch: input.u32()?, reason: input.bytes()?.to_vec() },
            15 => Self::RestoreEnded { epoch: input.u32()? },
            16 => Self::OriginFailed { reason: input.bytes()?.to_vec() },
            17 => Self::Recovered,
            18 => Self::Accepted { epoch: input.u32()?, note: input.bytes()?.to_vec() },
            24 => Self::Freeing { sequence: input.u64()?, block: input.u64()? },
            19 => {
                let on_full = match input.u32()? {
                    0 => OnFull::Degrade,
                    1 => OnFull::Hold,
                    2 => OnFull::Fail,
                    _ => return Err(Malformed { at: 0 }),
                };
                Self::Policy(StorePolicy { on_full, limit_bytes: input.u64()? })
            }
            20 => Self::GivenUp { epoch: input.u32()?, blocks: input.extents()? },
            21 => Self::Restored { epoch: input.u32()?, blocks: input.extents()? },
            22 => {
                let (epoch, meta) = (input.u32()?, input.bytes()?.to_vec());
                let (selection, low) = (input.packed_extents()?, input.packed_extents()?);
                Self::Narrowed { epoch, selection, settled: Some(Settled { meta, low }) }
            }
            26 => Self::GroupBegun { epoch: input.u32()?, group: take_group(&mut input)? },
            27 => Self::GroupDecided {
                epoch: input.u32()?,
                id: input.array()?,
                is_committed: match input.u32()? {
                    0 => false,
                    1 => true,
                    _ => return Err(Malformed { at: 20 }),
                },
            },
            _ => return Err(Malformed { at: 0 }),
        })
    }
}

fn put_group(out: &mut Writer, group: &Group) {
    let count = u32::try_from(group.members.len()).expect("a group is bounded");
    out.raw(&group.id).u32(count);
    for member in &group.members {
        out.raw(&member.uuid).u32(member.epoch).bytes(&member.store);
    }
}

fn take_group(input: &mut Reader<'_>) -> Result<Group, Malformed> {
    let (id, count) = (input.array()?, input.u32()?);
    if count == 0 || to_usize(u64::from(count)) > GROUP_MEMBERS_MAX {
        return Err(Malformed { at: 20 });
    }
    let mut members = Vec::new();
    for _ in 0..count {
        let (uuid, epoch) = (input.array()?, input.u32()?);
        members.push(GroupMember { uuid, epoch, store: input.bytes()?.to_vec() });
    }
    Ok(Group { id, members })
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
}

/// The open journal.
pub struct Journal {
    file: Arc<dyn Storage>,
    end: u64,
    /// Where the last record begins.
    last_start: u64,
    next_sequence: u64,
    allocated: u64,
    /// Bytes behind the end that a failed append may have left: a decision that was not taken, and
    /// that must not be found by the next opening.
    left_behind: u64,
}

impl Journal {
    /// Make the journal of a new store; `first` is durable when this returns.
    pub fn create(directory: &dyn Directory, first: &Entry) -> Result<Self, JournalError> {
        let file = directory.create(JOURNAL_NAME)?;
        let mut journal = Self::at(file, 0, 0, 1);
        journal.append(first)?;
        directory.sync()?;
        Ok(journal)
    }

    /// Read it all. Writes nothing.
    pub fn open(directory: &dyn Directory) -> Result<(Self, Vec<Entry>), JournalError> {
        let file = directory.open(JOURNAL_NAME)?;
        let length = file.len()?;
        let mut entries = Vec::new();
        let (mut at, mut last_start, mut sequence) = (0, 0, 1);
        while let Some((entry, next)) = read_record(&*file, at, length, sequence)? {
            entries.push(entry);
            last_start = at;
            at = next;
            sequence += 1;
        }
        let mut probe = at + UNIT;
        while probe < length {
            if any_record(&*file, probe, length)?.is_some_and(|found| found >= sequence) {
                return Err(JournalError::Damaged { at });
            }
            probe += UNIT;
        }
        Ok((Self::at(file, last_start, at, sequence), entries))
    }

    fn at(file: Arc<dyn Storage>, last_start: u64, end: u64, next_sequence: u64) -> Self {
        Self { file, end, last_start, next_sequence, allocated: end, left_behind: 0 }
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
        if payload.len() > to_usize(u64::from(RECORD_BYTES_MAX)) {
            // It could not be read back, and the journal would end there.
            return Err(JournalError::TooLarge { bytes: payload.len() });
        }
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

/// magic, version, sequence, kind, payload length, checksum of all of it, payload, padding.
fn encode_record(sequence: u64, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Writer::default();
    let length = u32::try_from(payload.len()).expect("a record is bounded");
    let version = match kind {
        kind if kind > VERSION_2_KIND_MAX => JOURNAL_VERSION,
        kind if kind > VERSION_1_KIND_MAX => 2,
        _ => 1,
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

/// The sequence number of an intact record at `at`.
fn any_record(file: &dyn Storage, at: u64, length: u64) -> Result<Option<u64>, JournalError> {
    let Some(header) = read_header(file, at, length)? else { return Ok(None) };
    Ok(read_payload(file, at, length, &header)?.map(|_| header.sequence))
}

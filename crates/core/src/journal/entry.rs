//! The records of the volume journal: what each says, and how it is written
//! (`docs/formats/journal.md`).

use super::{HEADER_BYTES, UNIT};
use crate::codec::{Malformed, Reader, Writer};
use crate::extent::{Extent, ExtentSet};
use crate::number::{to_u64, to_usize};

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
    /// The first record of a compacted journal: what it says of everything that has no record of its
    /// own there any more.
    Compacted(Compacted),
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
    pub(crate) const GROUP_BEGUN: u8 = 26;
    pub(crate) const GROUP_DECIDED: u8 = 27;
}

/// The last kinds of versions 1 and 2: a program that does not know later ones says so.
pub(super) const VERSION_1_KIND_MAX: u8 = kind::RECOVERED;
pub(super) const VERSION_2_KIND_MAX: u8 = kind::FREEING;
/// Volumes of one group: far more than one process serves.
pub const GROUP_MEMBERS_MAX: usize = 64;

impl Entry {
    pub(super) fn encode(&self) -> (u8, Vec<u8>) {
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
            Self::GroupBegun { .. } | Self::GroupDecided { .. } => self.encode_group(&mut out),
        };
        (kind, out.0)
    }

    fn encode_group(&self, out: &mut Writer) -> u8 {
        match self {
            Self::GroupBegun { epoch, group } => {
                out.u32(*epoch);
                put_group(out, group);
                kind::GROUP_BEGUN
            }
            Self::GroupDecided { epoch, id, is_committed } => {
                out.u32(*epoch).raw(id).u32(u32::from(*is_committed));
                kind::GROUP_DECIDED
            }
            _ => unreachable!("called for these only"),
        }
    }

    /// Bytes that its record takes in the file.
    pub(crate) fn record_bytes(&self) -> u64 {
        to_u64(HEADER_BYTES + self.encode().1.len()).next_multiple_of(UNIT)
    }

    pub(super) fn decode(kind: u8, payload: &[u8]) -> Result<Self, Malformed> {
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
            kind::GROUP_BEGUN => {
                Self::GroupBegun { epoch: input.u32()?, group: take_group(&mut input)? }
            }
            kind::GROUP_DECIDED => Self::GroupDecided {
                epoch: input.u32()?,
                id: input.array()?,
                is_committed: match input.u32()? {
                    0 => false,
                    1 => true,
                    _ => return Err(Malformed { at: 20 }),
                },
            },
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

//! What a store says of itself and of the last process that had it open, without opening the volume:
//! for those who must decide before it is opened, or do not know yet what it is. Writes nothing.

use super::decided::Decided;
use super::host::{Host, System, identify, path_of};
use super::open::{LOG_DIRECTORY, lock_existing, read_decisions};
use crate::buffer::{LeftBuffer, overlay_sectors, read_left};
use crate::epochs::Epoch;
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::journal::OriginIdentity;
use crate::log::scan::Scan;
use crate::log::writer::Segments;
use crate::number::to_usize;
use crate::storage::{FileDirectory, FileStorage, OpenOptions, Storage};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How the last process left the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftAs {
    /// Closed: the origin is complete. A volume that was never opened is closed too.
    Closed,
    /// Killed, in this boot: what it had acknowledged may still be in memory.
    Killed,
    /// Not closed, in another boot or on another machine: as after a power cut.
    Interrupted,
}

/// What a killed process left in its write buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftIn {
    /// No buffer outlived it, or none was used.
    Nothing,
    /// A buffer that is gone, or not intact, or not of this volume.
    Lost,
    /// A buffer that can be replayed.
    Buffer,
    /// A buffer of a newer version of the program.
    Newer,
}

/// What is in a buffer, compared with what the origin holds now.
#[derive(Debug, Default)]
pub struct LeftWrites {
    /// Slots: one write to one block each.
    pub slots: usize,
    /// The blocks they are of.
    pub blocks: ExtentSet,
    /// Those of which the origin holds something else.
    pub differing: ExtentSet,
    /// When the process was last known to live.
    pub alive_unix_ns: u64,
}

/// See the module.
pub struct Inspection {
    /// The volume.
    pub uuid: [u8; 16],
    /// Bytes a block.
    pub block_size: u64,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Where the origin was last.
    pub origin: PathBuf,
    /// The volume's opaque bytes.
    pub meta: Vec<u8>,
    /// How the last process left it.
    pub left_as: LeftAs,
    /// What it left in memory.
    pub left_in: LeftIn,
    /// The writes in it.
    pub writes: LeftWrites,
    /// What the origin was when the volume was closed.
    pub closed: Option<OriginIdentity>,
    /// What it is now, if it is there.
    pub found: Option<OriginIdentity>,
    /// It was written by others since the process died; nobody knows of a block device.
    pub is_touched: bool,
    /// Why the origin is not trusted; empty if it is.
    pub origin_failure: String,
    /// A restore is to go on at the next opening.
    pub is_restoring: bool,
    /// Snapshots and bookmarks.
    pub epochs: Vec<(u32, Epoch)>,
}

/// Look at a store that nobody has open, and at its origin: `origin`, or where it was last.
pub fn inspect(store: &Path, origin: Option<&Path>) -> Result<Inspection> {
    let _lock = lock_existing(&System::default(), store)?;
    let (_, decided) = read_decisions(Arc::new(FileDirectory::new(store)), store)?;
    let log = FileDirectory::new(&store.join(LOG_DIRECTORY));
    let segments = Arc::new(Segments::new(Arc::new(log)));
    let scan = decided.scan(&segments)?;
    let path = origin.map_or_else(|| path_of(&decided.origin), Path::to_path_buf);
    let disk = FileStorage::open(&path, OpenOptions { direct: false, read_only: true }).ok();
    let found = disk.as_ref().and_then(|disk| identify(disk.file()).ok());
    let left_as = left_as(&decided)?;
    let mut inspection = Inspection {
        uuid: decided.uuid,
        block_size: decided.block_size,
        size_bytes: decided.size_bytes,
        origin: path,
        left_as,
        left_in: LeftIn::Nothing,
        writes: LeftWrites::default(),
        closed: decided.closed.map(|(identity, _)| identity),
        found,
        is_touched: false,
        origin_failure: decided.origin_failure.clone(),
        is_restoring: is_restoring(&decided, &scan),
        epochs: decided.epochs(&scan).0.into_iter().collect(),
        meta: decided.meta.clone(),
    };
    match (left_as, inspection.closed, found) {
        (LeftAs::Closed, Some(closed), Some(found)) => {
            inspection.is_touched = closed.is_other_than(&found);
        }
        (LeftAs::Interrupted, _, Some(found)) => {
            inspection.is_touched = is_after_boot(&found);
        }
        (LeftAs::Killed, _, _) => inspection.look_at_buffer(&decided, disk.as_ref())?,
        _ => {}
    }
    Ok(inspection)
}

/// Fail if somebody has the store open, whatever is in it.
pub fn check_unused(store: &Path) -> Result<()> {
    System::default().lock_store(store).map(drop)
}

fn is_after_boot(found: &OriginIdentity) -> bool {
    System::default().booted_unix_ns().is_some_and(|booted| found.modified_unix_ns > booted)
}

fn left_as(decided: &Decided) -> Result<LeftAs> {
    Ok(match &decided.opened {
        Some((boot, _)) if decided.closed.is_none() => {
            if *boot == System::default().boot_id()? {
                LeftAs::Killed
            } else {
                LeftAs::Interrupted
            }
        }
        _ => LeftAs::Closed,
    })
}

fn is_restoring(decided: &Decided, scan: &Scan) -> bool {
    let blocks = decided.block_count();
    let restoring = super::decided::restoring_of(scan, decided, blocks);
    restoring.is_some_and(|restoring| restoring.remaining_blocks > 0)
}

impl Inspection {
    fn look_at_buffer(&mut self, decided: &Decided, disk: Option<&FileStorage>) -> Result<()> {
        let Some((_, buffer)) = decided.opened.as_ref().filter(|(_, path)| !path.is_empty()) else {
            return Ok(());
        };
        let left = read_left(&path_of(buffer)).map_err(Error::store("reading the write buffer"))?;
        let left = match left {
            Some(Err(_)) => {
                self.left_in = LeftIn::Newer;
                return Ok(());
            }
            Some(Ok(left)) if left.is_of(decided.uuid, decided.generation) => left,
            _ => {
                self.left_in = LeftIn::Lost;
                return Ok(());
            }
        };
        self.left_in = LeftIn::Buffer;
        self.is_touched = self.found.is_some_and(|found| left.is_origin_touched(&found));
        self.writes = compared(&left, disk, decided.block_size)?;
        Ok(())
    }
}

/// What the slots come to, newest last, beside what the origin holds.
fn compared(left: &LeftBuffer, disk: Option<&FileStorage>, block_size: u64) -> Result<LeftWrites> {
    let mut by_block: BTreeMap<u64, Vec<&crate::buffer::LeftSlot>> = BTreeMap::new();
    for slot in &left.slots {
        by_block.entry(slot.block).or_default().push(slot);
    }
    let (mut blocks, mut differing) = (Vec::new(), Vec::new());
    let length = disk.map_or(Ok(0), Storage::len).map_err(Error::origin("its length"))?;
    let mut now = vec![0; to_usize(block_size)];
    for (block, slots) in by_block {
        blocks.push(Extent::single(block));
        let offset = block * block_size;
        let valid = to_usize(length.saturating_sub(offset).min(block_size));
        now.fill(0);
        if let Some(disk) = disk {
            disk.read_at(offset, &mut now[..valid]).map_err(Error::origin("reading it"))?;
        }
        let mut then = now.clone();
        for slot in slots {
            overlay_sectors(&slot.data, slot.mask, 0, &mut then);
        }
        if then[..valid] != now[..valid] || valid == 0 {
            differing.push(Extent::single(block));
        }
    }
    Ok(LeftWrites {
        slots: left.slots.len(),
        blocks: ExtentSet::from_unsorted(blocks),
        differing: ExtentSet::from_unsorted(differing),
        alive_unix_ns: left.alive_unix_ns,
    })
}

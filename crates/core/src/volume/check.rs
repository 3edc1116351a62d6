//! Verifying what a store keeps, while the volume is in use: structure at once, content in steps
//! whose pace the caller chooses.

use super::Volume;
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::index::{Content, Index, Record};
use crate::journal::Journal;
use crate::log::format::{PAGE, Position, payload_checksum};
use crate::log::verify::{Finding, Severity, VerifiedEnd, verify_headers};
use crate::number::{to_u64, to_usize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Blocks that are remembered as rotten; beyond it a volume has other worries.
const ROTTEN_MAX: usize = 1 << 20;
/// Deletions wait for no more than this much reading.
const PIECE_BYTES: u64 = 1 << 20;
/// Content is chosen for a partial check in runs of this many pages, so that it is read in order.
const RUN_PAGES: u64 = 256;

/// Preserved content that fails its checksum: block, and the epoch in which it was preserved.
pub(super) type Rotten = BTreeSet<(u64, u32)>;

/// True if the snapshot of `epoch` reads this very copy.
fn reads(index: &Index, epoch: u32, block: u64, preserved_in: u32) -> bool {
    let mut found = Vec::new();
    index.contents(Extent::single(block), epoch, &mut found);
    matches!(found.first(), Some((_, Content::Preserved(r))) if r.epoch == preserved_in)
}

impl Volume {
    /// Remember that a copy is rotten, so that its snapshots say so.
    pub(super) fn note_rotten(&self, record: &Record) {
        let mut rotten = self.rotten.lock();
        if rotten.len() < ROTTEN_MAX {
            rotten.insert((record.block, record.epoch));
        }
    }

    /// Remember what an earlier check found.
    pub fn note_damaged(&self, found: &[(u32, ExtentSet)]) {
        let mut rotten = self.rotten.lock();
        for (epoch, blocks) in found {
            for extent in blocks.iter() {
                let room = ROTTEN_MAX.saturating_sub(rotten.len());
                rotten.extend((extent.start..extent.end).map(|b| (b, *epoch)).take(room));
            }
        }
    }

    /// Copies known to be rotten that some snapshot still reads, by the epoch they were made in.
    pub fn damaged(&self) -> Vec<(u32, ExtentSet)> {
        let rotten = self.rotten.lock().clone();
        let (epochs, index) = (self.epochs.read(), self.index.read());
        let mut found: BTreeMap<u32, Vec<Extent>> = BTreeMap::new();
        for (block, preserved_in) in rotten {
            let is_read = epochs.0.range(..=preserved_in).any(|(&epoch, e)| {
                let selects = e.selection.as_ref().is_some_and(|s| s.contains(block));
                selects && reads(&index, epoch, block, preserved_in)
            });
            if is_read {
                found.entry(preserved_in).or_default().push(Extent::single(block));
            }
        }
        found.into_iter().map(|(e, blocks)| (e, ExtentSet::from_unsorted(blocks))).collect()
    }

    /// Blocks that the snapshot selects and whose content is known to be rotten.
    pub(super) fn damaged_of(&self, epoch: u32, selection: &ExtentSet, index: &Index) -> ExtentSet {
        let rotten = self.rotten.lock();
        let mine = rotten.iter().filter(|&&(block, preserved_in)| {
            preserved_in >= epoch
                && selection.contains(block)
                && reads(index, epoch, block, preserved_in)
        });
        ExtentSet::from_unsorted(mine.map(|&(block, _)| Extent::single(block)).collect())
    }

    /// Look at the journal, every header, both copies of every batch, and whether memory and log
    /// say the same. Writes go on meanwhile.
    pub fn check_structure(&self) -> Result<Vec<Finding>> {
        let mut findings = Vec::new();
        let damaged = |message: String| Finding { severity: Severity::Damaged, message };
        if let Err(error) = Journal::open(&*self.host.directory(&self.store_path)) {
            findings.push(damaged(Error::from(error).to_string()));
        }
        let (numbers, end) = {
            let committer = self.role()?;
            let (segment, page) = committer.log.position();
            (committer.segments.clone(), VerifiedEnd { segment, page: u64::from(page) })
        };
        let reading = || Error::store("reading the log");
        let walks = verify_headers(&self.segments, self.uuid, &numbers, end, &mut findings)
            .map_err(reading())?;
        let mut by_segment: BTreeMap<u32, HashMap<u64, Record>> = BTreeMap::new();
        for record in self.index.read().sorted_records() {
            let position = record.position;
            let page = position.offset_bytes() / PAGE;
            let is_known = position.segment() < end.segment || page < end.page;
            if is_known && position.segment() <= end.segment {
                by_segment.entry(position.segment()).or_default().insert(page, record);
            }
        }
        for (segment, walk) in &walks {
            let mut records = by_segment.remove(segment).unwrap_or_default();
            walk.verify(self.block_size, &mut findings, |descriptor, page| {
                let is_same = |r: &Record| {
                    r.block == descriptor.blocks.start && r.checksum == descriptor.checksum
                };
                if records.get(&page).is_some_and(is_same) {
                    records.remove(&page);
                }
            });
            // Released meanwhile, or gone with a batch that was told already.
            let index = self.index.read();
            let strays = records.values().filter(|r| reads(&index, r.epoch, r.block, r.epoch));
            let strays = strays.count();
            if strays > 0 {
                findings.push(damaged(format!(
                    "segment {segment:08x}: {strays} preserved blocks are not where their records \
                     were; open the volume anew and check again"
                )));
            }
        }
        Ok(findings)
    }
}

/// Reading preserved content and comparing it with its checksum, a step at a time.
pub struct ContentCheck {
    volume: Arc<Volume>,
    records: Vec<Record>,
    at: usize,
    damaged: Vec<Record>,
}

impl ContentCheck {
    /// All preserved content, or a share of it in parts of 10000; which share, `seed` decides.
    pub fn new(volume: &Arc<Volume>, share: u64, seed: u64) -> Self {
        let mut records = volume.index.read().sorted_records();
        records.retain(|record| is_chosen(record.position, share, seed));
        records.sort_unstable_by_key(|record| record.position);
        Self { volume: Arc::clone(volume), records, at: 0, damaged: Vec::new() }
    }

    /// Bytes to read.
    pub fn total_bytes(&self) -> u64 {
        to_u64(self.records.len()) * self.volume.block_size
    }

    /// Bytes read so far.
    pub fn done_bytes(&self) -> u64 {
        to_u64(self.at) * self.volume.block_size
    }

    /// Blocks of which a copy fails its checksum, or cannot be read, by the epoch it was made in.
    pub fn damaged(&self) -> Vec<(u32, ExtentSet)> {
        let mut found: BTreeMap<u32, Vec<Extent>> = BTreeMap::new();
        for record in &self.damaged {
            found.entry(record.epoch).or_default().push(Extent::single(record.block));
        }
        found.into_iter().map(|(e, blocks)| (e, ExtentSet::from_unsorted(blocks))).collect()
    }

    /// Read some more, at most so many bytes and at least a block; false once all is done.
    pub fn step(&mut self, bytes_max: u64) -> Result<bool> {
        let size = self.volume.block_size;
        let mut left = (bytes_max / size).max(1);
        while left > 0 && self.at < self.records.len() {
            let count = to_usize(left.min(PIECE_BYTES / size).max(1));
            let upto = (self.at + count).min(self.records.len());
            self.volume.check_held_open()?;
            self.piece(self.at, upto);
            left -= to_u64(upto - self.at).min(left);
            self.at = upto;
        }
        Ok(self.at < self.records.len())
    }

    fn piece(&mut self, from: usize, upto: usize) {
        let volume = Arc::clone(&self.volume);
        let _no_punching = volume.punching.read();
        let mut content = vec![0; to_usize(volume.block_size)];
        for record in &self.records[from..upto] {
            let is_read = volume.segments.read(record.position, &mut content).is_ok();
            let checksum = payload_checksum(record.block, record.epoch, &content);
            if is_read && checksum == record.checksum {
                continue;
            }
            // What was released meanwhile nobody needs.
            if reads(&volume.index.read(), record.epoch, record.block, record.epoch) {
                volume.note_rotten(record);
                self.damaged.push(*record);
            }
        }
    }
}

fn is_chosen(position: Position, share: u64, seed: u64) -> bool {
    let run = position.offset_bytes() / PAGE / RUN_PAGES;
    let mut key = [0; 16];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..].copy_from_slice(&(u64::from(position.segment()) << 32 | run).to_le_bytes());
    u64::from(crc32c::crc32c(&key)) % 10_000 < share
}

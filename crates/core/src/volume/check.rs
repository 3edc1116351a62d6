//! Verifying what a store keeps, while the volume is in use: structure at once, content in steps
//! whose pace the caller chooses.

use super::Volume;
use super::open::read_decisions;
use super::past::Patience;
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentSet};
use crate::index::copies::for_each_copy;
use crate::index::parts::Walk as Windows;
use crate::index::{Content, Record};
use crate::log::format::{PAGE, Position, payload_checksum};
use crate::log::verify::{Finding, Severity, VerifiedEnd, Walk, verify_headers};
use crate::number::{to_u64, to_usize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Blocks that are remembered as rotten; beyond it a volume has other worries.
const ROTTEN_MAX: usize = 1 << 20;
/// Deletions wait for no more than this much reading.
const PIECE_BYTES: u64 = 1 << 20;
/// Content is chosen for a partial check in runs of this many pages, so that it is read in order.
const RUN_PAGES: u64 = 256;

/// All content, in parts of 10000.
const ALL: u64 = 10_000;
/// Of segments with so many pages together the records are held at once,
const GROUP_PAGES_MAX: u64 = 2 << 20;
/// or so many records.
const GROUP_BLOCKS_MAX: u64 = 2 << 20;

/// Preserved content that fails its checksum: block, and the epoch in which it was preserved.
pub(super) type Rotten = BTreeSet<(u64, u32)>;

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
    pub fn damaged(&self) -> Result<Vec<(u32, ExtentSet)>> {
        self.with_patience(|| self.list_damaged())
    }

    fn list_damaged(&self) -> Result<Vec<(u32, ExtentSet)>> {
        let rotten = self.rotten.lock().clone();
        let mut found: BTreeMap<u32, Vec<Extent>> = BTreeMap::new();
        for (block, preserved_in) in rotten {
            let copy = self.copy_for_somebody(block, preserved_in)?;
            if copy.is_some_and(|copy| copy.epoch == preserved_in) {
                found.entry(preserved_in).or_default().push(Extent::single(block));
            }
        }
        Ok(found.into_iter().map(|(e, blocks)| (e, ExtentSet::from_unsorted(blocks))).collect())
    }

    /// Blocks that the snapshot selects and whose content is known to be rotten.
    pub(super) fn damaged_of(&self, epoch: u32, selection: &ExtentSet) -> Result<ExtentSet> {
        let rotten = self.rotten.lock().clone();
        let mut mine = Vec::new();
        for &(block, preserved_in) in rotten.iter().filter(|&&(_, preserved)| preserved >= epoch) {
            let is_mine = selection.contains(block)
                && self.copy_for(block, epoch)?.is_some_and(|copy| copy.epoch == preserved_in);
            if is_mine {
                mine.push(Extent::single(block));
            }
        }
        Ok(ExtentSet::from_unsorted(mine))
    }

    /// The copy of a block that the snapshot of `epoch` reads, if it is in the log.
    fn copy_for(&self, block: u64, epoch: u32) -> Result<Option<Record>> {
        let mut found = Vec::new();
        self.contents(Extent::single(block), epoch, Patience::Wait, &mut found)?;
        Ok(match found.first() {
            Some((_, Content::Preserved(record))) => Some(*record),
            _ => None,
        })
    }

    /// The copy that the latest snapshot reads which a copy made in `preserved_in` can be for: older
    /// snapshots read no later copy.
    fn copy_for_somebody(&self, block: u64, preserved_in: u32) -> Result<Option<Record>> {
        let selections = self.epochs.read().selections();
        let mut older = selections.0.range(..=preserved_in).rev();
        match older.find(|(_, selection)| selection.contains(block)) {
            Some((&epoch, _)) => self.copy_for(block, epoch),
            None => Ok(None),
        }
    }

    /// True if some snapshot reads this very copy, and it is still there.
    fn is_read(&self, record: &Record) -> Result<bool> {
        let copy = self.copy_for_somebody(record.block, record.epoch)?;
        Ok(copy.is_some_and(|copy| copy.position == record.position))
    }

    /// Go over every copy that a snapshot reads.
    fn over_copies<T: Default>(&self, add: impl Fn(&mut T, Record)) -> Result<T> {
        let end = self.block_count(self.size_bytes());
        let over = || {
            let selections = self.epochs.read().selections();
            let parts = self.index.read().parts();
            let (mut walk, mut entries, mut all) = (Windows::new(0, end), Vec::new(), T::default());
            while parts.next_window(&mut walk, &mut entries)? {
                for_each_copy(&entries, |entry, previous| {
                    if selections.needs(entry.blocks.start, entry.epoch, previous) {
                        add(&mut all, Record::of(entry));
                    }
                });
            }
            Ok(all)
        };
        self.with_patience(|| self.with_index(over))
    }

    fn copies_in(&self, segments: &BTreeSet<u32>, share: u64, seed: u64) -> Result<Vec<Record>> {
        let mut records = self.over_copies(|records: &mut Vec<Record>, record| {
            let position = record.position;
            if segments.contains(&position.segment()) && is_chosen(position, share, seed) {
                records.push(record);
            }
        })?;
        records.sort_unstable_by_key(|record| record.position);
        Ok(records)
    }

    /// Look at the journal, every header, both copies of every batch, and whether memory and log
    /// say the same. Writes go on meanwhile.
    pub fn check_structure(&self) -> Result<Vec<Finding>> {
        let mut findings = Vec::new();
        let damaged = |message: String| Finding { severity: Severity::Damaged, message };
        if let Err(error) = read_decisions(self.host.directory(&self.store_path), &self.store_path)
        {
            findings.push(damaged(error.to_string()));
        }
        let (walks, end) = {
            // Meanwhile no segment is merged or removed; later each is open.
            let _upkeep = self.upkeep.lock();
            let (numbers, end) = {
                let committer = self.role()?;
                let (segment, page) = committer.log.position();
                (committer.segments.clone(), VerifiedEnd { segment, page: u64::from(page) })
            };
            let walks = verify_headers(&self.segments, self.uuid, &numbers, end, &mut findings);
            (walks.map_err(Error::store("reading the log"))?, end)
        };
        let mut left = &walks[..];
        while !left.is_empty() {
            let mut pages = 0;
            let fits = |walk: &&Walk| {
                pages += walk.pages();
                pages <= GROUP_PAGES_MAX
            };
            let count = left.iter().take_while(fits).count().max(1);
            let (group, rest) = left.split_at(count);
            self.verify_group(group, end, &mut findings)?;
            left = rest;
        }
        Ok(findings)
    }

    /// Both copies of every batch of these segments, and what the index says is in them.
    fn verify_group(
        &self,
        group: &[Walk],
        end: VerifiedEnd,
        findings: &mut Vec<Finding>,
    ) -> Result<()> {
        let segments: BTreeSet<u32> = group.iter().map(Walk::segment).collect();
        let records = self.copies_in(&segments, ALL, 0)?;
        for walk in group {
            let segment = walk.segment();
            let from = records.partition_point(|r| r.position < Position::new(segment, 0));
            let upto = records.partition_point(|r| r.position.segment() <= segment);
            let records = &records[from..upto];
            let mut is_there = vec![false; records.len()];
            walk.verify(self.block_size, findings, |descriptor, page| {
                let at = records.binary_search_by_key(&page, |r| r.position.offset_bytes() / PAGE);
                let is_same = |r: &Record| {
                    r.block == descriptor.blocks.start && r.checksum == descriptor.checksum
                };
                if let Ok(at) = at {
                    is_there[at] |= is_same(&records[at]);
                }
            });
            let is_known =
                |r: &Record| segment != end.segment || r.position.offset_bytes() / PAGE < end.page;
            let missing = records.iter().zip(is_there).filter(|(r, there)| !there && is_known(r));
            let mut strays = 0;
            for (record, _) in missing {
                // Released or moved meanwhile, or gone with a batch that was told already.
                strays += u64::from(self.with_patience(|| self.is_read(record))?);
            }
            if strays > 0 {
                let message = format!(
                    "segment {segment:08x}: {strays} preserved blocks are not where their records \
                     were; open the volume anew and check again"
                );
                findings.push(Finding { severity: Severity::Damaged, message });
            }
        }
        Ok(())
    }
}

/// Reading preserved content and comparing it with its checksum, a step at a time.
pub struct ContentCheck {
    volume: Arc<Volume>,
    share: u64,
    seed: u64,
    /// Segments that are to be read, with the blocks there were to read in each.
    left: BTreeMap<u32, u64>,
    total: u64,
    /// Blocks of all segments before those in `records`, and of those.
    done: u64,
    expected: u64,
    /// What is read now, by position.
    records: Vec<Record>,
    at: usize,
    damaged: Vec<Record>,
}

impl ContentCheck {
    /// All preserved content, or a share of it in parts of 10000; which share, `seed` decides.
    pub fn new(volume: &Arc<Volume>, share: u64, seed: u64) -> Result<Self> {
        let left = volume.over_copies(|left: &mut BTreeMap<u32, u64>, record| {
            if is_chosen(record.position, share, seed) {
                *left.entry(record.position.segment()).or_default() += 1;
            }
        })?;
        let total = left.values().sum();
        let (volume, records, damaged) = (Arc::clone(volume), Vec::new(), Vec::new());
        let (done, expected, at) = (0, 0, 0);
        Ok(Self { volume, share, seed, left, total, done, expected, records, at, damaged })
    }

    /// Bytes to read.
    pub fn total_bytes(&self) -> u64 {
        self.total * self.volume.block_size
    }

    /// Bytes read so far. What was let go meanwhile counts.
    pub fn done_bytes(&self) -> u64 {
        (self.done + self.expected.min(to_u64(self.at))) * self.volume.block_size
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
        while left > 0 {
            self.volume.check_held_open()?;
            if self.at == self.records.len() && !self.next_segments()? {
                return Ok(false);
            }
            let count = to_usize(left.min(PIECE_BYTES / size).max(1));
            let upto = (self.at + count).min(self.records.len());
            let volume = Arc::clone(&self.volume);
            volume.with_patience(|| self.piece(self.at, upto))?;
            left -= to_u64(upto - self.at).min(left);
            self.at = upto;
        }
        Ok(self.at < self.records.len() || !self.left.is_empty())
    }

    /// Take up more segments; false if there are none. Segments made meanwhile have what was checked
    /// when it was written to them.
    fn next_segments(&mut self) -> Result<bool> {
        self.done += std::mem::take(&mut self.expected);
        (self.records, self.at) = (Vec::new(), 0);
        let mut segments = BTreeSet::new();
        while let Some((&segment, &blocks)) = self.left.first_key_value() {
            if !segments.is_empty() && self.expected + blocks > GROUP_BLOCKS_MAX {
                break;
            }
            segments.insert(segment);
            self.expected += blocks;
            self.left.remove(&segment);
        }
        if segments.is_empty() {
            return Ok(false);
        }
        self.records = self.volume.copies_in(&segments, self.share, self.seed)?;
        Ok(true)
    }

    fn piece(&mut self, from: usize, upto: usize) -> Result<()> {
        let volume = Arc::clone(&self.volume);
        let _no_punching = volume.punching.read();
        let mut content = vec![0; to_usize(volume.block_size)];
        for record in &self.records[from..upto] {
            let is_read = volume.segments.read(record.position, &mut content).is_ok();
            let checksum = payload_checksum(record.block, record.epoch, &content);
            if is_read && checksum == record.checksum {
                continue;
            }
            // What was released meanwhile nobody needs, and what was moved was checked.
            if volume.is_read(record)? {
                volume.note_rotten(record);
                self.damaged.push(*record);
            }
        }
        Ok(())
    }
}

fn is_chosen(position: Position, share: u64, seed: u64) -> bool {
    let run = position.offset_bytes() / PAGE / RUN_PAGES;
    let mut key = [0; 16];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..].copy_from_slice(&(u64::from(position.segment()) << 32 | run).to_le_bytes());
    u64::from(crc32c::crc32c(&key)) % ALL < share
}

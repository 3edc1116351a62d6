//! The MFT records of NTFS that have nothing special, which are nearly all of them.
//!
//! A record each for a million files is what takes the time of a survey in Python. Only what is
//! exactly as expected is read here; everything else, and all that is damaged, is `None`, and
//! `selection/filesystems/ntfs_records.py` reads it or says what is wrong. Layouts: see there.

const STRIDE: usize = 512;
const IN_USE: u16 = 1;
const STANDARD_INFORMATION: u32 = 0x10;
const FILE_NAME: u32 = 0x30;
const OBJECT_ID: u32 = 0x40;
const SECURITY_DESCRIPTOR: u32 = 0x50;
const DATA: u32 = 0x80;
const END: u32 = 0xFFFF_FFFF;
const DOS_NAME: u8 = 2;

/// VCN, number of clusters, LCN; no LCN is a hole.
pub type Run = (u64, u64, Option<u64>);
/// Of the unnamed stream: its runs, and how many bytes are allocated, valid, initialised.
pub type Layout = (Vec<Run>, u64, u64, u64);

/// What a plain record says: one whole file.
#[derive(Debug, PartialEq, Eq)]
pub struct PlainFile {
    /// How often the record was given to a file.
    pub sequence: u16,
    /// The reference of the directory, and the name in UTF-16.
    pub names: Vec<(u64, Vec<u8>)>,
    /// When its data was last changed, in 100 ns since 1601.
    pub changed: u64,
    /// Bytes of its data.
    pub size: u64,
    /// Where they lie, unless in the record.
    pub layout: Option<Layout>,
}

impl PlainFile {
    /// What MFT record `number` says, `raw` as on disk, if that is a plain record.
    pub fn read(raw: &[u8], number: u64, cluster_size: u64, cluster_count: u64) -> Option<Self> {
        Self::parse(&joined(raw)?, number, cluster_size, cluster_count)
    }

    fn parse(record: &[u8], number: u64, cluster_size: u64, cluster_count: u64) -> Option<Self> {
        let marks = u16_at(record, 4)?;
        let marks_end = marks + 2 * u16_at(record, 6)?;
        let mut at = usize::from(u16_at(record, 20)?);
        let used = u32_at(record, 24)? as usize;
        let is_whole = u16_at(record, 22)? == IN_USE
            && u32_at(record, 28)? as usize == record.len()
            && u64_at(record, 32)? == 0
            && at % 8 == 0
            && at >= usize::from(marks_end)
            && used <= record.len()
            // The number is in the record since NTFS 3.1.
            && (marks < 48 || u64::from(u32_at(record, 44)?) == number & 0xFFFF_FFFF);
        if !is_whole {
            return None;
        }
        let mut found = Self {
            sequence: u16_at(record, 16)?,
            names: Vec::new(),
            changed: 0,
            size: 0,
            layout: None,
        };
        let record = record.get(..used)?;
        let mut last = 0;
        loop {
            let kind = u32_at(record, at)?;
            if kind == END {
                // Without times or names it is no file that a directory leads to.
                return (found.changed != 0 && !found.names.is_empty()).then_some(found);
            }
            let length = u32_at(record, at + 4)? as usize;
            let attribute = record.get(at..at.checked_add(length)?)?;
            let (is_nonresident, name_length) = (*attribute.get(8)?, *attribute.get(9)?);
            let is_plain = length >= 24
                && length % 8 == 0
                && is_nonresident <= 1
                && name_length == 0
                && u16_at(attribute, 12)? == 0
                // In the order of their types, and only names several times.
                && (kind > last || (kind == FILE_NAME && last == FILE_NAME));
            if !is_plain {
                return None;
            }
            match (kind, is_nonresident) {
                (STANDARD_INFORMATION, 0) => found.changed = u64_at(value(attribute)?, 8)?,
                (FILE_NAME, 0) => {
                    let key = value(attribute)?;
                    let name = key.get(66..66 + 2 * usize::from(*key.get(64)?))?;
                    if *key.get(65)? != DOS_NAME {
                        found.names.push((u64_at(key, 0)?, name.to_vec()));
                    }
                }
                (OBJECT_ID | SECURITY_DESCRIPTOR, 0) => {}
                (DATA, 0) => found.size = value(attribute)?.len() as u64,
                (DATA, _) => {
                    let layout = layout(attribute, cluster_size, cluster_count)?;
                    found.size = layout.2;
                    found.layout = Some(layout);
                }
                _ => return None,
            }
            last = kind;
            at += length;
        }
    }
}

/// The record as it was before the ends of its sectors were marked.
fn joined(raw: &[u8]) -> Option<Vec<u8>> {
    let marks = usize::from(u16_at(raw, 4)?);
    let count = usize::from(u16_at(raw, 6)?);
    let fits = raw.starts_with(b"FILE")
        && raw.len() % STRIDE == 0
        && count == raw.len() / STRIDE + 1
        && marks % 2 == 0
        && marks >= 8
        && marks + 2 * count <= STRIDE;
    if !fits {
        return None;
    }
    let mark = raw.get(marks..marks + 2)?;
    let mut record = raw.to_vec();
    for (index, sector) in record.chunks_exact_mut(STRIDE).enumerate() {
        let at = marks + 2 * (index + 1);
        if sector.get(STRIDE - 2..)? != mark {
            return None;
        }
        sector.get_mut(STRIDE - 2..)?.copy_from_slice(raw.get(at..at + 2)?);
    }
    Some(record)
}

fn value(attribute: &[u8]) -> Option<&[u8]> {
    let begin = usize::from(u16_at(attribute, 20)?);
    attribute.get(begin..begin.checked_add(u32_at(attribute, 16)? as usize)?)
}

/// Where a nonresident attribute lies that is in one piece.
fn layout(attribute: &[u8], cluster_size: u64, cluster_count: u64) -> Option<Layout> {
    let lowest = u64_at(attribute, 16)?;
    let end = u64_at(attribute, 24)?.checked_add(1)?;
    let begin = usize::from(u16_at(attribute, 32)?);
    let (allocated, size, initialised) =
        (u64_at(attribute, 40)?, u64_at(attribute, 48)?, u64_at(attribute, 56)?);
    let is_whole = lowest == 0
        && begin >= 64
        && initialised <= size
        && size <= allocated
        && allocated == end.checked_mul(cluster_size)?;
    let runs = runs(attribute.get(begin..)?, end, cluster_count)?;
    is_whole.then_some((runs, allocated, size, initialised))
}

/// Mapping pairs: a byte of two field widths, a length, and a signed step of the LCN.
fn runs(mut pairs: &[u8], vcn_end: u64, cluster_count: u64) -> Option<Vec<Run>> {
    let (mut runs, mut vcn, mut lcn) = (Vec::new(), 0_u64, 0_i64);
    loop {
        let (&head, rest) = pairs.split_first()?;
        if head == 0 {
            return (vcn == vcn_end).then_some(runs);
        }
        let (count, rest) = signed(rest, usize::from(head & 15))?;
        let count = u64::try_from(count).ok().filter(|&count| count > 0)?;
        let (step, rest) = signed(rest, usize::from(head >> 4))?;
        let place = if head >> 4 == 0 {
            None
        } else {
            lcn = lcn.checked_add(step)?;
            let first = u64::try_from(lcn).ok()?;
            if first.checked_add(count)? > cluster_count {
                return None;
            }
            Some(first)
        };
        runs.push((vcn, count, place));
        vcn = vcn.checked_add(count)?;
        pairs = rest;
    }
}

/// A signed number of `width` bytes, and what follows it.
fn signed(bytes: &[u8], width: usize) -> Option<(i64, &[u8])> {
    let (number, rest) = bytes.split_at_checked(width)?;
    let is_negative = number.last().is_some_and(|&last| last & 0x80 != 0);
    let mut wide = [if is_negative { 0xFF } else { 0 }; 8];
    wide.get_mut(..width)?.copy_from_slice(number);
    Some((i64::from_le_bytes(wide), rest))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

//! Index files: the records of closed epochs, sorted by block, in pages that each carry a checksum.
//! See `docs/formats/index.md`.
//!
//! An index file is made from the log and can be made again: one that is missing, damaged or does
//! not fit the log's segments is not used. Pages are checked whenever they are read, and a damaged
//! one is an error, never "no record" (P2, P5); who asked reads the log instead. Read with `pread`,
//! not through a mapping: a device that fails must fail one request, and not end the process with
//! SIGBUS (P1).

use super::entry::Entry;
use crate::codec::{Malformed, Reader, Writer};
use crate::extent::Extent;
use crate::log::format::{Kind, PAGE, Position};
use crate::number::{to_u64, to_usize};
use crate::sabotage::{Rule, is_broken};
use crate::storage::{Directory, Storage};
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// First bytes of an index file.
const MAGIC: [u8; 8] = *b"SBLOGIDX";
/// The version this code writes and reads; files of any other are not used.
const VERSION: u32 = 1;
const PAGE_BYTES: usize = 4096;
/// Checksum and number of entries.
const PAGE_HEADER_BYTES: usize = 8;
/// No entry takes more: four numbers of at most ten bytes, and a checksum.
const ENTRY_BYTES_MAX: usize = 44;
/// Pages are written in pieces of this many,
const WRITE_PAGES: usize = 256;
/// and read ahead, where many are wanted, in pieces of this many.
const READ_PAGES: u64 = 64;
/// Bytes of a header that its checksum covers.
const COVERED: usize = 8 + 4 + 16 + 4 + 4 + 8 + 4 + 3 * 8;
/// Tables beyond this were not written by us: fences of a file of a tebibyte.
const TABLES_BYTES_MAX: u64 = 4 << 30;
/// Classes of length; see [`class_of`].
const CLASSES: usize = 9;

/// The file name of an index file.
pub fn run_name(number: u32) -> String {
    format!("{number:08x}.idx")
}

/// The number in an index file's name.
pub fn run_number(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".idx")?;
    if digits.len() == 8 { u32::from_str_radix(digits, 16).ok() } else { None }
}

/// Entries are kept apart by length: class 0 has single blocks, class *k* up to 16^k. Whoever looks
/// for what overlaps a block then looks back by the longest of each class, past few entries.
fn class_of(blocks: Extent) -> usize {
    let mut class = 0;
    while blocks.len() > longest(class) {
        class += 1;
    }
    class
}

const fn longest(class: usize) -> u64 {
    1 << (4 * class)
}

/// Where a page begins: which blocks and epochs are in it.
#[derive(Clone, Copy)]
struct Fence {
    start: u64,
    epoch: u32,
    page: u32,
}

fn page_checksum(uuid: &[u8; 16], number: u32, page: u32, bytes: &[u8]) -> u32 {
    let mut out = Writer::default();
    out.raw(uuid).u32(number).u32(page);
    crc32c::crc32c_append(crc32c::crc32c(&out.0), bytes)
}

fn put_number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).expect("seven bits") | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).expect("seven bits"));
}

fn take_number(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// Kinds in two bits.
const fn kind_bits(kind: Kind) -> u64 {
    match kind {
        Kind::Preserve => 0,
        Kind::PreserveZero => 1,
        Kind::Lost => 2,
        Kind::Changed | Kind::Done | Kind::Region | Kind::RegionEnd => 3,
    }
}

const KINDS: [Kind; 4] = [Kind::Preserve, Kind::PreserveZero, Kind::Lost, Kind::Changed];

fn encode_entry(out: &mut Vec<u8>, entry: &Entry, previous_start: u64) {
    put_number(out, entry.blocks.start - previous_start);
    put_number(out, u64::from(entry.epoch) << 2 | kind_bits(entry.kind));
    if entry.kind == Kind::Preserve {
        put_number(out, entry.position.0);
        out.extend_from_slice(&entry.checksum.to_le_bytes());
        return;
    }
    put_number(out, entry.blocks.len());
    if entry.kind == Kind::Lost {
        put_number(out, u64::from(entry.checksum));
    }
}

fn decode_entry(bytes: &[u8], at: &mut usize, previous_start: u64) -> Option<Entry> {
    let start = previous_start.checked_add(take_number(bytes, at)?)?;
    let head = take_number(bytes, at)?;
    let kind = KINDS[to_usize(head & 3)];
    let epoch = u32::try_from(head >> 2).ok()?;
    if kind == Kind::Preserve {
        let position = Position(take_number(bytes, at)?);
        let checksum = bytes.get(*at..*at + 4)?.try_into().ok()?;
        *at += 4;
        let checksum = u32::from_le_bytes(checksum);
        return Some(Entry { blocks: Extent::single(start), epoch, kind, position, checksum });
    }
    let end = start.checked_add(take_number(bytes, at)?)?;
    let mut entry = Entry::bare(kind, epoch, Extent { start, end });
    if kind == Kind::Lost {
        entry.checksum = u32::try_from(take_number(bytes, at)?).ok()?;
    }
    Some(entry)
}

/// What an index file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Header {
    tables_page: u32,
    tables_bytes: u64,
    tables_crc: u32,
    entries: u64,
    preserved: u64,
    lost: u64,
}

impl Header {
    fn encode(&self, uuid: &[u8; 16], number: u32) -> Vec<u8> {
        let mut out = Writer::default();
        out.raw(&MAGIC).u32(VERSION).raw(uuid).u32(number);
        out.u32(self.tables_page).u64(self.tables_bytes).u32(self.tables_crc);
        out.u64(self.entries).u64(self.preserved).u64(self.lost);
        let crc = crc32c::crc32c(&out.0);
        out.u32(crc);
        out.0.resize(PAGE_BYTES, 0);
        out.0
    }

    fn decode(page: &[u8], uuid: &[u8; 16], number: u32) -> Result<Option<Self>, Malformed> {
        let mut input = Reader::new(page);
        let is_ours = input.array::<8>()? == MAGIC
            && input.u32()? == VERSION
            && input.array::<16>()? == *uuid
            && input.u32()? == number;
        let header = Self {
            tables_page: input.u32()?,
            tables_bytes: input.u64()?,
            tables_crc: input.u32()?,
            entries: input.u64()?,
            preserved: input.u64()?,
            lost: input.u64()?,
        };
        let is_intact = input.u32()? == crc32c::crc32c(&page[..COVERED]);
        let is_sane = header.tables_bytes <= TABLES_BYTES_MAX;
        Ok((is_ours && is_intact && is_sane).then_some(header))
    }
}

/// An index file that is complete and durable. Immutable.
pub struct Run {
    uuid: [u8; 16],
    number: u32,
    file: Arc<dyn Storage>,
    header: Header,
    /// Per class, one for each page, ascending.
    fences: Vec<Vec<Fence>>,
    /// Epochs it covers, each with its segments.
    covers: Vec<(u32, u32)>,
    /// A page was found damaged: it is to be made anew.
    is_damaged: AtomicBool,
}

/// Whether a look-up may wait for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// As long as it takes.
    Long,
    /// Only what the cache has.
    Never,
}

impl Run {
    /// Open an index file; `None` if it is not a complete one of this volume and version.
    pub fn open(
        directory: &dyn Directory,
        uuid: [u8; 16],
        number: u32,
    ) -> io::Result<Option<Self>> {
        let file = directory.open(&run_name(number))?;
        let length = file.len()?;
        if length < PAGE {
            return Ok(None);
        }
        let mut page = vec![0; PAGE_BYTES];
        file.read_at(0, &mut page)?;
        let Ok(Some(header)) = Header::decode(&page, &uuid, number) else { return Ok(None) };
        let from = u64::from(header.tables_page) * PAGE;
        if from.checked_add(header.tables_bytes).is_none_or(|end| end > length) {
            return Ok(None);
        }
        let mut tables = vec![0; to_usize(header.tables_bytes)];
        file.read_at(from, &mut tables)?;
        if crc32c::crc32c(&tables) != header.tables_crc {
            return Ok(None);
        }
        let Ok((covers, fences)) = decode_tables(&tables) else { return Ok(None) };
        let is_damaged = AtomicBool::new(false);
        Ok(Some(Self { uuid, number, file, header, fences, covers, is_damaged }))
    }

    /// Its number; later ones know better.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Epochs it was made from, each with its segments, ascending.
    pub fn covers(&self) -> &[(u32, u32)] {
        &self.covers
    }

    /// Entries in it.
    pub fn entry_count(&self) -> u64 {
        self.header.entries
    }

    /// Blocks with content.
    pub fn preserved_count(&self) -> u64 {
        self.header.preserved
    }

    /// True if any entry says that content is lost.
    pub fn has_lost(&self) -> bool {
        self.header.lost > 0
    }

    /// Bytes of the medium it takes.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }

    /// True once a page was found damaged.
    pub fn is_damaged(&self) -> bool {
        self.is_damaged.load(Ordering::Relaxed)
    }

    /// Pages that have entries which begin inside `window`, about.
    pub fn pages_within(&self, window: Extent) -> u64 {
        let of_class = |fences: &Vec<Fence>| {
            let from = fences.partition_point(|f| f.start < window.start);
            let upto = fences.partition_point(|f| f.start < window.end);
            to_u64(upto - from)
        };
        self.fences.iter().map(of_class).sum()
    }

    /// Call `each` for every entry that overlaps `blocks`; of a single block only those from
    /// `epoch` on. By class, and in each ascending. False if a device must be waited for and may
    /// not be.
    pub fn overlapping(
        &self,
        blocks: Extent,
        epoch: u32,
        wait: Wait,
        each: &mut dyn FnMut(&Entry),
    ) -> io::Result<bool> {
        for (class, fences) in self.fences.iter().enumerate() {
            let first = blocks.start.saturating_sub(longest(class) - 1);
            // Entries of one block are in order of their epochs.
            let from = (first, if class == 0 && blocks.len() == 1 { epoch } else { 0 });
            let is_read = self.from(fences, from, wait, &mut |entry| {
                if entry.blocks.start >= blocks.end {
                    return ControlFlow::Break(());
                }
                if entry.blocks.end > blocks.start {
                    each(entry);
                }
                ControlFlow::Continue(())
            })?;
            if !is_read {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Call `each` for every entry that begins inside `window`.
    pub fn beginning(&self, window: Extent, each: &mut dyn FnMut(&Entry)) -> io::Result<()> {
        for fences in &self.fences {
            self.from(fences, (window.start, 0), Wait::Long, &mut |entry| {
                if entry.blocks.start >= window.end {
                    return ControlFlow::Break(());
                }
                each(entry);
                ControlFlow::Continue(())
            })?;
        }
        Ok(())
    }

    /// Entries of a class from `(block, epoch)` on.
    fn from(
        &self,
        fences: &[Fence],
        from: (u64, u32),
        wait: Wait,
        each: &mut dyn FnMut(&Entry) -> ControlFlow<()>,
    ) -> io::Result<bool> {
        // The page before the first that begins behind `from` may still hold it.
        let first = fences.partition_point(|f| (f.start, f.epoch) < from).saturating_sub(1);
        let mut bytes = [0; PAGE_BYTES];
        let mut ahead: Option<(u32, Vec<u8>)> = None;
        for (count, fence) in fences[first..].iter().enumerate() {
            let many = wait == Wait::Long && count > 2;
            let page: &[u8] = if many {
                self.read_ahead(fence.page, &mut ahead)?
            } else {
                if !self.read_page(fence.page, &mut bytes, wait)? {
                    return Ok(false);
                }
                &bytes
            };
            if self.entries_of(fence.page, page, from, each)?.is_break() {
                break;
            }
        }
        Ok(true)
    }

    fn read_page(&self, page: u32, bytes: &mut [u8], wait: Wait) -> io::Result<bool> {
        let offset = u64::from(page) * PAGE;
        match wait {
            Wait::Long => self.file.read_at(offset, bytes).map(|()| true),
            Wait::Never => self.file.try_read_at(offset, bytes),
        }
    }

    /// A page out of a larger piece that is kept for the next one.
    fn read_ahead<'a>(
        &self,
        page: u32,
        ahead: &'a mut Option<(u32, Vec<u8>)>,
    ) -> io::Result<&'a [u8]> {
        let pages = |bytes: &Vec<u8>| u32::try_from(bytes.len() / PAGE_BYTES).unwrap_or(0);
        let has = ahead
            .as_ref()
            .is_some_and(|(first, bytes)| (*first..*first + pages(bytes)).contains(&page));
        if !has {
            let left = u64::from(self.header.tables_page.saturating_sub(page)).max(1);
            let mut bytes = ahead.take().map(|(_, bytes)| bytes).unwrap_or_default();
            bytes.resize(to_usize(left.min(READ_PAGES) * PAGE), 0);
            self.file.read_at(u64::from(page) * PAGE, &mut bytes)?;
            *ahead = Some((page, bytes));
        }
        let (first, bytes) = ahead.as_ref().expect("read above");
        let at = to_usize(u64::from(page - first)) * PAGE_BYTES;
        Ok(&bytes[at..at + PAGE_BYTES])
    }

    fn entries_of(
        &self,
        page: u32,
        bytes: &[u8],
        from: (u64, u32),
        each: &mut dyn FnMut(&Entry) -> ControlFlow<()>,
    ) -> io::Result<ControlFlow<()>> {
        let mut input = Reader::new(bytes);
        let (crc, count) = (input.u32(), input.u32());
        let (Ok(crc), Ok(count)) = (crc, count) else { return Err(self.damage(page)) };
        let is_intact = crc == page_checksum(&self.uuid, self.number, page, &bytes[4..]);
        if !is_intact && !is_broken(Rule::IndexPagesVerified) {
            return Err(self.damage(page));
        }
        let (mut at, mut start) = (PAGE_HEADER_BYTES, 0);
        for _ in 0..count {
            let entry = decode_entry(bytes, &mut at, start).ok_or_else(|| self.damage(page))?;
            start = entry.blocks.start;
            if (entry.blocks.start, entry.epoch) >= from && each(&entry).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn damage(&self, page: u32) -> io::Error {
        self.is_damaged.store(true, Ordering::Relaxed);
        let what = format!(
            "index file {:08x} is damaged at byte {}; what it had is read from the log again, \
             at the latest when the volume is opened anew",
            self.number,
            u64::from(page) * PAGE
        );
        io::Error::new(io::ErrorKind::InvalidData, what)
    }
}

type Tables = (Vec<(u32, u32)>, Vec<Vec<Fence>>);

fn decode_tables(bytes: &[u8]) -> Result<Tables, Malformed> {
    let mut input = Reader::new(bytes);
    let mut covers = Vec::new();
    for _ in 0..input.u32()? {
        covers.push((input.u32()?, input.u32()?));
    }
    let mut classes = Vec::with_capacity(CLASSES);
    for _ in 0..CLASSES {
        let count = input.u32()?;
        let mut fences = Vec::new();
        for _ in 0..count {
            fences.push(Fence { start: input.u64()?, epoch: input.u32()?, page: input.u32()? });
        }
        fences.shrink_to_fit();
        classes.push(fences);
    }
    Ok((covers, classes))
}

/// A page under construction.
#[derive(Default)]
struct OpenPage {
    bytes: Vec<u8>,
    count: u32,
    first: (u64, u32),
    last_start: u64,
}

/// Writes an index file; entries come in order of their keys.
pub struct RunWriter<'a> {
    directory: &'a dyn Directory,
    uuid: [u8; 16],
    number: u32,
    file: Arc<dyn Storage>,
    open: Vec<OpenPage>,
    fences: Vec<Vec<Fence>>,
    /// Whole pages that are not written yet, and the number of the first.
    waiting: Vec<u8>,
    waiting_page: u32,
    header: Header,
}

impl<'a> RunWriter<'a> {
    /// Begin a file. Until [`Self::finish`] it is nothing to anybody.
    pub fn create(directory: &'a dyn Directory, uuid: [u8; 16], number: u32) -> io::Result<Self> {
        let file = directory.create(&run_name(number))?;
        Ok(Self {
            directory,
            uuid,
            number,
            file,
            open: (0..CLASSES).map(|_| OpenPage::default()).collect(),
            fences: vec![Vec::new(); CLASSES],
            waiting: Vec::new(),
            waiting_page: 1,
            header: Header {
                tables_page: 0,
                tables_bytes: 0,
                tables_crc: 0,
                entries: 0,
                preserved: 0,
                lost: 0,
            },
        })
    }

    /// Append an entry.
    pub fn push(&mut self, entry: &Entry) -> io::Result<()> {
        let class = class_of(entry.blocks);
        if self.open[class].bytes.len() + ENTRY_BYTES_MAX > PAGE_BYTES - PAGE_HEADER_BYTES {
            self.end_page(class)?;
        }
        let page = &mut self.open[class];
        let start = entry.blocks.start;
        if page.count == 0 {
            page.first = (start, entry.epoch);
            page.last_start = 0;
        }
        assert!(start >= page.last_start, "entries come in order");
        encode_entry(&mut page.bytes, entry, page.last_start);
        page.last_start = start;
        page.count += 1;
        self.header.entries += 1;
        self.header.preserved += u64::from(entry.kind == Kind::Preserve);
        self.header.lost += u64::from(entry.kind == Kind::Lost);
        Ok(())
    }

    fn next_page(&self) -> u32 {
        let waiting = u32::try_from(self.waiting.len() / PAGE_BYTES).expect("a few");
        self.waiting_page + waiting
    }

    fn end_page(&mut self, class: usize) -> io::Result<()> {
        let page = self.next_page();
        let open = &mut self.open[class];
        if open.count == 0 {
            return Ok(());
        }
        let at = self.waiting.len();
        self.waiting.extend_from_slice(&[0; 4]);
        self.waiting.extend_from_slice(&open.count.to_le_bytes());
        self.waiting.append(&mut open.bytes);
        self.waiting.resize(at + PAGE_BYTES, 0);
        let crc = page_checksum(&self.uuid, self.number, page, &self.waiting[at + 4..]);
        self.waiting[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        let (start, epoch) = open.first;
        self.fences[class].push(Fence { start, epoch, page });
        open.count = 0;
        if self.waiting.len() >= WRITE_PAGES * PAGE_BYTES { self.write_out() } else { Ok(()) }
    }

    fn write_out(&mut self) -> io::Result<()> {
        self.file.write_at(u64::from(self.waiting_page) * PAGE, &self.waiting)?;
        self.waiting_page = self.next_page();
        self.waiting.clear();
        Ok(())
    }

    /// What the file takes at most once it is finished, with so many entries more and so many
    /// segments it is made from.
    pub fn bytes_max(&self, entries: usize, segments: usize) -> u64 {
        let in_a_page = (PAGE_BYTES - PAGE_HEADER_BYTES) / ENTRY_BYTES_MAX;
        let more = entries / in_a_page + 2 * CLASSES;
        let fences = self.fences.iter().map(Vec::len).sum::<usize>() + more;
        let tables = 4 + 8 * segments + CLASSES * 4 + fences * 16;
        let pages = to_u64(more + tables.div_ceil(PAGE_BYTES));
        (u64::from(self.next_page()) + pages) * PAGE
    }

    /// Make the file complete and durable. `covers` are epochs, each with its segments, ascending.
    pub fn finish(mut self, covers: Vec<(u32, u32)>) -> io::Result<Run> {
        for class in 0..CLASSES {
            self.end_page(class)?;
        }
        let mut tables = Writer::default();
        let count = |length: usize| u32::try_from(length).expect("pages are numbered in 32 bits");
        tables.u32(count(covers.len()));
        for (epoch, segment) in &covers {
            tables.u32(*epoch).u32(*segment);
        }
        for fences in &self.fences {
            tables.u32(count(fences.len()));
            for fence in fences {
                tables.u64(fence.start).u32(fence.epoch).u32(fence.page);
            }
        }
        self.header.tables_page = self.next_page();
        self.header.tables_bytes = to_u64(tables.0.len());
        self.header.tables_crc = crc32c::crc32c(&tables.0);
        self.waiting.append(&mut tables.0);
        self.waiting.resize(self.waiting.len().next_multiple_of(PAGE_BYTES), 0);
        self.write_out()?;
        // The header says that all the rest is there: it comes after it.
        self.file.sync()?;
        self.file.write_at(0, &self.header.encode(&self.uuid, self.number))?;
        self.file.sync()?;
        self.directory.sync()?;
        let is_damaged = AtomicBool::new(false);
        let Self { uuid, number, file, header, fences, .. } = self;
        Ok(Run { uuid, number, file, header, fences, covers, is_damaged })
    }
}

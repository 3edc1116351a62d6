//! A file's content: what reading and writing it does to an export.

use crate::pieces::{Part, PieceError, Pieces};
use parking_lot::{RwLock, RwLockReadGuard};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use stillblock_core::export::{Export, ExportError, STATE_ZERO, ZeroRequest};

/// How long the end of an export waits for requests in flight; as the NBD server does.
const END_MAX: Duration = Duration::from_secs(10);
/// Extents asked for at a time when a file is searched for holes.
const SEEK_EXTENTS_MAX: usize = 256;
/// Bytes asked about at a time when a file is searched for holes.
const SEEK_BYTES_MAX: u64 = 1 << 30;

/// What a file may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Never changes: the kernel may keep what it read.
    Constant,
    /// Changes by others, and cannot be written here.
    Watched,
    /// Can be written here, and by others.
    Writable,
}

/// An export that files show, and how many have it open.
pub struct Source {
    /// `None` once it has ended. Held for reading across each request.
    export: RwLock<Option<Arc<dyn Export>>>,
    opens: AtomicUsize,
    /// What its files may be used for.
    pub access: Access,
    /// When its content was made; its files' times.
    pub created_unix_ns: u64,
}

impl Source {
    /// Show an export.
    pub fn new(export: Arc<dyn Export>, access: Access, created_unix_ns: u64) -> Self {
        let opens = AtomicUsize::new(0);
        Self { export: RwLock::new(Some(export)), opens, access, created_unix_ns }
    }

    /// How many times its files are open.
    pub fn opens(&self) -> usize {
        self.opens.load(Ordering::SeqCst)
    }

    /// Let go of the export: files that are open give errors from now on. False if a request has
    /// not ended in time, and then the export is still held.
    pub fn end(&self) -> bool {
        match self.export.try_write_for(END_MAX) {
            Some(mut export) => {
                *export = None;
                true
            }
            None => false,
        }
    }

    fn export(&self) -> Result<RwLockReadGuard<'_, Option<Arc<dyn Export>>>, ExportError> {
        let export = self.export.read();
        if export.is_some() { Ok(export) } else { Err(ExportError::ShuttingDown) }
    }
}

/// An open file; dropping it closes it.
pub struct Opened(Arc<Source>);

impl Opened {
    /// Count a file of this source as open.
    pub fn new(source: Arc<Source>) -> Self {
        source.opens.fetch_add(1, Ordering::SeqCst);
        Self(source)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.opens.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What to look for from an offset on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that may be other than zero.
    Data,
    /// The next byte of a range of zeros, or the end.
    Hole,
}

/// One file: an export, or pieces of it.
pub struct Image {
    source: Arc<Source>,
    /// `None`: all of it, however long it is by now.
    pieces: Option<Pieces>,
}

impl Image {
    /// A file of the whole export, or of these ranges of it.
    pub fn new(source: Arc<Source>, ranges: Option<&[(u64, u64)]>) -> Result<Self, PieceError> {
        let size_bytes = source.export.read().as_ref().map_or(0, |export| export.size_bytes());
        let pieces = ranges.map(|ranges| Pieces::new(ranges, size_bytes)).transpose()?;
        Ok(Self { source, pieces })
    }

    /// What it shows.
    pub fn source(&self) -> &Arc<Source> {
        &self.source
    }

    /// The file's size; 0 once its export has ended.
    pub fn size_bytes(&self) -> u64 {
        match &self.pieces {
            Some(pieces) => pieces.size_bytes(),
            None => self.source.export.read().as_ref().map_or(0, |export| export.size_bytes()),
        }
    }

    fn parts(&self, export: &dyn Export, start: u64, end: u64) -> Vec<Part> {
        if let Some(pieces) = &self.pieces {
            return pieces.parts(start, end).collect();
        }
        let length = end.min(export.size_bytes()).saturating_sub(start);
        if length == 0 {
            return Vec::new();
        }
        vec![Part { file_start: start, disk_start: start, length }]
    }

    /// Run something for each part of a range of the file; return how many bytes there were.
    fn for_parts(
        &self,
        start: u64,
        length_bytes: u64,
        mut work: impl FnMut(&dyn Export, Part) -> Result<(), ExportError>,
    ) -> Result<u64, ExportError> {
        let guard = self.source.export()?;
        let export = guard.as_deref().ok_or(ExportError::ShuttingDown)?;
        let end = start.saturating_add(length_bytes);
        let mut done = 0;
        for part in self.parts(export, start, end) {
            work(export, part)?;
            done += part.length;
        }
        Ok(done)
    }

    /// Fill `buffer` from `offset_bytes` as far as the file goes; return how far that is.
    pub fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<usize, ExportError> {
        let mut done = 0;
        self.for_parts(offset_bytes, buffer.len() as u64, |export, part| {
            let end = done + to_usize(part.length)?;
            export.read(part.disk_start, &mut buffer[done..end])?;
            done = end;
            Ok(())
        })?;
        Ok(done)
    }

    fn check_writable(&self) -> Result<(), ExportError> {
        let is_writable = self.source.access == Access::Writable;
        if is_writable { Ok(()) } else { Err(ExportError::ReadOnly) }
    }

    /// Write `data` at `offset_bytes`, as far as the file goes; return how far that is.
    pub fn write(&self, offset_bytes: u64, data: &[u8], fua: bool) -> Result<usize, ExportError> {
        self.check_writable()?;
        let mut done = 0;
        self.for_parts(offset_bytes, data.len() as u64, |export, part| {
            let end = done + to_usize(part.length)?;
            export.write(part.disk_start, &data[done..end], fua)?;
            done = end;
            Ok(())
        })?;
        if done == 0 && !data.is_empty() { Err(ExportError::NoSpace) } else { Ok(done) }
    }

    /// Make a range read as zeros. A range that does not lie in the file whole is an error.
    pub fn zero(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
        may_punch: bool,
    ) -> Result<(), ExportError> {
        self.check_writable()?;
        if offset_bytes.checked_add(length_bytes).is_none_or(|end| end > self.size_bytes()) {
            return Err(ExportError::NoSpace);
        }
        let how = ZeroRequest { may_punch, ..ZeroRequest::default() };
        self.for_parts(offset_bytes, length_bytes, |export, part| {
            export.write_zeroes(part.disk_start, part.length, how)
        })?;
        Ok(())
    }

    /// Return when everything that was written before is on stable storage.
    pub fn flush(&self) -> Result<(), ExportError> {
        let guard = self.source.export()?;
        guard.as_deref().ok_or(ExportError::ShuttingDown)?.flush()
    }

    /// Find the next data or hole from `offset_bytes` on; `None` if there is none before the end,
    /// where a hole begins.
    pub fn seek(&self, offset_bytes: u64, wanted: Seek) -> Result<Option<u64>, ExportError> {
        let size_bytes = self.size_bytes();
        let mut position = offset_bytes;
        let mut found = None;
        while found.is_none() && position < size_bytes {
            let asked = SEEK_BYTES_MAX.min(size_bytes - position);
            let mut reached = position;
            self.for_parts(position, asked, |export, part| {
                if found.is_some() || reached != part.file_start {
                    return Ok(()); // behind what is not known yet
                }
                let context = "base:allocation";
                let (start, length) = (part.disk_start, part.length);
                for extent in export.block_status(context, start, length, SEEK_EXTENTS_MAX)? {
                    let is_hole = extent.flags & STATE_ZERO != 0;
                    if found.is_none() && is_hole == (wanted == Seek::Hole) {
                        found = Some(part.file_start + (extent.start - part.disk_start));
                    }
                    reached = part.file_start + (extent.end - part.disk_start);
                }
                Ok(())
            })?;
            if reached == position {
                return Err(ExportError::Io); // nothing was said: it would go on for ever
            }
            position = reached;
        }
        Ok(found)
    }
}

fn to_usize(length: u64) -> Result<usize, ExportError> {
    usize::try_from(length).map_err(|_| ExportError::Invalid)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use parking_lot::Mutex;
    use stillblock_core::export::{BlockSizes, STATE_HOLE, StatusExtent};

    /// A disk in memory, whose all-zero blocks of 10 bytes are holes, told a few at a time.
    struct Memory(Mutex<Vec<u8>>);

    impl Export for Memory {
        fn size_bytes(&self) -> u64 {
            self.0.lock().len() as u64
        }
        fn is_read_only(&self) -> bool {
            false
        }
        fn block_sizes(&self) -> BlockSizes {
            BlockSizes { minimum: 1, preferred: 10, maximum: 1000 }
        }
        fn description(&self) -> String {
            String::new()
        }
        fn try_read(&self, _: u64, _: &mut [u8]) -> Result<bool, ExportError> {
            Ok(false)
        }
        fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
            let start = to_usize(offset)?;
            let disk = self.0.lock();
            buffer.copy_from_slice(disk.get(start..start + buffer.len()).ok_or(ExportError::Io)?);
            Ok(())
        }
        fn write(&self, offset: u64, data: &[u8], _: bool) -> Result<(), ExportError> {
            let start = to_usize(offset)?;
            let mut disk = self.0.lock();
            let place = disk.get_mut(start..start + data.len()).ok_or(ExportError::Io)?;
            place.copy_from_slice(data);
            Ok(())
        }
        fn write_zeroes(&self, at: u64, length: u64, _: ZeroRequest) -> Result<(), ExportError> {
            self.write(at, &vec![0; to_usize(length)?], false)
        }
        fn trim(&self, _: u64, _: u64, _: bool) -> Result<(), ExportError> {
            Ok(())
        }
        fn flush(&self) -> Result<(), ExportError> {
            Ok(())
        }
        fn cache(&self, _: u64, _: u64) -> Result<(), ExportError> {
            Ok(())
        }
        fn contexts(&self) -> Vec<String> {
            Vec::new()
        }
        fn block_status(
            &self,
            _: &str,
            offset: u64,
            length: u64,
            extents_max: usize,
        ) -> Result<Vec<StatusExtent>, ExportError> {
            let disk = self.0.lock();
            let flags_of = |at: u64| {
                let block = &disk[to_usize(at / 10 * 10).unwrap()..][..10];
                if block.iter().all(|byte| *byte == 0) { STATE_HOLE | STATE_ZERO } else { 0 }
            };
            let mut found: Vec<StatusExtent> = Vec::new();
            let mut at = offset;
            while at < offset + length && found.len() < extents_max.min(2) {
                let end = (at / 10 * 10 + 10).min(offset + length);
                found.push(StatusExtent { start: at, end, flags: flags_of(at) });
                at = end;
            }
            Ok(found)
        }
    }

    /// A disk of zeros.
    pub fn memory(size: usize) -> Arc<dyn Export> {
        Arc::new(Memory(Mutex::new(vec![0; size])))
    }

    fn source(content: Vec<u8>, access: Access) -> Arc<Source> {
        Arc::new(Source::new(Arc::new(Memory(Mutex::new(content))), access, 0))
    }

    fn content() -> Vec<u8> {
        (0..100_u8).map(|n| if n / 10 % 3 == 1 { 0 } else { n + 1 }).collect()
    }

    #[test]
    fn a_file_of_pieces_reads_and_writes_where_they_lie_and_nowhere_else() {
        let mut disk = content();
        let source = source(disk.clone(), Access::Writable);
        let image = Image::new(Arc::clone(&source), Some(&[(70, 90), (5, 15)])).unwrap();
        let whole = Image::new(source, None).unwrap();
        assert_eq!((image.size_bytes(), whole.size_bytes()), (30, 100));
        assert_eq!(image.write(18, &[201, 202, 203, 204], false), Ok(4));
        disk[88..90].copy_from_slice(&[201, 202]);
        disk[5..7].copy_from_slice(&[203, 204]);
        let mut found = vec![0; 200];
        assert_eq!(whole.read(0, &mut found), Ok(100));
        assert_eq!(found[..100], disk);
        assert_eq!(image.read(15, &mut found), Ok(15));
        assert_eq!(found[..15], [&disk[85..90], &disk[5..15]].concat());
        assert_eq!(image.read(30, &mut found), Ok(0));
        image.zero(19, 2, true).unwrap();
        disk[89] = 0;
        disk[5] = 0;
        assert_eq!(whole.read(0, &mut found), Ok(100));
        assert_eq!(found[..100], disk);
    }

    #[test]
    fn writing_past_the_end_is_short_and_behind_it_an_error() {
        let image = Image::new(source(content(), Access::Writable), Some(&[(10, 20)])).unwrap();
        assert_eq!(image.write(8, &[1; 5], false), Ok(2));
        assert_eq!(image.write(10, &[1; 5], false), Err(ExportError::NoSpace));
        assert_eq!(image.zero(8, 3, true), Err(ExportError::NoSpace));
    }

    #[test]
    fn what_is_not_writable_refuses_every_change() {
        for access in [Access::Constant, Access::Watched] {
            let image = Image::new(source(content(), access), None).unwrap();
            assert_eq!(image.write(0, &[1], false), Err(ExportError::ReadOnly));
            assert_eq!(image.zero(0, 1, true), Err(ExportError::ReadOnly));
        }
    }

    #[test]
    fn data_and_holes_are_found_from_every_byte_of_a_file_of_pieces() {
        let ranges = [(55, 100), (0, 33)];
        let disk = content();
        let image = Image::new(source(disk.clone(), Access::Constant), Some(&ranges)).unwrap();
        let is_hole: Vec<bool> = ranges
            .iter()
            .flat_map(|&(start, end)| start..end)
            .map(|at: u64| disk[to_usize(at / 10 * 10).unwrap()..][..10].iter().all(|b| *b == 0))
            .collect();
        for start in 0..is_hole.len() {
            for (wanted, hole) in [(Seek::Data, false), (Seek::Hole, true)] {
                let next = (start..is_hole.len()).find(|&at| is_hole[at] == hole);
                let found = image.seek(start as u64, wanted).unwrap();
                assert_eq!(found, next.map(|at| at as u64), "{wanted:?} from {start}");
            }
        }
        assert_eq!(image.seek(78, Seek::Data), Ok(None));
    }

    #[test]
    fn a_source_that_has_ended_gives_errors_and_holds_nothing() {
        let export: Arc<dyn Export> = Arc::new(Memory(Mutex::new(content())));
        let source = Arc::new(Source::new(Arc::clone(&export), Access::Constant, 0));
        let image = Image::new(Arc::clone(&source), None).unwrap();
        let opened = Opened::new(Arc::clone(&source));
        assert_eq!(source.opens(), 1);
        assert!(source.end());
        assert_eq!(Arc::strong_count(&export), 1);
        assert_eq!(image.read(0, &mut [0; 4]), Err(ExportError::ShuttingDown));
        assert_eq!(image.seek(0, Seek::Data), Ok(None));
        drop(opened);
        assert_eq!(source.opens(), 0);
    }
}

//! The one small face of everything the engine reads and writes: a byte device and a directory of
//! them.
//!
//! Implementations: files and block devices here; memory, faulty and crash-simulating ones in
//! `testing`. Contract: a write that was submitted may reach the medium wholly, by sectors in any
//! subset, or not at all until a later [`Storage::sync`] returned; a failed sync leaves all
//! unsynced writes in doubt.

use crate::number::{to_u64, to_usize};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A device of bytes. Every method blocks the caller and may be called from many threads.
pub trait Storage: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// True if it has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fill `buffer` from `offset`; reading past the end is an error.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// As `read_at` if that needs no waiting; `Ok(false)` if it does, `buffer` then undefined.
    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, buffer).map(|()| true)
    }

    /// Write all of `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Write consecutive slices at `offset`.
    fn write_slices_at(&self, offset: u64, slices: &[&[u8]]) -> io::Result<()> {
        let mut at = offset;
        for slice in slices {
            self.write_at(at, slice)?;
            at += to_u64(slice.len());
        }
        Ok(())
    }

    /// Make a range read as zeroes, as a hole if `may_punch` and the device can.
    fn zero_at(&self, offset: u64, length: u64, may_punch: bool) -> io::Result<()>;

    /// Give the space of a range back; it reads as zeroes afterwards or as before.
    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Reserve space for a range without changing what it reads as.
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Give back what was reserved for a range beyond the end and never written; a hint.
    fn release_ahead(&self, _offset: u64, _length: u64) {}

    /// Return when every completed write is on stable storage.
    fn sync(&self) -> io::Result<()>;

    /// The first byte at or after `offset` and before `end` that may be something else than zero;
    /// `end` if none.
    fn next_data(&self, offset: u64, _end: u64) -> io::Result<u64> {
        Ok(offset)
    }

    /// The first byte after `offset`, which is in data, where a hole begins, at most `end`. Some
    /// filesystems look through all the data between: not for the path of a write.
    fn next_hole(&self, _offset: u64, end: u64) -> io::Result<u64> {
        Ok(end)
    }

    /// Start reading a range into the cache; a hint.
    fn prefetch(&self, _offset: u64, _length: u64) {}

    /// Bytes of the medium it takes: holes cost nothing.
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.len()
    }

    /// Change the length.
    fn set_len(&self, length: u64) -> io::Result<()>;
}

/// A flat directory of devices. What was created, renamed or removed is durable after
/// [`Directory::sync`].
pub trait Directory: Send + Sync {
    /// Open an existing file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Arc<dyn Storage>>;
    /// Make an empty file; an existing one is truncated.
    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>>;
    /// Replace `to` by `from` in one step.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Remove a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Names of all files, sorted.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Make the names durable.
    fn sync(&self) -> io::Result<()>;
    /// Bytes its filesystem still has for ordinary users.
    fn free_bytes(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

/// A regular file or block device of the operating system.
pub struct FileStorage {
    file: File,
    is_block_device: bool,
    alignment: Option<DirectAlignment>,
    /// Unaligned direct writes read, patch and write whole units; nothing else may write meanwhile.
    unaligned_writes: parking_lot::RwLock<()>,
}

#[derive(Clone, Copy)]
struct DirectAlignment {
    unit: u64,
}

/// How to open a [`FileStorage`].
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions {
    /// Do not use the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Only reading.
    pub read_only: bool,
}

impl FileStorage {
    /// Open an existing file or block device.
    pub fn open(path: &Path, options: OpenOptions) -> io::Result<Self> {
        let mut flags = OFlags::CLOEXEC;
        flags |= if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        if options.direct {
            flags |= OFlags::DIRECT;
        }
        Self::from_fd(rustix::fs::open(path, flags, Mode::empty())?, options.direct)
    }

    fn from_fd(fd: OwnedFd, direct: bool) -> io::Result<Self> {
        let file = File::from(fd);
        let file_type = file.metadata()?.file_type();
        let is_block_device = std::os::unix::fs::FileTypeExt::is_block_device(&file_type);
        let unit = if is_block_device {
            u64::from(rustix::fs::ioctl_blksszget(&file)?)
        } else {
            // Every filesystem we know accepts direct I/O in pages; many accept less, none may be
            // relied on.
            4096
        };
        let alignment = direct.then_some(DirectAlignment { unit });
        let unaligned_writes = parking_lot::RwLock::new(());
        Ok(Self { file, is_block_device, alignment, unaligned_writes })
    }

    /// The open file, for locks and identity.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<bool> {
        loop {
            match rustix::fs::fallocate(&self.file, flags, offset, length) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn write_zeroes_plainly(&self, offset: u64, length: u64) -> io::Result<()> {
        const PIECE: u64 = 1 << 20;
        let zeroes = vec![0; to_usize(length.min(PIECE))];
        let mut at = offset;
        while at < offset + length {
            let piece = PIECE.min(offset + length - at);
            self.write_at(at, &zeroes[..to_usize(piece)])?;
            at += piece;
        }
        Ok(())
    }

    /// Read through an aligned buffer.
    fn read_direct(&self, unit: u64, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (start, end) = around(unit, offset, buffer.len());
        let mut bounce = AlignedBuffer::new(to_usize(end - start));
        let wanted = to_usize(offset - start) + buffer.len();
        let mut filled = 0;
        while filled < wanted {
            // A file whose length is no multiple of the unit ends with a short read.
            match self.file.read_at(&mut bounce.bytes()[filled..], start + to_u64(filled)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let skip = to_usize(offset - start);
        buffer.copy_from_slice(&bounce.bytes()[skip..skip + buffer.len()]);
        Ok(())
    }

    fn write_direct(&self, unit: u64, offset: u64, slices: &[&[u8]]) -> io::Result<()> {
        let length: usize = slices.iter().map(|s| s.len()).sum();
        let (start, end) = around(unit, offset, length);
        let mut bounce = AlignedBuffer::new(to_usize(end - start));
        let is_aligned = start == offset && end == offset + to_u64(length);
        let (_shared, _exclusive);
        if is_aligned {
            _shared = self.unaligned_writes.read();
        } else {
            _exclusive = self.unaligned_writes.write();
            let size = self.len()?;
            let known = to_usize(end.min(size.max(start)) - start);
            self.read_direct(unit, start, &mut bounce.bytes()[..known])?;
        }
        let mut at = to_usize(offset - start);
        for slice in slices {
            bounce.bytes()[at..at + slice.len()].copy_from_slice(slice);
            at += slice.len();
        }
        if is_aligned {
            return self.file.write_all_at(bounce.bytes(), start);
        }
        let size = self.len()?;
        self.file.write_all_at(bounce.bytes(), start)?;
        if end > size && !self.is_block_device {
            // The unit that holds the end of an odd-sized file was written whole.
            self.file.set_len(size.max(offset + to_u64(length)))?;
        }
        Ok(())
    }
}

/// The units that a byte range touches, in bytes.
fn around(unit: u64, offset: u64, length: usize) -> (u64, u64) {
    let start = offset / unit * unit;
    (start, (offset + to_u64(length)).next_multiple_of(unit))
}

/// Memory whose start is a multiple of a page, as direct I/O demands.
struct AlignedBuffer {
    memory: Vec<u8>,
    skip: usize,
    length: usize,
}

impl AlignedBuffer {
    fn new(length: usize) -> Self {
        const ALIGNMENT: usize = 4096;
        let memory = vec![0; length + ALIGNMENT];
        let skip = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, skip, length }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.skip..self.skip + self.length]
    }
}

impl Storage for FileStorage {
    fn len(&self) -> io::Result<u64> {
        if self.is_block_device {
            return Ok(rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0))?);
        }
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self.alignment {
            None => self.file.read_exact_at(buffer, offset),
            Some(DirectAlignment { unit }) => self.read_direct(unit, offset, buffer),
        }
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        if self.alignment.is_some() {
            return Ok(false);
        }
        let length = buffer.len();
        let slices = &mut [IoSliceMut::new(buffer)];
        match rustix::io::preadv2(self.file.as_fd(), slices, offset, ReadWriteFlags::NOWAIT) {
            Ok(count) => Ok(count == length),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            // No such thing on this filesystem: memory-backed ones never wait for a device.
            Err(Errno::OPNOTSUPP) => self.read_at(offset, buffer).map(|()| true),
            Err(error) => Err(error.into()),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self.alignment {
            None => self.file.write_all_at(data, offset),
            Some(DirectAlignment { unit }) => self.write_direct(unit, offset, &[data]),
        }
    }

    fn write_slices_at(&self, offset: u64, slices: &[&[u8]]) -> io::Result<()> {
        /// The kernel takes no more slices in one call.
        const SLICES_MAX: usize = 1024;
        if let Some(DirectAlignment { unit }) = self.alignment {
            return self.write_direct(unit, offset, slices);
        }
        let mut at = offset;
        for group in slices.chunks(SLICES_MAX) {
            let vector: Vec<_> = group.iter().map(|s| IoSlice::new(s)).collect();
            let length: usize = group.iter().map(|s| s.len()).sum();
            let mut written = loop {
                match rustix::io::pwritev(self.file.as_fd(), &vector, at) {
                    Ok(count) => break count,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            };
            // A short write is rare: the rest goes slice by slice.
            if written < length {
                let mut position = at;
                for slice in group {
                    let done = written.min(slice.len());
                    self.file.write_all_at(&slice[done..], position + to_u64(done))?;
                    written -= done;
                    position += to_u64(slice.len());
                }
            }
            at += to_u64(length);
        }
        Ok(())
    }

    fn zero_at(&self, offset: u64, length: u64, may_punch: bool) -> io::Result<()> {
        let shared = self.unaligned_writes.read();
        if may_punch
            && self.fallocate(
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                offset,
                length,
            )?
        {
            return Ok(());
        }
        if self.fallocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, length)? {
            return Ok(());
        }
        drop(shared);
        self.write_zeroes_plainly(offset, length)
    }

    fn discard_at(&self, offset: u64, length: u64) -> io::Result<()> {
        let _shared = self.unaligned_writes.read();
        self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)?;
        Ok(())
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::KEEP_SIZE, offset, length)?;
        Ok(())
    }

    fn release_ahead(&self, offset: u64, length: u64) {
        if length > 0 && !self.is_block_device {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // What stays reserved costs room, nothing else, and goes with the file.
            let _ = self.fallocate(how, offset, length);
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn next_data(&self, offset: u64, end: u64) -> io::Result<u64> {
        use rustix::fs::SeekFrom;
        if self.is_block_device || offset >= end {
            return Ok(offset.min(end));
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => Ok(start.min(end)),
            Err(Errno::NXIO) => Ok(end),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(offset),
            Err(error) => Err(error.into()),
        }
    }

    fn next_hole(&self, offset: u64, end: u64) -> io::Result<u64> {
        use rustix::fs::SeekFrom;
        if self.is_block_device {
            return Ok(end);
        }
        match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
            Ok(hole) => Ok(hole.min(end)),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NXIO) => Ok(end),
            Err(error) => Err(error.into()),
        }
    }

    fn prefetch(&self, offset: u64, length: u64) {
        if self.alignment.is_none() {
            let length = std::num::NonZeroU64::new(length);
            // Only a hint: what it cannot do is read later all the same.
            let _ = rustix::fs::fadvise(&self.file, offset, length, rustix::fs::Advice::WillNeed);
        }
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        // In units of 512 bytes whatever the filesystem's block size, stat(2).
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }
}

/// A directory of the operating system.
pub struct FileDirectory {
    path: PathBuf,
}

impl FileDirectory {
    /// The directory at `path`, which exists.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf() }
    }
}

impl Directory for FileDirectory {
    fn open(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(FileStorage::open(&self.path.join(name), OpenOptions::default())?))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let fd = rustix::fs::open(self.path.join(name), flags, mode)?;
        Ok(Arc::new(FileStorage::from_fd(fd, false)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let told = rustix::fs::statvfs(&self.path)?;
        Ok(told.f_bavail.saturating_mul(told.f_frsize))
    }
}

//! What the kernel asks, answered from the tree.

use crate::image::{Access, Image, Opened, Seek};
use crate::tree::{Node, ROOT, Tree};
use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite, Request,
    TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use stillblock_core::export::ExportError;

/// Names come and go: each look-up is asked anew.
const NAME_TTL: Duration = Duration::ZERO;
/// A file's attributes change only if the disk's size does.
const ATTR_TTL: Duration = Duration::from_secs(1);
/// Largest request; what kernels send at most.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Reads ahead and the like that may wait here at the same time.
const BACKGROUND_MAX: u16 = 64;
/// `linux/prctl.h`; not in `libc` yet.
const PR_SET_IO_FLUSHER: libc::c_int = 57;
const SECTOR_BYTES: u64 = 512;
const BLOCK_BYTES: u32 = 4096;

/// The tree as one mount shows it.
pub struct ImageFilesystem {
    tree: Arc<Tree>,
    /// Files that are open through this mount: they are closed when it ends, whatever ends it.
    opened: Mutex<(u64, HashMap<u64, Opened>)>,
    owner: (u32, u32),
    started: SystemTime,
}

impl ImageFilesystem {
    /// Show a tree.
    pub fn new(tree: Arc<Tree>) -> Self {
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { tree, opened: Mutex::default(), owner, started: SystemTime::now() }
    }

    fn attr(&self, number: u64, node: &Node) -> FileAttr {
        let (kind, perm, size, time) = match node {
            Node::Directory => (FileType::Directory, 0o500, 0, self.started),
            Node::File(image) => {
                let perm = if image.source().access == Access::Writable { 0o600 } else { 0o400 };
                let time = UNIX_EPOCH + Duration::from_nanos(image.source().created_unix_ns);
                (FileType::RegularFile, perm, image.size_bytes(), time)
            }
        };
        FileAttr {
            ino: INodeNo(number),
            size,
            blocks: blocks_told(size),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: BLOCK_BYTES,
            flags: 0,
        }
    }

    /// The file, or the error for one that is gone.
    fn file(&self, number: INodeNo) -> Result<Arc<Image>, Errno> {
        self.tree.file(number.0).ok_or(Errno::EIO)
    }
}

/// Copying programs look for holes only in files that have fewer blocks than bytes, and some take a
/// file without any block for one hole.
fn blocks_told(size_bytes: u64) -> u64 {
    let blocks = size_bytes / SECTOR_BYTES;
    if blocks > 1 { blocks - 1 } else { blocks }
}

fn errno(error: ExportError) -> Errno {
    match error {
        ExportError::Io | ExportError::ShuttingDown => Errno::EIO,
        ExportError::ReadOnly => Errno::EROFS,
        ExportError::Invalid => Errno::EINVAL,
        ExportError::NoSpace => Errno::ENOSPC,
        ExportError::NotSupported => Errno::EOPNOTSUPP,
    }
}

fn finish(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

thread_local! {
    /// Reads are answered from here, without a new allocation for each.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static IS_FLUSHER: Cell<bool> = const { Cell::new(false) };
}

/// Tell the kernel, once a thread, that this one writes out what reclaiming memory may wait for: a
/// filesystem on a loop device on one of our files. Memory that it needs is then not taken from
/// pages that only it could clean. Needs a privilege; without it nobody can mount such a filesystem
/// either.
fn become_flusher() {
    IS_FLUSHER.with(|is_flusher| {
        if !is_flusher.replace(true) {
            // SAFETY: takes integers only, and concerns this thread alone.
            let _ = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
        }
    });
}

impl Filesystem for ImageFilesystem {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // A larger or smaller number than the kernel allows is replaced by one that it does.
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        // Where the kernel is older, direct reads of a file come one after the other.
        for wanted in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS] {
            let _ = config.add_capabilities(wanted);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str().and_then(|name| self.tree.find(parent.0, name)) {
            Some((number, node)) => {
                let attr = self.attr(number, &node);
                reply.entry_with_ttls(&ATTR_TTL, &NAME_TTL, &attr, Generation(0));
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.tree.node(number.0) {
            Some(node) => reply.attr(&ATTR_TTL, &self.attr(number.0, &node)),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(node) = self.tree.node(number.0) else { return reply.error(Errno::ESTALE) };
        let attr = self.attr(number.0, &node);
        // A disk keeps its size. Times are those of its content: asked to change, they stay.
        if mode.or(uid).or(gid).is_some() || size.is_some_and(|size| size != attr.size) {
            return reply.error(Errno::EPERM);
        }
        reply.attr(&ATTR_TTL, &attr);
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.ok(); // only its owner gets here
    }

    fn open(&self, _: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let Some((image, opened)) = self.tree.open(number.0) else {
            return reply.error(Errno::ENOENT);
        };
        let access = image.source().access;
        if access != Access::Writable && flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        let mut mine = self.opened.lock();
        mine.0 += 1;
        let handle = mine.0;
        mine.1.insert(handle, opened);
        drop(mine);
        let how = match access {
            Access::Constant => FopenFlags::FOPEN_KEEP_CACHE,
            Access::Watched => FopenFlags::FOPEN_DIRECT_IO,
            Access::Writable => {
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            }
        };
        reply.opened(FileHandle(handle), how);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let closed = self.opened.lock().1.remove(&handle.0);
        drop(closed);
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok(); // a close, which makes nothing durable
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let image = match self.file(number) {
            Ok(image) => image,
            Err(error) => return reply.error(error),
        };
        let Ok(size) = usize::try_from(size.min(REQUEST_BYTES_MAX)) else {
            return reply.error(Errno::EINVAL);
        };
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            match image.read(offset, &mut buffer[..size]) {
                Ok(length) => reply.data(&buffer[..length]),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        become_flusher();
        let fua = flags.0 & libc::O_DSYNC != 0;
        let written = self.file(number).and_then(|image| {
            let length = image.write(offset, data, fua).map_err(errno)?;
            u32::try_from(length).map_err(|_| Errno::EINVAL)
        });
        match written {
            Ok(length) => reply.written(length),
            Err(error) => reply.error(error),
        }
    }

    fn fsync(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        become_flusher();
        finish(self.file(number).and_then(|image| image.flush().map_err(errno)), reply);
    }

    fn fallocate(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        become_flusher();
        let kept = mode & !libc::FALLOC_FL_KEEP_SIZE;
        let may_punch = match kept {
            libc::FALLOC_FL_PUNCH_HOLE => true,
            libc::FALLOC_FL_ZERO_RANGE => false,
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        let zeroed = self.file(number).and_then(|image| {
            let end = offset.saturating_add(length).min(image.size_bytes());
            image.zero(offset, end.saturating_sub(offset), may_punch).map_err(errno)
        });
        finish(zeroed, reply);
    }

    fn lseek(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let wanted = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let found = self.file(number).and_then(|image| {
            let size = image.size_bytes();
            let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
            if offset >= size {
                return Err(Errno::ENXIO);
            }
            match (image.seek(offset, wanted).map_err(errno)?, wanted) {
                (Some(found), _) => Ok(found),
                (None, Seek::Hole) => Ok(size),
                (None, Seek::Data) => Err(Errno::ENXIO),
            }
        });
        match found.and_then(|offset| i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)) {
            Ok(offset) => reply.offset(offset),
            Err(error) => reply.error(error),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        // Where the next one begins: 1 and 2 are `.` and `..`, then numbers of nodes, which are
        // larger than the root's, and one more.
        let dots = [(1, "."), (2, "..")];
        for (next, name) in dots.into_iter().filter(|(next, _)| *next > offset) {
            let of = if next == 1 { number } else { INodeNo(ROOT) };
            if reply.add(of, next, FileType::Directory, name) {
                return reply.ok();
            }
        }
        for (found, name, node) in self.tree.list(number.0, offset.saturating_sub(1)) {
            let kind = match node {
                Node::Directory => FileType::Directory,
                Node::File(_) => FileType::RegularFile,
            };
            if reply.add(INodeNo(found), found + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}

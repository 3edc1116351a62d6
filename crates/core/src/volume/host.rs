//! What the operating system says of disks, locks, boots and memory filesystems.

use crate::error::{Error, Result};
use crate::journal::OriginIdentity;
use crate::storage::{FileStorage, OpenOptions};
use rustix::fs::FlockOperation;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

const LOCK_NAME: &str = "lock";

/// Nanoseconds since 1970.
pub fn now_unix_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

pub(super) fn path_of(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

pub(super) fn bytes_of(path: &Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes().to_vec()
}

pub(super) fn boot_id() -> Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let text = text.map_err(Error::origin("reading the kernel's boot id"))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let mut id = [0; 16];
    for (byte, pair) in id.iter_mut().zip(digits.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).unwrap_or("0");
        *byte = u8::from_str_radix(pair, 16).unwrap_or(0);
    }
    Ok(id)
}

/// True if a file was changed since this machine was started. The kernel tells the time of the boot
/// in whole seconds, and corrects it as it corrects the clock.
pub(super) fn is_after_boot(modified_unix_ns: u64) -> bool {
    const SLACK_S: u64 = 5;
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("btime "));
    let boot = line.and_then(|seconds| seconds.trim().parse::<u64>().ok());
    boot.is_some_and(|boot| modified_unix_ns / 1_000_000_000 > boot + SLACK_S)
}

/// What tells the origin from other disks now.
pub fn identify(file: &File) -> std::io::Result<OriginIdentity> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let meta = file.metadata()?;
    if meta.file_type().is_block_device() {
        let bytes = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?;
        return Ok(OriginIdentity { device: meta.rdev(), inode: 0, bytes, modified_unix_ns: 0 });
    }
    let seconds = u64::try_from(meta.mtime()).unwrap_or(0);
    let nanos = u64::try_from(meta.mtime_nsec()).unwrap_or(0);
    Ok(OriginIdentity {
        device: meta.dev(),
        inode: meta.ino(),
        bytes: meta.len(),
        modified_unix_ns: seconds.saturating_mul(1_000_000_000).saturating_add(nanos),
    })
}

pub(super) fn open_origin(path: &Path, direct: bool) -> Result<FileStorage> {
    let opened = FileStorage::open(path, OpenOptions { direct, read_only: false });
    let storage = opened.map_err(Error::origin(format!("opening {}", path.display())))?;
    lock_origin(storage.file(), path)?;
    Ok(storage)
}

/// Others must not write to the origin: QEMU and ourselves respect a lock of the whole file.
pub(super) fn lock_origin(file: &File, path: &Path) -> Result<()> {
    if lock_whole(file, libc::F_WRLCK) {
        return Ok(());
    }
    Err(Error::Locked(format!(
        "{} is in use by another process; stop it, then try again",
        path.display()
    )))
}

/// An open file description lock: it belongs to the opening, not to the process, fcntl(2).
pub(super) fn lock_whole(file: &File, kind: libc::c_int) -> bool {
    let whole = libc::flock {
        l_type: kind.try_into().unwrap_or_default(),
        l_whence: libc::SEEK_SET.try_into().unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `whole` is a valid, initialised lock that outlives the
    // call.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) == 0 }
}

pub(super) fn lock_store(store: &Path) -> Result<File> {
    let path = store.join(LOCK_NAME);
    let opened = File::options().create(true).truncate(false).write(true).open(&path);
    let file = opened.map_err(Error::store(format!("opening {}", path.display())))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(_) => Err(Error::Locked(format!(
            "the store {} is open in another process; use that one, or stop it",
            store.display()
        ))),
    }
}

pub(super) fn default_buffer_dir() -> Option<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let candidates = runtime.into_iter().chain(std::iter::once(PathBuf::from("/dev/shm")));
    candidates.into_iter().find(|dir| is_memory(dir) && is_writable(dir))
}

/// True if the directory lies on a filesystem that is in memory and outlives the process.
pub(super) fn is_memory(dir: &Path) -> bool {
    /// `TMPFS_MAGIC` and `RAMFS_MAGIC`, statfs(2).
    const MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
    let kind = rustix::fs::statfs(dir).map(|s| u64::try_from(s.f_type).unwrap_or(0));
    kind.is_ok_and(|kind| MEMORY.contains(&kind))
}

pub(super) fn is_writable(dir: &Path) -> bool {
    rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_ok()
}

pub(super) fn hex(uuid: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(uuid))
}

pub(super) fn random_uuid() -> Result<[u8; 16]> {
    use std::io::Read;
    let mut uuid = [0; 16];
    let read = File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut uuid));
    read.map_err(Error::store("reading random bytes"))?;
    // Version 4, variant 1: RFC 9562, section 5.4.
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}

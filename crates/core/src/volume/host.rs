//! What the engine asks of the machine: disks, locks, the boot, and memory that outlives the process.
//!
//! [`System`] is the operating system, if need be with something between the engine and its devices;
//! the simulation is a machine of its own.

use crate::buffer::{Arena, ArenaSize, BufferIdentity, LeftBuffer, note_replaying, read_left};
use crate::error::{Error, Result};
use crate::journal::OriginIdentity;
use crate::storage::{Directory, FileDirectory, FileStorage, OpenOptions, Storage};
use rustix::fs::FlockOperation;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const LOCK_NAME: &str = "lock";

/// Something that is given back when it is dropped.
pub type Held = Box<dyn Send>;

/// The disk that is served.
pub trait OriginDevice: Send + Sync {
    /// Its bytes.
    fn storage(&self) -> Arc<dyn Storage>;
    /// What tells it from other disks now.
    fn identify(&self) -> io::Result<OriginIdentity>;
    /// Bytes it still needs of the filesystem that `store` is on: the holes of a sparse file there.
    fn needs_beside(&self, _store: &Path) -> io::Result<u64> {
        Ok(0)
    }
    /// Let others have it, though views may keep it open.
    fn release(&self);
}

/// The machine under a volume.
pub trait Host: Send + Sync {
    /// The boot of the kernel: memory does not outlive it.
    fn boot_id(&self) -> Result<[u8; 16]>;
    /// Sixteen random bytes.
    fn random(&self) -> Result<[u8; 16]>;
    /// A directory of files.
    fn directory(&self, path: &Path) -> Arc<dyn Directory>;
    /// Make a directory and its parents.
    fn make_directory(&self, path: &Path) -> io::Result<()>;
    /// Keep other processes out of a store.
    fn lock_store(&self, store: &Path) -> Result<Held>;
    /// Keep out whoever opens a store, for a moment: to ask it something while nobody has it open.
    /// Whoever opens it meanwhile waits. An error as of [`Self::lock_store`].
    fn lock_to_ask(&self, store: &Path) -> Result<Held> {
        self.lock_store(store)
    }
    /// Open the served disk, and keep others from writing to it.
    fn open_origin(&self, path: &Path, direct: bool) -> Result<Arc<dyn OriginDevice>>;
    /// The one name of a path.
    fn canonical(&self, path: &Path) -> io::Result<PathBuf>;
    /// A place in memory that outlives the process, if there is one.
    fn default_buffer_dir(&self) -> Option<PathBuf>;
    /// A new write buffer there.
    fn new_buffer(
        &self,
        path: &Path,
        size: ArenaSize,
        identity: &BufferIdentity,
    ) -> io::Result<Arc<Arena>>;
    /// The write buffer that a killed process left; its version if that is newer than ours.
    fn left_buffer(&self, path: &Path) -> io::Result<Option<std::result::Result<LeftBuffer, u32>>>;
    /// When this boot began, if the machine knows: whoever writes later is not of an earlier one.
    fn booted_unix_ns(&self) -> Option<u64> {
        None
    }
    /// Note there that somebody works on it.
    fn note_replaying(&self, path: &Path, unix_ns: u64) -> io::Result<()>;
}

/// Puts a device between the engine and one of its own.
pub type ThroughStorage = Box<dyn Fn(Arc<dyn Storage>) -> Arc<dyn Storage> + Send + Sync>;
/// Puts a directory between the engine and the one at a path.
pub type ThroughDirectory =
    Box<dyn Fn(&Path, Arc<dyn Directory>) -> Arc<dyn Directory> + Send + Sync>;

/// The operating system.
#[derive(Default)]
pub struct System {
    between: Option<(ThroughStorage, ThroughDirectory)>,
}

impl System {
    /// With something before the origin and the store's directories: tests put faults there.
    pub fn through(origin: ThroughStorage, directory: ThroughDirectory) -> Self {
        Self { between: Some((origin, directory)) }
    }
}

struct SystemOrigin {
    file: Arc<FileStorage>,
    /// As the engine reads and writes it.
    storage: Arc<dyn Storage>,
}

impl OriginDevice for SystemOrigin {
    fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.storage)
    }

    fn identify(&self) -> io::Result<OriginIdentity> {
        identify(self.file.file())
    }

    fn needs_beside(&self, store: &Path) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        let meta = self.file.file().metadata()?;
        let is_beside = meta.is_file() && meta.dev() == std::fs::metadata(store)?.dev();
        Ok(if is_beside { meta.len().saturating_sub(meta.blocks() * 512) } else { 0 })
    }

    fn release(&self) {
        lock_whole(self.file.file(), libc::F_UNLCK);
    }
}

impl Host for System {
    fn boot_id(&self) -> Result<[u8; 16]> {
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

    fn booted_unix_ns(&self) -> Option<u64> {
        // In whole seconds, and corrected as the clock is.
        const SLACK_S: u64 = 5;
        let text = std::fs::read_to_string("/proc/stat").ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("btime "))?;
        let seconds = line.trim().parse::<u64>().ok()?;
        Some((seconds + SLACK_S) * 1_000_000_000)
    }

    fn random(&self) -> Result<[u8; 16]> {
        use std::io::Read;
        let mut bytes = [0; 16];
        let read = File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
        read.map_err(Error::store("reading random bytes"))?;
        Ok(bytes)
    }

    fn directory(&self, path: &Path) -> Arc<dyn Directory> {
        let directory: Arc<dyn Directory> = Arc::new(FileDirectory::new(path));
        match &self.between {
            Some((_, through)) => through(path, directory),
            None => directory,
        }
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)
    }

    fn lock_store(&self, store: &Path) -> Result<Held> {
        match try_lock(store) {
            Err(Error::Locked(_)) => {}
            other => return Ok(Box::new(other?)),
        }
        // Somebody who only asks has it for a moment; nobody else has the directory.
        let _nobody_asks = lock_directory(store)?;
        Ok(Box::new(try_lock(store)?))
    }

    fn lock_to_ask(&self, store: &Path) -> Result<Held> {
        let asking = lock_directory(store)?;
        Ok(Box::new((try_lock(store)?, asking)))
    }

    fn open_origin(&self, path: &Path, direct: bool) -> Result<Arc<dyn OriginDevice>> {
        let opened = FileStorage::open(path, OpenOptions { direct, read_only: false });
        let file = opened.map_err(Error::origin(format!("opening {}", path.display())))?;
        lock_origin(file.file(), path)?;
        let file = Arc::new(file);
        let plain: Arc<dyn Storage> = Arc::clone(&file) as Arc<dyn Storage>;
        let storage = match &self.between {
            Some((through, _)) => through(plain),
            None => plain,
        };
        Ok(Arc::new(SystemOrigin { file, storage }))
    }

    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        std::fs::canonicalize(path)
    }

    fn default_buffer_dir(&self) -> Option<PathBuf> {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let candidates = runtime.into_iter().chain(std::iter::once(PathBuf::from("/dev/shm")));
        candidates.into_iter().find(|dir| is_memory(dir) && is_writable(dir))
    }

    fn new_buffer(
        &self,
        path: &Path,
        size: ArenaSize,
        identity: &BufferIdentity,
    ) -> io::Result<Arc<Arena>> {
        Ok(Arc::new(Arena::shared(path, size, identity)?))
    }

    fn left_buffer(&self, path: &Path) -> io::Result<Option<std::result::Result<LeftBuffer, u32>>> {
        read_left(path)
    }

    fn note_replaying(&self, path: &Path, unix_ns: u64) -> io::Result<()> {
        note_replaying(path, unix_ns)
    }
}

pub(super) fn path_of(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

pub(super) fn bytes_of(path: &Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes().to_vec()
}

/// What tells the origin from other disks now.
pub(super) fn identify(file: &File) -> io::Result<OriginIdentity> {
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

/// The lock of whoever has a store open.
fn try_lock(store: &Path) -> Result<File> {
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

/// Wait for the lock of whoever asks a store that nobody has open.
fn lock_directory(store: &Path) -> Result<File> {
    let failed = || Error::store(format!("locking {}", store.display()));
    let directory = File::open(store).map_err(failed())?;
    let locked = rustix::fs::flock(&directory, FlockOperation::LockExclusive);
    locked.map_err(|error| failed()(error.into()))?;
    Ok(directory)
}

/// Others must not write to the origin: QEMU and ourselves respect a lock of the whole file.
fn lock_origin(file: &File, path: &Path) -> Result<()> {
    if lock_whole(file, libc::F_WRLCK) {
        return Ok(());
    }
    Err(Error::Locked(format!(
        "{} is in use by another process; stop it, then try again",
        path.display()
    )))
}

/// An open file description lock: it belongs to the opening, not to the process, fcntl(2).
fn lock_whole(file: &File, kind: libc::c_int) -> bool {
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

/// True if the directory lies on a filesystem that is in memory and outlives the process.
fn is_memory(dir: &Path) -> bool {
    /// `TMPFS_MAGIC` and `RAMFS_MAGIC`, statfs(2).
    const MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
    let kind = rustix::fs::statfs(dir).map(|s| u64::try_from(s.f_type).unwrap_or(0));
    kind.is_ok_and(|kind| MEMORY.contains(&kind))
}

fn is_writable(dir: &Path) -> bool {
    rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_ok()
}

pub(super) fn hex(uuid: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(uuid))
}

/// A new identity: version 4, variant 1 of RFC 9562, section 5.4.
pub(super) fn random_uuid(host: &dyn Host) -> Result<[u8; 16]> {
    let mut uuid = host.random()?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}

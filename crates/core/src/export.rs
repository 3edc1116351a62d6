//! What a server needs of a disk: the one interface between the NBD session and a volume or a view.

/// Why a request failed; the session maps each to the one NBD error number that fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// The device or the store failed to read or write.
    #[error("input/output error")]
    Io,
    /// The export cannot be written.
    #[error("read-only export")]
    ReadOnly,
    /// The request is outside the export, unaligned, or otherwise not allowed.
    #[error("invalid request")]
    Invalid,
    /// No room left on the device.
    #[error("no space left on device")]
    NoSpace,
    /// Only for zeroing with [`ZeroRequest::fast_only`]: it would not be faster than writing.
    #[error("not supported")]
    NotSupported,
    /// The server or the export is stopping.
    #[error("shutting down")]
    ShuttingDown,
}

/// Block sizes told to clients, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Smallest aligned request the export accepts; a power of two, 1 if any byte range is
    /// accepted.
    pub minimum: u32,
    /// The size that costs least; a power of two.
    pub preferred: u32,
    /// Largest payload of one request.
    pub maximum: u32,
}

/// How a range is to be zeroed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroRequest {
    /// The range may become a hole (the client did not say `NO_HOLE`).
    pub may_punch: bool,
    /// Answer only when the zeroes are on stable storage.
    pub fua: bool,
    /// Fail with [`ExportError::NotSupported`], having changed nothing, unless faster than writing
    /// zeroes.
    pub fast_only: bool,
}

/// A half-open byte range `[start, end)` with the flags of one metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Flags, as the context defines them.
    pub flags: u32,
}

/// `base:allocation`: the range is not allocated.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: the range reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// A disk that a server can hand out: a live volume, a snapshot's view, a clone.
///
/// Ranges were checked against [`Export::size_bytes`] and for read-only by the caller. All methods
/// block the calling thread for as long as the device takes and may be called from many threads at
/// once. Requests in flight at the same time are not ordered against each other, as on any disk.
pub trait Export: Send + Sync {
    /// Size in bytes; constant while a client is connected.
    fn size_bytes(&self) -> u64;

    /// True if every writing method fails with [`ExportError::ReadOnly`].
    fn is_read_only(&self) -> bool;

    /// Block sizes to announce.
    fn block_sizes(&self) -> BlockSizes;

    /// One line for people, shown by `nbdinfo --list`.
    fn description(&self) -> String;

    /// Fill `buffer` from `offset_bytes` if that needs no waiting for a device; `Ok(false)` if it
    /// does, and then the content of `buffer` is undefined and the caller goes on with
    /// [`Export::read`] on another thread.
    fn try_read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool, ExportError>;

    /// Fill `buffer` from `offset_bytes`.
    fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), ExportError>;

    /// Write `data` at `offset_bytes`; with `fua` return only when it is on stable storage.
    fn write(&self, offset_bytes: u64, data: &[u8], fua: bool) -> Result<(), ExportError>;

    /// As [`Export::write`] unless that would have to wait for something other than a device, such
    /// as room in a full store; `Ok(false)` if it would, and then it is to be done again, whole, on
    /// another thread.
    fn try_write(&self, offset_bytes: u64, data: &[u8]) -> Result<bool, ExportError> {
        self.write(offset_bytes, data, false).map(|()| true)
    }

    /// True if changes may wait for long, for something other than a device.
    fn may_hold(&self) -> bool {
        false
    }

    /// Let changes fail that wait for something other than a device: the export is to end.
    fn end_holding(&self) {}

    /// Make the range read as zeroes. The range may be far larger than any buffer.
    fn write_zeroes(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
        how: ZeroRequest,
    ) -> Result<(), ExportError>;

    /// The content of the range is no longer needed; a hint.
    fn trim(&self, offset_bytes: u64, length_bytes: u64, fua: bool) -> Result<(), ExportError>;

    /// Return when every write that was answered before this call is on stable storage.
    fn flush(&self) -> Result<(), ExportError>;

    /// Bring the range into the cache; a hint.
    fn cache(&self, offset_bytes: u64, length_bytes: u64) -> Result<(), ExportError>;

    /// Names of the metadata contexts offered besides `base:allocation`, such as
    /// `x-stillblock:selected`.
    fn contexts(&self) -> Vec<String>;

    /// Status of the range in one context (`base:allocation` or one of [`Export::contexts`]):
    /// consecutive extents that start at `offset_bytes`, at most `extents_max` of them, ending at
    /// or before the end of the range; never empty for a non-empty range. Neighbours with equal
    /// flags are merged.
    fn block_status(
        &self,
        context: &str,
        offset_bytes: u64,
        length_bytes: u64,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>, ExportError>;
}

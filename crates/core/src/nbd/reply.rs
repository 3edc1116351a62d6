//! Replies of the transmission phase as bytes, in the three styles a client may have agreed on.

use super::wire::{self, ErrorNumber, chunk};
use crate::export::{ExportError, StatusExtent};

/// A growing buffer whose bytes stay initialised, so that a read can fill it in place and reuse
/// costs nothing.
#[derive(Debug, Default)]
pub struct Output {
    /// Initialised up to its length; the content is `bytes[..end]`.
    bytes: Vec<u8>,
    end: usize,
}

impl Output {
    /// What a buffer may keep when it is emptied; above, the memory goes back. A few large requests
    /// stay fast, and a client that once asked for 32 MiB does not hold them for its lifetime.
    const KEPT_BYTES_MAX: usize = 4 << 20;

    /// Number of bytes written.
    pub fn len(&self) -> usize {
        self.end
    }

    /// True if nothing is written.
    pub fn is_empty(&self) -> bool {
        self.end == 0
    }

    /// What was written.
    pub fn written(&self) -> &[u8] {
        &self.bytes[..self.end]
    }

    /// Forget what was written after the first `length` bytes.
    pub fn truncate(&mut self, length: usize) {
        self.end = self.end.min(length);
    }

    /// Forget everything, and give memory back if it is much.
    pub fn clear(&mut self) {
        self.end = 0;
        if self.bytes.len() > Self::KEPT_BYTES_MAX {
            self.bytes = Vec::new();
        }
    }

    /// Add `count` bytes of unspecified content, to be overwritten by the caller.
    pub fn extend_for(&mut self, count: usize) -> &mut [u8] {
        let start = self.end;
        self.end += count;
        if self.bytes.len() < self.end {
            self.bytes.resize(self.end.next_power_of_two(), 0);
        }
        &mut self.bytes[start..self.end]
    }

    /// Add bytes.
    pub fn put(&mut self, bytes: &[u8]) {
        self.extend_for(bytes.len()).copy_from_slice(bytes);
    }

    /// Add a 16-bit number.
    pub fn put_u16(&mut self, value: u16) {
        self.put(&value.to_be_bytes());
    }

    /// Add a 32-bit number.
    pub fn put_u32(&mut self, value: u32) {
        self.put(&value.to_be_bytes());
    }

    /// Add a 64-bit number.
    pub fn put_u64(&mut self, value: u64) {
        self.put(&value.to_be_bytes());
    }
}

/// Why a request gets an error, with a sentence for people (sent where the style has room for it).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The number sent.
    pub number: ErrorNumber,
    /// At most 4096 bytes; a constant, so that nothing a client sent can come back in it.
    pub message: &'static str,
}

impl Refusal {
    /// A refusal.
    pub const fn new(number: ErrorNumber, message: &'static str) -> Self {
        Self { number, message }
    }
}

impl From<ExportError> for Refusal {
    fn from(error: ExportError) -> Self {
        match error {
            ExportError::Io => Self::new(ErrorNumber::Eio, "the disk or its store failed"),
            ExportError::ReadOnly => Self::new(ErrorNumber::Eperm, "the export is read-only"),
            ExportError::Invalid => {
                Self::new(ErrorNumber::Einval, "the export refused the request")
            }
            ExportError::NoSpace => Self::new(ErrorNumber::Enospc, "no space left"),
            ExportError::NotSupported => {
                Self::new(ErrorNumber::Enotsup, "zeroing would not be faster than writing")
            }
            ExportError::ShuttingDown => {
                Self::new(ErrorNumber::Eshutdown, "the export is stopping")
            }
        }
    }
}

/// What a reply repeats of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyHead {
    /// Chosen by the client, opaque.
    pub cookie: u64,
    /// The request's offset; extended replies repeat it.
    pub offset: u64,
}

/// How replies look on this connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReplyStyle {
    /// 16-byte replies, read data after them.
    #[default]
    Simple,
    /// Chunks for reads, status and errors; simple replies for the rest.
    Structured,
    /// 32-byte chunks for everything.
    Extended,
}

/// A descriptor of a compact status chunk must be below 2^32; this is the last multiple of every
/// block size allowed (64 KiB at most), so that a split never falls into a block.
const STATUS_BYTES_MAX: u64 = 0xffff_0000;

impl ReplyStyle {
    /// True if replies come in chunks.
    pub fn is_chunked(self) -> bool {
        self != Self::Simple
    }

    /// Success without data.
    pub fn put_done(self, out: &mut Output, head: ReplyHead) {
        match self {
            Self::Simple | Self::Structured => put_simple(out, head, 0),
            Self::Extended => {
                self.put_chunk_header(out, head, wire::CHUNK_FLAG_DONE, chunk::NONE, 0);
            }
        }
    }

    /// An error; also right for reads.
    pub fn put_error(self, out: &mut Output, head: ReplyHead, refusal: Refusal) {
        let number = refusal.number.number();
        if self == Self::Simple {
            put_simple(out, head, number);
            return;
        }
        let message = refusal.message.as_bytes();
        let message_bytes = u16::try_from(message.len()).expect("messages are short constants");
        let payload_bytes = 6 + u32::from(message_bytes);
        self.put_chunk_header(out, head, wire::CHUNK_FLAG_DONE, chunk::ERROR, payload_bytes);
        out.put_u32(number);
        out.put_u16(message_bytes);
        out.put(message);
    }

    /// Start the successful reply of a read; returns the place for the data. If the read fails,
    /// truncate.
    pub fn begin_read(self, out: &mut Output, head: ReplyHead, length_bytes: u32) -> &mut [u8] {
        if self == Self::Simple {
            put_simple(out, head, 0);
        } else if length_bytes == 0 {
            // A content chunk must describe at least one byte.
            self.put_chunk_header(out, head, wire::CHUNK_FLAG_DONE, chunk::NONE, 0);
        } else {
            let payload_bytes = length_bytes + 8;
            let flag = wire::CHUNK_FLAG_DONE;
            self.put_chunk_header(out, head, flag, chunk::OFFSET_DATA, payload_bytes);
            out.put_u64(head.offset);
        }
        out.extend_for(usize::try_from(length_bytes).expect("usize has at least 32 bits"))
    }

    /// End the reply which [`Self::begin_read`] started at `start` and which was filled since:
    /// zeroes go as a hole if the client takes holes. Looking costs nothing for data (it ends at
    /// the first byte that differs) and far less for zeroes than sending them.
    pub fn end_read(
        self,
        out: &mut Output,
        start: usize,
        head: ReplyHead,
        length_bytes: u32,
        may_be_hole: bool,
    ) {
        if self == Self::Simple || !may_be_hole || length_bytes == 0 {
            return;
        }
        let data_bytes = usize::try_from(length_bytes).expect("usize has at least 32 bits");
        if !is_zero(&out.written()[out.len() - data_bytes..]) {
            return;
        }
        out.truncate(start);
        self.put_chunk_header(out, head, wire::CHUNK_FLAG_DONE, chunk::OFFSET_HOLE, 12);
        out.put_u64(head.offset);
        out.put_u32(length_bytes);
    }

    /// The status of one context; `is_last` if no other context follows. `extents` are consecutive
    /// and not empty.
    pub fn put_status(
        self,
        out: &mut Output,
        head: ReplyHead,
        context_id: u32,
        extents: &[StatusExtent],
        is_last: bool,
        is_one: bool,
    ) {
        let flag = if is_last { wire::CHUNK_FLAG_DONE } else { 0 };
        let start = out.len();
        if self == Self::Extended {
            let count = u32::try_from(extents.len()).expect("the server asks for fewer than 2^17");
            let payload_bytes = 8 + 16 * count;
            self.put_chunk_header(out, head, flag, chunk::BLOCK_STATUS_EXT, payload_bytes);
            out.put_u32(context_id);
            out.put_u32(count);
            for extent in extents {
                out.put_u64(extent.end - extent.start);
                out.put_u64(u64::from(extent.flags));
            }
            return;
        }
        let mut payload_bytes = 4;
        self.put_chunk_header(out, head, flag, chunk::BLOCK_STATUS, payload_bytes);
        out.put_u32(context_id);
        for extent in extents {
            let mut left = extent.end - extent.start;
            while left > 0 {
                let piece = left.min(STATUS_BYTES_MAX);
                out.put_u32(u32::try_from(piece).expect("clamped above"));
                out.put_u32(extent.flags);
                payload_bytes += 8;
                left -= piece;
                if is_one {
                    break;
                }
            }
        }
        // The number of descriptors is known only now: the length is the last field of the 20-byte
        // header.
        out.bytes[start + 16..start + 20].copy_from_slice(&payload_bytes.to_be_bytes());
    }

    fn put_chunk_header(
        self,
        out: &mut Output,
        head: ReplyHead,
        flags: u16,
        kind: u16,
        payload_bytes: u32,
    ) {
        if self == Self::Extended {
            let mut header = [0; 32];
            header[..4].copy_from_slice(&wire::MAGIC_REPLY_EXTENDED.to_be_bytes());
            header[4..6].copy_from_slice(&flags.to_be_bytes());
            header[6..8].copy_from_slice(&kind.to_be_bytes());
            header[8..16].copy_from_slice(&head.cookie.to_be_bytes());
            header[16..24].copy_from_slice(&head.offset.to_be_bytes());
            header[24..].copy_from_slice(&u64::from(payload_bytes).to_be_bytes());
            out.put(&header);
        } else {
            let mut header = [0; 20];
            header[..4].copy_from_slice(&wire::MAGIC_REPLY_STRUCTURED.to_be_bytes());
            header[4..6].copy_from_slice(&flags.to_be_bytes());
            header[6..8].copy_from_slice(&kind.to_be_bytes());
            header[8..16].copy_from_slice(&head.cookie.to_be_bytes());
            header[16..].copy_from_slice(&payload_bytes.to_be_bytes());
            out.put(&header);
        }
    }
}

fn put_simple(out: &mut Output, head: ReplyHead, error: u32) {
    let mut reply = [0; 16];
    reply[..4].copy_from_slice(&wire::MAGIC_REPLY_SIMPLE.to_be_bytes());
    reply[4..8].copy_from_slice(&error.to_be_bytes());
    reply[8..].copy_from_slice(&head.cookie.to_be_bytes());
    out.put(&reply);
}

/// Compares the bytes with themselves, shifted by one, which the C library does many at a time.
fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && *rest == bytes[..bytes.len() - 1],
    }
}

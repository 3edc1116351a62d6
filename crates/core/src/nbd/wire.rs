//! Numbers of the NBD protocol and the cursor that reads them: no state, no decisions.
//!
//! Every number is big-endian on the wire. Names follow the protocol text with the `NBD_` prefix
//! left out.

/// First eight bytes of the greeting.
pub const MAGIC_GREETING: u64 = 0x4e42_444d_4147_4943;
/// Announces newstyle, and starts each option of the client.
pub const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
/// Starts each reply to an option.
pub const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Starts a compact request.
pub const MAGIC_REQUEST: u32 = 0x2560_9513;
/// Starts an extended request.
pub const MAGIC_REQUEST_EXTENDED: u32 = 0x21e4_1c71;
/// Starts a simple reply.
pub const MAGIC_REPLY_SIMPLE: u32 = 0x6744_6698;
/// Starts a structured reply chunk.
pub const MAGIC_REPLY_STRUCTURED: u32 = 0x668e_33ef;
/// Starts an extended reply chunk.
pub const MAGIC_REPLY_EXTENDED: u32 = 0x6e8a_278c;

/// Handshake flags, ours and the client's: the two have the same values.
pub mod handshake_flag {
    /// Unknown options get an answer.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// No 124 zero bytes after the answer to `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the handshake.
pub mod option {
    #![allow(missing_docs)] // named as in the protocol text, where they are described
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options.
pub mod option_reply {
    #![allow(missing_docs)] // named as in the protocol text, where they are described
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Items of `INFO` and `GO`.
pub mod info {
    #![allow(missing_docs)] // named as in the protocol text, where they are described
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Flags of an export, told at the end of the handshake.
pub mod export_flag {
    #![allow(missing_docs)] // named as in the protocol text, where they are described
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Request types.
pub mod command {
    #![allow(missing_docs)] // named as in the protocol text, where they are described
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub mod command_flag {
    #![allow(missing_docs)] // named as in the protocol text, where they are described
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// The one flag of a reply chunk: it is the last of its reply.
pub const CHUNK_FLAG_DONE: u16 = 1;

/// Types of reply chunks.
pub mod chunk {
    #![allow(missing_docs)] // named as in the protocol text, where they are described
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// Error numbers of replies. `ENOMEM` is never sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)] // named as in the protocol text, where they are described
pub enum ErrorNumber {
    Eperm = 1,
    Eio = 5,
    Einval = 22,
    Enospc = 28,
    Eoverflow = 75,
    Enotsup = 95,
    Eshutdown = 108,
}

impl ErrorNumber {
    /// The number on the wire.
    pub const fn number(self) -> u32 {
        match self {
            Self::Eperm => 1,
            Self::Eio => 5,
            Self::Einval => 22,
            Self::Enospc => 28,
            Self::Eoverflow => 75,
            Self::Enotsup => 95,
            Self::Eshutdown => 108,
        }
    }
}

/// The longest string the protocol allows.
pub const STRING_BYTES_MAX: usize = 4096;
/// Magic, option, data length.
pub const OPTION_HEADER_BYTES: usize = 16;
/// A compact request without payload.
pub const REQUEST_BYTES: usize = 28;
/// An extended request without payload.
pub const REQUEST_EXTENDED_BYTES: usize = 32;

/// Takes big-endian numbers and strings off the front of bytes that came from a peer; never past
/// their end.
#[derive(Debug, Clone, Copy)]
pub struct Cursor<'a>(pub &'a [u8]);

impl<'a> Cursor<'a> {
    /// The next `count` bytes.
    pub fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(front)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*front)
    }

    /// A 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// A 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// A 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its length before it in 32 bits.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        self.take(length)
    }

    /// True if nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

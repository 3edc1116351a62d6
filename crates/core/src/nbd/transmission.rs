//! Requests of the transmission phase: decode, then check completely, once. What passes here keeps
//! every rule that [`crate::export::Export`] asks of its caller.

use super::reply::{Refusal, ReplyHead, ReplyStyle};
use super::wire::{self, Cursor, ErrorNumber, command, command_flag};
use crate::export::{BlockSizes, ZeroRequest};

/// The largest payload we tell clients and accept: what the protocol calls portable. Memory for one
/// request is bounded by it.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// Block sizes as the protocol wants them, whatever the export says.
pub fn told_block_sizes(wanted: BlockSizes) -> BlockSizes {
    let minimum = wanted.minimum.clamp(1, 1 << 16);
    let minimum = if minimum.is_power_of_two() { minimum } else { minimum.next_power_of_two() };
    let preferred = wanted.preferred.clamp(minimum.max(512), 1 << 25);
    let preferred =
        if preferred.is_power_of_two() { preferred } else { preferred.next_power_of_two() };
    let maximum = wanted.maximum.clamp(1 << 20, PAYLOAD_BYTES_MAX).max(preferred);
    BlockSizes { minimum, preferred, maximum }
}

/// What the handshake settled, as far as requests are judged by it.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// How replies look, and which request header is used.
    pub style: ReplyStyle,
    /// Size of the export.
    pub size_bytes: u64,
    /// Writes are refused.
    pub is_read_only: bool,
    /// As told to the client.
    pub block_sizes: BlockSizes,
    /// Number of metadata contexts selected.
    pub context_count: usize,
}

/// A request that keeps all rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// For the reply.
    pub head: ReplyHead,
    /// What to do at `head.offset`.
    pub command: Command,
    /// The data of a write.
    pub payload: &'a [u8],
}

/// What a client wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are those of the export's methods
pub enum Command {
    Read { length_bytes: u32, may_be_hole: bool },
    Write { fua: bool },
    Flush,
    Trim { length_bytes: u64, fua: bool },
    Cache { length_bytes: u64 },
    WriteZeroes { length_bytes: u64, how: ZeroRequest },
    BlockStatus { length_bytes: u64, is_one: bool },
}

/// A request header as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    flags: u16,
    kind: u16,
    /// For the reply.
    pub head: ReplyHead,
    length_bytes: u64,
}

/// What a header turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoded {
    /// Not all of it is there.
    Incomplete,
    /// The peer does not speak the protocol (any more), or means harm: no reply can be sent.
    Breach,
    /// Complete, not yet judged.
    Header(Header),
}

/// Bytes of a request header in this style.
pub fn header_bytes(style: ReplyStyle) -> usize {
    match style {
        ReplyStyle::Simple | ReplyStyle::Structured => wire::REQUEST_BYTES,
        ReplyStyle::Extended => wire::REQUEST_EXTENDED_BYTES,
    }
}

/// Decode a header at the front of `input`.
pub fn decode(style: ReplyStyle, input: &[u8]) -> Decoded {
    let magic = match style {
        ReplyStyle::Simple | ReplyStyle::Structured => wire::MAGIC_REQUEST,
        ReplyStyle::Extended => wire::MAGIC_REQUEST_EXTENDED,
    };
    let mut cursor = Cursor(input);
    if cursor.u32().is_some_and(|found| found != magic) {
        return Decoded::Breach;
    }
    decode_fields(style, cursor).map_or(Decoded::Incomplete, Decoded::Header)
}

fn decode_fields(style: ReplyStyle, mut cursor: Cursor) -> Option<Header> {
    let flags = cursor.u16()?;
    let kind = cursor.u16()?;
    let cookie = cursor.u64()?;
    let offset = cursor.u64()?;
    let length_bytes = match style {
        ReplyStyle::Simple | ReplyStyle::Structured => u64::from(cursor.u32()?),
        ReplyStyle::Extended => cursor.u64()?,
    };
    Some(Header { flags, kind, head: ReplyHead { cookie, offset }, length_bytes })
}

impl Header {
    /// True for the request to close, which has no reply.
    pub fn is_disconnect(&self) -> bool {
        self.kind == command::DISC
    }

    /// Bytes that follow the header; `None` if they are too many to be waited for, and the
    /// connection must end. A compact payload is always taken off the wire, however long: its
    /// length has 32 bits and it is never stored unless it is acceptable. An extended one is not
    /// (the protocol asks for the hard disconnect).
    pub fn payload_bytes(&self, terms: &Terms) -> Option<u64> {
        if terms.style != ReplyStyle::Extended {
            return Some(if self.kind == command::WRITE { self.length_bytes } else { 0 });
        }
        // A write has a payload even if the client forgets to say so, as QEMU does (10.0): data
        // taken for requests would be far worse than leniency.
        if self.flags & command_flag::PAYLOAD_LEN == 0 && self.kind != command::WRITE {
            return Some(0);
        }
        (self.length_bytes <= u64::from(PAYLOAD_BYTES_MAX)).then_some(self.length_bytes)
    }

    /// Judge by everything but the payload's content; `Ok` means that [`Self::request`] may be
    /// built.
    pub fn check(&self, terms: &Terms) -> Result<(), Refusal> {
        self.check_flags(terms)?;
        let is_write = matches!(self.kind, command::WRITE | command::WRITE_ZEROES | command::TRIM);
        if is_write && terms.is_read_only {
            return Err(Refusal::new(ErrorNumber::Eperm, "the export is read-only"));
        }
        if self.kind == command::FLUSH {
            if self.head.offset != 0 || self.length_bytes != 0 {
                return Err(invalid("a flush has neither offset nor length"));
            }
            return Ok(());
        }
        self.check_length(terms)?;
        let is_inside = self
            .head
            .offset
            .checked_add(self.length_bytes)
            .is_some_and(|end| end <= terms.size_bytes);
        if !is_inside {
            let number = match self.kind {
                command::WRITE | command::WRITE_ZEROES => ErrorNumber::Enospc,
                _ => ErrorNumber::Einval,
            };
            return Err(Refusal::new(number, "the request ends past the end of the export"));
        }
        let mask = u64::from(terms.block_sizes.minimum) - 1;
        if (self.head.offset | self.length_bytes) & mask != 0 {
            return Err(invalid("the request is not aligned to the minimum block size"));
        }
        Ok(())
    }

    fn check_flags(&self, terms: &Terms) -> Result<(), Refusal> {
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, PAYLOAD_LEN, REQ_ONE};
        let allowed = match self.kind {
            command::READ if terms.style.is_chunked() => DF,
            command::WRITE if terms.style == ReplyStyle::Extended => PAYLOAD_LEN,
            command::READ | command::WRITE | command::FLUSH | command::TRIM | command::CACHE => 0,
            command::WRITE_ZEROES => NO_HOLE | FAST_ZERO,
            command::BLOCK_STATUS => REQ_ONE,
            _ => return Err(invalid("unknown command")),
        };
        if self.flags & !(allowed | FUA) != 0 {
            return Err(invalid("a flag that this command does not have"));
        }
        Ok(())
    }

    fn check_length(&self, terms: &Terms) -> Result<(), Refusal> {
        let maximum = u64::from(terms.block_sizes.maximum);
        match self.kind {
            command::WRITE if self.length_bytes > maximum => {
                Err(invalid("the payload is larger than the maximum"))
            }
            command::READ if self.length_bytes > maximum => {
                let number = match terms.style {
                    ReplyStyle::Simple => ErrorNumber::Einval,
                    ReplyStyle::Structured | ReplyStyle::Extended => ErrorNumber::Eoverflow,
                };
                Err(Refusal::new(number, "the read is larger than the maximum"))
            }
            command::BLOCK_STATUS if terms.context_count == 0 => {
                Err(invalid("no metadata context is selected"))
            }
            command::BLOCK_STATUS if self.length_bytes == 0 => {
                Err(invalid("the status of no bytes"))
            }
            _ => Ok(()),
        }
    }

    /// The request of a header that passed [`Self::check`], with its payload.
    pub fn request<'a>(&self, payload: &'a [u8]) -> Request<'a> {
        let has = |flag| self.flags & flag != 0;
        let fua = has(command_flag::FUA);
        let length_bytes = self.length_bytes;
        let command = match self.kind {
            command::READ => Command::Read {
                length_bytes: u32::try_from(length_bytes).expect("checked against the maximum"),
                may_be_hole: !has(command_flag::DF),
            },
            command::WRITE => Command::Write { fua },
            command::FLUSH => Command::Flush,
            command::TRIM => Command::Trim { length_bytes, fua },
            command::CACHE => Command::Cache { length_bytes },
            command::WRITE_ZEROES => Command::WriteZeroes {
                length_bytes,
                how: ZeroRequest {
                    may_punch: !has(command_flag::NO_HOLE),
                    fua,
                    fast_only: has(command_flag::FAST_ZERO),
                },
            },
            command::BLOCK_STATUS => {
                Command::BlockStatus { length_bytes, is_one: has(command_flag::REQ_ONE) }
            }
            _ => unreachable!("check() refuses unknown commands"),
        };
        Request { head: self.head, command, payload }
    }
}

const fn invalid(message: &'static str) -> Refusal {
    Refusal::new(ErrorNumber::Einval, message)
}

//! Run one request against its export and write the reply: the same for every thread that does it.

use super::handshake::Agreed;
use super::reply::{Output, Refusal, ReplyHead};
use super::transmission::{Command, Request};
use super::wire::ErrorNumber;
use crate::export::{ExportError, StatusExtent};

/// Extents of one status reply, over all contexts; the client asks again from where it ends.
const STATUS_EXTENTS_MAX: usize = 1 << 16;

/// What a thread that must not wait for a device may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Only what needs no device, for reads, and no room in a full store, for writes.
    None,
    /// As long as it takes.
    AsNeeded,
}

/// Execute and write the reply; false if that would have needed patience, and then nothing was done
/// or written.
pub fn execute(agreed: &Agreed, request: &Request, patience: Patience, out: &mut Output) -> bool {
    let export = agreed.export.as_ref();
    let style = agreed.terms.style;
    let offset = request.head.offset;
    let result = match request.command {
        Command::Read { length_bytes, may_be_hole } => {
            let start = out.len();
            let space = style.begin_read(out, request.head, length_bytes);
            let result = if space.is_empty() {
                Ok(true)
            } else if patience == Patience::None {
                export.try_read(offset, space)
            } else {
                export.read(offset, space).map(|()| true)
            };
            match result {
                Ok(true) => {
                    style.end_read(out, start, request.head, length_bytes, may_be_hole);
                    return true;
                }
                Ok(false) => {
                    out.truncate(start);
                    return false;
                }
                Err(error) => {
                    out.truncate(start);
                    Err(error)
                }
            }
        }
        Command::BlockStatus { length_bytes, is_one } => {
            let start = out.len();
            match block_status(agreed, request, length_bytes, is_one, out) {
                Ok(()) => return true,
                Err(error) => {
                    out.truncate(start);
                    Err(error)
                }
            }
        }
        Command::Write { .. } if request.payload.is_empty() => Ok(()),
        Command::Write { fua: false } if patience == Patience::None => {
            match export.try_write(offset, request.payload) {
                Ok(true) => Ok(()),
                Ok(false) => return false,
                Err(error) => Err(error),
            }
        }
        Command::Write { fua } => export.write(offset, request.payload, fua),
        Command::Flush => export.flush(),
        Command::Trim { length_bytes: 0, .. }
        | Command::Cache { length_bytes: 0 }
        | Command::WriteZeroes { length_bytes: 0, .. } => Ok(()),
        Command::Trim { length_bytes, fua } => export.trim(offset, length_bytes, fua),
        Command::Cache { length_bytes } => export.cache(offset, length_bytes),
        Command::WriteZeroes { length_bytes, how } => {
            export.write_zeroes(offset, length_bytes, how)
        }
    };
    match result {
        Ok(()) => style.put_done(out, request.head),
        Err(error) => style.put_error(out, request.head, refusal(error, request.command)),
    }
    true
}

/// The error number that fits. `ENOTSUP` is only for fast zeroing; from anything else it would be
/// our bug, and a client could do nothing with it.
fn refusal(error: ExportError, command: Command) -> Refusal {
    let is_fast_zero = matches!(command, Command::WriteZeroes { how, .. } if how.fast_only);
    if error == ExportError::NotSupported && !is_fast_zero {
        return Refusal::new(ErrorNumber::Einval, "the export does not support this");
    }
    error.into()
}

fn block_status(
    agreed: &Agreed,
    request: &Request,
    length_bytes: u64,
    is_one: bool,
    out: &mut Output,
) -> Result<(), ExportError> {
    let offset = request.head.offset;
    let count = agreed.contexts.len();
    let extents_max = if is_one { 1 } else { (STATUS_EXTENTS_MAX / count).max(1) };
    for (id, context) in (1..).zip(&agreed.contexts) {
        let mut extents = agreed.export.block_status(context, offset, length_bytes, extents_max)?;
        extents.truncate(extents_max);
        check_extents(offset, length_bytes, &extents)?;
        let is_last = usize::try_from(id).is_ok_and(|id| id == count);
        agreed.terms.style.put_status(out, request.head, id, &extents, is_last, is_one);
    }
    Ok(())
}

/// A wrong answer here could make a client skip data it must copy, so it becomes an error.
fn check_extents(
    offset: u64,
    length_bytes: u64,
    extents: &[StatusExtent],
) -> Result<(), ExportError> {
    let mut position = offset;
    for extent in extents {
        if extent.start != position || extent.end <= extent.start {
            return Err(ExportError::Io);
        }
        position = extent.end;
    }
    if position == offset || position > offset + length_bytes {
        return Err(ExportError::Io);
    }
    Ok(())
}

/// True for requests that a connection's own thread starts whatever else there is to do: reads,
/// which it gives away if they need a device, and plain writes, which an export takes without
/// waiting for one.
pub fn is_quick(request: &Request) -> bool {
    matches!(request.command, Command::Read { .. } | Command::Write { fua: false })
}

/// True for requests that change content, which a full store may hold.
pub fn is_change(request: &Request) -> bool {
    matches!(request.command, Command::Write { .. } | Command::WriteZeroes { .. })
}

/// A request that owns its payload, to be run elsewhere.
#[derive(Debug)]
pub struct OwnedRequest {
    head: ReplyHead,
    command: Command,
    payload: Vec<u8>,
}

impl OwnedRequest {
    /// Copy the request.
    pub fn new(request: &Request) -> Self {
        Self { head: request.head, command: request.command, payload: request.payload.to_vec() }
    }

    /// The request.
    pub fn request(&self) -> Request<'_> {
        Request { head: self.head, command: self.command, payload: &self.payload }
    }
}

/// Memory a request needs from when it is given away until its reply is sent.
pub fn memory_bytes(request: &Request) -> usize {
    let reply_bytes = match request.command {
        Command::Read { length_bytes, .. } => {
            usize::try_from(length_bytes).expect("usize has at least 32 bits")
        }
        _ => 0,
    };
    request.payload.len() + reply_bytes
}

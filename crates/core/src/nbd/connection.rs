//! The thread of one connection: reads as much as the socket gives, runs all of it, answers with
//! one write.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::execute::{OwnedRequest, Patience, execute, is_change, is_quick, memory_bytes};
use super::handshake::{Agreed, Directory};
use super::link::{Broken, Link};
use super::pool::{Job, Pool};
use super::reply::Output;
use super::server::Host;
use super::session::{Session, Step};
use super::socket::Socket;
use super::transmission::Request;

/// Replies are sent when the input is used up, or when there are this many bytes of them.
const REPLY_BYTES_MAX: usize = 256 << 10;
/// What a connection reads at once; more than a Unix socket holds by default.
const INBOX_BYTES: usize = 256 << 10;
/// A larger inbox, grown for a large payload, is kept for the next one up to this.
const INBOX_KEPT_BYTES_MAX: usize = 4 << 20;
/// If at least this much of a payload is missing, nothing after it is read along, and so nothing
/// has to be moved.
const EXACT_READ_BYTES_MIN: usize = 64 << 10;
/// An incomplete message up to this long is moved to the front, to have room for a large read.
const MOVED_BYTES_MAX: usize = 4 << 10;

/// Serve until the client goes, the server stops or the connection fails. Returns when nothing is
/// in flight.
pub fn serve(link: &Arc<Link>, host: &Host, handshake_timeout: Duration) {
    let mut connection = Connection::new(link, host, Instant::now() + handshake_timeout);
    // However it ends, the socket is closed next, so there is nobody to tell why.
    let _ = connection.run();
    link.wait_idle();
}

enum Flow {
    GoOn,
    End,
}

struct Connection<'a> {
    link: &'a Arc<Link>,
    host: &'a Host,
    session: Session,
    inbox: Inbox,
    out: Output,
    /// What the handshake settled, and the workers; shared with jobs.
    attached: Option<(Arc<Agreed>, Pool)>,
    handshake_deadline: Instant,
}

impl<'a> Connection<'a> {
    fn new(link: &'a Arc<Link>, host: &'a Host, handshake_deadline: Instant) -> Self {
        let mut out = Output::default();
        let session = Session::new(&mut out);
        let inbox = Inbox::default();
        Self { link, host, session, inbox, out, attached: None, handshake_deadline }
    }

    fn run(&mut self) -> Result<(), Broken> {
        loop {
            self.flush()?;
            if self.host.is_stopping() || !self.receive() {
                return Ok(());
            }
            while let Some(flow) = self.take_message()? {
                if matches!(flow, Flow::End) {
                    return self.flush();
                }
            }
        }
    }

    fn flush(&mut self) -> Result<(), Broken> {
        let result = self.link.send(self.out.written());
        self.out.clear();
        result
    }

    /// Wait for bytes; false if none will come.
    fn receive(&mut self) -> bool {
        if self.attached.is_none() {
            let left = self.handshake_deadline.saturating_duration_since(Instant::now());
            let is_late = left.is_zero();
            if is_late || self.link.socket().set_receive_timeout(Some(left)).is_err() {
                return false;
            }
        }
        self.inbox.receive(self.link.socket())
    }

    /// Deal with the next message of the inbox; `None` if it is not complete.
    fn take_message(&mut self) -> Result<Option<Flow>, Broken> {
        let input = self.inbox.pending();
        let consumed = match self.session.advance(input, self.host, &mut self.out) {
            Step::Need(bytes) => {
                self.inbox.needed = bytes;
                return Ok(None);
            }
            Step::Continue(consumed) => consumed,
            Step::Enter(consumed) => {
                self.enter();
                consumed
            }
            Step::Request(consumed, request) => {
                let is_last = !is_quick(&request) && !self.session.has_complete(&input[consumed..]);
                let (agreed, pool) = self.attached.as_ref().expect("requests come after Enter");
                run_request(self.link, agreed, pool, &request, is_last, &mut self.out)?;
                consumed
            }
            Step::Disconnect | Step::Close => return Ok(Some(Flow::End)),
        };
        self.inbox.consume(consumed);
        if self.out.len() >= REPLY_BYTES_MAX {
            self.flush()?;
        }
        Ok(Some(Flow::GoOn))
    }

    fn enter(&mut self) {
        let agreed = self.session.agreed().expect("the session entered").clone();
        let pool = self.host.pool().expect("agreeing attaches the connection");
        self.attached = Some((Arc::new(agreed), pool));
        // Without it the connection would only end when idle for some seconds.
        let _ = self.link.socket().set_receive_timeout(None);
    }
}

/// Run it here if that keeps nothing else waiting, else give it away.
fn run_request(
    link: &Arc<Link>,
    agreed: &Arc<Agreed>,
    pool: &Pool,
    request: &Request,
    is_last: bool,
    out: &mut Output,
) -> Result<(), Broken> {
    let may_hold = is_change(request) && agreed.export.may_hold();
    if is_quick(request) {
        if execute(agreed, request, Patience::None, out) {
            return Ok(());
        }
    } else if is_last && link.is_idle() && !may_hold {
        // The only one: two thread switches would be all that a worker adds.
        link.send(out.written())?;
        out.clear();
        execute(agreed, request, Patience::AsNeeded, out);
        return Ok(());
    }
    let bytes = memory_bytes(request);
    let charge = if let Some(charge) = link.try_admit(bytes) {
        charge
    } else {
        link.send(out.written())?;
        out.clear();
        link.admit(bytes)
    };
    let request = OwnedRequest::new(request);
    let job = Job { agreed: Arc::clone(agreed), request, link: Arc::clone(link), charge };
    if may_hold {
        pool.submit_held(job);
    } else {
        pool.submit(job);
    }
    Ok(())
}

/// What was received and not yet consumed: `bytes[start..end]`.
#[derive(Default)]
struct Inbox {
    /// Initialised throughout.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// Length of the message at the front, as far as it is known.
    needed: usize,
}

impl Inbox {
    fn pending(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
        self.needed = 0;
    }

    /// Wait for bytes; false at the end of the stream, or if it failed.
    fn receive(&mut self, socket: &Socket) -> bool {
        let missing = self.make_room();
        let mut room = &mut self.bytes[self.end..];
        if missing >= EXACT_READ_BYTES_MIN && room.len() > missing {
            room = &mut room[..missing];
        }
        match socket.receive(room) {
            Ok(0) | Err(_) => false,
            Ok(count) => {
                self.end += count;
                true
            }
        }
    }

    /// Make room behind `end`; returns how much is missing of the message at the front. Memory
    /// grows only when what there is has been filled, never because a length was announced.
    fn make_room(&mut self) -> usize {
        let pending = self.end - self.start;
        if pending == 0 {
            self.start = 0;
            self.end = 0;
            if self.bytes.len() > INBOX_KEPT_BYTES_MAX {
                self.bytes = Vec::new();
            }
        }
        if self.bytes.is_empty() {
            self.bytes.resize(INBOX_BYTES, 0);
        }
        let does_fit = self.start + self.needed <= self.bytes.len() && self.end < self.bytes.len();
        if self.start > 0 && (pending <= MOVED_BYTES_MAX || !does_fit) {
            self.bytes.copy_within(self.start..self.end, 0);
            self.start = 0;
            self.end = pending;
        }
        if self.end == self.bytes.len() {
            let grown = self.needed.min(2 * self.bytes.len()).max(self.bytes.len() + 1);
            self.bytes.resize(grown, 0);
        }
        self.needed.saturating_sub(pending)
    }
}

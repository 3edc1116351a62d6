//! What the threads that work for one connection share: its sending side, and the count of what is
//! in flight.
//!
//! One thread at a time sends, and holds no lock while it does. A worker never waits for a client:
//! what the socket does not take at once is left to whoever is sending, or to a thread made for it.
//! So a client that does not read its replies holds up nobody but itself.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::reply::Output;
use super::socket::Socket;

/// Requests of one connection that are with workers or whose replies wait to be sent; then its
/// socket is not read. Clients keep 16 to 64 in flight.
pub const REQUESTS_IN_FLIGHT_MAX: usize = 128;
/// Memory of those. One request needs at most 32 MiB, so two of the largest fit.
pub const BYTES_IN_FLIGHT_MAX: usize = 64 << 20;

/// The shared part of a connection.
pub struct Link {
    socket: Arc<Socket>,
    /// Never held while sending or while calling an export.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    requests: usize,
    bytes: usize,
    is_sending: bool,
    is_broken: bool,
    backlog: VecDeque<Parcel>,
}

/// A reply that waits to be sent.
struct Parcel {
    reply: Output,
    sent: usize,
    charge: Charge,
}

/// A request in flight; dropped when its reply was sent or given up.
pub struct Charge {
    link: Arc<Link>,
    bytes: usize,
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut state = self.link.state.lock();
        state.requests -= 1;
        state.bytes -= self.bytes;
        drop(state);
        self.link.changed.notify_all();
    }
}

/// The connection cannot be sent to any more.
#[derive(Debug)]
pub struct Broken;

impl Link {
    /// For a new connection.
    pub fn new(socket: Arc<Socket>) -> Arc<Self> {
        Arc::new(Self { socket, state: Mutex::default(), changed: Condvar::new() })
    }

    /// The connection's socket.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// True if nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.state.lock().requests == 0
    }

    /// Wait until nothing is in flight.
    pub fn wait_idle(&self) {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| state.requests > 0);
    }

    /// Count a request as in flight, if there is room.
    pub fn try_admit(self: &Arc<Self>, bytes: usize) -> Option<Charge> {
        let mut state = self.state.lock();
        state.has_room(bytes).then(|| self.charge(&mut state, bytes))
    }

    /// Count a request as in flight, when there is room.
    pub fn admit(self: &Arc<Self>, bytes: usize) -> Charge {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| !state.has_room(bytes));
        self.charge(&mut state, bytes)
    }

    fn charge(self: &Arc<Self>, state: &mut State, bytes: usize) -> Charge {
        state.requests += 1;
        state.bytes += bytes;
        Charge { link: Arc::clone(self), bytes }
    }

    /// Send, and wait for the client as long as the send timeout allows: only for the connection's
    /// own thread.
    pub fn send(&self, bytes: &[u8]) -> Result<(), Broken> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| state.is_sending);
        if state.is_broken {
            return Err(Broken);
        }
        state.is_sending = true;
        drop(state);
        let is_sent = self.socket.send_all(bytes).is_ok();
        if self.send_backlog(is_sent) { Ok(()) } else { Err(Broken) }
    }

    /// Send a reply, and what others leave meanwhile, without waiting for the client; takes what is
    /// in `reply`.
    pub fn deliver(self: &Arc<Self>, reply: &mut Output, charge: Charge) {
        let mut state = self.state.lock();
        if state.is_broken {
            drop(state);
            return;
        }
        let mut parcel = Parcel { reply: std::mem::take(reply), sent: 0, charge };
        if state.is_sending {
            state.backlog.push_back(parcel);
            return;
        }
        state.is_sending = true;
        drop(state);
        loop {
            let Ok(count) = self.socket.send_now(&parcel.reply.written()[parcel.sent..]) else {
                self.send_backlog(false);
                return;
            };
            parcel.sent += count;
            if parcel.sent < parcel.reply.len() {
                self.state.lock().backlog.push_front(parcel);
                self.send_backlog_elsewhere();
                return;
            }
            // The caller gets a buffer back to use again.
            *reply = parcel.reply;
            drop(parcel.charge);
            let mut state = self.state.lock();
            let Some(next) = state.backlog.pop_front() else {
                state.is_sending = false;
                drop(state);
                self.changed.notify_all();
                return;
            };
            parcel = next;
        }
    }

    /// Let another thread wait for the client. At most one exists at a time, as it is the one that
    /// sends.
    fn send_backlog_elsewhere(self: &Arc<Self>) {
        let link = Arc::clone(self);
        let thread = std::thread::Builder::new().name("nbd-drain".to_owned());
        if thread.spawn(move || link.send_backlog(true)).is_err() {
            self.send_backlog(false);
        }
    }

    /// Send what others left, then stop being the one that sends. With `is_intact` false, or once
    /// sending fails, the replies are given up and the connection is cut. Returns true if all was
    /// sent.
    fn send_backlog(&self, mut is_intact: bool) -> bool {
        loop {
            if !is_intact {
                self.socket.cut();
            }
            let mut state = self.state.lock();
            state.is_broken |= !is_intact;
            let Some(parcel) = state.backlog.pop_front() else {
                state.is_sending = false;
                drop(state);
                self.changed.notify_all();
                return is_intact;
            };
            drop(state);
            let Parcel { reply, sent, charge } = parcel;
            if is_intact {
                is_intact = self.socket.send_all(&reply.written()[sent..]).is_ok();
            }
            drop(charge);
        }
    }
}

impl State {
    fn has_room(&self, bytes: usize) -> bool {
        self.requests == 0
            || (self.requests < REQUESTS_IN_FLIGHT_MAX && self.bytes + bytes <= BYTES_IN_FLIGHT_MAX)
    }
}

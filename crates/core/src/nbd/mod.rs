//! Network Block Device: the server side of the protocol.
//!
//! [`session`] is the protocol, without I/O: bytes in; requests and replies out. It consists of
//! [`handshake`] and [`transmission`] on one side and [`reply`] on the other, over the numbers of
//! [`wire`]. [`server`] has the sockets and threads; what it promises and what is supported is in
//! `docs/nbd.md`.
//!
//! How a request goes: the connection's thread receives into one large buffer, and runs every
//! complete request in it in place. Cached reads and plain writes run there and then; their replies
//! are sent together when the buffer is used up. A read that needs the device, and anything that
//! syncs or may take long, goes to a worker of its export, which sends the reply itself.
#![forbid(unsafe_code)]

mod connection;
mod execute;
pub mod handshake;
mod link;
mod pool;
pub mod reply;
pub mod server;
pub mod session;
mod socket;
pub mod transmission;
pub mod wire;

pub use execute::{Patience, execute};
pub use server::{ConnectionInfo, Limits, Server, ServerError};

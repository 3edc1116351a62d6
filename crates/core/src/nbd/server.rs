//! The server: listeners, exports by name, connections, and their ends.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::connection;
use super::handshake::{Directory, Found};
use super::link::Link;
use super::pool::Pool;
use super::socket::{Listener, Socket};
use super::wire::STRING_BYTES_MAX;
use crate::export::Export;

/// After a failed `accept` (no file descriptors left, for one) the next is tried after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the server allows. The defaults suit a machine's own clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time; each costs a thread and some 512 KiB. More are closed at once.
    pub connections_max: usize,
    /// Threads for requests that wait for a device, for each export; the queue depth the device
    /// sees.
    pub workers_per_export_max: usize,
    /// A client must have chosen an export by then.
    pub handshake_timeout: Duration,
    /// A client that takes nothing for so long is cut.
    pub send_timeout: Duration,
    /// On [`Server::stop`] and forced [`Server::remove`]: how long to wait for the end of what is
    /// in flight.
    pub stop_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 64,
            workers_per_export_max: 32,
            handshake_timeout: Duration::from_secs(10),
            send_timeout: Duration::from_secs(60),
            stop_timeout: Duration::from_secs(10),
        }
    }
}

/// Why the server refused something.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ServerError {
    #[error("export {name}: in use by {connections} connection(s); disconnect them or force")]
    ExportInUse { name: String, connections: usize },
    #[error(
        "export {name}: removed and cut off, but a request of it has not ended within {waited:?}"
    )]
    ExportBusy { name: String, waited: Duration },
    #[error("export {name}: exists already")]
    ExportExists { name: String },
    #[error("export {name}: no such export")]
    ExportUnknown { name: String },
    #[error("export name of {length} bytes: must have 1 to 4096")]
    ExportName { length: usize },
    #[error("{address}: another process listens there")]
    AddressInUse { address: String },
    #[error("{path}: exists and is not a socket")]
    NotASocket { path: PathBuf },
    #[error("{address}: not a loopback address; without TLS only this machine may connect")]
    NotLoopback { address: SocketAddr },
    #[error("{address}: cannot listen: {source}")]
    Listen { address: String, source: io::Error },
    #[error("the server has been stopped")]
    Stopped,
}

impl ServerError {
    pub(super) fn listen(address: String, source: io::Error) -> Self {
        Self::Listen { address, source }
    }
}

/// One connected client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// The export it uses; `None` while it has not chosen.
    pub export: Option<String>,
    /// Address, or process and user.
    pub peer: String,
    /// When it connected.
    pub since: Instant,
}

/// An NBD server. Dropping it stops it.
pub struct Server {
    shared: Arc<Shared>,
    listeners: Mutex<Vec<(Arc<Listener>, JoinHandle<()>)>>,
}

/// Shared with the threads of listeners and connections.
struct Shared {
    limits: Limits,
    is_stopping: AtomicBool,
    /// Held for look-ups and book-keeping only: never while calling an export or waiting for a
    /// socket.
    registry: Mutex<Registry>,
    /// A connection ended.
    ended: Condvar,
}

#[derive(Default)]
struct Registry {
    exports: BTreeMap<String, Arc<Registered>>,
    default_name: Option<String>,
    connections: BTreeMap<u64, Entry>,
    serial: u64,
    threads: Vec<JoinHandle<()>>,
}

struct Registered {
    name: String,
    /// Tells an export from a later one of the same name.
    serial: u64,
    export: Arc<dyn Export>,
    pool: Pool,
}

struct Entry {
    /// Serial and name. The export itself is not held here: its last use ends before the entry
    /// goes.
    attached: Option<(u64, String)>,
    peer: String,
    since: Instant,
    socket: Arc<Socket>,
}

impl Registry {
    fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    fn resolve(&self, name: &str) -> Option<&Arc<Registered>> {
        let name = if name.is_empty() { self.default_name.as_deref()? } else { name };
        self.exports.get(name)
    }

    fn users(&self, serial: u64) -> impl Iterator<Item = &Entry> {
        let uses =
            move |entry: &&Entry| entry.attached.as_ref().is_some_and(|(id, _)| *id == serial);
        self.connections.values().filter(uses)
    }
}

impl Server {
    /// A server without listeners and exports.
    pub fn new(limits: Limits) -> Self {
        let shared = Arc::new(Shared {
            limits,
            is_stopping: AtomicBool::new(false),
            registry: Mutex::default(),
            ended: Condvar::new(),
        });
        Self { shared, listeners: Mutex::default() }
    }

    /// Listen on a Unix socket that only our own user can connect to. A socket file nobody listens
    /// on is replaced, one in use is an error.
    pub fn listen_unix(&self, path: impl AsRef<Path>) -> Result<(), ServerError> {
        self.start(Listener::unix(path.as_ref())?)
    }

    /// Listen on a loopback address; port 0 means any. Returns the address with its port.
    pub fn listen_tcp(&self, address: SocketAddr) -> Result<SocketAddr, ServerError> {
        let (listener, bound) = Listener::tcp(address)?;
        self.start(listener)?;
        Ok(bound)
    }

    fn start(&self, listener: Listener) -> Result<(), ServerError> {
        let listener = Arc::new(listener);
        let mut listeners = self.listeners.lock();
        if self.shared.is_stopping() {
            listener.close();
            return Err(ServerError::Stopped);
        }
        let (shared, accepting) = (Arc::clone(&self.shared), Arc::clone(&listener));
        let thread = std::thread::Builder::new()
            .name("nbd-accept".to_owned())
            .spawn(move || shared.accept(&accepting))
            .map_err(|error| {
                listener.close();
                ServerError::listen("thread".to_owned(), error)
            })?;
        listeners.push((listener, thread));
        Ok(())
    }

    /// Offer an export under a name.
    pub fn add(&self, name: &str, export: Arc<dyn Export>) -> Result<(), ServerError> {
        if name.is_empty() || name.len() > STRING_BYTES_MAX {
            return Err(ServerError::ExportName { length: name.len() });
        }
        let mut registry = self.shared.registry.lock();
        if self.shared.is_stopping() {
            return Err(ServerError::Stopped);
        }
        if registry.exports.contains_key(name) {
            return Err(ServerError::ExportExists { name: name.to_owned() });
        }
        let serial = registry.next_serial();
        let pool = Pool::new(self.shared.limits.workers_per_export_max);
        let registered = Registered { name: name.to_owned(), serial, export, pool };
        registry.exports.insert(name.to_owned(), Arc::new(registered));
        Ok(())
    }

    /// Withdraw an export; returns the number of connections that used it. In use, it is refused
    /// unless forced; then its connections are cut and have ended on return, so that nothing uses
    /// the export any more.
    pub fn remove(&self, name: &str, force: bool) -> Result<usize, ServerError> {
        let mut registry = self.shared.registry.lock();
        let Some(found) = registry.exports.get(name).cloned() else {
            return Err(ServerError::ExportUnknown { name: name.to_owned() });
        };
        let connections = registry.users(found.serial).count();
        if connections > 0 && !force {
            return Err(ServerError::ExportInUse { name: name.to_owned(), connections });
        }
        registry.exports.remove(name);
        if registry.default_name.as_deref() == Some(name) {
            registry.default_name = None;
        }
        for entry in registry.users(found.serial) {
            entry.socket.cut();
        }
        found.export.end_holding();
        let waited = self.shared.limits.stop_timeout;
        let is_used = |registry: &mut Registry| registry.users(found.serial).next().is_some();
        if self.shared.ended.wait_while_for(&mut registry, is_used, waited).timed_out() {
            return Err(ServerError::ExportBusy { name: name.to_owned(), waited });
        }
        drop(registry);
        found.pool.close();
        Ok(connections)
    }

    /// The export that the empty name means; `None` for none.
    pub fn set_default(&self, name: Option<&str>) -> Result<(), ServerError> {
        let mut registry = self.shared.registry.lock();
        if let Some(name) = name {
            if !registry.exports.contains_key(name) {
                return Err(ServerError::ExportUnknown { name: name.to_owned() });
            }
        }
        registry.default_name = name.map(str::to_owned);
        Ok(())
    }

    /// Who is connected, oldest first.
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        let registry = self.shared.registry.lock();
        let info = |entry: &Entry| ConnectionInfo {
            export: entry.attached.as_ref().map(|(_, name)| name.clone()),
            peer: entry.peer.clone(),
            since: entry.since,
        };
        registry.connections.values().map(info).collect()
    }

    /// Take nothing new, finish and answer what is in flight, close all connections, remove the
    /// socket files. Clients that do not take their answers within the stop timeout are cut. Waits
    /// for the exports as long as they need.
    pub fn stop(&self) {
        let shared = &self.shared;
        shared.is_stopping.store(true, Ordering::SeqCst);
        for (listener, thread) in self.listeners.lock().drain(..) {
            listener.close();
            join(thread);
        }
        let mut registry = shared.registry.lock();
        for entry in registry.connections.values() {
            entry.socket.stop_receiving();
        }
        for registered in registry.exports.values() {
            registered.export.end_holding();
        }
        let is_connected = |registry: &mut Registry| !registry.connections.is_empty();
        shared.ended.wait_while_for(&mut registry, is_connected, shared.limits.stop_timeout);
        for entry in registry.connections.values() {
            entry.socket.cut();
        }
        let threads = std::mem::take(&mut registry.threads);
        let exports = std::mem::take(&mut registry.exports);
        registry.default_name = None;
        drop(registry);
        for thread in threads {
            join(thread);
        }
        for registered in exports.values() {
            registered.pool.close();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Panics of connections are caught where they happen, and a thread that panicked nonetheless is
/// gone all the same.
fn join(thread: JoinHandle<()>) {
    let _ = thread.join();
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::SeqCst)
    }

    fn accept(self: &Arc<Self>, listener: &Listener) {
        while !self.is_stopping() {
            match listener.accept() {
                Ok(fd) => self.connect(fd),
                Err(_) if self.is_stopping() => return,
                Err(_) => std::thread::sleep(ACCEPT_PAUSE),
            }
        }
    }

    /// Start a thread for a new connection; if that cannot be, the connection is closed.
    fn connect(self: &Arc<Self>, fd: OwnedFd) {
        let Ok(socket) = Socket::new(fd, self.limits.send_timeout) else {
            return;
        };
        let socket = Arc::new(socket);
        let peer = socket.peer();
        let mut registry = self.registry.lock();
        if self.is_stopping() || registry.connections.len() >= self.limits.connections_max {
            return;
        }
        let id = registry.next_serial();
        let entry =
            Entry { attached: None, peer, since: Instant::now(), socket: Arc::clone(&socket) };
        registry.connections.insert(id, entry);
        let shared = Arc::clone(self);
        // Starts with the registry locked, so that the thread's end finds its handle in the list.
        let thread = std::thread::Builder::new()
            .name("nbd-connection".to_owned())
            .spawn(move || shared.converse(id, &socket));
        match thread {
            Ok(thread) => {
                registry.threads.retain(|thread| !thread.is_finished());
                registry.threads.push(thread);
            }
            Err(_) => {
                registry.connections.remove(&id);
            }
        }
    }

    /// A connection from its first byte to its last; whatever happens in it stays in it.
    fn converse(self: &Arc<Self>, id: u64, socket: &Arc<Socket>) {
        let link = Link::new(Arc::clone(socket));
        let timeout = self.limits.handshake_timeout;
        let host = Host { shared: Arc::clone(self), id, attached: OnceLock::new() };
        let result = catch_unwind(AssertUnwindSafe(|| connection::serve(&link, &host, timeout)));
        socket.cut();
        if result.is_err() {
            link.wait_idle();
        }
        drop(host);
        let entry = self.registry.lock().connections.remove(&id);
        drop(entry);
        self.ended.notify_all();
    }
}

/// The server as one connection sees it.
pub(super) struct Host {
    shared: Arc<Shared>,
    id: u64,
    attached: OnceLock<Arc<Registered>>,
}

impl Host {
    /// Workers of the export this connection uses.
    pub(super) fn pool(&self) -> Option<Pool> {
        self.attached.get().map(|registered| registered.pool.clone())
    }
}

impl From<&Arc<Registered>> for Found {
    fn from(registered: &Arc<Registered>) -> Self {
        Self { name: registered.name.clone(), export: Arc::clone(&registered.export) }
    }
}

impl Directory for Host {
    fn list(&self) -> Vec<Found> {
        self.shared.registry.lock().exports.values().map(Found::from).collect()
    }

    fn find(&self, name: &str) -> Option<Found> {
        self.shared.registry.lock().resolve(name).map(Found::from)
    }

    fn attach(&self, name: &str) -> Option<Found> {
        let mut registry = self.shared.registry.lock();
        let registered = Arc::clone(registry.resolve(name)?);
        let entry = registry.connections.get_mut(&self.id)?;
        entry.attached = Some((registered.serial, registered.name.clone()));
        drop(registry);
        let found = Found::from(&registered);
        // A connection attaches once: the handshake ends with it.
        let _ = self.attached.set(registered);
        Some(found)
    }

    fn is_stopping(&self) -> bool {
        self.shared.is_stopping()
    }
}

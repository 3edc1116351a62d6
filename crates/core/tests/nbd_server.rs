//! The server with real sockets and threads: what one client may do to another, and how things end.

#[path = "../examples/serve_memory/memory.rs"]
mod memory;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::MemoryDisk;
use parking_lot::{Condvar, Mutex};
use stillblock_core::export::{BlockSizes, Export, ExportError, StatusExtent, ZeroRequest};
use stillblock_core::nbd::wire::{self, command, option};
use stillblock_core::nbd::{Limits, Server, ServerError};

/// A disk in memory of which everything but the first MiB is "on a device", which waits while the
/// gate is closed.
struct SlowDisk {
    memory: MemoryDisk,
    gate: Gate,
}

#[derive(Default)]
struct Gate {
    /// Whether it is open, and how many came to it.
    state: Mutex<(bool, usize)>,
    changed: Condvar,
}

impl Gate {
    fn open(&self) {
        self.state.lock().0 = true;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut state = self.state.lock();
        state.1 += 1;
        self.changed.notify_all();
        self.changed.wait_while(&mut state, |state| !state.0);
    }

    fn wait_for_waiting(&self, count: usize) {
        let mut state = self.state.lock();
        let late = Duration::from_secs(10);
        let result = self.changed.wait_while_for(&mut state, |state| state.1 < count, late);
        assert!(!result.timed_out(), "{} of {count} arrived", state.1);
    }
}

const CACHED_BYTES: u64 = 1 << 20;
const PANIC_OFFSET: u64 = 3;

impl SlowDisk {
    fn new() -> Arc<Self> {
        let memory = MemoryDisk::new(vec![7; 4 << 20], false);
        Arc::new(Self { memory, gate: Gate::default() })
    }
}

impl Export for SlowDisk {
    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn block_sizes(&self) -> BlockSizes {
        self.memory.block_sizes()
    }
    fn description(&self) -> String {
        String::new()
    }
    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, ExportError> {
        assert!(offset != PANIC_OFFSET, "a bug in the engine");
        if offset < CACHED_BYTES { self.memory.try_read(offset, buffer) } else { Ok(false) }
    }
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.gate.pass();
        assert!(offset != CACHED_BYTES + PANIC_OFFSET, "a bug in the engine");
        self.memory.read(offset, buffer)
    }
    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), ExportError> {
        self.memory.write(offset, data, fua)
    }
    fn write_zeroes(&self, offset: u64, length: u64, how: ZeroRequest) -> Result<(), ExportError> {
        self.memory.write_zeroes(offset, length, how)
    }
    fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), ExportError> {
        self.memory.trim(offset, length, fua)
    }
    fn flush(&self) -> Result<(), ExportError> {
        self.gate.pass();
        Ok(())
    }
    fn cache(&self, _: u64, _: u64) -> Result<(), ExportError> {
        Ok(())
    }
    fn contexts(&self) -> Vec<String> {
        Vec::new()
    }
    fn block_status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        self.memory.block_status(context, offset, length, extents_max)
    }
}

struct Scene {
    server: Server,
    slow: Arc<SlowDisk>,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

/// A failed test must not leave the server waiting for the disk.
impl Drop for Scene {
    fn drop(&mut self) {
        self.slow.gate.open();
    }
}

fn scene_with(limits: Limits) -> Scene {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("nbd.sock");
    let server = Server::new(limits);
    let slow = SlowDisk::new();
    server.add("fast", Arc::new(MemoryDisk::new(vec![1; 1 << 20], false))).expect("new");
    server.add("slow", Arc::clone(&slow) as Arc<dyn Export>).expect("new");
    server.listen_unix(&path).expect("a fresh path");
    Scene { server, slow, path, _directory: directory }
}

fn scene() -> Scene {
    scene_with(Limits::default())
}

/// A client with simple replies.
struct Client(UnixStream);

impl Client {
    fn connect(scene: &Scene, name: &str) -> Self {
        let mut client = Self::connect_only(scene);
        let mut hello = vec![0, 0, 0, 3];
        hello.extend(wire::MAGIC_OPTION.to_be_bytes());
        hello.extend(option::EXPORT_NAME.to_be_bytes());
        hello.extend(u32::try_from(name.len()).expect("short").to_be_bytes());
        hello.extend(name.as_bytes());
        client.0.write_all(&hello).expect("sent");
        client.receive(10);
        client
    }

    fn connect_only(scene: &Scene) -> Self {
        let stream = UnixStream::connect(&scene.path).expect("a listener");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let mut client = Self(stream);
        client.receive(18);
        client
    }

    fn ask(&mut self, cookie: u64, kind: u16, offset: u64, length: u32) {
        let mut bytes = wire::MAGIC_REQUEST.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        self.0.write_all(&bytes).expect("sent");
    }

    fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes).expect("an answer");
        bytes
    }

    /// The cookie of a successful reply with that much data.
    fn reply(&mut self, data_bytes: usize) -> u64 {
        let header = self.receive(16);
        assert_eq!(header[4..8], [0; 4], "an error");
        self.receive(data_bytes);
        u64::from_be_bytes(header[8..].try_into().expect("eight bytes"))
    }

    fn is_cut(&mut self) -> bool {
        matches!(self.0.read(&mut [0; 64]), Ok(0) | Err(_))
    }

    fn works(&mut self) -> bool {
        self.ask(99, command::READ, 0, 512);
        self.reply(512) == 99
    }
}

#[test]
fn the_socket_is_ours_alone_and_goes_with_the_server() {
    let scene = scene();
    let mode = std::fs::metadata(&scene.path).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    scene.server.stop();
    assert!(!scene.path.exists());
}

#[test]
fn a_stale_socket_is_replaced_and_one_in_use_is_not() {
    let scene = scene();
    let other = Server::new(Limits::default());
    let result = other.listen_unix(&scene.path);
    assert!(matches!(result, Err(ServerError::AddressInUse { .. })), "{result:?}");
    let stale = scene.path.with_extension("stale");
    drop(UnixListener::bind(&stale).expect("a fresh path"));
    other.listen_unix(&stale).expect("nobody listens there");
    let file = scene.path.with_extension("file");
    std::fs::write(&file, "precious").expect("written");
    assert!(matches!(other.listen_unix(&file), Err(ServerError::NotASocket { .. })));
    assert!(Client::connect(&scene, "fast").works());
}

#[test]
fn tcp_is_for_loopback_only() {
    let server = Server::new(Limits::default());
    let result = server.listen_tcp("0.0.0.0:0".parse().expect("an address"));
    assert!(matches!(result, Err(ServerError::NotLoopback { .. })));
    let bound = server.listen_tcp("127.0.0.1:0".parse().expect("an address")).expect("a port");
    let mut stream = std::net::TcpStream::connect(bound).expect("a listener");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).expect("a greeting");
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    server.stop();
    assert!(std::net::TcpStream::connect(bound).is_err());
}

#[test]
fn an_export_in_use_is_removed_only_by_force_and_only_its_clients_are_cut() {
    let scene = scene();
    let mut fast = Client::connect(&scene, "fast");
    let mut slow = Client::connect(&scene, "slow");
    let result = scene.server.remove("slow", false);
    assert!(matches!(result, Err(ServerError::ExportInUse { connections: 1, .. })), "{result:?}");
    assert!(slow.works());
    assert_eq!(scene.server.remove("slow", true).expect("forced"), 1);
    assert!(slow.is_cut());
    assert!(fast.works());
    assert_eq!(Arc::strong_count(&scene.slow), 1, "nothing uses a removed export");
}

#[test]
fn an_export_nobody_uses_any_more_can_be_removed() {
    let scene = scene();
    let mut client = Client::connect(&scene, "slow");
    client.ask(1, command::DISC, 0, 0);
    assert!(client.is_cut());
    let deadline = Instant::now() + Duration::from_secs(10);
    while scene.server.remove("slow", false).is_err() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert_eq!(Arc::strong_count(&scene.slow), 1);
}

#[test]
fn connections_are_listed_with_their_export() {
    let scene = scene();
    let _fast = Client::connect(&scene, "fast");
    let _undecided = Client::connect_only(&scene);
    let exports: Vec<_> = scene.server.connections().into_iter().map(|info| info.export).collect();
    assert_eq!(exports, [Some("fast".to_owned()), None]);
    assert!(scene.server.connections()[0].peer.starts_with("pid "));
}

#[test]
fn a_cached_read_does_not_wait_behind_an_uncached_one() {
    let scene = scene();
    let mut client = Client::connect(&scene, "slow");
    client.ask(1, command::READ, CACHED_BYTES, 512);
    client.ask(2, command::FLUSH, 0, 0);
    client.ask(3, command::READ, 0, 512);
    assert_eq!(client.reply(512), 3);
    scene.slow.gate.open();
    let mut rest = [0; 2 * 16 + 512];
    client.0.read_exact(&mut rest).expect("both replies");
}

#[test]
fn disconnect_and_half_close_wait_for_what_is_outstanding() {
    for is_polite in [true, false] {
        let scene = scene();
        let mut client = Client::connect(&scene, "slow");
        for cookie in 0..8 {
            client.ask(cookie, command::READ, CACHED_BYTES, 4096);
        }
        if is_polite {
            client.ask(0, command::DISC, 0, 0);
        } else {
            client.0.shutdown(std::net::Shutdown::Write).expect("half");
        }
        scene.slow.gate.wait_for_waiting(8);
        scene.slow.gate.open();
        let mut cookies: Vec<u64> = (0..8).map(|_| client.reply(4096)).collect();
        cookies.sort_unstable();
        assert_eq!(cookies, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert!(client.is_cut());
    }
}

#[test]
fn a_client_that_reads_no_replies_holds_up_nobody() {
    let scene = scene();
    let mut lazy = Client::connect(&scene, "slow");
    for cookie in 0..60 {
        lazy.ask(cookie, command::READ, CACHED_BYTES, 1 << 20);
    }
    scene.slow.gate.open();
    let mut other = Client::connect(&scene, "slow");
    for cookie in 0..100 {
        other.ask(cookie, command::READ, CACHED_BYTES, 4096);
        assert_eq!(other.reply(4096), cookie);
    }
    let mut cookies: Vec<u64> = (0..60).map(|_| lazy.reply(1 << 20)).collect();
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(0..60));
}

#[test]
fn more_requests_than_may_be_in_flight_are_all_answered() {
    let scene = scene();
    let mut client = Client::connect(&scene, "slow");
    // From another thread: the socket does not take all while the server does not read.
    let mut sender = Client(client.0.try_clone().expect("a descriptor"));
    let sending = std::thread::spawn(move || {
        for cookie in 0..1000 {
            sender.ask(cookie, command::READ, CACHED_BYTES, 512);
        }
    });
    scene.slow.gate.wait_for_waiting(32);
    scene.slow.gate.open();
    sending.join().expect("all sent");
    let mut cookies: Vec<u64> = (0..1000).map(|_| client.reply(512)).collect();
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(0..1000));
}

#[test]
fn large_writes_arrive_whole() {
    let scene = scene();
    let mut client = Client::connect(&scene, "slow");
    for (cookie, size) in (0..).zip([3 << 20, 600_000, 1 << 20, 70_000, 10]) {
        let data: Vec<u8> = (0..size).map(|at| u8::try_from(at % 253).expect("< 253")).collect();
        client.ask(cookie, command::WRITE, 11, size);
        client.0.write_all(&data).expect("sent");
        assert_eq!(client.reply(0), cookie);
        let mut stored = vec![0; data.len()];
        scene.slow.memory.read(11, &mut stored).expect("inside");
        assert!(stored == data);
    }
}

#[test]
fn a_panic_ends_only_its_own_connection() {
    let scene = scene();
    scene.slow.gate.open();
    let mut witness = Client::connect(&scene, "slow");
    for offset in [PANIC_OFFSET, CACHED_BYTES + PANIC_OFFSET] {
        let mut victim = Client::connect(&scene, "slow");
        victim.ask(1, command::READ, offset, 512);
        assert!(victim.is_cut());
    }
    assert!(witness.works());
    scene.server.remove("slow", true).expect("forced");
    assert!(witness.is_cut());
    assert_eq!(Arc::strong_count(&scene.slow), 1);
}

#[test]
fn stop_answers_what_is_in_flight_and_closes_the_rest() {
    let scene = scene();
    let mut busy = Client::connect(&scene, "slow");
    busy.ask(5, command::READ, CACHED_BYTES, 512);
    scene.slow.gate.wait_for_waiting(1);
    let mut idle = Client::connect(&scene, "fast");
    let mut undecided = Client::connect_only(&scene);
    std::thread::scope(|scope| {
        scope.spawn(|| scene.server.stop());
        assert!(idle.is_cut());
        assert!(undecided.is_cut());
        scene.slow.gate.open();
        assert_eq!(busy.reply(512), 5);
        assert!(busy.is_cut());
    });
    assert_eq!(Arc::strong_count(&scene.slow), 1);
    let result = scene.server.add("late", Arc::new(MemoryDisk::new(vec![], true)));
    assert!(matches!(result, Err(ServerError::Stopped)));
}

#[test]
fn connections_over_the_limit_are_closed_and_others_go_on() {
    let scene = scene_with(Limits { connections_max: 2, ..Limits::default() });
    let mut first = Client::connect(&scene, "fast");
    let mut second = Client::connect(&scene, "fast");
    let mut third = Client(UnixStream::connect(&scene.path).expect("a listener"));
    assert!(third.is_cut());
    assert!(first.works() && second.works());
}

#[test]
fn a_handshake_that_takes_too_long_is_ended() {
    let handshake_timeout = Duration::from_millis(200);
    let scene = scene_with(Limits { handshake_timeout, ..Limits::default() });
    let mut chosen = Client::connect(&scene, "fast");
    let mut undecided = Client::connect_only(&scene);
    // A byte now and then does not help.
    undecided.0.write_all(&[0, 0]).expect("sent");
    assert!(undecided.is_cut());
    assert!(chosen.works());
}

#[test]
fn a_client_that_takes_no_replies_for_too_long_is_cut() {
    let send_timeout = Duration::from_millis(200);
    let scene = scene_with(Limits { send_timeout, ..Limits::default() });
    scene.slow.gate.open();
    for offset in [0, CACHED_BYTES] {
        let mut lazy = Client::connect(&scene, "slow");
        for cookie in 0..30 {
            lazy.ask(cookie, command::READ, offset, 1 << 20);
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while !scene.server.connections().is_empty() {
            assert!(Instant::now() < deadline, "still connected");
            std::thread::yield_now();
        }
    }
}

#[test]
fn the_default_export_goes_with_its_export() {
    let scene = scene();
    assert!(matches!(
        scene.server.set_default(Some("nope")),
        Err(ServerError::ExportUnknown { .. })
    ));
    scene.server.set_default(Some("fast")).expect("it exists");
    Client::connect(&scene, "").ask(1, command::DISC, 0, 0);
    scene.server.remove("fast", true).expect("forced");
    scene.server.add("fast", Arc::new(MemoryDisk::new(vec![0; 512], true))).expect("free again");
    let result = scene.server.add("fast", Arc::new(MemoryDisk::new(vec![0; 512], true)));
    assert!(matches!(result, Err(ServerError::ExportExists { .. })));
}

//! The few socket calls the server needs, for both families alike.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use super::server::ServerError;

/// Connections the kernel keeps until they are accepted.
const BACKLOG: i32 = 64;
/// Room for replies in the kernel: a thread that has sent one can go on. The kernel clamps it to
/// what it allows.
const SEND_BUFFER_BYTES: usize = 1 << 20;

/// A connected stream socket.
pub struct Socket(OwnedFd);

impl Socket {
    /// Take over an accepted connection.
    pub fn new(fd: OwnedFd, send_timeout: Duration) -> io::Result<Self> {
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, Some(send_timeout))?;
        sockopt::set_socket_send_buffer_size(&fd, SEND_BUFFER_BYTES)?;
        if sockopt::socket_domain(&fd)? != AddressFamily::UNIX {
            sockopt::set_tcp_nodelay(&fd, true)?;
            sockopt::set_socket_keepalive(&fd, true)?;
        }
        Ok(Self(fd))
    }

    /// Who is at the other end, for people.
    pub fn peer(&self) -> String {
        if let Ok(Some(address)) = rustix::net::getpeername(&self.0) {
            if let Ok(address) = SocketAddr::try_from(address) {
                return address.to_string();
            }
        }
        match sockopt::socket_peercred(&self.0) {
            Ok(who) => format!("pid {} uid {}", who.pid.as_raw_nonzero(), who.uid.as_raw()),
            Err(_) => "unknown".to_owned(),
        }
    }

    /// Wait at most that long for bytes, `None` for ever.
    pub fn set_receive_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(&self.0, sockopt::Timeout::Recv, timeout)?)
    }

    /// Wait for bytes; 0 at the end of the stream.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::net::recv(&self.0, &mut *buffer, RecvFlags::empty()) {
                Ok((count, _)) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Send everything, waiting as long as the send timeout allows.
    pub fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Send what goes without waiting; returns how much that was.
    pub fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        while sent < bytes.len() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.0, &bytes[sent..], flags) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(sent)
    }

    /// Take nothing more from the peer; what it sent already can still be received.
    pub fn stop_receiving(&self) {
        // An error means that the peer is gone already.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Read);
    }

    /// End the connection in both directions; threads that wait on it wake up.
    pub fn cut(&self) {
        // An error means that the peer is gone already.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }
}

/// A socket that takes connections, with its file if it has one.
pub struct Listener {
    fd: OwnedFd,
    file: Option<SocketFile>,
}

struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Listen at a path, only for our own user; replaces a socket nobody listens on.
    pub fn unix(path: &Path) -> Result<Self, ServerError> {
        let failed = |error: io::Error| ServerError::listen(path.display().to_string(), error);
        remove_stale(path)?;
        let fd = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|error| failed(error.into()))?;
        // Before bind: the file is then made with these rights, and is never open to others for a
        // moment.
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(|error| failed(error.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
        match rustix::net::bind(&fd, &address) {
            Ok(()) => {}
            Err(Errno::ADDRINUSE) => {
                return Err(ServerError::AddressInUse { address: path.display().to_string() });
            }
            Err(error) => return Err(failed(error.into())),
        }
        rustix::net::listen(&fd, BACKLOG).map_err(|error| failed(error.into()))?;
        let meta = std::fs::symlink_metadata(path).map_err(failed)?;
        let file = SocketFile { path: path.to_owned(), device: meta.dev(), inode: meta.ino() };
        Ok(Self { fd, file: Some(file) })
    }

    /// Listen on a loopback address; port 0 means any. Returns the address with its port.
    pub fn tcp(address: SocketAddr) -> Result<(Self, SocketAddr), ServerError> {
        if !address.ip().is_loopback() {
            return Err(ServerError::NotLoopback { address });
        }
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::AddrInUse => ServerError::AddressInUse { address: address.to_string() },
            _ => ServerError::listen(address.to_string(), error),
        };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        Ok((Self { fd: listener.into(), file: None }, bound))
    }

    /// Wait for a connection.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        Ok(rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC)?)
    }

    /// Take no more connections, and remove the file if it is still ours.
    pub fn close(&self) {
        // Wakes the thread in `accept`. An error means that it is closed already.
        let _ = rustix::net::shutdown(self.fd.as_fd(), Shutdown::Both);
        if let Some(file) = &self.file {
            let is_ours = std::fs::symlink_metadata(&file.path)
                .is_ok_and(|meta| meta.dev() == file.device && meta.ino() == file.inode);
            if is_ours {
                // If it cannot be removed, the next server replaces it.
                let _ = std::fs::remove_file(&file.path);
            }
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), ServerError> {
    let failed = |error: io::Error| ServerError::listen(path.display().to_string(), error);
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {}
        Ok(_) => return Err(ServerError::NotASocket { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        Ok(_) => Err(ServerError::AddressInUse { address: path.display().to_string() }),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(ServerError::AddressInUse { address: path.display().to_string() })
        }
        Err(error) => Err(failed(error)),
    }
}

//! Threads that answer the kernel for one mount.

use crate::filesystem::ImageFilesystem;
use crate::tree::Tree;
use fuser::{Config, Session, SessionACL};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Requests that may wait for a device at the same time.
const THREADS: usize = 16;

/// One mount being answered. It ends when it is unmounted, by whomever; until then dropping this
/// changes nothing.
pub struct Serving(JoinHandle<()>);

impl Serving {
    /// Answer on a descriptor of `/dev/fuse` that was mounted just now.
    pub fn start(tree: Arc<Tree>, device: OwnedFd) -> io::Result<Self> {
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        // Who may use the mount is the kernel's business: without `allow_other` only its owner.
        config.acl = SessionACL::All;
        let session =
            Session::from_fd(ImageFilesystem::new(tree), device, SessionACL::All, config)?;
        let thread = std::thread::Builder::new().name("fuse".to_owned()).spawn(move || {
            // It ends with an error when the mount is aborted: an end like any other.
            let _ = session.run();
        })?;
        Ok(Self(thread))
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.0.is_finished()
    }
}

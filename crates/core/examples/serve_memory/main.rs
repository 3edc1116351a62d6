//! The smallest embedding of the server: one disk in memory, on a Unix socket, until standard input
//! ends.
//!
//! ```text
//! cargo run --release --example serve_memory -- /tmp/memory.sock 1024
//! nbdinfo 'nbd+unix:///disk?socket=/tmp/memory.sock'
//! ```

mod memory;

use std::error::Error;
use std::sync::Arc;

use memory::MemoryDisk;
use stillblock_core::nbd::{Limits, Server};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: serve_memory SOCKET [MIB]")?;
    let size_mib: usize = arguments.next().map_or(Ok(64), |text| text.parse())?;

    let server = Server::new(Limits::default());
    server.add("disk", Arc::new(MemoryDisk::new(vec![0; size_mib << 20], false)))?;
    server.add("archive", Arc::new(MemoryDisk::new(b"read me\n".repeat(4096), true)))?;
    server.set_default(Some("disk"))?;
    server.listen_unix(&path)?;

    println!("nbd+unix:///disk?socket={path}");
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    server.stop();
    Ok(())
}

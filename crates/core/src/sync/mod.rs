//! Locks, threads and time, as the engine uses them.
//!
//! Those of the system; or, built with the feature `simulation`, those of a seeded scheduler that
//! runs one thread at a time and decides which goes on at every one of these calls. The engine is
//! the same code in both. Plain counters stay with `std`: nothing is decided by them.

#[cfg(feature = "simulation")]
mod simulated;

#[cfg(feature = "simulation")]
pub use simulated::begin;

#[cfg(feature = "simulation")]
pub use simulated::{
    AtomicBool, AtomicU64, Clock, Condvar, JoinHandle, Mutex, MutexGuard, RwLock, breathe, spawn,
    unix_ns,
};

#[cfg(not(feature = "simulation"))]
pub use system::{
    AtomicBool, AtomicU64, Clock, Condvar, JoinHandle, Mutex, MutexGuard, RwLock, breathe, spawn,
    unix_ns,
};

#[cfg(not(feature = "simulation"))]
mod system {
    pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
    pub use std::sync::atomic::{AtomicBool, AtomicU64};
    pub use std::thread::JoinHandle;
    pub use std::time::Instant as Clock;

    /// Run `work` in a thread of its own.
    pub fn spawn(
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(name.into()).spawn(work)
    }

    /// Nanoseconds since 1970.
    pub fn unix_ns() -> u64 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
    }

    /// Let others go on, in the simulation; here they do.
    #[inline]
    pub fn breathe() {}
}
